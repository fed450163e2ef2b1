"""playground.py: what people and other programs type, pipe and press, and what they get."""

import contextlib
import gzip
import json
import os
import pty
import random
import re
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import lora_scratch
from lora_scratch import InputError

import pytest
import torch
from conftest import BAD, GOOD, PEFT, SCRATCH, as_tokens, ask, ask_json, files_of, flags, refused, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lora_peft
import playground

SCRIPT = playground.__file__
TEXTS = [*GOOD.split("|"), *BAD.split("|"), "the film", "a", "great " * 60]
ODD = "café “bon”"  # in Windows-1252, too
ROWS = ["I loved it, really", "null", ""]
LONG = ["hated " * 20_000, " " * 20_000 + "hated", "x" * 500_000, "poor" * 30 + " hated" * 5000]
CHARACTERS, FORMS = st.characters(exclude_categories=[]), st.sampled_from(["--json", "--explain"])


def unmerged(model: str, texts: list[str]) -> torch.Tensor:
    """The probabilities of the trained model before merging, a text at a time."""
    load = lora_peft.load_adapter if Path(model).is_dir() else lora_scratch.load_checkpoint
    base, facts = load(model)
    cut = {"truncation": True, "max_length": facts["max_length"]}
    tokens = as_tokens([base.tokenizer(text, **cut)["input_ids"] for text in texts])
    return lora_scratch.predict(base.model, tokens, 1).softmax(dim=1)


class Child:
    """playground.py in a fork of this process: nothing is imported again. Both outputs come together."""

    def __init__(self, *arguments: object, terminal: bool = False):
        self.end, inside = pty.openpty() if terminal else (s.detach() for s in socket.socketpair())
        self.output, self.pid = b"", os.fork()
        if self.pid == 0:
            os.login_tty(inside) if terminal else [os.dup2(inside, number) for number in (0, 1, 2)]
            os.closerange(3, 256)  # else the child itself holds the other end open
            self.run([SCRIPT, *map(str, arguments)])
        os.close(inside)

    def run(self, arguments: list[str]) -> None:
        code, os.environ["TOKENIZERS_PARALLELISM"], sys.argv = 1, "false", arguments
        lora_scratch.HELD.pop_all()  # the parent's
        try:
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
            runpy.run_path(SCRIPT, run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def read(self) -> None:
        assert select.select([self.end], [], [], 60)[0], self.output  # a test fails sooner than it hangs
        more = os.read(self.end, 65536)
        assert more, self.output
        self.output += more

    def read_until(self, text: str, count: int = 1) -> None:
        while self.output.count(text.encode()) < count:
            self.read()

    def type(self, text: str, answers: int) -> None:
        """Wait for that many answers in all, and for the prompt: keys that come before it are lost."""
        os.write(self.end, text.encode())
        self.read_until("LoRA_scratch", answers)
        while b"> " not in self.output[self.output.rindex(b"LoRA_scratch") :]:
            self.read()

    def finish(self, keys: str = "") -> tuple[int, str]:
        """Exit code and output. Keys are typed each second: Ctrl-C between two calls of readline is lost."""
        for tenth in range(300 * bool(keys)):
            if tenth % 10 == 0:
                os.write(self.end, keys.encode())
            time.sleep(0.1)
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
        with contextlib.suppress(OSError):  # from a terminal whose other side is gone
            while select.select([self.end], [], [], 60)[0] and (more := os.read(self.end, 65536)):
                self.output += more
        for tenth in range(600):
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.1 if tenth else 0)
        else:
            os.kill(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), self.output.decode()


def test_every_model_answers_on_a_line_of_its_own(here) -> None:
    text = "a great and funny film"
    lines = [line.split() for line in ask("--model", SCRATCH, "--model", PEFT, text).splitlines()]
    sure = [100 * unmerged(model, [text])[0, 1].item() for model in (SCRATCH, PEFT)]
    names = ("LoRA_scratch", "LoRA_peft")
    assert lines == [[name, "Positive", f"{p:.1f}", "%"] for name, p in zip(names, sure, strict=True)]
    assert min(sure) > 80


