"""Errors answer a wrong name with the right one."""

from __future__ import annotations

import pytest

from mergekit_plus.errors import nearest


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("tie", " Did you mean 'ties'?"),
        ("TIES", " Did you mean 'ties'?"),
        ("pcb", " Did you mean 'PCB'?"),
        ("xyz", " Known: ties, PCB, slerp."),
    ],
)
def test_the_nearest_name_in_any_case_or_all_of_them(name: str, answer: str) -> None:
    assert nearest(name, ["ties", "PCB", "slerp"]) == answer


def test_of_many_names_the_first_are_told() -> None:
    names = [str(number) for number in range(100, 200)]
    assert nearest("xyz", names) == f" Known: {', '.join(names[:30])}, and 70 more."
    assert nearest("xyz", []) == ""
