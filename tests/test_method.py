"""The method: the layer by hand, where it goes, what it trains, and that PEFT computes the same."""

import copy
import math
from pathlib import Path

import lora_scratch
from lora_scratch import Base, LoRALinear, calibrate, inject_lora, load_base, merge_lora, predict, speed_up

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import SENTENCES, TINY, refused
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, DistilBertConfig

SMALL = TINY | {"max_position_embeddings": 130, "pad_token_id": 0}
LABELS = torch.tensor([1, 0, 1, 0, 1])  # of SENTENCES
SIX = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]  # the linear layers of a block
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
BIAS = pytest.mark.parametrize("bias", [True, False])
PLAIN = {"input_ids": torch.tensor([[2, 7, 8, 3], [2, 20, 11, 3]])}  # without a mask


def padded() -> dict[str, Tensor]:
    """SENTENCES as one batch."""
    ids = pad_sequence([torch.tensor(ids.tolist()) for ids in SENTENCES.ids], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def make_base(folder: Path) -> Base:
    """A base with a random head, its weights so wide that the sentences differ."""
    torch.manual_seed(0)
    base = load_base(str(folder), None, ["negative", "positive"], 128)
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter *= 5 if parameter.dim() == 2 else 1
    return base


def randomise(model: nn.Module) -> None:
    """Move every lora_B away from zero, as training does, in either library."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def small_layer(dtype=torch.float32, bias: bool = True, **options) -> LoRALinear:
    """A layer (24 → 40) of rank 4 with a random lora_B."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(24, 40, bias).to(dtype), 4, 8, **options)
    randomise(layer)
    return layer


def computing_in(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


# --- The layer


@pytest.mark.parametrize("training", [True, False])
@BIAS
@TYPES
def test_a_fresh_adapter_changes_no_bit(dtype, bias, training) -> None:
    torch.manual_seed(0)
    base, x = nn.Linear(24, 40, bias).to(dtype), torch.randn(3, 5, 24)
    layer = LoRALinear(copy.deepcopy(base), 4, 8, 0.5).train(training)
    with computing_in(dtype):
        y, plain = layer(x), base(x)
    assert y.dtype == dtype and torch.equal(y, plain)


@pytest.mark.parametrize("shape", [(2,), (0, 2), (3, 2), (2, 1, 3, 2)])
@BIAS
@pytest.mark.parametrize(("alpha", "rslora", "scaling"), [(8, False, 2), (8, True, 4), (2, False, 0.5)])
def test_the_formula_by_hand(alpha, rslora, scaling, bias, shape) -> None:
    # x = (1, 2): W x = (5, 11, 17), A x = (-1, 2, 1, 2), B A x = (-1, 4, 4)
    layer = LoRALinear(nn.Linear(2, 3, bias), 4, alpha, use_rslora=rslora)
    b = torch.tensor([0.5, -0.5, 1]) if bias else torch.zeros(3)
    with torch.no_grad():
        layer.base.weight.copy_(torch.tensor([[1.0, 2], [3, 4], [5, 6]]))
        layer.lora_A.copy_(torch.tensor([[1.0, -1], [0, 1], [1, 0], [2, 0]]))
        layer.lora_B.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]]))
        if bias:
            layer.base.bias.copy_(b)
    y = layer(torch.tensor([1.0, 2]).expand(shape))
    expected = torch.tensor([5, 11, 17]) + scaling * torch.tensor([-1, 4, 4]) + b
    assert layer.scaling == scaling
    assert y.shape == (*shape[:-1], 3) and torch.equal(y, expected.expand(y.shape))


@TYPES
def test_lora_a_starts_in_one_over_root_in_and_lora_b_at_zero(dtype) -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(400, 30).to(dtype), 9, 16)
    assert layer.lora_A.shape == (9, 400) and layer.lora_B.shape == (30, 9)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    bound = 1 / math.sqrt(400)
    assert -bound <= layer.lora_A.min() < -0.99 * bound
    assert 0.99 * bound < layer.lora_A.max() <= bound
    # uniform: it fills the range evenly
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not layer.lora_B.any()
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}


def test_dropout_falls_on_the_lora_branch_only() -> None:
    layer, x = small_layer(dropout=0.75).train(), torch.randn(2, 5, 24)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    for found, inputs in ((y, F.dropout(x, 0.75)), (layer.eval()(x), x)):
        branch = 2 * inputs @ layer.lora_A.T @ layer.lora_B.T
        assert torch.allclose(found, layer.base(x) + branch, rtol=0, atol=1e-5)
    assert not torch.allclose(y, layer(x), atol=0.1)


