"""What a user does with a trained model: judge it, compare two, answer a table, trust its percentages."""

import codecs
import csv
import datetime
import decimal
import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import datasets
import pandas
import pyarrow
import pytest
import torch
import torch.nn.functional as F
from conftest import BAD, GOOD, PEFT, SCRATCH, ask, ask_json, flags
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

import lora_peft
import lora_scratch
import playground
from lora_scratch import InputError, load_checkpoint, macro_f1
from playground import sign_test

ROWS = [(text, "positive") for text in GOOD.split("|")] + [(text, "negative") for text in BAD.split("|")]


def write_csv(path: Path, rows: list[tuple], header: tuple = ("text", "label")) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def read_csv(path: Path, sep: str = ",", encoding: str = "utf-8") -> list[list[str]]:
    with open(path, encoding=encoding, newline="") as file:
        return list(csv.reader(file, delimiter=sep))


# --- Judge


def test_judging_gives_the_counts_the_interval_and_the_surest_mistakes(here: Path, tmp_path: Path) -> None:
    wrong = [("a warm and funny film", "negative"), ("I hated it", "positive")]
    table = write_csv(tmp_path / "t.csv", [*ROWS, ("  ", "positive"), *wrong], ("text", "about"))
    said = ask("--model", SCRATCH, "--file", table, "--label-column", "about").splitlines()
    assert said[0] == "LoRA_scratch: 12 sentences"
    assert said[1] == "its surest mistakes, of 2; or the label is wrong:"
    assert {line.split()[1] for line in said[2:4]} == {"12,", "13,"}  # rows of the file, the blank one counted
    assert {" ".join(line.split()[2:6]) for line in said[2:4]} == {
        "given negative, answered positive",
        "given positive, answered negative",
    }
    assert "| a warm and funny film" in "\n".join(said[2:4])
    assert said[-1] == "accuracy 83.33 % (10/12), 95 % between 55 and 95" and said[-2].startswith("macro-F1 83.3 %")
    (found,) = ask_json("--model", SCRATCH, "--file", table, "--label-column", "about")
    assert (found["correct"], found["total"], found["unsure"]) == (10, 12, 0)
    assert found["confusion"] == [[5, 1], [1, 5]] and found["label_names"] == ["negative", "positive"]
    sure = [one["probabilities"][one["label"]] for one in found["surest_mistakes"]]
    assert sure == sorted(sure, reverse=True) and len(sure) == 2


def test_the_judgement_is_that_of_the_training(here: Path, tiny_data: Path) -> None:
    record = json.loads(Path(SCRATCH).with_suffix(".json").read_text(encoding="utf-8"))["result"]
    (found,) = ask_json("--model", SCRATCH, "--file", tiny_data / "dev.tsv", "--label-column", "label")
    assert found["confusion"] == record["confusion"] and found["correct"] == record["correct"]


def test_numbers_in_the_file_are_the_labels_in_their_order_and_that_is_said(here: Path, tmp_path: Path, capsys) -> None:
    table = write_csv(tmp_path / "t.csv", [(text, int(label == "positive")) for text, label in ROWS])
    (found,) = ask_json("--model", SCRATCH, "--file", table, "--label-column", "label")
    assert found["correct"] == 10
    assert "the numbers in 'label' are read as negative, positive, in this order" in capsys.readouterr().err