def test_the_model_trained_last_is_asked_and_a_terminal_says_which_it_is(here, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = [Path("model/a.pt"), Path("model/b/lora_peft.json")]
    shutil.copytree(here / PEFT, files[1].parent)
    shutil.copy(here / SCRATCH, files[0])
    Path("model/c.pt").symlink_to("gone")
    for newest, name in zip(files, ("LoRA_scratch", "LoRA_peft"), strict=True):
        for file in files:
            os.utime(file, (1e9, 1e9 - (file != newest)))
        assert ask("I loved it").startswith(name)
        head, *answers = Child("I loved it", "I hated it", terminal=True).finish()[1].splitlines()
        model = newest if newest.suffix == ".pt" else newest.parent
        parts = (str(model), "tiny_sst2", "negative, positive", "2001-09-0")
        assert all(part in head for part in parts), head
        assert "\n".join(answers) + "\n" == ask("I loved it", "I hated it")
    assert json.loads(Child("--json", "I loved it", terminal=True).finish()[1])["label"] == "positive"


def test_other_programs_call_a_model_from_any_folder_and_it_prints_nothing(adapters, tmp_path) -> None:
    code = """if True:
        import json, sys
        sys.path.append(sys.argv[1])
        from playground import load
        print(json.dumps([load(path)(["I loved it", " ", "great " * 200]) for path in sys.argv[2:]]))"""
    paths = [adapters / SCRATCH, adapters / PEFT]
    command = [sys.executable, "-c", code, Path(SCRIPT).parent, *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stderr == "" and done.stdout.count("\n") == 1
    for path, answers in zip(paths, json.loads(done.stdout), strict=True):
        expected = ask_json("--model", path, "I loved it", " ", "great " * 200)
        assert [answer | {"model": expected[0]["model"]} for answer in answers] == expected
        (first, blank, cut), sure = answers, unmerged(str(path), ["I loved it"])[0, 1].item()
        assert first["label"] == "positive" and first["probability"] == pytest.approx(sure, abs=1e-5)
        assert first["probability"] == first["probabilities"]["positive"] and cut["cut"] is True
        assert blank == {"text": " ", "label": None, "probability": None, "probabilities": {}}


def test_eight_threads_get_the_answers_of_one(adapters) -> None:
    model, alone = playground.load(adapters / SCRATCH), playground.load(str(adapters / SCRATCH))
    parts = [[*TEXTS[i:], *TEXTS[:i]] for i in range(8)] * 3
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(model, parts)] == [alone(part) for part in parts]


def test_any_texts_are_answered_and_nothing_else(adapters) -> None:
    model = playground.load(adapters / SCRATCH)
    assert model("I loved it") == model(iter(["I loved it"])) == model(("I loved it",))
    for wrong in (None, 1.5, b"I loved it"):
        with pytest.raises(TypeError, match=re.escape(repr(wrong))):
            model(["I loved it", wrong])
    refused(lambda: model([], unsure=0.8), 0.8)  # percent
    assert len(repr(model)) < 200 and len({model, model}) == 1


VISIBLE = ["c’est\xa0bien", "می\u200cخواهم", "\U0001f469\u200d\U0001f467 \u2764\ufe0f"]
VISIBLE += ["a\u3000b", "soft\xadhyphen"]


@pytest.mark.parametrize("text", VISIBLE)
def test_text_of_every_script_is_shown_as_it_is_but_for_what_disturbs_a_terminal(text, here) -> None:
    hidden = "\x1b\x00\t\x7f\x85\u2028\u2029\u202a\u202e\u2066\u2069\U000e01ff"
    assert lora_scratch.visible(text + hidden) == text + "\ufffd" * len(hidden)


def test_several_sentences_stand_above_their_answers(here) -> None:
    hostile = "\x1b[31m hated it\n" + "hated " * 50
    lines = ask("--model", SCRATCH, "I loved it", " ", hostile).splitlines()
    assert lines[0] == "I loved it" and lines[1].startswith("  LoRA_scratch  Positive  ")
    assert lines[3] == "  LoRA_scratch  (blank)"
    assert lines[4].startswith("\ufffd[31m hated it\ufffdhated hated") and len(lines[4]) == 200
    assert lines[5].startswith("  LoRA_scratch  Negative") and len(lines) == 6


@pytest.mark.parametrize("model", [SCRATCH, PEFT])
def test_answers_come_in_order_and_equal_the_unmerged_model(model, here, tmp_path) -> None:
    texts = random.Random(0).choices(TEXTS, k=1200)  # more than are answered at a time
    question = ["--model", model, "--file", write(tmp_path / "texts.txt", "\n".join(texts))]
    answers = ask_json(*question, "--precision", "fp32")
    assert [answer["text"] for answer in answers] == texts
    expected = dict(zip(TEXTS, unmerged(model, TEXTS).tolist(), strict=True))
    for answer in answers:
        found = list(answer["probabilities"].values())
        assert found == pytest.approx(expected[answer["text"]], rel=0, abs=1e-5)
        assert answer["label"] == ("negative", "positive")[found[1] > found[0]]
    assert {answer["label"] for answer in answers} == {"negative", "positive"}


def test_16_bits_are_for_files_and_change_no_label(here, tmp_path, monkeypatch) -> None:
    """Of these sentences; half-way between two labels one may fall to the other side."""
    asked = Mock(wraps=playground.prepare_machine)
    monkeypatch.setattr(playground, "prepare_machine", asked)
    rows = ask_json("--model", SCRATCH, *TEXTS)
    lines = "".join(f"{row['text']}\t{row['label']}\n" for row in rows)
    question = ["--model", SCRATCH, "--file", write(tmp_path / "t.tsv", f"text\tlabel\n{lines}")]
    for row, other in zip(ask_json(*question, "--precision", "bf16"), rows, strict=True):
        assert row["label"] == other["label"]
        assert row["probability"] == pytest.approx(other["probability"], abs=0.03)
    for more in ([], ["--output", tmp_path / "a.csv"], ["--label-column", "label"]):
        ask(*question, *more)
    assert [call.args[0].precision for call in asked.call_args_list] == ["fp32", "bf16", *["auto"] * 3]


def test_models_on_one_base_share_it_and_answer_as_alone(here, tiny_base, tmp_path) -> None:
    rows = [{"text": text, "label": f"kind {len(text) % 3}"} for text in TEXTS[:10]]
    table = write(tmp_path / "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    more = ["--lr", 0.02, "--epochs", 20, "--targets", "all-linear", "--output"]
    paths = [Path(SCRATCH), Path(PEFT), tmp_path / "three.pt", tmp_path / "other"]
    for script, output in zip((lora_scratch, lora_peft), paths[2:], strict=True):
        script.main(flags(tiny_base, table, *more, output))
    counts, places = [], set()
    for path, model in zip(paths, playground.load_all(paths), strict=True):
        ours, _ = model.logits(TEXTS)
        assert torch.allclose(ours.softmax(dim=1), unmerged(str(path), TEXTS), rtol=0, atol=1e-6)
        encoder = dict(model.base.model.base_model.named_parameters()).items()
        places_of_one = {tensor.data_ptr() for name, tensor in encoder if "lora_" not in name}
        counts.append(len(places_of_one))
        places |= places_of_one
    assert counts == [len(places)] * 4
    answers = ask_json("--model", paths[2], *TEXTS)  # the names of labels come from the data
    best = unmerged(str(paths[2]), TEXTS).argmax(dim=1).tolist()
    assert [answer["label"] for answer in answers] == [f"kind {i}" for i in best] and len(set(best)) > 1
    assert all(list(answer["probabilities"]) == ["kind 0", "kind 1", "kind 2"] for answer in answers)
    refused(lambda: ask("--model", paths[2], "--glue", tmp_path / "out.tsv", "--file", table), paths[2])


def test_json_is_all_that_is_printed_and_peft_and_pandas_are_not_needed(adapters) -> None:
    """The one real process with a pipe: imports, warnings and encodings as users have them."""
    code = "import runpy, sys; sys.argv[0] = sys.argv.pop(1); sys.modules.update(peft=None, pandas=None)\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, SCRIPT, "--json", "--model", SCRATCH]
    texts = ["a great film", "", " \t", "I hated it\x85\u2028\x01\r \x1b[31m", "\U0001f600 電影", "café"]
    piped = "\ufeff{}\n{}\n{}\r\n{}\r\n{}\n{}".format(*texts).encode()
    options = {"env": os.environ | {"PYTHONPATH": str(Path(SCRIPT).parent)}, "cwd": adapters}
    done = subprocess.run(command, input=piped, capture_output=True, check=True, **options)
    assert done.stderr == b""
    assert done.stdout.isascii() and done.stdout.endswith(b"}\n")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["text"] for answer in answers] == texts
    keys = ["text", "label", "probability", "probabilities", "model"]
    assert all(list(answer) == keys for answer in answers)
    assert [answer["label"] for answer in answers[:4]] == ["positive", None, None, "negative"]
    assert [list(answer["probabilities"]) for answer in answers[:2]] == [["negative", "positive"], []]


@pytest.mark.parametrize("piped", [[], ["--file", "-"], None])
def test_a_pipe_is_answered_as_sentences_are_which_leave_it_unread(piped, here) -> None:
    sentences = ["I loved it", "I hated it"]
    child = Child("--model", SCRATCH, *(sentences if piped is None else piped))
    if piped is not None:
        os.write(child.end, "\n".join(sentences).encode())
        socket.socket(fileno=os.dup(child.end)).shutdown(socket.SHUT_WR)  # else it stays open
    assert child.finish() == (0, ask("--model", SCRATCH, *sentences))


def test_a_slow_pipe_is_answered_line_by_line_and_a_quick_one_by_the_thousand(here) -> None:
    child = Child("--model", SCRATCH, "--json")
    for number in range(1, 4):
        os.write(child.end, b"I loved it\nI hat")  # the second line is not there yet
        child.read_until("}\n", count=2 * number - 1)
        os.write(child.end, b"ed it\n")
        child.read_until("}\n", count=2 * number)
    lines = [f"{i} I loved it" for i in range(5000)]
    found = list(playground.split_lines(["\n".join(lines)]))
    assert sum(found, []) == lines and len(found) < 20 and max(map(len, found)) == 1024  # noqa: RUF017


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("r.csv", 'id,review\n1,"I loved it, really"\n2,null\n3,""\n', ROWS),
        ("r.tsv", "id\treview\n1\tI loved it, really\n2\tnull\n3\t\n", ROWS),
        ("r.jsonl", "".join(json.dumps({"review": text}) + "\n" for text in ROWS), ROWS),
        ("r.text", "\ufeffI loved it, really\r\nnull\n\n", ROWS),
        ("utf16.txt", f"a film\r\n{ODD}\r\n".encode("utf-16"), ["a film", ODD]),
        ("windows.txt", f"a film\r\n{ODD}\r\n".encode("cp1252"), ["a film", ODD]),
        ("packed.txt.gz", gzip.compress(b"a film\n"), ["a film"]),
    ],
)
def test_every_kind_of_file_is_read(name, content, texts, here, tmp_path, capfd) -> None:
    arguments = ["--model", SCRATCH, "--file", write(tmp_path / name, content), "--text-column", "review"]
    assert [answer["text"] for answer in ask_json(*arguments)] == texts
    assert ("line 2" in capfd.readouterr().err) == (name == "windows.txt")
    assert [answer["text"] for answer in ask_json(*arguments, "first")] == ["first", *texts]


