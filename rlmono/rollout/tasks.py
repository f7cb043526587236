"""Small asyncio helpers: wait for one thing without missing the failure of another, and send without waiting."""

from __future__ import annotations

import asyncio
from typing import Any, Awaitable, Iterable, Optional, TypeVar

import zmq
import zmq.asyncio

T = TypeVar("T")


async def while_healthy(wanted: Awaitable[T], background: Iterable[asyncio.Task[Any]], timeout_s: Optional[float], what: str) -> T:
    """The result of `wanted`. A failure of a background task is raised as soon as it happens; TimeoutError says `what` was waited for."""
    task = asyncio.ensure_future(wanted)
    try:
        done, _ = await asyncio.wait([task, *background], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for other in done - {task}:
            other.result()
            raise RuntimeError(f"{other.get_name()} ended by itself while {what}")
        if not done:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        return task.result()
    finally:
        if not task.done():
            task.cancel()


def send_now(sock: zmq.asyncio.Socket, parts: list[bytes]) -> None:
    """Hand a message to ZMQ at once; its queues are unbounded, so it only fails for a peer that is gone."""
    sent: Any = sock.send_multipart(parts, flags=zmq.NOBLOCK)      # a future
    if sent.done():
        sent.result()


async def cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended."""
    tasks = list(tasks)
    for t in tasks:
        t.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
