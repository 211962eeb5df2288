"""Blinded pairs for judges, their votes, and the test."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from helpers import call
from scipy import stats

from steer_engine import DataError, Example
from steer_engine.evaluate.win_rate import (
    export_pairs,
    score_votes,
    wilson_interval,
    z_test,
)


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps(t) + "\n" for t in texts))
    return path


def write_run(path: Path, texts: dict[str, list[str]]) -> Path:
    """A run directory with those texts by label."""
    path.mkdir()
    labelled = [(label, text) for label, of_label in texts.items() for text in of_label]
    examples = [
        Example(i, label, f"{label}:", text, [1], "stop", [], 1)
        for i, (label, text) in enumerate(labelled)
    ]
    (path / "examples.jsonl").write_text("".join(json.dumps(asdict(e)) + "\n" for e in examples))
    return path


def read_pairs(directory: Path) -> list[dict[str, str]]:
    with open(directory / "pairs.csv", encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def write_votes(path: Path, votes: dict[str, str], delimiter: str = ",") -> None:
    rows = [["id", "left", "right", "vote"], *([p, "x", "y", v] for p, v in votes.items())]
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


@pytest.fixture
def sets(tmp_path) -> tuple[Path, Path]:
    a = write_texts(tmp_path / "a.jsonl", [f'a {i}, "é"\nline' for i in range(12)])
    b = write_texts(tmp_path / "b.jsonl", [f"b {i}" for i in range(9)])
    return a, b


@pytest.fixture
def exported(sets, tmp_path) -> Path:
    assert export_pairs(*sets, tmp_path / "votes") == 9
    return tmp_path / "votes"


def sides_of_a(directory: Path) -> dict[str, str]:
    return json.loads((directory / "key.json").read_text())["side_of_a"]


def test_pairs_hold_one_text_of_each_set_and_the_key_says_which(exported):
    pairs = read_pairs(exported)
    sides = sides_of_a(exported)
    assert [p["id"] for p in pairs] == [str(i) for i in range(1, 10)] == list(sides)
    for pair in pairs:
        other = {"left": "right", "right": "left"}[sides[pair["id"]]]
        assert pair[sides[pair["id"]]].startswith("a ")
        assert pair[other].startswith("b ")
        assert pair["vote"] == ""
    texts = [p[side] for p in pairs for side in ("left", "right")]
    assert len(set(texts)) == 18
    assert 'a 0, "é"\nline' in [f'a {i}, "é"\nline' for i in range(12)]
    assert sum(t.endswith(', "é"\nline') for t in texts) == 9


def test_what_the_judges_get_names_no_set(exported):
    assert list(read_pairs(exported)[0]) == ["id", "left", "right", "vote"]
    assert "jsonl" not in (exported / "pairs.csv").read_text()


def test_each_set_stands_on_the_left_in_half_of_the_pairs_in_shuffled_order(sets, tmp_path):
    export_pairs(*sets, tmp_path / "eight", num_pairs=8)
    sides = list(sides_of_a(tmp_path / "eight").values())
    assert sides.count("left") == sides.count("right") == 4
    assert sides != ["left", "right"] * 4


def test_the_same_seed_gives_the_same_files_and_another_seed_others(sets, tmp_path):
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        export_pairs(*sets, tmp_path / name, seed=seed)
    one, two, three = ((tmp_path / n / "pairs.csv").read_bytes() for n in ("one", "two", "three"))
    assert one == two != three


def test_runs_with_the_same_labels_are_paired_within_labels(tmp_path):
    a = write_run(tmp_path / "a", {x: [f"{x} a {i}" for i in range(6)] for x in ("kind", "rude")})
    b = write_run(tmp_path / "b", {x: [f"{x} b {i}" for i in range(4)] for x in ("rude", "kind")})
    assert export_pairs(a, b, tmp_path / "votes") == 8
    labels = [(p["left"].split()[0], p["right"].split()[0]) for p in read_pairs(tmp_path / "votes")]
    assert sorted(labels) == [("kind", "kind")] * 4 + [("rude", "rude")] * 4


def test_a_run_is_paired_with_a_file_of_texts(sets, tmp_path):
    run = write_run(tmp_path / "run", {"kind": ["k 1", "k 2"], "rude": ["r 1"]})
    assert export_pairs(run, sets[1], tmp_path / "votes") == 3


def test_pairs_that_exist_are_never_written_over(sets, exported):
    before = (exported / "pairs.csv").read_bytes()
    with pytest.raises(DataError, match="holds pairs already"):
        export_pairs(*sets, exported, seed=1)
    assert (exported / "pairs.csv").read_bytes() == before


def test_more_pairs_than_texts_are_refused(sets, tmp_path):
    with pytest.raises(DataError, match="make 9 pairs; 10 were asked for"):
        export_pairs(*sets, tmp_path / "votes", num_pairs=10)
    assert not (tmp_path / "votes").exists()


def test_votes_of_all_judges_are_counted_for_the_right_set(exported):
    sides = sides_of_a(exported)
    other = {"left": "right", "right": "left"}
    ids = list(sides)
    # pairs.csv itself stays empty and is not counted.
    first = {p: sides[p].upper() + " " for p in ids[:6]} | {p: other[sides[p]] for p in ids[6:]}
    write_votes(exported / "ann.csv", first)
    write_votes(
        exported / "bob.csv", dict.fromkeys(ids[:4], "tie") | {p: sides[p] for p in ids[4:]}
    )
    found = score_votes(exported)
    assert (found.wins, found.losses, found.ties) == (6 + 5, 3, 4)
    assert found.rate == 11 / 14
    assert (found.low, found.high) == wilson_interval(11, 3)
    assert (found.z, found.p_value) == z_test(11, 3)
    assert Path(found.a).name == "a.jsonl"


def test_rows_may_be_in_any_order_and_separated_by_semicolons(exported):
    sides = sides_of_a(exported)
    write_votes(exported / "ann.csv", dict(reversed(sides.items())), delimiter=";")
    assert score_votes(exported).wins == 9


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"3": "middle"}, "ann.csv: row 4: unknown vote 'middle'; write left, right or tie"),
        ({"3": ""}, "ann.csv: row 4: no vote; write left, right or tie"),
        ({"77": "left"}, "ann.csv: row 11: unknown id '77'"),
        ({" 2": "left"}, "ann.csv: row 11: id 2 stands there twice"),
        ({"5": None}, "ann.csv: id 5 is missing; every pair needs a vote"),
    ],
)
def test_a_wrong_vote_is_named_by_its_row(exported, changes, expected):
    votes = dict.fromkeys(sides_of_a(exported), "left") | changes
    write_votes(exported / "ann.csv", {p: v for p, v in votes.items() if v is not None})
    with pytest.raises(DataError, match=expected):
        score_votes(exported)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"id,left,right\n1,x,y\n", "row 1 must be id,left,right,vote"),
        (b"", "row 1 must be id,left,right,vote"),
        (b"id,left,right,vote\n1,\xff,y,left\n", "not UTF-8"),
    ],
)
def test_a_damaged_file_of_votes_is_named(exported, content, expected):
    (exported / "ann.csv").write_bytes(content)
    with pytest.raises(DataError, match=f"ann.csv: {expected}"):
        score_votes(exported)


def test_without_votes_for_a_side_there_is_no_rate(exported):
    with pytest.raises(DataError, match="no votes yet"):
        score_votes(exported)
    write_votes(exported / "ann.csv", dict.fromkeys(sides_of_a(exported), "tie"))
    with pytest.raises(DataError, match="all 9 votes are ties"):
        score_votes(exported)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"side_of_a": {"1": "up"}, "a": "", "b": ""}', "{}"]
)
def test_a_damaged_key_is_refused(exported, content):
    (exported / "key.json").write_text(content)
    with pytest.raises(DataError, match=r"key\.json: not a key"):
        score_votes(exported)


def test_a_directory_without_a_key_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"key\.json: cannot be read"):
        score_votes(tmp_path)


@pytest.mark.parametrize(("wins", "losses"), [(1, 0), (7, 7), (30, 12), (12, 30), (520, 400)])
def test_test_and_interval_equal_scipy(wins, losses):
    z, p_value = z_test(wins, losses)
    # The square of a Z-test of one proportion is Pearson's chi-square of its two counts.
    chi_square, two_sided = stats.chisquare([wins, losses])
    assert z**2 == pytest.approx(chi_square)
    assert p_value == pytest.approx(two_sided / 2 if wins >= losses else 1 - two_sided / 2)
    interval = stats.binomtest(wins, wins + losses).proportion_ci(0.95, method="wilson")
    assert wilson_interval(wins, losses) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_a_small_p_value_does_not_round_to_zero():
    z, p_value = z_test(400, 10)
    assert p_value == pytest.approx(stats.norm.sf(z), rel=1e-6)
    assert 0 < p_value < 1e-70


def test_the_commands_export_and_score(capsys, sets, tmp_path):
    directory = tmp_path / "votes"
    status, stdout, _ = call(capsys, "win-rate", "export", *sets, "--output", directory)
    assert status == 0
    assert stdout.startswith(f"9 pairs in {directory / 'pairs.csv'}")
    status, _, stderr = call(capsys, "win-rate", "score", directory)
    assert (status, stderr) == (1, f"error: {directory}: no votes yet; fill the column vote\n")
    write_votes(directory / "ann.csv", sides_of_a(directory))
    status, stdout, _ = call(capsys, "win-rate", "score", directory)
    assert status == 0
    assert "9 wins, 0 losses, 0 ties; win rate without ties 1.000" in stdout
    assert "one-sided Z = 3.00, p = 0.0013" in stdout
