"""`--rm-type remote_rm`: a reward server at `--rm-url` gets {prompt, response, label} as JSON and answers a number, or a dict for `--reward-key`.

A connection that fails and the answers 408, 429 and 5xx are tried again, `--rm-max-retries` times, after waits that double; all of it within
`--reward-timeout-s`. What fails for good is counted as `remote_rm_down`, `remote_rm_timeout`, `remote_rm_http_<status>` or `remote_rm_garbage`.
After a sample that has failed so while no other was answered, the next ones try once each until one is answered: an outage costs rewards, and
not hours. `--reward-concurrency` bounds the requests in flight.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec

from rlmono.data.sample import Sample
from rlmono.rewards import RewardFailure

SHARE_OF_DEADLINE = 0.95
"""Of --reward-timeout-s; the rest is for the failure to be told by its name, before the worker ends the call."""
CONNECT_S = 5.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 8.0
LARGEST_ANSWER_BYTES = 1 << 20
_AGAIN = (408, 425, 429)


class _Server:
    """What this worker knows of the server: its connections, when it last answered a sample, and whether it seems to be out of order."""

    def __init__(self) -> None:
        self.answered_at = 0.0
        self.gone = False
        self._sessions = _session()
        self._session: aiohttp.ClientSession | None = None

    async def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = await anext(self._sessions)
        return self._session


async def _session() -> AsyncIterator[aiohttp.ClientSession]:
    """A generator, so that the event loop closes the connections at its end."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)     # the whole has a deadline of its own
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        while True:
            yield session


_servers: dict[tuple[asyncio.AbstractEventLoop, str], _Server] = {}


async def reward(args: Any, sample: Sample, **kwargs: Any) -> Any:
    """What the server answered, decoded. RewardFailure with the name of what went wrong."""
    loop = asyncio.get_running_loop()
    server = _servers.setdefault((loop, args.rm_url), _Server())
    began = loop.time()
    deadline = began + SHARE_OF_DEADLINE * args.reward_timeout_s
    body = msgspec.json.encode({"prompt": sample.prompt, "response": sample.response, "label": sample.label})
    tries = 1 if server.gone else 1 + args.rm_max_retries
    wait = FIRST_WAIT_S
    for remaining in reversed(range(tries)):
        try:
            answer = await _ask(await server.session(), args.rm_url, body, deadline)
            server.gone, server.answered_at = False, loop.time()
            return answer
        except _Again as failure:
            pause = wait * random.uniform(0.5, 1.0)     # or all of an outage come back at once
            if remaining == 0 or loop.time() + pause >= deadline:
                server.gone = server.gone or server.answered_at < began
                raise RewardFailure(failure.remark, f"{failure.detail} (the last of {tries - remaining} tries)") from failure
            await asyncio.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT_S)
    raise AssertionError("unreachable: the last try returns or raises")


class _Again(RewardFailure):
    """A failure that another try may not meet."""


async def _ask(session: aiohttp.ClientSession, url: str, body: bytes, deadline: float) -> Any:
    limit = asyncio.timeout_at(deadline)
    try:
        async with limit, session.post(url, data=body, headers={"Content-Type": "application/json"}, allow_redirects=False) as response:
            if response.status >= 500 or response.status in _AGAIN:
                raise _Again(f"remote_rm_http_{response.status}", f"the reward server answered HTTP {response.status}")
            if response.status != 200:
                raise RewardFailure(f"remote_rm_http_{response.status}", f"the reward server answered HTTP {response.status} {response.reason}")
            data = b""
            async for part in response.content.iter_chunked(1 << 16):
                data += part
                if len(data) > LARGEST_ANSWER_BYTES:
                    raise RewardFailure("remote_rm_garbage", f"the reward server answered more than {LARGEST_ANSWER_BYTES} bytes")
    except TimeoutError as error:
        if limit.expired():
            raise RewardFailure("remote_rm_timeout", "the reward server had not answered at the deadline (--reward-timeout-s)") from error
        raise _Again("remote_rm_down", f"the reward server cannot be reached within {CONNECT_S:g} s") from error
    except (aiohttp.ClientError, OSError) as error:
        raise _Again("remote_rm_down", f"the reward server cannot be reached: {type(error).__name__}: {error}") from error
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RewardFailure("remote_rm_garbage", f"the reward server's answer is no JSON ({error}): {data[:200]!r}") from error
