"""HF <-> torch_dist: round trips to the bit for every family and layout, on one rank and on two; what a run makes of the result; refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, PREDICTION, VOCABULARY, differences, make_family, read_folder, write_folder
from torchrun import ROOT, WORLDS, Result, case_names, free_port, run_world

from rlmono import quickstart
from rlmono.checkpoint.folder import partial_of
from rlmono.checkpoint.store import CheckpointError, CheckpointStore, find_checkpoint, read_checkpoint
from rlmono.config.sources import resolve
from rlmono.loop.host import plan_run
from rlmono.models.mapping import Tensor
from rlmono.models.registry import family as family_of
from rlmono.models.registry import shape_from_hf
from rlmono.weights.hf import prediction_tensors

SCRIPT = WORLDS / "convert_two.py"
BIG = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, vocab_size=32000, num_attention_heads=16, num_key_value_heads=4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        make_family(family, folder / family)
    make_family("qwen3", folder / "big", **BIG)
    quickstart.make(folder / "quickstart", seed=3)
    return folder


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def convert(*argv: object, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    """The command as a person gives it: under torchrun, or by itself."""
    start = [str(ROOT / "launch" / "torchrun.py"), "--nproc-per-node", str(ranks), "--master-port", str(free_port())] if ranks else []
    return subprocess.run([sys.executable, *start, "-m", "rlmono", "convert", *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "LOGLEVEL": "CRITICAL"})


@pytest.fixture(scope="module")
def written_by_one(models: Path, scratch: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """torch_dist of three models, each by one process without torchrun."""
    sources = {"deepseek": models / "deepseek", "qwen3-tied": models / "qwen3-tied", "quickstart": models / "quickstart" / "model"}
    return {name: convert("hf-to-torch-dist", "--hf-checkpoint", source, "--save", scratch / f"{name}.one") for name, source in sources.items()}


@pytest.fixture(scope="module")
def results(models: Path, scratch: Path, written_by_one: object) -> dict[str, Result]:
    return run_world(SCRIPT, 2, str(models), str(scratch), timeout_s=600)


@pytest.mark.parametrize("name", case_names(SCRIPT))
def test_two_ranks(results: dict[str, Result], name: str) -> None:
    results[name].check()


# ---------------------------------------------------------------- the command

def test_one_process_says_what_it_did(scratch: Path, written_by_one: dict[str, subprocess.CompletedProcess[str]]) -> None:
    for name, done in written_by_one.items():
        assert done.returncode == 0, done.stderr
        assert f"{scratch / name}.one" in done.stdout and "for --ref-load or --load" in done.stdout and "Warning" not in done.stderr
        assert not partial_of(scratch / f"{name}.one").exists()
    assert "32 tensors of layers for next-token prediction are skipped (model.layers.3.eh_proj.weight" in written_by_one["deepseek"].stderr


@pytest.mark.slow
def test_two_ranks_read_what_one_process_wrote(models: Path, scratch: Path, written_by_one: object) -> None:
    """Under torchrun, without a layout; the layer for next-token prediction comes from the source folder."""
    out = scratch / "by-command"
    done = convert("torch-dist-to-hf", "--load", scratch / "deepseek.one", "--hf-checkpoint", models / "deepseek", "--save", out, ranks=2)
    assert done.returncode == 0, done.stderr
    assert differences(models / "deepseek", out) == []
    assert "32 tensors of layers for next-token prediction are carried through" in done.stderr


@pytest.mark.slow
def test_two_ranks_refuse_with_one_message(models: Path, scratch: Path) -> None:
    source, out = scratch / "poor", scratch / "never"
    tensors = read_folder(models / "moe")
    del tensors["model.layers.0.self_attn.o_proj.weight"]
    source.mkdir()
    write_folder(source, tensors)
    (source / "config.json").write_text((models / "moe" / "config.json").read_text())
    done = convert("hf-to-torch-dist", "--hf-checkpoint", source, "--save", out, "--tensor-model-parallel-size", "2", ranks=2)
    assert done.returncode == 2 and done.stderr.count("tensor 'model.layers.0.self_attn.o_proj.weight' is missing") == 1, done.stderr
    assert "Traceback" not in done.stderr and not out.exists() and not partial_of(out).exists()
    done = convert("hf-to-torch-dist", "--hf-checkpoint", source, "--save", source, ranks=2)
    assert done.returncode == 2 and done.stderr.count("input and output must be apart") == 1, done.stderr


KILLED = """
import os, sys
import rlmono.checkpoint.folder as folder
folder.os.replace = lambda *_: os.kill(os.getpid(), 9)
from rlmono.convert.main import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_that_looks_finished(models: Path, tmp_path: Path) -> None:
    """Killed at the last moment: all is written, and the folder has not got its name."""
    out = tmp_path / "out"
    argv = ("hf-to-torch-dist", "--hf-checkpoint", models / "qwen3", "--save", out)
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, argv)], cwd=ROOT, capture_output=True, timeout=300)
    assert done.returncode == -9 and partial_of(out).is_dir() and not out.exists()
    shape = shape_from_hf(json.loads((models / "qwen3" / "config.json").read_text()))
    assert find_checkpoint(out, shape) is None and find_checkpoint(tmp_path, shape) is None
    done = convert(*argv)
    assert done.returncode == 0 and [p.name for p in tmp_path.iterdir()] == ["out"], done.stderr
    assert read_checkpoint(out, shape).weights_only


