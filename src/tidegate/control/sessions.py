"""Sessions in the control plane: what is held of a request's conversation, where, and for how much longer.

A session is bound to the instance on which its last turn was decoded, which owns its KV (AMPD, section 4.4).
The ledger keeps the binding (``Ledger.sessions``); the rules by which it is used, moved and given up are
here, and are the same live and simulated. All of it is expectation: engines find KV by its tokens, so that a
wrong one costs time and never a token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import NamedTuple

from msgspec.structs import replace

from tidegate.control.live_request import LiveRequest
from tidegate.core.decision import Migrate
from tidegate.core.request import NOTHING_CACHED, Request
from tidegate.core.session import History
from tidegate.costs.forms import PrefillCost, attention_work
from tidegate.journal.schema import SessionLine
from tidegate.journal.writer import JournalWriter
from tidegate.ledger.ledger import Ledger
from tidegate.ledger.sessions import MOST_SESSIONS, SessionEntry, SessionKey
from tidegate.ledger.snapshot import Field, Snapshot
from tidegate.signals.prefix import NO_BLOCKS, PromptBlocks
from tidegate.signals.retold import RetoldAnswers
from tidegate.signals.think_times import ThinkTimes

LEAST_TOLD_TOKENS = 64
"""How many tokens that an earlier turn had computed are computed again before the journal says so (ours)."""
UNNAMED = "~"
"""What the name of a session begins with that no client named; the id of its first request follows."""


class BoundSessions:
    """Follows the sessions of one plane's requests; where ``unnamed`` also those that their prompts tell.

    ``told_tokens`` sums what a cache that forgets nothing would have had of the prompts that were prefilled,
    and ``computed_again_tokens`` how many of those an engine computed all the same.
    """

    def __init__(
        self,
        ledger: Ledger,
        journal: JournalWriter,
        asked: Callable[[LiveRequest], Request],
        *,
        unnamed: bool,
    ) -> None:
        self.told_tokens = 0
        self.computed_again_tokens = 0
        self._ledger = ledger
        self._sessions = ledger.sessions
        self._journal = journal
        self._asked = asked
        self.unnamed = unnamed
        self._think = ThinkTimes()
        self._retold = RetoldAnswers()
        self._idle: OrderedDict[SessionKey, None] = OrderedDict()
        self._ends: OrderedDict[int, SessionKey] = OrderedDict()

    # requests

    def arrived(self, live: LiveRequest, now: float) -> None:
        """Find the session of a new request, and say what its turn finds there that is worth saying."""
        if not (live.named or self.unnamed):
            return
        request = live.as_request()
        name = request.session or (self._name_of(live, request) if self.unnamed else "")
        if not name:
            return
        live.session = request.tenant, name
        live.prompt_blocks = int(request.prompt_tokens // live.blocks.block_tokens)
        entry = self._sessions.find(live.session)
        if entry is None:
            return
        if entry.live == 0:
            pause_s = now - entry.last_s
            self._think.observed(request.tenant, pause_s)
            if entry.instance and pause_s > self._think.ttl_s(request.tenant):
                self._give_up(entry, "expired", now)
        known = self._known(entry, live.blocks, request.prompt_tokens)
        live.told_tokens, live.retells = known.tokens, known.retells
        if entry.live:
            self._say(entry, "overlaps", now, live.id, known.tokens)
        elif known.contradicted:
            self._say(entry, "shortened", now, live.id, known.tokens)

    def asked(self, live: LiveRequest) -> Request:
        """Return the request as placements see it, with the history that was found for it unless that is
        lost by now."""
        request = self._asked(live)
        if live.session is None:
            return request
        if live.history is not None and live.history.on not in self._ledger.ids:
            live.history = None
        return replace(request, session=live.session[1], history=live.history)

    def found(
        self, live: LiveRequest, request: Request, hits: Mapping[str, int] | None, view: Snapshot
    ) -> Request:
        """Return the request with what is held of its prompt: in the prefix caches, as far as ``hits`` knows
        (None: not at all), and by the instance to which its session is bound."""
        live.history = None
        entry = None if live.session is None else self._sessions.find(live.session)
        if live.session is None or entry is None or not entry.instance:
            return replace(request, cached=hits) if hits else request
        known, on = self._known(entry, live.blocks, request.prompt_tokens), entry.instance
        tokens = known.tokens
        if hits is not None and tokens:
            here = hits.get(on, 0)
            if here < known.named_tokens:
                tokens = here
            if not here and known.named_tokens:
                self._give_up(entry, "evicted", view.at_s)
            elif known.retells is not None and on in view.index:  # measured, where ``hits`` has estimates
                block = int(view.cells[Field.BLOCK_TOKENS, view.index[on]])
                hits = {**hits, on: tokens - tokens % block}
        if tokens:
            live.history = History(on, tokens)
        return replace(request, cached=hits or NOTHING_CACHED, history=live.history)

    def prefilled(
        self, live: LiveRequest, had_tokens: int, now: float, shared_tokens: int | None = None
    ) -> None:
        """Take note that an engine had so many tokens of a prompt, in its cache or from another instance.

        ``shared_tokens`` is how many tokens its session's last turn and the prompt both begin with, where the
        tokens of both are known.
        """
        told_tokens, live.told_tokens = live.told_tokens, 0
        if not told_tokens:
            return
        if shared_tokens is not None:
            told_tokens = shared_tokens
            if live.retells is not None and live.session is not None:
                begins, tokens = live.retells
                found_tokens = min(tokens, max(0, shared_tokens - begins))
                self._retold.observed(live.session[0], tokens, found_tokens)
        again = max(0, told_tokens - had_tokens)
        self.told_tokens += told_tokens
        self.computed_again_tokens += again
        entry = self._entry(live)
        if again >= LEAST_TOLD_TOKENS and entry is not None:
            self._say(entry, "rebuilt", now, live.id, again, entry.gone)

    def ended(self, live: LiveRequest, *, whole: bool, now: float) -> None:
        """Take note that a request is over, which the ledger knows."""
        entry = self._entry(live)
        if entry is None or not whole or not entry.instance:
            return
        blocks, count = live.blocks, len(live.blocks.keys)
        if blocks.with_answer:
            count = min(count, int((entry.context_tokens - 1) // blocks.block_tokens))
        if entry.end is not None and self._ends.get(entry.end) == entry.key:
            del self._ends[entry.end]
        entry.block_keys, entry.names_answer = tuple(blocks.keys[:count]), blocks.with_answer
        entry.gone, entry.gone_tokens = "", 0
        request = live.as_request()
        entry.prompt_tokens = request.prompt_tokens - request.generated
        self._idle[entry.key] = None
        self._idle.move_to_end(entry.key)
        answered = blocks.with_answer and count > live.prompt_blocks  # the last block ends in the answer
        entry.end = entry.block_keys[-1] if answered else blocks.said
        if entry.end is not None and entry.key[1].startswith(UNNAMED):
            self._ends.pop(entry.end, None)
            self._ends[entry.end] = entry.key
            if len(self._ends) > MOST_SESSIONS:
                self._ends.popitem(last=False)
        if entry.said_on != entry.instance:
            self._say(entry, "bound", now, live.id)

    def moved(self, live: LiveRequest, migrate: Migrate, now: float) -> None:
        """Take note that a request's decode went to another instance, and what it goes on from with it."""
        entry, history = self._entry(live), live.history
        if entry is not None and history is not None and entry.instance == history.on == migrate.src:
            self._sessions.bind(entry, migrate.dst, entry.context_tokens)
            live.history = History(migrate.dst, history.tokens)
            self._say(entry, "moved", now, live.id)

    # instances and time

    def instance_down(self, instance_id: str, now: float) -> None:
        """Give up what is bound to an instance that goes. The ledger still has it."""
        for entry in self._sessions.bound_to(instance_id):
            self._give_up(entry, "lost", now)

    def window_closed(self, now: float) -> None:
        """Give up sessions that nobody is expected to go on with, and those for which there is no room."""
        while self._idle:
            key = next(iter(self._idle))
            entry = self._sessions.find(key)
            if entry is not None and entry.instance and not entry.live:
                if now - entry.last_s <= self._think.ttl_s(key[0]):
                    break
                self._give_up(entry, "expired", now)
            del self._idle[key]
        if any(self._sessions.held_tokens.values()):
            self._make_room(self._ledger.snapshot(now), now)

    def _make_room(self, snapshot: Snapshot, now: float) -> None:
        """Where idle sessions take more than what decodes leave, give up first what is cheapest to compute
        again, per token and as likely as it is asked for (ours)."""
        free_tokens, held_tokens = snapshot.free_tokens, self._sessions.held_tokens
        for at, name in enumerate(snapshot.ids):
            if held_tokens.get(name, 0) <= free_tokens[at]:
                continue
            idle = [entry for entry in self._sessions.bound_to(name) if not entry.live]
            excess = sum(entry.context_tokens for entry in idle) - free_tokens[at]
            prefill = snapshot.costs.at(at).prefill
            idle.sort(key=lambda entry: self._worth(entry, prefill, now))
            for entry in idle:
                if excess <= 0:
                    break
                excess -= entry.context_tokens
                self._give_up(entry, "evicted", now)

    def _worth(self, entry: SessionEntry, prefill: PrefillCost, now: float) -> float:
        """Return the seconds per token that an idle session's KV is expected to save: its turn is prefilled
        either way."""
        tokens = entry.context_tokens
        again_s = float(prefill.seconds(tokens, attention_work(tokens, 0)) - prefill.seconds(0, 0.0))
        return self._think.returns(entry.key[0], now - entry.last_s) * again_s / tokens

    # parts

    def _name_of(self, live: LiveRequest, request: Request) -> str:
        """Name the session of a request that names none: that whose newest answer is furthest into its
        prompt, unless another turn of it is in flight: two clients may have been told the same. What many
        conversations begin with makes none of them one."""
        if live.blocks is NO_BLOCKS:
            return ""
        said = () if live.blocks.said is None else (live.blocks.said,)
        for key in (*said, *reversed(live.blocks.keys)):
            found = self._ends.get(key)
            if found is not None and found[0] == request.tenant:
                entry = self._sessions.find(found)
                if entry is None or not entry.live:
                    return found[1]
        return UNNAMED + live.id

    def _known(self, entry: SessionEntry, blocks: PromptBlocks, prompt_tokens: int) -> SharedBeginning:
        return known_tokens(entry, blocks, prompt_tokens, self._retold.share(entry.key[0]))

    def _entry(self, live: LiveRequest) -> SessionEntry | None:
        return None if live.session is None else self._sessions.find(live.session)

    def _give_up(self, entry: SessionEntry, why: str, now: float) -> None:
        entry.gone, entry.gone_tokens = why, entry.context_tokens
        self._say(entry, why, now)
        self._sessions.unbind(entry)

    def _say(
        self,
        entry: SessionEntry,
        event: str,
        now: float,
        request: str = "",
        tokens: int | None = None,
        detail: str = "",
    ) -> None:
        entry.said_on = entry.instance if event in ("bound", "moved") else entry.said_on
        if self._journal.enabled:
            tokens = entry.context_tokens if tokens is None else tokens
            tenant, name = entry.key
            about = (name, event, tokens, entry.instance, request, tenant, detail)
            self._journal.write(SessionLine(self._journal.elapsed_s(now), *about))


