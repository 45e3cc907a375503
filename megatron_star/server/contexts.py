"""Contexts that clients have sent, and name in requests: what is kept of each, and how far its KV is.

What is kept here is text and tokens, within bounds for each API key. The KV is the engine's: it may drop it
when memory is wanted, and whoever asks then has it encoded again. All methods but `num_kept` and `num_bytes`
are for the event loop's thread.
"""

import asyncio
import secrets
from dataclasses import dataclass, field, replace
from time import time
from typing import Any

from megatron_star.config import FieldError
from megatron_star.engine.answer import Answer
from megatron_star.engine.cached_context import ContextKey
from megatron_star.engine.request import StarResult
from megatron_star.engine.scheduled_request import Stage
from megatron_star.engine.thread import EngineThread
from megatron_star.planning.sizes import sizes_of
from megatron_star.server.ask import Ask, Generation
from megatron_star.server.context_rules import PromptSplitter
from megatron_star.server.errors import RequestError
from megatron_star.server.kept_context import KeptContext
from megatron_star.server.star_options import StarOptions
from megatron_star.text.prompt import SplitPrompt

RANDOM_BYTES = 24


@dataclass(frozen=True)
class AheadPrompt:
    """A context alone, which is encoded ahead."""

    kept: KeptContext

    def split(self, splitter: PromptSplitter, options: StarOptions) -> SplitPrompt:
        """See `Prompt`."""
        return self.kept.ahead(splitter)


@dataclass(eq=False, kw_only=True)
class Context:
    """One of them.

    Attributes:
        tenant: the name of the key that sent it.
        star, cache_salt, priority: how it is encoded.
        ttl_seconds: it is deleted when nobody has used it for so long.
        created, last_used: seconds since 1970.
        answer: of the engine, while it is encoded ahead; key: by which the engine knows it, from then on.
        planned: its blocks, mode and sizes.
        kv_bytes: by kind of layer, once it is encoded.
        failure: why it was not encoded ahead.
    """

    tenant: str
    kept: KeptContext
    star: StarOptions
    name: str = ""
    cache_salt: str = ""
    priority: int = 0
    ttl_seconds: int
    id: str = field(default_factory=lambda: f"ctx_{secrets.token_urlsafe(RANDOM_BYTES)}")
    created: float = field(default_factory=time)
    last_used: float = field(default_factory=time)
    answer: Answer | None = None
    key: ContextKey | None = None
    planned: dict[str, Any] = field(default_factory=dict)
    kv_bytes: dict[str, int] = field(default_factory=dict)
    failure: RequestError | None = None

    @property
    def expires(self) -> float:
        """When it is deleted, unless somebody uses it before."""
        return self.last_used + self.ttl_seconds

    def ahead(self) -> Ask:
        """What encodes it."""
        return Ask(
            prompts=[AheadPrompt(self.kept)],
            star=self.star.model_copy(update={"speculate": "off"}),
            generation=Generation(num_tokens=0),
            cache_salt=self.cache_salt,
            priority=self.priority,
        )

    def note_submitted(self, answer: Answer) -> None:
        """The engine encodes it, or will."""
        self.answer, self.key = answer, answer.key
        star = answer.planned.star
        self.planned = {"blocks": answer.plan.num_blocks, "mode": star.mode, "sizes": sizes_of(star)}

    def note_ended(self, result: StarResult | None, failure: RequestError | None) -> None:
        """It is encoded, or it is not, and why."""
        self.answer, self.failure = None, failure
        self.kv_bytes = result.kv_bytes_by_kind if result and not failure else {}

    def report(self, engine: EngineThread) -> dict[str, Any]:
        """What is told of it."""
        status, num_encoded = self._progress(engine)
        return {
            "id": self.id,
            "name": self.name or None,
            "created": int(self.created),
            "last_used": int(self.last_used),
            "expires": int(self.expires),
            "status": status,
            "error": self.failure.message if self.failure and status == "failed" else None,
            "for_chat": self.kept.opening is not None,
            "tokens": len(self.kept.tokens),
            "encoded_tokens": num_encoded,
            **self.planned,
            "kv_bytes": self.kv_bytes if status == "encoded" else {},
            "bytes": self.kept.num_bytes,
        }

    def _progress(self, engine: EngineThread) -> tuple[str, int]:
        """Its status, and how many tokens are encoded."""
        if self.answer and self.answer.stage <= Stage.WAITING:
            return "queued", 0
        num_encoded = engine.num_encoded_tokens(self.key) if self.key else None
        if num_encoded is None:
            return "failed" if self.failure else "dropped", 0
        is_encoded = num_encoded == len(self.kept.tokens) and not self.answer
        return "encoded" if is_encoded else "encoding", num_encoded


