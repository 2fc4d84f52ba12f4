# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.5",
#     "torchvision>=0.20",
#     "diffusers>=0.42",
#     "transformers>=5.0",
#     "peft>=0.21",
#     "open_clip_torch>=2.24",
#     "imageio[ffmpeg]>=2.31",
#     "numpy>=1.26",
#     "sentencepiece>=0.2",
#     "protobuf>=4",
# ]
# ///
"""VADER: align a video diffusion model with a differentiable reward (Prabhudesai et al., arXiv 2407.08737).

    python vader.py --reward aesthetic --prompts prompts.txt                         # train
    python vader.py --mode sample --lora runs/aesthetic-tiny/lora                    # make videos
    python vader.py --mode eval --lora runs/aesthetic-tiny/lora --reward colorful    # score base and tuned

The method: make a video from noise without gradient, keeping every step's latents. Score some frames and pull
the gradient through the reward and the VAE to the last latents. Walk the sampler back over the last K steps,
one denoiser call at a time. Every sampler here is affine, so its backward is two multiplications a step. The
graph is cut at frames, latents and steps: peak memory is that of the largest piece, whatever K is.

    x, latents[i]   x_t of the paper, (B, C, F, H, W)   a, b, c   x[i+1] = a[i] x[i] + b[i] f(c[i] x[i], t[i])
    f, denoise      epsilon_theta or v_theta            p, q      predicted clean latents: p[i] x[i] + q[i] f
    g               d loss / d x, walked backwards      s         noise added per step, when eta > 0
    v               d loss / d frames                   w         classifier-free guidance scale
    K, T            trained steps, sampling steps

Contents (search for "# ----"): 1 config and command line, 2 prompts and randomness, 3 schedule, 4 the
model, 5 LoRA, 6 rollout, score, walk back, 7 files and resume, 8 loading, evaluation, page, 9 training, 10
sampling, scoring, main. That is the trainer, for the paper's model. Two appendices: 11 more models, 12 memory
plan (--plan). Rewards and `checkpoint_blocks`, which they use too, are in rewards.py. What people change is
marked "SWAP:". The loss is minus the reward, for every reward; the paper's per-reward loss forms are left
out.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import gc
import hashlib
import html
import importlib.util
import inspect
import json
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import time
import typing
import weakref
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal
from unittest import mock

import diffusers
import imageio.v3 as iio
import numpy as np
import peft
import psutil
import torch
import torch.distributed as dist
import transformers
from huggingface_hub import errors as hub
from huggingface_hub import hf_hub_download
from peft.tuners.lora import LoraLayer
from PIL import Image, UnidentifiedImageError
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

import rewards
from rewards import CLIP_MEAN, CLIP_STD, BadReward, checkpoint_blocks, make_terms, parse

HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()


class BadInput(ValueError):
    """A setting or file that can't be used; its message is one line that says what to do."""


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIGS = HERE / "configs"  # of the models and rewards, without weights: for --plan


# ---- 1. Config and command line ----------------------------------------------------------------------------

Count = Annotated[int, (1, math.inf)]
Positive = Annotated[float, (1e-12, math.inf)]
NotNegative = Annotated[float, (0, math.inf)]
Share = Annotated[float, (0, 1)]


@dataclass
class Config:
    """Everything that can be set. None is off, or the model's own default (`PRESETS`)."""

    # what to do
    reward: str = "aesthetic"  # a reward of rewards.py or a weighted sum, "aesthetic + 0.5*colorful"
    prompts: str = "prompts.txt"  # a text file, one a line (not lines with #), or .jsonl with an image each
    model: str = "auto"  # auto (modelscope on a CUDA GPU, else tiny), a name of PRESETS, a hub id, a folder
    mode: Literal["train", "sample", "eval"] = "train"  # sample writes videos, eval scores base and tuned
    lora: str | None = None  # folder of a trained LoRA: for sample and eval, or where train starts from
    out: str | None = None  # output folder; default runs/<reward>-<model>, runs/<mode>-<reward>-<model>
    resume: bool = False  # go on with the run in --out, with the same settings (how long may change)
    seed: Annotated[int, (0, math.inf)] = 0  # the same seed gives bitwise the same run on a CPU
    plan: bool = False  # only predict the peak memory of an update, without GPU, weights or network
    vram: Positive | None = None  # with --plan: gigabytes there are; exit code 1 when they do not suffice
    # the video and its sampler
    num_frames: Count | None = None  # frames of a video
    height: Count | None = None  # pixels, a multiple of 8, 16 or 32, as the model's
    width: Count | None = None  # pixels, likewise
    num_inference_steps: Annotated[int, (1, 1000)] | None = None  # denoising steps; cost time, not memory
    guidance_scale: Annotated[float, (1, math.inf)] | None = None  # classifier-free; 1 is off, half the time
    eta: Share = 0.0  # share of noise added at each DDIM step; 0 is deterministic
    timestep_spacing: Literal["trailing", "leading", "linspace"] = "trailing"  # leading: hardly any leverage
    # the gradient
    backprop_steps: Count = 1  # K, denoising steps that get a gradient; costs time, not memory
    grad_steps: Literal["last", "spread", "random", "strongest"] | None = None  # last; for svd, wan strongest
    coupling: Share = 1.0  # share of the gradient through a step's input; 1 is exact, K = 1 ignores it
    detach_uncond: bool = False  # no gradient through the unconditional branch; half the walk back's time
    decode_frames: Count | None = None  # frames decoded and scored per update; default what the reward wants
    decode_chunk: Count = 1  # frames decoded at once; costs memory
    checkpointing: bool | None = None  # recompute activations: less memory, more time; default on a GPU
    offload: bool = False  # what is idle in a phase waits in host memory: less memory, more time (printed)
    # the objective
    reward_target: float | None = None  # hinge: a video whose reward is above this gets no gradient
    kl_weight: NotNegative = 0.0  # pull to the base model: weight of the squared change of its output
    reward_weights: str | None = None  # folder with one sub-folder per reward, not the published weights
    # the optimiser
    steps: Count | None = None  # updates
    lr: Positive | None = None  # learning rate of AdamW, constant
    batch_size: Count | None = None  # videos made at once; costs memory
    grad_accum: Count | None = None  # batches per update; costs time
    max_grad_norm: Positive = 1.0  # longer gradients are shortened to this
    weight_decay: NotNegative = 0.01  # of AdamW
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit needs bitsandbytes
    ema_decay: Share | None = None  # evaluate and save the LoRA averaged over updates, e.g. 0.99
    # LoRA
    lora_rank: Count | None = None  # rank of each adapter
    lora_alpha: Count | None = None  # adapters are scaled by alpha / rank; default alpha = rank
    lora_targets: str = "to_q,to_k,to_v,to_out.0"  # which linear layers, by the end of their names
    # evaluation, files, machine
    eval_prompts: str | None = None  # prompt file; default every tenth of --prompts, held back from training
    eval_every: Count | None = None  # updates between evaluations; one more before, one after
    eval_videos: Count = 16  # videos per evaluation, each time the same prompts and seeds
    save_every: Count = 1  # updates between checkpoints
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto is cuda where there is one
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 if the GPU can, else fp16; CPU fp32


# SWAP: your model's defaults, where the config says None. Other models take those of their family's `preset`.
PRESET_FIELDS = ("source", "num_frames", "height", "width", "num_inference_steps", "guidance_scale")
PRESET_FIELDS += ("steps", "eval_every", "lr", "batch_size", "grad_accum", "lora_rank")
SD15, SVD = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-video-diffusion-img2vid"
PRESETS = {
    "tiny": (str(HERE / "tiny" / "t2v"), 8, 64, 64, 10, 4.0, 50, 25, 1e-3, 2, 1, 8),
    "tiny-i2v": (str(HERE / "tiny" / "i2v"), 8, 64, 64, 10, 2.0, 50, 25, 1e-3, 2, 1, 8),
    "tiny-wan": (str(HERE / "tiny" / "wan"), 9, 64, 64, 10, 3.0, 50, 25, 1e-3, 2, 1, 8),
    "modelscope": ("ali-vilab/text-to-video-ms-1.7b", 16, 256, 256, 25, 9.0, 200, 50, 2e-4, 1, 4, 16),
    "zeroscope": ("cerspense/zeroscope_v2_576w", 24, 320, 576, 25, 9.0, 200, 50, 2e-4, 1, 4, 16),
    "animatediff": (SD15, 16, 512, 512, 25, 7.5, 200, 50, 2e-4, 1, 4, 16),
    "svd": (SVD, 14, 576, 1024, 25, 3.0, 200, 50, 2e-4, 1, 4, 16),
    "cogvideox": ("zai-org/CogVideoX-2b", 49, 480, 720, 30, 6.0, 200, 50, 1e-4, 1, 4, 16),
    "ltx": ("Lightricks/LTX-Video", 49, 512, 704, 30, 3.0, 200, 50, 1e-4, 1, 4, 16),
    "wan": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 81, 480, 832, 30, 5.0, 200, 50, 1e-4, 1, 4, 16),
}
TINY = ("tiny", "tiny-i2v", "tiny-wan")  # in this repository, with toy rewards


def need(ok, message: str):
    """Raise BadInput(message) unless ok."""
    if not ok:
        raise BadInput(message)


def nearest(word: str, words) -> str:
    return difflib.get_close_matches(word, list(words), n=1, cutoff=0)[0]


def field_type(name: str) -> tuple[type, tuple, tuple]:
    """Type, allowed values (empty: any) and lowest and highest value (empty: any) of a Config field."""
    hint = typing.get_type_hints(Config, include_extras=True)[name]
    if type(None) in typing.get_args(hint):
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is Literal:
        return str, typing.get_args(hint), ()
    if typing.get_origin(hint) is Annotated:
        return hint.__origin__, (), hint.__metadata__[0]
    return hint, (), ()


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message}; see --help")


