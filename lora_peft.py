"""The experiment of lora_scratch.py through Hugging Face PEFT, and the way between the two formats.

Data, loop, schedule and record are imported from lora_scratch.py: every line here is about what PEFT replaces,
that is building, saving, loading and converting. Given PEFT's initial tensors, both scripts train alike.

    python lora_peft.py                                  # as lora_scratch.py, with the same flags
    python lora_peft.py --use-dora                       # a variant that only PEFT has
    python lora_peft.py --import-scratch FILE.pt --output FOLDER    # handwritten checkpoint → PEFT adapter
    python lora_peft.py --export-scratch FOLDER --output FILE.pt    # and back, bit for bit

The result is an adapter folder that PEFT loads without this project: see the README.
"""

import argparse
import json
import re
import warnings
from pathlib import Path

import peft
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils import load_peft_weights
from torch import Tensor

from lora_scratch import (
    FACTS,
    FORMAT,
    LORA_FACTS,
    Base,
    InputError,
    cast_base,
    check_facts,
    check_tensors,
    describe,
    evaluate,
    find_targets,
    finish,
    first_line,
    last_layer_for_cls_only,
    load_base,
    load_checkpoint,
    load_data,
    load_trained_base,
    make_facts,
    make_parser,
    parse_flags,
    predict,
    run,
    save_checkpoint,
    start,
    tell_how_to_ask,
    tokenize,
    train,
    trained_tensors,
    write_folder,
)

FACTS_FILE = "lora_peft.json"  # in the adapter folder: what PEFT has no place for, the fingerprint and the label names
UNCHECKED = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "modules_to_save"}


def make_config(base: Base, facts: dict, use_dora: bool = False) -> LoraConfig:
    """PEFT's configuration for the same adapter. The head is named whole: PEFT's own guess matches by suffix."""
    head_modules = sorted({name.rpartition(".")[0] for name in base.head})
    return LoraConfig(
        task_type=TaskType.SEQ_CLS,
        base_model_name_or_path=facts["base"],
        revision=facts["revision"],
        r=facts["r"],
        lora_alpha=facts["alpha"],
        lora_dropout=facts["dropout"],
        use_rslora=facts["use_rslora"],
        use_dora=use_dora,
        target_modules=facts["targets"],
        exclude_modules=head_modules,  # a target such as BERT's "dense" must not reach into the head
        modules_to_save=head_modules,  # trained and saved in full; frozen below, saved all the same
    )


def wrap(base: Base, config: LoraConfig, freeze_head: bool = False) -> PeftModel:
    """The base with PEFT's adapter in it; the head is trained unless frozen."""
    # PEFT 0.21 asks transformers 5 for an attribute under its former name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    model = get_peft_model(base.model, config)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.requires_grad_(not freeze_head)
    last_layer_for_cls_only(model)
    return model


