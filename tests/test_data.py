"""The data of lora_scratch.py: every kind of file, every mistake in one, the batches, and no network at all."""

import contextlib
import csv
import gzip
import http.client
import io
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import torch
from conftest import without_notes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lora_scratch
from lora_scratch import (
    InputError,
    Table,
    Tokens,
    collate,
    load_tables,
    make_batches,
    make_parser,
    read_file,
    run,
    tokenize,
)

TSV, CSV = "sentence\tlabel\n", "sentence,label\n"


def load(data: Path | str, *flags: str) -> tuple[Table, Table, list[str]]:
    return load_tables(make_parser("", "a.pt").parse_args(["--dataset", str(data), *flags]))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(path: Path, *flags: str) -> set[str]:
    """All sentences of a file, the held-out tenth among them."""
    train_set, eval_set, _ = load(path, *flags)
    return {*train_set.text, *eval_set.text}


def refused(message: str, path: Path, *flags: str) -> None:
    """The data is refused in one line that names the file and says `message`."""
    with pytest.raises(InputError, match=message) as error:
        load(path, *flags)
    assert str(path) in str(error.value) and outcome(path, *flags) == "refused"


def outcome(path: Path, *flags: str) -> str:
    """As a user sees it, notes aside: read, or refused with one line on standard error and exit code 2."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(sys.stdout):  # `run` replaces it
            run(lambda: load(path, *flags) and None)
    except SystemExit as stop:
        lines = said.getvalue().splitlines()
        errors = [line for line in lines if not line.startswith("note: ")]
        if not stop.code:
            assert not errors
            return "read"
        assert stop.code == 2 and errors == lines[-1:] and errors[0].startswith("error: ")
        return "refused"


# --- Every kind of file


def test_a_quote_character_in_tsv_is_text(tmp_path: Path) -> None:
    odd = ['"quoted"', 'he said "no', '"', '"unclosed', "it's", 'a ""double"" b', 'ends with "', "back\\slash"]
    path = write(tmp_path / "a.tsv", TSV + "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(odd)))
    assert texts(path) == set(odd)


def test_quoting_works_in_csv(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", CSV + '"one, two",1\n"say ""no""",0\n"two\nlines",1\nit\'s,0\n')
    assert texts(path) == {"one, two", 'say "no"', "two\nlines", "it's"}


