"""LoRA from scratch: fine-tune DistilBERT on SST-2 through 147,456 parameters and a new head.

LoRA (Hu et al., arXiv:2106.09685) leaves a pretrained linear layer frozen. Two small matrices beside
it learn a correction of rank r:

    y = W x + b + (alpha / r) · B A x        W (out, in) frozen, A (r, in) and B (out, r) trained

B starts at zero, so training starts from exactly the pretrained encoder. Only A, B and the
classification head are saved: 3 MB instead of 268. Merged, W + (alpha / r) · B A is a plain layer.
Down to the line PLUMBING this is the whole idea; below is what a tool needs.

    python lora_scratch.py --freeze-head             # DistilBERT on SST-2, A and B alone: 0.22 %
    python lora_scratch.py --dataset reviews.csv     # your own sentences
    python lora_scratch.py --demo                    # a minute, without the Hub
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from unicodedata import category
from zipfile import ZipFile

if "OMP_WAIT_POLICY" not in os.environ:  # threads that wait sleep soon, for a busy machine
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
if not all(map(find_spec, ("torch", "transformers", "datasets"))):
    ArgumentParser().exit(2, "error: packages missing; ./setup.sh, then source .venv/bin/activate\n")
import numpy
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

# === The method ===============================


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained low-rank update beside it (LoRA, section 4.1).

    x (..., in) → W x + b + scaling · B A dropout(x) (..., out)

    base     the pretrained layer; it stays as it is
    r        the rank, at least 1: A is (r, in), B is (out, r), both float32
    alpha    scaling = alpha / r, so a rate fits any r; use_rslora: alpha / √r (arXiv:2312.03732)
    dropout  on A's input; the base keeps its own
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout=0.0, use_rslora=False):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.scaling = alpha / math.sqrt(r) if use_rslora else alpha / r
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))  # zero: no change; B moves, then A
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear: uniform in ±1/√in

    def forward(self, x: Tensor) -> Tensor:
        low_rank = F.linear(self.dropout(x), self.lora_A)  # (..., r): A x
        return self.base(x) + self.scaling * F.linear(low_rank, self.lora_B)  # (..., out)

    def __getattr__(self, name: str):  # for Longformer
        return getattr(self.base, name) if name in ("weight", "bias") else super().__getattr__(name)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain linear layer that answers as this one in eval mode: W + scaling · B A."""
        merged = copy.deepcopy(self.base).float()
        merged.weight += self.scaling * self.lora_B @ self.lora_A
        return merged


# The query and value projections, as in section 4.2 of the paper
DEFAULT_TARGETS = {"distilbert": ["q_lin", "v_lin"], "mpnet": ["q", "v"]}
DEFAULT_TARGETS |= {name: ["query", "value"] for name in ("bert", "roberta", "electra")}


def find_targets(model, head: list[str], targets: list[str] | None, layers=None) -> list[str]:
    """Paths of the linear layers whose own name is one of `targets`, outside the head.

    Names are compared whole: "lin" is not "q_lin". ["all-linear"] means every one, None the default
    of the architecture; `layers`: in so many upper layers. `head` names the head's parameters.
    InputError for other targets.
    """
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    linear = [path for path in linear if f"{path}.weight" not in head]
    names = sorted({path.split(".")[-1] for path in linear})
    lowest = model.config.num_hidden_layers - (layers or math.inf)
    number = re.compile(r"layers?\.(\d+)\.|$")  # or none
    linear = [path for path in linear if int(number.search(path)[1] or 0) >= lowest]
    if targets == ["all-linear"] and linear:
        return linear
    targets = targets or DEFAULT_TARGETS.get(model.config.model_type, [])
    found = [path for path in linear if path.split(".")[-1] in targets]
    unknown = sorted({*targets}.difference(path.split(".")[-1] for path in found))
    if unknown or not targets:
        what = f"no linear layer {unknown[0]!r}" if unknown else "no default"
        raise InputError(f"{model.config.model_type}: {what}; see --layers, --targets: {listed(names)}")
    return found


