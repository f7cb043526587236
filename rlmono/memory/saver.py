"""torch-memory-saver in this process: loaded before Python starts, and shown to free memory before anything relies on it."""

from __future__ import annotations

import glob
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any, Optional

PROBE_BYTES = 64 * 2**20
_MARK = "_RLMONO_PRELOADED"


def preload(environ: dict[str, str]) -> None:
    """Start this process again with torch-memory-saver's library in LD_PRELOAD, once.

    It must be there before torch is imported, in device ranks on GPUs only: where there is no CUDA driver it is fatal for
    every process, shells too; and torchrun has no environment a rank. Returns where it is loaded already.
    """
    if environ.get(_MARK):
        return
    library = _library()
    environ = {**environ, _MARK: "1", "LD_PRELOAD": ":".join(filter(None, [library, environ.get("LD_PRELOAD")])), **NCCL}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)


# SGLang's run_scheduler_process, which never runs here, would set the like; what NCCL allocates itself can't be paused.
NCCL = {"NCCL_CUMEM_ENABLE": "0", "NCCL_GRAPH_REGISTER": "0", "NCCL_NVLS_ENABLE": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def _library() -> str:
    spec = importlib.util.find_spec("torch_memory_saver")
    if spec is None or spec.origin is None:
        raise ImportError("torch-memory-saver is not installed; --colocate on GPUs needs it: pip install torch-memory-saver==0.0.10")
    found = sorted(glob.glob(str(Path(spec.origin).parent.parent / "torch_memory_saver_hook_mode_preload*.so")))
    if not found:
        raise ImportError(f"{Path(spec.origin).parent.parent}: torch-memory-saver has no torch_memory_saver_hook_mode_preload*.so here")
    return found[-1]


def open_saver(device: str) -> Optional[Any]:
    """torch_memory_saver's object, or None on CPU. Call it after megatron.core was imported (which sets another hook mode).

    Raises RuntimeError when pausing does not free GPU memory.
    """
    if device != "cuda":
        return None
    import torch
    from torch_memory_saver import torch_memory_saver as saver
    saver.hook_mode = "preload"
    with saver.region(tag="probe"):
        probe = torch.empty(PROBE_BYTES, dtype=torch.uint8, device="cuda")
    before = torch.cuda.mem_get_info()[0]
    saver.pause("probe")
    freed = torch.cuda.mem_get_info()[0] - before
    saver.resume("probe")
    del probe
    if freed < PROBE_BYTES // 2:
        raise RuntimeError("torch-memory-saver is loaded, but pausing 64 MiB freed no GPU memory: PYTORCH_CUDA_ALLOC_CONF must not have "
                           "expandable_segments, and LD_PRELOAD must reach this process")
    return saver
