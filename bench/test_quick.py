"""Tests of extras/quick.py: a rollout's LoRA is merged, or in half precision, and nothing else changes."""

from dataclasses import replace

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from test_base import save_base

import vader
from conftest import PROMPTS, batch, gradients, load
from extras import quick
from extras.base_lora import quantize
from extras.lora_scale import at_strength

CHANGES = {
    "one step": {},
    "three steps": dict(backprop_steps=3, grad_steps="last"),
    "offload": dict(offload=True),
    "alpha": dict(lora_alpha=7.0),
}


def layers_of(run) -> list:
    return [layer for layer in run.model.denoiser.modules() if isinstance(layer, LoraLayer)]


def without_quick(run):
    """The same run, each of whose layers computes its LoRA as PEFT does."""
    for layer in layers_of(run):
        if isinstance(layer.forward, quick.QuickForward):
            layer.forward = layer.forward.usual
    return run


def base_of(run) -> dict:
    return {n: w.clone() for n, w in run.model.denoiser.state_dict().items() if "lora_" not in n}


@torch.no_grad()
def frames_of(run, latents):
    return run.model.decode(latents, range(latents.shape[2]))


def same_base(run, before: dict) -> bool:
    return all(torch.equal(w, before[name]) for name, w in base_of(run).items())


@pytest.mark.parametrize("change", CHANGES)
def test_frames_and_gradients_are_those_of_the_layers_apart(change, settings):
    cfg = replace(settings, **CHANGES[change])
    found = []
    for prepare in (lambda run: run, without_quick):
        run = prepare(load(cfg))
        before = base_of(run)
        given = batch(run)
        latents = vader.rollout(run, given)
        _, g = vader.score(run, given, latents[-1])
        vader.walk_back(run, given, latents, g)
        found.append((frames_of(run, latents[-1]), gradients(run)))
        assert same_base(run, before)
    (ours, our_gradient), (apart, gradient) = found
    torch.testing.assert_close(ours, apart, rtol=0, atol=3e-5)  # 1.03e-5 was seen
    assert (ours - apart).abs().mean() < 1e-6
    assert (our_gradient - gradient).norm() < 1e-4 * gradient.norm()
    with run.model.denoiser.disable_adapter():
        assert (frames_of(run, vader.rollout(run, given)[-1]) - apart).abs().max() > 1e-2


def test_with_base_lora_a_trained_lora_and_clips(settings, checkpoints, tmp_path):
    """The LoRA has convolutions, too."""
    save_base(settings, tmp_path / "base", "to_q,to_v")
    save_base(settings, tmp_path / "lora", "to_q,to_k,conv1")
    more = dict(base_lora=str(tmp_path / "base"), lora=str(tmp_path / "lora"), lora_rank=None)
    size = dict(num_frames=4, clips=2, height=32, width=32)
    images = vader.read_prompts(str(vader.HERE / "tiny" / "images.jsonl"))[:2]
    kinds = [(replace(settings, **more), PROMPTS)]
    kinds.append((replace(settings, model=str(checkpoints("svd")), **size), images))
    for cfg, prompts in kinds:
        run = load(cfg, prompts=prompts)
        before, given = base_of(run), batch(run, prompts)
        ours = frames_of(run, vader.rollout(run, given)[-1])
        assert same_base(run, before)
        apart = frames_of(run, vader.rollout(without_quick(run), given)[-1])
        first = cfg.num_frames // (cfg.clips or 1)  # the next clip starts from a frame in 8 bits
        torch.testing.assert_close(ours[:, :first], apart[:, :first], rtol=0, atol=1e-5)
        torch.testing.assert_close(ours, apart, rtol=0, atol=0.01)


def test_it_follows_the_lora(settings):
    """An optimiser's step, another LoRA, a strength, and one that is switched off."""
    run = load(settings)
    given = batch(run)
    optimizer = vader.make_optimizer(run)
    first = vader.rollout(run, given)[-1]
    vader.update(run, PROMPTS, 0, optimizer)
    stepped = vader.rollout(run, given)[-1]
    assert not torch.equal(first, stepped)
    for p in vader.lora_parameters(run.model).values():
        p.grad = torch.ones_like(p)
    optimizer.step()  # without a walk back before it
    again = vader.rollout(run, given)[-1]
    assert not torch.equal(stepped, again)
    with at_strength(run.model, 0.5):
        half = vader.rollout(run, given)[-1]
    with run.model.denoiser.disable_adapter():
        base = vader.rollout(run, given)[-1]
    weights = {name: p.detach() * 0 for name, p in vader.lora_parameters(run.model).items()}
    kept = vader.rollout(run, given)[-1]
    run.model.denoiser.load_state_dict(weights, strict=False)
    empty = vader.rollout(run, given)[-1]
    assert torch.equal(kept, again) and not torch.equal(half, kept) and not torch.equal(half, base)
    torch.testing.assert_close(empty, base, rtol=0, atol=1e-5)


def test_what_stops_a_rollout_leaves_the_model_whole(settings, monkeypatch):
    run = load(settings)
    before, given = base_of(run), batch(run)
    whole, calls = vader.rollout(run, given)[-1], []

    def stopped(*args, real=run.model.denoise):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(run.model, "denoise", stopped)
    with pytest.raises(KeyboardInterrupt):
        vader.rollout(run, given)
    assert same_base(run, before) and torch.equal(vader.rollout(run, given)[-1], whole)


def test_copies_go_when_a_gradient_is_wanted(settings):
    run = load(settings)
    given = batch(run)
    latents = vader.rollout(run, given)
    forwards = [layer.forward for layer in layers_of(run)]
    assert len(forwards) > 4 and all(forward.copies for forward in forwards)
    vader.walk_back(run, given, latents, torch.ones_like(latents[-1]))
    assert not any(forward.copies for forward in forwards)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_one_layer_equals_peft(precision, bias):
    """In bf16 to its last bit; a base in int8 can't be merged, so in float32 it stays as it is."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    net = torch.nn.Sequential(torch.nn.Linear(64, 48, dtype=dtype)).requires_grad_(False)
    if precision == "int8":
        quantize(net, "int8", dtype)
        bias = False  # which PEFT has no code for
    net = peft.get_peft_model(net, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], lora_bias=bias))
    for name, p in net.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.3)
    x = torch.randn(8, 64, dtype=dtype)
    with torch.no_grad():
        apart = net(x).float()
        with net.disable_adapter():
            base = net(x).float()
        quick.install(net)
        ours = net(x).float()
        (layer,) = [layer for layer in net.modules() if isinstance(layer, LoraLayer)]
    assert (layer.forward.copies is not None) == (precision != "int8") and (apart - base).norm() > 1
    last_bit = 2**-7 * apart.abs().max().item()
    tolerance = 2 * last_bit if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours, apart, rtol=0, atol=tolerance)
