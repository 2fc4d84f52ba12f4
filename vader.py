"""VADER: align a video diffusion model with a differentiable reward (Prabhudesai et al., arXiv 2407.08737).

    python vader.py --reward aesthetic --prompts prompts.txt                         # train
    python vader.py --mode sample --lora runs/aesthetic-tiny-few/lora                # make videos

The method: make a video from noise without gradient, keeping every step's latents. Score some frames and pull
the gradient through the reward and the VAE to the last latents. Walk the sampler back over the last K steps,
one denoiser call at a time. Every sampler here is affine, so its backward is two multiplications a step. The
graph is cut at frames, latents and steps: peak memory is that of the largest piece, whatever K is.

    x, latents[i]   x_t of the paper, (B, C, F, H, W)   a, b, c   x[i+1] = a[i] x[i] + b[i] f(c[i] x[i], t[i])
    f, denoise      epsilon_theta or v_theta            s         noise added per step, when eta > 0
    g               d loss / d x, walked backwards      w         classifier-free guidance scale
    v               d loss / d frames                   K, T      trained steps, sampling steps

Sections begin with "# ----", what people change is marked "SWAP:". Rewards are in rewards.py. More models,
one a file, are in models/. What --clips, --lora, --base_lora or --push_to_hub ask for is in extras/. Both are
imported where they are used, and can be deleted.
"""

import contextlib
import difflib
import functools
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import re
import shutil
import sys
import time
import zipfile
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import diffusers
import imageio.v3 as iio
import numpy as np
import peft
import psutil
import torch
import torch.distributed as dist
import transformers
from filelock import FileLock
from tqdm import tqdm

import rewards
from rewards import BadInput, as_bad_input, evenly_spaced, require

HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Run or pasted, this module is called __main__; models/ and extras/ import it as vader.
sys.modules.setdefault("vader", sys.modules[__name__])
TOY, PAGE = str(HERE / "tiny" / "rewards"), HERE / "page.html"


# ---- 1. Config ---------------------------------------------------------------------------------------------
def arg(default, help: str):
    """A field of Config; help is its line of --help."""
    return field(default=default, metadata={"help": help.replace("%", "%%")})


@dataclass
class Config:
    """Everything that can be set. None is off, or the model's own default (its class's `presets`)."""

    reward: str = arg("aesthetic", 'a reward of rewards.py or a weighted sum, "aesthetic + 0.5*colorful"')
    prompts: str = arg("prompts.txt", "a text file, one a line (not # lines), or .jsonl with an image each")
    model: str = arg(
        "auto", "auto (modelscope on a CUDA GPU, else tiny-few), a short name, a hub id, a folder"
    )
    mode: Literal["train", "sample", "eval"] = arg("train", "sample: make videos; eval: score base and tuned")
    lora: str | None = arg(None, "folder of a trained LoRA: to sample or score, or where train starts from")
    base_lora: str | None = arg(None, "LoRA that is fused into the base: of few steps, of a style")
    out: str | None = arg(None, "output folder; default runs/<reward>-<model>, runs/<mode>-<reward>-<model>")
    resume: bool = arg(False, "go on with the run in --out, with the same settings (how long may change)")
    seed: int = arg(0, "the same seed gives bitwise the same run on a CPU (and as many threads)")
    # the video and its sampler
    negative_prompt: str = arg("", "what guidance leads away from")
    num_frames: int | None = arg(None, "frames of a video")
    clips: int | None = arg(None, "image to video: clips in a row, each from the last frame before it")
    height: int | None = arg(None, "pixels, a multiple of 8, 16 or 32, as the model's")
    width: int | None = arg(None, "pixels, likewise")
    num_inference_steps: int | None = arg(None, "denoising steps; cost time, not memory")
    guidance_scale: float | None = arg(None, "classifier-free guidance; 1 is off, half the time")
    eta: float = arg(0.0, "share of noise added at each DDIM step; 0 is deterministic")
    timestep_spacing: Literal["trailing", "leading", "linspace"] = arg("trailing", "leading hardly trains")
    # the gradient and the reward
    backprop_steps: int = arg(1, "K, denoising steps that get a gradient; costs time, not memory")
    grad_steps: Literal["auto", "last", "spread", "strongest"] = arg("auto", "auto is the model's")
    coupling: float = arg(1.0, "share of the gradient through a step's input; 1 is exact, K = 1 ignores it")
    detach_uncond: bool = arg(False, "no gradient through the unconditional branch, in half the time")
    decode_frames: int | None = arg(None, "frames scored per update; default what the reward wants")
    decode_chunk: int = arg(1, "frames decoded at once; costs memory")
    checkpointing: bool | None = arg(None, "recompute activations: less memory, more time; default on a GPU")
    offload: bool = arg(False, "what is idle waits in host memory: less memory, more time")
    quantize: Literal["none", "int8", "nf4"] = arg("none", "of the frozen denoiser and `ask`: less memory")
    reward_weights: str | None = arg(None, "folder with sub-folders of rewards, to load these from")
    vlm: str | None = arg(None, "folder or hub id of the vision-language model of the reward ask")
    # the optimiser and the LoRA
    steps: int | None = arg(None, "updates")
    lr: float | None = arg(None, "learning rate of AdamW, constant")
    weight_decay: float = arg(0.01, "of AdamW")
    batch_size: int | None = arg(None, "videos made at once; costs memory")
    grad_accum: int | None = arg(None, "batches per update; costs time")
    max_grad_norm: float = arg(1.0, "longer gradients are shortened to this")
    lora_rank: int | None = arg(None, "rank of each adapter")
    lora_alpha: int | None = arg(None, "adapters are scaled by alpha / rank; default alpha = rank")
    lora_targets: str | None = arg(None, "linear layers by the end of their names; default: attention")
    # evaluation, files, machine
    eval_prompts: str | None = arg(None, "prompt file; default every tenth of --prompts; not trained on")
    eval_every: int | None = arg(None, "updates between evaluations; one more before, one after")
    eval_videos: int = arg(16, "videos per evaluation in training, each time the same; 0: none")
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = arg("none", "where to log as well")
    push_to_hub: str | None = arg(None, "owner/name: where the LoRA goes at the end; public if it is new")
    device: str = arg("auto", "cpu, cuda, cuda:1, mps; auto is cuda where there is one")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = arg("auto", "bf16 if the GPU can, else fp16; CPU fp32")


# Defaults that models share, see `presets` of their classes: those with published weights, those in tiny/.
PUBLISHED = dict(steps=200, eval_every=50, lr=2e-4, batch_size=1, grad_accum=4, lora_rank=16)
TINY = dict(steps=50, eval_every=25, lr=1e-3, batch_size=2, grad_accum=1, lora_rank=8)
TINY |= dict(num_inference_steps=10, height=64, width=64, rewards=TOY)

