"""Promises of the planner: sound bounds, a program that finds its own best, files that start the plan."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from functools import partial
from itertools import islice, product
from pathlib import Path

import pytest
import yaml

from tidegate.cli.main import main
from tidegate.core.errors import ConfigError
from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.costs.library import packaged_profile
from tidegate.costs.named_profile import load_profile
from tidegate.costs.parallel import _scaled, profiles_on
from tidegate.costs.roofline import roofline_profile
from tidegate.costs.shapes import SHAPES
from tidegate.dataplane.replica import EngineSettings
from tidegate.experiments.jobs import Job, Store, Workers
from tidegate.experiments.setting import Setting, SimulatedFleet
from tidegate.planner import trial, watch
from tidegate.planner.answer import answer
from tidegate.planner.bounds import Bounds
from tidegate.planner.capacity import Affine, Capacities
from tidegate.planner.deployment import Deployment, PoolOf, deployment, kinds_on, offers
from tidegate.planner.feasibility import check_feasible
from tidegate.planner.manifests import commands, compose, gateway_words, kubernetes, serve_words, system_file
from tidegate.planner.moves import fits, neighbours
from tidegate.planner.program import Asked, Option, solutions
from tidegate.planner.question import Question, systems_for
from tidegate.planner.transition import MovePrices, payback_s, transition
from tidegate.planner.trial import TrialLength, attempt, length_for, settling_time_s
from tidegate.planner.watch import WindowVerdict
from tidegate.systems.registry import SystemOptions
from tidegate.workloads.choice import WorkloadChoice, requests_of

ROOT = Path(__file__).parents[2]
SLO = Slo(0.3, 0.02)
OFFERED = offers([("h100_sxm", None)], 4, {})
KINDS = {kind.tp: kind for kind in kinds_on(OFFERED, "llama-3.1-8b")}
WORKLOADS = {
    "long prompts": WorkloadChoice(poisson=20.0, input_tokens="2000", output_tokens="20", limit=250),
    "long answers": WorkloadChoice(poisson=20.0, input_tokens="100", output_tokens="200", limit=250),
    "shared prefixes": WorkloadChoice(trace="sample:mooncake-conv", limit=250),
}
P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


def made(system: str, *pools: tuple[Role, int, int]) -> Deployment:
    return deployment(system, [PoolOf(role, KINDS[tp], count, 2048) for role, tp, count in pools])


SMALL = (
    *(
        made("minimal-load", (P, p, n), (D, d, m))
        for p, n, d, m in ((1, 1, 1, 1), (1, 2, 2, 1), (2, 1, 1, 2))
    ),
    made("arrow-lending", (P, 1, 2), (D, 1, 2)),
    made("colocated", (M, 1, 2)),
    made("colocated", (M, 4, 1)),
    made("minimal-load", (P, 1, 1), (M, 1, 1)),
    made("tidegate", (M, 1, 2)),
)


@pytest.mark.parametrize("name", WORKLOADS)
def test_no_deployment_attains_above_its_bound(name: str) -> None:
    """So pruning by it removes no deployment that is better than the one it is compared with."""
    choice, found = WORKLOADS[name], 0
    slo = Slo(3.0, 0.05) if name == "shared prefixes" else SLO
    bounds = Bounds(choice, slo, 0.9, EngineSettings())
    base = Setting(choice, SimulatedFleet(()), "", None)
    base = Setting(choice, SimulatedFleet(()), "", None, type(base.settings)(slo=slo))
    for chosen in SMALL:
        bound_rps = bounds.rps(chosen, TrialLength(250))
        if bound_rps == float("inf"):
            continue
        found += 1
        for factor in (1.001, 1.3):
            run = attempt(chosen.applied(base), factor * bound_rps, 0, 250)
            assert run["attainment"] < 0.9, f"{chosen.title} at {factor:g} times {bound_rps:.4g}"
    assert found, "a bound that bounds nothing proves nothing"


@pytest.mark.parametrize("lost", [0.0, 3.0])
def test_the_program_finds_what_trying_every_count_finds(lost: float) -> None:
    each = {(P, 1): 10.0, (P, 2): 17.0, (D, 1): 7.0, (D, 2): 16.0, (P, 4): 30.0, (D, 4): 40.0}
    serves = {key: Affine(rps, lost) for key, rps in each.items()}
    options = [Option(role, KINDS[tp], 2048, own, own, own) for (role, tp), own in serves.items()]
    found = next(solutions(Asked("static", options, OFFERED, (P, D))))

    def rate(counts: tuple[int, ...]) -> float:
        if sum(count * tp for count, (_, tp) in zip(counts, each, strict=True)) > 4:
            return -1.0
        sums = {P: 0.0, D: 0.0}
        for count, (role, tp) in zip(counts, each, strict=True):
            sums[role] += serves[role, tp].rps(count)
        return min(sums.values())

    best = max(rate(counts) for counts in product(range(5), repeat=len(each)))
    counts = tuple(
        sum(pool.count for pool in found.pools if (pool.role, pool.kind.tp) == key) for key in each
    )
    assert rate(counts) == pytest.approx(best)


def test_a_rate_is_served_at_the_least_price_with_somebody_for_each_phase() -> None:
    own = Affine(10.0, 0.0)
    options = [Option(role, KINDS[tp], 2048, own, own, own) for role in (P, D) for tp in (1, 2)]
    found = list(islice(solutions(Asked("static", options, OFFERED, (P, D), 15.0)), 3))
    assert found[0] == made("static", (P, 1, 2), (D, 1, 2))
    assert not list(solutions(Asked("static", options, OFFERED, (P, D), 1000.0)))
    assert len(set(found)) == len(found)


def test_moves_stay_within_budget_and_family() -> None:
    question = Question(
        Setting(WORKLOADS["long prompts"], SimulatedFleet(()), ""), OFFERED, tuple(KINDS.values()), 0.9
    )
    for chosen in SMALL:
        near = neighbours(question, chosen)
        assert near and len(set(near)) == len(near)
        assert all(fits(question, each) and each.family == chosen.family for each in near)
    assert made("minimal-load", (P, 1, 1), (D, 1, 3)) in neighbours(
        question, made("minimal-load", (P, 1, 2), (D, 1, 2))
    )


def test_a_large_fleet_is_cut_into_equal_parts() -> None:
    offered = offers([("h100_sxm", 250), ("a100", 48)], None, {})
    question = Question(
        Setting(WORKLOADS["long prompts"], SimulatedFleet(()), ""),
        offered,
        kinds_on(offered, "llama-3.1-8b"),
        0.9,
        100.0,
    )
    part, parts = question.part(question.most_instances)
    assert parts > 1 and part.rate_rps == pytest.approx(100.0 / parts)
    assert [offer.count for offer in part.offers] == [250 // parts, 48 // parts]


@pytest.mark.parametrize("gpu", ["h100_sxm", "a100_sxm"])
def test_a_scaled_profile_is_near_the_measured_one(gpu: str) -> None:
    shape = SHAPES["llama-3.1-70b"]
    four, eight = (packaged_profile(f"{gpu}/llama-3.1-70b/tp{tp}").profile for tp in (4, 8))
    roofs = {tp: roofline_profile("x", gpu, shape, model="m", tp=tp).profile for tp in (4, 8)}
    found = _scaled(four, roofs[8], roofs[4], "x")
    for tokens in (512, 8192):
        assert found.prefill_s(tokens) == pytest.approx(eight.prefill_s(tokens), rel=0.15)
    assert float(found.step.seconds(32, 65536)) == pytest.approx(
        float(eight.step.seconds(32, 65536)), rel=0.1
    )
    assert "not measured" in profiles_on(gpu, "llama-3.1-8b", [4])[4].note


def test_an_slo_that_nobody_meets_is_told_with_the_nearest_that_can_be_met() -> None:
    workload = requests_of(WORKLOADS["long prompts"])

    def check(slo: Slo) -> None:
        check_feasible(Capacities(workload, slo, 0.9, EngineSettings()), KINDS.values())

    with pytest.raises(ConfigError, match=r"TTFT target binds.*met is ttft:\d+") as caught:
        check(Slo(0.001, 0.05))
    nearest_s = float(re.findall(r"ttft:([\d.]+)", caught.value.problems[0])[0]) / 1e3
    check(Slo(nearest_s, 0.05))
    with pytest.raises(ConfigError, match=r"TPOT target binds.*tpot:"):
        check(Slo(1.0, 0.0001))


def test_deployments_that_serve_nothing_are_told_so_and_none_is_tried_at_no_rate() -> None:
    """An SLO that each request alone would meet, and no queue does."""

    class NothingAttains(Workers):
        async def do(self, job: Job) -> dict[str, float]:
            assert isinstance(job.call, partial) and job.call.keywords["rate_rps"] > 0.0
            return {"attainment": 0.0, "until": 0.1}

    choice = WORKLOADS["long prompts"]
    setting = Setting(choice, SimulatedFleet(()), "", None)
    systems = systems_for(requests_of(choice))
    question = Question(setting, OFFERED, tuple(KINDS.values()), 0.9, systems=systems)
    with pytest.raises(ConfigError, match="no deployment of this budget attains 90%"):
        asyncio.run(answer(question, NothingAttains(1, Store(None))))


def test_a_run_of_long_answers_is_an_excerpt_of_a_longer_one() -> None:
    """Else it ends before its answers pile up, and the goodput is that of an empty fleet."""
    short, long = (
        WorkloadChoice(poisson=5.0, input_tokens="100", output_tokens=tokens, limit=50)
        for tokens in ("200", "4000")
    )
    # At an answer's age of a, a + 100 tokens are held: 80 % of all that is by 89 % of the answers.
    settles_s = settling_time_s(requests_of(long), 0.05)
    assert settles_s == pytest.approx(0.05 * 4000 * 0.89, rel=0.02)
    assert not length_for(requests_of(short), 0.05, 20.0).excerpt
    length = length_for(requests_of(long), 0.05, 20.0)
    assert length == TrialLength(1200, excerpt=True)
    chosen = made("colocated", (M, 1, 1))
    setting = chosen.applied(Setting(long, SimulatedFleet(()), ""))
    # A third of what the machine serves in the long run is nothing to an empty one.
    empty, settled = (attempt(setting, 3.0, 0, 100, excerpt) for excerpt in (False, True))
    assert empty["requests"] == settled["requests"] == 100
    assert settled["tpot_p95_s"] > 1.5 * empty["tpot_p95_s"]
    assert Bounds(long, SLO, 0.9, EngineSettings()).rps(chosen, length) == float("inf")


def test_a_run_that_is_hopeless_ends_early_and_says_so() -> None:
    """Both levels are within what is attained, one of them by a single request."""
    choice = WorkloadChoice(poisson=30.0, input_tokens="2000", output_tokens="20", limit=300)
    chosen = made("colocated", (M, 1, 1)).applied(Setting(choice, SimulatedFleet(()), ""))
    whole = attempt(chosen, 30.0, 0, 280)
    reached = whole["attainment"]
    assert 0.1 < reached < 0.9
    assert attempt(chosen, 30.0, 0, 280, level=reached) == whole
    cut = attempt(chosen, 30.0, 0, 280, level=reached + 1 / 280)
    assert reached <= cut["attainment"] < reached + 1 / 280 and 0 < cut["until"] < 1
    early = attempt(chosen, 30.0, 0, 280, level=0.95)
    assert early["until"] < cut["until"] and "ttft_p95_s" not in early


def test_a_move_is_priced_by_what_changes() -> None:
    prices = MovePrices(start_s=60.0, drain_s=10.0)
    split = made("arrow-lending", (P, 1, 2), (D, 1, 2))
    assert transition(split, replace(split, system="arrow"), prices).cost_gpu_s == 0.0
    more = transition(split, made("arrow-lending", (P, 1, 1), (D, 1, 3)), prices)
    assert (more.kept, more.flips, more.stops, more.cost_gpu_s) == (3, 1, 0, 0.0)  # no answer to wait for
    less = transition(split, made("arrow-lending", (P, 1, 3), (D, 1, 1)), prices)
    assert (less.flips, less.cost_gpu_s) == (1, 5.0)
    larger = transition(split, made("arrow-lending", (P, 1, 2), (D, 2, 1)), prices)
    assert (larger.kept, larger.stops, larger.starts) == (2, 2, 1)
    assert larger.cost_gpu_s == 2 * 5.0 + 2 * 60.0 and larger.kv_gpu_s == 0.0
    lost = transition(made("colocated", (M, 1, 2)), made("colocated", (M, 2, 1)), replace(prices, cached=0.5))
    assert lost.cost_gpu_s == pytest.approx(2 * 5.0 + 2 * 60.0 + lost.kv_gpu_s) and lost.kv_gpu_s > 0.0
    assert payback_s(130.0, 4, 10.0, 12.0) == pytest.approx(130.0 / (4 * 0.2))
    assert payback_s(130.0, 4, 10.0, 10.0) == float("inf")


PLANNED = (
    made("tidegate", (M, 1, 2)),
    made("arrow-lending", (P, 1, 2), (D, 2, 1)),
    made("colocated", (M, 2, 2)),
    made("minimal-load", (P, 1, 1), (M, 1, 2)),
)


@pytest.mark.parametrize("chosen", PLANNED, ids=lambda chosen: chosen.family)
def test_the_files_start_every_replica(chosen: Deployment, tmp_path: Path) -> None:
    known = (ROOT / "docs/engines/vllm.md").read_text()
    for pool in chosen.pools:
        words = serve_words(pool, "m")
        assert [word for word in words if word.startswith("--") and f"{word}" not in known] == []
        json.loads(words[words.index("--kv-transfer-config") + 1])
    composed = yaml.safe_load(compose(chosen, "m", SLO))
    devices = [
        device
        for name, service in composed["services"].items()
        if name != "tidegate"
        for device in service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
    ]
    assert sorted(devices) == [str(n) for n in range(sum(chosen.gpus.values()))]
    parts = list(yaml.safe_load_all(kubernetes(chosen, "m", SLO)))
    sets = [part for part in parts if part["kind"] == "StatefulSet"]
    assert [each["spec"]["replicas"] for each in sets] == [pool.count for pool in chosen.pools]
    script = commands(chosen, "m", SLO)
    assert script.count("vllm serve m ") == chosen.instances
    words = gateway_words(chosen, SLO, dict.fromkeys(composed["services"], "h:1"))
    for at, word in enumerate(words):
        if word == "--profile":
            load_profile(words[at + 1])
    if chosen.family == "mixed":
        names: dict[str, object] = {}
        exec(compile(system_file(chosen), "plan_system.py", "exec"), names)
        system = names["planned"](SystemOptions(slo=SLO))  # type: ignore[operator]
        assert system.roles(chosen.instances) == (P, M, M)


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "FEWEST", 300)
    monkeypatch.setattr(trial, "MOST", 300)


def status(*words: object) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


ASKED = ("--seeds", "2", "--top", "2", "--jobs", "1", "--slo", "ttft:200,tpot:30")


@pytest.mark.usefixtures("short_runs")
def test_a_plan_is_printed_written_and_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal, out = tmp_path / "journal.jsonl", tmp_path / "plan"
    assert status("sim", "--requests", 300, "--rate", 20, "--instances", 2, "--journal", journal) == 0
    capsys.readouterr()
    assert status("plan", "--gpus", 2, *ASKED, "--workload", journal, "--out", out, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan == json.loads((out / "plan.json").read_text()) | {"took_s": plan["took_s"]}
    rates = [each["goodput_rps"] for each in plan["plans"][:2]]
    assert rates == sorted(rates, reverse=True) and rates[0] > 0
    assert all(sum(each["gpus"].values()) <= 2 for each in plan["plans"])
    assert all(0 <= each["confidence"] <= 1 for each in plan["plans"])
    assert plan["findings"] and {"compose.yaml", "kubernetes.yaml", "commands.sh"} <= {
        p.name for p in out.iterdir()
    }

    asked = ("--watch", journal, "--deployed", out / "plan.json", *ASKED)
    assert status("plan", *asked) == 0
    assert "what is deployed is still the best" in capsys.readouterr().out
    worse = json.loads((out / "plan.json").read_text())
    worse["plans"][0]["pools"] = [dict(worse["plans"][0]["pools"][0], role="mixed", tp=1, replicas=1)]
    worse["plans"][0]["system"] = "colocated"
    (out / "plan.json").write_text(json.dumps(worse))
    assert status("plan", *asked) == 0
    told = capsys.readouterr().out
    assert "no longer the best" in told and re.search(r"costs [\d,]+ GPU-seconds, .*: move", told)
    assert status("plan", *asked, "--payback", "0.001") == 0
    assert "not within 0 s: stay" in capsys.readouterr().out


def test_a_growing_journal_is_followed_window_by_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, journal = tmp_path / "whole.jsonl", tmp_path / "journal.jsonl"
    assert status("sim", "--requests", 300, "--rate", 20, "--instances", 2, "--journal", whole) == 0
    lines = whole.read_text().splitlines(keepends=True)
    monkeypatch.setattr(watch, "POLL_S", 0.0)
    monkeypatch.setattr(watch, "LATE_S", 1.0)
    monkeypatch.setattr(watch, "FEWEST_REQUESTS", 10)
    polls: list[int] = []

    def size(path: Path) -> int:
        polls.append(path.stat().st_size)
        return polls[-1]

    monkeypatch.setattr(watch, "_size", size)

    async def verdict(question: Question, chosen: Deployment, start_s: float, *_: object) -> WindowVerdict:
        return WindowVerdict(start_s, 1.0, 1.0, 1.0)

    monkeypatch.setattr(watch, "_verdict", verdict)
    question = Question(
        Setting(WorkloadChoice(trace=str(journal)), SimulatedFleet(()), ""),
        OFFERED,
        tuple(KINDS.values()),
        0.9,
    )

    async def followed() -> list[float]:
        async with Workers(1, Store(None)) as workers:
            windows = watch.verdicts(question, SMALL[0], 5.0, workers, follow=True)
            first = asyncio.ensure_future(anext(windows))
            while len(polls) < 3:
                await asyncio.sleep(0)
            assert not first.done()  # half a line, and no window is over
            with journal.open("a") as file:
                file.write(lines[len(lines) // 6][20:] + "".join(lines[len(lines) // 6 + 1 :]))
            return [(await first).start_s, (await anext(windows)).start_s]

    journal.write_text("".join(lines[: len(lines) // 6]) + lines[len(lines) // 6][:20])
    assert asyncio.run(followed()) == [0.0, 5.0]


@pytest.mark.usefixtures("short_runs")
def test_a_rate_beyond_the_budget_is_told_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("plan", "--gpus", 1, *ASKED, "--rate", 5000) == 2
    assert re.search(
        r"the budget binds: 1 GPUs serve at most .*--rate [\d.e+]+; 5000 would take", capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--gpus", 2, "--model", "lama-3.1-8b"), "did you mean llama-3.1-8b"),
        (("--gpu", "h100:4"), "h100_pcie or h100_sxm"),
        (("--gpu", "h100_sxm"), "--gpus N"),
        (("--model", "llama-3.1-70b", "--gpu", "h100_sxm:1"), "the budget binds"),
        (("--gpus", 2, "--price", "h100_sxm=x"), "--price is GPU=DOLLARS"),
        (("--gpus", 2, "--watch", "j.jsonl"), "--deployed"),
        (("--gpus", 2, "--slo", "ttft:1000,tpot:1"), "tpot:"),
    ],
)
def test_bad_input_is_told(words: tuple[object, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("plan", *words) == 2
    assert told in capsys.readouterr().err


def test_conversations_are_run_as_whole_sessions_and_ampd_is_tried() -> None:
    choice = WorkloadChoice(trace="like:toolbench")
    drawn, own = trial.drawn(choice, 150, 0), requests_of(choice)
    ids = own.column("session_id").tolist()
    assert len(drawn) == sum(map(ids.count, set(drawn.column("session_id")))) >= 150
    slow, fast = (trial.scaled_to(drawn, rate_rps).arrival_s.max() for rate_rps in (8.0, 16.0))
    assert slow == pytest.approx(2.0 * fast)
    assert Bounds(choice, SLO, 0.9, EngineSettings()).rps(SMALL[0], TrialLength(150)) == float("inf")

    systems = systems_for(own)
    assert "ampd-cost" in systems["disaggregated"]
    assert systems_for(own, "arrow")["disaggregated"] == ("arrow",)
    assert "ampd-cost" not in systems_for(requests_of(WORKLOADS["long prompts"]))["disaggregated"]
    setting = Setting(choice, SimulatedFleet(()), "")
    question = Question(setting, OFFERED, tuple(KINDS.values()), 0.9, systems=systems)
    chosen = made("arrow-lending", (P, 1, 2), (D, 1, 2))
    assert replace(chosen, system="ampd-cost") in neighbours(question, chosen)
