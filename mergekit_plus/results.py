"""What came of the runs of a recipe, as other programs read it: JUnit XML, which CI systems show as tests, and Markdown for the summary of a job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from .card import markdown_table
from .errors import printable

if TYPE_CHECKING:
    from .recipe import Outcome


@dataclass(frozen=True)
class Ran:
    """One run: of which recipe (and combination of its matrix), what came of it or why nothing did, and how long it took in seconds."""

    name: str
    outcome: Outcome | None
    error: str | None
    seconds: float


def junit(runs: Sequence[Ran]) -> bytes:
    """A suite for each run: a test for each check, and one, `written`, for the run itself."""
    root = ElementTree.Element("testsuites")
    for run in runs:
        verdicts = run.outcome.verdicts if run.outcome else []
        suite = ElementTree.SubElement(
            root, "testsuite", name=printable(run.name), tests=str(1 + len(verdicts)), failures=str(sum(not verdict.kept for verdict in verdicts)),
            errors=str(int(run.error is not None)), time=f"{run.seconds:.3f}",
        )  # fmt: skip
        written = ElementTree.SubElement(suite, "testcase", classname=printable(run.name), name="written", time=f"{run.seconds:.3f}")
        if run.error is not None:
            ElementTree.SubElement(written, "error", message=printable(run.error))
        for verdict in verdicts:
            case = ElementTree.SubElement(suite, "testcase", classname=printable(run.name), name=printable(verdict.what))
            if verdict.kept:
                ElementTree.SubElement(case, "system-out").text = printable(verdict.found)
            else:
                ElementTree.SubElement(case, "failure", message=printable(verdict.sentence))
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def summary(runs: Sequence[Ran]) -> str:
    """Markdown: for each run what was measured, each check, and samples."""
    lines: list[str] = []
    for run in runs:
        lines += [f"### {printable(run.name)}", ""]
        if run.outcome is None:
            lines += [f"failed: {printable(run.error or '')}", ""]
            continue
        if run.outcome.table:
            lines += [*markdown_table(run.outcome.table), ""]
        if run.outcome.verdicts:
            rows = [{"check": verdict.what, "found": verdict.found, "kept": "yes" if verdict.kept else "NO"} for verdict in run.outcome.verdicts]
            lines += [*markdown_table(rows), ""]
        lines += [f"wrote `{run.outcome.out}` in {run.seconds:.0f} s", ""]
    return "\n".join(lines)
