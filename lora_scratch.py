"""LoRA written by hand: fine-tune DistilBERT on SST-2 through 147,456 parameters, 0.22 % of the model, and its head.

A pretrained linear layer y = W x + b stays frozen and learns a low-rank correction beside it:

    y = W x + b + (alpha / r) · B A x        A (r, in), B (out, r), r much smaller than in and out

B starts at zero, so training starts from exactly the pretrained model. `LoRALinear` below is the whole
method; the rest of the file reads sentences, batches them by length, trains and saves a few megabytes.

    python lora_scratch.py --demo                        # a minute on a small model and sentences of our own, no Hub
    python lora_scratch.py                               # DistilBERT on SST-2, r 8 on q_lin and v_lin
    python lora_scratch.py --freeze-head                 # the published recipe: 147,456 trained parameters
    python lora_scratch.py --dataset reviews.csv --text-column review --label-column stars
    python lora_scratch.py --max-steps 100               # a short run, to see that everything works

On a stand-in for DistilBERT of a third its size, which is no evidence about DistilBERT (README, Results), SST-2 with
the default settings takes 48 to 50 minutes on a core and is right in 87.35 ± 1.26 % (three seeds, last epoch).

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685, sections 4.1 and 4.2.
"""

import argparse
import contextlib
import copy
import csv
import functools
import glob
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup
from transformers.models.distilbert.modeling_distilbert import TransformerBlock

# --- The method -------------------------------------------------------------------------------------


class InputError(ValueError):
    """A mistake in what the user gave us: one line that names the value and the remedy."""


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained low-rank update (LoRA, section 4.1, equation 3).

    x (..., in) → W x + b + scaling · B A dropout(x) (..., out), with scaling = alpha / r, or alpha / √r for
    rsLoRA (arXiv:2312.03732). `lora_A` (r, in) starts Kaiming-uniform, in ±1/√in; `lora_B` (out, r) starts at
    zero. Both are float32 whatever the type of W. Raises InputError, a ValueError, for r < 1.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0, use_rslora: bool = False):
        super().__init__()
        if r < 1:
            raise InputError(f"r must be at least 1, got {r}")
        self.base = base.requires_grad_(False)
        self.scaling = alpha / math.sqrt(r) if use_rslora else alpha / r
        self.dropout = nn.Dropout(dropout)
        like_base = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **like_base))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **like_base))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, in): one row per token, so that one addmm_ can follow
        y = self.base(rows)  # (N, out)
        low_rank = F.linear(self.dropout(rows), self.lora_A.to(rows.dtype))  # (N, r): A x
        y.addmm_(low_rank.to(y.dtype), self.lora_B.t().to(y.dtype), alpha=self.scaling)  # adds scaling · B A x in place
        return y.view(*x.shape[:-1], y.shape[-1])

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain linear layer that answers the same: W + scaling · B A, computed and kept in float32."""
        merged = copy.deepcopy(self.base).float()
        merged.weight += self.scaling * self.lora_B @ self.lora_A
        return merged


DEFAULT_TARGETS = {  # the query and value projections of each architecture, as in section 4.2 of the paper
    "distilbert": ["q_lin", "v_lin"],
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "electra": ["query", "value"],
}


def find_targets(model: nn.Module, head: list[str], targets: list[str] | None) -> list[str]:
    """Paths of the linear layers whose own name is one of `targets`, outside the head.

    Names are compared whole ("lin" is not "q_lin"); ["all-linear"] means every linear layer, None the default of
    the architecture. `head` names the head's parameters. Raises InputError for a target that matches nothing, is
    no linear layer or belongs to the head.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    linear = [path for path, m in modules.items() if isinstance(m, nn.Linear) and f"{path}.weight" not in head]
    choice = ", ".join(sorted({leaf(path) for path in linear}))
    if targets is None and model.config.model_type not in DEFAULT_TARGETS:
        raise InputError(f"{model.config.model_type!r} has no default targets: choose with --targets among {choice}")
    targets = DEFAULT_TARGETS[model.config.model_type] if targets is None else targets
    if targets == ["all-linear"]:
        return linear
    for target in targets:
        found = [path for path in modules if leaf(path) == target]
        if not set(found) & set(linear):
            kind = type(modules[found[0]]).__name__ if found else ""
            why = "matches nothing" if not found else "is the head" if kind == "Linear" else f"is a {kind}, not linear"
            raise InputError(f"target {target!r} {why}; choose with --targets among {choice}")
    return [path for path in linear if leaf(path) in targets]


def inject_lora(
    model: nn.Module,
    head: list[str],
    targets: list[str] | None = None,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.1,
    use_rslora: bool = False,
    freeze_head: bool = False,
) -> list[str]:
    """Wrap the target layers in LoRALinear and freeze all else but the head; return the wrapped paths."""
    wrapped = find_targets(model, head, targets)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head and not freeze_head)
    for path in wrapped:
        model.set_submodule(path, LoRALinear(model.get_submodule(path), r, alpha, dropout, use_rslora))
    return wrapped


def leaf(path: str) -> str:
    """The last name of a module path: q_lin of distilbert.transformer.layer.0.attention.q_lin."""
    return path.rpartition(".")[2]


def merge_lora(model: nn.Module) -> nn.Module:
    """Replace every LoRALinear of the model by its merged plain layer; returns the same model."""
    for path, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(path, module.merge())
    return model


# --- The base model ---------------------------------------------------------------------------------


class Base(NamedTuple):
    model: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    head: list[str]  # parameter names of the classification head, which no base model brings along
    fingerprint: str  # SHA-256 of everything else, in float32
    revision: str | None  # the Hub's commit, None for a local folder


