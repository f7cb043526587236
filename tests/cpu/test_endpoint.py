"""The OpenAI-compatible endpoint, driven by OpenAI's own client, on an engine that answers from a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import httpx
import openai
import pytest
from standin import VERSION, ScriptedEngine, log_probs, make_config, make_folder, run_group

from rlmono.data.sample import ABORTED, COMPLETED, TRUNCATED, Sample
from rlmono.data.tokenizer import Tokenizer
from rlmono.rollout import endpoint
from rlmono.rollout.openai_format import split_calls
from rlmono.world.messages import GroupDone

Program = Callable[[openai.AsyncOpenAI, Any], Awaitable[Any]]
program: list[Program] = []
"""What the agent does."""
ASK = [{"role": "user", "content": "6*7"}]
TOOL = {"role": "tool", "content": "42", "tool_call_id": "call_0"}
CALL = '{"name": "calc", "arguments": {"e": "6*7"}}'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_folder(tmp_path_factory.mktemp("language"), "<tool_call>", "</tool_call>", CALL)


async def agent(args: Any, sample: Sample, sampling_params: dict[str, Any], state: Any) -> list[Sample]:
    async with state.endpoint(sample) as session:
        async with openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key, http_client=httpx.AsyncClient(verify=False)) as client:
            await program[-1](client, session)
        samples: list[Sample] = session.samples()
    for s in samples:
        s.reward = 1.0
    return samples


def talk(tokenizer: Tokenizer, what: Program, answers: Any, count: int = 1, **options: Any) -> tuple[GroupDone, ScriptedEngine]:
    """A group of `count` samples made by an agent that does `what`; `answers` as in ScriptedEngine, or texts in order."""
    if isinstance(answers, list):
        left = list(answers)
        answers = lambda _: tokenizer.render(left.pop(0))  # noqa: E731
    program.append(what)
    config = make_config(tokenizer, "test_endpoint.agent", **options)
    prompts = [Sample(index=i, prompt=ASK, tokens=tokenizer.render(ASK, None, True), label="42") for i in range(count)]
    return run_group(config, answers, prompts, stop_token_ids=tokenizer.eos_ids)


def text(tokenizer: Tokenizer, s: Sample) -> str:
    return tokenizer.decode(s.tokens)


def trained(tokenizer: Tokenizer, s: Sample) -> str:
    """What the loss is on."""
    return tokenizer.decode([t for t, m in zip(s.tokens[s.prompt_length:], s.loss_mask or [], strict=True) if m])


async def ask(client: openai.AsyncOpenAI, messages: list[Any], **more: Any) -> Any:
    return await client.chat.completions.create(model="policy", messages=messages, **more)


# ---------------------------------------------------------------- conversations


def test_a_conversation_is_recorded_as_the_engine_saw_it(tokenizer: Tokenizer) -> None:
    said: list[Any] = []

    async def two_turns(client: openai.AsyncOpenAI, session: Any) -> None:
        first = await ask(client, ASK, temperature=0.3, user="me")
        said.append(first)
        second = await ask(client, [*ASK, first.choices[0].message, TOOL])
        said.append(second)
        assert (await client.models.list()).data[0].id == session.model
    done, engine = talk(tokenizer, two_turns, ["<calc>6*7</calc><|end|>", r"\boxed{42}<|end|>"])
    [s] = done.samples
    assert text(tokenizer, s) == r"<|user|>6*7<|end|><|assistant|><calc>6*7</calc><|end|><|tool|>42<|end|><|assistant|>\boxed{42}<|end|>"
    assert trained(tokenizer, s) == r"<calc>6*7</calc><|end|>\boxed{42}<|end|>"
    first, second = (r.input_ids for r in engine.requests)
    assert s.tokens[:6] == first and s.tokens[:len(second)] == second
    assert s.rollout_log_probs == log_probs(first, s.tokens[6:12]) + [0.0] * 5 + log_probs(second, s.tokens[17:])
    assert s.weight_versions == [VERSION] * s.response_length and s.status == COMPLETED and not s.remarks and s.label == "42"
    assert engine.requests[0].sampling.temperature == 1.0, "the run says how tokens are sampled"
    assert [c.choices[0].message.content for c in said] == ["<calc>6*7</calc>", r"\boxed{42}"]
    assert said[0].choices[0].finish_reason == "stop" and said[0].usage.total_tokens == 12 and said[0].object == "chat.completion"


def test_clients_may_send_an_answer_back_in_their_own_way(tokenizer: Tokenizer) -> None:
    """Trimmed, in parts, with fields that say nothing: it is still the answer, and its tokens are the model's own, odd as they are."""
    odd = [*tokenizer.render("  6 "), *tokenizer.eos_ids]

    async def framework(client: openai.AsyncOpenAI, session: Any) -> None:
        await ask(client, ASK)
        parts = [{"type": "text", "text": "6"}]
        await ask(client, [{**ASK[0], "name": None}, {"role": "assistant", "content": parts, "refusal": None, "annotations": []}, TOOL])
    done, engine = talk(tokenizer, framework, lambda ids: odd if len(ids) == 6 else tokenizer.render("4<|end|>"))
    [s] = done.samples
    assert s.tokens[6:11] == odd == engine.requests[1].input_ids[6:11]
    assert trained(tokenizer, s) == "  6 <|end|>4<|end|>"


