"""Everything that needs a GPU, in one command of ten minutes at most: are the kernels right there,
and how far from their floors?

    python bench/gpu_check.py [--name h100] [--minutes 10] [--skip build sanitizer ...]

Builds csrc where nvcc is found, then runs the parts below and writes bench/results/gpu_NAME.json
after every entry. A part that breaks, or a backend that is not there, is reported and the rest goes
on. Needs no network and no installation: torch, triton, and this checkout (hf: transformers).
Exit status: 0 all passed, 1 something failed, 2 no GPU.

The seconds are estimates for an H100, 560 in all; every entry of the result says what it took, and
what would begin too late is skipped.

    build      60 s  csrc, if it is older than its sources
    bits       60 s  guided_sample: Triton and CUDA against the reference, every batch and split
    graph      40 s  the same in any slot and alone; CUDA graphs draw anew, serve another seed
    ops        60 s  layer_norm, linear, attention against fp64; a row's bits in any batch, and in
                     one launch for two weight sets those of two launches
    sampler    30 s  times of guided_sample against PyTorch's chain (FlashInfer where importable)
    step       40 s  one decode step of Falcon-7B's shape with an adapter: time, floor, host syncs
    two_sets   30 s  the same with a full fine-tune: two weight sets, some 31 GB
    times      60 s  layer_norm, linear against cuBLAS, two weight sets in one launch against two,
                     attention against SDPA
    hf         50 s  a step by Hugging Face's transformers, generate and three passes, and how much
                     faster the steps above were
    draws      10 s  a million draws of 50 and of 65,024 tokens: chi-square
    sanitizer 120 s  compute-sanitizer's memcheck and racecheck on a short run, where it is on PATH
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests/kernels")]
PARTS = (
    "build", "bits", "graph", "ops", "sampler", "step", "two_sets", "times", "hf", "draws",
    "sanitizer",
)  # fmt: skip
GPU_BACKENDS = ("triton", "cuda")
BATCH_SIZES = [*range(1, 10), 31, 32, 33, 34, 131, 132, 133, 256]
SMALL_VOCAB_SIZES = (1, 2, 17, 1000, 1025)
FULL_VOCAB_SIZE = 65024
ROW_BATCHES = (1, 2, 3, 8, 16, 17, 48, 64, 65, 132, 192, 256)
# Rows below the boundary and the rest: in one tile and several, segments together and apart.
GROUPED_SPLITS = ((1, 1), (2, 1), (16, 8), (64, 64), (65, 1), (128, 63), (130, 126))
SHORT_RUN = "--short-run"


class CheckoutFinder:
    """Finds steer_engine in this checkout where it is not installed; kernels/ lies beside it."""

    FOLDERS = {"steer_engine": ROOT / "steer_engine", "steer_engine.kernels": ROOT / "kernels"}  # noqa: RUF012

    @classmethod
    def find_spec(cls, name: str, path=None, target=None):
        folder = cls.FOLDERS.get(name)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def make_importable() -> None:
    if importlib.util.find_spec("steer_engine") is None:
        sys.meta_path.append(CheckoutFinder)


def build() -> str:
    """Compile csrc in place, unless its library is newer than its sources."""
    library = ROOT / "steer_engine/_csrc.so"
    sources = [ROOT / "CMakeLists.txt", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    if library.exists() and library.stat().st_mtime > max(p.stat().st_mtime for p in sources):
        return "up to date"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    output = done.stdout + done.stderr
    assert done.returncode == 0 and library.exists(), output[-3000:]
    return "built"


def check_bits(report, device: torch.device, vocab_sizes, batch_sizes, backends) -> None:
    """KERNELS.md 9.5: every kind of row, fp32 and bf16, three passes and fewer."""
    from gpu_sampler import check_bitwise, expect, mixed_case

    for vocab_size in vocab_sizes:
        variants = [(torch.float32, 3), (torch.bfloat16, 3)]
        if vocab_size != FULL_VOCAB_SIZE:
            variants += [(torch.float32, 1), (torch.float32, 2)]
        for dtype, num_passes in variants:
            case = mixed_case(max(batch_sizes), vocab_size, dtype, num_passes)
            expected = expect(case)
            for backend in backends:
                name = f"bits of {backend}, {vocab_size} tokens, {num_passes} passes, {dtype}"
                report.check(name, check_bitwise, backend, device, case, expected, batch_sizes)


def check_graphs(report, device: torch.device, vocab_sizes, backends, num_seqs: int = 64) -> None:
    """KERNELS.md 9.6, 9.7 and 9.9."""
    from gpu_sampler import check_equations, check_graph, check_slots, expect, mixed_case

    for vocab_size in vocab_sizes:
        case = mixed_case(num_seqs, vocab_size)
        expected = expect(case)
        for backend in backends:
            where = f"{backend}, {vocab_size} tokens"
            report.check(f"any slot, {where}", check_slots, backend, device, case, expected)
            report.check(f"graph replays, {where}", check_graph, backend, device, vocab_size)
            report.check(f"equations, {where}", check_equations, backend, device, vocab_size)


def check_ops(report, device: torch.device, backend: str) -> None:
    """KERNELS.md 9.11, at the model's sizes."""
    import gpu_ops

    call = (backend, device)
    for hidden_size in (4544, 100, 8192):
        name = f"layer_norm {hidden_size}, {backend}"
        report.check(name, gpu_ops.check_layer_norm, *call, hidden_size, ROW_BATCHES)
    linears = {
        "up_qkv": ((4544, 22848), {"gelu_columns": 18176}),
        "down_dense": ((22720, 4544), {"accumulate": True, "out_dtype": torch.float32}),
        "head": ((4544, 65024), {"out_dtype": torch.float32}),
        "A of an adapter": ((4544, 32), {}),
        "odd": ((1030, 70), {"gelu_columns": 33}),
        "fp32": ((1030, 70), {"dtype": torch.float32, "out_dtype": torch.float32}),
    }
    for name, (sizes, epilogue) in linears.items():
        report.check(
            f"linear {name}, {backend}",
            gpu_ops.check_linear,
            *call,
            *sizes,
            ROW_BATCHES,
            **epilogue,
        )
        report.check(
            f"grouped_linear {name}, {backend}",
            gpu_ops.check_grouped_linear,
            *call,
            *sizes,
            GROUPED_SPLITS,
            **epilogue,
        )
    for size in ("falcon_7b", "grouped", "every_head_its_own"):
        for dtype in (torch.bfloat16, torch.float32):
            for function in (gpu_ops.check_mqa_decode, gpu_ops.check_paged_attention):
                op = function.__name__.removeprefix("check_")
                batches = (1, 2, 3, 16, 33, 64) if size == "falcon_7b" else (1, 5)
                report.check(
                    f"{op} {size} {dtype}, {backend}", function, *call, size, dtype,
                    batch_sizes=batches,
                )  # fmt: skip


