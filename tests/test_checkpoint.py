"""Checkpoints: files that are none are refused in one line, those of earlier versions are read."""

import json
import math
import pickle
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES, Run, logits, with_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, DistilBertModel

from lora_scratch import InputError, load_checkpoint, predict

ANY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


@pytest.fixture(scope="module")
def small(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of rank 1."""
    return Run(tiny_base, tiny_data, tmp_path_factory.mktemp("small") / "a.pt", "--max-steps", "1", "--r", "1").path


def broken(small: Path, folder: Path, change: Callable[[dict], object]) -> Path:
    """What `change` makes of a checkpoint, in a file of its own."""
    torch.save(change(torch.load(small, weights_only=True)), folder / "broken.pt")
    return folder / "broken.pt"


A_NAME = "distilbert.transformer.layer.0.attention.q_lin.lora_A"


def change_tensors(change: Callable[[dict], object]) -> Callable[[dict], dict]:
    """The change of a checkpoint that changes its tensors."""

    def changed(checkpoint: dict) -> dict:
        change(checkpoint["state_dict"])
        return checkpoint

    return changed


def put(name: object, value: object) -> Callable[[dict], dict]:
    return change_tensors(lambda state: state.update({name: value}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [1, 2, 3], "not made by this project"),
        (lambda c: torch.ones(3), "not made by this project"),
        (lambda c: c["state_dict"], "not made by this project"),
        (lambda c: {"hello": 1}, "not made by this project"),
        (lambda c: c | {"format": 2}, "format 2, but this version reads 1"),
        (lambda c: c | {"fingerprint": "0" * 64}, r"trained on '.*' \(000000000000\), but '.*' is another base"),
        (change_tensors(lambda t: t.pop(A_NAME)), f"tensor '{A_NAME}' is missing"),
        (change_tensors(lambda t: t.pop("classifier.bias")), r"tensor 'classifier.bias' is missing"),
        (change_tensors(lambda t: t[A_NAME][0, 3].fill_(math.nan)), f"'{A_NAME}'.*NaN"),
        (change_tensors(lambda t: t["classifier.bias"][1].fill_(-math.inf)), r"'classifier.bias'.*infinity"),
        (put("other", torch.ones(1)), "tensor 'other' is not expected"),
        (put(7, torch.ones(1)), "7 is not expected"),
        (put(A_NAME, torch.ones(8, 32)), rf"'{A_NAME}' \(8, 32\) has the wrong shape"),
        (put(A_NAME, torch.ones(1, 32).double()), A_NAME),
        (put(A_NAME, torch.ones(1, 32).to_sparse()), A_NAME),
        (put(A_NAME, torch.ones(1, 32, device="meta")), A_NAME),
        (put(A_NAME, [[0.0] * 32]), A_NAME),
    ],
)
def test_a_broken_checkpoint_is_refused_saying_what_is_wrong(small: Path, tmp_path: Path, change, message) -> None:
    path = broken(small, tmp_path, change)
    with pytest.raises(InputError, match=message) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)


def test_a_missing_renamed_or_truncated_file_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.pt: no such file; python lora_scratch\.py makes one"):
        load_checkpoint(tmp_path / "none.pt")
    whole = small.read_bytes()
    for content in (b"a text that was renamed", b"", whole[:-1], whole[:-200], whole[: len(whole) // 2], whole[:100]):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(InputError, match=r"a\.pt: not a file of lora_scratch\.py, or a damaged one"):
            load_checkpoint(tmp_path / "a.pt")
    with pytest.raises(InputError, match="not a file of lora_scratch"):
        load_checkpoint(tmp_path)


WRONG = {
    "format": ["1", None, 1.5, torch.ones(2), [1]],
    "base": [None, 7, "", "/no/such/folder", "no/such/name", "\0", ["a"], "../" * 50],
    "revision": [3, ["main"]],
    "fingerprint": [None, 3, b"bytes", ""],
    "label_names": [3, None, "bad", [], ["only one"], ["a", "b", "c"], ["a", 2], [["a"], ["b"]], {"a": 0, "b": 1}],
    "max_length": [None, "128", 1.5, -1, 0, 10**6, 10**30, [128]],
    "r": ["1", None, 0, -1, 2, 1.5, 10**9, 10**30, [1]],
    "alpha": ["16", None, [16], 10**400],
    "dropout": ["0.1", None, -1, 2.0, [0.1]],
    "targets": [None, "q_lin", 3, [1], ["nothing"], ["classifier"], ["q_lin"], [["q_lin"]], {"q_lin": 1}],
    "use_rslora": ["yes", None, 3, []],
    "state_dict": [None, [], {}, 3, "text", torch.ones(3), {1: 2}, {"a": None}],
}


@pytest.mark.parametrize("key", WRONG)
def test_a_fact_of_another_type_is_refused(small: Path, tmp_path: Path, key: str) -> None:
    for value in WRONG[key]:
        path = broken(small, tmp_path, lambda c, value=value: {**c, key: value})
        try:
            load_checkpoint(path)
        except InputError as error:
            assert str(error)
        except Exception as error:
            raise AssertionError(f"{key} = {value!r}: {type(error).__name__}: {error}") from error
        else:
            raise AssertionError(f"{key} = {value!r} was accepted")
    path = broken(small, tmp_path, lambda c: {k: v for k, v in c.items() if k != key})
    with pytest.raises(InputError, match=rf"not made by this project.*{key}"):
        load_checkpoint(path)


def test_another_base_is_refused_naming_both(small: Path, tiny_base: Path, tmp_path: Path) -> None:
    model = DistilBertModel.from_pretrained(tiny_base)
    with torch.no_grad():
        model.transformer.layer[1].ffn.lin2.weight[3, 4] += 1e-4
    other = with_tokenizer(tmp_path / "other", tiny_base, model)
    with pytest.raises(InputError) as error:
        load_checkpoint(small, str(other))
    assert str(tiny_base) in str(error.value) and str(other) in str(error.value)
    moved = shutil.copytree(tiny_base, tmp_path / "moved")
    assert torch.equal(predict(load_checkpoint(small, str(moved))[0].model, SENTENCES, 2), logits(small))


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("config.json", "n_heads", 2, "trained with n_heads 4, but the config.json of .* says 2"),
        ("config.json", "activation", "relu", "trained with activation 'gelu', but"),
        ("tokenizer.json", "normalizer", None, "trained with another tokenizer"),
    ],
)
def test_the_same_weights_that_would_compute_otherwise_are_refused(
    small: Path, tiny_base: Path, tmp_path: Path, file: str, key: str, value: object, message: str
) -> None:
    other = shutil.copytree(tiny_base, tmp_path / "other")
    content = json.loads((other / file).read_text(encoding="utf-8"))
    assert content[key] != value
    (other / file).write_text(json.dumps(content | {key: value}), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_checkpoint(small, str(other))


class Malicious:
    """Unpickling this would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_code_in_a_file_is_never_run(small: Path, tmp_path: Path) -> None:
    trap, path = tmp_path / "trap", tmp_path / "a.pt"
    pickle.loads(pickle.dumps(Malicious(trap)))
    trap.unlink()  # so the trap works
    path.write_bytes(pickle.dumps(Malicious(trap)))
    for write in (
        lambda: path.write_bytes(pickle.dumps(Malicious(trap))),
        lambda: torch.save(Malicious(trap), path),
        lambda: torch.save(torch.load(small, weights_only=True) | {"base": Malicious(trap)}, path),
        lambda: torch.save({"a": Malicious(trap)}, path, _use_new_zipfile_serialization=False),
    ):
        write()
        with pytest.raises(InputError, match="not a file of lora_scratch"):
            load_checkpoint(path)
        assert not trap.exists()


@settings(ANY, max_examples=50)
@given(content=st.binary(max_size=300), start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"PK\x05\x06"]))
def test_any_bytes_are_refused(tmp_path: Path, content: bytes, start: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(start + content)
    with pytest.raises(InputError, match=r"not a file of lora_scratch|not made by this project"):
        load_checkpoint(tmp_path / "a.pt")


@settings(ANY, max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255))
def test_a_damaged_byte_is_noticed_or_does_no_harm(small: Path, tmp_path: Path, place: float, bits: int) -> None:
    content, whole = bytearray(small.read_bytes()), torch.load(small, weights_only=True)
    content[int(place * len(content))] ^= bits
    (tmp_path / "a.pt").write_bytes(content)
    try:
        _, found = load_checkpoint(tmp_path / "a.pt")
    except InputError:
        return
    state, expected = found.pop("state_dict"), whole.pop("state_dict")
    assert found == whole
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


