"""The frozen base, before a LoRA is trained on it: --base_lora is fused in, --quantize makes it small."""

import re
import warnings
from pathlib import Path
from typing import NamedTuple

import peft
import torch
from safetensors.torch import load_file

from extras import stock_lora
from extras.find_lora import find_lora, is_peft
from extras.lora import build_on_meta, check_matrices, expected_matrices, read_lora
from extras.lora_files import public_name
from rewards import as_bad_input, read_json, require

FLAG = "--base_lora"
PEFT_PREFIX = "base_model.model."  # of the matrices' names in PEFT's files

# What is no plain LoRA, by a part of its names. diffusers drops or refuses most of these.
KINDS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", ".hada_": "LoHa", ".lokr_": "LoKr"}
KINDS |= {".lora_mid.": "LoCon of Tucker's form", ".oft_": "OFT"}


def prepare(model, cfg):
    """Fuse --base_lora into the model's denoiser, and set model.base_lora to its name; then --quantize it."""
    if cfg.base_lora:
        family = type(model)
        base = read_base(cfg.base_lora, family, build_on_meta(family, model.source))
        if base.config:
            adapted = peft.get_peft_model(model.denoiser, base.config)
            peft.set_peft_model_state_dict(adapted, base.matrices)
            model.denoiser = adapted.merge_and_unload().eval().requires_grad_(False)
        else:
            stock_lora.fuse(f"{FLAG} {cfg.base_lora}", base.source, model)
        model.base_lora = public_name(cfg.base_lora)
    if cfg.quantize != "none":
        quantize(model.denoiser, cfg.quantize, model.dtype)


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


# ---- Reading --base_lora -----------------------------------------------------------------------------------
class Base(NamedTuple):
    """What --base_lora names, after all checks."""

    source: Path | dict  # its file; or tensors, for stock's loader
    config: peft.LoraConfig | None = None  # None: in a format that the model's stock pipeline loads
    matrices: dict | None = None  # by PEFT's names, where there is a config
    left_out: list[str] = []  # lines on what of the file is not for the denoiser


def check_base(source: str, family, denoiser):
    """Read --base_lora and print what is left out of it. Raises BadInput as `read_base` does."""
    for line in read_base(source, family, denoiser).left_out:
        print(line)


def read_base(source: str, family, denoiser) -> Base:
    """A LoRA in PEFT's format, or in one that the model's pipeline in diffusers reads.

    family: a model's class. denoiser: its denoiser without weights. Raises BadInput for a LoRA of another
    model, with missing or odd matrices, with numbers that are not finite, or of a kind that there is no code
    for.
    """
    file = find_lora(source, FLAG)
    where = f"{FLAG} {source}"
    if is_peft(file):
        return Base(file, *read_lora(str(file.parent), FLAG, denoiser))
    require(file.suffix == ".safetensors", f"{where}: give a .safetensors file")
    with as_bad_input(f"{where} is damaged, or no LoRA"):
        state = load_file(file)
    check_kind(where, state)
    check_alphas(where, state)
    is_plain = any(key.startswith(PEFT_PREFIX) for key in state)
    if is_plain or not family.lora_pipeline:
        return Base(file, *read_plain(where, state, family, denoiser))
    loaded, left_out = stock_lora.check(where, file, state, family, denoiser)
    return Base(loaded, left_out=left_out)


def read_plain(where: str, state: dict, family, denoiser) -> tuple[peft.LoraConfig, dict]:
    """Config and matrices of PEFT's file without its config: every layer is scaled by 1. Raises BadInput."""
    matrices, ranks = {}, {}
    for key, matrix in state.items():
        key = without_prefix(key, family)
        matrices[PEFT_PREFIX + key] = matrix
        if key.endswith(".lora_A.weight") and matrix.dim() > 1:
            layer = key.removesuffix(".lora_A.weight")
            ranks[f"^{re.escape(layer)}"] = len(matrix)
    require(ranks, f"{where}: there is no LoRA in it, in PEFT's format or the pipeline's in diffusers")
    layers = "|".join(ranks)
    config = peft.LoraConfig(target_modules=layers, rank_pattern=ranks, alpha_pattern=ranks)
    expected = expected_matrices(f"{where} was made for another model", config, denoiser)
    check_matrices(where, matrices, expected)
    return config, matrices


def without_prefix(key: str, family) -> str:
    """A matrix's name from the layer's on, without what PEFT or a pipeline puts before it."""
    for prefix in (PEFT_PREFIX, f"{family.folder}."):
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def check_kind(where: str, state: dict):
    """Raises BadInput for a file of another kind than LoRA, by the names in it."""
    for key in state:
        for part, kind in KINDS.items():
            require(part not in key, f"{where} is a {kind}, for which there is no code: it has {key}")


def check_alphas(where: str, state: dict):
    """Raises BadInput unless each alpha of a file is a number above 0, of a layer that has matrices."""
    layers = {key.split(".lora_")[0] for key in state}
    for key, alpha in state.items():
        if key.endswith(".alpha"):
            is_number = alpha.numel() == 1 and not alpha.is_complex() and 0 < alpha.item() <= 1e6
            require(is_number, f"{where} is damaged: {key} is no number from 0 to 1e6")
            layer = key.removesuffix(".alpha")
            require(layer in layers, f"{where} is damaged: there is no matrix for {key}")


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
