"""A whole run, from a folder of sentences to a file that is read again."""

import copy
import json
import math
import os
import platform
import shutil
import subprocess
import sys

import lora_scratch
from lora_scratch import load_base, load_checkpoint, load_tables, make_parser, parse_flags, predict, tokenize

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import NO_DROPOUT, ROOT, SCRIPTS, SENTENCES, Run, flags, load_result, logits, output_of
from torch import Tensor, nn
from transformers import AutoTokenizer

import lora_peft


@pytest.fixture(scope="module")
def trained(tiny_base, tiny_data, tmp_path_factory) -> Run:
    """A run that learns forty sentences by heart; three of ten validation labels are wrong."""
    data, output = (tmp_path_factory.mktemp(name) for name in ("noisy", "trained"))
    shutil.copytree(tiny_data, data, dirs_exist_ok=True)
    rows = (data / "dev.tsv").read_text(encoding="utf-8")
    (data / "dev.tsv").write_text(rows.replace("\t1\n", "\t0\n", 3), encoding="utf-8")
    more = ["--lr", 0.02, "--epochs", 20, "--label-names", "bad", "good"]
    return Run(tiny_base, data, output / "a.pt", *more)


def test_it_learns_and_its_result_is_that_of_the_file(trained) -> None:
    torch.manual_seed(7)  # another seed: the head comes from the file
    base, checkpoint = load_checkpoint(trained.path)
    assert not any(module.training for module in base.model.modules())
    assert base.model.config.id2label == {0: "bad", 1: "good"}
    train_rows, eval_rows, _ = load_tables(parse_flags(make_parser("", ""), trained.flags))
    sets = [tokenize(rows["text"], base.tokenizer, 128, rows["label"]) for rows in (train_rows, eval_rows)]
    answers = predict(base.model, sets[1], 3)
    confusion = lora_scratch.count_answers(answers, sets[1].labels)
    result = trained.record["result"]
    assert result["confusion"] == confusion.tolist() and result["label_names"] == ["bad", "good"]
    assert result["correct"] == int(confusion.trace()) == 7 and result["accuracy"] == 70
    sure = answers.softmax(dim=1).amax(dim=1)[sets[1].labels != answers.argmax(dim=1)]
    assert sorted(one["percent"] / 100 for one in result["mistakes"]) == pytest.approx(
        sure.sort().values, abs=1e-3
    )
    assert result["bytes"] == trained.path.stat().st_size
    assert "accuracy 70.00 % (7/10)" in trained.said
    scaled = predict(base.model, sets[0], 32) * trained.record["temperature"]
    assert F.cross_entropy(scaled, sets[0].labels) < 0.1
    losses = [epoch["train_loss"] for epoch in trained.record["epochs"]]
    assert losses[0] > 0.6 and losses[-1] < 0.3
    assert checkpoint["record"]["epochs"] == trained.record["epochs"]


def test_the_files_of_a_run(trained, tiny_base) -> None:
    files = trained.path.parent.iterdir()
    assert sorted(path.name for path in files) == ["a", "a.json", "a.pt", "a.pt.state"]
    found, own = map(AutoTokenizer.from_pretrained, (trained.path.with_suffix(""), tiny_base))
    assert found("A warm film")["input_ids"] == own("A warm film")["input_ids"]


