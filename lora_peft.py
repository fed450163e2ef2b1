"""The experiment of lora_scratch.py through Hugging Face PEFT, and the way between the two formats.

Data, loop, schedule and record are imported from lora_scratch.py: every line here is about what PEFT
replaces, that is building, saving, loading and converting. Given PEFT's initial tensors, both scripts
train alike.

    python lora_peft.py                                  # as lora_scratch.py, with the same flags
    python lora_peft.py --use-dora                       # a variant that only PEFT has
    python lora_peft.py --import-scratch FILE.pt --output FOLDER    # handwritten checkpoint → adapter
    python lora_peft.py --export-scratch FOLDER --output FILE.pt    # and back, bit for bit

The result is an adapter folder that PEFT loads without this project: see the README.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports ends it without a word
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait sleep soon, for a busy machine

import peft
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
    Base,
    InputError,
    Table,
    TrainingState,
    adapter_facts,
    calibrate,
    cast_base,
    cheapen_dropout,
    check_facts,
    check_output,
    check_tensors,
    choose_recipe,
    count_parameters,
    data_facts,
    describe,
    evaluate,
    find_targets,
    last_name,
    leave,
    leave_group,
    load_base,
    load_checkpoint,
    load_tables,
    load_trained_base,
    make_parser,
    make_record,
    parse_flags,
    predict,
    prepare_machine,
    reason,
    replace_ending,
    run,
    save_checkpoint,
    tell_how_to_ask,
    tensors_to_save,
    tokenize,
    train,
    write_folder,
    write_record,
)

FACTS_FILE = "lora_peft.json"  # in the adapter folder: the fingerprint and the label names, for example
TENSORS_FILE = "adapter_model.safetensors"
UNCHECKED = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "modules_to_save"}


# === The adapter ================================================================================


def make_config(base: Base, facts: dict, use_dora: bool = False) -> LoraConfig:
    """PEFT's configuration for the same adapter. The head is named whole: PEFT's guess matches by suffix."""
    head_layers = sorted({name.rpartition(".")[0] for name in base.head})
    wrapped = find_targets(base.model, base.head, facts["targets"])
    paths = [path for path, _ in base.model.named_modules()]
    namesakes = [path for path in paths if last_name(path) in facts["targets"] and path not in head_layers]
    return LoraConfig(
        task_type=TaskType.SEQ_CLS,
        base_model_name_or_path=facts["base"],
        revision=facts["revision"],
        r=facts["r"],
        lora_alpha=facts["alpha"],
        lora_dropout=facts["dropout"],
        use_rslora=facts["use_rslora"],
        use_dora=use_dora,
        target_modules=facts["targets"] if namesakes == wrapped else wrapped,  # no layer of another kind
        exclude_modules=head_layers,  # a target such as BERT's "dense" must not reach into the head
        modules_to_save=outermost(base),  # trained and saved in full; frozen below, saved all the same
    )


def outermost(base: Base) -> list[str]:
    """The largest modules with nothing but the head in them: PEFT wraps each, and may not wrap within one."""
    names = [name for name, _ in base.model.named_parameters()]
    modules = set()
    for name in base.head:
        parts = name.split(".")
        for length in range(1, len(parts)):
            path = ".".join(parts[:length])
            if all(name in base.head for name in names if name.startswith(f"{path}.")):
                modules.add(path)
                break
    return sorted(modules)


def wrap(base: Base, config: LoraConfig, freeze_head: bool = False) -> PeftModel:
    """The base with PEFT's adapter in it; the head is trained unless frozen."""
    # The base may have moved, which is checked; PEFT 0.21 asks transformers 5 for an attribute's former name.
    warnings.filterwarnings("ignore", "The PEFT config's `base_model_name_or_path` was renamed", UserWarning)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    model = get_peft_model(base.model, config)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.requires_grad_(not freeze_head)
    return model