@pytest.mark.parametrize("leave", ["exit\n", "\x04", "\x03"])
def test_the_prompt_answers_until_exit_ctrl_d_or_ctrl_c(leave, here, monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    child = Child("--model", SCRATCH, terminal=True)
    for number, blank in enumerate(("\n", "  \n"), start=1):
        child.read_until("> ", count=number)
        os.write(child.end, blank.encode())
    child.read_until("> ", count=3)
    child.type("I loved it\n", answers=1)
    child.type("I hated it\n", answers=2)
    child.type("\x1b[A\x1b[A\n", answers=3)  # twice the arrow up: the line before the last
    code, output = child.finish(leave)
    assert code == 0 and "Traceback" not in output and "error" not in output
    assert output.count("Positive") == 2 and output.count("Negative") == 1 and output.count("blank") == 0


def test_ctrl_c_between_answers_ends_without_a_traceback(here) -> None:
    child = Child("--model", SCRATCH, "--json")
    os.write(child.end, b"I loved it\n" * 1024)
    child.read_until("}\n", count=1024)  # answered; now it waits for more
    os.kill(child.pid, signal.SIGINT)
    code, output = child.finish()
    assert code == 130 and output.count("\n") == 1024


def test_a_closed_pipe_is_no_error(here, tmp_path) -> None:
    child = Child("--model", SCRATCH, "--json", "--file", write(tmp_path / "t.txt", "I loved it\n" * 3000))
    child.read_until("}\n")
    os.close(child.end)
    assert child.finish()[0] == 141


def test_a_mistake_is_one_line_with_its_remedy_and_exit_code_2(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = Child("I loved it").finish()
    assert code == 2 and output.startswith("error:") and "--model" in output and output.count("\n") == 1


def test_text_beyond_the_limit_is_cut_and_the_answer_says_so(here) -> None:
    whole, cut = " ".join(["great"] * 126), " ".join(["great"] * 127)  # and two tokens around them
    answers = ask_json("--model", SCRATCH, whole, cut)
    assert "cut" not in answers[0] and answers[1]["cut"] is True
    assert answers[0]["probabilities"] == answers[1]["probabilities"]
    first, second = ask("--model", SCRATCH, whole, cut).splitlines()[1::2]
    assert second.startswith(first) and "128" in second.removeprefix(first)


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_very_long_text_is_answered_like_its_beginning(text, here) -> None:
    started = time.monotonic()
    answer = ask_json("--model", SCRATCH, text)[0]
    assert time.monotonic() - started < 10 and answer["text"] == text
    expected = unmerged(SCRATCH, [text])[0].tolist()
    assert list(answer["probabilities"].values()) == pytest.approx(expected, abs=1e-5)


@settings(max_examples=60, deadline=None, database=None)
@given(text=st.text(CHARACTERS, max_size=300), form=st.sets(FORMS))
def test_any_text_is_answered(text, form, adapters) -> None:
    output = ask("--model", adapters / SCRATCH, *form, "--", text)
    if "--json" in form:
        answer = json.loads(output)
        assert answer["text"] == "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
        assert answer["label"] in ((None,) if playground.is_blank(text) else ("negative", "positive"))
    assert output.count("\n") == (2 if form == {"--explain"} and not playground.is_blank(text) else 1)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", output)


@settings(max_examples=50, deadline=None, database=None)
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".txt", ".csv", ".tsv", ".jsonl"]))
def test_any_file_is_answered_or_refused(content, suffix, adapters) -> None:
    path = write(adapters / f"any{suffix}", content if suffix == ".txt" else b"sentence\n" + content)
    try:
        output = ask("--json", "--model", adapters / SCRATCH, "--file", path)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert all("label" in json.loads(line) for line in output.splitlines())
        if suffix == ".txt":  # as many lines as `grep -c ''` counts
            text = lora_scratch.read_text(path)[0]
            assert output.count("\n") == text.count("\n") + (text[-1:] not in ("", "\n"))


