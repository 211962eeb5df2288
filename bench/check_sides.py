"""Do the sides that bench_generate.py compares compute the same?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import hf_baseline
import llama_baseline
from checkpoints import Checkpoints
from conditions import make_texts
from sides import EngineSide, HfSide, LlamaSide, Side, runs_on_llama

# Softmax of combined fp32 logits; both sides sum in another order.
PROBS_TOLERANCE = 1e-4
# llama.cpp's GELU is the tanh approximation, looked up in a table of fp16 numbers: logits move by
# up to 0.015 and probabilities by up to 0.0015, on TINY and SMALL in every variant.
LLAMA_PROBS_TOLERANCE = 5e-3
NUM_CHECKED = 4
NUM_GREEDY = 8


def check_equal(paths: Checkpoints, mode: str, settings) -> None:
    """All sides draw the same greedy tokens and have the same first distribution, in fp32."""
    texts = make_texts(
        settings.vocab_size, NUM_CHECKED, settings.prompt_tokens, settings.negative_tokens
    )
    ours = EngineSide(paths, mode, "float32", NUM_CHECKED, settings)
    expected = ours.generate(*texts, NUM_GREEDY, greedy=True)
    probs = ours.first_probs(*texts)
    for make in checked_peers(paths, mode, settings):
        theirs = make()
        drawn = theirs.generate(*texts, NUM_GREEDY, greedy=True)
        assert drawn == expected, f"{mode}, {theirs.label}: greedy tokens differ"
        error = float((theirs.first_probs(*texts) - probs).abs().max())
        tolerance = LLAMA_PROBS_TOLERANCE if theirs.kind == "llama" else PROBS_TOLERANCE
        assert error <= tolerance, f"{mode}, {theirs.label}: probabilities off {error}"
        theirs.close()
    print(f"checked {mode}: greedy tokens and first distributions agree in fp32", flush=True)


def checked_peers(paths: Checkpoints, mode: str, settings) -> Iterator[Callable[[], Side]]:
    """Every variant in fp32, for NUM_CHECKED sequences."""
    if not settings.no_hf:
        for variant in hf_baseline.candidates(mode, ("float32",), with_compiled=False):
            yield functools.partial(HfSide, paths, mode, variant)
    if runs_on_llama(mode, settings):
        for variant in llama_baseline.candidates(mode, ("float32",)):
            exact = replace(variant, cache_dtype="float32")
            yield functools.partial(LlamaSide, paths, mode, exact, NUM_CHECKED, settings)
