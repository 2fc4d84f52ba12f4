"""--offload: the denoiser waits in host memory while VAE and rewards work, and these while it does.

What a graph keeps for its backward pass waits in host memory, too, until that pass comes to it: with
checkpointing little more than the inputs of the blocks that are computed again.
"""

import torch
from torch.autograd.graph import saved_tensors_hooks


def install(run, reward_networks: list):
    """Have run.model bring to the device the networks that it works with, and no others."""
    model = run.model
    scoring = [model.vae, model.image_encoder, *reward_networks]
    scoring = [network for network in scoring if network is not None]
    here = [model.denoiser, *scoring]
    denoise, decode = inputs_on_host(model.denoise), inputs_on_host(model.decode)

    def use(wanted: list):
        nonlocal here
        if here == wanted:
            return
        for network in here:
            if network not in wanted:
                network.to("cpu")  # first make room
        for network in wanted:
            network.to(model.device)
        here = wanted

    def denoise_here(x, t, cond):
        use([model.expert(t)])
        return denoise(x, t, cond)

    def decode_here(*args, **kwargs):
        use(scoring)
        return decode(*args, **kwargs)

    model.denoise, model.decode = denoise_here, decode_here


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
