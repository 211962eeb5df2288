"""evaluate() as a whole, on small sets with a stand-in embedder, and its command."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from xgboost import XGBClassifier

from steer_engine import DataError, Example, SteerError, cli, embedded
from steer_engine.evaluate import (
    TRAINING_SET,
    Better,
    Estimate,
    Evaluation,
    adversary,
    evaluate,
    evaluation,
    mauve,
    ngram_metrics,
)
from steer_engine.evaluate.adversary import Adversary
from steer_engine.evaluate.command import choose_tokenizer, default_output, result_table
from steer_engine.evaluate.metrics import METRICS
from steer_engine.evaluate.sets import read_sets

SIZE = 24
SUBJECTS = ["dark matter", "a red giant", "the halo", "gas", "dust", "a pulsar", "the bulge"]
VERBS = ["shapes", "heats", "feeds", "hides", "reveals"]
OBJECTS = ["young stars", "old clusters", "the thin disk", "satellites", "its own orbit", "metals"]


class StandInEmbedder:
    """Counts of letter pairs, hashed to 12 numbers."""

    name = "stand-in"

    def embed(self, texts, report=lambda num_done: None) -> np.ndarray:
        rows = np.full((len(texts), 12), 0.1)
        for row, text in zip(rows, texts, strict=True):
            for left, right in pairwise(text):
                row[(31 * ord(left) + ord(right)) % 12] += 1
        rows -= rows.mean(axis=1, keepdims=True)
        report(len(texts))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def make_texts(num_texts: int, seed: int) -> list[str]:
    chooser = random.Random(seed)
    every = [
        f"How {s} {v} {o} {n}?" for s in SUBJECTS for v in VERBS for o in OBJECTS for n in "ab"
    ]
    return chooser.sample(every, num_texts)


REAL, TRAIN = make_texts(SIZE, 0), make_texts(2 * SIZE, 1)
SETS = {
    "fresh": make_texts(SIZE + 6, 2),
    "copier": TRAIN[:SIZE],
    "collapsed": ["How gas heats gas?"] * SIZE,
}


def run(**overrides) -> Evaluation:
    arguments = {"sets": SETS, "real": REAL, "train": TRAIN, "tokenizer": embedded.BASE}
    return evaluate(**arguments | {"embedder": StandInEmbedder()} | overrides)


@pytest.fixture(scope="module", autouse=True)
def quick_parts():
    """Fewer trees and starts: the parts' own tests see them in full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mauve, "STARTS_PER_CLUSTERING", 1)
        few_trees = partial(XGBClassifier, n_estimators=5, n_jobs=1)
        patch.setitem(
            adversary.CLASSIFIERS, Adversary.XGBOOST, lambda seed: few_trees(random_state=seed)
        )
        yield


@pytest.fixture(scope="module")
def result() -> Evaluation:
    return run()


SMALL = {"sets": {"fresh": SETS["fresh"]}, "train": None, "sample_size": 20, "seed": 3}


@pytest.fixture(scope="module")
def small() -> Evaluation:
    return run(**SMALL)


def value(result: Evaluation, name: str, metric: str) -> float:
    (found,) = [s for s in (result.real, *result.sets) if s.name == name]
    return found.estimates[metric].value


def test_all_sets_are_cut_to_the_smallest_and_the_notes_say_so(result):
    assert [s.name for s in result.sets] == [*SETS, TRAINING_SET]
    assert result.sample_size == SIZE
    for evaluated in (result.real, *result.sets):
        assert len(evaluated.texts) == len(evaluated.indices) == len(evaluated.points) == SIZE
        assert len(evaluated.hull) >= 3
    fresh = result.sets[0]
    assert fresh.num_texts == SIZE + 6
    assert [SETS["fresh"][i] for i in fresh.indices] == fresh.texts
    notes = " ".join(result.notes)
    assert f"fresh: {SIZE} of {SIZE + 6} texts" in notes
    assert "copier:" not in notes and f"all {SIZE} and {2 * SIZE}" in notes


