"""What the results' table is made of: full fine-tuning, and runs that are trained once."""

import json
from pathlib import Path

import full_finetune
import pytest
import recipes
import torch
from conftest import flags
from safetensors.torch import load_file


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
