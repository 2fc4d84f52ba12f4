"""--lora: what a trained LoRA must be before a model loads; and a LoRA in stock diffusers' format."""

from dataclasses import replace
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file

from rewards import need, read_json, reading


def check_lora(folder: str, skeleton, given: dict) -> dict:
    """A LoRA's rank, alpha and targets, as settings. Raises BadInput.

    skeleton: the denoiser without weights; the LoRA must have all matrices for it, all finite. given: the
    user's settings, which must not say otherwise.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        need(
            (Path(folder) / name).is_file(), f"--lora {folder}: there is no {name}: give a run's lora folder"
        )
    kind = read_json(Path(folder) / "adapter_config.json").get("peft_type")
    need(kind == "LORA", f"--lora {folder}: its adapter_config.json is that of a {kind}")
    with reading(f"--lora {folder} is damaged, or made for another model"):
        config = replace(peft.PeftConfig.from_pretrained(folder), base_model_name_or_path=None)
        fits = peft.get_peft_model_state_dict(peft.get_peft_model(skeleton, config))
        state = load_file(Path(folder) / "adapter_model.safetensors")
        targets = ",".join(sorted(config.target_modules))
    good = {k for k, w in state.items() if k in fits and w.shape == fits[k].shape and w.isfinite().all()}
    other = (fits.keys() | state.keys()) - good
    need(not other, f"--lora {folder} was made for another model, or is damaged: {min(other, default='')}")
    has = dict(lora_rank=config.r, lora_alpha=config.lora_alpha, lora_targets=targets)
    for name in has.keys() & given.keys():
        same = {*str(given[name]).replace(" ", "").split(",")} == {*str(has[name]).split(",")}
        need(same, f"--{name} {given[name]}: the LoRA in --lora has {has[name]}, leave the flag out")
    return has


def check_targets(targets: str, skeleton):
    """Raises BadInput unless each of the targets, "to_q,to_v", is the end of names of linear layers alone."""
    layers = {f".{name}": isinstance(part, torch.nn.Linear) for name, part in skeleton.named_modules()}
    for target in targets.split(","):
        linear = [found for name, found in layers.items() if name.endswith(f".{target.strip()}")]
        good = linear and all(linear)
        need(good, f"--lora_targets {target!r}: give the ends of linear layers' names, as to_q,to_v")


def save_stock(model, folder: Path):
    """Write the LoRA for `load_lora_weights` of the model's stock pipeline, beside PEFT's files."""
    weights = peft.get_peft_model_state_dict(model.denoiser, save_embedding_layers=False)
    weights = {name.removeprefix("base_model.model."): w for name, w in weights.items()}
    config = model.denoiser.peft_config["default"].to_dict()
    given = {"lora_layers": weights, "lora_adapter_metadata": config}
    model.lora_pipeline.save_lora_weights(folder, **{f"{model.folder}_{k}": v for k, v in given.items()})
