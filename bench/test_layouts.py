"""Tests of --base_lora and --lora on other trainers' files, against stock's load_lora_weights."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from test_models import stock_pipeline

import vader
from conftest import PROMPTS, checked, command, load
from rewards import BadInput

RANK, ALPHA = 4, 1.5
FOLDERS = {"animatediff": "unet", "wan": "transformer", "ltx": "transformer", "cogvideox": "transformer"}
FOLDERS["anyflow"] = "transformer"

# Parts of Wan's names, as diffusers has them -> as the original checkpoint has them.
WAN = {"attn1.": "self_attn.", "attn2.": "cross_attn.", "to_out.0": "o", "ffn.net.0.proj": "ffn.0"}
WAN |= {"ffn.net.2": "ffn.2", "to_q": "q", "to_k": "k", "to_v": "v", "proj_out": "head.head"}
WAN |= {"condition_embedder.time_proj": "time_projection.1", "condition_embedder.": ""}
WAN |= {"text_embedder.linear_1": "text_embedding.0", "text_embedder.linear_2": "text_embedding.2"}
WAN |= {"time_embedder.linear_1": "time_embedding.0", "time_embedder.linear_2": "time_embedding.2"}
BLOCKS = r"blocks\.\d+\.(attn|ffn)"
ATTENTION = r"(attn\d?\.to_\w+(\.0)?)$"
SD = r"^(?!.*motion).*(attn\d\.to_\w+(\.0)?|ff\.net\.\w+(\.proj)?|proj_in|proj_out|conv1)$"


# ---- Files -------------------------------------------------------------------------------------------------
def draw(network, pattern, rank=RANK):
    """Random matrices {layer: (down, up)} of a network's layers whose names the pattern finds."""
    torch.manual_seed(2)
    drawn = {}
    for name, layer in network.named_modules():
        if not re.search(pattern, name) or not isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            continue
        wide, narrow = [*layer.weight.shape], [*layer.weight.shape]
        narrow[0] = wide[1] = rank
        if len(wide) == 4:
            wide[2:] = 1, 1
        drawn[name] = torch.randn(narrow) * 0.2, torch.randn(wide) * 0.2
    assert drawn
    return drawn


def kohya(network, alpha=ALPHA, pattern=SD):
    """What kohya's sd-scripts write for Stable Diffusion."""
    state = {}
    for name, (down, up) in draw(network, pattern).items():
        layer = "lora_unet_" + name.replace(".", "_")
        state[f"{layer}.lora_down.weight"], state[f"{layer}.lora_up.weight"] = down, up
        state[f"{layer}.alpha"] = torch.tensor(alpha)
    return state


def kohya_with_text(network):
    text = {}
    for end in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer = f"lora_te_text_model_encoder_layers_0_self_attn_{end}"
        text[f"{layer}.lora_down.weight"] = torch.randn(RANK, 32)
        text[f"{layer}.lora_up.weight"] = torch.randn(32, RANK)
        text[f"{layer}.alpha"] = torch.tensor(ALPHA)
    return text | kohya(network)


def kohya_ranks(network):
    """Two ranks, one alpha."""
    state = kohya(network)
    for key in state:
        if "attn2" in key and "lora_down" in key:
            state[key] = state[key][:2].clone()
        if "attn2" in key and "lora_up" in key:
            state[key] = state[key][:, :2].clone()
    return state


def diffusers_names(network, folder, pattern=ATTENTION, first="lora_A", second="lora_B"):
    """What diffusers' and PEFT's scripts write, without alphas."""
    state = {}
    for name, (down, up) in draw(network, pattern).items():
        state[f"{folder}.{name}.{first}.weight"], state[f"{folder}.{name}.{second}.weight"] = down, up
    return state


def diffusers_with_text(network):
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    text = {f"{layer}.lora_A.weight": torch.randn(4, 32), f"{layer}.lora_B.weight": torch.randn(32, 4)}
    return text | diffusers_names(network, "unet")


def wan_name(name):
    for ours, theirs in WAN.items():
        name = name.replace(ours, theirs)
    return name