# SWAP: your model. Write models/mine.py, imitating models/wan.py, and add "models.mine.Class" with its names
# for --model (keys of its `presets`) and the pipelines that it loads (`_class_name` in model_index.json).
FAMILIES = {
    "vader.TextToVideoUNet": ("tiny", "tiny-few", "modelscope", "zeroscope", "TextToVideoSDPipeline"),
    "models.animatediff.AnimateDiff": ("animatediff", "AnimateDiffPipeline", "StableDiffusionPipeline"),
    "models.anyflow.AnyFlow": ("anyflow", "AnyFlowPipeline"),
    "models.cogvideox.CogVideoX": ("cogvideox", "cogvideox-5b", "CogVideoXPipeline"),
    "models.ltx.LTX": ("ltx", "LTXPipeline", "LTXImageToVideoPipeline"),
    "models.svd.StableVideoDiffusion": ("svd", "tiny-i2v", "StableVideoDiffusionPipeline"),
    "models.wan.Wan": ("wan", "tiny-wan", "WanPipeline"),
    "models.wan.Wan22": ("wan2.2-5b", "WanPipeline with expand_timesteps"),
}


# ---- 2. Prompts and randomness -----------------------------------------------------------------------------
class Prompt(NamedTuple):
    """What a video is made from. image: the file that it starts from, where the model takes one."""

    text: str
    image: str | None = None


# SWAP: your prompts.
def read_prompts(path: str, family: type | None = None) -> list[Prompt]:
    """The prompts of a text file, one a line, # lines left out; or of a .jsonl file, see extras/images.py.

    family: of the model, which may want an image with each. Raises BadInput.
    """
    require(Path(path).is_file(), f"no prompt file {path}: give --prompts a text file, one prompt a line")
    kind, text = Path(path).suffix.lower(), Path(path).read_text(encoding="utf-8-sig", errors="replace")
    require(kind in ("", ".txt", ".jsonl"), f"{path}: prompts are read from .txt and .jsonl files")
    require(not {"\0", "\ufffd"} & set(text), f"{path} is not a text file: give one prompt a line, in UTF-8")
    lines = {n: line for n, line in enumerate(map(str.strip, text.split("\n")), 1) if line and line[0] != "#"}
    prompts = [Prompt(line) for line in lines.values()]
    if kind == ".jsonl":
        from extras.images import read_rows

        prompts = read_rows(path, lines, family)
    require(prompts, f"{path} holds no prompts: write one a line")
    images, use = [bool(prompt.image) for prompt in prompts], family.images if family else "no"
    good = all(images) or use == "no" or use == "may" and not any(images)
    require(good, f"{path}: this model starts from an image: use .jsonl, with one in each line")
    return prompts


