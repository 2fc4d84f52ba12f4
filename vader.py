"""VADER: align a video diffusion model with a differentiable reward (Prabhudesai et al., arXiv 2407.08737).

    python vader.py --reward aesthetic --prompts prompts.txt                         # train

Make a video from noise without gradient and keep every step's latents. Score some frames, and pull the
gradient through the reward and the VAE to the last latents. Walk the sampler back over the last K steps, one
denoiser call at a time: every sampler here is affine, so its backward multiplies by a and b. The graph is
cut at frames, latents and steps: one piece is alive at a time, and peak memory does not grow with K.

    x, latents[i]   x_t of the paper, (B, C, F, H, W)   a, b, c   x[i+1] = a[i] x[i] + b[i] f(c[i] x[i], t[i])
    f, denoise      epsilon_theta or v_theta            s         noise added per step, when eta > 0
    g               d loss / d x, walked backwards      w         classifier-free guidance scale
    v               d loss / d frames                   K, T      trained steps, sampling steps
    B, C, F, H, W   batch, channels, latent frames, height, width            N  frames (decoded)

Sections begin with "# ----", what people change is marked "SWAP:". Rewards are in rewards.py. Two folders can
be deleted: models/ (more models) and extras/ (most flags, checks of input, several GPUs, two rewards, best/).
"""

import contextlib
import functools
import gc
import hashlib
import importlib
import inspect
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

SCRIPT = __name__ == "__main__" and "__file__" in globals()  # run as a command, not pasted or imported


def stop(*_):
    """On Ctrl-C, at any time: one line. Files can be read after any kill, so there is nothing to tidy up."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"\nvader.py: stopped; the same command with --resume goes on\n")
    os._exit(130)


if SCRIPT:  # before the imports, which take seconds
    signal.signal(signal.SIGINT, stop)
    gc.disable()  # garbage collection, a quarter of the imports' time; load_run enables it
    # Without the rest each command begins with lines on torchao and bitsandbytes, where these are installed.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for library in ("torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(library).setLevel("ERROR")

import diffusers
import imageio_ffmpeg
import numpy as np
import peft
import psutil
import torch
import transformers
from torch.utils.data import default_collate
from tqdm import tqdm

import rewards
from rewards import EXTRAS, evenly_spaced, read_config, require

# Run or pasted, this module is called __main__. Without this line, models/ would import a second copy.
sys.modules.setdefault("vader", sys.modules[__name__])
HERE = EXTRAS.parent  # where rewards.py is, as pasted code has no file
TOY = str(HERE / "tiny" / "rewards")  # weights of the tiny world's rewards
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---- 1. Config ---------------------------------------------------------------------------------------------
def arg(default, help: str):
    """A field of Config; help is its line of --help."""
    return field(default=default, metadata={"help": help.replace("%", "%%")})


@dataclass
class Config:
    """Everything that can be set. None is off, or the model's own default (its class's `presets`)."""

    reward: str = arg("aesthetic", 'a reward of rewards.py or a weighted sum, "aesthetic + 0.5*colorful"')
    prompts: str = arg("prompts.txt", "a text file, a prompt a line (not # lines), or .jsonl with images")
    model: str = arg("auto", "a short name, hub id or folder; auto: modelscope on a CUDA GPU, else tiny-few")
    mode: Literal["train", "sample", "eval", "strength"] = arg("train", "eval scores, strength chooses best/")
    lora: str | None = arg(None, "folder, file or hub id of a LoRA: to sample, score, or start training from")
    lora_scale: float = arg(1.0, "strength of --lora in sample and eval")
    base_lora: str | None = arg(None, "LoRA that is fused into the base, for few steps or a style")
    out: str | None = arg(None, "output folder; default runs/<reward>-<model>, runs/<mode>-<reward>-<model>")
    resume: bool = arg(False, "go on with the run in --out, with the same settings (how long may change)")
    seed: int = arg(0, "the same seed gives bitwise the same run on a CPU with as many threads")
    # the video and its sampler
    negative_prompt: str = arg("", "what guidance leads away from")
    num_frames: int | None = arg(None, "frames of a video")
    clips: int | None = arg(None, "image to video: clips in a row, each from the last frame before it")
    height: int | None = arg(None, "pixels, a multiple of 8, 16 or 32 (the model's)")
    width: int | None = arg(None, "pixels, likewise")
    num_inference_steps: int | None = arg(None, "denoising steps; cost time, not memory")
    guidance_scale: float | None = arg(None, "classifier-free guidance; 1 is off, half the time")
    fps: float | None = arg(None, "frames a second, at which the written videos play")
    eta: float = arg(0.0, "share of noise added at each DDIM step; 0 is deterministic")
    timestep_spacing: Literal["auto", "trailing", "leading", "linspace"] = arg("auto", "leading hardly works")
    shift: float | None = arg(None, "of Wan's steps towards noise; few-step LoRAs mostly want 5 and trailing")
    # the gradient and the reward
    backprop_steps: int = arg(1, "K, denoising steps that get a gradient; costs time, not memory")
    grad_steps: Literal["auto", "last", "spread", "strongest"] = arg("auto", "which K; auto: the model's")
    coupling: float = arg(1.0, "gradient from a trained step to the one before: 1 exact, 0 none (for K > 1)")
    detach_uncond: bool = arg(False, "no gradient through the unconditional branch: half the backward time")
    decode_frames: int | None = arg(None, "frames scored per video; default what the reward wants")
    decode_chunk: int = arg(1, "frames decoded at once; costs memory")
    checkpointing: bool | None = arg(None, "recompute activations: less memory, more time; default on a GPU")
    offload: bool = arg(False, "networks that are idle wait in host memory: less memory, more time")
    quantize: Literal["auto", "none", "int8", "nf4"] = arg("auto", "of the denoiser and `ask`: less memory")
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
    lora_alpha: float | None = arg(None, "adapters are scaled by alpha / rank; default alpha = rank")
    lora_targets: str | None = arg(None, "linear layers by the end of their names; default: attention")
    # evaluation, files, machine
    eval_prompts: str | None = arg(None, "prompt file, not trained on; default every tenth of --prompts")
    eval_every: int | None = arg(None, "updates between evaluations; one more at the start, and at the end")
    eval_videos: int | None = arg(None, "videos per evaluation in training, each time the same; 0: none")
    eval_batch_size: int | None = arg(None, "videos made at once in evaluations; default --batch_size")
    watch: str = arg("auto", 'judges: scored, not trained on, "clip + hps"; auto: mostly clip; none')
    stop_when_worse: int | None = arg(None, "end when a judge has fallen in so many evaluations in a row")
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = arg("none", "where to log as well")
    push_to_hub: str | None = arg(None, "owner/name: where the LoRA goes at the end; public if it is new")
    device: str = arg("auto", "cpu, cuda, cuda:1, mps; auto is cuda where there is one")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = arg("auto", "bf16 if the GPU can, else fp16; CPU fp32")

    def __post_init__(self):
        """Take a Path and numpy's numbers as well, and the home folder for a ~."""
        for name, value in vars(self).items():
            if isinstance(value, np.generic):
                value = value.item()
            if isinstance(value, str | Path):
                value = os.path.expanduser(value)
            setattr(self, name, value)


