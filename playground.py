"""Ask the trained adapters: sentences as arguments, from a file or a pipe, or one by one at a prompt.

    python playground.py "The movie was absolutely fantastic!"    # what both training scripts wrote answers
    python playground.py                                          # a prompt; exit, Ctrl-D or Ctrl-C leaves
    python playground.py --explain "It is not bad at all."        # which words carried the decision
    cat reviews.txt | python playground.py                        # one sentence a line
    python playground.py --file reviews.csv --output answers.csv  # the same table, with the answers beside it
    python playground.py --file test.csv --label-column about     # how often it is right, its surest mistakes
    python playground.py --model a.pt --model b.pt --file test.csv --label-column about    # which is better
    python playground.py --web                                    # a page on this machine
    python playground.py --model FILE.pt --glue SST-2.tsv         # GLUE's submission for the test split
    python playground.py --model FILE.pt --export FOLDER       # for pipeline("text-classification", FOLDER)

FILE.pt, or a folder of lora_peft.py. One model answers from float32 weights with its adapter merged in;
several keep their adapters beside weights that those on the same base share.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports ends it without a word

import argparse
import contextlib
import copy
import csv
import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait sleep soon, for a busy machine

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from lora_scratch import (
    FORMATS,
    GLUE,
    TEXT_NAMES,
    Base,
    InputError,
    Parser,
    Tokens,
    as_labels,
    between,
    check_text,
    check_tokenizer,
    choose_column,
    choose_device,
    compute_cls_only,
    count_pairs,
    in_words,
    is_blank,
    label_report,
    listed,
    load_base,
    load_checkpoint,
    load_tables,
    macro_f1,
    merge_lora,
    note,
    on_terminal,
    predict,
    probe_place,
    read_columns,
    read_file,
    reason,
    run,
    use_cache_if_offline,
    visible,
    wilson_interval,
    without_fractions,
    write_file,
    write_folder,
)

TRAINED = [Path("model/lora_scratch_distilbert_sst2.pt"), Path("model/lora_peft_distilbert_sst2")]
DEMOS = [
    Path("model/lora_scratch_demo.pt"),
    Path("model/lora_peft_demo"),
]  # asked where none of the first is there


UNSURE = "unsure"  # the answer below --unsure
ANSWERS = (".csv", ".tsv", ".jsonl", ".parquet")  # the endings of --output


class Model(NamedTuple):
    name: str  # as the answers call it
    path: Path
    base: Base
    label_names: list[str]
    max_length: int  # tokens; longer text is cut, as in training
    facts: dict  # what its file says beside the tensors


def load_all(paths: list[Path], base_name: str | None) -> list[Model]:
    """The trained models; each is merged where it is alone, and on a shared base where there are several."""
    kinds = ["LoRA_peft" if path.is_dir() else "LoRA_scratch" for path in paths]
    names = [kind if kinds.count(kind) == 1 else str(path) for kind, path in zip(kinds, paths, strict=True)]
    if len(paths) == 1:
        models = [load(names[0], paths[0], base_name)]
    else:
        get_base = shared_bases()
        models = [load(*one, base_name, False, get_base) for one in zip(names, paths, strict=True)]
    for model in models:
        model.base.model.to(choose_device("auto"))
    return models


def load(
    name: str, path: Path, base_name: str | None, merged: bool = True, get_base: Callable | None = None
) -> Model:
    """A trained model from a handwritten checkpoint or a folder of PEFT; plain layers where `merged`."""
    if path.is_dir():
        from lora_peft import load_adapter  # only here: who has no such folder needs no peft

        base, facts = load_adapter(path, base_name, merged, get_base)
    else:
        base, facts = load_checkpoint(path, base_name, get_base)
        if merged:
            merge_lora(base.model)
    return Model(name, path, base, facts["label_names"], facts["max_length"], facts)


def shared_bases() -> Callable:
    """A load_base that reads each base once: models on it have a head of their own and share the rest."""
    bases = {}

    def get_base(name: str, revision: str | None, label_names: list[str], max_length: int) -> Base:
        key = (os.path.realpath(name) if Path(name).is_dir() else name, revision)
        if key not in bases:
            bases[key] = load_base(name, revision, label_names, max_length)
        check_tokenizer(name, bases[key].model, bases[key].tokenizer, max_length)
        return with_head(bases[key], label_names)

    return get_base


def with_head(base: Base, label_names: list[str]) -> Base:
    """The same encoder, its frozen tensors shared and not copied, under an empty head for other labels."""
    config = copy.deepcopy(base.model.config)
    config.id2label = dict(enumerate(label_names))
    config.label2id = {label: i for i, label in enumerate(label_names)}
    with torch.device("meta"):  # without memory
        model = type(base.model)(config)
    frozen = {id(p): p for name, p in base.model.named_parameters() if name not in base.head}
    for name, module in model.named_children():
        if name == model.base_model_prefix:
            setattr(model, name, copy.deepcopy(base.model.base_model, frozen))
        else:
            module.to_empty(device="cpu")
    compute_cls_only(model)  # on layers of its own
    return replace(base, model=model.eval())


def read_texts(args: argparse.Namespace, table) -> Iterable[str]:
    """The sentences asked about. A text file is opened now, before any model is loaded, and read later."""
    if table is not None:
        return [*args.sentences, *texts_of(args, table)]
    if args.sentences and not args.file:
        return args.sentences
    if not args.file and sys.stdin is None:
        raise InputError("standard input is closed; give a sentence or a --file")
    try:
        stream = open(args.file, "rb") if args.file else sys.stdin.buffer  # noqa: SIM115 - read later
    except OSError as error:
        raise InputError(f"{args.file}: {error.strerror}; give a file or a sentence") from error
    return itertools.chain(args.sentences, read_lines(args.file or "standard input", stream))


def read_lines(name: str | Path, stream: io.BufferedReader) -> Iterator[str]:
    """Its lines as text; only \n ends one, so that answers match what other tools count as lines.

    A byte-order mark decides, else it is UTF-8; a line that is not is read as Windows-1252, with a note.
    """
    if stream.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
        lines = io.TextIOWrapper(stream, "utf-16", errors="replace", newline="\n")
    else:
        lines = decode_lines(name, stream)
    for line in lines:
        yield line.removesuffix("\n").removesuffix("\r")


def decode_lines(name: str | Path, stream: io.BufferedReader) -> Iterator[str]:
    told = False
    for number, line in enumerate(stream, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            text = line.decode("cp1252", errors="replace")
            if not told:
                note(f"{name}: line {number} is not UTF-8; read as Windows-1252: is that right?")
            told = True
        yield text


def is_table(path: Path | None) -> bool:
    return path is not None and path.suffix.lower() in FORMATS


def texts_of(args: argparse.Namespace, table, *more: str) -> list:
    """The texts of a table, or these and the values of more columns."""
    names = [name for name in table.columns if name not in more and not name.startswith("Unnamed:")]
    column = args.text_column or choose_column(str(args.file), table, "text", names, TEXT_NAMES)
    if not args.text_column and len(column) > 40:
        what = f"its first row looks like data and not like names of columns: {listed(names)}"
        raise InputError(f"{args.file}: {what}; put a row of names above it")
    if not args.text_column and column.lower() not in TEXT_NAMES.split():
        note(f"{args.file}: {column!r} is taken for the text")
    texts, *others = read_columns(args.file, table, [column, *more])
    for i, text in enumerate(texts, start=1):
        check_text(f"{args.file}: row {i}", column, text)
    texts = [text or "" for text in texts]
    return [texts, *others] if more else texts


def chunks(texts: Iterable[str], progress: bool) -> Iterator[list[str]]:
    """1,024 texts at a time: enough to sort by length, and a file of any length takes no more memory."""
    bar = tqdm(texts, unit=" sentences", disable=not progress, delay=1, dynamic_ncols=True)
    whole = (re.sub("[\ud800-\udfff]", "\ufffd", text) for text in bar)  # half characters: no UTF-8
    while chunk := list(itertools.islice(whole, 1024)):
        yield chunk


def read_tokens(texts: list[str], model: Model) -> tuple[Tokens, list[bool]]:
    """Token numbers of each text, and whether there were too many."""
    encoded = model.base.tokenizer(texts, truncation=True, max_length=model.max_length)
    cut = [bool(encoding.overflowing) for encoding in encoded.encodings or []]  # fast tokenizers tell
    return Tokens.from_lists(encoded["input_ids"]), cut or [False] * len(texts)


def probabilities(model: Model, tokens: Tokens, batch_size: int) -> Tensor:
    """(texts, labels), in float32; raises InputError where they are no numbers."""
    found = predict(model.base.model, tokens, batch_size).softmax(dim=1)
    if not found.isfinite().all():
        raise InputError(f"{model.path}: its answers are not finite; its tensors or its alpha are too large")
    return found


def classify(model: Model, texts: list[str], args: argparse.Namespace) -> list[dict]:
    """One answer for each text, as --json prints it; a blank text gets the label None."""
    answers = [{"text": text, "label": None, "probabilities": {}, "model": model.name} for text in texts]
    asked = [answer for answer in answers if not is_blank(answer["text"])]
    if not asked:
        return answers
    tokens, cut = read_tokens([answer["text"] for answer in asked], model)
    rows = probabilities(model, tokens, args.batch_size).tolist()
    for answer, row, too_long in zip(asked, rows, cut, strict=True):
        is_sure = 100 * max(row) >= args.unsure
        answer["label"] = model.label_names[row.index(max(row))] if is_sure else UNSURE
        answer["probabilities"] = {name: round(p, 6) for name, p in zip(model.label_names, row, strict=True)}
        if too_long:
            answer["cut"] = True
        if args.explain:
            answer["words"] = explain(model, answer["text"], args.batch_size)
    return answers


def explain(model: Model, text: str, batch_size: int) -> list[tuple[str, float]]:
    """Each word that the model reads, and how much of the label's probability is lost where it is masked."""
    words = list(itertools.islice(re.finditer(r"\S+", text), model.max_length))  # a token a word at least
    text = text[: words[-1].end()]
    mask = model.base.tokenizer.mask_token or model.base.tokenizer.unk_token or ""
    masked = [text[: word.start()] + mask + text[word.end() :] for word in words]
    tokens, _ = read_tokens([text, *masked], model)
    read = len(masked)
    while read and torch.equal(tokens[read], tokens[0]):  # unchanged: that word was cut off
        read -= 1
    whole, *rows = probabilities(model, tokens, batch_size)[: read + 1]
    effects = [(whole - row)[whole.argmax()].item() for row in rows]
    return [(word.group(), round(effect, 6)) for word, effect in zip(words[:read], effects, strict=True)]


