"""docs/start.md is followed as it stands, by someone with three models and a text."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from program import Program
from test_ci import steps_of

REPOSITORY = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(bash|yaml)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_first_steps_lead_to_a_checked_merge_in_ci(compress: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in {"base": "base", "code": "code", "docs": "docs", "heldout.txt": "text/code.test.txt"}.items():
        (tmp_path / name).symlink_to(REPOSITORY / "tests/models" / source)

    def follow(commands: str) -> None:
        for line in commands.splitlines():
            done = compress(*shlex.split(line)[1:])
            assert done.returncode == 0, (line, done.stderr)

    first, plan, merge, checks, measure, workflow = BLOCK.findall((REPOSITORY / "docs/start.md").read_text())
    for kind, commands in (first, plan, merge):
        assert kind == "bash"
        follow(commands)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(re.sub(r"^checks:.*?(?=^out:)", checks[1], recipe.read_text(), flags=re.MULTILINE | re.DOTALL))
    follow(measure[1])
    assert (tmp_path / "merged-4bit-report.html").exists()

    shutil.rmtree(tmp_path / "merged-4bit")  # a runner begins without
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    steps = steps_of(yaml.safe_load(workflow[1])["jobs"]["compress"])
    assert list(steps) == ["install", "plan", "compress"]
    follow(steps["plan"])
    assert not (tmp_path / "merged-4bit").exists()
    follow(steps["compress"])
    assert 'name="perplexity relative to model on heldout"' in (tmp_path / "checks.xml").read_text()
    assert "| loading in transformers |" in (tmp_path / "summary.md").read_text()
