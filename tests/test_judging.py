"""What a user does with a trained model and a table: judge it, compare two, get it back with answers."""

import codecs
import csv
import datetime
import decimal
import json
import math
import re
import shutil
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import lora_scratch

import datasets
import pandas
import pyarrow
import pytest
import torch
from conftest import BAD, GOOD, PEFT, SCRATCH, ask, ask_json, flags, refused, write
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

import playground

ROWS = [(text, "positive") for text in GOOD.split("|")] + [(text, "negative") for text in BAD.split("|")]
PAIRS = [(text, int(label == "positive")) for text, label in ROWS]
HERE = ["--model", SCRATCH, "--file"]


def write_csv(path: Path, rows: list[tuple], header: tuple = ("text", "label")) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def read_csv(path: Path, sep: str = ",", encoding: str = "utf-8") -> list[list[str]]:
    with open(path, encoding=encoding, newline="") as file:
        return list(csv.reader(file, delimiter=sep))


def judge(table: Path, *more: object, column: str = "label") -> list[dict]:
    return ask_json(*HERE, table, "--label-column", column, *more)


def test_judging_gives_the_counts_the_interval_and_the_surest_mistakes(here, tmp_path) -> None:
    wrong = [("a warm and funny film", "negative"), ("I hated it", "positive")]
    table = write_csv(tmp_path / "t.csv", [*ROWS, (" \n ", "positive"), *wrong], ("text", "about"))
    said = ask(*HERE, table, "--label-column", "about").splitlines()
    assert "LoRA_scratch" in said[0] and "12 sentences" in said[0]
    mistakes = [re.search(r"row (\d+), given (\w+), answered (\w+)", line).groups() for line in said[1:3]]
    assert sorted(mistakes) == [("13", "negative", "positive"), ("14", "positive", "negative")]
    assert "| a warm and funny film" in "\n".join(said[1:3])
    assert "83.33 % (10/12), 95 % between 55 and 95" in said[-1] and "macro-F1 83.3 %" in said[-2]
    (found,) = judge(table, column="about")
    assert (found["correct"], found["total"], found["unsure"]) == (10, 12, 0)
    assert found["confusion"] == [[5, 1], [1, 5]] and found["label_names"] == ["negative", "positive"]
    sure = {one["row"]: one["probabilities"][one["label"]] for one in found["surest_mistakes"]}
    assert list(sure.values()) == sorted(sure.values(), reverse=True) and sure.keys() == {13, 14}
    model = with_facts(tmp_path / "a.pt", record={"unseen": found, "epochs": [{}]})  # as of --folds
    assert playground.load(model).accuracy in said[-1]


def judged_by_hand(rows: list[list[float]], given: list[str], names: list[str], unsure=0) -> tuple:
    """The words of every line, and the JSON, of a model that gives these probabilities."""
    found = [dict(zip(names, row, strict=True)) for row in rows]
    labels = [max(row, key=row.get) if 100 * max(row.values()) >= unsure else "unsure" for row in found]
    judged = pandas.DataFrame({"text": "a", "label": labels, "given": given, "probabilities": found})
    judged["probability"] = [max(row) for row in rows]
    said, model = [], SimpleNamespace(name="m", label_names=names)
    for form in (False, True):
        said.append(playground.judgement(model, judged, SimpleNamespace(unsure=unsure, json=form)))
    return [line.split() for line in said[0].splitlines()], json.loads(said[1])


