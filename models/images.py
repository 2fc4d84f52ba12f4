"""Pictures that videos start from, and the .jsonl files of prompts that name them."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from rewards import need, reading
from vader import Prompt


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
    return to_tensor(open_image(path), height, width)


def to_tensor(picture: Image.Image, height: int, width: int):
    """A picture, resized, as (3, H, W) float32 in [0, 1]."""
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def read_rows(path: str, lines: dict[int, str], family) -> list[Prompt]:
    """The prompts of a file of {"prompt": ..., "image": ...} lines; either may be left out. Raises BadInput.

    lines: by their number in the file. Image paths are relative to it. family: of the model, or None.
    """
    prompts = []
    for number, line in lines.items():
        wanted = f'{path}, line {number}: write {{"prompt": "...", "image": "file.png"}}'
        with reading(wanted):
            row = json.loads(line)
            text, image = row.pop("prompt", "").strip(), row.pop("image", None) or None
            need(not row and (text.encode() or image) and isinstance(image, str | None), wanted)
        if image:
            image = str(Path(path).parent / image)
            need(Path(image).is_file(), f"{path}, line {number}: can't read the image {image}: no file")
            if family and family.images != "no":
                open_image(image)
        prompts.append(Prompt(text, image))
    if family and family.images == "no" and any(prompt.image for prompt in prompts):
        print(f"{path}: this model makes no video from an image, the images are left out")
    return prompts
