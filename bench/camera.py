"""The reward `camera` at work, alone: on views of a photograph that are rendered, or moved pixel by pixel.

    python bench/camera.py                # both tables, camera.png (a minute on a CPU)

A view is cut out of a photograph by a path: for each frame how far the camera is to the right, up, in, and
rolled to the right, in percent as extras/camera.py counts. The first table optimises the path, eight
times four numbers that begin as a shaking camera's, by the reward's gradient alone, and prints the true rates
before and after. The second optimises the pixels of a still clip, and stops where the rate measured is 2.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import rewards  # noqa: E402 (needs the line above)

# move -> (which rate, sign)
MOVES = {"pan right": (0, 1), "pan left": (0, -1), "pan up": (1, 1), "pan down": (1, -1)}
MOVES |= {"zoom in": (2, 1), "zoom out": (2, -1), "roll right": (3, 1), "roll left": (3, -1)}


def photo(name: str):
    """A photograph of tiny/, (3, H, W) in [0, 1]."""
    picture = Image.open(HERE.parent / "tiny" / f"photo-{name}.jpg").convert("RGB")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def texture(seed: int):
    """Noise of five sizes, (3, 256, 256) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(n, torch.rand(1, 3, n, n, generator=generator)) for n in (4, 8, 16, 32, 64)]
    layers = [F.interpolate(noise, (256, 256), mode="bicubic") / n**0.5 for n, noise in sizes]
    total = sum(layers)[0]
    return (total - total.min()) / (total.max() - total.min())


def grid(height: int, width: int):
    """Coordinates from -1 to 1: y, x (height, width)."""
    return torch.meshgrid(*((torch.arange(n) + 0.5) / n * 2 - 1 for n in (height, width)), indexing="ij")


def view(picture, path, size):
    """What a camera sees: picture (3, h, w), path (N, 4) in percent, size (H, W) -> (N, 3, H, W)."""
    (y, x), ratio, frames = grid(*size), size[0] / size[1], []
    for right, up, closer, roll in path / 100:
        x_, y_ = (x + 2 * right).to(picture), (y - 2 * up).to(picture)
        c, s = torch.cos(roll) * torch.exp(-closer), torch.sin(roll) * torch.exp(-closer)
        place = torch.stack([c * x_ - s * y_ * ratio, s * x_ / ratio + c * y_], -1)
        how = dict(mode="bicubic", padding_mode="reflection", align_corners=False)
        frames.append(F.grid_sample(picture[None], 0.7 * place[None].to(picture), **how)[0])
    return torch.stack(frames).clamp(0, 1)


def with_object(clip, rate, side=0.447):
    """A textured square, a fifth of the frame, over clip (N, 3, H, W): `rate` percent right, down a step."""
    (y, x), result, cover = grid(*clip.shape[-2:]), clip.clone(), texture(12)
    for n in range(len(clip)):
        there = [0.02 * r * (n - (len(clip) - 1) / 2) for r in rate]
        u, v = (x - there[0] - 0.1) / side, (y - there[1] + 0.1) / side
        inside = ((u.abs() < 1) & (v.abs() < 1)).float()
        square = F.grid_sample(cover[None], 0.9 * torch.stack([u, v], -1)[None], align_corners=False)[0]
        result[n] = clip[n] * (1 - inside) + square * inside
    return result


def optimise_path(picture, move: str, steps=60, size=(96, 96)):
    """True rates (7, 4) of a shaking camera, before and after its path has followed the reward."""
    generator = torch.Generator().manual_seed(1)
    path = torch.randn(8, 4, generator=generator) * torch.tensor([1.0, 1.0, 1.0, 1.0])
    if move == "smooth":
        path[:, 0] += 1.5 * torch.arange(8)
    first, path = path.diff(dim=0), path.requires_grad_()
    reward, optimizer = rewards.make_camera("cpu", torch.float32, arg=move), torch.optim.Adam([path], lr=0.3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / steps)
        optimizer.zero_grad()
        (-reward(view(picture, path, size)[None], [""])).sum().backward()
        optimizer.step()
    return first, path.detach().diff(dim=0)


def optimise_pixels(picture, move: str, rate=2.0, most=100, size=(96, 96)):
    """A still clip, and the same when its pixels have followed the reward to a measured rate; the rates."""
    first = view(picture, torch.zeros(8, 4), size)[None]
    clip, (axis, sign) = first.clone().requires_grad_(), MOVES[move]
    reward, optimizer = rewards.make_camera("cpu", torch.float32, arg=move), torch.optim.Adam([clip], lr=2e-3)
    for _ in range(most):
        value = reward(clip, [""])
        rates = torch.stack([*reward.report.values()])[:4, 0]
        if sign * rates[axis] >= rate:
            break
        optimizer.zero_grad()
        (-value).sum().backward()
        optimizer.step()
        clip.data.clamp_(0, 1)
    return first[0], clip.detach()[0], rates


def main():
    rows = []
    print("| photograph | move | true rates before, jitter | after, jitter |\n|---|---|---|---|")
    for name in ("cat", "rocket"):
        for move in ("smooth", "still", *MOVES):
            found = []
            for rates in optimise_path(photo(name), move):
                means = ", ".join(f"{rate:+.2f}" for rate in rates.mean(0).tolist())
                found.append(f"{means}; {rates.diff(dim=0).abs().mean():.2f}")
            print(f"| {name} | {move} | {found[0]} | {found[1]} |", flush=True)
    print("\n| photograph | move | measured rates | mean change of a pixel |\n|---|---|---|---|")
    for name in ("cat", "rocket"):
        for move in ("pan left", "zoom in"):
            first, last, rates = optimise_pixels(photo(name), move)
            said = ", ".join(f"{rate:+.2f}" for rate in rates.tolist())
            print(f"| {name} | {move} | {said} | {(last - first).abs().mean():.3f} |", flush=True)
            rows += [first, last] if name == "cat" else []
    shaken = view(photo("cat"), torch.cumsum(optimise_path(photo("cat"), "zoom in", 0)[0], 0), (96, 96))
    steered = view(photo("cat"), torch.cumsum(optimise_path(photo("cat"), "zoom in")[1], 0), (96, 96))
    rows = torch.stack(
        [torch.cat([*row], -1) for row in [shaken[:7], steered[:7], *(row[:7] for row in rows)]]
    )
    picture = (torch.cat([*rows], -2) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(picture).save(HERE / "camera.png")


if __name__ == "__main__":
    main()
