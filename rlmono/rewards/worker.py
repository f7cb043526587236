"""A reward worker: `python -m rlmono.rewards.worker`, started by the pool, which talks to it over stdin and stdout.

It imports only what its reward imports. Rewards run in the main thread (math-verify's limits are signals); a worker for async
rewards works on many samples at once. What a reward prints goes to stderr. The worker ends with its parent.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import functools
import gc
import inspect
import logging
import math
import os
import resource
import signal
import sys
import time
import traceback
from types import SimpleNamespace
from typing import Any, BinaryIO

import msgspec

from rlmono.data.heap import keep_freed_memory
from rlmono.rewards import RewardFailure
from rlmono.rewards.answers import last_boxed
from rlmono.rewards.load import LoadError, load_function
from rlmono.rewards.protocol import ELSEWHERE, LENGTH, OUT_OF_MEMORY, Outcome, Ready, Setup, Task, frame

_decode_task = msgspec.msgpack.Decoder(Task).decode
_PR_SET_PDEATHSIG = 1
LARGEST_OUTCOME_BYTES = 16 << 20


def main() -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="reward worker %(process)d %(levelname)s %(name)s: %(message)s")
    inbox, outbox = _take_pipes()
    first = _read(inbox)
    if first is None:
        return
    setup = msgspec.msgpack.decode(first, type=Setup)
    _die_with(setup.parent)
    _limit(setup.memory_limit_bytes)
    keep_freed_memory()
    args = SimpleNamespace(**setup.args)
    try:
        asyncs = [_is_async(path) for path in setup.paths]
    except LoadError as error:
        _write(outbox, Ready(problem=str(error)))
        return
    concurrent = any(asyncs) if setup.concurrent is None else setup.concurrent
    gc.freeze()         # what is imported is never gone through again
    _write(outbox, Ready(concurrent))
    if concurrent:
        asyncio.run(_serve_concurrently(inbox, outbox, args))
    else:
        _serve_in_turn(inbox, outbox, args)


def _limit(memory_bytes: int | None) -> None:
    """What the process and each of its children may write to in memory; and a crash shows where, but leaves no core file."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))


def _serve_in_turn(inbox: BinaryIO, outbox: BinaryIO, args: Any) -> None:
    while (data := _read(inbox)) is not None:
        begun = time.perf_counter()
        task = _decode_task(data)
        outcome = _score(task, args)
        outcome.seconds = time.perf_counter() - begun
        _send(outbox, outcome)
        del data, task, outcome     # not before the answer: to let go of 8k tokens takes 0.3 ms


async def _serve_concurrently(inbox: BinaryIO, outbox: BinaryIO, args: Any) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), inbox)
    running: set[asyncio.Task[None]] = set()
    while True:
        try:
            data = await reader.readexactly(LENGTH.unpack(await reader.readexactly(LENGTH.size))[0])
        except asyncio.IncompleteReadError:     # the pool closed
            return
        job = asyncio.create_task(_answer(_decode_task(data), outbox, args))
        running.add(job)
        job.add_done_callback(running.discard)


async def _answer(task: Task, outbox: BinaryIO, args: Any) -> None:
    _send(outbox, await _score_async(task, args))


def _score(task: Task, args: Any) -> Outcome:
    try:
        if _is_async(task.path):
            return Outcome(task.id, remark=ELSEWHERE)
        result = load_function(task.path)(args, _argument(task))
        if not isinstance(result, (float, int, dict)) and inspect.isawaitable(result):      # which is slow to tell
            result = asyncio.run(_wait(result))
        return _outcome(task, result)
    except BaseException as error:      # also SystemExit: a reward must not end its worker unseen
        return _failure(task.id, error)


async def _score_async(task: Task, args: Any) -> Outcome:
    limit = asyncio.timeout(args.reward_timeout_s)
    try:
        async with limit:
            result = load_function(task.path)(args, _argument(task))
            return _outcome(task, await result if inspect.isawaitable(result) else result)
    except BaseException as error:
        if limit.expired():     # not a TimeoutError of the reward's own
            return Outcome(task.id, remark="reward_timeout")
        return _failure(task.id, error)


