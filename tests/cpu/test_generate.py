"""Generate functions on an engine that answers from a script: turns, masks, limits, several samples, and what fails."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq.asyncio
from standin import VERSION, ScriptedEngine, Standin, log_probs, make_config, make_folder, run_group

from rlmono.agents.calculator import LANGUAGE, calculate
from rlmono.config.evals import eval_sets
from rlmono.config.schema import Config
from rlmono.data.sample import ABORTED, COMPLETED, FAILED, TRUNCATED, Sample
from rlmono.data.tokenizer import Tokenizer, TokenizerError
from rlmono.rewards.load import LoadError
from rlmono.rollout.batch import rollout_statistics, train_batches
from rlmono.rollout.buffer import copy_prompt
from rlmono.rollout.cluster import Cluster
from rlmono.rollout.failures import Failures, refuse_without_rewards
from rlmono.rollout.filters import Verdict, check_reward_nonzero_std, judge
from rlmono.rollout.functions import adapted, checked
from rlmono.rollout.generate import as_dict, as_sampling
from rlmono.rollout.host import serve_node
from rlmono.rollout.sampling import eval_sampling, rollout_sampling
from rlmono.trainer.credit import sample_scores
from rlmono.world import messages
from rlmono.world.channel import HostMesh
from rlmono.world.messages import Failure, GroupDone, Sampling

HERE = Path(__file__).name
CALCULATOR = "rlmono.agents.calculator.generate"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_folder(tmp_path_factory.mktemp("language"))


def own(name: str) -> str:
    """A function of this file, by path."""
    return f"{__file__}:{name}"


def prompt(tokenizer: Tokenizer, text: str = "6*7", index: int = 0, **values: Any) -> Sample:
    messages = [{"role": "user", "content": text}]
    return Sample(index=index, group_index=0, prompt=messages, tokens=tokenizer.render(messages, None, True), label="42", reward=1.0, **values)


def scripted(tokenizer: Tokenizer, *turns: str) -> Any:
    """Each turn's text in order of the calls."""
    left = list(turns)
    return lambda _: tokenizer.render(left.pop(0))


# ---------------------------------------------------------------- turns


def test_a_tool_between_two_turns(tokenizer: Tokenizer) -> None:
    """The engine sees the conversation, and the sample has just those tokens, with what each of them is."""
    config, sample = make_config(tokenizer, CALCULATOR), prompt(tokenizer)
    done, engine = run_group(config, scripted(tokenizer, "<calc>6*7</calc><|end|>", r"\boxed{42}<|end|>"), [sample])
    [s] = done.samples
    whole = r"<|user|>6*7<|end|><|assistant|><calc>6*7</calc><|end|><|tool|>42<|end|><|assistant|>\boxed{42}<|end|>"
    assert tokenizer.decode(s.tokens) == whole and s.tokens == tokenizer.render(whole)
    first, between, last = (tokenizer.render(x) for x in ("<calc>6*7</calc><|end|>", "<|tool|>42<|end|><|assistant|>", r"\boxed{42}<|end|>"))
    assert s.loss_mask == [1] * len(first) + [0] * len(between) + [1] * len(last)
    asked = [r.input_ids for r in engine.requests]
    assert asked == [s.tokens[:6], s.tokens[:-len(last)]], "the second request goes on from the first's tokens"
    assert s.rollout_log_probs == log_probs(asked[0], first) + [0.0] * len(between) + log_probs(asked[1], last)
    assert s.weight_versions == [VERSION] * s.response_length and s.status == COMPLETED
    assert s.response == tokenizer.decode(s.tokens[s.prompt_length:]) and not done.failures


