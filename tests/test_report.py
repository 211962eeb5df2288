"""Reports: what the page says, and what it does in a browser."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from browser import Browser, find_chromium
from report_data import METRICS, PROMPT, make_evaluation, real_texts, write_run
from test_cli import call, one_line

from steer_engine import Guidance, embedded
from steer_engine.dataset import Example
from steer_engine.embedded.demo_report import write_demo_report
from steer_engine.errors import DataError, RunError
from steer_engine.evaluate import (
    TRAINING_SET,
    Better,
    Estimate,
    Evaluation,
    Group,
    Metric,
    NearestReal,
    SetEvaluation,
)
from steer_engine.report import Cell, Figure, cell_id, house_style, to_svg, write_report
from steer_engine.report.figures import similarity_figure
from steer_engine.report.runs import load_runs, misfit
from steer_engine.report.summary import summarize
from steer_engine.report.sweep_table import SweepRow, SweepTable
from steer_engine.report.table import Value, format_number, metric_rows, rank

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='hacked = 1'> {{ 7 * 7 }} $x$"
)
GUIDANCE = {
    "steer": Guidance.recommended(),
    "nucleus": Guidance.none(),
    "base-model": Guidance(domain=0.0, base=1.0),
}
SWEEP_TABLE = SweepTable(
    f"Of 2 cells {HOSTILE}.",
    ["gamma"],
    ["distinct 3-grams ↑"],
    [SweepRow(["0.2"], [Value("0.812", "0.800 to 0.823", "a bootstrap")], "1.42", "Pareto front")],
)
needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="chromium is not on PATH")


class Setting(NamedTuple):
    """Three runs on disk and their evaluation."""

    runs: list[Path]
    texts: list[list[str]]
    real: list[str]
    evaluation: Evaluation


def make_setting(root: Path, num_texts: int) -> Setting:
    real = real_texts(num_texts + 5)
    texts = [real_texts(num_texts, seed=1 + n) for n in range(len(GUIDANCE))]
    texts[0][4] = HOSTILE
    runs = [
        write_run(root / name, each, real=real, guidance=guidance, has_negatives=name == "steer")
        for (name, guidance), each in zip(GUIDANCE.items(), texts, strict=True)
    ]
    by_name = dict(zip(GUIDANCE, zip(runs, texts, strict=True), strict=True))
    return Setting(runs, texts, real, make_evaluation(by_name, real))


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("setting"), 60)


def sweep_figure() -> Figure:
    """A heat map of two cells."""
    from matplotlib.figure import Figure as Drawing

    with house_style():
        drawing = Drawing(figsize=(3, 2))
        panel = drawing.subplots()
        for index in range(2):
            panel.bar([index], [1])[0].set_gid(cell_id("grid", index))
        svg = to_svg(drawing, "grid", "two cells")
    cells = [Cell("gamma 0", ["a plain sample"]), Cell("gamma 0.2", [HOSTILE, "one more"])]
    return Figure("grid", "Grid", "Two cells.", svg, cells)


@pytest.fixture(scope="module")
def page(setting, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(
        path, setting.evaluation, runs=setting.runs, real=[setting.real], sweep=[sweep_figure()],
        sweep_table=SWEEP_TABLE,
        notes=["A note <i>in words</i>."], command="steer-engine report runs/steer",
    )  # fmt: skip
    return path


class PageReader(HTMLParser):
    """Collects tags, ids, visible text, and the JSON that the page carries."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.payloads: dict[str, dict] = {}
        self._inside = ""
        self._payload = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.text += " "
        if tag in ("script", "style"):
            self._inside = tag
            self._payload = dict(attrs).get("id")

    def handle_endtag(self, tag):
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data):
        if self._inside == "script" and self._payload:
            self.payloads[self._payload] = json.loads(data)
        elif not self._inside:
            self.text += data


def test_page_is_one_file_that_asks_for_nothing(page):
    reader = PageReader(page)
    for tag, attributes in reader.tags:
        assert tag not in ("iframe", "object", "embed", "base")
        assert "src" not in attributes
        for name in ("href", "xlink:href"):
            target = attributes.get(name, "#")
            assert target.startswith("#") or target == "data:,", (tag, target)
    content = page.read_text(encoding="utf-8")
    assert not re.search(r"@import|url\((?!#)", content)
    policies = [a["content"] for t, a in reader.tags if a.get("http-equiv")]
    assert policies and policies[0].startswith("default-src 'none'")


