"""How much quicker is a grid of settings as one batch than its cells one after another?

    python bench/bench_sweep.py [--values 3] [--num-examples 50] [--max-num-seqs 32] [--repeat 3]
        [--threads 1] [--in-memory]

Every cell of a gamma x eta grid of the embedded pair (STEER as released, the demo's prompt, stop
rule and real examples) is written to a run directory: first by generate_dataset, cell after cell,
then by generate_datasets, in turn, `--repeat` times. The bytes of all examples are compared. Beside
the tokens/second stand the mean share of places in the batch that ran, and the prompt tokens that
were computed, which differ because cells share pages of equal negatives. On a busy machine run one
thread and read the CPU time. Last line: the same as one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from conditions import describe_machine

from steer_engine import Engine, Guidance, embedded
from steer_engine.sweep import grid

PARTS = ("tokens_per_s", "tokens_per_cpu_s", "occupancy", "prefill_tokens")


class Counter:
    """Counts an engine's decode rows and prefill tokens."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.num_steps = self.num_rows = self.num_prefilled = 0
        decode_rows, forward = engine.scheduler.decode_rows, engine.model.forward

        def counting_rows():
            self.num_steps += 1
            self.num_rows += len(engine.scheduler.running)
            return decode_rows()

        def counting_forward(batch, cache):
            self.num_prefilled += len(batch.input_ids) * batch.is_prefill
            return forward(batch, cache)

        engine.scheduler.decode_rows, engine.model.forward = counting_rows, counting_forward

    def measure(self, write) -> tuple[dict, dict[str, float]]:
        """What write() returns, {name: SyntheticDataset}, and what it cost."""
        self.num_steps = self.num_rows = self.num_prefilled = 0
        self.engine.scheduler.reset()
        started_at, cpu_started_at = time.monotonic(), time.process_time()
        datasets = write()
        elapsed_s, cpu_s = time.monotonic() - started_at, time.process_time() - cpu_started_at
        num_tokens = sum(len(e.token_ids) for d in datasets.values() for e in d)
        places = self.num_steps * self.engine.config.max_num_seqs
        values = (
            num_tokens / elapsed_s,
            num_tokens / cpu_s,
            self.num_rows / places,
            self.num_prefilled,
        )
        return datasets, dict(zip(PARTS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--values", type=int, default=3, help="of gamma and of eta")
    parser.add_argument("--num-examples", type=int, default=50)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--in-memory", action="store_true", help="write nothing to disk")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    engine = embedded.load_pair(max_num_seqs=arguments.max_num_seqs)
    steps = [0.1 * i for i in range(arguments.values)]
    common = embedded.demo_request() | {"num_examples": arguments.num_examples}
    requests = {}
    for cell in grid(gamma=steps, eta=steps):
        guidance = Guidance.steer(cell.gamma, cell.eta, form="released", alpha=embedded.ALPHA)
        requests[cell.name] = common | {"guidance": guidance}

    counter = Counter(engine)
    results: dict[str, list[dict]] = {"alone": [], "together": []}
    for _ in range(arguments.repeat):
        with tempfile.TemporaryDirectory() as directory:
            root = None if arguments.in_memory else Path(directory)

            def alone(root=root):
                return {
                    name: engine.generate_dataset(**r, output=root and root / "alone" / name)
                    for name, r in requests.items()
                }

            def together(root=root):
                return engine.generate_datasets(requests, output=root and root / "together")

            one_by_one, cost = counter.measure(alone)
            results["alone"].append(cost)
            in_one_batch, cost = counter.measure(together)
            results["together"].append(cost)
            assert all(list(one_by_one[n]) == list(in_one_batch[n]) for n in requests)

    medians = {
        way: {part: statistics.median(cost[part] for cost in costs) for part in PARTS}
        for way, costs in results.items()
    }
    print(f"{len(requests)} cells of {arguments.num_examples} examples: equal bytes")
    for way, parts in medians.items():
        print(f"{way:10}" + "  ".join(f"{part} {value:,.2f}" for part, value in parts.items()))
    ratio = medians["together"]["tokens_per_s"] / medians["alone"]["tokens_per_s"]
    print(f"together / alone: {ratio:.2f}")
    print(json.dumps({"bench": "sweep", **describe_machine(), **vars(arguments), **medians}))


if __name__ == "__main__":
    main()
