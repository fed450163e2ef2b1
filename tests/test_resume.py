"""Nothing is lost: stopped and killed runs continue to the same bits, in both scripts."""

import importlib
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import lora_scratch

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SCRIPTS, flags, output_of, refused, tensors_of, without_notes
from safetensors.torch import load_file, save_file

import lora_peft


def same_bits(one: Path, two: Path) -> bool:
    first, second = tensors_of(one), tensors_of(two)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def stop_at(call: int, patch: pytest.MonkeyPatch, number: int) -> None:
    """Send this process a signal when a batch is put together for the `call`-th time."""
    collate, calls = lora_scratch.collate, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
            assert signal.getsignal(number) is signal.SIG_DFL  # the second ends it at once
        return collate(*args)

    patch.setattr(lora_scratch, "collate", interrupt)


def exit_code(call: Callable[[], None]) -> int:
    with pytest.raises(SystemExit) as end:
        call()
    return end.value.code


LONG = ["--epochs", 5, "--lr", 0.01, "--output"]
MOMENTS = [(2, signal.SIGINT), (7, signal.SIGTERM), (8, signal.SIGHUP), (20, signal.SIGINT)]


@pytest.fixture(scope="module")
def whole(tiny_base, tiny_data, tmp_path_factory) -> dict:
    """The result of an undisturbed run of each script."""
    folder = tmp_path_factory.mktemp("whole")
    outputs = {script: output_of(script, folder) for script in (lora_scratch, lora_peft)}
    for script, output in outputs.items():
        assert script.main(flags(tiny_base, tiny_data, *LONG, output)) is None
    return outputs


@pytest.mark.parametrize(("moment", "number"), MOMENTS)  # every fourth is an evaluation
@SCRIPTS
def test_a_stopped_run_ends_in_the_same_bits(
    script, moment, number, whole, tiny_base, tiny_data, tmp_path, capsys
) -> None:
    former = signal.signal(number, signal.default_int_handler)  # nohup ignores one
    output = output_of(script, tmp_path)
    stopped = flags(tiny_base, tiny_data, *LONG, output)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(moment, patch, number)
        assert exit_code(lambda: script.main(stopped)) == 128 + number and not output.exists()
    assert signal.signal(number, former) is signal.default_int_handler
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    assert script.main([*stopped, "--resume"]) is None
    assert same_bits(whole[script], output)


@pytest.fixture(scope="module")
def stopped(tiny_base, tiny_data, tmp_path_factory) -> list[str]:
    """The command of a run that was stopped after its second step."""
    output = tmp_path_factory.mktemp("stopped") / "a.pt"
    arguments = flags(tiny_base, tiny_data, "--max-steps", 4, "--lr", 0.01, "--output", output)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(2, patch, signal.SIGTERM)
        assert exit_code(lambda: lora_scratch.main(arguments)) == 143
    assert torch.load(f"{output}.state", weights_only=True)["done"] == 2
    return arguments


def test_what_changes_no_training_may_change(stopped, tiny_base, tiny_data, tmp_path, capsys) -> None:
    shutil.copy(f"{stopped[-1]}.state", tmp_path / "a.pt.state")
    (tmp_path / "base").symlink_to(tiny_base)
    arguments = flags(tmp_path / "base", tiny_data / ".." / tiny_data.name, "--max-steps", 4)
    more = ["--lr", 0.01, "--alpha", 16, "--log-every", 1, "--save-every", 7, "--resume"]
    lora_scratch.main([*arguments, *map(str, more), "--output", str(tmp_path / "a.pt")])
    assert "resumed after step 2" in capsys.readouterr().out
    lora_scratch.main([*stopped[:-1], str(tmp_path / "whole.pt")])
    assert same_bits(tmp_path / "a.pt", tmp_path / "whole.pt")


OTHER = "lr=0.1 seed=7 r=4 alpha=8 dropout=0 warmup=0.1 weight-decay=0 max-grad-norm=0 max-steps=5"
OTHER += " contrast=0.5 batch-size=8 max-length=64 layers=1"
OTHER += " precision=bf16 targets=k_lin use-rslora freeze-head"


@pytest.mark.parametrize("flag", OTHER.split())
def test_other_settings_are_refused_by_name(flag, stopped, tmp_path) -> None:
    state = shutil.copy(f"{stopped[-1]}.state", tmp_path / "a.pt.state")
    arguments = [*stopped[:-1], str(tmp_path / "a.pt"), f"--{flag}", "--resume"]
    name, _, value = flag.replace("-", "_").partition("=")
    refused(lambda: lora_scratch.main(arguments), state, name, value.replace("bf16", "bfloat16"))
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize(
    "kind", ["training data", "validation data", "fingerprint", "base_config", "version"]
)
def test_other_data_or_another_base_is_refused(kind, stopped, tiny_base, tiny_data, tmp_path) -> None:
    shutil.copy(f"{stopped[-1]}.state", tmp_path / "a.pt.state")
    base, data = (shutil.copytree(path, tmp_path / path.name) for path in (tiny_base, tiny_data))
    if kind == "fingerprint":
        weights = load_file(base / "model.safetensors")
        weights["embeddings.LayerNorm.bias"] += 1e-3
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    elif kind == "version":  # before it was written down
        state = torch.load(tmp_path / "a.pt.state")
        del state["settings"]["version"]
        torch.save(state, tmp_path / "a.pt.state")
    elif kind == "base_config":  # with the same weights and answers
        config = (base / "config.json").read_text("utf-8")
        (base / "config.json").write_text(config.replace('"dropout": 0.1', '"dropout": 0.2'), "utf-8")
    else:
        table = data / ("train.tsv" if kind == "training data" else "dev.tsv")
        table.write_text(table.read_text("utf-8").replace("\t1\n", "\t0\n", 1), "utf-8")
    arguments = flags(base, data, *stopped[-6:-1], tmp_path / "a.pt", "--resume", "--overwrite")
    refused(lambda: lora_scratch.main(arguments), kind, tmp_path / "a.pt.state")


