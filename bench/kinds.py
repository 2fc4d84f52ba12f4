"""More kinds of inputs for bench/inputs.py: numbers of models' configs, others' LoRAs, prompts, --resume."""

import json
import re
import shutil

import test_layouts as layouts
import torch
from cases import BYTES, ROOT, TINY, Case, copies, edit, finished
from safetensors.torch import load_file, save_file
from test_models import BUILDERS

import rewards
import vader
from extras import lora

CONFIGS = ROOT / "bench" / "configs"
# What no number of a config can be; the last ones are large. Of a list of numbers: its last one.
ODD = ["x", None, [], -1, 0, float("inf"), float("nan"), 10**6]


# ---- A model's configs -------------------------------------------------------------------------------------
def is_number(value):
    return type(value) in (int, float)


def odd_numbers(source):
    """A (file, *damage) for each number, null or list of numbers in a model's configs, and each odd value."""
    for file in sorted(source.rglob("*.json")):
        if file.parent.name == "tokenizer" or file.name == "model_index.json":
            continue
        for key, value in json.loads(file.read_text()).items():
            odd = []
            if is_number(value) or value is None:
                odd = [x for x in ODD if x is not value and (x is not None or "sigma" not in key)]
                odd += [1000] * ("layers" in key)
            elif type(value) is list and value and is_number(value[0]):
                last = [x for x in ODD if x not in (-1, 0) or "mean" not in key]  # which a mean may be
                odd = ["x", None, [], *([*value[:-1], x] for x in last), value[:-1], value * 300]
            for new in odd:
                yield file.relative_to(source), f"{key}={str(new)[-30:]}", True, edit(key, new)


def flags_of(source):
    words = ["--num_frames", 5 if source.name == "wan" else 2]
    return [*words, *(["--prompts", TINY / "images.jsonl"] if source.name == "i2v" else [])]


def configs(work, every=11):
    """One in eleven of all odd numbers in models' configs; it passes only if it is not read."""
    for source in (TINY / "t2v", TINY / "wan", TINY / "i2v"):
        words, model = flags_of(source), work / "model"
        like = finished(work, work / f"like-{source.name}", "--model", source, *words)
        for what in copies(source, model, [*odd_numbers(source)][::every]):
            early = "encoder/" not in what  # the first network of all
            how = dict(right="either", early=early, seconds=8, like=like)
            yield Case(what, ["--model", model, *words], f"{model}|--model", **how)


def pipelines(work):
    """A pipeline's name over another family's parts, without weights."""
    known = {file: json.loads(file.read_text())["_class_name"] for file in CONFIGS.glob("*/model_index.json")}
    names = {*known.values(), "StableDiffusionPipeline", "LTXImageToVideoPipeline"}
    for file, own in sorted(known.items()):
        for name in sorted(names - {own}):
            if {own, name} == {"LTXPipeline", "LTXImageToVideoPipeline"}:
                continue
            todo = [("model_index.json", name, True, edit("_class_name", name))]
            for what in copies(file.parent, work / "model", todo):
                words = ["--model", work / "model", "--num_frames", 9]
                yield Case(what, words, "--model|model_index|CogVideoX 1.5", early=True, seconds=8)


# ---- LoRAs of other trainers -------------------------------------------------------------------------------
KINDS = {"dora_scale": "DoRA", "hada_w1_a": "LoHa", "lokr_w1": "LoKr", "oft_blocks": "OFT"}
KINDS |= {"lora_mid.weight": "LoCon", "lora_magnitude_vector": "DoRA"}
HEADERS = [("r", "x"), ("r", 0), ("lora_alpha", "x"), ("lora_alpha", 0), ("lora_alpha", -1), ("r", None)]
HEADERS += [("lora_alpha", float("nan")), ("use_dora", True), ("target_modules", 1), ("bias", "all")]


