"""The package as it is installed: what the code opens beside itself must come along."""

import subprocess
import sys
from pathlib import Path

from tests.test_house import OURS, ROOT


OPENED = {".jinja", ".html", ".css", ".js", ".json", ".jsonl", ".yaml"}


def test_files_beside_the_code_are_installed_with_it(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", tmp_path / "base", "--build-lib", tmp_path / "lib"]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    wanted = {
        file.relative_to(ROOT) for folder in OURS for file in (ROOT / folder).rglob("*") if file.suffix in OPENED
    }
    assert Path("pegs/evaluation/templates/rate.css") in wanted
    assert sorted(file for file in wanted if not (tmp_path / "lib" / file).is_file()) == []
