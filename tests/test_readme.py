"""What the READMEs show is what the code has and what the records hold."""

import argparse
import math
import re
import runpy
import shlex
import sys
from pathlib import Path
from statistics import mean, median, variance

import lora_scratch

import measure
import pytest
import tables
import torch
from conftest import ROOT
from measure import percent_right, read_record, spread
from transformers import DistilBertConfig, DistilBertForSequenceClassification

README, RESULTS = (path.read_text(encoding="utf-8") for path in tables.FILES)
BOTH = f"{README}\n{RESULTS}"
SCRIPT = (ROOT / "lora_scratch.py").read_text(encoding="utf-8")


# --- Code, commands and files


def test_the_code_it_shows_is_the_code_that_runs() -> None:
    shown = README.partition("```python\n")[2].partition("```")[0]
    lines = shown.splitlines()
    assert lines[0].startswith("class LoRALinear") and set(lines) <= set(SCRIPT.splitlines())


class Parsed(BaseException):
    """Raised where a script's arguments are parsed, in place of all that follows."""


def commands() -> list[tuple[str, str]]:
    """Each call of a script that is shown, in a block or in a line of text: its file and its arguments."""
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", BOTH, re.DOTALL)).replace("\\\n", " ")
    lines = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", BOTH, flags=re.DOTALL))
    text = "\n".join([blocks, *(line.replace("\n", " ") for line in lines)])
    call = r"(?:python|torchrun --nproc-per-node 2) (\S+\.py)([^\n#→|>…]*)"
    return sorted({(script, arguments.strip()) for script, arguments in re.findall(call, text)})


def test_the_commands_are_found() -> None:
    scripts = {script for script, _ in commands()}
    assert {"lora_scratch.py", "lora_peft.py", "playground.py", "tests/figures/minutes.py"} <= scripts
    assert ("lora_scratch.py", "--demo") in commands()


@pytest.mark.parametrize(("script", "arguments"), commands())
def test_each_command_parses(script: str, arguments: str, monkeypatch, tmp_path: Path) -> None:
    real = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, argv: list[str] | None = None) -> None:
        real(self, argv)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(arguments)])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_each_flag_exists() -> None:
    files = [*ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    known = {*re.findall(r'add(?:_argument)?\(\s*"(--[a-z0-9-]+)"', text)}
    known |= {f"--{name.replace('_', '-')}" for name in lora_scratch.NUMBERS}
    known |= {*re.findall(r"--[a-z]+", (ROOT / "setup.sh").read_text(encoding="utf-8"))}
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", BOTH)) - {
        "--nproc-per-node",
        "--local-ranks-filter",
    }
    assert len(shown) > 20 and shown <= known, shown - known


def test_every_file_it_names_exists() -> None:
    tree = README.partition("## Files\n\n```\n")[2].partition("```")[0]
    names = [line.split()[0] for line in tree.splitlines()]
    for file in tables.FILES:
        links = re.findall(r"\]\((?!http)([^)#]+)", file.read_text(encoding="utf-8"))
        for place in [*(ROOT / name for name in names), *(file.parent / name for name in links)]:
            assert place.exists(), place


# --- Numbers


def test_writing_the_tables_changes_nothing() -> None:
    for file, text in zip(tables.FILES, (README, RESULTS), strict=True):
        assert tables.fill(text) == text, f"{file}: run python tests/figures/tables.py"
    marks = set(re.findall(r"<!-- ([\w-]+) -->", BOTH))
    assert tables.BLOCKS.keys() - {"results"} <= marks and tables.results_table() in README


