"""The command line as a user calls it: options, run files, errors, interrupts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import call, hf_model, lora_model, one_line, save

from steer_engine import Engine, SyntheticDataset, embedded
from steer_engine.cli.demo import new_directory

PROMPT = "the question in the"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny base and a LoRA adapter for it."""
    root = tmp_path_factory.mktemp("pair")
    base = save(hf_model(), root / "base")
    lora_model(base).save_pretrained(root / "adapter")
    return base, root / "adapter"


@pytest.fixture
def real(tmp_path) -> Path:
    path = tmp_path / "real.txt"
    path.write_text("the ring\nan inquiry on the hour\none thing\n")
    return path


def generate_arguments(pair, output, *more, num_examples=6) -> list:
    base, adapter = pair
    options = ["generate", "--base", base, "--domain", adapter, "--prompt", PROMPT]
    options += ["--num-examples", num_examples, "--output", output, "--max-tokens", 8]
    return [*options, "--max-num-seqs", 4, "--no-progress", *more]


def test_generate_writes_a_data_set_and_says_what_it_did(capsys, pair, real, tmp_path):
    status, stdout, stderr = call(
        capsys, *generate_arguments(pair, tmp_path / "run", "--real", real)
    )
    assert status == 0
    assert stderr.startswith(
        "guidance: 1.2 domain -0.2 base -0.2 negative; implicit temperature 1.25"
    )
    assert "num examples" in stdout and "examples.jsonl" in stdout
    dataset = SyntheticDataset.load(tmp_path / "run")
    assert [e.index for e in dataset] == list(range(6))
    assert all(e.negatives for e in dataset)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        ".lock",
        "examples.jsonl",
        "run.json",
        "summary.json",
    }


def test_every_option_reaches_the_run(capsys, pair, real, tmp_path):
    more = ["--real", real, "--gamma", 0.3, "--eta", 0.1, "--form", "paper", "--alpha", 0.01]
    more += ["--num-negatives", 2, "--lag", 3, "--share", 2, "--separator", "|", "--seed", 7]
    more += ["--template", "{examples}", "--negative-max-tokens", 50, "--temperature", 0.8]
    more += ["--top-p", 0.7, "--top-k", 40, "--min-tokens", 2, "--stop", "zz", "--stop", "yy"]
    more += ["--stop-token-ids", "5,6", "--ignore-eos", "--no-include-stop", "--until", 0.0]
    more += ["--until-window", 4, "--max-attempts", 3, "--dtype", "float32"]
    more += ["--backend", "reference", "--device", "cpu", "--max-model-len", 200]
    status, _, stderr = call(capsys, *generate_arguments(pair, tmp_path / "run", *more))
    assert status == 0, stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["guidance"] == {
        "domain": 1.1,
        "base": -0.3,
        "negative": 0.9,
        "alpha": 0.01,
        "implicit_temperature": pytest.approx(1 / 1.7),
    }
    assert run["negatives"] == {
        "num_examples": 2,
        "template": "{examples}",
        "separator": "|",
        "lag": 3,
        "share": 2,
        "max_tokens": 50,
    }
    assert run["sampling"] == {
        "temperature": 0.8,
        "top_p": 0.7,
        "top_k": 40,
        "max_tokens": 8,
        "min_tokens": 2,
        "stop": ["zz", "yy"],
        "stop_token_ids": [5, 6],
        "ignore_eos": True,
        "include_stop": False,
    }
    assert run["until"] == {"tolerance": 0.0, "window": 4}
    assert (run["seed"], run["max_attempts"]) == (7, 3)
    machine = run["engine"]
    assert (machine["dtype"], machine["backend"]) == ("float32", "reference")
    assert (machine["max_num_seqs"], machine["max_model_len"]) == (4, 200)


