"""The model that ``serve`` runs when it is given none: tiny, random, made once per version."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tidegate import __version__
from tidegate.core.errors import SetupError

ARCH = "llama"
NEEDS = ("torch", "transformers", "jinja2")


def require_embedded() -> None:
    """Raise SetupError when the packages of the embedded engine are not installed."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise SetupError(
            f"the embedded engine needs {', '.join(missing)}: pip install 'tidegate[embedded]'\n"
            "(or serve running vLLM servers: tidegate serve --vllm http://HOST:PORT)"
        )


def cache_folder() -> Path:
    """Return tidegate's folder in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tidegate"


def tiny_model() -> Path:
    """Return the folder of the tiny model, making it first if it is not in the cache.

    The folder appears in one step, so that it is complete whenever it exists, also when two
    processes make it at once. Raises SetupError when it cannot be made.
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
    command = [
        sys.executable,
        "-m",
        "tidegate.cli.main",
        "model",
        "make",
        str(folder),
        "--arch",
        ARCH,
        "--force",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SetupError(f"making the tiny model failed:\n{done.stderr.strip()}")
