"""The benchmark writes what its table needs, and the README shows the table of the record that is kept."""

import json
import subprocess
import sys
from pathlib import Path

import benchmark
import pytest

TESTS = Path(__file__).parent
ROW = {"count": 800, "rounds": [106.0, 108.0], "rate": 107.0, "peak_mb": 1000.4, "useful_gflops": 241.9}
SLOW = {"count": 100, "rounds": [5.7, 5.7], "rate": 5.7, "peak_mb": 1983.0, "useful_gflops": 13.1}
RECORD = {
    "machine": {"name": "A CPU", "cores": 4, "threads": 2, "versions": {"torch": "2.13.0"}},
    "settings": {"rounds": 2},
    "phrases": {"source": "random phrases", "mean_tokens": 13.32, "longest": 66},
    "rows": [
        ROW | {"kind": "scratch", "label": "ours, bf16", "ratio": [1, 1, 1], "of_ceiling": [0.648, 0.6, 0.7]},
        SLOW
        | {"kind": "trainer-grouped", "label": "theirs, fp32", "ratio": [18.77, 18.6, 18.9], "of_ceiling": None}
        | {"ratio_same_precision": [2.5, 2.4, 2.6]},
        {"kind": "playground", "label": "ours", "rate": 2512.0, "peak_mb": 800.0, "ratio": [1.0, 1.0, 1.0]},
        {"kind": "pipeline", "label": "pipeline, batch 8", "rate": 99.94, "peak_mb": 900.0, "ratio": None},
    ],
    "start": {"imports": 4.04, "load_tables": 1.0, "total": 9.0},
}
TABLE = """\
| training | sentences/s | useful GFLOP/s | of the ceiling | 3 epochs of SST-2 | peak memory | the first row is … times as fast |
| --- | --- | --- | --- | --- | --- | --- |
| ours, bf16 | 107 | 242 | 65 % | 31 min | 1,000 MB | 1.00 (1.00–1.00) |
| theirs, fp32 | 5.7 | 13 |  | 9.8 h | 1,983 MB | 18.77 (18.60–18.90) |

| answering | lines/s | peak memory | the first row is … times as fast |
| --- | --- | --- | --- |
| ours | 2,512 | 800 MB | 1.00 (1.00–1.00) |
| pipeline, batch 8 | 99.9 | 900 MB |  |

In the same precision, `lora_scratch.py` is 2.50 (2.40–2.60) times as fast as theirs, fp32.

From the start to the first step on the whole data set: 9.0 seconds (imports 4.0, load_tables 1.0).

A CPU, 2 threads, PyTorch 2.13.0; random phrases of 13.3 tokens on average; medians of 2 rounds, the least and the \
greatest ratio in brackets."""  # noqa: E501


def test_markdown_table_of_a_record() -> None:
    RECORD["rows"][0]["ratio_same_precision"] = RECORD["rows"][0]["ratio"]
    assert benchmark.markdown_table(RECORD) == TABLE


def test_random_phrases_are_as_long_as_those_of_sst2() -> None:
    shares, tokens = list(benchmark.QUANTILES), list(benchmark.QUANTILES.values())
    pairs = zip(zip(shares, tokens, strict=True), zip(shares[1:], tokens[1:], strict=True), strict=False)
    mean = sum((b - a) / 100 * (m + n) / 2 for (a, m), (b, n) in pairs)
    assert abs(mean - 13.32) < 0.2 and tokens[-1] == 66


@pytest.mark.slow
def test_a_small_run_writes_rates_and_ratios(tmp_path: Path) -> None:
    output = tmp_path / "folder" / "record.json"
    flags = [
        "--only",
        "scratch",
        "trainer",
        "playground",
        "pipeline-fp32-1",
        "--rounds",
        "1",
        "--phrases",
        "20",
        "--lines",
        "1",
        "--threads",
        "1",
    ]
    flags += ["--layers", "1", "--dim", "32"]
    done = subprocess.run(
        [sys.executable, str(TESTS / "benchmark.py"), *flags, "--output", str(output)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in record["rows"]}
    auto = record["settings"]["auto"]
    trained = {f"{kind}-{p}" for kind in ("scratch", "trainer") for p in (auto, "fp32")}
    assert rows.keys() == trained | {"playground-fp32", "pipeline-fp32-1"}
    for name, row in rows.items():
        assert row["count"] == (20 if name in trained else 1)
        assert len(row["rounds"]) == 1 and row["rate"] > 0 and row["peak_mb"] > 50
    for row in (rows[name] for name in trained):
        assert row["ratio"] == [rows[f"scratch-{auto}"]["rate"] / row["rate"]] * 3
    assert benchmark.markdown_table(record) in done.stdout
    assert str(tmp_path) not in output.read_text(encoding="utf-8")


def test_readme_shows_the_record() -> None:
    record = json.loads((TESTS / "results" / "benchmark.json").read_text(encoding="utf-8"))
    readme = (TESTS / "results" / "README.md").read_text(encoding="utf-8")
    shown = readme.split("<!-- benchmark -->")[1].split("<!-- /benchmark -->")[0]
    assert shown.strip() == benchmark.markdown_table(record)
