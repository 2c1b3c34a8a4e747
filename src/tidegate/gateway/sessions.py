"""What instances hold of conversations, so that a later round need not compute it again."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import takewhile

from tidegate.fleet.member import Member
from tidegate.gateway.call import Call
from tidegate.policies.pricing import worth_reading_back

MOST_TOKENS = 4_000_000
"""How many tokens of conversations are remembered (ours): 16 MB. The longest unused go first."""
ENTRY_TOKENS = 160
"""What a conversation takes besides its tokens, in tokens (measured: 630 bytes): many short ones are bounded
too."""

Key = tuple[str, str, str]


@dataclass(slots=True)
class Conversation:
    """``ids`` are the last round's prompt and answer, whose KV is in the prefix cache of instance ``on``.

    ``seen`` tells how many of them other instances have prefilled.
    """

    on: str
    engine_id: str
    ids: array[int]
    seen: dict[str, int] = field(default_factory=dict)

    def worth_reading(self, prompt: list[int], member: Member) -> int:
        """Return how many tokens of ``prompt`` the member should read back from here; 0 for none."""
        pairs = zip(self.ids, prompt[:-1], strict=False)
        held = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        here = min(held, self.seen.get(member.instance.id, 0))
        instance = member.instance
        worth = worth_reading_back(
            len(prompt), held, here, instance.block_tokens, member.profile, instance.kv_bytes_per_token
        )
        return held if worth else 0


class Conversations:
    """Conversations by tenant, salt and session."""

    def __init__(self) -> None:
        self._known: OrderedDict[Key, Conversation] = OrderedDict()
        self._tokens = 0

    def find(self, call: Call) -> Conversation | None:
        """Return the conversation that the call goes on with, if it is remembered."""
        return self._known.get(_key(call))

    def note(
        self, call: Call, on: Member, ids: list[int], prefill_on: str | None, prompt_tokens: int
    ) -> None:
        """Remember a round that ended on a member."""
        key = _key(call)
        old = self._known.pop(key, None)
        known = Conversation(on.instance.id, on.engine_id, array("i", ids), {} if old is None else old.seen)
        if prefill_on is not None:
            known.seen[prefill_on] = prompt_tokens
        known.seen[on.instance.id] = len(ids)
        self._known[key] = known
        self._tokens += len(ids) - len(old.ids) if old is not None else len(ids) + ENTRY_TOKENS
        while self._tokens > MOST_TOKENS and len(self._known) > 1:
            self._tokens -= len(self._known.popitem(last=False)[1].ids) + ENTRY_TOKENS

    def forget_instance(self, instance_id: str) -> None:
        """Say that an instance lost what it held."""
        for known in self._known.values():
            known.seen.pop(instance_id, None)


def _key(call: Call) -> Key:
    return call.tenant, call.salt, call.session
