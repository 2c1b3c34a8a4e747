"""How a head is trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """``widths`` are those of the inner layers: the paper's 3584-2048-512-64-1, scaled to a hidden size of
    576. The paper gives epochs and patience. The rest is ours: what had the least error on answers of SmolLM2
    that were not learnt from. ``rows`` are samples per step of the optimiser."""

    widths: tuple[int, ...] = (512, 128, 32)
    epochs: int = 100
    patience: int = 10
    learning_rate: float = 2e-4
    weight_decay: float = 0.1
    dropout: float = 0.3
    input_dropout: float = 0.5
    rows: int = 256
    seed: int = 0
