"""Attention over the paged KV store, plugged into transformers as an attention implementation.

A forward pass is one flat row of tokens: first the *singles* (sequences that compute one token), longest
first, then the *spans* (chunks of prompts). Singles of similar length are gathered from their blocks and
attended in one padded call; a span attends on its own, causally from its offset.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from tidegate.core.errors import ConfigError
from tidegate.engines.embedded.kv_store import PagedKvStore

_CPU_GROUP_ELEMENTS = 512 * 1024
"""Elements of gathered K per group of singles: K then stays in a core's cache until it is read."""

_HARMLESS = frozenset(
    {"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions"}
)
"""Keywords that transformers hands to every attention function and that change nothing here."""

_CUDA_GROUP_ELEMENTS = 64 * 1024 * 1024


@dataclass(slots=True)
class Singles:
    """A group of sequences that compute one token each; ``kv_len`` counts the new token too."""

    first: int
    count: int
    plane_rows: torch.Tensor
    kv_len: torch.Tensor
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Span:
    """A chunk of one prompt: tokens ``start .. start + count`` of the sequence, ``first`` its flat row."""

    first: int
    count: int
    start: int
    plane_rows: torch.Tensor
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)


@dataclass(slots=True)
class PagedBatch:
    """Where the tokens of one forward pass write their KV and what they attend to."""

    store: PagedKvStore
    slots: torch.Tensor
    singles: list[Singles]
    spans: list[Span]
    scratch: Scratch


