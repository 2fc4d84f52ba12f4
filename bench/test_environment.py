"""What a run finds around it: home folders, locks, encodings, ffmpeg, long files, and folders to go on in."""

import errno
import fcntl
import json
import os
import re
import socket
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch

import models.ltx
import models.svd
import models.wan
import rewards
import vader
from conftest import HERE, checked, command, python
from extras import checks, errors, lora_files, prompts, record
from rewards import BadInput
from vader import TOY, Config, Prompt


def write_script(path: Path, text: str) -> str:
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


# ---- Settings that are not text or plain numbers -----------------------------------------------------------


def test_every_path_has_its_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = "prompts model lora base_lora out reward_weights vlm eval_prompts".split()
    cfg = vader.parse_args([f"--{name}=~/{name}" for name in paths])
    assert [getattr(cfg, name) for name in paths] == [str(tmp_path / name) for name in paths]
    with pytest.raises(BadInput, match="--out ~nobody-here/a: there is no such home folder"):
        checks.check_settings(Config(model="tiny", out="~nobody-here/a"))

    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat", "image": "~/cat.png"}\n')
    (tmp_path / "cat.png").write_bytes(b"")
    monkeypatch.chdir(HERE)
    assert vader.read_prompts(str(tmp_path / "p.jsonl")) == [Prompt("a cat", str(tmp_path / "cat.png"))]


def test_a_name_longer_than_any_file_s_is_one_line(tmp_path):
    long = "/nosuch/" + 300 * "x"
    for name in "prompts model lora base_lora out reward_weights vlm eval_prompts".split():
        with pytest.raises(BadInput, match=f"--{name} /nosuch/x+\\.\\.\\.: no file has so long a name"):
            checks.check_settings(Config(**dict(model="tiny") | {name: long}))
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a cat", "image": long}))
    with pytest.raises(BadInput, match="p.jsonl, line 1: can't read the image .*: no file"):
        vader.read_prompts(str(tmp_path / "p.jsonl"))


def test_settings_take_paths_and_numbers_of_numpy(tmp_path):
    cfg = Config(
        out=tmp_path, steps=np.int64(3), lr=np.float64(0.5), resume=np.bool_(True), eta=np.float32(1)
    )
    assert cfg == Config(out=str(tmp_path), steps=3, lr=0.5, resume=True, eta=1.0)
    kinds = [type(getattr(cfg, name)) for name in ("out", "steps", "lr", "resume", "eta")]
    assert kinds == [str, int, float, bool, float]
    for settings, problem in (
        (dict(lr=np.float32("nan")), "--lr nan"),
        (dict(steps=np.int32(-1)), "--steps -1"),
        (dict(steps=np.bool_(True)), "steps is True: give a number, int"),
    ):
        with pytest.raises(BadInput, match=problem):
            checks.check_settings(Config(model="tiny", **settings))


def test_a_value_with_a_minus_is_explained(capfd):
    for flag, value in (("--reward", "-1*dynamic"), ("--negative_prompt", "-blurry")):
        assert vader.main([flag, value]) == 2
        line = capfd.readouterr().err
        assert flag in line and "written with =" in line
    assert vader.parse_args(["--reward=-1*dynamic", "--negative_prompt=-blurry"]).reward == "-1*dynamic"


# ---- What is the caller's ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_training_leaves_the_caller_as_it_was(settings, ends):
    def reward(frames, prompts):
        if ends == "badly":
            raise ZeroDivisionError
        return frames.mean((1, 2, 3, 4))

    torch.manual_seed(5)
    torch.set_float32_matmul_precision("highest")
    before = torch.random.get_rng_state()
    try:
        vader.train(replace(settings, steps=1, eval_videos=0), reward=reward)
    except ZeroDivisionError:
        assert ends == "badly"
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_float32_matmul_precision() == "highest"


# ---- The folder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks(settings, monkeypatch, capfd, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    rows = vader.train(replace(settings, steps=1, eval_videos=0))
    assert len(rows) == 1
    out, err = capfd.readouterr()
    assert "flock" not in err
    if code != errno.ENOSYS:  # there filelock has a lock of another kind
        assert "is on a disk without locks" in out


def test_another_process_has_the_folder(settings):
    from filelock import FileLock

    out = Path(settings.out)
    out.mkdir()
    with FileLock(out / ".lock"), pytest.raises(BadInput, match=f"--out {out} is in use by another process"):
        vader.train(settings)


