"""--lora and --base_lora: a LoRA of any format is read, checked, and put on a denoiser as PEFT has it."""

import dataclasses
import warnings
from pathlib import Path
from typing import NamedTuple

import peft
import torch
from safetensors.torch import load_file

import vader
from extras.find_lora import NAMES, find_lora, is_peft
from extras.lora_checks import (
    check_alphas,
    check_biases,
    check_config,
    check_kind,
    check_matrices,
    check_numbers,
    quiet,
)
from extras.stock_lora import make_config, part_of, read_stock
from rewards import as_bad_input, read_json, require
from vader import VideoModel, fill_in, read_config

FLAG = "--lora"
PEFT_PREFIX = "base_model.model."  # of the matrices' names in PEFT's files


# ---- Reading -----------------------------------------------------------------------------------------------
class Lora(NamedTuple):
    """A LoRA as PEFT has it."""

    config: peft.LoraConfig
    matrices: dict  # by the names of the layers, without PEFT_PREFIX
    left_out: list[str] = []  # lines on what of its file is not for the denoiser


def read_lora(source: str, flag: str, family: type[VideoModel]) -> Lora:
    """Read a LoRA in PEFT's format, or in one that the model's pipeline in diffusers reads.

    source: what was given to the flag. family: a model's class. Raises BadInput for a LoRA that is damaged,
    or of a kind that there is no code for; whether it fits the denoiser, `put_on` finds.
    """
    file = find_lora(source, flag)
    where = f"{flag} {source}"
    if is_peft(file):
        return read_peft(where, file)
    advice = "there is no adapter_config.json beside it, to tell its alpha: give a run's lora folder"
    require(file.name != NAMES[0], f"{where}: {file.name} is PEFT's, and {advice}")
    require(file.suffix == ".safetensors", f"{where}: give a .safetensors file")
    with as_bad_input(f"{where} is damaged, or no LoRA"):
        state = load_file(file)
    check_kind(where, state)
    check_numbers(where, state)
    check_alphas(where, state)
    first = min(state, default="")
    if first.startswith(PEFT_PREFIX) or not family.lora_pipeline:
        return read_plain(where, state, family)
    return Lora(*read_stock(where, file, state, family))


def read_peft(where: str, file: Path) -> Lora:
    """A LoRA as PEFT saves it, with its config beside it. Raises BadInput."""
    check_config(where, read_json(file.with_name("adapter_config.json")))
    problem = f"{where} is damaged, or made for another model"
    with as_bad_input(problem), quiet():  # PEFT warns of settings that it does not know
        config = peft.PeftConfig.from_pretrained(str(file.parent))
        state = load_file(file)
    config.base_model_name_or_path = None
    config.inference_mode = False  # or nothing would train
    matrices = {}
    for key, matrix in state.items():
        matrices[key.removeprefix(PEFT_PREFIX)] = matrix
    return Lora(config, matrices)


def read_plain(where: str, state: dict, family) -> Lora:
    """Matrices by the layers' names, maybe with PEFT's prefix or a pipeline's: each layer is scaled by 1."""
    matrices = {}
    for key, matrix in state.items():
        for prefix in (PEFT_PREFIX, f"{part_of(family)}."):
            key = key.removeprefix(prefix)
        matrices[key] = matrix
    return Lora(make_config(where, matrices, {}), matrices)


def put_on(where: str, denoiser: torch.nn.Module, lora: Lora) -> peft.PeftModel:
    """A denoiser with a LoRA as float32 adapters that train; of one without weights they are empty too.

    Raises BadInput, which begins with `where`, when the LoRA does not fit.
    """
    is_empty = next(denoiser.parameters()).is_meta  # then drawing numbers would only take time
    with as_bad_input(f"{where} was made for another model, or is damaged"), quiet():
        adapted = peft.get_peft_model(denoiser, lora.config, low_cpu_mem_usage=is_empty)
        expected = {}
        for key, matrix in peft.get_peft_model_state_dict(adapted, save_embedding_layers=False).items():
            expected[key.removeprefix(PEFT_PREFIX)] = matrix
    check_matrices(where, lora.matrices, expected)
    check_biases(where, adapted)
    if not is_empty:
        named = {PEFT_PREFIX + key: matrix for key, matrix in lora.matrices.items()}
        peft.set_peft_model_state_dict(adapted, named)
    return adapted.eval()


def build_on_meta(family: type[VideoModel], source: str) -> torch.nn.Module:
    """A model's denoiser without its weights. Raises BadInput for a config that is damaged."""
    if hasattr(family, "build_on_meta"):
        return family.build_on_meta(source)
    config = read_config(source, f"{family.folder}/config.json")
    with torch.device("meta"), as_bad_input(f"--model: {source}: the denoiser's config.json is damaged"):
        return family.denoiser_class.from_config(config)


# ---- --lora ------------------------------------------------------------------------------------------------
def attach(model: VideoModel, source: str):
    """Put the LoRA that --lora names on the model's denoiser, to sample with or to train. Raises BadInput."""
    warnings.filterwarnings("ignore", ".*LoRA tensor.*have invalid shape")  # PEFT's, of biases that it saves
    lora = read_lora(source, FLAG, type(model))
    model.denoiser = put_on(f"{FLAG} {source}", model.denoiser, lora)


def find_folder(source: str) -> str:
    """The folder of the file that --lora names. Raises BadInput."""
    return str(find_lora(source, FLAG).parent)


def with_lora(cfg):
    """cfg with the settings of its --lora where it has none. Raises BadInput."""
    family, _, _ = vader.find_model(cfg.model)
    return fill_in(cfg, **adapter_settings(read_lora(cfg.lora, FLAG, family)))


def adapter_settings(lora: Lora) -> dict:
    """The rank, alpha and targets of a LoRA, as settings; where layers have several, the commonest."""
    layers = {key.partition(".lora_")[0] for key in lora.matrices}
    targets = set()
    for name in lora.config.target_modules:
        if name in layers:  # one layer's whole name
            *_, before, last = ["", *name.split(".")]
            name = last
            if last.isdigit():
                name = f"{before}.{last}"
        targets.add(name)
    joined = ",".join(sorted(targets))
    return dict(lora_rank=lora.config.r, lora_alpha=lora.config.lora_alpha, lora_targets=joined)


def check_lora(cfg, denoiser):
    """Print what of --lora is left out. Raises BadInput when it does not fit the denoiser or other settings.

    denoiser: without weights.
    """
    full = vader.resolve(dataclasses.replace(cfg, lora=None))
    family, _, _ = vader.find_model(full.model)
    lora = read_lora(cfg.lora, FLAG, family)
    put_on(f"{FLAG} {cfg.lora}", denoiser, lora)
    has_bias = lora.config.lora_bias and cfg.quantize == "int8"
    require(not has_bias, f"--quantize int8: PEFT has no code for the biases in {FLAG}: take none, or nf4")
    for name, value in adapter_settings(lora).items():
        wanted = getattr(cfg, name)
        same = wanted in (None, value) or split_names(wanted) == split_names(value)
        require(same, f"--{name} {wanted}: the LoRA in --lora has {value}, leave the flag out")
    for line in lora.left_out:
        print(line)


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
