"""What a user with a small table of sentences gets, beside what else could be done with it.

    pip install scikit-learn
    python tests/figures/own_tables.py --data FOLDER --model model/minilm-l6-distilbert --jobs 2

FOLDER holds a folder for each set with train.csv and test.csv (text,label): the first n rows of
train.csv are the table, test.csv is what comes later and is read once, at the end. Every way gets the
same n rows:

    lora      lora_scratch.py with nothing but --dataset: the recipe of its defaults
    setfit    SetFit: for each row 20 pairs of one label and 20 of two, one epoch in batches of 16, then
              logistic regression on the encoder's mean over the tokens
    trainer   PEFT and the Trainer with its usual settings: q_lin and v_lin, 2e-4, three epochs
    frozen    logistic regression on the frozen encoder's mean over the tokens
    tfidf     logistic regression on words and pairs of words

SetFit needs transformers 4, thus an environment of its own (tests/requirements-setfit.txt). The Python of
that one adds to the same record: --ways setfit frozen tfidf. Interrupted, the same command goes on.
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import measure

from pandas import DataFrame, read_csv


def read_table(path: Path, most: int | None = None) -> DataFrame:
    """The columns text and label of the first rows."""
    return read_csv(path, dtype=str, keep_default_na=False, nrows=most)


def lora(model: str, train: DataFrame, texts: list, seed: int, folder: Path) -> list:
    train.to_csv(folder / "train.csv", index=False)
    train[:10].to_csv(folder / "validation.csv", index=False)  # so that all rows are trained on
    DataFrame({"text": texts}).to_csv(folder / "questions.csv", index=False)
    flags = ["--dataset", folder, "--model", model, "--seed", seed, "--threads", 1]
    measure.train("lora_scratch.py", flags, folder / "a.pt")
    flags = ["--model", folder / "a.pt", "--file", folder / "questions.csv"]
    flags += ["--output", folder / "answers.csv"]
    measure.run_process([measure.ROOT / "playground.py", *flags])
    return read_table(folder / "answers.csv")["label"].tolist()


def setfit(model: str, train: DataFrame, texts: list, seed: int, folder: Path) -> list:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, models
    from setfit import SetFitModel, Trainer, TrainingArguments
    from sklearn.linear_model import LogisticRegression

    encoder = models.Transformer(model, max_seq_length=128)
    pooling = models.Pooling(encoder.get_embedding_dimension(), pooling_mode="mean")
    body = SentenceTransformer(modules=[encoder, pooling, models.Normalize()], device="cpu")
    classifier = SetFitModel(body, LogisticRegression())
    options = {"num_iterations": 20, "batch_size": 16, "num_epochs": 1, "seed": seed}
    options |= {"output_dir": str(folder), "save_strategy": "no", "report_to": "none"}
    Trainer(classifier, TrainingArguments(**options), Dataset.from_pandas(train)).train()
    return classifier.predict(texts).tolist()


def trainer(model: str, train: DataFrame, texts: list, seed: int, folder: Path) -> list:
    train.to_csv(folder / "train.csv", index=False)
    DataFrame({"text": texts, "label": ""}).to_csv(folder / "validation.csv", index=False)
    flags = ["--dataset", folder, "--model", model, "--seed", seed, "--threads", 1]
    record = measure.train("tests/figures/trainer.py", flags, folder / "a")
    return record["result"]["answers"]


def frozen(model: str, train: DataFrame, texts: list, seed: int, folder: Path) -> list:
    import torch
    import transformers
    from sklearn.linear_model import LogisticRegression

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    encoder = transformers.AutoModel.from_pretrained(model, dtype=torch.float32).eval()

    @torch.inference_mode()
    def embed(texts: list[str]):
        """The mean of the last hidden states over each text's tokens, at length 1."""
        parts = []
        options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
        for start in range(0, len(texts), 64):
            inputs = tokenizer(texts[start : start + 64], **options)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            total = (hidden * mask[..., None]).sum(dim=1)
            parts.append(torch.nn.functional.normalize(total, dim=-1))
        return torch.cat(parts).numpy()

    classifier = LogisticRegression(C=10, max_iter=5000)
    classifier.fit(embed(train["text"].tolist()), train["label"])
    return classifier.predict(embed(texts)).tolist()


def tfidf(model: str, train: DataFrame, texts: list, seed: int, folder: Path) -> list:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    pipeline = make_pipeline(words, LogisticRegression(C=10, max_iter=5000))
    return pipeline.fit(train["text"], train["label"]).predict(texts).tolist()


WAYS = {"lora": lora, "setfit": setfit, "trainer": trainer, "frozen": frozen, "tfidf": tfidf}
NEEDS = {"setfit": "setfit", "trainer": "peft", "frozen": "sklearn", "tfidf": "sklearn"}


