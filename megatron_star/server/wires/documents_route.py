"""POST /v1/documents: the text of a file, read as for /v1/contexts, for whoever puts it into a question."""

from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from megatron_star.server.body import Body, Text
from megatron_star.server.checked_route import BodyOrFormRoute, form_description
from megatron_star.server.errors import ERROR_RESPONSES

router = APIRouter(route_class=BodyOrFormRoute, prefix="/v1", responses=ERROR_RESPONSES, tags=["contexts"])


class DocumentRequest(Body):
    """A form has `file` in the place of `text`."""

    text: Text
    name: Annotated[Text, Field(max_length=256)] | None = None

    @classmethod
    def values_of_form(cls, fields: dict[str, str]) -> dict[str, str]:
        """Both are texts."""
        return fields


class DocumentObject(BaseModel):
    """The text of a document. Nothing of it is kept."""

    object: Literal["document"] = "document"
    name: str | None
    text: str


@router.post("/documents", openapi_extra=form_description(False))
async def document_text(body: DocumentRequest) -> DocumentObject:
    """The text of a file of text, Markdown, HTML or PDF."""
    return DocumentObject(name=body.name, text=body.text)
