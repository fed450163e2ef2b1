"""LoRA from scratch: fine-tune DistilBERT on SST-2 through 147,456 parameters and a new head.

LoRA (Hu et al., arXiv:2106.09685) leaves a pretrained linear layer frozen. Two small matrices beside
it learn a correction of rank r:

    y = W x + b + (alpha / r) · B A x        W (out, in) frozen, A (r, in) and B (out, r) trained

B starts at zero, so training starts from exactly the pretrained encoder. Only A, B and the
classification head are saved: 3 MB instead of 268. Merged, W + (alpha / r) · B A is a plain layer.

Down to the line PLUMBING this is the whole idea, from the inside out; what a tool needs is below.

    python lora_scratch.py                      # DistilBERT on SST-2
    python lora_scratch.py --freeze-head        # the published recipe: A and B alone, 0.22 %
    python lora_scratch.py --dataset reviews.csv --text-column review --label-column stars
    python lora_scratch.py --demo               # a minute, without the Hub, after ./setup.sh --demo
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import json
import math
import numbers
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from zipfile import ZipFile

if "OMP_WAIT_POLICY" not in os.environ:  # threads that wait sleep soon: other programs may be running
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

if TYPE_CHECKING:
    from pandas import DataFrame

# === The method =================================================================================


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained low-rank update beside it (LoRA, section 4.1).

    x (..., in) → W x + b + scaling · B A dropout(x) (..., out)

    base     the pretrained layer; it stays as it is
    r        the rank, at least 1: A is (r, in), B is (out, r), both float32
    alpha    scaling = alpha / r, or alpha / √r with use_rslora (arXiv:2312.03732)
    dropout  on A's input; the base keeps its own
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout=0.0, use_rslora=False):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.scaling = alpha / math.sqrt(r) if use_rslora else alpha / r
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))  # zero: no change at first
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear: uniform in ±1/√in

    def forward(self, x: Tensor) -> Tensor:
        low_rank = F.linear(self.dropout(x), self.lora_A)  # (..., r): A x
        return self.base(x) + self.scaling * F.linear(low_rank, self.lora_B)  # (..., out)

    def __getattr__(self, name: str):  # T5 and Longformer ask a linear layer for its weight or bias
        return getattr(self.base, name) if name in ("weight", "bias") else super().__getattr__(name)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain linear layer that answers as this one in eval mode: W + scaling · B A, in float32."""
        merged = copy.deepcopy(self.base).float()
        merged.weight += self.scaling * self.lora_B @ self.lora_A
        return merged


DEFAULT_TARGETS = {  # the query and value projections, as in section 4.2 of the paper
    "distilbert": ["q_lin", "v_lin"],
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "electra": ["query", "value"],
    "mpnet": ["q", "v"],
}


def find_targets(model: nn.Module, head: list[str], targets: list[str] | None) -> list[str]:
    """Paths of the linear layers whose own name is one of `targets`, outside the head.

    Names are compared whole: "lin" is not "q_lin". ["all-linear"] means every one of them, None the
    default of the architecture. `head` names the head's parameters. Raises InputError for other targets.
    """
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    linear = [path for path in linear if f"{path}.weight" not in head]
    if targets == ["all-linear"]:
        return linear
    targets = targets or DEFAULT_TARGETS.get(model.config.model_type, [])
    names = sorted({last_name(path) for path in linear})
    unknown = [target for target in targets if target not in names]
    if unknown or not targets:
        what = f"{unknown[0]!r} is no linear layer outside the head" if unknown else "no default targets"
        raise InputError(
            f"{model.config.model_type}: {what}; choose with --targets among {', '.join(names)}"
        )
    return [path for path in linear if last_name(path) in targets]


def inject_lora(
    model, head: list[str], targets=None, r=8, alpha=16.0, dropout=0.1, use_rslora=False, train_head=True
) -> list[str]:
    """Wrap the target layers in LoRALinear, freeze all else but the head; return the wrapped paths."""
    wrapped = find_targets(model, head, targets)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(train_head and name in head)
    for path in wrapped:
        layer = LoRALinear(model.get_submodule(path), r, alpha, dropout, use_rslora)  # A and B train
        model.set_submodule(path, layer)
    return wrapped


def merge_lora(model: nn.Module) -> nn.Module:
    """Replace every LoRALinear of the model by its merged plain layer; return the same model."""
    for path, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(path, module.merge())
    return model


# === Training ===================================================================================


def train(
    model: nn.Module, train_set: Tokens, eval_set: Tokens, args: argparse.Namespace, state: TrainingState
) -> None:
    """Train what requires a gradient on tokenised sentences, from the step where `state` stands.

    `state` collects the loss of every step and a record of every epoch, and saves them for --resume.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    steps_per_epoch = math.ceil(len(train_set) / args.batch_size)
    total_steps = args.max_steps or args.epochs * steps_per_epoch
    scaler = torch.amp.GradScaler(model.device.type, enabled=compute_dtype(model) == torch.float16)
    first_step = state.begin(total_steps, steps_per_epoch, optimizer, scaler)  # 0, or --resume's
    network = share_gradients(
        model, args.seed
    )  # one process: the model itself; several: the mean of theirs

    with state.stop_on_signals():
        for step in range(first_step, total_steps):
            epoch, batch_number = divmod(step, steps_per_epoch)
            if batch_number == 0 or step == first_step:  # every epoch has an order of its own
                model.train()
                batches = make_batches(train_set.lengths, args.batch_size, 1000 * args.seed + epoch)
            share, weight = own_share(batches[batch_number])  # one process: all of it, 1 / sentences
            inputs, labels = collate(train_set, share, model), train_set.labels[share].to(model.device)

            # ---- one step of training ----
            optimizer.param_groups[0]["lr"] = args.lr * warmup_then_decay(step, total_steps, args.warmup)
            with autocast(model):  # in the type of the frozen base
                logits = network(**inputs).logits  # (sentences, labels)
            loss = weight * F.cross_entropy(logits.float(), labels, reduction="sum")
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)  # 0: no clipping
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            # ---- the rest reports, evaluates and saves ----

            state.losses[step] = sum_over_processes(loss.detach()) / rank_and_size()[1]
            done, epoch_ended = step + 1, batch_number + 1 == steps_per_epoch or step + 1 == total_steps
            if epoch_ended or done % args.log_every == 0:
                state.report(done)
            if epoch_ended:
                state.end_epoch(done, *evaluate(model, eval_set, 2 * args.batch_size))
            if epoch_ended or state.stopped or done % args.save_every == 0:
                state.save(done)
            if state.stopped:
                break


def warmup_then_decay(step: int, total_steps: int, warmup: float) -> float:
    """The learning rate's share of --lr at a step: up from zero, then down to zero, both linear."""
    up = round(warmup * total_steps)
    return step / up if step < up else (total_steps - step) / max(1, total_steps - up)


@torch.inference_mode()
def predict(model: nn.Module, sentences: Tokens, batch_size: int) -> Tensor:
    """Logits (sentences, labels) in float32, in the order given; batched by length inside."""
    model.eval()
    logits = torch.zeros(len(sentences), model.config.num_labels)  # where another process answers: zero
    rank, ranks = rank_and_size()
    for batch in make_batches(sentences.lengths, batch_size)[rank::ranks]:
        with autocast(model):
            logits[batch] = model(**collate(sentences, batch, model)).logits.float().cpu()
    return sum_over_processes(logits.to(model.device)).cpu()


def evaluate(model: nn.Module, sentences: Tokens, batch_size: int) -> tuple[float, Tensor]:
    """Mean cross-entropy (nats), and how often each label (row) was answered with each (column)."""
    logits = predict(model, sentences, batch_size)
    confusion = count_pairs(sentences.labels, logits.argmax(dim=1), logits.shape[1])
    return F.cross_entropy(logits, sentences.labels).item(), confusion


def make_batches(lengths: list[int], batch_size: int, shuffle_seed: int | None = None) -> list[list[int]]:
    """Turn sentence lengths into batches of indices, each index once, with little padding.

    With a seed: shuffle, sort by length inside windows of 50 batches, shuffle the batches. Random
    batches of 16 SST-2 phrases compute 2.6 times the real tokens, these 1.04 times.
    Without one: longest first, so that a batch too large for the memory fails at once.
    """
    window, order = max(1, len(lengths)), range(len(lengths))
    if shuffle_seed is not None:
        generator = torch.Generator().manual_seed(shuffle_seed)
        order, window = torch.randperm(len(lengths), generator=generator).tolist(), 50 * batch_size
    batches = []
    for start in range(0, len(order), window):
        by_length = sorted(order[start : start + window], key=lambda i: -lengths[i])
        batches += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    if shuffle_seed is not None:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
    return batches


def collate(sentences: Tokens, batch: list[int], model: nn.Module) -> dict[str, Tensor]:
    """The batch, padded to its longest: input_ids and attention_mask, both (sentences, tokens)."""
    ids = [torch.from_numpy(sentences.ids[i]).long() for i in batch]
    padded = pad_sequence(ids, batch_first=True, padding_value=model.config.pad_token_id)
    mask = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
    return {"input_ids": padded.to(model.device), "attention_mask": mask.to(model.device)}