def original(network, names, pattern=BLOCKS, first="lora_down", second="lora_up", alpha=ALPHA):
    """ComfyUI's layout: diffusion-pipe writes lora_A and lora_B, the Lightning LoRAs lora_down and alphas."""
    state = {}
    for name, (down, up) in draw(network, pattern).items():
        layer = f"diffusion_model.{names(name)}"
        state[f"{layer}.{first}.weight"], state[f"{layer}.{second}.weight"] = down, up
        if alpha:
            state[f"{layer}.alpha"] = torch.tensor(alpha)
    return state


def musubi(network):
    """What musubi-tuner writes for Wan."""
    state = {}
    for key, w in original(network, wan_name).items():
        layer, _, end = key.removeprefix("diffusion_model.").rpartition(".")
        if end == "weight":
            layer, _, which = layer.rpartition(".")
            end = f"{which}.weight"
        state[f"lora_unet_{layer.replace('.', '_')}.{end}"] = w
    return state


def causvid(network):
    """Differences of biases beside the matrices, everywhere; and those of norms, which stock drops."""
    embedders = "embedder.linear|time_proj|^proj_out"
    state = original(network, wan_name, alpha=None, pattern=f"{BLOCKS}|{embedders}")
    for key, up in [*state.items()]:
        if "lora_up" in key:
            state[key.replace("lora_up.weight", "diff_b")] = torch.randn(len(up)) * 0.2
    for n in (0, 1):
        state[f"diffusion_model.blocks.{n}.self_attn.norm_q.diff"] = torch.randn(24)
    return state


def accvideo(network):
    """A difference of time_projection's bias without matrices, which stock drops."""
    state = original(network, wan_name, alpha=None)
    return state | {"diffusion_model.time_projection.1.diff_b": torch.randn(144)}


def lightx2v(network):
    """A whole difference of the head's matrix, with its bias's."""
    state = original(network, wan_name, alpha=None)
    for key, up in [*state.items()]:
        if "lora_up" in key:
            state[key.replace("lora_up.weight", "diff_b")] = torch.randn(len(up)) * 0.2
    head = network.proj_out
    state["diffusion_model.head.head.diff"] = torch.randn(head.weight.shape) * 0.2
    return state | {"diffusion_model.head.head.diff_b": torch.randn(len(head.bias)) * 0.2}


def same(name):
    return name


WITHOUT = dict(first="lora_A", second="lora_B", alpha=None)
OLD = dict(first="lora.down", second="lora.up")
LAYOUTS = {
    "animatediff kohya": kohya,
    "animatediff kohya, ranks": kohya_ranks,
    "animatediff kohya, text": kohya_with_text,
    "animatediff diffusers, text": diffusers_with_text,
    "animatediff diffusers, alpha": lambda network: diffusers_names(network, "unet"),
    "animatediff diffusers, old": lambda network: diffusers_names(network, "unet", **OLD),
    "wan musubi": musubi,
    "wan lightning": lambda network: original(network, wan_name),
    "wan diffusion-pipe": lambda network: original(network, wan_name, **WITHOUT),
    "wan diffusers, alpha": lambda network: diffusers_names(network, "transformer"),
    "wan causvid": causvid,
    "wan accvideo": accvideo,
    "wan lightx2v": lightx2v,
    "anyflow lightning": lambda network: original(network, wan_name),
    "ltx diffusion-pipe": lambda network: original(network, same, ATTENTION, **WITHOUT),
    "ltx diffusers, alpha": lambda network: diffusers_names(network, "transformer"),
    "cogvideox diffusers": lambda network: diffusers_names(network, "transformer"),
    "cogvideox diffusers, alpha": lambda network: diffusers_names(network, "transformer"),
    "cogvideox diffusers, old": lambda network: diffusers_names(network, "transformer", **OLD),
}
LEFT_OUT = {"kohya, text": "8 tensors of a text encoder", "diffusers, text": "2 tensors of a text encoder"}
LEFT_OUT |= {"causvid": "2 differences, as diffusion_model.blocks.0.self_attn.norm_q.diff"}
LEFT_OUT |= {"accvideo": "1 differences, as diffusion_model.time_projection.1.diff_b"}


