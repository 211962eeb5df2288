"""Guidance: the weights with which the three passes' logits are combined.

    combined = domain * l_domain + base * l_base + negative * l_negative

Constants per row vanish in the softmax, so logits serve as log-probabilities. The sum of the
weights acts as an inverse temperature.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

from .errors import check_number


class PassKind(IntEnum):
    """The forward passes of one sequence; the value is the index of the pass's weight."""

    DOMAIN = 0
    BASE = 1
    NEGATIVE = 2


@dataclass(frozen=True)
class Guidance:
    """Weights of the passes and the plausibility cut.

    Attributes:
        domain, base, negative: finite weights; a pass of weight 0 is not run.
        alpha: in [0, 1]; keep a token only if its domain logit is at least max + ln(alpha); 0 is
            off.
    Raises: ValueError if a weight is not finite, all are 0, or alpha is out of range.
    Source: alpha, the plausibility constraint of Li et al. 2023 (arXiv:2210.15097).
    """

    domain: float = 1.0
    base: float = 0.0
    negative: float = 0.0
    alpha: float = 0.0

    def __post_init__(self):
        for name in ("domain", "base", "negative"):
            check_number(f"the {name} weight", getattr(self, name))
        check_number("alpha", self.alpha, low=0.0, high=1.0)
        if self.weights == (0.0, 0.0, 0.0):
            raise ValueError("all weights are 0; give at least one pass a weight")

    @classmethod
    def none(cls) -> Guidance:
        """The domain model alone: weights (1, 0, 0)."""
        return cls()

    @classmethod
    def steer(
        cls, gamma: float, eta: float, *, form: str = "paper", alpha: float = 0.0
    ) -> Guidance:
        """STEER: contrastive expert guidance (gamma) plus negative prompting (eta).

        form="paper": the equations as printed, (1 + eta, -gamma, 1 - eta); the sum 2 - gamma
            sharpens.
        form="released": the authors' published code, (1 + gamma, -gamma, -eta); the sum 1 - eta
            flattens.
        Source: O'Neill et al. 2023.
        """
        check_number("gamma", gamma)
        check_number("eta", eta)
        if form == "paper":
            return cls(1.0 + eta, -gamma, 1.0 - eta, alpha)
        if form == "released":
            return cls(1.0 + gamma, -gamma, -eta, alpha)
        raise ValueError(f"form must be 'paper' or 'released', got {form!r}")

    @classmethod
    def recommended(cls) -> Guidance:
        """steer(0.2, 0.2, form="released"): rule and settings behind the paper's data."""
        return cls.steer(0.2, 0.2, form="released")

    @classmethod
    def contrastive(cls, gamma: float, *, alpha: float = 0.0) -> Guidance:
        """Expert guidance alone: (1, -gamma, 0)."""
        check_number("gamma", gamma)
        return cls(1.0, -gamma, 0.0, alpha)

    @classmethod
    def cfg(cls, scale: float, *, alpha: float = 0.0) -> Guidance:
        """Classifier-free guidance against the negative prompt: (scale, 0, 1 - scale).

        Source: Sanchez et al. 2023 (arXiv:2306.17806).
        """
        check_number("scale", scale)
        return cls(scale, 0.0, 1.0 - scale, alpha)

    @property
    def weights(self) -> tuple[float, float, float]:
        """In the order of PassKind: domain, base, negative."""
        return (self.domain, self.base, self.negative)

    @property
    def implicit_temperature(self) -> float | None:
        """1 / sum of the weights; None where the sum is not positive."""
        total = sum(self.weights)
        return 1.0 / total if total > 0 else None

    @property
    def passes(self) -> tuple[PassKind, ...]:
        """The passes that have to run; the domain pass also for the plausibility cut."""
        return tuple(
            kind
            for kind in PassKind
            if self.weights[kind] != 0 or (kind is PassKind.DOMAIN and self.alpha > 0)
        )

    def normalized(self) -> Guidance:
        """The weights divided by their sum, so that temperature means the same under every method.

        Raises: ValueError if the sum is not positive.
        """
        total = sum(self.weights)
        if total <= 0:
            raise ValueError(
                f"weights {self.weights} sum to {total:g}; only a positive sum can be normalized"
            )
        return replace(
            self, domain=self.domain / total, base=self.base / total, negative=self.negative / total
        )

    def describe(self) -> str:
        """One line for logs and people: the rule and its implicit temperature."""
        d, b, n = self.weights
        temperature = self.implicit_temperature
        shown = "none (weights sum to 0 or less)" if temperature is None else f"{temperature:.3g}"
        cut = f", alpha {self.alpha:g}" if self.alpha else ""
        return f"{d:g} domain {b:+g} base {n:+g} negative{cut}; implicit temperature {shown}"
