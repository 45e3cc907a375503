"""POST /v1/responses: a chat in another dress, of which nothing is kept."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from megatron_star.server.answering import answered, streamed
from megatron_star.server.checked_route import CheckedBodyRoute
from megatron_star.server.errors import ERROR_RESPONSES
from megatron_star.server.request_id import named_request
from megatron_star.server.state import server_of, service_of
from megatron_star.server.wires.chat_route import chat_ask
from megatron_star.server.wires.openai_routes import check_model
from megatron_star.server.wires.openai_stream import AnswerNames
from megatron_star.server.wires.responses_answers import ResponseAnswer
from megatron_star.server.wires.responses_schema import ResponsesRequest

router = APIRouter(route_class=CheckedBodyRoute, prefix="/v1", responses=ERROR_RESPONSES, tags=["OpenAI"])


@router.post("/responses")
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """The next items: what the model thinks, says and calls."""
    check_model(request, body.model)
    service = service_of(request)
    names = AnswerNames(named_request(request.scope, body.request_id), server_of(request).settings.model_name)
    answer = ResponseAnswer(body, names, service)
    ask, answers_of = chat_ask(service, body.chat)
    if body.stream:
        return await streamed(ask, request, lambda batch: answer.stream(batch, answers_of(service, batch)))
    batch = await answered(ask, request)
    return JSONResponse(await answer.whole(batch, answers_of(service, batch)))
