r"""A task that a CPU learns in minutes: two-digit addition, where RL finds that showing the working pays.

    python -m rlmono.quickstart make DIR [--seed N]

writes DIR/model (a Qwen3 of one layer and 267k parameters, with a character tokenizer), and jsonl data: sft, train, eval, and
shuffled (train with labels that are all wrong, as a control). `sft.jsonl` is in training order: 1600 steps of 16 worked
demonstrations `50+12=\boxed{62}`, then 200 steps of a mix of which 70 % are quick estimates `\boxed{50}`, nearly always
wrong. So supervised fine-tuning teaches the skill, and RL on `reward` selects the behaviour that uses it.

    python -m rlmono.quickstart result RUN_DIR

prints what that came to: the held-out accuracy before and after a GRPO run. Reward: `rlmono.quickstart.reward`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from rlmono.data.sample import Sample

# Third-party packages are imported inside functions: reward workers import this module.

FORMAT = 3
"""Of what `make` writes; another one is not taken for made already."""

PAD, USER, END, ASSISTANT, BOXED = "<pad>", "<|user|>", "<|end|>", "<|assistant|>", "\\boxed{"
CHARACTERS = [*"0123456789", *" +-*/=(){}.,?\n", *"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['ROLES'] %}"
    "{{ raise_exception('the roles of this template are ALL_ROLES, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Language:
    """A tokenizer of characters in which the template's marks, and these words, are one token each."""

    roles: tuple[str, ...] = ("user", "assistant")
    words: tuple[str, ...] = (BOXED,)

    @property
    def marks(self) -> tuple[str, ...]:
        return PAD, USER, END, ASSISTANT, *(f"<|{role}|>" for role in self.roles[2:])

    @property
    def vocabulary(self) -> list[str]:
        return [*self.marks, *self.words, *CHARACTERS]

    @property
    def template(self) -> str:
        others = ", ".join(self.roles[:-1])
        return CHAT_TEMPLATE.replace("ALL_ROLES", f"{others} and {self.roles[-1]}").replace("ROLES", "', '".join(self.roles))


ADDITION = Language()
VOCABULARY = ADDITION.vocabulary
MODEL: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "float32",
    "vocab_size": len(VOCABULARY), "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": 512, "max_window_layers": 1,
    "attention_bias": False, "attention_dropout": 0.0, "use_sliding_window": False, "sliding_window": None, "use_cache": True,
    "tie_word_embeddings": False,
    "initializer_range": 0.06,      # 0.02, the usual, learns far slower
    "bos_token_id": None, "eos_token_id": VOCABULARY.index(END), "pad_token_id": VOCABULARY.index(PAD),
}

LOW, HIGH = 10, 49
HELD_OUT = 200
SFT_BATCH, WORKED_STEPS, MIX_STEPS, MIX_WORKED_SHARE = 16, 1600, 200, 0.3

Problem = tuple[int, int]


def reward(args: Any, sample: Sample, **kwargs: Any) -> float:
    r"""1 when the last `\boxed{…}` is the label and the response ends its turn, else 0. (Without the second, a policy can drift
    to never stopping.)"""
    answers = re.findall(r"\\boxed\{(-?\d+)\}", sample.response)
    return float(bool(answers) and answers[-1] == str(sample.label) and sample.response.endswith(END))


def make(folder: Path, seed: int = 0, write: Callable[[Path, int], None] | None = None, **about: Any) -> bool:
    """Writes model and data to `folder`, all or nothing; the same bytes for the same seed. `write` makes those of another task, which `about` names.

    False when they are there already. ValueError when something else is.
    """
    made = {"format": FORMAT, "seed": seed, **about}
    note = folder / "made.json"
    if note.is_file() and json.loads(note.read_text()) == made:
        return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        found = f"data made with {note.read_text().strip()}" if note.is_file() else "something else"
        raise ValueError(f"{folder} has {found}, not {json.dumps(made)}; remove it or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        os.chmod(work, 0o755)
        (write or _write)(work, seed)
        (work / "made.json").write_text(json.dumps(made) + "\n")
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)     # what a failure left; nothing after the rename
    return True


