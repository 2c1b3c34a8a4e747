"""``tidegate predictor``: learn how many tokens a request still has to go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli.model import require_embedded
from tidegate.cli.options import Flag, at_least, epilog, expanded
from tidegate.cli.terminal import note

COLLECT_EXAMPLES = """
    tidegate predictor collect --model models/smollm2 --out collected --requests 2000
"""


def collect(
    model: Annotated[Path, Flag("Model folder in the Hugging Face layout.", metavar="DIR")],
    out: Annotated[Path, Flag("Folder of the samples; a collection in it is continued.", metavar="DIR")],
    requests: Annotated[int, Flag("Prompts to answer.", rule=at_least(1))] = 2000,
    batch: Annotated[int, Flag("Requests that run at once.", rule=at_least(1))] = 32,
    minutes: Annotated[float, Flag("Begin no request after so long.")] = 24 * 60,
    seed: Annotated[int, Flag("Seed of prompts and sampling.")] = 0,
    every: Annotated[int, Flag("Tokens between two samples of a request.", rule=at_least(1))] = 20,
    max_tokens: Annotated[int, Flag("Longest answer, in tokens.", rule=at_least(1))] = 1024,
    dtype: Annotated[str, Flag("Dtype of the model.")] = "auto",
) -> None:
    """Answer generated prompts and keep hidden states along the answers.

    Runs the embedded engine in this process. Stop it when you like: the same command goes on where it was.
    """
    require_embedded()
    from tidegate.predictor.collect import Collector, settings_for

    settings = settings_for(model, seed=seed, every=every, max_tokens=max_tokens, dtype=dtype)
    collector = Collector(model, out, requests=requests, batch=batch, settings=settings)
    have = collector.run(note, minutes * 60)
    typer.echo(f"{out} has {have} requests")


verbs = typer.Typer(no_args_is_help=True)
verbs.command("collect", epilog=epilog(COLLECT_EXAMPLES))(expanded(collect))
