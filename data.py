"""Data: from documents to ragged batches, in an order that one integer describes.

Read after model.py. The way of a sample:

    a number       sample n of the run: the same whatever the number of ranks or workers
    documents      a *source* turns it into documents (formats.py): the drawn world, a folder
    tokens         `encode`: ids, which of them are learned, where the pictures stand
    a micro-batch  `collate`: samples laid end to end, nothing padded, nothing cut

    tokens       <s> <image> a  red cat </s> <s>  a  red cat <ret> </s> <s> <image> ...
    targets       -    a    red cat </s>  -   -   -   -    -    -    -   -   -
    positions     0    1    2   3   4    5    0   1   2    3   4    5    0   1
    text_start    0    0    0   0   0    0    6   6   6    6   6    6    12  12
    image_start   0    0    0   0   0    0    1   1   1    1   1    1    1   1
    image_end     0    1    1   1   1    1    1   1   1    1   1    1    1   2

Labels come from the segments while they are tokenized; nothing is searched for afterwards. Here,
and only here, is decided which pictures a word sees (`visible_interval`).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import world
from formats import Document, Image, Ret, Text, caption_documents
from kernels import IGNORE, AttentionHints, attention_hints
from tokenizer import Tokenizer, answer_pieces, question_pieces
from vision import open_image, preprocess

# ------------------------------------------------------------------------------- one document


@dataclass
class Encoded:
    """One tokenized document."""

    ids: list[int]
    learn: list[bool]
    images: list[object]  # references of the pictures shown, in order
    rets: list[tuple[int, object]]  # (place of <ret>, the picture it asks for)


def encode(document: Document, tokenizer: Tokenizer, end: bool = True) -> Encoded:
    """Tokenize a document: <s>, its segments and, unless the model is to go on, </s>.

    </s> is learned if the last thing before it is: the model learns where to stop.
    """
    out = Encoded([tokenizer.bos_id], [False], [], [])
    for segment in document:
        if isinstance(segment, Image):
            ids, learn = [tokenizer.image_id], False
            out.images.append(segment.reference)
        elif isinstance(segment, Ret):
            ids, learn = [tokenizer.ret_id], segment.learn
            out.rets.append((len(out.ids), segment.reference))
        else:
            ids = (
                [tokenizer.special_id(segment.string)]
                if segment.special
                else tokenizer.encode(segment.string)
            )
            learn = segment.learn
        out.ids += ids
        out.learn += [learn] * len(ids)
    if end:
        out.ids.append(tokenizer.eos_id)
        out.learn.append(out.learn[-1])
    return out


def chat_document(turns: list[tuple[list, str, str | Ret | None]]) -> Document:
    """Turns of (pictures shown, question, answer) -> a document in the chat template.

    An answer is words, a Ret (the model answers with that picture, which then stands in the text
    and can be asked about), or None: the model is to answer now.
    """
    document: Document = []
    for pictures, question, answer in turns:
        document += [Image(picture) for picture in pictures]
        document += [Text(*piece) for piece in question_pieces(question)]
        if isinstance(answer, Ret):
            document += [replace(answer, learn=True), Image(answer.reference)]
            answer = ""
        if answer is not None:
            document += [Text(*piece) for piece in answer_pieces(answer)]
    return document


# ------------------------------------------------------------------------------ one micro-batch


@dataclass
class Batch:
    """A micro-batch; shapes as in model.Batch. The last fields are for the losses and the log."""

    tokens: Tensor
    targets: Tensor
    target_rows: Tensor
    positions: Tensor
    text_start: Tensor
    image_start: Tensor
    image_end: Tensor
    images: Tensor
    image_index: Tensor
    ret_token: Tensor
    text_hints: AttentionHints
    image_hints: AttentionHints
    ret_image: Tensor  # (R,) int64, the picture that the <ret> of ret_token asks for
    n_rets: int  # how many of the R are real: without any, one stands in for FSDP's sake
    n_samples: int

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device; copies overlap with work if memory is pinned."""
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, AttentionHints)):
                value = value.to(device) if field.name.endswith("hints") else value.to(
                    device, non_blocking=True)
            moved[field.name] = value
        return Batch(**moved)


