"""A reward worker: `python -m rlmono.rewards.worker`, started by the pool, which talks to it over stdin and stdout.

It imports only what its reward imports. Rewards run in the main thread (math-verify's limits are signals); an async
reward works on many samples at once. What a reward prints goes to stderr. The worker ends with its parent.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import logging
import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, BinaryIO

import msgspec

from rlmono.rewards.load import LoadError, load_function
from rlmono.rewards.protocol import LENGTH, Outcome, Ready, Setup, Task, frame

_decode_task = msgspec.msgpack.Decoder(Task).decode
_PR_SET_PDEATHSIG = 1


def main() -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="reward worker %(process)d %(levelname)s %(name)s: %(message)s")
    inbox, outbox = _take_pipes()
    first = _read(inbox)
    if first is None:
        return
    setup = msgspec.msgpack.decode(first, type=Setup)
    _die_with(setup.parent)
    if setup.memory_limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (setup.memory_limit_bytes, setup.memory_limit_bytes))
    args = SimpleNamespace(**setup.args)
    try:
        concurrent = any([_is_async(load_function(path)) for path in setup.paths])
    except LoadError as error:
        _write(outbox, Ready(problem=str(error)))
        return
    _write(outbox, Ready(concurrent))
    if concurrent:
        asyncio.run(_serve_concurrently(inbox, outbox, args))
    else:
        _serve_in_turn(inbox, outbox, args)


def _serve_in_turn(inbox: BinaryIO, outbox: BinaryIO, args: Any) -> None:
    while (data := _read(inbox)) is not None:
        task = _decode_task(data)
        _write(outbox, _score(task, args))


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
    _write(outbox, await _score_async(task, args))


def _score(task: Task, args: Any) -> Outcome:
    """Runs a sync reward (or, of rewards of both kinds, an async one by itself)."""
    try:
        result = load_function(task.path)(args, task.sample)
        if inspect.isawaitable(result):
            result = asyncio.run(_wait(result))
        return _outcome(task.id, result, args.reward_key)
    except BaseException as error:      # also SystemExit: a reward must not end its worker unseen
        return _failure(task.id, error)


async def _score_async(task: Task, args: Any) -> Outcome:
    limit = asyncio.timeout(args.reward_timeout_s)
    try:
        async with limit:
            result = load_function(task.path)(args, task.sample)
            return _outcome(task.id, await result if inspect.isawaitable(result) else result, args.reward_key)
    except BaseException as error:
        if limit.expired():     # not a TimeoutError of the reward's own
            return Outcome(task.id, remark="reward_timeout")
        return _failure(task.id, error)


async def _wait(result: Any) -> Any:
    return await result


def _outcome(id: int, result: Any, key: str | None) -> Outcome:
    """A reward's result as Outcome: a finite number, or a dict that has one at `--reward-key`."""
    if not isinstance(result, dict):
        value = _number(result)
        return Outcome(id, value) if value is not None else _invalid(id, result, "is no finite number")
    result = {str(k): v for k, v in result.items()}
    if key is None:
        return _invalid(id, result, "is a dict; name the key of its number with --reward-key")
    value = _number(result.get(key))
    if value is None:
        return _invalid(id, result, f"has no finite number at {key!r} (--reward-key)")
    return Outcome(id, {**result, key: value})


def _invalid(id: int, result: Any, problem: str) -> Outcome:
    return Outcome(id, remark="reward_invalid", where=problem, detail=f"the reward {problem}: {result!r:.300}")


def _number(value: Any) -> float | None:
    """A finite float from a number, a bool, or a numpy or torch scalar; None from anything else."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _failure(id: int, error: BaseException) -> Outcome:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Outcome(id, remark="reward_error", where=f"{type(error).__name__} at {last.filename}:{last.lineno}",
                   detail="".join(traceback.format_exception(error))[-10_000:])


def _is_async(function: Callable[..., Any]) -> bool:
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


if __name__ == "__main__":
    main()
