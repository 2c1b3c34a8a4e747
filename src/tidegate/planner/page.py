"""The plan as a page: the ranking, goodput over GPUs, attainment over the rate, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from tidegate.planner.answer import Ranked, RankedPlan
from tidegate.planner.search import TOLERANCE
from tidegate.reports.charts import Chart, Curve, Mark, Panel, told_apart
from tidegate.reports.html import answer_box, document, figure, note, table
from tidegate.reports.looks import Look, looks

FAMILY_TONES = {"disaggregated": 0, "colocated": 3, "mixed": 2, "adaptive": 1}
HEAD = ("", "deployment", "system", "goodput", "", "per GPU", "per $", "$/h", "attains", "", "sure")
"""Of the ranking's columns."""


def charts(answer: RankedPlan) -> list[Chart]:
    """Return the what-if charts."""
    title = answer.question.setting.workload.trace
    section = title or "plan"
    families = [family for family in FAMILY_TONES if any(f == family for _, f, _ in answer.curve)]
    curves = [
        Curve(
            family,
            Look(FAMILY_TONES[family]),
            [gpus for gpus, f, _ in answer.curve if f == family],
            [rps for _, f, rps in answer.curve if f == family],
        )
        for family in families
    ]
    whole = [sum(each.deployment.gpus.values()) for each in answer.ranked]
    dots = Curve(
        "simulated",
        Look(6),
        [float(gpus) for gpus in whole],
        [each.goodput.goodput_rps for each in answer.ranked],
        dots=True,
        width=0.0,
    )
    have = sum(offer.count for offer in answer.question.offers)
    over_gpus = Chart(
        "goodput-over-gpus",
        section,
        "What if there were more GPUs, or fewer",
        "Goodput of the best deployment of each family, as the program predicts it after what was simulated "
        "here corrected it. Dots are simulations.",
        (
            Panel(
                "",
                "GPUs",
                "goodput, requests/s",
                (*told_apart(curves), dots),
                (Mark("x", float(have), "this budget"),),
            ),
        ),
    )
    return [over_gpus, _over_rate(answer, section)]


def _over_rate(answer: RankedPlan, section: str) -> Chart:
    shown = [each for each in answer.ranked if len(answer.runs.get(each.deployment.label, ())) > 1][:4]
    tones = looks([each.deployment.label for each in shown])
    curves = [
        Curve(
            each.deployment.label,
            tones[each.deployment.label],
            [rate for rate, _ in answer.runs[each.deployment.label]],
            [100.0 * share for _, share in answer.runs[each.deployment.label]],
            dots=True,
        )
        for each in shown
    ]
    return Chart(
        "attainment-over-rate",
        section,
        "What if the rate were another",
        "Attainment in every simulation of the first deployments, means where several draws were run.",
        (
            Panel(
                "",
                "requests/s",
                "attainment, %",
                tuple(curves),
                (
                    Mark("y", 100.0 * answer.question.level, "level"),
                    Mark("x", answer.rate_rps, "compared here"),
                ),
                y_range=(0.0, 101.0),
            ),
        ),
    )


def cells(place: int, each: Ranked) -> list[str]:
    """Return a row of the ranking, under ``HEAD``."""
    found, (mean, low, high) = each.goodput, each.attainment
    half = max(0.5 * (found.high_rps - found.low_rps), TOLERANCE * found.goodput_rps)
    price = each.deployment.price_per_h
    return [
        str(place),
        each.deployment.title,
        each.deployment.system,
        f"{found.goodput_rps:.4g}/s",
        f"±{half:.2g}" if len(found.by_seed) > 1 else "",
        f"{each.per_gpu_rps:.3g}",
        "-" if each.per_dollar is None else f"{each.per_dollar:,.0f}",
        f"{price:.2f}" if price else "-",
        f"{100 * mean:.1f} %",
        f"{100 * low:.0f}-{100 * high:.0f}" if len(found.by_seed) > 1 else "",
        f"{100 * each.sure:.0f} %",
    ]


def render(answer: RankedPlan, drawn: Sequence[Chart], facts: Mapping[str, str], command: str) -> str:
    """Return the page."""
    rows = [[escape(cell) for cell in cells(place, each)] for place, each in enumerate(answer.ranked, 1)]
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    head, *rest = answer.sentences
    parts = [
        f"<h1>{escape(head)}</h1>",
        answer_box(rest),
        f'<div class="wide">{table(HEAD, rows, text=(1,))}</div>',
        note(
            "Goodput is the highest rate at which the level is attained, the mean of draws with Student's "
            f"95 % interval; attained is at {answer.rate_rps:.4g} requests/s. Sure: the probability of "
            "serving at least 97 % of the best other one."
        ),
        *map(figure, drawn),
        "<h2>How this was made</h2>",
        f"<pre>{escape(command)}</pre>",
        f"<dl>{listed}</dl>",
    ]
    return document("plan", parts, "plan")
