"""--lora: what a trained LoRA must be before a model loads; and a LoRA for diffusers and ComfyUI."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file

from rewards import as_bad_input, read_json, require


def read_lora(folder: str, flag: str, denoiser) -> tuple[peft.LoraConfig, dict]:
    """A LoRA as PEFT saves it: its config and matrices. flag: which asks for it, named in what is raised.

    denoiser: the denoiser without weights, for which all matrices must be there, finite. Raises BadInput.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        there = (Path(folder) / name).is_file()
        require(there, f"{flag} {folder}: there is no {name}: give a run's lora folder")
    says = read_json(Path(folder) / "adapter_config.json")
    kind, alpha, rank = (says.get(key) for key in ("peft_type", "lora_alpha", "r"))
    require(kind == "LORA", f"{flag} {folder}: its adapter_config.json is that of a {kind}, not of a LORA")
    good = type(alpha) in (int, float) and 0 < alpha <= 1e6
    require(
        good, f"{flag} {folder}: lora_alpha of its adapter_config.json is {alpha!r}: give one from 0 to 1e6"
    )
    require(
        type(says.get("target_modules")) is list, f"{flag} {folder}: target_modules must be a list of names"
    )
    good = type(rank) is int and 0 < rank <= 1024
    require(good, f"{flag} {folder}: r of its adapter_config.json is {rank!r}: give one from 1 to 1024")
    kinds = ("modules_to_save", "bias", "use_dora")
    odd = [name for name in kinds if says.get(name) not in (None, False, "none")]
    require(
        not odd, f"{flag} {folder}: there is no code for {min(odd, default='')} of its adapter_config.json"
    )
    with as_bad_input(f"{flag} {folder} is damaged, or made for another model"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of what does not fit: that is an error here
        config = replace(peft.PeftConfig.from_pretrained(folder), base_model_name_or_path=None)
        fits = peft.get_peft_model_state_dict(peft.get_peft_model(denoiser, config))
        state = load_file(Path(folder) / "adapter_model.safetensors")
    check_matrices(f"{flag} {folder}", state, fits)
    return config, state


def check_matrices(said: str, state: dict, fits: dict):
    """Raises BadInput unless state has all that fits has, and no more, in its shapes, finite numbers all."""
    good = {k for k, w in state.items() if k in fits and w.shape == fits[k].shape and w.is_floating_point()}
    good = {k for k in good if state[k].isfinite().all()}
    other = (fits.keys() | state.keys()) - good
    require(not other, f"{said} was made for another model, or is damaged: {min(other, default='')}")


def check_lora(folder: str, denoiser, given: dict) -> dict:
    """The rank, alpha and targets of --lora, as settings; the user's, given, must not say otherwise."""
    config, _ = read_lora(folder, "--lora", denoiser)
    targets = ",".join(sorted(config.target_modules))
    has = dict(lora_rank=config.r, lora_alpha=config.lora_alpha, lora_targets=targets)
    for name in has.keys() & given.keys():
        same = {*str(given[name]).replace(" ", "").split(",")} == {*str(has[name]).split(",")}
        require(same, f"--{name} {given[name]}: the LoRA in --lora has {has[name]}, leave the flag out")
    return has


def check_targets(targets: str, denoiser):
    """Raises BadInput unless each of the targets, "to_q,to_v", is the end of names of linear layers alone."""
    layers = {f".{name}": isinstance(part, torch.nn.Linear) for name, part in denoiser.named_modules()}
    for target in targets.split(","):
        linear = [found for name, found in layers.items() if name.endswith(f".{target.strip()}")]
        good = linear and all(linear)
        require(good, f"--lora_targets {target!r}: give the ends of linear layers' names, as to_q,to_v")


def save_stock(model, folder: Path, cfg=None):
    """Write the LoRA for `load_lora_weights` of the model's stock pipeline, beside PEFT's files; for ComfyUI.

    cfg: the run's, of which the headers tell, by ModelSpec 1.0.1; without it they hold what loading needs.
    """
    weights = peft.get_peft_model_state_dict(model.denoiser, save_embedding_layers=False)
    weights = {name.removeprefix("base_model.model."): w for name, w in weights.items()}
    config = model.denoiser.peft_config["default"].to_dict()
    given = {"lora_layers": weights, "lora_adapter_metadata": config}
    model.lora_pipeline.save_lora_weights(folder, **{f"{model.folder}_{k}": v for k, v in given.items()})
    files, base, told = ["pytorch_lora_weights.safetensors"], config["base_model_name_or_path"], {}
    if getattr(model, "comfy_names", None):
        files.append("comfyui.safetensors")
        save_file(comfy_state(model), folder / files[1], {"format": "pt"})
    if cfg:
        told = dict(sai_model_spec="1.0.1", implementation="diffusers", tags="lora, vader, text-to-video")
        told |= dict(title=f"{cfg.reward} on {base}", architecture=f"{Path(base).name}/lora")
        told |= dict(description=f"A LoRA made by reward gradients (VADER) on {base}{model.fused}")
        told |= dict(resolution=f"{cfg.width}x{cfg.height}")
        told = {f"modelspec.{name}": value for name, value in told.items()}
        told |= {"vader.base_model": base, "vader.reward": cfg.reward}
    for name in files:
        add_header(folder / name, told)


def comfy_state(model) -> dict:
    """The LoRA by ComfyUI's names: those of the original checkpoint, by `comfy_names` of the model's class.

    It scales by alpha / rank where there is an alpha, else by 1, and so do diffusers' converters, but these
    refuse some alphas. So there is none, and lora_B has that factor in it.
    """
    state = {}
    for name, layer in model.denoiser.get_base_model().named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            for ours, theirs in model.comfy_names.items():
                name = name.replace(ours, theirs)
            down, up = (matrix["default"].weight.detach() for matrix in (layer.lora_A, layer.lora_B))
            state[f"diffusion_model.{name}.lora_A.weight"] = down
            state[f"diffusion_model.{name}.lora_B.weight"] = up * layer.scaling["default"]
    return state


def add_header(file: Path, told: dict[str, str]):
    """Add to what the header of a .safetensors file tells, in order: the library's own order is random."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted((header["__metadata__"] | told).items()))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers behind it are aligned
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
