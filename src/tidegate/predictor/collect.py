"""Answering prompts with the embedded engine while its hidden states are kept."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from tidegate.core.errors import SetupError
from tidegate.engines.embedded.engine import EmbeddedEngine
from tidegate.engines.embedded.length_head import model_hash
from tidegate.engines.embedded.options import EngineConfig
from tidegate.engines.embedded.sequence import TokenSequence
from tidegate.engines.serving.types import GenerateRequest, SamplingParams
from tidegate.predictor.dataset import CollectionSettings, Samples, join_samples, open_folder, write_shard
from tidegate.predictor.prompts import KINDS, Prompt, prompts

SHARD_REQUESTS = 32
"""Finished requests per shard: what a kill loses at most, beside those under way."""
_BLOCK_TOKENS = 16
_PROMPT_TOKENS = 512
"""Room for a prompt (ours): the longest of ``prompts`` has fewer."""
_TELL_S = 10.0


@dataclass
class StateRecorder:
    """A ``HiddenReader`` that keeps what it reads, by request id, until the request is taken."""

    every: int
    kept: dict[str, list[tuple[int, np.ndarray]]] = field(default_factory=dict)

    def read(self, sequences: list[TokenSequence], hidden: torch.Tensor) -> None:
        rows = hidden.to(torch.float16).cpu().numpy()
        for sequence, row in zip(sequences, rows, strict=True):
            of_request = self.kept.setdefault(sequence.request.id, [])
            # A preempted request computes its prompt and answer again, and a state comes twice.
            if not of_request or of_request[-1][0] != sequence.output_position:
                of_request.append((sequence.output_position, row))


@dataclass
class _Answer:
    index: int
    kind: str
    prompt: tuple[int, ...]
    output: list[int] = field(default_factory=list)


class Collector:
    """Keeps ``batch`` requests running until it has the first ``requests`` prompts of the seed."""

    def __init__(
        self, model: Path, folder: Path, *, requests: int, batch: int, settings: CollectionSettings
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._batch = batch
        self._requests = requests
        self._have = open_folder(folder, settings)
        limit = settings.max_tokens + _PROMPT_TOKENS
        config = EngineConfig(
            model,
            dtype=settings.dtype,
            block_tokens=_BLOCK_TOKENS,
            total_blocks=batch * -(-limit // _BLOCK_TOKENS) * 5 // 4,
            max_model_len=limit,
            max_num_seqs=batch,
        )
        self._engine = EmbeddedEngine(config)
        self._recorder = StateRecorder(settings.every)
        self._engine.hidden_reader = self._recorder
        self._running: dict[str, _Answer] = {}
        self._done: list[Samples] = []
        self.output_tokens = 0

    def run(self, tell: Callable[[str], None], most_s: float = float("inf")) -> int:
        """Collect and return how many requests the folder has then. After ``most_s`` seconds no request is
        begun, and those under way are finished: one that is cut off would be missing for its length."""
        start_s, told_s = time.monotonic(), 0.0
        missing = self._missing()
        had = len(self._have)
        try:
            while True:
                spent_s = time.monotonic() - start_s
                while len(self._running) < self._batch and spent_s < most_s:
                    following = next(missing, None)
                    if following is None:
                        break
                    self._submit(*following)
                if not self._running:
                    break
                self._step()
                if spent_s - told_s >= _TELL_S:
                    told_s = spent_s
                    tell(self._progress(len(self._have) - had, spent_s))
        finally:
            self._flush()
        return len(self._have)

    def _missing(self) -> Iterator[tuple[int, Prompt]]:
        for index, prompt in enumerate(islice(prompts(self._settings.seed), self._requests)):
            if index not in self._have:
                yield index, prompt

    def _submit(self, index: int, prompt: Prompt) -> None:
        settings = self._settings
        rng = random.Random(f"{settings.seed} {index}")
        ids = tuple(self._engine.tokenizer.encode_chat(prompt.messages))
        params = SamplingParams(
            max_tokens=settings.max_tokens,
            temperature=rng.uniform(settings.least_temperature, settings.most_temperature),
            seed=rng.getrandbits(62),
        )
        request_id = str(index)
        self._running[request_id] = _Answer(index, prompt.kind, ids)
        self._engine.submit(GenerateRequest(request_id, ids, params))

    def _step(self) -> None:
        for output in self._engine.step().outputs:
            request = self._running[output.request_id]
            request.output += output.token_ids
            self.output_tokens += len(output.token_ids)
            if output.finish_reason is None:
                continue
            if output.finish_reason not in ("stop", "length"):
                raise SetupError(f"the engine failed: {output.error}")
            del self._running[output.request_id]
            read = self._recorder.kept.pop(output.request_id)
            self._done.append(_samples(request, read, output.finish_reason == "length"))
            self._have.add(request.index)
            if len(self._done) >= SHARD_REQUESTS:
                self._flush()

    def _flush(self) -> None:
        if self._done:
            write_shard(self._folder, join_samples(self._done))
            self._done = []

    def _progress(self, finished: int, spent_s: float) -> str:
        left = self._requests - len(self._have)
        rate = self.output_tokens / spent_s
        estimate = f", about {left * spent_s / finished / 60:.0f} min left" if finished else ""
        per_cpu = self.output_tokens / time.process_time()
        return (
            f"{len(self._have)} of {self._requests} requests, {self.output_tokens} tokens, "
            f"{rate:.0f} tokens/s, {per_cpu:.0f} per CPU second{estimate}"
        )


def settings_for(
    model: Path,
    *,
    seed: int = 0,
    every: int = 20,
    max_tokens: int = 1024,
    least_temperature: float = 0.7,
    most_temperature: float = 1.0,
    dtype: str = "auto",
) -> CollectionSettings:
    """Return the settings of a collection from the model in ``model``."""
    return CollectionSettings(
        model_hash(model), seed, every, max_tokens, least_temperature, most_temperature, dtype
    )


def _samples(request: _Answer, read: list[tuple[int, np.ndarray]], cut: bool) -> Samples:
    return Samples(
        index=np.array([request.index], dtype=np.int32),
        kind=np.array([KINDS.index(request.kind)], dtype=np.int32),
        prompt_tokens=np.array([len(request.prompt)], dtype=np.int32),
        output_tokens=np.array([len(request.output)], dtype=np.int32),
        cut=np.array([cut]),
        tokens=np.array([*request.prompt, *request.output], dtype=np.int32),
        request=np.zeros(len(read), dtype=np.int64),
        generated=np.array([at for at, _ in read], dtype=np.int32),
        hidden=np.stack([row for _, row in read]),
    )
