"""A Megatron model together with what its attention needs; one forward pass over packed tokens."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from megatron_star.algorithm.step_inputs import StepInputs, TailLayers
from megatron_star.algorithm.token_scores import MOST_SCORED_LOGITS, ScoredRows, num_columns, score_rows
from megatron_star.attention.partial import AttentionKernel
from megatron_star.attention.stored_kv import AS_COMPUTED, KvFormat
from megatron_star.model.attention import ForwardPass, PassIsComplete, StarCoreAttention
from megatron_star.model.expert_layer import ExpertRows, moe_layers, share_rows
from megatron_star.model.kernel import kernel_of, kv_format_of
from megatron_star.model.logits import soft_capped
from megatron_star.model.rotary import rotate_at_positions
from megatron_star.model.supported import check_model
from megatron_star.model.transformer_config import own_field
from megatron_star.parallel.exchange import Exchange
from megatron_star.parallel.groups import StarGroups

Integers = Tensor | Sequence[int]
"""On the device already, or on the host."""


@dataclass(frozen=True)
class StarModel:
    """What context encoding and token generation run on; made by `attach`.

    Attributes:
        vocab_size: tokens that exist; the model's vocabulary may be padded beyond it.
        experts: what the model's expert layers share, if it has any.
        kv_format: of the contexts that it encodes.
        tail_layers: where a step's inputs go to the device in one copy, and attention to tails may go over
            their addresses: on CUDA.
    """

    model: GPTModel
    exchange: Exchange
    kernel: AttentionKernel
    vocab_size: int
    device: torch.device
    experts: ExpertRows
    kv_format: KvFormat = AS_COMPUTED
    tail_layers: TailLayers | None = None

    @property
    def is_first_of_tp(self) -> bool:
        """Of the ranks that share its layers."""
        return self.model.pg_collection.tp.rank() == 0

    def step_size(self, num_rows: int, num_logit_rows: int) -> tuple[int, int]:
        """Rows and logit rows that a step of so many is filled up to."""
        return num_rows, num_logit_rows

    def run_step(self, inputs: StepInputs, run: Callable[[StepInputs], Tensor]) -> Tensor:
        """Logits [logit rows, vocab_size] of a step, its fillers included.

        run: the forward pass with these inputs, whose sequences have room for its tokens. Run twice, it does
            the same twice.
        """
        return run(inputs)

    @torch.inference_mode()
    def forward(self, token_ids: Integers, forward_pass: ForwardPass, logit_rows: Integers = ()) -> Tensor:
        """Run packed tokens through the model.

        Args:
            token_ids: one per position of `forward_pass`; none at all is fine.
            logit_rows: the rows whose logits are wanted; without any, the output layer is skipped.

        Returns:
            Logits [len(logit_rows), vocab_size], float32; none if the pass was complete before them.
        """
        with suppress(PassIsComplete):
            logits = self._run(token_ids, forward_pass, self._logits_of_rows, self.on_device(logit_rows))
            return logits[:, : self.vocab_size].float()
        assert len(logit_rows) == 0
        return torch.empty(0, self.vocab_size, device=self.device)

    @torch.inference_mode()
    def score(self, token_ids: Integers, forward_pass: ForwardPass, scored: ScoredRows) -> Tensor:
        """Run packed tokens through the model, as `forward` does; scores (`token_scores`) of some rows.

        Logits are made of a few rows at a time, so that they take little memory, however many there are.
        """
        return self._run(token_ids, forward_pass, self._scores_of_rows, scored)

    def _run(
        self,
        token_ids: Integers,
        forward_pass: ForwardPass,
        output_processor: Callable[..., Tensor],
        context: Tensor | ScoredRows,
    ) -> Tensor:
        """What an output hook of GPTModel's, with this context, makes of the last hidden states."""
        self.experts.begin(forward_pass)
        with InferenceMode.active():
            return self.model(
                input_ids=self.on_device(token_ids)[None],
                position_ids=forward_pass.position_ids[None],
                attention_mask=None,
                inference_context=forward_pass,
                runtime_gather_output=True,
                output_processor=output_processor,
                output_processor_context=context,
            )

    def on_device(self, integers: Integers) -> Tensor:
        """As they are, if they are there already."""
        if not isinstance(integers, Tensor):
            integers = list(integers)
        return torch.as_tensor(integers, dtype=torch.int64, device=self.device)

    def _logits_of_rows(
        self,
        hidden_states: Tensor,
        output_layer: ColumnParallelLinear,
        output_weight: Tensor | None,
        context: Tensor,
        scale_logits: Callable[[Tensor], Tensor],
        **_: object,
    ) -> Tensor:
        """GPTModel's output hook: [sq, 1, h] to [rows, padded vocabulary]; `context` has the rows, on the
        device."""
        if len(context) == 0:
            return hidden_states.new_empty(0, 0)
        logits = self.output_logits(hidden_states[context], output_layer, output_weight).squeeze(1)
        return soft_capped(scale_logits(logits), self.model.config)

    def _scores_of_rows(
        self, hidden_states: Tensor, *output: Any, context: ScoredRows, **options: Any
    ) -> Tensor:
        """The same, to scores [rows, columns]."""
        at_once = max(1, MOST_SCORED_LOGITS[self.device.type] // self.vocab_size)
        scores = [hidden_states.new_empty(0, num_columns(context.num_top), dtype=torch.float64)]
        for rows, tokens in zip(context.rows.split(at_once), context.tokens.split(at_once), strict=True):
            if len(rows):
                logits = self._logits_of_rows(hidden_states, *output, context=rows, **options)
                scores.append(score_rows(logits[:, : self.vocab_size].float(), tokens, context.num_top))
        return torch.cat(scores)

    def output_logits(
        self, hidden_states: Tensor, output_layer: ColumnParallelLinear, output_weight: Tensor | None
    ) -> Tensor:
        """Logits [rows, 1, vocabulary of all TP ranks] of [rows, 1, h]; the weight is None where not tied."""
        return output_layer(hidden_states, weight=output_weight, runtime_gather_output=True)[0]

    def expert_load(self) -> Tensor:
        """[layers with experts, experts], int64, on the device: rows that chose an expert, so far.

        This rank's share: the sum over all ranks counts each row of each forward pass once.
        """
        loads = [layer.load for layer in moe_layers(self.model)]
        return torch.stack(loads) if loads else torch.empty(0, 0, dtype=torch.int64, device=self.device)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def attach(
    model: GPTModel,
    groups: StarGroups,
    *,
    kernel: str = "auto",
    vocab_size: int | None = None,
    kv_dtype: str = "auto",
) -> StarModel:
    """Let a Megatron model run Star Attention on these groups, whoever has built it.

    Its layer specification went through `with_star_attention`. The model is put into evaluation, and its
    rotary embedding is replaced by one at given positions: afterwards it runs only here.

    Args:
        kernel: the attention kernel's name (`attention/kernels.py`).
        vocab_size: tokens that exist; all of the model's vocabulary unless given.
        kv_dtype: what contexts are kept in, of `KV_DTYPES`.

    Raises:
        ValueError: the model cannot be run (`check_model`), or the kernel cannot run its attention, or
            its KV cannot be kept so.
    """
    check_model(model)
    weight = model.embedding.word_embeddings.weight
    attention_kernel = kernel_of(model, kernel, device=weight.device, dtype=weight.dtype)
    kv_format = kv_format_of(model, kv_dtype, weight.device)
    rotate_at_positions(model)
    model.eval()
    exchange = Exchange(groups.cp)
    return StarModel(
        model=model,
        exchange=exchange,
        kernel=attention_kernel,
        vocab_size=vocab_size or model.vocab_size,
        device=weight.device,
        experts=share_rows(moe_layers(model), ExpertRows(groups, exchange)),
        kv_format=kv_format,
        tail_layers=tail_layers_of(model) if weight.device.type == "cuda" else None,
    )


def tail_layers_of(model: GPTModel) -> TailLayers:
    """Of a model's layers; needs Triton."""
    attentions = (module for module in model.modules() if isinstance(module, StarCoreAttention))
    softcap = own_field(model.config, "attention_softcap")
    return TailLayers.of([attention.layer for attention in attentions], softcap)