def split_prompts(cfg: Config, family: type | None = None) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, and held-out ones: --eval_prompts or every tenth of --prompts. Raises BadInput."""
    prompts = [*dict.fromkeys(lines := read_prompts(cfg.prompts, family))]
    if not cfg.eval_videos:
        return prompts, []
    every = min(10, len(prompts))
    held_out = read_prompts(cfg.eval_prompts, family) if cfg.eval_prompts else prompts[every - 1 :: every]
    kept = [prompt for prompt in prompts if prompt not in held_out]
    require(kept or cfg.eval_prompts, f"{cfg.prompts} has one prompt, held back: add more, or --eval_prompts")
    if len(lines) > len(kept) + (0 if cfg.eval_prompts else len(held_out)):
        left = f"{len(kept)} others are left to train on" if kept else "they train too, no gain is held out"
        print(f"{cfg.prompts}: of {len(lines)} prompts some stand twice, or are held out: {left}")
    return kept or prompts, held_out


def generator_for(*key) -> torch.Generator:
    """A CPU generator seeded by a hash of the key: any draw can be made again without saved state."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def batch_prompts(prompts: list[Prompt], cfg: Config, number: int) -> list[Prompt]:
    """The prompts of the run's batch `number`: the file again and again, each time in a new order."""
    chosen = []
    for place in range(number * cfg.batch_size, (number + 1) * cfg.batch_size):
        shuffle = generator_for(cfg.seed, "order", place // len(prompts))
        order = torch.randperm(len(prompts), generator=shuffle)
        chosen.append(prompts[order[place % len(prompts)]])
    return chosen


# ---- 3. Schedule -------------------------------------------------------------------------------------------
class Schedule(NamedTuple):
    """A first-order sampler as tables, one entry per step: x[i+1] = a x[i] + b f(c x[i], t) + s noise."""

    t: torch.Tensor  # (T,) int64, or float32 where the model wants that
    a: list[float]
    b: list[float]
    c: list[float]
    s: list[float]
    start: float = 1.0  # scale of the first noise

    def leverage(self, i: int) -> float:
        """How far the result moves per unit of step i's output: |b[i]| times every |a| after it."""
        return abs(self.b[i] * math.prod(self.a[i + 1 :]))


def tabulate(scheduler, eta=0.0) -> Schedule:
    """The tables of a diffusers scheduler whose timesteps are set, read off its steps on unit vectors.

    For DDIM on noise (Song et al. 2021, eq. 12 and 16), A = alphas_cumprod of a step, A' of the next: c = 1,
    a = sqrt(A' / A), b = sqrt(1 - A' - s^2) - sqrt(A' (1 - A) / A). Raises BadInput where it is not linear.
    """
    tensors = {name: value for name, value in vars(scheduler).items() if isinstance(value, torch.Tensor)}
    for name in tensors.keys() - {"timesteps"}:
        setattr(scheduler, name, tensors[name].double())  # its own float32 would round each step
    # four columns: x alone, f alone, noise alone, x or f in turn and large: clips and memory of steps show
    x, f, noise = torch.eye(3, 4, dtype=torch.float64)[:, None, :, None, None]
    noisy, rows = dict(eta=eta, variance_noise=noise) if eta else {}, []
    rescale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for i, t in enumerate(scheduler.timesteps):
        x[0, 3], f[0, 3] = (100, 0) if i % 2 else (0, 100)
        c = rescale(torch.ones_like(x), t).mean().item()
        a, b, s, large = scheduler.step(f, t, x, **noisy).prev_sample.flatten().tolist()
        linear = math.isclose(large, 100 * (a if i % 2 else b), rel_tol=1e-5, abs_tol=1e-5)
        require(linear and (eta or s == 0), "--model: its scheduler clips or draws noise: take another")
        rows.append((a, b, c, s))
    tables = map(list, zip(*rows, strict=True))
    return Schedule(scheduler.timesteps, *tables, start=float(getattr(scheduler, "init_noise_sigma", 1)))


# ---- 4. The model and its LoRA -----------------------------------------------------------------------------
def straight_through_clamp(x):
    """Clamp to [0, 1] with the gradient of the identity: an over-bright pixel can still be told to darken."""
    return x + (x.clamp(0, 1) - x).detach()


class TextToVideoUNet:
    """ModelScope, ZeroScope, tiny: a 3D U-Net and DDIM. The families in models/ give what differs."""

    # what --model takes: where it loads from, and defaults; hub ids and folders take the first one's
    modelscope = dict(source="ali-vilab/text-to-video-ms-1.7b", num_frames=16, height=256, width=256)
    modelscope |= PUBLISHED | dict(num_inference_steps=25, guidance_scale=9.0)
    zeroscope = modelscope | dict(source="cerspense/zeroscope_v2_576w", num_frames=24, height=320, width=576)
    tiny = TINY | dict(source=str(HERE / "tiny" / "t2v"), num_frames=8, guidance_scale=4.0)
    few = dict(base_lora=f"{HERE}/tiny/few", num_inference_steps=4, guidance_scale=1, steps=40, eval_every=20)
    presets = {"modelscope": modelscope, "zeroscope": zeroscope, "tiny": tiny, "tiny-few": tiny | few}

    text_pipeline = diffusers.TextToVideoSDPipeline  # stock, for its encode_prompt
    lora_pipeline = None  # stock, where its load_lora_weights works
    denoiser_class, folder = diffusers.UNet3DConditionModel, "unet"
    vae_class = diffusers.AutoencoderKL
    # blocks whose activations are recomputed, in the denoiser and in the VAE
    checkpointed = ("ResnetBlock2D", "Transformer2DModel", "TransformerTemporalModel", "TemporalConvLayer")
    vae_checkpointed = ("ResnetBlock2D",)
    multiple, frame_multiple = 8, 1  # of height and width; of the number of frames less one
    scale, frames_per_latent = 8, 1  # pixels in a latent pixel; frames in a latent frame, but the first: one
    stochastic, grad_steps = True, "last"  # does the sampler take --eta? the default of that setting
    inputs = 1  # how many latents side by side the denoiser takes
    max_tokens = None  # of a prompt that the text encoder reads; its tokenizer's own limit
    images = "no"  # is the video made from an image: no, may, must

    def __init__(self, source: str, device: str, dtype: torch.dtype):
        self.source, self.device, self.dtype = source, device, dtype
        self.denoiser = self.vae = self.image_encoder = None
        self.fused = ""  # what --base_lora did, for a LoRA's README.md

    @classmethod
    def build_on_meta(cls, source) -> torch.nn.Module:
        """The denoiser without its weights. Raises BadInput for a checkpoint that there is no code for."""
        config, vae = (read_config(source, f"{name}/config.json") for name in (cls.folder, "vae"))
        for found, kind in ((config, cls.denoiser_class), (vae, cls.vae_class)):
            is_that = found.get("_class_name") == kind.__name__
            require(is_that, f"{source} has a {found.get('_class_name')}, there is code for {kind.__name__}")
        with torch.device("meta"), as_bad_input(f"{source}: a config.json is damaged"):
            made = cls.denoiser_class.from_config(config)
            channels = cls.inputs * (vae.get("latent_channels") or vae["z_dim"])
            require(made.config.in_channels == channels, f"{source}: no code for other inputs than latents")
            levels = len(vae.get("block_out_channels", ())) if cls.scale == 8 else 0  # 0: says it otherwise
            require(levels in (0, 4), f"{source}: no code for a VAE of another scale than {cls.scale}")
        return made

    def schedule(self, cfg: Config) -> Schedule:
        config = read_config(self.source, "scheduler/scheduler_config.json")
        scheduler = diffusers.DDIMScheduler.from_config(config, timestep_spacing=cfg.timestep_spacing)
        scheduler.set_timesteps(cfg.num_inference_steps)
        return tabulate(scheduler, cfg.eta)

    @torch.no_grad()
    def encode(self, prompts: list[Prompt], cfg: Config) -> dict[Prompt, dict]:
        """{prompt: what `denoise` is given, without batch dimension}, by the stock pipeline; it is freed."""
        pipe = self.stock(self.text_pipeline, "text_encoder", "tokenizer")
        limit = self.max_tokens or pipe.tokenizer.model_max_length
        long = [prompt.text for prompt in prompts if len(pipe.tokenizer(prompt.text).input_ids) > limit]
        if long:
            print(f"{len(long)} prompts are cut at {limit} tokens, the first is {long[0][:60]!r}...")
        return {prompt: self.encode_text(pipe, prompt.text) for prompt in prompts}

    def stock(self, pipeline, *names):
        """A stock pipeline with only these of its parts, on the device. Raises BadInput."""
        takes = inspect.signature(pipeline).parameters
        parts = {name: None for name, part in takes.items() if part.default is part.empty}
        for name in names:
            parts[name] = rewards.load(takes[name].annotation, self.source, "--model", name, self.dtype)
        return pipeline(**parts).to(self.device)

    def encode_text(self, pipe, text: str) -> dict:
        return {"encoder_hidden_states": pipe.encode_prompt(text, self.device, 1, False)[0][0]}

    def load(self):
        """Load the denoiser and the VAE, frozen, without dropout (recomputing must give the same numbers)."""
        load = functools.partial(rewards.load, source=self.source, flag="--model", dtype=self.dtype)
        self.denoiser = self.denoiser or load(self.denoiser_class, subfolder=self.folder)
        self.vae = self.vae or load(self.vae_class, subfolder="vae")
        for part in (self.denoiser, self.vae):
            part.to(self.device).eval().requires_grad_(False)

    def recompute(self):
        """Recompute activations in the backward pass, block by block."""
        rewards.checkpoint_blocks(self.denoiser, self.checkpointed)
        rewards.checkpoint_blocks(self.vae, self.vae_checkpointed)

    def latent_shape(self, cfg: Config) -> tuple[int, ...]:
        """(C, F, H, W) of one video's latents."""
        vae = read_config(self.source, "vae/config.json")
        frames = 1 + (cfg.num_frames - 1) // self.frames_per_latent
        channels = vae.get("latent_channels") or vae["z_dim"]
        return channels, frames, cfg.height // self.scale, cfg.width // self.scale

    def frames_in(self, n: int) -> int:
        """Frames that latent frame n holds."""
        return self.frames_per_latent if n else 1

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
        scaled = (latents / self.vae.config.scaling_factor).to(self.dtype)
        frames = [self.vae.decode(scaled[:, :, n], return_dict=False)[0].float() for n in picks]
        return straight_through_clamp(torch.stack(frames, dim=1) / 2 + 0.5)


def add_lora(model, cfg: Config):
    """Put float32 low-rank adapters (Hu et al. 2021) on the frozen denoiser: new ones, or those in --lora."""
    if cfg.lora:
        model.denoiser = peft.PeftModel.from_pretrained(model.denoiser, cfg.lora, is_trainable=True).eval()
        return
    torch.manual_seed(cfg.seed)
    targets = [target.strip() for target in cfg.lora_targets.split(",")]
    config = peft.LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules=targets)
    model.denoiser = peft.get_peft_model(model.denoiser, config)


def lora_parameters(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.denoiser.named_parameters() if p.requires_grad}


# ---- 5. Rollout, score, walk back --------------------------------------------------------------------------
@dataclass
class Run:
    """What a run works with. terms: {name: (weight, reward)}; conds: {prompt: what `denoise` is given}."""

    cfg: Config
    model: TextToVideoUNet
    schedule: Schedule
    terms: dict
    conds: dict


