"""One figure from the JSON records of runs: loss, accuracy, and the benchmark's bars.

    python tests/plot_results.py                                    # the committed records → tests/results/results.svg
    python tests/plot_results.py model/a.json model/b.json --output runs.svg    # records of your own

The background is transparent and every colour keeps its contrast on a white page and on a dark one.
"""

import argparse
import hashlib
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
INK = "#7a7a7a"  # text and axes: the grey in the middle between the two pages
COLORS = ["#2f81f7", "#d9730d", "#2a9d5c", "#a371f7", "#e5534b", "#1b8a97"]
STYLE = {
    "svg.hashsalt": "lora",  # the same file from the same records
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.framealpha": 0,
    "legend.fontsize": 9,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], INK),
}


def committed() -> tuple[dict[str, dict], list[dict]]:
    """The runs that the README reports, by the name in the legend, and the benchmark's rows."""
    both = json.loads((RESULTS / "side_by_side.json").read_text(encoding="utf-8"))
    runs = {f"{script}.py\n10,000 phrases": both[script] for script in ("lora_scratch", "lora_peft")}
    for path in sorted(RESULTS.glob("default_seed*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        runs[f"lora_scratch.py\nall phrases, seed {run['settings']['seed']}"] = run
    return runs, json.loads((RESULTS / "benchmark.json").read_text(encoding="utf-8"))["rows"]


def digest(runs: dict[str, dict], bars: list[dict]) -> str:
    """What the figure shows, as SHA-256: it is written into the file."""
    shown = [[name, run["loss_curve"], run["epochs"]] for name, run in runs.items()]
    return hashlib.sha256(json.dumps([shown, [[row["label"], row["rate"]] for row in bars]]).encode()).hexdigest()


def look(i: int) -> dict:
    """The first run's line is broad, the others' are dashed over it: lines that coincide both show."""
    line = {"linewidth": 5} if i == 0 else {"linewidth": 1.8, "linestyle": (0, (2, 2))}
    return line | {"color": COLORS[i % len(COLORS)]}


def plot_loss(axes: Axes, runs: dict[str, dict]) -> None:
    """The training loss: means over a few steps each, as a record keeps them."""
    for i, (name, run) in enumerate(runs.items()):
        every, loss = run["loss_curve"]["every"], run["loss_curve"]["loss"]
        axes.plot([every * (n + 1) for n in range(len(loss))], loss, label=name, **look(i))
    axes.set(title="training loss", xlabel="step")


def plot_accuracy(axes: Axes, runs: dict[str, dict]) -> None:
    """The accuracy on the validation set after each epoch."""
    for i, (name, run) in enumerate(runs.items()):
        x, y = zip(*((epoch["epoch"], epoch["accuracy"]) for epoch in run["epochs"]), strict=True)
        axes.plot(x, y, marker="o", label=name, **look(i))
    axes.set(title="validation accuracy, %", xlabel="epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)


def plot_bars(axes: Axes, rows: list[dict], title: str) -> None:
    """A bar for each row of the benchmark, ours in blue."""
    names = [row["label"].replace("*", "").replace("`", "").replace(", fp32", "") for row in rows]
    rates = [row["rate"] for row in rows]
    ours = ["**" in row["label"] for row in rows]
    bars = axes.barh(names, rates, color=[COLORS[0] if own else INK for own in ours], height=0.65)
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(title=title)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="*", help="JSON records of runs (default: the committed ones)")
    parser.add_argument("--output", type=Path, default=RESULTS / "results.svg", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        runs = {str(path.with_suffix("")): json.loads(path.read_text(encoding="utf-8")) for path in args.records}
        plotted = [(run["loss_curve"]["loss"], run["epochs"][0]["accuracy"]) for run in runs.values()]
    except (OSError, ValueError, LookupError, TypeError) as error:
        parser.error(f"not a record of a run: {error}; give the .json file beside a run's output")
    runs, bars = (runs, []) if plotted else committed()
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(11, 7.5 if bars else 4), layout="constrained")
        above, *below = figure.subfigures(1 + bool(bars), 1, squeeze=False)[:, 0]
        left, right = above.subplots(1, 2)
        plot_loss(left, dict(list(runs.items())[: 2 if bars else None]))
        plot_accuracy(right, runs)
        right.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
        if below:
            above.suptitle("the MiniLM stand-in")
            below[0].suptitle("full-size DistilBERT, random weights, fp32 on a CPU")
            left, right = below[0].subplots(1, 2)
            answering = [row for row in bars if row["kind"] in ("playground", "pipeline")]
            plot_bars(left, [row for row in bars if row not in answering], "training, sentences/s")
            plot_bars(right, answering, "answering, lines/s")
        figure.savefig(args.output, metadata={"Date": None, "Description": f"records {digest(runs, bars)}"})
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
