"""Tables on their way to batches: files, columns, labels, hold-out, notes, the Hub, tokens."""

import csv
import gzip
import io
import json
import math
import os
import shutil
import threading
import time
from datetime import date, datetime
from importlib.util import find_spec
from multiprocessing.pool import ApplyResult
from pathlib import Path
from types import SimpleNamespace

import lora_scratch
from lora_scratch import InputError, find_columns, load_tables, make_batches, read_file, read_rows, tokenize

import datasets
import huggingface_hub
import pandas
import pyarrow
import pytest
import torch
from conftest import as_tokens, refused, without_notes, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

TSV, CSV = "sentence\tlabel\n", "sentence,label\n"
LONG = "x" * 100_000
ESCAPES = "\x1b[31m\x07\r\n\u2028\u202e"
PLAIN = ["null", "NA", "None", "nan", "N/A", "true", "007", "1.0", "1e3", "-5", "1_000", "0x10", "inf"]
PLAIN.append("12345678901234567890123")
QUOTED = ["one, two", 'say "no"', "two\nlines"]
QUOTES = ['"quoted"', 'he said "no', '"', "it's", 'a ""double"" b', 'ends with "', "back\\slash"]


def load(data: object, *more: object) -> tuple:
    """The training and the validation rows of a data set, and what is known about them."""
    flags = [str(flag) for flag in ("--dataset", data, *more)]
    return load_tables(lora_scratch.parse_flags(lora_scratch.make_parser("", "{}.pt"), flags))


def read(path: Path) -> list[list[str]]:
    """Text and label of each row of a file."""
    table = read_file(path)
    return read_rows(str(path), table, *find_columns(str(path), table, None, None)).values.tolist()


def lines(start: str, texts: list[str]) -> str:
    """A table of these texts, labelled 0 and 1 in turn."""
    separator = start[len("sentence")]
    return start + "".join(f"{text}{separator}{i % 2}\n" for i, text in enumerate(texts))


def objects(*rows: dict) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def labelled(folder: Path, labels: list) -> Path:
    """A folder whose training and validation file have these labels, one sentence each."""
    for name in ("train.tsv", "dev.tsv"):
        write(folder / name, TSV + "".join(f"film {i}\t{label}\n" for i, label in enumerate(labels)))
    return folder


# --- Files

A_B = [["a; b, c", "1"], ["d", "0"]]
MARKED = "\ufeff" + TSV + "a film\t1\nüber ☂ 好\t0\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("quotes.tsv", lines(TSV, QUOTES), QUOTES),
        ("quotes.csv", CSV + '"one, two",0\n"say ""no""",1\n"two\nlines",0\n', QUOTED),
        ("plain.tsv", lines(TSV, PLAIN), PLAIN),
        ("plain.csv", lines(CSV, PLAIN), PLAIN),
        ("carriage_return.tsv", lines(TSV, ["one\rtwo", "three\r\r"]), ["one\rtwo", "three\r\r"]),
        ("mark.tsv", MARKED, [["a film", "1"], ["über ☂ 好", "0"]]),
        ("ends.tsv", "\ufefflabel\tsentence\r\n1\ta\r\n0\tb\r\n", [["a", "1"], ["b", "0"]]),
        ("CAPITALS.TSV", lines(TSV, ["a", "b"]), ["a", "b"]),
        ("a[1].csv", lines(CSV, ["a", "b"]), ["a", "b"]),
        ("semicolons.csv", 'sentence;label\n"a; b, c";1\nd;0\n', A_B),
        ("tabs.csv", 'sentence\tlabel\n"a; b, c"\t1\nd\t0\n', A_B),
        ("spaces.csv", 'sentence, label\n"a; b, c", 1\nd, 0 \n', A_B),
        ("spaces.tsv", " sentence \t label\n film \t 1 \n", [[" film ", "1"]]),
        ("spaces.jsonl", objects({" sentence ": " film ", " label": " 1 "}), [[" film ", "1"]]),
        ("float.jsonl", objects({"sentence": "a", "label": 1.0}), [["a", "1"]]),
        ("array.json", '[{"label": 0,\n "sentence": "a\\n"}]', [["a\n", "0"]]),
        ("blank_lines.json", '\n{"label": true, "sentence": "a"}\n\n', [["a", "True"]]),
        ("whole.json", '{"n": 1, "data": [{"label": 0, "sentence": "a"}], "tags": []}', [["a", "0"]]),
        ("one.jsonl", '{"sentence": "a", "label": ["good"], "tags": []}', [["a", "good"]]),
        (
            "constants.jsonl",
            objects(*({"sentence": a, "label": b} for a, b in ((math.nan, 0), ("a", math.nan), ("b", 1)))),
            [["b", "1"]],
        ),
        ("escaped.csv", f'{CSV}"a, b",0\n"he said \\"so\\"",1\n', [["a, b", "0"], ['he said \\so\\""', "1"]]),
        (
            "braces.jsonl",
            objects({"sentence": "} {", "label": 0}, {"sentence": "a", "label": 1}),
            ["} {", "a"],
        ),
        ("number.jsonl", objects({"sentence": 7, "label": 1}), [["7", "1"]]),
        ("excel.csv", "sep=;\r\nsentence;label\r\na, b, c, d;1\r\n", [["a, b, c, d", "1"]]),
        ("header.csv", '"sentence";label;"a, b, c"\nd;1;e\n', [["d", "1"]]),
        ("old_mac.csv", lines(CSV, ["a", "b"]).replace("\n", "\r"), ["a", "b"]),
        ("old_mac.tsv", lines(TSV, ["a", "b"]).replace("\n", "\r"), ["a", "b"]),
        ("packed.csv.gz", gzip.compress(lines(CSV, ["a", "b"]).encode()), ["a", "b"]),
        ("packed.csv", gzip.compress(lines(CSV, ["a", "b"]).encode()), ["a", "b"]),
        ("stray.csv", CSV + '"a,1\nb,0\n"c" d,1\n', [['"a', "1"], ["b", "0"], ['"c" d', "1"]]),
        ("open.csv", CSV + '"a,1\nb,0\n', [['"a', "1"], ["b", "0"]]),
        ("long.csv", CSV + f'"{LONG}, {LONG}",1\n', [[f"{LONG}, {LONG}", "1"]]),
        ("order.csv", "stars,id,review\n5,1,007\n1,2,null\n", [["007", "5"], ["null", "1"]]),
    ],
)
def test_a_file_is_read_without_guessing(name, content, expected, tmp_path: Path) -> None:
    if isinstance(expected[0], str):
        expected = [[text, str(i % 2)] for i, text in enumerate(expected)]
    assert read(write(tmp_path / name, content)) == expected


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp1252"])
@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl"])
def test_files_of_windows_are_read(name: str, encoding: str, tmp_path: Path, capsys) -> None:
    """Only what is no Unicode is a guess, so its first line is named."""
    texts = ["007"] * 1000 + ["caf\u00e9 \u201cbon\u201d"]
    rows = ({"sentence": text, "label": 0} for text in texts)
    content = objects(*rows) if name == "a.jsonl" else lines(TSV if name == "a.tsv" else CSV, texts)
    path = write(tmp_path / name, content.replace("\n", "\r\n").encode(encoding))
    assert [text for text, _ in read(path)] == texts
    found = capsys.readouterr().err
    line = f"{path}: line {1001 + (name != 'a.jsonl')} "
    assert line in found if encoding == "cp1252" else found == ""