def test_thresholds_and_recall_count_every_row_of_a_label() -> None:
    rows = [[0.9, 0.1], [0.6, 0.4], [0.75, 0.25], [0.8, 0.2], [0.03, 0.97], [0.45, 0.55]]
    words, found = judged_by_hand(rows, [*"aabbbb"], ["a", "b"], 80)
    tried = {one["unsure_below"]: one for one in found["thresholds"]}
    answered = {limit: (one["answered"], one["right"]) for limit, one in tried.items()}
    assert [answered[limit] for limit in (0, 60, 80, 99)] == [(6, 4), (5, 3), (3, 2), (0, 0)]
    fates = {"a": {"found": 1, "missed": 0, "unsure": 1}, "b": {"found": 1, "missed": 1, "unsure": 2}}
    assert tried[80]["given"] == fates and found["confusion"] == [[1, 0, 1], [1, 1, 2]]
    shown = ["given", "b", "unsure", *(str(one["given"]["b"]["unsure"]) for one in tried.values())]
    assert shown in words and ["a", "50.0", "50.0", "50.0", "2", "1", "0", "1"] in words
    assert ["b", "100.0", "25.0", "40.0", "4", "1", "1", "2"] in words  # its recall is of four rows
    assert (found["correct"], found["total"], found["macro_f1"]) == (2, 3, pytest.approx(45))
    assert judged_by_hand(rows, [*"aabbbb"], ["a", "b"])[1]["thresholds"]
    assert not judged_by_hand([[0.5, 0.3, 0.2]], ["a"], [*"abc"])[1]["thresholds"]  # who asks gets them


def test_of_many_labels_the_worst_and_the_commonest_mistakes_are_shown_by_whole_names() -> None:
    names = [f"transfer_not_received_by_{i}" for i in range(30)]
    right, wrong = [(i, i) for i in range(30)] * 3, [(5, 7)] * 4 + [(20, 9)] * 2
    rows = [[float(i == best) for i in range(30)] for _, best in right + wrong]
    words, _ = judged_by_hand(rows, [names[given] for given, _ in right + wrong], names)
    place = words.index([names[5], names[7], "4"])
    assert words[place + 1] == [names[20], names[9], "2"]
    worst = [row[0] for row in words if len(row) == 5 and row[0] in names]
    assert worst[:4] == [names[i] for i in (5, 7, 9, 20)] and len(worst) == 10


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_judging_writes_every_row_its_answer_and_whether_it_agrees(suffix, here, tmp_path, capsys) -> None:
    rows = [*PAIRS, (GOOD.split("|")[0], 0), ("", 1), ("I hated it", ""), ("I loved it", 7)]
    table, output = write_csv(tmp_path / "t.csv", rows), tmp_path / f"a{suffix}"
    (found,) = judge(table, "--output", output)
    assert (found["correct"], found["total"]) == (10, 12) and output.name in capsys.readouterr().err
    written = getattr(pandas, f"read_{suffix[1:]}")(output)
    assert written["text"].fillna("").tolist() == [text for text, _ in rows]
    agrees = written["model_agrees"].astype(object)
    assert agrees.where(agrees.notna(), None).tolist() == [True] * 10 + [False, None, None, False]
    assert written["model_label"][12] == "negative" and written["model_label"].isna().sum() == 1


def test_numbers_are_the_labels_in_their_order_as_in_training(here, tiny_data, capsys) -> None:
    record = json.loads(Path(SCRATCH).with_suffix(".json").read_text(encoding="utf-8"))["result"]
    (found,) = judge(tiny_data / "dev.tsv")
    assert found["confusion"] == record["confusion"] and "negative, positive" in capsys.readouterr().err


def test_a_label_that_the_model_does_not_know_is_counted_as_wrong(here, tmp_path, capsys) -> None:
    rows = [*ROWS, ("it is a film", "mixed"), ("the film", "mixed"), ("a", "off")]
    (found,) = judge(write_csv(tmp_path / "t.csv", rows))
    assert "mixed (2), off (1)" in capsys.readouterr().err
    assert (found["correct"], found["total"]) == (10, 13)
    assert found["label_names"] == ["negative", "positive", "mixed", "off"]
    assert sum(found["confusion"][2]) == 2 and sum(found["confusion"][3]) == 1


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([("a film", "x"), ("a story", "y")], ["negative, positive", "x (1), y (1)"]),
        ([(" ", "positive")], []),
        ([("a film", "")], []),
        ([("a film", "0.5"), ("it", "1"), ("a", "0.25")], ["0.5"]),
        ([("a film", "2"), ("it", "2")], ["2 (2)"]),
    ],
)
def test_a_table_that_cannot_judge_is_refused(rows, named, here, tmp_path) -> None:
    table = write_csv(tmp_path / "t.csv", rows)
    refused(lambda: judge(table), "t.csv", *named)