# ---- 2. Prompts and randomness -----------------------------------------------------------------------------
class Prompt(NamedTuple):
    """What a video is made from. image: the file that it starts from, where the model takes one."""

    text: str
    image: str | None = None


# SWAP: your prompts.
def read_prompts(path: str) -> list[Prompt]:
    """The prompts of a text file, one a line without # lines, or of a .jsonl file, by extras/prompts.py."""
    if path.lower().endswith(".jsonl"):
        from extras.prompts import read_rows

        return read_rows(path)
    prompts = []
    for line in Path(path).read_text(encoding="utf-8-sig").split("\n"):
        line = line.strip()
        if line and not line.startswith("#"):
            prompts.append(Prompt(line))
    return prompts


def split_prompts(cfg: Config):
    """Prompts to train on (all, if none are left), and held out: --eval_prompts, or every tenth."""
    prompts = list(dict.fromkeys(read_prompts(cfg.prompts)))  # each once, in order
    if cfg.eval_videos == 0:
        return prompts, []
    if cfg.eval_prompts:
        held_out = read_prompts(cfg.eval_prompts)
    else:
        every = min(10, len(prompts))
        held_out = prompts[every - 1 :: every]
    left_out = set(held_out)
    trained = [prompt for prompt in prompts if prompt not in left_out]
    return trained or prompts, held_out


def generator_for(*key) -> torch.Generator:
    """A CPU generator seeded by a hash of the key: any draw can be made again without saved state."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def batch_prompts(prompts: list[Prompt], cfg: Config, number: int) -> list[Prompt]:
    """The prompts of the run's batch `number`: the file again and again, each time in a new order."""
    chosen = []
    for place in range(number * cfg.batch_size, (number + 1) * cfg.batch_size):
        epoch, position = divmod(place, len(prompts))
        order = torch.randperm(len(prompts), generator=generator_for(cfg.seed, "order", epoch))
        chosen.append(prompts[order[position]])
    return chosen


def drawn_prompts(prompts: list[Prompt], cfg: Config) -> list[Prompt]:
    """Those that any batch of the run holds, the first of the order above, so that no others are encoded."""
    count = cfg.steps * cfg.grad_accum * cfg.batch_size * ranks()[1]
    order = torch.randperm(len(prompts), generator=generator_for(cfg.seed, "order", 0))
    return [prompts[n] for n in order[:count]]


# ---- 3. Schedule -------------------------------------------------------------------------------------------
class Schedule(NamedTuple):
    """A first-order sampler as tables, one entry per step: x[i+1] = a x[i] + b f(c x[i], t) + s noise."""

    t: torch.Tensor  # (T,) int64, or float32 where the model wants that
    a: list[float]
    b: list[float]
    c: list[float]
    s: list[float]
    start: float = 1.0  # scale of the first noise
    trainable: tuple = ()  # the steps of the network that trains, where a model has several; else all are

    def leverage(self, i: int) -> float:
        """How far the result moves per unit of step i's output: |b[i]| times every |a| after it."""
        return abs(self.b[i] * math.prod(self.a[i + 1 :]))


def tabulate(scheduler, eta=0.0) -> Schedule:
    """The tables of a diffusers scheduler whose timesteps are set, read off its steps on unit vectors.

    For DDIM on noise (Song et al. 2021, eq. 12 and 16), A = alphas_cumprod of a step, A' of the next: c = 1,
    a = sqrt(A' / A), b = sqrt(1 - A' - s^2) - sqrt(A' (1 - A) / A). Raises BadInput where it is not affine.
    """
    for name, value in list(vars(scheduler).items()):
        if isinstance(value, torch.Tensor) and name != "timesteps":
            setattr(scheduler, name, value.double())  # its own float32 would round each step
    # Channels 0 to 2 hold x, f or noise alone, as 1, which gives a, b, s; 3 and 4 hold more of x or f.
    x, f, noise = torch.zeros(3, 1, 5, 1, 1, dtype=torch.float64)
    x[0, 0] = f[0, 1] = noise[0, 2] = 1
    # at eta 1 from pure noise 1 - A' - s^2 is 0, which rounding may make negative, under the scheduler's root
    kwargs = dict(eta=min(eta, 1 - 1e-12), variance_noise=noise) if eta else {}
    rescale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    rows = []
    for i, t in enumerate(scheduler.timesteps):
        large = 0 if i % 2 else 100  # shows a scheduler that clips; by turns, one that looks back
        x[0, 3] = f[0, 4] = large
        c = rescale(torch.ones_like(x), t).mean().item()
        a, b, s, *found = scheduler.step(f, t, x, **kwargs).prev_sample.flatten().tolist()
        is_affine = np.allclose(found, [a * large, b * large], 1e-5, 1e-5) and (eta or s == 0)
        require(is_affine, "--model: its scheduler clips, draws noise or looks back: take another")
        rows.append((a, b, c, s))
    tables = map(list, zip(*rows, strict=True))
    return Schedule(scheduler.timesteps, *tables, start=float(getattr(scheduler, "init_noise_sigma", 1)))


