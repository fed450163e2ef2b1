"""The same experiment through PEFT, its folder, and the way to the other format."""

import json
import shutil
from pathlib import Path

import lora_scratch
from lora_scratch import Base, load_base, predict

import pytest
import torch
from conftest import SCRIPTS, SENTENCES, TINY, flags, logits, refused, with_tokenizer
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from side_by_side import run_both
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

import lora_peft
from lora_peft import load_adapter

SHORT = ("--max-steps", 3, "--lr", 0.05)


def convert(*words: object) -> None:
    lora_peft.main([str(word) for word in words])


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and facts of a result, under the names of the .pt file."""
    if path.is_file():
        facts = torch.load(path)
        return facts.pop("state_dict"), facts
    facts = json.loads((path / lora_peft.FACTS_FILE).read_text(encoding="utf-8"))
    del facts["tensors"]
    names = {}
    for name, tensor in load_file(path / lora_peft.TENSORS_FILE).items():
        name = name.removeprefix("base_model.model.")
        names[name.removesuffix(".weight") if ".lora_" in name else name] = tensor
    return names, facts


@pytest.fixture(scope="module")
def adapter(tiny_base, tiny_data, tmp_path_factory) -> Path:
    """A trained adapter folder; a high rate moves lora_B far from zero."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    more = ["--lr", 0.05, "--epochs", 4, "--max-length", 60]
    lora_peft.main(flags(tiny_base, tiny_data, *more, "--output", folder))
    return folder


OTHER = ["--targets", "all-linear", "--use-rslora", "--contrast", 1]
UPPER = ["--targets", "all-linear", "--layers", 1]


@pytest.mark.parametrize("more", [[], ["--freeze-head", "--contrast", 1], OTHER, UPPER])
def test_both_scripts_lose_alike_from_one_start(more, tiny_base, tiny_data, tmp_path) -> None:
    found = run_both(flags(tiny_base, tiny_data, "--lr", 0.001, "--max-steps", 50, *more), tmp_path)
    peft, scratch = found["lora_peft"], found["lora_scratch"]
    assert len(set(peft["losses"])) == 50
    assert peft["losses"] == pytest.approx(scratch["losses"], rel=0, abs=1e-6)
    assert peft["record"]["parameters"] == scratch["record"]["parameters"]
    assert peft["record"]["result"]["correct"] == scratch["record"]["result"]["correct"]
    assert read(tmp_path / "peft")[0].keys() == read(tmp_path / "scratch.pt")[0].keys()


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--max-steps", 50, "--max-grad-norm", 0], ["--max-steps", 30]])
def test_both_lose_alike_on_real_sentences(more, real_base, sst2, tmp_path) -> None:
    """With clipping a step's difference of an ulp grows, so these are fewer steps."""
    found = run_both(flags(real_base, sst2, *more), tmp_path)
    peft, scratch = found["lora_peft"], found["lora_scratch"]
    assert peft["losses"] == pytest.approx(scratch["losses"], rel=0, abs=1e-6)
    assert peft["record"]["result"]["correct"] == scratch["record"]["result"]["correct"]


def test_a_target_may_have_a_namesake(tiny_base, tiny_data, tmp_path, monkeypatch) -> None:
    """PEFT takes a name alone for every module that has it, and refuses what is no layer."""

    def with_namesake(*args) -> Base:
        base = load_base(*args)
        base.model.distilbert.extra = nn.Module()
        base.model.distilbert.extra.q_lin = nn.Identity()
        return base

    for script in (lora_scratch, lora_peft):
        monkeypatch.setattr(script, "load_base", with_namesake)
    lora_peft.main(flags(tiny_base, tiny_data, *SHORT, "--output", tmp_path / "p"))
    wrapped = {name.split(".lora_")[0] for name in read(tmp_path / "p")[0] if ".lora_" in name}
    blocks = [f"distilbert.transformer.layer.{i}.attention" for i in (0, 1)]
    assert wrapped == {f"{block}.{name}" for block in blocks for name in ("q_lin", "v_lin")}
    convert("--export-scratch", tmp_path / "p", "--output", tmp_path / "x.pt")
    convert("--import-scratch", tmp_path / "x.pt", "--output", tmp_path / "y")
    assert torch.allclose(logits(tmp_path / "p"), logits(tmp_path / "y"), rtol=0, atol=1e-6)


def test_peft_alone_loads_the_folder_with_its_head(adapter, tiny_base) -> None:
    ours = logits(adapter)
    auto = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=2)
    options = {"num_labels": 2, "dtype": torch.float32}
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_base, **options)
    assert AutoTokenizer.from_pretrained(adapter).model_max_length == 60
    assert not torch.allclose(predict(plain, SENTENCES, 2), ours, atol=1e-2)
    for model in (auto, PeftModel.from_pretrained(plain, str(adapter))):
        assert torch.allclose(predict(model, SENTENCES, 2), ours, rtol=0, atol=1e-6)


