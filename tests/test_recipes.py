"""What the results' table is made of: full fine-tuning, and runs that are trained once."""

import json
import subprocess
import sys
from pathlib import Path

import full_finetune
import make_slice
import minutes
import pytest
import recipes
import torch
from conftest import flags
from safetensors.torch import load_file

import lora_scratch


def test_full_fine_tuning_trains_the_base_too_and_is_written_whole(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    more = ["--epochs", "10", "--lr", "0.003", "--output", tmp_path / "full"]
    assert full_finetune.main(flags(tiny_base, tiny_data, *more)) is None
    record = json.loads((tmp_path / "full.json").read_text(encoding="utf-8"))
    parameters = record["parameters"]
    assert parameters["trained"] == parameters["head"] + parameters["frozen base"] and parameters["lora"] == 0
    assert f"all {parameters['trained']:,} parameters" in capsys.readouterr().out
    before = load_file(tiny_base / "model.safetensors")
    after = load_file(tmp_path / "full" / "model.safetensors")
    for name, tensor in before.items():
        if "word_embeddings" not in name and "position" not in name:  # words that do not occur have no gradient
            assert not torch.equal(tensor, after[f"distilbert.{name}"]), name
    assert record["result"]["correct"] == record["epochs"][-1]["correct"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("script", ["lora_scratch.py", "tests/full_finetune.py"])
def test_a_recipe_is_trained_once_and_its_record_is_checked(
    script: str, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    settings = {"model": str(tiny_base), "dataset": str(tiny_data), "train_samples": 8, "epochs": 1, "lr": 1e-3}
    record = recipes.train_once(script, settings, ["--r", "2"], tmp_path / "run_lr1e-03")
    written = (tmp_path / "run_lr1e-03.json").stat().st_mtime_ns
    assert record["settings"]["lr"] == 1e-3 and record["epochs"][0]["steps"] == 1
    assert recipes.train_once(script, settings, ["--r", "2"], tmp_path / "run_lr1e-03") == record
    assert (tmp_path / "run_lr1e-03.json").stat().st_mtime_ns == written
    with pytest.raises(SystemExit, match="train_samples was 8 and is now 9"):
        recipes.train_once(script, settings | {"train_samples": 9}, [], tmp_path / "run_lr1e-03")


def test_no_part_of_a_sentence_that_is_held_out_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [f"it is the {number} th film that bores me" for number in range(8)]
    rows = [(text, number % 2) for number, text in enumerate(whole)]
    rows += [(f"the {number} th film", number % 2) for number in range(8)] + [("bores me", 0), ("a short one", 1)]
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "".join(f"{text} \t{label}\n" for text, label in rows))
    monkeypatch.setattr(make_slice, "HELD_OUT", 3)
    output = tmp_path / "slice"
    monkeypatch.setattr("sys.argv", ["make_slice.py", "--dataset", str(tmp_path), "--output", str(output)])
    make_slice.main()
    train, dev = ((output / name).read_text().splitlines()[1:] for name in ("train.tsv", "dev.tsv"))
    held_out = [line.split("\t")[0] for line in dev]
    assert len(held_out) == 3 and set(held_out) < set(whole)
    kept = [(text, number % 2) for number, text in enumerate(whole) if text not in held_out]
    kept += [(f"the {number} th film", number % 2) for number in range(8) if whole[number] not in held_out]
    assert train == [f"{text}\t{label}" for text, label in [*kept, ("a short one", 1)]]  # every one has "bores me"


@pytest.mark.parametrize("way", ["trainer-fp32", "trainer-bf16"])
def test_the_trainer_trains_what_best_trains(way: str, tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    data = ["--model", tiny_base, "--dataset", tiny_data, "--seed", 1]
    command = [minutes.__file__, *data, "--way", way, "--steps", 2, "--output", tmp_path / "a"]
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    ours = ["--recipe", "best", "--max-steps", "2", "--output", tmp_path / "b.pt"]
    lora_scratch.main([str(flag) for flag in [*data, *ours]])
    trained = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))["parameters"]["trained"]
    assert told["trained"] == trained and told["total"] == 10
