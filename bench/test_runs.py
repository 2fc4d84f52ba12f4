"""Run folders: one run in each, nothing lost, nothing stale; prompts and pictures; what people expect."""

import errno
import itertools
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from filelock import FileLock
from PIL import Image

import rewards
import vader
from conftest import PROMPTS, batch, checked, command, load
from extras import images, resume
from extras.prompts import check_prompts
from rewards import BadInput
from vader import HERE, TOY, Config, Prompt


def light(frames, prompts):
    return frames.mean((1, 2, 3, 4))


def hashes(folder):
    """The content of all files, but the lock's."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


@pytest.fixture(scope="module")
def done(small, prompts_file, tmp_path_factory):
    """A Config of a run of two updates that is done."""
    size = dict(num_frames=2, height=32, width=32, num_inference_steps=1, batch_size=1, watch="none")
    out = str(tmp_path_factory.mktemp("done") / "run")
    cfg = Config(
        model=small, prompts=prompts_file, reward="colorful", steps=2, eval_videos=1, out=out, **size
    )
    vader.train(cfg)
    return replace(cfg, resume=True)


@pytest.fixture
def copied(done, tmp_path):
    """The same in a folder of the test's own: a moved run is the same run."""
    shutil.copytree(done.out, tmp_path / "moved")
    return replace(done, out=str(tmp_path / "moved"))


# ---- Resume ------------------------------------------------------------------------------------------------
def test_the_same_things_spelled_another_way_are_the_same(copied, tmp_path, monkeypatch):
    before = vader.read_metrics(Path(copied.out))
    monkeypatch.chdir(Path(copied.prompts).parent)
    for change in (dict(prompts=f"./{Path(copied.prompts).name}"), dict(out=copied.out + "/"), dict(steps=2)):
        assert vader.train(replace(copied, **change)) == before
    shutil.copy(copied.prompts, tmp_path / "other-name.txt")
    assert vader.train(replace(copied, prompts=str(tmp_path / "other-name.txt"))) == before


OTHER = {
    "lr": (dict(lr=0.5), r"started with --lr 0.0002:"),
    "target": (dict(decode_frames=1), "started without --decode_frames:"),
    "offload": (dict(offload=True), "started with --offload False:"),
    "reward": (dict(reward="colorful + 0.1*dynamic"), "started with --reward colorful:"),
    "fewer": (dict(steps=1), "give --steps as many"),
}


@pytest.mark.parametrize("name", OTHER)
def test_another_setting_is_refused(name, copied):
    change, expected = OTHER[name]
    before = hashes(Path(copied.out))
    with pytest.raises(BadInput, match=expected):
        vader.train(replace(copied, **change))
    assert hashes(Path(copied.out)) == before


def test_other_prompts_another_reward_or_number_of_processes_are_refused(copied, tmp_path, monkeypatch):
    lines = Path(copied.prompts).read_text().splitlines()
    (tmp_path / "edited.txt").write_text("\n".join([*lines[:-2], "another thing", lines[-1]]))
    with pytest.raises(BadInput, match="started with other prompts"):
        vader.train(replace(copied, prompts=str(tmp_path / "edited.txt"), steps=3))
    with pytest.raises(BadInput, match="started with --reward colorful"):
        vader.train(copied, reward=light)
    monkeypatch.setattr(vader, "ranks", lambda: (0, 2))
    with pytest.raises(BadInput, match="started with 1 processes"):
        vader.train(copied)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE = dict(
    gone=Path.unlink, cut=cut, empty=lambda f: f.write_text(""), list=lambda f: f.write_text("[1]\n")
)
DAMAGE |= dict(null=lambda f: f.write_text("null\n"), binary=lambda f: f.write_bytes(bytes(range(128, 256))))
FILES = ("checkpoint/state.pt", "config.json", "metrics.jsonl")


@pytest.mark.parametrize("name, how", list(itertools.product(FILES, DAMAGE)))
def test_a_damaged_run_is_one_line_and_left_alone(name, how, copied):
    DAMAGE[how](Path(copied.out) / name)
    before = hashes(Path(copied.out))
    if (name, how) == ("metrics.jsonl", "cut"):  # a line that a kill cut is none
        return
    with pytest.raises(BadInput) as said:
        vader.train(copied)
    assert "\n" not in str(said.value) and str(Path(copied.out)) in str(said.value)
    assert hashes(Path(copied.out)) == before


