"""The engine on Triton's kernels, in the interpreter: a full fine-tune's tokens are the
reference's, through one product for both weight sets.
"""

from __future__ import annotations

from unittest import mock

import helpers
import pytest
from triton_interpreter import interpreted

from steer_engine import Engine, Guidance, SamplingParams

pytest.importorskip("triton", exc_type=ImportError)

PROMPTS = helpers.random_prompts(2, longest=9)
NEGATIVES = helpers.random_prompts(2, seed=1, longest=12)


@pytest.fixture
def directories(tiny_models) -> tuple[str, str]:
    return str(tiny_models.base), str(tiny_models.finetune)


def generate(directories: tuple[str, str], backend: str) -> list[list[int]]:
    base, domain = directories
    engine = Engine.from_pretrained(
        base, domain, device="cpu", dtype="float32", backend=backend, max_num_seqs=2
    )
    completions = engine.generate(
        PROMPTS,
        negative_prompts=NEGATIVES,
        guidance=Guidance.recommended(),
        sampling=SamplingParams(top_p=0.9, max_tokens=3, ignore_eos=True),
        seed=3,
    )
    return [completion.token_ids for completion in completions]


@interpreted
def test_a_full_fine_tune_draws_the_references_tokens_by_grouped_products(directories):
    from steer_engine.kernels import triton_ops

    grouped = mock.Mock(wraps=triton_ops.grouped_linear)
    with mock.patch.object(triton_ops, "grouped_linear", grouped):
        got = generate(directories, "triton")
    assert got == generate(directories, "reference")
    boundaries = [(call.args[2], len(call.args[0])) for call in grouped.call_args_list]
    # Prefill and decode steps: two layers of two products each, and the heads.
    assert len(boundaries) >= 3 * (2 * 2 + 1)
    assert (4, 6) in boundaries, "a decode step has 4 domain rows of 6"
