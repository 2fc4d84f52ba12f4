"""The frozen base, before a LoRA is trained on it: --base_lora is fused in, --quantize makes it small."""

import os
import re
import warnings
from pathlib import Path

import diffusers
import peft
import torch
from safetensors.torch import load_file

from extras.lora_files import check_matrices, read_lora
from rewards import as_bad_input, asking_hub, fetch, list_hub, require

NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # PEFT's, diffusers'


def prepare(model, cfg):
    """Fuse --base_lora into the model's denoiser, then quantise it."""
    if cfg.base_lora:
        config, state = read_base(cfg.base_lora, type(model), type(model).build_on_meta(model.source))
        fused = peft.get_peft_model(model.denoiser, config)
        peft.set_peft_model_state_dict(fused, state)
        model.denoiser = fused.merge_and_unload().eval().requires_grad_(False)
        name = Path(cfg.base_lora).name if Path(cfg.base_lora).exists() else cfg.base_lora
        model.fused = f", after the LoRA {name} was fused into it: load both"
    if cfg.quantize != "none":
        quantize(model.denoiser, cfg.quantize, model.dtype)


def find_lora(source: str) -> Path:
    """The file of a LoRA: itself, in a folder, or on the hub (owner/name, or owner/name/file)."""
    if Path(source).is_file():
        return Path(source)
    if (Path(source) / "lora" / "adapter_config.json").is_file():  # a run's folder
        source = f"{source}/lora"
    repo, name, flag = source, "", "--base_lora"
    if Path(source).is_dir():
        names = os.listdir(source)
    else:
        on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(/.+)?", source)
        require(on_hub, f"--base_lora {source}: no such file or folder, and no hub id")
        repo = "/".join(source.split("/")[:2])
        name = source.removeprefix(repo).strip("/")
        with asking_hub(repo, flag):
            names = list_hub(repo)
    files = [file for file in names if file.endswith(".safetensors")]
    found = [name] if name else [file for file in NAMES if file in files][:1] or files
    require(found, f"--base_lora {source}: there is no .safetensors file")
    require(len(found) == 1, f"--base_lora {source} has several files: give one, as {source}/{found[0]}")
    config = str(Path(found[0]).with_name("adapter_config.json"))
    if config in names:
        fetch(repo, config, flag)  # beside the other, in the cache
    return fetch(repo, found[0], flag)


def read_base(source: str, family, denoiser) -> tuple[peft.LoraConfig, dict]:
    """A LoRA in PEFT's format, or in one that diffusers knows for the model: its config and matrices.

    family: a model's class; denoiser: its denoiser without weights. Raises BadInput for a LoRA of another
    model, with missing or odd keys, or that is not finite.
    """
    file, where = find_lora(source), f"--base_lora {source}"
    if file.name == "adapter_model.safetensors" and file.with_name("adapter_config.json").is_file():
        return read_lora(str(file.parent), "--base_lora", denoiser)
    with as_bad_input(f"{where} is damaged, or no LoRA"):
        state, alphas = load_file(file), {}
    with as_bad_input(f"{where} is in a format that there is no code for"):
        if family.lora_pipeline and not any(key.startswith("base_model.model.") for key in state):
            found = family.lora_pipeline.lora_state_dict(state)
            state, alphas = found if isinstance(found, tuple) else (found, {})
            alphas = (alphas or {}) | {key: state[key] for key in state if key.endswith(".alpha")}
            state = {key: value for key, value in state.items() if key not in alphas}
            if family.folder == "unet":
                state = diffusers.utils.convert_unet_state_dict_to_peft(state)
    own = re.compile(rf"^(base_model\.model\.|{family.folder}\.)")
    state = {own.sub("", key): value for key, value in state.items()}
    ranks = {key.removesuffix(".lora_A.weight"): len(w) for key, w in state.items() if ".lora_A." in key}
    require(ranks, f"{where}: there is no LoRA in it, in PEFT's format or the pipeline's in diffusers")
    scales = {own.sub("", key).removesuffix(".alpha"): float(alpha) for key, alpha in alphas.items()}
    scales = {name: scales.get(name, rank) for name, rank in ranks.items()}
    with as_bad_input(f"{where} was made for another model"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of what does not fit: that is an error here
        config = peft.LoraConfig(target_modules=[*ranks], rank_pattern=ranks, alpha_pattern=scales)
        fits = peft.get_peft_model_state_dict(peft.get_peft_model(denoiser, config))
    state = {f"base_model.model.{key}": value for key, value in state.items()}
    check_matrices(where, state, fits)
    return config, state


def quantize(network: torch.nn.Module, kind: str, dtype: torch.dtype):
    """Quantise a network's linear layers in place, as diffusers' and transformers' own quantisers do.

    int8: torchao, a scale for each output, weights only. nf4: bitsandbytes (Dettmers et al. 2023, arXiv
    2305.14314), once the weights are on a GPU; never run on one. Both compute in dtype.
    """

    def wanted(layer, name):
        return isinstance(layer, torch.nn.Linear) and not name.endswith("lm_head")  # it may be tied

    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated")  # it could not be merged
        quantize_(network, Int8WeightOnlyConfig(), filter_fn=wanted)
        return
    import bitsandbytes as bnb

    for name, layer in [(name, part) for name, part in network.named_modules() if wanted(part, name)]:
        how = dict(bias=layer.bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta")
        made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, **how)
        made.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        made.bias = layer.bias
        network.set_submodule(name, made.to(layer.weight.device))
