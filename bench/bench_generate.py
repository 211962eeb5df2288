"""Tokens/second of generate against Hugging Face and llama.cpp, plain and with three passes?

    python bench/bench_generate.py --work DIR --size small --batch 1 8 32
        --mode plain steer_full steer_lora --dtype float32 bfloat16 [--compiled] [--threads 2]
        [--llama PEER/bin/python] [--no-hf]

End to end with prefill, 64 new tokens, prompts of 16 and negatives of 200 tokens, top-p 0.9, the
same texts for all sides and others in every repeat, tokens counted once per sequence and step.
Results are checked first: greedy tokens and the first step's combined distribution. Then every
variant of a peer (hf_baseline.py, llama_baseline.py) runs once for a few tokens; the one with the
fastest estimate and the engine, in every dtype, alternate for the repeats.

--llama names the interpreter that has llama-cpp-python; llama.cpp runs plain and steer_full.
--size falcon_7b needs 15 GB of disk for the checkpoint and as much for llama.cpp's file;
--one-at-a-time loads a side when the one before has been measured and closed.

On a busy machine two threads wait for each other at every barrier, and wall time says who else ran:
`--threads 1 --clock cpu` counts the process's own CPU time.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import hf_baseline
import llama_baseline
import torch
from ceilings import Work, floor_s, measure_ceilings
from check_sides import check_equal
from checkpoints import SHAPES, Checkpoints, ensure_checkpoints
from conditions import describe_machine, make_texts
from sides import EngineSide, HfSide, LlamaSide, Side, describe_llama, runs_on_llama

PEER_NAMES = {"hf": "Hugging Face", "llama": "llama.cpp"}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SCREENED_STEPS = 4
SCREENED_RUNS = 3  # the fastest counts


class Case:
    """One mode and batch: screening, then alternating repeats."""

    def __init__(self, paths: Checkpoints, mode: str, batch: int, settings):
        self.paths, self.mode, self.batch, self.settings = paths, mode, batch, settings
        self.clock = CLOCKS[settings.clock]

    def run(self) -> dict:
        floors = self._floors()
        peers = {kind: self._screen(makers) for kind, makers in self._peers().items()}
        makers = self._engines() + [make for make, _ in map(fastest, peers.values())]
        if self.settings.repeats:
            rows = self._repeat(makers)
        else:
            rows = [self._estimate_and_close(make) for make in self._engines()]
            rows += [row for _, row in map(fastest, peers.values())]
        for row in rows:
            row |= self._summary(row["seconds"])
            row["share_of_floor"] = round(floors["total_s"] / row["median_s"], 3)
        result = {"mode": self.mode, "batch": self.batch, "floor": floors, "rows": rows}
        result["screened"] = [row for screened in peers.values() for _, row in screened]
        ours = max(row["tokens_s"] for row in rows if row["kind"] == "engine")
        for kind in peers:
            theirs = next(row["tokens_s"] for row in rows if row["kind"] == kind)
            result[f"ratio_to_{kind}"] = round(ours / theirs, 2)
        self._show(result)
        return result

    def _engines(self) -> list[Callable[[], Side]]:
        return [
            functools.partial(EngineSide, self.paths, self.mode, dtype, self.batch, self.settings)
            for dtype in self.settings.dtype
        ]

    def _peers(self) -> dict[str, list[Callable[[], Side]]]:
        """What makes each variant, by kind of peer."""
        settings, peers = self.settings, {}
        if not settings.no_hf:
            variants = hf_baseline.candidates(
                self.mode, tuple(settings.hf_dtype), with_compiled=settings.compiled
            )
            peers["hf"] = [
                functools.partial(HfSide, self.paths, self.mode, variant=variant)
                for variant in variants
                if not settings.variants
                or any(word in variant.label(self.mode) for word in settings.variants)
            ]
        if runs_on_llama(self.mode, settings):
            peers["llama"] = [
                functools.partial(
                    LlamaSide,
                    self.paths,
                    self.mode,
                    variant=variant,
                    batch=self.batch,
                    settings=settings,
                )
                for variant in llama_baseline.candidates(self.mode, tuple(settings.llama_dtype))
            ]
        return peers

    def _texts(self, seed: int):
        settings = self.settings
        sizes = (settings.prompt_tokens, settings.negative_tokens)
        return make_texts(settings.vocab_size, self.batch, *sizes, seed=seed, share=settings.share)

    def _time(self, side: Side, num_new: int, seed: int) -> float:
        return side.time(self._texts(seed), num_new, self.clock)

    def _estimate(self, side: Side) -> dict:
        """Seconds of the whole run from two short ones: 1 token, and SCREENED_STEPS more.

        Both at the beginning of the context, so it flatters a side whose steps grow with it.
        """
        self._time(side, 1 + SCREENED_STEPS, seed=0)  # compiles, packs, warms
        shorter, longer = (
            min(self._time(side, n, seed=1) for _ in range(SCREENED_RUNS))
            for n in (1, 1 + SCREENED_STEPS)
        )
        step_s = (longer - shorter) / SCREENED_STEPS
        if step_s <= 0:
            raise RuntimeError(f"{side.label}: the machine is too busy to tell a step's time")
        estimate_s = shorter + step_s * (self.settings.new_tokens - 1)
        row = {
            "side": side.label,
            "kind": side.kind,
            "first_token_s": round(shorter, 4),
            "step_s": round(step_s, 5),
            "estimate_s": round(estimate_s, 4),
            "seconds": [estimate_s],
        } | side.describe()
        print(f"  estimate {row['side']}: {row['estimate_s']} s, step {step_s:.4f} s", flush=True)
        return row

    def _estimate_and_close(self, make: Callable[[], Side]) -> dict:
        side = make()
        try:
            return self._estimate(side)
        finally:
            side.close()

    def _screen(self, makers: list[Callable[[], Side]]) -> list[tuple[Callable[[], Side], dict]]:
        """What makes each variant that runs, with its estimate."""
        screened = []
        for make in makers:
            try:
                row = self._estimate_and_close(make)
            except Exception as error:  # a variant that the peer's version does not run
                reason = str(error).splitlines()[:1]
                variant = make.keywords["variant"]
                print(f"  {variant}: {type(error).__name__} {reason}", flush=True)
                continue
            screened.append((make, row))
        return screened

    def _repeat(self, makers: list[Callable[[], Side]]) -> list[dict]:
        """Seconds of every repeat; the sides take turns if they all fit into memory."""
        if self.settings.one_at_a_time:
            return [row for make in makers for row in self._alternate([make()])]
        return self._alternate([make() for make in makers])

    def _alternate(self, sides: list[Side]) -> list[dict]:
        rows = [
            {"side": side.label, "kind": side.kind, "seconds": []} | side.describe()
            for side in sides
        ]
        for side in sides:  # at full length: compiled code is bound to the size of its cache
            self._time(side, self.settings.new_tokens, seed=0)
        for repeat in range(self.settings.repeats):
            for side, row in zip(sides, rows, strict=True):
                if self.settings.settle:
                    self._time(side, self.settings.new_tokens, seed=0)
                row["seconds"].append(self._time(side, self.settings.new_tokens, 100 + repeat))
        for side in sides:
            side.close()
        return rows

    def _summary(self, seconds: list[float]) -> dict:
        tokens = self.batch * self.settings.new_tokens
        low, median, high = torch.tensor(seconds).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        return {
            "seconds": [round(s, 4) for s in seconds],
            "median_s": round(median, 4),
            "tokens_s": round(tokens / median, 1),
            "tokens_s_20_80": [round(tokens / high, 1), round(tokens / low, 1)],
        }

    def _floors(self) -> dict:
        settings = self.settings
        work = Work.of(SHAPES[settings.size], 2 if "bfloat16" in settings.dtype else 4)
        ceilings = measure_ceilings(work.weight_bytes, self.clock)
        lengths = (settings.prompt_tokens, settings.negative_tokens)
        prefill, decode = floor_s(
            work, ceilings, self.mode, self.batch, lengths, settings.new_tokens, settings.share
        )
        total = prefill + decode
        floors = {name: round(value, 1) for name, value in asdict(ceilings).items()}
        floors |= {"weight_mb": round(work.weight_bytes / 1e6, 1)}
        floors |= {"prefill_s": prefill, "decode_s": decode, "total_s": total}
        floors["tokens_s"] = round(self.batch * settings.new_tokens / total, 1)
        print(
            f"\n{settings.size} {self.mode} batch {self.batch}: read {ceilings.read_gb_s:.1f} GB/s "
            f"({work.weight_bytes / 1e6:.0f} MB of weights), matrix products "
            f"{ceilings.matrix_gflop_s:.0f} GFLOP/s; floor {total:.3f} s (prefill {prefill:.3f}), "
            f"{floors['tokens_s']} tokens/s",
            flush=True,
        )
        return floors

    def _show(self, result: dict) -> None:
        for row in result["rows"]:
            low, high = row["tokens_s_20_80"]
            print(
                f"  {row['side']:48s} {row['tokens_s']:9.1f} tokens/s ({low} to {high}), "
                f"{100 * row['share_of_floor']:.0f} % of the floor"
            )
        for kind, name in PEER_NAMES.items():
            if f"ratio_to_{kind}" in result:
                print(f"  engine / fastest {name}: {result[f'ratio_to_{kind}']}", flush=True)


def fastest(screened: list[tuple[Callable[[], Side], dict]]) -> tuple[Callable[[], Side], dict]:
    if not screened:
        raise RuntimeError("no variant of a peer runs here; the lines above say why")
    return min(screened, key=lambda pair: pair[1]["estimate_s"])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--size", choices=tuple(SHAPES), default="small")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--mode", nargs="+", choices=hf_baseline.MODES, default=hf_baseline.MODES)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="the engine's")
    parser.add_argument("--hf-dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--compiled", action="store_true", help="try torch.compile as well")
    parser.add_argument("--variants", nargs="*", help="only HF's whose label has such a word")
    parser.add_argument("--share", action="store_true", help="all negatives begin with one text")
    parser.add_argument("--no-hf", action="store_true", help="leave Hugging Face out")
    parser.add_argument("--llama", type=Path, help="the interpreter that has llama-cpp-python")
    parser.add_argument("--llama-dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--one-at-a-time", action="store_true", help="for models that fill memory")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--negative-tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3, help="0: estimates from short runs alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument(
        "--settle",
        action="store_true",
        help="run each side untimed before it is timed: runs of milliseconds would else pay for "
        "caches and threads that the side before them left",
    )
    parser.add_argument("--no-check", action="store_true", help="checked in an earlier run")
    parser.add_argument("--output", type=Path)
    settings = parser.parse_args()
    settings.vocab_size = SHAPES[settings.size]["vocab_size"]
    return settings


def main() -> None:
    settings = parse_arguments()
    torch.set_num_threads(settings.threads)
    paths = ensure_checkpoints(
        settings.work / settings.size,
        SHAPES[settings.size],
        with_finetune="steer_full" in settings.mode,
    )
    machine = describe_machine()
    if not settings.no_hf:
        machine["transformers"] = importlib.metadata.version("transformers")
    if settings.llama is not None:
        machine["llama"] = describe_llama(settings.llama)
    print(json.dumps(machine))
    shown = {k: v for k, v in vars(settings).items() if k not in ("work", "output", "llama")}
    result = {"bench": "generate", "machine": machine, "settings": shown, "cases": []}
    for mode in settings.mode:
        if not settings.no_check:
            check_equal(paths, mode, settings)
        for batch in settings.batch:
            result["cases"].append(Case(paths, mode, batch, settings).run())
            if settings.output:
                settings.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
