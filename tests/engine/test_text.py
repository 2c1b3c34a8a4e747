"""Text of the legs of a request concatenates to what one leg says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.engine.engine_harness import Driven, MakeModel, prompt_of, request
from tidegate.core.errors import ConfigError
from tidegate.engines.embedded.sequence import take_token
from tidegate.engines.embedded.tokenizer import ModelTokenizer, load_tokenizer
from tidegate.engines.serving.assembling import TextAssembler


@pytest.fixture(scope="module")
def byte_level(llama: Path) -> ModelTokenizer:
    return ModelTokenizer(load_tokenizer(llama), 512)


class Backed:
    """The one attribute of a transformers tokenizer that the detokenizer reads."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend_tokenizer = backend


@pytest.fixture(scope="module")
def metaspace() -> ModelTokenizer:
    """A sentencepiece-like tokenizer with byte fallback, which needs the window decoder."""
    words = ["<unk>", "▁the", "▁tide", "▁", "gate", "s", "é", "▁日", "."]
    vocab = {word: index for index, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return ModelTokenizer(Backed(backend), len(vocab))


def whole(detokenizer: ModelTokenizer, ids: list[int], stops: tuple[str, ...] = ()) -> tuple[str, str | None]:
    """Feed ids one by one and flush; return the text and the stop string that ended it."""
    text = detokenizer.assembler((), 0, stops, 0)
    said = ""
    for token_id in ids:
        said += text.add(token_id)
        if text.stopped_by is not None:
            return said, text.stopped_by
    return said + text.flush(), None


def in_legs(
    detokenizer: ModelTokenizer, ids: list[int], cuts: list[int], stops: tuple[str, ...]
) -> tuple[str, str | None]:
    """The same in legs that end at ``cuts``, none but the last flushed."""
    said, start = "", 0
    for end in [*sorted(cuts), len(ids)]:
        text = detokenizer.assembler(tuple(ids[:start]), start, stops, 0)
        for token_id in ids[start:end]:
            said += text.add(token_id)
            if text.stopped_by is not None:
                return said, text.stopped_by
        start = end
    return said + text.flush(), None


tokens = st.integers(0, 511)


@settings(max_examples=200)
@given(ids=st.lists(tokens, max_size=40))
def test_byte_level_text_is_the_tokenizers_own(byte_level: ModelTokenizer, ids: list[int]) -> None:
    expected = byte_level.pretrained.decode(ids, skip_special_tokens=True)
    assert whole(byte_level, ids)[0] == expected


@settings(max_examples=200)
@given(ids=st.lists(tokens, max_size=40))
def test_the_bytes_and_the_texts_of_tokens_spell_the_answer(
    byte_level: ModelTokenizer, ids: list[int]
) -> None:
    text, said = byte_level.assembler((), 0, (), 0), []
    for token_id in ids:
        text.add(token_id)
        said.append(text.said)
    answer = whole(byte_level, ids)[0]
    assert b"".join(map(byte_level.spelt, ids)).decode(errors="replace") == answer
    assert "".join(said) + text.flush() == answer


def test_tokens_that_are_bytes_or_begin_with_a_space_are_spelt_as_such(metaspace: ModelTokenizer) -> None:
    words = ("▁the", "<0xC3>", "<0xA9>", "▁日")
    ids = [metaspace._backend.get_vocab()[word] for word in words]
    assert [metaspace.spelt(token) for token in ids] == [b" the", b"\xc3", b"\xa9", " 日".encode()]


@settings(max_examples=200)
@given(text=st.text(max_size=30), data=st.data())
def test_legs_concatenate(byte_level: ModelTokenizer, text: str, data: st.DataObject) -> None:
    added = [token.content for token in byte_level.pretrained.added_tokens_decoder.values()]
    assume(not any(token in text for token in added))
    ids = byte_level.encode(text, add_special_tokens=False)
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=4))
    pieces = st.text(min_size=1, max_size=4)
    if text:
        at = st.integers(0, len(text) - 1)
        pieces |= st.builds(lambda start, size: text[start : start + size], at, st.integers(1, 5))
    stops = tuple(data.draw(st.lists(pieces, max_size=3)))
    expected = whole(byte_level, ids, stops)
    assert in_legs(byte_level, ids, cuts, stops) == expected
    if expected[1] is None:
        assert expected[0] == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith(expected[0] + expected[1])


@settings(max_examples=150)
@given(ids=st.lists(st.integers(1, 264), max_size=25), data=st.data())
def test_window_decoder_legs_concatenate(
    metaspace: ModelTokenizer, ids: list[int], data: st.DataObject
) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=3))
    assert in_legs(metaspace, ids, cuts, ()) == whole(metaspace, ids)


@settings(max_examples=150)
@example(words=["▁the", "▁日", "é", "▁tide", "<0xF0>", "<0x9F>", "<0x8C>", "<0x8A>", "s"])
@given(words=st.lists(st.sampled_from(["▁the", "▁tide", "▁", "gate", "s", "é", "▁日", "."]), max_size=20))
def test_window_decoder_text_is_the_tokenizers_own(metaspace: ModelTokenizer, words: list[str]) -> None:
    backend = metaspace._backend
    known = [backend.token_to_id(word) for word in words]
    ids = [token for token in known if token is not None]
    assert len(ids) == len(words)
    assert whole(metaspace, ids)[0] == backend.decode(ids)


