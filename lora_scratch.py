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
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports ends it without a word
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait sleep soon, for a busy machine

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR

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

    def __getattr__(self, name: str):  # some models ask a linear layer for its weight or bias
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
        raise InputError(f"{model.config.model_type}: {what}; choose with --targets among {', '.join(names)}")
    return [path for path in linear if last_name(path) in targets]


def inject_lora(
    model: nn.Module, head: list[str], targets=None, r=8, alpha=16.0, dropout=0.1, use_rslora=False
) -> list[str]:
    """Wrap the target layers in LoRALinear, freeze all else but the head; return the wrapped paths."""
    wrapped = find_targets(model, head, targets)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head)
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
    label_weights = weigh_labels(train_set.labels, model) if args.balance else None  # None: all alike
    steps_per_epoch = math.ceil(len(train_set) / args.batch_size)
    total_steps = args.max_steps or args.epochs * steps_per_epoch
    scheduler = LambdaLR(optimizer, warmup_then_decay(args.warmup, total_steps))
    scaler = torch.amp.GradScaler(model.device.type, enabled=compute_dtype(model) == torch.float16)
    first_step = state.begin(total_steps, steps_per_epoch, optimizer, scheduler, scaler)  # 0, or --resume's
    network = share_gradients(model, args.seed)  # one process: the model itself; several: the mean of theirs

    with state.stop_on_signals(), Progress(state, first_step, len(train_set), args) as progress:
        for step in range(first_step, total_steps):
            epoch, batch_number = divmod(step, steps_per_epoch)
            if batch_number == 0 or step == first_step:  # every epoch has an order of its own
                model.train()
                batches = make_batches(train_set.lengths, args.batch_size, 1000 * args.seed + epoch)
            share, weight = own_share(batches[batch_number])  # one process: all of it, 1 / sentences
            inputs, labels = collate(train_set, share, model), train_set.labels[share].to(model.device)

            # ---- one step of training ----
            with autocast(model):  # in the type of the frozen base
                logits = network(**inputs).logits  # (sentences, labels)
            loss = weight * F.cross_entropy(logits.float(), labels, label_weights, reduction="sum")
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)  # 0: no clipping
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad()
            # ---- the rest reports, evaluates and saves ----

            state.losses[step] = mean_over_processes(loss.detach())
            done, epoch_ended = step + 1, batch_number + 1 == steps_per_epoch or step + 1 == total_steps
            if epoch_ended or done % args.log_every == 0:
                progress.report(done, scheduler.get_last_lr()[0])
            if epoch_ended:
                progress.end_epoch(done, *evaluate(model, eval_set, args.eval_batch_size))
            if epoch_ended or state.stopped or done % args.save_every == 0:
                state.save(done)
            if state.stopped:
                break


@torch.inference_mode()
def predict(model: nn.Module, sentences: Tokens, batch_size: int) -> Tensor:
    """Logits (sentences, labels) in float32, in the order given; batched by length inside."""
    model.eval()
    logits = torch.zeros(len(sentences), model.config.num_labels)  # where another process answers: zero
    for batch in own_batches(make_batches(sentences.lengths, batch_size)):
        with autocast(model):
            logits[batch] = model(**collate(sentences, batch, model)).logits.float().cpu()
    return sum_over_processes(logits, model.device)


def evaluate(model: nn.Module, sentences: Tokens, batch_size: int) -> tuple[float, Tensor]:
    """Mean cross-entropy (nats), and how often each label (row) was answered with each (column)."""
    logits = predict(model, sentences, batch_size)
    confusion = count_pairs(sentences.labels, logits.argmax(dim=1), logits.shape[1])
    return F.cross_entropy(logits, sentences.labels).item(), confusion


def make_batches(lengths: Tensor, batch_size: int, shuffle_seed: int | None = None) -> list[list[int]]:
    """Turn sentence lengths into batches of indices, each index once, with little padding.

    With a seed: shuffle, sort by length inside windows of 50 batches, shuffle the batches. Random
    batches of 16 SST-2 phrases compute 2.6 times the real tokens, these 1.04 times.
    Without one: longest first, so that a batch too large for the memory fails at once.
    """
    lengths, window, order = lengths.tolist(), max(1, len(lengths)), range(len(lengths))
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
    ids = [sentences[i] for i in batch]
    padded = pad_sequence(ids, batch_first=True, padding_value=model.config.pad_token_id)
    mask = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
    return {"input_ids": padded.to(model.device), "attention_mask": mask.to(model.device)}


# === The run ====================================================================================


def main(argv: list[str] | None = None) -> int | None:
    args = parse_flags(make_parser(__doc__, "model/lora_scratch_distilbert_sst2.pt"), argv)
    check_output(args, is_file=True)
    device, dtype = prepare_machine(args)

    train_table, eval_table, label_names = load_tables(args)
    choose_recipe(args, len(train_table.text), len(label_names))  # rate, steps, targets follow the data
    base = load_base(args.model, args.revision, label_names, args.max_length)
    train_set = tokenize(train_table, base.tokenizer, args.max_length)
    eval_set = tokenize(eval_table, base.tokenizer, args.max_length)

    lora = {key: getattr(args, key) for key in ("targets", "r", "alpha", "dropout", "use_rslora")}
    wrapped = inject_lora(base.model, base.head, **lora)
    set_head_trainable(base, not args.freeze_head)
    cast_base(base, dtype)  # the frozen weights compute in 16 bits where the machine can
    model = base.model.to(device)
    cheapen_dropout(model)  # the same rate, from masks that cost less
    facts = adapter_facts(args, base, label_names, wrapped)  # what rebuilding needs beside the tensors
    counts = count_parameters(dict(model.named_parameters()), base.head)
    describe(args, counts, wrapped, dtype)

    state = TrainingState(args, model, facts | data_facts(train_set, eval_set), dtype)
    train(model, train_set, eval_set, args, state)
    if not leave_group() or state.stopped:  # several processes part here, and the first one saves
        return leave(state)

    temperature = calibrate(model, eval_set, args)  # its percentages are to mean something
    record = make_record(args, counts, dtype, state) | {"temperature": temperature}
    tensors = tensors_to_save(model.state_dict(), base.head)
    save_checkpoint(args.output, tensors, facts | {"record": record}, base.tokenizer)
    reloaded, _ = load_checkpoint(args.output)  # what is judged is the file
    cast_base(reloaded, dtype)
    _, confusion = evaluate(reloaded.model.to(device), eval_set, args.eval_batch_size)
    write_record(args, record, confusion, label_names, args.output.stat().st_size)
    tell_how_to_ask(args.output, eval_table.text)


# === PLUMBING: what a tool needs and the idea does not ==========================================

# --- The base model ------------------------------------------------------------------------------


@dataclass
class Base:
    model: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    head: list[str]  # names of the head's parameters, which no base model brings along
    identity: dict  # what decides an answer besides the head: see identify
    revision: str | None  # the Hub's commit, None for a local folder


def load_base(name: str, revision: str | None, label_names: list[str], max_length: int) -> Base:
    """The pretrained encoder in float32 with a new random head for these labels, and its tokenizer.

    The head is what lies outside the encoder, and a pooler where there is one: it can ship untrained.
    Raises InputError for a base that cannot be loaded, does not fit its tokenizer, or lacks weights.
    """
    transformers.logging.set_verbosity_error()  # what is new is the head, and known
    transformers.logging.disable_progress_bar()
    if (Path(name) / "adapter_config.json").exists():
        raise InputError(f"{name} is an adapter, not a base model; ask it with playground.py --model {name}")
    hint = ""
    if not Path(name).is_dir():
        use_cache_if_offline()
        hint = f"; {WITHOUT_HUB}"
    source = {"revision": revision, "trust_remote_code": False}
    labels = {"id2label": dict(enumerate(label_names))}
    labels["label2id"] = {label: i for i, label in enumerate(label_names)}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **source, **labels)
        check_config(name, config)
        config.problem_type = "single_label_classification"  # whatever the base was trained for
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **source)
        tokenizer.truncation_side = "right"  # as in training, whatever its file says
        model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
            name,
            **source,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # of a head for other labels
            output_loading_info=True,
        )
    except InputError:
        raise
    except Exception as error:  # whatever is wrong with its files: each library raises its own
        remedy = "name a local folder with --model (in playground.py --base)"
        raise InputError(f"cannot load the base model {name!r} ({reason(error)}); {remedy}{hint}") from error
    encoder = f"{model.base_model_prefix}."
    names = sorted(key for key, _ in model.named_parameters())
    head = [key for key in names if not key.startswith(encoder) or ".pooler." in key]
    mismatched = [key for key, *_ in report["mismatched_keys"]]
    wrong = [key for key in names if key in {*report["missing_keys"], *mismatched} and key not in head]
    shapes = {without_numbers(key.removeprefix(encoder)) for key in names}
    unread = [key for key in report["unexpected_keys"] if re.search(r"\.\d+\.", key)]
    unread = [key for key in unread if without_numbers(key.removeprefix(encoder)) in shapes]
    if unread:
        what = f"its file has weights that its config.json leaves out ({', '.join(sorted(unread)[:3])})"
        raise InputError(f"{name}: {what}; use the model's own config.json")
    if wrong:
        what = f"{len(wrong)} weights are missing or of another shape ({', '.join(wrong[:3])})"
        raise InputError(f"{name}: {what}; use a complete base model and its own config.json")
    if mismatched:
        note(f"{name} was trained for other labels: it gets a new classification head")
    check_tokenizer(name, model, tokenizer, max_length)
    model.config.pad_token_id = tokenizer.pad_token_id
    compute_cls_only(model)
    multiply_by_onednn(model)
    identity = identify(model, tokenizer, head)
    return Base(model, tokenizer, head, identity, getattr(config, "_commit_hash", None))


def without_numbers(key: str) -> str:
    """The name of a parameter in whatever layer."""
    return re.sub(r"\.\d+\.", ".*.", key)


def check_config(name: str, config: transformers.PretrainedConfig) -> None:
    """Raise InputError for a model that is no encoder of a size that can be meant."""
    if config.is_encoder_decoder:
        raise InputError(f"{name}: {config.model_type} has a decoder; use an encoder such as DistilBERT")
    layers = getattr(config, "num_hidden_layers", 1)
    if not isinstance(layers, int) or layers > 200:
        raise InputError(f"{name}: {layers!r} layers in its config.json; 200 is the most that is read here")