@pytest.mark.parametrize("rslora", [True, False])
@BIAS
@TYPES
def test_merged_is_a_plain_float32_layer_that_answers_alike(dtype, bias, rslora) -> None:
    layer, x = small_layer(dtype, bias, use_rslora=rslora), torch.randn(50, 24)
    before = copy.deepcopy(layer.state_dict())
    merged, base = layer.merge(), layer.base
    assert type(merged) is nn.Linear and merged.weight.dtype == torch.float32
    update = layer.lora_B.double() @ layer.lora_A.double() * (4 if rslora else 2)
    exact = F.linear(x.double(), base.weight.double() + update, base.bias.double() if bias else None)
    assert torch.allclose(merged(x).double(), exact, rtol=0, atol=1e-5)
    with computing_in(dtype):
        y = layer(x)
    assert y.dtype == dtype
    assert torch.allclose(merged(x), y.float(), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)
    assert not torch.allclose(merged(x), base(x.to(dtype)).float(), atol=0.5)
    with torch.no_grad():  # a copy of its own: the layer stays as it is
        merged.weight.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


@BIAS
def test_an_adapted_layer_gives_weight_and_bias_of_its_base(bias) -> None:
    layer = small_layer(bias=bias)
    assert layer.weight is layer.base.weight and layer.bias is layer.base.bias
    assert not {"weight", "bias"} & layer.state_dict().keys()
    with pytest.raises(AttributeError, match="in_features"):
        _ = layer.in_features


# --- Where it goes, on the real configuration


