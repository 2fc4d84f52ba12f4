"""The reward `camera`: what it measures on views of photographs and textures moved by known amounts."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tracker
import views
import world
from camera import MOVES, grid, optimise_path, photo, texture, view, with_object

import rewards
from extras.camera import camera_rates
from vader import HERE

PICTURES = {"cat": photo("cat"), "texture": texture(0), "another": texture(1)}


def one(move, dtype=torch.float32):
    return rewards.make_camera("cpu", dtype, arg=move)


def moved(picture, axis, rate, size=(128, 128), frames=8):
    """A clip whose camera moves by `rate` percent a step: pan right, pan up, zoom in or roll right."""
    path = torch.zeros(frames, 4)
    path[:, axis] = rate * (torch.arange(frames) - (frames - 1) / 2)
    return view(picture, path, size)


@pytest.mark.parametrize("size", [(128, 128), (96, 160), (64, 64)])
@pytest.mark.parametrize("name", PICTURES)
def test_rates_are_right(name, size):
    clips = [moved(PICTURES[name], axis, rate, size) for axis in range(4) for rate in (0.5, 1, 2, -4)]
    rates, seen = camera_rates(torch.stack(clips))
    assert rates.shape == (16, 7, 4) and seen.shape == (16, 7) and (seen > 0.1).all()
    for n, (axis, rate) in enumerate((axis, rate) for axis in range(4) for rate in (0.5, 1, 2, -4)):
        mean = rates[n].mean(0)
        assert mean[axis].item() == pytest.approx(rate, rel=0.07), (axis, rate)
        mean[axis] = 0
        assert mean.abs().max() < 0.06 * abs(rate) + 0.01


@pytest.mark.parametrize("name", PICTURES)
def test_an_object_that_moves_is_not_the_camera(name):
    still = with_object(moved(PICTURES[name], 0, 0.0), (2.0, 0.5))
    assert camera_rates(still[None])[0].mean(1).abs().max() < 0.1
    for axis, against in enumerate([(-1, 0), (0, -1), (2, 0), (2, 0)]):
        for rate in (0.5, 2.0):
            object_rate = tuple(rate * share for share in against)
            clip = with_object(moved(PICTURES[name], axis, rate), object_rate)
            assert camera_rates(clip[None])[0][0, :, axis].mean().item() == pytest.approx(rate, rel=0.13)


def lights():
    """Clips of 8 frames in another light: {name: what multiplies them, (8, 1, 128, 128)}."""
    y, x = grid(128, 128)
    times = torch.linspace(0, 1, 8)[:, None, None, None]
    return {
        "fade": 1 - 0.7 * times,
        "flicker": torch.tensor([1, 0.8, 0.9, 0.7] * 2)[:, None, None, None],
        "vignette": 1 - 0.4 * torch.exp(-((x - times + 0.5) ** 2 + y**2) / 0.4),
        "shadow": 0.7 + 0.3 * torch.sigmoid((y - 2 * times + 1) * 6),
    }


@pytest.mark.parametrize("name", lights())
def test_light_is_no_motion(name):
    for picture in PICTURES.values():
        clips = torch.stack([moved(picture, axis, rate) for axis, rate in ((0, 0.0), (0, 1.0), (2, -1.5))])
        plain, lit = camera_rates(clips)[0], camera_rates(clips * lights()[name])[0]
        assert (plain - lit).mean(1).abs().max() < 0.15
        assert camera_rates(clips[:1] * lights()[name])[0].abs().mean() < 0.05


def test_bars_that_stand_still_do_not_hold_the_camera():
    for axis, rate in ((0, 1.0), (2, 1.5), (3, -1.0)):
        clip = moved(PICTURES["cat"], axis, rate)
        clip[..., :18, :], clip[..., -18:, :] = 0, 0.1
        assert camera_rates(clip[None])[0][0, :, axis].mean().item() == pytest.approx(rate, rel=0.2)


def test_a_fast_pan_is_seen():
    for axis, rate in ((0, 7.0), (0, -8.0), (1, 6.0)):
        clips = torch.stack([moved(picture, axis, rate) for picture in PICTURES.values()])
        found = camera_rates(clips)[0].mean(1)[:, axis]
        assert found.tolist() == pytest.approx([rate] * len(clips), rel=0.05)


def test_the_tracker_agrees_and_sees_no_motion_in_light():
    for axis, rate in ((0, 1.0), (1, -2.0), (2, 1.5), (3, -1.0)):
        clip = moved(PICTURES["cat"], axis, rate)
        for light in (torch.ones(8, 1, 1, 1), *lights().values()):
            found = tracker.track(clip * light).mean(0)
            assert found[axis] == pytest.approx(rate, rel=0.1)
    assert abs(tracker.track(moved(PICTURES["cat"], 0, 0.0) * lights()["shadow"])).max() < 0.05
    assert np.isnan(tracker.track(torch.full((3, 3, 64, 64), 0.5))).all()


def test_amounts_of_motion():
    rates = np.array([[1, 0, 0, -2], [3, 0, 0, -2], [np.nan] * 4, [2, 0, 0, 0]])
    assert tracker.amount(rates, "pan right") == 2
    assert tracker.amount(rates, "still") == pytest.approx(10 / 12)
    assert tracker.amount(rates, "smooth") == pytest.approx(2 / 4)  # of the two seen steps in a row
    assert tracker.amount(rates, "drift") == pytest.approx((2 + 4 / 3) / 4)


def test_the_world_of_tiny_i2v_shows_the_camera_that_moves_it():
    """By our measure and by the tracker, at 64 pixels, with an object in front and places or photographs."""
    generator = torch.Generator().manual_seed(5)
    chosen = views.pick_views(world.UNSEEN, 48, generator)
    clips, path, inside = views.draw_views(chosen, generator)
    true = path.diff(dim=1)
    assert clips.shape == (48, 8, 3, 64, 64) and (path[:, 0] == 0).all() and inside.mean() > 0.02
    rates, seen = camera_rates(clips)
    textured = seen.mean(1) > 0.15
    errors = (rates - true).abs().mean(1)[textured]
    assert textured.float().mean() > 0.75 and errors.median() < 0.05 and errors.mean() < 0.15
    tracked = torch.from_numpy(np.stack([tracker.track(clip) for clip in clips[textured][:12]]))
    assert torch.nanmedian((tracked - true[textured][:12]).abs()) < 0.25
    still = true.abs().amax((1, 2)) == 0
    assert 4 <= still.sum() < 30 and true.abs().max() > 1.5
    words = [views.view_caption(combination) for combination in chosen]
    photographed = [word for word in words if word.endswith(("in front of a cat", "in front of a rocket"))]
    assert 2 <= len(photographed) < 24
    assert {word for word in words if word not in photographed} <= {*map(world.caption, world.UNSEEN)}


def test_where_there_is_no_texture_nothing_moves_and_one_line_says_so(capsys):
    grey = torch.full((2, 5, 3, 48, 80), 0.5, requires_grad=True)
    for move in ["smooth", "still", *MOVES]:
        reward = one(move)
        value = reward(grey, ["", ""])
        value.sum().backward()
        assert value.abs().max() == 0 and grey.grad.isfinite().all()
        assert {name: v.abs().max().item() for name, v in reward.report.items()}.keys() >= {
            "pan right",
            "seen",
        }
        assert all(v.shape == (2,) and v.abs().max() == 0 for v in reward.report.values())
        reward(grey, ["", ""])
        said = [line for line in "".join(capsys.readouterr()).splitlines() if line]
        advice = "a reward of the picture beside it, as + 5*hps, keeps it from fading what moves"
        assert said == [f"camera:{move}: 0% of the frame has texture to see it by; {advice}"]


@pytest.mark.parametrize("move", MOVES)
def test_a_move_is_rewarded_and_its_opposite_is_not(move):
    reward, (axis, sign) = one(move), MOVES[move]
    right, faster, wrong = (moved(PICTURES["cat"], axis, sign * rate) for rate in (1, 2, -1))
    values = reward(torch.stack([right, faster, wrong]), [""] * 3)
    assert values[1] > values[0] > 0 > values[2]
    far, farther = reward(
        torch.stack([moved(PICTURES["cat"], axis, sign * rate) for rate in (3, 5)]), [""] * 2
    )
    assert values[1] < far < 2 and farther - far < 0.4 * (far - values[0])  # twice as much more, less for it
    path = torch.zeros(8, 4)
    path[:, axis] = sign * torch.arange(8.0)
    for other in {0, 1, 2, 3} - {axis}:  # the same with a second move, and with jitter, is worth less
        drift = path.clone()
        drift[:, other] = 0.7 * torch.arange(8.0)
        assert reward(view(PICTURES["cat"], drift, (128, 128))[None], [""]) < values[0] - 0.04
    jitter = 0.5 * torch.randn(8, generator=torch.Generator().manual_seed(0))
    path[1:-1, axis] += jitter[1:-1]
    assert reward(view(PICTURES["cat"], path, (128, 128))[None], [""]) < values[0]


def test_smooth_and_still():
    path = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    shaken, steady = view(PICTURES["cat"], path, (96, 96)), moved(PICTURES["cat"], 0, 2.0, (96, 96))
    fixed = moved(PICTURES["cat"], 0, 0.0, (96, 96))
    clips = torch.stack([shaken, steady, fixed])
    smooth, still = one("smooth")(clips, [""] * 3), one("Still")(clips, [""] * 3)
    rates = path.diff(dim=0)
    shaking = rates.diff(dim=0).abs().mean() / (rates.abs().mean() + 0.1)
    assert smooth[0].item() == pytest.approx(-shaking.item(), rel=0.1)
    assert smooth[1] > -0.02 and smooth[2] > -0.02
    assert (
        still.tolist() == sorted(still.tolist())
        and still[2] > -0.01
        and still[1].item() == pytest.approx(-0.5, abs=0.05)
    )


def test_clips_of_a_batch_do_not_meet():
    clips = torch.stack([moved(PICTURES["cat"], 0, 1.0), moved(PICTURES["texture"], 2, 2.0)]).requires_grad_()
    reward = one("pan left")
    values = reward(clips, ["", ""])
    assert values.tolist() == pytest.approx([reward(clip[None], [""]).item() for clip in clips], abs=1e-5)
    (slope,) = torch.autograd.grad(values[0], clips)
    assert slope[1].abs().max() == 0 and (slope[0].flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("move", ["smooth", "still", "pan left", "zoom in", "roll right"])
def test_gradients_agree_with_finite_differences(move):
    """Along what a camera can do. Of pixels alone they differ by what the weights, held fixed, ignore."""
    path = 0.8 * torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    reward, picture = one(move, torch.float64), PICTURES["texture"].double()

    def value(path):
        return reward(view(picture, path, (96, 128))[None], [""])

    (slope,) = torch.autograd.grad(value(path.requires_grad_()).sum(), path)
    expected = torch.zeros_like(path)
    for place in range(path.numel()):
        step = torch.zeros(path.numel(), dtype=path.dtype)
        step[place] = 1e-3
        step = step.view_as(path)
        expected.view(-1)[place] = (value(path + step) - value(path - step)).item() / 2e-3
    assert F.cosine_similarity(slope.flatten(), expected.flatten(), dim=0) > 0.99
    assert (slope - expected).norm() < 0.15 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("move", ["smooth", "still", *MOVES])
def test_the_reward_alone_steers_a_camera(move):
    before, after = optimise_path(PICTURES["cat"], move)
    jitter = [rates.diff(dim=0).abs().mean().item() for rates in (before, after)]
    assert jitter[1] < 0.5 * jitter[0]
    if move == "still":
        assert after.abs().mean() < 0.15
    if move in MOVES:
        axis, sign = MOVES[move]
        wanted, others = sign * after.mean(0)[axis], [n for n in range(4) if n != axis]
        assert wanted > 1.5 and after.mean(0)[others].abs().max() < 0.3


def test_what_is_not_finite_or_too_small_ends_no_process():
    reward = one("still")
    for bad in (torch.nan, torch.inf):  # as frames of a run that diverges: no gradient, and no crash
        frames = torch.full((1, 4, 3, 32, 32), bad, requires_grad=True)
        reward(frames, [""]).sum().backward()
        assert not frames.grad.isfinite().all()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):  # hard cuts
        frames = torch.rand(1, 4, 3, 16, 16, generator=generator).requires_grad_()
        reward(frames, [""]).sum().backward()
        assert frames.grad.isfinite().all()
    with pytest.raises(rewards.BadInput, match="camera needs 3 frames, of 16 x 16"):
        reward(torch.rand(1, 4, 3, 8, 64), [""])


# ---- smooth and dynamic ------------------------------------------------------------------------------------
def test_smooth_and_dynamic_measure_motion_and_not_light():
    smooth, dynamic = (make("cpu", torch.float32) for make in (rewards.make_smooth, rewards.make_dynamic))
    steps = torch.arange(9)[:, None, None, None]
    bar = ((torch.arange(64) // 4 - steps) % 16 < 8).float().expand(1, 9, 3, 32, 64)
    noise = torch.rand(1, 9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    still = noise[:, :1].expand(1, 9, -1, -1, -1)
    assert smooth(still, None) == 0 == dynamic(still, None)
    assert smooth(noise, None).item() == pytest.approx(-3, abs=0.3)
    assert dynamic(bar, None).item() == pytest.approx(
        25, rel=1e-2
    )  # an eighth of the pixels by two contrasts
    for light in (1 - 0.08 * steps, 0.25 + 0 * steps, 0.8 + 0.2 * torch.cos(2 * steps)):
        assert dynamic(bar * light, None) < 25.2 and dynamic(still * light, None) < 0.5
        assert smooth(bar * light, None) < smooth(bar, None) + 0.05


@pytest.mark.parametrize("name", ["views", "clips", "gradient", "trained"])
def test_the_readme_has_what_the_tracker_judged(name):
    lines = (HERE / "bench" / "README.md").read_text().splitlines()
    with open(HERE / "bench" / f"camera_{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and all("| " + " | ".join(row.values()) + " |" in lines for row in rows)
