"""Files from outside: checkpoints, adapter folders, training states, and a disk that fails."""

import errno
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import lora_scratch
from lora_scratch import FORMAT, InputError, load_checkpoint, seen_from_here, write_file

import pytest
import torch
from conftest import Run, flags, logits, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_peft
from lora_peft import FACTS_FILE, TENSORS_FILE, load_adapter

ANY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
A_NAME = "distilbert.transformer.layer.0.attention.q_lin.lora_A"
SHORT = ("--max-steps", 5, "--r", 1, "--lr", 0.01)


@pytest.fixture(scope="module")
def small(tiny_base, tiny_data, tmp_path_factory) -> Run:
    """A run of rank 1: a checkpoint, and its training state."""
    return Run(tiny_base, tiny_data, tmp_path_factory.mktemp("small") / "a.pt", *SHORT)


@pytest.fixture(scope="module")
def adapter(tiny_base, tiny_data, tmp_path_factory) -> Path:
    """An adapter folder of rank 1."""
    folder = tmp_path_factory.mktemp("adapter") / "a"
    lora_peft.main(flags(tiny_base, tiny_data, *SHORT, "--output", folder))
    return folder


def changed(source: Path, folder: Path, change: Callable[[dict], object]) -> Path:
    """A copy of a file of torch.save in which `change` has changed the dictionary."""
    content = torch.load(source, weights_only=True)
    change(content)
    torch.save(content, folder / source.name)
    return folder / source.name


def rewritten(adapter: Path, folder: Path, file: str, change: Callable[[dict], object]) -> Path:
    """A copy of an adapter folder in which `change` has changed a file, and the digest with it."""
    folder = shutil.copytree(adapter, folder / "a", dirs_exist_ok=True)
    if file == TENSORS_FILE:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        digest = sha256((folder / file).read_bytes()).hexdigest()
        file, change = FACTS_FILE, lambda facts: facts.update(tensors=digest)
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    change(content)
    (folder / file).write_text(json.dumps(content), encoding="utf-8")
    return folder


def resume(run: Run, state: Path) -> object:
    """The same command with that state."""
    return lora_scratch.main([*run.flags, "--output", str(state.with_suffix("")), "--resume"])


def put(name: str, make: Callable[[Tensor], object]) -> Callable[[dict], None]:
    """Let `make` change the tensor of that name, whatever its file puts around it."""

    def change(tensors: dict) -> None:
        key = next(key for key in tensors if name in key)
        tensors[key] = make(tensors[key])

    return change