# ---------------------------------------------------------------- what a run makes of it

def plan(models: Path, **options: Any) -> Any:
    task = models / "quickstart"
    flags = ["--hf-checkpoint", task / "model", "--prompt-data", task / "train.jsonl", "--input-key", "messages", "--label-key", "label",
             "--apply-chat-template", "--rm-type", "math", "--colocate", "--num-rollout", "2", "--rollout-max-response-len", "12"]
    config = resolve([str(f) for f in flags] + [str(w) for name, value in options.items() for w in (f"--{name.replace('_', '-')}", value)], {})
    return plan_run(config, "attempt")[1]


def test_a_run_loads_it_or_refers_to_it(models: Path, scratch: Path, tmp_path: Path, written_by_one: object) -> None:
    """As --load: weights only, from rollout 0. As --ref-load: the actor's and the reference's. As --save: refused, it is not a run's folder."""
    dist, hf = str(scratch / "quickstart.one"), str(models / "quickstart" / "model")
    found = plan(models, load=dist, save=tmp_path / "run")
    assert found.start == 0 and (found.actor.folder, found.actor.kind, found.actor.with_optimizer) == (dist, "dist", False)
    assert (found.reference.folder, found.reference.kind) == (hf, "hf")
    found = plan(models, ref_load=dist, load=tmp_path / "empty")
    assert (found.actor.folder, found.reference.folder, found.actor.with_optimizer) == (dist, dist, False)
    with pytest.raises(CheckpointError, match="quickstart.one: --save is itself a checkpoint; take another folder"):
        plan(models, load=dist, save=dist)


def test_the_shape_must_fit_and_what_is_free_in_it_may_differ(models: Path, scratch: Path, written_by_one: object) -> None:
    shape = shape_from_hf(json.loads((models / "deepseek" / "config.json").read_text()))
    folder = scratch / "deepseek.one"
    assert read_checkpoint(folder, {**shape, "rotary_base": 5.0, "quantization_config": {"quant_method": "fp8"}}).rollout_id == -1
    with pytest.raises(CheckpointError, match="deepseek.one: a checkpoint of another model: hidden_size is 64 there and 32 here"):
        read_checkpoint(folder, {**shape, "hidden_size": 32})


def test_a_runs_own_checkpoint_must_have_just_its_shape(tmp_path: Path) -> None:
    from rlmono.config.schema import Config
    config = Config(model={"rotary_base": 1.0, "hidden_size": 4}, save=str(tmp_path))
    store = CheckpointStore(config, "attempt")
    store.partial(0).mkdir()
    store.publish(0, {})
    with pytest.raises(CheckpointError, match="another model: rotary_base"):
        find_checkpoint(tmp_path, {"rotary_base": 2.0, "hidden_size": 4})
    assert not dataclasses.replace(find_checkpoint(tmp_path, config.model)).weights_only


# ---------------------------------------------------------------- pieces

@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_shards_are_made_of_parts_and_join_to_the_whole(models: Path, name: str, ranks: int) -> None:
    """`to_hf(join(to_megatron(parts)))` is what was cut, for every tensor of the model; padded where a vocabulary does not come out even."""
    shape = shape_from_hf(json.loads((models / name / "config.json").read_text()))
    hf = read_folder(models / name)
    tensors: list[Tensor] = family_of(shape["architecture"]).tensors(shape)
    cut = 0
    for t in tensors:
        if ranks > 2 and "linear_qkv" in t.name:
            continue                    # two groups of queries for four ranks: refused elsewhere
        full = [hf[n] for n in t.hf_names]
        shards = [t.to_megatron([x[t.part(x.shape, r, ranks)] for x in full]) for r in range(ranks)]
        if t.vocabulary:
            longest = len(shards[0])
            assert longest == -(-VOCABULARY // ranks)
            shards = [torch.cat([s, s.new_zeros(longest - len(s), *s.shape[1:])]) for s in shards]
        assert len({s.shape for s in shards}) == 1
        cut += shards[0].numel() < full[0].numel()
        for x, back in zip(full, t.to_hf(t.join(shards)), strict=True):
            assert torch.equal(x, back[:VOCABULARY] if t.vocabulary else back), t.name
    assert cut > 5 or ranks == 1


def test_layers_for_next_token_prediction_are_found_by_their_projection(models: Path) -> None:
    for name in FAMILIES:
        found = prediction_tensors(read_folder(models / name))
        assert bool(found) == (name in PREDICTION) and all(n.startswith("model.layers.3.") for n in found)
    names = ["model.layers.6.a", "model.layers.61.eh_proj.weight", "model.layers.61.b"]
    assert prediction_tensors(names) == ["model.layers.61.b", "model.layers.61.eh_proj.weight"]
