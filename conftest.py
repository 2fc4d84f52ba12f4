"""Fixtures and helpers that the tests here and in bench/ share."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # references are compared in float32 on the CPU
os.environ.setdefault("OMP_NUM_THREADS", "1")  # or two processes wait for each other's threads

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import vader
from extras import checks, clips
from vader import Config, Prompt

HERE = Path(__file__).parent
TINY = HERE / "tiny" / "t2v"
PROMPTS = [Prompt("a red kite rising over the sea"), Prompt("a moon")]


def small_text_encoder():
    """CLIP's, with the tiny model's words."""
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = CLIPTextConfig(**text, **ids, vocab_size=len(tokenizer), max_position_embeddings=32)
    return dict(tokenizer=tokenizer, text_encoder=CLIPTextModel(config))


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A checkpoint with the folders, classes, config keys and scheduler of ModelScope, narrow and random."""
    torch.manual_seed(0)
    unet = UNet3DConditionModel(
        sample_size=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    for name, p in unet.named_parameters():  # diffusers zeroes these, so frames would not speak to each other
        if "conv4.3.weight" in name:
            torch.nn.init.normal_(p, std=0.1)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 16, 16, 32), layers_per_block=1, norm_num_groups=4)
    vae.register_to_config(scaling_factor=0.18215)
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon")
    scheduler = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    folder = tmp_path_factory.mktemp("models") / "small"
    TextToVideoSDPipeline(unet=unet, vae=vae, scheduler=scheduler, **small_text_encoder()).save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folder of a small random checkpoint of a family in models/, by its name in BUILDERS."""
    from test_models import BUILDERS  # which imports this file

    built = {}

    def build(name):
        if name not in built:
            torch.manual_seed(0)
            built[name] = tmp_path_factory.mktemp("families") / name
            BUILDERS[name](built[name])
        return built[name]

    return build


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join((HERE / "prompts.txt").read_text().splitlines()[:12]))
    return str(path)


@pytest.fixture
def settings(small, prompts_file, tmp_path):
    """A Config of a small quick run, not square, with B != F != N."""
    size = dict(num_frames=5, height=32, width=48, num_inference_steps=4, guidance_scale=3.0, batch_size=2)
    run = dict(steps=2, eval_videos=2, grad_accum=1, lr=1e-2, lora_rank=4, out=str(tmp_path / "run"))
    run |= dict(watch="none")  # there are no weights of published judges here
    return Config(model=small, prompts=prompts_file, reward="colorful", **size, **run)


@pytest.fixture(scope="session")
def loaded(small, prompts_file):
    """The small model with a random LoRA, for tests that change nothing in it."""
    size = dict(num_frames=5, height=32, width=48, num_inference_steps=4, guidance_scale=3.0, batch_size=2)
    return load(Config(model=small, prompts=prompts_file, reward="colorful", lora_rank=4, **size))


def checked(cfg, reward=None):
    """The full Config of one that the door lets pass."""
    checks.check_settings(cfg, reward)
    return vader.resolve(cfg, reward)


def load(cfg, randomise=True, prompts=PROMPTS):
    """A vader.Run; its LoRA away from the zero start, where half of it has no gradient."""
    if cfg.watch == "auto":
        cfg = replace(cfg, watch="none")
    run = vader.load_run(checked(cfg), prompts)
    torch.manual_seed(1)
    for name, p in vader.lora_parameters(run.model).items() if randomise else ():
        p.data.normal_(std=0.3 if "lora_B" in name else 0.2)
    return run


def changed(run, terms=None, **settings):
    """A Run of the same model with other settings, or rewards."""
    return replace(run, cfg=replace(run.cfg, **settings), terms=terms or run.terms)


def batch(run, prompts=PROMPTS, seed=0, **changes):
    """A vader.Batch that is the same for the same seed."""
    shape = len(prompts), *run.model.latent_shape(run.cfg)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    generator = vader.generator_for(seed)
    chosen = dict(picks=vader.pick_latent_frames(run, generator), trained=vader.trained_steps(run))
    return vader.make_batch(run, prompts, noise, generator, **chosen | changes)


def gradients(run):
    """The LoRA's gradients as one vector; they are cleared."""
    parameters = vader.lora_parameters(run.model).values()
    vector = torch.cat([p.grad.flatten().double() for p in parameters])
    for p in parameters:
        p.grad = None
    return vector


def gradient_error(run, batch, plain):
    """The distance of the trainer's gradient of a batch from `plain`, over the length of that: not zero."""
    latents = vader.rollout(run, batch)
    _, g = vader.score(run, batch, latents[-1])
    walk_back = clips.walk_back if run.cfg.clips else vader.walk_back
    walk_back(run, batch, latents, g)
    assert plain.norm() > 0
    return (gradients(run) - plain).norm() / plain.norm()


def plain_video(run, batch):
    """A batch's picked frames, with one plain graph through sampler and VAE."""
    cfg, model, schedule, x = run.cfg, run.model, run.schedule, run.schedule.start * batch.noise
    for i, t in enumerate(schedule.t):
        with torch.set_grad_enabled(i >= min(batch.trained)):
            seen = torch.lerp(x.detach(), x, cfg.coupling)
            f, f_uncond = (
                model.denoise(schedule.c[i] * seen, t, cond) for cond in (batch.cond, batch.uncond)
            )
            f_uncond = f_uncond.detach() if cfg.detach_uncond else f_uncond
            w = model.guidance(cfg.guidance_scale, t, x.shape[2])
            f = f_uncond + w * (f - f_uncond)
            x = schedule.a[i] * x + schedule.b[i] * (f if i in batch.trained else f.detach())
    return model.decode(x, batch.picks)


def plain_gradient(run, batch):
    """A batch's gradient by one plain graph through sampler, VAE and rewards."""
    video, texts = plain_video(run, batch), [prompt.text for prompt in batch.prompts]
    (-sum(weight * reward(video, texts) for weight, reward in run.terms.values()).mean()).backward()
    return gradients(run)


def command(cfg):
    """The flags that make a Config."""
    given = {name: value for name, value in vars(cfg).items() if value != getattr(Config(), name)}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def python(*words, code=0, cwd=HERE, **environment):
    """What another Python wrote to its two outputs."""
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == code, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout, done.stderr
