"""A decoder-only model from a local folder, wired to the paged attention, and its forward pass.

In float64 the forward pass is float64 from end to end: transformers computes RMSNorm and rotary
tables in float32 whatever the weights are, so both are replaced, and a probe refuses a model that
still drops below float64 anywhere. Greedy output then does not depend on how requests are batched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as hf_logging

from tidegate.core.errors import ConfigError
from tidegate.engines.embedded.attention import PagedBatch, Scratch, Span, group_singles, paged_attention
from tidegate.engines.embedded.fused import fuse
from tidegate.engines.embedded.kv_store import KvShape, PagedKvStore
from tidegate.engines.embedded.options import DTYPES
from tidegate.engines.embedded.sequence import TokenSequence

ATTENTION = "tidegate_paged"
"""The name of the paged attention in transformers."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run on ``device``. ``max_model_len`` is in tokens."""

    module: nn.Module
    device: torch.device
    max_model_len: int
    vocab_size: int
    eos_ids: frozenset[int]
    kv: KvShape


def load_model(folder: str | Path, dtype: str = "auto", device: str = "cpu") -> LoadedModel:
    """Load weights and configuration from ``folder``; nothing is fetched from a network. Raises
    ``ConfigError`` when the folder, the dtype, the device or the architecture does not fit."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not a model folder: it has no config.json")
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} is asked for, but torch sees no CUDA device")
    # No mask function goes with it, so none is built.
    AttentionInterface.register(ATTENTION, paged_attention)
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    _refuse_unsupported(config)
    module: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype="auto" if dtype == "auto" else getattr(torch, dtype),
        attn_implementation=ATTENTION,
        local_files_only=True,
    )
    target = torch.device(device)
    module = module.to(target).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    fuse(module)
    if module.dtype == torch.float64:
        _widen(module.modules())
    heads = config.num_attention_heads
    return LoadedModel(
        module=module,
        device=target,
        max_model_len=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        eos_ids=_eos_ids(folder, config),
        kv=KvShape(
            layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=module.dtype,
        ),
    )


def _eos_ids(folder: Path, config: Any) -> frozenset[int]:
    """Collect end-of-sequence ids of the config and of the generation config."""
    found: set[int] = set()
    sources = [config]
    if (folder / "generation_config.json").is_file():
        sources.append(GenerationConfig.from_pretrained(folder, local_files_only=True))
    for source in sources:
        eos = getattr(source, "eos_token_id", None)
        if eos is not None:
            found.update([eos] if isinstance(eos, int) else eos)
    return frozenset(token for token in found if token < config.vocab_size)


def _refuse_unsupported(config: Any) -> None:
    """Raise ``ConfigError`` for what the paged attention cannot compute correctly."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{kind} is an encoder-decoder model; only decoder-only models are served")
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if layers:
        raise ConfigError(f"{kind} has layers without paged attention: {', '.join(sorted(layers))}")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope in ("dynamic", "longrope"):
        raise ConfigError(
            f"rope type {rope!r} depends on the longest request of a batch: KV cannot be reused"
        )


def _widen(parts: Iterable[Any]) -> None:
    """Replace the parts that transformers computes in float32 by float64 ones."""
    for part in parts:
        name = type(part).__name__
        if name.endswith("RMSNorm"):
            eps = getattr(part, "variance_epsilon", None) or part.eps
            part.forward = partial(_wide_norm, part.weight, eps)
        elif name.endswith("RotaryEmbedding"):
            scaling = getattr(part, "attention_scaling", 1.0)
            inv_freq = part.inv_freq.double()
            part.forward = partial(_wide_rotary, inv_freq, scaling)


def _wide_norm(weight: torch.Tensor, eps: float, hidden: torch.Tensor) -> torch.Tensor:
    """RMSNorm in the precision of its input."""
    return nn.functional.rms_norm(hidden, weight.shape, weight, eps)


def _wide_rotary(
    inv_freq: torch.Tensor, scaling: float, x: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables in float64."""
    angles = position_ids[..., None].double() * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * scaling, angles.sin() * scaling


class OnlyFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside this context every floating-point result must be float64; raises ``ConfigError`` otherwise."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            narrow = isinstance(value, torch.Tensor) and value.is_floating_point()
            if narrow and value.dtype != torch.float64:
                raise ConfigError(f"the model computes {func} in {value.dtype}; float64 mode does not fit it")
        return result


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
    """What one step computes. After ``ModelRunner.run`` the singles are ordered longest first. ``fresh`` are
    blocks that will be read before they are full; their old content must go."""

    singles: list[TokenSequence]
    chunks: list[Chunk]
    fresh: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens that the step computes."""
        return len(self.singles) + sum(chunk.count for chunk in self.chunks)

    def sampling(self) -> list[TokenSequence]:
        """Return the sequences that get a token, in the order of the logits' rows."""
        return [*self.singles, *(chunk.sequence for chunk in self.chunks if chunk.samples)]


class ModelRunner:
    """Runs batches of sequences whose blocks are allocated."""

    def __init__(self, model: LoadedModel, store: PagedKvStore) -> None:
        self._model = model
        self._store = store
        self._scratch = Scratch(store)
        self.hidden = torch.empty(0)
        """The last layer's states of the last ``run``, behind the final norm, one row per row of logits."""
        output: Any = model.module
        output.get_output_embeddings().register_forward_pre_hook(self._keep_hidden)

    def _keep_hidden(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.hidden = inputs[0][0]

    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor:
        """Compute the batch and return logits ``(len(batch.sampling()), vocab)`` in the model's dtype. Writes
        KV of the batch's tokens; does not change the sequences."""
        batch.singles.sort(key=attrgetter("computed"), reverse=True)
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
        """Run one throw-away token through block 0, which must be free. Raises ``ConfigError`` when a float64
        model computes anything in a narrower type."""
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
