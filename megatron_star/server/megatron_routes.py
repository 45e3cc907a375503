"""Megatron's wire: PUT /api and POST /completions, with the fields and names of Megatron's server."""

from typing import Any

from fastapi import APIRouter, Request

from megatron_star.inference.request import StarResult
from megatron_star.server.completion import CompletionService, Generation
from megatron_star.server.errors import RequestError
from megatron_star.server.json_body import CheckedBodyRoute
from megatron_star.server.openai_answers import completion_text, token_logprobs
from megatron_star.server.prompts import SplitPrompt
from megatron_star.server.requests import (
    ERROR_RESPONSES,
    results_of,
    service_of,
    split_prompts,
    star_report,
)
from megatron_star.server.sampling import chosen_top_p, stop_texts
from megatron_star.server.schemas import MegatronCompletionRequest, MegatronGenerateRequest, StarOptions

router = APIRouter(route_class=CheckedBodyRoute, responses=ERROR_RESPONSES, tags=["Megatron"])


@router.put("/api")
async def generate(body: MegatronGenerateRequest, request: Request) -> dict[str, Any]:
    """Megatron's text generation: lists in the order of `prompts`."""
    _check_generate(body)
    service = service_of(request)
    stop = ("\n",) if body.stop_on_eol else ("\n\n",) if body.stop_on_double_eol else ()
    generation = Generation(
        num_tokens=body.tokens_to_generate,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        stop=stop,
        termination_id=body.stop_token,
        seed=body.random_seed,
    )

    def build(splitter):
        return split_prompts(
            splitter, body.prompts, body.star, contexts=body.contexts, add_bos=body.add_BOS, field="prompts"
        )

    async with service.batch(build, body.star, generation, num_prompts=len(body.prompts)) as batch:
        results = await results_of(batch, request)
    return await service.in_tokenizer_thread(_generate_answer, service, body, batch.splits, results)


def _check_generate(body: MegatronGenerateRequest) -> None:
    if body.top_k and body.top_p:
        raise RequestError(400, "top_p: set top_k or top_p, not both", "top_p")
    if "" in body.prompts and not body.add_BOS:
        raise RequestError(400, "prompts: an empty prompt needs add_BOS=true", "prompts")


def _generate_answer(
    service: CompletionService,
    body: MegatronGenerateRequest,
    splits: list[SplitPrompt],
    results: list[StarResult],
) -> dict[str, Any]:
    prompt_tokens = [
        split.query_tokens if body.contexts else split.context_tokens + split.query_tokens for split in splits
    ]
    pairs = list(zip(prompt_tokens, results, strict=True))
    answer: dict[str, Any] = {
        "text": [prompt + result.text for prompt, result in zip(body.prompts, results, strict=True)],
        "segments": [service.pieces(tokens + result.tokens) for tokens, result in pairs],
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
    service = service_of(request)
    options = body.star or StarOptions()
    prompts = body.prompts()
    temperature = 1.0 if body.temperature is None else body.temperature
    generation = Generation(
        num_tokens=body.max_tokens,
        temperature=temperature,
        top_k=body.top_k or 0,
        top_p=chosen_top_p(body.top_k, body.top_p),
        stop=stop_texts(body.stop),
        seed=body.seed,
    )

    def build(splitter):
        return split_prompts(splitter, prompts, options, contexts=body.contexts, field="prompt")

    async with service.batch(build, options, generation, num_prompts=len(prompts)) as batch:
        results = await results_of(batch, request)
    return await service.in_tokenizer_thread(_completions_answer, service, body, batch.splits, results)


def _completions_answer(
    service: CompletionService,
    body: MegatronCompletionRequest,
    splits: list[SplitPrompt],
    results: list[StarResult],
) -> dict[str, Any]:
    choices = []
    for index, (prompt, result) in enumerate(zip(body.prompts(), results, strict=True)):
        echoed = completion_text(service, prompt) if body.echo else ""
        logprobs = token_logprobs(service, result, offset=len(echoed)) | {"top_logprobs": None}
        choices.append({"index": index, "text": echoed + result.text, "logprobs": logprobs})
    reports = [star_report(result, split) for result, split in zip(results, splits, strict=True)]
    return {"choices": choices, "star": reports}
