"""Ask the trained models, with arguments, a file, a pipe, a prompt or a page.

python playground.py "A warm, funny film."            # the model that was trained last
python playground.py                                  # a prompt
python playground.py --explain "It is not bad."       # which words carried the decision
cat reviews.txt | python playground.py                # one sentence a line
python playground.py --file new.csv --output out.csv  # the same table with its answers
python playground.py --file test.csv --label-column about  # how good; which is best
python playground.py --web                            # a page on this machine
python playground.py --model a.pt --export FOLDER     # for transformers.pipeline
"""

import codecs
import csv
import io
import json
import os
import re
import sys
import tempfile
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, replace
from filecmp import cmp
from html import escape
from itertools import chain, combinations, cycle, islice
from pathlib import Path
from select import select
from threading import Lock

# isort: off
from lora_scratch import Base, Tokens, load_checkpoint, merge_lora, predict, prepare_machine, speed_up
from lora_scratch import FORMATS, GLUE, choose_column, find_columns, read_file, read_rows, read_text
from lora_scratch import hold, is_blank, is_table, listed, note, report_labels, score, visible
from lora_scratch import InputError, Parser, refusing, run, use_cache_if_offline, write_file, write_folder

import numpy
import torch
import transformers
from huggingface_hub import hf_hub_download
from tqdm import tqdm

UNSURE = "unsure"  # the answer below --unsure
ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")  # of --output


@dataclass(eq=False, repr=False)
class Model:
    """A trained model, to be called with texts, by any number of threads."""

    name: str  # as the answers call it
    path: Path
    base: Base
    facts: dict  # what its file says beside the tensors

    def __post_init__(self):
        self.label_names: list[str] = self.facts["label_names"]
        self.max_length: int = self.facts["max_length"]  # in tokens; longer text is cut
        self.data = Path(self.facts.get("data") or "unknown data")
        self.lock = Lock()

    def __call__(self, texts: list[str] | str, unsure=0.0, explained=False) -> list[dict]:
        """The answer to each text (a str is one): None if blank, "unsure" below `unsure` percent."""
        if unsure and not 1 < unsure <= 100:
            raise InputError(f"unsure {unsure:g}: give percent, such as 80")
        if unsure and UNSURE in self.label_names:
            raise InputError(f"--unsure: {UNSURE!r} is a label of {self.path}; leave it out")
        texts = [texts] if isinstance(texts, str) else [*texts]
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise TypeError(f"{wrong[0]!r} is no text: give a list of str")
        texts = [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts]  # no half characters
        nothing = {"label": None, "probability": None, "probabilities": {}}
        answers = [{"text": text, **nothing} for text in texts]
        asked = [answer for answer in answers if not is_blank(answer["text"])]
        if not asked:
            return answers
        logits, encoded = self.logits([answer["text"] for answer in asked])
        for i, (answer, row) in enumerate(zip(asked, logits.softmax(dim=1).tolist(), strict=True)):
            found = [round(p, 6) for p in row]
            answer |= {"label": self.label_names[row.index(max(row))], "probability": max(found)}
            answer["probabilities"] = dict(zip(self.label_names, found, strict=True))
            if answer["probability"] < unsure / 100:
                answer["label"] = UNSURE
            if encoded.encodings and encoded.encodings[i].overflowing:  # fast tokenizers know
                answer["cut"] = True
            if explained:
                answer["words"] = self.explain(answer["text"])
        return answers

    @property
    def accuracy(self) -> str:
        """How often it was right on unseen rows, if its file knows."""
        with suppress(LookupError, TypeError, ArithmeticError):  # it may be old
            record = self.facts["record"]
            found = record.get("unseen") or record["epochs"][-1]  # the former with --folds
            result = score(torch.tensor([[found["correct"], found["total"] - found["correct"]], [0, 0]]))
            return "{text}, 95 % between {interval[0]:.0f} and {interval[1]:.0f}".format(**result)
        return "accuracy unknown"

    def logits(self, texts: list[str]) -> tuple[torch.Tensor, transformers.BatchEncoding]:
        """(texts, labels), in float32, and the texts as tokens."""
        nothing = [self.base.tokenizer.pad_token_id]  # as in tokenize
        with self.lock:  # a tokenizer serves one thread at a time
            encoded = self.base.tokenizer(texts, truncation=True, max_length=self.max_length)
            ids = [numpy.array(one or nothing, dtype=numpy.int32) for one in encoded["input_ids"]]
            tokens = Tokens(ids, torch.zeros(len(ids), dtype=torch.int64))
            found = predict(self.base.model, tokens, batch_size=32)
        if not found.isfinite().all():
            raise InputError(f"{self.path}: its answers are not finite; train it again")
        return found, encoded

    def explain(self, text: str) -> list[tuple[str, float]]:
        """Each word that is read, and what the answer's log-odds lose without it."""
        words = list(islice(re.finditer(r"\S+", text), self.max_length))
        text = text[: words[-1].end()]
        mask = self.base.tokenizer.mask_token or self.base.tokenizer.unk_token or ""
        masked = [text[: word.start()] + mask + text[word.end() :] for word in words]
        logits, encoded = self.logits([text, *masked])
        while words and encoded["input_ids"][len(words)] == encoded["input_ids"][0]:
            words.pop()  # unchanged without it: it was cut off
        logits, best = logits.double(), logits[0].argmax()
        odds = logits[:, best] - logits.index_fill(1, best, -torch.inf).logsumexp(dim=1)
        effects = (odds[0] - odds[1:]).tolist()
        return [(word[0], round(effect, 4)) for word, effect in zip(words, effects, strict=False)]