def test_a_changed_history_is_a_branch_and_no_answer_is_trained_on_twice(tokenizer: Tokenizer) -> None:
    async def changes(client: openai.AsyncOpenAI, session: Any) -> None:
        first = (await ask(client, ASK)).choices[0].message
        await ask(client, [*ASK, first, TOOL])                                      # b: goes on from a
        await ask(client, [*ASK, first, {**TOOL, "content": "41"}])                # c: goes on from a as well
        await ask(client, ASK)                                                      # d: asked again
        await ask(client, [*ASK, {"role": "assistant", "content": "what I like"}, TOOL])       # e: not what the model said
    done, engine = talk(tokenizer, changes, ["a<|end|>", "b<|end|>", "c<|end|>", "d<|end|>", "e<|end|>"])
    assert [trained(tokenizer, s) for s in done.samples] == ["a<|end|>b<|end|>", "c<|end|>", "d<|end|>", "e<|end|>"]
    assert [text(tokenizer, s).removeprefix("<|user|>6*7<|end|><|assistant|>") for s in done.samples] == [
        "a<|end|><|tool|>42<|end|><|assistant|>b<|end|>", "a<|end|><|tool|>41<|end|><|assistant|>c<|end|>", "d<|end|>",
        "what I like<|end|><|tool|>42<|end|><|assistant|>e<|end|>"]
    assert done.samples[3].response == "e<|end|>"
    assert {s.index for s in done.samples} == {0}
    first, again = engine.requests[0], engine.requests[3]
    assert first.input_ids == again.input_ids and first.sampling.seed != again.sampling.seed


def test_seeds_do_not_depend_on_the_order_of_requests(tokenizer: Tokenizer) -> None:
    def seeds(order: list[str]) -> dict[str, Any]:
        async def asks(client: openai.AsyncOpenAI, session: Any) -> None:
            for word in order:
                await ask(client, [{"role": "user", "content": word}])
        _, engine = talk(tokenizer, asks, ["4<|end|>"] * 3)
        return {tokenizer.decode(r.input_ids): r.sampling.seed for r in engine.requests}
    assert seeds(["a", "b", "c"]) == seeds(["c", "a", "b"])


def test_several_choices_logprobs_lengths_and_stops(tokenizer: Tokenizer) -> None:
    async def options(client: openai.AsyncOpenAI, session: Any) -> None:
        got = await ask(client, ASK, n=2, logprobs=True)
        assert [c.message.content for c in got.choices] == ["a", "bc"] and got.usage.completion_tokens == 5
        assert [t.token for t in got.choices[1].logprobs.content] == ["b", "c", "<|end|>"]
        assert [t.logprob for t in got.choices[1].logprobs.content] == log_probs(range(6), tokenizer.render("bc<|end|>"))
        got = await ask(client, ASK, max_completion_tokens=2)
        assert got.choices[0].finish_reason == "length" and got.choices[0].message.content == "de"
        got = await ask(client, ASK, stop=["h", ""])
        assert got.choices[0].finish_reason == "stop" and got.choices[0].message.content == "g"
    done, engine = talk(tokenizer, options, ["a<|end|>", "bc<|end|>", "def", "gh"])
    assert [trained(tokenizer, s) for s in done.samples] == ["a<|end|>", "bc<|end|>", "de", "gh"], "what a stop cut off was sampled all the same"
    assert [r.sampling.stop for r in engine.requests] == [(), (), (), ("h",)]
    assert [s.status for s in done.samples] == [COMPLETED, COMPLETED, TRUNCATED, COMPLETED]