class Batch(NamedTuple):
    """B videos that are made together, and maybe differentiated."""

    prompts: list[Prompt]
    noise: torch.Tensor  # (B, C, F, H, W) float32
    cond: dict  # what `denoise` is given, {name: (B, ...)}
    uncond: dict  # without the text
    generator: torch.Generator  # for what is drawn on the way
    picks: list[int]  # latent frames that are scored
    trained: list[int]  # sampling steps that get a gradient
    scale: float = 1.0  # of the loss: 1 / (grad_accum * processes), times that of fp16


def make_batch(run: Run, prompts: list[Prompt], noise, generator, picks=(), trained=(), scale=1.0) -> Batch:
    """A Batch, with what run.conds knows of its prompts."""
    rows, empty = [run.conds[prompt] for prompt in prompts], run.conds[Prompt(run.cfg.negative_prompt)]
    cond = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    # an image, which the empty prompt has not, is given to both guidance branches
    uncond = cond | {name: value.expand(len(rows), *value.shape) for name, value in empty.items()}
    return Batch(prompts, noise, cond, uncond, generator, picks, trained, scale)


def pick_latent_frames(run: Run, generator) -> list[int]:
    """Latent frames to score: random ones, or those of evenly spaced frames if a reward wants several."""
    frames, wants = run.cfg.num_frames, [getattr(reward, "frames", 1) for _, reward in run.terms.values()]
    inside = [k for k in range(frames) for _ in range(run.model.frames_in(k))]  # of which latent, by frame
    wanted = max((frames if n == "all" else n for n in wants), default=1)
    n = min(run.cfg.decode_frames or wanted, frames)
    if wanted > 1:
        return sorted({inside[frame] for frame in evenly_spaced(n, frames)})
    return sorted(torch.randperm(inside[frames - 1] + 1, generator=generator)[:n].tolist())


def trained_steps(run: Run) -> list[int]:
    """Which K of the T sampling steps train: last (DRaFT-K), spread (DRTune), of most leverage."""
    K, T, kind = run.cfg.backprop_steps, len(run.schedule.t), run.cfg.grad_steps
    if kind == "strongest":
        return sorted(sorted(range(T), key=run.schedule.leverage)[-K:])
    return evenly_spaced(K, T) if kind == "spread" and K > 1 else list(range(T - K, T))


@torch.no_grad()
def rollout(run: Run, batch: Batch) -> list:
    """Sample without gradient, both guidance branches at once -> T + 1 latents (B, C, F, H, W) float32."""
    if run.cfg.clips:
        return run.model.rollout(run, batch)
    model, schedule, cond, x = run.model, run.schedule, batch.cond, run.schedule.start * batch.noise
    latents, guided = [x], run.cfg.guidance_scale != 1
    w = model.guidance(run.cfg.guidance_scale, x.shape[2])
    if guided:
        cond = {name: torch.cat([batch.uncond[name], value]) for name, value in cond.items()}
    for i, t in enumerate(schedule.t):
        scaled = schedule.c[i] * x
        f = model.denoise(torch.cat([scaled, scaled]) if guided else scaled, t, cond)
        if guided:
            f_uncond, f_cond = f.chunk(2)
            f = f_uncond + w * (f_cond - f_uncond)
        x = schedule.a[i] * x + schedule.b[i] * f
        if schedule.s[i] > 0:
            x = x + schedule.s[i] * torch.randn(x.shape, generator=batch.generator).to(x.device)
        latents.append(x)
    return latents


def score(run: Run, batch: Batch, x):
    """Reward the picked frames of clean latents x and pull the gradient back to x, chunk by chunk.

    x: (B, C, F, H, W) float32. Returns the rewards' figures, and g like x: of batch.scale x minus their mean.
    """
    cfg, picks, texts = run.cfg, batch.picks, [prompt.text for prompt in batch.prompts]
    pieces = [picks[i : i + cfg.decode_chunk] for i in range(0, len(picks), cfg.decode_chunk)]
    with torch.no_grad():
        video = run.model.decode(x, picks).requires_grad_()  # (B, N, 3, H, W)
    sizes = [sum(map(run.model.frames_in, piece)) for piece in pieces]
    found = rewards.weighted_rewards(run.terms, video, texts, cfg.decode_chunk, batch.scale)
    v = -video.grad / len(x)
    del video
    x = x.detach().requires_grad_()
    for piece, pull in zip(pieces, v.split(sizes, dim=1), strict=True):
        run.model.decode(x, piece).backward(pull)
    return found, x.grad


# SWAP: your gradient estimator. It may draw with batch.generator, and call `rollout` and `score` again.
def walk_back(run: Run, batch: Batch, latents, g):
    """Backward of `rollout`: accumulate LoRA gradients, one guidance branch of one trained step at a time.

    latents: T + 1, (B, C, F, H, W); g: d loss / d latents[-1]. Through a step's input goes cfg.coupling of
    the gradient: 1 is exact (DRaFT-K), 0 detaches it (DRTune).
    """
    cfg, model, schedule = run.cfg, run.model, run.schedule
    w, earliest = model.guidance(cfg.guidance_scale, g.shape[2]), min(batch.trained)
    branches = [(batch.cond, w), (batch.uncond, 1 - w)]
    if cfg.detach_uncond or cfg.guidance_scale == 1:
        branches = [(batch.cond, w)]
    for i in range(len(schedule.t) - 1, earliest - 1, -1):
        a, b, c, t = schedule.a[i], schedule.b[i], schedule.c[i], schedule.t[i]
        x = latents[i].detach().requires_grad_(cfg.coupling > 0 and i > earliest)
        for cond, share in branches if i in batch.trained else ():  # others only pass g on
            f = model.denoise(c * x, t, cond)
            f.backward(share * b * g)
            del f  # before the next branch builds its graph
        g = a * g if x.grad is None else a * g + cfg.coupling * x.grad


# ---- 6. Training -------------------------------------------------------------------------------------------
def offload_idle(run: Run, denoiser=False, scoring=False):
    """On the device: the denoiser? what scores (the VAE, the rewards)? All else waits in host memory."""
    parts = [(run.model.denoiser, denoiser), (run.model.vae, scoring), (run.model.image_encoder, scoring)]
    parts += [(net, scoring) for _, reward in run.terms.values() for net in getattr(reward, "networks", ())]
    for part, wanted in sorted(parts, key=lambda entry: entry[1]):  # first make room
        if part is not None:
            part.to(run.model.device if wanted else "cpu")


def micro_batch(run: Run, prompts: list[Prompt], step: int, number: int, scale=1.0):
    """Rollout, score, walk back: adds to the LoRA's gradients -> the rewards' figures, {name: (B,)}."""
    cfg, model, draw = run.cfg, run.model, generator_for(run.cfg.seed, step, number)
    noise = torch.randn(len(prompts), *model.latent_shape(cfg), generator=draw).to(model.device)
    batch = make_batch(run, prompts, noise, draw, pick_latent_frames(run, draw), trained_steps(run), scale)
    offload_idle(run, denoiser=True, scoring=not cfg.offload)
    latents = rollout(run, batch)
    offload_idle(run, denoiser=not cfg.offload, scoring=True)
    found, g = score(run, batch, latents[-1])
    offload_idle(run, denoiser=True, scoring=not cfg.offload)
    walk_back(run, batch, latents, g)
    return found


