"""Compare the packaged profiles with the steps they were fitted to: ``scripts/check_profiles.py FOLDER``.

FOLDER holds ``step_latency_aiconfigurator.csv.gz``. Prints the relative errors, in per cent, of every set and
form over that grid, decodes within the fitted range. Mixed steps are predicted with a context ratio of 1, as
that grid prices them.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from build_profiles import profile_name

from tidegate.costs.forms import attention_work
from tidegate.costs.library import packaged_profile
from tidegate.costs.profile import Profile

MAX_BATCH, MAX_CONTEXT_TOKENS = 256, 1e6
"""The range that decode is fitted in."""
FORMS = ("prefill", "decode", "mixed")


def predicted_s(profile: Profile, row: dict[str, str]) -> float | None:
    """Return the prediction for one step of the grid, or None beyond the fitted range."""
    sequences, new, cached = (float(row[key] or 0) for key in ("batch", "new_tokens", "cached_or_ctx_tokens"))
    decodes, context = float(row["decode_batch"] or 0), float(row["decode_ctx"] or 0)
    match row["kind"]:
        case "prefill":
            return float(profile.prefill.seconds(sequences * new, sequences * attention_work(new, cached)))
        case "mixed":
            work = attention_work(new, cached)
            return float(profile.mixed.seconds(new + decodes, work, decodes * context))
    if decodes > MAX_BATCH or decodes * context > MAX_CONTEXT_TOKENS:
        return None
    return float(profile.step.seconds(decodes, decodes * context))


def main() -> None:
    """Print one line per set: median and 95th percentile of every form."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the folder that holds the grid")
    path = parser.parse_args().folder / "step_latency_aiconfigurator.csv.gz"
    profiles: dict[str, Profile] = {}
    errors: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            name = profile_name({**row, "tp": int(row["tp"])})
            if name not in profiles:
                profiles[name] = packaged_profile(name, mixed_context_ratio=1.0).profile
            seconds = predicted_s(profiles[name], row)
            if seconds is not None:
                error = abs(seconds * 1e3 / float(row["latency_ms"]) - 1.0)
                errors[name, row["kind"]].append(error)
                errors["all", row["kind"]].append(error)
    sys.stdout.write(f"{'p50 / p95, %':32}" + "".join(f"{form:>14}" for form in FORMS) + "\n")
    for name in [*sorted(profiles), "all"]:
        cells = [np.percentile(errors[name, form], [50, 95]) * 100 for form in FORMS]
        sys.stdout.write(f"{name:32}" + "".join(f"{p50:7.1f} /{p95:5.1f}" for p50, p95 in cells) + "\n")


if __name__ == "__main__":
    main()
