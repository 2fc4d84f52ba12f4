"""Every setting of Config does what it says: TESTS names, for each, a test that fails when it is ignored."""

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import imageio.v3 as iio
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import vader
from conftest import command
from vader import HERE, Config

HERE_TESTS = {
    "test_a_run_is_of_the_model_and_the_prompts_that_it_is_given": "model prompts",
    "test_what_a_reward_is_shown": "num_frames height width batch_size decode_frames",
    "test_frames_are_decoded_and_scored_in_chunks": "decode_chunk",
    "test_a_seed_is_a_run": "seed",
    "test_a_prompt_against_itself_is_no_guidance": "negative_prompt",
    "test_guidance_is_linear_in_its_scale": "guidance_scale",
    "test_eta_is_the_share_of_ddim_s_noise": "eta",
    "test_the_steps_that_are_made_and_those_that_train": "num_inference_steps backprop_steps grad_steps",
    "test_the_spacing_is_the_scheduler_s": "timestep_spacing",
    "test_the_unconditional_branch_can_be_left_out": "detach_uncond",
    "test_the_gradient_through_inputs_is_coupled": "coupling",
    "test_the_first_update_is_adamw_s": "lr weight_decay",
    "test_long_gradients_are_shortened": "max_grad_norm",
    "test_batches_of_an_update_are_averaged": "grad_accum",
    "test_the_lora_is_as_told": "lora_rank lora_alpha lora_targets",
    "test_when_and_on_what_a_run_is_evaluated": "steps eval_prompts eval_every eval_videos",
    "test_an_evaluation_makes_this_many_videos_at_once": "eval_batch_size",
}
OFFLOADING = "test_offloading_moves_the_image_encoder_with_the_vae_and_changes_nothing"
FEW_STEPS = "test_the_steps_of_few_step_loras_are_the_stock_scheduler_s_with_that_shift"
ELSEWHERE = {
    "bench/test_values.py::test_rewards_load_from_the_folder_that_is_given": "reward_weights",
    "bench/test_values.py::test_the_vision_language_model_that_is_given": "vlm",
    "test_vader.py::test_a_sum_logs_each_term_and_figure": "reward",
    "test_vader.py::test_sample_and_eval_modes": "mode",
    "bench/test_environment.py::test_videos_play_at_the_models_rate": "fps",
    "test_vader.py::test_what_a_run_writes": "out",
    "test_vader.py::test_resumed_equals_uninterrupted_bitwise": "resume",
    "test_vader.py::test_checkpointing_changes_no_gradient_and_no_base_weight": "checkpointing",
    f"bench/test_clips.py::{OFFLOADING}": "offload",
    "test_vader.py::test_lora_is_float32_on_a_bf16_base": "dtype",
    "bench/test_trust.py::test_a_lora_to_start_from_is_the_base_of_the_gain": "lora",
    "bench/test_strength.py::test_lora_scale_is_the_strength_of_a_lora_that_samples": "lora_scale",
    "bench/test_strength.py::test_a_judge_is_scored_and_changes_nothing": "watch",
    "bench/test_strength.py::test_a_run_stops_when_a_judge_has_fallen_for_long": "stop_when_worse",
    "bench/test_trackers.py::test_two_trainings_in_a_process_are_two_runs": "tracker",
    "bench/test_runs.py::test_a_device_that_is_not_there_is_refused": "device",
    "bench/test_base.py::test_a_base_lora_is_fused_and_ours_alone_is_saved": "base_lora",
    "bench/test_base.py::test_int8_is_near_the_whole_base_and_smaller": "quantize",
    f"bench/test_wan.py::{FEW_STEPS}": "shift",
    "bench/test_clips.py::test_training_resuming_and_sampling_with_clips": "clips",
    "bench/test_lora_files.py::test_a_run_is_pushed_once_with_a_card": "push_to_hub",
}
TESTS = {f"bench/test_settings.py::{name}": which for name, which in HERE_TESTS.items()} | ELSEWHERE


def test_every_setting_has_its_test():
    tested = [name for which in TESTS.values() for name in which.split()]
    assert sorted(tested) == sorted(setting.name for setting in dataclasses.fields(Config))
    for place in TESTS:
        file, name = place.split("::")
        assert f"\ndef {name}(" in (HERE / file).read_text(encoding="utf-8"), place


