"""Prompts of two files by weight, a slice of one, both read lazily; and a reward of whole groups that takes its worker down for one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from functions import CRASHES
from jobs import COLOCATED, FUNCTIONS, Job

from rlmono.data.sample import Sample

ROLLOUTS, BATCH, SAMPLES = 3, 4, 4


def _write(path: Path, name: str, rows: int) -> Path:
    path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": f"{10 + i}+{20 + i}"}], "label": str(30 + 2 * i),
                                        "metadata": {"file": name, "row": i}}) + "\n" for i in range(rows)))
    return path


@pytest.fixture(scope="module")
def job(task: Path, sockets: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("sources")
    many, few = _write(folder / "many.jsonl", "many", 60), _write(folder / "few.jsonl", "few", 20)
    flags = (*COLOCATED, "--prompt-data", many, f"{few}@[5:9]", "--prompt-data-weights", 3, 1, "--lazy-data-above-mb", 0,
             "--custom-rm-path", f"{FUNCTIONS}:share", "--group-rm", "--n-samples-per-prompt", SAMPLES,
             "--save-debug-rollout-data", folder / "rollout_{rollout_id}.jsonl")
    return Job(folder, task, sockets, flags, rollouts=ROLLOUTS, ranks=3, save=folder / "save").run_through()


def _groups(job: Job, rollout_id: int) -> dict[int, list[Sample]]:
    groups: dict[int, list[Sample]] = {}
    for line in (job.folder / f"rollout_{rollout_id}.jsonl").read_bytes().splitlines():
        sample = msgspec.json.decode(line, type=Sample)
        groups.setdefault(sample.group_index, []).append(sample)
    return groups


def test_each_file_gives_its_share_and_the_slice_alone(job: Job) -> None:
    """3 of 4 prompts are of the first file; the 4 rows of the second's slice go round, and none comes again before all have come."""
    given = [group[0].metadata for r in range(ROLLOUTS) for group in _groups(job, r).values()]
    assert Counter(m["file"] for m in given) == {"many": 3 * ROLLOUTS, "few": ROLLOUTS}
    assert all(Counter(group[0].metadata["file"] for group in _groups(job, r).values()) == {"many": 3, "few": 1} for r in range(ROLLOUTS))
    few, many = ([m["row"] for m in given if m["file"] == name] for name in ("few", "many"))
    assert set(few) <= {5, 6, 7, 8} and len(set(few)) == ROLLOUTS and len(set(many)) == 3 * ROLLOUTS
    assert many != sorted(many), "shuffled"


def test_a_reward_that_dies_costs_its_own_group(job: Job) -> None:
    metrics = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    crashed = [sum(row.get("rollout/remarks/reward_crashed", 0) for row in metrics if row["rollout_id"] == r) for r in range(ROLLOUTS)]
    assert crashed == [SAMPLES if r == CRASHES // BATCH else 0 for r in range(ROLLOUTS)]
    for r in range(ROLLOUTS):
        groups = _groups(job, r)
        assert sorted(groups) == list(range(BATCH * r, BATCH * (r + 1))) and {len(g) for g in groups.values()} == {SAMPLES}
        for number, group in groups.items():
            total = max(sum(len(s.response) for s in group), 1)
            expected = [0.0 if number == CRASHES else len(s.response) / total for s in group]
            assert [s.reward for s in group] == expected, number
            assert [s.remarks for s in group] == [["reward_crashed"] if number == CRASHES else []] * SAMPLES
