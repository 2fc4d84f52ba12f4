"""What a checkpoint must be for a model: its pipeline, its networks and their configs, its scheduler."""

import contextlib
import difflib
import inspect
import itertools
import math
import os
import re
from pathlib import Path

import diffusers
import torch
from safetensors import safe_open
from torch.nn.modules.module import register_module_module_registration_hook

import rewards
import vader
from extras import lora
from extras.damaged import check_config, numbers_in
from rewards import as_bad_input, require
from vader import VideoModel, read_config

# What a model_index.json may hold. What else it holds changes what is computed.
PARTS = "_class_name _diffusers_version _name_or_path unet transformer vae scheduler tokenizer text_encoder"
PARTS += " image_encoder feature_extractor motion_adapter safety_checker requires_safety_checker"
MODULES = 20_000  # that a network may have: the largest here has 1,658


def check_model(model: str):
    """Is this a short name, or a folder or hub id of a pipeline that there is code for?"""
    keys = list(itertools.chain(*vader.FAMILIES.values()))
    pipelines = [key for key in keys if key.endswith("Pipeline")]
    if model in keys and model not in pipelines:
        return
    names = set(keys) - set(pipelines)
    (near,) = difflib.get_close_matches(model, names, n=1, cutoff=0)
    require(Path(model).exists() or "/" in model, f"--model: unknown model {model!r}: did you mean {near!r}?")
    index = read_config(model, "model_index.json")
    pipeline, there_is = index.get("_class_name"), f"there is code for: {', '.join(pipelines)}"
    require(pipeline in pipelines, f"--model: {model} is a {pipeline}; {there_is}")
    family, _, _ = vader.find_model(model)
    for key in sorted(index.keys() - {*PARTS.split(), *getattr(family, "index_settings", ())}):
        off = index[key] in (None, False, [None, None])
        require(off, f"--model: {model} is a {pipeline} with {key}; {there_is}")