def test_page_of_a_thousand_examples_a_set_and_eight_figures_stays_below_3_mb(tmp_path):
    setting = make_setting(tmp_path, 1000)
    path = tmp_path / "report.html"
    write_report(path, setting.evaluation, runs=setting.runs, real=[setting.real])
    reader = PageReader(path)
    assert sum(tag == "svg" for tag, _ in reader.tags) == 6
    assert len(reader.payloads["payload"]["examples"]) == 3000
    # Six figures here, two more of the largest kind still fit.
    assert path.stat().st_size < 2_400_000


def test_long_texts_are_left_out_evenly_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("steer_engine.report.examples.MAX_BYTES", 6000)
    setting = make_setting(tmp_path, 60)
    write_report(tmp_path / "report.html", runs=setting.runs, real=[setting.real])
    payload = PageReader(tmp_path / "report.html").payloads["payload"]
    per_set = [sum(e["set"] == n for e in payload["examples"]) for n in range(3)]
    assert max(per_set) - min(per_set) <= 1 and 5 <= sum(per_set) < 60
    assert payload["num_left_out"] == 180 - sum(per_set)


def test_same_arguments_give_the_same_bytes(setting, page, tmp_path):
    again = tmp_path / "again.html"
    write_report(
        again, setting.evaluation, runs=setting.runs, real=[setting.real], sweep=[sweep_figure()],
        sweep_table=SWEEP_TABLE,
        notes=["A note <i>in words</i>."], command="steer-engine report runs/steer",
    )  # fmt: skip
    assert again.read_bytes() == page.read_bytes()


def test_ids_are_unique_and_every_reference_has_its_target(page):
    reader = PageReader(page)
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    content = page.read_text(encoding="utf-8")
    references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', content))
    assert references and references <= set(ids)
    cells = PageReader(page).payloads["cells"]
    assert {cell_id(name, n) for name, each in cells.items() for n in range(len(each))} <= set(ids)


def test_what_a_model_wrote_is_never_markup(page):
    reader = PageReader(page)
    assert not any("onerror" in attributes for _, attributes in reader.tags)
    assert sum(tag == "script" for tag, _ in reader.tags) == 3
    assert "A note <i>in words</i>." in reader.text
    payload = reader.payloads["payload"]
    hostile = [e for e in payload["examples"] if payload["texts"][e["text"]] == HOSTILE]
    assert [(e["set"], e["index"]) for e in hostile] == [(0, 4)]
    assert reader.payloads["cells"]["grid"][1] == {
        "label": "gamma 0.2",
        "examples": [HOSTILE, "one more"],
    }


def test_negatives_are_resolved_to_the_texts_that_the_run_drew_from(setting, page):
    payload = PageReader(page).payloads["payload"]
    example = next(e for e in payload["examples"] if e["set"] == 0 and e["index"] == 11)
    shown = {name: payload["texts"][number] for name, number in example["negatives"]}
    assert shown == {"real/11": setting.real[11], "synthetic/5": setting.texts[0][5]}
    nearest = setting.evaluation.sets[0].nearest_real[11]
    assert payload["texts"][example["nearest"][0]] == nearest.text
    assert example["nearest"][1] == pytest.approx(nearest.similarity, abs=1e-4)


def test_negatives_from_other_real_texts_are_named_but_not_invented(setting, tmp_path):
    path = tmp_path / "report.html"
    write_report(path, runs=setting.runs, real=[setting.real[1:]])
    payload = PageReader(path).payloads["payload"]
    example = next(e for e in payload["examples"] if e["set"] == 0 and e["index"] == 11)
    assert example["negatives"][0] == ["real/11", -1]
    assert payload["texts"][example["negatives"][1][1]] == setting.texts[0][5]


def test_report_without_evaluation_has_settings_lengths_and_examples(setting, tmp_path):
    path = tmp_path / "report.html"
    write_report(path, runs=setting.runs[:1])
    reader = PageReader(path)
    sections = {attributes["id"] for tag, attributes in reader.tags if tag == "section"}
    assert sections == {"settings", "shapes", "examples", "method"}
    assert "This report has no metrics" in reader.text
    assert len(reader.payloads["payload"]["examples"]) == 60


