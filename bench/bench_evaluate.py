"""How long does `steer-engine evaluate` take on 1,000 and 1,000 short texts?

    python bench/bench_evaluate.py [--num-texts 1000] [--num-sets 1] [--train] [--repeats 3]

The whole command in a process of its own, from start to written file, with an empty cache of
embeddings each time; texts are made here from a few word lists, about 14 words each. The goal is
180 s on 2 cores. Parts are as the command reports them; what they leave is imports and reading.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conditions import describe_machine

from steer_engine.evaluate import Evaluation

GOAL_S = 180.0
PART = re.compile(r"^(.+): ([0-9.]+) s$", re.MULTILINE)
OPENINGS = ["How does", "To what extent does", "Why does", "Under which conditions does"]
CAUSES = ["dark matter", "stellar feedback", "cosmic ray heating", "the local magnetic field",
    "a close companion", "metallicity", "gas accretion", "the Galactic bar"]  # fmt: skip
VERBS = ["shape", "limit", "set", "delay", "alter", "drive", "mimic", "reveal"]
EFFECTS = ["the spin", "the ages", "the colours", "the number", "the orbits", "the winds"]
OBJECTS = ["young star clusters", "red giants", "satellite galaxies", "brown dwarfs",
    "planetary discs", "white dwarfs", "stellar streams", "globular clusters"]  # fmt: skip
PLACES = ["in the outer halo", "near the Galactic centre", "in the solar neighbourhood",
    "at high redshift", "in the thick disc", "in the Magellanic Clouds"]  # fmt: skip


def make_texts(num_texts: int, seed: int) -> list[str]:
    chooser = random.Random(seed)
    columns = (OPENINGS, CAUSES, VERBS, EFFECTS)
    return [
        f"{' '.join(map(chooser.choice, columns))} of {chooser.choice(OBJECTS)} "
        f"{chooser.choice(PLACES)} over {chooser.randint(1, 999)} Myr?"
        for _ in range(num_texts)
    ]


def run_once(directory: Path, settings) -> dict:
    """Seconds in all and by part."""

    def write(name: str, seed: int) -> Path:
        path = directory / f"{name}.txt"
        path.write_text("\n".join(make_texts(settings.num_texts, seed)))
        return path

    sets = [write(f"set-{number}", number) for number in range(settings.num_sets)]
    arguments = [sys.executable, "-m", "steer_engine", "evaluate", *map(str, sets)]
    arguments += ["--real", str(write("real", 100)), "--output", str(directory / "result.json")]
    if settings.train:
        arguments += ["--train", str(write("train", 101))]
    environment = os.environ | {"STEER_CACHE": str(directory / "cache"), "HF_HUB_OFFLINE": "1"}
    started_at = time.perf_counter()
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    total_s = time.perf_counter() - started_at
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr.strip()}")
    result = Evaluation.read(directory / "result.json")
    assert result.sample_size == settings.num_texts
    assert "mauve" in result.sets[0].estimates
    parts = {name: float(seconds) for name, seconds in PART.findall(done.stderr)}
    return {"total_s": round(total_s, 1), "parts_s": parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-texts", type=int, default=1000, help="of every set")
    parser.add_argument("--num-sets", type=int, default=1)
    parser.add_argument("--train", action="store_true", help="with as many training texts")
    parser.add_argument("--repeats", type=int, default=3)
    settings = parser.parse_args()
    machine = describe_machine()
    print(json.dumps(machine))
    runs = []
    for _ in range(settings.repeats):
        with tempfile.TemporaryDirectory() as directory:
            runs.append(run_once(Path(directory), settings))
        print(f"{runs[-1]['total_s']} s: {runs[-1]['parts_s']}", flush=True)
    median = sorted(runs, key=lambda run: run["total_s"])[len(runs) // 2]
    for name, seconds in median["parts_s"].items():
        print(f"  {name:14s} {seconds:7.1f} s")
    print(f"  {'in all':14s} {median['total_s']:7.1f} s of {GOAL_S:.0f} s")
    result = {"bench": "evaluate", "machine": machine, "settings": vars(settings), "goal_s": GOAL_S}
    print(json.dumps(result | {"median": median, "runs": runs}))


if __name__ == "__main__":
    main()
