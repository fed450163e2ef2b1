"""The command line: flags, recipes, outputs, bases, messages, exit codes, processes."""

import errno
import io
import json
import os
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import lora_scratch
from lora_scratch import (
    InputError,
    load_base,
    load_checkpoint,
    main,
    make_parser,
    parse_flags,
    report_labels,
    score,
)

import pytest
import torch
from conftest import SCRIPTS, Run, ask, files_of, flags, load_result, output_of, refused, without_notes, write

import lora_peft

FOLDER = Path(lora_scratch.__file__).parent
SHORT = ("--max-steps", "2", "--lr", "0.01")


def error_line(call, capfd: pytest.CaptureFixture) -> str:
    """What a user reads: one short line on standard error, notes aside, and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        lora_scratch.run(call)
    lines = without_notes(capfd.readouterr().err).splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert lines[0].isprintable() and len(lines[0]) <= 2010
    return lines[0]


def flags_of(*more: object):
    """These flags, with the defaults of lora_scratch.py."""
    return parse_flags(make_parser("", "model/lora_scratch_{}.pt"), [str(flag) for flag in more])


# --- Recipes and flags

MINE = ["--dataset", "mine.csv"]
OWN = {"recipe": "own", "targets": ["all-linear"], "lr": 1e-3, "batch_size": 16, "warmup": 0.06}
BEST = OWN | {"recipe": "best", "batch_size": 32}
PUBLISHED = {"recipe": "published", "targets": None, "lr": 2e-4, "epochs": 3, "max_steps": None}


@pytest.mark.parametrize(
    ("more", "rows", "labels", "expected"),
    [
        (MINE, 100, 2, OWN | {"max_steps": 400}),
        (MINE, 2200, 2, OWN | {"epochs": 3, "max_steps": None}),
        (MINE, 20_000, 19, OWN | {"epochs": 1, "max_steps": None}),
        (MINE, 20_000, 20, OWN | {"lr": 2e-3}),
        ([*MINE, "--lr", "0.1"], 1000, 77, OWN | {"lr": 0.1}),
        ([*MINE, "--epochs", "2"], 100, 2, OWN | {"epochs": 2, "max_steps": None}),
        ([*MINE, "--max-steps", "7", "--targets", "q_lin"], 100, 2, {"targets": ["q_lin"], "max_steps": 7}),
        ([*MINE, "--batch-size", "8"], 1100, 2, OWN | {"batch_size": 8, "epochs": 3, "max_steps": None}),
        ([*MINE, "--recipe", "published"], 100, 77, PUBLISHED),
        ([*MINE, "--recipe", "best"], 6400, 2, BEST | {"epochs": 2, "max_steps": None}),
        ([*MINE, "--recipe", "best"], 6300, 20, BEST | {"lr": 2e-3, "max_steps": 400}),
        (["--dataset", "nyu-mll/glue"], 67_349, 2, PUBLISHED),
        (["--dataset", "./dataset/../dataset/glue_sst2_local"], 67_349, 2, PUBLISHED),
    ],
)
def test_the_recipe_follows_the_data_and_flags_override_it(more, rows, labels, expected) -> None:
    chosen = vars(lora_scratch.choose_recipe(flags_of(*more), rows, labels))
    assert {key: chosen[key] for key in expected} == expected


@SCRIPTS
def test_the_recipe_is_printed_and_kept(script, tiny_base: Path, tmp_path: Path, capsys) -> None:
    rows = "".join(f"film {i},{i % 2}\n" for i in range(40))
    data, output = write(tmp_path / "a.csv", f"sentence,label\n{rows}"), output_of(script, tmp_path)
    more = ["--model", tiny_base, "--dataset", data, "--max-steps", 3, "--output", output]
    script.main([str(flag) for flag in more])
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("recipe"))
    assert all(part in said for part in ("own", "36 rows", "2 labels", "0.001", "3 steps")), said
    settings = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))["settings"]
    assert settings.items() >= OWN.items()


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
def test_the_output_has_the_name_of_the_data(more: list, name: str) -> None:
    """So that nothing that was trained on other data is replaced."""
    assert flags_of(*more).output == Path("model") / name


MISTAKES = [
    *("--r 0", "--r x", "--r", "--r 1" + "0" * 30, "--r " + "9" * 5000, "--alpha inf", "--alpha 1e308"),
    *("--alpha -1", "--lr -1", "--lr nan", "--lr 1e400", "--epochs 0", "--epochs " + "9" * 30),
    *("--max-steps -1", "--max-steps " + "7" * 400, "--seed -1", f"--seed {2**64}", "--threads 0"),
    *("--threads 10000000000", "--batch-size 0", "--train-samples 0", "--dropout 1", "--warmup 2"),
    *("--max-length 2", "--precision fp8", "--recipe mine", "--nonsense", "stray\x1b[31m"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: ascii(mistake[:20]))
def test_a_wrong_value_is_refused_by_its_flag(mistake: str, capfd) -> None:
    flag = mistake.split()[0][:5]
    assert flag in error_line(lambda: main([*mistake.split(), "--dataset", "no_such.tsv"]), capfd)


# --- Devices and precisions


def prepare(*more: str) -> tuple[torch.device, torch.dtype]:
    return lora_scratch.prepare_machine(flags_of(*more))


def test_a_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(lambda: prepare("--device", "cuda"), "--device cuda", "--device cpu")
    refused(lambda: prepare("--precision", "fp16"), "--precision fp16")


@pytest.mark.parametrize(
    ("device", "able", "dtype"),
    [
        ("cpu", {"amx_bf16": True, "avx2": True}, torch.bfloat16),
        ("cpu", {"avx512_bf16": True}, torch.bfloat16),
        ("cpu", {"bf16": True, "sve": True}, torch.bfloat16),  # ARM
        ("cpu", {"amx_bf16": False, "avx512_f": True, "avx2": True}, torch.float32),
        ("cuda", (7, 5), torch.float16),
        ("cuda", (8, 0), torch.bfloat16),
    ],
)
def test_the_machine_decides_device_and_precision(device, able, dtype, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: able)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    for precision, expected in (("auto", dtype), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        assert prepare("--precision", precision) == (torch.device(device), expected)


# --- Outputs


@pytest.fixture
def crowded(tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base, data and files of the user's, links among them; the current one is data."""
    shutil.copytree(tiny_base, tmp_path / "base")
    shutil.copytree(tiny_data, tmp_path / "data")
    rows = json.dumps([{"sentence": f"film {i}", "label": i % 2} for i in range(20)])
    for name in ("reviews.json", "data/train.json", "file", "foreign.pt", "half.pt.state", "half.state"):
        write(tmp_path / name, rows)
    write(tmp_path / "deep.json", "[" * 100_000 + "]" * 100_000)
    for name in ("mine", "folder.pt", "record.json", "state.pt.state", "state.state"):
        write(tmp_path / name / "README.md", "mine")
    for name, target in (
        *(("link", "."), ("linked.json", "reviews.json"), ("linked_folder", "mine")),
        *((name, "nowhere/x") for name in ("no.pt", "no", "record_2.json", "state_2.state", "tokens")),
        ("state_2.pt.state", "nowhere/x"),
    ):
        (tmp_path / name).symlink_to(tmp_path / target)
    monkeypatch.chdir(tmp_path / "data")
    return tmp_path


