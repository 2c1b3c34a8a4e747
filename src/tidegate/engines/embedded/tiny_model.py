"""A tiny random-weight model with a real tokenizer, written from nothing: the cluster needs no download.

The weights are random, so the text is gibberish, but every part of serving is real: byte-level
BPE, chat template, end-of-sequence ids, paged KV, greedy and sampled decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.utils import logging as hf_logging

from tidegate.core.errors import ConfigError

Arch = Literal["llama", "qwen2", "qwen3", "mistral"]

_CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
}
_auto: Any = AutoModelForCausalLM
_generation: Any = GenerationConfig
_fast_tokenizer: Any = PreTrainedTokenizerFast
_SPECIAL = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
_BOS, _EOS, _PAD, _IM_END = 0, 1, 2, 4
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = (
    "The quick brown fox jumps over the lazy dog while the tide comes in and goes out again.",
    "Prefill reads the whole prompt at once; decode writes one token at a time, and both need memory.",
    "You are a helpful assistant. Please answer the question of the user as well as you can.",
    "What is the capital of the country, and why does it rain there so often in the autumn?",
    "A gate opens when the water is high and closes when it is low; nobody has to restart it.",
    "def main(args):\n    for line in open(args.path):\n        print(line.strip())\n    return 0\n",
    "Numbers: 0 1 2 3 4 5 6 7 8 9 10 11 12 100 1000 2024 3.14159",
    "Café, naïve, Zürich, señor, Grüße; 日本語の文章、中文句子、привет мир 🌊🚪",
)


def make_tiny_model(
    folder: str | Path,
    arch: Arch = "llama",
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 256,
    heads: int = 8,
    kv_heads: int = 4,
    intermediate: int = 512,
    vocab: int = 512,
    max_len: int = 8192,
    init_std: float = 0.15,
    sliding_window: int | None = None,
) -> Path:
    """Write weights, config, tokenizer and chat template to ``folder`` and return it.

    The same arguments give the same weights. ``init_std`` is larger than a trained model's so that greedy
    output varies with the prompt. ``sliding_window`` (tokens) applies to mistral only. Raises ConfigError.
    """
    if arch not in _CONFIGS:
        raise ConfigError(f"unknown tiny-model arch {arch!r}; known: {', '.join(get_args(Arch))}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(vocab)
    extra = {"sliding_window": sliding_window} if arch == "mistral" else {}
    config = _CONFIGS[arch](
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=max_len,
        initializer_range=init_std,
        tie_word_embeddings=False,
        bos_token_id=_BOS,
        eos_token_id=_EOS,
        pad_token_id=_PAD,
        **extra,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        # A logit of 0 is below the best of many random ones.
        model.lm_head.weight[_invisible_ids(tokenizer, vocab)] = 0.0
    model.generation_config = _generation(bos_token_id=_BOS, eos_token_id=[_EOS, _IM_END], pad_token_id=_PAD)
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _train_tokenizer(vocab: int) -> Any:
    """Train a byte-level BPE of exactly ``vocab`` ids on the built-in corpus."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS * 20, trainer)
    tokenizer = _fast_tokenizer(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    if len(tokenizer) < vocab:
        tokenizer.add_tokens([f"<x{index}>" for index in range(vocab - len(tokenizer))])
    if len(tokenizer) != vocab:
        raise ConfigError(f"tiny-model vocab {vocab} is too small; the byte alphabet needs {len(tokenizer)}")
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _invisible_ids(tokenizer: Any, vocab: int) -> list[int]:
    """Return ids that show nothing when decoded: special tokens and lone control characters, EOS excepted."""
    texts = {token: tokenizer.decode([token], skip_special_tokens=True) for token in range(vocab)}
    hidden = [token for token, text in texts.items() if not text or (text != "\n" and not text.isprintable())]
    return [token for token in hidden if token != _EOS]
