"""Ask the trained adapters: sentences as arguments, from a file or a pipe, or one by one at a prompt.

    python playground.py "The movie was absolutely fantastic!"      # the adapters of both training scripts answer
    python playground.py                                            # a prompt; exit, Ctrl-D or Ctrl-C leaves
    python playground.py --explain "It is not bad at all."          # which words carried the decision
    python playground.py --file reviews.csv --text-column review --json > answers.jsonl
    cat reviews.txt | python playground.py                          # one sentence a line
    python playground.py --model FILE.pt --glue SST-2.tsv           # GLUE's submission file for the test split
    python playground.py --model FILE.pt --export FOLDER            # for pipeline("text-classification", FOLDER)

FILE.pt, or a folder of lora_peft.py: the answers come from float32 weights with the adapter merged in.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during these slow imports ends the program without a word

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from lora_scratch import (
    FORMATS,
    GLUE,
    Base,
    InputError,
    choose_device,
    first_line,
    load_checkpoint,
    merge_lora,
    number,
    on_terminal,
    predict,
    read_file,
    run,
    use_cache_if_offline,
    write_folder,
    write_whole,
)

TRAINED = [Path("model/lora_scratch_distilbert_sst2.pt"), Path("model/lora_peft_distilbert_sst2")]
DEMOS = [Path("model/lora_scratch_demo.pt"), Path("model/lora_peft_demo")]  # asked where none of the first is there


class Model(NamedTuple):
    name: str  # as the answers call it
    base: Base
    label_names: list[str]
    max_length: int  # tokens; longer text is cut, as in training


def load(name: str, path: Path, base_name: str | None, merged: bool = True) -> Model:
    """A trained model, plain linear layers where `merged`, from a handwritten checkpoint or a folder of PEFT."""
    if path.is_dir():
        from lora_peft import load_adapter  # only here: who has no such folder needs no peft

        base, facts = load_adapter(path, base_name, merged)
    else:
        base, facts = load_checkpoint(path, base_name)
        if merged:
            merge_lora(base.model)
    return Model(name, base, facts["label_names"], facts["max_length"])


def read_texts(args: argparse.Namespace) -> Iterable[str]:
    """The sentences asked about. A text file is opened now, before any model is loaded, and read as it is answered."""
    if args.sentences and not args.file:
        return args.sentences
    if args.file and args.file.suffix.lower() in FORMATS:
        return [*args.sentences, *read_columns(args.file, [args.text_column])[0]]
    try:  # 0 is standard input; only \n ends a line, so that answers match what other tools count as lines
        file = open(args.file or 0, encoding="utf-8-sig", errors="replace", newline="\n")  # noqa: SIM115 - read later
    except OSError as error:
        raise InputError(f"{args.file or 'standard input'}: {error.strerror}; give a file or a sentence") from error
    return itertools.chain(args.sentences, (line.removesuffix("\n").removesuffix("\r") for line in file))


def read_columns(path: Path, columns: list[str]) -> list[list[str]]:
    """Columns of a .tsv, .csv, .jsonl or .parquet file, all of them text."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"--file {path}: give a table that ends in {', '.join(FORMATS)}")
    table = read_file(path)
    for column in columns:
        if column not in table.column_names:
            raise InputError(f"{path}: no column {column!r} but {', '.join(table.column_names)}; see --text-column")
        for i, value in enumerate(table[column], start=1):
            if not isinstance(value, str):
                raise InputError(f"{path}: row {i}: {column!r} is not text but {value!r}")
    return [list(table[column]) for column in columns]


def chunks(texts: Iterable[str], progress: bool) -> Iterator[list[str]]:
    """1,024 texts at a time: enough to sort by length, and a text file of any length takes no more memory."""
    bar = tqdm(texts, unit=" sentences", disable=not progress, delay=1, dynamic_ncols=True)
    whole = (re.sub("[\ud800-\udfff]", "\ufffd", text) for text in bar)  # half characters: an argument that is no UTF-8
    return iter(lambda: list(itertools.islice(whole, 1024)), [])


def read_tokens(texts: list[str], model: Model) -> tuple[list[list[int]], list[bool]]:
    """Token numbers of each text, and whether there were too many."""
    # A whole megabyte can take 7 seconds, so 10,000 characters are tried first. The 100 spare tokens put a word that
    # this cuts in two beyond the limit: BERT's tokenizer makes no word longer.
    encode, limit = model.base.tokenizer, model.max_length
    tried = encode([text[:10_000] for text in texts], truncation=True, max_length=limit + 100)["input_ids"]
    texts = [text[:10_000] if len(ids) == limit + 100 else text for text, ids in zip(texts, tried, strict=True)]
    longer = encode(texts, truncation=True, max_length=limit + 1)["input_ids"]
    return encode(texts, truncation=True, max_length=limit)["input_ids"], [len(ids) > limit for ids in longer]


