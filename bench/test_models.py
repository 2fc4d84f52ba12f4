"""Tests of the families in models/, on small random checkpoints in their published layouts, and on tiny's.

Each is compared with its stock pipeline, and its gradient with plain autograd.
"""

import functools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from PIL import Image

import rewards
import vader
from conftest import (
    PROMPTS,
    batch,
    checked,
    command,
    gradient_error,
    load,
    plain_gradient,
    python,
    small_text_encoder,
)
from extras.images import read_image
from extras.prompts import check_prompt_file
from models.wan import WanA14BHigh
from rewards import BadInput
from vader import HERE, Config, Prompt

IMAGES = str(HERE / "tiny" / "images.jsonl")

# ---- Builders ----------------------------------------------------------------------------------------------
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
LATENT_VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4, block_out_channels=(32,) * 4, layers_per_block=1
)

FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def randomised(network):
    """With what diffusers sets to zero made random too, so that every part has a say."""
    for p in network.parameters():
        if p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.05)
    return network


def build_animatediff(folder: Path, parts=False):
    """One AnimateDiffPipeline folder; with `parts`, a StableDiffusionPipeline and the adapter beside it."""
    blocks = dict(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8)
    kinds = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"))
    kinds["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D")
    unet = randomised(
        diffusers.UNet2DConditionModel(**blocks, **kinds, cross_attention_dim=32, attention_head_dim=8)
    )
    motion = dict(block_out_channels=(32, 64), motion_layers_per_block=1, motion_num_attention_heads=2)
    adapter = randomised(diffusers.MotionAdapter(**motion, motion_norm_num_groups=8))
    vae = diffusers.AutoencoderKL(**LATENT_VAE, up_block_types=("UpDecoderBlock2D",) * 4)
    shared = dict(vae=vae, **small_text_encoder(), scheduler=diffusers.PNDMScheduler(**BETAS, steps_offset=1))
    if parts:
        adapter.save_pretrained(folder / "adapter")
        shared |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        diffusers.StableDiffusionPipeline(unet=unet, **shared).save_pretrained(folder)
    else:
        diffusers.AnimateDiffPipeline(unet=unet, motion_adapter=adapter, **shared).save_pretrained(folder)


def build_svd(folder: Path):
    blocks = dict(block_out_channels=(32, 64), layers_per_block=1, num_attention_heads=(2, 4))
    kinds = dict(down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"))
    kinds["up_block_types"] = ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")
    times = dict(addition_time_embed_dim=32, projection_class_embeddings_input_dim=96, num_frames=5)
    unet = randomised(
        diffusers.UNetSpatioTemporalConditionModel(**blocks, **kinds, **times, cross_attention_dim=32)
    )
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.CLIPVisionConfig(**vision, image_size=224, patch_size=32, projection_dim=32)
    levels = dict(sigma_min=0.002, sigma_max=700.0, use_karras_sigmas=True, timestep_type="continuous")
    scheduler = diffusers.EulerDiscreteScheduler(
        **BETAS, **levels, prediction_type="v_prediction", timestep_spacing="leading", steps_offset=1
    )
    diffusers.StableVideoDiffusionPipeline(
        vae=randomised(diffusers.AutoencoderKLTemporalDecoder(**LATENT_VAE)),
        image_encoder=transformers.CLIPVisionModelWithProjection(config),
        unet=unet,
        scheduler=scheduler,
        feature_extractor=transformers.CLIPImageProcessor(),
    ).save_pretrained(folder)


def build_t5_tokenizer():
    letters = [(f"\u2581{c}", -3.0) for c in "abcdefghijklmnopqrstuvwxyz"]
    letters += [(c, -2.0) for c in "abcdefghijklmnopqrstuvwxyz\u2581"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters]
    return transformers.T5TokenizerFast(vocab=vocabulary, extra_ids=0)


def build_wan(folder: Path, kind="2.1"):
    """kind: 2.1, 2.2 (of TI2V 5B's layout), a14b (with two transformers), anyflow."""
    heads = dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=48, freq_dim=32)
    heads |= dict(text_dim=32, in_channels=16, out_channels=16)
    vae, stock, how = dict(base_dim=16, z_dim=16, dim_mult=[1, 2, 2, 2]), diffusers.WanPipeline, {}
    network, scheduler = diffusers.WanTransformer3DModel, diffusers.UniPCMultistepScheduler(**FLOW)
    if kind == "2.2":
        how, means = dict(expand_timesteps=True), torch.randn(48) / 4
        heads |= dict(in_channels=48, out_channels=48)
        vae |= dict(decoder_base_dim=24, z_dim=48, is_residual=True, patch_size=2, scale_factor_spatial=16)
        vae |= dict(in_channels=12, out_channels=12, temperal_downsample=[False, True, True])
        vae |= dict(latents_mean=means.tolist(), latents_std=(means.abs() + 0.5).tolist())
    if kind == "anyflow":
        network, stock = diffusers.AnyFlowTransformer3DModel, diffusers.AnyFlowPipeline
        scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)
    if kind == "a14b":
        how = dict(transformer_2=randomised(network(**heads)), boundary_ratio=0.7)
    text = dict(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=64)
    stock(
        tokenizer=build_t5_tokenizer(),
        text_encoder=transformers.UMT5EncoderModel(transformers.UMT5Config(**text)),
        transformer=randomised(network(**heads)),
        vae=diffusers.AutoencoderKLWan(**vae, num_res_blocks=1),
        scheduler=scheduler,
        **how,
    ).save_pretrained(folder)


