"""What whoever starts the server chooses: one frozen dataclass."""

import re
from dataclasses import dataclass, field

from megatron_star.config import DEFAULT_SPECULATE, StarConfig
from megatron_star.server.keys import KeyRing
from megatron_star.server.origins import check_origins
from megatron_star.server.traces import check_endpoint

_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits, and what a request leaves open.

    Attributes:
        model_name: what `/v1/models` lists first, what an OpenAI request may ask for and its answer says.
        more_model_names: what it may ask for, too.
        star: how contexts are encoded unless the request's `star` object says otherwise.
        num_query_tokens: the end of a prompt that is its query where nothing else says so.
        separator: text between context and query, looked for where a request names none.
        keys: of which `Authorization: Bearer` must carry one; None lets everybody in.
        max_request_bytes: of one body; 32 times as much may be in flight.
        max_concurrent_requests: sequences (prompts times `n`) that run at the same time.
        max_queued_requests: sequences that wait for that.
        max_context_tokens: of one context; None leaves it to the model's limit.
        max_contexts, max_context_bytes: that each key may keep by /v1/contexts: how many, and what their
            texts and tokens take, without KV.
        body_seconds: a body that has not come by then ends with 408; a head, with a closed connection.
        keep_alive_seconds: a connection may say nothing for so long after its answer. Clients keep idle
            connections for 5 to 60 s: it must be the client that closes, or a request meets a closed one.
        speculate: how tokens are guessed unless a request's `star` object says otherwise.
        metrics_per_expert: whether /metrics counts the tokens of each expert of each layer.
        tool_call_parser, reasoning_parser: how the model writes calls and reasoning, by the names of
            `server/tools/formats.py`.
        otlp_traces_endpoint: URL of the collector that traces of requests go to.
        chat_template: in place of the tokenizer's own.
        trust_request_chat_template: requests may bring their own.
        host: where it listens; without a key, it decides which names clients may use for this machine.
        allowed_origins: of pages in browsers that may ask and read answers; `*`, with a key, is all.
        root_path: under which a proxy shows the server, which takes it away from what it passes on.
    """

    model_name: str
    more_model_names: tuple[str, ...] = ()
    star: StarConfig = field(default_factory=StarConfig)
    num_query_tokens: int = 256
    separator: str | None = None
    keys: KeyRing | None = None
    max_request_bytes: int = 16 << 20
    max_concurrent_requests: int = 64
    max_queued_requests: int = 256
    max_context_tokens: int | None = None
    max_contexts: int = 64
    max_context_bytes: int = 256 << 20
    body_seconds: float = 60.0
    keep_alive_seconds: float = 75.0
    speculate: str = DEFAULT_SPECULATE
    metrics_per_expert: bool = False
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    otlp_traces_endpoint: str | None = None
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    host: str = "127.0.0.1"
    allowed_origins: tuple[str, ...] = ()
    root_path: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError, naming the value and the bound."""
        for name in ("num_query_tokens", "max_request_bytes", "max_concurrent_requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.max_queued_requests < 0:
            raise ValueError(f"max_queued_requests is {self.max_queued_requests}: it must be at least 0")
        if len(set(self.model_names)) < len(self.model_names):
            raise ValueError(f"model names {', '.join(self.model_names)}: each may be there once")
        if self.otlp_traces_endpoint is not None:
            check_endpoint(self.otlp_traces_endpoint)
        check_origins(self.allowed_origins, has_key=self.keys is not None)
        if self.root_path and not _ROOT_PATH.fullmatch(self.root_path):
            raise ValueError(f"root_path is {self.root_path!r}: it must be as /star, without a / at its end")

    @property
    def model_names(self) -> tuple[str, ...]:
        """All that the model is called."""
        return (self.model_name, *self.more_model_names)

    @property
    def max_sequences(self) -> int:
        """Running and waiting, at most."""
        return self.max_concurrent_requests + self.max_queued_requests

    @property
    def max_connections(self) -> int:
        """Open at the same time: each sequence's, as many that are idle, and some for health and metrics."""
        return 2 * self.max_sequences + 64
