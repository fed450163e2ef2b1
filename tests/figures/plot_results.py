"""One figure from the JSON records of runs: loss, accuracy, and the benchmark's bars.

    python tests/figures/plot_results.py                # the committed records → results/results.svg
    python tests/figures/plot_results.py model/a.json model/b.json --output runs.svg    # your own

The background is transparent and every colour keeps its contrast on a white page and on a dark one.
"""

import hashlib
import json
from pathlib import Path

import measure

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

INK = "#7a7a7a"  # text and axes: the grey in the middle between the two pages
COLORS = ["#2f81f7", "#d9730d", "#2a9d5c", "#a371f7", "#e5534b", "#1b8a97"]
INKED = ["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"]
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
    **dict.fromkeys(INKED, INK),
}


def committed() -> tuple[dict[str, dict], list[dict]]:
    """The runs that the README reports, by the name in the legend, and the benchmark's rows."""
    both = measure.read_record("side_by_side")
    runs = {f"{script}.py\n10,000 phrases": both[script] for script in ("lora_scratch", "lora_peft")}
    for seed in measure.SEEDS:
        run = measure.read_record(f"default_seed{seed}")
        runs[f"lora_scratch.py\nall phrases, seed {seed}"] = run
    return runs, measure.read_record("benchmark")["rows"]


def digest(runs: dict[str, dict], bars: list[dict]) -> str:
    """What the figure shows, as SHA-256: it is written into the file."""
    lines = [[name, run["loss_curve"], run["epochs"]] for name, run in runs.items()]
    shown = json.dumps([lines, [[row["label"], row["rate"]] for row in bars]])
    return hashlib.sha256(shown.encode()).hexdigest()


def look(i: int) -> dict:
    """The first line is broad, the others are dashed over it: lines that coincide both show."""
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
        epochs = [epoch["epoch"] for epoch in run["epochs"]]
        axes.plot(epochs, [epoch["accuracy"] for epoch in run["epochs"]], marker="o", label=name, **look(i))
    axes.set(title="validation accuracy, %", xlabel="epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)


def plot_bars(axes: Axes, rows: list[dict], title: str) -> None:
    """A bar for each row of the benchmark, this project's in blue."""
    names = [row["label"].replace("*", "").replace("`", "").replace(", fp32", "") for row in rows]
    colors = [COLORS[0] if "**" in row["label"] else INK for row in rows]
    bars = axes.barh(names, [row["rate"] for row in rows], color=colors, height=0.65)
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(title=title)


def main(argv: list[str] | None = None) -> None:
    parser = measure.make_parser(__doc__)
    parser.add_argument("records", type=Path, nargs="*", help="records of runs (default: the committed ones)")
    parser.add_argument("--output", type=Path, default=measure.RESULTS / "results.svg", help="the figure")
    args = parser.parse_args(argv)
    runs, bars = {str(path.with_suffix("")): measure.read_record(path) for path in args.records}, []
    if not runs:
        runs, bars = committed()
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
