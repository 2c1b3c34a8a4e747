"""Training a head: least absolute error on ``log1p`` of what is left, until validation no longer improves."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tidegate.engines.embedded.length_head import LengthHead
from tidegate.predictor.dataset import Samples
from tidegate.predictor.settings import TrainingSettings


@dataclass(frozen=True, slots=True)
class Examples:
    """Inputs ``(rows, width)`` in float32, and tokens generated before and left after each."""

    inputs: torch.Tensor
    generated: torch.Tensor
    remaining: torch.Tensor

    @classmethod
    def of(cls, inputs: np.ndarray | torch.Tensor, samples: Samples, rows: np.ndarray) -> Examples:
        """Put ``inputs`` together with what is known of the samples ``rows`` (numbers, or a mask)."""
        counts = (torch.from_numpy(each[rows]).float() for each in (samples.generated, samples.remaining))
        return cls(torch.as_tensor(inputs).float(), *counts)


def train_head(train: Examples, validation: Examples, horizon: int, settings: TrainingSettings) -> LengthHead:
    """Return the head of the epoch with the least mean absolute error, in tokens, on ``validation``.

    Inputs are standardised while it learns; the head that is returned takes them as they are.
    """
    mean, scale = train.inputs.mean(0), train.inputs.std(0).clamp_min(1e-6)
    inputs, held_out = ((each.inputs - mean) / scale for each in (train, validation))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        widths = (inputs.shape[1], *settings.widths, 1)
        head = LengthHead(widths, horizon, settings.dropout, settings.input_dropout)
        optimiser = torch.optim.AdamW(
            head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        best, best_error, best_epoch = copy.deepcopy(head.state_dict()), float("inf"), 0
        for epoch in range(settings.epochs):
            head.train()
            for rows in torch.split(torch.randperm(len(inputs)), settings.rows):
                loss = log_error(head.left(inputs[rows], train.generated[rows]), train.remaining[rows])
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            head.eval()
            left = head.remaining(held_out, validation.generated)
            error = (left - validation.remaining).abs().mean().item()
            if error < best_error:
                best, best_error, best_epoch = copy.deepcopy(head.state_dict()), error, epoch
            elif epoch - best_epoch >= settings.patience:
                break
    head.load_state_dict(best)
    _take_in(head, mean, scale)
    return head.requires_grad_(False)


def log_error(left: torch.Tensor, remaining: torch.Tensor) -> torch.Tensor:
    """Return the loss: the mean absolute error of the logarithms of both and one more."""
    return nn.functional.l1_loss(left.log1p(), remaining.log1p())


@torch.no_grad()
def _take_in(head: LengthHead, mean: torch.Tensor, scale: torch.Tensor) -> None:
    """Make standardising the states part of the first layer."""
    first: nn.Linear = head.layers[0]  # type: ignore[assignment]
    of_states = first.weight[:, : len(mean)].div_(scale)
    first.bias.sub_(of_states @ mean)
