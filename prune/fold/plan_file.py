"""plan.yaml: what becomes of each block of a model, as `compress fold --budget` writes it and `compress fold --plan` takes it.

    blocks: 12
    kept: [0, 1, 3, 4]
    groups: [0, 1, 2, 2]        # blocks 3 and 4 share their linear weights,
    parents: [0, 1, 3]          # which are those of block 3; null stands for the mean

Unknown keys are refused. `made` tells how the plan was found (the losses that were measured, with what was chosen), and is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_plus.errors import OptionError
from mergekit_plus.safe_yaml import read as read_yaml

from .surgery import Fold


class FoldPlan(BaseModel):
    """A fold, the number of blocks of the model that it is for, and how it was found."""

    model_config = ConfigDict(extra="forbid")

    blocks: int = Field(ge=1)
    kept: list[int]
    groups: list[int]
    parents: list[int | None]
    made: dict[str, Any] | None = None

    @classmethod
    def of(cls, fold: Fold, blocks: int, made: dict[str, Any] | None = None) -> FoldPlan:
        """The plan of a fold."""
        return cls(blocks=blocks, kept=list(fold.kept), groups=list(fold.groups), parents=list(fold.parents), made=made)

    @property
    def fold(self) -> Fold:
        """The fold itself."""
        return Fold(tuple(self.kept), tuple(self.groups), tuple(self.parents))

    def problems(self) -> Iterator[str]:
        """What is wrong with it, a sentence each."""
        yield from self.fold.problems(self.blocks)

    def fold_for(self, blocks: int) -> Fold:
        """The fold, for a model of so many blocks. Errors: OptionError for another number than the plan's."""
        if blocks != self.blocks:
            raise OptionError(f"the plan is for a model of {self.blocks} blocks, this one has {blocks}; make one for it with `compress fold --budget`")
        return self.fold


def read(path: Path) -> FoldPlan:
    """The plan in a file. Errors: OptionError, or RecipeError for what is no YAML, in one line."""
    try:
        plan = FoldPlan.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise OptionError(f"{path} is no plan as `compress fold --budget` writes it: {f'{place}: ' if place else ''}{first['msg']}") from None
    if problem := next(plan.problems(), None):
        raise OptionError(f"{path}: {problem}")
    return plan


def write(path: Path, plan: FoldPlan) -> None:
    """A file of this plan."""
    path.write_text(yaml.safe_dump(plan.model_dump(exclude_none=plan.made is None), sort_keys=False, allow_unicode=True, width=160, default_flow_style=None))
