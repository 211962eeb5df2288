"""Data sets: reading real examples in every format, writing synthetic ones in every format."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer_engine import DataError, Example, RunError, SyntheticDataset
from steer_engine.dataset import parse_examples, read_texts

# What breaks naive line formats: line ends of every kind, control characters, quotes, emoji
# beyond 16 bits, combining and right-to-left characters, a byte-order mark, U+FFFD.
HARD_TEXTS = [
    "two\nlines",
    "carriage\r\nreturn and \r alone",
    "unicode\u2028line\u2029ends\x85\x0b\x0c",
    "nul \0 bell \x07 escape \x1b delete \x7f",
    "quotes \" \\ \\n ' , ; \t",
    "emoji 👩‍👩‍👧‍👦 🇩🇪 and 𒀀",
    "é e\u0301 עברית العربية 日本語",
    "\ufeffmark \ufffd \uffff",
    "{braces} <b>&amp;</b> $x$ %s",
    "x" * 200_000,
]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def example(index: int, text: str = "text", **fields) -> Example:
    values = {
        "index": index,
        "label": "a",
        "prompt": "Ask:",
        "text": text,
        "token_ids": [1, 2, 3 + index],
        "finish_reason": "stop",
        "negatives": ["real/1", "synthetic/0"],
        "attempts": 1,
    }
    return Example(**values | fields)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- real examples


def test_a_list_is_taken_as_it_is():
    assert read_texts(["b", "a", "b"]) == ["b", "a", "b"]
    assert read_texts(("b",)) == ["b"]
    assert read_texts(None) == []


def test_white_space_at_the_ends_and_empty_texts_are_dropped():
    assert read_texts([" a \n", "", "\t\n ", "b"]) == ["a", "b"]


def test_jsonl_lines_are_objects_with_a_text_or_strings(tmp_path):
    path = write(tmp_path / "r.jsonl", '{"id": 1, "text": "a"}\n\n  \n"b"\n{"text": "c\\nd"}')
    assert read_texts(path) == ["a", "b", "c\nd"]
    assert read_texts(str(path)) == ["a", "b", "c\nd"]


def test_csv_has_a_text_column_and_quoted_line_ends(tmp_path):
    path = write(tmp_path / "r.csv", 'id,text\n1,a\n2,"b, ""c""\nd"\n3,e\n')
    assert read_texts(path) == ["a", 'b, "c"\nd', "e"]


def test_txt_has_a_text_a_line(tmp_path):
    path = write(tmp_path / "r.TXT", "a\n\n b \r\nc")
    assert read_texts(path) == ["a", "b", "c"]


def test_parquet_has_a_text_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [*HARD_TEXTS, "b"], "id": list(range(len(HARD_TEXTS) + 1))})
    parquet.write_table(table, tmp_path / "r.parquet")
    assert read_texts(tmp_path / "r.parquet") == [t.strip() for t in [*HARD_TEXTS, "b"]]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
def test_a_byte_order_mark_at_the_front_is_skipped(tmp_path, suffix):
    content = {".jsonl": '{"text": "a"}\n', ".csv": "text,id\na,1\n", ".txt": "a\n"}[suffix]
    path = write(tmp_path / f"r{suffix}", b"\xef\xbb\xbf" + content.encode())
    assert read_texts(path) == ["a"]


def test_hard_texts_survive_jsonl_and_csv(tmp_path):
    expected = [t.strip() for t in HARD_TEXTS]
    for escapes in (True, False):
        lines = [json.dumps({"text": t}, ensure_ascii=escapes) + "\n" for t in HARD_TEXTS]
        assert read_texts(write(tmp_path / "r.jsonl", "".join(lines))) == expected
    with open(tmp_path / "r.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        # The csv module takes 131,072 characters a field.
        writer.writerows([["text"], *([t[:131_072]] for t in HARD_TEXTS)])
    assert read_texts(tmp_path / "r.csv") == [t[:131_072] for t in expected]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(texts, min_size=1, max_size=5))
def test_any_texts_survive_jsonl(tmp_path, contents):
    path = tmp_path / "r.jsonl"
    write(path, "".join(json.dumps(t, ensure_ascii=False) + "\n" for t in ["x", *contents]))
    assert read_texts(path) == ["x", *(t.strip() for t in contents if t.strip())]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.json", "{}", r"r\.json: must be a \.jsonl, \.csv, \.parquet, \.txt file"),
        ("r", "a", "must be a .jsonl"),
        ("r.jsonl", "", "holds no text"),
        ("r.txt", " \n\n", "holds no text"),
        ("r.csv", "text\n", "holds no text"),
        ("r.jsonl", '{"text": "a"}\n{"text": \n', r"r\.jsonl: line 2 is not JSON"),
        ("r.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("r.jsonl", '{"txt": "a"}', "needs a string field .* has fields txt; did you mean 'txt'"),
        (
            "r.jsonl",
            '{"text": null, "id": 1}',
            'line 1: field "text" must be a string, got nothing',
        ),
        ("r.jsonl", '{"text": ["a"]}', 'line 1: field "text" must be a string, got a list'),
        ("r.jsonl", "{}", "has no fields"),
        ("r.jsonl", "\n17\n", "line 2: needs a string field"),
        ("r.jsonl", "[1]", "line 1: needs a string field"),
        ("r.jsonl", '{"text": "\\ud800"}', "text 1 holds a lone surrogate"),
        ("r.csv", "txet,id\na,1\n", "line 2: needs a string field .* did you mean 'txet'"),
        ("r.csv", 'id,text\n1,"a\nb"\n2\n', 'line 4: field "text" must be a string, got nothing'),
        ("r.csv", "text\n" + "x" * 200_000, "line 2 is not CSV"),
        ("r.jsonl", b'{"text": "a\xff"}', r"not UTF-8 \(byte 11\); convert it first"),
        ("r.csv", "text\nä".encode("utf-16"), "not UTF-8"),
        ("r.txt", b"\x80", "not UTF-8"),
        ("r.parquet", "no parquet", "not a parquet file"),
        ("r.parquet", "", "not a parquet file"),
    ],
)
def test_an_unreadable_file_is_named_with_its_line(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as error:
        read_texts(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_parquet_file_without_text_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "r.parquet"
    parquet.write_table(pyarrow.table({"texts": ["a"]}), path)
    with pytest.raises(DataError, match=r"row 1: needs a string field .* did you mean 'texts'"):
        read_texts(path)
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(DataError, match='row 2: field "text" must be a string, got nothing'):
        read_texts(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a parquet file"):
        read_texts(path)


def test_a_missing_file_or_a_directory_is_named(tmp_path):
    for suffix in (".jsonl", ".csv", ".txt", ".parquet"):
        with pytest.raises(DataError, match="no such file"):
            read_texts(tmp_path / f"missing{suffix}")
    for suffix in (".jsonl", ".csv", ".txt"):
        (tmp_path / f"d{suffix}").mkdir()
        with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
            read_texts(tmp_path / f"d{suffix}")


@pytest.mark.parametrize(
    ("real", "message"),
    [
        ([], "real: holds no text"),
        (["  "], "real: holds no text"),
        (["a", 5], "real must hold strings, got a int"),
        ([None], "real must hold strings, got a NoneType"),
        (["a", "b\udc80"], "real: text 2 holds a lone surrogate"),
    ],
)
def test_a_bad_list_is_named(real, message):
    with pytest.raises(DataError, match=message):
        read_texts(real)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch, tmp_path):
    import sys

    for module in ("pyarrow", "pyarrow.parquet", "pandas", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    dataset = SyntheticDataset([example(0)])
    for use, package in [
        (lambda: dataset.to_parquet(tmp_path / "x.parquet"), "pyarrow"),
        (dataset.to_pandas, "pandas"),
        (dataset.to_hf, "datasets"),
        (lambda: read_texts(write(tmp_path / "r.parquet", "")), "pyarrow"),
    ]:
        message = f"{package} is not installed; run `pip install {package}`"
        with pytest.raises(DataError, match=message):
            use()


# --- synthetic examples


def hard_dataset() -> SyntheticDataset:
    examples = [example(i, text, label=f"ä{i}") for i, text in enumerate(HARD_TEXTS)]
    failed = example(len(examples), "x", finish_reason="rejected", attempts=4)
    return SyntheticDataset([*examples, failed])


def test_a_data_set_is_a_sequence_of_what_did_not_fail():
    dataset = SyntheticDataset(
        [
            example(0, "a"),
            example(1, "b", finish_reason="rejected"),
            example(2, "c", finish_reason="error"),
            example(3, "d", finish_reason="length"),
        ]
    )
    assert len(dataset) == 2
    assert dataset.texts == ["a", "d"]
    assert [e.index for e in dataset] == [0, 3]
    assert dataset[1].index == dataset[-1].index == 3
    assert [e.index for e in dataset[:1]] == [0]
    assert [e.index for e in dataset.failed] == [1, 2]
    assert repr(dataset) == "SyntheticDataset(2 examples)"


def test_an_example_is_one_line_and_comes_back_equal():
    for text in HARD_TEXTS:
        line = example(3, text).to_json()
        assert "\n" not in line and "\r" not in line
        assert Example(**json.loads(line)) == example(3, text)


@given(text=texts, label=texts, prompt=texts)
def test_any_example_is_one_line_and_comes_back_equal(text, label, prompt):
    written = example(0, text, label=label, prompt=prompt)
    assert written.to_json().encode().count(b"\n") == 0
    assert Example(**json.loads(written.to_json().encode())) == written


def test_to_jsonl_round_trips(tmp_path):
    dataset = hard_dataset()
    dataset.to_jsonl(tmp_path / "out.jsonl")
    examples, num_bytes = parse_examples(tmp_path / "out.jsonl")
    assert examples == list(dataset)
    assert num_bytes == (tmp_path / "out.jsonl").stat().st_size
    # It can be the real data of the next run.
    assert read_texts(tmp_path / "out.jsonl") == [t.strip() for t in HARD_TEXTS]
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_to_jsonl_replaces_a_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    path.write_text("before")
    monkeypatch.setattr("steer_engine.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError()))
    with pytest.raises(OSError):
        hard_dataset().to_jsonl(path)
    assert path.read_text() == "before"


def test_to_parquet_round_trips(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    dataset = hard_dataset()
    dataset.to_parquet(tmp_path / "out.parquet")
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [Example(**row) for row in rows] == list(dataset)
    assert read_texts(tmp_path / "out.parquet") == [t.strip() for t in HARD_TEXTS]


def test_to_pandas_round_trips():
    pytest.importorskip("pandas")
    dataset = hard_dataset()
    records = dataset.to_pandas().to_dict("records")
    assert [Example(**record) for record in records] == list(dataset)


def test_to_hf_round_trips():
    pytest.importorskip("datasets")
    dataset = hard_dataset()
    rows = dataset.to_hf()
    assert rows.column_names == list(Example.__dataclass_fields__)
    assert [Example(**row) for row in rows] == list(dataset)


def test_an_empty_data_set_can_be_written(tmp_path):
    dataset = SyntheticDataset([example(0, finish_reason="error")])
    dataset.to_jsonl(tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    pytest.importorskip("pandas")
    assert len(dataset.to_pandas()) == 0
    pytest.importorskip("pyarrow")
    dataset.to_parquet(tmp_path / "out.parquet")
    pytest.importorskip("datasets")
    assert len(dataset.to_hf()) == 0


# --- reading runs


def run_of(directory: Path, lines: list[str], tail: str = "") -> Path:
    directory.mkdir(exist_ok=True)
    write(directory / "examples.jsonl", "".join(line + "\n" for line in lines) + tail)
    return directory


def test_a_run_is_loaded_with_its_summary(tmp_path):
    run = run_of(tmp_path / "run", [example(0).to_json(), example(1).to_json()])
    assert list(SyntheticDataset.load(run)) == [example(0), example(1)]
    assert SyntheticDataset.load(run).summary == {}
    (run / "summary.json").write_text('{"num_examples": 2}')
    assert SyntheticDataset.load(str(run)).summary == {"num_examples": 2}


@pytest.mark.parametrize("cut", [1, 5, 50])
def test_a_torn_last_line_is_left_out(tmp_path, cut):
    line = example(1, "äöü👩").to_json()
    run = run_of(tmp_path / "run", [example(0).to_json()])
    with open(run / "examples.jsonl", "ab") as file:
        file.write(line.encode()[:-cut])
    assert list(SyntheticDataset.load(run)) == [example(0)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "line 2 is damaged"),
        ("\0" * 40, "line 2 is damaged"),
        (example(1).to_json()[:-4], "line 2 is damaged"),
        ("5", "line 2 is damaged"),
        ("null", "line 2 is damaged"),
        ('{"index": 1}', "line 2 is damaged"),
        (example(1).to_json().replace('"index"', '"idx"'), "line 2 is damaged"),
        (example(2).to_json(), "line 2 holds example 2; lines were lost or moved"),
        (example(0).to_json(), "line 2 holds example 0"),
    ],
)
def test_a_damaged_middle_line_is_refused(tmp_path, line, message):
    run = run_of(tmp_path / "run", [example(0).to_json(), line, example(2).to_json()])
    with pytest.raises(RunError, match=message):
        SyntheticDataset.load(run)


def test_invalid_utf8_in_a_line_is_refused(tmp_path):
    run = run_of(tmp_path / "run", [])
    line = example(0, "a").to_json().encode().replace(b'"a"', b'"\xff"')
    write(run / "examples.jsonl", line + b"\n")
    with pytest.raises(RunError, match="line 1 is damaged"):
        SyntheticDataset.load(run)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"no examples\.jsonl; give a run directory"):
        SyntheticDataset.load(tmp_path)
    with pytest.raises(RunError, match=r"no examples\.jsonl; give a run directory"):
        SyntheticDataset.load(tmp_path / "missing")


def test_a_damaged_summary_is_refused(tmp_path):
    run = run_of(tmp_path / "run", [example(0).to_json()])
    (run / "summary.json").write_text('{"num')
    with pytest.raises(RunError, match=r"summary\.json: damaged"):
        SyntheticDataset.load(run)
