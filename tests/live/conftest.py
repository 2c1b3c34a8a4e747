"""A tiny model for real engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.engines.embedded.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny_model(path)
    return path