# ---- 4. The model and its LoRA -----------------------------------------------------------------------------
def straight_through_clamp(x):
    """Clamp to [0, 1] with the gradient of the identity: an over-bright pixel can still be told to darken."""
    return x + (x.clamp(0, 1) - x).detach()


class VideoModel:
    """What all models share; a family gives what differs."""

    # Each family writes schedule, encode_text and decode, see TextToVideoUNet. With --clips, extras/clips.py
    # gives it a rollout and a walk_back, which replace the functions below.
    presets = {}  # {a name for --model: {"source": hub id or folder, a field of Config: its default}}
    text_pipeline = None  # the stock pipeline, for its encode_prompt
    lora_pipeline = None  # the stock pipeline, where its load_lora_weights works
    denoiser_class = vae_class = None  # classes of diffusers
    folder = "transformer"  # of the denoiser in a checkpoint
    checkpointed = vae_checkpointed = ()  # names of the blocks whose activations are recomputed
    multiple = scale = 8  # what height and width are multiples of; how many pixels a latent pixel is wide
    frame_multiple = frames_per_latent = 1  # the same of frames less one: latent frame 0 holds frame 0 alone
    stochastic = False  # whether the sampler takes --eta
    grad_steps = "last"  # what --grad_steps auto is
    inputs = 1  # how many latents the denoiser takes, concatenated along channels
    max_tokens = None  # how much of a prompt is read; None: what the tokenizer says
    images = "no"  # whether a video starts from an image: no, may, must
    fps = 8  # frames a second, as the model was trained
    base_lora = None  # the name of the LoRA that is fused into the base
    quantization = {}  # arguments of from_pretrained, by which the denoiser is quantised

    def __init__(self, source: str, device: str, dtype: torch.dtype):
        self.source, self.device, self.dtype = source, device, dtype
        self.denoiser = self.vae = self.image_encoder = None

    @classmethod
    def variant(cls, source: str) -> type:
        """The class for this checkpoint: itself or another. Raises BadInput if there is no code for it."""
        return cls

    @torch.no_grad()
    def encode(self, prompts: list[Prompt], cfg: Config) -> dict:
        """The text embeddings of each prompt, in host memory, by the stock pipeline, which is then freed."""
        pipe = self.stock(self.text_pipeline, "text_encoder", "tokenizer")
        conds = {}
        for prompt in prompts:  # one at a time: for some models this is the phase that needs most memory
            embeds = self.encode_text(pipe, prompt.text)
            conds[prompt] = {name: value.cpu() for name, value in embeds.items()}
        return conds

    def stock(self, pipeline: type, *names: str):
        """Build a stock pipeline, on the device, that has only the named parts. Raises BadInput."""
        parts = {}
        for name, parameter in inspect.signature(pipeline).parameters.items():
            if name in names:
                parts[name] = rewards.load(parameter.annotation, self.source, "--model", name, self.dtype)
            elif parameter.default is parameter.empty:
                parts[name] = None
        return pipeline(**parts).to(self.device)

    def load_denoiser(self, folder: str):
        """One of the checkpoint's denoisers, quantised weight by weight if there is a quantization."""
        kind, options = self.denoiser_class, self.quantization
        return rewards.load(kind, self.source, "--model", folder, self.dtype, options=options)

    def load(self):
        """Load the denoiser and the VAE, frozen, without dropout (recomputing must give the same numbers)."""
        self.denoiser = self.denoiser or self.load_denoiser(self.folder)
        self.vae = self.vae or rewards.load(self.vae_class, self.source, "--model", "vae", self.dtype)
        for network in (self.denoiser, self.vae):
            network.to(self.device).eval().requires_grad_(False)

    def recompute(self):
        """Recompute activations in the backward pass, block by block."""
        rewards.checkpoint_blocks(self.denoiser, self.checkpointed)
        rewards.checkpoint_blocks(self.vae, self.vae_checkpointed)

    def latent_shape(self, cfg: Config) -> tuple:
        """(C, F, H, W) of one video's latents."""
        vae = read_config(self.source, "vae/config.json")
        channels = vae.get("latent_channels") or vae["z_dim"]
        frames = 1 + (cfg.num_frames - 1) // self.frames_per_latent
        return channels, frames, cfg.height // self.scale, cfg.width // self.scale

    def latent_frame(self, frame: int) -> int:
        """Which latent frame holds this frame; the first one holds frame 0 alone."""
        return (frame + self.frames_per_latent - 1) // self.frames_per_latent

    def guidance(self, scale: float, t, frames: int):
        """Classifier-free guidance scale at t: a number, or (F, 1, 1) for latents (B, C, F, H, W)."""
        return scale

    def expert(self, t):
        """The network that denoises at t."""
        return self.denoiser

    def denoise(self, x, t, cond):
        """x: (B, C, F, H, W) float32, t: (), cond: dict of (B, ...) -> f: (B, C, F, H, W) float32."""
        times = t.to(self.device).expand(len(x))
        return self.expert(t)(x.to(self.dtype), timestep=times, **cond).sample.float()


