"""Run directories and an evaluation as a report gets them, without an engine or a metric."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

from steer_engine import Guidance, NegativePrompts, SamplingParams
from steer_engine.dataset import Example
from steer_engine.evaluate import (
    Better,
    Estimate,
    Evaluation,
    Group,
    Metric,
    NearestReal,
    SetEvaluation,
)
from steer_engine.run_record import describe_real

PROMPT = "Generate a research question about astronomy:"
STARTS = ("How do", "Why do", "Can", "What makes", "When did", "Do")
SUBJECTS = (
    "dwarf galaxies", "hot Jupiters", "pulsar glitches", "dust lanes", "stellar winds",
    "radio halos", "debris discs", "lensed quasars",
)  # fmt: skip
ENDS = (
    "lose their gas", "change over a cycle", "form in clusters", "shape their disc",
    "trace the dark matter around them", "survive a merger of two massive haloes",
)  # fmt: skip
METRICS = (
    Metric("distinct_3", "distinct 3-grams", Group.DIVERSITY, Better.HIGHER,
           "Share of the 3-grams of tokens that are distinct."),
    Metric("duplicate_3", "repeated 3-grams", Group.DIVERSITY, Better.LOWER,
           "Share of the 3-grams of tokens that repeat an earlier one."),
    Metric("vendi", "Vendi score", Group.DIVERSITY, Better.HIGHER,
           "How many different texts the set is worth."),
    Metric("mauve", "MAUVE", Group.LIKENESS, Better.HIGHER,
           "Overlap of the two distributions over clusters of embeddings."),
    Metric("auroc", "adversarial AUROC, XGBoost", Group.LIKENESS, Better.LOWER,
           "How well boosted trees tell synthetic from real; 0.5 is a guess."),
    Metric("pairwise", "mean pairwise cosine", Group.LIKENESS, Better.AS_REAL,
           "Mean cosine over all pairs of a real and a synthetic text."),
    Metric("copies", "copies of held-out texts", Group.COPYING, Better.LOWER,
           "Share of the texts that stand word for word among the held-out texts."),
    Metric("unused", "accuracy when trained on", Group.USEFULNESS, Better.HIGHER,
           "Left out of every set here."),
)  # fmt: skip
VALUES = {  # distinct_3, duplicate_3, vendi, mauve, auroc, pairwise, copies
    "steer": (0.84, 0.16, 41.2, 0.81, 0.71, 0.31, 0.01),
    "nucleus": (0.71, 0.29, 33.0, 0.83, 0.68, 0.34, 0.08),
    "base-model": (0.93, 0.07, 61.7, 0.22, 0.97, 0.12, 0.0),
}
REAL_VALUES = (0.86, 0.14, 45.3, None, None, 0.33, None)


def real_texts(num_texts: int = 60, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    choices = (STARTS, SUBJECTS, ENDS)
    return [f"{' '.join(map(rng.choice, choices))} (case {n})?" for n in range(num_texts)]


def write_run(
    path: Path,
    texts: list[str],
    *,
    real: list[str],
    guidance: Guidance,
    prompts: dict[str, str] | None = None,
    has_negatives: bool = True,
) -> Path:
    """A finished run with these texts; every example has two negatives, one of them synthetic."""
    prompts = prompts or {"": PROMPT}
    labels = list(prompts)
    path.mkdir(parents=True)
    settings = {
        "versions": {"steer-engine": "0.1.0", "torch": "2.13.0"},
        "engine": {"device": "cpu", "dtype": "float32", "backend": "cpu", "max_num_seqs": 64},
        "checkpoints": {"base": {"model.safetensors": "a" * 64}, "domain": {}},
        "real": describe_real(real),
        "prompts": prompts,
        "num_examples": len(texts),
        "guidance": asdict(guidance) | {"implicit_temperature": guidance.implicit_temperature},
        "negatives": asdict(NegativePrompts(lag=64)),
        "sampling": asdict(SamplingParams(top_p=0.9, stop=("?",))),
        "accept": None,
        "max_attempts": 10,
        "until": None,
        "seed": 7,
    }
    examples = [
        Example(
            n, labels[n % len(labels)], prompts[labels[n % len(labels)]], text, [1, 2, 3],
            "length" if n % 9 == 8 else "stop",
            [f"real/{n % len(real)}", f"synthetic/{n // 2}"] if has_negatives and real else [],
            2 if n == 3 else 1,
        )
        for n, text in enumerate(texts)
    ]  # fmt: skip
    summary = {
        "num_examples": len(texts),
        "num_duplicates": len(texts) - len(set(texts)),
        "num_copies_of_real": len(set(texts) & set(real)),
        "guidance": guidance.describe(),
    }
    (path / "run.json").write_text(json.dumps(settings), encoding="utf-8")
    (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    lines = "".join(example.to_json() + "\n" for example in examples)
    (path / "examples.jsonl").write_text(lines, encoding="utf-8")
    return path


def make_evaluation(runs: dict[str, tuple[Path, list[str]]], real: list[str]) -> Evaluation:
    """Plausible numbers for runs {name in VALUES: (directory, texts)}; texts may be cut down."""
    size = min(len(texts) for _, texts in runs.values())
    rng = random.Random(1)
    held = _one_set("real", Path("real.jsonl"), real[:size], len(real), REAL_VALUES, rng, real=[])
    sets = [
        _one_set(name, path, texts[:size], len(texts), VALUES[name], rng, real=real)
        for name, (path, texts) in runs.items()
    ]
    notes = [f"real: {size} of {len(real)} texts, drawn with seed 0."]
    return Evaluation(list(METRICS), held, sets, size, 0, "all-MiniLM-L6-v2", notes)


def _one_set(name, path, texts, num_texts, values, rng, *, real) -> SetEvaluation:
    estimates = {
        metric.name: Estimate(value, value * 0.94, value * 1.06, "95 % bootstrap over texts")
        for metric, value in zip(METRICS, values, strict=False)
        if value is not None
    }
    shift = 1.5 * len(name) - 8
    points = [(rng.gauss(shift, 2.0), rng.gauss(0.3 * shift, 1.5)) for _ in texts]
    (left, bottom), (right, top) = map(min, zip(*points)), map(max, zip(*points))  # noqa: B905
    hull = [(left, bottom), (right, bottom), (right, top), (left, top)]
    nearest = [NearestReal(rng.choice(real), rng.betavariate(8, 3)) for _ in texts] if real else []
    return SetEvaluation(
        name, str(path), num_texts, list(range(len(texts))), list(texts), estimates, points, hull,
        nearest,
    )  # fmt: skip
