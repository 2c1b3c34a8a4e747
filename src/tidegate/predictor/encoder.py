"""The rival of the hidden state: a sentence encoder that reads the text so far, again for every prediction.

The paper compares with an auxiliary model of 125 M parameters. This one is all-MiniLM-L6-v2 (22 M), or any
encoder of that form in a local folder, with the mean of its last states and a head like that for hidden
states. What it reads first is what costs, so it learns from some samples of each training request only.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoTokenizer

from tidegate.core.errors import ConfigError
from tidegate.engines.embedded.length_head import LengthHead
from tidegate.engines.embedded.tokenizer import load_tokenizer
from tidegate.predictor.dataset import Samples, Split
from tidegate.predictor.evaluate import Estimate
from tidegate.predictor.settings import TrainingSettings
from tidegate.predictor.train import Examples, log_error, train_head

_ROWS = 32
_KEEP_EVERY = 10 * _ROWS
_MOST_TOKENS = 256
"""What is read at most where the folder does not say: the end of the text."""


@dataclass(frozen=True, slots=True)
class FineTuning:
    """How the encoder itself is trained on, after its head was (ours)."""

    epochs: int = 2
    learning_rate: float = 3e-5
    weight_decay: float = 0.01
    seed: int = 0


class Encoder:
    """An encoder in ``folder`` and the text of ``samples`` so far, as the tokenizer of ``model`` wrote it."""

    def __init__(self, folder: Path, model: Path, samples: Samples) -> None:
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} is no encoder's folder: it has no config.json")
        self.module: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        self._samples = samples
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, truncation_side="left")
        said = folder / "sentence_bert_config.json"
        facts = json.loads(said.read_text()) if said.is_file() else {}
        self._most_tokens = int(facts.get("max_seq_length", _MOST_TOKENS))
        writer = load_tokenizer(model)
        first = samples.first_token
        ends = first[samples.request] + samples.prompt_tokens[samples.request] + samples.generated
        self._texts = [
            writer.decode(samples.tokens[begin:end], skip_special_tokens=True)
            for begin, end in zip(first[samples.request], ends, strict=True)
        ]

    @property
    def parameter_count(self) -> int:
        """Weights of the encoder alone."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """Return the mean of the last states over the tokens of each sample's text, ``(rows, width)``."""
        texts = [self._texts[row] for row in rows.tolist()]
        read = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._most_tokens, return_tensors="pt"
        )
        states = self.module(**read).last_hidden_state
        weights = read["attention_mask"][..., None].to(states.dtype)
        mean: torch.Tensor = (states * weights).sum(1) / weights.sum(1)
        return mean

    @torch.inference_mode()
    def features(self, rows: np.ndarray) -> torch.Tensor:
        """Return ``read`` of many samples, texts of like length together, computed in bfloat16."""
        order = np.argsort([len(self._texts[row]) for row in rows.tolist()])
        found = torch.empty(len(rows), self.module.config.hidden_size)
        with torch.autocast("cpu", torch.bfloat16):
            for part in np.array_split(order, max(1, len(order) // _ROWS)):
                found[part] = self.read(rows[part]).float()
        return found

    def kept_features(self, rows: np.ndarray, path: Path, tell: Callable[[str], None]) -> torch.Tensor:
        """Return the same, and keep them in the file ``path``, which may have some of them: reading takes
        longer than everything else."""
        names = _names(self._samples)
        kept = load_file(path) if path.is_file() else {"names": np.empty(0, np.int64)}
        known, features = kept["names"], kept.get("features")
        missing = rows[~np.isin(names[rows], known)]
        for done in range(0, len(missing), _KEEP_EVERY):
            tell(f"the encoder has {len(missing) - done} of {len(rows)} texts to read")
            part = missing[done : done + _KEEP_EVERY]
            read = self.features(part).numpy()
            known = np.concatenate([known, names[part]])
            features = read if features is None else np.concatenate([features, read])
            save_file({"names": known, "features": features}, path)
        assert features is not None
        place = {name: at for at, name in enumerate(known.tolist())}
        return torch.from_numpy(features[[place[name] for name in names[rows].tolist()]])


@dataclass(frozen=True, slots=True)
class Lesson:
    """The samples that the encoder learns from and is judged by; ``test`` has all of held-out requests."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @classmethod
    def of(cls, samples: Samples, split: Split, per_request: int = 6) -> Lesson:
        """Take ``per_request`` samples by chance of each request that is not held out."""
        train, validation = (_some(samples, rows, per_request) for rows in (split.train, split.validation))
        return cls(train, validation, np.flatnonzero(samples.of_requests(split.test)))


def frozen_encoder(
    encoder: Encoder,
    samples: Samples,
    lesson: Lesson,
    horizon: int,
    settings: TrainingSettings,
    path: Path,
    tell: Callable[[str], None],
) -> tuple[list[Estimate], LengthHead]:
    """Train heads on what the encoder says as it is; ``path`` keeps that. Return what two of them predict,
    from the text alone as in the paper, and from the tokens generated as well, and the latter."""
    parts = (lesson.test, lesson.validation, lesson.train)
    read_in_all = encoder.kept_features(np.concatenate(parts), path, tell)
    features = torch.split(read_in_all, [len(part) for part in parts])
    known = [Examples.of(read, samples, part) for read, part in zip(features, parts, strict=True)]
    estimates = []
    for name, examples in (
        ("encoder, text alone", [replace(each, generated=0 * each.generated) for each in known]),
        ("encoder", known),
    ):
        test, validation, train = examples
        head = train_head(train, validation, horizon, settings)
        left = head.remaining(test.inputs, test.generated)
        most = horizon - known[0].generated
        parameters = encoder.parameter_count + head.parameter_count
        estimates.append(Estimate(name, parameters, torch.minimum(left, most).numpy()))
    return estimates, head


def fine_tuned_encoder(
    encoder: Encoder,
    head: LengthHead,
    samples: Samples,
    lesson: Lesson,
    settings: FineTuning,
    tell: Callable[[str], None],
) -> Estimate:
    """Train the encoder together with ``head``; keep the epoch with the least validation error."""
    rng = np.random.default_rng(settings.seed)
    generated, remaining = (torch.from_numpy(each).float() for each in (samples.generated, samples.remaining))
    head = copy.deepcopy(head).requires_grad_(True)
    module = encoder.module
    optimiser = torch.optim.AdamW(
        [*module.parameters(), *head.parameters()], settings.learning_rate, weight_decay=settings.weight_decay
    )
    best, best_error = _weights(module, head), _error(encoder, head, samples, lesson.validation)
    tell(f"before fine-tuning the validation error is {best_error:.1f} tokens")
    for epoch in range(settings.epochs):
        module.train()
        order = rng.permutation(lesson.train)
        for rows in np.array_split(order, -(-len(order) // _ROWS)):
            loss = log_error(head.left(encoder.read(rows), generated[rows]), remaining[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        module.eval()
        error = _error(encoder, head, samples, lesson.validation)
        tell(f"after epoch {epoch + 1} of fine-tuning it is {error:.1f} tokens")
        if error < best_error:
            best, best_error = _weights(module, head), error
    module.load_state_dict(best[0])
    head.load_state_dict(best[1])
    left = _left(encoder, head, samples, lesson.test)
    parameters = encoder.parameter_count + head.parameter_count
    return Estimate("encoder, fine-tuned", parameters, left)


def _names(samples: Samples) -> np.ndarray:
    """Return a number for each sample that stays its own when others are added."""
    names: np.ndarray = samples.index[samples.request].astype(np.int64) << 32 | samples.generated
    return names


def _some(samples: Samples, rows: np.ndarray, most: int) -> np.ndarray:
    """Return at most ``most`` samples of each request: those whose hashed name is lowest, so that a
    collection that goes on changes none of them."""
    chosen = np.flatnonzero(samples.of_requests(rows))
    drawn = _names(samples)[chosen].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)
    request = samples.request[chosen]
    order = np.lexsort((drawn, request))
    nth = np.arange(len(order)) - np.searchsorted(request[order], request[order])
    some: np.ndarray = chosen[order[nth < most]]
    return some


def _left(encoder: Encoder, head: LengthHead, samples: Samples, rows: np.ndarray) -> np.ndarray:
    left: np.ndarray = head.remaining(
        encoder.features(rows), torch.from_numpy(samples.generated[rows])
    ).numpy()
    return left


def _error(encoder: Encoder, head: LengthHead, samples: Samples, rows: np.ndarray) -> float:
    return float(np.abs(_left(encoder, head, samples, rows) - samples.remaining[rows]).mean())


def _weights(*modules: nn.Module) -> list[dict[str, torch.Tensor]]:
    return [copy.deepcopy(module.state_dict()) for module in modules]