@pytest.mark.slow
def test_a_flipped_bit_in_the_checkpoint_is_seen(copied):
    file, draw = Path(copied.out) / "checkpoint" / "state.pt", random.Random(0)
    whole, true = file.read_bytes(), torch.load(file, weights_only=True)
    cfg = checked(copied)
    prompts = [prompt for part in vader.split_prompts(cfg) for prompt in part]
    resume.check_folder(cfg, prompts)  # whole, it is let pass
    refused = 0
    for _ in range(60):
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        try:
            resume.check_folder(cfg, prompts)
        except BadInput:
            refused += 1
        else:  # in what the zip format leaves unused
            found = torch.load(file, weights_only=True)
            assert found["step"] == true["step"]
            assert all(torch.equal(found["lora"][name], w) for name, w in true["lora"].items())
    assert refused > 30


def test_the_page_never_decides_whether_training_goes_on(copied, capsys):
    out = Path(copied.out)
    (out / "index.html").unlink()
    (out / "data.js").unlink()
    shutil.rmtree(out / "samples" / "step_000000")
    vader.train(copied)
    assert capsys.readouterr().out.count("the page has no videos of step_000000: they are gone\n") == 1
    assert (out / "index.html").exists() and "step_000002" in (out / "data.js").read_text()
    rows = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(rows[1:]))
    found = vader.train(replace(copied, steps=3))
    assert [row["step"] for row in found] == [1, 2, 2, 3, 3]


def test_a_folder_is_one_runs_and_what_a_kill_left_goes(copied):
    out = Path(copied.out)
    with FileLock(out / ".lock"), pytest.raises(BadInput, match="in use by another process"):
        vader.train(replace(copied, steps=3))
    (out / ".tmp-vader-lora").mkdir()
    (out / ".tmp-vader-lora" / "x").write_text("")
    (out / ".tmp-vader-config.json").write_text("{")
    vader.train(replace(copied, steps=3))
    assert not list(out.glob(".tmp-vader-*"))
    (out / "samples" / ".tmp-vader-000.mp4").write_text("")  # as of a run that is writing
    with pytest.raises(BadInput, match="is not empty: give another --out"):
        vader.train(replace(copied, out=str(out.parent)))
    assert (out / "samples" / ".tmp-vader-000.mp4").exists()


def test_a_disk_that_is_full_is_one_line(settings, monkeypatch, capsys):
    """Mocked: while a run writes, as before one loads."""
    whole, full = Path.write_bytes, []

    def write(path, content):
        if any(name in str(path) for name in full):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return whole(path, content)

    monkeypatch.setattr(Path, "write_bytes", write)
    for name in (".room", "state.pt"):
        full[:] = [name]
        assert vader.main(command(replace(settings, steps=1, eval_videos=0, resume=True))) == 2
        said = capsys.readouterr().err.splitlines()
        assert "No space left on device" in said[-1] and sum("vader.py: " in line for line in said) == 1


