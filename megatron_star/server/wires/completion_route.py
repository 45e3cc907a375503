"""POST /v1/completions."""

from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response

from megatron_star.server.ask import Ask, with_contexts
from megatron_star.server.checked_route import CheckedBodyRoute
from megatron_star.server.errors import ERROR_RESPONSES
from megatron_star.server.star_options import StarOptions
from megatron_star.server.wires.completion_answers import CompletionAnswers
from megatron_star.server.wires.completion_schema import CompletionRequest
from megatron_star.server.wires.openai_routes import answer_with, check_model

DEFAULT_COMPLETION_TOKENS = 16
router = APIRouter(route_class=CheckedBodyRoute, prefix="/v1", responses=ERROR_RESPONSES, tags=["OpenAI"])


@router.post("/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Completions of one or more prompts."""
    check_model(request, body.model)
    answers_of = partial(
        CompletionAnswers,
        logprobs=body.logprobs,
        only_queries=body.has_context,
        shows_prompt_logprobs=body.prompt_logprobs is not None,
        as_ids=body.return_tokens_as_token_ids,
    )
    return await answer_with(request, body, parse_completion(body), answers_of)


def parse_completion(body: CompletionRequest) -> Ask:
    """What a body of /v1/completions asks. Raises FieldError."""
    star, prompts = body.star or StarOptions(), body.prompts()
    return Ask(
        prompts=with_contexts(prompts, body.contexts, star, field="prompt"),
        star=star,
        generation=body.generation(
            body.max_tokens, default=DEFAULT_COMPLETION_TOKENS, num_top_logprobs=body.logprobs or 0
        ),
        num_choices=body.best_of or body.n or 1,
        num_best=body.num_best,
        truncate_prompt=body.truncate_prompt_tokens,
        **body.owner(),
        **body.named_context(),
        echoed=prompts if body.echo else (),
    )