def with_facts(path: Path, **facts) -> Path:
    """The small checkpoint with other facts."""
    path.parent.mkdir(exist_ok=True)
    torch.save(torch.load(SCRATCH, weights_only=True) | facts, path)
    return path


MINUS = ["-1", "1"]


@pytest.mark.parametrize(
    ("facts", "written", "right"),  # what the file calls negative and positive
    [
        ({"labels": ["1", "2"]}, ["1", "2"], 10),
        ({"labels": ["1", "2"]}, ["negative", "positive"], 10),
        ({"labels": ["1", "2"]}, ["1", "positive"], 10),
        ({"labels": ["1", "2"]}, ["1", None], 5),  # some of the labels
        ({"labels": ["1", "2"]}, ["0", "1"], 0),  # 1 is negative, 0 unknown
        ({"labels": ["1", "2"]}, ["1", "3"], 5),
        ({"labels": MINUS}, ["-1", "1"], 10),
        ({"labels": MINUS}, [None, "1"], 5),
        ({"labels": ["negative", "positive"]}, ["0", "1"], 10),  # of a ClassLabel
        ({}, ["0", None], 5),
        ({"labels": ["0", "1"], "label_names": ["1", "2"]}, ["0", "1"], 10),
        ({"labels": ["0", "1"], "label_names": ["1", "2"]}, ["1", "2"], 10),
    ],
)
def test_labels_are_of_training_or_names_or_places(facts, written, right, here, tmp_path, capsys) -> None:
    model, calls = with_facts(tmp_path / "a.pt", **facts), {"negative": written[0], "positive": written[1]}
    rows = [(text, calls[label]) for text, label in ROWS if calls[label]]
    table = write_csv(tmp_path / "t.csv", rows)
    (found,) = ask_json("--model", model, "--file", table, "--label-column", "label")
    assert found["correct"] == right and found["total"] == 10 - 5 * (None in written)
    noted = capsys.readouterr().err
    assert ("wrong" in noted) == (right < found["total"]) and "trained" not in noted


def test_the_text_is_the_column_of_the_training(here, tmp_path, capsys) -> None:
    model = with_facts(tmp_path / "a.pt", text_column="summary")
    rows = [(f"a rather long heading of ticket {i}", *row) for i, row in enumerate(ROWS)]
    question = ["--model", model, "--file", write_csv(tmp_path / "t.csv", rows, ("text", "summary", "label"))]
    assert [answer["text"] for answer in ask_json(*question)] == [text for text, _ in ROWS]
    assert ask_json(*question, "--label-column", "label")[0]["correct"] == 10
    ask(*question, "--output", tmp_path / "o.csv")
    assert all(row[2] == row[3] for row in read_csv(tmp_path / "o.csv")[1:])
    assert "summary" not in capsys.readouterr().err
    headings = [answer["text"] for answer in ask_json(*question, "--text-column", "text")]
    question[-1] = write_csv(tmp_path / "u.csv", [(row[0], row[2]) for row in rows])
    assert [answer["text"] for answer in ask_json(*question)] == headings == [row[0] for row in rows]
    assert "no 'summary'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "file", "noted"),
    [
        ("../shop", "train.csv", True),
        ("../shop", "data/Train-00000-of-00001.csv", True),
        ("../shop", "test.csv", False),
        ("../shop", "trainer.csv", False),
        ("../shop/one.csv", "one.csv", True),
        ("../shop/one.csv", "train.csv", False),
        ("../gone", "train.csv", False),
    ],
)
def test_training_data_are_known_anywhere(data, file, noted, here, tmp_path, monkeypatch, capsys) -> None:
    model = with_facts(tmp_path / "model" / "a.pt", data=data)
    table = write_csv(write(tmp_path / "shop" / file, ""), ROWS)
    monkeypatch.chdir(write(tmp_path / "far" / "away" / "file", "").parent)
    ask("--model", model, "--file", table, "--label-column", "label")
    assert ("trained on it" in capsys.readouterr().err) == noted


