"""Details that could go wrong unseen: each test was written for a wrong change that no other test noticed."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import imageio.v3 as iio
import numpy as np
import pytest
import torch
import transformers

import rewards
import vader
from conftest import checked, command, load
from extras.prompts import check_prompts
from rewards import BadInput
from vader import TOY, Config


@pytest.fixture
def quick(settings):
    """A Config of one update of the small model in half a second, without evaluation."""
    return replace(settings, steps=1, eval_videos=0, num_frames=2, num_inference_steps=2)


def light(frames, prompts):
    return frames.mean((1, 2, 3, 4))


def go(cfg, name, own=None, **changes):
    """The rows of a run in the folder `name`, and that folder."""
    out = Path(cfg.out).parent / name
    return vader.train(replace(cfg, **{"out": str(out)} | changes), own), out


def data_of(out):
    """What the page of a run draws."""
    return json.loads((out / "data.js").read_text().removeprefix("window.run = ").removesuffix(";\n"))


# ---- Prompts and evaluation --------------------------------------------------------------------------------
def test_the_seed_draws_the_order_of_prompts(quick):
    orders = []
    for n, seed in enumerate((0, 0, 1)):
        rows, _ = go(quick, f"order-{n}", seed=seed, steps=3, num_inference_steps=1, guidance_scale=1.0)
        orders.append([row["prompts"] for row in rows])
    assert orders[0] == orders[1] != orders[2]


def test_every_tenth_prompt_is_held_out(quick, tmp_path):
    lines = [f"a cat, number {n}" for n in range(1, 26)]
    (tmp_path / "many.txt").write_text("\n".join(lines))
    rows, _ = go(quick, "many", prompts=str(tmp_path / "many.txt"), eval_videos=3, num_inference_steps=1)
    assert rows[0]["eval"]["prompts"] == [lines[9], lines[19], lines[9]]


def test_the_printed_change_is_that_since_the_first_evaluation(quick, capsys):
    rows, _ = go(quick, "change", lr=0.3, steps=2, eval_every=1, eval_videos=2)
    means = [np.mean(row["eval"]["reward"]) for row in rows if "eval" in row]
    said = capsys.readouterr().out
    assert len({f"{mean:.3f}" for mean in means}) == 3
    for step, mean in enumerate(means):
        assert f"update {step}: held-out reward {mean:.3f}\n" in said
    changes = [line for line in said.splitlines() if line.startswith("  reward: ")]
    for mean, line in zip(means[1:], changes, strict=True):
        assert f"  reward: {means[0]:.3f} -> {mean:.3f} ({mean - means[0]:+.3f}" in line


def test_the_page_is_told_whether_the_rewards_are_toys(quick, tmp_path):
    """Of tiny they are those of its world; of any other model they are the published ones, or one's own."""
    _, out = go(quick, "published")
    assert data_of(out)["toy"] is False
    (tmp_path / "one.txt").write_text("a moon")
    few = dict(model="tiny", mode="sample", prompts=str(tmp_path / "one.txt"), out=str(tmp_path / "toy"))
    few |= dict(num_frames=1, num_inference_steps=1, height=16, width=16)
    assert vader.main(command(Config(**few))) == 0
    assert data_of(tmp_path / "toy")["toy"] is True


def test_white_is_white_and_black_is_black_in_a_video(tmp_path):
    shades = torch.tensor([0.0, 0.5, 1.0])[:, None, None, None].expand(3, 3, 32, 32)
    vader.write_video(tmp_path / "shades.mp4", shades, fps=8)
    means = iio.imread(tmp_path / "shades.mp4", plugin="FFMPEG").mean((1, 2, 3)) / 255
    assert means.tolist() == pytest.approx([0, 0.5, 1], abs=0.02)


# ---- What is refused, and what is said ---------------------------------------------------------------------
def test_what_is_said_of_prompts(tmp_path, capsys):
    """Nothing where each stands once, though some are held out; and up to where the model reads them."""
    lines = [f"a cat, number {n}" for n in range(20)]
    for long, said in ("", ""), ("a cat " * 500, "1 prompts are cut at 512 tokens, the first is 'a cat a"):
        (tmp_path / "some.txt").write_text("\n".join([*lines, long]))
        capsys.readouterr()
        check_prompts(vader.resolve(Config(model="tiny-wan", prompts=str(tmp_path / "some.txt"))))
        out = capsys.readouterr().out
        assert out.startswith(said) and out.count("\n") == bool(said)


def test_a_vae_of_another_scale_is_refused(small, tmp_path):
    shutil.copytree(small, tmp_path / "model")
    config = json.loads((file := tmp_path / "model" / "vae" / "config.json").read_text())
    file.write_text(json.dumps(config | {"block_out_channels": [8, 16, 32]}))
    with pytest.raises(BadInput, match="its VAE's scale is not 8"):
        checked(Config(model=str(tmp_path / "model")))


