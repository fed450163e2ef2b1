"""Odd files, odd places and odd values: each costs the user one line, and never a file, a training or an answer."""

import datetime
import errno
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas
import pyarrow
import pytest
import torch
from conftest import SENTENCES, Run, flags, with_tokenizer, without_notes
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, BartConfig, T5Config, pipeline

import lora_peft
import lora_scratch
import playground
from lora_scratch import InputError, Table, load_base, load_checkpoint, load_tables, predict

TSV, CSV = "sentence\tlabel\n", "sentence,label\n"
A_NAME = "distilbert.transformer.layer.0.attention.q_lin.lora_A"
SCRIPTS = pytest.mark.parametrize("script", [lora_scratch, lora_peft], ids=lambda script: script.__name__)
SHORT = ("--max-steps", "2", "--lr", "0.01")


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A handwritten checkpoint."""
    return Run(tiny_base, tiny_data, tmp_path_factory.mktemp("faults") / "a.pt", *SHORT).path


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder of PEFT."""
    folder = tmp_path_factory.mktemp("faults_peft") / "a"
    lora_peft.main(flags(tiny_base, tiny_data, *SHORT, "--output", folder))
    return folder


def load(data: Path, *more: str) -> tuple[Table, Table, list[str]]:
    return load_tables(lora_scratch.make_parser("", "a.pt").parse_args(["--dataset", str(data), *more]))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(message: str, script, arguments: list) -> None:
    """The script says `message`, in one line that a terminal shows as it is."""
    with pytest.raises(InputError, match=message) as error:
        script.main([str(argument) for argument in arguments])
    assert str(error.value).isprintable()