def test_a_run_file_holds_the_same_names_and_the_command_line_comes_first(
    capsys, pair, real, tmp_path
):
    base, adapter = pair
    run_file = tmp_path / "run.yaml"
    run_file.write_text(
        f"base: {base}\ndomain: {adapter}\nreal: {real}\nprompts:\n  a: the one\n  b: the other\n"
        "num-examples: 9\ngamma: 1\nstop: zz\nnum_negatives: max\nmax_tokens: 6\nprogress: false\n"
    )
    status, _, stderr = call(
        capsys, "generate", "--config", run_file, "--output", tmp_path / "run", "--num-examples", 4
    )
    assert status == 0, stderr
    dataset = SyntheticDataset.load(tmp_path / "run")
    assert [e.label for e in dataset] == ["a", "b", "a", "b"]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["guidance"]["base"] == -1.0
    assert run["negatives"]["num_examples"] == "max"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("gama: 0.4", "unknown option 'gama'; did you mean 'gamma'?"),
        ("top_p: high", "top_p must be of type float, got 'high'"),
        ("seed: true", "seed must be of type int, got True"),
        ("- a\n- b", "must hold a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_run_file_is_refused_before_anything_is_loaded(capsys, tmp_path, content, expected):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    started_at = time.monotonic()
    status, _, stderr = call(capsys, "generate", "--config", path, "--base", "nowhere")
    assert status == 2
    assert expected in one_line(stderr)
    assert time.monotonic() - started_at < 2


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--top-p", 1.5], "top_p must be a number in (0, 1], got 1.5"),
        (["--alpha", 2], "alpha"),
        (["--method", "stear"], "did you mean 'steer'?"),
        (["--method", "cfg", "--gamma", 1], "--gamma has no meaning with method cfg"),
        (["--method", "top-k", "--top-p", 0.5], "--top-p has no meaning with method top_k"),
        (["--method", "greedy", "--in-context"], "needs real examples"),
        (["--in-context"], "--in-context has no meaning with method steer, which is the default"),
        (["--form", "printed"], "form must be 'paper' or 'released'"),
        (["--num-negatives", "many"], "--num-negatives must be an int or max"),
        (["--prompts", "file"], "give either --prompt TEXT or --prompts FILE"),
        (["--template", "no place"], "template must hold {examples}"),
        (["--stop-token-ids", "a"], "--stop-token-ids must be ints"),
        (["--device", "tpu"], "device must be"),
        (["--dtype", "int3"], "dtype must be"),
        (["--backend", "triton"], "backend triton is not available"),
        (["--backend", "abc"], "backend must be"),
        (["--max-num-seqs", 0], "max_num_seqs must be an int in [1"),
        (["--max-model-len", 5000], "over the model's context"),
        (["--seed", -1], "seed must be"),
    ],
)
def test_bad_arguments_are_named_with_status_2(capsys, pair, tmp_path, more, expected):
    status, _, stderr = call(capsys, *generate_arguments(pair, tmp_path / "run", *more))
    assert status == 2
    assert expected in one_line(stderr)


def test_gamma_without_a_domain_model_is_an_error(capsys, pair, tmp_path):
    options = ["generate", "--base", pair[0], "--prompt", "x", "--num-examples", 2]
    status, _, stderr = call(capsys, *options, "--output", tmp_path / "run", "--gamma", 0.2)
    assert status == 2
    assert "--gamma has no meaning with method none" in one_line(stderr)


def test_without_a_domain_model_plain_nucleus_sampling_is_used(capsys, pair, tmp_path):
    options = ["generate", "--base", pair[0], "--prompt", "x", "--num-examples", 2]
    options += ["--output", tmp_path / "run", "--max-tokens", 4, "--no-progress"]
    status, _, stderr = call(capsys, *options)
    assert status == 0
    assert stderr.startswith("guidance: 1 domain +0 base +0 negative")


