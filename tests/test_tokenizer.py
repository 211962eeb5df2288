"""The tokenizer: Falcon's own cases, text from any cut of the tokens, and what is refused."""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path

import helpers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers

from steer_engine.errors import CheckpointError
from steer_engine.tokenizer import TextStream, Tokenizer, byte_level_alphabet

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
FALCON, CASES = DATA / "falcon-tokenizer.json.xz", DATA / "falcon-tokenizer-cases.json"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tiny")
    helpers.write_tokenizer(directory)
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def falcon(tmp_path_factory) -> Tokenizer:
    if not FALCON.exists():
        pytest.skip(f"Falcon's tokenizer is not at {FALCON}")
    directory = tmp_path_factory.mktemp("falcon")
    (directory / "tokenizer.json").write_bytes(lzma.decompress(FALCON.read_bytes()))
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def cases() -> list[dict]:
    if not CASES.exists():
        pytest.skip(f"Falcon's test cases are not at {CASES}")
    return json.loads(CASES.read_text(encoding="utf-8"))


def edited(tokenizer: Tokenizer, directory: Path, change) -> Path:
    """A copy of a tokenizer.json after change(content)."""
    content = json.loads(tokenizer.path.read_text(encoding="utf-8"))
    change(content)
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


# Falcon's tokenizer -------------------------------------------------------------------------------


def test_falcons_cases_encode_to_falcons_ids(falcon, cases):
    assert len(cases) == 47
    for case in cases:
        assert falcon.encode(case["text"]) == case["ids"], repr(case["text"])
    assert falcon.encode_batch([c["text"] for c in cases]) == [c["ids"] for c in cases]


def test_falcons_cases_decode_to_their_text(falcon, cases):
    for case in cases:
        assert falcon.decode(case["ids"]) == case["text"]


def test_falcons_sizes_and_special_tokens(falcon):
    assert falcon.vocab_size == 65_024
    assert len(falcon.special_ids) == 12
    assert falcon.encode(helpers.END_OF_TEXT) == [11]
    assert falcon.decode([11]) == "" and falcon.decode([42]) == "?"


def test_falcons_decoding_equals_the_tokenizers_library(falcon, cases):
    library = HfTokenizer.from_file(str(falcon.path))
    for case in cases:
        assert falcon.decode(case["ids"]) == library.decode(case["ids"], skip_special_tokens=True)


def test_text_appears_as_valid_characters_at_every_cut(falcon, cases):
    for case in cases:
        stream, text = TextStream(falcon), ""
        for token_id in case["ids"]:
            text += stream.push(token_id)
            assert case["text"].startswith(text), "only whole characters of the text appear"
        assert text + stream.finish() == case["text"]


def test_the_cases_hold_characters_that_are_split_over_tokens(falcon, cases):
    """Without one, the test above would show nothing."""
    split = [t for c in cases for t in c["ids"] if not is_whole_text(falcon.token_bytes(t))]
    assert len(split) > 20


def is_whole_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


# Streams ------------------------------------------------------------------------------------------


def test_an_emoji_split_over_four_tokens_appears_with_its_last(tiny):
    token_ids = tiny.encode("🙂")
    assert len(token_ids) == 4
    stream = TextStream(tiny)
    assert [stream.push(t) for t in token_ids] == ["", "", "", "🙂"]
    assert stream.finish() == ""


def test_a_character_cut_by_the_end_becomes_one_replacement_character(tiny):
    token_ids = tiny.encode("a🙂")[:-1]
    assert tiny.decode(token_ids) == "a\ufffd"
    stream = TextStream(tiny)
    assert [stream.push(t) for t in token_ids] == ["a", "", "", ""]
    assert stream.finish() == "\ufffd"


def test_bytes_that_are_no_utf8_are_replaced_and_the_text_goes_on(tiny):
    single = {tiny.token_bytes(i): i for i in range(1, 257)}
    token_ids = [single[bytes([b])] for b in b"a\xffb\xe2\x82c"]
    assert tiny.decode(token_ids) == "a\ufffdb\ufffdc"


def test_special_tokens_and_ids_of_a_padded_matrix_have_no_text(tiny):
    assert tiny.token_bytes(0) == b""
    assert tiny.token_bytes(tiny.vocab_size) == b"" == tiny.token_bytes(10**6)
    assert tiny.decode([*tiny.encode("ab"), 0, 10**6]) == "ab"


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_comes_back_from_its_tokens(tiny, text):
    token_ids = tiny.encode(text.replace(helpers.END_OF_TEXT, ""))
    assert tiny.decode(token_ids) == text.replace(helpers.END_OF_TEXT, "")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 300)))
def test_any_tokens_stream_as_valid_text_that_equals_decoding_at_once(tiny, token_ids):
    stream = TextStream(tiny)
    pieces = [stream.push(t) for t in token_ids]
    for piece in pieces:
        piece.encode("utf-8")  # lone surrogates would raise
    text = "".join(pieces) + stream.finish()
    assert text == b"".join(map(tiny.token_bytes, token_ids)).decode("utf-8", errors="replace")


def test_the_byte_alphabet_is_that_of_the_tokenizers_library():
    alphabet = byte_level_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    assert alphabet["Ġ"] == ord(" ") and alphabet["Ċ"] == ord("\n")


# tokenizer.json -----------------------------------------------------------------------------------


