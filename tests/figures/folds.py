"""What --folds tells about a small table, beside what later rows say.

    python tests/figures/folds.py --data FOLDER --model model/minilm-l6-distilbert

FOLDER holds a folder for each set with train.csv and test.csv (text,label), as for own_tables.py:

    honest     the first --rows rows: right out of fold and with half of them, then on test.csv
    flipped    the first 1,000 rows, 50 with another label: how many are among the 50 surest mistakes

Interrupted, the same command goes on.
"""

import json
import tempfile
from pathlib import Path

import measure

from pandas import DataFrame, read_csv

FLIPPED = 50


def train(args, rows: DataFrame, seed: int, folder: Path) -> dict:
    rows.to_csv(folder / "train.csv", index=False)
    flags = ["--dataset", folder / "train.csv", "--model", args.model, "--folds", 5, "--seed", seed]
    return measure.train("lora_scratch.py", [*flags, "--threads", 1], folder / "a.pt")


def honest(args, rows: DataFrame, test: Path, seed: int, folder: Path) -> dict:
    record = train(args, rows[: args.rows], seed, folder)
    judge = ["--model", folder / "a.pt", "--file", test, "--label-column", "label", "--precision", "fp32"]
    later = json.loads(measure.run_process([measure.ROOT / "playground.py", *judge, "--json"]).printed)
    found = {key: record["result"][key] for key in ("correct", "total", "accuracy", "interval", "macro_f1")}
    found |= {"half": record["parts"][0]["accuracy"], "half_rows": record["parts"][0]["rows"]}
    found |= {"later": later["accuracy"], "later_macro_f1": later["macro_f1"]}
    return found | {"seconds": record["process_seconds"]}


def flipped(args, rows: DataFrame, test: Path, seed: int, folder: Path) -> dict:
    rows = rows[:1000].copy()
    wrong = rows.sample(FLIPPED, random_state=seed).index
    for row in wrong:
        others = rows["label"][rows["label"] != rows["label"][row]]
        rows.loc[row, "label"] = others.sample(1, random_state=seed).item()
    record = train(args, rows, seed, folder)
    first = [one["row"] - 2 for one in record["result"]["mistakes"][:FLIPPED]]
    every = {one["row"] - 2 for one in record["result"]["mistakes"]}
    found = {"among_the_first": len({*first} & {*wrong}), "among_all": len(every & {*wrong})}
    return found | {"mistakes": len(every), "seconds": record["process_seconds"]}


def main() -> None:
    parser = measure.make_parser(__doc__, "folds.json")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with a folder for each set")
    add("--model", required=True, help="the base model")
    add("--rows", type=int, default=100, help="of `honest` (default: 100)")
    add("--sets", nargs="+", default=["bank", "cr", "trec", "urgent"])
    add("--seeds", type=int, nargs="+", default=[42])
    args = parser.parse_args()
    record = {"honest": {}, "flipped": {}}
    if args.output.exists():
        record = measure.read_record(args.output)
    record |= {"model": Path(args.model).name, "machine": measure.cpu_name()}

    def run(what, name: str, seed: int) -> dict:
        rows = read_csv(args.data / name / "train.csv", dtype=str, keep_default_na=False)
        with tempfile.TemporaryDirectory() as folder:
            return what(args, rows, args.data / name / "test.csv", seed, Path(folder))

    cells = []
    for what, sets in ((flipped, {"cr", "trec"}), (honest, args.sets)):
        for name in [name for name in args.sets if name in sets]:
            runs = record[what.__name__].setdefault(name, [])
            for seed in args.seeds:
                cells.append((runs, seed, lambda what=what, name=name, seed=seed: run(what, name, seed)))
    measure.take_turns(cells, lambda: measure.write_record(args.output, record))


if __name__ == "__main__":
    main()