# Defaults that models share: those with published weights, and those in tiny/.
ATTENTION = "to_q,to_k,to_v,to_out.0"
PUBLISHED = dict(steps=200, eval_every=50, eval_videos=16, lr=2e-4, batch_size=1, grad_accum=4, lora_rank=16)
TINY = dict(steps=50, eval_every=25, eval_videos=16, lr=1e-3, batch_size=2, grad_accum=1, lora_rank=8)
TINY |= dict(num_inference_steps=10, height=64, width=64, fps=8, rewards=TOY)


class TextToVideoUNet(VideoModel):
    """ModelScope, ZeroScope and tiny: a 3D U-Net and DDIM. Unnamed checkpoints have the first's defaults."""

    modelscope = dict(source="ali-vilab/text-to-video-ms-1.7b", num_frames=16, height=256, width=256)
    modelscope |= PUBLISHED | dict(num_inference_steps=25, guidance_scale=9.0)
    zeroscope = modelscope | dict(source="cerspense/zeroscope_v2_576w", num_frames=24, height=320, width=576)
    tiny = TINY | dict(source=str(HERE / "tiny" / "t2v"), num_frames=8, guidance_scale=4.0)
    four = tiny | dict(base_lora=f"{HERE}/tiny/few", num_inference_steps=4, guidance_scale=1, steps=40)
    four |= dict(eval_prompts=f"{HERE}/tiny/unseen.txt", eval_videos=20, eval_batch_size=20, eval_every=20)
    presets = {"modelscope": modelscope, "zeroscope": zeroscope, "tiny": tiny, "tiny-few": four}

    text_pipeline = diffusers.TextToVideoSDPipeline
    denoiser_class = diffusers.UNet3DConditionModel
    vae_class = diffusers.AutoencoderKL
    folder = "unet"
    checkpointed = ("ResnetBlock2D", "Transformer2DModel", "TransformerTemporalModel", "TemporalConvLayer")
    vae_checkpointed = ("ResnetBlock2D",)
    stochastic = True

    def schedule(self, cfg: Config) -> Schedule:
        config = read_config(self.source, "scheduler/scheduler_config.json")
        scheduler = diffusers.DDIMScheduler.from_config(config, timestep_spacing=cfg.timestep_spacing)
        scheduler.set_timesteps(cfg.num_inference_steps)
        return tabulate(scheduler, cfg.eta)

    def encode_text(self, pipe, text: str) -> dict:
        """Text embeddings as keyword arguments of the denoiser, without batch dimension."""
        embeds, _ = pipe.encode_prompt(text, self.device, 1, False)
        return {"encoder_hidden_states": embeds[0]}  # (tokens, D)

    def decode(self, latents, picks):
        """Decode the latent frames picks of latents (B, C, F, H, W) -> frames (B, N, 3, H, W) in [0, 1]."""
        scaled = (latents / self.vae.config.scaling_factor).to(self.dtype)
        frames = [self.vae.decode(scaled[:, :, n]).sample.float() for n in picks]
        return straight_through_clamp(torch.stack(frames, dim=1) / 2 + 0.5)


def add_lora(model: VideoModel, cfg: Config):
    """Put float32 low-rank adapters (Hu et al. 2021) on the frozen denoiser: new ones, or those in --lora."""
    if cfg.lora:
        from extras.lora import attach

        return attach(model, cfg.lora)
    torch.manual_seed(cfg.seed)
    targets = cfg.lora_targets.replace(" ", "").split(",")
    config = peft.LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules=targets)
    model.denoiser = peft.get_peft_model(model.denoiser, config)


def lora_parameters(model: VideoModel) -> dict:
    return {name: p for name, p in model.denoiser.named_parameters() if p.requires_grad}


# ---- 5. Rollout, score, walk back --------------------------------------------------------------------------
@dataclass
class Run:
    """A loaded model, its sampler, its rewards, and the embeddings of all prompts."""

    cfg: Config
    model: VideoModel
    schedule: Schedule
    terms: dict  # {name: (weight, reward)}
    conds: dict  # {prompt: its embeddings, keyword arguments of `denoise`}
    scaler: torch.amp.GradScaler  # of the loss, in fp16
    judges: dict = field(default_factory=dict)  # as terms: rewards that only evaluations score


class Batch(NamedTuple):
    """B videos that are made together, and maybe differentiated."""

    prompts: list[Prompt]
    noise: torch.Tensor  # (B, C, F, H, W) float32
    cond: dict  # the prompts' embeddings, {name: (B, ...)}
    uncond: dict  # the same for the negative prompt
    generator: torch.Generator  # for the noise that eta > 0 adds
    picks: list[int]  # latent frames that are scored
    trained: list[int]  # sampling steps that get a gradient
    loss_scale: float  # 1 / (grad_accum * processes), in fp16 times the scaler's
    clips: list  # with --clips, rollout puts a Batch for each clip here


def make_batch(run: Run, prompts, noise, generator, picks=(), trained=(), loss_scale=1.0) -> Batch:
    """A Batch, with the embeddings of its prompts out of run.conds."""
    cond = default_collate([run.conds[prompt] for prompt in prompts])
    for name, value in cond.items():
        cond[name] = value.to(run.model.device)
    uncond = dict(cond)  # an image is given to both guidance branches; the text is replaced
    for name, value in run.conds[Prompt(run.cfg.negative_prompt)].items():
        uncond[name] = value.to(run.model.device).expand(len(prompts), *value.shape)
    return Batch(prompts, noise, cond, uncond, generator, picks, trained, loss_scale, [])


