"""Guidance: the weights of every rule, which passes they need, and what is refused."""

from __future__ import annotations

import math

import pytest

from steer_engine import Guidance
from steer_engine.guidance import PassKind

DOMAIN, BASE, NEGATIVE = PassKind.DOMAIN, PassKind.BASE, PassKind.NEGATIVE

# DESIGN.md, section 2: rule -> weights of domain, base, negative.
WEIGHTS = [
    (Guidance.none(), (1.0, 0.0, 0.0)),
    (Guidance.steer(0.25, 0.5), (1.5, -0.25, 0.5)),
    (Guidance.steer(0.25, 0.5, form="paper"), (1.5, -0.25, 0.5)),
    (Guidance.steer(0.25, 0.5, form="released"), (1.25, -0.25, -0.5)),
    (Guidance.contrastive(0.25), (1.0, -0.25, 0.0)),
    (Guidance.cfg(1.5), (1.5, 0.0, -0.5)),
    (Guidance.cfg(0.25), (0.25, 0.0, 0.75)),
]


@pytest.mark.parametrize(("guidance", "weights"), WEIGHTS)
def test_each_rule_has_the_weights_of_the_design(guidance, weights):
    # Exact: every number here is a sum of powers of two.
    assert guidance.weights == weights
    assert (guidance.domain, guidance.base, guidance.negative) == weights


def test_recommended_is_the_released_form_at_a_fifth():
    assert Guidance.recommended() == Guidance.steer(0.2, 0.2, form="released")
    assert Guidance.recommended().weights == (1.2, -0.2, -0.2)


@pytest.mark.parametrize(
    ("guidance", "passes"),
    [
        (Guidance.none(), (DOMAIN,)),
        (Guidance.steer(0.2, 0.2), (DOMAIN, BASE, NEGATIVE)),
        (Guidance.steer(0.0, 0.2), (DOMAIN, NEGATIVE)),
        (Guidance.steer(0.2, 1.0), (DOMAIN, BASE)),
        (Guidance.steer(0.2, 0.0, form="released"), (DOMAIN, BASE)),
        (Guidance.steer(0.0, 0.0, form="released"), (DOMAIN,)),
        (Guidance.contrastive(0.2), (DOMAIN, BASE)),
        (Guidance.contrastive(0.0), (DOMAIN,)),
        (Guidance.cfg(2.0), (DOMAIN, NEGATIVE)),
        (Guidance.cfg(1.0), (DOMAIN,)),
        (Guidance.cfg(0.0), (NEGATIVE,)),
        (Guidance(0.0, 1.0, 0.0), (BASE,)),
    ],
)
def test_a_pass_of_weight_zero_is_not_run(guidance, passes):
    assert guidance.passes == passes


def test_the_plausibility_cut_needs_the_domain_pass_even_at_weight_zero():
    assert Guidance.cfg(0.0, alpha=0.1).passes == (DOMAIN, NEGATIVE)


def test_the_order_of_passes_is_that_of_the_samplers_logits():
    assert list(PassKind) == [DOMAIN, BASE, NEGATIVE] and list(map(int, PassKind)) == [0, 1, 2]


@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.5, 0.75])
def test_the_sum_of_the_weights_is_the_inverse_of_the_implicit_temperature(gamma, eta):
    paper = Guidance.steer(gamma, eta)
    released = Guidance.steer(gamma, eta, form="released")
    assert sum(paper.weights) == 2 - gamma
    assert sum(released.weights) == 1 - eta
    assert paper.implicit_temperature == 1 / (2 - gamma)
    assert released.implicit_temperature == 1 / (1 - eta)


@pytest.mark.parametrize("guidance", [g for g, _ in WEIGHTS])
def test_normalized_weights_sum_to_one_in_the_same_proportions(guidance):
    normalized = guidance.normalized()
    assert sum(normalized.weights) == pytest.approx(1.0, abs=1e-15)
    assert normalized.implicit_temperature == pytest.approx(1.0, abs=1e-15)
    total = sum(guidance.weights)
    assert [w * total for w in normalized.weights] == pytest.approx(guidance.weights, abs=1e-15)
    assert normalized.passes == guidance.passes


def test_normalized_keeps_the_plausibility_cut():
    assert Guidance.steer(0.2, 0.2, alpha=0.1).normalized().alpha == 0.1


@pytest.mark.parametrize(
    "guidance", [Guidance.steer(0.0, 1.0, form="released"), Guidance.contrastive(3.0)]
)
def test_weights_whose_sum_is_not_positive_have_no_temperature_and_no_normal_form(guidance):
    assert guidance.implicit_temperature is None
    assert "none" in guidance.describe()
    with pytest.raises(ValueError, match="only a positive sum"):
        guidance.normalized()


def test_the_description_holds_the_rule_and_its_implicit_temperature():
    line = Guidance.steer(0.2, 0.2, form="released", alpha=0.1).describe()
    assert line == ("1.2 domain -0.2 base -0.2 negative, alpha 0.1; implicit temperature 1.25")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "0.2", None, True])
@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("gamma", lambda x: Guidance.steer(x, 0.2)),
        ("eta", lambda x: Guidance.steer(0.2, x)),
        ("gamma", lambda x: Guidance.contrastive(x)),
        ("scale", lambda x: Guidance.cfg(x)),
        ("domain", lambda x: Guidance(x, 0.0, 0.0)),
        ("base", lambda x: Guidance(1.0, x, 0.0)),
        ("negative", lambda x: Guidance(1.0, 0.0, x)),
        ("alpha", lambda x: Guidance(alpha=x)),
    ],
)
def test_an_argument_that_is_no_finite_number_is_refused_by_name(name, build, bad):
    with pytest.raises(ValueError, match=rf"{name}.* must be a number"):
        build(bad)


@pytest.mark.parametrize("alpha", [-0.01, 1.01])
def test_alpha_outside_0_to_1_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha must be a number in \[0, 1\]"):
        Guidance.steer(0.2, 0.2, alpha=alpha)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_may_be_0_and_1(alpha):
    assert Guidance.contrastive(0.2, alpha=alpha).alpha == alpha


def test_an_unknown_form_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="form must be 'paper' or 'released', got 'printed'"):
        Guidance.steer(0.2, 0.2, form="printed")


def test_all_weights_zero_is_refused():
    with pytest.raises(ValueError, match="all weights are 0"):
        Guidance(0.0, 0.0, 0.0)


def test_negative_gamma_and_eta_are_allowed():
    assert Guidance.steer(-0.5, -0.5).weights == (0.5, 0.5, 1.5)
