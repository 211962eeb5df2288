"""The examples that a page carries: compact JSON that report.js lists, filters and sorts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from ..evaluate import NearestReal, SetEvaluation
from .runs import Source

# The page stays below 3 MB with its figures; what does not fit is left out evenly, and it says so.
MAX_BYTES = 1_500_000
MISSING = -1


class _Texts:
    """Every text once; examples refer to it by its number."""

    def __init__(self):
        self.texts: list[str] = []
        self.num_bytes = 0
        self._numbers: dict[str, int] = {}

    def add(self, text: str | None) -> int:
        if text is None:
            return MISSING
        if text not in self._numbers:
            self._numbers[text] = len(self.texts)
            self.texts.append(text)
            self.num_bytes += _num_bytes(text)
        return self._numbers[text]


def example_payload(sources: Sequence[Source], reals: Sequence[Sequence[str]]) -> dict:
    """What report.js reads.

    Args:
        reals: candidates for the real examples that runs drew their negatives from.
    Returns: texts: [num_texts]; sets: names; examples: objects with the keys set, index, label,
        finish, attempts, text (a number in texts), negatives ([["real/3", number], ...]; number -1:
        the text is not at hand), nearest ([number, similarity], or null); num_left_out.
    """
    texts = _Texts()
    # The training texts come last, so the numbers of the others stay.
    sources = [source for source in sources if source.is_synthetic]
    lists = [list(_examples(source, number, reals)) for number, source in enumerate(sources)]
    # Turn by turn, so that a cut meets all sets alike; then set by set, as a reader expects.
    in_turn = [e for group in zip_longest(*lists) for e in group if e is not None]
    kept, num_bytes = [], 0
    for example in in_turn:
        if num_bytes + texts.num_bytes >= MAX_BYTES:
            break
        kept.append(_interned(example, texts))
        num_bytes += _num_bytes(kept[-1])
    kept.sort(key=lambda example: (example["set"], example["index"]))
    return {
        "texts": texts.texts,
        "sets": [source.name for source in sources],
        "examples": kept,
        "num_left_out": len(in_turn) - len(kept),
    }


def _examples(source: Source, number: int, reals: Sequence[Sequence[str]]) -> Iterator[dict]:
    run, evaluated = source.run, source.evaluated
    nearest = _nearest(evaluated)
    plain = {"set": number, "label": "", "finish": "", "attempts": 1, "negatives": []}
    if run is None:
        for index, text in zip(evaluated.indices, evaluated.texts, strict=True):
            yield plain | {"index": index, "text": text, "nearest": nearest.get(index)}
        return
    by_name = {f"synthetic/{example.index}": example.text for example in run.examples}
    by_name |= {f"real/{n}": text for n, text in enumerate(run.find_real(reals) or ())}
    for example in run.examples:
        yield plain | {
            "index": example.index,
            "label": example.label,
            "finish": example.finish_reason,
            "attempts": example.attempts,
            "text": example.text,
            "negatives": [(name, by_name.get(name)) for name in example.negatives],
            "nearest": nearest.get(example.index),
        }


def _nearest(evaluated: SetEvaluation | None) -> dict[int, NearestReal]:
    """{example index: its nearest real text}; {} where none were sought."""
    if evaluated is None or not evaluated.nearest_real:
        return {}
    return dict(zip(evaluated.indices, evaluated.nearest_real, strict=True))


def _num_bytes(value: object) -> int:
    """How much of the page it takes, but for a few bytes of separators."""
    return len(json.dumps(value, ensure_ascii=False).encode())


def _interned(example: dict, texts: _Texts) -> dict:
    nearest: NearestReal | None = example["nearest"]
    return example | {
        "text": texts.add(example["text"]),
        "negatives": [[name, texts.add(text)] for name, text in example["negatives"]],
        "nearest": nearest and [texts.add(nearest.text), round(nearest.similarity, 4)],
    }
