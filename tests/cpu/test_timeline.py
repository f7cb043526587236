"""Phases of ranks: noted, kept, and drawn as the timeline of one rollout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlmono.observe.phases import Phases, idle_share, read_timeline, span, typical, write_timeline
from rlmono.observe.report import write_report
from rlmono.observe.timeline import draw_timeline


def test_phases_are_noted_in_order_also_when_they_fail() -> None:
    phases = Phases()
    with phases("generate"), phases.of(False, "save"):
        pass
    with pytest.raises(ValueError), phases("train"):
        raise ValueError
    events = phases.take()
    assert [name for name, _, _ in events] == ["generate", "train"] and phases.take() == []
    assert all(a <= b for _, a, b in events) and events[0][2] <= events[1][1]


def test_a_timeline_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_timeline(tmp_path) == {}
    write_timeline(tmp_path, 0, {1: [("train", 1.0, 2.0)], 0: [("train", 1.0, 3.0)]})
    write_timeline(tmp_path, 0, {1: [("train", 5.0, 6.0)]})
    with (tmp_path / "timeline.jsonl").open("a") as f:
        f.write('{"rollout_id": 1, "ra')
    assert read_timeline(tmp_path) == {0: {1: [("train", 5.0, 6.0)], 0: [("train", 1.0, 3.0)]}}


def test_the_rollout_that_is_drawn_is_neither_the_first_nor_an_outlier() -> None:
    def lasting(seconds: float) -> dict[int, list[tuple[str, float, float]]]:
        return {0: [("train", 0.0, seconds)], 1: [("train", 0.0, 1.0)]}
    assert typical({0: lasting(90), 1: lasting(5), 2: lasting(50), 3: lasting(6), 4: lasting(1)}) == 3
    assert typical({7: lasting(90)}) == 7
    assert typical({0: lasting(3), 1: {0: [("train", 0.0, 9.0)]}}) == 0, "a rank is missing in the other"


def test_what_is_in_no_phase_is_idle() -> None:
    ranks = {0: [("generate", 10.0, 14.0), ("train", 14.0, 20.0)], 1: [("generate", 10.0, 12.0), ("train", 14.0, 17.0)]}
    assert span(ranks) == (10.0, 20.0) and idle_share(ranks) == pytest.approx(0.25)


def test_the_report_has_the_timeline(tmp_path: Path) -> None:
    events = [("generate", 100.0, 106.0), ("swap", 106.0, 106.4), ("train", 107.0, 115.0), ("update", 115.0, 115.1), ("swap", 115.1, 115.3)]
    write_timeline(tmp_path, 0, {rank: [(n, a + 0.1 * rank, b) for n, a, b in events] for rank in range(4)})
    assert draw_timeline(read_timeline(tmp_path)).png.startswith(b"\x89PNG")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"time": 1.0, "rollout_id": 0, "step": None, "train/loss": 1.0}) + "\n")
    page = write_report(tmp_path).read_text()
    assert "Rollout 0 over ranks" in page and (tmp_path / "report" / "timeline.png").exists()
