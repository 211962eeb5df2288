"""generate_datasets: several data sets through one batch are those that each would be alone."""

from __future__ import annotations

import json

import pytest

from steer_engine import (
    CapacityError,
    Convergence,
    Engine,
    Guidance,
    NegativePrompts,
    RunError,
    SamplingParams,
    SyntheticDataset,
)

REAL = ["Where is the ring?", "What was there before?", "Is there another one here?", "Who?"]
COMMON = {
    "prompt": "Ask a question:",
    "num_examples": 10,
    "real": REAL,
    "negatives": NegativePrompts(num_examples=2, lag=3),
    "sampling": SamplingParams(top_p=0.9, max_tokens=8),
}


def short(text: str) -> bool:
    """Accepts about two thirds of what the tiny model writes."""
    return len(text) % 3 != 0


# As different as data sets in one batch can be: passes, sampling, lengths, labels, retries, ends.
REQUESTS = {
    "steer": COMMON,
    "paper": COMMON | {"guidance": Guidance.steer(0.4, 0.1)},
    "plain, sequential": COMMON
    | {"guidance": Guidance.none(), "negatives": NegativePrompts(num_examples=3, lag=0)},
    "picky": COMMON | {"accept": short, "max_attempts": 2, "num_examples": 17},
    "labelled": COMMON
    | {
        "prompt": {"a": "First:", "b": "Second:"},
        "negatives": NegativePrompts(num_examples=3, lag=1, share=2),
        "sampling": SamplingParams(temperature=0.8, top_k=20, max_tokens=15, ignore_eos=True),
    },
    "converging": COMMON
    | {
        "num_examples": 60,
        "until": Convergence(tolerance=0.9, window=6),
        "sampling": SamplingParams(temperature=0.6, max_tokens=12, ignore_eos=True),
    },
    "cfg, default negatives": {
        "prompt": "Another:",
        "num_examples": 5,
        "real": REAL[:2],
        "guidance": Guidance.cfg(1.5),
        "sampling": SamplingParams(max_tokens=6),
    },
}
BYTES = ("run.json", "examples.jsonl")
TIMES = ("elapsed_s", "examples_per_s", "tokens_per_s", "num_resumed")


def read(directory) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in BYTES}


@pytest.fixture(scope="module")
def engine(make_engine) -> Engine:
    return make_engine(max_num_seqs=4)


@pytest.fixture(scope="module")
def alone(engine, tmp_path_factory) -> dict[str, tuple[dict[str, bytes], dict]]:
    """Each request by itself: its files' bytes, and its summary without what time decides."""
    directory = tmp_path_factory.mktemp("alone")
    results = {}
    for name, request in REQUESTS.items():
        dataset = engine.generate_dataset(**request, seed=3, output=directory / name)
        results[name] = (read(directory / name), timeless(dataset.summary))
    assert results["picky"][1]["num_failed"]
    assert results["converging"][1]["has_converged"]
    return results


def timeless(summary: dict) -> dict:
    return {k: v for k, v in summary.items() if k not in TIMES}


# --- the bytes


@pytest.mark.parametrize("num_blocks", [None, 6])
def test_each_data_set_has_the_bytes_that_it_has_alone(make_engine, alone, tmp_path, num_blocks):
    engine = make_engine(max_num_seqs=4, num_blocks=num_blocks)
    datasets = engine.generate_datasets(REQUESTS, seed=3, output=tmp_path)
    assert list(datasets) == list(REQUESTS)
    for name, (expected, summary) in alone.items():
        assert read(tmp_path / name) == expected, name
        assert timeless(datasets[name].summary) == summary, name
        loaded = SyntheticDataset.load(tmp_path / name)
        assert list(loaded) == list(datasets[name])
        assert loaded.summary == datasets[name].summary


def test_the_order_of_the_requests_and_their_company_change_nothing(engine, alone, tmp_path):
    backwards = dict(reversed(REQUESTS.items()))
    engine.generate_datasets(backwards, seed=3, output=tmp_path / "backwards")
    three = {name: REQUESTS[name] for name in ("labelled", "steer", "plain, sequential")}
    engine.generate_datasets(three, seed=3, output=tmp_path / "three")
    for name, (expected, _) in alone.items():
        assert read(tmp_path / "backwards" / name) == expected, name
    for name in three:
        assert read(tmp_path / "three" / name) == alone[name][0], name


