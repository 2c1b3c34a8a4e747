"""How far rooflines are from the packaged profiles: ``python benchmarks/roofline_error.py``.

Prints the factor roofline/packaged for prefills of 512 and 8,192 tokens and for decode steps of 1 x 1,024,
32 x 2,048 and 128 x 4,096, for every packaged profile, and the medians over them.
"""

from __future__ import annotations

import math

import numpy as np

from tidegate.costs.library import packaged_profile, profile_names
from tidegate.costs.profile import Profile
from tidegate.costs.roofline import roofline_profile
from tidegate.costs.shapes import SHAPES

POINTS = ("prefill 512", "prefill 8192", "step 1x1024", "step 32x2048", "step 128x4096")


def seconds(profile: Profile) -> list[float]:
    """Return the times of POINTS."""
    steps = [(1, 1024), (32, 2048), (128, 4096)]
    prefills = [profile.prefill_s(512), profile.prefill_s(8192)]
    return prefills + [float(profile.step.seconds(b, b * context)) for b, context in steps]


def factors() -> dict[str, list[float]]:
    """Return roofline over packaged, by profile, at POINTS."""
    found = {}
    for name in profile_names():
        packaged = packaged_profile(name)
        gpu, model, *parallel = name.split("@")[0].split("/")
        tp = int(parallel[0].removeprefix("tp")) if parallel else 1
        derived = roofline_profile(f"roofline:{name}", gpu, SHAPES[model], model=model, tp=tp)
        pairs = zip(seconds(derived.profile), seconds(packaged.profile), strict=True)
        found[name] = [mine / theirs for mine, theirs in pairs]
    return found


def main() -> None:
    """Print the table."""
    print(f"{'profile':<34}" + "".join(f"{point:>14}" for point in POINTS))
    rows = factors()
    for name, row in rows.items():
        print(f"{name:<34}" + "".join(f"{factor:>14.2f}" for factor in row))
    off = np.abs(np.log(np.array(list(rows.values()))))
    print(f"{'median factor off':<34}" + "".join(f"{math.exp(x):>14.2f}" for x in np.median(off, axis=0)))
    print(
        f"{'95th percentile':<34}" + "".join(f"{math.exp(x):>14.2f}" for x in np.percentile(off, 95, axis=0))
    )


if __name__ == "__main__":
    main()