def run_once(args: argparse.Namespace, name: str, rows: int, way: str, seed: int) -> dict:
    """Accuracy and macro-F1 over the labels of the test file, in percent; seconds of clock and of CPU."""
    train = read_table(args.data / name / "train.csv", rows)
    test = read_table(args.data / name / "test.csv")
    start, cpu = time.perf_counter(), sum(os.times()[:4])
    with tempfile.TemporaryDirectory() as folder:
        answers = WAYS[way](args.model, train, test["text"].tolist(), seed, Path(folder))
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": sum(os.times()[:4]) - cpu}
    given = test["label"].tolist()
    right = [answer for answer, label in zip(answers, given, strict=True) if answer == label]
    f1 = [2 * right.count(label) / (answers.count(label) + given.count(label)) for label in set(given)]
    return {"accuracy": 100 * len(right) / len(given), "macro_f1": 100 * mean(f1)} | seconds


def run_apart(*values) -> dict:
    """In a process of its own, so that the CPU seconds of it and its children are those of one run."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(run_once, *values).result()


def scores(record: dict, key: str, way: str) -> list[float]:
    """Of each seed: macro-F1 where one label has four fifths of the rows, else accuracy."""
    score = "macro_f1" if key.split()[0] in record["uneven"] else "accuracy"
    return [run[score] for run in record["cells"][key].get(way, [])]


def long_table(record: dict) -> str:
    """Mean and standard deviation of the seeds, for every way and cell that was measured."""
    keys = sorted(sorted(record["cells"]), key=lambda key: int(key.split()[1]))
    ways = [way for way in WAYS if any(scores(record, key, way) for key in keys)]
    rows = []
    for key in keys:
        found = [scores(record, key, way) for way in ways]
        rows.append([*key.split(), *(measure.spread(values, 1) if values else "–" for values in found)])
    return measure.markdown(["set", "rows", *ways], rows)


def short_table(record: dict) -> str:
    """Set by size: the mean of lora_scratch.py's seeds, and in brackets the best other way."""
    sizes = sorted({int(key.split()[1]) for key in record["cells"]})
    rows = []
    for name in sorted({key.split()[0] for key in record["cells"]}):
        row = [name]
        for size in sizes:
            found = {way: scores(record, f"{name} {size}", way) for way in WAYS}
            others = {way: mean(values) for way, values in found.items() if values}
            ours = others.pop("lora")
            best = max(others, key=others.get)
            row.append(f"**{ours:.1f}** ({others[best]:.1f} {best})")
        rows.append(row)
    return measure.markdown(["set", *(f"{size:,} rows" for size in sizes)], rows)


def main() -> None:
    parser = measure.make_parser(__doc__, "own_tables.json")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with a folder for each set")
    add("--model", required=True, help="the base model")
    add("--rows", type=int, nargs="+", default=[50, 100, 300, 1000], help="(default: 50 100 300 1000)")
    add("--sets", nargs="+", help="(default: every folder in --data)")
    usual = [way for way in WAYS if way != "setfit"]
    add("--ways", nargs="+", choices=WAYS, default=usual, help="(default: all but setfit)")
    add("--seeds", type=int, nargs="+", default=measure.SEEDS, help="(default: 42 43 44)")
    add("--jobs", type=int, default=1, help="runs at a time, a thread each (default: %(default)s)")
    args = parser.parse_args()
    lacking = [way for way in args.ways if way in NEEDS and not find_spec(NEEDS[way])]
    if lacking:
        parser.error(f"--ways {' '.join(lacking)}: not installed here: {NEEDS[lacking[0]]}; see --help")
    os.environ["OMP_NUM_THREADS"] = "1"  # in every run's process

    record = {"cells": {}, "uneven": []}
    if args.output.exists():
        record = measure.read_record(args.output)
    sets = args.sets or sorted(path.parent.name for path in args.data.glob("*/train.csv"))
    for name in sets:
        shares = read_table(args.data / name / "test.csv")["label"].value_counts(normalize=True)
        if shares.max() > 0.8:
            record["uneven"] = sorted({*record["uneven"], name})
    record |= {"model": Path(args.model).name, "jobs": args.jobs, "machine": measure.cpu_name()}

    cells = []
    for way in args.ways:
        for rows in args.rows:
            for name in sets:
                runs = record["cells"].setdefault(f"{name} {rows}", {}).setdefault(way, [])
                for seed in [0] if way in ("frozen", "tfidf") else args.seeds:
                    values = (args, name, rows, way, seed)
                    cells.append((runs, seed, lambda values=values: run_apart(*values)))
    measure.take_turns(cells, lambda: measure.write_record(args.output, record), args.jobs)
    print(long_table(record))


if __name__ == "__main__":
    main()
