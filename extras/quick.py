"""A rollout at the base's speed: without gradient the LoRA is merged, or computed in half precision.

In float32 each layer's LoRA is added to a copy of its weight, which stays as it is. In half precision such a
sum would round a young LoRA away; there the adapters are copied in that precision, and stay apart. The copies
are made when the LoRA has changed, and freed when a gradient is wanted: that goes through the LoRA itself.
"""

import functools

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer


def install(denoiser: torch.nn.Module):
    """Have each layer with a LoRA do this. denoiser: after `vader.add_lora`, or without a LoRA."""
    for layer in denoiser.modules():
        if isinstance(layer, LoraLayer):
            layer.forward = functools.partial(forward, layer, layer.forward, {})


def forward(layer, usual, copies: dict, x):
    """What `usual(x)` gives, to rounding. copies: what is kept between calls, and for which LoRA."""
    if torch.is_grad_enabled() or layer.disable_adapters or layer.merged:
        copies.clear()
        return usual(x)
    base = layer.base_layer
    in_float32 = x.dtype == torch.float32
    can_merge = type(base.weight) is torch.nn.Parameter and base.weight.dtype == x.dtype
    if in_float32 and not can_merge:  # of a quantised base
        return usual(x)

    (name,) = layer.active_adapters
    down, up, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    # in-place changes, by an optimiser or `load_state_dict`, raise _version
    state = [scale, x.dtype, x.device]
    for parameter in (down.weight, up.weight, up.bias):
        state.append(getattr(parameter, "_version", None))
    if copies.get("state") != state:
        make = merge if in_float32 else shrink
        copies.update(make(base, down, up, scale, x.dtype), state=state)

    if in_float32:
        return F.linear(x, copies["weight"], copies["bias"])
    adapted = F.linear(x, copies["down"])
    return base(x) + F.linear(adapted, copies["up"], copies["bias"])


def merge(base, down, up, scale: float, dtype) -> dict:
    """The layer's weight and bias with the LoRA in them."""
    bias = base.bias
    if up.bias is not None:
        bias = scale * up.bias + (0 if bias is None else bias)
    return {"weight": torch.addmm(base.weight, up.weight, down.weight, alpha=scale), "bias": bias}


def shrink(base, down, up, scale: float, dtype) -> dict:
    """The adapters in half precision, the second one scaled."""
    bias = None if up.bias is None else (scale * up.bias).to(dtype)
    return {"down": down.weight.to(dtype), "up": (scale * up.weight).to(dtype), "bias": bias}