def test_what_the_model_wrote_is_never_tokenised_again(tokenizer: Tokenizer) -> None:
    """The ids of `<calc>` as single characters would be other ids: those that were sampled stay."""
    odd = [*tokenizer.render("6"), *tokenizer.render("<calc>6*7</calc>"), tokenizer.eos_ids[0]]
    odd[0:1] = [LANGUAGE.vocabulary.index(" ")] * 2
    answers = lambda ids: odd if len(ids) == 6 else tokenizer.render("4<|end|>")  # noqa: E731
    done, engine = run_group(make_config(tokenizer, CALCULATOR), answers, [prompt(tokenizer)])
    assert done.samples[0].tokens[6:6 + len(odd)] == odd == engine.requests[1].input_ids[6:6 + len(odd)]


def test_each_turn_has_a_seed_of_its_own_that_nothing_else_moves(tokenizer: Tokenizer) -> None:
    def seeds(samples: list[Sample], evaluation: bool = False) -> list[Any]:
        answers = lambda ids: tokenizer.render("<calc>1</calc><|end|>" if len(ids) < 30 else "4<|end|>")  # noqa: E731
        return [r.sampling.seed for r in run_group(make_config(tokenizer, CALCULATOR), answers, samples, evaluation)[1].requests]
    together = seeds([prompt(tokenizer, index=i) for i in (4, 5)])
    assert len(set(together)) == len(together) >= 4
    assert seeds([prompt(tokenizer, index=5)]) == together[1::2] and seeds([prompt(tokenizer, index=5)], True) != together[1::2]


def test_a_response_ends_where_there_is_no_room(tokenizer: Tokenizer) -> None:
    """--rollout-max-response-len bounds all turns together, and the context all of it."""
    always = lambda _: tokenizer.render("<calc>6*7</calc><|end|>")  # noqa: E731
    done, engine = run_group(make_config(tokenizer, CALCULATOR), always, [prompt(tokenizer)], max_new_tokens=15)
    [s] = done.samples
    assert s.status == TRUNCATED and s.response_length == 15 and s.loss_mask is not None and s.loss_mask[-5:] == [0] + [1] * 4
    assert [r.sampling.max_new_tokens for r in engine.requests] == [15, 4]
    done, engine = run_group(make_config(tokenizer, CALCULATOR), always, [prompt(tokenizer)], max_new_tokens=10)
    assert done.samples[0].status == TRUNCATED and len(engine.requests) == 1, "the tool's answer would leave no room"
    done, engine = run_group(make_config(tokenizer, CALCULATOR, rollout_max_context_len=21), always, [prompt(tokenizer)])
    assert len(done.samples[0].tokens) == 21 and done.samples[0].status == TRUNCATED


def test_an_aborted_sample_goes_on_in_the_middle_of_its_turn(tokenizer: Tokenizer) -> None:
    begun = lambda _: (tokenizer.render("<calc>6*"), "abort")  # noqa: E731
    done, _ = run_group(make_config(tokenizer, CALCULATOR), begun, [prompt(tokenizer)])
    [s] = done.samples
    assert s.status == ABORTED and s.response == "<calc>6*"
    done, engine = run_group(make_config(tokenizer, CALCULATOR), scripted(tokenizer, "7</calc><|end|>", "4<|end|>"), [s], max_new_tokens=30)
    assert done.samples[0].response == "<calc>6*7</calc><|end|><|tool|>42<|end|><|assistant|>4<|end|>"
    assert engine.requests[0].sampling.max_new_tokens == 30 - 3, "less what is there"


