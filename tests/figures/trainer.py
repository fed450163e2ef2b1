"""PEFT and the Trainer, beside which lora_scratch.py is measured.

    python tests/figures/trainer.py --model model/minilm-l6-distilbert --dataset dataset/SST-2 \\
        --output model/trainer --recipe best --max-steps 700

--dataset is a folder with a table to train on, train.tsv or train.csv, and one to judge by, dev.tsv or
validation.csv: a column of texts, then one of labels. It writes an adapter folder and, beside it, a
record as that of the scripts.
"""

import csv
import time
from pathlib import Path

import measure

import pandas
import peft
import torch
import transformers
from datasets import Dataset

LORA = {"task_type": "SEQ_CLS", "r": 8, "lora_alpha": 16, "lora_dropout": 0.1}
QUIET = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
USUAL = {"learning_rate": 2e-4, "per_device_train_batch_size": 16}  # of LoRA's paper, on q and v
BEST = {"learning_rate": 1e-3, "per_device_train_batch_size": 32, "weight_decay": 0.01}
BEST |= {"warmup_steps": 0.06, "optim": "adamw_torch_fused"}  # as lora_scratch.py --recipe best
LINEAR = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]
RECIPES = {  # what LoRA is put on, and the settings
    "usual": ({"target_modules": ["q_lin", "v_lin"]}, USUAL),
    "best": ({"target_modules": LINEAR, "modules_to_save": ["pre_classifier", "classifier"]}, BEST),
}


class Clock(transformers.TrainerCallback):
    """The seconds of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict] = []

    def on_epoch_begin(self, *_, **__) -> None:
        self.start = time.perf_counter()

    def on_epoch_end(self, *_, **__) -> None:
        seconds = time.perf_counter() - self.start
        self.epochs.append({"epoch": len(self.epochs) + 1, "seconds": seconds})


def read_table(folder: Path, *names: str) -> tuple[list[str], list[str]]:
    """Texts and labels of the first of these files that is there."""
    path = next(folder / name for name in names if (folder / name).exists())
    form = {"sep": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    table = pandas.read_csv(path, dtype=str, keep_default_na=False, **form)
    return table.iloc[:, 0].tolist(), table.iloc[:, 1].tolist()


def main(argv: list[str] | None = None) -> None:
    parser = measure.make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="the base model: a folder")
    add("--dataset", type=Path, required=True, help="the folder of the two tables")
    add("--output", type=Path, required=True, help="the adapter folder")
    add("--recipe", choices=RECIPES, default="usual", help="(default: %(default)s)")
    add("--epochs", type=int, default=3, help="(default: %(default)s)")
    add("--max-steps", type=int, default=-1, help="instead of epochs")
    add("--grouped", action="store_true", help="batches grouped by length")
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    add("--threads", type=int, help="(default: PyTorch's choice)")
    add("--seed", type=int, default=42, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    transformers.set_seed(args.seed)
    transformers.logging.set_verbosity_error()

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)

    def encode(texts: list[str]) -> dict[str, list]:
        columns = dict(tokenizer(texts, truncation=True, max_length=128))
        return columns | {"length": [len(ids) for ids in columns["input_ids"]]}

    texts, labels = read_table(args.dataset, "train.tsv", "train.csv")
    names = sorted(set(labels))
    columns = encode(texts) | {"labels": [names.index(label) for label in labels]}
    questions, given = read_table(args.dataset, "dev.tsv", "validation.csv")

    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model = load(args.model, dtype=torch.float32, num_labels=len(names))
    layers, recipe = RECIPES[args.recipe]
    settings = QUIET | recipe | {"seed": args.seed, "bf16": args.bf16, "use_cpu": args.device == "cpu"}
    settings |= {"num_train_epochs": args.epochs, "max_steps": args.max_steps}
    settings["train_sampling_strategy"] = "group_by_length" if args.grouped else "random"
    settings["logging_nan_inf_filter"] = False  # it would wait for a GPU at every step
    clock = Clock()
    data = {"train_dataset": Dataset.from_dict(columns), "processing_class": tokenizer, "callbacks": [clock]}
    data["data_collator"] = transformers.DataCollatorWithPadding(tokenizer)
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA, **layers))
    settings = transformers.TrainingArguments(str(args.output), **settings)
    trainer = transformers.Trainer(model, settings, **data)
    trainer.train()
    trainer.model.save_pretrained(args.output)

    logits = trainer.predict(Dataset.from_dict(encode(questions))).predictions
    answers = [names[i] for i in logits.argmax(axis=1)]
    right = sum(answer == label for answer, label in zip(answers, given, strict=True))
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    result = {"correct": right, "total": len(given), "answers": answers}
    record = {"parameters": {"trained": trained}, "epochs": clock.epochs, "result": result}
    measure.write_record(args.output.with_suffix(".json"), record)


if __name__ == "__main__":
    main()
