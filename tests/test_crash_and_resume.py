"""A run that dies is resumed to the same bytes: at every durable call, and by kill -9.

STEER_KILLS sets the number of kill -9 (8 by default).
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import time
from pathlib import Path

import pytest

from steer_engine import (
    Engine,
    Guidance,
    NegativePrompts,
    SamplingParams,
    SyntheticDataset,
    run_directory,
)
from steer_engine.sweep import grid, run_sweep

NUM_KILLS = int(os.environ.get("STEER_KILLS", "8"))
REAL = ["Where is the ring?", "What was there before?", "Is there another one here?", "Who?"]


def short(text: str) -> bool:
    """Accepts about two thirds of what the tiny model writes."""
    return len(text) % 3 != 0


def generate(engine: Engine, output: Path, num_examples: int, max_tokens: int) -> SyntheticDataset:
    return engine.generate_dataset(
        {"a": "Ask a question:", "b": "Another:"},
        num_examples,
        REAL,
        negatives=NegativePrompts(num_examples=3, lag=2, share=2),
        sampling=SamplingParams(top_p=0.9, max_tokens=max_tokens, ignore_eos=True),
        accept=short,
        max_attempts=2,
        seed=5,
        output=output,
    )


# --- death at every durable call


class Died(BaseException):
    """What a process that is gone raises; no handler of errors may catch it."""


class Disk:
    """Counts the durable calls below a directory (os.open for writing, write, fsync, replace,
    ftruncate) and dies at one of them: before it, half way through a write, or behind it. The dead
    make no more durable calls.
    """

    CALLS = ("open", "write", "fsync", "replace", "ftruncate")

    def __init__(self, directory: Path, *, die_at: int | None = None, mode: str = "before"):
        self.directory, self.die_at, self.mode = str(directory), die_at, mode
        self.calls: list[str] = []
        self.is_dead = False
        self.num_synced_bytes = 0  # of examples.jsonl: acknowledged
        self._real = {name: getattr(os, name) for name in self.CALLS}
        self._leaked: list[int] = []

    def __enter__(self) -> Disk:
        for name in self.CALLS:
            setattr(os, name, lambda *args, name=name: self._call(name, *args))
        return self

    def __exit__(self, *exception) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)
        for descriptor in self._leaked:
            os.close(descriptor)

    def _path(self, name: str, args: tuple) -> str:
        if name in ("open", "replace"):
            return os.path.abspath(args[0])
        return os.readlink(f"/proc/self/fd/{args[0]}")

    def _call(self, name: str, *args):
        real = self._real[name]
        path = self._path(name, args)
        reads = name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR)
        if reads or not path.startswith(self.directory):
            return real(*args)
        if self.is_dead:
            raise Died
        self.calls.append(name)
        if len(self.calls) == self.die_at:
            self.is_dead = True
            self._die(name, args)
        result = real(*args)
        if name == "fsync" and path.endswith("examples.jsonl"):
            self.num_synced_bytes = os.path.getsize(path)
        return result

    def _die(self, name: str, args: tuple) -> None:
        real = self._real[name]
        if self.mode == "half" and name == "write":
            real(args[0], bytes(args[1])[: len(args[1]) // 2])
        elif self.mode == "after":
            result = real(*args)
            if name == "open":
                self._leaked.append(result)
        raise Died


NUM_EXAMPLES = 7


@pytest.fixture(scope="module")
def engine(make_engine) -> Engine:
    return make_engine(max_num_seqs=3)


@pytest.fixture(scope="module")
def undisturbed(engine, tmp_path_factory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    dataset = generate(engine, path, NUM_EXAMPLES, 6)
    assert dataset.failed and dataset.summary["num_rejected_attempts"]
    return {name: (path / name).read_bytes() for name in ("run.json", "examples.jsonl")}


@pytest.fixture(autouse=True)
def sync_every_line(monkeypatch):
    """So that every line has its own fsync to die at."""
    monkeypatch.setattr(run_directory, "SYNC_INTERVAL_S", 0.0)


def die(engine: Engine, path: Path, die_at: int, mode: str) -> Disk:
    with Disk(path, die_at=die_at, mode=mode) as disk, contextlib.suppress(Died):
        generate(engine, path, NUM_EXAMPLES, 6)
    return disk


def lines_on_disk(path: Path) -> list[bytes]:
    """Complete lines; none if the file is not there yet."""
    file = path / "examples.jsonl"
    return file.read_bytes().split(b"\n")[:-1] if file.exists() else []


def check_resumed(engine: Engine, path: Path, undisturbed: dict[str, bytes], where: str) -> None:
    survived = lines_on_disk(path)
    assert survived == undisturbed["examples.jsonl"].split(b"\n")[: len(survived)], where
    is_complete = (path / "summary.json").exists()
    dataset = generate(engine, path, NUM_EXAMPLES, 6)
    if not is_complete:  # no complete line is drawn again
        assert dataset.summary["num_resumed"] == len(survived), where
    for name, content in undisturbed.items():
        assert (path / name).read_bytes() == content, f"{where}: {name}"
    assert (path / "summary.json").exists(), where


@pytest.fixture(scope="module")
def num_calls(engine, undisturbed, tmp_path_factory) -> int:
    path = tmp_path_factory.mktemp("counted") / "run"
    with Disk(path) as disk:
        generate(engine, path, NUM_EXAMPLES, 6)
    # The lock; run.json: open, write, fsync, replace, fsync of the folder; examples.jsonl: open,
    # two fsyncs, one write each, at least one fsync; summary.json as run.json.
    assert disk.calls[:6] == ["open", "open", "write", "fsync", "replace", "fsync"]
    assert disk.calls[-5:] == ["open", "write", "fsync", "replace", "fsync"]
    assert disk.calls.count("write") == NUM_EXAMPLES + 2
    assert disk.num_synced_bytes == len(undisturbed["examples.jsonl"])
    return len(disk.calls)


@pytest.mark.parametrize("mode", ["before", "half", "after"])
def test_death_at_any_durable_call_loses_nothing(engine, tmp_path, undisturbed, num_calls, mode):
    num_torn = 0
    for die_at in range(1, num_calls + 1):
        path = tmp_path / f"run{die_at}"
        disk = die(engine, path, die_at, mode)
        where = f"died {mode} call {die_at} of {num_calls} ({disk.calls[-1]})"
        assert disk.is_dead, where
        written = (path / "examples.jsonl").read_bytes() if disk.num_synced_bytes else b""
        acknowledged = undisturbed["examples.jsonl"][: disk.num_synced_bytes]
        assert written.startswith(acknowledged), f"{where}: an acknowledged line is lost"
        num_torn += bool(written) and not written.endswith(b"\n")
        check_resumed(engine, path, undisturbed, where)
    if mode == "half":
        assert num_torn >= NUM_EXAMPLES - 1, "the test is to tear lines"


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_power_loss_loses_only_what_was_not_synced(
    engine, tmp_path, undisturbed, num_calls, share
):
    """What was written and not synced may be gone, in whole or in part."""
    num_lost = 0
    for die_at in range(1, num_calls + 1):
        path = tmp_path / f"run{die_at}"
        disk = die(engine, path, die_at, "half")
        file = path / "examples.jsonl"
        if file.exists():
            num_unsynced = file.stat().st_size - disk.num_synced_bytes
            num_lost += num_unsynced > 0
            os.truncate(file, disk.num_synced_bytes + int(share * num_unsynced))
        check_resumed(engine, path, undisturbed, f"power lost at call {die_at} of {num_calls}")
    assert num_lost >= NUM_EXAMPLES


def test_a_resumed_run_may_die_again_at_any_durable_call(engine, tmp_path, undisturbed, num_calls):
    """First a death that tears a line in the middle, then one at each call of the resumed run, the
    cut of the torn line included.
    """
    with Disk(tmp_path / "first") as counting:
        generate(engine, tmp_path / "first", NUM_EXAMPLES, 6)
    writes = [i + 1 for i, name in enumerate(counting.calls) if name == "write"]
    torn = tmp_path / "torn"
    die(engine, torn, writes[4], "half")
    assert not (torn / "examples.jsonl").read_bytes().endswith(b"\n")
    num_deaths, cuts = 0, 0
    while True:
        path = tmp_path / f"run{num_deaths}"
        shutil.copytree(torn, path)
        disk = die(engine, path, num_deaths + 1, ("before", "half", "after")[num_deaths % 3])
        if not disk.is_dead:
            break
        num_deaths += 1
        cuts += "ftruncate" in disk.calls
        check_resumed(engine, path, undisturbed, f"died again at call {num_deaths}")
    assert num_deaths > 10 and cuts


def test_death_while_models_run_loses_nothing(engine, tmp_path, undisturbed):
    forward = engine.model.forward
    num_forwards = 0

    def counting(*args):
        nonlocal num_forwards
        num_forwards += 1
        return forward(*args)

    engine.model.forward = counting
    generate(engine, tmp_path / "counted", NUM_EXAMPLES, 6)
    assert num_forwards > 20
    for dies_in in range(1, num_forwards, 6):
        path = tmp_path / f"run{dies_in}"
        num_left = dies_in

        def dying(*args):
            nonlocal num_left
            num_left -= 1
            if num_left == 0:
                raise Died
            return forward(*args)

        engine.model.forward = dying
        try:
            with pytest.raises(Died):
                generate(engine, path, NUM_EXAMPLES, 6)
        finally:
            engine.model.forward = forward
        check_resumed(engine, path, undisturbed, f"died in forward {dies_in}")


def test_another_batch_composition_after_a_resume_changes_nothing(engine, tmp_path, undisturbed):
    """Cut after every line, so that every example is once the first of a fresh batch."""
    lines = undisturbed["examples.jsonl"].splitlines(keepends=True)
    for num_lines in range(len(lines) + 1):
        path = tmp_path / f"run{num_lines}"
        path.mkdir()
        (path / "run.json").write_bytes(undisturbed["run.json"])
        (path / "examples.jsonl").write_bytes(b"".join(lines[:num_lines]))
        check_resumed(engine, path, undisturbed, f"cut after line {num_lines}")


# --- kill -9

NUM_KILLED_EXAMPLES, KILLED_MAX_TOKENS = 120, 16


def run_in_a_process(base: Path, lora: Path, output: Path, is_ready) -> None:
    # Device, dtype and backend as a user gets them.
    engine = Engine.from_pretrained(base, lora, max_num_seqs=5)
    is_ready.set()
    generate(engine, output, NUM_KILLED_EXAMPLES, KILLED_MAX_TOKENS)


@pytest.fixture
def start(process_context, tiny_models):
    """Start a function of this file on an output directory; returns once its models are loaded."""

    def start(target, output: Path):
        is_ready = process_context.Event()
        arguments = (tiny_models.base, tiny_models.lora, output, is_ready)
        process = process_context.Process(target=target, args=arguments, daemon=True)
        process.start()
        assert is_ready.wait(120), "the process did not load its models"
        return process

    return start


def finish(process) -> float:
    """Seconds until a process ends well."""
    started_at = time.monotonic()
    process.join(120)
    assert process.exitcode == 0
    return time.monotonic() - started_at


@pytest.mark.timeout(60 + 20 * NUM_KILLS)
def test_kill_9_at_random_moments_and_resume_give_the_same_bytes(start, tmp_path):
    generator = random.Random(0)
    undisturbed = tmp_path / "undisturbed"
    duration_s = finish(start(run_in_a_process, undisturbed))
    expected = (undisturbed / "examples.jsonl").read_bytes()
    assert expected.count(b"\n") == NUM_KILLED_EXAMPLES

    num_killed = num_midway = num_runs = 0
    while num_killed < NUM_KILLS:
        output = tmp_path / f"run{num_runs}"
        num_runs += 1
        survived: list[bytes] = []
        while not (output / "summary.json").exists() and num_killed < NUM_KILLS:
            process = start(run_in_a_process, output)
            # Two or three kills a run; the first of all as soon as the run may have begun.
            process.join(generator.uniform(0, 0.6 * duration_s) if num_killed else 0.0)
            if process.is_alive():
                process.kill()
                num_killed += 1
            process.join(60)
            assert process.exitcode in (0, -9)
            lines = lines_on_disk(output)
            assert lines[: len(survived)] == survived, "a written line is lost or changed"
            assert lines == expected.split(b"\n")[: len(lines)]
            num_midway += 0 < len(lines) < NUM_KILLED_EXAMPLES
            survived = lines
        finish(start(run_in_a_process, output))
        assert (output / "examples.jsonl").read_bytes() == expected
        run_json = (output / "run.json").read_bytes()
        assert run_json == (undisturbed / "run.json").read_bytes()
    assert num_midway >= NUM_KILLS // 4, f"only {num_midway} of {num_killed} kills came midway"
    print(f"{num_killed} kills in {num_runs} runs, {num_midway} of them midway")


# --- sweeps: several runs in one batch

CELLS = grid(gamma=[0.0, 0.4], num_negatives=[1, 3])


def sweep(engine: Engine, output: Path, num_examples: int, max_tokens: int) -> None:
    requests = {
        cell: {
            "prompt": "Ask a question:",
            "num_examples": num_examples,
            "real": REAL,
            "guidance": Guidance.steer(cell.gamma, 0.2, form="released"),
            "negatives": NegativePrompts(num_examples=cell.num_negatives, lag=2),
            "sampling": SamplingParams(top_p=0.9, max_tokens=max_tokens, ignore_eos=True),
            "accept": short,
            "max_attempts": 2,
        }
        for cell in CELLS
    }
    run_sweep(engine, requests, output, seed=5)


def files_of_cells(output: Path) -> dict[str, bytes]:
    names = ("run.json", "examples.jsonl")
    paths = [output / "cells" / cell.name / name for cell in CELLS for name in names]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


def test_death_at_any_durable_call_of_a_sweep_loses_nothing(engine, tmp_path):
    with Disk(tmp_path / "whole") as counting:
        sweep(engine, tmp_path / "whole", 3, 4)
    expected = files_of_cells(tmp_path / "whole")
    assert len(counting.calls) > 60
    for die_at in range(1, len(counting.calls) + 1, 3):
        path = tmp_path / f"sweep{die_at}"
        mode = ("before", "half", "after")[die_at % 9 // 3]
        with Disk(path, die_at=die_at, mode=mode) as disk, contextlib.suppress(Died):
            sweep(engine, path, 3, 4)
        assert disk.is_dead
        sweep(engine, path, 3, 4)
        assert files_of_cells(path) == expected, f"died {mode} call {die_at}"


def sweep_in_a_process(base: Path, lora: Path, output: Path, is_ready) -> None:
    engine = Engine.from_pretrained(base, lora, max_num_seqs=5)
    is_ready.set()
    sweep(engine, output, 40, KILLED_MAX_TOKENS)


@pytest.mark.timeout(60 + 20 * NUM_KILLS)
def test_kill_9_of_a_sweep_and_resume_give_the_same_bytes(start, tmp_path):
    generator = random.Random(1)
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "sweep"
    duration_s = finish(start(sweep_in_a_process, undisturbed))
    num_midway = 0
    for _ in range(max(2, NUM_KILLS // 4)):
        process = start(sweep_in_a_process, output)
        process.join(generator.uniform(0.1, 0.4) * duration_s)
        process.kill()
        process.join(60)
        num_lines = [len(lines_on_disk(output / "cells" / cell.name)) for cell in CELLS]
        num_midway += 0 < sum(num_lines) < 40 * len(CELLS)
    finish(start(sweep_in_a_process, output))
    assert files_of_cells(output) == files_of_cells(undisturbed)
    assert num_midway, "no kill came midway"