ODD_NAMES = ["a" * 300, "a\0b", "a\udcff"]
TAKEN = {
    lora_scratch: [
        *("reviews.pt", "link/reviews.pt", "data/../reviews.pt", "linked.pt", "data/train.pt", "base.pt"),
        *("file/a.pt", "file/deeper/a.pt", "a", "a.bin", "a.pt.gz", "data/train.tsv", "base", "folder.pt"),
        *("mine.pt", "file.pt", "foreign.pt", "half.pt", "deep.pt", "record.pt", "state.pt", "no.pt"),
        *("record_2.pt", "state_2.pt", "tokens.pt", ".pt", "..pt", "...pt", "data/.pt", ".", ""),
        *(f"{name}.pt" for name in ODD_NAMES),
    ],
    lora_peft: [
        *("reviews", "base", "data", "mine", "linked_folder", "file", "file/a", "half", "deep", "record"),
        *("state", "no", "record_2", "state_2", ".", "..", "", *ODD_NAMES),
    ],
}


@pytest.mark.parametrize(
    ("script", "output"),
    [(script, output) for script in TAKEN for output in TAKEN[script]],
    ids=lambda value: ascii(value[:12]) if isinstance(value, str) else value.__name__,
)
def test_an_output_that_would_replace_something_is_refused(script, output: str, crowded: Path) -> None:
    before = files_of(crowded)
    path = output if output in ("", ".", "..") else f"{crowded}/{output}"
    arguments = flags(crowded / "base", crowded / "data", "--output", path)
    refused(lambda: script.main(arguments), "--output")
    assert files_of(crowded) == before