def check_networks(family: type[VideoModel], source: str):
    """Are the networks those that the family has code for, and are their configs those of their weights?"""
    denoiser = read_config(source, f"{family.folder}/config.json")
    vae = read_config(source, "vae/config.json")
    for folder, config, kind in (
        (family.folder, denoiser, family.denoiser_class),
        ("vae", vae, family.vae_class),
    ):
        name = config.get("_class_name")
        right = name == kind.__name__ or (config is denoiser and name in getattr(family, "also_loads", ()))
        require(right, f"--model: {source} has a {name}, there is code for {kind.__name__}")
        if name != kind.__name__:
            kind = getattr(diffusers, name)
        check_config(f"--model: {source}/{folder}/config.json", kind, config)
    with as_bad_input(f"--model: {source}: a config.json is damaged"):
        channels = family.inputs * int(vae.get("latent_channels") or vae["z_dim"])
        scale = vae.get("scale_factor_spatial", family.scale)
        if family.scale == 8 and "block_out_channels" in vae:
            scale = 2 ** (len(vae["block_out_channels"]) - 1)
        if "dim_mult" in vae:
            scale = 2 ** (len(vae["dim_mult"]) - 1) * (vae.get("patch_size") or 1)
    require(scale == family.scale, f"--model: {source}: its VAE's scale is not {family.scale}")
    with bounded(source), lora.quiet():
        built = lora.build_on_meta(family, source)
        with torch.device("meta"), as_bad_input(f"--model: {source}: the VAE's config.json is damaged"):
            built_vae = family.vae_class.from_config(vae)
    require(built.config.in_channels == channels, f"--model: {source}: no code for other inputs than latents")
    for name in ("latents_mean", "latents_std"):
        count = len(vae.get(name) or range(channels // family.inputs))
        right = count == channels // family.inputs
        require(right, f"--model: {source}/vae/config.json is damaged: {name} has {count} numbers")
    width, all_ids = built.config.get("addition_time_embed_dim"), "projection_class_embeddings_input_dim"
    right = not width or built.config.get(all_ids) == 3 * width
    require(right, f"--model: {source}/{family.folder}/config.json is damaged: {all_ids} is not 3 x {width}")
    if built.config._class_name == denoiser["_class_name"]:  # else a part of it is elsewhere
        for folder in (family.folder, getattr(family, "other_folder", family.folder)):
            check_weights(source, folder, built)
    check_weights(source, "vae", built_vae)
    check_encoder(family, source)


@contextlib.contextmanager
def bounded(source: str):
    """Raises BadInput when a network that is built inside, from a config, gets far too many modules."""
    numbers = itertools.count(1)
    problem = f"--model: {source}: a network of more than {MODULES} modules: a config.json is damaged"

    def count(*_):
        require(next(numbers) <= MODULES, problem)

    with register_module_module_registration_hook(count):
        yield


def check_weights(source: str, folder: str, network: torch.nn.Module, about=False):
    """Raises BadInput unless the weights, where they are here, hold as many numbers as the network.

    about: twice as many are let pass, where files hold some of them twice.
    """
    path = rewards.fetch(source, f"{folder}/config.json", "--model").parent
    files = rewards.pick_files(os.listdir(path), True, False)
    if not files or not files[0].endswith(".safetensors"):
        return
    ignored = "|".join(getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ["$."])
    held = 0
    with as_bad_input(f"--model: the weights in {path} are damaged, get them again"):
        for name in files:
            with safe_open(path / name, "pt") as file:
                for key in file.keys():
                    if not re.search(ignored, key):
                        held += math.prod(file.get_slice(key).get_shape())
    wanted = sum(tensor.numel() for tensor in network.state_dict().values())
    problem = f"its weights hold {held} numbers, its config.json is of a network of {wanted}: get both again"
    require(held == wanted or (about and wanted < 2 * held), f"--model: {path}: {problem}")


def check_encoder(family: type[VideoModel], source: str):
    """Is the config of the encoder of prompts, or of images, one that it can be built from?"""
    part = "text_encoder" if family.text_pipeline else "image_encoder"
    stock = read_config(source, "model_index.json").get("_class_name")
    pipeline = family.text_pipeline or getattr(diffusers, str(stock), object)
    parameter = inspect.signature(pipeline).parameters.get(part)
    if parameter is None:
        return
    kind = parameter.annotation
    config = read_config(source, f"{part}/config.json")
    where = f"--model: {source}/{part}/config.json"
    check_config(where, kind.config_class, config)
    usual = kind.config_class()
    for name, value in config.items():  # its class says that all may be null, which its code does not take
        right = value is not None or not numbers_in(getattr(usual, name, None))
        require(right, f"{where} is damaged: it has null for {name}")
    with as_bad_input(f"{where} is damaged"), bounded(source), lora.quiet(), torch.device("meta"):
        built = kind(kind.config_class.from_dict(config))
    check_weights(source, part, built, about=True)
    if part == "image_encoder":
        check_pictures(source)


def check_pictures(source: str):
    """Are the numbers that pictures are made ready by ones?"""
    config = read_config(source, "feature_extractor/preprocessor_config.json")
    where = f"--model: {source}/feature_extractor/preprocessor_config.json is damaged: it has"
    for name, least in (("image_mean", -1000), ("image_std", 1e-3)):
        given = config.get(name, [0.5, 0.5, 0.5])
        right = len(numbers_in(given)) == 3 and given == [n for n in numbers_in(given) if least <= n <= 1000]
        require(right, f"{where} {str(given)[:60]} for {name}")
    factor = config.get("rescale_factor", 1 / 255)
    require(type(factor) in (int, float), f"{where} {factor!r} for rescale_factor")


def check_scheduler(source: str):
    """Is the scheduler's config one? The rest is seen when its steps are tabulated."""
    config = read_config(source, "scheduler/scheduler_config.json")
    name = config.get("_class_name")
    kind = getattr(diffusers, str(name), None)
    require(kind, f"--model: {source}: scheduler_config.json is of a {name}, which diffusers does not have")
    prediction = config.get("prediction_type", "epsilon")
    known = ("epsilon", "v_prediction", "sample", "flow_prediction")
    require(prediction in known, f"--model: {source}: scheduler_config.json has {prediction!r}")
    where = f"--model: {source}/scheduler/scheduler_config.json"
    check_config(where, kind, config)
    steps, betas = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    require(steps <= 1e5, f"{where} is damaged: it has {steps} for num_train_timesteps")
    require(not betas or len(betas) == steps, f"{where} is damaged: it has not {steps} trained_betas")
    with as_bad_input(f"{where} can't be used"):
        kind.from_config(config)
