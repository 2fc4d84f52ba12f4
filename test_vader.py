"""Tests of vader.py and rewards.py, in the order of the code, against a reference wherever there is one."""

import dataclasses
import functools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import diffusers
import imageio.v3 as iio
import numpy as np
import open_clip
import pytest
import torch
import transformers
import world
from peft import PeftModel
from safetensors.torch import load_file, save_file

import rewards
import vader
from conftest import (
    PROMPTS,
    batch,
    changed,
    checked,
    command,
    gradient_error,
    gradients,
    load,
    plain_gradient,
    python,
)
from extras import watch
from extras.lora import build_on_meta, check_lora
from rewards import BadInput
from vader import HERE, TOY, Config, Prompt

TINY = HERE / "tiny" / "t2v"
README = (HERE / "README.md").read_text(encoding="utf-8")


def clip_reward(frames, prompts):
    """Depends on the order of frames and treats each differently."""
    weight = torch.linspace(-1, 2, frames.shape[1])[None, :, None, None, None]
    return (frames.diff(dim=1) ** 2).mean((1, 2, 3, 4)) * 40 + (weight * frames).mean((1, 2, 3, 4))


clip_reward.frames = 5


def light(frames, prompts):
    return frames.mean((1, 2, 3, 4))


def acting(act):
    """A reward times what `act` returns: for the number of an update, 0 for the probe or no gradient."""
    calls = []

    def reward(frames, prompts):
        calls.append(frames.requires_grad)
        return light(frames, prompts) * act(sum(calls) - 1 if calls[-1] else 0)

    return reward


# ---- 1. Config ---------------------------------------------------------------------------------------------


def test_every_command_in_the_readme_parses():
    commands = {*re.findall(r"vader\.py ((?:--|\\\n).*?)(?:#|`|\n|$)", README)} - {"--help"}
    assert len(commands) >= 5
    for words in commands:
        vader.parse_args(shlex.split(words))


def test_help_says_what_every_flag_is_for(capsys):
    with pytest.raises(SystemExit) as done:
        vader.main(["--help"])
    said = "".join(capsys.readouterr().out.split())
    assert done.value.code == 0
    for setting in dataclasses.fields(Config):
        text = setting.metadata["help"].replace("%%", "%")
        assert f"--{setting.name}" in said and "".join(text.split()) in said, setting.name
    with_percent = dataclasses.make_dataclass("C", [("x", int, vader.arg(1, "100 % of it"))])
    assert "100 % of it" in transformers.HfArgumentParser(with_percent).format_help()


def test_flags_have_the_types_of_their_fields():
    assert vader.parse_args([]) == Config()
    words = "--offload --detach_uncond false --checkpointing no --lr 3e-4 --steps 7 --eta 0.5"
    given = dict(offload=True, detach_uncond=False, checkpointing=False, lr=3e-4, steps=7, eta=0.5)
    assert vader.parse_args([*words.split(), "--reward", "a + b"]) == Config(**given, reward="a + b")


def test_auto_takes_tiny_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = checked(Config())
    assert cfg.model == "tiny-few" and cfg.dtype == "fp32"
    assert cfg.out == "runs/aesthetic-tiny-few" and None not in (cfg.lr, cfg.steps, cfg.num_frames)


def bad_inputs(folder: Path):
    (folder / "empty.txt").write_text("\n# nothing\n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00\x80prompts")
    (folder / "one.txt").write_text("a cat\n")
    (folder / "folder").mkdir()
    for name, index in dict(other='{"_class_name": "FluxPipeline"}', broken='{"_class').items():
        (folder / name).mkdir()
        (folder / name / "model_index.json").write_text(index)
    return {
        "prompts missing": ([f"--prompts={folder}/none.txt"], "no prompt file"),
        "prompts empty": ([f"--prompts={folder}/empty.txt"], "holds no prompts"),
        "prompts not text": ([f"--prompts={folder}/binary.txt"], "not a text file"),
        "one prompt": ([f"--prompts={folder}/one.txt"], "one prompt"),
        "flag": (["--guidence_scale", "3"], "'--guidance_scale'"),
        "part of a flag": (["--guidance", "3"], "'--guidance_scale'"),
        "reward": (["--reward", "asthetic"], "'aesthetic'"),
        "reward in a sum": (["--reward", "colorful + 0.5*estetic"], "'aesthetic'"),
        "sum": (["--reward", "colorful + "], "can't read"),
        "model": (["--model", "modelscop"], "'modelscope'"),
        **{f: ([f"--{f}", "x"], "invalid choice: 'x'") for f in ("mode", "timestep_spacing", "grad_steps")},
        "yes or no": (["--checkpointing", "maybe"], "--checkpointing"),
        **{f"lr {value}": (["--lr", value], "--lr") for value in ("-1", "0", "nan", "inf", "1e30")},
        "seed": (["--seed", "1" * 20], "--seed"),
        "not a number": (["--steps", "many"], "--steps"),
        "no GPU": (["--device", "cuda"], "no usable one here"),
        "K > T": (["--backprop_steps", "11"], "only 10 denoising steps"),
        "frames": (["--decode_frames", "9"], "only 8 frames"),
        "size": (["--height", "60"], "multiples of 8"),
        "no pipeline": (["--model", f"{folder}/folder"], "no model_index.json"),
        "other pipeline": (["--model", f"{folder}/other"], "FluxPipeline"),
        "broken pipeline": (["--model", f"{folder}/broken"], "is damaged, get it again"),
        "lora missing": (["--lora", f"{folder}/folder"], "no .safetensors file"),
        "out in use": (["--out", str(folder)], "not empty"),
        "unreachable": (["--model", "someone/something"], "--model tiny"),
    }