def save_layout(layout, network, file):
    """Write a layout's file. "alpha" in its name: diffusers' header tells the alpha of all layers."""
    kind, folder = layout.split()[0], FOLDERS[layout.split()[0]]
    state = LAYOUTS[layout](network)
    metadata = {"format": "pt"}
    if "alpha" in layout:
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q"]).to_dict()
        config["target_modules"] = ["to_q", "to_k", "to_v", "to_out.0"]
        told = {f"{folder}.{key}": value for key, value in config.items()}
        metadata["lora_adapter_metadata"] = json.dumps(told)
    save_file({key: w.contiguous() for key, w in state.items()}, file, metadata)
    return kind


# ---- Against stock -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def family_run(checkpoints, prompts_file, tmp_path_factory):
    """A family's run of the base model, by its name in BUILDERS."""
    made = {}

    def make(kind):
        if kind not in made:
            size = dict(num_frames=9 if kind in ("ltx", "cogvideox") else 5, height=64, width=64)
            out = str(tmp_path_factory.mktemp("out") / "run")
            cfg = vader.Config(model=str(checkpoints(kind)), mode="sample", prompts=prompts_file, out=out)
            cfg = replace(cfg, reward="colorful", num_inference_steps=4, **size)
            made[kind] = load(cfg, randomise=False)
            made[kind].cfg = cfg  # of which nothing is filled in
        return made[kind]

    return make


def output(run, denoiser):
    """What a denoiser says to fixed latents."""
    x = torch.randn(1, *run.model.latent_shape(run.cfg), generator=torch.Generator().manual_seed(0))
    cond = vader.make_batch(run, PROMPTS[:1], None, None).cond
    before, run.model.denoiser = run.model.denoiser, denoiser
    with torch.no_grad():
        said = run.model.denoise(x, run.schedule.t[1], cond)
    run.model.denoiser = before
    return said


def stock_denoiser(run, file):
    """The denoiser of the stock pipeline, with the LoRA in a file."""
    kind = Path(run.cfg.model).name
    pipe = stock_pipeline(kind, run.cfg)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    return getattr(pipe, FOLDERS[kind])


def assert_same(run, ours, stock):
    """Do two denoisers with a LoRA say the same, and something else than the base?"""
    base, ours, stock = (output(run, denoiser) for denoiser in (run.model.denoiser, ours, stock))
    scale = stock.abs().max()
    print(f"{(ours - stock).abs().max() / scale:.1e} of {(stock - base).abs().max() / scale:.1e}")
    assert (ours - stock).abs().max() < 1e-5 * scale
    assert (stock - base).abs().max() > 0.01 * scale


