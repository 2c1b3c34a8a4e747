"""Predicting inside the engine's step how many tokens running requests still have to go."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import torch

from tidegate.engines.embedded.length_head import LengthHead, load_head_for, packaged_head
from tidegate.engines.embedded.model import LoadedModel
from tidegate.engines.embedded.options import EngineConfig
from tidegate.engines.embedded.sequence import TokenSequence


class HiddenReader(Protocol):
    """Gets hidden states from the engine's step: before an output token is sampled whose position (from 0,
    over all legs) is a multiple of ``every``."""

    every: int

    def read(self, sequences: list[TokenSequence], hidden: torch.Tensor) -> None:
        """Take the states ``(len(sequences), hidden size)`` of each sequence's newest token: what the last
        layer gives behind the final norm, in the model's dtype. Called on the compute thread."""


class LengthPredictor:
    """Predicts with a head, for all sequences at once that are due in a step, and notes it in them: each in
    the light of what was predicted of it before, also on another instance (``LengthHead.blended``).

    ``made`` counts predictions, ``absurd`` those that came out as no number and were dropped. Those beyond
    the room of ``max_model_len`` tokens are set to it. Of an answer that is longer than the head's horizon
    nothing is said: it has seen none.
    """

    def __init__(self, head: LengthHead, every: int, max_model_len: int, device: torch.device) -> None:
        self.every = every
        self.made = self.absurd = 0
        self._head = head.to(device)
        self._max_model_len = max_model_len

    def read(self, sequences: list[TokenSequence], hidden: torch.Tensor) -> None:
        """See ``HiddenReader.read``."""
        known = [(sequence.output_position, sequence.remaining_now or math.nan) for sequence in sequences]
        generated, before = torch.tensor(known, device=hidden.device).T
        newest = self._head.remaining(hidden, generated)
        lefts = self._head.blended(newest, before, generated).tolist()
        for sequence, left in zip(sequences, lefts, strict=True):
            if sequence.output_position >= self._head.horizon:
                continue
            if not math.isfinite(left):
                self.absurd += 1
                continue
            self.made += 1
            # What is left behind the state's token includes the one that this step samples.
            sequence.predicted_at = sequence.output_position + 1
            sequence.remaining = max(1.0, min(left, self._max_model_len - len(sequence.tokens)) - 1)


def find_predictor(config: EngineConfig, model: LoadedModel, max_model_len: int) -> LengthPredictor | None:
    """Return the predictor that ``config`` asks for: a file's, or with ``auto`` that of the packaged head for
    the model, if there is one. Raises ``ConfigError`` for a file that is no head, or another model's."""
    found = None
    if config.predictor == "auto":
        found = packaged_head(config.model)
    elif config.predictor != "off":
        found = load_head_for(Path(config.predictor), config.model)
    if found is None:
        return None
    head, facts = found
    return LengthPredictor(head, facts.every, max_model_len, model.device)
