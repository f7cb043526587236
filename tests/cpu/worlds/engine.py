"""SGLang in ranks, beside the trainer: what engines answer against transformers and against the trainer.

Arguments: a folder with models, which of them, the engines' tensor-parallel size, and the trainer's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import tiny
import torch
import torch.distributed as dist
from cases import run_cases
from host import Host, abort, request

from rlmono.world.messages import Abort, EndPhase

FOLDER, NAME, TP, TRAINER_TP = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
CONCURRENCY = 8
TEMPERATURE = 0.8
HERE: dict[str, Any] = {}           # the engine, its host, and the trainer: the first case builds them

PROMPTS = [[5 + i, 6, 7, 8, 9, 10 + 3 * i][:2 + i % 5] for i in range(12)]


def engines() -> list[list[int]]:
    return [list(range(i, i + TP)) for i in range(0, dist.get_world_size(), TP)]


def on_all(batch: list[Any]) -> dict[int, list[Any]]:
    """These requests, dealt over the engines."""
    firsts = HERE["host"].firsts
    return {first: batch[i::len(firsts)] for i, first in enumerate(firsts)}


def on_first(batch: list[Any]) -> dict[int, list[Any]]:
    return {HERE["host"].firsts[0]: batch}


def serve(requests: dict[int, list[Any]]) -> dict[str, Any]:
    return HERE["host"].generate(HERE["engine"], requests)      # type: ignore[no-any-return]


def write_tokenizer(folder: Path) -> None:
    """Of bytes, as those of large models: engines make the text of such responses."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:tiny.VOCABULARY])}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


# ---------------------------------------------------------------- weights

def case_built_and_updated() -> None:
    """Trainer, then engine, as a colocated rank does; the update compares every bit."""
    from rlmono.engine.engine import Engine
    from rlmono.weights.update import Colocated
    if dist.get_rank() == 0 and not (FOLDER / NAME).exists():
        tiny.make_models(FOLDER)
        write_tokenizer(FOLDER / NAME)
    dist.barrier()
    options = dict(rollout_num_gpus_per_engine=TP, tensor_model_parallel_size=TRAINER_TP, sequence_parallel=TRAINER_TP > 1, deterministic=True,
                   rollout_seed=1, sglang_server_concurrency=CONCURRENCY, rollout_temperature=TEMPERATURE, lr=5e-3)
    HERE["trainer"] = tiny.build_trainer(FOLDER / NAME, **options)
    HERE["host"] = Host(engines())
    HERE["engine"] = Engine(tiny.make_config(FOLDER / NAME, **options), engines(), dist.get_rank(), "cpu", "float32", HERE["host"].link)
    HERE["weights"] = Colocated(HERE["trainer"], HERE["engine"], check=True)
    HERE["weights"].update(version=3)


def case_the_second_update_is_plain_copies() -> None:
    """SGLang's loader ran at the first; from then on parts of Megatron's parameters are copied, and every bit is where the loader would put it."""
    engine, trainer = HERE["engine"], HERE["trainer"]
    model = engine.scheduler.tp_worker.model_runner.model
    loader = model.load_weights
    with torch.no_grad():
        for p in trainer.chunks[0].parameters():
            p.data.mul_(1.5)
    try:
        model.load_weights = None       # whoever calls it fails
        HERE["weights"].check = False
        HERE["weights"].update(version=3)
    finally:
        model.load_weights, HERE["weights"].check = loader, True
    assert engine._plan.why_not == "" and HERE["weights"].direct is not None
    assert engine.compare_weights(trainer.export()) == []
    with torch.no_grad():
        for p in trainer.chunks[0].parameters():
            p.data.div_(1.5)
    HERE["weights"].update(version=3)


def case_a_flipped_bit_is_found() -> None:
    engine, trainer = HERE["engine"], HERE["trainer"]
    parameters = dict(engine.scheduler.tp_worker.model_runner.model.named_parameters())
    for name in ("model.norm.weight", "model.layers.2.mlp.down_proj.weight", "model.embed_tokens.weight"):
        word = parameters[name].data.view(torch.int32).view(-1)[3:4]
        word ^= 1
        found = engine.compare_weights(trainer.export())
        word ^= 1
        assert found == [name], (name, found)
    assert engine.compare_weights(trainer.export()) == []


