"""Sweeps: the grid, its directory, what is compared, the figures, and the command."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from test_cli import call, one_line

from steer_engine import (
    Engine,
    Guidance,
    NegativePrompts,
    RunError,
    SamplingParams,
    SyntheticDataset,
)
from steer_engine.evaluate import Better, Estimate, Evaluation, Group, Metric, SetEvaluation
from steer_engine.report.sweep_figures import sweep_figures, write_figures
from steer_engine.report.sweep_page import write_sweep_report
from steer_engine.report.sweep_table import cell_label, sweep_table
from steer_engine.run_directory import lock_directory
from steer_engine.sweep import SweepCell, check_grid, grid, read_cells, run_sweep
from steer_engine.sweep_results import (
    CellScore,
    Comparison,
    compare_cells,
    evaluate_sweep,
    read_comparison,
)

REAL = ["Where is the ring?", "What was there before?", "Is there another one here?", "Who?"]
METRICS = [
    Metric("distinct_3", "distinct 3-grams", Group.DIVERSITY, Better.HIGHER, "of characters"),
    Metric("duplicate_3", "repeated 3-grams", Group.DIVERSITY, Better.LOWER, "of characters"),
    Metric("mauve", "MAUVE", Group.LIKENESS, Better.HIGHER, "stands for it: share of letters"),
]


# --- the grid


def test_a_grid_holds_every_combination_in_order():
    cells = grid(gamma=[0, 0.2], eta=[0.1], num_negatives=[1, "max"])
    assert cells == [
        SweepCell(0.0, 0.1, 1),
        SweepCell(0.0, 0.1, "max"),
        SweepCell(0.2, 0.1, 1),
        SweepCell(0.2, 0.1, "max"),
    ]
    assert [cell.name for cell in cells] == [
        "gamma-0_eta-0.1_negatives-1",
        "gamma-0_eta-0.1_negatives-max",
        "gamma-0.2_eta-0.1_negatives-1",
        "gamma-0.2_eta-0.1_negatives-max",
    ]
    assert cells[1].label == "gamma 0, eta 0.1, negatives max"


def test_an_axis_without_values_is_not_swept():
    assert [cell.name for cell in grid(gamma=[-0.5, 1])] == ["gamma--0.5", "gamma-1"]
    assert [cell.name for cell in grid()] == ["all"]


def test_cells_of_different_values_have_different_names():
    values = [0.1, 0.1 + 1e-16 * 2, 0.30000000000000004, 0.3, 1e-7, 1e22, 3]
    names = [cell.name for cell in grid(gamma=values)]
    assert len(set(names)) == len(values)
    assert [float(name.removeprefix("gamma-")) for name in names] == values


def test_a_value_given_twice_is_refused():
    with pytest.raises(ValueError, match=r"eta holds 0\.2 twice"):
        grid(eta=[0.2, 0.1, 0.2])
    with pytest.raises(ValueError, match=r"gamma holds 0\.0 twice"):
        grid(gamma=[0.0, -0.0])


# --- the directory


@pytest.fixture(scope="module")
def engine(make_engine) -> Engine:
    return make_engine(max_num_seqs=4)


def requests_of(cells, **changes) -> dict[SweepCell, dict]:
    return {
        cell: {
            "prompt": "Ask a question:",
            "num_examples": 6,
            "real": REAL,
            "guidance": Guidance.steer(cell.gamma, cell.eta, form="released").normalized(),
            "negatives": NegativePrompts(num_examples=cell.num_negatives or 2, lag=2),
            "sampling": SamplingParams(top_p=0.9, max_tokens=8),
        }
        | changes
        for cell in cells
    }


CELLS = grid(gamma=[0, 0.3], eta=[0.1, 0.4], num_negatives=[1, 3])


def test_every_cell_is_the_run_that_it_would_be_alone(engine, tmp_path):
    requests = requests_of(CELLS)
    datasets = run_sweep(engine, requests, tmp_path / "sweep", seed=2)
    assert list(datasets) == CELLS
    for cell, request in requests.items():
        alone = engine.generate_dataset(**request, seed=2, output=tmp_path / cell.name)
        assert list(datasets[cell]) == list(alone)
        for name in ("run.json", "examples.jsonl"):
            swept = tmp_path / "sweep" / "cells" / cell.name / name
            assert swept.read_bytes() == (tmp_path / cell.name / name).read_bytes()
    assert len({tuple(d.texts) for d in datasets.values()}) == len(CELLS)
    assert read_cells(tmp_path / "sweep") == CELLS


def test_a_grid_may_grow_but_not_shrink(engine, tmp_path):
    small, large = grid(gamma=[0, 0.3], eta=[0.1]), grid(gamma=[0, 0.15, 0.3], eta=[0.1, 0.2])
    run_sweep(engine, requests_of(small), tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/*.json*")}
    assert len(kept) == 2 * 3
    datasets = run_sweep(engine, requests_of(large), tmp_path)
    assert len(datasets) == 6 and all(len(d) == 6 for d in datasets.values())
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert read_cells(tmp_path) == large
    with pytest.raises(RunError, match=r"holds the cell gamma-0\.15_eta-0\.1, which is not in"):
        run_sweep(engine, requests_of(small), tmp_path)
    assert read_cells(tmp_path) == large


def test_other_settings_are_refused_before_a_new_cell_is_begun(engine, tmp_path):
    run_sweep(engine, requests_of(CELLS[2:4]), tmp_path)
    with pytest.raises(RunError, match="num_examples was 6, now 7"):
        run_sweep(engine, requests_of(CELLS, num_examples=7), tmp_path)
    assert {p.name for p in tmp_path.glob("cells/*")} == {c.name for c in CELLS[2:4]}
    # The first sweep can still be gone on with.
    assert len(run_sweep(engine, requests_of(CELLS[2:4]), tmp_path)) == 2


def test_what_is_there_is_refused_without_resume(engine, tmp_path):
    requests = requests_of(CELLS[:2])
    run_sweep(engine, requests, tmp_path, resume=False)
    with pytest.raises(RunError, match="holds a sweep already"):
        run_sweep(engine, requests, tmp_path, resume=False)


def test_a_directory_of_a_single_run_is_refused(engine, tmp_path):
    engine.generate_dataset(**requests_of(CELLS)[CELLS[0]], output=tmp_path)
    with pytest.raises(RunError, match="holds a single run"):
        check_grid(tmp_path, CELLS, resume=True)


def test_a_directory_in_use_is_refused(engine, tmp_path):
    lock = lock_directory(tmp_path)
    try:
        with pytest.raises(RunError, match="in use by another process"):
            run_sweep(engine, requests_of(CELLS), tmp_path)
    finally:
        os.close(lock)


def test_a_missing_or_damaged_sweep_is_named(tmp_path):
    with pytest.raises(RunError, match=r"no sweep\.json; give a sweep's directory"):
        read_cells(tmp_path)
    for content in ("", "[]", '{"cells": {"a": {"delta": 1}}}', '{"cells": [1]}'):
        (tmp_path / "sweep.json").write_text(content)
        with pytest.raises(RunError, match="damaged"):
            read_cells(tmp_path)


# --- evaluation


@pytest.fixture
def evaluations(monkeypatch) -> list[dict]:
    """Stands in for the metrics, which have tests of their own; holds the calls' arguments."""
    calls = []

    def evaluate(sets, real, **settings):
        calls.append({"sets": sets, "real": real} | settings)
        return Evaluation(
            metrics=METRICS,
            real=judged("real", "", list(real)),
            sets=[judged(n, str(p), SyntheticDataset.load(p).texts) for n, p in sets.items()],
            sample_size=len(real),
            seed=settings["seed"],
            embedder="none",
        )

    monkeypatch.setattr("steer_engine.evaluate.evaluate", evaluate, raising=False)
    monkeypatch.setattr("steer_engine.cli.sweep_checks.MIN_TEXTS", 1)
    return calls


