"""What must be overridden for SGLang 0.5.16 to run inside a rank, each with its reason. Import it before sglang.

Two parts: `prepare_cpu` makes the import possible where there is no GPU (it changes nothing of SGLang), and
`override` replaces the few functions that assume SGLang owns its process. Another version of SGLang is refused:
these places move between releases.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import sys
import threading
import types
from pathlib import Path
from typing import Any, Callable, Iterable, Optional

import torch
import torch.distributed as dist

TESTED = "0.5.16"
_early: Optional[threading.Thread] = None


def check_version() -> None:
    """Raises ImportError unless the tested SGLang is installed."""
    try:
        found = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"sglang is not installed; install sglang=={TESTED} (launch/install.sh does).") from None
    if found != TESTED:
        raise ImportError(f"sglang {found} is installed, but rlmono was tested with {TESTED} and relies on its internals: "
                          f"pip install sglang=={TESTED}")


def prepare_cpu() -> None:
    """Make `import sglang` work without CUDA; does nothing where CUDA is present."""
    if torch.cuda.is_available():
        return
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"     # else seconds of C++ builds at the first step; and the triton stand-in can't be compiled
    _define_torchvision_ops()
    if importlib.util.find_spec("sgl_kernel") is None:
        _stand_in("sgl_kernel", __getattr__=_missing_kernel)
    if importlib.util.find_spec("IPython") is None:     # sglang.utils imports it for notebooks
        display = _stand_in("IPython.display", HTML=None, display=None)
        _stand_in("IPython", display=display, version_info=(8, 24))     # matplotlib asks whoever has IPython for its version
    if importlib.util.find_spec("triton") is None:
        _install_triton_stub()


def import_only(architecture: str) -> None:
    """Of SGLang's 200 model files, import the one that has this architecture (and what it imports): SGLang has a variable for that. Before
    anything of SGLang is imported; a value that the user has set stays."""
    if "SGLANG_DISABLED_MODEL_ARCHS" in os.environ:
        return
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    files = sorted((Path(spec.submodule_search_locations[0]) / "srt" / "models").glob("*.py"))
    has_it = re.compile(rf"^class {re.escape(architecture)}\b", re.MULTILINE)
    others = [f.stem for f in files if not has_it.search(f.read_text())]
    if len(others) < len(files):
        os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(others)


def import_early(architecture: str) -> None:
    """Begin to import SGLang in a thread: that takes seconds in which a trainer's weights can be read. `finish_import` comes before anybody
    else imports anything of it."""
    global _early
    check_version()
    prepare_cpu()
    import_only(architecture)
    _early = threading.Thread(target=importlib.import_module, args=("sglang.srt.managers.scheduler",), name="import sglang", daemon=True)
    _early.start()


def finish_import(timeout_s: float) -> None:
    """Wait for the thread of `import_early`, if there is one: SGLang's modules import each other in circles, and who imports one of them
    meanwhile finds some half made. What the thread failed with comes again when it is imported."""
    if _early is not None:
        _early.join(timeout_s)
        if _early.is_alive():
            raise TimeoutError(f"import of SGLang: not within {timeout_s:g} s")


def copies_of_weights(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules that keep a second copy of their weight for good from their first forward on, which is a CUDA graph's capture with random
    weights: GLM-4.5's routers, in fp32."""
    return [module for module in model.modules() if "_weight_fp32" in module._buffers]


def refresh_copies(modules: Iterable[torch.nn.Module]) -> None:
    """Bring those copies up to date, in place, as CUDA graphs have their address."""
    for module in modules:
        if module._weight_fp32 is not None:
            module._weight_fp32.copy_(module.weight.data)       # type: ignore[arg-type, operator, union-attr]


_library: Any = None


