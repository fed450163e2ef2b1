"""A user's own table: the recipe that follows it, what is told about it, the columns found, the result's interval."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import NO_DROPOUT, Run, flags

import lora_peft
import lora_scratch
from lora_scratch import InputError, choose_recipe, in_words, load_tables, make_parser, wilson_interval


def arguments(*more: object):
    return make_parser("", "a.pt").parse_args([str(flag) for flag in more])


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def told(path: Path, capsys: pytest.CaptureFixture, *more: str) -> list[str]:
    """The notes about a table."""
    load_tables(arguments("--dataset", path, *more))
    return [line.removeprefix(f"note: {path}: ") for line in capsys.readouterr().err.splitlines()]


# --- The recipe


@pytest.mark.parametrize(
    ("more", "rows", "expected"),
    [
        (["--dataset", "mine.csv"], 100, (["all-linear"], 1e-3, None, 400)),
        (["--dataset", "mine.csv"], 2200, (["all-linear"], 1e-3, 3, None)),
        (["--dataset", "mine.csv"], 20_000, (["all-linear"], 1e-3, 1, None)),
        (["--dataset", "nyu-mll/glue"], 67_349, (None, 2e-4, 3, None)),
        (["--dataset", "./dataset/../dataset/glue_sst2_local"], 67_349, (None, 2e-4, 3, None)),
        (["--dataset", "mine.csv", "--recipe", "published"], 100, (None, 2e-4, 3, None)),
        (["--dataset", "mine.csv", "--epochs", "2", "--lr", "0.1"], 100, (["all-linear"], 0.1, 2, None)),
        (["--dataset", "mine.csv", "--recipe", "best"], 67_349, (["all-linear"], 1e-3, 2, None)),
        (["--dataset", "mine.csv", "--recipe", "best"], 100, (["all-linear"], 1e-3, None, 400)),
        (["--dataset", "mine.csv", "--max-steps", "7", "--targets", "q_lin"], 100, (["q_lin"], 1e-3, None, 7)),
    ],
)
def test_the_recipe_follows_the_data_and_every_flag_overrides_it(more: list, rows: int, expected: tuple) -> None:
    args = arguments(*more)
    choose_recipe(args, rows, 2)
    targets, lr, epochs, max_steps = expected
    assert (args.targets, args.lr, args.max_steps) == (targets, lr, max_steps) and args.warmup == 0.06
    assert epochs is None or args.epochs == epochs


@pytest.mark.parametrize(
    ("more", "rows", "size", "ending"),
    [
        (["--recipe", "published"], 67_349, 16, "0.0002, 3 epochs\n"),
        (["--recipe", "own"], 2200, 16, "0.001, 3 epochs\n"),
        (["--recipe", "own", "--batch-size", "8"], 1100, 8, "0.001, 3 epochs, batches of 8\n"),
        (["--recipe", "best"], 6400, 32, "0.001, 2 epochs, batches of 32\n"),
        (["--recipe", "best"], 6300, 32, "0.001, 400 steps, batches of 32\n"),
        (["--recipe", "best", "--batch-size", "16"], 3200, 16, "0.001, 2 epochs\n"),
    ],
)
def test_the_batch_is_the_recipes_and_told(
    more: list, rows: int, size: int, ending: str, capsys: pytest.CaptureFixture
) -> None:
    args = arguments("--dataset", "mine.csv", *more)
    choose_recipe(args, rows, 2)
    assert args.batch_size == size and capsys.readouterr().out.endswith(ending)


@pytest.mark.parametrize(("labels", "rate"), [(19, 1e-3), (20, 2e-3), (77, 2e-3)])
def test_many_labels_double_the_rate(labels: int, rate: float) -> None:
    args = arguments("--dataset", "mine.csv")
    choose_recipe(args, 1000, labels)
    assert args.lr == rate
    args = arguments("--dataset", "mine.csv", "--lr", "0.1")
    choose_recipe(args, 1000, labels)
    assert args.lr == 0.1


@pytest.mark.parametrize("script", [lora_scratch, lora_peft])
def test_both_scripts_tell_and_keep_the_recipe(
    script, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = write(tmp_path / "a.csv", "sentence,label\n" + "".join(f"film {i},{i % 2}\n" for i in range(40)))
    output = tmp_path / ("a.pt" if script is lora_scratch else "a")
    flags = ["--model", tiny_base, "--dataset", data, "--precision", "fp32", "--max-steps", 3, "--output", output]
    script.main([str(flag) for flag in flags])
    assert "recipe      own, 36 rows, 2 labels: all linear layers, 0.001, 3 steps\n" in capsys.readouterr().out
    settings = lora_scratch.json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))["settings"]
    assert settings["recipe"] == "own" and settings["lr"] == 1e-3 and settings["targets"] == ["all-linear"]


# --- What the data tells


def test_nothing_is_told_where_there_is_nothing_to_tell(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "a.csv", "sentence,label\n" + "".join(f"film {i},{i % 2}\n" for i in range(40)))
    assert told(path, capsys) == []


def test_repeats_contradictions_leaks_and_rare_labels_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [f"film {i},{i % 2}\n" for i in range(40)]
    rows[10:10] = ["film 3,1\n", "film 4,1\n", "odd,2\n"]  # rows 11 to 13
    write(tmp_path / "train.csv", "sentence,label\n" + "".join(rows))
    write(tmp_path / "dev.csv", "sentence,label\nfilm 7,1\nanother,0\n")
    assert told(tmp_path, capsys) == [
        "2 rows repeat the text of another, such as rows 4, 11",
        "1 texts have more than one label, such as rows 5 (0) and 12 (1)",
        "1 validation texts are among the training rows: the result is too good",
        "labels with fewer than ten rows: 2 (1)",
    ]


def test_no_held_out_text_is_trained_on(tmp_path: Path) -> None:
    rows = "".join(f"film {i % 25},{i % 5}\n" for i in range(200))
    train, held, _ = load_tables(arguments("--dataset", write(tmp_path / "a.csv", f"sentence,label\n{rows}")))
    assert not set(train.text) & set(held.text) and set(train.label) == {0, 1, 2, 3, 4}
    assert len(train.text) + len(held.text) == 200 and len(set(held.text)) == 5


def test_a_cut_text_is_told_with_the_length_that_cuts_none(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    texts = ["film " * 30, "film " * 9, *(f"a film {i}" for i in range(30))]
    write(tmp_path / "a.csv", "sentence,label\n" + "".join(f"{text},{i % 2}\n" for i, text in enumerate(texts)))
    Run(tiny_base, tmp_path / "a.csv", tmp_path / "a.pt", "--max-steps", "1", "--max-length", "20", "--seed", "1")
    lines = [line for line in capsys.readouterr().err.splitlines() if "cut at" in line]
    assert lines and all("1 of " in line and "--max-length 32" in line for line in lines)


# --- Columns


@pytest.mark.parametrize(
    ("header", "row", "expected"),
    [
        ("review,stars", "a film about {i} and more,{l}", ("review", "stars")),
        ("Category,Message", "{l},a film about {i} and more", ("Message", "Category")),
        ("id,v1,v2,", "{i},{l},a film about {i} and more,", ("v2", "v1")),
        ("sentence,label,title", "film {i},{l},a film about {i} and more", ("sentence", "label")),
    ],
)
def test_columns_are_found(header: str, row: str, expected: tuple, tmp_path: Path, capsys) -> None:
    rows = "".join(row.format(i=i, l=i % 2) + "\n" for i in range(40))
    args = arguments("--dataset", write(tmp_path / "a.csv", f"{header}\n{rows}"))
    train, _, names = load_tables(args)
    assert (args.text_column, args.label_column) == expected and names == ["0", "1"] and len(train.text) == 36
    said = f"{expected[0]!r} is taken for the text, {expected[1]!r} for the label" in capsys.readouterr().err
    assert said is (expected != ("sentence", "label"))


def test_two_columns_that_could_be_meant_are_listed(tmp_path: Path) -> None:
    rows = "".join(f"a film about {i} and more,so {i} it is and ever was,{i % 2}\n" for i in range(40))
    with pytest.raises(InputError, match="several columns could be the text: title, body; choose with --text-column"):
        load_tables(arguments("--dataset", write(tmp_path / "a.csv", f"title,body,label\n{rows}")))


# --- What a result says


@pytest.mark.parametrize("total", [20, 39, 872])
def test_the_interval_holds_the_true_share_in_95_of_100_samples(total: int) -> None:
    """The exact chance, by the binomial distribution, at a hundred true shares."""
    covered = []
    for share in (torch.arange(1, 101) / 101).tolist():
        chance = 0.0
        for right in range(total + 1):
            low, high = wilson_interval(right, total)
            if low <= share <= high:
                log = math.lgamma(total + 1) - math.lgamma(right + 1) - math.lgamma(total - right + 1)
                chance += math.exp(log + right * math.log(share) + (total - right) * math.log(1 - share))
        covered.append(chance)
    assert 0.945 < sum(covered) / len(covered) < 0.965 and min(covered) > 0.83


def test_an_interval_by_hand() -> None:
    assert wilson_interval(37, 39) == pytest.approx((0.8311, 0.9858), abs=1e-4)
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == 1


def test_a_result_says_what_it_is_worth() -> None:
    lines = in_words(torch.tensor([[30, 1], [2, 6]]), ["no", "yes"]).splitlines()
    assert lines == [
        "macro-F1 87.6 %; always 'no': 79.49 %",
        "accuracy 92.31 % (36/39), 95 % between 80 and 97",
    ]


@pytest.mark.parametrize(
    ("matrix", "why"),
    [([[30, 0], [9, 0]], "it answers one label every time"), ([[25, 5], [5, 4]], "no better than the commonest label")],
)
def test_a_run_that_learnt_nothing_says_so(matrix: list, why: str, capsys) -> None:
    lora_scratch.warn_if_nothing_is_learnt(torch.tensor(matrix))
    line = capsys.readouterr().out
    assert line.startswith("nothing is learnt yet: ") and why in line and "--max-steps" in line


def test_a_run_ends_with_its_interval(tiny_base: Path, tiny_data: Path, tmp_path: Path, capsys) -> None:
    lora_scratch.main(flags(tiny_base, tiny_data, "--max-steps", 1, "--output", tmp_path / "a.pt"))
    assert ", 95 % between " in capsys.readouterr().out.splitlines()[-2]


# --- Uneven labels


def test_label_weights_are_the_balanced_ones_and_one_on_average(tiny_base: Path) -> None:
    model = lora_scratch.load_base(str(tiny_base), None, ["a", "b", "c", "never"], 128).model
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    weights = lora_scratch.weigh_labels(labels, model)
    assert torch.allclose(weights[:3], torch.tensor([10 / (3 * 6), 10 / (3 * 3), 10 / 3]))  # rows / (labels · count)
    assert weights[labels].mean().item() == pytest.approx(1) and weights.isfinite().all()


@pytest.mark.parametrize("script", [lora_scratch, lora_peft])
def test_balance_weighs_each_sentences_loss(script, tiny_base: Path, tmp_path: Path, monkeypatch) -> None:
    """The first loss of an uneven table is the weighted mean of the sentences' own losses."""
    rows = [(f"a film {i}", "no") for i in range(9)] + [("it never ends", "yes")] * 3
    for name in ("train", "dev"):
        with open(tmp_path / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("sentence", "label"), *rows])
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | NO_DROPOUT), encoding="utf-8")
    found = {}
    real = lora_scratch.evaluate

    def spy(model, sentences, batch_size):
        logits = lora_scratch.predict(model, sentences, batch_size)
        found["losses"] = torch.nn.functional.cross_entropy(logits, sentences.labels, reduction="none")
        found["labels"] = sentences.labels
        return real(model, sentences, batch_size)

    monkeypatch.setattr(lora_scratch, "evaluate", spy)
    more = ["--lr", 0, "--dropout", 0, "--batch-size", 12, "--max-steps", 1]  # so the model stays as it starts
    losses = []
    for balance in ([], ["--balance"]):
        output = tmp_path / f"{len(balance)}{'.pt' if script is lora_scratch else ''}"
        script.main(flags(base, tmp_path, *more, *balance, "--output", output))
        losses.append(json.loads(output.with_suffix(".json").read_text("utf-8"))["epochs"][0]["train_loss"])
    weights = torch.tensor([12 / (2 * 9), 12 / (2 * 3)])[found["labels"]]
    assert losses[0] == pytest.approx(found["losses"].mean().item(), abs=1e-4)
    assert losses[1] == pytest.approx((weights * found["losses"]).mean().item(), abs=1e-4)
    assert abs(losses[0] - losses[1]) > 1e-3


# --- Where it goes


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (["--dataset", "my reviews.csv"], "lora_scratch_my_reviews.pt"),
        (["--dataset", "owner/name"], "lora_scratch_name.pt"),
        (["--dataset", "folder/"], "lora_scratch_folder.pt"),
        (["--dataset", "nyu-mll/glue"], "lora_scratch_distilbert_sst2.pt"),
        ([], "lora_scratch_distilbert_sst2.pt"),
        (["--dataset", "a.csv", "--output", "model/mine.pt"], "mine.pt"),
    ],
)
def test_other_data_has_a_file_of_its_own_so_nothing_trained_is_replaced(more: list, name: str) -> None:
    args = lora_scratch.parse_flags(make_parser("", "model/lora_scratch_distilbert_sst2.pt"), more)
    assert args.output == Path("model") / name


def test_labels_that_differ_in_case_alone_are_told(tmp_path: Path, capsys) -> None:
    rows = "".join(f"text number {i},{label}\n" for i, label in enumerate(["Billing", "BILLING", "tech"] * 12))
    path = write(tmp_path / "t.csv", f"text,label\n{rows}")
    assert "labels that differ in case alone are different labels: Billing, BILLING" in "\n".join(told(path, capsys))