def judged(name: str, source: str, texts: list[str]) -> SetEvaluation:
    joined = " ".join(texts)
    trigrams = [joined[i : i + 3] for i in range(len(joined) - 2)]
    distinct = len(set(trigrams)) / len(trigrams)
    letters = sum(c.isalpha() for c in joined) / len(joined)
    estimates = {
        "distinct_3": Estimate(distinct, distinct - 0.02, distinct + 0.01, "a bootstrap"),
        "duplicate_3": Estimate(1 - distinct),
        "mauve": Estimate(letters, letters - 0.1, letters + 0.1, "8 clusterings"),
    }
    return SetEvaluation(name, source, len(texts), list(range(len(texts))), texts, estimates)


def test_an_evaluation_is_kept_until_what_it_depends_on_changes(engine, tmp_path, evaluations):
    run_sweep(engine, requests_of(CELLS[:2]), tmp_path)

    def evaluate(**changes):
        settings = {"real": REAL, "tokenizer": engine.tokenizer} | changes
        return evaluate_sweep(tmp_path, **settings)

    first = evaluate()
    assert [s.name for s in first.sets] == [cell.name for cell in CELLS[:2]]
    assert Evaluation.read(tmp_path / "evaluation.json") == first == evaluate()
    assert len(evaluations) == 1
    assert evaluations[0]["metrics"] == ["distinct_3", "mauve"], "no others are computed"
    for changes in ({"real": REAL[:3]}, {"train": REAL}, {"seed": 1}, {"embedder": "other"}):
        num_before = len(evaluations)
        evaluate(**changes)
        evaluate(**changes)
        assert len(evaluations) == num_before + 1, changes
        call = evaluations[-1]
        assert all(call[name] == value for name, value in changes.items())
    num_before = len(evaluations)
    run_sweep(engine, requests_of(CELLS[:3]), tmp_path)
    assert len(evaluate(embedder="other").sets) == 3
    assert len(evaluations) == num_before + 1
    (tmp_path / "comparison.json").write_text("{")
    evaluate(embedder="other")
    assert len(evaluations) == num_before + 2
    evaluate(embedder="other", diversity="vendi")
    assert evaluations[-1]["metrics"] == ["vendi", "mauve"]
    with pytest.raises(ValueError, match=r"'duplicate_3' is no metric that is better when higher"):
        evaluate(diversity="duplicate_3")


