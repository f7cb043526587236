"""The trainer's weights as full tensors with HF names: what engines load, and what HF exports hold.

Shards are gathered over tensor-parallel ranks in buckets, so that small tensors share a collective. Where nothing is
sharded, tensors are views of the parameters: nothing is copied.
"""

from __future__ import annotations

from typing import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from rlmono.models.mapping import Tensor

BUCKET_BYTES = 512 * 2**20
Named = list[tuple[str, torch.Tensor]]


def export(parameters: Mapping[str, torch.Tensor], tensors: Sequence[Tensor], group: dist.ProcessGroup, vocab_size: int,
           bucket_bytes: int = BUCKET_BYTES) -> Iterator[Named]:
    """Buckets of (HF name, full tensor), in the order of `tensors`; the same on all ranks of `group`, the tensor-parallel group.

    `parameters` are this rank's by Megatron name. Collective over `group`. A bucket is valid until the next one is asked for.
    """
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += parameters[tensor.name].nbytes * (1 if tensor.replicated else group.size())
        if size >= bucket_bytes:
            yield _gather(bucket, parameters, group, vocab_size)
            bucket, size = [], 0
    if bucket:
        yield _gather(bucket, parameters, group, vocab_size)


@torch.no_grad()
def _gather(bucket: Sequence[Tensor], parameters: Mapping[str, torch.Tensor], group: dist.ProcessGroup, vocab_size: int) -> Named:
    n = group.size()
    cut = [t for t in bucket if not t.replicated and n > 1]
    shards: dict[str, list[torch.Tensor]] = {t.name: [parameters[t.name].detach()] for t in bucket}
    if cut:
        mine = torch.cat([parameters[t.name].detach().reshape(-1) for t in cut])
        every = mine.new_empty(n * mine.numel())
        dist.all_gather_into_tensor(every, mine, group=group)
        sizes = [parameters[t.name].numel() for t in cut]
        per_rank = [part.split(sizes) for part in every.chunk(n)]
        for i, t in enumerate(cut):
            shards[t.name] = [rank[i].view(parameters[t.name].shape) for rank in per_rank]
    out: Named = []
    for t in bucket:
        parts = t.to_hf(t.join(shards[t.name]))
        out += [(name, part[:vocab_size] if "embed_tokens" in name or "lm_head" in name else part) for name, part in zip(t.hf_names, parts, strict=True)]
    return out
