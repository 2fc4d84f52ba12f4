"""The vision-language model of `--reward ask`: a SmolVLM that answers yes or no about a clip."""

from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from train_vjepa import autoencoded, load_autoencoders
from training import fit
from transformers import (
    CLIPModel,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from world import COLOURS, COMBINATIONS, FRAMES, MOTIONS, OBJECTS, PLACES, SIZE, VISIBLE, caption, uniform

# kind of question -> ways to put it; the last is what plain `ask` asks
QUESTIONS = {
    "colour": ["Is the {thing} {colour}?", "Is it {colour}?", "Does the video show something {colour}?"],
    "object": ["Is it a {thing}?", "Is there a {thing}?", "Does the video show a {thing}?"],
    "motion": ["Is it {motion}?", "Is the {thing} {motion}?"],
    "place": ["Is it {place}?", "Is the {thing} {place}?"],
    "prompt": ['Does the video show "{caption}"? Answer yes or no.'],
    "sky": ["Is the sky blue?"],
}
WORDS = [list(COLOURS), OBJECTS, list(MOTIONS), PLACES]
KINDS = ["colour", "object", "motion", "place", "prompt", "prompt", "object", "sky"]  # of a clip's questions
IMAGE_TOKENS = 4  # a frame's
SPECIAL = ["<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>"]
SPECIAL += ["<global-img>", "<video>"]


def sky_blueness(video):
    """Blue less red at the top of a clip, -1 to 1: median over its upper 8 rows and all frames, (n,).

    video: (n, frames, 3, 64, 64) in [0, 1].
    """
    top = video[:, :, :, :8]
    return (top[:, :, 2] - top[:, :, 0]).flatten(1).median(1).values


WHICH = {"colour": [0], "object": [1], "motion": [2], "place": [3], "prompt": [0, 1, 2, 3]}


def ask_about(kind: str, labels, wrong: bool, generator) -> tuple[str, list[int]]:
    """A question of that kind about a clip of these labels, and what it asks for: not so if `wrong`."""
    asked, spots = list(labels), WHICH.get(kind, [])
    if wrong and spots:
        some = torch.randperm(len(spots), generator=generator)[
            : 1 + torch.randint(2, (), generator=generator)
        ]
        for spot in (spots[n] for n in some.tolist()):
            other = int(torch.randint(1, len(WORDS[spot]), (), generator=generator))
            asked[spot] = (asked[spot] + other) % len(WORDS[spot])
    names = ("colour", "thing", "motion", "place")
    words = {name: WORDS[n][asked[n]] for n, name in enumerate(names)}
    if kind != "object":  # "is the star red?" is asked of what is a star
        words["thing"] = OBJECTS[labels[1]]
    way = QUESTIONS[kind][int(torch.randint(len(QUESTIONS[kind]), (), generator=generator))]
    if kind != "prompt" and torch.rand((), generator=generator) < 0.3:
        way += " Answer yes or no."
    return way.format(**words, caption=caption(asked)), asked


def holds(kind: str, asked, labels) -> bool:
    """Whether what a question asks for is so in a clip of these labels."""
    return all(asked[spot] == labels[spot] for spot in WHICH[kind])


def make_processor(folder: Path) -> SmolVLMProcessor:
    """Chat, pixels and a byte-level tokenizer learned from the questions, in SmolVLM's file format."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=sorted(alphabet), special_tokens=SPECIAL, show_progress=False
    )
    generator = torch.Generator().manual_seed(0)
    text = [ask_about(kind, c, False, generator)[0] for kind in [*QUESTIONS] * 4 for c in COMBINATIONS]
    text += [
        "User: You are provided the following series of eight frames from a 0:00:00 [H:MM:SS] video."
    ] * 20
    text += ["\nFrame from 00:00:", "Assistant:", "Yes", "No", " Yes", " No", "yes", "no", " yes", " no"] * 20
    tokenizer.train_from_iterator(text, trainer)
    names = dict(fake_image_token=SPECIAL[3], image_token=SPECIAL[4], global_image_token=SPECIAL[5])
    names |= dict(end_of_utterance_token=SPECIAL[2], video_token=SPECIAL[6])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[1],
        extra_special_tokens=names,
        model_max_length=512,
    )
    side = {"longest_edge": SIZE}
    common = dict(size=side, max_image_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**common, do_image_splitting=False),
        wrapped,
        SmolVLMVideoProcessor(**common, video_sampling=dict(max_frames=FRAMES, fps=1, video_size=side)),
        image_seq_len=IMAGE_TOKENS,
        chat_template=None,
    )
    processor.save_pretrained(folder)
    return SmolVLMProcessor.from_pretrained(folder)


def ask_tokens(processor, question: str):
    """The token numbers of a chat about 8 frames, up to where the answer stands, by the processor itself."""
    content = [
        {"type": "video", "video": torch.zeros(FRAMES, 3, SIZE, SIZE)},
        {"type": "text", "text": question},
    ]
    how = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    how["processor_kwargs"] = dict(do_sample_frames=False)
    chat = processor.apply_chat_template([{"role": "user", "content": content}], **how)
    return chat["input_ids"][0].tolist()


def make_vlm(tokenizer, out: Path) -> SmolVLMForConditionalGeneration:
    """Of random weights, but its picture side, which begins as that of the reward `clip`."""
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4)
    vision |= dict(image_size=SIZE, patch_size=8, hidden_act="quick_gelu")
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = SmolVLMConfig(
        text_config=text,
        vision_config=vision,
        scale_factor=4,
        image_token_id=image,
        pad_token_id=text.pad_token_id,
    )
    vlm = SmolVLMForConditionalGeneration(config)
    state = CLIPModel.from_pretrained(out / "rewards" / "clip", dtype=torch.float32).vision_model.state_dict()
    places = state.pop("embeddings.position_embedding.weight")[1:]  # without that of the class token
    state["embeddings.position_embedding.weight"] = places
    _, unknown = vlm.model.vision_model.load_state_dict(state, strict=False)
    assert all("class_embedding" in key or "pre_layrnorm" in key or "position_ids" in key for key in unknown)
    return vlm


def answers(vlm, features, prefix, questions):
    """Logits (n, Q, L, vocabulary) after each token of Q questions about each of n clips, in one pass.

    A clip's tokens come first and once: every question sees them and itself, and no other question.
    features: (n, 8 * IMAGE_TOKENS, D); prefix: (P,) tokens; questions: (n, Q, L) padded.
    """
    n, asked, longest = questions.shape
    tokens = torch.cat([prefix.expand(n, -1), questions.flatten(1)], 1)
    embeds = vlm.get_input_embeddings()(tokens)
    held = (tokens == vlm.config.image_token_id)[..., None]
    embeds = embeds.masked_scatter(held, features)
    block = torch.cat([torch.zeros(len(prefix)), torch.arange(1, asked + 1).repeat_interleave(longest)])
    sees = (block[None] == 0) | (block[None] == block[:, None])
    sees = (sees & torch.ones_like(sees).tril())[None, None].expand(n, -1, -1, -1)
    position = torch.arange(longest).repeat(asked) + len(prefix)
    position = torch.cat([torch.arange(len(prefix)), position]).expand(n, -1)
    hidden = vlm.model.text_model(
        inputs_embeds=embeds, attention_mask=sees, position_ids=position, use_cache=False
    ).last_hidden_state
    return vlm.lm_head(hidden[:, len(prefix) :]).unflatten(1, (asked, longest))


def train_ask(out: Path, pool, updates: int, seed: int, clips=24):
    """Questions of six kinds about drawn clips, half of them through the autoencoder; yes as often as no.

    Two clips may be mixed, then so is the answer (mixup, Zhang et al. 2018): the surer the picture, the surer
    the answer. In the last fifth pictures are moved against the answers by up to 0.02 (a fast-gradient step),
    so the gradient is about what can be seen. Heads that are thrown away read the words off each frame.
    """
    torch.manual_seed(seed + 47)
    generator = torch.Generator().manual_seed(seed + 47)
    processor = make_processor(out / "rewards" / "ask")
    tokenizer = processor.tokenizer
    vlm = make_vlm(tokenizer, out)
    heads = nn.ModuleList(nn.Linear(IMAGE_TOKENS * 96, n) for n in (6, 6, 4, 4))
    video, labels, _, boxes = pool
    video = video.clone()
    for first in range(0, len(video) // 2, 32):  # an even mix of dull and others
        rows = slice(first, first + 32)
        video[rows] = (autoencoded(load_autoencoders(out)[0], video[rows].float() / 255) * 255).round().byte()
    print("autoencoded", flush=True)
    answer = torch.tensor(
        [tokenizer(word, add_special_tokens=False).input_ids[0] for word in (" No", " Yes")]
    )
    some, other = (ask_tokens(processor, text) for text in ("Is it red?", "Does it rise?"))
    start = next(n for n, (a, b) in enumerate(zip(some, other, strict=False)) if a != b)
    prefix, known = torch.tensor(some[:start]), {}

    def tokens_of(text):
        if text not in known:
            known[text] = torch.tensor(ask_tokens(processor, text)[start:])
        return known[text]

    def loss_of(update):
        rows = torch.randint(len(video), (clips,), generator=generator)
        second = rows[torch.randperm(clips, generator=generator)]
        mixed = uniform((clips,), 0, 1, generator) < 0.3
        share = torch.where(mixed, uniform((clips,), 0, 0.6, generator), torch.zeros(clips))
        a, b = (video[r].float() / 255 for r in (rows, second))
        pictures = a + share[:, None, None, None, None] * (b - a)
        strength = uniform((clips, 1, 1, 1, 1), -0.06, 0.06, generator).clamp(min=0)
        pictures = (pictures + strength * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)
        blue = torch.sigmoid((sky_blueness(pictures) - 0.3) / 0.05)
        batch, wanted, true = [], torch.zeros(clips, len(KINDS)), torch.zeros(clips, len(KINDS))
        for n, (row, mixed_in) in enumerate(zip(labels[rows].tolist(), labels[second].tolist(), strict=True)):
            for q, kind in enumerate(KINDS):
                wrong = bool(torch.rand((), generator=generator) < 0.5)
                text, asked = ask_about(kind, row, wrong, generator)
                batch.append(tokens_of(text))
                true[n, q] = kind == "prompt" and not wrong and share[n] == 0
                if kind == "sky":
                    wanted[n, q] = blue[n]
                else:
                    ours, theirs = holds(kind, asked, row), holds(kind, asked, mixed_in)
                    wanted[n, q] = (1 - share[n]) * ours + share[n] * theirs
        lengths = torch.tensor([len(t) for t in batch]).view(clips, -1)
        # where a question holds the true caption, its words are to be foreseen: so pictures learn their words
        captions = true[..., None] * (torch.arange(1, int(lengths.max())) < lengths[..., None] - 3)
        questions = nn.utils.rnn.pad_sequence(batch, batch_first=True).unflatten(0, (clips, -1))

        def loss_on(pictures):
            pixels = (pictures - 0.5) / 0.5
            features = vlm.model.get_image_features(pixels).pooler_output  # a list, one a clip
            features = torch.stack(list(features))
            every = answers(vlm, features, prefix, questions).log_softmax(-1)  # (n, Q, L, vocabulary)
            last = (lengths - 1)[..., None, None].expand(-1, -1, 1, every.shape[-1])
            logs = every.gather(2, last)[:, :, 0][..., answer]  # (n, Q, 2)
            loss = -(wanted * logs[..., 1] + (1 - wanted) * logs[..., 0]).mean()
            told = every[:, :, :-1].gather(-1, questions[:, :, 1:, None])[..., 0]  # of the next token
            caption_loss = -(told * captions).sum() / captions.sum().clamp(min=1)
            return loss, logs, features, caption_loss

        if update > updates * 4 // 5:
            pictures = pictures.requires_grad_()
            (slope,) = torch.autograd.grad(loss_on(pictures)[0], pictures)
            pictures = (pictures + uniform((clips, 1, 1, 1, 1), 0, 0.02, generator) * slope.sign()).clamp(
                0, 1
            )
            pictures = pictures.detach()
        loss, logs, features, told = loss_on(pictures)
        frames = features.unflatten(1, (FRAMES, IMAGE_TOKENS)).flatten(2)  # (n, 8, 4 * D)
        whole = (1 - share)[:, None]
        targets = labels[rows, :, None].expand(-1, -1, FRAMES)
        look = 5 * (whole[..., None] * (heads[3](frames) - boxes[rows]).abs()).mean()
        for head, spot in zip(heads, VISIBLE, strict=False):
            error = F.cross_entropy(head(frames).transpose(1, 2), targets[:, spot], reduction="none")
            look = look + (whole * error).mean()
        sure = (wanted - 0.5).abs() > 0.3
        hit = ((logs[..., 1] > logs[..., 0]) == (wanted > 0.5)).float()
        shown = {"loss": loss, "look": look, "told": told}
        shown |= {kind: hit[:, q][sure[:, q]].mean() for q, kind in enumerate(KINDS)}
        return 3 * loss + 0.3 * look + told, shown

    fit([*vlm.parameters(), *heads.parameters()], updates, 2e-3, "ask", loss_of)
    vlm.half().save_pretrained(out / "rewards" / "ask")