def load(path: str | Path, base: str | None = None, merged=True, precision="fp32") -> Model:
    """A trained model from a file or a folder; its base model is now at `base`."""
    path, name = Path(path), "LoRA_scratch"
    if path.is_dir():
        from lora_peft import load_adapter  # others need no PEFT

        name, (found, facts) = "LoRA_peft", load_adapter(path, base, merged)
    else:
        found, facts = load_checkpoint(path, base)
        if merged:
            merge_lora(found.model)
    device, dtype = prepare_machine(Namespace(device="auto", precision=precision, threads=None))
    speed_up(found, dtype).to(device)
    return Model(name, path, found, facts)


def load_all(paths: list[Path], base: str | None = None, precision="fp32") -> list[Model]:
    """Trained models. One alone is merged; several share the tensors of their base."""
    models, shared, kinds = [], {}, [path.is_dir() for path in paths]
    for path, kind in zip(paths, kinds, strict=True):
        model = load(path, base, len(paths) == 1, precision)
        if kinds.count(kind) > 1:
            model.name = str(path)
        for key, parameter in model.base.model.named_parameters():
            key = model.base.identity["fingerprint"], re.sub(r"\.base(_layer)?\b", "", key)
            if torch.equal(shared.setdefault(key, parameter.data), parameter):
                parameter.data = shared[key]
        models.append(model)
    return models


def describe_model(model: Model) -> str:
    """What a model is: its file, data, date, labels and accuracy."""
    file = model.path / "lora_peft.json" if model.path.is_dir() else model.path
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.stat().st_mtime))
    data, labels = os.path.relpath(model.data), listed(model.label_names, 10)
    return visible(f"{model.path}: trained on {data}, {date}; labels: {labels}; {model.accuracy}", 600)


def read_texts(models: list[Model], args: Namespace, disable=None) -> tuple[Iterator, object]:
    """The sentences, some at a time, and the table that has them."""
    texts, later, table = args.sentences, (), None
    if is_table(args.file):
        table = read_file(args.file)
        column = choose_text(models, args, table)
        with redirect_stderr(io.StringIO()):  # no row is left out
            found = read_rows(args.file, table, column)["text"]
        texts = [*texts, *found.reindex(table.index + 1, fill_value="")]
    elif args.file not in (None, Path("-")):
        with refusing(f"{args.file} cannot be read", "give lines of text or a table"):
            later = split_lines([read_text(args.file)[0]])
    elif args.file or not texts:
        later = split_lines(read_input())
    return chunks(texts, disable, later), table


def choose_text(models: list[Model], args: Namespace, table) -> str:
    """The column of texts: as given, else as in training, else the likeliest."""
    trained = models[0].facts.get("text_column")
    if args.text_column or trained in table:
        return args.text_column or trained
    column = choose_column(args.file, table, "text", taken=args.label_column)
    if trained:
        note(f"{args.file}: {column!r} is read; it has no {trained!r}, as in training")
    return column


