"""Rotary position embedding of a pack, by the position of each token.

Megatron's own version for packs asks the GPU for the lengths of the sequences, twice a layer, and waits for the answer. Here each pack
carries its positions (an attribute of its `cu_seqlens`, see packs.py), so that nothing is asked; and one kernel does it.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch

from rlmono.trainer.fused import has_triton

POSITIONS = "rope_positions"
"""Attribute of a pack's `cu_seqlens`: [t] position of each token within its sequence, of the tokens that this rank has."""
_TABLES = "rope_tables"


def by_positions(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Stands for Megatron's apply_rotary_pos_emb; `original` for what it is not made for: latent attention's halves, other kernels, no pack."""
    def apply(t: torch.Tensor, freqs: torch.Tensor, config: Any, cu_seqlens: Optional[torch.Tensor] = None, mscale: float = 1.0,
              cp_group: Any = None) -> torch.Tensor:
        positions = getattr(cu_seqlens, POSITIONS, None)
        if positions is None or config.apply_rope_fusion or config.multi_latent_attention or config.rotary_interleaved:
            return original(t, freqs, config=config, cu_seqlens=cu_seqlens, mscale=mscale, cp_group=cp_group)
        return rotate(t, *_tables(freqs, mscale), positions)
    return apply


def rotate(t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[t, heads, d] with its first 2·k dimensions turned (Su et al. 2021, halves as in GPT-NeoX); cos, sin: fp32 [longest, k]; positions: [t]."""
    return _Rotate.apply(t, cos, sin, positions)    # type: ignore[no-any-return]


def _tables(freqs: torch.Tensor, mscale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 [longest, k], of Megatron's [longest, 1, 1, 2·k] angles, whose halves are equal; kept with the angles."""
    kept: dict[float, tuple[torch.Tensor, torch.Tensor]] = freqs.__dict__.setdefault(_TABLES, {})
    if mscale not in kept:
        angles = freqs[:, 0, 0, :freqs.shape[-1] // 2].float()
        kept[mscale] = (angles.cos() * mscale, angles.sin() * mscale)
    return kept[mscale]


class _Rotate(torch.autograd.Function):
    """Backward turns the other way: nothing of `t` is kept."""

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin, positions)
        return _turn(t, cos, sin, positions, False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        cos, sin, positions = ctx.saved_tensors
        return _turn(grads[0], cos, sin, positions, True), None, None, None


def _turn(t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, back: bool) -> torch.Tensor:
    if t.is_cuda and has_triton():
        from rlmono.trainer.rope_kernel import turn
        return turn(t, cos, sin, positions, back)
    return plain_turn(t, cos, sin, positions, back)


def plain_turn(t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, back: bool) -> torch.Tensor:
    """What `rope_kernel.turn` computes, in torch's own words."""
    c, s = cos[positions][:, None], (-sin if back else sin)[positions][:, None]
    k = cos.shape[1]
    a, b = t[..., :k].float(), t[..., k:2 * k].float()
    return torch.cat(((a * c - b * s).to(t.dtype), (b * c + a * s).to(t.dtype), t[..., 2 * k:]), -1)
