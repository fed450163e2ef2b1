"""Ask the trained adapters: sentences as arguments, from a file or a pipe, or one by one at a prompt.

    python playground.py "The movie was absolutely fantastic!"    # what both training scripts wrote answers
    python playground.py                                          # a prompt; exit, Ctrl-D or Ctrl-C leaves
    python playground.py --explain "It is not bad at all."        # which words carried the decision
    python playground.py --file reviews.csv --text-column review --json > answers.jsonl
    cat reviews.txt | python playground.py                        # one sentence a line
    python playground.py --model FILE.pt --glue SST-2.tsv         # GLUE's submission for the test split
    python playground.py --model FILE.pt --export FOLDER       # for pipeline("text-classification", FOLDER)

FILE.pt, or a folder of lora_peft.py: the answers come from float32 weights with the adapter merged in.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the slow imports ends it without a word

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

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
    between,
    check_text,
    choose_column,
    choose_device,
    is_blank,
    listed,
    load_checkpoint,
    merge_lora,
    note,
    on_terminal,
    predict,
    read_columns,
    read_file,
    reason,
    run,
    use_cache_if_offline,
    visible,
    write_file,
    write_folder,
)

TRAINED = [Path("model/lora_scratch_distilbert_sst2.pt"), Path("model/lora_peft_distilbert_sst2")]
DEMOS = [
    Path("model/lora_scratch_demo.pt"),
    Path("model/lora_peft_demo"),
]  # asked where none of the first is there


class Model(NamedTuple):
    name: str  # as the answers call it
    path: Path
    base: Base
    label_names: list[str]
    max_length: int  # tokens; longer text is cut, as in training


def load(name: str, path: Path, base_name: str | None, merged: bool = True) -> Model:
    """A trained model from a handwritten checkpoint or a folder of PEFT; plain layers where `merged`."""
    if path.is_dir():
        from lora_peft import load_adapter  # only here: who has no such folder needs no peft

        base, facts = load_adapter(path, base_name, merged)
    else:
        base, facts = load_checkpoint(path, base_name)
        if merged:
            merge_lora(base.model)
    return Model(name, path, base, facts["label_names"], facts["max_length"])


def read_texts(args: argparse.Namespace) -> Iterable[str]:
    """The sentences asked about. A text file is opened now, before any model is loaded, and read later."""
    if args.sentences and not args.file:
        return args.sentences
    if args.file and args.file.suffix.lower() in FORMATS:
        return [*args.sentences, *read_table(args)]
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


def read_table(args: argparse.Namespace, *more: str) -> list:
    """The texts of a table, or these and the values of more columns."""
    if args.file.suffix.lower() not in FORMATS:
        raise InputError(f"--file {args.file}: give a table that ends in {listed(FORMATS)}")
    table = read_file(args.file)
    names = [name for name in table.columns if name not in more]
    column = args.text_column or choose_column(str(args.file), table, "text", names, TEXT_NAMES)
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
        answer["label"] = model.label_names[row.index(max(row))]
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
                print(f"{indent}{model.name:{width}}  {in_words(answer, model)}")
        sys.stdout.flush()


def in_words(answer: dict, model: Model) -> str:
    """Label and probability; below them each word's effect in percentage points, coloured on a terminal."""
    if answer["label"] is None:
        return "(blank)"
    label, width = visible(answer["label"]), max(map(len, model.label_names))
    note = f"  (cut to {model.max_length} tokens)" if "cut" in answer else ""
    line = (
        f"{label[:1].upper() + label[1:]:{width}}  {100 * max(answer['probabilities'].values()):.1f} %{note}"
    )
    words = []
    for word, effect in answer.get("words", []):
        words.append(f"{visible(word, 40)} {100 * effect:+z.1f}")
        if sys.stdout.isatty() and abs(effect) >= 0.01:
            words[-1] = f"\033[{32 if effect > 0 else 31}m{words[-1]}\033[0m"
    return f"{line}\n    {'  '.join(words)}" if words else line


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


def write_glue(model: Model, args: argparse.Namespace) -> None:
    """GLUE's submission file for SST-2, whose test split has no public labels."""
    if len(model.label_names) != 2:
        raise InputError(
            f"--glue: SST-2 has 2 labels, but this model {len(model.label_names)}; choose another"
        )
    texts, index = read_table(args, "index") if args.file else read_glue_test()
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
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
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
    asked = args.sentences or args.file or args.glue
    prompted = not asked and sys.stdin is not None and sys.stdin.isatty()
    texts = [] if prompted or args.glue else read_texts(args)
    kinds = ["LoRA_peft" if path.is_dir() else "LoRA_scratch" for path in paths]
    names = [kind if kinds.count(kind) == 1 else str(path) for kind, path in zip(kinds, paths, strict=True)]
    models = [load(name, path, args.base) for name, path in zip(names, paths, strict=True)]
    for model in models:
        model.base.model.to(choose_device("auto"))
    if args.glue:
        write_glue(models[0], args)
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
    batch_size = between(int, 1, 10**6)
    add("--batch-size", type=batch_size, default=32, help="sentences at a time (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object a line and nothing else (default: off)")
    add("--explain", action="store_true", help="show what each word does to the probability (default: off)")
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
    exclusive = [flag for flag in (args.sentences, args.glue, args.export) if flag]
    if len(exclusive) > 1 or (args.export and args.file):
        raise InputError("--glue goes with --file alone, --export with neither; leave the rest out")
    if args.glue and (args.glue.is_dir() or (args.glue.exists() and not is_submission(args.glue))):
        raise InputError(f"--glue {args.glue}: something else stands there; name another file to write to")
    if args.export and any(args.export.glob("*")):
        raise InputError(f"--export {args.export}: that folder has files in it; name a new one")
    paths = args.model or [path for path in TRAINED if path.exists()] or [p for p in DEMOS if p.exists()]
    if not paths:
        raise InputError(
            "no adapter in model/ yet: python lora_scratch.py makes one, with --demo in a minute"
        )
    if (args.glue or args.export) and len(paths) > 1:
        among = ", ".join(map(str, paths))
        raise InputError(f"--glue and --export take one model; choose with --model among {among}")
    return paths


if __name__ == "__main__":
    try:
        run(main, keep_going=False)
    except BrokenPipeError:  # a reader that has enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at the end
        sys.exit(141)