def answer_all(models: list[Model], texts: Iterable[str], args: argparse.Namespace, headed: bool) -> None:
    """Print every model's answer to each text, in the order given; under the text itself where `headed`."""
    width, indent = max(len(model.name) for model in models), "  " * headed
    for chunk in chunks(texts, progress=on_terminal() and not sys.stdout.isatty()):  # or the answers show it
        for answers in zip(*(classify(model, chunk, args) for model in models), strict=True):
            if args.json:
                print(*(json.dumps(answer, allow_nan=False) for answer in answers), sep="\n")
                continue
            if headed:
                print(visible(answers[0]["text"]))
            for model, answer in zip(models, answers, strict=True):
                print(f"{indent}{model.name:{width}}  {words_of(answer, model)}")
        sys.stdout.flush()


def words_of(answer: dict, model: Model) -> str:
    """Label and probability; below them each word's effect in percentage points, coloured on a terminal."""
    if answer["label"] is None:
        return "(blank)"
    label, width = visible(answer["label"]), max(map(len, model.label_names))
    note = f"  (cut to {model.max_length} tokens)" if "cut" in answer else ""
    line = f"{label[:1].upper() + label[1:]:{width}}  {percent(answer)}{note}"
    if label == UNSURE and UNSURE not in model.label_names:
        likeliest = max(answer["probabilities"], key=answer["probabilities"].get)
        line = f"Unsure ({visible(likeliest)} {percent(answer)}){note}"
    words = []
    for word, effect in answer.get("words", []):
        words.append(f"{visible(word, 40)} {100 * effect:+z.1f}")
        if sys.stdout.isatty() and abs(effect) >= 0.01:
            words[-1] = f"\033[{32 if effect > 0 else 31}m{words[-1]}\033[0m"
    return f"{line}\n    {'  '.join(words)}" if words else line


