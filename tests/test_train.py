"""A whole run of lora_scratch.py, from a folder of sentences to a file that is read again."""

import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from conftest import SENTENCES, TINY, Run, logits, with_tokenizer
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel, RobertaConfig, RobertaModel

import lora_scratch
from lora_scratch import InputError, evaluate, load_base, load_checkpoint, load_tables, make_parser, predict, tokenize

ROWS = [SENTENCES[i].tolist() for i in range(len(SENTENCES))]


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
    more = ["--lr", "0.02", "--epochs", "20", "--label-names", "bad", "good"]
    return Run(tiny_base, noisy_data, tmp_path_factory.mktemp("trained") / "a.pt", *more)


# --- A run


def test_the_accuracy_told_is_that_of_the_file_reloaded_under_another_seed(trained: Run) -> None:
    torch.manual_seed(7)
    base, checkpoint = load_checkpoint(trained.path)
    _, dev, _ = load_tables(make_parser("", "").parse_args(trained.flags))
    _, confusion = evaluate(base.model, tokenize(dev, base.tokenizer, checkpoint["max_length"]), 3)
    result, correct = trained.record["result"], int(confusion.trace())
    expected = {"accuracy": 10 * correct, "correct": correct, "total": 10, "bytes": trained.path.stat().st_size}
    assert result == expected | {"label_names": ["bad", "good"], "confusion": confusion.tolist()}
    lines = trained.said.splitlines()
    assert re.fullmatch(rf"ask it: \S+ \S*playground\.py --model {trained.path} 'I loved it'", lines[-1])
    assert lines[-2].startswith(f"accuracy {10 * correct:.2f} % ({correct}/10), 95 % between ")
    (epoch,) = [line for line in lines if line.startswith("epoch 20: ")]
    assert any(f"reloaded, it answers {correct}/10 right" in line for line in lines)
    assert f"accuracy {10 * correct:.2f} % ({correct}/10)" in epoch


def test_it_learns(trained: Run, tiny_data: Path) -> None:
    assert trained.record["result"]["correct"] == 7  # of ten, three of which are labelled wrongly
    base, _ = load_checkpoint(trained.path)
    train_table, _, _ = load_tables(make_parser("", "").parse_args(["--dataset", str(tiny_data)]))
    tokens = tokenize(train_table, base.tokenizer, 128)
    _, confusion = evaluate(base.model, tokens, 32)
    logits = predict(base.model, tokens, 32) * trained.record["temperature"]  # as before calibrate
    assert confusion.tolist() == [[20, 0], [0, 20]]
    assert nn.functional.cross_entropy(logits, tokens.labels) < 0.1
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
    record, identity = facts.pop("record"), {key: facts.pop(key) for key in ("fingerprint", "config", "tokenizer")}
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
    assert identity == load_base(str(tiny_base), None, ["a", "b", "c"], 12).identity
    assert record["epochs"] == trained.record["epochs"]


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
path, sentences, data = sys.argv[1], lora_scratch.Tokens.from_lists(eval(sys.argv[2])), sys.argv[3]
torch.set_num_threads(1)
torch.manual_seed(99)
base, _ = lora_scratch.load_checkpoint(path)
torch.save(lora_scratch.predict(base.model, sentences, 2), path + ".logits")
lora_scratch.run(lambda: lora_scratch.main(["--model", path, "--dataset", data, "--precision", "fp32"]))
"""


def test_a_fresh_process_gives_the_same_bits_and_a_mistake_there_is_one_line(
    trained: Run, tiny_data: Path, tmp_path: Path
) -> None:
    path = shutil.copy(trained.path, tmp_path / "a.pt")
    environment = os.environ | {"PYTHONPATH": str(Path(lora_scratch.__file__).parent)}
    command = [sys.executable, "-c", CHILD, str(path), repr(ROWS), str(tiny_data / "none.tsv")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert torch.equal(torch.load(f"{path}.logits"), logits(trained.path))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --dataset {tiny_data / 'none.tsv'}: no such file; give a folder or a file")
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
    assert "epoch 3: " in run.said


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
    for limit in ("1000", "0.001"):
        Run(tiny_base, tiny_data, tmp_path / "a.pt", "--max-steps", "4", "--max-grad-norm", limit)
    free, clipped = ([norm for _, norm in part] for part in (steps[:4], steps[4:]))
    assert min(free) > 0.01 and clipped == pytest.approx([0.001] * 4, rel=1e-3)


def test_clipping_at_zero_is_none(tiny_base: Path, tiny_data: Path, tmp_path: Path, steps) -> None:
    for limit in ("0", "1000"):
        Run(tiny_base, tiny_data, tmp_path / "a.pt", "--max-steps", "3", "--max-grad-norm", limit)
    assert steps[:3] == steps[3:]


def test_every_step_starts_from_no_gradient(tiny_base: Path, tiny_data: Path, tmp_path: Path, steps) -> None:
    flags = ["--lr", "0", "--batch-size", "40", "--max-steps", "10", "--max-grad-norm", "1000"]
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
    assert run.record["result"]["correct"] == 2 and "\naccuracy 20.00 % (2/10), 95 % between 6 and 51\n" in run.said
    assert torch.equal(heads[3], heads[2] / run.record["temperature"]) and not torch.equal(heads[2], heads[0])
    assert torch.equal(run.state["classifier.weight"], heads[3])
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
    one_by_one = torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in ROWS]).detach()
    for size in (1, 2, 3, 99):
        assert torch.allclose(predict(model, SENTENCES, size), one_by_one, rtol=0, atol=1e-5)
    assert len({round(value, 3) for value in one_by_one[:, 0].tolist()}) == len(SENTENCES)  # in their own order


def test_a_reloaded_model_answers_without_dropout(trained: Run) -> None:
    model = load_checkpoint(trained.path)[0].model
    assert torch.equal(model(torch.tensor(ROWS[:1])).logits, model(torch.tensor(ROWS[:1])).logits)
    assert not any(module.training for module in model.modules())


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


@pytest.mark.skipif(sys.platform != "linux", reason="another library of threads")
@pytest.mark.parametrize("script", ["lora_scratch", "lora_peft", "playground"])
@pytest.mark.parametrize(
    ("own", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
)
def test_threads_that_wait_sleep_soon_unless_the_user_says_otherwise(script: str, own: dict, spins: str) -> None:
    others = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = others | {"OMP_DISPLAY_ENV": "VERBOSE"} | own
    command, root = [sys.executable, "-c", f"import {script}"], Path(lora_scratch.__file__).parent
    told = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=True).stderr
    if "GOMP_SPINCOUNT" not in told:
        pytest.skip("PyTorch is built with another library of threads")
    assert f"GOMP_SPINCOUNT = '{spins}'" in told


# --- The real thing


@pytest.mark.slow
def test_300_steps_on_real_sentences_learn_and_survive_the_file(real_base: Path, sst2: Path, tmp_path: Path) -> None:
    run = Run(
        real_base,
        sst2,
        tmp_path / "a.pt",
        "--max-steps",
        "300",
        "--lr",
        "0.001",
        "--label-names",
        "negative",
        "positive",
    )
    result = run.record["result"]
    assert result["total"] == 872 and result["accuracy"] > 75
    assert result["correct"] == run.record["epochs"][-1]["correct"]
    assert run.checkpoint["label_names"] == ["negative", "positive"]
    torch.manual_seed(1)
    first = logits(run.path)
    torch.manual_seed(2)
    assert torch.equal(logits(run.path), first)
