"""The results table: recipes side by side, three seeds each; where a rate is tuned, all are tuned alike.

A rate is tuned on 10,000 phrases of the training data, one epoch, one seed; the rate kept is the one with the most
right answers on 5,000 other phrases of the training data. The validation set decides nothing: only the final runs
read it, and what counts is the accuracy after the last epoch.

    python tests/recipes.py --model model/minilm-l6-distilbert --dataset dataset/SST-2 --train-samples 30000 \\
        --epochs 1 --jobs 2

writes tests/results/recipes.json. Interrupted, the same command goes on: runs that are finished are not repeated.
--dataset is a folder with train.tsv and dev.tsv.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from benchmark import cpu_name

ROOT = Path(__file__).parent.parent
RATES = [2e-4, 5e-4, 1e-3, 2e-3, 4e-3]
RECIPES = {  # name: script, flags, rates to choose from
    "published, head frozen": ("lora_scratch.py", ["--freeze-head"], [2e-4]),
    "default": ("lora_scratch.py", [], [2e-4]),
    "default, rate tuned": ("lora_scratch.py", [], RATES),
    "all linear layers, rate tuned": ("lora_scratch.py", ["--targets", "all-linear"], RATES),
    "full fine-tuning, rate tuned": ("tests/full_finetune.py", [], [2e-5, 5e-5, 1e-4, 2e-4, 5e-4]),
}
HELD_OUT = 5000


def split_training_data(dataset: Path, folder: Path) -> None:
    """train.tsv without HELD_OUT of its rows, and these as validation.tsv."""
    head, *rows = (dataset / "train.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    random.Random(0).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "validation.tsv").write_text("".join([head, *rows[:HELD_OUT]]), encoding="utf-8")
    (folder / "train.tsv").write_text("".join([head, *rows[HELD_OUT:]]), encoding="utf-8")


def train_once(script: str, settings: dict, flags: list[str], stem: Path) -> dict:
    """The record of one run: trained now, or resumed, or read where it is finished and its settings were the same."""
    record, output = stem.with_suffix(".json"), stem.with_suffix(".pt" if script == "lora_scratch.py" else "")
    if not record.exists():
        for key, value in settings.items():
            flags = [*flags, f"--{key.replace('_', '-')}", str(value)]
        command = [
            sys.executable,
            str(ROOT / script),
            "--recipe",
            "published",
            *flags,
            "--threads",
            "1",
            "--resume",
            "--output",
            str(output),
        ]
        with open(stem.with_suffix(".log"), "a", encoding="utf-8") as log:
            subprocess.run(command, stdout=log, stderr=log, check=True)
    found = json.loads(record.read_text(encoding="utf-8"))
    for key, value in settings.items():
        if found["settings"][key] != value:
            sys.exit(f"{record}: {key} was {found['settings'][key]} and is now {value}; choose another --work")
    return found


def summarise(tuning: dict[float, dict], final: list[dict]) -> dict:
    """One row of the table."""
    scores = [record["result"]["accuracy"] for record in final]
    return {
        "tuning": {f"{rate:g}": record["result"]["correct"] for rate, record in tuning.items()},
        "lr": final[0]["settings"]["lr"],
        "seeds": [record["settings"]["seed"] for record in final],
        "correct": [record["result"]["correct"] for record in final],
        "mean": statistics.mean(scores),
        "deviation": statistics.stdev(scores),
        "trained": final[0]["parameters"]["trained"],
        "bytes": final[0]["result"]["bytes"],
        "minutes": [sum(epoch["seconds"] for epoch in record["epochs"]) / 60 for record in final],
    }


def table(result: dict) -> str:
    """The table of the rates, and below it how the rates were found and on what machine."""
    lines = [
        "| recipe | accuracy, % | learning rate | trained parameters | file, MB | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        cells = [name, f"**{row['mean']:.2f} ± {row['deviation']:.2f}**", f"{row['lr']:g}"]
        cells += [f"{row['trained']:,}", f"{row['bytes'] / 1e6:.1f}", f"{statistics.mean(row['minutes']):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    tried = [
        f"{name.removesuffix(', rate tuned')}: "
        + ", ".join(f"{rate} {right:,}" for rate, right in row["tuning"].items())
        for name, row in result["rows"].items()
        if row["tuning"]
    ]
    seeds = ", ".join(map(str, result["rows"]["default"]["seeds"]))
    run = f"{result['phrases']:,} phrases, epochs: {result['epochs']}, seeds {seeds}; mean ± standard deviation after"
    run += f" the last epoch, on the {result['total']} validation sentences. {result['machine']}, float32, a thread"
    run += f" each, {result['jobs']} runs at a time with other work beside them: the minutes are an upper bound."
    tuning = "How the rates were tuned: 10,000 phrases, one epoch, one seed; rate and right answers among"
    tuning += f" {result['held_out']:,} other phrases of the training data, which are often parts of the same"
    tuning += f" sentences: they rank the rates and estimate nothing else. {'; '.join(tried)}."
    return "\n".join([*lines, "", run, "", tuning])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True, type=Path)
    parser.add_argument("--train-samples", type=int, help="of the final runs (default: all)")
    parser.add_argument("--epochs", type=int, default=3, help="of the final runs (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44], help="(default: 42 43 44)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("model/recipes"), help="for all runs (default: %(default)s)")
    args = parser.parse_args()
    split_training_data(args.dataset, args.work / "tuning")
    common = {"model": args.model, "precision": "fp32", "save_every": 2000}
    tune = common | {"dataset": str(args.work / "tuning"), "train_samples": 10000, "epochs": 1}
    final = common | {"dataset": str(args.dataset), "epochs": args.epochs}
    final |= {"train_samples": args.train_samples} if args.train_samples else {}
    pool = ThreadPoolExecutor(args.jobs)

    def begin(name: str, what: str, settings: dict) -> Future:
        script, flags, _ = RECIPES[name]
        stem = f"{name}_{what}_lr{settings['lr']:.0e}".replace(",", "").replace(" ", "_")
        return pool.submit(train_once, script, settings, flags, args.work / stem)

    try:
        tried = {
            name: {rate: begin(name, "tune", tune | {"lr": rate}) for rate in rates if len(rates) > 1}
            for name, (_, _, rates) in RECIPES.items()
        }
        tried = {name: {rate: run.result() for rate, run in runs.items()} for name, runs in tried.items()}
        best = {
            name: max(runs, key=lambda rate: runs[rate]["result"]["correct"]) if runs else RECIPES[name][2][0]
            for name, runs in tried.items()
        }
        runs = {
            (name, seed): begin(name, f"seed{seed}", final | {"lr": best[name], "seed": seed})
            for seed in args.seeds
            for name in RECIPES
        }
        records = {key: run.result() for key, run in runs.items()}
    finally:
        pool.shutdown(cancel_futures=True)  # where a run failed, or Ctrl-C came: begin no other

    rows = {name: summarise(tried[name], [records[name, seed] for seed in args.seeds]) for name in RECIPES}
    one = records["default", args.seeds[0]]
    phrases = args.train_samples or len((args.dataset / "train.tsv").read_text(encoding="utf-8").splitlines()) - 1
    result = {"epochs": args.epochs, "phrases": phrases}
    result |= {"held_out": HELD_OUT, "jobs": args.jobs, "total": one["result"]["total"]}
    result |= {"machine": cpu_name(), "hardware": one["hardware"], "versions": one["versions"], "rows": rows}
    path = Path(__file__).parent / "results" / "recipes.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