def error_line(call: Callable[[], object], capfd: pytest.CaptureFixture) -> str:
    """What a user reads: nothing but one short line on standard error, notes aside, and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        lora_scratch.run(call)
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert lines[0].isprintable() and len(lines[0]) <= 2010
    return lines[0]


def ask(capfd: pytest.CaptureFixture, *arguments: object) -> list[dict]:
    """What playground.py --json answers."""
    capfd.readouterr()
    playground.main(["--json", *map(str, arguments)])
    return [json.loads(line, parse_constant=pytest.fail) for line in capfd.readouterr().out.splitlines()]


def files_of(folder: Path) -> dict[Path, bytes | None]:
    """Every path below a folder, and what the files hold."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    """Change a JSON file, or a file of torch.save."""
    is_json = path.suffix == ".json"
    content = json.loads(path.read_text(encoding="utf-8")) if is_json else torch.load(path, weights_only=True)
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8") if is_json else torch.save(content, path)


# --- Files of the user's are never overwritten


@pytest.mark.parametrize(
    ("data", "output"),
    [
        ("reviews.json", "reviews.pt"),
        ("reviews.json", "link/reviews.pt"),
        ("reviews.json", "data/../reviews.pt"),
        ("reviews.json", "linked.pt"),
        ("data/train.json", "data/train.pt"),
        ("data", "data/train.pt"),
    ],
)
def test_the_record_never_replaces_the_data(data: str, output: str, tiny_base: Path, tmp_path: Path) -> None:
    rows = json.dumps([{"sentence": f"film {i}", "label": i % 2} for i in range(20)])
    write(tmp_path / "reviews.json", rows)
    write(tmp_path / "data" / "train.json", rows)
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "linked.json").symlink_to(tmp_path / "reviews.json")
    before = files_of(tmp_path)
    message = r"--output: .*\.json was not written here"
    refused(message, lora_scratch, flags(tiny_base, tmp_path / data, "--output", tmp_path / output))
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("output", ["base", "data", "mine", ".", "..", "", "link"])
def test_an_adapter_folder_is_never_one_with_files_of_others(
    output: str, tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = shutil.copytree(tiny_base, tmp_path / "base"), shutil.copytree(tiny_data, tmp_path / "data")
    write(tmp_path / "mine" / "README.md", "mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "data")
    path = output if output in (".", "..", "") else tmp_path / output
    before = files_of(tmp_path)
    message = "give the name of a new folder|has files of others in it"
    refused(message, lora_peft, flags(base, data, "--output", path))
    assert files_of(tmp_path) == before


def test_a_readme_in_an_adapter_folder_stays_and_pefts_is_not_written(
    adapter: Path, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    assert not (adapter / "README.md").exists()
    folder = shutil.copytree(adapter, tmp_path / "a")
    write(folder / "README.md", "mine")
    lora_peft.main(flags(tiny_base, tiny_data, *SHORT, "--seed", 7, "--output", folder))
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "lora_peft.json").read_bytes() != (adapter / "lora_peft.json").read_bytes()


@pytest.mark.parametrize("target", ["data/train.tsv", "link.tsv", "p/../data/train.tsv", "a.pt", "linked.pt", "p", "."])
def test_a_submission_never_replaces_data_or_a_model(
    target: str, trained: Path, adapter: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    shutil.copy(trained, tmp_path / "a.pt")
    shutil.copytree(adapter, tmp_path / "p")
    (tmp_path / "link.tsv").symlink_to(tmp_path / "data" / "train.tsv")
    (tmp_path / "linked.pt").symlink_to(tmp_path / "a.pt")
    monkeypatch.chdir(tmp_path)
    before = files_of(tmp_path)
    arguments = ["--model", "a.pt", "--file", "data/train.tsv", "--glue", target]
    refused("--glue .*something else stands there", playground, arguments)
    assert files_of(tmp_path) == before


def test_a_submission_replaces_an_earlier_one(trained: Path, tmp_path: Path) -> None:
    """Its numbers are those of the table, whole in JSON too."""
    rows = [{"index": i, "sentence": "a film"} for i in (7, 0, 12345678901)]
    write(tmp_path / "test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for content in ("index\tprediction\n0\t1\n", None):
        if content:
            write(tmp_path / "out.tsv", content)
        playground.main(shlex.split(f"--model {trained} --file {tmp_path}/test.jsonl --glue {tmp_path}/out.tsv"))
        lines = (tmp_path / "out.tsv").read_text().splitlines()
        assert [line.split("\t")[0] for line in lines] == ["index", "7", "0", "12345678901"]
        assert all(line.split("\t")[1] in "01" for line in lines[1:])


@pytest.mark.parametrize("there", ["x.pt", "x", "x.json", "x.pt.state"])
def test_a_conversion_replaces_nothing(there: str, trained: Path, adapter: Path, tmp_path: Path) -> None:
    if there == "x":
        write(tmp_path / "x" / "tokenizer.json", "{}")
    else:
        write(tmp_path / there, trained.read_bytes() if there == "x.pt" else b"mine")
    before = files_of(tmp_path)
    message = "there is something already at|was not written here"
    refused(message, lora_peft, ["--export-scratch", adapter, "--output", tmp_path / "x.pt"])
    assert files_of(tmp_path) == before


def test_both_conversions_at_once_are_refused(trained: Path, adapter: Path, tmp_path: Path) -> None:
    for output in ("x.pt", "x"):
        arguments = ["--import-scratch", trained, "--export-scratch", adapter, "--output", tmp_path / output]
        refused("one at a time|ends in .pt", lora_peft, arguments)
    refused("one at a time", lora_peft, [*arguments[:-1], tmp_path / "x.pt"])
    assert list(tmp_path.iterdir()) == []


ODD_NAMES = ["a" * 300, "a\\b", "a\udcffb", "a\nb", "a\x1bb", "a\0b"]


@SCRIPTS
@pytest.mark.parametrize("name", ODD_NAMES, ids=lambda name: ascii(name[:3]))
def test_a_name_that_no_file_should_have_is_refused(
    name: str, script, tiny_base: Path, tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    output = tmp_path / (f"{name}.pt" if script is lora_scratch else name)
    line = error_line(lambda: script.main(flags(tiny_base, tiny_data, "--output", output)), capfd)
    assert "--output" in line and ("name another place" in line or "give the name of" in line)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [".pt", "..pt", "...pt", "a/.pt"])
def test_an_ending_is_no_name(
    name: str, tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    refused("--output", lora_scratch, flags(tiny_base, tiny_data, "--output", name))
    assert list(tmp_path.iterdir()) == [tmp_path / "a"] and list((tmp_path / "a").iterdir()) == []


@SCRIPTS
@pytest.mark.parametrize("kind", ["folder", "dangling link"])
@pytest.mark.parametrize("ending", ["result", ".json", ".state"])
def test_a_folder_or_a_dangling_link_in_the_way_is_named(
    ending: str, kind: str, script, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    output = tmp_path / ("a.pt" if script is lora_scratch else "a")
    path = {"result": output, ".json": tmp_path / "a.json", ".state": Path(f"{output}.state")}[ending]
    if kind == "folder":
        write(path / "file", "mine")
    else:
        path.symlink_to(tmp_path / "nowhere" / "file")
    before = files_of(tmp_path)
    refused(rf"--output: .*{path.name}", script, flags(tiny_base, tiny_data, "--output", output))
    assert files_of(tmp_path) == before


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    write(tmp_path / "there" / "file", "old")
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    lora_scratch.write_file(tmp_path / "link", lambda path: path.write_text("new"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "file").read_text() == "new"
    assert len(files_of(tmp_path)) == 3


@pytest.mark.slow
@SCRIPTS
def test_results_lie_on_another_file_system(script, tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """A mounted volume as the output's parent, behind a link, and as the output folder itself."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], capture_output=True).returncode != 0:
        pytest.skip("may not mount a tmpfs here (needs root)")
    try:
        ending = ".pt" if script is lora_scratch else ""
        (tmp_path / f"link{ending}").symlink_to(disk / f"linked{ending}")
        (disk / "linked").mkdir() if script is lora_peft else shutil.copy(
            Run(tiny_base, tiny_data, tmp_path / "old.pt", *SHORT).path, disk / "linked.pt"
        )
        for output in (disk / f"a{ending}", tmp_path / f"link{ending}", *([disk] if script is lora_peft else [])):
            if output == disk:
                shutil.rmtree(disk / "linked")
                for path in disk.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            script.main(flags(tiny_base, tiny_data, *SHORT, "--output", output))
            model = playground.load("", output, None)
            assert predict(model.base.model, SENTENCES, 2).isfinite().all()
        assert (tmp_path / f"link{ending}").is_symlink()
    finally:
        subprocess.run(["umount", disk], check=False)


