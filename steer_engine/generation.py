"""One run of generate_dataset: which example starts when, what is kept, and when the run is over.

Examples start in index order, each as soon as the pool of its negatives is complete; they end in
any order and are written in index order. What is drawn for an example does not depend on when it
ran or beside which others.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import ops
from .dataset import Example, SyntheticDataset, is_unicode, read_texts
from .errors import RunError, check_number
from .guidance import Guidance, PassKind
from .negatives import NegativePool, NegativePrompt, NegativePrompts
from .progress import ProgressBar
from .run_directory import RunDirectory
from .sampling import ContrastiveSearch, SamplingParams
from .sequence import FINISH_ERROR, DecodingSequence

if TYPE_CHECKING:
    from .engine import Engine

FINISH_REJECTED = "rejected"
# A stream id holds the attempt above the example's index.
INDEX_BITS = 40
MAX_ATTEMPTS = 1 << 22
# One bad row is an accident; so many bad attempts mean broken weights.
MAX_ERROR_SHARE, MIN_ERRORS = 0.01, 3
MAX_CACHED_NEGATIVES = 256
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Convergence:
    """When to stop early (Algorithm 1's "while the data set has not converged").

    The run ends after a window of examples whose share of new 3-grams of tokens falls below the
    tolerance. Windows are counted from index 0; num_examples stays the upper bound.
    Source: O'Neill et al. 2023, Algorithm 1; the measure is ours, the paper names none.
    """

    tolerance: float
    window: int = 100

    def __post_init__(self):
        check_number("until's tolerance", self.tolerance, low=0.0, high=1.0)
        check_number("until's window", self.window, low=1, is_int=True)


@dataclass(frozen=True)
class DatasetRequest:
    """What generate_dataset was asked for, checked; fields as in Engine.generate_dataset."""

    prompts: dict[str, str]
    num_examples: int
    guidance: Guidance
    negatives: NegativePrompts
    sampling: SamplingParams
    accept: Callable[[str], bool] | None
    max_attempts: int
    until: Convergence | None
    seed: int
    search: ContrastiveSearch | None = None

    def __post_init__(self):
        check_number("num_examples", self.num_examples, low=1, high=1 << INDEX_BITS, is_int=True)
        check_number("max_attempts", self.max_attempts, low=1, high=MAX_ATTEMPTS, is_int=True)
        is_text = all(isinstance(t, str) for pair in self.prompts.items() for t in pair)
        if not self.prompts or not is_text:
            raise ValueError("prompt must be a str, or a non-empty {label: prompt} of strings")
        for label in self.prompts:
            if not is_unicode(label):
                raise ValueError(f"label {label!r} holds a lone surrogate, which no UTF-8 text can")

    def settings(self) -> dict:
        """The request as JSON values, for run.json."""
        accept = self.accept and getattr(self.accept, "__qualname__", type(self.accept).__name__)
        return {
            "prompts": self.prompts,
            "num_examples": self.num_examples,
            "guidance": asdict(self.guidance)
            | {"implicit_temperature": self.guidance.implicit_temperature},
            "negatives": asdict(self.negatives),
            "sampling": asdict(self.sampling),
            "accept": accept,
            "max_attempts": self.max_attempts,
            "until": self.until and asdict(self.until),
            "seed": self.seed,
            # Not there otherwise, so that runs written before it was known can be resumed.
            **({"search": asdict(self.search)} if self.search else {}),
        }


class ConvergenceTest:
    """Counts 3-grams of token ids in index order."""

    def __init__(self, settings: Convergence | None):
        self.settings = settings
        self._seen: set[tuple[int, ...]] = set()
        self._num_new = self._num_total = 0

    def is_met_after(self, example: Example) -> bool:
        """Take the next example; True if it closes a window with too few new 3-grams."""
        if self.settings is None:
            return False
        ids = () if example.is_failed else example.token_ids
        for trigram in zip(ids, ids[1:], ids[2:], strict=False):
            self._num_total += 1
            self._num_new += trigram not in self._seen
            self._seen.add(trigram)
        if (example.index + 1) % self.settings.window:
            return False
        share = self._num_new / self._num_total if self._num_total else 0.0
        self._num_new = self._num_total = 0
        return share < self.settings.tolerance


class _Started(NamedTuple):
    """An example that has been queued and is not finished."""

    label: str
    attempt: int
    prompts: dict[PassKind, list[int]]
    negatives: list[str]


class _MemoryRun:
    """Stands in for a RunDirectory where nothing is written."""

    def __init__(self):
        self.examples: list[Example] = []

    def append(self, example: Example) -> None:
        self.examples.append(example)

    def sync_if_due(self) -> None:
        pass

    def read_summary(self) -> dict:
        return {}

    def write_summary(self, summary: dict) -> None:
        pass


class DatasetRun:
    """Feeds an engine with the examples of one request and collects them."""

    def __init__(self, engine: Engine, request: DatasetRequest, real: str | Path | Sequence[str]):
        self.engine, self.request = engine, request
        self.real = read_texts(real)
        self.pool = NegativePool(request.negatives, self.real, engine.tokenizer, request.seed)
        self.convergence = ConvergenceTest(request.until)
        self.labels = list(request.prompts)
        self.has_negatives = PassKind.NEGATIVE in request.guidance.passes
        self.has_converged = False
        self.num_session_attempts = self.num_rejected = self.num_errors = self.num_tokens = 0
        self._started: dict[int, _Started] = {}
        self._finished: dict[int, Example] = {}
        self._negatives: OrderedDict[tuple[int, str], NegativePrompt] = OrderedDict()
        self._prompt_ids = {
            label: engine.encode_prompt(text, f"prompt {label}".strip())
            for label, text in request.prompts.items()
        }
        for label, token_ids in self._prompt_ids.items():
            # What can never run is refused before anything is written. Negative prompts are cut to
            # fit, down to the prompt alone.
            prompts = dict.fromkeys(PassKind, token_ids)
            engine.make_sequence(
                label, 0, prompts, request.guidance, request.sampling, request.search
            )

    def execute(
        self, output: str | Path | None, *, resume: bool, progress: bool
    ) -> SyntheticDataset:
        """Run to the end and return the data set; see Engine.generate_dataset."""
        started_at = time.monotonic()
        with self._open(output, resume) as run:
            num_resumed = len(run.examples)
            for example in run.examples:
                self._account(example)
            if self._is_done(run.examples) and (summary := run.read_summary()):
                return SyntheticDataset(run.examples, summary)
            next_index = num_resumed
            engine, request = self.engine, self.request
            logger.info("guidance: %s", request.guidance.describe())
            with ProgressBar(request.num_examples, num_resumed, enabled=progress) as bar:
                while not self._is_done(run.examples):
                    next_index = self._queue(next_index, len(run.examples))
                    for sequence in engine.step(request.seed):
                        self._take(sequence)
                    self._write(run)
                    run.sync_if_due()
                    bar.update(len(run.examples), self.num_tokens, self.acceptance_rate)
            summary = self._summary(run.examples, num_resumed, time.monotonic() - started_at)
            run.write_summary(summary)
            return SyntheticDataset(run.examples, summary)

    @property
    def acceptance_rate(self) -> float:
        """Share of this call's attempts that were kept."""
        if not self.num_session_attempts:
            return 1.0
        return 1.0 - self.num_rejected / self.num_session_attempts

    def _open(self, output: str | Path | None, resume: bool):
        if output is None:
            return nullcontext(_MemoryRun())
        return RunDirectory(output, self._run_settings(), resume=resume)

    def _run_settings(self) -> dict:
        packages = ("steer-engine", "torch", "tokenizers", "numpy")
        versions = {name: version(name) for name in packages}
        versions |= {"python": platform.python_version(), "machine": platform.machine()}
        if self.engine.config.backend == "cpu":
            versions["cpu_isa"] = ops.cpu_isa()
        return {
            "versions": versions,
            "engine": self.engine.describe(),
            "checkpoints": self.engine.sha256(),
            "real": {"num_examples": len(self.real), "sha256": sha256_of_texts(self.real)},
            **self.request.settings(),
        }

    def _is_done(self, examples: Sequence[Example]) -> bool:
        return self.has_converged or len(examples) >= self.request.num_examples

    def _queue(self, next_index: int, num_written: int) -> int:
        """Queue examples while places are free and pools complete; returns the next index."""
        scheduler, request = self.engine.scheduler, self.request
        places = scheduler.max_num_seqs - scheduler.num_queued
        while (
            places > 0
            and next_index < request.num_examples
            and request.negatives.num_pool_indices(next_index) <= num_written
        ):
            self._start(next_index)
            next_index += 1
            places -= 1
        return next_index

    def _start(self, index: int) -> None:
        label = self.labels[index % len(self.labels)]
        prompt_ids = self._prompt_ids[label]
        prompts = {PassKind.DOMAIN: prompt_ids, PassKind.BASE: prompt_ids}
        sources: list[str] = []
        if self.has_negatives:
            negative = self._negative_prompt(index, label)
            prompts[PassKind.NEGATIVE] = negative.token_ids
            sources = negative.sources
        self._started[index] = _Started(label, 1, prompts, sources)
        self.engine.scheduler.waiting.append(self._sequence(index))

    def _negative_prompt(self, index: int, label: str) -> NegativePrompt:
        """The negative prompt of an example; examples of one group and label share it."""
        key = (self.request.negatives.group_start(index), label)
        if key not in self._negatives:
            longest = self.engine.config.max_model_len - self.request.sampling.max_tokens
            drawn = self.pool.draw(index, self.request.prompts[label], longest)
            if not drawn.token_ids:
                drawn = drawn._replace(token_ids=self._prompt_ids[label])
            self._negatives[key] = drawn
            if len(self._negatives) > MAX_CACHED_NEGATIVES:
                self._negatives.popitem(last=False)
        return self._negatives[key]

    def _sequence(self, index: int) -> DecodingSequence:
        started, request = self._started[index], self.request
        stream_id = (started.attempt - 1) << INDEX_BITS | index
        return self.engine.make_sequence(
            index, stream_id, started.prompts, request.guidance, request.sampling, request.search
        )

    def _take(self, sequence: DecodingSequence) -> None:
        """Keep a finished sequence, or queue the example's next attempt."""
        index, request = sequence.key, self.request
        started = self._started[index]
        self.num_session_attempts += 1
        text = sequence.text.strip()
        reason = sequence.finish_reason
        if reason == FINISH_ERROR:
            self._count_error()
        elif request.accept is not None and not request.accept(text):
            reason = FINISH_REJECTED
        if reason in (FINISH_ERROR, FINISH_REJECTED):
            self.num_rejected += 1
            if started.attempt < request.max_attempts:
                self._started[index] = started._replace(attempt=started.attempt + 1)
                self.engine.scheduler.waiting.appendleft(self._sequence(index))
                return
        del self._started[index]
        self._finished[index] = Example(
            index=index,
            label=started.label,
            prompt=request.prompts[started.label],
            text=text,
            token_ids=sequence.token_ids,
            finish_reason=reason,
            negatives=started.negatives,
            attempts=started.attempt,
        )

    def _count_error(self) -> None:
        self.num_errors += 1
        if self.num_errors >= MIN_ERRORS and self.num_errors > MAX_ERROR_SHARE * max(
            self.num_session_attempts, self.request.num_examples
        ):
            raise RunError(
                f"{self.num_errors} of {self.num_session_attempts} attempts met NaN or infinite "
                "logits; the weights or the guidance are unusable "
                "(try dtype=float32, or smaller weights)"
            )

    def _write(self, run: RunDirectory | _MemoryRun) -> None:
        """Append what is complete in index order."""
        while len(run.examples) in self._finished and not self._is_done(run.examples):
            example = self._finished.pop(len(run.examples))
            run.append(example)
            self._account(example)
            self.num_tokens += len(example.token_ids)

    def _account(self, example: Example) -> None:
        """What follows from a written example alone, so that a resumed run sees the same."""
        if not example.is_failed:
            self.pool.add(example.index, example.text)
        self.has_converged = self.convergence.is_met_after(example)

    def _summary(self, examples: Sequence[Example], num_resumed: int, elapsed_s: float) -> dict:
        kept = [e for e in examples if not e.is_failed]
        texts = [" ".join(e.text.split()) for e in kept]
        real = {" ".join(text.split()) for text in self.real}
        num_drawn = len(examples) - num_resumed
        num_drawn_tokens = sum(len(e.token_ids) for e in examples[num_resumed:] if not e.is_failed)
        return {
            "num_examples": len(kept),
            "num_failed": len(examples) - len(kept),
            "num_tokens": sum(len(e.token_ids) for e in kept),
            "finish_reasons": dict(Counter(e.finish_reason for e in examples)),
            "num_rejected_attempts": sum(e.attempts - (not e.is_failed) for e in examples),
            "num_duplicates": len(texts) - len(set(texts)),
            "num_copies_of_real": sum(text in real for text in texts),
            "num_negatives_dropped": sum(self._num_dropped(e) for e in examples),
            "has_converged": self.has_converged,
            "guidance": self.request.guidance.describe(),
            "num_resumed": num_resumed,
            "elapsed_s": round(elapsed_s, 3),
            "examples_per_s": round(num_drawn / elapsed_s, 3),
            "tokens_per_s": round(num_drawn_tokens / elapsed_s, 2),
        }

    def _num_dropped(self, example: Example) -> int:
        """Negatives that were drawn for an example and did not fit beside it."""
        if not self.has_negatives:
            return 0
        return self.pool.num_wanted(example.index) - len(example.negatives)


def sha256_of_texts(texts: Sequence[str]) -> str:
    """A digest of the texts and their order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
