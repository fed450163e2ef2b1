"""Two processes train as one: the same loss at every step, a short last batch included."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import NO_DROPOUT, flags

import lora_scratch


@pytest.mark.slow
@pytest.mark.parametrize(("script", "balance"), [("lora_scratch.py", []), ("lora_peft.py", ["--balance"])])
def test_two_processes_follow_the_loss_path_of_one(
    script: str, balance: list[str], tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | NO_DROPOUT), encoding="utf-8")
    path = str(Path(lora_scratch.__file__).with_name(script))
    data = shutil.copytree(tiny_data, tmp_path / "data")
    header, *rows = (data / "train.tsv").read_text(encoding="utf-8").splitlines()
    rows = [row for i, row in enumerate(rows) if i % 3 or not row.endswith("1")]  # uneven labels
    kept = [header, *rows[:27]]
    (data / "train.tsv").write_text("\n".join(kept) + "\n", encoding="utf-8")
    # 27 sentences in batches of 13: the last has one, of which the second process gets nothing.
    more = ["--batch-size", "13", "--dropout", "0", "--epochs", "3", "--lr", "0.01", "--log-every", "1"]
    arguments = flags(base, data, *more, *balance, "--threads", "1")
    records, states = [], []
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc-per-node", "2"])):
        output = tmp_path / name / ("a.pt" if script == "lora_scratch.py" else "a")
        done = subprocess.run(
            [sys.executable, *launcher, path, *arguments, "--output", str(output)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch 1:") == 1  # one process speaks for all
        records.append(json.loads(output.with_suffix(".json").read_text(encoding="utf-8")))
        states.append(torch.load(output.with_name(f"{output.name}.state"), weights_only=True))
    assert len(states[0]["losses"]) == 9
    assert torch.allclose(states[0]["losses"], states[1]["losses"], rtol=0, atol=1e-5)
    assert records[0]["result"]["correct"] == records[1]["result"]["correct"]
    for one, two in zip(records[0]["epochs"], records[1]["epochs"], strict=True):
        assert one["total"] == two["total"] == 10 and abs(one["eval_loss"] - two["eval_loss"]) < 1e-4
