"""generate_dataset: what is in the data set, when a run ends, what it reports, what it refuses."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch

from steer_engine import (
    CapacityError,
    Convergence,
    DataError,
    Example,
    Guidance,
    NegativePrompts,
    RunError,
    SamplingParams,
    SyntheticDataset,
)
from steer_engine.convergence import ConvergenceTest
from steer_engine.generation import INDEX_BITS
from steer_engine.guidance import PassKind

PROMPT = "Ask a question:"
REAL = ["Where is the ring?", "What was there before?", "Is there another one here?", "Who?"]
SAMPLING = SamplingParams(top_p=0.9, max_tokens=8)
NEGATIVES = NegativePrompts(num_examples=2, lag=3)


def run(engine, num_examples: int = 12, prompt=PROMPT, real=REAL, **arguments) -> SyntheticDataset:
    arguments = {"sampling": SAMPLING, "negatives": NEGATIVES} | arguments
    return engine.generate_dataset(prompt, num_examples, real, **arguments)


def everything(dataset: SyntheticDataset) -> list[Example]:
    return sorted([*dataset, *dataset.failed], key=lambda e: e.index)


def short(text: str) -> bool:
    """Accepts about two thirds of what the tiny model writes."""
    return len(text) % 3 != 0


def until_interrupted(num_calls: int, accept=None):
    """An accept that lets num_calls texts pass and then stops the run as Ctrl-C does."""
    calls = 0

    def counting(text: str) -> bool:
        nonlocal calls
        calls += 1
        if calls > num_calls:
            raise KeyboardInterrupt
        return accept is None or accept(text)

    counting.__qualname__ = "accept"
    return counting


# --- what is drawn


def test_the_data_set_is_the_same_for_any_number_of_sequences_side_by_side(make_engine, backend):
    settings = {
        "prompt": {"a": PROMPT, "b": "Another question:"},
        "accept": short,
        "max_attempts": 3,
        "negatives": NegativePrompts(num_examples=3, lag=4, share=2),
    }
    expected = everything(run(make_engine(backend=backend, max_num_seqs=1), **settings))
    assert [e.index for e in expected] == list(range(12))
    assert len({e.text for e in expected}) > 9
    for max_num_seqs, others in [
        (2, {}),
        (7, {"max_prefill_tokens": 5}),
        (32, {}),
        (32, {"num_blocks": 6}),
    ]:
        engine = make_engine(backend=backend, max_num_seqs=max_num_seqs, **others)
        assert everything(run(engine, **settings)) == expected, (max_num_seqs, others)


def test_an_example_is_the_draw_of_its_index_and_attempt(make_engine, make_item, decode):
    """Each example again, by hand: stream (attempt - 1) * 2**40 + index, and its negatives."""
    engine = make_engine()
    dataset = run(engine, accept=short, max_attempts=20, seed=9)
    assert any(e.attempts > 1 for e in dataset)
    texts = {f"real/{i}": text for i, text in enumerate(REAL)}
    texts |= {f"synthetic/{e.index}": e.text for e in dataset}
    prompt_ids = engine.tokenizer.encode(PROMPT)
    for example in dataset:
        shown = " ".join(texts[source] for source in example.negatives)
        negative_ids = engine.tokenizer.encode(f"{shown}\n{PROMPT}")
        stream_id = (example.attempts - 1) << INDEX_BITS | example.index
        item = make_item(stream_id, prompt_ids, negative_ids, Guidance.recommended(), SAMPLING)
        assert decode(engine, [item], seed=9)[stream_id].token_ids == example.token_ids
        assert engine.tokenizer.decode(example.token_ids).startswith(example.text[:3])


def test_negatives_come_from_real_and_from_far_enough_behind(make_engine):
    dataset = run(make_engine(), 30, negatives=NegativePrompts(num_examples=50, lag=5))
    for example in dataset:
        usable = [e for e in dataset if e.index < example.index - 5 and e.text]
        expected = {f"real/{i}" for i in range(4)} | {f"synthetic/{e.index}" for e in usable}
        if len(example.negatives) == len(expected):
            assert set(example.negatives) == expected
        else:  # some did not fit into the context of 256
            assert set(example.negatives) < expected
    assert {f"synthetic/{i}" for i in range(5)} <= {n for e in dataset for n in e.negatives}


def test_lag_zero_is_the_sequential_algorithm(make_engine):
    """Each example may see all before it, so only one can run at a time."""
    engine = make_engine(max_num_seqs=8)
    num_running = Counter()
    decode_rows = engine.scheduler.decode_rows

    def counting():
        num_running[len(engine.scheduler.running)] += 1
        return decode_rows()

    engine.scheduler.decode_rows = counting
    dataset = run(engine, 10, real=None, negatives=NegativePrompts(num_examples=50, lag=0))
    assert set(num_running) == {1}
    for example in dataset:
        expected = {f"synthetic/{e.index}" for e in dataset if e.index < example.index and e.text}
        assert set(example.negatives) == expected


def test_lag_none_keeps_all_places_busy(make_engine, tmp_path):
    engine = make_engine(max_num_seqs=4)
    num_running = []
    decode_rows = engine.scheduler.decode_rows

    def counting():
        num_running.append(len(engine.scheduler.running))
        return decode_rows()

    engine.scheduler.decode_rows = counting
    fixed = SamplingParams(max_tokens=5, ignore_eos=True)
    run(engine, 20, negatives=None, sampling=fixed, output=tmp_path / "run")
    assert num_running == [4] * 25
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["negatives"]["lag"] == 4


def test_a_group_of_examples_shares_its_negatives(make_engine):
    dataset = run(make_engine(), 12, negatives=NegativePrompts(num_examples=2, lag=0, share=4))
    groups = [{tuple(e.negatives) for e in dataset[i : i + 4]} for i in (0, 4, 8)]
    assert all(len(group) == 1 for group in groups)
    assert len(set.union(*groups)) == 3


def test_without_a_negative_weight_no_negatives_are_drawn(make_engine):
    dataset = run(make_engine(), guidance=Guidance.contrastive(0.2))
    assert all(e.negatives == [] for e in dataset)
    assert dataset.summary["num_negatives_dropped"] == 0


def test_the_seed_decides(make_engine):
    engine = make_engine()
    first, other = run(engine, seed=1), run(engine, seed=2)
    assert list(run(engine, seed=1)) == list(first)
    assert sum(a.token_ids == b.token_ids for a, b in zip(first, other, strict=True)) <= 1


@pytest.mark.parametrize("num_examples", [1, 3, 10, 12])
def test_labels_come_in_equal_numbers(make_engine, num_examples):
    prompts = {"b": "First:", "a": "Second:", "ä c": "Third:"}
    dataset = run(make_engine(), num_examples, prompt=prompts)
    assert [e.label for e in dataset] == (["b", "a", "ä c"] * 4)[:num_examples]
    assert all(e.prompt == prompts[e.label] for e in dataset)
    counts = Counter(e.label for e in dataset)
    assert max(counts.values()) - min(counts.get(label, 0) for label in prompts) <= 1


def test_without_labels_the_label_is_empty(make_engine):
    assert {e.label for e in run(make_engine(), 3)} == {""}


def test_by_default_guidance_is_the_recommended_one(make_engine):
    settings = {"real": REAL, "sampling": SAMPLING, "negatives": NEGATIVES}
    engine = make_engine()
    recommended = engine.generate_dataset(PROMPT, 4, guidance=Guidance.recommended(), **settings)
    assert list(engine.generate_dataset(PROMPT, 4, **settings)) == list(recommended)
    plain = make_engine(domain=None)
    none = plain.generate_dataset(PROMPT, 4, guidance=Guidance.none(), **settings)
    assert list(plain.generate_dataset(PROMPT, 4, **settings)) == list(none)


def test_texts_are_stripped_and_token_ids_are_as_drawn(make_engine):
    engine = make_engine()
    for example in run(engine):
        assert example.text == example.text.strip()
        decoded = engine.tokenizer.decode(example.token_ids).strip()
        # A character whose last bytes were not drawn is left out.
        assert decoded.rstrip("\ufffd").startswith(example.text.rstrip("\ufffd"))


# --- accept


def test_a_rejected_example_is_drawn_again_with_its_next_attempt(make_engine):
    engine = make_engine()
    seen: list[str] = []

    def accept(text: str) -> bool:
        seen.append(text)
        return short(text)

    dataset = run(engine, 20, accept=accept, max_attempts=50)
    assert all(short(text) for text in dataset.texts)
    assert sorted(t for t in seen if short(t)) == sorted(dataset.texts)
    assert sum(e.attempts for e in dataset) == len(seen)
    assert dataset.summary["num_rejected_attempts"] == len(seen) - 20 > 0
    assert dataset.summary["num_failed"] == 0
    free = run(engine, 20)
    assert any(a.token_ids == b.token_ids for a, b in zip(dataset, free, strict=True))


def test_where_every_attempt_fails_the_example_keeps_its_index_and_is_left_out(make_engine):
    dataset = run(make_engine(), 30, accept=short, max_attempts=1, negatives=NegativePrompts(50))
    failed = {e.index for e in dataset.failed}
    assert 0 < len(failed) < 30
    assert {e.index for e in dataset} == set(range(30)) - failed
    assert all(e.finish_reason == "rejected" and e.attempts == 1 for e in dataset.failed)
    assert not any(short(e.text) for e in dataset.failed)
    assert len(dataset.texts) == 30 - len(failed) == dataset.summary["num_examples"]
    negatives = {n for e in everything(dataset) for n in e.negatives}
    assert any(n.startswith("synthetic/") for n in negatives)
    assert not negatives & {f"synthetic/{i}" for i in failed}
    assert dataset.summary["num_rejected_attempts"] == len(failed)


def test_an_accept_that_raises_leaves_a_run_that_can_be_resumed(make_engine, tmp_path):
    def broken(text: str) -> bool:
        raise ZeroDivisionError("mine")

    broken.__qualname__ = short.__qualname__
    engine = make_engine()
    with pytest.raises(ZeroDivisionError, match="mine"):
        run(engine, accept=broken, output=tmp_path / "run")
    assert not engine.scheduler.running and not engine.scheduler.waiting
    expected = run(engine, accept=short)
    assert list(run(engine, accept=short, output=tmp_path / "run")) == list(expected)


# --- bad logits


def poison(engine, wanted) -> None:
    """NaN for sequences that wanted(index, attempt, step)."""
    compute_logits = engine.model.compute_logits

    @torch.inference_mode()
    def poisoned(*arguments):
        logits = compute_logits(*arguments)
        for row, s in enumerate(engine.scheduler.running):
            if wanted(s.key.index, (s.stream_id >> INDEX_BITS) + 1, s.step):
                logits[0, row, 3] = math.nan
        return logits

    engine.model.compute_logits = poisoned


def test_an_attempt_with_bad_logits_is_drawn_again(make_engine):
    expected = run(make_engine(), negatives=NegativePrompts(0))
    engine = make_engine()
    poison(engine, lambda index, attempt, step: index == 4 and attempt == 1 and step == 2)
    dataset = run(engine, negatives=NegativePrompts(0))
    assert [e for e in dataset if e.index != 4] == [e for e in expected if e.index != 4]
    assert (dataset[4].attempts, dataset[4].finish_reason) != (1, "error")
    assert dataset[4].attempts == 2
    assert dataset.summary["num_rejected_attempts"] == 1


def test_an_example_whose_attempts_all_meet_bad_logits_is_an_error(make_engine):
    engine = make_engine()
    poison(engine, lambda index, attempt, step: index == 4)
    dataset = run(engine, accept=lambda text: True, max_attempts=2)
    assert [(e.index, e.finish_reason, e.attempts) for e in dataset.failed] == [(4, "error", 2)]
    assert len(dataset) == 11
    assert dataset.summary["finish_reasons"]["error"] == 1


def test_too_many_bad_logits_stop_the_run(make_engine, tmp_path):
    engine = make_engine()
    poison(engine, lambda index, attempt, step: index > 5)
    with pytest.raises(RunError, match=r"3 of .* attempts met NaN or infinite logits; the weights"):
        run(engine, 50, output=tmp_path / "run")
    assert not engine.scheduler.running
    assert len(SyntheticDataset.load(tmp_path / "run")) <= 6


# --- convergence


def shares_of_new_trigrams(examples: list[Example], window: int) -> list[float]:
    """Per window, counted anew."""
    seen: set[tuple] = set()
    shares = []
    for first in range(0, len(examples) - window + 1, window):
        trigrams = [
            tuple(e.token_ids[i : i + 3])
            for e in examples[first : first + window]
            if not e.is_failed
            for i in range(len(e.token_ids) - 2)
        ]
        shares.append(len(set(trigrams) - seen) / len(trigrams))
        seen |= set(trigrams)
    return shares


WINDOW = 5
CONVERGING = {
    "sampling": SamplingParams(temperature=0.85, top_p=0.9, max_tokens=8, ignore_eos=True),
    "until": Convergence(tolerance=0.45, window=WINDOW),
    "accept": short,
    "max_attempts": 2,
}


def test_until_stops_at_the_same_example_for_any_batch_size(make_engine, backend):
    whole = everything(run(make_engine(backend=backend), 60, **CONVERGING | {"until": None}))
    shares = shares_of_new_trigrams(whole, WINDOW)
    # A tolerance that the first window from the third on with a new lowest share falls below.
    last = next(w for w in range(2, 12) if shares[w] < min(shares[:w]))
    settings = CONVERGING | {"until": Convergence((shares[last] + min(shares[:last])) / 2, WINDOW)}
    length = (last + 1) * WINDOW
    for max_num_seqs in (1, 7, 32):
        dataset = run(make_engine(backend=backend, max_num_seqs=max_num_seqs), 60, **settings)
        assert everything(dataset) == whole[:length]
        assert dataset.summary["has_converged"]
    shorter = run(make_engine(backend=backend), length - 1, **settings)
    assert everything(shorter) == whole[: length - 1]
    assert not shorter.summary["has_converged"]


def test_a_resumed_run_stops_at_the_same_example(make_engine, tmp_path):
    engine = make_engine(max_num_seqs=3)
    accept = until_interrupted(10**9, short)
    expected = run(engine, 60, output=tmp_path / "whole", **CONVERGING | {"accept": accept})
    bytes_of_whole = (tmp_path / "whole" / "examples.jsonl").read_bytes()
    length = len(everything(expected))
    for num_calls in (1, 7, length // 2, length):
        path = tmp_path / f"run{num_calls}"
        accept = until_interrupted(num_calls, short)
        with pytest.raises(KeyboardInterrupt):
            run(engine, 60, output=path, **CONVERGING | {"accept": accept})
        accept = until_interrupted(10**9, short)
        run(engine, 60, output=path, **CONVERGING | {"accept": accept})
        assert (path / "examples.jsonl").read_bytes() == bytes_of_whole
    # Resumed once more after it converged.
    again = run(engine, 60, output=path, **CONVERGING | {"accept": accept})
    assert everything(again) == everything(expected)


def made(index: int, token_ids: list[int], reason: str = "stop") -> Example:
    return Example(index, "", "", "", token_ids, reason, [], 1)


def test_convergence_is_judged_at_the_end_of_a_window():
    test = ConvergenceTest(Convergence(tolerance=0.5, window=2))
    assert not test.is_met_after(made(0, [1, 2, 3, 4]))
    assert not test.is_met_after(made(1, [1, 2, 3, 5]))  # 3 new of 4
    assert not test.is_met_after(made(2, [1, 2, 3, 4]))
    assert test.is_met_after(made(3, [7, 8, 9]))  # 1 new of 3


def test_failed_examples_do_not_count_for_convergence():
    test = ConvergenceTest(Convergence(tolerance=0.9, window=2))
    test.is_met_after(made(0, [1, 2, 3], "rejected"))
    assert not test.is_met_after(made(1, [1, 2, 3]))  # new: the failed one does not count


def test_tolerance_zero_never_stops_and_no_rule_never_stops():
    for settings in (Convergence(tolerance=0.0, window=1), None):
        test = ConvergenceTest(settings)
        assert not any(test.is_met_after(made(i, [1, 2, 3])) for i in range(5))


# --- the summary


def test_the_summary_counts_what_is_there(make_engine, tmp_path):
    dataset = run(make_engine(), 40, accept=short, max_attempts=2, output=tmp_path / "run", seed=3)
    summary = dataset.summary
    examples = everything(dataset)
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["num_examples"] == len(dataset)
    assert summary["num_failed"] == len(dataset.failed) == 40 - len(dataset) > 0
    assert summary["num_tokens"] == sum(len(e.token_ids) for e in dataset)
    assert summary["finish_reasons"] == dict(Counter(e.finish_reason for e in examples))
    rejected = sum(e.attempts - 1 for e in dataset) + sum(e.attempts for e in dataset.failed)
    assert summary["num_rejected_attempts"] == rejected
    assert summary["num_resumed"] == 0
    assert summary["has_converged"] is False
    assert summary["guidance"] == Guidance.recommended().describe()
    assert summary["examples_per_s"] == pytest.approx(40 / summary["elapsed_s"], rel=0.05)


def test_duplicates_and_copies_of_real_are_counted(make_engine):
    """Greedy decoding writes one text per label; one of them is real but for its white space."""
    engine = make_engine()
    settings = {
        "prompt": {"a": "First:", "b": "The ring"},
        "guidance": Guidance.none(),
        "sampling": SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True),
    }
    first, second = run(engine, 2, **settings).texts
    assert first != second and first and second
    dataset = run(engine, 8, real=[f" {first}\n", "another"], **settings)
    assert dataset.texts == [first, second] * 4
    assert dataset.summary["num_duplicates"] == 6
    assert dataset.summary["num_copies_of_real"] == 4


def test_negatives_that_do_not_fit_are_dropped_whole_and_counted(make_engine):
    engine = make_engine()
    real = ["The ring is on the other side of the thing. " * 3] * 6  # 6 of them pass 256 tokens
    dataset = run(engine, 5, real=real, negatives=NegativePrompts(num_examples=6, lag=100))
    longest = 256 - SAMPLING.max_tokens
    for example in dataset:
        texts = [real[0].strip()] * len(example.negatives)
        assert 0 < len(texts) < 6
        shown = " ".join(texts)
        assert len(engine.tokenizer.encode(f"{shown}\n{PROMPT}")) <= longest
        one_more = f"{shown} {real[0].strip()}\n{PROMPT}"
        assert len(engine.tokenizer.encode(one_more)) > longest
    dropped = sum(6 - len(e.negatives) for e in dataset)
    assert dataset.summary["num_negatives_dropped"] == dropped > 0


# --- the run directory


def test_a_run_is_the_same_in_memory_and_on_disk(make_engine, tmp_path):
    engine = make_engine()
    in_memory, on_disk = run(engine), run(engine, output=tmp_path / "run")
    assert list(in_memory) == list(on_disk) == list(SyntheticDataset.load(tmp_path / "run"))
    assert SyntheticDataset.load(tmp_path / "run").summary == on_disk.summary


def test_run_json_says_what_the_bytes_depend_on(make_engine, tmp_path, tiny_models):
    engine = make_engine(max_num_seqs=5)
    run(engine, 3, output=tmp_path / "run", seed=7, accept=short)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["prompts"] == {"": PROMPT}
    assert (settings["num_examples"], settings["seed"], settings["max_attempts"]) == (3, 7, 10)
    assert settings["accept"] == "short"
    assert settings["guidance"]["domain"] == 1.2
    assert settings["guidance"]["implicit_temperature"] == pytest.approx(1.25)
    assert settings["engine"]["max_num_seqs"] == 5
    assert settings["engine"]["device"] == "cpu"
    assert settings["engine"]["backend"] in ("cpu", "reference")
    assert settings["real"]["num_examples"] == 4
    assert set(settings["versions"]) >= {"steer-engine", "torch", "python"}
    for name, directory in (("base", tiny_models.base), ("domain", tiny_models.lora)):
        files = settings["checkpoints"][name]
        assert any(file.endswith(".safetensors") for file in files)
        assert all(len(digest) == 64 for digest in files.values())
        assert all((directory / file).is_file() for file in files)


def test_a_completed_run_returns_at_once(make_engine, tmp_path):
    engine = make_engine()
    first = run(engine, output=tmp_path / "run")
    files = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir()}

    def never(*_):
        raise AssertionError("a completed run needs no forward")

    engine.model.forward = never
    again = run(engine, output=tmp_path / "run")
    assert list(again) == list(first)
    assert again.summary == first.summary
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir()}
    assert after == files
    # A crash between the last example and the summary.
    (tmp_path / "run" / "summary.json").unlink()
    again = run(engine, output=tmp_path / "run")
    assert again.summary["num_examples"] == 12
    assert again.summary["num_resumed"] == 12
    assert (tmp_path / "run" / "summary.json").exists()


def test_an_existing_run_is_refused_without_resume(make_engine, tmp_path):
    engine = make_engine()
    run(engine, output=tmp_path / "run", resume=False)
    before = (tmp_path / "run" / "examples.jsonl").read_bytes()
    with pytest.raises(RunError, match="holds a run already"):
        run(engine, output=tmp_path / "run", resume=False)
    assert (tmp_path / "run" / "examples.jsonl").read_bytes() == before


@pytest.mark.parametrize("num_calls", [0, 1, 5, 11])
def test_an_interrupt_leaves_a_run_that_can_be_resumed(make_engine, tmp_path, num_calls):
    engine = make_engine(max_num_seqs=3)
    run(engine, accept=until_interrupted(10**9), output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(engine, accept=until_interrupted(num_calls), output=tmp_path / "run")
    assert not engine.scheduler.running and not engine.scheduler.waiting
    written = len(SyntheticDataset.load(tmp_path / "run"))
    assert written <= num_calls
    assert not (tmp_path / "run" / "summary.json").exists()
    dataset = run(engine, accept=until_interrupted(10**9), output=tmp_path / "run")
    assert dataset.summary["num_resumed"] == written
    for name in ("examples.jsonl", "run.json"):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "run" / name).read_bytes() == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"num_examples": 13}, "num_examples was 12, now 13"),
        ({"prompt": {"a": PROMPT}}, r'prompts\. was "Ask a question:", now null'),
        ({"real": REAL[:3]}, r"real\.num_examples was 4, now 3"),
        ({"real": REAL[::-1]}, r'real\.sha256 was "'),
        ({"real": None}, r"real\.num_examples was 4, now 0"),
        ({"guidance": Guidance.steer(0.2, 0.2)}, r"guidance\.negative was -0\.2, now 0\.8"),
        ({"sampling": SamplingParams(top_p=0.8, max_tokens=8)}, r"sampling\.top_p was 0\.9, now"),
        ({"negatives": NegativePrompts(2)}, r"negatives\.lag was 3, now 8"),
        ({"until": Convergence(0.1)}, "until was null, now"),
        ({"accept": short}, 'accept was null, now "short"'),
        ({"max_attempts": 3}, "max_attempts was 10, now 3"),
    ],
)
def test_other_settings_are_refused(make_engine, tmp_path, changes, message):
    engine = make_engine()
    run(engine, output=tmp_path / "run")
    with pytest.raises(RunError, match=message):
        run(engine, output=tmp_path / "run", **changes)


def test_another_engine_is_refused_where_bytes_depend_on_it(make_engine, tmp_path):
    run(make_engine(), output=tmp_path / "run")
    for settings, message in [
        ({"domain": "finetune"}, r"checkpoints\.domain\.\S+ was "),
        ({"domain": None}, r"checkpoints\.domain was|guidance gives the base model"),
        ({"dtype": "bfloat16"}, r'engine\.dtype was "float32", now "bfloat16"'),
        ({"max_num_seqs": 9}, r"engine\.max_num_seqs was 8, now 9"),
        ({"backend": "reference"}, r'engine\.backend was "cpu", now "reference"'),
    ]:
        if settings.get("backend") and make_engine().config.backend == "reference":
            continue
        with pytest.raises((RunError, ValueError), match=message):
            run(make_engine(**settings), output=tmp_path / "run")
    # How much cache there is decides who waits, not what is drawn.
    again = run(make_engine(num_blocks=20), output=tmp_path / "run")
    assert len(again) == 12


# --- what is refused before anything is written


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"num_examples": 0}, ValueError, r"num_examples must be an int in \[1,"),
        ({"num_examples": 2.0}, ValueError, "num_examples must be an int"),
        ({"prompt": {}}, ValueError, "prompt must be a str, or a non-empty"),
        ({"prompt": {"a": 5}}, ValueError, "prompt must be a str, or a non-empty"),
        ({"prompt": 5}, ValueError, "prompt must be a str, or a non-empty"),
        ({"prompt": "\ud800"}, ValueError, "prompt holds a lone surrogate"),
        ({"prompt": {"a": "x", "b": "\ud800"}}, ValueError, "prompt b holds a lone surrogate"),
        ({"prompt": {"\ud800": "x"}}, ValueError, "label '.ud800' holds a lone surrogate"),
        ({"max_attempts": 0}, ValueError, "max_attempts must be an int"),
        ({"seed": -1}, ValueError, "seed must be an int"),
        ({"real": []}, DataError, "holds no text"),
        ({"real": "missing.jsonl"}, DataError, "no such file"),
        ({"real": [5]}, DataError, "real must hold strings"),
        ({"prompt": "x" * 300}, ValueError, r"300 tokens; with max_tokens 8 it passes"),
        (
            {"prompt": {"a": "x", "long": "x" * 300}},
            ValueError,
            r"prompt long \(domain pass\) has 300 tokens",
        ),
        ({"sampling": SamplingParams(max_tokens=256)}, ValueError, "passes max_model_len 256"),
    ],
)
def test_a_bad_argument_is_named_before_anything_is_written(
    make_engine, tmp_path, changes, kind, message
):
    engine = make_engine()
    with pytest.raises(kind, match=message):
        run(engine, output=tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
    assert len(run(engine, 2)) == 2


def test_a_prompt_that_can_never_fit_the_cache_is_refused_before_anything_is_written(
    make_engine, tmp_path
):
    with pytest.raises(CapacityError, match="the cache has 2: raise kv_cache_gib"):
        run(make_engine(num_blocks=2), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_negatives_that_need_more_cache_than_there_is_stop_a_run_that_can_be_resumed(
    make_engine, tmp_path
):
    """Three passes of one block each fit; negatives of two blocks do not."""
    settings = {"real": ["The ring is on the other side. " * 5], "output": tmp_path / "run"}
    with pytest.raises(CapacityError, match=r"raise kv_cache_gib, or lower .* negatives"):
        run(make_engine(num_blocks=3), **settings)
    run(make_engine(), **settings)
    assert list(SyntheticDataset.load(tmp_path / "run")) == list(
        run(make_engine(), **settings | {"output": None})
    )


@pytest.mark.parametrize("fields", [{"tolerance": -0.1}, {"tolerance": 2}, {"tolerance": "x"}])
def test_a_bad_tolerance_is_named(fields):
    with pytest.raises(ValueError, match="until's tolerance must be a number"):
        Convergence(**fields)


def test_a_bad_window_is_named():
    with pytest.raises(ValueError, match="until's window must be an int"):
        Convergence(0.1, window=0)


# --- progress


def test_progress_goes_to_standard_error_only(make_engine, capfd):
    run(make_engine(), 5, progress=True)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "examples 5/5" in captured.err
    assert "accepted" in captured.err
    run(make_engine(), 5)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_the_passes_that_a_method_needs_are_run_and_no_other(make_engine):
    engine = make_engine()
    kinds = set()
    decode_rows = engine.scheduler.decode_rows

    def counting():
        for sequence in engine.scheduler.running:
            kinds.update(p.kind for p in sequence.passes)
        return decode_rows()

    engine.scheduler.decode_rows = counting
    run(engine, 3, guidance=Guidance.none())
    assert kinds == {PassKind.DOMAIN}
    run(engine, 3, guidance=Guidance.recommended())
    assert kinds == set(PassKind)