@pytest.mark.parametrize("flag", ["base_lora", "lora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_taken_as_stock_does_it(layout, flag, family_run, tmp_path, capsys):
    run = family_run(layout.split()[0])
    kind = save_layout(layout, run.model.denoiser, file := tmp_path / "some.safetensors")
    tuned = load(replace(run.cfg, **{flag: str(file)}), randomise=False).model.denoiser
    printed = capsys.readouterr().out
    left_out = LEFT_OUT.get(layout.removeprefix(f"{kind} "))
    assert printed.count("left out") == (1 if left_out else 0) and (left_out or "") in printed
    assert printed.count(f"--{flag} {file}: left out") == printed.count("left out")
    assert_same(run, tuned, stock_denoiser(run, file))
    if flag == "base_lora":
        assert tuned.state_dict().keys() == run.model.denoiser.state_dict().keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_trained_and_written_so_that_all_read_it(layout, family_run, tmp_path):
    """Its ranks, its alphas and its biases, in each of the files that a run writes."""
    run = family_run(layout.split()[0])
    kind = save_layout(layout, run.model.denoiser, file := tmp_path / "some.safetensors")
    begun = load(replace(run.cfg, mode="train", lora=str(file)), randomise=False)
    weights = vader.lora_parameters(begun.model)
    assert all(".default." in name and p.dtype == torch.float32 for name, p in weights.items())
    torch.manual_seed(3)
    for p in weights.values():  # as training does
        p.data += 0.1 * torch.randn(p.shape)
    vader.save_lora(begun.model, folder := tmp_path / "run" / "lora", begun.cfg)
    tuned = begun.model.denoiser
    files = {path.name for path in folder.glob("*.safetensors")} - {"adapter_model.safetensors"}
    assert ("comfyui.safetensors" in files) == (kind in ("wan", "ltx"))
    for name in files:
        assert_same(run, stock_denoiser(run, folder / name), tuned)
    fresh = load(run.cfg, randomise=False).model.denoiser
    assert_same(run, PeftModel.from_pretrained(fresh, folder).eval(), tuned)
    again = load(replace(run.cfg, mode="train", lora=str(tmp_path / "run")), randomise=False)
    for name in ("lora_rank", "lora_alpha"):
        assert getattr(again.cfg, name) == getattr(begun.cfg, name)
    same = vader.lora_parameters(again.model)
    assert same.keys() == weights.keys() and all(torch.equal(p, same[name]) for name, p in weights.items())


def assert_added(before, after, matrices):
    """Is after, of two state dicts, before + alpha / rank up @ down? matrices: {layer: (down, up, alpha)}."""
    for name, (down, up, alpha) in matrices.items():
        delta = torch.einsum("or,r...->o...", up.flatten(1), down) * (alpha / len(down))
        found = after[f"{name}.weight"] - before[f"{name}.weight"]
        torch.testing.assert_close(found, delta, rtol=0, atol=2e-6)


def test_each_layer_has_its_own_rank_and_alpha(family_run, tmp_path):
    """Even the alphas of attention, which stock reads under a name that fits no layer."""
    run = family_run("animatediff")
    state = kohya_ranks(run.model.denoiser)
    queries = [key for key in state if key.endswith("_to_q.alpha")]
    state |= {key: torch.tensor(n + 2.5) for n, key in enumerate(queries)}
    save_file(state, file := tmp_path / "some.safetensors")
    trained = load(replace(run.cfg, mode="train", lora=str(file)), randomise=False)
    assert (trained.cfg.lora_rank, trained.cfg.lora_alpha) == (RANK, ALPHA)
    assert trained.cfg.lora_targets == "conv1,net.2,proj,proj_in,proj_out,to_k,to_out.0,to_q,to_v"
    vader.save_lora(trained.model, folder := tmp_path / "lora", trained.cfg)
    assert_same(run, trained.model.denoiser, stock_denoiser(run, folder / "pytorch_lora_weights.safetensors"))
    matrices = {}
    for name in draw(run.model.denoiser, SD):
        layer = "lora_unet_" + name.replace(".", "_")
        ends = ("lora_down.weight", "lora_up.weight", "alpha")
        matrices[name] = [state[f"{layer}.{end}"] for end in ends]
    assert len({(len(down), alpha.item()) for down, _, alpha in matrices.values()}) == 2 + len(queries) > 4
    fused = load(replace(run.cfg, base_lora=str(file)), randomise=False).model.denoiser
    for tuned in (fused, trained.model.denoiser.merge_and_unload()):
        assert_added(run.model.denoiser.state_dict(), tuned.state_dict(), matrices)


def test_an_alpha_that_stock_refuses_counts(family_run, tmp_path):
    """LTX's converter leaves alphas, and load_lora_weights refuses them."""
    run = family_run("ltx")
    state = original(run.model.denoiser, same, ATTENTION, first="lora_A", second="lora_B")
    save_file(state, file := tmp_path / "some.safetensors")
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        stock_pipeline("ltx", run.cfg).load_lora_weights(tmp_path, weight_name=file.name)
    fused = load(replace(run.cfg, base_lora=str(file)), randomise=False).model.denoiser
    tuned = load(replace(run.cfg, lora=str(file)), randomise=False).model.denoiser.merge_and_unload()
    matrices = {name: (*drawn, ALPHA) for name, drawn in draw(run.model.denoiser, ATTENTION).items()}
    for denoiser in (fused, tuned):
        assert_added(run.model.denoiser.state_dict(), denoiser.state_dict(), matrices)
    told = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 2})
    refused(run, state, "alphas, and a header that tells others", file, {"lora_adapter_metadata": told})


