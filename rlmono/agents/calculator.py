r"""A tool that a CPU learns to use in minutes: a calculator, for products that the model cannot work out.

    python -m rlmono.agents.calculator make DIR [--seed N]

writes DIR/model (the quickstart's tiny Qwen3) and jsonl data: sft, train and eval. A conversation with the tool:

    user  47*38    assistant  <calc>47*38</calc>    tool  1786    assistant  \boxed{1786}

Fine-tuning shows it how (only what the assistant writes is learned), and then, seven times out of ten, to guess instead:
`\boxed{2000}`. GRPO on `rlmono.quickstart.reward` with `generate`, here, finds that asking pays. The recipes are
configs/recipes/calculator-sft.env and calculator-grpo.env.
"""

from __future__ import annotations

import ast
import operator
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlmono.data.sample import COMPLETED, Sample
from rlmono.quickstart import BOXED, HELD_OUT, SFT_BATCH, Language, Problem, main, rounds, shuffled, write_model, write_rows

if TYPE_CHECKING:
    import numpy as np

    from rlmono.rollout.generate import GenerateState

CALLS = 4
"""Calls of the tool in one response at most."""
CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
LANGUAGE = Language(("user", "assistant", "tool"), (BOXED, "<calc>", "</calc>"))
LOW, HIGH = 32, 99
"""Products of these have four digits."""
TOOL_STEPS, MIX_STEPS, MIX_TOOL_SHARE = 450, 150, 0.3


async def generate(args: Any, sample: Sample, sampling_params: Mapping[str, Any], state: GenerateState) -> Sample:
    """The model writes; where its turn has `<calc>…</calc>`, the tool answers and the model goes on."""
    for call in range(CALLS + 1):
        text = await state.turn(sample, sampling_params)
        asked = CALL.search(text)
        if sample.status != COMPLETED or asked is None or call == CALLS:
            break
        if not state.append_messages(sample, [{"role": "tool", "content": calculate(asked[1])}]):
            break
    return sample


_OPERATORS: dict[type, Any] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
                               ast.USub: operator.neg, ast.UAdd: operator.pos}


def calculate(expression: str) -> str:
    """The value of numbers with + - * / and parentheses, of up to 100 characters; `error` for anything else."""
    try:
        if len(expression) > 100:
            return "error"
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, KeyError):
        return "error"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value       # type: ignore[return-value]
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))     # type: ignore[no-any-return]
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_value(node.operand))      # type: ignore[no-any-return]
    raise ValueError("not arithmetic")


def write_task(folder: Path, seed: int) -> None:
    """The model, and sft.jsonl, train.jsonl and eval.jsonl; eval shares no pair of numbers with the others, in either order."""
    import numpy as np

    write_model(folder / "model", seed, LANGUAGE)
    rng = np.random.default_rng([seed, 2])
    pairs = [(a, b) for a in range(LOW, HIGH + 1) for b in range(a, HIGH + 1)]
    order = shuffled(pairs, rng)
    train = [p for a, b in order[HELD_OUT:] for p in sorted({(a, b), (b, a)})]
    write_rows(folder / "sft.jsonl", sft_rows(train, rng))
    write_rows(folder / "train.jsonl", ({"messages": [_user(p)], "label": str(p[0] * p[1])} for p in train))
    write_rows(folder / "eval.jsonl", ({"messages": [_user(p)], "label": str(p[0] * p[1])} for p in order[:HELD_OUT]))


def sft_rows(train: list[Problem], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Demonstrations in training order: with the tool, then the mix."""
    mix = MIX_STEPS * SFT_BATCH
    asks = [True] * (TOOL_STEPS * SFT_BATCH) + shuffled([i < mix * MIX_TOOL_SHARE for i in range(mix)], rng)
    for (a, b), with_tool in zip(rounds(train, len(asks), rng), asks, strict=True):
        said = [f"<calc>{a}*{b}</calc>", str(a * b), f"{BOXED}{a * b}}}"] if with_tool else [f"{BOXED}{round(a, -1) * round(b, -1)}}}"]
        roles = ["assistant", "tool", "assistant"]
        yield {"messages": [_user((a, b)), *({"role": role, "content": text} for role, text in zip(roles, said, strict=False))]}


def _user(problem: Problem) -> dict[str, str]:
    return {"role": "user", "content": f"{problem[0]}*{problem[1]}"}


if __name__ == "__main__":
    sys.exit(main("calculator", "rlmono.agents.calculator", write_task))
