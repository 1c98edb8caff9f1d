"""What a run starts from: its data, its model, its tokenizer. Read after train.py.

A model comes from published parts (--vision, --lm), from a model folder (--init), or from nothing;
then its tokenizer is trained on the run's own words, and its first filters on its own pictures.
"""

import contextlib
import dataclasses
import math
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

import world
from cli import disk_errors, input_errors
from config import TrainConfig
from data import pixels
from documents import Image, Ret, Text
from drawn import DrawnWorld
from model import ModelConfig, VisionLanguageModel
from optim import freeze
from plan import check_memory
from presets import preset_model
from ranks import Ranks, wait_for_all
from records import BadRecord
from sources import DataSets, Stream
from tokenizer import Tokenizer, train_tokenizer
from vision import PictureError
from weights import BUILT_IN, assemble, load_model, shapes

WORDS_FROM = 10_000  # samples whose words a tokenizer is trained on


def make_indexes(config: TrainConfig, ranks: Ranks) -> None:
    """Before ranks meet, for it may take hours: one process of each machine indexes the data."""
    if ranks.size > 1 and ranks.local == 0:
        with contextlib.suppress(ValueError):  # which all ranks are about to find, too
            open_data(config)


def open_data(config: TrainConfig) -> DataSets | None:
    """The user's own data, if any. ValueError if it cannot be read."""
    return DataSets(config.data, config.val) if config.data else None


def with_steps(config: TrainConfig, sets: DataSets | None) -> TrainConfig:
    """The config with --epochs of one's own data turned into --steps."""
    if not sets:
        return config
    n_samples = len(sets.stream("train", config.seed, "nanovilla", 0.0))
    steps = tuple(math.ceil(epochs * n_samples / config.batch_size) or n
                  for epochs, n in zip(config.epochs, config.steps, strict=True))
    return dataclasses.replace(config, steps=steps)


def samples_of(config: TrainConfig, sets: DataSets | None, stage: str, model: ModelConfig,
               split: str = "train") -> DrawnWorld | Stream:
    """Where a stage's samples come from: the user's own data, if given, or the drawn world."""
    if sets:
        return sets.stream(split, config.seed, model.chat, config.paraphrase)
    return DrawnWorld(stage, model.vision.image_size, config.seed, split, model.chat,
                      has_ret="<ret>" in model.special_tokens)


def start_files(config: TrainConfig) -> list[str]:
    """The files or folders that a run's first weights come from; none: it starts from nothing."""
    if config.vision:
        return [config.vision, config.lm]
    built_in = str(BUILT_IN) if config.data and config.preset == "tiny" else "none"
    return [name for name in (config.init or built_in,) if name != "none"]


def initial_model(config: TrainConfig) -> tuple[VisionLanguageModel, Tokenizer] | None:
    """What the flags name, by default the built-in model for one's own pictures; None: nothing."""
    files = start_files(config)
    with input_errors():
        if len(files) == 2:
            torch.manual_seed(config.seed)
            like = preset_model(config.preset, config.shrink)
            model, tokenizer = assemble(*files, like, one_dtype=False)
            open_gates(model, config)
        elif files:
            model, tokenizer = load_model(files[0])
        else:
            return None
    freeze(model, config.never_trained)
    check_memory(config, model)
    return model, tokenizer


def open_gates(model: VisionLanguageModel, config: TrainConfig) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            nn.init.constant_(parameter, config.gate_start)


def new_model(config: TrainConfig, out: Path, ranks: Ranks, sets: DataSets | None
              ) -> tuple[VisionLanguageModel, Tokenizer]:
    """The preset's model with random weights, the same on every rank, and its tokenizer.

    The tokenizer is trained once, from the run's own words.
    """
    preset = preset_model(config.preset, config.shrink)
    freeze(like := shapes(preset), config.never_trained)
    check_memory(config, like)
    with input_errors():
        samples = samples_of(config, sets, config.stages[0], preset)
        examples = example_pictures(samples, preset.vision.image_size, min(256, len(samples)))
    path = out / "tokenizer.model"
    if ranks.is_first:
        texts = own_words(samples) if sets else world.corpus(2000, config.seed)
        template = ["User: What is in the picture?", "Assistant:"]
        with input_errors(), disk_errors(path):
            train_tokenizer([*texts, *template], path, config.vocab_size)
    wait_for_all()
    tokenizer = Tokenizer(path)
    decoder = dataclasses.replace(preset.decoder, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(config.seed)
    model = VisionLanguageModel(dataclasses.replace(preset, decoder=decoder))
    model.vision.patch_embed.whiten(model.vision.normalise(examples))
    align_words_and_pictures(model)
    open_gates(model, config)
    return model, tokenizer


def example_pictures(source, size: int, n: int) -> Tensor:
    """A picture of each of the first n samples of a source, uint8 (at most n, 3, size, size).

    PictureError if none of them can be read.
    """
    pictures, reason = [], "there are none"
    for index in range(n):
        try:
            segments = [segment for document in source.at(index).documents
                        for segment in document]
            shown = next(s.reference for s in segments if isinstance(s, Image | Ret))
            pictures.append(pixels(shown, size))
        except (PictureError, BadRecord) as error:
            reason = str(error)
    if not pictures:
        raise PictureError(f"none of the first {n} pictures can be read: {reason}")
    return torch.stack(pictures)


def own_words(samples: Stream) -> list[str]:
    """The words of some samples, for a tokenizer of their own."""
    texts = []
    for number in range(min(len(samples), WORDS_FROM)):
        with contextlib.suppress(BadRecord):
            texts += [segment.string for document in samples.at(number).documents
                      for segment in document if isinstance(segment, Text) and not segment.special]
    return sorted(set(texts))


@torch.no_grad()
def align_words_and_pictures(model: VisionLanguageModel) -> None:
    """Tie the start of what must match: embed = head (a word is read as it is written), and in
    cross-attention k = q and o = v^T (a picture is found by the word that names it). So a model
    from nothing learns to name and to find sooner (LOG.md)."""
    model.embed.copy_(model.head)
    same_width = model.config.vision.dim == model.config.decoder.dim
    for attn in (block.attn for block in model.cross_blocks.values() if same_width):
        attn.o_proj.weight.copy_(attn.v_proj.weight.T)
        attn.k_proj.weight.copy_(attn.q_proj.weight)
