"""What a method declares to be linear is so, for a search computes its models from that."""

from __future__ import annotations

import pytest
import torch
from merge_toys import merge_tensors, near, random

from mergekit_plus.merge import METHODS

DECLARED = [(name, option) for name in METHODS for option in METHODS[name].linear]


@pytest.mark.filterwarnings("ignore:pcb. model")
@pytest.mark.parametrize("shape", [(12, 8), (9,)], ids=str)
@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize(("name", "option"), DECLARED)
def test_the_result_is_linear_in_every_value_of_a_declared_option(name: str, option: str, density: float, shape: tuple[int, ...]) -> None:
    method = METHODS[name]
    base = random(*shape, dtype=torch.float64)
    models = near(base, method.models[1] or 3)
    rest = {key: value for key, value in {"density": density, "ratio": density, "normalize": False}.items() if key in method.options.table}
    assert method.linear_in(option, method.options.check(rest))
    each = method.options.table[option].per_model
    factors = [0.3, 1.7, -0.4][: len(models)] if each else [0.3]

    def at(*values: float) -> torch.Tensor:
        return merge_tensors(name, base if method.needs_base else None, *models, **rest, **{option: list(values) if each else values[0]})

    zero = at(*[0.0] * len(factors))
    parts = [at(*[float(place == index) for place in range(len(factors))]) - zero for index in range(len(factors))]
    torch.testing.assert_close(at(*factors), zero + sum(factor * part for factor, part in zip(factors, parts, strict=True)), rtol=1e-9, atol=1e-12)


def test_weights_that_are_normalized_are_not_linear() -> None:
    assert METHODS["linear"].linear == ("weight",)
    assert not METHODS["linear"].linear_in("weight", METHODS["linear"].options.check({}))
    assert METHODS["linear"].linear_in("weight", METHODS["linear"].options.check({"normalize": False}))
    assert not METHODS["ties"].linear_in("weight", METHODS["ties"].options.check({"normalize": False}))
