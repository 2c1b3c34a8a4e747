"""The journal's file: never another run's, never in the way."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.gateway.gateway_cluster import Start
from tidegate.core.decision import Flip
from tidegate.core.errors import ConfigError, TraceError
from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.gateway.journal import JournalFile
from tidegate.gateway.run import Gateway
from tidegate.gateway.settings import GatewaySettings
from tidegate.journal import read_journal
from tidegate.systems import make_system
from tidegate_testing.members import GivenFleet

FLIP = Flip("i0", Role.DECODE, "monitor")


def begin(journal: JournalFile) -> None:
    journal.header(version="1", system="static", slo=Slo(), roles=[])


def lines(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


async def test_what_is_written_before_open_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "j.jsonl"
    journal = JournalFile(path, 10.0)
    begin(journal)
    assert not path.exists()
    journal.open()
    journal.flip(12.5, FLIP, Role.PREFILL, "")
    journal.close()
    journal.flip(13.0, FLIP, Role.PREFILL, "")
    assert [(row["type"], row["t"]) for row in lines(path)] == [("header", 0.0), ("flip", 2.5)]


async def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text("an earlier run\n")
    journal = JournalFile(path, 0.0)
    with pytest.raises(ConfigError, match="name another file, or delete it"):
        journal.open()
    journal.close()
    assert path.read_text() == "an earlier run\n"


@pytest.mark.parametrize("half", [b"", b"{", b'{"type":"header","t":0.0,"ver', b'{"type":"flip","t":9'])
async def test_a_restart_goes_on_with_its_journal(tmp_path: Path, half: bytes) -> None:
    path, now = tmp_path / "j.jsonl", time.time()
    began = first_run(now - 100) if not half or b"flip" in half else b""
    path.write_bytes(began + half)
    journal = JournalFile(path, 5000.0)
    journal.open()
    journal.header(version="2", system="static", slo=Slo(), roles=[], now_s=5000.0, now_unix_s=time.time())
    journal.flip(5001.0, FLIP, Role.PREFILL, "")
    journal.close()
    rows = lines(path)
    *earlier, header, flip = rows
    assert [row["type"] for row in earlier] == (["header", "flip"] if began else [])
    assert header["started_unix_s"] == pytest.approx(rows[0]["started_unix_s"], abs=0.1)
    assert header["t"] >= (100 if began else 0)
    assert flip["t"] == pytest.approx(header["t"] + 1.0)
    read = read_journal(path)
    assert (read.version, len(read.flips), read.truncated) == ("2", 1 + bool(began), False)


def first_run(began_unix_s: float) -> bytes:
    header = {"type": "header", "t": 0.0, "version": "1", "started_unix_s": began_unix_s}
    flip = {"type": "flip", "t": 7.0, "instance": "i0", "from": "decode", "to": "prefill"}
    return b"".join(orjson.dumps(row) + b"\n" for row in (header, flip))


async def test_a_journal_that_is_being_written_belongs_to_its_gateway(tmp_path: Path) -> None:
    first, second = (JournalFile(tmp_path / "j.jsonl", 0.0) for _ in range(2))
    first.open()
    begin(first)
    with pytest.raises(ConfigError, match="another gateway writes the journal"):
        second.open()
    second.close()
    first.close()
    assert len(lines(tmp_path / "j.jsonl")) == 1


async def test_a_device_may_be_named_again_and_again() -> None:
    for _ in range(2):
        journal = JournalFile(Path("/dev/null"), 0.0)
        begin(journal)
        journal.open()
        journal.close()


async def test_a_full_disk_ends_the_journal_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    journal = JournalFile(Path("/dev/full"), 0.0)
    journal.open()
    for _ in range(3):
        journal.flip(1.0, FLIP, Role.PREFILL, "")
        journal.flush()
    journal.close()
    assert not journal.enabled
    assert [r.levelno for r in caplog.records] == [logging.ERROR]
    assert "No space left" in caplog.text


async def test_forecasts_may_begin_with_the_journal_that_is_to_be_written(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "journal.jsonl"
    settings = GatewaySettings(forecast_from=own)
    for begun in (False, True):
        assert own.exists() is begun
        cluster = await start("static", settings=settings)
        await cluster.gateway.stop()
        assert "forecasts begin with nothing" in caplog.text
        caplog.clear()
    other = tmp_path / "other.jsonl"
    own.rename(other)
    refused = Gateway(GatewaySettings(forecast_from=other), GivenFleet({"i0": ""}), make_system("static"))
    with pytest.raises(TraceError, match="forecasts cannot begin with it"):
        await refused.start()
    await refused.stop()


async def test_a_gateway_without_its_port_leaves_the_journal_alone(start: Start, tmp_path: Path) -> None:
    cluster = await start("static")
    port = int(cluster.url.rpartition(":")[2])
    settings = GatewaySettings(port=port, journal=tmp_path / "journal.jsonl")
    second = Gateway(settings, GivenFleet({"i0": ""}), make_system("static"))
    with pytest.raises(ConfigError, match="choose another --port"):
        await second.start()
    await second.stop()
    await cluster.gateway.stop()
    assert [row["type"] for row in lines(tmp_path / "journal.jsonl")] == ["header", "instance", "instance"]
