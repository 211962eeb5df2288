"""Human preference between two data sets: blinded pairs for judges, and what their votes say.

pairs.csv goes to the judges, key.json says which side is whose and stays behind. Every judge fills
a copy of pairs.csv; all copies in the directory are counted together.
"""

from __future__ import annotations

import csv
import io
import json
import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

from ..dataset import SyntheticDataset, read_texts
from ..errors import DataError, check_number
from ..files import write_output

PAIRS_FILE, KEY_FILE = "pairs.csv", "key.json"
COLUMNS = ["id", "left", "right", "vote"]
SIDES, TIE = ("left", "right"), "tie"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class WinRate:
    """What the judges of two sets, a and b, said.

    wins, losses, ties: votes for a, for b, and for neither.
    rate: wins / (wins + losses), with its Wilson interval from low to high (95 %).
    z, p_value: one-sided Z-test of "a does not win more often than b".
    """

    a: str
    b: str
    wins: int
    losses: int
    ties: int
    rate: float
    low: float
    high: float
    z: float
    p_value: float

    def describe(self) -> str:
        """One sentence for people."""
        return (
            f"{self.a} against {self.b}: {self.wins} wins, {self.losses} losses, {self.ties} ties; "
            f"win rate without ties {self.rate:.3f} (95 % interval {self.low:.3f} to "
            f"{self.high:.3f}), one-sided Z = {self.z:.2f}, p = {self.p_value:.2g}"
        )


def export_pairs(
    a: str | Path,
    b: str | Path,
    output: str | Path,
    *,
    num_pairs: int | None = None,
    seed: int = 0,
) -> int:
    """Write pairs of texts from two sets for judges who cannot know which set a text is from.

    Texts are drawn without replacement and paired at random, both of one label where both sets are
    runs with the same labels. a's text stands on the left in half of the pairs.

    Args:
        a, b: run directories, or files of texts (see dataset.read_texts).
        output: directory of pairs.csv (id, left, right, empty vote) and key.json; made if missing.
        num_pairs: None: as many as the smaller set allows.
    Returns: the number of pairs.
    Raises: DataError if a set cannot be read, is too small, or output holds pairs already.
        RunError if they cannot be written.
        ValueError if num_pairs or seed is out of range.
    """
    check_number("seed", seed, low=0, is_int=True)
    output = Path(output)
    # Votes may be in it.
    if (output / PAIRS_FILE).exists() or (output / KEY_FILE).exists():
        raise DataError(f"{output}: holds pairs already; give another directory")
    rng = random.Random(seed)
    pairs = _pair(_texts_by_label(Path(a)), _texts_by_label(Path(b)), rng)
    if num_pairs is not None:
        check_number("num_pairs", num_pairs, low=1, is_int=True)
    if len(pairs) < (num_pairs or 1):
        raise DataError(f"{a} and {b} make {len(pairs)} pairs; {num_pairs or 1} were asked for")
    pairs = pairs[:num_pairs]
    sides = [SIDES[i % 2] for i in range(len(pairs))]
    rng.shuffle(sides)
    rows = [
        [number, *((ours, theirs) if side == "left" else (theirs, ours)), ""]
        for number, ((ours, theirs), side) in enumerate(zip(pairs, sides, strict=True), start=1)
    ]
    key = {"a": str(a), "b": str(b), "seed": seed, "side_of_a": dict(enumerate(sides, start=1))}
    write_output(output / KEY_FILE, json.dumps(key, ensure_ascii=False, indent=1) + "\n")
    write_output(output / PAIRS_FILE, _to_csv(rows))
    return len(pairs)


def score_votes(directory: str | Path) -> WinRate:
    """Count the votes of every .csv file in a directory that export_pairs made.

    Files without any vote are left out. Votes are left, right or tie, in any case.
    Raises: DataError naming the file and the row (as a spreadsheet counts, the header being row 1)
        of a missing or unknown vote, or an unknown or repeated id; if a pair is missing, no vote is
        for a side, or the key is missing or damaged.
    """
    directory = Path(directory)
    key = _read_key(directory / KEY_FILE)
    side_of_a = key["side_of_a"]
    votes = [
        (side_of_a[pair], vote)
        for path in sorted(directory.glob("*.csv"))
        for pair, vote in _read_votes(path, side_of_a).items()
    ]
    wins = sum(vote == side for side, vote in votes)
    ties = sum(vote == TIE for _, vote in votes)
    losses = len(votes) - wins - ties
    if not wins + losses:
        found = f"all {ties} votes are ties" if ties else "no votes yet; fill the column vote"
        raise DataError(f"{directory}: {found}")
    rate = wins / (wins + losses)
    low, high = wilson_interval(wins, losses)
    z, p_value = z_test(wins, losses)
    return WinRate(key["a"], key["b"], wins, losses, ties, rate, low, high, z, p_value)