def load_base(name: str, revision: str | None, label_names: list[str], max_length: int) -> Base:
    """The pretrained encoder in float32 with a new random head for these labels, and its tokenizer.

    The head is what lies outside the base model, what loading had to initialise, and a pooler where there is
    one: a pooler can ship untrained. Whatever is random here has to be trained, or at least saved.
    """
    transformers.logging.set_verbosity_error()  # the loading report tells what is new: that is `head` below
    transformers.logging.disable_progress_bar()
    if not Path(name).is_dir():
        use_cache_if_offline()
    source = {"revision": revision, "trust_remote_code": False}
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, **source, **labels, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # whatever is wrong with its files: each of the libraries raises its own
        why = f"cannot load the base model {name!r} ({first_line(error)})"
        why += "; name a local folder with --model (in playground.py --base)"
        raise InputError(why if Path(name).is_dir() else f"{why}; {WITHOUT_HUB}") from error
    head, digest = [], hashlib.sha256()
    for key, parameter in sorted(model.named_parameters()):
        if not key.startswith(f"{model.base_model_prefix}.") or key in report["missing_keys"] or ".pooler." in key:
            head.append(key)
        else:
            digest.update(f"{key} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().contiguous().numpy())
    rows, size = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if size > rows or tokenizer.pad_token_id is None:
        raise InputError(f"{name}: a tokenizer of {size} entries does not fit {rows} embeddings; use the model's own")
    places = [m for path, m in model.named_modules() if leaf(path) == "position_embeddings"]
    reserved = sum(m.padding_idx + 1 for m in places if m.padding_idx is not None)  # RoBERTa counts from there
    limit = min(getattr(model.config, "max_position_embeddings", math.inf) - reserved, tokenizer.model_max_length)
    if not 3 <= max_length <= limit:
        raise InputError(f"--max-length {max_length} is not between 3 and {limit}, the most that {name} can read")
    return Base(model, tokenizer, head, digest.hexdigest(), getattr(model.config, "_commit_hash", None))


@functools.cache
def use_cache_if_offline() -> None:
    """Ask the Hub once, for 5 seconds: its libraries would retry for half a minute before they say no."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    answers = []

    def ask() -> None:
        try:
            urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=5).close()
        except Exception as error:  # no network, no such name, a captive portal, a misspelt address
            if not isinstance(error, urllib.error.HTTPError):  # which is an answer all the same
                return
        answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)  # a name look-up obeys no timeout: do not wait for it
    thread.start()
    thread.join(5)
    if not answers:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def cast_base(base: Base, dtype: torch.dtype) -> None:
    """Hold the base in the compute type, the head in float32: autocast would cast the base at every step."""
    for name, parameter in base.model.named_parameters():
        if name not in base.head and "lora_" not in name:
            parameter.data = parameter.data.to(dtype)


def last_layer_for_cls_only(model: nn.Module) -> None:
    """Let DistilBERT's last layer compute [CLS] alone, all that its head reads: 14 % less work.

    The logits change by rounding only (under 1e-6): keys and values still come from every token. Does nothing to a
    model whose last layer is of another kind.
    """
    layers = [module for module in model.modules() if type(module) is TransformerBlock]
    if not layers or model.config._attn_implementation not in ("sdpa", "eager"):
        return
    block, attention = layers[-1], layers[-1].attention

    def forward(hidden: Tensor, attention_mask: Tensor | None = None, **_) -> Tensor:
        cls = hidden[:, :1]  # (batch, 1, dim)
        query, key, value = (
            project(x).unflatten(-1, (attention.n_heads, -1)).transpose(1, 2)  # (batch, heads, tokens, head size)
            for project, x in ((attention.q_lin, cls), (attention.k_lin, hidden), (attention.v_lin, hidden))
        )
        mask = None if attention_mask is None else attention_mask[:, :, :1]
        dropout = attention.dropout.p if block.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        cls = block.sa_layer_norm(attention.out_lin(mixed.transpose(1, 2).flatten(2)) + cls)
        return block.output_layer_norm(block.ffn(cls) + cls)

    block.forward = forward


# --- The data ---------------------------------------------------------------------------------------

GLUE = ("nyu-mll/glue", "sst2", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c")  # Hub name, configuration, revision
DISTILBERT = ("distilbert/distilbert-base-uncased", "12040accade4e8a0f71eabdb258fecc2e7e948be")
LOCAL_MODEL, LOCAL_DATA = "model/distilbert-base-uncased", "dataset/glue_sst2_local"  # taken where they exist
DEMO = {"model": "model/minilm-l6-distilbert", "dataset": "dataset/demo", "lr": 2e-3, "epochs": 4}  # of --demo
WITHOUT_HUB = "without the Hub: README, Set-up; or ./setup.sh --demo, then python lora_scratch.py --demo"
SPLITS = ("train", "validation", "dev")  # the file names of a folder; dev is GLUE's name for validation
FORMATS = {".tsv": "csv", ".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class Sentences(NamedTuple):
    text: list[str]
    label: list[int]  # index into the label names
    input_ids: list[list[int]]  # token numbers, without padding


def read_file(path: Path) -> datasets.Dataset:
    """One table; every field of a TSV or CSV file stays the text that it is."""
    kind, options = FORMATS[path.suffix.lower()], {}
    try:
        if kind == "csv":  # no guessing: "null" and "NA" are words, "007" is text
            tsv = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {}  # as in GLUE
            with open(path, encoding="utf-8-sig", newline="") as file:
                columns = next(filter(None, csv.reader(file, **tsv)), [])
            options = {"na_filter": False, "encoding": "utf-8-sig", "converters": dict.fromkeys(columns, str), **tsv}
        with tempfile.TemporaryDirectory() as cache:  # a kept cache would not notice every change of the file
            options |= {"cache_dir": cache, "keep_in_memory": True}
            table = datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train", **options)
    except Exception as error:  # each parser raises its own
        raise InputError(f"{path}: cannot be read ({first_line(error.__cause__ or error)}); mend the file") from error
    if "__index_level_0__" in table.column_names:  # pandas took a first column without a name for row names
        raise InputError(f"{path}: its rows have more fields than its header has names; mend the file")
    return table


def read_dataset(args: argparse.Namespace) -> dict[str, datasets.Dataset]:
    """The splits of a folder, a file or a Hub data set, under their own names."""
    path = Path(args.dataset)
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()  # by save_to_disk
    if path.is_dir() and not saved:
        files = [f for f in sorted(path.iterdir()) if f.stem in SPLITS and f.suffix.lower() in FORMATS]
        if len({f.stem for f in files}) < len(files):
            raise InputError(f"{path}: two files for one split ({', '.join(f.name for f in files)}); move one away")
        return {f.stem: read_file(f) for f in files}
    if path.is_file() and path.suffix.lower() in FORMATS:
        return {"train": read_file(path)}
    if not saved and (path.exists() or path.suffix.lower() in FORMATS or args.dataset.startswith((".", "/", "~"))):
        what = "not read here" if path.is_file() else "no such file"
        raise InputError(f"--dataset {path}: {what}; give a folder or a file that ends in {', '.join(FORMATS)}")
    try:
        if saved:
            data = datasets.load_from_disk(path)
        else:
            use_cache_if_offline()
            revision = GLUE[2] if args.dataset == GLUE[0] else None
            data = datasets.load_dataset(args.dataset, args.dataset_config, revision=revision)
    except Exception as error:  # of the network, of the Hub's files, of a damaged folder
        why = f"cannot load the data set {args.dataset!r} ({first_line(error)})"
        raise InputError(f"{why}; name a local one with --dataset{'' if saved else '; ' + WITHOUT_HUB}") from error
    return data if isinstance(data, datasets.DatasetDict) else {"train": data}


def read_rows(args: argparse.Namespace, name: str, split: datasets.Dataset) -> tuple[list[str], list[str]]:
    """The texts and labels of one split, checked row by row; blank sentences are skipped and counted."""
    for column in (args.text_column, args.label_column):
        if column not in split.column_names:
            have = ", ".join(split.column_names)
            raise InputError(f"{args.dataset}: no column {column!r} but {have}; see --text-column and --label-column")
    rows = list(zip(split[args.text_column], split[args.label_column], strict=True))
    for i, (text, label) in enumerate(rows, start=1):
        if not isinstance(text, str):
            raise InputError(f"{args.dataset}: {name} row {i}: {args.text_column!r} is not text but {text!r}")
        if not isinstance(label, (int, str)) or label == "":
            raise InputError(f"{args.dataset}: {name} row {i}: {label!r} is no label; give whole numbers or names")
    kept = [(text, str(label)) for text, label in rows if text.strip()]
    if not kept:
        raise InputError(f"{args.dataset}: the {name} split is empty; it needs at least one sentence")
    if len(kept) < len(rows):
        print(f"{args.dataset}: skipped {len(rows) - len(kept)} blank sentences of {len(rows)} in the {name} split")
    texts, labels = zip(*kept, strict=True)
    return list(texts), list(labels)


def load_data(args: argparse.Namespace) -> tuple[Sentences, Sentences, list[str]]:
    """Training and validation sentences, not yet tokenised, and the names of their labels."""
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # a parser's error is told once, as InputError
    if not on_terminal():
        datasets.disable_progress_bars()
    data = read_dataset(args)
    if "train" not in data:
        raise InputError(f"{args.dataset}: no training split (train.tsv, .csv, .jsonl or .parquet)")
    texts, labels = read_rows(args, "training", data["train"])
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(args.seed)).tolist()
    validation = data.get("validation", data.get("dev"))
    if validation is not None:
        eval_texts, eval_labels = read_rows(args, "validation", validation)
    else:
        rows = {}  # of each label, in random order
        for i in order:
            rows.setdefault(labels[i], []).append(i)
        held = {i for own in rows.values() for i in own[: math.ceil(len(own) / 10)] if len(own) > 1} or {order[0]}
        order = [i for i in order if i not in held]
        print(f"{args.dataset} has no validation split: a tenth of each label, {len(held)} rows, is held out by seed")
        eval_texts, eval_labels = [texts[i] for i in sorted(held)], [labels[i] for i in sorted(held)]
    order = order[: args.train_samples] if args.train_samples else sorted(order)
    if not order:
        raise InputError(f"{args.dataset}: one sentence is too few to hold a tenth out; give a validation split")

    # Labels are whole numbers, where all of them are, or else text; the names come from the data or the user.
    whole = all(re.fullmatch(r"-?\d{1,18}", label) for label in labels + eval_labels)
    names = getattr(data["train"].features[args.label_column], "names", None)
    known = [str(i) for i in range(len(names))] if names else sorted(sorted(set(labels)), key=int if whole else str)
    if len(known) < 2:
        raise InputError(f"{args.dataset}: the only label is {labels[0]!r}; a classifier needs at least two")
    index = {label: i for i, label in enumerate(known)}
    unknown = [label for label in labels + eval_labels if label not in index]
    if unknown:
        training = ", ".join(known)
        raise InputError(f"{args.dataset}: label {unknown[0]!r} of a row is not one of the training labels {training}")
    if args.label_names and not whole:
        raise InputError(f"--label-names is for integer labels; {args.dataset} has names: {', '.join(known)}")
    if args.label_names and not len(set(args.label_names)) == len(args.label_names) == len(known):
        given = ", ".join(args.label_names)
        raise InputError(f"--label-names: {given} are not {len(known)} names for the labels {', '.join(known)}")
    names = args.label_names or names or (["negative", "positive"] if known == ["0", "1"] and is_sst2(args) else known)
    train_set = Sentences([texts[i] for i in order], [index[labels[i]] for i in order], [])
    return train_set, Sentences(eval_texts, [index[label] for label in eval_labels], []), names


def is_sst2(args: argparse.Namespace) -> bool:
    """Whether the data set calls itself SST-2, whose label 1 is positive."""
    return re.search(r"sst[-_]?2", f"{args.dataset} {args.dataset_config}".lower()) is not None


def tokenize(sentences: Sentences, tokenizer: Callable, max_length: int) -> Sentences:
    """The same sentences with their token numbers, cut at `max_length`: one batched call."""
    encoded = tokenizer(sentences.text, truncation=True, max_length=max_length, return_attention_mask=False)
    return sentences._replace(input_ids=encoded["input_ids"])


def make_batches(lengths: list[int], batch_size: int, generator: torch.Generator | None = None) -> list[list[int]]:
    """Turn sentence lengths into batches of indices, each index once, with little padding.

    With a generator (training): shuffle, sort by length only inside windows of 50 batches, shuffle the batches.
    Random batches of 16 SST-2 phrases compute 2.6 times the real tokens, these 1.04 times. Without one
    (evaluation): longest first, so that a batch too large for the memory fails at once.
    """
    count = len(lengths)
    order = range(count) if generator is None else torch.randperm(count, generator=generator).tolist()
    window = max(count, 1) if generator is None else 50 * batch_size
    batches = []
    for start in range(0, count, window):
        bucket = sorted(order[start : start + window], key=lambda i: -lengths[i])
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    if generator is not None:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
    return batches


def collate(input_ids: list[list[int]], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Pad to the longest of the batch: input_ids and attention_mask, both (batch, tokens)."""
    width = max(len(ids) for ids in input_ids)
    padded = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids in input_ids])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in input_ids])
    return {"input_ids": padded.to(device), "attention_mask": mask.to(device)}


