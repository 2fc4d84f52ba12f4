"""A rollout at the base's speed: without gradient the LoRA is merged, or computed in half precision.

In float32 each layer's LoRA is added to a copy of its weight, which stays as it is. In half precision such a
sum would round a young LoRA away; there the adapters are copied in that precision, and stay apart. The copies
are made when the LoRA has changed, and freed when a gradient is wanted: that goes through the LoRA itself.
"""

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer


def install(denoiser: torch.nn.Module):
    """Have each linear layer with a LoRA do this. denoiser: after `vader.add_lora`, or without a LoRA."""
    for layer in denoiser.modules():
        if isinstance(layer, LoraLayer) and has_matrices(layer):
            layer.forward = QuickForward(layer)


def has_matrices(layer: LoraLayer) -> bool:
    """Is its LoRA two linear layers? That of a convolution, in a --lora, stays as it is."""
    return all(isinstance(down, torch.nn.Linear) for down in layer.lora_A.values())


class QuickForward:
    """In the place of a layer's `forward`, and to rounding the same."""

    def __init__(self, layer: LoraLayer):
        self.layer = layer
        self.usual = layer.forward
        self.copies = None  # of `merge` or `apart`
        self.made_for = None  # which state of the LoRA these are of

    def __call__(self, x):
        layer = self.layer
        base = layer.base_layer
        if torch.is_grad_enabled() or layer.disable_adapters or layer.merged:
            self.copies = self.made_for = None
            return self.usual(x)
        if x.dtype != torch.float32:
            down, up, bias = self.current(x, apart)
            return base(x) + F.linear(F.linear(x, down), up, bias)
        can_merge = type(base.weight) is torch.nn.Parameter and base.weight.dtype == x.dtype
        if not can_merge:  # into a quantised base
            return self.usual(x)
        weight, bias = self.current(x, merge)
        return F.linear(x, weight, bias)

    def current(self, x, make):
        """The copies, of x's precision, made anew where the LoRA has changed."""
        layer = self.layer
        (name,) = layer.active_adapters
        down = layer.lora_A[name]
        up = layer.lora_B[name]
        scale = layer.scaling[name]
        state = [scale, x.dtype, x.device]
        for parameter in (*down.parameters(), *up.parameters()):
            state.append(parameter._version)  # which an optimiser and `load_state_dict` raise
        if state != self.made_for:
            self.copies = []
            for part in make(layer.base_layer, down, up, scale):
                self.copies.append(None if part is None else part.to(x.dtype))
            self.made_for = state
        return self.copies


def merge(base, down, up, scale: float) -> tuple:
    """The layer's weight and bias with the LoRA in them."""
    bias = base.bias
    if up.bias is not None:
        bias = scale * up.bias
        if base.bias is not None:
            bias = bias + base.bias
    return torch.addmm(base.weight, up.weight, down.weight, alpha=scale), bias


def apart(base, down, up, scale: float) -> tuple:
    """Both matrices of the LoRA, the second one scaled, and its bias."""
    bias = None
    if up.bias is not None:
        bias = scale * up.bias
    return down.weight, scale * up.weight, bias
