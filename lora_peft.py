"""The experiment of lora_scratch.py through Hugging Face PEFT, and a converter.

Data, loop, schedule and record are imported from lora_scratch.py: here is what PEFT replaces,
building, saving and loading. From the same tensors both scripts train alike.

    python lora_peft.py                # as lora_scratch.py, with the same flags
    python lora_peft.py --use-dora     # a variant that only PEFT has
    python lora_peft.py --import-scratch FILE.pt --output FOLDER    # a checkpoint → an adapter
    python lora_peft.py --export-scratch FOLDER --output FILE.pt    # and back, bit for bit

PEFT loads the folder that it writes without this project.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

# isort: off
# Before PyTorch: it sets how its threads wait.
from lora_scratch import Base, InputError, cross_validate, find_targets, load_base, predict
from lora_scratch import TrainingState, calibrate, describe, finish, run, speed_up, train
from lora_scratch import check_output, choose_recipe, make_parser, parse_flags, prepare_machine
from lora_scratch import adapter_facts, find_trained_base, load_tables
from lora_scratch import tensors_to_save, tokenize
from lora_scratch import FORMAT, check_facts, copy_all, load_checkpoint, save_checkpoint
from lora_scratch import refusing, seen_from, seen_from_here, write_folder

# isort: on

if not find_spec("peft"):
    ArgumentParser().exit(2, "error: peft missing; run ./setup.sh, then source .venv/bin/activate\n")
import peft
import torch
from torch import Tensor

FACTS_FILE = "lora_peft.json"  # what a checkpoint says beside its tensors
TENSORS_FILE = "adapter_model.safetensors"
MAY_DIFFER = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "modules_to_save")


# === The adapter ====================================================


def make_config(base: Base, facts: dict, use_dora: bool = False) -> peft.LoraConfig:
    """PEFT's configuration of the same adapter; by itself it matches names by suffix."""
    head_layers = sorted({name.rpartition(".")[0] for name in base.head})
    wrapped = find_targets(base.model, base.head, facts["targets"], facts.get("layers"))
    paths = [path for path, _ in base.model.named_modules() if path not in head_layers]
    name = os.path.abspath(facts["base"]) if os.path.exists(facts["base"]) else facts["base"]
    namesakes = [path for path in paths if path.split(".")[-1] in facts["targets"]]
    return peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        base_model_name_or_path=name,
        revision=facts["revision"],
        r=facts["r"],
        lora_alpha=facts["alpha"],
        lora_dropout=facts["dropout"],
        use_rslora=facts["use_rslora"],
        use_dora=use_dora,
        target_modules=facts["targets"] if namesakes == wrapped else wrapped,  # all of them linear
        exclude_modules=head_layers,  # a target such as BERT's "dense" may be there, too
        modules_to_save=sorted({re.match(r".*\.pooler|[^.]+", name)[0] for name in base.head}),
    )


def wrap(base: Base, config: peft.LoraConfig, train_head: bool = True) -> peft.PeftModel:
    """PEFT's model around the base, into which it has put its layers."""
    renamed = "The PEFT config's `base_model_name_or_path` was renamed"
    warnings.filterwarnings("ignore", renamed, UserWarning)  # the base may have moved
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    model = peft.get_peft_model(base.model, config)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.requires_grad_(train_head)
    return model


def own_names(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by lora_scratch.py's names: X.lora_A.default.weight is X.lora_A."""
    ours = {}
    for name, tensor in named.items():
        name = name.replace(".modules_to_save.default.", ".")
        name = re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1", name)
        if ".original_module." not in name:  # PEFT's copy of the untrained head
            ours[name] = tensor
    return ours


# === The run ========================================================


def fit(args: Namespace, machine, about: dict, train_rows, eval_rows) -> tuple[Base, TrainingState]:
    """Train an adapter on some rows; judge every epoch by others."""
    device, dtype = machine
    torch.manual_seed(args.seed)
    base = load_base(args.model, args.revision, about["label_names"], args.max_length)
    train_set = tokenize(train_rows["text"], base.tokenizer, args.max_length, train_rows["label"])
    eval_set = tokenize(eval_rows["text"], base.tokenizer, args.max_length, eval_rows["label"])

    wrapped = find_targets(base.model, base.head, args.targets, args.layers)
    facts = adapter_facts(args, base, about, wrapped)
    adapter = wrap(base, make_config(base, facts, args.use_dora), not args.freeze_head)
    model = speed_up(base, dtype).to(device)  # with PEFT's layers in it
    record = describe(args, own_names(dict(model.named_parameters())), base.head, wrapped, dtype)
    record["versions"]["peft"] = peft.__version__

    state = TrainingState(args, model, facts, record, train_set, eval_set)
    train(model, train_set, eval_set, args, state)
    return replace(base, model=adapter), state


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "model/lora_peft_{}")
    add = parser.add_argument_group("PEFT").add_argument
    add("--use-dora", action="store_true", help="weight-decomposed LoRA, with PEFT alone")
    add("--import-scratch", type=Path, metavar="FILE.pt", help="write it as a folder and exit")
    add("--export-scratch", type=Path, metavar="FOLDER", help="write it as a .pt file and exit")
    args = parser.parse_args(argv)
    if args.import_scratch or args.export_scratch:
        return convert(args)
    args = parse_flags(parser, argv)
    check_output(args, is_file=False)
    device, dtype = machine = prepare_machine(args)
    train_rows, eval_rows, about = load_tables(args)
    args = choose_recipe(args, len(train_rows), len(about["labels"]))
    unseen = cross_validate(fit, args, machine, about, train_rows) if args.folds else None

    base, state = fit(args, machine, about, train_rows, eval_rows)
    rows, logits = unseen or (eval_rows, predict(state.model, state.eval_set, 32))
    state.record |= calibrate(state.model, logits, rows["label"])
    save_adapter(args.output, base, state.facts | {"record": state.record})
    reloaded, _ = load_adapter(args.output)
    model = speed_up(reloaded, dtype).to(device)
    finish(args, state.record, about, *(unseen or (eval_rows, predict(model, state.eval_set, 32))))