def read_input() -> Iterator[str]:
    """Standard input, as it comes."""
    blocks = iter(lambda: select([0], [], []) and os.read(0, 2**20), b"")
    with refusing("standard input cannot be read", "pipe UTF-8, or give sentences or a --file"):
        yield from codecs.iterdecode(blocks, "utf-8-sig")


def split_lines(parts: Iterable[str]) -> Iterator[list[str]]:
    """Whole lines as the parts of their text come, up to 1,024 at a time."""
    rest = ""
    for part in parts:
        *lines, rest = (rest + part).split("\n")
        for at in range(0, len(lines), 1024):
            yield [line.removesuffix("\r") for line in lines[at : at + 1024]]
    if rest:
        yield [rest.removesuffix("\r")]


def chunks(texts: list[str], disable=None, later: Iterable[list[str]] = ()) -> Iterator[list[str]]:
    """1,024 texts at a time, to be sorted by length, then later ones."""
    parts = (texts[i : i + 1024] for i in range(0, len(texts), 1024))
    with tqdm(total=len(texts) or None, unit=" texts", disable=disable, delay=1) as bar:
        for chunk in chain(parts, later):
            yield chunk
            bar.update(len(chunk))


def answer_all(models: list[Model], texts: Iterable, args: Namespace, headed: bool) -> None:
    """Print every model's answer to each text, under it if `headed`."""
    width, indent = max(len(model.name) for model in models), "  " * headed
    for chunk in texts:
        found = [model(chunk, args.unsure, args.explain) for model in models]
        for answers in zip(*found, strict=True):
            if headed and not args.json:
                print(visible(answers[0]["text"]))
            for model, answer in zip(models, answers, strict=True):
                line = f"{indent}{model.name:{width}}  {in_words(answer, model)}"
                answer["model"] = model.name
                print(json.dumps(answer, allow_nan=False) if args.json else line)
        sys.stdout.flush()


def in_words(answer: dict, model: Model) -> str:
    """Label and probability, and the effect of each word below."""
    if answer["label"] is None:
        return "(blank)"
    label, percent = visible(answer["label"]), f"{100 * answer['probability']:.1f} %"
    line = f"{label[:1].upper() + label[1:]:{max(map(len, model.label_names))}}  {percent}"
    if label == UNSURE and UNSURE not in model.label_names:
        likeliest = max(answer["probabilities"], key=answer["probabilities"].get)
        line = f"Unsure ({visible(likeliest)} {percent})"
    if "cut" in answer:
        line += f"  (cut to {model.max_length} tokens)"
    words, dull = [], os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    for word, effect in answer.get("words", []):
        words.append(f"{visible(word, 40)} {effect:+z.1f}")
        if sys.stdout.isatty() and not dull and round(effect, 1):
            words[-1] = f"\033[{32 if effect > 0 else 31}m{words[-1]}\033[0m"
    return f"{line}\n    {'  '.join(words)}" if words else line


def prompt(models: list[Model], args: Namespace) -> None:
    """Ask for sentences until the user has enough."""
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - input() gets a history
    sys.stdin.reconfigure(errors="replace")
    print("Type a sentence; exit, Ctrl-D or Ctrl-C leaves.", file=sys.stderr)
    with suppress(EOFError, KeyboardInterrupt):
        while (text := input("> " if sys.stdout.isatty() else "")).strip().lower() != "exit":
            if not is_blank(text):
                answer_all(models, [[text]], args, headed=False)
    print(file=sys.stderr)  # the shell's own prompt starts a line


def judge(models: list[Model], args: Namespace) -> str:
    """How often each model is right on a table, and which is better."""
    import pandas

    table = read_file(args.file)
    columns = find_columns(args.file, table, choose_text(models, args, table), args.label_column)
    rows = read_rows(args.file, table, *columns)  # the index is the row in the file
    given = [translate_labels(model, rows["label"], args) for model in models]
    texts, said, right = rows["text"], [], {}
    if args.output:
        with redirect_stderr(io.StringIO()):  # noted
            texts = read_rows(args.file, table, columns[0])["text"]
        texts = texts.reindex(table.index + 1, fill_value="")
    answers = write_answers(models, args, texts, table, given)
    for model, labels, found in zip(models, given, answers, strict=True):
        judged = pandas.DataFrame(found, texts.index).loc[rows.index].assign(given=labels)
        said.append(judgement(model, judged, args))
        right[model.name] = judged["label"] == judged["given"]
    for one, other in combinations(right, 2):
        a, b = int((right[one] > right[other]).sum()), int((right[one] < right[other]).sum())
        p = sign_test(a, b)
        verdict = f"{one if a > b else other} is better" if p < 0.05 else "no clear winner"
        record = {"models": [one, other], "alone_right": [a, b], "p": p}
        line = f"right only: {one} {a:,} times, {other} {b:,}; chance {p:.2g}: {verdict}"
        said.append(json.dumps(record) if args.json else line)
    return "\n".join(said)


