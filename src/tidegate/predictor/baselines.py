"""What a hidden-state predictor is compared with. All know the limit of the answers' tokens, ``horizon``."""

from __future__ import annotations

import numpy as np

from tidegate.core.request import Request
from tidegate.predictor.dataset import Samples, Split
from tidegate.predictor.evaluate import Estimate
from tidegate.predictor.settings import TrainingSettings
from tidegate.predictor.train import Examples, train_head
from tidegate.signals.lengths.histogram import HistogramLengths


def mean_length(samples: Samples, split: Split) -> Estimate:
    """Take every answer to become as long as the mean one of the training requests."""
    mean = samples.output_tokens[split.train].mean()
    left = np.maximum(mean - samples.generated[samples.of_requests(split.test)], 1.0)
    return Estimate("mean", 0, left)


def histogram(samples: Samples, split: Split, horizon: int) -> Estimate:
    """Take what serves without a head, ``HistogramLengths``, when the training requests have ended."""
    source = HistogramLengths()
    requests = [
        Request(str(row), prompt, horizon, 0.0) for row, prompt in enumerate(samples.prompt_tokens.tolist())
    ]
    for row in split.train.tolist():
        source.finished(requests[row], int(samples.output_tokens[row]), 0.0)
    source.tokens((), np.empty(0, np.int64), 0.0)
    chosen = samples.of_requests(split.test)
    asked = [requests[row] for row in samples.request[chosen].tolist()]
    left, _, _ = source.remaining_many(asked, samples.generated[chosen].astype(np.int64))
    return Estimate("histogram", 0, left)


def median_left(samples: Samples, split: Split, horizon: int) -> Estimate:
    """Predict from the tokens generated alone: the median of what was left of the training answers that
    became longer than that. No other prediction from so little has a lower absolute error."""
    lengths = np.sort(samples.output_tokens[split.train])
    generated = samples.generated[samples.of_requests(split.test)]
    longer = np.searchsorted(lengths, generated, "right")
    middle = np.minimum((longer + len(lengths)) // 2, len(lengths) - 1)
    left = np.where(longer < len(lengths), lengths[middle] - generated, horizon - generated)
    return Estimate("median left", 0, np.maximum(left, 1.0))


def prompt_only(samples: Samples, split: Split, horizon: int, settings: TrainingSettings) -> Estimate:
    """Predict once, from the hidden state at the prompt's end, and count down from there.

    The head is trained on such states alone: one for each training request.
    """
    at_end = samples.generated == 0
    parts = (samples.of_requests(rows) & at_end for rows in (split.train, split.validation, split.test))
    train, validation, test = (Examples.of(samples.hidden[part], samples, part) for part in parts)
    head = train_head(train, validation, horizon, settings)
    first = head.remaining(test.inputs, test.generated).numpy()
    held_out = samples.of_requests(split.test)
    begun = first[np.searchsorted(split.test, samples.request[held_out])]
    left = np.maximum(begun - samples.generated[held_out], 1.0)
    return Estimate("prompt only", head.parameter_count, left)