@pytest.mark.parametrize("form", [[], ["--json"], ["--explain"], ["--glue", "out.tsv"], ["--export", "out"]])
def test_answers_that_are_not_finite_are_refused(form, here, tmp_path, monkeypatch) -> None:
    checkpoint = torch.load(SCRATCH, weights_only=True)
    for name, tensor in checkpoint["state_dict"].items():
        tensor.fill_(1e38 if "lora" in name else 1.0)
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint, "large.pt")
    write(Path("a.tsv"), "index\tsentence\n0\tI loved it\n")
    texts = ["--file", "a.tsv"] if "--glue" in form else [] if "--export" in form else ["I loved it"]
    refused(lambda: ask("--model", "large.pt", *form, *texts), "large.pt")
    assert sorted(path.name for path in files_of(tmp_path)) == ["a.tsv", "large.pt"]


def test_explain_gives_the_largest_effect_to_the_word_that_decides(here, capsys) -> None:
    text = "it hated the film"
    answer = ask_json("--model", SCRATCH, "--explain", text)[0]
    words = dict(answer["words"])
    assert list(words) == text.split() and max(words, key=words.get) == "hated" and words["hated"] > 1
    masked = ["[MASK] hated the film", "it [MASK] the film"]
    whole, *lower = unmerged(SCRATCH, [text, *masked])[:, 0].logit().tolist()
    assert answer["label"] == "negative"
    assert [words["it"], words["hated"]] == pytest.approx([whole - one for one in lower], abs=1e-3)
    lines = ask("--model", SCRATCH, "--explain", text, text).splitlines()[1:]
    assert lines[1].split()[4:6] == ["the", f"{words['the']:+z.1f}"] and "\x1b" not in lines[1]
    assert len(capsys.readouterr().err.splitlines()) == 1  # what the numbers are
    assert ask_json("--model", SCRATCH, "--explain", " ")[0]["label"] is None and not capsys.readouterr().err
    model = playground.load(SCRATCH)
    model.base.model.classifier.weight.data *= 100  # surer than a probability in 64 bits can be
    sure = dict(model(text, explained=True)[0]["words"])
    assert sure == pytest.approx({word: 100 * effect for word, effect in words.items()}, abs=0.01)
    for text, read in (("great " * 5000, 126), ("great, " * 100, 63)):  # a comma is a token, too
        assert len(ask_json("--model", SCRATCH, "--explain", text)[0]["words"]) == read


