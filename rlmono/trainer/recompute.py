"""`--recompute-granularity auto`: recompute as many layers as memory asks, and no more. Arithmetic on bytes; see `layers_to_recompute`."""

from __future__ import annotations

import logging
from typing import Any, Mapping

import torch

from rlmono.config.schema import Config

log = logging.getLogger(__name__)

KEEP_FREE = 0.08
"""Of the free memory: what fragmentation and kernels' workspaces take."""
GIB = 2**30


def layer_bytes(shape: Mapping[str, Any], tokens: int, tp: int, sequence_parallel: bool, item: int) -> int:
    """What the backward pass of one dense layer keeps of `tokens` tokens, on one of `tp` ranks: inputs and outputs of the two norms and the
    residual (all ranks have them, unless sequence parallel), projections, normed and turned queries and keys, attention's output, and the
    MLP's input, gate, up and product. Experts: each token goes to top-k of them, and the shared one."""
    hidden, dim = shape["hidden_size"], shape["kv_channels"]
    q, kv = shape["num_attention_heads"] * dim, shape["num_query_groups"] * dim
    ffn = shape["ffn_hidden_size"]
    if shape.get("num_moe_experts"):
        ffn = shape["moe_router_topk"] * shape["moe_ffn_hidden_size"] + (shape.get("moe_shared_expert_intermediate_size") or 0)
        hidden_copies = 5 + 2 * shape["moe_router_topk"]
    else:
        hidden_copies = 5
    whole = hidden_copies * hidden // (tp if sequence_parallel else 1)
    parts = (q + 2 * kv) + 2 * (q + kv) + q + 3 * ffn
    return int(tokens * item * (whole + parts // tp))


def logits_bytes(shape: Mapping[str, Any], tokens: int, tp: int, item: int) -> int:
    """Logits and their gradient's place, and a chunk in fp32."""
    return int(tokens * shape["vocab_size"] // tp * item * 2 + 1024 * shape["vocab_size"] // tp * 8)


def layers_to_recompute(free: int, layers: int, one: int, last: int, boundary: int, in_flight: int = 1) -> int:
    """The fewest of `layers` layers of a stage whose recomputation makes all fit in `free` bytes: a recomputed layer keeps its input alone
    (`boundary` bytes), and one at a time is whole again. `in_flight`: packs that a pipeline stage holds at once. All, if even that is too much."""
    room = free * (1 - KEEP_FREE) - last - one
    for n in range(layers + 1):
        if in_flight * ((layers - n) * one + n * boundary) <= room:
            return n
    return layers


def settle(config: Config, tf_configs: list[Any], layers: int, item: int) -> None:
    """Set Megatron's recompute options by what is free now, when the trainer is whole and engines are away."""
    c, m = config, config.model
    tokens = (c.max_tokens_per_gpu or c.micro_batch_size * (c.rollout_max_prompt_len or 1024) + c.rollout_max_response_len)
    tp, pp = c.tensor_model_parallel_size, c.pipeline_model_parallel_size
    one = layer_bytes(m, tokens, tp, c.sequence_parallel, item)
    boundary = tokens * m["hidden_size"] * item // (tp if c.sequence_parallel else 1)
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() if torch.cuda.is_available() else 2**62
    n = layers_to_recompute(free, layers, one, logits_bytes(m, tokens, tp, item), boundary, pp)
    log.info("recompute auto: %d of %d layers; %.1f GiB are free, a layer keeps %.2f GiB of a pack of %d tokens", n, layers, free / GIB,
             one / GIB, tokens)
    for tf in tf_configs:
        tf.recompute_granularity, tf.recompute_method, tf.recompute_num_layers = ("full", "block", n) if n else (None, None, None)