def test_report_without_runs_shows_the_evaluated_sets(setting, tmp_path):
    path = tmp_path / "report.html"
    write_report(path, setting.evaluation)
    payload = PageReader(path).payloads["payload"]
    assert payload["sets"] == ["steer", "nucleus", "base-model"]
    assert [payload["texts"][e["text"]] for e in payload["examples"]] == [
        text for texts in setting.texts for text in texts
    ]


def test_sets_without_a_source_are_all_shown(setting, tmp_path):
    sets = [replace(one_set, source="") for one_set in setting.evaluation.sets]
    write_report(tmp_path / "report.html", replace(setting.evaluation, sets=sets))
    payload = PageReader(tmp_path / "report.html").payloads["payload"]
    assert payload["sets"] == ["steer", "nucleus", "base-model"]


def test_page_of_many_short_texts_in_another_script_stays_below_3_mb(tmp_path):
    texts = [f"Как звёзды {n} теряют газ?" for n in range(20_000)]
    run = write_run(tmp_path / "run", texts, real=texts[:50], guidance=Guidance.none())
    path = tmp_path / "report.html"
    write_report(path, runs=[run], real=[texts[:50]])
    assert 1_400_000 < path.stat().st_size < 1_700_000
    payload = PageReader(path).payloads["payload"]
    assert payload["texts"][0] == texts[0] and payload["num_left_out"] > 1000


def test_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a run directory or an evaluation"):
        write_report(tmp_path / "report.html")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["<b>$a_b$", "研究 & вопросы"])
def test_a_run_of_any_name_is_shown_as_it_is(setting, tmp_path, name):
    run = write_run(tmp_path / name, setting.texts[0], real=setting.real, guidance=Guidance.none())
    write_report(tmp_path / "report.html", runs=[run])
    reader = PageReader(tmp_path / "report.html")
    assert reader.text.count(name) >= 3
    assert not any(tag == "b" for tag, _ in reader.tags)


def test_settings_that_differ_stand_beside_each_other(page):
    text = " ".join(PageReader(page).text.split())
    assert "guidance · domain 1.2 1 0" in text
    assert "guidance · implicit temperature 1.25 1 1" in text
    assert f"prompt {PROMPT}" in text and "sampling · top p 0.9" in text


def test_python_call_of_a_run_repeats_its_settings(page):
    text = PageReader(page).text
    assert "guidance=Guidance(domain=1.2, base=-0.2, negative=-0.2)," in text
    assert "sampling=SamplingParams(top_p=0.9, stop=('?',))," in text
    assert "negatives=NegativePrompts(lag=64)," in text
    assert f"prompt='{PROMPT}'" in text and "seed=7" in text


def test_labels_have_their_prompts_and_their_texts(setting, tmp_path):
    prompts = {"toxic": "Write a toxic comment:", "kind": "Write a kind comment:"}
    run = write_run(
        tmp_path / "run", setting.texts[0], real=setting.real, guidance=Guidance.none(),
        prompts=prompts,
    )  # fmt: skip
    write_report(tmp_path / "report.html", runs=[run])
    reader = PageReader(tmp_path / "report.html")
    assert "generated for 2 prompts" in reader.text
    for label, prompt in prompts.items():
        assert label in reader.text and prompt in reader.text
    assert {e["label"] for e in reader.payloads["payload"]["examples"]} == set(prompts)


def test_summary_is_made_from_the_numbers(setting):
    runs = load_runs(setting.runs)
    words = summarize(runs, setting.evaluation, metric_rows(setting.evaluation))
    assert words.startswith("steer holds 60 texts that were generated for")
    assert "Beside it stand nucleus and base-model; all are compared with the same 65" in words
    assert "On diversity, steer is best in none of 3 metrics and level with the best in 1" in words
    assert "(distinct 3-grams 0.840; real texts 0.860)" in words
    assert "no texts of steer copy a real one" in words


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"), (1e-9, "0"), (0.00123, "0.0012"), (0.5, "0.500"), (1.234, "1.23"),
        (-12.34, "-12.3"), (1234.5, "1,234"), (float("nan"), "n/a"), (100.0, "100"),
        (9.0, "9"), (1.0, "1.00"),
    ],
)  # fmt: skip
def test_numbers_are_shown_with_three_digits(value, shown):
    assert format_number(value) == shown


