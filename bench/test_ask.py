"""The reward `ask`: against the official processors and plain calls, with small vision-language models."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from camera import photo, view
from tokenizers import decoders, models, pre_tokenizers, trainers

import rewards
import vader
from conftest import checked
from rewards import BadInput
from vader import HERE, TOY

TINY = HERE / "tiny" / "rewards" / "ask"
QUESTION = "Is it red?"
QWEN = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% for c in m['content'] %}{% if c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}\
{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>model
{% endif %}"""


def small_tokenizer(words, special):
    """A byte-level tokenizer whose tokens are these words, besides single bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    how = dict(vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(words * 20, trainers.BpeTrainer(**how))
    return tokenizer


def save_qwen(folder, version, words=("Yes", "No", " yes", " no", "user", "model")):
    """A small random Qwen2-VL or Qwen3-VL."""
    torch.manual_seed(0)
    names = dict(image_token="<|image_pad|>", video_token="<|video_pad|>")
    names |= dict(vision_bos_token="<|vision_start|>", vision_eos_token="<|vision_end|>")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>", *names.values()]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=small_tokenizer([*words], special),
        eos_token="<|im_end|>",
        extra_special_tokens=names,
    )
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    ids["vision_start_token_id"], ids["vision_end_token_id"] = (
        ids.pop(f"vision_{n}_token_id") for n in ("bos", "eos")
    )
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16)
    text |= dict(num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=2048)
    text |= dict(bos_token_id=None, eos_token_id=2)
    text["rope_parameters"] = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
    vision = dict(depth=2, hidden_size=32, num_heads=2, spatial_merge_size=2, temporal_patch_size=2)
    if version == 2:
        vision |= dict(embed_dim=32, mlp_ratio=2, patch_size=14)
    else:
        vision |= dict(intermediate_size=64, patch_size=16, out_hidden_size=32, num_position_embeddings=64)
        vision |= dict(deepstack_visual_indexes=[0])
    kind = f"Qwen{version}VL"
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **ids)
    getattr(transformers, f"{kind}ForConditionalGeneration")(config).save_pretrained(folder)
    how = dict(
        size={"shortest_edge": 32 * 32 * 8, "longest_edge": 32 * 32 * 64}, patch_size=vision["patch_size"]
    )
    images = transformers.Qwen2VLImageProcessor(**how)
    videos = getattr(transformers, f"{kind}VideoProcessor")(**how)
    processor = getattr(transformers, f"{kind}Processor")(images, tokenizer, videos, chat_template=QWEN)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> folder of a model."""
    made = {f"qwen{n}": save_qwen(tmp_path_factory.mktemp(f"qwen{n}"), n) for n in (2, 3)}
    return made | {"smolvlm": str(TINY)}


def clips(size=(80, 96)):
    """Two clips of a photograph, (2, 8, 3, H, W), in steps of 1/255."""
    path = torch.zeros(8, 4)
    path[:, 0] = torch.arange(8)
    clip = (view(photo("cat"), path, size) * 255).round() / 255
    return torch.stack([clip, clip.flip(-1)])