def inject_lora(
    model, head, targets=None, r=8, alpha=16.0, dropout=0.1, use_rslora=False, layers=None, train_head=True
) -> list[str]:
    """Wrap the target layers in LoRALinear, freeze all but the head, which is new; return the paths."""
    wrapped = find_targets(model, head, targets, layers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(train_head and name in head)
    for path in wrapped:  # A and B train
        model.set_submodule(path, LoRALinear(model.get_submodule(path), r, alpha, dropout, use_rslora))
    return wrapped


def merge_lora(model: nn.Module) -> nn.Module:
    """Replace every LoRALinear by its merged plain layer; return the model."""
    for path, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(path, module.merge())
    return model


# === Training =================================


def train(
    model: nn.Module, train_set: Tokens, eval_set: Tokens, args: Namespace, state: TrainingState
) -> None:
    """Train what requires a gradient, from where `state` stands; it keeps the results."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    steps_per_epoch = math.ceil(len(train_set) / args.batch_size)
    total_steps = args.max_steps or args.epochs * steps_per_epoch
    scaler = torch.amp.GradScaler(model.device.type, enabled=model.base_model.dtype == torch.float16)
    first_step = state.begin(total_steps, steps_per_epoch, optimizer, scaler)  # 0, or --resume's

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
                output = model(**inputs, output_hidden_states=True)
            loss = weight * F.cross_entropy(output.logits.float(), labels, reduction="sum")
            alike = weight * args.contrast * contrast(output, inputs, labels)  # SST-2: 0
            scaler.scale(loss + alike).backward()
            sum_over_processes(*(p.grad for p in parameters))  # under torchrun
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)  # 0: no clipping
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            # ---- the rest reports, evaluates and saves ----

            state.losses[step] = sum_over_processes(loss.detach())
            done = step + 1
            epoch_ended = batch_number + 1 == steps_per_epoch or done == total_steps
            if epoch_ended or done % args.log_every == 0:
                state.report(done)
            if epoch_ended:
                state.end_epoch(done, predict(model, eval_set, 2 * args.batch_size))
            if epoch_ended or state.stopped or done % args.save_every == 0:
                state.save(done)
            if state.stopped:
                break


def warmup_then_decay(step: int, total_steps: int, warmup: float) -> float:
    """The share of --lr at a step: up from zero, then down to zero, both linear."""
    up = round(warmup * total_steps)
    return step / up if step < up else (total_steps - step) / max(1, total_steps - up)


@torch.inference_mode()
def predict(model: nn.Module, sentences: Tokens, batch_size: int) -> Tensor:
    """Logits (sentences, labels) in float32, in the order given."""
    model.eval()
    logits = torch.zeros(len(sentences), model.config.num_labels)
    for batch in make_batches(sentences.lengths, batch_size):
        with autocast(model):
            logits[batch] = model(**collate(sentences, batch, model)).logits.float().cpu()
    return logits


def make_batches(lengths: list[int], batch_size: int, shuffle_seed: int | None = None) -> list[list[int]]:
    """Turn sentence lengths into batches of indices with little padding.

    With a seed: shuffle, sort by length in windows of 50 batches (or half the table: epochs differ),
    shuffle the batches. They compute 1.04 times the real tokens of SST-2, unsorted ones 2.6 times.
    Without one: longest first, so that a batch too large for the memory fails at once.
    """
    window, order = max(1, len(lengths)), range(len(lengths))
    if shuffle_seed is not None:
        generator = torch.Generator().manual_seed(shuffle_seed)
        order = torch.randperm(len(lengths), generator=generator).tolist()
        window = batch_size * min(50, max(1, len(lengths) // batch_size // 2))
    batches = []
    for start in range(0, len(order), window):
        by_length = sorted(order[start : start + window], key=lambda i: -lengths[i])
        batches += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    if shuffle_seed is not None:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
    return batches


def collate(sentences: Tokens, batch: list[int], model: nn.Module) -> dict[str, Tensor]:
    """The batch, padded to its longest: input_ids and attention_mask (sentences, tokens)."""
    ids = [torch.from_numpy(sentences.ids[i]).long() for i in batch]
    padded = pad_sequence(ids, batch_first=True, padding_value=model.config.pad_token_id)
    mask = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
    return {"input_ids": padded.to(model.device), "attention_mask": mask.to(model.device)}


# === The run ==================================


def fit(args: Namespace, machine, about: dict, train_rows, eval_rows) -> tuple[Base, TrainingState]:
    """Train an adapter on some rows; judge every epoch by others."""
    device, dtype = machine
    torch.manual_seed(args.seed)
    base = load_base(args.model, args.revision, about["label_names"], args.max_length)
    train_set = tokenize(train_rows["text"], base.tokenizer, args.max_length, train_rows["label"])
    eval_set = tokenize(eval_rows["text"], base.tokenizer, args.max_length, eval_rows["label"])
    lora = {key: getattr(args, key) for key in LORA_FACTS}
    wrapped = inject_lora(base.model, base.head, **lora, train_head=not args.freeze_head)
    model = speed_up(base, dtype).to(device)  # the frozen weights in `dtype`
    facts = adapter_facts(args, base, about, wrapped)  # what rebuilding needs beside the tensors
    record = describe(args, dict(model.named_parameters()), base.head, wrapped, dtype)

    state = TrainingState(args, model, facts, record, train_set, eval_set)
    train(model, train_set, eval_set, args, state)
    return base, state


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(make_parser(__doc__, "model/lora_scratch_{}.pt"), argv)
    check_output(args, is_file=True)
    device, dtype = machine = prepare_machine(args)
    train_rows, eval_rows, about = load_tables(args)
    args = choose_recipe(args, len(train_rows), len(about["labels"]))  # rate, steps, targets
    unseen = cross_validate(fit, args, machine, about, train_rows) if args.folds else None

    base, state = fit(args, machine, about, train_rows, eval_rows)
    rows, logits = unseen or (eval_rows, predict(state.model, state.eval_set, 32))
    state.record |= calibrate(state.model, logits, rows["label"])
    tensors = tensors_to_save(state.model.state_dict(), base.head)
    save_checkpoint(args.output, tensors, state.facts | {"record": state.record}, base.tokenizer)
    reloaded, _ = load_checkpoint(args.output)  # what is judged is the file
    model = speed_up(reloaded, dtype).to(device)
    finish(args, state.record, about, *(unseen or (eval_rows, predict(model, state.eval_set, 32))))


# === PLUMBING: what a tool needs and the idea does not ===

# --- The base model ---------------------------


@dataclass
class Base:
    model: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    head: list[str]  # names of the parameters that no base model brings along
    identity: dict  # see identify
    revision: str | None  # the Hub's commit


def load_base(name: str, revision: str | None, label_names: list[str], max_length: int) -> Base:
    """The encoder in float32 with a new random head; InputError if it does not fit."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    is_local = Path(name).is_dir()
    remedy = "see --model (playground.py: --base) and --max-length"
    with refusing(f"cannot use the base model {name!r}", remedy if is_local else WITHOUT_HUB):
        folder = Path(name) if is_local else fetch_base(name, revision)
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config.id2label = dict(enumerate(label_names))
        config.label2id = {label: i for i, label in enumerate(label_names)}
        config.problem_type = "single_label_classification"  # whatever it was trained for
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.truncation_side = "right"
        pads_right = tokenizer.pad_token_id is not None and tokenizer.padding_side == "right"
        reads = tokenizer(ODD)["input_ids"] != tokenizer("")["input_ids"]
        is_encoder = not config.is_encoder_decoder and 0 < config.num_hidden_layers <= 200
        if not (is_encoder and pads_right and reads):
            raise ValueError("no encoder of 1 to 200 layers that reads and pads right")
        options = {"config": config, "dtype": torch.float32, "ignore_mismatched_sizes": True}
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        model, report = load(folder, trust_remote_code=False, **options, output_loading_info=True)
        model.config.pad_token_id = tokenizer.pad_token_id
        model.name_or_path = name  # not the cache's folder: PEFT writes it down
        encoder = f"{model.base_model_prefix}."
        names = {name for name, _ in model.named_parameters()}
        head = sorted(n for n in names if not n.startswith(encoder) or ".pooler." in n)
        unfit = report["missing_keys"] | {key for key, *_ in report["mismatched_keys"]}
        wrong = unfit & names.difference(head)
        unread = [key for key in report["unexpected_keys"] if "decoder" not in key]
        wrong |= {key for key in unread if re.search(r"layers?\.\d+\.", key)}
        if wrong:
            raise ValueError(f"weights do not fit config.json: {', '.join(sorted(wrong)[:3])}")
        identity = identify(model, tokenizer, head, max_length)
    return Base(model, tokenizer, head, identity, None if is_local else folder.name)


def fetch_base(name: str, revision: str | None) -> Path:
    """A commit's folder in the Hub's cache; what it has is not requested."""
    from huggingface_hub import snapshot_download

    use_cache_if_offline()
    for weights in ("model*.safetensors", "pytorch_model*.bin"):
        kinds = ["*.json", "*.txt", "*.model", "*.codes", weights]
        folder = snapshot_download(name, revision=revision, allow_patterns=kinds, ignore_patterns="*/*")
        if any(Path(folder).glob(weights)):
            break
    return Path(folder)


@torch.random.fork_rng([])  # as if no dropout were tried
@torch.inference_mode()
def identify(model: nn.Module, tokenizer: Callable, head: list[str], max_length: int) -> dict:
    """Digests of weights and words, and part of an answer, which other settings change."""
    digest = sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name not in head:
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            digest.update(parameter.contiguous().numpy())
            if not parameter.isfinite().all():
                raise ValueError(f"{name} has NaN or infinity in it")
    numbers, ids = tokenizer.get_vocab(), tokenizer([ODD])["input_ids"]
    words = json.dumps([sorted(numbers.items()), ids]).encode()
    longest = torch.full((1, max_length), max(numbers.values()))
    if not model.train()(longest).logits.isfinite().all():
        raise ValueError("its answers are not finite")
    answer = model.eval().base_model(torch.tensor(ids)[:, : min(16, max_length)])[0][0, 0, :8]
    found = {"fingerprint": digest.hexdigest(), "tokenizer": sha256(words).hexdigest()}
    return found | {"answer": answer.tolist()}


def find_trained_base(facts: dict, base_name: str | None) -> Base:
    """The base of a checkpoint, now at `base_name`; InputError for another one."""
    name, revision = (base_name, None) if base_name else (facts["base"], facts["revision"])
    base = load_base(name, revision, facts["label_names"], facts["max_length"])
    now, then = base.identity, base.identity | facts  # old files have no answer
    differs = [key for key in ("fingerprint", "tokenizer") if then[key] != now[key]]
    if differs or not numpy.allclose(then["answer"], now["answer"], rtol=0, atol=1e-4):
        what = f"{name!r} is not {facts['base']!r} as it was in training"
        raise InputError(f"{what} ({listed(differs) or 'config.json'}); name that one")
    return base


def use_cache_if_offline() -> None:
    """Let the first request ask for 5 seconds; else each tries half a minute."""
    from multiprocessing.pool import ThreadPool  # to look up a name obeys no timeout

    from huggingface_hub import constants, set_client_factory, utils

    def connect():
        client, answer = utils._http.default_client_factory(), None
        with contextlib.suppress(Exception), ThreadPool(1) as pool:  # no network, no such name
            ask = pool.apply_async(client.head, [constants.ENDPOINT], {"timeout": 5})
            answer = ask.get(5)
        constants.HF_HUB_OFFLINE = answer is None or answer.status_code >= 500
        return client

    constants.HF_HUB_DISABLE_TELEMETRY = True  # it asks, too
    utils.logging.set_verbosity_error()  # a refusal is one line
    set_client_factory(connect)


# --- Tables -----------------------------------

DataFrame = "pandas.DataFrame"  # in annotations; to import it takes half a second
FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".xlsx")
SPLITS = dict.fromkeys(["train", "training"], "training")  # by how a file's name starts
SPLITS |= dict.fromkeys(["validation", "valid", "val", "dev"], "validation")
TEXTS = "sentence text review comment message title content body description tweet query"
LABELS = "label labels class category sentiment intent stars rating topic target emotion"


@dataclass
class Tokens:
    ids: list[numpy.ndarray]  # of each sentence (tokens,), int32: smaller than lists
    labels: Tensor  # (sentences,), zeros where unknown

    def __post_init__(self):
        self.lengths = list(map(len, self.ids))

    def __len__(self) -> int:
        return len(self.ids)


def tokenize(texts: list[str], tokenizer: Callable, max_length: int, labels=None) -> Tokens:
    """The texts as token numbers, cut at `max_length`; at least padding."""
    texts, ids, cut = list(texts), [], 0
    nothing = [tokenizer.pad_token_id]
    for start in range(0, len(texts), 1000):  # what a tokenizer returns is large
        found = tokenizer(texts[start : start + 1000], truncation=True, max_length=max_length)
        ids += [numpy.array(one or nothing, dtype=numpy.int32) for one in found["input_ids"]]
        cut += sum(bool(encoding.overflowing) for encoding in found.encodings or [])
    if cut:
        note(f"{cut:,} of {len(texts):,} texts are cut: see --max-length {max_length}")
    labels = [0] * len(ids) if labels is None else [*labels]
    return Tokens(ids, torch.tensor(labels, dtype=torch.int64))


