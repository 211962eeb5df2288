"""The engine: loads the models, runs steps, and offers generation to users.

One step: the scheduler admits sequences, the model prefills their prompts, then every running
sequence's passes are stacked into one batch, run through the model, and one token per sequence is
drawn from the combined logits. Sequences of contrastive search step beside them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import ops, sampler
from .batch import DecodeRows
from .contrastive_search import ContrastiveSearcher
from .convergence import Convergence
from .dataset import SyntheticDataset, is_unicode
from .dataset_batch import complete_arguments, write_together
from .decode_graphs import DecodeGraphs
from .errors import CapacityError, SteerError
from .files import check_file_name
from .generation import DatasetRequest, DatasetRun
from .guidance import Guidance, PassKind
from .head import HeadRows
from .kernels.reference import Sampled
from .kv_cache import KVCache
from .loader import ModelLoader
from .machine import (
    BLOCK_SIZE,
    DTYPES,
    INT8,
    EngineConfig,
    MemoryPlan,
    blocks_wanted,
    naming_settings,
    num_cache_blocks,
)
from .methods import Method, resolve
from .negatives import NegativePrompts
from .pair import ModelPair
from .sampling import ContrastiveSearch, SamplingParams
from .scheduler import Scheduler
from .sequence import FINISH_LENGTH, DecodingSequence

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Completion:
    """One generated text.

    finish_reason: "stop", "eos", "length", or "error" where a NaN or infinite logit ended it.
    logprobs: of the drawn tokens, under the distribution they were drawn from (after guidance,
        temperature, top-k and top-p); with contrastive search, under the model's.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float]


