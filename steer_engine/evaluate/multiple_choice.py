"""Multiple-choice questions as one line of text: `stem A. .. B. .. C. .. D. .. E. .. Answer: X`."""

from __future__ import annotations

import re
from dataclasses import dataclass

LETTERS = "ABCDE"
_ANSWER = re.compile(rf" Answer: ([{LETTERS}])$")
# F, so that a sixth choice is not taken for a part of the fifth.
_CHOICE = re.compile(rf" ([{LETTERS}F])\. ")


@dataclass(frozen=True)
class Question:
    """A multiple-choice question. answer: the right choice's place in choices."""

    stem: str
    choices: tuple[str, ...]
    answer: int

    def __str__(self) -> str:
        """The line that parse reads."""
        choices = " ".join(f"{x}. {c}" for x, c in zip(LETTERS, self.choices, strict=True))
        return f"{self.stem} {choices} Answer: {LETTERS[self.answer]}"


def parse(text: str) -> Question | None:
    """Read a question of five choices; None if the text is anything else.

        stem A. choice B. choice C. choice D. choice E. choice Answer: X

    Line ends and runs of spaces count as one space. Strict: every part is there once, in order and
    not empty, the answer is the letter alone at the end, and no two choices are equal (but for
    case; 1.3 % of CommonsenseQA's own questions repeat one). A lone `A. ` to `F. ` within a part
    makes the text ambiguous, so it is None too.
    """
    text = " ".join(text.split())
    answer = _ANSWER.search(text)
    if not answer:
        return None
    body = text[: answer.start()]
    stem, *parts = _CHOICE.split(body)
    letters, choices = parts[0::2], parts[1::2]
    is_complete = "".join(letters) == LETTERS and all([stem, *choices])
    if not is_complete or "Answer:" in body or len({c.casefold() for c in choices}) < len(choices):
        return None
    return Question(stem, tuple(choices), LETTERS.index(answer[1]))