def load_tables(args: Namespace) -> tuple[DataFrame, DataFrame, dict]:
    """Rows to train on and rows to validate by (text, label number), and about both."""
    where, tables = args.dataset, read_splits(args)
    if "training" not in tables:  # a folder for each label, say
        raise InputError(f"{where}: no training split; put texts and labels into train.csv")
    columns = find_columns(where, tables["training"], args.text_column, args.label_column)
    rows = {split: read_rows(f"{where}: {split}", t, *columns) for split, t in tables.items()}
    train, held = rows["training"], rows.get("validation", rows["training"][:0])
    about = number_labels(args, columns, train, held)
    note_surprises(where, train, held)
    numbers = {label: number for number, label in enumerate(about["labels"])}
    train, held = (part.assign(label=part["label"].map(numbers)) for part in (train, held))
    train = train.sample(frac=1, random_state=args.seed)[: args.train_samples]
    if held.empty and not args.folds:
        is_sure = train.groupby("text")["label"].transform("nunique") == 1
        is_sure &= train.groupby("label")["text"].transform("nunique") > 1
        is_held = train["text"].isin(draw_texts(train[is_sure], args.seed, every=10))
        train, held = train[~is_held], train[is_held]
        if held.empty:
            raise InputError(f"{where}: too few texts; give a dev split")
        print(f"{visible(where)}: {len(held):,} rows, drawn by --seed, are held out")
    return train.sort_index(), held.sort_index(), about


def draw_texts(rows: DataFrame, seed: int, every: int, first: int = 0) -> list[str]:
    """One of `every` parts of the texts, drawn by seed, with its share of every label."""
    texts = rows.sample(frac=1, random_state=seed).drop_duplicates("text")
    return [*texts.sort_values("label", kind="stable")["text"][first::every]]


def read_splits(args: Namespace) -> dict[str, DataFrame]:
    """The splits of a file, a folder or a data set of the Hub."""
    import pandas

    path, files, tables = Path(args.data), {}, {}
    if path.is_file() or is_table(path):
        return {"training": read_file(path)}
    is_saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    if is_saved or not path.is_dir():
        return load_data_set(args)
    for file in filter(is_table, sorted([*path.glob("*"), *path.glob("data/*")])):
        if split := SPLITS.get(re.split("[-.]", file.name.lower())[0]):
            files.setdefault(split, []).append(file)
    for split, parts in files.items():
        names = [part.name for part in parts]
        found = re.findall(r"-\d+-of-\d+", " ".join(names))  # train-00000-of-00002.parquet
        whole = [f"-{i:05d}-of-{len(parts):05d}" for i in range(len(parts))]
        if found != whole and (found or len(parts) > 1):
            raise InputError(f"{path}: not one file, or all parts of it: {listed(names)}")
        tables[split] = pandas.concat(map(read_file, parts), ignore_index=bool(found))
    return tables


def load_data_set(args: Namespace) -> dict[str, DataFrame]:
    """The splits of a data set of the Hub, or of a folder that save_to_disk wrote."""
    use_cache_if_offline()
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    with refusing(f"cannot load the data set {args.dataset!r}", WITHOUT_HUB):
        if Path(args.data).is_dir():
            data = datasets.load_from_disk(args.data)
        else:
            pinned = GLUE[2] if args.dataset == GLUE[0] else None
            data = datasets.load_dataset(args.dataset, args.dataset_config, revision=pinned)
        parts = {"train": data} if isinstance(data, datasets.Dataset) else data
        tables = {name: parts[name].with_format("arrow")[:] for name in parts if name in SPLITS}
        return {SPLITS[name]: as_frame(table) for name, table in tables.items()}


def is_table(path: Path | None) -> bool:
    return str(path).lower().removesuffix(".gz").endswith(FORMATS)


def read_file(path: Path) -> DataFrame:
    """A file as a table, "NA" as text; attrs: separator, mark, header, class_names."""
    import csv
    import io

    import pandas
    from pyarrow import parquet

    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    with refusing(f"{path}: cannot be read", f"correct it or give another: {listed(FORMATS)}"):
        if not is_table(path) or not (path.is_file() or path.is_dir()):  # a pipe can hang
            raise ValueError("no table" if path.exists() else "no such file")
        if kind == "parquet":  # or Spark's folder
            table = as_frame(parquet.read_table(path))
        elif kind == "xlsx":
            table = pandas.read_excel(path, dtype=str, na_filter=False, engine="openpyxl")
            table.index += 1
        elif kind in ("json", "jsonl"):
            rows = read_json(path)  # NA: what a row does not have; NaN is a value
            names = {name: pandas.NA for row in rows for name in row}
            table = pandas.DataFrame([names | row for row in rows], dtype=object)
        else:
            text, is_marked = read_text(path)
            text = text if "\n" in text else text.replace("\r", "\n")
            _, said, text = re.split(r"^[\r\n]*(?:sep=(.)[\r\n]+)?", text, maxsplit=1)  # Excel
            sep = said or max(",;\t", key=re.sub('"[^"]*"', "", text.partition("\n")[0]).count)
            how = {"header": None, "dtype": str, "na_filter": False, "skip_blank_lines": False}
            if kind == "tsv":  # as GLUE writes it: a quotation mark is text
                sep, text = "\t", text.replace("\r\n", "\n")
                how |= {"quoting": csv.QUOTE_NONE, "lineterminator": "\n"}
            csv.field_size_limit(sys.maxsize)
            loose, rows = (csv.reader(io.StringIO(text, newline=""), delimiter=sep, strict=x) for x in (0, 1))
            spans_lines = kind == "csv" and len([*loose]) < text.count("\n")
            try:
                sum(map(len, rows if spans_lines else []))  # reads them all
            except csv.Error:  # else the rows up to the next mark are one
                how["quoting"] = csv.QUOTE_NONE
                note(f"{path}: line {rows.line_num}: a stray quotation mark; all are text")
            table = pandas.read_csv(io.StringIO(text), sep=sep, **how)
            table = table[1:].set_axis(table.iloc[0], axis=1)
            table.attrs = {"separator": sep, "mark": is_marked}
    names = [str(name).strip() for name in table.columns]
    names = [f"{n} (column {i + 1})" if n in names[:i] else n for i, n in enumerate(names)]
    table.attrs["header"] = [*map(str, table.columns)]
    return table.set_axis(names, axis=1)


def read_text(path: Path) -> tuple[str, bool]:
    """A file's text, and whether it wants a mark; ValueError for a binary one."""
    import gzip

    content = path.read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    try:
        text = content.decode(codec := json.detect_encoding(content))
    except UnicodeDecodeError as error:
        text = content.decode(codec := "cp1252")
        line = content.count(b"\n", 0, error.start) + 1
        note(f"{path}: line {line} is not UTF-8; read as Windows-1252")
    if "\0" in text:
        raise ValueError("no text")
    return text, codec != "utf-8"


def read_json(path: Path) -> list[dict]:
    """The rows: one object a line, a list, or an object with one list of objects."""
    text = re.sub(r"}[ \t]*[\r\n]\s*{", "},\n{", read_text(path)[0])  # between lines
    rows = json.loads(f"[{text}]")
    json.dumps(rows, ensure_ascii=False).encode()  # half characters are no text
    parts = rows[0].values() if len(rows) == 1 and isinstance(rows[0], dict) else rows
    lists = [part for part in parts if isinstance(part, list) and {*map(type, part)} == {dict}]
    return [{**row} for row in (lists[0] if len(rows) == len(lists) == 1 else rows)]


def as_frame(table) -> DataFrame:
    """An Arrow table as one of pandas with the same values."""
    import pandas

    frame = table.to_pandas(types_mapper=pandas.ArrowDtype, ignore_metadata=True)
    about = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    json.dumps(about, ensure_ascii=False).encode()
    kinds = about.get("info", {}).get("features", {}).items()
    frame.attrs["class_names"] = {n.strip(): [*map(str, k["names"])] for n, k in kinds if "names" in k}
    return frame


