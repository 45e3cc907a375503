"""What those who handle one HTTP request, one after the other, leave for each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from starlette.types import Scope

from megatron_star.engine.answer import Answer

_KEY = "record of megatron-star"


@dataclass
class RequestRecord:
    """Of one HTTP request; the access log reads it when that ends.

    Attributes:
        request_id: its name, in the answer's header and id, and in the log.
        tenant: the name of the API key that it came with; "" where no key is asked for.
        error: the kind of its error, for the log and the counters.
        admitted: whoever asks was let in.
        numbers: of its answers, for the log.
        answers: themselves, for traces.
        body_taken: to be called once the body is checked: its bytes are in flight no more.
    """

    request_id: str = ""
    tenant: str = ""
    error: str | None = None
    admitted: bool = False
    numbers: dict[str, float] = field(default_factory=dict)
    answers: Sequence[Answer] = ()
    body_taken: Callable[[], None] = lambda: None


def record_of(scope: Scope) -> RequestRecord:
    """The request's record, which is made when it is first asked for."""
    return scope.setdefault(_KEY, RequestRecord())
