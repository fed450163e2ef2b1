"""What a user with a small table of sentences gets, beside what else could be done with it.

    pip install scikit-learn
    python tests/own_tables.py --data FOLDER --model model/minilm-l6-distilbert --jobs 2

FOLDER holds a folder for each set with train.csv and test.csv (text,label): the first n rows of train.csv are the
table, test.csv is what comes later and is read once, at the end. Every way gets the same n rows:

    lora      lora_scratch.py with nothing but --dataset: the recipe of its defaults
    trainer   PEFT and the Trainer with its usual settings: q_lin and v_lin, 2e-4, three epochs
    frozen    logistic regression on the frozen encoder's mean over the tokens
    tfidf     logistic regression on words and pairs of words

It writes tests/results/own_tables.json and prints the table. Interrupted, the same command goes on.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
WAYS = {"lora": (42, 43, 44), "trainer": (42, 43, 44), "frozen": (0,), "tfidf": (0,)}  # and their seeds


def read_rows(path: Path, most: int | None = None) -> tuple[list[str], list[str]]:
    """Texts and labels of a table."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:most]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def score(answers: list[str], labels: list[str]) -> dict[str, float]:
    """Accuracy and macro-F1 over the labels of the test file, in percent."""
    from sklearn.metrics import f1_score

    right = sum(answer == label for answer, label in zip(answers, labels, strict=True))
    f1 = f1_score(labels, answers, labels=sorted(set(labels)), average="macro", zero_division=0)
    return {"accuracy": 100 * right / len(labels), "macro_f1": 100 * f1}


def lora(args: argparse.Namespace, texts: list, labels: list, test: list, seed: int, folder: Path) -> list[str]:
    import lora_scratch
    import playground

    for name, rows in (("train", len(texts)), ("validation", 10)):  # all n rows are trained on
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *zip(texts[:rows], labels[:rows], strict=True)])
    flags = ["--dataset", folder, "--model", args.model, "--seed", seed, "--threads", 1, "--output", folder / "a.pt"]
    lora_scratch.main([str(flag) for flag in [*flags, *args.flags]])
    model = playground.load("lora", folder / "a.pt", None)
    tokens, _ = playground.read_tokens(test, model)
    return [model.label_names[i] for i in playground.probabilities(model, tokens, 32).argmax(dim=1)]


def trainer(args: argparse.Namespace, texts: list, labels: list, test: list, seed: int, folder: Path) -> list[str]:
    import peft
    import transformers
    from datasets import Dataset

    import lora_scratch

    names = sorted(set(labels))
    transformers.set_seed(seed)
    base = lora_scratch.load_base(args.model, None, names, 128)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1, target_modules=args.targets)
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        learning_rate=2e-4,
        num_train_epochs=3,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=seed,
    )
    encode = {"truncation": True, "max_length": 128}
    columns = base.tokenizer(texts, **encode) | {"labels": [names.index(label) for label in labels]}
    run = transformers.Trainer(
        model=peft.get_peft_model(base.model, config),
        args=settings,
        train_dataset=Dataset.from_dict(dict(columns)),
        data_collator=transformers.DataCollatorWithPadding(base.tokenizer),
    )
    run.train()
    answers = run.predict(Dataset.from_dict(dict(base.tokenizer(test, **encode)))).predictions.argmax(axis=1)
    return [names[i] for i in answers]


def frozen(args: argparse.Namespace, texts: list, labels: list, test: list, seed: int, folder: Path) -> list[str]:
    import torch
    import transformers
    from sklearn.linear_model import LogisticRegression

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModel.from_pretrained(args.model, dtype=torch.float32).eval()

    @torch.inference_mode()
    def embed(texts: list[str]):
        parts = []
        for start in range(0, len(texts), 64):
            options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
            inputs = tokenizer(texts[start : start + 64], **options)
            mask = inputs["attention_mask"][..., None]
            hidden = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
            parts.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(parts).numpy()

    return LogisticRegression(C=10, max_iter=5000).fit(embed(texts), labels).predict(embed(test)).tolist()


def tfidf(args: argparse.Namespace, texts: list, labels: list, test: list, seed: int, folder: Path) -> list[str]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    pipeline = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=5000)
    )
    return pipeline.fit(texts, labels).predict(test).tolist()