def test_class_names_in_the_file_are_its_labels_as_in_training(here, tmp_path) -> None:
    names = ["positive", "negative"]  # the other way round than the model's
    label = datasets.ClassLabel(names=names)
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    rows = {"text": [text for text, _ in ROWS], "label": [names.index(label) for _, label in ROWS]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "t.parquet")
    (found,) = judge(tmp_path / "t.parquet")
    assert (found["correct"], found["total"]) == (10, 10)


def test_number_labels_of_a_model_are_names_and_no_places(tiny_base, tmp_path, capsys) -> None:
    table = write_csv(tmp_path / "t.csv", [(text, 1 + label) for text, label in PAIRS])
    lora_scratch.main(flags(tiny_base, table, "--max-steps", 1, "--output", tmp_path / "a.pt"))
    question = ["--model", tmp_path / "a.pt", "--label-column", "label", "--file"]
    other = write_csv(tmp_path / "o.csv", [("a film", 0), ("it", 0)])
    refused(lambda: ask(*question, other), "1, 2", "0 (2)")
    for path in (table, shutil.copy(table, tmp_path / "copy.csv")):
        ask(*question, path)
        assert "trained on it" in capsys.readouterr().err


def test_the_page_names_uploads_and_says_why_not_judged(here, tiny_data, tmp_path, monkeypatch) -> None:
    gradio, folder = MagicMock(), MagicMock()
    folder.name = str(tmp_path)
    monkeypatch.setitem(playground.sys.modules, "gradio", gradio)
    monkeypatch.setattr(playground.tempfile, "TemporaryDirectory", lambda: folder)
    ask("--model", SCRATCH, "--web")
    answer = gradio.File().upload.call_args.args[0]
    uploads = write(tmp_path / "0/a.csv", "sentence,n\nI loved it,1\n").parent
    shutil.copy(tiny_data / "train.tsv", uploads)
    for said in ("note: train.tsv: LoRA_scratch was trained on it", "not judged: a.csv: no column"):
        shown = answer(str(uploads / said.split(": ")[1]))[2]
        assert said in shown and str(tmp_path) not in shown and "--" not in shown


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_sign_test_is_exact(one, other) -> None:
    count = one + other
    tail = sum(Fraction(math.comb(count, i), 2**count) for i in range(min(one, other) + 1))
    assert playground.sign_test(one, other) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-10)
    normal = math.erfc(399 / math.sqrt(2 * 40_400))  # of many rows
    assert playground.sign_test(20_000, 20_400) == pytest.approx(normal, rel=1e-3)


def test_two_models_are_compared_where_they_differ(here, tiny_base, tiny_data, tmp_path) -> None:
    other = tmp_path / "b.pt"  # which answers one label
    more = ["--max-steps", 1, "--lr", 0, "--label-names", "negative", "positive", "--output", other]
    lora_scratch.main(flags(tiny_base, tiny_data, *more))
    table = write_csv(tmp_path / "t.csv", ROWS)
    one, two, pair = judge(table, "--model", other)
    assert one["correct"] == 10 and two["correct"] == 5
    assert pair == {"models": [SCRATCH, str(other)], "alone_right": [5, 0], "p": pytest.approx(2 / 2**5)}
    said = ask(*HERE, table, "--label-column", "label", "--model", other).splitlines()[-1]
    assert SCRATCH in said and "0.062" in said and "better" not in said


