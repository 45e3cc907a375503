"""Megatron's wire: PUT /api and POST /completions, with the fields and names of Megatron's server."""

from typing import Any

from fastapi import APIRouter, Request

from megatron_star.config import FieldError
from megatron_star.server.answering import answered
from megatron_star.server.ask import Ask, Generation, filters, stop_texts, with_contexts
from megatron_star.server.checked_route import CheckedBodyRoute
from megatron_star.server.errors import ERROR_RESPONSES
from megatron_star.server.star_options import StarOptions
from megatron_star.server.state import service_of
from megatron_star.server.wires.megatron_answers import render_completions, render_generated
from megatron_star.server.wires.megatron_schemas import MegatronCompletionRequest, MegatronGenerateRequest

DEFAULT_TOKENS = 64
router = APIRouter(route_class=CheckedBodyRoute, responses=ERROR_RESPONSES, tags=["Megatron"])


@router.put("/api")
async def generate(body: MegatronGenerateRequest, request: Request) -> dict[str, Any]:
    """Megatron's text generation: lists in the order of `prompts`."""
    service = service_of(request)
    batch = await answered(parse_generate(body), request)
    return await service.in_tokenizer_thread(render_generated, service, body, batch)


def parse_generate(body: MegatronGenerateRequest) -> Ask:
    """What a body of /api asks. Raises FieldError."""
    if "" in body.prompts and not body.add_BOS:
        raise FieldError("prompts: an empty prompt needs add_BOS=true", "prompts")
    generation = Generation(
        num_tokens=body.tokens_to_generate or DEFAULT_TOKENS,
        cut_to_room=body.tokens_to_generate is None,
        temperature=body.temperature,
        filters=filters(body.top_k, body.top_p, zero_is_off=True),
        stop=("\n",) if body.stop_on_eol else ("\n\n",) if body.stop_on_double_eol else (),
        end_tokens=None if body.stop_token is None else (body.stop_token,),
        seed=body.random_seed,
    )
    prompts = with_contexts(body.prompts, body.contexts, body.star, field="prompts", add_bos=body.add_BOS)
    return Ask(prompts=prompts, star=body.star, generation=generation, **body.named_context())


@router.post("/completions")
async def complete(body: MegatronCompletionRequest, request: Request) -> dict[str, Any]:
    """Megatron's completions: `choices` with `text` and `logprobs`."""
    service = service_of(request)
    batch = await answered(parse_completions(body), request)
    return await service.in_tokenizer_thread(render_completions, service, body, batch)


def parse_completions(body: MegatronCompletionRequest) -> Ask:
    """What a body of /completions asks. Raises FieldError."""
    if body.n is not None and body.n > 1:
        raise FieldError("n: only 1 is supported here; /v1/completions takes more", "n")
    if body.best_of is not None and body.best_of > 1:
        raise FieldError("best_of: only 1 is supported here; /v1/completions takes more", "best_of")
    generation = Generation(
        num_tokens=body.max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        filters=filters(body.top_k, body.top_p, zero_is_off=True),
        stop=stop_texts(body.stop),
        seed=body.seed,
        num_top_logprobs=body.logprobs or 0,
        rules=body.rules(),
        bad_words=tuple(body.bad_words or ()),
        include_stop_text=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        prompt_logprobs=body.num_echoed_logprobs,
    )
    star, prompts = body.star or StarOptions(), body.prompts()
    return Ask(
        prompts=with_contexts(prompts, body.contexts, star, field="prompt"),
        star=star,
        generation=generation,
        echoed=prompts if body.echo else (),
        **body.named_context(),
    )
