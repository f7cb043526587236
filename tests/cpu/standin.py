"""A host with an engine that answers from a script, in this process: the rollout's own code, and no model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import zmq.asyncio

from rlmono.config.schema import Config
from rlmono.data.numbers import to_bytes
from rlmono.data.sample import Sample
from rlmono.data.tokenizer import Tokenizer
from rlmono.rollout.engines import EngineClient
from rlmono.rollout.host import NodeHost
from rlmono.world.channel import PrivateFolder
from rlmono.world.messages import Abort, Generate, GroupDone, Message, Output, Outputs, RunGroup, Sampling
from rlmono.world.roles import RankGrid

VERSION = 7
Answers = Callable[[list[int]], Any]
"""The answer to these tokens: token ids, or (ids, finish); None for none at all."""


class ScriptedEngine(EngineClient):
    """Answers each request in the next turn of the loop; one that it is told to leave open, only when it is aborted. `text` is that of ids,
    where it sends it."""

    def __init__(self, answers: Answers, text: Callable[[list[int]], str | None] = lambda _: None):
        super().__init__("engine 0", self._take, concurrency=64)
        self.answers, self.text = answers, text
        self.requests: list[Generate] = []
        self.aborted: list[str] = []

    def _take(self, message: Message) -> None:
        loop = asyncio.get_running_loop()
        if isinstance(message, Generate):
            self.requests.append(message)
            if (answer := self.answers(message.input_ids)) is not None:
                ids, finish = answer if isinstance(answer, tuple) else (answer, "stop")
                ids = list(ids)[:message.sampling.max_new_tokens]
                finish = "length" if len(ids) == message.sampling.max_new_tokens and finish == "stop" else finish
                numbers = to_bytes("i", ids), to_bytes("f", log_probs(message.input_ids, ids))      # as an engine sends them
                output = Output(message.rid, *numbers, finish, VERSION, text=self.text(ids))
                loop.call_soon(self.deliver, Outputs([output]))
        elif isinstance(message, Abort):
            self.aborted.append(message.rid)
            loop.call_soon(self.deliver, Outputs([Output(message.rid, [], [], "abort", VERSION)]))


def log_probs(context: Sequence[int], ids: Sequence[int]) -> list[float]:
    """What the stand-in gives each token: it depends on all that stands before, so a wrong place shows."""
    return [-(1 + (len(context) + i) % 13 + ids[i] / 1024) for i in range(len(ids))]


def make_config(tokenizer: Tokenizer, function: str | None = None, **options: Any) -> Config:
    values: dict[str, Any] = dict(hf_checkpoint=tokenizer.folder, custom_generate_function_path=function, apply_chat_template=True, colocate=True,
                                  rm_type="math", model={"vocab_size": len(tokenizer), "max_position_embeddings": 512}, deterministic=True)
    return Config(**values | options)


class Standin:
    """`async with Standin(config, answers) as host`: `host.run(samples)` is what the controller would get."""

    def __init__(self, config: Config, answers: Answers):
        self.config, self.engine = config, ScriptedEngine(answers)

    async def __aenter__(self) -> Standin:
        self._folder, self._context = PrivateFolder("standin"), zmq.asyncio.Context()
        grid = RankGrid(1, 2, (0,), ((0,),), 1, 1, 1)
        self.host = NodeHost(self.config, grid, 1, self._folder, self._context, lambda *_: None)
        self.host.engines[0] = self.engine
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.host.close()
        self._context.destroy(linger=0)
        self._folder.close()

    async def run(self, samples: list[Sample], evaluation: bool = False, **sampling: Any) -> GroupDone:
        parameters = Sampling(**{"max_new_tokens": 200, **sampling})
        return await asyncio.wait_for(self.host.run_group(RunGroup(0, 0, samples, parameters, evaluation)), 30)


def run_group(config: Config, answers: Answers, samples: list[Sample], evaluation: bool = False, **sampling: Any) -> tuple[GroupDone, ScriptedEngine]:
    async def run() -> tuple[GroupDone, ScriptedEngine]:
        async with Standin(config, answers) as host:
            return await host.run(samples, evaluation, **sampling), host.engine
    return asyncio.run(run())


def make_folder(folder: Path, *words: str) -> Tokenizer:
    """A tokenizer of characters, and of these words, with the roles user, assistant and tool."""
    from rlmono.agents.calculator import LANGUAGE
    from rlmono.quickstart import Language, write_tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, Language(LANGUAGE.roles, (*LANGUAGE.words, *words)))
    return Tokenizer(str(folder))