def run_one(args: argparse.Namespace) -> None:
    """One cell in a process of its own: prints its scores as the last line."""
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    name, rows, way, seed = args.one
    texts, labels = read_rows(args.data / name / "train.csv", int(rows))
    test, given = read_rows(args.data / name / "test.csv")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        answers = globals()[way](args, texts, labels, test, int(seed), Path(folder))
    print(json.dumps(score(answers, given) | {"seconds": time.perf_counter() - start}))


def table(record: dict) -> str:
    """The long table: mean and spread of the seeds; macro-F1 where the labels are uneven."""
    ways = [way for way in WAYS if all(cell.get(way) for cell in record["cells"].values())]
    lines = [f"| set | rows | {' | '.join(ways)} |", f"|---|---|{'---|' * len(ways)}"]
    for key, cell in record["cells"].items():
        name, rows = key.split()
        measure = "macro_f1" if name in record["uneven"] else "accuracy"
        shown = []
        for way in ways:
            values = [run[measure] for run in cell[way]]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            shown.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {name} | {rows} | {' | '.join(shown)} |")
    return "\n".join(lines)


def short_table(record: dict) -> str:
    """Set by size: the mean of lora_scratch.py's seeds, and in brackets the best of the other ways."""
    sizes = sorted({int(key.split()[1]) for key in record["cells"]})
    lines = [f"| set | {' | '.join(f'{size:,} rows' for size in sizes)} |", f"|---|{'---|' * len(sizes)}"]
    for name in sorted({key.split()[0] for key in record["cells"]}):
        measure, shown = "macro_f1" if name in record["uneven"] else "accuracy", []
        for size in sizes:
            cell = record["cells"][f"{name} {size}"]
            means = {way: statistics.mean(run[measure] for run in runs) for way, runs in cell.items() if runs}
            ours = means.pop("lora")
            best = max(means, key=means.get)
            shown.append(f"**{ours:.1f}** ({means[best]:.1f} {best})")
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with a folder for each set")
    add("--model", required=True, help="the base model")
    add("--targets", nargs="+", default=["q_lin", "v_lin"], help="of the Trainer (default: %(default)s)")
    add("--rows", type=int, nargs="+", default=[100, 300, 1000], help="sizes of the table (default: 100 300 1000)")
    add("--sets", nargs="+", help="(default: every folder in --data)")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="(default: all)")
    add("--jobs", type=int, default=1, help="processes at a time, a thread each (default: %(default)s)")
    add("--flags", nargs=argparse.REMAINDER, default=[], help="more flags of lora_scratch.py, last of all")
    add("--output", type=Path, default=Path(__file__).parent / "results" / "own_tables.json", help="the record")
    add("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run_one(args)
    from benchmark import cpu_name

    sets = args.sets or sorted(path.name for path in args.data.iterdir() if (path / "train.csv").is_file())
    record = {"cells": {}, "uneven": []}
    if args.output.exists():
        record = json.loads(args.output.read_text(encoding="utf-8"))
    for name in sets:
        labels = read_rows(args.data / name / "test.csv")[1]
        if max(labels.count(label) for label in set(labels)) > 0.8 * len(labels):
            record["uneven"] = sorted({*record["uneven"], name})
    record |= {"model": Path(args.model).name, "jobs": args.jobs, "flags": args.flags, "machine": cpu_name()}

    def run(name: str, rows: int, way: str, seed: int) -> None:
        key = f"{name} {rows}"
        done = record["cells"].setdefault(key, {}).setdefault(way, [])
        if any(one["seed"] == seed for one in done):
            return
        own = [sys.executable, __file__, *sys.argv[1:]]
        place = own.index("--flags") if "--flags" in own else len(own)
        command = [*own[:place], "--one", name, str(rows), way, str(seed), *own[place:]]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if found.returncode:
            sys.exit(f"{' '.join(command)}\n{found.stderr[-2000:]}")
        result = {"seed": seed, **json.loads(found.stdout.splitlines()[-1])}
        done.append(result)
        done.sort(key=lambda one: one["seed"])
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(key, way, result, flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        cells = [(n, r, w, s) for w in args.ways for r in args.rows for n in sets for s in WAYS[w]]
        for one in [pool.submit(run, *cell) for cell in cells]:
            one.result()
    print(table(record))


if __name__ == "__main__":
    main()