def small_t5():
    text = dict(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=64)
    return dict(
        tokenizer=build_t5_tokenizer(),
        text_encoder=transformers.T5EncoderModel(transformers.T5Config(**text)),
    )


def build_cogvideox(folder: Path, rotary=False):
    """rotary: the positions of 5B."""
    heads = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, time_embed_dim=16)
    size = dict(sample_width=6, sample_height=4, sample_frames=9, in_channels=4, out_channels=4)
    transformer = diffusers.CogVideoXTransformer3DModel(
        **heads,
        **size,
        text_embed_dim=32,
        max_text_seq_length=226,
        use_rotary_positional_embeddings=rotary,
    )
    vae = dict(block_out_channels=(8, 8, 8, 16), latent_channels=4, layers_per_block=1, norm_num_groups=2)
    levels = dict(rescale_betas_zero_snr=True, snr_shift_scale=3.0, timestep_spacing="trailing")
    diffusers.CogVideoXPipeline(
        **small_t5(),
        transformer=randomised(transformer),
        vae=randomised(diffusers.AutoencoderKLCogVideoX(**vae, scaling_factor=0.7)),
        scheduler=diffusers.CogVideoXDDIMScheduler(**BETAS, **levels, prediction_type="v_prediction"),
    ).save_pretrained(folder)


def build_ltx(folder: Path, timed=False):
    """timed: the VAE of 0.9.5, whose decoder takes a timestep."""
    heads = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, in_channels=8, out_channels=8)
    transformer = diffusers.LTXVideoTransformer3DModel(**heads, cross_attention_dim=32, caption_channels=32)
    layout = dict(block_out_channels=(8,) * 4, layers_per_block=(1,) * 5, latent_channels=8)
    layout |= dict(decoder_block_out_channels=(8,) * 4, decoder_layers_per_block=(1,) * 5)
    if timed:
        layout |= dict(
            block_out_channels=(8, 8, 16, 16, 16),
            down_block_types=("LTXVideo095DownBlock3D",) * 4,
            downsample_type=("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
            spatio_temporal_scaling=(True,) * 4,
            decoder_block_out_channels=(8, 16, 32),
            decoder_layers_per_block=(1,) * 4,
            decoder_spatio_temporal_scaling=(True,) * 3,
            decoder_inject_noise=(False,) * 4,
            upsample_residual=(True,) * 3,
            upsample_factor=(2,) * 3,
            timestep_conditioning=True,
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        )
    vae = randomised(diffusers.AutoencoderKLLTXVideo(**layout))
    vae.latents_mean, vae.latents_std = torch.randn(8) / 4, torch.rand(8) + 0.5
    shift = dict(base_image_seq_len=1024, max_image_seq_len=4096, base_shift=0.95, max_shift=2.05)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        **shift, shift_terminal=0.1, use_dynamic_shifting=True
    )
    parts = dict(transformer=randomised(transformer), vae=vae, scheduler=scheduler)
    diffusers.LTXPipeline(**small_t5(), **parts).save_pretrained(folder)


