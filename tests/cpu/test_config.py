"""The configuration: what users paste keeps its meaning, and what is wrong is named with its source."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Mapping, Optional

import pytest
import seeds

from rlmono import quickstart
from rlmono.config import docs, foreign, kernels
from rlmono.config.batches import batch_arithmetic
from rlmono.config.kinds import kind_of, parse
from rlmono.config.option import ConfigError, options
from rlmono.config.schema import SECTIONS, Config
from rlmono.config.show import dry_run, show_config
from rlmono.config.sources import eval_sets, resolve
from rlmono.config.validate import on_device, unsupported
from rlmono.models import registry

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"


def plain_shape(hf: Mapping[str, Any]) -> dict[str, Any]:
    """A shape of any architecture, so that its list can be read before its family is there."""
    return dict(architecture=hf["architectures"][0], num_layers=hf["num_hidden_layers"], hidden_size=hf["hidden_size"],
                ffn_hidden_size=hf["intermediate_size"], num_attention_heads=hf["num_attention_heads"],
                num_query_groups=hf["num_key_value_heads"], kv_channels=hf.get("head_dim", 128), vocab_size=hf["vocab_size"],
                rotary_base=float(hf["rope_theta"]), rotary_percent=1.0, norm_epsilon=hf["rms_norm_eps"], qk_layernorm=True,
                untie_embeddings_and_output_weights=not hf["tie_word_embeddings"], max_position_embeddings=hf["max_position_embeddings"],
                num_moe_experts=hf.get("n_routed_experts"), q_lora_rank=hf.get("q_lora_rank"))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The users' folder; every architecture is known."""
    monkeypatch.setattr(registry, "shape_from_hf", plain_shape)
    return seeds.make_root(tmp_path)


@pytest.fixture
def small(root: Path) -> Callable[..., Config]:
    """Resolve a small run, with more flags and variables."""
    def make(flags: str = "", environ: Optional[Mapping[str, str]] = None, without: str = "") -> Config:
        base = {"--hf-checkpoint": f"{root}/Qwen3-4B", "--prompt-data": f"{root}/aime-2024/aime-2024.jsonl", "--label-key": "label",
                "--rm-type": "deepscaler", "--num-rollout": "3", "--n-samples-per-prompt": "8", "--actor-num-gpus-per-node": "4"}
        kept = [word for name, value in base.items() if name not in without.split() for word in (name, value)]
        return resolve([*kept, "--colocate", *seeds.words(flags, root)], environ or {})
    return make


