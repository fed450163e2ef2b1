"""A whole run of lora_scratch.py, from a folder of sentences to a file that is read again; and files that are none."""

import contextlib
import io
import json
import math
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import full_finetune
import pytest
import recipes
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
)

import lora_scratch
from lora_scratch import (
    InputError,
    choose_device,
    choose_precision,
    evaluate,
    load_base,
    load_checkpoint,
    load_data,
    main,
    make_parser,
    predict,
    tokenize,
)

SENTENCES = [[2, 7, 8, 9, 3], [2, 5, 3], [2, 20, 11, 6, 14, 9, 30, 3], [2, 3], [2, *range(5, 30), 3]]
TINY = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
ANY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test asks the Hub, and none leaves tables in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_scratch, "use_cache_if_offline", lambda: None)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


class Run:
    """A call of main in this process, and what it left behind."""

    def __init__(self, base: Path, data: Path, output: Path, *flags: str):
        self.path, said = output, io.StringIO()
        self.flags = ["--model", base, "--dataset", data, "--output", output, "--precision", "fp32", *flags]
        self.flags = [str(flag) for flag in self.flags]
        with contextlib.redirect_stdout(said):
            main(self.flags)
        self.said = said.getvalue()
        self.checkpoint = torch.load(output, weights_only=True)
        self.state = self.checkpoint["state_dict"]
        self.record = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def noisy_data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_data with three of the ten validation labels wrong: who has learnt it all scores 70 %."""
    folder = tmp_path_factory.mktemp("noisy")
    shutil.copy(tiny_data / "train.tsv", folder)
    rows = (tiny_data / "dev.tsv").read_text(encoding="utf-8").replace("\t1\n", "\t0\n", 3)
    (folder / "dev.tsv").write_text(rows, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(tiny_base: Path, noisy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that learns its forty sentences by heart."""
    flags = ["--lr", "0.02", "--epochs", "20", "--label-names", "bad", "good"]
    return Run(tiny_base, noisy_data, tmp_path_factory.mktemp("trained") / "a.pt", *flags)


def logits(path: Path) -> Tensor:
    return predict(load_checkpoint(path)[0].model, 0, SENTENCES, 2, torch.float32)


# --- A run


def test_the_accuracy_told_is_that_of_the_file_reloaded_under_another_seed(trained: Run) -> None:
    args = make_parser("", "").parse_args(trained.flags)
    args.dtype = torch.float32
    torch.manual_seed(7)
    base, checkpoint = load_checkpoint(trained.path)
    dev = tokenize(load_data(args)[1], base.tokenizer, checkpoint["max_length"])
    _, confusion = evaluate(base.model, base.tokenizer.pad_token_id, dev, args)
    result, correct = trained.record["result"], int(confusion.trace())
    expected = {"accuracy": 10 * correct, "correct": correct, "total": 10, "bytes": trained.path.stat().st_size}
    assert result == expected | {"label_names": ["bad", "good"], "confusion": confusion.tolist()}
    lines = trained.said.splitlines()
    assert re.fullmatch(rf"ask it: \S+ \S*playground\.py --model {trained.path} 'I loved it'", lines[-1])
    assert lines[-2] == f"accuracy {10 * correct:.2f} %"
    *_, epoch, saved, _, _, _ = lines[:-2]  # the last three are the report
    assert f"reloaded, it answers {correct}/10 right" in saved
    assert f"accuracy {10 * correct:.2f} % ({correct}/10)" in epoch and epoch.startswith("epoch 20: ")


def test_it_learns(trained: Run, tiny_data: Path) -> None:
    assert trained.record["result"]["correct"] == 7  # of ten, three of which are labelled wrongly
    args = make_parser("", "").parse_args(["--dataset", str(tiny_data)])
    args.dtype = torch.float32
    base, _ = load_checkpoint(trained.path)
    train_set = tokenize(load_data(args)[0], base.tokenizer, 128)
    loss, confusion = evaluate(base.model, 0, train_set, args)
    assert confusion.tolist() == [[20, 0], [0, 20]] and loss < 0.1
    losses = [epoch["train_loss"] for epoch in trained.record["epochs"]]
    assert losses[0] > 0.6 and losses[-1] < 0.3


def plain(value: object) -> bool:
    if type(value) in (list, dict):
        return all(plain(item) for item in (value if type(value) is list else [*value, *value.values()]))
    return type(value) in (int, float, str, bool, type(None))


