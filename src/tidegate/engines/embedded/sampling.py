"""Choosing the next token: greedy, or inverse-CDF sampling from counter-based uniforms.

The uniform of output position p is a hash of (seed, p): no generator state has to travel when a
request continues elsewhere. The CDF runs in float64 over ascending token ids, an order that
rounding noise in the logits cannot change.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import NamedTuple

import torch

from tidegate.engines.serving.types import SamplingParams


class Draw(NamedTuple):
    """One row to sample: its parameters, output position over all legs, seed, and ids it must not take."""

    params: SamplingParams
    position: int
    seed: int
    banned: tuple[int, ...] = ()


class Choice(NamedTuple):
    """A chosen token; with logprobs, ``alternatives`` are (token id, logprob), best first."""

    token_id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


def uniform(seed: int, position: int) -> float:
    """Return the number in [0, 1) that belongs to ``position`` of a request with ``seed``."""
    counter = (seed % (1 << 64)).to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(blake2b(counter, digest_size=8).digest(), "little") >> 11) * 2.0**-53


_LEAST_TEMPERATURE = 1e-5
"""Below this, sampling is greedy: the division would overflow (vLLM's bound)."""


def sample(logits: torch.Tensor, draws: list[Draw]) -> list[Choice]:
    """Choose a token for each row of ``logits`` (rows, vocab). Greedy rows take the lowest id among equals.
    Logprobs are of the model's own distribution, before temperature and filters."""
    random_rows = [row for row, draw in enumerate(draws) if draw.params.temperature >= _LEAST_TEMPERATURE]
    raw = logits
    banned = [(row, token_id) for row, draw in enumerate(draws) for token_id in draw.banned]
    if banned:
        logits = logits.clone()
        rows, ids = zip(*banned, strict=True)
        logits[list(rows), list(ids)] = float("-inf")
    if len(random_rows) < len(draws):
        tokens: list[int] = logits.argmax(dim=-1).tolist()
    else:
        tokens = [0] * len(draws)
    if random_rows:
        drawn = _sample_rows(logits[random_rows], [draws[row] for row in random_rows])
        for row, token in zip(random_rows, drawn, strict=True):
            tokens[row] = token
    if all(draw.params.logprobs is None for draw in draws):
        return [Choice(token) for token in tokens]
    return _with_logprobs(raw, draws, tokens)


def _sample_rows(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    """Sample every row by inverse CDF over ascending ids."""
    device = logits.device
    temperature = torch.tensor(
        [draw.params.temperature for draw in draws], dtype=torch.float64, device=device
    )
    probs = torch.softmax(logits.double() / temperature[:, None], dim=-1)
    filtered = [
        row
        for row, draw in enumerate(draws)
        if draw.params.top_p < 1 or 0 < draw.params.top_k < probs.shape[1]
    ]
    if filtered:
        probs[filtered] = _filter(probs[filtered], [draws[row].params for row in filtered])
    cdf = probs.cumsum(dim=-1)
    total = cdf[:, -1:].clone()
    numbers = [uniform(draw.seed, draw.position) for draw in draws]
    target = torch.tensor(numbers, dtype=torch.float64, device=device)[:, None] * total
    chosen = torch.searchsorted(cdf, target, right=True)
    # Rounding may lift the target to the total itself; the last id with any mass is meant then.
    last = torch.searchsorted(cdf, total)
    chosen = torch.minimum(chosen, last).clamp_(max=probs.shape[1] - 1)
    tokens: list[int] = chosen.squeeze(1).tolist()
    return tokens


def _filter(probs: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Zero what top_k and top_p exclude; equal probabilities rank by ascending id."""
    device, vocab = probs.device, probs.shape[1]
    top_k = torch.tensor([p.top_k if 0 < p.top_k < vocab else vocab for p in params], device=device)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
    ranked, ids = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab, device=device)
    keep = rank < top_k[:, None]
    ranked = ranked * keep
    mass = ranked.sum(dim=-1, keepdim=True)
    before = ranked.cumsum(dim=-1) - ranked
    keep &= before < top_p[:, None] * mass
    keep[:, 0] = True
    return torch.zeros_like(probs).scatter_(1, ids, ranked * keep)


def _with_logprobs(logits: torch.Tensor, draws: list[Draw], tokens: list[int]) -> list[Choice]:
    wanted = [row for row, draw in enumerate(draws) if draw.params.logprobs is not None]
    table = torch.log_softmax(logits[wanted].double(), dim=-1)
    most = max(draws[row].params.logprobs or 0 for row in wanted)
    values, ids = table.topk(min(most, table.shape[1]), dim=-1)
    choices = [Choice(token) for token in tokens]
    for index, row in enumerate(wanted):
        count = draws[row].params.logprobs or 0
        best = zip(ids[index, :count].tolist(), values[index, :count].tolist(), strict=True)
        choices[row] = Choice(tokens[row], float(table[index, tokens[row]]), tuple(best))
    return choices