@pytest.mark.parametrize(("name", "value"), [("TERM", "xterm"), ("TERM", "dumb"), ("NO_COLOR", "1")])
def test_explain_colours_a_terminal_that_wants_it(name, value, here, monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    arguments = ["--model", SCRATCH, "--explain", "it hated the film"]
    code, output = Child(*arguments, terminal=True).finish()
    assert code == 0 and ("\x1b[32mhated +" in output) == (value == "xterm") == ("\x1b" in output)
    assert "\x1b[32mthe" not in output
    for code in ("\r", "\x1b[32m", "\x1b[31m", "\x1b[0m"):
        output = output.replace(code, "")
    assert ask(*arguments).strip() in output


@pytest.mark.parametrize("name", ["test.tsv", "test.jsonl"])
def test_glue_writes_a_row_for_every_sentence(name, here, tmp_path) -> None:
    rows = [(7, "I loved it"), (8, 'I "hated it'), (9, "a great film"), (12345678901, "I hated it")]
    form = "{}\t{}\n" if name == "test.tsv" else '{{"index": {}, "sentence": "{}"}}\n'
    lines = [form.format(i, text if name == "test.tsv" else text.replace('"', '\\"')) for i, text in rows]
    table = write(tmp_path / name, "index\tsentence\n" * (name == "test.tsv") + "".join(lines))
    output = tmp_path / "new" / "SST-2.tsv"
    assert "4" in ask("--model", PEFT, "--glue", output, "--file", table)
    best = unmerged(PEFT, [text for _, text in rows]).argmax(dim=1).tolist()
    expected = "".join(f"{i}\t{p}\n" for (i, _), p in zip(rows, best, strict=True))
    assert output.read_text() == "index\tprediction\n" + expected and set(best) == {0, 1}


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("--model NONE.pt film", ["NONE.pt"]),
        ("--file t/remark.csv", ["remark.csv", "id, remark, by"]),
        ("--file t/no_header.csv", ["no_header.csv"]),
        *((f"--file {path}", [path]) for path in ("none.txt", "none.csv", "t", "t/pipe.csv")),
        ("--file t/binary.txt", ["binary.txt"]),
        ("film --port 80", ["--web", "--port"]),
        (f"--model S --model {PEFT} --glue a.tsv", [SCRATCH, PEFT]),
        ("--model S --glue a.tsv --file t/no_index.tsv", ["no_index.tsv", "index"]),
        ("--model S --glue a.tsv --file t/test.txt", ["test.txt"]),
        *((f"--model S --glue {path}", ["--glue", path]) for path in (SCRATCH, PEFT, "link", ".")),
        (f"--model S --model {PEFT} --export new", [SCRATCH, PEFT]),
        ("--model S --export t", ["--export t"]),
        ("--model S --export t/test.txt", ["test.txt"]),
        ("--model S --export new film", ["--export", "SENTENCE"]),
        ("--model S --web", ["pip install -r tests/requirements-web.txt"]),
    ],
)
def test_what_is_refused_changes_no_file(arguments, names, here, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(shutil.copytree(here, tmp_path / "copy"))
    write(Path("t/no_index.tsv"), "sentence\nI loved it\n")
    write(Path("t/test.txt"), "mine")
    write(Path("t/remark.csv"), "id,remark,by\n1,good,me\n")
    rows = (f"a rather long sentence about film number {i}, x\n" for i in range(9))
    write(Path("t/no_header.csv"), "".join(rows))
    write(Path("t/binary.txt"), b"\x89PNG\r\n\0\0")
    os.mkfifo("t/pipe.csv")
    Path("link").symlink_to("t/no_index.tsv")
    monkeypatch.setitem(sys.modules, "gradio", None)
    before = files_of(tmp_path)
    refused(lambda: ask(*re.sub(r"\bS\b", SCRATCH, arguments).split()), *names)
    assert files_of(tmp_path) == before


def test_export_runs_in_a_pipeline_without_this_project(here, tmp_path) -> None:
    folders, former = [tmp_path / "new" / "a", tmp_path / "b"], os.umask(0o022)
    for model, folder in zip((SCRATCH, PEFT), folders, strict=True):
        assert str(folder) in ask("--model", model, "--export", folder)
        files = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
        modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
        assert modes == dict.fromkeys(files, 0o644)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert config["architectures"] == ["DistilBertForSequenceClassification"]
        assert config["label2id"] == {"negative": 0, "positive": 1}
        assert config["problem_type"] == "single_label_classification"
        names = load_file(folder / "model.safetensors")
        assert not any("lora" in name or "base_layer" in name for name in names)
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert tokenizer["model_max_length"] == 128
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        assert tokenizer["truncation"]["max_length"] == 128  # for readers other than a pipeline
        said = (folder / "README.md").read_text(encoding="utf-8")
        known = "\n    negative, positive\n", "tiny_base", "tiny_sst2", "epochs: 20, rate 0.01", "(10/10), 95"
        assert all(fact in said for fact in known) and str(tmp_path.parent) not in said
    os.umask(former)
    code = """if True:
        import json, sys
        sys.modules.update(peft=None, lora_scratch=None, lora_peft=None, playground=None)
        from transformers import pipeline
        for folder in sys.argv[2:]:
            run = pipeline("text-classification", folder, truncation=True)
            print(json.dumps(run(json.loads(sys.argv[1]), top_k=None)))"""
    texts = [*TEXTS, "great " * 200]
    command = [sys.executable, "-I", "-c", code, json.dumps(texts), *folders]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    for line, model in zip(done.stdout.splitlines(), (SCRATCH, PEFT), strict=True):
        found = [{pair["label"]: pair["score"] for pair in answer} for answer in json.loads(line)]
        found = torch.tensor([[answer["negative"], answer["positive"]] for answer in found])
        assert torch.allclose(found, unmerged(model, texts), rtol=0, atol=1e-5)


def test_export_refuses_a_merge_that_changes_the_answers(here, tmp_path, monkeypatch) -> None:
    def wrong(layer: lora_scratch.LoRALinear) -> torch.nn.Linear:
        layer.scaling *= 1.1
        return merge(layer)

    merge = lora_scratch.LoRALinear.merge
    monkeypatch.setattr(lora_scratch.LoRALinear, "merge", wrong)
    refused(lambda: ask("--model", SCRATCH, "--export", tmp_path / "out"), "--export", SCRATCH)
    assert not any(path.is_file() for path in files_of(tmp_path))


def test_a_base_that_has_moved_is_found_and_another_is_refused(here, tiny_base, tmp_path) -> None:
    moved = shutil.copytree(tiny_base, tmp_path / "moved")
    for model in (SCRATCH, PEFT):
        assert ask("--model", model, "--base", moved, "a film") == ask("--model", model, "a film")
    tensors = load_file(moved / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"] += 1e-3
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    for model in (SCRATCH, PEFT):
        refused(lambda model=model: ask("--model", model, "--base", moved, "I loved it"), moved)


@pytest.mark.slow
def test_several_processes_say_a_mistake_once(tmp_path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, "--local-ranks-filter", "0", SCRIPT, "film"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and "--model" in done.stderr
