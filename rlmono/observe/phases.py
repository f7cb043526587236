"""What a device rank does when: phases with their times, always noted (they cost nothing), and drawn by the report as a timeline.

    phases = Phases()
    with phases("train"): …
    phases.take()           [("train", 1700000000.0, 1700000003.5)], and begin anew

Between phases a rank is idle: it waits for others.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Event = tuple[str, float, float]
"""(phase, start, end), seconds since 1970 by the clock of the rank's node."""
TIMELINE = "timeline.jsonl"


class Phases:
    """The phases of one rank since the last `take`."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.time()
        try:
            yield
        finally:
            self._events.append((name, start, time.time()))

    def of(self, happens: bool, name: str) -> contextlib.AbstractContextManager[None]:
        """The phase, if it happens at all."""
        return self(name) if happens else contextlib.nullcontext()

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events


def write_timeline(run_dir: Path, rollout_id: int, by_rank: Mapping[int, Sequence[Sequence[Any]]]) -> None:
    """Append the events of one rollout to <run_dir>/timeline.jsonl, a line a rank."""
    with (Path(run_dir) / TIMELINE).open("a", encoding="utf-8") as file:
        for rank, events in sorted(by_rank.items()):
            file.write(json.dumps({"rollout_id": rollout_id, "rank": rank, "events": [list(e) for e in events]}) + "\n")


def read_timeline(run_dir: Path) -> dict[int, dict[int, list[Event]]]:
    """rollout -> rank -> events; of a rollout that was done twice, the later. A line that a crash tore is left out."""
    found: dict[int, dict[int, list[Event]]] = {}
    path = Path(run_dir) / TIMELINE
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            found.setdefault(row["rollout_id"], {})[row["rank"]] = [(str(n), float(a), float(b)) for n, a, b in row["events"]]
        except (ValueError, KeyError, TypeError):
            continue
    return found


def typical(timeline: Mapping[int, Mapping[int, Sequence[Event]]]) -> int:
    """The rollout to draw: of those in the middle (the first warms up, the last may save), the one of median length."""
    whole = max(len(ranks) for ranks in timeline.values())
    complete = sorted(i for i, ranks in timeline.items() if len(ranks) == whole)
    inner = complete[1:-1] or complete[-1:]
    return sorted(inner, key=lambda i: span(timeline[i])[1] - span(timeline[i])[0])[len(inner) // 2]


def span(ranks: Mapping[int, Sequence[Event]]) -> tuple[float, float]:
    """From the first start to the last end."""
    events = [e for of_rank in ranks.values() for e in of_rank]
    return min(e[1] for e in events), max(e[2] for e in events)


def idle_share(ranks: Mapping[int, Sequence[Event]]) -> float:
    """Share of the ranks' time in which they are in no phase."""
    begin, end = span(ranks)
    busy = sum(b - a for of_rank in ranks.values() for _, a, b in of_rank)
    return max(0.0, 1 - busy / ((end - begin) * len(ranks))) if end > begin else 0.0