def check_draws(report, device: torch.device, backends, num_seqs: int, num_steps: int) -> None:
    """KERNELS.md 9.8."""
    from gpu_sampler import check_frequencies, small_row

    g = torch.Generator().manual_seed(6)
    for logits in (small_row(), torch.randn(FULL_VOCAB_SIZE, generator=g)):
        for backend in backends:
            report.check(
                f"draws of {len(logits)} tokens, {backend}",
                check_frequencies, backend, device, logits, num_seqs, num_steps,
            )  # fmt: skip


def check_engine(backend: str, device: torch.device) -> str:
    """The engine writes the same texts with captured steps as with single launches."""
    from gpu_sampler import require

    from steer_engine import embedded

    require(backend)
    texts = {}
    for cuda_graphs in (False, True):
        engine = embedded.load_pair(
            device=str(device), backend=backend, max_num_seqs=12, cuda_graphs=cuda_graphs
        )
        dataset = engine.generate_dataset(**embedded.demo_request(), num_examples=40)
        texts[cuda_graphs] = dataset.texts
    assert texts[True] == texts[False], "captured steps draw other tokens"
    return f"{len(texts[True])} examples"


def check_sanitizer(tool: str, timeout_s: float) -> str:
    """The short run in a process of its own below compute-sanitizer."""
    from gpu_report import NotThereError

    found = shutil.which("compute-sanitizer")
    if found is None:
        raise NotThereError("compute-sanitizer is not on PATH")
    command = [found, "--tool", tool, "--error-exitcode", "9", "--print-limit", "5"]
    # PyTorch's allocator hands out pieces of large blocks, in which an overrun is no error.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, sys.executable, __file__, SHORT_RUN],
        capture_output=True, text=True, timeout=timeout_s, env=environment,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"exit {done.returncode}: {output[-3000:]}"
    summary = re.findall(r"=+ (\w+ SUMMARY: .*)", output)
    return "; ".join(summary) or "no summary"


