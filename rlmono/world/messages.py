"""What ranks say to each other: msgspec structs, tagged by name, as msgpack. Never pickle."""

from __future__ import annotations

from typing import Any, Optional, Union, get_args

import msgspec

from rlmono.data.numbers import from_bytes, to_bytes
from rlmono.data.sample import PackedSample, Sample


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


class Output(msgspec.Struct, tag=True):
    """Engine to host: a finished request. `log_probs` has one entry a token of `output_ids`; `finish` is stop, length or abort;
    `error` says why the engine refused it, and is empty otherwise. `text` is that of `output_ids`; None where the host has to decode it."""

    rid: str
    output_ids: list[int]
    log_probs: list[float]
    finish: str
    weight_version: int
    cached_tokens: int = 0
    error: str = ""
    text: Optional[str] = None


class Outputs(msgspec.Struct, tag=True):
    """Engine to host: what finished in one scheduler step."""

    items: list[Output]


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


class PackedOutput(msgspec.Struct, array_like=True):
    """An Output as it travels: 8k numbers as bytes take the host a third of the time. Logprobs are of fp32, as the engine's are."""

    rid: str
    output_ids: bytes
    log_probs: bytes
    finish: str
    weight_version: int
    cached_tokens: int = 0
    error: str = ""
    text: Optional[str] = None

    @classmethod
    def of(cls, o: Output) -> PackedOutput:
        return cls(o.rid, to_bytes("i", o.output_ids), to_bytes("f", o.log_probs), o.finish, o.weight_version, o.cached_tokens,
                   o.error, o.text)

    def unpack(self) -> Output:
        return Output(self.rid, from_bytes("i", self.output_ids), from_bytes("f", self.log_probs), self.finish, self.weight_version,
                      self.cached_tokens, self.error, self.text)


class PackedOutputs(msgspec.Struct, tag="Outputs"):
    """Outputs as they travel; who has the bytes can send it so."""

    items: list[PackedOutput]


class _PackedGroup(msgspec.Struct, tag=True):
    """A RunGroup or GroupDone as it travels."""

    rest: Union[RunGroup, GroupDone]
    samples: list[PackedSample]


def _packed(message: Message | PackedOutputs) -> Any:
    if isinstance(message, Outputs):
        return PackedOutputs([PackedOutput.of(o) for o in message.items])
    if isinstance(message, (RunGroup, GroupDone)):
        return _PackedGroup(msgspec.structs.replace(message, samples=[]), [PackedSample.of(s) for s in message.samples])
    return message


def _unpacked(message: Any) -> Message:
    if isinstance(message, PackedOutputs):
        return Outputs([p.unpack() for p in message.items])
    if isinstance(message, _PackedGroup):
        return msgspec.structs.replace(message.rest, samples=[p.unpack() for p in message.samples])
    return message      # type: ignore[no-any-return]


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(
    Union[(*(t for t in get_args(Message) if t not in (Outputs, RunGroup, GroupDone)), PackedOutputs, _PackedGroup)])


def encode(message: Message | PackedOutputs) -> bytes:
    return _encoder.encode(_packed(message))


def decode(payload: bytes) -> Message:
    """Raises msgspec.DecodeError for anything that is not one of ours, ValueError for numbers that are not whole."""
    return _unpacked(_decoder.decode(payload))
