"""POST /tokenize and /detokenize, as vLLM has them."""

from typing import Any

from fastapi import APIRouter, Request

from megatron_star.config import FieldError
from megatron_star.server.checked_route import CheckedBodyRoute
from megatron_star.server.errors import ERROR_RESPONSES
from megatron_star.server.service import CompletionService
from megatron_star.server.state import service_of
from megatron_star.server.wires.openai_routes import check_model
from megatron_star.server.wires.tokenize_schema import DetokenizeRequest, TokenizeRequest

router = APIRouter(route_class=CheckedBodyRoute, responses=ERROR_RESPONSES, tags=["tokens"])


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """The token ids of a text, or of messages in the chat template."""
    if body.model is not None:
        check_model(request, body.model)
    service = service_of(request)
    return await service.in_tokenizer_thread(_tokens, service, body)


def _tokens(service: CompletionService, body: TokenizeRequest) -> dict[str, Any]:
    """In a tokenizer's thread."""
    splitter = service.submission.splitter
    if body.prompt is not None:
        text, field = body.prompt, "prompt"
    else:
        chat = body.chat(body.tools_for_template(), template=service.template(body.chat_template))
        text, field = splitter.chat_text(chat), "messages"
    tokens = splitter.tokens(text, add_special_tokens=body.with_special_tokens(), field=field)
    pieces = service.tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
    return {
        "count": len(tokens),
        "max_model_len": service.engine.max_sequence_length,
        "tokens": tokens,
        "token_strs": pieces,
    }


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
    """The text of token ids, special ones included."""
    if body.model is not None:
        check_model(request, body.model)
    service = service_of(request)
    return await service.in_tokenizer_thread(_text, service, body.tokens)


def _text(service: CompletionService, tokens: list[int]) -> dict[str, Any]:
    """In a tokenizer's thread."""
    most = len(service.tokenizer)
    if unknown := next((token for token in tokens if token >= most), None):
        raise FieldError(f"tokens: {unknown} is no id of the tokenizer, which has {most} tokens", "tokens")
    return {"prompt": service.tokenizer.decode(tokens, skip_special_tokens=False)}
