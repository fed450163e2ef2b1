"""What the answers of a trained model are worth: its percentages, and its surest mistakes.

    python tests/after_training.py --data FOLDER --model model/minilm-l6-distilbert --jobs 2

FOLDER is that of own_tables.py. Every run is lora_scratch.py with its defaults on the first n rows of train.csv, of
which it holds a tenth out.

    calibration   on test.csv, as the model answers and divided by a temperature fitted on the held-out tenth:
                  negative log-likelihood (nats) and expected calibration error (percent, 15 bins of one width)
    sst2          the same on SST-2's validation sentences, in the folder --sst2: default settings, 10,000 phrases, one
                  epoch; each half is judged with the temperature of the other
    flipped       a random 5 % of the labels of cr and trec at 1,000 rows are replaced by another one before the
                  training; how many of these 50 are among the 50 surest mistakes on the very same rows

It writes tests/results/after_training.json and prints the tables. Interrupted, the same command goes on.
"""

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from own_tables import read_rows  # noqa: E402

import lora_scratch  # noqa: E402
import playground  # noqa: E402

SEEDS = (42, 43, 44)
SETS = ("bank", "cr", "trec", "urgent")
FLIPPED = ("cr", "trec")
BINS = 15


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """How far the mean probability of the answers in a bin lies from the share of right ones; weighted, in percent."""
    sure, answers = probabilities.max(dim=1)
    right = (answers == labels).float()
    bins = (sure * BINS).long().clamp(max=BINS - 1)
    gap = torch.zeros(BINS).index_add_(0, bins, sure - right)
    return 100 * gap.abs().sum().item() / len(labels)