def check_tokenizer(name: str, model: nn.Module, tokenizer: Callable, max_length: int) -> None:
    """Raise InputError unless every token has an embedding and every token up to the limit a place."""
    embeddings = model.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id is None:
        raise InputError(f"{name}: its tokenizer has no padding token; use an encoder such as DistilBERT")
    if tokenizer.padding_side != "right":
        raise InputError(f"{name}: its tokenizer pads at the left, which is not read here; use another base")
    if len(tokenizer) > embeddings:
        what = f"a tokenizer of {len(tokenizer)} entries does not fit {embeddings} embeddings"
        raise InputError(f"{name}: {what}; use the model's own")
    limits = [getattr(model.config, "max_position_embeddings", None) or -1, tokenizer.model_max_length]
    for path, module in model.named_modules():
        if last_name(path) == "position_embeddings" and getattr(module, "padding_idx", None) is not None:
            limits[0] -= module.padding_idx + 1  # RoBERTa counts its positions from there
    limit = min((limit for limit in limits if limit > 0), default=math.inf)  # -1 is XLNet's "none"
    if not 3 <= max_length <= limit:
        what = f"--max-length {max_length} is not between 3 and {limit}"
        raise InputError(f"{what}, the most that {name} can read")


PROBES = ["Naïve CAFÉ, don't  stop!\tÅngström 東京 № ½ 😀 re-use_it (1,000.50 €) #x @y http://a.b/c?d=e ß ﬁ"]
NOT_COMPUTED = {  # what a configuration says besides how to compute
    *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "id2label"),
    *("label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "return_dict"),
    *("output_attentions", "output_hidden_states", "use_cache", "_attn_implementation", "tokenizer_class"),
    *("_commit_hash", "auto_map", "initializer_range"),
}


def set_head_trainable(base: Base, trained: bool) -> None:
    """Train the head, or leave it as random as it starts: the published recipe."""
    for name in base.head:
        base.model.get_parameter(name).requires_grad_(trained)


def identify(model: nn.Module, tokenizer: Callable, head: list[str]) -> dict:
    """What decides an answer besides the head, as a checkpoint keeps it, to recognise the same base.

    fingerprint  SHA-256 of all other parameters, in float32
    config       the configuration's fields that take part in computing
    tokenizer    SHA-256 of the vocabulary and of what becomes of a difficult sentence
    """
    from hashlib import sha256

    digest = sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name not in head:
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().contiguous().numpy())
            if not parameter.isfinite().all():
                raise InputError(
                    f"{model.config._name_or_path}: {name} has NaN or infinity in it; use a sound base"
                )
    config = json.loads(model.config.to_json_string(use_diff=False))
    words = [sorted(tokenizer.get_vocab().items()), tokenizer(PROBES)["input_ids"]]
    return {
        "fingerprint": digest.hexdigest(),
        "config": {k: v for k, v in config.items() if k not in NOT_COMPUTED and "drop" not in k},
        "tokenizer": sha256(json.dumps(words).encode()).hexdigest(),
    }


def load_trained_base(
    path: str | Path, facts: dict, base_name: str | None, load: Callable | None = None
) -> Base:
    """The base model that a checkpoint's facts name, or `base_name`: refused unless it is the same."""
    name = base_name or facts["base"]
    revision = None if base_name else facts["revision"]
    base = (load or load_base)(name, revision, facts["label_names"], facts["max_length"])
    then, now = facts["fingerprint"], base.identity["fingerprint"]
    if now != then:
        what = f"trained on {facts['base']!r} ({then[:12]}), but {name!r} is another base ({now[:12]})"
        raise InputError(f"{path} was {what}")
    if "tokenizer" not in facts or "config" not in facts:
        note(f"{path} is of an earlier version: its base's weights are checked, its tokenizer is not")
        return base
    for key, value in base.identity["config"].items():
        if key in facts["config"] and facts["config"][key] != value:
            what = (
                f"trained with {key} {facts['config'][key]!r}, but the config.json of {name!r} says {value!r}"
            )
            raise InputError(f"{path} was {what}")
    if base.identity["tokenizer"] != facts["tokenizer"]:
        raise InputError(f"{path} was trained with another tokenizer than that of {name!r}; use its own")
    return base


@functools.cache
def use_cache_if_offline() -> None:
    """Ask the Hub once, for 5 seconds: its libraries would retry for half a minute before they say no."""
    import threading
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    answers = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # no network, no such name, a captive portal, a misspelt address
            with contextlib.suppress(urllib.error.HTTPError):  # which is an answer all the same
                urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()
            answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)  # a name look-up obeys no timeout: do not wait for it
    thread.start()
    thread.join(5)
    constants.HF_HUB_OFFLINE = not answers


def last_name(path: str) -> str:
    """The last name of a path: q_lin of distilbert.transformer.layer.0.attention.q_lin."""
    return path.rpartition(".")[2]


# --- Tables --------------------------------------------------------------------------------------

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
SPLITS = {"train": "train", "training": "train"}  # file name without its ending: what it holds
SPLITS |= dict.fromkeys(["validation", "valid", "val", "dev"], "validation")


@dataclass
class Table:
    text: list[str]
    label: list[int]  # index into the label names


@dataclass
class Tokens:
    """Tokenised sentences in flat arrays: Python lists of numbers would take many times the memory."""

    ids: Tensor  # (tokens of all sentences,), int32
    lengths: Tensor  # (sentences,)
    labels: Tensor  # (sentences,), zeros where unknown

    def __post_init__(self):
        self.ends = self.lengths.cumsum(0).tolist()

    @classmethod
    def from_lists(cls, input_ids: list[list[int]]) -> Tokens:
        flat = torch.tensor([number for ids in input_ids for number in ids], dtype=torch.int32)
        lengths = torch.tensor([len(ids) for ids in input_ids], dtype=torch.int64)
        return cls(flat, lengths, torch.zeros_like(lengths))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> Tensor:
        """The token numbers of sentence i."""
        return self.ids[self.ends[i] - int(self.lengths[i]) : self.ends[i]].long()


def tokenize(table: Table, tokenizer: Callable, max_length: int) -> Tokens:
    """The table's sentences as token numbers, cut at `max_length`."""
    options = {"truncation": True, "max_length": max_length, "return_attention_mask": False}
    parts = []
    for start in range(0, len(table.text), 10_000):  # a part at a time: what a tokenizer returns is large
        texts = table.text[start : start + 10_000]
        parts.append(Tokens.from_lists(tokenizer(texts, **options)["input_ids"]))
    ids, lengths = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "lengths"))
    full = (lengths == max_length).nonzero().flatten().tolist()
    whole = tokenizer([table.text[i] for i in full])["input_ids"] if full else []
    cut = [len(one) for one in whole if len(one) > max_length]
    if cut:
        what = f"{len(cut):,} of {len(lengths):,} texts are cut at {max_length} tokens"
        note(f"{what}; --max-length {min(max(cut), tokenizer.model_max_length)} would cut the fewest")
    return Tokens(ids, lengths, torch.tensor(table.label))


def load_tables(args: argparse.Namespace) -> tuple[Table, Table, list[str]]:
    """Training and validation sentences, and the names of their labels."""
    splits = read_splits(args)
    if "train" in splits:
        args.text_column, args.label_column = find_columns(args, splits["train"])
    if "train" not in splits:
        raise InputError(f"{args.dataset}: no training split; call it train.csv, .tsv, .jsonl or .parquet")
    texts, labels, rows = read_rows(args, "training", splits["train"])
    if "validation" in splits:
        eval_texts, eval_labels, _ = read_rows(args, "validation", splits["validation"])
        kept = range(len(texts))
    else:
        kept, held = hold_out(texts, labels, args.seed)
        what = f"a tenth of each label, {len(held)} rows, is held out by seed"
        print(f"{visible(args.dataset)} has no validation split: {what}")
        eval_texts, eval_labels = [texts[i] for i in held], [labels[i] for i in held]
    if args.train_samples:
        order, kept = shuffled(len(texts), args.seed), set(kept)
        kept = [i for i in order if i in kept][: args.train_samples]
    if not kept:
        raise InputError(
            f"{args.dataset}: one sentence is too few to hold a tenth out; give a validation split"
        )
    labels, eval_labels = without_fractions(args.dataset, args.label_column, labels, eval_labels)
    class_names = splits["train"].attrs.get("names", {}).get(args.label_column)
    index, names = number_labels(args, labels, eval_labels, class_names)
    tell_about(args, texts, labels, rows, eval_texts if "validation" in splits else [])
    train_table = Table([texts[i] for i in kept], [index[labels[i]] for i in kept])
    return train_table, Table(eval_texts, [index[label] for label in eval_labels]), names


def read_splits(args: argparse.Namespace) -> dict:
    """The splits of a folder, a file or a Hub data set as pandas tables: train, and perhaps validation."""
    path = Path(args.dataset)
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()  # by save_to_disk
    if path.is_dir() and not saved:
        part = path / (args.dataset_config or ".")  # as in a copy of a Hub data set
        return read_folder(part if part.is_dir() else path)
    if path.is_file() and path.suffix.lower() in FORMATS:
        return {"train": read_file(path)}
    named_as_path = path.suffix.lower() in FORMATS or args.dataset.startswith((".", "/", "~"))
    if not saved and (path.exists() or named_as_path):
        what = "not read here" if path.is_file() else "no such file"
        raise InputError(f"--dataset {path}: {what}; give a folder or a file ending in {listed(FORMATS)}")
    return load_data_set(args, saved)


