"""Train and answer beside what people run today, and hold both against what the machine can multiply.

    python tests/figures/benchmark.py --dataset dataset/SST-2
    python tests/figures/benchmark.py --dataset dataset/SST-2 --only scratch trainer-grouped ceiling

It takes about half an hour on two cores, and no network: DistilBERT is full-size with random
weights, which cost what trained ones cost.

Every row is a process of its own, in every round a new one. The rows take turns: ratios are taken
within a round. A training's seconds are those of its second epoch, an answering's those of its second
time. Loading, evaluation and saving are left out for all alike, but for the peak memory, which is that
of the whole process.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import measure

BATCH = 16
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
TRAINER = "tests/figures/trainer.py"
SCRIPTS = {  # script and flags
    "scratch": ("lora_scratch.py", ["--recipe", "published"]),
    "peft": ("lora_peft.py", ["--recipe", "published"]),
    "trainer": (TRAINER, []),
    "trainer-grouped": (TRAINER, ["--grouped"]),
}
LABELS = {
    "scratch": "**`lora_scratch.py`**",
    "peft": "**`lora_peft.py`**",
    "trainer": "PEFT + Trainer, its defaults",
    "trainer-grouped": "PEFT + Trainer, grouped by length",
    "ceiling": "ceiling: the matrix products alone",
    "playground": "**`playground.py`**",
    "pipeline": "`transformers.pipeline`",
}
ANSWERING = ("playground", "pipeline")


class Row(NamedTuple):
    """A line of a table."""

    kind: str  # a key of LABELS
    precision: str
    count: int  # phrases or lines of a round
    batch: int = 0  # the pipeline's

    @property
    def name(self) -> str:
        return "-".join(str(part) for part in (self.kind, self.precision, self.batch) if part)


def second_time(work: Callable[[], object]) -> float:
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def multiply(row: Row, folder: Path, args: argparse.Namespace) -> float:
    """The matrix products of a step without padding: forward, and back to the activations."""
    import torch
    import torch.nn.functional as F

    wide, tokens = 4 * args.dim, round(row.count * args.mean_tokens)
    dtype = getattr(torch, DTYPES[row.precision])
    shapes = [(args.dim, args.dim)] * 4 + [(wide, args.dim), (args.dim, wide)]  # (out, in) of a layer
    weights = [torch.randn(shape, dtype=dtype) for _ in range(args.layers) for shape in shapes]
    x = {width: torch.randn(tokens, width, dtype=dtype) for width in (args.dim, wide)}
    steps = 10

    def products() -> None:
        for _ in range(steps):
            for weight in weights:
                F.linear(x[weight.shape[1]], weight)
                x[weight.shape[0]] @ weight

    return second_time(products) / steps


def ask_playground(row: Row, folder: Path, args: argparse.Namespace) -> float:
    """Lines to printed answers by playground.py, from the moment when the model is loaded."""
    import playground

    load, loaded = playground.load, []

    def load_and_note(*arguments, **more) -> object:
        model = load(*arguments, **more)
        loaded.append(time.perf_counter())
        return model

    playground.load = load_and_note
    question = ["--model", str(folder / "start.pt"), "--file", str(folder / "lines.txt")]
    for _ in range(2):
        playground.main([*question, "--precision", row.precision])
    return time.perf_counter() - loaded[-1]


def ask_pipeline(row: Row, folder: Path, args: argparse.Namespace) -> float:
    """The same lines through transformers.pipeline, as a list with a batch size."""
    import transformers

    lines = (folder / "lines.txt").read_text(encoding="utf-8").splitlines()
    model = {"model": str(folder), "dtype": DTYPES[row.precision], "device": "cpu"}
    classify = transformers.pipeline("text-classification", **model)

    def answer() -> None:
        found = classify(lines, batch_size=row.batch, truncation=True)
        print("".join(f"{one['label']}\t{one['score']:.4f}\n" for one in found))

    return second_time(answer)


def prepare(row: Row, folder: Path, args: argparse.Namespace) -> dict:
    """Write the model, the phrases and an adapter; what the scripts choose on this machine."""
    import transformers
    from trainer import read_table

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    heads = max(args.dim // 64, 1)
    shape = {"dim": args.dim, "hidden_dim": 4 * args.dim, "n_heads": heads, "n_layers": args.layers}
    config = transformers.DistilBertConfig(vocab_size=len(tokenizer), **shape)
    transformers.DistilBertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    texts, _ = read_table(Path(args.dataset), "train.tsv", "train.csv")
    phrases, lines = texts[: args.phrases], texts[: args.lines]
    (folder / "data").mkdir()
    for name, chosen in (("train", phrases), ("dev", phrases[:2])):
        with open(folder / "data" / f"{name}.tsv", "w", encoding="utf-8") as file:
            file.write("sentence\tlabel\n")
            file.writelines(f"{text}\t{i % 2}\n" for i, text in enumerate(chosen))  # made-up labels
    (folder / "lines.txt").write_text("".join(f"{text}\n" for text in lines), encoding="utf-8")

    script, flags = SCRIPTS["scratch"]
    record = measure.train(script, [*flags, *args.flags, "--max-steps", 1], folder / "start.pt")
    auto = next(short for short, dtype in DTYPES.items() if dtype == record["precision"])
    tokens = tokenizer(phrases, truncation=True, max_length=128)["input_ids"]
    return {"mean_tokens": mean(map(len, tokens)), "auto": auto}


OTHERS = {"ceiling": multiply, "playground": ask_playground, "pipeline": ask_pipeline, "prepare": prepare}


def run_one(text: str) -> None:
    """The process of a row that is no script: prints what it returns."""
    importlib.import_module("lora_scratch")  # before torch, because it says how threads wait
    import torch

    row, folder, settings = json.loads(text)
    args = argparse.Namespace(**settings)
    torch.set_num_threads(args.threads)
    with contextlib.redirect_stdout(io.StringIO()):
        result = OTHERS[row[0]](Row(*row), Path(folder), args)
    print(json.dumps(result))


def run_once(row: Row, folder: Path, args: argparse.Namespace) -> dict:
    """Seconds and peak memory of one process."""
    if row.kind in SCRIPTS:
        script, flags = SCRIPTS[row.kind]
        flags = [*flags, *args.flags, "--epochs", 2]
        if script != TRAINER:
            flags += ["--precision", row.precision]
        elif row.precision == "bf16":
            flags += ["--bf16"]
        record = measure.train(script, flags, folder / ("out.pt" if row.kind == "scratch" else row.name))
        return {"seconds": record["epochs"][1]["seconds"], "peak_mb": record["peak_mb"]}
    done = run_alone(row, folder, args)
    return {"seconds": json.loads(done.printed), "peak_mb": done.peak_mb}


def run_alone(row: Row, folder: Path, args: argparse.Namespace) -> measure.Process:
    """A process of this program: the peak memory of one counts that of the process that starts it."""
    text = json.dumps([row, folder, vars(args)], default=str)
    return measure.run_process([__file__, "--one", text])


def choose_rows(args: argparse.Namespace, auto: str) -> list[Row]:
    """What --only asks for among all rows."""
    rows = []
    for precision in dict.fromkeys([auto, "fp32"]):  # each once
        rows += [Row(kind, precision, args.phrases) for kind in SCRIPTS]
        rows += [Row("ceiling", precision, BATCH)]
        rows += [Row("pipeline", precision, args.lines, size) for size in (1, 8, 32, 128)]
    rows += [Row("playground", "fp32", args.lines)]
    rows.sort(key=lambda row: list(LABELS).index(row.kind))
    unknown = set(args.only or []) - {row.kind for row in rows} - {row.name for row in rows}
    if unknown:
        sys.exit(f"--only {' '.join(unknown)}: choose among {', '.join(row.name for row in rows)}")
    return [row for row in rows if not args.only or {row.kind, row.name} & set(args.only)]


def summarise(runs: dict[Row, list[dict]], auto: str, operations: float) -> list[dict]:
    """The record's rows: rates (1/s) of the rounds, medians, and ratios taken within the rounds.

    `operations` are those of a sentence's tokens and 12 · dim² weights a layer, forward and back to the
    activations: a frozen weight needs no gradient, and padding is no use.
    """
    rates = {row.name: [row.count / run["seconds"] for run in of] for row, of in runs.items()}

    def ratio(one: str, other: str) -> list[float] | None:
        return measure.ratios(rates[one], rates[other]) if one in rates and other in rates else None

    rows = []
    for row, of in runs.items():
        name, rate = row.name, median(rates[row.name])
        peak = max(run["peak_mb"] for run in of)
        label = f"{LABELS[row.kind]}, {row.precision}" + (f", batch {row.batch}" if row.batch else "")
        found = {"name": name, "kind": row.kind, "label": label, "count": row.count}
        found |= {"rounds": rates[name], "rate": rate, "peak_mb": peak}
        if row.kind in ANSWERING:
            found["ratio"] = ratio("playground-fp32", name)
        else:
            found["ratio"] = ratio(f"scratch-{auto}", name)
            found["ratio_same_precision"] = ratio(f"scratch-{row.precision}", name)
            found["useful_gflops"] = rate * operations / 1e9
            found["of_ceiling"] = ratio(name, f"ceiling-{row.precision}")
        rows.append(found)
    return rows


def table(record: dict) -> str:
    """The two tables of a record, and the machine."""
    training, answering = [], []
    for row in record["rows"]:
        rate = f"{row['rate']:,.{1 if row['rate'] < 100 else 0}f}"
        last = [f"{row['peak_mb']:,.0f} MB", measure.times(row["ratio"]) if row["ratio"] else ""]
        if row["kind"] in ANSWERING:
            answering.append([row["label"], rate, *last])
            continue
        share = f"{100 * row['of_ceiling'][0]:.0f} %" if row["of_ceiling"] else ""
        hours = 3 * measure.SST2_PHRASES / row["rate"] / 3600
        gflops = f"{row['useful_gflops']:,.0f}"
        training.append([row["label"], rate, gflops, share, f"{hours:.1f} h", *last])
    last = ["peak memory", "the first row is … times as fast"]
    head = ["training", "sentences/s", "useful GFLOP/s", "of the ceiling", "3 epochs of SST-2", *last]
    machine = record["machine"]
    about = f"{machine['name']}, {machine['threads']} threads, PyTorch {machine['versions']['torch']};"
    about += f" phrases of {record['phrases']['mean_tokens']:.1f} tokens on average; medians of"
    about += f" {record['settings']['rounds']} rounds, the least and the greatest ratio in brackets."
    tables = [measure.markdown(head, training)] if training else []
    tables += [measure.markdown(["answering", "lines/s", *last], answering)] if answering else []
    return "\n\n".join([*tables, about])


def main() -> None:
    parser = measure.make_parser(__doc__, "benchmark.json")
    add = parser.add_argument
    add("--dataset", type=Path, default=measure.ROOT / "dataset/demo", help="a folder (default: the demo's)")
    add("--tokenizer", default="model/minilm-l6-distilbert", help="its folder (default: %(default)s)")
    add("--phrases", type=int, default=800, help="of a training round (default: %(default)s)")
    add("--lines", type=int, default=1000, help="of an answering round (default: %(default)s)")
    add("--rounds", type=int, default=3, help="(default: %(default)s)")
    add("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    add("--only", nargs="+", metavar="NAME", help=f"{', '.join(LABELS)} or such as peft-fp32 (default: all)")
    add("--layers", type=int, default=6, help="of the model (default: DistilBERT's %(default)s)")
    add("--dim", type=int, default=768, help="its width (default: DistilBERT's %(default)s)")
    add("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run_one(args.one)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        args.flags = ["--model", folder, "--dataset", folder / "data", "--threads", args.threads]
        facts = json.loads(run_alone(Row("prepare", "", 1), folder, args).printed)
        args.mean_tokens = facts["mean_tokens"]
        runs = {row: [] for row in choose_rows(args, facts["auto"])}
        cells = [
            (runs[row], number, lambda row=row: run_once(row, folder, args))
            for number in range(args.rounds)
            for row in runs
        ]
        measure.take_turns(cells, lambda: None)

    machine = {"name": measure.cpu_name(), "cores": os.cpu_count(), "threads": args.threads}
    names = ("phrases", "lines", "rounds", "only", "layers", "dim")
    settings = {name: getattr(args, name) for name in names} | {"auto": facts["auto"], "batch": BATCH}
    operations = facts["mean_tokens"] * 2 * 2 * args.layers * 12 * args.dim**2
    record = {
        "machine": machine | {"versions": measure.versions()},
        "settings": settings,
        "phrases": {"mean_tokens": facts["mean_tokens"]},
        "rows": summarise(runs, facts["auto"], operations),
    }
    measure.write_record(args.output, record)
    print(table(record))


if __name__ == "__main__":
    main()