def train(args: argparse.Namespace, texts: list, labels: list, seed: int, folder: Path):
    """The model of lora_scratch.py's defaults on these rows, and the rows that it held out."""
    with open(folder / "rows.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(texts, labels, strict=True)])
    flags = ["--dataset", folder / "rows.csv", "--model", args.model, "--seed", seed, "--threads", 1]
    flags = [str(flag) for flag in [*flags, "--output", folder / "a.pt"]]
    lora_scratch.main(flags)
    parsed = lora_scratch.parse_flags(lora_scratch.make_parser("", "a.pt"), flags)
    held_out, names = lora_scratch.load_tables(parsed)[1:]
    return playground.load("lora", folder / "a.pt", None), held_out, names


def answer(model: playground.Model, texts: list[str]) -> Tensor:
    """The logits before the temperature that lora_scratch.py folds in."""
    logits = lora_scratch.predict(model.base.model, playground.read_tokens(texts, model)[0], 32)
    return logits * model.facts["record"].get("temperature", 1.0)


def before_and_after(logits: Tensor, target: Tensor, temperature: float | Tensor) -> dict:
    found = {}
    for way, scaled in (("as it is", logits), ("scaled", logits / temperature)):
        error = calibration_error(scaled.softmax(dim=1), target)
        found[way] = {"nll": F.cross_entropy(scaled, target).item(), "ece": error}
    return found


def calibration(args: argparse.Namespace, name: str, rows: int, seed: int, folder: Path) -> dict:
    texts, labels = read_rows(args.data / name / "train.csv", rows)
    model, held_out, names = train(args, texts, labels, seed, folder)
    test, given = read_rows(args.data / name / "test.csv")
    known = [i for i, label in enumerate(given) if label in names]  # of 100 rows bank's labels are not all there
    target = torch.tensor([names.index(given[i]) for i in known])
    logits = answer(model, [test[i] for i in known])
    temperature = lora_scratch.fit_temperature(answer(model, held_out.text), torch.tensor(held_out.label))
    found = {"held_out": len(held_out.text), "judged": len(known), "temperature": temperature}
    return found | before_and_after(logits, target, temperature)


def sst2(args: argparse.Namespace, name: str, rows: int, seed: int, folder: Path) -> dict:
    flags = ["--dataset", args.sst2, "--recipe", "published", "--train-samples", rows, "--epochs", 1]
    flags += ["--model", args.model, "--seed", seed, "--threads", 1, "--output", folder / "a.pt"]
    flags = [str(flag) for flag in flags]
    lora_scratch.main(flags)
    model = playground.load("lora", folder / "a.pt", None)
    table = lora_scratch.load_tables(lora_scratch.parse_flags(lora_scratch.make_parser("", "a.pt"), flags))[1]
    logits, target = answer(model, table.text), torch.tensor(table.label)
    halves = torch.arange(len(target)) % 2  # each is judged with the temperature of the other
    fitted = [lora_scratch.fit_temperature(logits[halves == half], target[halves == half]) for half in (1, 0)]
    found = {"held_out": len(target) // 2, "judged": len(target), "temperature": statistics.mean(fitted)}
    return found | before_and_after(logits, target, torch.tensor(fitted)[halves][:, None])


def flipped(args: argparse.Namespace, name: str, rows: int, seed: int, folder: Path) -> dict:
    texts, labels = read_rows(args.data / name / "train.csv", rows)
    chance = random.Random(seed)
    wrong = chance.sample(range(rows), rows // 20)
    for i in wrong:
        labels[i] = chance.choice(sorted(set(labels) - {labels[i]}))
    model, _, names = train(args, texts, labels, seed, folder)
    sure, answers = answer(model, texts).softmax(dim=1).max(dim=1)
    mistakes = [i for i in range(rows) if names[answers[i]] != labels[i]]
    surest = sorted(mistakes, key=lambda i: -sure[i].item())[:50]
    return {"flipped": len(wrong), "mistakes": len(mistakes), "among the 50 surest": len({*surest} & {*wrong})}


def tables(record: dict) -> str:
    """Mean over the seeds, before and after the temperature; and the flipped labels that were found."""
    lines = [
        "| set | rows | held out | temperature | nll | scaled | ece, % | scaled |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def mean(values: list, digits: int) -> str:
        return f"{statistics.mean(values):.{digits}f}"

    found = {key: runs for key, runs in record["runs"].items() if not key.startswith("flipped")}
    for key, runs in found.items():
        name, rows = key.split()[-2:]
        shown = [f"{min(one['temperature'] for one in runs):.2f} to {max(one['temperature'] for one in runs):.2f}"]
        for measure, digits in (("nll", 3), ("ece", 1)):
            shown += [mean([one[way][measure] for one in runs], digits) for way in ("as it is", "scaled")]
        lines.append(f"| {name} | {rows} | {mean([one['held_out'] for one in runs], 0)} | {' | '.join(shown)} |")
    lines += [
        "",
        "| set | labels flipped | mistakes on the same rows | flipped ones among the 50 surest |",
        "|---|---|---|---|",
    ]
    for key, runs in record["runs"].items():
        if key.startswith("flipped"):
            columns = [", ".join(str(one[k]) for one in runs) for k in ("flipped", "mistakes", "among the 50 surest")]
            lines.append(f"| {key.split()[1]} | {' | '.join(columns)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with a folder for each set")
    add("--sst2", help="folder with SST-2's train.tsv and dev.tsv (default: leave it out)")
    add("--model", required=True, help="the base model")
    add("--rows", type=int, nargs="+", default=[100, 300, 1000], help="sizes of the table (default: 100 300 1000)")
    add("--jobs", type=int, default=1, help="processes at a time, a thread each (default: %(default)s)")
    add("--output", type=Path, default=Path(__file__).parent / "results" / "after_training.json", help="the record")
    add("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        what, name, rows, seed = args.one
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(globals()[what](args, name, int(rows), int(seed), Path(folder))))
        return
    from benchmark import cpu_name

    record = {"runs": {}}
    if args.output.exists():
        record = json.loads(args.output.read_text(encoding="utf-8"))
    record |= {"model": Path(args.model).name, "machine": cpu_name()}

    def run(what: str, name: str, rows: int, seed: int) -> None:
        runs = record["runs"].setdefault(f"{what} {name} {rows}", [])
        if any(one["seed"] == seed for one in runs):
            return
        command = [sys.executable, __file__, *sys.argv[1:], "--one", what, name, str(rows), str(seed)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        result = {"seed": seed, **json.loads(done.stdout.splitlines()[-1])}
        runs.append(result)
        runs.sort(key=lambda one: one["seed"])
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(what, name, rows, result, flush=True)

    cells = [("calibration", name, rows, seed) for rows in args.rows for name in SETS for seed in SEEDS]
    cells += [("flipped", name, max(args.rows), seed) for name in FLIPPED for seed in SEEDS]
    cells += [("sst2", "sst2", 10_000, seed) for seed in SEEDS if args.sst2]
    with ThreadPoolExecutor(args.jobs) as pool:
        for one in [pool.submit(run, *cell) for cell in cells]:
            one.result()
    print(tables(record))


if __name__ == "__main__":
    main()