# === The run ====================================================================================


def main(argv: list[str] | None = None) -> int | None:
    args = parse_flags(make_parser(__doc__, "model/lora_scratch_{}.pt"), argv)
    check_output(args.output, is_file=True)
    device, dtype = prepare_machine(args)

    train_rows, eval_rows, label_names = load_tables(args)
    args = choose_recipe(args, len(train_rows), len(label_names))  # rate, steps, targets follow the data
    base = load_base(args.model, args.revision, label_names, args.max_length)
    train_set = tokenize(train_rows["text"], base.tokenizer, args.max_length, train_rows["label"])
    eval_set = tokenize(eval_rows["text"], base.tokenizer, args.max_length, eval_rows["label"])

    lora = {key: getattr(args, key) for key in ("targets", "r", "alpha", "dropout", "use_rslora")}
    wrapped = inject_lora(base.model, base.head, **lora, train_head=not args.freeze_head)
    model = speed_up(base, dtype).to(device)  # the same answers, and the frozen weights in `dtype`
    facts = adapter_facts(args, base, label_names, wrapped)  # what rebuilding needs beside the tensors
    record = describe(args, dict(model.named_parameters()), base.head, wrapped, dtype)

    state = TrainingState(args, model, facts, record, (train_set, eval_set))
    train(model, train_set, eval_set, args, state)
    if not leave_group() or state.stopped:  # several processes part here, and the first one saves
        return state.leave()

    record["temperature"] = calibrate(model, eval_set)  # its percentages are to mean something
    tensors = tensors_to_save(model.state_dict(), base.head)
    save_checkpoint(args.output, tensors, facts | {"record": record}, base.tokenizer)
    reloaded, _ = load_checkpoint(args.output)  # what is judged is the file
    _, confusion = evaluate(speed_up(reloaded, dtype).to(device), eval_set, 2 * args.batch_size)
    finish(args, record, confusion, label_names, eval_rows["text"])


# === PLUMBING: what a tool needs and the idea does not ==========================================

# --- The base model ------------------------------------------------------------------------------


@dataclass
class Base:
    model: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    head: list[str]  # names of the head's parameters, which no base model brings along
    identity: dict  # by which a checkpoint recognises its base: see identify
    revision: str | None  # the Hub's commit, None for a local folder


def load_base(name: str, revision: str | None, label_names: list[str], max_length: int) -> Base:
    """The pretrained encoder in float32 with a new random head for these labels, and its tokenizer.

    The head is what lies outside the encoder, and a pooler where there is one: it can ship untrained.
    Raises InputError for a base that cannot be loaded, lacks weights or cannot read `max_length` tokens.
    """
    transformers.logging.set_verbosity_error()  # what is new is the head, and known
    transformers.logging.disable_progress_bar()
    is_local = Path(name).is_dir()
    if not is_local:
        use_cache_if_offline()
    remedy = "name a folder with --model (playground.py: --base), or lower --max-length"
    with refusing(f"cannot use the base model {name!r}", remedy if is_local else WITHOUT_HUB):
        file = transformers.utils.cached_file(name, "config.json", revision=revision)
        revision = None if is_local else Path(file).parent.name  # a snapshot's folder is its commit
        source = {"revision": revision, "trust_remote_code": False}
        labels = {"id2label": dict(enumerate(label_names))}
        labels["label2id"] = {label: i for i, label in enumerate(label_names)}
        config = transformers.AutoConfig.from_pretrained(name, **source, **labels)
        config.problem_type = "single_label_classification"  # whatever the base was trained for
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **source)
        tokenizer.truncation_side = "right"  # as in training, whatever its file says
        pads_right = tokenizer.pad_token_id is not None and tokenizer.padding_side == "right"
        if config.is_encoder_decoder or config.num_hidden_layers > 200 or not pads_right:
            raise ValueError("not an encoder that pads at the right, with at most 200 layers")
        model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
            name,
            **source,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # of a head for other labels
            output_loading_info=True,
        )
        model.config.pad_token_id = tokenizer.pad_token_id
        names = sorted(name for name, _ in model.named_parameters())
        encoder = f"{model.base_model_prefix}."
        head = [name for name in names if not name.startswith(encoder) or ".pooler." in name]
        reshaped = {key for key, *_ in report["mismatched_keys"]}
        wrong = reshaped.union(report["missing_keys"]).intersection(names).difference(head)
        wrong |= {key for key in report["unexpected_keys"] if re.search(r"layer\.\d+\.", key)}
        if wrong:
            raise ValueError(f"its file and config.json have other weights: {listed(sorted(wrong), 3)}")
        identity = identify(model, tokenizer, head, max_length)
    if reshaped:
        note(f"{name} was trained for other labels: it gets a new classification head")
    return Base(model, tokenizer, head, identity, revision)


ODD_SENTENCE = (
    "Naïve CAFÉ, don't  stop!\tÅngström 東京 № ½ 😀 re-use_it (1,000.50 €) #x @y http://a.b/c?d=e ß ﬁ"
)


@torch.inference_mode()
def identify(model: nn.Module, tokenizer: Callable, head: list[str], max_length: int) -> dict:
    """What decides an answer besides the head, as a checkpoint keeps it to recognise its base.

    fingerprint  SHA-256 of all parameters but the head's, in float32
    tokenizer    SHA-256 of the vocabulary and of the odd sentence's token numbers
    answer       the first numbers of [CLS] for that sentence: every setting of the base shows in them
    """
    weights = {name: p for name, p in sorted(model.named_parameters()) if name not in head}
    digest = sha256()
    for name, parameter in weights.items():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().contiguous().numpy())
    words = [sorted(tokenizer.get_vocab().items()), tokenizer([ODD_SENTENCE])["input_ids"]]
    model.base_model(torch.full((1, max_length), len(tokenizer) - 1))  # can it read the longest text?
    answer = model.base_model(torch.tensor(words[1])[:, :max_length])[0]  # (1, tokens, width)
    if not all(parameter.isfinite().all() for parameter in weights.values()):
        raise ValueError("its weights have NaN or infinity in them")
    return {
        "fingerprint": digest.hexdigest(),
        "tokenizer": sha256(json.dumps(words).encode()).hexdigest(),
        "answer": answer[0, 0, :8].tolist(),
    }


def find_trained_base(facts: dict, base_name: str | None, load: Callable[..., Base]) -> Base:
    """The base model that a checkpoint's facts name, or `base_name`; raises InputError for another one."""
    name = base_name or facts["base"]
    revision = None if base_name else facts["revision"]
    base = load(name, revision, facts["label_names"], facts["max_length"])
    now = base.identity
    then = now | {key: facts[key] for key in now if key in facts}  # the first versions kept less
    differs = [key for key in ("fingerprint", "tokenizer") if then[key] != now[key]]
    if differs or not numpy.allclose(then["answer"], now["answer"], rtol=0, atol=1e-3):  # rounding: 1e-6
        what = f"{name!r} is another base model than {facts['base']!r} was in training"
        raise InputError(f"{what} (its {listed(differs) or 'config.json'} differs); name the same one")
    return base


@functools.cache
def use_cache_if_offline() -> None:
    """Ask the Hub once, for 5 seconds: its libraries would retry for half a minute before they say no."""
    import threading

    from huggingface_hub import constants, get_session

    def ask() -> None:
        with contextlib.suppress(Exception):  # no network, no such name, a captive portal
            answers.append(get_session().head(constants.ENDPOINT, timeout=5))

    answers = [True] if constants.HF_HUB_OFFLINE else []
    thread = threading.Thread(target=ask, daemon=True)  # a look-up of a name obeys no timeout
    thread.start()
    thread.join(0 if answers else 5)
    constants.HF_HUB_OFFLINE |= not answers


def last_name(path: str) -> str:
    """The last name of a path: q_lin of distilbert.transformer.layer.0.attention.q_lin."""
    return path.rpartition(".")[2]


# --- Tables --------------------------------------------------------------------------------------
# From its file to its tokens a table is one of pandas, which takes 0.3 s to import: for those who read one.

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
SPLITS = {"train": "training", "training": "training"}  # how a file's name starts: what it holds
SPLITS |= dict.fromkeys(["validation", "valid", "val", "dev"], "validation")
USUAL = {  # names of columns
    "text": "sentence text review comment message title content body description headline tweet query question",
    "label": "label labels class category sentiment intent stars rating topic target emotion",
}


@dataclass
class Tokens:
    ids: list[numpy.ndarray]  # of each sentence (tokens,), int32: lists would take many times the memory
    labels: Tensor  # (sentences,), zeros where unknown

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        return [len(one) for one in self.ids]


