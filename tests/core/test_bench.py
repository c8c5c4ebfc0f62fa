"""The figures are taken by hand; here the scripts that need neither ComfyUI nor peers run at all."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"


def test_a_stage_is_measured_in_a_process_of_its_own(tmp_path):
    found = tmp_path / "found.json"
    command = [sys.executable, BENCH / "paper_size.py", "--device", "cpu", "--dtype", "float32", "--size", "tiny"]
    command += ["--stages", "base", "--calls", "1", "--json", found]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    values = json.loads(found.read_text())
    assert values["settings"]["device"] == "CPU"
    (row,) = values["rows"]
    assert (row["stage"], row["side"]) == ("base", 64)
    assert 0 < row["GiB of weights"] < row["GiB at its peak"]
    assert row["call, s"] > 0
