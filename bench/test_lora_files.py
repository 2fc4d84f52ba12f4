"""Tests of a LoRA's files for ComfyUI and diffusers, of what their headers tell, and of --push_to_hub."""

import json
import re
import shlex
import shutil
import types
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import diffusers
import huggingface_hub
import imageio.v3 as iio
import peft
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_models import our_frames, stock_frames, stock_pipeline

import vader
from conftest import batch, checked, command, load, python
from extras import holding, watch
from extras.hub import write_repository
from extras.lora_files import comfy_state, public_name
from rewards import BadInput

# Linear layers by their names in the original checkpoints, which ComfyUI's LoRA loader takes after
# "diffusion_model.": model_lora_keys_unet in comfy/lora.py; model.py in comfy/ldm/wan, comfy/ldm/lightricks.
WAN = ["head.head", "time_projection.1"]
WAN += [f"{name}_embedding.{n}" for name in ("text", "time") for n in (0, 2)]
WAN_BLOCK = [f"{part}_attn.{end}" for part in ("self", "cross") for end in "qkvo"]
WAN_BLOCK += ["ffn.0", "ffn.2"]
LTX = ["patchify_proj", "adaln_single.linear", "proj_out"]
LTX += [f"adaln_single.emb.timestep_embedder.linear_{n}" for n in (1, 2)]
LTX += [f"caption_projection.linear_{n}" for n in (1, 2)]
LTX_BLOCK = [f"attn{n}.{end}" for n in (1, 2) for end in ("to_q", "to_k", "to_v", "to_out.0")]
LTX_BLOCK += ["ff.net.0.proj", "ff.net.2"]
NAMES = {
    "wan": {*WAN} | {f"blocks.{n}.{name}" for n in (0, 1) for name in WAN_BLOCK},
    "ltx": {*LTX} | {f"transformer_blocks.{n}.{name}" for n in (0, 1) for name in LTX_BLOCK},
}
# those that diffusers' own converters take as well: LTX's renames nothing
TARGETS = {"wan": "to_q,to_k,to_v,to_out.0,net.0.proj,net.2,proj_out,linear_1,linear_2,time_proj"}
TARGETS["ltx"] = "to_q,to_k,to_v,to_out.0,net.0.proj,net.2,proj_out,caption_projection.linear_1"


@pytest.fixture(params=["wan", "ltx"])
def kind(request):
    return request.param


@pytest.fixture
def cfg(kind, settings, checkpoints):
    """A run of a small model, with alpha other than the rank."""
    size = dict(num_frames=9, height=64, width=64, lora_rank=4, lora_alpha=6, lora_targets=TARGETS[kind])
    return replace(settings, model=str(checkpoints(kind)), **size)


def deltas(run):
    """What the LoRA adds to each layer, by PEFT."""
    layers = run.model.denoiser.get_base_model().named_modules()
    return {n: part.get_delta_weight("default") for n, part in layers if hasattr(part, "get_delta_weight")}


def header(file):
    data = file.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


# ---- ComfyUI's file ----------------------------------------------------------------------------------------
def test_every_linear_layer_has_its_name_in_comfyui(kind):
    heads = dict(num_attention_heads=2, attention_head_dim=12, num_layers=2)
    with torch.device("meta"):
        if kind == "wan":
            network = diffusers.WanTransformer3DModel(**heads, ffn_dim=48)
        else:
            network = diffusers.LTXVideoTransformer3DModel(**heads, cross_attention_dim=24)
    linear = [name for name, part in network.named_modules() if isinstance(part, torch.nn.Linear)]
    network = peft.get_peft_model(network, peft.LoraConfig(target_modules=linear))
    model = types.SimpleNamespace(denoiser=network, comfy_names=vader.find_model(kind)[0].comfy_names)
    state = comfy_state(model)
    ends = (".lora_A.weight", ".lora_B.weight")
    assert {*state} == {f"diffusion_model.{name}{end}" for name in NAMES[kind] for end in ends}
    assert len(linear) == len(NAMES[kind])


