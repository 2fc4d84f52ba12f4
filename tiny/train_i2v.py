"""Image to video, as Stable Video Diffusion: U-Net, autoencoder with a temporal decoder, image encoder."""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
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
from training import DEVICE, average_of, fit, picture_loss
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection
from views import draw_views, pick_views
from world import FRAMES, SEEN, SIZE, draw, pick

from rewards import CLIP_MEAN, CLIP_STD

LATENT = 16  # channels: SVD's four are too few for texture
PLAIN = 12  # of them are the picture itself at 16 x 16, so that what moves by half a latent pixel is seen


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
        in_channels=2 * LATENT,
        out_channels=LATENT,
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


def draw_pool(clips: int, seed: int):
    """Clips with texture, an eighth of them of the plain world: uint8 (clips, 8, 4, 64, 64).

    The fourth channel is 255 where the object is.
    """
    generator, parts = torch.Generator().manual_seed(seed), []
    for first in trange(0, clips, 16, desc="drawing"):
        if first % 128:
            video, _, inside = draw_views(pick_views(SEEN, 16, generator), generator)
        else:
            video, _, inside = draw(pick(SEEN, 16, generator), generator)
        channels = torch.cat([video, inside], dim=2)
        parts.append((channels * 255).round().byte())
    return torch.cat(parts)


@torch.no_grad()
def encode_starts(out: Path, clips: int, seed: int):
    """Scaled latents of drawn clips (clips, 8, LATENT, 8, 8), their starts' embeddings (clips, 1, 64)."""
    vae = AutoencoderKLTemporalDecoder.from_pretrained(out / "i2v" / "vae", dtype=torch.float32)
    vae, encoder = vae.eval().to(DEVICE), make_image_encoder(out).to(DEVICE)
    mean, std = (torch.tensor(values, device=DEVICE)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    latents, embeddings = [], []
    for video in draw_pool(clips, seed + 70).split(16):
        video = video[:, :, :3].to(DEVICE).float() / 255
        found = vae.encode(video.flatten(0, 1) * 2 - 1).latent_dist.mean * vae.config.scaling_factor
        latents.append(found.unflatten(0, (len(video), FRAMES)).half())
        large = _resize_with_antialiasing(video[:, 0] * 2 - 1, (224, 224)) / 2 + 0.5  # as the pipeline does
        embeddings.append(encoder((large - mean) / std).image_embeds[:, None])
    return torch.cat(latents), torch.cat(embeddings)


def i2v_loss(unet, latents, embeddings, scale: float, batch: int, generator):
    """SVD's loss on so many clips of `encode_starts`: v prediction over noise levels.

    Less of it where little noise is, which only hides detail: else that would be most of the loss, and the
    camera's way shows from sigma 5 to 0.5. The image and its embedding are left out of one clip in ten each.
    """
    how = dict(generator=generator, device=DEVICE)
    rows = torch.randint(len(latents), (batch,), **how)
    clean = latents[rows].float()  # (n, F, LATENT, 8, 8)
    start = clean[:, :1] / scale + 0.03 * torch.randn(clean[:, :1].shape, **how)
    start = start * (torch.rand(batch, 1, 1, 1, 1, **how) > 0.1)
    image = embeddings[rows] * (torch.rand(batch, 1, 1, **how) > 0.1)
    sigma = (0.4 + 1.2 * torch.randn(batch, 1, 1, 1, 1, **how)).exp()
    norm = (sigma**2 + 1).sqrt()
    noise = torch.randn(clean.shape, **how)
    x = torch.cat([(clean + sigma * noise) / norm, start.expand(-1, FRAMES, -1, -1, -1)], dim=2)
    time_ids = torch.tensor([6.0, 127.0, 0.02], device=DEVICE).expand(batch, 3)
    v = unet(x, 0.25 * sigma.log().flatten(), image, added_time_ids=time_ids).sample
    # x0 = (x - sigma norm v) / norm^2
    error = v - (sigma * noise + clean - norm**2 * clean) / (sigma * norm)
    return (error.square() * (4 * sigma**2).clamp(max=1)).mean()


def train_i2v_unet(out: Path, updates: int, clips: int, seed: int, batch=32):
    """The U-Net of SVD; goes on from what is there.

    The first frame shows where the object starts, and so the way it goes; the camera's way is left to chance.
    """
    torch.manual_seed(seed + 70)
    generator = torch.Generator(DEVICE).manual_seed(seed + 71)
    latents, embeddings = encode_starts(out, clips, seed)
    unet, folder = make_i2v_unet(), out / "i2v" / "unet"
    if folder.exists():
        unet = UNetSpatioTemporalConditionModel.from_pretrained(folder, dtype=torch.float32)
    unet.to(DEVICE).set_attn_processor(AttnProcessor())
    average, follow = average_of(unet)
    scale = AutoencoderKLTemporalDecoder.load_config(out / "i2v" / "vae")["scaling_factor"]

    def loss_of(update):
        follow(update)
        loss = i2v_loss(unet, latents, embeddings, scale, batch, generator)
        return loss, {"loss": loss}

    fit(unet.parameters(), updates, 1e-3, "i2v", loss_of, muon=0.01)
    average.half().save_pretrained(folder)


def make_i2v_vae() -> AutoencoderKLTemporalDecoder:
    return AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        latent_channels=LATENT,
        sample_size=SIZE,
    )


