"""A sequence being decoded: its passes, what was drawn so far, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .guidance import Guidance, PassKind
from .kv_cache import Allocation, WeightSet
from .sampling import ContrastiveSearch, SamplingParams
from .tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    from .contrastive_search import SearchState

FINISH_STOP = "stop"
FINISH_EOS = "eos"
FINISH_LENGTH = "length"
FINISH_ERROR = "error"  # the sampler met NaN or infinite logits


@dataclass
class RunningPass:
    """One pass of one sequence: its prompt, and where its K and V lie while it runs."""

    kind: PassKind
    prompt_ids: list[int]
    allocation: Allocation | None = None

    @property
    def weight_set(self) -> WeightSet:
        return WeightSet.BASE if self.kind is PassKind.BASE else WeightSet.DOMAIN


@dataclass
class DecodingSequence:
    """A sequence being decoded.

    key: the caller's own name for it.
    stream_id: the sample's number, which with the seed fixes its random numbers.
    prompts: token ids for every pass that the guidance runs.
    eos_token_ids: tokens that end it with "eos".
    search: its tokens are chosen by contrastive search in place of being drawn; one pass only.
    """

    key: object
    stream_id: int
    prompts: dict[PassKind, list[int]]
    guidance: Guidance
    sampling: SamplingParams
    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    search: ContrastiveSearch | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    passes: list[RunningPass] = field(init=False)
    search_state: SearchState | None = field(default=None, init=False)

    def __post_init__(self):
        self.passes = [RunningPass(kind, self.prompts[kind]) for kind in self.guidance.passes]
        assert self.search is None or len(self.passes) == 1, "contrastive search runs one pass"
        self._stream = TextStream(self.tokenizer)

    @property
    def step(self) -> int:
        """Tokens drawn so far; the position of the next one."""
        return len(self.token_ids)

    def num_cached_tokens(self, running_pass: RunningPass) -> int:
        """Tokens of a pass whose K and V are written."""
        # The last drawn token is never fed back; a search runs every candidate for it.
        is_last_run = self.search is not None
        return len(running_pass.prompt_ids) - 1 + self.sampling.max_tokens + is_last_run

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        """Tokens that may not be drawn now, because they would end the text before min_tokens."""
        return self.banned_at(self.step)

    def banned_at(self, step: int) -> tuple[int, ...]:
        """Tokens that may not be drawn at a step."""
        if step >= self.sampling.min_tokens:
            return ()
        return self.eos_token_ids + self.sampling.stop_token_ids

    def append(self, token_id: int, logprob: float, status: int) -> None:
        """Take one drawn token and set finish_reason if it ends the sequence.

        A token with a status other than 0 is not kept: its distribution was not the one asked for.
        """
        if status:
            self.finish_reason = FINISH_ERROR
            return
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        sampling = self.sampling
        if token_id in self.eos_token_ids and not sampling.ignore_eos:
            self.finish_reason = FINISH_EOS
            return
        num_searched = len(self.text)
        self.text += self._stream.push(token_id)
        if token_id in sampling.stop_token_ids or self._cut_at_stop(num_searched):
            self.finish_reason = FINISH_STOP
        elif self.step >= sampling.max_tokens:
            self.finish_reason = FINISH_LENGTH

    def _cut_at_stop(self, num_searched: int) -> bool:
        """Cut the text at the stop string that ends first, if one ends behind num_searched."""
        if self.step < self.sampling.min_tokens:
            return False
        ends = []
        for stop in self.sampling.stop:
            # A stop string may have begun in earlier tokens.
            start = self.text.find(stop, max(0, num_searched - len(stop) + 1))
            if start >= 0:
                ends.append((start + len(stop), start))
        if not ends:
            return False
        end, start = min(ends)
        self.text = self.text[: end if self.sampling.include_stop else start]
        return True