def own_names(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's tensors under the names of lora_scratch.py; its spare copy of the untrained head is left out."""
    return {own_name(name): tensor for name, tensor in named.items() if ".original_module." not in name}


def own_name(name: str) -> str:
    """base_model.model.X.q_lin.lora_A.default.weight → X.q_lin.lora_A, and likewise for head and base."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
    return re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1", name)


def save_adapter(folder: Path, model: PeftModel, base: Base, facts: dict) -> None:
    """A standard adapter folder with the tokenizer and our facts; file by file moved into place when whole."""

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary)
        base.tokenizer.save_pretrained(temporary)
        (temporary / FACTS_FILE).write_text(json.dumps({"format": FORMAT, **facts}, indent=1) + "\n", encoding="utf-8")

    write_folder(folder, write)


def load_adapter(folder: str | Path, base_name: str | None = None, merge: bool = False) -> tuple[Base, dict]:
    """Rebuild a trained model in float32, on the CPU, from an adapter folder of this script and its base model.

    The model of the returned Base is a PeftModel, or the plain merged model where `merge`. `base_name` says where
    the base lies when the folder's own name for it does not. Raises InputError for a folder that is no adapter, for
    tensors missing, left over, misshapen or not finite, and for another base.
    """
    folder = Path(folder)
    for name in (FACTS_FILE, "adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: not an adapter folder of lora_peft.py, it has no {name}")
    try:
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        config = PeftConfig.from_pretrained(str(folder))
        tensors = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # whatever bytes these are: JSON, PEFT and safetensors each raise their own
        raise InputError(f"{folder}: not a readable adapter ({type(error).__name__}: {first_line(error)})") from error
    check_facts(folder, facts, FACTS | LORA_FACTS)
    base = load_trained_base(folder, facts, base_name)
    wanted = make_config(base, facts, getattr(config, "use_dora", None) is True)
    theirs, ours = config.to_dict(), wanted.to_dict()
    for key in ours.keys() - UNCHECKED:  # anything else could mean other answers, or break PEFT
        value, expected = (
            sorted(map(str, v)) if isinstance(v, (set, list)) else v for v in (theirs.get(key), ours[key])
        )
        if value != expected:
            raise InputError(f"{folder}: {key}={value!r} in adapter_config.json is not read here; use PEFT itself")
    try:
        model = wrap(base, wanted)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: PEFT refuses its settings ({first_line(error)})") from error
    check_tensors(folder, tensors, get_peft_model_state_dict(model))
    set_peft_model_state_dict(model, tensors)
    return base._replace(model=model.merge_and_unload() if merge else model), facts


def import_scratch(args: argparse.Namespace) -> None:
    """Write a PEFT adapter folder that answers as a handwritten checkpoint does."""
    if args.output.exists():
        raise InputError(f"--output {args.output}: there is something already; name a new folder")
    scratch, checkpoint = load_checkpoint(args.import_scratch, args.model)
    facts = {key: checkpoint[key] for key in (*FACTS, *LORA_FACTS)} | {"record": checkpoint.get("record")}
    base = load_trained_base(args.import_scratch, checkpoint, args.model)
    model = wrap(base, make_config(base, facts))
    for name, tensor in own_names(model.state_dict()).items():
        if name in checkpoint["state_dict"]:
            tensor.copy_(checkpoint["state_dict"][name])
    save_adapter(args.output, model, base, facts)
    report(args, scratch, load_adapter(args.output, args.model)[0])


def export_scratch(args: argparse.Namespace) -> None:
    """Write a handwritten checkpoint that answers as a PEFT adapter folder does."""
    if args.output.suffix != ".pt":
        raise InputError(f"--output {args.output}: give a file name that ends in .pt")
    base, facts = load_adapter(args.export_scratch, args.model)
    others = [path.parent.name for path in args.export_scratch.glob("*/adapter_config.json")]
    if others:
        raise InputError(f"{args.export_scratch}: several adapters ({', '.join(others)}); the .pt format holds one")
    if base.model.peft_config["default"].use_dora:
        raise InputError(f"{args.export_scratch}: the .pt format cannot hold use_dora=True, its magnitude vectors")
    state = trained_tensors(own_names(base.model.state_dict()), base.head)
    save_checkpoint(args.output, state, {key: value for key, value in facts.items() if key != "format"}, base)
    report(args, base, load_checkpoint(args.output, args.model)[0])


def report(args: argparse.Namespace, source: Base, converted: Base) -> None:
    """Say how far the converted model's answers are from the source's."""
    ids = [source.tokenizer(text)["input_ids"] for text in ("A warm, funny film.", "It never ends, and never begins.")]
    logits = [predict(base.model, base.tokenizer.pad_token_id, ids, 2, torch.float32) for base in (source, converted)]
    print(f"saved {args.output}; logits differ by at most {(logits[0] - logits[1]).abs().max().item():.1e}")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "model/lora_peft_distilbert_sst2")
    add = parser.add_argument_group("PEFT").add_argument
    add("--use-dora", action="store_true", help="DoRA, weight-decomposed LoRA, which only PEFT has")
    add("--import-scratch", type=Path, metavar="FILE.pt", help="write a handwritten checkpoint as a folder, then exit")
    add("--export-scratch", type=Path, metavar="FOLDER", help="write an adapter folder as --output FILE.pt, then exit")
    args = parse_flags(parser, argv)
    if args.import_scratch or args.export_scratch:
        return import_scratch(args) if args.import_scratch else export_scratch(args)
    if args.output.is_file():
        raise InputError(f"--output {args.output}: a file stands there; name a folder")
    start(args)
    train_set, eval_set, label_names = load_data(args)
    base = load_base(args.model, args.revision, label_names, args.max_length)
    pad_id = base.tokenizer.pad_token_id
    train_set, eval_set = (tokenize(s, base.tokenizer, args.max_length) for s in (train_set, eval_set))

    wrapped = find_targets(base.model, base.head, args.targets)
    facts = make_facts(args, base, label_names, wrapped)
    args.fingerprint = base.fingerprint  # a resumed run has to have the same base
    cast_base(base, args.dtype)
    model = wrap(base, make_config(base, facts, args.use_dora), args.freeze_head)
    model.to(args.device)
    record = describe(args, own_names(dict(model.named_parameters())), base.head, wrapped)
    record["versions"]["peft"] = peft.__version__

    record["epochs"], losses = train(model, pad_id, train_set, eval_set, args)

    save_adapter(args.output, model, base, facts | {"record": record})
    reloaded, _ = load_adapter(args.output)
    cast_base(reloaded, args.dtype)
    _, confusion = evaluate(reloaded.model.to(args.device), pad_id, eval_set, args)
    size = sum(file.stat().st_size for file in args.output.glob("adapter_*"))
    finish(args, record, losses, confusion, label_names, size)
    tell_how_to_ask(args.output, eval_set.text)


if __name__ == "__main__":
    run(main)
