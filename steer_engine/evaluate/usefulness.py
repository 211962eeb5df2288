"""What the sets are good for: models trained on them and tested on the real texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import DataError
from .embeddings import TextEmbedder
from .result import Estimate
from .sets import TextSet

NUM_SPLITS = 5
NOTHING_LEARNT = " Real examples teach no more than chance here, so it tells little about the set."


def add_downstream(
    estimates: list[dict[str, Estimate]], rows: Sequence[TextSet], embedder: TextEmbedder, seed: int
) -> list[str]:
    """Add "downstream" to the estimates of each row; the real texts' own comes first.

    Five-choice questions are answered if most real texts are such; else labels are told.
    Returns: notes, also on what could not be measured.
    """
    from .multiple_choice import parse

    real = rows[0]
    num_questions = sum(parse(text) is not None for text in real.texts)
    if num_questions > len(real.texts) / 2:
        compare, task = _compare_questions(embedder), "answering five-choice questions"
    elif real.labels:
        compare, task = _compare_labels, "telling labels"
    else:
        return [
            f"No downstream accuracy: the texts of {real.source or real.name} have neither labels "
            "(a field label) nor the form of five-choice questions."
        ]
    notes = []
    for row, own in zip(rows[1:], estimates[1:], strict=True):
        try:
            result = compare(row, real, seed)
        except DataError as error:
            notes.append(f"{row.name}: no downstream accuracy ({error}).")
            continue
        own["downstream"] = _estimate(result.synthetic)
        # The yardstick hardly depends on the set, but for the number of examples trained on.
        estimates[0].setdefault("downstream", _estimate(result.real))
        notes.append(
            f"{row.name}: accuracy of {task} after training on {result.train_size} examples; "
            f"as many real ones give {result.real.mean:.3f}, chance is {result.chance:.3f}."
            f"{'' if result.real.mean > result.chance else NOTHING_LEARNT}"
        )
    return notes


def _compare_labels(row: TextSet, real: TextSet, seed: int):
    from .downstream import classification

    if not row.labels:
        raise DataError("its texts have no labels")
    return classification(
        row.texts, row.labels, real.texts, real.labels, num_splits=NUM_SPLITS, seed=seed
    )


def _compare_questions(embedder: TextEmbedder) -> Callable:
    from .downstream import multiple_choice
    from .multiple_choice import parse

    def questions(row: TextSet) -> list:
        return [q for q in map(parse, row.texts) if q is not None]

    def compare(row: TextSet, real: TextSet, seed: int):
        return multiple_choice(
            questions(row), questions(real), embedder.embed, num_splits=NUM_SPLITS, seed=seed
        )

    return compare


def _estimate(accuracy) -> Estimate:
    splits = accuracy.splits
    interval = f"{len(splits)} splits, least and most"
    return Estimate(accuracy.mean, min(splits), max(splits), interval)
