"""A user's generate function: its signature, its call, and what becomes of a call that does not come back with a sample.

Such a call is a counted, named outcome of its sample:

    prompt_empty, prompt_too_long       nothing to generate from: not called
    generate_error                      it raised
    generate_timeout                    it did not return within --generate-timeout-s
    engine_timeout                      likewise, while it waited for the engine
    engine_refused                      the engine said why it would not answer
    generate_invalid                    it returned something that cannot be trained on
    generate_failed                     it returned a sample that it says has failed
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from rlmono.config.schema import Config
from rlmono.data.sample import ABORTED, COMPLETED, FAILED, NUMBERS, PENDING, TRUNCATED, Sample
from rlmono.rewards.load import LoadError, load_function
from rlmono.rollout.engines import EngineFault
from rlmono.rollout.generate import GenerateState, as_dict, context_length, generate
from rlmono.world.messages import Sampling

Function = Callable[[Any, Sample, Any, GenerateState], Awaitable[Any]]
SIGNATURE = "async def function(args, sample, sampling_params), with `state` and `evaluation` after that where it wants them"


class SampleFailed(Exception):
    """A sample that cannot be trained on. `outcome` is its name in the metrics."""

    def __init__(self, outcome: str, detail: str):
        super().__init__(detail)
        self.outcome = outcome


def generate_function(config: Config) -> Function:
    """The default, or that of --custom-generate-function-path. LoadError when it cannot be loaded, or called."""
    path = config.custom_generate_function_path
    return generate if path is None else function_at(path)


@functools.cache
def function_at(path: str) -> Function:
    """The generate function at a path. LoadError as above."""
    return adapted(load_function(path), path)


def adapted(function: Callable[..., Any], path: str) -> Function:
    """The function as (args, sample, sampling_params, state), whichever of `state` and `evaluation` it takes. LoadError when it cannot be
    called so."""
    if not (inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)):
        raise LoadError(f"{path!r} is not async: a generate function is {SIGNATURE}")
    parameters = list(inspect.signature(function).parameters.values())
    first, rest = parameters[:3], parameters[3:]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in rest)
    keywords = [name for name in ("state", "evaluation") if takes_all or any(p.name == name and p.kind is not p.POSITIONAL_ONLY for p in rest)]
    needed = [p.name for p in rest if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in keywords]
    if needed or len(first) < 3 or any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in first):
        raise LoadError(f"{path!r} takes ({', '.join(map(str, parameters))}): a generate function is {SIGNATURE}")

    def call(args: Any, sample: Sample, sampling_params: Any, state: GenerateState) -> Awaitable[Any]:
        given = {"state": state, "evaluation": state.evaluation}
        return function(args, sample, sampling_params, **{name: given[name] for name in keywords})      # type: ignore[no-any-return]
    return call


async def make_samples(function: Function, config: Config, sample: Sample, sampling: Sampling, state: GenerateState) -> list[Sample]:
    """One call: the samples that it returned, checked. Raises SampleFailed."""
    if not sample.length:
        raise SampleFailed("prompt_empty", "the prompt tokenises to nothing")
    if sample.prompt_length >= context_length(config):
        raise SampleFailed("prompt_too_long", f"the prompt has {sample.prompt_length} tokens, and the context ends at {context_length(config)}; "
                           "drop such prompts with --rollout-max-prompt-len")
    if function is generate:            # one request, which has the same deadline at the engine
        try:
            return [await generate(config, sample, sampling, state)]
        except EngineFault as e:
            raise SampleFailed(e.outcome, str(e)) from e
        except Exception as e:
            raise SampleFailed("generate_error", f"{type(e).__name__}: {e}") from e
    deadline = asyncio.timeout(config.generate_timeout_s)
    try:
        async with deadline:
            made = await function(config, sample, as_dict(sampling), state)
    except TimeoutError as e:
        if not deadline.expired():
            raise SampleFailed("generate_error", f"TimeoutError: {e}") from e
        outcome, where = ("engine_timeout", f"; it waited for {state.engine.name}") if state.cancelled_at_engine else ("generate_timeout", "")
        raise SampleFailed(outcome, f"no return from it within --generate-timeout-s {config.generate_timeout_s:g}{where}") from e
    except EngineFault as e:
        raise SampleFailed(e.outcome, str(e)) from e
    except (Exception, SystemExit) as e:
        raise SampleFailed("generate_error", f"{type(e).__name__}: {e}") from e
    try:
        return checked(config, sample, made)
    except SampleFailed:
        raise
    except Exception as e:      # fields of other types
        raise SampleFailed("generate_invalid", f"the generate function returned a sample whose fields cannot be read: {e}") from e


def checked(config: Config, given: Sample, made: Any) -> list[Sample]:
    """What a user's function returned, as a list of samples, each with the numbers of the one it was given; SampleFailed for anything else.
    What a new Sample leaves unset (prompt, label, metadata) it gets from the given one."""
    found = list(made) if isinstance(made, (list, tuple)) else [made]
    strange = [type(x).__name__ for x in found if not isinstance(x, Sample)] or ([] if found else ["an empty list"])
    if strange or len(set(map(id, found))) < len(found):
        what = strange[0] if strange else "one sample twice"
        raise SampleFailed("generate_invalid", f"the generate function returned {what}, not a Sample or a list of them")
    kept = [s for s in found if s.status != FAILED]
    if not kept:
        raise SampleFailed("generate_failed", "; ".join(r for s in found for r in s.remarks) or "the generate function says so")
    for s in kept:
        if s is not given:
            s.index, s.group_index = given.index, given.group_index
            s.rm_type, s.custom_rm_path = (s.rm_type, s.custom_rm_path) if s.rm_type or s.custom_rm_path else (given.rm_type, given.custom_rm_path)
            s.reward_key = s.reward_key or given.reward_key
            s.prompt, s.label, s.metadata = s.prompt or given.prompt, given.label if s.label is None else s.label, {**given.metadata, **s.metadata}
        if hasattr(s.loss_mask, "tolist"):      # numpy's or torch's
            s.loss_mask = s.loss_mask.tolist()
        if problem := _problem(config, s):
            raise SampleFailed("generate_invalid", f"the generate function returned a sample {problem}")
        if s.loss_mask is not None and (type(s.loss_mask) is not list or set(map(type, s.loss_mask)) - {int}):       # True, 1.0; a tuple
            s.loss_mask = list(map(int, s.loss_mask))
        if s.status == PENDING:
            s.status = COMPLETED
    return kept


def _problem(config: Config, s: Sample) -> str:
    """What keeps a sample from being trained on; empty when nothing does."""
    n = s.response_length
    if s.status == PENDING and not n:
        return "as it was given, without a response"
    if s.status not in (PENDING, COMPLETED, TRUNCATED, ABORTED):
        return f"with the status {s.status!r}"
    if not 0 <= n < s.length:
        return f"with {s.length} tokens, of which response_length {n} are the response: a prompt needs one at least"
    if s.length > context_length(config):
        return f"of {s.length} tokens, and the context ends at {context_length(config)}"
    try:
        s.pack()        # as which they travel, and are looked through in little time
    except ValueError as e:
        return f"whose {e}"
    if np.frombuffer(Sample.tokens.bytes_of(s), np.uint32).max() >= config.model["vocab_size"]:      # below 0 is far above
        return f"whose tokens are not all ids from 0 to {config.model['vocab_size'] - 1}"
    written = {name: NUMBERS[name].count(s) for name in ("rollout_log_probs", "weight_versions") if not NUMBERS[name].is_none(s)}
    if s.loss_mask is not None:
        written["loss_mask"] = len(s.loss_mask)
    if n and "rollout_log_probs" not in written:
        return "without rollout_log_probs: the engine's for what the model wrote, 0 for other tokens"
    for name, count in written.items():
        if count != n:
            return f"with {count} {name} for a response of {n} tokens"
    if not np.isfinite(np.frombuffer(Sample.rollout_log_probs.bytes_of(s), np.float32)).all():
        return "with rollout_log_probs that are no finite numbers of fp32"
    if s.loss_mask is not None and not set(s.loss_mask) <= {0, 1}:
        return "with a loss_mask that has other values than 0 and 1"
    return ""