def surest(answer: dict) -> float | None:
    """The probability of the likeliest label."""
    return max(answer["probabilities"].values(), default=None)


def percent(answer: dict) -> str:
    return f"{100 * surest(answer):.1f} %"


def prompt(models: list[Model], args: argparse.Namespace) -> None:
    """Ask for sentences until the user has enough."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - its presence gives input() a history and the arrow keys
    sys.stdin.reconfigure(errors="replace")
    print("Type a sentence; exit, Ctrl-D or Ctrl-C leaves.", file=sys.stderr)
    try:
        while (text := input("> " if sys.stdout.isatty() else "")).strip().lower() != "exit":
            if not is_blank(text):
                answer_all(models, [text], args, headed=False)
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)  # the shell's own prompt starts a line


def judge(models: list[Model], table, args: argparse.Namespace) -> None:
    """Print how often each model is right on a labelled table, its surest mistakes, and which is better."""
    texts, labels = texts_of(args, table, args.label_column)
    rows = [i for i, text in enumerate(texts) if not is_blank(text)]
    if not rows:
        raise InputError(f"{args.file}: no sentence to judge by; give one with its label")
    if len(rows) < len(texts):
        note(f"{args.file}: {len(texts) - len(rows)} blank sentences of {len(texts)} are left out")
    labels = as_labels(f"{args.file}:", [labels[i] for i in rows], rows)
    (labels,) = without_fractions(str(args.file), args.label_column, labels)
    if class_names := table.attrs.get("names", {}).get(args.label_column):  # a file of the datasets library
        names = {str(i): name for i, name in enumerate(class_names)}
        labels = [names.get(label, label) for label in labels]
    if args.unsure and UNSURE in labels:
        raise InputError(f"--unsure: {UNSURE!r} is a label of {args.file}; leave it out")
    given = [own_labels(args, model, labels) for model in models]  # before the long work
    for model in models:
        warn_if_trained_on(model, args)
    answers = [[] for _ in models]
    for chunk in chunks([texts[i] for i in rows], progress=on_terminal()):
        for model, found in zip(models, answers, strict=True):
            found += classify(model, chunk, args)
    for model, own, found in zip(models, given, answers, strict=True):
        for i, label, answer in zip(rows, own, found, strict=True):
            answer |= {"row": i + 1, "given": label}
        tell_judgement(model, found, args)
    for one, other in itertools.combinations(range(len(models)), 2):
        pairs = zip(answers[one], answers[other], strict=True)
        right = [(a["label"] == a["given"], b["label"] == b["given"]) for a, b in pairs]
        names = models[one].name, models[other].name
        tell_better(*names, right.count((True, False)), right.count((False, True)), args)


def own_labels(args: argparse.Namespace, model: Model, labels: list[str]) -> list[str]:
    """The file's labels as this model calls them; labels that it does not know are named and counted."""
    names, counts = model.label_names, Counter(labels)
    numbers = {str(i): name for i, name in enumerate(names)}
    if counts.keys() <= numbers.keys() and not any(re.fullmatch(r"-?\d+", name) for name in names):
        note(f"{args.file}: the numbers in {args.label_column!r} are read as {listed(names)}, in this order")
        return [numbers[label] for label in labels]
    unknown = [f"{label} ({counts[label]})" for label in sorted(counts.keys() - set(names))]
    rows = sum(counts[label] for label in counts.keys() - set(names))
    if rows > len(labels) / 2:
        what = (
            f"{model.name} knows {listed(names)}, but {rows:,} of {len(labels):,} rows say {listed(unknown)}"
        )
        raise InputError(f"{args.file}: {what}; is it the right --label-column?")
    if unknown:
        note(
            f"{args.file}: labels that {model.name} does not know, so its answer is wrong: {listed(unknown)}"
        )
    return labels