@pytest.mark.parametrize(("name", "separator"), [("a.tsv", "\t"), ("a.csv", ",")])
def test_null_and_007_stay_text(name: str, separator: str, tmp_path: Path) -> None:
    words = ["null", "NA", "None", "nan", "N/A", "NULL", "true", "False"]
    rows = [f"{word}{separator}{i % 2}\n" for i, word in enumerate(words)]
    assert texts(write(tmp_path / "words" / name, f"sentence{separator}label\n" + "".join(rows))) == set(words)
    numbers = ["007", "1.0", "1e3", "-5", "1_000", "0x10", "12345678901234567890123", "inf"]
    rows = [f"{number}{separator}{i % 2}\n" for i, number in enumerate(numbers)]
    assert texts(write(tmp_path / "numbers" / name, f"sentence{separator}label\n" + "".join(rows))) == set(numbers)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_byte_order_mark_and_either_line_end_are_not_text(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = write(tmp_path / "a.tsv", "\ufeff" + (TSV + "a film\t1\nüber ☂ 好\t0\n").replace("\n", ending))
    assert texts(path) == {"a film", "über ☂ 好"} and load(path)[2] == ["0", "1"]
    assert without_notes(capsys.readouterr().err) == ""


@pytest.mark.parametrize(
    ("name", "content", "noted"),
    [
        ("a.csv", 'sentence;label\n"a; b, c";1\nd;0\n', "separated by semicolons"),
        ("a.csv", 'sentence\tlabel\n"a; b, c"\t1\nd\t0\n', "separated by tabs"),
        ("a.csv", 'sentence, label\n"a; b, c", 1\nd, 0\n', "spaces around"),
        ("a.tsv", 'sentence\tlabel\n"a; ""b"", c"\t1\n"d"\t0\n', "fields in quotes, which are text"),
    ],
)
def test_unusual_tables_are_read_with_a_note(
    name: str, content: str, noted: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = texts(write(tmp_path / name, content))
    assert found == ({"a; b, c", "d"} if name == "a.csv" else {'"a; ""b"", c"', '"d"'})
    assert noted in capsys.readouterr().err


@pytest.mark.parametrize(("name", "start"), [("a.tsv", TSV), ("a.csv", CSV)])
def test_text_of_windows_and_utf_16_are_read_and_the_first_is_noted(
    name: str, start: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    odd, separator = "caf\u00e9 \u201cbon\u201d", start[len("sentence")]
    text = start + f"a film{separator}1\n" * 200_000 + f"{odd}{separator}0\n"
    path = write(tmp_path / name, text.encode("cp1252"))
    assert texts(path) == {"a film", odd}
    assert f"{name}: line 200002 is not UTF-8; read as Windows-1252" in capsys.readouterr().err
    for encoding in ("utf-16", "utf-8", "utf-8-sig"):
        assert texts(write(path, text.encode(encoding))) == {"a film", odd}
    assert without_notes(capsys.readouterr().err) == ""


TABLE = {"sentence": [f"film {i}" for i in range(20)], "label": [0, 1] * 10}


def as_file(kind: str, path: Path) -> Path:
    """TABLE in one of the formats."""
    table, path = datasets.Dataset.from_dict(TABLE), path / f"a.{kind}"
    if kind in ("tsv", "csv"):
        table.to_csv(path, sep="\t" if kind == "tsv" else ",")
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind in ("jsonl", "json"):
        table.to_json(path)
    elif kind == "disk":
        table.save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "json", "parquet", "disk"])
def test_every_format_reads_alike(kind: str, tmp_path: Path) -> None:
    train_set, eval_set, names = load(as_file(kind, tmp_path))
    pairs = zip(train_set.text + eval_set.text, train_set.label + eval_set.label, strict=True)
    assert sorted(pairs) == sorted(zip(TABLE["sentence"], TABLE["label"], strict=True))
    assert names == ["0", "1"]


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
@pytest.mark.parametrize("second", ["dev", "validation"])
def test_a_folder_has_a_training_and_a_validation_file(second: str, kind: str, tmp_path: Path) -> None:
    file, folder = as_file(kind, tmp_path), tmp_path / "data"
    folder.mkdir()
    shutil.copy(file, folder / f"train.{kind}")
    shutil.copy(file, folder / f"{second}.{kind}")
    write(folder / "README.md", "not data")
    write(folder / f"test.{kind}", "not read")
    train_set, eval_set, _ = load(folder)
    assert train_set.text == eval_set.text == TABLE["sentence"]


def test_the_hubs_numbered_parts_in_a_folder_data_are_one_table(tmp_path: Path) -> None:
    for i in range(2):
        part = datasets.Dataset.from_dict({name: column[10 * i : 10 * i + 10] for name, column in TABLE.items()})
        part.to_parquet(tmp_path / "data" / f"train-{i:05d}-of-00002.parquet")
    part.to_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet")
    train_set, eval_set, _ = load(tmp_path)
    assert train_set.text == TABLE["sentence"] and eval_set.text == TABLE["sentence"][10:]


@pytest.mark.parametrize("second", ["dev", "validation"])
def test_a_saved_dataset_dict_keeps_its_splits(second: str, tmp_path: Path) -> None:
    train, other = datasets.Dataset.from_dict(TABLE), datasets.Dataset.from_dict({"sentence": ["x"], "label": [1]})
    datasets.DatasetDict({"train": train, second: other}).save_to_disk(tmp_path / "data")
    train_set, eval_set, _ = load(tmp_path / "data")
    assert train_set.text == TABLE["sentence"] and eval_set.text == ["x"] and eval_set.label == [1]


def test_a_tenth_of_a_single_file_is_held_out_by_seed_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = write(tmp_path / "a.tsv", TSV + "".join(f"film {i}\t{i % 2}\n" for i in range(95)))
    train_set, eval_set, _ = load(path)
    assert len(eval_set.text) == len(eval_set.label) == 10 and len(train_set.text) == 85
    assert eval_set.label.count(0) == eval_set.label.count(1) == 5
    assert not set(train_set.text) & set(eval_set.text) and len({*train_set.text, *eval_set.text}) == 95
    for sentences in (train_set, eval_set):
        assert all(int(text.split()[1]) % 2 == label for text, label in zip(sentences.text, sentences.label))  # noqa: B905
    said = capsys.readouterr().out
    assert str(path) in said and "a tenth of each label, 10 rows, is held out by seed" in said
    assert load(path) == (train_set, eval_set, ["0", "1"])
    assert set(load(path, "--seed", "43")[1].text) != set(eval_set.text)


def test_each_label_is_held_out_but_for_its_only_row(tmp_path: Path) -> None:
    labels = ["a"] * 30 + ["b"] * 2 + ["c"]  # sorted, as many files are
    path = write(tmp_path / "a.tsv", TSV + "".join(f"film {i}\t{label}\n" for i, label in enumerate(labels)))
    train_set, eval_set, _ = load(path)
    assert [eval_set.label.count(i) for i in range(3)] == [3, 1, 0]  # the only c is there to learn from
    assert [train_set.label.count(i) for i in range(3)] == [27, 1, 1]
    few = [load(path, "--train-samples", "9", "--seed", str(seed))[0].text for seed in range(5)]
    assert len(set(map(tuple, few))) == 5 and all(len(text) == 9 for text in few)  # at random, not the first rows


def test_a_changed_file_is_read_anew_even_if_its_time_did_not_change(tmp_path: Path) -> None:
    for word in ("old", "new"):  # cp -p, tar and git archive set times, so equal ones are nothing rare
        path = write(tmp_path / "a.tsv", TSV + f"{word} a\t1\n{word} b\t0\n")
        os.utime(path, (1e9, 1e9))
        assert texts(path) == {f"{word} a", f"{word} b"}


def test_other_columns_may_hold_anything(tmp_path: Path) -> None:
    rows = "a,1,3\n" * 6000 + "b,0,3\n" * 6000 + "b,0,\nb,0,none\n"  # pandas reads 10,000 rows at a time
    assert texts(write(tmp_path / "a.csv", "sentence,label,score\n" + rows)) == {"a", "b"}


def test_the_extension_may_be_in_capitals(tmp_path: Path) -> None:
    for name in ("A.TSV", "train.TSV"):
        write(tmp_path / name, TSV + "a\t1\nb\t0\n")
    (tmp_path / "A.TSV").rename(tmp_path.with_suffix(".TSV"))
    assert texts(tmp_path.with_suffix(".TSV")) == {"a", "b"}
    assert texts(tmp_path) == {"a", "b"}


def test_a_sentence_of_a_megabyte_is_cut_and_nothing_else(tiny_base: Path, tmp_path: Path) -> None:
    long = "film" + " " * 1_000_000 + "a cold film " * 1_000
    folder = labelled(tmp_path / "data", [0, 1])
    write(folder / "train.tsv", TSV + f"{long}\t1\na cold film\t0\n")
    train_set, _, _ = load(folder)
    assert train_set.text == [long, "a cold film"]
    tokenizer = lora_scratch.load_base(str(tiny_base), None, ["a", "b"], 128).tokenizer
    tokens = tokenize(train_set, tokenizer, 16)
    assert tokens.lengths.tolist() == [16, 5] and tokens.labels.tolist() == [1, 0]
    assert [tokens[i].tolist() for i in range(2)] == tokenizer(train_set.text, truncation=True, max_length=16)[
        "input_ids"
    ]


# --- Labels


def labelled(path: Path, labels: list, separator: str = "\t") -> Path:
    """A folder whose training and validation file have these labels, one sentence each."""
    for name in ("train", "dev"):
        rows = "".join(f"film {i}{separator}{label}\n" for i, label in enumerate(labels))
        write(path / f"{name}.tsv", TSV + rows)
    return path


@pytest.mark.parametrize(
    ("labels", "names", "indices"),
    [
        (["pos", "neg", "neutral", "neg"], ["neg", "neutral", "pos"], [2, 0, 1, 0]),  # words, in alphabetical order
        ([10, 9, 2, 10], ["2", "9", "10"], [2, 1, 0, 2]),  # whole numbers, by value
        ([-1, 1, 0, -1], ["-1", "0", "1"], [0, 2, 1, 0]),
        (["1", "x", "0", "x"], ["0", "1", "x"], [1, 2, 0, 2]),  # one word makes all of them words
        (["1.0", "10", "0.0", "1"], ["0", "1", "10"], [1, 2, 0, 1]),  # as pandas writes whole numbers at times
        ([" b", "a", "a ", "b"], ["a", "b"], [1, 0, 0, 1]),
        (["null", "NA", "null", "NA"], ["NA", "null"], [1, 0, 1, 0]),
    ],
)
def test_labels_are_whole_numbers_or_words_and_are_sorted(
    labels: list, names: list[str], indices: list[int], tmp_path: Path
) -> None:
    for sentences in load(labelled(tmp_path / "data", labels))[:2]:
        assert sentences.label == indices
    assert load(tmp_path / "data")[2] == names


def test_equal_numbers_written_differently_have_one_order_in_every_process(tmp_path: Path) -> None:
    names = load(labelled(tmp_path / "data", ["0" * i + "7" for i in range(12)]))[2]
    assert names == sorted(names) and len(names) == 12  # a set has another order in every process


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "disk"])
def test_class_labels_bring_their_own_names_and_order(kind: str, tmp_path: Path) -> None:
    features = datasets.Features(sentence=datasets.Value("string"), label=datasets.ClassLabel(names=["zulu", "alpha"]))
    table = datasets.Dataset.from_dict(TABLE, features=features)
    if kind == "jsonl":  # which has no place for them
        table.to_json(tmp_path / "a.jsonl")
        assert load(tmp_path / "a.jsonl")[2] == ["0", "1"]
        return
    if kind == "parquet":
        table.to_parquet(tmp_path / "a.parquet")
    else:
        table.save_to_disk(tmp_path / "a.disk")
    train_set, _, names = load(tmp_path / f"a.{kind}")
    assert names == ["zulu", "alpha"]
    assert all(TABLE["label"][int(t.split()[1])] == label for t, label in zip(train_set.text, train_set.label))  # noqa: B905
    assert load(tmp_path / f"a.{kind}", "--label-names", "bad", "good")[2] == ["bad", "good"]


