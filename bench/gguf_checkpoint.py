"""Write a Falcon-7B-like checkpoint directory as the GGUF file that llama.cpp reads.

    PEER/bin/python bench/gguf_checkpoint.py CHECKPOINT FILE.gguf [--dtype float32]

Runs under the peer's interpreter (llama_baseline.py), so it needs numpy and gguf alone. Matrices
keep their bf16 bits, or become the equal fp32 numbers; vectors are fp32, which llama.cpp's layer
norm asks for. No vocabulary is written: the bench speaks in token ids. Tensors go through one at a
time, from the mapped file to the written one.

Only the multi-query layout is taken: there a checkpoint's query_key_value rows are [all queries |
key | value], which is llama.cpp's order too, so no row moves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HEADER_LEN_BYTES = 8
# safetensors' dtype -> the numpy type that holds its bits.
BITS = {"BF16": np.dtype("<u2"), "F32": np.dtype("<f4")}
DTYPES = ("bfloat16", "float32")

EMBEDDING, LM_HEAD = "transformer.word_embeddings.weight", "lm_head.weight"
OUTER_NAMES = {
    EMBEDDING: "token_embd.weight",
    LM_HEAD: "output.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
}
BLOCK_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "input_layernorm.bias": "attn_norm.bias",
    "self_attention.query_key_value.weight": "attn_qkv.weight",
    "self_attention.dense.weight": "attn_output.weight",
    "mlp.dense_h_to_4h.weight": "ffn_up.weight",
    "mlp.dense_4h_to_h.weight": "ffn_down.weight",
}
# What makes a Falcon the 7B's kind, and the value each has there.
REQUIRED = {
    "multi_query": True,
    "parallel_attn": True,
    "new_decoder_architecture": False,
    "alibi": False,
    "bias": False,
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a checkpoint's tensor. ValueError: it has none."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    layer, _, inner = name.removeprefix("transformer.h.").partition(".")
    if not layer.isdigit() or inner not in BLOCK_NAMES:
        raise ValueError(f"tensor {name}: llama.cpp's Falcon-7B has none such")
    return f"blk.{layer}.{BLOCK_NAMES[inner]}"


def read_config(directory: Path) -> dict:
    """config.json. ValueError: a Falcon of another architecture."""
    values = json.loads((directory / "config.json").read_text())
    for key, expected in REQUIRED.items():
        if values.get(key, expected) != expected:
            raise ValueError(f"{directory}: {key} must be {expected}, got {values[key]}")
    return values


def iterate_tensors(directory: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(llama.cpp's name, mapped values) of every tensor; bf16 as uint16 bits.

    A head that equals the embedding is left out: llama.cpp then uses the embedding.
    """
    mapped = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            header_len = int.from_bytes(file.read(HEADER_LEN_BYTES), "little")
            header = json.loads(file.read(header_len))
        data_at = HEADER_LEN_BYTES + header_len
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in BITS:
                raise ValueError(f"{path}: {name} is {entry['dtype']}, expected BF16 or F32")
            mapped[name] = np.memmap(
                path,
                dtype=BITS[entry["dtype"]],
                mode="r",
                offset=data_at + entry["data_offsets"][0],
                shape=tuple(entry["shape"]),
            )
    if LM_HEAD in mapped and np.array_equal(mapped[LM_HEAD], mapped[EMBEDDING]):
        del mapped[LM_HEAD]
    for name, values in mapped.items():
        yield gguf_name(name), values


def widen(values: np.ndarray) -> np.ndarray:
    """bf16 bits to the equal fp32 numbers; fp32 stays."""
    if values.dtype != np.uint16:
        return np.asarray(values)
    return (values.astype(np.uint32) << 16).view(np.float32)


def write_gguf(directory: Path, path: Path, dtype: str) -> None:
    """Write `path` from the checkpoint in `directory`; complete, or not there at all."""
    import gguf

    values = read_config(directory)
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, "falcon")
    writer.add_context_length(values["max_position_embeddings"])
    writer.add_embedding_length(values["hidden_size"])
    writer.add_feed_forward_length(4 * values["hidden_size"])
    writer.add_block_count(values["num_hidden_layers"])
    writer.add_head_count(values["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_layer_norm_eps(values["layer_norm_epsilon"])
    writer.add_rope_freq_base(values.get("rope_theta", 10000.0))
    # Without a vocabulary llama.cpp takes its size from here.
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(values["vocab_size"])

    tensors = dict(iterate_tensors(directory))
    for name, tensor in tensors.items():
        if is_kept(tensor, dtype):
            bf16 = gguf.GGMLQuantizationType.BF16
            writer.add_tensor_info(name, tensor.shape, tensor.dtype, tensor.nbytes, raw_dtype=bf16)
        else:
            fp32 = np.dtype(np.float32)
            writer.add_tensor_info(name, tensor.shape, fp32, tensor.size * fp32.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors.values():
        writer.write_tensor_data(np.asarray(tensor) if is_kept(tensor, dtype) else widen(tensor))
    writer.close()
    unfinished.rename(path)


def is_kept(tensor: np.ndarray, dtype: str) -> bool:
    """Whether a tensor goes into the file as the bf16 bits that it is."""
    return dtype == "bfloat16" and tensor.dtype == np.uint16 and tensor.ndim == 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    arguments = parser.parse_args()
    write_gguf(arguments.checkpoint, arguments.file, arguments.dtype)


if __name__ == "__main__":
    main()