def test_every_metric_is_there_with_its_value_inside_its_interval(result):
    names = [metric.name for metric in METRICS if metric.name != "downstream"]
    assert [metric.name for metric in result.metrics] == names
    assert set(result.sets[0].estimates) == set(names)
    for evaluated in (result.real, *result.sets):
        for name, estimate in evaluated.estimates.items():
            if estimate.low is not None:
                assert estimate.low <= estimate.value <= estimate.high, name
                assert estimate.interval
            else:
                assert name.startswith("longest_copy")


def test_every_as_real_metric_has_the_real_texts_own_value(result):
    for metric in result.metrics:
        if metric.better is Better.AS_REAL:
            assert metric.name in result.real.estimates


def test_ngram_shares_are_those_of_ngram_metrics(result):
    for evaluated in (result.real, *result.sets):
        expected = ngram_metrics(evaluated.texts, embedded.BASE)
        for name in ("distinct_3", "duplicate_3", "diversity"):
            assert evaluated.estimates[name].value == expected[name]


def test_a_set_that_copies_the_training_texts_is_caught(result):
    assert value(result, "copier", "copies_of_training") == 1
    assert value(result, "copier", "nearest_training") > value(result, "fresh", "nearest_training")
    assert value(result, "fresh", "copies_of_training") < 0.4
    copied = [t in set(TRAIN) for t in result.sets[0].texts]
    assert value(result, "fresh", "copies_of_training") == np.mean(copied)
    assert value(result, "copier", "longest_copy_of_training") >= 8


def test_a_collapsed_set_looks_bad_and_breaks_nothing(result):
    assert value(result, "collapsed", "vendi") == pytest.approx(1)
    assert value(result, "collapsed", "self_duplicates") == pytest.approx((SIZE - 1) / SIZE)
    assert value(result, "collapsed", "mauve") < value(result, "fresh", "mauve")
    assert "auroc_xgboost" not in result.sets[2].estimates
    assert any(n.startswith("collapsed: no adversarial AUROC") for n in result.notes)


def test_a_twentieth_of_real_texts_is_too_close_to_another(result):
    assert value(result, result.real.name, "close_to_real") == pytest.approx(2 / SIZE)


def test_nearest_real_texts_come_from_held_out_and_training_texts(result):
    copier, training = result.sets[1], result.sets[-1]
    sampled = {*result.real.texts, *training.texts}
    assert all(n.text in sampled for n in copier.nearest_real)
    exact = [t in sampled for t in copier.texts]
    assert [n.similarity > 1 - 1e-6 for n in copier.nearest_real] == exact
    shared = set(result.real.texts) & set(training.texts)
    for real in (result.real, training):
        assert {n.text for n in real.nearest_real} <= sampled
        for text, nearest in zip(real.texts, real.nearest_real, strict=True):
            assert nearest.text != text or text in shared


def test_a_real_text_is_not_its_own_nearest(small):
    texts = small.real.texts
    embeddings = StandInEmbedder().embed(texts)
    for i, (text, nearest) in enumerate(zip(texts, small.real.nearest_real, strict=True)):
        others = [float(embeddings[i] @ e) for j, e in enumerate(embeddings) if j != i]
        assert nearest.text != text
        assert nearest.similarity == pytest.approx(max(others), abs=1e-6)


class MustNotEmbed:
    name = "none"

    def embed(self, texts, report=None):
        raise AssertionError("no metric needs embeddings")


def test_metrics_that_are_named_alone_are_computed_and_equal_those_of_all(small, monkeypatch):
    for name in ("hulls", "adversaries", "neighbours", "Vendi score"):
        monkeypatch.setitem(evaluation.PARTS, name, evaluation.PARTS[name]._replace(compute=None))
    monkeypatch.setattr("steer_engine.evaluate.hulls.reduce", None)
    few = run(**SMALL, metrics=["mauve", "distinct_3"])
    assert [metric.name for metric in few.metrics] == ["distinct_3", "mauve"]
    assert few.sets[0].points == [] and few.sets[0].hull == []
    assert few.sets[0].nearest_real == small.sets[0].nearest_real
    for name in ("distinct_3", "mauve"):
        assert few.sets[0].estimates[name] == small.sets[0].estimates[name]
    assert not any("Too close" in note or "AUROC" in note for note in few.notes)


