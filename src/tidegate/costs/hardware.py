"""Profiles of (GPU, model) pairs that nobody packaged, from NVIDIA's aiconfigurator (the extra ``hardware``).

``aiconfigurator-core`` (Apache-2.0) brings tables of operations measured on real GPUs, and interpolates and
sums them to steps. The forms are fitted to a grid of its steps, as the packaged sets of A100 to B200 were.
It prices a resident token alike in pure and mixed steps: the mixed form is derived as in the packaged sets.
The package is imported when asked for, works without network, and takes seconds to load.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import resources
from typing import Any

from tidegate.core.errors import ConfigError
from tidegate.costs.fitting import PrefillSample, StepSample, fit_profile
from tidegate.costs.library import MIXED_CONTEXT_RATIO, PackagedProfile, assumed_links
from tidegate.costs.roofline import Shape

PACKAGE = "aiconfigurator_core"
SYSTEMS = {"rtx_pro_6000": "rtx_pro_6000_server"}
"""Our name of a GPU to the package's, where they differ."""
BACKEND = "vllm"
NEW_TOKENS = (64, 128, 256, 384, 512, 768, 1024, 2048, 4096, 8192, 16384, 32768)
CACHED_TOKENS = (0, 4096, 16384)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (512, 1024, 2048, 4096, 8192)
MOST_RESIDENT = 1_000_000


def hardware_profile(gpu: str, model: str, tp: int = 1) -> PackagedProfile:
    """Fit a profile to the package's steps for ``model`` on ``tp`` GPUs.

    Raises ConfigError when the extra is not installed, or the package does not know the GPU, the model or
    the pair.
    """
    full = _known_model(model)
    shape = Shape.from_config(_config(full))
    with _quiet():
        version, system, latency_s = _tables(gpu, full, tp, shape)
        prefill = [
            PrefillSample(
                new,
                cached,
                latency_s("static_ctx", batch_size=1, isl=new + cached, prefix=cached, osl=1),
            )
            for cached in CACHED_TOKENS
            for new in NEW_TOKENS
        ]
        step = [
            StepSample(batch, batch * context, latency_s("static_gen", batch_size=batch, isl=context, osl=2))
            for context in CONTEXTS
            for batch in BATCHES
            if batch * context <= MOST_RESIDENT
        ]
    kv_tokens = shape.kv_tokens(tp * float(system["gpu"]["mem_capacity"]))
    if kv_tokens < 1:
        raise ConfigError(f"{full} does not fit the memory of these GPUs; raise /tpN")
    port, network = (float(system["node"][name]) for name in ("intra_node_bw", "inter_node_bw"))
    inside, between = assumed_links(port, tp, network)
    profile = fit_profile(
        f"hardware:{gpu}/{full}" + (f"/tp{tp}" if tp > 1 else ""),
        prefill,
        step,
        inside,
        source=f"fitted to steps that {PACKAGE} sums from operations measured with {BACKEND} "
        f"{version}; mixed steps derived with context ratio {MIXED_CONTEXT_RATIO:g}; transfers assumed",
        mixed_context_ratio=MIXED_CONTEXT_RATIO,
        experts=max(1, shape.experts),
        active_experts=shape.active_experts,
    )
    note = "KV capacity is an estimate from the GPU's memory"
    return PackagedProfile(profile, full, shape.kv_bytes_per_token, kv_tokens, between, note)


def _tables(
    gpu: str, model: str, tp: int, shape: Shape
) -> tuple[str, Mapping[str, Any], Callable[..., float]]:
    """Return the tables' version, the GPU's system and ``latency_s(mode, **point)``.

    The package's API is not typed for us; this is the one place that calls it.
    """
    from aiconfigurator_core.sdk import config, models, perf_database
    from aiconfigurator_core.sdk.backends.factory import get_backend

    system = SYSTEMS.get(gpu, gpu)
    known = sorted(
        entry.name for entry in (resources.files(PACKAGE) / "systems" / "data").iterdir() if entry.is_dir()
    )
    if system not in known:
        raise ConfigError(f"{PACKAGE} has no GPU {gpu!r}; it has: {', '.join(known)}")
    version = perf_database.get_latest_database_version(system, BACKEND)
    database = perf_database.get_database(system, BACKEND, version) if version else None
    if database is None:
        raise ConfigError(f"{PACKAGE} has no {BACKEND} data for GPU {gpu!r}")
    moe = {"moe_tp_size": tp, "moe_ep_size": 1} if shape.experts else {}
    try:
        built = models.get_model(model, config.ModelConfig(tp_size=tp, **moe), BACKEND)
    except Exception as error:
        raise ConfigError(f"{PACKAGE} cannot build {model} on {tp} GPUs: {error}") from None
    backend = get_backend(BACKEND)

    def latency_s(mode: str, **point: int) -> float:
        try:
            runtime = config.RuntimeConfig(**point)
            return float(backend.run_static_latency_only(built, database, runtime, mode)) / 1e3
        except Exception as error:
            raise ConfigError(f"{PACKAGE} has no data for {model} on {tp} x {gpu}: {error}") from None

    return str(version), database.system_spec, latency_s


def _known_model(model: str) -> str:
    """Return the package's name of a model: its own, or the last part of it, in any case."""
    names = _models()
    wanted = model.lower()
    found = [name for name in names if wanted in (name.lower(), name.lower().split("/")[-1])]
    if len(found) == 1:
        return found[0]
    near = get_close_matches(model, names, 4, 0.3)
    raise ConfigError(f"{PACKAGE} knows no model {model!r}; near: {', '.join(near) or ', '.join(names)}")


def _models() -> list[str]:
    try:
        folder = resources.files(PACKAGE) / "model_configs"
    except ModuleNotFoundError:
        raise ConfigError(
            "profiles of other hardware need a package: pip install 'aiconfigurator-core>=0.12'"
        ) from None
    ending = "_config.json"
    files = [entry.name for entry in folder.iterdir() if entry.name.endswith(ending)]
    names = [name.removesuffix(ending).replace("--", "/") for name in files]
    return sorted(name for name in names if not name.endswith("_hf_quant"))


def _config(model: str) -> dict[str, Any]:
    folder = resources.files(PACKAGE) / "model_configs"
    base = model.replace("/", "--")
    config: dict[str, Any] = json.loads((folder / f"{base}_config.json").read_text(encoding="utf-8"))
    quantized = folder / f"{base}_hf_quant_config.json"
    if quantized.is_file():
        config.setdefault("quantization_config", json.loads(quantized.read_text(encoding="utf-8")))
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the package's warnings about tables that a dense or MoE model does not read."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