def find_columns(where: str, table: DataFrame, text=None, label=None) -> tuple[str, str]:
    """The columns of text and label: those given, or found."""
    columns = text, label
    text = text or choose_column(where, table, "text", taken=label)
    label = label or choose_column(where, table, "label", taken=text)
    if text == label:
        raise InputError(f"{where}: {text!r} cannot be text and label; see --label-column")
    others = listed([name for name in table if name not in ("", text, label)])
    if columns != (text, label) and (text, label, others) != ("sentence", "label", ""):
        unread = f"; not read: {others}" if others else ""
        note(f"{where}: {text!r} is the text, {label!r} the label{unread}")
    return text, label


def choose_column(where: str, table: DataFrame, what: str, taken: str | None = None) -> str:
    """The column of text or label: of a usual name or, of two, the longer or other."""
    usual = (TEXTS if what == "text" else LABELS).split()
    every = [n for n in table if n[:1].strip() and not n.startswith("Unnamed:")]
    names = [name for name in every if name != taken]
    found = [n for n in names if n.lower() == usual[0]] or [n for n in names if n.lower() in usual]
    if not found and len(every) <= 2:
        names = [n for n in names if n.lower() not in f"{TEXTS} {LABELS}".split()]
        found = sorted(names, key=lambda name: sum(table[name].map(str).map(len)))[-1:]
        again = [n for n in every if n not in found and n in table[n].map(str).str.strip().tolist()]
        if again and not taken and every != ["0", "1"]:  # which pandas writes
            raise InputError(f"{where}: put names above {listed(every)}, or say --text-column")
    if len(found) != 1:
        raise InputError(f"{where}: which of {listed(found or every)} is the {what}? See --{what}-column")
    return found[0]


def is_blank(text: str) -> bool:
    return all(c.isspace() or category(c) in ("Cc", "Cf") for c in text)  # without width


def read_rows(where: str, table: DataFrame, text: str, label: str | None = None) -> DataFrame:
    """Text and label of the rows, as text; a header is row 1."""
    columns = [text, label or text]
    if missing := [name for name in columns if name not in table]:
        raise InputError(f"{where}: no column {missing[0]!r}; name one of {listed([*table])}")
    rows, lists = table[columns].astype(object), (list, numpy.ndarray)
    rows.columns, rows.index = ["text", "label"], rows.index + 1
    rows = rows.map(lambda v: v[0] if isinstance(v, lists) and len(v) == 1 else v)
    no_text = rows.isna() | rows.map(lambda v: isinstance(v, (*lists, dict, bytes)))
    rows = rows.mask(no_text, "").map(str).astype(object)
    labels = rows["label"].str.strip().str.normalize("NFC")
    labels = labels.str.replace(r"^(-?\d+)\.0+$", r"\1", regex=True)  # 1.0 is 1
    if class_names := table.attrs.get("class_names", {}).get(label):  # -1 is unlabelled
        labels = labels.map({str(i): name for i, name in enumerate(class_names)}).fillna("")
    rows["label"], rows.attrs["class_names"] = labels, class_names
    blank = rows.index[rows["text"].map(is_blank) | labels.map(is_blank)]
    what = f"{where}: {len(blank):,} of {len(rows):,} rows without text or label"
    if len(blank) == len(rows):
        raise InputError(f"{what}; give one")
    if len(blank):
        note(f"{what}: left out")
    return rows.drop(blank)


def note_surprises(where: str, train: DataFrame, held: DataFrame) -> None:
    """Say what in the data could surprise."""
    by_text, counts = train.groupby("text")["label"], train["label"].value_counts()
    labels = counts.index.to_series().str
    plain = labels.casefold().str.replace(r"\s", "", regex=True)
    for what, are_so in (
        ("rows (a header is row 1) with an earlier text", train["text"].duplicated()),
        ("rows with a text of several labels", by_text.transform("nunique") > 1),
        ("validation rows with a training text", held["text"].isin(train["text"])),
        ("labels alike but for case or space", plain.duplicated(keep=False)),
        ("labels that look empty", labels.fullmatch("None|[Nn]a[Nn]|N/?A|null")),
        ("labels with under ten rows", counts < 10),
    ):
        if found := [*are_so.index[are_so]]:
            note(f"{where}: {what} ({len(found):,}): {listed(found, 10)}")


def number_labels(args: Namespace, columns, train, held) -> dict:
    """About labels, in their order: numbers by value, words by alphabet; and columns."""
    class_names, found, (text, label) = train.attrs["class_names"], {*train["label"]}, columns
    are_words = not (class_names or all(re.fullmatch(r"-?\d{1,18}", one) for one in found))
    labels = class_names or sorted(sorted(found), key=str if are_words else int)
    names, shown = args.label_names or labels, listed(labels)
    unknown = listed(sorted({*held["label"]}.difference(labels)))
    fit = names == labels if are_words else len(labels) == len(names) == len({*names})
    for is_wrong, what in (
        (len(found) > max(20, 0.9 * len(train)), f"{len(found):,} labels in {len(train):,} rows"),
        (len(labels) < 2, f"{shown!r} is the only label"),
        (are_words and re.fullmatch(r"[-\d]*\.[-.\d]*", "".join(found)), f"{shown}: no whole numbers"),
        (unknown, f"no training row has the label {unknown}, but {shown}"),
        (not fit, f"{listed(names)} cannot name {shown}"),
    ):
        if is_wrong:
            raise InputError(f"{args.dataset}: {what}; see --label-column and --label-names")
    return {"labels": labels, "label_names": names, "text_column": text, "label_column": label}


# --- Checkpoints ------------------------------

FORMAT = 1  # of what was trained; a reader refuses another number
LORA_FACTS = ("targets", "r", "alpha", "dropout", "use_rslora", "layers")


def adapter_facts(args: Namespace, base: Base, about: dict, wrapped: list[str]) -> dict:
    """What a checkpoint says beside its tensors."""
    facts = {"base": args.model, "data": args.data, "revision": base.revision, **about}
    facts |= {key: getattr(args, key) for key in ("max_length", *LORA_FACTS)}
    return facts | base.identity | {"targets": sorted({path.split(".")[-1] for path in wrapped})}


def seen_from(path: Path, facts: dict) -> dict:
    """Facts for the file `path`: places as seen from there, and absolutely."""
    here = {key: facts[key] for key in ("base", "data") if os.path.exists(facts.get(key, ""))}
    near = {key: os.path.relpath(name, path.parent) for key, name in here.items()}
    return facts | near | {"absolute": {key: os.path.abspath(here[key]) for key in here}}


def seen_from_here(path: Path, facts: dict) -> dict:
    """The facts of the file `path`, with places as seen from here."""
    for key, there in facts.get("absolute", {}).items():
        near = os.path.normpath(path.parent / facts[key])
        facts = facts | {key: next(filter(os.path.exists, (near, there)), facts[key])}
    return facts


def tensors_to_save(state: dict[str, Tensor], head: list[str]) -> dict[str, Tensor]:
    """Those of adapter and head; on a CPU the model's own."""
    kept = [name for name in state if name.endswith((".lora_A", ".lora_B")) or name in head]
    return {name: state[name].cpu() for name in kept}


def save_checkpoint(path: Path, tensors: dict, facts: dict, tokenizer: Callable) -> None:
    """Write facts, format and state_dict to a file, the tokenizer to a folder beside."""
    checkpoint = seen_from(path, facts) | {"format": FORMAT, "state_dict": tensors}
    write_file(path, lambda temporary: torch.save(checkpoint, temporary))
    write_folder(path.with_suffix(""), tokenizer.save_pretrained)


def load_checkpoint(path: str | Path, base_name: str | None = None) -> tuple[Base, dict]:
    """The trained model in float32, on the CPU, and its facts; its base is now at `base_name`."""
    with refusing(f"{path}: not a checkpoint of this project", "train or copy it again"):
        checkpoint = {"layers": None} | seen_from_here(Path(path), read_tensors(path))
        check_facts(checkpoint, checkpoint["state_dict"])
        base = find_trained_base(checkpoint, base_name)
        inject_lora(base.model, base.head, **{key: checkpoint[key] for key in LORA_FACTS})
        copy_all(checkpoint["state_dict"], tensors_to_save(base.model.state_dict(), base.head))
    base.model.eval()
    return base, checkpoint


