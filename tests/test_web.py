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
from pathlib import Path

import pytest
from conftest import PEFT, SCRATCH, ask, ask_json, write

import playground

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = 'I loved <script>alert(1)</script> it <img src=x onerror="alert(2)"> & more'
WAIT = {"timeout": 60_000}


@pytest.fixture(scope="module")
def address(adapters, tmp_path_factory):
    """The page of both models, served by a process of its own."""
    if not (importlib.util.find_spec("gradio") and importlib.util.find_spec("playwright") and CHROMIUM):
        pytest.skip("needs pip install -r tests/requirements-web.txt, and a Chromium")
    log = write(tmp_path_factory.mktemp("web") / "log.txt", "")
    command = [sys.executable, playground.__file__, "--web", "--model", SCRATCH, "--model", PEFT]
    environment = {"PYTHONUNBUFFERED": "1"}
    with open(log, "w") as file:
        options = {"stdout": file, "stderr": file, "env": os.environ | environment | {"BROWSER": "true"}}
        child = subprocess.Popen(command, cwd=adapters, **options)
    try:
        started = time.monotonic()
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert child.poll() is None and time.monotonic() - started < 120, log.read_text()
            time.sleep(0.2)
        yield found[0]
    finally:
        child.terminate()
        child.wait(30)


@pytest.fixture
def page(address):
    """A tab of a browser that notes every request and refuses every dialog."""
    from playwright.sync_api import expect, sync_playwright

    with (
        sync_playwright() as run,
        run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
    ):
        page = browser.new_page()
        page.requests, page.dialogs, page.expect = [], [], expect
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("dialog", lambda dialog: (page.dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(address)
        yield page


def submit(page, text: str) -> None:
    page.get_by_label("A sentence").fill(text)
    page.get_by_label("A sentence").press("Enter")


def test_a_sentence_is_answered_as_on_the_command_line(page, here) -> None:
    submit(page, "I loved it")
    page.expect(page.get_by_role("heading", name="Positive")).to_have_count(3, **WAIT)
    said = [line.split()[1:] for line in ask("--model", SCRATCH, "--model", PEFT, "I loved it").splitlines()]
    headings = page.get_by_role("heading").all_inner_texts()
    assert headings[0] == "negative, positive?" and [line.split() for line in headings[1:]] == said
    green, red = (page.locator(f"span[style*='{colour} 0 / 0.']") for colour in ("0 160", "220 0"))
    (words,) = (answer["words"] for answer in ask_json("--model", SCRATCH, "--explain", "I loved it"))
    shown = green.or_(red).all_inner_texts()
    assert shown[:3] == [f"{word} {effect:+z.1f}" for word, effect in words]
    assert "accuracy 100.00 % (10/10), 95 % between 72 and 100" in page.locator("body").inner_text()


def test_a_hostile_sentence_stays_text_and_nothing_comes_from_outside(page, address) -> None:
    submit(page, HOSTILE)
    page.expect(page.get_by_text("<script>alert(1)</script>").first).to_be_visible(**WAIT)
    page.wait_for_timeout(500)
    assert page.dialogs == [] and page.locator("img[src=x]").count() == 0
    outside = [url for url in page.requests if not url.startswith((address, "data:", "blob:"))]
    assert page.requests and not outside


def test_a_dropped_file_is_judged_and_comes_back_or_a_message_does(page, tmp_path: Path) -> None:
    rows = 'id,label,text\n007,positive,"I loved it, twice"\n8,positive,I hated it\n'
    page.locator("input[type=file]").first.set_input_files(write(tmp_path / "mine.csv", rows))
    with page.expect_download(**WAIT) as download:
        page.locator("a[download^=answers]").last.click(**WAIT)
    with open(download.value.path(), encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file))
    assert header[:5] == ["id", "label", "text", "label LoRA_scratch", "probability LoRA_scratch"]
    kept = [[row[0], row[2], row[3]] for row in rows]
    assert kept == [["007", "I loved it, twice", "positive"], ["8", "I hated it", "negative"]]
    page.expect(page.get_by_text("accuracy 50.00 % (1/2)").first).to_be_visible(**WAIT)
    page.expect(page.get_by_text("agrees LoRA_peft").first).to_be_visible(**WAIT)
    assert "row 3, given positive, answered negative" in page.locator("pre").inner_text()
    page.reload()
    page.locator("input[type=file]").first.set_input_files(write(tmp_path / "bad.csv", "a,b,c\n1,2,3\n"))
    page.get_by_text("bad.csv: which of a, b, c is the text?").first.wait_for(**WAIT)
