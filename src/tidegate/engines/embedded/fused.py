"""Parts of a decoder that take fewer and larger kernels than those of transformers, put in their place.

Llama, Mistral, Qwen2 and Qwen3 have one shape of layer: Q, K and V become one product, gate and up another,
and a norm or a rotation a kernel or two. On CPU the weights of a product are laid out once as oneDNN reads
them, which is half the time of a decode step. Other models keep transformers' parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu

from tidegate.engines.embedded.attention import PagedBatch, paged_attention

_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
_PACKED = (torch.float32, torch.bfloat16)
"""Types that oneDNN has a layout for."""


def fuse(module: nn.Module) -> None:
    """Replace the parts of a causal language model that are known. Its results differ by rounding alone."""
    model: Any = module
    family = type(model).__name__.removesuffix("ForCausalLM")
    if family not in _FAMILIES or getattr(model.config, "hidden_act", "") != "silu":
        return
    for layer in model.model.layers:
        layer.self_attn = FusedAttention(layer.self_attn)
        layer.mlp = FusedMlp(layer.mlp)
        layer.input_layernorm = FusedNorm(layer.input_layernorm)
        layer.post_attention_layernorm = FusedNorm(layer.post_attention_layernorm)
    model.model.norm = FusedNorm(model.model.norm)
    model.model.rotary_emb = SignedRotary(model.model.rotary_emb)
    model.lm_head = product(model.lm_head)


def product(*parts: nn.Linear) -> nn.Module:
    """Return one module that computes ``parts``, which read the same input, side by side."""
    weight = (
        parts[0].weight.detach() if len(parts) == 1 else torch.cat([part.weight.detach() for part in parts])
    )
    bias = None
    if any(part.bias is not None for part in parts):
        none = [part.weight.new_zeros(part.out_features) for part in parts]
        bias = torch.cat(
            [zeros if part.bias is None else part.bias for part, zeros in zip(parts, none, strict=True)]
        )
    if weight.device.type == "cpu" and weight.dtype in _PACKED and _ONEDNN:
        return PackedLinear(weight, bias)
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        joined.bias = nn.Parameter(bias, requires_grad=False)
    return joined


class PackedLinear(nn.Module):
    """A linear layer whose weight is in oneDNN's own layout; these are the operators of torch's compiler."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias = bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            hidden, self._packed, self._bias, "none", [], ""
        )
        return result


class FusedNorm(nn.Module):
    """RMSNorm, at least in the precision of its input."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self._eps = norm.weight, norm.variance_epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, self.weight.shape, self.weight, self._eps)


class SignedRotary(nn.Module):
    """The rotary tables as ``FusedAttention`` multiplies them: (tokens, 1, head_dim), sines of the first half
    negated."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.tables(hidden, position_ids=position_ids)
        first, second = sin[0].unsqueeze(1).chunk(2, dim=-1)
        return cos[0].unsqueeze(1), torch.cat((-first, second), dim=-1)


class FusedMlp(nn.Module):
    """The gated feed-forward part with SiLU."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up, self.down = product(mlp.gate_proj, mlp.up_proj), product(mlp.down_proj)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        result: torch.Tensor = self.down(silu(gate).mul_(up))
        return result


class FusedAttention(nn.Module):
    """Self-attention over the paged store, of one flat row of tokens."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        config = attention.config
        self.layer_idx: int = attention.layer_idx
        self._head_dim, self._scaling = attention.head_dim, attention.scaling
        mistral = type(attention).__name__.startswith("Mistral")
        self._window = getattr(config if mistral else attention, "sliding_window", None)
        self._heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads
        self.qkv = product(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = product(attention.o_proj)
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.norms = nn.ModuleList(FusedNorm(norm) for norm in norms if norm is not None)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        *,
        paged: PagedBatch,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        tokens, heads = hidden_states.shape[1], self._heads
        parts = self.qkv(hidden_states[0]).view(tokens, heads + 2 * self._kv_heads, self._head_dim)
        rotated, value = parts[:, : -self._kv_heads], parts[:, -self._kv_heads :]
        if self.norms:
            query_norm, key_norm = self.norms
            rotated = torch.cat((query_norm(rotated[:, :heads]), key_norm(rotated[:, heads:])), dim=1)
        cos, sin = position_embeddings
        rotated = torch.addcmul(rotated * cos, rotated.roll(self._head_dim // 2, dims=-1), sin)
        query, key, value = (
            part.transpose(0, 1).unsqueeze(0) for part in (rotated[:, :heads], rotated[:, heads:], value)
        )
        attended, _none = paged_attention(
            self, query, key, value, None, paged=paged, scaling=self._scaling, sliding_window=self._window
        )
        return self.out(attended.reshape(1, tokens, heads * self._head_dim)), None