# SWAP: your optimiser.
def make_optimizer(run: Run):
    weights, cfg = lora_parameters(run.model).values(), run.cfg
    return torch.optim.AdamW(weights, lr=cfg.lr, weight_decay=cfg.weight_decay)


def update(run: Run, prompts: list[Prompt], step: int, optimizer, scaler=None) -> dict:
    """One step on the gradient of grad_accum batches a process, where finite -> row of metrics.jsonl."""
    cfg, start, found, (rank, world) = run.cfg, time.time(), {}, ranks()
    scaler = scaler or torch.amp.GradScaler(run.model.device, enabled=False)
    cuda = torch.cuda if run.model.device.startswith("cuda") else None
    if cuda:
        cuda.reset_peak_memory_stats()  # or the peak is that of encoding the prompts
    parameters = list(lora_parameters(run.model).values())
    optimizer.zero_grad()
    # asked for by scaling a one: a scaler has no scale before it has scaled something
    scale = scaler.scale(torch.ones((), device=parameters[0].device)).item() / (cfg.grad_accum * world)
    for m in range(cfg.grad_accum):
        number = (step * cfg.grad_accum + m) * world + rank
        chosen = batch_prompts(prompts, cfg, number)
        for name, value in micro_batch(run, chosen, step, number, scale).items():
            found.setdefault(name, []).extend(value.tolist())
    if world > 1:
        for p in parameters:
            dist.all_reduce(p.grad)  # a sum: the mean, as the loss is scaled by 1 / world
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm).item()
    if math.isfinite(norm):
        scaler.step(optimizer)
    scaler.update()
    memory = cuda.max_memory_reserved() if cuda else psutil.Process().memory_info().rss
    row = {"step": step + 1, "prompts": [prompt.text for prompt in chosen]}
    row |= {name: float(np.mean(values)) for name, values in found.items()}
    return row | {"grad_norm": norm, "seconds": time.time() - start, "memory_gb": memory / 1e9}