def warn_if_trained_on(model: Model, args: argparse.Namespace) -> None:
    """Say so where the file that judges is the one that the model was trained on."""
    with contextlib.suppress(OSError, LookupError, TypeError, AttributeError):
        if args.file.samefile(model.facts["record"]["settings"]["dataset"]):
            what = "was trained on most of these rows: look at its mistakes, not at its accuracy"
            note(f"{args.file}: {model.name} {what}")


def tell_judgement(model: Model, answers: list[dict], args: argparse.Namespace) -> None:
    """Print the table of labels, the ten surest mistakes and the accuracy, or all of it as JSON."""
    sure = [answer for answer in answers if not args.unsure or answer["label"] != UNSURE]
    names = list(dict.fromkeys([*model.label_names, *(answer["given"] for answer in sure)]))
    index = {name: i for i, name in enumerate(names)}
    pairs = torch.tensor([[index[answer["given"]], index[answer["label"]]] for answer in sure]).view(-1, 2)
    confusion = count_pairs(*pairs.long().T, len(names))
    mistakes = [answer for answer in sure if answer["label"] != answer["given"]]
    mistakes.sort(key=lambda answer: -answer["probabilities"][answer["label"]])
    right, total = len(sure) - len(mistakes), len(sure)
    if args.json:
        found = {"model": model.name, "correct": right, "total": total, "unsure": len(answers) - total}
        if total:
            interval = [100 * share for share in wilson_interval(right, total)]
            found |= {"accuracy": 100 * right / total, "interval": interval, "macro_f1": macro_f1(confusion)}
        found |= {"label_names": names, "confusion": confusion.tolist(), "surest_mistakes": mistakes[:10]}
        return print(json.dumps(found, allow_nan=False))
    heading = f"{model.name}: {len(answers):,} sentences"
    if args.unsure:
        heading += f", unsure of {len(answers) - total:,}{'; of the others:' if total else ''}"
    print(heading)
    if mistakes:
        print(f"its surest mistakes, of {len(mistakes):,}; or the label is wrong:")
    for answer in mistakes[:10]:
        said, given, text = (visible(answer[key], 80) for key in ("label", "given", "text"))
        print(f"  row {answer['row']}, given {given}, answered {said} {percent(answer)} | {text}")
    if total:
        print(label_report(confusion, names))
        print(in_words(confusion, names))