def pick_latent_frames(run: Run, generator) -> list[int]:
    """Latent frames to score: random ones, or evenly spaced ones if a reward wants several frames."""
    frames, latent_frame = run.cfg.num_frames, run.model.latent_frame
    wanted = 1
    for _, reward in run.terms.values():
        wants = getattr(reward, "frames", 1)
        wanted = max(wanted, frames if wants == "all" else wants)
    count = min(run.cfg.decode_frames or wanted, frames)
    if wanted > 1:
        return sorted({latent_frame(frame) for frame in evenly_spaced(count, frames)})
    order = torch.randperm(latent_frame(frames - 1) + 1, generator=generator)
    return sorted(order[: latent_frame(count - 1) + 1].tolist())


def trained_steps(run: Run) -> list[int]:
    """Which K of the T sampling steps train: the last (DRaFT-K), spread (DRTune), or of most leverage."""
    K = run.cfg.backprop_steps
    steps = list(run.schedule.trainable or range(len(run.schedule.t)))
    if run.cfg.grad_steps == "strongest":
        by_leverage = sorted(steps, key=run.schedule.leverage)
        return sorted(by_leverage[-K:])
    if run.cfg.grad_steps == "spread" and K > 1:
        return [steps[n] for n in evenly_spaced(K, len(steps))]
    return steps[-K:]


@torch.no_grad()
def rollout(run: Run, batch: Batch) -> list:
    """Sample without gradient, both guidance branches at once -> T + 1 latents (B, C, F, H, W) float32."""
    if run.cfg.clips:
        return run.model.rollout(run, batch)
    model, schedule, cond = run.model, run.schedule, batch.cond
    guided = run.cfg.guidance_scale != 1
    if guided:
        cond = {name: torch.cat([batch.uncond[name], value]) for name, value in cond.items()}
    x = schedule.start * batch.noise
    latents = [x]
    for i, t in enumerate(schedule.t):
        scaled = schedule.c[i] * x
        f = model.denoise(torch.cat([scaled, scaled]) if guided else scaled, t, cond)
        if guided:
            f_uncond, f_cond = f.chunk(2)
            w = model.guidance(run.cfg.guidance_scale, t, x.shape[2])
            f = f_uncond + w * (f_cond - f_uncond)
        x = schedule.a[i] * x + schedule.b[i] * f
        if schedule.s[i] > 0:
            x = x + schedule.s[i] * torch.randn(x.shape, generator=batch.generator).to(x.device)
        latents.append(x)
    return latents


def score(run: Run, batch: Batch, x):
    """Reward the picked frames of clean latents x and pull the gradient back to x, chunk by chunk.

    x: (B, C, F, H, W) float32. The loss is minus the mean reward, times batch.loss_scale. Returns the
    rewards' figures {name: (B,)}, and g, the gradient of the loss with respect to x.
    """
    texts = [prompt.text for prompt in batch.prompts]
    with torch.no_grad():
        video = run.model.decode(x, batch.picks).requires_grad_()  # (B, N, 3, H, W)
    scale = -batch.loss_scale / len(x)  # loss = scale * sum of the rewards
    figures = rewards.weighted_rewards(run.terms, video, texts, run.cfg.decode_chunk, scale)
    v = video.grad
    del video
    x = x.detach().requires_grad_()
    done = 0
    for first in range(0, len(batch.picks), run.cfg.decode_chunk):
        piece = batch.picks[first : first + run.cfg.decode_chunk]
        frames = run.model.decode(x, piece)
        frames.backward(v[:, done : done + frames.shape[1]])
        done += frames.shape[1]
    return figures, x.grad


# SWAP: your gradient estimator. It may draw with batch.generator, and call `rollout` and `score` again.
def walk_back(run: Run, batch: Batch, latents, g):
    """Backward of `rollout`: accumulate LoRA gradients, one guidance branch of one trained step at a time.

    latents: T + 1, (B, C, F, H, W); g: d loss / d latents[-1]. The denoiser's gradient with respect to its
    input counts cfg.coupling times: 1 is exact (DRaFT-K), 0 leaves it out (DRTune).
    """
    cfg, model, schedule = run.cfg, run.model, run.schedule
    earliest = min(batch.trained)
    for i in range(len(schedule.t) - 1, earliest - 1, -1):
        a, b, c, t = schedule.a[i], schedule.b[i], schedule.c[i], schedule.t[i]
        if i not in batch.trained:
            g = a * g
            continue
        w = model.guidance(cfg.guidance_scale, t, g.shape[2])
        branches = [(batch.cond, w)]  # f = w f_cond + (1 - w) f_uncond
        if cfg.guidance_scale != 1 and not cfg.detach_uncond:
            branches.append((batch.uncond, 1 - w))
        x = latents[i].detach().requires_grad_(cfg.coupling > 0 and i > earliest)  # before it nothing trains
        for cond, share in branches:
            f = model.denoise(c * x, t, cond)
            f.backward(share * b * g)
            del f  # before the next branch builds its graph
        g = a * g
        if x.grad is not None:
            g = g + cfg.coupling * x.grad


# ---- 6. Training -------------------------------------------------------------------------------------------
def micro_batch(run: Run, prompts, step: int, number: int, loss_scale=1.0):
    """Make a batch of videos and add its gradient to the LoRA's -> the rewards' figures, {name: (B,)}."""
    model = run.model
    generator = generator_for(run.cfg.seed, step, number)
    noise = torch.randn(len(prompts), *model.latent_shape(run.cfg), generator=generator).to(model.device)
    picks = pick_latent_frames(run, generator)
    batch = make_batch(run, prompts, noise, generator, picks, trained_steps(run), loss_scale)
    latents = rollout(run, batch)
    figures, g = score(run, batch, latents[-1])
    walk = model.walk_back if run.cfg.clips else walk_back
    walk(run, batch, latents, g)
    return figures


