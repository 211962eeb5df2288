"""Task recipes: the paper's three sets as prompts, stop rules, layouts and readers of raw files.

A recipe's raw files are the data sets' original releases. `prepare` turns one into examples for
`finetune`; the other fields are arguments of Engine.generate_dataset, so that what was learnt and
what is asked for match.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .dataset import read_records, text_of
from .errors import DataError, nearest_hint
from .evaluate.multiple_choice import LETTERS, Question, parse
from .finetune import TrainingExample
from .negatives import NegativePrompts
from .sampling import SamplingParams

QUESTION_WORDS = range(4, 41)
COMMENT_WORDS = range(4, 61)
FORMULA_SIGNS = re.compile(r"[$\\{}^_]")
# "(1) ", "ii) ", "2. ", quotes and dashes in front; quotes behind.
ENUMERATION_OR_QUOTES = re.compile(r"^\W*(?:(?:\d+[.)]|(?:[ivx]+|[a-e])\))\s)?\W*|[^\w?]+$")
TOP_P = 0.9


@dataclass(frozen=True)
class Recipe:
    """One task.

    Attributes:
        name: as the command line calls it.
        about: what its examples are and which raw records are kept, in one line.
        prompt: the instruction, or {label: instruction}.
        sampling, negatives, accept: as in Engine.generate_dataset.
        read: (text, label) of a raw record, or None to leave it out; raises DataError with the
            given place if the record is of another kind. Labels are keys of `prompt`, or None.
        is_balanced: whether labels are cut down to equal numbers.
    """

    name: str
    about: str
    prompt: str | Mapping[str, str]
    sampling: SamplingParams
    negatives: NegativePrompts
    read: Callable[[dict, str], tuple[str, str | None] | None]
    accept: Callable[[str], bool] | None = None
    is_balanced: bool = False

    def options(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The command line's options that the recipe fills in.

        chosen: the user's own values; a prompt or prompts among them replace the recipe's.
        """
        options = {
            "stop": list(self.sampling.stop),
            "max_tokens": self.sampling.max_tokens,
            "template": self.negatives.template,
            "separator": self.negatives.separator,
        }
        if chosen.get("prompt") is None and chosen.get("prompts") is None:
            is_one = isinstance(self.prompt, str)
            options |= {"prompt": self.prompt} if is_one else {"prompts": dict(self.prompt)}
        return options


class Prepared(NamedTuple):
    """What prepare read.

    num_left_out: records that are not of the recipe's form; num_repeated: copies of kept ones;
    num_unbalanced: dropped to balance the labels.
    """

    examples: list[TrainingExample]
    num_left_out: int
    num_repeated: int
    num_unbalanced: int

    @property
    def num_by_label(self) -> dict[str, int]:
        """{label: examples}; empty where there are no labels."""
        return dict(Counter(e.label for e in self.examples if e.label is not None))


def prepare(recipe: Recipe, raw: str | Path, seed: int = 0) -> Prepared:
    """Read a raw file (.jsonl, .csv, .parquet or .txt, also .gz, .bz2, .xz) into examples.

    seed: of the draw that balances labels; the order of the file is kept.
    Raises: DataError naming file and line, or if no record is left.
    """
    found: dict[tuple[str, str | None], None] = {}
    num_left_out = num_repeated = 0
    for where, record in read_records(Path(raw)):
        pair = recipe.read(record, where)
        if pair is None:
            num_left_out += 1
        elif pair in found:
            num_repeated += 1
        else:
            found[pair] = None
    if not found:
        raise DataError(f"{raw}: none of {num_left_out} records fits: {recipe.about}")
    if not isinstance(recipe.prompt, str):
        missing = sorted(set(recipe.prompt) - {label for _, label in found})
        if missing:
            raise DataError(f"{raw}: no record is {' or '.join(missing)}; every label needs some")
    kept = _balance(list(found), seed) if recipe.is_balanced else list(found)
    examples = [TrainingExample(text, _prompt_of(recipe, label), label) for text, label in kept]
    return Prepared(examples, num_left_out, num_repeated, len(found) - len(kept))


def find_recipe(name: str) -> Recipe:
    """A recipe by its name. Raises ValueError naming the nearest."""
    if name not in RECIPES:
        raise ValueError(
            f"recipe must be one of {', '.join(RECIPES)}, got {name!r}{nearest_hint(name, RECIPES)}"
        )
    return RECIPES[name]