def translate_labels(model: Model, labels, args: Namespace):
    """The file's labels as this model calls them."""
    names, counts = model.label_names, labels.value_counts()
    if args.unsure and UNSURE in counts:
        raise InputError(f"--unsure: {UNSURE!r} is a label of {args.file}; leave it out")
    inside = chain(model.data.glob("*"), model.data.glob("data/*"))
    seen = [one for one in inside if re.match(r"train(ing)?[-.]", one.name.lower())]
    seen = filter(Path.exists, (model.data, *seen))
    if any(args.file.samefile(one) or cmp(args.file, one, False) for one in seen):  # or a copy
        note(f"{args.file}: {model.name} was trained on it, so the accuracy is too high")
    same = {name: name for name in names}
    trained = dict(zip(model.facts.get("labels", names), names, strict=False))
    places = {str(i): name for i, name in enumerate(names)}
    if {*counts.index} - {*places} or any(re.fullmatch(r"-?\d+", label) for label in trained):
        places = {}
    readings = trained, same, trained | same, places
    reading = max(readings, key=lambda one: counts[counts.index.isin(one)].sum())
    if reading != same:
        note(f"{args.file}: {listed([*reading])} are read as {listed([*reading.values()])}")
    unknown = counts[~counts.index.isin(reading)].sort_index()
    shown = listed([f"{label} ({count})" for label, count in unknown.items()])
    what = f"{args.file}: labels unknown to {model.name}, {unknown.sum():,} in all: {shown}"
    if unknown.sum() > len(labels) / 2:
        raise InputError(f"{what}; it knows {listed(names)}; see --label-column")
    if len(unknown):
        note(f"{what}; these count as wrong")
    return labels.map(lambda label: reading.get(label, label))


def judgement(model: Model, judged, args: Namespace) -> str:
    """Mistakes, thresholds, labels and accuracy, or JSON."""
    from pandas import crosstab, json_normalize

    names = [*dict.fromkeys([*model.label_names, *judged["given"]])]
    answers = [*names, UNSURE] if args.unsure else names
    counts = crosstab(judged["given"], judged["label"])
    confusion = torch.tensor(counts.reindex(names, columns=answers, fill_value=0).to_numpy())
    sure = judged[judged["label"].isin(names)]
    errors = sure[sure["label"] != sure["given"]].fillna({"cut": False}).rename_axis("row")
    errors = errors.sort_values("probability", ascending=False, kind="stable")
    wrong = errors[:10].reset_index().to_dict("records")  # or the label is wrong
    best = judged["probabilities"].map(lambda p: max(p, key=p.get))
    fate, tried = (best == judged["given"]).map({True: "found", False: "missed"}), []
    limits = {0, 50, 60, 70, 80, 90, 95, 99, args.unsure}
    for limit in sorted(limits if args.unsure or len(model.label_names) == 2 else ()):
        fates = crosstab(judged["given"], fate.where(judged["probability"] >= limit / 100, UNSURE))
        fates = fates.reindex(names, columns=["found", "missed", UNSURE], fill_value=0)
        right, missed, _ = map(int, fates.sum())
        tried.append({"unsure_below": limit, "answered": right + missed, "right": right})
        tried[-1] |= {"given": fates.to_dict("index")}
    if args.json:
        found = {"model": model.name, "correct": 0, "total": 0, "unsure": len(judged) - len(sure)}
        found |= score(confusion) if len(sure) else {}
        found |= {"label_names": names, "confusion": confusion.tolist(), "thresholds": tried}
        return json.dumps(found | {"surest_mistakes": wrong})
    told = f"{len(judged) - len(sure):,} unsure, {len(errors):,} wrong, the surest (row 1: header)"
    said = [f"{model.name}: {len(judged):,} sentences, {told}:"]
    for one in wrong:
        label, given, text = (visible(one[key], 80) for key in ("label", "given", "text"))
        percent = f"{100 * one['probability']:.1f} %"
        said.append(f"  row {one['row']}, given {given}, answered {label} {percent} | {text}")
    if tried:
        table = json_normalize(tried, sep=" ")
        table.insert(3, "right, %", (100 * table.right / table.answered).round(1))
        table = table.astype(object).T[: 4 if len(names) > 10 else None]
        said.append(table.rename(visible).to_string(header=False, na_rep="-"))
    if len(names) > 10 and wrong:
        pairs = errors[["given", "label"]].map(visible).value_counts()[:10]
        said.append(pairs.rename_axis(["given", "answered"]).to_string())
    if len(sure):
        said.append(report_labels(confusion, names) + ", of the answered" * (len(sure) < len(judged)))
    return "\n".join(said)


