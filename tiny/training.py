"""What several of the trainings share: drawn clips to learn from, the training loop, a loss of pictures."""

import copy

import torch
from torch import nn
from tqdm import trange
from world import FRAMES, SIZE, draw, pick, uniform

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of train_i2v.py; the others use a CPU


def make_pool(combinations, clips: int, seed: int):
    """Clips of random combinations, half graded over the whole range, half dull as the video model's.

    Returns video: (clips, 8, 3, 64, 64) uint8; labels: (clips, 4) int64; target: (clips,) aesthetic target;
    boxes: (clips, 8, 4) float32, centre and size of the object in [0, 1].
    """
    generator, parts = torch.Generator().manual_seed(seed), []
    axis = (torch.arange(SIZE) + 0.5) / SIZE
    for first in trange(0, clips, 32, desc="drawing"):
        chosen = pick(combinations, 32, generator)
        video, target, inside = draw(chosen, generator, full=first % 64 == 0)
        spans = []
        for dim in (-2, -1):  # over rows: where it is from left to right; over columns: from top to bottom
            held = inside[:, :, 0].amax(dim) > 0.5
            low = torch.where(held, axis, 2.0).amin(-1) - 0.5 / SIZE
            high = torch.where(held, axis, -1.0).amax(-1) + 0.5 / SIZE
            spans += [(low + high) / 2, high - low]
        boxes = torch.stack([spans[0], spans[2], spans[1], spans[3]], -1)
        parts.append(((video * 255).round().byte(), torch.tensor(chosen), target, boxes))
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def frames_of(video, rows, generator):
    """A random frame of each clip in rows, half of them with a little noise.

    video: (clips, 8, 3, 64, 64) uint8. Returns the pictures (n, 3, 64, 64) in [0, 1] and their moments (n,).
    """
    moments = torch.randint(FRAMES, (len(rows),), generator=generator)
    pictures = video[rows, moments].float() / 255
    strength = 0.06 * uniform((len(rows), 1, 1, 1), -1, 1, generator).clamp(min=0)
    noise = torch.randn(pictures.shape, generator=generator)
    return (pictures + strength * noise).clamp(0, 1), moments


def orthogonal(matrix):
    """A matrix (m, n) with its singular values between 0.7 and 1.2, by five Newton-Schulz iterations.

    The polynomial's coefficients are Keller Jordan's (2024, kellerjordan.github.io/posts/muon).
    """
    tall = len(matrix) > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for weights of two and more dimensions (Jordan et al. 2024)."""

    def __init__(self, parameters, lr: float, momentum=0.95, decay=0.02):
        super().__init__(parameters, dict(lr=lr))
        self.momentum, self.decay = momentum, decay

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for p in group["params"]:
            mean = self.state[p].setdefault("mean", torch.zeros_like(p))
            mean.lerp_(p.grad, 1 - self.momentum)
            update = p.grad.lerp(mean, self.momentum).flatten(1)
            rate = group["lr"] * max(1, len(update) / update.shape[1]) ** 0.5
            p.mul_(1 - group["lr"] * self.decay)
            p.sub_(rate * orthogonal(update).view_as(p))


def fit(
    parameters, updates: int, rate: float, name: str, loss_of, decay=0.05, beta=0.98, rising=0.1, muon=0.0
):
    """AdamW on loss_of(update) -> (loss, figures to show), one cycle of learning rate, `rate` at its highest.

    beta: AdamW's second one (the cycle moves the first); rising: share of the updates until that rate; muon:
    the rate of Muon, which then takes all matrices.
    """
    parameters = list(parameters)
    matrices = [p for p in parameters if p.dim() > 1] if muon else []
    others = [p for p in parameters if p.dim() == 1 or not muon]
    adam = torch.optim.AdamW(others, lr=rate, weight_decay=decay, betas=(0.9, beta))
    cycle = torch.optim.lr_scheduler.OneCycleLR
    both = [(adam, cycle(adam, rate, updates, pct_start=rising))]
    if muon:
        second = Muon(matrices, muon)
        both.append((second, cycle(second, muon, updates, pct_start=rising, cycle_momentum=False)))
    for update in (bar := trange(updates, desc=name, mininterval=5)):
        loss, shown = loss_of(update)
        for p in parameters:
            p.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in both:
            optimizer.step()
            schedule.step()
        if update % 50 == 0:
            bar.set_postfix({key: f"{value.item():.3f}" for key, value in shown.items()}, refresh=False)


def average_of(model, keep=0.998):
    """A copy of the model, and a function that moves it towards the model after update number n."""
    average = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def follow(n):
        for slow, quick in zip(average.parameters(), model.parameters(), strict=True):
            slow.lerp_(quick, 1 - min(keep, (n + 1) / (n + 10)))

    return average, follow


def picture_loss(made, true, weight):
    """Absolute and squared error of (..., 3, H, W) in [-1, 1], weighted by pixel, and that of edges."""
    error = (made - true).abs()
    edges = sum((made.diff(dim=d) - true.diff(dim=d)).abs().mean() for d in (-1, -2))
    return (error * weight).mean() + 0.5 * (error**2 * weight).mean() + edges