# ---- What is seen of a run ---------------------------------------------------------------------------------
@pytest.fixture
def quick(settings):
    """A Config of one update of the small model in half a second, without evaluation."""
    return replace(settings, steps=1, eval_videos=0, num_frames=2, num_inference_steps=2)


def go(cfg, own=None, **changes):
    """Train in a folder of its own -> the rows, the folder."""
    out = Path(cfg.out).parent / f"run-{len([*Path(cfg.out).parent.iterdir()])}"
    return vader.train(replace(cfg, **{"out": str(out)} | changes), own), out


def lora_of(out):
    return load_file(out / "lora" / "adapter_model.safetensors")


@dataclasses.dataclass
class Seen:
    """What a run gave to its networks, and to its optimiser, in order."""

    denoised: list  # (x, time, with gradient)
    decoded: list  # (latents, picks, with gradient)
    weights: list  # all as one vector, before and after each update
    gradients: list  # likewise

    def forget(self):
        for found in vars(self).values():
            found.clear()


@pytest.fixture
def seen(monkeypatch):
    seen, model = Seen([], [], [], []), vader.TextToVideoUNet
    denoise, decode = model.denoise, model.decode

    def spy_denoise(self, x, t, cond):
        seen.denoised.append((x.clone(), int(t), torch.is_grad_enabled()))
        return denoise(self, x, t, cond)

    def spy_decode(self, latents, picks):
        seen.decoded.append((latents.detach().clone(), [*picks], torch.is_grad_enabled()))
        return decode(self, latents, picks)

    def vector(optimizer, what):
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        return torch.cat([what(p).detach().flatten() for p in weights])

    def before_step(optimizer, args, kwargs):
        seen.weights.append(vector(optimizer, lambda p: p))
        seen.gradients.append(vector(optimizer, lambda p: p.grad))

    def after_step(optimizer, args, kwargs):
        seen.weights.append(vector(optimizer, lambda p: p))

    monkeypatch.setattr(model, "denoise", spy_denoise)
    monkeypatch.setattr(model, "decode", spy_decode)
    hooks = [register_optimizer_step_pre_hook(before_step)]
    hooks.append(register_optimizer_step_post_hook(after_step))
    yield seen
    for hook in hooks:
        hook.remove()


def light(frames, prompts):
    return frames.mean((1, 2, 3, 4))


