"""The first ten minutes: --demo, its sentences, and what a run says about each label."""

import collections
import csv
import io
import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import flags
from hypothesis import given
from hypothesis import strategies as st

import lora_peft
import lora_scratch
import playground
from lora_scratch import DEMO, DISTILBERT, InputError, label_report, make_parser, on_terminal, parse_flags

ROOT = Path(__file__).parent.parent


# --- The sentences


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    rows = {}
    for name in ("train", "validation"):
        with open(ROOT / DEMO["dataset"] / f"{name}.tsv", encoding="utf-8", newline="") as file:
            rows[name] = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return rows


def words(sentence: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z0-9']+", sentence.lower()))


def test_the_demos_splits_are_balanced_and_clean(splits: dict[str, list[dict]]) -> None:
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 1000, "validation": 200}
    for name, rows in splits.items():
        for topic in ("film", "book", "meal", "hotel", "gadget"):
            labels = collections.Counter(row["label"] for row in rows if row["topic"] == topic)
            assert labels["positive"] == labels["negative"] > 0, (name, topic)
        devices = collections.Counter(row["device"] for row in rows)
        assert set(devices) == {"plain", "negation", "contrast", "understatement", "irony"}
        assert min(devices.values()) >= len(rows) * 0.03, (name, devices)
        for row in rows:
            text = row["sentence"]
            assert text.isascii() and text.isprintable() and text == " ".join(text.split()) and words(text), text
    lengths = [len(words(row["sentence"])) for rows in splits.values() for row in rows]
    assert min(lengths) <= 3 and max(lengths) >= 30


def test_no_two_of_the_demos_sentences_are_nearly_the_same(splits: dict[str, list[dict]]) -> None:
    sentences = [words(row["sentence"]) for rows in splits.values() for row in rows]
    assert len(set(sentences)) == len(sentences)
    for one, other in itertools.combinations(map(set, sentences), 2):
        shared, together = len(one & other), len(one | other)
        assert shared < 0.5 * together, (one, other)


# --- The flag


def test_demo_changes_defaults_that_can_still_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(DEMO["model"]).mkdir(parents=True)
    for output, expected in zip(map(str, playground.TRAINED), playground.DEMOS, strict=True):
        args = parse_flags(make_parser("", output), ["--demo"])
        assert {key: getattr(args, key) for key in DEMO} == DEMO and args.output == expected
        args = parse_flags(make_parser("", output), ["--lr", "0.5", "--output", "a.pt", "--demo"])
        assert args.lr == 0.5 and args.output == Path("a.pt") and args.dataset == DEMO["dataset"]
        args = parse_flags(make_parser("", output), [])
        assert args.output == Path(output) and args.lr is None and args.model == DISTILBERT[0]


@pytest.mark.parametrize("script", [lora_scratch, lora_peft])
def test_demo_without_its_base_model_says_what_makes_it(script, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"minilm-l6-distilbert yet; \./setup\.sh --demo makes it"):
        script.main(["--demo"])
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("script", ["lora_scratch", "lora_peft"])
def test_the_demo_learns_and_the_command_it_ends_with_answers(script: str, real_base: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / DEMO["model"]).symlink_to(real_base)
    (tmp_path / "dataset").symlink_to(ROOT / "dataset")
    demo = subprocess.run(
        [sys.executable, ROOT / f"{script}.py", "--demo"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    *_, accuracy, last = demo.stdout.splitlines()
    assert float(accuracy.split()[1]) > 80
    command = shlex.split(last.removeprefix("ask it: "))
    assert command.pop() in (ROOT / DEMO["dataset"] / "validation.tsv").read_text(encoding="utf-8")
    said = subprocess.run(
        [*command, "--json", "I loved this wonderful story.", "It was awful."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert [json.loads(line)["label"] for line in said.splitlines()] == ["positive", "negative"]


# --- What a run says at its end


def test_the_report_of_a_small_matrix_by_hand() -> None:
    lines = label_report(torch.tensor([[8, 2, 0], [1, 4, 0], [1, 4, 0]]), ["bad", "so\tso", "good"]).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "label precision recall F1 sentences answered as: bad so so good",
        "bad 80.0 80.0 80.0 10 8 2 0",
        "so so 40.0 80.0 53.3 5 1 4 0",
        "good - 0.0 0.0 5 1 4 0",  # never answered: no precision
    ]
    assert len(label_report(torch.eye(11), list("abcdefghijk")).splitlines()[0].split()) == 5  # no matrix so broad


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1))
def test_the_report_counts_as_one_counts_by_hand(pairs: list[tuple[int, int]]) -> None:
    confusion = torch.zeros(3, 3, dtype=torch.long)
    for true, answered in pairs:
        confusion[true, answered] += 1
    for label, line in enumerate(label_report(confusion, ["a", "b", "c"]).splitlines()[1:]):
        right = sum(pair == (label, label) for pair in pairs)
        given_as, real = sum(p[1] == label for p in pairs), sum(p[0] == label for p in pairs)
        precision, recall = right / given_as if given_as else None, right / real if real else None
        f1 = 2 * right / (given_as + real) if given_as + real else None
        shown = ["-" if share is None else f"{100 * share:.1f}" for share in (precision, recall, f1)]
        assert line.split()[1:5] == [*shown, str(real)]


def test_every_run_ends_with_the_report(tiny_base: Path, tiny_data: Path, tmp_path: Path, capsys) -> None:
    lora_scratch.main(flags(tiny_base, tiny_data, "--max-steps", 1, "--output", tmp_path / "a.pt"))
    assert "label precision recall F1 sentences answered as: 0 1" in " ".join(capsys.readouterr().out.split())


def test_a_notebook_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JPY_PARENT_PID", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert on_terminal()
    for name in ("JPY_PARENT_PID", "COLAB_RELEASE_TAG"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert not on_terminal()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert not on_terminal()


def test_a_label_that_the_output_cannot_encode_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, "cp1252"))
    with pytest.raises(SystemExit) as stop:
        lora_scratch.run(lambda: print(label_report(torch.eye(2, dtype=torch.long), ["хорошо", "плохо"])))
    assert not stop.value.code
    assert b"100.0" in output.getvalue()