def read_folder(path: Path) -> dict:
    """The splits of a folder of tables, or of its folder data: train.csv, or the Hub's numbered parts."""
    import pandas

    if not any(file.suffix.lower() in FORMATS for file in path.iterdir()) and (path / "data").is_dir():
        path = path / "data"
    files, unused = {}, []
    for file in sorted(path.iterdir()):
        if file.suffix.lower() in FORMATS:
            stem, _, part = file.stem.lower().partition("-")  # train-00000-of-00002
            if stem in SPLITS and re.fullmatch(r"(\d{5}-of-\d{5}(-\w+)?)?", part):
                files.setdefault(SPLITS[stem], []).append(file)
            elif stem not in ("test", "testing"):
                unused.append(file.name)
    if unused and files:
        note(f"{path}: not used: {listed(unused)}")
    for parts in files.values():
        found = [re.search(r"-(\d{5})-of-(\d{5})", file.name) for file in parts]
        count = int(found[0][2]) if found[0] else 1
        numbers = [int(match[1]) if match else 0 for match in found]
        if numbers != list(range(count)) or any(
            bool(match) != (count > 1 or bool(found[0])) for match in found
        ):
            names = listed([file.name for file in parts])
            raise InputError(f"{path}: two files for one split, or a part is missing ({names}); see to that")
    splits = {}
    for split, parts in files.items():
        tables = [read_file(file) for file in parts]
        splits[split] = pandas.concat(tables, ignore_index=True) if len(tables) > 1 else tables[0]
        splits[split].attrs = tables[0].attrs
    return splits


def load_data_set(args: argparse.Namespace, saved: bool) -> dict:
    """The splits of a data set of the Hub, or of a folder of save_to_disk, as pandas tables."""
    if not saved:
        use_cache_if_offline()
    import datasets  # a second, for those alone who need it; after the Hub was asked, whose answer it copies

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # an error is told once, as InputError
    if not on_terminal():
        datasets.disable_progress_bars()
    try:
        if saved:
            data = datasets.load_from_disk(args.dataset)
        else:
            revision = GLUE[2] if args.dataset == GLUE[0] else None
            data = datasets.load_dataset(args.dataset, args.dataset_config, revision=revision)
    except Exception as error:  # of the network, of the Hub's files, of a damaged folder
        hint = "" if saved else f"; {WITHOUT_HUB}"
        what = f"cannot load the data set {args.dataset!r} ({reason(error)})"
        raise InputError(f"{what}; name a local one with --dataset{hint}") from error
    if isinstance(data, datasets.Dataset):
        data = {"train": data}
    return {SPLITS[name]: as_frame(data[name].with_format("arrow")[:]) for name in data if name in SPLITS}


def read_file(path: Path):
    """One file as a pandas table; every field of a CSV or TSV file stays the text that it is."""
    import pandas  # half a second, for those alone who read a table

    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            from pyarrow import parquet

            table = as_frame(parquet.read_table(path))
        elif suffix in (".jsonl", ".json"):
            table = pandas.DataFrame(read_json(path), dtype=object)
        else:
            table = read_csv(path)
    except Exception as error:  # each parser raises its own
        raise InputError(f"{path}: cannot be read ({reason(error)}); fix the file") from error
    names = [str(name).strip() for name in table.columns]
    if names != list(map(str, table.columns)) and len(set(names)) == len(names):
        note(f"{path}: spaces around names of columns are left out")
        table.columns = names
    return table


def read_csv(path: Path):
    """A CSV or TSV file without any guessing: "null" and "NA" are words, "007" is text."""
    import csv

    import pandas

    encoding = find_encoding(path)
    with open(path, encoding=encoding, newline="\n") as file:
        first = header = next(file, "")
        while header and not header.strip():
            header = next(file, "")
    options = {"dtype": str, "na_filter": False, "encoding": encoding}
    is_tsv = path.suffix.lower() == ".tsv"
    if is_tsv:  # as GLUE writes it: a quote character is text, and only a newline ends a row
        options |= {"sep": "\t", "quoting": csv.QUOTE_NONE, "lineterminator": "\n"}
    elif "," not in header and (";" in header or "\t" in header):
        options["sep"] = ";" if ";" in header else "\t"
        note(f"{path}: its columns are separated by {'semicolons' if ';' in header else 'tabs'}")
    names = pandas.read_csv(path, header=None, nrows=1, **options).iloc[0]
    if len(names) == 1 and header == first:
        options["skip_blank_lines"] = False  # a blank line of one column is a row
    table = pandas.read_csv(path, **options)
    table.attrs["header"] = [name.removesuffix("\r") for name in names]  # pandas changes empty and equal ones
    table.attrs["sep"] = "," if is_tsv else options.get("sep", ",")
    with open(path, "rb") as file:
        marked = file.read(2) in (b"\xef\xbb", b"\xff\xfe", b"\xfe\xff")
    table.attrs["marked"] = marked or encoding == "cp1252"  # Excel looks for a mark
    if not isinstance(table.index, pandas.RangeIndex):  # pandas took the first column for row names
        raise ValueError("its rows have more fields than its header has names")
    if is_tsv and header.endswith("\r\n"):
        last = table.columns[-1]
        table[last] = table[last].str.removesuffix("\r")
        table = table.rename(columns={last: last.removesuffix("\r")})
    if is_tsv and any(looks_quoted(table[name].head(1000)) for name in table.columns):
        note(f"{path}: it has fields in quotes, which are text in a .tsv file; call it .csv if they are not")
    return table


def looks_quoted(column) -> bool:
    """Whether a column of a TSV file was written with a CSV file's quotes: all in quotes, or "" inside."""
    wrapped = column[column.str.fullmatch(r'"(?:[^"]|"")+"')]
    return len(wrapped) == len(column) > 0 or bool(wrapped.str[1:-1].str.contains('""').any())


def find_encoding(path: Path) -> str:
    """What a byte-order mark says, or UTF-8; text that is neither is read as Windows-1252, with a note."""
    with open(path, "rb") as file:
        if (mark := file.read(2)) in (b"\xff\xfe", b"\xfe\xff"):
            return "utf-16"
        if b"\0" in mark:
            raise ValueError("this is UTF-16 without its mark, or no text: save the file as UTF-8")
        file.seek(0)
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                if re.search(rb"[\x00-\x08\x0e-\x1f\x81\x8d\x8f\x90\x9d]", line + mark):
                    raise ValueError(f"line {number} is not UTF-8 text: save the file as UTF-8") from error
                note(f"{path}: line {number} is not UTF-8; read as Windows-1252: is that right?")
                return "cp1252"
    return "utf-8-sig"


def read_json(path: Path) -> list[dict]:
    """The rows of a file of JSON: one object a line, or one array of objects."""
    with open(path, encoding=find_encoding(path)) as file:
        is_array = next((line for line in file if line.strip()), "").lstrip().startswith("[")
        file.seek(0)
        rows = json.load(file) if is_array else [json.loads(line) for line in file if line.strip()]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError("not one JSON object a line")
    json.dumps(rows, ensure_ascii=False).encode()  # half characters are no text
    return rows


def as_frame(table):
    """An Arrow table as a pandas table that keeps its values; names of classes go into its `attrs`."""
    import pandas

    frame = table.to_pandas(types_mapper=pandas.ArrowDtype, ignore_metadata=True)
    features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = features.get("info", {}).get("features", {})
    frame.attrs["names"] = {name: feature.get("names") for name, feature in features.items()}
    return frame


def read_columns(where: str | Path, table, columns: list[str]) -> list[list]:
    """The values of some columns of a pandas table, None where there is none; raises InputError by name."""
    import pandas

    for column in columns:
        if column not in table.columns:
            what = f"no column {column!r} but {listed(list(table.columns))}"
            remedy = "see --text-column and --label-column, and whether the first row holds the names"
            raise InputError(f"{where}: {what}; {remedy}")
    values = [table[column].tolist() for column in columns]
    return [[None if pandas.api.types.is_scalar(v) and pandas.isna(v) else v for v in one] for one in values]


TEXT_NAMES = (
    "sentence text review comment message title content body description headline tweet query question"
)
LABEL_NAMES = "label labels class category sentiment intent stars rating topic target emotion"


def find_columns(args: argparse.Namespace, table) -> tuple[str, str]:
    """The columns of text and label: those given, the usual names, or the only ones that look like it.

    Raises InputError, with a list, where two could be meant or none.
    """
    if args.text_column and args.label_column:
        return args.text_column, args.label_column
    names = [name for name in table.columns if not name.startswith("Unnamed:")]
    text = args.text_column or choose_column(args.dataset, table, "text", names, TEXT_NAMES)
    rest = [name for name in names if name != text]
    label = args.label_column or choose_column(args.dataset, table, "label", rest, LABEL_NAMES)
    values = table[label].head(2000).astype(str).tolist() if label in table.columns else []
    guessed = not args.text_column and not args.label_column
    if guessed and (len(text) > 40 or label in values):
        what = f"its first row looks like data and not like names of columns: {listed(names)}"
        raise InputError(f"{args.dataset}: {what}; put a row of names above it")
    if (text, label) != ("sentence", "label"):
        note(f"{args.dataset}: {text!r} is taken for the text, {label!r} for the label")
    return text, label


def choose_column(where: str, table, what: str, names: list[str], usual: str) -> str:
    """The column of that kind; raises InputError where it is not clear which."""
    found = [name for name in names if name.lower() == usual.split()[0]]
    found = found or [name for name in names if name.lower() in usual.split()]
    if not found:
        found = [name for name in names if looks_like(what, table[name])]
    if len(found) > 1:
        remedy = f"choose with --{what}-column"
        raise InputError(f"{where}: several columns could be the {what}: {listed(found)}; {remedy}")
    return found[0] if found else usual.split()[0]  # which is not there: whoever reads it says so


def looks_like(what: str, column) -> bool:
    """Whether a column has long varied texts, or few short values that come again."""
    values = [str(value) for value in column.head(2000).dropna().tolist() if str(value).strip()]
    if not values:
        return False
    length, kinds = sum(map(len, values)) / len(values), len(set(values))
    if what == "text":
        return length > 20 and kinds > len(values) / 2
    return length < 40 and 2 <= kinds <= max(2, len(values) / 3)