def test_the_checkpoint_is_small_and_plain(trained, tiny_base) -> None:
    block = "distilbert.transformer.layer"
    layers = [f"{block}.{i}.attention.{name}" for i in (0, 1) for name in ("q_lin", "v_lin")]
    head = {f"{name}.{kind}" for name in ("pre_classifier", "classifier") for kind in ("weight", "bias")}
    lora = {f"{path}.{matrix}" for path in layers for matrix in ("lora_A", "lora_B")}
    assert trained.state.keys() == head | lora
    assert all(type(tensor) is Tensor for tensor in trained.state.values())
    assert {tensor.dtype for tensor in trained.state.values()} == {torch.float32}
    size = sum(4 * tensor.numel() for tensor in trained.state.values())
    assert size < trained.path.stat().st_size < size + 20_000
    facts = {key: value for key, value in trained.checkpoint.items() if key != "state_dict"}
    assert json.loads(json.dumps(facts)) == facts  # plain values alone
    settings, absolute = facts.pop("record")["settings"], facts.pop("absolute")
    identity = load_base(str(tiny_base), None, ["a", "b", "c"], 128).identity
    assert {key: facts.pop(key) for key in identity} == identity
    sizes = {"max_length": 128, "r": 8, "alpha": 16, "dropout": 0.1, "use_rslora": False, "layers": None}
    names = {"label_names": ["bad", "good"], "targets": ["q_lin", "v_lin"]}
    places = {"base": tiny_base, "data": settings["dataset"]}
    assert absolute == {key: str(place) for key, place in places.items()}
    places = {key: os.path.relpath(place, trained.path.parent) for key, place in places.items()}
    columns = {"labels": ["0", "1"], "text_column": "sentence", "label_column": "label"}
    assert facts == {"format": 1, "revision": None} | places | names | sizes | columns


def test_the_record_has_settings_versions_machine_and_every_epoch(trained, tiny_base) -> None:
    record, settings = trained.record, trained.record["settings"]
    assert settings.keys() >= vars(make_parser("", "").parse_args([])).keys()
    wanted = {"model": str(tiny_base), "lr": 0.02, "epochs": 20, "seed": 42, "batch_size": 16}
    assert {key: settings[key] for key in wanted} == wanted
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    assert record["versions"].items() >= versions.items() and record["precision"] == "float32"
    assert platform.machine() in record["hardware"] and "threads: 1" in record["hardware"]
    assert [epoch["epoch"] for epoch in record["epochs"]] == list(range(1, 21))
    for epoch in record["epochs"]:
        assert (epoch["steps"], epoch["total"]) == (3, 10)
        assert epoch["accuracy"] == 10 * epoch["correct"]
        assert math.isfinite(epoch["train_loss"]) and math.isfinite(epoch["eval_loss"])
        assert epoch["sentences_per_second"] * epoch["seconds"] == pytest.approx(40)
    assert record["loss_curve"]["every"] == 20 and len(record["loss_curve"]["loss"]) == 3


CHILD = """
import sys, lora_scratch, torch
torch.set_num_threads(1)
model = lora_scratch.load_checkpoint(sys.argv[1])[0].model
torch.save(model(torch.arange(2, 30)[None]).logits, sys.argv[2])
lora_scratch.run(lambda: lora_scratch.main(["--dataset", "none.tsv"]))
"""


