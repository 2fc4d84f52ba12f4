"""How the camera of a clip moves, measured in closed form and with a gradient: for the reward `camera`.

A motion has four numbers: how far the scene goes right and down, in half frames, how much larger it gets, and
how far it turns clockwise, in radians. `camera_rates` turns them into what the camera does.
"""

import torch
import torch.nn.functional as F

from rewards import exact

SIDE = 64  # pixels of the shorter side at which motion is estimated
WINDOW = 7  # pixels; light is taken as even over two such boxes
MARGIN = 5  # pixels beside a black bar that see it
RIDGE = 1e-3  # pulls a motion to 0 where texture lacks


def blur(x, size: int, mask=None):
    """Two box filters over x (B, N, h, w), of what lies inside the mask (B, 1, h, w)."""
    if mask is None:
        mask = torch.ones_like(x[:, :1])
    total = x * mask
    share = mask
    for _ in range(2):
        total = F.avg_pool2d(total, size, stride=1, padding=size // 2)
        share = F.avg_pool2d(share, size, stride=1, padding=size // 2)
    return total / share.clamp(min=1e-3)


@torch.no_grad()
def picture_of(grey):
    """1 where (B, N, h, w) has a picture, 0 in even bars along its border and beside them: (B, 1, h, w)."""
    mask = torch.ones_like(grey[:, :1])
    lowest = grey.amin(1)
    highest = grey.amax(1)
    for across in (2, 1):  # rows, then columns
        span = highest.amax(across) - lowest.amin(across)
        varies = (span > 0.02).to(grey)
        from_start = varies.cummax(1).values
        from_end = varies.flip(1).cummax(1).values.flip(1)
        bar = 1 - from_start * from_end
        width = 2 * MARGIN + 1
        bar = F.max_pool1d(bar[:, None], width, stride=1, padding=MARGIN)
        mask = mask * (1 - bar).unsqueeze(across + 1)
    return mask


def without_light(grey, mask):
    """Less its local mean, over its local contrast: the same for what fades, flickers or lies in shadow."""
    detail = grey - blur(grey, WINDOW, mask)
    contrast = blur(detail.square(), WINDOW, mask)
    usual = contrast.mean((2, 3), keepdim=True)
    return detail / (contrast + usual / 4 + 1e-6).sqrt()


def centres(count: int, like):
    """Of that many pixels, from -1 to 1."""
    number = torch.arange(count).to(like)
    return (2 * number + 1) / count - 1


def shifts(h: int, w: int, like):
    """How far each of the four numbers takes a pixel, right and down: (2, 4, h, w); its place: (h, w, 2)."""
    y = centres(h, like)
    x = centres(w, like)
    y, x = torch.meshgrid(y, x, indexing="ij")
    one = torch.ones_like(x)
    zero = torch.zeros_like(x)
    right = torch.stack([one, zero, x, -y * h / w])
    down = torch.stack([zero, one, y, x * w / h])
    place = torch.stack([x, y], -1)
    return torch.stack([right, down]), place


def meet(motion, first, second):
    """Both frames, each moved half the way, so that both are blurred alike; and where both have a pixel."""
    h, w = first.shape[1:]
    moves, place = shifts(h, w, first)
    way = torch.einsum("mk,dkhw->mhwd", motion, moves)
    grids = torch.cat([place - way / 2, place + way / 2])
    grids = grids.nan_to_num().clamp(-2, 2)
    frames = torch.cat([first, second])[:, None]
    warped = F.grid_sample(
        frames,
        grids,
        padding_mode="border",
        align_corners=False,
    )
    first, second = warped[:, 0].chunk(2)
    inside = (grids.abs() <= 1).all(-1)
    first_inside, second_inside = inside.chunk(2)
    return first, second, first_inside & second_inside


@torch.no_grad()
def robust_weight(residual, inside):
    """(M, h, w), low where the residual is large: so that objects that move are left out."""
    known = residual.abs().masked_fill(~inside, torch.nan)
    median = known.flatten(1).nanmedian(1).values
    median = median.nan_to_num()[:, None, None]  # where nothing is inside
    scale = 2 * median + 0.01
    relative = residual / scale
    return inside / (1 + relative**2) ** 2


@torch.no_grad()
def texture_share(slope, weight):
    """The share of the frame that shows a motion, (M,): 1 where texture is everywhere alike."""
    texture = weight * slope[:, :2].square().sum(1)
    mean = texture.mean((1, 2))
    square = texture.square().mean((1, 2))
    return mean**2 / (square + 1e-20)


def gauss_newton(motion, first, second, mask):
    """One iteration, for frames that are equal where they meet -> motion (M, 4), and `texture_share`, (M,).

    motion: (M, 4); first, second, mask: (M, h, w).
    """
    h, w = first.shape[1:]
    first, second, inside = meet(motion, first, second)
    residual = first - second
    both = (first + second) / 2
    down, right = torch.gradient(both, dim=(1, 2))
    gradient = torch.stack([right * w / 2, down * h / 2], dim=1)
    moves, _ = shifts(h, w, first)
    slope = torch.einsum("mdhw,dkhw->mkhw", gradient, moves)
    weight = robust_weight(residual, inside & (mask > 0.5))
    seen = texture_share(slope, weight)

    weighted = weight[:, None] * slope / (h * w)
    normal = torch.einsum("mkhw,mlhw->mkl", weighted, slope)
    ridge = RIDGE * torch.eye(4).to(normal)
    pull = torch.einsum("mkhw,mhw->mk", weighted, residual)
    pull = pull - RIDGE * motion
    change = torch.linalg.solve(normal + ridge, pull)
    return motion + change, seen


def camera_rates(frames, apart=1):
    """How the camera moves between frames that many steps apart: rates (B, N - apart, 4), and how much of the
    frame shows it, (B, N - apart).

    frames: (B, N, 3, H, W) in [0, 1]. Pan right, pan up, zoom in, roll right, in percent a step: of the
    frame's width, its height, its size, a radian. Gauss-Newton (Lucas & Kanade 1981; Bergen et al. 1992) on
    frames whose light is taken out, coarse, then fine, the last step with gradient.
    """
    grey = exact(frames).mean(2)
    shrink = max(1, min(grey.shape[2:]) / SIDE)
    grey = F.interpolate(
        grey,
        scale_factor=1 / shrink,
        mode="bilinear",
        antialias=True,
    )
    mask = picture_of(grey)
    grey = without_light(blur(grey, 3), mask)
    grey = blur(grey, 3)

    first = grey[:, :-apart].flatten(0, 1)
    second = grey[:, apart:].flatten(0, 1)
    count = grey.shape[1] - apart
    mask = mask.expand(-1, count, -1, -1)
    mask = mask.flatten(0, 1)
    fine = first, second, mask
    coarse = [F.avg_pool2d(part, 4) for part in fine]
    motion = grey.new_zeros(len(first), 4)
    with torch.no_grad():
        for level in (coarse, fine):
            for _ in range(8):
                motion, _ = gauss_newton(motion, *level)
    motion, seen = gauss_newton(motion, *fine)

    percent = motion.new_tensor([-50, 50, 100, -100])  # the camera goes where the scene does not
    rates = motion * percent / apart
    rates = rates.unflatten(0, (len(frames), -1))
    return rates, seen.view(rates.shape[:2])