TABLE = {"sentence": [f"film {i}" for i in range(20)], "label": [0, 1] * 10}
NAMES = ["zulu", "never", "alpha"]
CLASSES = datasets.Features(sentence=datasets.Value("string"), label=datasets.ClassLabel(names=NAMES))


def save(kind: str, folder: Path, **features) -> Path:
    """TABLE as the datasets library writes it."""
    table = datasets.Dataset.from_dict(TABLE, **features)
    path = folder / f"a.{kind}"
    writers = {"tsv": table.to_csv, "csv": table.to_csv, "jsonl": table.to_json, "json": table.to_json}
    writers |= {"parquet": table.to_parquet, "disk": table.save_to_disk}
    writers[kind](path, **{"sep": "\t"} if kind == "tsv" else {})
    return path


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "json", "parquet", "disk"])
def test_every_format_reads_alike(kind: str, tmp_path: Path) -> None:
    path = save(kind, tmp_path)
    train, held, about = load(path)
    rows = {row.Index: (row.text, row.label) for part in (train, held) for row in part.itertuples()}
    first = 2 if kind in ("csv", "tsv") else 1  # a header is row 1
    assert rows == {first + i: (f"film {i}", i % 2) for i in range(20)} and about["labels"] == ["0", "1"]
    refused(lambda: load(path, "--text-column", "review"), path, "review", "sentence, label")
    refused(lambda: load(path, "--label-column", "stars"), path, "stars", "sentence, label")


@pytest.mark.parametrize("kind", ["parquet", "disk"])
def test_classes_bring_their_names_and_their_order(kind: str, tmp_path: Path) -> None:
    path = save(kind, tmp_path, features=CLASSES)
    train, _, about = load(path)
    assert about["label_names"] == NAMES
    assert all(int(row.text.split()[1]) % 2 == row.label for row in train.itertuples())
    given = load(path, "--label-names", "bad", "so so", "good")[2]
    assert given["label_names"] == ["bad", "so so", "good"]


def test_a_pandas_index_changes_no_row(tmp_path: Path) -> None:
    """Parquet keeps the index of a table that was filtered, shuffled or indexed."""
    frame = pandas.DataFrame(TABLE)
    shuffled = frame.sample(frac=1, random_state=1)
    for changed in (frame[frame.index % 3 > 0], shuffled, frame.set_index("label")):
        changed.to_parquet(tmp_path / "a.parquet")
        table = read_rows("", read_file(tmp_path / "a.parquet"), "sentence", "label")
        expected = changed.reset_index()[["sentence", "label"]].astype(str)
        assert table.values.tolist() == expected.values.tolist()
        assert list(table.index) == list(range(1, len(changed) + 1))


