"""The packaged profiles: GPUs x models x parallelism x engines, by name.

A name is ``gpu/model[/tpN][@engine]``: ``h100_sxm/llama-3.1-8b``, ``h100_sxm/llama-3.1-70b/tp4``,
``h100_sxm/llama-3.1-8b@sglang``. One GPU and vLLM go without saying. The coefficients are fits to published
measurements (``profiles/README.md`` has their origin and licences); transfers are assumed, see
``PORT_BYTES_PER_S``. This is the one module of the room that reads a file: its own packaged data.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib import resources
from typing import Any

from tidegate.core.errors import ConfigError
from tidegate.costs.forms import TransferCost
from tidegate.costs.profile import Profile

MIXED_CONTEXT_RATIO = 2.0
"""Cost of a resident token beside a prefill chunk, over its cost in a pure decode step, where not measured.

Measured steps of vLLM show 1.9 to 3.4; aiconfigurator prices both equally. The default leans to the measured
engines' low end.
"""
PORT_BYTES_PER_S = {
    "a100_sxm": 300e9,
    "b200_sxm": 900e9,
    "h100_sxm": 450e9,
    "h200_sxm": 450e9,
    "l40s": 32e9,
    "rtx_4090": 32e9,
    "rtx_pro_6000": 64e9,
}
"""Nominal bytes/s, one direction, of a GPU's port inside its node: NVLink (SXM parts), else PCIe x16."""
NETWORK_BYTES_PER_S = 50e9
"""Nominal bytes/s, one direction, of a GPU's port between nodes: one 400 Gbit/s network port per GPU."""
LINK_EFFICIENCY = 0.8
"""Assumed share of the nominal bandwidth that a KV transfer reaches."""
INTRA_NODE_LATENCY_S = 0.0005
INTER_NODE_LATENCY_S = 0.001
"""Assumed time to set up one transfer."""


@dataclass(frozen=True, slots=True)
class PackagedProfile:
    """A profile with what else is known of its (GPU, model, parallelism, engine).

    ``profile.transfer`` is the link inside a node; both links are assumed unless measured.
    ``kv_capacity_tokens`` is rough. ``note`` is the publisher's caveat, empty if none: show it to whoever
    picks the profile.
    """

    profile: Profile
    model: str
    kv_bytes_per_token: int
    kv_capacity_tokens: int
    inter_node: TransferCost
    note: str = ""

    @property
    def name(self) -> str:
        return self.profile.name

    @property
    def mixed_measured(self) -> bool:
        """Whether every coefficient of the mixed form was measured; else one is derived."""
        return any(form == "mixed" for form, _, _ in self.profile.errors)


def profile_names() -> tuple[str, ...]:
    """Return the name of every packaged profile, sorted."""
    return tuple(sorted(_entries()))


def packaged_profile(name: str, *, mixed_context_ratio: float | None = None) -> PackagedProfile:
    """Return the packaged profile ``name``.

    The mixed form is the measured one, or the prefill form (its N counts the decodes too) plus the decode
    form's context slope times MIXED_CONTEXT_RATIO. A given ``mixed_context_ratio`` sets that slope in both
    cases. Raises ConfigError for an unknown name or a ratio that is not positive.
    """
    entries = _entries()
    if name not in entries:
        raise ConfigError(_unknown(name, tuple(sorted(entries))))
    if mixed_context_ratio is not None and not 0 < mixed_context_ratio < math.inf:
        raise ConfigError(f"mixed_context_ratio must be a positive number, not {mixed_context_ratio}")
    entry = entries[name]
    intra_node, inter_node = assumed_links(PORT_BYTES_PER_S[entry["gpu"]], entry["tp"])
    mixed, how, errors = entry["mixed"], "measured", entry["errors"]
    if mixed is None or mixed_context_ratio is not None:
        ratio = MIXED_CONTEXT_RATIO if mixed_context_ratio is None else mixed_context_ratio
        mixed = {**(mixed or entry["prefill"]), "d_s": entry["step"]["c_s"] * ratio}
        how = f"derived with context ratio {ratio:g}"
        errors = [row for row in errors if row[0] != "mixed"]
    profile = Profile.from_json(
        {
            "name": name,
            "prefill": entry["prefill"],
            "step": entry["step"],
            "mixed": mixed,
            "transfer": asdict(intra_node),
            "source": f"{entry['source']}; mixed steps {how}; transfers assumed",
            "errors": errors,
        }
    )
    known = {key: entry[key] for key in ("model", "kv_bytes_per_token", "kv_capacity_tokens", "note")}
    return PackagedProfile(profile=profile, inter_node=inter_node, **known)


def assumed_links(
    port_bytes_per_s: float, tp: int, network_bytes_per_s: float = NETWORK_BYTES_PER_S
) -> tuple[TransferCost, TransferCost]:
    """Return the links inside and between nodes; each of ``tp`` GPUs moves its share through its own port."""
    share = LINK_EFFICIENCY * tp
    inside = TransferCost(INTRA_NODE_LATENCY_S, share * port_bytes_per_s)
    return inside, TransferCost(INTER_NODE_LATENCY_S, share * min(port_bytes_per_s, network_bytes_per_s))


def _entries() -> dict[str, dict[str, Any]]:
    file = resources.files("tidegate.costs") / "profiles" / "packaged.json"
    entries: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return entries


def _unknown(name: str, names: tuple[str, ...]) -> str:
    wanted = name.strip().lower()
    near = [n for n in names if wanted and n.startswith(wanted)] or get_close_matches(wanted, names, 4)
    if not near:
        return f"no packaged profile is called {name!r}; there are: {', '.join(names)}"
    return (
        f"no packaged profile is called {name!r}; near: {', '.join(near)} "
        f"(`tidegate profile --list` shows all {len(names)})"
    )
