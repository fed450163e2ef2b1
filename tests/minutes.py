"""Minutes from the start of a process to the accuracy of the published settings.

    python tests/minutes.py --model model/minilm-l6-distilbert --dataset dataset/SST-2 --steps N

Every way is a process of its own, timed from its start to its end: imports, reading, training, evaluation and saving.
The ways take turns, seed by seed, and nothing else should run:

    published       lora_scratch.py --recipe published: 3 epochs
    best            lora_scratch.py --recipe best --max-steps N, the whole schedule in N steps
    best-peft       lora_peft.py with the same
    trainer-fp32    PEFT and the Trainer with best's settings, grouped by length, for N steps
    trainer-bf16    the same under bfloat16 autocast, as is usual: the quicker of the two is its best

It writes tests/results/minutes.json after every run and prints the table. Interrupted, the same command goes on.
N was chosen on a slice of the training data.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from benchmark import cpu_name

ROOT = Path(__file__).parent.parent
WAYS = ("published", "best", "best-peft", "trainer-fp32", "trainer-bf16")


def train_by_trainer(args: argparse.Namespace) -> None:
    """The recipe `best` through PEFT and the Trainer; prints {"correct": ..., "total": ...} as its last line."""
    import peft
    import torch
    import transformers
    from datasets import load_dataset

    transformers.set_seed(args.seed)
    transformers.logging.set_verbosity_error()
    files = {"train": f"{args.dataset}/train.tsv", "validation": f"{args.dataset}/dev.tsv"}
    tables = load_dataset("csv", data_files=files, delimiter="\t", quoting=3, keep_default_na=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)

    def encode(rows: dict) -> dict:
        columns = dict(tokenizer(rows["sentence"], truncation=True, max_length=128))
        return columns | {"length": [len(ids) for ids in columns["input_ids"]]}  # so the sampler need not count

    tables = tables.map(encode, batched=True, remove_columns=["sentence"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        args.model, dtype=torch.float32, num_labels=2
    )
    # PEFT's own "all-linear" fails here: it would wrap pre_classifier twice.
    lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "modules_to_save": ["pre_classifier", "classifier"]}
    lora["target_modules"] = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]
    settings = transformers.TrainingArguments(
        output_dir=str(args.output),
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        train_sampling_strategy="group_by_length",
        learning_rate=1e-3,
        weight_decay=0.01,
        warmup_steps=round(0.06 * args.steps),
        max_steps=args.steps,
        optim="adamw_torch_fused",
        bf16=args.way == "trainer-bf16",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=args.seed,
    )
    run = transformers.Trainer(
        model=peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **lora)),
        args=settings,
        train_dataset=tables["train"],
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    run.train()
    trained = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    run.model.save_pretrained(args.output)
    found = run.predict(tables["validation"])
    correct = int((found.predictions.argmax(axis=1) == found.label_ids).sum())
    print(json.dumps({"correct": correct, "total": len(found.label_ids), "trained": trained}))


def measure(way: str, seed: int, args: argparse.Namespace) -> dict:
    """Seconds of a process, and how many validation sentences its model gets right."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / ("a" if way == "best-peft" or way.startswith("trainer") else "a.pt")
        data = ["--model", args.model, "--dataset", args.dataset, "--seed", seed, "--output", output]
        if way.startswith("trainer"):
            command = [__file__, *data, "--way", way, "--steps", args.steps]
        else:
            script = "lora_peft.py" if way == "best-peft" else "lora_scratch.py"
            recipe = ["published"] if way == "published" else ["best", "--max-steps", args.steps]
            command = [ROOT / script, *data, "--label-names", "negative", "positive", "--recipe", *recipe]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": folder, "GOMP_SPINCOUNT": "1000"}
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(done.stderr[-4000:])
        if way.startswith("trainer"):
            result = json.loads(done.stdout.splitlines()[-1])
        else:
            result = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))["result"]
        return {"seed": seed, "seconds": seconds, "correct": result["correct"], "total": result["total"]}


def table(record: dict) -> str:
    """Mean and standard deviation of accuracy and minutes; ratios of the seconds of one seed."""
    lines = ["| | accuracy, % | minutes | `best` is … times as fast |", "|---|---|---|---|"]
    best = {run["seed"]: run["seconds"] for run in record["runs"]["best"]}
    for way, runs in record["runs"].items():
        scores = [100 * run["correct"] / run["total"] for run in runs]
        minutes = [run["seconds"] / 60 for run in runs]
        ratios = [run["seconds"] / best[run["seed"]] for run in runs if run["seed"] in best]
        cells = [way, *(f"{statistics.mean(of):.2f} ± {statistics.stdev(of):.2f}" for of in (scores, minutes))]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="base model: a folder")
    add("--dataset", required=True, help="SST-2: a folder with train.tsv and dev.tsv")
    add("--steps", type=int, required=True, metavar="N", help="of best and of the Trainer")
    add("--seeds", type=int, nargs="+", default=[42, 43, 44], help="at least two (default: 42 43 44)")
    add("--ways", nargs="+", choices=WAYS, default=WAYS, help="best, and others (default: all)")
    add("--way", choices=WAYS[3:], help=argparse.SUPPRESS)  # a process of its own
    add("--seed", type=int, help=argparse.SUPPRESS)
    add("--output", type=Path, default=Path(__file__).parent / "results" / "minutes.json", help="the record")
    args = parser.parse_args()
    if args.way:
        return train_by_trainer(args)
    if "best" not in args.ways or len(set(args.seeds)) < 2:
        parser.error("best and two seeds at least: everything is held against them")
    packages = ("torch", "transformers", "peft", "accelerate", "datasets")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    record = {"machine": {"name": cpu_name(), "cores": os.cpu_count(), "versions": versions}}
    record |= {"steps": args.steps, "runs": {way: [] for way in args.ways}}
    if args.output.exists():
        before = json.loads(args.output.read_text(encoding="utf-8"))
        if any(before[key] != record[key] for key in ("machine", "steps")):
            sys.exit(f"{args.output} is of another machine or other steps: move it away, or name another --output")
        record["runs"] |= before["runs"]
    for seed in args.seeds:
        for way in args.ways:
            if any(run["seed"] == seed for run in record["runs"][way]):
                continue
            record["runs"][way].append(measure(way, seed, args))
            print(way, record["runs"][way][-1], file=sys.stderr, flush=True)
            args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record))


if __name__ == "__main__":
    main()
