"""From a prompt to a finished sample: the default generate function, and what a function of the user's own may use.

    async def function(args, sample, sampling_params, state):       # sampling_params is a dict
        text = await state.turn(sample, sampling_params)            # the model writes
        state.append_messages(sample, [{"role": "tool", "content": "4"}])    # somebody else does: loss mask 0
        ...
        return sample                                               # or several

What the model wrote is never tokenised again: a sample's tokens are those that the engine saw and sampled.
"""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Optional, Union

import msgspec

from rlmono.data.sample import ABORTED, COMPLETED, TRUNCATED, Sample
from rlmono.data.tokenizer import Messages, Tokenizer
from rlmono.rollout.engines import EngineClient
from rlmono.rollout.text import Texts
from rlmono.world.messages import Output, Sampling

if TYPE_CHECKING:
    from rlmono.rollout.endpoint import Endpoint
    from rlmono.rollout.session import Session

TURN_START = "turn_start"
"""In a sample's metadata: where in the response its last turn begins."""
_STATUS = {"stop": COMPLETED, "length": TRUNCATED, "abort": ABORTED}
SamplingParams = Union[Sampling, Mapping[str, Any]]


class GenerateState:
    """What a generate function may use, made for one sample: the engine of its group, the tokenizer, the limits, the endpoint.

    `limit` is the most tokens that the sample may have, prompt and all: the context's end, or `max_new_tokens` after the prompt.
    """

    def __init__(self, args: Any, engine: EngineClient, tokenizer: Tokenizer, sample: Sample, sampling: Sampling, evaluation: bool = False,
                 endpoint: Optional[Endpoint] = None, texts: Optional[Texts] = None):
        self.args, self.engine, self.tokenizer, self.evaluation = args, engine, tokenizer, evaluation
        self.limit = min(context_length(args), sample.prompt_length + sampling.max_new_tokens)
        self.sampling = sampling
        self._endpoint, self._texts = endpoint, texts
        self._seed = (args.rollout_seed, evaluation, sample.group_index, sample.index) if args.deterministic else None
        self._calls = 0
        self.cancelled_at_engine = False
        """The function's time was up while it waited for the engine."""

    async def generate(self, tokens: list[int], sampling_params: Optional[SamplingParams] = None, limit: Optional[int] = None,
                       turn: object = None) -> Output:
        """What the engine writes after these tokens; empty, with finish `length`, when `limit` (default: the sample's) is reached.

        In --deterministic its seed is made of rollout seed, sample and `turn`, by default the number of the call.
        Raises EngineFault when the engine does not answer or refuses, ValueError for a parameter that there is not.
        """
        sampling = self.sampling if sampling_params is None else as_sampling(sampling_params)
        turn, self._calls = self._calls if turn is None else turn, self._calls + 1
        room = min(sampling.max_new_tokens, (self.limit if limit is None else limit) - len(tokens))
        if room <= 0:
            return Output("", [], [], "length", 0)
        seed = sampling.seed if self._seed is None else request_seed(*self._seed, turn)
        sampling = msgspec.structs.replace(sampling, max_new_tokens=room, seed=seed)
        try:
            return await self.engine.generate(tokens, sampling, min(self.args.generate_timeout_s, self.args.phase_timeout_s))
        except asyncio.CancelledError:
            self.cancelled_at_engine = True
            raise

    async def turn(self, sample: Sample, sampling_params: Optional[SamplingParams] = None) -> str:
        """The model goes on after the sample's tokens: what it writes is appended, with mask 1. Returns the text of its turn, which is all
        since others wrote last. `sample.status` says how the turn ended: completed (it stopped by itself), truncated (no room is left) or
        aborted (the rollout is over: return the sample as it is; it may come again, and go on)."""
        output = await self.generate(Sample.tokens.peek(sample), sampling_params)
        append_tokens(sample, output)
        sample.response = await self.text_since(0, sample, output)
        start = sample.metadata.get(TURN_START, 0)
        return await self.text_since(start, sample, output) if start else sample.response

    async def text_since(self, start: int, sample: Sample, output: Output) -> str:
        """The text of the response from its token `start` on, of which the output is the end; the engine has sent it where it is all of it."""
        if output.text is not None and output.length == sample.response_length - start:
            return output.text
        return await self.text(Sample.tokens.view(sample)[sample.prompt_length + start:].tolist())

    async def text(self, tokens: Sequence[int]) -> str:
        """Their text as rewards see it. What takes long is done beside the event loop: no other request would be answered meanwhile."""
        if self._texts is None:
            return self.tokenizer.decode(tokens, self.args.rollout_skip_special_tokens)
        return await self._texts.decode(tokens)

    def append_messages(self, sample: Sample, messages: Messages) -> bool:
        """Append messages that others wrote (a tool's, the user's; all of them at once) as the chat template renders them after an answer,
        with mask 0, up to where the next answer begins. False, and the sample is truncated, when they leave the model no room."""
        prompt = [{"role": "user", "content": sample.prompt}] if isinstance(sample.prompt, str) else sample.prompt
        return self._append(sample, self.tokenizer.continuation(Sample.tokens.peek(sample), prompt, messages, sample.tools))

    def append_text(self, sample: Sample, text: str) -> bool:
        """Append a text that others wrote, as it is, with mask 0. False, and the sample is truncated, when it leaves the model no room."""
        return self._append(sample, self.tokenizer.render(text))

    def _append(self, sample: Sample, tokens: Sequence[int]) -> bool:
        if sample.length + len(tokens) >= self.limit:
            sample.status = TRUNCATED
            return False
        append_observation(sample, tokens)
        sample.response += self.tokenizer.decode(tokens, self.args.rollout_skip_special_tokens)     # few; a turn decodes the whole anew
        return True

    def endpoint(self, sample: Sample) -> AbstractAsyncContextManager[Session]:
        """`async with state.endpoint(sample) as session`: an OpenAI-compatible server for this sample, at `session.base_url` with
        `session.api_key`; what was said through it is `session.samples()`."""
        if self._endpoint is None:
            raise RuntimeError("there is no endpoint here: a host has one")
        return self._endpoint.session(self, sample)


