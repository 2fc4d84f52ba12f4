"""Tests of --quantize with the real libraries: bitsandbytes runs nf4 on a CPU, which diffusers refuses.

Nothing else is replaced, but for a shortcut of bitsandbytes on processors with AVX512 in bf16, which packs
weights anew in a pass without gradient and is at fault (bitsandbytes#2078).
"""

import shutil
from dataclasses import replace

import bitsandbytes as bnb
import diffusers
import fake
import peft
import pytest
import torch
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer
from safetensors.torch import load_file, save_file
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
@pytest.mark.parametrize("name", ["wan", "wan-a14b"])
def test_a_base_lora_is_fused_before(name, kind, wan, checkpoints, tmp_path):
    """Frames are those of a checkpoint that was fused whole, of layers in full precision and biases, too."""
    cfg = replace(
        wan,
        model=str(checkpoints(name)),
        quantize="none",
        lora_targets="to_q,to_out.0,time_embedder.linear_1",
    )
    run = load(cfg)
    config = run.model.denoiser.peft_config["default"]
    config.lora_bias, config.rank_pattern, config.alpha_pattern = True, {"to_q": 2}, {"to_q": 7}
    source = tmp_path / "fused"
    shutil.copytree(cfg.model, source)
    loras, folders = [], ["transformer", "transformer_2"][: 1 + (name == "wan-a14b")]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(run.model.load_denoiser(folder), config)
        for key, p in adapted.named_parameters():
            if "lora_" in key:
                p.data.normal_(std=0.02 if "lora_B" in key else 0.2)
        adapted.save_pretrained(tmp_path / folder, save_embedding_layers=False)
        loras.append(str(tmp_path / folder))
        adapted.merge_and_unload().save_pretrained(source / folder)
    found = []
    for where in (
        dict(base_lora=",".join(loras)),
        dict(model=str(source)),
        dict(),
    ):
        run = load(replace(cfg, quantize=kind, mode="sample", **where), randomise=False)
        found.append(our_frames(run, batch(run)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    assert (found[0] - found[2]).abs().max() > 1e-3


def test_nan_in_the_checkpoint_is_seen(wan, checkpoints, tmp_path):
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