def tell_better(one: str, other: str, one_alone: int, other_alone: int, args: argparse.Namespace) -> None:
    """Print whether one model is right where the other is wrong more often than by chance."""
    p = sign_test(one_alone, other_alone)
    if args.json:
        return print(json.dumps({"models": [one, other], "alone_right": [one_alone, other_alone], "p": p}))
    better = f"{one if one_alone > other_alone else other} is better"
    verdict = better if p < 0.05 else f"no evidence that {better}"
    if one_alone == other_alone:
        verdict = "no evidence that either is better"
    print(f"{one} alone right {one_alone:,}, {other} alone right {other_alone:,}: p = {p:.2g}, {verdict}")


def sign_test(one: int, other: int) -> float:
    """The two-sided probability of a division at least as uneven between two that are equally good."""
    count, term, tail = one + other, 1, 0
    for i in range(min(one, other) + 1):
        tail += term  # the binomial coefficient of count and i, step by step: each by itself is slow
        term = term * (count - i) // (i + 1)
    return min(1.0, 2 * tail / 2**count)


def write_answers(models: list[Model], texts: Iterable[str], table, args: argparse.Namespace) -> None:
    """Write every row as it was, with each model's label and probability beside it, whole or not at all."""
    import pandas

    lines = table is None
    table = pandas.DataFrame({"text": pandas.Series([], dtype=str)}) if lines else table
    several, taken, count = len(models) > 1, set(table.columns), 0
    columns = [answer_columns(taken, model.name if several else "") for model in models]

    def write(temporary: Path) -> None:
        nonlocal count
        with contextlib.ExitStack() as files:
            append = open_table(temporary, table, list(itertools.chain(*columns)), args, files)
            for chunk in chunks(texts, progress=on_terminal()):
                part = (
                    pandas.DataFrame({"text": chunk}) if lines else table[count : count + len(chunk)].copy()
                )
                for model, names in zip(models, columns, strict=True):
                    answers = classify(model, chunk, args)
                    found = [[answer["label"], surest(answer)] for answer in answers]
                    part[names] = pandas.DataFrame(found, part.index, names, dtype=object)
                append(part)
                count += len(chunk)
        if args.output.exists():
            raise InputError(
                f"--output {args.output}: it was made by something else meanwhile; name a new file"
            )

    write_file(args.output, write)
    print(f"wrote {count:,} rows to {args.output}")


def answer_columns(taken: set[str], name: str) -> list[str]:
    """Names for a model's label and its probability that no column of the table has."""
    names = [f"{what} {name}".strip() for what in ("label", "probability")]
    while taken & set(names):
        names = [f"model_{name}" for name in names]
    return names


def open_table(
    path: Path, table, columns: list[str], args: argparse.Namespace, files: contextlib.ExitStack
) -> Callable:
    """A function that appends rows to a new file at `path`, of the format that --output's ending names.

    `table` and the new `columns` tell the header and the types. Raises InputError where that format cannot
    hold the table.
    """
    suffix, original = args.output.suffix.lower(), (args.file or Path()).suffix.lower()
    if suffix == ".parquet":
        return open_parquet(path, table, columns, args, files)
    encoding = "utf-8-sig" if table.attrs.get("marked") and suffix == ".csv" else "utf-8"
    file = files.enter_context(open(path, "w", encoding=encoding, newline=""))  # noqa: SIM115
    if suffix == ".jsonl":
        was_json = original in (".json", ".jsonl")
        return lambda rows: file.writelines(json_line(row, was_json) for row in rows.to_dict("records"))
    options = {"delimiter": table.attrs.get("sep", ","), "lineterminator": "\n"}
    plain, quoted = (csv.writer(file, quoting=how, **options) for how in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL))

    def write_row(row: list) -> None:
        fields = ["" if value is None else str(value) for value in row]
        if suffix == ".csv":
            has_return = any("\r" in field for field in fields)  # which csv quotes only where it ends lines
            (quoted if has_return else plain).writerow(fields)
        elif any(c in field for field in fields for c in "\t\r\n"):
            what = f"a .tsv file cannot hold {visible(' | '.join(fields), 80)!r}, with a tab or two lines"
            raise InputError(f"--output {args.output}: {what}; name a .csv file")
        else:
            file.write("\t".join(fields) + "\n")  # as GLUE writes it: without quotes

    def append(rows) -> None:
        for row in zip(*read_columns(args.output, rows, list(rows.columns)), strict=True):
            write_row(row)

    write_row([*table.attrs.get("header", table.columns), *columns])
    return append