@pytest.mark.parametrize(
    ("more", "weights", "shape"),
    [
        (["nucleus"], (1, 0, 0), (1.0, 0.9, 0)),
        (["top-k"], (1, 0, 0), (1.0, 1.0, 50)),
        (["top_k", "--top-k", 7, "--temperature", 0.5], (1, 0, 0), (0.5, 1.0, 7)),
        (["temperature", "--temperature", 1.2], (1, 0, 0), (1.2, 1.0, 0)),
        (["greedy", "--in-context"], (0, 0, 1), (0.0, 1.0, 0)),
        (["contrastive-search", "--in-context", "--top-k", 3], (0, 0, 1), (1.0, 1.0, 0)),
        (["contrastive", "--gamma", 0.5], (1, -0.5, 0), (1.0, 0.9, 0)),
        (["negative", "--eta", 0.5], (1, 0, -0.5), (1.0, 0.9, 0)),
        (["cfg", "--top-p", 1], (1.5, 0, -0.5), (1.0, 1.0, 0)),
    ],
)
def test_a_method_by_name_reaches_the_run(capsys, pair, real, tmp_path, more, weights, shape):
    more = ["--real", real, "--num-negatives", 2, "--method", *more]
    arguments = generate_arguments(pair, tmp_path / "run", *more, num_examples=2)
    status, _, stderr = call(capsys, *arguments)
    assert status == 0, stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert tuple(run["guidance"][name] for name in ("domain", "base", "negative")) == weights
    assert tuple(run["sampling"][name] for name in ("temperature", "top_p", "top_k")) == shape
    if "contrastive-search" in more:
        assert run["search"] == {"top_k": 3, "penalty_alpha": 0.6}


@pytest.mark.parametrize("missing", ["base", "num-examples", "output"])
def test_a_missing_option_is_named(capsys, pair, tmp_path, missing):
    options = generate_arguments(pair, tmp_path / "run")
    at = options.index(f"--{missing}")
    status, _, stderr = call(capsys, *options[:at], *options[at + 2 :])
    assert status == 2
    assert f"--{missing} is required" in one_line(stderr)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--base", "nowhere", "nowhere: no such directory"),
        ("--domain", "nowhere", "nowhere: no such directory"),
        ("--real", "nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("--real", "data.xlsx", "data.xlsx: must be a .jsonl, .csv, .parquet, .txt file"),
    ],
)
def test_missing_inputs_fail_with_status_1(capsys, pair, tmp_path, option, value, expected):
    status, _, stderr = call(capsys, *generate_arguments(pair, tmp_path / "run", option, value))
    assert status == 1
    assert expected in one_line(stderr)


def test_other_settings_on_a_run_directory_are_refused_by_name(capsys, pair, real, tmp_path):
    output = tmp_path / "run"
    assert call(capsys, *generate_arguments(pair, output, "--real", real))[0] == 0
    before = (output / "examples.jsonl").read_bytes()
    status, _, stderr = call(
        capsys, *generate_arguments(pair, output, "--real", real, "--eta", 0.5)
    )
    assert status == 1
    assert "guidance.negative was -0.2, now -0.5" in one_line(stderr)
    status, _, stderr = call(
        capsys, *generate_arguments(pair, output, "--real", real, "--no-resume")
    )
    assert status == 1
    assert "holds a run already" in one_line(stderr)
    assert (output / "examples.jsonl").read_bytes() == before


def test_an_output_that_cannot_be_written_fails_before_the_model_is_loaded(
    capsys, monkeypatch, pair, tmp_path
):
    def must_not_load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Engine, "from_pretrained", must_not_load)
    (tmp_path / "file").write_text("")
    status, _, stderr = call(capsys, *generate_arguments(pair, tmp_path / "file" / "run"))
    assert status == 1
    assert "cannot be written" in one_line(stderr)