def test_the_parameters_of_distilbert_are_counted() -> None:
    with torch.device("meta"):
        model = DistilBertForSequenceClassification(DistilBertConfig())
    head = [name for name, _ in model.named_parameters() if "classifier" in name]
    base = sum(p.numel() for name, p in model.named_parameters() if name not in head)
    with torch.device("meta"):
        lora_scratch.inject_lora(model, head)
    counts = {"head": sum(p.numel() for name, p in model.named_parameters() if name in head), "base": base}
    counts["lora"] = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    for count in counts.values():
        assert f"| {count:,} | {100 * count / sum(counts.values()):.2f} % |" in README
    saved, whole = counts["lora"] + counts["head"], counts["base"] + counts["head"]
    assert f"{4 * saved / 1e6:.0f} MB instead of {4 * whole / 1e6:.0f}" in README


def test_the_demos_run_is_the_one_on_record() -> None:
    run = read_record("demo")
    shown = re.findall(r"^epoch (\d+): training loss ([\d.]+), .* \((\d+)/200\)", README, re.MULTILINE)
    for number, loss, correct in shown:
        epoch = run["epochs"][int(number) - 1]
        assert (loss, int(correct)) == (f"{epoch['train_loss']:.4f}", epoch["correct"])
    result = run["result"]
    assert shown and int(shown[-1][2]) == result["correct"]
    for count in (run["parameters"][part] for part in ("lora", "head", "frozen base")):
        assert f" {count:,} " in README
    report = lora_scratch.report_labels(torch.tensor(result["confusion"]), result["label_names"])
    assert all(line in README for line in report.splitlines())


def of_kind(name: str) -> dict[str, dict]:
    return {row["kind"]: row for row in read_record(name)["rows"]}


def numbers() -> list[tuple[str, str]]:
    """What sentences say beside the tables: the README, and a number that stands in it."""
    best, found = read_record("best"), read_record("minutes")["runs"]
    scores = {key: tables.accuracies(runs) for key, runs in best.items()}
    pair = ("full fine-tuning", "best")
    apart = f"{mean(scores[pair[0]]) - mean(scores[pair[1]]):.2f}"
    error = f"{math.sqrt(sum(variance(scores[key]) / 3 for key in pair)):.2f}"
    longer = read_record("minutes_1000")["runs"]["best"]
    more, losses = spread(percent_right(longer)), read_record("side_by_side")["largest_loss_difference"]
    seconds = {way: [run["seconds"] for run in runs] for way, runs in found.items()}
    rates = of_kind("benchmark")
    right = str(read_record("demo")["sst2_validation"]["correct"])

    readme = [spread(scores["stand-in"]), spread(scores["mpnet"]), apart, error, more, f"{losses:.1e}"]
    readme += [f"{mean(run['seconds'] for run in longer) / 60:.1f}", right]
    readme += [f"{measure.ratios(seconds['trainer-bf16'], seconds['best'])[0]:.2f}"]
    readme += [f"{mean(seconds['published']) / 60:.1f}", f"{rates['scratch']['rate']:.1f}"]
    readme += [f"{rates[kind]['ratio'][0]:.2f}" for kind in ("trainer", "trainer-grouped")]

    results = [apart, error, more, f"{losses:.1e}", right]
    for name in ("onednn_before", "onednn", "dropout"):
        rows = of_kind(name)
        results += [f"{row['rate']:.1f}" for row in rows.values()]
        results += [measure.times(rows["trainer-grouped"]["ratio_same_precision"])]
    for name in ("avx2", "avx2_300000_spins"):
        results += [f"{row['rate']:.1f}" for row in of_kind(name).values()][:1]
    for rows in read_record("busy_machine")["rates"].values():
        results += [f"{median(of):.0f} ({min(of):.0f} to {max(of):.0f})" for of in rows.values()]
    after = read_record("after_training")["runs"]
    results += [f"{mean(run['scaled']['nll'] for run in after[key]):.3f}" for key in after if "cal" in key]
    return [("README.md", number) for number in readme] + [("results", number) for number in results]


@pytest.mark.parametrize(("where", "number"), numbers())
def test_a_number_in_a_sentence_is_that_of_its_record(where: str, number: str) -> None:
    text = README if where == "README.md" else RESULTS
    assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", text)