def test_a_gpu_that_is_full_is_no_damaged_file():
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError) as raised, rewards.as_bad_input("f is damaged"):
        raise error
    assert raised.value is error


def test_false_is_a_value_of_a_setting():
    for given, resolved in ((None, True), (True, True), (False, False)):
        cfg = vader.resolve(Config(model="tiny", device="mps", checkpointing=given))
        assert cfg.checkpointing is resolved


# ---- Resume ------------------------------------------------------------------------------------------------
def test_a_resumed_run_knows_how_many_updates_were_skipped(quick):
    calls = []

    def reward(frames, prompts):
        calls.append(len(prompts))
        return light(frames, prompts) * (math.nan if len(calls) == 3 else 1)  # the probe's is the first

    rows, _ = go(quick, "skips", reward, steps=2)
    assert [row["skipped"] for row in rows] == [0, 1]
    rows, _ = go(quick, "skips", reward, steps=4, resume=True)
    assert [row["skipped"] for row in rows] == [0, 1, 1, 1]


def test_a_run_that_has_lost_rows_is_not_gone_on_with(quick):
    rows, out = go(quick, "lost", steps=2)
    file = out / "metrics.jsonl"
    file.write_text(file.read_text().splitlines(keepends=True)[0])
    with pytest.raises(BadInput, match="has lost rows of its metrics.jsonl: go on with --lora"):
        go(quick, "lost", steps=3, resume=True)
    assert vader.read_metrics(out) == rows[:1]


def test_a_resumed_run_has_the_scale_of_fp16_that_it_had(quick, monkeypatch):
    """By a CPU's scaler in place of a GPU's, whose scale grows at every update."""
    real, found = torch.amp.GradScaler, []
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda *a, **k: real("cpu", init_scale=8.0, growth_interval=1)
    )
    for name, parts in (("whole", (3,)), ("parts", (1, 3))):
        for steps in parts:
            _, out = go(quick, name, steps=steps, resume=steps > parts[0])
        state = torch.load(out / "checkpoint" / "state.pt", weights_only=True)
        found.append(state["scaler"]["scale"])
    assert found == [64.0, 64.0]


# ---- Models ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["animatediff", "cogvideox"])
def test_families_with_ddim_take_its_settings(kind, checkpoints):
    folder, found = str(checkpoints(kind)), {}
    for spacing in ("trailing", "leading", "linspace"):
        for eta in (0.0, 0.5) if kind == "animatediff" else (0.0,):
            cfg = Config(model=folder, num_inference_steps=4, timestep_spacing=spacing, eta=eta, num_frames=9)
            cfg = vader.resolve(cfg)
            schedule = vader.make_model(cfg).schedule(cfg)
            scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
            scheduler.set_timesteps(4)
            found[spacing] = schedule.t.tolist()
            assert spacing != "trailing" or found[spacing] == scheduler.timesteps.tolist()
            assert (max(schedule.s) > 0.01) == (eta > 0)
    assert len({str(times) for times in found.values()}) == 3


@pytest.mark.parametrize("kind", ["animatediff", "animatediff-parts", "wan"])
def test_no_part_of_a_model_is_in_training_mode(kind, checkpoints, settings, monkeypatch):
    """Or its dropout would draw other numbers when a block is computed again."""
    folder = checkpoints(kind)
    if kind.startswith("animatediff"):
        monkeypatch.setattr(vader.find_model(str(folder))[0], "motion", str(folder / "adapter"))
    run = load(replace(settings, model=str(folder), width=32, mode="sample"), randomise=False)
    for part in (run.model.denoiser, run.model.vae):
        assert not any(module.training for module in part.modules())


def test_the_scaling_factor_of_ltx_is_that_of_its_vae(checkpoints, settings, tmp_path):
    """1 in the published ones, so told of another one here: the mean is not scaled by it, as in stock."""
    made = []
    for factor in (1.0, 0.5):
        folder = shutil.copytree(checkpoints("ltx"), tmp_path / f"ltx-{factor}")
        config = json.loads((file := folder / "vae" / "config.json").read_text())
        file.write_text(json.dumps(config | {"scaling_factor": factor}))
        cfg = replace(settings, model=str(folder), num_frames=9, height=64, width=96, mode="sample")
        run = load(cfg, randomise=False)
        latents = torch.randn(1, *run.model.latent_shape(run.cfg), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            made.append(run.model.decode(latents * factor, [0, 1]))
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-4)
    assert made[0].std() > 0.01


