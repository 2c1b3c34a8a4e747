"""Why a run did what it did, in a few lines: of one request, of one flip, of a moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap

from msgspec import UNSET

from tidegate.core.errors import ConfigError
from tidegate.core.stages import STAGES
from tidegate.journal.schema import (
    ControlLine,
    DecisionLine,
    FailureLine,
    FlipLine,
    HeaderLine,
    InstanceLine,
    JournalLine,
    MigrationLine,
    OutcomeLine,
)

ALTERNATIVES = 3
"""Instances that were not chosen, of which the terms are shown."""
AROUND_S = 10.0
"""Before and after a flip: requests that arrived within are compared."""
WIDTH = 100
TOGETHER = "\N{NO-BREAK SPACE}"
"""Between a number and its unit until lines are broken."""
MARGIN = " " * 13
"""Under the time of a line."""

Lines = Sequence[JournalLine]


def explain_request(lines: Lines, request: str) -> str:
    """Return what was known of a request at each of its decisions, what was chosen, and what came of it.

    Raises ConfigError where the journal has no such request, with ids that are alike.
    """
    about = [line for line in lines if getattr(line, "request", None) == request]
    if not about:
        raise ConfigError(f"the journal has no request {request!r}{_alike(lines, request)}")
    outcome = next((line for line in about if isinstance(line, OutcomeLine)), None)
    text = [_title(request, outcome)]
    for line in about:
        match line:
            case DecisionLine():
                text += _decision(line)
                text += [_flip(flip) for flip in _flips_at(lines, line)]
            case MigrationLine():
                text += _moved(line)
            case FailureLine():
                what = f"{line.instance} failed its {line.stage} after {line.generated} tokens"
                text += _at(line.t_s, f"{what}: {line.message}")
            case OutcomeLine():
                text += _ended(line)
    if outcome is None:
        text += [f"{MARGIN}it has not ended in this journal"]
    return _page(text)


def explain_flip(lines: Lines, number: int) -> str:
    """Return who flipped what and why, what was known, and how requests fared around it.

    Flips are counted from 1. Raises ConfigError for a number that the journal does not have.
    """
    flips = [line for line in lines if isinstance(line, FlipLine)]
    if not 1 <= number <= len(flips):
        raise ConfigError(f"the journal has flips 1 to {len(flips)}" if flips else "the journal has no flip")
    flip = flips[number - 1]
    before = lines[: next(place for place, line in enumerate(lines) if line is flip)]
    change = f"{flip.instance} from {flip.from_role} to {flip.to_role}"
    text = [f"Flip {number} of {len(flips)}: {change} ({flip.reason})"]
    if flip.why:
        text += _at(flip.t_s, f"because {flip.why}")
    text += _at(flip.t_s, f"the fleet was {_labels(before)}")
    text += [part for word in _last_words(before).values() for part in _at(word.t_s, _said(word))]
    again = next((other for other in flips[number:] if other.instance == flip.instance), None)
    if again is not None:
        after_s = again.t_s - flip.t_s
        text += _at(
            again.t_s, f"{flip.instance} went back to {again.to_role}, {after_s:.1f} s later ({again.reason})"
        )
    outcomes = [line for line in lines if isinstance(line, OutcomeLine) and not line.refused]
    for name, start_s in (("before", flip.t_s - AROUND_S), ("after", flip.t_s)):
        text += [f"{MARGIN}{AROUND_S:.0f} s {name}: {_fared(outcomes, start_s, start_s + AROUND_S)}"]
    return _page(text)


def explain_moment(lines: Lines, at_s: float) -> str:
    """Return the fleet's labels, what each controller had said last, and who was being served at a time."""
    before = [line for line in lines if line.t_s <= at_s]
    text = [f"At {at_s:.3f} s the fleet was {_labels(before)}"]
    text += [part for word in _last_words(before).values() for part in _at(word.t_s, _said(word))]
    outcomes = [line for line in lines if isinstance(line, OutcomeLine)]
    under_way = sum(line.arrival_s <= at_s < line.end_s for line in outcomes)
    text += [f"{MARGIN}{under_way} requests were under way"]
    text += [f"{MARGIN}{AROUND_S:.0f} s before: {_fared(outcomes, at_s - AROUND_S, at_s)}"]
    return _page(text)