def read_tensors(path: str | Path) -> dict:
    """Tensors and plain values in a file of torch.save; code in it is never run."""
    if not Path(path).is_file() or ZipFile(path).testzip():  # torch.load checks no checksum
        raise ValueError("no file, or damaged")  # a pipe would hang
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def check_facts(facts: dict, tensors: dict) -> None:
    """Raise ValueError for another format, facts out of range or untrue of the tensors."""
    names, r = facts["label_names"], facts["r"]
    ranks = {len(tensor) for name, tensor in tensors.items() if "lora_A" in name}
    texts = [facts["base"], facts["fingerprint"], *facts["targets"], *names]
    texts += [facts.get(key, "") for key in ("data", "text_column", "label_column")]
    texts += facts.get("labels", [])
    found = facts["format"], ranks, type(names), len({*names}), {type(text) for text in texts}
    if found != (FORMAT, {r}, list, max(2, len(names)), {str}):
        raise ValueError(f"format {facts['format']}, r {r} of {ranks}, names {texts}")
    check_ranges({key: float(facts[key]) for key in ("alpha", "dropout", "max_length")})


@torch.no_grad()
def copy_all(source: dict, target: dict) -> None:
    """Copy tensors into those of the same names; ValueError for another shape or type."""
    for key in source.keys() ^ target.keys():
        raise ValueError(f"{key} is {'missing' if key in target else 'not expected'}")
    for key, old in target.items():
        new = source[key]
        if isinstance(old, dict):
            copy_all(new, old)
        elif (new.shape, new.dtype) != (old.shape, old.dtype):
            raise ValueError(f"{key} is {new.dtype} of shape {tuple(new.shape)}")
        elif not old.copy_(new).isfinite().all():
            raise ValueError(f"{key} has NaN or infinity in it")


def write_file(path: Path, write: Callable) -> None:
    """Let `write` fill a temporary file, then move it into place."""
    with refusing(f"cannot write {path}, which is as it was", "make room or name another place"):
        target = path.resolve()  # a link stays a link, the move on one file system
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def write_folder(path: Path, write: Callable, last: str = "") -> None:
    """Let `write` fill a temporary folder; move its files, `last` last."""
    remedy = "make room there or in TMPDIR"
    with refusing(f"cannot write {path}", remedy), TemporaryDirectory() as temporary:
        write(Path(temporary))
        for old in sorted(Path(temporary).iterdir(), key=lambda file: file.name == last):
            write_file(path / old.name, lambda new, old=old: new.write_bytes(old.read_bytes()))


# --- Resuming ---------------------------------


class TrainingState:
    """A training's progress, printed, and a file of what --resume needs."""

    MAY_DIFFER = ("train_samples", "threads", "log_every", "save_every")  # of NUMBERS
    MUST_MATCH = "targets use_rslora freeze_head use_dora label_names precision"
    MUST_MATCH += " fingerprint tokenizer base_config"

    def __init__(self, args: Namespace, model, facts: dict, record: dict, train_set, eval_set):
        self.args, self.model, self.facts, self.record = args, model, facts, record
        self.train_set, self.eval_set = train_set, eval_set
        self.path = Path(f"{args.output}.state")
        config = model.config.to_diff_dict() | {"transformers_version": ""}
        known = vars(args) | facts | {"precision": record["precision"], "base_config": config}
        keys = [*sorted(NUMBERS.keys() - self.MAY_DIFFER), *self.MUST_MATCH.split()]
        self.settings = {"version": "2"} | {key: str(known.get(key)) for key in keys}
        for kind, part in (("training", train_set), ("validation", eval_set)):
            numbers = numpy.concatenate([*part.ids, part.lengths, part.labels])
            self.settings[f"{kind} data"] = sha256(numbers).hexdigest()
        self.stopped, self.done = 0, 0  # the signal's number; steps saved

    def begin(self, total_steps: int, steps_per_epoch: int, optimizer, scaler) -> int:
        """Make room for a state, which --resume loads; return the first step."""
        self.steps_per_epoch, self.optimizer, self.scaler = steps_per_epoch, optimizer, scaler
        self.losses = torch.zeros(total_steps, device=self.model.device)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for p in trained.values():  # as AdamW does at its first step
            moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": p.new_zeros(()), **moments}
        self.given = torch.zeros(len(self.eval_set))  # of the given labels, summed
        self.tensors = {"trained": trained, "losses": self.losses, "given": self.given}
        self.tensors["optimizer"] = {"state": optimizer.state_dict()["state"]}
        if self.model.device.type == "cpu":  # quicker with dropout
            self.model.set_attn_implementation("eager")
        self.generators = [torch, torch.cuda][: 1 + torch.cuda.is_initialized()]
        if self.args.resume and self.path.exists():
            self.load()
        self.epoch_start, self.clock = self.done, time.perf_counter()
        is_notebook = {"JPY_PARENT_PID", "COLAB_RELEASE_TAG"} & os.environ.keys()
        silent = bool(is_notebook or rank_and_size()[0]) or None  # None: without a terminal
        self.bar = tqdm(total=total_steps, initial=self.done, disable=silent)
        return self.done

    def load(self) -> None:
        """Put everything back; InputError for what is no state of this run."""
        with refusing(f"{self.path}: no state of this run", "use the same, or leave --resume out"):
            state = read_tensors(self.path)
            for key, now in self.settings.items():
                if (then := state["settings"].get(key, 1)) != now:
                    raise ValueError(f"{key} was {then!s:.60}, is now {now:.60}")
            self.record["epochs"] = [*json.loads(state["epochs"])]
            self.done, total = int(state["done"]), len(self.losses)
            if not 0 < self.done <= total:
                raise ValueError(f"step {self.done} of {total}")
            copy_all({key: state[key] for key in self.tensors}, self.tensors)
            self.scaler.load_state_dict(state["scaler"])
            for generator, then in zip(self.generators, state["generators"], strict=False):
                generator.set_rng_state(then)
        print(f"resumed after step {self.done} of {total}")

    def save(self, done: int) -> None:
        """Write the state after `done` steps, if all is finite."""
        self.check_finite(done)
        self.done = done
        state = {"settings": self.settings, "done": done, **self.tensors}
        state |= {"data": self.record["data"], "epochs": json.dumps(self.record["epochs"])}
        generators = [generator.get_rng_state() for generator in self.generators]
        state |= {"scaler": self.scaler.state_dict(), "generators": generators}
        if rank_and_size()[0] == 0:
            write_file(self.path, lambda temporary: torch.save(state, temporary))

    def check_finite(self, done: int) -> None:
        """InputError where a loss or a weight is not finite."""
        tensors = [self.losses[:done], *self.tensors["trained"].values()]
        if not all(tensor.sum().isfinite() for tensor in tensors):
            raise InputError(f"step {done}: not finite; lower --lr {self.args.lr:g}")

    def report(self, done: int) -> None:
        """Show the loss of the last steps."""
        self.check_finite(done)  # rarely: it waits for the GPU
        seconds, every = time.perf_counter() - self.clock, self.args.log_every
        sentences = min((done - self.epoch_start) * self.args.batch_size, len(self.train_set))
        self.pace = {"seconds": seconds, "sentences_per_second": sentences / seconds}
        loss = self.losses[:done][-every:].mean()
        rate = self.optimizer.param_groups[0]["lr"]
        progress = f"loss {loss:.4f}, lr {rate:.1e}, {sentences / seconds:.0f} sentences/s"
        self.bar.set_postfix_str(progress)
        self.bar.update(done - self.bar.n)
        if self.bar.disable and done % (10 * every) == 0:
            print(f"step {done}/{len(self.losses)}: {progress}", flush=True)

    def end_epoch(self, done: int, logits: Tensor) -> None:
        """Record and print the epoch; logits (rows, labels): the validation's."""
        epochs, labels = self.record["epochs"], self.eval_set.labels
        losses = self.losses[len(epochs) * self.steps_per_epoch : done]
        epoch = {"epoch": len(epochs) + 1, "steps": len(losses), "train_loss": losses.mean().item()}
        said = f"epoch {epoch['epoch']}: training loss {epoch['train_loss']:.4f}, "
        if len(labels):  # none with --folds
            self.given += logits.softmax(dim=1)[range(len(labels)), labels]
            result = score(count_answers(logits, labels))
            epoch |= {key: result[key] for key in ("accuracy", "correct", "total")}
            epoch["eval_loss"] = F.cross_entropy(logits, labels).item()
            said += f"validation loss {epoch['eval_loss']:.4f}, {result['text']}, "
        epochs.append(epoch | self.pace)
        every = math.ceil(len(self.losses) / self.steps_per_epoch / 10)
        if len(epochs) % every == 0 or done == len(self.losses):  # at most ten lines
            self.bar.clear()
            print(f"{said}{self.pace['seconds']:.1f} s", flush=True)
        self.epoch_start, self.clock = done, time.perf_counter()

    @contextlib.contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """Finish the step on Ctrl-C, SIGTERM, SIGHUP; a second one ends at once."""

        def remember(number: int, _: object) -> None:
            self.stopped = number
            signal.signal(number, signal.SIG_DFL)

        with self.bar, contextlib.ExitStack() as former:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:
                    former.callback(signal.signal, number, signal.signal(number, remember))
            yield
        every, (rank, _) = self.args.log_every, rank_and_size()
        losses = [round(block.mean().item(), 5) for block in self.losses.split(every)]
        self.record["loss_curve"] = {"every": every, "loss": losses}
        if dist.is_initialized():  # all but the first end here
            dist.destroy_process_group()
        if self.stopped:
            note(f"stopped after step {self.done}, {self.path}; add --resume to go on")
        if self.stopped or rank:
            sys.exit(self.stopped and 128 + self.stopped)


