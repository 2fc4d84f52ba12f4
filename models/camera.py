"""How the camera moves, measured by the method of Lucas and Kanade; for the reward `camera`. No network."""

import torch
import torch.nn.functional as F

from rewards import exact


def camera_rates(frames):
    """How the camera moves from each frame to the next: (B, N - 1, 4), and how much shows it, (B, N - 1).

    Pan right, pan up, zoom in, roll right in percent: of the frame's width, its height, its size, a radian.
    The similarity motion between frames by Gauss-Newton on brightness constancy (Lucas & Kanade 1981; Bergen
    et al. 1992), coarse then fine, differentiated through the last step. Weights keep moving objects out, a
    ridge pulls to 0 where texture lacks. The second is the share of the frame that carries the estimate.
    """

    def step(p, a, b):
        """p: (M, 4) right, down, larger, clockwise, in half frames; a, b: (M, h, w) grey -> p, seen."""
        h, w = a.shape[1:]
        y, x = torch.meshgrid(*((torch.arange(n).to(a) + 0.5) / n * 2 - 1 for n in (h, w)), indexing="ij")
        one, zero, here = torch.ones_like(x), torch.zeros_like(x), torch.stack([x, y], -1)
        right, down = torch.stack([one, zero, x, -y * h / w]), torch.stack([zero, one, y, x * w / h])
        flow = torch.stack([torch.einsum("mk,khw->mhw", p, move) for move in (right, down)], -1)
        # each frame goes half the way, so both are blurred alike
        grids = torch.cat([here - flow / 2, here + flow / 2]).nan_to_num().clamp(-2, 2)
        a, b = F.grid_sample(torch.cat([a, b])[:, None], grids, "bilinear", "border", False)[:, 0].chunk(2)
        residual, (slope_y, slope_x) = a - b, torch.gradient((a + b) / 2, dim=(1, 2))
        slope = slope_x[:, None] * right * w / 2 + slope_y[:, None] * down * h / 2  # (M, 4, h, w)
        with torch.no_grad():
            inside = torch.stack((grids.abs() <= 1).all(-1).chunk(2)).all(0)
            median = residual.abs().masked_fill(~inside, torch.nan).flatten(1).nanmedian(1).values
            scale = 2 * median.nan_to_num()[:, None, None] + 0.001  # where nothing is inside
            sure = inside / (1 + (residual / scale) ** 2) ** 2
            told = (sure * slope[:, :2].square().sum(1)).flatten(1)
            seen, sure = told.mean(1) ** 2 / (told.square().mean(1) + 1e-20), sure / (h * w)
        normal = torch.einsum("mkhw,mlhw,mhw->mkl", slope, slope, sure) + 1e-5 * torch.eye(4).to(a)
        pull = torch.einsum("mkhw,mhw->mk", slope, sure * residual) - 1e-5 * p
        return p + torch.linalg.solve(normal, pull), seen

    shrink = max(1, min(frames.shape[-2:]) / 64)
    grey = F.interpolate(exact(frames).mean(2), scale_factor=1 / shrink, mode="bilinear", antialias=True)
    for _ in range(4):
        grey = F.avg_pool2d(grey, 3, stride=1, padding=1, count_include_pad=False)
    pairs = grey[:, :-1].flatten(0, 1), grey[:, 1:].flatten(0, 1)
    p = grey.new_zeros(len(pairs[0]), 4)
    with torch.no_grad():
        for level in [[F.avg_pool2d(side, 4) for side in pairs]] * 8 + [pairs] * 8:
            p, _ = step(p, *level)
    p, seen = step(p, *pairs)
    rates = p * torch.tensor([-50.0, 50.0, 100.0, -100.0]).to(p)
    return rates.unflatten(0, (len(frames), -1)), seen.unflatten(0, (len(frames), -1))