SOUND = {  # kinds that an adapter folder can hold, too
    "of another shape": lambda t: t.new_ones(len(t), 5),
    "of one dimension more": lambda t: t[None],
    "half": lambda t: t.half(),
    "NaN": lambda t: t.clone().fill_(math.nan),
    "infinite": lambda t: t.clone().fill_(-math.inf),
}
FAULTS = SOUND | {
    "complex": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
    "compressed": lambda t: t.to_sparse_csr(),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "meta": lambda t: t.to("meta"),
    "a list": lambda t: t.tolist(),
    "nothing": lambda t: None,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_tensor_that_does_not_fit_is_refused(fault, small, adapter, tmp_path) -> None:
    in_place, moment = put(A_NAME, FAULTS[fault]), put("exp_avg", FAULTS[fault])
    path = changed(small.path, tmp_path, lambda c: in_place(c["state_dict"]))
    refused(lambda: load_checkpoint(path), path)
    path.unlink()
    for change in (lambda s: in_place(s["trained"]), lambda s: moment(s["optimizer"]["state"][0])):
        state = changed(small.path.with_suffix(".pt.state"), tmp_path, change)
        refused(lambda state=state: resume(small, state), state)
    if fault in SOUND:
        folder = rewritten(adapter, tmp_path, TENSORS_FILE, in_place)
        refused(lambda: load_adapter(folder), folder, A_NAME)


@pytest.mark.parametrize("name", ["classifier.bias", A_NAME])
@pytest.mark.parametrize("kind", ["missing", "left over"])
def test_a_tensor_that_is_missing_or_left_over_is_named(kind, name, small, adapter, tmp_path) -> None:
    def change(tensors: dict) -> None:
        key = next(key for key in tensors if name in key)
        tensors.update({f"{key}.more": torch.ones(1)}) if kind == "left over" else tensors.pop(key)

    path = changed(small.path, tmp_path, lambda c: change(c["state_dict"]))
    refused(lambda: load_checkpoint(path), path, name)
    path.unlink()
    state = changed(small.path.with_suffix(".pt.state"), tmp_path, lambda s: change(s["trained"]))
    refused(lambda: resume(small, state), state, name)
    folder = rewritten(adapter, tmp_path, TENSORS_FILE, change)
    refused(lambda: load_adapter(folder), folder, name)


# --- Facts

WRONG = {  # what would make another model, or none
    "format": [FORMAT + 1, "1", None, [1]],
    "base": [None, 7, "", "no/such/name", "\0"],
    "fingerprint": [None, "0" * 64],
    "tokenizer": [None, "0" * 64],
    "answer": [None, [], [1.0] * 8, [math.nan] * 8],
    "label_names": [3, "bad", [], ["a"], ["a", "b", "c"], ["a", 2], ["a", "a"]],
    "max_length": [None, "128", 0, 10**6, 10**30],
    "r": ["1", None, 0, 2, 1.5, 10**9, 10**30],
    "alpha": ["16", None, math.inf, math.nan, 1e308, -1.0],
    "dropout": ["0.1", None, -1, 2.0, math.nan],
    "labels": [None, 3, [1, 2], [["a"], ["b"]]],
    "data": [None, 7, ["data"]],
    "targets": [None, "q_lin", [1], ["nothing"], ["classifier"], ["q_lin"], [["q_lin"]]],
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_fact_is_refused(key, small, adapter, tmp_path) -> None:
    for value in WRONG[key]:
        alone = {"absolute": {}} if key == "base" else {}
        wrong = lambda facts, more=alone | {key: value}: facts.update(more)  # noqa: E731
        path = changed(small.path, tmp_path, wrong)
        refused(lambda path=path: load_checkpoint(path), *[path] * (key in ("alpha", "dropout")))
        folder = rewritten(adapter, tmp_path, FACTS_FILE, wrong)
        refused(lambda folder=folder: load_adapter(folder))


@pytest.mark.parametrize(
    "key", sorted(WRONG.keys() - {"tokenizer", "answer", "labels", "data"} | {"revision", "use_rslora"})
)
def test_a_missing_fact_is_named(key, small, adapter, tmp_path) -> None:
    path = changed(small.path, tmp_path, lambda c: c.pop(key))
    refused(lambda: load_checkpoint(path), path, key)
    folder = rewritten(adapter, tmp_path, FACTS_FILE, lambda facts: facts.pop(key))
    refused(lambda: load_adapter(folder), folder, key)


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize("content", [None, b"not what it should be", DEEP, b"[]", b"{}"])
@pytest.mark.parametrize("name", ["adapter_config.json", TENSORS_FILE, FACTS_FILE])
def test_a_folder_with_a_missing_or_broken_file_is_refused(name, content, adapter, tmp_path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "a")
    (folder / name).write_bytes(content) if content else (folder / name).unlink()
    refused(lambda: load_adapter(folder), folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("init_lora_weights", "pissa"), ("bias", "zzz"), ("target_modules", "("), ("r", 10**9)),
        *(("of_tomorrow", 1), ("peft_type", "PROMPT_TUNING"), ("runtime_config", {})),
    ],
)
def test_settings_of_peft_alone_are_refused(key, value, adapter, tmp_path, recwarn) -> None:
    folder = rewritten(adapter, tmp_path, "adapter_config.json", lambda c: c.update({key: value}))
    refused(lambda: load_adapter(folder), folder, *([] if key == "peft_type" else [key]))
    assert recwarn.list == []


