"""Combining the passes in front of the LM head: the same distribution, fewer rows, and a choice
that no neighbour can change.
"""

from __future__ import annotations

import itertools

import helpers
import pytest
import torch

from steer_engine import Guidance, SamplingParams, ops
from steer_engine.guidance import PassKind
from steer_engine.head import HeadRows, head_rows

PASSES = (PassKind.DOMAIN, PassKind.NEGATIVE, PassKind.BASE)
STEER = Guidance.recommended()
FP32, BF16 = torch.float32, torch.bfloat16
SAMPLING = SamplingParams(max_tokens=6, ignore_eos=True)

# Of the combined logits, relative to the passes' largest logit times the sum of |weights|.
TOLERANCE = {
    FP32: 2.0**-20,  # sums of hidden_size products in another order
    BF16: 2.0**-8,  # each pass's state is rounded once behind its norm, hi + lo twice as finely
}


def rows_of(guidances, passes=PASSES, *, folds=True, shares_head=True, dtype=FP32) -> HeadRows:
    return head_rows(
        guidances, passes, folds=folds, shares_head=shares_head, dtype=dtype, device="cpu"
    )


def weights_of(guidance) -> list[float]:
    return [guidance.weights[kind] for kind in PASSES]


@pytest.mark.parametrize(
    ("shares_head", "dtype", "num_rows"),
    [(True, FP32, 1), (True, BF16, 2), (False, FP32, 2), (False, BF16, 3)],
)
def test_so_many_rows_go_through_the_head(shares_head, dtype, num_rows):
    rows = rows_of([STEER, STEER], shares_head=shares_head, dtype=dtype)
    assert len(rows.weights) == num_rows
    # All that a pass adds to the logits is its weight.
    total = (rows.coefficients * rows.weights[:, None] * ~rows.is_low[:, None]).sum(dim=0)
    torch.testing.assert_close(total, torch.tensor([[w, w] for w in weights_of(STEER)]))


def test_alpha_keeps_the_rows_of_its_own_sequence_apart_and_no_others():
    cut = Guidance(1.2, -0.2, -0.2, alpha=0.1)
    alone, together = rows_of([STEER]), rows_of([STEER, cut])
    assert torch.equal(together.coefficients[:1, :, :1], alone.coefficients)
    assert torch.equal(together.weights[:, 0], torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(together.coefficients[:, :, 1], torch.eye(3))
    assert torch.equal(together.weights[:, 1], torch.tensor(weights_of(cut)))


@pytest.mark.parametrize(("dtype", "num_domain_rows"), [(FP32, 1), (BF16, 2)])
def test_rows_of_one_head_stand_together(dtype, num_domain_rows):
    rows = rows_of([STEER, Guidance.none()], shares_head=False, dtype=dtype)
    assert rows.num_domain_rows == num_domain_rows
    uses_base = rows.coefficients[:, PASSES.index(PassKind.BASE)] != 0
    assert uses_base.tolist() == [[False] * 2] * num_domain_rows + [[True, False]]


def test_passes_that_a_sequence_does_not_run_have_no_part():
    rows = rows_of([Guidance.none(), STEER, Guidance.contrastive(0.3)], folds=False)
    assert torch.equal(rows.weights.T[0], torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(rows.coefficients[1:, :, 0], torch.zeros(2, 3))
    assert len(rows_of([Guidance.none()], PASSES[:1]).weights) == 1


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("domain", ["lora", "finetune"])
def test_combined_in_front_of_the_head_or_behind_it_the_logits_are_equal(
    make_engine, backend, domain, dtype
):
    """And the error is within what rounding the states to the model's dtype explains."""
    name = {FP32: "float32", BF16: "bfloat16"}[dtype]
    logits = {}
    for fold in (False, True):
        engine = make_engine(domain=domain, backend=backend, dtype=name, fold_head=fold)
        compute_logits, seen = engine.model.compute_logits, []

        def recording(residual, logit_rows, head, compute=compute_logits, seen=seen):
            result = compute(residual, logit_rows, head)
            seen.append(((result * head.weights[:, :, None]).sum(dim=0), result.abs().max()))
            return result

        engine.model.compute_logits = recording
        prompts = helpers.random_prompts(4, longest=60)
        arguments = {"negative_prompts": prompts[::-1], "guidance": STEER, "sampling": SAMPLING}
        engine.generate(prompts, **arguments)
        logits[fold] = seen[0]
    (behind, largest), (front, _) = logits[False], logits[True]
    error = (behind - front).abs().max() / (largest * sum(map(abs, STEER.weights)))
    assert error <= TOLERANCE[dtype], f"{domain} {dtype}: {error:.3g}"
    assert not torch.equal(behind, front) or domain == "finetune"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sequence_draws_the_same_beside_any_others(make_engine, make_item, decode, dtype):
    if ops.unavailable_reason("cpu"):
        pytest.skip("backend cpu: " + ops.unavailable_reason("cpu"))
    guidances = [STEER, Guidance(1.2, -0.2, -0.2, alpha=0.05), Guidance.none(), Guidance.cfg(1.5)]
    items = [
        make_item(i, [20 + i, 30], [40, 41, 42 + i], guidance, SAMPLING)
        for i, guidance in enumerate(guidances)
    ]
    expected = {}
    for item in items:
        expected |= decode(make_engine(dtype=dtype), [item])
    for order in itertools.islice(itertools.permutations(items), 0, 24, 7):
        assert decode(make_engine(dtype=dtype), list(order)) == expected
