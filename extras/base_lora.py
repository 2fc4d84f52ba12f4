"""The frozen base, before a LoRA is trained on it: --base_lora is fused in, --quantize makes it small."""

import warnings
from pathlib import Path

import torch

from extras.lora import put_on, read_lora
from extras.lora_files import public_name
from rewards import read_json

FLAG = "--base_lora"


def prepare(model, cfg):
    """Fuse --base_lora into the model's denoiser, and set model.base_lora to its name; then --quantize it."""
    if cfg.base_lora:
        lora = read_lora(cfg.base_lora, FLAG, type(model))
        adapted = put_on(f"{FLAG} {cfg.base_lora}", model.denoiser, lora)
        model.denoiser = adapted.merge_and_unload().eval().requires_grad_(False)
        model.base_lora = public_name(cfg.base_lora)
    if cfg.quantize != "none":
        quantize(model.denoiser, cfg.quantize, model.dtype)


def check_base(source: str, family, denoiser):
    """Print what of --base_lora is left out. Raises BadInput when it does not fit the denoiser.

    family: a model's class. denoiser: its denoiser without weights.
    """
    lora = read_lora(source, FLAG, family)
    put_on(f"{FLAG} {source}", denoiser, lora)
    for line in lora.left_out:
        print(line)


def warn_of_other_base(lora: str, base_lora: str | None):
    """Print a line when the LoRA in a folder was trained with another --base_lora than this one.

    Its vader.json tells (see `vader.save_lora`); where there is none, nothing is known and nothing printed.
    Raises BadInput when that file is damaged.
    """
    file = Path(lora) / "vader.json"
    if not file.is_file():
        return
    trained_with = read_json(file).get("base_lora")
    now = None
    if base_lora:
        now = public_name(base_lora)
    if trained_with != now:
        others = f"{trained_with or 'none'}, not {now or 'none'}"
        print(f"{lora} was trained with {FLAG} {others}: see its run's config.json")


# ---- --quantize --------------------------------------------------------------------------------------------
def quantize(network: torch.nn.Module, kind: str, dtype: torch.dtype):
    """Quantise a network's linear layers in place, as diffusers' and transformers' own quantisers do.

    int8: torchao, a scale for each output, weights only. nf4: bitsandbytes (Dettmers et al. 2023, arXiv
    2305.14314), once the weights are on a GPU; never run on one. Both compute in dtype.
    """

    def is_quantized(layer, name):
        return isinstance(layer, torch.nn.Linear) and not name.endswith("lm_head")  # which may be tied

    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated")  # it could not be merged
        quantize_(network, Int8WeightOnlyConfig(), filter_fn=is_quantized)
        return
    import bitsandbytes as bnb

    for name, layer in list(network.named_modules()):
        if not is_quantized(layer, name):
            continue
        kwargs = dict(bias=layer.bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta")
        small = bnb.nn.Linear4bit(layer.in_features, layer.out_features, **kwargs)
        small.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        small.bias = layer.bias
        network.set_submodule(name, small.to(layer.weight.device))
