"""What the READMEs claim is what the code has and what the records hold."""

import argparse
import csv
import json
import math
import re
import runpy
import shlex
import statistics
import sys
from pathlib import Path

import after_training
import busy_machine
import minutes
import own_tables
import plot_results
import pytest
import recipes
import torch
from benchmark import SST2_PHRASES
from transformers import DistilBertConfig, DistilBertForSequenceClassification

import lora_scratch

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLES = (RESULTS / "README.md").read_text(encoding="utf-8")
BOTH = f"{README}\n{TABLES}"
SCRIPT = (ROOT / "lora_scratch.py").read_text(encoding="utf-8")


def record(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


DEFAULT_RUNS = [record(f"default_seed{seed}") for seed in (42, 43, 44)]


def flat(text: str) -> str:
    """On one line: a sentence may be wrapped anywhere."""
    return " ".join(text.split())


# --- Text, code and commands


def test_it_is_short_enough_to_be_read() -> None:
    assert len(README.splitlines()) <= 245


def test_the_code_it_shows_is_the_code_that_runs() -> None:
    shown = README.partition("```python\n")[2].partition("```")[0]
    assert shown.startswith("class LoRALinear") and "def merge" in shown
    assert shown in SCRIPT


def test_the_idea_is_as_long_as_it_says() -> None:
    promised = int(re.search(r"The first (\d+) lines", README)[1])
    (fence,) = [i for i, line in enumerate(SCRIPT.splitlines(), start=1) if line.startswith("# === PLUMBING")]
    assert promised - 10 < fence <= promised + 1


class Parsed(BaseException):
    """Raised where a script's arguments are parsed, in place of all that follows."""


def commands() -> list[tuple[str, str]]:
    """Each call of a script that is shown, in a block or in a line of text: its file and its arguments."""
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", BOTH, re.DOTALL)).replace("\\\n", " ")
    lines = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", BOTH, flags=re.DOTALL))
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
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(arguments)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_each_flag_exists() -> None:
    files = [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    known = {*re.findall(r'add(?:_argument)?\(\s*"(--[a-z0-9-]+)"', text), "--nproc-per-node", "--help"}
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", BOTH))
    assert len(shown) > 20 and shown <= known, shown - known
    assert "./setup.sh --demo" in README and "--demo)" in (ROOT / "setup.sh").read_text(encoding="utf-8")


def test_every_file_it_names_exists() -> None:
    tree = README.partition("## Files\n\n```\n")[2].partition("```")[0]
    names = [line.split()[0] for line in tree.splitlines()]
    assert len(names) > 5
    names += re.findall(r"\]\((?!http)([^)#]+)", README)
    for name in names:
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\((?!http)([^)#]+)", TABLES):
        assert (RESULTS / name).exists(), name


def test_the_heading_that_an_error_message_names_is_there() -> None:
    assert "README, Set-up" in SCRIPT and "\n## Set-up" in README


def test_the_parameters_of_distilbert_are_counted() -> None:
    with torch.device("meta"):
        model = DistilBertForSequenceClassification(DistilBertConfig())
        head = [name for name, _ in model.named_parameters() if "classifier" in name]
        lora_scratch.inject_lora(model, head)
    counts = lora_scratch.count_parameters(dict(model.named_parameters()), head)
    total = counts["lora"] + counts["head"] + counts["frozen base"]
    for part in ("lora", "head", "frozen base"):
        assert f" | {counts[part]:,} | {100 * counts[part] / total:.2f} % | " in README
    saved, whole = (4 * count / 1e6 for count in (counts["trained"], total - counts["lora"]))
    assert f"{saved:.0f} MB instead of {whole:.0f}" in README


# --- Records


def row(name: str, phrases: str, run: dict, scores: list[float]) -> str:
    """A line of the README's one table."""
    cells = [name, phrases, f"{run['trained']:,}", f"{run['bytes'] / 1e6:.1f}"]
    return f"| {' | '.join([*cells, f'{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f}'])} |"


def test_the_table_of_results_is_of_the_records() -> None:
    found = record("recipes")
    assert (found["phrases"], found["epochs"], found["total"]) == (30000, 1, 872)
    names = {
        "published, head frozen": ("published recipe: `--freeze-head`", 2e-4),
    }
    for recipe, (name, rate) in names.items():
        run = found["rows"][recipe]
        assert run["lr"] == rate and run["seeds"] == [42, 43, 44]
        assert row(name, "30,000 phrases, once", run, [100 * right / 872 for right in run["correct"]]) in README
    scores = [run["result"]["accuracy"] for run in DEFAULT_RUNS]
    last = {"trained": DEFAULT_RUNS[0]["parameters"]["trained"], "bytes": DEFAULT_RUNS[0]["result"]["bytes"]}
    assert row("default", f"all {SST2_PHRASES:,} phrases, 3 times", last, scores) in README


def test_the_default_runs_are_those_on_record() -> None:
    for run in DEFAULT_RUNS:
        last, result, seed = run["epochs"][-1], run["result"], run["settings"]["seed"]
        assert last["epoch"] == 3 and result["correct"] == last["correct"] and result["total"] == 872
        minutes = sum(epoch["seconds"] for epoch in run["epochs"]) / 60
        assert f"| {seed} | {result['accuracy']:.2f} ({result['correct']}) | {minutes:.0f} |" in TABLES
    scores = [run["result"]["accuracy"] for run in DEFAULT_RUNS]
    assert f"**{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f} %**" in TABLES


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def shown_table(mark: str) -> str:
    return TABLES.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0].strip()


def best_table(found: dict) -> str:
    """Accuracies after the last epoch, from the reloaded files."""
    names = {"best": "`--recipe best`", "full fine-tuning": "full fine-tuning, 1e-4, once"}
    names |= {"stand-in": "`--recipe best --epochs 1 --train-samples 10000`"}
    names |= {"mpnet": "the same on all-mpnet-base-v2, whole size"}
    lines = ["| | right of 872 | accuracy, % | trained parameters | file, MB | minutes |", "|---|---|---|---|---|---|"]
    for key, name in names.items():
        runs = found[key]
        minutes = [sum(epoch["seconds"] for epoch in run["epochs"]) / 60 for run in runs]
        cells = [name, ", ".join(str(run["result"]["correct"]) for run in runs)]
        cells += [f"**{spread([run['result']['accuracy'] for run in runs])}**", f"{runs[0]['parameters']['trained']:,}"]
        cells += [f"{runs[0]['result']['bytes'] / 1e6:.1f}", f"{min(minutes):.1f} to {max(minutes):.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_best_recipe_is_the_one_on_record() -> None:
    found = record("best")
    assert shown_table("best") == best_table(found)
    for key, runs in found.items():
        assert [run["settings"]["seed"] for run in runs] == [42, 43, 44], key
        for run in runs:
            last, settings = run["epochs"][-1], run["settings"]
            assert last["correct"] == run["result"]["correct"] and run["result"]["total"] == 872
            assert run["settings"]["threads"] == 1 and run["precision"] == "bfloat16"
            if key != "full fine-tuning":
                assert {name: settings[name] for name in ("lr", "batch_size", "targets")} == {
                    name: lora_scratch.RECIPES["best"][name] for name in ("lr", "batch_size", "targets")
                }
    assert found["best"][0]["settings"]["epochs"] == lora_scratch.RECIPES["best"]["epochs"]
    for key, name, times in (
        ("best", "`--recipe best`", "twice"),
        ("full fine-tuning", "full fine-tuning, `--lr 1e-4`", "once"),
    ):
        run, scores = found[key][0], [one["result"]["accuracy"] for one in found[key]]
        counts = {"trained": run["parameters"]["trained"], "bytes": run["result"]["bytes"]}
        assert row(name, f"all {SST2_PHRASES:,} phrases, {times}", counts, scores) in README
    scores = {key: [run["result"]["accuracy"] for run in runs] for key, runs in found.items()}
    text = flat(README)
    assert f"once, `best` reaches {spread(scores['stand-in'])}, and with all-mpnet-base-v2" in text
    assert f"no evidence about DistilBERT) {spread(scores['mpnet'])}." in text
    apart = statistics.mean(scores["full fine-tuning"]) - statistics.mean(scores["best"])
    error = math.sqrt(sum(statistics.variance(scores[key]) / 3 for key in ("full fine-tuning", "best")))
    assert f"they differ by {apart:.2f} points at a standard error of {error:.2f}." in text


def tuning_table(found: dict) -> str:
    lines = [
        "| | rate | batch | trained for | seed | right of 2,000 | loss | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in found["runs"]:
        way = run["way"] + (f", r {run['r']}, alpha {run['alpha']:g}" if run["r"] != 8 else "")
        way += ", no LoRA dropout" if run["dropout"] == 0 else ""
        cells = [way, f"{run['lr']:g}", run["batch"], run["length"], run["seed"]]
        cells += [f"{run['correct'][-1]:,}", f"{run['loss'][-1]:.3f}", run["seconds"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def test_the_tuning_table_is_the_one_on_record() -> None:
    assert shown_table("tuning") == tuning_table(record("tuning"))


def test_the_minutes_are_those_on_record() -> None:
    found = record("minutes")
    assert shown_table("minutes") == minutes.table(found)
    mean = {way: statistics.mean(run["seconds"] / 60 for run in runs) for way, runs in found["runs"].items()}
    scores = [100 * run["correct"] / run["total"] for run in found["runs"]["best"]]
    longer = record("minutes_1000")
    more = [100 * run["correct"] / run["total"] for run in longer["runs"]["best"]]
    times = [run["seconds"] / 60 for run in longer["runs"]["best"]]
    told = f"--max-steps {longer['steps']}` takes {statistics.mean(times):.1f} minutes to {spread(more)}, "
    assert f"{told}the default's three epochs {mean['published']:.1f}." in flat(README)
    ratios = [
        theirs["seconds"] / ours["seconds"]
        for theirs, ours in zip(found["runs"]["trainer-bf16"], found["runs"]["best"], strict=True)
    ]
    assert f"it is {statistics.median(ratios):.2f} times as fast as PEFT with Trainer" in flat(README)
    assert mean["trainer-bf16"] < mean["trainer-fp32"]  # that is its best
    told = f"1,000 steps pass them: {spread(more)} after {spread(times)} minutes"
    times_as_fast = [
        theirs["seconds"] / ours["seconds"]
        for theirs, ours in zip(found["runs"]["published"], longer["runs"]["best"], strict=False)
    ]
    assert f"{told}, {statistics.median(times_as_fast):.1f} times as fast as the published settings" in flat(TABLES)
    assert f"Here they stay {87.35 - statistics.mean(scores):.2f} points below" in flat(TABLES)


def test_the_busy_machine_is_the_one_on_record() -> None:
    assert shown_table("busy") == busy_machine.table(record("busy_machine"))


def test_the_side_by_side_table_is_the_one_on_record() -> None:
    found = record("side_by_side")
    for script in ("lora_scratch", "lora_peft"):
        run = found[script]
        result, seconds = run["result"], sum(epoch["seconds"] for epoch in run["epochs"])
        cells = [f"`{script}.py`", f"{result['accuracy']:.2f} % ({result['correct']}/872)"]
        cells += [f"{run['parameters']['trained']:,}", f"{result['bytes'] / 1e6:.2f} MB", f"{seconds:.0f}"]
        assert f"| {' | '.join(cells)} |" in TABLES
        assert f"both scripts end at {result['correct']} of 872 right" in flat(README)
        settings = run["settings"]
        assert (settings["train_samples"], settings["epochs"], settings["precision"]) == (10000, 3, "fp32")
    steps, most = sum(epoch["steps"] for epoch in run["epochs"]), f"{found['largest_loss_difference']:.1e}"
    assert f"The losses of the {steps:,} steps differ by at most {most}" in flat(TABLES)
    assert f"Over {steps:,} steps their losses differ by at most {most}" in flat(README)


def test_the_textbooks_table_is_the_one_on_record() -> None:
    found = record("textbook")
    for key, name in (("as_it_is", "`lora_scratch.py`"), ("textbook", "textbook")):
        runs = found[key]
        right = ", ".join(map(str, runs["correct"]))
        cells = [name, f"{runs['mean']:.2f} ± {runs['deviation']:.2f} ({right})"]
        cells.append(f"{statistics.median(runs['seconds']):.0f}")
        assert f"| {' | '.join(cells)} |" in TABLES
    difference, error = found["difference"], found["standard_error"]
    assert f"The means differ by {difference:.2f} points at a standard error of {error:.2f}." in flat(TABLES)


def test_the_table_of_recipes_is_the_one_on_record() -> None:
    found = record("recipes")
    shown = TABLES.split("<!-- recipes -->")[1].split("<!-- /recipes -->")[0]
    assert shown.strip() == recipes.table(found)
    assert found["rows"].keys() == recipes.RECIPES.keys()
    for name, run in found["rows"].items():
        assert len(run["seeds"]) == len(run["correct"]) == 3
        scores = [100 * right / found["total"] for right in run["correct"]]
        assert (run["mean"], run["deviation"]) == pytest.approx((statistics.mean(scores), statistics.stdev(scores)))
        rates = recipes.RECIPES[name][2]
        if len(rates) > 1:  # the best of those tried, and not the last at either end
            assert run["tuning"].keys() == {f"{rate:g}" for rate in rates}
            assert run["lr"] == float(max(run["tuning"], key=run["tuning"].get))
            assert min(rates) < run["lr"] < max(rates)
        else:
            assert run["lr"] == rates[0] and not run["tuning"]


def test_the_speed_is_the_one_on_record() -> None:
    rows = record("benchmark")["rows"]
    rates = {row["kind"]: row["rate"] for row in rows}
    times = {row["kind"]: row["ratio"][0] for row in rows}
    pipeline = min(row["ratio"][0] for row in rows if row["kind"] == "pipeline")
    text = flat(README)
    assert f"on {rates['scratch']:.1f} phrases a second: {times['trainer']:.2f} times as fast as PEFT" in text
    assert f"and {times['trainer-grouped']:.2f} times as fast as these with batches grouped by length" in text
    assert f"answers {rates['playground']:.0f} lines a second, {pipeline:.2f} times as many" in text
    hours = 3 * SST2_PHRASES / rates["scratch"] / 3600
    assert f"about {hours:.1f} hours on two CPU cores" in README and record("benchmark")["machine"]["threads"] == 2


def test_what_onednn_and_cheaper_dropout_gain_is_on_record() -> None:
    found = [{row["kind"]: row for row in record(name)["rows"]} for name in ("onednn_before", "onednn", "dropout")]
    shown = shown_table("onednn").splitlines()[2:]
    kinds = ("scratch", "peft", "trainer-grouped", "playground")
    for line, kind in zip(shown, kinds, strict=True):
        assert line.endswith("".join(f"| {rows[kind]['rate']:.1f} " for rows in found) + "|")
    ratios = [[f"{r:.2f}" for r in rows["trainer-grouped"]["ratio_same_precision"]] for rows in found]
    before, one, both = ("{} ({}–{})".format(*ratio) for ratio in ratios)
    told = (
        f"`lora_scratch.py` is {both} times as fast as the grouped Trainer, {one} with oneDNN alone, before {before}."
    )
    assert told in flat(TABLES) and f"it is [{ratios[2][0]} times]" in flat(README)
    assert all(len(row["rounds"]) == 2 for rows in found for row in rows.values())
    ours, trainer = record("avx2")["rows"]
    ratio = "{:.2f} ({:.2f}–{:.2f})".format(*trainer["ratio_same_precision"])
    told = f"it is {ratio} times as fast ([{ours['rate']:.1f} against {trainer['rate']:.1f}](avx2.json))"
    assert told in flat(TABLES)
    spinning = record("avx2_300000_spins")["rows"][0]
    told = (
        f"from [{spinning['rate']:.1f}](avx2_300000_spins.json) to [{ours['rate']:.1f}](avx2.json) sentences a second"
    )
    assert told in flat(TABLES)


def test_the_tables_of_peoples_own_sentences_are_those_on_record() -> None:
    cells = record("own_tables")
    assert len(cells["cells"]) == 12 and all(len(cell["lora"]) == 3 for cell in cells["cells"].values())
    assert README.split("<!-- own -->")[1].split("<!-- /own -->")[0].strip() == own_tables.short_table(cells)
    assert TABLES.split("<!-- own-long -->")[1].split("<!-- /own-long -->")[0].strip() == own_tables.table(cells)
    mpnet = own_tables.table(record("own_tables_mpnet"))
    assert TABLES.split("<!-- own-mpnet -->")[1].split("<!-- /own-mpnet -->")[0].strip() == mpnet


def test_the_cost_of_several_adapters_is_the_one_on_record() -> None:
    found = record("several_adapters")["adapters"]
    one, five = ({what: statistics.median(v) for what, v in found[count].items()} for count in ("1", "5"))
    text = flat(TABLES)
    assert f"after {one['seconds']:.1f} s with a peak of {one['megabytes']:,.0f} MB" in text
    assert f"five after {five['seconds']:.1f} s with {five['megabytes']:,.0f} MB" in text


def test_the_tables_of_what_comes_after_training_are_those_on_record() -> None:
    found = record("after_training")
    assert TABLES.split("<!-- after -->")[1].split("<!-- /after -->")[0].strip() == after_training.tables(found)
    assert all(len(runs) == 3 for runs in found["runs"].values()) and len(found["runs"]) == 12 + 1 + 2
    improved = cells = 0
    for key, runs in found["runs"].items():
        if key.startswith("calibration"):
            before, after = (statistics.mean(one[way]["nll"] for one in runs) for way in ("as it is", "scaled"))
            improved, cells = improved + (after < before), cells + 1
    assert f"[in {improved} of {cells} cases]" in flat(README)
    counts = [one["among the 50 surest"] for key, runs in found["runs"].items() if "flipped" in key for one in runs]
    assert f"{min(counts)} to {max(counts)} were among the 50 surest" in flat(README)


def test_the_figure_is_of_the_records() -> None:
    assert f"records {plot_results.digest(*plot_results.committed())}" in (RESULTS / "results.svg").read_text("utf-8")
    assert README.count("![") == 2 and "](tests/results/results.svg)" in README


def test_the_demos_run_is_the_one_on_record() -> None:
    run = record("demo")
    assert {key: run["settings"][key] for key in lora_scratch.DEMO} == lora_scratch.DEMO
    losses = "training loss {train_loss:.4f}, validation loss {eval_loss:.4f}, "
    shown = [run["epochs"][int(number) - 1] for number in re.findall(r"^epoch (\d+): ", README, re.MULTILINE)]
    assert len(shown) == 3 and shown[-1] == run["epochs"][-1]
    for epoch in shown:
        line = f"epoch {{epoch}}: {losses}accuracy {{accuracy:.2f}} % ({{correct}}/200), {{seconds:.1f}} s\n"
        assert line.format(**epoch) in README
    counts, result = run["parameters"], run["result"]
    assert all(f"{part:12}{counts[part]:>12,} " in README for part in ("lora", "head", "frozen base"))
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    assert f"{run['hardware']}, {run['precision']}; {versions}\n" in README
    assert f"({result['bytes'] / 1e6:.1f} MB); reloaded, it answers {result['correct']}/200 right\n" in README
    assert lora_scratch.label_report(torch.tensor(result["confusion"]), result["label_names"]) in README
    sst2 = run["sst2_validation"]
    for text in (README, TABLES):
        assert f"{sst2['correct']} ({100 * sst2['correct'] / 872:.2f} %)" in text


def test_the_four_lines_of_a_table_are_from_the_demos_sentences() -> None:
    shown = README.partition("```\ncomment,about\n")[2].partition("```")[0]
    with open(ROOT / lora_scratch.DEMO["dataset"] / "train.tsv", encoding="utf-8", newline="") as file:
        topics = {row["sentence"]: row["topic"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)}
    rows = list(csv.reader(shown.splitlines()))
    assert len(rows) == 3 and all(topics[text] == topic for text, topic in rows)
    count = sum(topic in ("hotel", "meal", "gadget") for topic in topics.values())
    assert f"`dataset/comments.csv` has {count} of the demo's sentences" in TABLES