# SWAP: your optimiser.
def make_optimizer(run: Run):
    parameters = lora_parameters(run.model).values()
    return torch.optim.AdamW(parameters, lr=run.cfg.lr, weight_decay=run.cfg.weight_decay)


def update(run: Run, prompts, step: int, optimizer) -> dict:
    """One step of the optimiser on grad_accum batches, unless their gradient is not finite -> its metrics."""
    cfg = run.cfg
    start = time.time()
    rank, world = ranks()
    on_cuda = run.model.device.startswith("cuda")
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()  # or the peak is that of encoding the prompts
    parameters = list(lora_parameters(run.model).values())
    one = torch.ones((), device=parameters[0].device)  # scale(), unlike get_scale(), also sets the scaler up
    loss_scale = run.scaler.scale(one).item() / (cfg.grad_accum * world)
    optimizer.zero_grad()
    row = {"step": step + 1, "prompts": []}
    for m in range(cfg.grad_accum):
        number = (step * cfg.grad_accum + m) * world + rank
        chosen = batch_prompts(prompts, cfg, number)
        row["prompts"] += [prompt.text for prompt in chosen]
        for name, values in micro_batch(run, chosen, step, number, loss_scale).items():
            row[name] = row.get(name, 0.0) + values.mean().item() / cfg.grad_accum
    if world > 1:
        gradients = [p.grad for p in parameters]
        together = torch.nn.utils.parameters_to_vector(gradients)
        torch.distributed.all_reduce(together)  # a sum: the mean, as the loss is scaled by 1 / world
        torch.nn.utils.vector_to_parameters(together, gradients)
    run.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm).item()
    if math.isfinite(norm):
        run.scaler.step(optimizer)
    run.scaler.update()
    memory = torch.cuda.max_memory_reserved() if on_cuda else psutil.Process().memory_info().rss
    return row | {"grad_norm": norm, "seconds": time.time() - start, "memory_gb": memory / 1e9}


def train(cfg: Config, reward=None) -> list[dict]:
    """Fine-tune a LoRA on cfg.reward, or on your own function (frames, prompts) -> (B,); see rewards.py.

    Returns the rows of metrics.jsonl. Raises BadInput, or FloatingPointError for rewards that are not finite.
    """
    holding = contextlib.nullcontext()
    if EXTRAS.is_dir() or cfg.resume:  # a fork without it checks nothing, locks nothing, keeps no checkpoint
        from extras import checks, record, resume, strength, watch

        holding = checks.enter(cfg, reward)
    cfg = resolve(cfg, reward)
    out = Path(cfg.out)
    rank, _ = ranks()
    prompts, held_out = split_prompts(cfg)
    # twice as many as an evaluation has videos: half are for the report on best/
    eval_prompts = [held_out[n % len(held_out)] for n in range(2 * cfg.eval_videos)]
    with holding:
        run = load_run(cfg, eval_prompts + drawn_prompts(prompts, cfg), reward)
        optimizer = make_optimizer(run)
        step = skipped = in_a_row = 0  # updates made; of these not finite; of the last ones not finite
        if EXTRAS.is_dir():
            step, skipped = resume.restore_checkpoint(run, optimizer)  # 0, 0 without --resume
            record.write_settings(cfg, prompts + held_out)
        if rank == 0 and step == 0:
            write_atomic(out / "metrics.jsonl", "")
        leverage = {i: round(run.schedule.leverage(i), 3) for i in trained_steps(run)}
        print(f"leverage of the steps that train (under 0.05 they hardly move the video): {leverage}")

        while True:
            if step == cfg.steps or step % cfg.eval_every == 0:
                evaluate_once(run, eval_prompts[: cfg.eval_videos], step)
                if EXTRAS.is_dir() and watch.after_evaluation(cfg, step):
                    break
            if step == cfg.steps:
                break
            row = update(run, prompts, step, optimizer)
            step += 1
            finite = math.isfinite(row["grad_norm"])
            in_a_row = 0 if finite else in_a_row + 1
            skipped += not finite
            if in_a_row == 10:
                problem = f"gradients not finite, at update {step}, prompts {row['prompts']}, seed {cfg.seed}"
                raise FloatingPointError(f"{problem}: mend the reward, or start anew with a lower --lr")
            if rank == 0:
                append_metrics(cfg, row | {"skipped": skipped})
                save_lora(run.model, out / "lora", cfg)
                if EXTRAS.is_dir():
                    resume.save_checkpoint(run, optimizer, step, skipped)
            figures = f"reward {row['reward']:.3f}, gradient {row['grad_norm']:.2g}"
            print(f"update {step}/{cfg.steps}: {figures}, {row['seconds']:.1f} s, {row['memory_gb']:.1f} GB")

        print(f"done: the LoRA is in {out}/lora")
        if run.judges:
            strength.find_best(run, eval_prompts)
        return read_metrics(out)


# ---- 7. Evaluation -----------------------------------------------------------------------------------------
def write_video(path: Path, video, fps: float):
    """video: (F, 3, H, W) float in [0, 1] -> an mp4 that browsers play, enlarged to at least 256 pixels."""
    pixels = (video.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
    height, width = pixels.shape[1:3]
    zoom = max(1, math.ceil(256 / width))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(".tmp-vader-" + path.name)
    source = f"-v error -y -f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {fps} -i -"
    filters = f"-vf scale=iw*{zoom}:ih*{zoom}:flags=neighbor -pix_fmt yuv420p"
    codec = "-c:v libx264 -preset ultrafast -crf 5"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *source.split(), *filters.split(), *codec.split(), temporary]
    ffmpeg = subprocess.run(command, input=pixels.tobytes(), capture_output=True)
    problem = ffmpeg.stderr.decode(errors="replace")
    require(ffmpeg.returncode == 0, f"can't write {path}: is the disk full? ffmpeg says: {problem}")
    os.replace(temporary, path)


