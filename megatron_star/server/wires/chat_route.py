"""POST /v1/chat/completions."""

from collections.abc import Callable
from dataclasses import replace

from fastapi import APIRouter, Request
from fastapi.responses import Response

from megatron_star.server.ask import Ask, ChatPrompt
from megatron_star.server.batch import Batch
from megatron_star.server.checked_route import CheckedBodyRoute
from megatron_star.server.errors import ERROR_RESPONSES
from megatron_star.server.service import CompletionService
from megatron_star.server.star_options import StarOptions
from megatron_star.server.state import service_of
from megatron_star.server.wires.chat_answers import ChatAnswers
from megatron_star.server.wires.chat_schema import ChatRequest
from megatron_star.server.wires.completion_answers import prompt_end
from megatron_star.server.wires.openai_routes import answer_with, check_model
from megatron_star.server.wires.prompt_logprobs import PromptLogprobs
from megatron_star.server.wires.token_ids import token_bytes
from megatron_star.text.chat_template import Template

DEFAULT_CHAT_TOKENS = 512
router = APIRouter(route_class=CheckedBodyRoute, prefix="/v1", responses=ERROR_RESPONSES, tags=["OpenAI"])


@router.post("/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """The assistant's next message, by the tokenizer's chat template."""
    check_model(request, body.model)
    ask, answers_of = chat_ask(service_of(request), body)
    return await answer_with(request, body, ask, answers_of)


def chat_ask(
    service: CompletionService, body: ChatRequest
) -> tuple[Ask, Callable[[CompletionService, Batch], ChatAnswers]]:
    """What a chat asks, and how its answers are rendered. Raises FieldError."""
    offer, ask = body.offer(), parse_chat(body, service.template(body.chat_template))
    ask = replace(ask, generation=service.tool_use.generation(ask.generation, offer))

    def answers_of(service: CompletionService, batch: Batch) -> ChatAnswers:
        names = token_bytes(service, body.return_tokens_as_token_ids)
        prompts = None if body.prompt_logprobs is None else PromptLogprobs(service, batch, names)
        is_guided = ask.generation.grammar is not None
        reading = service.tool_use.reading(offer, prompt_ends(service, batch), is_guided=is_guided)
        return ChatAnswers(
            service,
            reading,
            logprobs=bool(body.logprobs),
            prompts=prompts,
            as_ids=body.return_tokens_as_token_ids,
        )

    return ask, answers_of


def prompt_ends(service: CompletionService, batch: Batch) -> list[str]:
    """The end of each answer's prompt, with its special tokens."""
    ends = [service.tokenizer.decode(prompt_end(split), skip_special_tokens=False) for split in batch.splits]
    return [end for end in ends for _ in range(batch.num_choices)]


def parse_chat(body: ChatRequest, template: Template | None = None) -> Ask:
    """What a body of /v1/chat/completions asks, in this template or the model's own."""
    num_tokens = body.max_completion_tokens or body.max_tokens
    chat = body.chat(
        body.tools_for_template(),
        effort=body.reasoning_effort,
        documents=body.documents,
        template=template,
    )
    return Ask(
        prompts=[ChatPrompt(chat)],
        star=body.star or StarOptions(),
        generation=body.generation(
            num_tokens, default=DEFAULT_CHAT_TOKENS, num_top_logprobs=body.top_logprobs or 0
        ),
        num_choices=body.n or 1,
        truncate_prompt=body.truncate_prompt_tokens,
        **body.owner(),
        **body.named_context(),
    )
