"""What does STEER give beyond a temperature? The runs, numbers and figures of docs/study.md.

    python bench/study.py --recipe research-questions --base DIR --domain ADAPTER
        --real held_out.jsonl --train train.jsonl --work DIR [--seeds 0 1 2] [--num-examples 300]

Every method writes --num-examples texts per seed, all of a seed in one batch, and every set is
compared with the same held-out real texts at the same size. Guided methods stand beside nucleus
sampling at the temperature that their weights' sum amounts to, 1 / sum. Runs and evaluations that
are there already are not repeated. Writes --work/study.json and a figure, and prints tables in
Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from conditions import describe_machine

from steer_engine import Engine, Method
from steer_engine.evaluate import Evaluation, evaluate
from steer_engine.recipes import RECIPES, Recipe

TOP_P = 0.9
# What the tables show, in this order.
SHOWN = (
    "distinct_3",
    "diversity",
    "mauve",
    "auroc_xgboost",
    "coverage",
    "vendi",
    "nearest_train",
    "nearest_real",
)


@dataclass(frozen=True)
class Entry:
    """A method, and the nucleus sampling of the same sum of weights that it is compared with."""

    method: Method
    matched: str | None = None


def nucleus(temperature: float) -> Method:
    return Method.of("nucleus", top_p=TOP_P, temperature=temperature)


def nucleus_name(temperature: float) -> str:
    return f"nucleus, T {temperature:.3g}"


def study_methods() -> dict[str, Entry]:
    """The methods by the names that tables show."""
    guided = {"STEER released 0.1, 0.1": Method.of("steer", gamma=0.1, eta=0.1)}
    for strength in (0.2, 0.4):
        settings = {"gamma": strength, "eta": strength}
        name = f"{strength}, {strength}"
        guided[f"STEER released {name}"] = Method.of("steer", **settings)
        guided[f"STEER released {name}, normalized"] = Method.of(
            "steer", normalize=True, **settings
        )
    guided["STEER as printed 0.2, 0.2"] = Method.of("steer", gamma=0.2, eta=0.2, form="paper")
    guided["STEER as printed 0.2, 0.2, normalized"] = Method.of(
        "steer", gamma=0.2, eta=0.2, form="paper", normalize=True
    )
    guided["expert guidance 0.2"] = Method.of("contrastive", gamma=0.2)
    guided["negative prompting 0.2"] = Method.of("negative", eta=0.2)
    entries = {
        "greedy, in context": Entry(Method.of("greedy", in_context=True)),
        "contrastive search, in context": Entry(Method.of("contrastive_search", in_context=True)),
        "top-k 50": Entry(Method.of("top_k", top_k=50)),
        "temperature 1": Entry(Method.of("temperature")),
        nucleus_name(1.0): Entry(nucleus(1.0)),
    }
    for name, method in guided.items():
        temperature = method.guidance.implicit_temperature
        matched = nucleus_name(temperature)
        entries.setdefault(matched, Entry(nucleus(temperature)))
        entries[name] = Entry(method, matched)
    return entries


class Spread(NamedTuple):
    """Of one metric over the seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.fmean(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def run_methods(engine: Engine, recipe: Recipe, settings, seed: int) -> None:
    """All methods' data sets of one seed, in one batch."""
    # The method decides the shape of the distribution, the recipe where a text ends.
    lengths = replace(recipe.sampling, temperature=1.0, top_p=1.0, top_k=0)
    requests = {
        file_name(name): {
            "prompt": recipe.prompt,
            "num_examples": settings.num_examples,
            "real": str(settings.train),
            "negatives": recipe.negatives,
            "sampling": lengths,
            "method": entry.method,
        }
        for name, entry in study_methods().items()
    }
    engine.generate_datasets(requests, seed=seed, output=run_parent(settings, seed), progress=True)


def file_name(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "-")


def run_parent(settings, seed: int) -> Path:
    return settings.work / f"seed-{seed}"


def evaluate_seed(settings, seed: int) -> Evaluation:
    path = settings.work / f"evaluation-{seed}.json"
    if path.exists():
        return Evaluation.read(path)
    sets = {name: run_parent(settings, seed) / file_name(name) for name in study_methods()}
    result = evaluate(
        sets,
        settings.real,
        train=settings.train,
        tokenizer=settings.base,
        seed=seed,
        sample_size=settings.sample_size,
        progress=True,
    )
    result.write(path)
    return result


def collect(evaluations: list[Evaluation], accept) -> dict[str, dict[str, list[float]]]:
    """{set: {metric: [value of each seed]}}."""
    values: dict[str, dict[str, list[float]]] = {}
    for evaluation in evaluations:
        for one in evaluation.sets:
            own = values.setdefault(one.name, {})
            for name, estimate in one.estimates.items():
                own.setdefault(name, []).append(estimate.value)
            if accept is not None:
                share = sum(map(accept, one.texts)) / len(one.texts)
                own.setdefault("well_formed", []).append(share)
    return values


def print_tables(values: dict[str, dict[str, list[float]]], shown: list[str]) -> None:
    print_table(
        {
            name: [str(Spread.of(own[metric])) if metric in own else "" for metric in shown]
            for name, own in values.items()
        },
        shown,
    )
    print("\nGuided less nucleus sampling at the same sum of weights, seed by seed:")
    differences = {}
    for name, entry in study_methods().items():
        if entry.matched is not None:
            own, other = values[name], values[entry.matched]
            differences[f"{name} - {entry.matched}"] = [
                str(Spread.of([a - b for a, b in zip(own[metric], other[metric], strict=True)]))
                for metric in shown
            ]
    print_table(differences, shown)


def print_table(rows: dict[str, list[str]], columns: list[str]) -> None:
    """In Markdown."""
    print("\n" + " | ".join(["|", *columns, ""]).strip())
    print("|---" * (1 + len(columns)) + "|")
    for name, cells in rows.items():
        print(" | ".join([f"| {name}", *cells, ""]).strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=RECIPES, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--domain", type=Path, required=True)
    parser.add_argument("--real", type=Path, required=True, help="held-out real texts")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-examples", type=int, default=300)
    parser.add_argument("--sample-size", type=int)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    settings = parser.parse_args()
    recipe = RECIPES[settings.recipe]
    settings.work.mkdir(parents=True, exist_ok=True)
    engine = Engine.from_pretrained(
        settings.base, settings.domain, max_num_seqs=settings.max_num_seqs
    )
    for seed in settings.seeds:
        run_methods(engine, recipe, settings, seed)
    evaluations = [evaluate_seed(settings, seed) for seed in settings.seeds]
    values = collect(evaluations, recipe.accept)
    shown = [name for name in (*SHOWN, "well_formed") if name in next(iter(values.values()))]
    print_tables(values, shown)
    result = {"bench": "study", "machine": describe_machine(), "values": values}
    result |= {"settings": {k: str(v) for k, v in vars(settings).items() if k != "work"}}
    (settings.work / "study.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