def test_a_csv_keeps_every_column_row_and_character(here, tmp_path, capsys) -> None:
    header = ("", "label", "text", "", "label", " spaced ", "label (column 5)")
    rows = [
        ("1", "NA", 'a "warm" film, and\nfunny', "007", "null", "é", "a"),
        ("2", "", "   ", "1.50", "NaN", "", ""),
        ("3", "x", "I hated it", "1e5", "-", "\t", "b"),
    ]
    question = [*HERE, write_csv(tmp_path / "t.csv", rows, header), "--text-column", "text"]
    question += ["--precision", "fp32"]
    assert "a.csv" in ask(*question, "--output", tmp_path / "new" / "a.csv")
    assert "left out" not in capsys.readouterr().err
    found = read_csv(tmp_path / "new" / "a.csv")
    assert found[0] == [*header, "model_label", "model_probability"]
    assert [tuple(row[:-2]) for row in found[1:]] == rows
    (first,) = ask_json("--model", SCRATCH, rows[0][2])
    assert [row[-2] for row in found[1:]] == [first["label"], "", "negative"] and found[2][-1] == ""
    assert float(found[1][-1]) == pytest.approx(max(first["probabilities"].values()), abs=1e-5)


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('id,text\n1,"good\rfilm"\n2,I hated it\n', [["1", "good\rfilm"], ["2", "I hated it"]]),
        ("text\nI loved it\n\nfilm\n", [["I loved it", "positive"], ["", ""], ["film", "positive"]]),
        ("\ufefftext;n\nI loved it é;1\n", [["I loved it é", "1"]]),
    ],
)
def test_a_csv_keeps_carriage_returns_blank_lines_marks_and_separators(content, rows, here, tmp_path) -> None:
    output, mark = tmp_path / "a.csv", content.startswith("\ufeff")
    ask(*HERE, write(tmp_path / "t.csv", content), "--output", output)
    assert output.read_bytes().startswith(codecs.BOM_UTF8) == mark
    found = read_csv(output, ";" if mark else ",", "utf-8-sig")[1:]
    assert [row[:2] for row in found] == rows
    assert len(pandas.read_csv(output, sep=";" if mark else ",")) == len(rows)


def test_a_tsv_has_no_quotes_and_refuses_what_it_cannot_hold(here, tmp_path) -> None:
    table = write(tmp_path / "t.tsv", b'sentence\tn\r\n"I loved it\t1\r\nI hated it"\t2\r\n')
    ask(*HERE, table, "--output", tmp_path / "a.tsv")
    lines = (tmp_path / "a.tsv").read_text(encoding="utf-8").splitlines()
    kept = [line.rpartition("\t")[0] for line in lines]
    assert kept == ["sentence\tn\tlabel", '"I loved it\t1\tpositive', 'I hated it"\t2\tnegative']
    ask(*HERE, table, "--output", tmp_path / "a.csv")
    assert read_csv(tmp_path / "a.csv")[1][:2] == ['"I loved it', "1"]  # with commas


LATE = datetime.datetime(9999, 12, 31, 23, tzinfo=datetime.UTC)  # in Tokyo there is no such day


@pytest.mark.parametrize(
    ("name", "last", "output"),
    [
        ("t.csv", "two\nlines", "a.tsv"),
        ("t.csv", "two\rlines", "a.tsv"),
        ("t.csv", "a\ttab", "a.tsv"),
        ("t.txt", "a\ttab", "a.tsv"),
        ("t.parquet", LATE, "a.csv"),
        ("t.parquet", LATE, "a.jsonl"),
        *(("t.jsonl", value, "a.parquet") for value in (2**70, {}, [1, "x"])),
    ],
)
def test_a_bad_last_row_is_refused_at_once(name, last, output, here, tmp_path, monkeypatch) -> None:
    table, asked, day = tmp_path / name, Mock(), pyarrow.timestamp("us", "Asia/Tokyo")
    rows = [{"text": f"{i} I loved it", "n": None} for i in range(1500)] + [{"text": "a film", "n": last}]
    if name == "t.parquet":
        schema = pyarrow.schema({"text": pyarrow.string(), "n": day})
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema), table)
    elif name == "t.jsonl":
        write(table, "\n".join(map(json.dumps, rows)))
    else:
        write(table, "text\n" + "".join(f'"{row["n"] or row["text"]}"\n' for row in rows))
    monkeypatch.setattr(playground.Model, "logits", asked)
    refused(lambda: ask(*HERE, table, "--output", tmp_path / output), output, ".jsonl")
    assert [path.name for path in tmp_path.iterdir()] == [name] and not asked.called


