"""The frozen base, before a LoRA is trained on it: --base_lora is fused in, --quantize makes it small."""

import math
import os
import warnings
from pathlib import Path

import diffusers
import peft
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file

from extras.lora import build_on_meta, check_matrices, expected_matrices, read_lora
from extras.lora_files import public_name
from rewards import BadInput, as_bad_input, asking_hub, fetch, list_hub, read_json, require

FLAG = "--base_lora"
NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # PEFT's, diffusers'
PEFT_PREFIX = "base_model.model."  # of the matrices' names in PEFT's files


def prepare(model, cfg):
    """Fuse --base_lora into the model's denoiser, and set model.base_lora to its name; then --quantize it."""
    if cfg.base_lora:
        family = type(model)
        config, state = read_base(cfg.base_lora, family, build_on_meta(family, model.source))
        adapted = peft.get_peft_model(model.denoiser, config)
        peft.set_peft_model_state_dict(adapted, state)
        model.denoiser = adapted.merge_and_unload().eval().requires_grad_(False)
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
def find_lora(source: str) -> Path:
    """The file of a LoRA: a file, in a folder, or on the hub (owner/name, or owner/name/file).

    From the hub it is downloaded, with the adapter_config.json beside it. Raises BadInput.
    """
    if Path(source).is_file():
        return Path(source)
    if (Path(source) / "lora" / "adapter_config.json").is_file():  # a run's folder
        source = f"{source}/lora"
    if Path(source).is_dir():
        place, name, names = source, "", os.listdir(source)
    else:
        place, name = split_hub_id(source)
        with asking_hub(place, FLAG):
            names = list_hub(place)
    if not name:
        name = pick_file(source, names)
    config = str(Path(name).with_name("adapter_config.json"))
    if config in names:
        fetch(place, config, FLAG)  # to lie beside the other, in the cache
    return fetch(place, name, FLAG)


def split_hub_id(source: str) -> tuple[str, str]:
    """Split "owner/name/folder/file" into "owner/name" and "folder/file". Raises BadInput."""
    owner, _, rest = source.partition("/")
    name, _, file = rest.partition("/")
    repository = f"{owner}/{name}"
    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise BadInput(f"{FLAG} {source}: no such file or folder, and no hub id") from None
    return repository, file


def pick_file(source: str, names: list[str]) -> str:
    """Which of a folder's files is the LoRA: one named as PEFT or diffusers do, else the only one."""
    files = [name for name in names if name.endswith(".safetensors")]
    require(files, f"{FLAG} {source}: there is no .safetensors file")
    for name in NAMES:
        if name in files:
            return name
    require(len(files) == 1, f"{FLAG} {source} has several files: give one, as {source}/{files[0]}")
    return files[0]


def read_base(source: str, family, denoiser) -> tuple[peft.LoraConfig, dict]:
    """A LoRA in PEFT's format, or in one that diffusers knows for the model: its config and matrices.

    family: a model's class. denoiser: its denoiser without weights. Raises BadInput for a LoRA of another
    model, with missing or odd matrices, or with numbers that are not finite.
    """
    file = find_lora(source)
    where = f"{FLAG} {source}"
    if file.name == "adapter_model.safetensors" and file.with_name("adapter_config.json").is_file():
        return read_lora(str(file.parent), FLAG, denoiser)
    with as_bad_input(f"{where} is damaged, or no LoRA"):
        state = load_file(file)
    state, alphas = convert(where, state, family)
    matrices, ranks = {}, {}
    for key, matrix in state.items():
        key = without_prefix(key, family)
        matrices[PEFT_PREFIX + key] = matrix
        if key.endswith(".lora_A.weight") and matrix.dim() > 1:
            ranks[key.removesuffix(".lora_A.weight")] = len(matrix)
    require(ranks, f"{where}: there is no LoRA in it, in PEFT's format or the pipeline's in diffusers")
    scales = dict(ranks)  # a layer without an alpha is scaled by 1
    for key, alpha in alphas.items():
        alpha = torch.as_tensor(alpha)
        is_number = alpha.numel() == 1 and math.isfinite(alpha.item())
        require(is_number, f"{where} is damaged: {key} is no number")
        layer = without_prefix(key, family).removesuffix(".alpha")
        if layer in ranks:
            scales[layer] = alpha.item()
    config = peft.LoraConfig(target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=scales)
    expected = expected_matrices(f"{where} was made for another model", config, denoiser)
    check_matrices(where, matrices, expected)
    return config, matrices


def convert(where: str, state: dict, family) -> tuple[dict, dict]:
    """A file's tensors -> the matrices by PEFT's names, and the alphas, by diffusers. Raises BadInput."""
    alphas = {}
    is_peft = any(key.startswith(PEFT_PREFIX) for key in state)
    if is_peft or not family.lora_pipeline:
        return state, alphas
    problem = f"{where} is in a format that there is no code for"
    with as_bad_input(problem):
        converted = family.lora_pipeline.lora_state_dict(state)
    if isinstance(converted, tuple):  # with a dictionary of alphas, or None
        converted, alphas = converted
        alphas = dict(alphas or {})
    matrices = {}
    for key, value in converted.items():
        if key.endswith(".alpha"):
            alphas[key] = value
        else:
            matrices[key] = value
    if family.folder == "unet":
        with as_bad_input(problem):
            matrices = diffusers.utils.convert_unet_state_dict_to_peft(matrices)
    return matrices, alphas


def without_prefix(key: str, family) -> str:
    """A matrix's name from the layer's on, without what PEFT or a pipeline puts before it."""
    for prefix in (PEFT_PREFIX, f"{family.folder}."):
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


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
