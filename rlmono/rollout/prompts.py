"""The run's prompts: groups for rollouts in their order, groups for evaluation, and how long the run is."""

from __future__ import annotations

import math
import sys
from typing import Any, Iterator, Optional

from rlmono.config.schema import Config
from rlmono.data.cursor import DataCursor
from rlmono.data.mixture import MixedCursor, Mixture
from rlmono.data.prompts import Source, open_source
from rlmono.data.rows import DataError, Prompt, Rules
from rlmono.data.sample import COMPLETED, Group, Sample
from rlmono.data.tokenizer import Tokenizer
from rlmono.rewards import check_prompt, label_required


class Prompts:
    """Sources and cursor. Building it reads and checks every prompt file. Raises DataError or TokenizerError with file and line."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        sources = [self._source(path, config.input_key, config.label_key, limited=True) for path in config.prompt_data or ()]
        order: dict[str, Any] = dict(seed=config.rollout_seed, shuffle=config.rollout_shuffle, samples_per_prompt=config.n_samples_per_prompt)
        self.source: Source | Mixture = sources[0] if len(sources) == 1 else Mixture(sources, config.prompt_data_weights)
        self.cursor = MixedCursor(self.source, **order) if isinstance(self.source, Mixture) else DataCursor(self.source, **order)
        names = config.eval_prompt_data or ()
        input_key, label_key = config.eval_input_key or config.input_key, config.eval_label_key or config.label_key
        self.eval_sources = {name: self._source(path, input_key, label_key, limited=False)
                             for name, path in zip(names[::2], names[1::2], strict=True)}

    def _source(self, path: str, input_key: str, label_key: Optional[str], limited: bool) -> Source:
        c = self.config
        sft = c.loss_type == "sft"
        limit = c.rollout_max_prompt_len if limited else None
        rules = Rules(input_key=input_key, label_key=label_key, metadata_key=c.metadata_key, tool_key=c.tool_key,
                      label_required=not sft and label_required(c), skip_bad_rows=c.skip_bad_rows,
                      check=None if sft else lambda prompt: check_prompt(c, prompt.label, prompt.metadata),
                      length_limit=limit, length_of=self._length)
        # An evaluation goes through all rows, and in order: they are checked at start whatever the size.
        return open_source(path, rules, c.lazy_data_above_mb * 10**6) if limited else open_source(path, rules, sys.maxsize)

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
        c = self.config
        if c.num_steps_per_rollout is not None:
            return c.num_steps_per_rollout
        return c.rollout_batch_size * c.n_samples_per_prompt // c.global_batch_size if c.global_batch_size else 1

    # ------------------------------------------------------------ groups

    def next_groups(self) -> list[Group]:
        """The next rollout's groups, numbered over the whole run; in SFT with the data's own answers as responses."""
        group, sample = self.cursor.groups, self.cursor.samples
        out = []
        for row in self.cursor.next(self.config.rollout_batch_size):
            out.append(self._group(self.source, row, group, sample, self.config.n_samples_per_prompt))
            group, sample = group + 1, sample + self.config.n_samples_per_prompt
        return out

    def eval_groups(self) -> Iterator[tuple[str, list[Group]]]:
        """(name, groups) of each eval set; the same numbers every time, so that the same seeds are drawn."""
        n = self.config.n_samples_per_eval_prompt
        for name, source in self.eval_sources.items():
            groups = [self._group(source, row, row, row * n, n) for row in range(len(source))]
            for sample in (sample for group in groups for sample in group):
                sample.reward_key = self.config.eval_reward_key
            yield name, groups

    def _group(self, source: Source | Mixture, row: Any, group: int, sample: int, n: int) -> Group:
        prompt = source.row(row)
        try:
            if self.config.loss_type == "sft":
                return [self._conversation(prompt, group, sample)]
            tokens = self._prompt_tokens(prompt)       # of none, or too many: the host counts such a sample as failed
        except ValueError as e:
            raise DataError(f"{prompt.where}: {e}") from e
        return [Sample(index=sample + i, group_index=group, prompt=prompt.prompt, tokens=list(tokens), label=prompt.label,
                       metadata={**prompt.metadata, "source": prompt.where}, tools=prompt.tools) for i in range(n)]

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
        """What a checkpoint keeps of the data: everything before `next_rollout` has been given out."""
        return {"next_rollout": next_rollout, "cursor": self.cursor.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.cursor.restore(state["cursor"])
