"""The `calibration:` key of a recipe's step, and `text:` of one that trains or measures: a text, and how much of it is read.

    calibration: text.txt
    calibration: {texts: [code.txt, docs/], windows: 128, window: 256}
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator
from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import CheckpointError, OptionError
from ..evaluate import load_tokenizer
from .text import WINDOW, WINDOWS, read_text, text_files


class CalibrationOptions(BaseModel):
    """A text that a step reads: files, folders of .txt and .jsonl, `.jsonl` with a "text" in each line."""

    model_config = ConfigDict(extra="forbid")

    texts: list[str] = Field(default_factory=list)
    windows: int = Field(WINDOWS, gt=0, description="of the text, spread evenly over it")
    window: int | None = Field(None, gt=1, description="tokens; by default 256, or what the model takes")
    seed: int = Field(0, description="moves the windows")
    order: Literal["block", "layer"] = Field("block", description="measure a block's layers once, or again what stands behind layers that were changed")
    sha256: dict[str, str] = Field(default_factory=dict, description="what the files must be")
    _folder: Path = PrivateAttr(Path())

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        if isinstance(value, str):
            return {"texts": [value]}
        if isinstance(value, list):
            return {"texts": value}
        return value

    @field_validator("texts", mode="before", json_schema_input_type=list[str] | str)
    @classmethod
    def _one_text(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        """A text, or several, may stand for the table."""
        return {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, handler.resolve_ref_schema(handler(core))]}

    @property
    def paths(self) -> list[Path]:
        """The texts, from where one stands."""
        return [self._folder / Path(text).expanduser() for text in self.texts]

    def placed(self, folder: Path) -> CalibrationOptions:
        """The same with its texts relative to this folder, a recipe's."""
        found = self.model_copy()
        found._folder = folder
        return found

    def problems(self, folder: Path) -> Iterator[str]:
        """Everything wrong with it, a sentence each; texts are relative to `folder`."""
        if not self.texts:
            yield "it names no text"
        for path in self.placed(folder).paths:
            if not path.exists():
                yield f"the text {path} is not there"

    def digests(self) -> dict[str, str]:
        """The SHA-256 of each file of the texts, by its name, with the number of the text before it where there are several."""
        found = {}
        for number, path in enumerate(self.paths):
            for file in text_files(path):
                try:
                    found[file.name if len(self.paths) == 1 else f"{number}/{file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
                except OSError as error:
                    raise CheckpointError(f"{file}: {error.strerror}") from None
        return found

    def read(self, checkpoint: Checkpoint) -> tuple[Tensor, list[str]]:
        """Windows of the text for this model, int64 [windows, window], and a note where they are fewer than asked.

        Errors: as `read_text`; CheckpointError for files that are not those of `sha256`, and for a model without a tokenizer.
        """
        if self.sha256 and (changed := sorted(dict(self.sha256.items() ^ self.digests().items()))):
            raise CheckpointError(f"the text {changed[0]} is not the file that the recipe was made with (its SHA-256 differs)")
        longest = (checkpoint.config.get("text_config") or checkpoint.config).get("max_position_embeddings") or sys.maxsize
        window = self.window or min(WINDOW, longest)
        if window > longest:
            raise OptionError(f"a window of {window} tokens: the model takes {longest} at most; give a smaller --window")
        rows = read_text(self.paths, load_tokenizer(checkpoint), self.windows, window, self.seed)
        fewer = f"the text has {len(rows)} windows of {window} tokens, not {self.windows}; all of it is used"
        return rows, [fewer] * (len(rows) < self.windows)

    def provenance(self, out: Path) -> dict[str, Any]:
        """As the recipe in an output holds it: paths relative to the output, and the digests of the files."""
        texts = [os.path.relpath(os.path.abspath(path), os.path.realpath(out)) for path in self.paths]
        return {"texts": texts, **self.model_dump(mode="json", exclude={"texts", "sha256"}, exclude_none=True), "sha256": self.digests()}
