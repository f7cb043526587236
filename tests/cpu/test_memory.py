"""The swap: what its plan decides, that what leaves comes back, and what a node's host memory is taken to be. On a GPU, tests/gpu measures it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlmono.memory import plan
from rlmono.memory.holding import Holding
from rlmono.memory.host import CHUNK, PIECE, HostMemory, available_bytes
from rlmono.memory.plan import GIB, Budget, choose
from rlmono.memory.swap import Memory

# Qwen3-4B on one H200: 4.02e9 parameters, 135 GiB for both roles.
FOUR_B = plan.trainer_bytes(4_022_468_096, 0, 1, 2)


def budget(cache_gib: float, capacity_gib: float = 131, frozen: int = 0, **more: Any) -> Budget:
    return Budget(int(capacity_gib * GIB), FOUR_B | {"frozen": frozen}, FOUR_B["params"], int(cache_gib * GIB), **more)


def test_bytes_of_a_trainer() -> None:
    n = 1000
    assert plan.trainer_bytes(n, 0, 1, 2) == {"params": 2 * n, "gradients": 4 * n, "optimizer": 12 * n, "frozen": 0}
    assert plan.trainer_bytes(n, n, 4, 2) == {"params": 2 * n, "gradients": 4 * n, "optimizer": 3 * n, "frozen": 2 * n}
    assert plan.trainer_bytes(n, 0, 1, 4)["optimizer"] == 8 * n, "fp32 weights have no second copy"


def test_cache_bytes_a_token() -> None:
    shape = dict(num_layers=36, num_query_groups=8, kv_channels=128)
    assert plan.cache_bytes_a_token(shape, 1, 2) == 36 * 2 * 8 * 128 * 2 == 147456
    assert plan.cache_bytes_a_token(shape, 2, 2) == 147456 // 2
    assert plan.cache_bytes_a_token(shape, 16, 2) == 147456 // 8, "heads are copied when there are fewer than ranks"
    latent = dict(num_layers=2, multi_latent_attention=True, kv_lora_rank=512, qk_pos_emb_head_dim=64, num_query_groups=8, kv_channels=128)
    assert plan.cache_bytes_a_token(latent, 4, 2) == 2 * 576 * 2


def test_auto_moves_as_little_as_the_cache_allows() -> None:
    rungs = [choose("auto", budget(wanted)).rung for wanted in (10, 24, 44, 60, 500)]
    assert rungs == ["none", "none", "none", "gradients", "gradients"], rungs
    tight = [choose("auto", budget(wanted, capacity_gib=85)).rung for wanted in (5, 20, 60)]
    assert tight == ["none", "gradients", "optimizer"], tight
    assert choose("auto", budget(1000, capacity_gib=74, frozen=FOUR_B["params"])).rung == "optimizer"
    big = {k: 4 * v for k, v in FOUR_B.items()}
    assert choose("auto", Budget(50 * GIB, big, 0, 60 * GIB)).rung == "all"
    assert choose("auto", None).leaves == ()


def test_each_rung_leaves_more_room() -> None:
    sizes = [budget(0, frozen=GIB).cache(rung) for rung in plan.LEAVES]
    assert sizes == sorted(set(sizes))
    for a, b in zip(plan.LEAVES.values(), list(plan.LEAVES.values())[1:], strict=False):
        assert set(a) < set(b)


def test_a_forced_policy_is_kept_to() -> None:
    for policy in plan.POLICIES[1:]:
        assert choose(policy, budget(1)).leaves == plan.LEAVES[policy]
    assert choose("optimizer", None).host_bytes(FOUR_B) == FOUR_B["optimizer"]
    assert choose("all", None).host_bytes(FOUR_B) == FOUR_B["optimizer"] + FOUR_B["params"], "gradients are dropped"


def test_host_memory_is_refused_where_it_is_not_there() -> None:
    plan.refuse_host_memory(40 * GIB, 100 * GIB, 2, "here")
    with pytest.raises(MemoryError, match=r"--offload-train all: 4 rank\(s\) of this node want 160.0 GiB.*100.0 GiB are free: .*--host-memory-gib"):
        plan.refuse_host_memory(40 * GIB, 100 * GIB, 4, "--offload-train all")


def test_the_table_says_where_each_tag_goes() -> None:
    text = plan.table(FOUR_B, choose("optimizer", None))
    assert [line.split()[0::3] for line in text.splitlines()[1:]] == [["params", "stays"], ["gradients", "dropped"], ["optimizer", "host"],
                                                                      ["frozen", "host"]]


# ---------------------------------------------------------------- what a node has

def node(root: Path, available_kib: int, cgroup: str, **files: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 9999999 kB\nMemAvailable: {available_kib} kB\nHugePages_Total: 0\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_available_is_the_least_of_kernel_and_cgroups(tmp_path: Path) -> None:
    assert available_bytes(node(tmp_path / "a", 1000, "0::/\n")) == 1000 * 1024
    inner = {"job__memory.max": "max", "job__memory.current": "5", "job__step__memory.max": "700000", "job__step__memory.current": "500000",
             "job__step__memory.stat": "anon 5\ninactive_file 100000\n"}
    assert available_bytes(node(tmp_path / "b", 1000, "0::/job/step\n", **inner)) == 300000
    outer = {"job__memory.max": "90000", "job__memory.current": "80000", "job__step__memory.max": "max", "job__step__memory.current": "5"}
    assert available_bytes(node(tmp_path / "c", 1000, "0::/job/step\n", **outer)) == 10000, "a limit further up counts too"
    old = {"memory__x__memory.limit_in_bytes": "600000", "memory__x__memory.usage_in_bytes": "500000"}
    assert available_bytes(node(tmp_path / "d", 1000, "4:cpu:/x\n5:memory:/x\n", **old)) == 100000
    assert available_bytes(tmp_path / "nothing") == 0
    assert available_bytes() > 2**20


# ---------------------------------------------------------------- leaving and coming back

def test_storages_leave_and_come_back() -> None:
    big = torch.randn(1000)
    view = big[10:20].view(2, 5)
    small = [torch.randn(7), torch.randint(0, 9, (3, 5)), torch.randn(4, dtype=torch.float64).to(torch.bfloat16)]
    expected = [t.clone() for t in (big, view, *small)]
    holding = Holding("x", [big, view, *small], kept=True, together=True)
    assert len(holding.storages) == 2, "what is small lies together"
    assert holding.nbytes >= 4000
    memory = HostMemory(2**20, pin=False)
    holding.reserve(memory)
    for _ in range(3):
        assert holding.start_out() == holding.nbytes
        holding.leave()
        assert not holding.here and all(s.nbytes() == 0 for s in holding.storages)
        assert holding.come() == holding.nbytes
        holding.wait()
        for t, e in zip((big, view, *small), expected, strict=True):
            assert torch.equal(t, e)
        big += 1
        expected = [t.clone() for t in (big, view, *small)]


def test_views_that_nobody_names_follow() -> None:
    """Megatron's parameters are views of buffers: buffers stay what they are."""
    buffers = [torch.randn(10), torch.randn(20)]
    parameters = [b[2:8] for b in buffers]
    expected = [p.clone() for p in parameters]
    holding = Holding("params", buffers, kept=True)
    assert len(holding.storages) == 2
    holding.reserve(HostMemory(4096, pin=False))
    holding.leave()
    holding.come()
    assert all(torch.equal(p, e) for p, e in zip(parameters, expected, strict=True))
    buffers[1].zero_()
    assert not parameters[1].any()


