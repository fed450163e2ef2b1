"""Train and answer beside what people run today, and hold both against what the machine can multiply.

    python tests/benchmark.py                                  # random phrases with SST-2's lengths
    python tests/benchmark.py --dataset dataset/SST-2 --tokenizer model/minilm-l6-distilbert    # SST-2's own
    python tests/benchmark.py --quick                          # fewer phrases: under 3 minutes on two cores
    python tests/benchmark.py --only scratch trainer-grouped ceiling

prints its tables and writes tests/results/benchmark.json. Without --quick it takes about half an hour on two
cores, with 7 GB of memory, or 12 GB where auto chooses bfloat16: every recipe is then there in both precisions. No
network: DistilBERT is full-size with random weights, which cost what trained ones cost.

Every recipe has a process of its own, which waits while another works: round 0 of A B C ... warms up and is dropped,
the others are measured, and ratios are taken within a round. A training's seconds are those of its loop over the
batches: loading, optimiser set-up, evaluation and saving are left out for all alike.
"""

import argparse
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
# Heavy imports stand inside the workers, so that each one's peak memory is its own: Linux counts the parent's size
# towards the peak of a process that it starts.

# Token counts of SST-2's training phrases, [CLS] and [SEP] included: so many (%) have at most so many. Mean 13.3.
QUANTILES = {0: 3, 5: 4, 15: 5, 25: 6, 30: 7, 40: 8, 45: 9, 50: 10, 55: 11, 60: 13, 65: 14, 70: 16, 75: 18, 80: 20}
QUANTILES |= {85: 23, 90: 27, 95: 33, 97: 37, 98: 40, 99: 44, 99.5: 48, 99.9: 56, 100: 66}
SST2_PHRASES, BATCH, MAX_LENGTH = 67_349, 16, 128
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Row(NamedTuple):
    """A line of a table. Rows of one kind and precision share a worker."""

    kind: str  # a key of KINDS
    precision: str = ""
    count: int = 0  # phrases or lines of a round
    batch: int = 0  # the pipeline's

    @property
    def name(self) -> str:
        return "-".join(str(part) for part in (self.kind, self.precision, self.batch) if part)


# --- The workers --------------------------------------------------------------------------------------


class Turns:
    """A worker's end of the pipe: iterating waits for the next turn, `done` reports on it."""

    def __init__(self, pipe: Connection, device: str):
        self.pipe, self.cuda = pipe, importlib.import_module("torch").cuda if device == "cuda" else None

    def __iter__(self) -> Iterator[Row]:
        while row := self.pipe.recv():
            yield row
        sys.exit()

    def now(self) -> float:
        if self.cuda:
            self.cuda.synchronize()
        return time.perf_counter()

    def done(self, **result) -> None:
        """Report, with the peak so far in MB: the GPU's memory where there is one, else the process's."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.pipe.send(result | {"peak_mb": (self.cuda.max_memory_allocated() if self.cuda else peak) / 1e6})


def run_worker(pipe: Connection, row: Row, args: argparse.Namespace) -> None:
    """The life of a worker process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the recipes print is not the benchmark's
    sys.stderr.isatty = lambda: False  # nor are their progress bars
    if row.kind in ("scratch", "peft", "playground"):
        importlib.import_module("lora_scratch")  # before torch: it says how threads wait, as for its users
    if row.kind != "start":  # which counts its imports
        import torch

        torch.set_num_threads(args.threads or torch.get_num_threads())
        torch.manual_seed(0)
    KINDS[row.kind][0](row, args, Turns(pipe, args.device))


