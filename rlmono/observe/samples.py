"""A few samples of each rollout and evaluation, as text that a person reads and the report shows."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlmono.data.sample import Sample


def write_samples(path: Path, samples: Sequence[Sample], limit: int, decode: Callable[[Sequence[int]], str] | None = None) -> None:
    """Writes the first `limit` samples to `path`, one JSON object a line: prompt, response, label, reward, status, lengths; with `decode`
    (ids → text), the response in parts where some of it is masked."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for sample in samples[:limit]:
            row = _row(sample) | (parts_of(sample, decode) if decode is not None else {})
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    os.replace(temporary, path)


def _row(sample: Sample) -> dict[str, Any]:
    row = {
        "index": sample.index,
        "group_index": sample.group_index,
        "prompt": prompt_text(sample.prompt),
        "response": sample.response,
        "label": sample.label,
        "reward": sample.reward,
        "status": sample.status,
        "prompt_length": sample.prompt_length,
        "response_length": sample.response_length,
    }
    return {**row, "remarks": sample.remarks} if sample.remarks else row


def parts_of(sample: Sample, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """`parts` of a response that is masked in places: [mask, text] of each stretch, in order; nothing where all of it is trained on."""
    if sample.loss_mask is None or all(sample.loss_mask):
        return {}
    parts, start = [], sample.prompt_length
    for mask, stretch in itertools.groupby(sample.loss_mask):
        end = start + len(list(stretch))
        parts.append([mask, decode(sample.tokens[start:end])])
        start = end
    return {"parts": parts}


def prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as text; of messages, `role: content` each on lines of its own."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role', '?')}: {_content_text(message.get('content'))}" for message in prompt)


def _content_text(content: Any) -> str:
    """OpenAI content: a string, or a list of parts, of which those without text are named by their type."""
    if isinstance(content, list):
        return " ".join(part.get("text", f"[{part.get('type')}]") if isinstance(part, dict) else str(part) for part in content)
    return "" if content is None else str(content)
