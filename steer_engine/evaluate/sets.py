"""The sets of texts of an evaluation: where they are read from, and how they become one size."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..dataset import TEXT_FIELD, SyntheticDataset, read_texts
from ..errors import DataError

LABEL_FIELD = "label"
# A run directory, a file, texts, or a data set in memory.
Source = str | Path | Sequence[str] | SyntheticDataset


@dataclass(frozen=True)
class TextSet:
    """Texts with their places in their source (a run's example indices).

    num_texts: how many the source holds.
    labels: of the texts; empty if the source has none.
    """

    name: str
    source: str
    num_texts: int
    indices: list[int]
    texts: list[str]
    labels: list[str]

    def cut(self, sample_size: int, seed: int) -> TextSet:
        """So many of the texts, drawn without replacement, in their order."""
        chosen = sample_indices(len(self.texts), sample_size, seed)
        return replace(
            self,
            indices=[self.indices[i] for i in chosen],
            texts=[self.texts[i] for i in chosen],
            labels=[self.labels[i] for i in chosen] if self.labels else [],
        )


def sample_indices(num_texts: int, sample_size: int, seed: int) -> list[int]:
    """sample_size of the places 0 .. num_texts - 1, ascending; all if there are not more."""
    if num_texts <= sample_size:
        return list(range(num_texts))
    rng = np.random.default_rng(seed)
    return sorted(rng.choice(num_texts, sample_size, replace=False).tolist())


def read_set(name: str, source: Source) -> TextSet:
    """Texts of a run directory, a file as read_texts takes it, a list, or a SyntheticDataset.

    Empty texts of a run are left out. Labels are the examples' own, or a field "label" of a .jsonl
    or .csv file.
    Raises: DataError or RunError if the source cannot be read or holds no text.
    """
    if isinstance(source, str | Path) and Path(source).is_dir():
        source_name, source = str(source), SyntheticDataset.load(source)
    elif isinstance(source, str | Path):
        source_name = str(source)
    else:
        source_name = ""
    if not isinstance(source, SyntheticDataset):
        try:
            texts = read_texts(source)
        except DataError as error:
            raise DataError(str(error) if source_name else f"{name}: {error}") from None
        labels = _read_labels(Path(source_name)) if source_name else []
        return TextSet(name, source_name, len(texts), list(range(len(texts))), texts, labels)
    examples = [e for e in source if e.text.strip()]
    if not examples:
        raise DataError(f"{source_name or name}: holds no text")
    indices, texts = [e.index for e in examples], [e.text.strip() for e in examples]
    labels = [e.label for e in examples] if all(e.label for e in examples) else []
    return TextSet(name, source_name, len(source), indices, texts, labels)


def read_sets(sets: Mapping[str, Source] | Sequence[Source]) -> list[TextSet]:
    """Sets by name. Those without one are named after their directory or file."""
    if isinstance(sets, str | Path) or not sets:
        raise ValueError("sets must be a mapping {name: source} or a list of sources, not empty")
    if not isinstance(sets, Mapping):
        sets = dict(zip(_names(sets), sets, strict=True))
    return [read_set(name, source) for name, source in sets.items()]


def _read_labels(path: Path) -> list[str]:
    """Labels of the texts that read_texts takes from the file; [] unless all have one."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".jsonl":
            records = [json.loads(line) for line in file if line.strip()]
        elif path.suffix.lower() == ".csv":
            records = list(csv.DictReader(file))
        else:
            return []
    records = [r for r in records if not isinstance(r, dict) or r[TEXT_FIELD].strip()]
    labels = [r.get(LABEL_FIELD) if isinstance(r, dict) else None for r in records]
    return [] if None in labels else [str(label) for label in labels]


def _names(sources: Sequence[Source]) -> list[str]:
    """The shortest ends of the paths that tell them apart; `set 2` for what has no path."""
    paths = [Path(s).resolve() if isinstance(s, str | Path) else None for s in sources]
    names = [
        f"set {i + 1}" if p is None else p.name if p.is_dir() else p.stem
        for i, p in enumerate(paths)
    ]
    depth = 1
    while len(set(names)) < len(names) and depth < max(len(p.parts) for p in paths if p):
        depth += 1
        repeated = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(p.parts[-depth:]) if p and name in repeated else name
            for name, p in zip(names, paths, strict=True)
        ]
    if len(set(names)) < len(names):
        raise ValueError("sets: the same source is given twice")
    return names
