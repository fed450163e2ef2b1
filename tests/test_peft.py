"""lora_peft.py: the same experiment, a standard adapter folder, and the way to the handwritten format and back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES, TINY, flags, with_tokenizer
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file
from side_by_side import run_both
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

import lora_peft
import lora_scratch
from lora_scratch import InputError, load_checkpoint, predict


def answers(base: lora_scratch.Base) -> torch.Tensor:
    return predict(base.model, SENTENCES, 2)


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter folder; a high rate moves lora_B far from zero."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    lora_peft.main(flags(tiny_base, tiny_data, "--lr", 0.05, "--epochs", 4, "--output", folder))
    return folder


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter folder that a test may break."""
    return shutil.copytree(adapter, tmp_path / "broken")


@pytest.mark.parametrize("extra", [[], ["--freeze-head"], ["--targets", "all-linear", "--use-rslora"]])
def test_both_scripts_are_one_experiment(tiny_base: Path, tiny_data: Path, tmp_path: Path, extra: list[str]) -> None:
    outcome = run_both(flags(tiny_base, tiny_data, "--lr", 0.001, "--max-steps", 50, *extra), tmp_path)
    peft, scratch = outcome["lora_peft"], outcome["lora_scratch"]
    assert len(peft["losses"]) == 50 and len(set(peft["losses"])) == 50
    assert torch.allclose(torch.tensor(peft["losses"]), torch.tensor(scratch["losses"]), rtol=0, atol=1e-6)
    assert peft["record"]["parameters"] == scratch["record"]["parameters"]
    assert peft["record"]["result"]["correct"] == scratch["record"]["result"]["correct"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--max-steps", 50, "--max-grad-norm", 0], ["--max-steps", 30]])
def test_both_scripts_are_one_experiment_on_real_sentences(
    more: list, real_base: Path, sst2: Path, tmp_path: Path
) -> None:
    """Each step differs by an ulp of the loss; with clipping that grows, so these are fewer steps."""
    outcome = run_both(flags(real_base, sst2, *more), tmp_path)
    losses = [torch.tensor(outcome[script]["losses"]) for script in ("lora_peft", "lora_scratch")]
    assert torch.allclose(*losses, rtol=0, atol=1e-6)
    assert len({outcome[script]["record"]["result"]["correct"] for script in outcome}) == 1


def test_peft_alone_loads_the_folder_with_its_head(adapter: Path, tiny_base: Path) -> None:
    ours = answers(lora_peft.load_adapter(adapter)[0])
    auto = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=2)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2, dtype=torch.float32)
    for model in (auto, PeftModel.from_pretrained(plain, str(adapter))):
        assert torch.allclose(predict(model, SENTENCES, 2), ours, rtol=0, atol=1e-6)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2, dtype=torch.float32)
    assert not torch.allclose(predict(base, SENTENCES, 2), ours, atol=1e-2)


def test_facts_without_a_place_in_peft_are_saved_in_lora_peft_json(adapter: Path) -> None:
    facts = json.loads((adapter / "lora_peft.json").read_text(encoding="utf-8"))
    assert facts["label_names"] == ["0", "1"] and len(facts["fingerprint"]) == 64
    assert facts["targets"] == ["q_lin", "v_lin"] and facts["max_length"] == 128
    assert not (adapter / "config.json").exists()
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert {"pre_classifier", "classifier"} <= set(config["modules_to_save"])
    assert adapter.with_suffix(".json").is_file()


def test_a_merged_adapter_answers_alike_and_is_a_plain_model(adapter: Path) -> None:
    merged = lora_peft.load_adapter(adapter, merge=True)[0]
    assert not isinstance(merged.model, PeftModel)
    assert not any("lora" in name for name, _ in merged.model.named_parameters())
    assert torch.allclose(answers(merged), answers(lora_peft.load_adapter(adapter)[0]), rtol=0, atol=1e-5)


