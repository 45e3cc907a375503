"""What is asked, and what comes back."""

import math
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Self

from megatron.core.inference.sampling_params import SamplingParams

from megatron_star.config import DEFAULT_SPECULATE, SPECULATE, FieldError, StarConfig
from megatron_star.engine.attention_map import AttentionMap
from megatron_star.engine.grammar import Grammar
from megatron_star.engine.owner import Owner
from megatron_star.engine.token_rules import TokenRules

MOST_TOP_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class StarRequest:
    """One context, one query, and how to answer.

    Attributes:
        context_tokens: what is encoded by `star`; may be empty.
        query_tokens: what follows it; at least one, where anything is generated after it.
        sampling: Megatron's parameters. Used: temperature, top_k, top_p, num_tokens_to_generate,
            termination_id, stop_words. top_k=1 is greedy; top_p is taken of what top_k leaves. With 0 tokens
            to generate, the request ends when its context is encoded and the log-probabilities are there that
            are asked for; without these, the query does not go through the model.
        end_tokens: further ids that end the answer, as `termination_id` does.
        min_tokens: before so many are generated, neither an end token is chosen nor a stop text heeded.
        speculate: how tokens are guessed, which a step then verifies: `lookup` or `off`. It changes no token.
        seed: with a token's index in the answer, it makes the random number that chooses the token.
        deadline_seconds: after so many seconds the request ends with what it has.
        rules: how logits are changed before a token is chosen.
        grammar: what the answer must look like.
        num_top_logprobs: of the most likely tokens in the place of each of the answer's.
        prompt_logprobs: of the query's and the context's tokens, too, and of so many most likely ones in the
            place of each; None computes none.
        include_stop_text: a stop text that ends the answer is part of it.
        skip_special_tokens: the answer's text does not have them.
        hidden_tokens: the answer's text does not have these either.
        tenant, cache_salt: contexts of others than these two are never used, nor seen to be there.
        attention_map: say where the answer looked in the context (`AttentionMap`).
        priority: lower ones are admitted before others of the tenant.
        share: of the work, relative to other tenants.
        turn_edges: where, in tokens, earlier contexts ended that this one extends. Each part is cut into
            blocks on its own, so what was encoded for an earlier turn is used again as it is.
    """

    context_tokens: list[int]
    query_tokens: list[int]
    star: StarConfig = field(default_factory=StarConfig)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    deadline_seconds: float = math.inf
    turn_edges: tuple[int, ...] = ()
    end_tokens: tuple[int, ...] = ()
    min_tokens: int = 0
    speculate: str = DEFAULT_SPECULATE
    rules: TokenRules = TokenRules()
    grammar: Grammar | None = None
    num_top_logprobs: int = 0
    prompt_logprobs: int | None = None
    include_stop_text: bool = False
    skip_special_tokens: bool = True
    hidden_tokens: frozenset[int] = frozenset()
    tenant: str = ""
    cache_salt: str = ""
    priority: int = 0
    attention_map: bool = False
    share: float = 1.0

    @property
    def owner(self) -> Owner:
        """Whose it is."""
        return Owner(tenant=self.tenant, cache_salt=self.cache_salt, priority=self.priority, share=self.share)

    @property
    def all_end_tokens(self) -> tuple[int, ...]:
        """Every id that ends the answer."""
        termination = self.sampling.termination_id
        return self.end_tokens if termination is None else (termination, *self.end_tokens)

    @property
    def runs_query(self) -> bool:
        """The query goes through the model."""
        return self.sampling.num_tokens_to_generate > 0 or self.prompt_logprobs is not None

    def copy(self) -> Self:
        """One that stays as it is, whatever the caller does with the lists and the sampling of this one."""
        return replace(
            self,
            context_tokens=list(self.context_tokens),
            query_tokens=list(self.query_tokens),
            sampling=copy(self.sampling),
        )

    def check(self, *, vocab_size: int, max_sequence_length: int) -> None:
        """Raises ValueError (a FieldError where one field is wrong), naming the value and the bound."""
        generates = self.sampling.num_tokens_to_generate != 0
        if not self.query_tokens and (generates or (self.runs_query and not self.context_tokens)):
            raise ValueError("the query is empty: it needs at least one token")
        for token in (*self.context_tokens, *self.query_tokens):
            if not 0 <= token < vocab_size:
                raise ValueError(f"token id {token} is outside of the vocabulary of {vocab_size} tokens")
        _check_sampling(self.sampling, vocab_size)
        most = self.sampling.num_tokens_to_generate
        if not 0 <= self.min_tokens <= most:
            raise FieldError(
                f"min_tokens is {self.min_tokens}: it must be from 0 to the {most} to generate", "min_tokens"
            )
        if self.speculate not in SPECULATE:
            raise FieldError(
                f"speculate is {self.speculate!r}: it must be one of {', '.join(SPECULATE)}", "speculate"
            )
        if not self.deadline_seconds > 0:
            raise FieldError(
                f"deadline_seconds is {self.deadline_seconds}: it must be more than 0", "deadline_seconds"
            )
        for name in ("num_top_logprobs", "prompt_logprobs"):
            if not 0 <= (getattr(self, name) or 0) <= MOST_TOP_LOGPROBS:
                raise FieldError(
                    f"{name} is {getattr(self, name)}: it must be from 0 to {MOST_TOP_LOGPROBS}", name
                )
        self.rules.check(vocab_size)
        self.rules.check_leaves_some(self.all_end_tokens if self.min_tokens else ())
        _check_turn_edges(self.turn_edges, len(self.context_tokens))
        context, query = len(self.context_tokens), len(self.query_tokens)
        generated = self.sampling.num_tokens_to_generate
        total = context + query + generated
        if total > max_sequence_length:
            raise ValueError(
                f"{context} context + {query} query + {generated} generated tokens = {total}, "
                f"but the model's limit is {max_sequence_length}"
            )