def test_ngrams_and_copies_need_no_embeddings(small):
    names = ["self_duplicates", "copies_of_real"]
    few = run(**SMALL, metrics=names, embedder=MustNotEmbed())
    assert few.sets[0].estimates == {n: small.sets[0].estimates[n] for n in names}
    assert few.sets[0].nearest_real == [] and few.embedder == ""


def test_every_metric_belongs_to_one_part(result):
    names = [name for part in evaluation.PARTS.values() for name in part.metrics]
    assert sorted(names) == sorted(m.name for m in METRICS if m.name != "downstream")


def test_an_unknown_metric_is_named_with_the_nearest(monkeypatch):
    with pytest.raises(ValueError, match=r"there is no 'mauv'; did you mean 'mauve'\?"):
        run(metrics=["mauv"])
    with pytest.raises(ValueError, match="copies_of_training needs the training texts"):
        run(train=None, metrics=["copies_of_training"])
    for wrong in ([], "mauve"):
        with pytest.raises(ValueError, match="metrics must be a list of names"):
            run(metrics=wrong)


def test_the_same_call_gives_the_same_evaluation(small):
    assert run(**SMALL) == small


def test_json_keeps_an_evaluation(result, tmp_path):
    result.write(tmp_path / "evaluation.json")
    assert Evaluation.read(tmp_path / "evaluation.json") == result


def test_the_best_set_is_the_nearest_to_what_is_good(result):
    def named(metric_name):
        return next(m for m in result.metrics if m.name == metric_name)

    def with_values(metric_name, *values):
        estimates = [
            s.estimates | {metric_name: Estimate(v)}
            for s, v in zip(result.sets, values, strict=True)
        ]
        sets = [replace(s, estimates=e) for s, e in zip(result.sets, estimates, strict=True)]
        return replace(result, sets=sets).best(named(metric_name))

    assert with_values("mauve", 0.3, 0.8, 0.8, 0.9) == ["copier", "collapsed"]
    assert with_values("duplicate_3", 0.3, 0.2, 0.8, 0.1) == ["copier"]
    assert with_values("auroc_xgboost", 0.45, 0.5, 0.51, 0.5) == ["fresh", "copier"]
    real = value(result, result.real.name, "nearest_real")
    assert with_values("nearest_real", real + 0.1, real - 0.05, 1, real) == ["copier"]
    without = replace(result, real=replace(result.real, estimates={}))
    assert without.best(named("nearest_real")) == []


def test_without_training_texts_there_is_no_row_and_no_metric_of_them(small):
    assert [s.name for s in small.sets] == ["fresh"] and small.sample_size == 20
    assert not any("training" in metric.name for metric in small.metrics)
    assert {n.text for n in small.sets[0].nearest_real} <= set(small.real.texts)


def test_what_cannot_be_compared_is_refused_by_name(monkeypatch):
    with pytest.raises(DataError, match="small: holds 3 texts; an evaluation needs at least 20"):
        run(sets={"small": ["a", "b", "c"]})
    with pytest.raises(DataError, match="numbers: real must hold strings"):
        run(sets={"numbers": [1] * 30})
    with pytest.raises(ValueError, match="another name than 'training set'"):
        run(sets={TRAINING_SET: REAL})
    with pytest.raises(ValueError, match="sample_size must be an int"):
        run(sample_size=5)
    with pytest.raises(ValueError, match="sets must be a mapping"):
        run(sets=[])
    monkeypatch.setattr(evaluation, "EXTRA_MODULES", ("no_such_module",))
    with pytest.raises(SteerError, match=r"pip install steer-engine\[eval\]"):
        run()


def write_run(directory, texts, label="") -> None:
    directory.mkdir(parents=True)
    examples = [
        Example(i, label or str(i % 2), "p", text, [1], "stop", [], 1)
        for i, text in enumerate(texts)
    ]
    lines = "".join(example.to_json() + "\n" for example in examples)
    (directory / "examples.jsonl").write_text(lines)


