"""What README.md and models/README.md say: their recipes run, their commands parse, their lines are short."""

import re
import shlex
import sys
import types
from dataclasses import replace

import diffusers
import pytest
import torch

import rewards
import vader
from conftest import checked
from vader import HERE

README, MODELS, BENCH = ("README.md", "models/README.md", "bench/README.md")


def read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def block(name: str, word: str) -> str:
    """The first block of Python of a README that has the word in it."""
    blocks = re.findall(r"^```python\n(.*?)^```$", read(name), flags=re.S | re.M)
    return next(text for text in blocks if word in text)


def updates(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "eval" not in row]


# ---- Recipes -----------------------------------------------------------------------------------------------


def test_own_estimator_of_the_readme(settings, monkeypatch):
    """It trains, and at each batch the step that it drew, with the gradient that `walk_back` has for that."""
    trained, exact = [], vader.walk_back
    code = block(README, "exact=vader.walk_back")
    name = re.search(r"`vader\.walk_back = (\w+)`", read(README)).group(1)

    def watched(run, batch, latents, g):
        trained.append(batch.trained)
        exact(run, batch, latents, g)

    assert len(code.splitlines()) <= 10
    monkeypatch.setattr(vader, "walk_back", watched)
    space = {"vader": vader, "torch": torch}
    exec(code, space)
    monkeypatch.setattr(vader, "walk_back", space[name])
    rows = updates(vader.train(replace(settings, steps=6, eval_videos=0)))
    assert len(trained) == 6 and len({step for (step,) in trained}) > 1
    assert all(0 <= step < settings.num_inference_steps for (step,) in trained)
    assert all(row["grad_norm"] > 0 for row in rows)


def test_own_optimiser_of_the_readme(loaded):
    expression = re.search(r"`(torch\.optim\.\w+\(.*\))`", read(README)).group(1)
    optimizer = eval(expression, vars(vader) | {"run": loaded})
    (group,) = optimizer.param_groups
    assert group["lr"] == loaded.cfg.lr and len(group["params"]) == len(vader.lora_parameters(loaded.model))


@pytest.fixture
def own_family(small, monkeypatch):
    """The family of models/README.md, listed as it is told there, and loading the small checkpoint."""
    code = block(MODELS, "class Mine")
    line = re.search(r'`("models\.mine\.Mine": .*?,)`', read(MODELS)).group(1)
    module = types.ModuleType("models.mine")
    exec(code, vars(module))
    monkeypatch.setitem(module.Mine.presets["mine"], "source", small)
    monkeypatch.setitem(sys.modules, "models.mine", module)
    for path, names in eval("{" + line + "}").items():
        monkeypatch.setitem(vader.FAMILIES, path, names)
    vader.find_model.cache_clear()
    yield module.Mine
    vader.find_model.cache_clear()


def test_own_family_of_the_readme(own_family, settings, small):
    """Its defaults count, its sampler is the one that is told, and it trains."""
    cfg = replace(settings, model="mine", num_inference_steps=None, lr=None, steps=2)
    full = checked(cfg)
    assert (full.num_inference_steps, full.lr, full.guidance_scale) == (15, 1e-4, 3.0)
    scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(
        small, subfolder="scheduler", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(15)
    schedule = vader.make_model(full).schedule(full)
    steps = scheduler.sigmas.diff().tolist()
    assert schedule.b == pytest.approx(steps, rel=1e-4) and schedule.a == pytest.approx([1] * 15, rel=1e-4)
    with pytest.raises(rewards.BadInput, match="--eta"):
        checked(replace(cfg, eta=0.5))
    rows = vader.train(cfg)
    assert [row["grad_norm"] > 0 for row in updates(rows)] == [True, True]
    assert rows[-1]["eval"]["reward"] != rows[0]["eval"]["reward"]


# ---- Commands, names, lines --------------------------------------------------------------------------------


@pytest.mark.parametrize("name, least", [(README, 7), (MODELS, 1), (BENCH, 4)])
def test_every_command_of_the_readmes_parses(name, least):
    text = read(name).replace("\\\n", " ")
    commands = set(re.findall(r"vader\.py (--.*?)(?:#|`|\n|$)", text)) - {"--help"}
    assert len(commands) >= least
    for words in commands:
        cfg = vader.parse_args(shlex.split(words))
        names = [key for keys in vader.FAMILIES.values() for key in keys]
        assert cfg.model == "auto" or cfg.model in names
        for _, reward, _ in rewards.parse(cfg.reward):
            assert reward in rewards.REWARDS
        assert (HERE / cfg.prompts).is_file()


@pytest.mark.parametrize("name", [README, MODELS, BENCH])
def test_every_file_that_a_readme_names_is_there(name):
    text, folder = read(name), (HERE / name).parent
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert links
    for link in links:
        assert (folder / link).exists(), link
    named = re.findall(r"(?<![\w/.])((?:bench|extras|models|tiny)/[\w/.-]+\.(?:py|txt|jsonl|csv|png))", text)
    for path in {*named} - {"models/mine.py"}:  # the reader's
        assert (HERE / path).is_file(), path


def test_every_flag_that_a_readme_names_is_one():
    flags = {f"--{name}" for name in vars(vader.Config())} | {"--help"}
    flags |= {"--vram", "--nproc_per_node"}  # of bench/memory.py and of torchrun
    for name in (README, MODELS):
        found = set(re.findall(r"(?<![\w-])--[a-z]\w+", read(name)))
        assert found <= flags, found - flags


def test_the_readme_is_short():
    for name in (README, MODELS):
        lines = read(name).splitlines()
        long = [line for line in lines if len(line) > 110 and not line.startswith(("|", "python3 -m venv"))]
        assert not long
    assert len(read(README).splitlines()) <= 150


def test_the_readmes_list_every_reward_and_every_model():
    cells = [line.split("|")[1] for line in read(README).splitlines() if line.startswith("| `")]
    listed = {name.split(":")[0] for cell in cells for name in re.findall(r"`(.*?)`", cell)}
    assert listed - {"--reward"} == rewards.REWARDS.keys()
    models = {key for keys in vader.FAMILIES.values() for key in keys if not key.endswith("Pipeline")}
    for name in (README, MODELS):
        assert models <= set(re.findall(r"`([\w.-]+)`", read(name))), name
