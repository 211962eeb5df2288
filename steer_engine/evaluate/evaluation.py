"""One evaluation: sets of texts beside each other, against the same real texts at the same size."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import DataError, SteerError, check_number
from .copying import closest_similarities
from .embeddings import SentenceEmbedder, TextEmbedder
from .metrics import DOWNSTREAM, METRICS, choose_metrics
from .ngrams import TokenizerSource, load_tokenizer
from .parts import PARTS, REAL, Estimates, Part, Reference, Rows
from .result import TRAINING_SET, Evaluation, NearestReal, SetEvaluation
from .sets import Source, TextSet, read_set, read_sets
from .stages import Stages
from .usefulness import add_downstream

EXTRA_MODULES = ("scipy", "sklearn", "umap", "xgboost", "sentence_transformers")
MIN_TEXTS = 20  # below, folds, clusters and neighbourhoods hold next to nothing
CLOSE_QUANTILE = 0.95
HULL_COMPONENTS = 5  # the paper's
REAL_SET = "held-out real texts"


class _Samples(NamedTuple):
    """The rows of an evaluation, uncut and cut to one size: real texts, sets, training texts."""

    uncut: list[TextSet]
    cut: list[TextSet]
    has_training: bool

    @property
    def size(self) -> int:
        return len(self.cut[0].texts)


def evaluate(
    sets: Mapping[str, Source] | Sequence[Source],
    real: Source,
    *,
    train: Source | None = None,
    tokenizer: TokenizerSource,
    seed: int = 0,
    sample_size: int | None = None,
    embedder: TextEmbedder | str | Path | None = None,
    cache: str | Path | None = None,
    metrics: Sequence[str] | None = None,
    downstream: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Compare sets of synthetic texts with real ones; needs the extra `eval`.

    All sets and the real texts are cut down to one size, the smallest one's, since n-gram shares,
    MAUVE and the Vendi score depend on it. Only copies are looked for in all real texts.

    Args:
        sets: {name: source} or sources. A source is a run directory, a file as read_texts takes it,
            a list of texts or a SyntheticDataset.
        real: what the sets are compared with. Take texts that the model was not trained on: real
            training texts flatter a model that repeats them.
        train: the training texts. They become a row of their own, the last, which shows how near
            real texts come to real texts; and copying is measured against them too.
        tokenizer: the model's: ours, a tokenizers.Tokenizer, or a directory with tokenizer.json.
        seed: of samples, resamples, clusterings, folds and the map.
        sample_size: cut the sets down further.
        embedder: a sentence-transformers model directory, or an object with name and embed(texts);
            None: all-MiniLM-L6-v2.
        cache: directory where embeddings are kept; None: $STEER_CACHE, else ~/.cache/steer_engine.
        metrics: names of the metrics to compute; None: all but downstream. What they do not need
            is left out: without hull metrics there is no map, and n-grams and copies need no
            embeddings.
        downstream: train a model on each set and test it on the real texts too: a classifier
            where texts have labels, or answers to five-choice questions.
        progress: show it on standard error.
    Returns: the same for the same arguments, versions and machine.
    Raises: DataError or RunError if a source cannot be read or is too small; SteerError if a
        package of the extra is missing; ValueError if an argument is out of range.
    """
    check_number("seed", seed, low=0, high=2**32 - 1, is_int=True)
    if sample_size is not None:
        check_number("sample_size", sample_size, low=MIN_TEXTS, is_int=True)
    wanted = choose_metrics(metrics, downstream, has_training=train is not None)
    check_extra()
    samples = _read(sets, real, train, sample_size, seed)
    hf_tokenizer = load_tokenizer(tokenizer)
    if embedder is None or isinstance(embedder, str | Path):
        embedder = SentenceEmbedder(embedder, cache)
    parts = {name: part for name, part in PARTS.items() if wanted.intersection(part.metrics)}
    with Stages(enabled=progress) as stages:
        embeddings, hull_points, maps = _place(samples, parts.values(), embedder, seed, stages)
        rows = Rows(
            texts=[row.texts for row in samples.cut],
            embeddings=embeddings,
            hull_points=hull_points,
            references=_references(samples),
            too_close=_too_close(embeddings[REAL]) if embeddings else None,
            tokenizer=hf_tokenizer,
            seed=seed,
        )
        estimates: list[Estimates] = [{} for _ in samples.cut]
        for name, part in parts.items():
            stages.start(name, len(estimates))
            for number, own in enumerate(estimates):
                computed = part.compute(rows, number)
                own |= {metric: e for metric, e in computed.items() if metric in wanted}
                stages.advance()
        usefulness_notes = []
        if DOWNSTREAM in wanted:
            stages.start(DOWNSTREAM, 1)
            usefulness_notes = add_downstream(estimates, samples.cut, embedder, seed)
    evaluated = [_set(samples, number, rows, own, maps) for number, own in enumerate(estimates)]
    present = {name for own in estimates for name in own}
    return Evaluation(
        metrics=[metric for metric in METRICS if metric.name in present],
        real=evaluated[REAL],
        sets=evaluated[REAL + 1 :],
        sample_size=samples.size,
        seed=seed,
        embedder=embedder.name if embeddings or DOWNSTREAM in wanted else "",
        notes=_notes(samples, rows, evaluated, wanted, seed) + usefulness_notes,
    )


def check_extra(*more: str) -> None:
    """Raise SteerError if a package of the extra `eval` is missing. more: modules, of it too."""
    for module in (*EXTRA_MODULES, *more):
        if importlib.util.find_spec(module) is None:
            raise SteerError(f"{module} is not installed; run `pip install steer-engine[eval]`")