def test_a_run_keeps_its_indices_and_labels_and_loses_its_empty_texts(tmp_path):
    write_run(tmp_path / "run.v1", ["a", "", "b"])
    (read,) = read_sets([tmp_path / "run.v1"])
    assert (read.name, read.num_texts) == ("run.v1", 3)
    assert (read.indices, read.texts, read.labels) == ([0, 2], ["a", "b"], ["0", "0"])


def test_labels_come_from_a_field_of_the_file(tmp_path):
    lines = [{"text": "a", "label": 1}, {"text": " "}, {"text": "b", "label": "x"}]
    (tmp_path / "labelled.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "plain.csv").write_text("text,label\na,0\nb,1\n")
    (tmp_path / "bare.jsonl").write_text('"a"\n{"text": "b", "label": "x"}\n')
    read = read_sets([tmp_path / n for n in ("labelled.jsonl", "plain.csv", "bare.jsonl")])
    assert [s.labels for s in read] == [["1", "x"], ["0", "1"], []]


def test_sets_of_one_name_are_told_apart_by_their_paths(tmp_path):
    for parent in ("x", "y"):
        write_run(tmp_path / parent / "run", ["a"])
    (tmp_path / "z.txt").write_text("a\n")
    paths = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "z.txt", ["a"]]
    assert [s.name for s in read_sets(paths)] == ["x/run", "y/run", "z", "set 4"]
    with pytest.raises(ValueError, match="same source is given twice"):
        read_sets(paths[:1] * 2)


def test_downstream_tells_labels_or_says_why_it_cannot(tmp_path):
    rows = [(text, "heat" if "heats" in text else "other") for text in make_texts(200, 5)]
    real, synthetic = tmp_path / "real.jsonl", tmp_path / "synthetic.jsonl"
    for path, own in ((real, rows[:100]), (synthetic, rows[100:])):
        path.write_text("".join(json.dumps({"text": t, "label": x}) + "\n" for t, x in own))
    cut = [s.cut(60, 0) for s in read_sets([real, synthetic])]
    estimates: list[dict] = [{}, {}]
    notes = evaluation.add_downstream(estimates, cut, StandInEmbedder(), 0)
    assert estimates[1]["downstream"].value > 0.9
    assert estimates[0]["downstream"].interval == "5 splits, least and most"
    assert "telling labels" in notes[0] and "chance" in notes[0]
    assert "no more than chance" not in notes[0]
    shuffled = random.Random(0).sample(cut[0].labels, len(cut[0].labels))
    senseless = replace(cut[0], labels=shuffled)
    notes = evaluation.add_downstream([{}, {}], [senseless, cut[1]], StandInEmbedder(), 0)
    assert "teach no more than chance here" in notes[0]
    bare = [replace(s, labels=[]) for s in cut]
    estimates = [{}, {}]
    notes = evaluation.add_downstream(estimates, [cut[0], bare[1]], StandInEmbedder(), 0)
    assert estimates == [{}, {}] and "no labels" in notes[0]
    notes = evaluation.add_downstream(estimates, bare, StandInEmbedder(), 0)
    assert estimates == [{}, {}] and "neither labels" in notes[0]


def test_importing_the_package_brings_no_heavy_one_along():
    code = "import sys, steer_engine.evaluate; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["scipy", "sklearn", "umap", "numba", "xgboost", "sentence_transformers", "matplotlib"]
    arguments = [sys.executable, "-c", code, *heavy]
    assert subprocess.run(arguments, capture_output=True, text=True).stdout.strip() == "[]"