def test_ids_that_only_the_model_knows_show_nothing(llama: Path) -> None:
    padded = ModelTokenizer(load_tokenizer(llama), 600)
    a = padded.encode("a", add_special_tokens=False)[0]
    assert whole(padded, [a, 599, a]) == ("aa", None)
    assert padded.piece(599) == ""


def test_half_a_character_is_held_back_and_flushed_as_replacement(byte_level: ModelTokenizer) -> None:
    wave = byte_level.encode("\N{BROKEN HEART}", add_special_tokens=False)
    assert len(wave) > 1
    text = byte_level.assembler((), 0, (), 0)
    assert [text.add(token) for token in wave[:-1]] == [""] * (len(wave) - 1)
    assert text.flush() == "\ufffd"
    text = byte_level.assembler(tuple(wave[:-1]), len(wave) - 1, (), 0)
    assert text.add(wave[-1]) == "\N{BROKEN HEART}"


def test_a_possible_stop_is_held_back_no_longer_than_needed(byte_level: ModelTokenizer) -> None:
    text = byte_level.assembler((), 0, ("abcd",), 0)
    ids = [byte_level.encode(char, add_special_tokens=False)[0] for char in "xabcabe"]
    assert [text.add(token) for token in ids] == ["x", "", "", "", "abc", "", "abe"]


def test_stop_strings_count_only_beyond_min_tokens(byte_level: ModelTokenizer) -> None:
    a = byte_level.encode("a", add_special_tokens=False)[0]
    text: TextAssembler = byte_level.assembler((), 0, ("a",), 0)
    assert (text.add(a, may_stop=False), text.stopped_by) == ("a", None)
    assert (text.add(a, may_stop=True), text.stopped_by) == ("", "a")


def test_replayed_stop_strings_below_min_tokens_stay_shown(byte_level: ModelTokenizer) -> None:
    a = byte_level.encode("a", add_special_tokens=False)[0]
    text = byte_level.assembler((a, a), 2, ("a",), 3)
    assert text.stopped_by is None
    assert (text.add(a, may_stop=False), text.add(a), text.stopped_by) == ("a", "", "a")


class Scripted:
    """Makes an engine emit given ids instead of sampled ones."""

    def __init__(self, driven: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
        self.script: dict[str, list[int]] = {}

        def scripted(sequence: Any, choice: Any, *rest: Any) -> Any:
            ids = self.script.get(sequence.request.id)
            if ids is not None:
                choice = type(choice)(ids[sequence.output_position])
            return take_token(sequence, choice, *rest)

        monkeypatch.setattr("tidegate.engines.embedded.engine.take_token", scripted)
        self.driven = driven

    def legs(self, ids: list[int], cuts: list[int], **params: Any) -> tuple[str, str | None, Any]:
        prompt, said, done = prompt_of(9), "", 0
        for end in [*cuts, len(ids)]:
            last = end == len(ids)
            leg = request(
                f"leg-{end}-{len(cuts)}",
                prompt + ids[:done],
                end - done,
                generated=done,
                pin_kv=not last,
                **params,
            )
            self.script[leg.id] = ids
            answer = self.driven.run(leg)[0]
            said += answer.text
            done = end
            self.driven.engine.release(leg.id)
            if answer.reason == "stop":
                break
        assert answer.last is not None
        return said, answer.reason, answer.last.stop_reason


@pytest.fixture
def scripted(llama: Path, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    return Scripted(Driven(llama), monkeypatch)


def encode(driven: Driven, text: str) -> list[int]:
    return driven.engine.tokenizer.encode(text, add_special_tokens=False)


def test_engine_legs_split_a_character_and_a_stop_string(scripted: Scripted) -> None:
    ids = encode(scripted.driven, "tide \N{BROKEN HEART} zq-STOP-zq and more")
    expected = scripted.legs(ids, [], stop=("-STOP-",))
    assert expected == ("tide \N{BROKEN HEART} zq", "stop", "-STOP-")
    for cut in range(1, len(ids) - 1):
        assert scripted.legs(ids, [cut], stop=("-STOP-",)) == expected
    scripted.driven.drain()
    scripted.driven.assert_clean()


def test_the_end_flushes_what_is_held_back(scripted: Scripted) -> None:
    half = encode(scripted.driven, "a\N{BROKEN HEART}")[:-1]
    assert scripted.legs(half, []) == ("a\ufffd", "length", None)
    assert scripted.legs([*half, 1], [], ignore_eos=False) == ("a\ufffd", "stop", None)
    held = encode(scripted.driven, "ab")
    assert scripted.legs(held, [], stop=("bc",)) == ("ab", "length", None)


def test_a_stop_token_ends_without_showing_its_text(scripted: Scripted) -> None:
    ids = encode(scripted.driven, "xyz")
    stop = ids[-1]
    assert scripted.legs(ids, [], stop_token_ids=(stop,)) == ("xy", "stop", stop)


def test_a_folder_without_a_tokenizer_is_a_config_error(tmp_path: Path, tiny: MakeModel) -> None:
    (tmp_path / "config.json").write_text((tiny("llama") / "config.json").read_text())
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(tmp_path)