def parse_args(argv=None) -> Config:
    """The command line as a Config: a flag per field, its comment is the help. Raises BadInput."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), flags=re.M))
    parser = Parser(prog="vader.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    for field in dataclasses.fields(Config):
        kind, choices, _ = field_type(field.name)
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "metavar": "X"}
        text = " or ".join(choices) + ("; " if choices else "") + f"{comments[field.name]} [{field.default}]"
        parser.add_argument(f"--{field.name}", default=field.default, help=text.replace("%", "%%"), **how)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = nearest(unknown[0].split("=")[0], [f"--{field.name}" for field in dataclasses.fields(Config)])
        raise BadInput(f"unknown argument {unknown[0]!r}: did you mean {flag!r}?")
    return Config(**vars(known))


def model_file(model: str, name: str) -> Path:
    """Path of one file of a model that is a folder or a hub id (then it is downloaded). Raises BadInput."""
    if Path(model).is_dir():
        need((Path(model) / name).is_file(), f"{model} is not a diffusers pipeline: it has no {name}")
        return Path(model) / name
    try:
        return Path(hf_hub_download(model, name))
    except (hub.RepositoryNotFoundError, hub.HFValidationError, hub.RemoteEntryNotFoundError):
        problem = f"no pipeline {model!r} on the hub and no such folder: check the spelling of --model"
    except (hub.HfHubHTTPError, OSError):
        problem = f"can't reach the hub for {model!r}: check the network, or take --model tiny, needing none"
    raise BadInput(problem)


def read_config(model: str, name: str) -> dict:
    """A json file of a model. Raises BadInput."""
    try:
        return json.loads(model_file(model, name).read_text())
    except json.JSONDecodeError:
        raise BadInput(f"{model}: {name} is not valid json; download the model again") from None


def resolve(cfg: Config, reward=None) -> tuple[Config, str, type]:
    """Check all that can be checked before a model loads; fill in what is None from the model's preset.

    Returns the full config, where the model loads from, its family. Raises BadInput or rewards.BadReward.
    """
    check_fields(cfg)
    cuda = torch.cuda.is_available()
    need(cuda or cfg.device != "cuda", "--device cuda: no usable CUDA GPU here; leave the flag out")
    device = ("cuda" if cuda else "cpu") if cfg.device == "auto" else cfg.device
    model = ("modelscope" if device == "cuda" else "tiny") if cfg.model == "auto" else cfg.model
    if model not in PRESETS and not Path(model).is_dir() and "/" not in model:
        near = nearest(model, PRESETS)
        raise BadInput(f"unknown model {model!r}: did you mean {near!r}? A hub id or a folder will do too")
    source = PRESETS[model][0] if model in PRESETS else model
    if cfg.plan and (CONFIGS / model).is_dir():
        source = str(CONFIGS / model)
    pipeline = read_config(source, "model_index.json").get("_class_name")
    need(pipeline in FAMILIES, f"{source} is a {pipeline}; there is code for: {', '.join(FAMILIES)}")
    family = FAMILIES[pipeline]
    preset = dict(zip(PRESET_FIELDS[1:], PRESETS.get(model, PRESETS[family.preset])[1:], strict=True))
    if model not in PRESETS:
        preset |= family.native_size(source)
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    preset["dtype"] = "fp32" if device == "cpu" else "bf16" if bf16 else "fp16"
    # "remove:book + 0.5*hps" becomes the folder name remove-book-0.5-hps
    label = getattr(reward, "__name__", "custom") if reward else cfg.reward
    label = re.sub(r"[^\w.]+", "-", f"{label}-{Path(model).name if '/' in model else model}").strip("-")
    preset["out"] = f"runs/{label}" if cfg.mode == "train" else f"runs/{cfg.mode}-{label}"
    preset["checkpointing"], preset["grad_steps"] = device == "cuda", family.grad_steps
    preset["lora_alpha"] = cfg.lora_rank or preset["lora_rank"]
    preset["reward_weights"] = str(HERE / "tiny" / "rewards") if model in TINY else None
    unset = {name: value for name, value in preset.items() if getattr(cfg, name) in (None, "auto")}
    cfg = dataclasses.replace(cfg, **unset | {"model": model, "device": device})

    K, T = cfg.backprop_steps, cfg.num_inference_steps
    need(K <= T, f"--backprop_steps {K}: there are only {T} denoising steps, use {T} or less")
    frames = cfg.decode_frames or 1
    need(frames <= cfg.num_frames, f"--decode_frames {frames}: the video has only {cfg.num_frames} frames")
    side, time = family.multiple, family.frame_multiple
    need(cfg.height % side == cfg.width % side == 0, f"--height and --width must be multiples of {side}")
    good = (cfg.num_frames - 1) % time == 0
    need(good, f"--num_frames {cfg.num_frames}: this model makes 1 more than a multiple of {time} frames")
    need(cfg.eta == 0 or family.stochastic, "--eta adds noise in DDIM; this model has another sampler: eta 0")
    has_8bit = importlib.util.find_spec("bitsandbytes") or cfg.optimizer != "adamw8bit"
    need(has_8bit, "--optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes")
    need(cfg.lora or cfg.mode == "train", f"--mode {cfg.mode} needs --lora: a training run's lora folder")
    if reward is None:
        parse(cfg.reward)
    skeleton = family.skeleton(source)  # also says so if there is no code for it
    if cfg.lora:
        check_lora(cfg.lora, skeleton)
    return cfg, source, family


def check_fields(cfg: Config):
    """Raises BadInput for a value that its field does not allow."""
    for field in dataclasses.fields(Config):
        value = getattr(cfg, field.name)
        _, choices, limits = field_type(field.name)
        if choices and value not in (field.default, *choices):
            raise BadInput(f"--{field.name} {value}: did you mean {nearest(value, choices)!r}?")
        if limits and value is not None and not limits[0] <= value <= limits[1]:
            raise BadInput(f"--{field.name} {value}: must be from {limits[0]:g} to {limits[1]:g}")


def check_lora(folder: str, skeleton: torch.nn.Module):
    """Raises BadInput unless `folder` holds a PEFT LoRA whose every matrix fits a layer of the denoiser."""
    weights = Path(folder) / "adapter_model.safetensors"
    found = weights.is_file() and (Path(folder) / "adapter_config.json").is_file()
    need(found, f"--lora {folder}: no adapter_config.json and {weights.name} there; give a run's lora folder")
    layers = dict(skeleton.named_modules())
    with safe_open(weights, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            path, _, matrix = key.removeprefix("base_model.model.").rpartition(".lora_")
            side = 1 if matrix == "A.weight" else 0
            fits = path in layers and layers[path].weight.shape[side] == file.get_slice(key).get_shape()[side]
            need(fits, f"--lora {folder} was made for another model ({path} differs): give that --model")


# ---- 2. Prompts and randomness -----------------------------------------------------------------------------


def generator_for(*key) -> torch.Generator:
    """A CPU generator seeded by a hash of the key: any draw can be made again without saved state."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Prompt(str):
    """A prompt with the file of the image that its video starts from; to a reward it is its text."""

    image: str | None = None


def cond_key(prompt: str) -> tuple:
    """What tells one prompt's conditioning from another's: text and image."""
    return str(prompt), getattr(prompt, "image", None)


def read_image(path: str, height=None, width=None):
    """An image file as (3, H, W) float32 in [0, 1], resized if a size is given."""
    picture = Image.open(path).convert("RGB")
    if height:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


# SWAP: your prompts.
def read_prompts(path: str, images=False) -> list[str]:
    """The prompts of a text file, one a line, or of a .jsonl file of {"prompt": ..., "image": ...} lines.

    Image paths are relative to the file. images: the model needs one each. Raises BadInput when the file is
    missing, empty, not text or not json, or an image is missing or can't be read.
    """
    need(Path(path).is_file(), f"no prompt file {path}: give --prompts a text file, one prompt a line")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        text = "\0"
    need("\0" not in text, f"{path} is not a text file: give one prompt a line, in UTF-8")
    lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1)]
    lines = [(n, line) for n, line in lines if line and not line.startswith("#")]
    need(lines, f"{path} holds no prompts: write one a line")
    if Path(path).suffix == ".jsonl":
        return [image_prompt(path, n, line) for n, line in lines]
    wanted = '{"prompt": "...", "image": "file.png"}'
    need(not images, f"this model starts from an image: give --prompts a .jsonl file, one {wanted} a line")
    return [line for _, line in lines]


