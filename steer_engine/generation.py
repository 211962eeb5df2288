"""One data set being written: which example comes next, what is kept, and when the run is over.

Examples start in index order, each as soon as the pool of its negatives is complete; they end in
any order and are written in index order. What is drawn for an example does not depend on when it
ran or beside which others, of its own data set or of another (dataset_batch.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .convergence import Convergence, ConvergenceTest
from .dataset import Example, SyntheticDataset, is_unicode, read_texts
from .errors import RunError, check_number
from .guidance import Guidance, PassKind
from .negatives import NegativePool, NegativePrompt, NegativePrompts
from .run_directory import RunDirectory
from .run_record import count_examples, describe_real, measure_speed
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


class ExampleKey(NamedTuple):
    """The key of a sequence: which data set's example it draws."""

    run: str
    index: int

    def __str__(self) -> str:
        return f"{self.index} of {self.run}" if self.run else str(self.index)


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
    """Makes the sequences of one request's examples and collects what they draw.

    Attributes:
        name: tells it from the other runs of its batch; "" where it is alone.
        output: run directory; None keeps the data set in memory only.
        next_index: the example that starts next.
        num_session_attempts, num_rejected: attempts that this call finished, and threw away.
        num_tokens: of the examples that this call wrote.
    """

    def __init__(
        self,
        engine: Engine,
        request: DatasetRequest,
        real: str | Path | Sequence[str] | None,
        *,
        name: str = "",
        output: Path | None = None,
    ):
        self.engine, self.request = engine, request
        self.name, self.output = name, output
        self.real = read_texts(real)
        self.pool = NegativePool(request.negatives, self.real, engine.tokenizer, request.seed)
        self.convergence = ConvergenceTest(request.until)
        self.labels = list(request.prompts)
        self.has_negatives = PassKind.NEGATIVE in request.guidance.passes
        self.has_converged = False
        self.next_index = self.num_resumed = 0
        self.num_session_attempts = self.num_rejected = self.num_errors = self.num_tokens = 0
        self._directory: RunDirectory | _MemoryRun = _MemoryRun()
        self._summary: dict = {}
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

    @contextmanager
    def open(self, environment: dict, *, resume: bool) -> Iterator[None]:
        """Hold the run directory, and count what an earlier call left in it as written.

        environment: from run_record.describe_environment, where there is an output.
        """
        if self.output is None:
            yield
            return
        settings = environment | {"real": describe_real(self.real)} | self.request.settings()
        with RunDirectory(self.output, settings, resume=resume) as self._directory:
            for example in self.examples:
                self._account(example)
            self.next_index = self.num_resumed = len(self.examples)
            self._summary = self._directory.read_summary() if self.is_done else {}
            yield

    @property
    def exists(self) -> bool:
        """Whether an earlier call has begun it."""
        return self.output is not None and (self.output / "run.json").exists()

    def describe(self) -> str:
        """One line for logs."""
        guidance = f"guidance: {self.request.guidance.describe()}"
        return f"{self.name}: {guidance}" if self.name else guidance

    @property
    def examples(self) -> list[Example]:
        """All that are written, by earlier calls and by this one."""
        return self._directory.examples

    @property
    def dataset(self) -> SyntheticDataset:
        return SyntheticDataset(self.examples, self._summary)

    @property
    def is_done(self) -> bool:
        return self.has_converged or len(self.examples) >= self.request.num_examples

    @property
    def can_start(self) -> bool:
        """Whether there is a next example and the pool of its negatives is complete."""
        num_needed = self.request.negatives.num_pool_indices(self.next_index)
        return self.next_index < self.request.num_examples and num_needed <= len(self.examples)

    def start(self) -> DecodingSequence:
        """The next example's sequence, to be queued; can_start must hold."""
        index = self.next_index
        label = self.labels[index % len(self.labels)]
        prompt_ids = self._prompt_ids[label]
        prompts = {PassKind.DOMAIN: prompt_ids, PassKind.BASE: prompt_ids}
        sources: list[str] = []
        if self.has_negatives:
            negative = self._negative_prompt(index, label)
            prompts[PassKind.NEGATIVE] = negative.token_ids
            sources = negative.sources
        self._started[index] = _Started(label, 1, prompts, sources)
        self.next_index += 1
        return self._sequence(index)

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
            ExampleKey(self.name, index),
            stream_id,
            started.prompts,
            request.guidance,
            request.sampling,
            request.search,
        )

    def take(self, sequence: DecodingSequence) -> DecodingSequence | None:
        """Keep a finished sequence, or return the example's next attempt, to be queued."""
        index, request = sequence.key.index, self.request
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
                return self._sequence(index)
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
        return None

    def _count_error(self) -> None:
        self.num_errors += 1
        if self.num_errors >= MIN_ERRORS and self.num_errors > MAX_ERROR_SHARE * max(
            self.num_session_attempts, self.request.num_examples
        ):
            where = f"{self.name}: " if self.name else ""
            raise RunError(
                f"{where}{self.num_errors} of {self.num_session_attempts} attempts met NaN or "
                "infinite logits; the weights or the guidance are unusable "
                "(try dtype=float32, or smaller weights)"
            )

    def write(self) -> None:
        """Append what is complete in index order, and sync once a second."""
        while len(self.examples) in self._finished and not self.is_done:
            example = self._finished.pop(len(self.examples))
            self._directory.append(example)
            self._account(example)
            self.num_tokens += len(example.token_ids)
        self._directory.sync_if_due()

    def _account(self, example: Example) -> None:
        """What follows from a written example alone, so that a resumed run sees the same."""
        if not example.is_failed:
            self.pool.add(example.index, example.text)
        self.has_converged = self.convergence.is_met_after(example)

    def finish(self, elapsed_s: float) -> None:
        """Write the summary of a run that is done, unless an earlier call did."""
        if self._summary:
            return
        self._summary = {
            **count_examples(self.examples, self.real),
            "num_negatives_dropped": sum(map(self._num_dropped, self.examples)),
            "has_converged": self.has_converged,
            "guidance": self.request.guidance.describe(),
            "num_resumed": self.num_resumed,
            **measure_speed(self.examples[self.num_resumed :], elapsed_s),
        }
        self._directory.write_summary(self._summary)

    def _num_dropped(self, example: Example) -> int:
        """Negatives that were drawn for an example and did not fit beside it."""
        if not self.has_negatives:
            return 0
        return self.pool.num_wanted(example.index) - len(example.negatives)
