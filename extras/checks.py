"""The door: what is refused, in one line, before anything loads. Without extras/ nothing is checked."""

import dataclasses
import importlib.util
import inspect
import os
import tempfile
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch

import rewards
import vader
from extras import base_lora, checkpoint, holding, hub, lora, prompts, resume, tracker_login, watch
from rewards import BadInput, as_bad_input, require
from vader import Config, VideoModel

# Lowest and highest value where that is not 1 to 1e9 (whole numbers) or 0 to 1e9 (others).
RANGES = dict(seed=(0, 2**62), num_inference_steps=(1, 1000), guidance_scale=(1, 1e3), lr=(1e-12, 1e3))
RANGES |= dict(fps=(1, 240), eta=(0, 1), coupling=(0, 1), num_frames=(1, 1024), batch_size=(1, 1024))
RANGES |= dict(clips=(1, 100), eval_videos=(0, 1e5), lora_rank=(1, 1024), max_grad_norm=(1e-12, 1e9))
RANGES |= dict(height=(1, 4096), width=(1, 4096), lora_alpha=(1e-6, 1e6), lora_scale=(-10, 10))
RANGES |= dict(shift=(0.1, 100))
KINDS = {str: "a text", int: "a number, int", float: "a number", bool: "True or False"}
LIBRARIES = {"int8": "torchao", "nf4": "bitsandbytes"}  # of --quantize


def check_input(cfg: Config, reward=None):
    """All checks. reward: a function of one's own, in place of cfg.reward. Raises BadInput."""
    check_settings(cfg, reward)
    cfg = vader.resolve(cfg, reward)
    used = prompts.check_prompts(cfg)
    if cfg.mode != "train" or cfg.eval_videos:
        check_video(cfg)
    resume.check_out(cfg)
    resume.check_folder(cfg, used)


def enter(cfg: Config, reward=None):
    """Check all input of a training, then give the context that it is made in. Raises BadInput."""
    require(cfg.mode == "train", f"mode is {cfg.mode!r}: `train` does 'train' alone, `main` has the others")
    check_input(cfg, reward)
    return holding.hold_run(vader.resolve(cfg, reward))


def check_settings(cfg: Config, reward=None):
    """What needs no file of prompts and no output folder."""
    check_values(cfg)
    only_uses = cfg.mode in ("sample", "eval")
    require(not (only_uses and cfg.eval_prompts), "--eval_prompts is for training: give --prompts")
    if cfg.device != "auto":
        check_device(cfg.device)
    if cfg.model != "auto":
        checkpoint.check_model(cfg.model)
    full = vader.resolve(dataclasses.replace(cfg, lora=None), reward)
    family, source, _ = vader.find_model(full.model)
    checkpoint.check_networks(family, source)
    check_loras(cfg, full, family, source)
    cfg = vader.resolve(cfg, reward)
    model = vader.make_model(cfg)
    check_sizes(cfg, type(model))
    checkpoint.check_scheduler(source)
    model.schedule(cfg)  # refuses a sampler that is no line
    check_libraries(cfg)
    if cfg.push_to_hub:
        hub.check_hub(cfg)
    scaled = only_uses and cfg.lora
    require(scaled or cfg.lora_scale == 1, "--lora_scale is of --lora, for --mode sample and eval")
    check_reward(cfg, reward)
    watch.check_watch(cfg, reward)


def check_values(cfg: Config):
    """Types, choices and ranges of single settings."""
    for name, hint in get_type_hints(Config).items():
        value = getattr(cfg, name)
        options = get_args(hint) or (hint,)
        if get_origin(hint) is Literal:
            require(value in options, f"--{name} {value}: give one of {', '.join(options)}")
            continue
        require(value != "" or name == "negative_prompt", f"--{name} is empty: give a value, or leave it out")
        options += (int,) if float in options else ()
        right = isinstance(value, options) and (type(value) is not bool or bool in options)
        require(right, f"{name} is {value!r}: give {KINDS[options[0]]}")
        if isinstance(value, str) and name not in ("reward", "negative_prompt"):
            require(not value.startswith("~"), f"--{name} {value}: there is no such home folder")
            longest = max(len(os.fsencode(part)) for part in value.split("/"))
            require(longest < 256, f"--{name} {value[:40]}...: no file has so long a name")
        if type(value) in (int, float):
            low, high = RANGES.get(name, (0 if float in options else 1, 1e9))
            require(low <= value <= high, f"--{name} {value:g}: must be from {low:g} to {high:g}")


def check_device(device: str):
    require(device.split(":")[0] in ("cpu", "cuda", "mps"), f"--device {device}: give cpu, cuda, cuda:1, mps")
    with as_bad_input(f"--device {device}: no usable one here, leave the flag out"):
        torch.empty(0, device=device)


def check_loras(cfg: Config, full: Config, family: type[VideoModel], source: str):
    """Do --lora, --base_lora and --lora_targets fit the denoiser?"""
    if full.base_lora:
        base_lora.check_base(full.base_lora, family, source)
    if cfg.lora:
        lora.check_lora(cfg, lora.build_on_meta(family, source))
        base_lora.warn_of_other_base(lora.find_folder(cfg.lora), full.base_lora)
        if cfg.mode == "train":
            print(f"base: {cfg.lora}, which training begins from, and gains are counted from")
    elif cfg.lora_targets:
        lora.check_targets(cfg.lora_targets, lora.build_on_meta(family, source))


