"""Tests of vader.py and rewards.py, in the order of the code: python -m pytest -q

Where a reference exists (diffusers' schedulers and pipeline, plain autograd, the official processor), the
test is a comparison. They run on a small random model in ModelScope's layout, and on the repo's tiny model.
"""

import csv
import dataclasses
import functools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import open_clip
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MotionAdapter,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableVideoDiffusionPipeline,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetSpatioTemporalConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from peft import PeftModel
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    VJEPA2Config,
    VJEPA2Model,
    VJEPA2VideoProcessor,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

import rewards
import vader
from vader import BadInput, Config

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "tiny"))
sys.path.append(str(HERE / "bench"))  # behind, as it has a rewards.py too
import ddpo  # noqa: E402 (needs the line above)
import dpo  # noqa: E402
import efficiency  # noqa: E402
import estimators  # noqa: E402
import generalise  # noqa: E402
import memory  # noqa: E402
import reference  # noqa: E402

TINY = HERE / "tiny" / "t2v"
NO_SCALING = torch.amp.GradScaler("cpu", enabled=False)
PROMPTS = ["a red kite rising over the sea", "a moon"]
README = (HERE / "README.md").read_text(encoding="utf-8")


def build_modelscope(folder: Path):
    """A checkpoint with the folders, classes, config keys and scheduler of ModelScope, narrow and random."""
    torch.manual_seed(0)
    unet = UNet3DConditionModel(
        sample_size=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    for name, p in unet.named_parameters():  # diffusers zeroes these, so frames would not speak to each other
        if "conv4.3.weight" in name:
            torch.nn.init.normal_(p, std=0.1)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 16, 16, 32), layers_per_block=1, norm_num_groups=4)
    vae.register_to_config(scaling_factor=0.18215)
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = CLIPTextConfig(**text, **ids, vocab_size=len(tokenizer), max_position_embeddings=32)
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon")
    scheduler = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    parts = dict(unet=unet, vae=vae, tokenizer=tokenizer, scheduler=scheduler)
    TextToVideoSDPipeline(text_encoder=CLIPTextModel(config), **parts).save_pretrained(folder)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    build_modelscope(folder)
    return str(folder)


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join((HERE / "prompts.txt").read_text().splitlines()[:12]))
    return str(path)


@pytest.fixture
def settings(small, prompts_file, tmp_path):
    """A Config of a small quick run, not square, with B != F != N."""
    size = dict(num_frames=5, height=32, width=48, num_inference_steps=4, guidance_scale=3.0, batch_size=2)
    run = dict(steps=2, eval_videos=2, grad_accum=1, lr=1e-2, lora_rank=4, out=str(tmp_path / "run"))
    return Config(model=small, prompts=prompts_file, reward="colorful", **size, **run)


def load(cfg, randomise=True, prompts=None):
    """A vader.Run and its parts; the LoRA away from its zero start."""
    cfg, source, family = vader.resolve(cfg)
    run = vader.load_run(cfg, source, family, PROMPTS if prompts is None else prompts)
    model = run.model
    torch.manual_seed(1)
    for name, p in vader.lora_parameters(model).items() if randomise else ():
        p.data.normal_(std=0.3 if "lora_B" in name else 0.2)
    return run, cfg, model, run.schedule, run.conds, run.terms


def batch(cfg, model, conds, seed=0, prompts=PROMPTS):
    noise = torch.randn(2, *model.latent_shape(cfg), generator=torch.Generator().manual_seed(seed))
    cond, uncond = vader.collate(conds, prompts)
    return prompts, noise, cond, uncond


def clip_reward(frames, prompts):
    """Depends on the order of frames and treats each differently."""
    weight = torch.linspace(-1, 2, frames.shape[1])[None, :, None, None, None]
    return (frames.diff(dim=1) ** 2).mean((1, 2, 3, 4)) * 40 + (weight * frames).mean((1, 2, 3, 4))


clip_reward.frames = 5


# ---- 1. Config and command line ----------------------------------------------------------------------------


def test_requirements_agree_with_the_script_header():
    header = re.findall(r'^#     "(.*)",$', (HERE / "vader.py").read_text(), flags=re.M)
    assert header == (HERE / "requirements.txt").read_text().split()
    assert len(header) >= 8


def test_every_command_in_the_readme_parses():
    commands = re.findall(r"vader\.py ((?:--|\\\n).*?)(?:#|`|\n|$)", README)
    assert len(commands) >= 5
    for command in commands:
        vader.parse_args(shlex.split(command))