def test_the_comparison_of_a_sweep_is_by_the_measures_that_it_was_made_with(
    engine, tmp_path, evaluations
):
    run_sweep(engine, requests_of(CELLS[:3]), tmp_path)
    with pytest.raises(RunError, match="have not been compared; run the same sweep again"):
        read_comparison(tmp_path)
    measures = {"diversity": "mauve", "likeness": "distinct_3"}
    evaluation = evaluate_sweep(tmp_path, REAL, tokenizer=engine.tokenizer, **measures)
    assert read_comparison(tmp_path) == compare_cells(CELLS[:3], evaluation, **measures)
    for content in ("{", "[]", '{"diversity": "mauve"}'):
        (tmp_path / "comparison.json").write_text(content)
        with pytest.raises(RunError, match=r"comparison\.json: damaged"):
            read_comparison(tmp_path)


# --- comparison


def made_comparison(cells, values) -> Comparison:
    """values: (diversity, likeness) of each cell."""
    scores = [
        CellScore(
            cell,
            Estimate(diversity, diversity - 0.02, diversity + 0.03, "a bootstrap"),
            Estimate(likeness),
            [f"text {i} of {cell.name}" for i in range(20)],
        )
        for cell, (diversity, likeness) in zip(cells, values, strict=True)
    ]
    return Comparison(METRICS[0], METRICS[2], scores)


def spread(num_cells: int) -> list[tuple[float, float]]:
    """Values with ties in either measure, and equal pairs."""
    return [(i * 7 % 11 / 11, i * 5 % 13 / 13) for i in range(num_cells - 2)] + [(0.5, 0.5)] * 2


def test_the_front_holds_the_cells_that_no_other_beats():
    cells = grid(gamma=[i / 10 for i in range(40)])
    comparison = made_comparison(cells, spread(40))
    expected = {
        s.cell.name
        for s in comparison.scores
        if not any(
            o.diversity.value >= s.diversity.value
            and o.likeness.value >= s.likeness.value
            and (o.diversity.value > s.diversity.value or o.likeness.value > s.likeness.value)
            for o in comparison.scores
        )
    }
    front = comparison.front
    assert {s.cell.name for s in front} == expected
    assert 1 < len(front) < 40
    for left, right in itertools.pairwise(front):
        assert left.diversity.value <= right.diversity.value
        assert left.likeness.value >= right.likeness.value
    assert comparison.best in front
    assert comparison.best.sum == max(d + v for d, v in spread(40))


