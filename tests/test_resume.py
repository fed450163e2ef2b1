"""Nothing is lost: runs that are stopped, killed or out of disk go on to the same bits, in both scripts."""

import importlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from conftest import flags, without_notes
from safetensors.torch import load_file, save_file
from torch import nn

import lora_peft
import lora_scratch
from lora_scratch import InputError, TrainingState, make_parser

SCRIPTS = {"lora_scratch.py": "adapter.pt", "lora_peft.py": "adapter"}


def command(script: str, base: Path, data: Path, output: Path, *extra: str) -> list[str]:
    """A run of 60 steps, long enough to be interrupted, with a state every 3 steps."""
    path = Path(lora_scratch.__file__).with_name(script)
    more = ["--epochs", "20", "--lr", "0.01", "--save-every", "3", "--threads", "1", *extra]
    return [sys.executable, str(path), *flags(base, data, "--output", output, *more)]


def tensors(output: Path) -> dict[str, torch.Tensor]:
    """The adapter of a finished run, in either format."""
    if output.suffix == ".pt":
        return torch.load(output, weights_only=True)["state_dict"]
    return load_file(output / "adapter_model.safetensors")


def same_bits(one: Path, two: Path) -> bool:
    first, second = tensors(one), tensors(two)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("stop_at", [2, 6, 7, 8, 20])  # of an epoch's 4 batches the 4th is its evaluation
