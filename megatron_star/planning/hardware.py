"""What GPUs and links can do, for estimates: data-sheet figures, and the shares of them that are assumed.

FLOP/s are dense bfloat16; links are bytes/s in one direction, per GPU.
"""

from dataclasses import dataclass

MATMUL_SHARE, ATTENTION_SHARE, MEMORY_SHARE, LINK_SHARE = 0.7, 0.5, 0.8, 0.8
"""Shares of the peak that kernels and links are assumed to reach. Assumptions, not measurements."""

USABLE_MEMORY_SHARE = 0.9
"""Of a GPU's memory; the rest is for CUDA, NCCL and fragmentation. An assumption."""

NODE_LATENCY_SECONDS, NETWORK_LATENCY_SECONDS = 10e-6, 25e-6
"""Of one small collective, within a node and across nodes. Assumptions."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU: seconds follow from rates, which are peak times the assumed share."""

    name: str
    matmul_flops_per_s: float
    attention_flops_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    node_link_bytes_per_s: float
    network_link_bytes_per_s: float


def _from_data_sheet(
    name: str, *, tflops: float, gigabytes: float, tb_per_s: float, link_gb_per_s: float
) -> Gpu:
    """Rates of a data sheet; one 400 Gb/s network card per GPU."""
    return Gpu(
        name=name,
        matmul_flops_per_s=MATMUL_SHARE * tflops * 1e12,
        attention_flops_per_s=ATTENTION_SHARE * tflops * 1e12,
        memory_bytes=USABLE_MEMORY_SHARE * gigabytes * 1e9,
        memory_bytes_per_s=MEMORY_SHARE * tb_per_s * 1e12,
        node_link_bytes_per_s=LINK_SHARE * link_gb_per_s * 1e9,
        network_link_bytes_per_s=LINK_SHARE * 50e9,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _from_data_sheet("a100", tflops=312, gigabytes=80, tb_per_s=2.0, link_gb_per_s=300),
        _from_data_sheet("h100", tflops=989, gigabytes=80, tb_per_s=3.35, link_gb_per_s=450),
        _from_data_sheet("h200", tflops=989, gigabytes=141, tb_per_s=4.8, link_gb_per_s=450),
        _from_data_sheet("b200", tflops=2250, gigabytes=180, tb_per_s=8.0, link_gb_per_s=900),
        # One core of the machine that the tests run on, in float32; rates as measured there.
        Gpu("cpu-core", 92e9, 67e9, 8e9, 10e9, 1e9, 1e9),
    )
}


@dataclass(frozen=True)
class Cluster:
    """`num_gpus` of one kind, in nodes of `gpus_per_node`.

    Raises:
        ValueError: the nodes would not be full.
    """

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int

    def __post_init__(self) -> None:
        if self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            raise ValueError(f"{self.num_gpus} GPUs do not fill nodes of {self.gpus_per_node}")

    def link(self, num_neighbors: int) -> tuple[float, float]:
        """Bytes/s and latency in seconds of a group that spans so many consecutive GPUs."""
        if num_neighbors <= self.gpus_per_node:
            return self.gpu.node_link_bytes_per_s, NODE_LATENCY_SECONDS
        return self.gpu.network_link_bytes_per_s, NETWORK_LATENCY_SECONDS

    def all_to_all(self, num_bytes: float, num_ranks: int) -> tuple[float, float]:
        """Seconds, and latency in seconds, in which each of so many consecutive GPUs sends `num_bytes` to
        the others, as much to each: those of its node and those of others at the same time.
        """
        in_node = min(num_ranks, self.gpus_per_node)
        to_nodes = num_bytes * (num_ranks - in_node) / max(1, num_ranks - 1)
        seconds = (num_bytes - to_nodes) / self.gpu.node_link_bytes_per_s
        return max(seconds, to_nodes / self.gpu.network_link_bytes_per_s), self.link(num_ranks)[1]
