"""What an HTTP request asks, whatever wire it came by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from megatron.core.inference.sampling_params import SamplingParams

from megatron_star.config import FieldError
from megatron_star.engine.token_rules import TokenRules
from megatron_star.server.context_rules import PromptSplitter
from megatron_star.server.grammar_spec import GrammarSpec
from megatron_star.server.kept_context import KeptContext
from megatron_star.server.star_options import StarOptions
from megatron_star.text.chat_template import Chat
from megatron_star.text.prompt import SplitPrompt

SMALLEST_TEMPERATURE = 1e-3
"""Below it, sampling is greedy: logits divided by less would overflow."""
Content = str | list[int]
"""Of a prompt: text, or token ids."""


class Filters(NamedTuple):
    """Which tokens are left to draw from; 0 is off."""

    top_k: int
    top_p: float


def filters(top_k: int | None, top_p: float | None, *, zero_is_off: bool) -> Filters:
    """`top_k` and `top_p` as the engine reads them, where 1 (OpenAI's default) leaves all tokens in.

    Args:
        zero_is_off: a `top_p` of 0 does so too, as in Megatron; else it leaves the most likely token.
    """
    if top_p == 0.0 and not zero_is_off:
        return Filters(1, 0.0)
    return Filters(max(0, top_k or 0), 0.0 if top_p is None or top_p >= 1.0 else top_p)


def stop_texts(stop: str | list[str] | None) -> tuple[str, ...]:
    """One text or several, as a tuple."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How tokens are chosen; the defaults of OpenAI's and Megatron's servers are the wires' business.

    Attributes:
        cut_to_room: nobody asked for so many tokens: fewer, where the model's limit leaves fewer.
        end_tokens: that end an answer; None are those of the model.
        more_end_tokens: in addition.
        bad_words: texts that the answer does not have; in addition to those of `rules`.
        rules, num_top_logprobs, prompt_logprobs, include_stop_text, skip_special_tokens, hidden_tokens: see
            `StarRequest`.
        grammar: what answers must look like.
    """

    num_tokens: int
    cut_to_room: bool = False
    min_tokens: int = 0
    temperature: float = 1.0
    filters: Filters = Filters(0, 0.0)
    stop: tuple[str, ...] = ()
    end_tokens: tuple[int, ...] | None = None
    more_end_tokens: tuple[int, ...] = ()
    seed: int | None = None
    bad_words: tuple[str, ...] = ()
    rules: TokenRules = TokenRules()
    grammar: GrammarSpec | None = None
    num_top_logprobs: int = 0
    prompt_logprobs: int | None = None
    include_stop_text: bool = False
    skip_special_tokens: bool = True
    hidden_tokens: frozenset[int] = frozenset()

    def sampling(self, room: int) -> SamplingParams:
        """Megatron's parameters, where there is room for so many tokens; top_p of 1 and 0 are off."""
        num_tokens = max(self.num_tokens, self.min_tokens) if self.cut_to_room else self.num_tokens
        top_k, top_p = self.filters
        return SamplingParams(
            temperature=self.temperature if self.temperature >= SMALLEST_TEMPERATURE else 0.0,
            top_k=top_k,
            top_p=float(top_p) if top_p < 1.0 else 0.0,
            num_tokens_to_generate=min(num_tokens, max(1, room)) if self.cut_to_room else num_tokens,
            stop_words=list(self.stop) or None,
        )


class Prompt(Protocol):
    """What one or more answers continue."""

    def split(self, splitter: PromptSplitter, options: StarOptions) -> SplitPrompt:
        """Its tokens, cut into context and query. Raises ValueError as the splitter does."""


@dataclass(frozen=True, kw_only=True)
class PlainPrompt:
    """Text or tokens, from this field, with its context if that is given beside it, or was sent before."""

    content: Content
    field: str
    context: str | None = None
    add_bos: bool = False
    kept: KeptContext | None = None

    def split(self, splitter: PromptSplitter, options: StarOptions) -> SplitPrompt:
        """See `Prompt`."""
        if self.kept:
            return self._after(self.kept, splitter)
        return splitter.split(
            self.content, options, context=self.context, add_bos=self.add_bos, field=self.field
        )

    def _after(self, kept: KeptContext, splitter: PromptSplitter) -> SplitPrompt:
        if self.context is not None:
            raise FieldError("contexts: leave them out where there is a context_id", "contexts")
        if self.add_bos:
            raise FieldError("add_BOS: the context begins as it was sent: send the token in it", "add_BOS")
        if isinstance(self.content, str):
            return kept.before_text(splitter, self.content, self.field)
        return kept.before_tokens(self.content, self.field)


@dataclass(frozen=True)
class ChatPrompt:
    """Messages, which the assistant's next one follows; after a context that was sent before, if any."""

    chat: Chat
    kept: KeptContext | None = None

    def split(self, splitter: PromptSplitter, options: StarOptions) -> SplitPrompt:
        """See `Prompt`."""
        return (
            self.kept.in_chat(splitter, self.chat) if self.kept else splitter.split_chat(self.chat, options)
        )


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What one HTTP request asks.

    Attributes:
        prompts: each gets `num_choices` answers.
        star: how contexts are encoded and where they end.
        num_best: of them, so many are given: those that are likeliest; None gives all.
        truncate_prompt: to its last so many tokens; -1: to those that there is room for.
        echoed: prompts whose text the answers repeat: all of them, or none.
        cache_salt, priority: see `StarRequest`.
        context_id: of the context that all prompts follow, see `ContextRegistry`.
    """

    prompts: Sequence[Prompt]
    star: StarOptions
    generation: Generation
    num_choices: int = 1
    num_best: int | None = None
    truncate_prompt: int | None = None
    echoed: Sequence[Content] = ()
    cache_salt: str = ""
    priority: int = 0
    context_id: str | None = None


def with_contexts(
    contents: Sequence[Content],
    contexts: list[str] | None,
    options: StarOptions,
    *,
    field: str,
    add_bos: bool = False,
) -> list[PlainPrompt]:
    """Each prompt of this field with its context: the only one, its own, or none. Raises FieldError."""
    if contexts and (options.query_tokens is not None or options.separator is not None):
        raise FieldError("contexts: leave out star.query_tokens and star.separator", "contexts")
    shared = contexts * len(contents) if contexts and len(contexts) == 1 else contexts
    return [
        PlainPrompt(content=content, context=context, add_bos=add_bos, field=field)
        for content, context in zip(contents, shared or [None] * len(contents), strict=True)
    ]
