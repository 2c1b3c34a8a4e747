"""The token ids of conversations, so that what is read of a later round's history is what its prompt says."""

from __future__ import annotations

from array import array
from collections import OrderedDict

import numpy as np

MOST_TOKENS = 4_000_000
"""How many tokens of conversations are remembered (ours): 16 MB. The longest unused go first."""
ENTRY_TOKENS = 160
"""What a conversation takes besides its tokens, in tokens (measured: 630 bytes): many short ones are bounded
too."""

Key = tuple[tuple[str, str], str]
"""A session as the control plane names it, by tenant and name, and the salt of its cache."""


class Conversations:
    """What was said in conversations, by session and salt. Who holds the KV of it the control plane knows."""

    def __init__(self) -> None:
        self._known: OrderedDict[Key, array[int]] = OrderedDict()
        self._tokens = 0

    def held_of(self, session: tuple[str, str], salt: str, prompt: list[int]) -> int | None:
        """Return how many tokens, but for its last, the prompt begins with that a round of the session ended
        with; None where no round is remembered."""
        known = self._known.get((session, salt))
        if known is None:
            return None
        count = min(len(known), len(prompt) - 1)
        if count < 1:
            return 0
        asked = array("i", prompt[:count])
        differ = np.frombuffer(known, np.intc, count) != np.frombuffer(asked, np.intc)
        first = int(differ.argmax())
        return first if differ[first] else count

    def note(self, session: tuple[str, str], salt: str, ids: list[int]) -> None:
        """Remember the tokens of a round that ended, as far as they have KV."""
        key = session, salt
        old = self._known.pop(key, None)
        self._known[key] = array("i", ids)
        self._tokens += len(ids) - len(old) if old is not None else len(ids) + ENTRY_TOKENS
        while self._tokens > MOST_TOKENS and len(self._known) > 1:
            self._tokens -= len(self._known.popitem(last=False)[1]) + ENTRY_TOKENS