def sign_test(one: int, other: int) -> float:
    """The chance that equally good models differ at least as much."""
    fewer = torch.arange(min(one, other) + 1, dtype=torch.float64)
    coins = torch.distributions.Binomial(one + other, torch.tensor(0.5).double())
    return min(1.0, 2 * coins.log_prob(fewer).exp().sum().item())


def write_answers(models: list[Model], args: Namespace, texts=None, table=None, given=()) -> list:
    """Each model's answers to --file or a pipe; --output gets the rows with them."""
    import pandas

    if texts is None:
        parts, table = read_texts(models, args)
        texts = [*chain(*parts)]
    table = pandas.DataFrame({"text": texts}, dtype=str) if table is None else table
    answers = [[{"label": None, "probability": None}] * len(table) for _ in models]

    def ask() -> None:
        for found, model in zip(answers, models, strict=True):
            found[:] = chain(*(model(chunk, args.unsure) for chunk in chunks(texts)))

    def save(path: Path) -> None:
        whole = table
        for i, (model, found) in enumerate(zip(models, answers, strict=True)):
            found = pandas.DataFrame(found, table.index, ["label", "probability"], dtype=object)
            if given:
                labels = given[i].reindex(table.index + 1).set_axis(table.index)
                agrees = (found["label"] == labels).astype(object)
                found["agrees"] = agrees.where(labels.notna(), None)
            if len(models) > 1:
                found = found.add_suffix(f" {model.name}")
            while table.columns.isin(found.columns).any():
                found = found.add_prefix("model_")
            whole = pandas.concat([whole, found], axis=1)
        with refusing(f"--output {args.output} cannot hold this", "name a .jsonl file"):
            write_table(path, table, whole, args)

    def write(temporary: Path) -> None:
        save(temporary)  # a trial, still without answers
        ask()
        save(temporary)
        if args.output.exists():
            raise InputError(f"--output {args.output} exists by now; name a new file")

    if args.output:
        write_file(args.output, write)
        print(f"saved {args.output}", file=sys.stderr if args.json else sys.stdout)
    else:
        ask()
    return answers


def write_table(path: Path, table, whole, args: Namespace) -> None:
    """Write a table with its answers in the format of --output."""
    import pandas
    from pyarrow import Schema, Table, field, parquet

    suffix, source = args.output.suffix.lower(), str(args.file).lower().removesuffix(".gz")
    if suffix == ".parquet":  # with the types and names of --file
        schema = Schema.from_pandas(table, preserve_index=False).remove_metadata()
        if source.endswith(suffix):
            schema = parquet.ParquetDataset(args.file).schema
        kinds = cycle(["string", "float64", "bool"][: 3 if args.label_column else 2])
        for name, kind in zip(whole.columns[len(schema) :], kinds, strict=False):
            schema = schema.append(field(name, kind))
        whole = whole.set_axis(schema.names, axis=1)  # with their spaces
        whole = Table.from_pandas(whole, schema, preserve_index=False)
        return parquet.write_table(whole.replace_schema_metadata(schema.metadata), path)
    columns = (column.tolist() for _, column in whole.items())  # two may have one name
    plain = pandas.DataFrame(dict(enumerate(columns)), dtype=object)
    if suffix != ".jsonl" or not source.endswith((".json", ".jsonl")):
        plain = plain.where(plain.notna(), None)
    rows = plain.itertuples(index=False, name=None)
    encoding = "utf-8-sig" if suffix == ".csv" and table.attrs.get("mark") else "utf-8"
    with open(path, "w", encoding=encoding, newline="") as file:
        if suffix == ".jsonl":
            for row in rows:  # NA: what a row of a JSON file lacks
                row = {name: x for name, x in zip(whole, row, strict=True) if x is not pandas.NA}
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            return
        how = {"delimiter": table.attrs.get("separator", ",") if source.endswith(".csv") else ","}
        if suffix == ".tsv":  # as GLUE writes it: a quote character is text
            how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
        # Its own line end is \r\n, so it quotes or refuses both characters
        unix = Namespace(write=lambda line: file.write(line.removesuffix("\r\n") + "\n"))
        header = [*table.attrs.get("header", table), *whole.columns[len(table.columns) :]]
        csv.writer(unix, **how).writerows(chain([header], rows))


