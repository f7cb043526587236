"""OpenAI's chat and completion requests and responses, as far as the endpoint speaks them: checked on the way in, made on the way out.

How tokens are sampled is the run's to say, not the request's: temperature, top_p, seed and penalties are read over.
What would change an answer in a way that is not supported is refused by name.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

import msgspec

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty")
"""The run's own are used."""
READ_OVER = (*SAMPLING, "model", "user", "metadata", "store", "stream_options", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
             "service_tier", "reasoning_effort", "verbosity")
NEUTRAL: dict[str, tuple[Any, ...]] = {"response_format": ({"type": "text"},), "logit_bias": ({},), "top_logprobs": (0,), "echo": (False,),
                                       "best_of": (1,), "suffix": ("",), "modalities": (["text"],), "tool_choice": ("auto", "none")}
"""Refused with other values than these."""
MOST_CHOICES = 64


class RequestError(Exception):
    """A request that gets an answer with this status and no generation. `outcome` is its name in the metrics."""

    def __init__(self, status: int, message: str, code: str, outcome: str = "endpoint_bad_request", param: Optional[str] = None):
        super().__init__(message)
        self.status, self.code, self.outcome, self.param = status, code, outcome, param

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": "invalid_request_error", "param": self.param, "code": self.code}}


class _Common(msgspec.Struct):
    n: Optional[int] = None
    max_tokens: Optional[int] = None
    max_completion_tokens: Optional[int] = None
    stop: Union[None, str, list[str]] = None
    stream: Optional[bool] = None
    stream_options: Optional[dict[str, Any]] = None
    tools: Optional[list[dict[str, Any]]] = None
    tool_choice: Union[None, str, dict[str, Any]] = None

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.stop,) if isinstance(self.stop, str) else self.stop or ()))      # "" would end an answer at once


class ChatRequest(_Common):
    messages: list[dict[str, Any]] = []
    logprobs: Optional[bool] = None

    @property
    def wants_tokens(self) -> bool:
        return bool(self.logprobs)


class CompletionRequest(_Common):
    prompt: Union[str, list[Union[int, str, list[int]]]] = ""
    logprobs: Optional[int] = None

    @property
    def wants_tokens(self) -> bool:
        return self.logprobs is not None


Request = Union[ChatRequest, CompletionRequest]


def parse(body: bytes, kind: type[Any]) -> Any:
    """A ChatRequest or CompletionRequest. RequestError (400) for anything else."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise RequestError(400, f"the body is not JSON: {e}", "invalid_json") from None
    if not isinstance(fields, dict):
        raise RequestError(400, "the body must be a JSON object", "invalid_json")
    for name, value in fields.items():
        known = name in kind.__struct_fields__ or name in READ_OVER or value is None
        if (name in NEUTRAL and value is not None and value not in NEUTRAL[name]) or not (known or name in NEUTRAL):
            raise RequestError(400, f"{name} {json.dumps(value)[:80]} is not supported here", "unsupported_parameter", param=name)
    try:
        request = msgspec.convert(fields, kind)
    except msgspec.ValidationError as e:
        raise RequestError(400, str(e), "invalid_type") from None
    if request.n is not None and not 1 <= request.n <= MOST_CHOICES:
        raise RequestError(400, f"n must be from 1 to {MOST_CHOICES}, not {request.n}", "invalid_value", param="n")
    if (most := most_tokens(request)) is not None and most < 1:
        raise RequestError(400, "max_tokens must be at least 1", "invalid_value", param="max_tokens")
    return request


def most_tokens(request: Request) -> Optional[int]:
    """New tokens at most, by either of its names."""
    return request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens


# ---------------------------------------------------------------- messages

Key = tuple[str, str, tuple[tuple[str, str], ...], Optional[str]]
"""What makes two messages the same: role, text, tool calls, and the call that a tool's message answers."""