def table(name: str) -> list[dict]:
    with open(HERE / "bench" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_tables_of_the_readme_are_the_measured_ones():
    cells = [
        [cell.strip(" `*") for cell in line.split("|")[1:-1]] for line in README.splitlines() if "|" in line
    ]
    for row in table("rewards"):
        numbers = [row[name] for name in ("base", "tuned", "gain", "error")]
        assert [row["reward"], *(f"{float(n):+.3f}" if n == row["gain"] else n for n in numbers)] in [
            line[:5] for line in cells
        ]
    for row in table("reference"):
        memory = [row[name] for name in ("one graph MB", "cut MB", "cut and checkpointed MB")]
        ratio = f"{row['seconds ratio']} ({row['from']} to {row['to']})"
        assert [row["K"], row["gradient difference"], *memory, ratio] in cells
    for row in table("reached"):
        assert [row[name] for name in row if name != "seeds"] in cells and row["seeds"] == "3"
    ways = {}
    for row in sorted(table("estimators"), key=lambda row: (row["reward"], row["seed"])):
        ways.setdefault(row["way"], []).append(row)
    for way, rows in ways.items():
        ranges = []
        for name in ("updates", "motion", "diversity"):
            values = sorted((row[name] for row in rows), key=float)
            ranges.append(f"{values[0]} to {values[-1]}")
        assert [way, *(f"{float(row['gain']):+.3f} ({row['error']})" for row in rows), *ranges] in cells
    for name, keys, columns in (
        ("generalise", ("reward", "seed"), ("trained on", "unseen combinations", "unseen words")),
        ("prompts", ("reward", "trained on"), generalise.PARTS),
    ):
        runs = {}
        for row in table(name):
            gains = runs.setdefault(tuple(row[key] for key in keys), {})
            gains.setdefault(row["prompts"], []).append(f"{float(row['gain']):+.3f} ({row['error']})")
        for run, gains in runs.items():
            assert [*run, *(", ".join(gains.get(column, ["not run"])) for column in columns)] in cells
        assert runs
    assert all(list(row.values()) in cells for row in table("scales") if row["trained on"] == "aesthetic")
    peaks = {(row["model"], row["reward"], row["offload"]): row["peak"] for row in table("memory")}
    models = {model for model, *_ in peaks}
    assert models == set(vader.PRESETS) - set(vader.TINY)
    for model in models:
        said = [f"{float(peaks[model, 'hps', offload]):.1f}" for offload in ("no", "yes")]
        assert [model, *said] in [[line[0], *line[-2:]] for line in cells]
        assert peaks.keys() > {(model, reward, "no") for reward in ("aesthetic", "vjepa")}


def test_importing_or_pasting_has_no_effect():
    code = "import sys; sys.argv = ['x', '--nonsense']; import vader; exec(open('vader.py').read()); "
    code += "print(resolve(Config(device='cpu'))[0].model)"  # names that the pasted text has defined
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert done.stdout == "tiny\n"


def test_the_appendices_can_be_cut(settings, monkeypatch):
    source = (HERE / "vader.py").read_text()
    start, end = source.index("# ---- 11."), source.index("if __name__")
    cut = types.ModuleType("cut")
    cut.__file__ = vader.__file__
    monkeypatch.setitem(sys.modules, "cut", cut)
    exec(compile(source[:start] + source[end:], cut.__file__, "exec"), vars(cut))
    assert not hasattr(cut, "Wan") and not hasattr(cut, "plan")
    cfg = dataclasses.replace(settings, steps=1, eval_videos=1)
    rows = cut.train(cut.Config(**dataclasses.asdict(cfg)))
    assert rows[-1]["step"] == 1 and (Path(cfg.out) / "lora" / "adapter_model.safetensors").exists()


def bad_inputs(folder: Path):
    (folder / "empty.txt").write_text("\n# nothing\n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00\x80prompts")
    (folder / "folder").mkdir()
    (folder / "other").mkdir()
    (folder / "other" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return {
        "prompts missing": ([f"--prompts={folder}/none.txt"], "no prompt file"),
        "prompts empty": ([f"--prompts={folder}/empty.txt"], "holds no prompts"),
        "prompts not text": ([f"--prompts={folder}/binary.txt"], "not a text file"),
        "flag": (["--guidence_scale", "3"], "'--guidance_scale'"),
        "reward": (["--reward", "asthetic"], "'aesthetic'"),
        "reward in a sum": (["--reward", "colorful + 0.5*estetic"], "'aesthetic'"),
        "sum": (["--reward", "colorful + "], "can't read"),
        "model": (["--model", "modelscop"], "'modelscope'"),
        "choice": (["--mode", "trane"], "'train'"),
        "range": (["--lr", "-1"], "--lr"),
        "nan": (["--lr", "nan"], "--lr"),
        "not a number": (["--steps", "many"], "--steps"),
        "K > T": (["--backprop_steps", "11"], "only 10 denoising steps"),
        "frames": (["--decode_frames", "9"], "only 8 frames"),
        "size": (["--height", "60"], "multiples of 8"),
        "no pipeline": (["--model", f"{folder}/folder"], "not a diffusers pipeline"),
        "other pipeline": (["--model", f"{folder}/other"], "FluxPipeline"),
        "no lora": (["--mode", "sample"], "needs --lora"),
        "lora missing": (["--lora", f"{folder}/folder"], "no adapter_config.json"),
        "resume nothing": (["--resume", "--out", f"{folder}/new"], "nothing to resume"),
        "out in use": (["--out", str(folder)], "not empty"),
        "unreachable": (["--model", "someone/something"], "--model tiny"),
    }


def test_bad_input_is_one_line_before_a_model_loads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vader, "load_run", lambda *a: pytest.fail("a model was loaded"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cases = bad_inputs(tmp_path)
    for name, (flags, expected) in cases.items():
        common = ["--model", "tiny", "--prompts", str(HERE / "prompts.txt"), "--out", str(tmp_path / "run")]
        assert vader.main([*common, *flags]) == 2, name
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1 and error.startswith("vader.py: error: "), (
            name,
            error,
        )
    assert not (tmp_path / "run").exists() and not (tmp_path / "new").exists()


def test_auto_takes_tiny_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg, source, _ = vader.resolve(Config())
    assert cfg.model == "tiny" and cfg.dtype == "fp32" and Path(source) == TINY
    assert cfg.out == "runs/aesthetic-tiny" and vader.field_type("lr")[2] == (1e-12, math.inf)


# ---- 2. Prompts and randomness -----------------------------------------------------------------------------


def test_draws_depend_on_their_key_only():
    draw = [torch.randn(4, generator=vader.generator_for(0, *key)) for key in ((1, 2), (1, 2), (2, 1), (12,))]
    assert (
        torch.equal(draw[0], draw[1])
        and not torch.equal(draw[0], draw[2])
        and not torch.equal(draw[0], draw[3])
    )


def test_held_out_prompts_are_not_trained_on(prompts_file, tmp_path):
    cfg = Config(prompts=prompts_file, batch_size=5)
    train, held_out = vader.split_prompts(cfg)
    assert (len(train), len(held_out)) == (11, 1) and not set(train) & set(held_out)
    drawn = [prompt for n in range(11) for prompt in vader.batch_prompts(train, cfg, n)]
    assert all(drawn.count(prompt) == 5 for prompt in train)  # every prompt once in each round
    (tmp_path / "one.txt").write_text("a cat\n")
    with pytest.raises(BadInput, match="one prompt"):
        vader.split_prompts(Config(prompts=str(tmp_path / "one.txt")))
    assert vader.split_prompts(Config(prompts=prompts_file, eval_prompts=str(tmp_path / "one.txt")))[1] == [
        "a cat"
    ]


def test_shipped_prompts_hold_out_what_the_tiny_world_holds_out():
    import make

    unseen = {make.caption(c) for c in make.UNSEEN}
    prompts, unseen_file = (
        vader.read_prompts(str(HERE / name)) for name in ("prompts.txt", "tiny/unseen.txt")
    )
    assert len(prompts) == 50 and not unseen & set(prompts) and set(unseen_file) <= unseen


def test_frames_are_picked_as_rewards_want():
    cfg, image, clip = Config(num_frames=9), {"i": (1.0, len)}, {"i": (1.0, len), "c": (1.0, clip_reward)}
    picks = [vader.pick_frames(cfg, image, vader.generator_for(n)) for n in range(40)]
    assert all(len(p) == 1 for p in picks) and len({p[0] for p in picks}) == 9
    assert vader.pick_frames(cfg, clip, None) == [0, 2, 4, 6, 8]
    three = vader.pick_frames(dataclasses.replace(cfg, decode_frames=3), image, vader.generator_for(1))
    assert len(set(three)) == 3 and three == sorted(three)
    # latent frame 0 holds one frame, those after it four each
    assert vader.pick_frames(cfg, clip, None, time=4) == [0, 1, 2]
    assert vader.pick_frames(dataclasses.replace(cfg, decode_frames=2), clip, None, time=4) == [0, 2]
    assert {tuple(vader.pick_frames(cfg, image, vader.generator_for(n), time=4)) for n in range(40)} == {
        (0,),
        (1,),
        (2,),
    }


def test_bad_image_prompts_are_one_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    (tmp_path / "broken.png").write_text("no picture")
    for line, message in [
        ("a cat", r"line 1: write \{"),
        ('{"prompt": "a"}', r"line 1: write \{"),
        ('{"prompt": "a", "image": "none.png"}', "line 1: no image .*none.png"),
        ('{"prompt": "a", "image": "broken.png"}', "broken.png can't be read as an image"),
    ]:
        path.write_text(line)
        with pytest.raises(BadInput, match=message):
            vader.read_prompts(str(path))
    with pytest.raises(BadInput, match="starts from an image"):
        vader.read_prompts(str(HERE / "prompts.txt"), images=True)


def test_one_text_with_two_images_is_two_prompts(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(HERE / "tiny" / "photo-cat.jpg", tmp_path / name)
    lines = [json.dumps({"prompt": "a cat", "image": name}) for name in ("a.jpg", "b.jpg")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    first, second = vader.read_prompts(str(tmp_path / "prompts.jsonl"))
    assert first == second == "a cat" and vader.cond_key(first) != vader.cond_key(second)


# ---- 3. Schedule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 3, 10, 25, 50])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_schedule_equals_diffusers_at_every_step(spacing, steps, kind, eta):
    config = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    config |= dict(
        prediction_type=kind, set_alpha_to_one=kind != "epsilon", steps_offset=int(kind == "epsilon")
    )
    config |= dict(rescale_betas_zero_snr=kind != "epsilon")
    scheduler = DDIMScheduler(**config, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    schedule = vader.ddim_schedule(dict(scheduler.config), steps, eta, spacing)
    assert schedule.t.tolist() == scheduler.timesteps.tolist()
    for i, t in enumerate(scheduler.timesteps):
        x, f, noise = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        theirs = scheduler.step(f, t, x, eta=eta, variance_noise=noise if eta else None)
        ours = schedule.a[i] * x + schedule.b[i] * f + schedule.s[i] * noise
        assert schedule.c[i] == 1
        torch.testing.assert_close(ours, theirs.prev_sample, rtol=1e-5, atol=2e-5)
        clean = schedule.p[i] * x + schedule.q[i] * f
        torch.testing.assert_close(clean, theirs.pred_original_sample, rtol=1e-5, atol=2e-5)


def test_trailing_spacing_has_the_leverage_that_leading_lacks():
    config = json.loads((TINY / "scheduler" / "scheduler_config.json").read_text())
    leading, trailing = (vader.ddim_schedule(config, 10, 0.0, s) for s in ("leading", "trailing"))
    assert leading.leverage(9) < 0.05 < 0.2 < trailing.leverage(9)
    x, f = torch.tensor([0.3, -0.2]).double()
    total = f * trailing.b[7]
    for i in (8, 9):
        total = trailing.a[i] * total
    assert abs(total / f) == pytest.approx(trailing.leverage(7)) and x != f


def test_a_clipping_scheduler_is_refused():
    with pytest.raises(BadInput, match="clip"):
        vader.ddim_schedule({"clip_sample": True}, 10)


# ---- 4. The model ------------------------------------------------------------------------------------------


def stock_frames(folder, cfg, prompts, noise, unet=None):
    """Frames (B, F, 3, H, W) in [0, 1] of diffusers' own pipeline, same noise."""
    pipe = TextToVideoSDPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=cfg.timestep_spacing)
    pipe.unet = unet(pipe.unet) if unet else pipe.unet
    pipe.set_progress_bar_config(disable=True)
    size = dict(num_frames=cfg.num_frames, height=cfg.height, width=cfg.width)
    run = dict(num_inference_steps=cfg.num_inference_steps, guidance_scale=cfg.guidance_scale, latents=noise)
    with torch.no_grad():
        latents = pipe(prompts, **size, **run, output_type="latent").frames
        return (pipe.decode_latents(latents) / 2 + 0.5).clamp(0, 1).transpose(1, 2)


@pytest.mark.parametrize("which", ["small", "tiny"])
def test_frames_equal_the_stock_pipeline(which, settings):
    cfg = (
        settings if which == "small" else dataclasses.replace(settings, model=str(TINY), width=64, height=48)
    )
    run, cfg, model, schedule, conds, _ = load(cfg, randomise=False)
    prompts, noise, cond, uncond = batch(cfg, model, conds)
    latents = vader.rollout(model, schedule, noise, cond, uncond, cfg.guidance_scale)
    ours = model.decode(latents[-1], list(range(cfg.num_frames)))
    theirs = stock_frames(cfg.model, cfg, prompts, noise)
    assert ours.shape == (2, 5, 3, cfg.height, cfg.width) and ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    assert len(latents) == cfg.num_inference_steps + 1 and torch.equal(latents[0], noise)


def test_decode_takes_any_frames(settings):
    _, cfg, model, *_ = load(settings)
    latents = torch.randn(2, *model.latent_shape(cfg))
    whole = model.decode(latents, list(range(5)))
    assert whole.dtype == torch.float32 and whole.min() >= 0 and whole.max() <= 1
    torch.testing.assert_close(model.decode(latents, [3, 1]), whole[:, [3, 1]], rtol=0, atol=1e-5)


def test_clamp_lets_gradient_through():
    x = torch.tensor([-0.5, 0.5, 1.5], requires_grad=True)
    y = vader.straight_through_clamp(x)
    y.sum().backward()
    assert y.tolist() == [0.0, 0.5, 1.0] and x.grad.tolist() == [1.0, 1.0, 1.0]


# ---- 5. LoRA -----------------------------------------------------------------------------------------------


def gradients(model):
    return torch.cat([p.grad.flatten().double() for p in vader.lora_parameters(model).values()])


def clear(model):
    for p in vader.lora_parameters(model).values():
        p.grad = None


def test_checkpointing_changes_no_gradient(settings):
    found = []
    for on in (True, False):
        run, cfg, model, schedule, conds, terms = load(dataclasses.replace(settings, checkpointing=on))
        prompts, *_ = batch(cfg, model, conds)
        vader.micro_batch(run, PROMPTS, 0, 0, NO_SCALING)
        found.append(gradients(model))
    assert found[0].norm() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-8)


def test_offloading_moves_what_is_idle_and_changes_nothing(settings, monkeypatch):
    """Where each network is in each phase, and the same gradient, by a device that only says its name."""
    found, phases = [], []
    for offload in (False, True):
        cfg = dataclasses.replace(settings, reward="remove:star", reward_weights=TOY, offload=offload)
        run, cfg, model, *_ = load(cfg)
        (network,), places = run.terms["remove:star"][1].networks, {}
        for name, part in dict(denoiser=model.denoiser, vae=model.vae, reward=network).items():
            monkeypatch.setattr(part, "to", functools.partial(places.__setitem__, name))
        monkeypatch.setattr(model, "device", torch.device("cpu", 0))
        for name in ("rollout", "score", "walk_back"):
            real = getattr(vader, name)

            def phase(*args, name=name, real=real, places=places, **kwargs):
                phases.append((name, *(part for part, place in places.items() if place != "cpu")))
                return real(*args, **kwargs)

            monkeypatch.setattr(vader, name, phase)
        vader.micro_batch(run, PROMPTS, 0, 0, NO_SCALING)
        found.append(gradients(model))
        monkeypatch.undo()
    assert torch.equal(*found) and found[0].norm() > 0
    everything = [(name, "vae", "denoiser", "reward") for name in ("rollout", "score", "walk_back")]
    assert [(name, *sorted(parts)) for name, *parts in phases[:3]] == [
        (name, *sorted(parts)) for name, *parts in everything
    ]
    assert [(name, *sorted(parts)) for name, *parts in phases[3:]] == [
        ("rollout", "denoiser"),
        ("score", "reward", "vae"),
        ("walk_back", "denoiser"),
    ]


def test_lora_is_float32_on_a_bf16_base(settings):
    run, cfg, model, schedule, conds, terms = load(dataclasses.replace(settings, dtype="bf16"))
    assert {p.dtype for p in vader.lora_parameters(model).values()} == {torch.float32}
    assert {p.dtype for p in model.denoiser.parameters() if not p.requires_grad} == {torch.bfloat16}
    prompts, *_ = batch(cfg, model, conds)
    vader.micro_batch(run, PROMPTS, 0, 0, NO_SCALING)
    assert torch.isfinite(gradients(model)).all() and gradients(model).norm() > 0


def test_the_lora_loads_in_stock_code_and_gives_our_frames(settings, tmp_path):
    run, cfg, model, schedule, conds, _ = load(settings)
    prompts, noise, cond, uncond = batch(cfg, model, conds)
    ours = model.decode(vader.rollout(model, schedule, noise, cond, uncond, 3.0)[-1], list(range(5)))
    vader.save_lora(model, tmp_path / "lora")
    theirs = stock_frames(
        cfg.model, cfg, prompts, noise, lambda unet: PeftModel.from_pretrained(unet, tmp_path / "lora")
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    without = stock_frames(cfg.model, cfg, prompts, noise)
    assert (without - theirs).abs().max() > 0.01


def test_a_lora_of_another_model_is_refused(settings, tmp_path, capsys):
    run, _, model, *_ = load(settings)
    vader.save_lora(model, tmp_path / "lora")
    assert vader.main(["--mode", "sample", "--model", "tiny", "--lora", str(tmp_path / "lora")]) == 2
    assert "made for another model" in capsys.readouterr().err


# ---- 6. Rollout, score, walk back --------------------------------------------------------------------------


def autograd_gradient(model, *given):
    """The same gradient by one plain graph through sampler, VAE and reward."""
    reference.one_graph(model, *given)
    return gradients(model)


@pytest.mark.parametrize("K", [1, 3, 4])
@pytest.mark.parametrize("coupling", [1.0, 0.0])
@pytest.mark.parametrize("kind", ["image", "clip"])
@pytest.mark.parametrize("chunk", [1, 5])
def test_walk_back_equals_plain_autograd(settings, K, coupling, kind, chunk):
    changes = dict(backprop_steps=K, coupling=coupling, decode_chunk=chunk)
    run, cfg, model, schedule, conds, terms = load(dataclasses.replace(settings, **changes))
    if kind == "clip":
        terms = {"clip": (0.7, clip_reward)}
    prompts, noise, cond, uncond = batch(cfg, model, conds)
    frames = list(range(5))
    latents = vader.rollout(model, schedule, noise, cond, uncond, cfg.guidance_scale)
    _, g = vader.score(model, terms, latents[-1], prompts, frames, chunk)
    trained = vader.trained_steps(cfg, None, schedule)
    vader.walk_back(model, schedule, latents, g, cond, uncond, trained, cfg)
    ours = gradients(model)
    clear(model)
    theirs = autograd_gradient(
        model, schedule, cfg, terms, prompts, noise, cond, uncond, frames, K, coupling == 1
    )
    assert theirs.norm() > 0
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_detached_unconditional_branch(settings):
    run, cfg, model, schedule, conds, terms = load(dataclasses.replace(settings, detach_uncond=True))
    prompts, noise, cond, uncond = batch(cfg, model, conds)
    latents = vader.rollout(model, schedule, noise, cond, uncond, cfg.guidance_scale)
    _, g = vader.score(model, terms, latents[-1], prompts, [0, 2])
    vader.walk_back(model, schedule, latents, g, cond, uncond, [3], cfg)
    ours = gradients(model)
    clear(model)
    theirs = autograd_gradient(model, schedule, cfg, terms, prompts, noise, cond, uncond, [0, 2], 1, True)
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_kl_pulls_to_the_base_model(settings):
    run, cfg, model, schedule, conds, _ = load(settings)
    prompts, noise, cond, uncond = batch(cfg, model, conds)
    latents = vader.rollout(model, schedule, noise, cond, uncond, 3.0)
    zero = torch.zeros_like(noise)
    change = vader.walk_back(model, schedule, latents, zero, cond, uncond, [3], cfg, kl_weight=0.5)
    ours = gradients(model)
    clear(model)
    with torch.no_grad(), model.denoiser.disable_adapter():
        base = model.denoise(latents[3], schedule.t[3], cond)
    loss = (model.denoise(latents[3], schedule.t[3], cond) - base).square().mean()
    (0.5 * loss).backward()
    assert change == pytest.approx(loss.item(), rel=1e-4) and change > 0
    assert (ours - gradients(model)).norm() / ours.norm() < 1e-5
    assert vader.walk_back(model, schedule, latents, zero, cond, uncond, [3], cfg) == 0


def test_a_reached_target_gives_no_gradient(settings):
    run, cfg, model, schedule, conds, terms = load(settings)
    prompts, noise, cond, uncond = batch(cfg, model, conds)
    x = vader.rollout(model, schedule, noise, cond, uncond, 3.0)[-1]
    values, g = vader.score(model, terms, x, prompts, [0])
    low, high = sorted(values["reward"].tolist())
    _, hinged = vader.score(model, terms, x, prompts, [0], target=(low + high) / 2)
    lower = values["reward"].argmin()
    assert torch.equal(hinged[lower], g[lower]) and g[lower].norm() > 0
    assert hinged[1 - lower].norm() == 0 < g[1 - lower].norm()


def test_terms_add_up_and_bad_rewards_are_named(settings):
    run, cfg, model, schedule, conds, terms = load(dataclasses.replace(settings, reward="2*colorful"))
    prompts, noise, cond, uncond = batch(cfg, model, conds)
    both = terms | {"clip": (0.5, clip_reward)}
    values, _ = vader.score(model, both, noise, prompts, list(range(5)))
    torch.testing.assert_close(values["reward"], 2 * values["colorful"] + 0.5 * values["clip"])
    flat = {"flat": (1.0, lambda frames, prompts: torch.ones(2))}
    with pytest.raises(BadInput, match="'flat' must return .2,., one per video"):
        vader.score(model, flat, noise, prompts, [0])


def test_which_steps_train():
    cfg = Config(backprop_steps=3, num_inference_steps=9)
    schedule = vader.flow_schedule(torch.tensor([1.0, 0.9, 0.6, 0.58, 0.5, 0.3, 0.28, 0.2, 0.08, 0.0]))

    def trained(kind, generator=None):
        return vader.trained_steps(dataclasses.replace(cfg, grad_steps=kind), generator, schedule)

    assert trained("last") == [6, 7, 8] and trained("spread") == [0, 4, 8]
    assert trained("strongest") == [1, 4, 7]  # the steps of 0.3, 0.2 and 0.12
    random = {tuple(trained("random", vader.generator_for(n))) for n in range(9)}
    assert len(random) > 1 and all(len(set(steps)) == 3 for steps in random)


@pytest.mark.parametrize("kind", ["svd", "wan"])
def test_where_the_last_step_hardly_moves_the_video_another_trains(kind, checkpoints):
    cfg, source, family = vader.resolve(Config(model=str(checkpoints(kind)), height=32, width=32))
    schedule = family(source, "cpu", torch.float32).schedule(cfg)
    (step,) = vader.trained_steps(cfg, None, schedule)
    assert schedule.leverage(step) > 0.09 and schedule.leverage(len(schedule) - 1) < 0.01


def peak_of_an_update(cfg):
    run, cfg, model, schedule, conds, terms = load(cfg)
    prompts, *_ = batch(cfg, model, conds)
    weights = sum(p.nbytes for part in (model.denoiser, model.vae) for p in part.parameters())
    with vader.LiveStorages() as memory:
        vader.micro_batch(run, PROMPTS, 0, 0, NO_SCALING)
    return memory.peak, weights


def test_peak_memory_is_flat_in_trained_steps_and_decoded_frames(settings):
    settings = dataclasses.replace(settings, checkpointing=True)
    base, weights = peak_of_an_update(settings)
    assert base > 100_000
    all_steps, _ = peak_of_an_update(dataclasses.replace(settings, backprop_steps=4))
    all_frames, _ = peak_of_an_update(dataclasses.replace(settings, decode_frames=5))
    at_once, _ = peak_of_an_update(dataclasses.replace(settings, decode_frames=5, decode_chunk=5))
    not_recomputed, _ = peak_of_an_update(dataclasses.replace(settings, checkpointing=False))
    peaks = dict(base=base, all_steps=all_steps, all_frames=all_frames, at_once=at_once, plain=not_recomputed)
    print("peak MB:", {name: round(peak / 1e6, 2) for name, peak in peaks.items()}, "weights", weights / 1e6)
    assert all_steps < 1.05 * base
    assert all_frames < 1.05 * base
    assert not_recomputed > 1.3 * base


# ---- 7. Files and resume -----------------------------------------------------------------------------------


def lora_of(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "lora" / "adapter_model.safetensors")


def same(first, second, tolerance=0.0):
    assert first.keys() == second.keys()
    return all((first[k] - second[k]).abs().max() <= tolerance * (1 + second[k].abs().max()) for k in first)


def test_resumed_equals_uninterrupted_bitwise(settings, tmp_path):
    cfg = dataclasses.replace(settings, steps=4, ema_decay=0.5, eval_every=2, eta=0.3)
    whole = dataclasses.replace(cfg, out=str(tmp_path / "whole"))
    rows = vader.train(whole)
    vader.train(dataclasses.replace(cfg, steps=2))
    again = vader.train(dataclasses.replace(cfg, resume=True))
    assert same(lora_of(cfg.out), lora_of(whole.out))
    assert any(value.abs().max() > 0 for name, value in lora_of(cfg.out).items() if "lora_B" in name)
    strip = [{k: v for k, v in row.items() if k not in ("seconds", "memory_gb")} for row in rows]
    assert strip == [{k: v for k, v in row.items() if k not in ("seconds", "memory_gb")} for row in again]
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 4]
    with pytest.raises(BadInput, match="started with --lr 0.01"):
        vader.train(dataclasses.replace(cfg, resume=True, lr=0.5))
    with pytest.raises(BadInput, match="add --resume"):
        vader.train(cfg)


KILLER = """
import json, os, random, signal, sys, time
import torch
import vader
torch.set_num_threads(1)  # so that forking is safe
cfg = vader.Config(**json.loads(sys.argv[1]))
random.seed(int(sys.argv[3]))
reached = 0
for kill in range(int(sys.argv[2])):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        cfg.resume = os.path.exists(cfg.out + "/config.json")
        vader.train(cfg)
        os._exit(0)
    time.sleep(random.uniform(1.0, 4.0))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    state = vader.Path(cfg.out) / "checkpoint" / "state.pt"
    step = torch.load(state, weights_only=True)["step"] if state.exists() else 0
    logged = max([row["step"] for row in vader.read_metrics(vader.Path(cfg.out))], default=0)
    assert reached <= step <= logged <= step + 1, (reached, step, logged)
    reached = step
print("reached", reached)
cfg.steps, cfg.resume = reached + 1, True
vader.train(cfg)
"""


def kill_and_resume(cfg, kills, seed=0):
    code = [sys.executable, "-c", KILLER, json.dumps(dataclasses.asdict(cfg)), str(kills), str(seed)]
    done = subprocess.run(code, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(re.search(r"reached (\d+)", done.stdout).group(1)) + 1


def test_kill_at_any_moment_loses_the_current_update_only(settings, tmp_path):
    cfg = dataclasses.replace(
        settings, steps=1000, eval_every=1000, eval_videos=1, num_inference_steps=1, batch_size=1
    )
    steps = kill_and_resume(cfg, kills=5)
    assert steps > 1
    whole = dataclasses.replace(cfg, steps=steps, out=str(tmp_path / "whole"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    vader.train(whole)
    torch.set_num_threads(threads)
    assert same(lora_of(cfg.out), lora_of(whole.out))
    rows = vader.read_metrics(Path(cfg.out))
    assert [row["step"] for row in rows if "reward" in row] == list(range(1, steps + 1))


def test_a_half_written_last_row_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert vader.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    assert vader.read_metrics(tmp_path, until=1) == [{"step": 1}]


# ---- 8. Evaluation and page --------------------------------------------------------------------------------


def test_summary_is_paired():
    assert vader.summary([1.0, 2.0], [2.0, 4.0]).startswith(
        "1.500 -> 3.000 (+1.500, standard error 0.500, 2 videos"
    )


def test_videos_do_not_depend_on_the_batch(settings):
    run, cfg, model, schedule, conds, _ = load(settings)
    prompts = ["a moon", "a red kite rising over the sea", "a moon"]
    together = vader.make_videos(run, prompts)
    alone = vader.make_videos(run, prompts[2:], first=2)
    torch.testing.assert_close(together[2:], alone, rtol=0, atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 0.01  # same prompt, other noise


def test_what_a_run_writes(settings):
    rows = vader.train(dataclasses.replace(settings, eval_every=1))
    out = Path(settings.out)
    page = (out / "index.html").read_text()
    assert "<svg" in page and page.count("<video") == 4
    for video in re.findall(r'<video src="([^"]+)"', page):
        frames = vader.iio.imread(out / video, plugin="FFMPEG")
        assert len(frames) == 5 and frames.shape[1] * 3 == frames.shape[2] * 2
    assert (out / "comparison.png").stat().st_size > 1000
    assert json.loads((out / "config.json").read_text())["lr"] == 0.01
    assert {"reward", "colorful", "grad_norm", "kl", "skipped", "seconds", "memory_gb"} < rows[1].keys()
    assert rows[-1]["eval"]["prompts"] == rows[0]["eval"]["prompts"] and len(rows[0]["eval"]["reward"]) == 2
    assert rows[-1]["eval"]["reward"] != rows[0]["eval"]["reward"]


# ---- 9. Training -------------------------------------------------------------------------------------------


def test_training_raises_the_reward(settings):
    cfg = dataclasses.replace(settings, steps=12, lr=3e-2, eval_videos=8)
    rows = vader.train(cfg)
    gain = np.subtract(rows[-1]["eval"]["reward"], rows[0]["eval"]["reward"])
    assert gain.mean() > 3 * gain.std(ddof=1) / math.sqrt(len(gain)) > 0


def test_own_reward_from_a_notebook(settings):
    def darkness(frames, prompts):
        return 1 - frames.mean((1, 2, 3, 4))

    rows = vader.train(dataclasses.replace(settings, steps=1), reward=darkness)
    assert "darkness" in rows[1] and rows[1]["grad_norm"] > 0


def test_own_reward_of_the_readme(settings, monkeypatch):
    code = re.search(r"```python\n(def make_.*?)```", README, flags=re.S).group(1)
    assert len(code.splitlines()) <= 10
    space = vars(rewards)
    exec(code, space)
    name = re.search(r"def make_(\w+)", code).group(1)
    monkeypatch.setitem(rewards.REWARDS, name, space[f"make_{name}"])
    rows = vader.train(dataclasses.replace(settings, steps=1, reward=f"{name} + 0.1*colorful"))
    assert rows[1]["reward"] == pytest.approx(rows[1][name] + 0.1 * rows[1]["colorful"], rel=1e-4)


def broken_after(calls):
    seen = []

    def reward(frames, prompts):
        seen.append(1)
        value = frames.mean((1, 2, 3, 4))
        return value * math.nan if len(seen) > calls and frames.requires_grad else value

    return reward


def test_a_non_finite_gradient_skips_its_update(settings):
    calls = []

    def sometimes(frames, prompts):
        calls.append(frames.requires_grad)
        return frames.mean((1, 2, 3, 4)) * (math.nan if sum(calls) == 2 and calls[-1] else 1)

    rows = [
        row
        for row in vader.train(dataclasses.replace(settings, steps=3), reward=sometimes)
        if "reward" in row
    ]
    assert [row["skipped"] for row in rows] == [0, 1, 1]
    assert math.isnan(rows[1]["grad_norm"]) and rows[2]["grad_norm"] > 0
    assert all(torch.isfinite(value).all() for value in lora_of(settings.out).values())


def test_ten_non_finite_gradients_in_a_row_stop_the_run(settings):
    with pytest.raises(FloatingPointError, match=r"at update 10, prompt 'a .*', seed 0"):
        vader.train(
            dataclasses.replace(settings, steps=40, num_inference_steps=1, eval_videos=1),
            reward=broken_after(4),
        )


def test_ctrl_c_saves_and_says_how_to_resume(settings, capsys, monkeypatch):
    calls = []

    def interrupting(frames, prompts):
        calls.append(frames.requires_grad)
        if sum(calls) == 2 and calls[-1]:
            os.kill(os.getpid(), signal.SIGINT)
        return frames.mean((1, 2, 3, 4))

    monkeypatch.setattr(sys, "argv", ["vader.py", "--reward", "a + b"])
    before = signal.getsignal(signal.SIGINT)
    rows = vader.train(dataclasses.replace(settings, steps=50), reward=interrupting)
    assert signal.getsignal(signal.SIGINT) is before
    assert rows[-1]["step"] == 2
    assert "python vader.py --reward 'a + b' --resume" in capsys.readouterr().out
    assert torch.load(Path(settings.out) / "checkpoint" / "state.pt", weights_only=True)["step"] == 2


def command(cfg, *launcher):
    words = [*(launcher or (sys.executable,)), str(HERE / "vader.py")]
    for name, value in dataclasses.asdict(cfg).items():
        if value not in (None, False) and value != getattr(Config(), name):
            words += [f"--{name}", str(value)]
    return words


def run_command(words, **environment):
    done = subprocess.run(words, cwd=HERE, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def test_two_ranks_equal_one_with_twice_the_accumulation(settings, tmp_path):
    two = dataclasses.replace(settings, eval_videos=1, out=str(tmp_path / "two"))
    run_command(
        command(two, sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"), OMP_NUM_THREADS="1"
    )
    one = dataclasses.replace(two, grad_accum=2, out=str(tmp_path / "one"))
    vader.train(one)
    assert same(lora_of(two.out), lora_of(one.out), tolerance=1e-4)
    assert not same(lora_of(two.out), lora_of(one.out), tolerance=-1)


# ---- 10. Sampling and scoring ------------------------------------------------------------------------------


def test_sample_and_eval_modes(settings, tmp_path, capsys):
    run, _, model, *_ = load(settings)
    vader.save_lora(model, tmp_path / "lora")
    short = tmp_path / "short.txt"
    short.write_text("a moon\na red kite rising over the sea\na white star\n")
    common = dict(prompts=str(short), lora=str(tmp_path / "lora"))
    vader.sample(dataclasses.replace(settings, mode="sample", out=str(tmp_path / "s"), **common))
    named = json.loads((tmp_path / "s" / "prompts.json").read_text())
    assert named == {
        "000.mp4": "a moon",
        "001.mp4": "a red kite rising over the sea",
        "002.mp4": "a white star",
    }
    assert all((tmp_path / "s" / name).stat().st_size > 500 for name in named)
    scored = dataclasses.replace(settings, mode="eval", out=str(tmp_path / "e"), reward="colorful", **common)
    vader.compare(scored)
    result = json.loads((tmp_path / "e" / "eval.json").read_text())
    assert len(result["base"]["colorful"]) == 3 and result["base"]["reward"] != result["tuned"]["reward"]
    assert "colorful: " in capsys.readouterr().out and (tmp_path / "e" / "index.html").exists()
    with pytest.raises(BadInput, match="not empty"):
        vader.compare(scored)


def hub_cache(home: Path, repo: str) -> Path:
    """The folder where the hub's cache keeps the files of a repository."""
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    return folder / "snapshots" / ("0" * 40)


def test_modelscope_and_the_published_aesthetic_files_end_to_end(settings, small, tmp_path):
    """`--model modelscope --reward aesthetic` as a user types it, on narrow random files in the cache."""
    shutil.copytree(small, hub_cache(tmp_path, "ali-vilab/text-to-video-ms-1.7b"))
    narrow = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=32
    )
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**narrow, image_size=224, projection_dim=768))
    clip.save_pretrained(hub_cache(tmp_path, "openai/clip-vit-large-patch14"))
    head = hub_cache(tmp_path, "trl-lib/ddpo-aesthetic-predictor")
    head.mkdir(parents=True)
    torch.save(rewards.AestheticHead(768).state_dict(), head / "aesthetic-model.pth")
    cfg = dataclasses.replace(settings, model="modelscope", reward="aesthetic + 0.1*colorful", steps=1)
    said = run_command(command(cfg), HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert "modelscope on cpu" in said and "leverage" in said
    rows = vader.read_metrics(Path(cfg.out))
    assert rows[1]["grad_norm"] > 0 and {"aesthetic", "colorful"} < rows[1].keys()


# ---- 11. More models ---------------------------------------------------------------------------------------

# Every other family on a small random checkpoint in its published layout, against its stock pipeline.

LATENT_VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4, block_out_channels=(32,) * 4, layers_per_block=1
)
SD_BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def randomised(network):
    """With what diffusers sets to zero made random too, so that every part has a say."""
    for p in network.parameters():
        if p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.05)
    return network


def small_text_encoder():
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = CLIPTextConfig(**text, **ids, vocab_size=len(tokenizer), max_position_embeddings=32)
    return dict(tokenizer=tokenizer, text_encoder=CLIPTextModel(config))


def build_animatediff(folder: Path, parts=False):
    """One AnimateDiffPipeline folder; with `parts`, a StableDiffusionPipeline and the adapter beside it."""
    blocks = dict(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8)
    kinds = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"))
    kinds["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D")
    unet = randomised(UNet2DConditionModel(**blocks, **kinds, cross_attention_dim=32, attention_head_dim=8))
    motion = dict(block_out_channels=(32, 64), motion_layers_per_block=1, motion_num_attention_heads=2)
    adapter = randomised(MotionAdapter(**motion, motion_norm_num_groups=8))
    vae = AutoencoderKL(**LATENT_VAE, up_block_types=("UpDecoderBlock2D",) * 4)
    shared = dict(vae=vae, **small_text_encoder(), scheduler=PNDMScheduler(**SD_BETAS, steps_offset=1))
    if parts:
        adapter.save_pretrained(folder / "adapter")
        shared |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        StableDiffusionPipeline(unet=unet, **shared).save_pretrained(folder)
    else:
        AnimateDiffPipeline(unet=unet, motion_adapter=adapter, **shared).save_pretrained(folder)


def build_svd(folder: Path):
    blocks = dict(block_out_channels=(32, 64), layers_per_block=1, num_attention_heads=(2, 4))
    kinds = dict(down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"))
    kinds["up_block_types"] = ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")
    times = dict(addition_time_embed_dim=32, projection_class_embeddings_input_dim=96, num_frames=5)
    unet = randomised(UNetSpatioTemporalConditionModel(**blocks, **kinds, **times, cross_attention_dim=32))
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = CLIPVisionConfig(**vision, image_size=224, patch_size=32, projection_dim=32)
    levels = dict(sigma_min=0.002, sigma_max=700.0, use_karras_sigmas=True, timestep_type="continuous")
    scheduler = EulerDiscreteScheduler(
        **SD_BETAS, **levels, prediction_type="v_prediction", timestep_spacing="leading", steps_offset=1
    )
    StableVideoDiffusionPipeline(
        vae=randomised(AutoencoderKLTemporalDecoder(**LATENT_VAE)),
        image_encoder=CLIPVisionModelWithProjection(config),
        unet=unet,
        scheduler=scheduler,
        feature_extractor=CLIPImageProcessor(),
    ).save_pretrained(folder)


def build_t5_tokenizer():
    letters = [(f"\u2581{c}", -3.0) for c in "abcdefghijklmnopqrstuvwxyz"]
    letters += [(c, -2.0) for c in "abcdefghijklmnopqrstuvwxyz\u2581"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0)


def build_wan(folder: Path):
    heads = dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=48, freq_dim=32)
    transformer = randomised(WanTransformer3DModel(**heads, text_dim=32, in_channels=16, out_channels=16))
    text = dict(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=64)
    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    WanPipeline(
        tokenizer=build_t5_tokenizer(),
        text_encoder=UMT5EncoderModel(UMT5Config(**text)),
        transformer=transformer,
        vae=AutoencoderKLWan(base_dim=16, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1),
        scheduler=UniPCMultistepScheduler(**flow),
    ).save_pretrained(folder)


def small_t5():
    text = dict(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=64)
    return dict(tokenizer=build_t5_tokenizer(), text_encoder=T5EncoderModel(T5Config(**text)))


def build_cogvideox(folder: Path):
    heads = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, time_embed_dim=16)
    size = dict(sample_width=6, sample_height=4, sample_frames=9, in_channels=4, out_channels=4)
    transformer = CogVideoXTransformer3DModel(**heads, **size, text_embed_dim=32, max_text_seq_length=226)
    vae = dict(block_out_channels=(8, 8, 8, 16), latent_channels=4, layers_per_block=1, norm_num_groups=2)
    levels = dict(rescale_betas_zero_snr=True, snr_shift_scale=3.0, timestep_spacing="trailing")
    CogVideoXPipeline(
        **small_t5(),
        transformer=randomised(transformer),
        vae=randomised(AutoencoderKLCogVideoX(**vae, scaling_factor=0.7)),
        scheduler=CogVideoXDDIMScheduler(**SD_BETAS, **levels, prediction_type="v_prediction"),
    ).save_pretrained(folder)


def build_ltx(folder: Path, timed=False):
    """timed: the VAE of 0.9.5, whose decoder takes a timestep."""
    heads = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, in_channels=8, out_channels=8)
    transformer = LTXVideoTransformer3DModel(**heads, cross_attention_dim=32, caption_channels=32)
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
    vae = randomised(AutoencoderKLLTXVideo(**layout))
    vae.latents_mean, vae.latents_std = torch.randn(8) / 4, torch.rand(8) + 0.5
    shift = dict(base_image_seq_len=1024, max_image_seq_len=4096, base_shift=0.95, max_shift=2.05)
    scheduler = FlowMatchEulerDiscreteScheduler(**shift, shift_terminal=0.1, use_dynamic_shifting=True)
    parts = dict(transformer=randomised(transformer), vae=vae, scheduler=scheduler)
    LTXPipeline(**small_t5(), **parts).save_pretrained(folder)


BUILDERS = {
    "animatediff": build_animatediff,
    "animatediff-parts": functools.partial(build_animatediff, parts=True),
    "svd": build_svd,
    "wan": build_wan,
    "cogvideox": build_cogvideox,
    "ltx": build_ltx,
    "ltx-image": functools.partial(build_ltx, timed=True),
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    @functools.cache
    def build(name):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("families") / name
        BUILDERS[name](folder)
        return folder

    return build


@pytest.fixture(params=list(BUILDERS))
def other(request, checkpoints, tmp_path, monkeypatch):
    """A family's name, its Config and two prompts for it."""
    name, folder = request.param, checkpoints(request.param)
    monkeypatch.setattr(vader.AnimateDiff, "motion", str(folder / "adapter"))
    size = dict(num_inference_steps=4, guidance_scale=3.0, batch_size=2)
    frames = 9 if name in ("cogvideox", "ltx", "ltx-image") else 5
    side = 2 if name in ("ltx", "ltx-image") else 1
    size |= dict(num_frames=frames, height=32 * side, width=48 * side)
    run = dict(steps=1, eval_videos=2, grad_accum=1, lora_rank=4, backprop_steps=2, out=str(tmp_path / "run"))
    run |= dict(grad_steps="last")
    cfg = Config(model=str(folder), **size, **run, reward="colorful", prompts=str(tmp_path / "prompts.jsonl"))
    for n, photo in enumerate(["cat", "rocket"]):
        shutil.copy(HERE / "tiny" / f"photo-{photo}.jpg", tmp_path / f"{n}.jpg")
    lines = [json.dumps({"prompt": text, "image": f"{n}.jpg"}) for n, text in enumerate(PROMPTS)]
    Path(cfg.prompts).write_text("\n".join(lines))
    if name not in ("svd", "ltx-image"):
        Path(cfg.prompts).with_suffix(".txt").write_text("\n".join(PROMPTS))
        cfg = dataclasses.replace(cfg, prompts=str(Path(cfg.prompts).with_suffix(".txt")))
    return name.removesuffix("-parts"), cfg, vader.read_prompts(cfg.prompts)


def stock_pipeline(kind, cfg):
    """The stock pipeline of a family's checkpoint, with a first-order scheduler."""
    pipe = DiffusionPipeline.from_pretrained(cfg.model, dtype=torch.float32)
    if kind == "animatediff":
        if not isinstance(pipe, AnimateDiffPipeline):
            adapter = MotionAdapter.from_pretrained(Path(cfg.model) / "adapter")
            pipe = AnimateDiffPipeline.from_pretrained(cfg.model, motion_adapter=adapter, dtype=torch.float32)
        spaced = dict(beta_schedule="linear", clip_sample=False, timestep_spacing="trailing")
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **spaced)
    if kind == "wan":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    if kind == "ltx-image":
        pipe = LTXImageToVideoPipeline(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def other_stock_frames(pipe, cfg, prompts, noise):
    """Frames (B, F, 3, H, W) in [0, 1] of the stock pipeline, same noise."""
    run = dict(num_frames=cfg.num_frames, height=cfg.height, width=cfg.width, output_type="pt")
    run["num_inference_steps"] = cfg.num_inference_steps
    if isinstance(pipe, StableVideoDiffusionPipeline):
        images = [Image.open(prompt.image).convert("RGB") for prompt in prompts]
        draws = [vader.generator_for("image noise") for _ in images]
        run |= dict(max_guidance_scale=cfg.guidance_scale, decode_chunk_size=1, generator=draws)
        noise = noise.transpose(1, 2)
        # the stock encoder wants pictures of one size
        together = zip(images, draws, noise, strict=True)
        parts = [pipe(i, latents=n[None], **run | {"generator": d}).frames for i, d, n in together]
        return torch.cat([torch.stack(list(part)) for part in parts])
    texts = [str(prompt) for prompt in prompts]
    run |= dict(guidance_scale=cfg.guidance_scale)
    if isinstance(pipe, CogVideoXPipeline):
        noise = noise.transpose(1, 2)
    if isinstance(pipe, (LTXPipeline, LTXImageToVideoPipeline)):
        run |= dict(decode_timestep=vader.LTX.decode_timestep, generator=vader.generator_for("decode noise"))
        run |= dict(decode_noise_scale=vader.LTX.decode_noise_scale)
    if isinstance(pipe, LTXImageToVideoPipeline):
        # the stock pipeline samples the image's latent; ours is the mode, handed over in the first latents
        images = [
            vader.read_image(prompt.image, cfg.height, cfg.width)[:, None] * 2 - 1 for prompt in prompts
        ]
        with torch.no_grad():
            latent = pipe.vae.encode(torch.stack(images)).latent_dist.mode()
        latent = pipe._normalize_latents(latent, pipe.vae.latents_mean, pipe.vae.latents_std)
        noise = torch.cat([latent, noise[:, :, 1:]], dim=2)
        run["image"] = [Image.open(prompt.image).convert("RGB") for prompt in prompts]
    if isinstance(pipe, (LTXPipeline, LTXImageToVideoPipeline)):
        noise = noise.flatten(2).transpose(1, 2)
    return pipe(prompt=texts, latents=noise, **run).frames


def whole_video(model, latents):
    """All frames; where a latent frame is one frame, decoded one by one, as SVD is told to."""
    every = list(range(latents.shape[2]))
    with torch.no_grad():
        parts = [[n] for n in every] if model.time == 1 else [every]
        return torch.cat([model.decode(latents, part) for part in parts], dim=1)


def test_other_families_equal_their_stock_pipeline(other):
    kind, cfg, prompts = other
    _, cfg, model, schedule, conds, _ = load(cfg, randomise=False, prompts=prompts)
    _, noise, cond, uncond = batch(cfg, model, conds, prompts=prompts)
    latents = vader.rollout(model, schedule, noise, cond, uncond, cfg.guidance_scale)
    ours = whole_video(model, latents[-1])
    pipe = stock_pipeline(kind, cfg)
    theirs = other_stock_frames(pipe, cfg, prompts, noise)
    print(f"{kind}: greatest difference {(ours - theirs).abs().max():.1e}")
    assert ours.shape == theirs.shape == (2, cfg.num_frames, 3, cfg.height, cfg.width) and ours.std() > 0.01
    assert ours[0].sub(ours[1]).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-4)


def test_other_families_decode_any_picks(other):
    """Frames of a pick are those of the whole decode (SVD's VAE mixes what is decoded together, so alone)."""
    kind, cfg, prompts = other
    _, cfg, model, *_ = load(dataclasses.replace(cfg, num_frames=25), prompts=prompts)
    latents = torch.randn(1, *model.latent_shape(cfg), requires_grad=True)
    time, whole = model.time, whole_video(model, latents)
    assert whole.shape[1] == 25
    for n in range(latents.shape[2]):
        alone = model.decode(latents, [n])
        assert alone.shape[1] == (time if n else 1)
        torch.testing.assert_close(
            alone, whole[:, max(0, time * (n - 1) + 1) : time * n + 1], rtol=0, atol=1e-5
        )
        (gradient,) = torch.autograd.grad(alone.sum(), latents)
        reached = gradient.abs().amax((0, 1, 3, 4)).nonzero().flatten().tolist()
        assert n in reached
        if kind == "wan":
            assert reached == [n]
        if kind == "cogvideox":  # chunks of latent frames: 0 to 2, 3 and 4, 5 and 6
            assert min(reached) == (0 if n < 3 else 2 * ((n - 1) // 2) + 1)


def test_other_families_walk_back_equals_plain_autograd(other):
    kind, cfg, prompts = other
    run, cfg, model, schedule, conds, terms = load(cfg, prompts=prompts)
    _, noise, cond, uncond = batch(cfg, model, conds, prompts=prompts)
    picks = [0, 1]
    latents = vader.rollout(model, schedule, noise, cond, uncond, cfg.guidance_scale)
    _, g = vader.score(model, terms, latents[-1], prompts, picks, chunk=2)
    vader.walk_back(model, schedule, latents, g, cond, uncond, vader.trained_steps(cfg, None, schedule), cfg)
    ours = gradients(model)
    clear(model)
    theirs = autograd_gradient(
        model, schedule, cfg, terms, prompts, noise, cond, uncond, picks, cfg.backprop_steps, True
    )
    assert theirs.norm() > 0 and (ours - theirs).norm() / theirs.norm() < 1e-4


def test_other_families_checkpointing_changes_no_gradient(other):
    kind, cfg, prompts = other
    found = []
    for on in (True, False):
        run, cfg, model, *_ = load(dataclasses.replace(cfg, checkpointing=on), prompts=prompts)
        vader.micro_batch(run, prompts, 0, 0, NO_SCALING)
        found.append(gradients(model))
    assert found[0].norm() > 0
    assert (found[0] - found[1]).norm() / found[1].norm() < 1e-4


def test_other_families_lora_loads_in_stock_diffusers(other, tmp_path):
    kind, cfg, prompts = other
    _, cfg, model, schedule, conds, _ = load(dataclasses.replace(cfg, lora_alpha=8), prompts=prompts)
    _, noise, cond, uncond = batch(cfg, model, conds, prompts=prompts)
    vader.save_lora(model, tmp_path / "lora")
    clean = vader.rollout(model, schedule, noise, cond, uncond, cfg.guidance_scale)[-1]
    ours = whole_video(model, clean)
    pipe = stock_pipeline(kind, cfg)
    without = other_stock_frames(pipe, cfg, prompts, noise)
    if kind == "svd":
        pipe.unet = PeftModel.from_pretrained(pipe.unet, tmp_path / "lora")
    else:
        pipe.load_lora_weights(tmp_path / "lora")
    theirs = other_stock_frames(pipe, cfg, prompts, noise)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert (without - theirs).abs().max() > 0.01


def test_tiny_i2v_starts_from_the_image_as_its_stock_pipeline_does():
    prompts = vader.read_prompts(str(HERE / "tiny" / "images.jsonl"))
    assert len(prompts) >= 40 and len({prompt.image for prompt in prompts}) == len(prompts)
    _, cfg, model, schedule, conds, _ = load(
        Config(model="tiny-i2v", reward="colorful"), randomise=False, prompts=prompts[:2]
    )
    _, noise, cond, uncond = batch(cfg, model, conds, prompts=prompts[:2])
    ours = whole_video(model, vader.rollout(model, schedule, noise, cond, uncond, cfg.guidance_scale)[-1])
    folder = dataclasses.replace(cfg, model=str(HERE / "tiny" / "i2v"))
    theirs = other_stock_frames(stock_pipeline("svd", folder), cfg, prompts[:2], noise)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-4)
    starts = torch.stack([vader.read_image(prompt.image) for prompt in prompts[:2]])
    assert (ours[:, 0] - starts).abs().mean() < 0.03
    assert (ours[:, 7] - starts).abs().mean() > 2 * (ours[:, 0] - starts).abs().mean()  # and then it moves


def test_tiny_wan_equals_its_stock_pipeline():
    _, cfg, model, schedule, conds, _ = load(Config(model="tiny-wan", reward="colorful"), randomise=False)
    _, noise, cond, uncond = batch(cfg, model, conds)
    ours = whole_video(model, vader.rollout(model, schedule, noise, cond, uncond, cfg.guidance_scale)[-1])
    folder = dataclasses.replace(cfg, model=str(HERE / "tiny" / "wan"))
    theirs = other_stock_frames(stock_pipeline("wan", folder), cfg, PROMPTS, noise)
    assert ours.shape == (2, 9, 3, 64, 64)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-4)


def test_cogvideox_decodes_large_frames_in_tiles(checkpoints, tmp_path):
    """As the stock VAE does when told to, with the gradient of one plain graph."""
    folder = str(checkpoints("cogvideox"))
    size = dict(num_frames=9, height=96, width=80, num_inference_steps=2, lora_rank=4)
    _, cfg, model, *_ = load(Config(model=folder, reward="colorful", **size))
    latents, vae = torch.randn(1, *model.latent_shape(cfg), requires_grad=True), model.vae
    whole = model.decode(latents, [0, 1, 2])
    vae.enable_tiling(64, 64, 0.25, 0.25)
    tiled = model.decode(latents, [0, 1, 2])
    theirs = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    torch.testing.assert_close(tiled, theirs, rtol=0, atol=1e-5)
    assert tiled.shape == whole.shape and (tiled - whole).abs().max() > 1e-3
    pull = torch.randn(tiled.shape)
    inside = (theirs > 0) & (theirs < 1)  # the stock clamp has no gradient elsewhere
    (ours,) = torch.autograd.grad(tiled, latents, pull * inside)
    (plain,) = torch.autograd.grad(theirs, latents, pull * inside)
    assert plain.norm() > 0 and (ours - plain).norm() / plain.norm() < 1e-4


def test_other_families_train_end_to_end(other):
    kind, cfg, _ = other
    rows = vader.train(dataclasses.replace(cfg, eval_prompts=cfg.prompts))
    assert [row["step"] for row in rows] == [0, 1, 1] and math.isfinite(rows[1]["grad_norm"])
    named = "first frame's difference from the image" in rows[0]["eval"]
    assert named == (kind in ("svd", "ltx-image"))


# ---- 12. Memory plan ---------------------------------------------------------------------------------------


def planned(capsys, *words):
    """Exit code and the printed gigabytes of --plan."""
    code = vader.main(["--plan", *words])
    text = capsys.readouterr().out
    return code, {name.strip(): float(size) for name, size in re.findall(r"^(.+?) +([\d.]+) GB", text, re.M)}


def test_plan_of_modelscope_needs_no_weights_and_adds_up(capsys):
    code, found = planned(capsys, "--model", "modelscope", "--reward", "aesthetic", "--vram", "4")
    # U-Net 1.41, VAE decoder and encoder 0.08, CLIP ViT-L/14 vision 0.30 thousand million weights in bf16,
    # LoRA in float32
    assert code == 1 and 3.5 < found["all weights"] < 3.8
    assert found["peak"] == max(found.values()) and 0.5 < found["walk back"] - found["all weights"] < 2


@pytest.mark.parametrize("name", ["wan", "svd", "animatediff", "cogvideox", "ltx"])
def test_plan_follows_every_family(name, checkpoints):
    """On small checkpoints: their weights are counted, with 2 bytes each, 4 in the LoRA."""
    cfg = Config(model=str(checkpoints(name)), reward="colorful", num_frames=9, height=64, width=64)
    found = vader.predict(cfg)
    cfg, source, family, _ = vader.resolve_plan(cfg)
    model = family(source, "cpu", torch.float32)
    model.load()
    vader.add_lora(model, cfg)
    parameters = [p for part in (model.denoiser, model.vae) for p in part.parameters()]
    weights = sum(p.numel() * (4 if p.requires_grad else 2) for p in parameters)
    assert weights <= 1e9 * found["all weights"] < weights + 2e5  # and the prompts' conditioning
    assert found["walk back"] > found["all weights"] and min(found.values()) > 0


def test_plan_says_what_it_can_not_do(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert vader.main(["--plan", "--model", "some/unknown-model"]) == 2
    assert "some/unknown-model" in capsys.readouterr().err


def test_plan_follows_vjepa_and_offloading():
    cfg = Config(
        model="tiny", reward="vjepa", reward_weights=TOY, dtype="bf16", num_frames=2, guidance_scale=1
    )
    found, offloaded = (vader.predict(dataclasses.replace(cfg, offload=on)) for on in (False, True))
    denoiser = sum(p.numel() for p in UNet3DConditionModel.from_pretrained(TINY / "unet").parameters())
    reward = sum(p.numel() for p in VJEPA2Model.from_pretrained(Path(TOY) / "vjepa").parameters())
    vae = sum(p.numel() for p in AutoencoderKL.from_pretrained(TINY / "vae").parameters())
    saved = {name: 1e9 * (found[name] - offloaded[name]) for name in found}
    # what waits on the host, at 2 bytes a weight; the LoRA goes with the denoiser
    assert saved["score"] == pytest.approx(2 * denoiser, rel=0.2)
    assert saved["rollout"] == saved["walk back"] == pytest.approx(2 * (vae + reward), rel=0.05)


# ---- rewards.py --------------------------------------------------------------------------------------------


def test_sums_are_read():
    assert rewards.parse("aesthetic") == [(1.0, "aesthetic", None)]
    assert rewards.parse(" colorful+ .5 * aesthetic:x y ") == [
        (1.0, "colorful", None),
        (0.5, "aesthetic", "x y"),
    ]
    with pytest.raises(rewards.BadReward, match="stands twice"):
        rewards.parse("aesthetic + 2*aesthetic")
    for wrong in ("", "2*", "aesthetic colorful", "3"):
        with pytest.raises(rewards.BadReward, match="can't read"):
            rewards.parse(wrong)


def test_rewards_load_from_a_folder(tmp_path):
    with pytest.raises(rewards.BadReward, match="has no folder 'aesthetic'"):
        rewards.make_terms("aesthetic", "cpu", torch.float32, str(tmp_path))
    (tmp_path / "aesthetic").mkdir()
    with pytest.raises(rewards.BadReward, match="can't load reward 'aesthetic'"):
        rewards.make_terms("aesthetic", "cpu", torch.float32, str(tmp_path))
    with pytest.raises(rewards.BadReward, match="unknown reward 'esthetics'"):
        rewards.make_terms("esthetics", "cpu", torch.float32)


def test_aesthetic_head_has_the_published_keys():
    shapes = {name: tuple(value.shape) for name, value in rewards.AestheticHead(768).state_dict().items()}
    published = {"0": (1024, 768), "2": (128, 1024), "4": (64, 128), "6": (16, 64), "7": (1, 16)}
    assert shapes == {f"layers.{n}.weight": s for n, s in published.items()} | {
        f"layers.{n}.bias": s[:1] for n, s in published.items()
    }


def drawn(n, full=True, seed=123):
    import make

    generator = torch.Generator().manual_seed(seed)
    return make.draw(make.pick(make.UNSEEN, n, generator), generator, full=full)


TOY = str(HERE / "tiny" / "rewards")
SPECS = [{"remove": "remove:star"}.get(name, name) for name in rewards.REWARDS]
LEARNED = ["aesthetic", "clip", "hps", "pickscore", "remove:star", "action", "vjepa"]
MOVING = ["a red star rising over the sea", "a green cube falling over a meadow", "a moon drifting left"]


def make_one(spec, dtype=torch.float32, weights=TOY):
    ((_, reward),) = rewards.make_terms(spec, "cpu", dtype, weights).values()
    return reward


@pytest.fixture
def networks(monkeypatch):
    """The networks of the rewards made in this test, as they are made."""
    made, freeze = [], rewards.frozen
    monkeypatch.setattr(
        rewards, "frozen", lambda *args: made.append((freeze(*args), *(args[3:] or [()]))) or made[-1][0]
    )
    return made


def official_processor(name, size):
    """The published preprocessing of a reward's network: its processor's class and settings."""
    square = {"height": size, "width": size}
    clip = CLIPImageProcessor(size=square, do_center_crop=False)
    pick = CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square)
    norm = dict(image_mean=rewards.IMAGENET_MEAN, image_std=rewards.IMAGENET_STD)
    mae = VideoMAEImageProcessor(size={"shortest_edge": size}, crop_size=square, **norm)
    jepa, yolos = VJEPA2VideoProcessor(crop_size=size), YolosImageProcessor(size=size, max_size=1333)
    return {
        "pickscore": lambda clip: pick(list(clip), return_tensors="pt").pixel_values,
        "remove:star": lambda clip: yolos(list(clip), return_tensors="pt").pixel_values,
        "action": lambda clip: mae(list(clip), return_tensors="pt").pixel_values[0],
        "vjepa": lambda clip: jepa([clip], return_tensors="pt").pixel_values_videos[0],
    }.get(name, lambda pictures: clip(list(pictures), return_tensors="pt").pixel_values)


@pytest.mark.parametrize("photo", ["cat", "rocket"])
@pytest.mark.parametrize("name", LEARNED)
def test_preprocessing_agrees_with_the_official_processor(name, photo, monkeypatch):
    picture = torch.from_numpy(iio.imread(HERE / "tiny" / f"photo-{photo}.jpg")).permute(2, 0, 1)
    pictures = torch.stack([picture.roll(3 * n, -1) for n in range(8)])
    given, ours = [], rewards.preprocess
    monkeypatch.setattr(rewards, "preprocess", lambda *a, **k: given.append(ours(*a, **k)) or given[-1])
    reward = make_one(name)
    value = reward(pictures[None].float() / 255, MOVING[:1]).item()
    official = official_processor(name, 64)(pictures)
    assert given[0].shape == official.shape
    # the processors work in whole numbers, rounded and clipped after each of the two directions of resizing
    step = 1 / 255 / 0.224
    assert (given[0] - official).abs().mean() < 0.5 * step and (given[0] - official).abs().max() < 4 * step
    monkeypatch.setattr(rewards, "preprocess", lambda *a, **k: official)
    assert reward(pictures[None].float() / 255, MOVING[:1]).item() == pytest.approx(value, rel=0.02, abs=1e-3)


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_are_right_and_stay_in_their_video(spec, networks):
    reward = make_one(spec, torch.float64)
    video, _, _ = drawn(3)
    frames = video.double().clamp(0.02, 0.98).requires_grad_()
    value = reward(frames, MOVING)
    assert value.shape == (3,)
    (slope,) = torch.autograd.grad(value[1], frames)
    assert slope[0].abs().max() == 0 == slope[2].abs().max()
    assert (slope[1].flatten(1).norm(dim=1) > 0).all()  # for every frame
    for seed in range(3):
        direction = torch.randn(frames[1].shape, generator=torch.Generator().manual_seed(seed)).double()
        moved = []
        for step in (1e-7, -1e-7):  # so small that hardly any |x| of an L1 loss changes its sign
            changed = torch.stack([frames[0], frames[1] + step * direction, frames[2]]).detach()
            moved.append(reward(changed, MOVING)[1])
        measured = ((moved[0] - moved[1]) / 2e-7).item()
        assert measured == pytest.approx((slope[1] * direction).sum().item(), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("spec", LEARNED)
def test_reward_networks_are_frozen_and_checkpointing_changes_nothing(spec, networks):
    reward = make_one(spec)
    frames = drawn(2)[0].requires_grad_()
    (plain,) = torch.autograd.grad(reward(frames, MOVING[:2]).sum(), frames)
    assert networks and not any(p.requires_grad for net, _ in networks for p in net.parameters())
    assert not any(module.training for net, _ in networks for module in net.modules())
    wrapped = 0
    for network, blocks in networks:
        rewards.checkpoint_blocks(network, blocks)
        wrapped += sum(isinstance(module.forward, functools.partial) for module in network.modules())
    assert wrapped >= 2
    (again,) = torch.autograd.grad(reward(frames, MOVING[:2]).sum(), frames)
    assert torch.allclose(plain, again, atol=1e-7)


@pytest.mark.parametrize("spec", ["aesthetic", "clip", "hps", "pickscore", "remove:star", "action", "vjepa"])
def test_rewards_in_bfloat16_are_nearly_those_in_float32(spec):
    video = drawn(2)[0]
    exact, half = (make_one(spec, dtype) for dtype in (torch.float32, torch.bfloat16))
    frames = video.clone().requires_grad_()
    value = half(frames, MOVING[:2])
    value.sum().backward()
    assert value.dtype == frames.grad.dtype == torch.float32 and torch.isfinite(frames.grad).all()
    assert value.tolist() == pytest.approx(exact(video, MOVING[:2]).tolist(), rel=0.03, abs=0.03)


def test_loading_does_not_say_that_weights_are_missing(caplog):
    """open_clip warns of a random model when it isn't the one to load the weights."""
    for spec in LEARNED:
        make_one(spec)
    assert not caplog.records


@pytest.mark.parametrize("spec", ["clip", "hps", "pickscore"])
def test_each_video_is_scored_with_its_own_prompt(spec):
    reward, (video, _, _) = make_one(spec), drawn(2)
    alone = [reward(video[n : n + 1], [MOVING[n]]).item() for n in range(2)]
    assert reward(video, MOVING[:2]).tolist() == pytest.approx(alone, abs=1e-5)
    swapped = reward(video, MOVING[1::-1])
    assert (swapped - torch.tensor(alone)).abs().min() > 1e-3


def random_like(network):
    """Random half-precision weights with a network's keys and shapes, made without the network itself."""
    numbers = torch.randn(1 << 22, generator=torch.Generator("cpu").manual_seed(0), device="cpu") * 0.02
    numbers = numbers.bfloat16()
    state = {}
    for key, value in network.state_dict().items():
        again = numbers.repeat(math.ceil(value.numel() / len(numbers)))
        state[key] = again[: value.numel()].reshape(value.shape).clone()
    return state


def published_folder(kind, folder):
    """A checkpoint in full size with random weights, in the layout and key names that are published."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        if kind == "hps":
            clip = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
            torch.save({"state_dict": random_like(clip)}, folder / "HPS_v2.1_compressed.pt")
            return "visual.transformer.resblocks.31.mlp.c_proj.weight", set(clip.state_dict())
        if kind == "remove:book":
            names = {i: f"thing {i}" for i in range(91)} | {84: "book"}
            network = YolosForObjectDetection(YolosConfig(image_size=[800, 1344], id2label=names))
            old, known = (
                ("encoder.interpolation.mid", "encoder.mid"),
                "class_labels_classifier.layers.2.weight",
            )
        elif kind == "action:archery":
            names = {i: f"action {i}" for i in range(400)} | {5: "archery"}
            network = VideoMAEForVideoClassification(VideoMAEConfig(id2label=names))
            old, known = (r"attention\.attention\.(query|value)\.bias", None), "fc_norm.weight"
        elif kind == "vjepa":
            network = VJEPA2Model(VJEPA2Config())
            old, known = ("-", "-"), "predictor.layer.11.mlp.fc2.weight"
        else:
            vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, patch_size=14)
            text = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
            config = CLIPConfig(
                vision_config=dict(**vision, num_attention_heads=16, projection_dim=768),
                text_config=text,
                projection_dim=768,
            )
            network = CLIPModel(config)
            old, known = ("-", "-"), "vision_model.encoder.layers.23.mlp.fc1.weight"
    network.config.save_pretrained(folder)
    state = {}
    for key, value in random_like(network).items():
        if kind == "action:archery":  # published before attention biases had their own names
            key = re.sub(old[0], lambda m: f"attention.attention.{m[1][0]}_bias", key)
        state[re.sub(*old, key) if old[1] else key] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if kind in ("aesthetic", "clip"):
        CLIPTokenizer.from_pretrained(TINY / "tokenizer").save_pretrained(folder)
        torch.save(rewards.AestheticHead(768).state_dict(), folder / "aesthetic-model.pth")
    return known, set(state)


@pytest.mark.parametrize("kind", ["aesthetic", "clip", "hps", "remove:book", "action:archery", "vjepa"])
def test_full_size_checkpoints_load_and_have_a_gradient(kind, tmp_path, networks):
    """ViT-L/14, ViT-H-14, yolos-base, videomae-base and vjepa2-vitl, random."""
    known, keys = published_folder(kind, tmp_path / kind.split(":")[0])
    assert known in keys
    reward = make_one(kind, weights=str(tmp_path))
    weights = networks[0][0].state_dict()
    assert all(value.std() < 0.03 for key, value in weights.items() if "mlp" in key or "dense" in key)
    n = {"vjepa": 2, "action:archery": 16}.get(kind, 1)
    frames = torch.rand(1, n, 3, 96, 128, requires_grad=True)
    value = reward(frames, ["a book"])
    value.sum().backward()
    assert value.dtype == torch.float32 and torch.isfinite(value).all()
    assert (frames.grad.flatten(2).norm(dim=2) > 0).all()


def test_unknown_names_are_one_line_with_the_nearest():
    for spec, near in (
        ("remove:stars", "'stars'.*star"),
        ("action:risin", "rising"),
        ("hps:3", "hps:2.1"),
        ("remove", "needs an object"),
    ):
        with pytest.raises(rewards.BadReward, match=near) as problem:
            make_one(spec)
        assert "\n" not in str(problem.value)


def test_action_takes_its_label_from_each_prompt_or_fails(capsys):
    reward, fixed = make_one("action"), make_one("action:falling")
    reward.check(MOVING)
    assert "'drifting left' in 'a moon drifting left'" in capsys.readouterr().out
    video, _, _ = drawn(3)
    assert reward(video, MOVING)[1].item() == pytest.approx(fixed(video, MOVING)[1].item(), abs=1e-5)
    assert torch.allclose(reward.report["probability"], reward(video, MOVING).exp())
    with pytest.raises(rewards.BadReward, match="names no action"):
        reward.check(["a moon"])
    ((repeated, _),) = vader.views(reward, video[:, [0, 7]], 1)  # fewer frames than it wants
    assert repeated.shape[1] == reward.frames == 8 and reward(repeated, MOVING).shape == (3,)


def test_action_labels_are_whole_words():
    with pytest.raises(rewards.BadReward, match="names no action"):
        make_one("action").check(["an enterprising kite"])


@pytest.mark.parametrize("spec", ["colorful:x", "aesthetic:x", "vjepa:x"])
def test_an_argument_that_would_be_ignored_is_refused(spec):
    with pytest.raises(rewards.BadReward, match="takes nothing after the colon"):
        make_one(spec)


def test_clip_takes_the_model_it_is_told(monkeypatch):
    asked = []
    monkeypatch.setattr(rewards, "load_clip", lambda *args: asked.append(args) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_one("clip:some/other-clip")
    assert asked[0][0] == "some/other-clip"


@pytest.mark.parametrize("name, least", [("smooth", 3), ("dynamic", 2), ("vjepa", 2)])
def test_too_short_a_clip_is_one_line(name, least):
    reward, (video, _, _) = make_one(name), drawn(1)
    assert torch.isfinite(reward(video[:, :least], ["a"])).all()
    with pytest.raises(rewards.BadReward, match=f"{name} needs at least {least} frames"):
        reward(video[:, : least - 1], ["a"])


def test_vjepa_context_sees_no_masked_pixel(networks):
    make_one("vjepa", torch.float64)
    model = networks[0][0]
    pixels = torch.randn(2, 8, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    generator = torch.Generator().manual_seed(1)
    for blocks, area in ((8, 0.15), (2, 0.7)):
        context, target = rewards.jepa_masks(4, 8, 8, blocks, area, generator)
        assert sorted(context.tolist() + target.tolist()) == list(range(256)) and len(context) and len(target)
        seen = rewards.jepa_context(model, pixels, context)
        for token in target.tolist():
            t, rest = divmod(token, 64)
            y, x = rest // 8 * 8, rest % 8 * 8
            pixels[:, 2 * t : 2 * t + 2, :, y : y + 8, x : x + 8] += 5
        assert torch.equal(seen, rewards.jepa_context(model, pixels, context))
    # with nothing masked it is the library's encoder; the loss is the library's predictor on that context
    everything = torch.arange(256)
    assert torch.allclose(
        rewards.jepa_context(model, pixels, everything), model.encoder(pixels).last_hidden_state
    )


def test_jepa_masks_cover_what_they_should():
    generator = torch.Generator().manual_seed(0)
    cover = {}
    for blocks, area in ((8, 0.15), (2, 0.7)):
        masks = [rewards.jepa_masks(2, 16, 16, blocks, area, generator)[1] for _ in range(50)]
        assert all((m < 256).sum() * 2 == len(m) for m in masks)  # the same tokens through all of time
        cover[blocks] = np.mean([len(m) / 512 for m in masks])
    assert 0.5 < cover[8] < 0.9 and 0.7 < cover[2] < 0.98


def test_smooth_and_dynamic_measure_motion():
    smooth, dynamic = make_one("smooth"), make_one("dynamic")
    generator = torch.Generator().manual_seed(0)
    slide = torch.linspace(0, 1, 9)[None, :, None, None, None].expand(1, 9, 3, 32, 32)
    noise = torch.rand(1, 9, 3, 16, 16, generator=generator)
    still = noise[:, :1].expand(1, 9, -1, -1, -1)
    assert smooth(still, None) == 0 == dynamic(still, None)
    assert smooth(slide, None).item() == pytest.approx(0, abs=1e-3)
    assert smooth(noise, None).item() == pytest.approx(-3, abs=0.3)
    assert dynamic(slide, None).item() == pytest.approx(12.5, rel=1e-3)


def test_compressible_follows_the_true_jpeg_size():
    reward = make_one("compressible")

    def true_kb(picture):
        picture = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
        return len(iio.imwrite("<bytes>", picture, extension=".jpg", quality=50)) / 1000

    video, _, _ = drawn(40)
    sizes = [true_kb(clip[0]) for clip in video]
    assert np.corrcoef(-reward(video[:, :1], None), sizes)[0, 1] > 0.9
    for photo in ("cat", "rocket"):
        picture = torch.from_numpy(iio.imread(HERE / "tiny" / f"photo-{photo}.jpg")).permute(2, 0, 1) / 255
        assert -reward(picture[None, None], None).item() == pytest.approx(true_kb(picture), rel=0.25)


def test_a_sum_logs_each_term_and_figure(settings):
    spec = "colorful + 0.5*remove:star + 0.2*dynamic"
    rows = vader.train(dataclasses.replace(settings, reward=spec, reward_weights=TOY, steps=1))
    terms = {"colorful": 1, "remove:star": 0.5, "dynamic": 0.2}
    assert {"reward", "remove:star count", *terms} < rows[1].keys()
    assert rows[1]["reward"] == pytest.approx(sum(w * rows[1][name] for name, w in terms.items()), rel=1e-5)
    assert len(rows[0]["eval"]["remove:star count"]) == 2


def test_colorful_is_the_published_formula():
    frames = torch.rand(2, 3, 3, 8, 6)
    value = rewards.make_colorful("cpu", torch.float32)(frames, None)
    for b in range(2):
        scores = []
        for picture in frames[b].numpy() * 255.0:
            rg, yb = picture[0] - picture[1], 0.5 * (picture[0] + picture[1]) - picture[2]
            spread, mean = np.hypot(rg.std(), yb.std()), np.hypot(rg.mean(), yb.mean())
            scores.append((spread + 0.3 * mean) / 100)
        assert value[b].item() == pytest.approx(np.mean(scores), rel=1e-4)
    grey = torch.full((1, 1, 3, 4, 4), 0.5, requires_grad=True)
    rewards.make_colorful("cpu", torch.float32)(grey, None).sum().backward()
    assert torch.isfinite(grey.grad).all()


def test_tiny_aesthetic_ranks_unseen_pictures():
    video, target, _ = drawn(160)
    score = rewards.make_aesthetic("cpu", torch.float32, None, str(HERE / "tiny" / "rewards"))(
        video[:, :1], None
    )
    ranks = [np.argsort(np.argsort(values.detach().numpy())) for values in (score, target)]
    assert np.corrcoef(*ranks)[0, 1] >= 0.9


# ---- bench -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wan", "svd"])
def test_measuring_makes_updates_from_configs(kind, checkpoints, monkeypatch):
    """On the CPU, where nothing is measured but seconds; weights have content and the LoRA learns."""
    runs, real = [], vader.update
    monkeypatch.setattr(vader, "update", lambda run, *rest: runs.append(run) or real(run, *rest))
    size = dict(height=32, width=32, num_frames=5, num_inference_steps=2)
    cfg = Config(model=str(checkpoints(kind)), reward="aesthetic", reward_weights=TOY, **size)
    monkeypatch.setattr(memory, "config", lambda *_: cfg)
    row = memory.measure(kind, "aesthetic", False, device="cpu", updates=2)
    assert float(row["seconds per update"]) >= 0 and len(runs) == 2
    learned = [p for name, p in vader.lora_parameters(runs[0].model).items() if "lora_B" in name]
    assert all(p.isfinite().all() for p in learned) and any(p.abs().max() > 0 for p in learned)


@pytest.fixture
def noisy(settings):
    """A small run with DDPO's sampler and groups of videos of one prompt."""
    run, *_ = load(dataclasses.replace(settings, eta=1.0, batch_size=3, grad_accum=2), randomise=False)
    return run


def test_ddpo_log_prob_is_that_of_the_noise_drawn(noisy):
    one = ddpo.collect(noisy, PROMPTS[0], 0)
    generator = vader.generator_for(noisy.cfg.seed, "ddpo", 0)
    shape = one["latents"][0].shape
    torch.randn(shape, generator=generator)  # where the video starts
    for i in range(3):
        drawn = torch.randn(shape, generator=generator).double()
        scale = float(noisy.schedule.s[i])
        expected = torch.distributions.Normal(0, scale).log_prob(scale * drawn).sum((1, 2, 3, 4))
        with torch.no_grad():
            found = ddpo.log_prob(noisy.model, noisy.schedule, i, *one["latents"][i : i + 2], *one["given"])
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)


def test_ddpo_starts_at_ratio_one_with_the_gradient_of_reinforce(noisy):
    one = ddpo.collect(noisy, PROMPTS[0], 0)
    good, found = ddpo.advantages(one["rewards"]), []
    assert good.mean().abs() < 1e-5 and good.std() > 0.9
    for reinforce in (False, True):
        clear(noisy.model)
        for i in range(3):
            pair = one["latents"][i : i + 2]
            with torch.no_grad():
                old = ddpo.log_prob(noisy.model, noisy.schedule, i, *pair, *one["given"])
            new = ddpo.log_prob(noisy.model, noisy.schedule, i, *pair, *one["given"])
            assert torch.equal((new - old).exp(), torch.ones(3))
            loss = -(new * good).mean() if reinforce else ddpo.ppo_loss(new, old, good)
            loss.backward()
        found.append(gradients(noisy.model))
    assert found[1].norm() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


def test_ppo_stops_where_the_ratio_has_gone_far_enough():
    new = torch.tensor([1.0, 1.0, -1.0, -1.0], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    ddpo.ppo_loss(new, torch.zeros(4), advantage).backward()
    assert (new.grad != 0).tolist() == [False, True, True, False]


def test_dpo_starts_at_log_two_and_falls_on_a_fixed_pair(settings):
    run, cfg, model, *_ = load(settings, randomise=False)
    better, worse, cond, rewards = dpo.collect(run, PROMPTS, 0)
    one, other = rewards.chunk(2)
    prompts = [*PROMPTS, *PROMPTS]
    video = torch.cat([model.decode(torch.cat([better, worse]), [n]) for n in range(5)], dim=1)
    ordered = vader.compute_rewards(run.terms, video, prompts, 1)["reward"]
    torch.testing.assert_close(ordered, torch.cat([torch.maximum(one, other), torch.minimum(one, other)]))
    config = vader.read_config(cfg.model, "scheduler/scheduler_config.json")
    scheduler = DDIMScheduler.from_config(config)
    noise = torch.randn(better.shape, generator=torch.Generator().manual_seed(2))
    optimizer, losses = vader.make_optimizer(cfg, list(vader.lora_parameters(model).values())), []
    for _ in range(5):
        loss = dpo.dpo_loss(model, scheduler, better, worse, noise, 500, cond)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0] - 0.01


def light(frames, prompts):
    return frames.mean((1, 2, 3, 4))


@pytest.mark.parametrize("kind", ["ddpo", "dpo"])
def test_the_baselines_raise_an_easy_reward(kind, settings):
    # a random denoiser will not do: DPO makes it better at what it is bad at everywhere
    changes = dict(model="tiny", num_frames=2, height=32, width=32, guidance_scale=1.0, lr=1e-3)
    changes |= dict(eta=1.0, batch_size=16) if kind == "ddpo" else dict(batch_size=8)
    run, cfg, model, *_ = load(dataclasses.replace(settings, **changes), randomise=False)
    run.terms = {"light": (1.0, light)}
    optimizer = vader.make_optimizer(cfg, list(vader.lora_parameters(model).values()))
    update = {"ddpo": ddpo.update, "dpo": functools.partial(dpo.update, draws=2, beta=500.0)}[kind]
    prompts = PROMPTS * 16
    before = light(vader.make_videos(run, prompts), None)
    rows = [update(run, PROMPTS, step, optimizer) for step in range(6)]
    gain = light(vader.make_videos(run, prompts), None) - before
    assert rows[0]["queries"] == 16
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5


@pytest.fixture
def bench(settings, tmp_path, monkeypatch):
    """Settings of a run of the small model in seconds; the scripts' folders are elsewhere."""
    monkeypatch.setattr(efficiency, "RUNS", tmp_path / "efficiency")
    monkeypatch.setattr(efficiency, "VIDEOS", 3)
    monkeypatch.setattr(generalise, "RUNS", tmp_path / "generalise")
    size = dict(num_frames=3, height=16, width=16, num_inference_steps=4, guidance_scale=2.0)
    return dict(model=settings.model, reward_weights=str(HERE / "tiny" / "rewards"), **size, lora_rank=2)


def test_efficiency_goes_on_where_it_stopped_and_draws_its_figure(bench, tmp_path):
    changes = bench | dict(batch_size=2, grad_accum=1)
    for key, queries in (("whole", (8,)), ("parts", (4, 8))):
        for n in queries:
            method = efficiency.Method("DPO", efficiency.METHODS["dpo"].update, changes, n)
            rows = efficiency.train(key, method, "colorful", 0, marks=(0.5, 1))
        assert [row["queries"] for row in rows] == [0, 4, 8]
    whole, parts = (
        json.loads((tmp_path / "efficiency" / k / "rows.json").read_text()) for k in ("whole", "parts")
    )
    assert [row["values"] for row in whole] == [row["values"] for row in parts]
    assert whole[0]["values"] != whole[-1]["values"]
    found = efficiency.table_rows(("dpo", "hps", 0), rows)
    table, picture = tmp_path / "table.csv", tmp_path / "figure.png"
    efficiency.merge(table, found, ("method", "reward", "seed"))
    merged = efficiency.merge(
        table, efficiency.table_rows(("dpo", "hps", 1), rows), ("method", "reward", "seed")
    )
    assert len(merged) == 6
    efficiency.figure(merged, picture)
    assert iio.imread(picture).std() > 1


def test_stills_show_a_row_per_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(efficiency, "RUNS", tmp_path)
    shades = torch.tensor([0.2, 0.8])
    for name, shade in zip(("dark", "light"), shades, strict=True):
        for n in range(8):
            vader.write_video(tmp_path / name / f"{n:03d}.mp4", shade.expand(3, 3, 16, 16))
    efficiency.stills(("dark", "light"), tmp_path / "stills.png")
    picture = iio.imread(tmp_path / "stills.png") / 255
    assert picture.shape == (256, 8 * 128, 3)
    np.testing.assert_allclose([picture[:128].mean(), picture[128:].mean()], shades, atol=0.03)


@pytest.mark.parametrize("way", list(estimators.WAYS))
def test_every_estimator_runs(way, bench, monkeypatch):
    monkeypatch.setattr(estimators, "COMMON", bench | dict(batch_size=2, lr=1e-2))
    row = estimators.measure(way, "colorful", 0, seconds=0.01, samples=3)
    assert row["updates"] == 1 and float(row["motion"]) > 0 and float(row["diversity"]) > 0
    (file,) = efficiency.RUNS.rglob("rows.json")
    first, last = json.loads(file.read_text())
    assert first["values"] != last["values"]


def test_redrawing_without_noise_is_the_last_step(settings, monkeypatch):
    found = []
    for way in (estimators.redraw_update, efficiency.vader_update):
        run, cfg, model, *_ = load(settings)
        if way is estimators.redraw_update:  # the drawn x is the one that the rollout came by
            monkeypatch.setattr(estimators, "DRAWS", 1)
            monkeypatch.setattr(estimators, "renoise", lambda schedule, latents, generator: latents[-2])
        monkeypatch.setattr(vader, "pick_frames", lambda *_: [1])
        monkeypatch.setattr(vader, "generator_for", lambda *_: torch.Generator().manual_seed(3))
        way(run, PROMPTS, 0, torch.optim.SGD(vader.lora_parameters(model).values(), lr=0.0))
        found.append(gradients(model))
        monkeypatch.undo()
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)


@pytest.fixture
def small_study(bench, monkeypatch):
    settings = dict(batch_size=2, lr=1e-2, grad_accum=1, steps=1)
    monkeypatch.setattr(generalise, "COMMON", bench)
    monkeypatch.setattr(generalise, "SETTINGS", {"aesthetic": settings})
    monkeypatch.setattr(generalise, "BASE", {})


def test_generalise_separates_prompts_and_scales_the_lora(small_study):
    sets = generalise.prompt_sets(20)
    trained, *others = (set(prompts) for prompts in sets.values())
    assert not any(trained & other for other in others)
    words = [{word for prompt in prompts for word in prompt.split()} for prompts in sets.values()]
    assert words[1] <= words[0] and all(("purple" in p) or ("kite" in p) for p in sets["unseen words"])
    rows = generalise.study("aesthetic", 0, videos=2)
    scales = generalise.strengths("aesthetic", videos=2, samples=3)
    assert [row["prompts"] for row in rows] == list(sets)
    assert scales[0]["aesthetic"] != scales[-1]["aesthetic"]
    (whole,) = (row for row in rows if row["prompts"] == "unseen combinations")
    assert (whole["base"], whole["tuned"]) == (scales[0]["aesthetic"], scales[-1]["aesthetic"])


def test_generalise_compares_with_a_lora_that_was_trained_on_the_words(small_study, monkeypatch):
    known, strange = generalise.all_prompts(held_out=False), generalise.all_prompts(held_out=True)
    assert (len(set(known)), len(set(strange))) == (5 * 5 * 16, 11 * 16)  # of 6 colours, 6 objects
    assert set(generalise.trained_prompts()) < set(known)
    assert all(("purple" in prompt) or ("kite" in prompt) for prompt in strange)
    monkeypatch.setattr(generalise, "trained_prompts", lambda: known[:2])
    monkeypatch.setattr(generalise, "all_prompts", lambda held_out: (strange if held_out else known)[:4])
    rows = generalise.how_many_prompts("aesthetic", 0, videos=2, videos_held_out=3)
    assert [row["trained on"] for row in rows[::3]] == ["2, few", "4, many", "2, half", "4, held-out"]
    assert len({row["base"] for row in rows}) == 3 and len({row["gain"] for row in rows}) > 6
    assert [row["prompts"] for row in rows] == [*generalise.PARTS] * 4
    for name, taught in (
        ("few", known[:2]),
        ("many", known[:4]),
        ("half", strange[:2]),
        ("held-out", strange[:4]),
    ):
        assert vader.read_prompts(str(generalise.RUNS / f"{name}.txt")) == taught


def test_reference_finds_the_same_gradient_in_one_graph(settings):
    rows = reference.compare(dataclasses.replace(settings, checkpointing=False), (1, 2), pairs=1)
    assert [row["K"] for row in rows] == [1, 2]
    assert all(float(row["gradient difference"]) < 1e-4 for row in rows)
    assert float(rows[1]["cut and checkpointed MB"]) < float(rows[1]["one graph MB"])