def plain_call(folder, clip, question):
    """What the official processor makes of 8-bit frames, and the model's logits of the answer."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    content = [{"type": "video", "video": (clip * 255).round().byte()}, {"type": "text", "text": question}]
    given = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=dict(do_sample_frames=False),
    )
    with torch.no_grad():
        return given, model(**given).logits[0, -1], processor.tokenizer


@pytest.mark.parametrize("name", ["smolvlm", "qwen2", "qwen3"])
def test_pixels_and_answers_are_those_of_the_official_processor_and_model(name, folders):
    reward, given = rewards.make_ask("cpu", torch.float32, weights=folders[name], arg=QUESTION), []
    network, video = reward.networks[0], clips()
    network.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    values = reward(video, ["", ""])
    for n, clip in enumerate(video):
        theirs, logits, tokenizer = plain_call(folders[name], clip, QUESTION)
        for key, value in theirs.items():
            if (
                value.is_floating_point()
            ):  # theirs are whole numbers of 0 to 255 after each direction's resizing
                difference, step = (given[n][key] - value).abs(), 1 / 255 / 0.26
                assert difference.mean() < 0.5 * step and difference.max() < 5 * step
            else:
                assert torch.equal(given[n][key], value), key
        words = {"yes": ("yes", "Yes", "YES"), "no": ("no", "No", "NO")}
        ids = {}
        for word, ways in words.items():
            found = [
                tokenizer(space + way, add_special_tokens=False).input_ids
                for way in ways
                for space in ("", " ")
            ]
            ids[word] = sorted({one[0] for one in found if len(one) == 1})
        odds = logits[ids["yes"]].logsumexp(0) - logits[ids["no"]].logsumexp(0)
        assert values[n].item() == pytest.approx(odds.item(), abs=2e-3)
        assert reward.report["p(yes)"][n].item() == pytest.approx(
            logits.softmax(0)[ids["yes"]].sum().item(), abs=1e-3
        )


@pytest.mark.parametrize("name", ["smolvlm", "qwen2", "qwen3"])
def test_gradients_are_exact_reach_every_frame_and_stay_in_their_video(name, folders):
    reward = rewards.make_ask("cpu", torch.float64, weights=folders[name], arg=QUESTION)
    frames = clips((64, 64)).double().clamp(0.1, 0.9).requires_grad_()
    value = reward(frames, ["", ""])
    (slope,) = torch.autograd.grad(value[1], frames)
    assert slope[0].abs().max() == 0 and (slope[1].flatten(1).norm(dim=1) > 0).all()
    assert not any(p.requires_grad for p in reward.networks[0].parameters())
    for seed in range(3):
        direction = torch.randn(frames[1].shape, generator=torch.Generator().manual_seed(seed)).double()
        up, down = reward(
            torch.stack([frames[1] + s * direction for s in (1e-3, -1e-3)]).detach(), ["", ""]
        ).tolist()
        assert (up - down) / 2e-3 == pytest.approx((slope[1] * direction).sum().item(), rel=1e-2, abs=1e-7)


def test_half_precision_is_near(folders):
    for name in ("smolvlm", "qwen2"):
        values = [
            rewards.make_ask("cpu", dtype, weights=folders[name], arg=QUESTION)(clips(), ["", ""])
            for dtype in (torch.float32, torch.bfloat16)
        ]
        assert values[1].dtype == torch.float32
        torch.testing.assert_close(*values, atol=0.15, rtol=0.05)


def test_the_prompt_stands_in_the_question(folders, monkeypatch):
    asked, real = [], transformers.SmolVLMProcessor.apply_chat_template

    def spy(self, chat, **kwargs):
        asked.append(chat[0]["content"][1]["text"])
        return real(self, chat, **kwargs)

    monkeypatch.setattr(transformers.SmolVLMProcessor, "apply_chat_template", spy)
    terms = rewards.make_terms('ask + 0.5*ask:"Is {prompt} + a dog in {it}?"', "cpu", torch.float32, TOY)
    found = rewards.weighted_rewards(terms, clips((64, 64)), ["a cat", "a {dog}"])
    assert (
        'Does the video show "a cat"? Answer yes or no.' in asked and "Is a {dog} + a dog in {it}?" in asked
    )
    assert {"ask", "ask p(yes)", "ask:Is {prompt} + a dog in {it}? p(yes)"} < found.keys()
    assert ((found["ask p(yes)"] > 0) & (found["ask p(yes)"] < 1)).all()


def test_grey_frames_are_frames(folders):
    reward = rewards.make_ask("cpu", torch.float32, weights=str(TINY), arg=QUESTION)
    grey = torch.full((1, 8, 3, 64, 64), 0.5, requires_grad=True)  # to SmolVLM exactly 0: left out
    reward(grey, [""]).sum().backward()
    assert grey.grad.isfinite().all() and (grey.grad.flatten(2).norm(dim=2) > 0).all()


@pytest.mark.parametrize("words", [(" Yes", " No"), ("yes", "no"), ("Yes", "no", " NO")])
def test_yes_and_no_are_found_with_and_without_a_space(words, tmp_path):
    reward = rewards.make_ask("cpu", torch.float32, weights=save_qwen(tmp_path, 2, words), arg=QUESTION)
    assert reward(clips((64, 64)), ["", ""]).isfinite().all()


def test_what_can_not_be_asked_is_refused_in_one_line(tmp_path, folders, monkeypatch):
    def refused(said, **how):
        with pytest.raises(BadInput, match=said) as problem:
            rewards.make_terms("ask", "cpu", torch.float32, TOY, **how)
        assert "\n" not in str(problem.value)

    for nothing in ("ask:''", "ask:", "camera:", "hps + ask: "):
        with pytest.raises(BadInput, match="must be told of what"):
            rewards.parse(nothing)
    with pytest.raises(BadInput, match="what has . or - in it in quotes"):
        rewards.parse("ask:Is it 1 + 1?")
    with pytest.raises(BadInput, match="can't take 'Is <image> red"):
        rewards.make_terms("ask:Is <image> red?", "cpu", torch.float32, TOY)
    refused("no token for yes or no", vlm=save_qwen(tmp_path / "mute", 2, ("maybe",)))
    refused("can't take 'Does the video show .* <image>", prompts=["a cat", "an <image>"])
    refused("question and prompt have over 512 tokens", prompts=["a cat", "cat and dog " * 9999])
    # one setting of the processor, of the network, or a name in the tokenizer, is another model's
    for file, key, value in (
        ("processor_config.json", "image_seq_len", 5),
        ("config.json", "image_token_id", 3),
        ("tokenizer.json", "model", {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}),
    ):
        made = Path(shutil.copytree(TINY, tmp_path / file))
        whole = json.loads((made / file).read_text())
        assert key in whole
        (made / file).write_text(json.dumps(whole | {key: value}))
        refused("do not fit together|can't take|or a damaged one", vlm=str(made))
    refused(
        "there is no tokenizer_config.json in the folder", vlm=str(HERE / "tiny" / "rewards" / "aesthetic")
    )
    refused("clip holds no AutoProcessor, or a damaged one", vlm=str(HERE / "tiny" / "rewards" / "clip"))
    refused("can't get 'some/where'", vlm="some/where")
    resize = transformers.SmolVLMVideoProcessor.resize
    monkeypatch.setattr(
        transformers.SmolVLMVideoProcessor, "resize", lambda *a, **k: resize(*a, **k).detach()
    )
    refused("loses the gradient: give another --vlm")
    with pytest.raises(BadInput, match="--vlm is for the reward ask"):
        checked(vader.Config(model="tiny", vlm=str(TINY)))
