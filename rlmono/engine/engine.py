"""SGLang's scheduler in this rank.

    engine.serve()              read requests from the host's socket and answer them, until it says EndPhase
    engine.load_weights(...)    HF-named full tensors into the engine's parameters, in this process
    engine.weight_version       the version that samples are marked with

Only the first rank of an engine holds the host's socket; SGLang itself hands requests to its tensor-parallel peers.
"""

from __future__ import annotations

import contextlib
import logging
import time
from array import array
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Sequence

import torch
import torch.distributed as dist

from rlmono.config.schema import Config
from rlmono.engine import compat, loadplan
from rlmono.engine.invariant import BatchInvariant
from rlmono.engine.rng import EngineRng
from rlmono.engine.text import OutputTexts
from rlmono.world.channel import HEARTBEAT_S, HostLink
from rlmono.world.messages import Abort, EndPhase, Generate, Heartbeat, Output, Outputs, in_parts

log = logging.getLogger(__name__)


class Engine:
    """One rank of one engine. Building it is collective over the pool.

    `engines` lists the pool ranks of every engine; `link` is the socket to this node's host.
    """

    def __init__(self, config: Config, engines: Sequence[Sequence[int]], local_rank: int, device: str, dtype: str, link: HostLink,
                 memory_saver: bool = False):
        compat.check_version()
        compat.prepare_cpu()
        compat.import_only(config.model["architecture"])
        compat.finish_import(config.start_timeout_s)
        from rlmono.engine.arguments import server_args
        from rlmono.engine.groups import make_groups

        rank = dist.get_rank()
        self.ranks = next(e for e in engines if rank in e)
        self.is_first = rank == self.ranks[0]
        self.weight_version = 0
        self._traffic = _Traffic(self, link)
        compat.override(self._traffic.make_channels, self._traffic.pull, config.model.get("latent_norm_epsilon"))
        self.args = server_args(config, device=device, dtype=dtype, memory_saver=memory_saver)
        make_groups(engines, self.args, local_rank, "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        stops = bool(config.rollout_stop or config.custom_generate_function_path or config.eval_config)
        self.scheduler = self._build_scheduler(local_rank, stops)
        if self.is_first:
            self._traffic.texts = OutputTexts(config.hf_checkpoint or "", config.rollout_skip_special_tokens)
        self._plan = loadplan.LoadPlan(self._model())
        self._copies = compat.copies_of_weights(self._model())
        if config.deterministic and device == "cpu":
            # On CPU its constructor refuses torch_native, and its batch-invariant kernels are for GPUs; torch's CPU
            # kernels don't let a row depend on the batch, so all that is missing is that seeds are heeded.
            from sglang.srt.runtime_context import get_server_args
            get_server_args().enable_deterministic_inference = True
        # The ranks of an engine must draw the same numbers, and other engines others.
        self.rng = EngineRng(config.rollout_seed + 7919 * self.ranks[0])
        self._batch_invariant = config.deterministic and device == "cpu"

    def _build_scheduler(self, local_rank: int, stops: bool) -> Any:
        """`stops`: requests may have strings that end them, which SGLang looks for in the text."""
        from sglang.srt.managers.scheduler import Scheduler
        from sglang.srt.server_args import PortArgs

        ports = PortArgs.init_new(self.args)
        scheduler = Scheduler(self.args, ports, gpu_id=local_rank, tp_rank=self.ranks.index(dist.get_rank()), moe_ep_rank=0, pp_rank=0,
                              attn_cp_rank=0, moe_dp_rank=0, dp_rank=None)
        sleep = scheduler.maybe_sleep_on_idle       # up to a second for the next message, also after the one that ends the phase
        scheduler.maybe_sleep_on_idle = lambda: None if scheduler.gracefully_exit else sleep()
        if stops:
            from sglang.srt.utils.hf_transformers_utils import get_tokenizer
            scheduler.tokenizer = get_tokenizer(self.args.tokenizer_path)
        return scheduler

    def serve(self, each_step: Callable[[], None] = lambda: None) -> None:
        """One phase: answer requests until EndPhase, which the host sends after the last answer. `each_step` is called before every step."""
        self.scheduler.gracefully_exit = False
        self._traffic.each_step = each_step
        with self.rng, BatchInvariant() if self._batch_invariant else contextlib.nullcontext():
            self.scheduler.run_event_loop()

    @torch.inference_mode()
    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy full tensors with HF names into this rank's parameters; SGLang cuts its own shard, and from the second time on its cuts are
        replayed (loadplan.py). The engine must be idle."""
        self._plan.load(list(named_tensors), self._model().load_weights)

    def places(self) -> Any:
        """After an update: where this rank's parameters hold which part of which HF tensor (LoadPlan.places); None where that is not known."""
        return self._plan.places()

    @torch.inference_mode()
    def fill(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy parts to places of `places`. The engine must be idle."""
        loadplan.copy(pairs)

    def _model(self) -> Any:
        return self.scheduler.tp_worker.model_runner.model

    def finish_update(self, version: int) -> None:
        """After the last `load_weights` of an update: drop what the old weights cached, and mark new samples with `version`."""
        self.drain()
        if not self.scheduler.flush_cache(empty_cache=False):
            raise RuntimeError("the engine still has requests after an update: its cache holds prefixes of the old weights")
        compat.refresh_copies(self._copies)
        self._plan.seal()
        self.weight_version = version

    @torch.inference_mode()
    def drain(self) -> None:
        """Step until SGLang has let go of its finished requests (one step after the last answer)."""
        s = self.scheduler
        if s.enable_overlap and not hasattr(s, "result_queue"):
            s.result_queue = []         # made by the first loop; is_fully_idle reads it
        for _ in range(8):
            if s.is_fully_idle():
                return
            plan = s.get_next_batch_to_run(running_batch=s.running_batch, last_batch=s.last_batch)
            s.running_batch, s.last_batch = plan.running_batch, plan.batch_to_run
            if plan.batch_to_run is not None:
                raise RuntimeError("the engine still generates after its phase has ended")
        raise RuntimeError("the engine does not become idle after its phase has ended")

    def pause(self, tag: str) -> None:
        """Let go of the GPU memory of `kv_cache`, `weights` or `cuda_graph`. What no update brings back (RoPE tables, other buffers) SGLang keeps."""
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput
        self.scheduler.weight_updater.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=[tag]))

    def resume(self, tag: str) -> None:
        """Take it again; weights come back with the next update."""
        from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput
        self.scheduler.weight_updater.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=[tag]))

    @torch.no_grad()
    def compare_weights(self, buckets: Iterable[Iterable[tuple[str, torch.Tensor]]]) -> list[str]:
        """Names of parameters that differ, in any bit, from what loading these tensors gives; [] when all are equal.

        The tensors are loaded into poisoned stand-ins by SGLang itself, so a parameter that nothing fills differs too, and so does one that the
        load plan fills wrongly.
        """
        live = dict(self._model().named_parameters())
        kept = {name: p.data for name, p in live.items()}
        try:
            for p in live.values():
                p.data = torch.full_like(p.data, float("nan"))
            for bucket in buckets:
                with torch.inference_mode():
                    self._model().load_weights(bucket)
            return [name for name, p in live.items() if not torch.equal(_bits(p.data), _bits(kept[name]))]
        finally:
            for name, p in live.items():
                p.data = kept[name]


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


class _Traffic:
    """Between our socket and SGLang's scheduler: its request receiver and its two senders."""

    def __init__(self, engine: Engine, link: HostLink):
        self._engine, self._link = engine, link
        self.texts: Optional[OutputTexts] = None
        self._partial: dict[str, tuple[array[int], array[float]]] = {}       # as they travel: nothing is left to do when a response ends
        self._beaten = 0.0
        self.each_step: Callable[[], None] = lambda: None

    def make_channels(self, *, is_rank_zero: bool, **_: Any) -> Any:
        """Stands for SchedulerIpcChannels.create."""
        from sglang.srt.managers.scheduler_components.ipc_channels import SchedulerIpcChannels
        sock = self._link.socket if is_rank_zero else None
        return SchedulerIpcChannels(recv_from_tokenizer=sock, recv_from_rpc=sock, send_to_tokenizer=self, send_to_detokenizer=self,
                                    send_metrics_from_scheduler=None)

    def pull(self, receiver: Any) -> Optional[list[Any]]:
        """Stands for SchedulerRequestReceiver._pull_raw_reqs: all messages that have come, as SGLang's requests."""
        self.each_step()
        if not self._engine.is_first:
            return None
        self._beat()
        requests: list[Any] = []
        while not receiver.recv_limit_reached(len(requests)):
            message = self._link.receive_now()
            if message is None:
                break
            try:
                requests.append(self._to_sglang(message))
            except _Refused as refusal:
                self._link.send(Outputs([_nothing(refusal.rid, self._engine.weight_version, str(refusal))]))
            if isinstance(message, EndPhase):       # what follows is for the next phase
                break
        return requests

    def _beat(self) -> None:
        """SGLang's loop comes by here before every step: the host learns that it goes round."""
        if (now := time.monotonic()) - self._beaten >= HEARTBEAT_S:
            self._beaten = now
            self._link.send(Heartbeat())

    def _to_sglang(self, message: Any) -> Any:
        from sglang.srt.managers.io_struct import AbortReq, ShutdownReq
        if isinstance(message, Generate):
            return _generate_request(message, self._engine.scheduler.tokenizer)
        if isinstance(message, Abort):
            return AbortReq(rid=message.rid, abort_all=not message.rid)
        if isinstance(message, EndPhase):
            return ShutdownReq()
        raise RuntimeError(f"an engine that serves does not expect {type(message).__name__}")

    def send_output(self, output: Any, recv_obj: Any = None) -> None:
        """Stands for SenderWrapper.send_output. SGLang also sends parts of long responses: they are put together here."""
        if not self._engine.is_first:
            return
        from sglang.srt.managers.io_struct import AbortReq, BatchTokenIDOutput
        if isinstance(output, BatchTokenIDOutput):
            items: Iterator[Output] = (item for i in range(len(output.rids)) if (item := self._finished(output, i)) is not None)
        elif isinstance(output, AbortReq):          # it was still queued: nothing was generated
            items = iter([_nothing(output.rid, self._engine.weight_version, _refusal(output.finished_reason or {}))])
        else:
            return
        for part in in_parts(items):
            self._link.send(part)

    def _finished(self, batch: Any, i: int) -> Optional[Output]:
        rid = batch.rids[i]
        ids, log_probs = self._partial.setdefault(rid, (array("i"), array("f")))
        ids.extend(iter(batch.output_ids[i]))       # which may be an array of another kind
        log_probs.extend(batch.output_token_logprobs_val[i] if batch.output_token_logprobs_val else ())     # None: all were refused
        reason = batch.finished_reasons[i]
        if reason is None:
            return None
        del self._partial[rid]
        n = min(len(ids), len(log_probs))       # a refused request comes with a token that nobody sampled, without its logprob
        ids, log_probs = ids[:n], log_probs[:n]
        text = None if self.texts is None else self.texts.of(ids)
        return Output(rid, ids.tobytes(), log_probs.tobytes(), reason["type"], self._engine.weight_version, batch.cached_tokens[i],
                      _refusal(reason), text)


def _nothing(rid: str, version: int, error: str) -> Output:
    """The answer to a request for which nothing was generated."""
    return Output(rid, b"", b"", "abort", version, error=error)


def _refusal(reason: Mapping[str, Any]) -> str:
    """Why SGLang refused a request; empty for one that ended, or that was aborted because we asked for it."""
    return str(reason.get("message") or "") if reason.get("status_code") is not None else ""


class _Refused(Exception):
    """A request that SGLang cannot be given: its sample fails, and nothing else."""

    def __init__(self, rid: str, why: str):
        super().__init__(why)
        self.rid = rid


def _generate_request(message: Generate, tokenizer: Any) -> Any:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams
    s = message.sampling
    try:
        params = SamplingParams(max_new_tokens=s.max_new_tokens, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, ignore_eos=s.ignore_eos,
                                stop_token_ids=list(s.stop_token_ids) or None, sampling_seed=s.seed, stop=list(s.stop) or None)
        params.normalize(tokenizer)         # reads strings that end a response with the tokenizer, which raises bare Exceptions
        params.verify(1 << 30)
    except Exception as error:
        raise _Refused(message.rid, f"sampling parameters: {error}") from error
    return TokenizedGenerateReqInput(
        rid=message.rid, input_text=None, input_ids=array("q", message.input_ids), input_embeds=None, mm_inputs=None, token_type_ids=None,
        sampling_params=params, return_logprob=True, logprob_start_len=-1, top_logprobs_num=0, token_ids_logprob=None, stream=False)
