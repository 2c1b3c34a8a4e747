"""Promises of the command: quick, kind about errors, the same words everywhere."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer

from tidegate import __version__
from tidegate.cli import entry
from tidegate.cli import main as command_line
from tidegate.cli.terminal import INTERRUPTED
from tidegate.core.errors import ConfigError, EngineFault, SetupError

HEAVY = ("torch", "transformers", "numpy", "aiohttp", "pydantic", "prometheus_client")


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tidegate.cli.main", *words],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "", "NO_COLOR": "1", "COLUMNS": "100", **environment},
    )


def test_the_overview_loads_nothing_heavy() -> None:
    script = (
        "import sys; from tidegate.cli.main import build_app; build_app(['--help']);"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_and_version() -> None:
    assert run("--version").stdout == f"tidegate {__version__}\n"
    overview = run("--help")
    assert overview.returncode == 0
    assert all(name in overview.stdout for name in command_line.VERBS)


@pytest.mark.parametrize("name", command_line.VERBS)
def test_the_overview_says_what_the_verb_says(name: str) -> None:
    verb = command_line.VERBS[name]
    app = typer.Typer()
    app.callback()(lambda: None)
    command_line.add_verb(app, name)
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    assert command.get_short_help_str(200).rstrip(".") == verb.summary.rstrip(".")
    assert command.rich_help_panel == verb.panel


@pytest.mark.parametrize("name", [*command_line.VERBS, "model make"])
def test_every_verb_has_help_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main([*name.split(), "--help"])
    assert caught.value.code == 0
    if name != "model":
        told = capsys.readouterr().out
        assert "Examples" in told and f"tidegate {name}" in told


def test_wrong_words_exit_2_without_a_traceback() -> None:
    for words in (["srve"], ["serve", "--prot", "1"], ["serve", "--port", "x"], ["model", "make"]):
        done = run(*words)
        assert done.returncode == 2, words
        assert done.stderr and "Traceback" not in done.stderr
    assert "Did you mean" in run("srve").stderr


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (SetupError("no such trace"), 2, "tidegate: no such trace\n"),
        (ConfigError(["a", "b"]), 2, "tidegate: 2 problems:\n  - a\n  - b\n"),
        (EngineFault("i0 failed"), 1, "tidegate: i0 failed\n"),
        (ValueError("x"), 1, "tidegate: ValueError: x\n(TIDEGATE_DEBUG=1 shows where)\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_one_message_and_a_status(
    error: BaseException,
    status: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def app(**_: object) -> None:
        raise error

    monkeypatch.delenv("TIDEGATE_DEBUG", raising=False)
    monkeypatch.setattr(command_line, "build_app", lambda _: app)
    with pytest.raises(SystemExit) as caught:
        command_line.main(["serve"])
    assert caught.value.code == status
    assert capsys.readouterr().err == text
    if isinstance(error, Exception):
        monkeypatch.setenv("TIDEGATE_DEBUG", "1")
        with pytest.raises(type(error)):
            command_line.main(["serve"])


def test_a_ctrl_c_while_the_program_loads_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupt:
        def find_spec(self, name: str, *rest: object) -> None:
            if name == "tidegate.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "tidegate.cli.main")
    monkeypatch.delattr("tidegate.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Interrupt(), *sys.meta_path])
    with pytest.raises(SystemExit) as caught:
        entry.main()
    assert caught.value.code == INTERRUPTED
