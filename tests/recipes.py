"""The results table: recipes side by side, three seeds each, their learning rates tuned alike.

A rate is tuned on 10,000 phrases of the training data, one epoch, one seed; the rate kept is the one with the most
right answers on 5,000 other phrases of the training data. The validation set is read by the final runs alone, once
for every seed, after the last epoch.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmark import cpu_name

ROOT = Path(__file__).parent.parent
RATES = [2e-4, 5e-4, 1e-3, 2e-3, 4e-3]
RECIPES = {  # name: script, flags, rates to choose from
    "published": ("lora_scratch.py", ["--freeze-head"], [2e-4]),
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


def train_once(script: str, flags: list[str], output: Path) -> dict:
    """The record of one run: trained now, or resumed, or read where it is finished."""
    name = output.name if script == "lora_scratch.py" else output.name.removesuffix(".pt")
    record = output.with_name(output.name.removesuffix(".pt") + ".json")
    if not record.exists():
        command = [sys.executable, str(ROOT / script), *flags, "--threads", "1", "--resume"]
        with open(record.with_suffix(".log"), "a", encoding="utf-8") as log:
            subprocess.run([*command, "--output", str(output.with_name(name))], stdout=log, stderr=log, check=True)
    return json.loads(record.read_text(encoding="utf-8"))


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
    """The README's table, and below it how the rates were found and on what machine."""
    names = {"published": "published: `--freeze-head`"}
    lines = [
        "| recipe | accuracy, % | learning rate | trained parameters | file, MB | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        cells = [names.get(name, name), f"**{row['mean']:.2f} ± {row['deviation']:.2f}**", f"{row['lr']:g}"]
        cells += [f"{row['trained']:,}", f"{row['bytes'] / 1e6:.1f}", f"{statistics.mean(row['minutes']):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    tried = [
        f"{name.removesuffix(', rate tuned')}: "
        + ", ".join(f"{rate} {right:,}" for rate, right in row["tuning"].items())
        for name, row in result["rows"].items()
        if row["tuning"]
    ]
    seeds = ", ".join(map(str, row["seeds"]))
    run = f"{result['phrases']:,} phrases, {result['epochs']} epoch, seeds {seeds}; mean ± standard deviation after the"
    run += f" last epoch, on the {result['total']} validation sentences. {result['machine']}, float32, a thread each,"
    run += f" {result['jobs']} runs at a time with other work beside them: the minutes are an upper bound."
    tuning = "How the rates were tuned: 10,000 phrases, one epoch, one seed; rate and right answers among"
    tuning += f" {result['held_out']:,} other phrases of the training data. {'; '.join(tried)}."
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
    split_training_data(args.dataset, args.work / "sst2_tuning")
    common = ["--model", args.model, "--precision", "fp32", "--save-every", "2000"]
    tune = [*common, "--dataset", str(args.work / "sst2_tuning"), "--train-samples", "10000", "--epochs", "1"]
    final = [*common, "--dataset", str(args.dataset), "--epochs", str(args.epochs)]
    final += ["--train-samples", str(args.train_samples)] if args.train_samples else []

    with ThreadPoolExecutor(args.jobs) as pool:

        def begin(name: str, what: str, rate: float, flags: list[str]):
            script, own, _ = RECIPES[name]
            output = args.work / f"{name.replace(', ', '_').replace(' ', '_')}_{what}.pt"
            return pool.submit(train_once, script, [*flags, *own, "--lr", str(rate)], output)

        tried = {
            name: {rate: begin(name, f"tune_{rate:g}", rate, tune) for rate in rates if len(rates) > 1}
            for name, (_, _, rates) in RECIPES.items()
        }
        tried = {name: {rate: run.result() for rate, run in runs.items()} for name, runs in tried.items()}
        best = {
            name: max(runs, key=lambda rate: runs[rate]["result"]["correct"]) if runs else RECIPES[name][2][0]
            for name, runs in tried.items()
        }
        print({name: f"{rate:g}" for name, rate in best.items()}, flush=True)
        runs = {
            (name, seed): begin(name, f"seed{seed}", best[name], [*final, "--seed", str(seed)])
            for seed in args.seeds
            for name in RECIPES
        }
        records = {key: run.result() for key, run in runs.items()}

    rows = {name: summarise(tried[name], [records[name, seed] for seed in args.seeds]) for name in RECIPES}
    one = records["default", args.seeds[0]]
    result = {
        "epochs": args.epochs,
        "phrases": round(one["epochs"][0]["sentences_per_second"] * one["epochs"][0]["seconds"]),
    }
    result |= {"held_out": HELD_OUT, "jobs": args.jobs, "total": one["result"]["total"]}
    result |= {"machine": cpu_name(), "hardware": one["hardware"], "versions": one["versions"], "rows": rows}
    path = Path(__file__).parent / "results" / "recipes.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