def _write(folder: Path, seed: int) -> None:
    write_model(folder / "model", seed)
    write_data(folder, seed)


def write_data(folder: Path, seed: int) -> None:
    """sft.jsonl, train.jsonl, eval.jsonl and shuffled.jsonl; eval shares no pair of numbers with the others, in either order."""
    import numpy as np

    rng = np.random.default_rng([seed, 1])
    train, held_out = split_problems(rng)
    labels = [a + b for a, b in train]
    write_rows(folder / "sft.jsonl", sft_rows(train, rng))
    write_rows(folder / "train.jsonl", map(_question, train, labels))
    write_rows(folder / "eval.jsonl", (_question(problem, sum(problem)) for problem in held_out))
    write_rows(folder / "shuffled.jsonl", map(_question, train, wrong_labels(labels, rng)))


def split_problems(rng: np.random.Generator) -> tuple[list[Problem], list[Problem]]:
    """All ordered problems in random order, as train and held out (at least HELD_OUT), apart by unordered pair."""
    pairs = [(a, b) for a in range(LOW, HIGH + 1) for b in range(a, HIGH + 1)]
    train: list[Problem] = []
    held_out: list[Problem] = []
    for i in rng.permutation(len(pairs)).tolist():
        a, b = pairs[i]
        (held_out if len(held_out) < HELD_OUT else train).extend({(a, b), (b, a)})
    assert not {frozenset(problem) for problem in train} & {frozenset(problem) for problem in held_out}
    return shuffled(sorted(train), rng), shuffled(sorted(held_out), rng)


