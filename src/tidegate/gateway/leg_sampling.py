"""The sampling fields of a leg: the client's, changed so that all legs together sample as one would."""

from __future__ import annotations

from tidegate.gateway.call import Call, Json
from tidegate.gateway.continuation import Continuation
from tidegate.protocol.stop_strings import StopStrings


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