def test_an_output_without_the_right_to_write_is_refused(crowded: Path, monkeypatch) -> None:
    def fail(*_, **__) -> None:  # root may write anywhere
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "touch", fail)
    arguments = flags(crowded / "base", crowded / "data", "--output", "new.pt")
    refused(lambda: main(arguments), "--output", "new.pt", "Permission denied")


@SCRIPTS
def test_the_next_run_replaces_its_result_and_nothing_else(script, tiny_base, tiny_data, tmp_path) -> None:
    """Others may read the files, and a README in the folder stays."""
    umask = os.umask(0o022)
    arguments = flags(tiny_base, tiny_data, *SHORT, "--output", output_of(script, tmp_path), "--seed")
    script.main([*arguments, "1"])
    first = files_of(tmp_path)
    assert not (tmp_path / "a" / "README.md").exists()
    write(tmp_path / "a" / "README.md", "mine")
    script.main([*arguments, "2"])
    os.umask(umask)
    second = files_of(tmp_path)
    assert second.pop(tmp_path / "a" / "README.md") == b"mine" and second.keys() == first.keys()
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in second if path.is_file())
    assert json.loads(second[tmp_path / "a.json"])["settings"]["seed"] == 2
    tensors = tmp_path / ("a.pt" if script is lora_scratch else "a/adapter_model.safetensors")
    assert second[tensors] != first[tensors]


@SCRIPTS
def test_the_result_of_other_data_is_replaced_only_when_told(script, tiny_base, tiny_data, tmp_path) -> None:
    """Tables of one name in two shops have one default output."""
    output, other = output_of(script, tmp_path), shutil.copytree(tiny_data, tmp_path / "other")
    script.main(flags(tiny_base, tiny_data, *SHORT, "--output", output))
    before = files_of(tmp_path)
    arguments = flags(tiny_base, other, *SHORT, "--output", output)
    refused(lambda: script.main(arguments), output.parent / "a", tiny_data.name)
    assert files_of(tmp_path) == before
    script.main([*arguments, "--overwrite"])
    script.main(arguments)  # it is its own by now
    assert json.loads((tmp_path / "a.json").read_text())["data"] == "other"


