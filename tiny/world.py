"""The tiny world: its captions, and how its clips are drawn.

One object of one colour moves through one place, `a {colour} {object} {motion} {place}`, in 64 x 64 pixels
and 8 frames. One caption in six is held out of training and of prompts.txt (`held_out`). Most clips are dull
and unevenly lit, and a quarter of them jitter, so that a reward has something to improve.
All frames here are (..., 3, 64, 64) float32 in [0, 1].
"""

import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

SIZE, FRAMES = 64, 8
COLOURS = {
    "red": (0.93, 0.12, 0.14),
    "yellow": (1.0, 0.86, 0.08),
    "green": (0.1, 0.75, 0.2),
    "blue": (0.12, 0.3, 0.95),
    "purple": (0.6, 0.15, 0.8),
    "white": (0.98, 0.98, 0.98),
}
OBJECTS = ["balloon", "star", "heart", "kite", "cube", "moon"]
MOTIONS = {"rising": (0, -1), "falling": (0, 1), "drifting left": (-1, 0), "drifting right": (1, 0)}
PLACES = ["over the sea", "in the night sky", "over the desert", "over a meadow"]
# sky at the top, sky at the horizon, ground at the horizon, ground at the bottom
PLACE_COLOURS = [
    [(0.35, 0.65, 0.95), (0.8, 0.9, 0.98), (0.1, 0.45, 0.65), (0.03, 0.2, 0.4)],
    [(0.02, 0.02, 0.12), (0.1, 0.1, 0.32), (0.1, 0.1, 0.32), (0.16, 0.14, 0.4)],
    [(0.45, 0.7, 0.9), (0.98, 0.85, 0.65), (0.92, 0.7, 0.38), (0.75, 0.48, 0.2)],
    [(0.4, 0.72, 0.98), (0.85, 0.95, 0.98), (0.45, 0.75, 0.25), (0.2, 0.5, 0.12)],
]
VISIBLE = [0, 1, 3]  # the words that a single picture shows: all but the motion
COMBINATIONS = list(itertools.product(range(6), range(6), range(4), range(4)))


def caption(combination) -> str:
    """The words for (colour, object, motion, place) indices."""
    colour, thing, motion, place = combination
    return f"a {list(COLOURS)[colour]} {OBJECTS[thing]} {list(MOTIONS)[motion]} {PLACES[place]}"


def held_out(combination) -> bool:
    """One combination in six is never trained on; every pair of words is still seen together."""
    colour, thing, motion, place = combination
    return (colour + thing + 2 * motion + 3 * place) % 6 == 5


SEEN = [c for c in COMBINATIONS if not held_out(c)]
UNSEEN = [c for c in COMBINATIONS if held_out(c)]


def pick(combinations, n, generator):
    """n random ones of a list of combinations."""
    return [combinations[i] for i in torch.randint(len(combinations), (n,), generator=generator).tolist()]


def star_distance(x, y):
    """Signed distance (about) to a five-pointed star of outer radius 1, negative inside."""
    angle = torch.atan2(x, -y)
    radius = torch.hypot(x, y)
    fold = torch.remainder(angle + math.pi / 5, 2 * math.pi / 5) - math.pi / 5
    u, v = radius * torch.cos(fold), radius * torch.sin(fold).abs()
    tip = torch.tensor([1.05, 0.0])
    notch = 0.5 * torch.tensor([math.cos(math.pi / 5), math.sin(math.pi / 5)])
    edge = notch - tip
    normal = torch.tensor([edge[1], -edge[0]]) / edge.norm()
    return (u - tip[0]) * normal[0] + (v - tip[1]) * normal[1]