BUILDERS = {
    "animatediff": build_animatediff,
    "animatediff-parts": functools.partial(build_animatediff, parts=True),
    "svd": build_svd,
    "wan": build_wan,
    "wan22": functools.partial(build_wan, kind="2.2"),
    "wan22-image": functools.partial(build_wan, kind="2.2"),
    "wan-a14b": functools.partial(build_wan, kind="a14b"),
    "wan-a14b-high": functools.partial(build_wan, kind="a14b"),
    "anyflow": functools.partial(build_wan, kind="anyflow"),
    "cogvideox": build_cogvideox,
    "cogvideox-5b": functools.partial(build_cogvideox, rotary=True),
    "ltx": build_ltx,
    "ltx-image": functools.partial(build_ltx, timed=True),
}


# ---- Against the stock pipelines ---------------------------------------------------------------------------


@pytest.fixture(params=BUILDERS)
def other(request, checkpoints, tmp_path, monkeypatch):
    """A family's name, a Config of a small quick run, and two prompts for it."""
    kind, folder = request.param, checkpoints(request.param)
    if kind.startswith("animatediff"):
        monkeypatch.setattr(vader.find_model(str(folder))[0], "motion", str(folder / "adapter"))
    tall = 2 if kind.startswith(("ltx", "wan22")) else 1
    how = dict(num_frames=9 if kind.startswith(("cogvideox", "ltx")) else 5)
    how |= dict(height=32 * tall, width=48 * tall, num_inference_steps=4, guidance_scale=3.0, batch_size=2)
    how |= dict(steps=1, eval_videos=2, grad_accum=1, lora_rank=4, out=str(tmp_path / "run"))
    how |= dict(backprop_steps=2, grad_steps="last", reward="colorful")
    for n, photo in enumerate(["cat", "rocket"]):
        shutil.copy(HERE / "tiny" / f"photo-{photo}.jpg", tmp_path / f"{n}.jpg")
    file = tmp_path / ("prompts.jsonl" if kind == "svd" or kind.endswith("image") else "prompts.txt")
    lines = [prompt.text for prompt in PROMPTS]
    if file.suffix == ".jsonl":
        lines = [json.dumps({"prompt": text, "image": f"{n}.jpg"}) for n, text in enumerate(lines)]
    file.write_text("\n".join(lines))
    cfg = Config(model=str(folder), prompts=str(file), eval_prompts=str(file), **how)
    if kind.startswith("wan-a14b"):
        cfg = replace(cfg, quantize="none")
    if kind == "wan-a14b-high":
        name = "wan2.2-a14b-high"
        monkeypatch.setitem(WanA14BHigh.presets, name, WanA14BHigh.presets[name] | dict(source=cfg.model))
        vader.find_model.cache_clear()
        request.addfinalizer(vader.find_model.cache_clear)
        cfg = replace(cfg, model=name)
    return kind, cfg, vader.read_prompts(str(file))