def read_rows(args: argparse.Namespace, name: str, table) -> tuple[list[str], list[str], list[int]]:
    """Texts, labels and row numbers of one split, checked; blank sentences are skipped and counted."""
    texts, labels = read_columns(args.dataset, table, [args.text_column, args.label_column])
    kept = []
    for i, text in enumerate(texts):
        check_text(f"{args.dataset}: {name} row {i + 1}", args.text_column, text)
        if not is_blank(text):
            kept.append(i)
    if not kept:
        raise InputError(f"{args.dataset}: the {name} split is empty; it needs at least one sentence")
    if len(kept) < len(texts):
        blank = len(texts) - len(kept)
        print(f"{args.dataset}: skipped {blank} blank sentences of {len(texts)} in the {name} split")
    labels = as_labels(f"{args.dataset}: {name}", [labels[i] for i in kept], kept)
    return [texts[i] for i in kept], labels, [i + 1 for i in kept]


def check_text(where: str, column: str, text: object) -> None:
    if text is not None and not isinstance(text, str):
        raise InputError(f"{where}: {column!r} is not text but {visible(repr(text), 100)}")


def is_blank(text: str | None) -> bool:
    """Whether there is nothing to read: no text, or white space and characters without a width."""
    import unicodedata

    return (
        not text
        or not (stripped := text.strip())
        or (len(stripped) < 100 and all(c.isspace() or unicodedata.category(c) == "Cf" for c in stripped))
    )


def as_labels(where: str, labels: list, rows: list[int]) -> list[str]:
    """Labels as text, without spaces at their ends; raises InputError for a row without one."""
    import numbers

    for i, label in zip(rows, labels, strict=True):
        if not isinstance(label, (numbers.Number, str)) or not str(label).strip():
            what = f"row {i + 1}: {visible(repr(label), 100)} is no label"
            raise InputError(f"{where} {what}; give whole numbers or names")
    found = {label: str(label).strip() for label in set(labels)}
    if any(found[label] != str(label) for label in found):
        note(f"{where.rstrip(':')}: spaces around labels are left out")
    return [found[label] for label in labels]


def without_fractions(where: str, column: str, *splits: list[str]) -> list[list[str]]:
    """Labels with 1.0 as 1, where all labels are numbers; raises InputError for one that is not whole."""
    found = sorted(set().union(*splits))
    if not all(re.fullmatch(r"-?\d+(\.\d+)?", label) for label in found):
        return list(splits)
    broken = [label for label in found if label.partition(".")[2].strip("0")]
    if broken:
        what = f"{len(found)} different numbers in {column!r}, {broken[0]} among them"
        raise InputError(f"{where}: {what}; labels are whole numbers or names")
    return [[label.partition(".")[0] for label in labels] for labels in splits]


def tell_about(
    args: argparse.Namespace, texts: list[str], labels: list[str], rows: list[int], eval_texts: list[str]
) -> None:
    """A line for each thing in the data that could surprise; silence where there is nothing to say."""
    import pandas

    table = pandas.DataFrame({"text": texts, "label": labels, "row": rows}, dtype=object)
    again = table[table["text"].duplicated(keep=False)]
    if len(again):
        first = again.loc[again["text"] == again["text"].iloc[0], "row"].iloc[:2]
        extra = len(again) - again["text"].nunique()
        note(f"{args.dataset}: {extra:,} rows repeat the text of another, such as rows {listed(list(first))}")
    torn = [group for _, group in again.groupby("text", sort=False) if group["label"].nunique() > 1]
    if torn:
        pair = torn[0].drop_duplicates("label").head(2)
        shown = " and ".join(
            f"{row} ({label})" for row, label in zip(pair["row"], pair["label"], strict=True)
        )
        note(f"{args.dataset}: {len(torn):,} texts have more than one label, such as rows {shown}")
    seen = len(set(eval_texts) & set(texts)) if eval_texts else 0
    if seen:
        note(f"{args.dataset}: {seen:,} validation texts are among the training rows: the result is too good")
    counts = table["label"].value_counts()
    folded = counts.groupby(counts.index.str.casefold()).apply(lambda group: list(group.index))
    for alike in folded[folded.map(len) > 1].head(3):
        note(f"{args.dataset}: labels that differ in case alone are different labels: {listed(alike)}")
    few = [f"{label} ({count})" for label, count in counts.items() if count < 10]
    if few:
        note(f"{args.dataset}: labels with fewer than ten rows: {listed(few, 10)}")


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers below `count` in an order that the seed decides."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def hold_out(texts: list[str], labels: list[str], seed: int) -> tuple[list[int], list[int]]:
    """The rows to train on, and those of a tenth of each label's texts, rounded up.

    It is drawn by text, so that no held-out one is trained on; every label stays in training.
    """
    texts_of = {}
    for i in shuffled(len(labels), seed):
        texts_of.setdefault(labels[i], {})[texts[i]] = True  # a set that keeps its order
    drawn = set()
    for own in texts_of.values():
        if len(own) > 1:
            drawn.update(list(own)[: math.ceil(len(own) / 10)])
    held = {i for i, text in enumerate(texts) if text in drawn}
    if not held:  # a text a label: there is nothing to draw by but rows
        held = set(shuffled(len(labels), seed)[: math.ceil(len(labels) / 10)])
    return [i for i in range(len(texts)) if i not in held], sorted(held)


def number_labels(
    args: argparse.Namespace, labels: list[str], eval_labels: list[str], class_names: list[str] | None
) -> tuple[dict[str, int], list[str]]:
    """The index of each label and the labels' names: by value where all are whole numbers, else by name."""
    found = set(labels)
    numbers = all(re.fullmatch(r"-?\d{1,18}", label) for label in found.union(eval_labels))
    if len(labels) > 20 and len(found) > 0.9 * len(labels):
        what = f"{len(found):,} different labels in {len(labels):,} rows of {args.label_column!r}"
        raise InputError(f"{args.dataset}: {what}; is it the right --label-column?")
    if class_names:
        known = [str(i) for i in range(len(class_names))]
    elif numbers:
        known = sorted(found, key=lambda label: (int(label), label))
    else:
        known = sorted(found)
    if len(known) < 2:
        raise InputError(f"{args.dataset}: the only label is {labels[0]!r}; a classifier needs at least two")
    unknown = sorted(found.union(eval_labels) - set(known))
    if unknown:
        what = f"label {visible(repr(unknown[0]), 60)} of a row is not one of the training labels"
        raise InputError(f"{args.dataset}: {what} {listed(known)}")
    own = class_names or known
    if max(map(len, [*own, *(args.label_names or [])])) > LONGEST_NAME or len(set(own)) < len(own):
        what = f"labels of over {LONGEST_NAME} characters, or two of one name"
        raise InputError(f"{args.dataset}: {what}; is it the right --label-column?")
    names = args.label_names
    if names and not numbers:
        what = "--label-names is for integer labels"
        raise InputError(f"{what}; {args.dataset} has names: {listed(known)}")
    if names and (len(names) != len(known) or len(set(names)) < len(names)):
        what = f"--label-names: {listed(names)} are not {len(known)} names"
        raise InputError(f"{what} for the labels {listed(known)}")
    return {label: i for i, label in enumerate(known)}, names or class_names or known


def weigh_labels(labels: Tensor, model: nn.Module) -> Tensor:
    """(labels,): rare ones more, so that each label has the same weight in all and a row 1 on average."""
    counts = torch.bincount(labels, minlength=model.config.num_labels)
    weights = len(labels) / ((counts > 0).sum() * counts.clamp(min=1))
    return weights.to(model.device)


# --- Checkpoints ---------------------------------------------------------------------------------

FORMAT = 1  # of the checkpoint; a reader refuses a number that it does not know
FACTS = {  # what a checkpoint says beside its tensors, and of which type it is
    "base": str,
    "revision": str | None,
    "fingerprint": str,
    "label_names": list,
    "max_length": int,
    "targets": list,
    "r": int,
    "alpha": int | float,
    "dropout": int | float,
    "use_rslora": bool,
}
LORA_FACTS = ("targets", "r", "alpha", "dropout", "use_rslora")
LONGEST_NAME = 1000  # of a label or a target, in characters
RANGES = {"r": (1, 65_536), "alpha": (0, 1e6), "dropout": (0, 0.99)}  # of flags and of files alike


def adapter_facts(args: argparse.Namespace, base: Base, label_names: list[str], wrapped: list[str]) -> dict:
    """What has to be known to rebuild the model, beside its tensors."""
    return {
        "base": args.model,
        "revision": base.revision,
        "label_names": label_names,
        "max_length": args.max_length,
        "targets": sorted({last_name(path) for path in wrapped}),
        "r": args.r,
        "alpha": args.alpha,
        "dropout": args.dropout,
        "use_rslora": args.use_rslora,
        **base.identity,
    }


def tensors_to_save(state: dict[str, Tensor], head: list[str]) -> dict[str, Tensor]:
    """What a checkpoint keeps: <module path>.lora_A and .lora_B, and the head under its own names."""
    kept = [name for name in state if name.endswith((".lora_A", ".lora_B")) or name in head]
    return {name: state[name].cpu().clone() for name in kept}


def save_checkpoint(path: Path, tensors: dict[str, Tensor], facts: dict, tokenizer: Callable) -> None:
    """Write adapter, head and facts as plain Python values; the tokenizer in a folder beside."""
    checkpoint = {"format": FORMAT, "state_dict": tensors, **facts}
    write_file(path, lambda temporary: torch.save(checkpoint, temporary))
    write_folder(path.with_suffix(""), tokenizer.save_pretrained)


def load_checkpoint(
    path: str | Path, base_name: str | None = None, load: Callable | None = None
) -> tuple[Base, dict]:
    """Rebuild the trained model in float32, on the CPU, from a checkpoint and its base model.

    `base_name` says where the base lies when the checkpoint's own name for it does not, and `load` how
    to get it. Raises InputError for a file that is no checkpoint, for tensors missing, left over,
    misshapen or not finite, and for another base.
    """
    checkpoint = read_tensors(path)
    check_facts(path, checkpoint, FACTS | {"state_dict": dict})
    base = load_trained_base(path, checkpoint, base_name, load)
    try:
        inject_lora(base.model, base.head, **{key: checkpoint[key] for key in LORA_FACTS})
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: its settings do not fit its base ({reason(error)})") from error
    expected = tensors_to_save(base.model.state_dict(), base.head)
    check_tensors(path, checkpoint["state_dict"], expected)
    base.model.load_state_dict(checkpoint["state_dict"], strict=False)  # the keys have been compared
    base.model.eval()
    return base, checkpoint


