"""The head that reads from a hidden state how much is left, its file, and for which model it was trained."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from tidegate.core.errors import ConfigError

_SAMPLED = 4096
"""Elements of each weight that a model's hash covers: all of them would take as long as loading it."""


TRANSFORM = "share of the horizon"
"""What the output of a head stands for."""
PROGRESS_INPUTS = 2
KEPT = 0.7
"""What earlier predictions of a request count for in the next, of 1 (ours: of 0.5, 0.7, 0.8 and 0.9 the one
with the least error on the validation answers of SmolLM2)."""
_LEAST_SHARE = 1e-3
FORMAT = "tidegate-length-head-1"
HEADS = Path(__file__).parent / "heads"
"""The heads that come with the package, with their cards."""


def model_hash(folder: Path) -> str:
    """Return what identifies the weights in ``folder``, whatever the files and the dtype are that hold them
    (from bfloat16 on). Raises ``ConfigError`` when there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} has no safetensors files")
    tied = json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", False)
    found: dict[str, bytes] = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118, it is no dict
                if tied and name == "lm_head.weight":
                    continue
                values = weights.get_tensor(name).reshape(-1)
                some = values[:: max(1, len(values) // _SAMPLED)].bfloat16().view(torch.int16)
                found[name] = (
                    str(tuple(weights.get_slice(name).get_shape())).encode() + some.numpy().tobytes()
                )
    digest = sha256()
    for name in sorted(found):
        digest.update(name.encode() + found[name])
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """What a head's file says of it: the hash of the model whose states it reads, tokens between two
    predictions, the horizon and the widths of ``LengthHead``, the name of its card, and what its output
    stands for."""

    model_hash: str
    every: int
    horizon: int
    widths: tuple[int, ...]
    card: str
    transform: str = TRANSFORM


class LengthHead(nn.Module):
    """A multilayer perceptron from a hidden state to the tokens that are left (ARES, its length predictor).

    It reads the state behind the final norm (the paper does not say on which side of it), ``widths[0]``
    wide, and how many tokens were generated up to it. Its output is which share of the tokens up to the
    ``horizon`` (output tokens; the longest answer that it learnt from) will follow. The paper predicts from
    the state alone, and does not say in which form. With few answers to learn from, what is known of the
    progress need not be learnt as well.
    """

    def __init__(
        self, widths: tuple[int, ...], horizon: int, dropout: float = 0.0, input_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.widths, self.horizon = widths, horizon
        self._input_dropout = nn.Dropout(input_dropout)
        layers: list[nn.Module] = []
        for wide, narrow in pairwise((widths[0] + PROGRESS_INPUTS, *widths[1:])):
            layers += [nn.Linear(wide, narrow), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers[:-2])

    def forward(self, hidden: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
        """Return the share for each row of ``hidden`` and of ``generated``, all in float32."""
        inputs = torch.cat((self._input_dropout(hidden), progress(generated, self.horizon)), dim=1)
        out: torch.Tensor = self.layers(inputs)
        return out[:, 0].sigmoid()

    def left(self, hidden: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
        """Return the tokens that follow each row's newest token, the end of sequence included: at least 1;
        not a number where a state is none."""
        share: torch.Tensor = self(hidden, generated)
        return (share * (self.horizon - generated)).clamp_min(1.0)

    @torch.inference_mode()
    def remaining(self, hidden: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
        """Return ``left`` of states of any dtype."""
        return self.left(hidden.float(), generated.float())

    def blended(self, left: torch.Tensor, before: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
        """Return ``left`` in the light of what was said before: ``before`` is what is left of each request's
        last prediction by now, no number where there is none. The log odds of the shares are averaged.

        The paper takes every prediction as it comes; but one state tells little, and the next one something
        else. Averages of tokens or of their logarithms are worse.
        """
        most = self.horizon - generated.float()
        newest, last = (
            (each / most).clamp(_LEAST_SHARE, 1.0 - _LEAST_SHARE).logit() for each in (left, before)
        )
        together = (most * newest.lerp(last, KEPT).sigmoid()).clamp_min(1.0)
        return torch.where(before.isnan() | (most <= 0), left, together)

    @property
    def parameter_count(self) -> int:
        """Weights and biases."""
        return sum(parameter.numel() for parameter in self.parameters())


def progress(generated: torch.Tensor, horizon: int) -> torch.Tensor:
    """Return what a head reads of the tokens generated, ``(rows, PROGRESS_INPUTS)``: about 0 in the mean, and
    several times as large as a standardised state's parts, which are hundreds."""
    return torch.stack((3.0 * generated.log1p() - 15.0, 15.0 * generated / horizon - 5.0), dim=1)


def save_head(path: Path, head: LengthHead, facts: HeadFacts) -> None:
    """Write a head and what it is to a safetensors file."""
    metadata = {"format": FORMAT, "facts": json.dumps(asdict(facts))}
    save_file({name: value.contiguous() for name, value in head.state_dict().items()}, path, metadata)


def load_head(path: Path) -> tuple[LengthHead, HeadFacts]:
    """Read a head. Raises ``ConfigError`` when ``path`` is not a head's file, or one with a transform that
    is not known here."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        told = json.loads(metadata["facts"])
        facts = HeadFacts(**{**told, "widths": tuple(told["widths"])})
        head = LengthHead(facts.widths, facts.horizon)
        head.load_state_dict(weights)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path} is no length head: {error}") from None
    if facts.transform != TRANSFORM:
        raise ConfigError(f"{path} predicts by {facts.transform!r}; known: {TRANSFORM!r}")
    return head.eval().requires_grad_(False), facts


def load_head_for(path: Path, model: Path) -> tuple[LengthHead, HeadFacts]:
    """Read a head that was trained on the states of ``model``. Raises ``ConfigError`` for any other."""
    head, facts = load_head(path)
    own = model_hash(model)
    if facts.model_hash != own:
        raise ConfigError(
            f"{path} was trained for the model with hash {facts.model_hash}; {model} has hash {own}"
        )
    return head, facts


def packaged_head(model: Path) -> tuple[LengthHead, HeadFacts] | None:
    """Return the head of the package that was trained on the states of ``model``, if there is one."""
    hidden_size = json.loads((model / "config.json").read_text()).get("hidden_size")
    for path in sorted(HEADS.glob("*.safetensors")):
        head, facts = load_head(path)
        # Hashing takes a moment, and most models differ in their size.
        if facts.widths[0] == hidden_size and facts.model_hash == model_hash(model):
            return head, facts
    return None