def test_bounds_take_the_decimals_of_their_value():
    assert [format_number(v, 0.01) for v in (0.0094, 0.0106)] == ["0.009", "0.011"]


def evaluation_of(metric: Metric, real: float | None, *values: Estimate | None) -> Evaluation:
    """Sets a, b, ... with one estimate each."""

    def one_set(name: str, estimate: Estimate | None) -> SetEvaluation:
        estimates = {} if estimate is None else {metric.name: estimate}
        return SetEvaluation(name, "", 1, [0], ["text"], estimates)

    held = one_set("real", None if real is None else Estimate(real))
    sets = [one_set("abcdef"[n], value) for n, value in enumerate(values)]
    return Evaluation([metric], held, sets, 1, 0, "none")


def metric_with(better: Better) -> Metric:
    return Metric("m", "m", Group.DIVERSITY, better, "A metric.")


@pytest.mark.parametrize(
    ("better", "real", "marks"),
    [
        (Better.HIGHER, None, ["", "level", "best"]),
        (Better.LOWER, None, ["best", "", ""]),
        (Better.AS_REAL, 0.5, ["", "best", "level"]),
        (Better.AS_REAL, None, ["", "", ""]),
    ],
)
def test_best_follows_the_direction_of_the_metric(better, real, marks):
    values = Estimate(0.1, 0.0, 0.2), Estimate(0.6, 0.5, 0.8), Estimate(0.9, 0.7, 1.0)
    metric = metric_with(better)
    assert rank(metric, evaluation_of(metric, real, *values)) == marks


def test_nothing_is_best_of_one_set_or_of_equals():
    metric = metric_with(Better.HIGHER)
    assert rank(metric, evaluation_of(metric, None, Estimate(0.1), None)) == ["", ""]
    assert rank(metric, evaluation_of(metric, None, Estimate(0.1), Estimate(0.1))) == ["", ""]


def test_training_texts_stand_in_the_table_but_do_not_compete(setting, tmp_path):
    metric = metric_with(Better.HIGHER)
    values = evaluation_of(metric, None, Estimate(0.1), Estimate(0.2), Estimate(0.9))
    named = [*values.sets[:2], replace(values.sets[2], name=TRAINING_SET)]
    assert rank(metric, replace(values, sets=named)) == ["", "best", ""]
    sets = [*setting.evaluation.sets[:2], replace(setting.evaluation.sets[2], name=TRAINING_SET)]
    write_report(tmp_path / "report.html", replace(setting.evaluation, sets=sets))
    reader = PageReader(tmp_path / "report.html")
    assert reader.payloads["payload"]["sets"] == ["steer", "nucleus"]
    assert TRAINING_SET in reader.text


def test_metric_that_no_set_has_is_left_out(page):
    assert METRICS[-1].title not in PageReader(page).text
    assert METRICS[0].meaning in PageReader(page).text


def test_figures_keep_text_as_text_and_follow_the_colour_scheme():
    figure = sweep_figure()
    assert "<text" in figure.svg and "font-family" not in figure.svg
    assert "var(--muted, #6b6864)" in figure.svg
    assert figure.svg == sweep_figure().svg
    assert 'role="group"' in figure.svg and "<style" not in figure.svg


def test_similarity_figure_outlines_the_real_texts_own_nearness(setting):
    evaluation = setting.evaluation
    without = similarity_figure(evaluation)
    assert "The line is" not in without.caption
    own = [NearestReal(text, 0.5) for text in evaluation.real.texts]
    figure = similarity_figure(replace(evaluation, real=replace(evaluation.real, nearest_real=own)))
    assert "The line is real texts and the nearest other one" in figure.caption
    # One outline in the panel of each set, which opens nothing.
    assert figure.svg.count("var(--ink") == without.svg.count("var(--ink") + len(evaluation.sets)
    assert figure.cells == without.cells


