"""The method in lora_scratch.py: the layer by hand, where it goes, what it trains, and that PEFT computes the same."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SENTENCES, TINY, with_tokenizer
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    MPNetConfig,
    PreTrainedConfig,
    RobertaConfig,
    RobertaModel,
    RoFormerConfig,
)

from lora_scratch import (
    Base,
    CheapDropout,
    InputError,
    LoRALinear,
    OneDNNLinear,
    Tokens,
    TrainingState,
    cast_base,
    cheapen_dropout,
    compute_cls_only,
    count_parameters,
    describe,
    find_targets,
    inject_lora,
    load_base,
    make_parser,
    merge_lora,
    predict,
    set_head_trainable,
    train,
)

LABELS = torch.tensor([1, 0, 1, 0, 1])  # of SENTENCES
SIX = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]  # every linear layer of a DistilBERT block


def padded() -> dict[str, Tensor]:
    """SENTENCES as one batch with padding."""
    rows = [SENTENCES[i].tolist() for i in range(len(SENTENCES))]
    width = max(len(ids) for ids in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def make_base(folder: Path, seed: int = 0) -> Base:
    """A base with its random head; weights five times as wide as random ones, so that the sentences tell apart."""
    torch.manual_seed(seed)
    base = load_base(str(folder), None, ["negative", "positive"], 128)
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter *= 5 if parameter.dim() == 2 else 1
    return base


def randomise(model: nn.Module, seed: int = 1) -> None:
    """Move every lora_B away from zero, as training does, in either library."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def small_layer(dtype: torch.dtype = torch.float32, bias: bool = True, **options) -> LoRALinear:
    """A layer (24 → 40) of rank 4 with a random lora_B."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(24, 40, bias).to(dtype), 4, 8, **options)
    randomise(layer)
    return layer


def computing_in(dtype: torch.dtype) -> torch.autocast:
    """As training and prediction compute with a base that is held in this type."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


# --- The layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_is_the_identity_to_the_bit(dtype: torch.dtype, bias: bool, training: bool) -> None:
    torch.manual_seed(0)
    base = nn.Linear(24, 40, bias).to(dtype)
    layer, x = LoRALinear(copy.deepcopy(base), 4, 8, 0.5).train(training), torch.randn(3, 5, 24)
    with computing_in(dtype):
        y, plain = layer(x), base(x)
    assert y.dtype == dtype and torch.equal(y, plain)


def literal_layer(alpha: float, use_rslora: bool, bias: bool) -> LoRALinear:
    """W (3, 2), A (4, 2) and B (3, 4) small enough to work out by hand."""
    base = nn.Linear(2, 3, bias)
    layer = LoRALinear(base, 4, alpha, use_rslora=use_rslora)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2], [3, 4], [5, 6]]))
        layer.lora_A.copy_(torch.tensor([[1.0, -1], [0, 1], [1, 0], [2, 0]]))
        layer.lora_B.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]]))
        if bias:
            base.bias.copy_(torch.tensor([0.5, -0.5, 1]))
    return layer