# --- Several processes ------------------------


def rank_and_size() -> tuple[int, int]:
    """This process's number among torchrun's, and their count; else 0 of 1."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_share(batch: list[int]) -> tuple[list[int], float]:
    """This process's part of a batch, and the factor that makes the mean over the batch."""
    rank, ranks = rank_and_size()
    share = batch[rank::ranks]  # perhaps nothing: then a sentence with weight 0
    return share or batch[:1], bool(share) / len(batch)


def sum_over_processes(*tensors: Tensor) -> Tensor:
    """Add each up, in place; return the first."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)
    return tensors[0]


# --- Small tables -----------------------------


def contrast(output, inputs: dict, labels: Tensor) -> Tensor:
    """How unlike sentences of one label look to the model: SupCon (arXiv:2004.11362, equation 2).

    The sum over sentences i of the mean, over the j of i's label, of -log (e^s_ij / Σ_k e^s_ik).
    s: cosine similarity / 0.1, of [CLS] and of the sum of what the last layer reads; j, k are not i.
    It counts as the labels are learnt, wholly from half of chance's cross-entropy on.
    """
    *_, read, last = output.hidden_states
    mask = F.interpolate(inputs["attention_mask"][:, None].float(), read.shape[1])  # Funnel pools
    both = torch.stack([last[:, 0].float(), (mask @ read.float())[:, 0]])  # (2, sentences, width)
    unit = F.normalize(both, dim=2)
    itself = torch.eye(len(labels), device=labels.device)
    logs = F.log_softmax(10 * unit @ unit.mT - 1e9 * itself, dim=2)  # (2, sentences, sentences)
    partners = (labels[:, None] == labels).float() - itself
    mean = (partners * logs).sum(dim=2) / partners.sum(dim=1).clamp(min=1)
    entropy = F.cross_entropy(output.logits.detach().float(), labels)
    return -mean.sum() * (2 - 2 * entropy / math.log(output.logits.shape[1])).clamp(0, 1)


def cross_validate(fit: Callable, args: Namespace, machine, about: dict, rows) -> tuple:
    """The rows, and logits (rows, labels) for each by a model that has not seen its text."""
    if rows["text"].nunique() < args.folds:
        raise InputError(f"--folds {args.folds}: too few texts")
    logits = torch.zeros(len(rows), len(about["labels"]))
    rows.attrs["parts"] = []
    for number in range(args.folds + 1):
        every = args.folds if number else 2  # first, halves
        held = rows["text"].isin(draw_texts(rows, args.seed, every, number % every))
        part = Namespace(**vars(args) | {"output": Path(f"{args.output}.part{number}")})
        with contextlib.redirect_stdout(None):
            _, state = fit(part, machine, about, rows[~held], rows[held])
        logits[held.tolist()] = found = predict(state.model, state.eval_set, 32)
        result = {"rows": int(sum(~held))} | score(count_answers(found, state.eval_set.labels))
        rows.loc[held, "percent"] = (100 - 100 * state.given / len(state.record["epochs"])).numpy()
        rows.attrs["parts"].append(result)
        print(f"training {number + 1}/{args.folds + 2}, {result['rows']} rows: {result['text']}", flush=True)
    return rows, logits


# --- What a run says and writes ---------------


def describe(args: Namespace, named: dict[str, Tensor], head: list[str], wrapped, dtype) -> dict:
    """Print what is trained and where; begin the record."""
    layers = ", ".join(sorted({path.split(".")[-1] for path in wrapped}))
    details = {"lora": f"r {args.r}, alpha {args.alpha:g}, on {len(wrapped)} layers ({layers})"}
    details["head"] = "frozen at its random start" if args.freeze_head else "trained"
    details["frozen base"] = visible(args.model)
    counts = dict.fromkeys(details, 0)
    for name, parameter in named.items():
        part = "lora" if "lora_" in name else "head" if name in head else "frozen base"
        counts[part] += parameter.numel()
    for part, count in counts.items():
        share = 100 * count / sum(counts.values())
        print(f"{part:12}{count:>12,} {share:6.2f} %  {details[part]}")
    counts["trained"] = sum(p.numel() for p in named.values() if p.requires_grad)
    cpu = f"{os.uname().machine} {torch.backends.cpu.get_cpu_capability()}"
    device = torch.cuda.get_device_name() if parameter.is_cuda else cpu
    hardware = f"{device}, threads: {torch.get_num_threads()}"
    precision = str(dtype).removeprefix("torch.")
    versions = {"torch": str(torch.__version__), "transformers": transformers.__version__}
    print(f"{'machine':12}{hardware}, {precision}", flush=True)
    record = {"data": args.data, "settings": vars(args) | {"output": str(args.output)}}
    record |= {"versions": versions, "hardware": hardware, "precision": precision}
    return seen_from(args.output, record | {"parameters": counts, "epochs": []})


@torch.inference_mode()
def calibrate(model: nn.Module, logits: Tensor, labels) -> dict:
    """Make the model as sure as it is right: divide its logits by the likeliest temperature.

    See arXiv:1706.04599; the head's last layer takes it, too. A frozen head keeps 1.
    """
    own = [m for n, m in model.named_modules() if not re.search("lora_|original_module", n)]
    layer = [m for m in own if getattr(m, "out_features", 0) == model.config.num_labels][-1]
    tried, labels = [1.0], torch.tensor([*labels])
    if len(labels) >= 10 and layer.weight.requires_grad and (logits.argmax(dim=1) != labels).any():
        tried = torch.logspace(0, 1, 101).tolist()
    temperature = min(tried, key=lambda t: F.cross_entropy(logits / t, labels).item())
    for divided in (logits, *(parameter.data for parameter in layer.parameters())):
        divided /= temperature
    seen = f"are as sure as {len(labels):,} unseen rows allow"
    said = seen if tried[1:] else "are not corrected and may be far too sure"
    print(f"{'temperature':12}{temperature:.2f}: percentages {said}")
    return {"temperature": temperature, "unseen": score(count_answers(logits, labels))}


def count_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """How often each label (row) was answered with each (column)."""
    pairs = labels * logits.shape[1] + logits.argmax(dim=1)
    return torch.bincount(pairs, minlength=logits.shape[1] ** 2).view(logits.shape[1], -1)


def score(confusion: Tensor) -> dict:
    """In percent: accuracy, 95 % interval (Wilson, 1927), macro-F1 as in scikit-learn."""
    right, real = confusion.diagonal(), confusion.sum(1)
    given = confusion.sum(0)[: len(real)]
    correct, total, q = int(right.sum()), int(given.sum()), 3.841459
    middle = (correct + q / 2) / (total + q)
    half = math.sqrt(q * (correct * (total - correct) / total + q / 4)) / (total + q)
    result = {"accuracy": 100 * correct / total, "correct": correct, "total": total}
    result["interval"] = [100 * max(0, middle - half), 100 * min(1, middle + half)]
    result["macro_f1"] = (200 * right.double() / (given + real)).nanmean().item()
    return result | {"text": f"accuracy {result['accuracy']:.2f} % ({correct}/{total})"}


def report_labels(confusion: Tensor, label_names: list[str]) -> str:
    """Each label in percent, and the score."""
    import pandas

    names = [visible(" ".join(name.split()), 80) for name in label_names]
    right, real = 100 * confusion.diagonal(), confusion.sum(1)
    given = confusion.sum(0)[: len(real)]
    top = f"lowest F1 of {len(names)}" if names[10:] else "label"
    table = {top: names, "precision": right / given, "recall": right / real}
    table = pandas.DataFrame(table | {"F1": 2 * right / (given + real), "sentences": real})
    cells = pandas.DataFrame(confusion, columns=[*names, "unsure"][: len(confusion.T)])
    cells.insert(0, "answered as:", "")
    table = table.nsmallest(10, "F1") if names[10:] else pandas.concat([table, cells], axis=1)
    table = table.to_string(index=False, header=[*table], float_format="%.1f", na_rep="-")
    always = f"always {names[real.argmax()]!r}: {100 * real.max() / real.sum():.2f} %"
    result = score(confusion)
    interval = "95 % between {:.0f} and {:.0f}".format(*result["interval"])
    return f"{table}\nmacro-F1 {result['macro_f1']:.1f} %; {always}\n{result['text']}, {interval}"


def finish(args: Namespace, record: dict, about: dict, rows: DataFrame, logits: Tensor) -> None:
    """Write the record, and print what came out: logits (rows, labels) answer unseen rows."""
    names, record["parts"] = about["label_names"], rows.attrs.get("parts")
    files = [args.output] if args.output.is_file() else args.output.glob("adapter_*")
    confusion = count_answers(logits, torch.tensor([*rows["label"]]))
    result, size = score(confusion), sum(file.stat().st_size for file in files)
    result |= {"bytes": size, "label_names": names, "confusion": confusion.tolist()}
    sure, answers = logits.double().softmax(dim=1).max(dim=1)
    judged = rows.assign(answer=answers.tolist(), percent=rows.get("percent", 100 * sure.numpy()))
    wrong = judged.query("answer != label").sort_values("percent", ascending=False).round(1)
    wrong[["label", "answer"]] = wrong[["label", "answer"]].map(names.__getitem__)
    result["mistakes"] = wrong[:1000].rename_axis("row").reset_index().to_dict("records")
    text = json.dumps(record | {"result": result}, indent=1) + "\n"
    write_file(beside(args.output, ".json"), lambda file: file.write_text(text, encoding="utf-8"))
    print(f"saved {args.output} ({size / 1e6:.1f} MB); mistakes or wrong labels: {len(wrong)}")
    for row, one in wrong[:10].map(visible, width=60).iterrows():
        print("  row {}, given {label}, answered {answer} {percent} % | {text}".format(row, **one))
    print(report_labels(confusion, names))
    if args.folds:
        half, part = record["parts"][:2]
        print(f"by models of {part['rows']:,} rows; one of {half['rows']:,} {half['accuracy']:.1f} %")
        for number in range(args.folds + 1):
            Path(f"{args.output}.part{number}.state").unlink(missing_ok=True)
    elif len(rows) < 100:
        note(f"{len(rows)} rows say little: --folds 5 judges all, by six more")
    command = [sys.orig_argv[0], str(Path(sys.argv[0]).with_name("playground.py"))]
    print("ask it:", shlex.join([*command, f"--model={args.output}", "A sentence."]))


def beside(output: Path, ending: str) -> Path:
    """What belongs to a .pt file or a folder: run.json of run.pt, lr0.1.json of lr0.1."""
    return output.with_name(output.name.removesuffix(".pt") + ending)


# --- Flags and the machine --------------------

GLUE = ("nyu-mll/glue", "sst2", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c")  # revision last
DISTILBERT = ("distilbert/distilbert-base-uncased", "12040accade4e8a0f71eabdb258fecc2e7e948be")
LOCAL = {"model": "model/distilbert-base-uncased", "dataset": "dataset/glue_sst2_local"}
DEMO = {"model": "model/minilm-l6-distilbert", "dataset": "dataset/demo"}
RECIPES = {  # of flags that are not given: see tests/figures/results/README.md
    "published": {"lr": 2e-4, "batch_size": 16, "epochs": 3},  # targets: query and value
    "own": {"lr": 1e-3, "batch_size": 16, "epochs": 3, "targets": ["all-linear"]},
    "best": {"lr": 1e-3, "batch_size": 32, "epochs": 2, "targets": ["all-linear"]},
}
NUMBERS = {  # flags: type, default, least, most, help
    "train_samples": (int, None, 1, 10**8, "random rows"),
    "max_length": (int, 128, 3, 10**6, "tokens; longer text is cut"),
    "r": (int, 8, 1, 65_536, "rank of the update"),
    "alpha": (float, 16.0, 0, 1e6, "scaling = alpha / r"),
    "dropout": (float, 0.1, 0, 0.99, "on the LoRA branch"),
    "layers": (int, None, 1, 200, "upper layers with adapters (all)"),
    "epochs": (int, None, 1, 10**4, "(3; best 2; own 1 from 20,000 rows)"),
    "max_steps": (int, None, 1, 10**8, "instead of epochs (own, best: at least 400)"),
    "batch_size": (int, None, 1, 10**8, "sentences a step (16; best 32)"),
    "lr": (float, None, 0, 1e8, "peak rate (published 2e-4, else 1e-3; from 20 labels 2e-3)"),
    "warmup": (float, 0.06, 0, 1, "share of the steps"),
    "weight_decay": (float, 0.01, 0, 1e8, "of AdamW"),
    "max_grad_norm": (float, 1.0, 0, 1e8, "of all gradients; 0: no limit"),
    "contrast": (float, None, 0, 1e8, "weight of SupCon's term (1 below 200 rows, else 0)"),
    "folds": (int, None, 2, 100, "judge each row by a model without it: N + 1 more trainings"),
    "seed": (int, 42, 0, 2**32 - 1, "of all randomness"),
    "threads": (int, None, 1, 1024, "of the CPU"),
    "log_every": (int, 20, 1, 10**8, "steps a report"),
    "save_every": (int, 500, 1, 10**8, "steps a state for --resume"),
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ODD = "Naïve CAFÉ, don't  stop!\tÅngström 東京 № ½ 😀 re-use_it (1,000.50 €) #x @y http://a.b/c?d=e ß ﬁ"
WITHOUT_HUB = "name a folder (playground.py: --base), or ./setup.sh --demo and --demo"


class Parser(ArgumentParser):
    def error(self, message: str) -> None:  # one line, whatever was typed
        raise InputError(f"{message}; see --help")


def make_parser(description: str, output: str) -> ArgumentParser:
    """The flags; see also NUMBERS and RECIPES. {} in `output`: the data."""
    parser = Parser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.usage, parser.output = "%(prog)s [options]", output
    switch = {"action": "store_true"}
    add = parser.add_argument_group("model and data").add_argument
    add("--demo", **switch, help=f"{DEMO['model']} on {DEMO['dataset']}")
    add("--model", help=f"folder or Hub name ({LOCAL['model']}, else {DISTILBERT[0]})")
    add("--revision", help="of a model of the Hub (pinned for DistilBERT)")
    add("--dataset", help=f"file, folder or Hub name ({LOCAL['dataset']}, else {GLUE[0]})")
    add("--dataset-config", help=f"of a data set of the Hub ({GLUE[1]} of {GLUE[0]})")
    add("--text-column", help="(sentence, text, review, ... or, of two, the longer)")
    add("--label-column", help="(label, class, stars, ... or, of two, the other)")
    add("--label-names", nargs="+", help="names of integer labels, in order")
    add = parser.add_argument_group("method").add_argument
    add("--recipe", choices=RECIPES, help="(published for SST-2, else own)")
    add("--targets", nargs="+", help="linear layers, or all-linear (by recipe)")
    add("--use-rslora", **switch, help="scaling = alpha / sqrt(r)")
    add("--freeze-head", **switch, help="leave the head random")
    add = parser.add_argument_group("numbers").add_argument
    for name, (kind, default, _, _, text) in NUMBERS.items():
        text += f" ({default:g})" if default else ""
        add(f"--{name.replace('_', '-')}", type=kind, default=default, metavar="N", help=text)
    add = parser.add_argument_group("machine and output").add_argument
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="CUDA if there")
    add("--precision", choices=["auto", *TYPES], default="auto", help="16 bits where quick")
    add("--resume", **switch, help="go on from the state beside --output")
    add("--output", type=Path, help=f"where the result goes ({output.format('DATA')})")
    add("--overwrite", **switch, help="replace what was made from other data")
    return parser


def parse_flags(parser: ArgumentParser, argv: list[str] | None) -> Namespace:
    """The flags, with the defaults that depend on --demo and on this folder."""
    args = parser.parse_args(argv)
    given = vars(args)
    with refusing("a flag is out of range", "see --help"):
        check_ranges(given)
    for key, detail, hub in (("model", "revision", DISTILBERT), ("dataset", "dataset_config", GLUE)):
        default = DEMO[key] if args.demo else LOCAL[key] if Path(LOCAL[key]).is_dir() else hub[0]
        given[key] = given[key] or default
        if given[key] == hub[0]:
            given[detail] = given[detail] or hub[1]
    args.data = str(Path(args.dataset, args.dataset_config or ""))
    is_sst2 = os.path.normpath(args.dataset) in (GLUE[0], LOCAL["dataset"])
    name = "distilbert_sst2" if is_sst2 else re.sub(r"\W+", "_", Path(args.dataset).stem)[:100]
    args.output = args.output or Path(parser.output.format(name or "data"))
    args.recipe = args.recipe or ("published" if is_sst2 else "own")
    return args


def check_ranges(settings: dict) -> None:
    for key in settings.keys() & NUMBERS.keys():
        value, (_, _, least, most, _) = settings[key], NUMBERS[key]
        if value is not None and not least <= value <= most:
            raise ValueError(f"--{key.replace('_', '-')} {value} is not between {least} and {most}")


def choose_recipe(args: Namespace, rows: int, labels: int) -> Namespace:
    """The flags, with those that --recipe and the data decide; prints them."""
    name = args.recipe
    recipe = {"contrast": float(name == "own" and 5 * labels <= rows < 200), **RECIPES[name]}
    if name != "published" and labels >= 20:
        recipe["lr"] *= 2
    if name == "own" and rows >= 20_000:
        recipe["epochs"] = 1
    given = {key: value for key, value in vars(args).items() if value is not None}
    chosen = Namespace(**vars(args) | recipe | given)
    steps = chosen.epochs * math.ceil(rows / chosen.batch_size)
    if name != "published" and not args.epochs and steps < 400:  # few rows are seen more often
        chosen.max_steps = chosen.max_steps or 400
    length = f"{chosen.max_steps} steps" if chosen.max_steps else f"{chosen.epochs} epochs"
    how = f"rate {chosen.lr:g}, {length}, batches of {chosen.batch_size}, contrast {chosen.contrast:g}"
    print(f"{'recipe':12}{name}, {rows:,} rows, {labels:,} labels: {how}")
    return chosen


def check_output(args: Namespace, is_file: bool) -> None:
    """Hold the place of the result; refuse other work there."""
    output, remedy = args.output, "name another, or add --overwrite"
    with refusing(f"--output {visible(output)}: cannot write there", remedy):
        if is_file and output.suffix != ".pt":
            raise ValueError("it does not end in .pt")
        folder = beside(output, "") if is_file else output
        result = output if is_file else output / "lora_peft.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        if os.environ.get("RANK", "0") == "0":
            hold(output)
        states = map(Path, (f"{output}.state", f"{output}.part0.state"))
        found = [*filter(os.path.lexists, (beside(output, ".json"), *states, result))]
        for path in [] if args.overwrite else found:
            with refusing(f"--output: {path} is not replaced", remedy):
                old = json.loads(path.read_bytes()) if path.suffix == ".json" else read_tensors(path)
                if (data := old.get("data")) != seen_from(output, {"data": args.data})["data"]:
                    raise ValueError(f"it was made from {data or 'unknown data'}")
        inside = [path.name for path in folder.iterdir()] if os.path.lexists(folder) else []
        if "config.json" in inside or (inside and not found and not args.overwrite):
            raise ValueError(f"{folder} is something else")
        probe = output.resolve().with_name(f".{output.name}.tmp")
        probe.touch()
        probe.unlink(missing_ok=True)


HELD = contextlib.ExitStack()  # open files with locks


def hold(output: Path) -> None:
    """Keep other runs on this machine away from an output until the end."""
    name = f"lora-{os.getuid()}-{sha256(str(output.resolve()).encode()).hexdigest()}"
    with refusing(f"--output {output}: another run writes it", "wait, or name another place"):
        file = HELD.enter_context(open(Path("/tmp", name), "w"))  # noqa: SIM115
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def prepare_machine(args: Namespace) -> tuple[torch.device, torch.dtype]:
    """Device and type to compute in; sets threads, joins torchrun."""
    has_gpu = args.device != "cpu" and torch.cuda.is_available()
    if not has_gpu and (args.device == "cuda" or args.precision == "fp16"):
        raise InputError(f"--device {args.device} --precision {args.precision}: no GPU; --device cpu, fp32")
    if args.threads:
        torch.set_num_threads(args.threads)
    if dist.is_torchelastic_launched():
        if has_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if has_gpu else "gloo")
    if has_gpu:
        quick = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    else:
        able = map(torch.cpu.get_capabilities().get, ("amx_bf16", "avx512_bf16", "bf16"))
        quick = torch.bfloat16 if any(able) else torch.float32
    return torch.device("cuda" if has_gpu else "cpu"), (TYPES | {"auto": quick})[args.precision]


# --- Mistakes ---------------------------------


class InputError(ValueError):
    """A mistake of the user's, in one line that names the value and the remedy."""