# --- Training states

BAD_STATES = {
    "settings without a name": lambda s: s.update(settings={"lr": 3}),
    "done is zero": lambda s: s.update(done=0),
    "done is too much": lambda s: s.update(done=6),
    "done is no number": lambda s: s.update(done="two"),
    "epochs are no JSON": lambda s: s.update(epochs="["),
    "losses of another length": lambda s: s.update(losses=torch.zeros(100)),
    "a loss of NaN": lambda s: s["losses"].fill_(math.nan),
    "a moment is missing": lambda s: s["optimizer"]["state"][0].pop("exp_avg"),
    "a parameter too much": lambda s: s["optimizer"]["state"].update({99: {}}),
    "a short generator": lambda s: s.update(generators=[torch.zeros(3, dtype=torch.uint8)]),
}
for field in ("settings", "trained", "optimizer", "losses", "epochs", "generators", "done"):
    BAD_STATES[f"without its {field}"] = lambda s, field=field: s.pop(field)
    BAD_STATES[f"a number as its {field}"] = lambda s, field=field: s.update({field: 0.5})


@pytest.mark.parametrize("kind", BAD_STATES)
def test_a_broken_training_state_is_refused(kind, small, tmp_path) -> None:
    path = changed(small.path.with_suffix(".pt.state"), tmp_path, BAD_STATES[kind])
    refused(lambda: resume(small, path), path)
    assert list(tmp_path.iterdir()) == [path]


# --- What is no such file, and what would run code


