"""What must be overridden for megatron-core 0.16.1, each with its reason.

`prepare()` before the first import of megatron.core, which is imported here as where Transformer Engine is not installed, so that Megatron is one
and the same everywhere: with it, it would take another Adam, other sums of norms and other paths of recompute, and a Transformer Engine that was
built for another torch would end the run. What of it is used, te.py uses. Another part lets Megatron's code, written for GPUs, run on CPU and gloo,
and does nothing where CUDA is present.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import logging
import sys
from typing import Any, Callable, Iterator

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

TESTED = "0.16.1"
MEGATRON = ("models.gpt.gpt_layer_specs", "models.gpt", "distributed", "optimizer.cpu_offloading", "optimizer_param_scheduler", "pipeline_parallel",
            "post_training.modelopt.layers", "dist_checkpointing.strategies.torch", "dist_checkpointing.strategies.state_dict_saver")
"""All of megatron.core that looks for Transformer Engine when it is imported, and is ever imported by rlmono."""
_CPU = torch.device("cpu")
_done = False


def prepare() -> None:
    """Check the version and install the overrides, once. Raises ImportError for another megatron-core."""
    global _done
    if _done:
        return
    _check_version()
    if not torch.cuda.is_available():
        _before_import_on_cpu()
    with hidden("transformer_engine", "transformer_engine_torch"):
        _without_transformer_engine()
        for name in MEGATRON:
            importlib.import_module(f"megatron.core.{name}")
    _torchs_adam()
    _without_waiting()
    if not torch.cuda.is_available():
        _after_import_on_cpu()
    _done = True


def _check_version() -> None:
    try:
        found = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"megatron-core is not installed; install megatron-core=={TESTED} (launch/install.sh does).") from None
    if found != TESTED:
        raise ImportError(f"megatron-core {found} is installed, but rlmono was tested with {TESTED} and relies on its internals: "
                          f"pip install megatron-core=={TESTED}")


@contextlib.contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Within, importing these fails as where they are not installed."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in packages}
    sys.modules.update(dict.fromkeys(packages))         # type: ignore[arg-type]    # None says that there is no such module
    try:
        yield
    finally:
        for name in packages:
            del sys.modules[name]
        sys.modules.update(before)


def _without_transformer_engine() -> None:
    import megatron.core.utils as utils
    from packaging.version import Version
    utils.get_te_version = lambda: Version("0.0.0")     # it would look for itself at each call; and None >= Version raises
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.multi_latent_attention as mla
    moe_utils.te_general_gemm = None                    # the router reads the name
    mla.HAVE_TE = False                                 # isinstance(x, MagicMock) raises
    _selective_recompute()


def _torchs_adam() -> None:
    """Also where Apex is installed: its Adam counts its steps elsewhere, and checkpoints would say it took none."""
    import megatron.core.optimizer as optimizers
    import megatron.core.optimizer.distrib_optimizer as distributed
    optimizers.Adam = distributed.Adam = torch.optim.AdamW
    optimizers.USING_PYTORCH_OPTIMIZER = True
    distributed.HAVE_APEX_OR_TE = distributed.USING_TE_OPTIMIZER = distributed.USING_APEX_OPTIMIZER = False


def _selective_recompute() -> None:
    """Whatever is not None counts as fp8, which needs Transformer Engine; norms are recomputed with the default, which is False."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput as Checkpoint
    original = Checkpoint.__init__
    Checkpoint.__init__ = lambda self, fp8=False: original(self, fp8 or None)


def _without_waiting() -> None:
    """Packs know the positions of their tokens: RoPE need not ask the GPU for lengths."""
    import megatron.core.transformer.attention as attention

    from rlmono.trainer.rope import by_positions
    attention.apply_rotary_pos_emb = by_positions(attention.apply_rotary_pos_emb)


# ---------------------------------------------------------------- CPU and gloo

class _Stream:
    """CPU work is done when it returns: streams and events have nothing to wait for."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, *_: Any) -> _Stream:
        return _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


def _before_import_on_cpu() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU              # device of every buffer that Megatron makes
    cuda.set_device = lambda *_: None
    cuda.device_count = lambda: 1
    cuda.synchronize = lambda *_, **__: None
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda *_, **__: _Stream()
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_, **__: None
    cuda.manual_seed = torch.default_generator.manual_seed      # torch.manual_seed would call back
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda self, _: None
    tensor.cuda = tensor.pin_memory = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self          # type: ignore[method-assign,assignment]
    _device_constructors()      # `with torch.device(…)` knows factories by identity, from a cache: it must hold the ones that we wrap
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "linspace", "as_tensor",
                 "zeros_like", "ones_like", "empty_like", "full_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))     # device="cuda" is written out in clip_grads, optimizer, schedules
    tensor.to = _to_cpu(tensor.to)
    tensor.type = _as_if_cuda(tensor.type)


def _is_cuda(device: Any) -> bool:
    return device is not None and (type(device) is int or "cuda" in str(device))


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def made(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)
    return made


def _to_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], (str, int, torch.device)) and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return to(self, *args, **kwargs)
    return moved


def _as_if_cuda(type_of: Callable[..., Any]) -> Callable[..., Any]:
    """The optimizer sorts parameters by `.type() == 'torch.cuda.FloatTensor'`."""
    def named(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = type_of(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) and not answer.startswith("torch.cuda") else answer
    return named


def _after_import_on_cpu() -> None:
    import megatron.core.jit as jit
    import megatron.core.tensor_parallel.random as random
    jit.disable_jit_fuser()                         # torch.compile on CPU needs a C++ compiler, and seconds
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    # "CPU RNG state changed within GPU RNG context": here they are one.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    all_to_all = dist.all_to_all_single

    def split_by_lists(output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, **kwargs: Any) -> Any:
        """Megatron turns split sizes into lists only if they are CUDA tensors."""
        splits = (s.tolist() if hasattr(s, "tolist") else s for s in (output_split_sizes, input_split_sizes))
        return all_to_all(output, input, *splits, **kwargs)
    dist.all_to_all_single = split_by_lists  # type: ignore[assignment]
    _uneven_parts()


def _uneven_parts() -> None:
    """gloo wants the parts of ranks to be of one size; those of an expert on several tensor-parallel ranks are as many tokens as each was sent."""
    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    def to_rows(x: Any, rows: int) -> Any:
        return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])

    def gather(outputs: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        if len({x.shape for x in outputs}) == 1:
            return all_gather(outputs, input, *args, **kwargs)
        assert not kwargs.get("async_op")
        rows = max(map(len, outputs))
        whole = [x.new_empty(rows, *x.shape[1:]) for x in outputs]
        all_gather(whole, to_rows(input, rows), *args, **kwargs)
        for x, padded in zip(outputs, whole, strict=True):
            x.copy_(padded[:len(x)])
        return None

    def scatter(output: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if len({x.shape for x in inputs}) == 1:
            return reduce_scatter(output, inputs, *args, **kwargs)
        assert not kwargs.get("async_op")
        rows = max(map(len, inputs))
        padded = output.new_empty(rows, *output.shape[1:])
        reduce_scatter(padded, [to_rows(x, rows) for x in inputs], *args, **kwargs)
        output.copy_(padded[:len(output)])
        return None
    dist.all_gather, dist.reduce_scatter = gather, scatter  # type: ignore[assignment]
