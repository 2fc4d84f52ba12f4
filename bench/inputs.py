"""Inputs by the hundred, made here: is a bad one refused in one line, at once, and nothing changed by it?

    python bench/inputs.py [flags runs ...]     # these kinds, else all: about 20 minutes of a core

Each goes through `vader.main` in a forked process. Refused is exit code 2 ("vader.py: error: ...") or 1
("vader.py: stopped: ..."), that line alone on stderr, and in it the flag or file; a run folder is as before,
a new --out empty. Odd inputs that are right must pass. Prints what went wrong, and a count by kind; the exit
code is 0 if nothing did. accepted: a bad input passed; failed: a right one was refused; lines: not one of
vader.py's; unnamed: it names neither flag nor file; late: a network of --model has loaded before; changed: a
folder was; unmade: it passed, and has written nothing.
"""

import collections
import contextlib
import json
import os
import re
import resource
import shutil
import sys
import tempfile
from pathlib import Path
from typing import get_args, get_type_hints

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch  # noqa: E402 (these require the line above, or the one below)
from PIL import Image  # noqa: E402
from torch.utils._pytree import tree_flatten  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import cases  # noqa: E402
import kinds  # noqa: E402
import machine  # noqa: E402
from cases import BYTES, NOISE, TENSORS, TEXT, TINY, Case, copies, edit  # noqa: E402

import vader  # noqa: E402
from extras import checks  # noqa: E402

LONG = "x" * 5000

# Tables: cells with a bar between. OTHER: flags of a run gone on with; EDITS: of json files.
SETTINGS = """\
--device cuda|--device cuda:9|--device xla|--device mps|--device tpu|--device cpu:x|--device meta|--dtype fp16
--guidance_scale 1 --negative_prompt x|--lora_targets to_q,|--lora_targets conv1|--height 33|--steps 1 2|@x|-x
--width 4|--decode_frames 3|--backprop_steps 2|--width 80000000|--num_frames 999999999|--reward_weights models
--num_frames 1 --reward dynamic|--num_frames 1 --reward vjepa|--model tiny-wan --num_frames 5 --height 24|x|--
--model tiny-wan --num_frames 3|--model tiny-wan --num_frames 5 --eta .5|--lora run/lora --lora_targets to_q
--lora run/lora --lora_rank 3|--lora run/lora --lora_alpha 3|--reward_weights README.md|--model tiny-i2v
--clips 2|--clips x|--push_to_hub x|--push_to_hub a/b/c|--push_to_hub a/b|--model tiny-i2v --clips 3
--watch 2*clip|--watch clip+clip|--watch colorful|--watch clip,hps|--watch remove|--watch ask: --vlm x
--watch clip --eval_videos 0|--mode eval --watch clip|--stop_when_worse 1 --watch none|--lora_scale 0.5
--mode strength|--mode strength --out run/lora|--mode sample --lora_scale 2"""
REWARDS = """\
+|colorful +|+ colorful|0.5*|*colorful|1e3colorful|nan*colorful|9999999999*colorful|1**colorful|0.5 colorful
colorful -|colorful, dynamic|colorful*0.5|(colorful)|1e10*colorful|colorfull|:|é|colorful + colorful|remove
clip + 2*clip|colorful:3|smooth:x|remove:|remove:nosuch|hps:2|0*colorful|camera|camera:left|ask:"|hps ++ ask
action|action:nosuch|clip:a b/c|clip:a/b"""
MODELS = "a b/c|../x|a/b/c|name with spaces|a/b|/nosuch|a//b|a/|é/x|Tiny|README.md|tiny/images|tiny/t2v/unet|"
MODELS += "http://x.y/a/b|a/b@main|.|WanPipeline|tiny/t2v/unet/diffusion_pytorch_model.safetensors"
LINES = r"""{|[]|null|1|"text"|{}|text|{"prompt": 1}|{"prompt": null}|{"prompt": ["a"]}|{"promt": "a"}|NaN
{"prompt": "a", "label": 1}|{"prompt": ""}|{"prompt": "a"} {"prompt": "b"}|{'prompt': 'a'}
{"prompt": 1e400}|{"prompt": true}|{"prompt": {"a": "b"}}|{"PROMPT": "a"}|{"prompt": "a"|{"prompt": "\ud800"}
{"prompt": "a", "image": 1}|{"prompt": "a", "image": ["a"]}|{"prompt": "a", "image": true}|{"prompt": "a"},
{"prompt": "a", "image": "nosuch.png"}|{"prompt": "a", "image": "a\u0000b"}|{"prompt": "a", "image": "."}"""
OTHER = """\
seed 1|lr .5|reward dynamic|num_frames 3|height 40|num_inference_steps 2|guidance_scale 2|eta .5|lora run/lora
coupling .5|detach_uncond 1|decode_frames 1|steps 1|timestep_spacing leading|batch_size 2
grad_accum 2|max_grad_norm 2|lora_rank 2|lora_targets to_q|eval_videos 2|negative_prompt x|offload 1
prompts tiny/unseen.txt|eval_prompts tiny/unseen.txt|model tiny-wan --num_frames 5"""
EDITS = """\
t2v model_index _class_name "Nosuch" "LTXPipeline" "FluxPipeline" 1 null [] GONE|i2v unet/config in_channels 4
t2v unet/config _class_name "UNet2DConditionModel" GONE|t2v vae/config _class_name "AutoencoderKLWan" GONE
t2v vae/config latent_channels 16 "x"|t2v unet/config in_channels 9 "x"|wan model_index boundary_ratio 0.9
t2v scheduler/scheduler_config clip_sample true|t2v scheduler/scheduler_config prediction_type "nosuch" 1
t2v scheduler/scheduler_config num_train_timesteps "x" 0|wan scheduler/scheduler_config flow_shift "x" -1 NaN
wan model_index transformer_2 ["diffusers","WanTransformer3DModel"]|wan model_index expand_timesteps true
cogvideox transformer/config patch_size_t 2|lora adapter_config peft_type "IA3" GONE
lora adapter_config r 0 -1 "x" 3 10000000|lora adapter_config target_modules [] null ["nosuch"] ["to_q"] 1"""
# Not read, or tokenizer.json, beside them, holds what they do. Changes after which all is as it was.
UNREAD = r"merges.txt|vocab.json|README.md|\.lock|index.html|data.js|.*\.mp4|"
HARMLESS = r"(tokenizer|preprocessor)_config.json: \{\}|t2v/tokenizer/tokenizer.json: removed|\(the same\)"
HARMLESS += r"|lora/vader.json: (removed|\{\})"
cells = re.compile(r"[|\n]").split