class SharedBeginning(NamedTuple):
    """How many ``tokens`` at a prompt's beginning its session's last turn ended with, as is expected.

    ``named_tokens`` of them are named by blocks that both have. ``contradicted``: the prompt goes on
    otherwise than the history, before that and it end. ``retells``: where in the history the answer begins
    that the prompt is taken to tell again, and how many tokens of it have KV; None where blocks name the
    answer, or the prompt contradicts the history.
    """

    tokens: int
    named_tokens: int
    contradicted: bool
    retells: tuple[int, int] | None = None


def known_tokens(
    entry: SessionEntry, blocks: PromptBlocks, prompt_tokens: int, retold_share: float
) -> SharedBeginning:
    """Compare a prompt with its session's history: what both begin with, to the block.

    Where only the history's prompt is named, a prompt that does not contradict it is taken to tell the
    answer behind it again, and a ``retold_share`` of the answer to become the same tokens.
    """
    earlier, keys = entry.block_keys, blocks.keys
    count = min(len(earlier), len(keys))
    if tuple(keys[:count]) != tuple(earlier[:count]):
        count = next(at for at in range(count) if keys[at] != earlier[at])
    held = (entry.context_tokens or entry.gone_tokens) - 1  # the last token has no KV
    most = max(0, min(held, prompt_tokens - 1))
    named_tokens = min(most, int(count * blocks.block_tokens))
    within = min(len(earlier), int(prompt_tokens // blocks.block_tokens))
    contradicted = count < within
    if contradicted or entry.names_answer:
        return SharedBeginning(named_tokens, named_tokens, contradicted)
    answer = max(0, held - entry.prompt_tokens)
    tokens = min(most, entry.prompt_tokens + int(retold_share * answer))
    if not answer:
        return SharedBeginning(tokens, named_tokens, contradicted)
    return SharedBeginning(tokens, named_tokens, contradicted, (entry.prompt_tokens, answer))
