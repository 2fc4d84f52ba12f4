"""Pictures that videos start from, flows that start from one, and .jsonl files of prompts that name them."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

import rewards
from rewards import as_bad_input, require
from vader import Prompt


def open_image(path: str) -> Image.Image:
    """A picture file, upright, as RGB of 8 bits; what is transparent shows white. Raises BadInput."""
    with as_bad_input(f"can't read the image {path}"):
        picture = ImageOps.exif_transpose(Image.open(path))
        if picture.mode[0] in "IF":  # of 16 bits, or of floats: from 0 to 1, else to the largest
            values = np.nan_to_num(np.asarray(picture, dtype=np.float32))
            top = 65535 if picture.mode[0] == "I" else max(1, values.max())
            picture = Image.fromarray((255 * (values / top).clip(0, 1)).round().astype(np.uint8))
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def read_image(path: str, height: int, width: int):
    """A picture file, resized, as (3, H, W) float32 in [0, 1]. Raises BadInput."""
    return to_tensor(open_image(path), height, width)


def to_tensor(picture: Image.Image, height: int, width: int):
    """A picture, resized, as (3, H, W) float32 in [0, 1]."""
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


class FromImage:
    """For a flow whose video may start from an image: its latent is the first, at time 0, and stays.

    A family gives `flow(x, times, cond)`, the denoiser's f, times: (1, 1, 1), or (F, 1, 1) where the image's
    is 0; and `statistics()`, mean and standard deviation of the latents, (C, 1, 1, 1) each.
    """

    images = "may"

    @torch.no_grad()
    def encode(self, prompts, cfg):
        conds, starts = super().encode(prompts, cfg), [prompt for prompt in prompts if prompt.image]
        if starts:
            self.vae = rewards.load(self.vae_class, self.source, "--model", "vae", self.dtype).to(self.device)
        for prompt in starts:
            conds[prompt] |= self.start(open_image(prompt.image), cfg)
        return conds

    def start(self, picture, cfg):
        """What `denoise` is told of the picture that a video starts from, without batch dimension."""
        pixels, (mean, std) = to_tensor(picture, cfg.height, cfg.width)[None, :, None], self.statistics()
        latents = self.vae.encode((pixels * 2 - 1).to(self.device, self.dtype)).latent_dist.mode()[0]
        return {"image": (latents.float() - mean) / std}  # (C, 1, H, W)

    def denoise(self, x, t, cond):
        t = t.to(x.device).view(1, 1, 1)
        text = {name: value for name, value in cond.items() if name != "image"}
        if "image" not in cond:
            return self.flow(x, t, text)
        times = t * (torch.arange(x.shape[2], device=x.device) > 0)[:, None, None]
        f = self.flow(torch.cat([cond["image"], x[:, :, 1:]], dim=2), times, text)
        to_image = (x[:, :, :1] - cond["image"]) * 1000 / t  # straight to it
        return torch.cat([to_image, f[:, :, 1:]], dim=2)


def read_rows(path: str, lines: dict[int, str], family) -> list[Prompt]:
    """The prompts of a file of {"prompt": ..., "image": ...} lines; either may be left out. Raises BadInput.

    lines: by their number in the file. Image paths are relative to it. family: of the model, or None.
    """
    prompts = []
    for number, line in lines.items():
        wanted = f'{path}, line {number}: write {{"prompt": "...", "image": "file.png"}}'
        with as_bad_input(wanted):
            row = json.loads(line)
            text, image = row.pop("prompt", "").strip(), row.pop("image", None) or None
            require(not row and (text.encode() or image) and isinstance(image, str | None), wanted)
        if image:
            image = str(Path(path).parent / image)
            require(Path(image).is_file(), f"{path}, line {number}: can't read the image {image}: no file")
            if family and family.images != "no":
                open_image(image)
        prompts.append(Prompt(text, image))
    if family and family.images == "no" and any(prompt.image for prompt in prompts):
        print(f"{path}: this model makes no video from an image, the images are left out")
    return prompts
