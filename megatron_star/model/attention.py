"""Megatron's self-attention with Star Attention as its core.

Shapes: sq tokens of this forward pass, b = 1 (tokens of all sequences are packed), np query heads and ng KV
heads of this TP rank, hn head size.
"""

from abc import abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_pg_size
from torch import Tensor

from megatron_star.attention.latent_kernel import AbsorbedAttention, CheaperFormAttention, Latent
from megatron_star.attention.merge import with_sinks
from megatron_star.attention.partial import AttentionKernel, Partial
from megatron_star.attention.running import RunningAttention
from megatron_star.model.query_scale import QueryScale
from megatron_star.model.rotary import LongRows, angles_of_values, cosines_and_sines, rotate
from megatron_star.model.transformer_config import own_field
from megatron_star.planning.layer_mask import LayerMask, layer_masks

T = TypeVar("T")


class LayerAttention(NamedTuple):
    """What a layer's attention is, besides the weights.

    Attributes:
        number: of the layer, 1-based.
        softmax_scale: factor on the scores before the softmax.
        mask: of its own; None where the plan's mask is its mask.
        latent: what it makes of stored latents; None where keys and values are stored.
    """

    number: int
    softmax_scale: float
    mask: LayerMask | None = None
    latent: Latent | None = None

    def of_many_rows(self, kernel: AttentionKernel, query: Tensor) -> RunningAttention:
        """How the rows of context encoding, [sq, 1, np, hn], attend to what is stored."""
        if self.latent is None:
            return RunningAttention(kernel, self.softmax_scale, query)
        return CheaperFormAttention(kernel, self.softmax_scale, query, self.latent)

    def of_few_rows(self, kernel: AttentionKernel, query: Tensor) -> RunningAttention:
        """How the rows of token generation do."""
        if self.latent is None:
            return RunningAttention(kernel, self.softmax_scale, query)
        return AbsorbedAttention(kernel, self.softmax_scale, query, self.latent)


class ByPosition(NamedTuple):
    """What a layer does to queries and keys by their positions; None where it does not.

    Attributes:
        cos, sin: [sq, 1, 1, r], what `rotate` takes.
        query_scale: [sq, 1, 1, 1], factor on the queries.
    """

    cos: Tensor | None
    sin: Tensor | None
    query_scale: Tensor | None


class PassIsComplete(Exception):
    """Raised by `attend` when nothing that the model would still compute in this forward pass is wanted."""


class ForwardPass(BaseInferenceContext):
    """What one forward pass needs to know: the positions of its tokens, and what each of them attends to."""

    is_replicated = False
    """Whether all CP ranks run the same tokens."""

    may_be_compiled = True
    """Whether layers that are compiled for so many tokens may run as programs, which never call `attend`."""

    is_filler = False
    """Whether the only row stands for no token, on a rank that has none and takes part."""

    max_sequence_length = 0  # Megatron sizes rotary tables by it; RotaryAtPositions needs none.

    def __init__(self, position_ids: Tensor, long_rows: LongRows = (False,)) -> None:
        """
        Args:
            position_ids: [sq], int64, position of each packed token in its sequence.
            long_rows: for each token, or for all, whether longrope's long factors count (`longrope.py`).
        """
        super().__init__(InferenceConfig(materialize_only_last_token_logits=True))
        self.position_ids = position_ids
        self.long_rows = long_rows
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns: made for the first of the layers that have this key, the same for all."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def is_static_batching(self) -> bool:
        """True: Megatron then hands query, key and value to the core attention."""
        return True

    def is_decode_only(self) -> bool:
        """False: Megatron's own decode path (flash decode, CUDA graphs) is not used."""
        return False

    @abstractmethod
    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """Keep the KV of these tokens and attend.

        Args:
            query: [sq, 1, np, hn], rotated.
            key, value: [sq, 1, ng, hn]; the key is rotated. As they are stored: of latent attention, see
                `latent_kernel.py`.

        Returns:
            Over all that these tokens see, on whatever rank it is; in float32 if it is more than one part.

        Raises:
            PassIsComplete: on all TP ranks alike, where the rest of the model need not run.
        """