# ---- Files, and what is made -------------------------------------------------------------------------------
def test_a_run_is_of_the_model_and_the_prompts_that_it_is_given(quick, tmp_path):
    shutil.copytree(quick.model, tmp_path / "another-model")
    (tmp_path / "some.txt").write_text("a dog\na fox\n")
    rows, out = go(quick, model=str(tmp_path / "another-model"), prompts=str(tmp_path / "some.txt"))
    assert sorted(rows[0]["prompts"]) == ["a dog", "a fox"]
    config = json.loads((out / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "another-model"


def test_what_a_reward_is_shown(quick):
    """Shapes: of a probe, of all frames of evaluations, of the chosen ones of an update."""
    size = dict(num_frames=4, height=40, width=24, batch_size=3, eval_videos=4, num_inference_steps=1)
    for wanted, decode_frames, calls, frames, scored in ((1, None, 4, 1, 1), ("all", 2, 1, 4, 2)):
        shapes = []

        def reward(frames, prompts, shapes=shapes):
            shapes.append(tuple(frames.shape))
            return light(frames, prompts)

        reward.frames = wanted
        _, out = go(quick, reward, decode_frames=decode_frames, **size)
        evaluation = [(3, frames, 3, 40, 24)] * calls + [(1, frames, 3, 40, 24)] * calls
        update = [(3, scored, 3, 40, 24)]
        assert shapes == update + evaluation + update + evaluation
        film = iio.imread(out / "samples" / "step_000001" / "003.mp4", plugin="FFMPEG")
        assert len(film) == 4 and film.shape[1] * 24 == film.shape[2] * 40


def test_frames_are_decoded_and_scored_in_chunks(quick, seen):
    values = []  # of five frames by twos: the figure of an update is the mean of all

    def reward(frames, prompts):
        values.append((frames.shape[1], light(frames, prompts).mean().item()))
        return light(frames, prompts)

    reward.frames = 1
    rows, _ = go(quick, reward, num_frames=5, decode_frames=5, decode_chunk=2)
    assert [frames for frames, _ in values] == [2, 2, 1, 2, 2, 1]  # the probe's, the update's
    assert [picks for _, picks, graph in seen.decoded if graph] == [[0, 1], [2, 3], [4]]
    mean = sum(frames * value for frames, value in values[-3:]) / 5
    assert rows[0]["reward"] == pytest.approx(mean, rel=1e-5)


def test_a_seed_is_a_run(quick, seen):
    found = []
    for seed in (0, 0, 1):
        rows, out = go(quick, seed=seed)
        found.append((rows[0]["reward"], lora_of(out), seen.denoised[0][0]))
        seen.forget()
    (reward, lora, noise), (again, same_lora, same_noise), (other, other_lora, other_noise) = found
    assert reward == again and torch.equal(noise, same_noise)
    assert reward != other and (noise - other_noise).abs().mean() > 0.5
    for name, matrix in lora.items():
        assert torch.equal(matrix, same_lora[name]) and not torch.equal(matrix, other_lora[name])


def test_when_and_on_what_a_run_is_evaluated(quick, tmp_path):
    (tmp_path / "two.txt").write_text("a dog\na fox\n")
    told = dict(steps=3, eval_every=2, eval_videos=3, eval_prompts=str(tmp_path / "two.txt"))
    rows, out = go(quick, **told)
    assert [(row["step"], "eval" in row) for row in rows] == [(0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1)]
    for row in rows:
        if "eval" in row:
            assert row["eval"]["prompts"] == ["a dog", "a fox", "a dog"]
            assert len([*(out / row["eval"]["folder"]).glob("*.mp4")]) == 3


def test_an_evaluation_makes_this_many_videos_at_once(quick, seen):
    """And they are the same videos."""
    rewards, sizes = [], []
    for size in (None, 3):
        seen.forget()
        rows, _ = go(quick, eval_videos=4, batch_size=1, eval_batch_size=size, reward="colorful")
        rewards.append([row["eval"]["reward"] for row in rows if "eval" in row])
        whole = [len(latents) for latents, picks, _ in seen.decoded if len(picks) == quick.num_frames]
        sizes.append(whole[:4])
    assert sizes[0] == [1, 1, 1, 1] and sizes[1][:2] == [3, 1]
    assert rewards[1][0] == pytest.approx(rewards[0][0], rel=1e-5)


# ---- The sampler -------------------------------------------------------------------------------------------
def latents_of(cfg, seen, **changes):
    """The latents of two videos that the base makes, (2, C, F, H, W)."""
    seen.forget()
    folder = Path(cfg.out).parent
    (two := folder / "two.txt").write_text("a dog\na fox\n")
    changes |= dict(mode="sample", prompts=str(two), out=f"{folder}/sample-{len([*folder.iterdir()])}")
    assert vader.main(command(replace(cfg, **changes))) == 0
    return torch.cat([latents for latents, _, _ in seen.decoded])


def alphas_of(cfg):
    """Products of alphas of the model's scheduler, and the times of its steps with each spacing."""
    spaced = {}
    for spacing in ("trailing", "leading", "linspace"):
        where, how = f"{cfg.model}/scheduler", dict(timestep_spacing=spacing)
        scheduler = diffusers.DDIMScheduler.from_pretrained(where, **how)
        scheduler.set_timesteps(cfg.num_inference_steps)
        spaced[spacing] = scheduler.timesteps.tolist()
    return scheduler.alphas_cumprod.double(), spaced


def test_guidance_is_linear_in_its_scale(quick, seen):
    one = replace(quick, num_inference_steps=1)
    plain, twice, thrice = (latents_of(one, seen, guidance_scale=scale) for scale in (1.0, 2.0, 3.0))
    assert (twice - plain).norm() > 1e-3 * plain.norm()
    torch.testing.assert_close(thrice - twice, twice - plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())


def test_a_prompt_against_itself_is_no_guidance(quick, tmp_path):
    (tmp_path / "one.txt").write_text("a moon\n")
    given, found = replace(quick, prompts=str(tmp_path / "one.txt")), []
    for negative, scale in (("a moon", 4.0), ("", 1.0), ("", 4.0)):
        rows, _ = go(given, negative_prompt=negative, guidance_scale=scale)
        found.append([rows[0]["reward"], rows[0]["grad_norm"]])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0] != pytest.approx(found[2], rel=1e-2)


def test_eta_is_the_share_of_ddim_s_noise(quick, seen, monkeypatch):
    """Where the denoiser says nothing, what eta adds has the variance of eq. 16 of Song et al. 2021."""
    monkeypatch.setattr(vader.TextToVideoUNet, "denoise", lambda self, x, t, cond: torch.zeros_like(x))
    alphas, spaced = alphas_of(quick)
    first, second = spaced["trailing"]
    how = dict(guidance_scale=1.0, num_frames=12)
    plain = latents_of(quick, seen, **how)
    for eta in (0.5, 1.0):
        added = latents_of(quick, seen, eta=eta, **how) - plain
        expected = 0.0
        for A, B in ((alphas[first], alphas[second]), (alphas[second], alphas[0])):
            expected = expected * B / A + eta**2 * (1 - B) / (1 - A) * (1 - A / B)
        assert added.var().item() == pytest.approx(expected.item(), rel=0.1)
        assert abs(added.mean().item()) < 0.1 * expected**0.5


def leverage(alphas, times):
    """How far each step of DDIM moves the result: |b| of the step, times a of all that follow."""
    found = []
    for t, after in zip(times, [*times[1:], 0], strict=True):
        A, B = alphas[t], alphas[after]
        found = [move * (B / A).sqrt() for move in found]
        found.append(((1 - B).sqrt() - (B * (1 - A) / A).sqrt()).abs())
    return found


def test_the_steps_that_are_made_and_those_that_train(quick, seen):
    """Times of the rollout with both branches in a batch, then those of walking back, branch by branch."""
    cfg = replace(quick, num_inference_steps=5, guidance_scale=2.0)
    alphas, spaced = alphas_of(cfg)
    moves = leverage(alphas, times := spaced["trailing"])
    strongest = sorted(sorted(range(5), key=lambda i: moves[i])[-2:], reverse=True)
    trained = {"auto": [4, 3], "last": [4, 3], "spread": [4, 0], "strongest": strongest}
    assert len({str(steps) for steps in trained.values()}) == 3
    for kind, steps in trained.items():
        seen.forget()
        go(cfg, backprop_steps=2, grad_steps=kind)
        made = [(t, len(x), graph) for x, t, graph in seen.denoised]
        assert made == [(t, 4, False) for t in times] + [(times[i], 2, True) for i in steps for _ in range(2)]
        needed = [x.requires_grad for x, _, graph in seen.denoised[5:]]
        assert needed == [True, True, False, False]  # nothing is before the earliest


def test_the_spacing_is_the_scheduler_s(quick, seen):
    for spacing, times in alphas_of(quick)[1].items():
        seen.forget()
        go(quick, timestep_spacing=spacing)
        assert [t for _, t, graph in seen.denoised if not graph] == times


# ---- The gradient ------------------------------------------------------------------------------------------
def gradient_of(cfg, seen, own=None, **changes):
    """The gradient of the first update, not shortened."""
    seen.forget()
    go(cfg, own, **dict(max_grad_norm=1e9) | changes)
    return seen.gradients[0]


def near(one, other, share=1e-3):
    return (one - other).norm() < share * other.norm()


def test_the_unconditional_branch_can_be_left_out(quick, seen):
    whole = gradient_of(quick, seen)
    assert [len(x) for x, _, graph in seen.denoised if graph] == [2, 2]
    seen.forget()
    assert not near(gradient_of(quick, seen, detach_uncond=True), whole, 0.05)
    assert [len(x) for x, _, graph in seen.denoised if graph] == [2]


def test_the_gradient_through_inputs_is_coupled(quick, seen):
    """With two steps it is linear in the coupling."""
    none, half, whole = (gradient_of(quick, seen, backprop_steps=2, coupling=c) for c in (0.0, 0.5, 1.0))
    assert near(2 * half, none + whole) and not near(none, whole, 1e-2)


def test_the_first_update_is_adamw_s(quick, seen):
    """Loshchilov & Hutter 2019, alg. 2: both moments are corrected to g and g^2."""
    for lr, decay in ((1e-2, 0.01), (1e-2, 5.0), (1e-3, 0.0)):
        seen.forget()
        go(quick, lr=lr, weight_decay=decay)
        (before, after), (gradient,) = seen.weights, seen.gradients
        expected = before * (1 - lr * decay) - lr * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-8)
        assert (before != 0).any() and (gradient != 0).any()