def test_other_columns_may_hold_anything(tmp_path: Path) -> None:
    maps = pyarrow.map_(pyarrow.string(), pyarrow.int64())
    columns = TABLE | {
        "map": pyarrow.array([[("a", i)] for i in range(20)], maps),
        "when": pyarrow.array([datetime(1, 1, 1)] * 20, pyarrow.timestamp("us")),  # before 1677
        "day": pyarrow.array([date(9999, 1, 1)] * 20),
        "nothing": pyarrow.nulls(20),
        "list": [[0] * i for i in range(20)],
        "bytes": [b"\xff"] * 20,
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert [text for text, _ in read(tmp_path / "a.parquet")] == TABLE["sentence"]
    rows = [{"sentence": "a", "label": 0, "x": None, "y": {"z": 1}}, {"label": 1, "sentence": "b", "y": []}]
    assert read(write(tmp_path / "a.jsonl", objects(*rows))) == [["a", "0"], ["b", "1"]]


def test_numbers_of_parquet_keep_their_digits(tmp_path: Path) -> None:
    """To pandas a column with a gap is one of floats, in which 2^53 and the next number are the same."""
    for values, expected in (
        ([2**53 + 1, 2**53, None], [str(2**53 + 1), str(2**53)]),
        ([1.0, 0.0, math.nan], ["1", "0"]),
    ):
        columns = {"sentence": ["a", "b", None], "label": pyarrow.array(values)}
        parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet") == [["a", expected[0]], ["b", expected[1]]]


BLANKS = ["", " \u3000 ", None, {}, "\u200b", "\ufeff\u200d ", " \u2060\xad\u200b\t\x01"]


def test_rows_without_a_text_are_left_out_with_a_note(tmp_path: Path, capsys) -> None:
    """The same for rows without a label; the words for nothing are labels like others."""
    rows = [{"sentence": text, "label": 0} for text in BLANKS]
    rows += [{"sentence": "a\u200bb", "label": 1}, {"label": 1}]
    table = read_file(write(tmp_path / "a.jsonl", objects(*rows)))
    found = read_rows("here", table, "sentence", "label")
    assert found.values.tolist() == [["a\u200bb", "1"]] and list(found.index) == [8]
    assert capsys.readouterr().err.startswith("note: here: 8 of 9 ")
    rows = [{"sentence": "a", "label": label} for label in (*BLANKS, ["a", "b"], ["c"], "None", -1)]
    table = read_file(write(tmp_path / "a.jsonl", objects(*rows)))
    assert list(read_rows("here", table, "sentence", "label")["label"]) == ["c", "None", "-1"]
    assert capsys.readouterr().err.startswith("note: here: 8 of 11 ")


DEEP = "[" * 100_000 + "]" * 100_000
FINE_TSV, FINE_CSV = (lines(start, [f"film {i}" for i in range(40)]) for start in (TSV, CSV))
FINE_JSON = objects(*({"sentence": f"film {i}", "label": i % 2} for i in range(40)))


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        *((f"empty.{kind}", "", "") for kind in ("tsv", "csv", "jsonl", "json", "parquet")),
        *((f"newlines.{kind}", "\n\n", "") for kind in ("tsv", "csv", "jsonl", "json")),
        ("header.tsv", TSV, ""),
        ("header.parquet", pandas.DataFrame({"sentence": [], "label": []}).to_parquet(), ""),
        ("more.tsv", FINE_TSV + "b\t0\tc\n", "line 42"),
        ("more.csv", FINE_CSV + "b,0,c\n", "line 42"),
        ("all_more.tsv", TSV + FINE_TSV.replace("\n", "\tc\n").partition("\n")[2], ""),
        ("all_more.csv", CSV + FINE_CSV.replace("\n", ",c,d\n").partition("\n")[2], ""),
        ("half.jsonl", FINE_JSON + objects({"sentence": "b", "label": 0.5}), "0.5"),
        ("cut.jsonl", FINE_JSON + '{"sentence": \n', ""),
        ("array.jsonl", FINE_JSON + "[1]\n", ""),
        ("half_character.jsonl", FINE_JSON + '{"sentence": "\\ud800", "label": 1}\n', ""),
        ("deep.json", DEEP, ""),
        ("deep.jsonl", f'{FINE_JSON}{{"sentence": "a", "label": 1, "c": {DEEP}}}\n', ""),
        ("blank.tsv", TSV + " \t1\n\t0\n", ""),
        ("no_text.tsv", FINE_TSV.encode() + b"caf\xe9\0\t1\n", ""),
        ("half.tsv", FINE_TSV.encode("utf-16")[:-1], ""),
        ("a.parquet", b"PAR1 and then nothing PAR1", ""),
        ("cut.csv.gz", gzip.compress(FINE_CSV.encode())[:-20], ""),
        ("a.xlsx", b"PK\x03\x04" + bytes(50), "openpyxl" if find_spec("openpyxl") is None else ""),
        ("bytes.csv", bytes(range(1, 256)) * 9, ""),
        ("zip.tsv", b"PK\x03\x04" + bytes(50), ""),
        ("note.txt", FINE_CSV, ".csv"),
        ("no_names.csv", FINE_CSV.removeprefix(CSV), "film 0, 0"),
    ],
)
def test_a_fault_in_a_file_is_refused_with_its_place(name, content, named, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    assert len(refused(lambda: load(path), path, named)) < 1000


# --- Splits


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
@pytest.mark.parametrize("second", ["dev", "val", "Valid", "validation"])
def test_a_folder_has_a_training_and_a_validation_file(second: str, kind: str, tmp_path: Path) -> None:
    file, folder = save(kind, tmp_path), tmp_path / "data"
    write(folder / f"test.{kind}", "not read")
    for name in ("train", second):
        shutil.copy(file, folder / f"{name}.{kind}")
    train, validation, _ = load(folder)
    assert list(train["text"]) == list(validation["text"]) == TABLE["sentence"]


@pytest.mark.parametrize("place", [".", "data", "sst2"])
def test_numbered_parts_of_the_hub_are_one_table(place: str, tmp_path: Path) -> None:
    frame = pandas.DataFrame(TABLE)
    (tmp_path / place).mkdir(exist_ok=True)
    for i in (1, 0):
        part = frame[10 * i : 10 * i + 10]
        part.to_parquet(tmp_path / place / f"train-{i:05d}-of-00002.parquet")
    part.to_parquet(tmp_path / place / "validation-00000-of-00001.parquet")
    train, validation, _ = load(tmp_path, *(["--dataset-config", place] if place == "sst2" else []))
    assert list(train["text"]) == TABLE["sentence"] and list(train.index) == list(range(1, 21))
    assert list(validation["text"]) == TABLE["sentence"][:10]


def test_a_folder_of_spark_is_one_table(tmp_path: Path) -> None:
    for label in "01":
        part = pandas.DataFrame({"text": [f"film {i} of {label}" for i in range(10)]})
        (tmp_path / f"a.parquet/label={label}").mkdir(parents=True)
        part.to_parquet(tmp_path / f"a.parquet/label={label}/part-0.snappy.parquet")
    write(tmp_path / "a.parquet/_SUCCESS", "")
    train, _, _ = load(tmp_path / "a.parquet")
    assert all(int(row.text[-1]) == row.label for row in train.itertuples()) and len(train) == 18


def test_a_saved_dataset_dict_keeps_its_splits(tmp_path: Path) -> None:
    train = datasets.Dataset.from_dict(TABLE)
    other = datasets.Dataset.from_dict({"sentence": ["x"], "label": [1]})
    datasets.DatasetDict(train=train, dev=other).save_to_disk(tmp_path / "data")
    train, validation, _ = load(tmp_path / "data")
    assert list(train["text"]) == TABLE["sentence"] and validation.values.tolist() == [["x", 1]]


@pytest.mark.parametrize(
    "name", ["no_such.tsv", "no_such_folder", "a.csv.gz", "folder", "disk", "tree", "pipe.csv"]
)
def test_a_path_without_a_training_split_is_refused(name: str, tmp_path: Path) -> None:
    for file in ("dev.tsv", "notes.tsv"):
        write(tmp_path / "folder" / file, TSV + "a\t1\nb\t0\n")
    write(tmp_path / "tree" / "train" / "good" / "1.txt", "a film")
    os.mkfifo(tmp_path / "pipe.csv")
    datasets.DatasetDict(test=datasets.Dataset.from_dict(TABLE)).save_to_disk(tmp_path / "disk")
    refused(lambda: load(tmp_path / name), tmp_path / name)


TWO = [("train.csv", "train.tsv"), ("dev.csv", "val.csv"), ("train-0-of-00003.csv", "train-2-of-00003.csv")]
TWO += [("train-00000-of-00002.csv",), ("train-00000-of-00002.csv", "train-00000-of-00002.tsv")]


@pytest.mark.parametrize("names", TWO)
def test_a_split_that_is_not_one_file_or_all_its_parts_is_refused(names: tuple, tmp_path: Path) -> None:
    for name in names:
        write(tmp_path / name, lines(TSV if name.endswith("tsv") else CSV, ["z", "y"]))
    refused(lambda: load(tmp_path), tmp_path, *names)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        *((names, names) for names in (["a", "b"], ["0.5", "1.5"], ["1.0", "2.0"], [" no", "yes"])),
        ([1, 2], ["1", "2"]),
        (["\x1b[31m", "\u202eb"], ["\x1b[31m", "\u202eb"]),
        *((names, None) for names in (5, None, ["", " "], ["a", "a"], ["\ud800", "b"], ["a"])),
    ],
)
def test_class_names_of_any_kind_are_taken_or_refused(names, expected, tmp_path: Path) -> None:
    """-1, a number without a class, is no label."""
    table = pyarrow.table({"text": TABLE["sentence"] + ["x"], "label": TABLE["label"] + [-1]})
    about = {"info": {"features": {"text": [{"dtype": "string"}], "label": {"names": names}}}}
    path = tmp_path / "a.parquet"
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), path)
    if expected:
        train, held, about = load(path)
        assert about["label_names"] == expected and len(train) + len(held) == 20
    else:
        refused(lambda: load(path), path)