def case_a_weight_that_nothing_fills_is_found() -> None:
    engine, trainer = HERE["engine"], HERE["trainer"]
    without = [[(n, x) for n, x in bucket if "layers.1.mlp.down_proj" not in n] for bucket in trainer.export()]
    assert engine.compare_weights(without) == ["model.layers.1.mlp.down_proj.weight"]


# ---------------------------------------------------------------- tokens and logprobs

def case_greedy_is_transformers_argmax() -> dict[str, float]:
    """Logprobs too; at temperature 0 SGLang reports those of the unscaled logits."""
    got = serve(on_all([request(i, p, 16, temperature=0.0) for i, p in enumerate(PROMPTS)]))
    model, worst = tiny.load_transformers(FOLDER / NAME), 0.0
    for i, prompt in enumerate(PROMPTS):
        out = got[f"{i:016x}"]
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + out.output_ids])).logits[0].log_softmax(-1)[len(prompt) - 1:-1]
        assert log_p.argmax(-1).tolist() == out.output_ids, i
        assert (out.finish, out.weight_version, len(out.log_probs)) == ("length", 3, 16)
        worst = max(worst, *(abs(log_p[k, t].item() - x) for k, (t, x) in enumerate(zip(out.output_ids, out.log_probs, strict=True))))
    assert worst <= 1e-5, worst
    return {"max_abs_logprob_difference": worst}


def case_engines_send_the_text() -> None:
    """It is the one that the host's tokenizer makes."""
    from rlmono.data.tokenizer import Tokenizer
    texts = HERE["engine"]._traffic.texts
    assert (texts is not None) == HERE["engine"].is_first
    if texts is not None:
        texts._table.result(60)
    dist.barrier()
    got, tokenizer = serve(on_all([request(i, p, 16, seed=i) for i, p in enumerate(PROMPTS)])), Tokenizer(str(FOLDER / NAME))
    assert tokenizer.byte_table is not None
    for out in got.values():
        assert out.text == tokenizer.decode(out.output_ids), out
    assert len({out.text for out in got.values()}) > 1


def case_stop_tokens_end_a_response() -> None:
    free = serve(on_first([request(0, PROMPTS[0], 24, seed=1)]))[f"{0:016x}"]
    stop = free.output_ids[9]
    first = free.output_ids.index(stop)
    stopped = serve(on_first([request(0, PROMPTS[0], 24, seed=1, stop=(stop,), ignore_eos=False)]))[f"{0:016x}"]
    end = min([first] + [i for i, t in enumerate(free.output_ids) if t == 2])       # 2 is the model's own end
    assert stopped.finish == "stop" and stopped.output_ids == free.output_ids[:end + 1], stopped