def test_a_fresh_process_gives_the_same_bits_and_a_mistake_is_one_line(trained, tmp_path) -> None:
    command = [sys.executable, "-c", CHILD, str(trained.path), str(tmp_path / "logits")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    own = load_checkpoint(trained.path)[0].model(torch.arange(2, 30)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits"), own)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert "none.tsv" in done.stderr and done.stderr.count("\n") == 1


def test_a_seed_decides_every_bit(tiny_base, tiny_data, tmp_path) -> None:
    runs = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        more = ["--seed", seed, "--max-steps", "5", "--lr", "0.01"]
        runs.append(Run(tiny_base, tiny_data, tmp_path / f"{name}.pt", *more))
        torch.rand(3)
    one, same, other = (run.state for run in runs)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    curves = [run.record["loss_curve"] for run in runs]
    assert curves[0] == curves[1] != curves[2]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("freeze", [[], ["--freeze-head"]])
@SCRIPTS
def test_the_base_stays_and_what_has_moved_is_saved(
    script, freeze, precision, tiny_base, tiny_data, tmp_path, monkeypatch
) -> None:
    states, real = [], script.train

    def spy(model: nn.Module, *rest) -> None:
        states.append(copy.deepcopy(lora_peft.own_names(model.state_dict())))
        real(model, *rest)
        states.append(copy.deepcopy(lora_peft.own_names(model.state_dict())))

    monkeypatch.setattr(script, "train", spy)
    path = output_of(script, tmp_path)
    more = ["--max-steps", 3, "--lr", 0.01, "--weight-decay", 0, "--precision", precision, "--output", path]
    script.main([*flags(tiny_base, tiny_data), *map(str, more), *freeze])
    before, after = states
    torch.manual_seed(42)
    start = load_base(str(tiny_base), None, ["0", "1"], 128)
    saved = lora_peft.own_names(load_result(path)[0].model.state_dict())
    temperature = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["temperature"]
    assert temperature == 1 or not freeze
    for name, tensor in after.items():
        is_kept = "lora_" in name or name in start.head
        moves = "lora_" in name or (name in start.head and not freeze)
        assert torch.equal(tensor, before[name]) is not moves, name
        kept_in = torch.bfloat16 if precision == "bf16" and not is_kept else torch.float32
        assert (tensor.dtype, saved[name].dtype) == (kept_in, torch.float32), name
        if is_kept:
            scaled = tensor / temperature if name.startswith("classifier.") else tensor
            assert torch.equal(saved[name], scaled), name
        if name in start.head:  # as the seed has made it
            assert torch.equal(before[name], start.model.get_parameter(name)), name


@pytest.mark.parametrize("limit", [0.05, 0])
def test_training_is_the_plain_loop(limit, tiny_base, tiny_data, tmp_path) -> None:
    """Schedule, clipping, decay, batches, dropout: the same tensors as from ten lines of PyTorch."""
    more = ["--max-steps", 10, "--lr", 0.01, "--warmup", 0.3, "--weight-decay", 0.5, "--max-grad-norm", limit]
    run = Run(tiny_base, tiny_data, tmp_path / "a.pt", *more, "--log-every", 1)
    rows, _, about = load_tables(parse_flags(make_parser("", ""), run.flags))
    torch.manual_seed(42)
    base = load_base(str(tiny_base), None, about["label_names"], 128)
    lora_scratch.inject_lora(base.model, base.head)
    model = lora_scratch.speed_up(base).train()
    tokens = tokenize(rows["text"], base.tokenizer, 128, rows["label"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses, norms = torch.optim.AdamW(trained, weight_decay=0.5), [], []
    for step in range(10):
        epoch, number = divmod(step, 3)
        batch = lora_scratch.make_batches(tokens.lengths, 16, 42_000 + epoch)[number]
        optimizer.param_groups[0]["lr"] = 0.01 * (step / 3 if step < 3 else (10 - step) / 7)
        inputs = lora_scratch.collate(tokens, batch, model)
        loss = F.cross_entropy(model(**inputs).logits, tokens.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(trained, limit or math.inf).item())
        optimizer.step()
        losses.append(loss.item())
    assert min(norms) > 0.05  # each step is clipped
    assert run.record["loss_curve"]["loss"] == pytest.approx(losses, abs=2e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("classifier."):  # which is calibrated
            assert torch.allclose(run.state[name], parameter, rtol=0, atol=1e-5), name


def test_max_steps_ends_in_the_middle_of_an_epoch(tiny_base, tiny_data, tmp_path) -> None:
    more = ["--max-steps", 7, "--epochs", 99, "--train-samples", 40, "--log-every", 1]
    record = Run(tiny_base, tiny_data, tmp_path / "a.pt", *more).record
    assert [epoch["steps"] for epoch in record["epochs"]] == [3, 3, 1]
    assert len(record["loss_curve"]["loss"]) == 7


def test_the_last_epoch_is_reported_and_not_the_best(tiny_base, tiny_data, tmp_path, monkeypatch) -> None:
    models, heads = [], []

    def descending(model: nn.Module, sentences: lora_scratch.Tokens, _: int) -> Tensor:
        models.append(model)
        heads.append(model.classifier.weight.detach().clone())
        right = torch.arange(10) < [9, 5, 2, 2, 2][len(heads) - 1]
        return F.one_hot(torch.where(right, sentences.labels, 1 - sentences.labels)).float()

    monkeypatch.setattr(lora_scratch, "predict", descending)
    run = Run(tiny_base, tiny_data, tmp_path / "a.pt", "--epochs", "3", "--lr", "0.01")
    assert [epoch["correct"] for epoch in run.record["epochs"]] == [9, 5, 2]
    assert run.record["result"]["correct"] == 2 and "20.00 % (2/10)" in run.said
    assert torch.equal(heads[4], heads[2] / run.record["temperature"])
    assert not torch.equal(heads[2], heads[0])
    assert torch.equal(run.state["classifier.weight"], heads[4])
    assert models[4] is not models[3]  # what was measured is the file


def test_three_labels_from_a_csv_file(tiny_base, tmp_path) -> None:
    rows = [f"film {i} {label},{label}\n" for i in range(8) for label in ("low", "high", "mid")]
    (tmp_path / "r.csv").write_text("review,stars\n" + "".join(rows), encoding="utf-8")
    more = ["--text-column", "review", "--label-column", "stars", "--max-steps", "3"]
    run = Run(tiny_base, tmp_path / "r.csv", tmp_path / "a.pt", *more)
    assert run.checkpoint["label_names"] == ["high", "low", "mid"]
    assert logits(run.path).shape == (len(SENTENCES), 3) and run.record["result"]["total"] == 3


WAITS = [({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, None)]


@pytest.mark.parametrize(("own", "spins"), WAITS)
@pytest.mark.parametrize("script", ["lora_scratch", "lora_peft", "playground"])
def test_idle_threads_sleep_soon_unless_the_user_says_otherwise(script, own, spins, tmp_path) -> None:
    """What PyTorch finds when it is imported, which is when its threads read it."""
    stub = "import os, sys; sys.exit(repr(os.environ.get('GOMP_SPINCOUNT')))"
    (tmp_path / "torch.py").write_text(stub, encoding="utf-8")
    others = {key: value for key, value in os.environ.items() if key[:4] not in ("GOMP", "OMP_")}
    environment = others | {"PYTHONPATH": str(tmp_path)} | own
    command = [sys.executable, f"{script}.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stderr.strip() == repr(spins)


@pytest.mark.slow
@SCRIPTS
def test_two_processes_follow_the_loss_path_of_one(script, tiny_base, tiny_data, tmp_path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | NO_DROPOUT), encoding="utf-8")
    data = shutil.copytree(tiny_data, tmp_path / "data")
    rows = (data / "train.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    # 27 sentences in batches of 13: the last has one, of which the second process gets nothing.
    (data / "train.tsv").write_text("".join(rows[:28]), encoding="utf-8")
    more = ["--batch-size", 13, "--dropout", 0, "--epochs", 3, "--lr", 0.01, "--threads", 1]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-ranks-filter", "0"]
    records, states = [], []
    for name, launcher in (("one", []), ("two", torchrun)):
        output = output_of(script, tmp_path / name)
        command = [script.__file__, *flags(base, data, *more, "--output", output)]
        done = subprocess.run([sys.executable, *launcher, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch 1:") == 1  # one process speaks for all
        records.append(json.loads((tmp_path / name / "a.json").read_text(encoding="utf-8")))
        states.append(torch.load(f"{output}.state", weights_only=True))
    losses = [state["losses"] for state in states]
    assert len(losses[0]) == 9 and torch.allclose(*losses, rtol=0, atol=1e-5)
    assert records[0]["result"]["confusion"] == records[1]["result"]["confusion"]
    for one, two in zip(records[0]["epochs"], records[1]["epochs"], strict=True):
        assert one["total"] == two["total"] == 10
        assert one["eval_loss"] == pytest.approx(two["eval_loss"], abs=1e-4)