def test_a_missing_renamed_or_cut_file_is_refused(small, tmp_path, recwarn) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "none.pt", tmp_path, tmp_path / "pipe.pt", Path("/dev/zero")):
        refused(lambda path=path: load_checkpoint(path), path)
    whole, path, state = small.path.read_bytes(), tmp_path / "a.pt", tmp_path / "a.pt.state"
    for content in (b"a renamed text", b"", whole[:-1], whole[:-200], whole[: len(whole) // 2]):
        path.write_bytes(content)
        refused(lambda: load_checkpoint(path), path)
        path.rename(state)
        refused(lambda: resume(small, state), state)
    without = [small.checkpoint | {"state_dict": value} for value in (None, [], {}, 3, {1: 2})]
    for content in ([1, 2, 3], torch.ones(3), {"hello": 1}, *without):
        torch.save(content, path)
        refused(lambda: load_checkpoint(path), path)
    assert {one.category for one in recwarn.list} <= {ResourceWarning}  # one line, and nothing of PyTorch's


class Malicious:
    """Unpickling this would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_code_in_a_file_is_never_run(small, tmp_path) -> None:
    trap, path, state = tmp_path / "trap", tmp_path / "a.pt", tmp_path / "a.pt.state"
    pickle.loads(pickle.dumps(Malicious(trap)))
    trap.unlink()  # so the trap works
    for write in (
        lambda: path.write_bytes(pickle.dumps(Malicious(trap))),
        lambda: torch.save(Malicious(trap), path),
        lambda: torch.save(small.checkpoint | {"base": Malicious(trap)}, path),
        lambda: torch.save({"a": Malicious(trap)}, path, _use_new_zipfile_serialization=False),
    ):
        write()
        refused(lambda: load_checkpoint(path), path)
        path.rename(state)
        refused(lambda: resume(small, state), state)
        assert not trap.exists()


@settings(ANY, max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255))
def test_a_damaged_byte_is_noticed_or_does_no_harm(small, tmp_path, place, bits) -> None:
    content, whole = bytearray(small.path.read_bytes()), dict(small.checkpoint)
    content[int(place * len(content))] ^= bits
    (tmp_path / "a.pt").write_bytes(content)
    try:
        _, found = load_checkpoint(tmp_path / "a.pt")
    except InputError:
        return
    whole = seen_from_here(small.path, whole)
    state, expected = found.pop("state_dict"), whole.pop("state_dict")
    assert found == whole and state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_a_name_of_the_hub_is_not_taken_for_a_folder_beside_the_result(tmp_path) -> None:
    facts = lora_scratch.seen_from(tmp_path / "bert.pt", {"base": "bert", "data": str(tmp_path / "x.csv")})
    (tmp_path / "bert").mkdir()
    assert seen_from_here(tmp_path / "bert.pt", facts)["base"] == "bert"


# --- Files of earlier versions

TOKENIZER = "801bdadbb33c6e981fb2b82b7a959129ccabccca04cb944e0320c6039f53b539"  # of tiny_base, then


@pytest.mark.parametrize("version", ["the first", "the last before this"])
def test_a_checkpoint_of_an_earlier_version_answers_alike(version, small, tiny_base, tmp_path) -> None:
    digest = sha256()
    for name, tensor in sorted(load_file(tiny_base / "model.safetensors").items()):
        digest.update(f"distilbert.{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy())
    same = {"format": 1, "fingerprint": digest.hexdigest(), "tokenizer": TOKENIZER}
    assert {key: small.checkpoint[key] for key in same} == same

    def as_before(checkpoint: dict) -> None:
        del checkpoint["answer"], checkpoint["layers"]
        if version == "the first":
            del checkpoint["tokenizer"]
        else:
            checkpoint["config"] = {"n_heads": 4}

    path = changed(small.path, tmp_path, as_before)
    assert torch.equal(logits(path), logits(small.path))


def test_an_adapter_folder_of_an_earlier_version_answers_alike(adapter, tmp_path) -> None:
    def as_before(facts: dict) -> None:
        del facts["answer"], facts["tensors"], facts["layers"]
        facts["config"] = {"n_heads": 4}

    old = rewritten(adapter, tmp_path, FACTS_FILE, as_before)
    assert torch.equal(logits(old), logits(adapter))


# --- A disk that fails


def test_a_full_disk_leaves_the_previous_file_whole(tmp_path, monkeypatch) -> None:
    path = tmp_path / "file"
    write_file(path, lambda temporary: temporary.write_bytes(b"the first"))

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    refused(lambda: write_file(path, lambda p: p.write_bytes(b"the second")), path, "No space left on device")
    assert path.read_bytes() == b"the first" and list(tmp_path.iterdir()) == [path]


def fail_after(moved: int, folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """Let the disk fail after so many files of a folder; returns the names of those moved."""
    replace, done = os.replace, []

    def fail(source: Path, target: Path) -> None:
        if Path(target).parent == folder:
            if len(done) == moved:
                raise OSError(errno.EIO, "Input/output error")
            done.append(Path(target).name)
        replace(source, target)

    patch.setattr(os, "replace", fail)
    return done


@pytest.mark.parametrize("moved", range(5))
def test_a_folder_half_new_is_noticed(moved, adapter, tiny_base, tiny_data, tmp_path, monkeypatch) -> None:
    folder = shutil.copytree(adapter, tmp_path / "a")
    done = fail_after(moved, folder, monkeypatch)
    arguments = flags(tiny_base, tiny_data, *SHORT, "--seed", 7, "--output", folder)
    refused(lambda: lora_peft.main(arguments), folder, "Input/output error")
    assert len(done) == moved and FACTS_FILE not in done  # which is the last
    assert not list(folder.glob(".*"))
    if TENSORS_FILE in done:
        refused(lambda: load_adapter(folder), folder)
    else:
        assert load_adapter(folder)[1]["record"]["settings"]["seed"] == 42


@pytest.mark.parametrize("moved", [0, 1, 4])
def test_a_first_save_that_fails_can_be_resumed(moved, tiny_base, tiny_data, tmp_path) -> None:
    folder = tmp_path / "a"
    arguments = flags(tiny_base, tiny_data, *SHORT, "--output", folder)
    with pytest.MonkeyPatch.context() as patch:
        fail_after(moved, folder, patch)
        refused(lambda: lora_peft.main(arguments), folder, "Input/output error")
    lora_peft.main([*arguments, "--resume"])
    load_adapter(folder)
