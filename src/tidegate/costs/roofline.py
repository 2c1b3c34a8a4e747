"""A first profile for a (model, GPU) pair that nobody measured: nominal rates and stated efficiencies.

The last resort, and labelled so. A prefill step takes the time of its arithmetic once that exceeds the time
to read the weights; a decode step reads the weights and the KV of its requests; attention is arithmetic in
prefill and reading in decode (Williams et al., Roofline, CACM 2009). What real kernels reach of the nominal
rates is in the constants below, calibrated once against all packaged profiles: they are met within 8 % in the
median, and within a factor of 1.5 in 95 of 100 cases, of which they are the calibration itself
(``benchmarks/roofline_error.py``). The worst are small prefills of mixtures of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tidegate.core.errors import ConfigError
from tidegate.costs.forms import MixedCost, PrefillCost, StepCost, TransferCost
from tidegate.costs.library import (
    GPUS,
    LINK_EFFICIENCY,
    MIXED_CONTEXT_RATIO,
    Gpu,
    PackagedProfile,
    assumed_links,
)
from tidegate.costs.profile import Profile

MATMUL, ATTENTION, WEIGHTS, KV = 0.68, 0.79, 0.85, 0.95
"""Shares of the nominal rates that kernels reach: of arithmetic, and of reading memory."""
STEP_BATCH = 0.92
"""Part of a token's arithmetic that shows in a decode step beside reading weights."""
LAYER_S, REDUCE_S = 37e-6, 11e-6
"""Per layer and step; per all-reduce, whose bytes move at LINK_EFFICIENCY."""
RESERVED_SHARE = 0.12
"""Share of memory that is neither weights nor KV: vLLM leaves 8-10 %, activations take the rest."""
CPU_CORE = Gpu(100e9, 100e9, 10e9, 16e9, 1e9)
"""A core of a server's CPU, of which the proportions matter: what is measured scales them."""
BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a decoder's architecture costs time. ``experts`` is 0 for a dense model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    weight_bytes: float
    kv_bytes: float
    experts: int = 0
    active_experts: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shape:
        """Read a ``config.json`` in Hugging Face's layout. Raises ConfigError naming what it lacks."""
        inner = config.get("text_config")
        config = inner if isinstance(inner, Mapping) else config

        def first(*names: str, default: int | None = None) -> int:
            for name in names:
                if isinstance(config.get(name), int):
                    return int(config[name])
            if default is None:
                raise ConfigError(f"the model's config.json has no {names[0]}; a roofline needs it")
            return default

        if "kv_lora_rank" in config:
            raise ConfigError("the roofline does not know latent attention (MLA); measure such a model")
        hidden, heads = first("hidden_size"), first("num_attention_heads")
        experts = first("num_experts", "num_local_experts", "n_routed_experts", default=0)
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        kv_bytes = BYTES.get(dtype, 2.0)
        return cls(
            hidden=hidden,
            layers=first("num_hidden_layers"),
            heads=heads,
            kv_heads=first("num_key_value_heads", default=heads),
            head_dim=first("head_dim", default=hidden // heads),
            intermediate=first(*(["moe_intermediate_size"] if experts else []), "intermediate_size"),
            vocab=first("vocab_size"),
            weight_bytes=_weight_bytes(config.get("quantization_config"), kv_bytes),
            kv_bytes=kv_bytes,
            experts=experts,
            active_experts=first("num_experts_per_tok", default=0) if experts else 0,
        )

    @property
    def kv_bytes_per_token(self) -> int:
        return round(2 * self.layers * self.kv_heads * self.head_dim * self.kv_bytes)

    @property
    def attention_weights(self) -> int:
        """Parameters outside the feed-forward part, all layers and the output head."""
        width = self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * self.hidden * width + self.hidden * self.vocab

    @property
    def expert_weights(self) -> int:
        """Parameters of one expert, or of the feed-forward part of a dense model, in all layers."""
        return self.layers * 3 * self.hidden * self.intermediate

    @property
    def stored_bytes(self) -> float:
        """Bytes of all weights, the input embedding counted apart."""
        experts = max(1, self.experts) * self.expert_weights
        return (self.attention_weights + self.hidden * self.vocab + experts) * self.weight_bytes

    def kv_tokens(self, memory_bytes: float, copies: float = 1.0) -> int:
        """Return how many tokens of KV, each stored ``copies`` times, fit beside the weights."""
        room = memory_bytes * (1 - RESERVED_SHARE) - self.stored_bytes
        return int(room / (self.kv_bytes_per_token * copies))


def roofline_profile(name: str, gpu_name: str, shape: Shape, *, model: str, tp: int = 1) -> PackagedProfile:
    """Derive a profile. Raises ConfigError for an unknown GPU or a model that its memory cannot hold."""
    gpu = GPUS.get(gpu_name)
    if gpu is None:
        raise ConfigError(f"no nominal figures for GPU {gpu_name!r}; there are: {', '.join(GPUS)}")
    if tp < 1 or shape.heads % tp:
        raise ConfigError(f"{shape.heads} attention heads cannot be divided among {tp} GPUs")
    kv_tokens = shape.kv_tokens(tp * gpu.memory_bytes, _kv_copies(shape, tp))
    if kv_tokens < 1:
        raise ConfigError(
            f"{model} has {shape.stored_bytes / 1e9:.0f} GB of weights: too much for {tp} x {gpu_name}; "
            "raise /tpN"
        )
    inside, between = assumed_links(gpu.port_bytes_per_s, tp)
    return PackagedProfile(
        _profile(name, gpu, gpu_name, shape, tp, inside),
        model,
        shape.kv_bytes_per_token,
        kv_tokens,
        between,
        "a roofline estimate, not measured: expect factors of up to 1.5",
    )


def nominal_profile(name: str, device: str, shape: Shape) -> Profile:
    """Return what a model's size suggests of an engine on ``device``, "cpu" or "cuda", to be scaled by what
    is measured of it."""
    gpu = CPU_CORE if device == "cpu" else GPUS["l40s"]
    return _profile(name, gpu, device, shape, 1, assumed_links(gpu.port_bytes_per_s, 1)[0])


def _profile(name: str, gpu: Gpu, gpu_name: str, shape: Shape, tp: int, link: TransferCost) -> Profile:
    flops = gpu.fp8_flops if shape.weight_bytes <= 1.0 else gpu.bf16_flops
    per_byte = 1.0 / (tp * gpu.memory_bytes_per_s * WEIGHTS)

    def read_s(weights: int) -> float:
        return weights * shape.weight_bytes * per_byte

    every_step = shape.attention_weights + (0 if shape.experts else shape.expert_weights)
    active = shape.attention_weights + max(1, shape.active_experts) * shape.expert_weights
    weights_s = read_s(shape.attention_weights + max(1, shape.experts) * shape.expert_weights)
    reduces = 2 * shape.layers if tp > 1 else 0
    reduced_s = 2.0 * shape.hidden * 2 * (tp - 1) / tp / (LINK_EFFICIENCY * gpu.port_bytes_per_s)
    fixed_s = shape.layers * LAYER_S + reduces * REDUCE_S
    token_s = 2.0 * active / (tp * flops * MATMUL) + reduces * reduced_s
    pair_s = 4.0 * shape.layers * shape.heads * shape.head_dim / (tp * gpu.bf16_flops * ATTENTION)
    kv_s = shape.kv_bytes_per_token * _kv_copies(shape, tp) / (tp * gpu.memory_bytes_per_s * KV)
    step = StepCost(
        fixed_s + read_s(every_step),
        STEP_BATCH * token_s,
        kv_s,
        read_s(shape.expert_weights) if shape.experts else 0.0,
        float(max(1, shape.experts)),
        float(shape.active_experts),
    )
    chunk = PrefillCost(fixed_s + weights_s, token_s, pair_s, float(round(weights_s / token_s)))
    mixed = MixedCost(chunk.a_s, token_s, pair_s, MIXED_CONTEXT_RATIO * kv_s, chunk.n0)
    return Profile(name, chunk, step, mixed, link, f"roofline of {gpu_name}'s nominal figures, not measured")


def _kv_copies(shape: Shape, tp: int) -> float:
    """Return how often each token's KV is stored: fewer KV heads than GPUs are replicated."""
    return max(1.0, tp / shape.kv_heads)


def _weight_bytes(quantization: object, plain: float) -> float:
    if not isinstance(quantization, Mapping):
        return plain
    text = str(sorted(quantization.items())).lower()
    if "fp8" in text or "int8" in text or "'bits', 8" in text or "'num_bits': 8" in text:
        return 1.0
    return 0.5 if "4" in text else plain
