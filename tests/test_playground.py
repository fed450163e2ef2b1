"""playground.py: what people and other programs type, pipe and press, and what they get."""

import contextlib
import json
import os
import pty
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
from conftest import BAD, GOOD, PEFT, SCRATCH, ask, ask_json, flags
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lora_peft
import lora_scratch
import playground
from lora_scratch import InputError, Tokens

SCRIPT = playground.__file__
FORMS = ["--json", "--explain"]
TEXTS = [*GOOD.split("|"), *BAD.split("|"), "the film", "a", "great " * 60]


def unmerged(model: str, texts: list[str]) -> torch.Tensor:
    """The probabilities of the trained model before merging, a text at a time."""
    load = lora_peft.load_adapter if Path(model).is_dir() else lora_scratch.load_checkpoint
    base, facts = load(model)
    ids = [base.tokenizer(text, truncation=True, max_length=facts["max_length"])["input_ids"] for text in texts]
    return lora_scratch.predict(base.model, Tokens.from_lists(ids), 1).softmax(dim=1)


class Child:
    """playground.py as a program, in a fork of this process: nothing has to be imported again.

    Standard output and standard error come back together, so that a test of the whole output sees a traceback too.
    """

    def __init__(self, *arguments: object, terminal: bool = False):
        inside, self.write_to = os.pipe()
        self.read_from, outside = os.pipe()
        if terminal:
            self.pid, self.write_to = pty.fork()
            self.read_from = self.write_to
        else:
            self.pid = os.fork()
        if self.pid == 0:
            if not terminal:
                for source, target in ((inside, 0), (outside, 1), (outside, 2)):
                    os.dup2(source, target)
                os.closerange(3, 256)  # else the child itself holds the other end of its standard input open
            self.run([SCRIPT, *map(str, arguments)])
        os.close(inside)
        os.close(outside)
        self.output = b""

    def run(self, arguments: list[str]) -> None:
        code, os.environ["TOKENIZERS_PARALLELISM"] = 1, "false"
        try:
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
            sys.argv = arguments
            runpy.run_path(SCRIPT, run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def type(self, text: str) -> None:
        os.write(self.write_to, text.encode())

    def read_until(self, text: str, count: int = 1) -> None:
        while self.output.count(text.encode()) < count:
            more = os.read(self.read_from, 65536)
            assert more, self.output
            self.output += more

    def read_until_prompt(self) -> None:
        """Until the prompt after the last answer is there: keys that come before it do not reach it as such."""
        while b"> " not in self.output[self.output.rindex(b" %") :]:
            self.output += os.read(self.read_from, 65536)

    def leave(self, keys: str) -> None:
        """Type the keys, as a person does: again after a second, for Ctrl-C between two calls of readline is lost."""
        for _ in range(30):
            self.type(keys)
            for _ in range(10):
                time.sleep(0.1)
                if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    return

    def finish(self) -> tuple[int, str]:
        """Exit code, and all that was printed."""
        with contextlib.suppress(OSError):  # a terminal whose other side is gone says so with an error
            while more := os.read(self.read_from, 65536):
                self.output += more
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), self.output.decode()


@pytest.fixture
def start() -> Iterator:
    """Starts a Child; whatever a failed test leaves running is killed."""
    children = []

    def start(*arguments: object, terminal: bool = False) -> Child:
        children.append(Child(*arguments, terminal=terminal))
        return children[-1]

    yield start
    for child in children:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)


# --- Answers ---


def test_every_adapter_answers_on_a_line_of_its_own(here: Path) -> None:
    scratch, peft = ask("a great and funny film").splitlines()
    positive = [100 * unmerged(model, ["a great and funny film"])[0, 1].item() for model in (SCRATCH, PEFT)]
    assert scratch == f"LoRA_scratch  Positive  {positive[0]:.1f} %" and positive[0] > 80
    assert peft == f"LoRA_peft     Positive  {positive[1]:.1f} %" and positive[1] > 80


