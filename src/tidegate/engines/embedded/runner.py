"""One forward pass over a batch: flat inputs in, logits of the rows that sample out."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from tidegate.engines.embedded.attention import PagedBatch, Scratch, Span, group_singles
from tidegate.engines.embedded.kv_store import PagedKvStore
from tidegate.engines.embedded.model import LoadedModel, OnlyFloat64
from tidegate.engines.embedded.sequence import TokenSequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """``count`` pending tokens of a sequence to compute in this step."""

    sequence: TokenSequence
    count: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's last token, whose logits choose the next one."""
        return self.count == self.sequence.pending


@dataclass(slots=True)
class Batch:
    """What one step computes. After ``ModelRunner.run`` the singles are ordered longest first.

    ``fresh`` are blocks that will be read before they are full; their old content must go.
    """

    singles: list[TokenSequence]
    chunks: list[Chunk]
    fresh: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens that the step computes."""
        return len(self.singles) + sum(chunk.count for chunk in self.chunks)

    def sequences(self) -> list[TokenSequence]:
        """Return everything the step touches."""
        return [*self.singles, *(chunk.sequence for chunk in self.chunks)]

    def sampling(self) -> list[TokenSequence]:
        """Return the sequences that get a token, in the order of the logits' rows."""
        return [*self.singles, *(chunk.sequence for chunk in self.chunks if chunk.samples)]


class ModelRunner:
    """Runs batches of sequences whose blocks are allocated."""

    def __init__(self, model: LoadedModel, store: PagedKvStore) -> None:
        self._model = model
        self._store = store
        self._scratch = Scratch(store)

    def clear(self, batch: Batch) -> None:
        """Empty the batch's fresh blocks. Call before ``run``, and for a batch that runs nothing, too."""
        if batch.fresh:
            self._store.clear_blocks(batch.fresh)

    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor:
        """Compute the batch and return logits ``(len(batch.sampling()), vocab)`` in the model's dtype.

        Writes KV of the batch's tokens; does not change the sequences.
        """
        batch.singles.sort(key=_computed, reverse=True)
        ids, positions, slots, keep = self._flatten(batch)
        device = self._model.device
        output = self._model.module(
            input_ids=torch.from_numpy(ids).to(device).unsqueeze(0),
            position_ids=torch.from_numpy(positions).to(device).unsqueeze(0),
            use_cache=False,
            logits_to_keep=torch.from_numpy(keep).to(device),
            paged=self._paged(batch, slots),
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def probe(self) -> None:
        """Run one throw-away token through block 0, which must be free.

        Raises ``ConfigError`` when a float64 model computes anything in a narrower type.
        """
        store = self._store
        paged = PagedBatch(
            store=store,
            slots=torch.zeros(1, dtype=torch.int64, device=store.device),
            singles=group_singles([np.zeros(1, dtype=np.int64)], [1], store),
            spans=[],
            scratch=self._scratch,
        )
        token = torch.zeros((1, 1), dtype=torch.int64, device=store.device)
        with torch.inference_mode():
            if store.shape.dtype == torch.float64:
                with OnlyFloat64():  # type: ignore[no-untyped-call]
                    self._model.module(input_ids=token, position_ids=token, use_cache=False, paged=paged)
            else:
                self._model.module(input_ids=token, position_ids=token, use_cache=False, paged=paged)

    def _flatten(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return token ids, positions, K slots of layer 0 and the rows that sample."""
        block_tokens = self._store.block_tokens
        singles = batch.singles
        count = len(singles)
        total = batch.tokens
        ids = np.empty(total, dtype=np.int64)
        positions = np.empty(total, dtype=np.int64)
        blocks = np.empty(total, dtype=np.int64)
        ids[:count] = [sequence.tokens[-1] for sequence in singles]
        positions[:count] = [sequence.computed for sequence in singles]
        blocks[:count] = [sequence.blocks[sequence.computed // block_tokens] for sequence in singles]
        keep = list(range(count))
        at = count
        for chunk in batch.chunks:
            sequence, start = chunk.sequence, chunk.sequence.computed
            rows = slice(at, at + chunk.count)
            ids[rows] = sequence.tokens[start : start + chunk.count]
            positions[rows] = np.arange(start, start + chunk.count)
            blocks[rows] = sequence.table[positions[rows] // block_tokens]
            at += chunk.count
            if chunk.samples:
                keep.append(at - 1)
        slots = blocks * (self._store.planes * block_tokens) + positions % block_tokens
        return ids, positions, slots, np.array(keep, dtype=np.int64)

    def _paged(self, batch: Batch, slots: np.ndarray) -> PagedBatch:
        store = self._store
        spans = []
        at = len(batch.singles)
        for chunk in batch.chunks:
            sequence = chunk.sequence
            blocks = -(-(sequence.computed + chunk.count) // store.block_tokens)
            rows = torch.from_numpy(sequence.table[:blocks] * store.planes).to(store.device)
            spans.append(Span(first=at, count=chunk.count, start=sequence.computed, plane_rows=rows))
            at += chunk.count
        return PagedBatch(
            store=store,
            slots=torch.from_numpy(slots).to(store.device),
            singles=group_singles(
                [sequence.table for sequence in batch.singles],
                [sequence.computed + 1 for sequence in batch.singles],
                store,
            ),
            spans=spans,
            scratch=self._scratch,
        )


def _computed(sequence: TokenSequence) -> int:
    return sequence.computed
