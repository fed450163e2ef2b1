"""What the tests share: a tiny DistilBERT, a small data set, and the real ones where the environment names them.

    python -m pytest                 # the default set: no network, under two minutes on two cores
    python -m pytest -m slow         # the long ones
    LORA_TEST_SST2=FOLDER LORA_TEST_BASE=FOLDER python -m pytest    # and what needs real data and a real base

LORA_TEST_SST2 is a folder with GLUE's train.tsv and dev.tsv, LORA_TEST_BASE one that tests/make_standin.py made.
"""

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import of the Hub's libraries: no test asks it
sys.path.insert(0, str(Path(__file__).parent.parent))

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

import lora_peft
import lora_scratch
import playground
from lora_scratch import Tokens, load_checkpoint, predict

GOOD = "a warm and funny film|one of the best of the year|it never bores|great acting and a clever script|I loved it"
BAD = "a cold and dull film|one of the worst of the year|it never ends|poor acting and a lazy script|I hated it"
WORDS = sorted({word for text in (GOOD, BAD) for word in text.lower().replace("|", " ").split()})
SENTENCES = Tokens.from_lists([[2, 7, 8, 9, 3], [2, 5, 3], [2, 20, 11, 6, 14, 9, 30, 3], [2, 3], [2, *range(5, 30), 3]])
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
TINY = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SCRATCH, PEFT = map(str, playground.TRAINED)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; run with -m slow")
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; run with -m gpu")
    if not config.option.markexpr:
        config.option.markexpr = "not slow and not gpu"
    torch.set_num_threads(1)  # tiny models: threads would only wait for one another


@pytest.fixture(autouse=True, scope="session")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test asks the Hub, and none leaves tables in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_scratch, "use_cache_if_offline", lambda: None)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def flags(base: Path, data: Path, *more: object) -> list[str]:
    """The flags of a run of the published recipe in float32, which is quick everywhere, and any others."""
    fixed = ("--model", base, "--dataset", data, "--recipe", "published", "--precision", "fp32")
    return [str(flag) for flag in (*fixed, *more)]


def without_notes(said: str) -> str:
    """What stood on standard error besides notes about the data: small tables give rise to them."""
    return "".join(line for line in said.splitlines(keepends=True) if not line.startswith("note: "))


def with_tokenizer(folder: Path, tiny_base: Path, model: nn.Module) -> Path:
    """Save a tiny model of another architecture with the tiny tokenizer beside it."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_base / name, folder)
    return folder


class Run:
    """A call of lora_scratch.main in this process, and what it left behind."""

    def __init__(self, base: Path, data: Path, output: Path, *more: object):
        self.path, self.flags, said = output, flags(base, data, "--output", output, *more), io.StringIO()
        with contextlib.redirect_stdout(said):
            assert lora_scratch.main(self.flags) is None
        self.said = said.getvalue()
        self.checkpoint = torch.load(output, weights_only=True)
        self.state = self.checkpoint["state_dict"]
        self.record = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))


def logits(path: Path) -> Tensor:
    """What a checkpoint answers to SENTENCES."""
    return predict(load_checkpoint(path)[0].model, SENTENCES, 2)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random DistilBERT (2 layers, width 32) and a tokenizer of our own few words."""
    folder = tmp_path_factory.mktemp("tiny_base")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=128,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=len(vocabulary), dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=128
    )
    DistilBertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.tsv (40 rows) and dev.tsv (10 rows), label 1 for praise."""
    folder = tmp_path_factory.mktemp("tiny_sst2")
    rows = [f"{text}\t{label}\n" for label, texts in ((1, GOOD), (0, BAD)) for text in texts.split("|")]
    (folder / "train.tsv").write_text("sentence\tlabel\n" + "".join(rows * 4), encoding="utf-8")
    (folder / "dev.tsv").write_text("sentence\tlabel\n" + "".join(rows), encoding="utf-8")
    return folder


def real_folder(variable: str) -> Path:
    """The folder that an environment variable names; the test is skipped where it names none."""
    if not os.environ.get(variable):
        pytest.skip(f"needs {variable} (see tests/conftest.py)")
    return Path(os.environ[variable])


@pytest.fixture(scope="session")
def sst2() -> Path:
    """GLUE's SST-2: train.tsv and dev.tsv."""
    return real_folder("LORA_TEST_SST2")


@pytest.fixture(scope="session")
def real_base() -> Path:
    """The MiniLM stand-in in DistilBERT form."""
    return real_folder("LORA_TEST_BASE")


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both adapters where playground.py looks for them; they tell praise from blame."""
    folder = tmp_path_factory.mktemp("playground")
    more = ["--lr", 0.01, "--epochs", 15, "--targets", "all-linear", "--label-names", "negative", "positive"]
    for script, output in ((lora_scratch, SCRATCH), (lora_peft, PEFT)):
        script.main(flags(tiny_base, tiny_data, *more, "--output", folder / output))
    return folder


@pytest.fixture
def here(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder as the current one."""
    monkeypatch.chdir(adapters)
    return adapters


def ask(*arguments: object) -> str:
    """What main prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        playground.main([str(argument) for argument in arguments])
    return output.getvalue()


def ask_json(*arguments: object) -> list[dict]:
    return [json.loads(line) for line in ask("--json", *arguments).removesuffix("\n").split("\n")]
