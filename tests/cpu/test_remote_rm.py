"""remote_rm against a server that answers, fails for a while, fails for good, talks nonsense, is slow, or is not there."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest
from aiohttp import web

from rlmono.config.schema import Config
from rlmono.data.sample import Sample
from rlmono.rewards.pool import RewardPool, RewardResult


class Server:
    """Does what the response says. `asked` counts requests by response; `most` is the most of them at one time."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.bodies: list[Any] = []
        self.now = self.most = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read())
        word, _, rest = body["response"].partition(" ")
        self.bodies.append(body)
        self.asked[body["response"]] += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            if word == "sleep":
                await asyncio.sleep(float(rest))
            if word == "status":
                status, times = map(int, rest.split())
                if self.asked[body["response"]] <= times:
                    return web.Response(status=status, text="no", headers={"Location": "/elsewhere"} if status == 302 else None)
            if word == "hangup" and self.asked[body["response"]] == 1 and request.transport is not None:
                request.transport.close()
            text = {"text": '"good"', "null": "null", "nan": "NaN", "html": "<html>", "empty": "", "dict": '{"score": 0.25, "why": "so"}',
                    "wrong": '{"points": 1}', "large": "1" * (2 << 20), "cut": '{"score": 1'}.get(word, "0.5")
            return web.Response(text=text, content_type="application/json")
        finally:
            self.now -= 1


