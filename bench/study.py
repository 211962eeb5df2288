"""What does STEER give beyond a temperature? The runs, numbers and figures of docs/study.md.

    python bench/study.py --recipe research-questions --base DIR --domain ADAPTER
        --real held_out.jsonl --train train.jsonl --work DIR [--seeds 0 1 2] [--num-examples 300]

Every method writes --num-examples texts per seed, all of a seed in one batch, and every set is
compared with the same held-out real texts at the same size. Guided methods stand beside nucleus
sampling twice: at the temperature that their weights' sum amounts to, 1 / sum, and at the
temperature that gives the same diversity, interpolated between those that ran. Runs and evaluations
that are there already are not repeated. Prints tables in Markdown, and writes --output.json with
all values and --output.svg, diversity against likeness.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from conditions import describe_machine

from steer_engine import Engine, Method
from steer_engine.evaluate import TRAINING_SET, Evaluation, evaluate
from steer_engine.recipes import RECIPES, Recipe

TOP_P = 0.9
# What the tables show, in this order.
SHOWN = (
    "distinct_3",
    "diversity",
    "vendi",
    "mauve",
    "auroc_xgboost",
    "coverage",
    "nearest_real",
    "nearest_training",
    "mean_copy_of_training",
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
    for strength in (0.1, 0.2, 0.4):
        settings = {"gamma": strength, "eta": strength, "form": "paper"}
        name = f"STEER as printed {strength}, {strength}"
        guided[name] = Method.of("steer", **settings)
        guided[f"{name}, normalized"] = Method.of("steer", normalize=True, **settings)
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
    """The sets of one seed; those that an earlier call has evaluated are not evaluated again.

    Hull scores depend on the sets that share a map, so they compare only within one call.
    """
    path = settings.work / f"evaluation-{seed}.json"
    known = Evaluation.read(path) if path.exists() else None
    there = {one.name: one for one in known.sets} if known else {}
    missing = [name for name in study_methods() if name not in there]
    if missing:
        result = evaluate(
            {name: run_parent(settings, seed) / file_name(name) for name in missing},
            settings.real,
            train=settings.train,
            tokenizer=settings.base,
            seed=seed,
            sample_size=known.sample_size if known else settings.sample_size,
            progress=True,
        )
        there = {one.name: one for one in result.sets} | there
        order = [*study_methods(), TRAINING_SET]
        known = replace(result, sets=[there[name] for name in order])
        known.write(path)
    return known


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
    guided = {name: entry for name, entry in study_methods().items() if entry.matched is not None}
    print("\nGuided less nucleus sampling at the same sum of weights, seed by seed:")
    print_table(
        {
            f"{name} - {entry.matched}": differences(values[name], values[entry.matched], shown)
            for name, entry in guided.items()
        },
        shown,
    )
    print("\nGuided less nucleus sampling at the same diversity, seed by seed:")
    print_table(
        {
            name: differences(values[name], at_diversity(values, values[name]["diversity"]), shown)
            for name in guided
        },
        shown,
    )


def differences(own: dict, other: dict, shown: list[str]) -> list[str]:
    return [
        str(Spread.of([a - b for a, b in zip(own[metric], other[metric], strict=True)]))
        for metric in shown
    ]


def nucleus_curve(values: dict) -> list[str]:
    """The nucleus sets from the coldest to the hottest."""
    names = [name for name, entry in study_methods().items() if entry.method.name == "nucleus"]
    return sorted(names, key=lambda name: study_methods()[name].method.temperature)


def at_diversity(values: dict, wanted: list[float]) -> dict[str, list[float]]:
    """Nucleus sampling's metrics at a diversity, seed by seed, linear between temperatures."""
    curve = nucleus_curve(values)
    found = {}
    for metric in values[curve[0]]:
        found[metric] = [
            float(
                np.interp(
                    diversity,
                    [values[name]["diversity"][seed] for name in curve],
                    [values[name][metric][seed] for name in curve],
                )
            )
            for seed, diversity in enumerate(wanted)
        ]
    return found


def draw(values: dict, path: Path) -> None:
    """Diversity against MAUVE, means over seeds with their least and most; right: the best part."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "study"
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    curve = nucleus_curve(values)
    guided = {name for name, entry in study_methods().items() if entry.matched is not None}
    xs, ys = ([statistics.fmean(values[n][m]) for n in curve] for m in ("diversity", "mauve"))
    for axes in panels:
        axes.plot(xs, ys, color="0.75", zorder=1)
        for number, (name, own) in enumerate(values.items(), start=1):
            x, y = Spread.of(own["diversity"]), Spread.of(own["mauve"])
            is_guided = name in guided
            axes.errorbar(
                x.mean,
                y.mean,
                xerr=[[x.mean - x.low], [x.high - x.mean]],
                yerr=[[y.mean - y.low], [y.high - y.mean]],
                fmt="o" if name in curve else "s",
                color="0.5" if name in curve else "C0" if is_guided else "C1",
                markersize=4,
                linewidth=1,
                label=f"{number}  {name}",
            )
            axes.annotate(
                str(number), (x.mean, y.mean), (4, 3), textcoords="offset points", fontsize=8,
                annotation_clip=True,
            )  # fmt: skip
        axes.set_xlabel("diversity (higher is better)")
    panels[0].set_ylabel("MAUVE against held-out texts (higher is better)")
    panels[1].set(xlim=(min(xs[1:]) - 0.2, 1.0), ylim=(max(ys) - 0.25, max(ys) + 0.05))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    figure.savefig(path, metadata={"Date": None})


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
    parser.add_argument("--work", type=Path, required=True, help="where runs are kept")
    parser.add_argument("--output", type=Path, required=True, help="without an ending")
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
    result = {"bench": "study", "machine": describe_machine(), "recipe": recipe.name}
    result |= {"seeds": settings.seeds, "num_examples": settings.num_examples}
    result |= {"sample_size": evaluations[0].sample_size, "values": values}
    settings.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    draw(values, settings.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