async def _wait(result: Any) -> Any:
    return await result


def _argument(task: Task) -> Any:
    """What the function gets besides args: the sample, or the list of a group's."""
    if task.boxed:
        for sample in task.samples:
            sample.response = last_boxed(sample.response) or ""
    return task.samples if task.group else task.samples[0]


def _outcome(task: Task, result: Any) -> Outcome:
    """A function's result as Outcome: a value for the sample, or, of a group, one for each in order."""
    if not task.group:
        results = [result]
    else:
        results = list(result.tolist() if hasattr(result, "tolist") else result) if _is_sequence(result) else []
        if len(results) != len(task.samples):
            problem = f"is no list of {len(task.samples)} values, one for each sample of the group"
            return Outcome(task.id, remark="reward_invalid", where=problem, detail=f"the reward {problem}: {result!r:.300}")
    values, problems = zip(*(_value(result, task.key) for result in results), strict=True)
    i = next((i for i, problem in enumerate(problems) if problem), None)
    if i is None:
        return Outcome(task.id, list(values))
    return Outcome(task.id, list(values), remark="reward_invalid", where=problems[i], detail=f"the reward {problems[i]}: {results[i]!r:.300}")


def _is_sequence(result: Any) -> bool:
    return isinstance(result, (list, tuple)) or getattr(result, "ndim", None) == 1


def _value(result: Any, key: str | None) -> tuple[None | float | dict[str, Any], str]:
    """(value, what is wrong with it): a finite number, or a dict that has one at `key`."""
    if not isinstance(result, dict):
        value = _number(result)
        return value, "" if value is not None else "is no finite number"
    result = {str(k): v for k, v in result.items()}
    if key is None:
        return None, "is a dict; name the key of its number with --reward-key"
    value = _number(result.get(key))
    return ({**result, key: value}, "") if value is not None else (None, f"has no finite number at {key!r} (--reward-key)")


def _number(value: Any) -> float | None:
    """A finite float from a number, a bool, or a numpy or torch scalar; None from anything else."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _failure(id: int, error: BaseException) -> Outcome:
    if isinstance(error, RewardFailure):
        return Outcome(id, remark=error.remark, detail=error.detail or str(error))
    last = traceback.extract_tb(error.__traceback__)[-1]
    out_of_memory = isinstance(error, MemoryError)
    return Outcome(id, remark=OUT_OF_MEMORY if out_of_memory else "reward_error",
                   where=f"{type(error).__name__} at {last.filename}:{last.lineno}",
                   detail=("above --reward-memory-limit-gb: " if out_of_memory else "") + "".join(traceback.format_exception(error))[-10_000:])


@functools.cache
def _is_async(path: str) -> bool:
    """The function there is one of coroutines. It is slow to tell."""
    function = load_function(path)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The pipes to the pool, for us alone: rewards find stdin empty, and their prints go to stderr."""
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return inbox, outbox


def _die_with(parent: int) -> None:
    """The kernel kills this process when its parent ends, however it ends, and whatever a reward is doing."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:      # it ended before we asked
        os._exit(0)


def _read(inbox: BinaryIO) -> bytes | None:
    """The next message; None when the pool has closed."""
    head = inbox.read(LENGTH.size)
    return inbox.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else None


def _write(outbox: BinaryIO, message: msgspec.Struct) -> None:
    outbox.write(frame(message))
    outbox.flush()


def _send(outbox: BinaryIO, outcome: Outcome) -> None:
    """The outcome, where it can be written and is of a size that the pool's process should hold."""
    problem = f"is larger than {LARGEST_OUTCOME_BYTES >> 20} MiB"
    try:
        data = frame(outcome)
    except Exception as error:
        data, problem = bytearray(), f"cannot be sent: {type(error).__name__}: {error}"
    if not 0 < len(data) <= LARGEST_OUTCOME_BYTES:
        data = frame(Outcome(outcome.id, remark="reward_invalid", where=problem, detail=f"what the reward returned {problem}"))
    outbox.write(data)
    outbox.flush()


if __name__ == "__main__":
    main()
