"""What the programs of this folder share: processes that are measured, records, numbers and tables."""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

FIGURES = Path(__file__).parent
RESULTS = FIGURES / "results"
ROOT = FIGURES.parent.parent
sys.path.insert(0, str(ROOT))  # for lora_scratch.py and its neighbours

SEEDS = [42, 43, 44]
SST2_PHRASES = 67_349  # to train on; 872 sentences to validate


def make_parser(description: str, record: str | None = None) -> argparse.ArgumentParser:
    """A parser whose help is the program's docstring, with --output where the program keeps a record."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=layout)
    if record:
        parser.add_argument("--output", type=Path, default=RESULTS / record, help="the record")
    return parser


def read_record(path: Path | str) -> dict:
    """A record: its path, or its name in results/."""
    path = path if isinstance(path, Path) else RESULTS / f"{path}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def write_record(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def continue_record(path: Path, settings: dict, runs: dict[str, list]) -> dict:
    """The record at the path, or a new one; one that was made with other settings ends the program."""
    if not path.exists():
        return settings | {"runs": runs}
    record = read_record(path)
    for name, value in settings.items():
        if record.get(name) != value:
            sys.exit(f"{path}: {name} is {record.get(name)}, not {value}; name another --output")
    return record | {"runs": runs | record["runs"]}


def versions() -> dict[str, str]:
    packages = ("torch", "transformers", "peft", "accelerate", "datasets")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def cpu_name() -> str:
    """The processor's own name, and the vector instructions that PyTorch uses."""
    from torch.backends.cpu import get_cpu_capability

    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", file.read_text() if file.exists() else "")
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name} ({get_cpu_capability()})"


class Process(NamedTuple):
    """What a process took and printed."""

    seconds: float  # from its start to its end
    peak_mb: float
    printed: str


def run_process(command: list) -> Process:
    """Run a Python program to its end; one that fails ends this program with its last lines."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        words = [sys.executable, *map(str, command)]
        child = subprocess.Popen(words, stdout=output, stderr=errors, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if child.returncode:
            sys.exit(f"{' '.join(words)}\n{errors.read()[-4000:]}")
        unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
        return Process(seconds, usage.ru_maxrss * unit / 1e6, output.read())


def train(script: str | Path, flags: list, output: Path) -> dict:
    """Run a training script; its record, with the seconds and the peak memory of the whole process."""
    done = run_process([ROOT / script, *flags, "--output", output])
    record = read_record(output.with_suffix(".json"))
    return record | {"process_seconds": done.seconds, "peak_mb": done.peak_mb}


def take_turns(
    cells: Iterable[tuple[list[dict], int, Callable[[], dict]]], save: Callable[[], None], jobs: int = 1
) -> None:
    """Add to each list the measurement of a seed that it lacks, in the order given, `jobs` at a time.

    `save` is called after each, so that the same command goes on where it was interrupted.
    """

    def fill(runs: list[dict], seed: int, measure: Callable[[], dict]) -> None:
        if any(run["seed"] == seed for run in runs):
            return
        run = {"seed": seed, **measure()}
        runs.append(run)
        runs.sort(key=lambda run: run["seed"])
        save()
        print(run, file=sys.stderr, flush=True)

    pool = ThreadPoolExecutor(jobs)
    try:
        for running in [pool.submit(fill, *cell) for cell in cells]:
            running.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure no other one begins


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def percent_right(runs: list[dict]) -> list[float]:
    return [100 * run["correct"] / run["total"] for run in runs]


def ratios(seconds: list[float], others: list[float]) -> list[float]:
    """Median, least and greatest of the ratios of two lists that took turns."""
    values = [one / other for one, other in zip(seconds, others, strict=False)]
    return [median(values), min(values), max(values)]


def times(ratio: list[float]) -> str:
    return "{:.2f} ({:.2f}–{:.2f})".format(*ratio)


def markdown(head: list[str], rows: Iterable[list]) -> str:
    """A table of GitHub's Markdown."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in [head, *rows]]
    return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]])