async def generate(args: Any, sample: Sample, sampling: SamplingParams, state: GenerateState) -> Sample:
    """One turn: the prompt's tokens in, the response's tokens, logprobs and weight versions on the sample."""
    await state.turn(sample, sampling)
    return sample


def append_tokens(sample: Sample, output: Output) -> None:
    """Append what the engine wrote to the sample's tokens, and leave its text as it was."""
    n = output.length
    Sample.tokens.extend(sample, Output.output_ids.bytes_of(output))
    Sample.rollout_log_probs.extend(sample, Output.log_probs.bytes_of(output))
    Sample.weight_versions.repeat(sample, output.weight_version, n)
    if sample.loss_mask is not None:
        sample.loss_mask = sample.loss_mask + [1] * n
    sample.response_length += n
    sample.status = _STATUS.get(output.finish, output.finish)


def append_observation(sample: Sample, tokens: Sequence[int]) -> None:
    """Append tokens that the model did not write: mask 0, logprob 0, and the weight version of what stands before them."""
    n, mask, versions = len(tokens), sample.whole_loss_mask, Sample.weight_versions.view(sample)
    Sample.tokens.extend(sample, tokens)        # or raises, before anything is changed
    sample.loss_mask = mask + [0] * n
    Sample.rollout_log_probs.extend(sample, array("f", [0.0]) * n)
    Sample.weight_versions.repeat(sample, versions[-1] if versions else 0, n)
    sample.response_length += n
    sample.metadata = {**sample.metadata, TURN_START: sample.response_length}


def context_length(args: Any) -> int:
    """The most tokens of prompt and response together."""
    return int(args.rollout_max_context_len or args.model["max_position_embeddings"])


def as_dict(sampling: Sampling) -> dict[str, Any]:
    """Sampling parameters as generate functions get them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in msgspec.structs.asdict(sampling).items() if name != "seed"}


def as_sampling(params: SamplingParams) -> Sampling:
    """The parameters of one request; ValueError for one that there is not, or a value that it cannot have."""
    if isinstance(params, Sampling):
        return params
    given = {name: value for name, value in params.items() if value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = (given["stop"],)
    try:
        sampling = msgspec.convert(given, Sampling)
    except msgspec.ValidationError as error:
        raise ValueError(f"sampling parameters: {error}; there are {', '.join(Sampling.__struct_fields__)}") from None
    if sampling.max_new_tokens < 1 or sampling.temperature < 0 or not 0 < sampling.top_p <= 1:
        raise ValueError("sampling parameters: max_new_tokens is at least 1, temperature at least 0, and top_p above 0 and at most 1, "
                         f"not {sampling.max_new_tokens}, {sampling.temperature:g} and {sampling.top_p:g}")
    return sampling


def request_seed(*parts: object) -> int:
    """A sampling seed from what identifies a request, so that its tokens depend on nothing else: 62 bits."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
