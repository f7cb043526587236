"""Causal attention over packed sequences, without Transformer Engine.

A pack is [t, heads, dim] with cumulative lengths `cu_seqlens`; tokens attend within their own sequence only. On GPUs it
is torch's variable-length flash attention (bf16), on CPU and in fp32 one scaled-dot-product call a sequence.
"""

from __future__ import annotations

import inspect
from typing import Any, Optional

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

from rlmono.trainer.context import context_attention


class VarlenAttention(MegatronModule):
    """Megatron's `core_attention`, for packed (THD) input."""

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, softmax_scale: Optional[float] = None, **_: Any):
        super().__init__(config=config)
        assert config.attention_dropout == 0.0, "attention dropout is not implemented"
        self.scale = softmax_scale          # None: 1 / sqrt(head dim)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None, attn_mask_type: Any = None,
                attention_bias: Any = None, packed_seq_params: Any = None) -> torch.Tensor:
        """query [t, h, d], key and value [t, kv heads, d or d_v] -> [t, h * d_v]; t is this rank's share with context parallelism."""
        p = packed_seq_params
        assert p is not None, "every batch is packed"
        group = parallel_state.get_context_parallel_group()
        if group.size() > 1:
            return context_attention(query, key, value, p.cu_seqlens_q, group, self.scale, varlen_attention).flatten(1)
        return varlen_attention(query, key, value, p.cu_seqlens_q, p.cu_seqlens_q, p.max_seqlen_q, p.max_seqlen_q, self.scale).flatten(1)


def varlen_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int,
                     scale: Optional[float]) -> torch.Tensor:
    """Causal attention a sequence, aligned at the end where there are more keys than queries; `cu_…` [n + 1] int32 begin with 0 and end with t."""
    flash = q.is_cuda and q.dtype != torch.float32      # whose kernels know halves alone
    return (_flash if flash else _by_sequence)(q, k, v, cu_q, cu_k, max_q, max_k, scale)


def _by_sequence(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, _max_q: int, _max_k: int,
                 scale: Optional[float]) -> torch.Tensor:
    out, starts_q, starts_k = [], cu_q.tolist(), cu_k.tolist()
    for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        qs, ks, vs = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        mask = None if b - a == d - c else torch.ones(b - a, d - c, dtype=torch.bool).tril((d - c) - (b - a))
        out.append(F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, is_causal=mask is None, scale=scale,
                                                  enable_gqa=q.size(1) != k.size(1))[0].transpose(0, 1))
    return torch.cat(out)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int,
           scale: Optional[float]) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn
    # torch 2.11 takes grouped heads as they are, 2.13 wants to be told.
    more: dict[str, Any] = {"enable_gqa": q.size(1) != k.size(1)} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    width = v.size(2)
    if width != k.size(2):              # MLA: the kernel wants one head dimension
        v = F.pad(v, (0, k.size(2) - width))
        scale = k.size(2) ** -0.5 if scale is None else scale
    out = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=(-1, 0), **more)
    assert isinstance(out, torch.Tensor)        # a pair only where the log-sum-exp is asked for
    return out[..., :width]