def serve(models: list[Model], args: Namespace) -> None:
    """Open a page: a sentence and its words, or a file and its answers."""
    folder, facts = tempfile.TemporaryDirectory(), models[0].facts  # its files go with the page
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder.name}
    with refusing("--web needs Gradio", "pip install -r tests/requirements-web.txt"):
        import gradio
    ours = rf"(--output )?{re.escape(folder.name)}/\w+/|(;|, or)? ([Ss]ee|say) --\w+-column.*"

    def ask(text: str) -> list:
        return [as_html(model(text, args.unsure, explained=True)[0], model) for model in models]

    def answer_file(name: str) -> list:
        own = {"file": Path(name), "label_column": facts.get("label_column")}
        own = Namespace(**vars(args) | own)
        suffix = next((one for one in ENDINGS if f"{one}." in f"{name.lower()}."), ".csv")
        own.output = Path(tempfile.mkdtemp(dir=folder.name), f"answers{suffix}")
        try:
            with redirect_stderr(io.StringIO()) as notes:
                judged = judge(models, own) if is_table(own.file) else ""
        except InputError as error:
            judged, own.label_column = f"not judged: {error}", None
        try:
            if not own.output.exists():
                write_answers(models, own)
        except InputError as error:
            raise gradio.Error(re.sub(ours, "", str(error)), print_exception=False) from error
        said = escape(re.sub(ours, "", f"{judged}\n{notes.getvalue()}"))
        rows = read_file(own.output)[:10].astype(str).iloc[:, ::-1]  # for a phone, answers first
        return [str(own.output), rows, f"<pre style='overflow-x: auto'>{said}</pre>"]

    with gradio.Blocks(title="LoRA playground") as page, folder:
        about = [f"<p>{escape(describe_model(model))}</p>" for model in models]
        gradio.HTML(f"<h2>{escape(listed(models[0].label_names, 10))}?</h2>{''.join(about)}")
        text = gradio.Textbox(label="A sentence", submit_btn=True, autofocus=True)
        parts = [gradio.HTML() for _ in models]
        text.submit(ask, text, parts, concurrency_id="models")
        gradio.HTML("Beside a word: its part of the answer's log-odds; green for it, red against.")
        wanted = f"Lines, or a table with a column {facts.get('text_column', 'text')!r}"
        file = gradio.File(label=wanted, file_types=[".txt", ".gz", *FORMATS])
        found = [gradio.File(label="With answers"), gradio.Dataframe(label="First rows"), gradio.HTML()]
        file.upload(answer_file, file, found, concurrency_id="models")
        share = args.share or "COLAB_RELEASE_TAG" in os.environ  # the browser is elsewhere
        where = {"server_name": "127.0.0.1", "server_port": args.port, "share": share}
        with refusing(f"--port {args.port} cannot be used", "name another"):
            page.launch(**where, inbrowser=sys.stderr.isatty(), footer_links=[])


def as_html(answer: dict, model: Model) -> str:
    """The answer, the likeliest labels as bars, and the words in colour."""
    shown = [f"<div>{escape(model.name)}</div><h3>{escape(in_words(answer | {'words': []}, model))}</h3>"]
    for label, p in sorted(answer["probabilities"].items(), key=lambda one: -one[1])[:5]:
        shown.append(f"<div><meter value={p}></meter> {escape(visible(label))} {100 * p:.1f} %</div>")
    for word, effect in answer.get("words", []):
        colour = f"rgb({'0 160 0' if effect > 0 else '220 0 0'} / {min(abs(effect) / 4, 0.8):.2f})"
        word = f"{escape(visible(word, 40))} <small>{effect:+z.1f}</small>"
        shown.append(f"<span style='background: {colour}; padding: 2px'>{word}</span>")
    return "\n".join(shown)