def test_a_run_holds_its_output_until_its_reader_has_enough(tiny_base, tiny_data, tmp_path) -> None:
    """As under `| head`."""
    output = tmp_path / "a.pt"
    given = flags(tiny_base, tiny_data, "--output", output)
    command = [sys.executable, lora_scratch.__file__, *given, "--max-steps", "100000", "--log-every", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        any(line.startswith(b"step ") for line in process.stdout)
        before = files_of(tmp_path)
        refused(lambda: main([*given, "--overwrite"]), output, "another run")
        assert files_of(tmp_path) == before
        process.stdout.close()
        assert process.wait(120) == 141 and without_notes(process.stderr.read().decode()) == ""
    main([*given, *SHORT])
    assert output.exists()


@SCRIPTS
def test_what_is_moved_together_is_found(script, tiny_base, tiny_data, tmp_path, monkeypatch) -> None:
    project, moved = tmp_path / "project", tmp_path / "moved"
    for name, source in (("base", tiny_base), ("data", tiny_data)):
        shutil.copytree(source, project / name)
    monkeypatch.chdir(project)
    result = output_of(script, Path("model"))
    script.main([*flags("base", "data"), *SHORT, "--output", str(result)])
    project.rename(moved)
    monkeypatch.chdir("/")
    _, facts = load_result(moved / result)
    assert [facts[key] for key in ("base", "data")] == [str(moved / "base"), str(moved / "data")]


@pytest.mark.parametrize("taken", ["x.pt", "x", "x.json", "x.pt.state"])
def test_a_conversion_replaces_nothing(taken: str, adapters: Path, tmp_path: Path) -> None:
    adapter = adapters / "model/lora_peft_distilbert_sst2"
    source = (adapters / "model/lora_scratch_distilbert_sst2.pt").read_bytes()
    path = tmp_path / ("x/tokenizer.json" if taken == "x" else taken)
    write(path, source if taken == "x.pt" else b"{}")
    before = files_of(tmp_path)
    arguments = ["--export-scratch", str(adapter), "--output", str(tmp_path / "x.pt")]
    refused(lambda: lora_peft.main(arguments), "--output")
    assert files_of(tmp_path) == before


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """A file is written beside its target: a link may lead to another file system."""
    there = write(tmp_path / "there" / "file", "old")
    (tmp_path / "link").symlink_to(there)
    (tmp_path / "folder").symlink_to(there.parent)

    def fill(path: Path) -> None:
        assert path.is_dir() or path.resolve().parent == there.parent
        write(path / "file" if path.is_dir() else path, f"new {path}")

    for write_it, name in ((lora_scratch.write_file, "link"), (lora_scratch.write_folder, "folder")):
        write_it(tmp_path / name, fill)
        assert (tmp_path / name).is_symlink() and there.read_text().startswith("new")
        assert len(files_of(tmp_path)) == 4 and there.write_text("old")


# --- Bases


BASE_FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
NO_BASE = [None, b"", b"text", b"{}", b"[]", b'{"model_type": "no such"}', bytes(64), "half"]


@pytest.mark.parametrize("name", BASE_FILES)
@pytest.mark.parametrize("content", NO_BASE)
def test_a_damaged_base_is_refused_or_complete(name, content, tiny_base: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_base, tmp_path / "base") / name
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    try:
        loaded = load_base(str(path.parent), None, ["a", "b"], 128)
    except InputError as error:
        assert str(path.parent) in str(error)
    else:
        assert loaded.identity == load_base(str(tiny_base), None, ["a", "b"], 128).identity


@pytest.mark.parametrize("name", ["no/such", "./nothing", "/no/such/folder", "with space", "a/b/c/d"])
def test_a_base_that_is_not_there_is_refused(name: str) -> None:
    refused(lambda: load_base(name, None, ["a", "b"], 128), name, "--demo")


# --- Results


def test_a_result_by_hand() -> None:
    result = score(torch.tensor([[30, 1], [1, 7]]))
    assert result["interval"] == pytest.approx([83.11, 98.58], abs=0.01)
    assert score(torch.tensor([[0, 10], [0, 0]]))["interval"][0] == 0
    assert score(torch.tensor([[10, 0], [0, 0]]))["interval"][1] == 100
    names = ["bad", "so\tso", "good"]
    table, *said = report_labels(torch.tensor([[8, 2, 0], [1, 4, 0], [1, 4, 0]]), names).rsplit("\n", 2)
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["bad", "80.0", "80.0", "80.0", "10", "8", "2", "0"],
        ["so", "so", "40.0", "80.0", "53.3", "5", "1", "4", "0"],
        ["good", "-", "0.0", "0.0", "5", "1", "4", "0"],  # never answered: no precision
    ]
    for number in ("44.4 %", "'bad': 50.00 %", "60.00 % (12/20)", "39 and 78"):
        assert number in " ".join(said)


def test_a_label_that_the_output_cannot_encode_does_not_end_the_run(monkeypatch) -> None:
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, "cp1252"))
    report = report_labels(torch.eye(2, dtype=torch.long), ["хорошо", "плохо"])
    with pytest.raises(SystemExit) as stop:
        lora_scratch.run(lambda: print(report))
    assert not stop.value.code and b"100.0" in output.getvalue()


@SCRIPTS
def test_a_name_may_start_with_a_dash(script, tiny_base, tiny_data, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    script.main([*flags(tiny_base, tiny_data, *SHORT), f"--output={output_of(script, Path(), '-x')}"])
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("ask it: "))
    assert command[1].endswith("playground.py")
    assert ask(*command[2:]).endswith(" %\n")


