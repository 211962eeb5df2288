"""The negative pool: which examples stand in the prompt of a sequence's negative pass.

Example i draws from all real examples and the synthetic ones with index < first - lag, where first
is the first index of its group of `share` examples. The draw is keyed by seed and first, so it
depends on nothing else.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

from .errors import check_number
from .kernels.reference.philox import STREAM_NEGATIVES, random_bits
from .tokenizer import Tokenizer

AS_MANY_AS_FIT = "max"


@dataclass(frozen=True)
class NegativePrompts:
    """How the prompt of the negative pass is made.

    Attributes:
        num_examples: how many examples; 0: none, so the negative pass sees the prompt alone; "max":
            as many as fit.
        template: layout, with {examples} and {prompt}; {prompt} may be left out, as in the authors'
            released code (template="{examples}").
        separator: stands between examples.
        lag: a synthetic example becomes a negative for those more than lag after it; 0 is the
            strictly sequential algorithm; None: max_num_seqs.
        share: so many consecutive examples get the same negatives, whose prefix is then computed
            once.
        max_tokens: longest negative prompt; None: what the context leaves beside the completion.
    Raises: ValueError naming the field that is out of range.
    """

    num_examples: int | str = 5
    template: str = "{examples}\n{prompt}"
    separator: str = " "
    lag: int | None = None
    share: int = 1
    max_tokens: int | None = None

    def __post_init__(self):
        if self.num_examples != AS_MANY_AS_FIT:
            try:
                check_number("num_examples", self.num_examples, low=0, is_int=True)
            except ValueError as error:
                raise ValueError(f"negatives: {error} (or 'max')") from None
        if "{examples}" not in self.template:
            raise ValueError(f"negatives: template must hold {{examples}}, got {self.template!r}")
        if self.lag is not None:
            check_number("lag", self.lag, low=0, is_int=True)
        check_number("share", self.share, low=1, is_int=True)
        if self.max_tokens is not None:
            check_number("negatives' max_tokens", self.max_tokens, low=1, is_int=True)

    def resolve(self, max_num_seqs: int) -> NegativePrompts:
        """The same with lag=None replaced by max_num_seqs."""
        return replace(self, lag=max_num_seqs) if self.lag is None else self

    def group_start(self, index: int) -> int:
        """The first index of the group that shares negatives with this one."""
        return index - index % self.share

    def num_pool_indices(self, index: int) -> int:
        """Synthetic examples below this index are in the pool of example `index`."""
        return max(0, self.group_start(index) - self.lag)

    def render(self, examples: Sequence[str], prompt: str) -> str:
        """The text of the negative prompt; the prompt alone where there are no examples."""
        if not examples:
            return prompt
        # Not str.format, and the template is split first: what is put in may hold braces itself.
        parts = self.template.split("{prompt}")
        joined = self.separator.join(examples)
        return prompt.join(part.replace("{examples}", joined) for part in parts)


class NegativePrompt(NamedTuple):
    """A drawn negative prompt: its token ids, and where its examples come from.

    sources: "real/12" is the 13th real example, "synthetic/7" the example with index 7.
    """

    token_ids: list[int]
    sources: list[str]


class NegativePool:
    """Real examples, and the synthetic ones as they are accepted, in index order."""

    def __init__(
        self, settings: NegativePrompts, real: Sequence[str], tokenizer: Tokenizer, seed: int
    ):
        self.settings, self.tokenizer, self.seed = settings, tokenizer, seed
        self._real = [text.strip() for text in real]
        self._synthetic_indices: list[int] = []
        self._synthetic: list[str] = []

    def add(self, index: int, text: str) -> None:
        """Add an accepted example unless it is empty; indices come in ascending order."""
        if text.strip():
            self._synthetic_indices.append(index)
            self._synthetic.append(text.strip())

    def draw(self, index: int, prompt: str, max_tokens: int) -> NegativePrompt:
        """The negative prompt of example `index`, cut by whole examples to max_tokens.

        If not even the prompt alone fits, it is returned as it is; its length is checked where it
        is queued.
        """
        pool_size = self._pool_size(index)
        if self.settings.max_tokens is not None:
            max_tokens = min(max_tokens, self.settings.max_tokens)
        order = sample_without_replacement(pool_size, self.seed, self.settings.group_start(index))
        if self.settings.num_examples == AS_MANY_AS_FIT:
            kept = self._take_while_fitting(order, max_tokens)
        else:
            kept = list(islice(order, self.settings.num_examples))
        while True:
            text = self.settings.render([self._text(member) for member in kept], prompt)
            token_ids = self.tokenizer.encode(text)
            if len(token_ids) <= max_tokens or not kept:
                break
            kept.pop()
        return NegativePrompt(token_ids, [self._source(member) for member in kept])

    def num_wanted(self, index: int) -> int:
        """Negatives that example `index` was meant to have; 0 with "max", which takes what fits."""
        if self.settings.num_examples == AS_MANY_AS_FIT:
            return 0
        return min(self.settings.num_examples, self._pool_size(index))

    def _pool_size(self, index: int) -> int:
        below = self.settings.num_pool_indices(index)
        return len(self._real) + bisect_left(self._synthetic_indices, below)

    def _take_while_fitting(self, order: Iterator[int], max_tokens: int) -> list[int]:
        """Draw while the examples' own tokens fit; what the template adds is cut afterwards."""
        taken, num_tokens = [], 0
        for member in order:
            num_tokens += len(self.tokenizer.encode(self._text(member)))
            if num_tokens > max_tokens:
                break
            taken.append(member)
        return taken

    def _text(self, member: int) -> str:
        num_real = len(self._real)
        return self._real[member] if member < num_real else self._synthetic[member - num_real]

    def _source(self, member: int) -> str:
        num_real = len(self._real)
        if member < num_real:
            return f"real/{member}"
        return f"synthetic/{self._synthetic_indices[member - num_real]}"


def sample_without_replacement(size: int, seed: int, stream_id: int) -> Iterator[int]:
    """A random permutation of range(size), lazily: the first k values cost O(k), whatever the size.

    Fisher-Yates over a sparse array. The j-th value scales the 64 random bits of counter
    (j, stream_id) to the values that are left.
    """
    moved: dict[int, int] = {}
    for position in range(size):
        high, low = random_bits(seed, stream_id, position, STREAM_NEGATIVES)
        other = position + (((high << 32 | low) * (size - position)) >> 64)
        value = moved.get(other, other)
        moved[other] = moved.pop(position, position)
        yield value
