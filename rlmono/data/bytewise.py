"""`ByteTable`: text from the ids of a byte-level vocabulary, as those of GPT-2, Llama 3, Qwen, GLM and DeepSeek, in a fraction of the usual time.

There a text is its tokens' bytes, one after the other. Looked up token by token, 8k of 150,000 tokens are 8k misses of the cache, which is what
takes a tokenizer 5 ms; numpy gathers rows of bytes at once, and what fills them up is deleted. For few tokens it takes longer to call numpy.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from rlmono.data.numbers import to_bytes

_CHECKED = 2000
"""Tokens on which a new table is compared with the tokenizer."""
_FEW = 1000
"""Fewer tokens are looked up one by one."""
_WIDTH = 16
"""Bytes of a row; a longer token has several."""
_FILL = b"\xff"
"""Fills rows up: no byte of UTF-8."""


class ByteTable:
    """The bytes of all tokens. Build it with `byte_table`."""

    def __init__(self, tokens: Mapping[int, bytes], special: frozenset[int]) -> None:
        pieces = [tokens.get(i, b"") for i in range(max(tokens, default=-1) + 1)]
        self._pieces = [p.decode("latin-1") for p in pieces]        # a character for a byte: Python joins small strings faster than small bytes
        self._plain_pieces = ["" if i in special else p for i, p in enumerate(self._pieces)]
        filled = [p.ljust(max(-(-len(p) // _WIDTH), 1) * _WIDTH, _FILL) for p in pieces]
        self._rows = np.frombuffer(_FILL * _WIDTH + b"".join(filled), f"V{_WIDTH}")         # the first is empty
        self._numbers = np.array([len(p) // _WIDTH for p in filled], np.int32)
        self._first = 1 + np.cumsum(self._numbers, dtype=np.int32) - self._numbers
        skipped = np.isin(np.arange(len(pieces)), list(special))
        self._plain_numbers, self._plain_first = np.where(skipped, 1, self._numbers), np.where(skipped, 0, self._first)
        self._has_fill = np.array([_FILL in p for p in pieces])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """What the tokenizer makes of them. IndexError for an id that it does not have."""
        if not ids:
            return ""
        if len(ids) >= _FEW and (text := self._gathered(np.frombuffer(to_bytes("i", ids), np.int32), skip_special_tokens)) is not None:
            return text
        if min(ids) < 0:
            raise IndexError(f"token {min(ids)}")
        table = self._plain_pieces if skip_special_tokens else self._pieces
        found = itemgetter(*ids)(table)
        return "".join(found).encode("latin-1").decode("utf-8", "replace")

    def _gathered(self, ids: np.ndarray[Any, Any], skip_special_tokens: bool) -> str | None:
        """None where a token has the byte that fills."""
        if ids.min() < 0:
            raise IndexError(f"token {ids.min()}")
        if self._has_fill.take(ids).any():
            return None
        numbers = (self._plain_numbers if skip_special_tokens else self._numbers).take(ids)
        rows = (self._plain_first if skip_special_tokens else self._first).take(ids)
        if numbers.max() > 1:
            ends = np.cumsum(numbers, dtype=np.int32)
            rows = np.repeat(rows - ends + numbers, numbers) + np.arange(ends[-1], dtype=np.int32)
        return self._rows.take(rows).tobytes().translate(None, _FILL).decode("utf-8", "replace")


def byte_table(backend: Any) -> ByteTable | None:
    """The table of a `tokenizers.Tokenizer`; None where its texts are not made so."""
    from tokenizers import decoders
    if type(backend.decoder) is not decoders.ByteLevel:
        return None
    byte_of = _bytes_of_characters()
    tokens = {}
    for token, i in backend.get_vocab(with_added_tokens=True).items():
        try:
            tokens[i] = bytes([byte_of[c] for c in token])
        except KeyError:        # an added token with a space, or of another script, stands for itself
            tokens[i] = token.encode()
    table = ByteTable(tokens, frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special))
    ids = random.Random(0).choices(sorted(tokens), k=_CHECKED)
    same = all(table.decode(ids, skip) == backend.decode(ids, skip_special_tokens=skip) for skip in (False, True))
    return table if same else None


def _bytes_of_characters() -> dict[str, int]:
    """Byte-level vocabularies write each byte as a character: itself where that is printable and no space, else one from U+0100 on."""
    written = {chr(byte): byte for byte in range(0x100) if chr(byte).isprintable() and byte != 0x20}
    others = [byte for byte in range(0x100) if chr(byte) not in written]
    return written | {chr(0x100 + i): byte for i, byte in enumerate(others)}