def test_brackets_in_a_path_are_not_a_glob(tmp_path: Path) -> None:
    write(tmp_path / "data1.tsv", TSV + "other\t1\nother\t0\n")
    path = write(tmp_path / "data[1].tsv", TSV + "a\t1\nb\t0\n")
    assert texts(path) == {"a", "b"}


def test_label_names_are_for_integer_labels_and_must_differ(tmp_path: Path) -> None:
    words = labelled(tmp_path / "words", ["neg", "pos"])
    with pytest.raises(InputError, match=r"--label-names is for integer labels; .* has names: neg, pos"):
        load(words, "--label-names", "positive", "negative")
    with pytest.raises(InputError, match="same, same are not 2 names for the labels 0, 1"):
        load(labelled(tmp_path / "numbers", [0, 1]), "--label-names", "same", "same")


def test_a_single_sentence_cannot_be_split(tmp_path: Path) -> None:
    refused("one sentence is too few", write(tmp_path / "a.tsv", TSV + "a\t1\n"))


def test_a_wrong_number_of_label_names_is_refused(tmp_path: Path) -> None:
    folder = labelled(tmp_path / "data", [0, 1, 2])
    assert load(folder, "--label-names", "bad", "so so", "good")[2] == ["bad", "so so", "good"]
    with pytest.raises(InputError, match=r"--label-names: bad, good are not 3 names for the labels 0, 1, 2"):
        load(folder, "--label-names", "bad", "good")
    with pytest.raises(InputError, match=r"--label-names: .* are not 3 names"):
        load(folder, "--label-names", "bad", "good", "so so", "good")


