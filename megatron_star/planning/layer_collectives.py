"""What the layers of a deployment send among ranks besides KV, in bytes and seconds: all-reduces over the TP
group, and what experts over ranks ask for."""

from dataclasses import dataclass

from megatron_star.planning.expert_layers import expert_layers
from megatron_star.planning.expert_layout import ExpertLayout
from megatron_star.planning.hardware import Cluster
from megatron_star.planning.model_size import ModelSize


@dataclass(frozen=True)
class LayerCollectives:
    """Of a model on a cluster, with experts spread over ranks."""

    size: ModelSize
    cluster: Cluster
    layout: ExpertLayout
    bytes_per_value: int

    def all_to_all_bytes(self, rows: int) -> float:
        """What leaves a rank for the experts of others, and returns, in an encoding of so many rows.

        Of the last layer nothing is wanted but keys and values.
        """
        of_a_layer = self.layout.all_to_all_bytes(rows, self.size, self.bytes_per_value)
        return sum(expert_layers(self.size)[:-1]) * of_a_layer

    def step_sum_bytes(self) -> float:
        """What a rank sends in a step for the sums of what experts return, of one sequence."""
        of_a_layer = self.layout.sum_bytes(1, self.size, self.bytes_per_value)
        return self.size.num_expert_layers * of_a_layer

    def encoding_seconds(self, rows: int) -> float:
        """Of so many rows of a rank in all layers, while a context is encoded."""
        all_reduce_s, layout = self._all_reduce_seconds(rows, self.layout.tp_size), self.layout
        if not layout.dispatches:
            return self._of_layers(all_reduce_s, self._all_reduce_seconds(rows, layout.num_ranks))
        slices_s = all_reduce_s / 2  # gathered over TP
        return self._of_layers(all_reduce_s, self._all_to_all_seconds(rows) + slices_s)

    def step_seconds(self) -> float:
        """Of one token of one sequence: all ranks that share experts have the same row."""
        over_tp_s = self._all_reduce_seconds(1, self.layout.tp_size)
        return self._of_layers(over_tp_s, self._all_reduce_seconds(1, self.layout.num_ranks))

    def _of_layers(self, over_tp_s: float, experts_s: float) -> float:
        """Of all layers: attention's sum over TP, and that of an MLP or of the shared expert; and what the
        experts that a router chooses ask for.
        """
        has_shared = bool(self.size.moe_shared_expert_intermediate_size)
        num_expert_layers = self.size.num_expert_layers
        num_dense_layers = self.size.num_layers - num_expert_layers
        num_over_tp = self.size.num_layers + num_dense_layers + num_expert_layers * has_shared
        return num_over_tp * over_tp_s + num_expert_layers * experts_s

    def _all_to_all_seconds(self, rows: int) -> float:
        """One layer's: there and back, and among those that share an expert."""
        arguments = (rows, self.size, self.bytes_per_value)
        cut = self.layout.expert_tp_size
        rate, latency = self.cluster.link(cut)
        within_s = 2 * (self.layout.expert_tp_bytes(*arguments) / 2 / rate + latency) if cut > 1 else 0.0
        num_bytes = self.layout.all_to_all_bytes(*arguments)
        seconds, latency = self.cluster.all_to_all(num_bytes, self.layout.num_ranks)
        return within_s + seconds + 2 * latency

    def _all_reduce_seconds(self, rows: int, num_ranks: int) -> float:
        """One of the hidden size, a ring: every byte is sent and received almost twice."""
        if num_ranks == 1:
            return 0.0
        rate, latency = self.cluster.link(num_ranks)
        num_bytes = rows * self.size.hidden_size * self.bytes_per_value
        return 2 * (num_ranks - 1) / num_ranks * num_bytes / rate + latency