def test_equal_cells_are_both_on_the_front():
    comparison = made_comparison(grid(gamma=[0, 1, 2]), [(0.5, 0.5), (0.5, 0.5), (0.4, 0.5)])
    assert [s.cell.gamma for s in comparison.front] == [0, 1]
    assert comparison.best.cell.gamma == 0


def test_cells_are_compared_by_the_metrics_that_are_named(engine, tmp_path, evaluations):
    cells = CELLS[:3]
    run_sweep(engine, requests_of(cells), tmp_path)
    evaluation = evaluate_sweep(tmp_path, REAL, tokenizer=engine.tokenizer)
    comparison = compare_cells(cells, evaluation)
    assert (comparison.diversity, comparison.likeness) == (METRICS[0], METRICS[2])
    for score, cell, own in zip(comparison.scores, cells, evaluation.sets, strict=True):
        assert (score.cell, score.texts) == (cell, own.texts)
        assert score.diversity == own.estimates["distinct_3"]
        assert score.likeness == own.estimates["mauve"]
    swapped = compare_cells(cells, evaluation, diversity="mauve", likeness="distinct_3")
    assert swapped.scores[0].diversity == comparison.scores[0].likeness
    with pytest.raises(ValueError, match=r"'mauv' is no metric .*did you mean 'mauve'"):
        compare_cells(cells, evaluation, likeness="mauv")
    with pytest.raises(ValueError, match=r"'duplicate_3' is no metric .* better when higher"):
        compare_cells(cells, evaluation, diversity="duplicate_3")
    with pytest.raises(ValueError, match="lacks the cell"):
        compare_cells(CELLS, evaluation)


# --- figures

GRIDS = {
    "gamma x eta": ({"gamma": [0, 0.1, 0.2], "eta": [0, 0.3]}, 3 + 2 + 1),
    "all three": ({"gamma": [0, 1], "eta": [0, 1], "num_negatives": [1, 5, "max"]}, 3 + 3 + 1),
    "one parameter": ({"eta": [0, 0.1, 0.2, 0.3], "num_negatives": [5]}, 1 + 1),
    "one cell": ({"gamma": [0.2], "eta": [0.2]}, 1),
}


@pytest.mark.parametrize(("axes", "num_figures"), GRIDS.values(), ids=GRIDS)
def test_every_cell_of_a_figure_opens_its_texts(axes, num_figures):
    cells = grid(**axes)
    comparison = made_comparison(cells, spread(len(cells) + 2)[: len(cells)])
    figures = sweep_figures(comparison)
    assert len({figure.name for figure in figures}) == len(figures) == num_figures
    by_name = {cell.label: cell.name for cell in cells}
    for figure in figures:
        ids = re.findall(r'id="(cell-[^"]+)"', figure.svg)
        assert sorted(ids) == sorted(f"cell-{figure.name}-{i}" for i in range(len(figure.cells)))
        for cell in figure.cells:
            name = by_name[cell.label.split(":")[0]]
            assert cell.examples == [f"text {i} of {name}" for i in range(len(cell.examples))]
            assert len(cell.examples) > 3
        if figure.name in ("sweep-diversity", "sweep-likeness", "sweep-sum", "sweep-trade-off"):
            assert len(figure.cells) == len(cells)
    assert sweep_figures(comparison) == figures, "the same bytes again"


