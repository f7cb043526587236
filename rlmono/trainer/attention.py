"""Causal attention over packed sequences, without Transformer Engine.

A pack is [t, heads, dim] with cumulative lengths `cu_seqlens`; tokens attend within their own sequence only. On GPUs it
is torch's variable-length flash attention (bf16), on CPU one scaled-dot-product call a sequence.
"""

from __future__ import annotations

import inspect
from typing import Any, Optional

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule


class VarlenAttention(MegatronModule):
    """Megatron's `core_attention`, for packed (THD) input."""

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, softmax_scale: Optional[float] = None, **_: Any):
        super().__init__(config=config)
        assert config.attention_dropout == 0.0, "attention dropout is not implemented"
        self.scale = softmax_scale          # None: 1 / sqrt(head dim)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None, attn_mask_type: Any = None,
                attention_bias: Any = None, packed_seq_params: Any = None) -> torch.Tensor:
        """query [t, h, d], key and value [t, kv heads, d] -> [t, h * d]."""
        p = packed_seq_params
        assert p is not None, "every batch is packed"
        return varlen_attention(query, key, value, p.cu_seqlens_q, p.max_seqlen_q, self.scale).flatten(1)


def varlen_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: Optional[float]) -> torch.Tensor:
    """Causal attention a sequence; `cu_seqlens` [n + 1] int32 begins with 0 and ends with t."""
    grouped = q.size(1) != k.size(1)
    if q.is_cuda:
        return _flash(q, k, v, cu_seqlens, max_seqlen, scale, grouped)
    out = []
    bounds = cu_seqlens.tolist()
    for a, b in zip(bounds, bounds[1:], strict=False):
        heads_first = [x[a:b].transpose(0, 1)[None] for x in (q, k, v)]
        out.append(F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale, enable_gqa=grouped)[0].transpose(0, 1))
    return torch.cat(out)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: Optional[float],
           grouped: bool) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn
    # torch 2.11 takes grouped heads as they are, 2.13 wants to be told.
    more = {"enable_gqa": grouped} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=(-1, 0), **more)
