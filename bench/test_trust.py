"""Nothing silently wrong, nothing lost: files, the hub and run folders that are not as they should be.

The hub is mocked: what it answers here, and a disk that is full, were never seen for real.
"""

import errno
import json
import os
import shutil
import stat
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file

import rewards
import vader
from conftest import PROMPTS, checked, load
from rewards import BadInput
from vader import HERE, TOY, Config

http = sys.modules[hub.HTTPError.__module__]
T2V = HERE / "tiny" / "t2v"


def answer(status):
    return http.Response(status, request=http.Request("GET", "https://x"))


# ---- The hub -----------------------------------------------------------------------------------------------
PROBLEMS = {
    "gated": (hub.GatedRepoError("x", response=answer(403)), "accept its terms"),
    "missing": (hub.RepositoryNotFoundError("x", response=answer(404)), "no such folder, nor on the hub"),
    "no token": (hub.LocalTokenNotFoundError("x"), "hf auth login"),
    "bad token": (hub.HfHubHTTPError("x", response=answer(401)), "hf auth login"),
    "rate limit": (hub.HfHubHTTPError("x", response=answer(429)), "error 429: wait"),
    "server": (hub.HfHubHTTPError("x", response=answer(503)), "error 503"),
    "time-out": (http.ConnectTimeout("x"), "does not answer"),
    "unreachable": (http.ConnectError("x"), "the hub can't be reached"),
    "offline": (hub.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE"),
    "no disk": (OSError(errno.ENOSPC, "No space left on device"), "make room"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_each_problem_of_the_hub_has_its_line(name, monkeypatch):
    error, expected = PROBLEMS[name]
    rewards.list_hub.cache_clear()
    monkeypatch.setattr(rewards.HfApi, "model_info", lambda *a, **k: (_ for _ in ()).throw(error))
    with pytest.raises(BadInput, match=expected) as said:
        rewards.fetch("some/model", "config.json", "--model")
    assert "\n" not in str(said.value) and "some/model" in str(said.value)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_fork_without_extras_gets_the_hub_s_own_exception(name, monkeypatch, tmp_path):
    error, _ = PROBLEMS[name]
    monkeypatch.setattr(rewards, "EXTRAS", tmp_path / "extras")
    with pytest.raises(type(error)) as raised, rewards.asking_hub("some/model", "--model"):
        raise error
    assert raised.value is error


def test_what_is_damaged_is_one_line_and_what_is_a_mistake_is_not():
    for error in (Exception("a\nb"), OSError("z"), KeyError("x"), ValueError("y" * 999), ImportError("v")):
        with pytest.raises(BadInput, match=f"f is damaged .{type(error).__name__}: ") as said:
            with rewards.as_bad_input("f is damaged"):
                raise error
        assert "\n" not in str(said.value) and len(str(said.value)) < 200
    for error in (NameError("x"), BadInput("y"), MemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, rewards.as_bad_input("f is damaged"):
            raise error
        assert raised.value is error


def test_an_unreachable_hub_is_known_soon_and_named(monkeypatch):
    start = time.time()
    with pytest.raises(BadInput, match="--model tiny"):
        rewards.fetch("some/model-that-is-nowhere", "config.json", "--model")
    assert time.time() - start < 10


@pytest.fixture
def mocked_hub(monkeypatch, tmp_path):
    """A hub of one repository, some/model, in tmp_path/repo; the files that were asked for, in order."""
    asked, repo = [], tmp_path / "repo"

    def download(source, name):
        asked.append(name)
        (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
        return shutil.copy(repo / name, tmp_path / "cache" / name)

    def cached(source, name):
        return str(tmp_path / "cache" / name) if (tmp_path / "cache" / name).is_file() else None

    def names(self, source, **_):
        asked.append("the list")
        files = [types.SimpleNamespace(rfilename=str(f.relative_to(repo))) for f in repo.rglob("*.*")]
        return types.SimpleNamespace(siblings=files)

    rewards.list_hub.cache_clear()
    vader.find_model.cache_clear()
    monkeypatch.setattr(rewards, "hf_hub_download", download)
    monkeypatch.setattr(rewards, "try_to_load_from_cache", cached)
    monkeypatch.setattr(rewards.HfApi, "model_info", names)
    return asked


def test_of_a_hub_model_only_what_is_needed_is_downloaded_once(mocked_hub, tmp_path, settings, small):
    shutil.copytree(small, repo := tmp_path / "repo")
    for part in ("unet", "vae"):
        file = repo / part / "diffusion_pytorch_model.safetensors"
        half = {key: value.half() for key, value in load_file(file).items()}
        save_file(half, file.with_name("diffusion_pytorch_model.fp16.safetensors"), {"format": "pt"})
        file.with_suffix(".bin").write_text("never read")
    cfg = replace(settings, model="some/model", dtype="bf16", eval_videos=1, steps=1)
    vader.train(cfg)
    weights = sorted(name for name in mocked_hub if name.endswith((".safetensors", ".bin")))
    assert weights == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    assert len(mocked_hub) == len(set(mocked_hub))
    mocked_hub.clear()
    rewards.list_hub.cache_clear()
    vader.train(replace(cfg, out=cfg.out + "2"))
    assert mocked_hub == []  # what is in the cache needs no hub


def test_a_base_lora_may_be_on_the_hub(mocked_hub, tmp_path, settings):
    run = load(settings)
    vader.save_lora(run.model, tmp_path / "repo")
    found = {}
    for source in (str(tmp_path / "repo"), "some/model", "some/model/adapter_model.safetensors"):
        found[source] = load(replace(settings, base_lora=source, mode="sample")).model.denoiser.state_dict()
    local, *others = found.values()
    assert all(torch.equal(w, other[name]) for other in others for name, w in local.items())
    assert {"adapter_config.json", "adapter_model.safetensors", "the list"} <= {*mocked_hub}
    with pytest.raises(BadInput, match="--base_lora: there is no nosuch.safetensors in some/model"):
        checked(replace(settings, base_lora="some/model/nosuch.safetensors"))


def test_a_lora_may_be_on_the_hub(mocked_hub, tmp_path, settings):
    run = load(replace(settings, lora_alpha=7))
    vader.save_lora(run.model, tmp_path / "repo")
    cfg = replace(settings, mode="sample", lora="some/model", lora_rank=None)
    again = load(cfg, randomise=False)
    assert (again.cfg.lora, again.cfg.lora_alpha) == ("some/model", 7)
    assert {"adapter_config.json", "adapter_model.safetensors", "vader.json"} <= {*mocked_hub}
    ours, loaded = (vader.lora_parameters(one.model) for one in (run, again))
    assert all(torch.equal(w, loaded[name]) for name, w in ours.items())
    for folder in ("repo", "cache"):
        (tmp_path / folder / "adapter_config.json").unlink()
    rewards.list_hub.cache_clear()
    with pytest.raises(BadInput, match="--lora some/model: .*no adapter_config.json beside.*a run's lora"):
        checked(cfg)


def test_a_folder_that_holds_fp16_files_only_loads(tmp_path, settings, small):
    shutil.copytree(small, tmp_path / "model")
    for file in [*(tmp_path / "model").rglob("*.safetensors")]:
        half = {key: value.half() for key, value in load_file(file).items()}
        save_file(half, file.with_name(file.stem + ".fp16.safetensors"), {"format": "pt"})
        file.unlink()
    run, other = load(replace(settings, model=str(tmp_path / "model"))), load(settings)
    theirs = other.model.vae.state_dict()
    for key, value in run.model.vae.state_dict().items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-4)


def test_which_files_of_a_folder_are_taken():
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    mixed = ["model.fp16.safetensors", "pytorch_model.bin", "tf_model.h5", *shards]
    assert sorted(rewards.pick_files(mixed, True, half=False)) == shards
    assert rewards.pick_files(mixed, True, half=True) == ["model.fp16.safetensors"]
    assert rewards.pick_files(shards[:1] + ["pytorch_model.bin"], True, half=False) == ["pytorch_model.bin"]
    assert rewards.pick_files(shards[:1], True, half=False) == []
    both = [
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
        "adapter_model.bin",
    ]
    assert [rewards.pick_files(both, True, half) for half in (True, False)] == [both[:1], both[1:2]]
    assert rewards.pick_files(both[2:], True, half=False) == []
    assert rewards.pick_files(["vocab.json"], False, half=False) == []
    assert rewards.pick_files(["merges.txt", "vocab.json"], False, half=False) == ["merges.txt"]


# ---- Mistakes are not bad input ----------------------------------------------------------------------------
MISTAKES = {
    NameError: lambda: no_such_name,  # noqa: F821
    AttributeError: lambda: (5).no_such_name,
    TypeError: lambda: len(5),
    ValueError: lambda: int("five"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_in_an_own_reward_keeps_its_traceback(kind, monkeypatch):
    mistake = MISTAKES[kind]
    monkeypatch.setitem(rewards.REWARDS, "unmade", lambda device, dtype, weights: mistake())
    monkeypatch.setitem(rewards.REWARDS, "made", lambda device, dtype, weights: lambda *given: mistake())
    with pytest.raises(kind) as making:
        rewards.make_terms("colorful + unmade", "cpu", torch.float32)
    terms = rewards.make_terms("colorful + made", "cpu", torch.float32)
    with pytest.raises(kind) as calling:
        rewards.weighted_rewards(terms, torch.rand(1, 2, 3, 8, 8), ["a"])
    for error in (making, calling):
        assert error.type is kind and error.traceback[-1].frame.code.raw is mistake.__code__


def test_rewards_are_listed_by_their_names():
    makes = {name for name in vars(rewards) if name.startswith("make_")} - {"make_terms"}
    assert {f"make_{name}" for name in rewards.REWARDS} == makes
    assert all(make.__name__ == f"make_{name}" for name, make in rewards.REWARDS.items())


# ---- Nothing half loaded -----------------------------------------------------------------------------------
def one_gone(state):
    del state[sorted(state)[0]]


def one_left(state):
    for key in sorted(state)[1:]:
        del state[key]


def renamed(state):
    for key in sorted(state):
        state[f"model.{key}"] = state.pop(key)


def not_finite(state):
    state[sorted(state)[0]].view(-1)[0] = torch.nan


def another_shape(state):
    state[sorted(state)[0]] = torch.zeros(7)


def one_more(state):
    state["nobody.takes.this"] = torch.zeros(1)


HARMS = (one_gone, one_left, renamed, not_finite, another_shape, one_more)
PARTS = [T2V / "text_encoder", T2V / "unet", T2V / "vae", HERE / "tiny" / "wan" / "text_encoder"]
PARTS += [Path(TOY) / name for name in ("aesthetic", "action", "clip", "pickscore", "remove", "vjepa")]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.parent.name}-{part.name}")
def test_weights_that_are_not_whole_are_refused(part, tmp_path):
    if part.parent == Path(TOY):
        spec = {"remove": "remove:star", "action": "action:rising"}.get(part.name, part.name)
        read = lambda: rewards.make_terms(spec, "cpu", torch.float32, str(tmp_path))  # noqa: E731
    else:
        index = json.loads((part.parent / "model_index.json").read_text())
        library, name = index[part.name]
        kind = getattr(transformers if library == "transformers" else vader.diffusers, name)
        read = lambda: rewards.load(kind, str(tmp_path), "--model", part.name, torch.float32)  # noqa: E731
    folder = tmp_path / part.name
    for harm in (None, *HARMS):
        shutil.copytree(part, folder)
        if harm is None:
            read()
        else:
            (file,) = folder.glob("*.safetensors")
            harm(state := load_file(file))
            save_file(state, file, {"format": "pt"})
            with pytest.raises(BadInput) as said:
                read()
            assert "\n" not in str(said.value) and str(folder) in str(said.value)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["clip", "hps", "pickscore"])
def test_a_tokenizer_without_its_vocabulary_is_refused(name, tmp_path):
    shutil.copytree(Path(TOY) / name, tmp_path / name)
    (tmp_path / name / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match="vocabulary"):
        rewards.make_terms(name, "cpu", torch.float32, str(tmp_path))


CHANGES = {
    "two experts": dict(transformer_2=["diffusers", "WanTransformer3DModel"]),
    "times of tokens and two experts": dict(boundary_ratio=0.875, expand_timesteps=True),
    "a setting of tomorrow": dict(some_ratio=0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_pipeline_without_code_for_it_is_refused(change, tmp_path):
    shutil.copytree(HERE / "tiny" / "wan", tmp_path / "model")
    file = tmp_path / "model" / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(BadInput, match=f"is a WanPipeline with {next(iter(change))}.*; there is code for"):
        checked(Config(model=str(tmp_path / "model")))


def test_two_networks_must_be_there(tmp_path):
    shutil.copytree(HERE / "tiny" / "wan", tmp_path / "model")
    file = tmp_path / "model" / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(boundary_ratio=0.875)))
    with pytest.raises(BadInput, match="there is no transformer_2/config.json in the folder"):
        checked(Config(model=str(tmp_path / "model"), quantize="none"))


@pytest.mark.parametrize("part, change", [("unet", dict(in_channels=9)), ("vae", dict(_class_name="X"))])
def test_a_network_without_code_for_it_is_refused(part, change, tmp_path):
    shutil.copytree(T2V, tmp_path / "model")
    file = tmp_path / "model" / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(BadInput, match="there is code for|no code for"):
        checked(Config(model=str(tmp_path / "model")))


def test_a_folder_of_rewards_may_hold_some_only(settings, tmp_path):
    shutil.copytree(Path(TOY) / "clip", tmp_path / "clip")
    cfg = replace(settings, model="tiny", reward="clip + 0.1*hps", reward_weights=str(tmp_path))
    cfg = replace(cfg, num_frames=None, steps=1)
    run = vader.load_run(checked(cfg), PROMPTS)
    assert set(run.terms) == {"clip", "hps"}
    with pytest.raises(BadInput, match="no reward's folder there"):
        checked(replace(cfg, reward_weights=str(tmp_path / "clip")))


def test_hub_ids_and_folders_take_the_native_size_of_their_family(checkpoints):
    cfg = checked(Config(model=str(checkpoints("svd"))))
    assert (cfg.height, cfg.width) == (576, 1024)


def test_articles_do_not_matter_to_action():
    assert rewards.pick_label({0: "playing piano", 1: "riding a bike"}, "Playing the Piano", "action") == 0
    assert rewards.pick_label({0: "playing piano", 1: "riding a bike"}, "riding bike", "action") == 1
    with pytest.raises(BadInput):
        rewards.pick_label({0: "playing piano"}, "playing pianola", "action")


# ---- LoRA --------------------------------------------------------------------------------------------------
def test_lora_flags_that_contradict_are_refused(loaded, settings, tmp_path):
    vader.save_lora(loaded.model, tmp_path / "lora")
    given = replace(settings, lora=str(tmp_path / "lora"), lora_rank=None)
    cfg = checked(given)
    assert (cfg.lora_rank, cfg.lora_alpha) == (4, 4) and "to_q" in cfg.lora_targets
    checked(replace(given, lora_rank=4, lora_targets="to_out.0, to_v,to_q,to_k"))
    for change in (dict(lora_rank=8), dict(lora_alpha=2), dict(lora_targets="to_q")):
        with pytest.raises(BadInput, match=f"--{next(iter(change))} .*the LoRA in --lora has"):
            checked(replace(given, **change))
    for targets in ("to_q,nosuch", "conv1", "q", ","):
        with pytest.raises(BadInput, match="--lora_targets"):
            checked(replace(settings, lora_targets=targets))


def test_a_lora_to_start_from_is_the_base_of_the_gain(loaded, settings, tmp_path, capsys):
    vader.save_lora(loaded.model, tmp_path / "lora")
    how = replace(settings, lora=str(tmp_path / "lora"), lora_rank=None, steps=1)
    base = vader.train(replace(settings, steps=1, out=str(tmp_path / "new")))[0]["eval"]["reward"]
    rows = vader.train(how)
    assert f"base: {how.lora}, which" in capsys.readouterr().out and rows[0]["eval"]["reward"] != base
    held_out = vader.split_prompts(how)[1] * 2
    run = load(how, randomise=False, prompts=held_out)
    again = vader.evaluate(run, held_out, "again")["reward"]
    assert again == pytest.approx(rows[0]["eval"]["reward"], abs=1e-5)


def test_saved_files_are_readable_and_name_no_path(loaded, tmp_path):
    before = os.umask(0o022)
    vader.save_lora(loaded.model, tmp_path / "lora")
    os.umask(before)
    files = [*(tmp_path / "lora").iterdir()]
    assert len(files) >= 3 and all(stat.S_IMODE(file.stat().st_mode) == 0o644 for file in files)
    texts = [file.read_text() for file in files if file.suffix in (".md", ".json")]
    assert not any(str(Path(loaded.model.source).parent) in text for text in texts)
    model = loaded.model
    hub_model = types.SimpleNamespace(
        denoiser=model.denoiser, lora_pipeline=None, base_lora=None, source="some/model"
    )
    vader.save_lora(hub_model, tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert "some/model" in (tmp_path / "lora" / "README.md").read_text()


def test_an_update_with_fp16_s_scale_is_the_same_update(settings):
    """The loss is scaled, from the first update on, the gradient scaled back (a CPU's scaler)."""
    made = []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for used in (torch.amp.GradScaler("cpu", enabled=False), scaler):
        run = load(settings)
        run.scaler = used
        row = vader.update(run, PROMPTS, 0, vader.make_optimizer(run))
        made.append((row["grad_norm"], vader.lora_parameters(run.model)))
    (norm, plain), (scaled_norm, scaled) = made
    assert scaler.get_scale() == 2.0**12 and scaled_norm == pytest.approx(norm, rel=1e-4)
    assert all(scaled[name].allclose(p, atol=1e-5) for name, p in plain.items())


def test_a_finished_run_whose_checkpoint_is_gone_is_not_started_anew(settings):
    vader.train(cfg := replace(settings, steps=1, eval_videos=0))
    shutil.rmtree(Path(cfg.out) / "checkpoint")
    before = {file: file.read_bytes() for file in Path(cfg.out).rglob("*") if file.is_file()}
    with pytest.raises(BadInput, match="holds a run: add --resume"):
        vader.train(replace(cfg, seed=5))
    assert all(file.read_bytes() == data for file, data in before.items())