@pytest.mark.parametrize("name", ["SST-2", "my_sst2"])
def test_the_name_of_a_path_names_no_label(name: str, tmp_path: Path) -> None:
    assert load(labelled(tmp_path / name, [0, 1]))[2] == ["0", "1"]
    assert load(tmp_path / name, "--label-names", "a", "b")[2] == ["a", "b"]


def test_a_label_that_only_the_validation_split_has_is_refused(tmp_path: Path) -> None:
    folder = labelled(tmp_path / "data", [0, 1])
    write(folder / "dev.tsv", TSV + "a\t1\nb\t7\n")
    refused(r"label '7' .* not one of the training labels 0, 1", folder)


def test_a_single_label_is_refused(tmp_path: Path) -> None:
    refused("the only label is '1'.* at least two", write(tmp_path / "a.tsv", TSV + "a\t1\nb\t1\n"))


# --- Mistakes in the data


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet", "disk"])
@pytest.mark.parametrize("flag", ["--text-column", "--label-column"])
def test_a_missing_column_is_named_with_those_that_are_there(flag: str, kind: str, tmp_path: Path) -> None:
    path = as_file(kind, tmp_path)
    refused(r"no column 'review' but sentence, label; see --text-column and --label-column", path, flag, "review")


def test_columns_may_have_other_names_and_another_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "stars,id,review\n5,1,007\n1,2,null\n")
    assert texts(path, "--text-column", "review", "--label-column", "stars") == {"007", "null"}


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    refused("cannot be read|empty", write(tmp_path / name, content))