def open_parquet(
    path: Path, table, columns: list[str], args: argparse.Namespace, files: contextlib.ExitStack
) -> Callable:
    """A function that appends rows to a new Parquet file, with the types of --file where it is one, too."""
    import pyarrow
    from pyarrow import parquet

    try:
        if is_table(args.file) and args.file.suffix.lower() == ".parquet":
            schema = parquet.read_schema(args.file)
        else:
            schema = pyarrow.Schema.from_pandas(table, preserve_index=False).remove_metadata()
        for name, kind in zip(columns, itertools.cycle([pyarrow.string(), pyarrow.float64()])):
            schema = schema.append(pyarrow.field(name, kind))
        writer = files.enter_context(parquet.ParquetWriter(path, schema))
    except (pyarrow.ArrowException, OverflowError, TypeError) as error:
        raise InputError(f"--output {args.output}: {reason(error)}; name a .jsonl file") from error
    return lambda rows: writer.write_table(pyarrow.Table.from_pandas(rows, schema, preserve_index=False))


def json_line(row: dict, was_json: bool) -> str:
    """A row as JSON. What a row of a JSON file did not have is NaN in its table, and left out again."""
    import pandas

    kept = {}
    for key, value in row.items():
        is_number = not isinstance(value, float) or math.isfinite(value)
        if is_number or not was_json:
            kept[key] = None if value is pandas.NA or not is_number else value
    return json.dumps(kept, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def serve(models: list[Model], args: argparse.Namespace) -> None:
    """A page on this machine: a sentence with its labels and words, or a file with its answers."""
    folder = tempfile.TemporaryDirectory()  # uploads and answers are gone when the page is
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder.name}
    try:
        import gradio
    except ImportError as error:
        raise InputError("--web needs Gradio: pip install -r tests/requirements-web.txt") from error
    args.explain, lock = True, threading.Lock()  # models on one base share its tokenizer: one call at a time

    def ask(text: str) -> list:
        shown = []
        for model in models:
            with lock:
                (answer,) = classify(model, [text], args)
            words = answer.pop("words", None)
            shown += [words_of(answer, model), answer["probabilities"] or None, words]
        return shown

    def answer_file(name: str) -> str:
        suffix = Path(name).suffix.lower()
        output = Path(tempfile.mkdtemp(dir=folder.name), f"answers{suffix if suffix in ANSWERS else '.csv'}")
        own = argparse.Namespace(**vars(args) | {"file": Path(name), "output": output, "explain": False})
        try:
            with lock:
                table = read_file(own.file) if is_table(own.file) else None
                write_answers(models, read_texts(own, table), table, own)
        except InputError as error:
            raise gradio.Error(str(error).replace(name, own.file.name), print_exception=False) from error
        return str(output)

    with gradio.Blocks(title="LoRA playground") as page, folder:
        text, parts = gradio.Textbox(label="A sentence", submit_btn=True, autofocus=True), []
        for model in models:
            parts += [
                gradio.Textbox(label=model.name),
                gradio.Label(label="probabilities", show_heading=False),
            ]
            parts += [gradio.HighlightedText(label="what is lost where a word is masked", show_legend=True)]
        text.submit(ask, text, parts)
        if sentences := [[one] for one in own_sentences(models[0])]:
            gradio.Examples(sentences, text, parts, ask, run_on_click=True, label="Validation sentences")
        file = gradio.File(label="Sentences, one a line, or a table", file_types=[".txt", *FORMATS])
        file.upload(answer_file, file, gradio.File(label="The same with its answers"))
        share = "COLAB_RELEASE_TAG" in os.environ  # whose browser is elsewhere: a public link
        page.launch(server_name="127.0.0.1", share=share, inbrowser=on_terminal(), footer_links=[])


def own_sentences(model: Model) -> list[str]:
    """Some of the sentences that the model was evaluated with, where its data still lies."""
    record = model.facts.get("record", {})
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with contextlib.suppress(InputError, OSError, LookupError, TypeError, AttributeError), quiet[0], quiet[1]:
        if Path(record["settings"]["dataset"]).exists():
            return load_tables(argparse.Namespace(**record["settings"]))[1].text[:5]
    return []


