"""Full fine-tuning through the same data, loop and record: the upper reference beside which LoRA is judged.

    python tests/figures/full_finetune.py --model model/minilm-l6-distilbert --dataset dataset/SST-2 --lr 5e-5

The flags are those of lora_scratch.py; those about LoRA do nothing. The result is a plain folder of
Hugging Face's.
"""

import argparse
from dataclasses import replace
from unittest import mock

import measure

import lora_scratch as scratch

import torch
from transformers import AutoModelForSequenceClassification


def main(argv: list[str] | None = None) -> None:
    args = scratch.parse_flags(scratch.make_parser(__doc__, "model/full_finetune"), argv)
    if args.output.is_file():
        raise scratch.InputError(f"--output {args.output}: it is a file; name a folder")
    device, dtype = scratch.prepare_machine(args)
    if dtype == torch.float16:
        dtype = torch.float32  # float16 would need its losses scaled

    def autocast(model: torch.nn.Module) -> torch.autocast:
        """What is trained is held in float32; only its products are computed in 16 bits."""
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    with mock.patch.object(scratch, "autocast", autocast):
        train_and_judge(args, device, dtype)


def train_and_judge(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(args.seed)
    train_rows, eval_rows, about = scratch.load_tables(args)
    args = scratch.choose_recipe(args, len(train_rows), len(about["labels"]))
    base = scratch.load_base(args.model, args.revision, about["label_names"], args.max_length)
    train_set, eval_set = (
        scratch.tokenize(rows["text"], base.tokenizer, args.max_length, rows["label"])
        for rows in (train_rows, eval_rows)
    )
    base.model.requires_grad_(True)
    model = scratch.speed_up(base).to(device)
    facts = scratch.adapter_facts(args, base, about, wrapped=[])
    record = scratch.describe(args, dict(model.named_parameters()), base.head, [], dtype)

    state = scratch.TrainingState(args, model, facts, record, train_set, eval_set)
    scratch.train(model, train_set, eval_set, args, state)

    scratch.write_folder(args.output, model.save_pretrained)
    reloaded = AutoModelForSequenceClassification.from_pretrained(args.output, dtype=torch.float32)
    reloaded = scratch.speed_up(replace(base, model=reloaded)).to(device)
    logits = scratch.predict(reloaded, eval_set, 2 * args.batch_size)
    confusion = scratch.count_answers(logits, eval_set.labels)
    size = (args.output / "model.safetensors").stat().st_size
    record["result"] = scratch.score(confusion) | {"bytes": size, "label_names": about["label_names"]}
    measure.write_record(args.output.with_suffix(".json"), record)
    print(f"saved {args.output}; reloaded, it answers {record['result']['accuracy']:.2f} % right")


if __name__ == "__main__":
    scratch.run(main)
