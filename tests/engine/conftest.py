"""Tiny models for the engine's tests, made once per session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.engine_harness import MakeModel
from tidegate.engines.embedded.tiny_model import Arch, make_tiny_model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    made: dict[tuple[str, int | None], Path] = {}

    def make(arch: Arch = "llama", sliding_window: int | None = None) -> Path:
        key = (arch, sliding_window)
        if key not in made:
            folder = tmp_path_factory.mktemp("models") / f"{arch}-{sliding_window}"
            made[key] = make_tiny_model(
                folder, arch, hidden=128, heads=4, kv_heads=2, sliding_window=sliding_window
            )
        return made[key]

    return make


@pytest.fixture(scope="session")
def llama(tiny: MakeModel) -> Path:
    return tiny("llama")
