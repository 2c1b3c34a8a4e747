"""How many tokens a request may generate."""

from __future__ import annotations

from tidegate.core.errors import PromptTooLong
from tidegate.gateway.call import Call


class TokenLimit:
    """The limit of one request: the client's, or what the context leaves once the prompt's length is known.

    ``tokens`` is None until then. ``refusal`` is set when prompt and limit do not fit into the context.
    """

    __slots__ = ("_call", "refusal", "tokens")

    def __init__(self, call: Call) -> None:
        self._call = call
        self.tokens: int | None = call.max_tokens
        self.refusal: PromptTooLong | None = None

    def settle(self, prompt_tokens: int, context_tokens: int) -> None:
        """Fix the limit behind a prompt of that length, on an instance with that context."""
        self.tokens = limit = self._call.tokens_within(context_tokens - prompt_tokens)
        if limit < 1 or prompt_tokens + limit > context_tokens:
            field = "messages" if self._call.chat else "prompt"
            self.refusal = PromptTooLong(
                f"the context is {context_tokens} tokens; the prompt has {prompt_tokens} and max_tokens is "
                f"{max(1, limit)}",
                param="max_tokens" if prompt_tokens < context_tokens else field,
            )

    def check(self) -> None:
        """Raise the refusal, if there is one."""
        if self.refusal is not None:
            raise self.refusal

    def remaining(self, generated: int) -> int | None:
        """Return how many tokens may follow the ``generated`` ones; None while that is open."""
        return None if self.tokens is None else self.tokens - generated
