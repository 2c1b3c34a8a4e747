"""What a hidden-state predictor is compared with."""

from __future__ import annotations

import numpy as np
import torch

from tidegate.predictor.dataset import Samples, Split
from tidegate.predictor.evaluate import Estimate
from tidegate.predictor.train import Examples, TrainingSettings, train_head


def mean_length(samples: Samples, split: Split) -> Estimate:
    """Take every answer to become as long as the mean one of the training requests."""
    mean = samples.output_tokens[split.train].mean()
    left = np.maximum(mean - samples.generated[samples.of_requests(split.test)], 1.0)
    return Estimate("mean", 1, left)


def prompt_only(samples: Samples, split: Split, settings: TrainingSettings) -> Estimate:
    """Predict once, from the hidden state at the prompt's end, and count down from there.

    The head is trained on such states alone: one for each training request.
    """
    at_end = samples.generated == 0

    def examples(rows: np.ndarray) -> Examples:
        chosen = samples.of_requests(rows) & at_end
        return Examples.of(samples.hidden[chosen], samples.remaining[chosen])

    head = train_head(examples(split.train), examples(split.validation), settings)
    states = torch.from_numpy(samples.hidden[samples.of_requests(split.test) & at_end])
    first = head.remaining(states).numpy()
    test = samples.of_requests(split.test)
    of_row = dict(zip(split.test.tolist(), first.tolist(), strict=True))
    begun = np.array([of_row[row] for row in samples.request[test].tolist()])
    left = np.maximum(begun - samples.generated[test], 1.0)
    return Estimate("prompt only", head.parameter_count, left)
