"""How much slower a training is where other programs use the processor, and what helps.

    python tests/busy_machine.py

The demo (after ./setup.sh --demo), 60 steps in float32 in a process of its own, alone and beside one and two processes
that do nothing but count, taking turns, three rounds. PyTorch's threads wait for one another after every operation. By
default they spin 300,000 times before they sleep, which takes the processor from the thread that they wait for; the
scripts set GOMP_SPINCOUNT to 1,000. It writes tests/results/busy_machine.json and prints the table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmark import cpu_name

ROOT = Path(__file__).parent.parent
SETTINGS = {  # name: threads (0: as many as there are cores), environment
    "300,000 spins, the library's default": (0, {"GOMP_SPINCOUNT": "300000"}),
    "30,000 spins": (0, {"GOMP_SPINCOUNT": "30000"}),
    "10,000 spins": (0, {"GOMP_SPINCOUNT": "10000"}),
    "1,000 spins, the scripts' setting": (0, {"GOMP_SPINCOUNT": "1000"}),
    "one thread": (1, {}),
}
BESIDE = (0, 1, 2)  # busy processes


def measure(threads: int, environment: dict[str, str], beside: int, steps: int) -> float:
    """Sentences a second of one training, beside so many busy processes."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "a.pt"
            command = [sys.executable, ROOT / "lora_scratch.py", "--demo", "--precision", "fp32", "--output", output]
            command += ["--max-steps", str(steps), *(["--threads", str(threads)] if threads else [])]
            subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=os.environ | environment)
            record = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
            return record["epochs"][-1]["sentences_per_second"]
    finally:
        for process in busy:
            process.kill()
            process.wait()


def table(record: dict) -> str:
    """Sentences a second: the median of the rounds, least and greatest in brackets."""
    lines = ["| | alone | beside one | beside two |", "|---|---|---|---|"]
    for name, rows in record["rates"].items():
        shown = [f"{statistics.median(r):.0f} ({min(r):.0f} to {max(r):.0f})" for r in rows.values()]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of each training (default: %(default)s)")
    default = Path(__file__).parent / "results" / "busy_machine.json"
    parser.add_argument("--output", type=Path, default=default, help="the record")
    args = parser.parse_args()
    rates = {name: {str(beside): [] for beside in BESIDE} for name in SETTINGS}
    record = {"machine": cpu_name(), "cores": os.cpu_count(), "steps": args.steps, "rates": rates}
    for _ in range(args.rounds):
        for beside in BESIDE:
            for name, (threads, environment) in SETTINGS.items():
                rates[name][str(beside)].append(measure(threads, environment, beside, args.steps))
                print(name, beside, round(rates[name][str(beside)][-1], 1), flush=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record))


if __name__ == "__main__":
    main()
