"""Pictures that videos start from, flows whose video may start from one, and videos as a picture."""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageOps

import rewards
from rewards import as_bad_input, evenly_spaced


# ---- Pictures ----------------------------------------------------------------------------------------------
def open_image(path: str) -> Image.Image:
    """A picture file, upright, as RGB of 8 bits; what is transparent shows white. Raises BadInput."""
    problem = f"can't read the image {path}"
    with as_bad_input(problem):
        picture = ImageOps.exif_transpose(Image.open(path))
        picture.load()
    if picture.mode[0] in "IF":
        picture = to_eight_bits(picture)
    with as_bad_input(problem):  # not every kind of colours can be converted
        picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def to_eight_bits(picture: Image.Image) -> Image.Image:
    """A picture of whole numbers (16 bits), or of floats: from 0 to 1, or to the largest if that is more."""
    values = np.asarray(picture, dtype=np.float32)
    values = np.nan_to_num(values)
    top = 65535
    if picture.mode[0] == "F":
        top = max(1, values.max())
    shades = (values / top).clip(0, 1)
    levels = (255 * shades).round()
    return Image.fromarray(levels.astype(np.uint8))


def read_image(path: str, height: int, width: int):
    """A picture file, resized, as (3, H, W) float32 in [0, 1]. Raises BadInput."""
    return to_tensor(open_image(path), height, width)


def to_tensor(picture: Image.Image, height: int, width: int):
    """A picture, resized, as (3, H, W) float32 in [0, 1]."""
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(picture))  # (H, W, 3) uint8
    return pixels.permute(2, 0, 1) / 255


# ---- Videos that start from one ----------------------------------------------------------------------------
class FromImage:
    """For a flow whose video may start from an image: its latent is the first, at time 0, and stays.

    A family gives two methods. `flow(x, times, cond)` is the denoiser's f; times: (1, 1, 1), or (F, 1, 1)
    where the image's is 0. `statistics()` is mean and standard deviation of the latents, (C, 1, 1, 1) each.
    """

    images = "may"

    @torch.no_grad()
    def encode(self, prompts, cfg):
        """As in vader.py, and for prompts with an image what `start` gives. Raises BadInput."""
        conds = super().encode(prompts, cfg)
        for prompt in prompts:
            if not prompt.image:
                continue
            if self.vae is None:
                vae = rewards.load(self.vae_class, self.source, "--model", "vae", self.dtype)
                self.vae = vae.to(self.device)
            start = self.start(open_image(prompt.image), cfg)
            for name, value in start.items():
                conds[prompt][name] = value.cpu()
        return conds

    def start(self, picture, cfg):
        """What `denoise` is told of the picture that a video starts from, without batch dimension."""
        pixels = to_tensor(picture, cfg.height, cfg.width) * 2 - 1
        pixels = pixels[None, :, None].to(self.device, self.dtype)  # (1, 3, 1, H, W)
        mean, std = self.statistics()
        latents = self.vae.encode(pixels).latent_dist.mode()[0]
        return {"image": (latents.float() - mean) / std}  # (C, 1, H / scale, W / scale)

    def denoise(self, x, t, cond):
        """As in vader.py. With an image, f of the first latent frame leads straight to the image's latent."""
        t = t.to(x.device).view(1, 1, 1)
        if "image" not in cond:
            return self.flow(x, t, cond)
        text = dict(cond)
        image = text.pop("image")  # (B, C, 1, H, W)
        is_video = torch.arange(x.shape[2], device=x.device) > 0
        times = t * is_video[:, None, None]  # (F, 1, 1), the image's is 0
        start = torch.cat([image, x[:, :, 1:]], dim=2)
        f = self.flow(start, times, text)
        # a flow's time is 1000 sigma, and x = image + sigma f
        to_image = (x[:, :, :1] - image) * 1000 / t
        return torch.cat([to_image, f[:, :, 1:]], dim=2)


def strip(base: Path, tuned: Path, numbers):
    """Videos of two folders as a picture, a row each: three frames of the base, three after training.

    (H, W, 3) uint8, the videos at half their size.
    """
    lines = []
    for n in numbers:
        stills = []
        for folder in (base, tuned):
            video = iio.imread(folder / f"{n:03d}.mp4", plugin="FFMPEG")  # (F, H, W, 3)
            stills += list(video[evenly_spaced(3, len(video)), ::2, ::2])
        lines.append(np.concatenate(stills, axis=1))
    return np.concatenate(lines)