def test_the_tokenizer_is_the_runs_own_or_a_note_says_so(tmp_path):
    other = tmp_path / "base"
    other.mkdir()
    (other / "tokenizer.json").write_text("{}")
    known, unknown = tmp_path / "known", tmp_path / "unknown"
    for path, base in ((known, embedded.BASE), (unknown, other)):
        path.mkdir()
        digest = evaluation_digest(base)
        content = {"checkpoints": {"base": {"tokenizer.json": digest}}}
        (path / "run.json").write_text(json.dumps(content))
    assert choose_tokenizer(None, [known]) == (embedded.BASE, [])
    assert choose_tokenizer(other, [unknown]) == (other, [])
    assert "unknown was written with another" in choose_tokenizer(None, [known, unknown])[1][0]
    assert "--tokenizer DIR" in choose_tokenizer(None, [tmp_path / "texts.txt"])[1][0]
    (known / "run.json").write_text("{")
    with pytest.raises(SteerError, match=r"run\.json: damaged"):
        choose_tokenizer(None, [known])


def evaluation_digest(base) -> str:
    import hashlib

    return hashlib.sha256((base / "tokenizer.json").read_bytes()).hexdigest()


def call(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["steer-engine", "evaluate", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


def test_the_command_prints_a_table_and_writes_the_evaluation(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(evaluation, "SentenceEmbedder", lambda *_: StandInEmbedder())
    write_run(tmp_path / "run", SETS["fresh"])
    for name, texts in (("real.txt", REAL), ("train.txt", TRAIN)):
        (tmp_path / name).write_text("\n".join(texts))
    real, train = tmp_path / "real.txt", tmp_path / "train.txt"
    arguments = [tmp_path / "run", "--real", real, "--train", train, "--sample-size", 20]
    status, stdout, stderr = call(monkeypatch, capsys, *arguments)
    assert status == 0, stderr
    for shown in ("distinct 3-grams ↑", "copying", TRAINING_SET, "- run: 20 of 30 texts"):
        assert shown in stdout
    assert "MAUVE: " in stderr and "UMAP: " in stderr
    written = Evaluation.read(tmp_path / "run" / "evaluation.json")
    assert written.sample_size == 20 and written.sets[0].source == str(tmp_path / "run")


def test_the_command_computes_the_metrics_that_are_named(monkeypatch, capsys, tmp_path):
    write_run(tmp_path / "run", SETS["fresh"])
    (tmp_path / "real.txt").write_text("\n".join(REAL))
    arguments = [tmp_path / "run", "--real", tmp_path / "real.txt"]
    more = ["--metrics", "distinct_3, copies_of_real", "--no-progress"]
    status, stdout, stderr = call(monkeypatch, capsys, *arguments, *more)
    assert status == 0, stderr
    written = Evaluation.read(tmp_path / "run" / "evaluation.json")
    assert [m.name for m in written.metrics] == ["distinct_3", "copies_of_real"]
    assert "MAUVE" not in stdout
    status, _, stderr = call(monkeypatch, capsys, *arguments, "--metrics", "distinct_4")
    assert status == 2 and "did you mean 'distinct_3'" in stderr


def test_the_command_fails_in_one_line(monkeypatch, capsys, tmp_path):
    status, _, stderr = call(monkeypatch, capsys, tmp_path / "none", "--real", tmp_path / "x.txt")
    assert status == 1
    (line,) = stderr.strip().splitlines()
    assert line == f"error: {tmp_path}/x.txt: no such file"


def test_the_table_marks_the_best_set_and_leaves_gaps_where_a_metric_is_missing(result):
    table = result_table(result)
    columns = {str(c.header): [str(cell) for cell in c.cells] for c in table.columns}
    row = next(i for i, cell in enumerate(columns["metric"]) if "distinct 3-grams" in cell)
    marked = [name for name, cells in columns.items() if "*" in cells[row]]
    assert marked == result.best(result.metrics[0])
    row = next(i for i, cell in enumerate(columns["metric"]) if "XGBoost" in cell)
    assert columns["collapsed"][row] == "-"
    row = next(i for i, cell in enumerate(columns["metric"]) if "duplicates in" in cell)
    assert columns["fresh"][row].startswith("0.000*")
    alone = result_table(replace(result, sets=[result.sets[0], result.sets[-1]]))
    assert not any("*" in str(cell) for column in alone.columns for cell in column.cells)
    assert default_output(embedded.BASE) == embedded.BASE / "evaluation.json"
