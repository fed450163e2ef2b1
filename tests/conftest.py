"""What the tests share: a tiny DistilBERT, a small data set, and the real ones where they are.

    python -m pytest    # the default set: no network, two minutes on two cores; -m slow: the long ones
    LORA_TEST_SST2=FOLDER LORA_TEST_BASE=FOLDER python -m pytest    # with real data and a real base

The folders: GLUE's train.tsv and dev.tsv, and a base of tests/bases/make_standin.py.
"""

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import of the Hub's libraries: no test asks it
sys.path.insert(0, str(Path(__file__).parent / "figures"))
sys.path.insert(0, str(Path(__file__).parent / "bases"))
sys.path.insert(0, str(Path(__file__).parent.parent))

import lora_scratch
from lora_scratch import InputError, Tokens, load_checkpoint, predict

import datasets
import numpy
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

import lora_peft

ROOT = Path(__file__).parent.parent
GOOD = "a warm and funny film|one of the best of the year|it never bores"
GOOD += "|great acting and a clever script|I loved it"
BAD = "a cold and dull film|one of the worst of the year|it never ends"
BAD += "|poor acting and a lazy script|I hated it"
WORDS = sorted({word for text in (GOOD, BAD) for word in text.lower().replace("|", " ").split()})
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
TINY = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "intermediate_size": 64}
SCRATCH, PEFT = "model/lora_scratch_distilbert_sst2.pt", "model/lora_peft_distilbert_sst2"
SCRIPTS = pytest.mark.parametrize("script", [lora_scratch, lora_peft], ids=lambda s: s.__name__)


def as_tokens(rows: list[list[int]], labels: list[int] | None = None) -> Tokens:
    """Sentences of these token numbers."""
    ids = [numpy.array(row, dtype=numpy.int32) for row in rows]
    return Tokens(ids, torch.tensor(labels or [0] * len(ids)))


SENTENCES = as_tokens([[2, 7, 8, 9, 3], [2, 5, 3], [2, 20, 11, 6, 14, 9, 30, 3], [2, 3], [*range(2, 30), 3]])


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
    """The flags of a run by the published recipe in float32, and any others."""
    more = ("--recipe", "published", "--precision", "fp32", *more)
    return [str(flag) for flag in ("--model", base, "--dataset", data, *more)]


def refused(call: Callable[[], object], *names: object) -> str:
    """The message of the InputError that `call` raises: one printable line with these names in it."""
    with pytest.raises(InputError) as error:
        call()
    text = str(error.value)
    assert text.isprintable() and all(str(name) in text for name in names), ascii(text)
    return text


def write(path: Path, content: str | bytes) -> Path:
    """Write a file, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def files_of(folder: Path) -> dict[Path, bytes | None]:
    """Every path below a folder, and the contents of the files."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def without_notes(said: str) -> str:
    """Standard error without the notes, which small tables give rise to."""
    return "".join(line for line in said.splitlines(keepends=True) if not line.startswith("note: "))


def with_tokenizer(folder: Path, tiny_base: Path, model: torch.nn.Module) -> Path:
    """Save a tiny model of another architecture with the tiny tokenizer beside it."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_base / name, folder)
    return folder


class Run:
    """A call of lora_scratch.main in this process, and what it left behind."""

    def __init__(self, base: Path, data: Path, output: Path, *more: object):
        self.path, said = output, io.StringIO()
        self.flags = flags(base, data, "--output", output, *more)
        with contextlib.redirect_stdout(said):
            assert lora_scratch.main(self.flags) is None
        self.said = said.getvalue()
        self.checkpoint = torch.load(output, weights_only=True)
        self.state = self.checkpoint["state_dict"]
        self.record = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))


def output_of(script, folder: Path, name: str = "a") -> Path:
    """A result in this folder: a file of lora_scratch.py, a folder of lora_peft.py."""
    return folder / (f"{name}.pt" if script is lora_scratch else name)


def load_result(path: Path, base: str | None = None) -> tuple:
    """The base and the facts of a result in either format."""
    return (lora_peft.load_adapter if path.is_dir() else load_checkpoint)(path, base)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a result in either format."""
    return torch.load(path)["state_dict"] if path.is_file() else load_file(path / lora_peft.TENSORS_FILE)


def logits(path: Path, sentences: Tokens = SENTENCES) -> torch.Tensor:
    """What a result answers to these sentences."""
    return predict(load_result(path)[0].model, sentences, 2)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random DistilBERT (2 layers, width 32) and a tokenizer of our own few words."""
    folder = tmp_path_factory.mktemp("tiny_base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {f"{word[1:-1].lower()}_token": word for word in words[:5]} | {"model_max_length": 128}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128}
    DistilBertModel(DistilBertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.tsv (40 rows) and dev.tsv (10 rows), label 1 for praise."""
    folder = tmp_path_factory.mktemp("tiny_sst2")
    rows = [f"{text}\t{label}\n" for label, texts in ((1, GOOD), (0, BAD)) for text in texts.split("|")]
    for name, times in (("train.tsv", 4), ("dev.tsv", 1)):
        write(folder / name, "sentence\tlabel\n" + "".join(rows * times))
    return folder


def real_folder(variable: str) -> Path:
    """The folder that an environment variable names; without one a test is skipped."""
    return Path(os.environ.get(variable) or pytest.skip(f"needs {variable}: see conftest.py"))


sst2 = pytest.fixture(lambda: real_folder("LORA_TEST_SST2"), scope="session")
real_base = pytest.fixture(lambda: real_folder("LORA_TEST_BASE"), scope="session")


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both adapters where playground.py looks for them; they know praise from blame."""
    folder = tmp_path_factory.mktemp("playground")
    more = ["--lr", "0.01", "--epochs", "20", "--targets", "all-linear"]
    more += ["--label-names", "negative", "positive", "--output"]
    for script, output in ((lora_scratch, SCRATCH), (lora_peft, PEFT)):
        script.main(flags(tiny_base, tiny_data, *more, folder / output))
    return folder


@pytest.fixture
def here(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder as the current one."""
    monkeypatch.chdir(adapters)
    return adapters


def ask(*arguments: object) -> str:
    """The output of playground.py."""
    import playground

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        playground.main([str(argument) for argument in arguments])
    return output.getvalue()


def ask_json(*arguments: object) -> list[dict]:
    """The output of playground.py --json."""
    return [json.loads(line) for line in ask("--json", *arguments).strip("\n").split("\n")]
