"""--folds: every row is judged by a model that has not seen it, and nothing of it is lost."""

import json
import signal
from pathlib import Path

import lora_scratch

import hypothesis
import hypothesis.strategies as st
import pandas
import pytest
import torch
import torch.nn.functional as F
from conftest import BAD, GOOD, SCRIPTS, flags, refused
from test_resume import exit_code, output_of, same_bits


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Twenty rows of ten texts of praise and blame, of which one is twice in it."""
    texts = [*GOOD.split("|"), *BAD.split("|")]
    labels = ["good"] * len(GOOD.split("|")) + ["bad"] * len(BAD.split("|"))
    more = [f"{text} again" for text in texts[1:]]
    frame = pandas.DataFrame({"text": texts + more + texts[:1], "label": labels + labels[1:] + labels[:1]})
    path = tmp_path_factory.mktemp("table") / "about.csv"
    frame.to_csv(path, index=False)
    return path


def run(script, base: Path, data: Path, output: Path, *more: object) -> dict:
    """The record of a run."""
    given = flags(base, data, "--max-steps", 6, "--lr", 0.02, *more, "--output", output)
    assert script.main(given) is None
    return json.loads(lora_scratch.beside(output, ".json").read_text(encoding="utf-8"))


@SCRIPTS
def test_every_row_is_answered_by_a_model_of_the_other_parts(script, tiny_base, table, tmp_path) -> None:
    """Each part's answers are those of an ordinary run whose validation file is that part."""
    record = run(script, tiny_base, table, output_of(script, tmp_path / "folds"), "--folds", 3)
    rows = pandas.read_csv(table)
    correct, mistakes = 0, set()
    half, *parts = record["parts"]
    assert half["rows"] in (9, 10) and [part["rows"] + part["total"] for part in parts] == [len(rows)] * 3
    for number in range(1, 4):
        held = rows["text"].isin(lora_scratch.draw_texts(rows, 42, 3, number % 3))
        folder = tmp_path / str(number)
        folder.mkdir()
        rows[~held].to_csv(folder / "train.csv", index=False)
        rows[held].to_csv(folder / "dev.csv", index=False)
        alone = run(script, tiny_base, folder, output_of(script, tmp_path / f"alone{number}"))["result"]
        assert alone["correct"] == parts[number - 1]["correct"] and alone["total"] == held.sum()
        correct += alone["correct"]
        mistakes |= {(one["text"], one["answer"]) for one in alone["mistakes"]}
    result = record["result"]
    assert (result["correct"], result["total"]) == (correct, len(rows))
    assert {(one["text"], one["answer"]) for one in result["mistakes"]} == mistakes
    for one in result["mistakes"]:  # by the line of a spreadsheet
        assert rows["text"][one["row"] - 2] == one["text"] and rows["label"][one["row"] - 2] == one["label"]
    assert [one["percent"] for one in result["mistakes"]] == sorted(
        (one["percent"] for one in result["mistakes"]), reverse=True
    )


def test_what_is_saved_has_learnt_from_every_row(tiny_base, table, tmp_path) -> None:
    run(lora_scratch, tiny_base, table, tmp_path / "folds.pt", "--folds", 2)
    whole = tmp_path / "data"
    whole.mkdir()
    for name in ("train", "dev"):
        (whole / f"{name}.csv").write_bytes(table.read_bytes())
    run(lora_scratch, tiny_base, whole, tmp_path / "whole.pt")
    one, two = (torch.load(tmp_path / name)["state_dict"] for name in ("folds.pt", "whole.pt"))
    assert all(torch.equal(one[key], two[key]) for key in one if "classifier" not in key)  # its temperature
    assert not [*tmp_path.glob("*.part*")]


