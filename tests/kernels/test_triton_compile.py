"""Compile the Triton kernels at Falcon-7B's sizes, without a GPU: for sm_80 and sm_90 no kernel may
spill or use a stack, nor more shared memory than a block has, and registers are what they were.

TRITON_INTERPRET must be unset here (see triton_interpreter.py). The triton wheel brings ptxas and
cuobjdump. A change of registers is no error by itself: look at it, then record it in REGISTERS.
"""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", exc_type=ImportError)
from steer_engine.kernels import guided_sample as sampler  # noqa: E402
from steer_engine.kernels import layer_norm as norm  # noqa: E402
from steer_engine.kernels import linear as product  # noqa: E402
from steer_engine.kernels import mqa_decode as attention  # noqa: E402
from steer_engine.kernels import rotary_and_store as rotary  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

VOCAB_SIZE, HIDDEN_SIZE = 65024, 4544
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MAX_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}

# Element types of pointers, by argument; "logits" and "out" vary. Everything else is an i32.
POINTERS = {
    "i1": "greedy",
    "i32": "top_k block_counts steps status num_kept",
    "i64": "top_p_fixed counters ranks lowest_kept block_masses seed stream_ids token_ids "
    "total_mass",
    "fp32": "weights inv_temperature log_alpha x logprobs weight bias",
}
TYPES = {f"{name}_ptr": f"*{t}" for t, names in POINTERS.items() for name in names.split()}
# Sizes that are multiples of 16, which Triton tells the compiler; hidden_size is one, too.
ALIGNED = {"vocab_size", "seq_stride", "pass_stride", "num_blocks", "hidden_size"}
ALIGNED |= {"x_row_stride", "out_row_stride", "qkv_row_stride"}
ALIGNED |= {"in_features", "out_features", "segment_len"}

CONFIG = sampler.LaunchConfig.for_batch(33, VOCAB_SIZE)
NORM_BLOCK_SIZE = triton.next_power_of_2(HIDDEN_SIZE)
NUM_BLOCKS = triton.cdiv(VOCAB_SIZE, CONFIG.draw_block_size)


class Kernel(NamedTuple):
    function: Any
    constants: dict[str, int]
    types: dict[str, str] = {}  # noqa: RUF012
    is_bitwise: bool = True  # multiply and add must round separately
    num_warps: int = CONFIG.num_warps
    options: dict[str, Any] = {}  # noqa: RUF012


def sampler_kernel(name: str, block_size: int, logits: str = "fp32", **constants) -> Kernel:
    constants["BLOCK_SIZE"] = block_size
    return Kernel(getattr(sampler, name), constants, {"logits_ptr": f"*{logits}"})


def norm_kernel(out: str) -> Kernel:
    return Kernel(
        norm.layer_norm_kernel,
        {"BLOCK_SIZE": NORM_BLOCK_SIZE},
        {"out_ptr": f"*{out}", "eps": "fp32"},
        is_bitwise=False,
        num_warps=norm.num_warps_for(NORM_BLOCK_SIZE),
    )


# Beside those above, for attention. Strides and table widths that vary are not in ALIGNED.
ATTENTION_TYPES = {
    "cos_ptr": "*fp32",
    "sin_ptr": "*fp32",
    "positions_ptr": "*i32",
    "slot_mapping_ptr": "*i64",
    "block_tables_ptr": "*i32",
    "table_ids_ptr": "*i32",
    "seq_lens_ptr": "*i32",
    "alibi_ptr": "*fp32",
    "maxima_ptr": "*fp32",
    "sums_ptr": "*fp32",
    "values_ptr": "*fp32",
    "scale": "fp32",
}
NUM_HEADS, HEAD_DIM, PAGE_SIZE = 71, 64, 64


def attention_types(dtype: str) -> dict[str, str]:
    names = ("qkv_ptr", "k_cache_ptr", "v_cache_ptr", "out_ptr")
    return ATTENTION_TYPES | dict.fromkeys(names, f"*{dtype}")