def test_no_state_is_the_start_and_a_finished_run_stays(tiny_base, tiny_data, tmp_path, capsys) -> None:
    arguments = flags(tiny_base, tiny_data, "--max-steps", 4, "--output", tmp_path / "a.pt", "--resume")
    lora_scratch.main(arguments)
    assert "resumed" not in capsys.readouterr().out
    before = shutil.copy(tmp_path / "a.pt", tmp_path / "before.pt")
    lora_scratch.main(arguments)
    assert "resumed after step 4" in capsys.readouterr().out
    assert same_bits(before, tmp_path / "a.pt")
    assert torch.load(before)["record"] == torch.load(tmp_path / "a.pt")["record"]


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_numbers_that_are_not_finite_end_the_run(what, tiny_base, tiny_data, tmp_path, monkeypatch) -> None:
    cross_entropy, step, calls = F.cross_entropy, torch.optim.AdamW.step, []

    def loss(*args, **kwargs):
        return cross_entropy(*args, **kwargs) * (math.nan if len(calls) == 3 and what == "loss" else 1)

    def update(self, *args, **kwargs) -> None:
        step(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 4 and what == "weight":  # the losses until then are finite
            self.param_groups[0]["params"][0].data[0, 0] = math.nan

    monkeypatch.setattr(F, "cross_entropy", loss)
    monkeypatch.setattr(torch.optim.AdamW, "step", update)
    more = ["--save-every", 2, "--lr", 0.01, "--output", tmp_path / "a.pt"]
    refused(lambda: lora_scratch.main(flags(tiny_base, tiny_data, *more)), "step 4", "--lr")
    state = torch.load(tmp_path / "a.pt.state", weights_only=True)
    assert state["done"] == 3 and state["losses"].isfinite().all()
    assert all(tensor.isfinite().all() for tensor in state["trained"].values())
    assert not (tmp_path / "a.pt").exists()


def command(script, base: Path, data: Path, output: Path, *extra: object) -> list[str]:
    """A run that is long enough to be interrupted, with a state every 3 steps."""
    more = ["--epochs", 20, "--lr", 0.01, "--save-every", 3, "--threads", 1, *extra]
    return [sys.executable, script.__file__, *flags(base, data, *more, "--output", output)]


def child(name: str, arguments: list[str]) -> None:
    """A process of its own, forked from a server that has the imports behind it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    sys.exit(importlib.import_module(name).main(arguments))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@SCRIPTS
def test_stopped_at_random_moments(script, number, tiny_base, tiny_data, tmp_path, monkeypatch) -> None:
    """Each time a fresh run, hit between 30 and 90 % of an undisturbed one, then resumed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_scratch", "lora_peft"])

    def start(output: Path, *extra: str) -> multiprocessing.Process:
        arguments = command(script, tiny_base, tiny_data, output, "--epochs", 60, *extra)[2:]
        process = context.Process(target=child, args=(script.__name__, arguments))
        process.start()
        return process

    def finish(process: multiprocessing.Process) -> int:
        process.join()
        return process.exitcode

    whole = output_of(script, tmp_path / "whole")
    for _ in range(2):  # the first waits for the imports
        started = time.monotonic()
        assert finish(start(whole)) == 0
        seconds = time.monotonic() - started
    hits, trials, chance = 0, 0, random.Random(0)
    while hits < 20:
        trials += 1
        assert trials <= 60
        output = output_of(script, tmp_path / str(trials))
        process = start(output)
        process.join(chance.uniform(0.3, 0.9) * seconds)
        if process.is_alive():
            os.kill(process.pid, number)
        code = finish(process)
        # Before the loop SIGTERM ends a process at once; in it the step is finished and saved.
        assert code in ((0, -number) if number == signal.SIGKILL else (0, -number, 128 + number))
        if code == 0:  # the machine has become faster: it was done before the moment came
            seconds *= 0.9
            continue
        hits += 1
        assert finish(start(output, "--resume")) == 0
        assert same_bits(whole, output)


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_the_last_state(tiny_base, tiny_data, tmp_path) -> None:
    """A real one with room for one state but not for two: the run ends with one line."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=112k", "tmpfs", disk], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("may not mount a tmpfs here (needs root)")
    try:
        arguments = command(lora_scratch, tiny_base, tiny_data, disk / "a.pt")
        done = subprocess.run(arguments, capture_output=True, text=True)
        said = without_notes(done.stderr)
        assert done.returncode == 2 and said.count("\n") == 1
        assert str(disk / "a.pt.state") in said
        assert torch.load(disk / "a.pt.state", weights_only=True)["done"] > 0
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        whole = command(lora_scratch, tiny_base, tiny_data, tmp_path / "whole.pt")
        for line in ([*arguments, "--resume"], whole):
            subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        assert same_bits(tmp_path / "whole.pt", disk / "a.pt")
    finally:
        subprocess.run(["umount", disk], check=False)