def tokenize(texts: Sequence[str], tokenizer: Callable, max_length: int, labels=None) -> Tokens:
    """The texts as token numbers, cut at `max_length`."""
    texts, ids, cut = list(texts), [], 0
    for start in range(0, len(texts), 10_000):  # a part at a time: what a tokenizer returns is large
        found = tokenizer(texts[start : start + 10_000], truncation=True, max_length=max_length)
        ids += [numpy.array(one, dtype=numpy.int32) for one in found["input_ids"]]
        cut += sum(bool(encoding.overflowing) for encoding in found.encodings or [])
    if cut:
        note(f"{cut:,} of {len(texts):,} texts are cut at {max_length} tokens; see --max-length")
    return Tokens(ids, torch.tensor([0] * len(ids) if labels is None else list(labels)))


def load_tables(args: argparse.Namespace) -> tuple[DataFrame, DataFrame, list[str]]:
    """Training and validation rows, and the names of their labels.

    Rows have columns text and label, its number; their index is the row's number in the file, from 1.
    """
    where, tables = args.dataset, read_splits(args)
    if "training" not in tables:
        raise InputError(f"{where}: no training split; call it train.csv, .tsv, .jsonl or .parquet")
    columns = find_columns(where, tables["training"], args.text_column, args.label_column)
    rows = {split: read_rows(f"{where}: {split}", table, *columns) for split, table in tables.items()}
    train = rows["training"]
    validation = rows.get("validation", train[:0])
    class_names = tables["training"].attrs.get("class_names", {}).get(columns[1])
    labels, names = number_labels(args, {*train["label"]}, {*validation["label"]}, class_names)
    note_surprises(where, train, validation)
    if "validation" not in rows:
        train, validation = hold_out(train, args.seed)
        print(f"{visible(where)}: a tenth of each label, {len(validation)} rows, is held out by seed")
    if args.train_samples:
        order = rows["training"].index[shuffled(len(rows["training"]), args.seed)]
        train = train.loc[order[order.isin(train.index)][: args.train_samples]]
    if train.empty or validation.empty:
        raise InputError(f"{where}: too few rows to hold a tenth out; give a validation split")
    numbers = {label: number for number, label in enumerate(labels)}
    train, validation = (part.assign(label=part["label"].map(numbers)) for part in (train, validation))
    return train, validation, names


def read_splits(args: argparse.Namespace) -> dict[str, DataFrame]:
    """The splits of a file, a folder or a data set of the Hub: training, and perhaps validation."""
    import pandas

    path = Path(args.dataset)
    is_saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()  # by save_to_disk
    if path.is_file() or path.suffix.lower() in FORMATS:
        return {"training": read_file(path)}
    if is_saved or not path.is_dir():
        return load_data_set(args, is_saved)
    files: dict[str, list[Path]] = {}
    for folder in (path / (args.dataset_config or "."), path, path / "data"):  # as copies of the Hub's
        for file in [] if files else sorted(folder.glob("*")):
            stem = file.stem.lower().partition("-")[0]  # train-00000-of-00002.parquet
            if stem in SPLITS and file.suffix.lower() in FORMATS:
                files.setdefault(SPLITS[stem], []).append(file)
    for split, parts in files.items():
        if len(parts) > 1 and not all(f"-of-{len(parts):05d}" in part.stem for part in parts):
            raise InputError(f"{path}: not one file for the {split} split: {listed(parts)}; keep one")
    tables = {split: [read_file(part) for part in parts] for split, parts in files.items()}
    return {split: pandas.concat(parts, ignore_index=True) for split, parts in tables.items()}


def load_data_set(args: argparse.Namespace, is_saved: bool) -> dict[str, DataFrame]:
    """The splits of a data set of the Hub, or of a folder of save_to_disk."""
    if not is_saved:
        use_cache_if_offline()
    import datasets  # a second, and after the Hub was asked, whose answer it copies

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # an error is said once, as InputError
    if not on_terminal():
        datasets.disable_progress_bars()
    remedy = "name a file or a folder with --dataset" if is_saved else WITHOUT_HUB
    with refusing(f"cannot load the data set {args.dataset!r}", remedy):
        if is_saved:
            data = datasets.load_from_disk(args.dataset)
        else:
            revision = GLUE[2] if args.dataset == GLUE[0] else None
            data = datasets.load_dataset(args.dataset, args.dataset_config, revision=revision)
        parts = {"train": data} if isinstance(data, datasets.Dataset) else data
        arrow = {SPLITS[name]: parts[name].with_format("arrow")[:] for name in parts if name in SPLITS}
        return {split: as_frame(table) for split, table in arrow.items()}


def read_file(path: Path) -> DataFrame:
    """One file as a pandas table; every field of a CSV or TSV file stays the text that it is.

    Its attrs: header, the columns' names as they were; separator and mark (of the encoding) of a CSV file;
    class_names of the columns of a Parquet file that the datasets library wrote.
    """
    import pandas
    from pyarrow import parquet

    suffix = path.suffix.lower()
    with refusing(f"{path}: cannot be read", f"give a table that ends in {listed(FORMATS)}"):
        if suffix not in FORMATS:
            raise ValueError(f"{suffix or 'no ending'}")
        if suffix == ".parquet":
            table = as_frame(parquet.read_table(path))
        elif suffix in (".json", ".jsonl"):  # one object a line, or one array of objects
            text, _ = read_text(path)
            lines = [line for line in text.split("\n") if line.strip()]
            rows = json.loads(text) if text.lstrip().startswith("[") else list(map(json.loads, lines))
            json.dumps(rows, ensure_ascii=False).encode()  # half characters are no text
            table = pandas.DataFrame([row | {} for row in rows], dtype=object)
        else:
            table = read_csv(path)
        header = [str(name) for name in table.columns]
        names = [name.strip() for name in header]
        table.columns = [f"{name}.{i}" if name in names[:i] else name for i, name in enumerate(names)]
        table.attrs["header"] = header
    return table


def read_csv(path: Path) -> DataFrame:
    """A CSV or TSV file without any guessing: "null" and "NA" are words, "007" is text."""
    import pandas

    text, encoding = read_text(path)
    header = next((line for line in io.StringIO(text) if line.strip()), "")
    separator = max(",;\t", key=header.count)
    options = {"sep": separator, "header": None, "dtype": str, "na_filter": False}
    if path.suffix.lower() == ".tsv":  # as GLUE writes it: a quote character is text
        text = text.replace("\r\n", "\n")
        options |= {"sep": "\t", "quoting": 3, "lineterminator": "\n"}
    elif separator != "," and separator in header:
        note(f"{path}: its columns are separated by {separator!r}")
    has_one_column = options["sep"] not in header  # where a blank line is a row
    options["skip_blank_lines"] = not (has_one_column and text.startswith(header))
    table = pandas.read_csv(io.StringIO(text), **options)
    table = table[1:].reset_index(drop=True).set_axis(table.iloc[0].tolist(), axis=1)
    table.attrs = {"separator": options["sep"], "mark": encoding != "utf-8"}
    return table


def read_text(path: Path) -> tuple[str, str]:
    """A file's text and its encoding: what a byte-order mark says, or UTF-8, or Windows-1252 with a note."""
    content = path.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16"), "utf-16"
    if b"\0" in content:
        raise ValueError("no text, or UTF-16 without its mark: save it as UTF-8")
    encoding = "utf-8-sig" if content.startswith(b"\xef\xbb\xbf") else "utf-8"
    try:
        return content.decode(encoding), encoding
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        note(f"{path}: line {line} is not UTF-8; read as Windows-1252: is that right?")
        return content.decode("cp1252"), "cp1252"


def as_frame(table) -> DataFrame:
    """An Arrow table as a pandas table that keeps its values; names of classes go into its attrs."""
    import pandas

    frame = table.to_pandas(types_mapper=pandas.ArrowDtype, ignore_metadata=True)
    features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = features.get("info", {}).get("features", {})
    frame.attrs["class_names"] = {name: feature.get("names") for name, feature in features.items()}
    return frame


def find_columns(where: str, table: DataFrame, text: str | None, label: str | None) -> tuple[str, str]:
    """The columns of text and label: those given, the usual names, or the only ones that look like it."""
    is_guessed = not (text or label)
    text = text or choose_column(where, table, "text")
    label = label or choose_column(where, table, "label", taken=text)
    if is_guessed and (len(text) > 40 or label in table[label].head(2000).astype(str).tolist()):
        what = f"its first row looks like data, not names of columns: {listed(list(table.columns))}"
        raise InputError(f"{where}: {what}; put a row of names above it")
    if (text, label) != ("sentence", "label"):
        note(f"{where}: {text!r} is taken for the text, {label!r} for the label")
    return text, label


def choose_column(where: str, table: DataFrame, what: str, taken: str = "") -> str:
    """The column of "text" or "label"; raises InputError where it is not clear which."""
    names = [name for name in table.columns if name not in ("", taken) and not name.startswith("Unnamed:")]
    usual = USUAL[what].split()
    found = [name for name in names if name.lower() == usual[0]]
    found = found or [name for name in names if name.lower() in usual]
    found = found or [name for name in names if looks_like(what, table[name])]
    if len(found) != 1:
        problem = f"which column is the {what}, of {listed(found or names)}, is not clear"
        raise InputError(f"{where}: {problem}; say it with --{what}-column")
    return found[0]