def write_glue(models: list[Model], args: Namespace) -> None:
    """Write GLUE's submission file for SST-2."""
    (model,) = models
    if len(model.label_names) != 2:
        raise InputError(f"--glue: SST-2 has 2 labels, {model.path} has {len(model.label_names)}")
    with refusing(f"{args.file or GLUE[0]} cannot be read", "give index and sentence in --file"):
        if not args.file:
            use_cache_if_offline()
            file = {"filename": "sst2/test-00000-of-00001.parquet", "revision": GLUE[2]}
            args.file = Path(hf_hub_download(GLUE[0], **file, repo_type="dataset"))
        texts, table = read_texts(models, args)
        numbers = table["index" if "index" in table else "idx"]
    found = torch.cat([model.logits(chunk)[0] for chunk in texts]).argmax(dim=1)
    rows = numbers.to_frame("index").assign(prediction=found.tolist())
    write_file(args.glue, lambda temporary: rows.to_csv(temporary, sep="\t", index=False))
    print(f"saved {len(rows):,} predictions as {args.glue}")


def card(model: Model) -> str:
    """What README.md says of an exported model."""
    facts, record = model.facts, model.facts["record"]
    name = Path(facts["base"]).name if Path(facts["base"]).exists() else facts["base"]
    return f"""\
---
library_name: transformers
pipeline_tag: text-classification
---
# Which of these labels?
    {listed(model.label_names)}
Ask `pipeline("text-classification", FOLDER, truncation=True)`; it reads {model.max_length} tokens.
- Base model: {visible(name)}; merged: LoRA of rank {facts["r"]} and alpha {facts["alpha"]:g}
- Training: {visible(model.data.name)}, epochs: {len(record["epochs"])}, rate {record["settings"]["lr"]:g}
- Validation: {model.accuracy}; temperature {record["temperature"]:.2f}
- Versions: {listed([f"{key} {version}" for key, version in record["versions"].items()])}
- Licence: yours to choose, if base model and data allow
"""


def export(models: list[Model], args: Namespace) -> None:
    """Write the merged model for transformers and a card, if it answers alike."""
    (merged,) = models
    tokenizer = merged.base.tokenizer
    tokenizer.model_max_length = merged.max_length  # where truncation=True cuts
    texts = ["A warm, funny film.", "It never ends.", "so long " * merged.max_length]
    expected, _ = load(merged.path, args.base, merged=False).logits(texts)

    def write(temporary: Path) -> None:
        merged.base.model.save_pretrained(temporary)
        if tokenizer.is_fast:  # for other readers of its file, too
            tokenizer.backend_tokenizer.enable_truncation(merged.max_length)
        tokenizer.save_pretrained(temporary)
        with suppress(LookupError):  # an old file knows less
            (temporary / "README.md").write_text(card(merged), encoding="utf-8")
        pipeline = transformers.pipeline("text-classification", str(temporary), device="cpu")
        off = (replace(merged, base=pipeline).logits(texts)[0] - expected).abs().max().item()
        if not off <= 1e-3:  # NaN is not small
            raise InputError(f"--export: merging {merged.path} moves its logits by {off:.1e}; train again")
        print(f"the merged model's logits differ by at most {off:.1e}")

    write_folder(args.export, write)
    print(f"saved {args.export}")


