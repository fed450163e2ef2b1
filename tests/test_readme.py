"""What the README claims is what the code has and what the records hold."""

import argparse
import json
import re
import runpy
import shlex
import statistics
import sys
from pathlib import Path

import pytest

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
        result, seconds = run["result"], run["epochs"][-1]["seconds"]
        cells = [f"`{script}.py`", f"{result['accuracy']:.2f} % ({result['correct']}/872)"]
        cells += [f"{run['parameters']['trained']:,}", f"{result['bytes'] / 1e6:.2f} MB", f"{seconds:.0f}"]
        assert f"| {' | '.join(cells)} |" in README
    assert abs(record["lora_scratch"]["result"]["correct"] - record["lora_peft"]["result"]["correct"]) <= 1
    assert f"{record['largest_loss_difference']:.1e}" in README