def test_nothing_is_left_where_nothing_was_made(settings, tmp_path):
    out = tmp_path / "a" / "b"
    with pytest.raises(BadInput, match="no camera move 'spin'"):
        vader.train(replace(settings, reward="camera:spin", out=str(out)))
    assert not (tmp_path / "a").exists()

    out.mkdir(parents=True)
    (out / "config.json").write_text("{}")
    (out / "metrics.jsonl").write_text("")
    with pytest.raises(BadInput):
        vader.train(replace(settings, reward="camera:spin", out=str(out), resume=True))
    assert {path.name for path in out.iterdir()} == {".lock", "config.json", "metrics.jsonl"}


def test_commands_print_their_own_lines_only(tmp_path):
    """With torchao installed, and where the terminal has no letters for a name."""
    import torchao  # noqa: F401 (README's test command installs it: without it this tests less)

    environment = dict(PYTHONIOENCODING="ascii", CUDA_VISIBLE_DEVICES="")
    _, errors = python("vader.py", "--steps", "x", code=2, **environment)
    assert len(errors.splitlines()) == 1 and errors.startswith("vader.py: error: ")
    small = "--model tiny --mode sample --num_frames 2 --height 32 --width 32 --num_inference_steps 1".split()
    (tmp_path / "p.txt").write_text("ein Möwenflug\n", encoding="utf-8")
    words = [*small, "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "Möwe")]
    out, _ = python("vader.py", *words, **environment)
    assert "M\\xf6we" in out and (tmp_path / "Möwe" / "base" / "000.mp4").is_file()


@pytest.mark.parametrize(
    "variables, named",
    [
        ("MASTER_ADDR=a", None),
        ("RANK=1", None),
        ("WORLD_SIZE=4", None),
        ("RANK=x WORLD_SIZE=2", None),
        ("MASTER_ADDR=a RANK=0 WORLD_SIZE=1", None),
        ("MASTER_ADDR=a RANK=x WORLD_SIZE=2", "RANK=x"),
        ("MASTER_ADDR=a RANK=0 WORLD_SIZE=", "WORLD_SIZE="),
        ("MASTER_ADDR=a RANK=0 WORLD_SIZE=2", "LOCAL_RANK="),
        ("MASTER_ADDR=a RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_PORT=p", "MASTER_PORT=p"),
        ("MASTER_ADDR=localhost RANK=2 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_PORT=1", "RANK=2"),
        ("MASTER_ADDR= RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_PORT=1", "MASTER_ADDR="),
        ("MASTER_ADDR=nosuch.invalid RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_PORT=1", "MASTER_ADDR="),
    ],
)
def test_stray_variables_of_a_batch_system(monkeypatch, capfd, variables, named):
    """They make no difference, or one line; training begins with the next thing that is wrong."""
    for pair in variables.split():
        monkeypatch.setenv(*pair.split("="))
    assert vader.main(["--steps", "x"]) == 2
    line = capfd.readouterr().err
    assert line.count("\n") == 1 and (named or "--steps") in line


def test_a_first_process_that_never_comes_is_one_line(monkeypatch):
    """After ten minutes, here at once."""
    for pair in "MASTER_ADDR=127.0.0.1 RANK=1 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_PORT=1".split():
        monkeypatch.setenv(*pair.split("="))
    monkeypatch.setattr(errors.time, "sleep", lambda seconds: None)
    clock = iter(range(0, 2000, 300))
    monkeypatch.setattr(errors.time, "monotonic", lambda: next(clock))
    with pytest.raises(BadInput, match="no first process in 600 s at MASTER_ADDR=127.0.0.1, MASTER_PORT=1"):
        errors.check_processes()
    with socket.create_server(("127.0.0.1", 0)) as listens:
        monkeypatch.setenv("MASTER_PORT", str(listens.getsockname()[1]))
        errors.check_processes()


# ---- Videos ------------------------------------------------------------------------------------------------
REAL = imageio_ffmpeg.get_ffmpeg_exe()
BROKEN = {
    "without-libx264": 'for a in "$@"; do [ "$a" = libx264 ] && exit 1; done\nexec ' + REAL + ' "$@"',
    "silent": "cat > /dev/null; exit 0",
    "empty": 'cat > /dev/null; : > "${@: -1}"',
}


@pytest.mark.parametrize("name", [*BROKEN, "nosuch"])
def test_an_ffmpeg_that_writes_no_video_shows_first(settings, tmp_path, monkeypatch, name):
    script = str(tmp_path / name)
    if name in BROKEN:
        write_script(tmp_path / name, BROKEN[name])
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: script)
    monkeypatch.setattr(vader, "load_run", None)  # which is not reached
    with pytest.raises(BadInput, match="no video can be written"):
        vader.train(settings)
    assert not Path(settings.out).exists()


