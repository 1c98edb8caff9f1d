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
    images       the red cat, what comes next    shown 0 1    the <ret> asks for picture 0

Labels come from the segments while they are tokenized; nothing is searched for afterwards. Here,
and only here, is decided which pictures a word sees (`visible_interval`).
"""

import random
import signal
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import world
from formats import Document, Image, Ret, Text, caption_documents
from kernels import IGNORE, AttentionHints, attention_hints
from tokenizer import Tokenizer, answer_pieces, question_pieces
from vision import PictureError, open_image, preprocess

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
    out, before = Encoded([tokenizer.bos_id], [False], [], []), Text("")
    for segment in document:
        if isinstance(segment, Image):
            ids, learn = tokenizer.image_ids(behind_image=isinstance(before, Image)), False
            out.images.append(segment.reference)
        elif isinstance(segment, Ret):
            ids, learn = [tokenizer.ret_id], segment.learn
            out.rets.append((len(out.ids), segment.reference))
        elif segment.special:
            ids, learn = [tokenizer.special_id(segment.string)], segment.learn
        else:
            behind_special = not isinstance(before, Text) or before.special
            ids, learn = tokenizer.encode(segment.string, behind_special), segment.learn
        before = segment
        out.ids += ids
        out.learn += [learn] * len(ids)
    if end:
        out.ids.append(tokenizer.eos_id)
        out.learn.append(out.learn[-1])
    return out


def chat_document(turns: list[tuple[list, str, str | Ret | None]], chat: str = "nanovilla"
                  ) -> Document:
    """Turns of (pictures shown, question, answer) -> a document in a chat template.

    An answer is words, a Ret (the model answers with that picture, which then stands in the text
    and can be asked about), or None: the model is to answer now.
    """
    document: Document = []
    for pictures, question, answer in turns:
        shown = iter(pictures)
        document += [Image(next(shown)) if piece.text == "<image>" and piece.special
                     else Text(*piece) for piece in
                     question_pieces(question, chat, len(pictures), first=not document)]
        if isinstance(answer, Ret):
            document += [replace(answer, learn=True), Image(answer.reference)]
            answer = ""
        if answer is not None:
            document += [Text(*piece) for piece in answer_pieces(answer, chat)]
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
    shown: Tensor
    image_index: Tensor
    ret_token: Tensor
    text_hints: AttentionHints
    image_hints: AttentionHints
    ret_image: Tensor  # (R,) int64, the row of `images` that the <ret> of ret_token asks for
    image_key: Tensor  # (U,) int64, equal for equal pictures: none is its twin's negative
    n_rets: int  # how many of the R are real: without any, one stands in for FSDP's sake
    n_samples: int
    dropped: tuple[str, ...] = ()  # why samples are missing

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

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; the DataLoader calls it when it is to pin."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.pin_memory() for name, value in values.items()
                                if isinstance(value, Tensor)})


def visible_interval(rule: str, n_before: np.ndarray, first: int, n_ended: np.ndarray | int = 0
                     ) -> tuple[np.ndarray, np.ndarray]:
    """Which pictures [start, end) the words of a document see.

    n_before (n,): how many of the document's pictures stand before each word or at it, for a word
    sees a picture from the picture's own <image> on; first: the batch's number of the first one;
    n_ended: how many of them stand before the last </s>, behind which they are out of sight.

    >>> visible_interval("all", np.array([0, 1, 2]), first=5)
    (array([5, 5, 5]), array([5, 6, 7]))
    >>> visible_interval("latest", np.array([0, 1, 2]), first=5)
    (array([5, 5, 6]), array([5, 6, 7]))
    """
    start = n_before - 1 if rule == "latest" else np.zeros_like(n_before)
    return first + np.maximum(start, n_ended), first + n_before


def collate(
    samples: list[list[Encoded]],
    *,
    image_id: int,
    visible_images: str,
    image_size: int,
    tokens_per_image: int,
    eos_id: int = -1,
    resize: str = "crop",
    rgb: str = "white",
) -> Batch:
    """Lay the documents of all samples end to end. Nothing is padded.

    A picture is encoded once however many documents of its sample show it or ask for it. A batch
    without a picture gets a grey one that nobody sees, one without a sample a token that nobody
    learns, so that every rank runs the same layers.
    """
    n_samples, samples = len(samples), samples or [[Encoded([0], [False], [], [])]]
    images, shown, image_index, rets, columns, offset = [], [], [], [], [], 0
    for documents in samples:
        numbers: dict[int, int] = {}  # id of a reference of this sample -> its row of images

        def number(reference: object, numbers=numbers) -> int:
            if id(reference) not in numbers:
                numbers[id(reference)] = len(images)
                images.append(reference)
            return numbers[id(reference)]

        for document in documents:
            ids, learn = np.array(document.ids), np.array(document.learn)
            n, n_before = len(ids), np.cumsum(ids == image_id)
            targets = np.full(n, IGNORE)
            targets[:-1] = np.where(learn[1:], ids[1:], IGNORE)
            ended = np.zeros(n, bool)
            ended[1:] = ids[:-1] == eos_id
            n_ended = np.maximum.accumulate(np.where(ended, n_before - (ids == image_id), 0))
            start, end = visible_interval(visible_images, n_before, len(shown), n_ended)
            columns.append((ids, targets, np.arange(n), np.full(n, offset), start, end))
            shown += map(number, document.images)
            image_index += range(len(document.images))
            rets += [(offset + place, number(reference)) for place, reference in document.rets]
            offset += n
    if not images:
        images.append(np.full((image_size, image_size, 3), 127, np.uint8))
    if not shown:
        shown, image_index = [0], [0]
    ids, targets, positions, text_start, start, end = map(
        np.concatenate, zip(*columns, strict=True))
    n_rets, rets = len(rets), rets or [(0, 0)]
    ret_token, ret_image = zip(*rets, strict=True)
    pictures = torch.stack([pixels(image, image_size, resize, rgb) for image in images])
    return Batch(
        tokens=torch.from_numpy(ids),
        targets=torch.from_numpy(targets),
        target_rows=torch.from_numpy(np.flatnonzero(targets != IGNORE)),
        positions=torch.from_numpy(positions).int(),
        text_start=torch.from_numpy(text_start).int(),
        image_start=torch.from_numpy(start).int(),
        image_end=torch.from_numpy(end).int(),
        images=pictures,
        shown=torch.tensor(shown),
        image_index=torch.tensor(image_index),
        ret_token=torch.tensor(ret_token),
        text_hints=attention_hints(text_start, np.arange(offset) + 1),
        image_hints=attention_hints(start * tokens_per_image, end * tokens_per_image),
        ret_image=torch.tensor(ret_image),
        image_key=torch.tensor([zlib.crc32(picture.numpy().tobytes()) for picture in pictures]),
        n_rets=n_rets,
        n_samples=n_samples,
    )


def prompts(documents: list[Document], tokenizer: Tokenizer, model_config, device: torch.device
            ) -> Batch:
    """Documents that a model of this config is to go on with, one sample each."""
    samples = [[encode(document, tokenizer, end=False)] for document in documents]
    return collate(samples, **collate_options(tokenizer, model_config)).to(device)


def collate_options(tokenizer: Tokenizer, model_config) -> dict:
    """What `collate` has to know of a model and its tokenizer."""
    vision = model_config.vision
    return dict(image_id=tokenizer.image_id, visible_images=model_config.decoder.visible_images,
                tokens_per_image=model_config.tokens_per_image, eos_id=tokenizer.eos_id,
                image_size=vision.image_size, resize=vision.resize, rgb=vision.rgb)


def pixels(reference: object, size: int, resize: str = "crop", rgb: str = "white") -> Tensor:
    """A picture's reference -> uint8 (3, size, size); an array is one already, by its rows."""
    if isinstance(reference, np.ndarray):
        return torch.tensor(reference).permute(2, 0, 1)
    image = reference if hasattr(reference, "mode") else open_image(reference, rgb=False)
    return preprocess(image, size, resize, rgb)


