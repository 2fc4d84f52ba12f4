"""--quantize: the frozen base of a network in 8 or 4 bits a weight; adapters stay in float32."""

import importlib.util
import warnings

import torch

from rewards import need

LIBRARIES = {"int8": "torchao", "nf4": "bitsandbytes"}


def check_library(kind: str, device: str):
    """Raises BadInput unless the library that quantises so is there, and can on this device."""
    library = LIBRARIES[kind]
    need(importlib.util.find_spec(library), f"--quantize {kind} needs {library}: pip install {library}")
    need(kind != "nf4" or device.startswith("cuda"), "--quantize nf4 is for CUDA GPUs: take int8")


def quantize(network: torch.nn.Module, kind: str, dtype: torch.dtype):
    """Quantise the linear layers of a network in place, as diffusers' and transformers' own quantisers do.

    int8: torchao, a scale for each output, weight only. nf4: bitsandbytes (Dettmers et al. 2023, arXiv
    2305.14314), when the weights come to a GPU; never run. Both compute in dtype.
    """
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated")  # it could not be merged
        quantize_(network, Int8WeightOnlyConfig())
        return
    import bitsandbytes as bnb

    for name, layer in [*network.named_modules()]:
        if isinstance(layer, torch.nn.Linear):
            how = dict(bias=layer.bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta")
            made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, **how)
            made.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            made.bias = layer.bias
            network.set_submodule(name, made.to(layer.weight.device))