class ContextRegistry:
    """All contexts of all keys."""

    def __init__(self, engine: EngineThread, *, most: int, most_bytes: int) -> None:
        """Args: of the contexts of one key, of which there may be so many, with so many bytes here."""
        self.engine, self.most, self.most_bytes = engine, most, most_bytes
        self._contexts: dict[str, Context] = {}

    def num_kept(self) -> int:
        """Contexts of all keys."""
        return len(self._contexts)

    def num_bytes(self) -> int:
        """Of memory here, of their texts and tokens."""
        return sum(context.kept.num_bytes for context in list(self._contexts.values()))

    def add(self, context: Context) -> None:
        """Keep it. Raises RequestError if the key has too many contexts."""
        others = self.of(context.tenant)
        if len(others) >= self.most:
            raise RequestError(409, f"there are {len(others)} contexts already, of {self.most}: delete one")
        num_bytes = context.kept.num_bytes + sum(other.kept.num_bytes for other in others)
        if num_bytes > self.most_bytes:
            raise RequestError(
                409, f"contexts would take {num_bytes:,} bytes, of {self.most_bytes:,}: delete one"
            )
        self._contexts[context.id] = context
        self._expire_later(context)

    def of(self, tenant: str) -> list[Context]:
        """A key's, the oldest first."""
        return [context for context in self._contexts.values() if context.tenant == tenant]

    def get(self, context_id: str, tenant: str) -> Context:
        """Raises RequestError if there is none, which is also what others are told of it."""
        context = self._contexts.get(context_id)
        if context is None or context.tenant != tenant:
            raise RequestError(404, f"context_id: there is no context {context_id[:100]!r}", "context_id")
        return context

    def delete(self, context: Context) -> None:
        """Forget it; its KV goes as soon as no request uses it, unless another context has the same."""
        if self._contexts.pop(context.id, None) is None:
            return
        if context.answer:
            context.answer.cancel()
        if context.key and all(other.key != context.key for other in self._contexts.values()):
            self.engine.forget(context.key)

    def resolved(self, ask: Ask, tenant: str) -> Ask:
        """What is asked about a context, with that in its place.

        Raises:
            RequestError: there is no such context of this key.
            FieldError: a field says how to encode it or where it ends, which is decided already.
        """
        if ask.context_id is None:
            return ask
        context = self.get(ask.context_id, tenant)
        given = {
            **ask.star.encoding(),
            "query_tokens": ask.star.query_tokens,
            "separator": ask.star.separator,
        }
        for name, value in given.items():
            if value is not None:
                raise FieldError(f"star.{name}: leave it out: the context has its own", f"star.{name}")
        context.last_used = time()
        return replace(
            ask,
            prompts=[replace(prompt, kept=context.kept) for prompt in ask.prompts],
            star=ask.star.model_copy(update=context.star.encoding()),
            cache_salt=ask.cache_salt or context.cache_salt,
        )

    def _expire_later(self, context: Context) -> None:
        """Look again when it would expire if nobody used it until then."""
        if context.id in self._contexts:
            if (left := context.expires - time()) <= 0:
                self.delete(context)
            else:
                asyncio.get_running_loop().call_later(left, self._expire_later, context)
