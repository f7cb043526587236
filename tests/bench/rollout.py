"""What one host rank carries: `python tests/bench/rollout.py`. Writes docs/benchmarks/rollout.json and docs/benchmarks.md.

The product's own `NodeHost` and `Cluster`, with reward workers, run in this process as they do in the controller of a node with eight
engines. The engines are stand-ins in a process of their own (engines.py) that speak the real messages over the real unix socket and
answer at a set rate, so that the host's code is what is measured. Parts, all by default:

    carry       requests that it finishes a second, and what a bare loop over the same socket does
    latency     what it adds to a request at half of the load that it must carry
    exact       200,000 requests: each answered by its own answer, once, in memory that does not grow
    engine      the real CPU engine with the host, against a bare loop over the same scheduler

The machine should do nothing else: the engines, the reward worker and the host need two cores between them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "python tests/bench/rollout.py"
ENGINES, GROUP, PROMPT, VOCABULARY = 8, 8, 256, 150_000
BASE = 100_000
"""A sample's number is the last two tokens of its prompt, and so the first two of its answer: number = a·BASE + b."""
LOADS = {128: 3000, 8192: 150}
"""Tokens a response -> requests a second that a host must carry."""


def main() -> int:
    """0 when every figure has met its target."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bench"), str(ROOT / "tests" / "cpu")]
    import figures
    makers = {"carry": carry, "latency": latency, "exact": exact, "engine": engine}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", default=list(makers), help="carry, latency, exact, engine; the others' figures are kept")
    parts = parser.parse_args().parts
    path = figures.FOLDER / "rollout.json"
    kept = [f for f in (json.loads(path.read_text()) if path.exists() else []) if f["command"] not in {f"{COMMAND} {p}" for p in parts}]
    machine, found = figures.this_machine(), []
    for part in parts:
        with tempfile.TemporaryDirectory() as tmp:
            make_tokenizer(Path(tmp))
            make_texts(Path(tmp))
            for f in makers[part](Path(tmp)):
                mark = "      " if figures.met(f) else "MISSED"
                print(f"{mark} {f['name']}: {f['value']:.4g} {f['unit']}  {f['target']}  ({f['reference']}; {f.get('note', '')})", flush=True)
                found.append(f | {"command": f"{COMMAND} {part}", "machine": machine})
    figures.write("rollout", sorted(kept + found, key=lambda f: f["command"]))
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}")
    return 0 if all(map(figures.met, found)) else 1


def figure(name: str, value: float, unit: str, target: str, reference: str, note: str = "") -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "target": target, "reference": reference} | ({"note": note} if note else {})


# ---------------------------------------------------------------- the product

async def unrewarded(args: Any, sample: Any, sampling: Any, state: Any) -> Any:
    """A generate function that rewards its samples itself: nothing is sent to reward workers."""
    from rlmono.rollout.generate import generate
    sample = await generate(args, sample, sampling, state)
    sample.reward = 0.0
    return sample


def reward(args: Any, sample: Any, **_: Any) -> float:
    """As little as a reward can do that reads the response."""
    return float(len(sample.response) % 2)


class Host:
    """A node's host with its stand-ins, or with an engine of which `ready` tells. Build it with `host()`."""

    def __init__(self, cluster: Any, tokens: int, base: int = BASE):
        from rlmono.world.messages import Sampling
        self.cluster, self.sampling, self.number, self._base = cluster, Sampling(tokens, ignore_eos=True), 0, base

    def group(self, size: int = GROUP) -> list[Any]:
        from rlmono.data.sample import Sample
        first, self.number, base = self.number, self.number + size, self._base
        return [Sample(index=i, group_index=first // size, tokens=[7] * (PROMPT - 2) + [i // base, i % base]) for i in range(first, first + size)]

    async def rollout(self, groups: int, lengths: Sequence[int] = ()) -> list[Any]:
        """As the controller does it: all groups at once, results in order. `lengths` are the groups' numbers of tokens, where they differ."""
        sampling = [self.sampling] * groups if not lengths else [msgspec.structs.replace(self.sampling, max_new_tokens=n) for n in lengths]
        done = await self.cluster.gather([self.cluster.run_group(self.group(), s, False) for s in sampling], 600, "the bench")
        return [s for g in done for s in g]


@contextlib.asynccontextmanager
async def host(folder: Path, tokens: int, rate: float = 0.0, delay_s: float = 0.0, spread: float = 0.0, function: str = "") -> AsyncIterator[Host]:
    """With stand-ins; see engines.py for `rate`, `delay_s` and `spread`. `function` is a generate function of this file."""
    async with cluster(folder, ENGINES, **_function(function)) as (c, address):
        engines = stand_ins(folder, address, tokens, rate, delay_s, spread)
        try:
            await c.reports("ready", 0, c.grid.devices, 120)
            yield Host(c, tokens)
            c.end_phase()
            await asyncio.to_thread(engines.wait, 20)
        finally:
            engines.kill()


def _function(name: str) -> dict[str, str]:
    return {"custom_generate_function_path": f"{__file__}:{name}"} if name else {}


def stand_ins(folder: Path, address: str, tokens: int, rate: float = 0.0, delay_s: float = 0.0, spread: float = 0.0) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(Path(__file__).with_name("engines.py")), str(folder), address, *map(str, (ENGINES, tokens, rate, delay_s, spread))]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path})


