"""One answer over legs on engines that do not know of each other: no token twice, no text lost in between.

A leg that goes on from token ids begins as a new request: it knows neither the bytes of a character that is
half said nor the start of a stop string. So a leg begins where text and ids agree and no stop string can have
begun, or earlier; what it then says again is checked and left out.
"""

from __future__ import annotations

from tidegate.core.errors import NotRepeated
from tidegate.gateway.call import Call
from tidegate.protocol.chunks import Json, Tokens
from tidegate.protocol.stop_strings import StopStrings

UNFINISHED = "\ufffd"
"""What stands for the bytes of a character that is not complete."""


class Continuation:
    """How the legs of one request continue each other. ``out_ids`` is the request's own list of the ids that
    were delivered.

    Engines tell which of the ``stops`` ends the answer: only they know the text of every token. Where they
    are not given them, ``search_after_tokens`` is the number of tokens behind which one is looked for.
    """

    __slots__ = (
        *("_again_ids", "_again_text", "_ends", "_out_ids", "_search_after_tokens", "_delivered", "_whole"),
        *("clean", "stops"),
    )

    def __init__(
        self, out_ids: list[int], stops: StopStrings | None, *, search_after_tokens: int | None = None
    ) -> None:
        self._search_after_tokens = search_after_tokens
        self._out_ids = out_ids
        self._delivered: list[str] = []
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
        delivered = "".join(self._delivered)
        self._delivered = [delivered]
        self._again_ids = self._out_ids[base:]
        self._again_text = delivered[self._ends[base - 1] if base else 0 :]

    def plain(self, text: str, token_ids: list[int]) -> tuple[str, list[int]]:
        """Return what is new in a piece. Raises NotRepeated when the leg says something else than before."""
        if self._again_ids or self._again_text:
            token_ids = self._new_ids(token_ids)
            text = self._new_text(text)
        self._note(text, token_ids)
        return text, token_ids

    def piece(self, tokens: Tokens, *, whole: bool) -> Tokens:
        """Like ``plain`` for any piece. Of a leg that is answered whole, an unfinished end is left to the
        next leg, as is what a parser made of it."""
        text, ids, logprobs = tokens.text, tokens.token_ids, tokens.logprobs
        delta = tokens.delta
        if self._again_ids or self._again_text:
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
            self._delivered.append(text)
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
        stop reason. See ``StopStrings.feed``."""
        assert self.stops is not None
        after = self._search_after_tokens
        search = after is not None and len(self._out_ids) > after
        text = self.stops.feed(text, search=search, ended_with=said if isinstance(said, str) else None)
        if not self.stops.pending:
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


def _last_rows(logprobs: Json | None, new: int, of: int) -> Json | None:
    """Return the logprobs of the last ``new`` of ``of`` tokens."""
    if logprobs is None or new == of:
        return logprobs
    return {key: rows[of - new :] if isinstance(rows, list) else rows for key, rows in logprobs.items()}


# the sampling fields of a leg: the client's, changed so that all legs together sample as one would


def continuing(call: Call, generated: int, most: int | None) -> Json:
    """Return the fields of a leg of at most ``most`` tokens on an engine that continues earlier legs, behind
    ``generated`` tokens: ``min_tokens`` asks no more of it than it may generate."""
    wanted = call.sampling.get("min_tokens")
    if wanted and most is not None:
        return call.sampling | {"min_tokens": min(wanted, generated + most)}
    return call.sampling


def beginning(call: Call, generated: int, most: int | None) -> Json:
    """Return the fields of a leg on an engine that takes the first ``generated`` tokens for its prompt's.

    Its ``min_tokens`` counts from the leg's start. It says stop strings, which the gateway leaves out. A seed
    of ours differs from leg to leg, so that random numbers do not repeat.
    """
    sampling, changed = call.sampling, Json()
    if wanted := sampling.get("min_tokens"):
        left = wanted - generated
        changed["min_tokens"] = max(0, left if most is None else min(left, most))
    if "seed" in sampling and not call.seeded:
        changed["seed"] = sampling["seed"] + generated
    if not call.stops:
        return sampling | changed
    if engines_stop(call):
        return sampling | changed | {"include_stop_str_in_output": True}
    dropped = ("stop", "include_stop_str_in_output")
    return {name: value for name, value in (sampling | changed).items() if name not in dropped}


def still_asked(call: Call, sampling: Json, *, prompt_known: bool, had_logprobs: bool) -> Json:
    """Return the fields without those whose effect an earlier leg has had."""
    had = {"prompt_logprobs"} if had_logprobs else set()
    if isinstance(call.prompt, str) and prompt_known:
        had.add("suffix")
    return {name: given for name, given in sampling.items() if name not in had} if had else sampling


def engines_stop(call: Call) -> bool:
    """Tell whether engines are given the stop strings, to say them.

    An engine that is busy sends several tokens in a piece, and only it knows which of them is the last one.
    But it would say the text of a stop token, too, and nobody could tell that from the answer's.
    """
    sampling = call.sampling
    if sampling.get("include_stop_str_in_output"):
        return True
    return not sampling.get("stop_token_ids") and sampling.get("skip_special_tokens") is not False


def continuation(call: Call, out_ids: list[int]) -> Continuation:
    """Return what puts the call's legs together on engines that know nothing of earlier ones."""
    if not call.stops:
        return Continuation(out_ids, None)
    stops = StopStrings(call.stops, include=bool(call.sampling.get("include_stop_str_in_output")))
    least = call.sampling.get("min_tokens") or 0
    return Continuation(out_ids, stops, search_after_tokens=None if engines_stop(call) else least)