def test_a_heat_map_shows_every_value_in_its_place_and_frames_the_best():
    cells = grid(gamma=[0, 0.1, 0.2], eta=[0, 0.3])
    values = [(0.11, 0.5), (0.22, 0.5), (0.33, 0.5), (0.44, 0.5), (0.55, 0.9), (0.66, 0.5)]
    figures = {f.name: f for f in sweep_figures(made_comparison(cells, values))}
    svg = figures["sweep-diversity"].svg
    x_of, y_of = {}, {}
    for (diversity, _), cell in zip(values, cells, strict=True):
        place = re.search(rf'<text[^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>{diversity}<', svg)
        x, y = (float(v) for v in place.groups())
        assert x_of.setdefault(cell.gamma, x) == pytest.approx(x)
        assert y_of.setdefault(cell.eta, y) == pytest.approx(y)
    assert sorted(x_of, key=x_of.get) == [0, 0.1, 0.2]
    assert sorted(y_of, key=y_of.get) == [0.3, 0]  # upwards
    assert "1.45" in figures["sweep-sum"].svg
    assert len(re.findall(r"fill: none[^>]*stroke-width: 2[;\"]", svg)) == 1


def test_a_curve_goes_through_the_best_cell_and_says_where(tmp_path):
    cells = grid(gamma=[0, 0.1, 0.2], eta=[0, 0.3])
    values = [(0.1, 0.5), (0.2, 0.5), (0.3, 0.5), (0.4, 0.5), (0.5, 0.5), (0.6, 0.9)]
    figures = {f.name: f for f in sweep_figures(made_comparison(cells, values))}
    curve = figures["sweep-gamma"]
    assert "at eta 0.3" in curve.caption and "a bootstrap" in curve.caption
    labels = [cell.label.split(":")[0] for cell in curve.cells]
    assert labels == [f"gamma {v}, eta 0.3" for v in ("0", "0.1", "0.2")] * 2
    assert "best sum 1.50" in curve.svg


