"""One request of a trace."""

from __future__ import annotations

from dataclasses import dataclass

MOONCAKE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """When a request arrives and how large it is; never its text.

    ``arrival_s`` counts from the start of the trace. ``hash_ids`` name the prompt's blocks of
    ``block_tokens`` tokens, the last one partial: two prompts share a prefix exactly as far as their
    leading ids agree. More ids than the prompt needs go on into the answer: a later prompt with these ids
    repeats the answer, too. ``turn`` counts a session's requests from 0; ``session_id`` may be
    ``SESSION/AGENT``: the agents of a session share its clock and prefixes, but each waits only for its
    own answers. ``delay_s`` is the client's pause between the previous answer and this turn, where the
    source publishes it. Empty strings mean "not given".
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    block_tokens: int = MOONCAKE_BLOCK_TOKENS
    session_id: str = ""
    turn: int = 0
    delay_s: float | None = None
    slo_class: str = ""
    client_id: str = ""


def session_of(record: TraceRecord) -> str:
    """Return the session without its agent, or the empty string."""
    return record.session_id.partition("/")[0]
