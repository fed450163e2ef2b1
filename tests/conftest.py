"""What the tests share: a tiny DistilBERT, a small data set, and the real ones where the environment names them.

    python -m pytest                 # the default set: no network, under two minutes on two cores
    python -m pytest -m slow         # the long ones
    LORA_TEST_SST2=FOLDER LORA_TEST_BASE=FOLDER python -m pytest    # and what needs real data and a real base

LORA_TEST_SST2 is a folder with GLUE's train.tsv and dev.tsv, LORA_TEST_BASE one that tests/make_standin.py made.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import of the Hub's libraries: no test asks it
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

GOOD = "a warm and funny film|one of the best of the year|it never bores|great acting and a clever script|I loved it"
BAD = "a cold and dull film|one of the worst of the year|it never ends|poor acting and a lazy script|I hated it"
WORDS = sorted({word for text in (GOOD, BAD) for word in text.lower().replace("|", " ").split()})


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; run with -m slow")
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; run with -m gpu")
    if not config.option.markexpr:
        config.option.markexpr = "not slow and not gpu"
    torch.set_num_threads(1)  # tiny models: threads would only wait for one another


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
