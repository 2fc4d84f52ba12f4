"""What a checkpoint must be for a model: its pipeline, its networks, its scheduler."""

import difflib
import inspect
import itertools
import math
from pathlib import Path

import diffusers

import vader
from extras import lora
from rewards import as_bad_input, require
from vader import VideoModel, read_config

# What a model_index.json may hold. What else it holds changes what is computed.
PARTS = "_class_name _diffusers_version _name_or_path unet transformer vae scheduler tokenizer text_encoder"
PARTS += " image_encoder feature_extractor motion_adapter safety_checker requires_safety_checker"


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
    """Are the networks those that the family has code for?"""
    denoiser = read_config(source, f"{family.folder}/config.json")
    vae = read_config(source, "vae/config.json")
    for config, kind in ((denoiser, family.denoiser_class), (vae, family.vae_class)):
        name = config.get("_class_name")
        right = name == kind.__name__ or (config is denoiser and name in getattr(family, "also_loads", ()))
        require(right, f"--model: {source} has a {name}, there is code for {kind.__name__}")
    with as_bad_input(f"--model: {source}: a config.json is damaged"):
        channels = family.inputs * int(vae.get("latent_channels") or vae["z_dim"])
        scale = vae.get("scale_factor_spatial", family.scale)
        if family.scale == 8 and "block_out_channels" in vae:
            scale = 2 ** (len(vae["block_out_channels"]) - 1)
    built = lora.build_on_meta(family, source)
    require(built.config.in_channels == channels, f"--model: {source}: no code for other inputs than latents")
    require(scale == family.scale, f"--model: {source}: its VAE's scale is not {family.scale}")


def check_scheduler(source: str):
    """Is every number in the scheduler's config one? The rest is seen when its steps are tabulated."""
    config = read_config(source, "scheduler/scheduler_config.json")
    name = config.get("_class_name")
    kind = getattr(diffusers, str(name), None)
    require(kind, f"--model: {source}: scheduler_config.json is of a {name}, which diffusers does not have")
    prediction = config.get("prediction_type", "epsilon")
    known = ("epsilon", "v_prediction", "sample", "flow_prediction")
    require(prediction in known, f"--model: {source}: scheduler_config.json has {prediction!r}")
    for key, parameter in inspect.signature(kind).parameters.items():
        value = config.get(key, parameter.default)
        if type(parameter.default) in (int, float):
            number = type(value) in (int, float) and math.isfinite(value) and value >= 0
            require(number, f"--model: {source}: scheduler_config.json has {value!r} for {key}: get it again")
    steps = config.get("num_train_timesteps", 1000)
    require(steps >= 1, f"--model: {source}: scheduler_config.json has {steps} training timesteps")
