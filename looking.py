"""Where each word looked: attention over the picture as maps, and boxes drawn onto it.

Read after generate.py; the command line is sample.py --heatmap, --draw and --save.

    attention_maps   every token of a document -> its weights over the patches of each picture
    answer_words     the same, word by word of an answer
    strip            a picture for each word, its map laid over it
    draw_boxes       the boxes that an answer names, drawn onto the picture

A map is what the model computes, not an estimate: one pass over the whole document, in which
forward hooks record queries and keys after q_norm and k_norm, and the softmax is computed again.
Weights are averaged over heads and over the gated blocks. After a resampler, words look at latents,
not at patches; then their weights are multiplied by those with which the latents looked at the
patches.

The last state before a token is the one that chose it. So a word's map is not the row of its own
tokens: it is that of the tokens before them, averaged.

What such a map does not tell: how much the word depends on what was seen. A gate may be closed, and
a patch's token holds more than its own pixels, since the ViT has mixed them.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from boxes import BOX, Frame, in_whole, middle_square, sides
from data import collate, collate_options, encode
from documents import Document
from model import Batch, VisionLanguageModel
from page import WHOLE, Word, visible
from plot import COLOURS, INK
from tokenizer import StreamDecoder, Tokenizer
from vision import VisionConfig, preprocess

WARM = (255, 140, 0)  # where a word looked most; page.py's script has the same colours
DARK, TINT = 0.75, 0.4  # strengths of the colours at their ends: what was seen stays visible
THUMBNAIL, COLUMNS, GAP = 112, 8, 10  # of the strip, in pixels; words in a row
MOST_WORDS, MOST_PICTURES = 200, 8  # in the strip
BOX_COLOURS = (*COLOURS, (86, 180, 233), (240, 228, 66))  # Okabe and Ito's others
LABEL = 40  # longest name of a box, in characters


# ------------------------------------------------------------------------------------ the weights


@torch.no_grad()
def attention_maps(model: VisionLanguageModel, batch: Batch, blocks: Sequence[int] | None = None
                   ) -> Tensor:
    """Weights of every token over the patches of every picture, (T, I, side, side), fp32 or finer.

    They are averaged over heads and over the gated blocks in front of the layers `blocks` (None:
    all). A token's weights over all its pictures sum to 1, or less where pictures have a class
    token that words look at (keep_class): its share belongs to no patch and is left out. Zeros
    where a token does not see a picture. ValueError if there is no such block.
    """
    config, n_images = model.config, len(batch.shown)
    attentions = [model.cross_blocks[name].attn for name in block_names(model, blocks)]
    readers = list(model.resampler.blocks) if config.resampler else []
    with capture_qk([*attentions, *readers]) as captured:
        model.hidden_states(batch)
    seen = model.image_span(batch)
    weights = mean(mean_over_heads(captured[a.q_norm], captured[a.k_norm], seen.start, seen.end)
                   for a in attentions)  # (T, I * P)
    weights = weights.unflatten(1, (n_images, -1))  # (T, I, P)
    if readers:
        queries_keys = [(captured[reader.q_norm], captured[reader.k_norm]) for reader in readers]
        latents = resampler_attention(queries_keys, len(batch.images)).index_select(0, batch.shown)
        weights = torch.einsum("til,ilp->tip", weights, latents)
    patches = weights[..., 1:] if config.vision.keep_class else weights
    return patches.unflatten(2, (config.vision.image_size // config.vision.patch_size, -1))


def block_names(model: VisionLanguageModel, blocks: Sequence[int] | None) -> list[str]:
    known = list(model.cross_blocks)
    names = known if blocks is None else [str(block) for block in blocks]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"no gated block {', '.join(unknown) or 'is named'}: this model's stand "
                         f"in front of layers {', '.join(known)}; choose some of them")
    return names


@contextmanager
def capture_qk(attentions: list[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Within it, the outputs of the q_norm and k_norm of these are recorded, by their norm."""
    captured: dict[nn.Module, Tensor] = {}

    def keep(norm: nn.Module, _, output: Tensor) -> None:
        captured[norm] = output

    handles = [norm.register_forward_hook(keep)
               for attention in attentions for norm in (attention.q_norm, attention.k_norm)]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def mean(values: Iterable[Tensor]) -> Tensor:
    """Their mean, one in memory at a time: all heads of all blocks may not fit."""
    total, n = 0, 0
    for value in values:
        total, n = total + value, n + 1
    return total / n