def test_a_cut_video_never_counts_as_written(settings, tmp_path, monkeypatch):
    """ffmpeg fails at the third video, as on a full disk. The run stops, and goes on where it was."""
    calls = tmp_path / "calls"
    fails = f"""
echo >> {calls}
if [ $(wc -l < {calls}) = 3 ]; then
    cat > /dev/null; head -c 100 /dev/zero > "${{@: -1}}"; echo "No space left on device" >&2; exit 1
fi
exec {REAL} "$@"
"""
    script = write_script(tmp_path / "ffmpeg", fails)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: script)
    folder = Path(settings.out) / "samples" / "step_000000"
    problem = f"can't write {folder}/001.mp4: is the disk full.* No space left on device"
    with pytest.raises(BadInput, match=problem):
        vader.train(settings)
    assert [path.name for path in folder.glob("[0-9]*.mp4")] == ["000.mp4"]
    vader.train(replace(settings, resume=True))
    assert sorted(path.name for path in folder.iterdir()) == ["000.mp4", "001.mp4", "lora"]
    for path in folder.glob("*.mp4"):
        assert len(iio.imread(path, plugin="FFMPEG")) == settings.num_frames


def test_videos_play_at_the_models_rate(settings):
    rates = {models.ltx.LTX: 25, models.wan.Wan: 16, models.wan.Wan22: 24, vader.TextToVideoUNet: 8}
    rates[models.svd.StableVideoDiffusion] = 7
    assert {family: family.fps for family in rates} == rates
    assert [vader.resolve(Config(model=name)).fps for name in ("tiny", "tiny-wan", "wan", "svd")] == [
        8,
        8,
        16,
        7,
    ]
    for fps in (None, 23.976):
        cfg = replace(settings, fps=fps, steps=1, out=f"{settings.out}-{fps}")
        vader.train(cfg)
        videos = list(Path(cfg.out).rglob("*.mp4"))
        assert len(videos) == 4
        for video in videos:
            assert iio.immeta(video, plugin="FFMPEG")["fps"] == pytest.approx(fps or 8, abs=0.01)


# ---- Prompts -----------------------------------------------------------------------------------------------


def test_only_what_is_drawn_or_evaluated_is_encoded(settings, tmp_path, monkeypatch):
    """Of 100,000 lines, within seconds."""
    file = tmp_path / "many.txt"
    file.write_text("".join(f"a red cube, number {n}\n" for n in range(100_000)))
    encoded = []

    def encode(model, prompts, cfg, real=vader.VideoModel.encode):
        encoded.extend(prompts)
        return real(model, prompts, cfg)

    monkeypatch.setattr(vader.TextToVideoUNet, "encode", encode)
    start = time.time()
    rows = vader.train(replace(settings, prompts=str(file), steps=3, grad_accum=2, eval_every=3))
    seconds = time.time() - start
    drawn = [prompt for row in rows if "eval" not in row for prompt in row["prompts"]]
    assert len(drawn) == 3 * 2 * 2
    evaluated = next(row["eval"]["prompts"] for row in rows if "eval" in row)
    texts = [prompt.text for prompt in encoded]
    assert len(texts) == len(set(texts)) == 3 * 2 * 2 + 2 * 2 + 1 and "" in texts
    assert {*drawn, *evaluated} <= {*texts}
    assert seconds < 60, f"{seconds:.0f} s"


def test_several_processes_draw_what_is_encoded(settings, monkeypatch):
    """Also where their batches are more than the file has."""
    cfg = vader.resolve(replace(settings, steps=2, grad_accum=2))
    for count in (5, 100):
        lines = [Prompt(str(n)) for n in range(count)]
        monkeypatch.setattr(vader, "ranks", lambda: (1, 3))
        encoded = vader.drawn_prompts(lines, cfg)
        drawn = [prompt for number in range(2 * 2 * 3) for prompt in vader.batch_prompts(lines, cfg, number)]
        assert {*drawn} == {*encoded} and len(encoded) == min(count, 24)