def changed_tensors(state):
    """(what, tensors, pattern of what must be said, what is right) of a LoRA's file with one thing odd."""
    up = next(key for key in state if re.search(r"lora_up|lora_B|lora\.up", key))
    down = up.replace("up", "down").replace("lora_B", "lora_A")
    layer = re.split(r"\.lora[_.]", up)[0]
    yield "one matrix gone", {key: w for key, w in state.items() if key != up}, "", "refused"
    whole = {key: w for key, w in state.items() if not key.startswith(f"{layer}.")}
    yield (
        "one layer gone",
        whole,
        "",
        "either" if "lora_unet_blocks" in up else "passes",
    )  # musubi's: as stock
    yield "only alphas", {key: w for key, w in state.items() if key.endswith("alpha")}, "", "refused"
    yield "no tensors", {}, "", "refused"
    for x in (torch.nan, torch.inf):
        yield f"{x}", state | {up: state[up] * x}, "", "refused"
    for shape in ((7,), (7, 7), (0, *state[up].shape[1:]), (*state[up].shape, 1, 1, 1)):
        yield f"of shape {shape}", state | {up: torch.ones(shape)}, "", "refused"
    yield "rank 0", state | {up: state[up][:, :0], down: state[down][:0]}, "", "refused"
    yield "another rank", state | {up: state[up][:, :2], down: state[down][:2]}, "", "either"
    yield "one more", state | {"nobody.lora_up.weight": torch.ones(4, 4)}, "", "refused"
    yield "prefix", {f"model.{key}": w for key, w in state.items()}, "", "refused"
    for alpha in (0.0, -1.0, torch.nan, torch.inf, [1.0, 2.0], 1j):
        yield f"alpha {alpha}", state | {f"{layer}.alpha": torch.tensor(alpha)}, "alpha", "refused"
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        yield f"{dtype}", {key: w.to(dtype) for key, w in state.items()}, "", "passes"
    for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64):
        yield f"{dtype}", {key: w.to(dtype) for key, w in state.items()}, "", "refused"
    yield "float8", {key: w.to(torch.float8_e4m3fn) for key, w in state.items()}, "", "either"
    for end, kind in KINDS.items():
        yield kind, state | {f"{layer}.{end}": torch.ones(32, 1)}, kind, "refused"
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight"
    text = {text.format(end): torch.ones(4, 4) for end in ("up", "down")}
    yield "a text encoder's", text, "", "refused"
    yield (
        "of a ControlNet",
        {f"controlnet_down_blocks.{n}.weight": torch.ones(4, 4) for n in (0, 1)},
        "",
        "refused",
    )


def odd_files(file, model):
    """(what, what is written as file) of LoRAs that are none, of other endings, or of a broken header."""
    data = file.read_bytes()
    for name, _, change in BYTES[1:]:
        yield name, "safetensors", change(data)
    yield "header cut", "safetensors", data[:40]
    yield "header's length", "safetensors", b"\xff" * 8 + data[8:]
    torch.save(load_file(file), pickled := file.with_suffix(".made"))
    for ending in ("pt", "bin", "ckpt", "pth", "gguf", "safetensors", "json", "zip"):
        yield f"pickled as .{ending}", ending, pickled.read_bytes()
    for path in sorted(model.rglob("*.safetensors")):
        yield f"whole {path.relative_to(model)}", "safetensors", path.read_bytes()