def stock_pipeline(kind, cfg):
    """The stock pipeline of a family's checkpoint, with a first-order scheduler."""
    _, source, _ = vader.find_model(cfg.model)
    pipe = diffusers.DiffusionPipeline.from_pretrained(source, dtype=torch.float32)
    if kind.startswith("animatediff"):
        if kind == "animatediff-parts":
            adapter = diffusers.MotionAdapter.from_pretrained(Path(cfg.model) / "adapter")
            stock = diffusers.AnimateDiffPipeline
            pipe = stock.from_pretrained(cfg.model, motion_adapter=adapter, dtype=torch.float32)
        spaced = dict(beta_schedule="linear", clip_sample=False, timestep_spacing="trailing")
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **spaced)
    if kind.startswith("wan"):
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if kind == "ltx-image":
        pipe = diffusers.LTXImageToVideoPipeline(**pipe.components)
    if kind == "wan22-image":
        parts = {name: part for name, part in pipe.components.items() if part is not None}
        pipe = diffusers.WanImageToVideoPipeline(**parts, expand_timesteps=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_frames(pipe, run, given):
    """Frames (B, F, 3, H, W) in [0, 1] of the stock pipeline, same noise."""
    cfg, noise, model = run.cfg, given.noise, run.model
    how = dict(num_frames=cfg.num_frames, height=cfg.height, width=cfg.width, output_type="pt")
    how["num_inference_steps"], texts = cfg.num_inference_steps, [prompt.text for prompt in given.prompts]
    images = [Image.open(prompt.image).convert("RGB") for prompt in given.prompts if prompt.image]
    if isinstance(pipe, diffusers.StableVideoDiffusionPipeline):
        how |= dict(max_guidance_scale=cfg.guidance_scale)
        parts = []
        for image, n in zip(images, noise.transpose(1, 2), strict=True):  # it wants pictures of one size
            draw = vader.generator_for("image noise")
            parts += pipe(image, latents=n[None], generator=draw, **how).frames
        return torch.stack([torch.stack(list(part)) for part in parts])
    if isinstance(pipe, diffusers.CogVideoXPipeline):
        noise = noise.transpose(1, 2)
    if isinstance(pipe, diffusers.WanImageToVideoPipeline):  # it takes one picture
        given = zip(images, texts, noise.split(1), strict=True)
        how["guidance_scale"] = cfg.guidance_scale
        return torch.cat([pipe(image=i, prompt=p, latents=n, **how).frames for i, p, n in given])
    if isinstance(pipe, diffusers.LTXImageToVideoPipeline):
        # the stock pipeline samples the image's latent; ours is the mode, handed over in the first latents
        starts = [read_image(prompt.image, cfg.height, cfg.width) for prompt in given.prompts]
        with torch.no_grad():
            latent = pipe.vae.encode(torch.stack(starts)[:, :, None] * 2 - 1).latent_dist.mode()
        latent = pipe._normalize_latents(latent, pipe.vae.latents_mean, pipe.vae.latents_std)
        noise = torch.cat([latent, noise[:, :, 1:]], dim=2)
        how["image"] = images
    if isinstance(pipe, (diffusers.LTXPipeline, diffusers.LTXImageToVideoPipeline)):
        noise = noise.flatten(2).transpose(1, 2)
        how |= dict(decode_timestep=model.decode_timestep, decode_noise_scale=model.decode_noise_scale)
        how["generator"] = vader.generator_for("decode noise")
    if getattr(pipe, "transformer_2", None):
        how["guidance_scale_2"] = 1 + (cfg.guidance_scale - 1) * 2 / 3
    return pipe(prompt=texts, latents=noise, guidance_scale=cfg.guidance_scale, **how).frames


def whole_video(model, latents):
    """All frames, as evaluation decodes them."""
    with torch.no_grad():
        return model.decode(latents, range(latents.shape[2]))


def our_frames(run, given):
    return whole_video(run.model, vader.rollout(run, given)[-1])


def test_frames_equal_the_stock_pipeline_without_the_lora_and_with_it(other, tmp_path):
    kind, cfg, prompts = other
    run = load(replace(cfg, lora_alpha=8), prompts=prompts)
    given, pipe = batch(run, prompts), stock_pipeline(kind, cfg)
    with run.model.denoiser.disable_adapter():
        base = our_frames(run, given)
    stock_base = stock_frames(pipe, run, given)
    print(f"{kind}: greatest difference {(base - stock_base).abs().max():.1e}")
    shape = (2, cfg.num_frames, 3, cfg.height, cfg.width)
    assert base.shape == stock_base.shape == shape and base.std() > 0.01
    assert base[0].sub(base[1]).abs().max() > 0.01
    torch.testing.assert_close(base, stock_base, rtol=0, atol=5e-4)
    vader.save_lora(run.model, tmp_path / "lora")
    if run.model.lora_pipeline:
        second = dict(load_into_transformer_2=True) if run.model.folder == "transformer_2" else {}
        pipe.load_lora_weights(tmp_path / "lora", **second)
    else:
        pipe.unet = PeftModel.from_pretrained(pipe.unet, tmp_path / "lora")
    stock = stock_frames(pipe, run, given)
    torch.testing.assert_close(our_frames(run, given), stock, rtol=0, atol=1e-3)
    assert (stock_base - stock).abs().max() > 0.01


def test_walk_back_equals_plain_autograd_and_checkpointing_changes_nothing(other):
    kind, cfg, prompts = other
    run = load(replace(cfg, decode_chunk=2), prompts=prompts)
    given = batch(run, prompts, picks=[0, 1])
    plain = plain_gradient(run, given)
    assert gradient_error(run, given, plain) < 1e-4
    run.model.recompute()
    assert gradient_error(run, given, plain) < 1e-4
    model = run.model
    for part, kinds in ((model.denoiser, model.checkpointed), (model.vae, model.vae_checkpointed)):
        wrapped = {type(m).__name__ for m in part.modules() if isinstance(m.forward, functools.partial)}
        assert wrapped and wrapped >= set(kinds)


def test_decode_takes_any_frames(other):
    """Frames of a pick are those of the whole decode (SVD's VAE mixes what is decoded together, so alone)."""
    kind, cfg, prompts = other
    run = load(replace(cfg, num_frames=25), prompts=prompts)
    model, latents = run.model, torch.randn(1, *run.model.latent_shape(run.cfg), requires_grad=True)
    group, whole = model.frames_per_latent, whole_video(model, latents)
    assert whole.shape[1] == 25
    for n in range(latents.shape[2]):
        alone = model.decode(latents, [n])
        assert alone.shape[1] == (group if n else 1)
        inside = whole[:, max(0, group * (n - 1) + 1) : group * n + 1]
        if kind != "svd":
            torch.testing.assert_close(alone, inside, rtol=0, atol=1e-5)
        (gradient,) = torch.autograd.grad(alone.sum(), latents)
        reached = gradient.abs().amax((0, 1, 3, 4)).nonzero().flatten().tolist()
        assert n in reached
        if kind.startswith(("wan", "anyflow")):
            assert reached == [n]
        if kind.startswith("cogvideox"):  # chunks of latent frames: 0 to 2, 3 and 4, 5 and 6
            assert min(reached) == (0 if n < 3 else 2 * ((n - 1) // 2) + 1)


def test_training_end_to_end(other):
    kind, cfg, _ = other
    K = 1 if "a14b" in kind else 2  # one step for each of its transformers
    rows = vader.train(replace(cfg, num_inference_steps=2, backprop_steps=K, eval_videos=1, watch="none"))
    assert [row["step"] for row in rows] == [0, 1, 1] and math.isfinite(rows[1]["grad_norm"])


@pytest.mark.parametrize("name", ["tiny-i2v", "tiny-wan"])
def test_tiny_models_equal_their_stock_pipelines(name):
    prompts = PROMPTS if name == "tiny-wan" else vader.read_prompts(IMAGES)
    run = load(Config(model=name, reward="colorful"), randomise=False, prompts=prompts[:2])
    given = batch(run, prompts[:2])
    ours = our_frames(run, given)
    pipe = stock_pipeline(
        {"tiny-i2v": "svd", "tiny-wan": "wan"}[name], replace(run.cfg, model=run.model.source)
    )
    assert ours.shape == (2, 8 if name == "tiny-i2v" else 9, 3, 64, 64)
    torch.testing.assert_close(ours, stock_frames(pipe, run, given), rtol=0, atol=5e-4)
    if name == "tiny-i2v":
        assert len(prompts) >= 40 and len({prompt.image for prompt in prompts}) == len(prompts)
        starts = torch.stack([read_image(prompt.image, 64, 64) for prompt in prompts[:2]])
        first, last = ((ours[:, n] - starts).abs().mean() for n in (0, 7))
        with torch.no_grad():
            latents = run.model.vae.encode(starts * 2 - 1).latent_dist.mean
            decoded = run.model.vae.decode(latents, num_frames=1).sample / 2 + 0.5
        # it starts from the image, as the autoencoder shows that, and then it moves
        assert (ours[:, 0] - decoded).abs().mean() < 0.02
        assert first < 1.2 * (decoded - starts).abs().mean() and last > 2 * first


def test_svd_decodes_a_large_video_in_pieces_as_stock(checkpoints, monkeypatch):
    cfg, prompts = Config(model="tiny-i2v", reward="colorful"), vader.read_prompts(IMAGES)[:1]
    run = load(cfg, randomise=False, prompts=prompts)
    model, pipe = run.model, stock_pipeline("svd", replace(run.cfg, model=run.model.source))
    latents = torch.randn(1, *model.latent_shape(run.cfg))
    for size in (3, 8):
        monkeypatch.setattr(type(model), "together", latents[:, :, :size].numel())
        theirs = pipe.decode_latents(latents.transpose(1, 2), 8, decode_chunk_size=size)
        ours = whole_video(model, latents)
        torch.testing.assert_close(
            ours[0], (theirs[0].transpose(0, 1) / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5
        )
    alone = torch.cat([model.decode(latents, [n]) for n in range(8)], dim=1)
    assert (alone - ours).abs().mean() > 1e-3  # so it matters


def test_cogvideox_makes_a_single_frame(checkpoints):
    size = dict(num_frames=1, height=32, width=48, num_inference_steps=2, lora_rank=4)
    run = load(Config(model=str(checkpoints("cogvideox")), reward="colorful", **size))
    latents = torch.randn(1, *run.model.latent_shape(run.cfg))
    theirs = run.model.vae.decode(latents / run.model.vae.config.scaling_factor).sample
    theirs = (theirs / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    torch.testing.assert_close(run.model.decode(latents, [0]), theirs, rtol=0, atol=1e-5)
    assert math.isfinite(vader.micro_batch(run, PROMPTS, 0, 0)["reward"].sum())


def test_cogvideox_decodes_large_frames_in_tiles(checkpoints):
    """As the stock VAE does when told to, with the gradient of one plain graph."""
    size = dict(num_frames=9, height=96, width=80, num_inference_steps=2, lora_rank=4)
    run = load(Config(model=str(checkpoints("cogvideox")), reward="colorful", **size))
    model, vae = run.model, run.model.vae
    latents = torch.randn(1, *model.latent_shape(run.cfg), requires_grad=True)
    whole = model.decode(latents, [0, 1, 2])
    vae.enable_tiling(64, 64, 0.25, 0.25)
    tiled = model.decode(latents, [0, 1, 2])
    theirs = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    torch.testing.assert_close(tiled, theirs, rtol=0, atol=1e-5)
    assert tiled.shape == whole.shape and (tiled - whole).abs().max() > 1e-3
    inside = (theirs > 0) & (theirs < 1)  # the stock clamp has no gradient elsewhere
    pull = torch.randn(tiled.shape) * inside
    (ours,) = torch.autograd.grad(tiled, latents, pull)
    (plain,) = torch.autograd.grad(theirs, latents, pull)
    assert plain.norm() > 0 and (ours - plain).norm() / plain.norm() < 1e-4


@pytest.mark.parametrize("kind", ["svd", "wan"])
def test_where_the_last_step_hardly_moves_the_video_another_trains(kind, checkpoints):
    cfg = checked(Config(model=str(checkpoints(kind)), height=32, width=32))
    schedule = vader.make_model(cfg).schedule(cfg)
    (step,) = vader.trained_steps(vader.Run(cfg, None, schedule, {}, {}, None))
    assert schedule.leverage(step) > 0.09 and schedule.leverage(len(schedule.t) - 1) < 0.01


@pytest.mark.parametrize("steps", [2, 10, 25])
def test_tables_of_euler_steps(steps):
    """Over Karras' noise levels with v prediction (Karras et al. 2022, alg. 1, eq. 5), and on a flow."""
    levels = dict(sigma_min=0.002, sigma_max=700.0, use_karras_sigmas=True, timestep_type="continuous")
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, **levels, prediction_type="v_prediction")
    scheduler.set_timesteps(steps)
    schedule, ramp = vader.tabulate(scheduler), np.linspace(700 ** (1 / 7), 0.002 ** (1 / 7), steps) ** 7
    sigma, after = ramp, np.append(ramp[1:], 0)
    size = np.sqrt(sigma**2 + 1)
    expected = dict(t=np.log(sigma) / 4, c=1 / size, b=(after - sigma) / size)
    # x - x0 = x - (x / size^2 - sigma f / size), and x moves along (x - x0) / sigma
    expected["a"] = 1 + (after - sigma) / sigma * (1 - 1 / size**2)
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(schedule, name), values, rtol=1e-6, atol=1e-6, err_msg=name)
    assert schedule.s == [0] * steps and schedule.start == pytest.approx(700, rel=1e-5)

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    schedule, sigma = vader.tabulate(scheduler), np.linspace(1, 0, steps + 1)
    sigma = 3 * sigma / (1 + 2 * sigma)
    np.testing.assert_allclose(schedule.b, np.diff(sigma), rtol=0, atol=1e-6)
    np.testing.assert_allclose(schedule.t, 1000 * sigma[:-1], rtol=1e-6)
    np.testing.assert_allclose(schedule.a + schedule.c, 1, rtol=0, atol=1e-9)
    assert schedule.s == [0] * steps and schedule.start == 1


def test_what_a_family_can_not_do_is_one_line(checkpoints, prompts_file, tmp_path, capsys):
    config = Path(shutil.copytree(checkpoints("cogvideox"), tmp_path / "1.5")) / "transformer" / "config.json"
    config.write_text(config.read_text().replace('patch_size_t": null', 'patch_size_t": 2'))
    cases = [
        (checkpoints("wan"), "--eta 0.5", "--eta adds noise"),
        (checkpoints("wan"), "--num_frames 6", "1 more than a multiple of 4"),
        (checkpoints("ltx"), "--timestep_spacing leading", "--timestep_spacing: this model has steps of its"),
        (checkpoints("anyflow"), "--timestep_spacing trailing", "--timestep_spacing: this model has steps"),
        (checkpoints("wan"), "--height 40", "multiples of 16"),
        (checkpoints("ltx"), "--num_inference_steps 1", "--num_inference_steps must be 2 or more"),
        (checkpoints("svd"), "", "starts from an image"),
        (tmp_path / "1.5", "", "is a CogVideoX 1.5"),
    ]
    capsys.readouterr()  # what building them said
    for model, flags, expected in cases:
        common = ["--model", str(model), "--prompts", prompts_file, "--reward", "colorful"]
        assert vader.main([*common, *flags.split(), "--out", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err
        assert expected in said and said.count("\n") == 1 and said.startswith("vader.py: error: ")
    assert not (tmp_path / "run").exists()


def hub_cache(home: Path, repo: str) -> Path:
    """The folder where the hub's cache keeps the files of a repository."""
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    return folder / "snapshots" / ("0" * 40)


def test_modelscope_and_the_published_aesthetic_files_end_to_end(settings, small, tmp_path):
    """`--model modelscope --reward aesthetic` as a user types it, on narrow random files in the cache."""
    shutil.copytree(small, hub_cache(tmp_path, "ali-vilab/text-to-video-ms-1.7b"))
    narrow = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.CLIPVisionConfig(**narrow, patch_size=32, image_size=224, projection_dim=768)
    clip = transformers.CLIPVisionModelWithProjection(config)
    clip.save_pretrained(hub_cache(tmp_path, "openai/clip-vit-large-patch14"))
    head = hub_cache(tmp_path, "trl-lib/ddpo-aesthetic-predictor")
    head.mkdir(parents=True)
    torch.save(rewards.aesthetic_head(768).state_dict(), head / "aesthetic-model.pth")
    cfg = replace(settings, model="modelscope", reward="aesthetic + 0.1*colorful", steps=1, eval_videos=1)
    said, _ = python("vader.py", *command(cfg), HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert "modelscope on cpu" in said and "leverage" in said
    rows = vader.read_metrics(Path(cfg.out))
    assert rows[1]["grad_norm"] > 0 and {"aesthetic", "colorful"} < rows[1].keys()


def test_bad_image_prompts_are_one_line(tmp_path):
    path, svd = tmp_path / "prompts.jsonl", vader.find_model("svd")[0]
    (tmp_path / "broken.png").write_text("no picture")
    Image.new("1", (14000, 13000)).save(tmp_path / "bomb.png")
    for line, message in [
        ('{"prompt": null, "image": "bomb.png"}', r"line 1: write \{"),
        ('{"prompt": ["a"], "image": "bomb.png"}', r"line 1: write \{"),
        ('{"prompt": "a", "image": "bomb.png"}', "can't read the image .*bomb"),
        ("a cat", r"line 1: write \{"),
        ('{"prompt": "a"}', "starts from an image"),
        ('{"prompt": "", "image": null}', r"line 1: write \{"),
        ('{"prompt": "a", "picture": "a.png"}', r"line 1: write \{"),
        ("[1]", r"line 1: write \{"),
        ('{"prompt": "a", "image": "none.png"}', "can't read the image .*none.png"),
        ('{"prompt": "a", "image": "broken.png"}', "can't read the image .*broken.png"),
    ]:
        path.write_text(line)
        with pytest.raises(BadInput, match=message) as problem:
            check_prompt_file("--prompts", str(path), svd)
        assert "\n" not in str(problem.value)
    with pytest.raises(BadInput, match="starts from an image"):
        check_prompt_file("--prompts", str(HERE / "prompts.txt"), svd)
    (tmp_path / "prompts.CSV").write_text("prompt\na cat\n")
    with pytest.raises(BadInput, match="read from .txt and .jsonl files"):
        check_prompt_file("--prompts", str(tmp_path / "prompts.CSV"), svd)


def test_prompt_files_of_windows_and_odd_separators(tmp_path):
    """A byte order mark is no part of the first line, and lines end at newlines only."""
    (tmp_path / "a.txt").write_bytes("\ufeff# comment\r\na\u2028cat\r\n\r\na moon".encode())
    assert vader.read_prompts(str(tmp_path / "a.txt")) == [Prompt("a\u2028cat"), Prompt("a moon")]
    shutil.copy(HERE / "tiny" / "photo-cat.jpg", tmp_path)
    row = json.dumps({"prompt": "", "image": "photo-cat.jpg"})
    (tmp_path / "a.JSONL").write_bytes(f"\ufeff{row}".encode())
    assert vader.read_prompts(str(tmp_path / "a.JSONL"))[0].text == ""


def test_one_text_with_two_images_is_two_prompts(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(HERE / "tiny" / "photo-cat.jpg", tmp_path / name)
    lines = [json.dumps({"prompt": "a cat", "image": name}) for name in ("a.jpg", "b.jpg")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    first, second = vader.read_prompts(str(tmp_path / "prompts.jsonl"))
    assert first.text == second.text == "a cat" and len({first, second}) == 2


@pytest.mark.parametrize(
    "gone", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "text_encoder"]
)
def test_a_model_that_lacks_files_is_one_line(gone, small, settings, tmp_path, capsys):
    shutil.copytree(small, tmp_path / "model")
    if (tmp_path / "model" / gone).is_dir():
        shutil.rmtree(tmp_path / "model" / gone)
    else:
        (tmp_path / "model" / gone).unlink()
    assert vader.main(command(replace(settings, model=str(tmp_path / "model")))) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("vader.py: error: ") and "Traceback" not in said
