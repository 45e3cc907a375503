"""Megatron's wire: PUT /api and POST /completions, with the fields and names of Megatron's server."""

from typing import Any

from fastapi import APIRouter, Request

from megatron_star.engine.request import StarResult
from megatron_star.server.batch import Batch
from megatron_star.server.completion import CompletionService, Generation
from megatron_star.server.errors import RequestError
from megatron_star.server.generation_fields import filters, stop_texts
from megatron_star.server.json_body import CheckedBodyRoute
from megatron_star.server.openai_answers import PROMPT_LOGPROBS, CompletionAnswers, completion_text
from megatron_star.server.requests import (
    ERROR_RESPONSES,
    results_of,
    service_of,
    split_prompts,
    star_report,
)
from megatron_star.server.schemas import MegatronCompletionRequest, MegatronGenerateRequest
from megatron_star.server.star_options import StarOptions
from megatron_star.text.prompt import SplitPrompt
from megatron_star.text.text_stream import TextStream, text_offsets

DEFAULT_TOKENS = 64
router = APIRouter(route_class=CheckedBodyRoute, responses=ERROR_RESPONSES, tags=["Megatron"])


@router.put("/api")
async def generate(body: MegatronGenerateRequest, request: Request) -> dict[str, Any]:
    """Megatron's text generation: lists in the order of `prompts`."""
    if "" in body.prompts and not body.add_BOS:
        raise RequestError(400, "prompts: an empty prompt needs add_BOS=true", "prompts")
    service = service_of(request)
    top_k, top_p = filters(body.top_k, body.top_p, zero_is_off=True)
    generation = Generation(
        num_tokens=body.tokens_to_generate or DEFAULT_TOKENS,
        cut_to_room=body.tokens_to_generate is None,
        temperature=body.temperature,
        top_k=top_k,
        top_p=top_p,
        stop=("\n",) if body.stop_on_eol else ("\n\n",) if body.stop_on_double_eol else (),
        end_tokens=None if body.stop_token is None else (body.stop_token,),
        seed=body.random_seed,
    )

    def build(splitter):
        return split_prompts(
            splitter, body.prompts, body.star, contexts=body.contexts, add_bos=body.add_BOS, field="prompts"
        )

    async with service.batch(build, body.star, generation, num_prompts=len(body.prompts)) as batch:
        results = await results_of(batch, request)
    return await service.in_tokenizer_thread(_generate_answer, service, body, batch.splits, results)


def _generate_answer(
    service: CompletionService,
    body: MegatronGenerateRequest,
    splits: list[SplitPrompt],
    results: list[StarResult],
) -> dict[str, Any]:
    pairs = [
        (_prompt_tokens(split, body.contexts), result) for split, result in zip(splits, results, strict=True)
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
    answer["star"] = [star_report(result, split) for result, split in zip(results, splits, strict=True)]
    return answer


@router.post("/completions")
async def complete(body: MegatronCompletionRequest, request: Request) -> dict[str, Any]:
    """Megatron's completions: `choices` with `text` and `logprobs`."""
    if body.n is not None and body.n > 1:
        raise RequestError(400, "n: only 1 is supported here; /v1/completions takes more", "n")
    if body.echo and body.logprobs is not None:
        raise RequestError(400, PROMPT_LOGPROBS, "logprobs")
    service = service_of(request)
    options = body.star or StarOptions()
    prompts = body.prompts()
    top_k, top_p = filters(body.top_k, body.top_p, zero_is_off=True)
    generation = Generation(
        num_tokens=body.max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=top_k,
        top_p=top_p,
        stop=stop_texts(body.stop),
        seed=body.seed,
    )

    def build(splitter):
        return split_prompts(splitter, prompts, options, contexts=body.contexts, field="prompt")

    async with service.batch(build, options, generation, num_prompts=len(prompts)) as batch:
        await results_of(batch, request)
    return await service.in_tokenizer_thread(_completions_answer, service, body, batch)


def _completions_answer(
    service: CompletionService, body: MegatronCompletionRequest, batch: Batch
) -> dict[str, Any]:
    answers = CompletionAnswers(service, batch, logprobs=body.logprobs or 0, echoes=[])
    choices = []
    for index, (prompt, answer) in enumerate(zip(body.prompts(), batch.answers, strict=True)):
        choice = answers.choice(index, answer)
        del choice["finish_reason"]  # which Megatron's server does not say
        if body.echo:
            echoed = completion_text(service, prompt)
            choice["text"] = echoed + choice["text"]
            tokens = _prompt_tokens(batch.splits[index], body.contexts)
            choice["logprobs"] = _with_prompt(service, tokens, echoed, choice["logprobs"])
        choices.append(choice)
    pairs = zip(batch.results, batch.splits, strict=True)
    return {"choices": choices, "star": [star_report(result, split) for result, split in pairs]}


def _prompt_tokens(split: SplitPrompt, contexts: list[str] | None) -> list[int]:
    """The prompt's, without a context that was given beside it."""
    return split.query_tokens if contexts else split.context_tokens + split.query_tokens


def _with_prompt(
    service: CompletionService, tokens: list[int], echoed: str, logprobs: dict[str, Any]
) -> dict[str, Any]:
    """Log-probabilities that begin with the prompt's, which are unknown: a context has no logits."""
    return {
        "tokens": service.token_bytes.pieces(tokens, at_start=True) + logprobs["tokens"],
        "token_logprobs": [None] * len(tokens) + logprobs["token_logprobs"],
        "text_offset": [
            *text_offsets(TextStream(service.tokenizer), tokens),
            *(len(echoed) + offset for offset in logprobs["text_offset"]),
        ],
        "top_logprobs": None,
    }