# === Files ==========================================================


def save_adapter(folder: Path, adapter: Base, facts: dict) -> None:
    """A standard adapter folder with the tokenizer and our facts."""

    def write(temporary: Path) -> None:
        adapter.model.save_pretrained(temporary, save_embedding_layers=False)
        (temporary / "README.md").unlink(missing_ok=True)  # a mere form
        adapter.tokenizer.model_max_length = facts["max_length"]
        adapter.tokenizer.save_pretrained(temporary)
        written = seen_from(folder, facts) | {"format": FORMAT, "tensors": digest_of(temporary)}
        text = json.dumps(written, indent=1)
        (temporary / FACTS_FILE).write_text(text, encoding="utf-8")

    write_folder(folder, write, last=FACTS_FILE)


def digest_of(folder: Path) -> str:
    return sha256((folder / TENSORS_FILE).read_bytes()).hexdigest()


def load_adapter(folder: str | Path, base_name: str | None = None, merge=False) -> tuple[Base, dict]:
    """The trained model of an adapter folder in float32, on the CPU, and its facts.

    It has PEFT's layers in it, or is a plain one where `merge`. `base_name` says where its base is
    now. Raises InputError for a folder that is no adapter, another base, settings that are not
    written here, or tensors that do not fit.
    """
    folder = Path(folder)
    with refusing(f"{folder}: not an adapter folder of lora_peft.py", "train or copy it again"):
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        facts = seen_from_here(folder, facts)
        with warnings.catch_warnings(action="error", category=UserWarning):
            found = peft.PeftConfig.from_pretrained(str(folder))
        tensors = peft.load_peft_weights(str(folder), device="cpu")
        if facts.get("tensors", digest_of(folder)) != digest_of(folder):
            raise ValueError("a run was interrupted while it saved these tensors")
        check_facts(facts, tensors)
        base = find_trained_base(facts, base_name)
        config = make_config(base, facts, getattr(found, "use_dora", None) is True)
        settings, wanted = plain(found), plain(config)
        for key, value in wanted.items():  # first of all the method
            if settings.get(key) != value and key not in MAY_DIFFER:
                raise ValueError(f"{key}={settings.get(key)!r} is not supported; use PEFT itself")
        adapter = wrap(base, config)
        own = peft.get_peft_model_state_dict(adapter, save_embedding_layers=False)  # "auto" asks the Hub
        copy_all(tensors, own)
    model = adapter.merge_and_unload() if merge else base.model
    return replace(base, model=model.eval()), facts


def plain(config: peft.PeftConfig) -> dict:
    """PEFT's settings, sets and lists in order."""
    several = {k: v for k, v in vars(config).items() if isinstance(v, (set, list))}
    return config.to_dict() | {k: sorted(map(str, v)) for k, v in several.items()}


# === Conversion =====================================================


def convert(args: Namespace) -> None:
    """Write a checkpoint as an adapter folder, or the other way round."""
    if args.import_scratch and args.export_scratch:
        raise InputError("--import-scratch and --export-scratch: one at a time")
    if args.output is None or args.output.exists():
        raise InputError(f"--output {args.output or ''}: name a new place for the result")
    args.data = ""  # a new result replaces none
    check_output(args, is_file=args.import_scratch is None)
    if args.import_scratch:
        source, facts = load_checkpoint(args.import_scratch, args.model)
        tensors = facts.pop("state_dict")
        answers = two_answers(args.import_scratch, source)
        base = find_trained_base(facts, args.model)
        adapter = wrap(base, make_config(base, facts))
        copy_all(tensors, tensors_to_save(own_names(base.model.state_dict()), base.head))
        save_adapter(args.output, replace(base, model=adapter), facts)
        converted, _ = load_adapter(args.output, args.model)
    else:
        source, facts = load_adapter(args.export_scratch, args.model)
        state = source.model.state_dict()
        several = any(args.export_scratch.glob("*/adapter_config.json"))
        if several or any("lora_magnitude" in name for name in state):
            what = "several adapters" if several else "use_dora=True"
            raise InputError(f"{args.export_scratch}: a .pt file cannot hold {what}; use PEFT")
        answers = two_answers(args.export_scratch, source)
        tensors = tensors_to_save(own_names(state), source.head)
        facts.pop("tensors", None)
        save_checkpoint(args.output, tensors, facts, source.tokenizer)
        converted, _ = load_checkpoint(args.output, args.model)
    difference = (answers - two_answers(args.output, converted)).abs().max().item()
    print(f"saved {args.output}; logits differ by at most {difference:.1e}")


def two_answers(path: Path, base: Base) -> Tensor:
    """The logits of two sentences; raises InputError where they are not finite."""
    texts = ["A warm, funny film.", "It never ends, and never begins."]
    answers = predict(base.model, tokenize(texts, base.tokenizer, 16), 2)
    if not answers.isfinite().all():
        raise InputError(f"{path}: its answers are not finite; train it again")
    return answers


if __name__ == "__main__":
    run(main)