def test_stock_reads_comfyui_s_file_and_makes_the_same_video(kind, cfg, tmp_path):
    run = load(cfg)
    vader.save_lora(run.model, tmp_path / "lora", run.cfg)
    file, expected = tmp_path / "lora" / "comfyui.safetensors", deltas(run)
    converted = run.model.lora_pipeline.lora_state_dict(str(file))
    names = {f"transformer.{name}" for name in expected}
    assert {*converted} == {f"{name}.lora_{end}.weight" for name in names for end in "AB"}
    for name, delta in expected.items():
        down, up = (converted[f"transformer.{name}.lora_{end}.weight"] for end in "AB")
        torch.testing.assert_close(up @ down, delta, rtol=1e-5, atol=1e-6)
    pipe, given = stock_pipeline(kind, run.cfg), batch(run)
    base = stock_frames(pipe, run, given)
    pipe.load_lora_weights(tmp_path / "lora", weight_name="comfyui.safetensors")
    tuned = stock_frames(pipe, run, given)
    torch.testing.assert_close(our_frames(run, given), tuned, rtol=0, atol=1e-3)
    assert (tuned - base).abs().max() > 0.01


@pytest.mark.parametrize("with_alpha", [False, True])
def test_base_lora_takes_comfyui_s_file(kind, cfg, with_alpha, tmp_path):
    """Ours, and one as others write it, with an alpha to each layer of the blocks."""
    cfg = replace(cfg, lora_targets="to_q,to_v,net.2")
    run = load(cfg)
    vader.save_lora(run.model, tmp_path / "lora", run.cfg)
    file = shutil.copy(tmp_path / "lora" / "comfyui.safetensors", tmp_path / "some.safetensors")
    if with_alpha:
        state = {key: w / 1.5 if "lora_B" in key else w for key, w in load_file(file).items()}
        layers = {key.rsplit(".lora_", 1)[0] for key in state}
        save_file(state | {f"{name}.alpha": torch.tensor(6.0) for name in layers}, file)
    fused = load(replace(cfg, base_lora=str(file), mode="sample")).model.denoiser.state_dict()
    before = load(replace(cfg, mode="sample")).model.denoiser.state_dict()
    for name, delta in deltas(run).items():
        assert delta.abs().max() > 0.1
        torch.testing.assert_close(
            fused[f"{name}.weight"] - before[f"{name}.weight"], delta, atol=1e-5, rtol=0
        )


def test_an_alpha_that_is_no_number_is_one_line(kind, cfg, tmp_path):
    cfg = replace(cfg, lora_targets="to_q")
    vader.save_lora(load(cfg).model, tmp_path / "lora")
    state = load_file(tmp_path / "lora" / "comfyui.safetensors")
    layers = {key.rsplit(".lora_", 1)[0] for key in state}
    for alpha in (torch.tensor(torch.nan), torch.ones(2)):
        alphas = {f"{name}.alpha": alpha.clone() for name in layers}
        save_file(state | alphas, tmp_path / "odd.safetensors")
        with pytest.raises(BadInput, match="alpha is no number|made for another model|no code for"):
            checked(replace(cfg, base_lora=str(tmp_path / "odd.safetensors")))


def test_only_models_that_comfyui_runs_have_its_file(settings, checkpoints, tmp_path):
    run = load(replace(settings, model=str(checkpoints("cogvideox")), num_frames=9))
    vader.save_lora(run.model, tmp_path / "lora", run.cfg)
    assert {file.name for file in (tmp_path / "lora").glob("*.safetensors")} == {
        "adapter_model.safetensors",
        "pytorch_lora_weights.safetensors",
    }


def test_of_a_place_only_its_name_is_public(tmp_path):
    (tmp_path / "some.safetensors").write_text("")
    assert public_name(str(tmp_path / "some.safetensors")) == "some.safetensors"
    assert public_name("owner/name") == "owner/name"