def test_in_memory_they_are_the_same(engine, alone):
    datasets = engine.generate_datasets(REQUESTS, seed=3)
    for name, (expected, _) in alone.items():
        examples = sorted([*datasets[name], *datasets[name].failed], key=lambda e: e.index)
        lines = "".join(e.to_json() + "\n" for e in examples)
        assert lines.encode() == expected["examples.jsonl"], name


def test_no_requests_make_no_data_sets(engine, tmp_path):
    assert engine.generate_datasets({}, output=tmp_path / "none") == {}
    assert not (tmp_path / "none").exists()


# --- taking turns


def record(engine: Engine, monkeypatch) -> list[list[tuple[str, int]]]:
    """The keys of the sequences that run, step by step."""
    steps = []
    decode_rows = engine.scheduler.decode_rows

    def recording():
        steps.append([tuple(s.key) for s in engine.scheduler.running])
        return decode_rows()

    monkeypatch.setattr(engine.scheduler, "decode_rows", recording)
    return steps


def test_places_that_one_data_set_leaves_empty_are_filled_by_others(engine, monkeypatch):
    """With lag 0 one example of a data set runs at a time, so four data sets fill four places."""
    fixed = SamplingParams(max_tokens=5, ignore_eos=True)
    sequential = COMMON | {"negatives": NegativePrompts(lag=0), "sampling": fixed}
    steps = record(engine, monkeypatch)
    engine.generate_dataset(**sequential)
    assert [len(step) for step in steps] == [1] * 50
    steps.clear()
    engine.generate_datasets(dict.fromkeys("abcd", sequential))
    assert [sorted(name for name, _ in step) for step in steps] == [list("abcd")] * 50


def test_the_data_set_that_is_furthest_behind_comes_first(engine, monkeypatch):
    steps = record(engine, monkeypatch)
    fixed = SamplingParams(max_tokens=5, ignore_eos=True)
    requests = dict.fromkeys("abc", COMMON | {"sampling": fixed, "negatives": None})
    engine.generate_datasets(requests)
    started = list(dict.fromkeys(key for step in steps for key in step))
    assert started == [(name, index) for index in range(10) for name in "abc"]


def test_equal_negatives_are_computed_once(engine, monkeypatch):
    """Three data sets draw the same real examples at the same index, and share their pages."""
    forward = engine.model.forward
    num_tokens = 0

    def counting(batch, cache):
        nonlocal num_tokens
        num_tokens += len(batch.input_ids) * batch.is_prefill
        return forward(batch, cache)

    monkeypatch.setattr(engine.model, "forward", counting)
    negatives = NegativePrompts(num_examples=4, lag=100)
    engine.scheduler.reset()
    engine.generate_datasets({"a": COMMON | {"negatives": negatives}})
    num_alone, num_tokens = num_tokens, 0
    weights = (0.1, 0.2, 0.3)
    engine.generate_datasets(
        {
            str(w): COMMON
            | {"negatives": negatives, "guidance": Guidance.steer(w, w, form="released")}
            for w in weights
        }
    )
    assert 0 < num_tokens <= num_alone


def test_what_a_converged_data_set_leaves_behind_makes_room_at_once(engine, alone, monkeypatch):
    steps = record(engine, monkeypatch)
    names = ("converging", "labelled", "steer", "paper")
    datasets = engine.generate_datasets({n: REQUESTS[n] for n in names}, seed=3)
    kept = {("converging", e.index) for e in datasets["converging"]}
    in_vain = {key for step in steps for key in step if key[0] == "converging"} - kept
    assert in_vain, "the test is to leave examples behind"
    last_kept = max(i for i, step in enumerate(steps) if kept & set(step))
    assert all(name != "converging" for step in steps[last_kept + 1 :] for name, _ in step)


# --- the run directories


