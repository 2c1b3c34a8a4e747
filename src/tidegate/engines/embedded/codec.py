"""The PromptCodec over a fast tokenizer of the transformers library."""

from __future__ import annotations

from typing import Any

from tidegate.core.errors import BadRequest


class TokenizerCodec:
    """Encodes and decodes with ``tokenizer``; conversations go through its chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self.longest_token_chars = max(map(len, self._backend.get_vocab()), default=1)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        # The batch call releases the interpreter lock; the plain one holds it, seconds for a long text.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def encode_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        if self._tokenizer.chat_template is None:
            raise BadRequest("this model has no chat template; use /v1/completions", param="messages")
        try:
            text: str = self._tokenizer.apply_chat_template(
                [_flat(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except BadRequest:
            raise
        except Exception as error:
            # Templates are programs of the model's author and raise whatever they like.
            raise BadRequest(f"messages: the chat template refuses them: {error}", param="messages") from None
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: list[int]) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=False)
        return text


def _flat(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with text parts joined, as templates for text models expect."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = []
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRequest("messages: only content parts of type text are supported", param="messages")
        texts.append(part["text"])
    return {**message, "content": "\n".join(texts)}
