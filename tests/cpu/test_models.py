"""Model families without a model: shapes of published configs, configs/models, and values of the shape that flags change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from published import HUB, PUBLISHED

from rlmono.config import names, validate
from rlmono.config.hf import changed_values
from rlmono.config.option import ConfigError
from rlmono.config.schema import Config
from rlmono.config.sources import resolve
from rlmono.config.validate import layout_only
from rlmono.models.decoder import FREE
from rlmono.models.registry import FAMILIES, family, shape_from_hf

MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
OTHER = {"rotary_base": 12345.0, "norm_epsilon": 3e-4, "max_position_embeddings": 2048, "init_method_std": 0.5}
"""Values that no published model has."""


def write(folder: Path, hf: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf))
    return str(folder)


def read(tmp_path: Path, name: str, *flags: str) -> Config:
    return resolve(["--hf-checkpoint", write(tmp_path / "model", PUBLISHED[name]), *flags], {}, layout_only)


def problems(tmp_path: Path, name: str, *flags: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, name, *flags)
    return caught.value.problems


# ---------------------------------------------------------------- configs/models

def test_every_published_model_has_a_file() -> None:
    assert {f.stem for f in MODELS.glob("*.env")} == PUBLISHED.keys() == HUB.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_is_the_shape_that_the_hf_config_gives(tmp_path: Path, name: str) -> None:
    """All of it but what is free, and nothing else; read as any env file is."""
    env = MODELS / f"{name}.env"
    config = resolve(["--env-file", str(env)], {}, lambda config, environ: config)
    shape = shape_from_hf(PUBLISHED[name])
    assert config.model == {k: v for k, v in shape.items() if k in names.SHAPE and k not in names.FREE_SHAPE and v is not None}
    assert read(tmp_path, name, "--env-file", str(env)).model.items() >= shape.items()


def test_a_file_refuses_another_model(tmp_path: Path) -> None:
    found = problems(tmp_path, "qwen3-4B", "--env-file", str(MODELS / "qwen3-8B.env"))
    assert any("hidden_size is 4096, but" in p and "says 2560: its weights would not fit; leave it out" in p for p in found), found


def test_recipes_fit_their_models(tmp_path: Path) -> None:
    """Stages and all: R1's 61 layers are 16 + 16 + 16 + 13."""
    for name, flags in (("deepseek-r1", "--pipeline-model-parallel-size 4 --decoder-last-pipeline-num-layers 13 --tensor-model-parallel-size 8"),
                        ("glm4.5-355B-A32B", "--pipeline-model-parallel-size 4 --tensor-model-parallel-size 8"),
                        ("qwen3-4B", "--tensor-model-parallel-size 2")):
        read(tmp_path, name, *flags.split())
    assert any("61 layers over pipeline_model_parallel_size 4" in p for p in problems(tmp_path, "deepseek-r1", "--pipeline-model-parallel-size", "4"))


def test_experts_are_dealt_evenly() -> None:
    config = Config(model=shape_from_hf(PUBLISHED["qwen3-30B-A3B"]), tensor_model_parallel_size=4, expert_model_parallel_size=3,
                    expert_tensor_parallel_size=5)
    assert list(validate._experts(config)) == [
        "expert_model_parallel_size 3 does not divide the model's 128 experts", "tensor_model_parallel_size 4 with experts needs --sequence-parallel",
        "expert_tensor_parallel_size 5 does not divide the model's moe_ffn_hidden_size 768"]


@pytest.mark.parametrize(("values", "words"), [
    ({"moe_aux_loss_coeff": 0.001}, "Megatron would add this loss to each pack"), ({"moe_z_loss_coeff": 1e-4}, "Megatron would add this loss"),
    ({"moe_router_load_balancing_type": "sinkhorn"}, "would send tokens to other experts than the engine does")])
