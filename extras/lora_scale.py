"""The strength of the LoRA that is on a model, and another LoRA in its place."""

import contextlib
from pathlib import Path

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

import vader
from rewards import as_bad_input


@contextlib.contextmanager
def at_strength(model, strength: float):
    """The model's LoRA counts this many times within the block: 0 is the base model, 1 the LoRA as it is."""
    before = []
    for layer in model.denoiser.modules():
        if isinstance(layer, LoraLayer):
            before.append((layer, dict(layer.scaling)))
            for name, value in layer.scaling.items():
                layer.scaling[name] = value * strength
    try:
        yield
    finally:
        for layer, scaling in before:
            layer.scaling.update(scaling)


@torch.no_grad()
def multiply(model, strength: float):
    """Have the LoRA of that strength as one of strength 1: its second matrices are multiplied."""
    for name, parameter in vader.lora_parameters(model).items():
        if ".lora_B." in name:
            parameter *= strength


@contextlib.contextmanager
def with_lora_of(model, folder: Path):
    """The model's LoRA is that of a folder within the block."""
    before = {}
    for name, parameter in vader.lora_parameters(model).items():
        before[name] = parameter.detach().clone()
    with as_bad_input(f"{folder} is damaged: delete it, and this LoRA is no candidate"):
        peft.set_peft_model_state_dict(model.denoiser, load_file(folder / "adapter_model.safetensors"))
    try:
        yield
    finally:
        model.denoiser.load_state_dict(before, strict=False)
