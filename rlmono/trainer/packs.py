"""One micro-batch on the device: whole samples, concatenated without padding between them (THD).

Two spaces: `t` counts all tokens of the pack, `r` only response tokens, which are all that losses see. The logits at
position j speak of token j + 1, so the response token at position j is read at position j - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Sequence

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from rlmono.trainer.context import held_by
from rlmono.trainer.rope import POSITIONS
from rlmono.world.messages import TrainSample


@dataclass
class Pack:
    """Tensors of one pack. `tokens`, `positions` and `targets` are [t], or this rank's share of them with context parallelism;
    the others are [r], in the order of `samples`, on every rank."""

    samples: list[TrainSample]
    tokens: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    """The next token of each token within its own sequence; 0 where there is none."""
    params: PackedSeqParams
    bounds: list[int]
    """Cumulative lengths of the sequences, with their padding."""
    read_at: torch.Tensor
    """Position in t whose logits predict each response token."""
    masks: list[torch.Tensor]
    """Loss mask of each sample, on the CPU."""
    sample_of: torch.Tensor
    """Index into `samples` for each response token."""
    rollout_log_probs: Optional[torch.Tensor]
    weights: torch.Tensor
    advantages: torch.Tensor
    old_log_probs: Optional[torch.Tensor] = None
    ref_log_probs: Optional[torch.Tensor] = None
    teacher_log_probs: Optional[torch.Tensor] = None
    values: Optional[torch.Tensor] = None
    """The critic's, of what stands before each response token, from before the rollout's first step."""
    returns: Optional[torch.Tensor] = None

    def set_per_sample(self, values: dict[int, float]) -> None:
        """Advantages from one value a sample, by sample index."""
        per_sample = torch.tensor([values[s.index] for s in self.samples], dtype=torch.float32, device=self.tokens.device)
        self.advantages = per_sample[self.sample_of]


def make_pack(samples: Sequence[TrainSample], device: torch.device, multiple: int, cp_size: int = 1, cp_rank: int = 0) -> Pack:
    """The pack of these samples. Its length is rounded up to `multiple` by a sequence of padding that nothing reads; with
    context parallelism each sequence is, to a multiple of 2 · cp_size · multiple, and the rank gets its chunks of it."""
    sequences = [np.frombuffer(s.tokens, np.int32).astype(np.int64) for s in samples]
    assert all(s.response_length < len(x) for s, x in zip(samples, sequences, strict=True)), "a sample needs a prompt token, which predicts its first"
    ends_at = np.array([len(x) for x in sequences])         # where each sample ends within its padded sequence
    if cp_size > 1:
        sequences = [np.pad(x, (0, -len(x) % (2 * cp_size * multiple))) for x in sequences]
    elif sum(ends_at) % multiple:
        sequences.append(np.zeros(-sum(ends_at) % multiple, np.int64))
    lengths = [len(x) for x in sequences]
    bounds = [0, *np.cumsum(lengths).tolist()]
    tokens, positions = np.concatenate(sequences), np.concatenate([np.arange(n) for n in lengths])
    targets = np.concatenate([np.append(x[1:], 0) for x in sequences])
    read_at = np.concatenate([np.arange(a + n - s.response_length - 1, a + n - 1) for s, a, n in zip(samples, bounds, ends_at, strict=False)])
    sample_of = np.repeat(np.arange(len(samples)), [s.response_length for s in samples])
    rollout = b"".join(s.rollout_log_probs for s in samples)
    mine = held_by(bounds, cp_size, cp_rank).numpy() if cp_size > 1 else slice(None)
    on = lambda x: torch.from_numpy(x).to(device)  # noqa: E731 - shorter than its uses
    cu_seqlens = on(np.array(bounds, np.int32))
    setattr(cu_seqlens, POSITIONS, on(positions[mine]))
    return Pack(list(samples), on(tokens[mine]), getattr(cu_seqlens, POSITIONS), on(targets[mine]),
                PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens,
                                max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths)),
                bounds, on(read_at), [torch.from_numpy(np.frombuffer(s.loss_mask, np.uint8).astype(np.float32)) for s in samples], on(sample_of),
                on(np.frombuffer(rollout, np.float32).copy()) if rollout or not len(read_at) else None,
                torch.zeros(0, device=device), torch.zeros(len(read_at), device=device))