def write_glue(model: Model, table, args: argparse.Namespace) -> None:
    """GLUE's submission file for SST-2, whose test split has no public labels."""
    if len(model.label_names) != 2:
        raise InputError(
            f"--glue: SST-2 has 2 labels, but this model {len(model.label_names)}; choose another"
        )
    if args.file and table is None:
        raise InputError(f"--file {args.file}: give a table that ends in {listed(FORMATS)}")
    texts, index = texts_of(args, table, "index") if args.file else read_glue_test()
    predictions = []
    for chunk in chunks(texts, progress=on_terminal()):
        tokens, _ = read_tokens(chunk, model)
        predictions += probabilities(model, tokens, args.batch_size).argmax(dim=1).tolist()
    rows = "".join(f"{i}\t{prediction}\n" for i, prediction in zip(index, predictions, strict=True))
    text = f"index\tprediction\n{rows}"
    write_file(args.glue, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"wrote {len(predictions):,} predictions to {args.glue}")


def read_glue_test() -> tuple[list[str], list[int]]:
    """Sentences and numbers of SST-2's test split, from the Hub or its cache."""
    use_cache_if_offline()
    import datasets  # a second, here alone; after the Hub was asked, whose answer it copies

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(GLUE[0], GLUE[1], revision=GLUE[2], split="test")
    except Exception as error:  # of the network or of the Hub, each of its own kind
        remedy = "give index<TAB>sentence with --file"
        raise InputError(f"no Hub ({reason(error)}): {remedy}") from error
    return table["sentence"], table["idx"]


def export(path: Path, args: argparse.Namespace) -> None:
    """Write the merged model as a plain Hugging Face folder, compared with the trained one beforehand."""
    unmerged, merged = (load("", path, args.base, merged) for merged in (False, True))
    merged.base.tokenizer.model_max_length = merged.max_length
    texts = ["A warm, funny film.", "It never ends.", "so long " * merged.max_length]
    tokens, _ = read_tokens(texts, merged)
    expected = probabilities(unmerged, tokens, 1)
    logits = predict(unmerged.base.model, tokens, 1)
    differences = []

    def write(temporary: Path) -> None:
        merged.base.model.save_pretrained(temporary)
        merged.base.tokenizer.save_pretrained(temporary)
        options = {"truncation": True, "top_k": None, "device": "cpu"}
        run_pipeline = transformers.pipeline("text-classification", str(temporary), **options)
        for answer, row in zip(run_pipeline(texts), expected.tolist(), strict=True):
            scores = {pair["label"]: pair["score"] for pair in answer}
            differences.extend(abs(scores[name] - p) for name, p in zip(merged.label_names, row, strict=True))
        off = (predict(run_pipeline.model, tokens, 1) - logits).abs().max().item()
        if not (off <= 1e-3 and all(difference <= 1e-4 for difference in differences)):  # NaN is not small
            what = f"the pipeline's logits differ from the trained model's by {off:.1e}"
            raise InputError(f"--export: {what}; nothing is written")

    write_folder(args.export, write)
    what = f"the pipeline's probabilities differ from the trained model's by at most {max(differences):.1e}"
    print(f"saved {args.export.resolve()}; {what}")


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    paths = choose_models(args)
    if args.export:
        return export(paths[0], args)
    asked = args.sentences or args.file or args.glue or args.web or args.output
    prompted = not asked and sys.stdin is not None and sys.stdin.isatty()
    table = read_file(args.file) if is_table(args.file) else None
    reads_texts = not (prompted or args.glue or args.web or args.label_column)
    texts = read_texts(args, table) if reads_texts else []
    models = load_all(paths, args.base)
    check_unsure(models, args)
    if args.web:
        serve(models, args)
    elif args.glue:
        write_glue(models[0], table, args)
    elif args.label_column:
        judge(models, table, args)
    elif args.output:
        write_answers(models, texts, table, args)
    elif prompted:
        prompt(models, args)
    else:
        answer_all(models, texts, args, headed=len(args.sentences) != 1 or args.file is not None)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("sentences", nargs="*", metavar="SENTENCE", help="to judge (default: standard input, or a prompt)")
    help = "may be repeated (default: what training wrote)"
    add("--model", type=Path, action="append", metavar="PATH", help=help)
    add("--base", metavar="PATH", help="where the base model lies (default: where it lay in training)")
    add("--file", type=Path, help=f"sentences: one a line, or a table ({', '.join(FORMATS)})")
    add("--text-column", help="of a table (default: sentence, text, review, ... or the one of long texts)")
    add("--label-column", help="judge the models by this column of --file, then exit (default: off)")
    help = f"write the table, or the lines, with the answers beside them ({', '.join(ANSWERS)}; default: off)"
    add("--output", type=Path, metavar="FILE", help=help)
    help = 'answer "unsure" below this many percent (default: 0, never)'
    add("--unsure", type=between(float, 0, 100), default=0.0, metavar="PERCENT", help=help)
    batch_size = between(int, 1, 10**6)
    add("--batch-size", type=batch_size, default=32, help="sentences at a time (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object a line and nothing else (default: off)")
    add("--explain", action="store_true", help="show what each word does to the probability (default: off)")
    add("--web", action="store_true", help="open a page on this machine (default: off)")
    help = "write GLUE's SST-2 submission to it, then exit (default: off)"
    add("--glue", type=Path, metavar="FILE", help=help)
    help = "write the merged model, then exit (default: off)"
    add("--export", type=Path, metavar="FOLDER", help=help)
    return parser