def test_long_gradients_are_shortened(quick, seen):
    """To max_grad_norm, in the same direction; the norm before is logged."""
    rows, _ = go(quick, max_grad_norm=1e9)
    whole, norm = seen.gradients[0], rows[0]["grad_norm"]
    assert whole.norm().item() == pytest.approx(norm, rel=1e-4)
    for most, kept in ((norm * 2, 1.0), (norm / 10, 0.1)):
        seen.forget()
        rows, _ = go(quick, max_grad_norm=most)
        assert rows[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)
        assert near(seen.gradients[0], kept * whole, 0.01)


def test_batches_of_an_update_are_averaged(quick, seen):
    """The first counts twice and the second nothing: the mean is the first. Then the other way round."""

    def weighing(*weights):
        calls = []

        def reward(frames, prompts):
            calls.append(frames)
            return light(frames, prompts) * (1, *weights)[len(calls) - 1]  # the first is a probe

        return reward

    rows = []
    for weights in ((1.0,), (2.0, 0.0), (0.0, 2.0), (1.0, 1.0)):
        rows += go(quick, weighing(*weights), max_grad_norm=1e9, grad_accum=len(weights))[0]
    single, first, second, both = seen.gradients
    assert near(first, single) and not near(second, single, 0.05) and near(2 * both, first + second)
    assert rows[1]["reward"] == pytest.approx(rows[0]["reward"], rel=1e-5)
    assert 2 * rows[3]["reward"] == pytest.approx(rows[1]["reward"] + rows[2]["reward"], rel=1e-5)


