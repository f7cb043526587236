"""The run's prompts: groups for rollouts in their order, groups for evaluation, and how long the run is."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, Iterator, Sequence

from rlmono.config.evals import EvalSet, eval_sets
from rlmono.config.schema import Config
from rlmono.data.cursor import DataCursor
from rlmono.data.mixture import MixedCursor, Mixture
from rlmono.data.prompts import Source, open_source
from rlmono.data.rows import DataError, Prompt, Rules
from rlmono.data.sample import COMPLETED, Group, Sample
from rlmono.data.tokenizer import Tokenizer
from rlmono.rewards import check_prompt, label_required
from rlmono.rollout.buffer import DataBuffer
from rlmono.rollout.schedule import steps_per_rollout

BUFFER = "buffer.msgpack"
"""The data buffer's file in a checkpoint."""


class Prompts:
    """Sources and cursor. Building it reads and checks every prompt file. Raises DataError or TokenizerError with file and line."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        rules = Rules(config.input_key, config.label_key, config.metadata_key, config.tool_key,
                      length_limit=config.rollout_max_prompt_len, length_of=self._length, **self._judged(config))
        sources = [open_source(path, rules, config.lazy_data_above_mb * 10**6) for path in config.prompt_data or ()]
        order: dict[str, Any] = dict(seed=config.rollout_seed, shuffle=config.rollout_shuffle, samples_per_prompt=config.n_samples_per_prompt)
        self.source: Source | Mixture = sources[0] if len(sources) == 1 else Mixture(sources, config.prompt_data_weights)
        self.cursor = MixedCursor(self.source, **order) if isinstance(self.source, Mixture) else DataCursor(self.source, **order)
        self.buffer = DataBuffer(config)
        self.eval_sets = [(s, self._eval_source(s)) for s in eval_sets(config)]

    def _eval_source(self, s: EvalSet) -> Source:
        """An evaluation goes through all rows, and in order: they are checked at start, whatever the size."""
        rules = Rules(s.input_key, s.label_key, s.metadata_key, s.tool_key, **self._judged(s.config(self.config), s.rm_type is not None))
        return open_source(s.path, rules, sys.maxsize)

    def _judged(self, config: Config, all_alike: bool = False) -> dict[str, Any]:
        """What its reward asks of a prompt; `all_alike`: of every prompt, whatever its metadata names."""
        if config.loss_type == "sft":
            return {"skip_bad_rows": config.skip_bad_rows}
        return {"skip_bad_rows": config.skip_bad_rows, "label_required": label_required(config),
                "check": lambda prompt: check_prompt(config, prompt.label, {**prompt.metadata, "rm_type": None} if all_alike else prompt.metadata)}

    def _length(self, prompt: Prompt) -> int:
        tokens = self._prompt_tokens(prompt)
        if not tokens:
            raise DataError("the prompt tokenises to nothing")
        return len(tokens)

    def _prompt_tokens(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.render(prompt.prompt, prompt.tools, self.config.apply_chat_template)

    @property
    def num_rollout(self) -> int:
        """--num-rollout, else as many as --num-epoch needs."""
        c = self.config
        if c.num_rollout is not None:
            return c.num_rollout
        assert c.num_epoch is not None
        return math.ceil(c.num_epoch * len(self.source) / c.rollout_batch_size)

    @property
    def steps_per_rollout(self) -> int:
        return steps_per_rollout(self.config)

    # ------------------------------------------------------------ groups

    def next_groups(self, rollout_id: int, n: int) -> list[Group]:
        """n groups for a rollout: first what is in the data buffer, then new ones, numbered over the whole run; in SFT with the data's own
        answers as responses."""
        out = self.buffer.take(rollout_id, n)
        group, sample = self.cursor.groups, self.cursor.samples
        for row in self.cursor.next(n - len(out)):
            out.append(self._group(self.source, row, group, sample, self.config.n_samples_per_prompt))
            group, sample = group + 1, sample + self.config.n_samples_per_prompt
        return out

    def give_back(self, groups: Sequence[Group]) -> None:
        """Groups that were given out and have not counted; they are the first to be given out again."""
        self.buffer.put(groups)

    def eval_groups(self) -> Iterator[tuple[EvalSet, list[Group]]]:
        """Each eval set with its groups; the same numbers every time, so that the same seeds are drawn."""
        for s, source in self.eval_sets:
            n = s.n_samples_per_eval_prompt
            groups = [self._group(source, row, row, row * n, n) for row in range(len(source))]
            for sample in (sample for group in groups for sample in group):
                sample.metadata |= s.metadata_overrides
                sample.rm_type, sample.custom_rm_path, sample.reward_key = s.rm_type, s.custom_rm_path, s.reward_key
                sample.generate_function_path = s.custom_generate_function_path
            yield s, groups

    def _group(self, source: Source | Mixture, row: Any, group: int, sample: int, n: int) -> Group:
        prompt = source.row(row)
        try:
            if self.config.loss_type == "sft":
                return [self._conversation(prompt, group, sample)]
            tokens = self._prompt_tokens(prompt)       # of none, or too many: the host counts such a sample as failed
        except ValueError as e:
            raise DataError(f"{prompt.where}: {e}") from e
        return [Sample(index=sample + i, group_index=group, prompt=prompt.prompt, tokens=list(tokens), label=prompt.label,
                       metadata={"source": prompt.where, **prompt.metadata}, tools=prompt.tools) for i in range(n)]

    def _conversation(self, prompt: Prompt, group: int, sample: int) -> Sample:
        """A row of SFT data: what comes from the first learned token on is the response."""
        if isinstance(prompt.prompt, str):
            raise DataError("SFT needs conversations: a list of messages with the assistant's answers, not a string")
        ids, mask = self.tokenizer.chat_with_mask(prompt.prompt, prompt.tools)
        longest = self.config.rollout_max_context_len or self.config.model["max_position_embeddings"]
        if len(ids) > longest:
            raise DataError(f"the conversation has {len(ids)} tokens, and the context ends at {longest}")
        first = mask.index(1)
        return Sample(index=sample, group_index=group, prompt=prompt.prompt, tokens=ids, response_length=len(ids) - first,
                      response=self.tokenizer.decode(ids[first:]), loss_mask=mask[first:], status=COMPLETED)

    def left_out(self) -> dict[str, float]:
        """data/*: rows that were left out when their turn came, since the run began."""
        return {f"data/{reason}": float(n) for reason, n in self.cursor.left_out.items()}

    # ------------------------------------------------------------ checkpoint

    def state(self, next_rollout: int) -> dict[str, Any]:
        """What state.json keeps of the data: everything before `next_rollout` has been given out, and what came back is in the buffer."""
        return {"next_rollout": next_rollout, "cursor": self.cursor.state(), "buffer": self.buffer.state()}

    def files(self) -> dict[str, bytes]:
        """What a checkpoint keeps beside it, by file name."""
        return {BUFFER: self.buffer.dump()}

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Go on where a checkpoint in `folder` was written. Raises ValueError for one that does not fit this run."""
        if "cursor" not in state:
            raise DataError(f"the checkpoint comes from a run on saved rollouts ({state.get('rollouts')}), which has no place in the prompt data: "
                            "start over the data with --finetune")
        self.cursor.restore(state["cursor"])
        self.buffer.restore(state["buffer"], (folder / BUFFER).read_bytes())
