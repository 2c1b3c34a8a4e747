"""vLLM's CPU build, as tests and benchmarks run it."""

from __future__ import annotations

from pathlib import Path


def on_cpu(root: Path) -> dict[str, str]:
    """Return the environment in which it runs on a machine with a few cores, offline; ``root`` is the
    repository's."""
    return {
        "PYTHONPATH": str(root / "scripts" / "vllm_cpu" / "shim"),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
    }