def _prompt_of(recipe: Recipe, label: str | None) -> str:
    return recipe.prompt if isinstance(recipe.prompt, str) else recipe.prompt[label]


def _balance(pairs: list[tuple[str, str | None]], seed: int) -> list[tuple[str, str | None]]:
    """As many of each label as the rarest has, drawn at random."""
    indices_by_label: dict[str | None, list[int]] = {}
    for index, (_, label) in enumerate(pairs):
        indices_by_label.setdefault(label, []).append(index)
    smallest = min(map(len, indices_by_label.values()))
    rng = np.random.default_rng(seed)
    kept: set[int] = set()
    for label in sorted(indices_by_label):
        kept.update(rng.choice(indices_by_label[label], smallest, replace=False).tolist())
    return [pair for index, pair in enumerate(pairs) if index in kept]


def _read_question(record: dict, where: str) -> tuple[str, None] | None:
    """A field "question" or "text". What stands before a colon is cut off: in a title it is the
    system's name, in an abstract the announcement of the question.
    """
    field = "question" if isinstance(record, dict) and "question" in record else "text"
    text = " ".join(text_of(record, where, field).split())
    text = ENUMERATION_OR_QUOTES.sub("", text.split(": ")[-1])
    is_one_question = text.endswith("?") and text.count("?") == 1
    if not is_one_question or FORMULA_SIGNS.search(text) or len(text.split()) not in QUESTION_WORDS:
        return None
    return text[0].upper() + text[1:], None


def _read_comment(record: dict, where: str) -> tuple[str, str] | None:
    """Jigsaw's comment_text and toxic (0 or 1; -1 stands for not scored).

    Quotes of the release's CSV and marks of a talk page's indents and lists are cut off.
    """
    text = " ".join(text_of(record, where, "comment_text").split()).strip(" \"':*")
    labels = {"0": "non-toxic", "1": "toxic", "-1": None}
    value = str(record.get("toxic"))
    if value not in labels:
        raise DataError(f'{where}: field "toxic" must be 0, 1 or -1, got {value!r}')
    label = labels[value]
    return (text, label) if label and len(text.split()) in COMMENT_WORDS else None


def _read_commonsenseqa(record: dict, where: str) -> tuple[str, None] | None:
    """The release's question.stem, question.choices and answerKey (left out of the test split)."""
    try:
        stem, choices = record["question"]["stem"], record["question"]["choices"]
        texts = {choice["label"]: choice["text"] for choice in choices}
        texts = tuple(texts[letter] for letter in LETTERS)
    except (KeyError, TypeError):
        raise DataError(
            f"{where}: not a CommonsenseQA record; needs question.stem, question.choices A to E "
            "and answerKey"
        ) from None
    answer = record.get("answerKey")
    if answer not in tuple(LETTERS):
        return None
    question = parse(str(Question(stem, texts, LETTERS.index(answer))))
    return question and (str(question), None)


def is_multiple_choice(text: str) -> bool:
    """Whether a text is a whole CommonsenseQA-style question: see parse."""
    return parse(text) is not None


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="research-questions",
            about="research questions, one of 4 to 40 words a record, without formulas",
            prompt="Generate a research question:",
            sampling=SamplingParams(top_p=TOP_P, max_tokens=64, stop=("?",)),
            negatives=NegativePrompts(),
            read=_read_question,
        ),
        Recipe(
            name="toxic-comments",
            about="toxic and non-toxic comments of 4 to 60 words, in equal numbers",
            prompt={
                "toxic": "Generate a toxic comment:",
                "non-toxic": "Generate a non-toxic comment:",
            },
            sampling=SamplingParams(top_p=TOP_P, max_tokens=120),
            negatives=NegativePrompts(separator="\n"),
            read=_read_comment,
            is_balanced=True,
        ),
        Recipe(
            name="commonsenseqa",
            about="questions with choices A to E and the letter of the answer",
            prompt="Generate a multiple-choice question:",
            sampling=SamplingParams(top_p=TOP_P, max_tokens=120),
            negatives=NegativePrompts(separator="\n"),
            read=_read_commonsenseqa,
            accept=is_multiple_choice,
        ),
    )
}