class Scratch:
    """Two growing buffers that gathered K and V are written to, so that a step allocates nothing large."""

    def __init__(self, store: PagedKvStore) -> None:
        self._store = store
        self._planes = [store.block_rows.new_empty(0) for _ in range(2)]

    def gather(self, plane_rows: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of the blocks at ``plane_rows`` as ``(rows, block_tokens * kv_heads * head_dim)``.
        The result is valid until the next call."""
        rows, width = plane_rows.shape[0], self._store.block_rows.shape[1]
        if self._planes[0].numel() < rows * width:
            self._planes = [self._store.block_rows.new_empty(rows * width) for _ in range(2)]
        key, value = (plane[: rows * width].view(rows, width) for plane in self._planes)
        torch.index_select(self._store.block_rows, 0, plane_rows + 2 * layer, out=key)
        torch.index_select(self._store.block_rows, 0, plane_rows + (2 * layer + 1), out=value)
        return key, value


def group_singles(tables: list[np.ndarray], kv_lens: list[int], store: PagedKvStore) -> list[Singles]:
    """Split the singles, given longest first, into groups that are padded to their first member. ``tables``
    are block tables, each at least as long as its sequence needs."""
    limit = _CPU_GROUP_ELEMENTS if store.device.type == "cpu" else _CUDA_GROUP_ELEMENTS
    groups = []
    first = 0
    while first < len(tables):
        blocks = -(-kv_lens[first] // store.block_tokens)
        count = max(1, limit // (blocks * store.block_rows.shape[1]))
        members = range(first, min(first + count, len(tables)))
        padded = np.empty((len(members), blocks), dtype=np.int64)
        for row, index in enumerate(members):
            used = -(-kv_lens[index] // store.block_tokens)
            padded[row, :used] = tables[index][:used]
            # Padding repeats the sequence's own first block: never another request's memory.
            padded[row, used:] = tables[index][0]
        padded *= store.planes
        groups.append(
            Singles(
                first=first,
                count=len(members),
                plane_rows=torch.from_numpy(padded.reshape(-1)).to(store.device),
                kv_len=torch.tensor([kv_lens[index] for index in members], device=store.device),
            )
        )
        first = members.stop
    return groups


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: PagedBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Store the new K and V of one layer, then attend.

    Shapes as transformers hands them over: ``query`` (1, heads, tokens, head_dim), ``key`` and
    ``value`` (1, kv_heads, tokens, head_dim). Returns (1, tokens, heads, head_dim).
    Raises ConfigError for a model whose attention wants more than this one computes: soft-capping,
    attention sinks and the like would otherwise be left out in silence.
    """
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    if unknown:
        raise ConfigError(f"this model's attention is not supported: it asks for {', '.join(unknown)}")
    layer: int = module.layer_idx  # type: ignore[assignment]
    store = paged.store
    heads, tokens, head_dim = query.shape[1:]
    kv_heads = key.shape[1]
    plane = 2 * layer * store.block_tokens
    new_k = key[0].transpose(0, 1).reshape(tokens, -1)
    new_v = value[0].transpose(0, 1).reshape(tokens, -1)
    store.token_rows.index_copy_(0, paged.slots + plane, new_k)
    store.token_rows.index_copy_(0, paged.slots + (plane + store.block_tokens), new_v)
    out = query.new_empty(tokens, heads, head_dim)
    for group in paged.singles:
        _attend_singles(group, query, out, paged.scratch, layer, kv_heads, scaling, sliding_window)
    for span in paged.spans:
        _attend_span(span, query, key, value, out, paged.scratch, layer, scaling, sliding_window)
    return out.unsqueeze(0), None


def _attend_singles(
    group: Singles,
    query: torch.Tensor,
    out: torch.Tensor,
    scratch: Scratch,
    layer: int,
    kv_heads: int,
    scaling: float | None,
    window: int | None,
) -> None:
    """Fill the group's rows of ``out``. Query heads that share a KV head take the place of query tokens."""
    heads, _, head_dim = query.shape[1:]
    rows = slice(group.first, group.first + group.count)
    q = query[0, :, rows].transpose(0, 1).reshape(group.count, kv_heads, heads // kv_heads, head_dim)
    k, v = (
        plane.view(group.count, -1, kv_heads, head_dim).transpose(1, 2)
        for plane in scratch.gather(group.plane_rows, layer)
    )
    mask = _singles_mask(group, window, q.dtype, k.shape[2])
    attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    out[rows] = attended.reshape(group.count, heads, head_dim)


def _attend_span(
    span: Span,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    scratch: Scratch,
    layer: int,
    scaling: float | None,
    window: int | None,
) -> None:
    """Fill the span's rows of ``out``. KV heads form the batch axis and are repeated without a copy."""
    heads, _, head_dim = query.shape[1:]
    kv_heads = key.shape[1]
    shared = heads // kv_heads
    rows = slice(span.first, span.first + span.count)
    q = query[0, :, rows].reshape(kv_heads, shared, span.count, head_dim)
    if span.start == 0:
        k, v = key[0, :, rows], value[0, :, rows]
    else:
        k, v = (
            plane.view(-1, kv_heads, head_dim)[: span.start + span.count].transpose(0, 1)
            for plane in scratch.gather(span.plane_rows, layer)
        )
    k = k.unsqueeze(1).expand(-1, shared, -1, -1)
    v = v.unsqueeze(1).expand(-1, shared, -1, -1)
    mask = _span_mask(span, window, q)
    attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
    out[rows] = attended.reshape(heads, span.count, head_dim).transpose(0, 1)


def _singles_mask(group: Singles, window: int | None, dtype: torch.dtype, width: int) -> torch.Tensor:
    """Return the additive mask (count, 1, 1, width) that hides padding and what lies before the window."""
    mask = group.masks.get(window)
    if mask is None:
        at = torch.arange(width, device=group.kv_len.device)
        hidden = at >= group.kv_len[:, None]
        if window is not None:
            hidden |= at < group.kv_len[:, None] - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        mask = mask.masked_fill_(hidden, float("-inf")).view(group.count, 1, 1, width)
        group.masks[window] = mask
    return mask


def _span_mask(span: Span, window: int | None, query: torch.Tensor) -> torch.Tensor | None:
    """Return the additive mask (count, start + count), or None where plain causality says it all."""
    if window not in span.masks:
        end = span.start + span.count
        mask = None
        if span.start > 0 or (window is not None and window < end):
            at = torch.arange(end, device=query.device)
            mine = at[span.start :, None]
            hidden = at > mine
            if window is not None:
                hidden |= at <= mine - window
            mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
            mask.masked_fill_(hidden, float("-inf"))
        span.masks[window] = mask
    return span.masks[window]
