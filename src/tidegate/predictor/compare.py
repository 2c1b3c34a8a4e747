"""One table of predictors on the same held-out requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace

from tidegate.engines.embedded.length_head import HeadFacts, LengthHead, save_head
from tidegate.predictor.baselines import histogram, mean_length, median_left, prompt_only
from tidegate.predictor.card import card
from tidegate.predictor.dataset import Samples, Split, load_samples, read_settings, split_requests
from tidegate.predictor.evaluate import Estimate, Evaluation
from tidegate.predictor.settings import TrainingSettings
from tidegate.predictor.train import Examples, train_head
from tidegate.signals.lengths.errors import ErrorModel, Measurement, error_figures, fit_errors

PAPER_BELOW = 0.4942
"""By which share the paper's head is below its auxiliary encoder in mean absolute error."""
PAPER_FEWER = 0.9328
"""By which share it has fewer parameters."""


@dataclass(frozen=True, slots=True)
class Rival:
    """The encoder to compare with: its folder, and that of the model whose tokens are to be text. With
    ``fine_tune`` it is trained on as well."""

    folder: Path
    model: Path
    fine_tune: bool = False


@dataclass(frozen=True, slots=True)
class HeadComparison:
    """``report`` has the errors of all predictors. Of the head there is each single prediction, and the model
    of its errors for simulations."""

    report: dict[str, Any]
    errors: list[dict[str, Any]]
    error_model: ErrorModel


def hidden_estimate(head: LengthHead, samples: Samples, split: Split) -> Estimate:
    """Return what an engine with the head says of the held-out samples, each in the light of those before."""
    chosen = samples.of_requests(split.test)
    newest = newest_estimate(head, samples, split).remaining
    generated = samples.generated[chosen]
    left = torch.from_numpy(newest.copy())
    begins = np.flatnonzero(generated == 0)
    counts = np.diff([*begins, len(generated)])
    for nth in range(1, int(counts.max())):
        rows = begins[counts > nth] + nth
        now, earlier = (torch.from_numpy(generated[each]) for each in (rows, rows - 1))
        before = (left[rows - 1] - (now - earlier)).clamp_min(1.0)
        left[rows] = head.blended(left[rows], before, now)
    return Estimate("hidden", head.parameter_count, left.numpy())


def newest_estimate(head: LengthHead, samples: Samples, split: Split) -> Estimate:
    """Return what the head says of each held-out sample by itself."""
    chosen = samples.of_requests(split.test)
    states, generated = (torch.from_numpy(each[chosen]) for each in (samples.hidden, samples.generated))
    left = head.remaining(states, generated).numpy()
    return Estimate("newest state alone", head.parameter_count, left)


def train(folder: Path, out: Path, name: str, settings: TrainingSettings) -> dict[str, Any]:
    """Train a head on the collection in ``folder``; write it to ``out`` and its card beside it. Return its
    errors on the held-out requests (see ``Evaluation.row``). Raises ConfigError without a collection."""
    collected = read_settings(folder)
    samples = load_samples(folder)
    split = split_requests(samples.index)

    examples, held_out = (
        Examples.of(samples.hidden[chosen], samples, chosen)
        for chosen in map(samples.of_requests, (split.train, split.validation))
    )
    head = train_head(examples, held_out, collected.max_tokens, settings)
    row = Evaluation(samples, split.test).row(hidden_estimate(head, samples, split))
    beside = out.with_suffix(".md")
    facts = HeadFacts(collected.model_hash, collected.every, head.horizon, head.widths, beside.name)
    save_head(out, head, facts)
    beside.write_text(card(name, facts, samples, split, collected, settings, row))
    return row


def compare(
    folder: Path,
    head: LengthHead,
    facts: HeadFacts,
    settings: TrainingSettings,
    rival: Rival | None,
    tell: Callable[[str], None],
) -> HeadComparison:
    """Compare the head with what else could predict."""
    samples = load_samples(folder)
    split = split_requests(samples.index)
    evaluation = Evaluation(samples, split.test)
    hidden = hidden_estimate(head, samples, split)
    horizon = head.horizon
    estimates = [
        mean_length(samples, split),
        histogram(samples, split, horizon),
        median_left(samples, split, horizon),
        prompt_only(samples, split, horizon, settings),
        newest_estimate(head, samples, split),
    ]
    if rival is not None:
        estimates += _encoders(rival, folder, samples, split, horizon, settings, tell)
    report = {
        "requests": {"train": len(split.train), "validation": len(split.validation), "test": len(split.test)},
        "predictors": [evaluation.row(each) for each in [*estimates, hidden]],
        "reductions": [evaluation.reduction(hidden, each) for each in estimates],
        "goal": {"mae": PAPER_BELOW, "parameters": PAPER_FEWER},
    }
    predicted = evaluation.predicted(hidden)
    collected, name = read_settings(folder), Path(facts.card).stem
    measured = Measurement(
        head=name,
        model_hash=facts.model_hash,
        data=f"{len(split.test)} held-out answers of {len(samples.index)} to generated prompts of seed "
        f"{collected.seed}, sampled at temperatures from {collected.least_temperature} to "
        f"{collected.most_temperature}, of up to {collected.max_tokens} tokens",
        date=datetime.now(UTC).date().isoformat(),
        command=f"tidegate predictor eval --data DIR --head {name}.safetensors --error-model FILE",
        every=collected.every,
        answers=tuple(samples.output_tokens[split.test].tolist()),
        figures=error_figures(predicted),
    )
    model = replace(fit_errors(predicted, horizon), measured=measured)
    return HeadComparison(report, evaluation.errors(hidden), model)


def _encoders(
    rival: Rival,
    folder: Path,
    samples: Samples,
    split: Split,
    horizon: int,
    settings: TrainingSettings,
    tell: Callable[[str], None],
) -> list[Estimate]:
    from tidegate.predictor.encoder import Encoder, FineTuning, Lesson, fine_tuned_encoder, frozen_encoder

    encoder, lesson = Encoder(rival.folder, rival.model, samples), Lesson.of(samples, split)
    kept = folder / "encoder.safetensors"
    frozen, head = frozen_encoder(encoder, samples, lesson, horizon, settings, kept, tell)
    if not rival.fine_tune:
        return frozen
    return [*frozen, fine_tuned_encoder(encoder, head, samples, lesson, FineTuning(), tell)]
