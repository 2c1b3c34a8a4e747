"""A measurement of an emulated instance that is interrupted, over real HTTP."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.emulated.emulated_pair import OfTwo
from tidegate.cli import profile
from tidegate.cli.main import main
from tidegate.profiling.run import ProbeSettings, measure
from tidegate.profiling.unfinished import unfinished_path


async def prefills_until(last: str, url: str, keep: Path) -> list[str]:
    """Measure until a point is to be timed and cancel there, as Ctrl-C does; return what was timed so far."""
    shown: list[str] = []

    def advance(share: float, what: str, fresh: float) -> None:
        assert 0.0 <= fresh <= share <= 1.0
        shown.append(what)
        if what == last:
            running.cancel()

    running = asyncio.create_task(measure(ProbeSettings([url], budget_s=60.0), advance, keep))
    with pytest.raises(asyncio.CancelledError):
        await running
    return [what for what in shown if what.startswith("prefill")]


async def test_what_was_timed_before_an_interrupt_is_not_timed_again(two: OfTwo, tmp_path: Path) -> None:
    keep = unfinished_path(tmp_path / "p.json")
    async with two() as pair:
        first = await prefills_until("prefill of 1024 tokens", pair.urls[0], keep)
        again = await prefills_until("prefill of 128 tokens", pair.urls[0], keep)
        other = await prefills_until("prefill of 64 tokens", pair.urls[1], keep)
    lengths = (16, 64, 256, 1024, 32, 128)
    assert first + again[1:] == [f"prefill of {n} tokens" for n in lengths] and again[0] == first[-1]
    assert other == [f"prefill of {n} tokens" for n in (16, 64)], "another instance begins anew"


@pytest.mark.parametrize("out", [True, False])
def test_an_interrupt_says_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: bool
) -> None:
    def interrupted(settings: ProbeSettings, advance: object, keep: Path | None) -> None:
        if keep is not None:
            keep.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(profile, "measure_profile", interrupted)
    words = ["--out", str(tmp_path / "p.json")] if out else []
    with pytest.raises(SystemExit) as caught:
        main(["profile", "--url", "http://127.0.0.1:9", *words])
    assert caught.value.code == 130
    assert ("goes on from there" if out else "nothing is kept") in capsys.readouterr().err