def test_a_single_metric_of_a_group_is_said_in_plain_words(setting):
    def words(marks: list[str]) -> str:
        rows = metric_rows(setting.evaluation)
        row = next(row for row in rows["diversity"] if any(v.mark for v in row.values))
        values = [replace(v, mark=mark) for v, mark in zip(row.values, marks, strict=True)]
        return summarize([], setting.evaluation, {"diversity": [replace(row, values=values)]})

    assert "On diversity, steer is best (" in words(["best", "", ""])
    assert "On diversity, steer is level with the best (" in words(["level", "best", ""])
    assert "On diversity, steer is not best (" in words(["", "best", ""])


def test_evaluation_of_other_texts_does_not_fit(setting):
    runs, evaluation = load_runs(setting.runs), setting.evaluation
    assert misfit(evaluation, runs, setting.real) is None
    assert misfit(evaluation, runs, []) is None
    assert "other real texts" in misfit(evaluation, runs, ["another", *setting.real[1:]])
    changed = replace(evaluation.sets[1], texts=[*evaluation.sets[1].texts[:-1], "another"])
    sets = [evaluation.sets[0], changed, evaluation.sets[2]]
    assert "has changed" in misfit(replace(evaluation, sets=sets), runs, [])
    assert "does not hold" in misfit(replace(evaluation, sets=sets[1:]), runs, [])
    grown = replace(evaluation.sets[0], num_texts=59)
    assert "59 examples then" in misfit(replace(evaluation, sets=[grown, *sets[1:]]), runs, [])
    with pytest.raises(ValueError, match="does not fit"):
        write_report(setting.runs[0] / "r.html", replace(evaluation, sets=sets), runs=setting.runs)


def test_damaged_run_is_named(setting, tmp_path):
    with pytest.raises(RunError, match=r"no examples\.jsonl"):
        write_report(tmp_path / "report.html", runs=[tmp_path])
    run = write_run(tmp_path / "run", ["a"], real=setting.real, guidance=Guidance.none())
    (run / "run.json").write_text("[]")
    with pytest.raises(RunError, match=r"run\.json: damaged"):
        write_report(tmp_path / "report.html", runs=[run])
    (run / "run.json").unlink()
    with pytest.raises(RunError, match=r"no run\.json"):
        write_report(tmp_path / "report.html", runs=[run])


def test_runs_of_one_name_are_told_apart(setting, tmp_path):
    runs = [
        write_run(tmp_path / parent / "run", ["a text"], real=[], guidance=Guidance.none())
        for parent in ("one", "two")
    ]
    assert [run.name for run in load_runs(runs)] == ["one/run", "two/run"]


def test_command_uses_the_evaluation_in_the_first_run(capsys, setting, tmp_path):
    setting.evaluation.write(setting.runs[0] / "evaluation.json")
    output = tmp_path / "report.html"
    try:
        status, stdout, _ = call(capsys, "report", *setting.runs, "--output", output)
    finally:
        (setting.runs[0] / "evaluation.json").unlink()
    assert status == 0 and stdout.splitlines()[-1] == f"report: {output}"
    reader = PageReader(output)
    assert "MAUVE" in reader.text and f"steer-engine report {setting.runs[0]}" in reader.text


def test_command_refuses_a_given_evaluation_that_does_not_fit(capsys, setting, tmp_path):
    path = tmp_path / "evaluation.json"
    replace(setting.evaluation, sets=setting.evaluation.sets[1:]).write(path)
    arguments = ["report", *setting.runs, "--evaluation", path, "--output", tmp_path / "r.html"]
    status, _, stderr = call(capsys, *arguments)
    assert status == 1 and "does not hold" in one_line(stderr)
    assert not (tmp_path / "r.html").exists()


def test_command_without_evaluation_writes_a_report_into_the_run(capsys, setting, tmp_path):
    run = write_run(tmp_path / "run", setting.texts[0], real=setting.real, guidance=Guidance.none())
    status, stdout, _ = call(capsys, "report", run)
    assert status == 0 and stdout.splitlines()[-1] == f"report: {run / 'report.html'}"
    assert "This report has no metrics" in PageReader(run / "report.html").text


