"""A mistake in code that people write keeps its traceback: a family, reward, estimator or optimiser."""

import itertools
import traceback
from dataclasses import replace
from pathlib import Path

import pytest

import rewards
import vader
from conftest import command
from extras import checkpoint
from rewards import BadInput

MISTAKES = {
    NameError: lambda: nosuch,  # noqa: F821 (the mistake)
    AttributeError: lambda: object().nosuch,
    TypeError: lambda: len(1),
    ValueError: lambda: int("x"),
}
METHODS = "variant build_on_meta schedule latent_shape latent_frame encode encode_text stock load recompute"
METHODS += " guidance denoise decode"


class Mine(vader.TextToVideoUNet):
    """A family as somebody writes it, in this file."""


def broken(mistake):
    """A function that makes this mistake, whatever it is given."""

    def method(*args, **kwargs):
        MISTAKES[mistake]()

    return method


def ends_in_the_mistake(mistake, run):
    """Does run() end in a traceback whose last line is that of the mistake?"""
    with pytest.raises(mistake) as raised:
        run()
    last = traceback.extract_tb(raised.value.__traceback__)[-1]
    return last.filename == __file__ and last.line.strip().startswith(f"{mistake.__name__}: lambda")


@pytest.fixture
def quick(settings, small, monkeypatch):
    """A Config whose model is Mine, of a short run that uses every method of a family."""
    monkeypatch.setitem(vader.FAMILIES, f"{__name__}.Mine", ("mine", "MinePipeline"))
    preset = vader.TextToVideoUNet.presets["tiny"] | dict(source=small)
    monkeypatch.setattr(Mine, "presets", {"mine": preset})
    vader.find_model.cache_clear()
    size = dict(num_frames=2, height=32, width=32, num_inference_steps=1, batch_size=1, eval_videos=0)
    yield replace(settings, model="mine", checkpointing=True, steps=1, guidance_scale=2.0, **size)
    vader.find_model.cache_clear()


def test_the_family_without_a_mistake_trains(quick):
    assert [row["step"] for row in vader.train(quick)] == [1]


@pytest.mark.parametrize("name, mistake", list(itertools.product(METHODS.split(), MISTAKES)))
def test_a_mistake_in_a_family_keeps_its_traceback(name, mistake, quick, small, monkeypatch):
    cfg = quick
    method = broken(mistake)
    if name in ("variant", "build_on_meta"):
        method = classmethod(method)
        monkeypatch.setattr(checkpoint, "check_model", lambda model: None)  # so that a folder is Mine's
        index = {"_class_name": "MinePipeline"}
        monkeypatch.setattr(vader, "read_config", with_index(vader.read_config, index))
        cfg = replace(cfg, model=small)
    monkeypatch.setattr(Mine, name, method, raising=False)
    assert ends_in_the_mistake(mistake, lambda: vader.main(command(cfg)))


def with_index(read_config, index):
    def read(source, name):
        return index if name == "model_index.json" else read_config(source, name)

    return read


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_reward_keeps_its_traceback(mistake, quick, monkeypatch):
    own = broken(mistake)
    assert ends_in_the_mistake(mistake, lambda: vader.train(quick, reward=lambda frames, prompts: own()))
    monkeypatch.setitem(rewards.REWARDS, "mine", own)  # in its make
    assert ends_in_the_mistake(mistake, lambda: vader.main(command(replace(quick, reward="mine"))))
    monkeypatch.setitem(rewards.REWARDS, "mine", lambda device, dtype, weights: own)  # in its call
    assert ends_in_the_mistake(mistake, lambda: vader.main(command(replace(quick, reward="mine"))))


@pytest.mark.parametrize("name", ["Mine2", "LOUD", "snake_case"])
def test_a_reward_may_have_any_name_of_letters_and_digits(name, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, name, rewards.make_colorful)
    for asked in (name, name.lower(), name.upper()):
        assert rewards.parse(f"hps + 2*{asked}") == [(1.0, "hps", None), (2.0, name, None)]
    with pytest.raises(BadInput, match=f"unknown reward '{name}s': did you mean '{name}'"):
        rewards.parse(name + "s")


def test_a_reward_whose_value_or_gradient_is_nan_is_refused_before_training(quick):
    def root_of_zero(frames, prompts):
        return (frames - frames).square().mean((1, 2, 3, 4)).sqrt()

    def not_a_number(frames, prompts):
        return frames.mean((1, 2, 3, 4)) + float("nan")  # its gradient is finite

    with pytest.raises(BadInput, match="root_of_zero: its gradient on noise is not finite"):
        vader.train(quick, reward=root_of_zero)
    with pytest.raises(BadInput, match="not_a_number: its value on noise is not finite"):
        vader.train(quick, reward=not_a_number)
    assert not (Path(quick.out) / "metrics.jsonl").exists()


def test_a_name_that_no_preset_has_is_told(quick, monkeypatch):
    monkeypatch.setattr(Mine, "presets", {"mime": Mine.presets["mine"]})
    with pytest.raises(BadInput, match="there is no 'mine' in Mine.presets"):
        vader.train(quick)


@pytest.mark.parametrize("name", ["walk_back", "make_optimizer"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_an_estimator_or_an_optimiser_keeps_its_traceback(name, mistake, quick, monkeypatch):
    monkeypatch.setattr(vader, name, broken(mistake))
    assert ends_in_the_mistake(mistake, lambda: vader.main(command(quick)))


def test_a_module_that_a_family_lacks_is_no_missing_folder(settings, tmp_path, monkeypatch):
    (tmp_path / "needy.py").write_text("import nosuch_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(vader.FAMILIES, "needy.Needy", ("needy",))
    with pytest.raises(ModuleNotFoundError, match="nosuch_module"):
        vader.main(command(replace(settings, model="needy")))


def test_a_file_that_is_missing_in_ones_own_code_keeps_its_traceback(quick, monkeypatch):
    """By the command line as well; a disk that is full is one line."""

    def make_mine(device, dtype, weights=None):
        raise error

    monkeypatch.setitem(rewards.REWARDS, "mine", make_mine)
    words = command(replace(quick, reward="mine"))
    error = FileNotFoundError(2, "nosuch")
    with pytest.raises(FileNotFoundError):
        vader.main(words)
    error = OSError(28, "No space left on device")
    assert vader.main(words) == 2
