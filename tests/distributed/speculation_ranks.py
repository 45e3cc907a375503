"""What test_speculation.py runs on ranks."""

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from unittest.mock import patch

import torch.distributed as dist
from compiled_ranks import recorded
from megatron.core.inference.sampling_params import SamplingParams
from models import random_tokens
from ranks import ENGINE_LIMITS, NumbersAsText, load

from megatron_star.algorithm.star_model import StarModel
from megatron_star.algorithm.token_generation import NewTokens, Sequence, generate_step
from megatron_star.config import StarConfig
from megatron_star.engine.answer import Answer
from megatron_star.engine.command import Command
from megatron_star.engine.engine import StarEngine, run_worker
from megatron_star.engine.proposer import Guess
from megatron_star.engine.request import StarRequest, StarResult
from megatron_star.engine.speculation import Speculation
from megatron_star.planning import kv_memory
from megatron_star.speed.compiled_layers import compile_layers
from megatron_star.speed.sliced_linear import PARTS

VOCAB_SIZE = 257


class HalfRight:
    """A proposer that knows the answers: as many right tokens as it likes, and then others, of any number."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]]) -> None:
        """answers: by query."""
        self.answers, self.draw = answers, random.Random(0)

    def advance(self, answers: SequenceOf[Answer]) -> None:
        pass

    def guess(self, answers: SequenceOf[Answer]) -> list[Guess]:
        return [Guess(self._tokens(answer)) for answer in answers]

    def forget(self, answer: Answer) -> None:
        pass

    def _tokens(self, answer: Answer) -> list[int]:
        known = self.answers.get(tuple(answer.request.query_tokens), [])[len(answer.tokens) :]
        right = known[: self.draw.randint(0, 16)]
        return right + [self.draw.randrange(VOCAB_SIZE) for _ in range(self.draw.randint(0, 16 - len(right)))]


class Always(Speculation):
    """Proposes all that is guessed, whatever it costs."""

    def propose(self, running: SequenceOf[Answer]) -> None:
        speculating = [answer for answer in running if answer.request.speculate != "off"]
        for answer in speculating:
            self._compare(answer)
        due = [answer for answer in speculating if answer.is_answering]
        for answer, guess in self._guess(due):
            answer.proposals = guess.tokens[: max(0, answer.most_proposed)]
            self._drafting[answer.id].num_proposed = len(answer.proposals)


def requests() -> list[StarRequest]:
    """On two contexts and on none: greedy and sampled, with all that ends an answer."""
    contexts = [random_tokens(90), random_tokens(41, seed=2), []]
    samplings = [
        {"top_k": 1},
        {"temperature": 1.5},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    ]
    return [
        StarRequest(
            context_tokens=context,
            query_tokens=random_tokens(5, seed=10 * i + j),
            star=StarConfig(block_size=24),
            sampling=SamplingParams(num_tokens_to_generate=40 + i + j, **sampling),
            seed=j,
        )
        for i, context in enumerate(contexts)
        for j, sampling in enumerate(samplings)
    ]


def with_ends(alone: SequenceOf[StarRequest], answers: SequenceOf[StarResult]) -> list[StarRequest]:
    """The same requests, with a stop text, an end token, or such tokens too early, in what was answered."""
    changed = []
    for i, (request, result) in enumerate(zip(alone, answers, strict=True)):
        tokens, sampling = result.tokens, SamplingParams(**vars(request.sampling))
        if i % 3 == 0:
            sampling.stop_words = [f"{tokens[22]} {tokens[23]} "]
        changed.append(
            replace(
                request,
                query_tokens=[*request.query_tokens, 7] if i % 3 == 2 else request.query_tokens,
                sampling=sampling,
                end_tokens=(tokens[25],) if i % 3 == 1 else tuple(range(0, 250, 2)) if i % 3 == 2 else (),
                min_tokens=18 if i % 3 == 2 else 0,
            )
        )
    return changed


@patch.object(kv_memory, "TAIL_CHUNK_TOKENS", 24)
def with_and_without(
    checkpoint: str, sliced: bool = False, compiled_rows: SequenceOf[int] = ()
) -> tuple[list[StarResult], list[StarResult], int, int] | None:
    """Results without proposals and with those of `HalfRight`, and the steps that each of these took.

    Tails grow by so few tokens at a time that what is kept of them is moved often.
    """
    star_model, groups = load(checkpoint, 1)
    star_model = replace(star_model, sliced_parts=frozenset(PARTS if sliced else ()))
    star_model = compile_layers(star_model, compiled_rows, recorded)
    if dist.get_rank():
        run_worker(star_model, groups.control)
        return None
    engine = _engine(star_model, groups.control)
    plain = [replace(request, speculate="off") for request in requests()]
    plain = [*plain, *with_ends(plain, engine.generate(plain))]
    expected, steps = _counted(engine, plain)
    keys = [tuple(request.query_tokens) for request in plain]
    tokens = [result.tokens for result in expected]
    engine.speculation = Always(HalfRight(dict(zip(keys, tokens, strict=True))), star_model.vocab_size)
    found, fewer = _counted(engine, [replace(request, speculate="lookup") for request in plain])
    engine.stop()
    return expected, found, steps, fewer


def _engine(star_model: StarModel, control: dist.ProcessGroup) -> StarEngine:
    return StarEngine(star_model, NumbersAsText(), control, **ENGINE_LIMITS)


def _counted(engine: StarEngine, asked: SequenceOf[StarRequest]) -> tuple[list[StarResult], int]:
    """Their results, and the number of commands."""
    commands: list[Command] = []
    run = engine._run

    def noted(command: Command) -> object:
        commands.append(command)
        return run(command)

    with patch.object(engine, "_run", noted):
        return engine.generate(asked), len(commands)


def quoted(checkpoint: str) -> tuple[list[StarResult], list[StarResult], dict[str, int]] | None:
    """Greedy answers that quote their context, without proposals and with prompt lookup as the engine uses
    it; and what the engine counted.

    The model sees so few tokens back that after the same ones it always goes on in the same way.
    """
    star_model, groups = load(checkpoint, 1)
    if dist.get_rank():
        run_worker(star_model, groups.control)
        return None
    engine = _engine(star_model, groups.control)
    sampling = SamplingParams(top_k=1, num_tokens_to_generate=60)
    asked = StarRequest(context_tokens=[], query_tokens=random_tokens(40), sampling=sampling, speculate="off")
    (first,) = engine.generate([asked])
    context = random_tokens(50, seed=1) + asked.query_tokens + first.tokens + random_tokens(20, seed=2)
    again = [replace(asked, context_tokens=context, query_tokens=asked.query_tokens[n:]) for n in range(2)]
    expected = engine.generate(again)
    assert expected[0].tokens == first.tokens
    found = engine.generate([replace(request, speculate="lookup") for request in again])
    stats = engine.stats()
    engine.stop()
    return expected, found, stats


class Likeliest(HalfRight):
    """Proposes what is likely, which would be drawn too often if a step preferred it."""

    def _tokens(self, answer: Answer) -> list[int]:
        return self.answers[()][len(answer.tokens) :]


def drawn(checkpoint: str, num_requests: int, top_k: int) -> tuple[dict[int, float], list[int]] | None:
    """Probabilities of the second token after the likeliest first one; and those that were drawn beside
    proposals of what is likeliest."""
    star_model, groups = load(checkpoint, 1)
    if dist.get_rank():
        run_worker(star_model, groups.control)
        return None
    engine = _engine(star_model, groups.control)
    asked = replace(requests()[0], speculate="off")
    (greedy,) = engine.generate([asked])
    context = next(iter(engine.executor.contexts.values()))
    sequence = Sequence(context, 0)
    query = [*asked.query_tokens, greedy.tokens[0]]
    logits = generate_step(star_model, [NewTokens(sequence, query)])[0]
    values, tokens = logits.topk(top_k)
    expected = dict(zip(tokens.tolist(), values.softmax(0).tolist(), strict=True))
    engine.speculation = Always(Likeliest({(): greedy.tokens[:3]}), star_model.vocab_size)
    sampling = SamplingParams(temperature=1.0, top_k=top_k, num_tokens_to_generate=3)
    many = [replace(asked, sampling=sampling, seed=i, speculate="lookup") for i in range(num_requests)]
    answers = [result.tokens for result in engine.generate(many)]
    assert engine.speculation.num_accepted > num_requests / 50
    engine.stop()
    seconds = [answer[1] for answer in answers if answer[0] == greedy.tokens[0]]
    return expected, seconds


def tails_after_rejections(checkpoint: str) -> list[tuple[int, int]] | None:
    """Of the same request without and with proposals, most of them wrong: bytes of its tail on this rank, and
    tail tokens, each time when 30 tokens of the answer have been fed."""
    star_model, groups = load(checkpoint, 1)
    if dist.get_rank():
        run_worker(star_model, groups.control)
        return None
    engine, found = _engine(star_model, groups.control), []
    for speculate in ("off", "lookup"):
        engine.speculation = Always(HalfRight({}), star_model.vocab_size)  # never right on purpose
        answer = engine.submit(replace(requests()[0], speculate=speculate))
        while len(answer.tokens) < 31:
            engine.step()
        if answer.id in engine.scheduler._rewind:
            engine.executor.sequences[answer.id].rewind(engine.scheduler._rewind.pop(answer.id))
        sequence = engine.executor.sequences[answer.id]
        found.append((sequence.tail.num_bytes, sequence.num_tail_tokens - len(answer.tokens)))
        answer.cancel()
        engine.step()
        engine.step()
        assert not engine.executor.sequences
    engine.stop()
    return found