def test_a_label_that_the_model_does_not_know_is_named_counted_and_wrong(here: Path, tmp_path: Path, capsys) -> None:
    table = write_csv(tmp_path / "t.csv", [*ROWS, ("it is a film", "mixed"), ("the film", "mixed"), ("a", "off")])
    (found,) = ask_json("--model", SCRATCH, "--file", table, "--label-column", "label")
    assert (
        "labels that LoRA_scratch does not know, so its answer is wrong: mixed (2), off (1)" in capsys.readouterr().err
    )
    assert (found["correct"], found["total"]) == (10, 13)
    assert found["label_names"] == ["negative", "positive", "mixed", "off"]
    assert sum(found["confusion"][2]) == 2 and sum(found["confusion"][3]) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a film", "x"), ("a story", "y")], r"knows negative, positive, but 2 of 2 rows say x \(1\), y \(1\)"),
        ([(" ", "positive")], "no sentence to judge by"),
        ([("a film", "")], r"t.csv: row 1: '' is no label"),
        ([("a film", "0.5"), ("it", "1")], "2 different numbers in 'label', 0.5 among them"),
    ],
)
def test_a_table_that_cannot_judge_is_refused(rows: list, message: str, here: Path, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", rows)
    with pytest.raises(InputError, match=message):
        ask("--model", SCRATCH, "--file", table, "--label-column", "label")


def test_macro_f1_is_the_mean_over_labels_that_occur() -> None:
    confusion = torch.tensor([[3, 1, 0, 0], [2, 4, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])  # the last: nowhere
    by_hand = [2 * 3 / (2 * 3 + 1 + 3), 2 * 4 / (2 * 4 + 2 + 1), 0.0]
    assert macro_f1(confusion) == pytest.approx(100 * sum(by_hand) / 3)


def test_class_names_in_the_file_are_its_labels_as_in_training(here: Path, tmp_path: Path) -> None:
    names = ["positive", "negative"]  # the other way round than the model's
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    rows = {"text": [text for text, _ in ROWS], "label": [names.index(label) for _, label in ROWS]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "t.parquet")
    (found,) = ask_json("--model", SCRATCH, "--file", tmp_path / "t.parquet", "--label-column", "label")
    assert (found["correct"], found["total"]) == (10, 10)


def test_number_labels_of_a_model_are_names_and_no_places(tiny_base: Path, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [(text, 1 + (label == "positive")) for text, label in ROWS])
    lora_scratch.main(flags(tiny_base, table, "--max-steps", 1, "--output", tmp_path / "a.pt"))
    other = write_csv(tmp_path / "o.csv", [("a film", 0), ("it", 0)])
    with pytest.raises(InputError, match=r"knows 1, 2, but 2 of 2 rows say 0 \(2\)"):
        ask("--model", tmp_path / "a.pt", "--file", other, "--label-column", "label")


def test_one_label_in_the_file_says_nothing_about_learning(here: Path, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [("I loved it", "positive")])
    said = ask("--model", SCRATCH, "--file", table, "--label-column", "label")
    assert "accuracy 100.00 % (1/1)" in said and "nothing is learnt" not in said


def test_judging_by_the_training_file_says_so(here: Path, tiny_base: Path, tmp_path: Path, capsys) -> None:
    table = write_csv(tmp_path / "t.csv", ROWS)
    lora_scratch.main(flags(tiny_base, table, "--max-steps", 1, "--output", tmp_path / "a.pt"))
    capsys.readouterr()
    ask("--model", tmp_path / "a.pt", "--file", table, "--label-column", "label")
    assert "was trained on most of these rows: look at its mistakes" in capsys.readouterr().err
    other = write_csv(tmp_path / "o.csv", ROWS)
    ask("--model", tmp_path / "a.pt", "--file", other, "--label-column", "label")
    assert "was trained" not in capsys.readouterr().err


def test_a_table_without_names_of_columns_is_refused(here: Path, tmp_path: Path) -> None:
    rows = [(f"a rather long sentence about film number {i}, and a dull one", "x") for i in range(9)]
    table = write_csv(tmp_path / "t.csv", rows[1:], rows[0])
    with pytest.raises(InputError, match="its first row looks like data"):
        ask("--model", SCRATCH, "--file", table, "--output", tmp_path / "a.csv")


# --- Compare


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_sign_test_is_exact(one: int, other: int) -> None:
    count, fewer = one + other, min(one, other)
    tail = sum(Fraction(math.comb(count, i), 2**count) for i in range(fewer + 1))
    assert sign_test(one, other) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)


def test_the_sign_test_of_many_rows_is_quick_and_no_overflow() -> None:
    assert sign_test(29, 41) == pytest.approx(0.18822, abs=1e-5)
    assert sign_test(20_000, 20_400) == pytest.approx(
        math.erfc(399 / math.sqrt(2 * 40_400)), rel=1e-3
    )  # the normal one


def test_two_models_are_compared_on_the_rows_that_they_answer_differently(
    here: Path, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    more = ["--max-steps", 1, "--lr", 0, "--label-names", "negative", "positive", "--output", tmp_path / "b.pt"]
    lora_scratch.main(flags(tiny_base, tiny_data, *more))  # it answers one label
    table = write_csv(tmp_path / "t.csv", ROWS)
    question = ["--model", SCRATCH, "--model", tmp_path / "b.pt", "--file", table, "--label-column", "label"]
    one, other, pair = ask_json(*question)
    assert one["correct"] == 10 and other["correct"] == 5
    assert pair == {"models": [SCRATCH, str(tmp_path / "b.pt")], "alone_right": [5, 0], "p": 2 / 2**5}
    said = ask(*question).splitlines()[-1]
    assert said.endswith(f"alone right 0: p = 0.062, no evidence that {SCRATCH} is better")


# --- Use


def test_a_csv_keeps_every_column_row_and_character(here: Path, tmp_path: Path) -> None:
    header = ("", "label", "text", "", "label", " spaced ")
    rows = [
        ("1", "NA", 'a "warm" film, and\nfunny', "007", "null", "é"),
        ("2", "", "   ", "1.50", "NaN", ""),
        ("3", "x", "I hated it", "1e5", "-", "\t"),
    ]
    write_csv(tmp_path / "t.csv", rows, header)
    question = ["--model", SCRATCH, "--file", tmp_path / "t.csv", "--text-column", "text"]
    assert ask(*question, "--output", tmp_path / "new" / "a.csv").startswith("wrote 3 rows to ")
    found = read_csv(tmp_path / "new" / "a.csv")
    assert found[0] == [*header, "model_label", "model_probability"]
    assert [tuple(row[:-2]) for row in found[1:]] == rows
    assert [row[-2] for row in found[1:]] == ["positive", "", "negative"] and found[2][-1] == ""
    expected = [answer["probabilities"][answer["label"]] for answer in ask_json("--model", SCRATCH, rows[0][2])]
    assert float(found[1][-1]) == pytest.approx(expected[0], abs=1e-5)


def test_a_carriage_return_a_long_list_and_a_blank_line_stay_in_their_rows(here: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b'id,text\n1,"good\rfilm"\n2,I hated it\n')
    ask("--model", SCRATCH, "--file", tmp_path / "t.csv", "--output", tmp_path / "a.csv")
    assert [row[:2] for row in read_csv(tmp_path / "a.csv")[1:]] == [["1", "good\rfilm"], ["2", "I hated it"]]
    assert pandas.read_csv(tmp_path / "a.csv")["text"].tolist() == ["good\rfilm", "I hated it"]
    long = [*range(3000)]
    parquet.write_table(pyarrow.table({"text": ["I loved it"], "list": [long]}), tmp_path / "l.parquet")
    ask("--model", SCRATCH, "--file", tmp_path / "l.parquet", "--output", tmp_path / "l.csv")
    csv.field_size_limit(10**6)
    assert json.loads(read_csv(tmp_path / "l.csv")[1][1]) == long
    (tmp_path / "b.csv").write_text("text\nI loved it\n\nI hated it\n", encoding="utf-8")
    ask("--model", SCRATCH, "--file", tmp_path / "b.csv", "--output", tmp_path / "c.csv")
    assert [row[:2] for row in read_csv(tmp_path / "c.csv")[1:]] == [
        ["I loved it", "positive"],
        ["", ""],
        ["I hated it", "negative"],
    ]


def test_a_file_that_appears_meanwhile_is_not_replaced(here: Path, tmp_path: Path, monkeypatch) -> None:
    table, output = write_csv(tmp_path / "t.csv", ROWS), tmp_path / "a.csv"
    real = playground.classify
    monkeypatch.setattr(playground, "classify", lambda *rest: output.write_text("mine") and real(*rest))
    with pytest.raises(InputError, match="meanwhile"):
        ask("--model", SCRATCH, "--file", table, "--output", output)
    assert output.read_text() == "mine" and not list(tmp_path.glob(".*"))


def test_a_full_gpu_is_told_as_such(here: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(playground, "classify", full)
    with pytest.raises(torch.OutOfMemoryError):  # run names the remedy
        ask("--model", SCRATCH, "--file", write_csv(tmp_path / "t.csv", ROWS), "--output", tmp_path / "a.csv")


def test_a_spreadsheets_mark_and_semicolons_stay(here: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text;n\nI loved it é;1\n", encoding="utf-8-sig")
    ask("--model", SCRATCH, "--file", tmp_path / "t.csv", "--output", tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes().startswith(codecs.BOM_UTF8)
    found = read_csv(tmp_path / "a.csv", ";", "utf-8-sig")
    assert found[0] == ["text", "n", "label", "probability"] and found[1][:3] == ["I loved it é", "1", "positive"]


def test_a_tsv_has_no_quotes_and_refuses_what_it_cannot_hold(here: Path, tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_bytes(b'sentence\tn\r\n"I loved it\t1\r\nI hated it"\t2\r\n')
    ask("--model", SCRATCH, "--file", tmp_path / "t.tsv", "--output", tmp_path / "a.tsv")
    lines = [line.split("\t")[:3] for line in (tmp_path / "a.tsv").read_text(encoding="utf-8").splitlines()]
    assert lines == [["sentence", "n", "label"], ['"I loved it', "1", "positive"], ['I hated it"', "2", "negative"]]
    ask("--model", SCRATCH, "--file", tmp_path / "t.tsv", "--output", tmp_path / "a.csv")
    assert read_csv(tmp_path / "a.csv")[1][:2] == ['"I loved it', "1"]  # with commas
    write_csv(tmp_path / "two.csv", [("two\nlines", "1")])
    with pytest.raises(InputError, match=r"a \.tsv file cannot hold 'two.lines \| 1 .* name a \.csv file"):
        ask("--model", SCRATCH, "--file", tmp_path / "two.csv", "--output", tmp_path / "b.tsv")
    assert not (tmp_path / "b.tsv").exists() and not list(tmp_path.glob(".*"))


def test_json_lines_keep_their_values_and_what_is_missing_stays_missing(here: Path, tmp_path: Path) -> None:
    rows = [
        {"text": "I loved it", "n": 1, "more": {"a": [1, None]}},
        {"text": None, "n": None},
        {"text": "é", "x": 1.5},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    ask("--model", SCRATCH, "--file", tmp_path / "t.jsonl", "--output", tmp_path / "a.jsonl")
    found = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [{k: v for k, v in row.items() if k not in ("label", "probability")} for row in found] == rows
    assert found[0]["label"] == "positive" and found[1]["label"] is None and found[1]["probability"] is None
    ask("--model", SCRATCH, "--file", tmp_path / "t.jsonl", "--output", tmp_path / "a.csv")
    assert read_csv(tmp_path / "a.csv")[2] == ["", "", "", "", "", ""]


def test_parquet_keeps_its_types(here: Path, tmp_path: Path) -> None:
    columns = {
        "text": ["I loved it", None, "I hated it"],
        "n": [1, None, 3],
        "when": [datetime.datetime(2020, 1, 1), None, datetime.datetime(2021, 1, 1)],
        "price": [decimal.Decimal("1.50"), None, decimal.Decimal("2.00")],
        "list": [[1, 2], None, []],
        "half": [0.5, float("nan"), None],
    }
    table = pyarrow.table(columns)
    parquet.write_table(table, tmp_path / "t.parquet")
    ask("--model", SCRATCH, "--file", tmp_path / "t.parquet", "--output", tmp_path / "a.parquet")
    found = parquet.read_table(tmp_path / "a.parquet")
    assert found.select(table.column_names).schema.equals(table.schema)
    for name in ("text", "n", "when", "price", "list"):
        assert found[name].to_pylist() == columns[name]
    assert found["label"].to_pylist() == ["positive", None, "negative"] and found["probability"].null_count == 1
    ask("--model", SCRATCH, "--file", tmp_path / "t.parquet", "--output", tmp_path / "a.jsonl")
    row = json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()[1])
    assert row["n"] is None and row["half"] is None  # JSON has no NaN


def test_pandas_reads_the_parquet_file_and_its_categories_and_index_stay(here: Path, tmp_path: Path) -> None:
    frame = pandas.DataFrame(
        {"text": ["I loved it", "I hated it"], "kind": pandas.Categorical(["x", "y"]), "list": [[1], [2, 3]]},
        index=["one", "two"],
    )
    frame.to_parquet(tmp_path / "t.parquet")
    ask("--model", SCRATCH, "--file", tmp_path / "t.parquet", "--output", tmp_path / "a.parquet")
    found = pandas.read_parquet(tmp_path / "a.parquet")
    assert found.index.tolist() == ["one", "two"] and found["kind"].dtype == "category"
    assert found["list"].map(list).tolist() == [[1], [2, 3]] and found["label"].tolist() == ["positive", "negative"]
    (tmp_path / "j.jsonl").write_text('{"text": "a", "list": [1], "more": {"a": 1}}\n', encoding="utf-8")
    ask("--model", SCRATCH, "--file", tmp_path / "j.jsonl", "--output", tmp_path / "j.parquet")
    assert pandas.read_parquet(tmp_path / "j.parquet")["more"].tolist() == [{"a": 1}]


@pytest.mark.parametrize("suffix", playground.ANSWERS)
def test_lines_of_text_become_a_table_piece_by_piece(suffix: str, here: Path, tmp_path: Path) -> None:
    lines = [f"{number} I loved it" for number in range(2500)]  # three pieces
    (tmp_path / "t.txt").write_text("\n".join(lines), encoding="utf-8")
    output = tmp_path / f"a{suffix}"
    ask("--file", tmp_path / "t.txt", "--output", output)
    read = {
        ".csv": pandas.read_csv,
        ".tsv": lambda path: pandas.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE),
        ".jsonl": lambda path: pandas.read_json(path, lines=True),
        ".parquet": pandas.read_parquet,
    }[suffix]
    found = read(output)
    names = [f"{what} {model}" for model in ("LoRA_scratch", "LoRA_peft") for what in ("label", "probability")]
    assert found.columns.tolist() == ["text", *names] and found["text"].tolist() == lines
    assert found["probability LoRA_scratch"].between(0.5, 1).all()


def test_lines_of_any_length_take_little_memory(here: Path, tmp_path: Path) -> None:
    taken = []

    def lines():
        for number in range(20_000):
            taken.append(number)
            yield "I loved it"

    args = playground.make_parser().parse_args(["--output", str(tmp_path / "a.csv")])
    models = playground.load_all([Path(SCRATCH)], None)
    seen = []
    real = playground.classify
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            playground, "classify", lambda model, chunk, args: seen.append(len(taken)) or real(model, chunk, args)
        )
        playground.write_answers(models, lines(), None, args)
    assert seen[0] <= 1024 + 1 and max(b - a for a, b in itertools.pairwise(seen)) <= 1024


@pytest.mark.parametrize("values", [[1, '"x"'], [2**70], ["{}"]])
def test_a_column_that_parquet_cannot_hold_is_refused(values: list, here: Path, tmp_path: Path) -> None:
    rows = [f'{{"text": "a", "n": {n}}}\n' for n in values]
    (tmp_path / "t.jsonl").write_text("".join(rows), encoding="utf-8")
    with pytest.raises(InputError, match=r"--output .*a\.parquet: .*; name a \.jsonl file"):
        ask("--model", SCRATCH, "--file", tmp_path / "t.jsonl", "--output", tmp_path / "a.parquet")
    assert not (tmp_path / "a.parquet").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "there.csv"], "there is something already; name a new file"),
        (["--output", "table.csv"], "there is something already"),
        (["--output", "a.txt"], r"give a name that ends in \.csv"),
        (["--output", "a.csv", "--label-column", "label"], "--output and --label-column: one at a time"),
        (["--output", "a.csv", "--json"], "--output prints no JSON"),
        (["--output", "a.csv", "--explain"], "--output explains no words"),
        (["--output", "a.csv", "a sentence"], "leave them out"),
        (["--web"], "--web reads no --file"),
        (["--unsure", "0.8"], "--unsure 0.8: give percent, such as 80"),
        (["--label-column", ""], "--label-column names a column"),
        (["--unsure", "50", "--glue", "a.tsv"], "--glue takes every answer"),
    ],
)
def test_flags_that_do_not_go_together_and_files_that_stand_there_are_refused(
    more: list, message: str, here: Path, tmp_path: Path, monkeypatch
) -> None:
    model = str(here / SCRATCH)
    monkeypatch.chdir(tmp_path)
    write_csv(Path("table.csv"), ROWS)
    Path("there.csv").write_text("mine")
    monkeypatch.setattr(playground, "load_all", None)  # nothing is loaded before that is said
    with pytest.raises(InputError, match=message):
        ask("--model", model, "--file", "table.csv", *more)
    assert Path("there.csv").read_text() == "mine" and not Path("a.csv").exists()