# ------------------------------------------------------------------------------------ sources


# How often each kind of question is asked. A box is thirty tokens long and its last digits cannot
# be known: asked too often, it would drown the one-word answers in the loss.
SHARES = {"what": 4, "colour": 4, "yes/no": 6, "how many": 5, "where": 5, "box": 2, "find": 1.5,
          "caption": 0.5}


class DrawnWorld:
    """Endless samples of the drawn world; sample i is scene i of the seed, drawn when asked for.

    stage "pretrain": short captions of a picture's things, now and then a whole caption, the
    search for it, a phrase grounded with a box. stage "instruct": conversations of one to eight
    turns about one picture, or about two to compare, or about one that was asked for.
    """

    def __init__(self, stage: str, size: int, seed: int, split: str = "train",
                 chat: str = "nanovilla", has_ret: bool = True):
        self.make = {"pretrain": self.pretrain, "instruct": self.instruct}[stage]
        self.size, self.split, self.chat, self.has_ret = size, split, chat, has_ret
        self.seed = seed * 2**40 + (0 if stage == "pretrain" else 2**39)

    def __getitem__(self, index: int) -> list[Document]:
        seed = self.seed + index
        return self.make(seed, random.Random(seed))

    def name(self, index: int) -> str:
        return f"scene {self.seed + index}"

    def picture(self, scene: world.Scene) -> np.ndarray:
        return np.asarray(world.draw(scene, self.size))

    def pretrain(self, seed: int, rng: random.Random) -> list[Document]:
        scene = world.make_scene(seed, self.split)
        picture = self.picture(scene)
        said = [caption_documents(picture, words)[0] for words in short_captions(scene, rng)]
        caption, search = caption_documents(picture, world.caption(scene, rng))
        phrase, _ = caption_documents(picture, world.grounded_phrase(scene, rng))
        rare = [(caption, 0.2), (search, 0.5), (phrase, 0.25)]
        return said + [document for document, share in rare if rng.random() < share]

    def questions(self, scene: world.Scene, rng: random.Random, n: int) -> list[world.Question]:
        """n questions of kinds drawn by SHARES."""
        asked: list[world.Question] = []
        while len(asked) < n:
            kinds = rng.choices(tuple(SHARES), tuple(SHARES.values()), k=n - len(asked))
            asked += filter(None, (world.ask(kind, scene, rng) for kind in kinds))
        return asked

    def instruct(self, seed: int, rng: random.Random) -> list[Document]:
        scene = world.make_scene(seed, self.split)
        picture, kind = self.picture(scene), rng.random()
        if kind < 0.25:  # two pictures, interleaved
            near = rng.random() < 0.7
            other = world.edited(scene, rng) if near else world.make_scene(seed + 2**60, self.split)
            pictures = [picture, self.picture(other)]
            asked = [world.compare(scene, other, rng) for _ in range(6)]
        else:
            pictures, asked = [picture], self.questions(scene, rng, 8)
        turns = [([], q.question, q.answer) for q in asked]
        if 0.25 <= kind < 0.45 and self.has_ret:  # a picture is the answer, then talked about
            request = ([], world.request(scene, rng), Ret(picture))
            return [chat_document([request, *turns], self.chat)]
        return conversations(pictures, turns, rng, self.chat)