def test_several_sentences_stand_above_their_answers(here: Path) -> None:
    lines = ask("--model", SCRATCH, "I loved it", " ", "\x1b[31m hated it\n" + "hated " * 50).splitlines()
    assert lines[0] == "I loved it" and lines[1].startswith("  LoRA_scratch  Positive  ")
    assert lines[3] == "  LoRA_scratch  (blank)"
    assert (
        lines[4].startswith("\ufffd[31m hated it\ufffdhated hated") and lines[4].endswith("…") and len(lines[4]) == 200
    )
    assert lines[5].startswith("  LoRA_scratch  Negative") and len(lines) == 6


def test_two_models_of_a_kind_go_by_their_paths(here: Path, tmp_path: Path) -> None:
    copy = shutil.copy(SCRATCH, tmp_path / "copy.pt")
    names = [answer["model"] for answer in ask_json("--model", SCRATCH, "--model", copy, "--model", PEFT, "a film")]
    assert names == [SCRATCH, str(copy), "LoRA_peft"]


@pytest.mark.parametrize("model", [SCRATCH, PEFT])
def test_answers_come_in_order_and_equal_the_unmerged_model(model: str, here: Path, tmp_path: Path) -> None:
    texts = random.Random(0).choices(TEXTS, k=1200)  # more than are read at a time
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    answers = ask_json("--model", model, "--file", tmp_path / "texts.txt", "--batch-size", "7")
    assert [answer["text"] for answer in answers] == texts
    expected = dict(zip(TEXTS, unmerged(model, TEXTS).tolist(), strict=True))
    for answer in answers:
        found = list(answer["probabilities"].values())
        assert found == pytest.approx(expected[answer["text"]], rel=0, abs=1e-5)
        assert answer["label"] == ("negative", "positive")[found[1] > found[0]]
    assert {answer["label"] for answer in answers} == {"negative", "positive"}


def test_label_names_come_from_the_data(tiny_base: Path, tmp_path: Path) -> None:
    rows = "".join(f"a {word} film,{label}\n" for word, label in (("warm", "ok"), ("great", "good"), ("dull", "bad")))
    (tmp_path / "reviews.csv").write_text("review,stars\n" + rows * 10, encoding="utf-8")
    more = ["--text-column", "review", "--label-column", "stars", "--lr", 0.01, "--epochs", 20]
    more += ["--targets", "all-linear", "--output", tmp_path / "stars.pt"]
    lora_scratch.main(flags(tiny_base, tmp_path / "reviews.csv", *more))
    texts = ["a great film", "a dull film", "a warm film"]
    answers = ask_json("--model", tmp_path / "stars.pt", *texts)
    best = unmerged(str(tmp_path / "stars.pt"), texts).argmax(dim=1).tolist()
    assert [answer["label"] for answer in answers] == [["bad", "good", "ok"][i] for i in best] and len(set(best)) > 1
    assert all(list(answer["probabilities"]) == ["bad", "good", "ok"] for answer in answers)
    assert all(abs(sum(answer["probabilities"].values()) - 1) < 1e-5 for answer in answers)
    with pytest.raises(InputError, match="3"):
        ask("--model", tmp_path / "stars.pt", "--glue", tmp_path / "out.tsv", "--file", tmp_path / "reviews.csv")


# --- Where the text comes from ---


def test_json_is_all_that_is_printed_and_peft_is_not_needed(adapters: Path) -> None:
    """The one real process with a pipe: imports, warnings and encodings as users have them."""
    code = "import runpy, sys; sys.argv[0] = sys.argv.pop(1); sys.modules['peft'] = None  # importing it now fails\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, SCRIPT, "--json", "--model", SCRATCH]
    text = "\ufeffa great film\n\n \t\r\nI hated it\x85\u2028\x00\r \x1b[31m\r\n\U0001f600 電影\n".encode() + b"caf\xe9"
    environment = os.environ | {"PYTHONPATH": str(Path(SCRIPT).parent)}
    done = subprocess.run(command, input=text, capture_output=True, cwd=adapters, env=environment, check=False)
    told = b"note: standard input: line 6 is not UTF-8; read as Windows-1252: is that right?\n"
    assert (done.returncode, done.stderr) == (0, told)
    assert done.stdout.isascii() and done.stdout.endswith(b"}\n")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    hated = "I hated it\x85\u2028\x00\r \x1b[31m"
    assert [answer["text"] for answer in answers] == ["a great film", "", " \t", hated, "\U0001f600 電影", "caf\xe9"]
    assert all(list(answer) == ["text", "label", "probabilities", "model"] for answer in answers)
    assert [answer["label"] for answer in answers[:4]] == ["positive", None, None, "negative"]
    assert answers[1]["probabilities"] == {} and answers[0]["probabilities"].keys() == {"negative", "positive"}