def test_calls_of_tools(tokenizer: Tokenizer) -> None:
    tools = [{"type": "function", "function": {"name": "calc", "parameters": {}}}]

    async def calls(client: openai.AsyncOpenAI, session: Any) -> None:
        got = (await ask(client, ASK, tools=tools, tool_choice="auto")).choices[0]
        assert got.finish_reason == "tool_calls" and got.message.content == "so"
        [call] = got.message.tool_calls
        assert call.function.name == "calc" and json.loads(call.function.arguments) == {"e": "6*7"}
        await ask(client, [*ASK, got.message, {**TOOL, "tool_call_id": call.id}], tools=tools)
        plain = (await ask(client, ASK)).choices[0]
        assert plain.message.tool_calls is None and plain.message.content.startswith("<tool_call>")
    said = f"<tool_call>{CALL}</tool_call><|end|>"
    done, _ = talk(tokenizer, calls, ["so" + said, "4<|end|>", said])
    assert [trained(tokenizer, s) for s in done.samples] == ["so" + said + "4<|end|>", said]
    assert split_calls("a <tool_call>{nonsense}</tool_call>") == ("a <tool_call>{nonsense}</tool_call>", [])


def test_completions_go_on_from_text_and_from_ids(tokenizer: Tokenizer) -> None:
    async def completes(client: openai.AsyncOpenAI, session: Any) -> None:
        first = await client.completions.create(model="policy", prompt="6*7=", max_tokens=50)
        assert first.choices[0].text == "42." and first.choices[0].logprobs is None
        await client.completions.create(model="policy", prompt="6*7=" + first.choices[0].text + " so ")
        ids = tokenizer.render("1+1=")
        await client.completions.create(model="policy", prompt=ids)
        await client.completions.create(model="policy", prompt=[ids + tokenizer.render("2") + [7]], logprobs=1)
    done, engine = talk(tokenizer, completes, ["42.", "yes", "2", "ok"])
    assert [trained(tokenizer, s) for s in done.samples] == ["42.yes", "2ok"]
    assert [text(tokenizer, s) for s in done.samples] == ["6*7=42. so yes", f"1+1=2{tokenizer.decode([7])}ok"]
    assert engine.requests[3].input_ids == [*tokenizer.render("1+1=2"), 7]


def test_a_stream_says_the_same(tokenizer: Tokenizer) -> None:
    async def streams(client: openai.AsyncOpenAI, session: Any) -> None:
        stream = await ask(client, ASK, stream=True, stream_options={"include_usage": True})
        got = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in got if c.choices) == "42"
        assert [c.choices[0].finish_reason for c in got if c.choices] == [None, "stop"] and got[-1].usage.completion_tokens == 3
        said = await client.completions.create(model="policy", prompt="1", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in said]) == "2"
    done, _ = talk(tokenizer, streams, ["42<|end|>", "2<|end|>"])
    assert [trained(tokenizer, s) for s in done.samples] == ["42<|end|>", "2<|end|>"]


def test_sessions_do_not_mix(tokenizer: Tokenizer) -> None:
    async def same(client: openai.AsyncOpenAI, session: Any) -> None:
        message = (await ask(client, ASK)).choices[0].message
        await asyncio.sleep(0.01)
        await ask(client, [*ASK, message, TOOL])
    done, engine = talk(tokenizer, same, lambda ids: tokenizer.render("4<|end|>"), count=8)
    assert [s.index for s in done.samples] == list(range(8)) and {trained(tokenizer, s) for s in done.samples} == {"4<|end|>4<|end|>"}
    assert len({r.sampling.seed for r in engine.requests}) == 16


# ---------------------------------------------------------------- what goes wrong


def refused(tokenizer: Tokenizer, what: Program, answers: Any = (), **options: Any) -> tuple[list[str], GroupDone]:
    """The remarks of an agent that gets one good answer in the end."""
    async def in_the_end(client: openai.AsyncOpenAI, session: Any) -> None:
        await what(client, session)
        if not session.aborted:
            await ask(client, ASK)
    done, _ = talk(tokenizer, in_the_end, [*answers, "4<|end|>"] if isinstance(answers, (list, tuple)) else answers, **options)
    assert not done.failures, done.failures
    return done.samples[0].remarks, done


