"""One answer over legs on engines that do not know of each other: no token twice, no text lost at a seam.

A leg that goes on from token ids begins as a new request: it knows neither the bytes of a character that is
half said nor the start of a stop string. So a leg begins where text and ids agree and no stop string can have
begun, or earlier; what it then says again is checked and left out.
"""

from __future__ import annotations

from tidegate.core.errors import NotRepeated
from tidegate.engines.seam import Json, Tokens

UNFINISHED = "\ufffd"
"""What stands for the bytes of a character that is not complete."""


class Continuation:
    """The seams of one request. ``out_ids`` is the flight's own list of the ids that were delivered."""

    __slots__ = ("_again_ids", "_again_text", "_ends", "_out_ids", "_told", "_whole", "clean", "stops")

    def __init__(self, out_ids: list[int], stops: StopStrings | None) -> None:
        self._out_ids = out_ids
        self._told: list[str] = []
        self._ends: list[int] = []
        self._again_ids: list[int] = []
        self._again_text = ""
        self._whole = 0
        self.clean = 0
        """How many of the ids have all their text delivered, and no stop string half said: a leg may begin
        behind them."""
        self.stops = stops

    def begin(self, base: int) -> None:
        """Expect a leg that goes on behind the first ``base`` ids, and so says those behind them again."""
        told = "".join(self._told)
        self._told = [told]
        self._again_ids = self._out_ids[base:]
        self._again_text = told[self._ends[base - 1] if base else 0 :]

    @property
    def again(self) -> bool:
        """Whether the leg still repeats what an earlier one said."""
        return bool(self._again_ids or self._again_text)

    def plain(self, text: str, token_ids: list[int]) -> tuple[str, list[int]]:
        """Return what is new in a piece. Raises NotRepeated when the leg says something else than before."""
        if self.again:
            token_ids = self._new_ids(token_ids)
            text = self._new_text(text)
        self._note(text, token_ids)
        return text, token_ids

    def piece(self, tokens: Tokens, *, whole: bool) -> Tokens:
        """Like ``plain`` for any piece. Of a leg that is answered whole, an unfinished end is left to the
        next leg, as is what a parser made of it."""
        text, ids, logprobs = tokens.text, tokens.token_ids, tokens.logprobs
        delta = tokens.delta
        if self.again:
            ids = self._new_ids(ids)
            logprobs = _last_rows(logprobs, len(ids), len(tokens.token_ids))
            text = self._new_text(text)
        if tokens.finish_reason is not None and self._again_ids and not whole:
            raise NotRepeated("the engine ended before it had repeated the tokens that were delivered")
        if whole and tokens.finish_reason != "stop" and (delta or text.endswith(UNFINISHED)):
            text, delta = "", None
        self._note(text, ids)
        return Tokens(
            text, ids, logprobs, tokens.finish_reason, tokens.stop_reason, tokens.prompt_token_ids, delta
        )

    def _note(self, text: str, token_ids: list[int]) -> None:
        """Remember what is delivered; the caller appends the ids to its list right after."""
        end = (self._ends[-1] if self._ends else 0) + len(text)
        if text:
            self._told.append(text)
        if token_ids:
            self._ends += [end] * len(token_ids)
        elif self._ends:
            self._ends[-1] = end
        if text and len(token_ids) == 1 and not text.endswith(UNFINISHED):
            # The text of several may lack that of the last one, if it is only a part of a character.
            self._whole = len(self._ends)
            if self.stops is None:
                self.clean = self._whole

    def until_stop(self, text: str, said: int | str | None) -> str:
        """Return what may be delivered of a piece whose ids the caller has appended; ``said`` is the engine's
        stop reason. See ``StopStrings``."""
        assert self.stops is not None
        text = self.stops.feed(text, len(self._out_ids), said if isinstance(said, str) else None)
        if not self.stops.half_said:
            self.clean = self._whole
        return text

    def _new_ids(self, token_ids: list[int]) -> list[int]:
        known = min(len(token_ids), len(self._again_ids))
        if token_ids[:known] != self._again_ids[:known]:
            raise NotRepeated("the engine does not repeat the tokens that were delivered")
        del self._again_ids[:known]
        return token_ids[known:]

    def _new_text(self, text: str) -> str:
        expected = self._again_text
        if text.startswith(expected):
            self._again_text = ""
            return text[len(expected) :]
        if expected.startswith(text):
            self._again_text = expected[len(text) :]
            return ""
        raise NotRepeated("the engine does not repeat the text that was delivered")


class StopStrings:
    """Keeps ``stops`` out of text that comes in pieces, or ends it with one if they are to be ``included``.

    Text that may be the start of one is held back. Which one ends the answer is told by the engine, which
    knows the text of every token. One that is not given them is ``unaware``: then the first is looked for, as
    vLLM does: it counts when it ends behind the first ``min_tokens`` tokens.
    """

    __slots__ = ("_held", "_hold", "_include", "_min_tokens", "_stops", "_unaware", "found")

    def __init__(
        self, stops: tuple[str, ...], *, include: bool = False, unaware: bool = False, min_tokens: int = 0
    ) -> None:
        self._stops = stops
        self._include = include
        self._unaware = unaware
        self._min_tokens = min_tokens
        self._hold = max(map(len, stops)) - 1
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str, tokens: int, said: str | None = None) -> str:
        """Take text with which ``tokens`` tokens are generated in all, and that the engine ``said`` to end
        with a stop string; return what may be delivered.

        ``found`` is the stop string once there is one, and nothing is delivered behind it.
        """
        old = len(self._held)
        text = self._held + text
        end = self._end(text, old, tokens, said)
        if self.found is not None:
            self._held = ""
            return text[:end] if self._include else text[: end - len(self.found)]
        cut = max(0, len(text) - self._hold)
        while not any(stop.startswith(text[cut:]) for stop in self._stops):
            cut += 1
        self._held = text[cut:]
        return text[:cut]

    def _end(self, text: str, old: int, tokens: int, said: str | None) -> int:
        """Note the stop string that ends the answer, and return where it ends in ``text``.

        The first ``old`` characters were looked at before.
        """
        if said is not None and text.endswith(said):
            self.found = said
            return len(text)
        best = len(text) + 1
        if said is not None or (self._unaware and tokens > self._min_tokens):
            for stop in self._stops:
                end = text.find(stop, max(0, old + 1 - len(stop))) + len(stop)
                if len(stop) <= end < best:
                    best, self.found = end, stop
        return best

    @property
    def half_said(self) -> bool:
        """Whether the text so far ends with the start of a stop string."""
        return bool(self._held)

    def flush(self) -> str:
        """Return what is held back: the answer ends without a stop string."""
        text, self._held = self._held, ""
        return text


def _last_rows(logprobs: Json | None, new: int, of: int) -> Json | None:
    """Return the logprobs of the last ``new`` of ``of`` tokens."""
    if logprobs is None or new == of:
        return logprobs
    return {key: rows[of - new :] if isinstance(rows, list) else rows for key, rows in logprobs.items()}
