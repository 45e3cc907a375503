"""What test_compiled_layers.py runs on ranks."""

import weakref
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from ranks import load, random_star_model
from torch import Tensor
from torch._inductor import config
from torch.fx import GraphModule

from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.algorithm.star_model import StarModel
from megatron_star.algorithm.token_generation import Sequence, generate_step
from megatron_star.config import StarConfig
from megatron_star.planning.cost_model import choose_plan, token_costs
from megatron_star.speed import mailbox
from megatron_star.speed.compiled_layers import compile_layers, inductor

STAR = StarConfig(block_size=9)


def recorded(piece: GraphModule, inputs: list[Tensor]) -> GraphModule:
    """A piece as it was recorded, run operation by operation."""
    return piece


COMPILERS = {"recorded": recorded, "inductor": inductor}


def logits_of_steps(
    model: str | dict[str, Any],
    parts: SequenceOf[frozenset[str]],
    row_counts: SequenceOf[int],
    compiler: str,
    contexts: SequenceOf[SequenceOf[int]],
    steps: SequenceOf[SequenceOf[SequenceOf[int]]],
    largest_message: int,
    tp_size: int = 1,
    ep_size: int = 1,
) -> list[tuple[list[Tensor], list[Tensor], bool]]:
    """For each set of sliced parts: logits of each step as it is, and with compiled layers.

    Args:
        model: a checkpoint, or Megatron's arguments of a model with random weights.
        contexts: of the sequences, which are fed together; equal ones share one encoding.
        steps: of each step, the new tokens of each sequence.
        largest_message: bytes that go through shared memory.

    Returns:
        Logits [sequences, vocabulary] of all steps, twice; and whether as many messages were sent both times.
    """
    build = random_star_model if isinstance(model, dict) else load
    star_model = build(model, tp_size, ep_size=ep_size)[0]
    results = []
    for sliced in parts:
        plain = replace(star_model, sliced_parts=sliced)
        with patch.object(mailbox, "LARGEST_BYTES", largest_message):
            compiled = compile_layers(plain, row_counts, COMPILERS[compiler])
            expected, sent = _run(plain, contexts, steps)
            found, sent_compiled = _run(compiled, contexts, steps)
        results.append((expected, found, sent == sent_compiled))
    return results


def _run(
    star_model: StarModel,
    contexts: SequenceOf[SequenceOf[int]],
    steps: SequenceOf[SequenceOf[SequenceOf[int]]],
) -> tuple[list[Tensor], dict[str, int]]:
    exchange, encoded = star_model.exchange, {}
    for tokens in map(tuple, contexts):
        if tokens not in encoded:
            costs = token_costs(star_model.model.config)
            _, plan = choose_plan(len(tokens), exchange.cp_size, STAR, costs)
            encoded[tokens] = encode_context(star_model, tokens, plan)
    sequences = [
        Sequence(encoded[tuple(tokens)], tail_rank=i % exchange.cp_size) for i, tokens in enumerate(contexts)
    ]
    exchange.counts.clear()
    logits = [generate_step(star_model, list(zip(sequences, tokens, strict=True))) for tokens in steps]
    return logits, {kind: count for kind, count in exchange.counts.items() if not kind.endswith("bytes")}


def layers_of_two_kinds(model: dict[str, Any], token_ids: SequenceOf[int]) -> tuple[int, bool]:
    """Pieces that were compiled where one layer's norms have another epsilon, and whether it is kept."""
    star_model, pieces = random_star_model(model, 1)[0], []
    star_model.model.decoder.layers[1].input_layernorm.eps = 0.5

    def compiler(piece: GraphModule, inputs: list[Tensor]) -> GraphModule:
        pieces.append(piece)
        return piece

    compiled = compile_layers(star_model, [1], compiler)
    steps = [[[token]] for token in token_ids[:2]]
    expected, found = (_run(m, [token_ids], steps)[0] for m in (star_model, compiled))
    return len(pieces), all(map(_same, expected, found))


def rows_of_experts(model: dict[str, Any], token_ids: SequenceOf[int], num_rows: int) -> list[int]:
    """That each layer's experts are given where one token is filled up to so many rows."""
    star_model, given = random_star_model(model, 1)[0], []
    compiled = compile_layers(star_model, [num_rows], recorded)
    _, plan = choose_plan(len(token_ids), 1, STAR, token_costs(star_model.model.config))
    context = encode_context(star_model, token_ids, plan)
    for layer in star_model.model.decoder.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: given.append(len(inputs[0])))
    generate_step(compiled, [(Sequence(context, tail_rank=0), [1])])
    return given


def kept_after_generation(model: dict[str, Any], token_ids: SequenceOf[int], compiled: bool) -> bool:
    """Whether a context's KV is still held once nobody has the context any more."""
    star_model = random_star_model(model, 1)[0]
    if compiled:
        star_model = compile_layers(star_model, [1], recorded)
    _, plan = choose_plan(len(token_ids), 1, STAR, token_costs(star_model.model.config))
    context = encode_context(star_model, token_ids, plan)
    generate_step(star_model, [(Sequence(context, tail_rank=0), [1])])
    held = weakref.ref(context)
    del context
    return held() is not None


def _same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() < 1e-5)


def refusal(model: dict[str, Any], tp_size: int, row_counts: SequenceOf[int]) -> str:
    """What compiling it is refused with."""
    with pytest.raises(ValueError) as refused:
        compile_layers(random_star_model(model, tp_size)[0], row_counts)
    return str(refused.value)


def refusal_of_the_last_layer(model: dict[str, Any]) -> str:
    """What compiling is refused with where the last layer is of another class than the first."""
    star_model = random_star_model(model, 1)[0]
    layer = star_model.model.decoder.layers[-1]
    layer.__class__ = type("OtherLayer", (type(layer),), {})
    with pytest.raises(ValueError) as refused:
        compile_layers(star_model, [1])
    return str(refused.value)


def refusal_without_a_compiler(model: dict[str, Any]) -> str:
    """As where no C++ compiler is installed."""
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.raises(ValueError) as refused:
        compile_layers(random_star_model(model, 1)[0], [1])
    return str(refused.value)
