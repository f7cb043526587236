"""An OpenAI-compatible server on the host rank, for agent frameworks: loopback only, and a token of its own for each sample.

    async with state.endpoint(sample) as session:
        client = AsyncOpenAI(base_url=session.base_url, api_key=session.api_key)
        ...
        return session.samples()

It runs in the host's loop and starts with the first session. What a client does wrong is answered with OpenAI's errors and is a
counted, named outcome, in the remarks of the session's first sample:

    endpoint_bad_request    malformed, or not supported (400)
    endpoint_too_large      a body of more than MOST_BYTES (413)
    endpoint_context_full   the conversation has no room left (400)
    endpoint_aborted        the rollout was over (410)
    endpoint_disconnect     the client left before its answer, and the engine has dropped the request
    endpoint_slow_body      a body that did not come within BODY_TIMEOUT_S (408)
    endpoint_error          the engine failed (500)
    endpoint_unauthorized   a wrong token, of nobody's session (401): counted with the next request that has a right one
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Optional

from aiohttp import web

from rlmono.data.sample import Sample
from rlmono.rollout.generate import GenerateState
from rlmono.rollout.openai_format import ChatRequest, CompletionRequest, RequestError, chat_response, chunks, completion_response, parse
from rlmono.rollout.session import Session

log = logging.getLogger(__name__)
MOST_BYTES = 16 << 20
BODY_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 5.0
SESSION = web.RequestKey("session", Session)


class Endpoint:
    """The server of one host. `model` is the name that it gives the model."""

    def __init__(self, model: str):
        self.model = os.path.basename(model.rstrip("/")) or "policy"
        self._sessions: dict[str, Session] = {}
        self._runner: Optional[web.AppRunner] = None
        self._starting = asyncio.Lock()
        self._url = ""
        self._strangers: list[str] = []
        self._numbers = itertools.count()

    @contextlib.asynccontextmanager
    async def session(self, state: GenerateState, sample: Sample) -> AsyncIterator[Session]:
        """A session for this sample, for as long as the block lasts. What the sample has of a response is not used: it is made anew."""
        await self._start()
        session = Session(state, sample, self._url, secrets.token_urlsafe(32), self.model)
        self._sessions[session.api_key] = session
        try:
            yield session
        finally:
            del self._sessions[session.api_key]
            await session.close()

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _start(self) -> None:
        async with self._starting:
            if self._runner is not None:
                return
            app = web.Application(middlewares=[self._outcomes], client_max_size=MOST_BYTES)
            app.add_routes([web.post("/v1/chat/completions", self._chat), web.post("/v1/completions", self._complete),
                            web.get("/v1/models", self._models)])
            runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=CLOSE_TIMEOUT_S)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self._runner, self._url = runner, f"http://127.0.0.1:{runner.addresses[0][1]}/v1"

    # ------------------------------------------------------------ requests

    @web.middleware
    async def _outcomes(self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        """Who asks, and what becomes of it."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        session = self._sessions.get(token) if scheme.lower() == "bearer" else None
        if session is None:
            self._strangers.append("endpoint_unauthorized")
            return _error(RequestError(401, "no session has this token (Authorization: Bearer …); one ends with its sample", "invalid_api_key"))
        session.remarks += self._strangers
        self._strangers.clear()
        task = asyncio.current_task()
        assert task is not None
        session.tasks.add(task)
        try:
            request[SESSION] = session
            return await handler(request)
        except RequestError as e:
            session.remarks.append(e.outcome)
            return _error(e)
        except web.HTTPException as e:          # no such path or method
            session.remarks.append("endpoint_bad_request")
            return _error(RequestError(e.status, f"{request.method} {request.path}: {e.reason}", "not_found"))
        except asyncio.CancelledError:
            if not session.closed:
                session.remarks.append("endpoint_disconnect")
                session.state.cancelled_at_engine = False       # the function goes on
            raise
        except Exception as e:
            session.remarks.append("endpoint_error")
            log.exception("a request at the endpoint")
            return _error(RequestError(500, f"{type(e).__name__}: {e}", "server_error"))
        finally:
            session.tasks.discard(task)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        asked = parse(await _body(request), ChatRequest)
        choices = await request[SESSION].chat(asked)
        return await self._reply(request, asked, chat_response(f"chatcmpl-{next(self._numbers)}", self.model, choices))

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        asked = parse(await _body(request), CompletionRequest)
        choices = await request[SESSION].complete(asked)
        return await self._reply(request, asked, completion_response(f"cmpl-{next(self._numbers)}", self.model, choices))

    async def _models(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"object": "list", "data": [{"id": self.model, "object": "model", "created": 0, "owned_by": "rlmono"}]})

    async def _reply(self, request: web.Request, asked: Any, response: dict[str, Any]) -> web.StreamResponse:
        if not asked.stream:
            return web.json_response(response)
        made = chunks(response, bool((asked.stream_options or {}).get("include_usage")))
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await stream.prepare(request)
        for chunk in made:
            await stream.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await stream.write(b"data: [DONE]\n\n")
        await stream.write_eof()
        return stream


async def _body(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise RequestError(413, f"a body of more than {MOST_BYTES} bytes", "too_large", "endpoint_too_large") from None
    except web.RequestPayloadError as e:
        raise RequestError(400, f"the body cannot be read: {e}", "invalid_body") from None
    except TimeoutError:
        raise RequestError(408, f"the body did not come within {BODY_TIMEOUT_S:g} s", "timeout", "endpoint_slow_body") from None


def _error(e: RequestError) -> web.Response:
    """`x-should-retry`: OpenAI's clients would try again what cannot become better."""
    return web.json_response(e.body(), status=e.status, headers={"x-should-retry": "false"})
