"""Gold against proxy, alarms, the headline: their arithmetic, a short run of each, the README's rows."""

import csv
import json
from dataclasses import replace

import alarms
import gold
import headline
import judges
import numpy as np
import pytest
import tables
import torch

import rewards
import vader
from conftest import PROMPTS, gradients, load
from extras import lora_scale, strength
from vader import HERE


def table(name: str) -> list[dict]:
    with open(HERE / "bench" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def cells() -> list[list[str]]:
    lines = (HERE / "bench" / "README.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


# ---- Alarms ------------------------------------------------------------------------------------------------
def test_the_simulated_choice_is_that_of_the_trainer(settings):
    """The last of looks by rising reward at which no judge is below the base by so many errors."""
    draw = np.random.default_rng(0)
    assert alarms.PLACES[0] == 0 and (np.diff(alarms.PLACES) > 0).all()
    last = len(alarms.PLACES) - 1
    unharmed = alarms.choose(draw, 16, 1, 1.0, 0.0)
    assert unharmed.shape == (alarms.RUNS,) and 0.1 < (unharmed < last).mean() < 0.2  # of a t test: 0.16
    assert (alarms.choose(draw, 16, 1, 100.0, 0.0) == last).all()
    harmed = alarms.choose(draw, 64, 2, 1.0, 3.0)
    assert (harmed < last).all() and alarms.PLACES[harmed].mean() < 0.55
    assert strength.ERRORS in alarms.ERRORS and len(strength.STRENGTHS) == 3


def test_the_readme_has_rows_of_the_alarms():
    stored = [list(row.values()) for row in table("alarms")]
    named = [row for row in cells() if row in stored]
    assert len(named) >= 9
    assert str(strength.ERRORS) in {row["standard errors"] for row in table("alarms")}


# ---- Ways --------------------------------------------------------------------------------------------------
def test_a_distance_adds_the_gradient_of_a_square(settings):
    """Beside autograd through one call of the denoiser; without weight it adds nothing."""
    grads = []
    for estimator in (vader.walk_back, gold.stay_near(0.0), gold.stay_near(2.0)):
        run = load(replace(settings, guidance_scale=1.0))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vader, "walk_back", estimator)
            vader.micro_batch(run, PROMPTS[:2], 0, 0)
        grads.append(gradients(run))
    assert torch.allclose(grads[0], grads[1], atol=1e-7) and not torch.allclose(grads[0], grads[2], atol=1e-4)

    run = load(replace(settings, guidance_scale=1.0))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vader, "walk_back", lambda *args: seen.append(args))
        vader.micro_batch(run, PROMPTS[:2], 0, 0)
    _, batch, latents, _ = seen[0]
    i = batch.trained[0]
    x, t = run.schedule.c[i] * latents[i], run.schedule.t[i]
    with torch.no_grad(), lora_scale.at_strength(run.model, 0.0):
        base = run.model.denoise(x, t, batch.cond)
    loss = 2.0 * batch.loss_scale * ((run.model.denoise(x, t, batch.cond) - base) ** 2).mean()
    loss.backward()
    torch.testing.assert_close(grads[2] - grads[0], gradients(run), rtol=1e-3, atol=1e-6)


def test_a_random_number_of_last_steps_trains(settings, monkeypatch):
    run, trained = load(settings), []
    monkeypatch.setattr(gold.random_steps, "__defaults__", (lambda *a: trained.append(a[1].trained),))
    monkeypatch.setattr(vader, "walk_back", gold.random_steps)
    for step in range(12):
        vader.micro_batch(run, PROMPTS[:1], step, 0)
    T = settings.num_inference_steps
    assert all(steps == list(range(T - len(steps), T)) for steps in trained)
    assert len({len(steps) for steps in trained}) > 2


@pytest.mark.slow
def test_a_way_is_trained_and_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(gold, "RUNS", tmp_path / "gold")
    monkeypatch.setattr(gold, "MARKS", (1, 2))
    monkeypatch.setattr(vader, "read_prompts", lambda path, read=vader.read_prompts: read(path)[:6])
    rows = gold.measure("aesthetic", "nothing", 0)
    places = [(row["update"], row["strength"]) for row in rows]
    assert places == [(0, 0.0), (1, 1.0), (2, 1.0), (2, 0.25), (2, 0.5), (2, 0.75)]
    assert rows[0]["values"].keys() == {"aesthetic", "clip", "hps", *judges.WORDS}
    assert all(len(values) == 6 for row in rows for values in row["values"].values())
    assert rows[0]["values"]["aesthetic"] != rows[2]["values"]["aesthetic"]
    assert gold.measure("aesthetic", "nothing", 0) == json.loads(json.dumps(rows))  # read, not made again
    made = gold.table_rows(("aesthetic", "nothing", 0), rows)
    assert made[0]["clip gain"] == "0.0000" and float(made[2]["aesthetic error"]) > 0


def test_seeds_are_pooled():
    rows = [{"clip gain": "0.1", "clip error": "0.03"}, {"clip gain": "0.3", "clip error": "0.04"}]
    assert tables.pooled(rows, "clip") == (pytest.approx(0.2), pytest.approx(0.025))
    values = {"colour": [1, 0], "object": [1, 0], "motion": [1, 0], "place": [0, 0]}
    assert tables.as_told(values) == [0.75, 0.0]


def test_the_readme_has_the_gold_that_was_measured():
    stored = {tuple(line.values())[1:] for line in gold.summary(table("gold"))}
    stored = {tuple(map(str, line)) for line in stored}
    named = [row for row in cells() if tuple(row) in stored]
    assert len(named) >= 10


def test_the_readme_has_the_headline_that_was_measured():
    rows = table("headline")
    assert {row["seed"] for row in rows} == {"0", "1", "2"}
    text = (HERE / "bench" / "README.md").read_text()
    for row in rows:
        figures = [cell for name, cell in row.items() if name not in ("seed", "seconds")]
        assert all(cell in text for cell in figures), row
    assert headline.VIDEOS == 64


def test_the_readme_has_the_gold_of_each_method():
    rows = table("reached_gold")
    assert {(row["reward"], row["seeds"]) for row in rows} == {("aesthetic", "3"), ("hps", "3")}
    for row in rows:
        del row["seeds"]
        assert [f"`{row['reward']}`", *list(row.values())[1:]] in cells()


def test_the_readme_has_every_reward_driven_too_far():
    rows = table("gamed")
    assert {row["reward"].partition(":")[0] for row in rows} == set(rewards.REWARDS)
    assert all(list(row.values()) in cells() for row in rows)