@pytest.mark.parametrize("shape", [(1, 2), (3, 2), (2, 3, 2), (2, 1, 3, 2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("alpha", "use_rslora", "scaling"), [(8, False, 2), (8, True, 4), (2, False, 0.5)])
def test_the_formula_by_hand(alpha: float, use_rslora: bool, scaling: float, bias: bool, shape: tuple) -> None:
    # x = (1, 2): W x = (5, 11, 17), A x = (-1, 2, 1, 2), B A x = (-1, 4, 4)
    layer = literal_layer(alpha, use_rslora, bias)
    b = [0.5, -0.5, 1] if bias else [0, 0, 0]
    expected = torch.tensor([5 - scaling + b[0], 11 + 4 * scaling + b[1], 17 + 4 * scaling + b[2]])
    y = layer(torch.tensor([1.0, 2]).expand(shape))
    assert layer.scaling == scaling
    assert y.shape == (*shape[:-1], 3) and torch.equal(y, expected.expand(y.shape))


@pytest.mark.parametrize("shape", [(2,), (0, 2), (2, 0, 2)])
def test_a_single_vector_and_an_empty_batch_pass_as_through_a_plain_layer(shape: tuple) -> None:
    layer = literal_layer(8, False, True)
    x = torch.tensor([1.0, 2]).expand(shape)
    assert layer(x).shape == layer.base(x).shape


def test_the_rows_of_a_batch_do_not_mix() -> None:
    layer = small_layer()
    x = torch.randn(3, 5, 24)
    for i in range(3):
        assert torch.allclose(layer(x)[i], layer(x[i].clone()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_a_starts_in_one_over_root_in_and_lora_b_at_zero(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(400, 30).to(dtype), 9, 16)
    assert layer.lora_A.shape == (9, 400) and layer.lora_B.shape == (30, 9)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert not layer.lora_B.any()
    bound = 1 / math.sqrt(400)
    assert -bound <= layer.lora_A.min() < -0.99 * bound and 0.99 * bound < layer.lora_A.max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)  # uniform fills the range evenly
    assert layer.lora_A.requires_grad and layer.lora_B.requires_grad
    assert not layer.base.weight.requires_grad and not layer.base.bias.requires_grad


def test_dropout_falls_on_the_lora_branch_only() -> None:
    layer = small_layer(dropout=0.75).train()
    x = torch.randn(2, 5, 24)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    branch = F.dropout(x, 0.75) @ layer.lora_A.T @ layer.lora_B.T * 2
    assert torch.allclose(y, layer.base(x) + branch, rtol=0, atol=1e-5)
    assert not torch.equal(y, layer(x))
    layer.eval()
    assert torch.allclose(layer(x), layer.base(x) + x @ layer.lora_A.T @ layer.lora_B.T * 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_rslora", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_is_a_plain_float32_layer_that_answers_the_same(dtype, bias: bool, use_rslora: bool) -> None:
    layer = small_layer(dtype, bias, use_rslora=use_rslora)
    merged, base = layer.merge(), layer.base
    assert type(merged) is nn.Linear and merged.weight.dtype == torch.float32 and (merged.bias is None) is not bias
    scaling = 8 / math.sqrt(4) if use_rslora else 8 / 4
    weight = base.weight.double() + scaling * layer.lora_B.double() @ layer.lora_A.double()
    assert torch.allclose(merged.weight.double(), weight, rtol=0, atol=1e-6)
    x = torch.randn(50, 24)
    exact = F.linear(x.double(), weight, base.bias.double() if bias else None)
    assert torch.allclose(merged(x).double(), exact, rtol=0, atol=1e-5)
    with computing_in(dtype):
        y = layer(x)
    assert y.dtype == dtype
    assert torch.allclose(merged(x), y.float(), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)
    assert not torch.allclose(merged(x), base(x.to(dtype)).float(), atol=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_starts_from_the_pristine_weight_and_leaves_it_alone(dtype: torch.dtype) -> None:
    layer = small_layer(dtype)
    before = copy.deepcopy(layer.state_dict())
    first = layer.merge()
    second = layer.eval().train().merge()
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)
    with torch.no_grad():
        second.weight.zero_(), second.bias.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    assert layer.base.weight.dtype == dtype


# --- Where it goes, on the real configuration


@pytest.fixture
def distilbert() -> tuple[nn.Module, list[str]]:
    """DistilBERT as it is published, without memory for its weights, and the names of its head."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(DistilBertConfig())
    return model, [name for name, _ in model.named_parameters() if not name.startswith("distilbert.")]


def count(model: nn.Module, wanted) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if wanted(name, p))


def test_the_default_wraps_exactly_twelve_layers_and_trains_739586_parameters(distilbert) -> None:
    model, head = distilbert
    assert count(model, lambda *_: True) == 66_955_010
    wrapped = inject_lora(model, head)
    expected = {f"distilbert.transformer.layer.{i}.attention.{name}" for i in range(6) for name in ("q_lin", "v_lin")}
    assert set(wrapped) == expected and len(wrapped) == 12
    assert {path for path, module in model.named_modules() if isinstance(module, LoRALinear)} == expected
    assert count(model, lambda name, _: "lora_" in name) == 147_456
    assert count(model, lambda name, _: name in head) == 592_130
    assert count(model, lambda _, p: p.requires_grad) == 739_586
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(head) | {
        f"{path}.{matrix}" for path in expected for matrix in ("lora_A", "lora_B")
    }


def test_a_frozen_head_leaves_147456_parameters_to_train(distilbert) -> None:
    model, head = distilbert
    inject_lora(model, head)
    set_head_trainable(Base(model, None, head, {}, None), False)
    assert count(model, lambda _, p: p.requires_grad) == 147_456
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_the_table_of_the_start_says_022_percent(distilbert, capsys: pytest.CaptureFixture) -> None:
    model, head = distilbert
    args = make_parser("", "a.pt").parse_args(["--model", "some/base"])
    wrapped = inject_lora(model, head)
    counts = count_parameters(dict(model.named_parameters()), head)
    describe(args, counts, wrapped, torch.float32)
    lora, top, frozen, machine = capsys.readouterr().out.splitlines()
    assert lora.split()[:4] == ["lora", "147,456", "0.22", "%"] and "12 layers (q_lin, v_lin)" in lora
    assert top.split()[:4] == ["head", "592,130", "0.88", "%"] and "trained" in top
    assert "66,362,880" in frozen and "some/base" in frozen
    assert "float32" in machine and torch.__version__ in machine
    assert counts == {"lora": 147_456, "head": 592_130, "frozen base": 66_362_880, "trained": 739_586}


@pytest.mark.parametrize("target", SIX)
def test_each_linear_layer_can_be_the_target(distilbert, target: str) -> None:
    model, head = distilbert
    wrapped = inject_lora(model, head, [target], r=2)
    part = "attention" if target.endswith("_lin") else "ffn"
    assert sorted(wrapped) == [f"distilbert.transformer.layer.{i}.{part}.{target}" for i in range(6)]
    sizes = {"lin1": 768 + 3072, "lin2": 3072 + 768}.get(target, 768 + 768)
    assert count(model, lambda name, _: "lora_" in name) == 6 * 2 * sizes


def test_all_linear_means_every_layer_but_the_head(distilbert) -> None:
    model, head = distilbert
    wrapped = inject_lora(model, head, ["all-linear"])
    assert len(wrapped) == 36 and {path.rpartition(".")[2] for path in wrapped} == set(SIX)
    assert sorted(wrapped) == sorted(find_targets(distilbert_again(), head, SIX))
    assert type(model.pre_classifier) is type(model.classifier) is nn.Linear


def distilbert_again() -> nn.Module:
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(DistilBertConfig())


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["lin"], "lin"),  # not q_lin, not lin1: names are compared whole
        (["q_lin", "query"], "query"),
        (["attention.q_lin"], "attention.q_lin"),
        (["Q_LIN"], "Q_LIN"),
        (["sa_layer_norm"], "sa_layer_norm"),
        (["q_lin", "dropout"], "dropout"),
        (["word_embeddings"], "word_embeddings"),
        (["classifier"], "classifier"),
        (["v_lin", "pre_classifier"], "pre_classifier"),
        (["all-linear", "q_lin"], "all-linear"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_an_error_naming_it(distilbert, targets: list[str], named: str) -> None:
    model, head = distilbert
    with pytest.raises(InputError) as error:
        inject_lora(model, head, targets)
    choice = "choose with --targets among k_lin, lin1, lin2, out_lin, q_lin, v_lin"
    assert str(error.value) == f"distilbert: {named!r} is no linear layer outside the head; {choice}"
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_a_target_is_no_part_of_a_name(distilbert) -> None:
    model, head = distilbert
    model.distilbert.lin = nn.Linear(3, 3)
    assert inject_lora(model, head, ["lin"]) == ["distilbert.lin"]


def test_an_unknown_architecture_needs_targets_and_lists_its_linear_layers() -> None:
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(RoFormerConfig(**TINY))
    head = [name for name, _ in model.named_parameters() if not name.startswith("roformer.")]
    with pytest.raises(
        InputError, match=r"^roformer: no default targets; .* --targets among dense, key, query, value$"
    ):
        inject_lora(model, head)
    assert len(inject_lora(model, head, ["query", "value"])) == 4


# --- What it trains


@pytest.mark.parametrize("freeze_head", [True, False])
@pytest.mark.parametrize("targets", [None, ["all-linear"]])
def test_gradients_arrive_exactly_where_they_belong(tiny_base: Path, targets, freeze_head: bool) -> None:
    base = make_base(tiny_base)
    wrapped = inject_lora(base.model, base.head, targets)
    set_head_trainable(base, not freeze_head)
    randomise(base.model)
    F.cross_entropy(base.model.train()(**padded()).logits, LABELS).backward()
    expected = {f"{path}.{matrix}" for path in wrapped for matrix in ("lora_A", "lora_B")}
    expected |= set() if freeze_head else set(base.head)
    parameters = dict(base.model.named_parameters())
    assert {name for name, p in parameters.items() if p.grad is not None} == expected
    assert all(parameters[name].grad.any() for name in expected)


@pytest.mark.parametrize("freeze_head", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_steps_leave_the_base_alone_and_move_everything_else(
    tiny_base: Path, tmp_path: Path, dtype: torch.dtype, freeze_head: bool
) -> None:
    base = make_base(tiny_base)
    inject_lora(base.model, base.head)
    set_head_trainable(base, not freeze_head)
    cast_base(base, dtype)
    before = copy.deepcopy(base.model.state_dict())
    flags = ["--max-steps", "3", "--batch-size", "4", "--lr", "0.01", "--warmup", "0.06"]
    flags += ["--weight-decay", "0"]  # moved by gradients alone
    args = make_parser("", str(tmp_path / "a.pt")).parse_args(flags)
    sentences = Tokens(SENTENCES.ids, SENTENCES.lengths, LABELS)
    state = TrainingState(args, base.model, {}, dtype)
    train(base.model, sentences, sentences, args, state)
    assert len(state.losses) == 3 and state.losses.all()
    for name, tensor in base.model.state_dict().items():
        trained = "lora_" in name or (name in base.head and not freeze_head)
        assert torch.equal(tensor, before[name]) is not trained, name
        assert tensor.dtype == (torch.float32 if "lora_" in name or name in base.head else dtype)


# --- PEFT computes the same


def both_models(tiny_base: Path, targets: list[str], r: int, alpha: float, dropout: float, use_rslora: bool):
    """The same adapter twice, with PEFT's initial tensors: plain PEFT, and ours."""
    theirs, ours = make_base(tiny_base), make_base(tiny_base)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=use_rslora,
        target_modules=targets,
        modules_to_save=["pre_classifier", "classifier"],
    )
    peft = get_peft_model(theirs.model, config)
    wrapped = inject_lora(ours.model, ours.head, targets, r, alpha, dropout, use_rslora)
    pairs = {}  # our name: both parameters
    for path in wrapped:
        for matrix in ("lora_A", "lora_B"):
            name = f"base_model.model.{path}.{matrix}.default.weight"
            pairs[f"{path}.{matrix}"] = (peft.get_parameter(name), ours.model.get_parameter(f"{path}.{matrix}"))
    for name in ours.head:
        module, _, kind = name.rpartition(".")
        name_there = f"base_model.model.{module}.modules_to_save.default.{kind}"
        pairs[name] = (peft.get_parameter(name_there), ours.model.get_parameter(name))
    assert {id(p) for p in peft.parameters() if p.requires_grad} == {id(p) for p, _ in pairs.values()}
    copy_across(pairs)
    return peft, ours.model, pairs


@torch.no_grad()
def copy_across(pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    for theirs, ours in pairs.values():
        assert theirs.shape == ours.shape
        ours.copy_(theirs)


PEFT_WARNING = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SETTINGS = [(["q_lin", "v_lin"], 8, 16, 0.1, False), (SIX, 3, 5, 0.3, True)]  # targets, r, alpha, dropout, rsLoRA


@PEFT_WARNING
@pytest.mark.parametrize("settings", SETTINGS)
def test_logits_and_gradients_equal_pefts(tiny_base: Path, settings: tuple) -> None:
    peft, ours, pairs = both_models(tiny_base, *settings)
    randomise(peft)
    copy_across(pairs)
    plain = make_base(tiny_base).model.eval()(**padded()).logits
    logits = [model.eval()(**padded()).logits for model in (peft, ours)]
    assert torch.allclose(*logits, rtol=0, atol=1e-6) and not torch.allclose(logits[0], plain, atol=1e-4)
    for model in (peft, ours):
        torch.manual_seed(0)  # the same dropout in both
        F.cross_entropy(model.train()(**padded()).logits, LABELS).backward()
    for name, (theirs, mine) in pairs.items():
        assert mine.grad.any() and torch.allclose(theirs.grad, mine.grad, rtol=0, atol=1e-6), name


@PEFT_WARNING
@pytest.mark.parametrize("settings", SETTINGS)
def test_ten_steps_with_dropout_lose_what_pefts_lose(tiny_base: Path, settings: tuple) -> None:
    peft, ours, pairs = both_models(tiny_base, *settings)
    losses = []
    for model in (peft, ours):
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.01)
        losses.append([])
        for _ in range(10):
            loss = F.cross_entropy(model.train()(**padded()).logits, LABELS)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert len(set(losses[0])) == 10 and losses[0] == pytest.approx(losses[1], rel=0, abs=1e-6)
    for name, (theirs, mine) in pairs.items():
        assert torch.allclose(theirs, mine, rtol=0, atol=1e-4), name


# --- The base model around it


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("shape", [(5, 24), (4, 7, 24), (24,), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_onednn_multiplies_as_float64_does(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias)
    exact = copy.deepcopy(layer).double()
    layer.requires_grad_(False)
    layer.__class__ = OneDNNLinear
    x = torch.randn(shape).requires_grad_()
    y = x.detach().double().requires_grad_()
    weights = torch.randn(*shape[:-1], 40)
    (layer(x).div_(3) * weights).sum().backward()  # in place, as Longformer does it
    (exact(y).div_(3) * weights.double()).sum().backward()
    assert torch.allclose(layer(x).double(), exact(y), rtol=0, atol=1e-5)
    assert torch.allclose(x.grad.double(), y.grad, rtol=0, atol=1e-5)
    copied = copy.deepcopy(layer)
    copied.weight += 1  # as merge does: no copy may answer with the old weight
    assert torch.allclose(copied(x), F.linear(x, copied.weight, copied.bias), rtol=0, atol=1e-4)
    layer.requires_grad_(True)(x).sum().backward()  # a trained weight gets its gradient
    assert layer.weight.grad is not None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [True, False])
def test_computing_cls_alone_changes_neither_logits_nor_gradients(
    tiny_base: Path, implementation: str, mask: bool
) -> None:
    torch.manual_seed(0)
    whole = AutoModelForSequenceClassification.from_pretrained(tiny_base, attn_implementation=implementation)
    for module in whole.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    short = copy.deepcopy(whole)
    compute_cls_only(short)
    inputs = padded() if mask else {"input_ids": torch.tensor([[2, 7, 8, 3], [2, 20, 11, 3]])}
    tokens = []
    short.distilbert.transformer.layer[-1].ffn.register_forward_hook(lambda _, x, y: tokens.append(y.shape[1]))
    for training in (False, True):
        logits = [model.train(training)(**inputs).logits for model in (whole, short)]
        assert torch.allclose(*logits, rtol=0, atol=1e-6)
    assert tokens == [1, 1]
    for logit in logits:
        F.cross_entropy(logit, LABELS[: len(logit)]).backward()
    for (name, one), two in zip(whole.named_parameters(), short.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=0, atol=1e-5), name
        assert one.grad.any() or name.endswith("k_lin.bias"), name  # softmax does not see a bias of the keys


def test_the_last_layers_attention_still_has_its_dropout(tiny_base: Path) -> None:
    model = make_base(tiny_base).model
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.distilbert.transformer.layer[-1].attention.dropout.p = 0.5
    assert not torch.equal(model.train()(**padded()).logits, model(**padded()).logits)
    assert torch.equal(model.eval()(**padded()).logits, model(**padded()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.99])
def test_cheap_dropout_is_dropout(dtype: torch.dtype, rate: float) -> None:
    model = nn.Sequential(nn.Dropout(rate), nn.Dropout(rate))
    cheapen_dropout(model)
    layer = model[0]
    assert type(layer) is CheapDropout and layer.p == rate
    x = torch.rand(100, 7, 1001, dtype=dtype).add_(1).transpose(0, 1).requires_grad_()
    torch.manual_seed(0)
    y = layer(x)
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(1 - rate, abs=5 * math.sqrt(rate * (1 - rate) / x.numel()))
    assert torch.allclose(y[kept], x[kept] / (1 - rate), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    y.sum().backward()
    assert torch.allclose(x.grad, kept.to(dtype) / (1 - rate), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    neighbours = (kept.flatten()[1:] == kept.flatten()[:-1]).float().mean().item()
    assert neighbours == pytest.approx(rate**2 + (1 - rate) ** 2, abs=0.01)  # independent
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    torch.manual_seed(0)
    again, other = layer(x), layer(x)
    torch.set_num_threads(threads)
    assert torch.equal(again, y) and not torch.equal(other, y)
    assert layer.eval()(x) is x or torch.equal(layer(x), x)


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (5,), (3, 1)])
def test_cheap_dropout_takes_every_shape_and_rate(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape) + 1
    for rate in (0.0, 1e-6, 0.5, 0.995, 1.0):
        model = nn.Sequential(nn.Dropout(rate))
        cheapen_dropout(model)
        y = model(x)
        assert y.shape == x.shape and all(value == 0 or value >= 1 for value in y.flatten().tolist())
        assert rate != 0.0 or torch.equal(y, x)
        assert rate != 1.0 or not y.any()


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**TINY),
        RobertaConfig(**TINY, pad_token_id=0, max_position_embeddings=130),
        ElectraConfig(**TINY, embedding_size=16),
        MPNetConfig(**TINY, pad_token_id=0, max_position_embeddings=130),
    ],
)
def test_other_architectures_compute_cls_alone_after_attention(config: PreTrainedConfig) -> None:
    torch.manual_seed(0)
    whole = AutoModelForSequenceClassification.from_config(config)
    for module in whole.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    short = copy.deepcopy(whole)
    compute_cls_only(short)
    short = copy.deepcopy(short)  # as the playground does
    tokens = {}
    for number, layer in enumerate(short.base_model.encoder.layer):
        layer.intermediate.register_forward_hook(lambda _, x, y, number=number: tokens.update({number: y.shape[1]}))
    for training in (False, True):
        logits = [model.train(training)(**padded()).logits for model in (whole, short)]
        assert torch.allclose(*logits, rtol=0, atol=1e-6)
    *others, last = tokens.values()
    assert last == 1 and others and all(count > 1 for count in others)
    for logit in logits:
        F.cross_entropy(logit, LABELS[: len(logit)]).backward()
    for (name, one), two in zip(whole.named_parameters(), short.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        assert one.grad is None or torch.allclose(one.grad, two.grad, rtol=0, atol=1e-5), name


@pytest.mark.parametrize("config", [BertConfig(**TINY, chunk_size_feed_forward=2), RoFormerConfig(**TINY)])
def test_another_architecture_keeps_its_whole_last_layer(config: PreTrainedConfig) -> None:
    model = AutoModelForSequenceClassification.from_config(config).eval()
    inputs = {"input_ids": torch.tensor([[2, 7, 8, 3], [2, 20, 11, 3]])}
    logits = model(**inputs).logits
    compute_cls_only(model)
    assert torch.equal(model(**inputs).logits, logits)
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("make", "head"),
    [
        (
            lambda: BertModel(BertConfig(**TINY)),
            {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"},
        ),
        (
            lambda: RobertaModel(RobertaConfig(**TINY, pad_token_id=0, max_position_embeddings=130)),
            {f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")},
        ),
        (
            lambda: ElectraModel(ElectraConfig(**TINY, embedding_size=16)),
            {f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")},
        ),
    ],
)
def test_bert_roberta_and_electra_go_the_same_way(make, head: set[str], tiny_base: Path, tmp_path: Path) -> None:
    base = make_base(with_tokenizer(tmp_path / "other", tiny_base, make()))
    assert set(base.head) == head
    plain = predict(base.model, SENTENCES, 4)
    wrapped = inject_lora(base.model, base.head)
    assert len(wrapped) == 4 and {path.rpartition(".")[2] for path in wrapped} == {"query", "value"}
    assert torch.equal(predict(base.model, SENTENCES, 4), plain)
    trained = {name for name, p in base.model.named_parameters() if p.requires_grad}
    assert trained == head | {f"{path}.{matrix}" for path in wrapped for matrix in ("lora_A", "lora_B")}
    randomise(base.model)
    assert not torch.allclose(predict(base.model, SENTENCES, 4), plain, atol=1e-4)


def test_the_fingerprint_is_of_the_base_and_not_of_the_random_head(tiny_base: Path, tmp_path: Path) -> None:
    one, two = make_base(tiny_base, 0), make_base(tiny_base, 1)
    assert one.head == two.head and {"pre_classifier.weight", "classifier.bias"} <= set(one.head)
    assert not torch.equal(one.model.classifier.weight, two.model.classifier.weight)
    assert one.identity == two.identity and len(one.identity["fingerprint"]) == 64
    model = DistilBertModel.from_pretrained(tiny_base)
    with torch.no_grad():
        model.embeddings.LayerNorm.bias[3] += 1e-3
    other = make_base(with_tokenizer(tmp_path / "a", tiny_base, model))
    assert other.identity["fingerprint"] != one.identity["fingerprint"]


def test_a_base_saved_in_half_precision_is_loaded_in_float32(tiny_base: Path, tmp_path: Path) -> None:
    half = DistilBertModel.from_pretrained(tiny_base, dtype=torch.float16)
    base = load_base(str(with_tokenizer(tmp_path / "half", tiny_base, half)), None, ["negative", "positive"], 128)
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    for name, tensor in half.state_dict().items():
        assert torch.equal(base.model.get_parameter(f"distilbert.{name}"), tensor.float())


def test_the_base_can_be_cast_and_what_is_trained_stays_float32(tiny_base: Path) -> None:
    base = make_base(tiny_base)
    inject_lora(base.model, base.head)
    cast_base(base, torch.bfloat16)
    for name, parameter in base.model.named_parameters():
        kept = "lora_" in name or name in base.head
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_merged_model_answers_the_same_without_any_adapter(tiny_base: Path, settings: tuple) -> None:
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
