"""Two processes train as one: the same loss at every step, a short last batch included."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import NO_DROPOUT, SCRIPTS, flags, output_of, tensors_of


@pytest.mark.slow
@SCRIPTS
def test_two_processes_follow_the_loss_path_of_one(script, tiny_base, tiny_data, tmp_path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | NO_DROPOUT), encoding="utf-8")
    data = shutil.copytree(tiny_data, tmp_path / "data")
    rows = (data / "train.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    # 27 sentences in batches of 13: the last has one, of which the second process gets nothing.
    (data / "train.tsv").write_text("".join(rows[:28]), encoding="utf-8")
    more = ["--batch-size", 13, "--dropout", 0, "--epochs", 3, "--lr", 0.01, "--threads", 1]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    records, states, names = [], [], []
    for name, launcher in (("one", []), ("two", torchrun)):
        output = output_of(script, tmp_path / name)
        command = [script.__file__, *flags(base, data, *more, "--output", output)]
        done = subprocess.run([sys.executable, *launcher, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch 1:") == 1  # one process speaks for all
        records.append(json.loads((tmp_path / name / "a.json").read_text(encoding="utf-8")))
        states.append(torch.load(f"{output}.state", weights_only=True))
        names.append(tensors_of(output).keys())
    assert names[0] == names[1]
    losses = [state["losses"] for state in states]
    assert len(losses[0]) == 9 and torch.allclose(*losses, rtol=0, atol=1e-5)
    assert records[0]["result"]["confusion"] == records[1]["result"]["confusion"]
    for one, two in zip(records[0]["epochs"], records[1]["epochs"], strict=True):
        assert one["total"] == two["total"] == 10
        assert one["eval_loss"] == pytest.approx(two["eval_loss"], abs=1e-4)
