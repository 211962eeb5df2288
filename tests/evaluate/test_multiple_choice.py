"""Reading multiple-choice questions strictly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_engine.evaluate.multiple_choice import Question, parse

TEXT = "Where is a bench? A. park B. bus stop C. mall D. court E. office Answer: B"
QUESTION = Question("Where is a bench?", ("park", "bus stop", "mall", "court", "office"), 1)


def test_a_question_is_read_and_written():
    assert parse(TEXT) == QUESTION
    assert str(QUESTION) == TEXT


def test_line_ends_and_runs_of_spaces_count_as_a_space():
    assert parse("\n" + TEXT.replace(" A.", "\nA.").replace(" B.", " \t B.") + "\n") == QUESTION


def test_abbreviations_within_a_part_are_kept():
    text = TEXT.replace("a bench", "St. John's U.S. bench of George W. Bush")
    assert parse(text).stem == "Where is St. John's U.S. bench of George W. Bush?"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Where is a bench? ", ""),  # no stem
        (" Answer: B", ""),  # no answer
        ("Answer: B", "Answer: F"),
        ("Answer: B", "Answer: b"),
        ("Answer: B", "Answer: B."),
        ("Answer: B", "Answer: B C"),
        ("Answer: B", "Answer: bus stop"),
        ("Answer: B", "answer: B"),
        ("Answer: B", "Answer: A Answer: B"),
        (" E. office", ""),  # four choices
        ("E. office", "E. office F. home"),  # a sixth
        ("C. mall D. court", "D. court C. mall"),
        ("C. mall", "C."),
        ("C. mall", "C. Park"),  # the first choice again
        ("C. mall", "C. mall C. hall"),
        ("a bench", "George A. Smith's bench"),  # an A. that is no choice
        ("A. park", "A) park"),
        ("E. office Answer", "E. Answer"),
        (TEXT, TEXT + " " + TEXT),
        (TEXT, ""),
    ],
)
def test_anything_else_is_refused(old, new):
    assert old in TEXT
    assert parse(TEXT.replace(old, new)) is None


words = st.text(st.characters(categories=["Ll", "Nd"]), min_size=1, max_size=8)


@given(
    words,
    st.lists(words, min_size=5, max_size=5, unique_by=str.casefold),
    st.integers(0, 4),
)
def test_what_is_written_is_read_back(stem, choices, answer):
    question = Question(stem, tuple(choices), answer)
    assert parse(str(question)) == question


@given(st.text(alphabet="ABCDEx. ?\nAnswer:", max_size=80))
def test_any_text_is_a_question_or_none_and_questions_come_back(text):
    question = parse(text)
    assert question is None or parse(str(question)) == question
