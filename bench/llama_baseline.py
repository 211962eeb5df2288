"""llama.cpp as a peer of the engine on the same weights, written as a user in good faith would.

Plain sampling is the loop of llama.cpp's own batched examples: every sequence has its KV cache, a
step is one llama_decode of all sequences, and llama.cpp's sampler chain draws from top-p. STEER is
the loop that llama.cpp has no call for: two models, one llama_decode each, where the domain model
continues prompts and negatives in one batch; numpy combines the logits, the same chain draws.

It runs under an interpreter of its own, since llama-cpp-python comes as source alone and is built
for the machine, which takes up to half an hour on two busy cores:

    python3 -m venv PEER
    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF" \
        PEER/bin/python -m pip install numpy gguf==0.19.0 llama-cpp-python==0.3.36

`serve` answers one line of JSON on stdout for each on stdin (sides.py holds the other end) and
takes times around its own work, so that the pipe costs nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class LlamaVariant:
    """The choices of such a user; the bench measures them and keeps the fastest.

    dtype: of the GGUF's matrices. bf16 rows are rounded to bf16 before each product, as llama.cpp
        does it.
    flash_attention: one fused attention op instead of three.
    unified_cache: one pool of cells for all sequences, instead of an equal part for each.
    stacked: domain and negative rows in one batch, which reads the weights once.
    cache_dtype: "float16" is llama.cpp's default; "float32" is for checks.
    """

    dtype: str = "bfloat16"
    flash_attention: bool = True
    unified_cache: bool = False
    stacked: bool = True
    cache_dtype: str = "float16"

    @property
    def label(self) -> str:
        attention = "flash" if self.flash_attention else "unfused"
        cache = "unified" if self.unified_cache else "split"
        layout = "stacked" if self.stacked else "separate"
        return f"{self.dtype} {attention} {cache} {layout}"

    def describe(self) -> dict:
        return asdict(self)


def candidates(mode: str, dtypes: tuple[str, ...]) -> list[LlamaVariant]:
    """The variants worth measuring; passes can be separate only where there are several."""
    found = []
    for dtype in dtypes:
        first = LlamaVariant(dtype)
        found += [
            replace(first, flash_attention=flash, unified_cache=unified)
            for flash in (True, False)
            for unified in (False, True)
        ]
        if mode != "plain":
            found += [
                replace(first, stacked=False, flash_attention=flash) for flash in (True, False)
            ]
    return found


class Group(NamedTuple):
    """Passes that run as one batch of one model, by their names, in the order of its sequences."""

    model: str
    kinds: tuple[str, ...]


def groups_of(mode: str, variant: LlamaVariant) -> list[Group]:
    if mode == "plain":
        return [Group("base", ("domain",))]
    own = [("domain", "negative")] if variant.stacked else [("domain",), ("negative",)]
    return [*(Group("finetune", kinds) for kinds in own), Group("base", ("base",))]


class LlamaBaseline:
    """A loaded variant: generates with llama.cpp what the engine generates.

    models: GGUF files by name, "base" and, for STEER, "finetune".
    weights: the guidance's, by the names of the passes.
    """

    def __init__(
        self,
        models: dict[str, str],
        mode: str,
        variant: LlamaVariant,
        *,
        weights: dict[str, float],
        batch: int,
        max_len: int,
        top_p: float,
        threads: int,
    ):
        # Here, so that the bench can read the variants without llama-cpp-python.
        from llama_sequences import Sampler, Sequences, load_model

        self._weights = weights
        self._groups = groups_of(mode, variant)
        loaded = {name: load_model(path) for name, path in models.items()}
        self._sequences = [
            Sequences(
                loaded[group.model],
                num_seqs=batch * len(group.kinds),
                max_len=max_len,
                flash_attention=variant.flash_attention,
                unified_cache=variant.unified_cache,
                exact_cache=variant.cache_dtype == "float32",
                threads=threads,
            )
            for group in self._groups
        ]
        vocab_size = self._sequences[0].vocab_size
        self._sampler = Sampler(top_p, vocab_size)
        self._combined = np.empty((batch, vocab_size), dtype=np.float32)
        self._scaled = np.empty_like(self._combined)

    def generate(self, prompts, negatives, num_new: int, *, greedy: bool = False) -> list:
        """Exactly num_new tokens per prompt."""
        drawn = []
        logits = self._prefill(prompts, negatives)
        for step in range(num_new):
            token_ids = self._draw(logits, greedy)
            drawn.append(token_ids)
            if step + 1 < num_new:
                logits = [
                    sequences.decode(token_ids * len(group.kinds))
                    for group, sequences in zip(self._groups, self._sequences, strict=True)
                ]
        return [list(row) for row in zip(*drawn, strict=True)]

    def first_logits(self, prompts, negatives) -> np.ndarray:
        """Combined logits behind the prompts, [num_seqs, vocab_size]."""
        return self._combine(self._prefill(prompts, negatives))

    def _prefill(self, prompts, negatives) -> list[np.ndarray]:
        texts = {"domain": prompts, "base": prompts, "negative": negatives}
        return [
            sequences.prefill([text for kind in group.kinds for text in texts[kind]])
            for group, sequences in zip(self._groups, self._sequences, strict=True)
        ]

    def _draw(self, logits: list[np.ndarray], greedy: bool) -> list[int]:
        if greedy:
            return self._combine(logits).argmax(axis=1).tolist()
        if len(self._weights) == 1:
            return self._sampler.sample_from(self._sequences[0])
        return self._sampler.sample(self._combine(logits))

    def _combine(self, logits: list[np.ndarray]) -> np.ndarray:
        """The guidance's sum over the passes, in buffers that are kept."""
        self._combined.fill(0)
        for group, stacked in zip(self._groups, logits, strict=True):
            for kind, part in zip(group.kinds, np.split(stacked, len(group.kinds)), strict=True):
                np.multiply(part, self._weights[kind], out=self._scaled)
                self._combined += self._scaled
        return self._combined


def describe_peer() -> dict:
    """Versions, and the build's flags as the library itself reports them."""
    import llama_cpp

    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_commit.restype = ctypes.c_char_p
    return {
        "llama_cpp_python": importlib.metadata.version("llama-cpp-python"),
        "llama_cpp_commit": library.ggml_commit().decode(),
        "system_info": llama_cpp.llama_print_system_info().decode().strip(" |\n"),
        "numpy": np.__version__,
    }


def serve() -> None:
    """Answer requests until stdin ends: "load" first, then "generate" and "first_logits"."""
    # What the library prints must not come between the answers.
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        baseline = None
        for line in sys.stdin:
            request = json.loads(line)
            action = request.pop("action")
            if action == "load":
                baseline = LlamaBaseline(variant=LlamaVariant(**request.pop("variant")), **request)
                answer = {}
            elif action == "generate":
                clock = getattr(time, request.pop("clock"))
                started_at = clock()
                token_ids = baseline.generate(**request)
                answer = {"seconds": clock() - started_at, "token_ids": token_ids}
            else:
                answer = {"logits": baseline.first_logits(**request).tolist()}
            print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("serve", "describe"))
    if parser.parse_args().action == "serve":
        serve()
    else:
        print(json.dumps(describe_peer()))


if __name__ == "__main__":
    main()