def prepare(row: Row, args: argparse.Namespace, turns: Turns) -> None:
    """Make model, tokenizer and phrases; report what is chosen automatically on this machine."""
    import numpy as np
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    import lora_scratch

    transformers.logging.disable_progress_bar()
    if args.tokenizer:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    else:
        special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
        words = [*special.values(), *(f"w{i}" for i in range(30_522 - len(special)))]  # as many as DistilBERT has
        inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=512, **special)
    shape = {"dim": args.dim, "hidden_dim": 4 * args.dim, "n_heads": max(args.dim // 64, 1), "n_layers": args.layers}
    config = transformers.DistilBertConfig(vocab_size=len(tokenizer), **shape)
    transformers.DistilBertModel(config).save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)

    count = max(args.phrases, args.lines)
    if args.dataset:
        flags = ["--dataset", args.dataset, "--train-samples", str(count)]  # random ones
        texts = lora_scratch.load_tables(lora_scratch.make_parser("", "").parse_args(flags))[0].text
    else:
        words = sorted(word for word in tokenizer.get_vocab() if word.isalnum() and word.isascii())
        shares = (torch.randperm(count).numpy() + 0.5) * 100 / count
        lengths = np.interp(shares, list(QUANTILES), list(QUANTILES.values())).round().astype(int).tolist()
        texts = [" ".join(words[i] for i in torch.randint(len(words), (length - 2,))) for length in lengths]
    rows = [f"{' '.join(text.split())}\t{i % 2}\n" for i, text in enumerate(texts)]  # either label costs the same
    (args.folder / "data").mkdir()
    for name, size in (("train.tsv", args.phrases), ("dev.tsv", args.lines)):
        (args.folder / "data" / name).write_text("sentence\tlabel\n" + "".join(rows[:size]), encoding="utf-8")

    lengths = lora_scratch.tokenize(load(args)[1], tokenizer, MAX_LENGTH).lengths.tolist()
    facts = {"mean_tokens": mean(lengths), "longest": max(lengths), "threads": torch.get_num_threads()}
    auto = str(lora_scratch.choose_precision("auto", torch.device(args.device))).removeprefix("torch.")
    facts["auto"] = next(precision for precision, dtype in DTYPES.items() if dtype == auto)
    facts["hardware"] = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
    for _ in turns:
        turns.done(**facts)


def cpu_name() -> str:
    """The processor's own name, and the vector instructions that PyTorch uses."""
    from torch.backends.cpu import get_cpu_capability

    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor() or platform.machine()])[0]} ({get_cpu_capability()})"


def load(args: argparse.Namespace, plain: bool = False) -> tuple:
    """What `prepare` made, as lora_scratch.py reads it: its Base, and tables to train on and to answer."""
    import lora_scratch

    if plain:  # the last layer and the products as everybody else computes them; this process is that recipe's own
        lora_scratch.compute_cls_only = lora_scratch.multiply_by_onednn = lambda model: None
    flags = ["--dataset", str(args.folder / "data"), "--label-names", "negative", "positive"]
    train_set, lines, names = lora_scratch.load_tables(lora_scratch.make_parser("", "").parse_args(flags))
    return lora_scratch.load_base(str(args.folder), None, names, MAX_LENGTH), train_set, lines


def script_flags(row: Row, args: argparse.Namespace) -> list[str]:
    flags = ["--model", str(args.folder), "--device", args.device, "--recipe", "published"]
    flags += ["--output", str(args.folder / row.name / "out.pt")]
    return [*flags, "--threads", str(args.threads)] if args.threads else flags


def ours(row: Row, args: argparse.Namespace, turns: Turns) -> None:
    """A script's real main, up to its real `train`, at its own defaults: one epoch each turn."""
    script = importlib.import_module(f"lora_{row.kind}")
    real_train = script.train

    def train(model, train_set, eval_set, settings, state) -> None:
        one = type(eval_set)(eval_set[0], eval_set.lengths[:1], eval_set.labels[:1])  # sentence to evaluate
        for _ in turns:
            state.done, state.epochs = 0, []  # begin anew
            real_train(model, train_set, one, settings, state)
            turns.done(seconds=state.epochs[0]["seconds"])

    script.train = train
    flags = ["--dataset", str(args.folder / "data"), "--precision", row.precision, "--epochs", "1"]
    script.main([*script_flags(row, args), *flags])