@pytest.mark.parametrize("name", ["dataset_info.json", "state.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("content", [None, b"not what it should be"])
def test_a_damaged_saved_data_set_is_refused(name: str, content: bytes | None, tmp_path: Path) -> None:
    path = save("disk", tmp_path)
    (path / name).unlink() if content is None else (path / name).write_bytes(content)
    refused(lambda: load(path), path)


# --- Hold-out and samples


def test_a_tenth_of_each_label_is_held_out_by_seed(tmp_path: Path, capsys) -> None:
    """Rounded up; of a label with one text none, so that there is one to learn from."""
    labels = ["a"] * 95 + ["b"] * 2 + ["c"]  # sorted, as many files are
    rows = "".join(f"film {i}\t{label}\n" for i, label in enumerate(labels))
    path = write(tmp_path / "a.tsv", TSV + rows)
    train, held, _ = load(path)
    assert str(path) in (said := capsys.readouterr().out) and " 10 rows" in said
    assert [list(held["label"]).count(i) for i in range(3)] in ([10, 0, 0], [9, 1, 0])
    assert sorted([*train.index, *held.index]) == list(range(2, 100))
    for row in (*train.itertuples(), *held.itertuples()):
        assert row.text == f"film {row.Index - 2}" and labels[row.Index - 2] == "abc"[row.label]
    again, other = load(path), load(path, "--seed", 43)
    assert train.equals(again[0]) and held.equals(again[1])
    assert set(other[1].index) != set(held.index)


@pytest.mark.parametrize("seed", range(5))
def test_no_held_out_text_is_trained_on_and_every_label_is(seed: int, tmp_path: Path) -> None:
    """A text with several labels is trained on, so that none of them can be lost."""
    rows = "".join(f"film {i % 24},{i % 3}\n" for i in range(240))  # one label each, ten times
    rows += "film 3,rare\nfilm 4,rare\nonly,rarer\nfilm 5,rarer\nfilm 6,shared\nfilm 6,0\n"
    train, held, about = load(write(tmp_path / "a.csv", CSV + rows), "--seed", seed)
    assert not {*train["text"]} & {*held["text"]} and {*train["label"]} == set(range(len(about["labels"])))
    assert len(train) + len(held) == 246 and held["text"].nunique() == 3
    shared = CSV + "".join(f"film {i % 24},{i % 5}\n" for i in range(240))  # five labels each
    refused(lambda: load(write(tmp_path / "b.csv", shared)), "b.csv")


def test_training_samples_are_drawn_by_seed(tmp_path: Path) -> None:
    path = labelled(tmp_path / "data", [0, 1] * 30)
    runs = [load(path, "--train-samples", 20, "--seed", seed) for seed in (42, 42, 7)]
    one, again, other = (train for train, _, _ in runs)
    assert one.equals(again) and set(one.index) != set(other.index)
    assert len(set(one.index)) == 20 and set(one.index) != set(range(1, 21))
    assert all(int(row.text.split()[1]) % 2 == row.label for row in one.itertuples())
    assert all(len(validation) == 60 for _, validation, _ in runs)
    assert len(load(path, "--train-samples", 1000)[0]) == 60
    train, held, _ = load(path / "train.tsv", "--train-samples", 27)
    assert len(train) == 24 and not {*train.index} & {*held.index} and len(held) == 3


# --- Labels


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["pos", "neg", "neutral"], ["neg", "neutral", "pos"], [2, 0, 1]),  # words, by alphabet
        ([10, 9, 2], ["2", "9", "10"], [2, 1, 0]),  # whole numbers, by value
        ([-1, 1, 0], ["-1", "0", "1"], [0, 2, 1]),
        (["1", "x", "0"], ["0", "1", "x"], [1, 2, 0]),  # one word makes all of them words
        (["1.0", "10", "0.0", "1"], ["0", "1", "10"], [1, 2, 0, 1]),  # so pandas writes some numbers
        ([" b", "a", "a ", "b"], ["a", "b"], [1, 0, 0, 1]),
        (["caf\u00e9", "bar", "cafe\u0301"], ["bar", "caf\u00e9"], [1, 0, 1]),  # as a Mac writes it
        (["07", "7", "007"], ["007", "07", "7"], [1, 2, 0]),  # equal ones in the order of every process
        (["9" * 20, "8" * 20], ["8" * 20, "9" * 20], [1, 0]),
        ([LONG, "y"], [LONG, "y"], [0, 1]),
        ([2, 0, 1], ["bad", "so so", "good"], [2, 0, 1]),  # named by --label-names
    ],
)
def test_labels_are_whole_numbers_or_words(labels, names, numbers, tmp_path: Path) -> None:
    given = ["--label-names", *names] if "good" in names else []
    train, validation, about = load(labelled(tmp_path / "SST-2", labels), *given)
    assert list(train["label"]) == list(validation["label"]) == numbers
    own = ["0", "1", "2"] if given else names
    assert about == {"labels": own, "label_names": names, "text_column": "sentence", "label_column": "label"}