def test_a_pipe_without_json_is_answered_under_each_line(here: Path, start) -> None:
    child = start("--model", SCRATCH)
    child.type("I loved it\nI hated it")
    os.close(child.write_to)
    code, output = child.finish()
    assert code == 0 and output == ask("--model", SCRATCH, "I loved it", "I hated it")


def test_sentences_as_arguments_leave_standard_input_unread(here: Path, start) -> None:
    code, output = start("--model", SCRATCH, "I loved it").finish()  # the pipe into it is open and stays empty
    assert code == 0 and output == ask("--model", SCRATCH, "I loved it")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.csv", 'id,review\n1,"I loved it, really"\n2,null\n3,""\n'),
        ("r.tsv", "id\treview\n1\tI loved it, really\n2\tnull\n3\t\n"),
        ("r.jsonl", '{"review": "I loved it, really"}\n{"review": "null"}\n{"review": ""}\n'),
        ("r.text", "\ufeffI loved it, really\r\nnull\n\n"),
    ],
)
def test_every_kind_of_file_is_read(name: str, content: str, here: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode())
    arguments = ["--model", SCRATCH, "--file", tmp_path / name, "--text-column", "review"]
    assert [answer["text"] for answer in ask_json(*arguments)] == ["I loved it, really", "null", ""]
    assert [answer["text"] for answer in ask_json(*arguments, "first")][:2] == ["first", "I loved it, really"]


