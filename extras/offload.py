"""--offload: the denoiser waits in host memory while VAE and rewards work, and these while it does.

What a graph keeps for its backward pass waits in host memory, too, until that pass comes to it: with
checkpointing little more than the inputs of the blocks that are computed again.
"""

import torch
from torch.autograd.graph import saved_tensors_hooks


def install(run, reward_networks: list):
    """Have run.model move its networks whenever it goes over from denoising to decoding, and back."""
    model = run.model
    groups = {"denoising": [model.denoiser], "scoring": [model.vae, model.image_encoder, *reward_networks]}
    active = None

    def use(group: str):
        nonlocal active
        if active == group:
            return
        for name, networks in groups.items():
            if name != group:
                move(networks, "cpu")  # first make room
        move(groups[group], model.device)
        active = group

    def move(networks: list, device):
        for network in networks:
            if network is not None:
                network.to(device)

    def with_networks(method, group: str):
        def call(*args, **kwargs):
            use(group)
            return method(*args, **kwargs)

        return call

    model.denoise = with_networks(inputs_on_host(model.denoise), "denoising")
    model.decode = with_networks(inputs_on_host(model.decode), "scoring")


def inputs_on_host(method):
    """The method, of whose graph the intermediate results wait in host memory."""

    def call(*args, **kwargs):
        with saved_tensors_hooks(to_host, from_host):
            return method(*args, **kwargs)

    return call


def to_host(tensor):
    """A result of the graph -> a copy in host memory, and where it was; what stays -> itself, None."""
    if tensor.is_leaf or not tensor.requires_grad:
        return tensor, None
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    if copy.stride() != tensor.stride():  # a view with gaps: without them kernels may round otherwise
        return tensor, None
    return copy.copy_(tensor, non_blocking=True), tensor.device


def from_host(saved):
    tensor, device = saved
    if device is None:
        return tensor
    return tensor.to(device, non_blocking=True)
