"""Full fine-tuning through the same data, loop and record: the upper reference beside which LoRA is judged.

    python tests/full_finetune.py --model model/minilm-l6-distilbert --dataset dataset/SST-2 --lr 5e-5

The flags are those of lora_scratch.py; those about LoRA do nothing. The result is a plain Hugging Face folder.
"""

import argparse
import functools
import sys
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent.parent))
import lora_scratch
from lora_scratch import (
    InputError,
    TrainingState,
    cheapen_dropout,
    choose_recipe,
    compute_cls_only,
    count_parameters,
    data_facts,
    evaluate,
    leave,
    leave_group,
    load_base,
    load_tables,
    make_parser,
    make_record,
    parse_flags,
    prepare_machine,
    print_machine,
    run,
    tokenize,
    train,
    write_folder,
    write_record,
)


def main(argv: list[str] | None = None) -> int | None:
    args = parse_flags(make_parser(__doc__, "model/full_finetune"), argv)
    if args.output.is_file():
        raise InputError(f"--output {args.output}: a file stands there; name a folder")
    device, dtype = prepare_machine(args)
    if dtype == torch.float16:
        dtype = torch.float32  # float16 would need its losses scaled
    # What is trained is held in float32; only its products are computed in 16 bits.
    mixed = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    with mock.patch.object(lora_scratch, "autocast", lambda model: mixed()):
        return train_and_judge(args, device, dtype)


def train_and_judge(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> int | None:
    train_table, eval_table, label_names = load_tables(args)
    choose_recipe(args, len(train_table.text), len(label_names))
    base = load_base(args.model, args.revision, label_names, args.max_length)
    train_set = tokenize(train_table, base.tokenizer, args.max_length)
    eval_set = tokenize(eval_table, base.tokenizer, args.max_length)

    model = base.model.requires_grad_(True).to(device)
    cheapen_dropout(model)
    counts = count_parameters(dict(model.named_parameters()), base.head)
    print(f"full fine-tuning of {args.model}, all {counts['trained']:,} parameters")
    print_machine(args, dtype)

    facts = {"label_names": label_names, "max_length": args.max_length, **base.identity}
    facts |= data_facts(train_set, eval_set)
    state = TrainingState(args, model, facts, dtype)
    train(model, train_set, eval_set, args, state)
    if not leave_group() or state.stopped:
        return leave(state)

    record = make_record(args, counts, dtype, state)
    write_folder(args.output, model.save_pretrained)
    reloaded = AutoModelForSequenceClassification.from_pretrained(args.output, dtype=torch.float32)
    compute_cls_only(reloaded)
    _, confusion = evaluate(reloaded.to(device), eval_set, args.eval_batch_size)
    size = (args.output / "model.safetensors").stat().st_size
    write_record(args, record, confusion, label_names, size)


if __name__ == "__main__":
    run(main)
