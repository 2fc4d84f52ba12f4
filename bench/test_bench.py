"""Tests of bench/: the tables of the READMEs, the memory plan, the baselines, the studies on short runs."""

import csv
import dataclasses
import functools
import json
import math
from pathlib import Path
from unittest import mock

import ddpo
import dpo
import efficiency
import estimators
import fake
import generalise
import imageio.v3 as iio
import memory
import methods
import numpy as np
import pytest
import reference
import strip
import tables
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel
from hours import Work, hours
from torch.utils.flop_counter import FlopCounterMode
from transformers import VJEPA2Model

import rewards
import vader
from conftest import PROMPTS, batch, gradients, load
from extras import quick
from vader import Config, Prompt

HERE = Path(__file__).resolve().parent

TINY, TOY = HERE.parent / "tiny" / "t2v", str(HERE.parent / "tiny" / "rewards")


# ---- The tables of the READMEs are the measured ones -------------------------------------------------------


def table(name: str) -> list[dict]:
    with open(HERE / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def cells_of(readme: Path) -> list[list[str]]:
    """The tables of a README: a list of cells for each line."""
    lines = readme.read_text(encoding="utf-8").splitlines()
    return [[cell.strip(" `*") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]


def test_the_tables_of_the_results_are_the_measured_ones():
    cells = cells_of(HERE / "README.md")
    for row in table("rewards"):
        numbers = [f"{float(row['gain']):+.3f}" if name == "gain" else row[name] for name in
                   ("base", "tuned", "gain", "error")]  # fmt: skip
        assert [row["reward"], *numbers] in [line[:5] for line in cells]
    for row in table("reference"):
        megabytes = [row[name] for name in ("one graph MB", "cut MB", "cut and checkpointed MB")]
        ratio = f"{row['seconds ratio']} ({row['from']} to {row['to']})"
        assert [row["K"], row["gradient difference"], *megabytes, ratio] in cells
    for row in table("reached"):
        assert [row[name] for name in row if name != "seeds"] in cells and row["seeds"] == "3"
    assert all(list(row.values()) in cells for row in table("scales") if row["trained on"] == "aesthetic")


def test_the_table_of_estimators_is_the_measured_one():
    cells, ways = cells_of(HERE / "README.md"), {}
    for row in sorted(table("estimators"), key=lambda row: (row["reward"], row["seed"])):
        ways.setdefault(row["way"], []).append(row)
    for way, rows in ways.items():
        ranges = []
        for name in ("updates", "motion", "diversity"):
            values = sorted((row[name] for row in rows), key=float)
            ranges.append(f"{values[0]} to {values[-1]}")
        assert [way, *(f"{float(row['gain']):+.3f} ({row['error']})" for row in rows), *ranges] in cells
        for row in rows:
            gold = [row[name] for name in ("aesthetic", "clip", "hps", "as told")]
            assert all(gold) and [way, row["reward"], row["seed"], *gold] in cells


@pytest.mark.parametrize(
    "name, keys, columns",
    [
        ("generalise", ("reward", "seed"), ("trained on", "unseen combinations", "unseen words")),
        ("prompts", ("reward", "trained on"), generalise.PARTS),
    ],
)
def test_the_tables_of_unseen_prompts_are_the_measured_ones(name, keys, columns):
    cells, runs = cells_of(HERE / "README.md"), {}
    for row in table(name):
        gains = runs.setdefault(tuple(row[key] for key in keys), {})
        gains.setdefault(row["prompts"], []).append(f"{float(row['gain']):+.3f} ({row['error']})")
    for run, gains in runs.items():
        assert [*run, *(", ".join(gains.get(column, ["not run"])) for column in columns)] in cells
    assert runs


def test_the_models_of_the_readme_have_their_predicted_peaks():
    cells = cells_of(HERE.parent / "models" / "README.md")
    peaks = {(row["model"], row["reward"], row["offload"]): row["peak"] for row in table("memory")}
    assert {model for model, *_ in peaks} == {*memory.MODELS, *memory.LARGE}
    for model in (*memory.MODELS, *memory.LARGE):
        said = []
        for offload in ("no", "yes"):
            peak = peaks.get((model, "hps", offload))
            said.append(f"{float(peak):.1f}" if peak else "")
        rows = [row for row in table("memory") if (row["model"], row["reward"]) == (model, "hps")]
        updates = vader.resolve(Config(model=model, reward="hps")).steps
        columns = ("TFLOP an update", "million launches", "GB moved")
        work = Work(*({"all": float(rows[0][column])} for column in columns))
        predicted = hours(work, updates)["RTX 4060 Ti"]
        assert [model, f"{predicted:.1f}", *said] in [[line[0], *line[-3:]] for line in cells]
    for model in memory.MODELS:
        assert peaks.keys() > {(model, reward, "no") for reward in ("aesthetic", "vjepa")}


def test_the_table_of_the_gpu_is_the_measured_one():
    cells = cells_of(HERE / "README.md")
    assert all([*row.values()] in cells for row in table("gpu"))
    rows = [row for row in table("gpu") if row["allocated"]]
    assert all(abs(float(row["allocated"]) / float(row["predicted"]) - 1) < 0.05 for row in rows)


# ---- Memory ------------------------------------------------------------------------------------------------


def slow(*values):
    """Parameters whose tests are slow."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def planned(capsys, *words):
    """Exit code and the printed gigabytes of memory.py."""
    code = memory.main(words)
    lines = [line.rsplit(" GB", 1)[0].rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    return code, {line[0].strip(): float(line[1]) for line in lines if len(line) == 2 and "." in line[1]}


@pytest.mark.slow
def test_the_plan_of_modelscope_is_the_table_s_and_adds_up(capsys, monkeypatch):
    """Its peaks by phase and the operations of an update, to the last digit that is written."""
    chosen = ["modelscope", "aesthetic", "no"]
    (stored,) = (row for row in table("memory") if [*row.values()][:3] == chosen)
    found = memory.predict(Config(model=chosen[0], reward=chosen[1], watch="none"), work := Work())
    assert {name: f"{size:.2f}" for name, size in found.items()}.items() <= stored.items()
    assert f"{sum(work.operations.values()):.0f}" == stored["TFLOP an update"]
    # U-Net 1.41, VAE decoder and encoder 0.08, CLIP ViT-L/14 vision 0.30 thousand million weights in bf16,
    # LoRA in float32
    assert 3.5 < found["all weights"] < 3.8
    assert 0.5 < found["walk back"] - found["all weights"] < 2
    assert planned(capsys, "--model", "some/where")[0] == 2
    monkeypatch.setattr(memory, "predict", lambda cfg, work: found)
    code, printed = planned(capsys, "--model", chosen[0], "--reward", chosen[1], "--vram", "4")
    assert code == 1 and max(printed.values()) == printed["walk back"]


@pytest.mark.parametrize("name", ["svd", *slow("wan", "animatediff", "cogvideox", "ltx")])
def test_plan_follows_every_family(name, checkpoints):
    """On small checkpoints: their weights are counted, with 2 bytes each, 4 in the LoRA."""
    size = dict(num_frames=9, height=64, width=64)
    cfg = Config(model=str(checkpoints(name)), reward="colorful", watch="none", **size)
    found = memory.predict(cfg)
    cfg, _ = memory.resolve(cfg)
    model = vader.make_model(dataclasses.replace(cfg, dtype="fp32"))
    model.load()
    vader.add_lora(model, cfg)
    parameters = [p for part in (model.denoiser, model.vae) for p in part.parameters()]
    weights = sum(p.numel() * (4 if p.requires_grad else 2) for p in parameters)
    assert weights <= 1e9 * found["all weights"] < weights + 4e5  # the prompts' conditioning and the noise
    assert found["walk back"] > found["all weights"] and min(found.values()) > 0


@pytest.mark.parametrize("reward", ["remove:star", *slow("hps + 0.5*colorful")])
def test_plan_follows_rewards_and_offloading(reward):
    size = dict(model="tiny", dtype="bf16", num_frames=2, guidance_scale=1)
    cfg = Config(reward=reward, reward_weights=TOY, watch="none", **size)
    found, offloaded = (memory.predict(dataclasses.replace(cfg, offload=on)) for on in (False, True))
    terms = rewards.make_terms(reward, "cpu", torch.float32, TOY)
    networks = [network for _, term in terms.values() for network in getattr(term, "networks", ())]
    networks.append(AutoencoderKL.from_pretrained(TINY / "vae"))
    scoring = sum(p.numel() for network in networks for p in network.parameters())
    denoiser = sum(p.numel() for p in UNet3DConditionModel.from_pretrained(TINY / "unet").parameters())
    saved = {name: 1e9 * (found[name] - offloaded[name]) for name in found}
    # what waits on the host, at 2 bytes a weight; the LoRA goes with the denoiser
    assert round(saved["rollout"]) == round(saved["walk back"]) == pytest.approx(2 * scoring, rel=0.05)
    assert 1.1 * 2 * denoiser < saved["score"] < 1.5 * 2 * denoiser  # and of its graph the blocks' inputs


MINE = """
from models.wan import Wan
class Mine(Wan):
    presets = {"mine": Wan.wan | dict(source=SOURCE, num_frames=9, height=64, width=64)}
"""


def test_plan_takes_a_reward_and_a_model_that_were_just_added(checkpoints, monkeypatch, tmp_path):
    """Neither is known to memory.py: a reward with a network of its own, a family in a file of its own."""
    encoder = VJEPA2Model.from_pretrained(f"{TOY}/vjepa").encoder

    def make_mine(device, dtype, weights=None):
        network = VJEPA2Model.from_pretrained(f"{TOY}/vjepa", dtype=dtype).encoder
        network = rewards.frozen(network, device, dtype)

        def reward(frames, prompts):
            return network(frames.to(dtype)).last_hidden_state.float().mean((1, 2))

        reward.frames, reward.networks = 8, [network]
        return reward

    (tmp_path / "mine.py").write_text(MINE.replace("SOURCE", repr(str(checkpoints("wan")))))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(vader.FAMILIES, "mine.Mine", ("mine",))
    monkeypatch.setitem(rewards.REWARDS, "mine", make_mine)
    own, plain = (
        memory.predict(Config(model="mine", reward=name, watch="none")) for name in ("mine", "colorful")
    )
    expected = 2 * sum(p.numel() for p in encoder.parameters())
    assert 1e9 * (own["all weights"] - plain["all weights"]) == pytest.approx(expected, rel=0.01)
    assert own["score"] > plain["score"]


def test_operations_are_those_of_a_real_update(settings):
    """Against PyTorch's own counter over an update that computes, on the small model."""
    cfg = dataclasses.replace(settings, checkpointing=True, backprop_steps=2, grad_accum=3)
    memory.predict(dataclasses.replace(cfg, dtype="fp32"), work := Work())
    with mock.patch.object(quick, "install"):  # the plan has the LoRA apart
        run, found = load(cfg), {}
    parts = {"rollout": "sampling", "score": "score", "walk_back": "walk back"}

    def counting(name):
        function = getattr(vader, name)

        def run(*args):
            with FlopCounterMode(display=False) as counter:
                result = function(*args)
            found[parts[name]] = 3 * counter.get_total_flops() / 1e12
            return result

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in parts:
            patch.setattr(vader, name, counting(name))
        vader.micro_batch(run, PROMPTS, 0, 0)
    assert work.operations == pytest.approx(found, rel=0.01)
    assert work.operations["sampling"] > work.operations["score"]
    assert sum(work.moved.values()) == 0  # without --offload


def test_hours_are_operations_over_a_card_s_pace_launches_and_what_moves():
    launches = {"sampling": 1.0, "walk back": 0.5}
    found = hours(Work({"sampling": 900.0, "walk back": 100.0}, launches, {"score": 24.0}), 36)
    assert found["A100"] == pytest.approx((1000 / (312 * 0.4) + 57 + 2) * 36 / 3600)  # 1.5 million of 38e-6 s


@pytest.mark.parametrize("reward", ["colorful", "remove:star"])
def test_with_offload_networks_and_the_inputs_of_blocks_move(reward, settings):
    """There and back: the denoiser and what scores, for each micro-batch; the rest with each step."""
    cfg = dataclasses.replace(settings, offload=True, checkpointing=True, dtype="bf16", grad_accum=3)
    cfg = dataclasses.replace(cfg, reward=reward, reward_weights=TOY)
    memory.predict(cfg, once := Work())
    memory.predict(dataclasses.replace(cfg, backprop_steps=2), twice := Work())
    run = load(dataclasses.replace(cfg, dtype="fp32"))
    networks = [run.model.denoiser, run.model.vae]
    for _, term in run.terms.values():
        networks += getattr(term, "networks", ())
    weights = [p.numel() * (4 if p.requires_grad else 2) for n in networks for p in n.parameters()]
    assert once.moved["networks"] == pytest.approx(3 * 2 * sum(weights) / 1e9)
    assert once.moved["sampling"] == 0 < once.moved["score"]
    assert twice.moved["walk back"] == pytest.approx(2 * once.moved["walk back"])


def peak_of_an_update(cfg):
    run = load(cfg)
    with fake.LiveStorages() as live:
        vader.micro_batch(run, PROMPTS, 0, 0)
    return live.peak


def test_peak_memory_is_flat_in_trained_steps_and_decoded_frames(settings):
    settings = dataclasses.replace(settings, checkpointing=True)
    ways = dict(
        base={},
        all_steps=dict(backprop_steps=4),
        all_frames=dict(decode_frames=5),
        at_once=dict(decode_frames=5, decode_chunk=5),
        plain=dict(checkpointing=False),
    )
    peaks = {name: peak_of_an_update(dataclasses.replace(settings, **way)) for name, way in ways.items()}
    print("peak MB:", {name: round(peak / 1e6, 2) for name, peak in peaks.items()})
    assert peaks["base"] > 100_000
    assert peaks["all_steps"] < 1.05 * peaks["base"] and peaks["all_frames"] < 1.05 * peaks["base"]
    assert peaks["plain"] > 1.3 * peaks["base"]


@pytest.mark.parametrize("kind", ["wan", "svd"])
def test_measuring_makes_updates_from_configs(kind, checkpoints, monkeypatch):
    """On the CPU, where nothing is measured but seconds; weights have content and the LoRA learns."""
    runs, real = [], vader.update
    monkeypatch.setattr(vader, "update", lambda run, *rest: runs.append(run) or real(run, *rest))
    size = dict(height=32, width=32, num_frames=5, num_inference_steps=2)
    cfg = Config(model=str(checkpoints(kind)), reward="aesthetic", reward_weights=TOY, **size)
    row = memory.measure(cfg, device="cpu", updates=2)
    assert row["seconds per update"] > row["seconds"]["update"] > row["seconds"]["rollout"] > 0
    assert len(runs) == 2
    learned = [p for name, p in vader.lora_parameters(runs[0].model).items() if "lora_B" in name]
    assert all(p.isfinite().all() for p in learned) and any(p.abs().max() > 0 for p in learned)


# ---- Baselines ---------------------------------------------------------------------------------------------


@pytest.fixture
def noisy(settings):
    """A small run with DDPO's sampler and groups of videos of one prompt."""
    return load(dataclasses.replace(settings, eta=1.0, batch_size=3, grad_accum=2), randomise=False)


def test_ddpo_log_prob_is_that_of_the_noise_drawn(noisy):
    one = ddpo.collect(noisy, PROMPTS[0], 0)
    generator = vader.generator_for(noisy.cfg.seed, "ddpo", 0)
    shape = one["latents"][0].shape
    torch.randn(shape, generator=generator)  # where the video starts
    for i in range(3):
        drawn = torch.randn(shape, generator=generator).double()
        scale = noisy.schedule.s[i]
        expected = torch.distributions.Normal(0, scale).log_prob(scale * drawn).sum((1, 2, 3, 4))
        with torch.no_grad():
            found = ddpo.log_prob(noisy, one["batch"], i, *one["latents"][i : i + 2])
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)


def test_ddpo_starts_at_ratio_one_with_the_gradient_of_reinforce(noisy):
    one = ddpo.collect(noisy, PROMPTS[0], 0)
    good, found = ddpo.advantages(one["rewards"]), []
    assert good.mean().abs() < 1e-5 and good.std() > 0.9
    for reinforce in (False, True):
        for i in range(3):
            pair = one["latents"][i : i + 2]
            with torch.no_grad():
                old = ddpo.log_prob(noisy, one["batch"], i, *pair)
            new = ddpo.log_prob(noisy, one["batch"], i, *pair)
            assert torch.equal((new - old).exp(), torch.ones(3))
            loss = -(new * good).mean() if reinforce else ddpo.ppo_loss(new, old, good)
            loss.backward()
        found.append(gradients(noisy))
    assert found[1].norm() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


def test_ppo_stops_where_the_ratio_has_gone_far_enough():
    new = torch.tensor([1.0, 1.0, -1.0, -1.0], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    ddpo.ppo_loss(new, torch.zeros(4), advantage).backward()
    assert (new.grad != 0).tolist() == [False, True, True, False]


def test_dpo_starts_at_log_two_and_falls_on_a_fixed_pair(settings):
    run = load(settings, randomise=False)
    better, worse, cond, values = dpo.collect(run, PROMPTS, 0)
    one, other = values.chunk(2)
    video = torch.cat([run.model.decode(torch.cat([better, worse]), [n]) for n in range(5)], dim=1)
    texts = [prompt.text for prompt in [*PROMPTS, *PROMPTS]]
    ordered = rewards.weighted_rewards(run.terms, video, texts)["reward"]
    torch.testing.assert_close(ordered, torch.cat([torch.maximum(one, other), torch.minimum(one, other)]))
    config = vader.read_config(run.cfg.model, "scheduler/scheduler_config.json")
    scheduler = DDIMScheduler.from_config(config)
    noise = torch.randn(better.shape, generator=torch.Generator().manual_seed(2))
    optimizer, losses = vader.make_optimizer(run), []
    for _ in range(5):
        loss = dpo.dpo_loss(run.model, scheduler, better, worse, noise, 500, cond)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0] - 0.01


def light(frames, prompts):
    return frames.mean((1, 2, 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddpo", "dpo"])
def test_the_baselines_raise_an_easy_reward(kind, settings):
    # a random denoiser will not do: DPO makes it better at what it is bad at everywhere
    changes = dict(model="tiny", num_frames=2, height=32, width=32, guidance_scale=1.0, lr=1e-3)
    changes |= dict(eta=1.0, batch_size=16) if kind == "ddpo" else dict(batch_size=8)
    run = load(dataclasses.replace(settings, **changes), randomise=False)
    run.terms, optimizer = {"light": (1.0, light)}, vader.make_optimizer(run)
    update = {"ddpo": ddpo.update, "dpo": functools.partial(dpo.update, draws=2, beta=500.0)}[kind]
    prompts = PROMPTS * 16
    before = light(vader.make_videos(run, prompts), None)
    rows = [update(run, PROMPTS, step, optimizer) for step in range(6)]
    gain = light(vader.make_videos(run, prompts), None) - before
    assert rows[0]["queries"] == 16
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5


# ---- Studies -----------------------------------------------------------------------------------------------


@pytest.fixture
def bench(settings, tmp_path, monkeypatch):
    """Settings of a run of the small model in seconds; the scripts' folders are elsewhere."""
    monkeypatch.setattr(methods, "RUNS", tmp_path / "efficiency")
    monkeypatch.setattr(methods, "VIDEOS", 3)
    monkeypatch.setattr(generalise, "RUNS", tmp_path / "generalise")
    size = dict(num_frames=3, height=16, width=16, num_inference_steps=4, guidance_scale=2.0)
    return dict(model=settings.model, reward_weights=TOY, **size, lora_rank=2)


def test_efficiency_goes_on_where_it_stopped_and_draws_its_figure(bench, tmp_path):
    changes = bench | dict(batch_size=2, grad_accum=1)
    for key, queries in (("whole", (8,)), ("parts", (4, 8))):
        for n in queries:
            method = methods.Method("DPO", methods.METHODS["dpo"].update, changes, n)
            rows = methods.train(key, method, "colorful", 0, marks=(0.5, 1))
        assert [row["queries"] for row in rows] == [0, 4, 8]
    files = [tmp_path / "efficiency" / key / "rows.json" for key in ("whole", "parts")]
    whole, parts = (json.loads(file.read_text()) for file in files)
    assert [row["values"] for row in whole] == [row["values"] for row in parts]
    assert whole[0]["values"] != whole[-1]["values"]
    found, keys = efficiency.table_rows(("dpo", "hps", 0), rows), ("method", "reward", "seed")
    target, picture = tmp_path / "table.csv", tmp_path / "figure.png"
    tables.merge(target, found, keys)
    merged = tables.merge(target, efficiency.table_rows(("dpo", "hps", 1), rows), keys)
    assert len(merged) == 6
    efficiency.figure(merged, picture)
    assert iio.imread(picture).std() > 1


def test_stills_show_a_row_per_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "RUNS", tmp_path)
    shades = torch.tensor([0.2, 0.8])
    for name, shade in zip(("dark", "light"), shades, strict=True):
        for n in range(8):
            vader.write_video(tmp_path / name / f"{n:03d}.mp4", shade.expand(3, 3, 16, 16), 8)
    efficiency.stills(("dark", "light"), tmp_path / "stills.png")
    picture = iio.imread(tmp_path / "stills.png") / 255
    assert picture.shape == (256, 8 * 128, 3)
    np.testing.assert_allclose([picture[:128].mean(), picture[128:].mean()], shades, atol=0.03)


def test_a_strip_has_the_first_and_the_last_evaluation(tmp_path):
    for name, shade in (("a", 0.2), ("b", 0.5), ("c", 0.8)):
        vader.append_metrics(Config(out=str(tmp_path)), {"step": 0, "eval": {"folder": name}})
        for n in range(6):
            vader.write_video(tmp_path / name / f"{n:03d}.mp4", torch.full((4, 3, 16, 16), shade), 8)
    picture = strip.picture_of(tmp_path) / 255
    assert picture.shape == (6 * 128, 6 * 128, 3)
    np.testing.assert_allclose([picture[:, :384].mean(), picture[:, 384:].mean()], [0.2, 0.8], atol=0.03)
    # and where there is a best/, the videos that did not choose it
    for n in range(6):
        vader.write_video(tmp_path / "d" / f"{8 + n:03d}.mp4", torch.full((4, 3, 16, 16), 0.4), 8)
    report = {"base": {"folder": "d"}, "best": {"folder": "d"}, "first": 8}
    (tmp_path / "strength.json").write_text(json.dumps({"best": {"step": 1}, "report": report}))
    np.testing.assert_allclose(strip.picture_of(tmp_path) / 255, 0.4, atol=0.03)


@pytest.mark.parametrize("way", [list(estimators.WAYS)[-1], *slow(*list(estimators.WAYS)[:-1])])
def test_every_estimator_runs(way, bench, monkeypatch):
    monkeypatch.setattr(estimators, "COMMON", bench | dict(batch_size=2, lr=1e-2))
    row = estimators.measure(way, "colorful", 0, seconds=0.01, samples=3, gold=False)
    assert row["updates"] == 1 and float(row["motion"]) > 0 and float(row["diversity"]) > 0
    (file,) = methods.RUNS.rglob("rows.json")
    first, last = json.loads(file.read_text())
    assert first["values"] != last["values"]


def test_redrawing_without_noise_is_the_last_step(settings, monkeypatch):
    """And `redraw` can stand in walk_back's place."""
    monkeypatch.setattr(estimators, "DRAWS", 1)
    # the drawn x is the one that the rollout came by
    monkeypatch.setattr(estimators, "renoise", lambda run, latents, generator: latents[-2])
    run = load(settings)
    one = batch(run, picks=[1])
    latents = vader.rollout(run, one)
    _, g = vader.score(run, one, latents[-1])
    vader.walk_back(run, one, latents, g)
    last_step = gradients(run)
    estimators.redraw(run, one, latents)
    torch.testing.assert_close(gradients(run), last_step, rtol=1e-4, atol=1e-7)
    assert last_step.norm() > 0
    monkeypatch.setattr(vader, "pick_latent_frames", lambda *_: [1])
    vader.micro_batch(run, PROMPTS, 0, 0)
    expected = gradients(run)
    monkeypatch.setattr(vader, "walk_back", estimators.redraw)
    vader.micro_batch(run, PROMPTS, 0, 0)
    torch.testing.assert_close(gradients(run), expected, rtol=1e-4, atol=1e-7)


@pytest.fixture
def small_study(bench, monkeypatch):
    study = dict(batch_size=2, lr=1e-2, grad_accum=1, steps=1)
    monkeypatch.setattr(generalise, "COMMON", bench)
    monkeypatch.setattr(generalise, "SETTINGS", {"aesthetic": study})
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


@pytest.mark.slow
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
    taught = {"few": known[:2], "many": known[:4], "half": strange[:2], "held-out": strange[:4]}
    for name, texts in taught.items():
        written = vader.read_prompts(str(generalise.RUNS / f"{name}.txt"))
        assert written == [Prompt(text) for text in texts]


def test_reference_finds_the_same_gradient_in_one_graph(settings):
    rows = reference.compare(dataclasses.replace(settings, checkpointing=False), (1, 2), pairs=1)
    assert [row["K"] for row in rows] == [1, 2]
    assert all(float(row["gradient difference"]) < 1e-4 for row in rows)
    assert float(rows[1]["cut and checkpointed MB"]) < float(rows[1]["one graph MB"])
