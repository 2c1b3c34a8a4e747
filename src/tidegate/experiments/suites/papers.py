"""The suite ``papers``: an experiment per headline figure of the four papers, beside what they report.

Fleets, targets and baselines are the papers' where those are known, every system with its own order; the
traffic is what is packaged. A figure relates to the paper's own baseline, and the rows show the best static
split and the best budget in hindsight as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tidegate.core.defaults import DEFAULT_SYSTEM
from tidegate.core.slo import Slo
from tidegate.costs.library import PackagedProfile, packaged_profile
from tidegate.experiments.suites.rows import OWN_ORDER, WORLDS, Claim, Experiment
from tidegate.workloads.choice import WorkloadChoice, requests_of
from tidegate.workloads.trace import Workload

H20_FLOPS, H20_BANDWIDTH, H20_BYTES = 148 / 989, 4.0 / 3.35, 96e9 - 80e9
"""An H20 beside an H100: operations and bytes per second as shares, and how much more memory it has."""
SUBJECTS = (DEFAULT_SYSTEM, "arrow-lending")


def h20(name: str) -> PackagedProfile:
    """Return what an H20 would make of a packaged H100's profile: prefills are seven times as slow, decodes
    faster."""
    packaged = packaged_profile(name)
    p, s, m = packaged.profile.prefill, packaged.profile.step, packaged.profile.mixed
    slow, fast = 1.0 / H20_FLOPS, 1.0 / H20_BANDWIDTH
    prefill = replace(p, a_s=fast * p.a_s, b_s=slow * p.b_s, c_s=slow * p.c_s, n0=fast / slow * p.n0)
    step = replace(s, a_s=fast * s.a_s, c_s=fast * s.c_s)
    mixed = replace(
        m, a_s=fast * m.a_s, b_s=slow * m.b_s, c_s=slow * m.c_s, d_s=fast * m.d_s, n0=fast / slow * m.n0
    )
    more_bytes = 0.9 * H20_BYTES * int(name.rpartition("/tp")[2] or 1)
    title = name.replace("h100_sxm", "h20")
    return replace(
        packaged,
        profile=replace(packaged.profile, name=title, prefill=prefill, step=step, mixed=mixed),
        kv_capacity_tokens=packaged.kv_capacity_tokens + round(more_bytes / packaged.kv_bytes_per_token),
    )


def round_targets(requests: Workload, packaged: PackagedProfile, scale: float = 1.0) -> Slo:
    """Return targets for rounds by one rule, for AMPD's are not known.

    The first token within three times the mean prefill of a round alone with nothing cached, but at least
    0.5 s; a token within 2.5 times the step of 16 decodes of mean length; rounded to 50 and 5 ms.
    """
    prompt, answer = float(requests.input_tokens.mean()), float(requests.output_tokens.mean())
    ttft_s = max(0.5, 3.0 * packaged.profile.prefill_s(round(prompt)))
    tpot_s = 2.5 * float(packaged.profile.step.seconds(16.0, 16.0 * (prompt + answer / 2)))
    return Slo(round(scale * ttft_s / 0.05) * 0.05, round(scale * tpot_s / 0.005) * 0.005)


def rows() -> list[Experiment]:
    """Return the suite's rows: every experiment in every world, the first of each paper for a quick run."""
    found: list[Experiment] = []
    for of_paper in (_arrow(), _ares(), _dopd(), _ampd()):
        for number, row in enumerate(of_paper):
            found += [replace(row, world=world, quick=not number and world is WORLDS[0]) for world in WORLDS]
    return found


def _arrow() -> Iterator[Experiment]:
    ours = ("arrow-v1", "arrow", *SUBJECTS)
    claims = (
        Claim("5.62 times the rate of colocated serving (v1)", 5.62, "goodput", ours, "colocated"),
        Claim("7.78 times the rate of a static split (v1)", 7.78, "goodput", ours, "round-robin:even"),
        Claim("2.55 times the rate of a static split (v2)", 2.55, "goodput", ours, "static:even"),
    )
    systems = (
        *(*SUBJECTS, "arrow", "arrow-v1"),
        *("colocated", "round-robin:even", "static:even", "static:best", "colocated:tuned"),
    )
    for name, trace, ttft_s in (
        ("arrow-chat", "sample:azure-conv", 0.5),
        ("arrow-code", "like:code", 0.5),
        ("arrow-long", "sample:mooncake-conv", 2.0),
    ):
        choice = WorkloadChoice(trace=trace, limit=3200)
        profile = packaged_profile("h100_sxm/llama-3.1-8b")
        slo = Slo(ttft_s, 0.05)
        yield Experiment(name, choice, profile, 8, slo, systems, orders=OWN_ORDER, claims=claims)