@contextlib.asynccontextmanager
async def cluster(folder: Path, engines: int, **options: Any) -> AsyncIterator[tuple[Any, str]]:
    """(the controller's view of one node with so many engines, the address of its socket)."""
    import zmq.asyncio

    from rlmono.config.schema import Config
    from rlmono.rollout.cluster import Cluster
    from rlmono.rollout.host import NodeHost
    from rlmono.world.channel import PrivateFolder
    from rlmono.world.roles import RankGrid
    config = dataclasses.replace(Config(), hf_checkpoint=str(folder), colocate=True, actor_num_gpus_per_node=engines,
                                 model={"vocab_size": VOCABULARY, "max_position_embeddings": 40_960}, custom_rm_path=f"{__file__}:reward", **options)
    grid = RankGrid.for_config(config, 1, engines + 1)
    sockets, context = PrivateFolder("bench0"), zmq.asyncio.Context()
    c = Cluster(config, grid, NodeHost(config, grid, engines, sockets, context, lambda *_: None), None)
    try:
        await c.start()
        yield c, sockets.address
    finally:
        await c.close()
        context.term()
        sockets.close()


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer with as many tokens as those of large models; decoding needs no merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    draw, alphabet = random.Random(0), sorted(pre_tokenizers.ByteLevel.alphabet())
    words = list(alphabet)
    seen = set(words)
    letters = [c for c in alphabet if c.isascii() and c.isalpha()]
    while len(words) < VOCABULARY:
        word = ("Ġ" if draw.random() < 0.5 else "") + "".join(draw.choices(letters, k=draw.randrange(2, 7)))
        if word not in seen:
            seen.add(word)
            words.append(word)
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": words[0], "fix_mistral_regex": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "eos_token_id": 0}))


def make_texts(folder: Path) -> None:
    """What the stand-ins say."""
    import engines

    from rlmono.data.tokenizer import Tokenizer
    tokenizer = Tokenizer(str(folder))
    (folder / "texts").mkdir()
    for n in LOADS:
        (folder / "texts" / f"{n}.txt").write_bytes(tokenizer.decode(engines.answer(n), True).encode())


# ---------------------------------------------------------------- carry

