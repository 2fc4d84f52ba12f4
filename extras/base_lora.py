"""The frozen base, before a LoRA is trained on it: --base_lora is fused in, --quantize makes it small."""

import functools
import warnings
from pathlib import Path

import diffusers
import torch

from extras.find_lora import split_loras
from extras.lora import PEFT_PREFIX, Lora, build_on_meta, put_on, read_lora
from extras.lora_files import public_name
from rewards import read_json, require

FLAG = "--base_lora"


def prepare(model, cfg):
    """Before the model loads: fuse --base_lora into its denoiser, and have that quantised by --quantize.

    diffusers quantises a transformer weight by weight as it reads them, and each gets its part of the LoRA
    just before: afterwards little of it would arrive. U-Nets are small, and quantised when they are whole.
    """
    quantises = cfg.quantize != "none"
    if quantises and model.folder != "unet":
        model.quantization = quantization(cfg.quantize, model.dtype, model.device)
    if cfg.base_lora:
        loras = loras_of(cfg.base_lora, type(model))
        model.base_lora = ",".join(map(public_name, loras.values()))
        own = loras.pop(model.folder)
        for folder, source in loras.items():  # of the other network, which waits on the host
            model.other = load_fused(model, folder, source).to("cpu")
        model.denoiser = load_fused(model, model.folder, own)
    if quantises and model.folder == "unet":
        model.denoiser = model.denoiser or model.load_denoiser(model.folder)
        quantize(model.denoiser, cfg.quantize, model.dtype, model.device)


def load_fused(model, folder: str, source: str):
    """A denoiser of the checkpoint with a LoRA fused into it, before each weight is quantised."""
    where = f"{FLAG} {source}"
    lora = read_lora(source, FLAG, type(model))
    if model.quantization:
        empty = put_on(where, build_on_meta(type(model), model.source), lora)
        denoiser = load_by_weight(model, folder, empty, lora)
    else:
        denoiser = put_on(where, model.load_denoiser(folder), lora).merge_and_unload()
    return denoiser.eval().requires_grad_(False)


def load_by_weight(model, folder: str, adapted, lora: Lora):
    """A denoiser of the checkpoint, each weight with its part of the LoRA, then quantised, one by one.

    adapted: a denoiser without weights that has such a LoRA.
    """
    matrices = {}
    for key, matrix in lora.matrices.items():
        name = key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
        matrices[PEFT_PREFIX + name] = matrix.float()
    adapted.load_state_dict(matrices, strict=False, assign=True)
    parts = {}  # {a parameter of the denoiser: what gives that which is added to it}
    for name, layer in adapted.base_model.model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            parts[f"{name}.weight"] = functools.partial(layer.get_delta_weight, "default")
            bias = layer.lora_B["default"].bias
            if bias is not None:
                parts[f"{name}.bias"] = functools.partial(torch.mul, bias, layer.scaling["default"])

    def fused(value, name):
        part = parts.pop(name)()
        return (value.float() + part.to(value.device)).to(value.dtype)

    if isinstance(model.quantization["quantization_config"], diffusers.BitsAndBytesConfig):
        from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer as Quantizer
    else:
        from diffusers.quantizers.torchao import TorchAoHfQuantizer as Quantizer
    create = Quantizer.create_quantized_param

    def create_fused(self, network, value, name, *args, **kwargs):
        if name in parts:
            value = fused(value, name)
        return create(self, network, value, name, *args, **kwargs)

    Quantizer.create_quantized_param = create_fused
    try:
        denoiser = model.load_denoiser(folder)
    finally:
        Quantizer.create_quantized_param = create
    for name in list(parts):  # of what is not quantised
        weight = denoiser.get_parameter(name)
        weight.data = fused(weight.data, name)
    return denoiser


def loras_of(base_lora: str, family) -> dict[str, str]:
    """Which LoRA goes into which of the family's networks: {folder: LoRA}. Raises BadInput."""
    folders = sorted({family.folder, getattr(family, "other_folder", family.folder)})
    sources = split_loras(base_lora)
    names = ",".join(f"{folder}.safetensors" for folder in folders)
    problem = f"{FLAG} {base_lora}: give as many LoRAs as the model has networks, as in {names}"
    require(len(sources) == len(folders) and all(sources), problem)
    return dict(zip(folders, sources, strict=True))


def check_base(base_lora: str, family, source: str):
    """Print what of --base_lora is left out. Raises BadInput when it does not fit the denoiser.

    family: a model's class; source: its checkpoint.
    """
    for lora_source in loras_of(base_lora, family).values():
        lora = read_lora(lora_source, FLAG, family)
        put_on(f"{FLAG} {lora_source}", build_on_meta(family, source), lora)
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
    now = base_lora and ",".join(map(public_name, split_loras(base_lora)))
    if trained_with != now:
        others = f"{trained_with or 'none'}, not {now or 'none'}"
        print(f"{lora} was trained with {FLAG} {others}: see its run's config.json")


# ---- --quantize --------------------------------------------------------------------------------------------
# int8: torchao, a scale for each output, weights only. nf4: bitsandbytes (Dettmers et al. 2023, arXiv
# 2305.14314), scales of 64 numbers each in 8 bits as well; never run on a GPU. Both compute in dtype.
def quantization(kind: str, dtype: torch.dtype, device: str) -> dict:
    """Arguments of diffusers' from_pretrained that quantise a network's linear layers."""
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        quiet_torchao()
        config = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
        if device == "cpu":  # what is mapped to the CPU would stay as it is
            return dict(quantization_config=config)
    else:
        config = diffusers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return dict(quantization_config=config, device_map={"": device})


def quantize(network: torch.nn.Module, kind: str, dtype: torch.dtype, device=None):
    """Quantise a network's linear layers in place, one after the other, on the device if there is one."""

    def is_quantized(layer, name):
        return isinstance(layer, torch.nn.Linear) and not name.endswith("lm_head")  # which may be tied

    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quiet_torchao()
        quantize_(network, Int8WeightOnlyConfig(), filter_fn=is_quantized, device=device)
        return
    import bitsandbytes as bnb

    for name, layer in list(network.named_modules()):
        if not is_quantized(layer, name):
            continue
        kwargs = dict(bias=layer.bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta")
        small = bnb.nn.Linear4bit(layer.in_features, layer.out_features, **kwargs)
        how = dict(requires_grad=False, quant_type="nf4", compress_statistics=True)
        small.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), **how)
        small.bias = layer.bias
        network.set_submodule(name, small.to(device or layer.weight.device))


def check_quantised(network: torch.nn.Module, source):
    """Raises BadInput where a weight was infinite or no number before it was quantised."""
    for name, weight in [*network.named_parameters(), *network.named_buffers()]:
        if hasattr(weight, "quant_state"):  # of bitsandbytes: only this weight is large for a moment
            import bitsandbytes as bnb

            weight = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        scales = getattr(weight, "scale", weight)  # of torchao
        require(scales.isfinite().all(), f"{source} is damaged, get it again: {name} is not finite")


def quiet_torchao():
    warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated")  # it could not be merged
