"""Data sets: real examples read from files, and the synthetic examples that a run wrote."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from .errors import DataError, RunError, nearest_hint
from .files import write_atomically

TEXT_FIELD = "text"
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# Examples that no attempt could fill keep their index but are not part of the data set.
FAILED_REASONS = ("rejected", "error")


@dataclass(frozen=True)
class Example:
    """One synthetic example.

    index: its number in the run.
    label, prompt: what it was asked for.
    text: stripped of white space at its ends.
    token_ids: as drawn.
    finish_reason: "stop", "eos" or "length"; "rejected" or "error" if every attempt failed.
    negatives: its negative examples, "real/N" or "synthetic/N".
    attempts: how many were drawn, the last one kept.
    """

    index: int
    label: str
    prompt: str
    text: str
    token_ids: list[int]
    finish_reason: str
    negatives: list[str]
    attempts: int

    @property
    def is_failed(self) -> bool:
        return self.finish_reason in FAILED_REASONS

    def to_json(self) -> str:
        """One line of examples.jsonl, without the line end."""
        return json.dumps(asdict(self), ensure_ascii=False)


class SyntheticDataset(Sequence[Example]):
    """The examples of a run in index order.

    Attributes:
        failed: examples that every attempt failed to fill.
        summary: counts and speed of the run.
    """

    def __init__(self, examples: Sequence[Example], summary: dict | None = None):
        self._examples = [e for e in examples if not e.is_failed]
        self.failed = [e for e in examples if e.is_failed]
        self.summary = summary or {}

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index):
        return self._examples[index]

    def __repr__(self) -> str:
        return f"SyntheticDataset({len(self)} examples)"

    @property
    def texts(self) -> list[str]:
        return [e.text for e in self]

    def to_jsonl(self, path: str | Path) -> None:
        """One example a line."""
        write_atomically(Path(path), "".join(e.to_json() + "\n" for e in self))

    def to_parquet(self, path: str | Path) -> None:
        """One example a row (needs pyarrow)."""
        pyarrow = _import_extra("pyarrow")
        parquet = _import_extra("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist([asdict(e) for e in self]), str(path))

    def to_pandas(self):
        """A pandas.DataFrame, one example a row (needs pandas)."""
        return _import_extra("pandas").DataFrame([asdict(e) for e in self])

    def to_hf(self):
        """A datasets.Dataset, one example a row (needs datasets)."""
        return _import_extra("datasets").Dataset.from_list([asdict(e) for e in self])

    @classmethod
    def load(cls, run_dir: str | Path) -> SyntheticDataset:
        """Read a run directory, finished or not (a torn last line is left out).

        Raises: RunError if it is not a run directory, or a line is damaged.
        """
        run_dir = Path(run_dir)
        path = run_dir / "examples.jsonl"
        if not path.is_file():
            cells = run_dir / "cells"
            place = f", such as those in {cells}" if cells.is_dir() else ""
            raise RunError(f"{run_dir}: no examples.jsonl; give a run directory{place}")
        examples, _ = parse_examples(path)
        return cls(examples, read_summary(run_dir))


def read_summary(run_dir: Path) -> dict:
    """summary.json of a run; {} where there is none yet. Raises RunError if it is damaged."""
    path = run_dir / "summary.json"
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        summary = None
    if not isinstance(summary, dict):
        raise RunError(f"{path}: damaged; delete it and resume the run")
    return summary


def parse_examples(path: Path) -> tuple[list[Example], int]:
    """The complete lines of an examples.jsonl, and how many bytes they take.

    A last line without its line end was torn by a crash and is not counted.
    Raises: RunError for any other damage.
    """
    content = path.read_bytes()
    num_bytes = content.rfind(b"\n") + 1
    examples = []
    for number, line in enumerate(content[:num_bytes].split(b"\n")[:-1]):
        try:
            example = Example(**json.loads(line))
        except (ValueError, TypeError):
            raise RunError(
                f"{path}: line {number + 1} is damaged; restore the file, or delete it from that "
                "line on and resume"
            ) from None
        if example.index != number:
            raise RunError(
                f"{path}: line {number + 1} holds example {example.index}; lines were lost or moved"
            )
        examples.append(example)
    return examples, num_bytes


def read_texts(source: str | Path | Sequence[str] | None) -> list[str]:
    """Real examples from a list of str or a file; [] for None.

    A file is one that read_records reads; its records need a field "text". White space at the ends
    and empty examples are dropped.
    Raises: DataError naming the file, the line and what is wrong.
    """
    if source is None:
        return []
    if isinstance(source, str | Path):
        texts = [text_of(record, where) for where, record in read_records(Path(source))]
        name = str(source)
    else:
        texts, name = list(source), "real"
        for text in texts:
            if not isinstance(text, str):
                raise DataError(f"real must hold strings, got a {type(text).__name__}")
    for number, text in enumerate(texts, start=1):
        if not is_unicode(text):
            raise DataError(
                f"{name}: text {number} holds a lone surrogate, which no UTF-8 text can"
            )
    stripped = [text.strip() for text in texts if text.strip()]
    if not stripped:
        raise DataError(f"{name}: holds no text")
    return stripped


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; a lone surrogate (JSON's "\\ud800") cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_records(path: Path) -> Iterator[tuple[str, object]]:
    """(where it stands, record) of each record of a .jsonl, .csv, .parquet or .txt file.

    All but .parquet may be compressed (.gz, .bz2, .xz). A .txt line, and a .jsonl line that is a
    bare string, becomes {"text": line}.
    Raises: DataError naming the file, the line and what is wrong.
    """
    readers = {
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
        ".txt": _read_txt,
    }
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    kind = "".join(suffixes[:-1][-1:] if is_compressed else suffixes[-1:])
    reader = readers.get(kind)
    if reader is None or (is_compressed and reader is _read_parquet):
        if not suffixes and not path.exists():
            raise DataError(f"{path}: no such file or directory")
        raise DataError(f"{path}: must be a {', '.join(readers)} file")
    try:
        yield from reader(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}); convert it first") from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: damaged compressed file ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _open_text(path: Path, newline: str | None = None) -> TextIO:
    # utf-8-sig: some editors and Excel put a byte-order mark in front.
    opener = COMPRESSED.get(path.suffix.lower(), open)
    return opener(path, "rt", encoding="utf-8-sig", newline=newline)


def _read_txt(path: Path) -> Iterator[tuple[str, object]]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            yield f"{path}: line {number}", {TEXT_FIELD: line}


def _read_jsonl(path: Path) -> Iterator[tuple[str, object]]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise DataError(f"{path}: line {number} is not JSON") from None
            is_text = isinstance(record, str)
            yield f"{path}: line {number}", {TEXT_FIELD: record} if is_text else record


def _read_csv(path: Path) -> Iterator[tuple[str, object]]:
    with _open_text(path, newline="") as file:
        reader = csv.DictReader(file)
        try:
            for record in reader:
                yield f"{path}: line {reader.line_num}", record
        except csv.Error as error:
            # The reader has not counted the line it stumbled on.
            raise DataError(f"{path}: line {reader.line_num + 1} is not CSV ({error})") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    parquet = _import_extra("pyarrow.parquet")
    try:
        table = parquet.read_table(path)
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise DataError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from None
    for number, record in enumerate(table.to_pylist(), start=1):
        yield f"{path}: row {number}", record


def text_of(record: object, where: str, field: str = TEXT_FIELD) -> str:
    """A record's string field. Raises DataError if it is missing or something else."""
    if not isinstance(record, dict) or field not in record:
        names = [str(n) for n in record] if isinstance(record, dict) else []
        found = f"fields {', '.join(names)}" if names else "no fields"
        raise DataError(
            f'{where}: needs a string field "{field}", has {found}{nearest_hint(field, names)}'
        )
    text = record[field]
    if not isinstance(text, str):
        kind = "nothing" if text is None else f"a {type(text).__name__}"
        raise DataError(f'{where}: field "{field}" must be a string, got {kind}')
    return text


def _import_extra(module: str):
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise DataError(f"{package} is not installed; run `pip install {package}`") from None
