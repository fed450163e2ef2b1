"""playground.py --web in a real browser: type, read the answer, drop a file, get it back.

pip install -r tests/requirements-web.txt      # and a Chromium of the system
python -m pytest -m slow tests/test_web.py
"""

import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SCRATCH

import playground

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = 'I loved <script>alert(1)</script> it <img src=x onerror="alert(2)"> & more'


@pytest.fixture(scope="module")
def address(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of both adapters, served by a process of its own."""
    for module in ("gradio", "playwright"):
        if not importlib.util.find_spec(module):
            pytest.skip(f"no {module}: pip install -r tests/requirements-web.txt")
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    log = tmp_path_factory.mktemp("web") / "log.txt"
    with open(log, "w") as file:
        command = [sys.executable, playground.__file__, "--web"]
        child = subprocess.Popen(
            command, cwd=adapters, stdout=file, stderr=file, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        )
    try:
        for _ in range(600):
            if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
                yield found[0]
                break
            assert child.poll() is None, log.read_text()
            time.sleep(0.2)
        else:
            pytest.fail(f"no page in two minutes: {log.read_text()}")
    finally:
        child.terminate()
        child.wait(30)


@pytest.fixture
def page(address: str):
    """A tab of a browser that notes every request and refuses every dialog."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as run:
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
        with run.chromium.launch(**options) as browser:
            page = browser.new_page()
            page.requests, page.dialogs = [], []
            page.on("request", lambda request: page.requests.append(request.url))
            page.on("dialog", lambda dialog: (page.dialogs.append(dialog.message), dialog.dismiss()))
            page.goto(address)
            yield page


def test_a_sentence_is_answered_as_on_the_command_line(page, adapters: Path) -> None:
    from playwright.sync_api import expect

    page.get_by_label("A sentence").fill("I loved it")
    page.get_by_label("A sentence").press("Enter")
    for name in ("LoRA_scratch", "LoRA_peft"):
        expect(page.get_by_label(name)).to_have_value(re.compile(r"Positive +\d+\.\d %"), timeout=60_000)
    alone = subprocess.run(
        [sys.executable, playground.__file__, "--model", SCRATCH, "I loved it"],
        cwd=adapters, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert page.get_by_label("LoRA_scratch").input_value().split() == alone.split()[1:]
    assert page.locator("body").inner_text().count("loved") >= 2  # among the words of each model


def test_a_hostile_sentence_stays_text_and_nothing_comes_from_outside(page, address: str) -> None:
    from playwright.sync_api import expect

    page.get_by_label("A sentence").fill(HOSTILE)
    page.get_by_label("A sentence").press("Enter")
    expect(page.get_by_text("<script>alert(1)</script>").first).to_be_visible(timeout=60_000)
    page.wait_for_timeout(500)
    assert page.dialogs == [] and page.locator("img[src=x]").count() == 0
    outside = [url for url in page.requests if not url.startswith((address, "data:", "blob:"))]
    assert page.requests and not outside


def test_an_example_is_a_click(page, tiny_data: Path) -> None:
    from playwright.sync_api import expect

    sentence = (tiny_data / "dev.tsv").read_text(encoding="utf-8").splitlines()[1].split("\t")[0]
    page.get_by_text(sentence, exact=True).click()
    expect(page.get_by_label("LoRA_peft")).to_have_value(re.compile(r"\d %"), timeout=60_000)
    assert page.get_by_label("A sentence").input_value() == sentence


def test_a_dropped_file_comes_back_with_its_answers(page, tmp_path: Path) -> None:
    table = tmp_path / "mine.csv"
    table.write_text('id,text\n007,"I loved it, twice"\n8,I hated it\n', encoding="utf-8")
    page.locator("input[type=file]").first.set_input_files(table)
    with page.expect_download(timeout=60_000) as download:
        page.locator("a[download^=answers]").last.click(timeout=60_000)
    with open(download.value.path(), encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file))
    assert header[:4] == ["id", "text", "label LoRA_scratch", "probability LoRA_scratch"]
    assert [row[:3] for row in rows] == [["007", "I loved it, twice", "positive"], ["8", "I hated it", "negative"]]


def test_a_file_that_cannot_be_read_is_one_message(page, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "bad.csv")
    page.get_by_text("no column 'sentence'").first.wait_for(timeout=60_000)
