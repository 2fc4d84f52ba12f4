"""Peak memory of one update by phase and its operations: predicted from config files alone, or measured.

    python bench/memory.py --model svd --reward hps --vram 16    # exit code 1 when it does not fit
    python bench/memory.py                                       # memory.csv: the rows that are not there yet
    python bench/memory.py --measure                             # on a CUDA GPU, its memory capped at 16 GB

Takes the flags of vader.py; no weights, no GPU, and no network for what is in bench/configs. A whole update
runs on networks without content: counted is what the allocator is asked for, not its rounding, nor CUDA's
own, nor the copies of the LoRA in extras/quick.py; the floating-point operations of matrix products,
convolutions and attention, two for a multiply-add; the kernels that are launched, which small ones wait for;
and what moves between card and host. memory.csv: gigabytes by phase, at the models' default sizes. --measure
makes the same updates with weights as PyTorch initialises them, and two sampling steps, and adds the others'
time.
"""

import argparse
import csv
import dataclasses
import gc
import itertools
import math
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import diffusers
import torch
import transformers
from fake import LiveStorages, remember, size_of, without_weights
from hours import Work, describe
from torch._subclasses.fake_tensor import FakeTensorMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import rewards  # noqa: E402 (needs the line above)
import vader  # noqa: E402
from extras import clips, offload, watch  # noqa: E402
from extras.base_lora import prepare  # noqa: E402
from extras.checks import check_settings  # noqa: E402

CONFIGS, TABLE = HERE / "configs", HERE / "memory.csv"
MODELS = ("modelscope", "zeroscope", "animatediff", "svd", "cogvideox", "cogvideox-5b", "ltx")
MODELS += ("wan", "anyflow", "wan2.2-5b")
LARGE = ("wan-14b", "wan2.2-a14b")  # always in nf4 and with --offload
ROWS = [("hps", False), ("hps", True), ("aesthetic", False), ("vjepa", False), ("ask", False)]
MORE = ["clip", "pickscore", "remove:book", "action:archery", "camera:smooth"]


def resolve(cfg: vader.Config) -> tuple[vader.Config, list[vader.Prompt]]:
    """`vader.resolve` in bf16 (or --dtype), from bench/configs where it has them; and a batch of prompts."""
    model = "modelscope" if cfg.model == "auto" else cfg.model
    known = dict(device="cpu", checkpointing=True, dtype="bf16" if cfg.dtype == "auto" else cfg.dtype)
    if (CONFIGS / model).is_dir():
        _, _, preset = vader.find_model(model)
        preset = preset | dict(num_frames=preset["num_frames"] * (cfg.clips or 1))
        auto = (None, "auto")
        known |= {name: value for name, value in preset.items() if getattr(cfg, name, "") in auto}
        known["offload"] = cfg.offload or preset.get("offload", False)
        model = str(CONFIGS / model)
    cfg = dataclasses.replace(cfg, model=model, **known)
    check_settings(dataclasses.replace(cfg, quantize="none"))  # nf4 is refused where there is no GPU
    cfg = vader.resolve(cfg)
    family, _, _ = vader.find_model(model)
    image = str(HERE.parent / "tiny" / "photo-cat.jpg") if family.images == "must" else None
    return cfg, [vader.Prompt(f"archery {n}", image) for n in range(cfg.batch_size)]


def make_terms(cfg: vader.Config, device) -> dict:
    """The rewards, from bench/configs/rewards where it has them."""
    folders = [cfg.reward_weights, str(CONFIGS / "rewards")]
    return rewards.make_terms(
        cfg.reward, device, vader.DTYPES[cfg.dtype], folders, vlm=cfg.vlm, quantize=cfg.quantize
    )