@pytest.mark.parametrize(
    ("labels", "given", "named"),
    [
        (["1"], None, "'1'"),
        ([0, 0.5, 1], None, "0.5"),
        (["neg", "pos"], ["a", "b"], "neg, pos"),
        ([0, 1], ["same", "same"], "same, same"),
        ([0, 1, 2], ["a", "b"], "a, b"),
        ([0, 1, 2], ["a", "b", "c", "a"], "a, b, c, a"),
        ([*range(5000)] * 2, ["a", "b"], "(5,000 in all)"),
        ([f"label{i}" for i in range(5000)] * 2, ["a", "b"], "(5,000 in all)"),
        ([f"id{i}" for i in range(50)], None, "50"),
        ([ESCAPES.replace("\n", ""), "x"], ["a", "b"], "--label-names"),
    ],
)
def test_wrong_labels_or_names_are_refused(labels, given, named: str, tmp_path: Path) -> None:
    path = labelled(tmp_path / "data", labels)
    more = ["--label-names", *given] if given else []
    assert len(refused(lambda: load(path, *more), named, "--label-names")) < 2000


@pytest.mark.parametrize(("label", "named"), [("7", "7"), (LONG, "xxx"), ("\x1b[31m", "31m")])
def test_a_label_of_the_validation_split_alone_is_refused(label: str, named: str, tmp_path: Path) -> None:
    path = labelled(tmp_path / "data", [0, 1])
    write(path / "dev.tsv", f"{TSV}a\t1\nb\t{label}\n")
    assert len(refused(lambda: load(path), path, *named.split(", "))) < 1000


