"""What does a product cost with weights as they are, compressed and in int8, by rows?

    python bench/bench_weight_forms.py [--threads 1] [--shapes 4544x22848] [--rows 1 3 12 48]
        [--dtype bfloat16] [--isa NAME] [--seconds 3]

They take turns, and times are medians: with one thread of its CPU clock, which other work on the
machine disturbs little, else of wall time. Weights lie in memory and not in a cache, as in a model:
each call reads the next of as many copies as fill 512 MB. They are normal random numbers; trained
ones take about as many bits when compressed (bench/NOTES.md).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time

import torch
from conditions import describe_machine

from steer_engine import ops
from steer_engine.machine import DTYPES

BYTES_OF_COPIES = 1 << 29


def num_bytes(weight) -> int:
    return sum(field.nbytes for field in weight if isinstance(field, torch.Tensor))


def make_calls(shape: tuple[int, int], num_rows: int, dtype: torch.dtype) -> dict:
    """{form: (bytes of a weight, function of no arguments)}."""
    in_features, out_features = shape
    module = ops.implementation("cpu")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
    x = torch.randn(num_rows, in_features, generator=generator).to(dtype)
    out = torch.empty(num_rows, out_features, dtype=dtype)
    packers = {"as is": module.pack_weight, "int8": module.pack_int8_weight}
    if dtype == torch.bfloat16:
        module.COMPRESSING_ISAS.add(ops.cpu_isa())  # also where the engine does not
        packers["compressed"] = module.compress_weight
    calls = {}
    for form, pack in packers.items():
        first = pack(weight.to(dtype))
        if first is None:
            continue
        num_copies = max(1, BYTES_OF_COPIES // num_bytes(first))
        others = [first._replace(data=first.data.clone()) for _ in range(num_copies - 1)]
        copies = itertools.cycle([first, *others])
        calls[form] = (num_bytes(first), lambda c=copies: module.linear(x, next(c), out))
    return calls


def measure(calls: dict, seconds: float, clock) -> dict[str, float]:
    """{form: median ms}, forms in turns."""
    times: dict[str, list[float]] = {form: [] for form in calls}
    for _, call in calls.values():
        call()
    started_at = time.perf_counter()
    while time.perf_counter() - started_at < seconds:
        for form, (_, call) in calls.items():
            before = clock()
            call()
            times[form].append(1e3 * (clock() - before))
    return {form: statistics.median(values) for form, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=["4544x22848"], help="inputs x outputs")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 3, 12, 48])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--isa", help="an instruction set of csrc")
    parser.add_argument("--seconds", type=float, default=3.0, help="per case")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    if reason := ops.unavailable_reason("cpu"):
        raise SystemExit(f"backend cpu: {reason}")
    if settings.isa:
        torch.ops.steer_engine.set_cpu_isa(settings.isa)
    print(json.dumps(describe_machine()))
    clock = time.thread_time if settings.threads == 1 else time.perf_counter
    for name in settings.shapes:
        shape = tuple(map(int, name.split("x")))
        for num_rows in settings.rows:
            calls = make_calls(shape, num_rows, DTYPES[settings.dtype])
            times = measure(calls, settings.seconds, clock)
            parts = []
            for form in calls:
                rate = calls[form][0] / times[form] / 1e6
                ratio = times["as is"] / times[form]
                parts.append(f"{form} {times[form]:.2f} ms ({rate:.1f} GB/s, {ratio:.2f}x)")
            print(f"{name} {settings.dtype} {num_rows:3d} rows: {', '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
