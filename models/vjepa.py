"""V-JEPA's own masks and loss (Bardes et al. 2024), for the reward `vjepa` and for training a tiny one."""

import torch
import torch.nn.functional as F

from rewards import exact


def jepa_masks(time: int, height: int, width: int, blocks: int, area: float, generator):
    """V-JEPA's mask: `blocks` rectangles, each `area` of a frame, aspect 0.75 to 1.5, through all of time.

    Returns token indices (context,), (target,) of a clip of time x height x width tokens; neither is empty.
    """
    inside = torch.zeros(height, width, dtype=torch.bool)
    for _ in range(blocks):
        aspect = 0.75 + 0.75 * torch.rand((), generator=generator).item()
        sides = [(height, aspect), (width, 1 / aspect)]
        h, w = (min(max(round((area * height * width * share) ** 0.5), 1), most) for most, share in sides)
        top = int(torch.randint(height - h + 1, (), generator=generator))
        left = int(torch.randint(width - w + 1, (), generator=generator))
        inside[top : top + h, left : left + w] = True
    inside[0, 0] &= not inside.all()
    everywhere = inside.expand(time, -1, -1).flatten()
    return (~everywhere).nonzero()[:, 0], everywhere.nonzero()[:, 0]


def jepa_loss(model, pixels, true, context, target):
    """V-JEPA's loss (Bardes et al. 2024, eq. 1) of each clip, (B,): L1 of predicted and true features.

    `VJEPA2Model.forward` drops the masked tokens after the encoder, when the context has seen them: here they
    are dropped before any layer. pixels: (B, N, 3, S, S) normalised; true: (B, T, D) the encoder's features
    of the full clip, layer-normed here; context (C,), target (M,): token indices.
    """
    batch, seen = len(pixels), model.encoder.embeddings(pixels)[:, context]
    for layer in model.encoder.layer:
        seen = layer(seen, context.expand(batch, -1))[0]
    # the predictor picks the context out of a whole clip of features
    features = torch.zeros_like(true).index_copy(1, context, model.encoder.layernorm(seen))
    rows = ([context.expand(batch, -1)], [target.expand(batch, -1)])
    predicted, true = exact(model.predictor(features, *rows).last_hidden_state), exact(true[:, target])
    return (predicted - F.layer_norm(true, true.shape[-1:])).abs().mean((1, 2))


def jepa_score(model, pixels):
    """Minus the loss of each clip, (B,), averaged over four fixed masks: 8 blocks of 15 %, 2 of 70 %, again.

    pixels: (B, N, 3, S, S) normalised; N a multiple of the model's tubelet_size.
    """
    true = model.encoder(pixels).last_hidden_state  # with gradient: the loss as a function of the pixels
    config = model.config
    side, time = config.crop_size // config.patch_size, pixels.shape[1] // config.tubelet_size
    generator, losses = torch.Generator().manual_seed(0), []
    for blocks, area in [(8, 0.15), (2, 0.7)] * 2:
        masks = jepa_masks(time, side, side, blocks, area, generator)
        losses.append(jepa_loss(model, pixels, true, *(mask.to(pixels.device) for mask in masks)))
    return -torch.stack(losses).mean(0)