def read_tensors(path: str | Path) -> object:
    """What a file of torch.save holds, if it is tensors and plain values: code in it is never run."""
    from zipfile import ZipFile

    try:
        with ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load does not look at the checksums
                raise ValueError(damaged)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; python lora_scratch.py makes one") from error
    except Exception as error:  # whatever bytes these are: torch raises half a dozen types
        what = f"not a file of lora_scratch.py, or a damaged one ({type(error).__name__})"
        raise InputError(f"{path}: {what}") from error


def check_facts(path: str | Path, facts: object, kinds: dict) -> None:
    """Raise InputError unless `facts` is of our format and has a value of the right type for each key."""
    found = facts if isinstance(facts, dict) else {}
    if isinstance(found.get("format"), int) and found["format"] != FORMAT:
        message = f"format {found['format']}, but this version reads {FORMAT}"
        raise InputError(f"{path}: {message}; update the project")
    identity = {key: kind for key, kind in (("config", dict), ("tokenizer", str)) if key in found}
    for key, kind in {"format": int, **kinds, **identity}.items():
        value = found.get(key)
        right = key in found and isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if right and key in RANGES:
            right = RANGES[key][0] <= value <= RANGES[key][1]
        if right and key in ("label_names", "targets"):
            right = all(isinstance(name, str) and len(name) <= LONGEST_NAME for name in value)
            right = right and len(set(value)) == len(value) >= (2 if key == "label_names" else 1)
        if not right:
            what = f"its {key!r} is missing or no such value"
            raise InputError(f"{path}: not made by this project, or damaged: {what}")