def test_a_table_without_the_column_or_with_no_text_in_it_is_refused(here: Path, tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("id,remark\n1,good\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"r\.csv: no column 'sentence' but id, remark; see --text-column"):
        ask("--model", SCRATCH, "--file", tmp_path / "r.csv")
    (tmp_path / "r.jsonl").write_text('{"sentence": 5}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"r\.jsonl: row 1: 'sentence' is not text but 5"):
        ask("--model", SCRATCH, "--file", tmp_path / "r.jsonl")
    for missing in ("none.txt", "none.csv", "."):
        with pytest.raises(InputError, match=str(tmp_path)):
            ask("--model", SCRATCH, "--file", tmp_path / missing)


# --- The prompt, and being interrupted ---


@pytest.mark.parametrize("leave", ["exit\n", "\x04", "\x03"])
def test_the_prompt_answers_until_exit_ctrl_d_or_ctrl_c(leave: str, here: Path, start, monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    child = start("--model", SCRATCH, terminal=True)
    child.read_until("leaves.")
    child.type("\n  \nI loved it\n")
    child.read_until(" %")
    child.read_until_prompt()
    child.type("I hated it\n")
    child.read_until(" %", count=2)
    child.read_until_prompt()
    child.type("\x1b[A\x1b[A\n")  # twice the arrow up: the line before the last
    child.read_until(" %", count=3)
    child.read_until_prompt()
    child.leave(leave)
    code, output = child.finish()
    assert code == 0 and "Traceback" not in output and "error" not in output
    assert output.count("Positive") == 2 and output.count("Negative") == 1 and output.count("blank") == 0


def test_ctrl_c_between_answers_ends_without_a_traceback(here: Path, start) -> None:
    child = start("--model", SCRATCH, "--json")
    child.type("I loved it\n" * 1024)
    child.read_until("}\n", count=1024)  # answered; now it waits for more
    os.kill(child.pid, signal.SIGINT)
    code, output = child.finish()
    assert code == 130 and output.count("\n") == 1024


def test_ctrl_c_during_the_imports_ends_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, SCRIPT, "a film"], env=environment, **pipes) as process:
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == (b"", b"") and process.returncode == -signal.SIGINT


def test_a_closed_pipe_is_no_error(here: Path, tmp_path: Path, start) -> None:
    (tmp_path / "many.txt").write_text("I loved it\n" * 3000, encoding="utf-8")
    child = start("--model", SCRATCH, "--json", "--file", tmp_path / "many.txt")
    child.read_until("}\n")
    os.close(child.read_from)
    child.read_from = os.open(os.devnull, os.O_RDONLY)
    assert child.finish()[0] == 141


# --- Long and strange text ---


def test_text_beyond_the_limit_is_cut_and_the_answer_says_so(here: Path) -> None:
    whole, cut = " ".join(["great"] * 126), " ".join(["great"] * 127)  # and two tokens around them
    answers = ask_json("--model", SCRATCH, whole, cut)
    assert "cut" not in answers[0] and answers[1]["cut"] is True
    assert answers[0]["probabilities"] == answers[1]["probabilities"]
    first, second = ask("--model", SCRATCH, whole, cut).splitlines()[1::2]
    assert second == f"{first}  (cut to 128 tokens)"


@pytest.mark.parametrize(
    "text", ["hated " * 20_000, " " * 20_000 + "hated", "x" * 500_000, "poor" * 30 + " hated" * 5000, "!" * 30_000]
)
def test_very_long_text_is_answered_like_its_beginning(text: str, here: Path) -> None:
    started = time.monotonic()
    answer = ask_json("--model", SCRATCH, text)[0]
    assert time.monotonic() - started < 10
    assert list(answer["probabilities"].values()) == pytest.approx(unmerged(SCRATCH, [text])[0].tolist(), abs=1e-5)
    assert answer["text"] == text


@settings(max_examples=60, deadline=None, database=None)
@given(text=st.text(st.characters(exclude_categories=[]), max_size=300), form=st.sets(st.sampled_from(FORMS)))
def test_any_text_is_answered(text: str, form: set[str], adapters: Path) -> None:
    output = ask("--model", adapters / SCRATCH, *form, "--", text)
    if "--json" in form:
        answer = json.loads(output)
        assert answer["text"] == "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
        assert answer["label"] in (("negative", "positive") if text.strip() else (None,))
    assert output.count("\n") == (2 if form == {"--explain"} and text.strip() else 1)
    assert all(line.isprintable() for line in output.removesuffix("\n").split("\n"))


@settings(max_examples=50, deadline=None, database=None)
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".txt", ".txt", ".csv", ".tsv", ".jsonl"]))
def test_any_file_is_answered_or_refused(content: bytes, suffix: str, adapters: Path) -> None:
    path = adapters / f"any{suffix}"
    path.write_bytes(content if suffix == ".txt" else b"sentence\n" + content)
    try:
        output = ask("--json", "--model", adapters / SCRATCH, "--file", path)
    except InputError as error:
        assert suffix != ".txt" and str(path) in str(error) and "\n" not in str(error)
    else:
        assert all("label" in json.loads(line) for line in output.splitlines())
        if suffix == ".txt":
            marked = content[:2] in (b"\xff\xfe", b"\xfe\xff")
            text = content.decode("utf-16" if marked else "utf-8-sig", errors="replace")  # as `grep -c ''` counts lines
            assert output.count("\n") == text.count("\n") + (text != "" and not text.endswith("\n"))


# --- Explanations ---