@pytest.mark.parametrize("kind", ["tsv", "csv", "parquet", "disk"])
def test_a_header_without_rows_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    features = datasets.Features(sentence=datasets.Value("string"), label=datasets.Value("int64"))
    table = datasets.Dataset.from_dict({"sentence": [], "label": []}, features=features)
    if kind == "parquet":
        table.to_parquet(path)
    elif kind == "disk":
        table.save_to_disk(path)
    else:
        write(path, TSV if kind == "tsv" else CSV)
    refused("cannot load" if kind == "disk" else "the training split is empty", path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", TSV + "a\t1\nb\t0\tc\n", "line 3"),
        ("a.csv", CSV + "a,1\nb,0,c\n", "line 3"),
        ("a.tsv", TSV + "a\t1\tc\nb\t0\tc\n", "more fields than its header"),
        ("a.csv", CSV + "a,1,c,d\nb,0\n", "more fields than its header"),
        ("a.tsv", TSV + "a\t1\nb\nc\t0\n", r"training row 2: '' is no label"),
        ("a.csv", CSV + 'a,1\n"b,0\nc,0\n', "EOF inside string"),
        ("a.tsv", TSV + "a\t1\nb\t\n", r"training row 2: '' is no label"),
        ("a.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": "b"}\n', "training row 2: None is no label"),
        ("a.jsonl", '{"sentence": "a", "label": 1.0}\n{"sentence": "b", "label": 0.5}\n', "0.5 among them; labels"),
        ("a.jsonl", '{"sentence": "a", "label": [1]}\n{"sentence": "b", "label": [0]}\n', r"row 1: \[1\] is no label"),
        ("a.jsonl", '{"sentence": "a", "label": {"b": 1}}\n{"sentence": "b", "label": {"b": 2}}\n', "is no label"),
        (
            "a.jsonl",
            '{"sentence": 7, "label": 1}\n{"sentence": 8, "label": 0}\n',
            "row 1: 'sentence' is not text but 7",
        ),
        ("a.jsonl", '{"sentence": ["a"], "label": 1}\n{"sentence": ["b"], "label": 0}\n', "is not text but"),
        ("a.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": \n', "cannot be read"),
        ("a.jsonl", '{"sentence": "\\ud800", "label": 1}\n{"sentence": "b", "label": 0}\n', "cannot be read"),
        ("a.json", "3", "cannot be read"),
        ("a.tsv", TSV + " \t1\n\t0\n", "the training split is empty"),
        ("a.tsv", TSV.encode() + b"caf\xe9\0\t1\nb\t0\n", "line 2 is not UTF-8 text"),
        ("a.tsv", (TSV + "a\t1\nb\t0\n").encode("utf-16")[:-1], "cannot be read"),
        ("a.parquet", b"PAR1 and then nothing PAR1", "cannot be read"),
        ("a.tsv", b"PK\x03\x04" + bytes(50), "no column 'sentence' but PK"),  # the start of a zip file
        ("a.csv", gzip.compress(b"sentence,label\na,1\n", mtime=0)[:-4], "cannot be read"),
    ],
)
def test_a_mistake_in_a_file_is_reported_with_its_place(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    refused(message, write(tmp_path / name, content))


def test_a_label_of_5000_digits_is_read_or_refused(tmp_path: Path) -> None:
    assert outcome(labelled(tmp_path / "data", ["9" * 5000, "8" * 5000]))


def test_a_row_of_the_validation_split_is_named_as_such(tmp_path: Path) -> None:
    folder = labelled(tmp_path / "data", [0, 1])
    write(folder / "dev.tsv", TSV + "a\t1\nb\t\n")
    refused("validation row 2: '' is no label", folder)


def test_nul_bytes_are_text(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.tsv", TSV + "a\0b\t1\nc\t0\n")) == {"a\0b", "c"}
    assert texts(write(tmp_path / "a.csv", CSV + "a\0b,1\nc,0\n")) == {"a\0b", "c"}


def test_blank_sentences_are_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = labelled(tmp_path / "data", [0, 1])
    (folder / "train.tsv").unlink()
    rows = [("a", 1), ("", 0), (" \u3000 ", 1), (None, 0), ("b", 0)]
    rows = "".join(json.dumps({"sentence": text, "label": label}) + "\n" for text, label in rows)
    write(folder / "train.jsonl", rows + '{"label": 1}\n')
    train_set, eval_set, _ = load(folder)
    assert train_set.text == ["a", "b"] and train_set.label == [1, 0] and len(eval_set.text) == 2
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{folder}: skipped 4 blank sentences of 6 in the training split"]


@pytest.mark.parametrize("name", ["no_such_file.tsv", "no_such_folder", "note.txt", "folder", "data.csv.gz"])
def test_a_wrong_path_is_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path / "note.txt", "text")
    write(tmp_path / "folder" / "notes.tsv", TSV + "a\t1\nb\t0\n")
    message = {"no_such_file.tsv": "no such file", "folder": "no training split"}.get(name, r"folder or a file.*\.tsv")
    refused(message, tmp_path / name)


def test_a_missing_training_split_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "dev.tsv", TSV + "a\t1\nb\t0\n")
    refused("no training split", path.parent)
    datasets.DatasetDict(test=datasets.Dataset.from_dict(TABLE)).save_to_disk(tmp_path / "disk")
    refused("no training split", tmp_path / "disk")


