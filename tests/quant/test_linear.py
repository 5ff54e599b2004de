"""A packed linear layer against its integers in float64, and against the dense layer that it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from quant_toys import a_weight
from torch import Tensor, nn
from torch.nn import functional

from mergekit_plus.checkpoint.spec import TensorSpec
from quant import FORMATS, Quantized, Scheme, dequantize, rtn
from quant.linear import QuantLinear

SCHEMES = [Scheme(bits, group, symmetric) for bits in range(2, 9) for group in (0, 32) for symmetric in (True, False)]
OUT, IN = 12, 96


def layer_of(quantized: Quantized, scheme: Scheme, bias: Tensor | None = None, as_dequantized: bool = False) -> QuantLinear:
    layout, spec = FORMATS["pack-quantized"], TensorSpec("weight", "BF16", tuple(quantized.codes.shape))
    return QuantLinear({**layout.encode(quantized), **layout.fixed(spec)}, scheme, bias, as_dequantized)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def exact(quantized: Quantized) -> Tensor:
    """The weight that the integers and scales stand for, in float64: nothing is rounded to the dtype of the scales."""
    codes, scale = quantized.codes.double(), quantized.scale.double()
    zeros = torch.zeros_like(scale) if quantized.zero_point is None else quantized.zero_point.double()
    group = torch.arange(codes.shape[1]) // (codes.shape[1] // scale.shape[1])
    return (codes - zeros[:, group]) * scale[:, group]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_product_is_that_of_the_integers(scheme: Scheme) -> None:
    quantized, bias = rtn(a_weight(OUT, IN), scheme), torch.arange(OUT) / 10
    layer, x = layer_of(quantized, scheme, bias), inputs(2, 5)
    wanted = x.double() @ exact(quantized).T + bias
    assert layer(x).shape == (2, 5, OUT)
    assert (layer(x).double() - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_product_has_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    quantized, x = rtn(a_weight(OUT, IN), Scheme(4, 32)), inputs(3, dtype=dtype)
    y = layer_of(quantized, Scheme(4, 32), torch.ones(OUT, dtype=dtype))(x)
    wanted = x.double() @ exact(quantized).T + 1
    assert y.dtype == dtype
    assert (y.double() - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_as_dequantized_it_is_the_dense_layer_bit_for_bit(scheme: Scheme) -> None:
    quantized, bias, x = rtn(a_weight(OUT, IN), scheme), torch.arange(OUT) / 10, inputs(7)
    layer = layer_of(quantized, scheme, bias, as_dequantized=True)
    assert torch.equal(layer.weight, dequantize(quantized))
    assert torch.equal(layer(x), functional.linear(x, dequantize(quantized).float(), bias))


@contextmanager
def kept() -> Iterator[list[int]]:
    """The bytes of what autograd keeps for the way back."""
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


@pytest.mark.parametrize("as_dequantized", [False, True])
def test_gradients_reach_the_input_and_nothing_dense_is_kept_for_them(as_dequantized: bool) -> None:
    scheme, bias = Scheme(4, 32, False), torch.ones(OUT)
    quantized = rtn(a_weight(OUT, IN).float(), scheme)
    layer, x, dy = layer_of(quantized, scheme, bias, as_dequantized), inputs(2, 3).requires_grad_(), torch.randn(2, 3, OUT)
    with kept() as sizes:
        y = layer(x)
    y.backward(dy)  # type: ignore[no-untyped-call]
    assert sum(sizes) == 0
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dy @ dequantize(quantized))
    assert bias.grad is None
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_a_gradient_is_right_by_differences() -> None:
    scheme = Scheme(3, 32)
    layer = layer_of(rtn(a_weight(OUT, IN).double(), scheme), scheme, as_dequantized=True)
    assert torch.autograd.gradcheck(layer, (inputs(2, dtype=torch.float64).requires_grad_(),))


@pytest.mark.parametrize("as_dequantized", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_compiles_as_one_graph(symmetric: bool, as_dequantized: bool) -> None:
    scheme = Scheme(4, 32, symmetric)
    layer = layer_of(rtn(a_weight(OUT, IN), scheme), scheme, torch.ones(OUT), as_dequantized)
    compiled = torch.compile(nn.Sequential(layer, nn.ReLU()), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for tokens in (1, 5):
            assert torch.equal(compiled(inputs(tokens)), layer(inputs(tokens)).relu())


def test_its_state_is_what_a_checkpoint_stores() -> None:
    scheme = Scheme(3, 32, False)
    quantized = rtn(a_weight(OUT, IN), scheme)
    layout = FORMATS["pack-quantized"]
    stored = {**layout.encode(quantized), **layout.fixed(TensorSpec("weight", "BF16", (OUT, IN)))}
    layer = QuantLinear(stored, scheme)
    state = layer.state_dict()
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()} == {name: (t.dtype, t.shape) for name, t in stored.items()}
    assert {spec.name for spec in layout.specs(TensorSpec("weight", "BF16", (OUT, IN)), scheme)} == state.keys()
    other = layer_of(rtn(a_weight(OUT, IN, seed=1), scheme), scheme)
    other.load_state_dict(state)
    assert torch.equal(other(inputs(2)), layer(inputs(2)))


def test_it_says_what_it_is() -> None:
    scheme = Scheme(4, 32)
    assert repr(layer_of(rtn(a_weight(OUT, IN), scheme), scheme)) == (
        "QuantLinear(in_features=96, out_features=12, bias=False, 4 bits, groups of 32, symmetric)"
    )