def test_a_merged_adapter_is_a_plain_model_that_answers_alike(adapter) -> None:
    merged = load_adapter(adapter, merge=True)[0]
    assert not any("lora" in name for name, _ in merged.model.named_parameters())
    assert torch.allclose(predict(merged.model, SENTENCES, 2), logits(adapter), rtol=0, atol=1e-5)


def test_bert_keeps_its_pooler_in_the_head(tiny_base, tiny_data, tmp_path) -> None:
    bert = with_tokenizer(tmp_path / "bert", tiny_base, BertModel(BertConfig(**TINY)))
    more = [*SHORT, "--targets", "dense", "query"]
    lora_peft.main(flags(bert, tiny_data, *more, "--output", tmp_path / "a"))
    saved, _ = read(tmp_path / "a")
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= saved.keys()
    assert not any("pooler" in name and "lora" in name for name in saved)
    assert sum(name.endswith("lora_A") for name in saved) == 2 * 4  # query and three dense
    convert("--export-scratch", tmp_path / "a", "--output", tmp_path / "b.pt")
    assert torch.allclose(logits(tmp_path / "b.pt"), logits(tmp_path / "a"), rtol=0, atol=1e-6)


def test_dora_trains_and_cannot_become_a_pt_file(tiny_base, tiny_data, tmp_path) -> None:
    folder = tmp_path / "dora"
    lora_peft.main(flags(tiny_base, tiny_data, *SHORT, "--use-dora", "--output", folder))
    assert any("magnitude" in name for name in read(folder)[0])
    export = ["--export-scratch", folder, "--output", tmp_path / "d.pt"]
    refused(lambda: convert(*export), folder, "use_dora")
    assert logits(folder).isfinite().all()
    assert not (tmp_path / "d.pt").exists()


@SCRIPTS
def test_there_and_back_keeps_every_bit(script, tiny_base, tiny_data, tmp_path) -> None:
    names, ways = ["a.pt", "b", "c.pt"], ["--import-scratch", "--export-scratch"]
    if script is lora_peft:
        names, ways = ["a", "b.pt", "c"], ways[::-1]
    first, second, third = (tmp_path / name for name in names)
    more = [*SHORT, "--use-rslora", "--r", 3, "--label-names", "bad", "good"]
    script.main(flags(tiny_base, tiny_data, *more, "--output", first))
    convert(ways[0], first, "--output", second)
    convert(ways[1], second, "--output", third)
    tensors, facts = read(first)
    for path in (second, third):
        found, others = read(path)
        assert others == facts and found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert torch.allclose(logits(first), logits(second), rtol=0, atol=1e-6)
    assert facts["label_names"] == ["bad", "good"]
    assert (facts["r"], facts["use_rslora"]) == (3, True)


def test_an_export_refuses_what_a_pt_file_cannot_hold(adapter, tmp_path) -> None:
    copied = shutil.copytree(adapter, tmp_path / "copied")
    export = ["--export-scratch", copied, "--output", tmp_path / "x.pt"]
    shutil.copytree(copied, copied / "second")
    refused(lambda: convert(*export), copied, "several adapters")
    shutil.rmtree(copied / "second")
    path = copied / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"alpha_pattern": {"q_lin": 99}}), encoding="utf-8")
    refused(lambda: convert(*export), copied, "alpha_pattern")
    assert sorted(tmp_path.iterdir()) == [copied]


def test_answers_that_are_not_finite_are_not_converted(adapter, tmp_path) -> None:
    convert("--export-scratch", adapter, "--output", tmp_path / "a.pt")
    checkpoint = torch.load(tmp_path / "a.pt")
    for name, tensor in checkpoint["state_dict"].items():
        tensor.fill_(1e38 if "lora" in name else 1.0)
    torch.save(checkpoint, tmp_path / "a.pt")
    words = ["--import-scratch", tmp_path / "a.pt", "--output", tmp_path / "b"]
    refused(lambda: convert(*words), tmp_path / "a.pt")
    assert not (tmp_path / "b").exists()


def test_a_conversion_of_nothing_or_to_nowhere_is_refused(adapter, tmp_path) -> None:
    export, none = ["--export-scratch", adapter, "--output"], tmp_path / "none"
    for words, named in (
        (["--export-scratch", none, "--output", tmp_path / "x.pt"], none),
        (["--import-scratch", none, "--output", tmp_path / "x"], none),
        ([*export, tmp_path / "x"], ".pt"),
        (export[:2], "--output"),
        ([*export, tmp_path / "x.pt", "--import-scratch", none], "--import-scratch"),
    ):
        refused(lambda words=words: convert(*words), named)
    assert list(tmp_path.iterdir()) == []