@pytest.mark.parametrize(("body", "text"), [
    (b"[" * 100_000, "the body is not JSON"),
    (b"{", "the body is not JSON"), (b"[]", "must be a JSON object"), (b"\xff\xfe", "not JSON"), (b"{}", "messages is empty"),
    (b'{"messages": "hello"}', "Expected `array`"), (b'{"messages": [{"content": "1"}]}', "messages[0] has no role"),
    (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "only text is supported"),
    (b'{"messages": [{"role": "assistant", "content": "1"}]}', "nothing to answer"),
    (b'{"messages": [{"role": "system", "content": "1"}]}', "the roles of this template"),
    (b'{"messages": [{"role": "developer", "content": "1"}]}', "not system"),        # its newer name
    (b'{"messages": [{"role": "user", "content": "1"}], "n": 1000}', "n must be from 1 to"),
    (b'{"messages": [{"role": "user", "content": "1"}], "max_tokens": 0}', "max_tokens must be at least 1"),
    (b'{"messages": [{"role": "user", "content": "1"}], "response_format": {"type": "json_object"}}', "response_format"),
    (b'{"messages": [{"role": "user", "content": "1"}], "tool_choice": "required"}', "tool_choice"),
    (b'{"messages": [{"role": "user", "content": "1"}], "guided_regex": "a"}', "guided_regex"),
    (b'{"messages": [{"role": "assistant", "tool_calls": [{}]}, {"role": "user", "content": "1"}]}', "are not calls of functions"),
])
def test_a_bad_request_says_why(tokenizer: Tokenizer, body: bytes, text: str) -> None:
    async def bad(client: openai.AsyncOpenAI, session: Any) -> None:
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {session.api_key}"}) as http:
            answer = await http.post(f"{session.base_url}/chat/completions", data=body)
            assert answer.status == 400 and text in (await answer.json())["error"]["message"]
    assert refused(tokenizer, bad)[0] == ["endpoint_bad_request"]


def test_strangers_and_wrong_paths(tokenizer: Tokenizer) -> None:
    async def strange(client: openai.AsyncOpenAI, session: Any) -> None:
        assert session.base_url.startswith("http://127.0.0.1:")
        stranger = client.with_options(api_key="guess")
        with pytest.raises(openai.AuthenticationError):
            await ask(stranger, ASK)
        with pytest.raises(openai.NotFoundError):
            await client.embeddings.create(model="policy", input="1")
        async with aiohttp.ClientSession() as http:
            assert (await http.get(f"{session.base_url}/models")).status == 401
            assert (await http.get(f"{session.base_url}/models", headers={"Authorization": f"bearer {session.api_key}"})).status == 200
    assert refused(tokenizer, strange)[0] == ["endpoint_unauthorized", "endpoint_bad_request", "endpoint_unauthorized"]


def test_a_token_ends_with_its_sample(tokenizer: Tokenizer) -> None:
    tokens: list[str] = []

    async def keeps(client: openai.AsyncOpenAI, session: Any) -> None:
        tokens.append(session.api_key)
        await asyncio.sleep(0.05 if len(tokens) == 1 else 0.2)
        if session.api_key == tokens[1]:
            with pytest.raises(openai.AuthenticationError):
                await ask(client.with_options(api_key=tokens[0]), ASK)
        await ask(client, ASK)
    done, _ = talk(tokenizer, keeps, lambda _: tokenizer.render("4<|end|>"), count=2)
    assert not done.failures and len(done.samples) == 2


def test_a_body_that_is_too_large_or_never_ends(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "MOST_BYTES", 5000)
    monkeypatch.setattr(endpoint, "BODY_TIMEOUT_S", 0.1)

    async def large(client: openai.AsyncOpenAI, session: Any) -> None:
        with pytest.raises(openai.APIStatusError, match="a body of more than 5000 bytes") as e:
            await ask(client, [{"role": "user", "content": "1" * 6000}])
        assert e.value.status_code == 413
        port = int(session.base_url.split(":")[2].split("/")[0])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {session.api_key}\r\nContent-Length: 99\r\n\r\n"
        writer.write(head.encode() + b"{")
        assert b" 408 " in await reader.readline()
        writer.close()
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {session.api_key}", "Content-Encoding": "gzip"}) as http:
            answer = await http.post(f"{session.base_url}/chat/completions", data=b"no gzip")
            assert answer.status == 400 and "cannot be read" in await answer.text()
    assert refused(tokenizer, large)[0] == ["endpoint_too_large", "endpoint_slow_body", "endpoint_bad_request"]


