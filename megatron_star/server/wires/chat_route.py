"""POST /v1/chat/completions."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from megatron_star.server.ask import Ask, ChatPrompt
from megatron_star.server.batch import Batch
from megatron_star.server.checked_route import CheckedBodyRoute
from megatron_star.server.errors import ERROR_RESPONSES
from megatron_star.server.service import CompletionService
from megatron_star.server.star_options import StarOptions
from megatron_star.server.wires.chat_answers import ChatAnswers
from megatron_star.server.wires.chat_schema import ChatRequest
from megatron_star.server.wires.openai_routes import answer_with, check_model

DEFAULT_CHAT_TOKENS = 512
router = APIRouter(route_class=CheckedBodyRoute, prefix="/v1", responses=ERROR_RESPONSES, tags=["OpenAI"])


@router.post("/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """The assistant's next message, by the tokenizer's chat template."""
    check_model(request, body.model)

    def answers_of(service: CompletionService, batch: Batch) -> ChatAnswers:
        return ChatAnswers(service, logprobs=bool(body.logprobs), as_ids=body.return_tokens_as_token_ids)

    return await answer_with(request, body, parse_chat(body), answers_of)


def parse_chat(body: ChatRequest) -> Ask:
    """What a body of /v1/chat/completions asks."""
    num_tokens = body.max_completion_tokens or body.max_tokens
    chat = body.chat(body.tools_for_template(), effort=body.reasoning_effort, documents=body.documents)
    return Ask(
        prompts=[ChatPrompt(chat)],
        star=body.star or StarOptions(),
        generation=body.generation(
            num_tokens, default=DEFAULT_CHAT_TOKENS, num_top_logprobs=body.top_logprobs or 0
        ),
        num_choices=body.n or 1,
        truncate_prompt=body.truncate_prompt_tokens,
        **body.owner(),
    )