@pytest.fixture
def distilbert() -> tuple[nn.Module, list[str]]:
    """DistilBERT as it is published, without memory for its weights, and the names of its head."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(DistilBertConfig())
    names = [name for name, _ in model.named_parameters()]
    return model, [name for name in names if not name.startswith("distilbert.")]


def paths(*names: str) -> set[str]:
    """Of those layers in all six blocks."""
    parts = {name: "attention" if name.endswith("_lin") else "ffn" for name in names}
    block = "distilbert.transformer.layer"
    return {f"{block}.{i}.{part}.{name}" for i in range(6) for name, part in parts.items()}


@pytest.mark.parametrize(("train_head", "trained"), [(True, 739_586), (False, 147_456)])
def test_the_default_wraps_twelve_layers_of_022_percent(distilbert, train_head, trained, capsys) -> None:
    model, head = distilbert
    wrapped = inject_lora(model, head, train_head=train_head)
    found = {path for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert len(wrapped) == 12 and set(wrapped) == found == paths("q_lin", "v_lin")
    lora = {f"{path}.{matrix}" for path in found for matrix in ("lora_A", "lora_B")}
    named = dict(model.named_parameters())
    assert {name for name, p in named.items() if p.requires_grad} == lora | set(head if train_head else [])
    args = lora_scratch.make_parser("", "a.pt").parse_args(["--model", "some/base", "--output", "a.pt"])
    args.data = "data"
    counts = {"lora": 147_456, "head": 592_130, "frozen base": 66_362_880, "trained": trained}
    assert lora_scratch.describe(args, named, head, wrapped, torch.float32)["parameters"] == counts
    shown = capsys.readouterr().out
    for value in ("147,456", "0.22 %", "592,130", "0.88 %", "66,362,880", "some/base", "float32"):
        assert value in shown


@pytest.mark.parametrize("targets", [*([name] for name in SIX), ["all-linear"]])
def test_each_linear_layer_can_be_the_target_and_the_head_none(distilbert, targets) -> None:
    model, head = distilbert
    names = SIX if targets == ["all-linear"] else targets
    assert sorted(lora_scratch.find_targets(model, head, names)) == sorted(paths(*names))
    assert sorted(inject_lora(model, head, targets, r=2)) == sorted(paths(*names))
    assert type(model.pre_classifier) is type(model.classifier) is nn.Linear


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["lin"], "lin"),  # not q_lin, not lin1: names are compared whole
        (["attention.q_lin"], "attention.q_lin"),
        (["Q_LIN"], "Q_LIN"),
        (["q_lin", "sa_layer_norm"], "sa_layer_norm"),
        (["v_lin", "pre_classifier"], "pre_classifier"),
        (["all-linear", "q_lin"], "all-linear"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_refused(distilbert, targets, named) -> None:
    model, head = distilbert
    refused(lambda: inject_lora(model, head, targets), repr(named), "--targets", *SIX)
    every = [name for name, _ in model.named_parameters()]  # which leaves no linear layer
    refused(lambda: inject_lora(model, every, ["all-linear"]), "all-linear")
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_an_architecture_without_defaults_needs_targets() -> None:
    config = transformers.RoFormerConfig(**SMALL)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    head = [name for name, _ in model.named_parameters() if not name.startswith("roformer.")]
    refused(lambda: inject_lora(model, head), "roformer", "--targets", "dense, key, query, value")
    assert len(inject_lora(model, head, ["query", "value"])) == 4


# --- PEFT computes the same

SETTINGS = pytest.mark.parametrize(
    "settings", [(["q_lin", "v_lin"], 8, 16, 0.1, False), (SIX, 3, 5, 0.3, True)]
)  # targets, r, alpha, dropout, rsLoRA


@SETTINGS
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_logits_and_gradients_equal_pefts(tiny_base, settings) -> None:
    theirs, ours = make_base(tiny_base), make_base(tiny_base)
    names = ("target_modules", "r", "lora_alpha", "lora_dropout", "use_rslora")
    config = LoraConfig(
        **dict(zip(names, settings, strict=True)),
        task_type=TaskType.SEQ_CLS,
        modules_to_save=["pre_classifier", "classifier"],
    )
    peft, plain = get_peft_model(theirs.model, config), predict(ours.model, SENTENCES, 5)
    inject_lora(ours.model, ours.head, *settings)
    randomise(peft)
    pairs = {}  # our name: PEFT's parameter and ours
    for name, parameter in ours.model.named_parameters():
        module, _, last = name.rpartition(".")
        if parameter.requires_grad:
            path = f"{name}.default.weight" if "lora_" in name else f"{module}.modules_to_save.default.{last}"
            pairs[name] = (peft.get_parameter(f"base_model.model.{path}"), parameter)
            parameter.data.copy_(pairs[name][0])
    assert {id(p) for p in peft.parameters() if p.requires_grad} == {id(p) for p, _ in pairs.values()}
    logits = [model.eval()(**padded()).logits for model in (peft, ours.model)]
    assert torch.allclose(*logits, rtol=0, atol=1e-6)
    assert not torch.allclose(logits[0], plain, atol=1e-4)
    for model in (peft, ours.model):
        torch.manual_seed(0)  # the same dropout in both
        F.cross_entropy(model.train()(**padded()).logits, LABELS).backward()
    for name, (one, other) in pairs.items():
        assert other.grad.any() and torch.allclose(one.grad, other.grad, rtol=0, atol=1e-6), name


# --- Answers


@SETTINGS
def test_a_merged_model_answers_alike_without_any_adapter(tiny_base, settings) -> None:
    base = make_base(tiny_base)
    names = {name for name, _ in base.model.named_parameters()}
    plain = predict(base.model, SENTENCES, 4)
    inject_lora(base.model, base.head, *settings)
    randomise(base.model)
    adapted = predict(base.model, SENTENCES, 4)
    assert merge_lora(base.model) is base.model
    assert {name for name, _ in base.model.named_parameters()} == names
    assert not any(isinstance(module, LoRALinear) for module in base.model.modules())
    assert torch.allclose(predict(base.model, SENTENCES, 4), adapted, rtol=0, atol=1e-5)
    assert not torch.allclose(adapted, plain, atol=1e-3)


def test_batches_answer_as_sentence_by_sentence_and_so_does_a_quick_model(tiny_base) -> None:
    base = make_base(tiny_base)
    inject_lora(base.model, base.head)
    randomise(base.model)
    model = base.model.eval()
    ones = [model(torch.from_numpy(ids).long()[None]).logits.detach() for ids in SENTENCES.ids]
    assert len({round(one[0, 0].item(), 3) for one in ones}) == len(ones)  # in their own order
    for quick in (False, True):
        model = speed_up(base) if quick else model
        for size in (1, 2, 3, 99):
            assert torch.allclose(predict(model, SENTENCES, size), torch.cat(ones), rtol=0, atol=1e-5)


def test_the_temperature_is_the_likeliest_and_divides_the_logits(tiny_base) -> None:
    model = make_base(tiny_base).model
    tokens = lora_scratch.Tokens(SENTENCES.ids * 8, LABELS.repeat(8))
    logits = predict(model, tokens, 8)
    tokens.labels = logits.argmax(dim=1)
    tokens.labels[:10] = 1 - tokens.labels[:10]  # right on three of four
    with torch.no_grad():
        for parameter in model.classifier.parameters():  # and far too sure
            parameter *= 5 / (logits[:, 0] - logits[:, 1]).abs().mean()
    logits = predict(model, tokens, 8)
    temperature = calibrate(model, logits.clone(), tokens.labels)["temperature"]
    assert 1.1 < temperature < 9.9
    losses = {t: F.cross_entropy(logits / (temperature * t), tokens.labels) for t in (0.9, 1, 1.1)}
    assert min(losses, key=losses.get) == 1
    assert torch.allclose(predict(model, tokens, 8) * temperature, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "frozen"), [(9, False), (20, True)])
def test_too_few_sentences_or_a_frozen_head_leave_the_logits_alone(tiny_base, rows, frozen) -> None:
    model = make_base(tiny_base).model.requires_grad_(not frozen)
    tokens = lora_scratch.Tokens(SENTENCES.ids[:1] * rows, torch.arange(rows) % 2)
    before = predict(model, tokens, 8)
    assert calibrate(model, before.clone(), tokens.labels)["temperature"] == 1.0
    assert torch.equal(predict(model, tokens, 8), before)


# --- Faster, and the same


DISTILBERT = {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
LAST_LAYERS = {
    "sdpa": (DistilBertConfig(**DISTILBERT, attn_implementation="sdpa"), "ffn"),
    "eager": (DistilBertConfig(**DISTILBERT, attn_implementation="eager"), "ffn"),
    "bert": (transformers.BertConfig(**SMALL), "intermediate"),
    "roberta": (transformers.RobertaConfig(**SMALL), "intermediate"),
    "electra": (transformers.ElectraConfig(**SMALL, embedding_size=16), "intermediate"),
    "mpnet": (transformers.MPNetConfig(**SMALL), "intermediate"),
}


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("kind", LAST_LAYERS)
def test_computing_cls_alone_changes_neither_logits_nor_gradients(kind, mask) -> None:
    config, part = LAST_LAYERS[kind]
    torch.manual_seed(0)
    whole = without_dropout(AutoModelForSequenceClassification.from_config(config))
    short = copy.deepcopy(whole)
    speed_up(Base(short, None, [], {}, None))
    tokens, inputs = {}, padded() if mask else PLAIN
    for name, module in short.named_modules():
        if name.endswith(f".{part}"):
            count = lambda _, x, y, name=name: tokens.update({name: y.shape[1]})  # noqa: E731
            module.register_forward_hook(count)
    for training in (False, True):
        logits = [model.train(training)(**inputs).logits for model in (whole, short)]
        assert torch.allclose(*logits, rtol=0, atol=1e-6)
    assert list(tokens.values()) == [inputs["input_ids"].shape[1], 1]
    for logit in logits:
        F.cross_entropy(logit, LABELS[: len(logit)]).backward()
    for (name, one), two in zip(whole.named_parameters(), short.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        assert one.grad is None or torch.allclose(one.grad, two.grad, rtol=0, atol=1e-5), name


def test_the_last_layers_attention_still_has_its_dropout(tiny_base) -> None:
    base = make_base(tiny_base)
    model = without_dropout(speed_up(base))
    model.distilbert.transformer.layer[-1].attention.dropout.p = 0.5
    assert not torch.equal(model.train()(**padded()).logits, model(**padded()).logits)
    assert torch.equal(model.eval()(**padded()).logits, model(**padded()).logits)


OTHERS = [transformers.BertConfig(**SMALL, chunk_size_feed_forward=2), transformers.RoFormerConfig(**SMALL)]


@pytest.mark.parametrize("config", OTHERS)
def test_another_architecture_keeps_its_whole_last_layer(config) -> None:
    model = AutoModelForSequenceClassification.from_config(config).eval()
    logits = model(**PLAIN).logits
    speed_up(Base(model, None, [], {}, None))
    assert torch.equal(model(**PLAIN).logits, logits)


@TYPES
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.99])
def test_cheap_dropout_is_dropout(dtype, rate) -> None:
    layer, threads = lora_scratch.CheapDropout(rate), torch.get_num_threads()
    x = torch.rand(100, 7, 1001, dtype=dtype).add_(1).transpose(0, 1).requires_grad_()
    torch.manual_seed(0)
    y = layer(x)
    kept, close = y != 0, 1e-2 if dtype == torch.bfloat16 else 1e-6
    spread = math.sqrt(rate * (1 - rate) / x.numel())
    assert kept.float().mean().item() == pytest.approx(1 - rate, abs=5 * spread)
    assert torch.allclose(y[kept], x[kept] / (1 - rate), rtol=close)
    y.sum().backward()
    assert torch.allclose(x.grad, kept.to(dtype) / (1 - rate), rtol=close)
    alike = (kept.flatten()[1:] == kept.flatten()[:-1]).float().mean().item()
    assert alike == pytest.approx(rate**2 + (1 - rate) ** 2, abs=0.01)  # neighbours: independent
    torch.set_num_threads(1 if threads > 1 else 2)
    torch.manual_seed(0)
    again, other = layer(x), layer(x)
    torch.set_num_threads(threads)
    assert torch.equal(again, y) and not torch.equal(other, y)
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (5,), (3, 1)])
@pytest.mark.parametrize("rate", [0.0, 1e-6, 0.5, 0.995, 1.0])
def test_cheap_dropout_takes_every_shape_and_rate(shape, rate) -> None:
    x = torch.rand(shape) + 1
    y = lora_scratch.CheapDropout(rate)(x)
    assert y.shape == x.shape and all(value == 0 or value >= 1 for value in y.flatten().tolist())
    assert rate != 0.0 or torch.equal(y, x)
    assert rate != 1.0 or not y.any()
