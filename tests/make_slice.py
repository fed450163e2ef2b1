"""A slice of SST-2's training data to tune settings on, so that no validation sentence is read for that.

    python tests/make_slice.py --dataset dataset/SST-2 --output model/slice

SST-2's training phrases are whole sentences and parts of them. A sentence counts as whole if it has six words or more
and is no part of another. 2,000 of these are held out (dev.tsv), and every phrase that is a part of one of them is left
out of the training rows (train.tsv): a phrase held out at random would mostly have been seen inside a longer one.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

HELD_OUT, LEAST_WORDS = 2000, 6


def parts(text: str) -> Iterator[str]:
    """Every run of words of the text, the whole text too."""
    words = text.split()
    for start in range(len(words)):
        for end in range(start + 1, len(words) + 1):
            yield " ".join(words[start:end])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="SST-2's folder, with train.tsv")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    args = parser.parse_args()
    lines = (args.dataset / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]
    rows = [(text.strip(), label) for text, label in (line.split("\t") for line in lines)]
    texts = {text for text, _ in rows}
    inside = {part for text in texts for part in parts(text) if part != text and part in texts}
    whole = sorted(text for text in texts - inside if len(text.split()) >= LEAST_WORDS)
    random.Random(0).shuffle(whole)
    held_out = set(whole[:HELD_OUT])
    seen = {part for text in held_out for part in parts(text) if part in texts}
    train = [(text, label) for text, label in rows if text not in seen]
    dev = list({text: label for text, label in reversed(rows) if text in held_out}.items())[::-1]  # the first of each
    args.output.mkdir(parents=True)
    for name, kept in (("train", train), ("dev", dev)):
        text = "sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in kept)
        (args.output / f"{name}.tsv").write_text(text, encoding="utf-8")
    print(f"{len(train):,} rows to train on, {len(dev):,} sentences held out of {len(whole):,} whole ones")


if __name__ == "__main__":
    main()