@pytest.mark.parametrize("kind", ["animatediff", "wan"])
def test_a_run_begins_from_stock_s_file_and_goes_on(kind, family_run, tmp_path, monkeypatch, capsys):
    """By the command line; the file is in the home folder, as ~, beside another."""
    monkeypatch.setenv("HOME", str(tmp_path))
    layout = {"animatediff": "animatediff kohya, ranks", "wan": "wan causvid"}[kind]
    run = family_run(kind)
    for name in ("some", "another"):
        save_layout(layout, run.model.denoiser, tmp_path / f"{name}.safetensors")
    (tmp_path / "two.txt").write_text("a red kite\na moon")
    lora = str(tmp_path / "some.safetensors")
    how = dict(mode="train", lora="~/some.safetensors", prompts=str(tmp_path / "two.txt"))
    how |= dict(height=32, width=32)
    how |= dict(
        num_inference_steps=2, grad_accum=1, eval_videos=1, steps=2, lr=1e-2, eval_every=9, watch="none"
    )
    cfg = replace(run.cfg, **how, out=str(tmp_path / "whole"))
    assert vader.main(command(cfg)) == 0
    assert f"base: {lora}, which training begins from" in capsys.readouterr().out
    half = replace(cfg, steps=1, out=str(tmp_path / "half"))
    assert vader.main(command(half)) == 0 == vader.main([*command(replace(half, steps=2)), "--resume"])
    whole, resumed = (
        load_file(tmp_path / name / "lora/adapter_model.safetensors") for name in ("whole", "half")
    )
    begun = load(replace(run.cfg, lora=str(tmp_path / "some.safetensors")), randomise=False)
    for name, matrix in vader.lora_parameters(begun.model).items():
        name = name.replace(".default", "")
        assert torch.equal(whole[name], resumed[name]) and not torch.equal(whole[name], matrix)
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["lora"] == lora and config["lora_rank"] == RANK
    scored = replace(cfg, mode="eval", out=str(tmp_path / "scored"))
    assert (
        vader.main(command(scored))
        == 0
        == vader.main(command(replace(scored, mode="sample", out=str(tmp_path / "made"))))
    )
    base, tuned = (row["eval"]["reward"] for row in vader.read_metrics(tmp_path / "scored"))
    made = {
        name: (tmp_path / name / "000.mp4").read_bytes()
        for name in ("scored/tuned", "scored/base", "made/tuned")
    }
    assert base != tuned and made["made/tuned"] == made["scored/tuned"] != made["scored/base"]


# ---- What is refused ---------------------------------------------------------------------------------------
def refused(run, state, said, file, metadata=None):
    """Is a file of these tensors refused before a model loads, in a line with these words and the flag?"""
    save_file({key: w.contiguous() for key, w in state.items()}, file, metadata)
    for flag in ("base_lora", "lora"):
        with pytest.raises(BadInput, match=said) as problem:
            checked(replace(run.cfg, **{flag: str(file)}))
        line = str(problem.value)
        assert "\n" not in line and line.startswith(f"--{flag} {file}")


def first_layer(state, begin="lora_unet"):
    """Of the first layer's name all before its ending."""
    key = next(key for key in state if key.startswith(begin))
    return re.split(r"\.lora_|\.alpha", key)[0]


def test_other_kinds_than_lora_are_named(family_run, tmp_path):
    run, file = family_run("animatediff"), tmp_path / "some.safetensors"
    state = kohya(run.model.denoiser)
    layer, one = first_layer(state), torch.ones(32, 1)
    for end, kind in (
        ("dora_scale", "DoRA"),
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("lora_mid.weight", "LoCon"),
        ("oft_blocks", "OFT"),
    ):
        refused(run, state | {f"{layer}.{end}": one}, f"is a {kind}.*no code.*{end}", file)
    state = diffusers_names(run.model.denoiser, "unet")
    layer = first_layer(state, "unet")
    refused(run, state | {f"{layer}.lora_magnitude_vector": one}, "is a DoRA", file)
    for name, value, said in (
        ("use_dora", True, "has DoRA"),
        ("init_lora_weights", "pissa_niter_4", "'pissa_niter_4'.*changes the base"),
        ("bias", "all", "has biases"),
    ):
        told = {f"unet.{key}": v for key, v in (dict(r=4, lora_alpha=2) | {name: value}).items()}
        refused(run, state, said, file, {"lora_adapter_metadata": json.dumps(told)})


