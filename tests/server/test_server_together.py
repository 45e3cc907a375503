"""Many clients at once get what the engine gives to each alone."""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from distributed import run_ranks
from megatron.core.inference.sampling_params import SamplingParams
from ranks import on_engine
from transformers import AutoTokenizer

from megatron_star.config import StarConfig
from megatron_star.engine.request import StarRequest

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
import engine_uses  # noqa: E402

CONTEXTS = ["The sky is blue and the grass is green. " * 40, "Ten men went to mow a meadow. " * 12]
SERVERS_STAR = StarConfig(block_size=256)


class Question(NamedTuple):
    """An HTTP request, and what it means: texts of context and query, and how to sample."""

    method: str
    path: str
    body: dict[str, Any]
    context: str
    query: str
    num_tokens: int
    sampling: dict[str, Any]
    seed: int

    def for_engine(self, tokenizer) -> StarRequest:
        """The same without a server."""
        whole = tokenizer.encode(self.context + self.query, add_special_tokens=False)
        # Spaces between context and query are the query's, unless it is counted in tokens.
        counted = self.body.get("star", {}).get("query_tokens")
        before = len(tokenizer.encode(self.context.rstrip(" "), add_special_tokens=False))
        cut = len(whole) - counted if counted else before
        sampling = {"termination_id": tokenizer.eos_token_id, **self.sampling}
        return StarRequest(
            context_tokens=whole[:cut],
            query_tokens=whole[cut:],
            star=SERVERS_STAR,
            sampling=SamplingParams(num_tokens_to_generate=self.num_tokens, **sampling),
            seed=self.seed,
        )


def generate_question(index: int, greedy: bool) -> Question:
    """Megatron's PUT /api, with a context."""
    context, prompt = CONTEXTS[index % 8 // 4], f"{index} men"
    chosen = {"top_k": 1} if greedy else {"top_p": 0.8, "random_seed": index}
    body = {"prompts": [prompt], "contexts": [context], "tokens_to_generate": 2 + index % 5, **chosen}
    sampling = {"top_k": 1} if greedy else {"top_p": 0.8, "temperature": 1.0}
    return Question("PUT", "/api", body, context, prompt, 2 + index % 5, sampling, index)


def openai_question(index: int, greedy: bool) -> Question:
    """OpenAI's and Megatron's completions, and chats: without a context, before a separator, by a count."""
    tokens = 2 + index % 5
    body: dict[str, Any] = {"temperature": 0} if greedy else {"temperature": 0.9, "top_p": 0.8, "seed": index}
    sampling = {"top_k": 1} if greedy else {"temperature": 0.9, "top_p": 0.8}
    if index % 4 == 1:
        path, context, query = "/v1/completions", "", f"{index} plus one is"
        body |= {"model": "smollm2", "prompt": query, "max_tokens": tokens}
    elif index % 4 == 2:
        path, context, query = "/v1/chat/completions", CONTEXTS[1], f"What is {index}?"
        body |= {"model": "smollm2", "max_completion_tokens": tokens, "star": {"separator": "##"}}
        body["messages"] = [{"role": "user", "content": f"{context}##{query}"}]
        context = f"{SYSTEM}<|im_start|>user\n{context}"
        query += "<|im_end|>\n<|im_start|>assistant\n"
    else:
        path, context, query = "/completions", CONTEXTS[0], " What then?"  # three tokens
        body |= {"prompt": context + query, "max_tokens": tokens, "star": {"query_tokens": 3}}
    return Question("POST", path, body, context, query, tokens, sampling, index)


SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
)


def answer_of(question: Question, body: dict) -> str:
    """The text of any wire's answer, without the prompt."""
    if question.path == "/api":
        return body["text"][0].removeprefix(question.query)
    choice = body["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def test_64_clients_at_once_get_what_the_engine_gives_to_each_alone(server, smollm2):
    questions = [
        (openai_question if index % 4 else generate_question)(index, bool(index % 3)) for index in range(64)
    ]

    def ask(question: Question) -> str:
        send = server.put if question.method == "PUT" else partial(server.post, question.path)
        answer = send(question.body)
        assert answer.status_code == 200, answer.text
        return answer_of(question, answer.json())

    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(ask, questions))

    tokenizer = AutoTokenizer.from_pretrained(smollm2[0])
    requests = [question.for_engine(tokenizer) for question in questions]
    alone = run_ranks(2, on_engine, str(smollm2[1]), {}, partial(engine_uses.each_alone, requests))[0]
    assert together == [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in alone]
