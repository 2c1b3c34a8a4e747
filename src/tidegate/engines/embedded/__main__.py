"""``python -m tidegate.engines.embedded``: one instance as a process.

Loads the model, measures it, binds, and says so with one JSON line. SIGTERM lets running requests
finish for a while; a second one ends at once.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tidegate.core.errors import ConfigError
from tidegate.costs.start_profile import as_samples, start_profile
from tidegate.engines.embedded.options import EngineConfig, Options, parse_options
from tidegate.engines.serving.process import bind, exit_when_a_thread_dies, run_process, tell_stage
from tidegate.engines.serving.secret import LaunchSecret
from tidegate.policies.chunks import FIXED

if TYPE_CHECKING:
    from tidegate.engines.embedded.engine import EmbeddedEngine

log = logging.getLogger("tidegate.engines.embedded")

COMPUTE_THREAD = "tidegate-compute"
SWITCH_INTERVAL_S = 0.001


def main(argv: Sequence[str] | None = None, *, forked: bool = False) -> int:
    """Run one instance; return the exit status: 0 after SIGTERM, 2 for a wrong setup. ``forked``: the process
    that started this one is not the one that ``--exit-with-parent`` means, which has the end of stdin."""
    options = parse_options(argv)
    return run_process(
        partial(_run, options),
        options.log_level,
        options.engine.engine_id,
        with_parent=options.exit_with_parent,
        forked=forked,
    )


def _run(options: Options) -> None:
    secret = LaunchSecret.from_environment(os.environ, options.secret_file)
    listener = bind(options.host, options.port)
    engine, samples = _load(options)
    import uvloop

    from tidegate.engines.embedded.instance import serve_instance

    exit_when_a_thread_dies(COMPUTE_THREAD)
    # Only what serving allocates is left to the collector: a full pass over torch's modules takes
    # longer than a step.
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve_instance(options, engine, samples, secret, listener))


def _load(options: Options) -> tuple[EmbeddedEngine, list[dict[str, Any]]]:
    os.environ["OMP_NUM_THREADS"] = str(options.engine.threads)
    start_s = time.monotonic()
    tell = tell_stage if options.tell_stages else lambda stage: None
    tell("importing torch")
    import_engine()
    from tidegate.engines.embedded.engine import EmbeddedEngine
    from tidegate.engines.embedded.self_profile import self_profile

    imported_s = time.monotonic()
    tell("loading the model")
    engine = EmbeddedEngine(options.engine)
    _check_length(options.engine, engine)
    loaded_s = time.monotonic()
    samples = self_profile(engine, tell=tell) if options.self_profile else []
    if samples and options.engine.chunks != FIXED.name:
        name = f"{options.engine.device}/{options.served_model_name}"
        engine.scheduler.price(
            start_profile(name, options.engine.device, options.engine.model, as_samples(samples))
        )
    elif options.engine.chunks != FIXED.name:
        log.warning("nothing was measured, so that chunks are fixed, not by %s", options.engine.chunks)
    log.info(
        "imported in %.1f s, loaded in %.1f s, profiled in %.1f s",
        imported_s - start_s,
        loaded_s - imported_s,
        time.monotonic() - loaded_s,
    )
    return engine, samples


def import_engine() -> None:
    """Import what an engine needs, which takes longer than loading a small model."""
    # transformers imports scipy, where it finds it, for the losses of detection models: half a second
    # and 30 MB that serving has no use for.
    sys.modules["scipy"] = None  # type: ignore[assignment]
    for name in ("engine", "self_profile", "instance"):
        import_module(f"tidegate.engines.embedded.{name}")


def _check_length(config: EngineConfig, engine: EmbeddedEngine) -> None:
    asked = config.max_model_len
    if asked is None:
        return
    if asked > engine.model.max_model_len:
        raise ConfigError(
            f"--max-model-len {asked} exceeds the model's context of {engine.model.max_model_len}"
        )
    if asked > engine.max_model_len:
        raise ConfigError(
            f"--kv-memory-mb {config.kv_memory_mb} holds {engine.max_model_len} tokens of KV; "
            f"--max-model-len {asked} needs more"
        )


if __name__ == "__main__":
    sys.exit(main())