def worst_requests(lines: Lines, most: int) -> tuple[list[str], Counter[str]]:
    """Return who missed by most of the requests that were served, and how many missed that ran nowhere.

    The former are ids, first those that failed, then by times of a target. The latter, refused or gone before
    they were placed, are counted by outcome.
    """
    missed = [line for line in lines if isinstance(line, OutcomeLine) and line.attained is False]
    served = [line for line in missed if line.ok or line.prefill_on is not None]
    ids = [line.request for line in sorted(served, key=_excess, reverse=True)[:most]]
    return ids, Counter(line.outcome for line in missed if not line.ok and line.prefill_on is None)


def _excess(line: OutcomeLine) -> float:
    if not line.ok or line.slo is None:
        return float("inf")
    return max((line.ttft_s or 0.0) / line.slo.ttft_s, (line.tpot_s or 0.0) / line.slo.tpot_s)


def _alike(lines: Lines, request: str) -> str:
    ids = [line.request for line in lines if isinstance(line, OutcomeLine)]
    alike = [name for name in ids if request and (request in name or name in request)][:3] or ids[:3]
    return f"; it has {', '.join(alike)}{' ...' if len(ids) > len(alike) else ''}" if ids else ""


def _title(request: str, outcome: OutcomeLine | None) -> str:
    if outcome is None:
        return f"Request {request}"
    said = f"Request {request}: {outcome.input_tokens:,} prompt tokens, {outcome.output_tokens:,} answered"
    if outcome.session_id is not UNSET:
        said += f", session {outcome.session_id}"
    return f"{said}; targets {outcome.slo}" if outcome.slo is not None else said


def _decision(line: DecisionLine) -> list[str]:
    chosen = line.chosen
    what = {"place_prefill": "prefill", "place_decode": "decode", "replay": "begins again"}.get(
        line.kind, line.kind
    )
    on = chosen.decode_on if line.kind == "place_decode" else chosen.prefill_on
    if chosen.hold is not UNSET:
        said = f"{what}: waits, {chosen.hold}"
    elif chosen.reject is not UNSET:
        said = f"{what}: refused, {chosen.reject}"
    else:
        said = f"{what} on {on}" + (
            " (both phases)" if chosen.path == "colocated" and line.kind != "place_decode" else ""
        )
    if line.reason:
        said += f": {line.reason}"
    if line.predicted:
        said += f"; predicted {_terms(line.predicted)}"
    text = _at(line.t_s, said)
    for other in line.alternatives[: ALTERNATIVES + 1]:
        terms = {name: value for name, value in other.items() if name != "instance"}
        mark = "chosen " if other.get("instance") == on else "instead"
        text += _indented(f"{mark} {other.get('instance')}: {_terms(terms)}")
    return text


def _flips_at(lines: Lines, decision: DecisionLine) -> Iterator[FlipLine]:
    """Yield the flips that came with a decision."""
    return (
        line
        for line in lines
        if isinstance(line, FlipLine) and line.t_s == decision.t_s and line.reason == "inline"
    )


def _flip(flip: FlipLine) -> str:
    return f"{MARGIN}with it {flip.instance} became {flip.to_role}: {flip.why or flip.reason}"


def _moved(line: MigrationLine) -> list[str]:
    said = f"its move {line.src} -> {line.dst} ({line.reason}) is {line.event}"
    if line.event == "done":
        said += f": {line.moved_bytes / 1e6:,.1f} MB"
        if line.stages is not UNSET:
            said += f" in {line.stages} copies"
        if line.pause_s is not UNSET:
            said += f", the client waited for {_seconds(line.pause_s)}"
    elif line.detail:
        said += f": {line.detail}"
    return _at(line.t_s, said)