def test_a_frozen_head_is_saved_as_it_started(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    more = ["--freeze-head", "--lr", 0.05, "--max-steps", 5, "--output", tmp_path / "a"]
    lora_peft.main(flags(tiny_base, tiny_data, *more))
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    torch.manual_seed(42)
    start = lora_scratch.load_base(str(tiny_base), None, ["0", "1"], 128).model
    for name in ("pre_classifier.weight", "classifier.weight", "classifier.bias"):
        assert torch.equal(saved[f"base_model.model.{name}"], start.state_dict()[name])
    assert any(saved[name].any() for name in saved if "lora_B" in name)


def test_bert_keeps_its_pooler_in_the_head(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    bert = with_tokenizer(tmp_path / "bert", tiny_base, BertModel(BertConfig(**TINY)))
    more = ["--max-steps", 3, "--lr", 0.05, "--targets", "dense", "query", "--output", tmp_path / "a"]
    lora_peft.main(flags(bert, tiny_data, *more))
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {"base_model.model.bert.pooler.dense.weight", "base_model.model.classifier.weight"} <= saved.keys()
    assert not any("pooler" in name and "lora" in name for name in saved)
    assert sum(name.endswith("lora_A.weight") for name in saved) == 2 * 4  # query and the three dense of each layer
    lora_peft.main(["--export-scratch", str(tmp_path / "a"), "--output", str(tmp_path / "b.pt")])
    assert torch.allclose(
        answers(load_checkpoint(tmp_path / "b.pt")[0]), answers(lora_peft.load_adapter(tmp_path / "a")[0]), atol=1e-6
    )


def test_conversion_there_and_back_keeps_every_bit(adapter: Path, tmp_path: Path) -> None:
    lora_peft.main(["--export-scratch", str(adapter), "--output", str(tmp_path / "a.pt")])
    lora_peft.main(["--import-scratch", str(tmp_path / "a.pt"), "--output", str(tmp_path / "b")])
    lora_peft.main(["--export-scratch", str(tmp_path / "b"), "--output", str(tmp_path / "c.pt")])
    first, last = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "b"))
    assert first.keys() == last.keys() and all(torch.equal(first[key], last[key]) for key in first)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "c.pt"))
    assert all(torch.equal(one["state_dict"][key], two["state_dict"][key]) for key in one["state_dict"])
    assert {k: v for k, v in one.items() if k != "state_dict"} == {k: v for k, v in two.items() if k != "state_dict"}
    assert len(one["state_dict"]) == len(first) == 12
    expected = answers(lora_peft.load_adapter(adapter)[0])
    for base in (load_checkpoint(tmp_path / "a.pt")[0], lora_peft.load_adapter(tmp_path / "b")[0]):
        assert torch.allclose(answers(base), expected, rtol=0, atol=1e-6)