# --- The loop ---------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """--device as a device; auto takes CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA GPU here; use --device cpu")
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of the frozen weights and of the arithmetic; LoRA, head, loss and optimiser stay float32."""
    if name == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16 needs a CUDA GPU; use fp32 or bf16 on the CPU")
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":  # bfloat16 since Ampere, before that float16
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):  # many CPUs know bfloat16 by name only: time it
        layer = {"linear": nn.Linear(768, 768, dtype=dtype), "x": torch.ones(128, 768, dtype=dtype)}
        timer = Timer("linear(x)", globals=layer, num_threads=torch.get_num_threads())
        seconds[dtype] = min(timer.timeit(1).mean for _ in range(3))
    return torch.bfloat16 if seconds[torch.bfloat16] * 1.3 < seconds[torch.float32] else torch.float32


def train(
    model: nn.Module, pad_id: int, train_set: Sentences, eval_set: Sentences, args: argparse.Namespace
) -> tuple[list[dict], list[float]]:
    """Train what requires a gradient; one record for each epoch, and the loss of every step.

    A training state is written every --save-every steps and after each epoch; --resume goes on from it as if
    nothing had happened, to the bit in one process on the CPU. Under torchrun every process computes its share of
    each batch.
    """
    device, dtype, (rank, ranks) = next(model.parameters()).device, args.dtype, rank_and_size()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(trained.values())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    steps_per_epoch = math.ceil(len(train_set.label) / args.batch_size)
    total_steps = args.max_steps or args.epochs * steps_per_epoch
    scheduler = get_linear_schedule_with_warmup(optimizer, round(args.warmup * total_steps), total_steps)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    lengths, labels = [len(ids) for ids in train_set.input_ids], torch.tensor(train_set.label)
    state = TrainingState(args, train_set, trained, {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler})
    epochs, losses, spent = state.load(device) if args.resume else ([], [], 0.0)  # spent: seconds of an epoch begun
    if len(losses) == total_steps:
        print("this run is finished: there is nothing left to train")
    if rank > 0:
        torch.manual_seed(args.seed + rank)  # another dropout in every process
    scaler.scale(torch.zeros((), device=device))  # a process whose first share is empty needs its start all the same
    silent = rank > 0 or not on_terminal()
    progress = tqdm(total=total_steps, initial=len(losses), unit="step", disable=silent, dynamic_ncols=True)

    with catch_signals() as caught:
        for epoch in range(len(epochs), math.ceil(total_steps / steps_per_epoch)):
            model.train()
            generator = torch.Generator().manual_seed(1000 * args.seed + epoch)  # another order in every epoch
            batches = make_batches(lengths, args.batch_size, generator)[: total_steps - epoch * steps_per_epoch]
            steps_done = len(losses) - epoch * steps_per_epoch  # what a resumed run has behind it in this epoch
            start, seen = time.perf_counter() - spent, sum(len(batch) for batch in batches[:steps_done])
            for batch in batches[steps_done:]:
                share, loss = batch[rank::ranks], torch.zeros((), device=device)
                if share:  # of a short last batch a process may get nothing
                    inputs = collate([train_set.input_ids[i] for i in share], pad_id, device)
                    with name_what_did_not_fit(inputs):
                        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                            logits = model(**inputs).logits
                        loss = F.cross_entropy(logits.float(), labels[share].to(device)) * (len(share) / len(batch))
                        scaler.scale(loss).backward()
                if ranks > 1:
                    loss = sum_over_ranks(loss, parameters)
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                scheduler.step()

                losses.append(loss.detach())
                seen += len(batch)
                step, end_of_epoch = len(losses), len(losses) == epoch * steps_per_epoch + len(batches)
                save = not end_of_epoch and (caught or step % args.save_every == 0)  # there after the evaluation
                if save or end_of_epoch or step % args.log_every == 0:  # rarely: it waits for the GPU
                    lr, weights = scheduler.get_last_lr()[0], sum(p.detach().sum() for p in parameters)
                    recent = torch.stack([*losses[-args.log_every :], weights]).tolist()
                    finite, _ = [math.isfinite(value) for value in recent], recent.pop()
                    if not all(finite):  # what was saved before is sound
                        bad = step - len(recent) + 1 + finite.index(False)
                        raise InputError(f"step {bad}: the loss is not finite, near learning rate {lr:.1e}; lower --lr")
                    rate, loss = seen / (time.perf_counter() - start), sum(recent) / len(recent)
                    progress.set_postfix_str(f"loss {loss:.4f}, lr {lr:.1e}, {rate:.0f} sentences/s")
                    progress.update(step - progress.n)
                    if progress.disable and step % (10 * args.log_every) == 0:
                        told = f"loss {loss:.4f}  lr {lr:.1e}  {rate:.0f} sentences/s"
                        print(f"step {step}/{total_steps}  {told}", flush=True)
                if save:
                    state.save(epochs, losses, time.perf_counter() - start, caught)
            seconds, spent = time.perf_counter() - start, 0.0
            train_loss = torch.stack(losses[-len(batches) :]).mean().item()
            eval_loss, confusion = evaluate(model, pad_id, eval_set, args)
            correct = int(confusion.trace())
            accuracy = 100 * correct / len(eval_set.label)
            epochs.append({"epoch": epoch + 1, "steps": len(batches), "train_loss": train_loss, "eval_loss": eval_loss})
            epochs[-1] |= {"accuracy": accuracy, "correct": correct, "total": len(eval_set.label)}
            epochs[-1] |= {"seconds": seconds, "sentences_per_second": seen / seconds}
            progress.clear()
            print(
                f"epoch {epoch + 1}: training loss {train_loss:.4f}, validation loss {eval_loss:.4f}, accuracy "
                f"{accuracy:.2f} % ({correct}/{len(eval_set.label)}), {seconds:.1f} s",
                flush=True,
            )
            state.save(epochs, losses, spent, caught)
    progress.close()
    if ranks > 1:
        dist.destroy_process_group()
        if rank > 0:
            sys.exit()  # the first process saves, alone
    return epochs, [loss.item() for loss in losses]


class TrainingState:
    """What --resume needs, in a file beside the output: a few megabytes, and whole at any moment.

    Adapter and head, optimiser, schedule, scaler, random generators, the position, and the settings, which have to
    be the same again. The order of the sentences needs no place: seed and epoch decide it.
    """

    def __init__(self, args: argparse.Namespace, train_set: Sentences, trained: dict[str, Tensor], parts: dict):
        self.path, self.trained, self.parts = args.output.with_name(f"{args.output.name}.state"), trained, parts
        free = {"resume", "save_every", "log_every", "output", "dtype", "demo", "report"}  # these change no result
        self.settings = {key: str(value) for key, value in vars(args).items() if key not in free}
        self.settings["precision"] = str(args.dtype)  # the one in use: auto may choose another today
        data = str((train_set.input_ids, train_set.label)).encode()
        self.settings["training data, as SHA-256"] = hashlib.sha256(data).hexdigest()

    def save(self, epochs: list[dict], losses: list[Tensor], seconds: float, caught: list[int]) -> None:
        """Write the state; where a signal was caught, say how to go on, and exit with 128 + its number."""
        if rank_and_size()[0] == 0:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state |= {"format": FORMAT, "settings": self.settings, "trained": self.trained, "epochs": epochs}
            state |= {"losses": torch.stack(losses).cpu(), "seconds": seconds}
            state["generators"] = [torch.get_rng_state()]  # of the CPU, and of this process's GPU
            if torch.cuda.is_initialized():
                state["generators"].append(torch.cuda.get_rng_state())
            write_whole(self.path, lambda temporary: torch.save(state, temporary))
        if caught:
            print(f"stopped after step {len(losses)}; the same command with --resume goes on from there", flush=True)
            sys.exit(128 + caught[0])

    def load(self, device: torch.device) -> tuple[list[dict], list[Tensor], float]:
        """Put everything back; returns the epochs' records, the losses and the seconds of the epoch under way."""
        if not self.path.exists():
            print(f"no training state {self.path} yet: starting from the beginning")
            return [], [], 0.0
        state = read_tensors(self.path)
        check_facts(self.path, state, dict.fromkeys(["settings", "trained", *self.parts], dict))
        for key in sorted(self.settings.keys() | state["settings"].keys()):
            then, now = state["settings"].get(key), self.settings.get(key)
            if then != now:
                raise InputError(f"--resume: {key} was {then} and is now {now}; use the same, or leave out --resume")
        check_tensors(self.path, state["trained"], {name: p.cpu() for name, p in self.trained.items()})
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["trained"][name])
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["generators"][0])
        if device.type == "cuda" and len(state["generators"]) > 1:
            torch.cuda.set_rng_state(state["generators"][1])
        print(f"resumed after step {len(state['losses'])}")
        return state["epochs"], list(state["losses"].to(device)), state["seconds"]