def test_a_folder_that_can_not_be_written_is_one_line(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(vader, "load_run", lambda *a: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run", "/dev/null"):
        with pytest.raises(BadInput, match="--out"):
            vader.train(replace(settings, out=str(out)))


@pytest.mark.parametrize("stray", [dict(RANK="1"), dict(WORLD_SIZE="4"), dict(RANK="x", WORLD_SIZE="")])
def test_stray_variables_of_a_batch_system_are_no_processes(stray, settings, monkeypatch):
    for name, value in stray.items():
        monkeypatch.setenv(name, value)
    vader.train(replace(settings, steps=1, eval_videos=0))
    assert (Path(settings.out) / "lora" / "adapter_model.safetensors").exists()


# ---- Rewards that go wrong ---------------------------------------------------------------------------------
BAD = {
    "no gradient": lambda frames, prompts: frames.detach().mean((1, 2, 3, 4)),
    "one number": lambda frames, prompts: frames.mean(),
    "nothing": lambda frames, prompts: None,
    "one argument": lambda frames: frames.mean((1, 2, 3, 4)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reward_is_found_before_the_model_loads(name, settings, monkeypatch):
    monkeypatch.setattr(vader.TextToVideoUNet, "encode", lambda *a: pytest.fail("an encoder was loaded"))
    with pytest.raises(BadInput, match="must return|must be a function"):
        vader.train(settings, reward=BAD[name])
    assert not (Path(settings.out) / "config.json").exists()


def test_too_few_frames_are_found_before_the_model_loads(settings, monkeypatch):
    encode = vader.TextToVideoUNet.encode
    monkeypatch.setattr(vader.TextToVideoUNet, "encode", lambda *a: pytest.fail("an encoder was loaded"))
    with pytest.raises(BadInput, match="smooth needs 3 frames"):
        vader.train(replace(settings, reward="smooth", decode_frames=2))
    monkeypatch.setattr(vader.TextToVideoUNet, "encode", encode)
    vader.train(replace(settings, reward="smooth", steps=1, eval_videos=1))  # into the same folder


def test_a_base_reward_that_is_not_finite_stops_at_once(settings):
    def nan_when_evaluated(frames, prompts):
        return light(frames, prompts) * (1 if frames.requires_grad else math.nan)

    with pytest.raises(FloatingPointError, match="before training is not finite"):
        vader.train(settings, reward=nan_when_evaluated)
    (row,) = vader.read_metrics(Path(settings.out))
    assert row["step"] == 0 and row["eval"]["reward"] == [None, None]
    vader.train(replace(settings, steps=1), reward=light)  # into the same folder
    text = (Path(settings.out) / "metrics.jsonl").read_text()
    assert "NaN" not in text
    vader.append_metrics(settings, {"step": 2, "a": math.nan, "b": [math.inf, 1.0]})
    assert vader.read_metrics(Path(settings.out))[-1] == {"step": 2, "a": None, "b": [None, 1.0]}


# ---- Stopping ----------------------------------------------------------------------------------------------
SLOW = [pytest.param("train", 6, marks=pytest.mark.slow), pytest.param("sample", 9, marks=pytest.mark.slow)]


@pytest.mark.parametrize("mode, after", [("train", 0.4), ("sample", 7.5), *SLOW])
def test_ctrl_c_is_one_line_at_any_time(mode, after, tmp_path):
    words = [sys.executable, "vader.py", "--mode", mode, "--model", "tiny", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(words, cwd=HERE, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    time.sleep(after)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said and process.returncode == 130
    ours = [line for line in said.splitlines() if "vader.py" in line]  # ffmpeg may add a line
    assert ours == ["vader.py: stopped; the same command with --resume goes on"] * len(ours)
    assert ours


@pytest.mark.slow
def test_ctrl_c_is_a_line_under_torchrun(settings):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "vader.py"]
    words = [*launcher, *command(replace(settings, steps=10_000, eval_videos=0))]
    process = subprocess.Popen(words, cwd=HERE, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not (Path(settings.out) / "checkpoint" / "state.pt").exists():
        assert process.poll() is None
        time.sleep(0.2)
    (worker,) = [child for child in psutil.Process(process.pid).children() if "vader.py" in child.cmdline()]
    worker.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "vader.py: stopped; the same command with --resume goes on\n" in said


def test_train_works_in_a_thread(settings):
    thread = threading.Thread(target=vader.train, args=(replace(settings, steps=1, eval_videos=1),))
    thread.start()
    thread.join()
    assert [row["step"] for row in vader.read_metrics(Path(settings.out))] == [0, 1, 1]


@pytest.mark.slow
def test_progress_and_messages_never_share_a_line(settings):
    words = [sys.executable, "vader.py", *command(replace(settings, eval_every=1, eval_videos=1))]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = subprocess.run(words, cwd=HERE, text=True, check=True, **streams).stdout
    lines = [line for line in re.split("[\r\n]", said) if "held-out reward" in line]
    assert len(lines) == 3 and all(line.startswith("update ") for line in lines)
    assert not any("train:" in line and "videos" in line for line in re.split("[\r\n]", said))


def test_memory_on_a_gpu_is_the_peak_of_the_update(settings, monkeypatch):
    """Mocked, as there is none: the peak is forgotten before the update, and TF32 is on."""
    calls, run = [], load(settings)
    assert torch.get_float32_matmul_precision() == "high"
    run.model.device = "cuda:0"
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: calls.append("read") or 3e9)
    monkeypatch.setattr(vader, "micro_batch", lambda *a: calls.append("update") or {})
    row = vader.update(run, PROMPTS, 0, vader.make_optimizer(run))
    assert calls == ["reset", "update", "read"] and row["memory_gb"] == 3


# ---- Prompts and pictures ----------------------------------------------------------------------------------
def test_prompts_that_stand_twice_are_held_out_wholly(tmp_path, capsys):
    (tmp_path / "dups.txt").write_text("\n".join(["a cat", "a dog"] * 20 + ["a fox"]))
    cfg = checked(Config(model="tiny", prompts=str(tmp_path / "dups.txt")))
    check_prompts(cfg)
    train, held_out = vader.split_prompts(cfg)
    assert [p.text for p in train] == ["a cat", "a dog"] and [p.text for p in held_out] == ["a fox"]
    assert "of 41 prompts some stand twice, or are held out: 2 others are left" in capsys.readouterr().out
    (tmp_path / "some.txt").write_text("a dog\n")
    cfg = replace(cfg, eval_prompts=str(tmp_path / "some.txt"))
    check_prompts(cfg)
    assert [p.text for p in vader.split_prompts(cfg)[0]] == ["a cat", "a fox"]
    assert "of 41 prompts some stand twice, or are held out: 2 others are left" in capsys.readouterr().out
    assert check_prompts(replace(cfg, eval_prompts=cfg.prompts))
    assert vader.split_prompts(replace(cfg, eval_prompts=cfg.prompts))[0]
    assert "they train too, no gain is held out" in capsys.readouterr().out


def test_prompts_behind_the_encoders_limit_are_named(settings, capsys, tmp_path):
    (tmp_path / "long.txt").write_text("a moon\n" + "a cat " * 60 + "in a hat")
    capsys.readouterr()
    check_prompts(checked(replace(settings, mode="sample", prompts=str(tmp_path / "long.txt"))))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "1 prompts are cut at" in said and "a cat a cat" in said


def test_lines_of_prompts_only(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": " a dog "}\n')
    assert vader.read_prompts(str(tmp_path / "p.jsonl")) == [Prompt("a cat"), Prompt("a dog")]


def test_pictures_are_upright_and_keep_their_light(tmp_path):
    red_over_blue = np.zeros((40, 20, 3), np.uint8)
    red_over_blue[:20, :, 0] = red_over_blue[20:, :, 2] = 255
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned
    Image.fromarray(np.rot90(red_over_blue)).save(tmp_path / "exif.png", exif=exif)
    picture = images.read_image(str(tmp_path / "exif.png"), 40, 20)
    assert picture[0, :15].mean() > 0.95 and picture[2, 25:].mean() > 0.95
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "float.tiff")
    hidden = np.zeros((8, 8, 4), np.uint8)
    hidden[..., 1] = 255
    Image.fromarray(hidden).save(tmp_path / "alpha.png")
    for name, mean in {"16.png": 0.5, "float.tiff": 0.5, "alpha.png": 1.0}.items():
        assert images.read_image(str(tmp_path / name), 64, 64).mean() == pytest.approx(mean, abs=0.01)
    for size in ((1, 100), (100, 1), (1, 1)):
        Image.new("RGB", size, "red").save(tmp_path / "thin.png")
        assert images.read_image(str(tmp_path / "thin.png"), 64, 64)[0].mean() == 1


# ---- What people expect ------------------------------------------------------------------------------------
def test_a_negative_prompt_is_what_guidance_leads_away_from(settings):
    run, plain = load(replace(settings, negative_prompt="a red star")), load(settings)
    given, before = batch(run), batch(plain)
    away = run.conds[Prompt("a red star")]["encoder_hidden_states"]
    assert torch.equal(given.uncond["encoder_hidden_states"][1], away)
    assert not torch.equal(given.uncond["encoder_hidden_states"], before.uncond["encoder_hidden_states"])
    for change in (dict(guidance_scale=1.0), dict(model="tiny-i2v")):
        with pytest.raises(BadInput, match="--negative_prompt"):
            checked(replace(settings, negative_prompt="x", num_frames=None, **change))


def test_no_evaluation_and_no_lora(settings, tmp_path, capsys):
    rows = vader.train(replace(settings, eval_videos=0, steps=1))
    assert [row["step"] for row in rows] == [1] and not (Path(settings.out) / "samples").exists()
    (tmp_path / "p.txt").write_text("a cat")
    for mode in ("sample", "eval"):
        cfg = replace(settings, mode=mode, prompts=str(tmp_path / "p.txt"), out=str(tmp_path / mode))
        assert vader.main(command(cfg)) == 0
        assert (tmp_path / mode / "base" / "000.mp4").stat().st_size > 500
        assert not (tmp_path / mode / "tuned").exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "tpu", "meta", "cuda:x", ""])
def test_a_device_that_is_not_there_is_refused(device, settings):
    with pytest.raises(BadInput, match="--device"):
        checked(replace(settings, device=device))


def test_values_out_of_range_are_refused(settings):
    for change in itertools.chain(
        (dict(eta=value) for value in (math.nan, math.inf, 1e300)),
        (dict(steps=value) for value in (0, -1, 10**20)),
        (dict(reward=f"{weight}*colorful") for weight in ("9" * 400, "1e10", "nan", "0")),
        (dict(zip(["out"], [""], strict=True)), dict(lora=""), dict(lora_rank=100_000), dict(dtype="fp16")),
    ):
        with pytest.raises(BadInput) as said:
            checked(replace(settings, **change))
        assert "\n" not in str(said.value)


def test_the_toy_rewards_are_named_toys(done, capsys):
    cfg = checked(Config(model="tiny", reward="clip"))
    vader.load_run(cfg, PROMPTS)
    assert "a toy" in capsys.readouterr().out and cfg.reward_weights is None
    assert rewards.make_terms("clip", "cpu", torch.float32, [None, TOY])
    assert (HERE / "page.html").exists()
