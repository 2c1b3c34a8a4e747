"""How long a text prompt is, before an engine has said so."""

from __future__ import annotations

CHARS_PER_TOKEN = 4.0
"""First guess for text prompts, until engines have told lengths (a common rule of thumb)."""


class TokenEstimate:
    """Guesses a text prompt's token count from the prompts seen so far."""

    def __init__(self) -> None:
        self._chars_per_token = CHARS_PER_TOKEN

    def tokens(self, chars: int) -> int:
        """Return the expected length, at least 1."""
        return max(1, round(chars / self._chars_per_token))

    def observe(self, chars: int, tokens: int) -> None:
        """Learn from a prompt whose length became known."""
        if chars and tokens:
            self._chars_per_token += 0.2 * (chars / tokens - self._chars_per_token)