def visible_interval(rule: str, n_before: int, first: int) -> tuple[int, int]:
    """Which pictures [start, end) a word sees that stands behind n_before pictures of its document.

    first: the batch-wide number of its document's first picture. A word sees a picture from the
    picture's own <image> token on.

    >>> visible_interval("all", 2, first=5), visible_interval("latest", 2, first=5)
    ((5, 7), (6, 7))
    >>> visible_interval("latest", 0, first=5)
    (5, 5)
    """
    start = first + max(n_before - 1, 0) if rule == "latest" else first
    return start, first + n_before


def collate(
    samples: list[list[Encoded]],
    *,
    image_id: int,
    visible_images: str,
    image_size: int,
    tokens_per_image: int,
) -> Batch:
    """Lay the documents of all samples end to end. Nothing is padded.

    A document that shows the very pictures of the one before it shares them: they are encoded
    once. A picture that only a <ret> asks for joins the batch unseen. Without any picture one grey
    one is added that nobody sees, so that every rank runs the same layers.
    """
    tokens, targets, positions, text_start, image_start, image_end = ([] for _ in range(6))
    images, image_index, rets = [], [], []
    for documents in samples:
        shown: list[object] = []  # pictures of the document before
        first, known = len(images), {}  # known: id of a reference -> its number in the batch
        for document in documents:
            same = len(shown) == len(document.images) and all(
                a is b for a, b in zip(shown, document.images, strict=True)
            )
            if not (same and shown):
                shown, first = document.images, len(images)
                for number, reference in enumerate(shown):
                    known[id(reference)] = len(images)
                    images.append(reference)
                    image_index.append(number)
            offset, n = len(tokens), len(document.ids)
            tokens += document.ids
            targets += [
                token if learned else IGNORE
                for token, learned in zip(document.ids[1:], document.learn[1:], strict=True)
            ] + [IGNORE]
            positions += range(n)
            text_start += [offset] * n
            seen = 0
            for token in document.ids:
                seen += token == image_id
                start, end = visible_interval(visible_images, seen, first)
                image_start.append(start)
                image_end.append(end)
            rets += [(offset + place, reference) for place, reference in document.rets]
        for i, (place, reference) in enumerate(rets):
            if not isinstance(reference, int):
                if id(reference) not in known:
                    known[id(reference)] = len(images)
                    images.append(reference)
                    image_index.append(0)
                rets[i] = (place, known[id(reference)])
    if not images:
        images, image_index = [np.full((image_size, image_size, 3), 127, np.uint8)], [0]
    n_rets, rets = len(rets), rets or [(0, 0)]
    targets, start, end = (np.array(x) for x in (targets, image_start, image_end))
    first_token = np.array(text_start)
    return Batch(
        tokens=torch.tensor(tokens),
        targets=torch.from_numpy(targets),
        target_rows=torch.from_numpy(np.flatnonzero(targets != IGNORE)),
        positions=torch.tensor(positions, dtype=torch.int32),
        text_start=torch.from_numpy(first_token).int(),
        image_start=torch.from_numpy(start).int(),
        image_end=torch.from_numpy(end).int(),
        images=torch.stack([pixels(image, image_size) for image in images]),
        image_index=torch.tensor(image_index),
        ret_token=torch.tensor([place for place, _ in rets]),
        text_hints=attention_hints(first_token, np.arange(len(tokens)) + 1),
        image_hints=attention_hints(start * tokens_per_image, end * tokens_per_image),
        ret_image=torch.tensor([image for _, image in rets]),
        n_rets=n_rets,
        n_samples=len(samples),
    )


def pixels(reference: object, size: int) -> Tensor:
    """A picture's reference -> uint8 (3, size, size)."""
    if isinstance(reference, np.ndarray):
        return torch.tensor(reference).permute(2, 0, 1)
    return preprocess(reference if hasattr(reference, "mode") else open_image(reference), size)


# ------------------------------------------------------------------------------------ sources


