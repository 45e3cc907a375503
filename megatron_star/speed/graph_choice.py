"""Whether a model's steps can be captured in CUDA graphs, and whether they are."""

import torch.distributed as dist

from megatron_star.algorithm.star_model import StarModel
from megatron_star.config import CUDA_GRAPH
from megatron_star.model.expert_layer import StarMoELayer, moe_layers
from megatron_star.planning.model_shape import latent_attention


def takes_step_graphs(star_model: StarModel, cuda_graph: str) -> bool:
    """What a choice of `CUDA_GRAPH` means for a model; auto: on one rank alone, where they are possible.

    Raises:
        ValueError: the choice is unknown, or `on` where a step cannot be captured.
    """
    if cuda_graph not in CUDA_GRAPH:
        raise ValueError(f"cuda_graph is {cuda_graph!r}: it must be one of {', '.join(CUDA_GRAPH)}")
    obstacle = graph_obstacle(star_model)
    if cuda_graph == "on" and obstacle:
        raise ValueError(f"cuda_graph is 'on', but steps cannot be captured in CUDA graphs {obstacle}")
    if obstacle or cuda_graph == "off":
        return False
    return cuda_graph == "on" or all(group.size() == 1 for group in _groups(star_model))


def graph_obstacle(star_model: StarModel) -> str | None:
    """Why a model's steps cannot be captured, in words that go on with "steps cannot be captured"."""
    if star_model.device.type != "cuda":
        return f"on a {star_model.device.type.upper()}"
    if latent_attention(star_model.model.config):
        return "with latent attention"
    for group in _groups(star_model):
        if group.size() > 1 and dist.get_backend(group) != "nccl":
            return f"where ranks talk over {dist.get_backend(group)}, and not over NCCL"
    if not all(map(_waits_for_nothing, moe_layers(star_model.model))):
        return "with experts in this precision, or of these sizes, that the host calls one by one"
    return None


def _groups(star_model: StarModel) -> list[dist.ProcessGroup]:
    """Over which a step has exchanges."""
    tp_group = star_model.model.pg_collection.tp
    return [star_model.exchange.cp_group, tp_group, star_model.experts.exchange.cp_group]


def _waits_for_nothing(layer: StarMoELayer) -> bool:
    can_group = getattr(layer.experts, "can_group_products_of", None)
    return can_group is not None and can_group(layer.config.params_dtype)