def test_what_never_changes_is_copied_out_once() -> None:
    t = torch.arange(100.0)
    holding = Holding("frozen", [t], kept=True, constant=True)
    holding.reserve(HostMemory(4096, pin=False))
    assert [holding.leave(), holding.come(), holding.leave(), holding.come()] == [400, 400, 0, 400]
    assert torch.equal(t, torch.arange(100.0))


def test_what_is_dropped_comes_back_empty_and_costs_no_copy() -> None:
    t = torch.ones(100)
    holding = Holding("gradients", [t], kept=False)
    assert (holding.leave(), t.untyped_storage().nbytes(), holding.come(), t.untyped_storage().nbytes()) == (0, 0, 0, 400)


def test_copies_do_not_cross_pinned_pieces() -> None:
    memory = HostMemory.__new__(HostMemory)
    memory._all = torch.empty(0, dtype=torch.uint8)
    taken = torch.empty(0, dtype=torch.uint8)

    class At:
        def __init__(self, start: int, length: int):
            self.start, self.length = start, length

        def data_ptr(self) -> int:
            return memory._all.data_ptr() + self.start

        def __len__(self) -> int:
            return self.length
    assert list(memory.pieces(At(0, 10))) == [(0, 10)]      # type: ignore[arg-type]
    found = list(memory.pieces(At(CHUNK - 10, CHUNK + 20)))         # type: ignore[arg-type]
    assert found[:2] == [(0, 10), (10, 10 + PIECE)] and found[-2:] == [(10 + CHUNK - PIECE, 10 + CHUNK), (10 + CHUNK, CHUNK + 20)]
    assert [b for _, b in found[:-1]] == [a for a, _ in found[1:]]
    assert list(memory.pieces(taken)) == []


