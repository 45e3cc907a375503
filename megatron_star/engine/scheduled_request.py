"""A request as the scheduler sees it: integers, what it shares, and how far it is."""

from dataclasses import dataclass, field
from enum import IntEnum, auto

from megatron_star.engine.cached_context import CachedContext, ContextKey, context_keys, token_digests
from megatron_star.engine.owner import Owner
from megatron_star.planning.plan import ContextPlan
from megatron_star.planning.planner import PlannedContext
from megatron_star.planning.scoring import Scoring


class Stage(IntEnum):
    """How far a request is; it only goes forward."""

    PREPARED = auto()
    """Checked, planned and hashed."""
    WAITING = auto()
    """For memory, or until fewer run."""
    ENCODING = auto()
    """Admitted; its query is fed as soon as its context is encoded."""
    READING = auto()
    """Its query goes through the model: the ranks have a sequence of its id."""
    ANSWERING = auto()
    """What is fed next is a generated token."""
    MAPPING = auto()
    """It has its last token; the ranks' sequence of its id is now one for its attention map."""
    ENDED = auto()


@dataclass(eq=False)
class ScheduledRequest:
    """
    Attributes:
        context_tokens: of the whole context.
        pending: tokens that are to be fed next: the query, then each generated token.
        proposals: tokens that are guessed to follow the pending one, at most `MOST_PROPOSED_TOKENS`; fed with
            it, once.
        fed_proposals: those of the last step, until it is known which of them are kept.
        num_tail_tokens: query and generated tokens, at most.
        planned: its context, if no context of another request is used.
        is_long: how its context is encoded, see `EncodedContext`.
        owner: whose it is.
        keys: of its context, and of those that its earlier turns ended with, by where they end.
        digests: of its context's tokens (`token_digests`).
        context: that it uses; from `ENCODING` on.
        tail_rank, tail_bytes: where its tail lives, and its memory there.
        scoring: what it wants to know of its context's tokens, which is then nobody else's.
        scores_query: it wants to know how likely its query's tokens are.
        generates: tokens are chosen after its query.
        num_fed: tokens that were fed, without those that were guessed.
        num_cached_tokens: of its context, encoded for another request already, or about to be.
    """

    id: int
    context_tokens: list[int]
    pending: list[int]
    num_tail_tokens: int
    planned: PlannedContext
    is_long: bool = False
    owner: Owner = Owner()
    keys: dict[int, ContextKey] = field(init=False)
    digests: tuple[bytes, ...] = field(init=False)
    proposals: list[int] = field(default_factory=list)
    fed_proposals: list[int] = field(default_factory=list)
    stage: Stage = Stage.PREPARED
    context: CachedContext | None = None
    tail_rank: int = 0
    tail_bytes: int = 0
    num_fed: int = 0
    num_cached_tokens: int = 0
    scoring: Scoring | None = None
    scores_query: bool = False
    generates: bool = True

    def __post_init__(self) -> None:
        salt, edges = self.owner.salt, self.planned.edges
        self.keys = context_keys(self.context_tokens, edges, self.plan.mask, is_long=self.is_long, salt=salt)
        self.digests = token_digests(self.context_tokens, salt)

    def score(self, num_top: int) -> None:
        """Want to know how likely context and query are; what is encoded for others does not say it."""
        next_token = self.pending[0] if self.pending else None
        self.scoring, self.scores_query, self.digests = Scoring(num_top, next_token), True, ()
        self.keys = {end: (f"of request {self.id}".encode(), mask) for end, (_, mask) in self.keys.items()}

    @property
    def plan(self) -> ContextPlan:
        """The plan of the whole context."""
        return self.planned.plan

    @property
    def key(self) -> ContextKey:
        """Of its whole context."""
        return self.keys[self.plan.num_tokens]

    @property
    def is_answering(self) -> bool:
        """Its query went through the model."""
        return self.stage == Stage.ANSWERING