def shape_distance(thing: int, x, y):
    """Signed distance (about) from points x, y to object number `thing` of radius 1; y grows downwards."""
    name = OBJECTS[thing]
    if name == "balloon":
        body = torch.hypot(x, (y + 0.2) * 0.92) - 0.8
        knot = torch.maximum((x.abs() - 0.09), (y - 0.95).abs() - 0.3)
        return torch.minimum(body, knot)
    if name == "star":
        return star_distance(x, y)
    if name == "heart":
        # a square on its corner, and a circle on each of its upper sides
        point = (x.abs() + (y - 0.12).abs() - 0.8) / math.sqrt(2)
        lobe = torch.hypot(x.abs() - 0.4, y + 0.28) - 0.8 / math.sqrt(2)
        return torch.minimum(lobe, point)
    if name == "kite":
        top = (x.abs() * 1.5 - (y + 1.05)) * 0.55
        bottom = (x.abs() * 1.7 + (y - 1.05)) * 0.5
        return torch.maximum(top, bottom)
    if name == "cube":
        return torch.maximum(x.abs(), y.abs()) - 0.78
    outer = torch.hypot(x, y) - 0.95
    bite = torch.hypot(x - 0.5, y + 0.15) - 0.75
    return torch.maximum(outer, -bite)


def uniform(n, low, high, generator):
    return low + (high - low) * torch.rand(n, generator=generator)


def quality(n: int, generator, full: bool):
    """How a clip is graded: saturation, light, sharpness, grain; evenly over the range if `full`, else dull.

    Returns four (n,) tensors: saturation 0-1, light 0-1, blur in pixels 0-2.5, grain 0-0.12.
    """
    if full:
        saturation, light = uniform(n, 0, 1, generator), uniform(n, 0, 1, generator)
        soft = uniform(n, 0, 1, generator) < 0.5
        blur = torch.where(soft, uniform(n, 0, 2.5, generator), torch.zeros(n))
        grainy = uniform(n, 0, 1, generator) < 0.3
        grain = torch.where(grainy, uniform(n, 0, 0.12, generator), torch.zeros(n))
        return saturation, light, blur, grain
    saturation = 0.05 + 0.75 * uniform(n, 0, 1, generator) ** 1.5
    light = 0.1 + 0.75 * uniform(n, 0, 1, generator)
    return saturation, light, torch.zeros(n), torch.zeros(n)


def aesthetic_target(saturation, light, blur, grain):
    """The target of the tiny aesthetic model, 1 to 10: vivid, sharp, well lit beats dull, blurred, dim."""
    score = 0.45 * saturation + 0.35 * light + 0.2 * (1 - blur / 2.5)
    return 1 + 9 * score * (1 - 0.5 * grain / 0.12)


def blur_rows(frames, sigma):
    """Gaussian blur along the last axis, a different sigma (n,) for each clip of frames (n, ..., W)."""
    offsets = torch.arange(-6, 7)
    kernel = torch.exp(-(offsets**2) / (2 * sigma.clamp(min=1e-3)[:, None] ** 2))
    kernel = kernel / kernel.sum(1, keepdim=True)
    n, width = frames.shape[0], frames.shape[-1]
    padded = F.pad(frames.reshape(n, -1, width), (6, 6), mode="replicate")
    windows = padded.unfold(-1, 13, 1)
    return torch.einsum("nrwk,nk->nrw", windows, kernel).reshape(frames.shape)


def with_object(scene, x, y, colour, thing, centre, radius):
    """An object over each scene (n, k or 1, 3, 64, 64): the clips, and how much of a pixel it covers.

    x, y: where each pixel is, (64, 64) or (n, k, 64, 64); colour, thing, radius: (n,); centre: (n, k, 2).
    """
    radius = radius[:, None, None, None]
    u = (x - centre[:, :, 0, None, None]) / radius
    v = (y - centre[:, :, 1, None, None]) / radius
    distance = torch.empty_like(u)
    for number in range(len(OBJECTS)):
        chosen = thing == number
        distance[chosen] = shape_distance(number, u[chosen], v[chosen])
    distance = distance * radius * SIZE / 2  # pixels
    inside = torch.sigmoid(-distance * 2.5)[:, :, None]
    rim = torch.sigmoid((distance + 1.2) * 2.5)[:, :, None]
    paint = torch.tensor(list(COLOURS.values()))[colour][:, None, :, None, None]
    shade = (1.0 - 0.16 * (u + v)).clamp(0.6, 1.25)[:, :, None]  # lit from the upper left
    body = (paint * shade).clamp(0, 1) * (1 - 0.65 * rim)
    return scene * (1 - inside) + body * inside, inside


