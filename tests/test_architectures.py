"""Every architecture of the README, in both scripts: train, convert, export, answer alike."""

from lora_scratch import autocast, calibrate, collate, find_targets, inject_lora, load_base, predict, speed_up

import pytest
import torch
import transformers
from conftest import (
    GOOD,
    SCRIPTS,
    TINY,
    as_tokens,
    ask,
    ask_json,
    flags,
    logits,
    output_of,
    refused,
    with_tokenizer,
)
from torch import nn

import lora_peft

SENTENCES = as_tokens([[2, 7, 8, 9, 3], [2, 20, 11, 6, 14, 9, 30, 3], [2, *range(5, 30), 3]])
SMALL = TINY | {"max_position_embeddings": 130, "pad_token_id": 0}
FUNNEL = {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1]}
FUNNEL |= {"vocab_size": 60, "max_position_embeddings": 130}
QUERY = ["--targets", "query", "value"]  # where there is no default
ARCHITECTURES = {  # the name of its configuration, more of its settings, flags
    "bert": ("Bert", {}, []),
    "roberta": ("Roberta", {}, []),
    "electra": ("Electra", {"embedding_size": 16}, []),
    "mpnet": ("MPNet", {}, []),
    "xlm-roberta": ("XLMRoberta", {}, QUERY),
    "camembert": ("Camembert", {}, QUERY),
    "longformer": ("Longformer", {"attention_window": 8}, QUERY),
    "big_bird": ("BigBird", {"attention_type": "original_full"}, QUERY),
    "roformer": ("RoFormer", {}, QUERY),
    "convbert": ("ConvBert", {"embedding_size": 32}, QUERY),
    "funnel": ("Funnel", FUNNEL, ["--targets", "q_head", "v_head"]),
}
FIRST = ("bert", "roberta", "electra", "mpnet")  # with default targets; the others take their time
EACH = [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]


def encoder(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind, more, _ = ARCHITECTURES[name]
    config = getattr(transformers, f"{kind}Config")(**(more if name == "funnel" else SMALL | more))
    if name == "funnel":  # has two encoders; the classifier takes the one without a decoder
        return transformers.FunnelBaseModel(config)
    return transformers.AutoModel.from_config(config)


@pytest.mark.parametrize("name", EACH)
@SCRIPTS
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_train_save_convert_and_export(script, name, tiny_base, tiny_data, tmp_path) -> None:
    base = with_tokenizer(tmp_path / "base", tiny_base, encoder(name))
    to_folder = script is not lora_peft
    path, other = (tmp_path / (f"{n}.pt" if (n == "a") is to_folder else n) for n in ("a", "b"))
    more = ["--epochs", 2, "--lr", 0.05, "--max-length", 100, *ARCHITECTURES[name][2]]
    script.main(flags(base, tiny_data, *more, "--output", path))
    way = "--import-scratch" if to_folder else "--export-scratch"
    lora_peft.main([way, str(path), "--output", str(other)])
    assert torch.equal(logits(path, SENTENCES), logits(path, SENTENCES))  # the head comes from the file
    assert torch.allclose(logits(path, SENTENCES), logits(other, SENTENCES), rtol=0, atol=1e-5)
    plain = load_base(str(base), None, ["0", "1"], 100)
    assert not torch.allclose(logits(path, SENTENCES), predict(plain.model, SENTENCES, 2), atol=1e-3)

    texts = GOOD.split("|")
    answers = [answer["probabilities"] for answer in ask_json("--model", path, *texts)]
    pair = ask_json("--model", path, "--model", other, texts[0])  # which share one base
    for answer in pair:
        assert answer["probabilities"] == pytest.approx(answers[0], abs=1e-5)
    ask("--model", path, "--export", tmp_path / "export")
    run = transformers.pipeline("text-classification", str(tmp_path / "export"), device="cpu")
    for found, answer in zip(run(texts, truncation=True, top_k=None), answers, strict=True):
        assert {one["label"]: one["score"] for one in found} == pytest.approx(answer, abs=1e-5)


@pytest.mark.parametrize("name", ["distilbert", *ARCHITECTURES])
def test_adapters_in_the_upper_layer_alone(name, tiny_base, tmp_path) -> None:
    """What lies below it gets no gradient, so nothing is computed backwards there."""
    is_first = name == "distilbert"
    folder = tiny_base if is_first else with_tokenizer(tmp_path / "base", tiny_base, encoder(name))
    base = load_base(str(folder), None, ["0", "1"], 100)
    targets = [] if is_first else ARCHITECTURES[name][2][1:]
    whole, every = find_targets(base.model, base.head, targets), ["all-linear"]
    layers = base.model.config.num_hidden_layers
    assert find_targets(base.model, base.head, every, layers) == find_targets(base.model, base.head, every)
    if name == "funnel":  # has blocks
        refused(lambda: inject_lora(base.model, base.head, targets, layers=1), "--targets")
        return
    wrapped = inject_lora(base.model, base.head, targets, layers=1)
    assert wrapped == [path for path in whole if "layer.1." in path] and len(whole) == 2 * len(wrapped)
    below = []
    lower, _ = next(m for m in base.model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    lower.register_forward_hook(lambda *outputs: below.append(outputs[2]))
    base.model(**collate(SENTENCES, [0, 1, 2], base.model)).logits.sum().backward()
    states = below[-1][0] if isinstance(below[-1], tuple) else below[-1]
    assert not states.requires_grad


def calibrated(model: nn.Module) -> float:
    """The temperature of a model that is always wrong; it divides the logits."""
    tokens = as_tokens([[2, 5 + i, 9, 3] for i in range(20)])
    before = predict(model, tokens, 4)
    tokens.labels = before.argmin(dim=1)
    temperature = calibrate(model, before.clone(), tokens.labels)["temperature"]
    assert torch.allclose(predict(model, tokens, 4) * temperature, before, atol=1e-5)
    return temperature


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_temperature_divides_the_logits(name, tiny_base, tmp_path) -> None:
    folder = with_tokenizer(tmp_path / "base", tiny_base, encoder(name))
    model = load_base(str(folder), None, ["0", "1"], 100).model
    assert calibrated(model) == pytest.approx(10)  # as unsure as it may


@pytest.mark.parametrize("name", ["xlm-roberta", "bert"])  # in the first the head comes before the encoder
@SCRIPTS
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_16_bits_wherever_the_head_stands(script, name, tiny_base, tiny_data, tmp_path) -> None:
    base = with_tokenizer(tmp_path / "base", tiny_base, encoder(name))
    path = output_of(script, tmp_path)
    more = ["--precision", "bf16", "--max-steps", 3, "--max-length", 100, *ARCHITECTURES[name][2]]
    script.main(flags(base, tiny_data, *more, "--output", path))
    model = speed_up(load_base(str(base), None, ["0", "1"], 100), torch.bfloat16)
    assert autocast(model)._enabled and autocast(model).fast_dtype == torch.bfloat16


def test_the_temperature_never_goes_into_an_adapter(tiny_base, tiny_data, tmp_path) -> None:
    """Where the head comes first, the last layer of as many outputs as labels may be PEFT's A."""
    base = with_tokenizer(tmp_path / "base", tiny_base, encoder("xlm-roberta"))
    more = ["--r", 2, "--lr", 0.05, "--max-length", 100, *QUERY, "--output", tmp_path / "a"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_peft, "calibrate", lambda model, *_: {"temperature": calibrated(model)})
        lora_peft.main(flags(base, tiny_data, *more, "--max-steps", 2))
