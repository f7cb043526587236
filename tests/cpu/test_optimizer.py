"""Adam's schedules, norms and skipped steps, and checkpoints written in the background, on two ranks: worlds/optimizer_two.py.
And what the options say on a CPU and on a GPU."""

from __future__ import annotations

import pytest
from families import make_family
from torchrun import WORLDS, Result, case_names, run_world

from rlmono.config.option import ConfigError
from rlmono.config.schema import Config
from rlmono.config.validate import _optimizer, on_device

SCRIPT = WORLDS / "optimizer_two.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    folder = tmp_path_factory.mktemp("optimizer")
    make_family("moe", folder / "moe")
    return run_world(SCRIPT, 2, str(folder), timeout_s=600)


@pytest.mark.parametrize("name", case_names(SCRIPT))
def test_two_ranks(results: dict[str, Result], name: str) -> None:
    results[name].check()


def test_adam_in_host_memory_is_nothing_to_do_on_a_cpu() -> None:
    given = Config(optimizer_cpu_offload=True, overlap_cpu_optimizer_d2h_h2d=True, use_precision_aware_optimizer=True)
    note, = on_device(given, "cpu").notes
    assert note == ("--optimizer-cpu-offload, --overlap-cpu-optimizer-d2h-h2d, --use-precision-aware-optimizer: nothing to do on a CPU, where Adam "
                    "and its states are in host memory anyway")
    assert on_device(Config(), "cpu").notes == () and not any("--optimizer-cpu-offload" in n for n in on_device(given, "cuda").notes)


@pytest.mark.parametrize("given, problem", [
    (Config(use_precision_aware_optimizer=True), "needs Transformer Engine's Adam"),
    (Config(optimizer_cpu_offload=True, dtype="float32"), "leave --dtype float32 out"),
    (Config(optimizer_cpu_offload=True, megatron={"optimizer_offload_fraction": 0.5}), "leave it out"),
])
def test_what_a_gpu_can_not_do(given: Config, problem: str) -> None:
    on_device(given, "cpu")
    with pytest.raises(ConfigError, match=problem):
        on_device(given, "cuda")


@pytest.mark.parametrize("given, problem", [
    (Config(lr=1e-6, min_lr=1e-5), "min_lr 1e-05 is above lr 1e-06"),
    (Config(lr_warmup_iters=3, lr_warmup_fraction=0.1), "give one of the two"),
    (Config(lr_decay_style="WSD"), "needs --lr-wsd-decay-iters"),
    (Config(lr_wsd_decay_iters=3), "no effect without --lr-decay-style WSD"),
    (Config(end_weight_decay=0.1), "no effect without --weight-decay-incr-style"),
    (Config(weight_decay_incr_style="linear", end_weight_decay=0.1), "needs --start-weight-decay and --end-weight-decay"),
    (Config(weight_decay_incr_style="cosine", start_weight_decay=0.2, end_weight_decay=0.1), "start_weight_decay 0.2 is above end_weight_decay 0.1"),
    (Config(async_save=True), "async_save needs --save"),
])
def test_schedules_that_contradict_themselves(given: Config, problem: str) -> None:
    found, = _optimizer(given)
    assert problem in found
