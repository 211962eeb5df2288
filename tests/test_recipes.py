"""Task recipes: raw releases become examples, and a recipe fills in what the user leaves open."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path

import pytest
from helpers import call, one_line

from steer_engine.errors import DataError
from steer_engine.finetune.data import read_examples
from steer_engine.recipes import RECIPES, find_recipe, is_multiple_choice, prepare

CHOICES = ("bank", "mall", "park", "train station", "desert")


def csqa_record(stem="Where is a ring?", choices=CHOICES, answer: str | None = "B") -> dict:
    listed = [
        {"label": letter, "text": text} for letter, text in zip("ABCDE", choices, strict=False)
    ]
    record = {"id": "1", "question": {"stem": stem, "choices": listed}}
    return record if answer is None else record | {"answerKey": answer}


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def texts(recipe: str, path: Path) -> list[str]:
    return [example.text for example in prepare(find_recipe(recipe), path).examples]


# --- CommonsenseQA


def test_commonsenseqa_is_the_question_its_choices_and_the_letter(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [csqa_record(), csqa_record(stem="Two  spaces?")])
    line = "A. bank B. mall C. park D. train station E. desert Answer: B"
    assert texts("commonsenseqa", path) == [f"Where is a ring? {line}", f"Two spaces? {line}"]
    assert all(map(is_multiple_choice, texts("commonsenseqa", path)))


def test_questions_without_an_answer_or_with_an_ambiguous_form_are_left_out(tmp_path):
    records = [
        csqa_record(),
        csqa_record(answer=None),
        csqa_record(choices=("bank", "bank", "a", "b", "c")),
        csqa_record(stem="Is it A. or B. here?"),
        csqa_record(),
    ]
    prepared = prepare(RECIPES["commonsenseqa"], write_jsonl(tmp_path / "q.jsonl", records))
    assert len(prepared.examples) == 1
    assert (prepared.num_left_out, prepared.num_repeated) == (3, 1)


@pytest.mark.parametrize("record", [{"text": "a"}, csqa_record(choices=CHOICES[:4]), [1], "bare"])
def test_a_record_of_another_kind_is_named_with_its_line(tmp_path, record):
    path = write_jsonl(tmp_path / "q.jsonl", [csqa_record(), record])
    with pytest.raises(DataError, match=r"q\.jsonl: line 2: not a CommonsenseQA record"):
        prepare(RECIPES["commonsenseqa"], path)


def test_a_file_without_a_usable_record_says_what_was_looked_for(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [csqa_record(answer=None)])
    with pytest.raises(DataError, match="none of 1 records fits: questions with choices A to E"):
        prepare(RECIPES["commonsenseqa"], path)


@pytest.mark.parametrize(
    "text",
    [
        "Where? A. a B. b C. c D. d E. e",
        "Where? A. a B. b C. c D. d Answer: A",
        "Where? A. a B. b C. c D. d E. e Answer: F",
        "Where? A. a B. b D. c C. d E. e Answer: A",
        "A. a B. b C. c D. d E. e Answer: A",
        "",
    ],
)
def test_the_format_check_refuses_what_is_no_whole_question(text):
    assert is_multiple_choice("Where? A. a B. b C. c D. d E. e Answer: A")
    assert not is_multiple_choice(text)


# --- toxic comments


def comments() -> list[dict]:
    records = [{"comment_text": f"a kind word number {i}", "toxic": 0} for i in range(20)]
    records += [{"comment_text": f'"an unkind\n\nword number {i}"', "toxic": 1} for i in range(5)]
    return [*records, {"comment_text": "too short", "toxic": 1}]


def test_comments_are_balanced_by_label_with_a_prompt_each(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", comments())
    recipe = RECIPES["toxic-comments"]
    prepared = prepare(recipe, path)
    assert prepared.num_by_label == {"non-toxic": 5, "toxic": 5}
    assert (prepared.num_left_out, prepared.num_unbalanced) == (1, 15)
    assert all(e.prompt == recipe.prompt[e.label] for e in prepared.examples)
    assert "an unkind word number 0" in [e.text for e in prepared.examples]
    assert prepare(recipe, path) == prepared
    assert prepare(recipe, path, seed=1) != prepared


def test_a_file_that_lacks_a_label_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", comments()[:20])
    with pytest.raises(DataError, match=r"c\.jsonl: no record is toxic; every label needs some"):
        prepare(RECIPES["toxic-comments"], path)


def test_comments_come_as_csv_with_labels_as_text(tmp_path):
    with open(tmp_path / "c.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "comment_text", "toxic"])
        writer.writeheader()
        writer.writerows(comments())
        writer.writerow({"comment_text": "nobody has scored this one", "toxic": -1})
    write_jsonl(tmp_path / "c.jsonl", comments())
    assert texts("toxic-comments", tmp_path / "c.csv") == texts(
        "toxic-comments", tmp_path / "c.jsonl"
    )


def test_a_comment_with_another_label_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", [{"comment_text": "some words in a row"}])
    with pytest.raises(DataError, match="line 1: field \"toxic\" must be 0, 1 or -1, got 'None'"):
        prepare(RECIPES["toxic-comments"], path)


# --- research questions


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("How do the rings  of a planet form?", "How do the rings of a planet form?"),
        ("RingNet: Can rings be told from hens?", "Can rings be told from hens?"),
        ("We ask two questions: (1) How do the rings form?", "How do the rings form?"),
        ("this is about: ii) “why do the rings form?”", "Why do the rings form?"),
        ("2.5 rings or more of them?", "2.5 rings or more of them?"),
        ("Rings form in discs.", None),
        ("How? And why do rings form?", None),
        ("What is $x$ in a ring?", None),
        ("Why rings?", None),
        (" ".join(["why"] * 41) + "?", None),
        ("", None),
    ],
)
def test_a_research_question_is_one_sentence_without_what_stands_in_front(tmp_path, raw, expected):
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": raw}, {"text": "Is it a ring or not?"}])
    found = texts("research-questions", path)
    assert found == ([] if expected is None else [expected]) + ["Is it a ring or not?"]


@pytest.mark.parametrize("module", [gzip, bz2, lzma])
def test_raw_files_may_be_compressed(tmp_path, module):
    suffix = {gzip: "gz", bz2: "bz2", lzma: "xz"}[module]
    path = tmp_path / f"q.txt.{suffix}"
    with module.open(path, "wt") as file:
        file.write("How do the rings form?\nnone here\n")
    assert texts("research-questions", path) == ["How do the rings form?"]
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=rf"q\.txt\.{suffix}: (damaged|cannot be read)"):
        prepare(RECIPES["research-questions"], path)


# --- the command line


def test_prepare_writes_what_finetune_reads(capsys, tmp_path):
    raw = write_jsonl(tmp_path / "c.jsonl", comments())
    output = tmp_path / "new" / "train.jsonl"
    status, stdout, _ = call(capsys, "prepare", "toxic-comments", raw, "--output", output)
    assert status == 0
    assert "10 examples, 5 non-toxic, 5 toxic; 1 records left out" in stdout
    assert read_examples(output) == prepare(RECIPES["toxic-comments"], raw).examples


def test_an_unknown_recipe_is_named_with_the_nearest(capsys, tmp_path):
    status, _, stderr = call(capsys, "prepare", "commonsense", tmp_path / "x", "--output", "y")
    assert status == 2
    assert "did you mean 'commonsenseqa'" in one_line(stderr)


@pytest.fixture
def generate(capsys, tiny_models, tmp_path):
    def run(*more) -> dict:
        command = ["generate", "--base", tiny_models.base, "--num-examples", 2, "--no-progress"]
        command += ["--output", tmp_path / "run", "--device", "cpu", "--max-attempts", 1]
        status, _, stderr = call(capsys, *command, *more)
        assert status == 0, stderr
        return json.loads((tmp_path / "run" / "run.json").read_text())

    return run


def test_a_recipe_fills_in_prompt_stop_length_layout_and_check(generate):
    run = generate("--recipe", "commonsenseqa")
    assert run["prompts"] == {"": "Generate a multiple-choice question:"}
    assert run["accept"] == "is_multiple_choice"
    assert (run["sampling"]["max_tokens"], run["sampling"]["stop"]) == (120, [])
    assert run["negatives"]["separator"] == "\n"


def test_a_recipe_with_labels_asks_for_each(generate):
    assert list(generate("--recipe", "toxic-comments")["prompts"]) == ["toxic", "non-toxic"]


def test_the_command_line_and_the_run_file_come_before_the_recipe(generate, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("recipe: research-questions\nmax_tokens: 20\nseparator: '|'\n")
    run = generate("--config", config, "--prompt", "ask:", "--max-tokens", 10, "--stop", "!")
    assert run["prompts"] == {"": "ask:"}
    assert (run["sampling"]["max_tokens"], run["sampling"]["stop"]) == (10, ["!"])
    assert run["negatives"]["separator"] == "|"


def test_a_prompt_replaces_all_prompts_of_a_recipe(generate):
    assert generate("--recipe", "toxic-comments", "--prompt", "ask:")["prompts"] == {"": "ask:"}
