"""What the README claims is what the code has and what the records hold."""

import argparse
import json
import re
import runpy
import shlex
import statistics
import sys
from pathlib import Path

import plot_results
import pytest
import recipes
import torch

import lora_scratch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = Path(__file__).parent / "results"


def test_the_code_it_shows_is_the_code_that_runs() -> None:
    shown = README.partition("```python\n")[2].partition("```")[0]
    assert len(shown.splitlines()) > 10
    assert shown in (ROOT / "lora_scratch.py").read_text(encoding="utf-8")


class Parsed(BaseException):
    """Raised where a script's arguments are parsed, in place of all that follows."""


def commands() -> list[tuple[str, str]]:
    """Each call of a script that the README shows, in a block or in a line of text: its file and its arguments."""
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    lines = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
    text = "\n".join([blocks, *(line.replace("\n", " ") for line in lines)])
    return sorted(set(re.findall(r"(?:python|torchrun --nproc-per-node 2) (\S+\.py)([^\n#→|>…]*)", text)))


def test_the_commands_are_found() -> None:
    scripts = {script for script, _ in commands()}
    assert {"lora_scratch.py", "lora_peft.py", "playground.py", "tests/benchmark.py", "tests/recipes.py"} <= scripts
    assert ("lora_scratch.py", " --demo") in {(script, arguments.rstrip()) for script, arguments in commands()}


@pytest.mark.parametrize(("script", "arguments"), commands())
def test_each_command_parses(script: str, arguments: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, argv: list[str] | None = None) -> None:
        real(self, argv)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(arguments.removesuffix(' "'))])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_each_flag_exists() -> None:
    files = [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    known = {*re.findall(r'add(?:_argument)?\(\s*"(--[a-z0-9-]+)"', text), "--nproc-per-node"}
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", README))
    assert len(shown) > 20 and shown <= known, shown - known
    assert "./setup.sh --demo" in README and "--demo)" in (ROOT / "setup.sh").read_text(encoding="utf-8")


def test_every_file_of_the_tree_exists() -> None:
    tree = README.partition("## Files\n\n```\n")[2].partition("```")[0]
    for line in tree.splitlines():
        name = line.split()[0]
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


def test_the_default_runs_are_those_on_record() -> None:
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("default_seed*.json"))]
    assert len(records) == 3
    for record in records:
        last, result = record["epochs"][-1], record["result"]
        assert last["epoch"] == 3 and result["correct"] == last["correct"] and result["total"] == 872
        assert f"{result['accuracy']:.2f} ({result['correct']})" in README
    scores = [record["result"]["accuracy"] for record in records]
    assert f"**{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f} %**" in README


def test_the_side_by_side_table_is_the_one_on_record() -> None:
    record = json.loads((RESULTS / "side_by_side.json").read_text(encoding="utf-8"))
    for script in ("lora_scratch", "lora_peft"):
        run = record[script]
        result, seconds = run["result"], sum(epoch["seconds"] for epoch in run["epochs"])
        cells = [f"`{script}.py`", f"{result['accuracy']:.2f} % ({result['correct']}/872)"]
        cells += [f"{run['parameters']['trained']:,}", f"{result['bytes'] / 1e6:.2f} MB", f"{seconds:.0f}"]
        assert f"| {' | '.join(cells)} |" in README
    assert abs(record["lora_scratch"]["result"]["correct"] - record["lora_peft"]["result"]["correct"]) <= 1
    assert f"10,000 phrases, {len(record['lora_peft']['epochs'])} epochs" in README
    steps = sum(epoch["steps"] for epoch in record["lora_peft"]["epochs"])
    assert f"The losses of the {steps:,} steps differ by at most {record['largest_loss_difference']:.1e}" in README


def test_the_table_of_recipes_is_the_one_on_record() -> None:
    record = json.loads((RESULTS / "recipes.json").read_text(encoding="utf-8"))
    shown = README.split("<!-- recipes -->")[1].split("<!-- /recipes -->")[0]
    assert shown.strip() == recipes.table(record)
    assert record["rows"].keys() == recipes.RECIPES.keys()
    for name, row in record["rows"].items():
        assert len(row["seeds"]) == len(row["correct"]) == 3
        scores = [100 * right / record["total"] for right in row["correct"]]
        assert (row["mean"], row["deviation"]) == pytest.approx((statistics.mean(scores), statistics.stdev(scores)))
        rates = recipes.RECIPES[name][2]
        if len(rates) > 1:  # the best of those tried, and not the last at either end
            assert row["tuning"].keys() == {f"{rate:g}" for rate in rates}
            assert row["lr"] == float(max(row["tuning"], key=row["tuning"].get))
            assert min(rates) < row["lr"] < max(rates)
        else:
            assert row["lr"] == rates[0] and not row["tuning"]


def test_the_figure_is_of_the_records() -> None:
    assert f"records {plot_results.digest(*plot_results.committed())}" in (RESULTS / "results.svg").read_text("utf-8")


def test_the_figure_reads_well_on_a_light_and_a_dark_page() -> None:
    def luminance(color: str) -> float:  # of sRGB, as WCAG 2 defines it
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(one: str, other: str) -> float:
        dark, light = sorted((luminance(one), luminance(other)))
        return (light + 0.05) / (dark + 0.05)

    for page in ("#ffffff", "#0d1117"):
        assert contrast(plot_results.INK, page) > 4.2
        assert all(contrast(color, page) > 3 for color in plot_results.COLORS)
    text = [key for key in plot_results.STYLE if "color" in key and key.partition(".")[0] in ("text", "xtick", "ytick")]
    assert len(text) == 3 and all(plot_results.STYLE[key] == plot_results.INK for key in [*text, "axes.labelcolor"])
    used = set(re.findall(r"#[0-9a-f]{6}\b", (RESULTS / "results.svg").read_text("utf-8")))
    assert used <= {plot_results.INK, *plot_results.COLORS}


def test_the_demos_run_is_the_one_on_record() -> None:
    record = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    assert {key: record["settings"][key] for key in lora_scratch.DEMO} == lora_scratch.DEMO
    for epoch in record["epochs"]:
        assert f"accuracy {epoch['accuracy']:.2f} % ({epoch['correct']}/200), {epoch['seconds']:.1f} s\n" in README
    assert lora_scratch.label_report(torch.tensor(record["result"]["confusion"]), ["negative", "positive"]) in README
    sst2 = record["sst2_validation"]
    assert f"{sst2['correct']} ({100 * sst2['correct'] / 872:.2f} %)" in README