def test_bad_input_is_one_line_before_a_model_loads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vader, "load_run", lambda *a: pytest.fail("a model was loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, (flags, expected) in bad_inputs(tmp_path).items():
        common = ["--model", "tiny", "--prompts", str(HERE / "prompts.txt"), "--out", str(tmp_path / "run")]
        assert vader.main([*common, *flags]) == 2, name
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1, (name, error)
        assert error.startswith("vader.py: error: "), (name, error)
    assert not (tmp_path / "run").exists()
    with pytest.raises(BadInput, match="--grad_steps first: give one of auto, last"):
        checked(Config(grad_steps="first"))


@pytest.fixture
def fork(tmp_path):
    """A folder with the trainer, its rewards, and what is needed to run tiny."""
    for name in ("vader.py", "rewards.py", "prompts.txt"):
        shutil.copy(HERE / name, tmp_path)
    shutil.copytree(HERE / "tiny", tmp_path / "tiny", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return tmp_path


SECONDS = "--steps 1 --eval_videos 1 --num_inference_steps 2 --num_frames 2 --height 32 --width 32".split()
PASTED = """
import sys
sys.argv = ["x", "--nonsense"]
exec(open("vader.py").read())
assert "__file__" not in globals() and resolve(Config(device="cpu")).model == "tiny"
try:
    main(["--model", "wan"])
except ModuleNotFoundError as error:
    print(error)
small = parse_args(["--reward", "colorful", "--out", "one", *sys.argv[2:]])
assert [row["step"] for row in train(small)] == [0, 1, 1]
def darkness(frames, prompts):
    return 1 - frames.mean((1, 2, 3, 4))
rows = train(Config(**vars(small) | {"out": "two"}), reward=darkness)
assert rows[1]["darkness"] > 0 and rows[1]["grad_norm"] > 0
"""


def test_a_fork_can_cut(fork):
    """Without models/, extras/, bench/, page.html, tests: by command line, and pasted into a notebook."""
    out, _ = python("vader.py", "--reward", "aesthetic", "--prompts", "prompts.txt", *SECONDS, cwd=fork)
    assert len(re.findall("held-out reward [0-9.]+\n", out)) == 2
    files = {path.name for path in (fork / "runs" / "aesthetic-tiny").iterdir()}
    kept = "runs/aesthetic-tiny/metrics.jsonl"
    assert files == {"lora", "metrics.jsonl", "samples"}
    _, problem = python("vader.py", *SECONDS, "--steps", "2", "--resume", code=1, cwd=fork)
    assert "No module named 'extras'" in problem and len((fork / kept).read_text().split("\n")) == 4


def test_a_notebook_can_paste(fork):
    out, _ = python("-c", PASTED.replace("sys.argv[2:]", repr(SECONDS)), cwd=fork)
    assert "No module named 'models'\n" in out
    assert (fork / "one" / "lora").is_dir() and (fork / "two" / "lora").is_dir()


FAMILY = """
import __main__, vader
from rewards import require
class Mine(vader.TextToVideoUNet):
    presets = {"mine": vader.TextToVideoUNet.tiny}
    def schedule(self, cfg):
        require(vader is not __main__, "vader is what runs")
"""


def test_a_fork_can_add(fork):
    """A family; its `vader` is the script that runs."""
    (fork / "models").mkdir()
    (fork / "models" / "mine.py").write_text(FAMILY)
    source = (fork / "vader.py").read_text()
    (fork / "vader.py").write_text(
        source.replace("FAMILIES = {", 'FAMILIES = {"models.mine.Mine": ("mine",),')
    )
    _, errors = python("vader.py", "--model", "mine", "--reward", "colorful", *SECONDS, cwd=fork, code=1)
    assert errors.splitlines()[-1] == "rewards.BadInput: vader is what runs"


# ---- 2. Prompts and randomness -----------------------------------------------------------------------------


def test_draws_depend_on_their_key_only():
    keys = ((1, 2), (1, 2), (2, 1), (12,))
    first, again, *others = [torch.randn(4, generator=vader.generator_for(0, *key)) for key in keys]
    assert torch.equal(first, again) and not any(torch.equal(first, other) for other in others)


def test_held_out_prompts_are_not_trained_on(prompts_file, tmp_path):
    cfg = Config(prompts=prompts_file, batch_size=5)
    train, held_out = vader.split_prompts(cfg)
    assert (len(train), len(held_out)) == (11, 1) and not set(train) & set(held_out)
    drawn = [prompt for n in range(11) for prompt in vader.batch_prompts(train, cfg, n)]
    assert all(drawn.count(prompt) == 5 for prompt in train)  # every prompt once in each round
    assert drawn[:11] != drawn[11:22]
    (tmp_path / "one.txt").write_text("a cat\n")
    given = replace(cfg, eval_prompts=str(tmp_path / "one.txt"))
    assert vader.split_prompts(given) == (vader.read_prompts(prompts_file), [Prompt("a cat")])


def test_shipped_prompts_hold_out_what_the_tiny_world_holds_out():
    unseen = {Prompt(world.caption(c)) for c in world.UNSEEN}
    prompts, unseen_file = (vader.read_prompts(str(HERE / n)) for n in ("prompts.txt", "tiny/unseen.txt"))
    assert len(prompts) == 50 and not unseen & set(prompts) and set(unseen_file) <= unseen


# ---- 3. Schedule -------------------------------------------------------------------------------------------
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def ddim(alphas, steps, eta, spacing, offset, one, kind):
    """Timesteps and (a, b, s) of DDIM (Song et al. 2021, eq. 12 and 16; v: Salimans & Ho 2022, app. D)."""
    times = {
        "leading": offset + (1000 // steps) * np.arange(steps)[::-1],
        "trailing": np.round(np.arange(1000, 0, -1000 / steps)) - 1,
        "linspace": np.linspace(0, 999, steps).round()[::-1],
    }[spacing].astype(int)
    rows = []
    for t in times.tolist():
        before = t - 1000 // steps
        A, B = alphas[t], alphas[before] if before >= 0 else 1.0 if one else alphas[0]
        s = eta * np.sqrt((1 - B) / (1 - A) * (1 - A / B))
        p, q = np.sqrt(A), np.sqrt(1 - A)
        # the predicted clean latents and noise, as coefficients of x and f
        clean, noise = ((p, -q), (q, p)) if kind == "v_prediction" else ((1 / p, -q / p), (0, 1))
        rest = np.sqrt(np.clip(1 - B - s**2, 0, None))
        rows.append([*(np.sqrt(B) * np.array(clean) + rest * np.array(noise)), s])
    return times.tolist(), np.array(rows)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_tables_equal_the_formula_and_diffusers_at_every_step(spacing, kind, eta):
    epsilon = kind == "epsilon"
    how = dict(prediction_type=kind, set_alpha_to_one=not epsilon, steps_offset=int(epsilon))
    how |= dict(rescale_betas_zero_snr=not epsilon, clip_sample=False, timestep_spacing=spacing)
    for steps in (1, 3, 10, 25, 50):
        stock, given = diffusers.DDIMScheduler(**BETAS, **how), diffusers.DDIMScheduler(**BETAS, **how)
        stock.set_timesteps(steps)
        given.set_timesteps(steps)
        schedule, alphas = vader.tabulate(given, eta), stock.alphas_cumprod.double().numpy()
        times, rows = ddim(alphas, steps, eta, spacing, int(epsilon), not epsilon, kind)
        assert schedule.t.tolist() == times == stock.timesteps.tolist()
        assert schedule.start == 1 and schedule.c == [1] * steps
        found = np.transpose([schedule.a, schedule.b, schedule.s])
        np.testing.assert_allclose(found, rows, rtol=1e-9, atol=1e-9)
        for i, t in enumerate(stock.timesteps):
            generator = torch.Generator().manual_seed(i)
            x, f, noise = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)
            theirs = stock.step(f, t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
            ours = schedule.a[i] * x + schedule.b[i] * f + schedule.s[i] * noise
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


def test_tables_of_ancestral_sampling_from_pure_noise():
    """With eta = 1 and no signal in the first step, 1 - A' - s^2 is 0 there."""
    alphas = diffusers.DDIMScheduler.from_pretrained(TINY, subfolder="scheduler").alphas_cumprod.double()
    cfg = Config(num_inference_steps=5, eta=1.0, timestep_spacing="trailing")
    schedule = vader.TextToVideoUNet(str(TINY), "cpu", torch.float32).schedule(cfg)
    _, rows = ddim(alphas.numpy(), 5, 1.0, "trailing", 0, True, "v_prediction")
    np.testing.assert_allclose(np.transpose([schedule.a, schedule.b, schedule.s]), rows, atol=3e-6)


def test_trailing_spacing_has_the_leverage_that_leading_lacks():
    model = vader.TextToVideoUNet(str(TINY), "cpu", torch.float32)
    spaced = [Config(timestep_spacing=name, num_inference_steps=10) for name in ("leading", "trailing")]
    leading, trailing = map(model.schedule, spaced)
    assert leading.leverage(9) < 0.05 < 0.2 < trailing.leverage(9)
    moved = abs(trailing.b[7] * trailing.a[8] * trailing.a[9])
    assert trailing.leverage(7) == pytest.approx(moved) and moved > 0


REFUSED = {
    "clips": diffusers.DDIMScheduler(**BETAS, clip_sample=True),
    "thresholds": diffusers.DDIMScheduler(**BETAS, clip_sample=False, thresholding=True),
    "draws noise": diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "two steps back": diffusers.DPMSolverMultistepScheduler(**BETAS, solver_order=2),
    "corrects": diffusers.UniPCMultistepScheduler(**BETAS),
}


@pytest.mark.parametrize("scheduler", REFUSED.values(), ids=REFUSED)
def test_a_scheduler_that_is_not_affine_is_refused(scheduler):
    for steps in (5, 10):
        scheduler.set_timesteps(steps)
        with pytest.raises(BadInput, match="clip"):
            vader.tabulate(scheduler)


# ---- 4. The model and its LoRA -----------------------------------------------------------------------------


def stock_frames(run, batch, unet=None):
    """Frames (B, F, 3, H, W) in [0, 1] of diffusers' own pipeline, same noise."""
    cfg, texts = run.cfg, [prompt.text for prompt in batch.prompts]
    pipe = diffusers.TextToVideoSDPipeline.from_pretrained(run.model.source, dtype=torch.float32)
    spaced = dict(timestep_spacing=cfg.timestep_spacing)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **spaced)
    pipe.unet = unet(pipe.unet) if unet else pipe.unet
    pipe.set_progress_bar_config(disable=True)
    how = dict(num_frames=cfg.num_frames, height=cfg.height, width=cfg.width, latents=batch.noise)
    how |= dict(num_inference_steps=cfg.num_inference_steps, guidance_scale=cfg.guidance_scale)
    with torch.no_grad():
        latents = pipe(texts, **how, output_type="latent").frames
        return (pipe.decode_latents(latents) / 2 + 0.5).clamp(0, 1).transpose(1, 2)


def our_frames(run, batch):
    with torch.no_grad():
        return run.model.decode(vader.rollout(run, batch)[-1], list(range(run.cfg.num_frames)))


@pytest.mark.parametrize("model", ["small", "tiny"])
def test_frames_equal_the_stock_pipeline_without_the_lora_and_with_it(model, loaded, settings, tmp_path):
    size = dict(model=str(TINY), width=64, height=48)
    run = loaded if model == "small" else load(replace(settings, **size))
    given, cfg = batch(run), run.cfg
    with run.model.denoiser.disable_adapter():
        base = our_frames(run, given)
    latents = vader.rollout(run, given)
    vader.save_lora(run.model, tmp_path / "lora")
    stock_base = stock_frames(run, given)
    stock = stock_frames(run, given, lambda unet: PeftModel.from_pretrained(unet, tmp_path / "lora"))
    assert base.shape == (2, 5, 3, cfg.height, cfg.width) and base.std() > 0.01
    torch.testing.assert_close(base, stock_base, rtol=0, atol=2e-4)
    torch.testing.assert_close(our_frames(run, given), stock, rtol=0, atol=2e-4)
    assert (stock_base - stock).abs().max() > 0.01
    assert len(latents) == cfg.num_inference_steps + 1 and torch.equal(latents[0], given.noise)


def test_decode_takes_any_frames_and_its_clamp_lets_gradient_through(loaded):
    latents = torch.randn(2, *loaded.model.latent_shape(loaded.cfg))
    whole = loaded.model.decode(latents, list(range(5)))
    assert whole.dtype == torch.float32 and whole.min() >= 0 and whole.max() <= 1
    torch.testing.assert_close(loaded.model.decode(latents, [3, 1]), whole[:, [3, 1]], rtol=0, atol=1e-5)
    x = torch.tensor([-0.5, 0.5, 1.5], requires_grad=True)
    y = vader.straight_through_clamp(x)
    y.sum().backward()
    assert y.tolist() == [0.0, 0.5, 1.0] and x.grad.tolist() == [1.0, 1.0, 1.0]


def test_checkpointing_changes_no_gradient_and_no_base_weight(settings):
    found = []
    for on in (True, False):
        run = load(replace(settings, checkpointing=on))
        wrapped = [isinstance(m.forward, functools.partial) for m in run.model.denoiser.modules()]
        assert any(wrapped) == on
        before = {name: p.clone() for name, p in run.model.denoiser.named_parameters()}
        vader.micro_batch(run, PROMPTS, 0, 0)
        assert all(torch.equal(before[name], p) for name, p in run.model.denoiser.named_parameters())
        found.append(gradients(run))
    assert found[0].norm() > 0
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-8)


def test_lora_is_float32_on_a_bf16_base(settings):
    run = load(replace(settings, dtype="bf16"))
    assert {p.dtype for p in vader.lora_parameters(run.model).values()} == {torch.float32}
    assert {p.dtype for p in run.model.denoiser.parameters() if not p.requires_grad} == {torch.bfloat16}
    vader.micro_batch(run, PROMPTS, 0, 0)
    found = gradients(run)
    assert torch.isfinite(found).all() and found.norm() > 0


def test_a_lora_of_another_model_or_a_damaged_one_is_refused(loaded, tmp_path, capsys):
    folder, model = tmp_path / "lora", loaded.model
    vader.save_lora(model, folder)
    assert vader.main(["--mode", "sample", "--model", "tiny", "--lora", str(folder)]) == 2
    assert "made for another model" in capsys.readouterr().err
    weights = load_file(file := folder / "adapter_model.safetensors")
    for damaged in (dict(list(weights.items())[1:]), {k: w / 0 for k, w in weights.items()}, {}):
        save_file(damaged, file)
        with pytest.raises(BadInput, match="damaged"):
            check_lora(Config(lora=str(folder)), build_on_meta(type(model), model.source))


# ---- 5. Rollout, score, walk back --------------------------------------------------------------------------


def test_frames_are_picked_as_rewards_want():
    image, clip = {"i": (1.0, len)}, {"i": (1.0, len), "c": (1.0, clip_reward)}

    def picked(terms, seed=0, frames_per_latent=1, **settings):
        model = vader.TextToVideoUNet("", "cpu", torch.float32)
        model.frames_per_latent = frames_per_latent
        run = vader.Run(Config(num_frames=9, **settings), model, None, terms, {}, None)
        return vader.pick_latent_frames(run, vader.generator_for(seed))

    picks = [picked(image, seed) for seed in range(40)]
    assert all(len(p) == 1 for p in picks) and len({p[0] for p in picks}) == 9
    assert picked(clip) == [0, 2, 4, 6, 8]
    three = picked(image, 1, decode_frames=3)
    assert len(set(three)) == 3 and three == sorted(three)
    # latent frame 0 holds one frame, those after it four each
    assert picked(clip, 0, 4) == [0, 1, 2] and picked(clip, 0, 4, decode_frames=2) == [0, 2]
    assert {tuple(picked(image, seed, 4)) for seed in range(40)} == {(0,), (1,), (2,)}
    assert {len(picked(image, seed, 4, decode_frames=5)) for seed in range(40)} == {2}


def test_which_steps_train():
    sigma = torch.tensor([1.0, 0.9, 0.6, 0.58, 0.5, 0.3, 0.28, 0.2, 0.08, 0.0])
    schedule = vader.Schedule(sigma[:-1], [1.0] * 9, sigma.diff().tolist(), [1.0] * 9, [0.0] * 9)

    def trained(kind):
        cfg = Config(backprop_steps=3, num_inference_steps=9, grad_steps=kind)
        return vader.trained_steps(vader.Run(cfg, None, schedule, {}, {}, None))

    assert trained("last") == [6, 7, 8] and trained("spread") == [0, 4, 8]
    assert trained("strongest") == [1, 4, 7]  # the steps of 0.3, 0.2 and 0.12


CUTS = [(K, share, 1 if share else 5) for K in (1, 3, 4) for share in (1.0, 0.0)] + [(3, 0.5, 2)]
CUTS = [dict(backprop_steps=K, coupling=share, decode_chunk=chunk) for K, share, chunk in CUTS]
CUTS += [dict(backprop_steps=K, detach_uncond=True) for K in (1, 3)]
CUTS += [dict(backprop_steps=2, grad_steps="spread")]


@pytest.mark.parametrize("how", CUTS, ids=lambda how: "-".join(map(str, how.values())))
def test_walk_back_equals_plain_autograd(loaded, how):
    """With a reward of frames and one of a clip."""
    run = changed(loaded, loaded.terms | {"clip": (0.7, clip_reward)}, **how)
    given = batch(run, picks=list(range(5)))
    assert gradient_error(run, given, plain_gradient(run, given)) < 1e-5


def test_terms_add_up_and_bad_rewards_are_named(loaded):
    given = batch(loaded, picks=list(range(5)))
    both = {"colorful": (2.0, loaded.terms["colorful"][1]), "clip": (0.5, clip_reward)}
    values, _ = vader.score(changed(loaded, both), given, given.noise)
    torch.testing.assert_close(values["reward"], 2 * values["colorful"] + 0.5 * values["clip"])
    assert values["colorful"].min() > 0 and values["clip"].abs().min() > 0
    one, cut = lambda frames, _: frames.mean()[None], lambda frames, _: light(frames.detach(), _)
    wrongs = {"this is a Tensor of shape .1,.": one, "this has none": cut, "this is a NoneType": print}
    for what, wrong in wrongs.items():
        with pytest.raises(BadInput, match=f"'flat' must return .2,., one per video, .*: {what}"):
            vader.score(changed(loaded, {"flat": (1.0, wrong)}), given, given.noise)


# ---- 6. Files and resume -----------------------------------------------------------------------------------


def lora_of(folder):
    return load_file(Path(folder) / "lora" / "adapter_model.safetensors")


def state_of(folder):
    """The checkpoint; its LoRA, named as in lora/."""
    state = torch.load(Path(folder) / "checkpoint" / "state.pt", weights_only=True)
    return state, {name.replace(".default", ""): value for name, value in state["lora"].items()}


def same(first, second, tolerance=0.0):
    assert first.keys() == second.keys()
    return all((first[k] - second[k]).abs().max() <= tolerance * (1 + second[k].abs().max()) for k in first)


def moved(folder):
    return any(value.abs().max() > 0 for name, value in lora_of(folder).items() if "lora_B" in name)


def without_times(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "memory_gb")} for row in rows]


