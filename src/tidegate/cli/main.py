"""The ``tidegate`` command: verbs, version, and how errors reach the user."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, NamedTuple, NoReturn

import typer

from tidegate import __version__
from tidegate.cli.terminal import FAILURE, INTERRUPTED, WRONG_INPUT, debugging, note, tell_of_traces
from tidegate.core.errors import ConfigError, SetupError, TidegateError


class Verb(NamedTuple):
    """What the overview shows of a verb. Its module here has ``run``, or the Typer app ``verbs``."""

    summary: str
    panel: str


PANELS = {
    "Serve": {
        "serve": "Serve a model over several instances, behind one OpenAI-compatible endpoint.",
        "state": "Show the instances of a running gateway: their roles, their work and their last flips.",
        "check": "Prove what a fleet of vLLM servers can do, before traffic does.",
        "model": "Make models to try things with.",
        "predictor": "Learn how many tokens a request still has to go, from a model's hidden states.",
    },
    "Simulate": {
        "demo": "Compare scheduling systems on moving traffic, simulated, in under a minute.",
        "sim": "Simulate a cluster under a workload, with the policies that the gateway runs.",
        "compare": "Find the goodput of every system on every trace, and write one report.",
        "plan": "Find what to deploy for a workload: how many replicas of which size, for which phase.",
    },
    "Measure": {
        "bench": "Offer load to an OpenAI-compatible endpoint and score every answer.",
        "profile": (
            "Measure a live, idle instance and fit the latency models that policies and simulator use."
        ),
        "trace": "Look at request traces, make them, convert them.",
        "report": "Report on a recorded run: outcomes, SLO attainment, times by stage, decisions.",
        "explain": "Explain decisions of a recorded run: what was known, what was chosen, what came of it.",
    },
}
VERBS = {name: Verb(text, panel) for panel, verbs in PANELS.items() for name, text in verbs.items()}


def build_app(words: Sequence[str]) -> typer.Typer:
    """Return the command line for ``words``.

    Only the verb among ``words`` is imported: loading all of them would take longer than showing the
    overview does.
    """
    app = typer.Typer(
        name="tidegate",
        help="An adaptive control plane for prefill/decode disaggregated LLM serving.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        rich_markup_mode="rich",
    )
    app.callback()(_root)
    wanted = next((word for word in words if not word.startswith("-")), "")
    for name, verb in VERBS.items():
        if name == wanted:
            add_verb(app, name)
        else:
            app.command(name, help=verb.summary, rich_help_panel=verb.panel)(_not_loaded)
    return app


def add_verb(app: typer.Typer, name: str) -> None:
    """Import what carries a verb out, and add it to ``app``."""
    from tidegate.cli.options import epilog, expanded

    verb = VERBS[name]
    if verb.panel == "Simulate":  # has no use for the threads that numpy would start, which spin at first
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    tell_of_traces()
    module = import_module(f"tidegate.cli.{name}")
    if hasattr(module, "verbs"):
        app.add_typer(module.verbs, name=name, help=verb.summary, rich_help_panel=verb.panel)
        return
    settings = getattr(module, "CONTEXT", None)
    command = app.command(
        name, epilog=epilog(module.EXAMPLES), rich_help_panel=verb.panel, context_settings=settings
    )
    command(expanded(module.run))


def _not_loaded() -> NoReturn:
    raise AssertionError("this verb was not on the command line")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tidegate {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line. Exit status 2 is the user's to correct, 1 a failure, 130 a Ctrl-C."""
    words = sys.argv[1:] if words is None else words
    try:
        build_app(words)(args=list(words), prog_name="tidegate")
    except SetupError as error:
        problems = error.problems if isinstance(error, ConfigError) else []
        listed = "\n".join([f"{len(problems)} problems:", *(f"  - {problem}" for problem in problems)])
        _fail(error, listed if len(problems) > 1 else error.message, WRONG_INPUT)
    except TidegateError as error:
        _fail(error, error.message, FAILURE)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        what = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        _fail(error, f"{what}\n(TIDEGATE_DEBUG=1 shows where)", FAILURE)


def _fail(error: Exception, text: str, status: int) -> NoReturn:
    if debugging():
        raise error
    note(text)
    sys.exit(status)


if __name__ == "__main__":
    main()