def test_two_files_for_one_split_are_refused_instead_of_choosing(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", CSV + "z,1\ny,0\n")
    write(tmp_path / "train.tsv", TSV + "a\t1\nb\t0\n")
    refused("train", tmp_path)


@pytest.mark.parametrize("name", ["dataset_info.json", "state.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("content", [None, b"not what it should be"])
def test_a_damaged_saved_data_set_is_refused(name: str, content: bytes | None, tmp_path: Path) -> None:
    path = as_file("disk", tmp_path)
    (path / name).unlink() if content is None else (path / name).write_bytes(content)
    refused("cannot load the data set|no training split", path)


def test_a_hub_data_set_that_cannot_be_loaded_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        RuntimeError("Dataset scripts are no longer supported, but found glue.py\nmore"),  # what datasets says to many
        datasets.exceptions.DatasetNotFoundError("Dataset 'some/set' doesn't exist on the Hub"),
        ConnectionError("Couldn't reach 'some/set' on the Hub"),
    ):

        def fail(*_, error: Exception = error, **__) -> None:
            raise error

        monkeypatch.setattr(datasets, "load_dataset", fail)
        refused(r"cannot load the data set 'some/set' .*--dataset", Path("some/set"))


def test_train_samples_are_a_random_subset_by_seed(tmp_path: Path) -> None:
    path = labelled(tmp_path / "data", [0, 1] * 30)
    whole = load(path)[0]
    some, again, other = (load(path, "--train-samples", "20", *flags)[0] for flags in ([], [], ["--seed", "7"]))
    assert len(some.text) == len(set(some.text)) == 20 and set(some.text) < set(whole.text)
    assert set(some.text) != set(whole.text[:20]) and some == again and set(some.text) != set(other.text)
    assert all(int(text.split()[1]) % 2 == label for text, label in zip(some.text, some.label))  # noqa: B905
    more = load(path, "--train-samples", "1000")[0]
    assert len(more.text) == 60 and len(load(path, "--train-samples", "20")[1].text) == 60


# --- Any table at all

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
MANY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


@settings(MANY, max_examples=30)
@given(table=st.lists(st.lists(ANY_TEXT | st.sampled_from(["0", "1", '"', "\t", "\n", "\r"]), max_size=4), max_size=6))
@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_any_table_is_read_or_refused(name: str, tmp_path: Path, table: list[list[str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if name == "a.tsv" else ",", quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([["sentence", "label"], *table] if len(table) % 2 else table)
    outcome(write(tmp_path / name, text.getvalue()))


@settings(MANY, max_examples=40)
@given(content=st.binary(max_size=60), head=st.booleans())
@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.parquet"])
def test_any_bytes_are_read_or_refused(name: str, tmp_path: Path, content: bytes, head: bool) -> None:
    outcome(write(tmp_path / name, (TSV if name == "a.tsv" else CSV).encode() * head + content))


@settings(MANY, max_examples=60)
@given(rows=st.lists(st.tuples(ANY_TEXT, ANY_TEXT.filter(bool)), min_size=1, max_size=8), crlf=st.booleans())
def test_well_formed_csv_comes_back_unchanged(tmp_path: Path, rows: list[tuple[str, str]], crlf: bool) -> None:
    text = io.StringIO()
    ends = {"lineterminator": "\r\n"} if crlf else {"lineterminator": "\n", "quoting": csv.QUOTE_ALL}
    csv.writer(text, **ends).writerows([("sentence", "label"), *rows])
    table = read_file(write(tmp_path / "a.csv", text.getvalue()))
    assert list(zip(table["sentence"], table["label"], strict=True)) == rows


# --- Batches

LENGTHS = st.lists(st.integers(1, 128), max_size=300)


@settings(MANY, max_examples=60)
@given(lengths=LENGTHS, size=st.integers(1, 40), seed=st.integers(0, 1000) | st.none())
def test_batches_hold_every_index_once_and_one_is_short_at_most(
    lengths: list[int], size: int, seed: int | None
) -> None:
    batches = make_batches(torch.tensor(lengths, dtype=torch.int64), size, seed)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == math.ceil(len(lengths) / size)
    assert sum(len(batch) < size for batch in batches) <= 1 and all(batches)
    assert batches == make_batches(torch.tensor(lengths, dtype=torch.int64), size, seed)
    if seed is None:
        flat = [lengths[i] for batch in batches for i in batch]
        assert flat == sorted(lengths, reverse=True)


def test_another_epoch_has_another_order_and_other_batches() -> None:
    lengths = torch.arange(2000) % 30 + 3
    one, two = (make_batches(lengths, 16, seed) for seed in (42000, 42001))
    assert one != two and {frozenset(batch) for batch in one} != {frozenset(batch) for batch in two}
    assert {len(batch) for batch in one} == {16}
    longest = [int(lengths[batch].max()) for batch in make_batches(lengths[:800], 16, 0)]  # one window
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)  # short and long come mixed


def test_batches_pad_little() -> None:
    generator = torch.Generator().manual_seed(0)  # lengths as in SST-2: mostly short, mean 12, a few up to 60
    lengths = (3 + torch.empty(10_000).exponential_(1 / 9, generator=generator)).clamp(max=60).int()

    def share(batches: list[list[int]]) -> float:
        return sum(len(batch) * int(lengths[batch].max()) for batch in batches) / int(lengths.sum())

    assert share([list(range(i, i + 16)) for i in range(0, 9984, 16)]) > 2
    assert share(make_batches(lengths, 16, 0)) <= 1.1
    assert share(make_batches(lengths, 16)) <= 1.02


def test_collate_pads_to_the_longest_of_the_batch() -> None:
    tokens = Tokens.from_lists([[7] * 9, [2, 7, 3], [4], [2, 8, 9, 5, 3]])
    model = SimpleNamespace(config=SimpleNamespace(pad_token_id=9), device=torch.device("cpu"))
    inputs = collate(tokens, [1, 3, 2], model)
    assert inputs["input_ids"].tolist() == [[2, 7, 3, 9, 9], [2, 8, 9, 5, 3], [4, 9, 9, 9, 9]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert inputs.keys() == {"input_ids", "attention_mask"} and inputs["input_ids"].dtype == torch.int64


# --- No network

REAL_ASK = lora_scratch.use_cache_if_offline
TIMED = """
import time, lora_scratch
start = time.monotonic()
try:
    lora_scratch.run(lora_scratch.main)
finally:
    print(time.monotonic() - start)
"""


def test_without_a_network_it_ends_within_ten_seconds_in_one_line(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(lora_scratch.__file__).parent)}
    silent = socket.create_server(("127.0.0.1", 0))  # takes the connection and never answers; port 9 refuses it
    runs = {}
    for missing, flags, port in (("model", ["--dataset", tiny_data], 9), ("data", ["--model", tiny_base], silent)):
        port = port if port == 9 else silent.getsockname()[1]
        proxies = {f"{kind}_proxy": f"http://127.0.0.1:{port}" for kind in ("http", "https", "all")}
        proxies |= {name.upper(): proxy for name, proxy in proxies.items()} | {"no_proxy": "", "NO_PROXY": ""}
        command = [sys.executable, "-c", TIMED, *flags, "--output", tmp_path / missing / "a.pt"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        runs[missing] = subprocess.Popen([str(x) for x in command], env=environment | proxies, cwd=tmp_path, **pipes)
    answers = {missing: (*process.communicate(timeout=120), process.returncode) for missing, process in runs.items()}
    silent.close()
    for missing, name, remedy in (
        ("model", "base model 'distilbert/distilbert-base-uncased'", "name a local folder with --model"),
        ("data", "data set 'nyu-mll/glue'", "name a local one with --dataset"),
    ):
        output, error, code = answers[missing]
        error = without_notes(error)
        assert code == 2 and error.startswith(f"error: cannot load the {name}") and remedy in error, error
        assert "./setup.sh --demo, then python lora_scratch.py --demo" in error
        assert error.count("\n") == 1 and "Traceback" not in error
        assert float(output.splitlines()[-1]) < 10
    assert list(tmp_path.rglob("*.pt")) == []


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real question to the Hub, asked anew, with the answer undone afterwards."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    REAL_ASK.cache_clear()
    yield
    REAL_ASK.cache_clear()


@pytest.mark.parametrize(
    ("answer", "offline"),
    [
        (None, False),
        (urllib.error.HTTPError("", 503, "busy", None, None), False),
        (urllib.error.URLError("name or service not known"), True),
        (TimeoutError("timed out"), True),
        (http.client.BadStatusLine("not HTTP"), True),  # a captive portal
        (ValueError("unknown url type"), True),  # a misspelt HF_ENDPOINT
    ],
)
def test_any_answer_but_an_http_one_means_offline_and_nothing_is_printed(
    answer: Exception | None, offline: bool, ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, crashed = [], []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        asked.append(timeout)
        if answer is not None:
            raise answer
        return io.BytesIO()

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(threading, "excepthook", crashed.append)
    start = time.monotonic()
    REAL_ASK(), REAL_ASK()
    assert asked == [5] and time.monotonic() - start < 2  # once, and without waiting for more than the answer
    assert huggingface_hub.constants.HF_HUB_OFFLINE is offline  # of which `datasets`, imported later, takes a copy
    assert crashed == []


def test_a_name_look_up_that_hangs_is_not_waited_for(ask, monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"late" * free.wait(60)))
    real_join = threading.Thread.join
    monkeypatch.setattr(threading.Thread, "join", lambda self, seconds: real_join(self, seconds / 50))
    start = time.monotonic()
    REAL_ASK()
    assert time.monotonic() - start < 5 and huggingface_hub.constants.HF_HUB_OFFLINE is True
    free.set()


def test_a_user_who_is_offline_on_purpose_is_not_asked_for(ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # HF_HUB_OFFLINE=1
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("asked the network"))
    crashed = []
    monkeypatch.setattr(threading, "excepthook", crashed.append)
    REAL_ASK()
    assert crashed == [] and huggingface_hub.constants.HF_HUB_OFFLINE is True