def _ended(line: OutcomeLine) -> list[str]:
    how = {True: "attained", False: "missed", None: "ok"}[line.attained] if line.ok else line.outcome
    text = _at(line.end_s, f"ended: {how}{f', {line.error}' if line.error else ''}")
    for name, value, target in (
        ("TTFT", line.ttft_s, line.slo and line.slo.ttft_s),
        ("TPOT", line.tpot_s, line.slo and line.slo.tpot_s),
    ):
        if value is not None:
            against = f", {'within' if value <= target else 'over'} {_seconds(target)}" if target else ""
            text.append(f"{MARGIN}{name} {_seconds(value)}{against}")
    parts = ", ".join(
        f"{stage} {_seconds(line.stages_s[stage])}" for stage in STAGES if line.stages_s.get(stage)
    )
    if parts:
        text += _indented(f"spent in {parts}")
    if line.predicted_prefill_s and line.observed_prefill_s:
        ratio = line.observed_prefill_s / line.predicted_prefill_s
        text.append(
            f"{MARGIN}prefill predicted alone {_seconds(line.predicted_prefill_s)}, took "
            f"{_seconds(line.observed_prefill_s)} ({ratio:.2f} times)"
        )
    if line.cached_tokens:
        text.append(f"{MARGIN}{line.cached_tokens:,} prompt tokens were cached there")
    if line.predicted_lengths is not UNSET:
        for each in line.predicted_lengths:
            predicted = f"{each.source} predicted {each.remaining_tokens:,.0f} more"
            came = line.output_tokens - each.at_token
            text.append(f"{MARGIN}at token {each.at_token} {predicted}; {came:,} came")
    return text


def _labels(before: Lines) -> str:
    """Return how many had which label behind all lines ``before``."""
    roles: dict[str, str] = {}
    for line in before:
        match line:
            case HeaderLine():
                roles = {each.id: each.role for each in line.instances}
            case InstanceLine(event="up"):
                roles[line.instance] = line.role
            case InstanceLine(event="down"):
                roles.pop(line.instance, None)
            case FlipLine():
                roles[line.instance] = line.to_role
    counts = Counter(roles.values())
    return ", ".join(f"{count} {role}" for role, count in sorted(counts.items(), reverse=True)) or "empty"


def _last_words(before: Lines) -> dict[str, ControlLine]:
    """Return the last line of each controller that has anything to say."""
    last = {line.controller: line for line in before if isinstance(line, ControlLine)}
    return {name: line for name, line in last.items() if line.reason}


def _said(word: ControlLine) -> str:
    return f"{word.controller or 'the controller'} said: {word.reason}"


def _fared(outcomes: Sequence[OutcomeLine], start_s: float, end_s: float) -> str:
    """Return how requests fared that arrived between two times."""
    came = [line for line in outcomes if start_s <= line.arrival_s < end_s]
    if not came:
        return "no request came"
    attained = sum(line.attained is True for line in came)
    return (
        f"{len(came)} request{'s' if len(came) > 1 else ''} came, {100 * attained / len(came):.1f} % attained"
    )


def _terms(values: Mapping[str, str | float | None]) -> str:
    """Return named values for a reader, with the unit that each name ends with."""
    return ", ".join(_term(name, value) for name, value in values.items() if value is not None)


def _term(name: str, value: str | float) -> str:
    if isinstance(value, str):
        return f"{name} {value}"
    if name.endswith("_s"):
        return f"{name.removesuffix('_s')} {_seconds(value)}"
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{name.removesuffix('_tokens')} {number}{' tokens' if name.endswith('_tokens') else ''}"


def _seconds(value: float) -> str:
    number, unit = (f"{value:.2f}", "s") if abs(value) >= 1.0 else (f"{1000 * value:.1f}", "ms")
    return f"{number}{TOGETHER}{unit}"


def _at(t_s: float, said: str) -> list[str]:
    """Return what was said at a time, wrapped."""
    stamp = f"{t_s:>9.3f} s  ".ljust(len(MARGIN))
    return _wrapped(said, stamp, MARGIN)


def _indented(said: str) -> list[str]:
    """Return what belongs to the line above, wrapped."""
    return _wrapped(said, MARGIN, MARGIN + "  ")


def _wrapped(said: str, first: str, further: str) -> list[str]:
    return wrap(said, WIDTH, initial_indent=first, subsequent_indent=further)


def _page(lines: Sequence[str]) -> str:
    return "\n".join(lines).replace(TOGETHER, " ")
