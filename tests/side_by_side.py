"""Run both training scripts from the same start and compare what comes out.

PEFT draws its initial tensors in another order, so equal seeds are not an equal start: the tensors with which
lora_peft.py begins are copied into lora_scratch.py, and both seed again just before they train.

    python tests/side_by_side.py --model model/minilm-l6-distilbert --dataset dataset/SST-2 \\
        --recipe published --train-samples 10000 --epochs 3 --precision fp32

writes tests/results/side_by_side.json. The flags are those of the two scripts, except --output.
"""

import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import lora_peft
import lora_scratch


def run_both(flags: list[str], folder: Path) -> dict[str, dict]:
    """Train with lora_peft.main, then with lora_scratch.main from the same tensors; for each, record and losses."""
    initial, outcome = {}, {}
    real_train = lora_scratch.train

    def train(model: torch.nn.Module, *rest) -> None:
        own = lora_peft.own_names(model.state_dict())
        trained = {name: own[name] for name, p in lora_peft.own_names(dict(model.named_parameters())).items()}
        trained = {name: t for name, t in trained.items() if "lora_" in name or "classifier" in name}
        if not initial:
            initial.update({name: tensor.clone() for name, tensor in trained.items()})
        assert trained.keys() == initial.keys()
        for name, tensor in trained.items():
            tensor.copy_(initial[name])
        torch.manual_seed(0)
        real_train(model, *rest)
        outcome[script]["losses"] = rest[-1].losses.tolist()  # of the state

    for script, module, output in (("lora_peft", lora_peft, "peft"), ("lora_scratch", lora_scratch, "scratch.pt")):
        outcome[script] = {}
        with mock.patch.object(module, "train", train):
            module.main([*flags, "--output", str(folder / output)])
        outcome[script]["record"] = json.loads((folder / output).with_suffix(".json").read_text(encoding="utf-8"))
    return outcome


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        outcome = run_both(sys.argv[1:], Path(folder))
    losses = [torch.tensor(outcome[script]["losses"]) for script in ("lora_peft", "lora_scratch")]
    result = {script: outcome[script]["record"] for script in outcome}
    for record in result.values():
        record["settings"].pop("output")  # a temporary folder
    result["largest_loss_difference"] = (losses[0] - losses[1]).abs().max().item()
    path = Path(__file__).parent / "results" / "side_by_side.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"largest difference of a step's loss {result['largest_loss_difference']:.1e}; see {path.name}")


if __name__ == "__main__":
    main()
