"""Image to video, as Stable Video Diffusion: U-Net, autoencoder with a temporal decoder, image encoder."""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
    _resize_with_antialiasing,
)
from tqdm import trange
from training import average_of, fit, picture_loss
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection
from world import FRAMES, SEEN, SIZE, draw, pick

from rewards import CLIP_MEAN, CLIP_STD


def make_image_encoder(out: Path) -> CLIPVisionModelWithProjection:
    """The aesthetic reward's picture tower for 224 x 224: patches of 28 instead of 8, kernels enlarged."""
    small = CLIPVisionModelWithProjection.from_pretrained(
        out / "rewards" / "aesthetic", dtype=torch.float32
    ).eval()
    config = copy.deepcopy(small.config)
    config.image_size, config.patch_size = 224, 28
    large, weights = CLIPVisionModelWithProjection(config).eval(), small.state_dict()
    (name,) = (name for name in weights if name.endswith("patch_embedding.weight"))
    kernels = F.interpolate(weights[name], (28, 28), mode="bilinear", antialias=False)
    large.load_state_dict(weights | {name: kernels * (8 / 28) ** 2})
    return large


def make_i2v_unet() -> UNetSpatioTemporalConditionModel:
    return UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(64, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        cross_attention_dim=64,
        num_attention_heads=4,
        num_frames=FRAMES,
    )


@torch.no_grad()
def encode_starts(out: Path, clips: int, seed: int):
    """Scaled latents (clips, 4, 8, 8, 8) of drawn clips, and (clips, 1, 64) embeddings of their starts."""
    generator = torch.Generator().manual_seed(seed + 70)
    vae = AutoencoderKL.from_pretrained(out / "t2v" / "vae", dtype=torch.float32).eval()
    encoder = make_image_encoder(out)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    latents, embeddings = [], []
    for _ in trange(clips // 16, desc="latents"):
        video, _, _ = draw(pick(SEEN, 16, generator), generator)
        found = vae.encode(video.flatten(0, 1) * 2 - 1).latent_dist.mean * vae.config.scaling_factor
        latents.append(found.unflatten(0, (16, FRAMES)).transpose(1, 2).half())
        large = _resize_with_antialiasing(video[:, 0] * 2 - 1, (224, 224)) / 2 + 0.5  # as the pipeline does
        embeddings.append(encoder((large - mean) / std).image_embeds[:, None])
    return torch.cat(latents), torch.cat(embeddings)


def train_i2v_unet(out: Path, updates: int, clips: int, seed: int):
    """The U-Net of SVD on v prediction over noise levels, in the latent space of t2v's autoencoder.

    The first frame shows where the object starts, and so the way it goes. The image and its embedding are
    left out of one clip in ten each, for guidance.
    """
    torch.manual_seed(seed + 70)
    generator = torch.Generator().manual_seed(seed + 71)
    latents, embeddings = encode_starts(out, clips, seed)
    unet = make_i2v_unet()
    unet.set_attn_processor(AttnProcessor())
    average, follow = average_of(unet)
    scale = AutoencoderKL.load_config(out / "t2v" / "vae")["scaling_factor"]
    time_ids = torch.tensor([6.0, 127.0, 0.02]).expand(16, 3)

    def loss_of(update):
        follow(update)
        rows = torch.randint(len(latents), (16,), generator=generator)
        clean = latents[rows].float().transpose(1, 2)  # (n, F, 4, 8, 8)
        start = clean[:, :1] / scale + 0.03 * torch.randn((16, 1, 4, 8, 8), generator=generator)
        start = start * (torch.rand(16, 1, 1, 1, 1, generator=generator) > 0.1)
        image = embeddings[rows] * (torch.rand(16, 1, 1, generator=generator) > 0.1)
        sigma = (0.5 + 1.6 * torch.randn((16, 1, 1, 1, 1), generator=generator)).exp()
        norm = (sigma**2 + 1).sqrt()
        noise = torch.randn(clean.shape, generator=generator)
        x = torch.cat([(clean + sigma * noise) / norm, start.expand(-1, FRAMES, -1, -1, -1)], dim=2)
        with torch.autocast("cpu", torch.bfloat16):
            v = unet(x, 0.25 * sigma.log().flatten(), image, added_time_ids=time_ids).sample
        # x0 = (x - sigma norm v) / norm^2
        loss = F.mse_loss(v.float(), (sigma * noise + clean - norm**2 * clean) / (sigma * norm))
        return loss, {"loss": loss}

    fit(unet.parameters(), updates, 1e-3, "i2v", loss_of)
    average.half().save_pretrained(out / "i2v" / "unet")


def train_i2v_vae(out: Path, updates: int, seed: int):
    """An autoencoder with SVD's temporal decoder; its encoder learns to give the latents of t2v's."""
    torch.manual_seed(seed + 72)
    generator = torch.Generator().manual_seed(seed + 72)
    teacher = AutoencoderKL.from_pretrained(out / "t2v" / "vae", dtype=torch.float32).eval()
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=SIZE,
        scaling_factor=teacher.config.scaling_factor,
    )
    average, follow = average_of(vae, 0.99)

    def loss_of(update):
        follow(update)
        # clips, and in every other update single frames of different ones
        frames, n = (FRAMES, 3) if update % 2 else (1, 24)
        moments = None if update % 2 else torch.randint(FRAMES, (24, 1), generator=generator)
        video, _, inside = draw(pick(SEEN, n, generator), generator, update % 4 < 2, moments)
        pictures, weight = video.flatten(0, 1) * 2 - 1, 1 + 5 * inside.flatten(0, 1)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                wanted = teacher.encode(pictures).latent_dist.mean.float()
            posterior = vae.encode(pictures).latent_dist
            found = posterior.mean.float()
            noisy = found + 0.05 * torch.randn(found.shape, generator=generator)
            decoded = vae.decode(noisy, num_frames=frames).sample.float()
        near = (found - wanted).abs().mean() * teacher.config.scaling_factor
        loss = picture_loss(decoded, pictures, weight) + 0.5 * near + 1e-4 * posterior.logvar.square().mean()
        inner = ((decoded - pictures).abs() * inside.flatten(0, 1)).sum() / (3 * inside.sum())
        error = (decoded - pictures).abs().mean()
        return loss, {"error": error, "object": inner, "latents": near}

    fit(vae.parameters(), updates, 2e-3, "i2v vae", loss_of)
    average.half().save_pretrained(out / "i2v" / "vae")


def save_i2v(out: Path):
    """Put the image encoder, the scheduler and model_index.json beside the U-Net and the autoencoder."""
    folder = out / "i2v"
    pipeline = StableVideoDiffusionPipeline(
        vae=AutoencoderKLTemporalDecoder.from_pretrained(folder / "vae", dtype=torch.float16),
        image_encoder=make_image_encoder(out).half(),
        unet=UNetSpatioTemporalConditionModel.from_pretrained(folder / "unet", dtype=torch.float16),
        scheduler=EulerDiscreteScheduler(
            prediction_type="v_prediction",
            timestep_type="continuous",
            timestep_spacing="leading",
            use_karras_sigmas=True,
            sigma_min=0.02,
            sigma_max=80.0,
        ),
        feature_extractor=CLIPImageProcessor(),
    )
    for part in (pipeline.vae, pipeline.unet):
        part.register_to_config(_name_or_path="")
    pipeline.save_pretrained(folder)
