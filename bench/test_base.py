"""Tests of what is done to the frozen base: --base_lora, against stock's own fusing, and --quantize."""

import json
import shutil
import sys
import types
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import vader
from conftest import PROMPTS, checked, load
from rewards import BadInput

TARGETS = {"small": "to_q,to_v,conv1", "wan": "to_q,to_v,net.0.proj", "animatediff": "to_q,to_v,proj_in"}


@pytest.fixture(params=["small", "wan", "animatediff"])
def family(request):
    return request.param


@pytest.fixture
def cfg(family, settings, small, checkpoints):
    if family == "small":
        return settings
    return replace(
        settings, model=str(checkpoints(family)), num_frames=5, height=32, width=32, reward="colorful"
    )


def save_base(cfg, folder, names):
    """A random LoRA of rank 3 and alpha 5 on these layers, as PEFT saves it -> the fused weights, by name."""
    run = load(replace(cfg, mode="sample"), randomise=False)
    net = run.model.denoiser
    ends = tuple(f".{end}" for end in names.split(","))
    layers = [n for n, part in net.named_modules() if n.endswith(ends) and hasattr(part, "weight")]
    net = peft.get_peft_model(net, peft.LoraConfig(r=3, lora_alpha=5, target_modules=layers))
    for p in net.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.2)
    net.save_pretrained(folder)
    return {name: w.clone() for name, w in net.merge_and_unload().state_dict().items()}