def test_the_lora_is_as_told(quick, seen):
    found = []
    for told, alpha in ((dict(lora_rank=3), 3), (dict(lora_rank=3, lora_alpha=6), 6)):
        seen.forget()
        _, out = go(quick, max_grad_norm=1e9, lora_targets="to_q, to_v", **told)
        config, matrices = json.loads((out / "lora" / "adapter_config.json").read_text()), lora_of(out)
        assert (config["r"], config["lora_alpha"]) == (3, alpha)
        assert {name.split(".")[-3] for name in matrices} == {"to_q", "to_v"}
        assert all(3 in matrix.shape for matrix in matrices.values())
        found.append(seen.gradients[0])
    assert near(found[1], 2 * found[0])  # of lora_B, which begins at 0: alpha / rank of it


# ---- Noise -------------------------------------------------------------------------------------------------
def test_evaluation_has_noise_of_its_own_each_time_the_same(quick, seen, monkeypatch):
    """Other than all that is trained on, by two processes (here one after the other), and other by video."""
    how = dict(num_inference_steps=1, guidance_scale=1.0)  # so the denoiser is given the noise alone
    how |= dict(num_frames=5, steps=2, eval_every=1, eval_videos=3, grad_accum=2, batch_size=2)
    trained, evaluated = [], []

    def reward(frames, prompts):
        for x, _, graph in seen.denoised:
            if not graph:
                (trained if frames.requires_grad else evaluated).extend(x)
        seen.forget()
        return light(frames, prompts)

    reward.frames = "all"
    for name in ("init_process_group", "all_gather_object", "all_reduce", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *args, **kwargs: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        go(quick, reward, **how)
    assert len(evaluated) == 3 * 3 and len(trained) == 2 * 2 * 2 * 2
    first, others = evaluated[:3], evaluated[3:]  # the first process makes one video of three
    assert all(torch.equal(x, first[0]) for x in first)
    assert all(map(torch.equal, others[2:], others[:4]))
    drawn = torch.stack(evaluated[2:5] + trained).flatten(1)
    alike = torch.corrcoef(drawn) - torch.eye(len(drawn))
    assert alike.abs().max() < 0.3  # of 480 numbers: more than six standard deviations