def check_sizes(cfg: Config, family: type[VideoModel]):
    K, T, frames = cfg.backprop_steps, cfg.num_inference_steps, cfg.num_frames
    require(K <= T, f"--backprop_steps {K}: there are only {T} denoising steps, use {T} or less")
    scored = cfg.decode_frames or 1
    require(scored <= frames, f"--decode_frames {scored}: the video has only {frames} frames")
    side, group = family.multiple, family.frame_multiple
    fits = cfg.height % side == 0 and cfg.width % side == 0
    require(fits, f"--height and --width must be multiples of {side}")
    require((frames - 1) % group == 0, f"--num_frames {frames}: must be 1 more than a multiple of {group}")
    require(cfg.eta == 0 or family.stochastic, "--eta adds noise in DDIM; this model has another sampler")
    require(cfg.shift is None or hasattr(family, "shift"), "--shift is for Wan: leave it out")
    guided = cfg.guidance_scale != 1 and family.images != "must"
    require(guided or not cfg.negative_prompt, "--negative_prompt: there is no guidance by text here")


def check_video(cfg: Config):
    """Can videos be written? One of a single frame is tried."""
    advice = "pip install imageio[ffmpeg], and unset IMAGEIO_FFMPEG_EXE"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "frame.mp4"
        try:
            with as_bad_input("ffmpeg is not there"):
                vader.write_video(file, torch.zeros(1, 3, 16, 16), cfg.fps)
                require(b"moov" in file.read_bytes(), "ffmpeg wrote no whole video, and did not say so")
        except BadInput as error:
            raise BadInput(f"no video can be written: {advice} ({error})") from None


def check_libraries(cfg: Config):
    cuda = cfg.device.startswith("cuda")
    require(cuda or cfg.dtype != "fp16", f"--dtype fp16 is for GPUs: on {cfg.device}, leave the flag out")
    for flag in ("quantize", "tracker"):
        choice = getattr(cfg, flag)
        library = LIBRARIES.get(choice, choice)
        ready = choice == "none" or importlib.util.find_spec(library)
        require(ready, f"--{flag} {choice} is not installed: pip install {library}")
    tracker_login.check_tracker(cfg)
    require(cuda or cfg.quantize != "nf4", "--quantize nf4 is for CUDA GPUs: take int8")


def check_reward(cfg: Config, reward=None):
    if reward:
        try:
            inspect.signature(reward).bind("frames", "prompts")
        except (TypeError, ValueError):
            raise BadInput("your reward must be a function (frames, prompts)") from None
        return
    names, terms = [], []
    for weight, name, arg in rewards.parse(cfg.reward):
        require((name, arg) not in terms, f"{name} stands twice in --reward: weigh it once")
        require(abs(weight) <= 1e9, f"the weight of {name} in --reward: give one from -1e9 to 1e9")
        terms.append((name, arg))
        if weight:
            names.append(name)
    require(names, f"--reward {cfg.reward}: all weights are 0, give one another")
    large = min(cfg.height, cfg.width) >= 16 or "compressible" not in names
    require(large, "--reward compressible needs frames of 16 x 16 pixels: raise --height or --width")
    names += [name for name, _ in watch.judges_of(cfg)]
    require("ask" in names or not cfg.vlm, "--vlm is for the reward ask: leave it out")
    if cfg.reward_weights:
        folders = [name for name in rewards.REWARDS if Path(cfg.reward_weights, name).is_dir()]
        require(folders, f"--reward_weights {cfg.reward_weights}: no reward's folder there")


def try_rewards(run: vader.Run, texts: list[str]):
    """Score noise: a reward that can't, or has no gradient, is known before anything large loads."""
    cfg = run.cfg
    if run.terms and "rewards" in vader.find_model(cfg.model)[2]:
        print("rewards: those of the tiny world, a toy; not comparable with published rewards' scores")
    train = cfg.mode == "train"
    for name, (_, reward) in run.terms.items():
        require(callable(reward), f"what makes {name!r} returned {reward!r}: it must return the reward")
    frames = cfg.num_frames
    if train:
        picks = vader.pick_latent_frames(run, vader.generator_for(0))
        frames = sum(run.model.latent_frame(n) in picks for n in range(cfg.num_frames))
    first = texts[: cfg.batch_size]
    noise = torch.rand(len(first), frames, 3, cfg.height, cfg.width).to(cfg.device).requires_grad_(train)
    found = rewards.weighted_rewards(run.terms, noise, first, cfg.decode_chunk, 1.0 if train else None)
    if train:
        require(noise.grad is not None, f"{cfg.reward}: its gradient does not reach the frames")
        require(found["reward"].isfinite().all(), f"{cfg.reward}: its value on noise is not finite: mend it")
        require(noise.grad.isfinite().all(), f"{cfg.reward}: its gradient on noise is not finite: mend it")
    prompts.warn_of_prompts_cut_by_rewards(run, texts)
    if run.judges:
        video = torch.rand(len(first), cfg.num_frames, 3, cfg.height, cfg.width)
        watch.score_judges(run, video.to(cfg.device), first)