def test_debug_shows_the_traceback(pair, tmp_path):
    arguments = ["generate", "--base", "nowhere", "--prompt", "x", "--num-examples", "1"]
    arguments += ["--output", str(tmp_path / "run"), "--debug"]
    done = subprocess.run(
        [sys.executable, "-m", "steer_engine", *arguments], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_cleanly_says_how_to_resume_and_loses_nothing(
    capsys, pair, real, tmp_path, signal_number
):
    output = tmp_path / "run"
    num_examples = 4000
    options = [*generate_arguments(pair, output, "--real", real, num_examples=num_examples)]
    command = [sys.executable, "-m", "steer_engine", *map(str, options)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    examples = output / "examples.jsonl"
    deadline = time.monotonic() + 60
    while not (examples.exists() and examples.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal_number)
    stderr = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "Traceback" not in stderr
    num_safe = len(SyntheticDataset.load(output))
    assert 0 < num_safe < num_examples
    assert f"interrupted: {num_safe} examples are safe in {output}" in stderr
    assert "run the same command to resume" in stderr


def test_an_interrupt_before_the_first_example_still_says_how_to_resume(
    capsys, monkeypatch, pair, tmp_path
):
    def interrupted(*_):
        raise KeyboardInterrupt

    # Hashing large checkpoints takes a while, and the run directory is not written yet.
    monkeypatch.setattr(Engine, "sha256", interrupted)
    signals = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        status, _, stderr = call(capsys, *generate_arguments(pair, tmp_path / "run"))
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
    assert status == 130
    assert "interrupted: 0 examples are safe" in stderr
    assert "run the same command to resume" in stderr


def test_info_lists_versions_and_backends(capsys):
    status, stdout, _ = call(capsys, "info")
    assert status == 0
    for word in ("steer-engine", "torch", "backend reference", "backend cpu", "backend cuda"):
        assert word in stdout


def test_demo_writes_questions_with_the_embedded_pair(tmp_path):
    arguments = ["demo", "--num-examples", "8", "--output", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "steer_engine", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "base model alone" in done.stdout and "STEER" in done.stdout
    assert done.stdout.splitlines()[-1] == f"report: {tmp_path / 'run' / 'report.html'}"
    assert (tmp_path / "run" / "report.html").is_file()
    dataset = SyntheticDataset.load(tmp_path / "run")
    assert len(dataset) == 8
    assert all(e.prompt == embedded.PROMPT and e.text for e in dataset)
    assert sum(e.finish_reason == "stop" and e.text.endswith("?") for e in dataset) >= 6


def test_demo_without_output_takes_a_new_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert new_directory(Path("runs"), "demo") == Path("runs/demo")
    Path("runs/demo").mkdir(parents=True)
    assert new_directory(Path("runs"), "demo") == Path("runs/demo-2")


def test_help_brings_no_heavy_package_along():
    code = """
import sys
from steer_engine.cli import main
try:
    main()
finally:
    print([name for name in sys.argv[2].split(",") if name in sys.modules])
"""
    heavy = "transformers,peft,datasets,pandas,pyarrow,scipy,sklearn,umap,numba,xgboost,"
    heavy += "sentence_transformers,matplotlib,jinja2,triton"
    arguments = [sys.executable, "-c", code, "--help", heavy]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Commands:" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_lists_the_commands_in_the_order_of_their_use(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, stdout, _ = call(capsys, "--help")
    listed = stdout.split("Commands:\n")[1].splitlines()
    assert status == 0
    assert [line.split()[0] for line in listed] == [
        "demo", "generate", "evaluate", "sweep", "report", "finetune", "prepare", "win-rate",
        "info",
    ]  # fmt: skip
    assert "..." not in stdout.split("Options:")[1], "a command's help is cut off"


def test_help_says_defaults_as_one_would_write_them(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, stdout, _ = call(capsys, "generate", "--help")
    words = " ".join(stdout.split())
    assert status == 0
    assert "cuda or cuda:N. [default: auto]" in words
    assert "Keep the stop string in the text. [default: on]" in words
    assert "Text between two negative examples. [default: ' ']" in words
    assert "The instruction that every example answers. --prompts" in words