def test_truncation_and_padding_of_training_are_ignored(tiny, tmp_path):
    tokenizer = HfTokenizer.from_file(str(tiny.path))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert content["truncation"] and content["padding"]
    trained = Tokenizer(tmp_path)
    text = "the thing is longer than three tokens"
    assert trained.encode(text) == tiny.encode(text)
    assert trained.encode_batch(["a", text]) == [tiny.encode("a"), tiny.encode(text)]


def test_no_special_token_is_added(tiny, tmp_path):
    from tokenizers import processors

    tokenizer = HfTokenizer.from_file(str(tiny.path))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{helpers.END_OF_TEXT} $A", special_tokens=[(helpers.END_OF_TEXT, 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).encode("the") == tiny.encode("the")


def test_an_added_token_that_is_not_special_keeps_its_text(tiny, tmp_path):
    tokenizer = HfTokenizer.from_file(str(tiny.path))
    tokenizer.add_tokens(["<ü>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    added = Tokenizer(tmp_path)
    [token_id] = added.encode("<ü>")
    assert token_id == tiny.vocab_size
    assert added.decode([token_id]) == "<ü>"


def refused(directory: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        Tokenizer(directory)
    assert str(directory / "tokenizer.json") in str(raised.value)
    return str(raised.value)


def test_a_missing_tokenizer_is_refused_with_the_way_out(tmp_path):
    assert "save_pretrained" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"model": {}}', b"\xff\xfe", b"null"])
def test_a_damaged_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert "cannot be read" in refused(tmp_path)


def test_a_truncated_tokenizer_is_refused_at_every_cut(tiny, tmp_path):
    whole = tiny.path.read_bytes()
    for cut in range(0, len(whole), len(whole) // 40):
        (tmp_path / "tokenizer.json").write_bytes(whole[:cut])
        refused(tmp_path)


def save_tokenizer(directory, model, pre_tokenizer=None, normalizer=None) -> Path:
    tokenizer = HfTokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


ASCII = {chr(b): b - 33 for b in range(33, 127)}


def test_a_word_level_model_is_refused(tmp_path):
    save_tokenizer(tmp_path, models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert "must be a byte-level BPE, got WordLevel" in refused(tmp_path)


def test_a_unigram_model_is_refused(tmp_path):
    save_tokenizer(tmp_path, models.Unigram([("a", -1.0), ("<unk>", -2.0)], 1, False))
    assert "must be a byte-level BPE, got Unigram" in refused(tmp_path)


def test_a_bpe_over_sentence_pieces_is_refused_by_its_token(tmp_path):
    save_tokenizer(tmp_path, models.BPE({**ASCII, "▁the": 94}, []), pre_tokenizers.Metaspace())
    assert "token 94 ('▁the') is not byte-level" in refused(tmp_path)


def test_a_bpe_over_characters_is_refused_although_its_tokens_look_byte_level(tmp_path):
    save_tokenizer(tmp_path, models.BPE(ASCII, []), pre_tokenizers.Whitespace())
    assert "does not give back" in refused(tmp_path)


def test_a_normalizer_that_changes_text_is_refused(tiny, tmp_path):
    def lowercase(content):
        content["normalizer"] = {"type": "Lowercase"}

    assert "does not give back" in refused(edited(tiny, tmp_path / "lower", lowercase))


def test_an_absurd_token_id_is_refused_before_memory_is_spent(tiny, tmp_path):
    def far_away(content):
        content["model"]["vocab"]["ing"] = 4_000_000_000

    assert "4000000000" in refused(edited(tiny, tmp_path / "far", far_away))


# Base and domain ----------------------------------------------------------------------------------


def mismatch(base: Tokenizer, directory: Path) -> str:
    with pytest.raises(CheckpointError, match="must share one tokenizer") as raised:
        base.check_same(Tokenizer(directory))
    return str(raised.value)


def test_equal_tokenizers_are_the_same(tiny, tmp_path):
    shutil.copy(tiny.path, tmp_path)
    tiny.check_same(Tokenizer(tmp_path))


def test_swapped_merges_are_counted(tiny, tmp_path):
    def swap(content):
        merges = content["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]

    message = mismatch(tiny, edited(tiny, tmp_path / "d", swap))
    assert "0 vocabulary entries and 2 merges" in message


def test_a_missing_merge_is_counted(tiny, tmp_path):
    message = mismatch(tiny, edited(tiny, tmp_path / "d", lambda c: c["model"]["merges"].pop()))
    assert "0 vocabulary entries and 1 merges" in message


def test_an_added_token_is_counted(tiny, tmp_path):
    tokenizer = HfTokenizer.from_file(str(tiny.path))
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert "1 vocabulary entries and 0 merges" in mismatch(tiny, tmp_path)


def test_reordered_ids_are_counted_once_per_token(tiny, tmp_path):
    def swap(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    assert "2 vocabulary entries and 0 merges" in mismatch(tiny, edited(tiny, tmp_path / "d", swap))


def test_merges_spelled_as_strings_and_as_pairs_are_the_same(tiny, tmp_path):
    """tokenizers before 0.20 wrote "a b", later ones ["a", "b"]; a fine-tune re-saves the file."""

    def as_strings(content):
        merges = content["model"]["merges"]
        assert isinstance(merges[0], list)
        content["model"]["merges"] = [" ".join(pair) for pair in merges]

    tiny.check_same(Tokenizer(edited(tiny, tmp_path / "d", as_strings)))
