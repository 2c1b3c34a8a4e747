"""Text to token ids and back with a model's own tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tidegate.core.errors import BadRequest, ConfigError
from tidegate.engines.serving.assembling import ByteDecoder, TextAssembler, TextDecoder

_CONTEXT_TOKENS = 6
"""Tokens of the prompt that a window decoder reads, so that leading-space rules see what came before."""

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
"""How SentencePiece names a byte that no other token holds."""

_MAX_UNDECIDED_TOKENS = 8
"""A character has at most 4 bytes, so a longer undecided run is not going to become one."""


class WindowDecoder:
    """For any tokenizer: decodes a short window with and without its newest ids; the rest is new text."""

    def __init__(self, backend: Tokenizer, context: list[int]) -> None:
        self._backend = backend
        self._window = list(context)
        self._read = len(context)

    def add(self, token_id: int) -> str:
        self._window.append(token_id)
        before, after = self._decode(self._read), self._decode(len(self._window))
        undecided = len(self._window) - self._read
        if len(after) <= len(before) or (after.endswith("\ufffd") and undecided <= _MAX_UNDECIDED_TOKENS):
            return ""
        return self._advance(before, after)

    def flush(self) -> str:
        return self._advance(self._decode(self._read), self._decode(len(self._window)))

    def _decode(self, upto: int) -> str:
        return str(self._backend.decode(self._window[:upto], skip_special_tokens=True))

    def _advance(self, before: str, after: str) -> str:
        self._window = self._window[self._read :]
        self._read = len(self._window)
        return after[len(before) :]


class ModelTokenizer:
    """The PromptCodec over a fast tokenizer of transformers, and the maker of text assemblers."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        """``vocab_size`` is the model's: ids that the tokenizer lacks show nothing."""
        self.pretrained = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._special = {
            token_id for token_id, token in self._backend.get_added_tokens_decoder().items() if token.special
        }
        self._pieces = _byte_pieces(self._backend, self._special, vocab_size)
        self.longest_token_chars = max(map(len, self._backend.get_vocab()), default=1)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        # The batch call releases the interpreter lock; the plain one holds it, seconds for a long text.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def encode_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        if self.pretrained.chat_template is None:
            raise BadRequest("this model has no chat template; use /v1/completions", param="messages")
        try:
            text: str = self.pretrained.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except Exception as error:
            # Templates are programs of the model's author and raise whatever they like.
            raise BadRequest(f"messages: the chat template refuses them: {error}", param="messages") from None
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: list[int]) -> str:
        return str(self._backend.decode(token_ids, skip_special_tokens=False))

    def assembler(
        self, prompt_token_ids: tuple[int, ...], generated: int, stops: tuple[str, ...], min_tokens: int
    ) -> TextAssembler:
        """Return an assembler that has replayed the last ``generated`` ids of the prompt."""
        split = len(prompt_token_ids) - generated
        if self._pieces is not None:
            decoder: TextDecoder = ByteDecoder(self._pieces)
        else:
            context = prompt_token_ids[max(0, split - _CONTEXT_TOKENS) : split]
            decoder = WindowDecoder(self._backend, list(context))
        return TextAssembler(decoder, stops, prompt_token_ids[split:], min_tokens)

    def piece(self, token_id: int) -> str:
        """Return the text of one id by itself, special tokens included."""
        return self.decode([token_id])

    def spelt(self, token_id: int) -> bytes:
        """Return the bytes that one id stands for; none for special tokens, which show nothing."""
        if self._pieces is not None:
            return self._pieces[token_id]
        token = self._backend.id_to_token(token_id) or ""
        if token_id in self._special:
            return b""
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(byte[1])
        return token.replace("\u2581", " ").encode()


def load_tokenizer(folder: str | Path) -> Any:
    """Load the folder's tokenizer. Raises ``ConfigError`` when it has none that is a fast one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} has no usable tokenizer: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"the tokenizer of {folder} ({type(tokenizer).__name__}) has no tokenizer.json form"
        )
    return tokenizer


def _byte_pieces(backend: Tokenizer, special: set[int], vocab_size: int) -> list[bytes] | None:
    """Return each id's bytes for a byte-level tokenizer (special tokens are empty), else None."""
    if type(backend.decoder).__name__ != "ByteLevel":
        return None
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
    vocab = backend.get_vocab(with_added_tokens=True)
    pieces = [b""] * max(max(vocab.values()) + 1, vocab_size)
    for token, token_id in vocab.items():
        if token_id in special:
            continue
        if all(char in byte_of for char in token):
            pieces[token_id] = bytes(byte_of[char] for char in token)
        else:
            pieces[token_id] = token.encode()
    return pieces
