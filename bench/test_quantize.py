"""Tests of --quantize with the real libraries: bitsandbytes runs nf4 on a CPU, which diffusers refuses.

Nothing else is replaced, but for a shortcut of bitsandbytes on processors with AVX512 in bf16, which packs
weights anew in a pass without gradient and is at fault (bitsandbytes#2078).
"""

from dataclasses import replace

import bitsandbytes as bnb
import diffusers
import fake
import pytest
import torch
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer
from test_models import our_frames, stock_frames

import vader
from conftest import batch, gradient_error, load, plain_gradient
from extras.base_lora import quantization
from extras.checks import check_libraries
from rewards import BadInput

SIZE = dict(num_frames=5, height=32, width=48, num_inference_steps=3, guidance_scale=3.0, batch_size=2)


@pytest.fixture(autouse=True)
def nf4_on_a_cpu(monkeypatch):
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr("extras.checks.check_libraries", lambda cfg: None)  # which says it is for GPUs
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture
def wan(checkpoints, prompts_file, tmp_path):
    how = dict(model=str(checkpoints("wan")), prompts=prompts_file, reward="colorful", watch="none")
    return vader.Config(**how, **SIZE, eval_videos=2, lora_rank=4, out=str(tmp_path / "run"))


def dequantised(run):
    """The denoiser's weights in full, by name, of layers in 4 bits as they are multiplied."""
    found = {}
    for name, layer in run.model.denoiser.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = layer.weight
            found[f"{name}.weight"] = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return found


def test_nf4_equals_stock_and_its_gradient_that_of_the_dequantised_weights(wan, tmp_path):
    run = load(replace(wan, quantize="nf4"))
    given, weights = batch(run), dequantised(run)
    linear = [n for n, part in run.model.denoiser.named_modules() if type(part) is torch.nn.Linear]
    assert len(weights) == 24 and all("time_embedder" in n or "lora_" in n for n in linear)
    ours, plain = our_frames(run, given), plain_gradient(run, given)
    assert gradient_error(run, given, plain) < 1e-4

    vader.save_lora(run.model, tmp_path / "lora")
    how = quantization("nf4", torch.float32, "cpu")
    part = diffusers.WanTransformer3DModel.from_pretrained(
        wan.model, subfolder="transformer", dtype=torch.float32, **how
    )
    pipe = diffusers.WanPipeline.from_pretrained(wan.model, transformer=part)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(ours, stock_frames(pipe, run, given), rtol=0, atol=1e-5)

    whole, full = (load(replace(wan, lora=str(tmp_path / "lora")), randomise=False) for _ in range(2))
    assert (our_frames(whole, given) - ours).abs().max() > 1e-3  # 4 bits are seen
    missing = full.model.denoiser.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    torch.testing.assert_close(our_frames(full, given), ours, rtol=0, atol=1e-5)
    assert (plain_gradient(full, given) - plain).norm() < 1e-4 * plain.norm()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_weights_are_quantised_as_they_are_read(kind, wan, monkeypatch):
    """The network is empty until each weight comes, and what comes is small before the next one does."""
    from diffusers.quantizers.torchao import TorchAoHfQuantizer

    quantizer = BnB4BitDiffusersQuantizer if kind == "nf4" else TorchAoHfQuantizer
    made, create = [], quantizer.create_quantized_param

    def create_quantized_param(self, model, value, name, *args, **kwargs):
        made.append(name)
        for layer, part in model.named_modules():
            waits = isinstance(part, torch.nn.Linear) and "time_embedder" not in layer
            if waits and f"{layer}.weight" not in made:
                assert part.weight.is_meta, layer
        create(self, model, value, name, *args, **kwargs)
        if name.endswith("weight"):
            weight = model.get_parameter(name)
            small = weight.dtype == torch.uint8 if kind == "nf4" else weight.qdata.dtype == torch.int8
            assert small and not weight.is_meta

    monkeypatch.setattr(quantizer, "create_quantized_param", create_quantized_param)
    load(replace(wan, quantize=kind))
    assert len([name for name in made if name.endswith("weight")]) == 24


def test_the_planned_bytes_of_a_layer_are_those_that_it_takes():
    layer = torch.nn.Linear(1024, 768)
    weight = bnb.nn.Params4bit(
        layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    weight = weight.to("cpu")
    parts = [weight.data, weight.quant_state.absmax, weight.quant_state.state2.absmax]
    assert fake.FourBit(layer).weight.nbytes == sum(part.nbytes for part in parts)


def test_training_in_nf4_resumes_offloads_and_samples(wan):
    cfg = replace(wan, quantize="nf4", offload=True, steps=1)
    rows = vader.train(cfg)
    assert rows[1]["grad_norm"] > 0
    rows = vader.train(replace(cfg, steps=2, resume=True))
    assert [row["step"] for row in rows] == [0, 1, 1, 2, 2]
    run = load(replace(cfg, mode="sample", lora=f"{cfg.out}/lora"), randomise=False)
    assert our_frames(run, batch(run)).isfinite().all()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_lora_is_fused_before(kind, wan, tmp_path):
    """Most of it arrives, though it is smaller than a step between two of 16 numbers."""
    run = load(wan)
    for name, p in vader.lora_parameters(run.model).items():
        p.data.normal_(std=0.02 if "lora_B" in name else 0.2)
    vader.save_lora(run.model, tmp_path / "base")
    name = "blocks.0.attn1.to_q"
    layer = run.model.denoiser.get_base_model().get_submodule(name)
    told = layer.get_delta_weight("default")
    found = []
    for base in (None, str(tmp_path / "base")):
        cfg = replace(wan, quantize=kind, base_lora=base, mode="sample")
        small = load(cfg, randomise=False).model.denoiser.get_submodule(name)
        x = torch.eye(24)
        found.append(small(x) - small(0 * x))
    arrived = (found[1] - found[0]).T
    share = (arrived * told).sum() / told.square().sum()
    assert 0.5 < share < 1.5


def test_nan_in_the_checkpoint_is_seen(wan, checkpoints, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    source = shutil.copytree(wan.model, tmp_path / "model")
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    for name in ("blocks.0.attn1.to_q.weight", "blocks.0.attn1.to_q.bias"):
        state = load_file(file)
        state[name].view(-1)[5] = torch.nan
        save_file(state, file, {"format": "pt"})
        for kind in ("nf4", "int8"):
            with pytest.raises(BadInput, match="is damaged, get it again.*not finite"):
                load(replace(wan, model=str(source), quantize=kind))


def test_on_a_cpu_it_is_one_line(wan):
    with pytest.raises(BadInput, match="--quantize nf4 is for CUDA GPUs"):
        check_libraries(vader.resolve(replace(wan, quantize="nf4")))
