"""The files of a trained LoRA beside PEFT's own: a card, vader.json, and those for diffusers and ComfyUI."""

import json
import tempfile
from pathlib import Path

import peft
from safetensors.torch import save_file

from extras.stock_lora import part_of
from vader import write_atomic


def public_name(source: str) -> str:
    """A hub id as it is; of a file or folder only its name, as its place is one's own."""
    if Path(source).exists():
        return Path(source).name
    return source


def save(model, folder: Path, cfg=None):
    """Write the model's LoRA into a folder, in all its formats, each file whole at any moment.

    cfg: the run's, for what the files tell of it.
    """
    with tempfile.TemporaryDirectory() as made:
        model.denoiser.save_pretrained(made, save_embedding_layers=False)
        add_files(model, Path(made), cfg)
        for file in Path(made).iterdir():  # written anew: safetensors makes files for their owner alone
            write_atomic(folder / file.name, file.read_bytes())


def add_files(model, folder: Path, cfg=None):
    """Complete a LoRA that PEFT has saved: names without places, vader.json, a card, files for others.

    cfg: the run's, for what the files tell of it.
    """
    base_model = public_name(model.source)
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["base_model_name_or_path"] = base_model
    config["target_modules"] = sorted(config["target_modules"])  # a set has no order
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True))
    about = {"base_lora": model.base_lora, "base_model": base_model, "reward": None}
    if cfg:
        about["reward"] = cfg.reward
    (folder / "vader.json").write_text(json.dumps(about, indent=1))
    card = f"---\ntags: [vader]\n---\n{describe(base_model, model.base_lora, model)}\n"
    (folder / "README.md").write_text(card)
    if model.lora_pipeline:
        save_stock(model, folder, cfg)


def tell_of_comfyui(out: Path):
    """Print which of the LoRA's files in a run's folder ComfyUI takes, where there is one."""
    folder = out / "best" if (out / "best").exists() else out / "lora"
    file = folder / "comfyui.safetensors"
    if file.exists():
        print(f"ComfyUI takes {file}, and of the others nothing; diffusers and PEFT take the folder")


def describe(base_model: str, base_lora: str | None, family=None) -> str:
    """What a LoRA is and what it needs, in words for people; vader.json says it for programs.

    family: a model or its class, which may have a note on where it goes.
    """
    sentence = f"A LoRA made by reward gradients (VADER) on {base_model}"
    if base_lora:
        sentence += f", after the LoRA {base_lora} was fused into it: load both"
    return f"{sentence}. {getattr(family, 'lora_note', '')}".strip()


def save_stock(model, folder: Path, cfg=None):
    """Write the LoRA for `load_lora_weights` of the model's stock pipeline, beside PEFT's files; for ComfyUI.

    cfg: the run's, of which the headers of both files tell; without it they hold what loading needs.
    """
    weights = {}
    for name, matrix in peft.get_peft_model_state_dict(model.denoiser, save_embedding_layers=False).items():
        weights[name.removeprefix("base_model.model.")] = matrix
    config = json.loads((folder / "adapter_config.json").read_text())
    part = part_of(model)
    kwargs = {f"{part}_lora_layers": weights, f"{part}_lora_adapter_metadata": config}
    model.lora_pipeline.save_lora_weights(folder, **kwargs)
    files = [folder / "pytorch_lora_weights.safetensors"]
    if getattr(model, "comfy_names", None):
        comfy_file = folder / "comfyui.safetensors"
        save_file(comfy_state(model), comfy_file, {"format": "pt"})
        files.append(comfy_file)
    metadata = {}
    if cfg:
        metadata = make_metadata(config["base_model_name_or_path"], model.base_lora, cfg)
    for file in files:
        add_metadata(file, metadata)


def make_metadata(base_model: str, base_lora: str | None, cfg) -> dict[str, str]:
    """What the header of a file tells of its LoRA, by ModelSpec 1.0.1, which other programs show."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.tags": "lora, vader, text-to-video",
        "modelspec.title": f"{cfg.reward} on {base_model}",
        "modelspec.architecture": f"{Path(base_model).name}/lora",
        "modelspec.description": describe(base_model, base_lora),
        "modelspec.resolution": f"{cfg.width}x{cfg.height}",
        "vader.base_model": base_model,
        "vader.reward": cfg.reward,
    }


def comfy_state(model) -> dict:
    """The LoRA by ComfyUI's names: those of the original checkpoint, by `comfy_names` of the model's class.

    ComfyUI scales by alpha / rank where there is an alpha, else by 1. So do diffusers' converters, but these
    refuse some alphas. So there is none, and lora_B has that factor in it.
    """
    state = {}
    for name, layer in model.denoiser.get_base_model().named_modules():
        if not isinstance(layer, peft.tuners.lora.LoraLayer):
            continue
        for ours, theirs in model.comfy_names.items():
            name = name.replace(ours, theirs)
        down = layer.lora_A["default"].weight.detach()
        up = layer.lora_B["default"].weight.detach()
        state[f"diffusion_model.{name}.lora_A.weight"] = down
        state[f"diffusion_model.{name}.lora_B.weight"] = up * layer.scaling["default"]
        if layer.lora_bias["default"]:
            difference = layer.lora_B["default"].bias.detach()
            state[f"diffusion_model.{name}.diff_b"] = difference * layer.scaling["default"]
    return state


def add_metadata(file: Path, metadata: dict[str, str]):
    """Add to the metadata of a .safetensors file, in alphabetical order: the library's own is random.

    The file begins with the length of its header in 8 bytes, least first; then comes the header, in JSON.
    """
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    merged = header["__metadata__"] | metadata
    header["__metadata__"] = dict(sorted(merged.items()))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers behind it are aligned
    length = len(text).to_bytes(8, "little")
    file.write_bytes(length + text + data[end:])