def test_a_checkpoint_of_the_other_script_converts(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    more = ["--lr", 0.05, "--epochs", 2, "--use-rslora", "--r", 3, "--label-names", "bad", "good"]
    lora_scratch.main(flags(tiny_base, tiny_data, *more, "--output", tmp_path / "s.pt"))
    lora_peft.main(["--import-scratch", str(tmp_path / "s.pt"), "--output", str(tmp_path / "p")])
    scratch, checkpoint = load_checkpoint(tmp_path / "s.pt")
    peft, facts = lora_peft.load_adapter(tmp_path / "p")
    assert torch.allclose(answers(scratch), answers(peft), rtol=0, atol=1e-6)
    saved = load_file(tmp_path / "p" / "adapter_model.safetensors")
    for name, tensor in checkpoint["state_dict"].items():
        theirs = f"base_model.model.{name}.weight" if "lora_" in name else f"base_model.model.{name}"
        assert torch.equal(saved[theirs], tensor)
    assert facts["label_names"] == ["bad", "good"] and facts["r"] == 3 and facts["use_rslora"] is True


def test_dora_trains_and_cannot_become_a_handwritten_file(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    lora_peft.main(flags(tiny_base, tiny_data, "--max-steps", 3, "--use-dora", "--output", tmp_path / "dora"))
    assert any("magnitude" in name for name in load_file(tmp_path / "dora" / "adapter_model.safetensors"))
    with pytest.raises(InputError, match="use_dora=True"):
        lora_peft.main(["--export-scratch", str(tmp_path / "dora"), "--output", str(tmp_path / "d.pt")])
    assert not (tmp_path / "d.pt").exists()


def edit_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_export_refuses_by_name_what_a_pt_file_cannot_hold(copied: Path, tmp_path: Path) -> None:
    export = ["--export-scratch", str(copied), "--output", str(tmp_path / "x.pt")]
    shutil.copytree(copied, copied / "second")
    with pytest.raises(InputError, match=r"several adapters .second"):
        lora_peft.main(export)
    shutil.rmtree(copied / "second")
    edit_config(copied, alpha_pattern={"layer.0.attention.q_lin": 99})
    with pytest.raises(InputError, match="alpha_pattern"):
        lora_peft.main(export)
    with pytest.raises(InputError, match=r"ends in \.pt"):
        lora_peft.main(["--export-scratch", str(copied), "--output", str(tmp_path / "x")])


def test_settings_that_were_not_written_here_are_refused_by_name(copied: Path) -> None:
    before = (copied / "adapter_config.json").read_bytes()
    for changes in ({"init_lora_weights": "pissa"}, {"bias": "zzz"}, {"target_modules": "("}, {"r": 10**9}):
        edit_config(copied, **changes)
        with pytest.raises(InputError, match=next(iter(changes))):
            lora_peft.load_adapter(copied)
        (copied / "adapter_config.json").write_bytes(before)
    facts = json.loads((copied / "lora_peft.json").read_text(encoding="utf-8"))
    del facts["r"]
    (copied / "lora_peft.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(InputError, match="'r' is missing"):
        lora_peft.load_adapter(copied)


def test_import_overwrites_nothing(adapter: Path, tmp_path: Path) -> None:
    lora_peft.main(["--export-scratch", str(adapter), "--output", str(tmp_path / "a.pt")])
    with pytest.raises(InputError, match="there is something already"):
        lora_peft.main(["--import-scratch", str(tmp_path / "a.pt"), "--output", str(adapter)])


def test_an_output_that_is_a_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(InputError, match="a file stands at"):
        lora_peft.main(["--output", str(tmp_path / "a")])


def rewrite(folder: Path, change) -> None:
    """Change the tensors, and their checksum with them."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    path, digest = folder / "lora_peft.json", lora_peft.sha256_of(folder / "adapter_model.safetensors")
    facts = json.loads(path.read_text(encoding="utf-8")) | {"tensors": digest}
    path.write_text(json.dumps(facts), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("base_model.model.classifier.weight"), "classifier.weight' is missing"),
        (lambda t: t.update({"base_model.model.extra": torch.ones(1)}), "extra' is not expected"),
        (lambda t: t.update({"base_model.model.classifier.bias": torch.ones(3)}), "shape"),
        (lambda t: t["base_model.model.classifier.bias"].fill_(float("nan")), "NaN"),
    ],
)
def test_a_folder_with_wrong_tensors_is_refused(copied: Path, change, message: str) -> None:
    rewrite(copied, change)
    with pytest.raises(InputError, match=message):
        lora_peft.load_adapter(copied)


def test_tensors_of_another_run_are_refused(copied: Path) -> None:
    facts = (copied / "lora_peft.json").read_bytes()
    rewrite(copied, lambda tensors: tensors["base_model.model.classifier.bias"].add_(1))
    lora_peft.load_adapter(copied)
    (copied / "lora_peft.json").write_bytes(facts)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is not the one"):
        lora_peft.load_adapter(copied)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "lora_peft.json"])
def test_a_folder_with_a_missing_or_broken_file_is_refused(copied: Path, name: str) -> None:
    (copied / name).write_bytes(b"not what it should be")
    with pytest.raises(InputError, match="not a readable adapter"):
        lora_peft.load_adapter(copied)
    (copied / name).unlink()
    with pytest.raises(InputError, match=name):
        lora_peft.load_adapter(copied)


def test_another_base_is_refused_naming_both(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as error:
        lora_peft.load_adapter(adapter, str(other))
    assert str(tiny_base) in str(error.value) and str(other) in str(error.value)


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        lora_scratch.run(lambda: lora_peft.main(["--export-scratch", str(tmp_path / "none"), "--output", "x.pt"]))
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert said.err.startswith("error:") and said.err.count("\n") == 1