def test_explain_gives_the_largest_effect_to_the_word_that_decides(here: Path) -> None:
    text = "it hated the film"
    answer = ask_json("--model", SCRATCH, "--explain", text)[0]
    words = dict(answer["words"])
    assert list(words) == text.split() and max(words, key=words.get) == "hated" and words["hated"] > 0.3
    whole, *masked = unmerged(SCRATCH, [text, "[MASK] hated the film", "it [MASK] the film"])[:, 0].tolist()
    assert answer["label"] == "negative"
    assert [words["it"], words["hated"]] == pytest.approx([whole - p for p in masked], abs=1e-5)
    lines = ask("--model", SCRATCH, "--explain", text).splitlines()
    assert lines[1].split()[4:6] == ["the", f"{100 * words['the']:+z.1f}"] and "\x1b" not in lines[1]
    assert ask_json("--model", SCRATCH, "--explain", " ")[0]["label"] is None


def test_explain_stops_where_the_model_stops_reading(here: Path) -> None:
    words = ask_json("--model", SCRATCH, "--explain", "great " * 5000)[0]["words"]
    assert [word for word, _ in words] == ["great"] * 126
    words = ask_json("--model", SCRATCH, "--explain", "great, " * 100)[0]["words"]  # a word and a comma: two tokens
    assert len(words) == 63


def test_explain_colours_a_terminal(here: Path, start) -> None:
    code, output = start("--model", SCRATCH, "--explain", "it hated the film", terminal=True).finish()
    assert code == 0 and "\x1b[32mhated +" in output and "\x1b[32mthe" not in output
    assert ask("--model", SCRATCH, "--explain", "it hated the film").strip() in (
        output.replace("\r", "").replace("\x1b[32m", "").replace("\x1b[31m", "").replace("\x1b[0m", "")
    )


# --- Files out ---


def test_glue_writes_a_row_for_every_sentence(here: Path, tmp_path: Path) -> None:
    rows = [(7, "I loved it"), (8, 'I "hated it'), (9, "a great film"), (3, "I hated it")]
    test_split = "index\tsentence\n" + "".join(f"{i}\t{text}\n" for i, text in rows)
    (tmp_path / "test.tsv").write_text(test_split, encoding="utf-8")
    output = ask("--model", PEFT, "--glue", tmp_path / "new" / "SST-2.tsv", "--file", tmp_path / "test.tsv")
    written = (tmp_path / "new" / "SST-2.tsv").read_bytes()
    best = unmerged(PEFT, [text for _, text in rows]).argmax(dim=1).tolist()
    assert written.decode() == "index\tprediction\n" + "".join(
        f"{i}\t{p}\n" for (i, _), p in zip(rows, best, strict=True)
    )
    assert set(best) == {0, 1} and "4 predictions" in output


