"""What an evaluation holds: metrics with intervals, and what a report draws of each set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

from ..errors import DataError
from ..files import write_output

# The name of the row that real training texts have among the sets.
TRAINING_SET = "training set"


class Better(StrEnum):
    """Which way a metric improves; AS_REAL: the nearer to the real texts' own value."""

    HIGHER = "higher"
    LOWER = "lower"
    AS_REAL = "as real"


class Group(StrEnum):
    """What a metric is about, in the order of the report's table."""

    DIVERSITY = "diversity"
    LIKENESS = "likeness to the real texts"
    COPYING = "copying"
    USEFULNESS = "usefulness"


@dataclass(frozen=True)
class Metric:
    """A metric's definition.

    name: the key in estimates. title: what tables show. meaning: one sentence for people.
    floor: where LOWER stops to be better (0.5 for an AUROC).
    """

    name: str
    title: str
    group: Group
    better: Better
    meaning: str
    floor: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """A metric's value and its interval.

    interval: what low and high are ("95 % bootstrap over texts", "8 clusterings, least and
        most", ...); empty where there is no interval.
    """

    value: float
    low: float | None = None
    high: float | None = None
    interval: str = ""


@dataclass(frozen=True)
class NearestReal:
    """The real text nearest to a synthetic one. similarity: cosine of their embeddings."""

    text: str
    similarity: float


@dataclass(frozen=True)
class SetEvaluation:
    """One set of texts, cut down to the common size.

    name: what tables show.
    source: the run directory or file.
    num_texts: how many there were before they were cut down.
    indices: [sample_size] places of the texts in their source (a run's example indices).
    texts: [sample_size].
    estimates: {metric name: Estimate}; a metric that does not apply is left out.
    points: [sample_size] (x, y) on the common 2-D map; empty if none was drawn.
    hull: corners (x, y) of the points' convex hull, in order.
    nearest_real: [sample_size], of a real text the nearest other one; empty if none was sought.
    """

    name: str
    source: str
    num_texts: int
    indices: list[int]
    texts: list[str]
    estimates: dict[str, Estimate]
    points: list[tuple[float, float]] = field(default_factory=list)
    hull: list[tuple[float, float]] = field(default_factory=list)
    nearest_real: list[NearestReal] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """Sets beside each other, all compared with the same real texts at the same size.

    metrics: definitions, in the order of the table.
    real: the real texts that the sets are compared with.
    sets: in the order they were given.
    sample_size: texts of every set that were looked at.
    embedder: the embedding model's name; empty if there are no embeddings.
    notes: what a reader has to know (sets cut down, metrics left out and why).
    """

    metrics: list[Metric]
    real: SetEvaluation
    sets: list[SetEvaluation]
    sample_size: int
    seed: int
    embedder: str
    notes: list[str] = field(default_factory=list)

    def best(self, metric: Metric) -> list[str]:
        """Names of the sets with the best value of a metric, several if they are equal.

        The training set does not take part. For AS_REAL the nearest to the real texts' value is
        best; an AUROC under 0.5 is no better than 0.5.
        """
        distances = {}
        for evaluated in self.sets:
            estimate = evaluated.estimates.get(metric.name)
            if estimate is not None and evaluated.name != TRAINING_SET:
                distances[evaluated.name] = self._distance(metric, estimate.value)
        best = min((d for d in distances.values() if d is not None), default=None)
        return [name for name, d in distances.items() if d is not None and d == best]

    def _distance(self, metric: Metric, value: float) -> float | None:
        """How far a value is from the best one, but for a constant; None if that is unknown."""
        if metric.better is Better.AS_REAL:
            real = self.real.estimates.get(metric.name)
            return None if real is None else abs(value - real.value)
        return -value if metric.better is Better.HIGHER else max(value, metric.floor)

    def write(self, path: str | Path) -> None:
        """As JSON, atomically. Raises: RunError if it cannot be written."""
        write_output(Path(path), json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> Evaluation:
        """Raises: DataError if the file is not an evaluation."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(
                **values
                | {
                    "metrics": [_metric(m) for m in values["metrics"]],
                    "real": _set(values["real"]),
                    "sets": [_set(s) for s in values["sets"]],
                }
            )
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, TypeError, KeyError):
            raise DataError(
                f"{path}: not an evaluation; run `steer-engine evaluate` again"
            ) from None


def _metric(values: Mapping) -> Metric:
    return Metric(**values | {"group": Group(values["group"]), "better": Better(values["better"])})


def _set(values: Mapping) -> SetEvaluation:
    return SetEvaluation(
        **values
        | {
            "estimates": {name: Estimate(**e) for name, e in values["estimates"].items()},
            "points": _pairs(values["points"]),
            "hull": _pairs(values["hull"]),
            "nearest_real": [NearestReal(**n) for n in values["nearest_real"]],
        }
    )


def _pairs(values: Sequence) -> list[tuple[float, float]]:
    return [(x, y) for x, y in values]
