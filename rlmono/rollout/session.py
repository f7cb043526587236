"""What one sample's client said and was answered, with the tokens as the engine saw and sampled them.

A conversation is a path of answers. A request is matched with what there is: the longest conversation that it goes on from keeps its
tokens, and only what is new is tokenised, as the chat template writes it after an answer. A request that changes what was said before,
or asks again, begins a branch. Each branch is a sample; an answer that several share is trained on in the first.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any, Optional, Union

import msgspec

from rlmono.data.sample import ABORTED, FAILED, TRUNCATED, Sample
from rlmono.rollout.generate import GenerateState, append_observation, append_tokens, context_length
from rlmono.rollout.openai_format import ChatRequest, Choice, CompletionRequest, Key, Request, RequestError, cleaned, key, most_tokens, split_calls
from rlmono.world.messages import Output

Tools = Optional[list[dict[str, Any]]]


@dataclass(eq=False)
class Answer:
    """After one answer of the model: `sample` is all up to its last token, the last `written` of its tokens are the answer. `messages` and
    their `keys` are the conversation, with the answer."""

    parent: Optional[Answer]
    sample: Sample
    limit: int
    written: int
    messages: list[dict[str, Any]]
    keys: tuple[Key, ...] = ()
    tools: Tools = None
    text: Optional[str] = None
    """Of a completion: the prompt's and the answer's; None in a chat."""
    continued: bool = False


@dataclass
class Place:
    """Where a request goes on: its tokens are those of `base`."""

    parent: Optional[Answer]
    base: Sample
    limit: int


class Session:
    """One sample's conversations. A client finds it at `base_url` by `api_key`; `samples()` is what was said."""

    def __init__(self, state: GenerateState, sample: Sample, base_url: str, api_key: str, model: str):
        self.state, self.base_url, self.api_key, self.model = state, base_url, api_key, model
        self.remarks: list[str] = []
        """Counted, named outcomes of requests; they become those of the first sample."""
        self.aborted = self.closed = False
        self.tasks: set[asyncio.Task[Any]] = set()
        self._given = sample
        self._answers: list[Answer] = []
        self._asked: Counter[bytes] = Counter()
        self._calls = itertools.count()

    # ------------------------------------------------------------ requests

    async def chat(self, request: ChatRequest) -> list[Choice]:
        """The model's answers to a conversation. RequestError where there can be none."""
        if not request.messages:
            raise RequestError(400, "messages is empty", "invalid_value", param="messages")
        messages = [cleaned(m, i) for i, m in enumerate(request.messages)]
        if messages[-1]["role"] == "assistant":
            raise RequestError(400, "the last message is the assistant's: there is nothing to answer", "invalid_value", param="messages")
        keys = tuple(key(m) for m in messages)
        tools = request.tools or None
        parent = max((a for a in self._answers if a.text is None and a.tools == tools and keys[:len(a.keys)] == a.keys),
                     key=lambda a: len(a.keys), default=None)
        place = self._after(parent, self._rest(parent, messages, tools)) if parent else self._new(
            self._tokens(lambda: self.state.tokenizer.render(messages, tools, apply_chat_template=True)), messages)
        calls = bool(tools) and request.tool_choice != "none"

        def record(answer: Answer, choice: Choice) -> None:
            said = cleaned(choice.message(), len(messages))
            answer.messages, answer.tools, answer.keys = [*messages, said], tools, (*keys, key(said))
        return await self._answer(request, place, calls, record)

    async def complete(self, request: CompletionRequest) -> list[Choice]:
        """The model's continuations of a text, or of token ids."""
        prompt, tokenizer = _prompt(request.prompt, self.state.args.model["vocab_size"]), self.state.tokenizer
        parent = max((a for a in self._answers if a.text is not None and _begins(prompt, a)), key=lambda a: a.sample.length, default=None)
        if isinstance(prompt, str):
            text, rest = prompt, prompt[len(parent.text or ""):] if parent else prompt
            new = self._tokens(lambda: tokenizer.render(rest))
        else:
            text, new = tokenizer.decode(prompt), prompt[parent.sample.length if parent else 0:]
        place = self._after(parent, new) if parent else self._new(new, text)

        def record(answer: Answer, choice: Choice) -> None:
            answer.text = text + choice.text
        return await self._answer(request, place, False, record)

    # ------------------------------------------------------------ where it goes on

    def _rest(self, parent: Answer, messages: list[dict[str, Any]], tools: Tools) -> list[int]:
        before = parent.messages[:-1]
        new = messages[len(parent.messages):]
        return self._tokens(lambda: self.state.tokenizer.continuation(Sample.tokens.peek(parent.sample), before, new, tools))

    def _tokens(self, render: Any) -> list[int]:
        try:
            return render()     # type: ignore[no-any-return]
        except ValueError as e:     # a template that refuses roles, a character that there is not
            raise RequestError(400, str(e), "invalid_value", param="messages") from None

    def _new(self, tokens: list[int], prompt: Any) -> Place:
        g, limit = self._given, context_length(self.state.args)
        if not tokens or len(tokens) >= limit:
            self._full(None, len(tokens))
        base = Sample(index=g.index, group_index=g.group_index, prompt=prompt, tokens=tokens, label=g.label, metadata=g.metadata)
        return Place(None, base, min(limit, len(tokens) + self.state.sampling.max_new_tokens))

    def _after(self, parent: Answer, tokens: list[int]) -> Place:
        if parent.sample.length + len(tokens) >= parent.limit:
            self._full(parent, parent.sample.length + len(tokens))
        base = copy.copy(parent.sample)
        append_observation(base, tokens)
        return Place(parent, base, parent.limit)

    def _full(self, parent: Optional[Answer], tokens: int) -> None:
        if parent is not None:
            parent.sample.status = TRUNCATED
        limit = parent.limit if parent else context_length(self.state.args)
        raise RequestError(400, f"the conversation has {tokens} tokens, and there is room for {limit} with the answer", "context_length_exceeded",
                           "endpoint_context_full")

    # ------------------------------------------------------------ answers

    async def _answer(self, request: Request, place: Place, calls: bool, record: Any) -> list[Choice]:
        state = self.state
        if self.aborted:
            raise _over()
        most = min(most_tokens(request) or state.sampling.max_new_tokens, state.sampling.max_new_tokens)
        sampling = msgspec.structs.replace(state.sampling, max_new_tokens=most, stop=(*state.sampling.stop, *request.stops))
        digest = hashlib.blake2b(Sample.tokens.bytes_of(place.base), digest_size=8).digest()
        turns = []
        for _ in range(request.n or 1):     # a seed by what is asked, and the how-manieth time: the order of requests is the client's
            turns.append((digest.hex(), self._asked[digest]))
            self._asked[digest] += 1
        ids = Sample.tokens.peek(place.base)
        outputs = await asyncio.gather(*(state.generate(ids, sampling, place.limit, turn) for turn in turns))
        return [await self._record(place, output, sampling.stop, calls, record, request.wants_tokens) for output in outputs]

    async def _record(self, place: Place, output: Output, stop: tuple[str, ...], calls: bool, record: Any, tokens: bool) -> Choice:
        if output.finish == "abort":
            self.aborted = True
            raise _over()
        state = self.state
        sample = copy.copy(place.base)
        append_tokens(sample, output)
        ends = output.finish == "stop" and output.length > 0 and output.output_ids[-1] in state.sampling.stop_token_ids
        begun = sample.response_length - output.length
        sample.response, text = await asyncio.gather(state.text_since(0, sample, output),
                                                     state.text(output.output_ids[:-1]) if ends else state.text_since(begun, sample, output))
        if output.finish == "stop" and not ends:
            text = text[:min((i for s in stop if (i := text.find(s)) >= 0), default=len(text))]
        choice = self._choice(text, output, calls, place.base.length)
        if tokens:
            choice.tokens = [(state.tokenizer.decode([i]), p) for i, p in zip(output.output_ids, output.log_probs, strict=True)]
        answer = Answer(place.parent, sample, place.limit, output.length, [])
        record(answer, choice)
        if place.parent is not None:
            place.parent.continued = True
        self._answers.append(answer)
        return choice

    def _choice(self, text: str, output: Output, calls: bool, prompt_tokens: int) -> Choice:
        text, asked = split_calls(text) if calls else (text, [])
        finish = "tool_calls" if asked and output.finish == "stop" else output.finish
        return Choice(text, [(f"call_{next(self._calls)}", *call) for call in asked], finish, prompt_tokens, output.length)

    # ------------------------------------------------------------ samples

    def samples(self) -> list[Sample]:
        """One for each branch, in the order in which their last answers came. After an abort the given sample, without a response: a client's
        program cannot go on in the middle, so it begins again. Without any answer one that has failed."""
        g = self._given
        if self.aborted:
            fresh = copy.copy(g)
            fresh.tokens, fresh.response, fresh.response_length = g.tokens[:g.prompt_length], "", 0
            fresh.rollout_log_probs = fresh.loss_mask = fresh.weight_versions = None
            fresh.status, fresh.remarks = ABORTED, [*g.remarks, *self.remarks]
            return [fresh]
        out: list[Sample] = []
        trained: set[Answer] = set()
        for last in (a for a in self._answers if not a.continued):
            sample = copy.copy(last.sample)
            mask = [0] * sample.response_length
            here: Optional[Answer] = last
            while here is not None:
                if here not in trained:
                    end = here.sample.response_length
                    mask[end - here.written:end] = [1] * here.written
                    trained.add(here)
                here = here.parent
            sample.loss_mask, sample.metadata, sample.remarks = mask, dict(g.metadata), []
            out.append(sample)
        if not out:
            out = [Sample(index=g.index, group_index=g.group_index, status=FAILED, remarks=["endpoint_unused"])]
        out[0].remarks = [*out[0].remarks, *self.remarks]
        return out

    async def close(self) -> None:
        """End the requests that still run, and wait until the engine has let go of them."""
        self.closed = True
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.state.engine.settle()


def _prompt(given: Any, vocabulary: int) -> Union[str, list[int]]:
    """One text, or token ids. RequestError for anything else."""
    prompt: Any = given[0] if isinstance(given, list) and len(given) == 1 and isinstance(given[0], (str, list)) else given
    if not prompt or not isinstance(prompt, str) and not all(isinstance(i, int) and 0 <= i < vocabulary for i in prompt):
        raise RequestError(400, f"prompt must be one text, or a list of token ids from 0 to {vocabulary - 1}", "invalid_value", param="prompt")
    return prompt       # type: ignore[no-any-return]


def _begins(prompt: Union[str, list[int]], answer: Answer) -> bool:
    if isinstance(prompt, str):
        return prompt.startswith(answer.text or "")
    return prompt[:answer.sample.length] == Sample.tokens.peek(answer.sample)


def _over() -> RequestError:
    return RequestError(410, "the rollout is over: this sample will be made again", "rollout_over", "endpoint_aborted")