def test_what_does_not_fit_or_nothing_takes_is_named(family_run, tmp_path):
    run, file = family_run("animatediff"), tmp_path / "some.safetensors"
    state = kohya(run.model.denoiser)
    layer = next(key.removesuffix(".alpha") for key in state if key.endswith("_to_q.alpha"))
    up, down = f"{layer}.lora_up.weight", f"{layer}.lora_down.weight"
    without = {key: w for key, w in state.items() if key != up}
    refused(run, without, "no code for|another model", file)
    without.pop(down)
    refused(run, without, f"no matrix for {layer}.alpha", file)
    refused(run, state | {up: state[up][:5]}, "another model, or is damaged", file)
    refused(run, state | {up: state[up] / 0}, "another model, or is damaged", file)
    refused(
        run, state | {"lora_unet_nobody.alpha": torch.tensor(1.0)}, "no matrix for lora_unet_nobody", file
    )
    nobody = {f"lora_unet_nobody.lora_{end}.weight": torch.ones(4, 4) for end in ("down", "up")}
    refused(run, state | nobody, "another model", file)
    for alpha in (0.0, -1.0, float("nan"), float("inf"), 1j):
        refused(run, state | {f"{layer}.alpha": torch.tensor(alpha)}, f"{layer}.alpha is no number", file)
    text = {key: w for key, w in kohya_with_text(run.model.denoiser).items() if key.startswith("lora_te")}
    refused(run, text, "no LoRA of the unet in it", file)
    plain = diffusers_names(run.model.denoiser, "unet")
    refused(run, plain | {"vae.x.lora_A.weight": torch.ones(4, 4)}, "nothing takes vae.x.lora_A.weight", file)
    bare = {key.removeprefix("unet."): w for key, w in plain.items()}
    refused(run, bare, "no LoRA of the unet in it", file)


def test_wan_s_files_that_do_not_fit(family_run, checkpoints, tmp_path):
    run, file = family_run("wan"), tmp_path / "some.safetensors"
    state = causvid(run.model.denoiser)
    key = "diffusion_model.blocks.0.self_attn.q.diff_b"
    refused(run, {name: w for name, w in state.items() if name != key}, "another model", file)
    refused(run, state | {key: torch.ones(7)}, "another model", file)
    refused(run, state | {"diffusion_model.nobody.lora_up.weight": torch.ones(4, 4)}, "no code for", file)
    refused(run, kohya(family_run("animatediff").model.denoiser), "no code for", file)
    refused(family_run("cogvideox"), state, "another model|no LoRA of the transformer", file)
    refused(family_run("ltx"), state, "another model", file)