# --- Files of earlier versions


def written_by_an_earlier_version(tiny_base: Path, path: Path) -> dict:
    """A checkpoint of format 1 in the layout of the first versions, which did not describe the tokenizer."""
    weights = {f"distilbert.{name}": t for name, t in load_file(tiny_base / "model.safetensors").items()}
    digest = sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy())
    generator = torch.Generator().manual_seed(0)
    state = {}
    for layer in (0, 1):
        for name in ("q_lin", "v_lin"):
            module = f"distilbert.transformer.layer.{layer}.attention.{name}"
            state[f"{module}.lora_A"] = torch.randn(3, 32, generator=generator)
            state[f"{module}.lora_B"] = torch.randn(32, 3, generator=generator)
    for name, size in (("pre_classifier", (32, 32)), ("classifier", (2, 32))):
        state[f"{name}.weight"] = torch.randn(size, generator=generator)
        state[f"{name}.bias"] = torch.randn(size[0], generator=generator)
    facts = {
        "base": str(tiny_base),
        "revision": None,
        "fingerprint": digest.hexdigest(),
        "label_names": ["bad", "good"],
    }
    facts |= {"max_length": 128, "r": 3, "alpha": 6.0, "dropout": 0.1, "use_rslora": False}
    facts |= {"targets": ["q_lin", "v_lin"]}
    checkpoint = {"format": 1, "state_dict": state, **facts, "record": {"settings": {"r": 3}, "epochs": []}}
    torch.save(checkpoint, path)
    return checkpoint


def test_a_file_of_an_earlier_version_answers_as_before(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = written_by_an_earlier_version(tiny_base, tmp_path / "a.pt")
    base, found = load_checkpoint(tmp_path / "a.pt")
    assert "of an earlier version: its base's weights are checked, its tokenizer is not" in capsys.readouterr().err
    assert found["record"] == checkpoint["record"] and base.model.config.id2label == {0: "bad", 1: "good"}
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_base).eval()
    state = plain.state_dict()
    for name, tensor in checkpoint["state_dict"].items():
        if name in state:
            state[name].copy_(tensor)
        elif name.endswith("lora_A"):
            module = name.removesuffix(".lora_A")
            state[f"{module}.weight"] += 6 / 3 * checkpoint["state_dict"][f"{module}.lora_B"] @ tensor
    with torch.no_grad():
        expected = torch.cat([plain(SENTENCES[i][None]).logits for i in range(len(SENTENCES))])
    assert torch.allclose(logits(tmp_path / "a.pt"), expected, rtol=1e-5, atol=1e-5) and expected.std() > 1