def check_tensors(path: str | Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise InputError unless both have the same keys, types and shapes and every number is finite."""
    for key in sorted(found.keys() ^ expected.keys(), key=str):
        what = "missing" if key in expected else "not expected"
        raise InputError(f"{path}: tensor {visible(repr(key))} is {what}")
    for key, like in expected.items():
        tensor = found[key]
        if not is_plain(tensor) or tensor.dtype != like.dtype:
            raise InputError(f"{path}: {key!r} is no plain tensor of {like.dtype}")
        if tensor.shape != like.shape or not tensor.isfinite().all():
            what = f"tensor {key!r} {tuple(tensor.shape)}"
            raise InputError(f"{path}: {what} has the wrong shape, NaN or infinity in it")


def is_plain(tensor: object) -> bool:
    """Whether this is a dense tensor with numbers in it."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        return False
    return not (tensor.is_meta or tensor.is_nested or tensor.is_quantized)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then move it into place: whole, or not at all."""
    temporary = path
    try:
        target = path.resolve()  # a link stays a link, and the move stays on one file system
        temporary = target.with_name(f".{os.getpid()}.tmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError is torch.save's word for a full disk
        what = "the old file is unchanged" if path.exists() else "make room or name another place"
        raise InputError(f"cannot write {path} ({reason(error)}); {what}") from error
    finally:
        if temporary != path:
            temporary.unlink(missing_ok=True)


def write_folder(path: Path, write: Callable[[Path], object], last: str = "") -> None:
    """Let `write` fill a temporary folder, which becomes `path`, or whose files move into it, `last` last."""
    import shutil

    from safetensors import SafetensorError

    temporary = Path(f".{os.getpid()}.tmp")
    try:
        target = path.resolve()
        is_new = not target.exists()
        temporary = (target.parent if is_new else target) / temporary
        target.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        for file in temporary.iterdir():
            file.chmod(0o666 & ~mask)  # safetensors writes for its owner alone
        if is_new:
            os.replace(temporary, target)
        else:  # perhaps a mounted volume, which cannot be replaced
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == last):
                os.replace(file, target / file.name)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"cannot write {path} ({reason(error)}); make room or name another place") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --- Resuming ------------------------------------------------------------------------------------


def data_facts(train_set: Tokens, eval_set: Tokens) -> dict[str, str]:
    """SHA-256 of the sentences and labels of both sets: a resumed run has to have the same."""
    from hashlib import sha256

    facts = {}
    for name, tokens in (("training data", train_set), ("validation data", eval_set)):
        digest = sha256()
        for array in (tokens.ids, tokens.lengths, tokens.labels):
            digest.update(array.numpy())
        facts[f"{name}, as SHA-256"] = digest.hexdigest()
    return facts


EPOCH_KEYS = ("epoch", "steps", "train_loss", "eval_loss", "accuracy", "correct", "total", "seconds")
EPOCH_KEYS += ("sentences_per_second",)


class TrainingState:
    """The course of a training, and what --resume needs of it in a file beside the output.

    Adapter and head, optimiser, schedule, scaler, random generators, losses and epochs so far, and the
    settings that have to be the same again. The order of the sentences needs no place: seed and epoch
    decide it.
    """

    MUST_MATCH = ("lr", "epochs", "max_steps", "batch_size", "warmup", "weight_decay", "max_grad_norm")
    MUST_MATCH += ("seed", "train_samples", "freeze_head", "use_dora", "balance")

    def __init__(self, args: argparse.Namespace, model: nn.Module, facts: dict, dtype: torch.dtype):
        self.path = args.output.with_name(f"{args.output.name}.state")
        self.resume = args.resume
        self.model = model
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.settings = {key: getattr(args, key) for key in self.MUST_MATCH if hasattr(args, key)}
        self.settings |= {key: value for key, value in facts.items() if key not in ("base", "revision")}
        self.settings = {key: str(value) for key, value in self.settings.items()}
        self.settings["precision"] = str(dtype)
        self.losses = torch.zeros(0)  # of every step
        self.epochs = []  # a record of each
        self.stopped = 0  # the number of the signal that came
        self.done = 0  # steps, when last saved

    def begin(self, total_steps: int, steps_per_epoch: int, optimizer, scheduler: LambdaLR, scaler) -> int:
        """Put everything back where a run was interrupted; returns the number of its first step."""
        if total_steps > MOST_STEPS:
            raise InputError(f"{total_steps:,} steps are too many; lower --epochs, or give --max-steps")
        self.parts = {"optimizer": optimizer, "scaler": scaler}
        self.scheduler, self.steps_per_epoch = scheduler, steps_per_epoch
        self.losses = torch.zeros(total_steps, device=self.model.device)
        if self.resume and self.path.exists():
            self.load()
        elif self.resume:
            print(f"no training state {self.path} yet: starting from the beginning")
        return self.done

    def load(self) -> None:
        """Put everything back; raises InputError for a file that is not the state of this very run."""
        state = read_tensors(self.path)
        kinds = dict.fromkeys(["settings", "trained", *self.parts], dict)
        check_facts(self.path, state, kinds | {"losses": Tensor, "epochs": list, "generators": list})
        for key, now in self.settings.items():
            then = state["settings"].get(key)
            if then != now:
                what = f"{key} was {visible(then, 60)} and is now {visible(now, 60)}"
                raise InputError(f"--resume: {what}; use the same, or leave out --resume")
        trained = {name: p.detach().cpu() for name, p in self.trained.items()}
        check_tensors(self.path, state["trained"], trained)
        try:
            self.check_parts(state)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            torch.set_rng_state(state["generators"][0])
            if torch.cuda.is_initialized() and len(state["generators"]) > 1:
                torch.cuda.set_rng_state(state["generators"][1])
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{self.path}: not a training state of this run ({reason(error)})") from error
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["trained"][name])
        self.done = len(state["losses"])
        self.scheduler.last_epoch = self.done
        self.losses[: self.done] = state["losses"]
        self.epochs = state["epochs"]
        print(f"resumed after step {self.done}")
        if self.done == len(self.losses):
            print("this run is finished: there is nothing left to train")

    def check_parts(self, state: dict) -> None:
        """Raise ValueError for what does not fit: the fused AdamW trusts its tensors, and would crash."""
        losses, optimizer = state["losses"], state["optimizer"]
        steps = len(losses) if is_plain(losses) and losses.dim() == 1 else 0
        if not 0 < steps <= len(self.losses) or losses.dtype != torch.float32:
            raise ValueError(f"{steps} losses for {len(self.losses)} steps")
        if optimizer["state"].keys() != set(range(len(self.trained))):
            raise ValueError("the optimiser knows other parameters")
        for i, parameter in enumerate(self.trained.values()):
            moments = dict.fromkeys(["exp_avg", "exp_avg_sq"], parameter.detach().cpu())
            found = optimizer["state"][i]
            check_tensors(self.path, found, moments | {"step": torch.tensor(float(steps))})
            skipped = steps - found["step"].item()  # by float16's scaler alone
            if (found["exp_avg_sq"] < 0).any() or not 0 <= skipped <= steps * self.parts[
                "scaler"
            ].is_enabled():
                raise ValueError("the optimiser is of another step")
        (group,) = optimizer["param_groups"]
        (now,) = self.parts["optimizer"].state_dict()["param_groups"]
        rate = now["initial_lr"] * self.scheduler.lr_lambdas[0](steps)
        if any(group[key] != (rate if key == "lr" else now[key]) for key in now):
            raise ValueError("the optimiser has other settings, or is of another step")
        finished = steps == len(self.losses) and steps % self.steps_per_epoch > 0
        if len(state["epochs"]) != steps // self.steps_per_epoch + finished:
            raise ValueError("its epochs are not those of its steps")
        for number, epoch in enumerate(state["epochs"], start=1):
            values = [epoch[key] for key in EPOCH_KEYS]
            if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
                raise ValueError("its epochs are no records")
            if epoch["epoch"] != number or len(epoch) != len(EPOCH_KEYS):
                raise ValueError("its epochs are others")

    def save(self, done: int) -> None:
        """Write the state after `done` steps; weights that are not finite are never written."""
        self.check_finite(done)
        self.done = done
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"format": FORMAT, "settings": self.settings, "trained": self.trained}
        state |= {"losses": self.losses[:done].cpu().clone(), "epochs": self.epochs}
        state["generators"] = [torch.get_rng_state()]  # of the CPU, and of this process's GPU
        if torch.cuda.is_initialized():
            state["generators"].append(torch.cuda.get_rng_state())
        if is_first_process():
            write_file(self.path, lambda temporary: torch.save(state, temporary))

    def check_finite(self, done: int) -> None:
        """Raise InputError where a loss so far or a weight now is not finite: what was saved is sound."""
        bad = (~self.losses[:done].isfinite()).nonzero()
        if len(bad) or not all(p.detach().sum().isfinite() for p in self.trained.values()):
            step = int(bad[0]) + 1 if len(bad) else done
            what = "the loss is" if len(bad) else "the weights are"
            rate = self.scheduler.get_last_lr()[0]
            raise InputError(f"step {step}: {what} not finite, near learning rate {rate:.1e}; lower --lr")

    @contextlib.contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """Note Ctrl-C and SIGTERM instead of dying in the middle of a step; the second one ends at once."""

        def note(number: int, _: object) -> None:
            self.stopped = number
            signal.signal(number, signal.SIG_DFL)

        numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
        former = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def leave(state: TrainingState) -> int:
    """The exit code of a process that does not save a result, after a word on how to go on."""
    if not state.stopped:
        return 0
    print(f"stopped after step {state.done}; the same command with --resume goes on from there", flush=True)
    return 128 + state.stopped


# --- Several processes ---------------------------------------------------------------------------


def rank_and_size() -> tuple[int, int]:
    """This process's number among those that torchrun started, and how many they are: 0 of 1 without."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes(device: torch.device) -> None:
    """Meet the others, where torchrun started several."""
    if dist.is_torchelastic_launched():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def is_first_process() -> bool:
    return rank_and_size()[0] == 0


def leave_group() -> bool:
    """Part from the other processes after the training; whether this is the first one, which goes on."""
    first = is_first_process()
    if dist.is_initialized():
        dist.destroy_process_group()
    return first


def share_gradients(model: nn.Module, seed: int) -> nn.Module:
    """The model; of several processes each gets the mean of all gradients, and a dropout of its own."""
    rank, ranks = rank_and_size()
    if ranks == 1:
        return model
    if rank > 0:
        torch.manual_seed(seed + rank)
    return nn.parallel.DistributedDataParallel(model)


def own_share(batch: list[int]) -> tuple[list[int], float]:
    """This process's part of a batch, and what its sum of losses is multiplied by.

    The mean over all processes is then the mean over the batch. Of a short batch a process may get
    nothing: it computes the first sentence, with weight 0.
    """
    rank, ranks = rank_and_size()
    share = batch[rank::ranks]
    return share or batch[:1], ranks / len(batch) if share else 0.0


def own_batches(batches: list[list[int]]) -> list[list[int]]:
    rank, ranks = rank_and_size()
    return batches[rank::ranks]


def sum_over_processes(logits: Tensor, device: torch.device) -> Tensor:
    """Logits of which each process has computed some rows and left the others zero."""
    if rank_and_size()[1] > 1:
        logits = logits.to(device)  # nccl adds up on the GPU, gloo on the CPU
        dist.all_reduce(logits)
    return logits.cpu()


def mean_over_processes(loss: Tensor) -> Tensor:
    _, ranks = rank_and_size()
    if ranks > 1:
        dist.all_reduce(loss)
    return loss / ranks


# --- What a run says and writes ------------------------------------------------------------------


class Progress:
    """How the training goes: a bar on a terminal, a line now and then elsewhere, and one an epoch."""

    def __init__(self, state: TrainingState, first_step: int, sentences: int, args: argparse.Namespace):
        import time

        from tqdm import tqdm

        self.now = time.perf_counter
        self.state, self.sentences, self.args = state, sentences, args
        self.first = first_step  # of this epoch, or of this run
        self.start = self.now()
        silent = not is_first_process() or not on_terminal()
        total = len(state.losses)
        self.bar = tqdm(total=total, initial=first_step, unit="step", disable=silent, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def report(self, done: int, lr: float) -> None:
        """The mean loss of the last steps; raises InputError where it is not finite."""
        self.state.check_finite(done)  # rarely: it waits for the GPU
        self.seconds = self.now() - self.start
        sentences = min((done - self.first) * self.args.batch_size, self.sentences)
        self.sentences_a_second = sentences / self.seconds
        loss = self.state.losses[max(0, done - self.args.log_every) : done].mean().item()
        rate = f"{self.sentences_a_second:.0f} sentences/s"
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.1e}, {rate}")
        self.bar.update(done - self.bar.n)
        if self.bar.disable and done % (10 * self.args.log_every) == 0:
            total = len(self.state.losses)
            print(f"step {done}/{total}  loss {loss:.4f}  lr {lr:.1e}  {rate}", flush=True)

    def end_epoch(self, done: int, eval_loss: float, confusion: Tensor) -> None:
        """Keep a record of the epoch, and print it."""
        epoch = len(self.state.epochs) + 1
        steps_per_epoch = math.ceil(self.sentences / self.args.batch_size)
        losses = self.state.losses[(epoch - 1) * steps_per_epoch : done]
        correct, total = int(confusion.trace()), int(confusion.sum())
        record = {
            "epoch": epoch,
            "steps": len(losses),
            "train_loss": losses.mean().item(),
            "eval_loss": eval_loss,
            "accuracy": 100 * correct / total,
            "correct": correct,
            "total": total,
            "seconds": self.seconds,
            "sentences_per_second": self.sentences_a_second,
        }
        self.state.epochs.append(record)
        self.bar.clear()
        print(
            f"epoch {epoch}: training loss {record['train_loss']:.4f}, validation loss {eval_loss:.4f}, "
            f"accuracy {record['accuracy']:.2f} % ({correct}/{total}), {self.seconds:.1f} s",
            flush=True,
        )
        self.start, self.first = self.now(), done


def on_terminal() -> bool:
    """Whether a progress bar can be redrawn in place: a notebook would keep every line of it."""
    notebook = {"JPY_PARENT_PID", "COLAB_RELEASE_TAG"} & os.environ.keys()
    return sys.stderr.isatty() and not notebook


def count_parameters(named: dict[str, Tensor], head: list[str]) -> dict[str, int]:
    """How many parameters belong to LoRA, the head and the frozen base, and how many are trained."""
    counts = {"lora": 0, "head": 0, "frozen base": 0, "trained": 0}
    for name, parameter in named.items():
        part = "lora" if "lora_" in name else "head" if name in head else "frozen base"
        counts[part] += parameter.numel()
        counts["trained"] += parameter.numel() if parameter.requires_grad else 0
    return counts


def describe(
    args: argparse.Namespace, counts: dict[str, int], wrapped: list[str], dtype: torch.dtype
) -> None:
    """Print the table of the start: what is trained, on which base, on which machine."""
    leaves = ", ".join(sorted({last_name(path) for path in wrapped}))
    notes = {
        "lora": f"r {args.r}, alpha {args.alpha:g}, on {len(wrapped)} layers ({leaves})",
        "head": "frozen at its random start" if args.freeze_head else "trained",
        "frozen base": visible(args.model),
    }
    total = sum(counts[part] for part in notes)
    for part, note in notes.items():
        print(f"{part:12}{counts[part]:>12,} {100 * counts[part] / total:6.2f} %  {note}")
    print_machine(args, dtype)


def print_machine(args: argparse.Namespace, dtype: torch.dtype) -> None:
    hardware, versions = environment(args)
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{'machine':12}{hardware}, {str(dtype).removeprefix('torch.')}; {named}", flush=True)


LEAST_HELD_OUT = 10  # sentences that a temperature is fitted on


def calibrate(model: nn.Module, sentences: Tokens, args: argparse.Namespace) -> float:
    """Make the model as sure as it is right: divide its logits by one temperature (arXiv:1706.04599).

    The temperature is fitted on the validation sentences and goes into weight and bias of the head's
    last layer, so every format has it. No answer changes. Returns 1, which changes nothing, for a frozen
    head and for fewer than LEAST_HELD_OUT sentences.
    """
    if args.freeze_head:
        return 1.0
    if len(sentences) < LEAST_HELD_OUT:
        what = f"from {len(sentences)} validation sentences, so the percentages may be far too sure"
        print(f"{'temperature':12}none {what}; {LEAST_HELD_OUT} are needed")
        return 1.0
    logits = predict(model, sentences, args.eval_batch_size)
    temperature = fit_temperature(logits, sentences.labels)
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == logits.shape[1]
        and "original_module" not in name  # PEFT's spare copy
    ]
    with torch.no_grad():
        for parameter in layers[-1].parameters():
            parameter /= temperature
    if temperature > 1:
        what = f"{temperature:.2f} divides the logits: fitted on the {len(sentences):,} validation sentences"
        print(f"{'temperature':12}{what}")
    return temperature


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Of 1 to 10 the temperature under which the labels are likeliest; a few that are all right want 0."""
    tried = torch.logspace(0, 1, 101).tolist()
    return min(tried, key=lambda t: F.cross_entropy(logits / t, labels).item())


def environment(args: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """The hardware in words, and the versions that a result depends on."""
    import platform
    from importlib.metadata import version

    capability = torch.backends.cpu.get_cpu_capability()
    hardware = f"{platform.machine()} {capability}, {torch.get_num_threads()} threads"
    if choose_device(args.device).type == "cuda":
        hardware = torch.cuda.get_device_name()
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "datasets"):
        versions[package] = version(package)
    return hardware, versions


def make_record(
    args: argparse.Namespace, counts: dict[str, int], dtype: torch.dtype, state: TrainingState
) -> dict:
    """The run's record in plain Python values: settings, machine, and how the training went."""
    hardware, versions = environment(args)
    losses, every = state.losses.tolist(), args.log_every
    blocks = [losses[i : i + every] for i in range(0, len(losses), every)]
    return {
        "settings": json.loads(json.dumps(vars(args), default=str)),
        "versions": versions,
        "hardware": hardware,
        "precision": str(dtype).removeprefix("torch."),
        "parameters": counts,
        "epochs": state.epochs,
        "loss_curve": {"every": every, "loss": [round(sum(b) / len(b), 5) for b in blocks]},
    }


