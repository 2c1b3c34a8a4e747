"""Results are worked out once, whoever asks and however often the process was killed."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tidegate.cli.terminal import run_until_interrupted
from tidegate.core.errors import ConfigError, InternalError, TraceError
from tidegate.experiments.jobs import Job, Store, Workers


def count_up(folder: str, value: int) -> int:
    """Leave a mark of this call, and return the value."""
    with Path(folder, "calls").open("a") as file:
        file.write(f"{value}\n")
    return value


def fail(text: str) -> None:
    raise ConfigError(text)


class Picky(Exception):
    """An error that cannot be sent from process to process: it wants more than its message."""

    def __init__(self, message: str, *, place: str) -> None:
        super().__init__(f"{place}: {message}")


def fail_with(kind: str) -> None:
    if kind == "trace":
        raise TraceError("no such file", file="t.csv", line=3)
    if kind == "stranger":
        raise Picky("cannot place", place="there")
    os._exit(1)


def do_all(jobs: list[Job], store: Store, processes: int) -> list[int]:
    async def everything() -> list[int]:
        async with Workers(processes, store) as workers:
            return list(await asyncio.gather(*(workers.do(job) for job in jobs)))

    return asyncio.run(everything())


@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_is_done_once(tmp_path: Path, processes: int) -> None:
    jobs = [Job(f"k{value}", partial(count_up, str(tmp_path), value)) for value in (1, 2, 1, 2, 1)]
    for _ in range(2):
        store = Store(tmp_path / "results.jsonl")
        assert do_all(jobs, store, processes) == [1, 2, 1, 2, 1]
        store.close()
    assert sorted((tmp_path / "calls").read_text().split()) == ["1", "2"]


@pytest.mark.parametrize("processes", [1, 2])
def test_what_a_job_raises_reaches_the_caller(processes: int) -> None:
    jobs = [Job("bad", partial(fail, "no such trace")), Job("slow", partial(os.path.exists, "/"))]
    with pytest.raises(ConfigError, match="no such trace"):
        do_all(jobs, Store(None), processes)


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("trace", TraceError, "t.csv:3: no such file"),
        ("stranger", InternalError, r"test_jobs.py, line \d+: Picky: there: cannot place"),
        ("death", InternalError, "a worker process was killed"),
    ],
)
def test_a_workers_failure_reaches_the_caller_whatever_it_is(kind: str, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        do_all([Job("bad", partial(fail_with, kind))], Store(None), 2)


def test_half_a_line_of_a_killed_writer_costs_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    store = Store(path)
    store.put("a", {"x": 1.5})
    store.close()
    with path.open("ab") as file:
        file.write(b'{"key": "b", "val')
    store = Store(path)
    assert (store.get("a"), store.get("b"), len(store)) == ({"x": 1.5}, None, 1)
    store.put("b", 2)
    store.close()
    store = Store(path)
    assert store.get("b") == 2
    store.close()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot keep results"):
        Store(tmp_path / "file" / "results.jsonl")


async def _rise() -> None:
    signal.raise_signal(signal.SIGINT)
    raise AssertionError("Ctrl-C waited for the end of the call")


def test_ctrl_c_ends_a_call_in_this_process_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_until_interrupted(_rise(), "all of it is kept")
    assert capsys.readouterr().err == "tidegate: interrupted; all of it is kept\n"
    assert signal.getsignal(signal.SIGINT) is before
