"""Text to video in ModelScope's layout: the autoencoder of single pictures and the U-Net."""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm, trange
from train_clip import tokenize
from training import fit, picture_loss
from transformers import CLIPTextModel, CLIPTokenizer
from world import FRAMES, SEEN, SIZE, caption, draw, pick


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def vae_loss(vae, extra: float, generator, update: int):
    """Loss and figures of 32 drawn pictures; pixels of the object weigh `extra` more."""
    moments = torch.randint(FRAMES, (32, 1), generator=generator)
    chosen = pick(SEEN, 32, generator)
    video, _, inside = draw(chosen, generator, full=update % 2 == 0, moments=moments)
    pictures, inside = video[:, 0] * 2 - 1, inside[:, 0]
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(posterior.mean + noise * posterior.std).sample
    decoded = decoded.float()
    mean, var, logvar = posterior.mean.float(), posterior.var.float(), posterior.logvar.float()
    kl = 0.5 * (mean**2 + var - 1 - logvar).mean()
    loss = picture_loss(decoded, pictures, 1 + extra * inside) + 2e-4 * kl
    error = (decoded - pictures).abs()
    return loss, {"error": error.mean(), "object": (error * inside).sum() / (3 * inside.sum()), "kl": kl}


def train_vae(out: Path, legs, seed: int):
    """A KL autoencoder of single pictures, 64 x 64 x 3 to 8 x 8 x 4, on the whole range of gradings.

    legs: (updates, highest learning rate, extra weight of the object's pixels) each; the second leg mends the
    objects' colours, which are too few pixels to count in the first. A leg that is done is kept in work/.
    """
    for number, (updates, rate, extra) in enumerate(legs):
        torch.manual_seed(seed + number)
        generator = torch.Generator().manual_seed(seed + 1 + 10 * number)
        vae = make_vae()
        done = out / "work" / f"vae-{number}.safetensors"
        if done.exists():
            vae.load_state_dict(load_file(done))
            continue
        if number:
            vae.load_state_dict(load_file(out / "work" / f"vae-{number - 1}.safetensors"))
        loss_of = functools.partial(vae_loss, vae, extra, generator)
        fit(vae.parameters(), updates, rate, f"vae leg {number}", loss_of, decay=0.0, beta=0.99, rising=0.05)
        done.parent.mkdir(parents=True, exist_ok=True)
        save_file(vae.state_dict(), done)
    vae.eval()
    with torch.no_grad():
        video, _, _ = draw(pick(SEEN, 32, generator), generator)
        spread = vae.encode(video.flatten(0, 1) * 2 - 1).latent_dist.mean.std().item()
    vae.register_to_config(scaling_factor=1 / spread)
    vae.half().save_pretrained(out / "t2v" / "vae")


@torch.no_grad()
def encode_clips(out: Path, clips: int, seed: int):
    """Latents of drawn clips (clips, 4, 8, 8, 8), and each one's caption number in SEEN; cached in work/."""
    cache = out / "work" / f"latents-{clips}-{seed}.safetensors"
    if cache.exists():
        stored = load_file(cache)
        return stored["latents"].float(), stored["labels"]
    generator = torch.Generator().manual_seed(seed + 2)
    vae = AutoencoderKL.from_pretrained(out / "t2v" / "vae", dtype=torch.float32).eval()
    order = torch.cat(
        [torch.randperm(len(SEEN), generator=generator) for _ in range(clips // len(SEEN) + 1)]
    )[:clips]
    latents = torch.empty(clips, 4, FRAMES, SIZE // 8, SIZE // 8)
    for first in trange(0, clips, 16, desc="latents"):
        chosen = order[first : first + 16].tolist()
        video, _, _ = draw([SEEN[i] for i in chosen], generator)
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(video.flatten(0, 1) * 2 - 1).latent_dist.mean.float()
            mean = mean * vae.config.scaling_factor
        latents[first : first + 16] = mean.unflatten(0, (len(chosen), FRAMES)).transpose(1, 2)
    cache.parent.mkdir(parents=True, exist_ok=True)
    save_file({"latents": latents.half(), "labels": order}, cache)
    return latents, order


def make_unet() -> UNet3DConditionModel:
    return UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=96,
        attention_head_dim=16,
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def train_unet(out: Path, updates: int, clips: int, batch: int, seed: int):
    """The U-Net by the v-prediction loss on frozen text states, one caption in ten empty; EMA."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 3)
    latents, labels = encode_clips(out, clips, seed)
    tokenizer = CLIPTokenizer.from_pretrained(out / "t2v" / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(out / "t2v" / "text_encoder", dtype=torch.float32).eval()
    with torch.no_grad():
        states = text_encoder(tokenize(tokenizer, [caption(c) for c in SEEN] + [""])).last_hidden_state
    alphas = make_scheduler().alphas_cumprod
    unet = make_unet().eval()  # eval: its dropout stays off; there is no other difference
    unet.set_attn_processor(AttnProcessor())  # plain: on so few tokens twice as fast as the fused one
    average = {k: v.clone() for k, v in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=8e-4, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 8e-4, updates, pct_start=0.05, final_div_factor=50
    )
    work = out / "work" / "unet.pt"
    first, recent = 0, 0.0
    if work.exists():
        stored = torch.load(work, weights_only=True)
        first, average = stored["update"], stored["average"]
        unet.load_state_dict(stored["unet"])
        optimizer.load_state_dict(stored["optimizer"])
        schedule.load_state_dict(stored["schedule"])
        generator.set_state(stored["generator"])
    for update in (
        bar := tqdm(range(first, updates), desc="unet", initial=first, total=updates, mininterval=5)
    ):
        chosen = torch.randint(clips, (batch,), generator=generator)
        clean, label = latents[chosen], labels[chosen].clone()
        label[torch.rand(batch, generator=generator) < 0.1] = len(SEEN)
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(1000, (batch,), generator=generator)
        alpha = alphas[t].sqrt()[:, None, None, None, None]
        sigma = (1 - alphas[t]).sqrt()[:, None, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            out_v = unet(alpha * clean + sigma * noise, t, states[label], return_dict=False)[0]
        loss = F.mse_loss(out_v.float(), alpha * noise - sigma * clean)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        keep = min(0.998, (update + 1) / (update + 10))
        for name, value in unet.state_dict().items():
            average[name].lerp_(value, 1 - keep)
        recent = loss.item() if update == first else 0.98 * recent + 0.02 * loss.item()
        bar.set_postfix(loss=f"{recent:.4f}", refresh=False)
        if (update + 1) % 250 == 0 or update + 1 == updates:
            stored = {
                "update": update + 1,
                "average": average,
                "unet": unet.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "generator": generator.get_state(),
            }
            torch.save(stored, work)
            save_unet(out, average)


def save_unet(out: Path, weights):
    """Write the U-Net, the scheduler and model_index.json beside the parts that are there."""
    unet = make_unet()
    unet.load_state_dict(weights)
    folder = out / "t2v"
    pipeline = TextToVideoSDPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float16),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float16),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet.half(),
        scheduler=make_scheduler(),
    )
    pipeline.vae.register_to_config(_name_or_path="")  # else the config would name the folder it came from
    pipeline.save_pretrained(folder)