def predict(cfg: vader.Config, work: Work | None = None) -> dict[str, float]:
    """The peak of each phase of one update in GB: {phase: GB}. Raises BadInput.

    work: gets what the update does while "sampling", "score" and "walk back".
    """
    cfg, prompts = resolve(cfg)
    videos, T, K = cfg.grad_accum, cfg.num_inference_steps, cfg.backprop_steps
    sampler = vader.make_model(cfg).schedule(cfg)
    times = sampler.t[list(sampler.trainable[:1] or [0])]  # a step of the network that trains
    cfg = dataclasses.replace(cfg, num_inference_steps=1, backprop_steps=1)
    schedule = vader.Schedule(times, [1.0], [1.0], [1.0], [0.0])  # one step is as large as any
    found, idle = {}, 0  # idle: bytes that wait on the host
    always = []  # networks that do in each phase
    counted = {"operations": {}, "launches": {}, "moved": {}}  # by phase

    def phase(name, *waiting):
        """It is over; in the next one these networks wait on the host."""
        nonlocal idle
        for kind, before in counted.items():
            before[name] = getattr(memory, kind) - sum(before.values())
        gc.collect()
        found[name] = (memory.peak - idle) / 1e9
        parts = [*waiting, *always]
        idle = sum(map(size_of, {p for part in parts for p in part.parameters()}))
        memory.peak = memory.now

    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        memory = stack.enter_context(LiveStorages())
        stack.enter_context(without_weights(memory))
        model = vader.make_model(cfg)
        run = vader.Run(cfg, model, schedule, make_terms(cfg, "cpu"), {}, None)
        networks = [n for _, reward in run.terms.values() for n in getattr(reward, "networks", ())]
        phase("rewards", *networks)
        run.conds = model.encode([*prompts, vader.Prompt("")], cfg)
        phase("encoding prompts", *networks)
        if cfg.quantize != "none":
            prepare(model, dataclasses.replace(cfg, base_lora=None))  # a LoRA that is fused in takes no room
        if cfg.offload and hasattr(model, "other"):  # it is only there when its steps come
            model.other = model.load_denoiser(model.other_folder)
            always.append(model.other)
            phase("loading one", *networks)
        model.load()
        vader.add_lora(model, cfg)
        model.recompute()
        if cfg.offload:
            stack.enter_context(mock.patch.multiple(offload, to_host=memory.forget, from_host=remember))
            model.denoise = offload.inputs_on_host(model.denoise)
            model.decode = offload.inputs_on_host(model.decode)
        optimizer = vader.make_optimizer(run)
        encoders = [model.image_encoder] if model.image_encoder else []
        scoring = [model.vae, *encoders, *networks] if cfg.offload else []
        denoiser = [model.denoiser] if cfg.offload else []
        phase("loading", *scoring)
        generator = vader.generator_for(0)
        noise = torch.randn(len(prompts), *model.latent_shape(cfg))
        picks = vader.pick_latent_frames(run, generator)
        batch = vader.make_batch(run, prompts, noise, generator, picks, trained=[0])
        found["all weights"] = (memory.now - idle) / 1e9
        none = vader.Schedule(torch.ones(0), [], [], [], [])
        vader.rollout(dataclasses.replace(run, schedule=none), batch)  # what is done once, not in each step
        phase("passing", *scoring)
        latents = vader.rollout(run, batch)
        phase("rollout", *denoiser)
        n, frames = len(picks), latents[-1].shape[2]  # which need most depends on the VAE
        places = {tuple(picks), tuple(range(n)), tuple(range(frames - n, frames))}
        for chosen in places:
            g = None
            _, g = vader.score(run, batch._replace(picks=list(chosen)), latents[-1])
        phase("score", *scoring)
        walk_back = clips.walk_back if cfg.clips else vader.walk_back
        walk_back(run, batch, latents, g)
        phase("walk back", *scoring)
        optimizer.step()
        phase("optimiser", *denoiser)
        with torch.no_grad():
            video = model.decode(latents[-1], range(frames))
        phase("decoding a video", *denoiser)
        judges = watch.spec_of(cfg)
        if judges != "none":  # these wait on the host until now, so that they are made now
            run.judges = make_terms(dataclasses.replace(cfg, reward=judges), "cpu")
            watch.score_judges(run, video, [prompt.text for prompt in prompts])
            phase("judging a video")
    found["loading"] = max(found["loading"], found.pop("loading one", 0))
    del found["rewards"], found["passing"]  # parts of loading, of rollout
    times = {"sampling": ("rollout", T), "score": ("score", 1 / len(places)), "walk back": ("walk back", K)}
    work = work or Work()
    for kind, unit in {"operations": 1e12, "launches": 1e6, "moved": 1e9}.items():
        done = getattr(work, kind)
        for name, (part, n) in times.items():
            done[name] = videos * n * counted[kind][part] / unit
        done["sampling"] -= videos * (T - 1) * counted[kind]["passing"] / unit
    swapped = [*scoring, *denoiser]
    if always:  # the two networks change places in a rollout
        swapped += [*always, *denoiser]
    sizes = [size_of(p) for network in swapped for p in network.parameters()]
    work.moved["networks"] = videos * 2 * sum(sizes) / 1e9
    return found