class Engine:
    """A loaded base model, an optional domain model, and a KV cache.

    Create it with `Engine.from_pretrained`. Not thread-safe: one call at a time.

    Attributes:
        config: EngineConfig, resolved.
        model_config: FalconConfig of the base.
        tokenizer: shared by both models.
        has_domain: whether a domain model is loaded.
    """

    def __init__(self, pair: ModelPair, config: EngineConfig):
        self.config = config.resolve(pair.base.config)
        self.model_config = pair.base.config
        self.tokenizer = pair.tokenizer
        self.eos_token_ids = pair.eos_token_ids
        self.has_domain = pair.domain is not None
        self._pair = pair
        device, dtype = torch.device(self.config.device), DTYPES[self.config.dtype]
        loader = ModelLoader(
            pair.base,
            pair.domain,
            self.config.backend,
            dtype,
            device,
            is_int8=self.config.weight_dtype == INT8,
        )
        with naming_settings(
            f"loading on {device}",
            "set a smaller dtype, weight_dtype, kv_cache_gib or max_num_seqs, or pass a LoRA "
            "adapter instead of a full fine-tune",
        ):
            self.model = loader.load(self.config.max_model_len)
            num_blocks = num_cache_blocks(self.config, self.model_config)
            self.kv_cache = KVCache(self.model_config, num_blocks, BLOCK_SIZE, dtype, device)
        self.scheduler = Scheduler(self.kv_cache, self.config.max_num_seqs)
        self._searcher = ContrastiveSearcher(self.model, self.kv_cache)
        self._sampler = sampler.Sampler(
            self.config.backend, folds_head=self.config.fold_head, model=self.model
        )
        self._graphs: DecodeGraphs | None = None
        if self.config.cuda_graphs:
            draw_op = ops.implementation(self.config.backend).draw
            self._graphs = DecodeGraphs(
                self.model, self.kv_cache, draw_op, self.config.max_model_len
            )

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        domain: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        weight_dtype: str = "auto",
        backend: str = "auto",
        max_num_seqs: int = 64,
        max_model_len: int | None = None,
        kv_cache_gib: float | None = None,
        fold_head: bool = True,
        steps_per_poll: int | None = None,
        cuda_graphs: bool | None = None,
    ) -> Engine:
        """Load Hugging Face checkpoint directories.

        Args:
            base: directory of the model before fine-tuning.
            domain: directory of a full fine-tune or of a PEFT LoRA adapter for base; None: plain
                decoding of base.
            device, dtype, weight_dtype, backend, max_num_seqs, max_model_len, kv_cache_gib,
                fold_head, steps_per_poll, cuda_graphs: see EngineConfig.
        Raises:
            CheckpointError: something does not fit; found from headers, before weights are read.
            CapacityError: memory does not suffice.
            ValueError: an argument is out of range.
        """
        config = EngineConfig(
            device=device,
            dtype=dtype,
            weight_dtype=weight_dtype,
            backend=backend,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            kv_cache_gib=kv_cache_gib,
            fold_head=fold_head,
            steps_per_poll=steps_per_poll,
            cuda_graphs=cuda_graphs,
        )
        return cls(ModelPair.open(base, domain), config)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        negative_prompts: Sequence[Prompt] | None = None,
        guidance: Guidance | None = None,
        sampling: SamplingParams | None = None,
        method: str | Method | None = None,
        seed: int = 0,
    ) -> list[Completion]:
        """Continue each prompt.

        Args:
            prompts: strings or lists of token ids.
            negative_prompts: per prompt, the whole text that the sequence continues in the negative
                pass.
            guidance: None: Guidance.recommended() if there is a domain model and negative_prompts
                are given, else Guidance.none().
            sampling: None: SamplingParams().
            method: how to decode, a name or Method.of(name, ...), in place of guidance. It also
                decides temperature, top_p and top_k, see methods.resolve.
            seed: int in [0, 2**64).
        Returns: completions in the order of the prompts; prompt i draws from stream i of the seed.
        Raises:
            ValueError: arguments do not fit each other or the model.
            CapacityError: a prompt can never fit the cache.
        """
        if method is not None:
            method, sampling = resolve(method, guidance, sampling)
            method.check_passes(has_negative_prompts=negative_prompts is not None)
            guidance = method.guidance
        sequences = self._sequences(
            prompts, negative_prompts, guidance, sampling, seed, method and method.search
        )
        finished: dict[int, DecodingSequence] = {}
        for done in self._decode(sequences, seed):
            finished[done.key] = done
        return [
            Completion(s.text, s.token_ids, s.finish_reason, s.logprobs)
            for s in (finished[i] for i in range(len(prompts)))
        ]

    def next_token_probs(
        self,
        prompts: Sequence[Prompt],
        *,
        negative_prompts: Sequence[Prompt] | None = None,
        guidance: Guidance | None = None,
        sampling: SamplingParams | None = None,
    ) -> torch.Tensor:
        """Each prompt's next-token distribution: float32 [num_prompts, vocab_size] on the CPU.

        Arguments and errors as in `generate`.
        """
        sampling = sampling or SamplingParams()
        # One token is looked at, so a prompt may fill the context but for that token.
        first = replace(sampling, max_tokens=1, min_tokens=min(1, sampling.min_tokens))
        sequences = self._sequences(prompts, negative_prompts, guidance, first, seed=0)
        return self._joined(
            sampler.next_token_probs(logits, self.scheduler.running, rows.passes).cpu()
            for logits, rows in self._first_logits(sequences)
        )

    def logits(self, prompts: Sequence[Prompt], which: str = "domain") -> torch.Tensor:
        """One model's raw logits behind each prompt: float32 [num_prompts, vocab_size] on the CPU.

        which: "domain" or "base"; without a domain model both name the only one there is.
        Raises: ValueError for another name, and as in `generate`.
        """
        if which not in ("domain", "base"):
            raise ValueError(f"which must be 'domain' or 'base', got {which!r}")
        kind = PassKind.BASE if which == "base" and self.has_domain else PassKind.DOMAIN
        only = [float(kind is k) for k in PassKind]
        first = SamplingParams(max_tokens=1)
        sequences = self._sequences(prompts, None, Guidance(*only), first, seed=0)
        return self._joined(
            logits[-1].to("cpu", copy=True) for logits, _ in self._first_logits(sequences)
        )

    def generate_dataset(
        self,
        prompt: str | dict[str, str],
        num_examples: int,
        real: str | Path | Sequence[str] | None = None,
        *,
        guidance: Guidance | None = None,
        negatives: NegativePrompts | None = None,
        sampling: SamplingParams | None = None,
        method: str | Method | None = None,
        accept: Callable[[str], bool] | None = None,
        max_attempts: int = 10,
        until: Convergence | None = None,
        seed: int = 0,
        output: str | Path | None = None,
        resume: bool = True,
        progress: bool = False,
    ) -> SyntheticDataset:
        """Write a synthetic data set with steered decoding.

        Args:
            prompt: the instruction, or {label: instruction}; labels take turns, so their numbers
                are equal.
            num_examples: size of the data set (an upper bound with `until`).
            real: real examples for the negative prompts: list of str, or a .jsonl, .csv, .parquet
                or .txt file.
            guidance: None: Guidance.recommended(), or Guidance.none() without a domain model.
            negatives: None: NegativePrompts().
            sampling: None: SamplingParams(top_p=0.9).
            method: as in `generate`. Where it draws nothing at random (greedy, contrastive_search),
                the data set may not be larger than the number of prompts, unless every example has
                real ones in front of its prompt: Method.of("greedy", in_context=True).
            accept: called with each text; False draws the example again.
            max_attempts: draws per example in all, after rejections and failed draws.
            until: stop early once the data set has converged.
            seed: int in [0, 2**64).
            output: run directory; None keeps the data set in memory only.
            resume: go on with a run that is there.
            progress: show a progress bar on standard error.
        Returns: SyntheticDataset. With the same engine settings and arguments its examples are the
            same after any number of interruptions.
        Raises:
            ValueError: arguments do not fit.
            DataError: real cannot be read.
            RunError: the directory is in use, damaged or holds a run with other settings, or too
                many draws met NaN or infinite logits.
            CapacityError: an example can never fit the cache.
        """
        run = self._dataset_run(
            "",
            output,
            seed,
            prompt=prompt,
            num_examples=num_examples,
            real=real,
            guidance=guidance,
            negatives=negatives,
            sampling=sampling,
            method=method,
            accept=accept,
            max_attempts=max_attempts,
            until=until,
        )
        self._write_together([run], seed, resume, progress)
        return run.dataset

    def generate_datasets(
        self,
        requests: Mapping[str, Mapping[str, Any]],
        *,
        seed: int = 0,
        output: str | Path | None = None,
        resume: bool = True,
        progress: bool = False,
    ) -> dict[str, SyntheticDataset]:
        """Write several data sets through one batch, such as a grid of settings.

        Each is the same as from generate_dataset alone, to the byte, and the whole is quicker than
        one after another: places that one leaves empty are filled by others.

        Args:
            requests: {name: {argument: value}}, the arguments of generate_dataset from prompt to
                until; what is left out takes generate_dataset's default.
            seed: of all of them, so that example i draws with the same random numbers in each and
                differences between data sets are less noisy.
            output: parent of the run directories output/name; None keeps the data sets in memory.
            resume: go on with the runs that are there; names may be added.
            progress: show a progress bar on standard error.
        Returns: {name: SyntheticDataset}, in the order of the requests. A summary's elapsed_s
            counts from the start of the call; its speeds are of that data set's share of the batch.
        Raises: ValueError for a name that cannot be a directory's or an unknown argument; else as
            generate_dataset, naming the data set.
        """
        runs = []
        for name, arguments in requests.items():
            check_file_name(name, "the name of a data set")
            run_output = None if output is None else Path(output) / name
            try:
                request = complete_arguments(arguments, self.generate_dataset)
                runs.append(self._dataset_run(name, run_output, seed, **request))
            except (ValueError, SteerError) as error:
                kind = type(error) if isinstance(error, SteerError) else ValueError
                raise kind(f"{name}: {error}") from None
        self._write_together(runs, seed, resume, progress)
        return {run.name: run.dataset for run in runs}

    def _dataset_run(
        self,
        name: str,
        output: str | Path | None,
        seed: int,
        *,
        prompt: str | dict[str, str],
        real: str | Path | Sequence[str] | None,
        guidance: Guidance | None,
        negatives: NegativePrompts | None,
        sampling: SamplingParams | None,
        method: Method | str | None,
        max_attempts: int,
        **others,
    ) -> DatasetRun:
        """A data set's run from the arguments of generate_dataset, all of them."""
        if method is not None:
            method, sampling = resolve(method, guidance, sampling)
            guidance = method.guidance
            # Another attempt would end alike.
            max_attempts = 1 if method.is_deterministic else max_attempts
        if guidance is None:
            guidance = Guidance.recommended() if self.has_domain else Guidance.none()
        self._check_guidance(guidance)
        check_seed(seed)
        request = DatasetRequest(
            prompts=prompt if isinstance(prompt, dict) else {"": prompt},
            guidance=guidance,
            negatives=(negatives or NegativePrompts()).resolve(self.config.max_num_seqs),
            sampling=sampling or SamplingParams(top_p=0.9),
            seed=seed,
            max_attempts=max_attempts,
            search=method and method.search,
            **others,
        )
        if method is not None:
            method.check_data_set(request.num_examples, request.prompts, real, request.negatives)
        return DatasetRun(self, request, real, name=name, output=output and Path(output))

    def _write_together(
        self, runs: Sequence[DatasetRun], seed: int, resume: bool, progress: bool
    ) -> None:
        try:
            write_together(self, runs, seed=seed, resume=resume, progress=progress)
        finally:
            self.scheduler.reset()

    def sha256(self) -> dict[str, dict[str, str]]:
        """SHA-256 of every checkpoint file: {"base": {file name: digest}, "domain": ...}."""
        return self._pair.sha256()

    def describe(self) -> dict[str, object]:
        """Settings that the generated bytes depend on, for run.json."""
        settings = asdict(self.config)
        # These decide who waits, when the host looks and who launches, not what is drawn.
        for name in ("kv_cache_gib", "steps_per_poll", "cuda_graphs"):
            settings[name] = None
        return settings | {"num_layers": self.model_config.num_layers}

    def make_sequence(
        self,
        key: object,
        stream_id: int,
        prompts: dict[PassKind, list[int]],
        guidance: Guidance,
        sampling: SamplingParams,
        search: ContrastiveSearch | None = None,
    ) -> DecodingSequence:
        """A sequence ready to be queued. Raises ValueError or CapacityError if it can never run."""
        outside = [i for i in sampling.stop_token_ids if i >= self.model_config.vocab_size]
        if outside:
            raise ValueError(
                f"stop_token_ids must be in [0, {self.model_config.vocab_size}), got {outside[0]}"
            )
        sequence = DecodingSequence(
            key, stream_id, prompts, guidance, sampling, self.tokenizer, self.eos_token_ids, search
        )
        for running_pass in sequence.passes:
            length = len(running_pass.prompt_ids) + sampling.max_tokens
            if length > self.config.max_model_len:
                raise ValueError(
                    f"prompt {key} ({running_pass.kind.name.lower()} pass) has "
                    f"{len(running_pass.prompt_ids)} tokens; with max_tokens "
                    f"{sampling.max_tokens} it passes max_model_len {self.config.max_model_len}: "
                    "shorten the prompt or lower max_tokens"
                )
        needed, total = self.scheduler.blocks_needed(sequence), self.kv_cache.num_blocks
        if needed > total:
            raise CapacityError(
                f"prompt {key} needs {needed} KV-cache blocks of {BLOCK_SIZE} tokens, the cache "
                f"has {total}: raise kv_cache_gib, or lower max_tokens or the number of negatives"
            )
        return sequence

    def encode_prompt(self, prompt: Prompt, name: str = "prompt") -> list[int]:
        """Token ids of a prompt.

        An empty one becomes the beginning-of-text token, since a model needs one token.
        Raises: ValueError, calling the prompt by `name`.
        """
        if isinstance(prompt, str):
            if not is_unicode(prompt):
                raise ValueError(f"{name} holds a lone surrogate, which no UTF-8 text can")
            token_ids = self.tokenizer.encode(prompt)
        else:
            try:
                token_ids = [operator.index(i) for i in prompt]
            except TypeError:
                raise ValueError(f"{name} must be a str or a list of token ids") from None
            if (
                token_ids
                and not 0 <= min(token_ids) <= max(token_ids) < self.model_config.vocab_size
            ):
                raise ValueError(
                    f"{name} holds token ids outside [0, {self.model_config.vocab_size})"
                )
        if token_ids:
            return token_ids
        start = self.model_config.bos_token_id
        if start is None:
            raise ValueError(f"{name} is empty, and the model has no beginning-of-text token")
        return [start]

    @property
    def memory_plan(self) -> MemoryPlan:
        """What weights and cache take."""
        cache = self.kv_cache
        return MemoryPlan(
            weight_bytes=self.model.num_bytes,
            cache_bytes=cache.k.nbytes + cache.v.nbytes,
            num_blocks=cache.num_blocks,
            num_wanted=blocks_wanted(self.config),
        )

    def step(self, seed: int) -> list[DecodingSequence]:
        """Draw steps_per_poll tokens for every running sequence; returns those that ended.

        A sequence whose tokens are searched for gets one token in that time.
        """
        self.scheduler.admit()
        with naming_settings("running a prompt", "set a smaller kv_cache_gib or max_num_seqs"):
            self._prefill()
        self._draw(self.scheduler.drawing, seed)
        self._searcher.step(self.scheduler.searching)
        return self.scheduler.retire()

    def _draw(self, running: list[DecodingSequence], seed: int) -> None:
        """Draw steps_per_poll tokens for each of the drawing sequences.

        The host reads the tokens once, at the end. What a sequence draws behind its end is dropped.
        """
        if not running:
            return
        rows = self.scheduler.decode_rows()
        draw = self._sampler.prepare(rows, running)

        def draw_and_advance() -> Sampled:
            logits = self._logits(rows, draw.head)
            sampled = self._sampler.draw(logits, draw, running, seed=seed)
            rows.advance(sampled.token_ids)
            return sampled

        captured = self._graphs and self._graphs.step_for(draw, running, seed)
        draw_next = captured or draw_and_advance
        num_steps = min(self.config.steps_per_poll, self.scheduler.most_steps_left)
        steps = [draw_next() for _ in range(num_steps)]
        for drawn in read_steps(steps):
            for sequence, *token in zip(running, *drawn, strict=True):
                if sequence.finish_reason is None:
                    sequence.append(*token)
        draw.num_ahead = 0

    def _decode(
        self, sequences: Sequence[DecodingSequence], seed: int
    ) -> Iterator[DecodingSequence]:
        self.scheduler.waiting.extend(sequences)
        try:
            while self.scheduler.num_queued:
                yield from self.step(seed)
        finally:
            self.scheduler.reset()

    def _prefill(self) -> None:
        """Run the prompts of admitted sequences.

        Where others are decoding, one forward at a time, so that they wait for no more than that.
        """
        is_decoding = bool(self.scheduler.running)
        while prefill := self.scheduler.next_prefill(self.config.max_prefill_tokens):
            if prefill.batch is not None:
                self.model.forward(prefill.batch, self.kv_cache)
            searching = [s for s in prefill.complete if s.search is not None]
            self._searcher.prefill(searching, self.config.max_prefill_tokens)
            self.scheduler.start(prefill.complete)
            if is_decoding:
                break

    def _logits(self, rows: DecodeRows, head: HeadRows) -> torch.Tensor:
        residual = self.model.forward(rows.batch, self.kv_cache)
        return self.model.compute_logits(residual, rows.logit_rows, head)

    def _first_logits(
        self, sequences: list[DecodingSequence]
    ) -> Iterator[tuple[torch.Tensor, DecodeRows]]:
        """Each pass's logits behind the prompts, in order, as many sequences at a time as fit.

        While one item is handled, `scheduler.running` holds its sequences. The next item overwrites
        the logits.
        """
        self.scheduler.waiting.extend(sequences)
        try:
            while self.scheduler.waiting:
                self.scheduler.admit()
                self._prefill()
                rows = self.scheduler.decode_rows()
                guidances = [s.guidance for s in self.scheduler.running]
                head = self.model.head_rows(guidances, rows.passes, folds=False)
                yield self._logits(rows, head), rows
                for sequence in self.scheduler.running:
                    sequence.finish_reason = FINISH_LENGTH
                self.scheduler.retire()
        finally:
            self.scheduler.reset()

    def _sequences(
        self, prompts, negative_prompts, guidance, sampling, seed: int, search=None
    ) -> list[DecodingSequence]:
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list of prompts, got one str; write [prompt]")
        if guidance is None:
            is_steered = self.has_domain and negative_prompts is not None
            guidance = Guidance.recommended() if is_steered else Guidance.none()
        self._check_guidance(guidance)
        check_seed(seed)
        needs_negative = PassKind.NEGATIVE in guidance.passes
        if needs_negative and negative_prompts is None:
            raise ValueError("guidance has a negative weight, but negative_prompts is None")
        if isinstance(negative_prompts, str):
            raise ValueError("negative_prompts must be a list of prompts, got one str")
        if negative_prompts is not None and len(negative_prompts) != len(prompts):
            raise ValueError(
                f"negative_prompts must have one entry per prompt ({len(prompts)}), got "
                f"{len(negative_prompts)}"
            )
        sequences = []
        for i, prompt in enumerate(prompts):
            token_ids = self.encode_prompt(prompt, f"prompts[{i}]")
            per_pass = {PassKind.DOMAIN: token_ids, PassKind.BASE: token_ids}
            if needs_negative:
                per_pass[PassKind.NEGATIVE] = self.encode_prompt(
                    negative_prompts[i], f"negative_prompts[{i}]"
                )
            sequences.append(
                self.make_sequence(i, i, per_pass, guidance, sampling or SamplingParams(), search)
            )
        return sequences

    def _check_guidance(self, guidance: Guidance) -> None:
        if guidance.base != 0 and not self.has_domain:
            raise ValueError(
                f"guidance gives the base model weight {guidance.base:g} beside a domain model, "
                "but the engine was loaded without one; pass domain=, or use Guidance.none() or "
                "Guidance.cfg(...)"
            )

    def _joined(self, parts: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.cat([torch.empty(0, self.model_config.vocab_size), *parts])


def read_steps(steps: list[Sampled]) -> list[list[list]]:
    """The outputs of some draws as lists, [step][field][sequence]: one transfer for each field."""
    if len(steps) == 1:
        return [[field.tolist() for field in steps[0]]]
    fields = (torch.stack(field).tolist() for field in zip(*steps, strict=True))
    return [list(step) for step in zip(*fields, strict=True)]


def check_seed(seed: int) -> None:
    """Raise ValueError unless seed is an int in [0, 2**64)."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be an int in [0, 2**64), got {seed!r}")
