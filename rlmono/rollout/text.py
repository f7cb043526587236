"""`Texts`: text from tokens. At once where the tokenizer has a table of bytes (`data/bytewise.py`). Else beside the event loop: 8k tokens take
5 ms, in which nothing else would be answered."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rlmono.data.tokenizer import Tokenizer


class Texts:
    """Decodes at once, or in a thread, many responses at a time: those that are asked for while a batch is at work are the next batch."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self._at_once = tokenizer.byte_table is not None        # made here, and not at the first answer
        self._queue: list[tuple[Sequence[int], asyncio.Future[str]]] = []
        self._thread = ThreadPoolExecutor(1, "texts")
        self._working: asyncio.Task[None] | None = None

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens. Raises what the tokenizer raises."""
        if self._at_once:
            return self._tokenizer.decode(ids, self._skip_special_tokens)
        text: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._queue.append((ids, text))
        if self._working is None:
            self._working = asyncio.create_task(self._work(), name="decoding")
        return await text

    async def _work(self) -> None:
        try:
            while self._queue:
                batch, self._queue = self._queue, []
                await self._decode([(ids, text) for ids, text in batch if not text.done()])
        finally:
            self._working = None

    async def _decode(self, batch: list[tuple[Sequence[int], asyncio.Future[str]]]) -> None:
        ids = [ids for ids, _ in batch]
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._thread, self._tokenizer.decode_batch, ids, self._skip_special_tokens)
        except Exception as e:
            for _, text in batch:
                if not text.done():
                    text.set_exception(e)
            return
        for (_, text), decoded in zip(batch, found, strict=True):
            if not text.done():         # whoever asked has been cancelled
                text.set_result(decoded)

    def close(self) -> None:
        """After the last call has returned, or when nobody waits any more."""
        if self._working is not None:
            self._working.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)