# --- Messages, exit codes, processes


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (InputError("data.csv: " + "\x1b[31m\x07\r\n\u2028\u202e" + "x" * 100_000), "data.csv"),
        (MemoryError(), "--batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory"), "--batch-size"),
        (OSError(errno.ENOSPC, "No space left on device", "a.pt"), "No space left on device"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(error, named: str, capfd) -> None:
    assert named in error_line(lambda: fail(error), capfd)


ENDS = [(lambda: None, None), (lambda: 143, 143), (lambda: fail(KeyboardInterrupt()), 130)]


@pytest.mark.parametrize(("call", "code"), ENDS)
def test_the_exit_code_says_how_it_ended(call, code: int | None, monkeypatch, capfd) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # of a notebook, without an encoding
    with pytest.raises(SystemExit) as stop:
        lora_scratch.run(call)
    assert stop.value.code == code and capfd.readouterr() == ("", "")
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        lora_scratch.run(lambda: 1 / 0)


@pytest.mark.parametrize("script", ["lora_scratch", "lora_peft", "playground"])
def test_missing_packages_are_one_line(script: str) -> None:
    command = [sys.executable, "-ES", f"{script}.py"]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and "./setup.sh" in done.stderr


def test_a_missing_peft_is_one_line(monkeypatch, capfd) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(lora_peft.__file__, run_name="__main__")
    said = capfd.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: peft") and said.count("\n") == 1


@pytest.mark.parametrize("name", ["NO_NOTEBOOK", "JPY_PARENT_PID", "COLAB_RELEASE_TAG"])
def test_a_bar_is_for_terminals(name, tiny_base, tiny_data, tmp_path: Path, monkeypatch, capsys) -> None:
    """A notebook calls itself one, but would keep all states of a bar."""
    monkeypatch.setenv(name, "1")
    for is_terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda answer=is_terminal: answer)
        Run(tiny_base, tiny_data, tmp_path / "a.pt", *SHORT)
        assert ("\r" in capsys.readouterr().err) is (is_terminal and name == "NO_NOTEBOOK")


@SCRIPTS
def test_a_current_folder_that_is_gone(script, tiny_base, tiny_data, tmp_path, monkeypatch, capfd) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    arguments = flags(tiny_base, tiny_data, *SHORT, "--output", output_of(script, Path()))
    line = error_line(lambda: script.main(arguments), capfd)
    assert "--output a" in line and "No such file or directory" in line


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_without_torchrun_means_nothing(rank, tiny_base, tiny_data, tmp_path, monkeypatch) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert "epoch 1:" in Run(tiny_base, tiny_data, tmp_path / "a.pt", *SHORT).said


READERS = {"full": ("> /dev/full", 2), "closed": (">&-", 0)}


def test_an_output_that_nobody_reads_ends_without_a_traceback(tiny_base, tiny_data, tmp_path) -> None:
    """The device of standard output is full, or it is closed."""
    given = flags(tiny_base, tiny_data, "--log-every", 1, "--max-steps", 10, "--threads", 1, "--output")
    command = shlex.join([sys.executable, lora_scratch.__file__, *given])
    shells = {}
    for name, (redirection, _) in READERS.items():
        line = f"exec {command} {tmp_path}/{name}.pt {redirection}"
        shells[name] = subprocess.Popen(["bash", "-c", line], stderr=subprocess.PIPE, text=True)
    for name, (_, code) in READERS.items():
        lines = without_notes(shells[name].communicate()[1]).splitlines()
        assert shells[name].returncode == code and [line[:7] for line in lines] == ["error: "] * (code == 2)
    assert load_checkpoint(tmp_path / "closed.pt")[1]["record"]["epochs"]


RUN = "import lora_scratch; lora_scratch.run(lora_scratch.main)"


def test_without_a_network_it_ends_soon(tiny_base, tiny_data, tmp_path: Path) -> None:
    """The proxy takes a connection and never answers: else each request waits half a minute."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    runs = {}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = kept | {"HF_HOME": str(tmp_path / "home"), "no_proxy": "", "NO_PROXY": ""}
        environment["PYTHONPATH"] = str(FOLDER)
        for kind in ("http", "https", "all"):
            environment |= {f"{kind}_proxy": url, f"{kind.upper()}_PROXY": url}
        for missing, given in (
            (lora_scratch.DISTILBERT[0], ["--dataset", tiny_data]),
            (lora_scratch.GLUE[0], ["--model", tiny_base]),
        ):
            command = [sys.executable, "-c", RUN, *given]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            runs[missing] = subprocess.Popen(command, env=environment, cwd=tmp_path, **pipes)
        for missing, process in runs.items():
            (line,) = without_notes(process.communicate(timeout=40)[1]).splitlines()
            assert process.returncode == 2
            assert line.startswith("error: ") and missing in line and "--demo" in line
    assert list(tmp_path.rglob("*.pt")) == []
