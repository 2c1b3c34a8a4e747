"""``python -m tidegate.engines.embedded.gguf_folder FILE DIR``: a GGUF of a Llama as a Hugging Face folder.

Weights go to bfloat16. The folder is a function of the file: no library's version and no clock is in it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tidegate.core.errors import SetupError

_IN_A_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL = 3
"""GGUF's type of tokens that stand for no text."""


def convert_gguf(file: Path, folder: Path) -> None:
    """Write config, weights, tokenizer and chat template of ``file`` to ``folder``, which must exist. Raises
    SetupError for what is not a Llama with a byte-level BPE."""
    reader = gguf.GGUFReader(file)
    said: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    kind = said["general.architecture"], said["tokenizer.ggml.model"]
    if kind != ("llama", "gpt2"):
        raise SetupError(f"{file.name} is {kind[0]} with the tokenizer {kind[1]}; only llama with gpt2 fits")
    config = _config(said, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        *place, part, _ = tensor.name.split(".")
        if part in heads:
            # llama.cpp interleaves the halves that rotary embedding pairs.
            values = values.view(heads[part], -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
        name = f"model.layers.{place[1]}.{_IN_A_LAYER[part]}" if place else _OUTSIDE[part]
        weights[f"{name}.weight"] = values.to(torch.bfloat16).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # Written for its owner alone; any engine may serve it.
    _tokenizer(said).save_pretrained(folder)
    for name, content in (("config", config), ("generation_config", _special_ids(said))):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _special_ids(said: dict[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": said["tokenizer.ggml.bos_token_id"],
        "eos_token_id": said["tokenizer.ggml.eos_token_id"],
        "pad_token_id": said["tokenizer.ggml.padding_token_id"],
    }


def _config(said: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads = said["llama.attention.head_count"]
    return {
        **_special_ids(said),
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": said["llama.embedding_length"],
        "intermediate_size": said["llama.feed_forward_length"],
        "num_hidden_layers": said["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": said["llama.attention.head_count_kv"],
        "head_dim": said["llama.embedding_length"] // heads,
        "max_position_embeddings": said["llama.context_length"],
        "rms_norm_eps": said["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": said["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "vocab_size": len(said["tokenizer.ggml.tokens"]),
    }


def _tokenizer(said: dict[str, Any]) -> Any:
    """Build the tokenizer; ``smollm``, by its name in GGUF, splits numbers into digits first."""
    texts: list[str] = said["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in said["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({text: number for number, text in enumerate(texts)}, merges))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if said["tokenizer.ggml.pre"] == "smollm" else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, by_bytes])
    backend.decoder = decoders.ByteLevel()
    types = zip(texts, said["tokenizer.ggml.token_type"], strict=True)
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text, kind in types if kind == _CONTROL]
    )
    names = {name.replace("_id", ""): texts[number] for name, number in _special_ids(said).items()}
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=backend, chat_template=said.get("tokenizer.chat_template"), **names)


if __name__ == "__main__":
    convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
