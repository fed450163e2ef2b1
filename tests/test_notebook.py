"""The README's first commands in a notebook, by a real kernel, on Colab and elsewhere.

pip install -r tests/requirements-notebook.txt
python -m pytest -m slow tests/test_notebook.py
"""

import os
import re
import sys
from pathlib import Path

from lora_scratch import DEMO

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(params=["elsewhere", "on Colab"])
def python(request, tiny_base: Path, tmp_path: Path, monkeypatch) -> str:
    """The Python that a cell calls, in a folder as setup.sh leaves it, but with a tiny base."""
    for name in ("dataset", "lora_scratch.py", "playground.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / DEMO["model"]).parent.mkdir()
    (tmp_path / DEMO["model"]).symlink_to(tiny_base)
    if request.param == "elsewhere":
        (tmp_path / ".venv").symlink_to(sys.prefix)
        return ".venv/bin/python"
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    return "python"


def run_cells(folder: Path, cells: list[str]) -> list[dict[str, str]]:
    """What each cell writes to stdout and to stderr, and the error that ends it."""
    for name in ("nbclient", "ipykernel"):
        pytest.importorskip(name, reason="needs pip install -r tests/requirements-notebook.txt")
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    options = {"resources": {"metadata": {"path": folder}}, "timeout": 300, "allow_errors": True}
    NotebookClient(notebook, **options).execute()
    written = []
    for cell in notebook.cells:
        written.append({"stdout": "", "stderr": "", "error": ""})
        for part in cell.outputs:
            text = part.get("text") or f"{part.ename} {part.evalue}"
            written[-1][part.get("name", "error")] += text
    return written


def test_the_readmes_first_commands_train_and_answer(python: str, tmp_path: Path) -> None:
    block = README.partition("```bash\n")[2].partition("```")[0]
    train, ask = re.findall(r"^python (.*?) *(?:#.*)?$", block, re.MULTILINE)
    cells = [f"!{python} {train} --max-steps 4", f"!{python} {ask}"]
    cells += [f"%run {train} --max-steps 4", f"%run {ask}", f"%run {train} --max-steps 0"]
    *ran, mistaken = run_cells(tmp_path, cells)
    assert [cell["error"] for cell in ran] == [""] * 4, ran
    assert all("\naccuracy " in cell["stdout"] for cell in ran[::2]), ran
    answers = [cell["stdout"].splitlines()[-1] for cell in ran[1::2]]
    assert answers[0] == answers[1] and answers[0].endswith(" %"), answers
    assert mistaken["error"] == "SystemExit 2" and mistaken["stderr"].count("\n") == 1
