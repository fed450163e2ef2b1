"""Full fine-tuning through the same data, loop and record: the upper reference beside which LoRA is judged.

    python tests/full_finetune.py --model model/minilm-l6-distilbert --dataset dataset/SST-2 --lr 5e-5

The flags are those of lora_scratch.py; those about LoRA do nothing. The result is a plain Hugging Face folder.
"""

import contextlib
import io
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent.parent))
from lora_scratch import (
    InputError,
    describe,
    evaluate,
    finish,
    last_layer_for_cls_only,
    load_base,
    load_data,
    make_parser,
    parse_flags,
    run,
    start,
    tokenize,
    train,
    write_folder,
)


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(make_parser(__doc__, "model/full_finetune"), argv)
    if args.output.is_file():
        raise InputError(f"--output {args.output}: a file stands there; name a folder")
    start(args)
    train_set, eval_set, label_names = load_data(args)
    base = load_base(args.model, args.revision, label_names, args.max_length)
    model, pad_id = base.model, base.tokenizer.pad_token_id
    train_set, eval_set = (tokenize(s, base.tokenizer, args.max_length) for s in (train_set, eval_set))

    args.fingerprint = base.fingerprint  # a resumed run has to have the same base
    last_layer_for_cls_only(model)
    model.requires_grad_(True).to(args.device)  # all in float32: what is trained is not held in 16 bits
    with contextlib.redirect_stdout(io.StringIO()) as table:  # it would call the base frozen
        record = describe(args, dict(model.named_parameters()), base.head, [])
    print(f"full fine-tuning, all {record['parameters']['trained']:,} parameters", table.getvalue().splitlines()[-1])

    record["epochs"], losses = train(model, pad_id, train_set, eval_set, args)

    write_folder(args.output, model.save_pretrained)
    reloaded = AutoModelForSequenceClassification.from_pretrained(args.output, dtype=torch.float32)
    last_layer_for_cls_only(reloaded)
    _, confusion = evaluate(reloaded.to(args.device), pad_id, eval_set, args)
    size = (args.output / "model.safetensors").stat().st_size
    finish(args, record, losses, confusion, label_names, size)


if __name__ == "__main__":
    run(main)
