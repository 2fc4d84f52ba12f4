"""--lora: what a trained LoRA must be before a model loads."""

import contextlib
import dataclasses
import warnings
from pathlib import Path

import diffusers
import peft
import torch
from safetensors.torch import load_file

from extras.find_lora import find_lora, is_peft
from rewards import as_bad_input, read_json, require
from vader import VideoModel, fill_in, read_config

OTHER_TRAINING = {"bias": "biases", "modules_to_save": "whole layers", "use_dora": "DoRA"}


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


def build_on_meta(family: type[VideoModel], source: str) -> torch.nn.Module:
    """A model's denoiser without its weights. Raises BadInput for a config that is damaged."""
    if hasattr(family, "build_on_meta"):
        return family.build_on_meta(source)
    config = read_config(source, f"{family.folder}/config.json")
    with torch.device("meta"), as_bad_input(f"--model: {source}: the denoiser's config.json is damaged"):
        return family.denoiser_class.from_config(config)


def read_lora(folder: str, flag: str, denoiser) -> tuple[peft.LoraConfig, dict]:
    """Read a LoRA as PEFT saves it: its config, and its matrices by their names in the file.

    flag: the one that asks for it, named in what is raised. denoiser: the denoiser without weights, for which
    every matrix must be there, of the right shape and finite. Raises BadInput.
    """
    where = f"{flag} {folder}"
    config_file = Path(folder) / "adapter_config.json"
    weights_file = Path(folder) / "adapter_model.safetensors"
    for file in (config_file, weights_file):
        require(file.is_file(), f"{where}: there is no {file.name}: give a run's lora folder")
    check_config(where, read_json(config_file))
    problem = f"{where} is damaged, or made for another model"
    with as_bad_input(problem), quiet():  # PEFT warns of settings that it does not know
        config = peft.PeftConfig.from_pretrained(folder)
        state = load_file(weights_file)
    config.base_model_name_or_path = None
    check_matrices(where, state, expected_matrices(problem, config, denoiser))
    return config, state


def check_config(where: str, config: dict):
    """Raises BadInput, which begins with `where`, for an adapter_config.json that there is no code for."""
    kind = config.get("peft_type")
    require(kind == "LORA", f"{where}: its adapter_config.json is that of a {kind}, not of a LORA")
    alpha = config.get("lora_alpha")
    allowed = type(alpha) in (int, float) and 0 < alpha <= 1e6
    require(allowed, f"{where}: lora_alpha of its adapter_config.json is {alpha!r}: give one from 0 to 1e6")
    targets = config.get("target_modules")
    is_list = type(targets) is list
    require(
        is_list, f"{where}: target_modules is {targets!r}, a regular expression: it must be a list of names"
    )
    rank = config.get("r")
    allowed = type(rank) is int and 0 < rank <= 1024
    require(allowed, f"{where}: r of its adapter_config.json is {rank!r}: give one from 1 to 1024")
    check_training(where, config)


def check_training(where: str, config: dict):
    """Raises BadInput for a LoRA that by its config trained more than matrices, or changed the base."""
    for name, kind in OTHER_TRAINING.items():
        is_off = config.get(name) in (None, False, "none")
        require(is_off, f"{where} has {kind}: there is no code for {name} of its config")
    start = config.get("init_lora_weights")
    keeps_base = start in (None, True, False, "gaussian", "orthogonal", "eva")
    require(
        keeps_base,
        f"{where} begins from {start!r} (init_lora_weights), which changes the base: no code for it",
    )


def expected_matrices(problem: str, config: peft.LoraConfig, denoiser) -> dict:
    """The matrices, without content, that a LoRA of this config has on a denoiser without weights.

    Raises BadInput, which begins with `problem`, when the config does not fit the denoiser.
    """
    with as_bad_input(problem), quiet():  # PEFT warns of what does not fit, which is an error here
        adapted = peft.get_peft_model(denoiser, config)
        return peft.get_peft_model_state_dict(adapted)


def check_matrices(where: str, state: dict, expected: dict):
    """Raises BadInput unless state has the expected matrices and no others, all of finite numbers."""
    for name in sorted(state.keys() | expected.keys()):
        is_right = is_like(state.get(name), expected.get(name))
        require(is_right, f"{where} was made for another model, or is damaged: {name}")


def is_like(matrix, expected) -> bool:
    """Has a matrix of finite numbers the expected one's shape? Either may be None, which is not there."""
    if matrix is None or expected is None:
        return False
    if matrix.shape != expected.shape or not matrix.is_floating_point():
        return False
    return bool(matrix.isfinite().all())


def find_folder(source: str) -> str:
    """The folder of PEFT's files that --lora names: itself, in a run's, or from the hub. Raises BadInput."""
    if (Path(source) / "adapter_config.json").is_file():
        return source
    is_run = (Path(source) / "lora" / "adapter_config.json").is_file()
    problem = f"--lora {source}: there is no adapter_config.json: give a run's lora folder"
    require(is_run or not Path(source).is_dir(), problem)
    file = find_lora(source, "--lora")
    advice = "give a run's lora folder, or one with adapter_config.json and adapter_model.safetensors"
    require(
        is_peft(file),
        f"--lora {source}: {file.name} is not in PEFT's format, as --base_lora may be: {advice}",
    )
    return str(file.parent)


def with_lora(cfg):
    """cfg with the folder of its --lora, and that LoRA's settings where it has none. Raises BadInput."""
    folder = find_folder(cfg.lora)
    cfg = dataclasses.replace(cfg, lora=folder)
    return fill_in(cfg, **adapter_settings(folder))


def adapter_settings(folder: str) -> dict:
    """The rank, alpha and targets of the LoRA in a folder, as settings."""
    config = read_json(Path(folder) / "adapter_config.json")
    targets = ",".join(sorted(config["target_modules"]))
    return dict(lora_rank=config["r"], lora_alpha=config["lora_alpha"], lora_targets=targets)


def check_lora(cfg, denoiser):
    """Raises BadInput when --lora does not fit the denoiser, or when a setting of the user's says otherwise.

    denoiser: without weights.
    """
    folder = find_folder(cfg.lora)
    read_lora(folder, "--lora", denoiser)
    for name, value in adapter_settings(folder).items():
        wanted = getattr(cfg, name)
        same = wanted is None or split_names(wanted) == split_names(value)
        require(same, f"--{name} {wanted}: the LoRA in --lora has {value}, leave the flag out")


def split_names(value) -> set[str]:
    """The parts of "to_q, to_v" in no order; of a number, itself."""
    return {part.strip() for part in str(value).split(",")}


def check_targets(targets: str, denoiser):
    """Raises BadInput unless each of the targets, "to_q,to_v", is the end of names of linear layers alone."""
    for target in targets.split(","):
        are_linear = set()
        for name, layer in denoiser.named_modules():
            if f".{name}".endswith(f".{target.strip()}"):
                are_linear.add(isinstance(layer, torch.nn.Linear))
        problem = f"--lora_targets {target!r}: give the ends of linear layers' names, as to_q,to_v"
        require(are_linear == {True}, problem)