def _check_turn_edges(edges: tuple[int, ...], num_context_tokens: int) -> None:
    bounds = (0, *edges, num_context_tokens)
    if any(left >= right for left, right in pairwise(bounds)) and edges:
        raise FieldError(
            f"turn_edges {list(edges)} must rise, between 0 and {num_context_tokens} context tokens",
            "turn_edges",
        )


def _check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    count = sampling.num_tokens_to_generate
    if not isinstance(count, int) or count < 0:
        raise FieldError(
            f"num_tokens_to_generate is {count!r}: it must be at least 0", "num_tokens_to_generate"
        )
    if not 0.0 <= sampling.temperature < float("inf"):
        raise FieldError(
            f"temperature is {sampling.temperature}: it must be a number of at least 0", "temperature"
        )
    if not 0 <= sampling.top_k < vocab_size:
        raise FieldError(f"top_k is {sampling.top_k}: it must be from 0 to {vocab_size - 1}", "top_k")
    if not 0.0 <= sampling.top_p <= 1.0:
        raise FieldError(f"top_p is {sampling.top_p}: it must be from 0 to 1", "top_p")


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds: in the queue, for the context, from there to the first token; `tpot_s` per token after it.

    `ttft_s` is the sum of the two before it. What ran beside the request is in all of them.
    """

    queue_s: float
    context_encoding_s: float
    query_s: float
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, kw_only=True)
class StarResult:
    """One answer.

    Attributes:
        text: without special tokens and the token that ended it, cut before a stop text.
        tokens: all generated ids, the one that ended the sequence included.
        logprobs: of each of `tokens`, natural logarithm, under the model's own distribution (temperature 1).
        finish_reason: `stop`, `length`, `cancelled`, `deadline` or `error`.
        error: for a person, what made it end with `error`: logits were not finite, or no token was left.
        is_refused: that is due to what was asked.
        mode: `star` or `exact`, as used.
        sizes: of blocks, anchor and passed keys, as used, by their names in StarConfig; none with `exact`.
        cache_hit: all of the context was encoded, or being encoded, for another request already.
        num_cached_tokens: context tokens of which that is so; fewer than all if the context extends another.
        num_proposed_tokens, num_accepted_tokens: tokens that were guessed and verified several in a step, and
            those of them that are the answer's.
        attention_map: where it looked in the context; None where that was not asked for, or no token was
            generated, or it was cancelled before.
        kv_bytes_per_rank: memory that was reserved for the context and the tail on each CP rank (on each TP
            rank of it). Layers with a mask of their own may take some of it only while waves are encoded.
        kv_bytes_by_kind: of all CP ranks together when all is encoded, by kind of layer.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    num_context_tokens: int
    num_query_tokens: int
    mode: str
    num_blocks: int
    cache_hit: bool
    timings: Timings
    kv_bytes_per_rank: list[int]
    kv_bytes_by_kind: dict[str, int]
    sizes: dict[str, int] = field(default_factory=dict)
    num_cached_tokens: int = 0
    num_proposed_tokens: int = 0
    num_accepted_tokens: int = 0
    error: str | None = None
    is_refused: bool = False
    attention_map: AttentionMap | None = None