def logits(model: Model, input_ids: list[list[int]], batch_size: int) -> Tensor:
    """(texts, labels), in float32."""
    return predict(model.base.model, model.base.tokenizer.pad_token_id, input_ids, batch_size, torch.float32)


def classify(model: Model, texts: list[str], args: argparse.Namespace) -> list[dict]:
    """One answer for each text, as --json prints it; a blank text gets the label None."""
    answers = [{"text": text, "label": None, "probabilities": {}, "model": model.name} for text in texts]
    asked = [answer for answer in answers if answer["text"].strip()]
    if not asked:
        return answers
    input_ids, cut = read_tokens([answer["text"] for answer in asked], model)
    rows = logits(model, input_ids, args.batch_size).softmax(dim=1).tolist()
    for answer, row, too_long in zip(asked, rows, cut, strict=True):
        answer["label"] = model.label_names[row.index(max(row))]
        answer["probabilities"] = {name: round(p, 6) for name, p in zip(model.label_names, row, strict=True)}
        answer |= {"cut": True} if too_long else {}
        answer |= {"words": explain(model, answer["text"], args.batch_size)} if args.explain else {}
    return answers


def explain(model: Model, text: str, batch_size: int) -> list[tuple[str, float]]:
    """Each word that the model reads, and how much of the label's probability is lost where it is masked out."""
    words = list(itertools.islice(re.finditer(r"\S+", text), model.max_length))  # more do not fit, at a token a word
    text, mask = text[: words[-1].end()], model.base.tokenizer.mask_token or model.base.tokenizer.unk_token or ""
    input_ids, cut = read_tokens([text] + [text[: w.start()] + mask + text[w.end() :] for w in words], model)
    while cut[0] and len(input_ids) > 1 and input_ids[-1] == input_ids[0]:  # unchanged: that word was cut off
        input_ids.pop()
    whole, *rows = logits(model, input_ids, batch_size).softmax(dim=1)
    effects = [(whole - row)[whole.argmax()].item() for row in rows]
    return [(word.group(), round(effect, 6)) for word, effect in zip(words, effects, strict=False)]


def answer_all(models: list[Model], texts: Iterable[str], args: argparse.Namespace, headed: bool) -> None:
    """Print every model's answer to each text, in the order given; under the text itself where `headed`."""
    width, indent = max(len(model.name) for model in models), "  " * headed
    for chunk in chunks(texts, progress=on_terminal() and not sys.stdout.isatty()):  # or the answers show it
        for answers in zip(*(classify(model, chunk, args) for model in models), strict=True):
            if args.json:
                print(*map(json.dumps, answers), sep="\n")
                continue
            if headed:
                print(visible(answers[0]["text"]))
            for model, answer in zip(models, answers, strict=True):
                print(f"{indent}{model.name:{width}}  {in_words(answer, model)}")
        sys.stdout.flush()


def in_words(answer: dict, model: Model) -> str:
    """Label and probability; below them each word's effect in percentage points, on a terminal in green or red."""
    if answer["label"] is None:
        return "(blank)"
    label, width = visible(answer["label"]), max(map(len, model.label_names))
    note = f"  (cut to {model.max_length} tokens)" if "cut" in answer else ""
    line = f"{label[:1].upper() + label[1:]:{width}}  {100 * max(answer['probabilities'].values()):.1f} %{note}"
    words = []
    for word, effect in answer.get("words", []):
        words.append(f"{visible(word, 40)} {100 * effect:+z.1f}")
        if sys.stdout.isatty() and abs(effect) >= 0.01:
            words[-1] = f"\033[{32 if effect > 0 else 31}m{words[-1]}\033[0m"
    return f"{line}\n    {'  '.join(words)}" if words else line


def visible(text: str, width: int = 200) -> str:
    """Text on one line of a terminal, to which control characters could do anything."""
    shown = "".join(c if c.isprintable() else "\ufffd" for c in text[: width + 1])
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def prompt(models: list[Model], args: argparse.Namespace) -> None:
    """Ask for sentences until the user has enough."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - its presence gives input() a history and the arrow keys
    sys.stdin.reconfigure(errors="replace")
    print("Type a sentence; exit, Ctrl-D or Ctrl-C leaves.", file=sys.stderr)
    try:
        while (text := input("> " if sys.stdout.isatty() else "")).strip().lower() != "exit":
            if text.strip():
                answer_all(models, [text], args, headed=False)
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)  # the shell's own prompt starts a line


def write_glue(model: Model, args: argparse.Namespace) -> None:
    """GLUE's submission file for SST-2, whose test split has no public labels."""
    if len(model.label_names) != 2:
        raise InputError(f"--glue: SST-2 has 2 labels, but this model {len(model.label_names)}; choose another")
    if args.file:
        index, texts = read_columns(args.file, ["index", args.text_column])
    else:
        use_cache_if_offline()
        try:
            table = datasets.load_dataset(GLUE[0], GLUE[1], revision=GLUE[2], split="test")
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            raise InputError(f"no Hub ({first_line(error)}): give index<TAB>sentence with --file") from error
        index, texts = table["idx"], table["sentence"]
    predictions = []
    for chunk in chunks(texts, progress=on_terminal()):
        predictions += logits(model, read_tokens(chunk, model)[0], args.batch_size).argmax(dim=1).tolist()
    rows = "".join(f"{i}\t{prediction}\n" for i, prediction in zip(index, predictions, strict=True))
    write_whole(args.glue, lambda temporary: temporary.write_text("index\tprediction\n" + rows, encoding="utf-8"))
    print(f"wrote {len(predictions):,} predictions to {args.glue}")