def short_captions(scene: world.Scene, rng: random.Random) -> list[str]:
    """One fact each: every thing twice, the second time from its kind, and one count.

    What a caption names first is what the model has to look *for* to say the rest. "A red cat at
    the top" can be learned by looking for red alone; after it, half of all questions stay guesses.
    Short documents matter as much: in a long one, the word to look for is one among many (LOG.md).
    """
    captions = []
    for t in scene.things:
        at = world.at(t.place)
        said = rng.choice((t.name, t.name, f"{t.size} {t.kind}"))
        from_place = f"{at} {world.a(said)}."
        from_colour = f"the {t.colour} thing is {rng.choice((f'{world.a(t.kind)} {at}', at))}."
        captions.append(rng.choice((from_place, from_colour)))
        rest = rng.choice((f"{t.colour}, {at}", f"{at}, {t.colour}") * 3 + (f"{t.size}, {at}",) * 2)
        captions.append(f"the {t.kind} is {rest}.")
    return [*captions, count_caption(scene, rng)]


def count_caption(scene: world.Scene, rng: random.Random) -> str:
    """"cats: 2.", "red things: 1." or "red cats: 0.", most often of what is there."""
    t = rng.choice(scene.things)
    kind = t.kind if rng.random() < 0.65 else rng.choice(tuple(world.KINDS))
    colour = t.colour if rng.random() < 0.65 else rng.choice(tuple(world.COLOURS))
    form = rng.choice(("kind", "kind", "colour", "name"))
    if form == "name" and (colour, kind) in world.NEW_COMBINATIONS:  # not even denied in training
        form = "kind"
    words = {"kind": world.plural(kind), "colour": f"{colour} things",
             "name": f"{colour} {world.plural(kind)}"}
    value = {"kind": kind, "colour": colour, "name": f"{colour} {kind}"}[form]
    return f"{words[form]}: {sum(getattr(thing, form) == value for thing in scene.things)}."