def test_the_files_of_a_run(trained: Run, tiny_base: Path) -> None:
    assert sorted(p.name for p in trained.path.parent.iterdir()) == ["a", "a.json", "a.pt", "a.pt.state"]
    tokenizer = AutoTokenizer.from_pretrained(trained.path.with_suffix(""))
    text = "A warm and funny film"
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(tiny_base)(text)["input_ids"]


def test_the_checkpoint_is_small_and_plain(trained: Run, tiny_base: Path) -> None:
    layers = [f"distilbert.transformer.layer.{i}.attention.{name}" for i in (0, 1) for name in ("q_lin", "v_lin")]
    head = {f"{module}.{kind}" for module in ("pre_classifier", "classifier") for kind in ("weight", "bias")}
    assert trained.state.keys() == head | {f"{path}.{matrix}" for path in layers for matrix in ("lora_A", "lora_B")}
    assert all(type(t) is Tensor and t.dtype == torch.float32 and t.is_contiguous() for t in trained.state.values())
    assert trained.state[f"{layers[0]}.lora_A"].shape == trained.state[f"{layers[0]}.lora_B"].T.shape == (8, 32)
    size = sum(4 * tensor.numel() for tensor in trained.state.values())
    assert size < trained.path.stat().st_size < size + 20_000
    facts = {key: value for key, value in trained.checkpoint.items() if key != "state_dict"}
    assert plain(facts)
    record, fingerprint = facts.pop("record"), facts.pop("fingerprint")
    assert facts == {
        "format": 1,
        "base": str(tiny_base),
        "revision": None,
        "label_names": ["bad", "good"],
        "max_length": 128,
        "r": 8,
        "alpha": 16,
        "dropout": 0.1,
        "use_rslora": False,
        "targets": ["q_lin", "v_lin"],
    }
    assert len(fingerprint) == 64 and record["epochs"] == trained.record["epochs"]


def test_the_record_tells_settings_versions_machine_and_every_epoch(trained: Run, tiny_base: Path) -> None:
    record, defaults = trained.record, vars(make_parser("", "").parse_args([]))
    assert record["settings"].keys() >= defaults.keys()
    told = {key: record["settings"][key] for key in ("model", "lr", "epochs", "seed", "batch_size", "label_names")}
    assert told == {
        "model": str(tiny_base),
        "lr": 0.02,
        "epochs": 20,
        "seed": 42,
        "batch_size": 16,
        "label_names": ["bad", "good"],
    }
    versions = {"torch": str(torch.__version__), "transformers": transformers.__version__}
    versions |= {"datasets": datasets.__version__, "python": platform.python_version()}
    assert record["versions"] == versions
    assert platform.machine() in record["hardware"] and "1 threads" in record["hardware"]
    assert record["precision"] == "float32"
    assert [epoch["epoch"] for epoch in record["epochs"]] == list(range(1, 21))
    for epoch in record["epochs"]:
        assert epoch["steps"] == 3 and epoch["total"] == 10 and epoch["accuracy"] == 10 * epoch["correct"]
        assert math.isfinite(epoch["train_loss"]) and math.isfinite(epoch["eval_loss"]) and epoch["seconds"] > 0
        assert epoch["sentences_per_second"] * epoch["seconds"] == pytest.approx(40)
    assert record["epochs"][-1]["correct"] == record["result"]["correct"]
    assert record["loss_curve"]["every"] == 20 and len(record["loss_curve"]["loss"]) == 3