def attention_kernel(dtype: str, *missing: str, is_decode: bool = True) -> Kernel:
    """missing: pointers that are None in this launch."""
    is_bf16 = dtype == "bf16"
    config = attention.LaunchConfig.choose(torch.bfloat16 if is_bf16 else torch.float32, NUM_HEADS)
    constants = {
        "num_kv_heads": 1,
        "NUM_QUERIES": NUM_HEADS,
        "HEAD_DIM": HEAD_DIM,
        "PAGE_SIZE": PAGE_SIZE,
        "CHUNK_LEN": config.chunk_len,
        "BLOCK_QUERIES": triton.next_power_of_2(NUM_HEADS),
        "BLOCK_DIM": HEAD_DIM,
        "BLOCK_KEYS": config.block_keys,
        "DOT_DTYPE": triton.language.bfloat16 if is_bf16 else triton.language.float32,
        "IS_DECODE": is_decode,
    }
    constants |= dict.fromkeys(f"{name}_ptr" for name in missing)
    options = {"num_stages": config.num_stages}
    types = attention_types(dtype)
    return Kernel(attention.attention_kernel, constants, types, False, config.num_warps, options)


def merge_kernel() -> Kernel:
    constants = {
        "HEAD_DIM": HEAD_DIM,
        "CHUNK_LEN": attention.CHUNK_LEN,
        "BLOCK_HEADS": attention.MERGE_BLOCK_HEADS,
        "BLOCK_DIM": HEAD_DIM,
    }
    types = attention_types("bf16")
    return Kernel(attention.merge_kernel, constants, types, is_bitwise=False, num_warps=4)


def rotary_kernel() -> Kernel:
    constants = {
        "num_kv_heads": 1,
        "HEAD_DIM": HEAD_DIM,
        "BLOCK_DIM": HEAD_DIM,
        "BLOCK_HEADS": triton.next_power_of_2(NUM_HEADS),
        "BLOCK_KV_HEADS": 1,
    }
    types = attention_types("bf16")
    return Kernel(rotary.rotary_and_store_kernel, constants, types, is_bitwise=False, num_warps=4)


