"""What is collected: requests with their token ids, and samples of hidden states along them, in shards.

A folder holds ``settings.json`` and shards of finished requests. A shard is a safetensors file; its rows are
requests and samples.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tidegate.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class CollectionSettings:
    """What decides the answers: a folder has those of one setting. Temperatures are drawn between the two."""

    model_hash: str
    seed: int
    every: int
    max_tokens: int
    least_temperature: float
    most_temperature: float
    dtype: str


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples along requests.

    Per request (sorted by ``index``, its number among the prompts of the seed): ``kind`` as an index into
    ``prompts.KINDS``, ``prompt_tokens``, ``output_tokens`` with the end-of-sequence token, ``cut`` where
    the answer reached the limit, and its ids, prompt first, from ``first_token`` on in ``tokens``.
    Per sample: ``request`` as a row of those, ``generated`` output tokens so far, ``hidden`` of the newest.
    """

    index: np.ndarray
    kind: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    cut: np.ndarray
    tokens: np.ndarray
    request: np.ndarray
    generated: np.ndarray
    hidden: np.ndarray

    @property
    def remaining(self) -> np.ndarray:
        """Output tokens that follow each sample, at least 1."""
        left: np.ndarray = self.output_tokens[self.request] - self.generated
        return left

    @property
    def first_token(self) -> np.ndarray:
        """Where in ``tokens`` each request begins."""
        ends: np.ndarray = np.cumsum(self.prompt_tokens + self.output_tokens)
        starts: np.ndarray = ends - self.prompt_tokens - self.output_tokens
        return starts

    def of_requests(self, rows: np.ndarray) -> np.ndarray:
        """Tell for each sample whether its request is one of ``rows``."""
        chosen: np.ndarray = np.isin(self.request, rows)
        return chosen


_PER_REQUEST = ("index", "kind", "prompt_tokens", "output_tokens", "cut")


def shards(folder: Path) -> list[Path]:
    """Return the finished shards, oldest first."""
    return sorted(folder.glob("shard-*.safetensors"))


def write_shard(folder: Path, samples: Samples) -> None:
    """Add a shard, which appears in one step."""
    number = 1 + max((int(path.stem.removeprefix("shard-")) for path in shards(folder)), default=-1)
    scratch = folder / "unfinished"
    save_file({part.name: getattr(samples, part.name) for part in fields(Samples)}, scratch)
    scratch.rename(folder / f"shard-{number:06d}.safetensors")


def load_samples(folder: Path) -> Samples:
    """Read all shards of ``folder``. Raises ``ConfigError`` when it has none."""
    parts = [load_file(path) for path in shards(folder)]
    if not parts:
        raise ConfigError(f"{folder} has no collected samples; tidegate predictor collect makes some")
    return join_samples([Samples(**part) for part in parts])


def join_samples(parts: list[Samples]) -> Samples:
    """Return the samples of several sets of requests, in the order of their requests' index."""
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _PER_REQUEST}
    order = np.argsort(joined["index"], kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    offsets = np.cumsum([0, *(len(part.index) for part in parts[:-1])])
    request = place[np.concatenate([part.request + at for part, at in zip(parts, offsets, strict=True)])]
    rows = np.argsort(request, kind="stable")
    texts = [text for part in parts for text in np.split(part.tokens, part.first_token[1:])]
    return Samples(
        **{name: values[order] for name, values in joined.items()},
        tokens=np.concatenate([texts[row] for row in order]),
        request=request[rows],
        generated=np.concatenate([part.generated for part in parts])[rows],
        hidden=np.concatenate([part.hidden for part in parts])[rows],
    )


def open_folder(folder: Path, settings: CollectionSettings) -> set[int]:
    """Make or continue a collection and return the indexes of the requests that it has. Raises
    ``ConfigError`` when it was begun with other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if path.is_file():
        begun = read_settings(folder)
        if begun != settings:
            raise ConfigError(f"{folder} was begun with other settings: {begun}, not {settings}")
    else:
        path.write_text(json.dumps(asdict(settings), indent=2) + "\n")
    return {int(index) for shard in shards(folder) for index in load_file(shard)["index"]}


def read_settings(folder: Path) -> CollectionSettings:
    """Return the settings of a collection. Raises ``ConfigError`` when ``folder`` is none."""
    try:
        return CollectionSettings(**json.loads((folder / "settings.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{folder} is no collection: {error}") from None


@dataclass(frozen=True, slots=True)
class Split:
    """Rows of requests to learn from, to stop early by, and to report on; no request is in two of them."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_requests(index: np.ndarray, seed: int = 0) -> Split:
    """Split requests 70/15/15 by chance, as the paper does. Their numbers ``index`` alone decide, so that a
    collection that goes on moves none to another part."""
    drawn = np.random.default_rng(seed).random(int(index.max()) + 1)[index]
    return Split(
        *(np.flatnonzero((drawn >= low) & (drawn < high)) for low, high in pairwise((0, 0.7, 0.85, 1)))
    )
