"""`python -m rlmono view FILE`: samples of a run on the terminal, with their rewards, and in colour what was trained on and what was masked."""

from __future__ import annotations

import argparse
import io
import json
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import msgspec
from rich.console import Console
from rich.text import Text

from rlmono.data.sample import ABORTED, COMPLETED, FAILED, PENDING, TRUNCATED
from rlmono.observe.samples import prompt_text

STATUSES = (COMPLETED, TRUNCATED, ABORTED, FAILED, PENDING)
COLOURS = {COMPLETED: "green", TRUNCATED: "yellow", ABORTED: "magenta", FAILED: "red", PENDING: "blue"}
MASKED = "yellow"
OPEN, CLOSE = "⟦", "⟧"
"""Around what was masked, where there are no colours."""



class Shown(msgspec.Struct):
    """What is shown of a sample, and of which kind it must be."""

    index: int = 0
    group_index: int = 0
    prompt: Union[str, list[dict[str, Any]]] = ""
    response: str = ""
    parts: list[tuple[int, str]] = []
    label: Any = None
    reward: Union[None, float, dict[str, Any]] = None
    status: str = PENDING
    remarks: list[str] = []
    response_length: int = 0
    prompt_length: Optional[int] = None


Row = dict[str, Any]


class ViewError(ValueError):
    """A file that can't be shown, or nothing in it that was asked for."""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The verb `view`."""
    parser = argparse.ArgumentParser(
        prog="python -m rlmono view", description="Print samples with their rewards; what the loss mask leaves out stands in another colour.",
        epilog="FILE is one of <run_dir>/samples/*.jsonl, or of --save-debug-rollout-data.")
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--index", type=int, nargs="+", metavar="N", help="the samples of these numbers")
    parser.add_argument("--group", type=int, nargs="+", metavar="N", help="the samples of these groups (prompts)")
    parser.add_argument("--status", nargs="+", choices=STATUSES, default=[], help="samples that ended so")
    for status in (ABORTED, TRUNCATED, FAILED):
        parser.add_argument(f"--{status}", dest="status", action="append_const", const=status, help=f"the same as --status {status}")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--best", type=int, nargs="?", const=5, metavar="N", help="the N samples of the highest reward (5)")
    order.add_argument("--worst", type=int, nargs="?", const=5, metavar="N", help="the N samples of the lowest reward (5)")
    parser.add_argument("--reward-key", help="the number in rewards that are objects")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="samples to show at most (20; 0 is all)")
    parser.add_argument("--chars", type=int, default=4000, metavar="N", help="characters of a prompt or response to show at most (4000; 0 is all)")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="auto: on a terminal")
    arguments = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")       # a terminal of another encoding
    colour = {"auto": None, "always": True, "never": False}[arguments.color]
    console = Console(force_terminal=colour, no_color=colour is False or None, highlight=False, soft_wrap=True)
    try:
        rows = read(arguments.file)
        show(console, rows, select(rows, arguments), arguments)
    except ViewError as error:
        print(f"rlmono view: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:             # `| head`
        sys.stderr.close()
    return 0


def read(path: Path) -> list[Row]:
    """The samples of a file. Raises ViewError with the line of one that is none."""
    try:
        with path.open("rb") as file:
            return [_row(path, number, line) for number, line in enumerate(file, 1) if line.strip()]
    except OSError as error:
        raise ViewError(f"{path} cannot be read: {error.strerror}") from None


def _row(path: Path, number: int, line: bytes) -> Row:
    """What is shown of a sample. Lists with an entry a token are left out: a rollout can have gigabytes of them."""
    try:
        row = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ViewError(f"{path}:{number} is not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("tokens", row.get("response")), (list, str)):
        raise ViewError(f"{path}:{number} is no sample: it has neither tokens nor a response")
    try:
        shown = msgspec.convert({name: row[name] for name in Shown.__struct_fields__ if name in row}, Shown)
    except msgspec.ValidationError as error:
        raise ViewError(f"{path}:{number} is no sample: {str(error).replace('`', '')}") from error
    if shown.prompt_length is None:
        shown.prompt_length = len(row.get("tokens", ())) - shown.response_length
    return msgspec.structs.asdict(shown)


def select(rows: Sequence[Row], arguments: argparse.Namespace) -> list[Row]:
    """What the filters leave, in the order that was asked for. ViewError when that is nothing."""
    wanted = [row for row in rows if (arguments.index is None or row["index"] in arguments.index)
              and (arguments.group is None or row["group_index"] in arguments.group)
              and (not arguments.status or row["status"] in arguments.status)]
    if arguments.best is not None or arguments.worst is not None:
        sign, n = (-1, arguments.best) if arguments.best is not None else (1, arguments.worst)
        rewarded = [row for row in wanted if reward_of(row, arguments.reward_key) is not None]
        wanted = sorted(rewarded, key=lambda row: sign * (reward_of(row, arguments.reward_key) or 0.0))[:n]
    if not rows:
        raise ViewError(f"{arguments.file} has no samples")
    if not wanted:
        raise ViewError(f"{arguments.file}: none of its {len(rows)} samples is what was asked for")
    return wanted


def reward_of(row: Row, key: Optional[str]) -> Optional[float]:
    """The reward as a number; None where there is none yet. ViewError for an object without a key."""
    reward = row.get("reward")
    if isinstance(reward, dict):
        if key is None and len(numbers := [k for k, v in reward.items() if isinstance(v, (int, float))]) == 1:
            key = numbers[0]
        if key not in reward:
            raise ViewError(f"rewards are objects; name the number with --reward-key: {', '.join(reward)}")
        reward = reward[key]
    return None if reward is None else float(reward)


def show(console: Console, rows: Sequence[Row], wanted: Sequence[Row], arguments: argparse.Namespace) -> None:
    shown = wanted[:arguments.limit or None]
    rewards = [r for row in rows if isinstance(row.get("reward"), (int, float)) and (r := reward_of(row, None)) is not None]
    console.print(Text(f"{arguments.file}: {len(rows)} samples" + (f", mean reward {sum(rewards) / len(rewards):.4g}" if rewards else "")
                       + f"; {len(shown)} of {len(wanted)} shown", style="bold"))
    if any(mask == 0 for row in shown for mask, _ in row.get("parts", ())):
        console.print(Text.assemble("trained on, ", _masked("masked: not trained on", console)))
    scale = (min(rewards), max(rewards)) if rewards else (0.0, 0.0)
    for row in shown:
        console.print()
        for text in _sample(row, scale, arguments.chars, console):
            console.print(text)


def _sample(row: Row, scale: tuple[float, float], chars: int, console: Console) -> Iterator[Text]:
    reward, style = row.get("reward"), "bold yellow"
    if isinstance(reward, (int, float)) and scale[0] < scale[1] and reward in scale:
        style = "bold green" if reward == scale[1] else "bold red"
    shown = json.dumps(reward, ensure_ascii=False) if isinstance(reward, dict) else f"{reward:.4g}" if isinstance(reward, (int, float)) else "none"
    yield Text.assemble((f"── sample {row['index']}, group {row['group_index']} ── ", "bold"), "reward ", (shown, style), " ── ",
                        (row["status"], COLOURS.get(row["status"], "")), f" ── {row['prompt_length']} + {row['response_length']} tokens",
                        *([f" ── {', '.join(row['remarks'])}"] if row.get("remarks") else []))
    prompt = row.get("prompt", "")
    yield Text(_short(prompt if isinstance(prompt, str) else prompt_text(prompt), chars), style="dim cyan")
    yield _response(row, chars, console)
    if row.get("label") is not None:
        yield Text.assemble(("label: ", "bold"), _short(str(row["label"]), chars))


def _response(row: Row, chars: int, console: Console) -> Text:
    """The response; of one with masked parts, those in their colour."""
    if not row.get("parts"):
        return Text(_short(row["response"], chars))
    text = Text()
    for mask, part in row["parts"]:
        text.append(_short(part, chars)) if mask else text.append_text(_masked(_short(part, chars), console))
    return text


def _masked(text: str, console: Console) -> Text:
    plain = console.color_system is None or console.no_color
    return Text(f"{OPEN}{text}{CLOSE}" if plain else text, style=MASKED)


def _short(text: str, chars: int) -> str:
    if not chars or len(text) <= chars:
        return _tame(text)
    half = chars // 2
    return _tame(f"{text[:half]} … {len(text) - 2 * half:,} characters (--chars 0 shows all) … {text[len(text) - half:]}")


def _tame(text: str) -> str:
    """A model's text as a terminal can stand it: what would move the cursor, change colours or turn the direction is written out."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") and unicodedata.bidirectional(c) not in _TURNS
                   else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


_TURNS = ("LRE", "LRO", "RLE", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