def test_the_text_that_an_engine_sends_is_not_made_again(tokenizer: Tokenizer) -> None:
    """Where it is all that is asked for: of a first turn, and of the last, but not of the whole of several, or of one that was taken up again."""
    async def run(function: Any, samples: list[Sample], *texts: str) -> tuple[GroupDone, list[str]]:
        async with Standin(make_config(tokenizer, function), scripted(tokenizer, *texts)) as host:
            made, decode = list[str](), host.host.texts.decode

            async def noting(ids: Sequence[int]) -> str:
                made.append(await decode(ids))
                return made[-1]
            host.host.texts.decode, host.engine.text = noting, tokenizer.decode      # type: ignore[method-assign]
            return await host.run(samples), made
    done, made = asyncio.run(run(None, [prompt(tokenizer)], "4<|end|>"))
    assert done.samples[0].response == "4<|end|>" and made == []
    done, made = asyncio.run(run(CALCULATOR, [prompt(tokenizer)], "<calc>6*7</calc><|end|>", "4<|end|>"))
    whole = "<calc>6*7</calc><|end|><|tool|>42<|end|><|assistant|>4<|end|>"
    assert done.samples[0].response == whole and made == [whole]
    done, made = asyncio.run(run(None, [aborted(tokenizer)], "4<|end|>"))
    assert [done.samples[0].response] == made == ["1+4<|end|>"]


def aborted(tokenizer: Tokenizer) -> Sample:
    """As it comes back from a rollout that has ended."""
    sample = prompt(tokenizer)
    ids = tokenizer.render("1+")
    sample.tokens, sample.response, sample.response_length = [*sample.tokens, *ids], "1+", len(ids)
    sample.rollout_log_probs, sample.weight_versions, sample.status = [-1.0] * len(ids), [1] * len(ids), ABORTED
    return sample


async def notes_an_object(args: Any, sample: Sample, sampling_params: dict[str, Any], state: Any) -> Sample:
    await state.turn(sample)
    sample.metadata = {"game": object()}
    return sample


def test_a_group_that_cannot_be_sent_is_an_error_at_the_controller(tokenizer: Tokenizer) -> None:
    """From another node: the controller would wait for it until the phase's deadline."""
    async def main() -> messages.Message:
        context = zmq.asyncio.Context()
        here, there = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        here.bind("inproc://mesh")
        there.connect("inproc://mesh")
        async with Standin(make_config(tokenizer, own("notes_an_object")), scripted(tokenizer, "4<|end|>")) as host:
            node = asyncio.create_task(serve_node(host.host, HostMesh(there, None), 30))
            await here.send(messages.encode(messages.RunGroup(5, 0, [prompt(tokenizer)], Sampling(8), False)))
            while isinstance(message := messages.decode(await asyncio.wait_for(here.recv(), 20)), messages.Heartbeat):
                pass
            await here.send(messages.encode(messages.Goodbye()))
            await asyncio.wait_for(node, 20)
        context.destroy(0)
        return message
    done = asyncio.run(main())
    assert isinstance(done, GroupDone) and done.job == 5 and "cannot be sent: TypeError" in done.error, done


async def returns_arrays(args: Any, sample: Sample, sampling_params: dict[str, Any], state: Any) -> Sample:
    await state.turn(sample)
    sample.tokens, sample.rollout_log_probs = np.array(sample.tokens), np.array(sample.rollout_log_probs, np.float32)      # type: ignore[assignment]
    sample.loss_mask, sample.weight_versions = (True,) * sample.response_length, np.array(sample.weight_versions)     # type: ignore[assignment]
    return sample


def test_arrays_become_lists(tokenizer: Tokenizer) -> None:
    """They travel then as any others."""
    done, _ = run_group(make_config(tokenizer, own("returns_arrays")), lambda _: tokenizer.render("4<|end|>"), [prompt(tokenizer)])
    [s] = done.samples
    assert s.loss_mask == [1, 1] and s.weight_versions == [VERSION] * 2 and tokenizer.decode(s.tokens[-2:]) == "4<|end|>"
    assert {type(x) for x in (*s.tokens, *s.loss_mask, *s.weight_versions)} == {int}
    again = messages.decode(messages.encode(done))
    assert isinstance(again, GroupDone) and again.samples == done.samples


