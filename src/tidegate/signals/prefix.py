"""PREFIX_HITS: which instance's prefix cache holds how much of a prompt's beginning.

An index of block hashes by instance, fed by the control plane from what it sent where. It mirrors engines: a
block counts once all blocks before it are there, and the block that was used longest ago is evicted first.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tidegate.core.request import NOTHING_CACHED


class PromptBlocks(NamedTuple):
    """A prompt as blocks: ``keys[k]`` stands for block k and all blocks before it.

    ``block_tokens`` is the length of a block in tokens; it may be an estimate for a text that nobody has
    tokenised yet. Without ``with_answer`` the keys of a request that has ended name its prompt only, though
    the KV of its answer can be found, too: its tokens are not known where the keys are made.
    """

    keys: Sequence[int]
    block_tokens: float
    with_answer: bool = True

    def within(self, tokens: int) -> PromptBlocks:
        """Return those that begin within the first ``tokens`` tokens."""
        count = math.ceil(tokens / self.block_tokens)
        return self if len(self.keys) <= count else self._replace(keys=self.keys[:count])


NO_BLOCKS = PromptBlocks((), 1.0)
"""A prompt whose blocks are not known."""


class PrefixIndex:
    """The blocks that every instance's prefix cache is expected to hold: gives ``Signal.PREFIX_HITS``.

    ``predicted_tokens`` and ``reported_tokens`` sum what the index expected of prefills that ran, and what
    their engines said was cached (``score``): the two tell how good the index is.
    """

    def __init__(self) -> None:
        self.predicted_tokens = 0
        self.reported_tokens = 0
        self._held: dict[str, OrderedDict[int, float]] = {}
        self._room_tokens: dict[str, float] = {}
        self._where: dict[int, set[str]] = {}

    def instance_up(self, instance_id: str, capacity_tokens: int) -> None:
        """Begin with an empty cache. ``capacity_tokens`` bounds it; 0 means unknown, and no bound."""
        self.instance_down(instance_id)
        self._held[instance_id] = OrderedDict()
        self._room_tokens[instance_id] = float(capacity_tokens or "inf")

    def instance_down(self, instance_id: str) -> None:
        """Forget an instance and all that it held."""
        for key in self._held.pop(instance_id, ()):
            self._forget(key, instance_id)
        self._room_tokens.pop(instance_id, None)

    def sent(self, blocks: PromptBlocks, instance_id: str) -> None:
        """Say that an instance has, or is about to have, the KV of all ``blocks``."""
        held = self._held.get(instance_id)
        if held is None or not blocks.keys:
            return
        room = self._room_tokens[instance_id]
        for key in reversed(blocks.keys):  # first blocks last: a prefix is evicted from its end
            if key in held:
                held.move_to_end(key)
            else:
                held[key] = blocks.block_tokens
                room -= blocks.block_tokens
                self._where.setdefault(key, set()).add(instance_id)
        while room < 0:
            oldest, tokens = held.popitem(last=False)
            self._forget(oldest, instance_id)
            room += tokens
        self._room_tokens[instance_id] = room

    def hits(self, blocks: PromptBlocks, prompt_tokens: int) -> Mapping[str, int]:
        """Return the tokens at the prompt's beginning that each instance holds, for those that hold any.

        A prompt's last token is always computed, as engines do.
        """
        keys = blocks.keys
        if not keys:
            return NOTHING_CACHED
        alive = self._where.get(keys[0])
        if not alive:
            return NOTHING_CACHED
        depth: dict[str, int] = {}
        for count, key in enumerate(keys):
            here = self._where.get(key)
            still = alive & here if here else set()
            for name in alive - still:
                depth[name] = count
            alive = still
            if not alive:
                break
        for name in alive:
            depth[name] = len(keys)
        most = prompt_tokens - 1
        return {name: min(most, int(count * blocks.block_tokens)) for name, count in depth.items()}

    def score(self, predicted_tokens: int, reported_tokens: int) -> None:
        """Take note of what an engine reported as cached beside what was predicted for that prefill."""
        self.predicted_tokens += predicted_tokens
        self.reported_tokens += reported_tokens

    def _forget(self, key: int, instance_id: str) -> None:
        here = self._where[key]
        here.discard(instance_id)
        if not here:
            del self._where[key]
