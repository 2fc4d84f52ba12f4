"""Tests of --clips: against stock pipelines that start from a saved last frame, and plain autograd."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import fake
import imageio.v3 as iio
import memory
import pytest
import torch
from PIL import Image
from test_models import IMAGES, stock_frames, stock_pipeline, whole_video

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
    plain_video,
)
from extras.clips import walk_back
from vader import HERE, Config


@pytest.fixture
def settings(checkpoints, tmp_path):
    """A Config of a small quick run of a kind in BUILDERS with three clips, or as told, and its prompts."""
    for n, photo in enumerate(["cat", "rocket"]):
        shutil.copy(HERE / "tiny" / f"photo-{photo}.jpg", tmp_path / f"{n}.jpg")
    rows = [dict(prompt=prompt.text, image=f"{n}.jpg") for n, prompt in enumerate(PROMPTS)]
    (tmp_path / "images.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "texts.txt").write_text("\n".join(prompt.text for prompt in PROMPTS))

    def make(kind="svd", clips=3, **more):
        tall, length = (1, 4) if kind == "svd" else (2, 9)
        file = str(tmp_path / ("texts.txt" if kind == "ltx" else "images.jsonl"))
        how = dict(num_frames=length * (clips or 1), height=32 * tall, width=48 * tall, reward="colorful")
        how |= dict(num_inference_steps=3, guidance_scale=3.0, batch_size=2, lora_rank=4, grad_steps="last")
        how |= dict(model=str(checkpoints(kind)), prompts=file, eval_prompts=file, out=str(tmp_path / "run"))
        how |= dict(steps=1, eval_videos=2, grad_accum=1, clips=clips)
        return Config(**how | more), vader.read_prompts(file)

    return make


def next_prompts(prompts, video, folder: Path, k: int):
    """The prompts of the clip after clip k: their images are the video's last frames, saved as files."""
    made = []
    for n, prompt in enumerate(prompts):
        file = folder / f"last-{k}-{n}.png"
        frame = (video[n, -1].permute(1, 2, 0) * 255).round().byte()
        Image.fromarray(frame.numpy()).save(file)
        made.append(prompt._replace(image=str(file)))
    return made


def test_one_clip_is_a_run_without_the_flag_and_others_leave_no_trace(settings):
    found = []
    for clips in (None, 1, 2, None):
        cfg, prompts = settings(clips=clips, backprop_steps=2)
        run = load(cfg, prompts=prompts)
        reward = vader.micro_batch(run, prompts, 0, 0)["reward"]
        found.append((reward, gradients(run), vader.make_videos(run, prompts)))
    plain, one, two, later = found
    for same in (one, later):
        assert all(map(torch.equal, plain, same)) and plain[1].norm() > 0
    assert two[2].shape[1] == 2 * plain[2].shape[1]


