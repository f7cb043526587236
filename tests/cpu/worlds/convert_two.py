"""Conversions on two ranks, every family; `tests/cpu/test_convert.py` makes the models and runs it: convert_two.py MODELS SCRATCH."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import run_cases

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from families import FAMILIES, PREDICTION, differences, read_folder, write_folder  # noqa: E402

MODELS, SCRATCH = Path(sys.argv[1]), Path(sys.argv[2])
TP2, PP2, EP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", "--expert-model-parallel-size 2"
LAST = f"{PP2} --decoder-first-pipeline-num-layers 2 --decoder-last-pipeline-num-layers 1"
EXPERTS_WHOLE = f"{TP2} --sequence-parallel --expert-tensor-parallel-size 1 {EP2}"
PATHS = {"qwen3-tied": [("", TP2), (TP2, LAST)], "qwen3": [(LAST, TP2), (TP2, "")], "qwen2": [(TP2, "")],
         "moe": [(EP2, TP2), (TP2, EP2)], "glm": [(EXPERTS_WHOLE, LAST), ("", EP2)], "deepseek": [(TP2, EP2), (LAST, EXPERTS_WHOLE)]}
"""Layouts to write torch_dist on, and to read it on; "" deals the layers over the ranks by itself."""


def convert(*argv: object) -> Any:
    """What the verb does once ranks have met; the job."""
    job = _job(argv)
    job.run(dist.get_rank())
    gc.collect()
    return job


def to_dist(family: str, layout: str, *more: object) -> Path:
    out = SCRATCH / f"{family}{re.sub('[^a-z0-9]+', '-', layout)}{'-'.join(map(str, more))}.dist"
    convert("hf-to-torch-dist", "--hf-checkpoint", MODELS / family, "--save", out, "--overwrite", *layout.split(), *more)
    return out


def to_hf(family: str, source: Path, layout: str, *more: object) -> Path:
    out = source.with_suffix(".hf")
    convert("torch-dist-to-hf", "--load", source, "--hf-checkpoint", MODELS / family, "--save", out, "--overwrite", *layout.split(), *more)
    return out


def refused(text: str, *argv: object) -> None:
    from rlmono.convert.megatron import KNOWN
    try:
        convert(*argv)
    except KNOWN as e:
        assert re.search(text, str(e), re.DOTALL), str(e)
    else:
        raise AssertionError(f"not refused: {text}")
    dist.barrier()


def on_rank_0(write: Any) -> None:
    if dist.get_rank() == 0:
        write()
    dist.barrier()


# ---------------------------------------------------------------- round trips

def _round_trips(family: str) -> None:
    for there, back in PATHS[family]:
        out = to_hf(family, to_dist(family, there), back)
        assert differences(MODELS / family, out) == []
        config = json.loads((out / "config.json").read_text())
        assert config == json.loads((MODELS / family / "config.json").read_text()) and (out / "tokenizer_config.json").exists()
        dist.barrier()


def case_qwen3_tied_there_and_back() -> None:
    _round_trips("qwen3-tied")


def case_qwen3_there_and_back() -> None:
    _round_trips("qwen3")


def case_qwen2_there_and_back() -> None:
    _round_trips("qwen2")


def case_moe_there_and_back() -> None:
    _round_trips("moe")


def case_glm_there_and_back() -> None:
    _round_trips("glm")


def case_deepseek_there_and_back() -> None:
    _round_trips("deepseek")


def case_what_one_process_wrote_is_read_on_two_ranks() -> None:
    """The test module has run the command line in one process first."""
    for family, layout in (("deepseek", EP2), ("qwen3-tied", TP2)):
        out = to_hf(family, SCRATCH / f"{family}.one", layout)
        assert differences(MODELS / family, out) == []


def case_a_dtype_is_converted_and_the_routers_bias_is_not() -> None:
    out = to_hf("glm", to_dist("glm", "", "--dtype", "float32"), "", "--dtype", "float32")
    tensors, before = read_folder(out), read_folder(MODELS / "glm")
    assert {t.dtype for t in tensors.values()} == {torch.float32} and json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert all(torch.equal(tensors[k], t.float()) for k, t in before.items()) and tensors.keys() == before.keys()


def case_many_files_have_an_index() -> None:
    from rlmono.weights import hf
    size, hf.SHARD_BYTES = hf.SHARD_BYTES, 100_000
    try:
        out = to_hf("moe", to_dist("moe", ""), "")
    finally:
        hf.SHARD_BYTES = size
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = read_folder(out)
    assert index["weight_map"].keys() == tensors.keys() and index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert len(set(index["weight_map"].values())) == len(list(out.glob("*.safetensors"))) > 3 and differences(MODELS / "moe", out) == []


# ---------------------------------------------------------------- what a run makes of it

def case_a_trainer_begins_with_it() -> None:
    """In bf16 and in fp32, on another layout, the actor and a reference have just the weights of the HF folder."""
    from megatron.core import parallel_state
    from tiny import make_config

    from rlmono.checkpoint import torch_dist
    from rlmono.trainer.trainer import Trainer
    for family, dtype, written in (("glm", torch.bfloat16, EP2), ("qwen3-tied", torch.float32, LAST)):
        folder = to_dist(family, written)
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        trainer = Trainer(make_config(MODELS / family, pipeline_model_parallel_size=1, tensor_model_parallel_size=2, sequence_parallel=True,
                                      expert_tensor_parallel_size=1, use_kl_loss=True), dtype, 1)
        before = read_folder(MODELS / family)
        mapped = {name for t in trainer._tensors for name in t.hf_names}
        for load in (partial(torch_dist.load, trainer, folder, with_optimizer=False), partial(trainer.load_hf, MODELS / family)):
            for p in (p for chunk in trainer.chunks for p in chunk.parameters()):
                p.data.zero_()
            load()
            exported = {name: t.clone() for bucket in trainer.export() for name, t in bucket}
            assert exported.keys() == mapped
            assert all(torch.equal(t.float(), before[name].float()) for name, t in exported.items())
        actor = trainer.chunks[0].state_dict()
        for load, source in ((torch_dist.load_weights, folder), (lambda chunks, source, t=trainer: t.load_hf(source, chunks), MODELS / family)):
            reference = trainer.add_reference()
            load(reference, source)
            assert all(torch.equal(actor[k], t) for k, t in reference[0].state_dict().items() if isinstance(t, torch.Tensor))


# ---------------------------------------------------------------- memory

def case_peak_memory_is_at_most_twice_a_ranks_share() -> dict[str, float]:
    """Anonymous memory and the pages of files that were read, from before the model is built to after it is written."""
    share, gib = 0, 2**30
    status = {}
    for layout in (TP2, ""):
        gc.collect()
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")       # the peak begins here
        job = convert("hf-to-torch-dist", "--hf-checkpoint", MODELS / "big", "--save", SCRATCH / "big.dist", "--overwrite", *layout.split())
        share = job.numbers * 2 // 2
        peak = _memory("VmHWM") - before
        status[layout or "layers"] = peak / share
        assert peak <= 2 * share + gib // 32, f"{layout or 'layers dealt'}: peak {peak / gib:.3f} GiB for a share of {share / gib:.3f} GiB"
    return status


def _memory(what: str) -> int:
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


# ---------------------------------------------------------------- refusals

def case_layouts_that_do_not_fit() -> None:
    from rlmono.convert import megatron
    out = SCRATCH / "never"
    base = ("hf-to-torch-dist", "--hf-checkpoint", MODELS / "moe", "--save", out)
    refused("2 rank.s. are no multiple of tensor x pipeline x context parallel = 4", *base, *f"{TP2} {LAST}".split())
    refused("expert_model_parallel_size 3|no multiple of expert tensor x expert x pipeline parallel = 3", *base, "--expert-model-parallel-size", 3)
    refused("3 layers over pipeline_model_parallel_size 2", *base, *PP2.split())
    refused("flag --lr says nothing about the model or its layout", *base, "--lr", "1e-6")
    refused("--tensor-model-paralel-size.*did you mean --tensor-model-parallel-size", *base, "--tensor-model-paralel-size", 2)
    refused("num_layers is 4, but .*config.json says 3", *base, "--num-layers", 4)
    assert not out.exists() and not out.with_name("never.partial").exists()
    for layers, ranks in ((36, 8), (92, 16), (61, 32), (61, 64), (4, 3), (3, 2), (2, 7), (1, 4)):
        dealt = megatron.deal_layers(layers, ranks)
        stages = dealt.get("pipeline_model_parallel_size", 1)
        assert ranks % stages == 0
        if stages > 1:
            middle, left = layers - dealt["decoder_first_pipeline_num_layers"] - dealt["decoder_last_pipeline_num_layers"], stages - 2
            assert min(dealt.values()) >= 1 and (middle % left == 0 if left else middle == 0)


def case_damaged_hf_folders() -> None:
    """Names the tensor and the file, on whichever rank finds it; nothing is left."""
    good = read_folder(MODELS / "moe")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"            # of the second expert-parallel rank alone
    broken = {"missing": {k: t for k, t in good.items() if k != name}, "shape": {**good, name: good[name][:-1]},
              "nan": {**good, name: good[name].clone().index_fill_(0, torch.tensor([47]), float("nan"))},
              "extra": {**good, "model.layers.1.mlp.surprise.weight": torch.ones(2)}, "fp8": {**good, name: good[name].to(torch.float8_e4m3fn)}}
    said = {"missing": f"{name}' is missing", "shape": rf"model.safetensors: tensor '{name}' is \(47, 64\), but config.json makes it \(48, 64\)",
            "nan": f"model.safetensors: tensor '{name}' holds values that are not finite", "extra": "no place in the model.*mlp.surprise.weight",
            "fp8": f"tensor '{name}' is fp8.*convert fp8-to-bf16"}
    for kind, tensors in broken.items():
        def write(folder: Path = SCRATCH / f"damaged-{kind}", tensors: dict[str, torch.Tensor] = tensors) -> None:
            folder.mkdir()
            write_folder(folder, tensors)
            (folder / "config.json").write_text((MODELS / "moe" / "config.json").read_text())
        on_rank_0(write)
        out = SCRATCH / "never"
        argv = ("hf-to-torch-dist", "--hf-checkpoint", SCRATCH / f"damaged-{kind}", "--save", out, "--dtype", "bfloat16", *EP2.split())
        if kind == "extra":             # which every rank sees, before it reads
            refused(said[kind], *argv)
        else:
            _load(argv, said[kind] if dist.get_rank() == 1 else "")
        assert not out.exists()


def _load(argv: tuple[object, ...], text: str) -> None:
    """This rank's part of reading, refused with `text`; only the rank that holds a bad tensor sees it."""
    from rlmono.trainer.layout import Layout, held_tensors
    from rlmono.weights.hf import WeightsError, load_hf
    job = _job(argv)
    held = held_tensors(job.build(torch.bfloat16))
    try:
        load_hf(job.source, held, job.tensors, Layout.current(), job.config.model["vocab_size"])
        assert not text, f"not refused: {text}"
    except WeightsError as e:
        assert text and re.search(text, str(e), re.DOTALL), str(e)
    dist.barrier()


