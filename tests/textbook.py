"""Does speed cost accuracy? Train lora_scratch.py as it is and as a textbook has it, from the same seeds.

The textbook takes random batches and computes every token in the last layer; seeds, head, adapter and schedule are the
same.

    python tests/textbook.py --seeds 42 43 44 --model model/minilm-l6-distilbert --dataset dataset/SST-2 \\
        --recipe published --train-samples 10000 --epochs 1 --precision fp32

writes tests/results/textbook.json. The other flags are those of lora_scratch.py, except --seed and --output.
"""

import argparse
import contextlib
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import lora_scratch


def make_batches(lengths: Tensor, batch_size: int, shuffle_seed: int | None = None) -> list[list[int]]:
    order = torch.arange(len(lengths))
    if shuffle_seed is not None:
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(shuffle_seed))
    return [batch.tolist() for batch in order.split(batch_size)]


def train_once(flags: list[str], seed: int, textbook: bool) -> dict:
    """The record of one run."""
    with contextlib.ExitStack() as stack:
        output = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "out.pt"
        if textbook:
            stack.enter_context(mock.patch.object(lora_scratch, "make_batches", make_batches))
            stack.enter_context(mock.patch.object(lora_scratch, "compute_cls_only", lambda model: None))
        lora_scratch.main([*flags, "--seed", str(seed), "--output", str(output)])
        return json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", required=True, help="one pair of runs for each")
    args, flags = parser.parse_known_args()
    result = {"flags": flags, "seeds": args.seeds}
    for name, textbook in (("as_it_is", False), ("textbook", True)):
        records = [train_once(flags, seed, textbook) for seed in args.seeds]
        result["hardware"] = records[0]["hardware"]
        result[name] = {"correct": [record["result"]["correct"] for record in records]}
        result[name]["seconds"] = [sum(epoch["seconds"] for epoch in record["epochs"]) for record in records]
        scores = [record["result"]["accuracy"] for record in records]
        result[name] |= {"mean": statistics.mean(scores), "deviation": statistics.stdev(scores)}
    one, other = result["as_it_is"], result["textbook"]
    result["difference"] = one["mean"] - other["mean"]  # of the means, in percentage points
    result["standard_error"] = math.hypot(one["deviation"], other["deviation"]) / math.sqrt(len(args.seeds))
    path = Path(__file__).parent / "results" / "textbook.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"difference of the means {result['difference']:+.2f}, standard error {result['standard_error']:.2f} points")


if __name__ == "__main__":
    main()
