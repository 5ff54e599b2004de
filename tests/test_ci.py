"""What docs and the action give to CI systems: their commands run as they stand, but for the installation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_results import suites

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder as a runner has it: the recipes, the models, and `compress` on the path."""
    for name in ("recipes", "tests/models"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "compress").write_text(f'#!/bin/sh\nexec {sys.executable} -m mergekit_plus "$@"\n')
    (tmp_path / "bin" / "compress").chmod(0o755)
    return tmp_path


def bash(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A step's script as runners run it."""
    env = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "GITHUB_STEP_SUMMARY": str(folder / "summary.md"), **environment}
    command = [shutil.which("bash") or "bash", "-eo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=400, check=False)


def steps_of(document: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["run"] for step in document["steps"] if "run" in step}


def test_the_commands_of_the_example_workflow_run(checkout: Path) -> None:
    steps = steps_of(yaml.safe_load((REPOSITORY / "docs/ci/compress.yml").read_text())["jobs"]["compress"])
    assert list(steps) == ["install", "plan", "compress"]
    planned = bash(steps["plan"], checkout, TUNED=str(checkout / "tests/models/code"))
    assert planned.returncode == 0, planned.stderr
    assert "would write tuned-3bit" in planned.stdout
    assert not list(checkout.glob("tuned*"))
    done = bash(steps["compress"], checkout, TUNED=str(checkout / "tests/models/code"))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in checkout.glob("tuned*")) == ["tuned-3bit", "tuned-4bit"]
    found = suites(checkout / "checks.xml")
    assert list(found) == ["ci (bits=3)", "ci (bits=4)"]
    assert not any(message for suite in found.values() for message in suite.values())
    assert "| loading in transformers | all weights in place | yes |" in (checkout / "summary.md").read_text()


def test_the_action_carries_out_a_recipe_with_its_variables(checkout: Path) -> None:
    action = yaml.safe_load((REPOSITORY / ".github/actions/compress/action.yml").read_text())
    given = {"RECIPE": "recipes/ci.yaml", "VALUES": "bits=4 heldout=../tests/models/text/docs.val.txt", "DRY_RUN": "true", "JUNIT": "checks.xml"}
    done = bash(steps_of(action["runs"])["compress"], checkout, **given)
    assert done.returncode == 0, done.stderr
    assert "would write tuned-4bit" in done.stdout
    assert "tuned-3bit" not in done.stdout
