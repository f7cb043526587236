"""From a prompt to a finished sample: the default generate function, and what it needs."""

from __future__ import annotations

import hashlib
from typing import Any

from rlmono.data.sample import ABORTED, COMPLETED, TRUNCATED, Sample
from rlmono.data.tokenizer import Tokenizer
from rlmono.rollout.engines import EngineClient
from rlmono.world.messages import Output, Sampling

_STATUS = {"stop": COMPLETED, "length": TRUNCATED, "abort": ABORTED}


class GenerateState:
    """What a generate function may use: the engine of the sample's group, the tokenizer, and the deadline."""

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer, timeout_s: float):
        self.engine, self.tokenizer, self.timeout_s = engine, tokenizer, timeout_s


async def generate(args: Any, sample: Sample, sampling: Sampling, state: GenerateState) -> Sample:
    """One turn: the prompt's tokens in, the response's tokens, logprobs and weight versions on the sample."""
    output = await state.engine.generate(sample.tokens, sampling, state.timeout_s)
    append_output(args, sample, output, state.tokenizer)
    return sample


def append_output(args: Any, sample: Sample, output: Output, tokenizer: Tokenizer) -> None:
    """Append what the engine wrote to the sample's response."""
    sample.tokens = sample.tokens + output.output_ids
    sample.response_length += len(output.output_ids)
    sample.rollout_log_probs = (sample.rollout_log_probs or []) + output.log_probs
    sample.weight_versions = (sample.weight_versions or []) + [output.weight_version] * len(output.output_ids)
    sample.response = tokenizer.decode(sample.tokens[sample.prompt_length:], args.rollout_skip_special_tokens)
    sample.status = _STATUS.get(output.finish, output.finish)


def request_seed(*parts: object) -> int:
    """A sampling seed from what identifies a request, so that its tokens depend on nothing else: 62 bits."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
