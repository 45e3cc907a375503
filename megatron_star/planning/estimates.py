"""Which TP x CP of a cluster holds a model and a context, and how fast: the planner's arithmetic.

Estimates from the cost model (megatron_star/planning/cost_model.py); `megatron-star plan` prints them.
"""

from dataclasses import dataclass, replace

from megatron_star.config import StarConfig
from megatron_star.planning.cost_model import token_costs
from megatron_star.planning.deployment import Deployment
from megatron_star.planning.expert_layout import ExpertLayout
from megatron_star.planning.hardware import Cluster
from megatron_star.planning.model_size import ModelSize
from megatron_star.planning.plan import ContextPlan
from megatron_star.planning.planner import Planner
from megatron_star.planning.sizes import with_sizes

LARGEST_CLUSTER, LARGEST_CP = 1024, 128
SMALLEST_WAVE = 2 << 10
MOST_WAVES = 512
"""Of one rank that encodes the context alone: the time that planning takes grows with their square."""
MODES = ("exact", "recompute", "broadcast", "star")
"""`recompute` is Star Attention as published; `broadcast` sends the anchor instead. `star` has the sizes that
are asked for, or else the recommended ones, with passed keys."""


@dataclass(frozen=True)
class Workload:
    """What a cluster is planned for: a context of so many tokens and the tokens generated after it.

    Attributes:
        star: how it is encoded; sizes may be left open.
        kv_dtype: what the context is kept in, of `KV_DTYPES`.
        ep_size, expert_tp_size: how experts are spread over ranks; None for whatever is best.
    """

    size: ModelSize
    num_context_tokens: int
    num_generated_tokens: int
    star: StarConfig
    bytes_per_value: int = 2
    kv_dtype: str = "auto"
    ep_size: int | None = None
    expert_tp_size: int | None = None

    @property
    def settings(self) -> dict[str, StarConfig]:
        """What is compared, by the names of `MODES`, with all sizes."""
        published = replace(self.star, anchor_size=None, neighbor_blocks=0, passed_keys=0)
        settings = {
            "exact": replace(self.star, mode="exact"),
            "recompute": replace(published, anchor="recompute"),
            "broadcast": published,
            "star": self.star,
        }
        return {name: with_sizes(star, self.num_context_tokens) for name, star in settings.items()}


@dataclass(frozen=True)
class Estimate:
    """One TP x CP. Bytes are of the fullest GPU, with `star` where no mode is named.

    Attributes:
        all_to_all_bytes: that leave a GPU for the experts of others while the context is encoded, there and
            back.
        step_sum_bytes: that a GPU sends in a step for the sums of what experts return.
    """

    tp_size: int
    cp_size: int
    ep_size: int
    expert_tp_size: int
    weights_bytes: float
    kv_bytes: float
    activation_bytes: float
    bytes_by_mode: dict[str, float]
    ttft_s: dict[str, float]
    tpot_s: float
    all_to_all_bytes: float
    step_sum_bytes: float
    fits: dict[str, bool]


