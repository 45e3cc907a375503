"""One rank's contexts and sequences. Every rank applies the driver's commands in the same order."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from torch import Tensor

from megatron_star.algorithm.context_encoding import encode_wave
from megatron_star.algorithm.kv_store import EncodedContext
from megatron_star.algorithm.star_model import StarModel
from megatron_star.algorithm.token_generation import Sequence, generate_step
from megatron_star.config import StarConfig
from megatron_star.planning.planner import Planner


@dataclass
class Command:
    """What all ranks do next, in the order of the fields.

    Attributes:
        drop_sequences, drop_contexts: ids whose KV is freed.
        open_context: of a context to be encoded: id, all tokens, configuration (mode decided, wave size set),
            and the id of the context that it extends.
        encode_wave: id of a context and the index of its next wave.
        open_sequences: id, context id and tail rank of sequences that begin.
        feed: id and new tokens of the sequences that go through the model together.
        stop: the job ends.
    """

    drop_sequences: list[int] = field(default_factory=list)
    drop_contexts: list[int] = field(default_factory=list)
    open_context: tuple[int, list[int], StarConfig, int | None] | None = None
    encode_wave: tuple[int, int] | None = None
    open_sequences: list[tuple[int, int, int]] = field(default_factory=list)
    feed: list[tuple[int, list[int]]] = field(default_factory=list)
    stop: bool = False

    def to_json(self) -> dict[str, Any]:
        """A form that survives JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The command of `to_json`."""
        command = cls(**values)
        if command.open_context:
            context_id, tokens, star, parent_id = command.open_context
            command.open_context = context_id, tokens, StarConfig.from_dict(star), parent_id
        return command


@dataclass
class _Context:
    token_ids: list[int]
    encoded: EncodedContext


def planner_of(star_model: StarModel, max_wait_seconds: float = math.inf) -> Planner:
    """The planner of a model on its ranks; see `Planner.of_model`."""
    return Planner.of_model(
        star_model.model.config,
        cp_size=star_model.exchange.cp_size,
        device_type=star_model.device.type,
        max_wait_seconds=max_wait_seconds,
    )


class RankExecutor:
    """Applies commands on one rank."""

    def __init__(self, star_model: StarModel) -> None:
        self.star_model, self.planner = star_model, planner_of(star_model)
        self.contexts: dict[int, _Context] = {}
        self.sequences: dict[int, Sequence] = {}

    def execute(self, command: Command) -> Tensor | None:
        """Apply a command.

        Returns:
            Logits [len(command.feed), vocab_size], float32, after each fed sequence's last new token; None if
            nothing was fed.
        """
        for sequence_id in command.drop_sequences:
            del self.sequences[sequence_id]
        for context_id in command.drop_contexts:
            del self.contexts[context_id]
        if command.open_context:
            self._open_context(*command.open_context)
        if command.encode_wave:
            self._encode_wave(*command.encode_wave)
        for sequence_id, context_id, tail_rank in command.open_sequences:
            self.sequences[sequence_id] = Sequence(self.contexts[context_id].encoded, tail_rank)
        if not command.feed:
            return None
        return generate_step(self.star_model, [(self.sequences[i], tokens) for i, tokens in command.feed])

    def _open_context(
        self, context_id: int, token_ids: list[int], star: StarConfig, parent_id: int | None
    ) -> None:
        parent = None if parent_id is None else self.contexts[parent_id].encoded
        plan = self.planner.build(len(token_ids), star, parent.plan if parent else None)
        encoded = EncodedContext(plan, self.star_model.exchange.cp_rank, parent)
        self.contexts[context_id] = _Context(token_ids, encoded)

    def _encode_wave(self, context_id: int, index: int) -> None:
        context = self.contexts[context_id]
        encode_wave(self.star_model, context.token_ids, context.encoded.plan.waves[index], context.encoded)
        self.star_model.synchronize()