def test_more_host_memory_than_planned_is_an_error() -> None:
    with pytest.raises(MemoryError, match="were planned"):
        HostMemory(1000, pin=False).take(2000)


def test_a_failure_to_pin_reaches_who_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> None:
        raise RuntimeError("cudaHostRegister: 2")
    monkeypatch.setattr("rlmono.memory.host._pin", refuse)
    monkeypatch.setattr("torch.cuda.current_device", lambda: None)
    with pytest.raises(MemoryError, match=r"1.0 GiB of host memory can't be pinned: cudaHostRegister: 2"):
        HostMemory(1000, pin=True).take(10)


class FakeEngine:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def pause(self, tag: str) -> None:
        self.calls.append(f"-{tag}")

    def resume(self, tag: str) -> None:
        self.calls.append(f"+{tag}")


def test_states_move_only_what_changes() -> None:
    engine = FakeEngine()
    memory = Memory(object(), choose("optimizer", None), HostMemory(2**20, pin=False))
    params, state, gradients = torch.randn(50), torch.randn(100), torch.randn(50)

    def sizes() -> list[int]:           # a failing test must not print a tensor that is away
        return [t.untyped_storage().nbytes() for t in (state, gradients)]
    memory.adopt({"params": [params], "optimizer": [state], "gradients": [gradients]})
    memory.to("boot")
    assert memory._present == {"params"}
    memory.add_engine(engine)
    memory.to("sync")
    assert engine.calls == ["-kv_cache"]
    memory.to("rollout")
    assert engine.calls == ["-kv_cache", "+kv_cache"]
    kept = torch.randn(100)
    engine.calls.clear()
    memory.to("train")
    assert engine.calls == ["-kv_cache", "-cuda_graph", "-weights"] and memory._present == {"params", "optimizer", "gradients", "frozen"}
    state.copy_(kept)
    engine.calls.clear()
    memory.to("sync")
    assert engine.calls == ["+cuda_graph", "+weights"] and sizes() == [400, 0], "it leaves beside the update"
    memory.to("rollout")
    assert sizes() == [0, 0]
    memory.to("train")
    memory.wait()
    assert torch.equal(state, kept)
    assert "optimizer 0.0 GiB here" in memory.where() and "in state train" in memory.where()
    report = memory.report()
    assert report["perf/memory/train_to_sync_gib"] * GIB == 400 and report["perf/memory/sync_to_rollout_gib"] == 0
    with pytest.raises(ValueError, match="no such memory state"):
        memory.to("elsewhere")


@pytest.mark.parametrize("room", [True, False])
def test_what_leaves_goes_on_beside_the_rollout_where_there_is_room(monkeypatch: pytest.MonkeyPatch, room: bool) -> None:
    """With a GPU's part played: the KV cache comes before the optimizer's state has left only if both fit."""
    free = {"sync": 10**12, "rollout": 10**12 if room else plan.RESERVE - 1}
    memory = Memory(object(), choose("optimizer", None), HostMemory(2**20, pin=False))
    monkeypatch.setattr("rlmono.memory.swap._cuda", lambda: True)
    monkeypatch.setattr("rlmono.memory.swap._free", lambda: free.get(memory.going, 10**12))     # type: ignore[attr-defined]
    for name in ("_synchronize", "_empty_cache"):
        monkeypatch.setattr(f"rlmono.memory.swap.{name}", lambda: None)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    state, found = torch.randn(100), []

    class Watching(FakeEngine):
        def resume(self, tag: str) -> None:
            found.append((tag, state.untyped_storage().nbytes()))

    def to(name: str) -> None:
        memory.going = name             # type: ignore[attr-defined]
        memory.to(name)
    memory.adopt({"optimizer": [state]})
    memory.add_engine(Watching())
    for name in ("train", "sync", "rollout"):
        to(name)
    assert found == [("cuda_graph", 400), ("weights", 400), ("kv_cache", 400 if room else 0)]
    memory.wait()
    assert state.untyped_storage().nbytes() == 0 and "optimizer" not in memory._present
    kept = memory.holdings["optimizer"]._host[0].clone()
    to("train")
    memory.wait()
    assert torch.equal(state.view(torch.uint8), kept)
    to("sync")
    monkeypatch.setattr(memory.holdings["optimizer"], "leave", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):      # beside the rollout it is told by what comes next
        to("rollout")
        to("train")
