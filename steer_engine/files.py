"""Durable file writes: what was acknowledged survives a crash."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from .errors import RunError

MAX_NAME_BYTES = 255


def check_file_name(name: str, what: str) -> None:
    """Raise ValueError unless a file or directory may be called so; `what` says what is named."""
    is_name = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\0")
    if not is_name or len(os.fsencode(name)) > MAX_NAME_BYTES:
        raise ValueError(f"{what} must do as a directory's, got {name!r}")


def sync_directory(directory: Path) -> None:
    """Make a directory's entries (new and renamed files) durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: bytes) -> None:
    """os.write until everything is written; OSError if the disk is full."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def write_atomically(path: Path, content: str) -> None:
    """Write a whole file so that a crash leaves the old one or the new one.

    Written beside it, synced, then renamed.
    """
    partial = path.with_name(path.name + ".partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write_all(descriptor, content.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(partial, path)
    sync_directory(path.parent)


def write_output(path: Path, content: str) -> None:
    """write_atomically for a file that the user named; makes its directory.

    Raises: RunError if it cannot be written.
    """
    check_output_file(path)
    try:
        write_atomically(path, content)
    except OSError as error:
        raise RunError(_cannot_write(path, error)) from None


def check_output_file(path: Path) -> None:
    """Make a file's directory; RunError, before the work is done, if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.access(path.parent, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise RunError(_cannot_write(path, error)) from None


def _cannot_write(path: Path, error: OSError) -> str:
    return f"{path}: cannot be written ({error.strerror}); choose another output"