def write_record(
    args: argparse.Namespace, record: dict, confusion: Tensor, label_names: list[str], size: int
) -> None:
    """Write the run's record beside its result, and print what came out."""
    correct, total = int(confusion.trace()), int(confusion.sum())
    result = {
        "accuracy": 100 * correct / total,
        "correct": correct,
        "total": total,
        "bytes": size,
        "label_names": label_names,
        "confusion": confusion.tolist(),
    }
    text = json.dumps(record | {"result": result}, indent=1) + "\n"
    path = replace_ending(args.output, ".json")
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"saved {args.output} ({size / 1e6:.1f} MB); reloaded, it answers {correct}/{total} right")
    print(label_report(confusion, label_names))
    warn_if_nothing_is_learnt(confusion)
    print(in_words(confusion, label_names))


def warn_if_nothing_is_learnt(confusion: Tensor) -> None:
    one_answer = int((confusion.sum(dim=0) > 0).sum()) == 1
    if one_answer or int(confusion.trace()) <= int(confusion.sum(dim=1).max()):
        what = "it answers one label every time" if one_answer else "it is no better than the commonest label"
        print(f"nothing is learnt yet: {what}; give more rows, more --max-steps or another --lr")


def count_pairs(given: Tensor, answers: Tensor, labels: int) -> Tensor:
    """How often each label (row) was answered with each (column)."""
    return torch.bincount(given * labels + answers, minlength=labels * labels).view(labels, labels)


def macro_f1(confusion: Tensor) -> float:
    """The mean F1 in percent over all labels that were given or answered, as in scikit-learn."""
    both = confusion.sum(dim=0) + confusion.sum(dim=1)
    return (200 * confusion.diagonal().double() / both).nanmean().item()