# --- Columns


@pytest.mark.parametrize(
    ("header", "row", "expected"),
    [
        ("review,stars", "a film about {i} and more,{l}", ("review", "stars")),
        ("Category,Message", "{l},a film about {i} and more", ("Message", "Category")),
        ("v1,v2,,", "{l},a film about {i} and more,,", ("v2", "v1")),
        ("intent,utterance", "much longer than the text {l},{i}", ("utterance", "intent")),
        ("0,1", "film {i},{l}", ("0", "1")),
        (f"{'Why? ' * 20},Which?", "a film about {i} and more,{l}", ("Why? " * 20, "Which?")),
        ("sentence,v", "film {l},{l}", ("sentence", "v")),
        ("sentence,label,title", "film {i},{l},a film about {i} and more", ("sentence", "label")),
        ("label, ,,x", "{l},,,a film about {i} and more", ("x", "label")),
        ("question,sentence,label", "who is {i}?,film {i},{l}", ("sentence", "label")),
    ],
)
def test_columns_are_found_and_named(header, row, expected, tmp_path: Path, capsys) -> None:
    rows = "".join(row.format(i=i, l=i % 2) + "\n" for i in range(40))
    path = write(tmp_path / "a.csv", f"{header}\n{rows}")
    table = read_file(path)
    expected = tuple(name.strip() for name in expected)
    assert find_columns(str(path), table, None, None) == expected
    said = capsys.readouterr().err
    is_noted = expected != ("sentence", "label") or len(table.columns) > 2
    assert all((repr(name) in said) == is_noted for name in expected)
    assert all(name in said for name in table if name.isalpha() and name not in expected)  # unread
    assert find_columns(str(path), table, *expected) == expected and capsys.readouterr().err == ""
    assert [label[-1] for label in read_rows("", table, *expected)["label"]] == ["0", "1"] * 20
    assert table.attrs.get("header", [*table.columns]) == header.split(",")


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ("title,body,label", ["title, body", "--text-column"]),
        ("v1,v2,v3", ["v1, v2, v3", "--text-column"]),
        ("question,passage,label", ["question, passage", "--text-column"]),
        ("sentence,title,i", ["title, i", "--label-column"]),
        (f"{LONG},{LONG}2,label", ["--text-column"]),
        (f'"{ESCAPES}","{ESCAPES}",label', ["--text-column"]),
    ],
)
def test_columns_that_are_not_clear_are_listed(header: str, named: list, tmp_path: Path) -> None:
    row = "a film about {i} and more,so {i} it is and ever was,{i}\n"
    path = write(tmp_path / "a.csv", header + "\n" + "".join(row.format(i=i) for i in range(40)))
    assert len(refused(lambda: load(path), path, *named)) < 1000
    refused(lambda: load(path, "--text-column", ESCAPES, "--label-column", LONG), path)


