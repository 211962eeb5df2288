"""What the files of a run say of it: its environment (run.json) and its counts (summary.json)."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from . import ops
from .dataset import Example

if TYPE_CHECKING:
    from .engine import Engine

PACKAGES = ("steer-engine", "torch", "tokenizers", "numpy")


def describe_environment(engine: Engine) -> dict:
    """Versions, engine settings and checkpoints, as JSON values; reads every checkpoint file."""
    versions = {name: version(name) for name in PACKAGES}
    versions |= {"python": platform.python_version(), "machine": platform.machine()}
    if engine.config.backend == "cpu":
        versions["cpu_isa"] = ops.cpu_isa()
    return {
        "versions": versions,
        "engine": engine.describe(),
        "checkpoints": engine.sha256(),
    }


def describe_real(texts: Sequence[str]) -> dict:
    """How many real examples, and a digest of them and their order."""
    digest = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
    return {"num_examples": len(texts), "sha256": digest}


def count_examples(examples: Sequence[Example], real: Sequence[str]) -> dict:
    """What a summary says about the examples alone."""
    kept = [e for e in examples if not e.is_failed]
    texts = [" ".join(e.text.split()) for e in kept]
    known = {" ".join(text.split()) for text in real}
    return {
        "num_examples": len(kept),
        "num_failed": len(examples) - len(kept),
        "num_tokens": sum(len(e.token_ids) for e in kept),
        "finish_reasons": dict(Counter(e.finish_reason for e in examples)),
        "num_rejected_attempts": sum(e.attempts - (not e.is_failed) for e in examples),
        "num_duplicates": len(texts) - len(set(texts)),
        "num_copies_of_real": sum(text in known for text in texts),
    }


def measure_speed(drawn: Sequence[Example], elapsed_s: float) -> dict:
    """What a summary says about the examples that this call drew in so many seconds."""
    num_tokens = sum(len(e.token_ids) for e in drawn if not e.is_failed)
    return {
        "elapsed_s": round(elapsed_s, 3),
        "examples_per_s": round(len(drawn) / elapsed_s, 3),
        "tokens_per_s": round(num_tokens / elapsed_s, 2),
    }