def cleaned(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A message as chat templates want it: content is a string, arguments of tool calls are objects. RequestError for what is none."""
    where = f"messages[{number}]"
    if not isinstance(role := message.get("role"), str):
        raise RequestError(400, f"{where} has no role", "invalid_value", param=where)
    role = "system" if role == "developer" else role         # its newer name, which templates do not know
    out: dict[str, Any] = {"role": role, "content": _text(message.get("content"), where)}
    for name in ("name", "tool_call_id"):
        if isinstance(message.get(name), str):
            out[name] = message[name]
    if calls := message.get("tool_calls"):
        try:
            out["tool_calls"] = [{"id": c.get("id"), "type": "function", "function": {
                "name": c["function"]["name"], "arguments": _arguments(c["function"].get("arguments"))}} for c in calls]
        except (TypeError, KeyError, AttributeError) as e:
            raise RequestError(400, f"{where}.tool_calls are not calls of functions: {e!r}", "invalid_value", param=where) from None
    return out


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise RequestError(400, f"{where}: only text is supported", "unsupported_content", param=where)
    return "".join(p["text"] for p in parts)


def _arguments(given: Any) -> Any:
    """OpenAI's arguments are JSON in a string; what is none stays the string."""
    try:
        return json.loads(given) if isinstance(given, str) and given else given or {}
    except ValueError:
        return given


def key(message: Mapping[str, Any]) -> Key:
    """Of a cleaned message. Clients may trim an answer of the model, and name its calls as they like."""
    role, content = message["role"], message["content"]
    calls = tuple((c["function"]["name"], json.dumps(c["function"]["arguments"], sort_keys=True)) for c in message.get("tool_calls", ()))
    return role, content.strip() if role == "assistant" else content, calls, message.get("tool_call_id")


_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def split_calls(text: str) -> tuple[str, list[tuple[str, Any]]]:
    """(text before the first call, (name, arguments) of each call) of an answer that calls tools as Hermes and Qwen do:
    `<tool_call>{"name": …, "arguments": {…}}</tool_call>`. A call that is no JSON is left in the text, and so are all."""
    calls = []
    for found in _CALL.finditer(text):
        try:
            call = json.loads(found[1])
            calls.append((str(call["name"]), call.get("arguments", {})))
        except (ValueError, KeyError, TypeError, AttributeError):
            return text, []
    return (text[:text.index("<tool_call>")].rstrip(), calls) if calls else (text, [])


# ---------------------------------------------------------------- responses

@dataclass
class Choice:
    """One answer: its text (without the token that ends it), and its calls of tools as (id, name, arguments)."""

    text: str
    calls: list[tuple[str, str, Any]]
    finish: str
    prompt_tokens: int
    written: int
    tokens: Optional[list[tuple[str, float]]] = None
    """(text, logprob) of each that it is made of, for a request that wants to know."""

    def message(self) -> dict[str, Any]:
        """As the client gets it, and should send it back."""
        out: dict[str, Any] = {"role": "assistant", "content": self.text or (None if self.calls else "")}
        if self.calls:
            out["tool_calls"] = [{"id": id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
                                 for id, name, arguments in self.calls]
        return out


def chat_response(id: str, model: str, choices: Sequence[Choice]) -> dict[str, Any]:
    made = [{"index": i, "message": c.message(), "finish_reason": c.finish, "logprobs": None if c.tokens is None else {
        "content": [{"token": t, "logprob": p, "bytes": list(t.encode()), "top_logprobs": []} for t, p in c.tokens]}}
            for i, c in enumerate(choices)]
    return _response(id, "chat.completion", model, made, choices)


def completion_response(id: str, model: str, choices: Sequence[Choice]) -> dict[str, Any]:
    made = [{"index": i, "text": c.text, "finish_reason": c.finish, "logprobs": None if c.tokens is None else {
        "tokens": [t for t, _ in c.tokens], "token_logprobs": [p for _, p in c.tokens]}}
            for i, c in enumerate(choices)]
    return _response(id, "text_completion", model, made, choices)


def _response(id: str, kind: str, model: str, made: list[dict[str, Any]], choices: Sequence[Choice]) -> dict[str, Any]:
    prompt, written = choices[0].prompt_tokens, sum(c.written for c in choices)
    usage = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
    return {"id": id, "object": kind, "created": int(time.time()), "model": model, "choices": made, "usage": usage}


def chunks(response: dict[str, Any], with_usage: bool) -> list[dict[str, Any]]:
    """The response as a stream has it: each choice whole in one chunk, then how it ended, then the usage."""
    chat = response["object"] == "chat.completion"
    head = {"id": response["id"], "object": "chat.completion.chunk" if chat else "text_completion", "created": response["created"],
            "model": response["model"]}
    out = []
    for c in response["choices"]:
        whole: dict[str, Any] = {"delta": _delta(c["message"])} if chat else {"text": c["text"]}
        nothing: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        out.append({**head, "choices": [{"index": c["index"], **whole, "logprobs": c["logprobs"], "finish_reason": None}]})
        out.append({**head, "choices": [{"index": c["index"], **nothing, "logprobs": None, "finish_reason": c["finish_reason"]}]})
    return [*out, {**head, "choices": [], "usage": response["usage"]}] if with_usage else out


def _delta(message: dict[str, Any]) -> dict[str, Any]:
    calls = [{"index": i, **call} for i, call in enumerate(message.get("tool_calls", ()))]
    return {**message, "tool_calls": calls} if calls else message