def save_peft(run, folder, **changes):
    """A LoRA as PEFT saves it, its config with these changes; the model stays as it was."""
    tuned = load(replace(run.cfg, mode="train", lora_rank=4, lora_targets="to_q,to_v"))
    vader.save_lora(tuned.model, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_peft_s_configs_of_another_kind_are_named(family_run, tmp_path):
    run = family_run("wan")
    save_peft(run, folder := tmp_path / "lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    for said, change in (
        ("a regular expression", dict(target_modules=".*to_q")),
        ("'pissa'.*changes the base", dict(init_lora_weights="pissa")),
        ("'olora'.*changes the base", dict(init_lora_weights="olora")),
        ("has DoRA", dict(use_dora=True)),
        ("that of a LOKR", dict(peft_type="LOKR")),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        for flag in ("lora", "base_lora"):
            with pytest.raises(BadInput, match=said):
                checked(replace(run.cfg, **{flag: str(folder)}))


def test_a_bias_where_the_layer_has_none_is_named(family_run, tmp_path):
    run, file = family_run("animatediff"), tmp_path / "some.safetensors"
    state = diffusers_names(run.model.denoiser, "unet", pattern=r"attn1\.to_q$")
    for key, up in [*state.items()]:
        if "lora_B" in key:
            state[key.replace("weight", "bias")] = torch.randn(len(up))
    refused(run, state, "a difference of a bias for .*to_q, which has none", file)


def test_numbers_in_headers_and_configs_are_looked_at(family_run, tmp_path):
    run, file = family_run("animatediff"), tmp_path / "some.safetensors"
    save_peft(run, folder := tmp_path / "lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    state = diffusers_names(run.model.denoiser, "unet")
    for said, change in (
        ("r of its .*'4'.*from 1 to 1024", dict(r="4")),
        ("to_q of its .*nan.*from 0 to 1e6", dict(alpha_pattern={"to_q": float("nan")})),
        ("to_q of its .*0.5.*from 1 to 1024", dict(rank_pattern={"to_q": 0.5})),
        ("rank_pattern is .*a dictionary", dict(rank_pattern=["to_q"])),
    ):
        told = {f"unet.{key}": value for key, value in (dict(r=4, lora_alpha=2) | change).items()}
        refused(run, state, said, file, {"lora_adapter_metadata": json.dumps(told)})
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        for flag in ("lora", "base_lora"):
            with pytest.raises(BadInput, match=f"--{flag} .*{said}"):
                checked(replace(run.cfg, **{flag: str(folder)}))


def test_peft_s_file_without_its_config_is_refused(family_run, tmp_path):
    """Its alpha is not known."""
    run = family_run("wan")
    save_peft(run, tmp_path / "lora", lora_alpha=7)
    (tmp_path / "lora" / "adapter_config.json").unlink()
    for flag in ("lora", "base_lora"):
        for source in (tmp_path / "lora", tmp_path / "lora" / "adapter_model.safetensors"):
            with pytest.raises(BadInput, match=f"--{flag} {source}: .*no adapter_config.json beside it"):
                checked(replace(run.cfg, **{flag: str(source)}))
        with pytest.raises(BadInput, match=f"--{flag} nosuch: no such file or folder, and no hub id"):
            checked(replace(run.cfg, **{flag: "nosuch"}))


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_its_adapters_are_float32_on_a_base_of_bf16(quantize, family_run, tmp_path):
    run = family_run("wan")
    state = original(run.model.denoiser, wan_name, alpha=None)
    state = {key: w.bfloat16() for key, w in state.items()}
    save_file(state, file := tmp_path / "some.safetensors")
    cfg = replace(run.cfg, mode="train", lora=str(file), dtype="bf16", quantize=quantize)
    tuned = load(cfg, randomise=False).model
    weights = vader.lora_parameters(tuned)
    assert len(weights) == len(state) and {p.dtype for p in weights.values()} == {torch.float32}
    assert tuned.denoiser.get_base_model().proj_out.weight.dtype == torch.bfloat16
    some = next(name for name in weights if name.endswith("blocks.0.attn1.to_q.lora_A.default.weight"))
    assert torch.equal(weights[some], state["diffusion_model.blocks.0.self_attn.q.lora_down.weight"].float())


def test_a_lora_with_biases_on_a_base_of_int8_is_refused(family_run, tmp_path):
    run = family_run("wan")
    save_layout("wan causvid", run.model.denoiser, file := tmp_path / "some.safetensors")
    with pytest.raises(BadInput, match="--quantize int8: PEFT has no code for the biases in --lora"):
        checked(replace(run.cfg, lora=str(file), quantize="int8"))
    cfg = replace(run.cfg, quantize="int8")
    save_layout("wan lightning", run.model.denoiser, file)
    base = load(cfg, randomise=False).model.denoiser
    tuned = load(replace(cfg, lora=str(file)), randomise=False).model.denoiser
    assert not torch.equal(output(run, base), output(run, tuned))


# ---- A run's folder ----------------------------------------------------------------------------------------
def test_lora_takes_a_run_s_folder_and_each_of_its_files(family_run, tmp_path):
    run = family_run("wan")
    tuned = load(replace(run.cfg, mode="train", lora_rank=4, lora_alpha=6, lora_targets="to_q,to_v"))
    vader.save_lora(tuned.model, folder := tmp_path / "run" / "lora")
    made = []
    for source in (tmp_path / "run", folder, *sorted(folder.glob("*.safetensors"))):
        tuned = load(replace(run.cfg, lora=str(source)), randomise=False)
        alpha = 4 if source.name == "comfyui.safetensors" else 6  # which has alpha / rank in its matrices
        assert (tuned.cfg.lora, tuned.cfg.lora_alpha) == (str(source), alpha)
        made.append(output(run, tuned.model.denoiser))
    assert len(made) == 5 and not torch.equal(made[0], output(run, run.model.denoiser))
    for one in made[1:]:
        torch.testing.assert_close(one, made[0], rtol=0, atol=1e-5)
