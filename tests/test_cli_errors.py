"""Wrong input to every command: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import json

import pytest
from helpers import call, one_line

from steer_engine import Engine, embedded
from steer_engine.evaluate import embeddings

GENERATE = ["generate", "--base", embedded.BASE, "--prompt", "x", "--num-examples", 2]
SWEEP = ["sweep", *GENERATE[1:], "--no-evaluate"]


@pytest.fixture(autouse=True)
def in_new_directory(monkeypatch, tmp_path):
    """Texts, and directories of every kind; no model may be loaded."""

    def must_not_load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Engine, "from_pretrained", must_not_load)
    monkeypatch.setattr(embeddings.SentenceEmbedder, "embed", must_not_load)
    monkeypatch.chdir(tmp_path)
    for name in ("texts.txt", "others.txt"):
        lines = [f"What is the use of {name} number {i} here?\n" for i in range(30)]
        (tmp_path / name).write_text("".join(lines))
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for kind, marker in (("run", "run"), ("sweep", "sweep"), ("adapter", "finetune")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"{marker}.json").write_text("{}")
    (tmp_path / "sweep" / "cells").mkdir()


@pytest.mark.parametrize(
    ("arguments", "expected", "command"),
    [
        (["genrate"], "no such command 'genrate'. Did you mean 'generate'", ""),
        (["--version"], "no such option: --version", ""),
        (["generate", "--gama", 1], "no such option: --gama (Possible options:", " generate"),
        (["generate", "--seed", "x"], "invalid value for '--seed'", " generate"),
        (["generate", "more"], "got unexpected extra argument(s) (more)", " generate"),
        (["generate", "--base"], "option '--base' requires an argument", ""),
        (["demo", "--num-examples", 0], "should be greater than or equal to 1", " demo"),
        (["evaluate"], "missing argument 'RUN'", " evaluate"),
        (["evaluate", "run"], "missing option '--real'", " evaluate"),
        (["prepare"], "missing argument 'RECIPE'", " prepare"),
        (["win-rate", "exprt"], "no such command 'exprt'. Did you mean 'export'?", " win-rate"),
        (["win-rate", "score"], "missing argument 'DIR'", " win-rate score"),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_help(capsys, arguments, expected, command):
    status, stdout, stderr = call(capsys, *arguments)
    assert (status, stdout) == (2, "")
    assert expected in one_line(stderr)
    # In front of it stands how the program was started.
    assert " (see `" in stderr and stderr.endswith(f"{command} --help`)\n")
    assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["win-rate"]])
def test_a_group_without_a_command_shows_its_help(capsys, arguments):
    status, stdout, stderr = call(capsys, *arguments)
    assert status == 2
    assert (stdout + stderr).startswith("Usage: ") and "Commands:" in stdout + stderr


@pytest.mark.parametrize("name", ["base", "output"])
@pytest.mark.parametrize("command", [GENERATE, SWEEP], ids=["generate", "sweep"])
def test_an_empty_path_is_a_missing_one(capsys, command, name):
    status, _, stderr = call(capsys, *command, "--output", "new", f"--{name}", "")
    assert status == 2
    assert one_line(stderr) == f"error: --{name} is required"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([*GENERATE, "--output", "sweep"], "sweep: holds a sweep; choose another output"),
        ([*GENERATE, "--output", "adapter"], "adapter: holds a fine-tune; choose another output"),
        (["demo", "--output", "sweep"], "sweep: holds a sweep; choose another output"),
        ([*SWEEP, "--output", "run"], "run: holds a single run; choose another output"),
        ([*SWEEP, "--output", "adapter"], "adapter: holds a fine-tune; choose another output"),
    ],
)
def test_a_directory_of_another_kind_is_refused_and_left_alone(capsys, arguments, expected):
    status, _, stderr = call(capsys, *arguments)
    assert status == 1
    assert one_line(stderr) == f"error: {expected}"


@pytest.mark.parametrize("command", [GENERATE, SWEEP], ids=["generate", "sweep"])
def test_a_run_that_lost_its_settings_is_left_alone(capsys, tmp_path, command):
    (tmp_path / "empty" / "examples.jsonl").write_text("")
    status, _, stderr = call(capsys, *command, "--output", "empty")
    assert status == 1
    assert "empty: has examples.jsonl but no run.json" in one_line(stderr)


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_an_adapter_is_not_written_into_a_directory_of_another_kind(capsys, tmp_path, kind):
    arguments = ["--base", embedded.BASE, "--train", "texts.txt", "--prompt", "x"]
    status, _, stderr = call(capsys, "finetune", *arguments, "--output", kind)
    assert status == 1
    assert "; choose another output" in one_line(stderr)
    assert not list((tmp_path / kind).glob("*.jsonl"))


@pytest.mark.parametrize("name", ["nowhere", "empty", "file"])
def test_real_examples_are_read_before_a_model_is_loaded(capsys, name):
    status, _, stderr = call(capsys, *GENERATE, "--output", "new", "--real", name)
    assert status == 1
    assert one_line(stderr).startswith(f"error: {name}: ")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nowhere.yaml", "nowhere.yaml: cannot be read (No such file or directory)"),
        ("empty", "empty: cannot be read (Is a directory)"),
    ],
)
@pytest.mark.parametrize("option", ["--prompts", "--config"])
def test_a_missing_yaml_file_is_named_without_error_numbers(capsys, option, name, expected):
    arguments = ["generate", "--base", embedded.BASE, "--num-examples", 2, "--output", "new"]
    status, _, stderr = call(capsys, *arguments, option, name)
    assert status == 2
    assert one_line(stderr) == f"error: {expected}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nowhere", "nowhere: no such file or directory"),
        ("empty", "empty: no examples.jsonl; give a run directory"),
        ("sweep", "sweep: no examples.jsonl; give a run directory, such as those in sweep/cells"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [["evaluate", "--real", "texts.txt"], ["win-rate", "export", "texts.txt", "--output", "new"]],
    ids=["evaluate", "win-rate"],
)
def test_a_set_that_is_none_is_named(capsys, command, source, expected):
    status, _, stderr = call(capsys, *command, source)
    assert status == 1
    assert one_line(stderr) == f"error: {expected}"


@pytest.mark.parametrize(
    "command",
    [
        ["prepare", "research-questions", "texts.txt"],
        # With the metrics of meaning, so that a model would be loaded first.
        ["evaluate", "texts.txt", "--real", "others.txt"],
    ],
    ids=["prepare", "evaluate"],
)
@pytest.mark.parametrize(
    ("output", "reason"), [("empty", "Is a directory"), ("file/new.json", "File exists")]
)
def test_a_file_that_cannot_be_written_is_named(capsys, tmp_path, command, output, reason):
    status, _, stderr = call(capsys, *command, "--output", output)
    assert status == 1
    expected = f"error: {output}: cannot be written ({reason}); choose another output"
    assert one_line(stderr) == expected
    assert not list(tmp_path.glob("*.partial"))


def test_pairs_that_cannot_be_written_are_named(capsys):
    arguments = ["win-rate", "export", "texts.txt", "others.txt", "--output", "file"]
    status, _, stderr = call(capsys, *arguments)
    assert status == 1
    assert "file/key.json: cannot be written (File exists)" in one_line(stderr)


def test_a_list_of_no_metrics_is_refused_as_empty(capsys):
    arguments = ["evaluate", "texts.txt", "--real", "others.txt", "--metrics", " , "]
    status, _, stderr = call(capsys, *arguments)
    assert status == 2
    assert one_line(stderr) == "error: metrics must be a list of names, not empty"


def test_commas_around_metrics_do_no_harm(capsys, tmp_path):
    arguments = ["evaluate", "texts.txt", "--real", "others.txt", "--metrics", "distinct_3,"]
    status, _, stderr = call(capsys, *arguments, "--no-progress", "--output", "new/result.json")
    assert status == 0, stderr
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    assert [metric["name"] for metric in result["metrics"]] == ["distinct_3"]


def test_every_command_takes_debug(capsys):
    assert call(capsys, "info", "--debug")[0] == 0
