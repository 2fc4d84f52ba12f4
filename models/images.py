"""Pictures that videos start from, for the families that take them."""

import numpy as np
import torch
from PIL import Image, ImageOps

from rewards import reading


def open_image(path: str) -> Image.Image:
    """A picture file, upright, as RGB of 8 bits; what is transparent shows white. Raises BadInput."""
    with reading(f"can't read the image {path}"):
        picture = ImageOps.exif_transpose(Image.open(path))
        if picture.mode[0] in "IF":  # of 16 bits, or of floats: from 0 to 1, else to the largest
            values = np.nan_to_num(np.asarray(picture, dtype=np.float32))
            top = 65535 if picture.mode[0] == "I" else max(1, values.max())
            picture = Image.fromarray((255 * (values / top).clip(0, 1)).round().astype(np.uint8))
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def read_image(path: str, height: int, width: int):
    """A picture file, resized, as (3, H, W) float32 in [0, 1]. Raises BadInput."""
    picture = open_image(path).resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