def test_a_first_row_of_data_is_no_header(tmp_path: Path) -> None:
    """Unless a column is named: headers may be anything then."""
    rows = "".join(f"a film {i}, {'no' if i % 2 else 'yes'}\n" for i in range(40))
    table = read_file(write(tmp_path / "a.csv", rows))
    refused(lambda: find_columns("here", table, None, None), "here", "a film 0, yes")
    refused(lambda: lora_scratch.choose_column("here", table, "text"), "here")
    assert find_columns("here", table, "a film 0", None) == ("a film 0", "yes")


# --- Notes


@pytest.mark.parametrize(
    ("rows", "validation", "expected"),
    [
        ([], None, []),
        (["film 3,1", "film 4,0"], None, [["(2)", ": 42, 43"]]),
        (["film 4,1"], None, [["(1)", ": 42"], ["(2)", ": 6, 42"]]),
        ([], ["film 7,1", "another,0"], [["(1)", ": 2"]]),
        ([f"odd {i},{2 + i % 2}" for i in range(19)], None, [["(1)", ": 3"]]),
        ([f"new {i},{'Yy'[i % 2]}es" for i in range(30)], None, [["(2)", "Yes", "yes"]]),
        ([f"new {i},a{' ' * (i % 2)}b" for i in range(30)], None, [["(2)", "ab", "a b"]]),
        ([f"new {i},{'NN'[i % 2 :]}one" for i in range(30)], None, [["(1)", "None"]]),
    ],
)
def test_surprises_in_the_data_are_noted(rows, validation, expected, tmp_path: Path, capsys) -> None:
    """Repeats, conflicting labels, validation texts that are trained on, rare labels, capital letters."""
    rows = [f"film {i},{i % 2}" for i in range(40)] + rows
    path = write(tmp_path / "train.csv", CSV + "\n".join(rows))
    if validation:
        write(tmp_path / "dev.csv", CSV + "\n".join(validation))
        path = tmp_path
    load(path)
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == len(expected)
    for line, named in zip(notes, expected, strict=True):
        assert line.startswith(f"note: {path}: ") and all(part in line for part in named)


# --- The Hub


def test_a_data_set_of_the_hub_brings_splits_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    part = datasets.Dataset.from_dict(TABLE, features=CLASSES)
    hidden = datasets.Dataset.from_dict(TABLE | {"label": [-1] * 20}, features=CLASSES)
    asked = []

    def load_dataset(*names, revision: str | None) -> datasets.DatasetDict:
        asked.append((*names, revision))
        return datasets.DatasetDict(train=part, validation=part, test=hidden)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in (lora_scratch.GLUE[0], "some/set"):
        train, validation, about = load(name)
        assert list(train["label"]) == list(validation["label"]) == TABLE["label"]
        assert about["label_names"] == NAMES
    assert asked == [lora_scratch.GLUE, ("some/set", None, None)]


REAL_ASK = lora_scratch.use_cache_if_offline


@pytest.mark.parametrize("answer", ["200", "503", "hangs"])
def test_without_an_answer_of_the_hub_its_cache_is_used(answer: str, monkeypatch) -> None:
    """A look-up of a name can hang, whatever the time limit; tests/test_hub.py has the rest."""
    free, get = threading.Event(), ApplyResult.get

    def head(*_, timeout: float) -> SimpleNamespace:
        assert timeout == 5
        if answer == "hangs":
            free.wait(10)
        return SimpleNamespace(status_code=int(answer))

    client, factories = SimpleNamespace(head=head), []
    monkeypatch.setattr(ApplyResult, "get", lambda asked, seconds: get(asked, seconds / 50))
    monkeypatch.setattr(huggingface_hub.utils._http, "default_client_factory", lambda: client)
    monkeypatch.setattr(huggingface_hub, "set_client_factory", factories.append)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    REAL_ASK()
    start = time.monotonic()
    assert factories[0]() is client
    free.set()
    assert huggingface_hub.constants.HF_HUB_OFFLINE is (answer != "200")
    assert time.monotonic() - start < 8


