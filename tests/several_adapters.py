"""What several adapters on one base cost: peak memory and time to the first answer of playground.py.

    python tests/several_adapters.py --model model/all-mpnet-base-v2

Five adapters of one step each on the demo's sentences, all linear layers; then one and all five are asked one sentence,
taking turns, three rounds, each in a process of its own. It writes tests/results/several_adapters.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmark import cpu_name

ROOT = Path(__file__).parent.parent
COUNTS = (1, 5)


def ask(models: list[Path]) -> tuple[float, float]:
    """Seconds and peak memory in MB of one call."""
    command = [sys.executable, ROOT / "playground.py", "A warm, funny film."]
    command += [part for model in models for part in ("--model", str(model))]
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0
    return time.perf_counter() - start, usage.ru_maxrss / 1024  # Linux counts in KiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the base model")
    default = Path(__file__).parent / "results" / "several_adapters.json"
    parser.add_argument("--output", type=Path, default=default, help="the record")
    args = parser.parse_args()
    found = {str(count): {"seconds": [], "megabytes": []} for count in COUNTS}
    with tempfile.TemporaryDirectory() as folder:
        models = [Path(folder) / f"{seed}.pt" for seed in range(max(COUNTS))]
        for seed, model in enumerate(models):
            flags = [
                "--dataset",
                ROOT / "dataset" / "demo",
                "--max-steps",
                "1",
                "--seed",
                str(seed),
                "--model",
                args.model,
            ]
            command = [sys.executable, ROOT / "lora_scratch.py", *flags, "--output", model]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        size = sum(model.stat().st_size for model in models) / len(models) / 1e6
        for _ in range(3):
            for count in COUNTS:
                seconds, megabytes = ask(models[:count])
                found[str(count)]["seconds"].append(seconds)
                found[str(count)]["megabytes"].append(megabytes)
    record = {"machine": cpu_name(), "model": Path(args.model).name, "adapter, MB": size, "adapters": found}
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for count, values in found.items():
        shown = [f"{statistics.median(v):.1f} {what}" for what, v in values.items()]
        print(f"{count} adapters of {size:.1f} MB: {', '.join(shown)}")


if __name__ == "__main__":
    main()