def test_a_client_that_leaves_takes_its_request_out_of_the_engine(tokenizer: Tokenizer) -> None:
    async def leaves(client: openai.AsyncOpenAI, session: Any) -> None:
        with pytest.raises(openai.APITimeoutError):
            await ask(client.with_options(timeout=0.2, max_retries=0), [{"role": "user", "content": "for ever"}])
        while not session.remarks:
            await asyncio.sleep(0.01)
    longer = len(tokenizer.render([{"role": "user", "content": "for ever"}], None, True))
    answers = lambda ids: None if len(ids) == longer else tokenizer.render("4<|end|>")  # noqa: E731
    program_remarks, done = refused(tokenizer, leaves, answers)
    assert program_remarks == ["endpoint_disconnect"] and [trained(tokenizer, s) for s in done.samples] == ["4<|end|>"]


def test_an_agent_that_ends_in_the_middle_leaves_nothing_behind(tokenizer: Tokenizer) -> None:
    async def gives_up(client: openai.AsyncOpenAI, session: Any) -> None:
        await ask(client, ASK)
        task = asyncio.create_task(ask(client, [{"role": "user", "content": "1"}]))
        await asyncio.sleep(0.1)
        task.add_done_callback(lambda t: t.exception())
    done, engine = talk(tokenizer, gives_up, lambda ids: tokenizer.render("4<|end|>") if len(ids) == 6 else None)
    assert len(engine.aborted) == 1 and not engine._left and not engine._waiting and len(done.samples) == 1


def test_a_full_context_truncates(tokenizer: Tokenizer) -> None:
    async def goes_on(client: openai.AsyncOpenAI, session: Any) -> None:
        first = (await ask(client, ASK)).choices[0].message
        with pytest.raises(openai.BadRequestError) as e:
            await ask(client, [*ASK, first, {**TOOL, "content": "1" * 300}])
        assert e.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="the conversation has 603 tokens, and there is room for 512"):
            await ask(client, [{"role": "user", "content": "1" * 600}])
    done, _ = talk(tokenizer, goes_on, ["a<|end|>"])
    [s] = done.samples
    assert s.status == TRUNCATED and trained(tokenizer, s) == "a<|end|>" and s.remarks == ["endpoint_context_full"] * 2


def test_an_aborted_session_begins_again(tokenizer: Tokenizer) -> None:
    async def aborted(client: openai.AsyncOpenAI, session: Any) -> None:
        first = (await ask(client, ASK)).choices[0].message
        for _ in range(2):
            with pytest.raises(openai.APIStatusError, match="the rollout is over") as e:
                await ask(client, [*ASK, first, TOOL])
            assert e.value.status_code == 410
    done, engine = talk(tokenizer, aborted, lambda ids: tokenizer.render("a<|end|>") if len(ids) == 6 else (tokenizer.render("b"), "abort"))
    [s] = done.samples
    assert s.status == ABORTED and s.response_length == 0 and text(tokenizer, s) == "<|user|>6*7<|end|><|assistant|>"
    assert len(engine.requests) == 2, "the engine is not asked again"


def test_failures_of_the_engine_and_of_agents_that_never_ask(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: list[int]) -> Any:
        raise RuntimeError("the engine is on fire")

    async def asks(client: openai.AsyncOpenAI, session: Any) -> None:
        with pytest.raises(openai.InternalServerError, match="on fire"):
            await ask(client, ASK)

    async def never(client: openai.AsyncOpenAI, session: Any) -> None:
        return None
    done, _ = talk(tokenizer, asks, broken)
    assert [(f.outcome, f.detail) for f in done.failures] == [("generate_failed", "endpoint_unused; endpoint_error")]
    done, _ = talk(tokenizer, never, [])
    assert [(f.outcome, f.detail) for f in done.failures] == [("generate_failed", "endpoint_unused")]