def looks_like(what: str, column) -> bool:
    """Whether a column has long varied texts, or few short values that come again."""
    values = [str(value) for value in column.head(2000).dropna().tolist() if str(value).strip()]
    length, kinds = sum(map(len, values)) / max(1, len(values)), len(set(values))
    if what == "text":
        return length > 20 and kinds > len(values) / 2
    return length < 40 and 2 <= kinds <= max(2, len(values) / 3)


def is_blank(text: str) -> bool:
    """Whether there is nothing to read: white space and characters without a width."""
    return all(c.isspace() or unicodedata.category(c) == "Cf" for c in text)


def read_rows(where: str, table: DataFrame, text: str, label: str | None = None) -> DataFrame:
    """The rows that have something to read, numbered from 1: text and label, both as text (1.0 is 1)."""
    for column in filter(None, (text, label)):
        if column not in table.columns:
            what = f"no column {column!r} but {listed(list(table.columns))}"
            raise InputError(f"{where}: {what}; see --text-column and --label-column")
    rows = table[[text, label or text]].astype(object).set_axis(["text", "label"], axis=1)
    rows.index = range(1, len(rows) + 1)
    rows = rows.where(rows.notna(), "")
    is_text = rows["text"].map(lambda value: isinstance(value, str))
    is_empty = is_text & rows["text"].where(is_text, "x").map(is_blank)
    if class_names := table.attrs.get("class_names", {}).get(label):
        rows["label"] = rows["label"].map(dict(enumerate(class_names)).get)
    is_label = rows["label"].map(lambda value: isinstance(value, (str, numbers.Number)))
    rows["label"] = rows["label"].map(str).str.strip().str.replace(r"^(-?\d+)\.0+$", r"\1", regex=True)
    is_label = is_label & (rows["label"] != "") | is_empty
    for what, column, is_good in (("text", text, is_text), ("label", label, is_label)):
        if column and not is_good.all():
            value = visible(repr(table[column].iloc[is_good.argmin()]), 100)
            raise InputError(
                f"{where}: row {is_good.idxmin()} has the {what} {value}; correct or remove it"
            )
    if is_empty.any():
        note(f"{where}: {is_empty.sum():,} of {len(rows):,} rows have no text and are left out")
    if is_empty.all():
        raise InputError(f"{where}: no row has a text; give at least one")
    return rows[~is_empty]


def note_surprises(where: str, train: DataFrame, validation: DataFrame) -> None:
    """A line for each thing in the data that could surprise; silence where there is nothing to say."""
    labels_of_text = train.groupby("text")["label"].transform("nunique")
    counts = train["label"].value_counts()
    lower = counts.index.str.casefold()
    for what, found in (
        ("rows repeat an earlier text", train.index[train["text"].duplicated()]),
        ("rows have a text with more than one label", train.index[labels_of_text > 1]),
        ("validation rows are trained on, too", validation.index[validation["text"].isin(train["text"])]),
        ("labels differ in capital letters alone", counts.index[lower.duplicated(keep=False)]),
        ("labels have fewer than ten rows", counts.index[counts < 10]),
    ):
        if len(found):
            note(f"{where}: {len(found):,} {what}: {listed(found, 10)}")


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers below `count` in an order that the seed decides."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def hold_out(rows: DataFrame, seed: int) -> tuple[DataFrame, DataFrame]:
    """The rows to train on, and those of a tenth of each label's texts, rounded up.

    It is drawn by text, so that no held-out one is trained on; a label's only text stays in training.
    """
    texts = rows.iloc[shuffled(len(rows), seed)].drop_duplicates(["text", "label"])
    groups = texts.groupby("label")["text"]
    rank, size = groups.cumcount(), groups.transform("size")
    drawn = texts["text"][(rank < (size / 10).map(math.ceil)) & (size > 1)]
    held = rows["text"].isin(drawn)
    return rows[~held], rows[held]


def number_labels(args: argparse.Namespace, train: set, validation: set, class_names: list | None) -> tuple:
    """The labels in the order of their numbers, and their names: by value where all are whole numbers."""
    every = train | validation
    are_numbers = all(re.fullmatch(r"-?\d{1,18}", label) for label in every)
    fractions = not are_numbers and all(re.fullmatch(r"-?\d+(\.\d+)?", label) for label in every)
    labels = class_names or sorted(train, key=lambda label: (int(label) if are_numbers else 0, label))
    names, unknown = args.label_names or labels, sorted(every.difference(labels))
    for is_wrong, what in (
        (fractions, f"{listed(sorted(every), 3)} are neither names nor whole numbers"),
        (len(labels) < 2, f"{labels[0]!r} is the only one; a classifier needs two"),
        (unknown, f"{listed(unknown)} of a row is not one of the training labels {listed(labels)}"),
        (names != labels and not (are_numbers or class_names), f"they have names: {listed(labels)}"),
        (not len(labels) == len(names) == len({*names}), f"{listed(names)} do not name {listed(labels)}"),
        (max(map(len, names)) > 1000, "one has more than 1,000 characters"),
    ):
        if is_wrong:
            raise InputError(f"{args.dataset}: labels: {what}; see --label-column and --label-names")
    return labels, names


# --- Checkpoints ---------------------------------------------------------------------------------

FORMAT = 1  # of the checkpoint; a reader refuses a number that it does not know
FACTS = {  # what a checkpoint says beside its tensors, and of which type it is; and what identify gives
    "base": str,
    "revision": str | None,  # the Hub's commit
    "fingerprint": str,
    "label_names": list,  # in the order of their numbers
    "max_length": int,  # tokens
    "targets": list,  # names of the wrapped layers
    "r": int,
    "alpha": int | float,
    "dropout": int | float,
    "use_rslora": bool,
}
LORA_FACTS = ("targets", "r", "alpha", "dropout", "use_rslora")


def adapter_facts(args: argparse.Namespace, base: Base, label_names: list[str], wrapped: list[str]) -> dict:
    """What has to be known to rebuild the model, beside its tensors."""
    facts = {key: getattr(args, key) for key in ("max_length", *LORA_FACTS)}
    facts |= {"base": args.model, "revision": base.revision, "label_names": label_names}
    return facts | {"targets": sorted({last_name(path) for path in wrapped})} | base.identity


def tensors_to_save(state: dict[str, Tensor], head: list[str]) -> dict[str, Tensor]:
    """What a checkpoint keeps: <module path>.lora_A and .lora_B, and the head under its own names."""
    kept = [name for name in state if name.endswith((".lora_A", ".lora_B")) or name in head]
    return {name: state[name].cpu() for name in kept}


def save_checkpoint(path: Path, tensors: dict[str, Tensor], facts: dict, tokenizer: Callable) -> None:
    """Write adapter, head and facts as plain Python values; the tokenizer in a folder beside."""
    checkpoint = {"format": FORMAT, "state_dict": tensors, **facts}
    write_file(path, lambda temporary: torch.save(checkpoint, temporary))
    write_folder(path.with_suffix(""), tokenizer.save_pretrained)


def load_checkpoint(path: str | Path, base_name: str | None = None, load=load_base) -> tuple[Base, dict]:
    """Rebuild the trained model in float32, on the CPU, from a checkpoint and its base model.

    `base_name` says where the base is if it has moved, and `load` how to get it. Raises InputError for a
    file that is no checkpoint, for another base, and for tensors missing, left over or not finite.
    """
    checkpoint = read_tensors(path)
    with refusing(f"{path}: not a checkpoint of this project, or damaged", "train or copy it again"):
        tensors = checkpoint["state_dict"]
        check_facts(checkpoint, tensors)
        base = find_trained_base(checkpoint, base_name, load)
        inject_lora(base.model, base.head, **{key: checkpoint[key] for key in LORA_FACTS})
        copy_all(tensors, tensors_to_save(base.model.state_dict(), base.head))
    base.model.eval()
    return base, checkpoint


def read_tensors(path: str | Path) -> dict:
    """What a file of torch.save holds, if it is tensors and plain values: code in it is never run."""
    with refusing(f"{path}: not a file of lora_scratch.py, or damaged", "python lora_scratch.py makes one"):
        with ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"{damaged} has changed")
        return torch.load(path, map_location="cpu", weights_only=True)