@contextlib.contextmanager
def name_what_did_not_fit(inputs: dict[str, Tensor]) -> Iterator[None]:
    """Tell the shape of the batch where a GPU's memory ran out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        shape = "{} sentences of {} tokens".format(*inputs["input_ids"].shape)
        raise InputError(f"out of memory at {shape}; lower --batch-size, --eval-batch-size or --max-length") from error


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM instead of dying in the middle of a step; the same again ends the process at once."""
    caught = []

    def catch(number: int, _: object) -> None:
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    former = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def on_terminal() -> bool:
    """Whether a progress bar can be redrawn in place: a notebook looks like a terminal, but keeps every line of it."""
    return sys.stderr.isatty() and not {"JPY_PARENT_PID", "COLAB_RELEASE_TAG"} & os.environ.keys()


def rank_and_size() -> tuple[int, int]:
    """This process's number among those that torchrun started, and how many they are: 0 of 1 without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    """Add up loss and gradients over the processes: each has weighted its own by its share of the batch."""
    parts = [loss.detach().reshape(1)]
    parts += [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    flat = torch.cat(parts)  # a few megabytes: adapter and head only
    dist.all_reduce(flat)
    loss, *gradients = flat.split([part.numel() for part in parts])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.view_as(parameter)
    return loss[0].clone()  # a view would keep all of `flat` alive


@torch.inference_mode()
def predict(model: nn.Module, pad_id: int, input_ids: list[list[int]], batch_size: int, dtype: torch.dtype) -> Tensor:
    """Logits (sentences, labels) in float32, in the order given, batched by length inside."""
    model.eval()
    device = next(model.parameters()).device
    logits = torch.zeros(len(input_ids), model.config.num_labels)
    rank, ranks = rank_and_size()
    for batch in make_batches([len(ids) for ids in input_ids], batch_size)[rank::ranks]:
        inputs = collate([input_ids[i] for i in batch], pad_id, device)
        with name_what_did_not_fit(inputs), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits[batch] = model(**inputs).logits.float().cpu()
    if ranks > 1:
        logits = logits.to(device)  # nccl adds up on the GPU, gloo on the CPU
        dist.all_reduce(logits)  # every sentence was answered by one process, the others left zeros
    return logits.cpu()


def evaluate(model: nn.Module, pad_id: int, sentences: Sentences, args: argparse.Namespace) -> tuple[float, Tensor]:
    """Mean cross-entropy (nats), and how often each label (row) was answered with each (column): (labels, labels)."""
    logits = predict(model, pad_id, sentences.input_ids, args.eval_batch_size, args.dtype)
    labels, count = torch.tensor(sentences.label), logits.shape[1]
    pairs = torch.bincount(labels * count + logits.argmax(dim=1), minlength=count * count)
    return F.cross_entropy(logits, labels).item(), pairs.view(count, count)


# --- Files ------------------------------------------------------------------------------------------

FORMAT = 1  # of the checkpoint; a reader refuses a number that it does not know
FACTS = {"base": str, "revision": str | None, "fingerprint": str, "label_names": list, "max_length": int}
LORA_FACTS = {"targets": list, "r": int, "alpha": int | float, "dropout": int | float, "use_rslora": bool}


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it into place: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError is torch.save's word for a full disk
        raise InputError(f"cannot write {path} ({first_line(error)}); what stood there is whole") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder beside `path`, then move its files into place one by one, each whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        path.mkdir(parents=True, exist_ok=True)
        for file in temporary.iterdir():
            os.replace(file, path / file.name)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"cannot write {path} ({first_line(error)}); what stood there is whole") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def trained_tensors(state: dict[str, Tensor], head: list[str]) -> dict[str, Tensor]:
    """What a checkpoint keeps of a model: <module path>.lora_A and .lora_B, and the head under its own names."""
    return {k: v.cpu().clone() for k, v in state.items() if k.endswith((".lora_A", ".lora_B")) or k in head}


def save_checkpoint(path: Path, state: dict[str, Tensor], facts: dict, base: Base) -> None:
    """Write adapter and head, with what rebuilding needs as plain Python values; the tokenizer in a folder beside."""
    write_whole(path, lambda temporary: torch.save({"format": FORMAT, "state_dict": state, **facts}, temporary))
    write_folder(path.with_suffix(""), base.tokenizer.save_pretrained)


def make_facts(args: argparse.Namespace, base: Base, label_names: list[str], wrapped: list[str]) -> dict:
    """What has to be known to rebuild the model, beside its tensors."""
    facts = {"base": args.model, "revision": base.revision, "fingerprint": base.fingerprint, "label_names": label_names}
    facts |= {key: getattr(args, key) for key in ("max_length", "r", "alpha", "dropout", "use_rslora")}
    return facts | {"targets": sorted({leaf(path) for path in wrapped})}


def load_checkpoint(path: str | Path, base_name: str | None = None) -> tuple[Base, dict]:
    """Rebuild the trained model in float32, on the CPU, from a checkpoint and its base model.

    `base_name` says where the base lies when the checkpoint's own name for it does not. Raises InputError for a
    file that is no checkpoint, for tensors missing, left over, misshapen or not finite, and for another base.
    """
    checkpoint = read_tensors(path)
    check_facts(path, checkpoint, FACTS | LORA_FACTS | {"state_dict": dict})
    base, state = load_trained_base(path, checkpoint, base_name), checkpoint["state_dict"]
    try:
        inject_lora(base.model, base.head, **{key: checkpoint[key] for key in LORA_FACTS})
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: its settings do not fit its base ({first_line(error)})") from error
    check_tensors(path, state, trained_tensors(base.model.state_dict(), base.head))
    base.model.load_state_dict(state, strict=False)  # strict in effect: both key lists have just been compared
    last_layer_for_cls_only(base.model)
    base.model.eval()
    return base, checkpoint


def read_tensors(path: str | Path) -> object:
    """What a file of torch.save holds, if it is tensors and plain values: code in it is refused, never run."""
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load does not look at the checksums
                raise ValueError(damaged)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; python lora_scratch.py makes one") from error
    except Exception as error:  # whatever bytes these are: torch raises half a dozen types, all mean the same
        raise InputError(f"{path}: not a file of lora_scratch.py, or a damaged one ({type(error).__name__})") from error


def load_trained_base(path: str | Path, facts: dict, base_name: str | None) -> Base:
    """The base model that the facts of a checkpoint name, or `base_name`: refused unless it is the same base."""
    check_facts(path, facts, FACTS)
    name = base_name or facts["base"]
    base = load_base(name, None if base_name else facts["revision"], facts["label_names"], facts["max_length"])
    if base.fingerprint != facts["fingerprint"]:
        theirs, ours = facts["fingerprint"][:12], base.fingerprint[:12]
        raise InputError(f"{path} was trained on {facts['base']!r} ({theirs}), but {name!r} is another base ({ours})")
    return base


def check_facts(path: str | Path, facts: object, kinds: dict) -> None:
    """Raise InputError unless `facts` is of our format and has a value of the right type for each name in `kinds`."""
    found = facts if isinstance(facts, dict) else {}
    if isinstance(found.get("format"), int) and found["format"] != FORMAT:
        raise InputError(f"{path}: format {found['format']}, but this version reads {FORMAT}; update the project")
    for key, kind in ({"format": int} | kinds).items():
        value = found.get(key, ...)
        if not isinstance(value, kind) or (kind is list and not all(isinstance(name, str) for name in value)):
            raise InputError(f"{path}: not made by this project, or damaged: its {key!r} is missing or no such value")


def check_tensors(path: str | Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise InputError unless both have the same keys, types and shapes and every number is finite."""
    for key in sorted(found.keys() ^ expected.keys(), key=str):
        raise InputError(f"{path}: tensor {key!r} is {'missing' if key in expected else 'not expected'}")
    for key, tensor in found.items():
        like = expected[key]
        if (
            not isinstance(tensor, Tensor)
            or tensor.is_meta
            or (tensor.dtype, tensor.layout) != (like.dtype, like.layout)
        ):
            raise InputError(f"{path}: {key!r} is no plain tensor of {like.dtype}")
        if tensor.shape != like.shape or not tensor.isfinite().all():
            raise InputError(f"{path}: tensor {key!r} {tuple(tensor.shape)} has the wrong shape, NaN or infinity in it")


