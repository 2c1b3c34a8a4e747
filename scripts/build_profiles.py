"""Rebuild the packaged profiles: ``python scripts/build_profiles.py FOLDER``.

FOLDER holds ``cost_models.json``, the coefficients in milliseconds. Seconds are made here, once. The
result replaces ``src/tidegate/costs/profiles/packaged.json``; rows that did not change give equal bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

OUTPUT = Path(__file__).parents[1] / "src" / "tidegate" / "costs" / "profiles" / "packaged.json"
DIGITS = 10
"""Significant digits kept of a coefficient; the fits' errors start in the third."""
DEFAULT_ENGINE = "vllm"
LAYER_PROFILE = "vllm-0.19 layer profile"
VERSIONS = {"vllm": "vLLM 0.24", "trtllm": "TensorRT-LLM 1.3.0rc20", "sglang": "SGLang 0.5.14"}
A100_VERSION = "vLLM 0.14"


class AllReduce(NamedTuple):
    """What a step spends on adding up the shares of tensor-parallel GPUs, ``times`` times."""

    times: int
    bytes_per_token: int
    latency_ms: float
    bytes_per_ms: float

    def added_to(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return ``row`` with the time in all its forms: it grows with every token, also below the hinge."""
        fixed = self.times * self.latency_ms
        per_token = self.times * self.bytes_per_token / self.bytes_per_ms

        def form(fit: dict[str, Any]) -> dict[str, Any]:
            return fit | {"a": fit["a"] + fixed + per_token * fit.get("N0", 0), "b": fit["b"] + per_token}

        note = "the all-reduce over PCIe is measured by itself and added; the errors are those of the layers"
        forms = ("prefill_hinge", "decode_linear", "mixed_hinge")
        return row | {name: form(row[name]) for name in forms} | {"note": note}


ALL_REDUCES = {
    "rtx_pro_6000/qwen3-32b/tp2": AllReduce(129, 2 * 5120, 0.03412, 16.52e6),
}
"""Sets whose layers were measured without the all-reduce: two per layer of 64 and one for the embedding.

Fitted, to 8 % at most, to the all-reduces of 10 kB to 21 MB that LLMServingSim timed one by one between two
such GPUs (profiler/perf/RTXPRO6000/hardware.yaml of 8 September 2026, ``us_isolated``; MIT). Replayed from
CUDA graphs they have half the latency.
"""


def build(sets: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the packaged entries by name, sorted. Raises ValueError when two sets have one name."""
    entries: dict[str, dict[str, Any]] = {}
    for row in sets:
        name = profile_name(row)
        if name in ALL_REDUCES:
            row = ALL_REDUCES[name].added_to(row)
        if name in entries:
            raise ValueError(f"two sets are called {name}")
        entries[name] = _entry(row)
    return dict(sorted(entries.items()))


def profile_name(row: dict[str, Any]) -> str:
    """Return ``gpu/model[/tpN][@engine]``; one GPU and vLLM go without saying."""
    model = row["model"].split("/")[-1].lower().removeprefix("meta-").replace("-instruct", "")
    parallel = f"/tp{row['tp']}" if row["tp"] > 1 else ""
    engine = _engine(row)
    return f"{row['gpu']}/{model}{parallel}" + (f"@{engine}" if engine != DEFAULT_ENGINE else "")


def dump(entries: dict[str, dict[str, Any]]) -> str:
    """Return the text of the data file."""
    return json.dumps(entries, indent=1) + "\n"


def _entry(row: dict[str, Any]) -> dict[str, Any]:
    decode = row.get("decode_moe") or row["decode_linear"]
    forms = {"prefill": row["prefill_hinge"], "step": decode}
    step = _seconds(decode, "abc")
    if "e" in decode:
        step |= _seconds(decode, "e") | {"experts": float(decode["E"]), "active_experts": float(decode["k"])}
    mixed = None
    if "mixed_hinge" in row:
        forms["mixed"] = row["mixed_hinge"]
        mixed = _seconds(row["mixed_hinge"], "abcd") | {"n0": float(row["mixed_hinge"]["N0"])}
    return {
        "gpu": row["gpu"],
        "model": row["model"],
        "tp": row["tp"],
        "engine": _engine(row),
        "source": _source(row),
        "note": row.get("note", ""),
        "prefill": _seconds(row["prefill_hinge"], "abc") | {"n0": float(row["prefill_hinge"]["N0"])},
        "step": step,
        "mixed": mixed,
        "errors": [[form, fit["err"]["p50"], fit["err"]["p95"]] for form, fit in forms.items()],
        "max_errors": {form: fit["err"]["max"] for form, fit in forms.items() if "max" in fit["err"]},
        "kv_bytes_per_token": row["kv_bytes_per_token"],
        "kv_capacity_tokens": row["approx_kv_capacity_tokens"],
        "weight_gb": row.get("weight_gb"),
    }


def _seconds(fit: dict[str, Any], letters: str) -> dict[str, float]:
    return {f"{letter}_s": float(f"{fit[letter] / 1e3:.{DIGITS}g}") for letter in letters}


def _engine(row: dict[str, Any]) -> str:
    return DEFAULT_ENGINE if row["engine"] == LAYER_PROFILE else str(row["engine"])


def _source(row: dict[str, Any]) -> str:
    if row["engine"] == LAYER_PROFILE:
        return "fitted to the sum of layers that LLMServingSim measured under vLLM 0.19"
    version = A100_VERSION if row["gpu"].startswith("a100") else VERSIONS[row["engine"]]
    return f"fitted to steps that aiconfigurator 0.12.0 sums from operations measured with {version}"


def main() -> None:
    """Write the data file from the folder named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the folder that holds cost_models.json")
    path = parser.parse_args().folder / "cost_models.json"
    try:
        entries = build(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        parser.error(f"cannot read {path}: {error.strerror}")
    OUTPUT.write_text(dump(entries), encoding="utf-8")
    sys.stdout.write(f"{len(entries)} profiles in {OUTPUT}\n")


if __name__ == "__main__":
    main()
