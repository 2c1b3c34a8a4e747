"""Loading a decoder-only model from a local folder, wired to the paged attention.

In float64 the forward pass is float64 from end to end: transformers computes RMSNorm and rotary
tables in float32 whatever the weights are, so both are replaced, and a probe refuses a model that
still drops below float64 anywhere. Greedy output then does not depend on how requests are batched.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as hf_logging

from tidegate.core.errors import ConfigError
from tidegate.engines.embedded import attention
from tidegate.engines.embedded.kv_store import KvShape
from tidegate.engines.embedded.options import DTYPES


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the rest of the engine needs to know of a model. ``max_model_len`` is in tokens."""

    folder: Path
    max_model_len: int
    vocab_size: int
    eos_ids: frozenset[int]
    kv: KvShape

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV that one token occupies over all layers."""
        return self.kv.bytes_per_token


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run on ``device``."""

    module: nn.Module
    info: ModelInfo
    device: torch.device


def load_model(folder: str | Path, dtype: str = "auto", device: str = "cpu") -> LoadedModel:
    """Load weights and configuration from ``folder``; nothing is fetched from a network.

    Raises ``ConfigError`` when the folder, the dtype, the device or the architecture does not fit.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not a model folder: it has no config.json")
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} is asked for, but torch sees no CUDA device")
    attention.register()
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    _refuse_unsupported(config)
    module: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype="auto" if dtype == "auto" else getattr(torch, dtype),
        attn_implementation=attention.IMPLEMENTATION,
        local_files_only=True,
    )
    target = torch.device(device)
    module = module.to(target).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    if module.dtype == torch.float64:
        _widen(module)
    return LoadedModel(module=module, info=_model_info(folder, config, module.dtype), device=target)


def _model_info(folder: Path, config: Any, dtype: torch.dtype) -> ModelInfo:
    heads = config.num_attention_heads
    return ModelInfo(
        folder=folder,
        max_model_len=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        eos_ids=_eos_ids(folder, config),
        kv=KvShape(
            layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=dtype,
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
    problems = []
    if getattr(config, "is_encoder_decoder", False):
        problems.append(
            f"{config.model_type} is an encoder-decoder model; only decoder-only models are served"
        )
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if layers:
        problems.append(
            f"{config.model_type} has layers without paged attention: {', '.join(sorted(layers))}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        problems.append(
            f"rope type {rope['rope_type']!r} depends on the longest request of a batch: KV cannot be reused"
        )
    if problems:
        raise ConfigError(problems)


def _widen(module: nn.Module) -> None:
    """Replace the parts that transformers computes in float32 by float64 ones."""
    for part in module.modules():
        name = type(part).__name__
        if name.endswith("RMSNorm"):
            eps = getattr(part, "variance_epsilon", None) or part.eps
            part.forward = _WideNorm(part.weight, eps)  # type: ignore[arg-type]
        elif name.endswith("RotaryEmbedding"):
            scaling = getattr(part, "attention_scaling", 1.0)
            part.forward = _WideRotary(part.inv_freq, scaling)  # type: ignore[arg-type]


class _WideNorm:
    """RMSNorm in the precision of its input."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight, self._eps = weight, eps

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(hidden, self._weight.shape, self._weight, self._eps)


class _WideRotary:
    """Rotary tables in float64."""

    def __init__(self, inv_freq: torch.Tensor, scaling: float) -> None:
        self._inv_freq, self._scaling = inv_freq.double(), scaling

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].double() * self._inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self._scaling, angles.sin() * self._scaling


class OnlyFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside this context every floating-point result must be float64; raises ``ConfigError`` otherwise."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            narrow = isinstance(value, torch.Tensor) and value.is_floating_point()
            if narrow and value.dtype != torch.float64:
                raise ConfigError(f"the model computes {func} in {value.dtype}; float64 mode does not fit it")
        return result