def test_a_stopped_run_goes_on_to_the_same_bits(
    script: str, stop_at: int, tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = {"lora_scratch.py": lora_scratch.main, "lora_peft.py": lora_peft.main}[script]
    outputs = [tmp_path / folder / SCRIPTS[script] for folder in ("whole", "stopped")]
    whole, stopped = (flags(tiny_base, tiny_data, "--epochs", 5, "--lr", 0.01, "--output", o) for o in outputs)
    assert main(whole) is None
    collate, calls = lora_scratch.collate, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == stop_at:
            signal.raise_signal(signal.SIGINT)
        return collate(*args)

    monkeypatch.setattr(lora_scratch, "collate", interrupt)
    assert main(stopped) == 130 and not outputs[1].exists()
    monkeypatch.setattr(lora_scratch, "collate", collate)
    assert main([*stopped, "--resume"]) is None
    assert same_bits(*outputs)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resume_says_what_it_does(tiny_base: Path, tiny_data: Path, tmp_path: Path, capsys) -> None:
    arguments = flags(tiny_base, tiny_data, "--max-steps", "4", "--resume", "--output", tmp_path / "a.pt")
    lora_scratch.main(arguments)
    assert "starting from the beginning" in capsys.readouterr().out
    before = (tmp_path / "a.pt").read_bytes()
    lora_scratch.main(arguments)
    assert "finished" in capsys.readouterr().out
    assert (tmp_path / "a.pt").read_bytes() == before
    lora_scratch.main([*arguments, "--alpha", "16"])  # the default, spelt out
    with pytest.raises(InputError, match=r"lr was 0\.0002 and is now 0\.1"):
        lora_scratch.main([*arguments, "--lr", "0.1"])
    with pytest.raises(InputError, match="train_samples was None and is now 10"):
        lora_scratch.main([*arguments, "--train-samples", "10"])


@pytest.mark.parametrize(("name", "kind"), [("train.tsv", "training"), ("dev.tsv", "validation")])
def test_other_data_under_the_same_name_is_refused(
    name: str, kind: str, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(tiny_data, tmp_path / "data")
    arguments = flags(tiny_base, data, "--max-steps", "4", "--output", tmp_path / "a.pt")
    lora_scratch.main(arguments)
    rows = (data / name).read_text(encoding="utf-8")
    (data / name).write_text(rows.replace("\t1\n", "\t0\n", 1), encoding="utf-8")
    with pytest.raises(InputError, match=f"--resume: {kind} data, as SHA-256 was"):
        lora_scratch.main([*arguments, "--resume"])


def test_running_out_of_gpu_memory_is_one_line_with_the_remedy(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def explode(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", explode)
    with pytest.raises(SystemExit) as stopped:
        lora_scratch.run(lambda: lora_scratch.main(flags(tiny_base, tiny_data, "--output", tmp_path / "a.pt")))
    said = without_notes(capfd.readouterr().err)
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: the GPU's memory is full; lower --batch-size,") and "--max-length" in said


@pytest.mark.parametrize("content", [b"text", b""])
def test_a_damaged_state_is_refused(content: bytes, tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "a.pt.state").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.pt\.state"):
        lora_scratch.main(flags(tiny_base, tiny_data, "--resume", "--output", tmp_path / "a.pt"))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_state(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = torch.nn.functional.cross_entropy, []

    def explode(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", explode)
    arguments = flags(tiny_base, tiny_data, "--save-every", "2", "--lr", "0.01", "--output", tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"step 3: the loss is not finite.*learning rate .*--lr"):
        lora_scratch.main(arguments)
    state = torch.load(tmp_path / "a.pt.state", weights_only=True)
    assert len(state["losses"]) == 2 and all(t.isfinite().all() for t in state["trained"].values())
    assert not (tmp_path / "a.pt").exists()


def child(script: str, arguments: list[str]) -> None:
    """A process of its own, forked from a server that has the imports behind it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    sys.exit(importlib.import_module(script.removesuffix(".py")).main(arguments))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("script", SCRIPTS)
def test_stopped_at_20_random_moments_it_loses_nothing(
    script: str, number: int, tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time a fresh run, hit between 30 and 90 % of an undisturbed one, then resumed until it is finished."""
    monkeypatch.setenv("PYTHONPATH", str(Path(lora_scratch.__file__).parent))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_scratch", "lora_peft"])
    lock = threading.Lock()  # whichever thread starts a process asks after all others, and only one hears the answer

    def start(output: Path, *extra: str) -> multiprocessing.Process:
        arguments = command(script, tiny_base, tiny_data, output, "--epochs", "60", *extra)[2:]
        process = context.Process(target=child, args=(script, arguments))
        with lock:
            process.start()
        return process

    def exit_code(process: multiprocessing.Process, seconds: float | None = None) -> int | None:
        """The exit code, or None where the process still runs after so many seconds."""
        wait([process.sentinel], seconds)
        with lock:
            return process.exitcode

    whole = tmp_path / "whole" / SCRIPTS[script]
    for _ in range(2):  # the first waits for the imports
        started = time.monotonic()
        assert exit_code(start(whole)) == 0
        seconds = time.monotonic() - started

    def hit_ten(worker: int) -> int:
        """How many runs ten hits took."""
        hits, trials, chance, expected = 0, 0, random.Random(worker), seconds
        while hits < 10:
            trials += 1
            assert trials <= 30
            output = tmp_path / f"{worker}_{trials}" / SCRIPTS[script]
            process = start(output)
            if exit_code(process, chance.uniform(0.3, 0.9) * expected) is None:
                os.kill(process.pid, number)
            code = exit_code(process)
            # Before the loop begins SIGTERM ends a process as always; in it the step is finished and saved.
            assert code in ((0, -number) if number == signal.SIGKILL else (0, -number, 128 + number))
            if code == 0:  # a shared machine has become faster: it was done before the moment came
                expected *= 0.9
                continue
            hits += 1
            assert exit_code(start(output, "--resume")) == 0
            assert same_bits(whole, output)
        return trials

    with ThreadPoolExecutor(2) as pool:
        trials = sum(pool.map(hit_ten, range(2)))
    print(f"{script}: stopped by signal {number} 20 times in {trials} runs, nothing lost")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_says_how_to_go_on(
    number: int, code: int, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    arguments = command("lora_scratch.py", tiny_base, tiny_data, tmp_path / "a.pt", "--epochs", "2000")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not process.stdout.readline().startswith("epoch 1:"):
            pass
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == code and without_notes(errors) == ""
    assert output.splitlines()[-1].startswith("stopped after step") and "--resume" in output.splitlines()[-1]


def test_weights_that_are_not_finite_are_never_saved(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses up to the save are finite, the last update is not."""
    real, calls = torch.optim.AdamW.step, []

    def step(self, *args, **kwargs):
        real(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 4:
            self.param_groups[0]["params"][0].data[0, 0] = float("nan")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(InputError, match="step 4: the weights are not finite"):
        lora_scratch.main(flags(tiny_base, tiny_data, "--save-every", "2", "--output", tmp_path / "a.pt"))
    state = torch.load(tmp_path / "a.pt.state", weights_only=True)
    assert len(state["losses"]) == 3 and all(t.isfinite().all() for t in state["trained"].values())


def test_another_base_of_the_same_shape_is_not_resumed_on(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    arguments = flags(base, tiny_data, "--max-steps", "2", "--output", tmp_path / "a.pt")
    lora_scratch.main(arguments)
    weights = load_file(base / "model.safetensors")
    weights["embeddings.LayerNorm.bias"] += 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="--resume: fingerprint was"):
        lora_scratch.main([*arguments, "--resume"])


def test_ctrl_c_outside_the_loop_ends_without_a_traceback() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        lora_scratch.run(interrupt)
    assert stopped.value.code == 130


def test_a_second_signal_is_not_held_back() -> None:
    state = TrainingState(make_parser("", "a.pt").parse_args([]), nn.Linear(1, 1), {}, torch.float32)
    with state.stop_on_signals():
        signal.raise_signal(signal.SIGTERM)
        assert state.stopped == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_full_disk_leaves_the_previous_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    lora_scratch.write_file(path, lambda p: p.write_bytes(b"the first"))

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match=r"No space left on device.*; the old file is unchanged$"):
        lora_scratch.write_file(path, lambda p: p.write_bytes(b"the second"))
    assert path.read_bytes() == b"the first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_a_disk_that_fills_up_in_reality(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The output on a tmpfs with room for one state but not for two: the run ends with one line and the state stays."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=112k", "tmpfs", disk], capture_output=True).returncode != 0:
        pytest.skip("may not mount a tmpfs here (needs root)")
    try:
        arguments = command("lora_scratch.py", tiny_base, tiny_data, disk / "adapter.pt")
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert (
            done.returncode == 2
            and "the old file is unchanged" in done.stderr
            and without_notes(done.stderr).count("\n") == 1
        )
        state = torch.load(disk / "adapter.pt.state", weights_only=True)
        assert state["format"] == 1 and len(state["losses"]) > 0
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        subprocess.run([*arguments, "--resume"], check=True, stdout=subprocess.DEVNULL)
        whole = tmp_path / "whole" / "adapter.pt"
        subprocess.run(command("lora_scratch.py", tiny_base, tiny_data, whole), check=True, stdout=subprocess.DEVNULL)
        assert same_bits(whole, disk / "adapter.pt")
    finally:
        subprocess.run(["umount", disk], check=False)