def test_a_seed_decides_every_bit(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    runs = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        flags = ["--seed", seed, "--max-steps", "5", "--lr", "0.01"]
        runs.append(Run(tiny_base, tiny_data, tmp_path / f"{name}.pt", *flags))
        torch.rand(3)
    one, same, other = (run.state for run in runs)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert runs[0].record["loss_curve"] == runs[1].record["loss_curve"] != runs[2].record["loss_curve"]


CHILD = """
import sys, torch, lora_scratch
path, sentences, data = sys.argv[1], eval(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
torch.manual_seed(99)
base, _ = lora_scratch.load_checkpoint(path)
torch.save(lora_scratch.predict(base.model, 0, sentences, 2, torch.float32), path + ".logits")
lora_scratch.run(lambda: lora_scratch.main(["--model", path, "--dataset", data, "--precision", "fp32"]))
"""


def test_a_fresh_process_gives_the_same_bits_and_a_mistake_there_is_one_line(
    trained: Run, tiny_data: Path, tmp_path: Path
) -> None:
    path = shutil.copy(trained.path, tmp_path / "a.pt")
    environment = os.environ | {"PYTHONPATH": str(Path(lora_scratch.__file__).parent)}
    command = [sys.executable, "-c", CHILD, str(path), repr(SENTENCES), str(tiny_data / "none.tsv")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert torch.equal(torch.load(f"{path}.logits"), logits(trained.path))
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: --dataset {tiny_data / 'none.tsv'}: no such file; give a folder or a file that"
    )
    assert done.stderr.count("\n") == 1


def test_a_frozen_head_stays_as_the_seed_made_it_and_is_saved(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    flags = ["--freeze-head", "--max-steps", "5", "--lr", "0.05", "--seed", "3"]
    run = Run(tiny_base, tiny_data, tmp_path / "a.pt", *flags)
    torch.manual_seed(3)
    start = load_base(str(tiny_base), None, ["a", "b"], 128)
    for name in start.head:
        assert torch.equal(run.state[name], start.model.get_parameter(name))
    assert all(tensor.any() for name, tensor in run.state.items() if "lora_B" in name)
    assert "frozen at its random start" in run.said and run.record["parameters"]["trained"] == 4 * 2 * 8 * 32


def test_max_steps_ends_in_the_middle_of_an_epoch(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    flags = ["--max-steps", "7", "--epochs", "99", "--train-samples", "40", "--log-every", "1"]
    run = Run(tiny_base, tiny_data, tmp_path / "a.pt", *flags)
    assert [epoch["steps"] for epoch in run.record["epochs"]] == [3, 3, 1]
    assert len(run.record["loss_curve"]["loss"]) == 7
    assert "step 7/7" not in run.said.replace("step 7/7  loss", "") and "epoch 3" in run.said


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Learning rate and gradient norm at each step of AdamW."""
    seen, real = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([g.norm() for g in gradients]).norm().item()
        seen.append((self.param_groups[0]["lr"], norm))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return seen


def test_the_rate_warms_up_and_then_falls_linearly(tiny_base: Path, tiny_data: Path, tmp_path: Path, steps) -> None:
    Run(tiny_base, tiny_data, tmp_path / "a.pt", "--max-steps", "50", "--lr", "0.001")
    up, down = [i / 3 for i in range(3)], [(50 - i) / 47 for i in range(3, 50)]  # 6 % of 50 are 3
    assert [lr / 0.001 for lr, _ in steps] == pytest.approx(up + down)


def test_gradients_are_clipped(tiny_base: Path, tiny_data: Path, tmp_path: Path, steps) -> None:
    for limit in ("1000000", "0.001"):
        Run(tiny_base, tiny_data, tmp_path / "a.pt", "--max-steps", "4", "--max-grad-norm", limit)
    free, clipped = ([norm for _, norm in part] for part in (steps[:4], steps[4:]))
    assert min(free) > 0.01 and clipped == pytest.approx([0.001] * 4, rel=1e-3)


def test_clipping_at_zero_is_none(tiny_base: Path, tiny_data: Path, tmp_path: Path, steps) -> None:
    for limit in ("0", "1000000"):
        Run(tiny_base, tiny_data, tmp_path / "a.pt", "--max-steps", "3", "--max-grad-norm", limit)
    assert steps[:3] == steps[3:]


def test_every_step_starts_from_no_gradient(tiny_base: Path, tiny_data: Path, tmp_path: Path, steps) -> None:
    flags = ["--lr", "0", "--batch-size", "40", "--max-steps", "10", "--max-grad-norm", "1000000"]
    Run(tiny_base, tiny_data, tmp_path / "a.pt", *flags)
    norms = [norm for _, norm in steps]
    assert len(norms) == 10 and max(norms) < 3 * min(norms)  # the same sentences ten times, only dropout differs


def test_adamw_decays_weights(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    flags = ["--max-steps", "9", "--lr", "0.05", "--warmup", "0"]
    with_decay, without = (
        Run(tiny_base, tiny_data, tmp_path / f"{decay}.pt", *flags, "--weight-decay", decay) for decay in ("2", "0")
    )
    name = "pre_classifier.weight"
    assert with_decay.state[name].norm() < 0.9 * without.state[name].norm()


def test_the_last_epoch_is_reported_and_not_the_best(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, heads = [], []

    def descending(model: nn.Module, *_) -> tuple[float, Tensor]:
        models.append(model)
        heads.append(model.classifier.weight.detach().clone())
        correct = [9, 5, 2, 2][len(heads) - 1]
        return 0.5, torch.tensor([[correct, 10 - correct], [0, 0]])

    monkeypatch.setattr(lora_scratch, "evaluate", descending)
    run = Run(tiny_base, tiny_data, tmp_path / "a.pt", "--epochs", "3", "--lr", "0.01")
    assert [epoch["correct"] for epoch in run.record["epochs"]] == [9, 5, 2]
    assert run.record["result"]["correct"] == 2 and "\naccuracy 20.00 %\n" in run.said
    assert torch.equal(heads[3], heads[2]) and not torch.equal(heads[2], heads[0])
    assert torch.equal(run.state["classifier.weight"], heads[2])
    assert models[3] is not models[2]  # what was measured is the file


def test_label_names_travel_in_the_file(trained: Run) -> None:
    base, checkpoint = load_checkpoint(trained.path)
    assert checkpoint["label_names"] == ["bad", "good"]
    assert base.model.config.id2label == {0: "bad", 1: "good"} and base.model.config.label2id == {"bad": 0, "good": 1}


def test_three_labels_from_a_csv_file(tiny_base: Path, tmp_path: Path) -> None:
    rows = ("it never ends,low\n", "the best of the year,high\n", "great acting,mid\n")
    (tmp_path / "r.csv").write_text("review,stars\n" + "".join(rows) * 8, encoding="utf-8")
    flags = ["--text-column", "review", "--label-column", "stars", "--max-steps", "3"]
    run = Run(tiny_base, tmp_path / "r.csv", tmp_path / "a.pt", *flags)
    assert run.checkpoint["label_names"] == ["high", "low", "mid"] and run.state["classifier.bias"].shape == (3,)
    assert logits(run.path).shape == (len(SENTENCES), 3) and run.record["result"]["total"] == 3


def test_batches_sorted_by_length_answer_as_sentence_by_sentence(trained: Run) -> None:
    model = load_checkpoint(trained.path)[0].model.eval()
    one_by_one = torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in SENTENCES]).detach()
    for size in (1, 2, 3, 99):
        assert torch.allclose(predict(model, 0, SENTENCES, size, torch.float32), one_by_one, rtol=0, atol=1e-5)
    assert len({round(value, 3) for value in one_by_one[:, 0].tolist()}) == len(SENTENCES)  # in their own order


def test_a_reloaded_model_answers_without_dropout(trained: Run) -> None:
    model = load_checkpoint(trained.path)[0].model
    assert torch.equal(model(torch.tensor(SENTENCES[:1])).logits, model(torch.tensor(SENTENCES[:1])).logits)
    assert not any(module.training for module in model.modules())


def with_tokenizer(folder: Path, tiny_base: Path, model: nn.Module) -> Path:
    """Save a tiny model of another architecture with the tiny tokenizer beside it."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_base / name, folder)
    return folder


@pytest.mark.parametrize(
    ("make", "head"),
    [
        (lambda: BertModel(BertConfig(**TINY)), ["bert.pooler.dense", "classifier"]),
        (
            lambda: RobertaModel(RobertaConfig(**TINY, pad_token_id=0, max_position_embeddings=130)),
            ["classifier.dense", "classifier.out_proj"],
        ),
    ],
)
def test_bert_and_roberta_from_end_to_end(
    make: Callable, head: list[str], tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    base = with_tokenizer(tmp_path / "base", tiny_base, make())
    run = Run(base, tiny_data, tmp_path / "a.pt", "--max-steps", "4", "--lr", "0.01")
    assert run.checkpoint["targets"] == ["query", "value"]
    assert {name.rpartition(".")[0] for name in run.state if "lora" not in name} == set(head)
    assert sum("lora_A" in name for name in run.state) == 4
    torch.manual_seed(5)
    first = logits(run.path)
    torch.manual_seed(6)
    assert torch.equal(logits(run.path), first)


def test_robertas_reserved_positions_are_no_room_for_tokens(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """RoBERTa's positions begin after the number of its padding token: 130 of them are room for 128 tokens, not 130."""
    model = RobertaModel(RobertaConfig(**TINY, pad_token_id=1, max_position_embeddings=100))
    base = with_tokenizer(tmp_path / "base", tiny_base, model)
    with pytest.raises(InputError, match=r"--max-length 99.*98"):
        load_base(str(base), None, ["a", "b"], 99)
    longest = torch.tensor([[2, *[7] * 96, 3]])
    load_base(str(base), None, ["a", "b"], 98).model(input_ids=longest)


def test_bfloat16_trains_on_the_cpu_and_the_file_is_float32(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    flags = ["--lr", "0.02", "--epochs", "20"]
    run = Run(tiny_base, tiny_data, tmp_path / "a.pt", *flags, "--precision", "bf16")
    assert {tensor.dtype for tensor in run.state.values()} == {torch.float32}
    assert run.record["precision"] == "bfloat16" and run.record["result"]["correct"] >= 9
    base, _ = load_checkpoint(run.path)
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}


# --- Files that are no checkpoints


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
    assert torch.equal(
        predict(load_checkpoint(small, str(moved))[0].model, 0, SENTENCES, 2, torch.float32), logits(small)
    )


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


# --- Mistakes on the command line


def refused(message: str, *flags: object) -> None:
    with pytest.raises(InputError, match=message):
        main([str(flag) for flag in flags])


@pytest.mark.parametrize("make", [lambda p: p / "file" / "a.pt", lambda p: p / "file" / "deeper" / "a.pt"])
def test_an_output_folder_that_cannot_be_is_refused_at_once(make, tiny_base: Path, tiny_data: Path, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    flags = ["--model", tiny_base, "--dataset", tiny_data, "--precision", "fp32", "--output", make(tmp_path)]
    refused("--output .*cannot make its folder", *flags)


def test_an_output_folder_without_the_right_to_write_is_refused_at_once(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--model", tiny_base, "--dataset", tiny_data, "--precision", "fp32", "--output", tmp_path / "a.pt"]
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))  # root may write anywhere
    refused(r"--output .*a\.pt: no right to write there", *flags)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["{}/reviews.tsv", "{}/reviews.pt", "{}/base", ".", ".."])
def test_an_output_in_the_way_of_its_input_is_refused(
    output: str, tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of reviews.pt is reviews.json, its tokenizer goes into the folder reviews."""
    monkeypatch.chdir(tmp_path)
    base = shutil.copytree(tiny_base, tmp_path / "base")
    data = shutil.copytree(tiny_data, tmp_path / "reviews")
    flags = ["--model", base, "--dataset", data, "--precision", "fp32", "--output", output.format(tmp_path)]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"--output .*(stand there|ends in \.pt)"):
        main([str(flag) for flag in flags])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["a", "a.bin", "a.pt.gz"])
def test_an_output_without_pt_is_refused(name: str, tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    flags = ["--model", tiny_base, "--dataset", tiny_data, "--precision", "fp32", "--output", tmp_path / name]
    refused(r"give a file name that ends in \.pt", *flags)


def test_an_output_that_is_a_folder_keeps_it(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "a.pt").mkdir()
    flags = ["--model", tiny_base, "--dataset", tiny_data, "--precision", "fp32", "--max-steps", "1"]
    refused(r"a\.pt", *flags, "--output", tmp_path / "a.pt")
    assert (tmp_path / "a.pt").is_dir() and not list(tmp_path.glob("*.tmp"))


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"--device cuda: .*--device cpu"):
        choose_device("cuda")
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


def test_float16_needs_a_gpu() -> None:
    with pytest.raises(InputError, match="--precision fp16 needs a CUDA GPU; use fp32 or bf16"):
        choose_precision("fp16", torch.device("cpu"))
    assert choose_precision("bf16", torch.device("cpu")) == torch.bfloat16


def test_choosing_a_precision_costs_little() -> None:
    start = time.process_time()
    assert choose_precision("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)
    assert time.process_time() - start < 5  # seconds; a CPU without bfloat16 may be a hundred times slower at it


def test_a_tokenizer_that_is_larger_than_its_model_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    config = DistilBertConfig(vocab_size=20, dim=32, hidden_dim=64, n_layers=1, n_heads=4)
    base = with_tokenizer(tmp_path / "base", tiny_base, DistilBertModel(config))
    with pytest.raises(InputError, match=r"a tokenizer of \d\d entries does not fit 20 embeddings"):
        load_base(str(base), None, ["a", "b"], 128)


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
        assert loaded.fingerprint == load_base(str(tiny_base), None, ["a", "b"], 128).fingerprint


def test_half_a_base_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    whole = (base / "model.safetensors").read_bytes()
    damage(base, "model.safetensors", whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot load the base model"):
        load_base(str(base), None, ["a", "b"], 128)


@pytest.mark.parametrize("name", ["no/such", "./nothing", "/no/such/folder", "with space", "a/b/c/d"])
def test_a_base_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"cannot load the base model '{name}' .*name a local folder with --model"):
        load_base(name, None, ["a", "b"], 128)


@pytest.mark.parametrize(
    "flags",
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
def test_a_value_out_of_range_is_refused_by_its_flag(flags: list[str], capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        lora_scratch.run(lambda: main([*flags, "--dataset", "no_such.tsv", "--precision", "fp32"]))
    error = capfd.readouterr().err
    assert stop.value.code == 2 and flags[0] in error and "Traceback" not in error


def test_help_groups_every_option_by_topic(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "B · A" not in said.split("\n")[0]
    topics = ["model and data:", "LoRA:", "training:", "machine and output:"]
    places = [said.index(f"\n{topic}\n") for topic in topics]
    assert places == sorted(places)
    parts = dict(zip(topics, [said[a:b] for a, b in zip(places, [*places[1:], None], strict=True)], strict=True))
    for topic, options in {
        "model and data:": ["--model", "--dataset", "--text-column", "--label-names", "--train-samples"],
        "LoRA:": ["--r", "--alpha", "--dropout", "--targets", "--freeze-head"],
        "training:": ["--epochs", "--max-steps", "--batch-size", "--lr", "--warmup", "--seed"],
        "machine and output:": ["--device", "--precision", "--output", "--resume"],
    }.items():
        for option in options:
            assert f"\n  {option} " in parts[topic] or f"\n  {option}\n" in parts[topic], option
    for default in ("(default: 8)", "(default: 16)", "(default: 0.1)", "(default: 0.0002)", "(default: 3)", "(0.06)"):
        assert default in said


# --- The real thing


@pytest.mark.slow
def test_300_steps_on_real_sentences_learn_and_survive_the_file(real_base: Path, sst2: Path, tmp_path: Path) -> None:
    run = Run(real_base, sst2, tmp_path / "a.pt", "--max-steps", "300", "--lr", "0.001")
    result = run.record["result"]
    assert result["total"] == 872 and result["accuracy"] > 75
    assert result["correct"] == run.record["epochs"][-1]["correct"]
    assert run.checkpoint["label_names"] == ["negative", "positive"]
    torch.manual_seed(1)
    first = logits(run.path)
    torch.manual_seed(2)
    assert torch.equal(logits(run.path), first)


def test_full_fine_tuning_trains_the_base_too_and_is_written_whole(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--model", tiny_base, "--dataset", tiny_data, "--epochs", "10", "--lr", "0.003", "--precision", "fp32"]
    full_finetune.main([str(flag) for flag in [*flags, "--output", tmp_path / "full"]])
    record = json.loads((tmp_path / "full.json").read_text(encoding="utf-8"))
    parameters = record["parameters"]
    assert parameters["trained"] == parameters["head"] + parameters["frozen base"] and parameters["lora"] == 0
    assert f"all {parameters['trained']:,} parameters" in capsys.readouterr().out
    before = load_file(tiny_base / "model.safetensors")
    after = load_file(tmp_path / "full" / "model.safetensors")
    for name, tensor in before.items():
        if "word_embeddings" not in name and "position" not in name:  # words that do not occur have no gradient
            assert not torch.equal(tensor, after[f"distilbert.{name}"]), name
    assert record["result"]["correct"] == record["epochs"][-1]["correct"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("script", ["lora_scratch.py", "tests/full_finetune.py"])
def test_a_recipe_is_trained_once_and_its_record_is_checked(
    script: str, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    settings = {"model": str(tiny_base), "dataset": str(tiny_data), "train_samples": 8, "epochs": 1, "lr": 1e-3}
    record = recipes.train_once(script, settings, ["--r", "2"], tmp_path / "run_lr1e-03")
    written = (tmp_path / "run_lr1e-03.json").stat().st_mtime_ns
    assert record["settings"]["lr"] == 1e-3 and record["epochs"][0]["steps"] == 1
    assert recipes.train_once(script, settings, ["--r", "2"], tmp_path / "run_lr1e-03") == record
    assert (tmp_path / "run_lr1e-03.json").stat().st_mtime_ns == written
    with pytest.raises(SystemExit, match="train_samples was 8 and is now 9"):
        recipes.train_once(script, settings | {"train_samples": 9}, [], tmp_path / "run_lr1e-03")