def test_empty_texts_and_empty_runs_can_be_reported(tmp_path):
    run = write_run(tmp_path / "run", ["", "a"], real=[], guidance=Guidance.none())
    write_report(tmp_path / "report.html", runs=[run])
    (run / "examples.jsonl").write_text("")
    write_report(tmp_path / "empty.html", runs=[run])
    assert PageReader(tmp_path / "empty.html").payloads["payload"]["examples"] == []
    failed = Example(0, "", PROMPT, "", [], "rejected", [], 10)
    (run / "examples.jsonl").write_text(failed.to_json() + "\n")
    write_report(tmp_path / "failed.html", runs=[run])
    assert PageReader(tmp_path / "failed.html").payloads["payload"]["examples"] == []


def test_demo_report_shows_the_baselines_and_says_what_is_missing(tmp_path, monkeypatch):
    def too_small(*_, **__):
        raise DataError("runs/demo: holds 3 texts; an evaluation needs at least 20")

    monkeypatch.setattr("steer_engine.evaluate.evaluate", too_small, raising=False)
    request = embedded.demo_request() | {
        "num_examples": 3, "output": str(tmp_path / "demo"), "seed": 0, "progress": False,
    }  # fmt: skip
    engine = embedded.load_pair()
    engine.generate_dataset(**request)
    path = write_demo_report(engine, request)
    assert path == tmp_path / "demo" / "report.html"
    reader = PageReader(path)
    payload = reader.payloads["payload"]
    assert payload["sets"] == ["demo", "nucleus", "base-model"]
    assert [e["index"] for e in payload["examples"]] == [0, 1, 2] * 3
    negatives = [n for e in payload["examples"] for n in e["negatives"]]
    assert len(negatives) == 15 and all(number >= 0 for _, number in negatives)
    assert "No metrics: runs/demo: holds 3 texts" in reader.text
    assert "fine-tuned on the real texts" in reader.text


def test_command_evaluates_where_no_evaluation_fits(capsys, setting, tmp_path, monkeypatch):
    asked = []

    def evaluate(sets, real, *, train, tokenizer, progress):
        asked.append((sets, real, train, tokenizer))
        return setting.evaluation

    command = ModuleType("steer_engine.evaluate.command")
    command.choose_tokenizer = lambda given, _: (given, ["A note about tokens."])
    monkeypatch.setitem(sys.modules, command.__name__, command)
    monkeypatch.setattr("steer_engine.evaluate.evaluate", evaluate, raising=False)
    real = tmp_path / "real.txt"
    real.write_text("\n".join(setting.real), encoding="utf-8")
    arguments = [*setting.runs, "--real", real, "--tokenizer", tmp_path]
    try:
        for name in ("one.html", "two.html"):
            status, _, _ = call(capsys, "report", *arguments, "--output", tmp_path / name)
            assert status == 0
    finally:
        (setting.runs[0] / "evaluation.json").unlink()
    # The second report found what the first one had written.
    by_name = {run.name: str(run) for run in setting.runs}
    assert asked == [(by_name, real, None, tmp_path)]
    assert "A note about tokens." in PageReader(tmp_path / "two.html").text


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


SHOWN = "[...document.querySelectorAll('#list .text')].map(e => e.textContent)"


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_page_opens_without_errors_and_does_not_scroll_sideways(browser, page, width, dark):
    browser.open(page.as_uri(), width=width, dark=dark)
    assert browser.errors == [] and browser.requests == [page.as_uri()]
    assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.run("window.hacked") is None
    # The metrics table is wider than a phone and scrolls inside its own container.
    table = "document.querySelector('.metrics').parentElement"
    is_wider = browser.run(f"{table}.scrollWidth > {table}.clientWidth")
    assert is_wider == (width == 390)


@needs_chromium
def test_dark_scheme_turns_the_figures_too(browser, page):
    colour = "getComputedStyle(document.querySelector('#figure-map text')).fill"
    paper = "getComputedStyle(document.body).backgroundColor"
    browser.open(page.as_uri())
    light = browser.run(colour), browser.run(paper)
    browser.open(page.as_uri(), dark=True)
    dark = browser.run(colour), browser.run(paper)
    assert light[0] != dark[0] and light[1] != dark[1]


