"""The run directory: one writer, settings written once, and what a bad disk or a torn line does."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import subprocess
from pathlib import Path

import pytest

from steer_engine import Example, RunError, SyntheticDataset, run_directory
from steer_engine.run_directory import RunDirectory, check_output

SETTINGS = {
    "seed": 0,
    "sampling": {"top_p": 0.9, "stop": ("?",)},
    "checkpoints": {"base": {"model.safetensors": "ab12"}},
    "versions": {"torch": "2.13.0"},
}


def example(index: int, text: str = "text") -> Example:
    return Example(index, "", "Ask:", text, [1, 2], "stop", [], 1)


def fill(path: Path, num_examples: int, first: int = 0, **arguments) -> None:
    with RunDirectory(path, SETTINGS, **{"resume": True} | arguments) as run:
        for index in range(first, num_examples):
            run.append(example(index))


def lines_of(path: Path) -> list[bytes]:
    return (path / "examples.jsonl").read_bytes().splitlines(keepends=True)


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def tmpfs(path: Path, options: str):
    """A small file system of its own; needs root."""
    path.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_run_is_created_with_its_parents_and_resumed(tmp_path):
    path = tmp_path / "deep" / "er"
    fill(path, 2)
    with RunDirectory(path, SETTINGS, resume=True) as run:
        assert run.examples == [example(0), example(1)]
        run.append(example(2))
    assert list(SyntheticDataset.load(path)) == [example(i) for i in range(3)]


def test_every_example_is_one_json_line(tmp_path):
    with RunDirectory(tmp_path / "run", SETTINGS, resume=True) as run:
        run.append(example(0, "two\nlines \u2028 äöü 👩"))
        content = (tmp_path / "run" / "examples.jsonl").read_bytes()
        # Readable while the run goes on.
        assert content.endswith(b"\n") and content.count(b"\n") == 1
        assert json.loads(content)["text"] == "two\nlines \u2028 äöü 👩"
        assert "äöü 👩".encode() in content


def test_examples_out_of_order_are_refused(tmp_path):
    with RunDirectory(tmp_path / "run", SETTINGS, resume=True) as run:
        run.append(example(0))
        with pytest.raises(AssertionError, match="index order"):
            run.append(example(2))


def test_run_json_is_written_once(tmp_path):
    path = tmp_path / "run"
    fill(path, 1)
    run_json = path / "run.json"
    first = run_json.read_bytes(), run_json.stat().st_mtime_ns, run_json.stat().st_ino
    assert json.loads(first[0]) == json.loads(json.dumps(SETTINGS))
    fill(path, 2, first=1)
    assert (run_json.read_bytes(), run_json.stat().st_mtime_ns, run_json.stat().st_ino) == first
    assert not list(path.glob("*.partial"))


def test_versions_are_recorded_but_do_not_stop_a_resume(tmp_path):
    fill(tmp_path / "run", 1)
    others = SETTINGS | {"versions": {"torch": "9.9"}}
    with RunDirectory(tmp_path / "run", others, resume=True) as run:
        assert len(run.examples) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"sampling": {"top_p": 0.8, "stop": ("?",)}}, r"sampling\.top_p was 0\.9, now 0\.8"),
        ({"sampling": {"top_p": 0.9}}, r'sampling\.stop was \["\?"\], now null'),
        ({"until": {"window": 5}}, r'until was null, now {"window": 5}'),
        (
            {"checkpoints": {"base": {"model.safetensors": "cd34"}}},
            r'checkpoints\.base\.model\.safetensors was "ab12", now "cd34"',
        ),
    ],
)
def test_other_settings_are_refused_and_the_difference_is_named(tmp_path, changes, message):
    path = tmp_path / "run"
    fill(path, 1)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(RunError, match=message):
        RunDirectory(path, SETTINGS | changes, resume=True)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    fill(path, 2, first=1)  # and the lock is free again


def test_many_differences_are_counted(tmp_path):
    fill(tmp_path / "run", 1)
    changes = {f"x{i}": i for i in range(5)}
    with pytest.raises(RunError, match=r"x0 was null, now 0; x1 .*; x2 was null, now 2; 2 more"):
        RunDirectory(tmp_path / "run", SETTINGS | changes, resume=True)


def test_long_values_are_shortened_in_the_message(tmp_path):
    fill(tmp_path / "run", 1)
    with pytest.raises(RunError) as error:
        RunDirectory(tmp_path / "run", SETTINGS | {"seed": "x" * 10_000}, resume=True)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("content", ["", "{", "[]", "5", '"text"', b"\xff\xfe"])
def test_a_damaged_run_json_is_refused(tmp_path, content):
    path = tmp_path / "run"
    fill(path, 1)
    (path / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunError, match=r"run\.json: damaged"):
        RunDirectory(path, SETTINGS, resume=True)


def test_an_existing_run_is_refused_without_resume(tmp_path):
    fill(tmp_path / "run", 1, resume=False)
    with pytest.raises(RunError, match="holds a run already; resume it or choose another output"):
        fill(tmp_path / "run", 2, resume=False)
    assert len(lines_of(tmp_path / "run")) == 1


def test_examples_without_settings_are_refused(tmp_path):
    (tmp_path / "examples.jsonl").write_text("mine\n")
    with pytest.raises(RunError, match=r"has examples\.jsonl but no run\.json"):
        RunDirectory(tmp_path, SETTINGS, resume=True)
    assert (tmp_path / "examples.jsonl").read_text() == "mine\n"


def test_other_files_beside_a_run_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    fill(tmp_path, 1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


# --- one writer


def test_a_second_writer_is_refused(tmp_path):
    with RunDirectory(tmp_path / "run", SETTINGS, resume=True):
        with pytest.raises(RunError, match="in use by another process"):
            RunDirectory(tmp_path / "run", SETTINGS, resume=True)
        with pytest.raises(RunError, match="in use by another process"):
            check_output(tmp_path / "run", resume=True)
    fill(tmp_path / "run", 1)


def hold_run(path: Path, is_held, may_end) -> None:
    with RunDirectory(path, SETTINGS, resume=True):
        is_held.set()
        may_end.wait(60)


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path, process_context, is_killed):
    is_held, may_end = process_context.Event(), process_context.Event()
    process = process_context.Process(
        target=hold_run, args=(tmp_path / "run", is_held, may_end), daemon=True
    )
    process.start()
    try:
        assert is_held.wait(60)
        with pytest.raises(RunError, match="in use by another process; wait for it or choose"):
            fill(tmp_path / "run", 1)
        process.kill() if is_killed else may_end.set()
        process.join(60)
        fill(tmp_path / "run", 1)
    finally:
        process.kill()
        process.join(60)
    assert len(lines_of(tmp_path / "run")) == 1


def test_the_lock_is_taken_before_anything_is_read(tmp_path):
    path = tmp_path / "run"
    fill(path, 1)
    descriptor = os.open(path / ".lock", os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        (path / "run.json").write_text("{")
        with pytest.raises(RunError, match="in use"):
            RunDirectory(path, SETTINGS, resume=True)
    finally:
        os.close(descriptor)


def test_no_file_stays_open(tmp_path):
    before = open_files()
    path = tmp_path / "run"
    fill(path, 2)
    for changes in ({"seed": 5}, {}):
        if not changes:
            (path / "examples.jsonl").write_bytes(b"damaged\n")
        with pytest.raises(RunError):
            RunDirectory(path, SETTINGS | changes, resume=True)
    assert open_files() == before


# --- damage


@pytest.mark.parametrize("num_bytes", [1, 10, 60])
def test_a_torn_last_line_is_dropped(tmp_path, num_bytes):
    path = tmp_path / "run"
    fill(path, 3)
    complete = (path / "examples.jsonl").read_bytes()
    with open(path / "examples.jsonl", "ab") as file:
        file.write(example(3, "ä" * 50).to_json().encode()[:num_bytes])
    with RunDirectory(path, SETTINGS, resume=True) as run:
        assert len(run.examples) == 3
        assert (path / "examples.jsonl").read_bytes() == complete
        run.append(example(3))
    assert len(lines_of(path)) == 4
    assert json.loads(lines_of(path)[3])["index"] == 3


def test_an_empty_file_and_a_file_of_one_torn_line_start_over(tmp_path):
    for content in (b"", b'{"index": 0, "lab'):
        path = tmp_path / f"run{len(content)}"
        fill(path, 0)
        (path / "examples.jsonl").write_bytes(content)
        fill(path, 2)
        assert len(lines_of(path)) == 2


def test_a_damaged_middle_line_is_refused_and_nothing_is_cut(tmp_path):
    path = tmp_path / "run"
    fill(path, 3)
    lines = lines_of(path)
    content = b"".join([lines[0], b"#" * (len(lines[1]) - 1) + b"\n", lines[2], b"torn"])
    (path / "examples.jsonl").write_bytes(content)
    with pytest.raises(RunError, match="line 2 is damaged; restore the file, or delete it from"):
        RunDirectory(path, SETTINGS, resume=True)
    assert (path / "examples.jsonl").read_bytes() == content


def test_a_lost_line_is_refused(tmp_path):
    path = tmp_path / "run"
    fill(path, 3)
    lines = lines_of(path)
    (path / "examples.jsonl").write_bytes(lines[0] + lines[2])
    with pytest.raises(RunError, match="line 2 holds example 2; lines were lost or moved"):
        RunDirectory(path, SETTINGS, resume=True)


# --- durability


def test_lines_are_synced_once_a_second_and_at_the_end(tmp_path, monkeypatch):
    now = [0.0]
    synced = []
    monkeypatch.setattr(run_directory.time, "monotonic", lambda: now[0])
    with RunDirectory(tmp_path / "run", SETTINGS, resume=True) as run:
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(now[0]), fsync(fd)))
        for index, second in enumerate((0.2, 0.9, 1.1, 1.5, 2.05, 2.2, 9.0)):
            now[0] = second
            run.append(example(index))
            run.sync_if_due()
        assert synced == [1.1, 2.2, 9.0]
        now[0] = 20.0
        run.sync_if_due()  # nothing new
        run.append(example(7))
    assert synced == [1.1, 2.2, 9.0, 20.0]


# --- a bad disk


class BadDisk:
    """os.write and os.fsync fail on the file of examples from the n-th call on."""

    def __init__(self, monkeypatch, *, writes: int = 10**9, syncs: int = 10**9, error=errno.ENOSPC):
        self.writes, self.syncs, self.error = writes, syncs, error
        self.write, self.fsync = os.write, os.fsync
        monkeypatch.setattr(os, "write", self.failing_write)
        monkeypatch.setattr(os, "fsync", self.failing_fsync)

    def is_ours(self, descriptor: int) -> bool:
        return os.readlink(f"/proc/self/fd/{descriptor}").endswith("examples.jsonl")

    def fail(self) -> None:
        raise OSError(self.error, os.strerror(self.error))

    def failing_write(self, descriptor: int, content) -> int:
        if not self.is_ours(descriptor):
            return self.write(descriptor, content)
        self.writes -= 1
        if self.writes < -1:
            self.fail()
        if self.writes == -1:
            # As a disk that fills up: half a line goes through, the rest does not.
            return self.write(descriptor, bytes(content)[: len(content) // 2])
        return self.write(descriptor, content)

    def failing_fsync(self, descriptor: int) -> None:
        if self.is_ours(descriptor):
            self.syncs -= 1
            if self.syncs < 0:
                self.fail()
        self.fsync(descriptor)


def test_a_full_disk_stops_cleanly_and_loses_nothing(tmp_path, monkeypatch):
    path, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    fill(undisturbed, 6)
    before = open_files()
    with monkeypatch.context() as patch:
        BadDisk(patch, writes=3)
        with pytest.raises(
            RunError, match=r"No space left on device\); 3 examples are written. Make room and run"
        ):
            fill(path, 6)
    assert open_files() == before
    assert lines_of(path) == lines_of(undisturbed)[:3]  # cut back, not torn
    assert len(SyntheticDataset.load(path)) == 3
    fill(path, 6, first=3)
    assert lines_of(path) == lines_of(undisturbed)


def test_where_the_torn_line_cannot_be_cut_back_resume_does_it(tmp_path, monkeypatch):
    path = tmp_path / "run"

    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        BadDisk(patch, writes=2)
        patch.setattr(os, "ftruncate", refuse)
        with pytest.raises(RunError, match="No space left"):
            fill(path, 6)
    assert not (path / "examples.jsonl").read_bytes().endswith(b"\n")
    fill(path, 6, first=2)
    assert len(lines_of(path)) == 6


def test_a_failing_sync_is_an_error_of_the_run(tmp_path, monkeypatch):
    before = open_files()
    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "SYNC_INTERVAL_S", 0.0)
        BadDisk(patch, syncs=2, error=errno.EIO)
        with (
            pytest.raises(RunError, match=r"cannot write \(Input/output error\)"),
            RunDirectory(tmp_path / "run", SETTINGS, resume=True) as run,
        ):
            for index in range(5):
                run.append(example(index))
                run.sync_if_due()
    assert open_files() == before


def test_a_summary_that_cannot_be_written_is_an_error_of_the_run(tmp_path, monkeypatch):
    path = tmp_path / "run"

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunDirectory(path, SETTINGS, resume=True) as run:
        run.append(example(0))
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", refuse)
            with pytest.raises(RunError, match=r"No space left .* 1 examples are written"):
                run.write_summary({"num_examples": 1})
        assert run.read_summary() == {}
        run.write_summary({"num_examples": 1})
        assert run.read_summary() == {"num_examples": 1}


def test_a_really_full_file_system_stops_cleanly(tmp_path):
    """A tmpfs of 16 pages; the bytes after making room are those of an undisturbed run."""
    texts = ["ä" * 1000 for _ in range(60)]

    def write_all(path: Path) -> None:
        with RunDirectory(path, SETTINGS, resume=True) as run:
            for index in range(len(run.examples), len(texts)):
                run.append(example(index, texts[index]))

    write_all(tmp_path / "undisturbed")
    expected = (tmp_path / "undisturbed" / "examples.jsonl").read_bytes()
    with tmpfs(tmp_path / "small", "size=64k"):
        path = tmp_path / "small" / "run"
        with pytest.raises(RunError, match="No space left on device"):
            write_all(path)
        written = (path / "examples.jsonl").read_bytes()
        assert 0 < len(written) < len(expected)
        assert written == expected[: len(written)] and written.endswith(b"\n")
        subprocess.run(["mount", "-o", "remount,size=4m", str(tmp_path / "small")], check=True)
        write_all(path)
        assert (path / "examples.jsonl").read_bytes() == expected


@contextlib.contextmanager
def read_only(path: Path):
    if os.geteuid() != 0:
        path.mkdir()
        path.chmod(0o555)
        yield
        path.chmod(0o755)
    else:
        with tmpfs(path, "ro"):
            yield


def test_a_read_only_directory_is_refused_at_once(tmp_path):
    with read_only(tmp_path / "disk"):
        for path in (tmp_path / "disk", tmp_path / "disk" / "run"):
            with pytest.raises(RunError, match=r"cannot be written .*; choose another output"):
                RunDirectory(path, SETTINGS, resume=True)
            with pytest.raises(RunError, match="cannot be written"):
                check_output(path, resume=True)


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match="cannot be written"):
            RunDirectory(path, SETTINGS, resume=True)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["with space", "äöü 日本", "x" * 200, "-dash", "a'b\"c"])
def test_odd_names_work(tmp_path, name):
    fill(tmp_path / name, 1)
    assert len(SyntheticDataset.load(tmp_path / name)) == 1
