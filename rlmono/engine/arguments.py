"""SGLang's ServerArgs from our config."""

from __future__ import annotations

import json
import os
from typing import Any

from rlmono.config.hf import changed_values
from rlmono.config.schema import Config


def server_args(config: Config, *, device: str, dtype: str, memory_saver: bool) -> Any:
    """ServerArgs of every engine. `--sglang-*` values win over ours, except where the rank itself decides."""
    from sglang.srt.server_args import ServerArgs

    values: dict[str, Any] = dict(
        model_path=config.hf_checkpoint, tp_size=config.rollout_num_gpus_per_engine, device=device, dtype=dtype,
        load_format="dummy",        # weights come from the trainer, always
        skip_tokenizer_init=True,   # hosts tokenise
        sampling_backend="pytorch", log_level="warning", random_seed=config.rollout_seed,
        max_running_requests=config.sglang_server_concurrency, sleep_on_idle=True, enable_memory_saver=memory_saver,
        watchdog_timeout=1e9)       # a rank that trains does not schedule; our own deadlines watch it
    if config.rollout_max_context_len is not None:
        values["context_length"] = config.rollout_max_context_len
    values.update(_cpu_args(config) if device == "cpu" else _gpu_args())
    values.update(config.sglang)
    if changed := changed_values(str(config.hf_checkpoint), config.model):      # --rotary-base and the like: both models must have it
        values["json_model_override_args"] = json.dumps(changed | json.loads(values.get("json_model_override_args") or "{}"))
    if config.deterministic and device == "cuda":
        values["enable_deterministic_inference"] = True
    return ServerArgs(**values)


def _cpu_args(config: Config) -> dict[str, Any]:
    tp = config.rollout_num_gpus_per_engine
    if tp > 1:
        os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(i % (os.cpu_count() or 1)) for i in range(tp))
    args: dict[str, Any] = dict(attention_backend="torch_native", grammar_backend="none", disable_cuda_graph=True, disable_overlap_schedule=True,
                                mem_fraction_static=0.5, max_total_tokens=65536)
    if config.deterministic:
        # A cached prefix or a cut prompt changes the shapes of a prefill, and with them the last bits of its logprobs.
        args.update(disable_radix_cache=True, chunked_prefill_size=-1)
    return args


def _gpu_args() -> dict[str, Any]:
    from importlib.util import find_spec
    fa3 = find_spec("sgl_kernel") is not None and find_spec("sgl_kernel.flash_ops") is not None
    return dict(attention_backend="fa3" if fa3 else "triton", disable_prefill_cuda_graph=True, sleep_on_idle=False)
