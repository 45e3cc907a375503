"""A plan for people: a table of deployments, the best first, and the command that starts it."""

from megatron_star.config import StarConfig
from megatron_star.planning.cost_model import kv_layers
from megatron_star.planning.estimates import MODES, Estimate, Workload, half_is_faster
from megatron_star.planning.hardware import Cluster
from megatron_star.planning.model_shape import latent_attention
from megatron_star.planning.model_size import ModelSize
from megatron_star.planning.sizes import sizes_of

SIZES = ("block_size", "anchor_size", "passed_keys")


def print_table(workload: Workload, cluster: Cluster, found: list[Estimate]) -> None:
    """For people; the best first."""
    print(
        f"{_model(workload.size)}, {workload.num_context_tokens:,} context tokens\n"
        f"{_kv(workload)}\n"
        f"star: {_sizes(workload.settings['star'])}\n"
        f"recompute and broadcast, as published: {_sizes(workload.settings['broadcast'])}\n"
        f"{cluster.num_gpus} x {cluster.gpu.name} in nodes of "
        f"{cluster.gpus_per_node}, of which each has {cluster.gpu.memory_bytes / 1e9:.0f} GB to use\n"
    )
    has_experts = bool(workload.size.num_moe_experts)
    experts = ("", "EP x ETP   ") if has_experts else ("", "")
    print(f"{'':9}   {experts[0]:{len(experts[1])}}{'GB on each GPU':^31}   {'TTFT in s':^39}   {'TPOT':>7}")
    columns = f"{'weights':>7} {'KV':>7} {'other':>7} {'all':>7}   " + " ".join(
        f"{mode:>9}" for mode in MODES
    )
    print(f"{'TP x CP':>9}   {experts[1]}{columns}   {'in ms':>7}")
    for of in found:
        print(_row(of, has_experts))
    if has_experts:
        print(_sent(found[0]))
    if half_is_faster(workload, cluster, found[0]):
        print(f"\nHalf as many GPUs would answer sooner: {found[0].cp_size} ranks share too few blocks.")
    print(f"\n{_command(workload, cluster, found[0])}\n\nEstimates; docs/slurm.md says what they assume.")


def _model(size: ModelSize) -> str:
    """Its parameters, and of a model of experts those that a token meets."""
    total = f"{size.num_parameters / 1e9:.2f} B parameters"
    if not size.num_moe_experts:
        return total
    active = f"{size.num_parameters_per_token / 1e9:.2f} B active"
    chosen = f"{size.moe_router_topk} of {size.num_moe_experts} experts"
    return f"{total}, {active} ({chosen} in {size.num_expert_layers} of {size.num_layers} layers)"


def _kv(workload: Workload) -> str:
    """Of the whole model, on one TP rank."""
    kv = kv_layers(
        workload.size, tp_size=1, bytes_per_value=workload.bytes_per_value, kv_dtype=workload.kv_dtype
    )
    kept = "" if workload.kv_dtype == "auto" else f" in {workload.kv_dtype}"
    per_token = f"{kv.context_bytes_per_token:,} bytes of KV per token{kept}"
    if not (latent := latent_attention(workload.size)):
        return per_token
    return (
        f"{per_token}: in each layer {latent.stored_values} values, a latent of {latent.kv_lora_rank} and "
        f"{latent.qk_pos_emb_head_dim} rotated ones, on every TP rank"
    )


def _sent(of: Estimate) -> str:
    """What experts make a GPU send, of the best deployment."""
    encoding = "nothing while the context is encoded"
    if of.all_to_all_bytes:
        encoding = f"{of.all_to_all_bytes / 1e9:.1f} GB while the context is encoded (all-to-all)"
    token = f"{of.step_sum_bytes / 1e6:.1f} MB for a token of an answer"
    return f"\nFor experts a GPU sends {encoding}, and {token}."


def _sizes(star: StarConfig) -> str:
    block_size, anchor_size, passed_keys = sizes_of(star).values()
    passed = f" and {passed_keys:,} passed keys" if passed_keys else ""
    return f"blocks of {block_size:,} with an anchor of {anchor_size:,}{passed}"


def _row(of: Estimate, has_experts: bool) -> str:
    sizes = (of.weights_bytes, of.kv_bytes, of.activation_bytes, of.bytes_by_mode["star"])
    memory = " ".join(f"{num_bytes / 1e9:>7.1f}" for num_bytes in sizes)
    times = " ".join(f"{of.ttft_s[mode]:>9.2f}" if of.fits[mode] else f"{'no room':>9}" for mode in MODES)
    experts = f"{of.ep_size:>3} x {of.expert_tp_size:<2}   " if has_experts else ""
    return f"{of.tp_size:>2} x {of.cp_size:<4}   {experts}{memory}   {times}   {of.tpot_s * 1e3:>7.1f}"


def _command(workload: Workload, cluster: Cluster, best: Estimate) -> str:
    tasks = min(cluster.gpus_per_node, cluster.num_gpus)
    nodes = cluster.num_gpus // tasks
    asked = {name.upper(): getattr(workload.star, name) for name in SIZES}
    sizes = "".join(f"{name}={size} " for name, size in asked.items() if size is not None)
    further = "" if workload.kv_dtype == "auto" else f" --kv-dtype {workload.kv_dtype}"
    experts = f"EP={best.ep_size} EXPERT_TP={best.expert_tp_size} " if workload.size.num_moe_experts else ""
    return (
        f"CHECKPOINT=DIR TP={best.tp_size} CP={best.cp_size} {experts}{sizes}sbatch "
        f"--nodes={nodes} \\\n    --ntasks-per-node={tasks} --gpus-per-node={tasks} "
        f"launch/serve.sbatch{further}"
    )
