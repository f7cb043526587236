"""8-bit floats: scales and numbers against a reference in plain Python, the two tools, and what others read in the folders that they write."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, PREDICTION, Tensors, differences, make_family, read_folder, write_folder

from rlmono.checkpoint.folder import FolderError, partial_of
from rlmono.config.option import ConfigError
from rlmono.convert import fp8 as tools
from rlmono.convert.main import main
from rlmono.weights import fp8
from rlmono.weights.hf import WeightsError, _dequantised_part, index_of
from rlmono.weights.update import as_engines_take_it
from rlmono.world.locks import hold

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [((5, 7), (2, 3)), ((1, 1), (4, 4)), ((8, 6), (4, 3)), ((130, 257), (128, 128)), ((128, 128), (128, 128))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        make_family(family, folder / family)
    return folder


# ---------------------------------------------------------------- the reference: e4m3 as its authors define it (arXiv:2209.05433)

def number(code: int) -> float:
    """Sign, four bits of exponent with bias 7, three of mantissa; S.1111.111 is NaN and there is no infinity."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0**(exponent - 7)
    return -size if sign else size


POSITIVE = [number(code) for code in range(127)]


def nearest(x: float) -> int:
    """The code of the nearest number, the even one of two that are as near."""
    size = abs(x)
    best = min(range(127), key=lambda code: (abs(POSITIVE[code] - size), code & 1))
    return best | (128 if math.copysign(1, x) < 0 else 0)


def reference(weight: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales): a block at a time, a number at a time, in fp32 as the formula says."""
    rows, columns = weight.shape
    scales = np.zeros((math.ceil(rows / block[0]), math.ceil(columns / block[1])), np.float32)
    codes = np.zeros(weight.shape, np.uint8)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            where = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = max(abs(float(x)) for x in weight[where].flat)
            scale = scales[i, j] = np.float32(max(largest, 1e-10)) / np.float32(448)
            part = [nearest(min(448.0, max(-448.0, float(np.float32(x) / scale)))) for x in weight[where].flat]
            codes[where] = np.array(part, np.uint8).reshape(weight[where].shape)
    return codes, scales


def weights(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Numbers of all sizes, zeros too, and a block of nothing else where there is more than one."""
    generator = torch.Generator().manual_seed(shape[0])
    w = torch.randn(shape, generator=generator) * torch.logspace(-4, 1, shape[1])
    w[0, 0] = 0
    w[-1] = 0
    return w.to(dtype)


def check(found: fp8.Quantised, codes: np.ndarray, scales: np.ndarray) -> None:
    q, scale = found
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and q.is_contiguous()
    assert np.array_equal(scale.numpy(), scales.reshape(scale.shape))
    assert np.array_equal(q.view(torch.uint8).numpy(), codes)


def test_e4m3_is_what_the_reference_says() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
    assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(every, map(number, range(256)), strict=True))
    assert max(POSITIVE) == fp8.LARGEST == 448


