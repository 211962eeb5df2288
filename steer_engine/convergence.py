"""When a data set has converged: too few new 3-grams in a window of examples."""

from __future__ import annotations

from dataclasses import dataclass

from .dataset import Example
from .errors import check_number


@dataclass(frozen=True)
class Convergence:
    """When to stop early (Algorithm 1's "while the data set has not converged").

    The run ends after a window of examples whose share of new 3-grams of tokens falls below the
    tolerance. Windows are counted from index 0; num_examples stays the upper bound.
    Source: O'Neill et al. 2023, Algorithm 1; the measure is ours, the paper names none.
    """

    tolerance: float
    window: int = 100

    def __post_init__(self):
        check_number("until's tolerance", self.tolerance, low=0.0, high=1.0)
        check_number("until's window", self.window, low=1, is_int=True)


class ConvergenceTest:
    """Counts 3-grams of token ids in index order."""

    def __init__(self, settings: Convergence | None):
        self.settings = settings
        self._seen: set[tuple[int, ...]] = set()
        self._num_new = self._num_total = 0

    def is_met_after(self, example: Example) -> bool:
        """Take the next example; True if it closes a window with too few new 3-grams."""
        if self.settings is None:
            return False
        ids = () if example.is_failed else example.token_ids
        for trigram in zip(ids, ids[1:], ids[2:], strict=False):
            self._num_total += 1
            self._num_new += trigram not in self._seen
            self._seen.add(trigram)
        if (example.index + 1) % self.settings.window:
            return False
        share = self._num_new / self._num_total if self._num_total else 0.0
        self._num_new = self._num_total = 0
        return share < self.settings.tolerance