def own_names(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's tensors under the names of lora_scratch.py, without its spare copy of the untrained head."""
    return {own_name(name): tensor for name, tensor in named.items() if ".original_module." not in name}


def own_name(name: str) -> str:
    """base_model.model.X.q_lin.lora_A.default.weight → X.q_lin.lora_A, and likewise for head and base."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
    return re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1", name)


# === The run ====================================================================================


def main(argv: list[str] | None = None) -> int | None:
    parser = make_parser(__doc__, "model/lora_peft_distilbert_sst2")
    add_flags(parser)
    if parser.parse_args(argv).import_scratch or parser.parse_args(argv).export_scratch:
        return convert(parser.parse_args(argv))
    args = parse_flags(parser, argv)
    check_output(args, is_file=False)
    device, dtype = prepare_machine(args)

    train_table, eval_table, label_names = load_tables(args)
    choose_recipe(args, len(train_table.text), len(label_names))
    base = load_base(args.model, args.revision, label_names, args.max_length)
    train_set = tokenize(train_table, base.tokenizer, args.max_length)
    eval_set = tokenize(eval_table, base.tokenizer, args.max_length)

    wrapped = find_targets(base.model, base.head, args.targets)
    facts = adapter_facts(args, base, label_names, wrapped)
    cast_base(base, dtype)
    model = wrap(base, make_config(base, facts, args.use_dora), args.freeze_head).to(device)
    cheapen_dropout(model)
    counts = count_parameters(own_names(dict(model.named_parameters())), base.head)
    describe(args, counts, wrapped, dtype)

    state = TrainingState(args, model, facts | data_facts(train_set, eval_set), dtype)
    train(model, train_set, eval_set, args, state)
    if not leave_group() or state.stopped:
        return leave(state)

    temperature = calibrate(model, eval_set, args)
    record = make_record(args, counts, dtype, state) | {"temperature": temperature}
    record["versions"]["peft"] = peft.__version__
    save_adapter(args.output, model, base, facts | {"record": record})
    reloaded, _ = load_adapter(args.output)
    cast_base(reloaded, dtype)
    _, confusion = evaluate(reloaded.model.to(device), eval_set, args.eval_batch_size)
    size = sum(file.stat().st_size for file in args.output.glob("adapter_*"))
    write_record(args, record, confusion, label_names, size)
    tell_how_to_ask(args.output, eval_table.text)


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("PEFT").add_argument
    add("--use-dora", action="store_true", help="DoRA, weight-decomposed LoRA, which only PEFT has")
    help = "write a handwritten checkpoint as a folder, then exit"
    add("--import-scratch", type=Path, metavar="FILE.pt", help=help)
    help = "write an adapter folder as --output FILE.pt, then exit"
    add("--export-scratch", type=Path, metavar="FOLDER", help=help)


# === Files ======================================================================================


def save_adapter(folder: Path, model: PeftModel, base: Base, facts: dict) -> None:
    """A standard adapter folder with the tokenizer and our facts."""

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary)
        (temporary / "README.md").unlink(missing_ok=True)  # a form to fill in, over one of the user's
        base.tokenizer.save_pretrained(temporary)
        written = {"format": FORMAT, **facts, "tensors": sha256_of(temporary / TENSORS_FILE)}
        (temporary / FACTS_FILE).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")

    write_folder(folder, write, last=FACTS_FILE)


def sha256_of(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def load_adapter(
    folder: str | Path, base_name: str | None = None, merge: bool = False, load: Callable | None = None
) -> tuple[Base, dict]:
    """Rebuild a trained model in float32, on the CPU, from an adapter folder of this script and its base.

    The model of the returned Base is a PeftModel, or the plain merged model where `merge`. `base_name`
    says where the base lies when the folder's own name for it does not, and `load` how to get it; a base
    that others share must not be merged, which writes into it. Raises InputError for a folder
    that is no adapter, for tensors missing, left over, misshapen or not finite, and for another base.
    """
    folder = Path(folder)
    facts, config, tensors = read_adapter(folder)
    base = load_trained_base(folder, facts, base_name, load)
    wanted = make_config(base, facts, getattr(config, "use_dora", None) is True)
    check_config(folder, config.to_dict(), wanted.to_dict())
    try:
        model = wrap(base, wanted)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: PEFT refuses its settings ({reason(error)})") from error
    check_tensors(folder, tensors, get_peft_model_state_dict(model))
    set_peft_model_state_dict(model, tensors)
    return replace(base, model=model.merge_and_unload() if merge else model), facts


def read_adapter(folder: Path) -> tuple[dict, PeftConfig, dict[str, Tensor]]:
    """Our facts, PEFT's configuration and the tensors of an adapter folder."""
    for name in (FACTS_FILE, "adapter_config.json", TENSORS_FILE):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: not an adapter folder of lora_peft.py, it has no {name}")
    try:
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        config = PeftConfig.from_pretrained(str(folder))
        tensors = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # whatever bytes these are: JSON, PEFT and safetensors each raise their own
        what = f"not a readable adapter ({type(error).__name__}: {reason(error)})"
        raise InputError(f"{folder}: {what}") from error
    check_facts(folder, facts, FACTS)
    if facts.get("tensors", then := sha256_of(folder / TENSORS_FILE)) != then:
        what = f"{TENSORS_FILE} is not the one that {FACTS_FILE} was written with"
        raise InputError(f"{folder}: {what}: a run was interrupted while it saved; train or copy it again")
    return facts, config, tensors


def check_config(folder: Path, found: dict, expected: dict) -> None:
    """Raise InputError for a setting that this project does not write: it could mean other answers."""
    for key in expected.keys() - UNCHECKED:
        if plain(found.get(key)) != plain(expected[key]):
            what = f"{key}={plain(found.get(key))!r} in adapter_config.json is not read here"
            raise InputError(f"{folder}: {what}; use PEFT itself")


def plain(value: object) -> object:
    """A set or list in one order, anything else as it is."""
    return sorted(map(str, value)) if isinstance(value, (set, list)) else value


# === Conversion =================================================================================


def convert(args: argparse.Namespace) -> None:
    """One of the two conversions; raises InputError where something stands at the output."""
    if args.import_scratch and args.export_scratch:
        raise InputError("--import-scratch and --export-scratch: one at a time")
    for path in (args.output, replace_ending(args.output, "")):
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            what = f"there is something already at {path}"
            raise InputError(f"--output {args.output}: {what}; name a new place")
    check_output(args, is_file=bool(args.export_scratch))
    if args.import_scratch:
        import_scratch(args)
    else:
        export_scratch(args)


def import_scratch(args: argparse.Namespace) -> None:
    """Write a PEFT adapter folder that answers as a handwritten checkpoint does."""
    scratch, checkpoint = load_checkpoint(args.import_scratch, args.model)
    facts = {key: value for key, value in checkpoint.items() if key not in ("format", "state_dict")}
    try:
        json.dumps(facts)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{args.import_scratch}: its record is none ({reason(error)})") from error
    check_answers(args.import_scratch, scratch)
    base = load_trained_base(args.import_scratch, checkpoint, args.model)
    model = wrap(base, make_config(base, facts))
    for name, tensor in own_names(model.state_dict()).items():
        if name in checkpoint["state_dict"]:
            tensor.copy_(checkpoint["state_dict"][name])
    save_adapter(args.output, model, base, facts)
    compare_logits(args, scratch, load_adapter(args.output, args.model)[0])


def export_scratch(args: argparse.Namespace) -> None:
    """Write a handwritten checkpoint that answers as a PEFT adapter folder does."""
    base, facts = load_adapter(args.export_scratch, args.model)
    others = [path.parent.name for path in args.export_scratch.glob("*/adapter_config.json")]
    if others:
        what = f"several adapters ({', '.join(others)})"
        raise InputError(f"{args.export_scratch}: {what}; the .pt format holds one")
    if base.model.peft_config["default"].use_dora:
        what = "the .pt format cannot hold use_dora=True, its magnitude vectors"
        raise InputError(f"{args.export_scratch}: {what}")
    check_answers(args.export_scratch, base)
    tensors = tensors_to_save(own_names(base.model.state_dict()), base.head)
    facts = {key: value for key, value in facts.items() if key not in ("format", "tensors")}
    save_checkpoint(args.output, tensors, facts, base.tokenizer)
    compare_logits(args, base, load_checkpoint(args.output, args.model)[0])


def two_answers(base: Base) -> Tensor:
    """The logits of two sentences."""
    texts = Table(["A warm, funny film.", "It never ends, and never begins."], [0, 0])
    return predict(base.model, tokenize(texts, base.tokenizer, 16), 2)


def check_answers(path: Path, base: Base) -> None:
    """Raise InputError for a model that has no answers to convert."""
    if not two_answers(base).isfinite().all():
        raise InputError(f"{path}: its answers are not finite; its tensors or its alpha are too large")


def compare_logits(args: argparse.Namespace, source: Base, converted: Base) -> None:
    """Print how far the converted model's answers are from the source's."""
    difference = (two_answers(source) - two_answers(converted)).abs().max().item()
    print(f"saved {args.output}; logits differ by at most {difference:.1e}")


if __name__ == "__main__":
    run(main)
