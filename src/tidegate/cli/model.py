"""``tidegate model``: models to try things with."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli.options import Flag, expanded
from tidegate.core.errors import SetupError


class Arch(StrEnum):
    """Architectures that the tiny model comes in."""

    LLAMA = "llama"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"
    MISTRAL = "mistral"


EPILOG = """
[bold]Examples[/bold]

    tidegate model make models/tiny

    tidegate model make models/tiny-qwen3 --arch qwen3 --seed 7
"""


def make(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; created if missing.")],
    arch: Annotated[Arch, Flag("Architecture.")] = Arch.LLAMA,
    seed: Annotated[int, Flag("Seed of the random weights.")] = 0,
    force: Annotated[bool, Flag("Write into a folder that is not empty.")] = False,
) -> None:
    """Make a tiny model with random weights and a real tokenizer.

    The text it writes is gibberish; everything around the text is real.
    It needs no download.
    """
    if folder.exists() and not folder.is_dir():
        raise SetupError(f"{folder} exists and is not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise SetupError(f"{folder} is not empty; choose another folder or add --force")
    from tidegate.cli.tiny import require_embedded

    require_embedded()
    from tidegate.engines.embedded.tiny_model import make_tiny_model

    made = make_tiny_model(folder, arch.value, seed=seed)
    typer.echo(f"made {made}; serve it with: tidegate serve --model {made}")


verbs = typer.Typer(no_args_is_help=True)
verbs.command("make", epilog=EPILOG)(expanded(make))
