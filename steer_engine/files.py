"""Durable file writes: what was acknowledged survives a crash."""

from __future__ import annotations

import os
from pathlib import Path

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