class StarCoreAttention(torch.nn.Module):
    """Hands one layer's query, key and value to the forward pass that `StarSelfAttention` has announced.

    Attributes:
        softmax_offset: the scores of the sinks, [np], or None; Megatron's name of the parameter.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        mask = layer_masks(config)[layer_number - 1]
        self.layer = LayerAttention(layer_number, softmax_scale or config.kv_channels**-0.5, mask)
        self.forward_pass: ForwardPass | None = None
        self.tp_group = pg_collection.tp if pg_collection else None
        self._add_sinks(config)

    def _add_sinks(self, config: TransformerConfig) -> None:
        """Of the heads of this TP rank: learned, or all zero (`off-by-one`)."""
        if config.softmax_type == "vanilla":
            self.softmax_offset = None
            return
        num_heads = config.num_attention_heads // get_pg_size(self.tp_group)
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        sinks = torch.zeros(num_heads, dtype=config.params_dtype, device=device)
        if config.softmax_type == "learnable":
            self.softmax_offset = torch.nn.Parameter(sinks)
        else:
            self.register_buffer("softmax_offset", sinks, persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        """[sq, 1, np, hn] and twice [sq, 1, ng, hn] to [sq, 1, np * hn]."""
        forward_pass, self.forward_pass = self.forward_pass, None  # it holds KV
        assert forward_pass is not None, "Star Attention runs only with a ForwardPass"
        part = forward_pass.attend(self.layer, query, key, value)
        if self.softmax_offset is not None:
            part = part._replace(out=with_sinks(*part, self.softmax_offset))
        return part.out.permute(2, 0, 1, 3).to(query.dtype).flatten(2)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """As Megatron's core attention: learned sinks are cut over TP, by heads."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class StarSelfAttention(SelfAttention):
    """Megatron's SelfAttention, whose KV belongs to the forward pass instead of to a buffer of Megatron's.

    Attributes:
        rotary_index: of this layer's angles among the two of `RotaryAtPositions`; None if it has none.
        query_scale: how queries are scaled by position; None if they are not.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        layer = self.layer_number - 1
        has_mask = self.core_attention.layer.mask is not None
        self.rotary_index: int | None = int(has_mask and own_field(config, "window_rotary_base") is not None)
        if self.rotary_index:
            self._yarn_concentration_factor = 1.0  # of the scaling that the other layers have
        else:
            self._yarn_concentration_factor *= own_field(config, "longrope_attention_factor")
        if config.no_rope_freq and config.no_rope_freq[layer]:
            self.rotary_index = None
            if own_field(config, "qk_norm_of_rotated_only"):
                self.q_layernorm = self.k_layernorm = None
        self.query_scale = QueryScale.of_layer(config, layer)
        self._position_kind = self.rotary_index, self.query_scale
        self._has_norms_after_rotation = own_field(config, "qk_layernorm_after_rotation")
        self._megatron_rotates = config.apply_rope_fusion and not self._has_norms_after_rotation

    def _adjust_key_value_for_inference(
        self,
        inference_context: ForwardPass,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: tuple[Tensor, Tensor] | None,
        *_: object,
        **__: object,
    ) -> tuple[Tensor, Tensor, Tensor, object, AttnMaskType, None]:
        """Query and key rotated, or with the angles by which Megatron rotates them; the value as it came."""
        self.core_attention.forward_pass = inference_context
        cos, sin, scale = self.by_position(inference_context, rotary_pos_emb, query.dtype)
        if cos is not None:
            rotary_pos_emb = None
            query, key = self.rotated(query, key, cos, sin)
        elif rotary_pos_emb is not None:
            rotary_pos_emb = self._angles_for_megatron(inference_context, rotary_pos_emb)
        if self._has_norms_after_rotation:
            query, key = self.q_layernorm.after_rotation(query), self.k_layernorm.after_rotation(key)
        if scale is not None:
            query = query * scale
        return query, key, value, rotary_pos_emb, self.attn_mask_type, None

    rotate = staticmethod(rotate)

    def rotated(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """[sq, 1, heads, hn] each, with cosines and sines as `ByPosition` has them; neither is kept."""
        interleaved = self.config.rotary_interleaved
        return tuple(self.rotate(each, cos, sin, interleaved=interleaved) for each in (query, key))

    def by_position(
        self, forward_pass: ForwardPass, angles: tuple[Tensor, Tensor] | None, dtype: torch.dtype
    ) -> ByPosition:
        """Made once in a forward pass for all layers that do the same; angles as of `RotaryAtPositions`."""
        return forward_pass.once(
            self._position_kind, lambda: self.make_by_position(forward_pass.position_ids, angles, dtype)
        )

    def make_by_position(
        self, position_ids: Tensor, angles: tuple[Tensor, Tensor] | None, dtype: torch.dtype
    ) -> ByPosition:
        """Of these positions [sq]."""
        rotation, scale = (None, None), None
        if angles is not None and self.rotary_index is not None and not self._megatron_rotates:
            own = angles[self.rotary_index]
            rotation = cosines_and_sines(own, self._yarn_concentration_factor, dtype)
        if self.query_scale is not None:
            scale = self.query_scale(position_ids).to(dtype)
        return ByPosition(*rotation, scale)

    def _angles_for_megatron(
        self, forward_pass: ForwardPass, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """For its fused kernel, which has an angle for each value."""
        own, interleaved = angles[self.rotary_index], self.config.rotary_interleaved
        of_values = forward_pass.once(
            ("fused", self.rotary_index), lambda: angles_of_values(own, interleaved)
        )
        return of_values, of_values