# ---- Headers -----------------------------------------------------------------------------------------------
def test_headers_tell_what_a_lora_is(cfg, tmp_path):
    run = load(cfg)
    vader.save_lora(run.model, tmp_path / "lora", run.cfg)
    name = Path(cfg.model).name
    for file in ("comfyui.safetensors", "pytorch_lora_weights.safetensors"):
        told = header(tmp_path / "lora" / file)
        with safe_open(tmp_path / "lora" / file, "pt") as opened:
            assert opened.metadata() == told and [*told] == sorted(told)
        assert (
            told["modelspec.sai_model_spec"] == "1.0.1" and told["modelspec.title"] == f"colorful on {name}"
        )
        assert told["modelspec.architecture"] == f"{name}/lora" and told["modelspec.resolution"] == "64x64"
        assert told["vader.reward"] == "colorful" and told["vader.base_model"] == name
        assert str(Path(cfg.model).parent) not in str(told) and "modelspec.date" not in told
    stock = json.loads(told["lora_adapter_metadata"])
    plain = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["target_modules"]
    assert plain == stock["transformer.target_modules"] == sorted(plain)  # a set's order is random
    assert stock["transformer.lora_alpha"] == 6 and stock["transformer.r"] == 4


@pytest.mark.slow
def test_a_lora_s_files_are_the_same_from_another_process(settings, checkpoints, tmp_path):
    cfg = replace(settings, model=str(checkpoints("wan")), height=32, width=32, lora_targets=TARGETS["wan"])
    run = load(cfg)
    vader.save_lora(run.model, tmp_path / "lora", run.cfg)
    script = "import sys, vader\nfrom pathlib import Path\nfrom conftest import load\n"
    script += "run = load(vader.parse_args(sys.argv[2:]))\n"
    script += "vader.save_lora(run.model, Path(sys.argv[1]), run.cfg)"
    python("-c", script, str(tmp_path / "again"), *command(cfg), PYTHONHASHSEED="1")
    for file in (tmp_path / "lora").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


# ---- --push_to_hub -----------------------------------------------------------------------------------------
@pytest.fixture
def hub(monkeypatch):
    """What the hub was asked; `broken` is an exception for its uploads."""
    hub = types.SimpleNamespace(created=[], pushed=[], broken=None)

    def upload(self, repo_id, folder_path, commit_message):
        if hub.broken:
            raise hub.broken
        files = {
            str(file.relative_to(folder_path)) for file in Path(folder_path).rglob("*") if file.is_file()
        }
        hub.pushed.append((repo_id, files))

    monkeypatch.setattr("extras.hub.get_token", lambda: "a token")
    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(HfApi, "create_repo", lambda self, **how: hub.created.append(how))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return hub


def test_a_run_is_pushed_once_with_a_card(hub, settings, checkpoints, tmp_path, capsys):
    how = dict(num_frames=5, height=32, width=32, steps=2, eval_every=1, lora_targets="to_q")
    cfg = replace(settings, model=str(checkpoints("wan")), push_to_hub="me/bright", **how)
    rows = vader.train(cfg)
    folder, names = Path(cfg.out) / "hub", ["adapter_config.json", "vader.json", "README.md", "strip.png"]
    names += [f"{n}.safetensors" for n in ("adapter_model", "pytorch_lora_weights", "comfyui")]
    names += [f"videos/{n:03d}-{which}.mp4" for n in (0, 1) for which in ("base", "tuned")]
    assert hub.created == [dict(repo_id="me/bright", exist_ok=True)] and hub.pushed == [
        ("me/bright", {*names})
    ]
    assert "pushed: https://huggingface.co/me/bright" in capsys.readouterr().out
    for which, step in (("base", 0), ("tuned", 2)):
        film = Path(cfg.out) / f"samples/step_{step:06d}/001.mp4"
        assert film.read_bytes() == (folder / f"videos/001-{which}.mp4").read_bytes()
    assert iio.imread(folder / "strip.png").shape == (2 * 128, 6 * 128, 3)

    card = huggingface_hub.ModelCard.load(folder / "README.md")
    evaluations = [row["eval"] for row in rows if "eval" in row]
    assert watch.summary(evaluations[0]["reward"], evaluations[2]["reward"]) in card.text
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-video"
    assert card.data.base_model is None and {"lora", "vader"} < {*card.data.tags}
    assert [row["text"] for row in card.data.widget] == evaluations[0]["prompts"]
    assert all((folder / row["output"]["url"]).exists() for row in card.data.widget)
    assert 'pipe.load_lora_weights("me/bright")' in card.text and "comfyui.safetensors" in card.text
    assert all((folder / link).exists() for link in re.findall(r"\]\((?!http)(.*?)\)", card.text))
    told = vader.parse_args(shlex.split(re.search("`vader.py (.*)`", card.text)[1]))
    assert told.lora_targets == "to_q" and told.lora_rank == 4 and told.out is None
    texts = [card.content, (folder / "adapter_config.json").read_text()]
    assert not any(word in text for text in texts for word in (str(tmp_path), cfg.model, cfg.prompts))
    # of a model on the hub, and where videos are gone
    shutil.rmtree(Path(cfg.out) / "samples" / "step_000000")
    write_repository(replace(checked(cfg), model="wan"), rows)
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.base_model == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" and "--model wan " in card.text
    assert "strip.png" not in card.text and not (folder / "videos").exists() and "->" in card.text


