"""Pretraining writes a base that the engine reads."""

from __future__ import annotations

import json

import pytest

from steer_engine import Engine, SamplingParams
from steer_engine.pretrain import PretrainConfig, learning_rate_factor, pretrain, read_documents

TEXT = "The ring of the moon is one thing, and the hour of the sun is another thing.\n"
TINY = {
    "vocab_size": 280,
    "hidden_size": 32,
    "head_dim": 16,
    "num_layers": 1,
    "seq_len": 16,
    "batch_size": 4,
    "compile": 0,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base pretrained for four seconds on one repeated sentence."""
    root = tmp_path_factory.mktemp("pretrained")
    text = root / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"title": "T", "abstract": TEXT}) + "\n" for _ in range(300))
    )
    config = PretrainConfig(hours=4 / 3600, save_every_s=0.5, **TINY)
    perplexity = pretrain([text], ["title", "abstract"], root / "run", config)
    assert perplexity < 100, "one repeated sentence is learnt far below the vocabulary's 280"
    return root


def test_a_pretrained_base_is_a_checkpoint_that_the_engine_reads(base):
    engine = Engine.from_pretrained(base / "run" / "checkpoint")
    completions = engine.generate(["The ring"], sampling=SamplingParams(max_tokens=5))
    assert len(completions[0].token_ids) == 5 or completions[0].finish_reason == "eos"
    record = json.loads((base / "run" / "training.json").read_text())
    assert record["steps"] > 0 and record["tokens_seen"] == record["steps"] * 4 * 16


def test_a_longer_budget_continues_from_the_saved_state(base):
    steps = json.loads((base / "run" / "training.json").read_text())["steps"]
    longer = PretrainConfig(hours=6 / 3600, **TINY)
    pretrain([base / "text.jsonl"], ["title", "abstract"], base / "run", longer)
    record = json.loads((base / "run" / "training.json").read_text())
    assert record["steps"] > steps
    assert 6 <= record["training_s"] < 12


def test_books_end_at_end_of_text_lines(tmp_path):
    path = tmp_path / "books.txt"
    path.write_text("one\ntwo\n<|endoftext|>\nthree\n")
    assert list(read_documents(path, [], 1_000_000)) == ["one\ntwo", "three"]


def test_the_learning_rate_warms_up_stays_and_falls_to_zero():
    factors = [learning_rate_factor(p, 0.1) for p in (0.0, 0.05, 0.3, 0.7, 1.0)]
    assert factors == pytest.approx([0.01, 0.5, 1.0, 0.5, 0.0])
