"""The sides that bench_generate.py compares, behind one interface: the engine, Hugging Face's
transformers, and llama.cpp in a process of its own.
"""

from __future__ import annotations

import gc
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from checkpoints import Checkpoints
from conditions import TOP_P, domain_of, sampling_of
from hf_baseline import HfBaseline, Variant, load_groups
from llama_baseline import LlamaVariant

from steer_engine import Engine, Guidance, SamplingParams
from steer_engine.guidance import PassKind

BENCH = Path(__file__).parent


def guidance_of(mode: str) -> Guidance:
    return Guidance.none() if mode == "plain" else Guidance.recommended()


class Side:
    """What generates. `kind` groups the sides of one origin, `label` names one of them."""

    kind: str
    label: str

    def generate(self, prompts, negatives, num_new: int, *, greedy: bool = False) -> list:
        """Exactly num_new token ids per prompt."""
        raise NotImplementedError

    def first_probs(self, prompts, negatives) -> torch.Tensor:
        """The distribution behind the prompts before top-p, [num_seqs, vocab_size]."""
        raise NotImplementedError

    def time(self, texts, num_new: int, clock: Callable[[], float]) -> float:
        """Seconds that generate takes."""
        started_at = clock()
        drawn = self.generate(*texts, num_new)
        seconds = clock() - started_at
        assert [len(row) for row in drawn] == [num_new] * len(texts[0])
        return seconds

    def describe(self) -> dict:
        """What the result says beside the label."""
        return {}

    def close(self) -> None:
        """Give the memory of the weights back."""


class EngineSide(Side):
    kind = "engine"

    def __init__(self, paths: Checkpoints, mode: str, dtype: str, batch: int, settings):
        self.label = f"engine {dtype}"
        self.guidance = guidance_of(mode)
        self._engine = Engine.from_pretrained(
            paths.base,
            domain_of(paths, mode),
            dtype=dtype,
            max_num_seqs=batch,
            max_model_len=settings.negative_tokens + settings.new_tokens + 8,
        )

    def generate(self, prompts, negatives, num_new: int, *, greedy: bool = False) -> list:
        sampling = sampling_of(num_new)
        if greedy:
            sampling = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)
        completions = self._engine.generate(
            prompts, negative_prompts=negatives, guidance=self.guidance, sampling=sampling
        )
        return [c.token_ids for c in completions]

    def first_probs(self, prompts, negatives) -> torch.Tensor:
        return self._engine.next_token_probs(
            prompts, negative_prompts=negatives, guidance=self.guidance
        )

    def close(self) -> None:
        del self._engine
        gc.collect()


class HfSide(Side):
    """One Hugging Face variant."""

    kind = "hf"

    def __init__(self, paths: Checkpoints, mode: str, variant: Variant):
        self.label = f"hf {variant.label(mode)}"
        self._variant = variant
        self._baseline = HfBaseline(load_groups(paths, mode, variant), variant, guidance_of(mode))

    def generate(self, prompts, negatives, num_new: int, *, greedy: bool = False) -> list:
        return self._baseline.generate(
            prompts, negatives, num_new=num_new, top_p=TOP_P, greedy=greedy
        ).tolist()

    def first_probs(self, prompts, negatives) -> torch.Tensor:
        baseline = self._baseline
        return baseline.combine(baseline.prefill(prompts, negatives, 1)).softmax(dim=-1)

    def describe(self) -> dict:
        return {"variant": self._variant.describe()}

    def close(self) -> None:
        del self._baseline
        torch.compiler.reset()
        gc.collect()


class LlamaSide(Side):
    """One llama.cpp variant, in a child process under settings.llama, its interpreter."""

    kind = "llama"

    def __init__(self, paths: Checkpoints, mode: str, variant: LlamaVariant, batch: int, settings):
        self.label = f"llama.cpp {variant.label}"
        self._variant = variant
        models = {"base": paths.base} | ({"finetune": paths.finetune} if mode != "plain" else {})
        files = {
            name: str(ensure_gguf(settings.llama, directory, variant.dtype))
            for name, directory in models.items()
        }
        weights = guidance_of(mode).weights
        passes = [PassKind.DOMAIN] if mode == "plain" else PassKind
        longest = settings.prompt_tokens if mode == "plain" else settings.negative_tokens
        command = [settings.llama, BENCH / "llama_baseline.py", "serve"]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._ask(
            "load",
            models=files,
            mode=mode,
            variant=variant.describe(),
            weights={kind.name.lower(): weights[kind] for kind in passes},
            batch=batch,
            max_len=longest + settings.new_tokens,
            top_p=TOP_P,
            threads=settings.threads,
        )

    def generate(self, prompts, negatives, num_new: int, *, greedy: bool = False) -> list:
        return self._generate(prompts, negatives, num_new, greedy=greedy)["token_ids"]

    def first_probs(self, prompts, negatives) -> torch.Tensor:
        answer = self._ask("first_logits", prompts=prompts, negatives=negatives)
        return torch.tensor(answer["logits"]).softmax(dim=-1)

    def time(self, texts, num_new: int, clock: Callable[[], float]) -> float:
        """As the child takes it, around its generate and by its own clock of the same kind."""
        answer = self._generate(*texts, num_new, clock=clock.__name__)
        assert [len(row) for row in answer["token_ids"]] == [num_new] * len(texts[0])
        return answer["seconds"]

    def describe(self) -> dict:
        return {"variant": self._variant.describe()}

    def close(self) -> None:
        self._child.stdin.close()
        self._child.wait()

    def _generate(self, prompts, negatives, num_new, *, greedy=False, clock="perf_counter") -> dict:
        arguments = {"prompts": prompts, "negatives": negatives, "num_new": num_new}
        return self._ask("generate", greedy=greedy, clock=clock, **arguments)

    def _ask(self, action: str, **arguments) -> dict:
        """One request to the child and its answer."""
        self._child.stdin.write(json.dumps({"action": action} | arguments) + "\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline()
        if not answer:
            raise RuntimeError(
                f"{self.label}: the process ended with status {self._child.wait()} on {action!r}; "
                "its message is on stderr"
            )
        return json.loads(answer)


def runs_on_llama(mode: str, settings) -> bool:
    return settings.llama is not None and mode != "steer_lora"


def describe_llama(interpreter: Path) -> dict:
    """llama.cpp's versions and build flags."""
    command = [interpreter, BENCH / "llama_baseline.py", "describe"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout)


def ensure_gguf(interpreter: Path, directory: Path, dtype: str) -> Path:
    """The checkpoint as a GGUF file beside its directory, written if it is not there yet."""
    path = directory.with_name(f"{directory.name}-{dtype}.gguf")
    if not path.exists():
        script = BENCH / "gguf_checkpoint.py"
        command = [interpreter, script, directory, path, "--dtype", dtype]
        subprocess.run(command, check=True)
    return path
