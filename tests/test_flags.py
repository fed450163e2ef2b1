"""Mistakes on the command line, devices and precisions, and bases that do not fit: one line, before the training."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Run, flags, with_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, DistilBertConfig, DistilBertModel

import lora_scratch
from lora_scratch import InputError, choose_device, choose_precision, load_base, main


def refused(message: str, arguments: list[str]) -> None:
    with pytest.raises(InputError, match=message):
        main(arguments)


@pytest.mark.parametrize("make", [lambda p: p / "file" / "a.pt", lambda p: p / "file" / "deeper" / "a.pt"])
def test_an_output_folder_that_cannot_be_is_refused_at_once(make, tiny_base: Path, tiny_data: Path, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    refused("--output .*cannot write there", flags(tiny_base, tiny_data, "--output", make(tmp_path)))


def test_an_output_folder_without_the_right_to_write_is_refused_at_once(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = flags(tiny_base, tiny_data, "--output", tmp_path / "a.pt")

    def fail(*_, **__) -> None:  # root may write anywhere
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "touch", fail)
    refused(r"--output .*a\.pt: cannot write there \(Permission denied\)", arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["{}/reviews.tsv", "{}/reviews.pt", "{}/base", ".", ".."])
def test_an_output_in_the_way_of_its_input_is_refused(
    output: str, tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of reviews.pt is reviews.json, its tokenizer goes into the folder reviews."""
    monkeypatch.chdir(tmp_path)
    base = shutil.copytree(tiny_base, tmp_path / "base")
    data = shutil.copytree(tiny_data, tmp_path / "reviews")
    before = sorted(tmp_path.rglob("*"))
    refused(r"--output.*(of others|ends in \.pt)", flags(base, data, "--output", output.format(tmp_path)))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["a", "a.bin", "a.pt.gz"])
def test_an_output_without_pt_is_refused(name: str, tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    refused(r"give a file name that ends in \.pt", flags(tiny_base, tiny_data, "--output", tmp_path / name))


def test_an_output_that_is_a_folder_keeps_it(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "a.pt").mkdir()
    refused(r"a\.pt", flags(tiny_base, tiny_data, "--max-steps", "1", "--output", tmp_path / "a.pt"))
    assert (tmp_path / "a.pt").is_dir() and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("name", ["a.pt", "a.json", "a.pt.state", "a", "a/notes.txt"])
def test_files_that_were_not_written_here_are_never_replaced(
    name: str, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('["of somebody else"]')
    refused(r"--output: .*a.* another place", flags(tiny_base, tiny_data, "--output", tmp_path / "a.pt"))
    assert path.read_text() == '["of somebody else"]'
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_a_result_of_this_project_is_replaced_by_the_next_run(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        run = Run(tiny_base, tiny_data, tmp_path / "a.pt", "--max-steps", "1", "--seed", seed)
        assert run.record["settings"]["seed"] == run.checkpoint["record"]["settings"]["seed"] == seed


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"--device cuda: .*--device cpu"):
        choose_device("cuda")
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


def test_float16_needs_a_gpu() -> None:
    with pytest.raises(InputError, match="--precision fp16 needs a CUDA GPU; use fp32 or bf16"):
        choose_precision("fp16", torch.device("cpu"))
    assert choose_precision("bf16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize(
    ("able", "dtype"),
    [
        ({"amx_bf16": True, "avx2": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"bf16": True, "sve": True}, torch.bfloat16),  # ARM
        ({"amx_bf16": False, "avx512_f": True, "avx2": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_the_processor_decides_the_precision(able: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert choose_precision("auto", torch.device("cpu")) == dtype
    assert choose_precision("fp32", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_the_gpu_decides_the_precision(capability: tuple, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_precision("auto", torch.device("cuda")) == dtype
    assert choose_precision("fp16", torch.device("cuda")) == torch.float16


def test_a_tokenizer_that_is_larger_than_its_model_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    config = DistilBertConfig(vocab_size=20, dim=32, hidden_dim=64, n_layers=1, n_heads=4)
    base = with_tokenizer(tmp_path / "base", tiny_base, DistilBertModel(config))
    with pytest.raises(InputError, match=r"a tokenizer of \d\d entries does not fit 20 embeddings"):
        load_base(str(base), None, ["a", "b"], 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"pad_token": None}, "no padding token"), ({"padding_side": "left"}, "pads at the left")],
)
def test_a_tokenizer_that_cannot_pad_at_the_right_is_refused(change: dict, message: str, tiny_base, tmp_path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    (base / "tokenizer_config.json").write_text(json.dumps(settings | change), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_base(str(base), None, ["a", "b"], 128)


def test_a_classifier_of_other_labels_gets_a_new_head(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=5, problem_type="regression")
    base = load_base(str(with_tokenizer(tmp_path / "five", tiny_base, model)), None, ["a", "b"], 128)
    assert "new classification head" in capsys.readouterr().err
    assert base.model.classifier.weight.shape == (2, 32) and base.model.config.id2label == {0: "a", 1: "b"}
    assert base.identity["fingerprint"] == load_base(str(tiny_base), None, ["a", "b"], 128).identity["fingerprint"]


@pytest.mark.parametrize("length", [129, 512])
def test_a_maximum_length_beyond_the_model_is_refused(length: int, tiny_base: Path) -> None:
    with pytest.raises(InputError, match=f"--max-length {length} is .*128"):
        load_base(str(tiny_base), None, ["a", "b"], length)


def damage(folder: Path, name: str, content: bytes | None) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [None, b"", b"text", b"{}", b"[]", b'{"model_type": "no such"}', bytes(64)])
def test_a_damaged_base_is_refused_or_complete(
    name: str, content: bytes | None, tiny_base: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    damage(base, name, content)
    try:
        loaded = load_base(str(base), None, ["a", "b"], 128)
    except InputError as error:
        assert str(base) in str(error)
    else:
        assert loaded.identity == load_base(str(tiny_base), None, ["a", "b"], 128).identity


def test_half_a_base_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    whole = (base / "model.safetensors").read_bytes()
    damage(base, "model.safetensors", whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot load the base model"):
        load_base(str(base), None, ["a", "b"], 128)


def test_a_base_that_lacks_weights_of_its_encoder_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    base, name = shutil.copytree(tiny_base, tmp_path / "base"), "transformer.layer.1.ffn.lin2.weight"
    weights = load_file(base / "model.safetensors")
    del weights[name]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"weights are missing.*distilbert\.{name}"):
        load_base(str(base), None, ["a", "b"], 128)


@pytest.mark.parametrize("name", ["no/such", "./nothing", "/no/such/folder", "with space", "a/b/c/d"])
def test_a_base_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"cannot load the base model '{name}' .*name a local folder with --model"):
        load_base(name, None, ["a", "b"], 128)


@pytest.mark.parametrize(
    "mistake",
    [
        ["--r", "0"],
        ["--r", "x"],
        ["--epochs", "0"],
        ["--max-steps", "-1"],
        ["--batch-size", "0"],
        ["--lr", "-1"],
        ["--lr", "nan"],
        ["--dropout", "1"],
        ["--warmup", "2"],
        ["--max-length", "2"],
        ["--precision", "fp8"],
        ["--seed", "-1"],
        ["--seed", str(2**64)],
        ["--nonsense"],
    ],
)
def test_a_value_out_of_range_is_refused_by_its_flag(mistake: list[str], capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        lora_scratch.run(lambda: main([*mistake, "--dataset", "no_such.tsv", "--precision", "fp32"]))
    error = capfd.readouterr().err
    assert stop.value.code == 2 and mistake[0] in error and "Traceback" not in error
