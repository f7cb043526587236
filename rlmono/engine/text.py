"""`OutputTexts`: the text of a finished response, made in the engine's rank: a node has one host and many engines, and on the host's event loop
8k tokens would hold up every other request for a millisecond."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from rlmono.data.bytewise import ByteTable
from rlmono.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class OutputTexts:
    """With the tokenizer of `folder`, which is read in a thread, beside the first update. Build it when all is imported."""

    def __init__(self, folder: str, skip_special_tokens: bool):
        self._skip_special_tokens = skip_special_tokens
        thread = ThreadPoolExecutor(1, "tokenizer")
        self._table: Future[ByteTable | None] = thread.submit(_table, folder)
        thread.shutdown(wait=False)

    def of(self, ids: Sequence[int]) -> str | None:
        """As the host would decode it. None where that is for the host to do: the tokenizer has not been read yet, has no table of bytes,
        or does not know an id."""
        if not self._table.done() or (table := self._table.result()) is None:
            return None
        try:
            return table.decode(ids, self._skip_special_tokens)
        except IndexError:
            return None


def _table(folder: str) -> ByteTable | None:
    try:
        return Tokenizer(folder).byte_table
    except Exception as e:      # the host needs a tokenizer, and decodes where the engine does not
        log.warning("the host will make the text of responses: %s: %s", type(e).__name__, e)
        return None