def test_ltx_decodes_at_the_time_that_its_authors_give():
    """The last step of its VAE (0.9.1 and later): 0.05 and 0.025 in diffusers' documentation."""
    family, _, _ = vader.find_model("ltx")
    assert (family.decode_timestep, family.decode_noise_scale) == (0.05, 0.025)


def test_frames_of_svd_that_are_no_neighbours_are_decoded_alone():
    prompts = vader.read_prompts(str(vader.HERE / "tiny" / "images.jsonl"))[:1]
    run = load(Config(model="tiny-i2v", reward="colorful"), randomise=False, prompts=prompts)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, *run.model.latent_shape(run.cfg), generator=generator)
    for picks in ([0, 3], [0, 2, 3]):
        together = run.model.decode(latents, picks)
        alone = torch.cat([run.model.decode(latents, [n]) for n in picks], dim=1)
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    neighbours = run.model.decode(latents, [2, 3])
    assert (neighbours - alone[:, 1:]).abs().mean() > 1e-3  # so it matters


@pytest.mark.parametrize("kind, clips", [("wan", None), ("tiny-i2v", 2), ("ltx", 2)])
def test_a_frame_is_in_the_latent_frame_that_is_decoded_to_it(kind, clips, checkpoints, settings):
    folder = kind if kind == "tiny-i2v" else str(checkpoints(kind))
    frames = 9 * (clips or 1)
    cfg = replace(settings, model=folder, num_frames=frames, clips=clips, height=64, width=96, mode="sample")
    prompts = vader.read_prompts(str(vader.HERE / "tiny" / "images.jsonl"))[:1]
    model = load(cfg, randomise=False, prompts=prompts).model
    latents = torch.randn(1, *model.latent_shape(cfg))
    held = [len(model.decode(latents, [n])[0]) for n in range(latents.shape[2])]
    of_frames = [n for n, count in enumerate(held) for _ in range(count)]
    assert [model.latent_frame(frame) for frame in range(frames)] == of_frames


# ---- Rewards -----------------------------------------------------------------------------------------------
def test_a_folder_of_rewards_comes_before_the_next(tmp_path):
    shutil.copytree(f"{TOY}/aesthetic", tmp_path / "aesthetic")
    head = torch.load(file := tmp_path / "aesthetic" / "aesthetic-model.pth", weights_only=True)
    head["layers.7.bias"] += 1
    torch.save(head, file)
    video, found = torch.rand(1, 1, 3, 64, 64), []
    for folders in (TOY, [None, str(tmp_path), TOY], [TOY, str(tmp_path)]):
        terms = rewards.make_terms("aesthetic", "cpu", torch.float32, folders)
        found.append(rewards.weighted_rewards(terms, video, [""])["aesthetic"].item())
    assert found[1] == pytest.approx(found[0] + 1, abs=1e-2) and found[2] == found[0]


def test_the_longer_side_of_a_detector_s_picture_is_bounded():
    """As by its official processor: of a strip the shorter side is less than it would be."""
    ((_, reward),) = rewards.make_terms("remove:star", "cpu", torch.float32, TOY).values()
    strip, shapes = torch.rand(1, 1, 3, 16, 640), []
    (network,) = reward.networks
    hook = lambda module, args, kwargs: shapes.append(args[0].shape[2:])  # noqa: E731
    network.register_forward_pre_hook(hook, with_kwargs=True)
    reward(strip, [""])
    official = transformers.YolosImageProcessor(size=64, max_size=1333, do_pad=False)
    picture = (strip[0, 0] * 255).byte()
    wanted = official([picture], return_tensors="pt")["pixel_values"].shape[2:]
    assert shapes[0] == wanted


def test_the_longest_action_in_a_prompt_counts(tmp_path):
    """And whole words only; with names one of which holds another."""
    shutil.copytree(f"{TOY}/action", tmp_path / "action")
    file, names = (
        tmp_path / "action" / "config.json",
        ["playing", "playing guitar", "playing guitars", "sing"],
    )
    config = json.loads(file.read_text())
    config["id2label"] = {str(n): name for n, name in enumerate(names)}
    config["label2id"] = {name: n for n, name in enumerate(names)}
    file.write_text(json.dumps(config))
    video, found = torch.rand(1, 8, 3, 64, 64, generator=torch.Generator().manual_seed(0)), {}
    for spec in ("action", *(f"action:{name}" for name in names)):
        prompts = ["Singing and playing the guitar"] if spec == "action" else [""]
        terms = rewards.make_terms(spec, "cpu", torch.float32, str(tmp_path))
        found[spec] = rewards.weighted_rewards(terms, video, prompts)[spec].item()
    assert found["action"] == pytest.approx(found["action:playing guitar"], abs=1e-5)
    assert len({round(value, 3) for value in found.values()}) == 4
