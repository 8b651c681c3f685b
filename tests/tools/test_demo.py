"""The demo's own command lines, at a size that shows nothing but that they run."""

import subprocess
import sys

from tests.conftest import ROOT


def test_every_step_runs(build_folder, tmp_path):
    command = [sys.executable, ROOT / "tools" / "demo.py", "--out", tmp_path / "demo"]
    sizes = ["--steps", "2", "--samples", "1", "--length", "3072"]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for report in ("needle", "heldout"):
        assert (tmp_path / "demo" / report / "report.html").stat().st_size > 0
    assert "spot:k=2048" in done.stdout