def test_figures_are_written_as_files_that_stand_alone(tmp_path):
    cells = grid(gamma=[0, 0.1], eta=[0, 0.3])
    figures = sweep_figures(made_comparison(cells, spread(4)))
    paths = write_figures(figures, tmp_path / "figures")
    assert [path.name for path in paths] == [f"{figure.name}.svg" for figure in figures]
    for path in paths:
        root = ElementTree.fromstring(path.read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", path.read_text())
        assert path.stat().st_size < 40_000


def test_the_page_lists_the_best_cell_and_the_front_in_words_and_rows():
    cells = grid(gamma=[0, 0.1, 0.2], eta=[0, 0.3], num_negatives=[5])
    values = [(0.1, 0.5), (0.2, 0.5), (0.3, 0.5), (0.9, 0.4), (0.5, 0.91), (0.52, 0.9)]
    table = sweep_table(made_comparison(cells, values))
    assert (table.axes, table.measures) == (["gamma", "eta"], ["distinct 3-grams ↑", "MAUVE ↑"])
    assert "Of 6 cells, gamma 0.2 eta 0.3 has the largest sum" in table.words
    assert "3 cells are on the Pareto front" in table.words
    assert "from gamma 0.2 eta 0 with the most MAUVE to gamma 0.1 eta 0.3" in table.words
    assert [row.places for row in table.rows] == [["0.2", "0.3"], ["0.2", "0"], ["0.1", "0.3"]]
    assert [row.sum for row in table.rows] == ["1.42", "1.41", "1.30"]
    assert table.rows[0].verdict == "largest sum, Pareto front"
    assert table.rows[1].verdict == "Pareto front"
    assert table.rows[0].values[0].interval == "0.500 to 0.550"


def test_a_single_cell_is_no_choice():
    table = sweep_table(made_comparison(grid(gamma=[0.2], eta=[0.1]), [(0.5, 0.25)]))
    assert table.words.startswith("One cell, gamma 0.2, eta 0.1; its distinct 3-grams and MAUVE")
    assert (table.axes, [row.sum for row in table.rows]) == ([], ["0.750"])


def test_cells_of_nearly_one_value_have_labels_of_their_own():
    cells = grid(gamma=[0.1, 0.1000000001])
    comparison = made_comparison(cells, [(0.5, 0.4), (0.4, 0.5)])
    labels = [cell_label(score, comparison) for score in comparison.scores]
    assert labels == ["gamma 0.1", "gamma 0.1000000001"]


def test_the_page_of_a_long_front_says_which_cells_it_shows(engine, tmp_path, evaluations):
    cells = grid(gamma=[i / 10 for i in range(10)], eta=[0.1])
    run_sweep(engine, requests_of(cells), tmp_path)
    evaluation = evaluate_sweep(tmp_path, REAL, tokenizer=engine.tokenizer)
    sets = [
        replace(s, estimates={"distinct_3": Estimate(n / 10), "mauve": Estimate(1 - n / 10)})
        for n, s in enumerate(evaluation.sets)
    ]
    replace(evaluation, sets=sets).write(tmp_path / "evaluation.json")
    page = write_sweep_report(tmp_path).read_text(encoding="utf-8")
    assert "the first 8 cells of the Pareto front&#39;s 10" in page
    assert page.count("<td>Pareto front</td>") == 9


def test_cells_whose_intervals_meet_the_best_ones_are_counted():
    def score(gamma: float, diversity: float, likeness: float) -> CellScore:
        estimates = [Estimate(v, v - 0.05, v + 0.05, "a bootstrap") for v in (diversity, likeness)]
        return CellScore(SweepCell(gamma=gamma), *estimates, ["a"])

    scores = [score(0, 0.5, 0.5), score(1, 0.45, 0.45), score(2, 0.5, 0.3), score(3, 0.2, 0.5)]
    words = sweep_table(Comparison(METRICS[0], METRICS[2], scores)).words
    assert "1 other cell has intervals that meet the best cell's" in words


# --- the command


@pytest.fixture
def real(tmp_path) -> Path:
    path = tmp_path / "real.txt"
    path.write_text("\n".join(REAL))
    return path


def sweep_arguments(tiny_models, real, output, *more) -> list:
    options = ["sweep", "--base", tiny_models.base, "--domain", tiny_models.lora, "--real", real]
    options += ["--prompt", "Ask a question:", "--num-examples", 6, "--max-tokens", 8]
    options += ["--max-num-seqs", 4, "--no-progress", "--output", output]
    return [*options, *more]


def test_sweep_writes_cells_evaluation_figures_and_a_table(
    capsys, tiny_models, real, tmp_path, evaluations
):
    output = tmp_path / "sweep"
    more = ["--gamma", "0,0.2", "--eta", "0, 0.1, 0.5", "--num-negatives", "1,max", "--normalize"]
    status, stdout, stderr = call(capsys, *sweep_arguments(tiny_models, real, output, *more))
    assert status == 0, stderr
    assert "sweep: 12 cells of 6 examples" in stderr
    assert "best cells" in stdout and "distinct 3-grams" in stdout and str(output) in stdout
    cells = grid(gamma=[0, 0.2], eta=[0, 0.1, 0.5], num_negatives=[1, "max"])
    assert read_cells(output) == cells
    for cell in cells:
        run = json.loads((output / "cells" / cell.name / "run.json").read_text())
        guidance = Guidance.steer(cell.gamma, cell.eta, form="released").normalized()
        assert run["guidance"]["negative"] == guidance.negative
        assert run["guidance"]["implicit_temperature"] == pytest.approx(1.0)
        assert run["negatives"]["num_examples"] == cell.num_negatives
        assert len(SyntheticDataset.load(output / "cells" / cell.name)) == 6
    assert (output / "evaluation.json").exists()
    assert {p.name for p in (output / "figures").iterdir()} == {
        f"sweep-{name}.svg"
        for name in ("diversity", "likeness", "sum", "gamma", "eta", "num-negatives", "trade-off")
    }
    assert stdout.splitlines()[-1] == f"report: {output / 'report.html'}"
    page = (output / "report.html").read_text(encoding="utf-8")
    for shown in ("Of 12 cells the best comes first: gamma", "Pareto front", "steer-engine sweep"):
        assert shown in page, shown
    assert any(text in page for text in REAL), "negatives have their texts"
    for path in (output / "figures").iterdir():
        assert f'id="figure-{path.stem}"' in page and f'id="cell-{path.stem}-0"' in page
    # The same command again: nothing is run and the same is said.
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    again = call(capsys, *sweep_arguments(tiny_models, real, output, *more))
    assert again[:2] == (0, stdout)
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before
    assert len(evaluations) == 1


def test_held_out_texts_are_compared_with_and_real_ones_are_the_training_set(
    capsys, monkeypatch, tiny_models, real, tmp_path, evaluations
):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("an unseen one\n")
    more = ["--gamma", "0,1", "--held-out", held_out, "--sample-size", 3, "--seed", 4]
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    more += ["--embedder", model, "--diversity", "mauve", "--likeness", "distinct_3"]
    monkeypatch.setattr("steer_engine.cli.sweep_checks.check_number", lambda *_, **__: None)
    status, _, stderr = call(capsys, *sweep_arguments(tiny_models, real, tmp_path / "out", *more))
    assert status == 0, stderr
    (given,) = evaluations
    assert (given["real"], given["train"]) == (["an unseen one"], REAL)
    assert (given["seed"], given["sample_size"]) == (4, 3)
    assert given["embedder"] == str(model) and given["metrics"] == ["mauve", "distinct_3"]


def test_a_run_file_may_hold_lists(capsys, tiny_models, real, tmp_path):
    content = {"gamma": [0, 0.5], "eta": 0.1, "num-negatives": [1, "max"], "evaluate": False}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    more = ["--config", tmp_path / "sweep.yaml", "--eta", "0.2,0.3"]
    status, _, stderr = call(capsys, *sweep_arguments(tiny_models, real, tmp_path / "out", *more))
    assert status == 0, stderr
    expected = grid(gamma=[0, 0.5], eta=[0.2, 0.3], num_negatives=[1, "max"])
    assert read_cells(tmp_path / "out") == expected
    assert not (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--gamma", "0,a"], "--gamma must be numbers with commas, got '0,a'"),
        (["--gamma", "0,0"], "gamma holds 0.0 twice"),
        (["--gamma", "0,nan"], "gamma-nan_negatives-5: gamma must be a number, got nan"),
        (["--num-negatives", "1,few"], "--num-negatives must be an int or max, got 'few'"),
        (["--eta", "0,1", "--normalize"], "eta-1_negatives-5: weights"),
        (["--method", "contrastive", "--eta", "0,1"], "--eta has no meaning with method contra"),
        (["--top-p", 2], "top_p must be a number"),
    ],
)
def test_a_bad_grid_is_named_before_a_model_is_loaded(
    capsys, monkeypatch, tiny_models, real, tmp_path, more, expected
):
    def must_not_load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Engine, "from_pretrained", must_not_load)
    arguments = sweep_arguments(tiny_models, real, tmp_path / "out", *more)
    status, _, stderr = call(capsys, *arguments)
    assert status == 2
    assert expected in one_line(stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "expected_status", "expected"),
    [
        ([], 2, "--num-examples gives 6 texts and a comparison of the cells takes at least 20"),
        (["--num-examples", 20], 2, "--real gives 4 texts"),
        (["--sample-size", 5], 2, "sample_size must be an int in [20, inf), got 5"),
        (["--diversity", "distinct3"], 2, "did you mean 'distinct_3'?"),
        (["--likeness", "auroc_xgboost"], 2, "is no metric that is better when higher"),
        (["--embedder", "nowhere"], 1, "nowhere: not a model directory"),
    ],
)
def test_what_a_comparison_lacks_is_said_before_a_model_is_loaded(
    capsys, monkeypatch, tiny_models, real, tmp_path, more, expected_status, expected
):
    monkeypatch.setattr(Engine, "from_pretrained", None)
    arguments = sweep_arguments(tiny_models, real, tmp_path / "out", "--gamma", "0,1", *more)
    status, _, stderr = call(capsys, *arguments)
    assert status == expected_status
    assert expected in one_line(stderr) and one_line(stderr).endswith("or give --no-evaluate")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["evaluate.evaluation.EXTRA", "cli.sweep_checks.DRAWING"])