def test_losses_and_routing_beside_the_objective_are_refused(values: dict[str, Any], words: str) -> None:
    (found,) = validate._experts(Config(model=shape_from_hf(PUBLISHED["qwen3-30B-A3B"]), megatron=values))
    assert words in found


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_weights_of_a_published_model_have_names(name: str) -> None:
    """Each once; as many layers and experts as it has."""
    shape = shape_from_hf(PUBLISHED[name])
    found = [n for t in family(shape["architecture"]).tensors(shape) for n in t.hf_names]
    assert len(found) == len(set(found)) and ("lm_head.weight" in found) == shape["untie_embeddings_and_output_weights"]
    assert sum(n.endswith("input_layernorm.weight") for n in found) == shape["num_layers"]
    assert sum("experts.0.gate_proj" in n and "shared" not in n for n in found) == sum(shape.get("moe_layer_freq", []))


def test_architectures_are_those_of_the_families() -> None:
    assert {hf["architectures"][0] for hf in PUBLISHED.values()} == FAMILIES.keys()
    with pytest.raises(ValueError, match="architecture 'GPT2LMHeadModel' is not known; known: DeepseekV3ForCausalLM, Glm4MoeForCausalLM"):
        shape_from_hf({"architectures": ["GPT2LMHeadModel"]})