@pytest.mark.parametrize("mask", [b"\1\0", (1, 0), [True, 0.0], np.array([1, 0])], ids=["bytes", "tuple", "list", "numpy"])
def test_a_mask_of_any_form_becomes_a_list_that_can_be_sent(tokenizer: Tokenizer, mask: Any) -> None:
    given = prompt(tokenizer)
    made = Sample(tokens=[*given.tokens, 1, 2], response_length=2, rollout_log_probs=[-1.0, -2.0], loss_mask=mask)
    [s] = checked(make_config(tokenizer), given, made)
    assert s.loss_mask == [1, 0] and messages.decode(messages.encode(GroupDone(1, [s]))) == GroupDone(1, [s])


def test_a_copy_of_a_prompt_stays_as_it_was(tokenizer: Tokenizer) -> None:
    given = prompt(tokenizer)
    before, tokens = copy_prompt([given]), list(given.tokens)
    given.tokens.append(1)
    given.metadata["a"] = 1
    assert before[0].tokens == tokens and "a" not in before[0].metadata


def test_strings_end_responses_in_rollouts_and_evaluations() -> None:
    config = Config(rollout_stop=("</calc>", "."), eval_prompt_data=("a", "a.jsonl"))
    [held_out] = eval_sets(config)
    assert rollout_sampling(config, (2,)).stop == eval_sampling(held_out, (2,)).stop == ("</calc>", ".")


async def says_more(args: Any, sample: Sample, sampling_params: dict[str, Any], state: Any) -> Sample:
    sampling_params |= {"stop": "</calc>", "max_new_tokens": 20, "temperature": 1}
    await state.turn(sample, sampling_params)
    assert state.append_text(sample, " =42 ")
    await state.turn(sample, Sampling(4))
    return sample


def test_text_goes_in_as_it_is_and_parameters_are_the_functions_own(tokenizer: Tokenizer) -> None:
    done, engine = run_group(make_config(tokenizer, own("says_more")), scripted(tokenizer, "<calc>6*7</calc>", "ok"), [prompt(tokenizer)])
    assert done.samples[0].response == "<calc>6*7</calc> =42 ok"
    first, second = (r.sampling for r in engine.requests)
    assert (first.stop, first.max_new_tokens, second.stop, second.max_new_tokens) == (("</calc>",), 20, (), 4)
    with pytest.raises(ValueError, match="unknown field `max_tokens`; there are max_new_tokens, temperature"):
        as_sampling({"max_new_tokens": 3, "max_tokens": 4})
    with pytest.raises(ValueError, match="max_new_tokens is at least 1"):
        as_sampling({"max_new_tokens": 0})
    assert as_sampling(as_dict(Sampling(5, 0.5, stop=("a",)))) == Sampling(5, 0.5, stop=("a",))


def test_the_template_decides_what_stands_between(tokenizer: Tokenizer) -> None:
    ask, tool = [{"role": "user", "content": "1"}], [{"role": "tool", "content": "2"}]
    end = tokenizer.render("<|end|>")
    assert tokenizer.continuation(end, ask, tool) == tokenizer.render("<|tool|>2<|end|><|assistant|>")
    assert tokenizer.continuation([5], ask, tool) == tokenizer.render("<|end|><|tool|>2<|end|><|assistant|>"), "a turn that did not end itself"
    with pytest.raises(TokenizerError, match="the roles of this template are user, assistant and tool, not system"):
        tokenizer.continuation(end, ask, [{"role": "system", "content": "2"}])
    kept = tokenizer.hf.chat_template
    try:
        tokenizer.hf.chat_template = "{{ messages[-1]['content'] }}"
        with pytest.raises(TokenizerError, match="leaves an assistant's answer out when 'tool' follows"):
            tokenizer.continuation(end, ask, tool)
    finally:
        tokenizer.hf.chat_template = kept


def test_fine_tuning_does_not_learn_what_a_tool_says(tokenizer: Tokenizer) -> None:
    said = [("user", "6*7"), ("assistant", "<calc>6*7</calc>"), ("tool", "42"), ("assistant", "4")]
    ids, mask = tokenizer.chat_with_mask([{"role": role, "content": text} for role, text in said])
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "<calc>6*7</calc><|end|>4<|end|>"


