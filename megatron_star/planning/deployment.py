"""A model on the GPUs of a cluster: what each of them holds, and how long it takes."""

from collections import Counter
from dataclasses import dataclass

from megatron_star.planning.cost_model import (
    crossing_sources,
    ffn_size,
    kv_layers,
    token_costs,
    weights_of_a_layer,
)
from megatron_star.planning.hardware import Cluster
from megatron_star.planning.kv_memory import KvLayers
from megatron_star.planning.layer_mask import LayerMask
from megatron_star.planning.passing import WavePassing, wave_passing
from megatron_star.planning.plan import ContextPlan
from megatron_star.planning.segment import TokenCosts, Wave, cost_by_rank


@dataclass(frozen=True)
class ModelSize:
    """A `ModelShape` with what its weights need besides. Tied embeddings are the output layer as well."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    gated_linear_unit: bool
    vocab_size: int
    tied_embeddings: bool
    num_moe_experts: int | None = None
    moe_router_topk: int = 0
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    window_size: tuple[int, int] | None = None
    window_attn_skip_freq: tuple[int, ...] | None = None
    attention_chunk_size: int | None = None
    chunked_layers: tuple[int, ...] | None = None

    @property
    def num_parameters(self) -> int:
        """All weight matrices; norms and biases are left out."""
        layers = self.num_layers * weights_of_a_layer(self, self.num_moe_experts or 0)
        return layers + self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    @property
    def num_parameters_per_token(self) -> int:
        """Those that generating one token reads: of its experts, and of the output layer."""
        layers = self.num_layers * weights_of_a_layer(self, self.moe_router_topk)
        return layers + self.vocab_size * self.hidden_size


@dataclass(frozen=True)
class Deployment:
    """A model on all GPUs of a cluster, as TP x CP ranks: consecutive GPUs are a TP group.

    All results are of one rank: the slowest, or the one that holds the most.
    """

    size: ModelSize
    cluster: Cluster
    tp_size: int
    bytes_per_value: int = 2

    @property
    def cp_size(self) -> int:
        """Ranks that share a context."""
        return self.cluster.num_gpus // self.tp_size

    @property
    def weights_bytes(self) -> float:
        """Weights of one rank."""
        return self.size.num_parameters * self.bytes_per_value / self.tp_size

    @property
    def kv(self) -> KvLayers:
        """The KV of a rank."""
        return kv_layers(self.size, tp_size=self.tp_size, bytes_per_value=self.bytes_per_value)

    def kv_bytes(self, plan: ContextPlan) -> int:
        """KV of the context on the rank that has most of it."""
        return max(self.kv.of_context(plan, spare=False))

    def activation_bytes(self, plan: ContextPlan) -> float:
        """Of the rank with most tokens in one forward pass: what a layer keeps at the same time.

        Eight values of the hidden size (residual, normalised, reduced, ..); the query and the attention's
        output, with the float32 sum of partial results and one more partial; three values of the MLP. The
        named keys that all ranks have gathered come on top.
        """
        query_size = self.size.num_attention_heads * self.size.kv_channels / self.tp_size
        mlp = 3 * ffn_size(self.size, self.size.moe_router_topk) / self.tp_size
        of_a_token = (
            self.bytes_per_value * (8 * self.size.hidden_size + 4 * query_size + mlp) + 12 * query_size
        )
        return max(
            (
                max(_rows_by_rank(wave).values()) * of_a_token + self._gathered_bytes(plan, wave)
                for wave in plan.waves
            ),
            default=0,
        )

    def _gathered_bytes(self, plan: ContextPlan, wave: Wave) -> int:
        """Named keys of all ranks in one layer that passes them."""
        gathered = self.cp_size * wave_passing(plan, wave).num_padded if self.kv.num_passing else 0
        return gathered * self.kv.bytes_per_token

    def encoding_seconds(self, plan: ContextPlan) -> float:
        """Context encoding: the slowest rank of each wave, added up."""
        return sum(self._wave_seconds(plan, wave) for wave in plan.waves)

    def _wave_seconds(self, plan: ContextPlan, wave: Wave) -> float:
        costs = self._costs_in_seconds
        rows = _rows_by_rank(wave)
        seconds = cost_by_rank(wave, plan.mask, costs)
        slowest = max(rows, key=seconds.__getitem__)
        exposed_s = self._exposed_transfer_seconds(plan, wave, slowest)
        return seconds[slowest] + self._all_reduce_seconds(rows[slowest]) + exposed_s

    @property
    def _costs_in_seconds(self) -> TokenCosts:
        gpu, costs = self.cluster.gpu, token_costs(self.size)
        return costs.scaled(
            1 / self.tp_size / gpu.matmul_flops_per_s, 1 / self.tp_size / gpu.attention_flops_per_s
        )

    def _exposed_transfer_seconds(self, plan: ContextPlan, wave: Wave, rank: int) -> float:
        """Of the exchanges, what attention does not hide: it runs meanwhile, but for its part with what comes
        last, which must have come first. In a layer with a mask of its own, all must have come first. So must
        all broadcasts where keys are named that are among them: nothing hides the all-gather then.
        """
        transfers = {mask: self._transfer_seconds(plan, wave, mask) for mask in self.kv.num_layers}
        passing = wave_passing(plan, wave)
        gather_s = self._gather_seconds(passing)
        late_s = gather_s if passing.reads_first else 0.0
        meanwhile_s = transfers.pop(None, 0.0) + gather_s - late_s
        hidden_s = min(meanwhile_s, self._hiding_seconds(plan, wave, rank))
        return sum(transfers.values()) + meanwhile_s - hidden_s + late_s

    def _hiding_seconds(self, plan: ContextPlan, wave: Wave, rank: int) -> float:
        """A rank's attention without that to passed keys, and to the source that crosses ranks last."""
        per_pair = TokenCosts(0.0, self._costs_in_seconds.attention_per_pair)
        pairs = _pairs_with_last(plan, wave, rank) + _pairs_with_passed(plan, wave, rank)
        seconds = cost_by_rank(wave, plan.mask, per_pair)[rank] - per_pair.attention_per_pair * pairs
        return max(0.0, seconds)

    def _gather_seconds(self, passing: WavePassing) -> float:
        """The all-gathers of named keys: each rank receives those of the others."""
        if not passing.num_padded or self.cp_size == 1:
            return 0.0
        rate, latency = self.cluster.link(self.cluster.num_gpus)
        received = (self.cp_size - 1) * passing.num_padded * self.kv.bytes_per_token
        return self.kv.num_passing * (received / rate + latency)

    def _transfer_seconds(self, plan: ContextPlan, wave: Wave, mask: LayerMask | None) -> float:
        """What crosses ranks in all layers with this mask."""
        rate, latency = self.cluster.link(self.cluster.num_gpus)
        crossing = crossing_sources(plan, wave, mask)
        num_tokens = sum(source.end - source.start for source in crossing)
        of_a_layer = num_tokens * self.kv.bytes_per_token / rate + len(crossing) * latency
        return self.kv.num_layers[mask] * of_a_layer

    def _all_reduce_seconds(self, rows: int) -> float:
        """Two a layer over the TP group, each a ring: every byte is sent and received almost twice."""
        if self.tp_size == 1:
            return 0.0
        rate, latency = self.cluster.link(self.tp_size)
        num_bytes = rows * self.size.hidden_size * self.bytes_per_value
        ring_s = 2 * (self.tp_size - 1) / self.tp_size * num_bytes / rate
        return 2 * self.size.num_layers * (ring_s + latency)

    def step_seconds(self, plan: ContextPlan) -> float:
        """One token of one sequence: read weights and KV once, two all-reduces and one merge a layer."""
        weights = self.size.num_parameters_per_token * self.bytes_per_value / self.tp_size
        kv = max(self.kv.of_context(plan, spare=False, named=False))
        read_s = (weights + kv) / self.cluster.gpu.memory_bytes_per_s
        return read_s + self._all_reduce_seconds(1) + self._merge_seconds()

    def _merge_seconds(self) -> float:
        """One all-gather a layer over the CP group: each rank's float32 output and LSE of one token."""
        if self.cp_size == 1:
            return 0.0
        rate, latency = self.cluster.link(self.cluster.num_gpus)
        part = 4 * self.size.num_attention_heads / self.tp_size * (self.size.kv_channels + 1)
        return self.size.num_layers * ((self.cp_size - 1) * part / rate + latency)


def _pairs_with_last(plan: ContextPlan, wave: Wave, rank: int) -> int:
    """Pairs of a rank's rows with the source that crosses ranks last, if any does."""
    last = max(crossing_sources(plan, wave), default=None)
    if last is None:
        return 0
    return min(_rows_by_rank(wave)[rank], wave[-1].end - last.end) * (last.end - last.start)


def _pairs_with_passed(plan: ContextPlan, wave: Wave, rank: int) -> int:
    """Pairs of a rank's rows with named keys of other blocks."""
    own = (segment for segment in wave if segment.owner == rank)
    return sum(segment.num_tokens * plan.mask.num_passed(segment.start) for segment in own)


def _rows_by_rank(wave: Wave) -> Counter[int]:
    """Tokens in the forward pass of each rank, copies of the anchor included."""
    rows: Counter[int] = Counter()
    for segment in wave:
        rows[segment.owner] += segment.num_rows
    return rows
