"""Runs of a recipe in a matrix, and their results as JUnit XML and as Markdown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import refused

RECIPE = """
variables: {second: b}
matrix: {share: [0.25, 2]}
inputs: {a: a.safetensors, b: $second.safetensors}
steps: [{merge: {models: {a: {weight: 1}, b: {weight: $share}}, normalize: false}}]
checks: {limits: {bytes: %d, bits_per_weight: 32}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two files and a recipe whose limit is wide enough."""
    for name, value in (("a", 1.0), ("b", 3.0)):
        save_file({"w": torch.full((4, 4), value)}, tmp_path / f"{name}.safetensors", metadata={"format": "pt"})
    (tmp_path / "recipe.yaml").write_text(RECIPE % 1000)
    return tmp_path


def ran(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`compress run recipe.yaml` in a folder."""
    outside = {name: value for name, value in os.environ.items() if name != "GITHUB_STEP_SUMMARY"}
    command = [sys.executable, "-m", "mergekit_plus", "run", "recipe.yaml", *arguments]
    return subprocess.run(command, cwd=folder, env=outside | environment, capture_output=True, text=True, timeout=240, check=False)


def suites(path: Path) -> dict[str, dict[str, str | None]]:
    """Each suite's cases, and what is wrong with each."""
    root = ElementTree.parse(path).getroot()
    assert root.tag == "testsuites"
    found = {}
    for suite in root:
        wrong = {str(case.get("name")): next((str(child.get("message")) for child in case if child.tag in ("failure", "error")), None) for case in suite}
        assert int(suite.get("tests", "")) == len(wrong)
        assert int(suite.get("failures", "")) + int(suite.get("errors", "")) == sum(what is not None for what in wrong.values())
        found[str(suite.get("name"))] = wrong
    return found


def test_each_combination_is_written_and_each_check_is_a_test(folder: Path) -> None:
    done = ran(folder, "-o", "out.safetensors", "--junit", "deep/junit.xml", "--json", GITHUB_STEP_SUMMARY=str(folder / "summary.md"))
    assert done.returncode == 0, done.stderr
    assert load_file(folder / "out-share-0.25.safetensors")["w"].unique().tolist() == [1.75]
    assert load_file(folder / "out-share-2.safetensors")["w"].unique().tolist() == [7.0]
    kept = {"written": None, "bits a weight": None, "the tensors": None}
    assert suites(folder / "deep" / "junit.xml") == {"recipe (share=0.25)": kept, "recipe (share=2)": kept}
    runs = json.loads(done.stdout)["runs"]
    assert [(run["combination"], run["out"]) for run in runs] == [("share=0.25", "out-share-0.25.safetensors"), ("share=2", "out-share-2.safetensors")]
    assert runs[0]["checks"] == [{"check": "bits a weight", "kept": True, "found": "32"}, {"check": "the tensors", "kept": True, "found": "6.4e-05 MB"}]
    summary = (folder / "summary.md").read_text()
    assert "### recipe (share=0.25)" in summary
    assert "| bits a weight | 32 | yes |" in summary


def test_a_failed_check_fails_its_test_and_the_run_but_not_the_combinations_after_it(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE % 60)
    done = ran(folder, "-o", "out", "--junit", "junit.xml")
    assert done.returncode == 1
    sentence = "the tensors take 6.4e-05 MB, at most 6e-05 MB are wanted"
    assert done.stderr.splitlines()[-1] == f"compress: check failed: recipe (share=0.25): {sentence}; recipe (share=2): {sentence}"
    assert suites(folder / "junit.xml")["recipe (share=2)"] == {"written": None, "bits a weight": None, "the tensors": sentence}
    assert (folder / "out-share-2" / "model.safetensors").is_file()


def test_a_combination_that_cannot_be_made_is_an_error_and_keeps_no_other_from_being_made(folder: Path) -> None:
    (folder / "out-share-0.25").mkdir()
    (folder / "out-share-0.25" / "mine.txt").write_text("mine")
    done = ran(folder, "-o", "out", "--junit", "junit.xml")
    refused_with = "out-share-0.25 exists already"
    assert done.returncode == 2
    assert refused_with in done.stderr
    assert "compress: recipe (share=0.25): " in done.stderr
    assert refused_with in str(suites(folder / "junit.xml")["recipe (share=0.25)"]["written"])
    assert (folder / "out-share-2" / "model.safetensors").is_file()


def test_an_error_hides_no_failed_check_of_another_combination(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE % 60)
    (folder / "out-share-0.25.safetensors").write_text("mine")
    done = ran(folder, "-o", "out.safetensors")
    assert done.returncode == 2
    said = done.stderr.splitlines()[-1]
    assert said.startswith("compress: recipe (share=0.25): ")
    assert "out-share-0.25.safetensors exists already" in said
    assert said.endswith("; check failed: recipe (share=2): the tensors take 6.4e-05 MB, at most 6e-05 MB are wanted")


def test_a_page_that_cannot_be_written_is_refused_before_the_work(folder: Path) -> None:
    refused(ran(folder, "-o", "out.safetensors", "--report"), "--report: a page is written about a local folder, and the output is out-share-0.25.safetensors")
    assert sorted(path.name for path in folder.iterdir()) == ["a.safetensors", "b.safetensors", "recipe.yaml"]


def test_variables_are_set_on_the_command_line_and_wrong_ones_refused(folder: Path) -> None:
    done = ran(folder, "-o", "out.safetensors", "--set", "second=a", "--set", "share=3", "--dry-run", "--json")
    assert json.loads(done.stdout)["runs"][0]["out"] == "out-share-3.safetensors"
    refused(ran(folder, "-o", "out", "--set", "shar=3"), "recipe.yaml: --set shar: there is no such variable. Did you mean 'share'?")
    assert sorted(path.name for path in folder.iterdir()) == ["a.safetensors", "b.safetensors", "recipe.yaml"]
