"""Tokens/second of generate against Hugging Face, plain and with three passes?

    python bench/bench_generate.py --work DIR --size small --batch 1 8 32
        --mode plain steer_full steer_lora --dtype float32 bfloat16 [--compiled] [--threads 2]

End to end with prefill, 64 new tokens, prompts of 16 and negatives of 200 tokens, top-p 0.9, the
same texts for both sides and others in every repeat, tokens counted once per sequence and step.
Results are checked first: greedy tokens and the first step's combined distribution. Then every
Hugging Face variant (hf_baseline.py) runs once for a few tokens; the fastest estimate and the
engine, in every dtype, alternate for the repeats.

On a busy machine two threads wait for each other at every barrier, and wall time says who else ran:
`--threads 1 --clock cpu` counts the process's own CPU time.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from ceilings import Work, floor_s, measure_ceilings
from checkpoints import SHAPES, Checkpoints, ensure_checkpoints
from conditions import TOP_P, describe_machine, domain_of, make_texts, sampling_of
from hf_baseline import MODES, HfBaseline, Variant, candidates

from steer_engine import Engine, Guidance, SamplingParams

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# Softmax of combined fp32 logits; both sides sum in another order.
PROBS_TOLERANCE = 1e-4
NUM_CHECKED = 4
NUM_GREEDY = 8
SCREENED_STEPS = 4
SCREENED_RUNS = 3  # the fastest counts


class EngineSide:
    """The engine as one side of the comparison."""

    def __init__(self, paths: Checkpoints, mode: str, dtype: str, batch: int, settings):
        self.guidance = guidance_of(mode)
        self._engine = Engine.from_pretrained(
            paths.base,
            domain_of(paths, mode),
            dtype=dtype,
            max_num_seqs=batch,
            max_model_len=settings.negative_tokens + settings.new_tokens + 8,
        )
        self.label = f"engine {dtype}"

    def generate(self, prompts, negatives, num_new: int, *, greedy: bool = False) -> list:
        sampling = sampling_of(num_new)
        if greedy:
            sampling = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)
        completions = self._engine.generate(
            prompts, negative_prompts=negatives, guidance=self.guidance, sampling=sampling
        )
        return [c.token_ids for c in completions]

    def first_probs(self, prompts, negatives) -> torch.Tensor:
        return self._engine.next_token_probs(
            prompts, negative_prompts=negatives, guidance=self.guidance
        )


class HfSide:
    """One Hugging Face variant as the other side."""

    def __init__(self, paths: Checkpoints, mode: str, variant: Variant):
        self.baseline = HfBaseline(paths, mode, variant, guidance_of(mode))
        self.label = f"hf {variant.label(mode)}"

    def generate(self, prompts, negatives, num_new: int, *, greedy: bool = False) -> list:
        return self.baseline.generate(
            prompts, negatives, num_new=num_new, top_p=TOP_P, greedy=greedy
        ).tolist()

    def first_probs(self, prompts, negatives) -> torch.Tensor:
        baseline = self.baseline
        return baseline.combine(baseline.prefill(prompts, negatives, 1)).softmax(dim=-1)


def guidance_of(mode: str) -> Guidance:
    return Guidance.none() if mode == "plain" else Guidance.recommended()


def check_equal(paths: Checkpoints, mode: str, settings) -> None:
    """Both sides draw the same greedy tokens and have the same first distribution, in fp32."""
    texts = make_texts(
        settings.vocab_size, NUM_CHECKED, settings.prompt_tokens, settings.negative_tokens
    )
    ours = EngineSide(paths, mode, "float32", NUM_CHECKED, settings)
    expected = ours.generate(*texts, NUM_GREEDY, greedy=True)
    probs = ours.first_probs(*texts)
    for variant in candidates(mode, ("float32",), with_compiled=False):
        theirs = HfSide(paths, mode, variant)
        drawn = theirs.generate(*texts, NUM_GREEDY, greedy=True)
        assert drawn == expected, f"{mode}, {theirs.label}: greedy tokens differ"
        if variant.layout != "generate":
            error = float((theirs.first_probs(*texts) - probs).abs().max())
            assert error <= PROBS_TOLERANCE, f"{mode}, {theirs.label}: probabilities off {error}"
    print(f"checked {mode}: greedy tokens and first distributions agree in fp32", flush=True)


class Case:
    """One mode and batch: screening, then alternating repeats."""

    def __init__(self, paths: Checkpoints, mode: str, batch: int, settings):
        self.paths, self.mode, self.batch, self.settings = paths, mode, batch, settings
        self.clock = CLOCKS[settings.clock]

    def run(self) -> dict:
        settings = self.settings
        floors = self._floors()
        screened = self._screen()
        best = min(screened, key=lambda row: row["estimate_s"])
        sides = [EngineSide(self.paths, self.mode, d, self.batch, settings) for d in settings.dtype]
        rows = [self._estimate(side) for side in sides]
        if settings.repeats:
            sides.append(HfSide(self.paths, self.mode, Variant(**best["variant"])))
            rows = self._alternate(sides)
        else:
            rows.append(best | {"seconds": [best["estimate_s"]]})
        for row in rows:
            row |= self._summary(row["seconds"])
            row["share_of_floor"] = round(floors["total_s"] / row["median_s"], 3)
        result = {"mode": self.mode, "batch": self.batch, "floor": floors, "rows": rows}
        result["screened"] = screened
        ours = max(row["tokens_s"] for row in rows if row["side"].startswith("engine"))
        result["ratio_to_hf"] = round(ours / rows[-1]["tokens_s"], 2)
        self._show(result)
        return result

    def _texts(self, seed: int):
        settings = self.settings
        sizes = (settings.prompt_tokens, settings.negative_tokens)
        return make_texts(settings.vocab_size, self.batch, *sizes, seed=seed)

    def _time(self, side, num_new: int, seed: int) -> float:
        texts = self._texts(seed)
        started_at = self.clock()
        drawn = side.generate(*texts, num_new)
        seconds = self.clock() - started_at
        assert [len(row) for row in drawn] == [num_new] * self.batch
        return seconds

    def _estimate(self, side) -> dict:
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
            "first_token_s": round(shorter, 4),
            "step_s": round(step_s, 5),
            "estimate_s": round(estimate_s, 4),
            "seconds": [estimate_s],
        }
        print(f"  estimate {row['side']}: {row['estimate_s']} s, step {step_s:.4f} s", flush=True)
        return row

    def _screen(self) -> list[dict]:
        rows = []
        dtypes = tuple(self.settings.hf_dtype)
        for variant in candidates(self.mode, dtypes, with_compiled=self.settings.compiled):
            if self.settings.variants and not any(
                word in variant.label(self.mode) for word in self.settings.variants
            ):
                continue
            try:
                side = HfSide(self.paths, self.mode, variant)
                row = self._estimate(side) | {"variant": variant.describe()}
            except Exception as error:  # a variant that this version of transformers does not run
                reason = str(error).splitlines()[:1]
                print(f"  {variant.label(self.mode)}: {type(error).__name__} {reason}", flush=True)
                continue
            rows.append(row)
            del side
            torch.compiler.reset()
            gc.collect()
        return rows

    def _alternate(self, sides: list) -> list[dict]:
        rows = [{"side": side.label, "seconds": []} for side in sides]
        for side in sides:
            self._time(side, 2, seed=0)
        for repeat in range(self.settings.repeats):
            for side, row in zip(sides, rows, strict=True):
                row["seconds"].append(self._time(side, self.settings.new_tokens, 100 + repeat))
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
            work, ceilings, self.mode, self.batch, lengths, settings.new_tokens
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
        print(f"  engine / fastest Hugging Face: {result['ratio_to_hf']}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--size", choices=("tiny", "small"), default="small")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="the engine's")
    parser.add_argument("--hf-dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--compiled", action="store_true", help="try torch.compile as well")
    parser.add_argument("--variants", nargs="*", help="only variants whose label has such a word")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--negative-tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3, help="0: estimates from short runs alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--no-check", action="store_true", help="checked in an earlier run")
    parser.add_argument("--output", type=Path)
    settings = parser.parse_args()
    settings.vocab_size = SHAPES[settings.size]["vocab_size"]
    return settings


def main() -> None:
    settings = parse_arguments()
    torch.set_num_threads(settings.threads)
    paths = ensure_checkpoints(settings.work / settings.size, SHAPES[settings.size])
    import transformers

    machine = describe_machine() | {"transformers": transformers.__version__}
    print(json.dumps(machine))
    shown = {k: v for k, v in vars(settings).items() if k not in ("work", "output")}
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
