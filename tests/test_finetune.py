"""Fine-tuning: what is learnt, what is held out, what stays after an interrupt."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import VARIANTS, call, copy_checkpoint, edit_json, hf_model, one_line, save

from steer_engine import Engine, Guidance, SamplingParams
from steer_engine.checkpoint import Checkpoint
from steer_engine.dataset import read_texts
from steer_engine.errors import CheckpointError, DataError, RunError, SteerError
from steer_engine.finetune import FinetuneConfig, FinetuneRecord, TrainingExample, finetune
from steer_engine.finetune.data import (
    encode_example,
    read_examples,
    shuffled_batches,
    split_examples,
)
from steer_engine.finetune.progress import TrainingProgress
from steer_engine.finetune.trainer import LoraTrainer, learning_rate_factor, load_falcon
from steer_engine.tokenizer import Tokenizer

PROMPT = "the question:"
TINY = FinetuneConfig(rank=4, alpha=8, learning_rate=1e-2, epochs=2, batch_size=8, dropout=0.05)
NAMES = ("ring", "inn", "hen", "tree", "tin", "rain", "heron", "oat")
TEXTS = [f"the {a} and the {b} in the ring?" for a in NAMES for b in NAMES]


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> Path:
    return write_jsonl(
        tmp_path_factory.mktemp("data") / "train.jsonl",
        [{"text": text, "label": text.split()[1]} for text in TEXTS],
    )


@pytest.fixture(scope="module")
def tuned(tiny_models, train, tmp_path_factory) -> Path:
    """The directory of an undisturbed fine-tune with TINY."""
    output = tmp_path_factory.mktemp("tuned") / "adapter"
    finetune(tiny_models.base, train, output, prompt=PROMPT, config=TINY)
    return output


def digest(directory: Path) -> str:
    return hashlib.sha256((directory / "adapter_model.safetensors").read_bytes()).hexdigest()


# --- what is learnt


def test_the_held_out_loss_falls_and_is_written_down(tuned, train):
    record = FinetuneRecord.read(tuned)
    assert record.is_finished
    assert len(record.held_out_losses) == 3 and len(record.train_losses) == 2
    assert record.best_loss == min(record.held_out_losses) < record.held_out_losses[0] - 0.5
    assert record.settings["rank"] == 4 and record.settings["dtype"] == "float32"
    assert record.settings["data_sha256"] == hashlib.sha256(train.read_bytes()).hexdigest()
    assert set(record.settings["versions"]) >= {"torch", "transformers", "peft"}
    assert {p.name for p in tuned.iterdir()} == {
        ".lock",
        "adapter_config.json",
        "adapter_model.safetensors",
        "finetune.json",
        "held_out.jsonl",
        "train.jsonl",
    }
    modes = {(tuned / n).stat().st_mode for n in ("adapter_model.safetensors", "held_out.jsonl")}
    assert len(modes) == 1, "whoever reads one file can read the other"


def test_the_adapter_is_the_same_in_the_engine_and_in_peft(tiny_models, tuned):
    from peft import PeftModel
    from transformers import FalconForCausalLM

    falcon = FalconForCausalLM.from_pretrained(tiny_models.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(falcon, tuned).eval()
    engine = Engine.from_pretrained(tiny_models.base, tuned, dtype="float32", device="cpu")
    ids = engine.tokenizer.encode(PROMPT)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(engine.logits([PROMPT], "domain")[0], expected, atol=1e-4, rtol=1e-4)
    difference = engine.logits([PROMPT], "domain") - engine.logits([PROMPT], "base")
    assert difference.abs().max() > 0.1
    short = SamplingParams(max_tokens=5)
    assert engine.generate([PROMPT], guidance=Guidance.contrastive(0.1), sampling=short)


def test_the_loss_is_over_text_and_end_of_text_behind_the_prompt(tiny_models, tuned):
    from peft import PeftModel
    from transformers import FalconForCausalLM

    falcon = FalconForCausalLM.from_pretrained(tiny_models.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(falcon, tuned).eval()
    tokenizer, nats, count = Tokenizer(tiny_models.base), 0.0, 0
    for text in read_texts(tuned / "held_out.jsonl"):
        prompt_ids, text_ids = tokenizer.encode(PROMPT), [*tokenizer.encode(f" {text}"), 0]
        ids = torch.tensor([prompt_ids + text_ids])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(dim=-1)
        for position, token_id in enumerate(text_ids, start=len(prompt_ids)):
            nats -= logprobs[position - 1, token_id].item()
            count += 1
    assert nats / count == pytest.approx(FinetuneRecord.read(tuned).best_loss, abs=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_falcon_is_loaded_as_transformers_loads_it(tmp_path, variant):
    model = hf_model(**VARIANTS[variant])
    base = save(model, tmp_path / "base")
    loaded = load_falcon(base, Checkpoint(base).config, "float32").eval()
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_base_in_the_old_spelling_is_trained_too(tiny_models, train, tuned, tmp_path):
    base = copy_checkpoint(tiny_models.base, tmp_path / "old")
    edit_json(
        base / "config.json",
        model_type="RefinedWebModel",
        n_layer=2,
        num_hidden_layers=None,
        n_head=3,
        num_attention_heads=None,
    )
    one_epoch = replace(TINY, epochs=1)
    record = finetune(base, train, tmp_path / "out", prompt=PROMPT, config=one_epoch)
    assert record.held_out_losses[0] == FinetuneRecord.read(tuned).held_out_losses[0]


def test_a_bf16_base_gets_an_fp32_adapter(tiny_models, train, tmp_path):
    from safetensors.torch import load_file

    config = replace(TINY, dtype="bfloat16", epochs=1)
    record = finetune(tiny_models.base, train, tmp_path / "out", prompt=PROMPT, config=config)
    assert record.held_out_losses[1] < record.held_out_losses[0]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert len(tensors) == 2 * 4 * 2, "A and B of all four linear modules of both layers"


def test_the_learning_rate_rises_over_a_tenth_and_falls_to_zero():
    factors = [learning_rate_factor(p) for p in (0.0, 0.1, 0.55, 1.0)]
    assert factors == pytest.approx([0.05, 1.0, 0.5, 0.0])


# --- the data


def test_only_the_text_and_its_end_count_in_the_loss(tiny_models):
    tokenizer = Tokenizer(tiny_models.base)
    row = encode_example(TrainingExample("one", "ask:"), tokenizer, 0, 100)
    assert row.ids == [*tokenizer.encode("ask:"), *tokenizer.encode(" one"), 0]
    assert row.prompt_len == len(tokenizer.encode("ask:"))


def test_a_text_beyond_the_context_is_cut_and_its_end_is_not_learnt(tiny_models, tmp_path):
    tokenizer = Tokenizer(tiny_models.base)
    whole = encode_example(TrainingExample("xyz" * 10, "ask:"), tokenizer, 0, 100)
    cut = encode_example(TrainingExample("xyz" * 10, "ask:"), tokenizer, 0, 20)
    assert cut.ids == whole.ids[:20] and 0 not in cut.ids
    data = write_jsonl(tmp_path / "t.jsonl", ["a", "b", "c", "xyz" * 10, "x" * 30])
    config = replace(TINY, max_model_len=20, epochs=1)
    record = finetune(tiny_models.base, data, tmp_path / "out", prompt="ask:", config=config)
    assert record.num_cut == 2


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_record_may_name_its_own_prompt_and_label(tmp_path, suffix):
    path = tmp_path / f"train{suffix}"
    if suffix == ".jsonl":
        write_jsonl(path, [{"text": "a", "prompt": "own", "label": 1}, {"text": " b "}, "c"])
    elif suffix == ".csv":
        path.write_text("label,text,prompt\n1,a,own\n,b,\n,c,\n")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        columns = {"text": ["a", "b", "c"], "prompt": ["own", None, None], "label": [1, None, None]}
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)
    assert read_examples(path, "shared") == [
        TrainingExample("a", "own", "1"),
        TrainingExample("b", "shared"),
        TrainingExample("c", "shared"),
    ]
    with pytest.raises(DataError, match=r'has no "prompt" of its own; give one for all'):
        read_examples(path)


def test_a_text_file_holds_one_example_a_line(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("a\n\n b\n")
    assert read_examples(path, "p") == [TrainingExample("a", "p"), TrainingExample("b", "p")]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "train.jsonl: holds no text"),
        ([" "], "train.jsonl: holds no text"),
        (["a", 5], "line 2: needs a string field"),
        ([{"text": "a", "prompt": 5}], 'line 1: field "prompt" must be a string, got a int'),
        ([{"text": "a", "label": "\ud800"}], "line 1: holds a lone surrogate"),
        (["same words", " Same  Words "], "holds one distinct text; to hold one out takes two"),
        ([{"text": "a", "prompt": "x" * 300}, "b"], "takes 300 tokens and leaves no room"),
    ],
)
def test_data_that_cannot_be_trained_on_is_named(tiny_models, tmp_path, records, message):
    path = write_jsonl(tmp_path / "train.jsonl", records)
    with pytest.raises(DataError, match=message):
        finetune(tiny_models.base, path, tmp_path / "out", prompt=PROMPT, config=TINY)
    assert not (tmp_path / "out").exists()


def test_no_copy_of_a_held_out_text_is_trained_on():
    texts = [f"text {i // 3}" for i in range(300)]
    texts[1::3] = [t.upper() for t in texts[1::3]]
    texts[2::3] = [t.replace(" ", "  ") for t in texts[2::3]]
    examples = [TrainingExample(text, "p", str(i)) for i, text in enumerate(texts)]
    train, held_out = split_examples(examples, share=0.1, seed=3)
    assert len(held_out) == 30, "10 of 100 distinct texts, three copies each"
    keys = [{e.text.lower().split()[1] for e in half} for half in (train, held_out)]
    assert not keys[0] & keys[1]
    assert sorted(train + held_out, key=lambda e: int(e.label)) == examples
    assert all(int(a.label) < int(b.label) for half in (train, held_out) for a, b in pairwise(half))
    assert split_examples(examples, share=0.1, seed=3) == (train, held_out)
    assert split_examples(examples, share=0.1, seed=4).held_out != held_out


def test_the_split_is_written_beside_the_adapter_with_all_fields(tuned):
    halves = [read_examples(tuned / f"{name}.jsonl") for name in ("train", "held_out")]
    assert [len(half) for half in halves] == [61, 3], "5 % of 64 texts are held out"
    assert sorted(e.text for half in halves for e in half) == sorted(TEXTS)
    assert {e.prompt for half in halves for e in half} == {PROMPT}
    assert all(e.label == e.text.split()[1] for half in halves for e in half)


def test_batches_hold_every_example_once_beside_others_of_its_length():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 200, 333).tolist()
    batches = shuffled_batches(lengths, 8, rng)
    assert sorted(i for batch in batches for i in batch) == list(range(333))
    assert max(map(len, batches)) == 8
    spreads = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
    assert np.median(spreads) < 30, "a random batch of 8 spreads over about 155"
    first_lengths = [lengths[batch[0]] for batch in batches]
    assert first_lengths != sorted(first_lengths)


# --- repeating, interrupting, resuming


def test_same_seed_gives_same_bytes_and_another_seed_others(tiny_models, train, tuned, tmp_path):
    finetune(tiny_models.base, train, tmp_path / "same", prompt=PROMPT, config=TINY)
    assert digest(tmp_path / "same") == digest(tuned)
    other = replace(TINY, seed=1)
    finetune(tiny_models.base, train, tmp_path / "other", prompt=PROMPT, config=other)
    assert digest(tmp_path / "other") != digest(tuned)


def test_an_interrupt_keeps_the_best_adapter_and_the_same_command_resumes(
    capsys, monkeypatch, tiny_models, train, tuned, tmp_path
):
    output = tmp_path / "out"
    command = ["finetune", "--base", tiny_models.base, "--train", train, "--output", output]
    command += ["--prompt", PROMPT, "--rank", 4, "--alpha", 8, "--learning-rate", 1e-2]
    command += ["--epochs", 2, "--batch-size", 8, "--dropout", 0.05]
    num_steps = 0

    def interrupt_in_the_second_epoch(self, step):
        nonlocal num_steps
        num_steps += 1
        if num_steps == 11:
            os.kill(os.getpid(), signal.SIGINT)

    previous = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "show_step", interrupt_in_the_second_epoch)
        status, _, stderr = call(capsys, *command)
    signal.signal(signal.SIGINT, previous)
    assert status == 130
    assert "epoch 1/2: training loss" in stderr and "epoch 2/2" not in stderr
    assert "interrupted: the adapter of epoch 1 of 1 is kept, held-out loss" in stderr
    assert "run the same command to resume" in stderr
    assert Engine.from_pretrained(tiny_models.base, output, device="cpu")

    status, stdout, stderr = call(capsys, *command)
    assert status == 0
    assert "resumed after epoch 1" in stderr and "epoch 2/2" in stderr
    assert "before training" in stdout and str(output) in stdout
    assert digest(output) == digest(tuned)
    assert FinetuneRecord.read(output).held_out_losses == FinetuneRecord.read(tuned).held_out_losses
    assert not (output / "state.pt").exists()


def test_a_finished_fine_tune_is_returned_as_it_is(monkeypatch, tiny_models, train, tuned):
    monkeypatch.setattr(LoraTrainer, "__init__", None)
    record = finetune(tiny_models.base, train, tuned, prompt=PROMPT, config=TINY)
    assert record == FinetuneRecord.read(tuned)


def test_a_directory_with_something_else_is_refused(tiny_models, train, tuned, tmp_path):
    def run(output, **changes):
        arguments = {"prompt": PROMPT, "config": TINY} | changes
        finetune(tiny_models.base, train, output, **arguments)

    with pytest.raises(RunError, match="holds a fine-tune already"):
        run(tuned, resume=False)
    with pytest.raises(RunError, match="epochs was 2, now 3"):
        run(tuned, config=replace(TINY, epochs=3))
    with pytest.raises(RunError, match='prompt was "the question:", now "another"'):
        run(tuned, prompt="another")
    with pytest.raises(RunError, match=r"has an adapter but no finetune\.json"):
        run(tiny_models.lora)
    copy = copy_checkpoint(tuned, tmp_path / "damaged")
    (copy / "finetune.json").write_text("{")
    with pytest.raises(RunError, match=r"finetune\.json: damaged"):
        run(copy)


def test_a_damaged_state_is_named(tiny_models, train, tuned, tmp_path):
    copy = copy_checkpoint(tuned, tmp_path / "copy")
    edit_json(copy / "finetune.json", is_finished=False)
    (copy / "state.pt").write_bytes(b"PK not a state")
    with pytest.raises(RunError, match=r"state\.pt: damaged .*; delete it to start again"):
        finetune(tiny_models.base, train, copy, prompt=PROMPT, config=TINY)


def test_the_best_epoch_is_kept_and_patience_ends_the_run(
    monkeypatch, tiny_models, train, tmp_path
):
    losses = iter([9.0, 3.0, 2.0, 4.0, 2.5, 1.0])
    monkeypatch.setattr(LoraTrainer, "held_out_loss", lambda self: next(losses))
    save_adapter, saved = LoraTrainer.save_adapter, []

    def save_and_note(self, directory):
        save_adapter(self, directory)
        saved.append(digest(directory))

    monkeypatch.setattr(LoraTrainer, "save_adapter", save_and_note)
    config = replace(TINY, epochs=5, patience=2)
    record = finetune(tiny_models.base, train, tmp_path / "out", prompt=PROMPT, config=config)
    assert record.held_out_losses == [9.0, 3.0, 2.0, 4.0, 2.5], "two epochs after the best"
    assert record.best_epoch == 2 and record.is_finished
    assert len(set(saved)) == 2 and digest(tmp_path / "out") == saved[1]


def test_a_training_that_learns_nothing_says_so():
    record = FinetuneRecord({}, "base", "train", 1, 1, 0, held_out_losses=[2.0])
    record.add_epoch(1.0, 2.5)
    assert record.describe().endswith("2.0000 before training; nothing was learnt")


# --- errors


def test_a_training_that_diverges_names_the_setting(tiny_models, train, tmp_path):
    config = replace(TINY, learning_rate=1e30)
    with pytest.raises(RunError, match=r"diverged: .* lower learning_rate"):
        finetune(tiny_models.base, train, tmp_path / "out", prompt=PROMPT, config=config)


def test_a_base_without_an_end_of_text_is_refused(tiny_models, train, tmp_path):
    base = copy_checkpoint(tiny_models.base, tmp_path / "base")
    edit_json(base / "config.json", eos_token_id=None)
    (base / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="names no eos_token_id"):
        finetune(base, train, tmp_path / "out", prompt=PROMPT, config=TINY)


@pytest.mark.parametrize("package", ["transformers", "peft"])
def test_a_missing_extra_is_named_with_its_remedy(monkeypatch, tiny_models, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SteerError, match=f"needs {package}; run `pip install transformers peft`"):
        finetune(tiny_models.base, tmp_path / "no.txt", tmp_path / "out", prompt=PROMPT)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0),
        ("alpha", 1.5),
        ("dropout", 1.0),
        ("learning_rate", 0),
        ("epochs", 0),
        ("patience", -1),
        ("batch_size", 0),
        ("held_out_share", 0.0),
        ("seed", -1),
    ],
)
def test_a_setting_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must be"):
        FinetuneConfig(**{field: value})


@pytest.mark.parametrize(
    ("more", "status", "expected"),
    [
        (["--train", "missing.jsonl"], 1, "missing.jsonl: no such file"),
        (["--base", "nowhere"], 1, "nowhere: no such directory"),
        (["--rank", "0"], 2, "rank must be an int in [1, inf), got 0"),
        (["--device", "tpu"], 2, "device must be auto, cpu, cuda or cuda:N"),
        (["--max-model-len", "999"], 2, "max_model_len 999 is over the model's context"),
    ],
)
def test_the_command_fails_with_one_line(
    capsys, tiny_models, train, tmp_path, more, status, expected
):
    command = ["finetune", "--base", tiny_models.base, "--train", train, "--prompt", PROMPT]
    got, _, stderr = call(capsys, *command, "--output", tmp_path / "out", *more)
    assert got == status
    assert expected in one_line(stderr)


def test_the_command_needs_base_train_and_output(capsys):
    status, _, stderr = call(capsys, "finetune", "--base", "b", "--train", "t")
    assert status == 2
    assert one_line(stderr) == "error: --output is required"
