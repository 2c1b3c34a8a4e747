"""PREFIX_HITS: which instance's prefix cache holds how much of a prompt's beginning.

An index of block hashes by instance, fed by the control plane from what it sent where. It mirrors engines: a
block counts once all blocks before it are there, what requests hold stays, and of the others the one that was
held longest ago is evicted first.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

from tidegate.core.request import NOTHING_CACHED


class PromptBlocks(NamedTuple):
    """A prompt as blocks: ``keys[k]`` stands for block k and all blocks before it.

    ``block_tokens`` is the length of a block in tokens; it may be an estimate for a text that nobody has
    tokenised yet. Without ``with_answer`` the keys of a request that has ended name its prompt only, though
    the KV of its answer can be found, too: its tokens are not known where the keys are made. ``said`` stands
    for a conversation up to its newest answer where more than blocks tell that: of a request that has ended
    with its own answer. ``beyond`` is how much of a block two prompts are expected to share behind the last
    one that both have, where engines would find that.
    """

    keys: Sequence[int]
    block_tokens: float
    with_answer: bool = True
    said: int | None = None
    beyond: float = 0.0

    def within(self, tokens: int) -> PromptBlocks:
        """Return those that begin within the first ``tokens`` tokens."""
        count = math.ceil(tokens / self.block_tokens)
        return self if len(self.keys) <= count else self._replace(keys=self.keys[:count])


NO_BLOCKS = PromptBlocks((), 1.0)
"""A prompt whose blocks are not known."""


@dataclass(slots=True)
class _Cache:
    """One instance's blocks. ``tokens`` has the length of each that is there, ``holders`` how many requests
    in flight hold it, ``idle`` those that none does, the longest idle first. ``legs`` has the keys that each
    of those requests holds, ``awaited`` the tokens of them that are not computed yet."""

    capacity_tokens: float
    room_tokens: float
    """The capacity less all blocks there, but for those that are awaited."""
    held_tokens: float = 0.0
    tokens: dict[int, float] = field(default_factory=dict)
    holders: dict[int, int] = field(default_factory=dict)
    idle: OrderedDict[int, None] = field(default_factory=OrderedDict)
    legs: dict[str, Sequence[int]] = field(default_factory=dict)
    awaited: dict[str, float] = field(default_factory=dict)


class PrefixIndex:
    """The blocks that every instance's prefix cache is expected to hold: gives ``Signal.PREFIX_HITS``.

    What requests in flight on an instance hold stays; of the others those that were held longest ago are
    evicted once the requests' blocks are computed. What requests that wait will need is taken from them
    before any prompt that arrives later is admitted: ``outlasting`` says what such a one still finds.

    ``predicted_tokens`` and ``reported_tokens`` sum what the index expected of prefills that ran, and what
    their engines said was cached (``score``): the two tell how good the index is.
    """

    def __init__(self) -> None:
        self.predicted_tokens = 0
        self.reported_tokens = 0
        self._caches: dict[str, _Cache] = {}
        self._where: dict[int, set[str]] = {}
        self._on: dict[str, list[str]] = {}

    def instance_up(self, instance_id: str, capacity_tokens: int) -> None:
        """Begin with an empty cache. ``capacity_tokens`` bounds it; 0 means unknown, and no bound."""
        self.instance_down(instance_id)
        room = float(capacity_tokens or "inf")
        self._caches[instance_id] = _Cache(room, room)

    def instance_down(self, instance_id: str) -> None:
        """Forget an instance and all that it held."""
        cache = self._caches.pop(instance_id, None)
        if cache is not None:
            for key in cache.tokens:
                self._forget(key, instance_id)

    def sent(self, blocks: PromptBlocks, instance_id: str, request_id: str) -> None:
        """Say that an instance has, or is about to have, the KV of all ``blocks``.

        A request holds them there until it has ``left``; those that it holds already are a part of them.
        """
        cache, keys = self._caches.get(instance_id), blocks.keys
        if cache is None or not keys:
            return
        held = len(cache.legs.get(request_id, ()))
        if held >= len(keys):
            return
        holders, new_tokens = cache.holders, 0.0
        for key in keys[held:]:
            if key not in holders:
                if key in cache.idle:
                    del cache.idle[key]
                else:
                    cache.tokens[key] = blocks.block_tokens
                    new_tokens += blocks.block_tokens
                    self._where.setdefault(key, set()).add(instance_id)
                cache.held_tokens += cache.tokens[key]
            holders[key] = holders.get(key, 0) + 1
        if not held:
            self._on.setdefault(request_id, []).append(instance_id)
        cache.legs[request_id] = keys
        cache.awaited[request_id] = cache.awaited.get(request_id, 0.0) + new_tokens

    def computed(self, request_id: str) -> None:
        """Say that the KV of all that was ``sent`` of a request is there."""
        for instance_id in self._on.get(request_id, ()):
            cache = self._caches.get(instance_id)
            if cache is not None:
                self._arrived(cache, instance_id, request_id)

    def left(self, request_id: str, *, but: str | None = None) -> None:
        """Say that a request holds nothing any more on any instance, or on none but one."""
        for instance_id in self._on.pop(request_id, ()):
            if instance_id == but:
                self._on[request_id] = [instance_id]
                continue
            cache = self._caches.get(instance_id)
            if cache is None:
                continue
            holders = cache.holders
            for key in reversed(cache.legs.pop(request_id, ())):  # a prefix is evicted from its end
                count = holders[key] - 1
                if count:
                    holders[key] = count
                else:
                    del holders[key]
                    cache.held_tokens -= cache.tokens[key]
                    cache.idle[key] = None
            self._arrived(cache, instance_id, request_id)

    def _arrived(self, cache: _Cache, instance_id: str, request_id: str) -> None:
        cache.room_tokens -= cache.awaited.pop(request_id, 0.0)
        while cache.room_tokens < 0 and cache.idle:
            oldest, _ = cache.idle.popitem(last=False)
            cache.room_tokens += cache.tokens.pop(oldest)
            self._forget(oldest, instance_id)

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
        block, beyond = blocks.block_tokens, blocks.beyond
        return {name: min(most, int((count + beyond) * block)) for name, count in depth.items()}

    def outlasting(self, cached: Mapping[str, int], blocks: PromptBlocks) -> Mapping[str, int]:
        """Return ``cached``, the tokens of a prompt that each instance holds, less those that will have been
        evicted when it is admitted behind all that is in flight there.

        Of each request in flight a block more is counted than it names: for its prompt's end and its answer.
        """
        less = {}
        for name, tokens in cached.items():
            cache = self._caches[name]
            spare = cache.capacity_tokens - cache.held_tokens - len(cache.legs) * blocks.block_tokens
            if spare < tokens:
                held = sum(1 for _ in takewhile(cache.holders.__contains__, blocks.keys))
                less[name] = min(tokens, max(int(held * blocks.block_tokens), int(spare)))
        return {**cached, **less} if less else cached

    def score(self, predicted_tokens: int, reported_tokens: int) -> None:
        """Take note of what an engine reported as cached beside what was predicted for that prefill."""
        self.predicted_tokens += predicted_tokens
        self.reported_tokens += reported_tokens

    def _forget(self, key: int, instance_id: str) -> None:
        here = self._where[key]
        here.discard(instance_id)
        if not here:
            del self._where[key]