def harmed(source, folder, more=(), skip="$", copy=os.symlink):
    """For all that can happen to a file of source, and more: a harmed copy of source; gives what was done."""
    todo = [*more]
    for file in sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file()):
        known = BYTES + TENSORS * bool(re.search(r"\.safetensors|\.pth|HPS", file.name))
        todo += [(file, *harm) for harm in known if not re.match(UNREAD + skip, file.name)]
    for name, file, key, *values in map(str.split, cells(EDITS)):
        changes = {v: edit(key, v if v == "GONE" else json.loads(v)) for v in values if name == source.name}
        todo += [(f"{file}.json", f"{key}={v}", True, change) for v, change in changes.items()]
    yield from copies(source, folder, todo, copy)


# ---- Kinds of inputs: (what, flags, pattern of what the line must name; None: it may pass) -----------------
def flags(work):
    """Every flag: wrong types, values out of range, none, misspelt."""
    for name, hint in get_type_hints(vader.Config).items():
        kinds, values = get_args(hint) or (hint,), ["", "nosuch", f"/nosuch/{LONG}", f"{10**20}", "nan"]
        low = checks.RANGES.get(name, (0 if float in kinds else 1, 0))[0]
        values += "inf -inf 1e400 1,5 0x10".split()
        if {int, float} & {*kinds}:
            values += ["1.5"] * (float not in kinds) + ["-1"] * (low >= 0) + ["0"] * (low > 0)
        for value in [] if name in ("negative_prompt", "out") else values:
            yield f"--{name}={value[:30]}", [f"--{name}={value}"], f"--{name}|{value[:30] or name}"
        yield f"--{name[:-1]}", [f"--{name[:-1]}=1"], f"--{name[:-1]}"