def conversations(pictures: list, turns: list[tuple], rng: random.Random, chat: str
                  ) -> list[Document]:
    """Turns about the same pictures -> conversations of one, two, three or all turns."""
    documents = []
    while turns:
        n = rng.choice((1, 1, 1, 2, 3, len(turns)))
        (_, question, answer), *more = turns[:n]
        documents.append(chat_document([(pictures, question, answer), *more], chat))
        turns = turns[n:]
    return documents


class Pairs:
    """A folder of `name.jpg` + `name.txt`, endlessly, each epoch in an order of its own."""

    def __init__(self, pairs: list[tuple], seed: int, chat: str = "nanovilla"):
        self.pairs, self.seed, self.chat = pairs, seed, chat

    def pair(self, index: int) -> tuple:
        epoch, place = divmod(index, len(self.pairs))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))
        return self.pairs[order[place]]

    def name(self, index: int) -> str:
        return str(self.pair(index)[0])

    def __getitem__(self, index: int) -> list[Document]:
        path, caption = self.pair(index)
        picture = open_image(path, rgb=False)
        question = chat_document([([picture], "What is in the picture?", caption)], self.chat)
        return [*caption_documents(picture, caption), question]


def example_pictures(source, size: int, n: int) -> Tensor:
    """A picture of each of the first n samples of a source, uint8 (at most n, 3, size, size).

    PictureError if none of them can be read.
    """
    pictures: list[Tensor] = []
    for index in range(n):
        try:
            segments = [segment for document in source[index] for segment in document]
            shown = next(s.reference for s in segments if isinstance(s, Image | Ret))
            pictures.append(pixels(shown, size))
        except PictureError as error:
            reason = str(error)
    if not pictures:
        raise PictureError(f"none of the first {n} pictures can be read: {reason}")
    return torch.stack(pictures)


# ------------------------------------------------------------------------------------- loading


class Samples(Dataset):
    """Source and tokenizer behind torch's Dataset. A sample that cannot be used is its reason."""

    def __init__(self, source, tokenizer: Tokenizer, decoder):
        self.source, self.tokenizer = source, tokenizer
        self.max_seq_len, self.max_images = decoder.max_seq_len, decoder.max_images

    def __getitem__(self, index: int) -> list[Encoded] | str:
        try:
            has_ret = self.tokenizer.ret_id is not None  # a published vocabulary may have none
            documents = [encode(d, self.tokenizer) for d in self.source[index]
                         if has_ret or not any(isinstance(s, Ret) for s in d)]
        except PictureError as error:
            return str(error)
        longest = max(len(d.ids) for d in documents)
        if longest > self.max_seq_len:
            return (f"{self.source.name(index)}: a document of {longest} tokens, longer than "
                    f"max_seq_len {self.max_seq_len}")
        most = max(len(d.images) for d in documents)
        if self.max_images and most > self.max_images:
            return (f"{self.source.name(index)}: a document of {most} pictures, more than "
                    f"max_images {self.max_images}")
        return documents


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
    return DataLoader(
        Samples(source, tokenizer, model_config.decoder),
        batch_sampler=numbers,
        collate_fn=partial(merge, **collate_options(tokenizer, model_config)),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_signals_to_parent,
    )


def merge(samples: list[list[Encoded] | str], **options) -> Batch:
    """`collate` of the samples that can be used, and why the others cannot."""
    batch = collate([s for s in samples if not isinstance(s, str)], **options)
    return replace(batch, dropped=tuple(s for s in samples if isinstance(s, str)))


def leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the parent decides when the workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
