"""What the reward pool costs: `python tests/bench/rewards.py` writes docs/benchmarks/rewards.json.

Rewards a second through one worker process, of a function that does nothing, for short samples and for samples of 8k tokens with all that
the engine tells of them; the processor time of it on the host's loop, where requests are handled too; a worker's start and memory; and the
shipped rewards in one worker beside the same calls without a pool.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from aiohttp import web

from rlmono.config.rewards import REWARD_TYPES
from rlmono.config.schema import Config
from rlmono.data.sample import Sample
from rlmono.rewards.load import load_function
from rlmono.rewards.pool import RewardPool

sys.path.insert(0, str(Path(__file__).parent))
import figures  # noqa: E402

COMMAND = "python tests/bench/rewards.py"
RESPONSES = {
    "deepscaler": ("42", r"<think>6 times 7</think> The answer is \boxed{42}."), "math": ("42", r"The answer is \boxed{42}."),
    "dapo": ("42", "6 times 7.\nAnswer: 42"), "f1": ("Eiffel Tower", "It is the Eiffel Tower in Paris"), "gpqa": ("B", "So the answer is (B)."),
    "ifbench": (None, "One two three four. Five six seven.")}
FOLLOWED = {"instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"], "kwargs": [{}, {"num_words": 5}]}


def short(i: int) -> Sample:
    return Sample(index=i, prompt="6*7", response="x" * 400, tokens=list(range(200)), response_length=128, label="42")


def long(i: int) -> Sample:
    n = 8192
    return Sample(index=i, prompt="6*7", response="word " * 6000, tokens=list(range(n + 100)), response_length=n, label="42",
                  rollout_log_probs=[-0.5 - j / n for j in range(n)], weight_versions=[3] * n)


async def rate(pool: RewardPool, samples: list[Sample]) -> tuple[float, float]:
    """(rewards a second, processor seconds of this process a reward); the samples keep no reward."""
    await asyncio.gather(*map(pool.score, samples[:200]))
    clock, used = time.perf_counter(), time.thread_time()
    results = await asyncio.gather(*map(pool.score, samples))
    assert not any(result.remark for result in results), results[0]
    return len(samples) / (time.perf_counter() - clock), (time.thread_time() - used) / len(samples)


async def started(**options: Any) -> tuple[RewardPool, float]:
    pool, clock = RewardPool(Config(**options)), time.perf_counter()
    await pool.start()
    return pool, time.perf_counter() - clock


def figure(name: str, value: float, unit: str, target: str, reference: str) -> dict[str, Any]:
    print(f"{name}: {value:.4g} {unit}", flush=True)
    return {"name": name, "value": value, "unit": unit, "target": target, "reference": reference, "command": COMMAND,
            "machine": figures.this_machine()}


async def pool_figures(folder: Path) -> list[dict[str, Any]]:
    (folder / "mine.py").write_text("def one(args, sample):\n    return 1.0\n\nasync def waits(args, sample):\n    return 1.0\n")
    out = []
    for function, kind in (("one", "one after the other"), ("waits", "async")):
        pool, start_s = await started(custom_rm_path=f"{folder}/mine.py:{function}")
        try:
            for make, n, what, target in ((short, 10_000, "128 tokens", ">= 3000"), (long, 400, "8k tokens", ">= 150")):
                each, used = await rate(pool, [make(i) for i in range(n)])
                name = f"empty reward, {kind}, samples of {what}"
                out.append(figure(name, each, "rewards/s", target, "the finished requests that one host rank must carry"))
                out.append(figure(f"{name}: on the host's loop", used * 1e6, "µs a reward", "", "processor time of the loop's thread"))
            if function == "one":
                out.append(figure("a worker's start, of a reward that imports nothing", start_s, "s", "", "once a run, and after a crash"))
                memory = max(child.memory_info().rss for child in psutil.Process().children(recursive=True))
                out.append(figure("a worker's memory", memory / 2**20, "MiB", "", "--reward-memory-limit-gb 4"))
        finally:
            await pool.close()
    return out


async def shipped_figures() -> list[dict[str, Any]]:
    out, args = [], Config(reward_key="score")
    for name, (label, response) in RESPONSES.items():
        function, n = load_function(REWARD_TYPES[name].path), 1000
        samples = [Sample(index=i, label=label, response=response, metadata=FOLLOWED if name == "ifbench" else {}) for i in range(n)]
        assert function(args, samples[0])
        clock = time.perf_counter()
        for sample in samples:
            function(args, sample)
        bare = n / (time.perf_counter() - clock)
        pool, _ = await started(rm_type=name, reward_key="score")
        try:
            each, _ = await rate(pool, samples)
        finally:
            await pool.close()
        out.append(figure(f"{name} in one worker", each, "rewards/s", "", f"{bare:,.0f} without a pool"))
    return out


async def long_figures() -> list[dict[str, Any]]:
    """A shipped reward gets the text of a sample alone."""
    pool, _ = await started(rm_type="random")
    try:
        each, used = await rate(pool, [long(i) for i in range(400)])
    finally:
        await pool.close()
    return [figure("random, samples of 8k tokens", each, "rewards/s", ">= 150", "the finished requests that one host rank must carry"),
            figure("random, samples of 8k tokens: on the host's loop", used * 1e6, "µs a reward", "", "processor time of the loop's thread")]


async def remote_figures() -> list[dict[str, Any]]:
    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(text="1.0", content_type="application/json")
    application = web.Application()
    application.router.add_post("/", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    pool, _ = await started(rm_type="remote_rm", rm_url=f"http://127.0.0.1:{runner.addresses[0][1]}/")
    try:
        each, _ = await rate(pool, [short(i) for i in range(2000)])
    finally:
        await pool.close()
        await runner.cleanup()
    return [figure("remote_rm, one worker", each, "rewards/s", "", "with its server in the process that measures")]


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        figures.write("rewards", [*await pool_figures(Path(folder)), *await long_figures(), *await shipped_figures(), *await remote_figures()])


if __name__ == "__main__":
    asyncio.run(main())
