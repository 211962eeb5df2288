"""Where does one decode step of the engine spend its time?

    python bench/bench_step.py --work DIR --size small [--mode plain steer_full steer_lora]
        [--batch 1 8 32] [--dtype float32 bfloat16] [--weight-dtype auto int8] [--threads 1]
        [--steps 8]

Sequences are prefilled (16 tokens, negatives of 200), then steps run as users get them, and as many
with every op of the backend and every host part wrapped by a timer. Those run the forward op by op
from Python, also on the CPU, where users get it as one call: the same bits, and the difference of
the two medians is what that saves. A part's time excludes the parts it calls; "other" is what no
wrapper saw. Times are wall time and the process's CPU time: on a busy machine run one thread and
read the CPU time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from checkpoints import SHAPES, ensure_checkpoints
from conditions import describe_machine, domain_of, make_texts, sampling_of

from steer_engine import Engine, Guidance, sequence
from steer_engine.model import FalconModel

MODES = ("plain", "steer_full", "steer_lora")
OPS = (
    "embedding",
    "layer_norm",
    "linear",
    "mqa_decode",
    "paged_attention",
    "rotary_and_store",
)


class Profiler:
    """Exclusive time of wrapped functions, by label."""

    def __init__(self, clock):
        self._clock = clock
        self._open: list[float] = []  # time of the calls inside each open call
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def wrap(self, function, label):
        """label: a str, or a function of the call's arguments."""

        def timed(*arguments, **named):
            self._open.append(0.0)
            started_at = self._clock()
            try:
                return function(*arguments, **named)
            finally:
                elapsed = self._clock() - started_at
                inside = self._open.pop()
                if self._open:
                    self._open[-1] += elapsed
                name = label if isinstance(label, str) else label(*arguments)
                self.seconds[name] += elapsed - inside
                self.calls[name] += 1

        return timed


@contextlib.contextmanager
def instrumented(engine: Engine, profiler: Profiler):
    """Wrap the backend's ops and the host's parts of a step; undone at the end."""
    model_ops = engine.model.ops
    targets = [(model_ops, name, name) for name in OPS if hasattr(model_ops, name)]
    targets += [
        (engine.scheduler, "decode_rows", "host: build the batch"),
        (engine.scheduler, "retire", "host: append and retire"),
        (sequence.DecodingSequence, "append", "host: append and retire"),
        (engine._sampler, "prepare", "host: sampler arguments"),
        (engine._sampler, "draw", "host: sampler arguments"),
        (engine._sampler, "_draw", "draw"),
        (engine.model, "forward", "host: forward's Python and allocations"),
        (engine.model, "compute_logits", "host: logits' Python and allocations"),
    ]
    with contextlib.ExitStack() as undo:
        for name in ("forward", "compute_logits"):
            setattr(engine.model, name, getattr(FalconModel, name).__get__(engine.model))
            undo.callback(delattr, engine.model, name)
        for owner, name, label in targets:
            original = getattr(owner, name)
            is_own = name in vars(owner)
            if name == "linear":
                label = linear_label
            setattr(owner, name, profiler.wrap(original, label))
            undo.callback(restore, owner, name, original, is_own)
        yield


def restore(owner, name: str, original, is_own: bool) -> None:
    if is_own:
        setattr(owner, name, original)
    else:
        delattr(owner, name)


def linear_label(x, weight, *_) -> str:
    return f"linear {weight.in_features}->{weight.out_features}, {x.shape[0]} rows"


def measure(engine: Engine, batch: int, mode: str, settings) -> dict:
    """Median step of one case; parts in milliseconds per step."""
    vocab_size = engine.model_config.vocab_size
    prompts, negatives = make_texts(
        vocab_size, batch, settings.prompt_tokens, settings.negative_tokens
    )
    guidance = Guidance.none() if mode == "plain" else Guidance.recommended()
    sequences = engine._sequences(
        prompts, negatives, guidance, sampling_of(2 * settings.steps + 3), seed=0
    )
    engine.scheduler.waiting.extend(sequences)
    plain_s, split = [], []
    try:
        engine.step(seed=0)  # prefill and the first token
        engine.step(seed=0)
        for _ in range(settings.steps):
            plain_s.append(measure_plain_step(engine))
            split.append(measure_step(engine))
    finally:
        engine.scheduler.reset()
    split.sort(key=lambda step: step["cpu_ms"])
    wall_ms, cpu_ms = (1e3 * statistics.median(times) for times in zip(*plain_s, strict=True))
    return {"wall_ms": wall_ms, "cpu_ms": cpu_ms, "split": split[len(split) // 2]}


def measure_plain_step(engine: Engine) -> tuple[float, float]:
    """Wall and CPU seconds of a step as users get it."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    engine.step(seed=0)
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


def measure_step(engine: Engine) -> dict:
    profiler = Profiler(time.process_time)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    with instrumented(engine, profiler):
        engine.step(seed=0)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    parts = {name: 1e3 * seconds for name, seconds in profiler.seconds.items()}
    parts["other"] = 1e3 * cpu_s - sum(parts.values())
    return {
        "wall_ms": 1e3 * wall_s,
        "cpu_ms": 1e3 * cpu_s,
        "parts_ms": parts,
        "calls": dict(profiler.calls),
    }


def show(case: dict) -> None:
    print(
        f"\n{case['size']} {case['mode']} batch {case['batch']} {case['dtype']}, weights in "
        f"{case['weight_dtype']}: "
        f"{case['cpu_ms']:.2f} ms CPU, {case['wall_ms']:.2f} ms wall per step"
    )
    split = case["split"]
    print(f"  op by op {split['cpu_ms']:.2f} ms CPU, of which")
    for name, ms in sorted(split["parts_ms"].items(), key=lambda item: -item[1]):
        calls = split["calls"].get(name, "")
        print(f"  {ms:9.3f} ms {100 * ms / split['cpu_ms']:5.1f} % {calls!s:>4} {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--size", choices=SHAPES, default="small")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--weight-dtype", nargs="+", default=["auto"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--negative-tokens", type=int, default=200)
    parser.add_argument("--output", type=Path)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    paths = ensure_checkpoints(settings.work / settings.size, SHAPES[settings.size])
    result = {"bench": "step", "machine": describe_machine(), "cases": []}
    print(json.dumps(result["machine"]))
    for dtype, weight_dtype in itertools.product(settings.dtype, settings.weight_dtype):
        for mode in settings.mode:
            engine = Engine.from_pretrained(
                paths.base,
                domain_of(paths, mode),
                dtype=dtype,
                weight_dtype=weight_dtype,
                max_num_seqs=max(settings.batch),
                max_model_len=512,
            )
            for batch in settings.batch:
                case = {"size": settings.size, "mode": mode, "batch": batch, "dtype": dtype}
                case |= {"weight_dtype": engine.config.weight_dtype}
                case |= measure(engine, batch, mode, settings)
                show(case)
                result["cases"].append(case)
                if settings.output:  # after every case: a long run may be cut short
                    settings.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