def test_json_lines_keep_their_values_and_what_is_missing_stays_missing(here, tmp_path) -> None:
    rows = [{"text": "I loved it", "n": 1, "more": {"a": [1, None]}}, {"text": None, "n": None}]
    rows += [{"text": "é", "x": 1.5}, {"text": "   ", "x": math.nan}, {"x": math.inf}]
    table = write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)))
    ask(*HERE, table, "--output", tmp_path / "a.jsonl")
    found = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text("utf-8").splitlines()]
    answers = [(row.pop("label"), row.pop("probability")) for row in found]
    assert json.dumps(found) == json.dumps(rows)
    assert answers[0][0] == "positive" and answers[3] == (None, None)
    ask(*HERE, table, "--output", tmp_path / "a.csv")
    assert read_csv(tmp_path / "a.csv")[2] == ["", "", "", "", "", ""]


def test_parquet_keeps_its_types_and_other_formats_its_values(here, tmp_path) -> None:
    long, day = [*range(3000)], datetime.datetime(2020, 1, 1)
    columns = {
        "text": ["I loved it", None, "I hated it"],
        "n": [1, None, 3],
        "when": [day, None, day],
        "price": [decimal.Decimal("1.50"), None, decimal.Decimal("2.00")],
        "list": [long, None, []],
        "half": [0.5, float("nan"), None],
        " spaced ": ["a", "b", None],
    }
    table = pyarrow.table(columns)
    parquet.write_table(table, write(tmp_path / "t.parquet/_SUCCESS", "").with_name("0.parquet"))  # Spark's
    for ending in ("parquet", "jsonl", "csv"):
        ask(*HERE, tmp_path / "t.parquet", "--output", tmp_path / f"a.{ending}")
    found = parquet.read_table(tmp_path / "a.parquet")
    assert found.select(table.column_names).schema.equals(table.schema)
    assert all(found[name].to_pylist() == columns[name] for name in columns if name != "half")
    assert found["label"].to_pylist() == ["positive", None, "negative"]
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[1]["n"] is None and rows[1]["half"] is None and rows[0]["list"] == long  # JSON has no NaN
    assert json.loads(read_csv(tmp_path / "a.csv")[1][4]) == long
    frame = pandas.DataFrame({"text": ["a", "b"], "kind": pandas.Categorical(["x", "y"])}, ["one", "two"])
    frame.to_parquet(tmp_path / "f.parquet")
    ask(*HERE, tmp_path / "f.parquet", "--output", tmp_path / "g.parquet")
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "g.parquet")[["text", "kind"]], frame)


@pytest.mark.parametrize("suffix", playground.ENDINGS)
def test_lines_become_a_table(suffix, here, tmp_path) -> None:
    lines, output = [f"{number} I loved it" for number in range(2500)], tmp_path / f"a{suffix}"
    ask("--model", PEFT, *HERE, write(tmp_path / "t.txt", "\n".join(lines)), "--output", output)
    options = {".tsv": {"sep": "\t", "quoting": csv.QUOTE_NONE}, ".jsonl": {"lines": True}}.get(suffix, {})
    reader = {".jsonl": "read_json", ".parquet": "read_parquet"}.get(suffix, "read_csv")
    found = getattr(pandas, reader)(output, **options)
    names = ["label LoRA_peft", "probability LoRA_peft", "label LoRA_scratch", "probability LoRA_scratch"]
    assert found.columns.tolist() == ["text", *names] and found["text"].tolist() == lines
    assert found["probability LoRA_scratch"].between(0.5, 1).all()


