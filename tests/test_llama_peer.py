"""llama.cpp as a peer in the benches: its file holds the checkpoint's numbers, and where it is
installed it computes what the engine computes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import check_sides
import checkpoints
import gguf_checkpoint

PEER_VARIABLE = "STEER_LLAMA_PYTHON"
SHAPE = checkpoints.FALCON_7B | {
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "vocab_size": 8192,  # the embedded tokenizer's
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> checkpoints.Checkpoints:
    return checkpoints.ensure_checkpoints(tmp_path_factory.mktemp("peer"), SHAPE)


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(np.uint16)


def test_every_tensor_gets_llama_cpps_name_and_keeps_its_bits(paths):
    stored = {}
    for shard in paths.base.glob("*.safetensors"):
        stored |= load_file(shard)
    got = dict(gguf_checkpoint.iterate_tensors(paths.base))
    block = ["attn_norm.weight", "attn_norm.bias", "attn_qkv.weight", "attn_output.weight"]
    block += ["ffn_up.weight", "ffn_down.weight"]
    expected = {f"blk.{layer}.{name}" for layer in range(2) for name in block}
    expected |= {"token_embd.weight", "output_norm.weight", "output_norm.bias"}
    assert set(got) == expected
    del stored["lm_head.weight"]
    for name, tensor in stored.items():
        assert np.array_equal(got[gguf_checkpoint.gguf_name(name)], bits(tensor)), name


def test_a_head_of_its_own_is_kept(paths, tmp_path):
    checkpoints.write_base(tmp_path, SHAPE)
    shard = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(shard)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    checkpoints.save_file(tensors, shard)
    got = dict(gguf_checkpoint.iterate_tensors(tmp_path))
    assert np.array_equal(got["output.weight"], bits(tensors["lm_head.weight"]))


def test_every_bf16_number_widens_to_itself():
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    got = gguf_checkpoint.widen(patterns.numpy().view(np.uint16))
    expected = patterns.view(torch.bfloat16).float().numpy()
    assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("change", [{"multi_query": False}, {"alibi": True}, {"bias": True}])
def test_another_falcon_architecture_is_refused_by_the_setting_that_differs(tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | change))
    with pytest.raises(ValueError, match=next(iter(change))):
        gguf_checkpoint.read_config(tmp_path)


@pytest.mark.parametrize(
    "name", ["transformer.h.0.self_attention.dense.bias", "transformer.position.weight"]
)
def test_a_tensor_without_a_place_in_the_file_is_refused_by_name(name):
    with pytest.raises(ValueError, match=name):
        gguf_checkpoint.gguf_name(name)


@pytest.mark.skipif(
    PEER_VARIABLE not in os.environ,
    reason=f"{PEER_VARIABLE} names no interpreter with llama-cpp-python",
)
@pytest.mark.parametrize("mode", ["plain", "steer_full"])
def test_llama_cpp_draws_the_engines_greedy_tokens_in_every_variant(paths, mode, capsys):
    settings = SimpleNamespace(
        vocab_size=SHAPE["vocab_size"],
        prompt_tokens=7,
        negative_tokens=70,
        new_tokens=check_sides.NUM_GREEDY,
        threads=1,
        no_hf=True,
        llama=Path(os.environ[PEER_VARIABLE]),
    )
    check_sides.check_equal(paths, mode, settings)
    assert f"checked {mode}" in capsys.readouterr().out