@torch.no_grad()
def make_videos(run: Run, prompts, first=0):
    """Whole videos, (B, N, 3, H, W) float32 in [0, 1]; each one's first noise depends on its number alone."""
    noise = []
    for n in range(first, first + len(prompts)):
        generator = generator_for(run.cfg.seed, "eval", n)
        noise.append(torch.randn(run.model.latent_shape(run.cfg), generator=generator))
    batch = make_batch(run, prompts, torch.stack(noise).to(run.model.device), generator)
    latents = rollout(run, batch)[-1]
    return run.model.decode(latents, range(latents.shape[2]))


@torch.no_grad()
def evaluate(run: Run, prompts, folder: str, first=0) -> dict:
    """Videos from number `first` into --out/folder, shared by processes -> {"folder", "prompts", scores}."""
    cfg = run.cfg
    rank, world = ranks()
    texts = [prompt.text for prompt in prompts]
    scores = {}  # {reward: a number for each video of this process}
    begin = len(prompts) * rank // world
    limit = len(prompts) * (rank + 1) // world
    starts = range(begin, limit, cfg.eval_batch_size)
    for start in tqdm(starts, desc=f"videos {folder}", leave=False, disable=None):  # no bar in a log file
        end = min(start + cfg.eval_batch_size, limit)
        videos = make_videos(run, prompts[start:end], first + start)
        figures = rewards.weighted_rewards(run.terms, videos, texts[start:end], cfg.decode_chunk)
        if run.judges:
            from extras import watch

            figures = watch.score_judges(run, videos, texts[start:end]) | figures
        for name, values in figures.items():
            scores.setdefault(name, []).extend(values.tolist())
        for n, video in enumerate(videos, start=first + start):
            write_video(Path(cfg.out) / folder / f"{n:03d}.mp4", video, cfg.fps)
    result = {"folder": folder, "prompts": texts}
    for share in gather(scores):
        for name, values in share.items():
            result.setdefault(name, []).extend(values)
    return result


def evaluate_once(run: Run, prompts, step: int):
    """Evaluate after `step` updates, unless metrics.jsonl has that evaluation, and keep its LoRA."""
    cfg, out = run.cfg, Path(run.cfg.out)
    done = [row["step"] for row in read_metrics(out) if "eval" in row]
    if prompts and step not in gather(done)[0]:  # as the first process read it
        folder = f"samples/step_{step:06d}"
        result = evaluate(run, prompts, folder)
        if ranks()[0] == 0:
            print(f"update {step}: held-out reward {np.mean(result['reward']):.3f}")
            save_lora(run.model, out / folder / "lora", cfg)
            append_metrics(cfg, {"step": step, "eval": result})


# ---- 8. Files and resume -----------------------------------------------------------------------------------
def ranks() -> tuple:
    """This process's number, and how many there are, if all the variables of torchrun are there."""
    if not os.environ.keys() >= {"MASTER_ADDR", "RANK", "WORLD_SIZE"}:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def gather(value) -> list:
    """This value of each process, in their order."""
    values = [value] * ranks()[1]
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def write_atomic(path: Path, content: str | bytes):
    """Write a file so that a kill leaves the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(".tmp-vader-" + path.name)
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def read_metrics(out: Path, name="metrics.jsonl") -> list[dict]:
    """The rows of a file of json lines; a last line that a kill cut short is left out."""
    path = out / name
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def append_metrics(cfg: Config, row: dict):
    """Add a row to metrics.jsonl, and log it where --tracker says. Json has no NaN and no infinity: null."""
    finite = json.loads(json.dumps(row), parse_constant=lambda name: None)
    with open(Path(cfg.out) / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(finite, ensure_ascii=False) + "\n")
    if cfg.tracker != "none":
        from extras import tracker

        tracker.log(cfg, row)


def save_lora(model: VideoModel, folder: Path, cfg: Config | None = None):
    """Write the LoRA as PEFT does; extras/ adds a card, and files for stock diffusers and ComfyUI."""
    if not EXTRAS.is_dir():
        return model.denoiser.save_pretrained(folder, save_embedding_layers=False)
    from extras import lora_files

    lora_files.save(model, folder, cfg)


# ---- 9. Loading --------------------------------------------------------------------------------------------
# SWAP: your model. Write models/mine.py, imitating models/wan.py, and add "models.mine.Class" with its names
# for --model (keys of its `presets`) and the pipelines that it loads (`_class_name` in model_index.json).
FAMILIES = {
    "vader.TextToVideoUNet": ("tiny", "tiny-few", "modelscope", "zeroscope", "TextToVideoSDPipeline"),
    "models.animatediff.AnimateDiff": ("animatediff", "AnimateDiffPipeline", "StableDiffusionPipeline"),
    "models.anyflow.AnyFlow": ("anyflow", "AnyFlowPipeline"),
    "models.cogvideox.CogVideoX": ("cogvideox", "cogvideox-5b", "CogVideoXPipeline"),
    "models.ltx.LTX": ("ltx", "LTXPipeline", "LTXImageToVideoPipeline"),
    "models.svd.StableVideoDiffusion": ("svd", "tiny-i2v", "StableVideoDiffusionPipeline"),
    "models.wan.Wan": ("wan", "wan-14b", "tiny-wan", "WanPipeline"),
    "models.wan.Wan22": ("wan2.2-5b",),
    "models.wan.WanA14B": ("wan2.2-a14b",),
    "models.wan.WanA14BHigh": ("wan2.2-a14b-high",),
}


@functools.cache
def find_model(model: str) -> tuple:
    """The class of --model, where it loads from, and its defaults. Raises BadInput."""
    path_of = {}
    for path, names in FAMILIES.items():
        path_of |= dict.fromkeys(names, path)
    name = model
    if model not in path_of:
        name = read_config(model, "model_index.json").get("_class_name")
        require(name in path_of, f"{model} is a {name}: there is no code for that in FAMILIES")
    module, class_name = path_of[name].rsplit(".", 1)
    family = getattr(importlib.import_module(module), class_name)
    if name == model:
        require(model in family.presets, f"--model: there is no {model!r} in {class_name}.presets")
        preset = family.presets[model]
        return family, preset["source"], preset
    family = family.variant(model)
    preset = next(iter(family.presets.values()))  # the family's first
    return family, model, preset


def fill_in(cfg: Config, **defaults) -> Config:
    """cfg with these values where it has None or "auto"."""
    missing = {}
    for name, value in vars(cfg).items():
        if value in (None, "auto") and name in defaults:
            missing[name] = defaults[name]
    return replace(cfg, **missing)


def resolve(cfg: Config, reward=None) -> Config:
    """Fill in what is None or "auto": by the machine, by the LoRA in --lora, by the model's defaults."""
    cfg = fill_in(cfg, device="cuda" if torch.cuda.is_available() else "cpu")
    if cfg.device.startswith("cuda"):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        cfg = fill_in(cfg, model="modelscope", dtype="bf16" if bf16 else "fp16")
    cfg = fill_in(cfg, model="tiny-few" if EXTRAS.is_dir() else "tiny", dtype="fp32")  # fusing is in extras/
    if reward:
        cfg = replace(cfg, reward=getattr(reward, "__name__", "custom"))
    if cfg.lora:
        from extras.lora import with_lora

        cfg = with_lora(cfg)
    family, _, preset = find_model(cfg.model)
    common = dict(fps=family.fps, grad_steps=family.grad_steps, lora_targets=ATTENTION)
    preset = common | dict(quantize="none", timestep_spacing="trailing", offload=False) | preset
    cfg = replace(cfg, offload=cfg.offload or preset["offload"])  # fill_in takes False as given
    preset["num_frames"] *= cfg.clips or 1
    cfg = fill_in(cfg, **preset, checkpointing=cfg.device != "cpu")
    kind = {"sample": "sample-", "eval": "eval-"}.get(cfg.mode, "")
    name = f"{kind}{cfg.reward}-{Path(cfg.model).name}"
    out = "runs/" + re.sub(r"[^\w.]+", "-", name).strip("-")
    return fill_in(cfg, lora_alpha=cfg.lora_rank, eval_batch_size=cfg.batch_size, out=out)