def check_facts(facts: dict, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless the facts have our format, types and ranges, and the rank of their tensors."""
    if facts["format"] != FORMAT:
        raise ValueError(f"format {facts['format']}; this version reads {FORMAT}")
    for key, kind in FACTS.items():
        value, (low, high) = facts[key], RANGES.get(key, (-math.inf, math.inf))
        is_right = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if not is_right or (key in RANGES and not low <= value <= high):
            raise ValueError(f"{key} is {value!r}")
        if kind is list and not len(value) == len({name for name in value if isinstance(name, str)}) > 0:
            raise ValueError(f"{key} is no list of names")
    if any(len(tensor) != facts["r"] for name, tensor in tensors.items() if name.endswith("lora_A")):
        raise ValueError(f"r is {facts['r']}, its tensors have another rank")


@torch.no_grad()
def copy_all(source: dict, target: dict) -> None:
    """Copy tensors into those of the same name: all of them, of the same shape and type, and finite.

    Thereby a file can only fill tensors that are here already. Raises ValueError otherwise.
    """
    for key in source.keys() ^ target.keys():
        raise ValueError(f"{visible(key)} is {'missing' if key in target else 'not expected'}")
    for key, tensor in target.items():
        if isinstance(tensor, dict):
            copy_all(source[key], tensor)
        elif (source[key].shape, source[key].dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(f"{key} is {source[key].dtype} of shape {tuple(source[key].shape)}")
        elif not tensor.copy_(source[key]).isfinite().all():
            raise ValueError(f"{key} has NaN or infinity in it")


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then move it into place: whole, or not at all."""
    with refusing(f"cannot write {path}", "an older one is unchanged; make room or name another place"):
        target = path.resolve()  # a link stays a link, and the move stays on one file system
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{os.getpid()}.tmp")
        try:
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def write_folder(path: Path, write: Callable[[Path], object], last: str = "") -> None:
    """Let `write` fill a temporary folder, then move each file to `path`, the one named `last` at the end."""
    with refusing(f"cannot write {path}", "make room or name another place"):
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".", suffix=".tmp", dir=path) as temporary:
            write(Path(temporary))
            for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == last):
                write_file(path / file.name, functools.partial(shutil.copyfile, file))


# --- Resuming ------------------------------------------------------------------------------------