def test_a_file_that_appears_meanwhile_is_not_replaced(here, tmp_path, monkeypatch) -> None:
    table, output, real = write_csv(tmp_path / "t.csv", ROWS), tmp_path / "a.csv", playground.Model.__call__
    monkeypatch.setattr(playground.Model, "__call__", lambda *rest: output.write_text("mine") and real(*rest))
    refused(lambda: ask(*HERE, table, "--output", output), output)
    assert output.read_text() == "mine" and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--file t.csv --output there.csv", ["there.csv"]),
        ("--file t.csv --output a.txt", ["a.txt", ".csv"]),
        ("--file t.csv --output no_folder.txt/a.csv", ["no_folder.txt"]),
        ("--file t.csv --output there.csv --label-column label", ["there.csv"]),
        ("--file t.csv --output a.csv --json", ["--output", "--json"]),
        ("--file t.csv --output a.csv sentence", ["--output", "SENTENCE"]),
        ("--output a.csv", ["--output", "--file"]),
        ("--file t.csv --web", ["--web", "--file"]),
        ("--file t.csv --unsure 50 --glue a.tsv", ["--glue", "--unsure"]),
        ("--file t.csv --label-column=", ["--label-column"]),
        ("--label-column label", ["--label-column"]),
        ("--out a.csv", ["--out"]),
    ],
)
def test_flags_that_clash_are_refused_before_any_work(arguments, named, here, tmp_path, monkeypatch) -> None:
    model = str(here / SCRATCH)
    monkeypatch.chdir(tmp_path)
    write_csv(Path("t.csv"), ROWS)
    write(Path("there.csv"), "mine")
    write(Path("no_folder.txt"), "mine")
    monkeypatch.setattr(playground, "load_all", None)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    refused(lambda: ask("--model", model, *arguments.split()), *named)
    assert Path("there.csv").read_text() == "mine" and not Path("a.csv").exists()


def test_unsure_is_the_answer_below_the_given_probability_everywhere(here, tmp_path) -> None:
    texts = ["I loved it", "a", "film", "it never ends", "the"]
    sure = [max(answer["probabilities"].values()) for answer in ask_json("--model", SCRATCH, *texts)]
    limit = 100 * sorted(sure)[2] - 1e-4
    below = [100 * p < limit for p in sure]
    question = ["--model", SCRATCH, "--unsure", limit]
    assert [answer["label"] == "unsure" for answer in ask_json(*question, *texts)] == below
    assert ["Unsure" in line for line in ask(*question, *texts).splitlines()[1::2]] == below
    table = write_csv(tmp_path / "t.csv", [(text, "positive") for text in texts])
    ask(*question, "--file", table, "--output", tmp_path / "a.csv", "--precision", "fp32")
    assert [row[-2] == "unsure" for row in read_csv(tmp_path / "a.csv")[1:]] == below
    (found,) = judge(table, "--unsure", limit, "--precision", "fp32")
    assert found["unsure"] == sum(below) and found["total"] == len(texts) - sum(below)


def test_a_label_of_that_name_is_refused_and_all_can_be_unsure(here, tiny_base, tmp_path) -> None:
    rows = [(text, "unsure" if label == "positive" else label) for text, label in ROWS]
    table, model = write_csv(tmp_path / "t.csv", rows), tmp_path / "a.pt"
    lora_scratch.main(flags(tiny_base, table, "--max-steps", 1, "--output", model))
    refused(lambda: ask("--model", model, "--unsure", 50, "I loved it"), "--unsure", model)
    refused(lambda: judge(table, "--unsure", 50), "--unsure", table)
    (found,) = ask_json("--model", model, "--file", table, "--label-column", "label")
    assert found["total"] == 10 and found["unsure"] == 0  # a label like any other
    rows = write_csv(tmp_path / "r.csv", [("the", "positive")])
    (found,) = judge(rows, "--unsure", 100)
    assert found["total"] == 0 and "accuracy" not in found
    assert "1 unsure" in ask(*HERE, rows, "--unsure", 100, "--label-column", "label")
