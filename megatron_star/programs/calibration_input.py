"""The questions of a calibration: read, checked, and turned into tokens."""

import argparse
import random
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_star.engine.request import StarRequest
from megatron_star.evaluation.comparison_file import ComparisonFile
from megatron_star.evaluation.search import why_too_few
from megatron_star.job.asked import of_model, of_ranks, of_text
from megatron_star.job.documents import Document, read_jsonl
from megatron_star.job.job import Job
from megatron_star.model.longrope import needs_long_factors
from megatron_star.planning.cost_model import kv_layers
from megatron_star.text.prompt import split_into_tokens


@dataclass(frozen=True)
class CalibrationInput:
    """The driver's part: all questions, and where comparisons go."""

    documents: list[Document]
    output: ComparisonFile


def read_input(args: argparse.Namespace, held: ExitStack) -> CalibrationInput:
    """Read the questions and take the output, which is let go with `held`, before anything is loaded.

    Raises:
        ValueError, OSError: there are none, or too few; or the output is no file for these questions.
    """
    same = of_model(args) | of_ranks(args) | {"chat": args.chat}
    same["num_tokens_to_generate"] = args.num_tokens_to_generate
    documents = read_jsonl(args.input_jsonl)
    if not documents:
        raise ValueError(f"{args.input_jsonl} has no questions")
    if not args.ask_all and (why := why_too_few(len(documents), args.tolerance)):
        raise ValueError(f"{args.input_jsonl}: {why}; --ask-all compares the settings without a promise")
    asked = {
        str(document.id): same | {"context": of_text(document.context), "query": document.query}
        for document in documents
    }
    output = held.enter_context(ComparisonFile(args.output, args.input_jsonl, asked))
    # The order decides which half a question is in: it must have nothing to do with the file's.
    random.Random(0).shuffle(documents)
    return CalibrationInput(documents, output)


def tokenized(document: Document, tokenizer: PreTrainedTokenizerBase, chat: bool) -> dict[str, Any]:
    """A question as tokens; raises ValueError if it has no context."""
    context, query = split_into_tokens(tokenizer, document.context, document.query, chat=chat)
    if not context:
        raise ValueError(f"the question {document.id!r} has no context: there is nothing to compare")
    return {"id": document.id, "context": context, "query": query}


def check(question: dict[str, Any], args: argparse.Namespace, job: Job) -> None:
    """Raises ValueError unless the model can answer a question of `tokenized`, and the ranks can hold it."""
    request = StarRequest(context_tokens=question["context"], query_tokens=question["query"])
    request.sampling.num_tokens_to_generate = args.num_tokens_to_generate
    try:
        request.check(vocab_size=job.star_model.vocab_size, max_sequence_length=job.max_sequence_length)
        num_prompt = len(request.context_tokens) + len(request.query_tokens)
        needs_long_factors(job.star_model.model.config, num_prompt, args.num_tokens_to_generate)
        _check_fits(len(question["context"]), job)
    except ValueError as error:
        raise ValueError(f"the question {question['id']!r}: {error}") from error


def _check_fits(num_context_tokens: int, job: Job) -> None:
    """One context is held at a time; whatever the setting, the ranks share it about evenly.

    Exact attention's keeps the KV of all layers: what a setting would hide is looked for there.
    """
    config = job.star_model.model.config
    layers = kv_layers(
        config,
        tp_size=config.tensor_model_parallel_size,
        bytes_per_value=config.params_dtype.itemsize,
        kv_dtype=job.star_model.kv_format.name,
    )
    needed = layers.of_all(-(-num_context_tokens // job.star_model.exchange.cp_size))
    if needed > job.budget:
        raise ValueError(
            f"{num_context_tokens} context tokens need {needed:,} bytes of KV on a rank, but the budget is "
            f"{job.budget:,} bytes a rank: use more context-parallel ranks"
        )
