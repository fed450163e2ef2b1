"""The default path over a Hub: both scripts and the playground as processes, a Hub on localhost."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lora_scratch

import datasets
import pytest
import torch
from conftest import PEFT, ROOT, SCRATCH, without_notes
from hub import Hub
from safetensors.torch import load

(MODEL, PINNED), OTHER, NEWEST = lora_scratch.DISTILBERT, "b" * 40, "c" * 40  # commits
NOBODY = "http://127.0.0.1:9"
QUESTION = ("I loved it", "I hated it")


def as_parquet(file: Path) -> bytes:
    """A table of GLUE as the Hub has it."""
    rows = datasets.Dataset.from_csv(str(file), sep="\t")
    rows = rows.cast_column("label", datasets.ClassLabel(names=["negative", "positive"]))
    rows.add_column("idx", [*range(len(rows))]).to_parquet(made := io.BytesIO())
    return made.getvalue()


IN_TURN = """
import importlib, json, sys
import lora_scratch
codes = set()
for script, *arguments in json.loads(sys.argv[1]):
    try:
        lora_scratch.run(lambda: importlib.import_module(script).main(arguments))
    except SystemExit as end:
        codes.add(end.code or 0)
(code,) = codes
sys.exit(code)
"""


class Place:
    """A folder to work in, with caches of its own."""

    def __init__(self, folder: Path, hub: Hub):
        self.folder, self.hub = folder, hub

    def start(self, *words: object, cache="cache", url=None) -> subprocess.Popen:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": url or self.hub.url, "HF_HOME": str(self.folder / cache)}
        environment |= {"NO_PROXY": "*", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}  # nobody else is asked
        environment["PYTHONPATH"] = str(ROOT)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, *map(str, words)]
        return subprocess.Popen(command, cwd=self.folder, env=environment, **pipes)

    def train(self, *arguments: object, **where: str) -> subprocess.Popen:
        return self.start(lora_scratch.__file__, *arguments, **where)

    def ask(self, *arguments: object, **where: str) -> subprocess.Popen:
        return self.start(ROOT / "playground.py", *arguments, *QUESTION, **where)

    def in_turn(self, *calls: tuple[str, ...], **where: str) -> subprocess.Popen:
        """Several calls in one process, as imports take their time; its exit code is that of each."""
        return self.start("-c", IN_TURN, json.dumps(calls), **where)


def said_by(process: subprocess.Popen) -> str:
    """What a process said that ended well."""
    said, error = process.communicate(timeout=120)
    assert process.returncode == 0 and without_notes(error) == "", error
    return said


def assert_refused(process: subprocess.Popen, *whats: str) -> None:
    """One line for each of these, and exit code 2."""
    lines = without_notes(process.communicate(timeout=120)[1]).splitlines()
    assert process.returncode == 2
    for line, what in zip(lines, whats, strict=True):
        assert line.startswith("error: ") and what in line


def revision_of(path: Path) -> str:
    return torch.load(path, weights_only=True)["revision"]


@pytest.fixture(scope="module")
def place(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A folder in which both scripts were run, without a flag, over a Hub with their defaults."""
    with Hub() as hub:
        hub.branches = {"main": PINNED, "v2": OTHER}
        files = {file.name: file.read_bytes() for file in tiny_base.iterdir()}
        commits = hub.commits[f"models/{MODEL}"] = {PINNED: dict(files)}
        weights = load(files.pop("model.safetensors"))
        for factor, commit in ((2, OTHER), (3, NEWEST)):  # in the older format
            torch.save({name: factor * value for name, value in weights.items()}, made := io.BytesIO())
            commits[commit] = files | {"pytorch_model.bin": made.getvalue()}
        tables = {"README.md": b"---\nconfigs:\n- config_name: sst2\n  data_dir: sst2\n---\n"}
        for split, name in (("train", "train"), ("validation", "dev"), ("test", "dev")):
            table = as_parquet(tiny_data / f"{name}.tsv")
            tables[f"sst2/{split}-00000-of-00001.parquet"] = table
        hub.commits[f"datasets/{lora_scratch.GLUE[0]}"] = {lora_scratch.GLUE[2]: tables}
        place = Place(tmp_path_factory.mktemp("hub"), hub)
        said_by(place.in_turn(("lora_scratch",), ("lora_peft",)))
        yield place
        hub.shutdown()


def test_the_commit_that_was_used_stands_in_the_file_and_is_not_asked_for_again(place: Place) -> None:
    asked = ("playground", "--model", PEFT, *QUESTION)
    with place.hub.broken(None):
        said = said_by(place.in_turn(asked, ("playground", "--model", SCRATCH, "--glue", "SST-2.tsv")))
        assert said.count("LoRA_peft") == 2 and place.hub.requests == []
    assert revision_of(place.folder / SCRATCH) == PINNED
    for name, key in (("lora_peft.json", "base"), ("adapter_config.json", "base_model_name_or_path")):
        facts = json.loads((place.folder / PEFT / name).read_text())
        assert (facts[key], facts["revision"]) == (MODEL, PINNED)


def test_what_the_hub_refuses_ends_in_a_line(place: Place) -> None:
    calls = ("lora_scratch", "--output", "x.pt"), ("playground", "--model", SCRATCH, *QUESTION)
    with place.hub.broken("refuses"):
        assert_refused(place.in_turn(*calls, cache="refused"), "nyu-mll/glue", MODEL)


@pytest.mark.slow
def test_the_second_run_needs_no_hub(place: Place) -> None:
    with place.hub.broken("hangs"):
        hangs = place.train("--output", "hangs.pt")
        said_by(place.train("--output", "gone.pt", url=NOBODY))
        said_by(hangs)
        assert place.hub.requests == ["HEAD /"]
    assert revision_of(place.folder / "hangs.pt") == revision_of(place.folder / "gone.pt") == PINNED


@pytest.mark.slow
def test_a_revision_is_found_again_when_its_branch_has_moved(place: Place) -> None:
    run = ["--output", "v2.pt", "--revision"]
    said_by(place.train(*run, "v2"))
    assert revision_of(place.folder / "v2.pt") == OTHER
    place.hub.branches = {"main": NEWEST, "v2": NEWEST}
    elsewhere = place.ask("--model", "v2.pt", "--json", cache="elsewhere")
    assert_refused(place.train(*run, "nowhere"), "nowhere")
    expected = said_by(elsewhere)
    with place.hub.broken(None):
        assert said_by(place.ask("--model", "v2.pt", "--json")) == expected
        assert place.hub.requests == []


@pytest.mark.slow
def test_half_a_model_is_not_taken_for_a_whole_one(place: Place) -> None:
    question, cache = ["--model", SCRATCH, "--json"], "interrupted"
    with place.hub.broken("cuts"):
        assert_refused(place.ask(*question, cache=cache), MODEL)
    assert_refused(place.ask(*question, cache=cache, url=NOBODY), MODEL)
    with place.hub.broken(None):
        assert said_by(place.ask(*question, cache=cache)) == said_by(place.ask(*question))
        fetched = [path.rpartition("/")[2] for path in place.hub.requests if path.startswith("GET")]
        assert fetched == ["model.safetensors"]