def test_embeddings_wait_in_host_memory(settings):
    """On a GPU only those of a batch are there; bench/test_gpu.py walks that."""
    cfg = checked(settings)
    conds = vader.make_model(cfg).encode([Prompt("a red cube"), Prompt("")], cfg)
    assert len(conds) == 2
    for cond in conds.values():
        assert {value.device.type for value in cond.values()} == {"cpu"}


@pytest.mark.parametrize("name", ["clip", "hps", "pickscore"])
def test_a_prompt_that_a_reward_cuts_gets_a_line(name, capfd):
    words = "red cube moon sea kite blue star over the a".split() * 20
    terms = rewards.make_terms(name, "cpu", torch.float32, TOY)
    _, reward = terms[name]
    limit = prompts.text_limit(reward.networks[0])
    whole = " ".join(words[: limit - 2])  # each a token, beside the first and the last one
    cut = " ".join(words[: limit - 1])
    run = vader.Run(None, None, None, terms, {}, None)
    prompts.warn_of_prompts_cut_by_rewards(run, ["a moon", whole])
    assert capfd.readouterr().out == ""
    prompts.warn_of_prompts_cut_by_rewards(run, ["a moon", cut, whole, cut + " moon"])
    assert re.fullmatch(f"{name} reads {limit} tokens: 2 prompts are longer.*\n", capfd.readouterr().out)


# ---- Going on ----------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(settings):
    """The folder of a LoRA of one update."""
    vader.train(replace(settings, steps=1, eval_videos=0))
    return f"{settings.out}/lora"


@pytest.mark.parametrize("mode", ["sample", "eval"])
def test_videos_go_on_where_they_stopped(settings, tuned, tmp_path, monkeypatch, mode):
    def out_of(name):
        return {
            path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.mp4")
        }

    (tmp_path / "five.txt").write_text("a\nb\nc\nd\ne\n")
    cfg = replace(
        settings, mode=mode, lora=tuned, prompts=str(tmp_path / "five.txt"), lora_rank=None, steps=None
    )
    whole, parts = (replace(cfg, out=str(tmp_path / name)) for name in ("whole", "parts"))
    assert vader.main(command(whole)) == 0

    made = []

    def write(path, *rest, real=vader.write_video):
        if len(made) == 3 and path.name == "002.mp4":
            raise KeyboardInterrupt
        made.append(path)
        real(path, *rest)

    monkeypatch.setattr(vader, "write_video", write)
    assert vader.main(command(parts)) == 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("*.mp4")}
    made.extend(["no stop"] * 3)
    assert vader.main(command(parts)) == 2  # without --resume
    assert vader.main([*command(parts), "--resume"]) == 0
    assert out_of("whole") == out_of("parts")
    kept = [path for path, changed in before.items() if path.stat().st_mtime_ns == changed]
    assert len(kept) == len(before) > 1
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert rows[0] == rows[1] and rows[0].count("\n") == (2 if mode == "eval" else 1)
    for row in map(json.loads, rows[0].splitlines()):
        assert row["eval"]["prompts"] == ["a", "b", "c", "d", "e"]


def test_a_damaged_or_other_folder_is_not_gone_on_with(settings, tuned, tmp_path):
    cfg = replace(
        settings, mode="eval", lora=tuned, lora_rank=None, out=str(tmp_path / "eval"), eval_videos=16
    )
    (tmp_path / "two.txt").write_text("a\nb\n")
    again = [*command(replace(cfg, prompts=str(tmp_path / "two.txt"))), "--resume"]
    assert vader.main(again) == 0
    for words, problem in (
        (["--seed", "3"], "was started with --seed 0"),
        (["--mode", "sample"], "was started with --mode eval"),
        (["--prompts", settings.prompts], "was started with other prompts"),
    ):
        with pytest.raises(BadInput, match=problem):
            checks.check_input(vader.parse_args([*again, *words]))
    file = tmp_path / "eval" / "videos.jsonl"
    for text in (
        "[]\n",
        "{}\n",
        '{"first": 0, "eval": {"folder": "base", "prompts": ["a"], "reward": []}}\n',
    ):
        file.write_text(text)
        with pytest.raises(BadInput, match="videos.jsonl is damaged"):
            checks.check_input(vader.parse_args(again))