def formats(work):
    """LoRAs in the formats of other trainers, whole and damaged, as --base_lora and --lora."""
    made, damaged = work / "formats", ("animatediff kohya", "wan musubi", "wan diffusion-pipe")
    made.mkdir()
    for name in layouts.FOLDERS:
        torch.manual_seed(0)
        BUILDERS[name](model := work / "models" / name)
        frames = 9 if name in ("ltx", "cogvideox") else 5
        words = ["--mode", "sample", "--model", model, "--num_frames", frames, "--num_inference_steps", 2]
        network = lora.build_on_meta(*vader.find_model(str(model))[:2])
        for layout in [layout for layout in layouts.LAYOUTS if layout.split()[0] == name]:
            layouts.save_layout(layout, network, file := made / f"{name}.safetensors")
            said = layouts.LEFT_OUT.get(layout.removeprefix(f"{name} "), "")
            yield Case(f"{layout}: whole", [*words, "--base_lora", file], said, "passes")
            if layout not in damaged:
                continue
            yield Case(f"{layout}: whole, --lora", [*words, "--lora", file], "--lora", "either", early=True)
            for n, (what, tensors, said, right) in enumerate(changed_tensors(load_file(file))):
                odd = made / "odd.safetensors"
                save_file({key: w.contiguous() for key, w in tensors.items()}, odd)
                names = said if right == "passes" else f"^(?=.*--base_lora).*{said}"
                yield Case(f"{layout}: {what}", [*words, "--base_lora", odd], names, right, early=True)
                if n % 3 == 0:
                    right = "refused" if right == "refused" else "either"
                    case = Case(f"{layout}, --lora: {what}", [*words, "--lora", odd], "--lora", right)
                    yield case._replace(early=True)
        if name not in ("animatediff", "wan"):
            continue
        told = {"format": "pt"}
        state = layouts.diffusers_names(network, layouts.FOLDERS[name])
        for key, value in HEADERS:
            config = dict(r=4, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
            config[key] = value
            config = {f"{layouts.FOLDERS[name]}.{k}": v for k, v in config.items()}
            told["lora_adapter_metadata"] = json.dumps(config)
            save_file(state, odd := made / "odd.safetensors", told)
            what = f"{name}: header's {key} {value}"
            yield Case(what, [*words, "--base_lora", odd], "--base_lora", early=True)
        for what, ending, data in odd_files(file, model):
            (odd := made / f"odd.{ending}").write_bytes(data)
            yield Case(f"{name}: {what}", [*words, "--base_lora", odd], "--base_lora", early=True)
        for what, path in dict(nothing="nosuch.safetensors", folder=".", model=model).items():
            yield Case(f"{name}: {what}", [*words, "--base_lora", made / path], "--base_lora", early=True)


# ---- Prompts, sizes ----------------------------------------------------------------------------------------
def many(work):
    """Files of very many prompts, very long ones, and odd characters: all must pass, and soon."""
    rows = [json.dumps({"prompt": f"a red cube, number {n}"}) for n in range(10_000)]
    files = {
        "100,000 lines.txt": "\n".join(f"a red cube, number {n}" for n in range(100_000)),
        "10,000 rows.jsonl": "\n".join(rows),
        "one of 1 MB.txt": "a red cube\n" + "a blue moon " * 90_000,
        "100 of 100 kB.txt": "\n".join(f"{n} " + "a blue moon " * 9_000 for n in range(100)),
        "one word of 1 MB.txt": "a red cube\n" + "x" * 10**6,
        "tabs.txt": "a\tred\tcube\n\ta blue moon\t\n",
        "zero width.txt": "a\u200bred\u200d cube\n\u2060a blue\ufeff moon\n",
        "right to left.txt": "\u05e7\u05d5\u05d1\u05d9\u05d4 \u202eabc\u202c\n\u0645\u0643\u0639\u0628\n",
        "crlf.txt": "a red cube\r\n# a comment\r\n\r\na blue moon\r\n",
        "crlf.jsonl": rows[0] + "\r\n\r\n" + rows[1] + "\r\n",
        "no newline at the end.txt": "a red cube\na blue moon",
        "emoji.txt": "\U0001f9ca a cube\n\U0001f468\u200d\U0001f680\n",
        "accents apart.txt": "cafe\u0301\ncaf\u00e9\n",
    }
    made = work / "many"
    made.mkdir()
    for name, text in files.items():
        (made / name).write_bytes(text.encode())
        for mode in ("train", "sample"):
            if mode == "train" or len(text) < 10_000:
                yield Case(f"{name}, {mode}", ["--mode", mode, "--prompts", made / name], right="passes")
        if len(text) < 10_000:
            words = ["--eval_prompts", made / name]
            yield Case(f"{name}, held out", words, right="passes")
    (made / "same.txt").write_text("a red cube\n" * 1000)
    (made / "invisible.txt").write_text("\u200b\n\u2060\n")
    same = ["--prompts", made / "same.txt"]
    yield Case("one prompt 1000 times", same, "same.txt")
    yield Case("one prompt 1000 times, none held out", [*same, "--eval_videos", 0], right="passes")
    yield Case("invisible", ["--prompts", made / "invisible.txt"], "invisible.txt", "either")


def sizes(work):
    """Frames that are smaller than a reward needs."""
    arguments = {"remove": "remove:star", "action": "action:rising", "camera": "camera:smooth"}
    for name in rewards.REWARDS:
        for side in (8, 16):
            reward = arguments.get(name, name)
            words = ["--reward", reward, "--height", side, "--width", side]
            words += ["--num_frames", 8, "--eval_videos", 0]
            names = f"{name}|--height|--width"
            yield Case(f"{reward} of {side} x {side}", words, names, "either", early=True)


# ---- Going on with a run -----------------------------------------------------------------------------------
def again(work):
    """--resume where what a path names, or what the run has written, is no longer the same."""
    run, few, named = work / "again", work / "few", work / "few" / "adapter_model.safetensors"
    longer = ["--out", run, "--resume", "--steps", 2]

    def changed(file):
        """A file's floating-point tensors a little larger."""
        state = {key: w * 1.25 if w.is_floating_point() else w for key, w in load_file(file).items()}
        save_file(state, file, {"format": "pt"})

    for flag, source in (("base_lora", TINY / "few"), ("lora", work / "run" / "lora")):
        shutil.copytree(source, few)
        words = [f"--{flag}", few]
        finished(work, run, *words)
        yield Case(f"--{flag} as it was", [*longer, *words], right="passes", made=run)
        shutil.rmtree(run)
        finished(work, run, *words)
        changed(named)
        yield Case(f"--{flag} of other content", [*longer, *words], f"--{flag}", early=True)
        shutil.rmtree(few)
        shutil.rmtree(run)
    shutil.copytree(TINY / "rewards", few)
    words = ["--reward", "clip", "--reward_weights", few]
    finished(work, run, *words)
    changed(few / "clip" / "model.safetensors")
    yield Case("--reward_weights of other content", [*longer, *words], "--reward_weights", early=True)
    shutil.rmtree(few)
    shutil.rmtree(run)

    videos, metrics = run / "base", run / "metrics.jsonl"
    for mode in ("sample", "eval"):
        words = ["--mode", mode, "--out", run]
        for what, damage, flags, right, names in (
            ("as it was", None, [], "either", "--out"),
            ("a video gone", lambda: (videos / "001.mp4").unlink(), [], "passes", ""),
            ("a video cut", lambda: cut(videos / "001.mp4"), [], "passes", ""),
            ("all videos gone", lambda: shutil.rmtree(videos), [], "passes", ""),
            ("metrics cut", lambda: cut(metrics), [], "either", f"metrics.jsonl|{run}"),
            ("metrics of noise", lambda: metrics.write_text("x\n"), [], "passes", ""),
            ("other prompts", None, ["--prompts", TINY / "unseen.txt"], "refused", "prompts"),
            ("other seed", None, ["--seed", 1], "refused", "--seed"),
            ("other LoRA", None, ["--lora", work / "run" / "lora"], "refused", "--lora"),
            ("to train", None, ["--mode", "train"], "refused", "--out|--mode"),
            ("the other mode", None, ["--mode", "evalsample".replace(mode, "")], "refused", "--out|--mode"),
            ("without --resume", None, ["--resume", "false"], "refused", "--out|--resume"),
        ):
            finished(work, run, *words[:2])
            if damage:
                damage()
            case = Case(f"{mode}: {what}", [*words, "--resume", *flags], names, right, right == "refused")
            yield case._replace(made=videos / "001.mp4")
            shutil.rmtree(run)
        finished(work, run)
        yield Case(f"a training run, {mode}", [*words, "--resume"], "--out|--mode", early=True)
        shutil.rmtree(run)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


ALL = (configs, pipelines, formats, many, sizes, again)