def case_damaged_torch_dist() -> None:
    """By the manifest; and where that fits, because the tensors were written so, by the tensors' names."""
    from rlmono.checkpoint import torch_dist
    from rlmono.checkpoint.store import CheckpointError, seal, weights_only_state
    source = to_dist("moe", "")
    argv = ("torch-dist-to-hf", "--load", source, "--hf-checkpoint", MODELS / "moe", "--save", SCRATCH / "never")
    file = next((source / "trainer").glob("*.distcp"))
    data = file.read_bytes()
    dist.barrier()
    on_rank_0(lambda: file.write_bytes(data[:-1]))
    if dist.get_rank() == 0:            # which looks, and tells the other
        job = _job(argv)
        try:
            job.agree_on_folder(0)
            raise AssertionError("not refused")
        except CheckpointError as e:
            assert f"{file.name} has {len(data) - 1} bytes, not {len(data)}: torn" in str(e), str(e)
    on_rank_0(lambda: file.write_bytes(data))
    job = _job(argv)
    chunks = job.build(torch.bfloat16)
    layer = next(iter(chunks[0].decoder.layers))
    layer.input_layernorm.weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    _refused_by_load(chunks, source, r"linear_qkv.layer_norm_weight' is \(64,\), but the model's is \(2,\)")
    layer.surprise = torch.nn.Linear(2, 2)
    layer.input_layernorm.weight = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    _refused_by_load(chunks, source, "surprise.* is missing")
    del layer.surprise
    job = _job(argv)
    job.config = dataclasses.replace(job.config, model={**job.config.model, "qk_layernorm": False})
    _refused_by_load(job.build(torch.bfloat16), source, "tensor.s. have no place in the model: .*k_layernorm")
    nan = SCRATCH / "nan.dist"
    job = _job(argv)
    chunks = job.build(torch.bfloat16)
    torch_dist.load_weights(chunks, source)
    if dist.get_rank() == 1:
        chunks[0].decoder.final_layernorm.weight.data[3] = float("nan")
    on_rank_0(nan.mkdir)
    torch_dist.save_weights(chunks, nan)
    on_rank_0(lambda: seal(nan, weights_only_state(job.config.model)))
    other = _job(("torch-dist-to-hf", "--load", nan, *argv[3:]))
    folder = other.agree_on_folder(dist.get_rank())
    chunks = other.build(torch.bfloat16)
    if dist.get_rank() == 1:            # the rank that holds it sees it, and ends the others with itself
        _refused_by_load(chunks, folder, "'decoder.final_layernorm.weight' holds values that are not finite")
    else:
        torch_dist.load_weights(chunks, folder)
        dist.barrier()
    assert not (SCRATCH / "never").exists()


def _job(argv: tuple[object, ...]) -> Any:
    from megatron.core import parallel_state

    from rlmono.convert import main, megatron
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    return megatron.make_job(*main.parse([str(a) for a in argv]), dist.get_world_size())


def _refused_by_load(chunks: list[Any], folder: Path, text: str) -> None:
    from rlmono.checkpoint import torch_dist
    from rlmono.checkpoint.store import CheckpointError
    try:
        torch_dist.load_weights(chunks, folder)
        raise AssertionError(f"not refused: {text}")
    except CheckpointError as e:
        assert re.search(text, str(e), re.DOTALL), str(e)
    dist.barrier()


assert set(PATHS) == set(FAMILIES) and set(PREDICTION) <= set(PATHS)
if __name__ == "__main__":
    run_cases(globals())