@pytest.mark.parametrize(("name", "change", "words"), [
    ("qwen3-4B", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling 'yarn' is not supported for Qwen3ForCausalLM; known: default"),
    ("llama3.1-8B", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "known: default, llama3"),
    ("llama3.1-8B", {"mlp_bias": True}, "mlp_bias is not supported"),
    ("qwen3-4B", {"sliding_window": 4096, "use_sliding_window": True}, "sliding_window 4096 is not supported"),
    ("llama3.1-8B", {"sliding_window": 4096}, "sliding_window 4096 is not supported"),
    ("deepseek-r1", {"topk_group": 2}, "num_experts_per_tok 8 over topk_group 2 is not supported"),
    ("kimi-k2", {"norm_topk_prob": False}, "norm_topk_prob false is not supported"),
    ("qwen3-30B-A3B", {"num_experts_per_tok": None}, "'num_experts_per_tok' is missing"),
    ("qwen3-4B", {"hidden_size": "2560"}, "'hidden_size' must be a whole number above 0, but is '2560'"),
    ("qwen3-4B", {"num_key_value_heads": 0}, "'num_key_value_heads' must be a whole number above 0, but is 0"),
])
def test_what_a_family_does_not_compute_is_refused(name: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        shape_from_hf({k: v for k, v in (PUBLISHED[name] | change).items() if v is not None})


# ---------------------------------------------------------------- argument lists for Megatron

def test_argument_lists_for_megatron_carry_over(tmp_path: Path) -> None:
    """What says nothing for the architecture, or what rlmono does anyway, is taken in; what is of the same shape is no override."""
    lists = {
        "moonlight-16B-A3B": "--num-layers 27 --kv-channels 128 --rotary-scaling-factor 1 --mscale 1.0 --mscale-all-dim 1.0 --num-experts 64 "
                             "--moe-layer-freq [0]*1+[1]*26 --moe-router-group-topk 1 --moe-router-num-groups 1 --rotary-base 50000",
        "kimi-k2": "--kv-channels 64 --rotary-scaling-factor 32.0 --moe-shared-expert-intermediate-size 2048 --moe-router-bias-update-rate 0",
        "glm4.5-355B-A32B": "--rotary-percent 0.5 --add-qkv-bias --qk-layernorm --group-query-attention --vocab-size 151552 --moe-router-dtype fp32"}
    common = ("--disable-bias-linear --swiglu --normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights "
              "--no-rope-fusion --no-masked-softmax-fusion --attention-softmax-in-fp32 --moe-router-pre-softmax --moe-router-score-function sigmoid "
              "--moe-router-enable-expert-bias --moe-grouped-gemm --moe-permute-fusion --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0")
    for name, flags in lists.items():
        config = read(tmp_path, name, *flags.split(), *common.split())
        assert config.model == shape_from_hf(PUBLISHED[name])
        assert any(note.startswith("--moe-grouped-gemm is not needed: experts are computed one after another") for note in config.notes)


@pytest.mark.parametrize("flags", ["--rotary-interleaved true", "--softmax-scale 0.5", "--window-size [128,0]", "--moe-expert-capacity-factor 1.0"])
def test_what_would_make_another_model_is_refused(tmp_path: Path, flags: str) -> None:
    found = problems(tmp_path, "qwen3-4B", *flags.split())
    assert any("would make the trainer's model another than the engine's" in p for p in found), found


# ---------------------------------------------------------------- values that flags change

def test_free_values_have_a_name_in_config_json() -> None:
    assert set(FREE) == set(names.FREE_SHAPE)


@pytest.mark.parametrize("name", PUBLISHED)
def test_changed_values_are_what_config_json_would_say(tmp_path: Path, name: str) -> None:
    """As the hub's files are, and as transformers 5 writes them."""
    old = PUBLISHED[name]
    scaling = {k.replace("type", "rope_type") if k == "type" else k: v for k, v in (old.get("rope_scaling") or {"rope_type": "default"}).items()}
    moved = {k: old[k] for k in ("rope_theta", "partial_rotary_factor") if k in old}
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling", "partial_rotary_factor")} | {"rope_parameters": scaling | moved}
    for number, hf in enumerate((old, new)):
        shape = shape_from_hf(hf)
        assert shape == shape_from_hf(old)
        changes = OTHER | ({"rotary_percent": 0.25} if "glm" in name else {})
        for given in ({}, *({k: v} for k, v in changes.items()), changes):
            found = changed_values(write(tmp_path / str(number), hf), {**shape, **given})
            assert bool(found) == bool(given)
            assert shape_from_hf({**hf, **found}) == {**shape, **given}, given
            if {"rotary_base", "rotary_percent"} & given.keys():        # SGLang and transformers 5 read nothing else
                assert found["rope_parameters"].keys() >= new["rope_parameters"].keys()


def test_flags_change_the_shape(tmp_path: Path) -> None:
    config = read(tmp_path, "qwen3-4B", "--rotary-base", "10000", "--norm-epsilon", "1e-5")
    assert config.model == {**shape_from_hf(PUBLISHED["qwen3-4B"]), "rotary_base": 10000.0, "norm_epsilon": 1e-5}
    assert config.origin["model.rotary_base"] == "flag --rotary-base"


def test_partial_rotary_needs_an_engine_that_knows_it(tmp_path: Path) -> None:
    assert read(tmp_path, "glm4.5-106B-A12B", "--rotary-percent", "0.25").model["rotary_percent"] == 0.25
    found = problems(tmp_path, "qwen3-4B", "--rotary-percent", "0.5")
    assert any("the engine's model of this architecture has no partial rotary embedding" in p for p in found), found


def test_the_engine_alone_is_not_changed(tmp_path: Path) -> None:
    def override(values: dict[str, Any]) -> tuple[str, str]:
        return "--sglang-json-model-override-args", json.dumps(values)
    found = problems(tmp_path, "qwen3-4B", *override({"rope_theta": 10000}))
    assert any("it changes the engine's rotary_base to 10000.0, and not the trainer's; use --rotary-base 10000.0 for both" in p for p in found), found
    found = problems(tmp_path, "qwen3-4B", *override({"num_hidden_layers": 2}))
    assert any("num_layers to 2, and not the trainer's; leave it out" in p for p in found), found
    read(tmp_path, "qwen3-4B", *override({"some_engine_switch": True}))


def test_the_worked_example_is_the_file() -> None:
    """docs/models.md shows the Qwen3 family as it is, and names every family."""
    root = Path(__file__).resolve().parents[2]
    page, file = (root / "docs" / "models.md").read_text(), (root / "rlmono" / "models" / "qwen3.py").read_text()
    example = page.split("```python\n", 1)[1].split("```", 1)[0]
    assert file.endswith(example) and '"Qwen3ForCausalLM": "rlmono.models.qwen3",' in page
    assert all(f"| `{name}` | `{module.rsplit('.', 1)[1]}.py` |" in page for name, module in FAMILIES.items())
