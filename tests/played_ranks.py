"""Ranks, played: they plan commands as `RankExecutor` does, and know for each token what it has seen."""

import torch

from megatron_star.engine.command import Command, OpenedContext
from megatron_star.planning.kv_memory import KvLayers, spare_capacity
from megatron_star.planning.layer_mask import LayerMask
from megatron_star.planning.mask import Range
from megatron_star.planning.passing import Named, wave_passing
from megatron_star.planning.plan import ContextPlan
from megatron_star.planning.planner import Planner

FULL = KvLayers((None,), 1)


class PlayedContext:
    """One context on the ranks, with a row for each token that is encoded: what it has seen.

    Attributes:
        mask: [n, n] bool, of tokens that its plan knows.
        passed: [n, blocks], how many of the keys that each block names; where they are, only a model knows.
        named: of each block that has named keys by now, here or in a context that this one extends.
    """

    def __init__(self, tokens: list[int], plan: ContextPlan, parent: "PlayedContext | None" = None):
        """parent: which the plan extends, from `plan.start` on."""
        self.tokens, self.plan, self.parent, self.num_waves = tokens, plan, parent, 0
        assert plan.num_tokens == len(tokens) and bool(parent) == bool(plan.start)
        self.mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
        self.passed = torch.zeros(len(tokens), self.plan.num_blocks, dtype=torch.int64)
        self.named: dict[int, int] = {}
        if parent:
            n = plan.start
            assert parent.tokens[:n] == tokens[:n] and parent.encoded
            self.mask[:n, :n] = parent.mask[:n, :n]
            num_blocks = min(plan.num_blocks, parent.plan.num_blocks)
            self.passed[:n, :num_blocks] = parent.passed[:n, :num_blocks]
            ends = parent.plan.mask.block_edges[1:]
            self.named |= {b: num_keys for b, num_keys in parent.named.items() if ends[b] <= n}

    def kept(self, mask: LayerMask) -> set[int]:
        """Tokens of a layer with a mask of its own that are there, on any rank."""
        own = range(max(self.plan.start, mask.kept_from(self.plan.num_tokens)), self.plan.num_tokens)
        parents = self.parent.kept(mask) if self.parent else set()
        return {*own, *(token for token in parents if token < self.plan.start)}

    @property
    def encoded(self) -> bool:
        return self.num_waves == len(self.plan.waves)

    def encode(self, wave: int) -> None:
        assert wave == self.num_waves
        self.named |= {named.block: named.num_keys for named in self._named_in(wave)}
        for segment in self.plan.waves[wave]:
            rows = slice(segment.start, segment.end)
            self.mask[rows, : segment.recomputed] = True
            self.mask[rows, rows] |= torch.ones(
                segment.num_tokens, segment.num_tokens, dtype=torch.bool
            ).tril()
            for source in segment.sources(self.plan.mask):
                assert not self.mask[rows, source.start : source.end].any(), "a key would count twice"
                self.mask[rows, source.start : source.end] = True
            for block, num_keys in self.plan.mask.passed(segment.start):
                assert 0 < num_keys <= self.named[block], "a key is seen before it is named"
                self.passed[rows, block] = num_keys
        self.num_waves += 1

    def _named_in(self, wave: int) -> tuple[Named, ...]:
        return wave_passing(self.plan, self.plan.waves[wave]).named

    def num_bytes(self, rank: int, layers: KvLayers) -> int:
        """What a rank holds by now of what this context's own plan encodes."""
        named = [named for wave in range(self.num_waves) for named in self._named_in(wave)]
        num_copies = sum(one.num_keys for one in named if one.owner == rank and self._is_spread(one.tokens))
        copies = num_copies * sum(mask is None for mask in layers.masks[:-1])
        return copies + sum(self._num_tokens(rank, mask) for mask in layers.masks)

    def _is_spread(self, tokens: Range) -> bool:
        """Whether this context does not have all of a block on one rank: then who names its keys keeps copies
        of them."""
        segments = (s for s in self.plan.segments() if s.start < tokens.end and tokens.start < s.end)
        return tokens.start < self.plan.start or len({segment.owner for segment in segments}) > 1

    def _num_tokens(self, rank: int, mask: LayerMask | None) -> int:
        if not mask:
            owned = self.plan.num_owned_tokens(rank)
            return owned + spare_capacity(owned)
        waves = self.plan.waves[: self.num_waves]
        segments = [segment for wave in waves for segment in wave if segment.owner == rank]
        first = mask.first_seen(waves[-1][-1].end) if waves else 0
        return sum(token >= first for segment in segments for token in range(*segment[:2]))


class PlayedRanks:
    """Apply commands; `seen` is the context of each sequence that was fed."""

    def __init__(
        self, planner: Planner, budget: int, layers: KvLayers = FULL, tail_tokens: int = 256
    ) -> None:
        """tail_tokens: that a tail takes memory for in all layers together."""
        self.planner, self.budget, self.layers, self.tail_tokens = planner, budget, layers, tail_tokens
        self.contexts: dict[int, PlayedContext] = {}
        self.tails: dict[int, int] = {}
        self.seen: dict[int, PlayedContext] = {}
        self.most_links = self.num_encoded = 0

    def execute(self, command: Command) -> None:
        for sequence in command.drop_sequences:
            del self.tails[sequence]
        for context in command.drop_contexts:
            del self.contexts[context]
        if command.open_context:
            self._open(command.open_context)
        if command.encode_wave:
            context, wave = command.encode_wave
            self.contexts[context].encode(wave)
        for sequence, context, tail_rank in command.open_sequences:
            assert self.contexts[context].encoded
            self.seen[sequence], self.tails[sequence] = self.contexts[context], tail_rank
        for rank in range(self.planner.cp_size):
            tails = self.tail_tokens * list(self.tails.values()).count(rank)
            held = sum(context.num_bytes(rank, self.layers) for context in self.contexts.values())
            assert held + tails <= self.budget
        alive = set(map(id, self.contexts.values()))
        assert all(id(c.parent) in alive for c in self.contexts.values() if c.parent), "a base is gone"

    def _open(self, opened: OpenedContext) -> None:
        parent, base, tokens = None, None, opened.token_ids
        if opened.parent:
            parent, num_reused = self.contexts[opened.parent[0]], opened.parent[1]
            base, tokens = parent.plan.prefix(num_reused), parent.tokens[:num_reused] + tokens
            for mask in self.layers.num_layers:
                if mask:
                    assert set(range(mask.first_seen(num_reused), num_reused)) <= parent.kept(mask)
        plan = self.planner.of_turns(opened.edges, opened.star, base)
        self.contexts[opened.context_id] = context = PlayedContext(tokens, plan, parent)
        self.num_encoded += len(opened.token_ids)
        num_links = 1
        while context.parent:
            context, num_links = context.parent, num_links + 1
        self.most_links = max(self.most_links, num_links)
