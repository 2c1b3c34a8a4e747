"""``docs/results.md``: whoever has a clone can run its commands, or is told what they lack."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_every_file_a_command_reads_is_in_the_clone_or_comes_from_somewhere() -> None:
    commands = [shlex.split(line[2:], comments=True) for line in PAGE.splitlines() if line.startswith("$ ")]
    made = {word for words in commands for word in words[-1:] if words[0] in ("curl", "tidegate")}
    told = {f"traces/{name}" for name in re.findall(r"^\| `(servegen\S+)` \|", PAGE, re.MULTILINE)}
    assert len(commands) > 10 and len(told) == 3
    for words in commands:
        for word in words[1:]:
            if "://" not in word and re.search(r"\.(py|csv|json|jsonl|gz)$", word):
                assert (ROOT / word).exists() or word in made | told, f"{word} of {shlex.join(words)}"


def test_a_benchmark_names_the_traces_it_lacks_and_what_runs_without(tmp_path: Path) -> None:
    (tmp_path / "azure2023_conv.csv.gz").touch()
    words = ["benchmarks/moving_traffic.py", "--traces", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "servegen_r1_peak2h.csv.gz" in done.stderr
    assert "--cases chat-32b,orders-8b runs without" in done.stderr
