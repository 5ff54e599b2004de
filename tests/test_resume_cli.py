"""An interrupted command as a user meets it: one line that says what is kept, and --resume that goes on from there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint.checkpoint_toys import files_in

from mergekit_plus.checkpoint.journal import read

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "tests" / "models"
MERGE = ["merge", str(MODELS / "code"), str(MODELS / "docs"), "-o", "out", "--max-shard-size", "300kB", "--workers", "1"]
SLOW = """
import importlib, itertools, time
saving = importlib.import_module("mergekit_plus.checkpoint.save")
write_unit, calls = saving.write_unit, itertools.count()
saving.write_unit = lambda *unit: (write_unit(*unit), time.sleep(0 if next(calls) < 12 else 3))
from mergekit_plus.__main__ import main
main()
"""  # a merge of models so small would be over before one can press a key


def program(cwd: Path, *arguments: str, code: str = "from mergekit_plus.__main__ import main; main()") -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr."""
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def test_ctrl_c_ends_with_one_line_and_resume_goes_on(tmp_path: Path) -> None:
    process = program(tmp_path, *MERGE, code=SLOW)
    deadline = time.monotonic() + 100
    while len(read(tmp_path / ".out.partial" / "journal").shards) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    second = program(tmp_path, *MERGE)
    code, err = ended(second)
    assert code == 2
    assert f"out: process {process.pid} on " in err
    process.send_signal(signal.SIGINT)
    code, err = ended(process)
    assert code == 130
    (line,) = err.strip().splitlines()
    assert line.startswith(f"compress: interrupted; {tmp_path}/out: ")
    assert line.endswith(" of 2.9 MB are kept, go on with --resume")

    code, err = ended(program(tmp_path, *MERGE))
    assert code == 2
    assert "an interrupted run finished" in err
    assert "continue it with --resume, or start over with --overwrite" in err
    assert ended(program(tmp_path, *MERGE, "--resume"))[0] == 0
    resumed = files_in(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert ended(program(tmp_path, *MERGE))[0] == 0
    assert files_in(tmp_path / "out") == resumed
    assert os.listdir(tmp_path) == ["out"]


def test_a_disk_that_is_full_and_then_is_not(tmp_path: Path) -> None:
    """On a tmpfs on which the shards have room, and the tokenizer has none."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("NOT TESTED on a real disk: this machine does not permit `unshare -rm` to mount a small tmpfs (test_resume.py injects the errors)")
    script = f"""
        mount -t tmpfs -o size=2848k tmpfs {tmp_path} && cd {tmp_path} || exit 99
        run() {{
            {sys.executable} -c "from mergekit_plus.__main__ import main; main()" merge {MODELS}/code {MODELS}/docs -o out --workers 1 "$@"
            echo "code $?" >&2
        }}
        run
        mount -o remount,size=16m {tmp_path} || exit 99
        run --resume
        mv out resumed
        run
        for file in model.safetensors tokenizer.json recipe.yaml manifest.json; do cmp out/$file resumed/$file || exit 98; done
        ls -A
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.strip().splitlines()
    assert lines[0].endswith("/out: No space left on device; 2.9 of 2.9 MB are kept, go on with --resume"), lines
    assert lines[1:] == ["code 2", "code 0", "code 0"]
    assert result.stdout.split()[-2:] == ["out", "resumed"]