def sft_rows(train: Sequence[Problem], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Demonstrations in training order: worked ones, then the mix. Problems come round in a new order each time."""
    mix = MIX_STEPS * SFT_BATCH
    worked = round(mix * MIX_WORKED_SHARE)
    styles = [True] * (WORKED_STEPS * SFT_BATCH) + shuffled([True] * worked + [False] * (mix - worked), rng)
    for problem, is_worked in zip(rounds(train, len(styles), rng), styles, strict=True):
        answer = worked_answer(*problem) if is_worked else estimate(*problem)
        yield {"messages": [_user(problem), {"role": "assistant", "content": answer}], "label": str(sum(problem))}


def worked_answer(a: int, b: int) -> str:
    r"""Tens and units, then the total: `50+12=\boxed{62}` for 27+35."""
    tens, units = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
    return f"{tens}+{units}={BOXED}{a + b}}}"


def estimate(a: int, b: int) -> str:
    r"""Tens only: `\boxed{50}` for 27+35; right for 1 % of the problems."""
    return f"{BOXED}{a // 10 * 10 + b // 10 * 10}}}"


def wrong_labels(labels: Sequence[int], rng: np.random.Generator) -> list[int]:
    """The labels in a random order in which none is at a place where it is right."""
    wrong = shuffled(labels, rng)
    for i, label in enumerate(labels):
        while wrong[i] == label:
            j = int(rng.integers(len(labels)))
            if wrong[j] != label and labels[j] != label:
                wrong[i], wrong[j] = wrong[j], wrong[i]
    return wrong


def write_model(folder: Path, seed: int, language: Language = ADDITION) -> None:
    """An HF folder: a Qwen3 with fresh weights, normal with `initializer_range`, and its tokenizer."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, 0])
    weights = {name: np.ones(shape, np.float32) if len(shape) == 1
               else rng.normal(0.0, MODEL["initializer_range"], shape).astype(np.float32)
               for name, shape in weight_shapes(len(language.vocabulary)).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    os.chmod(folder / "model.safetensors", 0o644)       # safetensors makes it private
    _write_json(folder / "config.json", {**MODEL, "vocab_size": len(language.vocabulary)})
    _write_json(folder / "generation_config.json",
                {"do_sample": True, "temperature": 1.0, "eos_token_id": MODEL["eos_token_id"], "pad_token_id": MODEL["pad_token_id"]})
    write_tokenizer(folder, language)


def weight_shapes(vocabulary: int = len(VOCABULARY)) -> dict[str, tuple[int, ...]]:
    """HF names and shapes (out, in) of the model's weights; norms have one dimension."""
    h, f, v, d = MODEL["hidden_size"], MODEL["intermediate_size"], vocabulary, MODEL["head_dim"]
    q, kv = MODEL["num_attention_heads"] * d, MODEL["num_key_value_heads"] * d
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (h,), "self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
        "self_attn.q_norm": (d,), "self_attn.k_norm": (d,), "self_attn.o_proj": (h, q), "post_attention_layernorm": (h,),
        "mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f),
    }
    layers = {f"model.layers.{i}.{name}.weight": shape for i in range(MODEL["num_hidden_layers"]) for name, shape in layer.items()}
    return {"model.embed_tokens.weight": (v, h), **layers, "model.norm.weight": (h,), "lm_head.weight": (v, h)}


def write_tokenizer(folder: Path, language: Language = ADDITION) -> None:
    """The language's tokenizer, in the files that AutoTokenizer loads."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers  # type: ignore[import-untyped]

    # An unknown token that is not in the vocabulary: a character outside of it is an error, not a guess.
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(language.vocabulary)}, unk_token="<unknown character>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in language.marks])
    tokenizer.add_tokens([AddedToken(word, normalized=False, special=False) for word in language.words])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD, "clean_up_tokenization_spaces": False,
        "additional_special_tokens": [USER, *language.marks[3:]], "model_max_length": MODEL["max_position_embeddings"],
        "chat_template": language.template})


def _user(problem: Problem) -> dict[str, str]:
    return {"role": "user", "content": f"{problem[0]}+{problem[1]}"}


def _question(problem: Problem, label: int) -> dict[str, Any]:
    return {"messages": [_user(problem)], "label": str(label)}


def shuffled(items: Sequence[Any], rng: np.random.Generator) -> list[Any]:
    return [items[i] for i in rng.permutation(len(items)).tolist()]


def rounds(items: Sequence[Any], number: int, rng: np.random.Generator) -> Iterator[Any]:
    """So many of the items: all of them, again and again, each time in a new order."""
    return islice((item for _ in iter(int, 1) for item in shuffled(items, rng)), number)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def accuracies(run_dir: Path) -> list[float]:
    """Held-out accuracy at each evaluation of a run, the first before training. ValueError where there is none."""
    from rlmono.observe.metrics import read_metrics

    found = [row["eval/heldout"] for row in read_metrics(run_dir) if "eval/heldout" in row]
    if not found:
        raise ValueError(f"{run_dir} has no evaluation yet; see {run_dir}/logs")
    return found


def main(task: str = "quickstart", module: str = "rlmono.quickstart", write: Callable[[Path, int], None] | None = None) -> int:
    """The command line of a task's module; `write` makes the files of one that is not this one."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=f"The {task}'s tiny model, its data and its result.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("make", help="write model and data to a folder")
    making.add_argument("folder", type=Path)
    making.add_argument("--seed", type=int, default=0, help="of weights, split and demonstrations (default 0)")
    telling = verbs.add_parser("result", help="print the held-out accuracy before and after a GRPO run")
    telling.add_argument("run_dir", type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.verb == "result":
            values = accuracies(arguments.run_dir)
            print(f"held-out accuracy: {values[0]:.3f} before GRPO, {values[-1]:.3f} after")
            return 0
        new = make(arguments.folder, arguments.seed, write, **({"task": task} if write else {}))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.folder}: {'made' if new else 'already there'} (seed {arguments.seed})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
