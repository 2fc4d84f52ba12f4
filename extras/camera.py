"""How the camera of a clip moves, measured in closed form and with a gradient: for the reward `camera`."""

import torch
import torch.nn.functional as F

from rewards import exact

SIDE = 64  # pixels of the shorter side at which motion is estimated
WINDOW = 7  # pixels; light is taken as even over two such boxes
MARGIN = 5  # pixels beside a black bar that see it


def blur(x, size: int, mask=None):
    """Two box filters over x (B, N, h, w), of what lies inside the mask (B, 1, h, w)."""
    if mask is None:
        mask = torch.ones_like(x[:, :1])
    total, share = x * mask, mask
    for _ in range(2):
        total = F.avg_pool2d(total, size, stride=1, padding=size // 2)
        share = F.avg_pool2d(share, size, stride=1, padding=size // 2)
    return total / share.clamp(min=1e-3)


@torch.no_grad()
def picture_of(grey):
    """1 where (B, N, h, w) has a picture, 0 in even bars along its border and beside them: (B, 1, h, w)."""
    mask = torch.ones_like(grey[:, :1])
    lowest, highest = grey.amin(1), grey.amax(1)
    for across in (2, 1):  # rows, then columns
        varies = (highest.amax(across) - lowest.amin(across) > 0.02).to(grey)
        from_start = varies.cummax(1).values
        from_end = varies.flip(1).cummax(1).values.flip(1)
        bar = 1 - from_start * from_end
        bar = F.max_pool1d(bar[:, None], 2 * MARGIN + 1, stride=1, padding=MARGIN)
        mask = mask * (1 - bar).unsqueeze(across + 1)
    return mask


def without_light(grey, mask):
    """Less its local mean, over its local contrast: the same for what fades, flickers or lies in shadow."""
    detail = grey - blur(grey, WINDOW, mask)
    contrast = blur(detail.square(), WINDOW, mask)
    usual = contrast.mean((2, 3), keepdim=True)
    return detail / (contrast + usual / 4 + 1e-6).sqrt()


def step(motion, first, second, mask):
    """A Gauss-Newton step on constancy -> motion, and the share of the frame that shows it, (M,).

    motion: (M, 4) right, down, larger, clockwise, in half frames; first, second, mask: (M, h, w).
    """
    h, w = first.shape[1:]
    y = ((torch.arange(h).to(first) + 0.5) / h * 2 - 1)[:, None].expand(h, w)
    x = ((torch.arange(w).to(first) + 0.5) / w * 2 - 1).expand(h, w)
    one = torch.ones_like(x)
    right = torch.stack([one, 0 * one, x, -y * h / w])  # how far each of the four takes a pixel
    down = torch.stack([0 * one, one, y, x * w / h])
    # each frame goes half the way, so both are blurred alike
    half_way = torch.einsum("mk,dkhw->mhwd", motion, torch.stack([right, down])) / 2
    here = torch.stack([x, y], -1)
    grids = torch.cat([here - half_way, here + half_way]).nan_to_num().clamp(-2, 2)
    warped = F.grid_sample(torch.cat([first, second])[:, None], grids, "bilinear", "border", False)
    first, second = warped[:, 0].chunk(2)
    residual = first - second
    slope_y, slope_x = torch.gradient((first + second) / 2, dim=(1, 2))
    slope = slope_x[:, None] * right * w / 2 + slope_y[:, None] * down * h / 2  # (M, 4, h, w)
    with torch.no_grad():  # weights that keep moving objects out
        inside = (grids.abs() <= 1).all(-1).view(2, *residual.shape).all(0) & (mask > 0.5)
        median = residual.abs().masked_fill(~inside, torch.nan).flatten(1).nanmedian(1).values
        scale = 2 * median.nan_to_num()[:, None, None] + 0.01  # where nothing is inside
        weight = inside / (1 + (residual / scale) ** 2) ** 2
        texture = (weight * slope[:, :2].square().sum(1)).flatten(1)
        seen = texture.mean(1) ** 2 / (texture.square().mean(1) + 1e-20)
        weight = weight / (h * w)
    ridge = 1e-3  # pulls to 0 where texture lacks
    normal = torch.einsum("mkhw,mlhw,mhw->mkl", slope, slope, weight) + ridge * torch.eye(4).to(first)
    pull = torch.einsum("mkhw,mhw->mk", slope, weight * residual) - ridge * motion
    return motion + torch.linalg.solve(normal, pull), seen


def camera_rates(frames, apart=1):
    """How the camera moves between frames that many steps apart: rates (B, N - apart, 4), and how much of the
    frame shows it, (B, N - apart).

    frames: (B, N, 3, H, W) in [0, 1]. Pan right, pan up, zoom in, roll right, in percent a step: of the
    frame's width, its height, its size, a radian. Gauss-Newton (Lucas & Kanade 1981; Bergen et al. 1992) on
    frames whose light is taken out, coarse, then fine, the last step with gradient.
    """
    shrink = max(1, min(frames.shape[-2:]) / SIDE)
    grey = F.interpolate(exact(frames).mean(2), scale_factor=1 / shrink, mode="bilinear", antialias=True)
    mask = picture_of(grey)
    grey = blur(without_light(blur(grey, 3), mask), 3)
    first, second = grey[:, :-apart].flatten(0, 1), grey[:, apart:].flatten(0, 1)
    mask = mask.expand(-1, grey.shape[1] - apart, -1, -1).flatten(0, 1)
    fine = first, second, mask
    coarse = [F.avg_pool2d(part, 4) for part in fine]
    motion = grey.new_zeros(len(first), 4)
    with torch.no_grad():
        for level in [coarse] * 8 + [fine] * 8:
            motion, _ = step(motion, *level)
    motion, seen = step(motion, *fine)
    rates = motion * motion.new_tensor([-50, 50, 100, -100]) / apart
    rates = rates.unflatten(0, (len(frames), -1))
    return rates, seen.view(rates.shape[:2])
