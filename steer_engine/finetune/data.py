"""Training examples: read, split into training and hold-out, turned into padded batches.

An example is laid out as prompt, space, text, end-of-text, which is what the engine continues when
it is given the prompt. Only text and end-of-text are learnt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..dataset import is_unicode, read_records, text_of
from ..errors import DataError
from ..tokenizer import Tokenizer

IGNORED_LABEL = -100
# Batches are cut from this many batches' worth of shuffled examples, sorted by length: little is
# spent on padding, and the order stays random.
BATCHES_PER_POOL = 16


class TrainingExample(NamedTuple):
    """A real text, the prompt that it answers, and its label if it has one."""

    text: str
    prompt: str
    label: str | None = None

    def to_json(self) -> str:
        """One line of a .jsonl file, without the line end."""
        fields = {k: v for k, v in self._asdict().items() if v is not None}
        return json.dumps(fields, ensure_ascii=False)


class Split(NamedTuple):
    """Examples to learn from and examples held out, each in the order of the file."""

    train: list[TrainingExample]
    held_out: list[TrainingExample]


class Tokens(NamedTuple):
    """One example as token ids [len]; the first prompt_len of them are not learnt."""

    ids: list[int]
    prompt_len: int


def read_examples(path: str | Path, prompt: str | None = None) -> list[TrainingExample]:
    """Read a file of real examples as dataset.read_texts does, with their prompts and labels.

    The fields "prompt" and "label" may be left out; a record's own prompt comes before the
    argument.
    Raises: DataError naming file and line.
    """
    examples = []
    for where, record in read_records(Path(path)):
        text = text_of(record, where).strip()
        if not text:
            continue
        own_prompt = text_of(record, where, "prompt") if record.get("prompt") else prompt
        if not own_prompt:
            raise DataError(f'{where}: has no "prompt" of its own; give one for all with --prompt')
        label = record.get("label")
        example = TrainingExample(text, own_prompt, None if label in (None, "") else str(label))
        if not is_unicode(example.to_json()):
            raise DataError(f"{where}: holds a lone surrogate, which no UTF-8 text can")
        examples.append(example)
    if not examples:
        raise DataError(f"{path}: holds no text")
    return examples


def split_examples(examples: Sequence[TrainingExample], share: float, seed: int) -> Split:
    """Hold out a share of the distinct texts, drawn at random, at least one.

    Texts that differ in case and white space alone count as one, so that no copy of a held-out text
    is trained on.
    Raises: DataError if there are no two distinct texts.
    """
    keys = [" ".join(example.text.split()).casefold() for example in examples]
    distinct = list(dict.fromkeys(keys))
    if len(distinct) < 2:
        raise DataError("the training file holds one distinct text; to hold one out takes two")
    num_held_out = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    order = np.random.default_rng(seed).permutation(len(distinct))
    held_out = {distinct[i] for i in order[:num_held_out]}
    return Split(
        [e for e, key in zip(examples, keys, strict=True) if key not in held_out],
        [e for e, key in zip(examples, keys, strict=True) if key in held_out],
    )


def encode_example(
    example: TrainingExample, tokenizer: Tokenizer, end_of_text_id: int, max_len: int
) -> Tokens:
    """Token ids of an example, at most max_len.

    The end of a longer one is cut off together with its end-of-text token: where it was cut is not
    where such texts end.
    Raises: DataError if the prompt leaves no room for a text.
    """
    prompt_ids = tokenizer.encode(example.prompt)
    if len(prompt_ids) >= max_len:
        raise DataError(
            f"prompt {example.prompt[:40]!r} takes {len(prompt_ids)} tokens and leaves no room for "
            f"a text within {max_len}; shorten it"
        )
    ids = [*prompt_ids, *tokenizer.encode(" " + example.text), end_of_text_id]
    return Tokens(ids[:max_len], len(prompt_ids))


def shuffled_batches(
    lengths: Sequence[int], batch_size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Every index once, in batches of examples of similar length, in random order."""
    order = rng.permutation(len(lengths))
    pool_size = BATCHES_PER_POOL * batch_size
    batches = []
    for start in range(0, len(order), pool_size):
        pool = sorted(order[start : start + pool_size], key=lambda i: lengths[i])
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [np.array(batches[i]) for i in rng.permutation(len(batches))]


def collate(rows: Sequence[Tokens], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad to the longest, at the right.

    Returns: input_ids and labels, both [len(rows), longest] int64; labels of prompts and padding
        are IGNORED_LABEL.
    """
    longest = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), IGNORED_LABEL)
    for index, (ids, prompt_len) in enumerate(rows):
        input_ids[index, : len(ids)] = torch.tensor(ids)
        labels[index, prompt_len : len(ids)] = torch.tensor(ids[prompt_len:])
    return input_ids, labels