def test_a_model_is_named_once_and_output_needs_something_to_answer(here: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(InputError, match="is named twice"):
        ask("--model", SCRATCH, "--model", f"./{SCRATCH}", "I loved it")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with pytest.raises(InputError, match="there is nothing to answer"):
        ask("--model", SCRATCH, "--output", tmp_path / "a.csv")


def test_label_column_needs_a_table(here: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a")
    for more in ([], ["--file", tmp_path / "t.txt"]):
        with pytest.raises(InputError, match="--label-column names a column of a table in --file"):
            ask("--model", SCRATCH, "--label-column", "label", *more)


# --- Unsure


def test_unsure_is_the_answer_below_the_given_probability_everywhere(here: Path, tmp_path: Path) -> None:
    texts = ["I loved it", "a", "film", "it never ends", "the"]
    sure = [max(answer["probabilities"].values()) for answer in ask_json("--model", SCRATCH, *texts)]
    limit = 100 * sorted(sure)[2]
    below = [100 * p < limit - 1e-4 for p in sure]
    question = ["--model", SCRATCH, "--unsure", limit - 1e-4]
    assert [answer["label"] == "unsure" for answer in ask_json(*question, *texts)] == below
    assert ["Unsure (" in line for line in ask(*question, *texts).splitlines()[1::2]] == below
    table = write_csv(tmp_path / "t.csv", [(text, "positive") for text in texts])
    ask(*question, "--file", table, "--output", tmp_path / "a.csv")
    assert [row[-2] == "unsure" for row in read_csv(tmp_path / "a.csv")[1:]] == below
    (found,) = ask_json(*question, "--file", table, "--label-column", "label")
    assert found["unsure"] == sum(below) and found["total"] == len(texts) - sum(below)
    said = ask(*question, "--file", table, "--label-column", "label")
    assert said.startswith(f"LoRA_scratch: 5 sentences, unsure of {sum(below)}; of the others:")


def test_a_label_of_that_name_is_refused_and_all_can_be_unsure(here: Path, tiny_base: Path, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [(text, "unsure" if label == "positive" else label) for text, label in ROWS])
    lora_scratch.main(flags(tiny_base, table, "--max-steps", 1, "--output", tmp_path / "a.pt"))
    with pytest.raises(InputError, match=r"--unsure: 'unsure' is a label of .*a\.pt"):
        ask("--model", tmp_path / "a.pt", "--unsure", 50, "I loved it")
    with pytest.raises(InputError, match=r"--unsure: 'unsure' is a label of .*t\.csv"):
        ask("--model", SCRATCH, "--unsure", 50, "--file", table, "--label-column", "label")
    (found,) = ask_json("--model", tmp_path / "a.pt", "--file", table, "--label-column", "label")
    assert found["total"] == 10 and found["unsure"] == 0  # a label like any other
    rows = write_csv(tmp_path / "r.csv", [("the", "positive")])
    (found,) = ask_json("--model", SCRATCH, "--unsure", 100, "--file", rows, "--label-column", "label")
    assert found["total"] == 0 and "accuracy" not in found
    assert "unsure of 1" in ask("--model", SCRATCH, "--unsure", 100, "--file", rows, "--label-column", "label")


# --- Several models on one base


def test_models_on_one_base_share_it_and_answer_as_alone(
    here: Path, tiny_base: Path, tmp_path: Path, monkeypatch
) -> None:
    rows = [(text, f"kind {len(text) % 3}") for text, _ in ROWS]
    table = write_csv(tmp_path / "t.csv", rows)
    more = ["--lr", 0.02, "--epochs", 3, "--targets", "all-linear", "--output"]
    for script, output in ((lora_scratch, tmp_path / "three.pt"), (lora_peft, tmp_path / "other")):
        script.main(flags(tiny_base, table, *more, output))
    paths = [Path(SCRATCH), Path(PEFT), tmp_path / "three.pt", tmp_path / "other"]
    loaded = []
    real = playground.load_base
    monkeypatch.setattr(playground, "load_base", lambda *rest: loaded.append(rest) or real(*rest))
    models = playground.load_all(paths, None)
    assert len(loaded) == 1
    texts = [*GOOD.split("|"), *BAD.split("|"), "a", "great " * 60]
    shared, own = set(), 0
    for path, model in zip(paths, models, strict=True):
        alone = playground.load("", path, None)
        tokens, _ = playground.read_tokens(texts, alone)
        ours, theirs = (playground.probabilities(one, tokens, 4) for one in (model, alone))
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6) and model.label_names == alone.label_names
        for name, parameter in model.base.model.named_parameters():
            if "lora_" in name or "classifier" in name:
                own += parameter.numel()
            else:
                shared.add(parameter.data_ptr())
    assert len(shared) == len(list(load_checkpoint(SCRATCH)[0].model.distilbert.parameters())) - 2 * 12
    assert own > 0


# --- Percentages that mean something


@pytest.mark.parametrize("script", [lora_scratch, lora_peft])
def test_the_temperature_is_the_likeliest_and_in_the_file(
    script, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    output = tmp_path / ("a.pt" if script is lora_scratch else "a")
    header, *rows = (tiny_data / "dev.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line[:-1] + str(1 - int(line[-1])) if i in (0, 9) else line for i, line in enumerate(rows)]  # it is wrong
    data = tmp_path / "data"
    data.mkdir()
    (data / "dev.tsv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    (data / "train.tsv").write_bytes((tiny_data / "train.tsv").read_bytes())
    more = ["--lr", 0.01, "--epochs", 15, "--targets", "all-linear", "--output", output]
    raw = {}
    real = script.calibrate

    def spy(model, sentences, args):
        raw["logits"] = lora_scratch.predict(model, sentences, 8)
        raw["labels"] = sentences.labels
        raw["temperature"] = real(model, sentences, args)
        raw["after"] = lora_scratch.predict(model, sentences, 8)
        return raw["temperature"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "calibrate", spy)
        script.main(flags(tiny_base, data, *more))
    temperature = raw["temperature"]
    assert 1.05 < temperature < 9.5  # right on eight of ten, and sure of all
    assert torch.allclose(raw["after"], raw["logits"] / temperature, rtol=1e-5, atol=1e-5)
    loss = {
        t: F.cross_entropy(raw["logits"] / t, raw["labels"]).item()
        for t in (temperature * 0.9, temperature, temperature * 1.1)
    }
    assert min(loss, key=loss.get) == temperature
    model = playground.load("", output, None)
    tokens = lora_scratch.tokenize(
        lora_scratch.load_tables(
            lora_scratch.parse_flags(lora_scratch.make_parser("", "x.pt"), flags(tiny_base, data))
        )[1],
        model.base.tokenizer,
        128,
    )
    assert torch.allclose(playground.probabilities(model, tokens, 8), raw["after"].softmax(dim=1), atol=1e-5)
    record = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    assert record["temperature"] == temperature


def test_a_frozen_head_and_few_sentences_are_left_as_they_are(tiny_base: Path, tiny_data: Path) -> None:
    model = lora_scratch.load_base(str(tiny_base), None, ["0", "1"], 128).model
    parser = lora_scratch.make_parser("", "x.pt")
    args = lora_scratch.parse_flags(parser, [*flags(tiny_base, tiny_data), "--freeze-head"])
    tokens = lora_scratch.Tokens.from_lists([[2, 5, 3]] * 20)
    before = model.classifier.weight.detach().clone()
    assert lora_scratch.calibrate(model, tokens, args) == 1.0
    args.freeze_head = False
    few = lora_scratch.Tokens.from_lists([[2, 5, 3]] * (lora_scratch.LEAST_HELD_OUT - 1))
    assert lora_scratch.calibrate(model, few, args) == 1.0
    assert torch.equal(model.classifier.weight, before)


# --- The page


def test_web_without_gradio_names_the_command(here: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(InputError, match=r"--web needs Gradio: pip install -r tests/requirements-web\.txt"):
        ask("--model", SCRATCH, "--web")


def test_examples_are_validation_sentences_where_the_data_still_lies(here: Path, tiny_data: Path, capsys) -> None:
    model = playground.load("", Path(SCRATCH), None)
    found = playground.own_sentences(model)
    lines = (tiny_data / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:6]
    assert found == [line.split("\t")[0] for line in lines] and capsys.readouterr() == ("", "")
    for record in ({}, {"settings": {"dataset": "nowhere"}}, {"settings": {"dataset": 3}}, {"settings": []}, 5):
        assert playground.own_sentences(model._replace(facts={"record": record})) == []
