"""Run both training scripts from the same start and compare what comes out.

PEFT draws its initial tensors in another order, so equal seeds are not an equal start: the tensors
with which lora_peft.py begins are copied into lora_scratch.py, and both seed again before they train.

    python tests/figures/side_by_side.py --model model/minilm-l6-distilbert --dataset dataset/SST-2 \\
        --recipe published --train-samples 10000 --epochs 3 --precision fp32

writes results/side_by_side.json. The flags are those of the two scripts, except --output.
"""

import sys
import tempfile
from pathlib import Path
from unittest import mock

import measure

import lora_scratch

import torch

import lora_peft


def run_both(flags: list[str], folder: Path) -> dict[str, dict]:
    """Record and losses of lora_peft.main, and of lora_scratch.main from the same tensors."""
    initial, losses, found = {}, [], {}
    real_train = lora_scratch.train

    def train(model: torch.nn.Module, *rest) -> None:
        named = lora_peft.own_names(dict(model.named_parameters()))
        trained = {name: p for name, p in named.items() if "lora_" in name or "classifier" in name}
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(initial.setdefault(name, parameter.clone()))
        assert trained.keys() == initial.keys()
        torch.manual_seed(0)
        real_train(model, *rest)
        losses.append(torch.as_tensor(rest[-1].losses).tolist())  # of the state

    scripts = (("lora_peft", lora_peft, "peft"), ("lora_scratch", lora_scratch, "scratch.pt"))
    for name, script, output in scripts:
        path = folder / output
        with mock.patch.object(script, "train", train):
            script.main([*flags, "--output", str(path)])
        record = measure.read_record(path.with_suffix(".json"))
        record["settings"].pop("output")  # a temporary folder
        found[name] = {"record": record, "losses": losses[-1]}
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = run_both(sys.argv[1:], Path(folder))
    result = {name: run["record"] for name, run in found.items()}
    pairs = zip(*(run["losses"] for run in found.values()), strict=True)
    result["largest_loss_difference"] = max(abs(one - other) for one, other in pairs)
    measure.write_record(measure.RESULTS / "side_by_side.json", result)
    print(f"largest difference of a step's loss: {result['largest_loss_difference']:.1e}")


if __name__ == "__main__":
    main()