@pytest.mark.parametrize("part", [0, 1, 2, None])
def test_a_stopped_run_goes_on_in_its_part(part, tiny_base, table, tmp_path, monkeypatch) -> None:
    whole = run(lora_scratch, tiny_base, table, tmp_path / "whole.pt", "--folds", 2)
    save, name = lora_scratch.TrainingState.save, f"a.pt.part{part}.state".replace(".partNone", "")

    def stop(state: lora_scratch.TrainingState, done: int) -> None:
        save(state, done)
        if state.path.name == name and done == 2 and not state.stopped:
            signal.raise_signal(signal.SIGTERM)

    given = flags(tiny_base, table, "--max-steps", 6, "--lr", 0.02, "--folds", 2, "--batch-size", 8)
    given += ["--save-every", "1", "--output"]
    with monkeypatch.context() as patch:
        patch.setattr(lora_scratch.TrainingState, "save", stop)
        assert exit_code(lambda: lora_scratch.main([*given, str(tmp_path / "a.pt")])) == 143
    lora_scratch.main([*given, str(tmp_path / "a.pt"), "--resume"])
    lora_scratch.main([*given, str(tmp_path / "b.pt")])
    assert same_bits(tmp_path / "a.pt", tmp_path / "b.pt")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in "ab")
    assert one["result"]["mistakes"] == two["result"]["mistakes"] and one["parts"] == two["parts"]
    assert whole["result"]["total"] == one["result"]["total"]


def test_too_few_texts_are_refused(tiny_base, table, tmp_path) -> None:
    given = flags(tiny_base, table, "--folds", 99, "--output", tmp_path / "a.pt")
    refused(lambda: lora_scratch.main(given), "--folds 99")


LABELS = st.lists(st.tuples(st.text("ab", max_size=3), st.sampled_from("xyz")), min_size=2, max_size=60)


@hypothesis.given(LABELS, st.integers(2, 7))
def test_parts_are_equal_share_no_text_and_have_their_share_of_every_label(pairs, every) -> None:
    rows = pandas.DataFrame(pairs, columns=["text", "label"])
    parts = [lora_scratch.draw_texts(rows, 42, every, number) for number in range(every)]
    assert sorted(text for part in parts for text in part) == sorted(rows["text"].unique())
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    alone = rows.drop_duplicates("text").set_index("text")["label"] if rows["text"].is_unique else None
    for label in "xyz" if alone is not None else "":
        counts = [sum(alone[text] == label for text in part) for part in parts]
        assert max(counts) - min(counts) <= 1


# --- The contrastive term


def by_hand(cls: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Equation 2 in float64, one pair after the other."""
    cls, total = F.normalize(cls.double(), dim=1), 0.0
    for i in range(len(labels)):
        others = [k for k in range(len(labels)) if k != i]
        partners = [k for k in others if labels[k] == labels[i]]
        whole = sum(torch.exp(cls[i] @ cls[k] / 0.1) for k in others)
        terms = [-torch.log(torch.exp(cls[i] @ cls[j] / 0.1) / whole) for j in partners]
        total += sum(terms) / max(1, len(partners))
    learnt = 1 - F.cross_entropy(logits.double(), labels) / torch.tensor(logits.shape[1]).log()
    return float(total * min(1, max(0, 2 * float(learnt))))


@pytest.mark.parametrize("sure", [0.0, 0.6, 5.0])  # nothing is learnt, some, all
@pytest.mark.parametrize("labels", [[0, 1, 0, 2, 1, 0], [0, 1, 2], [1, 1, 0], [0]])
def test_the_contrastive_term_is_equation_2(sure, labels) -> None:
    torch.manual_seed(0)
    labels = torch.tensor(labels)
    read, last = torch.randn(2, len(labels), 4, 8)
    mask = torch.arange(4) <= torch.arange(len(labels))[:, None]  # the rest is padding
    logits = sure * F.one_hot(labels, 3).float()
    output = type("Output", (), {"hidden_states": [None, read, last], "logits": logits})
    found = lora_scratch.contrast(output, {"attention_mask": mask}, labels)
    means = torch.stack([one[real].mean(dim=0) for one, real in zip(read, mask, strict=True)])
    expected = sum(by_hand(one, logits, labels) for one in (last[:, 0], means))
    assert float(found) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert (float(found) == 0) == (sure == 0 or len({*labels.tolist()}) == len(labels))


def test_one_sentence_of_a_kind_costs_no_gradient() -> None:
    hidden = torch.randn(3, 2, 8, requires_grad=True)
    output = type("Output", (), {"hidden_states": [hidden, hidden], "logits": 5 * torch.eye(3)})
    mask = {"attention_mask": torch.ones(3, 4)}  # of which Funnel, say, makes two
    lora_scratch.contrast(output, mask, torch.tensor([0, 1, 2])).backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