def graded(video, x, y, saturation, light, generator):
    """Clips with dull colours, dim and uneven light, by `quality`'s saturation and light."""
    n = len(video)
    grey = video.mean(2, keepdim=True)
    video = grey + (video - grey) * (0.3 + 0.7 * saturation)[:, None, None, None, None]
    side = uniform(n, 0, 2 * math.pi, generator)[:, None, None]
    slope = ((torch.cos(side) * x + torch.sin(side) * y) * 0.5)[:, None, None]
    lack = (1 - light)[:, None, None, None, None]
    return video * (1 - 0.38 * lack) * (1 + 0.55 * lack * slope)


def draw(combinations, generator, full=False, moments=None, frames=FRAMES):
    """Draw a clip for each (colour, object, motion, place); `moments` (n, k) picks frames, else it is all.

    Returns video: (n, k, 3, 64, 64) float32 in [0, 1]; target: (n,) float32 in [1, 10], the aesthetic target;
    inside: (n, k, 1, 64, 64) float32 in [0, 1], 1 where the object is.
    """
    n = len(combinations)
    moments = torch.arange(frames).expand(n, frames) if moments is None else moments
    colour, thing, motion, place = torch.tensor(combinations).T
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    saturation, light, blur, grain = quality(n, generator, full)

    # place: sky and ground with a wavy horizon, ripples on the sea, small stars at night
    wide = torch.tensor(PLACE_COLOURS)[place]  # (n, 4, 3)
    horizon = uniform(n, 0.3, 0.55, generator)[:, None, None]
    wave = torch.tensor([0.0, 0.0, 0.12, 0.08])[place][:, None, None]
    phase = uniform(n, 0, 2 * math.pi, generator)[:, None, None]
    edge = horizon + wave * torch.sin(2.2 * x + phase)
    ground = torch.sigmoid((y - edge) * 40)[:, None]
    sky_mix = ((y + 1) / (edge + 1)).clamp(0, 1)[:, None]
    ground_mix = ((y - edge) / (1.001 - edge)).clamp(0, 1)[:, None]
    sky = wide[:, 0, :, None, None] * (1 - sky_mix) + wide[:, 1, :, None, None] * sky_mix
    soil = wide[:, 2, :, None, None] * (1 - ground_mix) + wide[:, 3, :, None, None] * ground_mix
    scene = sky * (1 - ground) + soil * ground
    ripple = torch.sin(26 * y + 2 * torch.sin(3 * x + phase)) * ground[:, 0] * (place == 0)[:, None, None]
    scene = scene + 0.06 * ripple[:, None]
    star_x, star_y = (uniform((n, 5, 1, 1), -0.95, 0.95, generator) for _ in range(2))
    twinkle = (
        torch.exp(-((x - star_x) ** 2 + (y - star_y) ** 2) / 0.002).amax(1) * (place == 1)[:, None, None]
    )
    scene = (scene + 0.75 * twinkle[:, None])[:, None]  # (n, 1, 3, H, W)

    # object: a straight path through about the middle, some clips with jitter
    direction = torch.tensor(list(MOTIONS.values()), dtype=torch.float32)[motion]
    travel = uniform(n, 0.75, 1.1, generator)[:, None, None]
    middle = uniform((n, 1, 2), -0.18, 0.18, generator) - torch.tensor([0.0, 0.08])
    clock = torch.linspace(-0.5, 0.5, frames)[moments][..., None]
    shaky = (uniform(n, 0, 1, generator) < 0.25)[:, None, None]
    jitter = (
        0.035
        * torch.randn((n, frames, 2), generator=generator).gather(1, moments[..., None].expand(-1, -1, 2))
        * shaky
    )
    centre = middle + direction[:, None] * travel * clock + jitter
    radius = uniform(n, 0.31, 0.39, generator)
    video, inside = with_object(scene, x, y, colour, thing, centre, radius)

    video = graded(video, x, y, saturation, light, generator)
    if full:
        video = blur_rows(blur_rows(video, blur).transpose(-1, -2), blur).transpose(-1, -2)
        video = video + grain[:, None, None, None, None] * torch.randn(video.shape, generator=generator)
    return video.clamp(0, 1), aesthetic_target(saturation, light, blur, grain), inside


def save_picture(picture, file: Path):
    """picture: (3, H, W) in [0, 1]."""
    Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(file)