@pytest.mark.parametrize("kind", ["svd", "ltx-image", "ltx", "wan22-image"])
def test_clips_equal_stock_videos_that_start_from_the_last_frame(kind, settings, tmp_path):
    """LTX's first clip may also be made from text alone."""
    cfg, prompts = settings(kind)
    run = load(cfg, prompts=prompts)
    given = batch(run, prompts)
    with run.model.denoiser.disable_adapter():
        video = whole_video(run.model, vader.rollout(run, given)[-1])
    assert video.shape == (2, cfg.num_frames, 3, cfg.height, cfg.width)
    single = changed(run, clips=None, num_frames=cfg.num_frames // 3)
    for k, (clip, noise) in enumerate(zip(video.chunk(3, dim=1), given.noise.chunk(3, dim=2), strict=True)):
        pipe = stock_pipeline("ltx-image" if kind == "ltx" and k else kind, cfg)
        stock = stock_frames(pipe, single, given._replace(prompts=prompts, noise=noise))
        torch.testing.assert_close(clip, stock, rtol=0, atol=5e-4)
        prompts = next_prompts(prompts, clip, tmp_path, k)
    assert (video[:, 0] - clip[:, 0]).abs().mean() > 0.01


def together(frames, prompts):
    """A reward in which every frame's gradient depends on all the others."""
    return frames.mean(1).square().mean((1, 2, 3)) + frames.diff(dim=1).square().mean((1, 2, 3, 4))


together.frames = "all"

CUTS = [dict(backprop_steps=3), dict(backprop_steps=2, coupling=0.5, detach_uncond=True)]


@pytest.mark.parametrize("kind, how", [*(("svd", how) for how in CUTS), ("ltx-image", CUTS[0])])
def test_gradients_equal_plain_autograd_with_the_passing_picture_detached(kind, how, settings, tmp_path):
    """By a model without clips for each, its last frame saved and read; then with activations recomputed."""
    cfg, prompts = settings(kind, clips=2, decode_chunk=2, **how)
    run = changed(load(cfg, prompts=prompts), {"together": (1.0, together)})
    length = run.model.length
    given = batch(run, prompts, picks=[0, 1, length, length + 1])
    singles, videos, starts = [], [], prompts
    for k, noise in enumerate(given.noise.chunk(2, dim=2)):
        single = load(settings(kind, clips=None, **how)[0], prompts=starts)
        piece = batch(single, starts, picks=[0, 1])._replace(noise=noise)
        singles.append(single)
        videos.append(plain_video(single, piece))
        last = whole_video(single.model, vader.rollout(single, piece)[-1])
        starts = next_prompts(starts, last, tmp_path, k)
    (-together(torch.cat(videos, dim=1), None).mean()).backward()
    each = [gradients(single) for single in singles]
    assert min(part.norm() / sum(each).norm() for part in each) > 0.1  # both clips have a say
    assert gradient_error(run, given, sum(each)) < 1e-5
    run.model.recompute()
    assert gradient_error(run, given, sum(each)) < 1e-5


def test_peak_memory_is_flat_in_clips(settings):
    """Of an update with all frames scored, and of walking back: a clip more adds its latents and frames."""
    few = dict(width=32, num_inference_steps=1, decode_chunk=2)

    def walk_back_peak(run, prompts, walk_back):
        latents = vader.rollout(run, given := batch(run, prompts))
        with fake.LiveStorages() as live:
            walk_back(run, given, latents, torch.ones_like(latents[-1]))
        return live.peak / 1e6

    def in_one_graph(run, given, latents, g):
        graphs = []
        for clip, x in zip(given.clips, latents[0].chunk(len(given.clips), dim=2), strict=True):
            graphs.append(run.model.denoise(x, run.schedule.t[0], clip.cond))
        torch.cat(graphs, dim=2).backward(g)

    updates, walks = [], []
    for clips in (1, 2, 4):
        cfg, prompts = settings(clips=clips, num_frames=2 * clips, **few)
        run = changed(load(cfg, prompts=prompts[:1]), {"together": (1.0, together)})
        with fake.LiveStorages() as live:
            vader.micro_batch(run, prompts[:1], 0, 0)
        updates.append(live.peak / 1e6)
        if clips != 2:
            walks.append(walk_back_peak(run, prompts[:1], walk_back))
    at_once = walk_back_peak(run, prompts[:1], in_one_graph)
    print("peak MB, 1, 2, 4 clips:", *updates, "walk back, 1, 4:", *walks, "4 in one graph:", at_once)
    assert updates[2] < 1.1 * updates[0] and walks[1] < 1.1 * walks[0]
    assert at_once > 1.5 * walks[1]


@pytest.mark.parametrize("picks, in_clips", [([6], [[2]]), ([2, 3, 9], [[2, 3], [1]])])
def test_somebody_s_own_estimator_gets_each_clip_that_was_scored(picks, in_clips, settings, monkeypatch):
    """In the place of `vader.walk_back`, as if a clip were a run: it can roll out and score it again."""
    cfg, prompts = settings()
    run, real, found = load(cfg, prompts=prompts), vader.walk_back, []

    def mine(run, batch, latents, g):
        again = vader.rollout(run, batch)
        assert all(map(torch.equal, latents, again))
        assert batch.noise.shape[1:] == run.model.latent_shape(run.cfg) and run.cfg.clips is None
        _, own = vader.score(run, batch, again[-1])
        torch.testing.assert_close(own * len(batch.picks) / len(picks), g)
        assert g.norm() > 0
        found.append(batch.picks)
        real(run, batch, latents, g)

    monkeypatch.setattr(vader, "walk_back", mine)
    monkeypatch.setattr(vader, "pick_latent_frames", lambda *_: picks)
    vader.micro_batch(run, prompts, 0, 0)
    assert found == in_clips and gradients(run).norm() > 0


@pytest.mark.slow
def test_a_plan_is_flat_in_clips_and_counts_each_clip_s_steps(settings):
    few = dict(decode_frames=1, dtype="fp32", num_inference_steps=300)
    (one, once), (three, thrice) = found = [({}, memory.Work()), ({}, memory.Work())]
    for clips, (phases, work) in zip((None, 3), found, strict=True):
        cfg, _ = settings(clips=clips, num_frames=2 * (clips or 1), **few)
        phases.update(memory.predict(cfg, work))
    for name in ("score", "walk back"):
        assert three[name] - three["all weights"] < 1.25 * (one[name] - one["all weights"]), name
    once, thrice = once.operations, thrice.operations
    assert thrice["sampling"] == pytest.approx(3 * once["sampling"], rel=0.05)
    assert thrice["score"] == pytest.approx(once["score"], rel=0.1)


def test_what_can_not_be_chained_is_one_line(settings, prompts_file, capsys):
    cases = [
        (Config(model="tiny", clips=2, prompts=prompts_file), "starts from no image"),
        (settings(clips=0)[0], "--clips 0: must be from 1 to 100"),
        (settings(batch_size=2000)[0], "--batch_size 2000: must be from 1 to 1024"),
        (settings(num_frames=8)[0], "must be a multiple of --clips 3"),
        (settings("ltx", num_frames=24)[0], "a clip has 8, must be 1 more than a multiple of 8"),
        (settings(decode_frames=13)[0], "the video has only 12 frames"),
        (settings(prompts=prompts_file)[0], "starts from an image"),
    ]
    capsys.readouterr()
    for cfg, expected in cases:
        assert vader.main(command(cfg)) == 2
        said = capsys.readouterr().err
        assert expected in said and said.count("\n") == 1 and said.startswith("vader.py: error: ")
        assert not Path(cfg.out or "runs/none").exists()


def test_training_resuming_and_sampling_with_clips(settings, tmp_path):
    """The LoRA is an ordinary one: the model takes it with clips or without."""
    cfg, _ = settings(steps=2, eval_videos=0, num_inference_steps=1, clips=2, grad_steps="strongest")
    whole = vader.train(cfg)
    again = dataclasses.replace(cfg, out=str(tmp_path / "again"))
    vader.train(dataclasses.replace(again, steps=1))
    resumed = vader.train(dataclasses.replace(again, resume=True))
    assert [row.get("reward") for row in resumed if "eval" not in row] == [
        row.get("reward") for row in whole if "eval" not in row
    ]
    for clips, frames in ((None, 4), (2, 8)):
        out, lora = str(tmp_path / f"sample-{frames}"), f"{cfg.out}/lora"
        flags = ["--mode", "sample", "--lora", lora, "--model", cfg.model, "--prompts", cfg.prompts]
        flags += ["--num_frames", str(frames), "--height", "32", "--width", "48", "--out", out]
        flags += ["--num_inference_steps", "1"]
        assert vader.main([*flags, *(["--clips", "2"] if clips else [])]) == 0
        assert len(iio.imread(f"{out}/tuned/000.mp4", plugin="FFMPEG")) == frames
    cfg = checked(Config(model="tiny-i2v", prompts=IMAGES, clips=3))
    assert cfg.num_frames == 24


def test_offloading_moves_the_image_encoder_with_the_vae_and_changes_nothing(settings, monkeypatch):
    found = []
    for offload in (False, True):
        cfg, prompts = settings(offload=offload, num_inference_steps=1)
        run, places, seen = load(cfg, prompts=prompts), {}, []
        for name in ("denoiser", "vae", "image_encoder"):
            move = functools.partial(places.__setitem__, name)
            monkeypatch.setattr(getattr(run.model, name), "to", move)
        monkeypatch.setattr(run.model, "device", torch.device("cpu", 0))

        def start(*args, real=run.model.start, places=places, seen=seen):
            seen.append(dict(places))
            return real(*args)

        monkeypatch.setattr(run.model, "start", start)
        vader.micro_batch(run, prompts, 0, 0)
        found.append(gradients(run))
        there = [{name for name, place in at.items() if place != "cpu"} for at in (*seen, places)]
        starting, ending = ({"vae", "image_encoder"}, {"denoiser"}) if offload else (set(), set())
        assert there == [starting] * 4 + [ending]  # without --offload nothing moves
    assert torch.equal(*found) and found[0].norm() > 0