def case_trainer_and_engine_agree_after_updates() -> dict[str, float]:
    """Sample, train on the samples, update, sample again: the trainer's logprobs of sampled tokens are the engine's."""
    worst = 0.0
    for version in (3, 4, 5):
        got = serve(on_all([request(i, p, 30, seed=100 * version + i, temperature=TEMPERATURE) for i, p in enumerate(PROMPTS)]))
        batch = []
        for i, prompt in enumerate(PROMPTS):
            out = got[f"{i:016x}"]
            assert out.weight_version == version, (out.weight_version, version)
            batch.append(tiny.sample(i, i // 4, i % 3, prompt + out.output_ids, 30, [1] * 30, out.log_probs))
        trainer = HERE["trainer"]
        packs = tiny.share(trainer, [batch[:5], batch[5:8], batch[8:11], batch[11:]])
        metrics = trainer.train(tiny.batch(batch, tiny.step(packs, batch)))
        if trainer.reports:
            worst = max(worst, metrics["train/train_rollout_logprob_abs_diff_max"])
            assert metrics["train/grad_norm"] > 0.1, "nothing was learnt between the updates"
        HERE["weights"].update(version=version + 1)
    assert worst <= 1e-5, worst
    return {"max_abs_logprob_difference": worst}


# ---------------------------------------------------------------- determinism

def case_seeds_give_the_same_bits_in_any_company() -> None:
    """Alone, among others, in another order, cut into other batches by the limit on running requests, and phases later."""
    def asked(numbers: list[int]) -> list[Any]:
        return [request(n, PROMPTS[n % 3], 20 + n % 7, seed=1000 + n, temperature=TEMPERATURE) for n in numbers]
    alone = {n: serve(on_first(asked([n])))[f"{n:016x}"] for n in (0, 1, 5, 13)}
    for company in ([0, 1, 5, 13], [13, 5, 1, 0], list(range(20)), list(reversed(range(20)))):
        got = serve(on_first(asked(company)))
        for n, expected in alone.items():
            out = got[f"{n:016x}"]
            assert out.output_ids == expected.output_ids, f"request {n} among {company}: other tokens"
            assert out.log_probs == expected.log_probs, f"request {n} among {company}: other bits in its logprobs"
    assert len({tuple(x.output_ids[:20]) for x in got.values()}) == 20, "other seeds must give other tokens"


def case_engines_agree_on_a_seed() -> None:
    firsts = HERE["host"].firsts
    got = serve({first: [request(first, PROMPTS[0], 20, seed=7)] for first in firsts})
    assert len({(tuple(x.output_ids), tuple(x.log_probs)) for x in got.values()}) == 1


def without_seeds(on: bool) -> None:
    """As in a run without --deterministic: tokens come from the engine's generator."""
    from sglang.srt.runtime_context import get_server_args
    get_server_args().enable_deterministic_inference = not on


def case_the_engines_generator_is_its_own() -> None:
    """Serving leaves the trainer's generator alone; what the trainer draws, differently on each rank, changes no token."""
    engine, firsts = HERE["engine"], HERE["host"].firsts
    without_seeds(True)
    try:
        state = engine.rng.state
        torch.manual_seed(dist.get_rank())
        outside = torch.get_rng_state()
        first = serve({f: [request(f, PROMPTS[0], 40)] for f in firsts})
        assert torch.equal(torch.get_rng_state(), outside), "serving drew from the trainer's generator"
        torch.rand(5 + dist.get_rank())
        second = serve({f: [request(f, PROMPTS[0], 40)] for f in firsts})
        engine.rng.state = state
        torch.rand(3 + dist.get_rank())
        again = serve({f: [request(f, PROMPTS[0], 40)] for f in firsts})
    finally:
        without_seeds(False)
    tokens = [[tuple(out[f"{f:016x}"].output_ids) for f in firsts] for out in (first, second, again)]
    assert tokens[0] == tokens[2] and tokens[0] != tokens[1], "the engine's state does not decide its tokens"
    assert len(set(tokens[0])) == len(firsts), "engines must not draw alike"
    if TP > 1:
        assert torch.equal(gathered(engine.rng.state[0]), engine.rng.state[0]), "the ranks of an engine are not in step"


def gathered(state: torch.Tensor) -> torch.Tensor:
    out = [state] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(out)
    return out[0]       # type: ignore[return-value]


# ---------------------------------------------------------------- phases and aborts

def case_phases_can_be_entered_again() -> None:
    """Also one without requests, and one whose first request came right behind the end of the last."""
    host = HERE["host"]
    assert serve({}) == {}

    def first() -> dict[str, Any]:
        host.send(host.firsts[0], request(1, PROMPTS[0], 4, seed=1))
        got = host.answers(1)
        host.send(host.firsts[0], EndPhase())
        host.send(host.firsts[0], request(2, PROMPTS[1], 4, seed=2))
        return got      # type: ignore[no-any-return]
    host.phase(HERE["engine"], first, ended=host.firsts[:1])
    assert list(phase(lambda: host.answers(1))) == [f"{2:016x}"]


def phase(program: Any) -> Any:
    return HERE["host"].phase(HERE["engine"], program)


def case_abort_returns_partial_tokens() -> None:
    """What an aborted request has by then is the beginning of what it would have been; others are not touched."""
    host = HERE["host"]
    long, short, neighbour = 0x10, 0x11, 0x1

    def program() -> dict[str, Any]:
        first = host.firsts[0]
        host.send(first, request(long, PROMPTS[0], 3000, seed=5, temperature=TEMPERATURE))
        host.send(first, request(neighbour, PROMPTS[1], 60, seed=6, temperature=TEMPERATURE))
        host.send(first, request(short, PROMPTS[2], 8, seed=7))
        got = host.answers(3, until=f"{short:016x}")
        host.send(first, abort(long))
        return got | host.answers(3 - len(got))
    got = phase(program)
    out = got[f"{long:016x}"]
    assert out.finish == "abort" and 4 <= len(out.output_ids) < 3000 and len(out.log_probs) == len(out.output_ids), (out.finish, len(out.output_ids))
    assert got[f"{neighbour:016x}"].finish == "length" and len(got[f"{neighbour:016x}"].output_ids) == 60
    whole = serve(on_first([request(long, PROMPTS[0], len(out.output_ids) + 5, seed=5, temperature=TEMPERATURE)]))[f"{long:016x}"]
    n = len(out.output_ids)
    assert whole.output_ids[:n] == out.output_ids and whole.log_probs[:n] == out.log_probs


def case_abort_of_a_request_that_waits() -> None:
    """The engine is full: the request that waits answers with nothing, then `abort all` ends the others."""
    host = HERE["host"]

    def program() -> dict[str, Any]:
        first = host.firsts[0]
        for n in range(CONCURRENCY + 1):
            host.send(first, request(n, PROMPTS[0], 3000, seed=n))
        host.send(first, request(99, PROMPTS[0], 3000, seed=99))
        host.send(first, abort(99))
        got = host.answers(1)
        assert list(got) == [f"{99:016x}"], list(got)
        host.send(first, Abort())
        return got | host.answers(CONCURRENCY + 1)
    got = phase(program)
    assert {x.finish for x in got.values()} == {"abort"} and len(got) == CONCURRENCY + 2
    waited = got[f"{99:016x}"]
    assert waited.output_ids == [] and waited.log_probs == []
    assert not any(x.error for x in got.values()), "what was asked for is no error"


def case_unknown_requests_are_left_alone() -> None:
    """To abort what is not there, or is done, has no answer and touches nobody."""
    host = HERE["host"]

    def program() -> dict[str, Any]:
        first = host.firsts[0]
        host.send(first, abort(0xABC))
        host.send(first, request(1, PROMPTS[0], 4, seed=1))
        host.send(first, request(2, PROMPTS[0], 40, seed=2))
        got = host.answers(2, until=f"{1:016x}")
        host.send(first, abort(1))
        got |= host.answers(2 - len(got))
        assert host.quiet()
        return got      # type: ignore[no-any-return]
    got = phase(program)
    assert {k: (x.finish, len(x.output_ids)) for k, x in got.items()} == {f"{1:016x}": ("length", 4), f"{2:016x}": ("length", 40)}


def case_a_prompt_that_is_too_long_is_answered() -> None:
    """With the reason and without tokens, alone and among others; the engine goes on."""
    too_long, other = request(1, [5] * 5000, 4, seed=1), request(2, PROMPTS[0], 4, seed=2)
    for batch in ([too_long], [too_long, other]):
        got = serve(on_first(batch))
        refused = got[too_long.rid]
        assert refused.finish == "abort" and refused.output_ids == refused.log_probs == [] and "5000" in refused.error, refused
    assert len(got[other.rid].output_ids) == 4 and got[other.rid].error == ""


def case_parameters_that_sglang_does_not_know_are_answered() -> None:
    bad, other = request(1, PROMPTS[0], 4, seed=1), request(2, PROMPTS[0], 4, seed=2)
    bad.sampling = msgspec.structs.replace(bad.sampling, top_k=-7)
    got = serve(on_first([bad, other]))
    assert got[bad.rid].finish == "abort" and "top_k" in got[bad.rid].error and got[bad.rid].output_ids == [], got
    assert len(got[other.rid].output_ids) == 4 and got[other.rid].error == ""


def case_updates_need_an_idle_engine() -> None:
    """After all these phases an update goes through, and the engine marks and samples by it."""
    HERE["weights"].update(version=20)
    assert serve(on_first([request(1, PROMPTS[0], 4, seed=1)]))[f"{1:016x}"].weight_version == 20


def case_norms_on_latents_have_their_own_epsilon() -> None:
    """SGLang's latent attention can't run on a CPU, but is made."""
    from types import SimpleNamespace

    from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA as Attention

    from rlmono.engine.compat import override_latent_norms
    kept, config = Attention.__init__, SimpleNamespace(rms_norm_eps=1e-5, architectures=["DeepseekV3ForCausalLM"])
    sizes = dict(hidden_size=64, num_heads=4, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=24, kv_lora_rank=32, layer_id=0, skip_rope=True)
    assert Attention(config, q_lora_rank=48, **sizes).kv_a_layernorm.variance_epsilon == 1e-5, "SGLang has changed: is the override still needed?"
    try:
        override_latent_norms(Attention, 1e-6)
        both, alone = (Attention(config, q_lora_rank=rank, **sizes) for rank in (48, None))
    finally:
        Attention.__init__ = kept
    assert both.q_a_layernorm.variance_epsilon == both.kv_a_layernorm.variance_epsilon == alone.kv_a_layernorm.variance_epsilon == 1e-6


if __name__ == "__main__":
    run_cases(globals())
