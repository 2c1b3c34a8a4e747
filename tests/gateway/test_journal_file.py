"""The journal's file: never another run's, never in the way."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import orjson
import pytest

from tidegate.core.errors import ConfigError
from tidegate.gateway.journal import Journal
from tidegate.gateway.run import Gateway
from tidegate.gateway.settings import GatewaySettings
from tidegate.systems import make_system
from tidegate.testing.members import GivenFleet


def lines(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


async def test_what_is_written_before_open_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "j.jsonl"
    journal = Journal(path, 10.0)
    journal.header(version="1")
    assert not path.exists()
    journal.open()
    journal.write("flip", 12.5, instance="a")
    journal.close()
    journal.write("flip", 13.0, instance="b")
    assert [(row["type"], row["t"]) for row in lines(path)] == [("header", 0.0), ("flip", 2.5)]


async def test_an_earlier_journal_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text("an earlier run\n")
    journal = Journal(path, 0.0)
    with pytest.raises(ConfigError, match="name another file, or delete it"):
        journal.open()
    journal.close()
    assert path.read_text() == "an earlier run\n"
    path.write_text("")
    journal = Journal(path, 0.0)
    journal.header(version="1")
    journal.open()
    journal.close()
    assert len(lines(path)) == 1


async def test_a_device_may_be_named_again_and_again() -> None:
    for _ in range(2):
        journal = Journal(Path("/dev/null"), 0.0)
        journal.header(version="1")
        journal.open()
        journal.close()


async def test_a_full_disk_ends_the_journal_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(Path("/dev/full"), 0.0)
    journal.open()
    for _ in range(3):
        journal.write("flip", 1.0, instance="a")
        journal.flush()
    journal.close()
    assert not journal.enabled
    assert [r.levelno for r in caplog.records] == [logging.ERROR]
    assert "No space left" in caplog.text


async def test_odd_values_cost_themselves_and_not_the_line(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path, 0.0)
    journal.open()
    journal.write("outcome", 1.0, tenant="a\udcff", seed=2**70, path=tmp_path)
    journal.close()
    (row,) = lines(path)
    assert (row["type"], row["tenant"], row["path"]) == ("outcome", "a?", str(tmp_path))


async def test_a_gateway_without_its_port_leaves_the_journal_alone(start: Any, tmp_path: Path) -> None:
    cluster = await start("static")
    port = int(cluster.url.rpartition(":")[2])
    settings = GatewaySettings(port=port, journal=tmp_path / "journal.jsonl")
    second = Gateway(settings, GivenFleet({"i0": ""}), make_system("static"))
    with pytest.raises(ConfigError, match="choose another --port"):
        await second.start()
    await second.stop()
    await cluster.gateway.stop()
    assert [row["type"] for row in lines(tmp_path / "journal.jsonl")] == ["header", "instance", "instance"]