# --- The command line -------------------------------------------------------------------------------


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number from low to high."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


def make_parser(description: str, output: str) -> argparse.ArgumentParser:
    """The flags of both training scripts."""
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [options], see --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("model and data").add_argument
    add("--demo", action="store_true", help=f"without the Hub: {', '.join(f'{k} {v}' for k, v in DEMO.items())}")
    add("--model", help=f"base model: folder or Hub name (default: {LOCAL_MODEL} if there, else {DISTILBERT[0]})")
    add("--revision", help="the Hub's revision of the base model (default: a pinned one for the default model)")
    add("--dataset", help=f"file, folder or Hub name (default: {LOCAL_DATA} if there, else {GLUE[0]})")
    add("--dataset-config", help=f"configuration of a Hub data set (default for {GLUE[0]}: {GLUE[1]})")
    add("--text-column", default="sentence", help="column with the text (default: %(default)s)")
    add("--label-column", default="label", help="column with the label, number or text (default: %(default)s)")
    add("--label-names", nargs="+", metavar="NAME", help="names for integer labels, in their order")
    add("--train-samples", type=number(int, 1), metavar="N", help="train on N random sentences (default: all)")
    add("--max-length", type=number(int, 3), default=128, help="tokens; longer text is cut (default: %(default)s)")
    add = parser.add_argument_group("LoRA").add_argument
    add("--r", type=number(int, 1), default=8, help="rank of the update (default: %(default)s)")
    add("--alpha", type=number(float, 0), default=16.0, help="scaling = alpha / r (default: %(default)g)")
    add("--dropout", type=number(float, 0, 0.99), default=0.1, help="on the LoRA branch (default: %(default)s)")
    add("--targets", nargs="+", metavar="NAME", help="linear layers, or all-linear (default: query and value)")
    add("--use-rslora", action="store_true", help="scaling = alpha / sqrt(r) instead")
    add("--freeze-head", action="store_true", help="leave the head as random as it starts: the published recipe")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1), default=3, help="times through the data (default: %(default)s)")
    add("--max-steps", type=number(int, 1), metavar="N", help="stop after N steps instead (default: off)")
    add("--batch-size", type=number(int, 1), default=16, help="sentences a step (default: %(default)s)")
    add("--eval-batch-size", type=number(int, 1), default=32, help="sentences, evaluation (default: %(default)s)")
    add("--lr", type=number(float, 0), default=2e-4, help="peak learning rate of AdamW (default: %(default)s)")
    add("--warmup", type=number(float, 0, 1), default=0.06, help="share of the steps, then decay (%(default)s)")
    add("--weight-decay", type=number(float, 0), default=0.01, help="of AdamW (default: %(default)s)")
    add("--max-grad-norm", type=number(float, 0), default=1.0, help="gradient clipping, 0: none (default: %(default)s)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="of all that is random (default: %(default)s)")
    add = parser.add_argument_group("machine and output").add_argument
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is one")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="auto: the clearly fastest")
    add("--threads", type=number(int, 1), metavar="N", help="CPU threads (default: PyTorch's choice)")
    add("--log-every", type=number(int, 1), default=20, metavar="N", help="steps a report, 10 N off a terminal (20)")
    add("--save-every", type=number(int, 1), default=500, metavar="N", help="steps a training state (%(default)s)")
    add("--resume", action="store_true", help="go on from the training state beside --output")
    add("--report", action="store_true", help="figures of each label at the end, also for data called SST-2")
    add("--output", type=Path, default=Path(output), help="where the result goes (default: %(default)s)")
    return parser


def parse_flags(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The flags; --demo changes the defaults of others, which can still be given."""
    args = parser.parse_args(argv)
    if args.demo:
        output = parser.get_default("output")
        parser.set_defaults(**DEMO, output=output.with_name(output.name.replace("distilbert_sst2", "demo")))
        args = parser.parse_args(argv)
        if args.model == DEMO["model"] and not Path(args.model).is_dir():
            raise InputError(f"--demo: no base model in {args.model} yet; ./setup.sh --demo makes it")
    return args


def start(args: argparse.Namespace) -> None:
    """Fill in what depends on this machine, look at where the output goes, and seed: before anything random."""
    if args.model is None:
        here = Path(LOCAL_MODEL).is_dir()
        args.model = LOCAL_MODEL if here else DISTILBERT[0]
    if args.model == DISTILBERT[0]:
        args.revision = args.revision or DISTILBERT[1]
    if args.dataset is None:
        args.dataset = LOCAL_DATA if Path(LOCAL_DATA).is_dir() else GLUE[0]
    if args.dataset == GLUE[0]:
        args.dataset_config = args.dataset_config or GLUE[1]
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device = choose_device(args.device)
    args.dtype = choose_precision(args.precision, args.device)
    ours = [args.output, *(beside(args.output, ending) for ending in (".json", ""))] if args.output.name else [Path()]
    if {path.absolute() for path in ours} & {Path(name).absolute() for name in (".", args.dataset, args.model)}:
        raise InputError(f"--output {args.output}: model, data or the current folder stand there; name another place")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {args.output}: cannot make its folder ({error.strerror}); name another") from error
    if not os.access(args.output.parent, os.W_OK):  # better now than after the training
        raise InputError(f"--output {args.output}: no right to write there; name another file")
    if "RANK" in os.environ:  # torchrun started several processes
        if args.device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
        dtypes = [args.dtype]
        dist.broadcast_object_list(dtypes)  # auto may have timed differently in each process
        args.dtype = dtypes[0]
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - one process speaks for all
    torch.manual_seed(args.seed)


def describe(args: argparse.Namespace, parameters: dict[str, Tensor], head: list[str], wrapped: list[str]) -> dict:
    """Print the table of the start; return the beginning of the run's record, in plain Python values."""
    counts = {"lora": 0, "head": 0, "frozen base": 0}
    for name, parameter in parameters.items():
        part = "lora" if "lora_" in name else "head" if name in head else "frozen base"
        counts[part] += parameter.numel()
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    leaves = ", ".join(sorted({leaf(path) for path in wrapped}))
    notes = {"lora": f"r {args.r}, alpha {args.alpha:g}, on {len(wrapped)} layers ({leaves})"}
    notes |= {"head": "frozen at its random start" if args.freeze_head else "trained", "frozen base": args.model}
    for part, count in counts.items():
        print(f"{part:12}{count:>12,} {100 * count / sum(counts.values()):6.2f} %  {notes[part]}")
    versions = {"python": platform.python_version()}
    versions |= {m.__name__: str(m.__version__) for m in (torch, transformers, datasets)}
    hardware = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if args.device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    precision = str(args.dtype).removeprefix("torch.")
    print(f"{'machine':12}{hardware}, {precision}; " + ", ".join(f"{k} {v}" for k, v in versions.items()), flush=True)
    settings = {k: v if isinstance(v, (int, float, str, list, type(None))) else str(v) for k, v in vars(args).items()}
    record = {"settings": settings, "versions": versions, "hardware": hardware, "precision": precision}
    return record | {"parameters": counts | {"trained": trained}}


def finish(
    args: argparse.Namespace, record: dict, losses: list[float], confusion: Tensor, label_names: list[str], size: int
) -> None:
    """Write the run's record beside its result, and say what came out."""
    every, correct, total = args.log_every, int(confusion.trace()), int(confusion.sum())
    blocks = [losses[i : i + every] for i in range(0, len(losses), every)]
    curve = {"every": every, "loss": [round(sum(block) / len(block), 5) for block in blocks]}
    result = {"accuracy": 100 * correct / total, "correct": correct, "total": total, "bytes": size}
    result |= {"label_names": label_names, "confusion": confusion.tolist()}
    text = json.dumps(record | {"loss_curve": curve, "result": result}, indent=1) + "\n"
    write_whole(beside(args.output, ".json"), lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"saved {args.output} ({size / 1e6:.1f} MB); reloaded, it answers {correct}/{total} right")
    if args.report or not is_sst2(args):
        print(label_report(confusion, label_names))
    print(f"accuracy {result['accuracy']:.2f} %")


def label_report(confusion: Tensor, label_names: list[str]) -> str:
    """Precision, recall and F1 of each label in percent, - where undefined; the confusion matrix of up to 10 labels."""
    names = [" ".join(name.split())[:20] for name in label_names]
    matrix = len(names) <= 10
    rows = [["label", "precision", "recall", "F1", "sentences", *(["answered as:", *names] if matrix else [])]]
    for i, (name, counts) in enumerate(zip(names, confusion.tolist(), strict=True)):
        right, given, real = counts[i], int(confusion[:, i].sum()), sum(counts)
        shares = ((right, given), (right, real), (2 * right, given + real))
        shares = [f"{100 * n / of:.1f}" if of else "-" for n, of in shares]
        rows.append([name, *shares, str(real), *(["", *map(str, counts)] if matrix else [])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def tell_how_to_ask(output: Path, texts: list[str]) -> None:
    """Print the command that asks the result about the shortest text, Python and folder as they were typed."""
    command = [sys.orig_argv[0], os.path.join(os.path.dirname(sys.argv[0]), "playground.py"), "--model", str(output)]
    text = min(texts, key=lambda text: (text.startswith("-"), len(text)))[:100]
    print(f"ask it: {shlex.join([*command, ' '.join(text.split())])}")


def beside(output: Path, ending: str) -> Path:
    """What stands beside an output, a .pt file or a folder, with its stem: run.json of run.pt, lr0.1.json of lr0.1."""
    return output.with_name(output.name.removesuffix(".pt") + ending)


def first_line(error: BaseException) -> str:
    """What an exception says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def run(main: Callable[[], None]) -> None:
    """Call `main`; a mistake of the user's becomes one line on standard error and exit code 2."""
    sys.stdout.reconfigure(errors="replace")  # for a terminal or a pipe that does not know every character
    try:
        main()
    except KeyboardInterrupt:  # before or after the training: nothing is to be saved
        sys.exit(130)
    except InputError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(make_parser(__doc__, "model/lora_scratch_distilbert_sst2.pt"), argv)
    start(args)
    if args.output.suffix != ".pt" or args.output.is_dir():
        raise InputError(f"--output {args.output}: give a file name that ends in .pt")
    train_set, eval_set, label_names = load_data(args)
    base = load_base(args.model, args.revision, label_names, args.max_length)
    model, pad_id = base.model, base.tokenizer.pad_token_id
    train_set, eval_set = (tokenize(s, base.tokenizer, args.max_length) for s in (train_set, eval_set))

    lora = {key: getattr(args, key) for key in ("r", "alpha", "dropout", "use_rslora", "freeze_head")}
    wrapped = inject_lora(model, base.head, args.targets, **lora)
    args.fingerprint = base.fingerprint  # a resumed run has to have the same base
    last_layer_for_cls_only(model)
    cast_base(base, args.dtype)
    model.to(args.device)
    record = describe(args, dict(model.named_parameters()), base.head, wrapped)

    record["epochs"], losses = train(model, pad_id, train_set, eval_set, args)

    facts = make_facts(args, base, label_names, wrapped)
    save_checkpoint(args.output, trained_tensors(model.state_dict(), base.head), facts | {"record": record}, base)
    reloaded, _ = load_checkpoint(args.output)
    cast_base(reloaded, args.dtype)
    _, confusion = evaluate(reloaded.model.to(args.device), pad_id, eval_set, args)
    finish(args, record, losses, confusion, label_names, args.output.stat().st_size)
    tell_how_to_ask(args.output, eval_set.text)


if __name__ == "__main__":
    run(main)
