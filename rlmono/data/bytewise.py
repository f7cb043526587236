"""`ByteTable`: text from the ids of a byte-level vocabulary, as those of GPT-2, Llama 3, Qwen, GLM and DeepSeek, in a fraction of the usual time.

There a text is its tokens' bytes, one after the other: a look-up each. 8k tokens take half a millisecond (one or two where all of 150,000 tokens
are equally frequent: then memory is what takes time), and 5 with the tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

_CHECKED = 2000
"""Tokens on which a new table is compared with the tokenizer."""


class ByteTable:
    """The bytes of every token, and of those that are not special. Build it with `byte_table`.

    Bytes are kept as characters up to U+00FF: Python joins many small strings faster than many small bytes.
    """

    def __init__(self, tokens: Mapping[int, str], special: frozenset[int]) -> None:
        ids = range(max(tokens, default=-1) + 1)
        self._all = [tokens.get(i, "") for i in ids]
        self._plain = ["" if i in special else tokens.get(i, "") for i in ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """What the tokenizer makes of them. IndexError for an id that it does not have."""
        if min(ids, default=0) < 0:
            raise IndexError(f"token {min(ids)}")
        table = self._plain if skip_special_tokens else self._all
        return "".join(map(table.__getitem__, ids)).encode("latin-1").decode("utf-8", "replace")


def byte_table(backend: Any) -> ByteTable | None:
    """The table of a `tokenizers.Tokenizer`; None where its texts are not made so."""
    from tokenizers import decoders
    if type(backend.decoder) is not decoders.ByteLevel:
        return None
    byte_of = _bytes_of_characters()
    tokens = {}
    for token, i in backend.get_vocab(with_added_tokens=True).items():
        try:
            tokens[i] = "".join([byte_of[c] for c in token])
        except KeyError:        # an added token with a space, or of another script, stands for itself
            tokens[i] = token.encode().decode("latin-1")
    table = ByteTable(tokens, frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special))
    ids = random.Random(0).choices(sorted(tokens), k=_CHECKED)
    same = all(table.decode(ids, skip) == backend.decode(ids, skip_special_tokens=skip) for skip in (False, True))
    return table if same else None


def _bytes_of_characters() -> dict[str, str]:
    """Byte-level vocabularies write each byte as a character: itself where that is printable and no space, else one from U+0100 on."""
    written = {c: c for c in map(chr, range(0x100)) if c.isprintable() and c != " "}
    others = [c for c in map(chr, range(0x100)) if c not in written]
    return written | {chr(0x100 + i): c for i, c in enumerate(others)}