def z_test(wins: int, losses: int) -> tuple[float, float]:
    """One-sided Z-test for a proportion: z and p-value of "the win rate is not above 1/2".

        z = (wins / n - 1/2) / sqrt(1/4 / n),   n = wins + losses,   p = 1 - Phi(z)

    Ties are left out, as in the sign test. Votes count as independent: where several judges see
    the same pairs, they are less than that, and p is too small. The normal approximation wants
    about ten votes on each side; wins + losses must not be 0.
    """
    num_votes = wins + losses
    z = (wins - losses) / math.sqrt(num_votes)
    # Not 1 - cdf, which is 0 from z = 8.3 on.
    return z, math.erfc(z / math.sqrt(2)) / 2


def wilson_interval(wins: int, losses: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The win rate's Wilson score interval: all rates that a two-sided Z-test would not reject.

    wins + losses must not be 0. It keeps within [0, 1] and holds for few votes.
    Source: Wilson 1927.
    """
    num_votes = wins + losses
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = wins / num_votes
    centre = rate + z**2 / (2 * num_votes)
    half = z * math.sqrt(rate * (1 - rate) / num_votes + z**2 / (4 * num_votes**2))
    low, high = ((centre + sign * half) / (1 + z**2 / num_votes) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def _texts_by_label(source: Path) -> dict[str, list[str]]:
    """A run's texts by label; a file's texts under the label ""."""
    if not source.is_dir():
        return {"": read_texts(source)}
    texts: dict[str, list[str]] = {}
    for example in SyntheticDataset.load(source):
        texts.setdefault(example.label, []).append(example.text)
    return texts


def _pair(
    a: dict[str, list[str]], b: dict[str, list[str]], rng: random.Random
) -> list[tuple[str, str]]:
    """Random pairs in random order; within labels if both have the same ones."""
    if a.keys() != b.keys():
        a, b = ({"": [t for texts in s.values() for t in texts]} for s in (a, b))
    pairs = []
    for label, ours in a.items():
        size = min(len(ours), len(b[label]))
        pairs += zip(rng.sample(ours, size), rng.sample(b[label], size), strict=True)
    rng.shuffle(pairs)
    return pairs


def _to_csv(rows: Sequence[Sequence]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([COLUMNS, *rows])
    # The byte-order mark tells Excel that it is UTF-8.
    return "\ufeff" + text.getvalue()


def _read_key(path: Path) -> dict:
    """key.json, checked as far as score_votes relies on it."""
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        is_key = set(key["side_of_a"].values()) <= set(SIDES) and {"a", "b"} <= key.keys()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); give a directory of win-rate export"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        is_key = False
    if not is_key:
        raise DataError(f"{path}: not a key of win-rate export; restore the file")
    return key


def _read_votes(path: Path, known: Collection[str]) -> dict[str, str]:
    """{id: vote} of one judge; empty if nothing was voted."""
    records = _read_csv(path)
    if not any(vote for _, _, vote in records):
        return {}
    votes: dict[str, str] = {}
    for number, pair, vote in records:
        where = f"{path}: row {number}"
        if pair not in known:
            raise DataError(f"{where}: unknown id {pair!r}; take it from the exported {PAIRS_FILE}")
        if pair in votes:
            raise DataError(f"{where}: id {pair} stands there twice; keep one of the rows")
        if vote not in (*SIDES, TIE):
            found = f"unknown vote {vote!r}" if vote else "no vote"
            raise DataError(f"{where}: {found}; write {', '.join(SIDES)} or {TIE}")
        votes[pair] = vote
    missing = [pair for pair in known if pair not in votes]
    if missing:
        raise DataError(f"{path}: id {missing[0]} is missing; every pair needs a vote")
    return votes


def _read_csv(path: Path) -> list[tuple[int, str, str]]:
    """(number of the row, id, vote) of each row that is not empty; row 1 is the header."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    header = text.partition("\n")[0]
    # Where the comma is the decimal mark, spreadsheets write semicolons.
    delimiter = max(",;\t", key=header.count)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise DataError(f"{path}: not CSV ({error})") from None
    names = [name.strip().lower() for name in rows[0]] if rows else []
    if not {"id", "vote"} <= set(names):
        raise DataError(f"{path}: row 1 must be {','.join(COLUMNS)}; restore it")
    width, id_at, vote_at = len(names), names.index("id"), names.index("vote")
    records = []
    for number, row in enumerate(rows[1:], start=2):
        cells = [cell.strip() for cell in row] + [""] * width
        if any(cells):
            records.append((number, cells[id_at], cells[vote_at].lower()))
    return records
