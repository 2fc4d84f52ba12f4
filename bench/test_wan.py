"""Tests of Wan's two networks and of steps for few-step LoRAs, on small random checkpoints."""

import os
from dataclasses import replace
from unittest import mock

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import our_frames, stock_frames

import vader
from conftest import PROMPTS, batch, checked, load
from models import tiles
from models.wan import WanA14BHigh
from rewards import BadInput

SIZE = dict(num_frames=5, height=32, width=48, num_inference_steps=4, guidance_scale=3.0, batch_size=2)


@pytest.fixture
def a14b(checkpoints, prompts_file, tmp_path):
    how = dict(model=str(checkpoints("wan-a14b")), prompts=prompts_file, reward="colorful", quantize="none")
    return vader.Config(**how, **SIZE, watch="none", eval_videos=2, lora_rank=4, out=str(tmp_path / "run"))


@pytest.fixture
def a14b_high(a14b, monkeypatch):
    name = "wan2.2-a14b-high"
    monkeypatch.setitem(WanA14BHigh.presets, name, WanA14BHigh.presets[name] | dict(source=a14b.model))
    vader.find_model.cache_clear()
    yield replace(a14b, model=name)
    vader.find_model.cache_clear()


def test_the_steps_of_few_step_loras_are_the_stock_scheduler_s_with_that_shift(checkpoints):
    cfg = checked(
        vader.Config(model=str(checkpoints("wan")), reward="colorful", watch="none", num_inference_steps=4)
    )
    usual, few = (
        vader.make_model(cfg).schedule(replace(cfg, **how))
        for how in ({}, dict(timestep_spacing="trailing", shift=5.0))
    )
    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    stock = diffusers.UniPCMultistepScheduler(**flow)
    stock.set_timesteps(4)
    assert stock.timesteps.tolist() == [999, 937, 833, 625]
    torch.testing.assert_close(few.t.float(), stock.timesteps.float(), rtol=0, atol=1.0)
    assert few.leverage(3) == pytest.approx(0.625, abs=1e-6)
    assert usual.t[-1] < 10 and usual.leverage(3) < 0.02
    with pytest.raises(BadInput, match="--timestep_spacing leading: this model has"):
        checked(replace(cfg, timestep_spacing="leading"))


def test_each_network_trains_on_its_own_steps(a14b, a14b_high):
    for cfg, steps in ((a14b, [2, 3]), (a14b_high, [0, 1])):
        run = load(cfg)
        for which in ("last", "spread", "strongest"):
            chosen = replace(run, cfg=replace(run.cfg, grad_steps=which, backprop_steps=2))
            assert vader.trained_steps(chosen) == steps, which
        (one,) = vader.trained_steps(run)
        assert run.schedule.leverage(one) == max(map(run.schedule.leverage, steps))
        with pytest.raises(BadInput, match="--backprop_steps 3: only 2 of the 4 steps are of what trains"):
            checked(replace(cfg, backprop_steps=3))


@pytest.mark.parametrize("scale, other", [(1.0, 1.0), (4.0, 3.0)])
def test_the_second_network_is_guided_less(scale, other, a14b):
    model = load(a14b).model
    assert model.guidance(scale, torch.tensor(900.0), 2) == scale
    assert model.guidance(scale, torch.tensor(100.0), 2) == pytest.approx(other)


def test_offloading_one_network_is_on_the_card_and_it_changes_once(a14b):
    """Counted is which network is told to go where; on a CPU none moves."""
    moves, to = [], torch.nn.Module.to
    names = {}

    def recorded(network, place, *rest):
        if network in names:
            moves.append((names[network], str(place)))
        return to(network, place, *rest)

    run = load(replace(a14b, offload=True))
    names |= {run.model.denoiser: "second", run.model.other: "first", run.model.vae: "vae"}
    run.model.device = "cpu:0"  # which differs from what waits, as a card would
    with mock.patch.object(torch.nn.Module, "to", recorded):
        vader.micro_batch(run, PROMPTS, 0, 0)
    there = [name for name, place in moves if place == "cpu:0"]
    once = [name for n, name in enumerate(there) if n == 0 or name != there[n - 1]]
    assert once == ["first", "second", "vae", "second"]
    here = set()
    for name, place in moves:
        if place == "cpu":
            here.discard(name)
        else:
            here.add(name)
        assert len(here) <= 1, moves