def test_a_base_lora_is_fused_and_ours_alone_is_saved(cfg, family, tmp_path):
    fused = save_base(cfg, tmp_path / "base", TARGETS[family])
    run = load(cfg := replace(cfg, base_lora=str(tmp_path / "base")), randomise=False)
    weights = {
        name.replace(".base_layer", ""): w
        for name, w in run.model.denoiser.get_base_model().state_dict().items()
    }
    assert all(weights[name].allclose(w, atol=1e-6) for name, w in fused.items())
    before = load(replace(cfg, base_lora=None), randomise=False).model.denoiser.get_base_model().state_dict()
    assert not all(
        torch.equal(w, before[name]) for name, w in run.model.denoiser.get_base_model().state_dict().items()
    )
    vader.micro_batch(run, PROMPTS, 0, 0)
    vader.save_lora(run.model, tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert len(ours) == len(vader.lora_parameters(run.model))
    assert "base was fused into it: load both" in (tmp_path / "ours" / "README.md").read_text()
    # sample mode puts ours on the same base
    again = load(replace(cfg, mode="sample", lora=str(tmp_path / "ours"), lora_rank=None), randomise=False)
    x, cond = (
        torch.randn(1, *run.model.latent_shape(cfg)),
        vader.make_batch(run, PROMPTS[:1], None, None).cond,
    )
    with torch.no_grad():
        frames = [one.model.denoise(x, torch.tensor(500), cond) for one in (run, again)]
    assert frames[0].allclose(frames[1], atol=1e-5)


@pytest.mark.parametrize("flag", ["base_lora", "lora"])
def test_a_lora_in_diffusers_format_is_the_same(cfg, family, flag, tmp_path):
    """A file that stock's load_lora_weights reads; fusing is compared with PEFT's of the same matrices."""
    fused = save_base(cfg, tmp_path / "base", TARGETS[family])
    state = load_file(tmp_path / "base" / "adapter_model.safetensors")
    state = {key.replace("base_model.model.", ""): w for key, w in state.items()}
    # without its config alpha is the rank, so it is put into the matrices
    state = {key: w * 5 / 3 if "lora_B" in key else w for key, w in state.items()}
    folder = {"small": "unet", "wan": "transformer", "animatediff": "unet"}[family]
    state = {f"{folder}.{key}": w for key, w in state.items()}
    save_file(state, file := tmp_path / "pytorch_lora_weights.safetensors")
    for source in (file, tmp_path):
        how = {flag: str(source), "lora_rank": None, "mode": "sample"}
        denoiser = load(replace(cfg, **how), randomise=False).model.denoiser
        if flag == "lora":
            denoiser = denoiser.merge_and_unload()
        weights = denoiser.state_dict()
        assert all(weights[name].allclose(w, atol=1e-5) for name, w in fused.items())


def test_four_steps_with_tiny_few_come_near_ten_guided_ones():
    """Clean latents from the same noise; without the LoRA they are more than twice as far."""
    prompts = [vader.Prompt(f"a red {thing} rising over the sea") for thing in ("star", "moon", "cube")]
    few, made = dict(num_inference_steps=4, guidance_scale=1.0), []
    for how in ({}, few, few | dict(base_lora=str(vader.HERE / "tiny" / "few"))):
        run = load(vader.Config(model="tiny", mode="sample", **how), prompts=prompts, randomise=False)
        noise = torch.randn(3, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
        made.append(vader.rollout(run, vader.make_batch(run, prompts, noise, None))[-1])
    guided, plain, fused = made
    far, near = ((one - guided).square().mean() for one in (plain, fused))
    print(f"mean squared distance {near:.4f} with the LoRA, {far:.4f} without")
    assert near < far / 2


def test_a_base_lora_that_does_not_fit_is_one_line(settings, checkpoints, tmp_path):
    save_base(settings, tmp_path / "base", "to_q,to_v")
    file = tmp_path / "base" / "adapter_model.safetensors"
    good = load_file(file)

    def refused(said, source=tmp_path / "base", **how):
        with pytest.raises(BadInput, match=said) as problem:
            checked(replace(settings, base_lora=str(source), **how))
        assert "\n" not in str(problem.value) and "--base_lora" in str(problem.value)

    for damaged in (
        dict([*good.items()][1:]),
        {key: w / 0 for key, w in good.items()},
        {key: w[:, :1].clone() for key, w in good.items()},
        good | {"nobody.lora_A.weight": torch.zeros(3, 3)},
        good | {"base_model.model.nobody": torch.zeros(3)},
    ):
        save_file(damaged, file)
        refused("made for another model")
    save_file({}, tmp_path / "empty.safetensors")
    refused("there is no LoRA in it", source=tmp_path / "empty.safetensors")
    file.write_bytes(b"hello")
    refused("is damaged, or made for another model")
    for nosuch in ("nosuch", "/no/such", "https://huggingface.co/a/b"):
        refused("no such file or folder", source=nosuch)
    refused("no .safetensors file", source=vader.HERE / "models")
    shutil.rmtree(tmp_path / "base")
    save_base(settings, tmp_path / "base", "to_q,to_v")
    config = json.loads((file.with_name("adapter_config.json")).read_text())
    for said, change in (
        ("lora_alpha of its adapter_config.json", dict(lora_alpha="16")),
        ("lora_alpha of its adapter_config.json", dict(lora_alpha=0)),
        ("lora_alpha of its adapter_config.json", dict(lora_alpha=float("nan"))),
        ("that of a LOHA", dict(peft_type="LOHA")),
        ("no code for use_dora", dict(use_dora=True)),
        ("no code for modules_to_save", dict(modules_to_save=["conv_in"])),
        ("made for another model", dict(rank_pattern={"to_q": 7})),
    ):
        file.with_name("adapter_config.json").write_text(json.dumps(config | change))
        refused(said)
    file.with_name("adapter_config.json").write_text(json.dumps(config))
    wan = dict(model=str(checkpoints("wan")), num_frames=5, height=32, width=32)
    refused("made for another model", **wan)
    for name in "ab":
        shutil.copy(file, tmp_path / f"{name}.safetensors")
    refused("has several files: give one", source=tmp_path)


def test_patterns_of_alpha_count_and_a_run_s_folder_will_do(settings, tmp_path):
    save_base(settings, tmp_path / "run" / "lora", "to_q,to_v")
    file = tmp_path / "run" / "lora" / "adapter_config.json"
    config = json.loads(file.read_text())
    plain = load(
        replace(settings, base_lora=str(tmp_path / "run"), mode="sample")
    ).model.denoiser.state_dict()
    file.write_text(json.dumps(config | {"alpha_pattern": {"to_q": 50}}))
    more = load(replace(settings, base_lora=str(tmp_path / "run"), mode="sample")).model.denoiser.state_dict()
    base = load(replace(settings, mode="sample")).model.denoiser.state_dict()
    for name, times in {"to_q": 10, "to_v": 1}.items():
        (key, *_) = (key for key in base if key.endswith(f"{name}.weight"))
        assert torch.allclose(more[key] - base[key], times * (plain[key] - base[key]), atol=1e-5)


def test_a_lora_trained_on_another_base_says_so(settings, tmp_path, capsys):
    save_base(settings, tmp_path / "base", "to_q,to_v")
    vader.train(replace(settings, base_lora=str(tmp_path / "base"), steps=1, eval_videos=0))
    about = vader.Path(settings.out, "lora", "vader.json")
    assert json.loads(about.read_text()) == dict(base_lora="base", base_model="small", reward="colorful")
    capsys.readouterr()
    checked(replace(settings, mode="sample", lora=f"{settings.out}/lora", lora_rank=None))
    assert "was trained with --base_lora base, not none" in capsys.readouterr().out
    checked(replace(settings, mode="sample", lora=f"{settings.out}/lora", lora_rank=None,
                          base_lora=str(tmp_path / "base")))  # fmt: skip
    assert "was trained" not in capsys.readouterr().out
    again = replace(settings, mode="sample", lora=f"{settings.out}/lora", lora_rank=None)
    vader.Path(settings.out, "lora", "README.md").write_bytes(b"\xff\xfe of nobody")  # nothing reads it
    about.write_text("{")
    with pytest.raises(BadInput, match="vader.json is damaged"):
        checked(again)
    about.unlink()  # as PEFT's own LoRAs, and older ones
    checked(again)
    assert "was trained" not in capsys.readouterr().out


def test_what_a_lora_was_trained_on_is_null_where_it_is_not_known(loaded, tmp_path):
    vader.save_lora(loaded.model, tmp_path / "lora")
    about = json.loads((tmp_path / "lora" / "vader.json").read_text())
    assert about == dict(base_lora=None, base_model="small", reward=None) and [*about] == sorted(about)


def test_a_run_with_another_base_lora_is_not_gone_on_with(settings, tmp_path):
    save_base(settings, tmp_path / "base", "to_q,to_v")
    cfg = replace(settings, base_lora=str(tmp_path / "base"), steps=1, eval_videos=0)
    vader.train(cfg)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["base_lora"] == cfg.base_lora
    with pytest.raises(BadInput, match="was started with --base_lora"):
        vader.train(replace(cfg, base_lora=None, resume=True, steps=2))
    vader.train(replace(cfg, resume=True, steps=2))


def test_int8_is_near_the_whole_base_and_smaller(settings, tmp_path):
    cfg = replace(settings, steps=1, eval_videos=0)
    plain, small = (load(replace(cfg, quantize=kind)) for kind in ("none", "int8"))
    x, cond = (
        torch.randn(1, *plain.model.latent_shape(cfg)),
        vader.make_batch(plain, PROMPTS[:1], None, None).cond,
    )
    found = []
    for run in (plain, small):
        vader.micro_batch(run, PROMPTS, 0, 0)
        gradient = torch.cat([p.grad.flatten() for p in vader.lora_parameters(run.model).values()])
        with torch.no_grad():
            found.append((run.model.denoise(x, torch.tensor(500), cond), gradient))
        assert {p.dtype for p in vader.lora_parameters(run.model).values()} == {torch.float32}
    (one, g), (other, h) = found
    assert 0 < (one - other).norm() / one.norm() < 0.05
    assert torch.cosine_similarity(g, h, dim=0) > 0.98
    layer = next(part for name, part in small.model.denoiser.named_modules() if name.endswith("to_q"))
    assert layer.base_layer.weight.qdata.dtype == torch.int8
    vader.train(replace(cfg, quantize="int8", offload=True))


def test_int8_of_the_vision_language_model():
    import rewards

    video = torch.rand(2, 8, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    how = dict(weights=f"{vader.TOY}/ask", arg="Is it red?")
    plain, small = (rewards.make_ask("cpu", torch.float32, **how, quantize=q) for q in ("none", "int8"))
    one, other = plain(video, ["", ""]), small(video, ["", ""])
    assert torch.allclose(one, other, atol=0.3) and not torch.equal(one, other)
    other.sum().backward()
    assert video.grad.isfinite().all() and video.grad.norm() > 0


def test_what_can_not_be_quantised_is_one_line(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    sys.modules["bitsandbytes"].__spec__ = types.SimpleNamespace()
    with pytest.raises(BadInput, match="--quantize nf4 is for CUDA GPUs"):
        checked(replace(settings, quantize="nf4"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for kind, library in (("nf4", "bitsandbytes"), ("int8", "torchao")):
        with pytest.raises(BadInput, match=f"--quantize {kind} is not installed: pip install {library}"):
            checked(replace(settings, quantize=kind))