def trainer(row: Row, args: argparse.Namespace, turns: Turns) -> None:
    """PEFT and the Trainer at their defaults but for what the row's label says: one epoch each turn."""
    import peft
    import transformers
    from datasets import Dataset

    class Clock(transformers.TrainerCallback):
        waiting = iter(turns)

        def on_epoch_begin(self, *_, **__) -> None:
            next(self.waiting)
            self.start = turns.now()

        def on_epoch_end(self, *_, **__) -> None:
            turns.done(seconds=turns.now() - self.start)

    choices = {row.precision: True} if row.precision != "fp32" else {}
    choices |= {"train_sampling_strategy": "group_by_length"} if row.kind == "trainer-grouped" else {}
    choices |= {"use_cpu": args.device == "cpu", "output_dir": str(args.folder / row.name), "disable_tqdm": True}
    choices |= {"report_to": "none", "save_strategy": "no", "logging_strategy": "no"}
    choices |= {"per_device_train_batch_size": BATCH, "learning_rate": 2e-4, "num_train_epochs": 1000}  # until the end
    base, phrases, _ = load(args, plain=True)
    # PEFT 0.21 asks transformers 5 for an attribute under its former name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["q_lin", "v_lin"]}
    columns = base.tokenizer(phrases.text, truncation=True, max_length=MAX_LENGTH)
    transformers.Trainer(
        model=peft.get_peft_model(base.model, peft.LoraConfig(task_type="SEQ_CLS", **lora)),
        args=transformers.TrainingArguments(**choices),
        train_dataset=Dataset.from_dict({**columns, "labels": phrases.label}),
        data_collator=transformers.DataCollatorWithPadding(base.tokenizer),
        processing_class=base.tokenizer,
        callbacks=[Clock()],
    ).train()


