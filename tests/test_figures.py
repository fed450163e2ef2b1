"""The programs that make the figures: what they train, how they take turns, what they write."""

from pathlib import Path

import lora_scratch

import full_finetune
import measure
import minutes
import own_tables
import plot_results
import pytest
import tables
import torch
import trainer
from conftest import flags
from measure import FIGURES
from safetensors.torch import load_file


def test_full_fine_tuning_trains_the_base_and_is_written_whole(tiny_base, tiny_data, tmp_path) -> None:
    more = ["--epochs", "30", "--lr", "0.003", "--output", tmp_path / "full"]
    assert full_finetune.main(flags(tiny_base, tiny_data, *more)) is None
    record = measure.read_record(tmp_path / "full.json")
    parameters = record["parameters"]
    assert parameters["lora"] == 0
    assert parameters["trained"] == parameters["head"] + parameters["frozen base"]
    before = load_file(tiny_base / "model.safetensors")
    after = load_file(tmp_path / "full" / "model.safetensors")
    for name, tensor in before.items():
        if "word_embeddings" not in name and "position" not in name:  # unused words have no gradient
            assert not torch.equal(tensor, after[f"distilbert.{name}"]), name
    assert record["result"]["correct"] == record["epochs"][-1]["correct"] == 10


@pytest.mark.parametrize("more", [[], ["--bf16"]])
def test_the_trainer_trains_what_best_trains(more: list, tiny_base: Path, tiny_data: Path, tmp_path) -> None:
    data = ["--model", str(tiny_base), "--dataset", str(tiny_data), "--recipe", "best", "--max-steps", "2"]
    trainer.main([*data, "--grouped", *more, "--output", str(tmp_path / "a")])
    lora_scratch.main([*data, "--output", str(tmp_path / "b.pt")])
    theirs, ours = (measure.read_record(tmp_path / f"{name}.json") for name in "ab")
    assert theirs["parameters"]["trained"] == ours["parameters"]["trained"]
    assert theirs["result"]["total"] == 10 and len(theirs["result"]["answers"]) == 10


def test_what_is_measured_is_kept_and_not_measured_again(tmp_path: Path) -> None:
    path, order = tmp_path / "new" / "record.json", []

    def measured(name: str, seed: int):
        return lambda: order.append((name, seed)) or {"seconds": 1.0}

    def go(record: dict, seeds: list[int]) -> None:
        cells = [(record["runs"][n], seed, measured(n, seed)) for seed in seeds for n in "ab"]
        measure.take_turns(cells, lambda: measure.write_record(path, record))

    go(measure.continue_record(path, {"steps": 1}, {"a": [], "b": []}), [2])
    go(measure.continue_record(path, {"steps": 1}, {"a": [], "b": []}), [1, 2])
    assert order == [("a", 2), ("b", 2), ("a", 1), ("b", 1)]
    assert [run["seed"] for run in measure.read_record(path)["runs"]["b"]] == [1, 2]
    with pytest.raises(SystemExit, match="steps"):
        measure.continue_record(path, {"steps": 2}, {})


def test_a_process_that_fails_ends_the_program_with_its_error(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("print('fine')\n")
    done = measure.run_process([script])
    assert done.printed == "fine\n" and done.seconds > 0 and done.peak_mb > 1
    script.write_text("raise ValueError('reason 7')\n")
    with pytest.raises(SystemExit, match="reason 7"):
        measure.run_process([script])


@pytest.mark.slow
def test_each_way_of_minutes_is_run_and_judged(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    given = ["--model", tiny_base, "--dataset", tiny_data, "--output", tmp_path / "minutes.json"]
    measure.run_process([FIGURES / "minutes.py", *given, "--steps", 2, "--seeds", 1, 2])
    record = measure.read_record(tmp_path / "minutes.json")
    assert record["runs"].keys() == minutes.WAYS.keys()
    for runs in record["runs"].values():
        assert [run["seed"] for run in runs] == [1, 2] and all(run["total"] == 10 for run in runs)


@pytest.mark.slow
def test_lora_and_trainer_answer_an_own_table(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    texts, labels = trainer.read_table(tiny_data, "train.tsv")
    (tmp_path / "set").mkdir()
    for name in ("train", "test"):
        frame = own_tables.DataFrame({"text": texts, "label": labels})
        frame.to_csv(tmp_path / "set" / f"{name}.csv", index=False)
    given = ["--data", tmp_path, "--model", tiny_base, "--output", tmp_path / "record.json"]
    measure.run_process([FIGURES / "own_tables.py", *given, "--rows", 20, "--ways", "lora", "trainer"])
    cell = measure.read_record(tmp_path / "record.json")["cells"]["set 20"]
    assert len(cell["lora"]) == len(cell["trainer"]) == 3 and cell["lora"][0]["accuracy"] > 90


@pytest.mark.slow
def test_a_small_benchmark_writes_rates_and_ratios(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "folder" / "record.json"
    only = ["scratch", "peft", "trainer", "ceiling", "playground", "pipeline-fp32-1"]
    given = ["--dataset", tiny_data, "--tokenizer", tiny_base, "--output", output, "--only", *only]
    given += ["--rounds", 1, "--phrases", 20, "--lines", 3, "--threads", 1, "--layers", 1, "--dim", 32]
    measure.run_process([FIGURES / "benchmark.py", *given])
    record = measure.read_record(output)
    rows, auto = {row["name"]: row for row in record["rows"]}, record["settings"]["auto"]
    trained = {f"{kind}-{precision}" for kind in only[:4] for precision in (auto, "fp32")}
    assert rows.keys() == trained | {"playground-fp32", "pipeline-fp32-1"}
    for row in rows.values():
        assert len(row["rounds"]) == 1 and row["rate"] > 0 and row["peak_mb"] > 50
    ratio = rows[f"scratch-{auto}"]["rate"] / rows["trainer-fp32"]["rate"]
    assert rows["trainer-fp32"]["ratio"] == pytest.approx([ratio] * 3)
    assert str(tmp_path) not in output.read_text(encoding="utf-8")


def test_the_figure_is_of_the_records(tmp_path: Path) -> None:
    digest = plot_results.digest(*plot_results.committed())
    assert f"records {digest}" in (measure.RESULTS / "results.svg").read_text(encoding="utf-8")
    one = str(measure.RESULTS / "default_seed42.json")
    plot_results.main([one, "--output", str(tmp_path / "own.svg")])
    assert "default_seed42" in (tmp_path / "own.svg").read_text(encoding="utf-8")


def test_the_records_are_of_the_runs_that_the_tables_name() -> None:
    for run in tables.default_runs():
        assert run["epochs"][-1]["epoch"] == 3
    for name, runs in measure.read_record("best").items():
        assert [run["settings"]["seed"] for run in runs] == measure.SEEDS
        for run in runs:
            assert run["epochs"][-1]["correct"] == run["result"]["correct"]
            assert run["precision"] == "bfloat16" and run["result"]["total"] == 872
            if name != "full fine-tuning":
                for key in ("lr", "batch_size", "targets"):
                    assert run["settings"][key] == lora_scratch.RECIPES["best"][key]


def test_a_block_that_was_edited_by_hand_is_written_anew() -> None:
    text = f"above\n<!-- own -->\n{tables.BLOCKS['own']()}\n<!-- /own -->\nbelow\n"
    assert tables.fill(text) == text and tables.fill(text.replace("35.1", "36.1")) == text
    with pytest.raises(KeyError):
        tables.fill("<!-- nothing -->\n\n<!-- /nothing -->")
