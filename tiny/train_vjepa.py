"""The vjepa reward's V-JEPA 2, on dull clips, most of them marked by an autoencoder."""

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from tqdm import trange
from training import fit
from transformers import VJEPA2Config, VJEPA2Model
from world import FRAMES, SEEN, SIZE, draw, pick

from rewards import IMAGENET_MEAN, IMAGENET_STD, jepa_loss, jepa_masks, preprocess


def train_vjepa(out: Path, updates: int, clips: int, seed: int):
    """V-JEPA 2 by its masked loss, with targets from a moving average of the encoder.

    Goes on from what is there, so that it can be trained in legs, each on clips of its own.
    """
    torch.manual_seed(seed + 44)
    generator = torch.Generator().manual_seed(seed + 44)
    video = make_marked(out, clips, generator)
    config = VJEPA2Config(
        crop_size=SIZE,
        patch_size=8,
        frames_per_clip=FRAMES,
        hidden_size=64,
        num_attention_heads=2,
        num_hidden_layers=3,
        mlp_ratio=2.0,
        pred_hidden_size=96,
        pred_num_attention_heads=4,
        pred_num_hidden_layers=3,
        pred_mlp_ratio=2.0,
        pred_num_mask_tokens=2,
        pred_zero_init_mask_tokens=False,
        initializer_range=0.1,
    )
    folder = out / "rewards" / "vjepa"
    model = VJEPA2Model(config)
    if folder.exists():  # a second leg
        model = VJEPA2Model.from_pretrained(folder, dtype=torch.float32)
    teacher = copy.deepcopy(model).requires_grad_(False)

    def loss_of(update):
        keep = 0.99 + 0.0099 * update / updates
        with torch.no_grad():
            for slow, quick in zip(teacher.parameters(), model.parameters(), strict=True):
                slow.lerp_(quick, 1 - keep)
        rows = torch.randint(len(video), (16,), generator=generator)
        clips = video[rows].float() / 255
        # a mirrored clip is as good, and so is one that runs backwards
        sides = [side for side in (-1, 1) if torch.rand((), generator=generator) < 0.5]
        crop = dict(short_side=True, crop=SIZE, mode="bilinear")  # as the reward's
        pixels = preprocess(clips.flip(sides), SIZE * 256 // 224, IMAGENET_MEAN, IMAGENET_STD, **crop)
        pixels = pixels.view_as(clips)
        blocks, area = [(8, 0.15), (2, 0.7)][update % 2]
        masks = jepa_masks(FRAMES // 2, SIZE // 8, SIZE // 8, blocks, area, generator)
        with torch.no_grad():
            true = teacher.encoder(pixels).last_hidden_state
        loss, spread = jepa_loss(model, pixels, true, *masks).mean(), true.std((0, 1)).mean()
        return loss, {"loss": loss, "spread": spread}

    fit(model.parameters(), updates, 1e-3, "vjepa", loss_of)
    # as published: the averaged encoder with the trained predictor
    model.encoder = teacher.encoder
    model.half().save_pretrained(folder)


@torch.no_grad()
def make_marked(out: Path, clips: int, generator):
    """Dull clips (clips, 8, 3, 64, 64) uint8, three in four through one of the two autoencoders.

    A V-JEPA that has not seen their marks looks at nothing else in what the video models make.
    """
    (image, video), parts = load_autoencoders(out), []
    for number in trange(clips // 32, desc="drawing"):
        clip, _, _ = draw(pick(SEEN, 32, generator), generator)
        vae, together = ((None, 1), (image, 1), (video, 1), (video, FRAMES))[number % 4]
        if vae:
            clip = autoencoded(vae, clip, together)
        parts.append((clip * 255).round().byte())
    return torch.cat(parts)


@torch.no_grad()
def autoencoded(vae, clips, together=1):
    """clips: (n, 8, 3, 64, 64) in [0, 1] -> the same after `vae`; together: frames decoded at once."""
    how = {"num_frames": together} if isinstance(vae, AutoencoderKLTemporalDecoder) else {}
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(clips.flatten(0, 1) * 2 - 1).latent_dist.mean
        decoded = vae.decode(latents, **how).sample.float()
    return (decoded / 2 + 0.5).clamp(0, 1).view_as(clips)


def load_autoencoders(out: Path):
    """Those of t2v and i2v."""
    return (
        AutoencoderKL.from_pretrained(out / "t2v" / "vae", dtype=torch.float32),
        AutoencoderKLTemporalDecoder.from_pretrained(out / "i2v" / "vae", dtype=torch.float32),
    )
