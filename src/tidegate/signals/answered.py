"""What was answered lately, as a recording tells it: the lengths that a system may begin with."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from tidegate.journal.reader import JournalLines, recorded_kind
from tidegate.journal.schema import HeaderLine, OutcomeLine
from tidegate.policies.protocols import AnswerLengths
from tidegate.workloads.likes import is_like
from tidegate.workloads.readers import read_untimed

MOST = 256
"""The newest requests that are read: few enough for the run's own to outweigh them soon (ours)."""


def answered_in(source: str) -> tuple[AnswerLengths, ...]:
    """Return the newest requests that were answered in full, the oldest first, at most ``MOST``.

    ``source`` is a journal, or a trace, all of whose requests count as answered, with nothing at hand of
    their prompts. A journal in which nothing was answered yet gives none. Raises TraceError for a file that
    is neither.
    """
    file = Path(source)
    stamp = (file.stat().st_mtime_ns, file.stat().st_size) if file.is_file() else (0, 0)
    return _answered_in(source, stamp)


@lru_cache(maxsize=4)
def _answered_in(source: str, stamp: tuple[int, int]) -> tuple[AnswerLengths, ...]:
    if not is_like(source) and recorded_kind(source) == str(HeaderLine.__struct_config__.tag):
        ended = [line for line in JournalLines(source) if isinstance(line, OutcomeLine) and line.ok]
        ended.sort(key=lambda line: line.end_s)
        return tuple(
            AnswerLengths(
                line.input_tokens, line.cached_tokens + (line.read_back_tokens or 0), line.output_tokens
            )
            for line in ended[-MOST:]
        )
    return tuple(
        AnswerLengths(each.input_tokens, 0, each.output_tokens) for each in read_untimed(source)[-MOST:]
    )
