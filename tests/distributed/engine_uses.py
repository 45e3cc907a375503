"""What tests do with a running engine, importable by its process. Each returns plain data."""

import random
import resource
import threading
import time
from dataclasses import replace

from megatron.core.inference.sampling_params import SamplingParams
from models import random_tokens

from megatron_star.config import StarConfig
from megatron_star.engine.engine import StarEngine
from megatron_star.engine.request import StarRequest, StarResult
from megatron_star.engine.thread import EngineThread

MODES = (
    StarConfig(block_size=300),
    StarConfig(mode="exact"),
    StarConfig(mode="auto", block_size=128),
    StarConfig(block_size=200, neighbor_blocks=1, anchor="recompute", wave_tokens=500),
)


def questions(num_contexts: int, per_context: int) -> list[StarRequest]:
    """Requests of 100 to 6,000 context tokens in mixed modes, greedy and sampled."""
    rng = random.Random(0)
    requests = []
    for i in range(num_contexts):
        context = random_tokens(100 + 5900 * i // max(1, num_contexts - 1), seed=i)
        for j in range(per_context):
            sampling = {"top_k": 1} if j % 2 else {"temperature": 1.2, "top_p": 0.9}
            requests.append(
                StarRequest(
                    context_tokens=context,
                    query_tokens=random_tokens(rng.randrange(1, 30), seed=1000 + 10 * i + j),
                    star=MODES[i % len(MODES)],
                    sampling=SamplingParams(num_tokens_to_generate=rng.randrange(1, 12), **sampling),
                    seed=j,
                )
            )
    rng.shuffle(requests)
    return requests


def together_and_one_by_one(engine: EngineThread) -> dict:
    """Tokens of 32 requests asked at once, and of each alone; contexts that were encoded for the first."""
    requests = questions(8, 4)
    answers = [engine.submit(request) for request in requests]
    together = [answer.result(100).tokens for answer in answers]
    encodings = engine.stats()["context_encodings"]
    alone = [engine.submit(request).result(100).tokens for request in requests]
    return {"together": together, "alone": alone, "encodings": encodings}


def encoded_ahead(engine: EngineThread) -> dict:
    """A context that is encoded before anybody asks, and a question; then it is deleted, beside another."""
    question, other = (replace(asked, speculate="off") for asked in questions(3, 1)[1:])
    ahead = replace(question, query_tokens=[], sampling=SamplingParams(num_tokens_to_generate=0))
    alone = engine.submit(question).result(60)
    engine.engine.scheduler.drop_unused_contexts()
    answer = engine.submit(ahead)
    results = [answer.result(60), engine.submit(ahead).result(60), engine.submit(question).result(60)]
    engine.submit(other).result(60)
    held = engine.num_encoded_tokens(answer.key)
    engine.forget(answer.key)
    while engine.num_encoded_tokens(answer.key) is not None:
        time.sleep(0.01)
    sizes = [context.bytes_per_rank for context in engine.engine.scheduler.contexts.values()]
    left = [sum(of_rank) for of_rank in zip(*sizes, strict=True)]
    return {
        "alone": alone,
        "results": results,
        "held": held,
        "streamed": list(answer),
        "left": left,
        "stats": engine.stats(),
    }


def streamed(engine: EngineThread) -> dict:
    """The pieces of a streamed answer with a stop string, and its final text."""
    request = replace(questions(1, 1)[0], sampling=SamplingParams(num_tokens_to_generate=20, top_k=1))
    tokens = engine.submit(request).result(60).tokens
    stop = f" {tokens[10]} {tokens[11]} "
    request.sampling.stop_words = [stop]
    answer = engine.submit(request)
    pieces = [new.text for new in answer]
    return {"pieces": pieces, "text": answer.result(1).text, "stop": stop}


def soak(engine: EngineThread, num_requests: int) -> dict:
    """Random requests with random cancels, deadlines and stop strings; what came out, and what is left."""
    rng = random.Random(1)
    contexts = [random_tokens(rng.randrange(0, 250), seed=i) for i in range(12)]
    answers, memory = [], []
    for i in range(num_requests):
        answers.append(engine.submit(_random_request(rng, contexts)))
        if rng.random() < 0.2:
            threading.Timer(rng.random() * 0.1, answers[-1].cancel).start()
        while sum(not answer.ended.is_set() for answer in answers[-40:]) > 30:
            time.sleep(0.002)
        if i % (num_requests // 10) == num_requests // 20:
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    reasons = [answer.result(60).finish_reason for answer in answers]
    while not engine.engine.scheduler.idle:
        time.sleep(0.01)
    left = engine.stats()
    cached = sum(sum(context.bytes_per_rank) for context in engine.engine.scheduler.contexts.values())
    return {"reasons": reasons, "left": left, "cached_bytes": cached, "memory_kb": memory}


def in_each_others_way(engine: EngineThread) -> dict:
    """Tokens of requests that share, extend and wait for contexts, some cancelled; and of each alone."""
    rng = random.Random(2)
    texts = [random_tokens(320, seed=i) for i in range(2)]
    requests = [_overlapping_request(rng, rng.choice(texts)) for _ in range(60)]
    answers = []
    for request in requests:
        answers.append(engine.submit(request))
        if rng.random() < 0.3:
            threading.Timer(rng.random() * 0.05, answers[-1].cancel).start()
    results = [answer.result(100) for answer in answers]
    uncancelled = [i for i, result in enumerate(results) if result.finish_reason != "cancelled"]
    alone = []
    for i in uncancelled:
        engine.engine.scheduler.drop_unused_contexts()
        alone.append(engine.submit(requests[i]).result(60).tokens)
    return {"together": [results[i].tokens for i in uncancelled], "alone": alone}


def _overlapping_request(rng: random.Random, text: list[int]) -> StarRequest:
    num_tokens = rng.choice([80, 160, 240, 320])
    return StarRequest(
        context_tokens=text[:num_tokens],
        query_tokens=random_tokens(3, seed=rng.randrange(1000)),
        star=StarConfig(
            mode=rng.choice(["star", "star", "exact"]),
            block_size=rng.choice([40, 80]),
            anchor_size=rng.choice([None, None, 25]),
            wave_tokens=rng.choice([20, 50, 200, 1000]),
        ),
        sampling=SamplingParams(num_tokens_to_generate=rng.randrange(2, 8), top_k=1),
        turn_edges=rng.choice([(), tuple(edge for edge in (80, 160) if edge < num_tokens)]),
    )


def damaged_for_a_while(engine: EngineThread) -> dict:
    """Results while a norm's weight holds a number that is none, and of a request after that."""
    weight = engine.engine.star_model.model.decoder.final_layernorm.weight
    good, results = weight.data.clone(), {}
    for name, value in (("NaN", float("nan")), ("infinite", float("inf"))):
        weight.data[3] = value
        results[name] = each_result(engine, _two_short_ones())
        weight.data.copy_(good)
    engine.engine.scheduler.drop_unused_contexts()
    results["repaired"] = each_result(engine, _two_short_ones())
    results["running"] = engine.stats()["running"]
    return results


def each_result(engine: EngineThread, requests: list[StarRequest]) -> list[StarResult]:
    """Results of requests that are asked together."""
    answers = [engine.submit(request) for request in requests]
    return [answer.result(60) for answer in answers]


def _two_short_ones() -> list[StarRequest]:
    """One greedy and one not."""
    return [
        StarRequest(
            context_tokens=random_tokens(n),
            query_tokens=[5],
            sampling=SamplingParams(num_tokens_to_generate=4, top_k=n % 2),
        )
        for n in (31, 50)
    ]


def the_callers_list_changes(engine: StarEngine) -> tuple[list[int], list[int]]:
    """Tokens of a request whose lists are changed after it was submitted; and of one whose are not."""
    request = StarRequest(context_tokens=random_tokens(300), query_tokens=[5, 6])
    request.sampling.num_tokens_to_generate, request.sampling.top_k = 8, 1
    untouched = engine.generate([request])[0].tokens
    engine.scheduler.drop_unused_contexts()
    answer = engine.submit(request)
    request.context_tokens[:] = [0] * 200
    request.query_tokens.append(7)
    request.sampling.num_tokens_to_generate = 1
    while not answer.ended.is_set():
        engine.step()
    return answer.result().tokens, untouched


def one_gives_up_while_the_other_waits(engine: StarEngine) -> dict:
    """A and B share a context in waves of other sizes; B waits for A's memory, and A is cancelled."""
    tokens = {}
    for first_wave, second_wave in ((200, 50), (50, 200)):
        base = StarRequest(context_tokens=random_tokens(400), query_tokens=[5])
        first, second = (
            replace(
                base,
                star=StarConfig(block_size=100, wave_tokens=wave),
                sampling=SamplingParams(num_tokens_to_generate=count, top_k=1),
            )
            for wave, count in ((first_wave, 4), (second_wave, 300))
        )
        a, b = engine.submit(first), engine.submit(second)
        engine.step()
        a.cancel()
        while not b.ended.is_set():
            engine.step()
        engine.scheduler.drop_unused_contexts()
        tokens[first_wave] = b.result().tokens, engine.generate([second])[0].tokens
        engine.scheduler.drop_unused_contexts()
    return tokens


def _random_request(rng: random.Random, contexts: list[list[int]]) -> StarRequest:
    sampling = SamplingParams(
        num_tokens_to_generate=rng.randrange(1, 12),
        temperature=rng.choice([0.0, 1.0, 3.0]),
        termination_id=rng.choice([None, rng.randrange(257)]),
        stop_words=rng.choice([None, [f"{rng.randrange(10)} "], ["nothing like this"]]),
    )
    return StarRequest(
        context_tokens=rng.choice(contexts),
        query_tokens=random_tokens(rng.randrange(1, 8), seed=rng.randrange(1000)),
        star=rng.choice([StarConfig(block_size=40), StarConfig(mode="exact"), StarConfig(block_size=64)]),
        sampling=sampling,
        seed=rng.randrange(100),
        deadline_seconds=rng.choice([60.0, 60.0, 60.0, 0.02]),
    )


def soak_1000(engine: EngineThread) -> dict:
    """`soak` of a thousand requests."""
    return soak(engine, 1000)


def after_idling(engine: EngineThread) -> str:
    """How a request ends that comes after a pause longer than the groups' timeout."""
    time.sleep(8)
    return engine.submit(questions(1, 1)[0]).result(30).finish_reason


def beside_a_long_context(engine: EngineThread) -> dict:
    """Tokens that a sequence has while a long context is encoded beside it, and the waves of that context."""
    base = questions(1, 1)[0]
    running = engine.submit(replace(base, sampling=SamplingParams(num_tokens_to_generate=4000, top_k=1)))
    next(iter(running))
    before = len(running.tokens)
    one_token = SamplingParams(num_tokens_to_generate=1, top_k=1)
    star = StarConfig(block_size=320)
    long = engine.submit(
        replace(base, context_tokens=random_tokens(640, seed=9), star=star, sampling=one_token)
    )
    long.result(100)
    tokens = len(running.tokens) - before
    running.cancel()
    waves = long.plan.waves
    longest = max(segment.num_tokens for wave in waves for segment in wave)
    return {"tokens": tokens, "waves": len(waves), "longest_segment": longest}


def too_large_and_waiting(engine: EngineThread) -> dict:
    """What a request says that can never fit, and that one which does not fit now is answered later."""
    base = questions(1, 1)[0]
    try:
        engine.submit(replace(base, context_tokens=random_tokens(8000)))
        message = "accepted"
    except ValueError as error:
        message = str(error)
    fitting = [replace(base, context_tokens=random_tokens(1500, seed=i)) for i in range(6)]
    answers = [engine.submit(request) for request in fitting]
    reasons = [answer.result(60).finish_reason for answer in answers]
    return {"message": message, "reasons": reasons, "cached": engine.stats()["cached_contexts"]}


def turns(engine: EngineThread) -> list[dict]:
    """A conversation whose context grows, its last turn with nothing cached, and all of it exact."""
    context = random_tokens(900, seed=5)
    sampling = SamplingParams(num_tokens_to_generate=6, top_k=1)
    results = []
    for mode in ("star", "exact"):
        ask = StarRequest(
            context_tokens=context,
            query_tokens=[3, 4],
            star=StarConfig(mode=mode, block_size=100),
            sampling=sampling,
        )
        first = replace(ask, context_tokens=context[:350])
        second = replace(ask, context_tokens=context[:600], turn_edges=(350,))
        third = replace(ask, turn_edges=(350, 600))
        growing = [engine.submit(request).result(60) for request in (first, second, third)]
        engine.engine.scheduler.drop_unused_contexts()
        alone = engine.submit(third).result(60)
        whole = engine.submit(replace(ask, seed=1)).result(60)
        results.append(
            {
                "cached": [result.num_cached_tokens for result in growing],
                "growing": growing[-1].tokens,
                "alone": alone.tokens,
                "alone_cached": alone.num_cached_tokens,
                "whole": whole.tokens,
                "blocks": growing[-1].num_blocks,
            }
        )
    return results


HISTORIES = {
    "exact": StarConfig(mode="exact", wave_tokens=150),
    "passed keys": StarConfig(block_size=300, anchor_size=20, passed_keys=10, wave_tokens=200),
    "neighbors": StarConfig(block_size=300, neighbor_blocks=1),
}


def growing_histories(engine: EngineThread) -> dict:
    """Two agents that begin alike and send all of their history with each question, and say nothing of turns.

    For each configuration: the cached tokens of each request, the most contexts in a chain, and the
    log-probabilities of each answer; then of each answer alone.
    """
    found, scheduler = {}, engine.engine.scheduler
    for name, star in HISTORIES.items():
        scheduler.drop_unused_contexts()
        histories = [random_tokens(400) + random_tokens(90, seed=1 + agent) for agent in range(2)]
        asked, results, links = [], [], 0
        for turn in range(12):
            requests = [_next_question(history, star) for history in histories]
            asked += requests
            results += each_result(engine, requests)
            links = max(links, *(context.num_links for context in scheduler.contexts.values()))
            for history, result in zip(histories, results[-2:], strict=True):
                history += [*result.tokens, *random_tokens(20 + turn, seed=100 + turn)]
        alone = []
        for request in asked:
            scheduler.drop_unused_contexts()
            alone.append(engine.submit(request).result(60))
        found[name] = {
            "cached": [result.num_cached_tokens for result in results],
            "lengths": [result.num_context_tokens for result in results],
            "links": links,
            "tokens": ([result.tokens for result in results], [result.tokens for result in alone]),
            "logprobs": ([result.logprobs for result in results], [result.logprobs for result in alone]),
            "cached_alone": sum(result.num_cached_tokens for result in alone),
        }
    return found


def _next_question(history: list[int], star: StarConfig) -> StarRequest:
    """Its last 7 tokens are the query."""
    return StarRequest(
        context_tokens=history[:-7],
        query_tokens=history[-7:],
        star=star,
        sampling=SamplingParams(num_tokens_to_generate=5, top_k=1),
    )


def each_alone(requests: list[StarRequest], engine: EngineThread) -> list[list[int]]:
    """Tokens of each request, asked after the one before it has ended."""
    return [engine.submit(request).result(60).tokens for request in requests]


def of_two_lengths(engine: EngineThread) -> dict[str, StarResult | str]:
    """Answers of a model whose longrope has an original length of 48: within it and beyond, side by side."""

    def ask(num_context: int, num_query: int, num_generated: int, edges: tuple[int, ...] = ()) -> StarRequest:
        tokens = random_tokens(num_context + num_query)
        return StarRequest(
            context_tokens=tokens[:num_context],
            query_tokens=tokens[num_context:],
            star=StarConfig(mode="exact"),
            sampling=SamplingParams(num_tokens_to_generate=num_generated, top_k=1),
            turn_edges=edges,
        )

    asked = {"short": ask(30, 6, 13), "long": ask(30, 19, 4), "without context": ask(0, 60, 4)}
    answers = {name: engine.submit(request) for name, request in asked.items()}
    results = {name: answer.result(100) for name, answer in answers.items()}
    results["short again"] = engine.submit(asked["short"]).result(100)
    results["grown beyond"] = engine.submit(ask(47, 5, 4, (30,))).result(100)
    try:
        engine.submit(ask(30, 6, 14))
    except ValueError as error:
        results["refused"] = str(error)
    return results