def problems(call: Callable[[], Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call()
    assert isinstance(caught.value, ValueError) and all(line in str(caught.value) for line in caught.value.problems)
    return list(caught.value.problems)


# What users paste

def test_qwen3_4b_colocated(root: Path) -> None:
    c = resolve(seeds.words(seeds.QWEN3_4B_COLOCATED, root), {})
    assert (c.hf_checkpoint, c.save_interval, c.num_rollout) == (f"{root}/Qwen3-4B", 20, 3000)
    assert (c.rollout_batch_size, c.n_samples_per_prompt, c.global_batch_size, c.num_steps_per_rollout) == (32, 8, 256, 1)
    assert c.eval_prompt_data == ("aime-2024", f"{root}/aime-2024/aime-2024.jsonl") and c.eval_top_p == 0.7 and c.rollout_top_p == 1.0
    assert c.use_kl_loss and c.kl_loss_coef == 0.0 and c.kl_loss_type == "low_var_kl" and (c.eps_clip, c.eps_clip_high) == (0.2, 0.28)
    assert (c.lr, c.weight_decay, c.adam_beta2, c.rollout_temperature) == (1e-6, 0.1, 0.98, 0.8)
    assert c.colocate and c.sequence_parallel and c.use_dynamic_batch_size and c.max_tokens_per_gpu == 9216
    assert c.rollout_num_gpus_per_engine == 2 and c.sglang == {"mem_fraction_static": 0.7} and c.megatron == {}
    assert c.model["num_layers"] == 36 and c.model["ffn_hidden_size"] == 9728
    assert unsupported(c) == [] and batch_arithmetic(c, 4).samples_per_rank == 64


def test_qwen3_4b_model_flags_repeat_the_hf_config(root: Path) -> None:
    c = resolve(seeds.words(seeds.QWEN3_4B_MODEL + seeds.QWEN3_4B_COLOCATED + " --rotary-base 10000", root), {})
    assert c.model["rotary_base"] == 10000.0 and c.origin["model.rotary_base"] == "flag --rotary-base"
    assert c.origin["model.vocab_size"] == "flag --vocab-size" and c.megatron == {}
    assert any(note.startswith("--swiglu is not needed") for note in c.notes)


def test_qwen3_4b_disaggregated(root: Path) -> None:
    c = resolve(seeds.words(seeds.QWEN3_4B_DISAGGREGATED, root), {})
    assert not c.colocate and (c.actor_num_gpus_per_node, c.rollout_num_gpus, c.sglang_server_concurrency) == (2, 6, 160)
    assert c.sglang["cuda_graph_bs_decode"] == [1, 2, 4, 8, 16, 24, 32, 40] and c.sglang["log_level"] == "warning"
    assert "--sglang-cuda-graph-bs is called --sglang-cuda-graph-bs-decode today" in c.notes
    assert unsupported(c) == []


def test_qwen3_4b_dynamic_sampling(root: Path) -> None:
    c = resolve(seeds.words(seeds.QWEN3_4B_DYNAMIC_SAMPLING, root), {})
    ours = "rlmono.rollout.filters.check_reward_nonzero_std"
    assert c.over_sampling_batch_size == 64 and c.partial_rollout and c.dynamic_sampling_filter_path == ours
    assert any(note.startswith("--dynamic-sampling-filter-path: slime.") and note.endswith(f"is {ours} here") for note in c.notes)
    assert unsupported(c) == []


def test_glm(root: Path) -> None:
    c = resolve(seeds.words(seeds.GLM, root), {})
    assert (c.actor_num_nodes, c.pipeline_model_parallel_size, c.expert_model_parallel_size) == (8, 4, 16)
    assert c.sglang == {"mem_fraction_static": 0.7, "enable_dp_attention": True, "dp_size": 4}
    assert c.megatron == {"moe_enable_deepep": True, "moe_token_dispatcher_type": "flex"}
    assert c.optimizer_cpu_offload and c.overlap_cpu_optimizer_d2h_h2d and c.use_precision_aware_optimizer
    later = "\n".join(unsupported(c))
    for feature in ("DP attention",):
        assert feature in later


def test_glm_fp8(root: Path) -> None:
    c = resolve(seeds.words(seeds.GLM_FP8, root), {})
    assert c.sglang["cuda_graph_bs_decode"][:6] == [1, 2, 4, 8, 16, 24] and len(c.sglang["cuda_graph_bs_decode"]) == 19
    assert (c.sglang["moe_a2a_backend"], c.sglang["deepep_mode"], c.sglang["ep_size"], c.sglang["dp_size"]) == ("deepep", "auto", 32, 32)
    assert not any("fp8" in line for line in unsupported(c))
    with pytest.raises(ConfigError, match="engines compute with them on GPUs only"):
        on_device(c, "cpu")
    on_device(dataclasses.replace(c, loss_type="sft"), "cpu")
    other = dataclasses.replace(c, model={**c.model, "quantization_config": {**c.model["quantization_config"], "weight_block_size": [64, 64]}})
    assert any("not e4m3 in blocks of 128 x 128" in line for line in unsupported(other))


def test_deepseek_r1(root: Path) -> None:
    c = resolve(seeds.words(seeds.DEEPSEEK_R1, root), {})
    assert c.sglang["ep_size"] == 64 and c.sglang["moe_a2a_backend"] == "deepep" and c.sglang_server_concurrency == 1024
    assert c.megatron == {"grad_reduce_in_fp32": True, "moe_enable_deepep": True, "moe_token_dispatcher_type": "flex"}
    assert c.decoder_last_pipeline_num_layers == 13 and (c.global_batch_size, c.num_steps_per_rollout) == (256, 4)
    assert "expert parallelism" in "\n".join(unsupported(c))


@pytest.mark.parametrize("recipe, seed", [("qwen3-4B-8gpu", seeds.QWEN3_4B_COLOCATED), ("glm4.5-355B-64gpu", seeds.GLM),
                                          ("deepseek-r1-128gpu", seeds.DEEPSEEK_R1)])
def test_recipe_is_the_seed(root: Path, recipe: str, seed: str) -> None:
    file = f"{RECIPES / recipe}.env"
    c = resolve([], {"RLMONO_ENV_FILE": file, "BASE_DIR": str(root)})
    assert seeds.outcome(c) == seeds.outcome(resolve(seeds.words(seed, root), {}))
    assert c.origin["lr"].startswith(f"{file}:")


@pytest.mark.parametrize("recipe, hf", [("qwen3-4B-8gpu", seeds.HF_QWEN3_4B), ("glm4.5-355B-64gpu", seeds.HF_GLM),
                                        ("deepseek-r1-128gpu", seeds.HF_DEEPSEEK)])
def test_recipe_with_its_model_family(tmp_path: Path, recipe: str, hf: dict[str, Any]) -> None:
    architecture = hf["architectures"][0]
    root = seeds.make_root(tmp_path)
    read = lambda: resolve(["--env-file", f"{RECIPES / recipe}.env"], {"BASE_DIR": str(root)})  # noqa: E731
    if architecture not in registry.FAMILIES:
        assert any(f"architecture {architecture!r} is not known; known: Qwen3ForCausalLM" in line for line in problems(read))
        pytest.skip(f"rlmono/models has no {architecture} yet")
    c = read()
    assert (c.model["architecture"], c.model["num_layers"]) == (architecture, hf["num_hidden_layers"])


# Where values come from

def test_later_sources_win(small: Callable[..., Config], tmp_path: Path) -> None:
    one, two = tmp_path / "one.env", tmp_path / "two.env"
    one.write_text("# first\n\nRLMONO_SEED=1\nRLMONO_LR=1e-5 # remark\nexport RLMONO_WANDB_NAME='a # b $X'\nRLMONO_WANDB_GROUP=x#y\n")
    two.write_text('DIR="/data"\nRLMONO_SEED=2\nRLMONO_SAVE="${DIR}/${NAME:-run}"\n')
    c = small(f"--env-file {one} --env-file {two}", {})
    assert (c.seed, c.lr, c.save, c.wandb_name, c.wandb_group) == (2, 1e-5, "/data/run", "a # b $X", "x#y")
    assert (c.origin["seed"], c.origin["lr"], c.origin["save_hf"]) == (f"{two}:2", f"{one}:4", "default")
    assert c.origin["model.num_layers"].endswith("Qwen3-4B/config.json")
    environ = {"RLMONO_ENV_FILE": f"{one}:{two}", "RLMONO_SEED": "3", "RLMONO_ROLLOUT_STOP": "'a b' c", "RLMONO_SAVE": "", "PATH": "x"}
    c = small("", environ)
    assert (c.seed, c.origin["seed"], c.rollout_stop, c.save) == (3, "variable RLMONO_SEED", ("a b", "c"), None)
    c = small("--seed=4", environ)
    assert (c.seed, c.origin["seed"]) == (4, "flag --seed")
    assert small("--env-file " + str(one), {"RLMONO_ENV_FILE": str(two)}).seed == 1


@pytest.mark.parametrize("flags, value", [("--use-wandb", True), ("--use_wandb true", True), ("--use-wandb --no-use-wandb", False),
                                          ("--use-wandb --use-wandb off", False), ("--use-wandb=0", False)])
def test_switches(small: Callable[..., Config], flags: str, value: bool) -> None:
    assert small(flags).use_wandb is value


def test_a_switch_that_begins_with_no_is_itself(small: Callable[..., Config]) -> None:
    c = small("--no-load-optim --no-bias-dropout-fusion --rollout-top-k -1 --rollout-stop-token-ids 1 2")
    assert c.no_load_optim and c.megatron == {"bias_dropout_fusion": False} and c.rollout_stop_token_ids == (1, 2)


def test_launch_variables_are_no_options(small: Callable[..., Config]) -> None:
    assert small("", {"RLMONO_TORCH_INDEX": "x", "RLMONO_PYTHON": "y", "RLMONO_VENV": "z"}).seed == 1234


def test_eval_sets() -> None:
    assert eval_sets(["a", "b", "c", "d"]) == ("a", "b", "c", "d")
    assert eval_sets(["/x/a.jsonl@[0:5]", "b.parquet", "c", "/d"]) == ("a", "/x/a.jsonl@[0:5]", "b", "b.parquet", "c", "/d")
    with pytest.raises(ValueError, match="'aime' without a path"):
        eval_sets(["aime"])
    with pytest.raises(ValueError, match="two sets of one name"):
        eval_sets(["/x/a.jsonl", "/y/a.jsonl"])


def test_megatron_names(small: Callable[..., Config]) -> None:
    c = small("--bf16 --no-rope-fusion --attention-backend flash --layernorm-epsilon 1e-5 "
              "--moe-router-dtype fp32 --overlap-grad-reduce --no-bias-swiglu-fusion --make-vocab-size-divisible-by 64")
    assert c.dtype == "bfloat16" and c.model["norm_epsilon"] == 1e-5
    assert c.megatron == {"moe_router_dtype": "fp32", "overlap_grad_reduce": True,
                          "bias_activation_fusion": False}


# What is wrong

@pytest.mark.parametrize("flags, line", [
    ("--rollout-batch-sise 4", "flag --rollout-batch-sise is not an option; did you mean --rollout-batch-size?"),
    ("--sglang-mem-fraction 0.5", "flag --sglang-mem-fraction is not an option; did you mean --sglang-mem-fraction-static?"),
    ("--mem-fraction-static 0.5", "flag --mem-fraction-static is not an option; did you mean --sglang-mem-fraction-static?"),
    ("--qqqq", "flag --qqqq is not an option; docs/options.md lists them all"),
    ("--lr fast", "flag --lr needs a number, but got 'fast'"),
    ("--lr nan", "flag --lr needs a number, but got 'nan'"),
    ("--seed 1 2", "flag --seed needs a whole number, but got '1' '2'"),
    ("--seed", "flag --seed needs a whole number, but got nothing"),
    ("--use-wandb maybe", "flag --use-wandb needs true or false, but got 'maybe'"),
    ("--eps-clip -0.1", "flag --eps-clip is -0.1, but must be at least 0"),
    ("--eps-clip-c 1", "flag --eps-clip-c is 1.0, but must be above 1"),
    ("--kl-loss-type k4", "flag --kl-loss-type is 'k4', but must be one of k1, k2, k3, low_var_kl"),
    ("--recompute-granularity all", "flag --recompute-granularity is 'all', but must be one of full, selective, auto"),
    ("--fp8-format e4m3", "flag --fp8-format needs Transformer Engine, which rlmono does without: leave it out"),
    ("--tp-comm-overlap", "flag --tp-comm-overlap needs Transformer Engine, which rlmono does without: leave it out"),
    ("--cp-comm-type p2p", "flag --cp-comm-type has nothing here that it could change: leave it out"),
    ("--average-in-collective", "flag --average-in-collective is set by rlmono itself: leave it out"),
    ("--sglang-tp-size 2", "flag --sglang-tp-size is set by rlmono itself; use --rollout-num-gpus-per-engine"),
    ("--sglang-dp-size many", "flag --sglang-dp-size needs a whole number, but got 'many'"),
    ("--sglang-deepep-mode fast", "flag --sglang-deepep-mode is 'fast', but must be one of auto, normal, low_latency"),
    ("--params-dtype x", "flag --params-dtype cannot be written as text: rlmono sets it itself"),
    ("--hidden-dropout 0.1", "flag --hidden-dropout can only be 0.0: always 0, or the ratio of two passes would be wrong"),
    ("--normalization LayerNorm", "flag --normalization can only be RMSNorm: the architecture says it"),
    ("--dynamic-sampling-filter-path slime.a.b", "flag --dynamic-sampling-filter-path names slime.a.b, which rlmono does not ship; "
                                                 "it ships: rlmono.rollout.filters.check_reward_nonzero_std, rlmono.rollout.filters.pop_first"),
    ("--env-file", "flag --env-file needs the path of a file"),
])
def test_wrong_flag(small: Callable[..., Config], flags: str, line: str) -> None:
    assert problems(lambda: small(flags)) == [line]


def test_wrong_variable_and_stray_word(small: Callable[..., Config]) -> None:
    assert problems(lambda: small("", {"RLMONO_ROLOUT_SEED": "1", "RLMONO_LR": "x"})) == [
        "variable RLMONO_LR needs a number, but got 'x'",
        "variable RLMONO_ROLOUT_SEED is not an option; did you mean RLMONO_ROLLOUT_SEED?"]
    assert problems(lambda: resolve(["train", "--seed", "x"], {})) == [
        "'train' on the command line belongs to no option: options begin with --", "flag --seed needs a whole number, but got 'x'"]


def test_wrong_env_file(small: Callable[..., Config], tmp_path: Path) -> None:
    file = tmp_path / "recipe.env"
    file.write_text("# bad\nRLMONO_SEED\nRLMONO_LRR=1\n\nRLMONO_LR=a b\nRLMONO_SAVE=${NOWHERE}/x\nRLMONO_EPS_CLIP=-1\n")
    assert problems(lambda: small(f"--env-file {file} --env-file {tmp_path}/none.env")) == [
        f"{file}:2: is not NAME=value: 'RLMONO_SEED'",
        f"{file}:5: the value of RLMONO_LR is not one word: put it in quotes ('a b')",
        f"{file}:6: NOWHERE is not set; export it, or write ${{NOWHERE:-default}}",
        f"env file {tmp_path}/none.env cannot be read: No such file or directory",
        f"{file}:3: RLMONO_LRR is not an option; did you mean RLMONO_LR?",
        f"{file}:7: RLMONO_EPS_CLIP is -1.0, but must be at least 0"]


@pytest.mark.parametrize("flags, part", [
    ("--global-batch-size 100 --num-steps-per-rollout 2", "100 x num_steps_per_rollout 2 = 200, but rollout_batch_size 32"),
    ("--global-batch-size 100", "= 256 samples don't divide into steps of global_batch_size 100"),
    ("--num-steps-per-rollout 3", "= 256 samples don't divide into num_steps_per_rollout 3 equal steps"),
    ("--rollout-batch-size 1 --n-samples-per-prompt 6", "6 does not divide among 4 data-parallel ranks: make it a multiple of 4"),
    ("--micro-batch-size 3", "global_batch_size 256 does not divide among 4 data-parallel ranks x micro_batch_size 3"),
    ("--kl-coef 0.1 --use-kl-loss --kl-loss-coef 0.1", "kl_coef 0.1 and kl_loss_coef 0.1 would count the KL twice"),
    ("--kl-loss-coef 0.1", "kl_loss_coef 0.1 has no effect without --use-kl-loss"),
    ("--use-dynamic-batch-size", "use_dynamic_batch_size needs --max-tokens-per-gpu"),
    ("--recompute-granularity full", "recompute_granularity full needs --recompute-method and --recompute-num-layers"),
    ("--rollout-num-gpus 8", "rollout_num_gpus 8 contradicts colocate"),
    ("--rollout-num-gpus-per-engine 8", "4 serving devices don't divide into engines of rollout_num_gpus_per_engine 8"),
    ("--no-colocate", "without --colocate, give --actor-num-gpus-per-node"),
    ("--actor-num-gpus-per-node 24 --tensor-model-parallel-size 3", "3 does not divide the model's num_attention_heads 32"),
    ("--actor-num-gpus-per-node 16 --tensor-model-parallel-size 16", "16 does not divide the model's num_query_groups 8"),
    ("--tensor-model-parallel-size 8", "4 training devices are no multiple of tensor 8"),
    ("--actor-num-gpus-per-node 12 --rollout-num-gpus-per-engine 12", "attention over 12 devices does not divide the model's 32 heads"),
    ("--pipeline-model-parallel-size 4 --decoder-last-pipeline-num-layers 5", "31 layers don't divide into 3 equal stages"),
    ("--pipeline-model-parallel-size 4 --virtual-pipeline-model-parallel-size 2", "2 does not divide the 9 layers of a pipeline stage"),
    ("--virtual-pipeline-model-parallel-size 2", "virtual_pipeline_model_parallel_size 2 needs pipeline_model_parallel_size above 1"),
    ("--pipeline-model-parallel-size 2 --virtual-pipeline-model-parallel-size 2 --micro-batch-size 128",
     "does not divide among 2 data-parallel ranks x micro_batch_size 128 x 2 stages of a virtual pipeline: make it a multiple of 512"),
    ("--expert-model-parallel-size 2", "expert_model_parallel_size 2: the model has no experts"),
    ("--sglang-dp-size 2", "sglang dp_size 2 needs --sglang-enable-dp-attention"),
    ("--num-layers 28", "flag --num-layers: num_layers is 28, but"),
    ("--eval-interval 5", "eval_interval 5 needs --eval-prompt-data"),
    ("--eval-prompt-data a /nowhere.jsonl", "eval_prompt_data /nowhere.jsonl: there is no such file"),
    ("--debug-train-only", "debug_train_only needs --load-debug-rollout-data"),
    ("--debug-rollout-only --load-debug-rollout-data a{{rollout_id}}", "leave one of the two out"),
    ("--save-debug-rollout-data a.jsonl", "save_debug_rollout_data a.jsonl: each rollout would overwrite the one before"),
    ("--save-debug-rollout-data {{rollout}}.jsonl", "save_debug_rollout_data {rollout}.jsonl: only {rollout_id} can be filled in"),
    ("--load-debug-rollout-data {{rollout_id", "load_debug_rollout_data {rollout_id: only {rollout_id} can be filled in"),
    ("--prompt-data-weights 1 2", "prompt_data_weights 1.0 2.0 has 2 value(s) for 1 --prompt-data: give one for each"),
    ("--prompt-data-weights 0", "prompt_data_weights 0.0: each must be above 0"),
    ("--prompt-data /nowhere.jsonl@[0:5]", "prompt_data /nowhere.jsonl@[0:5]: there is no such file"),
    ("--prompt-data /nowhere.jsonl@[a:b]", "/nowhere.jsonl@[a:b]: there is no such file; a slice is written path@[start:end]"),
    ("--ref-load /nowhere", "ref_load /nowhere does not exist"),
    ("--hf-checkpoint /nowhere", "flag --hf-checkpoint: /nowhere is not a folder; download the model first"),
    ("--over-sampling-batch-size 8", "over_sampling_batch_size 8 is below rollout_batch_size 32"),
    ("--custom-rm-path reward", "custom_rm_path reward is not of the form module.function or file.py:function"),
    ("--custom-rm-path no_such_module.f", "there is no module no_such_module here"),
    ("--custom-rm-path /nowhere.py:f", "there is no file /nowhere.py"),
    (f"--custom-rm-path {quickstart.__file__}:rewards", "quickstart.py has no 'rewards'; near: reward (flag --custom-rm-path)"),
    ("--save-interval 5", "save_interval 5 needs --save (flag --save-interval)"),
    ("--rollout-max-context-len 50000", "rollout_max_context_len 50000 is above the model's max_position_embeddings 40960"),
    ("--rollout-max-response-len 40960", "rollout_max_response_len 40960 leaves no room for a prompt"),
    ("--min-lr 1", "min_lr 1 is above lr 1e-06"),
    ("--rm-type remote_rm", "rm_type remote_rm needs --rm-url"), ("--rm-url host:80", "rm_url host:80 is not an http:// or https:// address"),
    ("--rm-type dapo", "rm_type dapo returns a dict: name the key of its number with --reward-key score"),
    ("--rm-type boxed_dapo --reward-key points", "reward_key points: rm_type boxed_dapo has score and acc"),
    ("--rm-type dapo --reward-key score --eval-reward-key pred", "eval_reward_key pred: rm_type dapo has score and acc"),
    ("--rm-type maths", "must be one of deepscaler, dapo, math, f1, gpqa, ifbench, remote_rm, random, boxed_deepscaler"),
])
def test_contradictions(small: Callable[..., Config], flags: str, part: str) -> None:
    assert len([line for line in problems(lambda: small(flags)) if part in line]) == 1


def test_debugging_leaves_out_what_is_not_needed(small: Callable[..., Config], root: Path) -> None:
    sets = f"--eval-prompt-data {root}/aime-2024/aime-2024.jsonl --eval-interval 1"
    c = small(f"--load-debug-rollout-data saved/{{{{rollout_id}}}} {sets}", without="--prompt-data --rm-type --label-key")
    assert c.debug_train_only and c.eval_prompt_data is None and c.eval_interval is None and "evaluation is ignored: nothing generates" in c.notes
    c = small(f"--debug-rollout-only --save s --save-interval 1 --load l {sets}")
    assert (c.save, c.save_interval, c.load) == (None, None, None) and c.eval_prompt_data
    assert any("weights are those of hf_checkpoint" in note for note in c.notes)


@pytest.mark.parametrize("without, part", [
    ("--hf-checkpoint", "--hf-checkpoint is required"), ("--num-rollout", "--num-rollout or --num-epoch is required"),
    ("--prompt-data", "--prompt-data is required"), ("--label-key", "rm_type deepscaler compares with a label"),
    ("--rm-type --label-key", "no reward: give --rm-type or --custom-rm-path")])
def test_required(small: Callable[..., Config], without: str, part: str) -> None:
    found = problems(lambda: small(without=without))
    assert len(found) == 1 and part in found[0]


def test_all_contradictions_come_at_once(small: Callable[..., Config]) -> None:
    flags, environ = "--save-interval 5 --eval-interval 2 --global-batch-size 100", {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}
    assert len(problems(lambda: small(flags, environ))) == 4


def test_the_prompts_may_name_their_reward(small: Callable[..., Config], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('\n{"input": "1", "metadata": {"rm_type": "math"}}\n')
    assert small(f"--prompt-data {rows}", without="--rm-type --label-key").rm_type is None


@pytest.mark.parametrize("flags, without", [
    ("--rm-type gpqa", "--label-key"), ("--rm-type ifbench", "--label-key"), ("--rm-type random", "--label-key"),
    ("--rm-type remote_rm --rm-url http://judge:80/score", "--label-key"), ("--custom-rm-path json.loads --rm-type dapo", "--label-key"),
    ("--custom-generate-function-path json.loads", "--rm-type --label-key"), ("--rm-type dapo --reward-key acc --eval-reward-key score", "")])
def test_rewards_that_need_no_label(small: Callable[..., Config], flags: str, without: str) -> None:
    assert small(flags, without=without).reward_timeout_s == 30.0


def test_group_rewards_are_a_users_own(small: Callable[..., Config]) -> None:
    assert any("group_rm is for functions of --custom-rm-path" in note for note in small("--group-rm").notes)
    assert not any("group_rm" in note for note in small("--group-rm --custom-rm-path json.loads").notes)


def test_sft_needs_neither_reward_nor_engines(small: Callable[..., Config]) -> None:
    assert small("--loss-type sft --no-colocate", without="--rm-type --label-key").loss_type == "sft"


def test_remarks(small: Callable[..., Config]) -> None:
    c = small("--rollout-top-p 0.9 --rollout-top-k 5 --sequence-parallel --num-epoch 2 --n-samples-per-prompt 1")
    assert not c.sequence_parallel and c.origin["sequence_parallel"] == "derived"
    text = "\n".join(c.notes)
    for part in ("warning: rollout_top_p 0.9", "warning: rollout_top_k 5", "sequence_parallel is off",
                 "num_rollout 3 wins over num_epoch 2", "warning: n_samples_per_prompt 1"):
        assert part in text


@pytest.mark.parametrize("flags, device, installed, why", [
    ("--transformer-impl local", "cuda", True, "--transformer-impl local"),
    ("--dtype float32", "cuda", True, "Transformer Engine's attention computes in bfloat16"),
    ("--deterministic", "cuda", True, "Transformer Engine's attention is not --deterministic"),
    ("", "cuda", False, "Transformer Engine is not installed"),
    ("", "cpu", True, "Transformer Engine needs a GPU"),
    ("", "cuda", True, ""),
])
def test_whose_kernels_train(small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, flags: str, device: str, installed: bool,
                             why: str) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: name if installed else None)
    assert kernels.why_local(small(flags), device) == why
    told = on_device(small(flags), device).notes
    if device == "cuda":
        assert told[-1] == (f"the trainer's attention and norms are rlmono's own: {why}" if why else
                            "the trainer's attention and norms are Transformer Engine's")
    if why and "local" not in flags:
        asked = small(f"{flags} --transformer-impl transformer_engine")
        assert problems(lambda: on_device(asked, device)) == [
            f"transformer_impl transformer_engine is not possible: {why}; use auto or local (flag --transformer-impl)"]


def test_what_is_left_to_our_own_attention() -> None:
    c = Config(context_parallel_size=2, model={"multi_latent_attention": True})
    assert kernels.note(c).startswith("the trainer's attention and norms are rlmono's own: Transformer Engine is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "find_spec", lambda name: name)
        assert kernels.note(c) == ("the trainer's norms (attention is rlmono's own: context parallelism and multi-latent attention) "
                                   "are Transformer Engine's")


@pytest.mark.parametrize("content, part", [(None, "has no config.json"), ("{", "is not JSON"), ("[]", "must hold a JSON object")])
def test_malformed_hf_folder(small: Callable[..., Config], tmp_path: Path, content: Optional[str], part: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if content is not None:
        (folder / "config.json").write_text(content)
    found = problems(lambda: small(f"--hf-checkpoint {folder}"))
    assert len(found) == 1 and part in found[0] and str(folder) in found[0]


def test_unknown_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GemmaForCausalLM"]}')
    found = problems(lambda: resolve(["--hf-checkpoint", str(tmp_path)], {}))
    assert found == [f"flag --hf-checkpoint: {tmp_path}: architecture 'GemmaForCausalLM' is not known; "
                     f"known: {', '.join(sorted(registry.FAMILIES))}"]


def test_missing_packages_matter_only_where_their_names_are_given(small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    names = (foreign.sglang_names, foreign.megatron_names)
    for cached in names:
        cached.cache_clear()
    monkeypatch.setattr(foreign.importlib.util, "find_spec", lambda name: None)
    try:
        assert small().seed == 1234
        assert problems(lambda: small("--sglang-dp-size 2 --moe-aux-loss-coeff 0")) == [
            "flag --sglang-dp-size cannot be checked: sglang is not installed in this environment",
            "flag --moe-aux-loss-coeff cannot be checked: megatron is not installed in this environment"]
    finally:
        for cached in names:
            cached.cache_clear()


def test_every_later_option_is_refused_by_name() -> None:
    for field, option in options(Config):
        given: Any = None
        if option.later:
            given = {"bool": True, "int": 3, "str": "x"}[kind_of(str(field.type)).base]
        elif option.later_above:
            given = int(option.later_above[0]) + 1
        elif option.later_choices:
            given = next(iter(option.later_choices))
        if given is not None:
            found = unsupported(dataclasses.replace(Config(), **{field.name: given}))
            assert len(found) == 1 and found[0].startswith(f"--{field.name.replace('_', '-')} ") and found[0].endswith("comes later")
    assert unsupported(Config()) == []


# Arithmetic, pages

def test_batch_arithmetic() -> None:
    plan = batch_arithmetic(Config(rollout_batch_size=128, n_samples_per_prompt=8, num_steps_per_rollout=4), dp=8)
    assert (plan.samples_per_rollout, plan.steps, plan.global_batch_size, plan.samples_per_rank) == (1024, 4, 256, 32)
    assert plan.lines() == ["rollout: 128 prompts x 8 samples = 1024 samples", "steps:   1024 samples = 4 step(s) x 256 samples",
                            "ranks:   256 samples a step = 8 data-parallel rank(s) x 32 samples"]
    assert batch_arithmetic(Config(rollout_batch_size=4, n_samples_per_prompt=4, global_batch_size=8), dp=1).steps == 2


def test_dry_run_prints_and_writes(root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    c = resolve(seeds.words(seeds.QWEN3_4B_DYNAMIC_SAMPLING, root) + ["--run-dir", f"{tmp_path}/run", "--wandb-name", "[x]"], {})
    dry_run(c)
    text = capsys.readouterr().out
    for part in ("8 train (dp 4 x tp 2 x pp 1 x cp 1); 4 engine(s) of 2", "rank 8    node 0   host, controller",
                 "32 prompts x 8 samples = 256 samples", "4 data-parallel rank(s) x 64 samples",
                 "Dry run: nothing was started"):
        assert part in text
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["over_sampling_batch_size"] == {"value": 64, "source": "flag --over-sampling-batch-size"}
    assert written["sglang.mem_fraction_static"]["value"] == 0.7 and written["seed"] == {"value": 1234, "source": "default"}
    assert set(written) >= {field.name for section in SECTIONS for field in dataclasses.fields(section)}
    page = (tmp_path / "run" / "dry-run.txt").read_text()
    assert page in text and "[x]" in page and "\\[" not in page


def test_values_that_were_given_stand_out() -> None:
    out = io.StringIO()
    show_config(dataclasses.replace(Config(seed=7), origin={"seed": "flag --seed"}), out)
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["*", "seed", "7", "flag", "--seed"] in lines and ["device", "auto", "default"] in lines


def test_options_page_is_current() -> None:
    assert docs.main(["--check"]) == 0
    assert all(f"`--{field.name.replace('_', '-')}`" in docs.page() for field, _ in options(Config))


def test_every_option_says_what_it_means_and_can_be_written() -> None:
    for field, option in options(Config):
        assert option.help.endswith("."), field.name
        assert kind_of(str(field.type)).base != "none", field.name


@pytest.mark.parametrize("annotation, words, value", [
    ("A[Optional[List[int]], Arg(help='x')]", ["1", "2"], (1, 2)), ("Optional[int]", [""], None), ("bool", [], True),
    ("Union[float, List[float]]", ["0.5"], 0.5), ("Union[float, List[float]]", ["0.5", "1"], (0.5, 1.0)),
    ("Optional[Dict[str, Any]]", ['{"a": 1}'], {"a": 1}), ("Literal[1, 2]", ["2"], 2)])
def test_kinds(annotation: str, words: list[str], value: Any) -> None:
    assert parse(kind_of(annotation), words) == value


def test_kind_of_what_cannot_be_written() -> None:
    for annotation in ("torch.dtype", "Optional[Callable]", "AttnBackend"):
        with pytest.raises(ValueError, match="cannot be written as text"):
            parse(kind_of(annotation), ["x"])


def test_the_room_imports_neither_torch_nor_what_it_reads() -> None:
    code = ("import sys, rlmono.config.show, rlmono.config.sources, rlmono.config.docs; from rlmono.config.names import find\n"
            "find('sglang_dp_size'), find('moe_grouped_gemm')\n"
            "print([m for m in ('torch', 'sglang', 'megatron', 'transformers') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_help_lists_options_and_finds_them_by_a_part_of_the_name(capsys: pytest.CaptureFixture[str]) -> None:
    from rlmono.loop.start import train
    assert train(["--help"]) == 0
    everything = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in everything for section in SECTIONS for field in dataclasses.fields(section))
    assert train(["--colocate", "--help", "--overlong-buffer"]) == 0
    found = capsys.readouterr().out
    assert "--overlong-buffer-len int" in found and "--lr " not in found