def _define_torchvision_ops() -> None:
    """PyPI's torchvision is a CUDA build: its C++ part can't load beside a CPU torch, and its Python part then misses two ops."""
    global _library
    try:
        torch.ops.torchvision.nms  # noqa: B018 - the look-up is the test
    except (AttributeError, RuntimeError):
        _library = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            _library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _stand_in(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    module.__dict__.update(attributes)
    sys.modules[name] = module
    return module


def _missing_kernel(name: str) -> Callable[..., None]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU")
    return missing


def _install_triton_stub() -> None:
    """SGLang ships a triton stand-in, but installs it only on macOS: load it by path."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    path = os.path.join(spec.submodule_search_locations[0], "_triton_stub.py")
    stub = importlib.util.spec_from_file_location("_rlmono_triton_stub", path)
    assert stub is not None and stub.loader is not None
    module = importlib.util.module_from_spec(stub)
    stub.loader.exec_module(module)
    module.install()


def override(make_channels: Callable[..., Any], pull_requests: Callable[[Any], Any], latent_norm_epsilon: Optional[float] = None) -> None:
    """Replace what assumes a process of SGLang's own, and what differs from the models' published code.

    `make_channels(**kw)` stands for SchedulerIpcChannels.create, `pull_requests(receiver)` for the read of its sockets; `latent_norm_epsilon`
    is that of the model's shape.
    """
    from sglang.srt.distributed import bootstrap
    from sglang.srt.managers import tp_worker
    from sglang.srt.managers.scheduler_components.ipc_channels import SchedulerIpcChannels
    from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver

    # Requests and outputs travel on the host's socket as our own messages, without pickle.
    SchedulerIpcChannels.create = staticmethod(make_channels)
    SchedulerRequestReceiver._pull_raw_reqs = lambda receiver: pull_requests(receiver)
    # The groups are made before, inside the pool's default group (see groups.py).
    bootstrap._init_parallel_groups = _groups_exist
    # It passes an engine-relative rank with a global source: right only for an engine that begins at rank 0.
    original = tp_worker.broadcast_pyobj
    tp_worker.broadcast_pyobj = lambda data, rank, group=None, **kw: original(data, dist.get_rank(), group, **kw)
    if not torch.cuda.is_available():
        _override_cpu_sampling()
    if latent_norm_epsilon is not None:
        from sglang.srt.models import deepseek_v2
        override_latent_norms(deepseek_v2.DeepseekV2AttentionMLA, latent_norm_epsilon)


def override_latent_norms(attention: Any, epsilon: float) -> None:
    """SGLang gives the norms on latents `rms_norm_eps`, where the published code and transformers have 1e-6 whatever that is. As layers are
    made: CUDA graphs are captured right after."""
    original = attention.__init__

    def init(self: Any, *args: Any, **named: Any) -> None:
        original(self, *args, **named)
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            if hasattr(self, name):             # without low-rank queries there is the second alone
                getattr(self, name).variance_epsilon = epsilon
    attention.__init__ = init


def _groups_exist(*, server_args: Any, model_config: Any, **_: Any) -> None:
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers.dp_attention import initialize_dp_attention

    assert parallel_state._TP is not None and parallel_state._TP.world_size == server_args.tp_size
    initialize_dp_attention(server_args=server_args, model_config=model_config)


def _override_cpu_sampling() -> None:
    """multinomial_with_seed hashes with a Triton kernel: on CPU, the same idea (Gumbel noise from a hash of seed,
    position and token) in torch."""
    from sglang.srt.layers import sampler
    sampler.multinomial_with_seed = _multinomial_with_seed


def _multinomial_with_seed(logprobs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[n, m] log-probabilities, [n] seeds, [n] positions -> [n, 1] sampled columns; row i depends on its own inputs only."""
    rows = _mix(_mix(seed.to(torch.int64)) ^ positions.to(torch.int64))
    columns = torch.arange(logprobs.shape[1], device=logprobs.device, dtype=torch.int64)
    bits = _mix(rows[:, None] ^ _mix(columns)[None, :])
    uniform = ((bits >> 11) & ((1 << 53) - 1)).to(torch.float64).add_(0.5).div_(2.0 ** 53)
    gumbel = uniform.log_().neg_().log_().neg_()
    return torch.argmax(gumbel.add_(logprobs.to(torch.float64)), dim=1, keepdim=True)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A 64-bit finaliser (splitmix64: Steele, Lea, Flood 2014), in wrapping int64 arithmetic."""
    x = x + -7046029254386353131                                            # 0x9E3779B97F4A7C15
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687          # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685          # 0x94D049BB133111EB
    return x ^ ((x >> 31) & ((1 << 33) - 1))