@pytest.fixture
def use() -> Callable[..., None]:
    """`use(body, **args)`: runs `body(pool, server, start)` with a pool; the server listens once `await start()` has been called."""
    def use(body: Callable[[RewardPool, Server, Any], Coroutine[Any, Any, None]], **args: Any) -> None:
        async def main() -> None:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                port = listener.getsockname()[1]
            server, application = Server(), web.Application()
            application.router.add_post("/judge", server.answer)
            runner = web.AppRunner(application, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", port)
            pool = RewardPool(Config(rm_type="remote_rm", rm_url=f"http://127.0.0.1:{port}/judge", **{"reward_timeout_s": 5.0, **args}))
            await pool.start()
            try:
                await body(pool, server, site.start)
            finally:
                await pool.close()
                await runner.cleanup()
        asyncio.run(asyncio.wait_for(main(), 50))
    return use


async def scores(pool: RewardPool, *responses: str) -> list[RewardResult]:
    return await asyncio.gather(*(pool.score(Sample(index=i, response=response, label="7", prompt="3+4")) for i, response in enumerate(responses)))


def test_it_gets_prompt_response_and_label(use: Callable[..., None], capfd: pytest.CaptureFixture[str]) -> None:
    async def body(pool: RewardPool, server: Server, start: Any) -> None:
        await start()
        messages = [{"role": "user", "content": "ä"}]
        assert await pool.score(Sample(prompt=messages, response="ü", label=["7", 8])) == (0.5, None)
        assert server.bodies == [{"prompt": messages, "response": "ü", "label": ["7", 8]}]
        boxed = await pool.score(Sample(response=r"sleep \boxed{null}", metadata={"rm_type": "boxed_remote_rm"}))
        assert server.bodies[1]["response"] == "null" and boxed.remark == "reward_invalid"
    use(body)
    assert "Unclosed" not in capfd.readouterr().err


def test_what_passes_is_tried_again(use: Callable[..., None]) -> None:
    async def body(pool: RewardPool, server: Server, start: Any) -> None:
        await start()
        responses = ["status 500 2", "status 503 1", "status 429 1", "hangup", "plain"]
        assert await scores(pool, *responses) == [(0.5, None)] * 5
        assert [server.asked[r] for r in responses] == [3, 2, 2, 2, 1]
    use(body)


def test_what_stays_has_a_name(use: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    named = {**{f"status {code} 99": f"remote_rm_http_{code}" for code in (500, 404, 302)},
             **dict.fromkeys(("html", "empty", "cut", "nan", "large"), "remote_rm_garbage"),
             **dict.fromkeys(("text", "null", "dict"), "reward_invalid"), "sleep 30": "remote_rm_timeout", "plain": None}

    async def body(pool: RewardPool, server: Server, start: Any) -> None:
        await start()
        with caplog.at_level(logging.WARNING):
            results = await scores(pool, *named)
        assert dict(zip(named, (r.remark for r in results), strict=True)) == named
        assert [r.value for r in results] == [0.0] * 12 + [0.5]
        assert pool.outcomes == Counter(remark or "ok" for remark in named.values())
        assert server.asked["status 500 99"] == 3 and all(server.asked[r] == 1 for r in named if r != "status 500 99")
    use(body, rm_max_retries=2, reward_timeout_s=3.0)
    assert "the reward server answered HTTP 500 (the last of 3 tries)" in caplog.text and "<html>" in caplog.text
    assert "had not answered at the deadline (--reward-timeout-s)" in caplog.text


def test_dict_answers(use: Callable[..., None]) -> None:
    async def body(pool: RewardPool, server: Server, start: Any) -> None:
        await start()
        assert await scores(pool, "dict", "wrong", "plain") == [({"score": 0.25, "why": "so"}, None), ({"score": 0.0}, "reward_invalid"), (0.5, None)]
    use(body, reward_key="score")


def test_an_outage_costs_rewards_and_one_wait(use: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    """The first samples try for all of their deadline; while it lasts, the next ones fail at their first try; then all is as before."""
    async def body(pool: RewardPool, server: Server, start: Any) -> None:
        with caplog.at_level(logging.WARNING):
            assert {r.remark for r in await scores(pool, *["x"] * 20)} == {"remote_rm_down"}
        assert pool.outcomes == {"remote_rm_down": 20}
        await start()
        assert await scores(pool, "x") == [(0.5, None)]
        assert {r.remark for r in await scores(pool, *["status 503 1000"] * 10)} == {"remote_rm_http_503"}
        assert server.asked["status 503 1000"] > 20
        assert {r.remark for r in await scores(pool, *["status 503 999"] * 100)} == {"remote_rm_http_503"}
        assert server.asked["status 503 999"] == 100
        assert await scores(pool, "x") == [(0.5, None)] and await scores(pool, "status 503 2") == [(0.5, None)]
    use(body, reward_timeout_s=2.0)
    assert caplog.text.count("remote_rm_down at sample") == 1 and "cannot be reached: ClientConnectorError" in caplog.text


def test_one_sample_that_the_server_fails_at_does_not_count_as_an_outage(use: Callable[..., None]) -> None:
    async def body(pool: RewardPool, server: Server, start: Any) -> None:
        await start()
        bad = asyncio.ensure_future(scores(pool, "status 500 1000"))
        while server.asked["status 500 1000"] < 2:
            await asyncio.sleep(0.01)
        assert await scores(pool, "x") == [(0.5, None)]
        assert (await bad)[0].remark == "remote_rm_http_500"
        assert await scores(pool, "status 500 2") == [(0.5, None)]
    use(body, reward_timeout_s=2.0)


def test_a_server_that_comes_up_late_costs_nothing(use: Callable[..., None]) -> None:
    async def body(pool: RewardPool, server: Server, start: Any) -> None:
        waiting = asyncio.ensure_future(scores(pool, *["x"] * 10))
        await asyncio.sleep(0.5)
        await start()
        assert await waiting == [(0.5, None)] * 10
    use(body, reward_timeout_s=20.0)


def test_at_most_so_many_requests_at_a_time(use: Callable[..., None]) -> None:
    """A sample that waits for its turn has its whole deadline before it."""
    async def body(pool: RewardPool, server: Server, start: Any) -> None:
        await start()
        assert await scores(pool, *["sleep 0.3"] * 40) == [(0.5, None)] * 40        # 10 turns: longer than the deadline
        assert server.most == 4
    use(body, reward_concurrency=4, reward_timeout_s=1.5)


def test_a_killed_worker_costs_no_sample(use: Callable[..., None]) -> None:
    """Requests that were under way are made again, each alone at first."""
    async def body(pool: RewardPool, server: Server, start: Any) -> None:
        await start()
        waiting = asyncio.ensure_future(scores(pool, *["sleep 0.2"] * 6))
        while server.now < 6:
            await asyncio.sleep(0.01)
        (lane,) = pool._lanes.values()
        lane._workers[0]._kill()
        assert await waiting == [(0.5, None)] * 6
    use(body)