# --- Any table at all

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ANY_FIELD = ANY_TEXT | st.sampled_from(["0", "1", '"', "\t", "\n", "\r"])
MANY = settings(deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
ROWS = st.lists(st.tuples(ANY_TEXT, ANY_TEXT.filter(bool)), min_size=1, max_size=8)
LENGTHS = st.lists(st.integers(1, 128), max_size=300)


def read_or_refuse(path: Path, capsys) -> None:
    """A table is loaded, or refused in one line; nothing but notes is on standard error."""
    try:
        load(path)
    except InputError as error:
        assert str(error).isprintable() and str(path) in str(error)
    assert without_notes(capsys.readouterr().err) == ""


@settings(MANY, max_examples=30)
@given(table=st.lists(st.lists(ANY_FIELD, max_size=4), max_size=6))
@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_any_table_is_read_or_refused(name: str, tmp_path: Path, capsys, table: list[list[str]]) -> None:
    text = io.StringIO()
    separator = "\t" if name == "a.tsv" else ","
    writer = csv.writer(text, delimiter=separator, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([["sentence", "label"], *table] if len(table) % 2 else table)
    read_or_refuse(write(tmp_path / name, text.getvalue()), capsys)


@settings(MANY, max_examples=40)
@given(content=st.binary(max_size=60), head=st.booleans())
@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.parquet"])
def test_any_bytes_are_read_or_refused(name, tmp_path: Path, capsys, content: bytes, head: bool) -> None:
    start = (TSV if name == "a.tsv" else CSV).encode() * head
    read_or_refuse(write(tmp_path / name, start + content), capsys)


@settings(MANY, max_examples=60)
@given(rows=ROWS, end=st.sampled_from(["\n", "\r\n"]))
def test_well_formed_csv_comes_back_unchanged(tmp_path: Path, rows: list, end: str) -> None:
    text, rows = io.StringIO(), [tuple(field.replace("\0", "") for field in row) for row in rows]
    quoting = csv.QUOTE_ALL if end == "\n" else csv.QUOTE_MINIMAL
    csv.writer(text, lineterminator=end, quoting=quoting).writerows([("sentence", "label"), *rows])
    table = read_file(write(tmp_path / "a.csv", text.getvalue()))
    assert list(zip(table["sentence"], table["label"], strict=True)) == rows


# --- Tokens and batches


def test_long_texts_are_cut_and_counted(tiny_base: Path, capsys) -> None:
    long = "film" + " " * 1_000_000 + "a cold film " * 1_000
    texts = [long, *["a cold film"] * 10_000, long, "a"]
    tokenizer = lora_scratch.load_base(str(tiny_base), None, ["a", "b"], 128).tokenizer
    tokens = tokenize(texts, tokenizer, 16, [1] * 10_002 + [0])
    assert tokens.lengths == [16] + [5] * 10_000 + [16, 3]
    assert tokens.labels.tolist() == [1] * 10_002 + [0]
    assert tokens.ids[-2].tolist() == tokenizer(long, truncation=True, max_length=16)["input_ids"]
    assert capsys.readouterr().err.startswith("note: 2 of 10,003 texts")
    assert tokenize(["a"], tokenizer, 16).labels.tolist() == [0]


@settings(MANY, max_examples=60)
@given(lengths=LENGTHS, size=st.integers(1, 40), seed=st.integers(0, 1000) | st.none())
def test_batches_hold_every_sentence_once(lengths: list[int], size: int, seed: int | None) -> None:
    batches = make_batches(lengths, size, seed)
    flat = [i for batch in batches for i in batch]
    assert sorted(flat) == list(range(len(lengths))) and all(batches)
    assert len(batches) == math.ceil(len(lengths) / size)
    assert sum(len(batch) < size for batch in batches) <= 1
    assert batches == make_batches(lengths, size, seed)
    if seed is None:
        assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)


@pytest.mark.parametrize("rows", [96, 799, 800, 801, 2000])
def test_another_epoch_has_other_batches_in_a_random_order(rows) -> None:
    lengths = [*range(3, rows + 3)]
    one, two = ({*map(frozenset, make_batches(lengths, 16, seed))} for seed in (42000, 42001))
    assert len(one & two) <= len(one) / 10
    longest = [max(lengths[i] for i in batch) for batch in make_batches(lengths, 16, 0)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_batches_pad_little() -> None:
    generator = torch.Generator().manual_seed(0)  # lengths as in SST-2: mean 12, a few up to 60
    drawn = 3 + torch.empty(10_000).exponential_(1 / 9, generator=generator)
    lengths = drawn.clamp(max=60).int().tolist()

    def share(batches: list[list[int]]) -> float:
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches) / sum(lengths)

    assert share([list(range(i, i + 16)) for i in range(0, 9984, 16)]) > 2
    assert share(make_batches(lengths, 16, 0)) <= 1.1
    assert share(make_batches(lengths, 16)) <= 1.02


def test_a_batch_is_padded_to_its_longest() -> None:
    tokens = as_tokens([[7] * 9, [2, 7, 3], [4], [2, 8, 9, 5, 3]])
    model = SimpleNamespace(config=SimpleNamespace(pad_token_id=9), device=torch.device("cpu"))
    inputs = lora_scratch.collate(tokens, [1, 3, 2], model)
    assert inputs.keys() == {"input_ids", "attention_mask"} and inputs["input_ids"].dtype == torch.int64
    assert inputs["input_ids"].tolist() == [[2, 7, 3, 9, 9], [2, 8, 9, 5, 3], [4, 9, 9, 9, 9]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