def test_resumed_equals_uninterrupted_bitwise(settings, tmp_path):
    cfg = replace(settings, steps=2, eval_every=1, eval_videos=1, num_inference_steps=2, eta=0.3)
    whole = replace(cfg, out=str(tmp_path / "whole"))
    rows = vader.train(whole)
    vader.train(replace(cfg, steps=1, resume=True))  # where there is nothing yet, that is a new run
    again = vader.train(replace(cfg, resume=True))
    assert same(lora_of(cfg.out), lora_of(whole.out))
    assert moved(cfg.out)
    assert without_times(rows) == without_times(again)
    assert [row["step"] for row in rows] == [0, 1, 1, 2, 2]
    with pytest.raises(BadInput, match="started with --lr 0.01"):
        vader.train(replace(cfg, resume=True, lr=0.5))
    with pytest.raises(BadInput, match="add --resume"):
        vader.train(cfg)


class Killed(BaseException):
    pass


def progress(out, reached):
    """The checkpoint's step: not less than before, and all but the current update is in it and in lora/."""
    step = state_of(out)[0]["step"] if (out / "checkpoint" / "state.pt").exists() else 0
    logged = max([row["step"] for row in vader.read_metrics(out)], default=0)
    assert reached <= step <= logged <= step + 1 and (step == 0 or moved(out))
    return step


