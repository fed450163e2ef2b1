"""What the README claims is what the code has and what the records hold."""

import json
import re
import statistics
from pathlib import Path

import pytest

import lora_peft
import lora_scratch
import playground

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = Path(__file__).parent / "results"


def test_the_code_it_shows_is_the_code_that_runs() -> None:
    shown = README.partition("```python\n")[2].partition("```")[0]
    assert len(shown.splitlines()) > 10
    assert shown in (ROOT / "lora_scratch.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", ["lora_scratch", "lora_peft", "playground", "tests/side_by_side", "tests/benchmark"])
def test_each_flag_in_a_command_exists(script: str, capsys: pytest.CaptureFixture) -> None:
    commands = re.findall(rf"python {script}\.py([^\n#`→]*)", README)
    used = {flag for command in commands for flag in re.findall(r"--[a-z][a-z0-9-]*", command)}
    module = {"lora_peft": lora_peft, "playground": playground}.get(script, lora_scratch)
    if script == "tests/benchmark":
        text = (ROOT / "tests" / "benchmark.py").read_text(encoding="utf-8")
    else:
        with pytest.raises(SystemExit):
            module.main(["--help"])
        text = capsys.readouterr().out
    assert commands, script
    for flag in used:
        assert re.search(rf"{flag}\b", text), f"{script} has no {flag}"


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