TABLE = {"file", "text_column", "unsure", "precision"}
JOBS = {  # what replaces printing the answers, and the flags that go with it
    "label_column": (lambda *job: print(judge(*job)), TABLE | {"json", "output"}),
    "output": (write_answers, TABLE),
    "glue": (write_glue, {"file", "text_column"}),
    "web": (serve, TABLE - {"file"} | {"port", "share"}),
    "export": (export, set()),
    None: (None, TABLE | {"sentences", "json", "explain"}),
}


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    job = check_flags(args)
    is_exact = not args.file or args.explain or job == "glue"
    is_typed = not (args.sentences or args.file) and sys.stdin and sys.stdin.isatty()
    if job == "output" and is_typed:
        raise InputError("--output needs a --file or a pipe")
    precision = args.precision or ("fp32" if is_exact else "auto")
    models = load_all(choose_models(args), args.base, precision)
    for model in models:
        model([], args.unsure)  # may refuse
    if sys.stdout.isatty() and not args.json:
        print(*map(describe_model, models), sep="\n")
    if args.explain and not (job or args.json):
        note("after a word: what it adds to the log-odds of the answer; 0.7 doubles the odds")
    if job:
        JOBS[job][0](models, args)
    elif is_typed:
        prompt(models, args)
    else:
        texts, _ = read_texts(models, args, sys.stdout.isatty() or None)  # no bar there
        answer_all(models, texts, args, headed=len(args.sentences) != 1 or bool(args.file))


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.usage, switch = "%(prog)s [options] [SENTENCE ...]", {"action": "store_true"}
    add = parser.add_argument_group("ask").add_argument
    add("sentences", nargs="*", metavar="SENTENCE", help="(standard input, or a prompt)")
    add("--model", type=Path, action="append", default=[], metavar="PATH", help="(the newest)")
    add("--base", metavar="PATH", help="of the base model (where it lay in training)")
    add("--json", **switch, help="print one JSON object a line")
    add("--explain", **switch, help="show what each word does")
    add("--unsure", type=float, default=0.0, metavar="N", help='"unsure" below N percent (0: never)')
    add("--precision", choices=["auto", "fp32", "bf16"], help="(auto for --file, else fp32)")
    add = parser.add_argument_group("answer a table, or judge by it").add_argument
    add("--file", type=Path, help=f"lines (-: standard input) or a table ({', '.join(FORMATS)})")
    add("--text-column", metavar="NAME", help="(as in training, or text, ...)")
    add("--output", type=Path, metavar="FILE", help=f"rows and answers ({', '.join(ENDINGS)})")
    add("--label-column", metavar="NAME", help="compare with this column of --file")
    add = parser.add_argument_group("page and export").add_argument
    add("--web", **switch, help="open a page on this machine")
    add("--port", type=int, metavar="N", help="of the page (7860 or a later one)")
    add("--share", **switch, help="by a public link, too")
    add("--export", type=Path, metavar="FOLDER", help="write the merged model")
    add("--glue", type=Path, metavar="FILE", help="write GLUE's SST-2 submission")
    return parser


def check_flags(args: Namespace) -> str | None:
    """The job that the flags ask for."""
    given = {name for name, value in vars(args).items() if value not in (None, False, [], 0)}
    job = next((name for name in JOBS if name in given), None)
    if extra := sorted(given - JOBS[job][1] - {job, "model", "base"}):
        first, *others = [f"--{name.replace('_', '-')}" for name in (job or "web", *extra)]
        others = listed(others).replace("--sentences", "SENTENCE")
        raise InputError(f"{first} {'does not go with' if job else 'is missing for'} {others}; see --help")
    if job == "label_column" and not (args.label_column and is_table(args.file)):
        raise InputError(f"--label-column {args.label_column!r} needs a table in --file")
    if args.output and args.output.suffix.lower() not in ENDINGS:
        raise InputError(f"--output {args.output}: end its name in {listed(ENDINGS)}")
    for flag in ("output", "glue", "export"):
        if path := getattr(args, flag):
            hold(path)
            with refusing(f"--{flag} {path} cannot be made", "name a new one"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(exist_ok=False)
                path.unlink()
    return job


def choose_models(args: Namespace) -> list[Path]:
    """The models to ask: those given, else the one trained last."""
    found, folder = [*{path.resolve(): path for path in args.model}.values()], Path("model")
    if not found:
        files = [*folder.glob("*.pt"), *folder.glob("[!.]*/lora_peft.json")]
        newest = sorted(filter(Path.is_file, files), key=os.path.getmtime)[-1:]
        found = [file if file.suffix == ".pt" else file.parent for file in newest]
    if not found:
        raise InputError("no trained model in ./model; train one, or see --model")
    if (args.glue or args.export) and len(found) > 1:
        raise InputError(f"--glue and --export take one --model; choose among {listed(found)}")
    return found


if __name__ == "__main__":
    run(main)