def test_a_run_can_die_at_any_write(settings, tmp_path, monkeypatch):
    """In the middle of it: a part of the row is written, or of the file that is not yet in its place."""
    cfg = replace(settings, eval_every=1, eval_videos=1, num_inference_steps=1, resume=True)
    whole = replace(cfg, out=str(tmp_path / "whole"))
    out, rows, move, append, reached = Path(cfg.out), vader.train(whole), os.replace, vader.append_metrics, 0
    fatal = "config.json"

    def move_or_die(source, target):
        if Path(target).name == fatal:
            Path(source).write_bytes(Path(source).read_bytes()[:20])
            raise Killed
        move(source, target)

    def append_or_die(cfg, row):
        if fatal == "row" or fatal == "evaluation" and row["step"] and "eval" in row:
            with open(out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row)[:20])
            raise Killed
        append(cfg, row)

    monkeypatch.setattr(os, "replace", move_or_die)
    monkeypatch.setattr(vader, "append_metrics", append_or_die)
    first = ["metrics.jsonl", "row", "data.js", "adapter_config.json", "adapter_model.safetensors"]
    for following in [*first, "state.pt", "row", "evaluation", None]:
        with pytest.raises(Killed):
            vader.train(cfg)
        reached, fatal = progress(out, reached), following
    assert reached == 1 and without_times(vader.train(cfg)) == without_times(rows)
    assert same(lora_of(out), lora_of(whole.out)) and same(state_of(out)[1], lora_of(out))


