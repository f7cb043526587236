"""Generate functions of a real run: turns and an agent at the endpoint, in turn, and one sample that fails. They note what the engine saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai

from rlmono.data.sample import Sample

FAILS = 5
"""Number of the sample whose call raises."""


async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any], state: Any, evaluation: bool) -> Any:
    assert evaluation is False
    calls: list[dict[str, Any]] = []
    engine, generate = state.engine, state.engine.generate

    class Noting:
        name = engine.name
        settle = staticmethod(engine.settle)

        @staticmethod
        async def generate(tokens: list[int], sampling: Any, timeout_s: float) -> Any:
            output = await generate(tokens, sampling, timeout_s)
            calls.append({"saw": list(tokens), "wrote": output.output_ids, "log_probs": output.log_probs, "stop": list(sampling.stop),
                          "finish": output.finish})
            return output
    state.engine = Noting
    if sample.index == FAILS:
        raise RuntimeError("an agent with a fault")
    samples = await (agent if sample.index % 2 else turns)(sample, sampling_params, state)
    fields = ("tokens", "response_length", "loss_mask", "rollout_log_probs", "status")
    with open(Path(args.run_dir) / "calls.jsonl", "a") as f:
        f.write(json.dumps({"calls": calls, "samples": [{name: getattr(s, name) for name in fields} for s in samples]}) + "\n")
    for s in samples:
        s.reward = len(set(s.response)) / 10
    return samples


async def turns(sample: Sample, sampling_params: dict[str, Any], state: Any) -> list[Sample]:
    """Three turns with a tool's message and a text between, and a string that ends a turn."""
    await state.turn(sample, sampling_params | {"max_new_tokens": 7})
    assert state.append_messages(sample, [{"role": "tool", "content": "1786"}])
    await state.turn(sample, sampling_params | {"max_new_tokens": 60, "stop": ["1", "a"]})
    assert state.append_text(sample, " so ")
    await state.turn(sample, sampling_params | {"max_new_tokens": 5})
    return [sample]


async def agent(sample: Sample, sampling_params: dict[str, Any], state: Any) -> list[Sample]:
    """Two turns over HTTP, and for every fourth sample a second try of the last."""
    async with state.endpoint(sample) as session, openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key) as client:
        first = (await client.chat.completions.create(model="policy", messages=sample.prompt, max_tokens=6)).choices[0].message
        then: Any = [*sample.prompt, first, {"role": "tool", "content": "42"}]
        for _ in range(1 + (sample.index % 4 == 3)):
            await client.chat.completions.create(model="policy", messages=then, max_tokens=8)
        return session.samples()        # type: ignore[no-any-return]