def test_a_push_that_fails_loses_nothing_and_is_made_again(hub, settings, capsys):
    cfg = replace(settings, steps=1, eval_videos=0, push_to_hub="me/bright")
    hub.broken = HTTPError("no\nroute")
    assert vader.main(command(cfg)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("vader.py: error: --push_to_hub me/bright: not pushed, the run is whole in")
    assert "--resume" in said and f"`hf upload me/bright {cfg.out}/hub`" in said and "no route" in said
    assert (Path(cfg.out) / "lora" / "adapter_model.safetensors").exists() and not hub.pushed
    hub.broken = None
    before = vader.read_metrics(Path(cfg.out))
    assert vader.main([*command(cfg), "--resume"]) == 0
    assert len(hub.pushed) == 1 and vader.read_metrics(Path(cfg.out)) == before
    vader.train(replace(cfg, resume=True, push_to_hub="me/other"))  # another name, or one at last
    assert [repo for repo, _ in hub.pushed] == ["me/bright", "me/other"]
    card = huggingface_hub.ModelCard.load(Path(cfg.out) / "hub" / "README.md")
    assert card.data.library_name == "peft" and "Held out" not in card.text and "ComfyUI" not in card.text
    assert 'pipe.unet = peft.PeftModel.from_pretrained(pipe.unet, "me/other")' in card.text
    assert "TextToVideoSDPipeline" in card.text


def test_the_first_process_alone_pushes(hub, settings, monkeypatch):
    monkeypatch.setattr(vader, "ranks", lambda: (1, 2))
    monkeypatch.setattr(holding, "dist", Mock())
    for name in ("all_reduce", "all_gather_object"):
        monkeypatch.setattr(vader.torch.distributed, name, Mock())
    vader.train(replace(settings, steps=1, eval_videos=0, push_to_hub="me/bright"))
    assert not hub.created and not hub.pushed


def test_what_can_not_be_pushed_is_one_line_before_a_model_loads(hub, settings, monkeypatch):
    def refused(message, **how):
        with pytest.raises(BadInput, match=message) as problem:
            checked(replace(settings, **dict(push_to_hub="me/bright") | how))
        assert "\n" not in str(problem.value) and "--push_to_hub" in str(problem.value)

    for name in (
        "bright",
        "a/b/c",
        "me/a b",
        "https://huggingface.co/me/bright",
        "me/..",
        "/",
        "me/" + "x" * 200,
    ):
        refused("give owner/name", push_to_hub=name)
    for mode in ("sample", "eval"):
        refused("for a run that trains", mode=mode)
    for error in (HTTPError("401"), OSError("offline"), ValueError("a bad\ntoken")):
        monkeypatch.setattr(HfApi, "whoami", Mock(side_effect=error))
        refused("not logged in.*hf auth login")
    monkeypatch.setattr("extras.hub.get_token", lambda: None)
    refused("not logged in to the hub: run `hf auth login`")
