"""Is a LoRA's file whole, of a kind that there is code for, and made for this model?"""

import contextlib
import warnings

import diffusers
import peft
import torch

from rewards import require

OTHER_TRAINING = {"bias": "biases", "modules_to_save": "whole layers", "use_dora": "DoRA"}

# What is no plain LoRA, by a part of its names. diffusers drops or refuses most of these.
KINDS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", ".hada_": "LoHa", ".lokr_": "LoKr"}
KINDS |= {".lora_mid.": "LoCon of Tucker's form", ".oft_": "OFT"}


@contextlib.contextmanager
def quiet():
    """Inside, diffusers and PEFT don't warn, nor log what they raise as well."""
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers.utils.logging.set_verbosity(verbosity)


# Each of these raises BadInput, in a line that begins with `where`: the flag and what was given to it.
# ---- The config, of PEFT's files or in the header of diffusers' --------------------------------------------
def check_config(where: str, config: dict):
    """An adapter_config.json must be a LoRA's, with its layers in a list."""
    kind = config.get("peft_type")
    require(kind == "LORA", f"{where}: its adapter_config.json is that of a {kind}, not of a LORA")
    targets = config.get("target_modules")
    is_list = type(targets) is list
    require(
        is_list, f"{where}: target_modules is {targets!r}, a regular expression: it must be a list of names"
    )
    check_scale(where, config, "of its adapter_config.json")
    check_training(where, config)


def check_scale(where: str, config: dict, place: str):
    """Ranks and alphas must be numbers that a LoRA can have. place: where they stand."""
    for name, rank in collect(where, config, "r", "rank_pattern").items():
        allowed = type(rank) is int and 0 < rank <= 1024
        require(allowed, f"{where}: {name} {place} is {rank!r}: give one from 1 to 1024")
    for name, alpha in collect(where, config, "lora_alpha", "alpha_pattern").items():
        allowed = type(alpha) in (int, float) and 0 < alpha <= 1e6
        require(allowed, f"{where}: {name} {place} is {alpha!r}: give one from 0 to 1e6")


def collect(where: str, config: dict, name: str, pattern: str) -> dict:
    """A setting of a config, and its values for some of the layers, by the patterns of their names."""
    others = config.get(pattern) or {}
    require(isinstance(others, dict), f"{where}: {pattern} is {others!r}: it must be a dictionary")
    return {name: config.get(name)} | others


def check_training(where: str, config: dict):
    """A LoRA that by its config trained more than matrices, or changed the base, is refused."""
    for name, kind in OTHER_TRAINING.items():
        is_off = config.get(name) in (None, False, "none")
        require(is_off, f"{where} has {kind}: there is no code for {name} of its config")
    start = config.get("init_lora_weights")
    keeps_base = start in (None, True, False, "gaussian", "orthogonal", "eva")
    require(
        keeps_base,
        f"{where} begins from {start!r} (init_lora_weights), which changes the base: no code for it",
    )


# ---- What a file holds -------------------------------------------------------------------------------------
def check_kind(where: str, state: dict):
    """A file of another kind than LoRA, by the names in it, is refused."""
    for key in state:
        for part, kind in KINDS.items():
            require(part not in key, f"{where} is a {kind}, for which there is no code: it has {key}")


def check_numbers(where: str, state: dict):
    """What is no alpha must be floating-point numbers: converters would round others, or take them so."""
    for key, tensor in state.items():
        is_right = key.endswith(".alpha") or tensor.is_floating_point()
        require(is_right, f"{where} is damaged: {key} is of {tensor.dtype}, not of floating-point numbers")


def check_alphas(where: str, state: dict):
    """Each alpha must be a number above 0, of a layer that has matrices."""
    layers = {key.split(".lora_")[0] for key in state}
    for key, alpha in state.items():
        if key.endswith(".alpha"):
            is_number = alpha.numel() == 1 and not alpha.is_complex() and 0 < alpha.item() <= 1e6
            require(is_number, f"{where} is damaged: {key} is no number from 0 to 1e6")
            layer = key.removesuffix(".alpha")
            require(layer in layers, f"{where} is damaged: there is no matrix for {key}")


def check_matrices(where: str, matrices: dict, expected: dict):
    """There must be the expected matrices and no others, all of finite numbers."""
    for name in sorted(matrices.keys() | expected.keys()):
        is_right = is_like(matrices.get(name), expected.get(name))
        require(is_right, f"{where} was made for another model, or is damaged: {name}")


def is_like(matrix, expected) -> bool:
    """Has a matrix of finite numbers the expected one's shape? Either may be None, which is not there."""
    if matrix is None or expected is None:
        return False
    if matrix.shape != expected.shape or not matrix.is_floating_point():
        return False
    return bool(matrix.isfinite().all())


def check_biases(where: str, adapted: torch.nn.Module):
    """A layer of which the LoRA has a difference of its bias must have a bias."""
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer) and any(layer.lora_bias.values()):
            problem = f"{where}: it has a difference of a bias for {name}, which has none"
            require(layer.get_base_layer().bias is not None, problem)