def _read(sets, real, train, sample_size: int | None, seed: int) -> _Samples:
    uncut = [read_set(REAL_SET, real), *read_sets(sets)]
    if train is not None:
        uncut.append(read_set(TRAINING_SET, train))
    names = [row.name for row in uncut]
    for name in (REAL_SET, TRAINING_SET):
        if names.count(name) > 1 or (name == TRAINING_SET and name in names and train is None):
            raise ValueError(f"sets: choose another name than {name!r}")
    smallest = min(uncut, key=lambda row: len(row.texts))
    size = len(smallest.texts)
    if size < MIN_TEXTS:
        raise DataError(
            f"{smallest.source or smallest.name}: holds {size} texts; an evaluation needs at "
            f"least {MIN_TEXTS} of every set"
        )
    size = min(size, sample_size or size)
    return _Samples(uncut, [row.cut(size, seed) for row in uncut], train is not None)


def _place(
    samples: _Samples,
    parts: Collection[Part],
    embedder: TextEmbedder,
    seed: int,
    stages: Stages,
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Every row's embeddings, its points for hulls and those of the drawn map; [] if not needed."""
    if not any(part.needs_embeddings for part in parts):
        return [], [], []
    embeddings = _embed(samples, embedder, stages)
    if not any(part.needs_hull_points for part in parts):
        return embeddings, [], []
    return embeddings, *_reduce(embeddings, seed, stages)


def _embed(samples: _Samples, embedder: TextEmbedder, stages: Stages) -> list[np.ndarray]:
    texts = [text for row in samples.cut for text in row.texts]
    stages.start("embeddings", len(texts))
    return np.split(embedder.embed(texts, stages.advance_to), len(samples.cut))


def _reduce(embeddings: list[np.ndarray], seed: int, stages: Stages):
    """Points of every row for hulls, and for the drawn map."""
    from .hulls import reduce

    stages.start("UMAP", 2)
    hull_points = reduce(embeddings, num_components=HULL_COMPONENTS, seed=seed)
    stages.advance()
    return hull_points, reduce(embeddings, num_components=2, seed=seed)


def _references(samples: _Samples) -> dict[str, Reference]:
    references = {"real": Reference(samples.uncut[REAL].texts, REAL)}
    if samples.has_training:
        number = len(samples.uncut) - 1
        references["training"] = Reference(samples.uncut[number].texts, number)
    return references


def _too_close(real: np.ndarray) -> float:
    """The cosine that 5 % of the real texts reach with their nearest real neighbour.

    Taken from the texts, since what is near depends on the subject and on the embedder.
    """
    similarity = closest_similarities(real, real, is_same_set=True)[1]
    return float(np.quantile(similarity, CLOSE_QUANTILE))


def _set(
    samples: _Samples, number: int, rows: Rows, estimates: Estimates, maps: list[np.ndarray]
) -> SetEvaluation:
    from .hulls import hull_polygon

    row = samples.cut[number]
    points = maps[number] if maps else np.empty((0, 2))
    return SetEvaluation(
        name=row.name,
        source=row.source,
        num_texts=row.num_texts,
        indices=row.indices,
        texts=row.texts,
        estimates=estimates,
        points=[(float(x), float(y)) for x, y in points],
        hull=hull_polygon(points) if maps else [],
        nearest_real=_nearest_real(rows, number),
    )


def _nearest_real(rows: Rows, number: int) -> list[NearestReal]:
    """Among the held-out and training texts that are rows; of a real text, another one."""
    if not rows.embeddings:
        return []
    own, texts, similarities = rows.embeddings[number], [], []
    for reference in rows.references.values():
        against = rows.embeddings[reference.row]
        index, similarity = closest_similarities(own, against, is_same_set=reference.row == number)
        texts.append([rows.texts[reference.row][i] for i in index])
        similarities.append(similarity)
    nearest = np.argmax(similarities, axis=0)
    return [
        NearestReal(texts[which][place], float(similarities[which][place]))
        for place, which in enumerate(nearest)
    ]


def _notes(
    samples: _Samples,
    rows: Rows,
    evaluated: list[SetEvaluation],
    wanted: set[str],
    seed: int,
) -> list[str]:
    notes = []
    for row in samples.uncut:
        if num_empty := row.num_texts - len(row.texts):
            are = "text is" if num_empty == 1 else "texts are"
            notes.append(f"{row.name}: {num_empty} empty {are} left out.")
        if len(row.texts) > samples.size:
            notes.append(
                f"{row.name}: {samples.size} of {len(row.texts)} texts, drawn with seed {seed}, so "
                "that all sets have one size."
            )
    for row in evaluated[REAL + 1 :]:
        if "auroc_xgboost" in wanted and "auroc_xgboost" not in row.estimates:
            notes.append(
                f"{row.name}: no adversarial AUROC, since there are too few different texts."
            )
    if wanted.intersection(("close_to_real", "close_to_training")):
        notes.append(
            f"Too close is a cosine above {rows.too_close:.3f}, which one in twenty held-out real "
            "texts has with its nearest neighbour among them."
        )
    if samples.has_training:
        notes.append(
            "The training set's row compares real texts with real ones: expect no set to be more "
            "like them."
        )
    if samples.has_training and wanted.intersection(PARTS["copies"].metrics):
        counts = " and ".join(str(len(r.all_texts)) for r in rows.references.values())
        notes.append(f"Copies were looked for in all {counts} held-out and training texts.")
    return notes
