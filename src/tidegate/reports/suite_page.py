"""A suite as one HTML page that needs nothing else: what it says as a whole, and every row of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from tidegate.reports.html import answer_box, document, note, table, warning
from tidegate.reports.suite import AS_GOOD, ClaimFound, Mean, SuiteReport, SuiteRow

WORDS = f"""
Goodput is the highest offered rate at which the attained share of requests is at least the level. Every
system of a row is offered the same orders of waiting prompts (in a quick run its own only), and the best
counts; static:best takes the best split in hindsight, colocated:tuned the best budget of a step. As good as
the best: at least {100 * AS_GOOD:g} % of its goodput. A mean is geometric, over the rows
where both sides have a goodput.
"""


def suite_page(report: SuiteReport) -> str:
    """Return the page, with the rows that the subject loses first."""
    parts = [
        f"<h1>{escape(headline(report))}</h1>",
        f'<p class="lead">{len(report.rows)} rows, {report.seeds} seed{"s" if report.seeds > 1 else ""}, '
        f"tidegate {escape(report.version)}</p>",
        warning(f"not here, so not compared: {', '.join(report.missing)}" if report.missing else ""),
        *(warning(f"{row.name}: {row.failed}") for row in report.rows if row.failed),
        answer_box(list(sentences(report))),
    ]
    for level in report.levels:
        parts += [
            f"<h2>At {100 * level:g} % attainment</h2>",
            "<h3>Losses</h3>",
            _rows(report, report.losses(level), level) if report.losses(level) else note("none"),
            "<h3>Geometric means</h3>",
            table(MEANS_HEAD, [[escape(cell) for cell in mean_cells(mean)] for mean in report.means(level)]),
            "<h3>Every row</h3>",
            _rows(report, report.ranked(level), level),
            *_shares(report, level),
        ]
    claims = [claim for row in report.rows for claim in row.claims]
    if claims:
        cells = [[escape(cell) for cell in claim_cells(claim)] for claim in claims]
        parts += [
            "<h2>The papers' figures</h2>",
            f'<div class="wide">{table(CLAIMS_HEAD, cells, text=(0, 1))}</div>',
        ]
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in report.facts.items())
    parts += [
        "<h2>How this was made</h2>",
        f"<pre>{escape(report.command)}</pre>",
        f"<dl>{facts}</dl>",
        note(WORDS),
    ]
    return document(f"suite {report.suite}", parts, "compare")


def headline(report: SuiteReport) -> str:
    """Return how often the subject is as good as the best, at the first level."""
    level = report.levels[0]
    ranked, lost = report.ranked(level), report.losses(level)
    return (
        f"{report.subject} is within {100 * (1 - AS_GOOD):.0f} % of the best in {len(ranked) - len(lost)} of "
        f"{len(ranked)} rows of {report.suite}, at {100 * level:g} %"
    )


def sentences(report: SuiteReport) -> Iterator[str]:
    """Yield what the suite says at its first level: losses first, then means."""
    level = report.levels[0]
    for row in report.losses(level)[:5]:
        best, rate_rps = row.best(level)
        share = row.share(report.subject, level) or 0.0
        yield f"It loses {row.name}: {100 * share:.0f} % of {best}, which serves {rate_rps:.1f} requests/s."
    for mean in report.means(level):
        if mean.mean is not None:
            worst = "" if mean.least is None else f" (at least {mean.least:.2f})"
            yield f"{mean.world}: {mean.mean:.2f} times {mean.against}{worst}, over {mean.rows} rows."


ROWS_HEAD = (
    "row",
    "best",
    "requests/s",
    "subject",
    "requests/s",
    "of best",
    f"within {100 * (1 - AS_GOOD):.0f} %",
    "of limit",
)
MEANS_HEAD = ("world", "against", "geometric mean", "least", "rows", "left out")
CLAIMS_HEAD = ("row", "the paper says", "measure", "system", "against", "paper", "here")


def row_cells(report: SuiteReport, row: SuiteRow, level: float) -> list[str]:
    """Return the cells of a row under ``ROWS_HEAD``."""
    best, best_rps = row.best(level)
    mine, share = row.at(level)[report.subject], row.share(report.subject, level) or 0.0
    limit = mine.share_of_limit
    chosen = row.at(level)[best].chosen
    return [
        row.name,
        f"{best} ({chosen})" if chosen else best,
        f"{best_rps:.2f}",
        f"{report.subject} ({mine.chosen})" if mine.chosen else report.subject,
        f"{mine.goodput_rps:.2f}"
        + (f" ({mine.low_rps:.2f} to {mine.high_rps:.2f})" if mine.seeds > 1 else ""),
        f"{100 * share:.0f} %",
        "yes" if share >= AS_GOOD else "no",
        "-" if limit is None else f"{100 * limit:.0f} %",
    ]


def mean_cells(mean: Mean) -> list[str]:
    """Return the cells of a mean under ``MEANS_HEAD``."""
    ratios = ["-" if value is None else f"{value:.3f}" for value in (mean.mean, mean.least)]
    return [mean.world, mean.against, *ratios, str(mean.rows), str(mean.left_out)]


def claim_cells(claim: ClaimFound) -> list[str]:
    """Return the cells of a claim under ``CLAIMS_HEAD``."""

    def told(ratio: float | None) -> str:
        if ratio is None:
            return "-"
        if not claim.against:
            return f"{100 * ratio:.1f} %"
        return f"{ratio:.2f}x" if claim.measure == "goodput" else f"{100 * (ratio - 1):+.1f} %"

    what = [claim.row, claim.says, claim.measure, claim.system, claim.against]
    return [*what, told(claim.paper), told(claim.found)]


def _rows(report: SuiteReport, rows: Sequence[SuiteRow], level: float) -> str:
    return table(ROWS_HEAD, [[escape(cell) for cell in row_cells(report, row, level)] for row in rows])


def _shares(report: SuiteReport, level: float) -> Iterator[str]:
    """Yield the table of every system's share of the best, by row."""
    cells = []
    for row in report.ranked(level):
        shares = [row.share(system, level) for system in report.systems]
        told = ["-" if share is None else f"{100 * share:.0f}" for share in shares]
        cells.append([escape(row.name), *(f"<b>{each}</b>" if each == "100" else each for each in told)])
    yield f'<h3>Share of the best, %</h3><div class="wide">{table(["row", *report.systems], cells)}</div>'
