"""Progress of long work, as a log shows it."""

from __future__ import annotations

from io import StringIO

import pytest

from mergekit_plus import progress


def test_a_log_has_a_line_a_phase_with_what_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 2.0, 5.0, 5.0, 6.5, 7.0, 7.1])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    log = StringIO()
    lines = progress.on(log)
    for label, total, unit in [("writing", 3_000_000, "B"), ("perplexity", 512, " tokens"), ("pcb: measuring", None, "B"), ("short", 1, "B")]:
        with lines.phase(label, total, unit):
            pass
    assert log.getvalue().splitlines() == ["writing: 3 MB in 2.0 s", "perplexity: 512 tokens in 3.0 s", "pcb: measuring in 1.5 s"]


def test_what_was_said_last_ends_the_line_of_its_phase_and_what_is_told_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 2.0, 4.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    log = StringIO()
    lines = progress.on(log)
    with lines.phase("training", 5, " steps", done=2):
        lines.say("loss 3")
        lines.say("loss 2.5")
        lines.tell("on the way")
    with lines.phase("writing", None):
        pass
    assert log.getvalue().splitlines() == ["on the way", "training: 3 steps in 2.0 s, loss 2.5", "writing in 2.0 s"]
