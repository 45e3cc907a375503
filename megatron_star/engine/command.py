"""What the driver tells all ranks, turn by turn: integers and configurations, no tensor."""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Self

from megatron_star.config import StarConfig


class Fed(NamedTuple):
    """Tokens that a sequence is fed, and of how many of the last ones the driver wants logits."""

    sequence_id: int
    token_ids: list[int]
    num_logits: int = 1


@dataclass
class Command:
    """What all ranks do next, in the order of the fields.

    Attributes:
        drop_sequences, drop_contexts: ids whose KV is freed.
        open_context: of a context to be encoded: id, all tokens, configuration (mode decided, wave size set),
            and the id of the context that it extends.
        open_long: whether that context is rotated with longrope's long factors.
        restore_context: id of a context, an entry of the context store, and the layers, numbered from 1, that
            are read from there now: the first of them, and the first that is not. All ranks then say whether
            they could.
        encode_wave: id of a context and the index of its next wave.
        save_contexts: ids of encoded contexts, and the folders in the context store that they are written to.
        open_sequences: id, context id and tail rank of sequences that begin.
        rewind: ids of sequences whose tail forgets its end, and the tokens of it that stay.
        feed: of the sequences that go through the model together.
        read_expert_load: the driver is told how many tokens each expert was given.
        stop: the job ends.
    """

    drop_sequences: list[int] = field(default_factory=list)
    drop_contexts: list[int] = field(default_factory=list)
    open_context: tuple[int, list[int], StarConfig, int | None] | None = None
    open_long: bool = False
    restore_context: tuple[int, str, int, int] | None = None
    encode_wave: tuple[int, int] | None = None
    save_contexts: list[tuple[int, str]] = field(default_factory=list)
    open_sequences: list[tuple[int, int, int]] = field(default_factory=list)
    rewind: list[tuple[int, int]] = field(default_factory=list)
    feed: list[Fed] = field(default_factory=list)
    read_expert_load: bool = False
    stop: bool = False

    @property
    def only_decodes(self) -> bool:
        """Sequences get their next tokens, and nothing else is done."""
        whole = all(fed.num_logits == len(fed.token_ids) for fed in self.feed)
        return bool(self.feed) and whole and not (self.encode_wave or self.restore_context)

    def to_json(self) -> dict[str, Any]:
        """A form that survives JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The command of `to_json`."""
        command = cls(**values)
        command.feed = [Fed(*fed) for fed in command.feed]
        if command.open_context:
            context_id, tokens, star, parent_id = command.open_context
            command.open_context = context_id, tokens, StarConfig.from_dict(star), parent_id
        return command