@pytest.mark.slow
def test_kill_at_any_moment_loses_the_current_update_only(settings, tmp_path):
    few = dict(eval_every=1000, eval_videos=1, num_inference_steps=1, batch_size=1)
    cfg = replace(settings, steps=1000, resume=True, **few)
    out, wait, reached = Path(cfg.out), random.Random(0), 0
    for _ in range(2):
        words, began = [sys.executable, "vader.py", *command(cfg)], time.time()
        process = subprocess.Popen(words, cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while not (out / "config.json").exists() or (out / "config.json").stat().st_mtime < began:
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(wait.uniform(0, 3))
        process.kill()
        process.wait()
        reached = progress(out, reached)
    assert reached > 0
    whole = replace(cfg, steps=reached + 1, out=str(tmp_path / "whole"))
    for last in (whole, replace(whole, out=cfg.out)):
        python("vader.py", *command(last), OMP_NUM_THREADS="1")
    assert same(lora_of(cfg.out), lora_of(whole.out))
    rows = vader.read_metrics(out)
    assert [row["step"] for row in rows if "reward" in row] == list(range(1, reached + 2))


def test_ctrl_c_ends_the_run_and_says_how_to_go_on(settings, tmp_path, capsys, monkeypatch):
    cfg = replace(settings, steps=3, reward="interrupted", eval_videos=1)
    interrupted = acting(lambda call: (os.kill(os.getpid(), signal.SIGINT) if call == 2 else None) or 1)
    monkeypatch.setitem(rewards.REWARDS, "interrupted", lambda device, dtype, weights: interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert vader.main(command(cfg)) == 1
    signal.signal(signal.SIGINT, handler)
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("vader.py: stopped") and "--resume" in said.splitlines()[-1]
    assert said.count("vader.py: ") == 1 and "Traceback" not in said
    state, lora = state_of(cfg.out)
    assert state["step"] == 1 and same(lora, lora_of(cfg.out))
    assert [row["step"] for row in vader.read_metrics(Path(cfg.out))] == [0, 1]
    whole = replace(cfg, out=str(tmp_path / "whole"))
    assert vader.main([*command(cfg), "--resume"]) == vader.main(command(whole)) == 0
    assert same(lora_of(cfg.out), lora_of(whole.out)) and same(state_of(cfg.out)[1], lora_of(whole.out))


# ---- 7. Evaluation and page --------------------------------------------------------------------------------


def test_summary_is_paired():
    said = watch.summary([1.0, 2.0], [2.0, 4.0])
    assert said.startswith("1.500 -> 3.000 (+1.500, standard error 0.500, 2 videos")


def test_videos_do_not_depend_on_the_batch(loaded):
    moon, kite = PROMPTS[1], PROMPTS[0]
    together = vader.make_videos(loaded, [moon, kite, moon])
    alone = vader.make_videos(loaded, [moon], first=2)
    torch.testing.assert_close(together[2:], alone, rtol=0, atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 0.01  # same prompt, other noise


def data_of(folder):
    """What a run's page draws; every video that it names is there."""
    text = (folder / "data.js").read_text()
    data = json.loads(text.removeprefix("window.run = ").removesuffix(";\n"))
    assert (folder / "index.html").read_bytes() == (HERE / "page.html").read_bytes()
    for found in [row["eval"] for row in data["rows"] if "eval" in row]:
        for n in range(len(found["prompts"])):
            frames = iio.imread(folder / found["folder"] / f"{n:03d}.mp4", plugin="FFMPEG")
            assert len(frames) == 5 and frames.shape[1] * 3 == frames.shape[2] * 2
    return data


def test_what_a_run_writes(settings):
    rows = vader.train(replace(settings, steps=1))
    out, data = Path(settings.out), data_of(Path(settings.out))
    assert data["rows"] == rows == vader.read_metrics(out)
    assert len(list(out.rglob("*.mp4"))) == 4 and data["config"]["lr"] == 0.01
    config = json.loads((out / "config.json").read_text())
    assert config["lr"] == 0.01 and config["versions"]["torch"] == torch.__version__
    assert {"reward", "colorful", "grad_norm", "prompts", "skipped", "seconds", "memory_gb"} < rows[1].keys()
    assert rows[-1]["eval"]["prompts"] == rows[0]["eval"]["prompts"] and len(rows[0]["eval"]["reward"]) == 2
    assert rows[-1]["eval"]["reward"] != rows[0]["eval"]["reward"]
    assert same(state_of(out)[1], lora_of(out)) and not list(out.glob("**/.tmp-vader-*"))


# ---- 8. Training -------------------------------------------------------------------------------------------


def test_training_raises_the_reward(settings):
    size = dict(num_frames=2, num_inference_steps=2, eval_videos=6)
    rows = vader.train(replace(settings, steps=8, lr=3e-2, **size))
    gain = np.subtract(rows[-1]["eval"]["reward"], rows[0]["eval"]["reward"])
    assert gain.mean() > 3 * gain.std(ddof=1) / math.sqrt(len(gain)) > 0


def test_own_reward_of_the_readme(settings, monkeypatch):
    code, space = re.search(r"```python\n(def make_.*?)```", README, flags=re.S).group(1), {**vars(rewards)}
    assert len(code.splitlines()) <= 10
    exec(code, space)
    name = re.search(r"def make_(\w+)", code).group(1)
    monkeypatch.setitem(rewards.REWARDS, name, space[f"make_{name}"])
    rows = vader.train(replace(settings, steps=1, eval_videos=1, reward=f"{name} + 0.1*colorful"))
    assert rows[1]["reward"] == pytest.approx(rows[1][name] + 0.1 * rows[1]["colorful"], rel=1e-4)


def test_a_non_finite_gradient_skips_its_update(settings):
    cfg, reward = replace(settings, steps=3, eval_videos=1), acting(lambda n: math.nan if n == 2 else 1)
    rows = vader.train(cfg, reward=reward)
    rows = [row for row in rows if "reward" in row]
    assert [row["skipped"] for row in rows] == [0, 1, 1]
    assert rows[1]["grad_norm"] is None and rows[2]["grad_norm"] > 0
    assert all(torch.isfinite(value).all() for value in lora_of(settings.out).values())
    with pytest.raises(BadInput, match="was started with --reward reward"):  # an own reward has its own name
        vader.train(replace(cfg, resume=True), reward=light)


def test_ten_non_finite_gradients_in_a_row_stop_the_run(settings, capsys, monkeypatch):
    cfg = replace(settings, steps=40, num_inference_steps=1, eval_videos=1, reward="failing")
    reward = acting(lambda call: math.nan if call > 1 else 1)
    monkeypatch.setitem(rewards.REWARDS, "failing", lambda device, dtype, weights: reward)
    assert vader.main(command(cfg)) == 1
    said = capsys.readouterr().err
    assert re.match(
        r"vader.py: stopped: .* at update 11, prompts .'a .*, seed 0: mend the reward",
        said.splitlines()[-1],
    )
    assert said.count("vader.py: ") == 1 and "Traceback" not in said


# ---- 9. Command line ---------------------------------------------------------------------------------------


def test_sample_and_eval_modes(loaded, settings, tmp_path, capsys):
    vader.save_lora(loaded.model, tmp_path / "lora")
    texts = ["a moon", "a red kite rising over the sea", "a white star"]
    (tmp_path / "short.txt").write_text("\n".join(texts))
    given = dict(prompts=str(tmp_path / "short.txt"), lora=str(tmp_path / "lora"), num_inference_steps=2)
    common = replace(settings, **given)
    assert vader.main(command(replace(common, mode="sample", out=str(tmp_path / "s")))) == 0
    (row,) = vader.read_metrics(tmp_path / "s")
    assert row["eval"] == {"folder": "tuned", "prompts": texts} and data_of(tmp_path / "s")["rows"] == [row]
    words = command(replace(common, mode="eval", out=str(tmp_path / "e")))
    assert vader.main(words) == 0
    base, tuned = (row["eval"] for row in vader.read_metrics(tmp_path / "e"))
    assert len(base["colorful"]) == 3 and base["reward"] != tuned["reward"]
    assert "colorful: " in capsys.readouterr().out
    shown = data_of(tmp_path / "e")
    assert [row["eval"] for row in shown["rows"]] == [base, tuned]
    assert vader.main(words) == 2 and "is not empty: give another --out" in capsys.readouterr().err


# ---- rewards.py --------------------------------------------------------------------------------------------

LEARNED = ["aesthetic", "clip", "hps", "pickscore", "remove:star", "action", "vjepa"]
SPECS = [*LEARNED, "smooth", "dynamic", "colorful", "compressible"]
ADDED = [name for name in rewards.REWARDS if name not in [spec.split(":")[0] for spec in SPECS]]
PHOTOS = [iio.imread(HERE / "tiny" / f"photo-{name}.jpg") for name in ("cat", "rocket")]
PHOTOS = [torch.from_numpy(picture).permute(2, 0, 1) for picture in PHOTOS]
MOVING = ["a red star rising over the sea", "a green cube falling over a meadow", "a moon drifting left"]


def drawn(n, frames=8):
    generator, moments = torch.Generator().manual_seed(123), torch.arange(frames).expand(n, -1)
    return world.draw(world.pick(world.UNSEEN, n, generator), generator, full=True, moments=moments)


def make_one(spec, dtype=torch.float32, weights=TOY):
    ((_, reward),) = rewards.make_terms(spec, "cpu", dtype, weights).values()
    return reward


def seen_by(reward, video):
    """What a reward is given of a video (B, N, 3, H, W)."""
    seen, was = [], reward.frames
    spy = lambda frames, prompts: seen.append(frames) or frames.mean((1, 2, 3, 4))  # noqa: E731
    spy.frames = was
    rewards.weighted_rewards({"it": (1.0, spy)}, video, [""] * len(video), chunk=99)
    return seen[0]


@pytest.fixture
def networks(monkeypatch):
    """The networks of the rewards made in this test, as they are made."""
    made, freeze = [], rewards.frozen

    def frozen(network, device, dtype):
        made.append(freeze(network, device, dtype))
        return made[-1]

    monkeypatch.setattr(rewards, "frozen", frozen)
    return made


def test_sums_are_read():
    assert rewards.parse("aesthetic") == [(1.0, "aesthetic", None)]
    assert rewards.parse(" colorful+ .5 * remove:x y ") == [(1.0, "colorful", None), (0.5, "remove", "x y")]
    with pytest.raises(BadInput, match="stands twice"):
        checked(Config(model="tiny", reward="aesthetic + 2*aesthetic"))
    quoted = rewards.parse('ask:"Is it 1 + 1?" + HPS')
    assert quoted == [(1.0, "ask", "Is it 1 + 1?"), (1.0, "hps", None)]
    numbers = rewards.parse("-1*hps - 1e-1*dynamic + -.5*clip - colorful")
    assert [weight for weight, _, _ in numbers] == [-1, -0.1, -0.5, -1]
    assert rewards.parse("clip:a/b-c - 2*hps") == [(1.0, "clip", "a/b-c"), (-2.0, "hps", None)]
    for wrong in ("", "2*", "aesthetic colorful", "3", "+ hps", "hps ++ clip", "hps + -clip", 'ask:"'):
        with pytest.raises(BadInput, match=f"can't read .* in --reward {re.escape(repr(wrong))}: write as"):
            rewards.parse(wrong)


WRONG = {
    "remove:stars": "'stars'.*star",
    "action:risin": "rising",
    "hps:3": "takes nothing after the colon",
    "camera:left": "'left'.*pan left",
    "camera": "must be told of what",
    "remove": "must be told of what",
    "esthetics": "unknown reward 'esthetics'.*'aesthetic'",
    "colorful:x": "takes nothing after the colon",
    "aesthetic:x": "takes nothing after the colon",
    "vjepa:x": "takes nothing after the colon",
}


@pytest.mark.parametrize("spec", WRONG)
def test_a_wrong_name_is_one_line_with_the_nearest(spec):
    with pytest.raises(BadInput, match=WRONG[spec]) as problem:
        make_one(spec)
    assert "\n" not in str(problem.value)


def test_rewards_load_from_a_folder(tmp_path):
    with pytest.raises(BadInput, match="can't get 'trl-lib/ddpo-aesthetic-predictor': .*--model tiny"):
        make_one("aesthetic", weights=str(tmp_path))  # it has none of that name
    problems = {"aesthetic": "there is no aesthetic-model.pth", "clip": "there is no tokenizer_config.json"}
    for name, problem in problems.items():
        (tmp_path / name).mkdir()
        with pytest.raises(BadInput, match=f"{problem}.*{name}") as said:
            make_one(name, weights=str(tmp_path))
        assert "\n" not in str(said.value)


def test_aesthetic_head_has_the_published_keys():
    shapes = {name: tuple(value.shape) for name, value in rewards.aesthetic_head(768).state_dict().items()}
    published = {"0": (1024, 768), "2": (128, 1024), "4": (64, 128), "6": (16, 64), "7": (1, 16)}
    weights = {f"layers.{n}.weight": shape for n, shape in published.items()}
    assert shapes == weights | {f"layers.{n}.bias": shape[:1] for n, shape in published.items()}


def official(name, pictures, size=64):
    """The published preprocessing of a reward's network: its processor's class and settings."""
    square, short = {"height": size, "width": size}, {"shortest_edge": size}
    norm = dict(image_mean=rewards.IMAGENET_MEAN, image_std=rewards.IMAGENET_STD)
    kind, how = {
        "pickscore": ("CLIPImageProcessor", dict(size=short, crop_size=square)),
        "remove:star": ("YolosImageProcessor", dict(size=size, max_size=1333)),
        "action": ("VideoMAEImageProcessor", dict(size=short, crop_size=square, **norm)),
        "vjepa": ("VJEPA2VideoProcessor", dict(crop_size=size)),
    }.get(name, ("CLIPImageProcessor", dict(size=square, do_center_crop=False)))
    given, key = ([pictures], "_videos") if name == "vjepa" else (list(pictures), "")
    return getattr(transformers, kind)(**how)(given, return_tensors="pt")[f"pixel_values{key}"].flatten(0, -4)


@pytest.mark.parametrize("name", LEARNED)
def test_preprocessing_agrees_with_the_official_processor(name, monkeypatch):
    reward, given, ours = make_one(name), [], rewards.preprocess
    for picture in PHOTOS:
        pictures = torch.stack([picture.roll(3 * n, -1) for n in range(8)])
        monkeypatch.setattr(rewards, "preprocess", lambda *a, **k: given.append(ours(*a, **k)) or given[-1])
        value = reward(pictures[None].float() / 255, MOVING[:1]).item()
        theirs = official(name, pictures)
        difference = (given[-1] - theirs).abs()
        # the processors work in whole numbers, rounded and clipped after each of the two directions
        step = 1 / 255 / 0.224
        assert given[-1].shape == theirs.shape
        assert difference.mean() < 0.5 * step and difference.max() < 4 * step
        monkeypatch.setattr(rewards, "preprocess", lambda *a, theirs=theirs, **k: theirs)
        again = reward(pictures[None].float() / 255, MOVING[:1]).item()
        assert again == pytest.approx(value, rel=0.02, abs=1e-3)


@pytest.mark.parametrize("spec", SPECS + ADDED)
def test_gradients_are_right_and_stay_in_their_video(spec):
    try:
        reward = make_one(spec, torch.float64)
    except BadInput as problem:
        if spec in SPECS:
            raise
        pytest.skip(f"can't be made with what is in tiny/rewards: {problem}")
    frames = seen_by(reward, drawn(3)[0].double().clamp(0.02, 0.98))
    frames = frames.clone().requires_grad_()
    value = reward(frames, MOVING)
    assert value.shape == (3,)
    (slope,) = torch.autograd.grad(value[1], frames)
    assert slope[0].abs().max() == 0 == slope[2].abs().max()
    assert (slope[1].flatten(1).norm(dim=1) > 0).all()  # for every frame
    for seed in range(3):
        direction = torch.randn(frames[1].shape, generator=torch.Generator().manual_seed(seed)).double()
        # so small a step that hardly any |x| of an L1 loss changes its sign; ask's processor has 32 bits
        step, rel = (1e-3, 2e-2) if spec == "ask" else (1e-7, 1e-3)
        both = torch.stack([frames[1] + s * direction for s in (step, -step)]).detach()
        up, down = reward(both, MOVING[1:2] * 2).tolist()
        expected = (slope[1] * direction).sum().item()
        assert (up - down) / (2 * step) == pytest.approx(expected, rel=rel, abs=1e-7)


@pytest.mark.parametrize("spec", LEARNED)
def test_networks_are_frozen_and_checkpointing_and_half_precision_change_little(
    spec, networks, caplog, monkeypatch
):
    reward, half, video = make_one(spec), make_one(spec, torch.bfloat16), drawn(2)[0]
    assert not caplog.records  # open_clip warns of a random model when others load the weights
    frames = [video.clone().requires_grad_() for _ in range(3)]
    value = reward(frames[0], MOVING[:2])
    value.sum().backward()
    assert networks and not any(p.requires_grad for net in networks for p in net.parameters())
    assert not any(module.training for net in networks for module in net.modules())
    rounded = half(frames[1], MOVING[:2])
    rounded.sum().backward()
    assert rounded.dtype == frames[1].grad.dtype == torch.float32 and frames[1].grad.isfinite().all()
    assert rounded.tolist() == pytest.approx(value.tolist(), rel=0.03, abs=0.03)
    for network in networks[: len(networks) // 2]:  # as `frozen` does on a GPU
        monkeypatch.setattr(network, "to", lambda *a, network=network: network)
        rewards.frozen(network, "cuda", torch.float32)
    wrapped = sum(isinstance(m.forward, functools.partial) for net in networks for m in net.modules())
    assert wrapped >= 2
    reward(frames[2], MOVING[:2]).sum().backward()
    assert torch.allclose(frames[0].grad, frames[2].grad, atol=1e-7)


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
    numbers, state = numbers.bfloat16(), {}
    for key, value in network.state_dict().items():
        again = numbers.repeat(math.ceil(value.numel() / len(numbers)))
        state[key] = again[: value.numel()].reshape(value.shape).clone()
    return state


def published_network(kind):
    """In full size; one of its published keys, and a pattern and its replacement that make those keys."""
    same = ("-", "-")
    if kind == "hps":
        config = open_clip.get_model_config("ViT-H-14")
        return open_clip.CLIP(**config), "visual.transformer.resblocks.31.mlp.c_proj.weight", same
    if kind == "remove:book":
        names = {i: f"thing {i}" for i in range(91)} | {84: "book"}
        config = transformers.YolosConfig(image_size=[800, 1344], id2label=names)
        renamed = ("encoder.interpolation.mid", "encoder.mid")
        network = transformers.YolosForObjectDetection(config)
        return network, "class_labels_classifier.layers.2.weight", renamed
    if kind == "action:archery":
        names = {i: f"action {i}" for i in range(400)} | {5: "archery"}
        config = transformers.VideoMAEConfig(id2label=names)
        # published before attention biases had their own names
        renamed = (r"attention\.attention\.([qv])(?:uery|alue)\.bias", r"attention.attention.\1_bias")
        return transformers.VideoMAEForVideoClassification(config), "fc_norm.weight", renamed
    if kind == "vjepa":
        network = transformers.VJEPA2Model(transformers.VJEPA2Config())
        return network, "predictor.layer.11.mlp.fc2.weight", same
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, patch_size=14)
    text = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    vision |= dict(num_attention_heads=16, projection_dim=768)
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=768)
    return transformers.CLIPModel(config), "vision_model.encoder.layers.23.mlp.fc1.weight", same


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["aesthetic", "clip", "hps", "remove:book", "action:archery", "vjepa"])
def test_full_size_checkpoints_load_and_have_a_gradient(kind, tmp_path, networks):
    """ViT-L/14, ViT-H-14, yolos-base, videomae-base and vjepa2-vitl, random, by their published key names."""
    folder = tmp_path / kind.split(":")[0]
    folder.mkdir()
    with torch.device("meta"):
        network, known, renamed = published_network(kind)
    state = {re.sub(*renamed, key): value for key, value in random_like(network).items()}
    assert known in state
    if kind == "hps":
        torch.save({"state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    else:
        network.config.save_pretrained(folder)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if kind in ("aesthetic", "clip"):
        transformers.CLIPTokenizer.from_pretrained(TINY / "tokenizer").save_pretrained(folder)
        torch.save(rewards.aesthetic_head(768).state_dict(), folder / "aesthetic-model.pth")
    reward = make_one(kind, weights=str(tmp_path))
    weights = networks[0].state_dict()
    assert all(value.std() < 0.03 for key, value in weights.items() if "mlp" in key or "dense" in key)
    n = {"vjepa": 2, "action:archery": 16}.get(kind, 1)
    frames = torch.rand(1, n, 3, 96, 128, requires_grad=True)
    value = reward(frames, ["a book"])
    value.sum().backward()
    assert value.dtype == torch.float32 and torch.isfinite(value).all()
    assert (frames.grad.flatten(2).norm(dim=2) > 0).all()


def test_action_takes_its_label_from_each_prompt_or_fails(capsys):
    reward, fixed = make_one("action"), make_one("action:falling")
    reward.check(MOVING)
    assert "'drifting left' in 'a moon drifting left'" in capsys.readouterr().out
    video, _, _ = drawn(3)
    assert reward(video, MOVING)[1].item() == pytest.approx(fixed(video, MOVING)[1].item(), abs=1e-5)
    assert torch.allclose(reward.report["probability"], reward(video, MOVING).exp())
    for prompt in ("a moon", "an enterprising kite"):  # labels are whole words
        with pytest.raises(BadInput, match="names no action"):
            reward.check([prompt])
    with pytest.raises(BadInput, match="names no action"):
        rewards.make_terms("action", "cpu", torch.float32, TOY, ["a moon"])
    repeated = seen_by(reward, video[:, [0, 7]])  # fewer frames than it wants
    assert repeated.shape[1] == reward.frames == 8 and reward(repeated, MOVING).shape == (3,)


def test_clip_takes_the_model_it_is_told(monkeypatch):
    asked = []
    monkeypatch.setattr(rewards, "load_clip", lambda *args: asked.append(args) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_one("clip:some/other-clip")
    assert asked[0][0] == "some/other-clip"


@pytest.mark.parametrize("name, least", [("smooth", 3), ("dynamic", 2), ("vjepa", 2), ("camera:smooth", 3)])
def test_too_short_a_clip_is_one_line(name, least):
    reward, (video, _, _) = make_one(name), drawn(1)
    assert torch.isfinite(reward(video[:, :least], ["a"])).all()
    with pytest.raises(BadInput, match=f"{name.split(':')[0]} needs {least} frames"):
        reward(video[:, : least - 1], ["a"])


def test_vjepa_context_sees_no_masked_pixel(networks, monkeypatch):
    make_one("vjepa", torch.float64)
    model, given = networks[0], []
    pixels = torch.randn(2, 8, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    model.predictor.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    generator = torch.Generator().manual_seed(1)
    true = model.encoder(pixels).last_hidden_state
    for blocks, area in ((8, 0.15), (2, 0.7)):
        context, target = rewards.jepa_masks(4, 8, 8, blocks, area, generator)
        assert sorted(context.tolist() + target.tolist()) == list(range(256)) and len(context) and len(target)
        rewards.jepa_loss(model, pixels, true, context, target)
        for token in target.tolist():
            t, rest = divmod(token, 64)
            y, x = rest // 8 * 8, rest % 8 * 8
            pixels[:, 2 * t : 2 * t + 2, :, y : y + 8, x : x + 8] += 5
        rewards.jepa_loss(model, pixels, true, context, target)
        assert torch.equal(given[-1], given[-2])
    # with nothing masked it is the library's encoder
    everything, whole = torch.arange(256), model.encoder(pixels).last_hidden_state
    rewards.jepa_loss(model, pixels, whole, everything, everything[:1])
    assert torch.allclose(given[-1], whole)


def test_jepa_masks_cover_what_they_should():
    generator, masks_of = torch.Generator().manual_seed(0), rewards.jepa_masks
    cover = {}
    for blocks, area in ((8, 0.15), (2, 0.7)):
        masks = [masks_of(2, 16, 16, blocks, area, generator)[1] for _ in range(50)]
        assert all((m < 256).sum() * 2 == len(m) for m in masks)  # the same tokens through all of time
        cover[blocks] = np.mean([len(m) / 512 for m in masks])
    assert 0.5 < cover[8] < 0.9 and 0.7 < cover[2] < 0.98


def test_compressible_follows_the_true_jpeg_size():
    reward = make_one("compressible")

    def true_kb(picture):
        picture = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
        return len(iio.imwrite("<bytes>", picture, extension=".jpg", quality=50)) / 1000

    video, _, _ = drawn(40, frames=1)
    sizes = [true_kb(clip[0]) for clip in video]
    assert np.corrcoef(-reward(video, None), sizes)[0, 1] > 0.9
    for picture in [picture / 255 for picture in PHOTOS]:
        assert -reward(picture[None, None], None).item() == pytest.approx(true_kb(picture), rel=0.25)


def test_a_sum_logs_each_term_and_figure(settings):
    spec = "colorful + 0.5*remove:star + 0.2*dynamic"
    rows = vader.train(replace(settings, reward=spec, reward_weights=TOY, steps=1, num_inference_steps=1))
    terms = {"colorful": 1, "remove:star": 0.5, "dynamic": 0.2}
    assert {"reward", "remove:star count", *terms} < rows[1].keys()
    assert rows[1]["reward"] == pytest.approx(sum(w * rows[1][name] for name, w in terms.items()), rel=1e-5)
    assert len(rows[0]["eval"]["remove:star count"]) == 2


def test_colorful_is_the_published_formula():
    reward, frames = make_one("colorful"), torch.rand(2, 3, 3, 8, 6)
    for value, pictures in zip(reward(frames, None), frames.numpy() * 255.0, strict=True):
        scores = []
        for r, g, b in pictures:
            rg, yb = r - g, 0.5 * (r + g) - b
            spread, mean = np.hypot(rg.std(), yb.std()), np.hypot(rg.mean(), yb.mean())
            scores.append((spread + 0.3 * mean) / 100)
        assert value.item() == pytest.approx(np.mean(scores), rel=1e-4)
    grey = torch.full((1, 1, 3, 4, 4), 0.5, requires_grad=True)
    reward(grey, None).sum().backward()
    assert torch.isfinite(grey.grad).all()


def test_tiny_aesthetic_ranks_unseen_pictures():
    video, target, _ = drawn(160, frames=1)
    score = make_one("aesthetic")(video, None)
    ranks = [np.argsort(np.argsort(values.detach().numpy())) for values in (score, target)]
    assert np.corrcoef(*ranks)[0, 1] >= 0.9