def short_run(device: torch.device) -> int:
    """What runs below the sanitizers, seconds without them: each kernel, few rows, no graphs."""
    import gpu_ops
    from gpu_report import NotThereError
    from gpu_sampler import check_bitwise, expect, mixed_case

    for vocab_size in (1025, FULL_VOCAB_SIZE):
        case = mixed_case(6, vocab_size)
        expected = expect(case)
        for backend in GPU_BACKENDS:
            try:
                check_bitwise(backend, device, case, expected, [3])
            except NotThereError as error:
                print(f"{backend} is not there: {error}")
    gpu_ops.check_layer_norm("triton", device, 4544, (3,))
    gpu_ops.check_linear("triton", device, 1030, 70, (3, 17), gelu_columns=33)
    gpu_ops.check_grouped_linear("triton", device, 1030, 70, ((3, 2), (65, 1)), gelu_columns=33)
    gpu_ops.check_mqa_decode("triton", device, "falcon_7b", seq_lens=(1, 65))
    gpu_ops.check_paged_attention("triton", device, "falcon_7b", seq_lens=(1, 65))
    return 0


def measure(report, device: torch.device, parts) -> None:
    import gpu_hf
    import gpu_step
    import gpu_times
    from checkpoints import FALCON_7B

    from steer_engine.config import FalconConfig

    ceilings = gpu_times.measure_ceilings(device)
    report.content["ceilings"] = {
        "tb_per_s": round(ceilings.bytes_per_s / 1e12, 3),
        "bf16_tflop_per_s": round(ceilings.flops_per_s / 1e12, 1),
    }
    print(f"ceilings: {report.content['ceilings']}", flush=True)

    def run(part: str, function, *arguments) -> None:
        if part in parts:
            report.check(f"part {part}", function, report, *arguments)
            torch.cuda.empty_cache()

    config = FalconConfig.from_dict(FALCON_7B)
    run("sampler", gpu_times.time_sampler, device, ceilings)
    run("step", gpu_step.time_steps, device, gpu_step.LORA, ceilings, config)
    run("two_sets", gpu_step.time_steps, device, gpu_step.TWO_SETS, ceilings, config)
    for function in (
        gpu_times.time_layer_norm,
        gpu_times.time_attention,
        gpu_times.time_linear,
        gpu_times.time_grouped_linear,
    ):
        run("times", function, device, ceilings)
    # Last: a capture that fails inside a library may leave the random numbers unusable.
    run("hf", gpu_hf.time_hf, device, ceilings, FALCON_7B)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", help="of the result's file; else made from the device's name")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--skip", nargs="*", default=[], choices=PARTS)
    parser.add_argument(SHORT_RUN, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA GPU here: nothing to check; `make test` proves what can be proven without")
        return 2
    make_importable()
    device = torch.device("cuda", torch.cuda.current_device())
    if arguments.short_run:
        return short_run(device)
    from gpu_report import Report

    parts = [part for part in PARTS if part not in arguments.skip]
    device_name = re.sub(r"\W+", "_", torch.cuda.get_device_name(device)).lower()
    path = ROOT / f"bench/results/gpu_{arguments.name or device_name}.json"
    report = Report(path, device, deadline_s=60 * arguments.minutes - 20)
    if "build" in parts:
        report.check("build", build)
    vocab_sizes = (*SMALL_VOCAB_SIZES, FULL_VOCAB_SIZE)
    if "bits" in parts:
        check_bits(report, device, vocab_sizes, BATCH_SIZES, GPU_BACKENDS)
    if "graph" in parts:
        check_graphs(report, device, (1000, FULL_VOCAB_SIZE), GPU_BACKENDS)
        for backend in GPU_BACKENDS:
            report.check(f"engine with captured steps, {backend}", check_engine, backend, device)
    if "ops" in parts:
        check_ops(report, device, "triton")
    measure(report, device, parts)
    if "draws" in parts:
        check_draws(report, device, GPU_BACKENDS, num_seqs=1000, num_steps=1000)
    if "sanitizer" in parts:
        for tool in ("memcheck", "racecheck"):
            left_s = max(20.0, 60 * arguments.minutes - report.elapsed_s() - 10)
            report.check(f"compute-sanitizer {tool}", check_sanitizer, tool, min(150.0, left_s))
    print(f"{report.num_failed} failed, {len(report.content['checks'])} entries, {path}")
    return 1 if report.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