def published(row: Row, args: argparse.Namespace, turns: Turns) -> None:
    """The published recipe, with our layer: every phrase padded to 128 tokens, random batches, a plain loop."""
    import torch

    import lora_scratch

    base, phrases, _ = load(args, plain=True)
    lora_scratch.inject_lora(base.model, base.head)
    model = base.model.to(args.device).train()
    padded = base.tokenizer(phrases.text, padding="max_length", max_length=MAX_LENGTH, truncation=True)
    columns = {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"], "labels": phrases.label}
    columns = {name: torch.tensor(values) for name, values in columns.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    for _ in turns:
        start = turns.now()
        for batch in torch.randperm(len(phrases.label))[: row.count].split(BATCH):
            model(**{name: column[batch].to(args.device) for name, column in columns.items()}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        turns.done(seconds=turns.now() - start)


def ceiling(row: Row, args: argparse.Namespace, turns: Turns) -> None:
    """The matrix products of a step without padding, nothing else: forward, and back to the activations."""
    import torch
    import torch.nn.functional as F

    wide, tokens = 4 * args.dim, round(row.count * args.mean_tokens)
    like = {"device": args.device, "dtype": getattr(torch, DTYPES[row.precision])}
    shapes = [(args.dim, args.dim)] * 4 + [(wide, args.dim), (args.dim, wide)]  # (out, in) of a layer
    weights = [torch.randn(shape, **like) for _ in range(args.layers) for shape in shapes]
    x = {width: torch.randn(tokens, width, **like) for width in (args.dim, wide)}
    for _ in turns:
        steps, start = 0, turns.now()
        while steps < 3 or turns.now() - start < args.ceiling_seconds:
            for weight in weights:
                F.linear(x[weight.shape[1]], weight)
                x[weight.shape[0]] @ weight
            steps += 1
        turns.done(seconds=(turns.now() - start) / steps)


def playground(row: Row, args: argparse.Namespace, turns: Turns) -> None:
    """Lines to printed answers by the playground's own functions."""
    import torch

    import lora_scratch

    script = importlib.import_module("playground")
    base, _, lines = load(args)
    lora_scratch.inject_lora(base.model, base.head)
    lora_scratch.merge_lora(base.model)
    names = list(base.model.config.id2label.values())
    facts = {"path": args.folder, "base": base, "label_names": names, "max_length": MAX_LENGTH, "facts": {}}
    model = script.Model("LoRA_scratch", **facts)
    if row.kind == "playground-cast":  # the playground itself answers in float32 only
        lora_scratch.cast_base(base, lora_scratch.choose_precision(row.precision, torch.device(args.device)))
    base.model.to(args.device)
    settings = argparse.Namespace(batch_size=32, explain=False, json=False, unsure=0)  # its defaults
    for _ in turns:
        start = turns.now()
        script.answer_all([model], lines.text, settings, headed=True)
        turns.done(seconds=turns.now() - start)


def pipeline(row: Row, args: argparse.Namespace, turns: Turns) -> None:
    """The same lines through transformers.pipeline, as a list with a batch size."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = {"model": str(args.folder), "dtype": DTYPES[row.precision], "device": args.device}
    classify, lines = transformers.pipeline("text-classification", **model), load(args)[2].text
    for turn in turns:
        start = turns.now()
        found = classify(lines, batch_size=turn.batch, truncation=True)
        print("".join(f"{one['label']}\t{one['score']:.4f}\n" for one in found))
        turns.done(seconds=turns.now() - start)


def start(row: Row, args: argparse.Namespace, turns: Turns) -> None:
    """lora_scratch.py on all of the data set, up to its first step: the seconds, and where they go."""
    import lora_scratch

    seconds = {"imports": time.time() - args.began}

    def timed(name: str, inner: object, *arguments) -> object:
        begin = time.time()
        result = inner(*arguments)
        seconds[name] = seconds.get(name, 0) + time.time() - begin
        return result

    for name in ("load_tables", "load_base", "tokenize"):
        setattr(lora_scratch, name, functools.partial(timed, name, getattr(lora_scratch, name)))
    # The evaluation follows the first step, which is the last.
    lora_scratch.evaluate = lambda *_: (turns.done(**seconds, total=time.time() - args.began), sys.exit())
    lora_scratch.main([*script_flags(row, args), "--dataset", args.dataset, "--max-steps", "1"])


KINDS = {  # what a worker does, and what the tables call it
    "scratch": (ours, "**`lora_scratch.py`**"),
    "peft": (ours, "**`lora_peft.py`**"),
    "trainer": (trainer, "PEFT + Trainer, its defaults"),
    "trainer-grouped": (trainer, "PEFT + Trainer, grouped by length"),
    "published": (published, "every phrase padded to 128, plain loop"),
    "ceiling": (ceiling, "ceiling: the matrix products alone"),
    "playground": (playground, "**`playground.py`**"),
    "playground-cast": (playground, "the same functions on a cast model"),
    "pipeline": (pipeline, "`transformers.pipeline`"),
    "start": (start, ""),
    "prepare": (prepare, ""),
}
ANSWERING = ("playground", "playground-cast", "pipeline")


# --- The race -----------------------------------------------------------------------------------------


class Worker:
    """The parent's end: a process that works only while the parent waits for it."""

    def __init__(self, row: Row, args: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=run_worker, args=(theirs, row, args), daemon=True)
        self.process.start()
        theirs.close()

    def turn(self, row: Row) -> dict:
        try:
            self.pipe.send(row)
            return self.pipe.recv()
        except (EOFError, OSError):
            sys.exit(f"{row.name} failed: see its error above")

    def end(self) -> None:
        with contextlib.suppress(OSError):  # it has gone already
            self.pipe.send(None)
        self.process.join()


def once(kind: str, args: argparse.Namespace) -> dict:
    """The report of a worker that is started for a single one."""
    args.began = time.time()
    worker = Worker(Row(kind), args)
    result = worker.turn(Row(kind))
    worker.end()
    return {key: value for key, value in result.items() if key != "peak_mb"}


def race(rows: list[Row], args: argparse.Namespace) -> dict[Row, list[dict]]:
    """Every row once in every round; the reports of the measured rounds."""
    reports = {row: [] for row in rows}
    workers = {row[:2]: row for row in rows}
    workers = {key: Worker(row, args) for key, row in workers.items()}
    for number in range(args.rounds + 1):
        for row in rows:
            reports[row].append(workers[row[:2]].turn(row))
            rate = row.count / reports[row][-1]["seconds"]
            print(f"round {number}/{args.rounds}  {row.name:24}{rate:9.1f} sentences/s", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.end()
    return {row: of[1:] for row, of in reports.items()}


def choose_rows(args: argparse.Namespace, auto: str) -> list[Row]:
    """What --only asks for among all rows, in every precision that is worth a look here."""
    precisions = dict.fromkeys([auto, "fp32", *(["bf16"] if args.bf16 else [])])  # each once, in this order
    rows = [Row(kind, precision, args.phrases) for precision in precisions for kind in ("scratch", "peft")]
    rows += [Row(kind, precision, args.phrases) for precision in precisions for kind in ("trainer", "trainer-grouped")]
    rows += [Row("published", "fp32", min(args.phrases, max(args.phrases // 8, BATCH)))]  # it takes so long
    rows += [Row("ceiling", precision, BATCH) for precision in precisions]
    rows += [Row("playground", "fp32", args.lines)]
    rows += [Row("playground-cast", precision, args.lines) for precision in precisions if precision != "fp32"]
    sizes = (1, 32) if args.quick else (1, 8, 32, 128)
    rows += [Row("pipeline", precision, args.lines, size) for precision in precisions for size in sizes]
    for name in args.only or []:
        if name != "start" and not any(name in (row.kind, row.name) for row in rows):
            sys.exit(f"--only {name}: there is no such row, but {', '.join(row.name for row in rows)} and start")
    return [row for row in rows if not args.only or {row.kind, row.name} & set(args.only)]


# --- The report ---------------------------------------------------------------------------------------


def summarise(reports: dict[Row, list[dict]], facts: dict, operations: float) -> list[dict]:
    """The record's rows: the rates of the rounds (1/s), medians, and ratios taken within the rounds.

    `operations` are those of a sentence's real tokens, forward and back to the activations: a frozen weight needs no
    gradient, and padding is no use.
    """
    rates = {row.name: [row.count / report["seconds"] for report in of] for row, of in reports.items()}

    def ratios(one: str, other: str) -> list[float] | None:
        """Median, least and greatest."""
        values = [a / b for a, b in zip(rates.get(one, []), rates.get(other, []), strict=False)]
        return [median(values), min(values), max(values)] if values else None

    rows = []
    for row, of in reports.items():
        label = f"{KINDS[row.kind][1]}, {row.precision}" + (f", batch {row.batch}" if row.batch else "")
        rows.append({"name": row.name, "kind": row.kind, "label": label, "count": row.count, "rounds": rates[row.name]})
        rows[-1] |= {"rate": median(rates[row.name]), "peak_mb": of[-1]["peak_mb"]}
        first = "playground-fp32" if row.kind in ANSWERING else f"scratch-{facts['auto']}"
        rows[-1]["ratio"] = ratios(first, row.name)
        if row.kind not in ANSWERING:
            rows[-1]["ratio_same_precision"] = ratios(f"scratch-{row.precision}", row.name)
            rows[-1]["useful_gflops"] = rows[-1]["rate"] * operations / 1e9
            rows[-1]["of_ceiling"] = ratios(row.name, f"ceiling-{row.precision}")
    return rows


def markdown_table(record: dict) -> str:
    """The tables of a record, and what has to be said below them."""

    def times(ratio: list[float] | None) -> str:
        return "{:.2f} ({:.2f}–{:.2f})".format(*ratio) if ratio else ""

    training, answering, notes = [], [], []
    for row in record["rows"]:
        rate, memory = f"{row['rate']:,.{1 if row['rate'] < 100 else 0}f}", f"{row['peak_mb']:,.0f} MB"
        if row["kind"] in ANSWERING:
            answering.append([row["label"], rate, memory, times(row["ratio"])])
            continue
        share, hours = row["of_ceiling"], 3 * SST2_PHRASES / row["rate"] / 3600
        training.append(
            [row["label"], rate, f"{row['useful_gflops']:,.0f}", f"{100 * share[0]:.0f} %" if share else ""]
        )
        training[-1] += [f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min", memory, times(row["ratio"])]
        if row["kind"] == "trainer-grouped" and row["ratio"] != row["ratio_same_precision"]:
            same = times(row["ratio_same_precision"])
            notes.append(f"In the same precision, `lora_scratch.py` is {same} times as fast as {row['label']}.")
    if "start" in record:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in record["start"].items() if name != "total")
        total = record["start"]["total"]
        notes.append(f"From the start to the first step on the whole data set: {total:.1f} seconds ({parts}).")
    machine, phrases = record["machine"], record["phrases"]
    notes.append(
        f"{machine['name']}, {machine['threads']} threads, PyTorch {machine['versions']['torch']}; {phrases['source']} "
        f"of {phrases['mean_tokens']:.1f} tokens on average; medians of {record['settings']['rounds']} rounds, the "
        "least and the greatest ratio in brackets."
    )
    last = ["peak memory", "the first row is … times as fast"]
    head = ["training", "sentences/s", "useful GFLOP/s", "of the ceiling", "3 epochs of SST-2", *last]
    tables = [[head, ["---"] * len(head), *training]] if training else []
    tables += [[["answering", "lines/s", *last], ["---"] * 4, *answering]] if answering else []
    blocks = ["\n".join(f"| {' | '.join(row)} |" for row in table) for table in tables]
    return "\n\n".join(blocks + notes)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", help="take the phrases from this data set, as lora_scratch.py reads it; needs --tokenizer")
    add("--tokenizer", help="folder with a tokenizer (default: one of made-up words)")
    add("--phrases", type=int, help="of a training round (800, --quick: 80); the padded recipe gets an eighth")
    add("--lines", type=int, help="of an answering round (1000, --quick: 80)")
    add("--rounds", type=int, help="measured ones, after one that warms up (3, --quick: 2)")
    add("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    add("--only", nargs="+", metavar="NAME", help=f"{', '.join(list(KINDS)[:-1])} or such as peft-fp32 (default: all)")
    add("--bf16", action="store_true", help="bfloat16 rows even where auto chooses float32: they can be very slow")
    add("--quick", action="store_true", help="fewer phrases, rounds and batch sizes")
    add("--layers", type=int, default=6, help="of the model (default: DistilBERT's %(default)s)")
    add("--dim", type=int, default=768, help="its width (default: DistilBERT's %(default)s)")
    add("--output", type=Path, default=Path(__file__).parent / "results" / "benchmark.json", help="the record")
    args = parser.parse_args()
    if args.dataset and not args.tokenizer:
        parser.error("--dataset needs --tokenizer: made-up words do not tokenise real phrases")
    args.phrases = args.phrases or (80 if args.quick else 800)
    args.lines = args.lines or (80 if args.quick else 1000)
    args.rounds = args.rounds or (2 if args.quick else 3)
    args.ceiling_seconds = 0.5 if args.quick else 2
    return args


def main() -> None:
    args = parse()
    os.environ["HF_HUB_OFFLINE"] = "1"  # for the workers, as is the next
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"], args.folder = folder, Path(folder)
        facts = once("prepare", args)
        args.mean_tokens = facts["mean_tokens"]
        rows = choose_rows(args, facts["auto"])
        reports = race([row for row in rows if row.kind not in ANSWERING], args)
        reports |= race([row for row in rows if row.kind in ANSWERING], args)
        starts = []
        if args.dataset and (not args.only or "start" in args.only):
            starts = [once("start", args) for _ in range(args.rounds + 1)][1:]

    packages = ("torch", "transformers", "peft", "accelerate", "datasets")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    settings = ("phrases", "lines", "rounds", "device", "only", "bf16", "quick", "layers", "dim", "ceiling_seconds")
    source = "phrases of the data set" if args.dataset else "random phrases"
    operations = facts["mean_tokens"] * 2 * 2 * args.layers * 12 * args.dim**2  # a layer has 12 · dim² weights
    threads = {"cores": os.cpu_count(), "threads": facts["threads"]}
    record = {"machine": {"name": facts["hardware"], **threads, "versions": versions}}
    record["settings"] = {name: getattr(args, name) for name in settings} | {"auto": facts["auto"], "batch": BATCH}
    record["phrases"] = {"source": source, "mean_tokens": facts["mean_tokens"], "longest": facts["longest"]}
    record["rows"] = summarise(reports, facts, operations)
    if starts:
        record["start"] = {key: median(one[key] for one in starts) for key in starts[0]}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(markdown_table(record))


if __name__ == "__main__":
    main()