def test_after_an_interrupt_all_are_resumed_to_the_same_bytes(engine, alone, tmp_path):
    calls = 0

    def interrupting(text: str) -> bool:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return short(text)

    interrupting.__qualname__ = short.__qualname__
    picky = REQUESTS["picky"] | {"accept": interrupting}
    with pytest.raises(KeyboardInterrupt):
        engine.generate_datasets(REQUESTS | {"picky": picky}, seed=3, output=tmp_path)
    assert not engine.scheduler.running and not engine.scheduler.waiting
    written = {name: len(SyntheticDataset.load(tmp_path / name)) for name in REQUESTS}
    assert sum(written.values()) > 5
    datasets = engine.generate_datasets(REQUESTS, seed=3, output=tmp_path)
    assert datasets["steer"].summary["num_resumed"] == written["steer"]
    for name, (expected, _) in alone.items():
        assert read(tmp_path / name) == expected, name


def test_names_may_be_added_and_what_is_complete_is_not_run_again(
    engine, alone, tmp_path, monkeypatch
):
    first = {name: REQUESTS[name] for name in ("steer", "picky")}
    engine.generate_datasets(first, seed=3, output=tmp_path)
    summary = (tmp_path / "steer" / "summary.json").read_bytes()
    steps = record(engine, monkeypatch)
    more = first | {"paper": REQUESTS["paper"]}
    datasets = engine.generate_datasets(more, seed=3, output=tmp_path)
    assert {name for step in steps for name, _ in step} == {"paper"}
    assert (tmp_path / "steer" / "summary.json").read_bytes() == summary
    assert len(datasets["steer"]) == 10
    assert read(tmp_path / "paper") == alone["paper"][0]


def test_other_settings_of_one_data_set_are_refused_by_name(engine, tmp_path):
    requests = {"a": COMMON, "b": COMMON}
    engine.generate_datasets(requests, output=tmp_path)
    with pytest.raises(RunError, match=r"/b: holds a run with other settings: guidance\.domain"):
        engine.generate_datasets(
            requests | {"b": COMMON | {"guidance": Guidance.none()}}, output=tmp_path
        )
    with pytest.raises(RunError, match="holds a run already"):
        engine.generate_datasets(requests, output=tmp_path, resume=False)
    # No lock is left behind.
    assert len(engine.generate_datasets(requests, output=tmp_path)) == 2


def test_the_summary_of_each_counts_its_own_examples(engine, tmp_path):
    datasets = engine.generate_datasets(REQUESTS, seed=3, output=tmp_path)
    for name, dataset in datasets.items():
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["num_tokens"] == sum(len(e.token_ids) for e in dataset)
        num_drawn = len(dataset) + len(dataset.failed)
        assert summary["examples_per_s"] == pytest.approx(
            num_drawn / summary["elapsed_s"], rel=0.05
        )


# --- what is refused


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ({"a/b": COMMON}, "the name of a data set must do as a directory's, got 'a/b'"),
        ({"..": COMMON}, "must do as a directory's, got '..'"),
        ({"": COMMON}, "must do as a directory's, got ''"),
        ({5: COMMON}, "must do as a directory's, got 5"),
        ({"x" * 256: COMMON}, "must do as a directory's"),
        ({"a": COMMON | {"gidance": None}}, "a: unknown argument 'gidance'; did you mean 'guida"),
        ({"a": COMMON | {"seed": 1}}, "a: seed is common to all data sets"),
        ({"a": {"prompt": "x"}}, "a: num_examples is missing"),
        ({"a": COMMON, "b": COMMON | {"num_examples": 0}}, "b: num_examples must be an int"),
        ({"b": COMMON | {"prompt": "x" * 300}}, "b: prompt .* passes max_model_len"),
        ({"b": COMMON | {"real": "missing.txt"}}, "b: missing.txt: no such file"),
    ],
)
def test_a_bad_request_is_named_before_anything_is_written(engine, tmp_path, requests, message):
    with pytest.raises(ValueError, match=message):
        engine.generate_datasets(requests, output=tmp_path / "sets")
    assert not (tmp_path / "sets").exists()


def test_a_bad_seed_is_named(engine):
    with pytest.raises(ValueError, match="seed must be an int"):
        engine.generate_datasets({"a": COMMON}, seed=-1)


def test_a_request_that_never_fits_the_cache_is_named(make_engine):
    with pytest.raises(CapacityError, match=r"a: .*raise kv_cache_gib"):
        make_engine(num_blocks=2).generate_datasets({"a": COMMON})


# --- progress


def test_progress_counts_all_data_sets_together(engine, capfd):
    engine.generate_datasets(dict.fromkeys("abc", COMMON), progress=True)
    assert "examples 30/30" in capfd.readouterr().err
