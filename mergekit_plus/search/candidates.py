"""The merged model at any values of the searched options, made with as little work as the method allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..checkpoint import Checkpoint, Plan
from ..checkpoint.dtypes import TORCH_DTYPES
from ..evaluate import load_model
from ..merge import METHODS
from ..merge.varying import corners, filled, numbers
from ..steps import Execution, MergeStep


class Candidates:
    """Models of one merge step under changing options, float32 with every weight rounded as the saved model's would be.

    Where one option is searched and the result is linear in it, `f(0)` and one `f(e_i) - f(0)` for each value are computed once, and a model is
    their sum, filled into one transformers model in place. Else it is merged anew, with the statistics of the merge before it
    where no option changed that they depend on. Memory: the model, and in the linear case one more for each value and one for f(0).
    """

    def __init__(self, step: MergeStep, inputs: Mapping[str, Checkpoint], how: Execution, options: Mapping[str, Any]) -> None:
        self.step, self.inputs, self.how = step, inputs, how
        self.before: tuple[dict[str, Any], Plan] | None = None
        plain = self.checkpoint(options)
        self.tags = {spec.dtype for spec in plain.specs.values() if spec.is_float}
        arguments = METHODS[step.method].options.check(corners({**step.options(), **options})[0])
        self.linear: str | None = None
        if len(options) == 1 and len(self.tags) == 1 and METHODS[step.method].linear_in(next(iter(options)), arguments):
            (self.linear,) = options
        self.parts: list[dict[str, Tensor]] = []
        self.shown: tuple[Mapping[str, Any], Any] | None = None

    def at(self, options: Mapping[str, Any]) -> Any:
        """The transformers model at these values, good until the next call."""
        if self.shown is not None and self.shown[0] == options:
            return self.shown[1]
        if self.linear is None:
            self.shown = None  # so that there are never two
            self.shown = options, load_model(self.checkpoint(options)).to(self.how.device)
            return self.shown[1]
        value = options[self.linear]
        values = list(numbers(value))
        model = self.shown[1] if self.shown else self._decompose(value)
        dtype = TORCH_DTYPES[next(iter(self.tags))]
        for name, weight in _weights(model).items():
            total = self.parts[0][name].clone()
            for factor, part in zip(values, self.parts[1:], strict=True):
                total.add_(part[name], alpha=factor)
            weight.copy_(total.to(dtype))
        self.shown = options, model
        return model

    def checkpoint(self, options: Mapping[str, Any]) -> Checkpoint:
        """The merge itself at these values, as it would be saved."""
        return self._build(self.step.with_options(options))

    def release(self) -> None:
        """Give the models back."""
        self.parts, self.shown = [], None

    def _decompose(self, value: Any) -> Any:
        """f(0), and `f(e_i) - f(0)` for each number in a value, as weights of a transformers model: what it stacks or ties is so in each alike."""
        assert self.linear is not None
        count = len(list(numbers(value)))
        points = [[0.0] * count] + [[float(place == index) for place in range(count)] for index in range(count)]
        models = []
        for point in points:
            step = self.step.with_options({self.linear: filled(value, iter(point))}).model_copy(update={"dtype": "float32"})
            models.append(load_model(self._build(step)).to(self.how.device))
            self.parts.append(_weights(models.pop() if self.parts else models[0]))
        self.parts[0] = {name: weight.clone() for name, weight in self.parts[0].items()}
        for part in self.parts[1:]:
            for name, weight in part.items():
                weight.sub_(self.parts[0][name])
        return models[0]

    def _build(self, step: MergeStep) -> Checkpoint:
        """The merge, with what the merge before it measured where that still holds."""
        made = step.build(self.inputs, None, self.how)
        method = METHODS[step.method]
        if method.statistic is None or not isinstance(made.source, Plan):
            return made
        key = {name: value for name, value in step.options().items() if name in method.measured_by}
        if self.before is not None and self.before[0] == key:
            earlier = self.before[1]
            made = replace(made, source=Plan(replace(new, measured=earlier.step_of[new.writes[0].name].measured) for new in made.source.steps))
        assert isinstance(made.source, Plan)
        self.before = key, made.source
        return made


def _weights(model: Any) -> dict[str, Tensor]:
    """The float tensors of a model by name, tied ones once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            found.setdefault(tensor.data_ptr(), (name, tensor))
    return dict(found.values())