def export(path: Path, args: argparse.Namespace) -> None:
    """Write the merged model as a plain Hugging Face folder, read back and compared before it gets its name."""
    unmerged, merged = (load("", path, args.base, merged) for merged in (False, True))
    tokenizer, network, folder = merged.base.tokenizer, merged.base.model, args.export.resolve()
    input_ids, _ = read_tokens(["A warm, funny film.", "It never ends.", "so long " * merged.max_length], merged)
    tokenizer.model_max_length = merged.max_length
    differences = []

    def write(temporary: Path) -> None:
        network.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        written = AutoModelForSequenceClassification.from_pretrained(temporary, dtype=torch.float32)
        written = merged._replace(base=merged.base._replace(model=written))
        differences.append((logits(written, input_ids, 1) - logits(unmerged, input_ids, 1)).abs().max().item())
        if not differences[0] <= 1e-4:  # NaN is no small difference either
            raise InputError(f"--export: merged and unmerged logits differ by {differences[0]:.1e}; nothing is written")

    write_folder(folder, write)
    print(f"saved {folder}; merged and unmerged logits differ by at most {differences[0]:.1e}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("sentences", nargs="*", metavar="SENTENCE", help="what to judge (default: standard input, or a prompt)")
    add("--model", type=Path, action="append", metavar="PATH", help="may be repeated (default: what training wrote)")
    add("--base", metavar="PATH", help="where the base model lies (default: where it lay in training)")
    add("--file", type=Path, help=f"sentences: one a line, or a table ({', '.join(FORMATS)})")
    add("--text-column", default="sentence", help="of a table (default: %(default)s)")
    add("--batch-size", type=number(int, 1), default=32, help="sentences at a time (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object a line and nothing else (default: off)")
    add("--explain", action="store_true", help="show what each word does to the probability (default: off)")
    add("--glue", type=Path, metavar="FILE", help="write GLUE's SST-2 submission to it, then exit (default: off)")
    add("--export", type=Path, metavar="FOLDER", help="write the merged model, then exit (default: off)")
    args = parser.parse_args(argv)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # a parser's error is told once, as InputError
    if sum(map(bool, (args.sentences, args.glue, args.export))) > 1 or (args.export and args.file):
        raise InputError("--glue goes with --file alone, --export with neither; leave the rest out")
    paths = args.model or [p for p in TRAINED if p.exists()] or [p for p in DEMOS if p.exists()]
    if not paths:
        raise InputError("no adapter in model/ yet: python lora_scratch.py makes one, with --demo in a minute")
    if (args.glue or args.export) and len(paths) > 1:
        raise InputError(f"--glue and --export take one model; choose with --model among {', '.join(map(str, paths))}")
    if args.glue and args.file and args.glue.absolute() == args.file.absolute():
        raise InputError(f"--glue {args.glue}: that is the file with the sentences; name another to write to")
    if args.export and any(args.export.glob("*")):
        raise InputError(f"--export {args.export}: that folder has files in it; name a new one")
    if args.export:
        return export(paths[0], args)
    ask = not (args.sentences or args.file or args.glue) and sys.stdin is not None and sys.stdin.isatty()
    texts = [] if ask or args.glue else read_texts(args)
    kinds = ["LoRA_peft" if path.is_dir() else "LoRA_scratch" for path in paths]
    names = [kind if kinds.count(kind) == 1 else str(path) for kind, path in zip(kinds, paths, strict=True)]
    models = [load(name, path, args.base) for name, path in zip(names, paths, strict=True)]
    for model in models:
        model.base.model.to(choose_device("auto"))
    if args.glue:
        write_glue(models[0], args)
    elif ask:
        prompt(models, args)
    else:
        answer_all(models, texts, args, headed=len(args.sentences) != 1 or args.file is not None)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run(main)
        sys.stdout.flush()
    except BrokenPipeError:  # a reader that has enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at the end
        sys.exit(141)