def mean_over_heads(q: Tensor, k: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """q (T, H, D), k (S, H, D), intervals (T,) -> (T, S)."""
    return mean(weights_of(q[:, h], k[:, h], start, end) for h in range(q.shape[1]))


def weights_of(q: Tensor, k: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """What interval_attention multiplies values by, one head: q (T, D), k (S, D) -> (T, S)."""
    keys = torch.arange(len(k), device=k.device)
    visible = (keys >= start[:, None]) & (keys < end[:, None])
    scores = (exact(q) @ exact(k).T) * q.shape[-1] ** -0.5
    # A row that sees nothing has no softmax; its even weights are zeroed with all hidden ones.
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1) * visible


def resampler_attention(queries_keys: list[tuple[Tensor, Tensor]], n_images: int) -> Tensor:
    """How each latent looked at its picture's patches, (U, L, P), summing to 1.

    Every block of the resampler reads the patches anew and adds to the latents, so all of them
    count, as all of their heads do. Latents look at one another, too: that is left out, so a head
    that was busy with it counts less.
    """
    def one(q: Tensor, k: Tensor) -> Tensor:
        q, k = (exact(x).unflatten(0, (n_images, -1)) for x in (q, k))  # (U, L or P + L, H, D)
        scores = torch.einsum("ulhd,ushd->uhls", q, k) * q.shape[-1] ** -0.5
        return scores.softmax(-1).mean(1)[..., : k.shape[1] - q.shape[1]]  # (U, L, P)

    weights = mean(one(q, k) for q, k in queries_keys)
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def exact(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -------------------------------------------------------------------------------------- the words


def word_spans(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[str, range]]:
    """An answer's words as they stream, each with the places of its tokens among `ids`.

    A piece that starts with a blank or a new line starts a word, which keeps it, so that all words
    put together are the answer. It ends before the first special token, or one that stops it.
    """
    stream, words = StreamDecoder(tokenizer), []
    for place, token in enumerate(ids):
        if token >= tokenizer.vocab_size or token in tokenizer.stop_ids:
            break
        text = stream.push(token)  # "": half a character
        if words and (words[-1][0].isspace() or not text[:1].isspace()):
            before, tokens = words.pop()
            words.append((before + text, range(tokens.start, place + 1)))
        else:
            words.append((text, range(place, place + 1)))
    if words:
        words[-1] = words[-1][0] + stream.flush(), words[-1][1]
    return words


def answer_words(model: VisionLanguageModel, tokenizer: Tokenizer, document: Document,
                 ids: Sequence[int], logprobs: Sequence[float] | None = None,
                 blocks: Sequence[int] | None = None) -> list[Word]:
    """The words of the answer `ids` that a model gave to a document, and where each looked.

    Each has a map for every picture of the document, zeros where it does not see it; the weights
    are the mean over its tokens of those with which each was chosen, a log-probability their sum.
    """
    encoded = encode(document, tokenizer, end=False)
    n, n_pictures = len(encoded.ids), len(encoded.images)
    encoded.ids += ids
    encoded.learn += [False] * len(ids)
    batch = collate([[encoded]], **collate_options(tokenizer, model.config)).to(model.embed.device)
    maps = attention_maps(model, batch, blocks)[n - 1 : -1, :n_pictures].float().cpu().numpy()
    return [Word(text, sum(logprobs[place] for place in places) if logprobs else None,
                 list(maps[places.start : places.stop].mean(0)))
            for text, places in word_spans(tokenizer, ids)]


# ------------------------------------------------------------------------------------- the pictures


def seen_part(size: tuple[int, int], vision: VisionConfig) -> Frame:
    """The part of a picture of (width, height) that the model sees, and its maps lie on."""
    return middle_square(size, vision.image_size) if vision.resize == "crop" else WHOLE


def heat_layer(weights: np.ndarray) -> Image.Image:
    """Weights (h, w) of 0..1 -> a layer of that size in pixels: dark at 0, clear, warm at 1."""
    layer, warm = np.zeros((*weights.shape, 4), np.uint8), weights >= 0.5
    layer[warm, :3] = WARM
    layer[..., 3] = np.rint(255 * np.where(warm, TINT, DARK) * np.abs(2 * weights - 1))
    return Image.fromarray(layer, "RGBA")


def strip(pictures: list[Image.Image], words: list[Word], vision: VisionConfig) -> Image.Image:
    """For every word the pictures as the model sees them, its map over them, the word below.

    Shown is the part of a picture that the model sees, finer than it does. Colours are relative to
    a word's largest weight over all pictures. Each patch is a plain square: smoothing would claim
    more than there is. Of many pictures the last MOST_PICTURES are shown, of many words the first
    MOST_WORDS, and how many are left out. ValueError if there is nothing to show.
    """
    pictures = pictures[-MOST_PICTURES:]
    words, n_left_out = words[:MOST_WORDS], max(len(words) - MOST_WORDS, 0)
    if not pictures or not words:
        raise ValueError("no map to draw: it takes a picture, and an answer of a word or more")
    grounds = [Image.fromarray(preprocess(picture, THUMBNAIL, vision.resize, vision.rgb)
                               .permute(1, 2, 0).numpy()).convert("RGBA") for picture in pictures]
    font = ImageFont.load_default(14)
    wide, high = THUMBNAIL + GAP, (THUMBNAIL + 4) * len(pictures) + 20 + GAP
    n_columns = min(len(words), COLUMNS)
    n_rows = math.ceil(len(words) / COLUMNS)
    page = Image.new("RGB", (GAP + wide * n_columns, GAP + high * n_rows + 24 * bool(n_left_out)),
                     "white")
    pen = ImageDraw.Draw(page)
    for i, word in enumerate(words):
        x, y = GAP + i % COLUMNS * wide, GAP + i // COLUMNS * high
        for ground, weights in zip(grounds, scaled(word.maps, len(grounds)), strict=True):
            layer = heat_layer(weights).resize(ground.size, Image.Resampling.NEAREST)
            page.paste(Image.alpha_composite(ground, layer).convert("RGB"), (x, y))
            y += THUMBNAIL + 4
        label = shortened(word.text, font, THUMBNAIL)
        pen.text((x + THUMBNAIL / 2, y + 8), label, INK, font, "mm")
    if n_left_out:
        pen.text((GAP, page.height - 24), f"and {n_left_out} words more", INK, font)
    return page


def scaled(maps: list[np.ndarray], n: int) -> list[np.ndarray]:
    """The last n maps, their largest weight 1; without weights all are 0, dark."""
    maps = maps[-n:]
    most = max((float(weights.max()) for weights in maps), default=0.0) or 1.0
    return [np.zeros((1, 1))] * (n - len(maps)) + [weights / most for weights in maps]


def shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """One line of text, at most `width` pixels wide."""
    text = " ".join(visible(text).split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


# ---------------------------------------------------------------------------------------- the boxes


def draw_boxes(picture: Image.Image, text: str, frame: Frame = WHOLE) -> tuple[Image.Image, int]:
    """The boxes that a text names, drawn onto a copy of an upright picture, and how many there are.

    frame: the part of the picture in whose fractions they are given: `seen_part` for what a model
    says. The words before a box are its label.
    """
    drawn = picture.convert("RGB")
    found = [(sides(in_whole(match, frame)), label_of(text[: match.start()]))
             for match in BOX.finditer(text)]
    found = [(box, label) for box, label in found if box[0] < box[2] and box[1] < box[3]]
    pen, (width, height) = ImageDraw.Draw(drawn), drawn.size
    thick = max(2, round(min(drawn.size) / 150))
    font = ImageFont.load_default(max(11, round(min(drawn.size) / 28)))
    for i, (box, label) in enumerate(found):
        colour = BOX_COLOURS[i % len(BOX_COLOURS)]
        x1, y1, x2, y2 = (round(side * length) for side, length in
                          zip(box, (width, height, width, height), strict=True))
        edge = (x1, y1, max(x2 - 1, x1), max(y2 - 1, y1))
        outer = (edge[0] - 1, edge[1] - 1, edge[2] + 1, edge[3] + 1)
        pen.rectangle(outer, outline="white", width=thick + 2)  # seen on any ground
        pen.rectangle(edge, outline=colour, width=thick)
        if label:
            label = shortened(label, font, width)
            tag = pen.textbbox((0, 0), label, font)
            x = min(x1, max(width - tag[2] - 6, 0))
            y = y1 - tag[3] - 4 if y1 >= tag[3] + 4 else y1
            pen.rectangle((x, y, x + tag[2] + 6, y + tag[3] + 4), colour, "white")
            light = np.dot(colour, (0.299, 0.587, 0.114)) > 128
            pen.text((x + 3, y + 1), label, "black" if light else "white", font)
    return drawn, len(found)


def label_of(before: str) -> str:
    """The words that lead up to a box, back to where the sentence or the last box ends.

    >>> label_of("I see a red cat [0.1, 0.1, 0.5, 0.5] and a blue bird ")
    'a blue bird'
    """
    words = re.split(r"[\]\[.,;:!?\n]", before)[-1].strip()
    words = re.sub(r"^(?:and|or|with)\s+", "", words)
    return words if len(words) <= LABEL else "..." + words[-LABEL:]
