"""Write the tables of the records into the READMEs, between their marks.

    python tests/figures/tables.py

A block begins with <!-- name --> and ends with <!-- /name -->. Any of BLOCKS may stand in README.md and
in results/README.md.
"""

import re
from collections.abc import Callable
from statistics import mean

import measure
from measure import markdown, read_record, spread

import benchmark
import minutes
import own_tables

FILES = [measure.ROOT / "README.md", measure.RESULTS / "README.md"]


def accuracies(runs: list[dict]) -> list[float]:
    return [run["result"]["accuracy"] for run in runs]


def training_minutes(run: dict) -> float:
    return sum(epoch["seconds"] for epoch in run["epochs"]) / 60


def default_runs() -> list[dict]:
    return [read_record(f"default_seed{seed}") for seed in measure.SEEDS]


def default_table() -> str:
    """The default settings, seed by seed."""
    runs = default_runs()
    rows = []
    for run in runs:
        result = run["result"]
        accuracy = f"{result['accuracy']:.2f} ({result['correct']})"
        rows.append([run["settings"]["seed"], accuracy, f"{training_minutes(run):.0f}"])
    rows.append(["mean ± standard deviation", f"**{spread(accuracies(runs))} %**", ""])
    return markdown(["seed", "accuracy, % (right of 872)", "training, minutes"], rows)


def size_cells(runs: list[dict]) -> list[str]:
    """Trained parameters, and megabytes of the file."""
    trained, size = runs[0]["parameters"]["trained"], runs[0]["result"]["bytes"]
    return [f"{trained:,}", f"{size / 1e6:.1f}"]


def results_table() -> str:
    """The README's table: accuracy of three seeds for four ways to train."""
    best, every = read_record("best"), f"all {measure.SST2_PHRASES:,} phrases"
    published = read_record("recipes")["runs"]["published, head frozen"]
    ways = [
        ("published recipe: `--freeze-head`", "30,000 phrases, once", published),
        ("default", f"{every}, 3 times", default_runs()),
        ("`--recipe best`", f"{every}, twice", best["best"]),
        ("full fine-tuning, `--lr 1e-4`", f"{every}, once", best["full fine-tuning"]),
    ]
    rows = [[name, phrases, *size_cells(runs), spread(accuracies(runs))] for name, phrases, runs in ways]
    return markdown(["recipe", "trained on", "trained parameters", "file, MB", "accuracy, %"], rows)


def best_table() -> str:
    """Accuracies after the last epoch, from the reloaded files."""
    names = {
        "best": "`--recipe best`",
        "full fine-tuning": "full fine-tuning, 1e-4, once",
        "stand-in": "`--recipe best --epochs 1 --train-samples 10000`",
        "mpnet": "the same on all-mpnet-base-v2, whole size",
    }
    rows = []
    for key, name in names.items():
        runs = read_record("best")[key]
        right = ", ".join(str(run["result"]["correct"]) for run in runs)
        times = [training_minutes(run) for run in runs]
        minutes = f"{min(times):.1f} to {max(times):.1f}"
        rows.append([name, right, f"**{spread(accuracies(runs))}**", *size_cells(runs), minutes])
    return markdown(["", "right of 872", "accuracy, %", "trained parameters", "file, MB", "minutes"], rows)


def tuning_table() -> str:
    """Runs on the slice of the training data."""
    rows = []
    for run in read_record("tuning")["runs"]:
        rank = f", r {run['r']}, alpha {run['alpha']:g}" if run["r"] != 8 else ""
        dropout = ", no LoRA dropout" if run["dropout"] == 0 else ""
        cells = [f"{run['way']}{rank}{dropout}", f"{run['lr']:g}", run["batch"], run["length"], run["seed"]]
        rows.append([*cells, f"{run['correct'][-1]:,}", f"{run['loss'][-1]:.3f}", run["seconds"]])
    head = ["", "rate", "batch", "trained for", "seed", "right of 2,000", "loss", "seconds"]
    return markdown(head, rows)


def side_by_side_table() -> str:
    rows = []
    for script in ("lora_scratch", "lora_peft"):
        run = read_record("side_by_side")[script]
        result, trained = run["result"], run["parameters"]["trained"]
        accuracy = f"{result['accuracy']:.2f} % ({result['correct']}/872)"
        size, seconds = f"{result['bytes'] / 1e6:.2f} MB", f"{60 * training_minutes(run):.0f}"
        rows.append([f"`{script}.py`", accuracy, f"{trained:,}", size, seconds])
    return markdown(["", "accuracy", "trained parameters", "adapter", "seconds"], rows)


def recipes_table() -> str:
    """Recipes on 30,000 phrases."""
    rows = []
    for name, runs in read_record("recipes")["runs"].items():
        accuracy, rate = f"**{spread(accuracies(runs))}**", f"{runs[0]['settings']['lr']:g}"
        minutes = f"{mean(training_minutes(run) for run in runs):.0f}"
        rows.append([name, accuracy, rate, *size_cells(runs), minutes])
    head = ["recipe", "accuracy, %", "learning rate", "trained parameters", "file, MB", "minutes"]
    return markdown(head, rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "results": results_table,
    "default": default_table,
    "best": best_table,
    "tuning": tuning_table,
    "side-by-side": side_by_side_table,
    "recipes": recipes_table,
    "benchmark": lambda: benchmark.table(read_record("benchmark")),
    "minutes": lambda: minutes.table(read_record("minutes")),
    "own": lambda: own_tables.short_table(read_record("own_tables")),
    "own-long": lambda: own_tables.long_table(read_record("own_tables")),
    "own-mpnet": lambda: own_tables.long_table(read_record("own_tables_mpnet")),
}


def fill(text: str) -> str:
    """The text with every marked block as its record has it."""

    def block(mark: re.Match) -> str:
        name = mark[1]
        return f"<!-- {name} -->\n{BLOCKS[name]()}\n<!-- /{name} -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?\n<!-- /\1 -->", block, text, flags=re.DOTALL)


def main() -> None:
    measure.make_parser(__doc__).parse_args()
    for file in FILES:
        file.write_text(fill(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
