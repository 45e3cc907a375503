"""A model on the GPUs of a cluster: what each of them holds, and how long it takes."""

from collections import Counter
from dataclasses import dataclass

from megatron_star.planning.cost_model import (
    crossing_sources,
    kv_layers,
    sources_up,
    token_costs,
)
from megatron_star.planning.expert_layers import expert_layers
from megatron_star.planning.expert_layout import ExpertLayout
from megatron_star.planning.hardware import Cluster
from megatron_star.planning.kv_memory import KvLayers
from megatron_star.planning.layer_collectives import LayerCollectives
from megatron_star.planning.layer_mask import LayerMask
from megatron_star.planning.model_shape import expert_input, latent_attention, weights_of_an_expert
from megatron_star.planning.model_size import ModelSize
from megatron_star.planning.passing import WavePassing, wave_passing
from megatron_star.planning.plan import ContextPlan
from megatron_star.planning.segment import TokenCosts, Wave, cost_by_rank


@dataclass(frozen=True)
class Deployment:
    """A model on all GPUs of a cluster, as TP x CP ranks: consecutive GPUs are a TP group.

    All results are of one rank: the slowest, or the one that holds the most.
    """

    size: ModelSize
    cluster: Cluster
    layout: ExpertLayout
    bytes_per_value: int = 2
    kv_dtype: str = "auto"

    @property
    def tp_size(self) -> int:
        """Ranks that share the weights of all but experts."""
        return self.layout.tp_size

    @property
    def cp_size(self) -> int:
        """Ranks that share a context."""
        return self.cluster.num_gpus // self.tp_size

    @property
    def weights_bytes(self) -> float:
        """Weights of one rank."""
        of_experts = self.size.num_expert_parameters
        others = (self.size.num_parameters - of_experts) / self.tp_size
        return (others + of_experts / self.layout.num_ranks) * self.bytes_per_value

    @property
    def kv(self) -> KvLayers:
        """The KV of a rank."""
        return kv_layers(
            self.size,
            tp_size=self.tp_size,
            bytes_per_value=self.bytes_per_value,
            kv_dtype=self.kv_dtype,
        )

    @property
    def collectives(self) -> LayerCollectives:
        """What its layers send besides KV."""
        return LayerCollectives(self.size, self.cluster, self.layout, self.bytes_per_value)

    def kv_bytes(self, plan: ContextPlan) -> int:
        """KV of the context on the rank that has most of it."""
        return max(self.kv.of_context(plan, spare=False))

    def activation_bytes(self, plan: ContextPlan) -> float:
        """Of the rank with most tokens in one forward pass: what a layer keeps at the same time.

        Eight values of the hidden size (residual, normalised, reduced, ..); the query and the attention's
        output, with the float32 sum of partial results and one more partial; three values of the MLP. The
        named keys that all ranks have gathered come on top; of latent attention, the keys and values of each
        head, of the rank's tokens and of the longest source.
        """
        query_size = self.size.num_attention_heads * self.size.kv_channels / self.tp_size
        values = 8 * self.size.hidden_size + 4 * query_size + self._mlp_values()
        of_a_token = self.bytes_per_value * values + 12 * query_size
        expanded = 2 * query_size * self.bytes_per_value if latent_attention(self.size) else 0
        return max(
            (
                rows * of_a_token
                + (rows + _longest_source(plan, wave)) * expanded
                + self._gathered_bytes(plan, wave)
                for wave in plan.waves
                for rows in (max(_rows_by_rank(wave).values()),)
            ),
            default=0,
        )

    def _mlp_values(self) -> float:
        """Of a token of the rank: three values of the MLP. Of experts, these of the chosen ones and of the
        shared one, and the tokens as they come to the experts and leave them.
        """
        size, layout = self.size, self.layout
        kinds = set(expert_layers(size))
        values = [3 * size.ffn_hidden_size / self.tp_size] if False in kinds else []
        if True in kinds:
            of_an_expert = 3 * size.moe_ffn_hidden_size + 2 * layout.expert_tp_size * expert_input(size)
            shared = 3 * (size.moe_shared_expert_intermediate_size or 0) / self.tp_size
            values.append(shared + size.moe_router_topk * of_an_expert / self.tp_size)
        return max(values)

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
        up_s = self.kv.num_passing * sources_up(plan, wave, slowest, self.size) * self._linear_seconds
        return seconds[slowest] + up_s + self.collectives.encoding_seconds(rows[slowest]) + exposed_s

    @property
    def _linear_seconds(self) -> float:
        """Of an operation that the TP ranks share."""
        return 1 / self.tp_size / self.cluster.gpu.matmul_flops_per_s

    @property
    def _costs_in_seconds(self) -> TokenCosts:
        """Experts do on average what a rank's own rows ask."""
        attention_s = 1 / self.tp_size / self.cluster.gpu.attention_flops_per_s
        return token_costs(self.size).scaled(self._linear_seconds, attention_s)

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

    def all_to_all_bytes(self, plan: ContextPlan) -> float:
        """What leaves the rank with most rows for the experts of others, and returns, in a whole encoding."""
        return self.collectives.all_to_all_bytes(
            sum(max(_rows_by_rank(wave).values()) for wave in plan.waves)
        )

    def step_seconds(self, plan: ContextPlan) -> float:
        """One token of one sequence: read weights and KV once, two all-reduces and one merge a layer."""
        kv = max(self.kv.of_context(plan, spare=False, named=False))
        weights_s = self._step_weights() * self.bytes_per_value / self.cluster.gpu.memory_bytes_per_s
        attention_s = max(kv / self.cluster.gpu.memory_bytes_per_s, self._absorbed_seconds(kv))
        return weights_s + attention_s + self.collectives.step_seconds() + self._merge_seconds()

    def _absorbed_seconds(self, kv_bytes: int) -> float:
        """Attention to so many latents: all heads read the same one, and may take longer than reading it."""
        if not (latent := latent_attention(self.size)):
            return 0.0
        operations = kv_bytes / self.kv.bytes_per_token * latent.per_pair("absorbed") / self.tp_size
        return operations / self.cluster.gpu.attention_flops_per_s

    def _step_weights(self) -> float:
        """Read on the rank that has most of the token's experts."""
        size = self.size
        others = (size.num_parameters_per_token - size.num_chosen_parameters) / self.tp_size
        if not size.num_moe_experts:
            return others
        expert = weights_of_an_expert(size) / self.layout.expert_tp_size
        return others + size.num_expert_layers * self.layout.busiest(size) * expert

    def _merge_seconds(self) -> float:
        """One all-gather a layer over the CP group: each rank's float32 output and LSE of one token; of
        latent attention, the output is a latent for each head.
        """
        if self.cp_size == 1:
            return 0.0
        rate, latency = self.cluster.link(self.cluster.num_gpus)
        latent = latent_attention(self.size)
        values = latent.kv_lora_rank if latent else self.size.kv_channels
        part = 4 * self.size.num_attention_heads / self.tp_size * (values + 1)
        return self.size.num_layers * ((self.cp_size - 1) * part / rate + latency)


def _longest_source(plan: ContextPlan, wave: Wave) -> int:
    """Tokens of the longest source that crosses ranks for a wave."""
    return max((source.end - source.start for source in crossing_sources(plan, wave)), default=0)


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