def train_i2v_vae(out: Path, updates: int, clips: int, seed: int, batch=1):
    """An autoencoder with SVD's temporal decoder, 8 x 8 x LATENT a frame; goes on from what is there.

    batch: clips at once; in two updates of three twelve times as many single frames of different ones.
    """
    torch.manual_seed(seed + 72)
    generator = torch.Generator(DEVICE).manual_seed(seed + 72)
    pool, folder = draw_pool(clips, seed + 73).to(DEVICE), out / "i2v" / "vae"
    vae = make_i2v_vae()
    if folder.exists():
        vae = AutoencoderKLTemporalDecoder.from_pretrained(folder, dtype=torch.float32)
    average, follow = average_of(vae.to(DEVICE), 0.99)

    def some(below: int, count: int):
        return torch.randint(below, (count,), generator=generator, device=DEVICE)

    def loss_of(update):
        follow(update)
        if update % 3 == 0:
            frames, pictures = FRAMES, pool[some(len(pool), batch)].flatten(0, 1)
        else:
            frames, pictures = 1, pool[some(len(pool), 12 * batch), some(FRAMES, 12 * batch)]
        pictures, inside = (pictures.float() / 255).split([3, 1], dim=1)
        pictures = pictures * 2 - 1
        posterior = vae.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=DEVICE)
        decoded = vae.decode(posterior.mean + noise * posterior.std, num_frames=frames).sample
        loss = picture_loss(decoded, pictures, 1 + 5 * inside) + 1e-4 * posterior.kl().mean() / 64 / LATENT
        small = F.pixel_unshuffle(F.avg_pool2d(pictures, 4), 2)  # (n, 12, 8, 8)
        loss = loss + (posterior.mean[:, :PLAIN] - 2 * small).square().mean()
        error = decoded - pictures
        colour = error - error.mean(1, keepdim=True)  # or all stays grey for long
        loss = loss + 2 * (colour.abs() * (1 + 5 * inside)).mean()
        error = error.abs()
        on_object = (error * inside).sum() / (3 * inside.sum())
        return loss, {"error": error.mean(), "object": on_object, "std": posterior.std.mean()}

    fit(vae.parameters(), updates, 2e-3, "i2v vae", loss_of, decay=0.0, beta=0.99, rising=0.05)
    with torch.no_grad():
        spread = average.encode(pool[:64, 0, :3].float() / 127.5 - 1).latent_dist.mean.std().item()
    average.register_to_config(scaling_factor=1 / spread)
    average.half().save_pretrained(folder)


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
            sigma_max=20.0,  # i2v_loss hardly ever draws more
        ),
        feature_extractor=CLIPImageProcessor(),
    )
    for part in (pipeline.vae, pipeline.unet):
        part.register_to_config(_name_or_path="")
    pipeline.save_pretrained(folder)
