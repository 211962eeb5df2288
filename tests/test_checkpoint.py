"""The checkpoint reader: every layout that transformers writes, and every damaged, hostile or
mismatched one refused with a message that names file and tensor.
"""

from __future__ import annotations

import ast
import json
import math
import os
import pickle
import random
import shlex
import struct
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer as HfTokenizer

import steer_engine
from steer_engine import Engine
from steer_engine import checkpoint as checkpoint_module
from steer_engine.checkpoint import Checkpoint, expected_shapes, read_header
from steer_engine.config import FalconConfig
from steer_engine.errors import CheckpointError

HEAD, EMBEDDING = "lm_head.weight", "transformer.word_embeddings.weight"
QKV = "transformer.h.0.self_attention.query_key_value.weight"
MAX_SECONDS = 1.0  # CPU time for refusing one file (FAULTS.md)

# The smallest model of the 7B's architecture: 12 tensors, below 3 KB with its header.
TINY_CONFIG = {
    "model_type": "falcon",
    "vocab_size": 5,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


# Files by hand ------------------------------------------------------------------------------------


def entry(dtype="F32", shape=(2,), begin=0, end=8, **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


def file_bytes(header: dict | bytes, data: bytes = b"", *, header_len: int | None = None) -> bytes:
    """A safetensors file from its parts; a header of bytes goes in as it is."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if header_len is None else header_len) + raw + data


def tiny_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    shapes = expected_shapes(FalconConfig.from_dict(TINY_CONFIG))
    del shapes[HEAD]
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def write_tiny(directory: Path, tensors: dict | None = None, **config) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(TINY_CONFIG | config))
    if tensors is None:
        tensors = tiny_tensors()
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def write_sharded(directory: Path, weight_map: dict | None = None) -> Path:
    """Two shards of the tiny model, and an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(TINY_CONFIG))
    tensors = tiny_tensors()
    names = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    places = {tensor: names[k % 2] for k, tensor in enumerate(tensors)}
    for name in names:
        part = {t: tensors[t] for t, place in places.items() if place == name}
        safetensors.torch.save_file(part, directory / name, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": places | (weight_map or {})}
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v is not None}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def read_everything(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(directory)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def refusal(directory: Path) -> str:
    """The message with which a checkpoint is refused, headers or weights, within MAX_SECONDS."""
    start = time.process_time()
    with pytest.raises(CheckpointError) as raised:
        read_everything(directory)
    assert time.process_time() - start < MAX_SECONDS
    return str(raised.value)


def test_the_tiny_model_itself_loads(tmp_path):
    for directory in (write_tiny(tmp_path / "single"), write_sharded(tmp_path / "sharded")):
        got, expected = read_everything(directory), tiny_tensors()
        assert set(got) == set(expected)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


# What the ecosystem writes ------------------------------------------------------------------------


def engine_logits(directory: Path) -> torch.Tensor:
    engine = Engine.from_pretrained(
        directory, device="cpu", dtype="float32", backend="reference", max_num_seqs=4
    )
    return engine.logits(helpers.random_prompts(4, longest=20))


@pytest.fixture(scope="module")
def model():
    return helpers.hf_model()


@pytest.fixture(scope="module")
def single(model, tmp_path_factory) -> Path:
    return helpers.save(model, tmp_path_factory.mktemp("single") / "base")


@pytest.fixture(scope="module")
def single_logits(single) -> torch.Tensor:
    return engine_logits(single)


def test_a_sharded_checkpoint_equals_its_single_file(model, single_logits, tmp_path):
    helpers.save(model, tmp_path / "sharded", max_shard_size="60KB")
    shards = list((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "sharded" / "model.safetensors").exists()
    assert torch.equal(engine_logits(tmp_path / "sharded"), single_logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_as_their_own_numbers(dtype, tmp_path):
    model = helpers.hf_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    helpers.save(model, tmp_path / "fp32")
    helpers.save(model, tmp_path / "half", dtype=dtype)
    assert Checkpoint(tmp_path / "half").dtype == dtype
    assert torch.equal(engine_logits(tmp_path / "half"), engine_logits(tmp_path / "fp32"))


def rewrite(directory: Path, change) -> None:
    """Load model.safetensors, change(tensors), save."""
    path = directory / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def test_a_stored_head_that_equals_the_embedding_is_the_tied_one(single, single_logits, tmp_path):
    directory = helpers.copy_checkpoint(single, tmp_path / "stored")
    assert HEAD not in Checkpoint(directory).tensors
    rewrite(directory, lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    assert Checkpoint(directory).has_stored_head
    assert Checkpoint(directory).read_untied_head() is None
    assert torch.equal(engine_logits(directory), single_logits)


def test_an_untied_head_is_used(single, single_logits, tmp_path):
    directory = helpers.copy_checkpoint(single, tmp_path / "untied")
    helpers.edit_json(directory / "config.json", tie_word_embeddings=False)
    rewrite(directory, lambda t: t.update({HEAD: 2 * t[EMBEDDING]}))
    # Doubling is exact in fp32.
    assert torch.equal(engine_logits(directory), 2 * single_logits)


def test_a_tied_config_with_another_head_is_refused(single, tmp_path):
    directory = helpers.copy_checkpoint(single, tmp_path / "torn")
    rewrite(directory, lambda t: t.update({HEAD: 2 * t[EMBEDDING]}))
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs .*tie_word_embeddings"):
        engine_logits(directory)


def test_an_untied_config_without_a_head_is_refused(tmp_path):
    directory = write_tiny(tmp_path, tie_word_embeddings=False)
    assert f"1 missing tensors ({HEAD})" in refusal(directory)


@pytest.mark.parametrize(
    ("variant", "model_type"),
    [
        ("multi_query_7b", "RefinedWebModel"),
        ("grouped_40b", "RefinedWeb"),
        ("rw_alibi_bias_sequential", "RefinedWeb"),
    ],
)
def test_the_remote_code_spelling_is_the_same_model(variant, model_type, tmp_path):
    model = helpers.hf_model(**helpers.VARIANTS[variant])
    new = helpers.save(model, tmp_path / "new")
    old = helpers.copy_checkpoint(new, tmp_path / "old")
    config = json.loads((new / "config.json").read_text())
    # What the remote code did not know; grouping was told by n_head_kv alone.
    for key in ("num_hidden_layers", "num_attention_heads", "num_kv_heads", "ffn_hidden_size"):
        config.pop(key)
    for key in ("new_decoder_architecture", "rope_parameters", "num_ln_in_parallel_attn"):
        config.pop(key)
    config |= {
        "model_type": model_type,
        "architectures": ["RWForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_RW.RWConfig"},
        "n_layer": 2,
        "n_head": helpers.VARIANTS[variant]["num_attention_heads"],
    }
    if variant == "grouped_40b":
        config["n_head_kv"] = 2
    if variant == "rw_alibi_bias_sequential":
        config["n_embed"] = config.pop("hidden_size")
    (old / "config.json").write_text(json.dumps(config))
    assert torch.equal(engine_logits(old), engine_logits(new))


def test_buffers_of_old_files_are_ignored(single, single_logits, tmp_path):
    directory = helpers.copy_checkpoint(single, tmp_path / "buffers")
    prefix = "transformer.h.0.self_attention"
    buffers = {
        f"{prefix}.maybe_rotary.inv_freq": torch.full((12,), math.nan),
        f"{prefix}.rotary_emb.inv_freq": torch.ones(12),
        "transformer.h.1.self_attention.inv_freq": torch.ones(3),
    }
    rewrite(directory, lambda t: t.update(buffers))
    assert torch.equal(engine_logits(directory), single_logits)


def test_the_single_file_is_read_where_an_index_stands_beside_it(tmp_path):
    """As transformers does: a fine-tune saved over a sharded base leaves the old index behind."""
    directory = write_sharded(tmp_path)
    write_tiny(directory, tiny_tensors(seed=1))
    assert torch.equal(read_everything(directory)[QKV], tiny_tensors(seed=1)[QKV])


def test_checkpoints_have_the_digests_of_their_files(tmp_path):
    import hashlib

    directory = write_sharded(tmp_path)
    (directory / "tokenizer.json").write_text("{}")
    digests = Checkpoint(directory).sha256()
    assert set(digests) == {
        "config.json",
        "tokenizer.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    for name, digest in digests.items():
        assert digest == hashlib.sha256((directory / name).read_bytes()).hexdigest()


# Tensors that do not fit --------------------------------------------------------------------------


def test_a_missing_tensor_is_refused_by_name(tmp_path):
    for name in tiny_tensors():
        tensors = tiny_tensors()
        del tensors[name]
        assert f"1 missing tensors ({name})" in refusal(write_tiny(tmp_path, tensors))


def test_an_unexpected_tensor_is_refused_by_name(tmp_path):
    for name in ("transformer.h.1.input_layernorm.weight", "../../x", "transformer.h.0.mlp.bias"):
        tensors = tiny_tensors() | {name: torch.zeros(4)}
        assert f"1 unexpected tensors ({name})" in refusal(write_tiny(tmp_path, tensors))


def test_many_missing_tensors_are_counted_and_three_are_named(tmp_path):
    message = refusal(write_tiny(tmp_path, {EMBEDDING: tiny_tensors()[EMBEDDING]}))
    assert "8 missing tensors" in message and message.count("transformer.") == 3
    assert ", ...)" in message


def test_biases_of_a_model_without_are_unexpected_and_the_other_way_round(tmp_path):
    bias = {"transformer.h.0.self_attention.dense.bias": torch.zeros(4)}
    assert "unexpected" in refusal(write_tiny(tmp_path, tiny_tensors() | bias))
    assert "4 missing tensors" in refusal(write_tiny(tmp_path, bias=True))


@pytest.mark.parametrize("name", [EMBEDDING, QKV, "transformer.ln_f.bias"])
def test_a_wrong_shape_is_refused_with_both_shapes(tmp_path, name):
    tensors = tiny_tensors()
    right = list(tensors[name].shape)
    for wrong in ([right[0] + 1, *right[1:]], [*right, 1], [math.prod(right), 1, 1], [0]):
        tensors[name] = torch.zeros(wrong)
        message = refusal(write_tiny(tmp_path, tensors))
        assert f"{name} has shape {wrong}, config.json implies {right}" in message


def test_the_qkv_shape_decides_whether_multi_query_is_true(tmp_path):
    message = refusal(write_tiny(tmp_path, multi_query=False))
    assert f"{QKV} has shape [8, 4], config.json implies [12, 4]" in message


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int8, "I8"),
        (torch.float64, "F64"),
        (torch.uint8, "U8"),
        (torch.bool, "BOOL"),
        (torch.float8_e4m3fn, "F8_E4M3"),
    ],
)
def test_a_dtype_that_is_not_read_is_refused_by_name(tmp_path, dtype, name):
    tensors = tiny_tensors()
    tensors[QKV] = torch.zeros(tensors[QKV].shape).to(dtype)
    message = refusal(write_tiny(tmp_path, tensors))
    assert f"{QKV} has dtype {name}; F32, F16 and BF16 are read" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_poisoned_weight_is_refused_by_its_tensors_name(tmp_path, dtype, value):
    for name in tiny_tensors():
        size = tiny_tensors()[name].numel()
        for position in (0, size // 2, size - 1):
            tensors = {n: t.to(dtype) for n, t in tiny_tensors().items()}
            tensors[name].view(-1)[position] = value
            message = refusal(write_tiny(tmp_path, tensors))
            assert f"{name} holds NaN or infinity" in message
            assert str(tmp_path / "model.safetensors") in message


def test_a_poisoned_weight_stops_the_engine_from_loading(single, tmp_path):
    directory = helpers.copy_checkpoint(single, tmp_path / "poisoned")
    rewrite(directory, lambda t: t[QKV][7, 3].fill_(math.nan))
    with pytest.raises(CheckpointError, match=r"query_key_value\.weight holds NaN"):
        engine_logits(directory)


def test_a_file_that_shrinks_after_the_check_is_refused(tmp_path):
    checkpoint = Checkpoint(write_tiny(tmp_path))
    path = tmp_path / "model.safetensors"
    os.truncate(path, 8)
    with pytest.raises(CheckpointError, match="cannot be mapped"):
        checkpoint.read(QKV)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be"):
        checkpoint.read(QKV)


# Damaged and hostile headers ----------------------------------------------------------------------


def test_a_file_truncated_anywhere_is_refused(tmp_path):
    path = write_tiny(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    cuts = sorted({0, 1, 7, 8, 9, *range(10, len(whole), len(whole) // 45), len(whole) - 1})
    assert len(cuts) >= 50
    for cut in cuts:
        path.write_bytes(whole[:cut])
        message = refusal(tmp_path)
        assert "damaged or not safetensors" in message and str(path) in message, cut


def test_bytes_behind_the_last_tensor_are_refused(tmp_path):
    path = write_tiny(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    assert "damaged" in refusal(tmp_path)


DATA = b"\0" * 16
TWO = {"a": entry(), "b": entry(begin=8, end=16)}
HOSTILE = {
    "length_only": file_bytes(b""),
    "length_2_63": file_bytes(TWO, DATA, header_len=2**63),
    "length_max": file_bytes(TWO, DATA, header_len=2**64 - 1),
    "length_over_the_file": file_bytes(TWO, DATA, header_len=1000),
    "length_short_by_one": file_bytes(TWO, DATA, header_len=len(json.dumps(TWO)) - 1),
    "no_json": file_bytes(b"tensors!"),
    "no_utf8": file_bytes(b'{"\xff\xfe": 1}'),
    "list": file_bytes(b"[1, 2, 3]"),
    "number": file_bytes(b"7"),
    "deep_lists": file_bytes(b"[" * 1_000_000),
    "deep_objects": file_bytes(b'{"a":' * 500_000),
    "deep_in_metadata": file_bytes(b'{"__metadata__":' + b'{"a":' * 300_000),
    "metadata_not_strings": file_bytes({"__metadata__": {"a": 1}} | TWO, DATA),
    "overlap": file_bytes({"a": entry(), "b": entry(begin=4, end=12)}, DATA),
    "same_place_twice": file_bytes({"a": entry(), "b": entry()}, DATA[:8]),
    "hole": file_bytes({"a": entry(), "b": entry(begin=12, end=20)}, DATA + DATA),
    "hole_in_front": file_bytes({"a": entry(begin=8, end=16)}, DATA),
    "reversed_offsets": file_bytes({"a": entry(begin=8, end=0)}, DATA),
    "offsets_past_the_end": file_bytes({"a": entry(shape=[4], end=16)}, DATA[:8]),
    "negative_offset": file_bytes({"a": entry(begin=-8, end=0)}, DATA),
    "float_offsets": file_bytes({"a": entry(begin=0.0, end=8.0)}, DATA[:8]),
    "huge_offsets": file_bytes({"a": entry(begin=2**64 - 8, end=2**64)}, DATA),
    "three_offsets": file_bytes({"a": entry() | {"data_offsets": [0, 4, 8]}}, DATA[:8]),
    "text_offsets": file_bytes({"a": entry() | {"data_offsets": "ab"}}, DATA[:8]),
    "shape_overflows": file_bytes({"a": entry(shape=[2**40, 2**40])}, DATA[:8]),
    "shape_overflows_to_right_size": file_bytes({"a": entry(shape=[2**62, 4, 2])}, DATA[:8]),
    "negative_shape": file_bytes({"a": entry(shape=[-2])}, DATA[:8]),
    "shape_not_of_the_bytes": file_bytes({"a": entry(shape=[3])}, DATA[:8]),
    "float_shape": file_bytes({"a": entry(shape=[2.0])}, DATA[:8]),
    "unknown_dtype": file_bytes({"a": entry(dtype="F99")}, DATA[:8]),
    "dtype_number": file_bytes({"a": entry(dtype=32)}, DATA[:8]),
    "no_dtype": file_bytes({"a": {"shape": [2], "data_offsets": [0, 8]}}, DATA[:8]),
    "entry_is_a_list": file_bytes({"a": [1]}, DATA),
    "nan_shape": file_bytes(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', DATA[:8]),
    "huge_int": file_bytes(
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', DATA[:8]
    ),
    "lone_surrogate": file_bytes(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
}


def header_refusal(path: Path) -> str:
    start = time.process_time()
    with pytest.raises(CheckpointError) as raised:
        read_header(path)
    assert time.process_time() - start < MAX_SECONDS
    assert str(raised.value).startswith(f"{path}: ")
    assert len(str(raised.value)) < 1000, "one line that can be read"
    return str(raised.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_at_once(name, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[name])
    header_refusal(path)


def test_a_well_formed_file_by_the_same_hand_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes(TWO | {"empty": entry(shape=[0], begin=16, end=16)}, DATA))
    tensors = read_header(path)
    assert set(tensors) == {"a", "b", "empty"}, "an empty tensor is legal"
    assert (tensors["b"].begin, tensors["b"].end) == (path.stat().st_size - 8, path.stat().st_size)


def test_a_repeated_name_is_refused_by_name(tmp_path):
    one = json.dumps(entry())
    for header in (
        f'{{"a":{one},"a":{one}}}',
        f'{{"a":{one},"b":{json.dumps(entry(begin=8, end=16))},"a":{one}}}',
        '{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    ):
        path = tmp_path / "model.safetensors"
        path.write_bytes(file_bytes(header.encode(), DATA[:8]))
        assert "occurs twice" in header_refusal(path)


def test_more_than_20000_tensors_are_refused_with_the_count(tmp_path):
    path = tmp_path / "model.safetensors"
    for count in (20_001, 25_000):
        header = {f"t{i}": entry(shape=[0], end=0) for i in range(count)}
        path.write_bytes(file_bytes(header))
        message = header_refusal(path)
        assert f"{count} tensors" in message or "header of" in message
    path.write_bytes(file_bytes({f"t{i}": entry(shape=[0], end=0) for i in range(20_000)}))
    assert len(read_header(path)) == 20_000


@pytest.mark.parametrize("header_len", [4_000_001, 99_000_000, 2**40])
def test_a_long_header_is_refused_before_it_is_read(tmp_path, header_len):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", header_len))
        file.truncate(header_len + 8)  # sparse: the bytes are there, and cost nothing
    assert f"header of {header_len} bytes" in header_refusal(path)


def test_random_mutations_give_an_error_or_the_tensors_that_are_in_the_file(tmp_path):
    """2,000 mutations, most of them in the header; whatever loads must equal what the safetensors
    library reads, and be finite.
    """
    path = write_tiny(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = random.Random(20231)
    slowest, num_loaded = 0.0, 0
    for number in range(2000):
        mutated = mutate(whole, header_end, rng)
        path.write_bytes(mutated)
        start = time.process_time()
        try:
            got = read_everything(tmp_path)
        except CheckpointError as error:
            assert str(error).startswith(str(tmp_path)), number
        else:
            num_loaded += 1
            expected = safetensors.torch.load(mutated)
            for name, tensor in got.items():
                assert torch.equal(tensor, expected[name]) and bool(tensor.isfinite().all())
        slowest = max(slowest, time.process_time() - start)
    assert slowest < MAX_SECONDS
    assert 20 < num_loaded < 1000, "the mutations are neither all harmless nor all fatal"


def mutate(whole: bytes, header_end: int, rng: random.Random) -> bytes:
    content = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        where = rng.randrange(header_end if rng.random() < 0.7 else len(content))
        where = min(where, len(content) - 1)
        kind = rng.randrange(6)
        if kind == 0:
            content[where] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[where] = rng.randrange(256)
        elif kind == 2:
            del content[where : where + rng.randint(1, 8)]
        elif kind == 3:
            content[where:where] = rng.randbytes(rng.randint(1, 8))
        elif kind == 4:  # a digit of a size, an offset or a name
            content[where : where + 1] = rng.choice(b'0123456789[]{}",:').to_bytes(1, "little")
        else:  # repeat or move a piece
            length = rng.randint(1, 60)
            piece = content[where : where + length]
            target = rng.randrange(len(content))
            content[target : target + rng.choice((0, length))] = piece
        content = content or bytearray(1)
    return bytes(content)


# Index files --------------------------------------------------------------------------------------

opened_paths: list[str] | None = None


def _note_open(event: str, arguments: tuple) -> None:
    if event == "open" and opened_paths is not None and isinstance(arguments[0], str | os.PathLike):
        opened_paths.append(os.fspath(arguments[0]))


sys.addaudithook(_note_open)  # a hook stays for the life of the process, hence the switch


@pytest.fixture
def opened():
    """Every path that Python opens during the test."""
    global opened_paths
    opened_paths = []
    yield opened_paths
    opened_paths = None


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        "sub/inside.safetensors",
        "/etc/passwd",
        "/tmp/outside.safetensors",
        "..",
        ".",
        "",
        "model\0.safetensors",
        "model-00001-of-00002.safetensors\0",
        "model-00001-of-00002.safetensors\n",
        "C:\\model.safetensors",
        "..\\outside.safetensors",
        "pytorch_model.bin",
        "https://example.com/model.safetensors",
        7,
        ["model.safetensors"],
    ],
)
def test_a_shard_name_that_is_no_bare_file_name_is_refused_unopened(tmp_path, name, opened):
    directory = write_sharded(tmp_path / "checkpoint", {QKV: name})
    (tmp_path / "outside.safetensors").write_bytes(file_bytes({QKV: entry()}, DATA[:8]))
    opened.clear()
    message = refusal(directory)
    assert f"shard of {QKV} must be a bare *.safetensors file name" in message
    allowed = {str(directory / n) for n in ("config.json", "model.safetensors.index.json")}
    assert set(opened) <= allowed


def test_a_missing_shard_is_refused_by_name(tmp_path):
    directory = write_sharded(tmp_path)
    (directory / "model-00002-of-00002.safetensors").unlink()
    message = refusal(directory)
    assert "model-00002-of-00002.safetensors: no such file" in message


def test_a_tensor_that_is_not_where_the_index_says_is_refused(tmp_path):
    for shard in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        directory = write_sharded(tmp_path, {EMBEDDING: shard, QKV: shard})
        assert f"in {shard}, which does not hold it" in refusal(directory)
    directory = write_sharded(tmp_path, {"transformer.extra": "model-00001-of-00002.safetensors"})
    assert "puts transformer.extra in model-00001-of-00002.safetensors" in refusal(directory)


def test_a_tensor_that_index_and_files_lack_is_missing(tmp_path):
    """transformers fills it with random numbers and goes on."""
    directory = write_sharded(tmp_path, {QKV: None})
    for shard in directory.glob("model-*.safetensors"):
        tensors = safetensors.torch.load_file(shard)
        tensors.pop(QKV, None)
        safetensors.torch.save_file(tensors, shard)
    assert f"1 missing tensors ({QKV})" in refusal(directory)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    directory = write_sharded(tmp_path)
    for shard in directory.glob("model-*.safetensors"):
        tensors = safetensors.torch.load_file(shard)
        safetensors.torch.save_file(tensors | {QKV: tiny_tensors()[QKV]}, shard)
    assert f"{QKV} is also in model-00001-of-00002.safetensors" in refusal(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "weight_map must be a non-empty object"),
        ('{"weight_map": {}}', "weight_map must be a non-empty object"),
        ('{"weight_map": ["a"]}', "weight_map must be a non-empty object"),
        ("[]", "must hold a JSON object"),
        ('{"weight_map": ', "not valid JSON"),
        ('{"weight_map":' * 100_000, "not valid JSON"),
    ],
    ids=["no_map", "empty_map", "list", "no_object", "cut", "deep"],
)
def test_a_malformed_index_is_refused(tmp_path, content, message):
    directory = write_sharded(tmp_path)
    (directory / "model.safetensors.index.json").write_text(content)
    assert message in refusal(directory)


def test_an_index_of_a_gigabyte_is_refused_unread(tmp_path):
    directory = write_sharded(tmp_path)
    os.truncate(directory / "model.safetensors.index.json", 2**30)
    assert "larger than 10000000 bytes" in refusal(directory)


# Links --------------------------------------------------------------------------------------------


def replace_by_link(path: Path, target: Path | str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00002-of-00002.safetensors"])
def test_a_link_out_of_the_directory_is_refused(tmp_path, name):
    write = write_tiny if name == "model.safetensors" else write_sharded
    directory, outside = write(tmp_path / "checkpoint"), tmp_path / "outside.safetensors"
    (directory / name).rename(outside)
    for target in (outside, "../outside.safetensors"):
        replace_by_link(directory / name, target)
        message = refusal(directory)
        assert f"{name}: links to {outside}, outside the checkpoint" in message


def test_a_link_within_the_directory_and_a_link_to_it_are_followed(tmp_path):
    directory = write_tiny(tmp_path / "checkpoint")
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    (directory / "model.safetensors").symlink_to("weights.safetensors")
    (tmp_path / "link").symlink_to(directory)
    for path in (directory, tmp_path / "link"):
        assert torch.equal(read_everything(path)[QKV], tiny_tensors()[QKV])


@pytest.mark.parametrize("subfolder", ["", "merged"])
def test_the_hub_caches_links_to_blobs_are_followed(tmp_path, subfolder):
    repo = tmp_path / "models--a--b"
    snapshot = write_tiny(repo / "snapshots" / "0123abc" / subfolder)
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        blob = repo / "blobs" / f"{number:064x}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, snapshot))
    assert torch.equal(read_everything(snapshot)[QKV], tiny_tensors()[QKV])
    # A link to the neighbour repository's blobs is none of this cache's.
    other = tmp_path / "models--c--d" / "blobs" / "0"
    other.parent.mkdir(parents=True)
    (snapshot / "model.safetensors").resolve().rename(other)
    replace_by_link(snapshot / "model.safetensors", other)
    assert "outside the checkpoint" in refusal(snapshot)


def test_a_dangling_or_cyclic_link_is_refused(tmp_path):
    directory = write_tiny(tmp_path)
    for target in ("nowhere", "model.safetensors"):
        replace_by_link(directory / "model.safetensors", target)
        assert "model.safetensors" in refusal(directory)
    directory = write_sharded(tmp_path / "sharded")
    shard = directory / "model-00001-of-00002.safetensors"
    for target in ("nowhere", shard.name):
        replace_by_link(shard, target)
        assert f"{shard}: no such file" in refusal(directory)


# Other formats ------------------------------------------------------------------------------------


class Trap:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.write_text, (self.marker, "loaded"))


PICKLES = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth")


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def test_pickles_beside_a_good_file_are_never_opened(single, tmp_path, opened):
    directory = helpers.copy_checkpoint(single, tmp_path / "trapped")
    for name in PICKLES:
        (directory / name).write_bytes(pickle.dumps(Trap(tmp_path / "marker")))
    opened.clear()
    engine_logits(directory)
    assert str(directory / "config.json") in opened, "the hook sees what is opened"
    assert not [p for p in opened if p.endswith(PICKLES)]
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", [*PICKLES, "pytorch_model-00001-of-00002.bin"])
def test_a_folder_of_pickles_is_refused_with_the_command_that_converts_it(tmp_path, name, opened):
    directory = write_tiny(tmp_path / "pickles")
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(pickle.dumps(Trap(tmp_path / "marker")))
    opened.clear()
    message = refusal(directory)
    assert "only pickle files, which are never opened" in message
    assert "python -c" in message and "save_pretrained" in message
    assert not [p for p in opened if p.endswith(name)]
    assert not (tmp_path / "marker").exists()


def test_the_conversion_command_converts(model, tmp_path):
    """The command that the refusal prints, with the two directories put in."""
    directory = helpers.save(model, tmp_path / "old")
    with pytest.raises(CheckpointError) as raised:
        (directory / "model.safetensors").rename(tmp_path / "aside")
        torch.save(safetensors.torch.load_file(tmp_path / "aside"), directory / "pytorch_model.bin")
        Checkpoint(directory)
    command = str(raised.value).split("`")[1]
    command = command.replace("'DIR'", f"'{directory}'").replace("'NEW_DIR'", f"'{tmp_path}/new'")
    python, dash_c, program = shlex.split(command)
    assert (python, dash_c) == ("python", "-c")
    exec(program, {})
    got, expected = Checkpoint(tmp_path / "new"), model.state_dict()
    assert torch.equal(got.read(EMBEDDING), expected[EMBEDDING])
    assert torch.equal(got.read(QKV), expected[QKV])


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("__0_0.distcp", ".metadata"), "accelerate merge-weights"),
        (("pytorch_model_fsdp_0/__0_0.distcp",), "accelerate merge-weights"),
        (("zero_to_fp32.py", "latest"), "zero_to_fp32.py"),
        (("global_step100/mp_rank_00_model_states.pt",), "zero_to_fp32.py"),
        (("adapter_config.json", "adapter_model.safetensors"), "pass it as domain"),
        (("b/adapter_config.json", "a/adapter_config.json"), "adapters in subfolders (a, b)"),
        (("notes.txt",), "neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_a_folder_of_another_kind_is_refused_with_the_way_out(tmp_path, has_config, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    if has_config:
        (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    assert message in refusal(tmp_path)


def test_no_directory_is_refused(single, tmp_path):
    assert "no such directory" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "no such directory" in refusal(tmp_path / "file")
    with pytest.raises(CheckpointError, match="no such directory"):
        Engine.from_pretrained(single, tmp_path / "nowhere", device="cpu")


# Code in a checkpoint -----------------------------------------------------------------------------


def test_remote_code_is_never_imported(single, single_logits, tmp_path, opened):
    directory = helpers.copy_checkpoint(single, tmp_path / "remote")
    marker = tmp_path / "marker"
    for name in ("configuration_RW", "modelling_RW"):
        (directory / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    helpers.edit_json(
        directory / "config.json",
        auto_map={
            "AutoConfig": "configuration_RW.RWConfig",
            "AutoModelForCausalLM": "modelling_RW.RWForCausalLM",
        },
    )
    opened.clear()
    assert torch.equal(engine_logits(directory), single_logits)
    assert not [p for p in opened if p.endswith("_RW.py")]
    assert not marker.exists()


PACKAGE = Path(steer_engine.__file__).parent
MODULES = sorted([*PACKAGE.glob("*.py"), *(PACKAGE.parent / "kernels").rglob("*.py")])
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_no_module_can_unpickle_or_run_a_checkpoints_code(path):
    """torch.load is left to pretrain.py, for its own training state, with weights_only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {a.name.split(".")[0] for a in node.names} & UNPICKLERS
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in UNPICKLERS
            imported = {a.name for a in node.names}
            assert not (node.module == "torch" and imported & {"load", "serialization"})
        elif isinstance(node, ast.Attribute) and node.attr == "load":
            is_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
            assert not is_torch or path.name == "pretrain.py"
        elif isinstance(node, ast.Call):
            keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            assert "trust_remote_code" not in keywords and "allow_pickle" not in keywords
            if isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "torch.load":
                assert keywords.get("weights_only") is True
            if isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec", "__import__"}


def test_the_engine_imports_no_transformers_and_no_peft():
    program = (
        "import sys, steer_engine;"
        "print([m for m in ('transformers', 'peft', 'datasets', 'pandas') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


# Base and domain ----------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch):
    """Reading any weight fails the test: mismatches must be found from the headers."""

    def refuse(name, info):
        raise AssertionError(f"{name} was read before the mismatch was found")

    monkeypatch.setattr(checkpoint_module, "read_tensor", refuse)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_hidden_layers": 3}, "num_layers is 3, the base .* has 2"),
        ({"vocab_size": 330}, "vocab_size is 330, the base .* has 320"),
        ({"multi_query": False}, "num_kv_heads is 3, the base .* has 1"),
        ({"ffn_hidden_size": 100}, "ffn_hidden_size is 100, the base .* has 288"),
        ({"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon is 0.001, the base .* has 1e-05"),
        ({"parallel_attn": False}, "is_parallel is False, the base .* has True"),
    ],
)
def test_a_domain_of_another_architecture_is_refused_by_the_size(
    single, tmp_path, no_weights, overrides, message
):
    domain = helpers.save(helpers.hf_model(**overrides), tmp_path / "domain")
    with pytest.raises(CheckpointError, match=message):
        Engine.from_pretrained(single, domain, device="cpu")


def test_a_domain_with_another_tokenizer_is_refused_with_counts(single, tmp_path, no_weights):
    domain = helpers.copy_checkpoint(single, tmp_path / "domain")
    tokenizer = HfTokenizer.from_file(str(domain / "tokenizer.json"))
    tokenizer.add_special_tokens(["[PAD]", "[SEP]"])
    tokenizer.save(str(domain / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="2 vocabulary entries and 0 merges"):
        Engine.from_pretrained(single, domain, device="cpu")


def test_a_domain_without_a_tokenizer_is_refused(single, tmp_path, no_weights):
    domain = helpers.copy_checkpoint(single, tmp_path / "domain")
    (domain / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"domain/tokenizer.json: no such file"):
        Engine.from_pretrained(single, domain, device="cpu")


def test_a_tokenizer_larger_than_the_model_is_refused_with_both_sizes(single, tmp_path, no_weights):
    directory = helpers.copy_checkpoint(single, tmp_path / "base")
    tokenizer = HfTokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_tokens([f"<{i}>" for i in range(60)])
    tokenizer.save(str(directory / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"tokenizer.json has 329 entries, the model 320"):
        Engine.from_pretrained(directory, device="cpu")


def test_a_damaged_domain_is_refused_before_the_base_is_read(single, tmp_path, no_weights):
    domain = helpers.copy_checkpoint(single, tmp_path / "domain")
    path = domain / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=rf"{path}: damaged"):
        Engine.from_pretrained(single, domain, device="cpu")


# Memory -------------------------------------------------------------------------------------------

# Beside the weights themselves: the largest tensor (7 % of this checkpoint) up to three times, as
# the mapped file, as the copy that is checked, and in the backend's layout; then pages that the
# allocator and code used for the first time hold (a few MB, 10 %). A loader that holds a second
# copy of the weights needs 2.
PEAK_FACTOR = 1.35

MEMORY_PROGRAM = """
import sys, torch
from steer_engine import Engine
torch.set_num_threads(1)
def kib(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name))
small, large, backend = sys.argv[1:]
load = lambda path: Engine.from_pretrained(path, device="cpu", dtype="float32", backend=backend,
                                           max_num_seqs=1, max_model_len=64)
load(small)  # code and tables that every load needs
before = kib("VmRSS")
engine = load(large)
print((kib("VmHWM") - before) * 1024)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Six layers, 65 MB."""
    model = helpers.hf_model(hidden_size=512, num_attention_heads=8, num_hidden_layers=6)
    return helpers.save(model, tmp_path_factory.mktemp("large") / "base")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_loading_holds_the_weights_once(backend, large, single):
    reason = steer_engine.ops.unavailable_reason(backend)
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")
    weight_bytes = (large / "model.safetensors").stat().st_size
    assert weight_bytes > 60e6
    # VmHWM, not ru_maxrss: the latter keeps the peak of the process that forked, here pytest's.
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, str(single), str(large), backend],
        capture_output=True,
        text=True,
        timeout=120,
        # Tensors of a full-size model lie above glibc's largest mmap threshold (32 MB) and go back
        # to the system when freed; this makes it so for tensors of 1 MB and more.
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)},
    )
    assert result.returncode == 0, result.stderr
    factor = int(result.stdout) / weight_bytes
    assert 0.9 < factor < PEAK_FACTOR, f"grew by {factor:.2f} times the weights"
