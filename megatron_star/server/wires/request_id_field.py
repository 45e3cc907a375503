"""The field that names a request, where no header does."""

from typing import Annotated

from pydantic import BaseModel, Field

from megatron_star.server.request_id import SAFE_REQUEST_ID

RequestId = Annotated[str, Field(pattern=SAFE_REQUEST_ID)]


class RequestIdField(BaseModel):
    """On both OpenAI routes; vLLM's."""

    request_id: RequestId | None = Field(
        None, description="part of the answer's id; X-Request-Id comes first"
    )
