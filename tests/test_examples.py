"""Every command's help has examples, and these run, in the order of `compress --help`, each in the folder that those before it left."""

from __future__ import annotations

import shlex
from pathlib import Path

import yaml
from program import Program
from site_reference import EXAMPLE, commands

MODELS = Path(__file__).parent / "models"
WIDTH = 76  # columns: what help leaves in one line
DIFFERS = "compress diff base code"  # exits with 1, as its help says
HELPS = {name: command.help for name, command in commands().items()}


def test_every_command_has_an_example_of_itself_that_fits_a_line() -> None:
    for name, text in HELPS.items():
        examples = EXAMPLE.findall(text)
        assert any(example.startswith(f"compress {name} ") or example == f"compress {name}" for example in examples), name
        assert all(len(f"`{example}`") <= WIDTH for example in examples), name


def test_what_the_list_of_commands_says_of_each_is_a_sentence_that_fits_a_line() -> None:
    for name, text in HELPS.items():
        first = text.splitlines()[0]
        assert first.endswith("."), name
        assert len(first) <= 62, name


def test_every_example_runs(compress: Program, tmp_path: Path) -> None:
    furnish(compress, tmp_path)
    ended = {}
    for example in (example for text in HELPS.values() for example in EXAMPLE.findall(text)):
        command, _, out = example.partition(" > ")
        ended[example] = compress(*shlex.split(command)[1:])
        if out:
            (tmp_path / out).write_text(ended[example].stdout)
    assert {example: end.stderr for example, end in ended.items() if end.returncode != (example == DIFFERS)} == {}
    assert (tmp_path / "merged-4bit" / "manifest.json").exists()


def furnish(compress: Program, folder: Path) -> None:
    """What examples name: a base and its fine-tunes, smaller than those of the tests, texts, adapters, a recipe and a mixture."""
    for name in ("base", "code", "docs"):
        assert compress("fold", MODELS / name, "--keep", "0,5", "-o", name).returncode == 0
    for name in ("code", "docs"):
        (folder / f"{name}.txt").write_text((MODELS / "text" / f"{name}.val.txt").read_text()[:6000])
        assert compress("adapter", "extract", "base", name, "--rank", 4, "-o", f"{name}-lora").returncode == 0
    assert compress("init", "code").returncode == 0
    experts = [{"source_model": name, "positive_prompts": [name]} for name in ("code", "docs")]
    (folder / "experts.yaml").write_text(yaml.safe_dump({"base_model": "base", "gate_mode": "hidden", "experts": experts}))
