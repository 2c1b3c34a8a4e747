"""Training a head: least absolute error on ``log1p`` of what is left, until validation no longer improves."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tidegate.engines.embedded.length_head import LengthHead


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How a head is trained. ``widths`` are those of its inner layers: the paper's 3584-2048-512-64-1, scaled
    to a hidden size of 576. The paper gives epochs and patience; the rest is ours."""

    widths: tuple[int, ...] = (512, 128, 32)
    epochs: int = 100
    patience: int = 10
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    dropout: float = 0.2
    rows: int = 256
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Examples:
    """Inputs ``(rows, width)`` in float32 and the tokens left after each."""

    inputs: torch.Tensor
    remaining: torch.Tensor

    @classmethod
    def of(cls, inputs: np.ndarray, remaining: np.ndarray) -> Examples:
        return cls(torch.from_numpy(inputs).float(), torch.from_numpy(remaining).float())


def train_head(train: Examples, validation: Examples, settings: TrainingSettings) -> LengthHead:
    """Return the head of the epoch with the least mean absolute error, in tokens, on ``validation``.

    Inputs are standardised while it learns; the head that is returned takes them as they are.
    """
    mean, scale = train.inputs.mean(0), train.inputs.std(0).clamp_min(1e-6)
    inputs, wanted = (train.inputs - mean) / scale, train.remaining.log1p()
    held_out = (validation.inputs - mean) / scale
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        head = LengthHead((inputs.shape[1], *settings.widths, 1), settings.dropout)
        last: nn.Linear = head.layers[-1]  # type: ignore[assignment]
        nn.init.constant_(last.bias, wanted.median().item())
        optimiser = torch.optim.AdamW(
            head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        best, best_error, best_epoch = copy.deepcopy(head.state_dict()), float("inf"), 0
        for epoch in range(settings.epochs):
            head.train()
            for rows in torch.randperm(len(inputs)).split(settings.rows):
                loss = nn.functional.l1_loss(head(inputs[rows]), wanted[rows])
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            head.eval()
            error = (head.remaining(held_out) - validation.remaining).abs().mean().item()
            if error < best_error:
                best, best_error, best_epoch = copy.deepcopy(head.state_dict()), error, epoch
            elif epoch - best_epoch >= settings.patience:
                break
    head.load_state_dict(best)
    _take_in(head, mean, scale)
    return head.requires_grad_(False)


@torch.no_grad()
def _take_in(head: LengthHead, mean: torch.Tensor, scale: torch.Tensor) -> None:
    """Make standardising the inputs part of the first layer."""
    first: nn.Linear = head.layers[0]  # type: ignore[assignment]
    first.weight /= scale
    first.bias -= first.weight @ mean
