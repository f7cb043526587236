"""What ranks say to each other: msgspec structs, tagged by name, as msgpack. Never pickle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Optional, Union

import msgspec

from rlmono.data.numbers import Listed
from rlmono.data.sample import Sample


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How to sample one response. `seed` makes the tokens independent of what else is in the batch."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: Optional[int] = None
    stop: tuple[str, ...] = ()
    """Strings that end the response; their tokens are its last."""


class Generate(msgspec.Struct, tag=True):
    """Host to engine: one request. `rid`s have one fixed length: SGLang matches them by prefix."""

    rid: str
    input_ids: list[int]
    sampling: Sampling


class Abort(msgspec.Struct, tag=True):
    """Host to engine: end this request, or all (`rid` empty); each still answers, with what it has."""

    rid: str = ""


class EndPhase(msgspec.Struct, tag=True):
    """Host to engine: leave `serve`. Sent only after every request has answered."""


class _StoredOutput(msgspec.Struct):
    """What an Output holds, and how it travels: the numbers as lists, or as bytes."""

    rid: str
    output_ids: Union[list[int], bytes]
    log_probs: Union[list[float], bytes]
    finish: str
    weight_version: int
    cached_tokens: int = 0
    error: str = ""
    text: Optional[str] = None


class Output(_StoredOutput, tag=True):
    """Engine to host: a finished request. `log_probs` has one entry a token of `output_ids`; `finish` is stop, length or abort;
    `error` says why the engine refused it, and is empty otherwise. `text` is that of `output_ids`; None where the host has to decode it.
    The numbers are lists to whoever reads them, see `Listed`."""

    output_ids = Listed[list[int]]("i", _StoredOutput.output_ids)
    log_probs = Listed[list[float]]("f", _StoredOutput.log_probs)

    def __post_init__(self) -> None:
        Output.output_ids.check(self)
        Output.log_probs.check(self)

    @property
    def length(self) -> int:
        """Tokens that were generated."""
        return Output.output_ids.count(self)


class Outputs(msgspec.Struct, tag=True):
    """Engine to host: what finished in one scheduler step, or a part of it."""

    items: list[Output]


PART_BYTES = 64 << 10


def in_parts(outputs: Iterable[Output]) -> Iterator[Outputs]:
    """In messages of PART_BYTES or a little more: the host is at work on the first long response while the engine makes the text of the next."""
    items, size = list[Output](), 0
    for output in outputs:
        items.append(output)
        size += 8 * output.length + len(output.text or "")
        if size >= PART_BYTES:
            yield Outputs(items)
            items, size = [], 0
    if items:
        yield Outputs(items)


class TrainSample(msgspec.Struct):
    """One sample for the trainer. Arrays travel as bytes: tokens int32, the others one entry a response token,
    `loss_mask` uint8 and `rollout_log_probs` float32 (empty in SFT)."""

    index: int
    group_index: int
    reward: float
    tokens: bytes
    response_length: int
    loss_mask: bytes
    rollout_log_probs: bytes


class TrainStep(msgspec.Struct):
    """One optimizer step of one data-parallel rank: its packs, and the step's denominators over all ranks."""

    packs: list[list[TrainSample]]
    samples: int
    tokens: int


class TrainBatch(msgspec.Struct, tag=True):
    """Controller to trainer: a rollout, as this data-parallel rank trains on it.

    `rewards` is (group, index, reward) of every sample of the rollout.
    """

    rollout_id: int
    steps: list[TrainStep]
    rewards: list[tuple[int, int, float]]


class Report(msgspec.Struct, tag=True):
    """Device rank to controller: something is done. `kind` is ready, trained, saved, updated or served."""

    kind: str
    rollout_id: int
    data: dict[str, Any] = {}


class Failed(msgspec.Struct, tag=True):
    """Any rank to the controller: this rank is about to die of this."""

    error: str


class RunGroup(msgspec.Struct, tag=True):
    """Controller to a node's host: generate and reward the samples of one prompt, all on one engine."""

    job: int
    engine: int
    samples: list[Sample]
    sampling: Sampling
    evaluation: bool


class Failure(msgspec.Struct):
    """A sample that came to nothing: its outcome by name, and why."""

    index: int
    outcome: str
    detail: str


class GroupDone(msgspec.Struct, tag=True):
    """A node's host to the controller: the group's samples and what became of the others, or the error that ended it.

    `strays` counts answers of its engine that nobody waited for, since the last group: late, twice, unknown; and those that never came.
    Of its engine, at this moment: `tokens` are those that it has generated since it was last told, `idle_s` is how long it has had nothing
    to do (0 while it has), and `slack_s` how long less than at its best of this phase. Durations, as clocks of nodes differ.
    """

    job: int
    samples: list[Sample]
    error: str = ""
    seconds: float = 0.0
    failures: list[Failure] = []
    strays: dict[str, int] = {}
    tokens: int = 0
    idle_s: float = 0.0
    slack_s: float = 0.0


class AbortGroups(msgspec.Struct, tag=True):
    """Controller to a node's host: all groups that run there answer now, with what they have."""


class Relay(msgspec.Struct, tag=True):
    """Between hosts: a message to (controller to host) or from (host to controller) a device rank of that node, undecoded."""

    rank: int
    payload: msgspec.Raw


class Goodbye(msgspec.Struct, tag=True):
    """Controller to the other hosts: the run is over; with `error`, because it failed."""

    error: str = ""


class Heartbeat(msgspec.Struct, tag=True):
    """Between hosts, and engine to host while it serves: still here."""


Message = Union[Generate, Abort, EndPhase, Outputs, TrainBatch, Report, Failed, RunGroup, GroupDone, AbortGroups, Relay, Goodbye, Heartbeat]


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(payload: bytes) -> Message:
    """Raises msgspec.DecodeError for anything that is not one of ours."""
    return _decoder.decode(payload)