def train(cfg: Config, reward=None) -> list[dict]:
    """Fine-tune a LoRA on cfg.reward, or on your own function (frames, prompts) -> (B,); see rewards.py.

    Returns the rows of metrics.jsonl. Raises BadInput, and FloatingPointError when the base model's reward or
    ten gradients in a row are not finite. Stopped, `train(replace(cfg, resume=True))` goes on.
    """
    cfg, source, family = resolve(cfg, reward)
    prompts, held_out = split_prompts(cfg, family)
    out, (rank, world) = Path(cfg.out), ranks()
    eval_prompts = [held_out[n % len(held_out)] for n in range(cfg.eval_videos)]
    with open_run(cfg, prompts + held_out) as (now, state):
        run = load_run(cfg, source, family, prompts + held_out, reward)
        model, optimizer, step, skipped, in_a_row = run.model, make_optimizer(run), 0, 0, 0
        scaler = torch.amp.GradScaler(model.device, init_scale=2.0**12, enabled=cfg.dtype == "fp16")
        if state:
            step, skipped = restore_checkpoint(run, optimizer, scaler, state)
        if world > 1:
            dist.barrier()  # all have looked into the output folder
        if rank == 0:
            versions = {part.__name__: part.__version__ for part in (torch, diffusers, peft, transformers)}
            write_atomic(out / "config.json", json.dumps(vars(cfg) | now | {"versions": versions}, indent=1))
            rows = [to_json(row) + "\n" for row in read_metrics(out) if state and row["step"] <= step]
            write_atomic(out / "metrics.jsonl", "".join(rows))
            track = None
            if cfg.tracker != "none":
                from extras.tracker import make_tracker

                track = make_tracker(cfg)
            leverage = {i: round(run.schedule.leverage(i), 3) for i in trained_steps(run)}
            print(f"leverage of the steps that train (under 0.05 they hardly move the video): {leverage}")
        evaluated = {row["step"]: row["eval"] for row in read_metrics(out) if "eval" in row}
        while True:
            due = step not in evaluated and (step % cfg.eval_every == 0 or step == cfg.steps)
            if rank == 0 and held_out and due:
                found = evaluated[step] = evaluate(run, eval_prompts, f"samples/step_{step:06d}")
                if step == 0 and not np.isfinite(found["reward"]).all():
                    raise FloatingPointError(f"{cfg.reward} of the videos before training is not finite")
                append_metrics(out, {"step": step, "eval": found}, track)
                change = summary(evaluated[min(evaluated)]["reward"], found["reward"])
                print(f"update {step}: held-out reward {change}" + f"; base: {cfg.lora}" * bool(cfg.lora))
            if rank == 0:
                write_page(cfg, read_metrics(out))
            if step == cfg.steps:
                break
            stop = min(cfg.steps, (step // cfg.eval_every + 1) * cfg.eval_every)
            with tqdm(range(step, stop), initial=step, total=cfg.steps, desc="train", disable=rank) as bar:
                for step in bar:
                    row = update(run, prompts, step, optimizer, scaler)
                    finite = math.isfinite(row["grad_norm"])
                    in_a_row, skipped = (0, skipped) if finite else (in_a_row + 1, skipped + 1)
                    if in_a_row == 10:
                        what = "gradients" if math.isfinite(row["reward"]) else f"rewards ({cfg.reward})"
                        what += f" in a row not finite, at update {step + 1}, prompts {row['prompts']}"
                        way = f"mend the reward, or lower --lr, with --lora {out}/lora and another --out"
                        raise FloatingPointError(f"ten {what}, seed {cfg.seed}: {way}")
                    if rank == 0:
                        append_metrics(out, row | {"skipped": skipped}, track)
                        save_lora(model, out / "lora", cfg)
                        save_checkpoint(run, optimizer, scaler, step=step + 1, skipped=skipped)
                    shown = ("reward", "grad_norm", "seconds", "memory_gb")
                    bar.set_postfix({name: f"{row[name]:.3g}" for name in shown})
            step = stop
        page = f"open {out}/index.html" if PAGE.exists() else "no page.html beside vader.py, so no page"
        print(f"done: {page}; the LoRA is in {out}/lora")
        if world > 1:
            dist.destroy_process_group()
        if rank == 0 and cfg.push_to_hub:
            from extras.hub import push

            push(cfg, read_metrics(out))
        return read_metrics(out)


# ---- 7. Evaluation and page --------------------------------------------------------------------------------
def write_video(path: Path, video):
    """video: (F, 3, H, W) float in [0, 1] -> an mp4 that browsers play, enlarged to at least 256 pixels."""
    frames = (video.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
    zoom = max(1, math.ceil(256 / frames.shape[2]))
    frames = frames.repeat(zoom, axis=1).repeat(zoom, axis=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, frames, plugin="FFMPEG", fps=8, codec="libx264", quality=9, macro_block_size=2)


@torch.no_grad()
def make_videos(run: Run, prompts: list[Prompt], first=0):
    """A whole video per prompt, (B, F, 3, H, W) float32 in [0, 1]; number `first` + n has noise n."""
    cfg, model = run.cfg, run.model
    offload_idle(run, denoiser=True, scoring=not cfg.offload)
    draws = [generator_for(cfg.seed, "eval", first + n) for n in range(len(prompts))]
    noise = torch.stack([torch.randn(model.latent_shape(cfg), generator=g) for g in draws]).to(model.device)
    latents = rollout(run, make_batch(run, prompts, noise, draws[0]))[-1]
    offload_idle(run, denoiser=not cfg.offload, scoring=True)
    return model.decode(latents, range(latents.shape[2]))


@torch.no_grad()
def evaluate(run: Run, prompts: list[Prompt], folder: str) -> dict:
    """A video per prompt into `folder` of --out, all frames scored: {"folder", "prompts", rewards' lists}."""
    cfg, result = run.cfg, {"folder": folder, "prompts": [prompt.text for prompt in prompts]}
    for first in tqdm(range(0, len(prompts), cfg.batch_size), desc=f"videos {folder}", leave=False):
        batch = prompts[first : first + cfg.batch_size]
        videos, texts = make_videos(run, batch, first), [prompt.text for prompt in batch]
        found = rewards.weighted_rewards(run.terms, videos, texts, cfg.decode_chunk) if run.terms else {}
        for name, values in found.items():
            result.setdefault(name, []).extend(values.tolist())
        for n, video in enumerate(videos, first):
            write_video(Path(cfg.out) / folder / f"{n:03d}.mp4", video)
    return result


def paired_gain(base: list[float], tuned: list[float]) -> tuple[float, float]:
    """Mean of the differences between videos of the same prompt and noise, and its standard error."""
    gains = np.array(tuned, dtype=float) - np.array(base, dtype=float)  # null, in a file, is NaN
    error = gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    return float(gains.mean()), float(error)


def summary(base: list[float], tuned: list[float]) -> str:
    (gain, error), n, (old, new) = paired_gain(base, tuned), len(base), np.array([base, tuned], float).mean(1)
    return f"{old:.3f} -> {new:.3f} ({gain:+.3f}, standard error {error:.3f}, {n} videos, paired seeds)"


def write_page(cfg: Config, rows: list[dict]):
    """index.html, which is page.html, and its data: the rows of metrics.jsonl."""
    data = to_json({"config": vars(cfg), "rows": rows, "toy": "rewards" in find_model(cfg.model)[2]})
    write_atomic(Path(cfg.out) / "data.js", f"window.run = {data};\n")
    folders = [Path(cfg.out) / row["eval"]["folder"] for row in rows if "eval" in row]
    lost = [folder.name for folder in folders if not (folder / "000.mp4").exists()]
    if lost:
        print(f"the page has no videos of {', '.join(lost)}: they are gone")
    if PAGE.exists():
        write_atomic(Path(cfg.out) / "index.html", PAGE.read_bytes())


# ---- 8. Files and resume -----------------------------------------------------------------------------------
def ranks() -> tuple[int, int]:
    """This process's number, and how many there are, as torchrun tells them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def write_atomic(path: Path, content: str | bytes):
    """Write a file so that a kill leaves the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(".tmp-vader-" + path.name)
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def save_lora(model, folder: Path, cfg: Config | None = None):
    """Write the LoRA for PEFT; for stock `load_lora_weights` and ComfyUI where they can; cfg: for headers."""
    staging, config = folder.with_name(".tmp-vader-lora"), model.denoiser.peft_config["default"]
    base = Path(model.source).name if Path(model.source).exists() else model.source
    model.denoiser.get_base_model().register_to_config(_name_or_path=base)
    config.base_model_name_or_path = base
    config.target_modules = sorted(config.target_modules)  # a set, in another order in each process
    write_atomic(staging / "README.md", f"---\ntags: [vader]\n---\nA LoRA of VADER on {base}{model.fused}.\n")
    model.denoiser.save_pretrained(staging, save_embedding_layers=False)
    if model.lora_pipeline:
        from extras.lora_files import save_stock

        save_stock(model, staging, cfg)
    for file in staging.iterdir():  # whole, and as readable as others: safetensors' own are private
        write_atomic(folder / file.name, file.read_bytes())
    shutil.rmtree(staging)


def to_json(value) -> str:
    """Json, which has no NaN and no infinity: null."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), ensure_ascii=False)


def read_metrics(out: Path) -> list[dict]:
    """The rows of metrics.jsonl; a last line that a kill cut short is left out. Raises BadInput."""
    path = out / "metrics.jsonl"
    with as_bad_input(f"{path} is damaged: give another --out"):
        *lines, _ = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
        rows = sorted(map(json.loads, lines), key=lambda row: int(row["step"]))
        for found in (row["eval"] for row in rows if "reward" in row.get("eval", {})):
            paired_gain(found["reward"], [0.0] * len(found["prompts"]))  # raises unless a number for each
        return rows


def append_metrics(out: Path, row: dict, track=None):
    """Add a row to metrics.jsonl, and give it to the function `track`, of --tracker."""
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(to_json(row) + "\n")
    if track:
        track(row)


def find_checkpoint(cfg: Config, prompts: list[Prompt]) -> tuple[dict, dict | None]:
    """What must stay when a run goes on, and its checkpoint; None before its first one. Raises BadInput."""
    free = set("out resume steps eval_every tracker push_to_hub device prompts eval_prompts".split())
    places = {"model", "lora", "base_lora", "reward_weights", "vlm"}  # the same by another path
    now = {name: value for name, value in vars(cfg).items() if name not in free}
    used = [(text, image and Path(image).is_file() and Path(image).read_bytes()) for text, image in prompts]
    now |= {"processes": ranks()[1], "prompts used": hashlib.sha256(repr(used).encode()).hexdigest()}

    out, file = Path(cfg.out), Path(cfg.out) / "checkpoint" / "state.pt"
    found = {path.name for path in out.glob("[!.]*")}
    run = cfg.mode == "train" and "config.json" in found
    updates = max([row["step"] for row in read_metrics(out)], default=0) if run else 0
    # nothing yet, or a kill during its first update, which at most had its LoRA written
    if not found or run and updates < 2 and not file.exists() and (cfg.resume or "lora" not in found):
        return now, None
    require(run, f"{out} is not empty: give another --out")
    require(cfg.resume, f"{out} holds a run: add --resume to go on with it, or give another --out")
    then, anew = rewards.read_json(out / "config.json"), f"go on with --lora {out}/lora and another --out"
    for name, value in now.items():
        old = then.get(name)
        place = name in places and isinstance(old, str) and value
        same = old == value or place and Path(old).exists() and Path(old).resolve() == Path(value).resolve()
        said = {"prompts used": "with other prompts", "processes": f"with {old} processes"}.get(name)
        said = said or (f"without --{name}" if old is None else f"with --{name} {old}")
        require(same, f"{out} was started {said}: resume it so, or give another --out")
    with as_bad_input(f"{file} is gone or damaged: {anew}"):
        require(zipfile.ZipFile(file).testzip() is None, f"{file} is damaged: {anew}")
        state = torch.load(file, map_location="cpu", weights_only=True)
        require(
            state["step"] <= cfg.steps, f"{out} has {state['step']} updates: give --steps as many, or more"
        )
        require(updates >= state["step"] >= 1, f"{out} has lost rows of its metrics.jsonl: {anew}")
        return now, state


def save_checkpoint(run: Run, optimizer, scaler, **counts):
    """Write what `restore_checkpoint` takes back; counts: step, skipped."""
    lora = {name: p.detach() for name, p in lora_parameters(run.model).items()}
    state = dict(lora=lora, optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
    torch.save(state | counts, file := io.BytesIO())
    write_atomic(Path(run.cfg.out) / "checkpoint" / "state.pt", file.getvalue())


def restore_checkpoint(run: Run, optimizer, scaler, state: dict) -> tuple[int, int]:
    """Load a checkpoint -> updates made, and skipped. Raises BadInput."""
    with as_bad_input(f"{run.cfg.out}/checkpoint/state.pt is damaged: give another --out"):
        same = state["lora"].keys() == lora_parameters(run.model).keys()
        same = same and all(w.isfinite().all() for w in state["lora"].values())
        require(same, f"{run.cfg.out}/checkpoint/state.pt holds no such LoRA, whole: give another --out")
        run.model.denoiser.load_state_dict(state["lora"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        return int(state["step"]), int(state["skipped"])


@contextlib.contextmanager
def open_run(cfg: Config, prompts: list[Prompt]):
    """Hold --out for this process alone -> what `find_checkpoint` found. Raises BadInput."""
    out, found = Path(cfg.out), find_checkpoint(cfg, prompts)
    with contextlib.ExitStack() as stack:
        with as_bad_input(f"--out {out} is in use by another process, or can't be written: give another"):
            out.mkdir(parents=True, exist_ok=True)
            if ranks()[0] == 0:
                stack.enter_context(FileLock(out / ".lock", timeout=0))
                write_atomic(out / ".tmp-vader-room", bytes(1 << 20))
                for left in out.glob(".tmp-vader-*"):  # by a kill
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield found


# ---- 9. Checking the settings, loading the run -------------------------------------------------------------
# Lowest and highest value where that is not 1 to 1e9 (whole numbers) or 0 to 1e9 (others).
RANGES = dict(seed=(0, 2**62), num_inference_steps=(1, 1000), guidance_scale=(1, 1e3), lr=(1e-12, 1e3))
RANGES |= dict(eta=(0, 1), coupling=(0, 1), num_frames=(1, 1024), max_grad_norm=(1e-12, 1e9))
RANGES |= dict(clips=(1, 100), eval_videos=(0, 1e5), lora_rank=(1, 1024), height=(1, 4096), width=(1, 4096))

# What a model_index.json may hold. What else it holds changes what is computed: named after the pipeline.
PARTS = "_class_name _diffusers_version _name_or_path unet transformer vae scheduler tokenizer text_encoder"
PARTS += " image_encoder feature_extractor motion_adapter safety_checker requires_safety_checker"


def check_fields(cfg: Config):
    """Raises BadInput for a value that its field does not allow."""
    for name, hint in get_type_hints(Config).items():
        value, options = getattr(cfg, name), get_args(hint) or (hint,)
        if get_origin(hint) is Literal:
            require(value in options, f"--{name} {value}: give one of {', '.join(options)}")
            continue
        require(value != "" or name == "negative_prompt", f"--{name} is empty: give a value, or leave it out")
        kinds = (*options, int) if float in options else options
        require(isinstance(value, kinds), f"{name} is {value!r}: give a {options[0].__name__}")
        if type(value) in (int, float):
            low, high = RANGES.get(name, (0 if float in options else 1, 1e9))
            require(low <= value <= high, f"--{name} {value:g}: must be from {low:g} to {high:g}")


def read_config(model: str, name: str) -> dict:
    """A json file of a model that is a folder or a hub id (then it is downloaded). Raises BadInput."""
    return rewards.read_json(rewards.fetch(model, name, "--model"))


@functools.cache
def find_model(model: str) -> tuple[type, str, dict]:
    """The class of --model, where it loads from, and its defaults. Raises BadInput."""
    line_of, name = {name: line for line, names in FAMILIES.items() for name in names}, model
    pipelines = [name for name in line_of if "Pipeline" in name]
    if model in pipelines or model not in line_of:
        near = difflib.get_close_matches(model, line_of.keys() - pipelines, n=1, cutoff=0)[0]
        require(Path(model).exists() or "/" in model, f"unknown model {model!r}: did you mean {near!r}?")
        index = read_config(model, "model_index.json")
        more = [key for key in index.keys() - PARTS.split() if index[key] not in (None, False, [None, None])]
        name = " with ".join([str(index.get("_class_name")), *sorted(more)])
        require(name in pipelines, f"{model} is a {name}; there is code for: {', '.join(pipelines)}")
    module, _, class_name = line_of[name].rpartition(".")
    family = getattr(importlib.import_module(module), class_name)
    preset = family.presets.get(model) or next(iter(family.presets.values())) | {"source": model}
    return family, preset["source"], preset


def resolve(cfg: Config, reward=None) -> tuple[Config, str, type]:
    """Check what can be checked before a model loads -> the full config, where it loads from, its class."""
    check_fields(cfg)
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    require(re.match("(cpu|cuda|mps)(:|$)", device), f"--device {device}: give cpu, cuda, cuda:1 or mps")
    with as_bad_input(f"--device {device}: no usable one here, leave the flag out"):
        torch.empty(0, device=device)
    cuda = device.startswith("cuda")
    auto = "modelscope" if cuda else "tiny-few" if (HERE / "extras").is_dir() else "tiny"
    model = auto if cfg.model == "auto" else cfg.model
    family, source, preset = find_model(model)
    cfg = replace(cfg, base_lora=cfg.base_lora or preset.get("base_lora"))
    half = "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    name = getattr(reward, "__name__", "custom") if reward else cfg.reward
    label = re.sub(r"[^\w.]+", "-", f"{cfg.mode}-{name}-{Path(model).name if '/' in model else model}")
    found = preset | dict(grad_steps=family.grad_steps, checkpointing=device != "cpu")
    found |= dict(lora_alpha=cfg.lora_rank or preset["lora_rank"], lora_targets="to_q,to_k,to_v,to_out.0")
    found |= dict(dtype=half if cuda else "fp32", out=f"runs/{label.removeprefix('train-').strip('-')}")
    found["num_frames"] *= cfg.clips or 1
    given = {name: value for name, value in vars(cfg).items() if value not in (None, "auto", "none")}
    family.build_on_meta(source)  # raises when the checkpoint needs code that the family lacks
    asked = given.keys() & {"lora", "base_lora", "lora_targets", "quantize", "tracker", "push_to_hub"}
    if asked:  # --lora brings its own rank, alpha and targets
        from extras.checks import check_flags

        found |= check_flags(cfg, family, source, device, given)
    found |= given | {"model": model, "device": device, "reward": name}
    cfg = replace(cfg, **{name: found[name] for name in vars(cfg).keys() & found.keys()})

    if cfg.clips:
        from extras.clips import chain

        family = chain(family, cfg)
    K, T, frames, scored = cfg.backprop_steps, cfg.num_inference_steps, cfg.num_frames, cfg.decode_frames or 1
    require(K <= T, f"--backprop_steps {K}: there are only {T} denoising steps, use {T} or less")
    require(scored <= frames, f"--decode_frames {scored}: the video has only {frames} frames")
    side, group = family.multiple, family.frame_multiple
    require(cfg.height % side == cfg.width % side == 0, f"--height and --width must be multiples of {side}")
    require((frames - 1) % group == 0, f"--num_frames {frames}: must be 1 more than a multiple of {group}")
    require(
        cfg.eta == 0 or family.stochastic, "--eta adds noise in DDIM; this model has another sampler: eta 0"
    )
    require(cfg.dtype != "fp16" or cuda, f"--dtype fp16 is for GPUs: on {device}, leave the flag out")
    unguided = cfg.guidance_scale == 1 or family.images == "must"
    require(not (unguided and cfg.negative_prompt), "--negative_prompt: there is no guidance by text here")
    there = [name for name in rewards.REWARDS if Path(cfg.reward_weights or "", name).is_dir()]
    require(
        there or not cfg.reward_weights, f"--reward_weights {cfg.reward_weights}: no reward's folder there"
    )
    with as_bad_input(f"{source}: the scheduler's config is damaged"):
        config = read_config(source, "scheduler/scheduler_config.json")
        require("_class_name" in config, f"{source}: scheduler_config.json names no scheduler")
        family(source, device, DTYPES[cfg.dtype]).schedule(cfg)  # raises for a sampler that is no line
    if reward:
        with as_bad_input("your reward must be a function (frames, prompts)"):
            inspect.signature(reward).bind("frames", "prompts")
        return cfg, source, family
    names = {name for weight, name, _ in rewards.parse(cfg.reward) if weight}
    require(names, f"--reward {cfg.reward}: all weights are 0, give one another")
    require("ask" in names or not cfg.vlm, "--vlm is for the reward ask: leave it out")
    return cfg, source, family


def load_run(cfg: Config, source: str, family: type, prompts: list[Prompt], reward=None) -> Run:
    """Load the rewards (not in sample mode), encode the prompts, then load denoiser, LoRA and VAE."""
    if ranks()[1] > 1 and cfg.mode == "train":
        dist.init_process_group("nccl" if cfg.device == "cuda" else "gloo", timeout=timedelta(days=365))
        if cfg.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, for the float32 adapters
    terms, texts = {cfg.reward: (1.0, reward)} if reward else {}, [prompt.text for prompt in prompts]
    dtype, toy = DTYPES[cfg.dtype], find_model(cfg.model)[2].get("rewards")
    if cfg.mode != "sample" and not reward:
        how = ([cfg.reward_weights, toy], texts, cfg.vlm, cfg.quantize)
        terms = rewards.make_terms(cfg.reward, cfg.device, dtype, *how)
    model = family(source, cfg.device, dtype)
    run = Run(cfg, model, model.schedule(cfg), terms, {})
    # a reward that can't score, or has no gradient, shows on noise, before anything large loads
    texts, train = texts[: cfg.batch_size], cfg.mode == "train"
    frames = sum(map(model.frames_in, pick_latent_frames(run, generator_for(0)))) if train else cfg.num_frames
    noise = torch.rand(len(texts), frames, 3, cfg.height, cfg.width).to(cfg.device).requires_grad_(train)
    rewards.weighted_rewards(terms, noise, texts, cfg.decode_chunk, 1.0 if train else None)
    require(not train or noise.grad is not None, f"{cfg.reward}: its gradient does not reach the frames")
    offload_idle(
        run, denoiser=False, scoring=False
    )  # room for the text encoder, maybe the largest part of all
    with as_bad_input(f"{source}: its tokenizer, text encoder and pipeline do not fit together"):
        run.conds = model.encode([*dict.fromkeys(prompts), Prompt(cfg.negative_prompt)], cfg)
    model.load()
    if cfg.base_lora or cfg.quantize != "none":
        from extras.base_lora import prepare

        prepare(model, cfg)
    if cfg.lora or cfg.mode == "train":
        add_lora(model, cfg)
    if cfg.checkpointing:
        model.recompute()
    if toy and terms and not reward:
        print("rewards: those of the tiny world, a toy; not comparable with the published rewards' scores")
    size = sum(p.numel() for p in lora_parameters(model).values()) / 1e6
    print(f"{cfg.model} on {cfg.device} in {cfg.dtype}, {size:.2f} M LoRA weights, {cfg.reward}, {cfg.out}")
    return run


# ---- 10. Command line --------------------------------------------------------------------------------------
def parse_args(argv: list[str] | None = None) -> Config:
    """The command line as a Config: a flag per field. Raises BadInput."""
    parser = transformers.HfArgumentParser(Config, prog="vader.py", allow_abbrev=False)
    parser.error = lambda message: require(False, f"{message}; see --help")
    cfg, unknown = parser.parse_args_into_dataclasses(argv, True, look_for_args_file=False)
    if unknown:
        flag, flags = unknown[0].split("=")[0], [f"--{name}" for name in vars(cfg)]
        near = difflib.get_close_matches(flag, flags, n=1, cutoff=0)[0]
        raise BadInput(f"unknown argument {flag!r}: did you mean {near!r}?")
    return cfg


def main(argv: list[str] | None = None) -> int:
    """Run the command line. The exit code is 0; after one line, 2 for bad input, 1 when it was stopped."""
    if ranks()[0]:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    for library in (transformers, diffusers):  # their loading bars and reports of unused weights
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    try:
        cfg = parse_args(argv)
        if cfg.mode == "train":
            train(cfg)
        else:
            from extras.evaluate import apply_lora

            apply_lora(cfg)
        return 0
    except (BadInput, OSError, ModuleNotFoundError) as error:  # as of a full disk, of models/ deleted
        print(f"vader.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:  # torch has a class for a GPU's memory, none for a CPU's
        if not re.search("MemoryError|out of memory|DefaultCPUAllocator", repr(error)):
            raise
        problem = "out of memory: --offload, or a smaller --height, --width"
    except FloatingPointError as error:
        problem = str(error)
    except KeyboardInterrupt:
        problem = "the same command with --resume goes on"
    print(f"vader.py: stopped: {problem}", file=sys.stderr)
    return 1


if __name__ == "__main__" and "__file__" in globals():  # not where this file is pasted into a notebook
    sys.exit(main())