@needs_chromium
def test_search_in_the_address_filters_and_marks(browser, page, setting):
    browser.open(f"{page.as_uri()}#q=Pulsar+cycle&set=1")
    expected = [t for t in setting.texts[1] if "pulsar" in t.lower() and "cycle" in t]
    assert expected and browser.run(SHOWN) == expected[:20]
    assert browser.run("count.textContent") == f"{len(expected)} of 180 examples"
    marks = browser.run("[...document.querySelectorAll('mark')].map(e => e.textContent)")
    assert set(marks) == {"pulsar", "cycle"}


@needs_chromium
def test_typing_filters_and_writes_the_address(browser, page):
    browser.open(page.as_uri())
    browser.run("document.querySelector('#query').focus()")
    browser.send("Input.insertText", text="</script>")
    browser.run("new Promise(done => setTimeout(done, 300))")
    assert browser.run(SHOWN) == [HOSTILE]
    assert browser.run("location.hash") == "#q=%3C%2Fscript%3E"
    assert browser.run("window.hacked") is None and browser.errors == []


@needs_chromium
def test_examples_are_shown_twenty_at_a_time(browser, page):
    browser.open(page.as_uri())
    assert browser.run("list.children.length") == 20
    browser.run("more.click()")
    assert browser.run("list.children.length") == 40
    for _ in range(7):
        browser.run("more.click()")
    assert browser.run("list.children.length") == 180 and browser.run("more.hidden")


@needs_chromium
def test_examples_can_be_ordered_by_nearness_to_real_texts(browser, page, setting):
    browser.open(f"{page.as_uri()}#order=near&set=0")
    nearest = setting.evaluation.sets[0].nearest_real
    order = sorted(range(60), key=lambda n: -round(nearest[n].similarity, 4))
    assert browser.run(SHOWN) == [setting.texts[0][n] for n in order[:20]]


@needs_chromium
def test_an_example_opens_its_negatives_and_its_nearest_real_text(browser, page, setting):
    browser.open(page.as_uri())
    item = "document.querySelector('#list > li:nth-child(12)')"
    browser.run(f"{item}.querySelectorAll('details').forEach(d => d.open = true)")
    browser.run("new Promise(done => setTimeout(done, 100))")
    text = browser.run(f"{item}.textContent")
    assert setting.real[11] in text and setting.texts[0][5] in text
    assert setting.evaluation.sets[0].nearest_real[11].text in text


@needs_chromium
def test_a_cell_opens_its_samples_by_mouse_and_by_keyboard(browser, page):
    browser.open(page.as_uri())
    cell = "document.getElementById('cell-grid-1')"
    is_open, samples = (
        "document.querySelector('dialog').open",
        "document.querySelector('dialog ul')",
    )
    browser.run(f"{cell}.dispatchEvent(new MouseEvent('click', {{bubbles: true}}))")
    assert browser.run(is_open)
    assert browser.run(f"[...{samples}.children].map(e => e.textContent)") == [HOSTILE, "one more"]
    browser.press("Escape")
    assert not browser.run(is_open)
    browser.run("document.getElementById('cell-grid-0').focus()")
    browser.press("Enter")
    assert browser.run(is_open)
    assert browser.run(f"{samples}.textContent") == "a plain sample"
    assert browser.run("document.querySelector('#samples-title').textContent") == "gamma 0"
    browser.press("Escape")
    browser.press("ArrowRight")
    assert browser.run("document.activeElement.id") == "cell-grid-1"
    browser.press("Enter")
    assert browser.run("document.querySelector('#samples-title').textContent") == "gamma 0.2"
    assert browser.errors == []


@needs_chromium
def test_three_thousand_examples_are_searched_without_a_wait(browser, tmp_path):
    setting = make_setting(tmp_path, 1000)
    path = tmp_path / "report.html"
    write_report(path, setting.evaluation, runs=setting.runs, real=[setting.real])
    browser.open(path.as_uri())
    times = browser.run(
        """(() => { const times = [];
        for (const word of ['galaxies', 'case 99', 'nothing like it', '']) {
          query.value = word;
          const start = performance.now();
          chosenSet.dispatchEvent(new Event('change'));
          times.push(performance.now() - start);
        }
        return times; })()""".replace("chosenSet", "document.getElementById('chosen-set')")
    )
    # A few milliseconds on an idle machine; CI is not one.
    assert len(times) == 4 and max(times) < 500, times
