"""LoRA files of all formats that a model's stock pipeline reads, by its own converter, as PEFT has them."""

import re
import statistics
from pathlib import Path

import diffusers
import peft
import torch

from extras.lora_checks import check_scale, check_training, quiet
from rewards import as_bad_input, require

# What the header of diffusers' files tells of the scale of each layer; the rest is not for loading.
HEADER = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias")


def read_stock(where: str, file: Path, tensors: dict, family) -> tuple[peft.LoraConfig, dict, list[str]]:
    """Config and matrices of a LoRA's file, by the layers' names, and lines on what is left out.

    tensors: the file's. family: a model's class. Raises BadInput for a LoRA that the pipeline has no
    converter for, and for tensors that the converter drops, unless they are such as it always does.
    """
    converted, *network_alphas, header = convert(where, file, family)
    matrices, alphas = {}, {}
    for key, tensor in rename(converted, family).items():
        if key.endswith(".alpha"):  # which the converter knows nothing of
            alphas[key.removesuffix(".alpha")] = tensor.item()
        else:
            matrices[key] = tensor
    for given in network_alphas:  # nothing, None or a dictionary
        for key, alpha in rename(given or {}, family).items():
            layer = key.removesuffix(".alpha").split(".lora_A")[0]
            alphas[layer] = alpha
    place = f"{where}: there is no LoRA of the {part_of(family)} in it"
    require(matrices, f"{place}, in PEFT's format or one of {family.lora_pipeline.__name__}")
    lines = describe_left_out(where, tensors.keys() - find_kept(where, tensors, family))
    header = rename(header or {}, family)
    require(not (alphas and header), f"{where} has alphas, and a header that tells others: which count?")
    if header:
        return read_header(where, header, matrices), matrices, lines
    return make_config(where, matrices, alphas), matrices, lines


def make_config(where: str, matrices: dict, alphas: dict[str, float]) -> peft.LoraConfig:
    """A config for these matrices, where each layer has its own rank and alpha. Raises BadInput.

    alphas: by the layers' names; where there is none, it is the rank.
    """
    ranks = find_ranks(matrices)
    kinds = "in PEFT's format or the pipeline's in diffusers"
    require(ranks, f"{where} was made for another model, or there is no LoRA in it, {kinds}")
    for layer in alphas:
        require(layer in ranks, f"{where} is damaged: there is no matrix for the alpha of {layer}")
    alphas = ranks | alphas
    has_bias = any(key.endswith(".lora_B.bias") for key in matrices)
    require(not has_bias or alphas == ranks, f"{where}: there is no code for alphas beside biases")
    rank, alpha = statistics.mode(ranks.values()), statistics.mode(alphas.values())
    if alpha == int(alpha):
        alpha = int(alpha)
    return peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern=list_others(ranks, rank),
        alpha_pattern=list_others(alphas, alpha),
        target_modules=list(ranks),
        lora_bias=has_bias,
    )


def read_header(where: str, header: dict, matrices: dict) -> peft.LoraConfig:
    """The config that the header of diffusers' files tells, for these matrices. Raises BadInput."""
    check_training(where, header)
    check_scale(where, header, "of its header")
    targets = header.get("target_modules", [])
    require(
        isinstance(targets, list), f"{where}: target_modules of its header is {targets!r}, no list of names"
    )
    told = {}
    for name in HEADER:
        if name in header:
            told[name] = header[name]
    return peft.LoraConfig(target_modules=list(find_ranks(matrices)), **told)


def find_ranks(matrices: dict) -> dict[str, int]:
    """{layer: rank} of matrices."""
    ranks = {}
    for key, matrix in matrices.items():
        layer, _, which = key.partition(".lora_")
        if which == "A.weight" and matrix.dim() > 1:
            ranks[layer] = len(matrix)
    return ranks


def list_others(values: dict, commonest) -> dict:
    """What PEFT takes for the layers with another value, by patterns that each fit one layer alone."""
    others = {}
    for layer, value in values.items():
        if value != commonest:
            others[f"^{re.escape(layer)}"] = value
    return others


# ---- What is taken from a file -----------------------------------------------------------------------------
def convert(where: str, source: Path | dict, family) -> tuple:
    """Stock's lora_state_dict -> tensors by diffusers' names, alphas where it has them, metadata or None.

    Raises BadInput.
    """
    kwargs = {}
    if isinstance(source, Path):
        source, kwargs = str(source.parent), {"weight_name": source.name}
    with quiet(), as_bad_input(f"{where} is in a format that diffusers has no code for"):
        return family.lora_pipeline.lora_state_dict(source, return_lora_metadata=True, **kwargs)


def find_kept(where: str, tensors: dict, family) -> set[str]:
    """The keys of a file that reach the denoiser through stock's converter, and those of alphas.

    The converter renames, scales and drops. It is given a row of another width in each key's place.
    """
    rows, key_of_width, kept = {}, {}, set()
    for width, (key, tensor) in enumerate(tensors.items(), start=1000):
        if key.endswith(".alpha"):
            rows[key] = tensor
            kept.add(key)
        else:
            rows[key] = torch.empty(1, width, device="meta")
            key_of_width[width] = key
    converted, *_ = convert(where, rows, family)
    for key, row in rename(converted, family).items():
        if not key.endswith(".alpha"):
            kept.add(key_of_width.get(row.shape[-1]))
    return kept


def part_of(family) -> str:
    """What stands before the names of layers in LoRAs; a second transformer's have those of the first."""
    return family.folder.removesuffix("_2")


def rename(converted: dict, family) -> dict:
    """What is the denoiser's of what a pipeline has converted, by the names of PEFT's layers."""
    prefix = f"{part_of(family)}."
    ours = {}
    for key, value in converted.items():
        if key.startswith(prefix):
            ours[key.removeprefix(prefix)] = value
    return diffusers.utils.convert_unet_state_dict_to_peft(ours)


def describe_left_out(where: str, keys: set[str]) -> list[str]:
    """Lines on these keys, which stock leaves out. Raises BadInput unless they are such as it always does."""
    texts, differences = [], []
    for key in sorted(keys):
        if key.startswith(("lora_te", "text_encoder")):
            texts.append(key)
        elif key.endswith((".diff", ".diff_b")):
            differences.append(key)
        else:
            require(False, f"{where} was made for another model, or is damaged: nothing takes {key}")
    lines = []
    if texts:
        lines.append(f"{where}: left out: {len(texts)} tensors of a text encoder, as {texts[0]}")
    if differences:
        lines.append(
            f"{where}: left out, as by diffusers: {len(differences)} differences, as {differences[0]}"
        )
    return lines