def settings(work):
    """Devices, sizes, rewards and names of models that do not exist, or do not fit."""
    for text in cells(SETTINGS):
        words = [str(work / word) if (work / word).exists() else word for word in text.split()]
        yield text, words, "|".join([*re.findall(r"--\w+", text), "argument|memory|image|dynamic|vjepa"])
    for flag, table in (("--reward", REWARDS), ("--model", MODELS)):
        for text in cells(table):
            yield f"{flag} {text}", [flag, text], "|".join([flag, *re.findall(r"\w\w+", text)])


def prompts(work):
    """Prompt files, as --prompts and as --eval_prompts."""
    (made := work / "prompts").mkdir()
    files = {"empty": b"", "blank": b" \n\t\n", "comments": b"# a\n#b", "nul": b"a\0b\nc"}
    files |= {
        "noise": NOISE.encode("utf-16"),
        "bom": b"\xef\xbb\xbf",
        "latin": b"caf\xe9\nb",
        "utf16": TEXT.encode("utf-16"),
    }
    files = {f"{name}.txt": data for name, data in files.items()} | {"list.jsonl": b"[]"}
    files |= {f"good.{end}": TEXT.encode() for end in "csv tsv json CSV md gz parquet xlsx bak".split()}
    lines = [*cells(LINES), "[" * 10**5, '{"prompt": ' + "9" * 5000]
    files |= {f"{n}.jsonl": b'{"prompt": "a cube"}\n' + line.encode() for n, line in enumerate(lines)}
    for name, data in files.items():
        (made / name).write_bytes(data)
    (made / "one").write_text("a red cube\n" * 2)
    yield "one prompt", ["--prompts", made / "one"], "one"
    for flag in ("--prompts", "--eval_prompts"):
        for name in [*files, "nosuch.txt", ".", "empty.txt/x", "/dev/null"]:
            yield f"{flag} {name} {files.get(name, b'')[21:70]}", [flag, made / name], str(made / name)


