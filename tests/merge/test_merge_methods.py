"""What holds for every merge method of the registry."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merge_toys import merge_tensors, merged, near, random

from mergekit_plus.errors import OptionError
from mergekit_plus.merge import METHODS

# options that make a method do all it can do
BUSY: dict[str, dict[str, object]] = {
    "linear": {"weight": 0.7},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"weight": 0.4, "lambda": 0.9},
    "ties": {"density": 0.3, "weight": 0.7, "rescale": True},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5, "normalize": True},
    "pcb": {"ratio": 0.2, "exclude_frozen": True},
}
EQUAL = {"normalize": True}
KEEPS_EQUAL = {"linear": {}, "slerp": {}, "task_arithmetic": EQUAL, "ties": {}, "dare_linear": EQUAL, "dare_ties": EQUAL}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NAMES = list(METHODS)


def count(name: str) -> int:
    return METHODS[name].models[1] or 3


def inputs(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    base = random(*shape, dtype=dtype)
    return (base if METHODS[name].needs_base else None), near(base, count(name))


@pytest.fixture(autouse=True)
def quiet_pcb():  # type: ignore[no-untyped-def]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pcb: model")
        yield


def test_the_registry_lists_the_methods_from_simple_to_involved() -> None:
    assert NAMES[:7] == ["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "pcb"]
    assert set(BUSY) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_says_what_it_is_and_every_method_what_it_does(name: str) -> None:
    assert METHODS[name].summary.endswith(".")
    assert all(option.help and not option.required for option in METHODS[name].options.table.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (7,), (5, 3), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_shape_and_dtype_gives_finite_values_of_the_same_shape_in_the_working_dtype(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, models = inputs(name, *shape, dtype=dtype)
    result = merge_tensors(name, base, *models, **BUSY[name])
    assert result.shape == torch.Size(shape)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bool(torch.isfinite(result).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_left_alone_and_never_returned(name: str, dtype: torch.dtype) -> None:
    for options in (BUSY[name], {}):
        base, models = inputs(name, 6, 4, dtype=dtype)
        tensors = [tensor for tensor in (base, *models) if tensor is not None]
        before = [tensor.clone() for tensor in tensors]
        result = merge_tensors(name, base, *models, **options)
        assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))
        assert all(tensor.data_ptr() != result.data_ptr() for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_where_pieces_are_cut_does_not_change_a_bit(name: str, dtype: torch.dtype) -> None:
    base, models = inputs(name, 129, 67, dtype=dtype)
    whole = merge_tensors(name, base, *models, **BUSY[name])
    for rows in (1, 2, 7, 128):
        assert torch.equal(merge_tensors(name, base, *models, rows=rows, workers=4, **BUSY[name]), whole)


@pytest.mark.parametrize("name", NAMES)
def test_strided_inputs_give_the_same_bits(name: str) -> None:
    base, models = inputs(name, 24, 36)
    strided = [None if tensor is None else tensor.t().contiguous().t() for tensor in (base, *models)]
    assert torch.equal(merge_tensors(name, strided[0], *strided[1:], **BUSY[name]), merge_tensors(name, base, *models, **BUSY[name]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(KEEPS_EQUAL))
def test_equal_models_give_that_model(name: str, dtype: torch.dtype) -> None:
    base, models = inputs(name, 11, 9, dtype=dtype)
    same = [models[0]] * count(name)
    if name == "slerp":
        base = same[0]
    result = merge_tensors(name, base, *same, **KEEPS_EQUAL[name])
    if dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(result.to(dtype), same[0])
    torch.testing.assert_close(result, same[0].to(result.dtype))


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].needs_base])
def test_models_equal_to_the_base_give_the_base(name: str) -> None:
    base = random(11, 9)
    result = merge_tensors(name, base, *[base.clone()] * count(name), **BUSY[name])
    torch.testing.assert_close(result, base, rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", [name for name in NAMES if not METHODS[name].random and count(name) > 1])
def test_the_order_of_the_models_does_not_matter(name: str) -> None:
    base, models = inputs(name, 31, 17)
    options = BUSY[name]
    there = merge_tensors(name, base, *models, **options)
    back = merge_tensors(name, base, *reversed(models), **options)
    torch.testing.assert_close(there, back, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].random])
def test_a_random_method_repeats_itself_and_follows_the_seed(name: str) -> None:
    base, models = inputs(name, 31, 17)
    first, again, other = (merge_tensors(name, base, *models, seed=seed, **BUSY[name]) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].scope == "tensor"])
def test_a_tensor_does_not_feel_its_neighbours(name: str) -> None:
    base, models = inputs(name, 8, 8)
    alone = merge_tensors(name, base, *models, **BUSY[name])
    others = [{"other": tensor.exp(), "x": tensor} for tensor in models]
    together = merged(name, None if base is None else {"other": base.exp(), "x": base}, others, **BUSY[name])
    assert torch.equal(together["x"], alone)


@given(st.sampled_from(NAMES), st.integers(0, 40), st.integers(1, 9), st.sampled_from(DTYPES), st.booleans())
def test_never_nan(name: str, size: int, levels: int, dtype: torch.dtype, large: bool) -> None:
    # few levels make ties, zeros, cancelling signs and constant task vectors
    generator = torch.Generator().manual_seed(size * 10 + levels)
    tensors = [torch.randint(0, levels, (size,), generator=generator).to(dtype) * (1000 if large else 0.001) for _ in range(count(name) + 1)]
    base, models = (tensors[0] if METHODS[name].needs_base else None), tensors[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert bool(torch.isfinite(merge_tensors(name, base, *models, **BUSY[name])).all())


def test_mixed_dtypes_are_merged_in_the_widest() -> None:
    for name in NAMES:
        base, models = inputs(name, 6, 4, dtype=torch.bfloat16)
        models[0] = models[0].double()
        assert merge_tensors(name, base, *models, **BUSY[name]).dtype == torch.float64


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "dare_linear"])
def test_weights_that_cancel_cannot_be_normalized(name: str) -> None:
    assert METHODS[name].check is not None
    with pytest.raises(OptionError, match=r"0\.3, -0\.1, -0\.2 sum to zero.*set normalize to false"):
        merge_tensors(name, *inputs(name, 2)[:1], *inputs(name, 2)[1], weight=[0.3, -0.1, -0.2], normalize=True)
    merge_tensors(name, *inputs(name, 2)[:1], *inputs(name, 2)[1], weight=[0.3, -0.1, -0.2], normalize=False)


@pytest.mark.parametrize(
    ("name", "options"),
    [("ties", {"density": 0}), ("ties", {"density": 1.5}), ("slerp", {"t": -0.1}), ("slerp", {"t": 2}), ("linear", {"weight": float("nan")}),
     ("pcb", {"ratio": 0}), ("pcb", {"winsor": 0.5}), ("pcb", {"inter": "max"}), ("dare_ties", {"density": -1}), ("ties", {"desnity": 0.5})],
)  # fmt: skip
def test_options_outside_their_bounds_are_refused(name: str, options: dict[str, object]) -> None:
    assert METHODS[name].options.problems(options)


def test_int8_mask_is_accepted_and_changes_nothing() -> None:
    for name in ("task_arithmetic", "ties", "dare_linear", "dare_ties"):
        base, models = inputs(name, 5, 5)
        assert torch.equal(merge_tensors(name, base, *models, int8_mask=True), merge_tensors(name, base, *models))