def carry(tmp: Path) -> Iterator[dict[str, Any]]:
    """Engines that answer at 1.5 times the load that a host must carry: what it finishes is its own limit, or theirs."""
    for tokens, load in LOADS.items():
        size = f"{tokens}-token responses"
        bare = echoed(tmp, tokens, load * 3)
        yield figure(f"a bare loop over the same socket, {size}", bare, "requests/s", "", "a ceiling of the messages and the engines' process")
        for rewards in (True, False):
            rate, cpu = asyncio.run(carried(tmp, tokens, load * 1.5, rewards, load // 4))
            what = "rewarded in a worker" if rewards else "without rewards"
            yield figure(f"finished, {size}, {what}", rate, "requests/s", f">= {load}", f"a bare loop in the same run: {bare:.0f}/s",
                         f"engines answer {load * 1.5:g}/s; the loop takes {cpu * 1e6:.0f} µs a request, so {1 / cpu:.0f}/s of a core")


async def carried(folder: Path, tokens: int, rate: float, rewards: bool, groups: int) -> tuple[float, float]:
    """(requests a second, CPU seconds of the event loop's thread a request), the median of four rollouts after one."""
    async with host(folder, tokens, rate, function="" if rewards else "unrewarded") as h:
        await h.rollout(groups)
        rates, loop = [], time.thread_time()
        for _ in range(4):
            begun = time.perf_counter()
            check(await h.rollout(groups), tokens)
            rates.append(groups * GROUP / (time.perf_counter() - begun))
        return statistics.median(rates), (time.thread_time() - loop) / (4 * groups * GROUP)


def check(samples: list[Any], tokens: int) -> None:
    """Every sample has its own answer, once."""
    from rlmono.data.sample import Sample
    for s in samples:
        assert s.response_length == tokens == s.length - PROMPT == Sample.rollout_log_probs.count(s), s.index
        assert _own(s) == s.index and s.reward is not None and s.response, s.index


def _own(sample: Any) -> int:
    """The number that the answer says it is to."""
    from rlmono.data.sample import Sample
    ids = Sample.tokens.view(sample)
    return int(ids[PROMPT] * BASE + ids[PROMPT + 1])


def echoed(folder: Path, tokens: int, requests: int) -> float:
    """Requests a second of a loop that does nothing but encode, send, receive and decode."""
    from rlmono.world.messages import Generate, Outputs, Sampling, decode, encode
    with bare_socket(folder, tokens) as router:
        begun, done = time.perf_counter(), 0
        for i in range(requests):
            router.send_multipart([str(i % ENGINES).encode(), encode(Generate(f"{i:016x}", [7] * PROMPT, Sampling(tokens)))])
        while done < requests:
            message = decode(router.recv_multipart()[1])
            assert isinstance(message, Outputs)
            done += len(message.items)
        return requests / (time.perf_counter() - begun)


@contextlib.contextmanager
def bare_socket(folder: Path, tokens: int, *pace: float) -> Iterator[Any]:
    """A host's socket by itself, with stand-ins that are ready."""
    import zmq

    from rlmono.world.channel import PrivateFolder
    from rlmono.world.messages import EndPhase, encode
    sockets, context = PrivateFolder("bench0"), zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.SNDHWM, 0)
    router.setsockopt(zmq.RCVHWM, 0)
    router.bind(sockets.address)
    engines = stand_ins(folder, sockets.address, tokens, 0.0, *pace)
    try:
        for _ in range(ENGINES):
            router.recv_multipart()         # ready
        yield router
        for i in range(ENGINES):
            router.send_multipart([str(i).encode(), encode(EndPhase())])
        engines.wait(20)
    finally:
        engines.kill()
        context.destroy(0)
        sockets.close()


# ---------------------------------------------------------------- latency

DELAY_S = 0.1
SECONDS = {128: 8.0, 8192: 30.0}
"""Tokens a response -> how long a case takes: two thousand requests and more, of which a hundredth is still some."""
ENDINGS = (("each after a time of its own", 0.5), ("a group's all at once", 0.0))
"""How the answers to a group come, and the engine's `spread`. Responses differ in length; they end together when the limit cuts them all."""


def latency(tmp: Path) -> Iterator[dict[str, Any]]:
    """Prompts come one by one, at random moments, each with a group's requests. What a request takes beyond its engine's time, in three parts:
    from when it is made to when its engine has it; from when that has its answer to when the generate function has it; and from there to the
    sample with its text and reward. Held against a loop that sends and receives the same messages at the same moments, and does nothing else."""
    for tokens, load in LOADS.items():
        yield figure(f"an engine makes the text of a response of {tokens} tokens, median", text_s(tmp, tokens) * 1e3, "ms", "",
                     "before it sends the answer, and in its own rank; stand-ins have theirs")
        for how, spread in ENDINGS:
            bare = paced(tmp, tokens, load / 2, spread)
            floor = f"there {_tail(bare[0])}, back {_tail(bare[1])}, both {_tail(map(sum, zip(*bare, strict=True)))} ms"
            parts = asyncio.run(added_s(tmp, tokens, load / 2, spread))
            whole = [sum(p) for p in zip(*parts, strict=True)]
            there, back, rewarded = map(_tail, parts)
            yield figure(f"added to a request of {tokens} tokens, {how}, p99", _p99(whole), "ms", "<= 5",
                         f"a bare loop in the same run, median and p99: {floor}",
                         f"{load // 2} requests a second in groups of {GROUP}; median and p99: whole {_tail(whole)}, to the engine {there}, "
                         f"the answer {back}, reward {rewarded} ms; {len(whole)} requests")


def text_s(folder: Path, tokens: int) -> float:
    """The median of 200, with a pause before each, as an engine has between responses."""
    import engines

    from rlmono.data.tokenizer import Tokenizer
    table, ids, took = Tokenizer(str(folder)).byte_table, array("i", engines.answer(tokens)), []
    assert table is not None
    for _ in range(200):
        time.sleep(0.005)
        begun = time.perf_counter()
        table.decode(ids, False)
        took.append(time.perf_counter() - begun)
    return statistics.median(took)


def _p99(seconds: Iterable[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98] * 1e3


def _tail(seconds: Iterable[float]) -> str:
    seconds = list(seconds)
    return f"{statistics.median(seconds) * 1e3:.1f} and {_p99(seconds):.1f}"


def moments(tokens: int, rate: float) -> Iterator[float]:
    """When prompts come, in seconds from the beginning."""
    draw, at = random.Random(0), 0.0
    while at < SECONDS[tokens]:
        at += draw.expovariate(rate / GROUP)
        yield at


async def added_s(folder: Path, tokens: int, rate: float, spread: float) -> tuple[list[float], list[float], list[float]]:
    """The three parts of each request, in seconds; without those of the first second. Clocks are the machine's monotonic one."""
    import engines

    from rlmono.world.messages import Output
    made, answers, ended = dict[int, float](), dict[int, tuple[float, float, float]](), dict[int, float]()
    async with host(folder, tokens, delay_s=DELAY_S, spread=spread) as h:
        node = h.cluster.host

        def answered(output: Any, ids: list[int], *_: Any) -> None:
            now = time.monotonic()
            answers[_number(ids)] = (*engines.times(Output.log_probs.view(output)), now)
        for e in node.engines.values():
            e.generate = _noting(e.generate, answered)
        node.rewards.reward = _noting(node.rewards.reward, lambda _, samples, *__: ended.update({s.index: time.monotonic() for s in samples}))

        async def one() -> Any:
            group, now = h.group(), time.monotonic()
            made.update({s.index: now for s in group})
            return await h.cluster.run_group(group, h.sampling, False)
        begun, tasks = time.monotonic(), []
        for at in moments(tokens, rate):
            await asyncio.sleep(max(0.0, begun + at - time.monotonic()))
            tasks.append(asyncio.create_task(one()))
        await asyncio.gather(*tasks)        # as a controller does, they keep their samples until all are there
    times = [(made[i], *answers[i], ended[i]) for i in made if made[i] > begun + 1]
    return [came - at for at, came, *_ in times], [had - went for _, _, went, had, _ in times], [end - had for *_, had, end in times]


def _noting(function: Any, note: Callable[..., None]) -> Any:
    """The coroutine function, with a look at its result and arguments."""
    async def noting(*given: Any) -> Any:
        result = await function(*given)
        note(result, *given)
        return result
    return noting


def _number(ids: Sequence[int]) -> int:
    return ids[PROMPT - 2] * BASE + ids[PROMPT - 1]


def paced(folder: Path, tokens: int, rate: float, spread: float) -> tuple[list[float], list[float]]:
    """The first two parts, of a loop that does nothing but encode, send, receive and decode."""
    import engines

    from rlmono.world.messages import Generate, Output, Outputs, Sampling, decode, encode
    made, there, back = dict[int, float](), [], []
    with bare_socket(folder, tokens, DELAY_S, spread) as router:
        def receive() -> None:
            message, now = decode(router.recv_multipart()[1]), time.monotonic()
            assert isinstance(message, Outputs)
            for item in message.items:
                ids = Output.output_ids.view(item)
                at, (came, went) = made.pop(ids[0] * BASE + ids[1]), engines.times(Output.log_probs.view(item))
                if at > begun + 1:
                    there.append(came - at)
                    back.append(now - went)
        begun, number = time.monotonic(), 0
        for at in moments(tokens, rate):
            while (left := begun + at - time.monotonic()) > 0:
                if router.poll(left * 1e3):
                    receive()
            now, engine = time.monotonic(), str(number // GROUP % ENGINES).encode()
            for i in range(number, number + GROUP):
                made[i] = now
                router.send_multipart([engine, encode(Generate(f"{i:016x}", [7] * (PROMPT - 2) + [i // BASE, i % BASE], Sampling(tokens)))])
            number += GROUP
        while made:
            receive()
    return there, back


# ---------------------------------------------------------------- exact

def exact(tmp: Path) -> Iterator[dict[str, Any]]:
    requests = 200_000
    lost, strays, memory = asyncio.run(counted(tmp, requests))
    warm = memory[len(memory) // 4:]
    spread = max(abs(m / statistics.median(warm) - 1) for m in warm) * 100
    yield figure(f"of {requests:,} requests answered out of order: lost, doubled or with another's answer", lost, "samples", "<= 0",
                 "each sample names its request")
    yield figure("answers that nobody waited for", strays, "answers", "<= 0", "each request is answered once")
    yield figure("memory of the host after the first quarter: largest difference from its median", spread, "%", "<= 5",
                 f"{statistics.median(warm) / 2**20:.0f} MiB resident", f"from {memory[0] / 2**20:.0f} MiB after the first rollout")


async def counted(folder: Path, requests: int) -> tuple[int, int, list[int]]:
    groups, memory, wrong, seen = 500, [], 0, bytearray(requests)
    async with host(folder, 128) as h:
        for _ in range(requests // (groups * GROUP)):
            samples = await h.rollout(groups)
            for s in samples:
                seen[s.index] += 1
                wrong += s.response_length != 128 or _own(s) != s.index or s.reward is None or not s.response
            del samples
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        strays = int(sum(h.cluster.take_strays().values()))
    return wrong + sum(n != 1 for n in seen), strays, memory


# ---------------------------------------------------------------- the real engine

MODELS = {"small": ("4 layers of 256, 2.6M parameters", 31), "quickstart": ("1 layer of 128, 0.27M parameters", 31)}
"""Their shapes, and how many pairs of phases."""
CONCURRENCY, LENGTHS = 16, [16 + 12 * (i // GROUP % 3) for i in range(3 * GROUP)]
STOLEN = 0.02


def engine(tmp: Path) -> Iterator[dict[str, Any]]:
    """The host, with rewards, against a loop that hands SGLang its own requests and counts its outputs: pairs of phases, in one process, so
    short that what else the machine does meanwhile falls on both of a pair. The first pair warms up; those in which a hypervisor took more than
    a fiftieth of a core away do not count. A step of the small model takes a CPU as long as a large one's takes a GPU, a few tens of
    milliseconds; one of the quickstart's is shorter than any."""
    import random_model

    from rlmono.quickstart import write_model
    random_model.main("tiny", tmp / "small")
    write_model(tmp / "quickstart" / "model", 0)
    for name, (shape, pairs) in MODELS.items():
        found = [rates for *rates, stolen in asyncio.run(phases(tmp / name / "model", pairs))[1:] if stolen <= STOLEN]
        if len(found) < 20:
            raise SystemExit(f"the hypervisor left {len(found)} of {pairs - 1} pairs alone: measure again on a quieter machine")
        costs, bare = sorted((1 - s / b) * 100 for s, b in found), [b for _, b in found]
        yield figure(f"the host's share of tokens/s, {name} model on CPU", statistics.median(costs), "%", "<= 5" if name == "small" else "",
                     f"a bare loop over the same scheduler: {statistics.median(bare):.0f} tokens/s ({min(bare):.0f} to {max(bare):.0f})",
                     f"{shape}; {len(LENGTHS)} requests of {PROMPT} + {min(LENGTHS)} to {max(LENGTHS)} tokens, {CONCURRENCY} at a time; "
                     f"median of {len(costs)} pairs, by their order surely (95 %) between {_rank(costs, -1):.1f} and {_rank(costs, 1):.1f}; "
                     f"half of them from {costs[len(costs) // 4]:.1f} to {costs[-len(costs) // 4]:.1f}")


def _rank(ordered: Sequence[float], side: int) -> float:
    """The bound of the median's 95 % interval at that side, by ranks: nothing need be known of how the values are spread."""
    return ordered[min(max(round(len(ordered) / 2 + side * 0.98 * len(ordered) ** 0.5), 0), len(ordered) - 1)]


async def phases(model: Path, pairs: int) -> list[tuple[float, float, float]]:
    """Of each pair: tokens a second with the host, those of the bare loop, and the cores that were stolen meanwhile."""
    from torchrun import free_port
    async with cluster(model, 1, sglang_server_concurrency=CONCURRENCY) as (c, address):
        command = [sys.executable, str(ROOT / "launch" / "torchrun.py"), "--nproc-per-node", "1", "--master-port", str(free_port()),
                   str(Path(__file__).with_name("real_engine.py")), address, str(model), *map(str, (CONCURRENCY, pairs, PROMPT, *LENGTHS))]
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stdout=sys.stderr)
        try:
            h, rates = Host(c, 0, base=64), []        # small vocabularies
            for pair in range(pairs):
                await c.reports("ready", pair, [0], 300)
                begun = time.perf_counter()
                samples = await h.rollout(len(LENGTHS) // GROUP, LENGTHS[::GROUP])
                rates.append(sum(s.response_length for s in samples) / (time.perf_counter() - begun))
                c.end_phase()
            bare = (await c.reports("bare", 0, [0], 300))[0]
            return list(zip(rates, bare["rates"], bare["stolen"], strict=True))
        finally:
            process.terminate()
            await asyncio.to_thread(process.wait, 20)


if __name__ == "__main__":
    sys.exit(main())