class DrawnWorld:
    """Endless samples of the drawn world; sample i is scene i of the seed, drawn when asked for.

    stage "pretrain": a picture's caption, a phrase of it grounded with a box, and the search for
    it. stage "instruct": a conversation about one picture, or a comparison of two, or a request
    that is answered with a picture.
    """

    def __init__(self, stage: str, size: int, seed: int, split: str = "train"):
        self.make = {"pretrain": self.pretrain, "instruct": self.instruct}[stage]
        self.size, self.split = size, split
        self.seed = seed * 2**40 + (0 if stage == "pretrain" else 2**39)

    def __getitem__(self, index: int) -> list[Document]:
        seed = self.seed + index
        return self.make(seed, random.Random(seed))

    def picture(self, scene: world.Scene) -> np.ndarray:
        return np.asarray(world.draw(scene, self.size))

    def pretrain(self, seed: int, rng: random.Random) -> list[Document]:
        scene = world.make_scene(seed, self.split)
        picture = self.picture(scene)
        caption, search = caption_documents(picture, world.caption(scene, rng))
        grounded, _ = caption_documents(picture, world.grounded_phrase(scene, rng))
        return [caption, grounded, search]

    def instruct(self, seed: int, rng: random.Random) -> list[Document]:
        scene = world.make_scene(seed, self.split)
        picture, kind = self.picture(scene), rng.random()
        if kind < 0.15:  # two pictures, interleaved
            near = rng.random() < 0.7
            other = world.edited(scene, rng) if near else world.make_scene(-seed, self.split)
            asked = [world.compare(scene, other, rng) for _ in range(4)]
            turns = [([], q.question, q.answer) for q in asked]
            turns[0] = ([picture, self.picture(other)], *turns[0][1:])
            return [chat_document(turns)]
        turns = [([], q.question, q.answer) for q in world.questions(scene, rng, 8)]
        if kind < 0.4:  # answered with a picture, which is then talked about
            turns.insert(0, ([], world.request(scene, rng), Ret(picture)))
        else:
            turns[0] = ([picture], *turns[0][1:])
        return [chat_document(turns)]


class Pairs:
    """A folder of `name.jpg` + `name.txt`, endlessly, each epoch in an order of its own."""

    def __init__(self, pairs: list[tuple], seed: int):
        self.pairs, self.seed = pairs, seed

    def __getitem__(self, index: int) -> list[Document]:
        epoch, place = divmod(index, len(self.pairs))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))
        path, caption = self.pairs[order[place]]
        picture = open_image(path)
        question = chat_document([([picture], "What is in the picture?", caption)])
        return [*caption_documents(picture, caption), question]


# ------------------------------------------------------------------------------------- loading


class Samples(Dataset):
    """Source and tokenizer behind torch's Dataset; a sample that cannot be read becomes None."""

    def __init__(self, source, tokenizer: Tokenizer, max_seq_len: int):
        self.source, self.tokenizer, self.max_seq_len = source, tokenizer, max_seq_len

    def __getitem__(self, index: int) -> list[Encoded] | None:
        try:
            documents = [encode(d, self.tokenizer) for d in self.source[index]]
        except ValueError:  # a picture that cannot be read
            return None
        return None if max(len(d.ids) for d in documents) > self.max_seq_len else documents


def sample_numbers(
    first: int, n_steps: int, *, batch_size: int, accum: int, rank: int, world_size: int
) -> Iterator[list[int]]:
    """The sample numbers of this rank's micro-batches, `accum` of them a step.

    Step s takes samples [first + s * batch_size, ...); its micro-batches take equal slices in
    turn, and within one the ranks do. So the same samples make up step s on any number of ranks.

    >>> list(sample_numbers(0, 1, batch_size=8, accum=2, rank=1, world_size=2))
    [[2, 3], [6, 7]]
    """
    n = batch_size // (accum * world_size)
    for step in range(n_steps):
        for micro in range(accum):
            start = first + step * batch_size + micro * n * world_size + rank * n
            yield list(range(start, start + n))


def loader(
    source, tokenizer: Tokenizer, model_config, numbers: Iterator[list[int]], workers: int
) -> DataLoader:
    """Micro-batches of the given sample numbers, in their order, drawn ahead by `workers`."""
    decoder = model_config.decoder

    def merge(samples: list[list[Encoded] | None]) -> Batch:
        return collate(
            [s for s in samples if s is not None],
            image_id=tokenizer.image_id,
            visible_images=decoder.visible_images,
            image_size=model_config.vision.image_size,
            tokens_per_image=model_config.tokens_per_image,
        )

    return DataLoader(
        Samples(source, tokenizer, decoder.max_seq_len),
        batch_sampler=numbers,
        collate_fn=merge,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
    )
