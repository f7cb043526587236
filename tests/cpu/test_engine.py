"""SGLang in ranks, alone and as two tensor-parallel ranks and as two engines; the cases are in worlds/engine.py.

And what needs no SGLang: the sampler that heeds seeds on CPU, and the host's view of an engine.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torchrun import WORLDS, Result, case_names, run_world

from rlmono.engine.compat import _multinomial_with_seed
from rlmono.engine.text import OutputTexts
from rlmono.rollout.engines import EngineClient, EngineFault
from rlmono.world.messages import Abort, EndPhase, Generate, Message, Output, Outputs, Sampling

SCRIPT = WORLDS / "engine.py"
# ranks, model, tensor-parallel size of an engine and of the trainer
WORLD = {"one_engine": (1, "untied", 1, 1), "tensor_parallel": (2, "tied", 2, 1), "two_engines": (2, "untied", 1, 2)}


@pytest.fixture(scope="module", params=[pytest.param("one_engine", marks=pytest.mark.slow), "tensor_parallel", "two_engines"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    ranks, model, engine_tp, trainer_tp = WORLD[request.param]
    return run_world(SCRIPT, ranks, str(tmp_path_factory.mktemp(request.param)), model, str(engine_tp), str(trainer_tp), timeout_s=900)


@pytest.mark.parametrize("name", case_names(SCRIPT))
def test_engine(results: dict[str, Result], name: str) -> None:
    results[name].check()


# ---------------------------------------------------------------- the sampler

N = 20000


def draw(log_p: torch.Tensor, seeds: torch.Tensor, position: int = 3) -> torch.Tensor:
    rows = log_p.expand(len(seeds), -1)
    return _multinomial_with_seed(rows, seeds, torch.full((len(seeds),), position))[:, 0]


def test_samples_are_distributed_as_asked() -> None:
    p = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
    for seeds in (torch.arange(N), torch.arange(N) * 2**40 + 12345):
        counts = torch.bincount(draw(p.log(), seeds), minlength=5).double()
        chi_square = float(((counts - N * p) ** 2 / (N * p)).sum())
        assert chi_square < 18.5, (counts, chi_square)         # 4 degrees of freedom: 0.1 %


def test_positions_and_seeds_draw_independently() -> None:
    log_p = torch.full((4,), 0.25).log()
    first, second = draw(log_p, torch.arange(N), 3), draw(log_p, torch.arange(N), 4)
    joint = torch.bincount(first * 4 + second, minlength=16).double()
    assert float(((joint - N / 16) ** 2 / (N / 16)).sum()) < 37.7         # 15 degrees of freedom: 0.1 %


def test_a_row_depends_on_its_own_inputs_only() -> None:
    torch.manual_seed(0)
    log_p = torch.randn(50, 97).log_softmax(-1)
    seeds, positions = torch.arange(50) * 7, torch.arange(50)
    together = _multinomial_with_seed(log_p, seeds, positions)
    order = torch.randperm(50)
    assert torch.equal(_multinomial_with_seed(log_p[order], seeds[order], positions[order]), together[order])
    assert torch.equal(_multinomial_with_seed(log_p[3:4], seeds[3:4], positions[3:4]), together[3:4])


def test_what_has_no_probability_is_never_drawn() -> None:
    log_p = torch.tensor([0.5, 0.0, 0.5]).log()
    assert set(draw(log_p, torch.arange(1000)).tolist()) == {0, 2}


# ---------------------------------------------------------------- texts

def test_the_host_makes_the_texts_that_the_engine_cannot(tmp_path: Path) -> None:
    """While the tokenizer is read, where it cannot be read or has no table of bytes, and of ids beyond it."""
    words = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(words, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    ids, texts = [words["H"], words["i"], len(words)], {skip: OutputTexts(str(tmp_path), skip) for skip in (True, False)}
    wait([t._table for t in texts.values()], 60)
    assert (texts[True].of(ids), texts[False].of(ids)) == ("Hi", "Hi<|end|>")
    assert texts[True].of([]) == "" and texts[True].of([5000]) is None
    broken = OutputTexts(str(tmp_path / "nothing"), True)
    wait([broken._table], 60)
    assert broken.of(ids) is None
    texts[True]._table = Future()
    assert texts[True].of(ids) is None


# ---------------------------------------------------------------- the host's view


def client() -> tuple[EngineClient, list[Message]]:
    sent: list[Message] = []
    return EngineClient("engine 0", sent.append, concurrency=2), sent


def answer(rid: str, **values: Any) -> Outputs:
    return Outputs([Output(rid, [7, 8], [-0.1, -0.2], "stop", 3, **values)])


def test_answers_find_their_request() -> None:
    async def run() -> None:
        engine, sent = client()
        tasks = [asyncio.create_task(engine.generate([i], Sampling(4), 10)) for i in range(3)]
        await asyncio.sleep(0)
        assert [m.input_ids for m in sent if isinstance(m, Generate)] == [[0], [1]], "two are in flight at most"
        second, first = sent[1], sent[0]
        assert isinstance(first, Generate) and isinstance(second, Generate) and len(first.rid) == len(second.rid)
        engine.deliver(answer(second.rid))
        assert (await tasks[1]).rid == second.rid and not tasks[0].done()
        engine.deliver(answer(first.rid))
        await asyncio.sleep(0.01)
        third = sent[2]
        assert isinstance(third, Generate)
        with pytest.raises(RuntimeError, match="1 requests wait"):
            engine.end_phase()
        engine.deliver(answer(third.rid))
        await asyncio.gather(*tasks)
        engine.end_phase()
        assert isinstance(sent[-1], EndPhase)
    asyncio.run(run())


def test_unknown_and_doubled_answers_are_counted() -> None:
    async def run() -> None:
        engine, sent = client()
        task = asyncio.create_task(engine.generate([1], Sampling(4), 10))
        await asyncio.sleep(0)
        request = sent[0]
        assert isinstance(request, Generate)
        engine.deliver(answer("f" * 16))
        engine.deliver(answer(request.rid))
        engine.deliver(answer(request.rid))
        await task
        engine.deliver(answer(request.rid))
        assert engine.take_strays() == {"unknown": 1, "twice": 2} and engine.take_strays() == {}
    asyncio.run(run())


def test_a_request_that_is_not_answered_is_aborted() -> None:
    async def run() -> None:
        engine, sent = client()
        with pytest.raises(EngineFault, match=r"engine 0 has not answered a request of 3 \+ 4 tokens within 0.01 s"):
            await engine.generate([1, 2, 3], Sampling(4), 0.01)
        request, last = sent[0], sent[-1]
        assert isinstance(request, Generate) and isinstance(last, Abort) and last.rid == request.rid
        with pytest.raises(RuntimeError, match="1 requests wait"):
            engine.end_phase()      # the engine still has it
        engine.deliver(Outputs([Output(request.rid, [], [], "abort", 3)]))
        await engine.settle()
        engine.end_phase()
        assert engine.take_strays() == {}
    asyncio.run(run())


def test_each_request_has_a_deadline_of_its_own() -> None:
    async def run() -> None:
        sent: list[Message] = []
        engine = EngineClient("engine 0", sent.append, concurrency=8)
        tasks = [asyncio.create_task(engine.generate([i], Sampling(4), timeout_s)) for i, timeout_s in enumerate((0.3, 0.05, 10, 10))]
        await asyncio.sleep(0.15)
        assert [t.done() for t in tasks] == [False, True, False, False]
        tasks[3].cancel()
        await asyncio.sleep(0.3)
        assert [t.done() for t in tasks] == [True, True, False, True] and tasks[3].cancelled()
        requests = [m.rid for m in sent if isinstance(m, Generate)]
        assert [m.rid for m in sent if isinstance(m, Abort)] == [requests[1], requests[3], requests[0]]
        engine.deliver(answer(requests[2]))
        assert (await tasks[2]).rid == requests[2] and engine.waiting == 3
        assert all("within 0" in str(tasks[i].exception()) for i in (0, 1))
    asyncio.run(run())


def test_a_refused_request_says_why() -> None:
    async def run() -> None:
        engine, sent = client()
        task = asyncio.create_task(engine.generate([1, 2, 3], Sampling(4), 10))
        await asyncio.sleep(0)
        request = sent[0]
        assert isinstance(request, Generate)
        engine.deliver(answer(request.rid, error="the prompt is too long"))
        with pytest.raises(EngineFault, match=r"engine 0 refused a request of 3 \+ 4 tokens: the prompt is too long"):
            await task
    asyncio.run(run())