def test_a_pair_of_loras_is_fused_into_the_pair(a14b, a14b_high, tmp_path, monkeypatch):
    """The first is of the network of much noise, in stock's files; one alone is refused."""
    files = []
    for cfg in (a14b_high, a14b):
        run = load(cfg)
        vader.save_lora(run.model, folder := tmp_path / run.model.folder)
        files.append(str(folder / "pytorch_lora_weights.safetensors"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(a14b.model, dtype=torch.float32)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.load_lora_weights(tmp_path / "transformer")
    pipe.load_lora_weights(tmp_path / "transformer_2", load_into_transformer_2=True)
    run = load(replace(a14b, base_lora=",".join(files)), randomise=False)
    given = batch(run)
    torch.testing.assert_close(our_frames(run, given), stock_frames(pipe, run, given), rtol=0, atol=1e-3)
    assert run.model.base_lora.count("pytorch_lora_weights.safetensors") == 2
    for wrong in (files[0], f"{files[0]},", f",{files[1]}"):
        with pytest.raises(BadInput, match="as many LoRAs as the model has networks, as in transformer.safe"):
            checked(replace(a14b, base_lora=wrong))
    cfg = replace(a14b, base_lora=",".join(files), steps=1)
    rows = vader.train(cfg)
    assert rows[1]["grad_norm"] > 0

    elsewhere = [os.path.relpath(file, tmp_path) for file in files]
    monkeypatch.chdir(tmp_path)  # the same files by other names
    vader.train(replace(cfg, base_lora=", ".join(elsewhere), steps=2, resume=True))
    state = load_file(files[1])
    save_file({name: 2 * value for name, value in state.items()}, files[1], {"format": "pt"})
    with pytest.raises(BadInput, match="was started with another content of --base_lora"):
        vader.train(replace(cfg, steps=3, resume=True))


@pytest.mark.parametrize("kind, shape", [("wan", (4, 44)), ("wan", (44, 4)), ("wan22", (4, 44))])
def test_the_gradient_in_tiles_is_that_of_the_whole(kind, shape, checkpoints, monkeypatch):
    """Of the first frame and of one that has earlier ones; with less beside a tile it is not."""
    family, _, _ = vader.find_model(str(checkpoints(kind)))
    model = family(str(checkpoints(kind)), "cpu", torch.float32)
    model.load()
    model.recompute()
    torch.manual_seed(0)
    latents = torch.randn(1, model.vae.config.z_dim, 2, *shape)
    in_tiles = mock.Mock(wraps=tiles.decode_in_tiles)
    monkeypatch.setattr("models.wan.decode_in_tiles", in_tiles)

    def decoded(pick, tile, halo):
        monkeypatch.setattr(tiles, "TILE", tile)
        monkeypatch.setattr(tiles, "HALO", halo)
        x = latents.clone().requires_grad_()
        frames = model.decode(x, [pick])
        frames.square().sum().backward()
        return torch.cat([frames.detach().flatten(), x.grad.flatten()])

    quarter = model.scale**2 * 44  # of a frame's pixels
    for pick in (0, 1):
        whole = decoded(pick, 1e9, 13)
        assert (decoded(pick, quarter, 13) - whole).norm() < 1e-6 * whole.norm()
        assert (decoded(pick, quarter, 3) - whole).norm() > 1e-5 * whole.norm()
    assert [call.args[-1] for call in in_tiles.call_args_list] == [4] * 4


@pytest.mark.parametrize("kind, causal", [("ltx", False), ("ltx", True), ("ltx-image", False)])
def test_ltx_in_parts_of_the_time_has_the_gradient_of_the_whole(kind, causal, checkpoints, monkeypatch):
    """With the timestep that later VAEs take, too; with fewer frames beside a part it is another."""
    family, _, _ = vader.find_model(str(checkpoints(kind)))
    model = family(str(checkpoints(kind)), "cpu", torch.float32)
    model.load()
    for module in model.vae.decoder.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = causal
    model.recompute()
    torch.manual_seed(0)
    latents = torch.randn(1, model.vae.config.latent_channels, 4, 2, 3)
    computed = mock.Mock(wraps=tiles.checkpoint)
    monkeypatch.setattr(tiles, "checkpoint", computed)

    def decoded(part, frames):
        monkeypatch.setattr(tiles, "PART", part)
        monkeypatch.setattr(tiles, "FRAMES", frames)
        x = latents.clone().requires_grad_()
        frames = model.decode(x, [1, 3])
        frames.square().sum().backward()
        return torch.cat([frames.detach().flatten(), x.grad.flatten()])

    whole = decoded(1e9, 4)
    blocks = computed.call_count
    assert (decoded(100, 4) - whole).norm() < 1e-6 * whole.norm()
    assert computed.call_count > 3 * blocks
    assert (decoded(100, 1) - whole).norm() > 1e-5 * whole.norm()