@contextlib.contextmanager
def refusing(what: object, remedy: str) -> Iterator[None]:
    """An error in here becomes the user's, in one line: `what` (why); `remedy`."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError, NameError):
        raise
    except Exception as error:
        kind = "" if isinstance(error, (ValueError, OSError)) else type(error).__name__
        why = visible(" ".join(f"{kind} {error}".split()), 400)
        raise InputError(f"{what} ({why}); {remedy}") from error


def visible(value: object, width: int = 200) -> str:
    """Text for one line of a terminal, harmless to it."""
    text = str(value) if len(str(value)) <= width else f"{str(value)[: width - 1]}…"
    harmless = "\xa0\xad\u200c\u200d\u202f\u3000"  # spaces and joiners
    return "".join(c if c.isprintable() or c in harmless else "\ufffd" for c in text)


def listed(values: list, most: int = 20) -> str:
    """Values in words, as many as a line can take."""
    shown = ", ".join(visible(value, 40) for value in values[:most])
    return shown if len(values) <= most else f"{shown}, … ({len(values):,} in all)"


def note(text: str) -> None:
    """Say on standard error what a user may want to know."""
    print(f"note: {visible(text, 500)}", file=sys.stderr)


def run(main: Callable[[], int | None]) -> None:
    """Call `main`; a mistake becomes one line on standard error and exit code 2."""
    nowhere = open(os.devnull, "w")  # noqa: SIM115 - for closed streams
    sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    with contextlib.suppress(AttributeError):  # a notebook's takes every character
        sys.stdout.reconfigure(errors="replace")
    try:
        with HELD:
            code = main()
            sys.stdout.flush()
        sys.exit(code)
    except KeyboardInterrupt:  # outside the training: nothing to save
        sys.exit(130)
    except BrokenPipeError:  # as by `| head`; Python flushes once more
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        sys.exit(141)
    except InputError as error:
        mistake = error
    except (MemoryError, torch.OutOfMemoryError):
        mistake = "the memory is full; lower --batch-size or --max-length"
    except OSError as error:  # a full disk, a folder that is gone
        mistake = f"{error}; name another place"
    print("error:", visible(mistake, 2000), file=sys.stderr)
    sys.exit(2)


# --- Faster -----------------------------------


def speed_up(base: Base, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Make a model quick, its last layer for [CLS] alone; only rounding and dropout change."""
    for name, parameter in base.model.named_parameters():
        if name not in base.head and not re.search("lora_|modules_to_save", name):
            parameter.data = parameter.data.to(dtype)
    for module in base.model.modules():
        if type(module) is nn.Dropout and not module.inplace:
            module.__class__ = CheapDropout
    config, encoder = base.model.config, base.model.base_model
    if getattr(config, "chunk_size_feed_forward", 0):
        return base.model
    if config.model_type == "distilbert":
        norm = encoder.transformer.layer[-1].sa_layer_norm
        norm.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :1],))
    elif config.model_type in DEFAULT_TARGETS:
        attention = encoder.encoder.layer[-1].attention
        attention.register_forward_hook(lambda _, inputs, out: (out[0][:, :1], *out[1:]))
    return base.model


def autocast(model: nn.Module) -> torch.autocast:
    """Compute in the type in which the encoder is held; what is trained stays float32."""
    dtype = model.base_model.dtype
    return torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32)


class CheapDropout(nn.Dropout):
    """Dropout on a CPU, its rate met to 1/131,072; PyTorch's takes up to a third of a step."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.device.type != "cpu" or not 0 < self.p <= 0.99:
            return super().forward(x)
        draws = torch.empty(x.numel() // 4 + 1, dtype=torch.int64)
        draws = draws.random_(-(2**63), None).view(torch.int16)  # uniform from -32,768 to 32,767
        draws, least = draws[: x.numel()].view(x.shape), round(65_536 * self.p) - 32_768
        kept = torch.ge(draws, least, out=torch.empty_like(x))  # 0 or 1
        return x * kept.div_(1 - self.p)


if __name__ == "__main__":
    run(main)
