"""Compile what a simulation spends its time in, in place: ``python scripts/compile_hot_path.py``.

The modules of ``MODULES`` become extensions beside their sources (mypyc), in one group, so that calls among
them are plain C calls. The results stay the same to the last bit. Python takes an extension before a source,
and would go on doing so after the source has changed; ``src/tidegate/_compiled.json`` hashes what
was compiled, ``--check`` compares them, and ``--clean`` goes back to Python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
STAMP = SOURCE / "tidegate" / "_compiled.json"
MODULES = (
    "core/decision", "core/request",
    "costs/forms", "costs/profile",
    "dataplane/batcher", "dataplane/blocks", "dataplane/cluster", "dataplane/decode_batch", "dataplane/due",
    "dataplane/events", "dataplane/instance", "dataplane/links", "dataplane/migration", "dataplane/network",
    "dataplane/prefix", "dataplane/pricing", "dataplane/sequence", "dataplane/stretch",
    "ledger/among", "ledger/ledger", "ledger/records", "ledger/sheet", "ledger/snapshot", "ledger/windows",
    "policies/arrow", "policies/arrow_flip", "policies/arrow_lending", "policies/arrow_loads",
    "policies/candidates", "policies/minimal_load", "policies/order", "policies/pricing", "policies/waiting",
    "sim/arrivals", "sim/columns", "sim/control", "sim/driver", "sim/flight", "sim/migrator", "sim/reports",
    "sim/serving",
)  # fmt: skip
"""Where time goes, less what worker processes are sent: a compiled frozen dataclass cannot be unpickled."""
EXACT = "-ffp-contract=off"
"""No fused multiply-add: it rounds once where Python rounds twice."""


def clean() -> int:
    """Remove the extensions and the stamp; return how many files went."""
    gone = [*SOURCE.glob("*__mypyc*.so"), *(SOURCE / "tidegate").rglob("*.so"), *SOURCE.glob("*__mypyc*.pyd")]
    gone += [path for path in (STAMP,) if path.exists()]
    for path in gone:
        path.unlink()
    return len(gone)


def build() -> None:
    """Compile all modules. Exits with what is missing when they cannot be."""
    try:
        import setuptools
        from mypyc.build import mypycify
    except ImportError as error:
        sys.exit(f"compiling needs mypyc and setuptools ({error}): pip install -e '.[dev]'")
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        sys.exit(f"compiling needs a C compiler; there is no {compiler!r} (on Debian: apt install gcc)")
    paths = [f"tidegate/{module}.py" for module in MODULES]
    os.environ["CFLAGS"] = f"{os.environ.get('CFLAGS', '')} {EXACT} -w".strip()
    os.chdir(SOURCE)
    with tempfile.TemporaryDirectory() as scratch:
        extensions = mypycify(
            ["--no-warn-return-any", *paths], opt_level="3", debug_level="0", target_dir=scratch
        )
        arguments = ["--quiet", "build_ext", "--inplace", "--build-temp", scratch, "--build-lib", scratch]
        setuptools.setup(name="tidegate-hot-path", ext_modules=extensions, script_args=arguments)
    hashes = {path: _hash(SOURCE / path) for path in paths}
    STAMP.write_text(json.dumps(hashes, indent=1) + "\n")


def stale() -> list[str]:
    """Return the sources that differ from what was compiled; none when nothing is."""
    if not STAMP.exists():
        return []
    hashes: dict[str, str] = json.loads(STAMP.read_text())
    return [path for path, digest in hashes.items() if _hash(SOURCE / path) != digest]


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def main() -> None:
    """Clean, and unless that was all, compile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clean", action="store_true", help="only remove what was compiled")
    parser.add_argument(
        "--check", action="store_true", help="only tell whether sources changed since; 1 if so"
    )
    options = parser.parse_args()
    if options.check:
        changed = stale()
        sys.exit(f"changed since they were compiled: {', '.join(changed)}" if changed else 0)
    gone = clean()
    if options.clean:
        if gone:
            print(f"{gone} compiled files removed: back to Python")
        return
    build()
    print(f"{len(MODULES)} modules compiled; make clean-compiled goes back to Python")


if __name__ == "__main__":
    main()