def test_what_changed_under_its_name_is_noticed(settings, tuned, tmp_path):
    """Where a run goes on: of --lora, --base_lora and --reward_weights."""
    import shutil

    shutil.copytree(tuned, tmp_path / "base")
    shutil.copytree(f"{TOY}/aesthetic", tmp_path / "rewards" / "aesthetic")
    more = dict(lora=tuned, base_lora=str(tmp_path / "base"), reward_weights=str(tmp_path / "rewards"))
    cfg = replace(settings, out=str(tmp_path / "second"), eval_videos=0, lora_rank=None, **more)
    vader.train(cfg)
    longer = replace(cfg, resume=True, steps=3)
    checks.check_input(longer)
    files = {
        "lora": tuned,
        "base_lora": f"{tmp_path}/base",
        "reward_weights": f"{tmp_path}/rewards/aesthetic",
    }
    for flag, folder in files.items():
        weights = next(path for path in Path(folder).iterdir() if path.suffix in (".safetensors", ".pth"))
        data = weights.read_bytes()
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(BadInput, match=f"was started with another content of --{flag}"):
            checks.check_input(longer)
        weights.write_bytes(data)
    checks.check_input(longer)
    assert record.digest(None) is record.digest("owner/name") is None


def test_the_last_line_says_what_comfyui_takes(checkpoints, settings, tmp_path, capfd):
    lora_files.tell_of_comfyui(tmp_path)
    assert capfd.readouterr().out == ""
    size = dict(num_frames=5, height=32, width=32, num_inference_steps=2, steps=1, eval_videos=0)
    vader.train(replace(settings, model=str(checkpoints("wan")), guidance_scale=1, **size))
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.startswith(f"ComfyUI takes {settings.out}/lora/comfyui.safetensors")


def test_a_checkpoint_of_another_optimizer_is_not_gone_on_with(settings, monkeypatch):
    vader.train(replace(settings, steps=1, eval_videos=0))

    def sgd(run):
        return torch.optim.SGD(vader.lora_parameters(run.model).values(), lr=0.1, momentum=0.9)

    monkeypatch.setattr(vader, "make_optimizer", sgd)
    with pytest.raises(BadInput, match="is of another optimizer"):
        vader.train(replace(settings, steps=2, eval_videos=0, resume=True))


# ---- Mistakes and misspellings -----------------------------------------------------------------------------


def test_a_maker_without_return_is_named(settings, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "mine", lambda device, dtype, weights: None)
    with pytest.raises(BadInput, match="what makes 'mine' returned None: it must return the reward"):
        vader.train(replace(settings, reward="mine"))


@pytest.mark.parametrize(
    "words, advice",
    [
        ("--step 3", "did you mean '--steps'"),
        ("--precision fp16", "see --help"),
        ("--prompts a.txt b.txt", "unknown argument 'b.txt': see --help; a flag takes one value"),
        ("--checkpointing", "--checkpointing: expected one argument, true or false"),
        ("--mode sample --model tiny --eval_prompts prompts.txt", "--eval_prompts is for training"),
        ("--base_lora a/b --model tiny", "the spelling if it is a folder here"),
        ("--model a/b", "or take --model tiny"),
    ],
)
def test_what_is_advised(words, advice, capfd, monkeypatch):
    monkeypatch.setattr(rewards, "list_hub", unreachable)
    assert vader.main(words.split()) == 2
    line = capfd.readouterr().err
    assert advice in line and line.count("\n") == 1


def unreachable(source):
    raise ConnectionError


def test_a_reader_that_went_away(tmp_path):
    """As of `| head -1`: a line, and no traceback."""
    read, write = os.pipe()
    os.close(read)
    words = "--model tiny --mode sample --num_frames 2 --height 32 --width 32 --num_inference_steps 1".split()
    words += ["--prompts", "tiny/unseen.txt", "--out", str(tmp_path / "out")]
    process = subprocess.run(
        [sys.executable, "vader.py", *words], cwd=HERE, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    said = process.stderr.decode().splitlines()
    assert process.returncode == 1 and [line for line in said if "%|" not in line] == [
        "vader.py: stopped: nobody reads what is printed: go on with --resume"
    ]
