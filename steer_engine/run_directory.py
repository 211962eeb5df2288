"""A run directory: run.json (settings), examples.jsonl (append-only), summary.json, and a lock.

The lines of examples.jsonl are made durable about once a second. After a crash at any point the
same call continues: a torn last line is cut off, and everything before it counts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from .dataset import Example, parse_examples, read_summary
from .errors import RunError
from .files import sync_directory, write_all, write_atomically

SYNC_INTERVAL_S = 1.0
MAX_DIFFERENCES_SHOWN = 3
# What a command writes into its output directory, by the file that tells.
KINDS = {"run.json": "a single run", "sweep.json": "a sweep", "finetune.json": "a fine-tune"}
logger = logging.getLogger(__name__)


class RunDirectory:
    """An open run directory; use as a context manager.

    Attributes: examples: all that are written, by earlier calls and by this one.
    """

    def __init__(self, path: str | Path, settings: dict, *, resume: bool):
        """Create or reopen a run.

        Args:
            settings: what the bytes depend on, as JSON values; compared with run.json if there is
                one. Differences below "versions" are only warned about.
            resume: whether a run that the directory holds may be continued.
        Raises: RunError if the directory is in use, damaged or cannot be written, holds a run and
            resume is False, or holds a run with other settings (the first differences are named).
        """
        self.path = Path(path)
        self.examples: list[Example] = []
        self._settings = settings
        self._file: int | None = None
        self._lock = lock_directory(self.path)
        try:
            self._open(resume)
        except OSError as error:
            self._close()
            raise RunError(f"{self.path}: cannot be written ({error.strerror})") from None
        except BaseException:
            self._close()
            raise

    def _open(self, resume: bool) -> None:
        examples_path = self.path / "examples.jsonl"
        check_usable(self.path, resume)
        run_path = self.path / "run.json"
        if run_path.exists():
            self._check_settings(run_path)
        else:
            write_atomically(run_path, json.dumps(self._settings, indent=2) + "\n")
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._file = os.open(examples_path, flags, 0o666)
        self.examples, self._num_bytes = parse_examples(examples_path)
        if os.fstat(self._file).st_size > self._num_bytes:
            os.ftruncate(self._file, self._num_bytes)
        os.fsync(self._file)
        sync_directory(self.path)
        sync_directory(self.path.parent)
        self._is_dirty, self._synced_at = False, time.monotonic()

    def _check_settings(self, run_path: Path) -> None:
        try:
            stored = json.loads(run_path.read_text(encoding="utf-8"))
        except ValueError:
            stored = None
        if not isinstance(stored, dict):
            raise RunError(f"{run_path}: damaged; restore it or choose another output")
        check_same_settings(self.path, stored, self._settings)

    def append(self, example: Example) -> None:
        """Add the next example. Raises RunError if the disk refuses; earlier examples stay."""
        assert example.index == len(self.examples), "examples are written in index order"
        line = (example.to_json() + "\n").encode()
        try:
            write_all(self._file, line)
        except OSError as error:
            self._cut_back()
            raise self._stopped_by(error) from None
        self._num_bytes += len(line)
        self._is_dirty = True
        self.examples.append(example)

    def _cut_back(self) -> None:
        # If this fails too, the torn line is cut off at resume.
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, self._num_bytes)

    def sync_if_due(self) -> None:
        """Sync if something was written and the last sync is a second ago; call it often."""
        if self._is_dirty and time.monotonic() - self._synced_at >= SYNC_INTERVAL_S:
            self.sync()

    def sync(self) -> None:
        """Make what was written durable. Raises RunError if the disk refuses."""
        self._is_dirty, self._synced_at = False, time.monotonic()
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._stopped_by(error) from None

    def read_summary(self) -> dict:
        """The summary of a complete run; {} where there is none yet."""
        return read_summary(self.path)

    def write_summary(self, summary: dict) -> None:
        """Mark the run as complete. Raises RunError if the disk refuses."""
        self.sync()
        try:
            write_atomically(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        except OSError as error:
            raise self._stopped_by(error) from None

    def _stopped_by(self, error: OSError) -> RunError:
        return RunError(
            f"{self.path}: cannot write ({error.strerror}); {len(self.examples)} examples are "
            "written. Make room and run the same command to resume"
        )

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception) -> None:
        try:
            if self._is_dirty:
                self.sync()
        finally:
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        os.close(self._lock)


def lock_directory(path: Path) -> int:
    """Create the directory and lock it for this process.

    Returns: the lock's file descriptor; closing it unlocks.
    Raises: RunError if it is in use or cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror}); choose another output"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise RunError(
            f"{path}: in use by another process; wait for it or choose another output"
        ) from None
    return descriptor


def check_usable(path: Path, resume: bool) -> None:
    """Raise RunError if it holds something else than a run, a run and resume is False, or examples
    without run.json.
    """
    check_kind(path, "run.json")
    if (path / "run.json").exists():
        if not resume:
            raise RunError(f"{path}: holds a run already; resume it or choose another output")
    elif (path / "examples.jsonl").exists():
        raise RunError(f"{path}: has examples.jsonl but no run.json; choose another output")


def check_kind(path: Path, own: str) -> None:
    """Raise RunError if a directory holds another of KINDS than that of the file `own`."""
    for name, kind in KINDS.items():
        if name != own and (path / name).exists():
            raise RunError(f"{path}: holds {kind}; choose another output")


def check_output(path: str | Path, resume: bool) -> None:
    """Raise RunError, before a model is loaded, if a run's output directory cannot be used."""
    check_writable(path)
    check_usable(Path(path), resume)


def check_writable(path: str | Path) -> None:
    """Raise RunError if an output directory cannot be made or is in use."""
    os.close(lock_directory(Path(path)))


def check_same_settings(path: Path, stored: dict, current: dict) -> None:
    """Raise RunError naming the first settings of a directory that differ from the current ones.

    Differences below "versions" are only warned about.
    """
    # Through JSON and back, so that tuples and lists compare equal.
    stored, current = dict(stored), json.loads(json.dumps(current))
    versions, current_versions = stored.pop("versions", {}), current.pop("versions", {})
    for difference in _differences(versions, current_versions, ""):
        logger.warning("%s: %s; the bytes may differ from now on", path, difference)
    differences = list(_differences(stored, current, ""))
    if differences:
        shown = "; ".join(differences[:MAX_DIFFERENCES_SHOWN])
        more = len(differences) - MAX_DIFFERENCES_SHOWN
        raise RunError(
            f"{path}: holds a run with other settings: {shown}"
            f"{f'; {more} more' if more > 0 else ''}. "
            "Use the same settings to resume, or another output"
        )


def _differences(stored: object, current: object, name: str) -> Iterator[str]:
    if isinstance(stored, dict) and isinstance(current, dict):
        for key in [*stored, *(k for k in current if k not in stored)]:
            below = f"{name}.{key}" if name else key
            yield from _differences(stored.get(key), current.get(key), below)
    elif stored != current:
        yield f"{name} was {_shown(stored)}, now {_shown(current)}"


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
