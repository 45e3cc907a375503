"""What test_latent_attention.py runs on ranks: models with latent attention, and slow twins of theirs."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from passed_keys_ranks import Answer, Case, answer
from ranks import TIMEOUT
from torch import Tensor

from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.algorithm.star_model import StarModel, attach
from megatron_star.algorithm.token_generation import Sequence as TokenSequence
from megatron_star.algorithm.token_generation import generate_step
from megatron_star.attention import latent_kernel
from megatron_star.attention.partial import AttentionKernel
from megatron_star.attention.running import RunningAttention
from megatron_star.config import StarConfig
from megatron_star.model.attention import LayerAttention
from megatron_star.model.build import build_gpt_model
from megatron_star.model.cpu import use_cpu_where_cuda_is_absent
from megatron_star.parallel.groups import StarGroups, initialize_groups
from megatron_star.planning.plan import ContextPlan

Weights = dict[str, Tensor]


def latent_model(args: dict[str, Any], weights: Weights, tp_size: int) -> tuple[StarModel, StarGroups]:
    """The model of Megatron's arguments and whole weights; all ranks that TP does not take form CP groups."""
    device = use_cpu_where_cuda_is_absent()
    groups = initialize_groups(tp_size=tp_size, cp_size=dist.get_world_size() // tp_size, timeout=TIMEOUT)
    model = build_gpt_model(args, groups.model, dtype=torch.float32, device=device)
    _load(model, weights, tp_size, groups.model.tp.rank())
    return attach(model, groups), groups


def _load(model: GPTModel, weights: Weights, tp_size: int, tp_rank: int) -> None:
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys(), parameters.keys() ^ weights.keys()
    for name, parameter in parameters.items():
        whole = weights[name]
        if whole.shape != parameter.shape:
            # Gate and up are cut each by itself.
            parts = whole.chunk(2) if name.endswith("fc1.weight") else [whole]
            dimension = next(i for i in range(2) if whole.size(i) != parameter.size(i))
            whole = torch.cat([part.chunk(tp_size, dimension)[tp_rank] for part in parts])
        parameter.data.copy_(whole)


def latent_answers(
    args: dict[str, Any], weights: Weights, tp_size: int, token_ids: list[int], cases: Sequence[Case]
) -> list[Answer]:
    """Of each case, whose context, query and later tokens are the first of these."""
    star_model, groups = latent_model(args, weights, tp_size)
    return [answer(star_model, groups.model.tp.rank(), token_ids, case) for case in cases]


class ExpandedGeneration(RunningAttention):
    """The slow twin of absorbed token generation: all that a row sees is expanded to keys and values."""

    def __init__(self, layer: LayerAttention, kernel: AttentionKernel, query: Tensor) -> None:
        super().__init__(kernel, layer.softmax_scale, query, layer.latent.shape.v_head_dim)
        self.latent = layer.latent

    def add(
        self, rows: Iterable[tuple[int, int]], key: Tensor, value: Tensor, *, causal: bool = False
    ) -> None:
        super().add(rows, *self.latent.expanded(key), causal=causal)


def logits_of_forms(
    args: dict[str, Any], weights: Weights, token_ids: list[int], case: Case
) -> dict[str, tuple[Tensor, set[str]]]:
    """Logits of a case, with the forms that its encoding took.

    Sources are attended to each in the cheaper form, all in one form, or expanded in pieces of 3 tokens; or
    token generation expands.
    """
    star_model, _ = latent_model(args, weights, 1)
    expanded_bytes = 3 * _bytes_of_expanded_token(star_model)
    patches = {
        "cheaper": nullcontext(),
        "absorbed": patch.object(latent_kernel, "latent_form", lambda *_: "absorbed"),
        "expanded": patch.object(latent_kernel, "latent_form", lambda *_: "expanded"),
        "in pieces": patch.object(latent_kernel, "EXPANDED_BYTES", expanded_bytes),
        "generation expands": patch.object(
            LayerAttention, "of_few_rows", lambda *given: ExpandedGeneration(*given)
        ),
    }
    found = {}
    for name, patched in patches.items():
        with patched, _noted_forms() as taken:
            found[name] = answer(star_model, 0, token_ids, case).logits, taken
    return found


@contextmanager
def _noted_forms() -> Iterator[set[str]]:
    """The forms that are chosen meanwhile."""
    choose, taken = latent_kernel.latent_form, set()

    def noted(*sizes: Any) -> str:
        form = choose(*sizes)
        taken.add(form)
        return form

    with patch.object(latent_kernel, "latent_form", noted):
        yield taken


def _bytes_of_expanded_token(star_model: StarModel) -> int:
    config = star_model.model.config
    head = config.qk_head_dim + config.qk_pos_emb_head_dim + config.v_head_dim
    return 4 * config.num_attention_heads * head


def expansions(args: dict[str, Any], weights: Weights, token_ids: list[int], star: StarConfig) -> list[int]:
    """How many tokens each call expanded in encoding a context on one rank, layer after layer."""
    star_model, _ = latent_model(args, weights, 1)
    plan = ContextPlan.build(len(token_ids), 1, star)
    expand, seen = latent_kernel.Latent.expanded, []

    def spy(latent: latent_kernel.Latent, key: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(key.size(0))
        return expand(latent, key)

    with (
        patch.object(latent_kernel, "latent_form", lambda *_: "expanded"),
        patch.object(latent_kernel.Latent, "expanded", spy),
    ):
        encode_context(star_model, token_ids, plan)
    return seen


def memory(
    args: dict[str, Any], weights: Weights, tp_size: int, token_ids: list[int], star: StarConfig
) -> dict[str, Any]:
    """Bytes of an encoded context and of a tail of 3 tokens on this rank, and what was sent for them."""
    star_model, _ = latent_model(args, weights, tp_size)
    exchange = star_model.exchange
    plan = ContextPlan.build(len(token_ids) - 3, exchange.cp_size, star)
    context = encode_context(star_model, token_ids[:-3], plan)
    sent = dict(exchange.counts)
    sequence = TokenSequence(context, tail_rank=0)
    generate_step(star_model, [(sequence, token_ids[-3:])])
    return {
        "plan": plan,
        "config": star_model.model.config,
        "context": context.num_bytes,
        "tail": sequence.tail.num_bytes,
        "cp_rank": exchange.cp_rank,
        "sent": sent,
    }


def batch_and_alone(
    args: dict[str, Any], weights: Weights, tp_size: int, token_ids: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of three sequences on two contexts, fed together with 1, 4 and 2 tokens and then one by one; and
    of each alone."""
    star_model, _ = latent_model(args, weights, tp_size)
    plans = [
        ContextPlan.build(end, star_model.exchange.cp_size, StarConfig(block_size=9)) for end in (40, 23)
    ]
    contexts = [encode_context(star_model, token_ids[: plan.num_tokens], plan) for plan in plans]
    feeds = [(0, token_ids[-1:]), (1, token_ids[-4:]), (0, token_ids[-7:-5])]

    def sequences() -> list[TokenSequence]:
        last = star_model.exchange.cp_size - 1
        return [TokenSequence(contexts[i], tail_rank=min(place, last)) for place, (i, _) in enumerate(feeds)]

    def steps(fed: list[tuple[TokenSequence, Sequence[int]]]) -> Tensor:
        first = generate_step(star_model, fed)
        return torch.stack((first, generate_step(star_model, [(one, token_ids[:1]) for one, _ in fed])))

    fed = [(sequence, tokens) for sequence, (_, tokens) in zip(sequences(), feeds, strict=True)]
    together = steps(fed).unbind(1)
    alone = [
        steps([(sequence, tokens)])[:, 0] for sequence, (_, tokens) in zip(sequences(), feeds, strict=True)
    ]
    return list(together), alone
