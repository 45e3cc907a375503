"""What the driver tells all ranks, turn by turn: integers and configurations, no tensor."""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Self

from megatron_star.config import StarConfig
from megatron_star.planning.scoring import Scoring


class Fed(NamedTuple):
    """Tokens that a sequence is fed, and of how many of the last ones the driver wants logits.

    Of these, the first `num_scored` are of a query whose next tokens are known: they say how likely it is.
    """

    sequence_id: int
    token_ids: list[int]
    num_logits: int = 1
    num_scored: int = 0


class Observed(NamedTuple):
    """Tokens that a sequence is fed alone, and those of them whose looks at the context the driver wants."""

    sequence_id: int
    token_ids: list[int]
    rows: list[int]


class OpenedContext(NamedTuple):
    """A context that is to be encoded.

    Attributes:
        token_ids: that it encodes: all, or what comes after the first ones of its parent.
        star: with its mode decided and its sizes chosen.
        edges: where it ends, and its earlier turns did: of these its mask is made, whatever its parent is.
        parent: the context that it extends, and how many of its first tokens; None if it extends nothing.
        is_long: it is rotated with longrope's long factors.
    """

    context_id: int
    token_ids: list[int]
    star: StarConfig
    edges: tuple[int, ...]
    parent: tuple[int, int] | None = None
    is_long: bool = False


@dataclass
class Command:
    """What all ranks do next, in the order of the fields.

    Attributes:
        drop_sequences, drop_contexts: ids whose KV is freed.
        open_context: a context to be encoded, or restored.
        restore_context: id of a context, an entry of the context store, and the layers, numbered from 1, that
            are read from there now: the first of them, and the first that is not. All ranks then say whether
            they could.
        encode_wave: id of a context and the index of its next wave.
        score_wave: the driver is told how likely the tokens are that follow those of the wave.
        save_contexts: ids of encoded contexts, and the folders in the context store that they are written to.
        open_sequences: id, context id and tail rank of sequences that begin.
        rewind: ids of sequences whose tail forgets its end, and the tokens of it that stay.
        observe: of a sequence that is fed for its attention map. All ranks then say where it looks.
        feed: of the sequences that go through the model together.
        read_expert_load: the driver is told how many tokens each expert was given.
        stop: the job ends.
    """

    drop_sequences: list[int] = field(default_factory=list)
    drop_contexts: list[int] = field(default_factory=list)
    open_context: OpenedContext | None = None
    restore_context: tuple[int, str, int, int] | None = None
    encode_wave: tuple[int, int] | None = None
    score_wave: Scoring | None = None
    save_contexts: list[tuple[int, str]] = field(default_factory=list)
    open_sequences: list[tuple[int, int, int]] = field(default_factory=list)
    rewind: list[tuple[int, int]] = field(default_factory=list)
    observe: Observed | None = None
    feed: list[Fed] = field(default_factory=list)
    read_expert_load: bool = False
    stop: bool = False

    @property
    def only_decodes(self) -> bool:
        """Sequences get their next tokens, and nothing else is done."""
        whole = all(fed.num_logits == len(fed.token_ids) and not fed.num_scored for fed in self.feed)
        return bool(self.feed) and whole and not (self.encode_wave or self.restore_context or self.observe)

    def to_json(self) -> dict[str, Any]:
        """A form that survives JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The command of `to_json`."""
        command = cls(**values)
        command.feed = [Fed(*fed) for fed in command.feed]
        command.score_wave = Scoring(*command.score_wave) if command.score_wave else None
        if command.observe:
            command.observe = Observed(*command.observe)
        if command.open_context:
            opened = OpenedContext(*command.open_context)
            star, edges = StarConfig.from_dict(opened.star), tuple(opened.edges)
            parent = tuple(opened.parent) if opened.parent else None
            command.open_context = opened._replace(star=star, edges=edges, parent=parent)
        return command
