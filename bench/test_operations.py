"""Tests of the count of operations: of one layer, by the closed form."""

import contextlib

import fake
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def weights(*shape):
    return torch.randn(shape, requires_grad=True)


def product():
    """A matrix product, (5, 7) by (7, 11). Backward there is one of the same size for each side."""
    once = 2 * 5 * 7 * 11
    return (torch.mm, weights(5, 7), weights(7, 11)), once, 2 * once


def convolution():
    """A convolution of 2 pictures of 9 x 10 by 3 x 4. Backward as a product."""
    once = 2 * 2 * 6 * (7 * 7) * 5 * (3 * 4)
    return (F.conv2d, weights(2, 5, 9, 10), weights(6, 5, 3, 4)), once, 2 * once


def attention():
    """2 x 3 heads, 16 wide, of 5 places that see 7. q k' is computed again on the way back."""
    once = 2 * 2 * 3 * 5 * 7 * 16
    given = weights(2, 3, 5, 16), weights(2, 3, 7, 16), weights(2, 3, 7, 16)
    return (F.scaled_dot_product_attention, *given), 2 * once, 5 * once


def assert_counted(make):
    """By LiveStorages, with content and without, and by torch's counter: forward, and with the way back."""
    (function, *given), forward, backward = make()
    for counter in (fake.LiveStorages(), FlopCounterMode(display=False)):
        with counter:
            result = function(*given)
            once = count_of(counter)
            result.sum().backward()
        assert (once, count_of(counter)) == (forward, forward + backward)
    with FakeTensorMode(), fake.LiveStorages() as counter:
        (function, *given), _, _ = make()
        function(*given).sum().backward()
    assert counter.operations == forward + backward


def test_a_launch_is_a_call_that_writes():
    for mode in (contextlib.nullcontext(), FakeTensorMode()):
        with mode, fake.LiveStorages() as counter:
            x = torch.ones(4, 6)
            x.T[1:].unsqueeze(0)[:, :3].detach()  # all views
            assert counter.launches == 1
            x.add_(1)
            torch.mm(x, x.T).relu().reshape(16)
            assert counter.launches == 4


def count_of(counter):
    return counter.get_total_flops() if isinstance(counter, FlopCounterMode) else counter.operations


@pytest.mark.parametrize("make", [product, convolution, attention])
def test_the_operations_of_a_layer_are_those_of_the_closed_form(make):
    assert_counted(make)


def test_attention_counts_where_torch_has_no_formula_for_it(monkeypatch):
    """And only there: a formula of torch's own stays."""
    theirs = [flop_registry[operator] for operator in (ATTENTION, ATTENTION_BACKWARD)]
    fake.count_attention()
    assert [flop_registry[operator] for operator in (ATTENTION, ATTENTION_BACKWARD)] == theirs
    for operator in (ATTENTION, ATTENTION_BACKWARD):
        monkeypatch.delitem(flop_registry, operator)
    with fake.LiveStorages() as counter:
        (function, *given), forward, backward = attention()
        function(*given).sum().backward()
    assert counter.operations == 0
    fake.count_attention()
    assert_counted(attention)
