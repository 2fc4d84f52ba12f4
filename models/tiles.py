"""Less memory for the gradient of a VAE: blocks are computed again, and what is large goes in parts.

Behind the middle block of Wan's decoder a result depends on nothing that is more than HALO latent pixels
away. So each tile is decoded with that much of its neighbours, and once more when the gradient comes to it:
the same gradient, with the activations of one tile at a time. A block of LTX's VAE depends on FRAMES frames
before and after, and goes in parts of the time likewise.
"""

import functools
import math

import torch
from torch.utils.checkpoint import checkpoint

TILE = 250_000  # pixels; a frame of more than two is decoded in tiles
HALO = 13  # 3 x 3 kernels: 6 at the latents' size, then 7, 7, 7 and 1 at 2, 4, 8 and 8 times that, rounded up
PART = 150_000_000  # numbers in what a block of LTX's VAE computes at once: 49 frames of 512 x 704
FRAMES = 4  # what two convolutions reach, of which a causal one looks back by two
RECOMPUTED = dict(use_reentrant=False, preserve_rng_state=False)


def tiles_for(pixels: int) -> int:
    """How many tiles a frame of so many pixels has."""
    if pixels <= 2 * TILE:
        return 1
    return math.ceil(pixels / TILE)


def spans(size: int, count: int, halo: int) -> list[tuple[int, int, int, int]]:
    """Parts of a side: the first and the last place of each, and of what it is computed with."""
    edges = [size * n // count for n in range(count + 1)]
    found = []
    for first, end in zip(edges, edges[1:], strict=False):
        found.append((first, end, max(0, first - halo), min(size, end + halo)))
    return found


def decode_in_tiles(decoder, latent, cache: list, is_first: bool, count: int):
    """One latent frame (B, C, 1, H, W) decoded as by a WanDecoder3d, in tiles along its longer side.

    cache: the features of earlier frames, which stay as they are: a later frame would not find this one's.
    """
    features = list(cache)
    hidden = decoder.conv_in(latent, features[0])
    place = [1]
    hidden = decoder.mid_block(hidden, feat_cache=features, feat_idx=place)
    used = place[0]
    length = max(hidden.shape[-2:])
    side = hidden.shape.index(length, 3)

    def cut(x, first, end):
        if not isinstance(x, torch.Tensor):  # a cache says "Rep", or has nothing yet
            return x
        zoom = x.shape[side] // length
        return x.narrow(side, first * zoom, (end - first) * zoom)

    def tile(hidden, first, end, *before):
        x = cut(hidden, first, end)
        features = [None] * used
        for part in before:
            features.append(cut(part, first, end))
        place = [used]
        for block in decoder.up_blocks:
            x = block(x, feat_cache=features, feat_idx=place, first_chunk=is_first)
        x = decoder.nonlinearity(decoder.norm_out(x))
        return decoder.conv_out(x, features[place[0]])

    tiles = []
    for first, end, from_, to in spans(length, count, HALO):
        wide = checkpoint(tile, hidden, from_, to, *cache[used:], **RECOMPUTED)
        zoom = wide.shape[side] // (to - from_)
        tiles.append(wide.narrow(side, (first - from_) * zoom, (end - first) * zoom))
    return torch.cat(tiles, dim=side)


def checkpoint_cached_blocks(vae):
    """As `rewards.checkpoint_blocks`, for Wan's VAE: its blocks use a list of earlier frames' features.

    A block's part of the list becomes arguments and results, so that computing it again does no harm.
    """

    def recomputed(forward, slots, x, feat_cache, feat_idx):
        if not torch.is_grad_enabled():
            return forward(x, feat_cache=feat_cache, feat_idx=feat_idx)

        def pure(x, *before):
            after = list(before)
            return forward(x, feat_cache=after, feat_idx=[0]), *after

        first = feat_idx[0]
        before = feat_cache[first : first + slots]
        y, *after = checkpoint(pure, x, *before, **RECOMPUTED)
        feat_cache[first : first + slots] = after
        feat_idx[0] += slots
        return y

    for module in vae.modules():
        kind = type(module).__name__
        if kind in ("WanResidualBlock", "WanResample"):
            slots = 2 if kind == "WanResidualBlock" else int(module.mode == "upsample3d")
            module.forward = functools.partial(recomputed, module.forward, slots)


def compute_in_parts(network, classes):
    """As `rewards.checkpoint_blocks`, for blocks of LTX's VAE: large ones in parts of the time.

    Each part gets FRAMES more at either end, so that all is as if computed at once.
    """

    def in_parts(forward, x, *more):
        if not torch.is_grad_enabled():
            return forward(x, *more)
        count = math.ceil(x.numel() / PART)
        parts = []
        for first, end, from_, to in spans(x.shape[2], count, FRAMES):
            wide = checkpoint(forward, x[:, :, from_:to], *more, **RECOMPUTED)
            parts.append(wide[:, :, first - from_ : end - from_])
        return torch.cat(parts, dim=2)

    for module in network.modules():
        if type(module).__name__ in classes:
            module.forward = functools.partial(in_parts, module.forward)
