"""config.json in every spelling to FalconConfig, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import helpers
import pytest

from steer_engine.config import MAX_CONFIG_BYTES, FalconConfig, read_json_object
from steer_engine.errors import CheckpointError

FALCON_7B = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "falcon-7b-config.json"

MINIMAL = {
    "model_type": "falcon",
    "vocab_size": 320,
    "hidden_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}

# As tiiuae published them for remote code in 2023.
OLD_7B = {
    "architectures": ["RWForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_RW.RWConfig"},
    "model_type": "RefinedWebModel",
    "alibi": False,
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_size": 4544,
    "layer_norm_epsilon": 1e-05,
    "multi_query": True,
    "n_head": 71,
    "n_layer": 32,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 65024,
}
OLD_40B = {
    "architectures": ["RWForCausalLM"],
    "model_type": "RefinedWeb",
    "alibi": False,
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_size": 8192,
    "n_head": 128,
    "n_head_kv": 8,
    "n_layer": 60,
    "parallel_attn": True,
    "vocab_size": 65024,
}
OLD_RW_1B = {
    "architectures": ["RWForCausalLM"],
    "model_type": "RefinedWeb",
    "alibi": True,
    "bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "multi_query": False,
    "n_embed": 2048,
    "n_head": 32,
    "n_layer": 24,
    "parallel_attn": False,
    "vocab_size": 50304,
}


def config(**changes) -> FalconConfig:
    """MINIMAL with changes; a value of None leaves the key out."""
    values = MINIMAL | changes
    return FalconConfig.from_dict({k: v for k, v in values.items() if v is not None})


def refusal(values: dict) -> str:
    with pytest.raises(CheckpointError) as raised:
        FalconConfig.from_dict(values, "DIR/config.json")
    message = str(raised.value)
    assert message.startswith("DIR/config.json: ")
    return message


# Spellings ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not FALCON_7B.exists(), reason=f"no file {FALCON_7B}")
def test_falcon_7b_has_its_published_sizes():
    falcon = FalconConfig.from_dict(json.loads(FALCON_7B.read_text()))
    assert falcon == FalconConfig(
        vocab_size=65024,
        hidden_size=4544,
        num_layers=32,
        num_heads=71,
        num_kv_heads=1,
        ffn_hidden_size=4 * 4544,
        is_parallel=True,
        num_layer_norms=1,
        uses_new_decoder=False,
        uses_alibi=False,
        has_bias=False,
        layer_norm_epsilon=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=2048,
        ties_word_embeddings=True,
        bos_token_id=11,
        eos_token_ids=(11,),
    )
    assert (falcon.head_dim, falcon.qkv_size) == (64, 73 * 64)


@pytest.mark.skipif(not FALCON_7B.exists(), reason=f"no file {FALCON_7B}")
def test_the_old_spelling_of_falcon_7b_is_the_same_model():
    new = FalconConfig.from_dict(json.loads(FALCON_7B.read_text()))
    assert FalconConfig.from_dict(OLD_7B) == new


def test_the_old_spelling_of_falcon_40b_is_grouped_with_two_norms():
    falcon = FalconConfig.from_dict(OLD_40B)
    assert falcon.uses_new_decoder and falcon.is_parallel
    assert (falcon.num_heads, falcon.num_kv_heads, falcon.num_layer_norms) == (128, 8, 2)
    assert (falcon.num_layers, falcon.head_dim) == (60, 64)


def test_the_old_spelling_of_rw_1b_shares_the_40bs_model_type_but_not_its_decoder():
    falcon = FalconConfig.from_dict(OLD_RW_1B)
    assert not falcon.uses_new_decoder and not falcon.is_parallel
    assert (falcon.num_heads, falcon.num_kv_heads, falcon.num_layer_norms) == (32, 32, 2)
    assert (falcon.hidden_size, falcon.num_layers) == (2048, 24)
    assert falcon.uses_alibi and falcon.has_bias


@pytest.mark.parametrize("variant", helpers.VARIANTS)
def test_what_transformers_writes_reads_as_what_it_means(variant, tmp_path):
    from transformers import FalconConfig as HfConfig

    settings = helpers.VARIANTS[variant]
    hf = HfConfig(vocab_size=320, hidden_size=24 * settings["num_attention_heads"], **settings)
    hf.save_pretrained(tmp_path)
    ours = FalconConfig.from_directory(tmp_path)
    assert ours.num_heads == hf.num_attention_heads
    assert ours.num_layers == hf.num_hidden_layers
    assert ours.ffn_hidden_size == hf.ffn_hidden_size
    assert ours.uses_new_decoder == hf.new_decoder_architecture
    assert ours.uses_alibi == hf.alibi and ours.has_bias == hf.bias
    grouped, multi_query = settings.get("num_kv_heads"), settings.get("multi_query")
    assert ours.num_kv_heads == (grouped or (1 if multi_query else ours.num_heads))


def test_multi_query_is_one_kv_head_whatever_num_kv_heads_says():
    # transformers 5 writes the head count there.
    assert config(multi_query=True, num_kv_heads=3).num_kv_heads == 1
    assert config(multi_query=False, num_kv_heads=1).num_kv_heads == 3


def test_rope_theta_is_read_in_both_spellings():
    assert config(rope_theta=5e5).rope_theta == 5e5
    assert config(rope_parameters={"rope_theta": 1e6, "rope_type": "default"}).rope_theta == 1e6
    assert config().rope_theta == 10000.0


def test_the_second_spelling_serves_only_where_the_first_is_missing():
    assert config(n_layer=7).num_layers == 2
    assert config(num_hidden_layers=None, n_layer=7).num_layers == 7


@pytest.mark.parametrize(
    ("value", "ids"), [(11, (11,)), ([11, 12], (11, 12)), ([], ()), (None, ())]
)
def test_end_of_text_ids_may_be_an_int_a_list_or_missing(value, ids):
    assert config(eos_token_id=value).eos_token_ids == ids


def test_generation_config_decides_on_the_end_of_text(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MINIMAL | {"eos_token_id": 5}))
    assert FalconConfig.from_directory(tmp_path).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [6, 7]}')
    assert FalconConfig.from_directory(tmp_path).eos_token_ids == (6, 7)
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 1}')
    assert FalconConfig.from_directory(tmp_path).eos_token_ids == (5,)


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().num_layers = 3


# Refusals -----------------------------------------------------------------------------------------

REFUSED = [
    ({"model_type": "llama"}, "model_type must be one of falcon"),
    ({"model_type": None}, "got None"),
    ({"activation": "relu"}, "activation (relu) is not supported"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type (linear)"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type (yarn)"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    (
        {"apply_residual_connection_post_layernorm": True},
        "apply_residual_connection_post_layernorm",
    ),
    (
        {"new_decoder_architecture": True, "parallel_attn": False},
        "new_decoder_architecture with parallel_attn=false",
    ),
    ({"hidden_size": 70}, "hidden_size 70 is not a multiple of the 3 heads"),
    ({"hidden_size": 15}, "head_dim 5 is odd"),
    (
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        "3 heads are not a multiple of 2 key-value heads",
    ),
    (
        {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3},
        "num_ln_in_parallel_attn must be 1 or 2, got 3",
    ),
    ({"vocab_size": None}, "vocab_size must be a positive int, got None"),
    ({"vocab_size": 0}, "vocab_size must be a positive int, got 0"),
    ({"hidden_size": -72}, "hidden_size must be a positive int"),
    ({"hidden_size": 72.0}, "hidden_size must be a positive int"),
    ({"hidden_size": "72"}, "hidden_size must be a positive int"),
    ({"num_attention_heads": True}, "num_attention_heads must be a positive int"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"eos_token_id": "11"}, "eos_token_id must be"),
    ({"eos_token_id": [1, 2.5]}, "eos_token_id must be"),
    ({"eos_token_id": 320}, "eos_token_id must be"),
    ({"eos_token_id": -1}, "eos_token_id must be"),
    ({"bos_token_id": "a"}, "bos_token_id must be"),
    ({"bos_token_id": 320}, "bos_token_id must be"),
    ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon must be"),
    ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon must be"),
    ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon must be"),
    ({"rope_theta": "big"}, "rope_theta must be"),
    ({"rope_theta": float("inf")}, "rope_theta must be"),
    ({"rope_parameters": [1]}, "rope_parameters must be an object"),
    ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_a_config_that_the_engine_does_not_run_is_refused_by_name(changes, message):
    values = {k: v for k, v in (MINIMAL | changes).items() if v is not None}
    assert message in refusal(values)


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "num_hidden_layers"])
def test_a_missing_size_is_refused_by_name(name):
    assert f"{name} must be a positive int, got None" in refusal(
        {k: v for k, v in MINIMAL.items() if k != name}
    )


def json_refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        read_json_object(path)
    assert str(raised.value).startswith(f"{path}: ")
    return str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b"[1, 2]", "must hold a JSON object, got a list"),
        (b"null", "must hold a JSON object, got a NoneType"),
    ],
    ids=["empty", "cut", "no_utf8", "deep_list", "deep_object", "huge_int", "list", "null"],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert message in json_refusal(path)


def test_a_missing_file_is_refused_with_what_to_give(tmp_path):
    assert "directory of a Hugging Face checkpoint" in json_refusal(tmp_path / "config.json")


def test_a_directory_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "config.json").mkdir()
    assert "cannot be read" in json_refusal(tmp_path / "config.json")


def test_an_oversized_file_is_refused_without_being_read(tmp_path):
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(2**40)  # sparse: takes no space, and reading it would take all memory
    assert f"larger than {MAX_CONFIG_BYTES} bytes" in json_refusal(path)