def _ares() -> Iterator[Experiment]:
    base, ours = "round-robin:2:8", ("ares:2:8", "ares-slo:2:8", "arrow+ares:2:8", *SUBJECTS)
    claims = (
        Claim("2.24 times the goodput", 2.24, "goodput", ours, base),
        Claim("P99 TPOT -74.77 %", 1 - 0.7477, "tpot p99", ours, base, factor=1.1),
    )
    systems = (*SUBJECTS, *ours[:3], base, "static:2:8", "static:best", "colocated:tuned")
    choice = WorkloadChoice(trace="sample:reasoning-day", limit=1000)
    profile = packaged_profile("rtx_4090/llama-3.1-8b")
    yield Experiment("ares", choice, profile, 10, Slo(5.0, 0.03), systems, orders=OWN_ORDER, claims=claims)


def _dopd() -> Iterator[Experiment]:
    chat = WorkloadChoice(trace="sample:azure-conv", limit=2000)
    large = packaged_profile("h100_sxm/llama-3.1-70b/tp4")
    yield Experiment(
        *("dopd-goodput", chat, large, 4, Slo(1.5, 0.05)),
        (*SUBJECTS, "dopd", "colocated", "static:even", "static:best", "colocated:tuned"),
        orders=OWN_ORDER,
        claims=(
            Claim(
                "1.5 times the goodput of colocated serving", 1.5, "goodput", ("dopd", *SUBJECTS), "colocated"
            ),
        ),
    )
    base, ours = "minimal-load:1:1", ("dopd", "minimal-load:1:1+length-aware", *SUBJECTS)
    small = packaged_profile("h100_sxm/llama-3.1-8b")
    yield Experiment(
        *("dopd-lengths", chat, small, 2, Slo(1.0, 0.025)),
        (*SUBJECTS, "dopd", base, "minimal-load:1:1+length-aware", "colocated:tuned"),
        orders=OWN_ORDER,
        claims=(
            Claim("P90 TTFT -67.5 %", 1 - 0.675, "ttft p90", ours, base, factor=1.05),
            Claim("P90 TPOT -22.8 %", 1 - 0.228, "tpot p90", ours, base, factor=1.05),
        ),
    )
    day = WorkloadChoice(trace="sample:reasoning-day", start_s=43_200.0)
    scarce = packaged_profile("rtx_4090/llama-3.1-8b")
    yield Experiment(
        *("dopd-day", day, scarce, 6, Slo(10.0, 0.06)),
        (),
        spares=3,
        claims=(
            Claim("99.4 % attained", 0.994, "attainment", ("dopd", "tidegate"), ""),
            Claim("DYN-SLA: 87.3 % attained", 0.873, "attainment", ("dynamo-sla",), ""),
            Claim("DYN-LOAD: 80.8 % attained", 0.808, "attainment", ("dynamo-load",), ""),
        ),
    )


def _ampd() -> Iterator[Experiment]:
    base, ours = "always-remote-return:1:1", ("ampd:1:1", "ampd-cost:1:1", *SUBJECTS)
    claims = (
        Claim("+67.29 % attained over Dynamo", 1.6729, "attainment", ours, base, factor=1.5),
        Claim("+339.74 % attained over vLLM", 4.3974, "attainment", ours, "colocated", factor=1.5),
    )
    systems = (*SUBJECTS, *ours[:2], base, "colocated", "colocated-sticky:tuned")
    profile = h20("h100_sxm/llama-3.1-70b/tp4")
    for name, sessions in (("toolbench", 300), ("hotpotqa", 250), ("dureader", 250)):
        choice = WorkloadChoice(trace=f"like:{name}:{sessions}")
        slo = round_targets(requests_of(choice), profile)
        yield Experiment(
            *(f"ampd-{name}", choice, profile, 2, slo, systems),
            orders=OWN_ORDER,
            closed_loop=True,
            claims=claims,
        )
