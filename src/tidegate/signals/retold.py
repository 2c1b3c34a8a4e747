"""How much of an answer's KV the next turn of its conversation finds, where that turn tells it again as text.

An engine finds KV by tokens. A text that is tokenised again need not become the tokens that were generated,
and chat templates leave out or rewrite parts of answers, so that KV is of use up to the first token that
differs. How far that is depends on model, template and clients, and is learnt (ours). Pure: the same answers
give the same shares.
"""

from __future__ import annotations

HALF_LIFE = 512
"""An answer counts for half after so many more of its group (ours)."""
ENOUGH = 16
"""Answers from which on a tenant's own are asked (ours)."""
MOST_GROUPS = 1024


class _Answers:
    """Decaying sums of tokens over answers that were told again."""

    __slots__ = ("found_tokens", "seen", "tokens")

    def __init__(self) -> None:
        self.tokens = 0.0
        self.found_tokens = 0.0
        self.seen = 0

    def add(self, tokens: int, found_tokens: int) -> None:
        keep = 2.0 ** (-1.0 / HALF_LIFE)
        self.tokens = self.tokens * keep + tokens
        self.found_tokens = self.found_tokens * keep + found_tokens
        self.seen += 1


class RetoldAnswers:
    """The share of answers' tokens that later prompts began with, of all tenants and of each that told enough
    again; all of it before the first."""

    def __init__(self) -> None:
        self._all = _Answers()
        self._of: dict[str, _Answers] = {}

    def observed(self, tenant: str, tokens: int, found_tokens: int) -> None:
        """Take note that a prompt which tells an answer of so many ``tokens`` again begins with the first
        ``found_tokens`` of them."""
        self._all.add(tokens, found_tokens)
        own = self._of.pop(tenant, None) or _Answers()
        self._of[tenant] = own  # the longest unheard of is first
        own.add(tokens, found_tokens)
        if len(self._of) > MOST_GROUPS:
            del self._of[next(iter(self._of))]

    def share(self, tenant: str) -> float:
        """Return the share, between 0 and 1, that a later prompt of the tenant is expected to begin with."""
        own = self._of.get(tenant)
        asked = own if own is not None and own.seen >= ENOUGH else self._all
        return asked.found_tokens / asked.tokens if asked.tokens else 1.0