@pytest.mark.parametrize(("expression", "value"), [
    ("47*38", "1786"), (" (1+2)/4 ", "0.75"), ("-3-+2", "-5"), ("1/0", "error"), ("2**9999", "error"), ("__import__('os')", "error"), ("", "error"),
    ("1" * 101, "error"), ("1e308*10", "inf"), ("(" * 99, "error"), ("True+1", "error"), ("1;2", "error")])
def test_calculator(expression: str, value: str) -> None:
    assert calculate(expression) == value


# ---------------------------------------------------------------- several samples


async def several(args: Any, sample: Sample, sampling_params: dict[str, Any], state: Any, evaluation: bool) -> list[Sample]:
    """As many as the sample's number says, each with a reward; new Samples, which know nothing of the group."""
    assert evaluation is False
    made = []
    for k in range(sample.index % 3 + 1):
        output = await state.generate(sample.tokens, sampling_params)
        made.append(Sample(tokens=sample.tokens + output.output_ids, response_length=len(output.output_ids), rollout_log_probs=output.log_probs,
                           reward=float(k), status=COMPLETED))
    return made


def test_a_function_may_return_several_samples(tokenizer: Tokenizer) -> None:
    samples = [prompt(tokenizer, index=i) for i in range(4)]
    done, _ = run_group(make_config(tokenizer, own("several")), lambda _: tokenizer.render("4<|end|>"), samples)
    assert [s.index for s in done.samples] == [0, 1, 1, 2, 2, 2, 3] and {s.group_index for s in done.samples} == {0}
    assert all(s.label == "42" and s.prompt == [{"role": "user", "content": "6*7"}] for s in done.samples)


def grouped(sizes: list[int], length: int = 3) -> list[list[Sample]]:
    """Groups of two samples, of which the k-th was made into `sizes[k]`."""
    out: list[list[Sample]] = []
    for k, n in enumerate(sizes):
        if k % 2 == 0:
            out.append([])
        out[-1] += [Sample(index=k, group_index=k // 2, tokens=[1] * (length + k % 4), response_length=2, loss_mask=[1, k % 2],
                           rollout_log_probs=[-1.0, 0.0], reward=float(i), status=COMPLETED) for i in range(n)]
    return out


DYNAMIC = {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 8}
VIRTUAL = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


@pytest.mark.parametrize("options", [{"micro_batch_size": 2}, DYNAMIC, DYNAMIC | {"balance_data": True}, VIRTUAL | {"micro_batch_size": 2},
                                     VIRTUAL | DYNAMIC, VIRTUAL | DYNAMIC | {"balance_data": True}])
@pytest.mark.parametrize(("sizes", "steps", "ranks"), [([1, 1, 1, 1], 2, 2), ([3, 0, 1, 5], 2, 2), ([1, 0, 0, 0], 2, 4), ([0, 7, 1, 0], 3, 2)])
def test_batches_of_any_number_of_samples(options: dict[str, Any], sizes: list[int], steps: int, ranks: int) -> None:
    """Each sample is trained on once, by the step's own denominators; ranks run equally many packs, none of them empty; with a virtual
    pipeline in multiples of its stages."""
    model = dict(num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2, kv_channels=16, vocab_size=100)
    groups = grouped(sizes)
    batches = train_batches(0, groups, steps, Config(model=model, **options), ranks)
    real = sum(sizes)
    seen: list[int] = []
    counted = []
    for k in range(steps):
        packs = [batch.steps[k].packs for batch in batches]
        assert len({len(p) for p in packs}) == 1 and all(pack for p in packs for pack in p)
        assert len(packs[0]) % options.get("virtual_pipeline_model_parallel_size", 1) == 0
        samples = [s for p in packs for pack in p for s in pack]
        mine = [s for s in samples if s.index >= 0]
        assert all(not any(s.loss_mask) for s in samples if s.index < 0)
        assert {batch.steps[k].samples for batch in batches} == {max(len(mine), 1)}
        assert {batch.steps[k].tokens for batch in batches} == {sum(sum(s.loss_mask) for s in mine)}
        seen += [s.index for s in mine]
        counted.append(len(mine))
    assert sorted(seen) == list(range(real)) and max(counted) - min(counted) <= 1
    scores = sample_scores(Config(), batches[0].rewards)
    assert {s.index for batch in batches for step in batch.steps for pack in step.packs for s in pack} <= scores.keys()
    assert scores.get(-1, 0.0) == 0.0