def images(work):
    """Pictures for a model that starts from one."""
    (made := work / "pictures").mkdir()
    files = {"empty.png": b"", "text.png": b"hello", "a.svg": b"<svg></svg>", "noise.png": NOISE.encode()}
    for end in ("png", "jpg", "gif", "webp", "tiff", "bmp"):
        Image.open(TINY / "photo-cat.jpg").convert("RGB").save(made / f"whole.{end}")
        data = (made / f"whole.{end}").read_bytes()
        files |= {f"{part} of.{end}": data[: int(len(data) * part)] for part in (0.01, 0.5, 0.9)}
    for size in ((14000, 13000), (2**31 - 1, 2**31 - 1), (0, 8), (0, 0)):  # what a BMP says of itself
        files[f"{size}.bmp"] = data[:18] + b"".join(n.to_bytes(4, "little") for n in size) + data[26:]
    for name, data in files.items():
        (made / name).write_bytes(data)
    odd = ["nosuch.png", ".", "http://x/y.png", "", None, LONG, "a\0b", 1, ["whole.png"], True, {}]
    for image in [*files, *odd]:
        rows = [{"prompt": "a cube", "image": "whole.png"}, {"prompt": "a moon", "image": image}]
        (made / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
        yield str(image)[:40], ["--model", "tiny-i2v", "--prompts", made / "bad.jsonl"], str(made)


def models(work):
    """Folders of models with one thing damaged, or without weights."""
    for source in (TINY / "t2v", TINY / "wan", TINY / "i2v", ROOT / "bench" / "configs" / "cogvideox"):
        words = ["--model", work / "model", "--num_frames", {"wan": 5, "cogvideox": 9}.get(source.name, 2)]
        words += ["--prompts", TINY / "images.jsonl"] if source.name == "i2v" else []
        yield from ((what, words, f"{work}/model|--model") for what in harmed(source, work / "model"))


def weights(work):
    """Folders of rewards with one thing damaged."""
    for name in "aesthetic clip hps pickscore remove:star action:rising vjepa".split():
        made, words = work / "rewards" / name.split(":")[0], ["--reward", name, "--reward_weights"]
        for what in harmed(TINY / "rewards" / made.name, made):
            yield what, [*words, made.parent], str(made)


def loras(work):
    """Folders of LoRAs that are damaged, or of another model."""
    for words in (["--mode", mode, "--lora"] for mode in ("train", "sample")):
        for what in harmed(work / "run" / "lora", work / "lora"):
            yield f"{words[1]}: {what}", [*words, work / "lora"], str(work / "lora")
        for place in ("nosuch", "good.txt", "run/checkpoint", TINY / "t2v", "wan/lora"):
            yield f"{words[1]}: {place}", [*words, work / place], "--lora"


def runs(work):
    """Run folders, damaged or gone on with by other settings, and what can't be --out."""
    good, run, file = work / "run", work / "copy", Path("checkpoint") / "state.pt"
    again, size = ["--out", run, "--resume", "--steps", 3], (good / file).stat().st_size
    todo = [(file, f"lora: {name}", "lora", change) for name, _, change in TENSORS]
    for key in ("step", "lora", "optimizer"):
        todo += [(file, f"{key}={value}", True, edit(key, value)) for value in ("GONE", "x", {}, -1, 2.5)]
    for at in range(100, size, size // 20):
        flip = lambda data, at=at: data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]  # noqa: E731
        todo += [(file, f"bit of byte {at}", False, flip)]
    for what in harmed(good, run, todo, "adapter|vader", shutil.copy2):
        with contextlib.suppress(Exception):  # bits that the file's reader does not look at
            a, b = (tree_flatten(torch.load(at / file, weights_only=True)) for at in (good, run))
            same = all(x.equal(y) if torch.is_tensor(x) else x == y for x, y in zip(a[0], b[0], strict=True))
            what += " (the same)" * (same and a[1] == b[1] and "bit of" in what)
        yield what, again, str(run)
    shutil.copytree(good, run)
    for text in cells(OTHER):
        words = [str(work / word) if (work / word).exists() else word for word in text.split()]
        yield f"resumed with --{text}", [*again, f"--{words[0]}", *words[1:]], f"--{words[0]}|prompts|{run}"
    for place in ["/proc/x", "/dev/null", "/dev/null/x", "/sys/x", LONG, run / "lora", run / "config.json"]:
        yield f"--out {str(place)[:40]}", ["--out", place], f"--out|{place}"


# ---- Running them ------------------------------------------------------------------------------------------
EARLY = (flags, settings, prompts, images, loras)  # is refused before a network of the model loads
KINDS = {kind.__name__: kind for kind in (flags, settings, prompts, images, models, weights, loras, runs)}
KINDS |= {kind.__name__: kind for kind in kinds.ALL + machine.ALL}


def main():
    seconds = collections.Counter()
    counts = {name: collections.Counter() for name in sys.argv[1:] or KINDS}
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="inputs") as folder:
        work = Path(folder)
        cases.note_loading(work / "loaded")
        (work / "good.txt").write_text(TEXT)
        cases.finished(work, work / "run", "--steps", 2)
        cases.finished(work, work / "wan", "--model", "tiny-wan", "--num_frames", 5)
        for name, count in counts.items():
            begin = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
            for made in KINDS[name](work):
                case = made if isinstance(made, Case) else Case(*made, early=KINDS[name] in EARLY)
                if case.names is None or re.search(HARMLESS, case.what):
                    case = case._replace(names="", right="either")
                found, code, lines = cases.judge(work, case)
                count[found] += 1
                if found not in cases.RIGHT:
                    said = [f"{found}: {name}: {case.what} (exit {code})", *lines[-3:]]
                    print(*said, sep="\n    ", flush=True)
            seconds[name] = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - begin
    counts["all"], seconds["all"] = sum(counts.values(), collections.Counter()), seconds.total()
    outcomes = (*cases.RIGHT, *cases.WRONG)
    print(f"\n{'kind':12}{'cases':>7}{'seconds':>9}", *(f"{outcome:>9}" for outcome in outcomes))
    for name, count in counts.items():
        figures = (f"{count[outcome]:9}" for outcome in outcomes)
        print(f"{name:12}{count.total():7}{seconds[name]:9.0f}", *figures)
    return int(any(counts["all"][outcome] for outcome in cases.WRONG))


if __name__ == "__main__":
    sys.exit(main())