def in_words(confusion: Tensor, label_names: list[str]) -> str:
    """Accuracy and macro-F1, how sure the first is, and what the commonest label alone would get."""
    right, total = int(confusion.trace()), int(confusion.sum())
    low, high = wilson_interval(right, total)
    most, commonest = (int(x) for x in confusion.sum(dim=1).max(dim=0))
    always = f"always {visible(label_names[commonest], 40)!r}: {100 * most / total:.2f} %"
    interval = f"95 % between {100 * low:.0f} and {100 * high:.0f}"
    accuracy = f"accuracy {100 * right / total:.2f} % ({right}/{total}), {interval}"
    return f"macro-F1 {macro_f1(confusion):.1f} %; {always}\n{accuracy}"


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """Where the true share lies with 95 % confidence (Wilson, 1927), also near 0 and 1."""
    z = 1.959964  # of the normal distribution
    middle = (right + z * z / 2) / (total + z * z)
    half = z / (total + z * z) * math.sqrt(right * (total - right) / total + z * z / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def label_report(confusion: Tensor, label_names: list[str]) -> str:
    """Precision, recall and F1 of each label in percent, - where undefined; the matrix of up to 10 labels."""
    import pandas

    names = [visible(" ".join(name.split()), 20) for name in label_names]
    right, given, real = confusion.diagonal(), confusion.sum(dim=0), confusion.sum(dim=1)
    columns = {
        "label": names,
        "precision": 100 * right / given,
        "recall": 100 * right / real,
        "F1": 200 * right / (given + real),
        "sentences": real,
    }
    header = list(columns)
    if len(names) <= 10:
        columns |= {"answered as:": [""] * len(names), **{i: confusion[:, i] for i in range(len(names))}}
        header += ["answered as:", *names]
    table = pandas.DataFrame(columns)
    return table.to_string(header=header, index=False, float_format="%.1f", na_rep="-")


def tell_how_to_ask(output: Path, texts: list[str]) -> None:
    """Print the command that asks the result about the shortest sentence."""
    from shlex import join

    order = {text: (not text.isprintable(), text.startswith("-"), len(text)) for text in texts}
    text = visible(" ".join(min(texts, key=order.get).split()), 100)
    script = os.path.join(os.path.dirname(sys.argv[0]), "playground.py")
    path = os.path.join(".", output) if str(output).startswith("-") else str(output)
    command = [sys.orig_argv[0], script, "--model", path, *(["--"] if text.startswith("-") else []), text]
    print(f"ask it: {join(command)}")


def replace_ending(output: Path, ending: str) -> Path:
    """What stands beside an output, a .pt file or a folder: run.json of run.pt, lr0.1.json of lr0.1."""
    return output.with_name(output.name.removesuffix(".pt") + ending)


# --- Flags and the machine -----------------------------------------------------------------------

GLUE = ("nyu-mll/glue", "sst2", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c")  # name, configuration, revision
DISTILBERT = ("distilbert/distilbert-base-uncased", "12040accade4e8a0f71eabdb258fecc2e7e948be")
LOCAL_MODEL, LOCAL_DATA = "model/distilbert-base-uncased", "dataset/glue_sst2_local"  # taken where they exist
DEMO = {"model": "model/minilm-l6-distilbert", "dataset": "dataset/demo"}
RECIPES = {  # what becomes of the flags that are not given; measured in tests/results/README.md
    "published": {"lr": 2e-4, "batch_size": 16, "epochs": 3, "warmup": 0.06},  # query and value
    "own": {"targets": ["all-linear"], "lr": 1e-3, "batch_size": 16, "epochs": 3, "warmup": 0.06},
    "best": {"targets": ["all-linear"], "lr": 1e-3, "batch_size": 32, "epochs": 2, "warmup": 0.06},
}
LEAST_STEPS = 400  # but for "published": fewer rows are seen more often
MANY_LABELS = 20  # but for "published": from there on the head has more to learn, and the rate is doubled
WITHOUT_HUB = "without the Hub: README, Set-up; or ./setup.sh --demo, then python lora_scratch.py --demo"


MOST_STEPS = 10**8


def between(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from low to high."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose messages fit a terminal, whatever was typed."""

    def error(self, message: str) -> None:
        super().error(visible(message, 400))


def make_parser(description: str, output: str) -> argparse.ArgumentParser:
    """The flags of both training scripts."""
    parser = Parser(
        description=description,
        usage="%(prog)s [options], see --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    count, share = between(int, 1, MOST_STEPS), between(float, 0, 1)
    add = parser.add_argument_group("model and data").add_argument
    demo = ", ".join(f"{key} {value}" for key, value in DEMO.items())
    add("--demo", action="store_true", help=f"without the Hub: {demo}")
    default = f"(default: {LOCAL_MODEL} if there, else {DISTILBERT[0]})"
    add("--model", help=f"base model: folder or Hub name {default}")
    add("--revision", help="the Hub's revision of the base model (default: pinned for the default model)")
    default = f"(default: {LOCAL_DATA} if there, else {GLUE[0]})"
    add("--dataset", help=f"file, folder or Hub name {default}")
    add("--dataset-config", help=f"configuration of a Hub data set (default for {GLUE[0]}: {GLUE[1]})")
    add(
        "--text-column",
        help="column with the text (default: sentence, text, review, ... or the one of long texts)",
    )
    add("--label-column", help="column with the label (default: label, class, ... or the one of few values)")
    add("--label-names", nargs="+", metavar="NAME", help="names for integer labels, in their order")
    add("--train-samples", type=count, metavar="N", help="train on N random sentences (default: all)")
    add(
        "--max-length",
        type=between(int, 3, 10**6),
        default=128,
        help="tokens; longer text is cut (%(default)s)",
    )
    add = parser.add_argument_group("LoRA").add_argument
    add("--r", type=between(int, *RANGES["r"]), default=8, help="rank of the update (default: %(default)s)")
    add(
        "--alpha",
        type=between(float, *RANGES["alpha"]),
        default=16.0,
        help="scaling = alpha / r (default: %(default)g)",
    )
    dropout = between(float, *RANGES["dropout"])
    add("--dropout", type=dropout, default=0.1, help="on the LoRA branch (default: %(default)s)")
    add("--targets", nargs="+", metavar="NAME", help="linear layers, or all-linear (default: recipe)")
    add("--use-rslora", action="store_true", help="scaling = alpha / sqrt(r) instead")
    add("--freeze-head", action="store_true", help="leave the head at its random start: the published recipe")
    add = parser.add_argument_group("training").add_argument
    recipes = ["auto", *RECIPES]
    add(
        "--recipe",
        choices=recipes,
        default="auto",
        help="auto: published for SST-2, own for other data; best: tens of thousands of rows",
    )
    add("--balance", action="store_true", help="weigh the loss by label, rare ones more (default: off)")
    add("--epochs", type=count, help="times through the data (default: the recipe's)")
    add("--max-steps", type=count, metavar="N", help="stop after N steps instead (default: off)")
    add("--batch-size", type=count, help="sentences a step (default: the recipe's)")
    add("--eval-batch-size", type=count, default=32, help="sentences, evaluation (default: %(default)s)")
    add("--lr", type=between(float, 0, 1e3), help="peak rate of AdamW (default: the recipe's)")
    add("--warmup", type=share, help="share of the steps, then decay (default: the recipe's, 0.06)")
    add("--weight-decay", type=between(float, 0, 1e3), default=0.01, help="of AdamW (default: %(default)s)")
    add(
        "--max-grad-norm",
        type=between(float, 0, 1e9),
        default=1.0,
        help="clipping, 0: none (default: %(default)s)",
    )
    add(
        "--seed", type=between(int, 0, 2**32 - 1), default=42, help="of all randomness (default: %(default)s)"
    )
    add = parser.add_argument_group("machine and output").add_argument
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is one")
    precisions = ["auto", "fp32", "bf16", "fp16"]
    add(
        "--precision",
        choices=precisions,
        default="auto",
        help="auto: 16 bits where the machine computes in them",
    )
    add("--threads", type=between(int, 1, 1024), metavar="N", help="CPU threads (default: PyTorch's choice)")
    add("--log-every", type=count, default=20, metavar="N", help="steps a report, 10 N off a terminal (20)")
    add("--save-every", type=count, default=500, metavar="N", help="steps a training state (%(default)s)")
    add("--resume", action="store_true", help="go on from the training state beside --output")
    help = "where the result goes (default: %(default)s, for other data by its name)"
    add("--output", type=Path, default=Path(output), help=help)
    return parser


def parse_flags(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The flags, with the defaults that depend on --demo and on what lies in this folder."""
    args = parser.parse_args(argv)
    if args.demo:
        output = parser.get_default("output")
        demo_output = output.with_name(output.name.replace("distilbert_sst2", "demo"))
        parser.set_defaults(**DEMO, output=demo_output)
        args = parser.parse_args(argv)
        if args.model == DEMO["model"] and not Path(args.model).is_dir():
            raise InputError(f"--demo: no base model in {args.model} yet; ./setup.sh --demo makes it")
    if args.model is None:
        args.model = LOCAL_MODEL if Path(LOCAL_MODEL).is_dir() else DISTILBERT[0]
    if args.model == DISTILBERT[0]:
        args.revision = args.revision or DISTILBERT[1]
    if args.dataset is None:
        args.dataset = LOCAL_DATA if Path(LOCAL_DATA).is_dir() else GLUE[0]
    if args.dataset == GLUE[0]:
        args.dataset_config = args.dataset_config or GLUE[1]
    is_own = args.dataset not in (GLUE[0], LOCAL_DATA, DEMO["dataset"])
    if is_own and args.output == parser.get_default("output"):
        stem = re.sub(r"\W+", "_", Path(args.dataset).stem)[:100] or "data"  # SST-2's model stays what it is
        args.output = args.output.with_name(re.sub("distilbert_sst2|demo", stem, args.output.name))
    return args


def choose_recipe(args: argparse.Namespace, rows: int, labels: int) -> None:
    """Fill in the flags that were not given, by --recipe and the size of the data, and print them."""
    if args.recipe == "auto":
        is_sst2 = args.dataset == GLUE[0] or Path(args.dataset).resolve() == Path(LOCAL_DATA).resolve()
        args.recipe = "published" if is_sst2 else "own"
    recipe = dict(RECIPES[args.recipe])
    if args.recipe != "published" and labels >= MANY_LABELS:
        recipe["lr"] *= 2
    if args.recipe == "own" and rows >= 20_000:
        recipe["epochs"] = 1
    steps = recipe["epochs"] * math.ceil(rows / (args.batch_size or recipe["batch_size"]))
    if args.recipe != "published" and args.epochs is None and steps < LEAST_STEPS:
        recipe["max_steps"] = LEAST_STEPS
    for key, value in recipe.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    targets = " ".join(args.targets or ["query and value"]).replace("all-linear", "all linear")
    length = f"{args.max_steps} steps" if args.max_steps else f"{args.epochs} epochs"
    size = f"{rows:,} rows, {labels:,} labels"
    batch = f", batches of {args.batch_size}" if args.batch_size != 16 else ""
    print(f"{'recipe':12}{args.recipe}, {size}: {targets} layers, {args.lr:g}, {length}{batch}")


def check_output(args: argparse.Namespace, is_file: bool) -> None:
    """Refuse, before the training, what cannot be written or would replace what this project did not write.

    Raises InputError that names the file: the result, its folder, its record or its training state.
    """
    output = args.output
    shown = visible(output)
    if is_file and output.suffix != ".pt":
        raise InputError(f"--output {shown}: give a file name that ends in .pt")
    if (
        output.name.removesuffix(".pt") in ("", ".", "..")
        or "\\" in output.name
        or not str(output).isprintable()
    ):
        raise InputError(f"--output {shown}: give the name of a new {'file' if is_file else 'folder'}")
    files = [replace_ending(output, ".json"), output.with_name(f"{output.name}.state")]
    folder = replace_ending(output, "") if is_file else output
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for path in [output, *files] if is_file else files:
            if path.is_dir() or (path.is_symlink() and not path.exists()):
                raise InputError(f"--output: {path} stands in the way; move it away or name another place")
            if path.exists() and not is_ours(path):
                raise InputError(f"--output: {path} was not written here; move it away or name another place")
            probe_place(path.resolve().parent, path.name)
        if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
            raise InputError(
                f"--output: a file stands at {folder}, where a folder must be; name another place"
            )
        if folder.is_dir():
            if any(folder.iterdir()) and not is_ours(output):
                raise InputError(f"--output: {folder} has files of others in it; name another place")
            probe_place(folder, "")
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise InputError(f"--output {shown}: cannot write there ({why}); name another place") from error


def probe_place(folder: Path, name: str) -> None:
    """Raise OSError where there is no right to write, or no room for a name of this length."""
    probe = folder / f".{name}.{os.getpid()}.tmp"
    probe.touch()
    probe.unlink()


def is_ours(path: Path) -> bool:
    """Whether this project wrote a checkpoint, a training state, a record or an adapter folder."""
    try:
        if path.suffix == ".json":
            found = json.loads(path.read_text(encoding="utf-8"))
            return {"settings", "loss_curve"} <= found.keys()
        if path.is_dir():
            return (path / "lora_peft.json").is_file()
        found = read_tensors(path)
        return "format" in found and bool({"trained", "state_dict"} & found.keys())
    except (InputError, OSError, ValueError, AttributeError, TypeError, RecursionError):
        return False


def prepare_machine(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and the type to compute in; sets threads and seed, and meets torchrun's other processes."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    dtype = choose_precision(args.precision, device)
    join_processes(device)
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


def warmup_then_decay(warmup: float, total_steps: int) -> Callable[[int], float]:
    """The learning rate's share of --lr at each step: up from zero, then down to zero, both linear."""
    up = round(warmup * total_steps)

    def share(step: int) -> float:
        if step < up:
            return step / up
        return (total_steps - step) / max(1, total_steps - up)

    return share


# --- Mistakes ------------------------------------------------------------------------------------


class InputError(ValueError):
    """A mistake in what the user gave us: one line that names the value and the remedy."""


def reason(error: BaseException) -> str:
    """What an exception says, on one line; libraries often give the reason in their third."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return visible(" ".join(lines) or type(error).__name__, 400)


def visible(value: object, width: int = 200) -> str:
    """Text on one line of a terminal, to which control characters could do anything."""
    text = str(value)
    shown = "".join(c if c.isprintable() else "\ufffd" for c in text[: width + 1])
    return shown if len(text) <= width else shown[: width - 1] + "…"


def listed(values: list, most: int = 20) -> str:
    """Values in words, as many as a line can take."""
    shown = [visible(value, 40) for value in values[:most]]
    more = [f"… ({len(values):,} in all)"] if len(values) > most else []
    return ", ".join(shown + more)


def note(text: str) -> None:
    """Tell on standard error what a user would want to know, and go on."""
    print(f"note: {visible(text, 500)}", file=sys.stderr)


class Steady:
    """Standard output that may go away, as with a closed terminal or `| head`, without ending a training."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self.attempt(self.stream.write, text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, call: Callable, *arguments):
        try:
            return call(*arguments)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # what follows nobody reads
            return 0


def run(main: Callable[[], int | None], keep_going: bool = True) -> None:
    """Call `main`; a mistake of the user's becomes one line on standard error and exit code 2."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - where it is closed, as with >&-
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(errors="replace")  # for a terminal or a pipe that does not know every character
    output = Steady(sys.stdout) if keep_going else sys.stdout
    quiet = dist.is_torchelastic_launched() and os.environ.get("RANK", "0") != "0"  # the first process speaks
    try:
        with contextlib.redirect_stdout(None if quiet else output):
            code = main()
            sys.stdout.flush() if sys.stdout else None
            sys.exit(code)
    except KeyboardInterrupt:  # before or after the training: nothing is to be saved
        sys.exit(130)
    except BrokenPipeError:
        raise
    except InputError as error:
        mistake = error
    except torch.OutOfMemoryError:
        mistake = "the GPU's memory is full; lower --batch-size, --eval-batch-size or --max-length"
    except MemoryError:
        mistake = "the memory is full; use less data or a lower --batch-size"
    except OSError as error:  # a folder without rights, a full disk, a current folder that is gone
        mistake = f"{error.filename or 'this machine'}: {error.strerror or reason(error)}; name another place"
    print("error:", visible(mistake, 2000), file=sys.stderr)
    sys.exit(2)


# --- Faster --------------------------------------------------------------------------------------


def cast_base(base: Base, dtype: torch.dtype) -> None:
    """Hold the frozen base in the compute type: autocast would cast it anew at every step."""
    for name, parameter in base.model.named_parameters():
        if name not in base.head and "lora_" not in name:
            parameter.data = parameter.data.to(dtype)


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
    layers = [module for module in model.modules() if type(module).__name__ == "TransformerBlock"]
    if (
        not layers
        or config.model_type != "distilbert"
        or config._attn_implementation not in ("sdpa", "eager")
    ):
        return
    block, attention = layers[-1], layers[-1].attention

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


def cheapen_dropout(model: nn.Module) -> None:
    """Let every dropout layer of the model draw its masks cheaply, LoRA's and the base's."""
    for module in model.modules():
        if type(module) is nn.Dropout and not module.inplace:
            module.__class__ = CheapDropout


class FrozenProduct(torch.autograd.Function):
    """x (rows, in) → x Wᵀ + b (rows, out) in float32 by oneDNN; W (out, in) and b get no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        product = torch.ops.mkldnn._linear_pointwise(gradient.contiguous(), weight.t(), None, "none", [], "")
        return product, None, None  # (rows, in)


class OneDNNLinear(nn.Linear):
    """A linear layer that lets oneDNN multiply wherever its weight is not trained, in float32 on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        trained = self.weight.requires_grad and torch.is_grad_enabled()
        plain = (
            x.dtype == self.weight.dtype == torch.float32
            and x.device.type == self.weight.device.type == "cpu"
        )
        if trained or not plain or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        rows = FrozenProduct.apply(x.reshape(-1, self.in_features), self.weight, self.bias)
        return rows.view(*x.shape[:-1], self.out_features)  # made out here, so it may be changed in place


def multiply_by_onednn(model: nn.Module) -> None:
    """Let the linear layers use AVX512 on AMD's processors: 1.6 times as many sentences a second.

    PyTorch gives float32 products to MKL, which leaves AVX512 unused there; oneDNN takes it. The results
    differ by rounding. Elsewhere nothing changes, and products in bfloat16 go to oneDNN by themselves.
    """
    able = torch.cpu.get_capabilities()
    if "AMD" in str(able.get("cpu_name")) and able.get("avx512_f") and torch.backends.mkldnn.is_available():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDNNLinear  # the same layer, tensors and all


if __name__ == "__main__":
    run(main)