def test_advantages_compare_within_a_group_of_any_size() -> None:
    scores = sample_scores(Config(), train_batches(0, grouped([3, 1, 1, 1]), 1, Config(micro_batch_size=1), 1)[0].rewards)
    r = np.array([0.0, 1.0, 2.0, 0.0])
    assert [scores[i] for i in range(4)] == pytest.approx(((r - r.mean()) / (r.std(ddof=1) + 1e-6)).tolist())
    assert [scores[i] for i in (4, 5)] == [0, 0]


def test_a_rollout_without_samples_is_named() -> None:
    with pytest.raises(ValueError, match="rollout 3 has no sample to train on"):
        train_batches(3, [[], []], 1, Config(), 1)


def test_statistics_are_of_what_the_model_wrote() -> None:
    groups = [[Sample(tokens=[1] * 5, response_length=4, loss_mask=[1, 0, 0, 1], rollout_log_probs=[-1.0, 0.0, 0.0, -3.0], reward=1.0)], []]
    values = rollout_statistics(groups, Config())
    assert values["rollout/log_probs"] == -2.0 and values["rollout/trained_tokens_ratio"] == 0.5


# ---------------------------------------------------------------- signatures


class Callable3:
    async def __call__(self, args: Any, sample: Sample, sampling_params: Any) -> Sample:
        return sample


async def takes_all(args: Any, sample: Sample, sampling_params: Any, **kwargs: Any) -> Any:
    return sorted(kwargs)


async def with_default(a: Any, b: Any, c: Any, evaluation: bool = False, extra: int = 3) -> Any:
    return evaluation, extra


def test_functions_get_what_they_take() -> None:
    class State:
        evaluation = True
    call = lambda function: asyncio.run(adapted(function, "f")(None, Sample(), {}, State()))  # type: ignore # noqa: E731
    assert call(takes_all) == ["evaluation", "state"] and call(with_default) == (True, 3) and isinstance(call(Callable3()), Sample)


def not_async(args: Any, sample: Sample, sampling_params: Any) -> Sample:
    return sample


async def too_few(args: Any, sample: Sample) -> Sample:
    return sample


async def unknown(args: Any, sample: Sample, sampling_params: Any, model: Any) -> Sample:
    return sample


@pytest.mark.parametrize(("function", "text"), [(not_async, "is not async"), (too_few, "takes (args: "), (unknown, "model: ")])
def test_functions_that_cannot_be_called_are_refused(function: Any, text: str) -> None:
    with pytest.raises(LoadError) as e:
        adapted(function, "my.function")
    assert text in str(e.value) and "async def function(args, sample, sampling_params)" in str(e.value)


# ---------------------------------------------------------------- what fails


