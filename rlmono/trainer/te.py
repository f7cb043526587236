"""Transformer Engine's fused attention and RMSNorm in the place of ours, where it is installed and the run may use it.

It is no part of the model: parameters, checkpoints and what engines get are the same with and without, and any version that has these two
modules will do. Megatron's own modules never see it (see compat.py). It is imported when the first model is built, never before.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Optional

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from rlmono.config.kernels import own_attention, why_local
from rlmono.config.schema import Config
from rlmono.trainer.attention import VarlenAttention
from rlmono.trainer.norms import RMSNorm

log = logging.getLogger(__name__)
TRIAL = (48, 16)
"""Lengths of the two sequences that are tried before it is relied on."""


class Unusable(RuntimeError):
    """--transformer-impl transformer_engine asks for what can't be had here."""


def check(config: Config) -> bool:
    """Import it, if this run is to use it, and whether it does. Raises Unusable where it can't and was asked for by name; with auto, one that does
    not import is told, and left."""
    if why := why_local(config, "cuda" if torch.cuda.is_available() else "cpu"):
        if config.transformer_impl == "transformer_engine":
            raise Unusable(why)
        return False
    library = _library()
    _tell(config, library if isinstance(library, Exception) else None, "does not import")
    return not isinstance(library, Exception)


def usable(config: Config, tf: TransformerConfig) -> bool:
    """Whether a model of this configuration takes it: one step back and forth of its kernels is tried first, for cuDNN, the driver or a version
    of torch may refuse them. Raises Unusable as `check` does."""
    if not check(config) or tf.params_dtype != torch.bfloat16:
        return False
    failed = _trial(tf.hidden_size, *((0, 0, 0) if not attends(tf) else _heads(tf)))
    _tell(config, failed, "is installed, but does not work here")
    return failed is None


def attends(tf: TransformerConfig) -> bool:
    """Whether attention too is its own."""
    return not own_attention(tf.context_parallel_size, tf.multi_latent_attention)


def _heads(tf: TransformerConfig) -> tuple[int, int, int]:
    """(query heads, key-value heads, head dimension) of this rank."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    return tf.num_attention_heads // tp, max(1, (tf.num_query_groups or tf.num_attention_heads) // tp), tf.kv_channels or 0


def _tell(config: Config, failed: Optional[Exception], what: str) -> None:
    if failed is None:
        return
    reason = f"Transformer Engine {what}: {type(failed).__name__}: {(str(failed).splitlines() or [''])[0]}"
    if config.transformer_impl == "transformer_engine":
        raise Unusable(f"{reason}. --transformer-impl auto or local does without it") from failed
    _warn_once(reason)


@functools.cache
def _warn_once(reason: str) -> None:
    log.warning("%s; attention and norms are rlmono's own", reason)


@functools.cache
def _library() -> Any:
    """`transformer_engine.pytorch`, or the exception of its import: of one built for another torch or CUDA it can be any."""
    try:
        import transformer_engine.pytorch as library
        return library
    except Exception as e:
        return e


@functools.cache
def _trial(hidden: int, heads: int, groups: int, dim: int) -> Optional[Exception]:
    """What goes wrong with its norm of `hidden`, and attention where there are `heads`; None when both pass. Draws no random numbers."""
    here: dict[str, Any] = dict(dtype=torch.bfloat16, device="cuda", requires_grad=True)
    total = sum(TRIAL)
    try:
        _library().RMSNorm(hidden, dtype=torch.bfloat16, device="cuda")(torch.ones(total, hidden, **here)).sum().backward()
        if heads:
            bounds = torch.tensor([0, TRIAL[0], total], dtype=torch.int32, device="cuda")
            q, k, v = (torch.ones(total, n, dim, **here) for n in (heads, groups, groups))
            _attend(q, k, v, bounds, max(TRIAL), None).sum().backward()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        raise
    except Exception as e:
        return e
    return None


@functools.cache
def _attention(heads: int, groups: int, dim: int, scale: Optional[float]) -> Any:
    """Its module, which has neither parameters nor state in bf16: one for all layers, and outside the model, whose checkpoints it would add to."""
    return _library().DotProductAttention(heads, dim, num_gqa_groups=groups, attention_dropout=0.0, qkv_format="thd", attn_mask_type="padding_causal",
                                          softmax_scale=scale)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int, scale: Optional[float]) -> torch.Tensor:
    module = _attention(q.size(1), k.size(1), q.size(2), scale)
    # That nothing lies between sequences it would find out by asking the GPU.
    out = module(q, k, v, cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest, pad_between_seqs=False)
    return out.flatten(1)       # type: ignore[no-any-return]


class Attention(VarlenAttention):
    """Megatron's `core_attention` by Transformer Engine's: cuDNN's kernel, or flash-attn's, whichever it picks."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None, attn_mask_type: Any = None,
                attention_bias: Any = None, packed_seq_params: Any = None) -> torch.Tensor:
        """query [t, h, d], key and value [t, kv heads, d] -> [t, h * d]."""
        p = packed_seq_params
        return _attend(query, key, value, p.cu_seqlens_q, p.max_seqlen_q, self.scale)


class Norm(RMSNorm):
    """The same weight under the same name, by Transformer Engine's kernel."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__(config, hidden_size, eps)
        kernel = _library().RMSNorm(hidden_size, eps=eps, dtype=config.params_dtype, device="meta")
        kernel.weight = self.weight
        self._kernel = (kernel,)        # in a tuple, so that it is no part of the model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernel[0](x)       # type: ignore[no-any-return]