def image_prompt(path: str, number: int, line: str) -> Prompt:
    """One line of a .jsonl prompt file. Raises BadInput."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    good = isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("image"), str)
    need(good, f'{path}, line {number}: write {{"prompt": "...", "image": "file.png"}}')
    prompt = Prompt(row["prompt"])
    prompt.image = str(Path(path).parent / row["image"])
    need(Path(prompt.image).is_file(), f"{path}, line {number}: no image {prompt.image}")
    try:
        read_image(prompt.image)
    except (UnidentifiedImageError, OSError):
        raise BadInput(f"{path}, line {number}: {prompt.image} can't be read as an image") from None
    return prompt


def split_prompts(cfg: Config, images=False) -> tuple[list[str], list[str]]:
    """Prompts to train on, and held-out ones: --eval_prompts, else every tenth of --prompts."""
    prompts = read_prompts(cfg.prompts, images)
    if cfg.eval_prompts:
        return prompts, read_prompts(cfg.eval_prompts, images)
    need(len(prompts) > 1, f"{cfg.prompts} has one prompt and one is held back: add more, or --eval_prompts")
    every = min(10, len(prompts))
    return [p for i, p in enumerate(prompts, 1) if i % every], prompts[every - 1 :: every]


def batch_prompts(prompts: list[str], cfg: Config, batch: int) -> list[str]:
    """The prompts of the run's batch number `batch`: the file again and again, each time in a new order."""
    chosen = []
    for place in range(batch * cfg.batch_size, (batch + 1) * cfg.batch_size):
        shuffle = generator_for(cfg.seed, "order", place // len(prompts))
        order = torch.randperm(len(prompts), generator=shuffle)
        chosen.append(prompts[order[place % len(prompts)]])
    return chosen


def pick_frames(cfg: Config, terms: dict, generator, time=1) -> list[int]:
    """Latent frames to decode and score: random ones, or those of an evenly spaced clip if one is wanted.

    time: frames in a latent frame; the first latent frame holds one.
    """
    wants = [getattr(reward, "frames", 1) for _, reward in terms.values()]
    wanted = max(cfg.num_frames if n == "all" else n for n in wants)
    n = min(cfg.decode_frames or wanted, cfg.num_frames)
    if wanted > 1:
        frames = torch.linspace(0, cfg.num_frames - 1, n).round().long()
        return sorted({(frame + time - 1) // time for frame in frames.tolist()})
    return sorted(torch.randperm((cfg.num_frames - 1) // time + 1, generator=generator)[:n].tolist())


def collate(conds: dict, prompts: list[str]) -> tuple[dict, dict]:
    """Conditioning of a batch of prompts with and without their text: every entry gets a batch dimension.

    What the empty prompt's has not, an image that both guidance branches are given, comes from the prompt's.
    """
    rows = [conds[cond_key(prompt)] for prompt in prompts]
    cond = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    empty = {name: value.expand(len(rows), *value.shape) for name, value in conds[cond_key("")].items()}
    return cond, cond | empty


# ---- 3. Schedule -------------------------------------------------------------------------------------------


@dataclass
class Schedule:
    """A first-order sampler as tables, one entry per step.

    x[i+1] = a x[i] + b f + s noise, with f = denoise(c x[i], t); predicted clean latents: p x[i] + q f.
    t: (T,), int64, or float32 where the model wants that; a, b, c, p, q, s: (T,) float64, no unit.
    start: scale of the first noise.
    """

    t: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    p: torch.Tensor
    q: torch.Tensor
    s: torch.Tensor
    start: float = 1.0

    def __len__(self):
        return len(self.t)

    def leverage(self, i: int) -> float:
        """How far the result moves per unit of step i's output: |b[i]| times every a after it."""
        return abs(float(self.b[i] * self.a[i + 1 :].prod()))


def ddim_schedule(
    config: dict, num_inference_steps, eta=0.0, spacing="trailing", kind=diffusers.DDIMScheduler
):
    """DDIM (Song et al. 2021, eq. 12 and 16) on noise or v prediction (Salimans & Ho 2022, app. D).

    config: a scheduler_config.json; kind: the diffusers class with the noise levels. Returns a Schedule.
    Raises BadInput when it is not affine or predicts something else.
    """
    clips = config.get("clip_sample", True) or config.get("thresholding", False)
    need(not clips, "this scheduler clips its predictions, so it is not affine: set clip_sample to false")
    scheduler = kind.from_config(config, timestep_spacing=spacing)
    scheduler.set_timesteps(num_inference_steps)
    t, alphas = scheduler.timesteps, scheduler.alphas_cumprod.double()
    before = t - scheduler.config.num_train_timesteps // num_inference_steps
    now = alphas[t]
    then = torch.where(before >= 0, alphas[before.clamp(min=0)], scheduler.final_alpha_cumprod.double())
    s = eta * ((1 - then) / (1 - now) * (1 - now / then)).clamp(min=0).sqrt()
    alpha, sigma = now.sqrt(), (1 - now).sqrt()
    target = scheduler.config.prediction_type
    known = target in ("epsilon", "v_prediction")
    need(known, f"this model predicts {target}; DDIM here: epsilon, v_prediction")
    # x0 = p x + q f and noise = noise_x x + noise_f f
    if target == "epsilon":
        p, q, noise_x, noise_f = 1 / alpha, -sigma / alpha, torch.zeros_like(now), torch.ones_like(now)
    else:
        p, q, noise_x, noise_f = alpha, -sigma, sigma, alpha
    towards = (1 - then - s**2).clamp(min=0).sqrt()
    a, b = then.sqrt() * p + towards * noise_x, then.sqrt() * q + towards * noise_f
    return Schedule(t=t, a=a, b=b, c=torch.ones_like(now), p=p, q=q, s=s)


# ---- 4. The model ------------------------------------------------------------------------------------------


def straight_through_clamp(x):
    """Clamp to [0, 1] with the gradient of the identity: an over-bright pixel can still be told to darken."""
    return x + (x.clamp(0, 1) - x).detach()


@torch.no_grad()
def encode_text(model, kind: type, prompts: list[str], length=None, masked=False) -> dict[tuple, tuple]:
    """{`cond_key`: text states (length, D), token mask (length,)}. Loads the text encoder, and frees it.

    kind: the encoder's class; length: in tokens, the tokenizer's own if None; masked: padding is not seen.
    """
    name = read_config(model.source, "model_index.json")["tokenizer"][1]
    tokenizer = getattr(transformers, name).from_pretrained(model.source, subfolder="tokenizer")
    encoder = kind.from_pretrained(model.source, subfolder="text_encoder", dtype=model.dtype)
    encoder.to(model.device).eval()
    how, found = dict(padding="max_length", truncation=True, return_tensors="pt"), {}
    for prompt in prompts:
        tokens = tokenizer(str(prompt), max_length=length, **how).to(model.device)
        mask = tokens.attention_mask
        states = encoder(tokens.input_ids, attention_mask=mask if masked else None)[0]
        found[cond_key(prompt)] = states[0], mask[0].bool()
    return found


# SWAP: your model. A family is these members, listed in FAMILIES by the _class_name of its model_index.json.
class TextToVideoUNet:
    """ModelScope, ZeroScope, tiny: UNet3DConditionModel, AutoencoderKL, a CLIP text encoder, DDIM."""

    preset = "modelscope"  # whose defaults other models of this family take
    denoiser_class, folder = diffusers.UNet3DConditionModel, "unet"
    vae_class = diffusers.AutoencoderKL
    # blocks whose activations are recomputed, in the denoiser and in the VAE
    checkpointed = ("ResnetBlock2D", "Transformer2DModel", "TransformerTemporalModel", "TemporalConvLayer")
    vae_checkpointed = ("ResnetBlock2D",)
    pipeline = None  # the stock class, where it has load_lora_weights
    multiple, frame_multiple = 8, 1  # of height and width; of the number of frames less one
    scale, time = 8, 1  # pixels in a latent pixel, frames in a latent frame (but the first, which holds one)
    stochastic = True  # the sampler takes --eta
    grad_steps = "last"  # the default of that setting
    images = "no"  # is the video made from an image: no, may, must

    def __init__(self, source: str, device: str, dtype: torch.dtype):
        self.source, self.device, self.dtype = source, device, dtype
        self.denoiser = self.vae = None

    @classmethod
    def skeleton(cls, source) -> torch.nn.Module:
        """The denoiser without its weights, to check names and shapes."""
        with torch.device("meta"):
            return cls.denoiser_class.from_config(read_config(source, f"{cls.folder}/config.json"))

    @classmethod
    def native_size(cls, source) -> dict[str, int]:
        """Height and width in pixels that the model was made for, where its files say so."""
        size = read_config(source, f"{cls.folder}/config.json").get("sample_size")
        if not size:
            return {}
        height, width = (size, size) if isinstance(size, int) else size
        return {"height": 8 * height, "width": 8 * width}

    def schedule(self, cfg: Config) -> Schedule:
        config = read_config(self.source, "scheduler/scheduler_config.json")
        return ddim_schedule(config, cfg.num_inference_steps, cfg.eta, cfg.timestep_spacing)

    def encode(self, prompts: list[str], cfg: Config) -> dict[tuple, dict]:
        """{`cond_key`: conditioning, without batch dimension}. Loads the encoders, and frees them."""
        found = encode_text(self, transformers.CLIPTextModel, prompts)
        return {key: {"encoder_hidden_states": states} for key, (states, _) in found.items()}

    def load(self):
        """Load the denoiser and the VAE, frozen, without dropout (recomputing must give the same numbers)."""
        self.denoiser = self.load_denoiser()
        self.vae = self.vae_class.from_pretrained(self.source, subfolder="vae", dtype=self.dtype)
        for part in (self.denoiser, self.vae):
            part.to(self.device).eval().requires_grad_(False)

    def load_denoiser(self):
        return self.denoiser_class.from_pretrained(self.source, subfolder=self.folder, dtype=self.dtype)

    def recompute(self):
        """Recompute activations in the backward pass, block by block."""
        checkpoint_blocks(self.denoiser, self.checkpointed)
        checkpoint_blocks(self.vae, self.vae_checkpointed)

    def latent_shape(self, cfg: Config) -> tuple[int, ...]:
        """(C, F, H, W) of one video's latents."""
        vae = read_config(self.source, "vae/config.json")
        frames = 1 + (cfg.num_frames - 1) // self.time
        size = (frames, cfg.height // self.scale, cfg.width // self.scale)
        return (vae.get("latent_channels") or vae["z_dim"], *size)

    def guidance(self, scale: float, frames: int):
        """Classifier-free guidance scale: a number, or (F, 1, 1) for latents (B, C, F, H, W)."""
        return scale

    def denoise(self, x, t, cond):
        """x: (B, C, F, H, W) float32, t: (), cond: dict of (B, ...) -> f: (B, C, F, H, W) float32."""
        t = t.to(self.device).expand(len(x))
        return self.denoiser(x.to(self.dtype), timestep=t, **cond, return_dict=False)[0].float()

    def decode(self, latents, picks):
        """latents: (B, C, F, H, W) float32, picks: sorted indices of F -> (B, N, 3, H, W) float32 in [0, 1].

        N frames: as many as picks, or where a latent frame holds several, all of those picked.
        """
        picked = latents[:, :, picks].transpose(1, 2).flatten(0, 1) / self.vae.config.scaling_factor
        pictures = self.vae.decode(picked.to(self.dtype), return_dict=False)[0].float()
        return straight_through_clamp(pictures / 2 + 0.5).unflatten(0, (-1, len(picks)))


FAMILIES = {"TextToVideoSDPipeline": TextToVideoUNet}  # those of section 11 join them


# ---- 5. LoRA -----------------------------------------------------------------------------------------------


def add_lora(model, cfg: Config):
    """Put float32 low-rank adapters (Hu et al. 2021) on the frozen denoiser: new ones, or those in --lora."""
    if cfg.lora:
        model.denoiser = peft.PeftModel.from_pretrained(model.denoiser, cfg.lora, is_trainable=True)
        return
    torch.manual_seed(cfg.seed)
    targets = [name.strip() for name in cfg.lora_targets.split(",")]
    config = peft.LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules=targets)
    found = [n for n, _ in model.denoiser.named_modules() if any(f".{n}".endswith(f".{t}") for t in targets)]
    need(found, f"--lora_targets {cfg.lora_targets}: this model has no layers of such names")
    model.denoiser = peft.get_peft_model(model.denoiser, config)
    config.base_model_name_or_path = cfg.model  # for whoever loads the LoRA; get_peft_model blanks it


def lora_parameters(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.denoiser.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def swapped(model, weights):
    """Inside, the LoRA has these weights ({name: tensor}, e.g. the EMA's; None for its own)."""
    own = {name: p.detach().clone() for name, p in lora_parameters(model).items()}
    model.denoiser.load_state_dict(weights or {}, strict=False)
    try:
        yield
    finally:
        model.denoiser.load_state_dict(own, strict=False)


@contextlib.contextmanager
def merged(model):
    """Inside, the LoRA is added into the base weights and costs no time; these come back bitwise."""
    layers = [layer for layer in model.denoiser.modules() if isinstance(layer, LoraLayer)]
    own = [layer.base_layer.weight.detach().clone() for layer in layers]
    model.denoiser.merge_adapter()
    try:
        yield
    finally:
        model.denoiser.unmerge_adapter()
        for layer, weight in zip(layers, own, strict=True):
            layer.base_layer.weight.data.copy_(weight)


# ---- 6. Rollout, score, walk back --------------------------------------------------------------------------


@torch.no_grad()
def rollout(model, schedule: Schedule, noise, cond, uncond, guidance_scale: float, generator=None):
    """Sample without gradient: noise (B, C, F, H, W) float32 -> T + 1 latents of that shape, noise first.

    generator: draws the noise of eta > 0. Both guidance branches go through the denoiser in one batch.
    """
    latents, guided = [schedule.start * noise], guidance_scale != 1
    w = model.guidance(guidance_scale, noise.shape[2])
    both = {name: torch.cat([uncond[name], cond[name]]) for name in cond} if guided else cond
    for i in range(len(schedule)):
        x = latents[-1]
        scaled = float(schedule.c[i]) * x
        f = model.denoise(torch.cat([scaled, scaled]) if guided else scaled, schedule.t[i], both)
        if guided:
            f_uncond, f_cond = f.chunk(2)
            f = f_uncond + w * (f_cond - f_uncond)
        x = float(schedule.a[i]) * x + float(schedule.b[i]) * f
        if schedule.s[i] > 0:
            x = x + float(schedule.s[i]) * torch.randn(x.shape, generator=generator).to(x.device)
        latents.append(x)
    return latents


def views(reward, video, chunk):
    """What a reward is given of video (B, N, 3, H, W): (frames, share of the mean) pairs.

    An image reward is a mean over frames, so it gets them in chunks; a clip reward gets its clip at once.
    """
    wanted = getattr(reward, "frames", 1)
    if wanted == 1:
        return [(view, view.shape[1] / video.shape[1]) for view in video.split(chunk, dim=1)]
    if wanted == "all":
        return [(video, 1.0)]
    return [(video[:, torch.linspace(0, video.shape[1] - 1, wanted).round().long()], 1.0)]


def compute_rewards(terms: dict, video, prompts: list[str], chunk: int, pull=None) -> dict:
    """Rewards of video (B, N, 3, H, W): {"reward": (B,) weighted sum, term: (B,), "term figure": (B,)}.

    pull: called with each piece of the summed rewards, to differentiate it. Raises BadInput when a reward has
    the wrong shape, or no gradient that could be pulled.
    """
    found = {"reward": torch.zeros(len(prompts), device=video.device)}
    for name, (weight, reward) in terms.items():
        for view, share in views(reward, video, chunk):
            value = reward(view, prompts)
            good = value.shape == (len(prompts),) and (value.requires_grad or not pull)
            need(good, f"reward {name!r} must return ({len(prompts)},), one per video, with a gradient")
            if pull:
                pull((weight * share * value).sum())
            value = value.detach()
            reports = {f"{name} {key}": v for key, v in getattr(reward, "report", {}).items()}
            for key, part in {"reward": weight * value, name: value, **reports}.items():
                found[key] = found.get(key, 0) + share * part
    return found


def score(model, terms: dict, x, prompts: list[str], picks: list[int], chunk=1, target=None, scale=None):
    """Reward some frames of the clean latents x and pull the gradient back to x, chunk by chunk.

    x: (B, C, F, H, W) float32; picks: indices of F; terms: {name: (weight, reward)}; target: of the hinge;
    scale: multiplies what is differentiated (fp16). Returns `compute_rewards`' figures and g like x: gradient
    of the loss, minus the mean reward.
    """
    pieces = [picks[i : i + chunk] for i in range(0, len(picks), chunk)]
    with torch.no_grad():
        decoded = [model.decode(x, piece) for piece in pieces]
    sizes = [part.shape[1] for part in decoded]
    video = torch.cat(decoded, dim=1)  # (B, N, 3, H, W)
    video.requires_grad_()
    found = compute_rewards(
        terms, video, prompts, chunk, lambda total: (scale(total) if scale else total).backward()
    )
    # d loss / d reward: -1 / B, and with a hinge nothing for the videos that reached the target
    slope = torch.full_like(found["reward"], -1 / len(x))
    if target is not None:
        slope = slope * (found["reward"] < target)
    v = video.grad * slope[:, None, None, None, None]
    del video, decoded
    x = x.detach().requires_grad_()
    for piece, pull in zip(pieces, v.split(sizes, dim=1), strict=True):
        model.decode(x, piece).backward(pull)
    return found, x.grad


def trained_steps(cfg: Config, generator, schedule: Schedule) -> list[int]:
    """Which K of the T sampling steps train: last (DRaFT-K), spread (DRTune), random, of most leverage."""
    K, T = cfg.backprop_steps, cfg.num_inference_steps
    if cfg.grad_steps == "random":
        return sorted(torch.randperm(T, generator=generator)[:K].tolist())
    if cfg.grad_steps == "strongest":
        return sorted(sorted(range(T), key=schedule.leverage)[-K:])
    if cfg.grad_steps == "spread" and K > 1:
        return torch.linspace(0, T - 1, K).round().long().tolist()
    return list(range(T - K, T))


# SWAP: your gradient estimator.
def walk_back(model, schedule: Schedule, latents, g, cond, uncond, trained, cfg: Config, kl_weight=0.0):
    """Backward of `rollout`: accumulate LoRA gradients, one guidance branch of one trained step at a time.

    latents: T + 1, (B, C, F, H, W); g: d loss / d latents[-1]; trained: step indices; kl_weight: as g scaled.
    Through the step's input goes cfg.coupling of the gradient: 1 is exact (DRaFT-K), 0 detaches it (DRTune).
    Returns the trained steps' mean squared change of output from the base model's (0 when kl_weight is 0).
    """
    change, w = 0.0, model.guidance(cfg.guidance_scale, g.shape[2])
    branches = [(cond, w), (uncond, 1 - w)]
    if cfg.detach_uncond or cfg.guidance_scale == 1:
        branches = [(cond, w)]
    for i in range(len(schedule) - 1, min(trained) - 1, -1):
        a, b, c = (float(table[i]) for table in (schedule.a, schedule.b, schedule.c))
        if i not in trained:
            g = a * g
            continue
        x = latents[i].detach().requires_grad_(cfg.coupling > 0 and i > min(trained))
        for branch, share in branches:
            f = model.denoise(c * x, schedule.t[i], branch)
            pull = share * b * g
            if kl_weight and branch is cond:
                with torch.no_grad(), model.denoiser.disable_adapter():
                    difference = f.detach() - model.denoise(c * x, schedule.t[i], branch)
                pull = pull + kl_weight * 2 * difference / difference.numel()
                change += difference.square().mean().item() / len(trained)
            f.backward(pull)
            del f  # before the next branch builds its graph
        g = a * g if x.grad is None else a * g + cfg.coupling * x.grad
    return change


# ---- 7. Files and resume -----------------------------------------------------------------------------------


def write_atomically(path: Path, write):
    """Call write(temporary path), then rename: a kill leaves the old file or the new, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name("tmp-" + path.name)
    write(temporary)
    os.replace(temporary, path)


def write_text(path: Path, text: str):
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_lora(model, folder: Path):
    """Write the LoRA in PEFT's folder format, for `PeftModel.from_pretrained(pipe.unet, folder)`.

    Where the stock pipeline has `load_lora_weights(folder)`, the same weights go into a file for that too.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as staging:
        model.denoiser.save_pretrained(staging, save_embedding_layers=False)
        if model.pipeline:
            weights = peft.get_peft_model_state_dict(model.denoiser, save_embedding_layers=False)
            weights = {name.removeprefix("base_model.model."): w for name, w in weights.items()}
            config = model.denoiser.peft_config["default"].to_dict()
            given = {f"{model.folder}_lora_layers": weights, f"{model.folder}_lora_adapter_metadata": config}
            model.pipeline.save_lora_weights(staging, **given)
        folder.mkdir(exist_ok=True)
        for file in Path(staging).iterdir():
            os.replace(file, folder / file.name)


def read_metrics(out: Path, until=math.inf) -> list[dict]:
    """The rows of metrics.jsonl up to an update; a last line that a kill cut short is left out."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["step"] <= until]


def append_metrics(out: Path, row: dict):
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def fresh_folder(out: Path):
    """Raises BadInput when an output folder holds something already."""
    used = out.exists() and (not out.is_dir() or any(not f.name.startswith("tmp-") for f in out.iterdir()))
    need(not used, f"{out} is not empty: give another --out, or remove it")


def open_run(cfg: Config) -> dict | None:
    """The checkpoint that a training run goes on from, if there is one. Writes nothing.

    Raises BadInput when the output folder holds another run, or something else.
    """
    out, may_change = Path(cfg.out), ("resume", "steps", "eval_every", "save_every")
    started = (out / "config.json").exists()
    need(cfg.resume or not started, f"{out} holds a run: add --resume to go on with it, or another --out")
    need(started or not cfg.resume, f"nothing to resume in {out}: leave out --resume, or give its --out")
    if not started:
        return fresh_folder(out)
    stored = json.loads((out / "config.json").read_text())
    now = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in may_change}
    other = " ".join(f"--{name} {stored.get(name)}" for name in now if stored.get(name) != now[name])
    need(not other, f"{out} was started with {other}: resume it with that, or give another --out")
    file = out / "checkpoint" / "state.pt"
    return torch.load(file, map_location="cpu", weights_only=True) if file.exists() else None


def start_run(cfg: Config, step: int):
    """Write config.json, and cut metrics.jsonl back to update `step`: newer rows will be made again."""
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    versions = {module.__name__: module.__version__ for module in (torch, diffusers, peft, transformers)}
    write_text(out / "config.json", json.dumps(dataclasses.asdict(cfg) | {"versions": versions}, indent=1))
    rows = "".join(json.dumps(row) + "\n" for row in read_metrics(out, until=step))
    write_text(out / "metrics.jsonl", rows)


# ---- 8. Loading, evaluation, page --------------------------------------------------------------------------


@dataclass
class Run:
    """What all modes share. terms: {name: (weight, reward)}; conds: {`cond_key`: conditioning}."""

    cfg: Config
    model: TextToVideoUNet
    schedule: Schedule
    terms: dict
    conds: dict | None = None
    moving: float = 0.0  # seconds spent moving weights between device and host


def loaded_networks(run: Run) -> list[tuple[torch.nn.Module, bool]]:
    """The networks that are loaded, each with whether it scores (VAE, rewards) or not (denoiser)."""
    networks = [n for _, reward in run.terms.values() for n in getattr(reward, "networks", ())]
    found = [(run.model.denoiser, False), (run.model.vae, True), *((n, True) for n in networks)]
    return [(part, scores) for part, scores in found if part is not None]


def bring(run: Run, denoiser=False, scoring=False):
    """Put the denoiser, or the VAE and the rewards, or both, on the device; all that is idle on the host."""
    start, wanted = time.time(), {False: denoiser, True: scoring}
    for part, scores in sorted(loaded_networks(run), key=lambda entry: wanted[entry[1]]):  # first make room
        part.to(run.model.device if wanted[scores] else "cpu")
    run.moving += time.time() - start


def load_run(cfg: Config, source: str, family: type, prompts: list[str], reward=None) -> Run:
    """Load the rewards (or take yours), encode the prompts, then load the denoiser, its LoRA and the VAE."""
    dtype = DTYPES[cfg.dtype]
    terms = {getattr(reward, "__name__", "custom"): (1.0, reward)}
    if reward is None:
        terms = make_terms(cfg.reward, cfg.device, dtype, cfg.reward_weights)
    for _, term in terms.values():
        if hasattr(term, "check"):
            term.check(prompts)
    model = family(source, cfg.device, dtype)
    run = Run(cfg, model, model.schedule(cfg), terms)
    bring(run)  # nothing: the text encoder can be the largest part of all
    run.conds = model.encode([*{cond_key(prompt): prompt for prompt in prompts}.values(), ""], cfg)
    bring(run, scoring=not cfg.offload)
    model.load()
    add_lora(model, cfg)
    if cfg.checkpointing:
        model.recompute()
    return run


def announce(run: Run, asked: str):
    """Say what is about to run. asked: what --model was given."""
    cfg, schedule = run.cfg, run.schedule
    if asked == "auto":
        print(f"model: {cfg.model}, as there is {'a' if cfg.device == 'cuda' else 'no'} CUDA GPU")
    if cfg.model in TINY:
        print("rewards: those of the tiny world, a toy; not comparable with the published rewards' scores")
    size = sum(p.numel() for p in lora_parameters(run.model).values()) / 1e6
    print(f"{cfg.model} on {cfg.device} in {cfg.dtype}, {size:.2f} M LoRA weights, {cfg.reward}, {cfg.out}")
    leverage = {i: schedule.leverage(i) for i in trained_steps(cfg, generator_for(cfg.seed), schedule)}
    print(f"leverage of the trained steps of {len(schedule)}:", {i: round(v, 3) for i, v in leverage.items()})
    if max(leverage.values()) < 0.05:
        fix = "--timestep_spacing trailing or --grad_steps strongest"
        print(f"warning: leverage under 0.05, training hardly moves the video: {fix}")


def write_video(path: Path, video):
    """video: (F, 3, H, W) float in [0, 1] -> an mp4 that browsers play, enlarged to at least 256 pixels."""
    frames = (video.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
    zoom = max(1, math.ceil(256 / frames.shape[2]))
    frames = frames.repeat(zoom, axis=1).repeat(zoom, axis=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, frames, plugin="FFMPEG", fps=8, codec="libx264", quality=9, macro_block_size=2)


def decode_whole(model, latents, chunk: int):
    """All frames, (B, F, 3, H, W), of latents (B, C, F, H, W), `chunk` at once."""
    # a VAE that compresses time decodes frame after frame by itself, and best in one go
    size = chunk if model.time == 1 else latents.shape[2]
    chunks = torch.arange(latents.shape[2]).split(size)
    return torch.cat([model.decode(latents, picks.tolist()) for picks in chunks], dim=1)


@torch.no_grad()
def make_videos(run: Run, prompts: list[str], first=0):
    """A whole video per prompt, (B, F, 3, H, W) float32 in [0, 1]; number `first` + n has noise n."""
    cfg, model = run.cfg, run.model
    bring(run, denoiser=True, scoring=not cfg.offload)
    draws = [generator_for(cfg.seed, "eval", first + n) for n in range(len(prompts))]
    noise = torch.stack([torch.randn(model.latent_shape(cfg), generator=g) for g in draws]).to(model.device)
    cond, uncond = collate(run.conds, prompts)
    clean = rollout(model, run.schedule, noise, cond, uncond, cfg.guidance_scale, draws[0])[-1]
    bring(run, denoiser=not cfg.offload, scoring=True)
    return decode_whole(model, clean, cfg.decode_chunk)


@torch.no_grad()
def evaluate(run: Run, prompts: list[str], folder: Path) -> dict:
    """A video per prompt into `folder`, all frames scored: {"prompts"} and lists of reward figures."""
    size, result = run.cfg.batch_size, {"prompts": prompts}
    for first in tqdm(range(0, len(prompts), size), desc=f"evaluate {folder.name}", leave=False):
        batch = prompts[first : first + size]
        videos = make_videos(run, batch, first)
        found = compute_rewards(run.terms, videos, batch, run.cfg.decode_chunk)
        if run.model.images != "no" and getattr(batch[0], "image", None):
            starts = [read_image(prompt.image, run.cfg.height, run.cfg.width) for prompt in batch]
            difference = (videos[:, 0].cpu() - torch.stack(starts)).abs().mean((1, 2, 3))
            found["first frame's difference from the image"] = difference
        for name, values in found.items():
            result.setdefault(name, []).extend(values.tolist())
        for n, video in enumerate(videos, first):
            write_video(folder / f"{n:03d}.mp4", video)
    return result


def paired_gain(base: list[float], tuned: list[float]) -> tuple[float, float]:
    """Mean of the differences between videos of the same prompt and noise, and its standard error."""
    gains = np.subtract(tuned, base)
    error = gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    return float(gains.mean()), float(error)


def summary(base: list[float], tuned: list[float]) -> str:
    gain, error = paired_gain(base, tuned)
    change = f"{gain:+.3f}, standard error {error:.3f}, {len(base)} videos, paired seeds"
    return f"{np.mean(base):.3f} -> {np.mean(tuned):.3f} ({change})"


def curve(rows: list[dict]) -> str:
    """The reward over updates as SVG: grey for training batches, red for the held-out prompts."""
    train = [(row["step"], row["reward"]) for row in rows if math.isfinite(row.get("reward", math.nan))]
    held = [(row["step"], float(np.mean(row["eval"]["reward"]))) for row in rows if "eval" in row]
    steps, values = zip(*train, *held, strict=True)
    low, high, last = min(values), max(values), max(steps) or 1
    lines = ""
    for series, colour in ((train, "#9ab"), (held, "#c33")):
        points = [(50 + 620 * step / last, 190 - 170 * (v - low) / ((high - low) or 1)) for step, v in series]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        lines += f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>'
    text = f'<text x="2" y="24">{high:.3g}</text><text x="2" y="194">{low:.3g}</text>'
    text += f'<text x="200" y="212">update 0 to {last}; red: held-out prompts, grey: training</text>'
    return f'<svg viewBox="0 0 690 220" width="690">{lines}{text}</svg>'


def write_page(out: Path, cfg: Config, base: dict, tuned: dict, folders: list[Path], rows):
    """index.html: curve, and base | tuned videos of the same prompt and seed; comparison.png: six as stills.

    base, tuned: results of `evaluate`; folders: theirs, inside out; rows: of metrics.jsonl, or empty.
    """
    pairs, strips = [], []
    for n, prompt in enumerate(tuned["prompts"]):
        files = [folder / f"{n:03d}.mp4" for folder in folders]
        sources = [file.relative_to(out).as_posix() for file in files]
        videos = "".join(f'<video src="{s}" autoplay loop muted playsinline></video>' for s in sources)
        change = f"{base['reward'][n]:.3f} → <b>{tuned['reward'][n]:.3f}</b>"
        pairs.append(f"<p>{html.escape(prompt)}: {change}</p>{videos}")
        if n < 6:
            films = [iio.imread(file, plugin="FFMPEG") for file in files]
            stills = [f[np.linspace(0, len(f) - 1, 3).round().astype(int), ::2, ::2] for f in films]
            gap = np.full((stills[0].shape[1], 12, 3), 255, np.uint8)
            strips.append(np.concatenate([*stills[0], gap, *stills[1]], axis=1))
    write_atomically(out / "comparison.png", lambda path: iio.imwrite(path, np.concatenate(strips)))
    toy = "The tiny model and its toy rewards: these scores say nothing about real ones. "
    body = f"""<!doctype html><meta charset="utf-8"><title>vader: {html.escape(cfg.reward)}</title>
<style>body{{font:15px sans-serif;max-width:46em;margin:2em auto}}video{{width:48%;margin-right:1%}}</style>
<h1>{html.escape(cfg.reward)} on {html.escape(cfg.model)}</h1>
<p>{toy if cfg.model in TINY else ""}Reward: {summary(base["reward"], tuned["reward"])}</p>
{curve(rows) if rows else ""}
<h2>base | tuned</h2>
{"".join(pairs)}"""
    write_text(out / "index.html", body)


# ---- 9. Training -------------------------------------------------------------------------------------------


def micro_batch(run: Run, prompts: list[str], step: int, batch: int, scaler):
    """Rollout, score, walk back for one batch of prompts: adds to the LoRA's gradients.

    Returns {"reward" or term: (B,)} and the mean squared change from the base model (if kl_weight).
    """
    cfg, model, schedule = run.cfg, run.model, run.schedule
    generator = generator_for(cfg.seed, step, batch)
    noise = torch.randn(len(prompts), *model.latent_shape(cfg), generator=generator).to(model.device)
    picks = pick_frames(cfg, run.terms, generator, model.time)
    trained = trained_steps(cfg, generator, schedule)
    cond, uncond = collate(run.conds, prompts)
    bring(run, denoiser=True, scoring=not cfg.offload)
    # half precision has no room for the LoRA's small changes, so there it stays beside the base weights
    with merged(model) if cfg.dtype == "fp32" else contextlib.nullcontext():
        latents = rollout(model, schedule, noise, cond, uncond, cfg.guidance_scale, generator)
    x, target = latents[-1], cfg.reward_target
    bring(run, denoiser=not cfg.offload, scoring=True)
    found, g = score(model, run.terms, x, prompts, picks, cfg.decode_chunk, target, scaler.scale)
    bring(run, denoiser=True, scoring=not cfg.offload)
    kl_weight = cfg.kl_weight / cfg.grad_accum * scaler.get_scale()
    g = g / cfg.grad_accum
    return found, walk_back(model, schedule, latents, g, cond, uncond, trained, cfg, kl_weight)


def average_gradients(parameters: list):
    """Replace the LoRA's gradients by their mean over all ranks, in one message."""
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(part.view_as(p) / dist.get_world_size())


def on_any_rank(flag, world: int) -> bool:
    """True if flag is true on any rank, so that all stop at the same update."""
    if world == 1:
        return bool(flag)
    count = torch.tensor(float(bool(flag)), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(count)
    return count.item() > 0


# SWAP: your optimiser.
def make_optimizer(cfg: Config, parameters: list):
    if cfg.optimizer == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay)
    return torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay)


def update(run: Run, prompts: list[str], step: int, rank: int, world: int, optimizer, scaler) -> dict:
    """One update: grad_accum batches on every rank, each with its own prompts and noise, then AdamW.

    A gradient that is not finite changes nothing. Returns the row for metrics.jsonl.
    """
    cfg, start, moving, kl, found = run.cfg, time.time(), run.moving, 0.0, {}
    parameters = list(lora_parameters(run.model).values())
    optimizer.zero_grad()
    for m in range(cfg.grad_accum):
        batch = (step * cfg.grad_accum + m) * world + rank
        values, change = micro_batch(run, batch_prompts(prompts, cfg, batch), step, batch, scaler)
        kl += change / cfg.grad_accum
        for name, value in values.items():
            found.setdefault(name, []).extend(value.tolist())
    if world > 1:
        average_gradients(parameters)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm).item()
    if math.isfinite(norm):
        scaler.step(optimizer)
    scaler.update()
    memory = torch.cuda.max_memory_reserved() if cfg.device == "cuda" else psutil.Process().memory_info().rss
    row = {"step": step + 1} | {name: float(np.mean(values)) for name, values in found.items()}
    row |= {"grad_norm": norm, "kl": kl, "seconds": time.time() - start, "memory_gb": memory / 1e9}
    return row | ({"offload_seconds": run.moving - moving} if cfg.offload else {})


@contextlib.contextmanager
def stop_on_interrupt():
    """Inside, the first Ctrl-C fills the list, so the loop stops after its update; the second is at once."""
    asked, before = [], signal.getsignal(signal.SIGINT)

    def handler(number, frame):
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nstopping after this update; Ctrl-C again stops at once", flush=True)

    signal.signal(signal.SIGINT, handler)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def train(cfg: Config, reward=None) -> list[dict]:
    """Fine-tune a LoRA on cfg.reward, or on your own function (frames, prompts) -> (B,); see rewards.py.

    Writes cfg.out and returns the rows of its metrics.jsonl. Raises BadInput, rewards.BadReward, and
    FloatingPointError after ten updates in a row without a finite gradient.
    """
    # settings, ranks, output folder
    asked = cfg
    cfg, source, family = resolve(cfg, reward)
    prompts, held_out = split_prompts(cfg, family.images == "must")
    eval_prompts = [held_out[n % len(held_out)] for n in range(cfg.eval_videos)]
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("nccl" if cfg.device == "cuda" else "gloo", timeout=timedelta(hours=2))
        if cfg.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    main_rank, out = rank == 0, Path(cfg.out)
    state = open_run(cfg)

    # model, optimiser, checkpoint
    run = load_run(cfg, source, family, prompts + held_out, reward)
    model, weights = run.model, lora_parameters(run.model)
    optimizer = make_optimizer(cfg, list(weights.values()))
    scaler = torch.amp.GradScaler(cfg.device, init_scale=2.0**12, enabled=cfg.dtype == "fp16")
    ema = {name: p.detach().clone() for name, p in weights.items()} if cfg.ema_decay else {}
    first, skipped, in_a_row, stop = 0, 0, 0, False
    if state:
        first, skipped = state["step"], state["skipped"]
        model.denoiser.load_state_dict(state["lora"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        ema = {name: value.to(model.device) for name, value in state["ema"].items()}
    if world > 1:
        dist.barrier()  # all have looked into the output folder
    if main_rank:
        start_run(cfg, first)
        announce(run, asked.model)
    evaluated = {row["step"]: row["eval"] for row in read_metrics(out) if "eval" in row}

    bar = tqdm(total=cfg.steps, initial=first, desc="train", disable=not main_rank)
    with stop_on_interrupt() as interrupted:
        for step in range(first, cfg.steps + 1):
            # evaluate: before the first update, every eval_every, after the last
            due = step % cfg.eval_every == 0 or step == cfg.steps
            if due and main_rank and step not in evaluated:
                folders = [out / "samples" / f"step_{s:06d}" for s in (0, step)]
                with swapped(model, ema) if step else model.denoiser.disable_adapter():
                    evaluated[step] = evaluate(run, eval_prompts, folders[1])
                append_metrics(out, {"step": step, "eval": evaluated[step]})
                write_page(out, cfg, evaluated[0], evaluated[step], folders, read_metrics(out))
                change = summary(evaluated[0]["reward"], evaluated[step]["reward"])
                bar.write(f"update {step}: held-out reward {change}")
            if due and main_rank:
                with swapped(model, ema):
                    save_lora(model, out / "lora")
            if step == cfg.steps:
                break

            row = update(run, prompts, step, rank, world, optimizer, scaler)
            finite = math.isfinite(row["grad_norm"])
            in_a_row, skipped = (0, skipped) if finite else (in_a_row + 1, skipped + 1)
            for name in ema if finite else ():
                ema[name].lerp_(weights[name].detach(), 1 - cfg.ema_decay)
            if in_a_row == 10:
                batch = batch_prompts(prompts, cfg, ((step + 1) * cfg.grad_accum - 1) * world + rank)
                where = f"update {step + 1}, prompt {batch[0]!r}, seed {cfg.seed}"
                raise FloatingPointError(f"ten gradients in a row not finite, at {where}; lower --lr")
            if main_rank:
                append_metrics(out, row | {"skipped": skipped})
            stop = on_any_rank(interrupted, world)
            if main_rank and ((step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps or stop):
                state = {"step": step + 1, "skipped": skipped, "ema": ema, "scaler": scaler.state_dict()}
                state["lora"] = {name: p.detach() for name, p in weights.items()}
                state["optimizer"] = optimizer.state_dict()
                write_atomically(out / "checkpoint" / "state.pt", functools.partial(torch.save, state))
            shown = ("reward", "grad_norm", "seconds", "offload_seconds", "memory_gb")
            bar.set_postfix({name: f"{row[name]:.3g}" for name in shown if name in row}, refresh=False)
            bar.update()
            if stop and main_rank:
                with swapped(model, ema):
                    save_lora(model, out / "lora")
            if stop:
                break
    bar.close()
    if main_rank and stop:
        print(f"stopped and saved; go on with:  {shlex.join(['python', *sys.argv, '--resume'])}")
    elif main_rank:
        print(f"done: open {out / 'index.html'}; the LoRA is in {out / 'lora'}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return read_metrics(out)


# ---- 10. Sampling, scoring, main ---------------------------------------------------------------------------


def sample(cfg: Config):
    """--mode sample: a video per prompt with the LoRA, <out>/000.mp4 and on; prompts.json names them."""
    cfg, source, family = resolve(cfg)
    prompts, out = read_prompts(cfg.prompts, family.images == "must"), Path(cfg.out)
    fresh_folder(out)
    run = load_run(cfg, source, family, prompts, reward=sample)  # a stand-in: no reward is loaded
    for first in tqdm(range(0, len(prompts), cfg.batch_size), desc="sample"):
        for n, video in enumerate(make_videos(run, prompts[first : first + cfg.batch_size], first), first):
            write_video(out / f"{n:03d}.mp4", video)
    named = {f"{n:03d}.mp4": prompt for n, prompt in enumerate(prompts)}
    write_text(out / "prompts.json", json.dumps(named, indent=1, ensure_ascii=False))
    print(f"{len(prompts)} videos in {out}")


def compare(cfg: Config):
    """--mode eval: score base and tuned on every prompt, same seeds; writes eval.json, videos, index.html."""
    asked = cfg.model
    cfg, source, family = resolve(cfg)
    prompts, out = read_prompts(cfg.prompts, family.images == "must"), Path(cfg.out)
    fresh_folder(out)
    run = load_run(cfg, source, family, prompts)
    announce(run, asked)
    with run.model.denoiser.disable_adapter():
        base = evaluate(run, prompts, out / "base")
    tuned = evaluate(run, prompts, out / "tuned")
    result = {"config": dataclasses.asdict(cfg), "base": base, "tuned": tuned}
    write_text(out / "eval.json", json.dumps(result))
    write_page(out, cfg, base, tuned, [out / "base", out / "tuned"], [])
    for name in list(base)[1:]:  # all but the prompts
        print(f"{name}: {summary(base[name], tuned[name])}")
    print(f"done: open {out / 'index.html'}")


def main(argv=None) -> int:
    """Run the command line. The exit code is 0; after one line, 2 for bad input, 1 for lost gradients."""
    for library in (transformers, diffusers):  # their loading bars and reports of unused weights
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    try:
        cfg = parse_args(argv)
        if cfg.plan:
            return plan(cfg)
        {"sample": sample, "eval": compare}.get(cfg.mode, train)(cfg)
    except (BadInput, BadReward) as error:
        print(f"vader.py: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"vader.py: stopped: {error}", file=sys.stderr)
        return 1
    return 0


# ---- 11. More models ---------------------------------------------------------------------------------------

# The trainer ends above. This section and the next are appendices, which a fork can cut.


def edm_schedule(config: dict, num_inference_steps: int) -> Schedule:
    """Euler steps over noise levels sigma, v prediction (Karras et al. 2022, alg. 1 and eq. 7)."""
    scheduler = diffusers.EulerDiscreteScheduler.from_config(config)
    kind = scheduler.config.prediction_type
    need(kind == "v_prediction", f"this model predicts {kind}; Euler over noise levels here: v_prediction")
    scheduler.set_timesteps(num_inference_steps)
    sigmas = scheduler.sigmas.double()
    now, then = sigmas[:-1], sigmas[1:]
    p, q = 1 / (now**2 + 1), -now / (now**2 + 1).sqrt()
    # x' = x + (then - now) * (x - x0) / now
    ratio = then / now
    a, b, c = ratio + (1 - ratio) * p, (1 - ratio) * q, 1 / (now**2 + 1).sqrt()
    start = float(scheduler.init_noise_sigma)
    return Schedule(t=scheduler.timesteps, a=a, b=b, c=c, p=p, q=q, s=torch.zeros_like(a), start=start)


def flow_schedule(sigmas) -> Schedule:
    """Euler steps of rectified flow (Liu et al. 2022): x = (1 - sigma) x0 + sigma noise, f = noise - x0.

    sigmas: (T + 1,), from 1 down to 0.
    """
    sigmas = sigmas.double()
    now, one = sigmas[:-1], torch.ones(len(sigmas) - 1, dtype=torch.float64)
    t = (1000 * now).float()
    return Schedule(t=t, a=one, b=sigmas.diff(), c=one, p=one, q=-now, s=0 * one)


class AnimateDiff(TextToVideoUNet):
    """AnimateDiff (Guo et al. 2023): Stable Diffusion 1.5 with a motion adapter, in one folder or two."""

    preset, pipeline = "animatediff", diffusers.AnimateDiffPipeline
    denoiser_class, motion = diffusers.UNetMotionModel, "guoyww/animatediff-motion-adapter-v1-5-2"
    checkpointed = ("ResnetBlock2D", "Transformer2DModel", "AnimateDiffTransformer3D")

    @classmethod
    def skeleton(cls, source):
        if read_config(source, "unet/config.json")["_class_name"] == "UNetMotionModel":
            return super().skeleton(source)
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel.from_config(read_config(source, "unet/config.json"))
            adapter = diffusers.MotionAdapter.from_config(read_config(cls.motion, "config.json"))
            return diffusers.UNetMotionModel.from_unet2d(unet, adapter, load_weights=False)

    def schedule(self, cfg):
        # the adapter was trained on linear betas, whatever the image model's scheduler says
        config = read_config(self.source, "scheduler/scheduler_config.json")
        config |= {"beta_schedule": "linear", "clip_sample": False}
        return ddim_schedule(config, cfg.num_inference_steps, cfg.eta, cfg.timestep_spacing)

    def load_denoiser(self):
        if read_config(self.source, "unet/config.json")["_class_name"] == "UNetMotionModel":
            return super().load_denoiser()
        unet = diffusers.UNet2DConditionModel.from_pretrained(self.source, subfolder="unet", dtype=self.dtype)
        adapter = diffusers.MotionAdapter.from_pretrained(self.motion)
        return diffusers.UNetMotionModel.from_unet2d(unet, adapter).to(self.dtype)

    def denoise(self, x, t, cond):
        text = cond["encoder_hidden_states"].repeat_interleave(x.shape[2], dim=0)  # every frame has its own
        return super().denoise(x, t, {"encoder_hidden_states": text})


class StableVideoDiffusion(TextToVideoUNet):
    """SVD (Blattmann et al. 2023), image to video: v prediction over noise levels, guidance by frame."""

    preset = "svd"
    denoiser_class = diffusers.UNetSpatioTemporalConditionModel
    vae_class = diffusers.AutoencoderKLTemporalDecoder
    checkpointed = ("SpatioTemporalResBlock", "TransformerSpatioTemporalModel")
    checkpointed += ("BasicTransformerBlock", "TemporalBasicTransformerBlock")  # within: 2.7 GB less
    vae_checkpointed = ("SpatioTemporalResBlock",)
    stochastic, images = False, "must"
    grad_steps = "strongest"  # the last of 25 steps has a leverage of 0.002, the strongest 0.29
    # the model's own defaults: frames per second less one, how much moves, noise on the image
    time_ids = (6.0, 127.0, 0.02)

    def schedule(self, cfg):
        config = read_config(self.source, "scheduler/scheduler_config.json")
        return edm_schedule(config, cfg.num_inference_steps)

    @torch.no_grad()
    def encode(self, prompts, cfg):
        encoder = transformers.CLIPVisionModelWithProjection.from_pretrained(
            self.source, subfolder="image_encoder", dtype=self.dtype
        ).to(self.device)
        # in half precision this encoder overflows on some images
        precise = torch.float32 if self.dtype == torch.float16 else self.dtype
        vae = self.vae_class.from_pretrained(self.source, subfolder="vae", dtype=precise).to(self.device)
        mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        conds, time_ids = {}, torch.tensor(self.time_ids, device=self.device, dtype=self.dtype)
        for prompt in filter(None, prompts):
            small = self.shrink(read_image(prompt.image) * 2 - 1) / 2 + 0.5
            pixels = ((small - mean) / std)[None].to(self.device, self.dtype)
            noise = torch.randn(1, 3, cfg.height, cfg.width, generator=generator_for("image noise"))
            start = read_image(prompt.image, cfg.height, cfg.width)[None] * 2 - 1 + self.time_ids[2] * noise
            latents = vae.encode(start.to(self.device, precise)).latent_dist.mode()[0]
            conds[cond_key(prompt)] = {
                "embedding": encoder(pixels).image_embeds,  # (1, D)
                "image_latents": latents.to(self.dtype),  # (C, H / 8, W / 8), unscaled
                "time_ids": time_ids,
            }
        # unconditional: an empty image
        first = next(iter(conds.values()))
        nothing = {name: torch.zeros_like(value) for name, value in first.items()}
        return conds | {cond_key(""): nothing | {"time_ids": time_ids}}

    @staticmethod
    def shrink(picture):
        """(3, H, W) -> (3, 224, 224): a Gaussian blur against aliasing, then bicubic with corners aligned."""
        height, width = picture.shape[1:]
        sigma = [max((side / 224 - 1) / 2, 0.001) for side in (width, height)]
        kernel = [int(max(4 * s, 3)) for s in sigma]
        blurred = gaussian_blur(picture, [size + 1 - size % 2 for size in kernel], sigma)
        resize = functools.partial(torch.nn.functional.interpolate, mode="bicubic", align_corners=True)
        return resize(blurred[None], (224, 224))[0]

    def guidance(self, scale, frames):
        return torch.linspace(1, scale, frames, device=self.device)[:, None, None]

    def denoise(self, x, t, cond):
        image = cond["image_latents"][:, :, None].expand(-1, -1, x.shape[2], -1, -1)
        x = torch.cat([x.to(self.dtype), image], dim=1).transpose(1, 2)  # (B, F, 2 C, H, W)
        given = dict(encoder_hidden_states=cond["embedding"], added_time_ids=cond["time_ids"])
        return self.denoiser(x, t.to(self.device), **given, return_dict=False)[0].transpose(1, 2).float()

    def decode(self, latents, picks):
        """As above. This VAE mixes neighbouring frames: those decoded together see each other, no others."""
        picked = latents[:, :, picks].transpose(1, 2).flatten(0, 1) / self.vae.config.scaling_factor
        together = len(picks) if picks == list(range(picks[0], picks[0] + len(picks))) else 1
        pictures = self.vae.decode(picked.to(self.dtype), num_frames=together).sample.float()
        return straight_through_clamp(pictures / 2 + 0.5).unflatten(0, (-1, len(picks)))


def checkpoint_cached_blocks(vae):
    """As `checkpoint_blocks`, for Wan's VAE, whose blocks read and write a list of earlier frames' features.

    The block's part of the list becomes arguments and results, so that computing it again does no harm.
    """

    def recomputed(forward, slots, x, feat_cache, feat_idx):
        if not torch.is_grad_enabled():
            return forward(x, feat_cache=feat_cache, feat_idx=feat_idx)

        def pure(x, *before):
            after = list(before)
            return forward(x, feat_cache=after, feat_idx=[0]), *after

        first = feat_idx[0]
        before = feat_cache[first : first + slots]
        y, *after = checkpoint(pure, x, *before, use_reentrant=False, preserve_rng_state=False)
        feat_cache[first : first + slots] = after
        feat_idx[0] += slots
        return y

    for module in vae.modules():
        kind = type(module).__name__
        if kind in ("WanResidualBlock", "WanResample"):
            slots = 2 if kind == "WanResidualBlock" else int(module.mode == "upsample3d")
            module.forward = functools.partial(recomputed, module.forward, slots)


class Wan(TextToVideoUNet):
    """Wan 2.1 text to video (2025): a flow transformer, a causal VAE of 4 frames a latent, a UMT5 encoder."""

    preset, pipeline = "wan", diffusers.WanPipeline
    denoiser_class, folder = diffusers.WanTransformer3DModel, "transformer"
    vae_class = diffusers.AutoencoderKLWan
    checkpointed = ("WanTransformerBlock",)
    vae_checkpointed = ()  # its blocks keep a cache: see `recompute`
    multiple, frame_multiple, scale, time = 16, 4, 8, 4
    stochastic = False
    grad_steps = "strongest"  # the last step has a leverage of 0.009, the strongest of 30 has 0.095

    def schedule(self, cfg):
        config = read_config(self.source, "scheduler/scheduler_config.json")
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
            shift=config.get("flow_shift") or config.get("shift", 1.0)
        )
        scheduler.set_timesteps(cfg.num_inference_steps)
        return flow_schedule(scheduler.sigmas)

    def encode(self, prompts, cfg):
        texts = {cond_key(p): " ".join(html.unescape(html.unescape(p)).split()) for p in prompts}
        found = encode_text(self, transformers.UMT5EncoderModel, texts.values(), 512, masked=True)
        states = {text: states * mask[:, None] for (text, _), (states, mask) in found.items()}
        return {key: {"encoder_hidden_states": states[text]} for key, text in texts.items()}

    def load(self):
        super().load()
        self.convolutions = sum(type(m).__name__ == "WanCausalConv3d" for m in self.vae.decoder.modules())

    def recompute(self):
        super().recompute()
        checkpoint_cached_blocks(self.vae)

    def decode(self, latents, picks):
        """As above: the VAE's own decoding without its clamp, one latent frame after the other.

        Frames are exact; their gradient reaches the picked latent frames, not those before them.
        """
        config, graph = self.vae.config, torch.is_grad_enabled()
        statistics = torch.tensor([config.latents_mean, config.latents_std], device=self.device)
        mean, std = statistics[..., None, None, None]
        hidden = self.vae.post_quant_conv((latents * std + mean).to(self.dtype))
        cache, parts = [None] * self.convolutions, []
        for i in range(picks[-1] + 1):
            with torch.set_grad_enabled(graph and i in picks):
                piece = hidden[:, :, i : i + 1]
                frames = self.vae.decoder(piece, feat_cache=cache, feat_idx=[0], first_chunk=i == 0)
            parts += [frames] if i in picks else []
        return straight_through_clamp(torch.cat(parts, dim=2).transpose(1, 2).float() / 2 + 0.5)


class CogVideoX(TextToVideoUNet):
    """CogVideoX 2B (Yang et al. 2024): a v-prediction transformer, a causal VAE of 4 frames a latent, T5."""

    preset, pipeline = "cogvideox", diffusers.CogVideoXPipeline
    denoiser_class, folder = diffusers.CogVideoXTransformer3DModel, "transformer"
    vae_class = diffusers.AutoencoderKLCogVideoX
    checkpointed = ("CogVideoXBlock",)
    vae_checkpointed = ("CogVideoXResnetBlock3D", "CogVideoXUpsample3D", "CogVideoXSpatialNorm3D")
    multiple, frame_multiple, scale, time = 16, 8, 8, 4
    stochastic = False

    @classmethod
    def skeleton(cls, source):
        config = read_config(source, "transformer/config.json")
        plain = not config["use_rotary_positional_embeddings"]
        need(plain, f"{source} has rotary positions (5B, 1.5), for which there is no code: CogVideoX-2b")
        return super().skeleton(source)

    def schedule(self, cfg):
        # this sampler has no clipping, whatever the file says
        config = read_config(self.source, "scheduler/scheduler_config.json") | {"clip_sample": False}
        given = cfg.num_inference_steps, 0.0, cfg.timestep_spacing
        return ddim_schedule(config, *given, diffusers.CogVideoXDDIMScheduler)

    def encode(self, prompts, cfg):
        length = read_config(self.source, "transformer/config.json")["max_text_seq_length"]
        found = encode_text(self, transformers.T5EncoderModel, prompts, length)
        return {key: {"encoder_hidden_states": states} for key, (states, _) in found.items()}

    def denoise(self, x, t, cond):
        return super().denoise(x.transpose(1, 2), t, cond).transpose(1, 2)

    def decode(self, latents, picks):
        """As above; large frames in overlapping tiles, as after `pipe.vae.enable_tiling()`.

        Frames are exact; their gradient reaches the chunks of picked latent frames, not those before them.
        """
        vae, hidden = self.vae, (latents / self.vae.config.scaling_factor).to(self.dtype)
        height, width = vae.tile_latent_min_height, vae.tile_latent_min_width
        if hidden.shape[3] <= height and hidden.shape[4] <= width:
            video = self.decode_tile(hidden, picks)
        else:
            # neighbours share this much of a tile, and are blended there
            y_share, x_share = vae.tile_overlap_factor_height, vae.tile_overlap_factor_width
            tops = range(0, hidden.shape[3], int(height * (1 - y_share)))
            lefts = range(0, hidden.shape[4], int(width * (1 - x_share)))
            tiles = [[hidden[..., y : y + height, x : x + width] for x in lefts] for y in tops]
            # checkpointed as a whole: only one tile's graph is alive
            run = functools.partial(checkpoint, self.decode_tile, picks=picks, use_reentrant=False)
            rows = [[run(tile) for tile in row] for row in tiles]
            high, wide = vae.tile_sample_min_height, vae.tile_sample_min_width
            y_blend, x_blend = int(high * y_share), int(wide * x_share)
            for i, row in enumerate(rows):
                for j in range(len(row)):
                    row[j] = vae.blend_v(rows[i - 1][j], row[j], y_blend) if i else row[j]
                    row[j] = vae.blend_h(row[j - 1], row[j], x_blend) if j else row[j]
            kept = [[tile[..., : high - y_blend, : wide - x_blend] for tile in row] for row in rows]
            video = torch.cat([torch.cat(row, dim=4) for row in kept], dim=3)
        return straight_through_clamp(video.transpose(1, 2).float() / 2 + 0.5)

    def decode_tile(self, hidden, picks):
        """The VAE's own decoding: latent frames 0 to 2, then two by two, handing on a cache."""
        chunks = [range(3), *(range(first, first + 2) for first in range(3, hidden.shape[2], 2))]
        picked = [n for n, chunk in enumerate(chunks) if set(chunk) & set(picks)]
        parts, cache, graph = [], None, torch.is_grad_enabled()
        for n, chunk in enumerate(chunks[: picked[-1] + 1]):
            with torch.set_grad_enabled(graph and n in picked):
                piece = hidden[:, :, chunk.start : chunk.stop]
                video, cache = self.vae.decoder(piece, conv_cache=cache)
            split = video.split([self.time if i else 1 for i in chunk], dim=2)
            parts += [part for i, part in zip(chunk, split, strict=True) if i in picks]
        return torch.cat(parts, dim=2)


class LTX(TextToVideoUNet):
    """LTX-Video (HaCohen et al. 2024), text or image to video: flow on tokens, 8 frames in a latent."""

    preset, pipeline = "ltx", diffusers.LTXPipeline
    denoiser_class, folder = diffusers.LTXVideoTransformer3DModel, "transformer"
    vae_class = diffusers.AutoencoderKLLTXVideo
    checkpointed = ("LTXVideoTransformerBlock",)
    vae_checkpointed = ("LTXVideoResnetBlock3d",)
    multiple, frame_multiple, scale, time = 32, 8, 32, 8
    stochastic, images = False, "may"
    frame_rate = 25  # frames per second, told to the denoiser
    decode_timestep, decode_noise_scale = 0.05, 0.025  # for a VAE that takes a timestep (0.9.1 and later)

    def schedule(self, cfg):
        config = read_config(self.source, "scheduler/scheduler_config.json")
        draws = config.get("stochastic_sampling")
        need(not draws, "this scheduler draws noise: set stochastic_sampling to false")
        need(cfg.num_inference_steps > 1, "--num_inference_steps must be 2 or more for this model")
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
        known = scheduler.config
        # the more tokens, the more noise
        _, *size = self.latent_shape(cfg)
        slope = (known.max_shift - known.base_shift) / (known.max_image_seq_len - known.base_image_seq_len)
        shift = known.base_shift + slope * (math.prod(size) - known.base_image_seq_len)
        steps = cfg.num_inference_steps
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).double().tolist(), mu=shift)
        return flow_schedule(scheduler.sigmas)

    @torch.no_grad()
    def encode(self, prompts, cfg):
        conds = {}
        for key, (states, mask) in encode_text(self, transformers.T5EncoderModel, prompts, 128).items():
            conds[key] = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        starts = [prompt for prompt in prompts if getattr(prompt, "image", None)]
        if starts:
            vae = self.vae_class.from_pretrained(self.source, subfolder="vae", dtype=self.dtype)
            vae.to(self.device)
            mean, std = (v.view(-1, 1, 1, 1).to(self.device) for v in (vae.latents_mean, vae.latents_std))
        for prompt in starts:
            picture = read_image(prompt.image, cfg.height, cfg.width)[None, :, None] * 2 - 1
            latent = vae.encode(picture.to(self.device, self.dtype)).latent_dist.mode()[0].float()
            conds[cond_key(prompt)]["image"] = (latent - mean) / std  # (C, 1, H / 32, W / 32)
        return conds

    def load(self):
        super().load()
        for block in self.vae.decoder.modules():  # 0.9.1's draws noise: recomputing would not repeat
            if hasattr(block, "per_channel_scale1"):
                block.per_channel_scale1 = block.per_channel_scale2 = None

    def denoise(self, x, t, cond):
        frames, height, width = x.shape[2:]
        size = dict(num_frames=frames, height=height, width=width)
        size["rope_interpolation_scale"] = (self.time / self.frame_rate, 32, 32)
        text = {name: value for name, value in cond.items() if name != "image"}
        seen, times = x, t.to(self.device).expand(len(x))
        if "image" in cond:  # the image's tokens come first and are at time 0
            seen = torch.cat([cond["image"], x[:, :, 1:]], dim=2)
            noisy = torch.arange(frames * height * width, device=self.device) >= height * width
            times = times[:, None] * noisy
        tokens = seen.flatten(2).transpose(1, 2).to(self.dtype)
        f = self.denoiser(tokens, timestep=times, **text, **size, return_dict=False)[0]
        f = f.transpose(1, 2).unflatten(2, x.shape[2:]).float()
        if "image" in cond:  # what leads the first latent frame straight to the image
            f = torch.cat([(x[:, :, :1] - cond["image"]) * 1000 / t.to(self.device), f[:, :, 1:]], dim=2)
        return f

    def decode(self, latents, picks):
        """As above. This VAE looks both ways in time and is cheap: it decodes all for any picks."""
        vae, timestep = self.vae, None
        mean, std = (v.view(-1, 1, 1, 1).to(self.device) for v in (vae.latents_mean, vae.latents_std))
        hidden = latents * std / vae.config.scaling_factor + mean
        if vae.config.timestep_conditioning:
            noise = torch.randn(hidden.shape, generator=generator_for("decode noise")).to(self.device)
            hidden = torch.lerp(hidden, noise, self.decode_noise_scale)
            timestep = torch.full((len(hidden),), self.decode_timestep).to(self.device, self.dtype)
        video = vae.decode(hidden.to(self.dtype), timestep, return_dict=False)[0].transpose(1, 2).float()
        split = video.split([1] + [self.time] * (latents.shape[2] - 1), dim=1)
        return straight_through_clamp(torch.cat([split[n] for n in picks], dim=1) / 2 + 0.5)


FAMILIES |= {
    "AnimateDiffPipeline": AnimateDiff,
    "StableDiffusionPipeline": AnimateDiff,
    "StableVideoDiffusionPipeline": StableVideoDiffusion,
    "WanPipeline": Wan,
    "CogVideoXPipeline": CogVideoX,
    "LTXPipeline": LTX,
    "LTXImageToVideoPipeline": LTX,
}


# ---- 12. Memory plan ---------------------------------------------------------------------------------------


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages alive that were made inside, and their peak."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def free(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result


@contextlib.contextmanager
def without_weights():
    """Inside, networks are built from their config files alone, and a tokenizer gives its greatest length."""

    def network(cls, folder, subfolder="", dtype=torch.float32, **_):
        folder, before = Path(folder) / subfolder, torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            if issubclass(cls, diffusers.ModelMixin):
                return cls.from_config(json.loads((folder / "config.json").read_text()))
            built = cls._from_config(cls.config_class.from_pretrained(folder), dtype=dtype)
            built.tie_weights()
            return built
        finally:
            torch.set_default_dtype(before)

    def to(self, *args, **_):
        # tensors without content can't be exchanged in place, as Module.to does
        dtype = next((arg for arg in args if isinstance(arg, torch.dtype)), None)
        for module in self.modules() if dtype else ():
            for name, p in [*module._parameters.items(), *module._buffers.items()]:
                if p is not None and p.is_floating_point() and p.dtype != dtype:
                    cast = p.detach().to(dtype)
                    if isinstance(p, torch.nn.Parameter):
                        cast = torch.nn.Parameter(cast, p.requires_grad)
                    setattr(module, name, cast)
        return self

    def tokenizer(cls, folder, **_):
        file = Path(folder) / "text_encoder" / "config.json"
        config = json.loads(file.read_text()) if file.exists() else {}
        return functools.partial(tokens, longest=config.get("max_position_embeddings", 77))

    def clip_tokenizer(name):
        file = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
        length = json.loads(file.read_text())["model_cfg"]["text_cfg"]["context_length"]
        return lambda text: tokens(text, length).input_ids

    def tokens(text, longest, max_length=None, **_):
        ids = torch.zeros(1, max_length or longest, dtype=torch.long)
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def real(function):
        def call(*args):
            with unset_fake_temporarily():
                return function(*args)

        return call

    def jepa_tokens(self, hidden_states, context_mask, target_mask, mask_index=1):
        # the library's own reads the greatest number of a mask
        target = self.mask_tokens[0].expand(len(hidden_states), target_mask[0].shape[1], -1)
        embedded = torch.cat([self.predictor_embeddings(hidden_states), target], dim=1)
        return embedded, torch.cat([*context_mask, *target_mask], dim=1)

    def checkpointed(network, device, dtype, blocks=()):
        checkpoint_blocks(network, blocks)
        return frozen(network, device, dtype)

    frozen, jepa = rewards.frozen, transformers.models.vjepa2.modeling_vjepa2.VJEPA2PredictorEmbeddings
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (diffusers.ModelMixin, "from_pretrained", classmethod(network)),
            (transformers.PreTrainedModel, "from_pretrained", classmethod(network)),
            (transformers.PreTrainedTokenizerBase, "from_pretrained", classmethod(tokenizer)),
            (rewards.open_clip, "get_tokenizer", clip_tokenizer),
            (rewards, "jepa_masks", real(rewards.jepa_masks)),
            (jepa, "forward", jepa_tokens),
            (rewards, "frozen", checkpointed),
            (torch, "load", lambda *_, **__: {"state_dict": {}}),
            (torch.nn.Module, "to", to),
            (transformers.PreTrainedModel, "init_weights", lambda self: None),
            (torch.nn.Module, "load_state_dict", lambda *_, **__: None),
            (rewards, "hf_hub_download", lambda *names: "/".join(names)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(mock.patch.dict(globals(), pick_frames=real(pick_frames)))
        yield


def resolve_plan(cfg: Config) -> tuple[Config, str, type, list[Prompt]]:
    """As `resolve`, in bf16 (or --dtype) as on a GPU, from configs alone; and prompts for one batch.

    Raises BadInput when there is no config of the model.
    """
    chosen = dict(device="cpu", checkpointing=True, dtype="bf16" if cfg.dtype == "auto" else cfg.dtype)
    cfg, source, family = resolve(dataclasses.replace(cfg, plan=True, **chosen))
    need(Path(source).is_dir(), f"--plan has no configs of {cfg.model}: give one of the README, or a folder")
    cfg = dataclasses.replace(cfg, reward_weights=cfg.reward_weights or str(CONFIGS / "rewards"))
    prompts = [Prompt(f"prompt {n}") for n in range(cfg.batch_size)]
    for prompt in prompts if family.images == "must" else ():
        prompt.image = str(HERE / "tiny" / "photo-cat.jpg")
    return cfg, source, family, prompts


def predict(cfg: Config) -> dict[str, float]:
    """The peak of each phase of one update in GB, from configs alone: its live storages, without content.

    Counts what PyTorch's allocator is asked for; not its rounding, nor CUDA's own. Raises BadInput as
    `resolve_plan`.
    """
    cfg, source, family, prompts = resolve_plan(cfg)
    # one step, the last, is enough; numbers, as tensors without content have none
    schedule = family(source, "cpu", DTYPES[cfg.dtype]).schedule(cfg)
    tables = {name: getattr(schedule, name)[-1:].tolist() for name in "abcpqs"}
    schedule = dataclasses.replace(schedule, t=schedule.t[-1:], **tables)
    cfg = dataclasses.replace(cfg, num_inference_steps=1, backprop_steps=1, grad_steps="last")
    names = iter(["start", "encoding prompts", "loading", "rollout", "score", "walk back", "optimiser"])
    found, idle = {}, 0  # idle: bytes that wait on the host

    def mark(run, **wanted):  # a phase ends where other parts are wanted
        nonlocal idle
        gc.collect()
        found[next(names)] = (memory.peak - idle) / 1e9
        waiting = set()
        for part, scores in loaded_networks(run):
            if not wanted.get("scoring" if scores else "denoiser"):
                waiting.update(part.parameters())
        idle, memory.peak = sum(p.nbytes for p in waiting), memory.now

    with FakeTensorMode(allow_non_fake_inputs=True), LiveStorages() as memory, without_weights():
        with (
            mock.patch.dict(globals(), bring=mark),
            mock.patch.object(family, "schedule", lambda *_: schedule),
        ):
            run = load_run(cfg, source, family, prompts)
            optimizer = make_optimizer(cfg, list(lora_parameters(run.model).values()))
            found["all weights"] = (memory.now - idle) / 1e9
            micro_batch(run, prompts, 0, 0, torch.amp.GradScaler("cpu", enabled=False))
            mark(run, denoiser=True, scoring=not cfg.offload)
            optimizer.step()
            mark(run)
    del found["start"]
    return found


def plan(cfg: Config) -> int:
    """--plan: print `predict`'s gigabytes by phase. Returns 1 if that is more than --vram, else 0."""
    found = predict(cfg)
    for name, size in found.items():
        print(f"{name:18}{size:6.2f} GB")
    peak = max(found.values())
    print(f"{'peak':18}{peak:6.2f} GB predicted; CUDA itself takes about 0.5 more")
    if cfg.vram and peak > cfg.vram:
        lower = [] if cfg.offload else ["add --offload"]
        lower += ["lower --batch_size, --num_frames, --height and --width, --lora_rank"]
        print(f"more than {cfg.vram:g}: {', then '.join(lower)}")
        return 1
    return 0


if __name__ == "__main__" and "__file__" in globals():
    sys.exit(main())
