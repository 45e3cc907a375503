"""Renders answers as Megatron's server does."""

from typing import Any

from megatron_star.server.answering import star_report
from megatron_star.server.batch import Batch
from megatron_star.server.service import CompletionService
from megatron_star.server.wires.completion_answers import CompletionAnswers
from megatron_star.server.wires.megatron_schemas import MegatronCompletionRequest, MegatronGenerateRequest
from megatron_star.text.prompt import SplitPrompt


def render_generated(
    service: CompletionService, body: MegatronGenerateRequest, batch: Batch
) -> dict[str, Any]:
    """PUT /api: lists in the order of `prompts`."""
    results = batch.results
    pairs = [
        (_prompt_tokens(split, body.contexts), result)
        for split, result in zip(batch.splits, results, strict=True)
    ]
    answer: dict[str, Any] = {
        "text": [prompt + result.text for prompt, result in zip(body.prompts, results, strict=True)],
        "segments": [
            service.token_bytes.pieces(tokens + result.tokens, at_start=True) for tokens, result in pairs
        ],
        "tokens": [tokens + result.tokens for tokens, result in pairs],
    }
    if body.logprobs:  # a context has no logits, so the prompt's are unknown
        answer["logprobs"] = [[None] * (len(tokens) - 1) + result.logprobs for tokens, result in pairs]
    answer["star"] = [star_report(batch, index) for index in range(len(results))]
    return answer


def render_completions(
    service: CompletionService, body: MegatronCompletionRequest, batch: Batch
) -> dict[str, Any]:
    """POST /completions: `choices` with `text` and `logprobs`."""
    answers = CompletionAnswers(service, batch, logprobs=body.logprobs or 0, only_queries=bool(body.contexts))
    choices = []
    for index, answer in enumerate(batch.answers):
        choice = answers.choice(index, answer)
        del choice["finish_reason"]  # which Megatron's server does not say
        if not body.logprobs:
            choice["logprobs"]["top_logprobs"] = None
        choices.append(choice)
    return {"choices": choices, "star": [star_report(batch, index) for index in range(len(choices))]}


def _prompt_tokens(split: SplitPrompt, contexts: list[str] | None) -> list[int]:
    """The prompt's, without a context that was given beside it."""
    return split.query_tokens if contexts else split.context_tokens + split.query_tokens
