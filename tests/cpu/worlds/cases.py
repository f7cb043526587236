"""Runs a script's `case_…` functions on every rank; `torchrun.run_world` starts it.

A case returns None or a dict of numbers, and fails by raising. A case that fails on any rank has failed; the ranks wait
for each other's verdict before the next one begins. A case that hangs is ended with a traceback of every thread.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_cases(module: dict[str, Any], timeout_s: float = 120) -> None:
    """All cases of `module` (a script's globals()), in order. Does not return: engines leave threads behind."""
    from rlmono.engine.compat import prepare_cpu
    from rlmono.trainer import compat
    sys.path.append(str(Path(__file__).parent / "broken"))
    compat.prepare()            # before megatron
    prepare_cpu()               # before sglang and transformers' models
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout_s))
    only = os.environ.get("CASES")          # some of them, to look into a failure
    for name, case in list(module.items()):
        if name.startswith("case_") and (only is None or name in only.split(",")):
            faulthandler.dump_traceback_later(timeout_s, exit=True)
            _run(name, case)
    faulthandler.cancel_dump_traceback_later()
    dist.barrier()
    os._exit(0)


def _run(name: str, case: Any) -> None:
    store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    begun, values, error = time.perf_counter(), None, ""
    try:
        values = case()
    except Exception:
        error = f"rank {rank}: {traceback.format_exc()}"
        print(f"{name} failed on {error}", flush=True)      # its peers may hang in a collective now
    store.set(f"{name}/{rank}", error)
    errors = [store.get(f"{name}/{r}").decode() for r in range(size)]       # waits for each
    if rank == 0:
        line = {"name": name, "error": "\n".join(filter(None, errors)), "values": values or {}, "seconds": time.perf_counter() - begun}
        with open(os.environ["CASE_RESULTS"], "a") as f:
            f.write(json.dumps(line) + "\n")
