"""The world of ranks: who is who, how an attempt finds itself, what the sockets let in, and what each room may import."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import datetime
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from torch.distributed import HashStore, TCPStore

from rlmono.config.schema import Config
from rlmono.data.sample import Sample
from rlmono.world import channel, messages
from rlmono.world.channel import PrivateFolder, open_mesh
from rlmono.world.devices import find_problem, refuse_shared
from rlmono.world.launch import RankMisplaced, WorldError, read_launch
from rlmono.world.locks import InUse, hold
from rlmono.world.roles import RankGrid
from rlmono.world.store import join_attempt, store_get

ROOT = Path(__file__).resolve().parents[2]


def config(**values: Any) -> Config:
    return dataclasses.replace(Config(), **values)


# ---------------------------------------------------------------- the rank grid

def test_colocated_ranks_do_everything_but_the_last_of_a_node() -> None:
    grid = RankGrid.for_config(config(colocate=True, rollout_num_gpus_per_engine=2, tensor_model_parallel_size=2), 2, 5)
    assert grid.hosts == (4, 9)
    assert grid.trainers == grid.devices == (0, 1, 2, 3, 5, 6, 7, 8)
    assert grid.engines == ((0, 1), (2, 3), (5, 6), (7, 8))
    assert (grid.world_size, grid.data_parallel_size) == (10, 4)
    assert grid.pool_of(3) == grid.devices and grid.pool_of(9) == (4, 9)
    assert [grid.host_of(r) for r in (0, 3, 4, 5, 9)] == [4, 4, 4, 9, 9]
    assert [grid.role_of(r) for r in (4, 9, 6)] == ["host, controller", "host", "trainer + engine"]
    assert [grid.engine_of(r) for r in (1, 2, 4, 8)] == [0, 1, None, 3]
    lines = grid.lines()
    assert len(lines) == 11 and "2 node(s) x 5 ranks" in lines[0] and "dp 4 x tp 2" in lines[0]
    assert lines[10].split() == ["rank", "9", "node", "1", "host"]


def test_disaggregated_ranks_train_or_serve() -> None:
    grid = RankGrid.for_config(config(actor_num_gpus_per_node=2, rollout_num_gpus=4, rollout_num_gpus_per_engine=2), 1, 7)
    assert (grid.trainers, grid.engines, grid.hosts) == ((0, 1), ((2, 3), (4, 5)), (6,))
    assert grid.pool_of(1) == (0, 1) and grid.pool_of(4) == (2, 3, 4, 5)
    assert [grid.role_of(r) for r in (1, 2)] == ["trainer", "engine"]


def test_disaggregated_over_nodes_trains_on_the_first() -> None:
    grid = RankGrid.for_config(config(actor_num_gpus_per_node=2, rollout_num_gpus=2), 2, 3)
    assert (grid.trainers, grid.engines, grid.hosts) == ((0, 1), ((3,), (4,)), (2, 5))
    assert grid.host_of(3) == 5


def test_an_engine_can_span_nodes() -> None:
    grid = RankGrid.for_config(config(colocate=True, rollout_num_gpus_per_engine=4), 2, 3)
    assert grid.engines == ((0, 1, 3, 4),)


def test_sft_has_no_engine() -> None:
    grid = RankGrid.for_config(config(loss_type="sft"), 1, 3)
    assert (grid.trainers, grid.engines, grid.pool_of(0)) == ((0, 1), (), (0, 1))


@pytest.mark.parametrize("placement", [dict(colocate=True), dict(actor_num_gpus_per_node=2, rollout_num_gpus=2)])
def test_debugging_starts_one_role_alone(placement: dict[str, Any]) -> None:
    grid = RankGrid.for_config(config(debug_rollout_only=True, tensor_model_parallel_size=2, **placement), 1, 3)
    assert (grid.trainers, grid.engines, grid.pool_of(0), grid.data_parallel_size) == ((), ((0,), (1,)), (0, 1), 0)
    grid = RankGrid.for_config(config(debug_train_only=True, tensor_model_parallel_size=2, **placement), 1, 3)
    assert (grid.trainers, grid.engines, grid.pool_of(0), grid.data_parallel_size) == ((0, 1), (), (0, 1), 1)


@pytest.mark.parametrize(("values", "expected"), [
    (dict(colocate=True, actor_num_gpus_per_node=4), (1, 5)),
    (dict(actor_num_gpus_per_node=2, rollout_num_gpus=3, debug_rollout_only=True), (1, 4)),
    (dict(actor_num_gpus_per_node=2, rollout_num_gpus=16, debug_rollout_only=True), (2, 9)),
    (dict(actor_num_gpus_per_node=2, rollout_num_gpus=3, debug_train_only=True), (1, 3)),
    (dict(colocate=True, actor_num_gpus_per_node=8, actor_num_nodes=4), (4, 9)),
    (dict(actor_num_gpus_per_node=2, rollout_num_gpus=2), (1, 5)),
    (dict(actor_num_gpus_per_node=8, actor_num_nodes=2, rollout_num_gpus=16), (4, 9)),
    (dict(loss_type="sft"), (1, 2)),
])
def test_the_world_that_a_config_asks_for(values: dict[str, Any], expected: tuple[int, int]) -> None:
    grid = RankGrid.for_config(config(**values), None, None)
    assert (grid.nodes, grid.ranks_per_node) == expected


@pytest.mark.parametrize(("values", "nodes", "ranks", "text"), [
    (dict(colocate=True), 1, 1, "host rank"),
    (dict(colocate=True, actor_num_gpus_per_node=4), 1, 4, "--nproc-per-node 5"),                       # the host rank is missing
    (dict(colocate=True, actor_num_gpus_per_node=4, actor_num_nodes=2), 1, 5, "start 2 node(s)"),
    (dict(actor_num_gpus_per_node=2, rollout_num_gpus=2), 1, 4, "--nproc-per-node 5"),
    (dict(), 1, 3, "--rollout-num-gpus"),
    (dict(rollout_num_gpus=2, debug_rollout_only=True), 1, 4, "--nproc-per-node 3"),
    (dict(colocate=True, tensor_model_parallel_size=2), 1, 4, "no multiple of tensor 2"),
    (dict(colocate=True, rollout_num_gpus_per_engine=2), 1, 4, "--rollout-num-gpus-per-engine 2"),
    (dict(colocate=True, rollout_num_gpus_per_engine=2), 2, 4, "must divide the node"),
])
def test_a_world_that_does_not_fit_is_refused(values: dict[str, Any], nodes: int, ranks: int, text: str) -> None:
    with pytest.raises(WorldError, match=text.replace("(", r"\(").replace(")", r"\)")):
        RankGrid.for_config(config(**values), nodes, ranks)


# ---------------------------------------------------------------- the launch

TORCHRUN = dict(RANK="4", WORLD_SIZE="6", LOCAL_RANK="1", LOCAL_WORLD_SIZE="3", MASTER_ADDR="a", MASTER_PORT="1234",
                TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="x")
SRUN = dict(SLURM_PROCID="4", SLURM_STEP_NUM_TASKS="6", SLURM_LOCALID="1", SLURM_STEP_TASKS_PER_NODE="3(x2)", MASTER_ADDR="a", MASTER_PORT="1234")


def test_launch_from_torchrun_and_from_srun() -> None:
    by_torchrun, by_srun = read_launch(TORCHRUN), read_launch(SRUN)
    assert (by_torchrun.node, by_torchrun.nodes, by_torchrun.rank, by_torchrun.agent_store, by_torchrun.agent) == (1, 2, 4, True, True)
    assert by_srun == dataclasses.replace(by_torchrun, agent_store=False, agent=False)
    assert read_launch({**TORCHRUN, **SRUN}) == by_torchrun          # torchrun inside of an allocation


@pytest.mark.parametrize(("environ", "text"), [
    ({}, "neither torchrun nor srun.*launch/run.sh"),
    ({k: v for k, v in TORCHRUN.items() if k != "MASTER_ADDR"}, "MASTER_ADDR missing"),
    ({**TORCHRUN, "WORLD_SIZE": "7"}, "7 ranks don't divide into nodes of 3"),
    ({**TORCHRUN, "LOCAL_WORLD_SIZE": "0"}, "don't divide"),
    ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3,2"}, "SLURM_STEP_TASKS_PER_NODE='3,2'.*same number"),
    ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3(x2),4"}, "same number"),
])
def test_a_launch_that_is_not_one_is_refused(environ: dict[str, str], text: str) -> None:
    with pytest.raises(WorldError, match=text):
        read_launch(environ)


def test_ranks_dealt_round_robin_are_refused_by_those_that_see_it() -> None:
    with pytest.raises(RankMisplaced, match="--distribution=block"):
        read_launch({**SRUN, "SLURM_PROCID": "1", "SLURM_LOCALID": "0"})


# ---------------------------------------------------------------- one GPU a rank

def test_each_rank_on_a_gpu_of_its_own_is_fine() -> None:
    assert find_problem({0: "node-a GPU-1", 1: "node-a GPU-2", 3: "node-b GPU-3"}) == ""


@pytest.mark.parametrize(("claims", "text"), [
    ({0: "node-a GPU-1", 1: "node-a GPU-2", 3: "node-a GPU-1"}, "ranks 0 and 3 are on one GPU (GPU-1 of node-a)"),
    ({0: "node-a GPU-1", 1: "node-a none:1"}, "rank 1 has no GPU: node-a shows 1"),
])
def test_ranks_without_a_gpu_of_their_own_are_refused(claims: dict[int, str], text: str) -> None:
    store = HashStore()
    for rank, claim in claims.items():
        store.set(f"gpu/{rank}", claim)
    with pytest.raises(WorldError) as e:
        refuse_shared(store, list(claims), 5)
    assert text in str(e.value) and "launch/run.sh" in str(e.value)


def test_a_rank_that_claims_no_gpu_is_named() -> None:
    with pytest.raises(TimeoutError, match="device rank 1"):
        refuse_shared(_claimed({0: "node-a GPU-1"}), [0, 1], 0.1)


def _claimed(claims: dict[int, str]) -> HashStore:
    store = HashStore()
    for rank, claim in claims.items():
        store.set(f"gpu/{rank}", claim)
    return store


# ---------------------------------------------------------------- the attempt

@pytest.fixture
def store() -> Iterator[TCPStore]:
    yield TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=20))


class Joining(threading.Thread):
    """A rank that joins, over a connection of its own."""

    def __init__(self, served: TCPStore, rank: int, world_size: int, timeout_s: float = 20):
        super().__init__(daemon=True)
        self.client = TCPStore("127.0.0.1", served.port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=20))
        self.args = (rank, world_size, timeout_s)
        self.name_of_attempt, self.error = "", ""
        self.start()

    def run(self) -> None:
        try:
            self.name_of_attempt, self.attempt_store = join_attempt(self.client, *self.args)
        except TimeoutError as e:
            self.error = str(e)

    def joined(self) -> str:
        self.join(30)
        assert not self.is_alive() and not self.error, self.error
        return self.name_of_attempt


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_all_ranks_agree_on_the_attempt_whoever_comes_first(store: TCPStore, order: tuple[int, ...]) -> None:
    ranks = [Joining(store, r, 4) for r in order]
    assert len({r.joined() for r in ranks}) == 1


def test_an_attempt_sees_nothing_of_the_one_before_on_the_same_store(store: TCPStore) -> None:
    first = [Joining(store, r, 3) for r in range(3)]
    name = first[0].joined()
    first[1].joined()
    first[1].attempt_store.set("run_dir", "stale")
    late = [Joining(store, r, 3) for r in (1, 2)]       # of the next attempt, before rank 0: the old hello, answer and heard keys are all there
    again = [*late, Joining(store, 0, 3)]
    names = {r.joined() for r in again}
    assert len(names) == 1 and name not in names
    assert not again[0].attempt_store.check(["run_dir"])
    with pytest.raises(TimeoutError, match="waiting for the controller to publish 'run_dir'"):
        store_get(again[0].attempt_store, "run_dir", 0.1, "the controller")


def test_stale_answers_under_every_old_key_are_not_believed(store: TCPStore) -> None:
    for rank in (1, 2):
        store.set(f"rlmono/hello/{rank}", "0" * 32)
        store.set(f"rlmono/answer/{'0' * 32}", "an-old-attempt")
        store.set(f"rlmono/an-old-attempt/heard/{rank}", "1")
    ranks = [Joining(store, r, 3) for r in (0, 1, 2)]
    assert {r.joined() for r in ranks} != {"an-old-attempt"} and len({r.joined() for r in ranks}) == 1


def test_missing_ranks_are_named_by_rank_0_and_rank_0_by_the_others(store: TCPStore) -> None:
    alone = Joining(store, 0, 4, timeout_s=0.5)
    other = Joining(store, 2, 4)
    alone.join(20)
    assert "rank 0 waits for rank(s) [1, 3] of 4" in alone.error
    assert other.joined()
    lost = Joining(store, 1, 4, timeout_s=0.5)
    lost.join(20)
    assert "rank 1 waits for rank 0" in lost.error


# ---------------------------------------------------------------- locks and private folders

def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    code = ("import sys; from pathlib import Path; from rlmono.world.locks import hold\n"
            f"hold(Path({str(tmp_path / 'lock')!r})); print('held', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with pytest.raises(InUse):
            hold(tmp_path / "lock")
        holder.kill()
    hold(tmp_path / "lock")


def test_socket_folders_of_dead_runs_are_swept_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_short_tmp", lambda: str(tmp_path))
    dead = tmp_path / "rlmono-abcdef-12345678"
    dead.mkdir()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as sock:
        sock.bind(f"ipc://{dead}/host")
        (tmp_path / "kept").mkdir()
        (dead / "host").rename(tmp_path / "kept" / "host")      # else zmq removes it
    (tmp_path / "kept" / "host").rename(dead / "host")
    somebodys = tmp_path / "rlmono-mydata-1"
    somebodys.mkdir()
    (somebodys / "host").write_text("a file")
    alive = PrivateFolder("0123456789ab")
    other = PrivateFolder("ffffffffffff")
    assert not dead.exists() and somebodys.exists() and alive.path.exists()
    assert alive.path.stat().st_mode & 0o777 == 0o700
    alive.close()
    assert not alive.path.exists() and other.path.exists()
    other.close()


# ---------------------------------------------------------------- messages

MESSAGES = [
    messages.Generate("0" * 16, [1, 2], messages.Sampling(5, 0.7, seed=2**61)),
    messages.Abort(), messages.EndPhase(), messages.AbortGroups(), messages.Heartbeat(), messages.Goodbye("why"), messages.Failed("why"),
    messages.Outputs([messages.Output("r", [3], [-0.5], "stop", 2, text="a")]),
    messages.TrainBatch(1, [messages.TrainStep([[messages.TrainSample(0, 0, 1.0, bytes(12), 1, b"\x01", bytes(4))]], 1, 1)], [(0, 0, 1.0)]),
    messages.Report("trained", 3, {"metrics": {"a": 1.5}, "reports": True}),
    messages.RunGroup(7, 0, [Sample(index=1, group_index=0, prompt="p", tokens=[1], metadata={"a": [1]})], messages.Sampling(5), False),
    messages.GroupDone(7, [Sample(index=1, tokens=[1, 2, 3], response_length=2, rollout_log_probs=[-0.5, 0.0], weight_versions=versions, **more)
                           for versions, more in (([4, 4], {}), ([4, 5], {"loss_mask": [1, 0]}), ([], {}), (None, {"reward": {"a": 1.0}}))],
                       error="why", failures=[messages.Failure(3, "generate_error", "why")]),
    messages.Relay(3, msgspec.Raw(messages.encode(messages.EndPhase()))),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_messages_come_back_as_they_were(message: messages.Message) -> None:
    again = messages.decode(messages.encode(message))
    assert type(again) is type(message)
    assert messages.encode(again) == messages.encode(message)
    assert again == message or isinstance(message, messages.Relay)      # whose payload is another view of equal bytes


def test_every_kind_of_message_is_in_the_round_trip() -> None:
    assert {type(m) for m in MESSAGES} == set(messages.Message.__args__)


@pytest.mark.parametrize("garbage", [
    b"", b"garbage", b"\x80\x04\x95", b"\xc1", msgspec.msgpack.encode({"type": "Nobody"}), msgspec.msgpack.encode({"type": "Output"}),
    msgspec.msgpack.encode({"type": "Generate", "rid": 1, "input_ids": [1], "sampling": {}}), messages.encode(MESSAGES[0])[:-3],
    msgspec.msgpack.encode({"type": "Outputs", "items": [{"type": "Output", "rid": "r", "output_ids": bytes(3), "log_probs": bytes(4),
                                                           "finish": "stop", "weight_version": 0}]}),
])
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises((msgspec.DecodeError, ValueError)):
        messages.decode(garbage)


# ---------------------------------------------------------------- hosts among each other

def test_a_host_with_its_key_talks_and_strangers_do_no_harm() -> None:
    shared = HashStore()
    host = threading.Thread(target=lambda: asyncio.run(_echo(shared)), daemon=True)
    host.start()
    asyncio.run(asyncio.wait_for(_talk_among_strangers(shared), 60))
    host.join(10)
    assert not host.is_alive()


async def _echo(shared: HashStore) -> None:
    """Host rank 3: answers what comes, until goodbye."""
    context = zmq.asyncio.Context()
    mesh = open_mesh(context, shared, 3, (1, 3), "127.0.0.1", 20)
    message: messages.Message = messages.Heartbeat()
    while not isinstance(message, messages.Goodbye):
        await mesh.socket.send(messages.encode(message))
        message = messages.decode(await asyncio.wait_for(mesh.socket.recv(), 30))
    mesh.close()
    context.term()


async def _talk_among_strangers(shared: HashStore) -> None:
    context = zmq.asyncio.Context()
    controller = open_mesh(context, shared, 1, (1, 3), "127.0.0.1", 20)
    address, server_key = shared.get("controller/address").decode(), shared.get("host/1/key")
    other_keys = ((zmq.curve_keypair(), server_key), (zmq.curve_keypair(), zmq.curve_keypair()[0]), None)
    strangers = [_dealer(context, address, keys, b"3") for keys in other_keys]
    for sock in strangers:
        await sock.send(b"let me in")
    assert await _heard(controller) == messages.Heartbeat()
    for i in range(20):
        await controller.socket.send_multipart([b"3", messages.encode(messages.Failed(f"number {i}"))])
        assert await _heard(controller) == messages.Failed(f"number {i}")
    await controller.socket.send_multipart([b"3", messages.encode(messages.Goodbye())])
    assert not await controller.socket.poll(300)    # nothing of the strangers' has come, and they got nothing
    assert not any([await sock.poll(0) for sock in strangers])
    for sock in strangers:
        sock.close(0)
    controller.close()
    context.term()


async def _heard(mesh: channel.HostMesh) -> messages.Message:
    identity, payload = await asyncio.wait_for(mesh.socket.recv_multipart(), 30)
    assert identity == b"3"
    return messages.decode(payload)


def _dealer(context: zmq.asyncio.Context, address: str, keys: Any, identity: bytes) -> zmq.asyncio.Socket:
    sock = context.socket(zmq.DEALER)
    sock.setsockopt(zmq.IDENTITY, identity)
    sock.setsockopt(zmq.LINGER, 0)
    if keys is not None:
        (sock.curve_publickey, sock.curve_secretkey), sock.curve_serverkey = keys
    sock.connect(address)
    return sock


# ---------------------------------------------------------------- who may import what

TORCH_DISTRIBUTED, SGLANG, MEGATRON = "torch.distributed", "sglang", "megatron"
FORBIDDEN = {"rollout": (TORCH_DISTRIBUTED, SGLANG, MEGATRON), "agents": (TORCH_DISTRIBUTED, SGLANG, MEGATRON),
             "rewards": (TORCH_DISTRIBUTED, SGLANG, MEGATRON, "torch"), "data": (SGLANG, MEGATRON),
             "observe": (SGLANG, MEGATRON), "config": (SGLANG, MEGATRON), "world": (SGLANG, MEGATRON), "trainer": (SGLANG,), "models": (SGLANG,),
             "engine": (MEGATRON,)}
ORDER = (("loop", "convert"), ("agents",), ("rollout", "trainer", "engine", "weights", "memory", "checkpoint"),
         ("models", "data", "world", "observe", "rewards"), ("config",))
"""Arrows point down, or to a room of the same row."""
UPWARD = {"config/hf.py: rlmono.models.registry.shape_from_hf", "config/hf.py: rlmono.models.registry.changed_values",
          "config/show.py: rlmono.world.roles.RankGrid"}
"""Except these, inside functions: a shape comes from the family that knows the model, and a dry run shows the grid."""


def _imports(file: Path) -> list[tuple[str, bool]]:
    """(absolute name, whether it is for types only) of everything that a file imports, anywhere in it."""
    out = []
    tree = ast.parse(file.read_text())
    for_types = {id(n) for block in ast.walk(tree) if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test) for n in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out += [(a.name, id(node) in for_types) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            out += [(f"{node.module}.{a.name}", id(node) in for_types) for a in node.names]
    return out


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_no_stranger(room: str) -> None:
    files = sorted((ROOT / "rlmono" / room).rglob("*.py"))
    assert len(files) > 1
    found = [f"{f.name}: {name}" for f in files for name, _ in _imports(f) for bad in FORBIDDEN[room] if f"{name}.".startswith(f"{bad}.")]
    assert found == []


def test_arrows_between_rooms_point_down() -> None:
    row = {room: i for i, rooms in enumerate(ORDER) for room in rooms}
    found = []
    for room in row:
        for file in (ROOT / "rlmono" / room).rglob("*.py"):
            for name, for_types in _imports(file):
                other = name.split(".")[1] if name.startswith("rlmono.") and name.count(".") else room
                if not for_types and row.get(other, len(ORDER)) < row[room]:
                    found.append(f"{room}/{file.name}: {name}")
    assert set(found) == UPWARD


def test_every_room_is_in_the_order() -> None:
    rooms = {p.parent.name for p in (ROOT / "rlmono").glob("*/__init__.py")}
    assert rooms <= {room for row in ORDER for room in row}


def test_a_host_has_neither_sglang_nor_megatron_nor_cuda() -> None:
    code = ("import sys, rlmono.loop.host, rlmono.loop.start, torch\n"
            "print([m for m in sys.modules if m.split('.')[0] in ('sglang', 'megatron', 'triton')], torch.cuda.is_initialized())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[] False", done.stdout + done.stderr
