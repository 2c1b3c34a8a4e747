"""How far predictions are off, by progress, with intervals from a bootstrap over requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tidegate.predictor.dataset import Samples
from tidegate.signals.lengths.errors import Predicted

PROGRESS = (0, 1, 100, 200, 400)
"""Where the rows of the table begin, in tokens generated; the first is the end of the prompt alone."""
_RESAMPLES = 2000
_SHARES = (0.025, 0.975)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one predictor says of every sample of the held-out requests, and what it costs to have it."""

    name: str
    parameters: int
    remaining: np.ndarray


@dataclass(frozen=True, slots=True)
class Estimated:
    """A figure and the 95 % interval of its bootstrap."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, resampled: np.ndarray) -> Estimated:
        return cls(value, *(float(np.nanquantile(resampled, share)) for share in _SHARES))


class Evaluation:
    """The held-out part of ``samples``, that of requests ``rows``, and how far predictors are off on it."""

    def __init__(self, samples: Samples, rows: np.ndarray, seed: int = 0) -> None:
        self.samples = samples
        self.chosen = samples.of_requests(rows)
        self.true = samples.remaining[self.chosen]
        self.generated = samples.generated[self.chosen]
        self.request = np.searchsorted(rows, samples.request[self.chosen])
        self.requests = len(rows)
        at = np.searchsorted(PROGRESS, self.generated, "right") - 1
        self._cells = self.request * len(PROGRESS) + at
        counted = self._summed(np.ones(len(self.true)))
        drawn = np.random.default_rng(seed).multinomial(
            self.requests, np.full(self.requests, 1 / self.requests), _RESAMPLES
        )
        self._weights = np.vstack([np.ones(self.requests), drawn])
        self._counted = self._weights @ counted

    def _summed(self, values: np.ndarray) -> np.ndarray:
        """Return sums of ``values`` of samples, (requests, rows of the table + 1); the last is over all."""
        sums = np.bincount(self._cells, values, self.requests * len(PROGRESS)).reshape(self.requests, -1)
        return np.concatenate([sums, sums.sum(1, keepdims=True)], axis=1)

    def _errors(self, estimate: Estimate) -> np.ndarray:
        """Return mean absolute errors, (1 + resamples, rows of the table + 1); the first is the measured."""
        off = np.abs(estimate.remaining - self.true)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean: np.ndarray = self._weights @ self._summed(off) / self._counted
        return mean

    def row(self, estimate: Estimate) -> dict[str, Any]:
        """Return the mean absolute errors of one predictor, over all samples and by progress, in tokens."""
        errors = self._errors(estimate).T
        counts = self._counted[0].astype(int).tolist()
        spreads = [asdict(Estimated.of(float(each[0]), each[1:])) for each in errors if not np.isnan(each[0])]
        begins = [begin for begin, count in zip(PROGRESS, counts, strict=False) if count]
        progress = [
            {"from_tokens": begin, "samples": count, **spread}
            for begin, count, spread in zip(begins, filter(None, counts), spreads, strict=False)
        ]
        return {
            "name": estimate.name,
            "parameters": estimate.parameters,
            "samples": counts[-1],
            "mae": spreads[-1],
            "by_progress": progress,
        }

    def reduction(self, estimate: Estimate, rival: Estimate) -> dict[str, Any]:
        """Return by which share ``estimate`` is below ``rival``: in error, paired by request, and in
        parameters, where the rival has any."""
        mine, theirs = self._errors(estimate)[:, -1], self._errors(rival)[:, -1]
        share = 1 - mine / theirs
        return {
            "of": estimate.name,
            "below": rival.name,
            "mae": asdict(Estimated.of(float(share[0]), share[1:])),
            "parameters": 1 - estimate.parameters / rival.parameters if rival.parameters else None,
        }

    def predicted(self, estimate: Estimate) -> Predicted:
        """Return what was predicted of each sample; requests are numbered from 0."""
        at_token, predicted = self.generated.astype(np.int64), estimate.remaining.astype(np.float64)
        return Predicted(self.request, at_token, predicted, self.true.astype(np.float64))

    def errors(self, estimate: Estimate) -> list[dict[str, Any]]:
        """Return one record per sample: what was predicted of which request, and what was true."""
        index = self.samples.index[self.samples.request[self.chosen]]
        columns = zip(
            index.tolist(),
            self.generated.tolist(),
            np.round(estimate.remaining.astype(np.float64), 1).tolist(),
            self.true.tolist(),
            strict=True,
        )
        return [
            {"request": request, "at_token": at, "predicted": predicted, "true": true}
            for request, at, predicted, true in columns
        ]


def write_errors(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write records of ``Evaluation.errors``, one a line."""
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