async def misbehaves(args: Any, sample: Sample, sampling_params: Any, state: Any) -> Any:
    """As the prompt says."""
    what = sample.metadata["what"]
    if what == "raise":
        raise KeyError("a fault in the function")
    if what == "exit":
        raise SystemExit(3)
    if what == "hang":
        await state.generate(sample.tokens)      # which the engine leaves open
    if what == "sleep":
        await asyncio.sleep(60)
    if what == "timeout":
        raise TimeoutError("of its own")
    if what in ("none", "nothing", "text", "twice"):
        return {"none": None, "nothing": [], "text": "4", "twice": [sample, sample]}[what]
    if what == "as given":
        return sample
    if what == "failed":
        return Sample(status=FAILED, remarks=["the game was lost"])
    changes: dict[str, dict[str, Any]] = {
        "mask": {"loss_mask": [1]}, "strange": {"tokens": 5}, "length": {"response_length": 99},
        "log probs": {"rollout_log_probs": None}, "nan": {"rollout_log_probs": [math.nan] * 2}, "huge": {"rollout_log_probs": [-1e300] * 2},
        "versions": {"weight_versions": [None, None]}, "no versions": {"weight_versions": []}, "table": {"rollout_log_probs": np.zeros((2, 2))},
        "ids": {"tokens": [*sample.tokens, 3, 10**6]}, "status": {"status": "great"}, "long": {"tokens": [1] * 600}, "numbers": {"loss_mask": [2, 2]}}
    await state.turn(sample)
    for name, value in changes.get(what, {}).items():
        setattr(sample, name, value)
    return sample


FAULTS = [("raise", "generate_error", "KeyError: 'a fault in the function'"), ("exit", "generate_error", "SystemExit: 3"),
          ("hang", "engine_timeout", "--generate-timeout-s 0.2; it waited for engine 0"),
          ("sleep", "generate_timeout", "--generate-timeout-s 0.2"), ("timeout", "generate_error", "TimeoutError: of its own"),
          ("none", "generate_invalid", "returned NoneType"), ("nothing", "generate_invalid", "returned an empty list"),
          ("text", "generate_invalid", "returned str"), ("twice", "generate_invalid", "one sample twice"),
          ("as given", "generate_invalid", "without a response"), ("failed", "generate_failed", "the game was lost"),
          ("mask", "generate_invalid", "1 loss_mask for a response of 2"), ("length", "generate_invalid", "response_length 99"),
          ("log probs", "generate_invalid", "without rollout_log_probs"), ("nan", "generate_invalid", "no finite numbers"),
          ("huge", "generate_invalid", "no finite numbers of fp32"), ("versions", "generate_invalid", "not all whole numbers"),
          ("no versions", "generate_invalid", "with 0 weight_versions for a response of 2"),
          ("table", "generate_invalid", "not all numbers of fp32"),
          ("strange", "generate_invalid", "whose fields cannot be read"),
          ("ids", "generate_invalid", "not all ids from 0 to"), ("status", "generate_invalid", "the status 'great'"),
          ("long", "generate_invalid", "of 600 tokens, and the context ends at 512"), ("numbers", "generate_invalid", "other values than 0 and 1"),
          ("empty prompt", "prompt_empty", "tokenises to nothing"), ("long prompt", "prompt_too_long", "--rollout-max-prompt-len")]


@pytest.mark.parametrize("evaluation", [False, True], ids=["rollout", "evaluation"])
def test_a_sample_that_fails_costs_itself_alone(tokenizer: Tokenizer, evaluation: bool, caplog: pytest.LogCaptureFixture) -> None:
    samples = [prompt(tokenizer, index=i, metadata={"what": what}) for i, what in enumerate(["good", *(what for what, _, _ in FAULTS), "good"])]
    samples[-3].tokens, samples[-2].tokens = [], [1] * 512
    config = make_config(tokenizer, own("misbehaves"), generate_timeout_s=0.2)
    hanging = 1 + [what for what, _, _ in FAULTS].index("hang")

    async def run() -> tuple[GroupDone, ScriptedEngine]:
        async with Standin(config, lambda ids: tokenizer.render("4<|end|>") if ids != [9] else None) as host:
            samples[hanging].tokens = [9]
            done = await host.run(samples, evaluation)
            host.engine.end_phase = lambda: super(ScriptedEngine, host.engine).end_phase()      # type: ignore[method-assign]
            assert not host.engine._left, "the engine has let go of the request that was left"
            return done, host.engine
    done, engine = asyncio.run(run())
    assert [(f.index, f.outcome) for f in done.failures] == [(i, outcome) for i, (_, outcome, _) in enumerate(FAULTS, 1)]
    for failure, (_, _, text) in zip(done.failures, FAULTS, strict=True):
        assert text in failure.detail
    assert len(engine.aborted) == 1 and "KeyError" in caplog.text
    good = [s for s in done.samples if s.status != FAILED]
    assert [s.index for s in good] == [0, len(FAULTS) + 1] and not done.error
    bad = [s for s in done.samples if s.status == FAILED]
    assert [(s.reward, s.remarks) for s in bad] == ([(0.0, [outcome]) for _, outcome, _ in FAULTS] if evaluation else [])


