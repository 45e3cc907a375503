"""One question about one long text, with what a right answer contains."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron.core.inference.sampling_params import SamplingParams
from transformers import PreTrainedTokenizerBase

from megatron_star.config import StarConfig
from megatron_star.engine.request import StarRequest
from megatron_star.text.end_tokens import end_tokens
from megatron_star.text.prompt import split_into_tokens


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A sample whose context can still be made longer.

    Attributes:
        context: the text of a context of so many units (words, sentences, ..).
        smallest: units that the task needs, at least.
        largest: units that there are; None where there is no end.
        query: what is asked; the context is everything before it.
        answer_prefix: how the answer begins; the model continues it.
        references: texts that a right answer contains.
        depth: where the (first) answer is hidden, from 0, the start of the context, to 1; None where a task
            has no such place.
    """

    context: Callable[[int], str]
    query: str
    answer_prefix: str
    references: tuple[str, ...]
    depth: float | None = None
    smallest: int = 1
    largest: int | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A finished sample; see `Draft` for what is not explained here.

    Attributes:
        id: the same for the same sample of the same tokenizer.
        index: which of the samples with this task, length and seed.
    """

    id: str
    task: str
    length: int
    seed: int
    index: int
    context: str
    query: str
    answer_prefix: str
    references: tuple[str, ...]
    depth: float | None
    num_tokens_to_generate: int


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, sample: Sample | Draft, context: str, *, chat: bool
) -> tuple[list[int], list[int]]:
    """Context and query tokens; the query's end with the answer's beginning.

    With `chat`, context and query are one message of the user, and the answer's beginning is the assistant's.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    prefix = sample.answer_prefix if chat else f" {sample.answer_prefix}"
    return split_into_tokens(tokenizer, context, sample.query, chat=chat, answer_prefix=prefix)


def greedy_request(
    tokenizer: PreTrainedTokenizerBase, sample: Sample, star: StarConfig, *, chat: bool
) -> StarRequest:
    """The sample as a question to the engine, answered greedily; raises as `prompt_tokens` does."""
    context, query = prompt_tokens(tokenizer, sample, sample.context, chat=chat)
    sampling = SamplingParams(num_tokens_to_generate=sample.num_tokens_to_generate, top_k=1)
    return StarRequest(
        context_tokens=context,
        query_tokens=query,
        star=star,
        sampling=sampling,
        end_tokens=end_tokens(tokenizer),
    )
