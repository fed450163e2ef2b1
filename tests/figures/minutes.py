"""Minutes from the start of a process to the accuracy of the published settings.

    python tests/figures/minutes.py --model model/minilm-l6-distilbert --dataset dataset/SST-2 --steps N

Every way is a process of its own, timed from its start to its end: imports, reading, training,
evaluation and saving. The ways take turns, seed by seed, and nothing else should run:

    published       lora_scratch.py --recipe published: 3 epochs
    best            lora_scratch.py --recipe best --max-steps N, the whole schedule in N steps
    best-peft       lora_peft.py with the same
    trainer-fp32    PEFT and the Trainer with best's settings, grouped by length, for N steps
    trainer-bf16    the same under bfloat16 autocast, as is usual: the quicker of the two is its best

Interrupted, the same command goes on. N was chosen on a slice of the training data.
"""

import argparse
import os
import tempfile
from pathlib import Path

import measure

BEST = ["--recipe", "best"]
WAYS = {  # script and flags
    "published": ("lora_scratch.py", ["--recipe", "published"]),
    "best": ("lora_scratch.py", BEST),
    "best-peft": ("lora_peft.py", BEST),
    "trainer-fp32": ("tests/figures/trainer.py", [*BEST, "--grouped"]),
    "trainer-bf16": ("tests/figures/trainer.py", [*BEST, "--grouped", "--bf16"]),
}


def run_once(way: str, seed: int, args: argparse.Namespace) -> dict:
    """Seconds of a process, and how many validation sentences its model gets right."""
    script, flags = WAYS[way]
    flags = [*flags, "--model", args.model, "--dataset", args.dataset, "--seed", seed]
    if way != "published":
        flags += ["--max-steps", args.steps]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / ("a.pt" if script == "lora_scratch.py" else "a")
        record = measure.train(script, flags, output)
    result = {key: record["result"][key] for key in ("correct", "total")}
    return {"seconds": record["process_seconds"], **result}


def table(record: dict) -> str:
    """Mean and standard deviation of accuracy and minutes; ratios of the seconds of one seed."""
    rows = []
    best = [run["seconds"] for run in record["runs"]["best"]]
    for way, runs in record["runs"].items():
        seconds = [run["seconds"] for run in runs]
        minutes = measure.spread([value / 60 for value in seconds])
        ratio = measure.times(measure.ratios(seconds, best))
        rows.append([way, measure.spread(measure.percent_right(runs)), minutes, ratio])
    return measure.markdown(["", "accuracy, %", "minutes", "`best` is … times as fast"], rows)


def main() -> None:
    parser = measure.make_parser(__doc__, "minutes.json")
    add = parser.add_argument
    add("--model", required=True, help="the base model: a folder")
    add("--dataset", required=True, help="SST-2: a folder with train.tsv and dev.tsv")
    add("--steps", type=int, required=True, metavar="N", help="of best and of the Trainer")
    add("--seeds", type=int, nargs="+", default=measure.SEEDS, help="(default: 42 43 44)")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="best, and others (default: all)")
    args = parser.parse_args()
    if "best" not in args.ways:
        parser.error("--ways: best has to be among them, because the others are held against it")

    os.environ["GOMP_SPINCOUNT"] = "1000"  # the setting of the scripts, for the Trainer too
    machine = {"name": measure.cpu_name(), "cores": os.cpu_count(), "versions": measure.versions()}
    settings = {"machine": machine, "steps": args.steps}
    record = measure.continue_record(args.output, settings, {way: [] for way in args.ways})
    cells = [
        (record["runs"][way], seed, lambda way=way, seed=seed: run_once(way, seed, args))
        for seed in args.seeds
        for way in args.ways
    ]
    measure.take_turns(cells, lambda: measure.write_record(args.output, record))
    print(table(record))


if __name__ == "__main__":
    main()