def test_a_group_of_which_all_samples_failed_is_no_group_for_a_filter() -> None:
    assert judge(check_reward_nonzero_std, Config(), []) == judge(None, Config(over_sampling_batch_size=64), []) == Verdict(False, "all_failed")
    assert judge(None, Config(), []).keep, "there, a rollout has a group less"


def failed(n: int) -> list[Failure]:
    return [Failure(i, "generate_error", f"KeyError: {i}") for i in range(n)]


def test_too_many_failures_end_the_run_with_the_last_ones_text() -> None:
    failures = Failures(0.1)
    failures.begin("generating rollout 3", 40)
    failures.add(failed(2))
    failures.add(failed(2))
    assert failures.counts("rollout/failed/") == {"rollout/failed/generate_error": 4}
    with pytest.raises(RuntimeError, match=r"generating rollout 3: 5 of 40 samples have failed \(5 x generate_error\).*sample 0: KeyError: 0"):
        failures.add(failed(1))
    failures.begin("generating rollout 4", 4)
    failures.add(failed(1))         # one always may
    with pytest.raises(RuntimeError, match="2 of 4"):
        failures.add(failed(1))


def test_a_rollout_in_which_no_reward_came_ends_the_run() -> None:
    ill = [Sample(reward=0.0, remarks=["python_timeout", "reward_error" if i % 3 else "remote_rm_down"]) for i in range(8)]
    with pytest.raises(RuntimeError, match=r"rollout 2: none of 8 samples could be judged \(5 x reward_error, 3 x remote_rm_down\)"):
        refuse_without_rewards("rollout 2", ill)
    refuse_without_rewards("rollout 2", ill[1:])                                                    # too few to say
    refuse_without_rewards("rollout 2", [*ill, Sample(reward=0.0)])
    refuse_without_rewards("rollout 2", [Sample(reward=0.0, remarks=["no_response"])] * 8)          # the reward function says so itself
    refuse_without_rewards("rollout 2", [])


def test_a_mistake_in_the_function_ends_the_run_within_its_first_calls(tokenizer: Tokenizer) -> None:
    """The controller's side of it: 3 of 24 planned samples may fail, and the fourth ends the phase."""
    async def run() -> None:
        async with Standin(make_config(tokenizer, own("misbehaves")), lambda _: tokenizer.render("4<|end|>")) as host:
            cluster = Cluster(dataclasses.replace(host.config, rollout_max_failed_share=0.125), host.host.grid, host.host, None)
            cluster.failures.begin("generating rollout 0", 24)
            groups = [[prompt(tokenizer, index=2 * g + i, metadata={"what": "raise" if i else "good"}) for i in range(2)] for g in range(4)]
            for g in range(3):
                assert [s.index for s in await cluster.run_group(groups[g], Sampling(20), False)] == [2 * g]
            with pytest.raises(RuntimeError, match="4 of 24 samples have failed .*--rollout-max-failed-share 0.125.*KeyError: 'a fault"):
                await cluster.run_group(groups[3], Sampling(20), False)
    asyncio.run(run())
