"""Adam's tensors in a checkpoint: each parameter's fp32 weight and moments, whole, named after it in the whole model.

On a rank they are flat pieces: Megatron deals its buffers of parameters evenly over the data-parallel ranks, and a border may
run through a parameter. The rank with the longest piece saves the parameter, and the others send it theirs. The tensors are
those of Megatron's "fully_reshardable" sharding, which would gather the whole optimizer on every data-parallel rank instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Mapping

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory, is_main_replica

from rlmono.trainer.optimizer import this_device

KEYS = ("param", "exp_avg", "exp_avg_sq")
Sharded = dict[int, dict[str, ShardedBase]]
"""By the place of a parameter in its optimizer, and by KEYS."""


@dataclass(frozen=True)
class Share:
    """A parameter, and which piece [from, to) of it, flat, each data-parallel rank has that has one."""

    parameter: torch.nn.Parameter
    pieces: Mapping[int, tuple[int, int]]

    @property
    def saver(self) -> int:
        """The rank that saves it: the first of those with the longest piece."""
        return max(self.pieces, key=lambda rank: (self.length(rank), -rank))

    def length(self, rank: int) -> int:
        a, b = self.pieces[rank]
        return b - a


def live(single: Any, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """This rank's pieces, by KEYS, where the optimizer has them. In host memory the fp32 weight is part of the state."""
    group, place = single.model_param_group_index_map[parameter]
    main = single.optimizer.param_groups[group]["params"][place]
    state = single.optimizer.state[main]
    return {"param": state.get("master_param", main).detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}


def shares(single: Any) -> list[Share]:
    """All parameters of a distributed optimizer, in an order that its data-parallel ranks have in common."""
    ranks, out = single.data_parallel_group.size(), []
    for buffer in single.buffers:
        for parameter, (start, end, number) in buffer.param_index_map.items():
            bucket = buffer.buckets[number]
            each, begin, size = bucket.grad_data.numel() // ranks, start - bucket.offset, end - start
            holders = range(begin // each, (begin + size - 1) // each + 1)
            out.append(Share(parameter, {r: (max(r * each - begin, 0), min((r + 1) * each - begin, size)) for r in holders}))
    return out


def to_save(single: Any, models: Mapping[str, Any]) -> Sharded:
    """What this rank saves: views of what the optimizer steps, and in host memory what had to be joined. `models`: the sharded states of its chunks.
    Collective over its data-parallel ranks."""
    me, every, about = single.data_parallel_group.rank(), shares(single), _by_parameter(models)
    saved = _saved_here(single, every, about)
    joined = _joined(single, [s for i, s in enumerate(every) if i in saved and len(s.pieces) > 1])
    return {i: _sharded(joined.get(id(s.parameter)) or live(single, s.parameter), about[id(s.parameter)], main=True)
            for i, s in enumerate(every) if i in saved and s.saver == me}


def to_load(single: Any, models: Mapping[str, Any]) -> Sharded:
    """What this rank needs of a checkpoint: each parameter that it has a piece of, whole; read in place where it has all of it.
    Collective as `to_save`."""
    me, every, about = single.data_parallel_group.rank(), shares(single), _by_parameter(models)
    saved, out = _saved_here(single, every, about), {}
    for i, share in enumerate(every):
        if me in share.pieces:
            tensors = live(single, share.parameter)
            if len(share.pieces) > 1:
                tensors = {key: torch.zeros(share.parameter.numel(), dtype=t.dtype) for key, t in tensors.items()}
            out[i] = _sharded(tensors, about[id(share.parameter)], main=i in saved and share.saver == me)
    return out


def restore(single: Any, loaded: Mapping[int, Mapping[str, torch.Tensor]], steps: int) -> None:
    """Take what `to_load` has asked for, and how often Adam has stepped."""
    me, every = single.data_parallel_group.rank(), shares(single)
    for i, tensors in loaded.items():
        a, b = every[i].pieces[me]
        for key, piece in live(single, every[i].parameter).items():
            piece.copy_(tensors[key].flatten()[a:b])
    for state in single.optimizer.state.values():
        state["step"] = torch.full_like(state["step"], steps)           # each its own: a shared one would run away
    if hasattr(single.optimizer, "sub_optimizers"):         # in host memory
        single.optimizer._sync_hdo_state_to_sub_optimizers()


def _by_parameter(models: Mapping[str, Any]) -> dict[int, Any]:
    """How a parameter is sharded, by the parameter's id."""
    return {id(x.data): x for x in nested_values(models) if isinstance(x, (ShardedTensor, ShardedTensorFactory))}


def _saved_here(single: Any, every: list[Share], about: Mapping[int, Any]) -> set[int]:
    """Places of the parameters that these data-parallel ranks save; others may have the same, over tensor-parallel ranks or pipeline stages."""
    flags = torch.tensor([is_main_replica(about[id(s.parameter)].replica_id) for s in every], dtype=torch.int32, device=this_device())
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=single.data_parallel_group)
    return set(flags.nonzero().flatten().tolist())


def _sharded(tensors: Mapping[str, torch.Tensor], about: Any, main: bool) -> dict[str, ShardedBase]:
    out = {}
    for key in KEYS:
        dtype = {} if isinstance(about, ShardedTensorFactory) else {"dtype": tensors[key].dtype}
        data = tensors[key].view(about.data.shape)
        out[key] = replace(about, key=f"optimizer.state.{key}.{about.key}", data=data, replica_id=int(not main), **dtype)
    return out


def _joined(single: Any, split: list[Share]) -> dict[int, dict[str, torch.Tensor]]:
    """Of parameters that several ranks have pieces of, by id: those that this rank saves, flat, in host memory. Collective."""
    group, me, device = single.data_parallel_group, single.data_parallel_group.rank(), this_device()
    whole: dict[int, dict[str, torch.Tensor]] = {id(s.parameter): {} for s in split if s.saver == me}
    if not split:
        return whole
    goes = [[s for s in split if s.saver == r != me and me in s.pieces] for r in range(group.size())]
    comes = [[s for s in split if s.saver == me != r and r in s.pieces] for r in range(group.size())]
    lengths = [[s.length(r) for s in there] for r, there in enumerate(comes)]
    for key in KEYS:
        sent = torch.cat([torch.empty(0, device=device), *(live(single, s.parameter)[key].to(device) for there in goes for s in there)])
        received = torch.empty(sum(map(sum, lengths)), device=device)
        dist.all_to_all_single(received, sent, [sum(x) for x in lengths], [sum(s.length(me) for s in there) for there in goes], group=group)
        pieces = iter(received.cpu().split([n for there in lengths for n in there]))
        for s in split:
            if s.saver == me:
                whole[id(s.parameter)][key] = torch.empty(s.parameter.numel())
                _put(whole[id(s.parameter)][key], s.pieces[me], live(single, s.parameter)[key])
        for r, there in enumerate(comes):
            for s in there:
                _put(whole[id(s.parameter)][key], s.pieces[r], next(pieces))
    return whole


def _put(whole: torch.Tensor, place: tuple[int, int], piece: torch.Tensor) -> None:
    whole[place[0]:place[1]] = piece