def test_glue_takes_one_model_and_the_right_file(here: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--model among {SCRATCH}, {PEFT}"):
        ask("--glue", tmp_path / "SST-2.tsv")
    (tmp_path / "test.tsv").write_text("sentence\nI loved it\n", encoding="utf-8")
    with pytest.raises(InputError, match="no column 'index'"):
        ask("--model", SCRATCH, "--glue", tmp_path / "SST-2.tsv", "--file", tmp_path / "test.tsv")
    with pytest.raises(InputError, match=r"\.tsv"):
        ask("--model", SCRATCH, "--glue", tmp_path / "SST-2.tsv", "--file", tmp_path / "test.txt")
    with pytest.raises(InputError, match="leave them out"):
        ask("--model", SCRATCH, "--glue", tmp_path / "SST-2.tsv", "I loved it")
    with pytest.raises(InputError, match="something else stands there"):
        ask("--model", SCRATCH, "--glue", tmp_path / "test.tsv", "--file", tmp_path / "test.tsv")
    assert not (tmp_path / "SST-2.tsv").exists()


def test_glue_without_the_hub_names_the_file_flag(here: Path, tmp_path: Path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(playground, "use_cache_if_offline", lambda: asked.append(True))  # the suite is offline anyway
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "empty")
    with pytest.raises(InputError, match="--file") as error:
        ask("--model", SCRATCH, "--glue", tmp_path / "SST-2.tsv")
    assert asked and "\n" not in str(error.value) and not (tmp_path / "SST-2.tsv").exists()


def test_glue_asks_the_hub_for_the_pinned_test_split(here: Path, tmp_path: Path, monkeypatch) -> None:
    table = datasets.Dataset.from_dict({"sentence": ["I hated it", "I loved it"], "idx": [0, 1]})
    calls = []
    monkeypatch.setattr(playground, "use_cache_if_offline", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or table)
    ask("--model", SCRATCH, "--glue", tmp_path / "SST-2.tsv")
    assert (tmp_path / "SST-2.tsv").read_text() == "index\tprediction\n0\t0\n1\t1\n"
    assert calls == [(("nyu-mll/glue", "sst2"), {"revision": lora_scratch.GLUE[2], "split": "test"})]


def test_export_runs_in_a_pipeline_without_this_project(here: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()  # an empty folder may be there
    for model, folder in ((SCRATCH, tmp_path / "new" / "a"), (PEFT, tmp_path / "b")):
        output = ask("--model", model, "--export", folder)
        assert float(output.split()[-1]) < 1e-5
        files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
        assert {file.name for file in folder.iterdir()} == files and len(list(folder.parent.glob(".*"))) == 0
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert config["architectures"] == ["DistilBertForSequenceClassification"]
        assert config["id2label"] == {"0": "negative", "1": "positive"}
        assert config["label2id"] == {"negative": 0, "positive": 1}
        assert not any("lora" in name or "base_layer" in name for name in load_file(folder / "model.safetensors"))
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert tokenizer["model_max_length"] == 128
    code = """if True:
        import json, sys
        sys.modules.update(peft=None, lora_scratch=None, lora_peft=None, playground=None)
        from transformers import pipeline
        for folder in sys.argv[2:]:
            run = pipeline("text-classification", folder, truncation=True)
            print(json.dumps(run(json.loads(sys.argv[1]), top_k=None)))"""
    texts = [*TEXTS, "great " * 200]
    command = [sys.executable, "-I", "-c", code, json.dumps(texts), tmp_path / "new" / "a", tmp_path / "b"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    for line, model in zip(done.stdout.splitlines(), (SCRATCH, PEFT), strict=True):
        found = [{pair["label"]: pair["score"] for pair in answer} for answer in json.loads(line)]
        found = torch.tensor([[answer["negative"], answer["positive"]] for answer in found])
        assert torch.allclose(found, unmerged(model, texts), rtol=0, atol=1e-5)


def test_export_refuses_a_merge_that_changes_the_answers(here: Path, tmp_path: Path, monkeypatch) -> None:
    def wrong(layer: lora_scratch.LoRALinear) -> torch.nn.Linear:
        merged = merge(layer)
        merged.weight.data *= 1.01
        return merged

    merge = lora_scratch.LoRALinear.merge
    monkeypatch.setattr(lora_scratch.LoRALinear, "merge", wrong)
    with pytest.raises(InputError, match=r"by \d\.\de-0[1-3]; nothing is written"):
        ask("--model", SCRATCH, "--export", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_export_overwrites_nothing(here: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(InputError, match=str(tmp_path / name)):
            ask("--model", SCRATCH, "--export", tmp_path / name)
    with pytest.raises(InputError, match="--model among"):
        ask("--export", tmp_path / "new")
    with pytest.raises(InputError, match="leave them out"):
        ask("--model", SCRATCH, "--export", tmp_path / "new", "I loved it")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "file").read_text() == "mine"


# --- The right model ---


def test_a_base_that_has_moved_is_found_and_another_is_refused(here: Path, tiny_base: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_base, tmp_path / "moved")
    assert ask("--base", moved, "I loved it") == ask("I loved it")
    tensors = load_file(moved / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"] += 1e-3
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    for model in (SCRATCH, PEFT):
        with pytest.raises(InputError, match="another base"):
            ask("--model", model, "--base", moved, "I loved it")


def test_without_an_adapter_the_error_names_the_command_that_makes_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"python lora_scratch\.py makes one, with --demo in a minute"):
        ask("I loved it")


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, start) -> None:
    code, output = start("--model", tmp_path / "none.pt", "I loved it").finish()
    assert code == 2 and output.startswith("error:") and "none.pt" in output and output.count("\n") == 1