def test_others_may_read_what_is_written(
    trained: Path, adapter: Path, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    former = os.umask(0o022)
    try:
        lora_peft.main(flags(tiny_base, tiny_data, *SHORT, "--output", tmp_path / "p"))
        playground.main(["--model", str(trained), "--export", str(tmp_path / "export")])
    finally:
        os.umask(former)
    for name in ("p/adapter_model.safetensors", "p/lora_peft.json", "export/model.safetensors", "export/config.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o644, name


@pytest.mark.parametrize("moved", range(5))
def test_an_adapter_folder_that_was_left_half_new_is_noticed(
    moved: int, adapter: Path, tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fails after so many of the five files: the old run is there in whole, or refused."""
    folder = shutil.copytree(adapter, tmp_path / "a")
    replace, done = os.replace, []

    def fail(source: Path, target: Path) -> None:
        if Path(target).parent == folder:
            if len(done) == moved:
                raise OSError(errno.EIO, "Input/output error")
            done.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    arguments = flags(tiny_base, tiny_data, *SHORT, "--seed", 7, "--output", folder)
    refused(r"cannot write .*Input/output error.*make room", lora_peft, arguments)
    assert len(done) == moved and "lora_peft.json" not in done  # which is the last
    assert (folder / "lora_peft.json").read_bytes() == (adapter / "lora_peft.json").read_bytes()
    assert not list(folder.glob(".*"))
    if "adapter_model.safetensors" in done:
        with pytest.raises(InputError, match=r"is not the one that lora_peft\.json was written with"):
            lora_peft.load_adapter(folder)
    else:
        assert lora_peft.load_adapter(folder)[1]["record"]["settings"]["seed"] == 42


# --- The terminal goes away

CHILDREN = """if True:
    import os, runpy, sys
    import lora_scratch, pandas, transformers.models.distilbert.modeling_distilbert  # once for all
    _, script, folder, *arguments = sys.argv

    def run(name, prepare, after=lambda: None):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(f"{folder}/{name}.err", os.O_CREAT | os.O_WRONLY), 2)
            prepare()
            try:
                sys.stdout = open(1, "w")
            except OSError:  # closed: so Python starts
                sys.stdout = None
            sys.stderr = open(2, "w", buffering=1)
            sys.argv = [script, *arguments, "--output", f"{folder}/{name}.pt"]
            runpy.run_path(script, run_name="__main__")
            sys.exit(0)  # and Python's own last flush
        after()
        print(name, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    out, into = os.pipe()

    def head():
        os.close(into)
        assert os.read(out, 1)
        os.close(out)

    run("full", lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1))
    run("closed", lambda: os.close(1))
    run("head", lambda: (os.dup2(into, 1), os.close(into), os.close(out)), head)
"""


def test_a_training_outlives_its_terminal(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Its standard output is full, closed, or a pipe to `head`: a real process each, forked after the imports."""
    script = Path(lora_scratch.__file__)
    environment = os.environ | {"PYTHONPATH": str(script.parent), "TOKENIZERS_PARALLELISM": "false"}
    arguments = flags(tiny_base, tiny_data, "--log-every", 1, "--max-steps", 30, "--threads", 1)
    command = [sys.executable, "-c", CHILDREN, script, tmp_path, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stderr == "" and done.stdout.splitlines() == ["full 0", "closed 0", "head 0"]
    for name in ("full", "closed", "head"):
        assert without_notes((tmp_path / f"{name}.err").read_text()) == ""
        assert load_checkpoint(tmp_path / f"{name}.pt")[1]["record"]["epochs"]


# --- Bases that are not what they should be


def edit_weights(base: Path, change: Callable[[dict], dict]) -> None:
    weights = change(load_file(base / "model.safetensors"))
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "config", "named"),
    [
        (lambda w: {f"module.{name}": t for name, t in w.items()}, {}, "distilbert.embeddings"),
        (
            lambda w: {name: t for name, t in w.items() if "layer.1." not in name},
            {},
            r"distilbert\.transformer\.layer\.1",
        ),
        (lambda w: {name: t for name, t in w.items() if "word" not in name}, {}, "word_embeddings.weight"),
        (lambda w: w, {"hidden_dim": 48}, r"ffn\.lin1\.weight"),
        (lambda w: w, {"n_layers": 3}, r"distilbert\.transformer\.layer\.2"),
        (lambda w: w, {"max_position_embeddings": 64}, "position_embeddings"),
    ],
)
def test_a_base_whose_weights_do_not_fit_is_refused_naming_them(
    change, config: dict, named: str, tiny_base: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    edit_weights(base, change)
    rewrite(base / "config.json", lambda found: found.update(config))
    with pytest.raises(InputError, match=rf"base: \d+ weights are missing or of another shape \(.*{named}"):
        load_base(str(base), None, ["a", "b"], 32)


@pytest.mark.parametrize("script", [lora_scratch, lora_peft, playground], ids=lambda script: script.__name__)
def test_two_swapped_words_are_another_tokenizer(
    script, trained: Path, adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_base, tmp_path / "other")

    def swap(tokenizer: dict) -> None:
        words = tokenizer["model"]["vocab"]
        words["loved"], words["hated"] = words["hated"], words["loved"]

    rewrite(other / "tokenizer.json", swap)
    with pytest.raises(InputError, match="trained with another tokenizer"):
        if script is lora_scratch:
            load_checkpoint(trained, str(other))
        elif script is lora_peft:
            lora_peft.load_adapter(adapter, str(other))
        else:
            playground.main(["--model", str(trained), "--base", str(other), "I loved it"])


def test_the_export_of_a_base_for_other_labels_answers_as_the_playground(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """A base that was fine-tuned for three labels at once, each yes or no."""
    kind = {"num_labels": 3, "problem_type": "multi_label_classification"}
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, **kind)
    base = with_tokenizer(tmp_path / "three", tiny_base, model)
    lora_scratch.main(flags(base, tiny_data, *SHORT, "--output", tmp_path / "a.pt"))
    assert f"note: {base} was trained for other labels: it gets a new classification head" in capfd.readouterr().err
    assert load_checkpoint(tmp_path / "a.pt")[0].model.classifier.out_features == 2
    playground.main(["--model", str(tmp_path / "a.pt"), "--export", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["problem_type"] == "single_label_classification" and len(config["id2label"]) == 2
    (answer,) = ask(capfd, "--model", tmp_path / "a.pt", "I loved it")
    (pairs,) = pipeline("text-classification", str(tmp_path / "out"), top_k=None, device="cpu")(["I loved it"])
    found = {pair["label"]: pair["score"] for pair in pairs}
    assert found == pytest.approx(answer["probabilities"], abs=1e-5) and sum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize("length", [-1, 0])
def test_a_tokenizer_may_have_no_limit(length: int, tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    rewrite(base / "tokenizer_config.json", lambda settings: settings.update(model_max_length=length))
    assert load_base(str(base), None, ["a", "b"], 128).model.config.max_position_embeddings == 128
    with pytest.raises(InputError, match="--max-length 129 is not between 3 and 128"):
        load_base(str(base), None, ["a", "b"], 129)


@pytest.mark.parametrize("config", [T5Config(num_layers=1, d_model=8), BartConfig(d_model=8)])
def test_a_base_with_a_decoder_is_refused(config, tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config.save_pretrained(base)
    with pytest.raises(InputError, match=f"{config.model_type} has a decoder; use an encoder"):
        load_base(str(base), None, ["a", "b"], 128)


def test_a_base_of_no_type_or_of_too_many_layers_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    for change, message in (
        (lambda config: config.update(n_layers=20_000), "20000 layers in its config.json; 200 is the most"),
        (lambda config: config.pop("model_type"), "cannot load the base model .*model_type"),
    ):
        rewrite(base / "config.json", change)
        with pytest.raises(InputError, match=message):
            load_base(str(base), None, ["a", "b"], 128)
    write(base / "config.json", json.dumps({"model_type": "bert", "num_hidden_layers": 20_000}))
    with pytest.raises(InputError, match="20000 layers"):
        load_base(str(base), None, ["a", "b"], 128)


@SCRIPTS
def test_an_adapter_is_no_base(script, adapter: Path, tiny_data: Path, tmp_path: Path) -> None:
    message = rf"{adapter} is an adapter, not a base model; ask it with playground\.py --model {adapter}"
    refused(message, script, flags(adapter, tiny_data, "--output", tmp_path / "a.pt"))


# --- Checkpoints that are not what they should be


def with_number(trained: Path, path: Path, key: str, value: object) -> Path:
    torch.save(torch.load(trained, weights_only=True) | {key: value}, path)
    return path


@pytest.mark.parametrize("key", ["alpha", "dropout"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e308, -1.0, True])
def test_a_number_that_scales_nothing_sensible_is_refused(
    value: float, key: str, trained: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"a.pt: not made by this project, or damaged: its '{key}'"):
        load_checkpoint(with_number(trained, tmp_path / "a.pt", key, value))
    folder = shutil.copytree(adapter, tmp_path / "a")
    rewrite(folder / "lora_peft.json", lambda facts: facts.update({key: value}))
    with pytest.raises(InputError, match=f"not made by this project, or damaged: its '{key}'"):
        lora_peft.load_adapter(folder)


@pytest.mark.parametrize("form", [[], ["--json"], ["--explain"], ["--glue", "out.tsv"], ["--export", "out"]])
def test_answers_that_are_not_finite_are_never_printed(
    form: list[str], trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = torch.load(trained, weights_only=True)
    for name, tensor in checkpoint["state_dict"].items():
        tensor.fill_(1e38 if "lora" in name else 1.0)
    torch.save(checkpoint, "large.pt")
    write(tmp_path / "a.tsv", "index\tsentence\n0\tI loved it\n")
    texts = ["--file", "a.tsv"] if "--glue" in form else [] if "--export" in form else ["I loved it"]
    line = error_line(lambda: playground.main(["--model", "large.pt", *form, *texts]), capfd)
    assert line.startswith("error: large.pt: its answers are not finite")
    assert sorted(os.listdir()) == ["a.tsv", "large.pt"]


@pytest.mark.parametrize("names", [["a", "a"], ["a", "b" * 1_000_000], ["a", "b" * 1001]])
def test_label_names_of_no_use_are_refused(names: list[str], trained: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its 'label_names' is missing or no such value"):
        load_checkpoint(with_number(trained, tmp_path / "a.pt", "label_names", names))
    folder = shutil.copytree(adapter, tmp_path / "a")
    rewrite(folder / "lora_peft.json", lambda facts: facts.update(label_names=names))
    with pytest.raises(InputError, match="its 'label_names' is missing or no such value"):
        lora_peft.load_adapter(folder)


ODD_TENSORS = {
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "sparse": lambda t: t.to_sparse(),
    "compressed": lambda t: t.to_sparse_csr(),
    "meta": lambda t: t.to("meta"),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "complex": lambda t: t.to(torch.complex64),
    "half": lambda t: t.half(),
    "a list": lambda t: t.tolist(),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tensor_of_another_kind_is_refused(kind: str, trained: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["state_dict"][A_NAME] = ODD_TENSORS[kind](checkpoint["state_dict"][A_NAME])
    torch.save(checkpoint, tmp_path / "a.pt")
    with pytest.raises(InputError, match=rf"a\.pt: ('{A_NAME}' is no plain tensor|not a file of lora_scratch\.py)"):
        load_checkpoint(tmp_path / "a.pt")


DEEP = "[" * 100_000 + "]" * 100_000


def test_a_json_file_nested_without_end_is_refused(
    adapter: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    row = '{"sentence": ' + DEEP + ', "label": 1}\n'
    for name, content in (("a.jsonl", row), ("a.json", f"[{row}]"), ("b.json", DEEP), ("c.json", '{"a":' * 100_000)):
        path = write(tmp_path / name, content)
        assert f"{path}: cannot be read" in error_line(lambda path=path: load(path), capfd)
        arguments = ["--model", str(trained), "--file", str(path)]
        assert f"{path}: cannot be read" in error_line(lambda a=arguments: playground.main(a), capfd)
    for name in ("lora_peft.json", "adapter_config.json"):
        folder = shutil.copytree(adapter, tmp_path / f"with_{name}")
        write(folder / name, DEEP)
        with pytest.raises(InputError, match="not a readable adapter"):
            lora_peft.load_adapter(folder)


@SCRIPTS
def test_a_deeply_nested_file_beside_the_output_is_not_ours(
    script, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    write(tmp_path / "a.json", DEEP)
    output = tmp_path / ("a.pt" if script is lora_scratch else "a")
    refused(r"a\.json was not written here", script, flags(tiny_base, tiny_data, "--output", output))
    assert (tmp_path / "a.json").read_text() == DEEP


# --- Training states that are not what they should be


def moments(change: Callable[[dict], object]) -> Callable[[dict], object]:
    return lambda state: change(state["optimizer"]["state"][0])


def put(*path: object) -> Callable[[dict], object]:
    """Put the last of these at the place that the others lead to."""

    def change(state: dict) -> None:
        *way, key, value = path
        for step in way:
            state = state[step]
        state[key] = value

    return change


BAD_STATES = {
    "a moment of another shape": put("optimizer", "state", 0, "exp_avg", torch.zeros(3)),
    "a moment of another type": put("optimizer", "state", 0, "exp_avg_sq", torch.zeros(8, 32).double()),
    "a moment with NaN": moments(lambda m: m["exp_avg"].fill_(math.nan)),
    "a sparse moment": moments(lambda m: m.update(exp_avg=m["exp_avg"].to_sparse())),
    "a moment without numbers": moments(lambda m: m.update(exp_avg=m["exp_avg"].to("meta"))),
    "no moment": moments(lambda m: m.pop("exp_avg")),
    "one moment more": moments(lambda m: m.update(max_exp_avg_sq=m["exp_avg_sq"])),
    "a moment that is none": put("optimizer", "state", 0, None),
    "a step of another shape": put("optimizer", "state", 0, "step", torch.zeros(2)),
    "a step that is none": put("optimizer", "state", 0, "step", "2"),
    "no parameters": put("optimizer", "state", {}),
    "parameters of other names": lambda s: s["optimizer"]["state"].update(x=s["optimizer"]["state"].pop(0)),
    "no groups": put("optimizer", "param_groups", []),
    "another decay": lambda s: s["optimizer"]["param_groups"][0].update(weight_decay=1.0),
    "a rate of NaN": lambda s: s["optimizer"]["param_groups"][0].update(lr=math.nan),
    "a rate of another step": lambda s: s["optimizer"]["param_groups"][0].update(lr=1e-6),
    "a rate in words": lambda s: s["optimizer"]["param_groups"][0].update(lr="x"),
    "no losses": put("losses", torch.zeros(0)),
    "too many losses": put("losses", torch.zeros(100)),
    "losses of another type": put("losses", torch.zeros(2, dtype=torch.int64)),
    "losses in a table": put("losses", torch.zeros(2, 2)),
    "losses without numbers": put("losses", torch.zeros(2, device="meta")),
    "epochs that are none": put("epochs", [1]),
    "epochs that are not its own": put("epochs", [{"epoch": 1}] * 50),
    "epochs that no file can hold": put("epochs", [{"epoch": torch.ones(1)}]),
    "no generator": put("generators", []),
    "a generator of another type": put("generators", [torch.zeros(3)]),
    "a generator of another length": put("generators", [torch.zeros(3, dtype=torch.uint8)]),
    "a generator that is none": put("generators", ["x"]),
    "a weight of another shape": put("trained", "classifier.bias", torch.zeros(5)),
    "no weight": lambda s: s["trained"].pop("classifier.bias"),
    "settings of numbers": put("settings", {"lr": 3}),
    "a format that is none": put("format", "x"),
    "no longer a state": lambda s: s.clear(),
}
for field in ("settings", "trained", "optimizer", "scaler", "losses", "epochs", "generators", "format"):
    BAD_STATES[f"without its {field}"] = lambda s, field=field: s.pop(field)
    BAD_STATES[f"a number as its {field}"] = put(field, 0.5)


@pytest.fixture(scope="module")
def stopped(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of a run that was stopped after its second step."""
    output = tmp_path_factory.mktemp("stopped") / "a.pt"
    arguments = flags(tiny_base, tiny_data, "--max-steps", 4, "--output", output)
    with pytest.MonkeyPatch.context() as patch:
        collate, calls = lora_scratch.collate, []

        def interrupt(*args):
            calls.append(1)
            if len(calls) == 2:
                signal.raise_signal(signal.SIGTERM)
            return collate(*args)

        patch.setattr(lora_scratch, "collate", interrupt)
        assert lora_scratch.main(arguments) == 143
    assert len(torch.load(f"{output}.state", weights_only=True)["losses"]) == 2
    return arguments


@pytest.mark.parametrize("kind", BAD_STATES)
def test_a_training_state_of_no_use_is_refused_in_one_line(
    kind: str, stopped: list[str], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    shutil.copy(f"{stopped[-1]}.state", tmp_path / "a.pt.state")
    rewrite(tmp_path / "a.pt.state", BAD_STATES[kind])
    arguments = [*stopped[:-1], str(tmp_path / "a.pt"), "--resume"]
    line = error_line(lambda: lora_scratch.main(arguments), capfd)
    assert "a.pt.state" in line or "--resume: lr was" in line
    assert not (tmp_path / "a.pt").exists()


def test_resuming_needs_the_same_run_and_not_the_same_words(
    stopped: list[str], tiny_base: Path, tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """What does not change the training may change, and so may the way to base and data."""
    shutil.copy(f"{stopped[-1]}.state", tmp_path / "a.pt.state")
    (tmp_path / "base").symlink_to(tiny_base)
    other = tiny_data / ".." / tiny_data.name
    more = ["--eval-batch-size", 3, "--log-every", 1, "--save-every", 7, "--resume"]
    lora_scratch.main(flags(tmp_path / "base", other, "--max-steps", 4, *more, "--output", tmp_path / "a.pt"))
    assert "resumed after step 2\n" in capfd.readouterr().out
    lora_scratch.main([*stopped[:-1], str(tmp_path / "whole.pt")])
    one, two = (load_checkpoint(tmp_path / name)[1]["state_dict"] for name in ("a.pt", "whole.pt"))
    assert all(torch.equal(one[name], two[name]) for name in two)


# --- Tables

ODD = "caf\u00e9 \u201cbon\u201d"


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl"])
def test_the_playground_reads_what_windows_writes(
    name: str, encoding: str, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    texts = ["a film", ODD, "I loved it"]
    rows = [json.dumps({"sentence": text}, ensure_ascii=False) for text in texts] if name == "a.jsonl" else texts
    lines = rows if name in ("a.txt", "a.jsonl") else ["sentence", *rows]
    if name == "a.csv":
        lines[2] = '"' + ODD + '"'
    path = write(tmp_path / name, "".join(f"{line}\r\n" for line in lines).encode(encoding))
    assert [answer["text"] for answer in ask(capfd, "--model", trained, "--file", path)] == texts
    playground.main(["--model", str(trained), "--file", str(path)])
    noted = f"line {2 + (len(lines) > 3)} is not UTF-8; read as Windows-1252" if encoding == "cp1252" else ""
    error = capfd.readouterr().err
    assert noted in error if noted else error == ""


def test_json_of_windows_trains(tmp_path: Path) -> None:
    rows = [json.dumps({"sentence": text, "label": i}, ensure_ascii=False) for i, text in enumerate(["a film", ODD])]
    for encoding in ("utf-16", "cp1252"):
        for name in ("train.jsonl", "dev.jsonl"):
            write(tmp_path / name, "\r\n".join(rows).encode(encoding))
        train_set, eval_set, _ = load(tmp_path)
        assert train_set.text == eval_set.text == ["a film", ODD] and train_set.label == [0, 1]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_spaces_around_names_and_labels_are_left_out_with_a_note(
    name: str, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    separator = "," if name == "a.csv" else "\t"
    content = "".join(f" film {i} {separator} {i % 2} \n" for i in range(4))
    content = f" sentence {separator} label\n{content}"
    if name == "a.jsonl":
        content = "".join(json.dumps({" sentence ": f" film {i} ", " label": f" {i % 2} "}) + "\n" for i in range(4))
    path = write(tmp_path / name, content)
    train_set, eval_set, names = load(path)
    assert {*train_set.text, *eval_set.text} == {f" film {i} " for i in range(4)} and names == ["0", "1"]
    error = capfd.readouterr().err
    assert f"note: {path}: spaces around names of columns are left out" in error
    assert f"note: {path}: training: spaces around labels are left out" in error
    assert [answer["text"] for answer in ask(capfd, "--model", trained, "--file", path)] == [
        f" film {i} " for i in range(4)
    ]


@pytest.mark.parametrize("name", ["val.csv", "valid.csv", "Dev.csv", "validation.csv"])
def test_a_validation_file_has_any_of_its_usual_names(name: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    write(tmp_path / "train.csv", CSV + "a,1\nb,0\n")
    write(tmp_path / name, CSV + "c,1\n")
    write(tmp_path / "test.csv", "of another kind")
    train_set, eval_set, _ = load(tmp_path)
    assert train_set.text == ["a", "b"] and eval_set.text == ["c"]
    assert "not used" not in capfd.readouterr().err


def test_parts_are_read_in_their_order_and_a_file_that_is_not_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    texts = [f"film {i}" for i in range(30)]
    for i in (2, 0, 1):
        frame = pandas.DataFrame({"sentence": texts[10 * i : 10 * i + 10], "label": [0, 1] * 5})
        frame.to_parquet(tmp_path / f"train-{i:05d}-of-00003.parquet")
    write(tmp_path / "evaluation.csv", CSV + "c,1\n")
    train_set, eval_set, _ = load(tmp_path, "--train-samples", "27")
    assert {*train_set.text, *eval_set.text} == set(texts)
    note = f"note: {tmp_path}: not used: evaluation.csv\n"
    assert note in capfd.readouterr().err
    frame.to_parquet(tmp_path / "val-00000-of-00001.parquet")
    train_set, eval_set, _ = load(tmp_path)
    assert train_set.text == texts and eval_set.text == texts[10:20]
    assert (
        capfd.readouterr().err
        == f"{note}note: {tmp_path}: 10 validation texts are among the training rows: the result is too good\n"
    )


def test_a_carriage_return_in_a_tsv_file_is_text(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "a.tsv", TSV + "one\rtwo\t1\nthree\r\r\t0\n")
    train_set, eval_set, names = load(path)
    assert {*train_set.text, *eval_set.text} == {"one\rtwo", "three\r\r"} and names == ["0", "1"]
    assert [answer["text"] for answer in ask(capfd, "--model", trained, "--file", path)] == ["one\rtwo", "three\r\r"]


ZERO_WIDTH = ["\u200b", "\ufeff\u200d ", " \u2060\xad\u200b\t"]


def test_text_without_a_width_is_blank(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    rows = [*ZERO_WIDTH, "a", "a\u200bb", "b"]
    for name in ("train.jsonl", "dev.jsonl"):
        lines = [json.dumps({"sentence": text, "label": i % 2}) + "\n" for i, text in enumerate(rows)]
        write(tmp_path / name, "".join(lines))
    assert load(tmp_path)[0].text == rows[3:]
    assert "skipped 3 blank sentences of 6 in the training split" in capfd.readouterr().out
    answers = ask(capfd, "--model", trained, "--file", tmp_path / "train.jsonl")
    assert [answer["label"] is None for answer in answers] == [True] * 3 + [False] * 3
    assert [answer["probabilities"] == {} for answer in answers] == [True] * 3 + [False] * 3


def test_a_pandas_index_changes_no_row(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Parquet keeps the index of a table that was filtered or shuffled."""
    frame = pandas.DataFrame({"sentence": [f"film {i}" for i in range(20)], "label": [0, 1] * 10})
    for changed in (frame[frame.index % 3 > 0], frame.sample(frac=1, random_state=1), frame.set_index("label")):
        assert list(changed.index) != list(range(len(changed)))
        for name in ("train", "dev"):
            changed.to_parquet(tmp_path / f"{name}.parquet")
        train_set, eval_set, names = load(tmp_path)
        assert train_set.text == eval_set.text == list(changed["sentence"])
        assert train_set.label == list(changed.reset_index()["label"]) and names == ["0", "1"]
        answers = ask(capfd, "--model", trained, "--file", tmp_path / "train.parquet")
        assert [answer["text"] for answer in answers] == train_set.text


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_that_are_not_asked_for_may_hold_anything(kind: str, tmp_path: Path) -> None:
    rows = [{"sentence": f"film {i}", "label": i % 2, "nothing": None, "map": {"a": i}} for i in range(10)]
    rows = [row | {"list": [row["label"]] * row["label"], "when": "2020-01-01T00:00:00"} for row in rows]
    for name in ("train", "dev"):
        if kind == "jsonl":
            write(tmp_path / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        else:
            columns = {key: [row[key] for row in rows] for key in rows[0]}
            maps = pyarrow.map_(pyarrow.string(), pyarrow.int64())
            columns["map"] = pyarrow.array([[("a", i)] for i in range(10)], maps)
            columns["when"] = pyarrow.array([datetime.datetime(1, 1, 1)] * 10, pyarrow.timestamp("us"))  # before 1677
            columns["nothing"] = pyarrow.nulls(10)
            columns["day"] = pyarrow.array([datetime.date(9999, 1, 1)] * 10)
            columns["bytes"] = [b"\xff"] * 10
            parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
    train_set, eval_set, names = load(tmp_path)
    assert train_set.text == eval_set.text == [f"film {i}" for i in range(10)]
    assert train_set.label == [0, 1] * 5 and names == ["0", "1"]


def test_whole_numbers_may_be_floats_and_texts_may_be_missing(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    frame = pandas.DataFrame({"sentence": ["a", None, "b", math.nan, "c"], "label": [1.0, 0.0, 0.0, 1.0, 1.0]})
    for name in ("train", "dev"):
        frame.to_parquet(tmp_path / f"{name}.parquet")
    train_set, _, names = load(tmp_path)
    assert train_set.text == ["a", "b", "c"] and train_set.label == [1, 0, 1] and names == ["0", "1"]
    assert "skipped 2 blank sentences of 5 in the training split" in capfd.readouterr().out
    rows = ['{"sentence": "a", "label": 1.0}\n', '{"sentence": NaN, "label": 0}\n', '{"sentence": "b", "label": 0}\n']
    for name in ("train", "dev"):
        write(tmp_path / "json" / f"{name}.jsonl", "".join(rows))
    train_set, eval_set, names = load(tmp_path / "json")
    assert train_set.text == ["a", "b"] and train_set.label == eval_set.label == [1, 0] and names == ["0", "1"]


def test_a_missing_number_makes_no_fraction_of_the_others(tmp_path: Path) -> None:
    """As pandas does, to whom 2^53 and the next number are then the same."""
    columns = {"sentence": ["a", "b", None], "label": pyarrow.array([2**53 + 1, 2**53, None], pyarrow.int64())}
    for name in ("train", "dev"):
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
    train_set, _, names = load(tmp_path)
    assert train_set.label == [1, 0] and names == [str(2**53), str(2**53 + 1)]


def test_scores_are_no_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", CSV + "".join(f"film {i},{i % 4 / 2}\n" for i in range(20)))
    with pytest.raises(InputError, match=r"4 different numbers in 'label', 0\.5 among them; labels are whole"):
        load(path)


def test_every_row_with_a_label_of_its_own_is_another_column(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    for label in ("{}", "id{}"):
        rows = "".join(f"film {i},{label.format(i)}\n" for i in range(50))
        path = write(tmp_path / "a.csv", CSV + rows)
        line = error_line(lambda path=path: load(path), capfd)
        assert "different labels in 50 rows of 'label'" in line and "is it the right --label-column?" in line


def test_a_table_without_names_is_refused_with_the_remedy(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        path = write(tmp_path / name, "".join(f"film {i}{separator}{i % 2}\n" for i in range(9)))
        line = error_line(lambda path=path: load(path), capfd)
        assert "its first row looks like data" in line and "film 0, 0; put a row of names above it" in line


# --- Messages


def test_a_message_is_one_short_line_whatever_the_data_hold(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    long, escapes = "x" * 100_000, "\x1b[31m\x07\r\n\u2028\u202e"
    many = "".join(f"film {i},label{i % 5000}\n" for i in range(20_000))
    for rows, named in (
        (CSV + f"a,{long}\nb,{long}\n", "the only label is 'xxx"),
        (f'"{escapes}",label\na,1\n', "no column 'sentence' but "),
        (f"{long},{long}2\na,1\n", "no column 'sentence' but xxx"),
        (f'sentence,label\n"{escapes}",1\n"{escapes}",1\n', "the only label"),
        (f'sentence,label\na,"{escapes}"\nb,"{escapes}x"\nc,"\x00"\n', "--label-names is for integer labels"),
        (CSV + many, "--label-names is for integer labels"),
        (CSV + f"a,{long}\nb,{long}y\n", "labels of over 1000 characters"),
        (CSV + f"a,{long[:1000]}\nb,y\n", "--label-names is for integer labels"),
        (CSV + many.replace("label", ""), "--label-names: a, b are not 5000 names for the labels 0, 1, 2"),
    ):
        path = write(tmp_path / "a.csv", rows)
        line = error_line(lambda path=path: load(path, "--label-names", "a", "b"), capfd)
        assert f"{path}: {named}" in line or f"error: {named}" in line
    write(tmp_path / "folder" / "train.csv", CSV + many)
    write(tmp_path / "folder" / "dev.csv", CSV + f"a,{long}\n")
    line = error_line(lambda: load(tmp_path / "folder"), capfd)
    assert "label 'xxx" in line and "(5,000 in all)" in line
    line = error_line(lambda: load(path, "--text-column", escapes + long), capfd)
    assert "no column " in line
    write(tmp_path / "a.jsonl", json.dumps({"sentence": [long], "label": 1}))
    assert "is not text but ['xxx" in error_line(lambda: load(tmp_path / "a.jsonl"), capfd)


@pytest.mark.parametrize("length", [1000, 1001])
def test_a_label_is_short_enough_to_be_read_again_or_refused_before_the_training(
    length: int, tiny_base: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.csv", CSV + f"a,{'x' * length}\nb,y\nc,y\n")
    if length > 1000:
        refused(r"labels of over 1000 characters", lora_scratch, flags(tiny_base, path, "--output", tmp_path / "a.pt"))
        assert list(tmp_path.iterdir()) == [path]
    else:
        assert Run(tiny_base, path, tmp_path / "a.pt", *SHORT).checkpoint["label_names"] == ["x" * 1000, "y"]


# --- The command line


@SCRIPTS
@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--r", "1" + "0" * 30),
        ("--r", "9" * 5000),
        ("--threads", str(10**10)),
        ("--max-steps", "7" * 400),
        ("--alpha", "inf"),
        ("--alpha", "1e308"),
        ("--epochs", "9" * 30),
        ("--lr", "1e400"),
    ],
)
def test_a_number_beyond_all_measure_is_refused_by_its_flag(
    flag: str, value: str, script, capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        lora_scratch.run(lambda: script.main([flag, value, "--dataset", "no_such.tsv"]))
    error = capfd.readouterr().err
    assert stop.value.code == 2 and f"error: argument {flag}: " in error and "Traceback" not in error
    assert error.count("\n") == 2  # the usage, and the mistake


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_without_torchrun_means_nothing(
    rank: str, tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = flags(tiny_base, tiny_data, *SHORT, "--output", tmp_path / "a.pt")
    with pytest.raises(SystemExit) as stop:
        lora_scratch.run(lambda: lora_scratch.main(arguments))
    assert not stop.value.code and (tmp_path / "a.pt").exists() and "epoch 1:" in capfd.readouterr().out


@SCRIPTS
def test_a_name_that_starts_with_a_dash_is_written_and_asked(
    script, tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    output = "-x.pt" if script is lora_scratch else "-x"
    script.main([*flags(tiny_base, tiny_data, *SHORT), f"--output={output}"])
    command = shlex.split(capfd.readouterr().out.splitlines()[-1].removeprefix("ask it: "))
    assert command[1].endswith("playground.py") and command[3] == f"./{output}"
    playground.main(command[2:])
    assert capfd.readouterr().out.endswith(" %\n")


STUBS = [("lora_scratch.py", "torch.py"), ("lora_peft.py", "peft.py")]


@pytest.mark.parametrize(("script", "stub"), STUBS)
def test_ctrl_c_during_the_imports_ends_without_a_traceback(script: str, stub: str, tmp_path: Path) -> None:
    write(tmp_path / stub, "import time; print('importing', flush=True); time.sleep(60)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, Path(lora_scratch.__file__).with_name(script)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == (b"", b"") and process.returncode == -signal.SIGINT


@SCRIPTS
def test_a_current_folder_that_is_gone_is_one_line(
    script, tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    arguments = flags(tiny_base, tiny_data, *SHORT, "--output", "a.pt" if script is lora_scratch else "a")
    line = error_line(lambda: script.main(arguments), capfd)
    assert "cannot write" in line and "No such file or directory" in line and "another place" in line


# --- Layers


def test_both_scripts_wrap_the_same_layers_for_all_linear(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    more = [*SHORT, "--targets", "all-linear"]
    run = Run(tiny_base, tiny_data, tmp_path / "a.pt", *more)
    lora_peft.main(flags(tiny_base, tiny_data, *more, "--output", tmp_path / "a_peft"))
    saved = load_file(tmp_path / "a_peft" / "adapter_model.safetensors")
    prefix = "base_model.model."
    theirs = {name.removeprefix(prefix).removesuffix(".lora_A.weight") for name in saved if "lora_A" in name}
    ours = {name.removesuffix(".lora_A") for name in run.state if name.endswith(".lora_A")}
    assert ours == theirs and len(ours) == 2 * 6
    facts = json.loads((tmp_path / "a_peft" / "lora_peft.json").read_text(encoding="utf-8"))
    assert facts["targets"] == run.checkpoint["targets"]


def test_a_target_may_share_its_name_with_a_module_of_another_kind(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT takes a name alone for every module that has it, and refuses what is no layer."""

    def with_namesake(*args) -> lora_scratch.Base:
        base = load_base(*args)
        base.model.distilbert.extra = nn.Module()
        base.model.distilbert.extra.q_lin = nn.Identity()
        return base

    for script in (lora_scratch, lora_peft):
        monkeypatch.setattr(script, "load_base", with_namesake)
    lora_peft.main(flags(tiny_base, tiny_data, *SHORT, "--output", tmp_path / "p"))
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text(encoding="utf-8"))
    paths = [f"distilbert.transformer.layer.{i}.attention.{name}" for i in (0, 1) for name in ("q_lin", "v_lin")]
    assert sorted(config["target_modules"]) == paths
    lora_scratch.main(flags(tiny_base, tiny_data, *SHORT, "--output", tmp_path / "s.pt"))
    lora_peft.main(["--export-scratch", str(tmp_path / "p"), "--output", str(tmp_path / "x.pt")])
    lora_peft.main(["--import-scratch", str(tmp_path / "s.pt"), "--output", str(tmp_path / "y")])
    one, two = (predict(playground.load("", tmp_path / n, None).base.model, SENTENCES, 2) for n in ("p", "x.pt"))
    assert torch.allclose(one, two, rtol=0, atol=1e-5)


def test_an_adapted_layer_gives_weight_and_bias_of_its_base() -> None:
    base = nn.Linear(4, 3)
    layer = lora_scratch.LoRALinear(base, 2, 4.0)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert lora_scratch.LoRALinear(nn.Linear(4, 3, bias=False), 2, 4.0).bias is None
    assert not {"weight", "bias"} & layer.state_dict().keys()
    with pytest.raises(AttributeError, match=r"LoRALinear.*'in_features'"):
        _ = layer.in_features