def test_a_missing_package_is_named_before_a_model_is_loaded(
    capsys, monkeypatch, tiny_models, real, tmp_path, where
):
    monkeypatch.setattr(Engine, "from_pretrained", None)
    monkeypatch.setattr(f"steer_engine.{where}_MODULES", ("no_such_module",))
    arguments = sweep_arguments(tiny_models, real, tmp_path / "out", "--gamma", "0,1")
    status, _, stderr = call(capsys, *arguments)
    assert status == 1
    assert "no_such_module is not installed; run `pip install" in one_line(stderr)
    assert one_line(stderr).endswith("or give --no-evaluate")


def test_report_of_a_sweep_alone_and_beside_a_run(capsys, tiny_models, real, tmp_path, evaluations):
    output, page = tmp_path / "sweep", tmp_path / "page.html"
    more = ["--gamma", "0,0.2", "--eta", "0,0.1"]
    assert call(capsys, *sweep_arguments(tiny_models, real, output, *more))[0] == 0
    (output / "report.html").unlink()
    status, stdout, stderr = call(capsys, "report", "--sweep", output, "--real", real)
    assert status == 0, stderr
    assert stdout == f"report: {output / 'report.html'}\n"
    shown = (output / "report.html").read_text(encoding="utf-8")
    assert f"steer-engine report --sweep {output}" in shown
    assert (
        "Of 4 cells the best comes first: gamma" in shown and 'id="figure-sweep-trade-off"' in shown
    )
    assert all(text in shown for text in REAL), "negatives have their texts"
    run = output / "cells" / "gamma-0_eta-0.1_negatives-5"
    status, stdout, stderr = call(capsys, "report", run, "--sweep", output, "--output", page)
    assert status == 0 and stdout == f"report: {page}\n", stderr
    shown = page.read_text(encoding="utf-8")
    assert "comes first" not in shown
    assert "has the largest sum of" in shown and 'id="figure-sweep-trade-off"' in shown
    (output / "comparison.json").unlink()
    status, _, stderr = call(capsys, "report", "--sweep", output)
    assert status == 1 and "its cells have not been compared" in one_line(stderr)
    status, _, stderr = call(capsys, "report", "--sweep", output, "--tokenizer", tmp_path)
    assert status == 2 and "are of runs; name their directories" in one_line(stderr)
    status, _, stderr = call(capsys, "report")
    assert status == 2 and "give run directories, or a sweep's directory" in one_line(stderr)


