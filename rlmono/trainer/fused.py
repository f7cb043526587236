"""Functions that torch.compile turns into one kernel each on a GPU; on a CPU they run as they are written."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any, Callable, TypeVar

import torch

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])


@functools.cache
def has_triton() -> bool:
    """The real one: on a CPU, engine/compat.py may have put a stand-in in its place."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def fused(function: F) -> F:
    """`function` (a tensor first) compiled for the GPU at its first call there. Its tensors' first dimension, tokens, may change; of others each
    size has kernels of its own: inductor keeps kernels on disk, and those that a run of a small vocabulary has left are seven times slower on a
    large one. A function that can't be compiled here, for want of a compiler say, is told once and runs as it is."""
    compiled: list[Any] = []

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if not args[0].is_cuda:
            return function(*args)
        if not compiled:
            compiled.append(torch.compile(function, dynamic=False))
        if compiled[0] is function:
            return function(*args)
        for a in args:
            if isinstance(a, torch.Tensor):
                torch._dynamo.maybe_mark_dynamic(a, 0)      # overrides dynamic=False
        try:
            return compiled[0](*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:
            if type(e).__module__.startswith(("torch._dynamo", "torch._inductor", "triton")):
                log.warning("%s runs without torch.compile: %s", function.__name__, str(e).splitlines()[0] if str(e) else type(e).__name__)
                compiled[0] = function
                return function(*args)
            raise
    return call     # type: ignore[return-value]
