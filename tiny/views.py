"""What train_i2v.py trains on: the tiny world with texture, two photographs, and a camera that moves.

The captions are world.py's, which say nothing of the camera; a clip in five shows a photograph in the place's
stead, `a {colour} {object} {motion} in front of a {cat or rocket}`. One camera in five stands still, the rest
do one thing at a steady rate: pan, tilt, zoom or roll; a third of all shake. All frames are
(..., 3, 64, 64) in [0, 1].
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from world import (
    FRAMES,
    MOTIONS,
    PLACE_COLOURS,
    SEEN,
    SIZE,
    UNSEEN,
    caption,
    graded,
    pick,
    quality,
    save_picture,
    uniform,
    with_object,
)

PHOTOS = ("cat", "rocket")
SPAN = 1.8  # a scene is drawn from -SPAN to SPAN, of which a camera at rest sees -1 to 1
DRAWN = 192  # pixels of a scene
FASTEST = torch.tensor([4.0, 4.0, 6.0, 6.0])  # percent a step: right, up, in, rolled right
SLOWEST = 0.3  # of that
SHAKE = 0.7  # percent of the frame
FLATNESS = (2, 1, 2, 1)  # of the ground's texture: waves lie flat, and dunes


def noise(n: int, channels: int, cells: int, generator, stretch=1):
    """Smooth noise of so many cells across, `stretch` times as many down: (n, channels, DRAWN, DRAWN)."""
    rows = torch.randn((n, channels, cells * stretch, cells), generator=generator)
    return F.interpolate(rows, (DRAWN, DRAWN), mode="bicubic", align_corners=False)


def draw_scenes(place, generator):
    """A place with texture for each number in place (n,): clouds or stars over waves, dunes or grass."""
    n = len(place)
    axis = ((torch.arange(DRAWN) + 0.5) / DRAWN * 2 - 1) * SPAN
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    wide = torch.tensor(PLACE_COLOURS)[place][..., None, None]  # (n, 4, 3, 1, 1)
    phase = uniform((n, 1, 1), 0, 2 * math.pi, generator)
    edge = uniform((n, 1, 1), -0.1, 0.5, generator) + 0.1 * torch.sin(2.2 * x + phase)
    ground = torch.sigmoid((y - edge) * 40)[:, None]
    sky_mix = ((y + SPAN) / (edge + SPAN)).clamp(0, 1)[:, None]
    ground_mix = ((y - edge) / (SPAN - edge)).clamp(0, 1)[:, None]
    sky = wide[:, 0] * (1 - sky_mix) + wide[:, 1] * sky_mix
    soil = wide[:, 2] * (1 - ground_mix) + wide[:, 3] * ground_mix

    rough = torch.zeros(n, 1, DRAWN, DRAWN)
    for row, kind in enumerate(place.tolist()):
        for cells in (8, 16):
            rough[row] += noise(1, 1, cells, generator, FLATNESS[kind])[0] / 2
    soil = soil * (1 + 0.45 * rough)
    clouds = sum(noise(n, 1, cells, generator) for cells in (5, 10, 18))
    sky = sky * (1 + 0.13 * clouds) + 0.05 * clouds
    scene = sky * (1 - ground) + soil * ground
    for row in (place == 1).nonzero().ravel().tolist():
        across, down = (uniform((60, 1, 1), -SPAN, SPAN, generator) for _ in range(2))
        bright = uniform((60, 1, 1), 0.3, 0.9, generator)
        stars = torch.exp(-((x - across) ** 2 + (y - down) ** 2) / 0.0025)
        scene[row] += (bright * stars).amax(0)
    return scene.clamp(0, 1)


def crop_photos(photo, generator):
    """A random square of a photograph of tiny/ for each number in photo (n,), half of them mirrored."""
    scenes = []
    for number in photo.tolist():
        file = Path(__file__).parent / f"photo-{PHOTOS[number]}.jpg"
        picture = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
        h, w = picture.shape[1:]
        side = int(min(h, w) * uniform((), 0.8, 1.0, generator))
        top = torch.randint(h - side + 1, (), generator=generator)
        left = torch.randint(w - side + 1, (), generator=generator)
        square = picture[None, :, top : top + side, left : left + side]
        if torch.rand((), generator=generator) < 0.5:
            square = square.flip(-1)
        scenes.append(F.interpolate(square, (DRAWN, DRAWN), mode="bilinear", antialias=True)[0])
    return torch.stack(scenes)


def draw_paths(n: int, generator, frames=FRAMES):
    """How far each camera is right, up, in and rolled right of its start, in percent: (n, frames, 4)."""
    moves = F.one_hot(torch.randint(5, (n,), generator=generator), 5)[:, :4]  # the fifth stands still
    way = torch.randint(2, (n, 1), generator=generator) * 2 - 1
    rates = moves * FASTEST * way * uniform((n, 1), SLOWEST, 1, generator)
    path = rates[:, None] * torch.arange(frames)[:, None]
    shaky = torch.rand((n, 1, 1), generator=generator) < 0.33
    path = path + SHAKE * shaky * torch.randn((n, frames, 4), generator=generator)
    return path - path[:, :1]


def seen_from(path):
    """Where in the scene the pixels of a camera lie: x, y (n, frames, 64, 64)."""
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    right, up, closer, roll = (path / 100)[..., None, None].unbind(2)
    x, y = torch.exp(-closer) * x, torch.exp(-closer) * y
    x, y = torch.cos(roll) * x - torch.sin(roll) * y, torch.sin(roll) * x + torch.cos(roll) * y
    return x + 2 * right, y - 2 * up


def draw_views(combinations, generator, frames=FRAMES):
    """A clip for each (colour, object, motion, place), seen by a camera that moves; places 4 and 5: PHOTOS.

    Returns video: (n, frames, 3, 64, 64) float32 in [0, 1]; path: (n, frames, 4), of `draw_paths`;
    inside: (n, frames, 1, 64, 64) float32 in [0, 1], 1 where the object is.
    """
    n = len(combinations)
    colour, thing, motion, place = torch.tensor(combinations).T
    saturation, light, _, _ = quality(n, generator, False)
    scenes = torch.empty(n, 3, DRAWN, DRAWN)
    drawn = place < 4
    if drawn.any():
        scenes[drawn] = draw_scenes(place[drawn], generator)
    if not drawn.all():
        scenes[~drawn] = crop_photos(place[~drawn] - 4, generator)

    path = draw_paths(n, generator, frames)
    x, y = seen_from(path)
    places = torch.stack([x, y], -1).flatten(0, 1) / SPAN
    seen = scenes[:, None].expand(-1, frames, -1, -1, -1).flatten(0, 1)
    seen = F.grid_sample(seen, places, padding_mode="reflection", align_corners=False)
    seen = seen.unflatten(0, (n, frames))

    direction = torch.tensor(list(MOTIONS.values()), dtype=torch.float32)[motion]
    travel = uniform((n, 1, 1), 0.3, 0.6, generator)
    middle = uniform((n, 1, 2), -0.25, 0.25, generator)
    clock = torch.linspace(-0.5, 0.5, frames)[:, None]
    centre = middle + direction[:, None] * travel * clock
    radius = uniform(n, 0.22, 0.32, generator)
    video, inside = with_object(seen, x, y, colour, thing, centre, radius)

    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    light_y, light_x = torch.meshgrid(axis, axis, indexing="ij")
    video = graded(video, light_x, light_y, saturation, light, generator)
    return video.clamp(0, 1), path, inside


def pick_views(combinations, n: int, generator):
    """n random combinations, one in five with a photograph for its place."""
    chosen = []
    for combination in pick(combinations, n, generator):
        if torch.rand((), generator=generator) < 0.2:
            number = 4 + torch.randint(2, (), generator=generator).item()
            combination = (*combination[:3], number)
        chosen.append(combination)
    return chosen


def view_caption(combination) -> str:
    """The words for a combination of `pick_views`."""
    *_, place = combination
    if place < 4:
        return caption(combination)
    words = caption((*combination[:3], 0))
    return words.replace("over the sea", f"in front of a {PHOTOS[place - 4]}")


def draw_images(out: Path, n: int, seed: int):
    """images.jsonl and images/: first frames of n drawn clips, every tenth of a held-out caption."""
    generator = torch.Generator().manual_seed(seed + 90)
    rows = []
    (out / "images").mkdir(exist_ok=True)
    for number in range(1, n + 1):
        (combination,) = pick_views(SEEN if number % 10 else UNSEEN, 1, generator)
        video, _, _ = draw_views([combination], generator)
        name = f"images/{number:02d}.png"
        save_picture(video[0, 0], out / name)
        rows.append(json.dumps({"prompt": view_caption(combination), "image": name}))
    (out / "images.jsonl").write_text("\n".join(rows) + "\n")
