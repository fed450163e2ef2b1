"""Base models: which are refused, and how a checkpoint recognises its own."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import lora_scratch
from lora_scratch import load_base, predict, tokenize

import pytest
import torch
import transformers
from conftest import SCRIPTS, SENTENCES, TINY, flags, load_result, logits, output_of, refused, with_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BartConfig, DistilBertModel, T5Config

import lora_peft

ROOM = {"pad_token_id": 0, "max_position_embeddings": 130}


@pytest.fixture(scope="module")
def wide_base(tiny_base, tmp_path_factory) -> Path:
    """The tiny base with weights as large as trained ones: its attention looks at some words."""
    folder = shutil.copytree(tiny_base, tmp_path_factory.mktemp("wide") / "base")
    edit_weights(folder, lambda weights: {k: 5 * t if t.dim() == 2 else t for k, t in weights.items()})
    return folder


@pytest.fixture(scope="module")
def trained(wide_base, tiny_data, tmp_path_factory) -> dict[object, Path]:
    """A result of each script."""
    folder = tmp_path_factory.mktemp("trained")
    results = {script: output_of(script, folder / script.__name__) for script in (lora_scratch, lora_peft)}
    for script, path in results.items():
        script.main(flags(wide_base, tiny_data, "--max-steps", 2, "--lr", 0.01, "--output", path))
    return results


@pytest.fixture
def copied(wide_base, tmp_path) -> Path:
    """A copy of the base that a test may change."""
    return shutil.copytree(wide_base, tmp_path / "other")


def edit_weights(base: Path, change: Callable[[dict], dict]) -> None:
    weights = change(load_file(base / "model.safetensors"))
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def load(folder: Path, max_length: int = 128, labels: int = 2) -> lora_scratch.Base:
    return load_base(str(folder), None, [str(i) for i in range(labels)], max_length)


def one_weight(weights: dict) -> dict:
    weights["transformer.layer.1.ffn.lin2.weight"][3, 4] += 1e-4
    return weights


def swap_two_words(tokenizer: dict) -> None:
    words = tokenizer["model"]["vocab"]
    words["loved"], words["hated"] = words["hated"], words["loved"]


def in_json(name: str, **changes) -> Callable[[Path], None]:
    return lambda base: edit_json(base / name, lambda content: content.update(changes))


OTHERS = {
    "one weight": lambda base: edit_weights(base, one_weight),
    "heads": in_json("config.json", n_heads=2),
    "activation": in_json("config.json", activation="relu"),
    "capital letters": in_json("tokenizer.json", normalizer=None),
    "vocabulary": lambda base: edit_json(base / "tokenizer.json", swap_two_words),
}


@pytest.mark.parametrize("kind", OTHERS)
@SCRIPTS
def test_another_base_is_refused_naming_both(script, kind, trained, copied, wide_base) -> None:
    OTHERS[kind](copied)
    refused(lambda: load_result(trained[script], str(copied)), wide_base, copied)


@SCRIPTS
def test_the_same_base_elsewhere_answers_alike(script, trained, copied) -> None:
    base, _ = load_result(trained[script], str(copied))
    assert torch.equal(predict(base.model, SENTENCES, 2), logits(trained[script]))


def test_the_identity_is_of_the_base_and_not_of_its_random_head(wide_base, copied) -> None:
    one, other = load(wide_base), load(copied, labels=3)
    assert one.identity == other.identity and len(one.identity["fingerprint"]) == 64
    assert not torch.equal(one.model.pre_classifier.weight, other.model.pre_classifier.weight)


@pytest.mark.parametrize(
    ("name", "more", "head"),
    [
        ("Bert", {}, ["bert.pooler.dense", "classifier"]),
        ("Roberta", ROOM, ["classifier.dense", "classifier.out_proj"]),
        ("Electra", {"embedding_size": 16}, ["classifier.dense", "classifier.out_proj"]),
    ],
)
def test_the_head_is_what_lies_outside_the_encoder(name, more, head, tiny_base, tmp_path) -> None:
    config = getattr(transformers, f"{name}Config")(**TINY | more)
    model = transformers.AutoModel.from_config(config)
    base = load(with_tokenizer(tmp_path / "base", tiny_base, model))
    assert set(base.head) == {f"{layer}.{kind}" for layer in head for kind in ("weight", "bias")}


def test_a_base_in_half_precision_is_loaded_in_float32(tiny_base, tmp_path) -> None:
    half = DistilBertModel.from_pretrained(tiny_base, dtype=torch.float16)
    model = load(with_tokenizer(tmp_path / "half", tiny_base, half)).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, tensor in half.state_dict().items():
        assert torch.equal(model.get_parameter(f"distilbert.{name}"), tensor.float())


def test_a_base_for_other_labels_gets_a_new_head(tiny_base, tiny_data, tmp_path) -> None:
    """It was fine-tuned for three labels at once, each yes or no."""
    kind = {"num_labels": 3, "problem_type": "multi_label_classification"}
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, **kind)
    base = with_tokenizer(tmp_path / "three", tiny_base, model)
    path = tmp_path / "a.pt"
    lora_scratch.main(flags(base, tiny_data, "--max-steps", 2, "--output", path))
    config = load_result(path)[0].model.config
    assert config.problem_type == "single_label_classification" and config.num_labels == 2
    assert logits(path).shape == (len(SENTENCES), 2)


def without(part: str) -> Callable[[dict], dict]:
    return lambda weights: {name: t for name, t in weights.items() if part not in name}


def with_nan(weights: dict) -> dict:
    weights["transformer.layer.0.ffn.lin1.bias"][2] = float("nan")
    return weights


@pytest.mark.parametrize(
    ("change", "config", "named"),
    [
        (lambda w: {f"module.{name}": t for name, t in w.items()}, {}, "distilbert.embeddings"),
        (without("layer.1."), {}, "distilbert.transformer.layer.1"),
        (without("word"), {}, "word_embeddings.weight"),
        (with_nan, {}, "NaN"),
        (None, {"hidden_dim": 48}, "ffn.lin1.weight"),
        (None, {"n_layers": 3}, "distilbert.transformer.layer.2"),
        (None, {"n_layers": 1}, "transformer.layer.1"),  # weights that nothing reads
        (None, {"max_position_embeddings": 64}, "position_embeddings"),
        (None, {"vocab_size": 20}, "word_embeddings"),
        (None, {"n_layers": 20_000}, "200"),
        (None, {"model_type": "nothing"}, "nothing"),
        (None, {"attention_dropout": math.nan}, "dropout"),  # which shows in training alone
        (None, {"seq_classif_dropout": math.nan}, "nan"),
        (None, {"return_dict": False}, "logits"),
        (None, {"initializer_range": 1e38}, "finite"),  # of the head
    ],
)
def test_a_base_whose_files_do_not_fit_is_refused(change, config, named, copied) -> None:
    if change:
        edit_weights(copied, change)
    in_json("config.json", **config)(copied)
    refused(lambda: load(copied, 32), copied, named)


def nothing_left(tokenizer: dict) -> None:
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": ".+"}, "content": ""}


TOKENIZERS = [
    ("tokenizer.json", lambda t: t["model"]["vocab"].update(more=99)),  # more words than embeddings
    ("tokenizer.json", lambda t: t["model"]["vocab"].update(film=99)),
    ("tokenizer.json", nothing_left),
    ("tokenizer.json", lambda t: t.update(nothing_left(t) or {"post_processor": None})),
    ("tokenizer_config.json", lambda t: t.update(pad_token=None)),
    ("tokenizer_config.json", lambda t: t.update(padding_side="left")),
]


@pytest.mark.parametrize(("name", "change"), TOKENIZERS)
def test_a_base_whose_tokenizer_does_not_fit_is_refused(name, change, copied) -> None:
    edit_json(copied / name, change)
    refused(lambda: load(copied, 32), copied)


def test_a_text_of_which_nothing_is_left_is_padding(copied) -> None:
    """Some tokenizers put nothing around a text, and drop an accent that stands alone."""
    edit_json(copied / "tokenizer.json", lambda t: t.update(post_processor=None))
    base = load(copied)
    tokens = tokenize(["\u0301", "film"], base.tokenizer, 8)
    assert tokens.lengths == [1, 1] and predict(base.model, tokens, 1).isfinite().all()


def test_trying_a_base_leaves_the_seed_alone(copied) -> None:
    """In training its dropout draws; what is drawn next follows from the seed and the head."""
    torch.manual_seed(1)
    load(copied)
    after = torch.rand(1)
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_pretrained(copied)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("config", [T5Config(num_layers=1, d_model=8), BartConfig(d_model=8)])
def test_a_base_with_a_decoder_is_refused(config, copied) -> None:
    config.save_pretrained(copied)
    refused(lambda: load(copied), copied, "encoder")


@SCRIPTS
def test_an_adapter_is_no_base(script, trained, tiny_data, tmp_path) -> None:
    adapter = trained[lora_peft]
    refused(lambda: script.main(flags(adapter, tiny_data, "--output", tmp_path / "a.pt")), adapter)


@pytest.mark.parametrize("limit", [-1, 0])
def test_a_tokenizer_may_have_no_limit_and_the_positions_have_one(limit, copied) -> None:
    in_json("tokenizer_config.json", model_max_length=limit)(copied)
    assert load(copied, 128).model.config.max_position_embeddings == 128
    refused(lambda: load(copied, 129), copied, "129", "128")


def test_robertas_reserved_positions_are_no_room_for_tokens(tiny_base, tmp_path) -> None:
    """Its positions begin after the number of its padding token: 100 are room for 98 tokens."""
    config = transformers.RobertaConfig(**TINY, pad_token_id=1, max_position_embeddings=100)
    model = transformers.RobertaModel(config)
    base = with_tokenizer(tmp_path / "base", tiny_base, model)
    refused(lambda: load(base, 99), base)
    longest = torch.tensor([[2, *[7] * 96, 3]])
    load(base, 98).model(input_ids=longest)
