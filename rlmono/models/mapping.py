"""How one Megatron parameter is made of HF tensors, back, and cut over tensor-parallel ranks.

Each kind is three pure functions: `to_megatron` and `to_hf`, inverses of each other, and `join`, which makes a full tensor
of shards. A shard needs no full tensor: it is `to_megatron` of the parts of HF tensors that `part` names, so that
`to_hf(join([to_megatron([x[part(x.shape, r, n)] for x in tensors]) for r in range(n)])) == tensors`. Megatron's words: a
column-parallel linear cuts the output dimension, which is dimension 0 of the weight; a row-parallel one the input.
The kinds are named for what they do to the weight as torch stores it: `Rows` cuts dimension 0, `Columns` dimension 1.
"""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import torch


class Tensor:
    """One Megatron parameter (`name`, with layers and experts numbered over the whole model) and the HF tensors (`hf_names`)
    that hold the same numbers. `expert` says that its ranks are the experts' tensor-parallel ones, and that it is one of many
    dealt over expert-parallel ranks; `vocabulary`, that Megatron may pad its rows; `with_next`, that engines want the next one at the same time."""

    replicated = False
    expert = False
    cut_dimension = 0

    def __init__(self, name: str, *hf_names: str, vocabulary: bool = False, with_next: bool = False):
        self.name, self.hf_names, self.vocabulary, self.with_next = name, hf_names, vocabulary, with_next

    def to_megatron(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """HF tensors, in the order of `hf_names` -> the Megatron tensor; full ones -> the full one, a rank's parts -> its shard."""
        return parts[0]

    def to_hf(self, full: torch.Tensor) -> list[torch.Tensor]:
        """The full Megatron tensor -> full HF tensors, views where that is possible."""
        return [full]

    def hf_views(self, held: torch.Tensor) -> list[torch.Tensor]:
        """A Megatron tensor, or a rank's shard, as views: each, flattened, holds what is here of one HF tensor. Rows may be in groups, as
        [groups, rows of a group, …]."""
        return self.to_hf(held)

    def part(self, shape: Sequence[int], rank: int, size: int) -> tuple[slice, ...]:
        """Where in an HF tensor of this shape is what tensor-parallel rank `rank` of `size` holds; () is all of it.

        Ranks hold equal lengths; where they don't come out even, as of a vocabulary, the last ones' are shorter.
        """
        if self.replicated or size == 1:
            return ()
        whole = shape[self.cut_dimension]
        length = -(-whole // size)
        return (slice(None),) * self.cut_dimension + (slice(min(rank * length, whole), min((rank + 1) * length, whole)),)

    def join(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The full tensor from the parts of all ranks, in order."""
        raise NotImplementedError


class Replicated(Tensor):
    """The same on every tensor-parallel rank: norms."""

    replicated = True

    def join(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return shards[0]


class Rows(Tensor):
    """Cut along dimension 0. Megatron pads vocabularies to a multiple of the ranks, and the exporter cuts the joined tensor
    to the HF length."""

    def join(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(shards)) if len(shards) > 1 else shards[0]


class Columns(Tensor):
    """Cut along dimension 1."""

    cut_dimension = 1

    def join(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(shards), 1) if len(shards) > 1 else shards[0]


class QkvRows(Rows):
    """Query, key and value, row-wise by query group: [queries of group 0 | key 0 | value 0 | queries of group 1 | …].
    So a cut along dimension 0 gives each rank whole groups."""

    def __init__(self, name: str, *hf_names: str, shape: Mapping[str, Any]):
        super().__init__(name, *hf_names)
        self.groups, self.dim = shape["num_query_groups"], shape["kv_channels"]
        self.queries = shape["num_attention_heads"] // self.groups

    def to_megatron(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        tail, groups = parts[0].shape[1:], parts[1].shape[0] // self.dim
        return torch.cat([p.reshape(groups, -1, *tail) for p in parts], 1).reshape(-1, *tail)

    def to_hf(self, full: torch.Tensor) -> list[torch.Tensor]:
        return [x.reshape(-1, *full.shape[1:]) for x in self.hf_views(full)]

    def hf_views(self, held: torch.Tensor) -> list[torch.Tensor]:
        q = self.queries * self.dim
        grouped = held.view(-1, q + 2 * self.dim, *held.shape[1:])
        return [grouped[:, :q], grouped[:, q:q + self.dim], grouped[:, q + self.dim:]]


class GatedRows(Tensor):
    """The gate and up projections of a gated MLP, one above the other; each is cut along dimension 0 for itself."""

    def to_megatron(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(parts))

    def to_hf(self, full: torch.Tensor) -> list[torch.Tensor]:
        return list(full.chunk(2))

    def join(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(shards) == 1:
            return shards[0]
        halves = [s.chunk(2) for s in shards]
        return torch.cat([h[i] for i in (0, 1) for h in halves])


class ExpertGatedRows(GatedRows):
    """The gate and up projections of one expert."""

    expert = True


class ExpertColumns(Columns):
    """The down projection of one expert."""

    expert = True