@pytest.mark.parametrize(("shape", "block"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks(shape: tuple[int, int], block: tuple[int, int], dtype: torch.dtype) -> None:
    w = weights(shape, dtype)
    kept = w.clone()
    check(fp8.quantise_block(w, block), *reference(w.float().numpy(), block))
    assert torch.equal(w, kept)


@pytest.mark.parametrize(("shape", "_"), SHAPES[:3])
def test_rows_and_whole_tensors(shape: tuple[int, int], _: object) -> None:
    w = weights(shape)
    check(fp8.quantise_channel(w), *reference(w.float().numpy(), (1, shape[1])))
    check(fp8.quantise_tensor(w), *reference(w.float().numpy(), shape))
    assert fp8.quantise_channel(w)[1].shape == (shape[0], 1) and fp8.quantise_tensor(w)[1].shape == (1,)


@pytest.mark.parametrize("strategy", fp8.STRATEGIES)
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_the_error_is_within_the_stated_bound(strategy: str, shape: tuple[int, int], block: tuple[int, int]) -> None:
    """|Δ| <= max(|w| 2^-4, scale 2^-10), and the largest number of a block comes back; both up to fp32's own rounding."""
    w = weights(shape, torch.float32)
    q, scale = fp8.quantise(w, strategy, block)
    back = fp8.dequantise(q, scale, block, torch.float32)
    grid = {"block": block, "channel": (1, shape[1]), "tensor": shape}[strategy]
    rows, columns = (torch.arange(n) // b for n, b in zip(shape, grid, strict=True))
    each = scale.reshape(math.ceil(shape[0] / grid[0]), -1)[rows][:, columns]
    bound = torch.maximum(w.abs() * 2**-4, each * 2**-10) * (1 + 2**-20)
    assert bool(((back - w).abs() <= bound).all())
    assert torch.allclose(back.abs().amax(), w.abs().amax(), rtol=2**-22, atol=0)
    assert torch.equal(fp8.dequantise(q, scale, block), back.bfloat16())


def test_scales_that_fit_no_strategy() -> None:
    with pytest.raises(ValueError, match=r"scales of shape \[2, 2\] for a tensor of \[5, 7\] in blocks of \[2, 3\]"):
        fp8.dequantise(torch.zeros(5, 7).to(fp8.FP8), torch.ones(2, 2), (2, 3))


@pytest.mark.parametrize(("name", "expected"), [
    ("model.layers.0.self_attn.q_proj.weight", True), ("model.layers.0.self_attn.q_proj.bias", False),
    ("model.layers.0.self_attn.q_a_proj.weight", True), ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", True),
    ("model.layers.0.self_attn.kv_b_proj.weight", True), ("model.layers.0.self_attn.o_proj.weight", True),
    ("model.layers.0.mlp.gate_proj.weight", True), ("model.layers.3.mlp.experts.17.up_proj.weight", True),
    ("model.layers.3.mlp.shared_experts.down_proj.weight", True), ("model.layers.3.mlp.gate.weight", False),
    ("model.layers.3.mlp.gate.e_score_correction_bias", False), ("model.layers.3.self_attn.q_a_layernorm.weight", False),
    ("model.layers.61.eh_proj.weight", False), ("model.embed_tokens.weight", False), ("lm_head.weight", False), ("model.norm.weight", False)])
def test_what_is_quantised(name: str, expected: bool) -> None:
    assert fp8.is_quantised(name) == expected


def test_what_is_left_out_is_named_by_whole_words() -> None:
    assert not fp8.is_quantised("model.layers.1.mlp.gate_proj.weight", ["model.layers.1"])
    assert fp8.is_quantised("model.layers.11.mlp.gate_proj.weight", ["model.layers.1"])
    assert fp8.is_quantised("model.layers.1.mlp.gate_proj.weight", ["mlp.gate"])
    assert not fp8.is_quantised("model.layers.1.self_attn.o_proj.weight", ["o_proj"])


# ---------------------------------------------------------------- the tools

def quantised(folder: Path) -> set[str]:
    return {k for k, t in read_folder(folder).items() if t.dtype == fp8.FP8}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", fp8.STRATEGIES)
def test_there_and_back(models: Path, tmp_path: Path, family: str, strategy: str) -> None:
    """What is not quantised is the same to the bit; what is, is what the pure functions say; files and config as they should be."""
    source, there, back = models / family, tmp_path / "fp8", tmp_path / "bf16"
    assert main(["bf16-to-fp8", "--model-dir", str(source), "--save-dir", str(there), "--strategy", strategy, "--block-size", "16", "32",
                 "--max-workers", "3"]) == 0
    before, after = read_folder(source), read_folder(there)
    chosen = quantised(there)
    assert chosen == {k for k in before if fp8.is_quantised(k)} and len(chosen) >= 7 * 3
    suffix = "_scale_inv" if strategy == "block" else "_scale"
    assert after.keys() == before.keys() | {k + suffix for k in chosen}
    for name in chosen:
        q, scale = fp8.quantise(before[name], strategy, (16, 32))
        assert torch.equal(after[name].view(torch.uint8), q.view(torch.uint8)) and torch.equal(after[name + suffix], scale)
    index = json.loads((there / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys() and index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    assert all(name in read_folder_file(there / file) for name, file in index["weight_map"].items())
    assert (there / "tokenizer_config.json").read_text() == (source / "tokenizer_config.json").read_text()

    assert main(["fp8-to-bf16", "--input", str(there), "--output", str(back), "--max-workers", "2"]) == 0
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    tensors = read_folder(back)
    assert differences(source, back) == sorted(k for k in chosen if not torch.equal(tensors[k], before[k])) != []
    assert tensors.keys() == before.keys()
    for name in chosen:
        q, scale = fp8.quantise(before[name], strategy, (16, 32))
        assert tensors[name].dtype == torch.bfloat16 and torch.equal(tensors[name], fp8.dequantise(q, scale, (16, 32)))


class Trainer:
    """Exports what a folder holds, in buckets."""

    def __init__(self, tensors: Tensors):
        self.tensors = list(tensors.items())

    def export(self) -> Any:
        yield self.tensors[:5]
        yield self.tensors[5:]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_on_its_way_to_fp8_engines_is_what_the_tool_writes(models: Path, tmp_path: Path, family: str) -> None:
    source, there = models / family, tmp_path / "fp8"
    assert main(["bf16-to-fp8", "--model-dir", str(source), "--save-dir", str(there), "--strategy", "block"]) == 0
    shape = {"quantization_config": json.loads((there / "config.json").read_text())["quantization_config"]}
    trainer = Trainer(read_folder(source))
    sent = {name: t for bucket in as_engines_take_it(trainer, shape).export() for name, t in bucket}
    written = read_folder(there)
    assert sent.keys() == written.keys()
    assert all(torch.equal(t.contiguous().view(torch.uint8), written[name].view(torch.uint8)) for name, t in sent.items() if t.dim())
    assert as_engines_take_it(trainer, {}) is trainer


def test_a_trainer_reads_fp8_weights_by_their_scales(models: Path, tmp_path: Path) -> None:
    """A rank's part is a part of what the tool makes of the whole."""
    there, back = tmp_path / "fp8", tmp_path / "bf16"
    assert main(["bf16-to-fp8", "--model-dir", str(models / "qwen3"), "--save-dir", str(there), "--strategy", "block"]) == 0
    assert main(["fp8-to-bf16", "--input", str(there), "--output", str(back)]) == 0
    name, part = "model.layers.1.mlp.down_proj.weight", (slice(None), slice(3, 9))
    assert torch.equal(_dequantised_part(index_of(there), there, name, part), read_folder(back)[name][part])


def read_folder_file(file: Path) -> set[str]:
    from safetensors import safe_open
    with safe_open(file, "pt") as opened:
        return set(opened.keys())


def test_config_names_what_is_left_out(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tools.to_fp8(models / "glm", out, "block", (128, 128), ["o_proj", "model.layers.1"])
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    left = config.pop("modules_to_not_convert")
    assert config == {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    assert {"lm_head", "model.embed_tokens", "model.layers.2.mlp.gate", "o_proj", "model.layers.1", "model.layers.3.eh_proj"} <= set(left)
    assert quantised(out) and not any(".layers.1." in k or "o_proj" in k for k in quantised(out))
    assert all(fp8.is_quantised(k) and fp8.is_quantised(k, left) for k in quantised(out))
    assert not any(fp8.is_quantised(k, left) for k in read_folder(out).keys() - quantised(out))
    assert any("layers.3.mlp.experts" in k for k in quantised(out)), "a layer for next-token prediction is quantised as the others"


READERS = """
import json, sys, torch
from rlmono.engine.compat import prepare_cpu
prepare_cpu()
import transformers
import transformers.quantizers.quantizer_finegrained_fp8 as quantizer
quantizer.is_accelerate_available = lambda *_: True         # it dequantises on one CPU, and needs none of it
block, bf16, channel, tensor = sys.argv[1:]
load = transformers.AutoModelForCausalLM.from_pretrained
a = load(block, quantization_config=transformers.FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16).state_dict()
b = load(bf16, dtype=torch.bfloat16).state_dict()
differing = [k for k in b if not torch.equal(a[k], b[k])]
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.utils import is_layer_skipped
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
read = lambda folder: json.load(open(folder + "/config.json"))["quantization_config"]
fp8 = Fp8Config.from_config(read(block))
skipped = [is_layer_skipped("model.layers.1." + n, fp8.ignored_layers) for n in ("mlp.gate", "mlp.gate_up_proj", "self_attn.qkv_proj", "mlp.experts")]
schemes = []
for folder in (channel, tensor):
    config = CompressedTensorsConfig.from_config(read(folder))
    linear = config.target_scheme_map["Linear"]
    schemes.append([str(linear["weights"].strategy), config._is_fp8_w8a8(linear["weights"], linear["input_activations"])])
print("READ", json.dumps([differing, len(b), fp8.is_checkpoint_fp8_serialized, fp8.weight_block_size, skipped, schemes]))
"""


def test_transformers_and_sglang_read_what_is_written(models: Path, tmp_path: Path) -> None:
    """transformers dequantises the block format to the bit as we do; SGLang takes each config for what it is."""
    for strategy in fp8.STRATEGIES:
        tools.to_fp8(models / "moe", tmp_path / strategy, strategy, (128, 128))
    tools.to_bf16(tmp_path / "block", tmp_path / "bf16")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", READERS, *(str(tmp_path / n) for n in ("block", "bf16", "channel", "tensor"))],
                          cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "READ " in done.stdout, done.stderr[-3000:]
    differing, count, serialized, block, skipped, schemes = json.loads(done.stdout.split("READ ")[1])
    assert differing == [] and count > 30 and serialized and block == [128, 128]
    assert skipped == [True, False, False, False] and schemes == [["channel", True], ["tensor", True]]


# ---------------------------------------------------------------- refusals

@pytest.fixture
def block(models: Path, tmp_path: Path) -> Path:
    tools.to_fp8(models / "qwen3", tmp_path / "block", "block", (16, 16))
    return tmp_path / "block"


NAME = "model.layers.1.mlp.up_proj.weight"


def rewritten(folder: Path, change: Callable[[Tensors], Any], to: Path) -> Path:
    tensors = read_folder(folder)
    change(tensors)
    to.mkdir()
    write_folder(to, tensors)
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


def nan_code(tensors: Tensors) -> None:
    tensors[NAME].view(torch.uint8)[3, 4] = 0x7F


@pytest.mark.parametrize(("change", "text"), [
    (lambda t: t.pop(f"{NAME}_scale_inv"), f"model.safetensors: tensor '{NAME}' is fp8, but there is no '{NAME}_scale_inv'"),
    (lambda t: t.pop(NAME), f"model.safetensors: tensor '{NAME}_scale_inv' is a scale, but there is no fp8 tensor for it"),
    (lambda t: t.update({f"{NAME}_scale_inv": torch.ones(3, 3)}), rf"tensor '{NAME}_scale_inv': scales of shape \[3, 3\] for a tensor of"),
    (lambda t: t[f"{NAME}_scale_inv"].fill_(math.inf), f"model.safetensors: tensor '{NAME}_scale_inv' holds values that are not finite"),
    (nan_code, f"model.safetensors: tensor '{NAME}' holds values that are not finite")])
def test_a_damaged_fp8_folder_is_refused_by_tensor_and_file(block: Path, tmp_path: Path, change: Callable[[Tensors], Any], text: str) -> None:
    source = rewritten(block, change, tmp_path / "damaged")
    with pytest.raises(WeightsError, match=text):
        tools.to_bf16(source, tmp_path / "out", workers=2)
    assert nothing_left(tmp_path / "out")


def test_a_damaged_bf16_folder_is_refused(models: Path, tmp_path: Path) -> None:
    nan = rewritten(models / "qwen3", lambda t: t[NAME][0].fill_(math.nan), tmp_path / "nan")
    with pytest.raises(WeightsError, match=f"model.safetensors: tensor '{NAME}' holds values that are not finite"):
        tools.to_fp8(nan, tmp_path / "out", "block", (128, 128))
    torn = rewritten(models / "qwen3", lambda t: None, tmp_path / "torn")
    data = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(WeightsError, match=r"torn/model.safetensors: not a whole safetensors file .*: tensor 'model\..*' is cut off\)"):
        tools.to_fp8(torn, tmp_path / "out", "block", (128, 128))
    part = tmp_path / "part"
    subprocess.run(["cp", "-r", models / "qwen3", part], check=True)
    (part / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match="model-00002-of-00002.safetensors: missing, but model.safetensors.index.json lists it"):
        tools.to_fp8(part, tmp_path / "out", "block", (128, 128))
    assert nothing_left(tmp_path / "out")


def test_wrong_folders_are_refused(models: Path, block: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = models / "qwen3", tmp_path / "out"

    def said(*argv: object) -> str:
        assert main([str(a) for a in argv]) == 2
        return capsys.readouterr().err
    to_fp8 = ("bf16-to-fp8", "--model-dir", source, "--save-dir")
    assert "nowhere is not a folder" in said("fp8-to-bf16", "--input", tmp_path / "nowhere", "--output", out)
    assert "no tensor here is fp8" in said("fp8-to-bf16", "--input", source, "--output", out)
    assert "quantised already" in said("bf16-to-fp8", "--model-dir", block, "--save-dir", out)
    assert "input and output must be apart" in said(*to_fp8, source) and "must be apart" in said(*to_fp8, source / "inside")
    assert "must be apart" in said(*to_fp8, models), "the output holds the input"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    assert "there already; remove it" in said(*to_fp8, tmp_path / "other")
    assert "--overwrite leaves it alone" in said(*to_fp8, tmp_path / "other", "--overwrite") and (tmp_path / "other" / "thesis.tex").exists()
    only = rewritten(source, lambda t: [t.pop(k) for k in list(t) if "_proj" in k], tmp_path / "only")
    assert "no tensor here is one that is quantised" in said("bf16-to-fp8", "--model-dir", only, "--save-dir", out)
    assert nothing_left(out)


def test_a_folder_is_replaced_only_when_asked_and_when_the_new_one_is_whole(models: Path, block: Path) -> None:
    before = read_folder(block)
    with pytest.raises(FolderError, match="there already"):
        tools.to_fp8(models / "qwen2", block, "block", (16, 16))
    broken = rewritten(models / "qwen2", lambda t: t["model.layers.2.mlp.up_proj.weight"].fill_(math.nan), block.parent / "broken")
    with pytest.raises(WeightsError):
        tools.to_fp8(broken, block, "block", (16, 16), overwrite=True)
    assert all(torch.equal(t.view(torch.uint8), before[k].view(torch.uint8)) for k, t in read_folder(block).items())
    tools.to_fp8(models / "qwen2", block, "block", (16, 16), overwrite=True)
    assert "model.layers.0.self_attn.q_proj.bias" in read_folder(block)
    assert sorted(p.name for p in block.parent.iterdir()) == ["block", "broken"]
    assert {f.stat().st_mode & 0o777 for f in block.iterdir()} == {0o666 & block.stat().st_mode}


def test_a_full_disk_and_a_folder_in_use_are_refused_at_once(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "deep" / "out"
    partial_of(out).mkdir(parents=True)
    lock = hold(partial_of(out))
    with pytest.raises(FolderError, match="another process is writing it"):
        tools.to_fp8(models / "qwen3", out, "block", (16, 16))
    os.close(lock)
    partial_of(out).rmdir()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(FolderError, match=r"out: needs .* GiB, and .* GiB are free there"):
        tools.to_fp8(models / "qwen3", out, "block", (16, 16))
    assert nothing_left(out)


def test_options_are_checked(models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["bf16-to-fp8", "--model-dir", str(models / "qwen3"), "--save-dir", "out"]
    for wrong, text in ((["--block-size", "128", "0"], "must be at least 1"), (["--strategy", "row"], "invalid choice"),
                        (["--max-workers", "x"], "invalid"), (["--block", "128", "128"], "not an option: --block")):
        with pytest.raises(SystemExit) as e:
            main([*argv, *wrong])
        assert e.value.code == 2 and text in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert main(argv) == 2 and "start it without torchrun" in capsys.readouterr().err


KILLED = """
import os, sys
from pathlib import Path
import rlmono.checkpoint.folder as folder
import rlmono.convert.fp8 as tools
if sys.argv[1] == "between files":
    save = tools.save_file
    def save_and_die(*args, **kwargs):
        save(*args, **kwargs)
        os.kill(os.getpid(), 9)
    tools.save_file = save_and_die
else:
    folder.os.replace = lambda *_: os.kill(os.getpid(), 9)
tools.to_fp8(Path(sys.argv[2]), Path(sys.argv[3]), "block", (16, 16))
"""


@pytest.mark.parametrize("moment", ["between files", "before the rename"])
def test_a_killed_conversion_leaves_nothing_that_looks_finished(models: Path, tmp_path: Path, moment: str) -> None:
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, moment, models / "qwen3", out], cwd=ROOT, timeout=120)
    assert done.returncode == -9 and not out.exists() and partial_of(out).is_dir()
    tools.to_fp8(models / "qwen3", out, "block", (16, 16))
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and quantised(out)


def nothing_left(out: Path) -> bool:
    return not out.exists() and not partial_of(out).exists()


def test_a_folder_without_a_config_is_refused(models: Path, tmp_path: Path) -> None:
    bare = rewritten(models / "qwen3", lambda t: None, tmp_path / "bare")
    (bare / "config.json").unlink()
    with pytest.raises(ConfigError, match="has no config.json"):
        tools.to_bf16(bare, tmp_path / "out")
    assert set(PREDICTION) <= set(FAMILIES)
