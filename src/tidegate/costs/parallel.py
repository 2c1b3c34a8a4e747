"""What a model's instance is on so many GPUs of a kind: a profile for every tensor-parallel size.

A packaged profile is taken as it is. Where that size or GPU was not measured, the nearest measured one of
the same model is scaled, coefficient by coefficient, by what the roofline says of the difference: kernels
keep the shares of nominal rates that they were measured to reach, and only the nominal rates change.
Pipeline parallelism is left out: the cost forms have no stages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tidegate.core.errors import ConfigError
from tidegate.costs.library import GPUS, PackagedProfile, packaged_profile, profile_names
from tidegate.costs.profile import Form, Profile
from tidegate.costs.roofline import Shape, roofline_profile
from tidegate.costs.shapes import SHAPES

SIZES = (1, 2, 4, 8)
"""Tensor-parallel sizes: within a node of eight GPUs."""


@dataclass(frozen=True, slots=True)
class _Measured:
    name: str
    gpu: str
    tp: int


def gpu_name(text: str) -> str:
    """Return the GPU that ``text`` names, whole or by its only beginning. Raises ConfigError, listing all."""
    wanted = text.strip().lower()
    found = [name for name in GPUS if name == wanted] or [n for n in GPUS if wanted and n.startswith(wanted)]
    if len(found) != 1:
        which = f"is {' or '.join(found)}" if found else "is not known"
        raise ConfigError(f"GPU {text!r} {which}; there are: {', '.join(GPUS)}")
    return found[0]


def profiles_on(gpu: str, model: str, sizes: Iterable[int] = SIZES) -> dict[int, PackagedProfile]:
    """Return the profiles of ``model`` on one instance of ``gpu``, by tensor-parallel size.

    ``model`` is one of ``SHAPES``, or a folder or config.json for which rooflines are taken. Sizes that
    cannot hold the weights or divide the heads are left out. Raises ConfigError for an unknown model or GPU.
    """
    if model not in SHAPES and not ("/" in model or model.endswith(".json")):
        near = get_close_matches(model, SHAPES, 2)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(
            f"no model is called {model!r}{hint} There are: {', '.join(SHAPES)}; or name a folder with a "
            "config.json"
        )
    found: dict[int, PackagedProfile] = {}
    problem: ConfigError | None = None
    for tp in sizes:
        try:
            found[tp] = _profile_on(gpu, model, tp)
        except ConfigError as error:
            problem = error
    if not found and problem is not None:
        raise problem
    return found


def _profile_on(gpu: str, model: str, tp: int) -> PackagedProfile:
    suffix = f"/tp{tp}" if tp > 1 else ""
    name = f"{gpu}/{model}{suffix}"
    if model not in SHAPES:
        return roofline_of(f"roofline:{name}", gpu, model, tp)
    if name in profile_names():
        return packaged_profile(name)
    name = f"scaled:{name}"
    derived = roofline_profile(name, gpu, SHAPES[model], model=model, tp=tp)
    base = _nearest(gpu, model, tp)
    if base is None:
        return derived
    measured = packaged_profile(base.name)
    same = roofline_profile(base.name, base.gpu, SHAPES[model], model=model, tp=base.tp)
    profile = _scaled(measured.profile, derived.profile, same.profile, name)
    note = f"scaled from {base.name} by the ratio of their rooflines, not measured"
    return replace(derived, profile=profile, model=measured.model, note=note)


def _nearest(gpu: str, model: str, tp: int) -> _Measured | None:
    """Return the measured profile to scale: of the same GPU if there is one, else of the most alike."""
    measured = []
    for name in profile_names():
        if "@" in name:
            continue
        on, what, *parallel = name.split("/")
        if what == model:
            measured.append(_Measured(name, on, int(parallel[0].removeprefix("tp")) if parallel else 1))
    here = GPUS[gpu]

    def distance(one: _Measured) -> tuple[bool, float, float]:
        there = GPUS[one.gpu]
        rates = (
            (here.bf16_flops, there.bf16_flops),
            (here.memory_bytes_per_s, there.memory_bytes_per_s),
        )
        unlike = sum(abs(math.log(a / b)) for a, b in rates)
        return one.gpu != gpu, abs(math.log2(one.tp / tp)), unlike

    return min(measured, key=distance, default=None)


def _scaled(measured: Profile, wanted: Profile, same: Profile, name: str) -> Profile:
    """Return ``measured`` times ``wanted`` over ``same``, two rooflines."""
    return Profile(
        name=name,
        prefill=_form(measured.prefill, wanted.prefill, same.prefill),
        step=_form(measured.step, wanted.step, same.step),
        mixed=_form(measured.mixed, wanted.mixed, same.mixed),
        transfer=wanted.transfer,
        source=f"{measured.name} scaled by the ratio of rooflines",
    )


def _form(measured: Form, wanted: Form, same: Form) -> Form:
    values: dict[str, Any] = {}
    for each in fields(measured):
        value, numerator, denominator = (getattr(form, each.name) for form in (measured, wanted, same))
        ratio = numerator / denominator if each.name.endswith("_s") and denominator else 1.0
        values[each.name] = value * ratio
    return type(measured)(**values)


def roofline_of(name: str, gpu: str, model: str, tp: int) -> PackagedProfile:
    """Return the roofline of a model given by its folder or config.json. Raises ConfigError."""
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the model's {path}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no JSON object")
    label = path.parent.resolve().name if path.name == "config.json" else path.stem
    return roofline_profile(name, gpu, Shape.from_config(config), model=label, tp=tp)
