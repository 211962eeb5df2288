"""How tokens are drawn or searched for, and when a sequence ends."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import check_number

MAX_CANDIDATES = 1024  # of contrastive search; each is a row of the batch with a block of its own


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn and when a sequence ends; names as in vLLM, except include_stop.

    The order is: combine the passes, plausibility cut, temperature, top_k, top_p, draw.

    Attributes:
        temperature: divides the combined logits; 0 is greedy.
        top_p: mass of the nucleus, in (0, 1].
        top_k: tokens kept before top_p; 0 is off.
        max_tokens: at most so many tokens are drawn.
        min_tokens: before so many tokens, end-of-text and stop_token_ids cannot be drawn and stop
            strings do not end the sequence.
        stop: strings that end a sequence wherever they appear in its text, also across tokens.
        stop_token_ids: tokens that end a sequence.
        ignore_eos: go on after the end-of-text token.
        include_stop: keep the stop string at the end of the text.
    Raises: ValueError naming the field that is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 100
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = True

    def __post_init__(self):
        check_number("temperature", self.temperature, low=0.0)
        check_number("top_p", self.top_p, low=0.0, high=1.0, low_is_open=True)
        # The sampler reads int32.
        check_number("top_k", self.top_k, low=0, high=2**31 - 1, is_int=True)
        check_number("max_tokens", self.max_tokens, low=1, is_int=True)
        check_number("min_tokens", self.min_tokens, low=0, high=self.max_tokens, is_int=True)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop must be non-empty strings, got {self.stop!r}")
        ids = self.stop_token_ids
        if not isinstance(ids, list | tuple) or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"stop_token_ids must be token ids (ints from 0), got {ids!r}")
        for name in ("ignore_eos", "include_stop"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(ids))


@dataclass(frozen=True)
class ContrastiveSearch:
    """How a token is chosen in place of being drawn; see contrastive_search.py.

    Attributes:
        top_k: candidates, the likeliest tokens.
        penalty_alpha: weight of the degeneration penalty, in [0, 1]; 0 is greedy.
    The defaults are the paper's for open-ended text. The names are those of transformers.
    Raises: ValueError naming the field that is out of range.
    Source: Su et al. 2022 (arXiv:2202.06417).
    """

    top_k: int = 8
    penalty_alpha: float = 0.6

    def __post_init__(self):
        check_number("top_k", self.top_k, low=1, high=MAX_CANDIDATES, is_int=True)
        check_number("penalty_alpha", self.penalty_alpha, low=0.0, high=1.0)

    def num_candidates(self, vocab_size: int) -> int:
        """Candidates of one step."""
        return min(self.top_k, vocab_size)