class TrainingState:
    """The course of a training: its progress as it is printed, and what --resume needs in a file.

    The file beside the output holds adapter and head, the optimiser's moments, the scaler, random
    generators, losses and epochs so far, and the settings that have to be the same again. The order of the
    sentences and the learning rate need no place: seed, epoch and step decide them.
    """

    MAY_DIFFER = {  # data and base are recognised by their content
        *("demo", "model", "revision", "dataset", "dataset_config", "text_column", "label_column"),
        *("label_names", "train_samples", "recipe", "device", "threads", "log_every", "save_every"),
        *("resume", "output", "import_scratch", "export_scratch"),
    }

    def __init__(self, args: argparse.Namespace, model: nn.Module, facts: dict, record: dict, sets: tuple):
        self.args, self.model, self.record, self.sentences = args, model, record, len(sets[0])
        self.path = args.output.with_name(f"{args.output.name}.state")
        settings = {key: value for key, value in vars(args).items() if key not in self.MAY_DIFFER}
        settings |= {key: facts[key] for key in ("label_names", "targets", "fingerprint", "tokenizer")}
        for name, part in zip(("training data", "validation data"), sets, strict=True):
            numbers = numpy.concatenate([*part.ids, part.lengths, part.labels])
            settings[name] = sha256(numbers).hexdigest()
        settings["precision"] = record["precision"]
        self.settings = {key: str(value) for key, value in settings.items()}
        self.stopped = 0  # the number of the signal that came
        self.done = 0  # steps, when last saved

    def begin(self, total_steps: int, steps_per_epoch: int, optimizer, scaler) -> int:
        """Make room for all that a state holds; --resume fills it. Returns the number of the first step."""
        self.steps_per_epoch, self.optimizer, self.scaler = steps_per_epoch, optimizer, scaler
        self.losses = torch.zeros(total_steps, device=self.model.device)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for p in trained.values():  # as AdamW does at its first step
            moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
        moments = {"state": {i: optimizer.state[p] for i, p in enumerate(trained.values())}}
        self.tensors = {"trained": trained, "optimizer": moments, "losses": self.losses}
        if self.args.resume and self.path.exists():
            self.load()
        elif self.args.resume:
            print(f"no training state {self.path} yet: starting from the beginning")
        self.epoch_start, self.clock = self.done, time.perf_counter()
        is_silent = rank_and_size()[0] > 0 or not on_terminal()
        self.bar = tqdm(total=total_steps, initial=self.done, disable=is_silent, dynamic_ncols=True)
        return self.done

    def load(self) -> None:
        """Put everything back; raises InputError for a file that is not the state of this very run."""
        state = read_tensors(self.path)
        with refusing(f"{self.path}: not a training state of this run", "leave out --resume"):
            for key, now in self.settings.items():
                if (then := state["settings"][key]) != now:
                    raise ValueError(f"{key} was {visible(then, 60)} and is now {visible(now, 60)}")
            done, epochs, total = state["done"], json.loads(state["epochs"]), len(self.losses)
            ended = done // self.steps_per_epoch + (done == total and done % self.steps_per_epoch > 0)
            if not 0 < done <= total or len(epochs) != ended:
                raise ValueError(f"{len(epochs)} epochs in {done} steps")
            copy_all({key: state[key] for key in self.tensors}, self.tensors)
            self.scaler.load_state_dict(state["scaler"])
            torch.set_rng_state(state["generators"][0])
            if torch.cuda.is_initialized() and len(state["generators"]) > 1:
                torch.cuda.set_rng_state(state["generators"][1])
        self.record["epochs"], self.done = epochs, done
        print(f"resumed after step {done}{': this run is finished' if done == total else ''}")

    def save(self, done: int) -> None:
        """Write the state after `done` steps; weights that are not finite are never written."""
        self.check_finite(done)
        self.done = done
        state = {"format": FORMAT, "settings": self.settings, "done": done, **self.tensors}
        state |= {"epochs": json.dumps(self.record["epochs"]), "scaler": self.scaler.state_dict()}
        state["generators"] = [torch.get_rng_state()]  # of the CPU, and of this process's GPU
        if torch.cuda.is_initialized():
            state["generators"].append(torch.cuda.get_rng_state())
        if rank_and_size()[0] == 0:
            write_file(self.path, lambda temporary: torch.save(state, temporary))

    def check_finite(self, done: int) -> None:
        """Raise InputError where a loss so far or a weight now is not finite: what was saved is sound."""
        tensors = [self.losses[:done], *self.tensors["trained"].values()]
        if not all(tensor.detach().sum().isfinite() for tensor in tensors):
            what = f"step {done}: the loss or a weight is not finite"
            raise InputError(f"{what}, at a learning rate of {self.args.lr:.1e}; lower --lr")

    def report(self, done: int) -> None:
        """Show the mean loss of the last steps: on a terminal's bar, or on a line now and then."""
        self.check_finite(done)  # rarely: it waits for the GPU
        self.seconds = time.perf_counter() - self.clock
        sentences = min((done - self.epoch_start) * self.args.batch_size, self.sentences)
        self.sentences_a_second = sentences / self.seconds
        loss = self.losses[max(0, done - self.args.log_every) : done].mean()
        rate = self.optimizer.param_groups[0]["lr"]
        said = f"loss {loss:.4f}, lr {rate:.1e}, {self.sentences_a_second:.0f} sentences/s"
        self.bar.set_postfix_str(said)
        self.bar.update(done - self.bar.n)
        if self.bar.disable and done % (10 * self.args.log_every) == 0:
            print(f"step {done}/{len(self.losses)}: {said}", flush=True)

    def end_epoch(self, done: int, eval_loss: float, confusion: Tensor) -> None:
        """Add the epoch to the record, and print it."""
        epochs, every, result = self.record["epochs"], self.args.log_every, score(confusion)
        losses = self.losses[len(epochs) * self.steps_per_epoch : done]
        epoch = {"epoch": len(epochs) + 1, "steps": len(losses), "train_loss": losses.mean().item()}
        epoch |= {"eval_loss": eval_loss, **{key: result[key] for key in ("accuracy", "correct", "total")}}
        epoch |= {"seconds": self.seconds, "sentences_per_second": self.sentences_a_second}
        epochs.append(epoch)
        blocks = [round(block.mean().item(), 5) for block in self.losses[:done].split(every)]
        self.record["loss_curve"] = {"every": every, "loss": blocks}
        right = f"{result['accuracy']:.2f} % ({result['correct']}/{result['total']})"
        said = f"training loss {epoch['train_loss']:.4f}, validation loss {eval_loss:.4f}, accuracy {right}"
        self.bar.clear()
        print(f"epoch {len(epochs)}: {said}, {self.seconds:.1f} s", flush=True)
        self.epoch_start, self.clock = done, time.perf_counter()

    @contextlib.contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """Note Ctrl-C, SIGTERM and SIGHUP instead of dying within a step; the second ends at once."""

        def remember(number: int, _: object) -> None:
            self.stopped = number
            signal.signal(number, signal.SIG_DFL)

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        former = {n: signal.signal(n, remember) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
        try:
            yield
        finally:
            self.bar.close()
            for number, handler in former.items():
                signal.signal(number, handler)

    def leave(self) -> int:
        """The exit code of a process that saves no result, after a word on how to go on."""
        if self.stopped:
            print(f"stopped after step {self.done}; the same command with --resume continues", flush=True)
        return 128 + self.stopped if self.stopped else 0


def on_terminal() -> bool:
    """Whether a line can be redrawn in place: a notebook or a log would keep every state of a bar."""
    return sys.stderr.isatty() and not {"JPY_PARENT_PID", "COLAB_RELEASE_TAG"} & os.environ.keys()


# --- Several processes ---------------------------------------------------------------------------


def rank_and_size() -> tuple[int, int]:
    """This process's number among those that torchrun started, and how many they are: 0 of 1 without."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def leave_group() -> bool:
    """Part from the other processes after the training; whether this is the first one, which goes on."""
    rank, _ = rank_and_size()
    if dist.is_initialized():
        dist.destroy_process_group()
    return rank == 0


def share_gradients(model: nn.Module, seed: int) -> nn.Module:
    """The model; of several processes each gets the mean of all gradients, and a dropout of its own."""
    rank, ranks = rank_and_size()
    if rank > 0:
        torch.manual_seed(seed + rank)
    return nn.parallel.DistributedDataParallel(model) if ranks > 1 else model


def own_share(batch: list[int]) -> tuple[list[int], float]:
    """This process's part of a batch, and what its sum of losses is multiplied by.

    The mean over all processes is then the mean over the batch. Of a short batch a process may get
    nothing: it computes the first sentence, with weight 0.
    """
    rank, ranks = rank_and_size()
    share = batch[rank::ranks]
    return share or batch[:1], ranks / len(batch) if share else 0.0


def sum_over_processes(numbers: Tensor) -> Tensor:
    """The sum of what each process has computed; of one process, what it has."""
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers


# --- What a run says and writes ------------------------------------------------------------------


def describe(args: argparse.Namespace, named: dict[str, Tensor], head: list[str], wrapped, dtype) -> dict:
    """Print what is trained, on which base and machine; returns the beginning of the run's record."""
    counts = dict.fromkeys(("lora", "head", "frozen base", "trained"), 0)
    for name, parameter in named.items():
        part = "lora" if "lora_" in name else "head" if name in head else "frozen base"
        counts[part] += parameter.numel()
        counts["trained"] += parameter.numel() if parameter.requires_grad else 0
    layers = ", ".join(sorted({last_name(path) for path in wrapped}))
    for part, what in (
        ("lora", f"r {args.r}, alpha {args.alpha:g}, on {len(wrapped)} layers ({layers})"),
        ("head", "frozen at its random start" if args.freeze_head else "trained"),
        ("frozen base", visible(args.model)),
    ):
        share = 100 * counts[part] / (sum(counts.values()) - counts["trained"])
        print(f"{part:12}{counts[part]:>12,} {share:6.2f} %  {what}")
    capability = torch.backends.cpu.get_cpu_capability()
    hardware = f"{platform.machine()} {capability}, {torch.get_num_threads()} threads"
    if choose_device(args.device).type == "cuda":
        hardware = torch.cuda.get_device_name()
    versions = {"python": platform.python_version()}
    versions |= {package: metadata.version(package) for package in ("torch", "transformers", "datasets")}
    precision = str(dtype).removeprefix("torch.")
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{'machine':12}{hardware}, {precision}; {shown}", flush=True)
    settings = json.loads(json.dumps(vars(args), default=str))
    record = {"settings": settings, "versions": versions, "hardware": hardware, "precision": precision}
    return record | {"parameters": counts, "epochs": []}


LEAST_HELD_OUT = 10  # sentences that a temperature is fitted on


def calibrate(model: nn.Module, sentences: Tokens) -> float:
    """Make the model as sure as it is right: divide its logits by one temperature (arXiv:1706.04599).

    Of 1 to 10 it is the one under which the labels are likeliest; it goes into the head's last layer, so
    every format has it, and no answer changes. A frozen head, and one with fewer than LEAST_HELD_OUT
    sentences to fit it on, keeps 1.
    """
    modules = [module for name, module in model.named_modules() if "original_module" not in name]  # PEFT's
    outputs = model.config.num_labels
    layer = [m for m in modules if isinstance(m, nn.Linear) and m.out_features == outputs][-1]
    temperature, what = 1.0, "the head is frozen"
    if len(sentences) < LEAST_HELD_OUT:
        what = f"{LEAST_HELD_OUT} validation sentences are needed; percentages may be far too sure"
    elif layer.weight.requires_grad:
        logits, tried = predict(model, sentences, 32), torch.logspace(0, 1, 101).tolist()
        temperature = min(tried, key=lambda t: F.cross_entropy(logits / t, sentences.labels).item())
        what = f"it divides the logits, fitted on the {len(sentences):,} validation sentences"
    for parameter in layer.parameters():
        parameter.data /= temperature
    print(f"{'temperature':12}{temperature:.2f}: {what}")
    return temperature


def count_pairs(given: Tensor, answers: Tensor, labels: int) -> Tensor:
    """How often each label (row) was answered with each (column)."""
    return torch.bincount(given * labels + answers, minlength=labels * labels).view(labels, labels)


def score(confusion: Tensor) -> dict:
    """What was right, in percent: accuracy, where it truly is with 95 % confidence, and macro-F1.

    interval  Wilson's (1927), which holds near 0 and 100, too
    macro_f1  the mean F1 over all labels that were given or answered, as in scikit-learn
    """
    correct, total = int(confusion.trace()), int(confusion.sum())
    z = 1.959964  # of the normal distribution
    middle = (correct + z * z / 2) / (total + z * z)
    half = z / (total + z * z) * math.sqrt(correct * (total - correct) / total + z * z / 4)
    both = confusion.sum(dim=0) + confusion.sum(dim=1)
    return {
        "accuracy": 100 * correct / total,
        "correct": correct,
        "total": total,
        "interval": [100 * max(0.0, middle - half), 100 * min(1.0, middle + half)],
        "macro_f1": (200 * confusion.diagonal().double() / both).nanmean().item(),
    }


def report_labels(confusion: Tensor, label_names: list[str]) -> str:
    """A table of the labels, and a summary: accuracy and its interval, macro-F1, the commonest label's share.

    Precision, recall and F1 in percent, - where undefined; how often each of up to 10 labels was answered.
    """
    import pandas

    names = [visible(" ".join(name.split()), 20) for name in label_names]
    right, given, real = confusion.diagonal(), confusion.sum(dim=0), confusion.sum(dim=1)
    columns = {"label": names, "precision": 100 * right / given, "recall": 100 * right / real}
    columns |= {"F1": 200 * right / (given + real), "sentences": real}
    header = list(columns)
    if len(names) <= 10:
        columns |= {"answered as:": "", **{i: confusion[:, i] for i in range(len(names))}}
        header += ["answered as:", *names]
    table = pandas.DataFrame(columns)
    result = score(confusion)
    always = f"always {names[int(real.argmax())]!r}: {100 * int(real.max()) / result['total']:.2f} %"
    right = f"accuracy {result['accuracy']:.2f} % ({result['correct']}/{result['total']})"
    interval = "95 % between {:.0f} and {:.0f}".format(*result["interval"])
    table = table.to_string(header=header, index=False, float_format="%.1f", na_rep="-")
    return f"{table}\nmacro-F1 {result['macro_f1']:.1f} %; {always}\n{right}, {interval}"


def finish(
    args: argparse.Namespace, record: dict, confusion: Tensor, label_names: list[str], texts
) -> None:
    """Write the run's record beside its result, print what came out, and how to ask it."""
    files = [args.output] if args.output.is_file() else list(args.output.glob("adapter_*"))
    size = sum(file.stat().st_size for file in files)
    result = score(confusion) | {"bytes": size, "label_names": label_names, "confusion": confusion.tolist()}
    text = json.dumps(record | {"result": result}, indent=1) + "\n"
    write_file(beside(args.output, ".json"), lambda file: file.write_text(text, encoding="utf-8"))
    right = f"{result['correct']}/{result['total']} right"
    print(f"saved {args.output} ({size / 1e6:.1f} MB); reloaded, it answers {right}")
    if result["correct"] <= confusion.sum(dim=1).max():
        what = "always answering the commonest label is as good"
        print(f"nothing is learnt yet: {what}; give more rows, more --max-steps or another --lr")
    print(report_labels(confusion, label_names))
    playground = os.path.join(os.path.dirname(sys.argv[0]), "playground.py")
    plain = [text for text in texts if text.isprintable() and not text.startswith("-")]
    question = visible(min(plain, key=len, default="A sentence."), 100)
    print("ask it:", shlex.join([sys.orig_argv[0], playground, "--model", str(args.output), question]))


def beside(output: Path, ending: str) -> Path:
    """A file that belongs to an output, a .pt file or a folder: run.json of run.pt, lr0.1.json of lr0.1."""
    return output.with_name(output.name.removesuffix(".pt") + ending)


# --- Flags and the machine -----------------------------------------------------------------------

GLUE = ("nyu-mll/glue", "sst2", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c")  # name, configuration, revision
DISTILBERT = ("distilbert/distilbert-base-uncased", "12040accade4e8a0f71eabdb258fecc2e7e948be")
LOCAL = {"model": "model/distilbert-base-uncased", "dataset": "dataset/glue_sst2_local"}  # where they exist
DEMO = {"model": "model/minilm-l6-distilbert", "dataset": "dataset/demo"}
RECIPES = {  # what becomes of the flags that are not given; measured in tests/figures/results/README.md
    "published": {"lr": 2e-4, "batch_size": 16, "epochs": 3, "warmup": 0.06},  # query and value
    "own": {"targets": ["all-linear"], "lr": 1e-3, "batch_size": 16, "epochs": 3, "warmup": 0.06},
    "best": {"targets": ["all-linear"], "lr": 1e-3, "batch_size": 32, "epochs": 2, "warmup": 0.06},
}
LEAST_STEPS = 400  # but for "published": fewer rows are seen more often
MANY_LABELS = 20  # but for "published": from there on the head has more to learn, and the rate is doubled
RANGES = {
    "r": (1, 65_536),
    "alpha": (0, 1e6),
    "dropout": (0, 0.99),
    "max_length": (3, 10**6),
}  # files', too
RANGES |= dict.fromkeys(["epochs", "max_steps", "train_samples", "log_every", "save_every"], (1, 10**8))
RANGES |= {"batch_size": (1, 10**6), "threads": (1, 1024), "seed": (0, 2**32 - 1), "warmup": (0, 1)}
RANGES |= {"lr": (0, 1e3), "weight_decay": (0, 1e3), "max_grad_norm": (0, 1e9)}
WITHOUT_HUB = "without the Hub: README, Set-up; or ./setup.sh --demo, then python lora_scratch.py --demo"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are one line, whatever was typed."""

    def error(self, message: str) -> None:
        raise InputError(f"{message}; see --help")


def make_parser(description: str, output: str) -> argparse.ArgumentParser:
    """The flags of both training scripts; `output` is where results go, {} the name of the data."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, usage="%(prog)s [options]", formatter_class=layout)
    parser.output = output
    add = parser.add_argument_group("model and data").add_argument
    add("--demo", action="store_true", help=f"without the Hub: {DEMO['model']} on {DEMO['dataset']}")
    add(
        "--model",
        help=f"base model, a folder or of the Hub ({LOCAL['model']} if there, else {DISTILBERT[0]})",
    )
    add("--revision", metavar="NAME", help="the Hub's revision of the base model (pinned for the default)")
    add("--dataset", help=f"file, folder or of the Hub ({LOCAL['dataset']} if there, else {GLUE[0]})")
    add(
        "--dataset-config", metavar="NAME", help=f"configuration of a Hub data set ({GLUE[1]} of {GLUE[0]})"
    )
    add("--text-column", metavar="NAME", help="(sentence, text, ... or the one of long texts)")
    add("--label-column", metavar="NAME", help="(label, class, ... or the one of few values)")
    add("--label-names", nargs="+", metavar="NAME", help="names for integer labels, in their order")
    add("--train-samples", type=int, metavar="N", help="train on N random rows (all)")
    add("--max-length", type=int, default=128, metavar="N", help="tokens; longer text is cut (128)")
    add = parser.add_argument_group("LoRA").add_argument
    add("--r", type=int, default=8, metavar="N", help="rank of the update (8)")
    add("--alpha", type=float, default=16.0, metavar="X", help="scaling = alpha / r (16)")
    add("--dropout", type=float, default=0.1, metavar="X", help="on the LoRA branch (0.1)")
    add("--targets", nargs="+", metavar="NAME", help="linear layers, or all-linear (by recipe)")
    add("--use-rslora", action="store_true", help="scaling = alpha / sqrt(r) instead")
    add("--freeze-head", action="store_true", help="leave the head as random as it starts")
    add = parser.add_argument_group("training").add_argument
    what = "published for SST-2, own for other data (auto); best for tens of thousands of rows"
    add("--recipe", choices=["auto", *RECIPES], default="auto", help=what)
    add(
        "--epochs", type=int, metavar="N", help="times through the data (3; best 2; own 1 from 20,000 rows)"
    )
    add("--max-steps", type=int, metavar="N", help="stop after N steps instead (own, best: at least 400)")
    add("--batch-size", type=int, metavar="N", help="sentences a step (16; best 32)")
    add("--lr", type=float, metavar="X", help="peak rate (published 2e-4, else 1e-3; 2e-3 from 20 labels)")
    add("--warmup", type=float, metavar="X", help="share of the steps, then decay (0.06)")
    add("--weight-decay", type=float, default=0.01, metavar="X", help="of AdamW (0.01)")
    add("--max-grad-norm", type=float, default=1.0, metavar="X", help="clipping; 0 means none (1)")
    add("--seed", type=int, default=42, metavar="N", help="of all randomness (42)")
    add = parser.add_argument_group("machine and output").add_argument
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="CUDA where there is one (auto)")
    what = "16 bits where the machine computes in them (auto)"
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help=what)
    add("--threads", type=int, metavar="N", help="of the CPU (PyTorch's choice)")
    add("--log-every", type=int, default=20, metavar="N", help="steps a report, 10 N in a log (20)")
    add("--save-every", type=int, default=500, metavar="N", help="steps a state for --resume (500)")
    add("--resume", action="store_true", help="continue from the state beside --output")
    add("--output", type=Path, metavar="PATH", help=f"where the result goes ({output.format('DATA')})")
    return parser