def linear_kernels(
    name: str, in_features: int, out_features: int, num_rows: int, out: str, dtype: str = "bf16",
    gelu: bool = False, accumulate: bool = False, boundary: int | None = None, bias: bool = False,
) -> dict[str, Kernel]:  # fmt: skip
    """What one product launches for one weight and number of rows, or for two with a boundary;
    without bias as in Falcon-7B.
    """
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    config = product.config_for(in_features, out_features, torch_dtype)
    is_partial = config.is_partial(num_rows, out_features, boundary or 0)
    num_tiles = config.num_tiles(num_rows, out_features, boundary or 0)
    longest = max(boundary or 0, num_rows - (boundary or 0))
    types = {f"{name}_ptr": f"*{dtype}" for name in ("x", "weight", "rest_weight")}
    types |= {f"{name}_ptr": "*fp32" for name in ("partials", "bias", "rest_bias")}
    types["out_ptr"] = f"*{out}"
    no_bias = {"bias_ptr": None, "rest_bias_ptr": None}
    none = no_bias | {"ACCUMULATE": False, "HAS_GELU": False}
    epilogue = {"ACCUMULATE": accumulate, "HAS_GELU": gelu} | ({} if bias else no_bias)
    constants = {
        "SEGMENTS_PER_PROGRAM": config.segments_per_program(num_tiles),
        "IS_PARTIAL": is_partial,
        "WEIGHT_EVICTION": "evict_first" if longest <= config.block_m else "",
        "UPCAST": False,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    if boundary is None:
        constants["rest_weight_ptr"] = None
    options = {"num_stages": config.num_stages, "enable_fp_fusion": False}

    def kernel(function, constants, types):
        return Kernel(function, constants, types, False, config.num_warps, options)

    if not is_partial:
        return {name: kernel(product.linear_kernel, constants | epilogue, types)}
    adding = epilogue | {
        "NUM_SEGMENTS": config.num_segments,
        "BLOCK_SIZE": config.epilogue_block_size,
    }
    return {
        name: kernel(product.linear_kernel, constants | none, types | {"out_ptr": "*fp32"}),
        f"{name} epilogue": kernel(product.epilogue_kernel, adding, types),
    }


BLOCK, ROUNDS = CONFIG.block_size, CONFIG.num_rounds
KERNELS = {
    "domain_max fp32": sampler_kernel("domain_max_kernel", BLOCK),
    "domain_max bf16": sampler_kernel("domain_max_kernel", BLOCK, "bf16"),
    "combine fp32": sampler_kernel("combine_kernel", BLOCK, NUM_PASSES=3),
    "combine bf16": sampler_kernel("combine_kernel", BLOCK, "bf16", NUM_PASSES=3),
    "ladder 0": sampler_kernel("ladder_kernel", CONFIG.ladder_block_size, ROUND=0),
    "ladder 1": sampler_kernel("ladder_kernel", CONFIG.ladder_block_size, ROUND=1),
    "collect": sampler_kernel("collect_kernel", BLOCK, NUM_ROUNDS=ROUNDS),
    "select": sampler_kernel("select_kernel", CONFIG.list_block_size, NUM_ROUNDS=ROUNDS),
    "block_mass": sampler_kernel("block_mass_kernel", CONFIG.draw_block_size),
    "draw": sampler_kernel("draw_kernel", CONFIG.draw_block_size, NUM_BLOCKS_PADDED=NUM_BLOCKS),
    "layer_norm fp32": norm_kernel("fp32"),
    "layer_norm bf16": norm_kernel("bf16"),
    "mqa_decode": attention_kernel("bf16", "alibi"),
    "mqa_decode one chunk": attention_kernel("bf16", "alibi", "maxima", "sums", "values"),
    "mqa_decode fp32": attention_kernel("fp32", "alibi"),
    "paged_attention": attention_kernel("bf16", "alibi", "cos", "sin", is_decode=False),
    "merge": merge_kernel(),
    "rotary_and_store": rotary_kernel(),
}
LINEAR_KERNELS = {
    **linear_kernels("linear qkv", 4544, 4672, 33, "bf16"),
    **linear_kernels("linear dense", 4544, 4544, 33, "fp32", accumulate=True),
    **linear_kernels("linear up", 4544, 18176, 33, "bf16", gelu=True),
    **linear_kernels("linear down", 18176, 4544, 33, "fp32", accumulate=True),
    **linear_kernels("linear up+qkv", 4544, 22848, 33, "bf16", gelu=True),
    **linear_kernels("linear down+dense", 22720, 4544, 33, "fp32", accumulate=True),
    **linear_kernels("linear down+dense, 100 rows", 22720, 4544, 100, "fp32", accumulate=True),
    **linear_kernels("linear head", 4544, 65024, 33, "fp32"),
    **linear_kernels("linear qkv, many rows", 4544, 4672, 1000, "bf16"),
    **linear_kernels("linear up+qkv, many rows", 4544, 22848, 1000, "bf16", gelu=True),
    **linear_kernels("linear down+dense, many rows", 22720, 4544, 1000, "fp32", accumulate=True),
    **linear_kernels("linear up fp32", 4544, 18176, 33, "fp32", dtype="fp32", gelu=True),
}
# Two weights: 17 rows and 16, or 650 and 350.
GROUPED = {
    "qkv": ((4544, 4672, 33, "bf16"), {"bias": True}),
    "up+qkv": ((4544, 22848, 33, "bf16"), {"gelu": True}),
    "down+dense": ((22720, 4544, 33, "fp32"), {"accumulate": True}),
    "head": ((4544, 65024, 33, "fp32"), {}),
    "up+qkv, many rows": ((4544, 22848, 1000, "bf16"), {"gelu": True, "bias": True}),
    "down+dense, many rows": ((22720, 4544, 1000, "fp32"), {"accumulate": True}),
}
GROUPED_KERNELS, TWINS = {}, {}  # twins: of one weight, otherwise the same
for name, (sizes, epilogue) in GROUPED.items():
    boundary = 17 if sizes[2] == 33 else 650
    GROUPED_KERNELS |= linear_kernels(f"grouped {name}", *sizes, **epilogue, boundary=boundary)
    TWINS |= linear_kernels(f"twin {name}", *sizes, **epilogue)
KERNELS |= LINEAR_KERNELS | GROUPED_KERNELS

# kernel: (registers per thread on sm_80, on sm_90); triton 3.6.0
REGISTERS = {
    "domain_max fp32": (31, 30),
    "domain_max bf16": (29, 29),
    "combine fp32": (48, 48),
    "combine bf16": (40, 40),
    "ladder 0": (98, 98),
    "ladder 1": (98, 98),
    "collect": (64, 61),
    "select": (128, 128),
    "block_mass": (32, 32),
    "draw": (46, 46),
    "layer_norm fp32": (40, 40),
    "layer_norm bf16": (44, 40),
    "mqa_decode": (128, 114),
    "mqa_decode one chunk": (126, 108),
    "mqa_decode fp32": (114, 104),
    "paged_attention": (128, 82),
    "merge": (40, 40),
    "rotary_and_store": (128, 88),
    "linear qkv": (180, 123),
    "linear qkv epilogue": (36, 38),
    "linear dense": (180, 123),
    "linear dense epilogue": (32, 32),
    "linear up": (168, 161),
    "linear down": (180, 123),
    "linear down epilogue": (32, 32),
    "linear up+qkv": (168, 161),
    "linear down+dense": (180, 123),
    "linear down+dense epilogue": (32, 32),
    "linear down+dense, 100 rows": (214, 198),
    "linear down+dense, 100 rows epilogue": (32, 32),
    "linear head": (182, 125),
    "linear qkv, many rows": (255, 204),
    "linear up+qkv, many rows": (168, 161),
    "linear down+dense, many rows": (255, 204),
    "linear up fp32": (128, 128),
    "grouped qkv": (255, 204),
    "grouped qkv epilogue": (34, 34),
    "grouped up+qkv": (180, 163),
    "grouped down+dense": (255, 204),
    "grouped down+dense epilogue": (32, 32),
    "grouped head": (180, 128),
    "grouped up+qkv, many rows": (182, 155),
    "grouped down+dense, many rows": (255, 208),
}


@functools.cache
def compiled_for(capability: int, name: str) -> Any:
    kernel = (KERNELS | TWINS)[name]
    arguments = kernel.function.arg_names
    signature = {a: (TYPES | kernel.types).get(a, "i32") for a in arguments}
    signature |= dict.fromkeys(kernel.constants, "constexpr")
    is_aligned = [
        (a.endswith("_ptr") or a in ALIGNED) and a not in kernel.constants for a in arguments
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(is_aligned) if a}
    return triton.compile(
        ASTSource(kernel.function, signature, kernel.constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": kernel.num_warps, "enable_fp_fusion": not kernel.is_bitwise}
        | kernel.options,
    )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles_without_spills_and_within_shared_memory(name, capability, tmp_path):
    kernel, compiled = KERNELS[name], compiled_for(capability, name)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    shared = compiled.metadata.shared
    found = f"{name} on sm_{capability}: {registers} registers, {shared} bytes shared"
    assert stack == 0, f"{found}, {stack} bytes of stack: it spills"
    assert shared <= MAX_SHARED_BYTES[capability], found
    if name in LINEAR_KERNELS | GROUPED_KERNELS and "epilogue" not in name and "fp32" not in name:
        # A row tile of 64 is one warpgroup's MMA; Triton takes the older one where it cannot.
        assert ("wgmma.mma_async" in compiled.asm["ptx"]) == (capability == 90), found
        assert 2 * shared < MAX_SHARED_BYTES[capability], f"{found}: no two programs fit"
    if kernel.is_bitwise:
        assert "fma.rn.f32" not in compiled.asm["ptx"], f"{name} fuses a multiply and an add"
        assert not re.search(r"\.ftz\.f32", compiled.asm["ptx"]), f"{name} flushes denormals"
    assert registers == REGISTERS[name][capability == 90], f"{found}, expected {REGISTERS[name]}"


# Without the address arithmetic: products, sums and roundings of a tile's numbers, and what loads
# the tiles, 16 bytes at a time.
ARITHMETIC = re.compile(
    r"\s(?:wgmma|mma|fma|add|sub|mul|cvt)\.\S*(?:f32|bf16)\S*|\scp\.async\.c[ag]\S*"
)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", sorted(GROUPED_KERNELS))
def test_a_second_weight_changes_no_arithmetic(name, capability):
    """So a row of two weight sets has the bits of linear on a GPU, too."""
    twin = name.replace("grouped", "twin")
    got, expected = (
        ARITHMETIC.findall(compiled_for(capability, n).asm["ptx"]) for n in (name, twin)
    )
    assert len(got) > 10 and got == expected


def test_no_number_of_rows_and_no_boundary_compiles_a_kernel_of_its_own():
    for kernel in (product.linear_kernel, product.epilogue_kernel):
        free = {p.name for p in kernel.params if p.do_not_specialize}
        assert free == {"num_rows", "boundary", "gelu_columns"}
