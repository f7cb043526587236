"""`Tokenizer`: the tokenizer and chat template of an HF folder, and the chat loss mask of supervised fine-tuning."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlmono.data.bytewise import ByteTable, byte_table

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None
_ANSWER = "AnswerOfTheAssistant"


class TokenizerError(ValueError):
    """A folder without a usable tokenizer or template, or a prompt that they cannot render."""


class Tokenizer:
    """Loads from `folder` alone, never from a network. TokenizerError when there is no tokenizer in it."""

    def __init__(self, folder: str) -> None:
        self.folder = str(folder)
        if not Path(folder).is_dir():
            raise TokenizerError(f"{Path(folder).absolute()}: no such folder; --hf-checkpoint must be an HF folder with a tokenizer")
        self.hf = _load(self.folder)
        self.eos_ids: tuple[int, ...] = _eos_ids(Path(folder), self.hf.eos_token_id)
        """Ids that end a response, ascending: of generation_config.json (else config.json) and the tokenizer's own."""
        self.pad_id: int | None = self.hf.pad_token_id

    def __len__(self) -> int:
        return len(self.hf)

    def render(self, prompt: str | Messages, tools: Tools = None, apply_chat_template: bool = False) -> list[int]:
        """Token ids of a prompt, ready for the answer. No special tokens are added beside the template's."""
        if apply_chat_template:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return self._encode(self._template(messages, tools, add_generation_prompt=True))
        if not isinstance(prompt, str):
            raise TokenizerError("a prompt of messages needs the chat template: set --apply-chat-template")
        return self._encode(prompt)

    def continuation(self, tokens: Sequence[int], before: Messages, new: Messages, tools: Tools = None) -> list[int]:
        """What goes on after `tokens`, the prompt of `before` and the assistant's answer to it, when `new` messages follow: the end of the
        answer's turn (unless it is there), the messages, and all that comes before the next answer.

        The answer's own text plays no part in it: it is rendered with another in its place, and read from there on.
        TokenizerError when the template leaves answers out.
        """
        text = self._template([*before, {"role": "assistant", "content": _ANSWER}, *new], tools, add_generation_prompt=True)
        _, found, rest = text.rpartition(_ANSWER)
        if not found:
            raise TokenizerError(f"the chat template of {self.folder} leaves an assistant's answer out when {new[0]['role']!r} follows it")
        ids = self._encode(rest)
        return ids[1:] if ids and tokens and ids[0] == tokens[-1] else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        if self.byte_table is not None:
            try:
                return self.byte_table.decode(ids, skip_special_tokens)
            except IndexError:      # models have more ids than their tokenizers
                pass
        return self.hf.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def decode_batch(self, batch: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        """`decode` of each. Where the folder has a fast tokenizer it works on several at once and without Python's lock."""
        if self._decodes_in_rust:
            return self.hf.backend_tokenizer.decode_batch([list(ids) for ids in batch], skip_special_tokens=skip_special_tokens)
        return [self.decode(ids, skip_special_tokens) for ids in batch]

    @functools.cached_property
    def byte_table(self) -> ByteTable | None:
        """Where there is one, `decode` takes next to no time."""
        return byte_table(self.hf.backend_tokenizer) if self._decodes_in_rust else None

    @functools.cached_property
    def _decodes_in_rust(self) -> bool:
        """It is a fast tokenizer, and no model's class has a way of its own to decode."""
        from transformers import PreTrainedTokenizerFast
        kind = type(self.hf)
        fast = PreTrainedTokenizerFast
        return issubclass(kind, fast) and (kind.decode, kind._decode) == (fast.decode, fast._decode)

    def chat_with_mask(self, messages: Messages, tools: Tools = None) -> tuple[list[int], list[int]]:
        """A conversation's ids, and a loss mask of the same length: 1 on what the assistant says and on the token that
        ends its turn, else 0. TokenizerError where the rendering up to a turn is not a prefix of the whole."""
        ids = self._encode(self._template(messages, tools, add_generation_prompt=False))
        mask = [0] * len(ids)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise TokenizerError("a conversation without a message of the assistant has nothing to learn")
        for turn in turns:
            start = self._prefix(ids, messages[:turn], tools, turn, add_generation_prompt=True)
            end = self._prefix(ids, messages[:turn + 1], tools, turn, add_generation_prompt=False)
            # What a template writes after the end-of-turn token (a newline, say) is no part of the answer.
            stops = [i for i in range(start, end) if ids[i] in self.eos_ids]
            end = stops[-1] + 1 if stops else end
            mask[start:end] = [1] * (end - start)
        return ids, mask

    def _prefix(self, ids: list[int], messages: Messages, tools: Tools, turn: int, add_generation_prompt: bool) -> int:
        """The length of these first messages in tokens, which must be the first of `ids`."""
        prefix = self._encode(self._template(messages, tools, add_generation_prompt))
        if prefix != ids[:len(prefix)]:
            same = next(i for i, (a, b) in enumerate(zip(prefix, [*ids, None], strict=False)) if a != b)
            before, after = self.decode(prefix[same:same + 12]), self.decode(ids[same:same + 12])
            raise TokenizerError(
                f"the chat template of {self.folder} renders the messages up to number {turn} (assistant) in another way when more "
                f"follow, so the answer's tokens cannot be told apart: {before!r} against {after!r} at token {same}. Write one "
                "conversation for each answer, or use a template that renders a turn always in the same way")
        return len(prefix)

    def _encode(self, text: str) -> list[int]:
        try:
            return self.hf.encode(text, add_special_tokens=False)
        except Exception as error:      # the Rust side raises bare Exceptions
            raise TokenizerError(f"the tokenizer of {self.folder} cannot encode {text[:80]!r}: {error}") from error

    def _template(self, messages: Messages, tools: Tools, add_generation_prompt: bool) -> str:
        if not self.hf.chat_template:
            raise TokenizerError(f"{self.folder}: the tokenizer has no chat template; add chat_template.jinja, or leave "
                                 "--apply-chat-template out")
        try:
            return self.hf.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt)
        except Exception as error:      # templates are programs: they raise whatever they like
            roles = ", ".join(str(message.get("role")) for message in messages) or "none"
            raise TokenizerError(f"the chat template of {self.folder} refuses messages with roles {roles}: {error}") from error


def _load(folder: str) -> Any:
    from transformers import AutoTokenizer  # seconds to import, and it brings torch

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True)
    except Exception as error:      # missing and malformed files show in many ways
        files = sorted(path.name for path in Path(folder).iterdir() if "token" in path.name or path.name.startswith("vocab"))
        raise TokenizerError(f"{folder}: no usable tokenizer (its tokenizer files: {', '.join(files) or 'none'}): {error}") from error


def _eos_ids(folder: Path, own: int | None) -> tuple[int, ...]:
    ids = set() if own is None else {own}
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except ValueError as error:
            raise TokenizerError(f"{path}: not JSON: {error}") from error
        if found is not None:
            return tuple(sorted(ids | set([found] if isinstance(found, int) else found)))
    return tuple(sorted(ids))
