"""The real engine on CPU for rollout.py's part `engine`, started by torchrun: `real_engine.py ADDRESS MODEL CONCURRENCY PAIRS PROMPT TOKENS…`.

A phase for the host at ADDRESS and the same by a bare loop make a pair, and every second pair begins with the bare loop: SGLang's scheduler
gets its own requests from a list, and its outputs are counted. TOKENS are the lengths of the responses.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parents[1] / "cpu" / "worlds"))


def main(address: str, model: Path, concurrency: int, pairs: int, prompt: int, lengths: list[int]) -> None:
    from rlmono.engine.compat import prepare_cpu
    from rlmono.world.channel import HostLink
    prepare_cpu()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    import tiny

    from rlmono.engine.engine import Engine
    link = HostLink(address, 0)
    engine = Engine(tiny.make_config(model, sglang_server_concurrency=concurrency), [[0]], 0, "cpu", "float32", link)
    engine.load_weights(load_file(model / "model.safetensors").items())
    rates, stolen = [], []
    for pair in range(pairs):
        begun, taken = time.monotonic(), stolen_s()
        for served in (True, False) if pair % 2 else (False, True):
            if served:
                link.report("ready", pair)
                engine.serve()
            else:
                rates.append(bare(engine, prompt, lengths))
            engine.drain()
        stolen.append((stolen_s() - taken) / (time.monotonic() - begun))
    link.report("bare", 0, rates=rates, stolen=stolen)
    link.close()
    os._exit(0)             # SGLang leaves threads behind


def stolen_s() -> float:
    """Processor seconds that the hypervisor has given to others while this machine wanted them."""
    return int(Path("/proc/stat").read_text().split()[8]) / os.sysconf("SC_CLK_TCK")


def bare(engine: Any, prompt: int, lengths: list[int]) -> float:
    """Tokens a second of the scheduler by itself."""
    from sglang.srt.managers.io_struct import BatchTokenIDOutput, ShutdownReq
    from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver

    from rlmono.engine.engine import _generate_request
    from rlmono.world.messages import Generate, Sampling
    waiting = [_generate_request(Generate(f"{i:016x}", [9] * (prompt - 2) + [i // 64, i % 64], Sampling(n, ignore_eos=True)),
                                 engine.scheduler.tokenizer) for i, n in enumerate(lengths)]
    finished = ended = 0

    def pull(_: Any) -> list[Any]:
        nonlocal waiting
        if finished == len(lengths):
            return [ShutdownReq()]
        taken, waiting = waiting, []
        return taken

    def count(output: Any, recv_obj: Any = None) -> None:
        nonlocal finished, ended
        if isinstance(output, BatchTokenIDOutput):
            finished, ended = finished + sum(reason is not None for reason in output.finished_reasons), time.perf_counter()
    ours, SchedulerRequestReceiver._pull_raw_reqs = SchedulerRequestReceiver._pull_raw_reqs, pull
    engine._traffic.send_output = count
    begun = time.perf_counter()
    try:
        engine.serve()
    finally:
        SchedulerRequestReceiver._pull_raw_reqs = ours
        del engine._traffic.send_output
    return sum(lengths) / (ended - begun)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6]), list(map(int, sys.argv[6:])))      # type: ignore[misc]