def make_model(cfg: Config) -> VideoModel:
    """The model of a full config, with nothing loaded."""
    family, source, _ = find_model(cfg.model)
    if cfg.clips:
        from extras import clips

        family = clips.chain(family, cfg)
    return family(source, cfg.device, DTYPES[cfg.dtype])


def load_run(cfg: Config, prompts: list[Prompt], reward=None) -> Run:
    """Load the rewards (not in sample mode), encode the prompts, then load denoiser, LoRA and VAE."""
    gc.enable()  # as the imports are done
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, for the float32 adapters
    model = make_model(cfg)
    texts = [prompt.text for prompt in prompts]
    terms = {cfg.reward: (1.0, reward)} if reward else {}
    if cfg.mode != "sample" and not reward:
        folders = [cfg.reward_weights, find_model(cfg.model)[2].get("rewards")]
        terms = rewards.make_terms(cfg.reward, cfg.device, model.dtype, folders, texts, cfg.vlm, cfg.quantize)
    scaler = torch.amp.GradScaler(model.device, init_scale=2.0**12, enabled=cfg.dtype == "fp16")
    run = Run(cfg, model, model.schedule(cfg), terms, {}, scaler)
    if EXTRAS.is_dir():
        from extras import checks, quick, watch

        run.judges = watch.load_judges(cfg, texts)
        checks.try_rewards(run, texts)
    networks = rewards.networks_of(run.terms).to("cpu")  # room for the text encoder, maybe the largest of all
    run.conds = model.encode(list(dict.fromkeys([*prompts, Prompt(cfg.negative_prompt)])), cfg)
    if cfg.base_lora or cfg.quantize != "none":
        from extras.base_lora import prepare

        prepare(model, cfg)
    model.load()
    if cfg.lora or cfg.mode in ("train", "strength"):
        add_lora(model, cfg)
    if EXTRAS.is_dir():
        quick.install(model.denoiser)
    if cfg.checkpointing:
        model.recompute()
    if cfg.offload:
        from extras import offload

        offload.install(run, networks)
    else:
        networks.to(cfg.device)
    print(f"{cfg.model} on {cfg.device} in {cfg.dtype}, {cfg.out}")
    return run


# ---- 10. Command line --------------------------------------------------------------------------------------
def parse_args(argv=None) -> Config:
    """The command line as a Config: a flag per field. Raises BadInput."""
    parser = transformers.HfArgumentParser(Config, prog="vader.py", allow_abbrev=False)
    if EXTRAS.is_dir():
        from extras.errors import refuse_arguments

        parser.error = functools.partial(refuse_arguments, parser)
    return Config(**vars(parser.parse_args(argv)))


def run_command(argv=None):
    """Do what the command line says. Raises what goes wrong."""
    cfg = parse_args(argv)
    if cfg.mode == "train":
        train(cfg)
    else:
        from extras.evaluate import apply_lora

        apply_lora(cfg)


def main(argv=None) -> int:
    """The command line -> exit code: 0; after one line, 2 for bad input, 1 when it was stopped."""
    if EXTRAS.is_dir():
        from extras.errors import in_one_line

        return in_one_line(run_command, argv)
    run_command(argv)
    return 0


if SCRIPT:
    sys.exit(main())