def parse_flags(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The flags, with the defaults that depend on --demo and on what this folder holds."""
    args = parser.parse_args(argv)
    for key, (low, high) in RANGES.items():
        value = getattr(args, key)
        if value is not None and not low <= value <= high:
            raise InputError(f"--{key.replace('_', '-')} {value} is not between {low} and {high}")
    for key, name in (("model", DISTILBERT[0]), ("dataset", GLUE[0])):
        default = DEMO[key] if args.demo else LOCAL[key] if Path(LOCAL[key]).is_dir() else name
        setattr(args, key, getattr(args, key) or default)
    if args.demo and args.model == DEMO["model"] and not Path(args.model).is_dir():
        raise InputError(f"--demo: no base model in {args.model} yet; ./setup.sh --demo makes it")
    if args.model == DISTILBERT[0]:
        args.revision = args.revision or DISTILBERT[1]
    if args.dataset == GLUE[0]:
        args.dataset_config = args.dataset_config or GLUE[1]
    if args.output is None:
        name = re.sub(r"\W+", "_", Path(args.dataset).stem)[:100] or "data"
        name = "distilbert_sst2" if args.dataset in (GLUE[0], LOCAL["dataset"]) else name
        args.output = Path(parser.output.format(name))
    return args


def choose_recipe(args: argparse.Namespace, rows: int, labels: int) -> argparse.Namespace:
    """The flags, with those that were not given by --recipe and the size of the data; prints them."""
    is_sst2 = args.dataset == GLUE[0] or Path(args.dataset).resolve() == Path(LOCAL["dataset"]).resolve()
    name = args.recipe if args.recipe != "auto" else "published" if is_sst2 else "own"
    recipe = RECIPES[name] | {"recipe": name}
    given = {key: value for key, value in vars(args).items() if value is not None and key != "recipe"}
    if name != "published" and labels >= MANY_LABELS:
        recipe["lr"] *= 2
    if name == "own" and rows >= 20_000:
        recipe["epochs"] = 1
    chosen = argparse.Namespace(**vars(args) | recipe | given)
    steps = chosen.epochs * math.ceil(rows / chosen.batch_size)
    if name != "published" and args.epochs is None and args.max_steps is None and steps < LEAST_STEPS:
        chosen.max_steps = LEAST_STEPS
    targets = " ".join(chosen.targets or ["query and value"]).replace("all-linear", "all linear")
    length = f"{chosen.max_steps} steps" if chosen.max_steps else f"{chosen.epochs} epochs"
    batch = f", batches of {chosen.batch_size}" if chosen.batch_size != 16 else ""
    size = f"{rows:,} rows, {labels:,} labels"
    print(f"{'recipe':12}{name}, {size}: {targets} layers, {chosen.lr:g}, {length}{batch}")
    return chosen


def check_output(output: Path, is_file: bool) -> None:
    """Refuse, before the training, what cannot be written, or would replace what this project did not write.

    Raises InputError that names the file: the result, its folder, its record or its training state.
    """
    shown, folder = visible(output), beside(output, "") if is_file else output
    if is_file and output.suffix != ".pt":
        raise InputError(f"--output {shown}: give a file name that ends in .pt")
    if folder.name in ("", ".", "..") or "\\" in output.name or not str(output).isprintable():
        raise InputError(f"--output {shown}: give the name of a new {'file' if is_file else 'folder'}")
    result = output if is_file else output / "lora_peft.json"
    files = [beside(output, ".json"), output.with_name(f"{output.name}.state"), result]
    with refusing(f"--output {shown}: cannot write there", "name another place"):
        output.parent.mkdir(parents=True, exist_ok=True)
        for path in files:
            if (path.exists() or path.is_symlink()) and not is_ours(path):
                raise InputError(
                    f"--output: {path} exists and is no result of this project; name another place"
                )
        if folder.exists() and not (folder.is_dir() and (result.exists() or not any(folder.iterdir()))):
            raise InputError(
                f"--output: {folder} exists and is no result of this project; name another place"
            )
        for path in [*files[: 2 + is_file], *([folder / "tokenizer.json"] if folder.is_dir() else [])]:
            probe = path.resolve().with_name(f".{path.name}.{os.getpid()}.tmp")
            probe.touch()
            probe.unlink()


def is_ours(path: Path) -> bool:
    """Whether this file's content says that this project wrote it."""
    try:
        with refusing(f"{path}: not readable", "name another"):
            found = json.loads(path.read_text("utf-8")) if path.suffix == ".json" else read_tensors(path)
            kinds = (
                {"format", "state_dict"},
                {"format", "trained"},
                {"format", "base"},
                {"settings", "epochs"},
            )
            return any(keys <= found.keys() for keys in kinds)
    except InputError:
        return False


def prepare_machine(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and the type to compute in; sets threads and seed, and meets torchrun's other processes."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    dtype = choose_precision(args.precision, device)
    if dist.is_torchelastic_launched():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    return device, dtype


def choose_device(name: str) -> torch.device:
    """--device as a device; auto takes CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA GPU here; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of the frozen weights and of the arithmetic; LoRA, head, loss and optimiser stay float32."""
    if name == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16 needs a CUDA GPU; use fp32 or bf16 on the CPU")
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":  # bfloat16 since Ampere, before that float16
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    able = torch.cpu.get_capabilities()  # what the processor multiplies in bfloat16 by itself, if it does
    bfloat16 = any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return torch.bfloat16 if bfloat16 else torch.float32


# --- Mistakes ------------------------------------------------------------------------------------


class InputError(ValueError):
    """A mistake in what the user gave us: one line that names the value and the remedy."""


@contextlib.contextmanager
def refusing(what: object, remedy: str) -> Iterator[None]:
    """Whatever a file from outside makes impossible in here becomes one line: `what` (why); the remedy."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"{what} ({reason(error)}); {remedy}") from error


def reason(error: BaseException) -> str:
    """What an exception says, on one line; libraries often give the reason in their third."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = "" if type(error) is ValueError or isinstance(error, OSError) else type(error).__name__
    return visible(": ".join(filter(None, [kind, " ".join(lines)])), 400)


def visible(value: object, width: int = 200) -> str:
    """Text on one line of a terminal, to which control characters could do anything."""
    text = str(value)
    shown = "".join(c if c.isprintable() else "\ufffd" for c in text[: width + 1])
    return shown if len(text) <= width else shown[: width - 1] + "…"


def listed(values: Sequence, most: int = 20) -> str:
    """Values in words, as many as a line can take."""
    shown = [visible(value, 40) for value in values[:most]]
    more = [f"… ({len(values):,} in all)"] if len(values) > most else []
    return ", ".join(shown + more)


def note(text: str) -> None:
    """Say on standard error what a user would want to know, and go on."""
    print(f"note: {visible(text, 500)}", file=sys.stderr)


def run(main: Callable[[], int | None]) -> None:
    """Call `main`; a mistake of the user's becomes one line on standard error and exit code 2."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - where it is closed, as with >&-
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    with contextlib.suppress(AttributeError):  # a notebook's has no encoding
        sys.stdout.reconfigure(errors="replace")
    quiet = (
        dist.is_torchelastic_launched() and os.environ.get("RANK", "0") != "0"
    )  # the first process speaks
    try:
        with contextlib.redirect_stdout(None if quiet else sys.stdout):
            code = main()
            if sys.stdout:
                sys.stdout.flush()
        sys.exit(code)
    except KeyboardInterrupt:  # before or after the training: nothing is to be saved
        sys.exit(130)
    except BrokenPipeError:  # a reader that has enough, as in `| head`; Python flushes once more at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except InputError as error:
        mistake = error
    except (MemoryError, torch.OutOfMemoryError):
        mistake = "the memory is full; lower --batch-size or --max-length, or use less data"
    except OSError as error:  # a folder without rights, a full disk, a current folder that is gone
        mistake = (
            f"{error.filename or 'this machine'}: {error.strerror or reason(error)}; name another place"
        )
    print("error:", visible(mistake, 2000), file=sys.stderr)
    sys.exit(2)


# --- Faster --------------------------------------------------------------------------------------


def speed_up(base: Base, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Make a base model quick, with or without LoRA in it; the answers stay the same but for rounding.

    The frozen weights are held in the type that is computed in: autocast would cast them at every step.
    The last layer computes [CLS] alone, dropout masks are cheap, and oneDNN multiplies on AMD. Returns
    the model.
    """
    for name, parameter in base.model.named_parameters():
        if name not in base.head and not any(part in name for part in ("lora_", "modules_to_save")):
            parameter.data = parameter.data.to(dtype)
    compute_cls_only(base.model)
    able = torch.cpu.get_capabilities()
    is_amd = "AMD" in str(able.get("cpu_name")) and able.get("avx512_f")
    for module in base.model.modules():  # the same layers, tensors and all, of another class
        if type(module) is nn.Dropout and not module.inplace:
            module.__class__ = CheapDropout
        if type(module) is nn.Linear and is_amd and torch.backends.mkldnn.is_available():
            module.__class__ = OneDNNLinear
    return base.model


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The type in which the base is held: that of its embeddings, the first parameter."""
    return next(model.parameters()).dtype


def autocast(model: nn.Module) -> torch.autocast:
    """Compute in the type in which the base is held; what is trained stays float32."""
    dtype = compute_dtype(model)
    return torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32)


def compute_cls_only(model: nn.Module) -> None:
    """Let the last layer compute [CLS] alone, all that the head reads: 14 % less work for DistilBERT.

    With BERT, RoBERTa, ELECTRA and MPNet this begins after attention: two thirds of the layer's weights.
    The logits change by rounding only (under 1e-6): keys and values still come from every token.
    Does nothing to a model whose last layer is of another kind.
    """
    config = model.config
    if config.model_type in ("bert", "roberta", "electra", "mpnet") and config.num_hidden_layers:
        if not getattr(config, "chunk_size_feed_forward", 0):  # else the layer wants a multiple of it
            attention = model.base_model.encoder.layer[-1].attention
            attention.register_forward_hook(lambda _, inputs, output: (output[0][:, :1], *output[1:]))
        return
    blocks = [module for module in model.modules() if type(module).__name__ == "TransformerBlock"]
    is_plain = getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
    if config.model_type != "distilbert" or not blocks or not is_plain:
        return
    block, attention = blocks[-1], blocks[-1].attention

    def by_head(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attention.n_heads, -1)).transpose(1, 2)  # (batch, heads, tokens, head size)

    def forward(hidden: Tensor, attention_mask: Tensor | None = None, **_) -> Tensor:
        cls = hidden[:, :1]  # (batch, 1, dim)
        query = by_head(attention.q_lin(cls))
        key = by_head(attention.k_lin(hidden))
        value = by_head(attention.v_lin(hidden))
        mask = None if attention_mask is None else attention_mask[:, :, :1]
        dropout = attention.dropout.p if block.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        mixed = attention.out_lin(mixed.transpose(1, 2).flatten(2))
        cls = block.sa_layer_norm(mixed + cls)
        return block.output_layer_norm(block.ffn(cls) + cls)

    block.forward = forward


class CheapDropout(nn.Dropout):
    """Dropout from 16 random bits an element; PyTorch's own draws cost up to a third of a step on a CPU.

    The rate is met to 1/131,072. Elsewhere than on a CPU it is PyTorch's.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.device.type != "cpu" or not 0 < self.p <= 0.99:
            return super().forward(x)
        draws = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)  # 64 bits each
        draws = draws.view(torch.int16)[: x.numel()].view(x.shape)  # uniform from -32,768 to 32,767
        kept = torch.ge(draws, round(65_536 * self.p) - 32_768, out=torch.empty_like(x))  # 0 or 1
        return x * kept.div_(1 - self.p)


class FrozenProduct(torch.autograd.Function):
    """x (rows, in) → x Wᵀ + b (rows, out) in float32 by oneDNN; W (out, in) and b get no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        product = torch.ops.mkldnn._linear_pointwise(
            gradient.contiguous(), weight.t(), None, "none", [], ""
        )
        return product, None, None  # (rows, in)


class OneDNNLinear(nn.Linear):
    """A linear layer that lets oneDNN multiply wherever its weight is not trained, in float32 on the CPU.

    PyTorch gives float32 products to MKL, which leaves AVX512 unused on AMD's processors: with oneDNN 1.6
    times as many sentences a second. Products in bfloat16 go there by themselves.
    """

    def forward(self, x: Tensor) -> Tensor:
        is_trained = self.weight.requires_grad and torch.is_grad_enabled()
        types = {x.dtype, self.weight.dtype, x.device.type, self.weight.device.type}
        if is_trained or types != {torch.float32, "cpu"} or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        rows = FrozenProduct.apply(x.reshape(-1, self.in_features), self.weight, self.bias)
        return rows.view(*x.shape[:-1], self.out_features)  # made out here, so it may be changed in place


if __name__ == "__main__":
    run(main)
