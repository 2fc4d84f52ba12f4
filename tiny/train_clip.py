"""Words and pictures: the tokenizer and CLIP, whose text side t2v reads, and the aesthetic reward on it."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from tqdm import trange
from training import fit
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)
from world import COMBINATIONS, FRAMES, SEEN, SIZE, VISIBLE, caption, draw, pick, uniform

from rewards import CLIP_MEAN, CLIP_STD, aesthetic_head, preprocess


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer with merges learned from the captions: their words are one token, others split."""
    tokenizer = Tokenizer(
        models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix="")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator((caption(c) for c in COMBINATIONS), trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learned["merges"]]
    words = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    words = list(dict.fromkeys(words)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({word: number for number, word in enumerate(words)}, ensure_ascii=False)
    )
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n"
    )
    result = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=32,
        pad_token="<|endoftext|>",
    )
    result.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer, prompts):
    return tokenizer(
        prompts, padding="max_length", max_length=32, truncation=True, return_tensors="pt"
    ).input_ids


def make_clip(tokenizer, hidden=96, mlp=256) -> CLIPModel:
    common = dict(hidden_size=hidden, intermediate_size=mlp, num_attention_heads=4, projection_dim=64)
    text = dict(
        **common,
        vocab_size=len(tokenizer),
        max_position_embeddings=32,
        num_hidden_layers=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(**common, image_size=SIZE, patch_size=8, num_hidden_layers=3)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def image_embedding(clip, pictures):
    """pictures: (n, 3, 64, 64) in [0, 1] -> (n, 64) of length 1."""
    hidden = clip.vision_model(
        pixel_values=preprocess(pictures[None], SIZE, CLIP_MEAN, CLIP_STD)
    ).pooler_output
    return F.normalize(clip.visual_projection(hidden), dim=-1)


def text_embedding(clip, tokens):
    return F.normalize(clip.text_projection(clip.text_model(input_ids=tokens).pooler_output), dim=-1)


def look_alike(labels):
    """Which captions look the same in one picture, as only the motion differs: they are no wrong answers.

    labels: (n, 4) -> (n, n) bool, False on the diagonal.
    """
    visible = labels[:, VISIBLE]
    return (visible[:, None] == visible[None]).all(-1) & ~torch.eye(len(labels), dtype=torch.bool)


def moved_against_score(clip, head, pictures, target, most: float, generator):
    """Pictures (n, 3, 64, 64) after one fast-gradient step of up to `most` away from their target (n,)."""
    pictures.requires_grad_()
    error = F.mse_loss(head.layers(image_embedding(clip, pictures))[:, 0], target)
    (slope,) = torch.autograd.grad(error, pictures)
    step = uniform((len(pictures), 1, 1, 1), 0, most, generator)
    return (pictures + step * slope.sign()).clamp(0, 1).detach()


def train_clip(out: Path, updates: int, seed: int):
    """CLIP by its contrastive loss, with the aesthetic head on its picture embedding.

    A single picture shows no motion, so the caption embedding also predicts its four words (by heads that are
    thrown away): all words, motions too, end up apart. The score is trained on pictures moved against it by
    up to 0.05 (one fast-gradient step), so its gradient is about what can be seen, not invisible patterns.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = make_tokenizer(out / "t2v" / "tokenizer")
    clip, head = make_clip(tokenizer), aesthetic_head(64)
    words = nn.ModuleList(nn.Linear(64, n) for n in (6, 6, 4, 4))
    sees = nn.ModuleList(nn.Linear(64, n) for n in (6, 6, 4))

    def loss_of(update):
        combinations = pick(SEEN, 64, generator)
        moments = torch.randint(FRAMES, (64, 1), generator=generator)
        video, target, _ = draw(combinations, generator, full=True, moments=moments)
        pictures = video[:, 0]
        tokens = tokenize(tokenizer, [caption(c) for c in combinations])
        labels = torch.tensor(combinations)
        if update > updates // 4:
            pictures = moved_against_score(clip, head, pictures, target, 0.05, generator)
        image, text = image_embedding(clip, pictures), text_embedding(clip, tokens)
        logits = image @ text.T * clip.logit_scale.exp().clamp(max=50)
        logits = logits.masked_fill(look_alike(labels), -1e4)
        contrast = (
            F.cross_entropy(logits, torch.arange(64)) + F.cross_entropy(logits.T, torch.arange(64))
        ) / 2
        read = sum(F.cross_entropy(f(text), labels[:, i]) for i, f in enumerate(words))
        look = sum(F.cross_entropy(f(image), labels[:, i]) for f, i in zip(sees, VISIBLE, strict=True))
        score = head.layers(image)[:, 0]
        loss = contrast + read + 0.5 * look + F.mse_loss(score, target)
        shown = {"contrast": contrast, "read": read, "look": look, "score": F.l1_loss(score, target)}
        return loss, shown

    weights = [*clip.parameters(), *head.parameters(), *words.parameters(), *sees.parameters()]
    fit(weights, updates, 1.5e-3, "clip", loss_of, decay=0.01, beta=0.999, rising=0.3)
    save_aesthetic(out, clip, head)
    text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(clip.config.text_config.to_dict()))
    missing, unexpected = text_encoder.load_state_dict(clip.float().text_model.state_dict(), strict=False)
    if missing or unexpected:
        text_encoder.text_model.load_state_dict(clip.text_model.state_dict())
    text_encoder.half().save_pretrained(out / "t2v" / "text_encoder")


def train_aesthetic(out: Path, updates: int, seed: int):
    """Go on with the picture side of that CLIP and the head, on 8,000 drawn pictures, the text side frozen.

    Steps against the score only in the last quarter and up to 0.01: those of `train_clip` left it unsharp.
    """
    torch.manual_seed(seed + 4)
    generator = torch.Generator().manual_seed(seed + 4)
    folder = out / "rewards" / "aesthetic"
    tokenizer = CLIPTokenizer.from_pretrained(out / "t2v" / "tokenizer")
    clip = CLIPModel.from_pretrained(out / "work" / "clip", dtype=torch.float32)
    head = aesthetic_head(64).eval()
    head.load_state_dict(torch.load(folder / "aesthetic-model.pth", weights_only=True))
    drawn, scores, chosen = [], [], pick(SEEN, 8000, generator)
    for first in trange(0, 8000, 80, desc="pictures"):
        moments = torch.randint(FRAMES, (80, 1), generator=generator)
        video, target, _ = draw(chosen[first : first + 80], generator, full=first % 240 != 0, moments=moments)
        drawn.append(video[:, 0])
        scores.append(target)
    drawn, scores = torch.cat(drawn), torch.cat(scores)
    with torch.no_grad():
        texts = text_embedding(clip, tokenize(tokenizer, [caption(c) for c in SEEN]))
    numbers = torch.tensor([SEEN.index(c) for c in chosen])

    def loss_of(update):
        batch = torch.randint(8000, (64,), generator=generator)
        pictures, target = drawn[batch], scores[batch]
        flipped = uniform((64, 1, 1, 1), 0, 1, generator) < 0.5
        pictures = torch.where(flipped, pictures.flip(-1), pictures)
        if update > updates * 3 // 4:
            pictures = moved_against_score(clip, head, pictures, target, 0.01, generator)
        image = image_embedding(clip, pictures)
        score = head.layers(image)[:, 0]
        contrast = F.cross_entropy(image @ texts.T * clip.logit_scale.exp().detach(), numbers[batch])
        loss = F.mse_loss(score, target) + 0.05 * contrast
        return loss, {"contrast": contrast, "score": F.l1_loss(score, target)}

    weights = [*clip.vision_model.parameters(), *clip.visual_projection.parameters(), *head.parameters()]
    fit(weights, updates, 1e-3, "aesthetic", loss_of, decay=0.01, beta=0.999, rising=0.3)
    save_aesthetic(out, clip, head)


def save_aesthetic(out: Path, clip, head):
    """Keep the whole CLIP in work/, and its picture side with the head as the reward."""
    clip.half().save_pretrained(out / "work" / "clip")
    vision = CLIPVisionModelWithProjection.from_pretrained(out / "work" / "clip")
    vision.half().save_pretrained(out / "rewards" / "aesthetic")
    torch.save(head.half().state_dict(), out / "rewards" / "aesthetic" / "aesthetic-model.pth")
