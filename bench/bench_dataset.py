"""What does an example of a data set cost: as the set grows, and as examples share negatives?

    python bench/bench_dataset.py [--num-examples 10000] [--share 1 2 4 8] [--threads 1]

The embedded pair, STEER with three passes, the demo's prompt and settings. First one run of
--num-examples, whose CPU time per token is shown by windows: it should not grow. Then runs of
--share-examples for each share: examples of a group have the same negatives, so that their prompts
are prefilled once. Times are the process's CPU time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time

import torch
from conditions import describe_machine

from steer_engine import NegativePrompts, embedded

NUM_WINDOWS = 10


class Meter:
    """Counts what an engine does, while the wrappers are on."""

    def __init__(self, engine):
        self.num_prefilled = 0
        self.steps: list[tuple[float, int]] = []  # CPU time and tokens drawn so far, after a step
        self._forward, self._step = engine.model.forward, engine.step
        engine.model.forward, engine.step = self.forward, self.step

    def forward(self, batch, kv_cache):
        if batch.is_prefill:
            self.num_prefilled += batch.input_ids.shape[0]
        return self._forward(batch, kv_cache)

    def step(self, seed: int):
        finished = self._step(seed)
        drawn = sum(len(sequence.token_ids) for sequence in finished)
        self.steps.append((time.process_time(), drawn + (self.steps[-1][1] if self.steps else 0)))
        return finished


def run(num_examples: int, max_num_seqs: int, **negatives) -> Meter:
    engine = embedded.load_pair(max_num_seqs=max_num_seqs)
    meter = Meter(engine)
    request = embedded.demo_request() | {"negatives": NegativePrompts(**negatives)}
    meter.started_at = time.process_time()
    dataset = engine.generate_dataset(**request, num_examples=num_examples)
    meter.elapsed_s = time.process_time() - meter.started_at
    meter.num_examples, meter.num_tokens = len(dataset), dataset.summary["num_tokens"]
    return meter


def cost_by_window(meter: Meter) -> list[float]:
    """CPU us per token in equal windows of the run, start and end of the run left out."""
    first = len(meter.steps) // 50  # places fill up at the start, and run empty at the end
    steps = meter.steps[first : len(meter.steps) - first]
    edges = [steps[i * (len(steps) - 1) // NUM_WINDOWS] for i in range(NUM_WINDOWS + 1)]
    return [
        1e6 * (end_s - start_s) / (end_tokens - start_tokens)
        for (start_s, start_tokens), (end_s, end_tokens) in itertools.pairwise(edges)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-examples", type=int, default=10_000)
    parser.add_argument("--share", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--share-examples", type=int, default=512)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    machine = describe_machine()
    print(json.dumps(machine))

    grown = run(settings.num_examples, settings.max_num_seqs)
    windows = [round(us) for us in cost_by_window(grown)]
    print(f"{grown.num_examples} examples, {grown.num_tokens} tokens: CPU us per token, in tenths")
    print("  " + " ".join(map(str, windows)) + f"  last / first {windows[-1] / windows[0]:.3f}")

    shares = []
    for share in settings.share:
        meter = run(settings.share_examples, settings.max_num_seqs, share=share)
        prefilled = meter.num_prefilled / meter.num_examples
        cost_us = 1e6 * meter.elapsed_s / meter.num_tokens
        shares.append(
            {
                "share": share,
                "prefilled_per_example": round(prefilled, 2),
                "cpu_us_per_token": round(cost_us, 1),
            }
        )
        print(
            f"share {share}: {prefilled:7.2f} prompt tokens prefilled per example "
            f"({shares[0]['prefilled_per_example'] / prefilled:.2f} times fewer than the first), "
            f"{cost_us:.0f} CPU us per drawn token",
            flush=True,
        )
    result = {"bench": "dataset", "machine": machine, "settings": vars(settings)}
    print(json.dumps(result | {"us_per_token": windows, "shares": shares}))


if __name__ == "__main__":
    main()