def test_a_sweep_to_be_compared_needs_real_texts(capsys, tiny_models, real, tmp_path):
    arguments = sweep_arguments(tiny_models, real, tmp_path / "out", "--gamma", "0,1")
    at = arguments.index("--real")
    status, _, stderr = call(capsys, *arguments[:at], *arguments[at + 2 :])
    assert status == 2
    assert "give --real or --held-out" in one_line(stderr)


def test_another_grid_in_the_same_directory_is_refused(capsys, tiny_models, real, tmp_path):
    arguments = sweep_arguments(tiny_models, real, tmp_path / "out", "--no-evaluate")
    assert call(capsys, *arguments, "--gamma", "0,0.2")[0] == 0
    status, _, stderr = call(capsys, *arguments, "--gamma", "0,0.4")
    assert status == 1
    assert "holds the cell gamma-0.2_negatives-5, which is not in this grid" in one_line(stderr)
    assert call(capsys, *arguments, "--gamma", "0,0.4,0.2")[0] == 0


def test_an_interrupt_says_how_to_resume(capsys, monkeypatch, tiny_models, real, tmp_path):
    signals = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    step, num_steps = Engine.step, 0

    def interrupting(engine, seed):
        nonlocal num_steps
        num_steps += 1
        if num_steps == 20:
            raise KeyboardInterrupt
        return step(engine, seed)

    monkeypatch.setattr(Engine, "step", interrupting)
    arguments = sweep_arguments(tiny_models, real, tmp_path / "out", "--no-evaluate")
    try:
        status, _, stderr = call(capsys, *arguments, "--gamma", "0,0.2")
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
    assert status == 130
    num_safe = int(re.search(r"interrupted: (\d+) examples are safe", stderr)[1])
    assert 0 < num_safe < 12
    assert num_safe == sum(
        len(SyntheticDataset.load(p.parent)) for p in tmp_path.glob("out/cells/*/examples.jsonl")
    )
    assert call(capsys, *arguments, "--gamma", "0,0.2")[0] == 0