def is_submission(path: Path) -> bool:
    """Whether this file is an earlier --glue, which may be replaced."""
    with open(path, "rb") as file:
        return file.read(17) == b"index\tprediction\n"


def choose_models(args: argparse.Namespace) -> list[Path]:
    """The trained models to ask; raises InputError for flags that do not go together."""
    jobs = {"--glue": args.glue, "--export": args.export, "--web": args.web, "--output": args.output}
    jobs = [flag for flag, given in (jobs | {"--label-column": args.label_column}).items() if given]
    if len(jobs) > 1:
        raise InputError(f"{' and '.join(jobs)}: one at a time; leave the rest out")
    if args.sentences and (jobs and (jobs != ["--output"] or is_table(args.file))):
        raise InputError(f"{jobs[0]} answers no sentences of the command line; leave them out")
    if args.file and jobs and jobs[0] in ("--export", "--web"):
        raise InputError(f"{jobs[0]} reads no --file; leave it out")
    if args.label_column is not None and not (args.label_column and is_table(args.file)):
        raise InputError(f"--label-column names a column of a table in --file: {listed(FORMATS)}")
    if args.explain and jobs and not args.web:
        raise InputError(f"{jobs[0]} explains no words; leave out --explain")
    if args.json and jobs and not args.label_column:
        raise InputError(f"{jobs[0]} prints no JSON; leave out --json")
    if 0 < args.unsure <= 1:
        raise InputError(f"--unsure {args.unsure:g}: give percent, such as 80")
    if args.unsure and (args.glue or args.export):
        raise InputError(f"{jobs[0]} takes every answer; leave out --unsure")
    if args.output:
        check_new_file(args)
    if args.glue and (args.glue.is_dir() or (args.glue.exists() and not is_submission(args.glue))):
        raise InputError(f"--glue {args.glue}: something else stands there; name another file to write to")
    if args.export and any(args.export.glob("*")):
        raise InputError(f"--export {args.export}: that folder has files in it; name a new one")
    twice = [path for path, count in Counter(map(os.path.realpath, args.model or [])).items() if count > 1]
    if twice:
        raise InputError(f"--model {twice[0]} is named twice; name each once")
    paths = args.model or [path for path in TRAINED if path.exists()] or [p for p in DEMOS if p.exists()]
    if not paths:
        others = sorted(map(str, Path("model").glob("*.pt")))
        if others:
            raise InputError(f"no adapter of SST-2 or the demo; choose with --model among {listed(others)}")
        what = "python lora_scratch.py makes one, with --demo in a minute"
        raise InputError(f"no adapter in model/ yet: {what}")
    if (args.glue or args.export) and len(paths) > 1:
        among = ", ".join(map(str, paths))
        raise InputError(f"--glue and --export take one model; choose with --model among {among}")
    return paths


def check_new_file(args: argparse.Namespace) -> None:
    """Raise InputError for an --output that stands there already, cannot be written, or has no input."""
    if args.output.suffix.lower() not in ANSWERS:
        raise InputError(f"--output {args.output}: give a name that ends in {listed(ANSWERS)}")
    if args.output.exists() or args.output.is_symlink():
        raise InputError(f"--output {args.output}: there is something already; name a new file")
    if not args.file and not args.sentences and (sys.stdin is None or sys.stdin.isatty()):
        raise InputError("--output: there is nothing to answer; give a --file, sentences or a pipe")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        probe_place(args.output.resolve().parent, args.output.name)
    except OSError as error:
        what = f"cannot write there ({error.strerror or reason(error)}); name another place"
        raise InputError(f"--output {args.output}: {what}") from error


def check_unsure(models: list[Model], args: argparse.Namespace) -> None:
    for model in models:
        if args.unsure and UNSURE in model.label_names:
            raise InputError(f"--unsure: {UNSURE!r} is a label of {model.path}; leave it out")


if __name__ == "__main__":
    try:
        run(main, keep_going=False)
    except BrokenPipeError:  # a reader that has enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at the end
        sys.exit(141)
