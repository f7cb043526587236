"""SGLang's process groups, inside the default group that a rank's pool already has.

SGLang makes its groups for a world of its own. Here every rank of the pool makes the groups of all engines together,
in one order, with real rank ids: while they are made, SGLang sees a world of one engine's size, and each group list
that it asks for is widened from "this engine" to "every engine".
"""

from __future__ import annotations

import contextlib
from typing import Any, Iterator, Sequence

import torch.distributed as dist


def make_groups(engines: Sequence[Sequence[int]], server_args: Any, local_rank: int, backend: str) -> None:
    """Collective over the pool. `engines` lists the pool ranks of each engine; every rank of the pool is in one."""
    from sglang.srt.distributed import bootstrap, parallel_state

    world = dist.get_world_size()
    assert sorted(r for e in engines for r in e) == list(range(world)), f"engines {engines} don't cover the pool of {world}"
    bootstrap._set_all_reduce_flags(server_args=server_args)
    with _world_of_one_engine(engines, parallel_state):
        parallel_state.init_distributed_environment(backend=backend, world_size=len(engines[0]), rank=-1, local_rank=local_rank,
                                                    distributed_init_method="unused")
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=server_args.tp_size,
                                                 pipeline_model_parallel_size=server_args.pp_size,
                                                 expert_model_parallel_size=server_args.ep_size)


@contextlib.contextmanager
def _world_of_one_engine(engines: Sequence[Sequence[int]], parallel_state: Any) -> Iterator[None]:
    size = len(engines[0])
    make, world_size = parallel_state.GroupCoordinator.__init__, dist.get_world_size

    def make_for_all(self: Any, group_ranks: Sequence[Sequence[int]], *args: Any, **kwargs: Any) -> None:
        make(self, [[engine[r] for r in ranks] for engine in engines for ranks in group_ranks], *args, **kwargs)

    parallel_state.GroupCoordinator.__init__ = make_for_all
    dist.get_world_size = lambda group=None: size if group is None else world_size(group)
    try:
        yield
    finally:
        parallel_state.GroupCoordinator.__init__, dist.get_world_size = make, world_size