def tp_sizes(size: ModelSize, cluster: Cluster) -> list[int]:
    """Powers of two inside a node that divide GPUs and heads; KV heads divide, or are replicated.

    A CP size above `LARGEST_CP` is left out where a larger TP size avoids it.
    """
    possible = [1 << i for i in range(8) if 1 << i <= min(cluster.gpus_per_node, cluster.num_gpus)]
    found = [tp_size for tp_size in possible if cluster.num_gpus % tp_size == 0 and _divides(size, tp_size)]
    return [tp_size for tp_size in found if cluster.num_gpus // tp_size <= LARGEST_CP] or found[-1:]


def _divides(size: ModelSize, tp_size: int) -> bool:
    groups = size.num_query_groups
    return size.num_attention_heads % tp_size == 0 and (groups % tp_size == 0 or tp_size % groups == 0)


def layouts(workload: Workload, cluster: Cluster, tp_size: int) -> list[ExpertLayout]:
    """How experts may be spread over the ranks, at one TP size.

    All on each TP group, each cut over it; or over EP ranks, a divisor of all, whole unless it is asked that
    they be cut. The sizes that are asked for divide experts and ranks, or there is none.
    """
    size, num_gpus = workload.size, cluster.num_gpus
    if not size.num_moe_experts:
        return [ExpertLayout(tp_size, 1, tp_size)]
    possible = [workload.ep_size] if workload.ep_size else range(1, num_gpus + 1)
    found = [
        ExpertLayout(tp_size, ep_size, workload.expert_tp_size or (tp_size if ep_size == 1 else 1))
        for ep_size in possible
        if size.num_moe_experts % ep_size == 0
    ]
    cut = size.moe_ffn_hidden_size
    return [of for of in found if num_gpus % of.num_ranks == 0 and cut % of.expert_tp_size == 0]


def estimate(workload: Workload, cluster: Cluster, tp_size: int) -> Estimate | None:
    """Memory and times of one TP size, with the experts spread in the best way; None if they cannot be."""
    planner = Planner(token_costs(workload.size), cluster.num_gpus // tp_size)
    plans = {
        name: planner.plan(workload.num_context_tokens, star).plan for name, star in workload.settings.items()
    }
    found = [
        _estimate(
            workload,
            Deployment(workload.size, cluster, layout, workload.bytes_per_value, workload.kv_dtype),
            plans,
        )
        for layout in layouts(workload, cluster, tp_size)
    ]
    return min(found, key=lambda e: _order(workload, e), default=None)


def _estimate(workload: Workload, deployment: Deployment, plans: dict[str, ContextPlan]) -> Estimate:
    """plans: by mode."""
    tail_bytes = deployment.kv.of_tokens(workload.num_generated_tokens)
    kv_bytes = {name: deployment.kv_bytes(plan) + tail_bytes for name, plan in plans.items()}
    activations = {name: deployment.activation_bytes(plan) for name, plan in plans.items()}
    num_bytes = {name: deployment.weights_bytes + kv_bytes[name] + activations[name] for name in plans}
    steps = {name: deployment.step_seconds(plan) for name, plan in plans.items()}
    memory_bytes = deployment.cluster.gpu.memory_bytes
    return Estimate(
        tp_size=deployment.tp_size,
        cp_size=deployment.cp_size,
        ep_size=deployment.layout.ep_size,
        expert_tp_size=deployment.layout.expert_tp_size,
        weights_bytes=deployment.weights_bytes,
        kv_bytes=kv_bytes["star"],
        activation_bytes=activations["star"],
        bytes_by_mode=num_bytes,
        ttft_s={name: deployment.encoding_seconds(plan) + steps[name] for name, plan in plans.items()},
        tpot_s=steps["star"],
        all_to_all_bytes=deployment.all_to_all_bytes(plans["star"]),
        step_sum_bytes=deployment.collectives.step_sum_bytes(),
        fits={name: value <= memory_bytes for name, value in num_bytes.items()},
    )


def estimates(workload: Workload, cluster: Cluster) -> list[Estimate]:
    """Every TP size, those that fit first, the fastest for the whole answer before others."""
    found = (estimate(workload, cluster, tp_size) for tp_size in tp_sizes(workload.size, cluster))
    return sorted((of for of in found if of), key=lambda e: _order(workload, e))


def _order(workload: Workload, of: Estimate) -> tuple[bool, float]:
    """What fits comes first; of what does not, what needs least."""
    fits = of.fits["star"]
    return not fits, answer_seconds(workload, of) if fits else of.bytes_by_mode["star"]


def answer_seconds(workload: Workload, of: Estimate) -> float:
    """Until the last generated token, with Star Attention."""
    return of.ttft_s["star"] + workload.num_generated_tokens * of.tpot_s


def fitting(workload: Workload, cluster: Cluster) -> Estimate | None:
    """The best TP size that fits, or None."""
    best = next(iter(estimates(workload, cluster)), None)
    return best if best and best.fits["star"] else None


def half_is_faster(workload: Workload, cluster: Cluster, best: Estimate) -> bool:
    """Whether half of the GPUs answer sooner: more ranks than blocks share blocks, and must exchange KV."""
    if cluster.num_gpus % 2 or (cluster.num_gpus // 2) % min(cluster.gpus_per_node, cluster.num_gpus // 2):
        return False
    half = fitting(workload, replace(cluster, num_gpus=cluster.num_gpus // 2))
    return half is not None and answer_seconds(workload, half) < answer_seconds(workload, best)


def what_would_fit(workload: Workload, cluster: Cluster) -> str:
    """The nearest change that fits: smaller waves, more GPUs, a shorter context; in this order."""
    smaller = workload
    while smaller.star.wave_tokens > max(SMALLEST_WAVE, workload.num_context_tokens // MOST_WAVES):
        smaller = replace(smaller, star=replace(smaller.star, wave_tokens=smaller.star.wave_tokens // 2))
        if fitting(smaller, cluster):
            return f"--wave-tokens {smaller.star.wave_tokens} would"
    more = cluster
    while more.num_gpus < LARGEST_CLUSTER:
        nodes = -(-more.num_gpus // more.gpus_per_node)
        more = replace(
            more, num_gpus=min(more.num_gpus * 2, (nodes + 1) * more.gpus_per_node, LARGEST_CLUSTER)
        )
        if fitting(workload, more):
            return f"{more.num_gpus} x {cluster.gpu.name} would"
    return _shorter_context(workload, cluster)


def _shorter_context(workload: Workload, cluster: Cluster) -> str:
    while workload.num_context_tokens > 1024:
        workload = replace(workload, num_context_tokens=workload.num_context_tokens // 2)
        if fitting(workload, cluster):
            return f"a context of {workload.num_context_tokens:,} tokens would"
    return (
        f"nothing up to {LARGEST_CLUSTER} x {cluster.gpu.name} would, nor a context of "
        f"{workload.num_context_tokens:,} tokens: the model's weights and the answer's KV are too large"
    )


def refuse(workload: Workload, cluster: Cluster, found: list[Estimate]) -> None:
    """Raises ValueError that says what is missing, and what would fit."""
    experts = workload.size.num_moe_experts
    if not found and (workload.ep_size or workload.expert_tp_size) and experts:
        raise ValueError(
            f"experts cannot be spread so: expert-parallel size {workload.ep_size or 1} must divide "
            f"{experts} experts, expert-tensor-parallel size {workload.expert_tp_size or 1} the "
            f"{workload.size.moe_ffn_hidden_size} of each, and both together {cluster.num_gpus} GPUs"
        )
    if not found:
        raise ValueError(
            f"no tensor-parallel size divides {workload.size.num_attention_heads} heads, "
            f"{workload.size.num_query_groups} KV heads and {cluster.num_gpus} GPUs"
        )
    least = min(found, key=lambda e: e.bytes_by_mode["star"])
    needed = least.bytes_by_mode["star"] / 1e9
    raise ValueError(
        f"{workload.num_context_tokens:,} tokens do not fit {cluster.num_gpus} x {cluster.gpu.name}: at best "
        f"(TP {least.tp_size} x CP {least.cp_size}) a GPU needs {needed:.0f} GB and has "
        f"{cluster.gpu.memory_bytes / 1e9:.0f}; {what_would_fit(workload, cluster)}"
    )
