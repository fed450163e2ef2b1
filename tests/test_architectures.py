"""Every architecture that the README names, in both scripts: train, save, reload, convert, export, answer alike."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import GOOD, TINY, flags, with_tokenizer
from torch import nn

import lora_peft
import lora_scratch
import playground
from lora_scratch import Tokens, load_checkpoint, predict

SENTENCES = Tokens.from_lists([[2, 7, 8, 9, 3], [2, 20, 11, 6, 14, 9, 30, 3], [2, *range(5, 30), 3]])
SMALL = TINY | {"max_position_embeddings": 130, "pad_token_id": 0}
FUNNEL = {"vocab_size": 60, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1]}
ARCHITECTURES = {  # name: its configuration, and the targets where it has no default
    "bert": (lambda: transformers.BertConfig(**SMALL), None),
    "roberta": (lambda: transformers.RobertaConfig(**SMALL), None),
    "electra": (lambda: transformers.ElectraConfig(**SMALL, embedding_size=16), None),
    "xlm-roberta": (lambda: transformers.XLMRobertaConfig(**SMALL), ["query", "value"]),
    "camembert": (lambda: transformers.CamembertConfig(**SMALL), ["query", "value"]),
    "mpnet": (lambda: transformers.MPNetConfig(**SMALL), None),
    "longformer": (lambda: transformers.LongformerConfig(**SMALL, attention_window=8), ["query", "value"]),
    "big_bird": (lambda: transformers.BigBirdConfig(**SMALL, attention_type="original_full"), ["query", "value"]),
    "roformer": (lambda: transformers.RoFormerConfig(**SMALL), ["query", "value"]),
    "convbert": (lambda: transformers.ConvBertConfig(**SMALL, embedding_size=32), ["query", "value"]),
    "funnel": (lambda: transformers.FunnelConfig(**FUNNEL, max_position_embeddings=130), ["q_head", "v_head"]),
}
FIRST = ("bert", "roberta", "electra", "mpnet")  # with default targets; the others take their time


@pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_train_save_reload_convert_and_export(name: str, tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    make, targets = ARCHITECTURES[name]
    torch.manual_seed(0)
    base = with_tokenizer(tmp_path / "base", tiny_base, encoder(make))
    more = ["--epochs", "2", "--lr", "0.05", *(["--targets", *targets] if targets else [])]
    more += ["--max-length", "100"]
    lora_scratch.main(flags(base, tiny_data, *more, "--output", tmp_path / "s.pt"))
    lora_peft.main(flags(base, tiny_data, *more, "--output", tmp_path / "p"))
    lora_peft.main(["--import-scratch", str(tmp_path / "s.pt"), "--output", str(tmp_path / "from_s")])
    lora_peft.main(["--export-scratch", str(tmp_path / "p"), "--output", str(tmp_path / "from_p.pt")])
    scratch, peft = tmp_path / "s.pt", tmp_path / "p"
    for one, other in ((scratch, tmp_path / "from_s"), (peft, tmp_path / "from_p.pt")):
        assert torch.allclose(logits(one), logits(other), rtol=0, atol=1e-5)
        assert torch.equal(logits(one), logits(one))  # the head comes from the file, not from chance
        plain = lora_scratch.load_base(str(base), None, ["0", "1"], 100)
        assert not torch.allclose(logits(one), predict(plain.model, SENTENCES, 2), atol=1e-3)
    for path, model in zip((scratch, peft), playground.load_all([scratch, peft], None), strict=True):
        assert torch.allclose(predict(model.base.model, SENTENCES, 2), logits(path), rtol=0, atol=1e-5)
    for path in (scratch, peft):
        playground.main(["--model", str(path), "--export", str(tmp_path / f"export_{path.stem}")])
        run = transformers.pipeline("text-classification", str(tmp_path / f"export_{path.stem}"), device="cpu")
        texts = GOOD.split("|")
        answers = run(texts, truncation=True, top_k=None)
        model = playground.load("", path, None)
        tokens, _ = playground.read_tokens(texts, model)
        for answer, row in zip(answers, playground.probabilities(model, tokens, 2).tolist(), strict=True):
            assert {pair["label"]: pair["score"] for pair in answer} == pytest.approx(
                {"0": row[0], "1": row[1]}, abs=1e-5
            )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_temperature_divides_the_logits_and_models_share_a_base(name: str, tiny_base: Path, tmp_path: Path) -> None:
    make, targets = ARCHITECTURES[name]
    torch.manual_seed(0)
    folder = str(with_tokenizer(tmp_path / "base", tiny_base, encoder(make)))
    base = lora_scratch.load_base(folder, None, ["0", "1"], 100)
    tokens = Tokens.from_lists([[2, 5 + i, 9, 3] for i in range(20)])
    before = predict(base.model, tokens, 4)
    tokens.labels = before.argmin(dim=1)  # all are wrong, so it is to be as unsure as it may
    parser = lora_scratch.make_parser("", "x.pt")
    args = lora_scratch.parse_flags(parser, ["--model", folder, "--dataset", "none"])
    temperature = lora_scratch.calibrate(base.model, tokens, args)
    assert temperature == pytest.approx(10)
    assert torch.allclose(predict(base.model, tokens, 4) * temperature, before, atol=1e-5)
    three = playground.with_head(base, ["a", "b", "c"])
    lora_scratch.inject_lora(three.model, three.head, targets)  # on layers of its own
    assert not any("lora_" in key for key, _ in base.model.named_parameters())
    own = {key.replace(".base.", "."): parameter for key, parameter in three.model.named_parameters()}
    for key, parameter in base.model.named_parameters():
        assert (own[key].data_ptr() == parameter.data_ptr()) == (key not in base.head)
    assert three.model.config.num_labels == 3 and base.model.config.num_labels == 2


def encoder(make: Callable) -> nn.Module:
    config = make()
    if config.model_type == "funnel":  # has two encoders; the classifier takes the one without a decoder
        return transformers.FunnelBaseModel(config)
    return transformers.AutoModel.from_config(config)


def logits(path: Path) -> torch.Tensor:
    load = lora_peft.load_adapter if path.is_dir() else load_checkpoint
    return predict(load(path)[0].model, SENTENCES, 2)