def measure(cfg: vader.Config, device="cuda", updates=3) -> dict:
    """Peaks of GPU memory in GB and seconds of the fastest update, with weights as initialised.

    "measured peak": what was reserved, of that "allocated"; "seconds": {phase: seconds} of an update.
    """
    full, prompts = resolve(cfg)
    cfg = dataclasses.replace(full, device=device, num_inference_steps=2, backprop_steps=1, grad_accum=1)
    spent = {name: [] for name in ("rollout", "score", "walk_back", "update")}

    def timed(name):
        function = getattr(vader, name)

        def run(*args):
            start = time.perf_counter()
            found = function(*args)
            if device == "cuda":
                torch.cuda.synchronize()
            spent[name].append(time.perf_counter() - start)
            return found

        return mock.patch.object(vader, name, run)

    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with ExitStack() as stack:
        stack.enter_context(without_weights(device=device))
        terms = make_terms(cfg, device)
        stack.enter_context(mock.patch.object(rewards, "make_terms", lambda *_: terms))
        run = vader.load_run(cfg, prompts)
        optimizer = vader.make_optimizer(run)
        for name in spent:
            stack.enter_context(timed(name))
        for step in range(updates):
            vader.update(run, prompts, step, optimizer)
    once = {name: min(times) for name, times in spent.items()}
    count = full.clips or 1  # then the fastest rollout and walk back are those of one clip
    more = (full.num_inference_steps / 2 - 1) * count * once["rollout"]
    more += (full.backprop_steps - 1) * count * once["walk_back"]
    found = {"seconds per update": full.grad_accum * (once["update"] + more), "seconds": once}
    if device == "cuda":
        found["measured peak"] = torch.cuda.max_memory_reserved() / 1e9
        found["allocated"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def cap():
    """Let this process have 16 GB of the GPU's memory, and no more."""
    there = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 16e9 / there))


def write_table(measured: bool):
    """memory.csv: predict what is missing, or measure every row."""
    rows = {}
    if TABLE.exists():
        with open(TABLE, newline="") as stored:
            rows = {(row["model"], row["reward"], row["offload"]): row for row in csv.DictReader(stored)}
    wanted = [(model, *row) for model, row in itertools.product(MODELS, ROWS)]
    wanted += [("modelscope", name, False) for name in MORE]
    wanted += [(model, "hps", True) for model in LARGE]
    for model, reward, waits in wanted:
        key = model, reward, "yes" if waits else "no"
        frames = 16 if reward == "vjepa" and model != "svd" else None
        cfg = vader.Config(model=model, reward=reward, offload=waits, decode_frames=frames, watch="none")
        if key not in rows:
            found = predict(cfg, work := Work())
            found["peak"] = max(found.values())
            rows[key] = dict(zip(("model", "reward", "offload"), key, strict=True))
            rows[key] |= {name: f"{size:.2f}" for name, size in found.items()}
            rows[key]["TFLOP an update"] = f"{sum(work.operations.values()):.0f}"
            rows[key]["million launches"] = f"{sum(work.launches.values()):.3f}"
            rows[key]["GB moved"] = f"{sum(work.moved.values()):.0f}"
            rows[key] |= dict.fromkeys(["measured peak", "seconds per update"], "not measured yet")
        if measured:
            made = measure(cfg)
            print(key, made, flush=True)
            rows[key] |= {name: f"{made[name]:.2f}" for name in ("measured peak", "seconds per update")}
        print(rows[key], flush=True)
        with open(TABLE, "w", newline="") as target:
            table = csv.DictWriter(target, rows[key])
            table.writeheader()
            table.writerows(rows.values())


def main(argv=None) -> int:
    """Exit code 0; 1 when the prediction is more than --vram; 2 after a line of bad input."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--vram", type=float, default=math.inf, help="gigabytes there are")
    parser.add_argument("--measure", action="store_true")
    args, flags = parser.parse_known_args(argv)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    work = Work()
    try:
        vader.require(args.vram > 0, "--vram: give the gigabytes that there are")
        vader.require(torch.cuda.is_available() or not args.measure, "--measure needs a CUDA GPU")
        if args.measure:
            cap()
        if not flags and args.vram == math.inf:
            write_table(args.measure)
            return 0
        cfg = vader.parse_args(flags)
        found = predict(cfg, work)
    except rewards.BadInput as error:
        print(f"memory.py: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{name:18}{size:6.2f} GB" for name, size in found.items()))
    print(f"{'peak':18}{(peak := max(found.values())):6.2f} GB predicted; CUDA itself takes about 0.5 more")
    print(describe(work, resolve(cfg)[0].steps))
    if args.measure:
        print(measure(cfg))
    if peak <= args.vram:
        return 0
    first = "add --offload, then " * (not cfg.offload)
    print(f"more than {args.vram:g}: {first}lower --batch_size, --num_frames, --height, --width, --lora_rank")
    return 1


if __name__ == "__main__":
    sys.exit(main())
