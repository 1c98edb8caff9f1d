"""Data: from documents to ragged batches, in an order that one integer describes.

Read after model.py. The way of a sample:

    a number       sample n of the run: the same whatever the number of ranks or workers
    documents      a *source* turns it into documents (sources.py, drawn.py)
    tokens         `encode`: ids, which of them are learned, where the pictures stand
    pixels         augment.py: cropped and resized, uint8
    a micro-batch  `collate`: samples laid end to end, nothing padded, nothing cut

    tokens       <s> <image> a  red cat </s> <s>  a  red cat <ret> </s> <s> <image> ...
    targets       -    a    red cat </s>  -   -   -   -    -    -    -   -   -
    positions     0    1    2   3   4    5    0   1   2    3   4    5    0   1
    text_start    0    0    0   0   0    0    6   6   6    6   6    6    12  12
    image_start   0    0    0   0   0    0    1   1   1    1   1    1    1   1
    image_end     0    1    1   1   1    1    1   1   1    1   1    1    1   2
    images       the red cat, what comes next    shown 0 1    the <ret> asks for picture 0

Labels come from the segments while they are tokenized; nothing is searched for afterwards. Here,
and only here, is decided which pictures a word sees (`visible_interval`). A bad sample is dropped
without a replacement, and the reason counted (tally.py).

    python data.py check 'shards/{00000..00331}.tar'   the shard doctor: what is there, what is bad
    python data.py show photos/                        documents as the model sees them
"""

import installed  # noqa: F401

import signal
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from queue import Full, Queue
from threading import Event, Thread

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from augment import Augment, Picture, boxes_as_seen, holds_box, jitter, load_picture
from cli import run_main
from documents import Document, Image, Ret, Text, is_page, without_last
from kernels import IGNORE, AttentionHints, attention_hints
from records import BadRecord, hash_of
from tally import Origin
from tokenizer import Tokenizer
from vision import NO_PICTURE, PictureError, open_image, preprocess

# ------------------------------------------------------------------------------- one document


@dataclass
class Encoded:
    """One tokenized document."""

    ids: list[int]
    learn: list[bool]
    images: list[object]  # references of the pictures shown, in order
    rets: list[tuple[int, object]]  # (place of <ret>, the picture it asks for)


def encode(document: Document, tokenizer: Tokenizer, end: bool = True) -> Encoded:
    """Tokenize a document: <s>, its segments and, unless this is a prompt, </s>.

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
    image_key: Tensor  # (U,) int64, equal for equal pictures, which are never each other's
    # negatives; NO_PICTURE (the grey stand-in) is nobody's negative
    n_rets: int  # how many of the R are real: without any, one stands in for FSDP's sake
    n_samples: int
    jitter: Tensor | None = None  # (U, 3) factors, see augment.py
    origins: tuple[Origin, ...] = ()  # of all its samples, also of those that are missing

    @property
    def dropped(self) -> tuple[str, ...]:
        """Why samples are missing, one line for each."""
        return tuple(origin.line for origin in self.origins if origin.reason)

    @property
    def data_hash(self) -> int:
        """A number for the samples in it, whatever their order: equal data, equal sums."""
        return sum(hash_of(origin.key) for origin in self.origins if not origin.reason)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device, where its pictures are jittered.

        Copies overlap with work if memory is pinned.
        """
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, AttentionHints)):
                value = value.to(device) if field.name.endswith("hints") else value.to(
                    device, non_blocking=True)
            moved[field.name] = value
        if self.jitter is not None:
            moved |= dict(images=jitter(moved["images"], moved["jitter"]), jitter=None)
        return Batch(**moved)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; the DataLoader calls it when it is to pin."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.pin_memory() for name, value in values.items()
                                if isinstance(value, Tensor)})


def visible_interval(rule: str, n_before: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Which pictures [start, end) the words of a document see.

    n_before (n,): how many of the document's pictures stand before each word or at it, for a word
    sees a picture from the picture's own <image> on; first: the batch's number of the first one.

    >>> visible_interval("all", np.array([0, 1, 2]), first=5)
    (array([5, 5, 5]), array([5, 6, 7]))
    >>> visible_interval("latest", np.array([0, 1, 2]), first=5)
    (array([5, 5, 6]), array([5, 6, 7]))
    """
    start = np.maximum(n_before - 1, 0) if rule == "latest" else np.zeros_like(n_before)
    return first + start, first + n_before


def columns_of(document: Encoded, offset: int, first_image: int, image_id: int, rule: str
               ) -> tuple[np.ndarray, ...]:
    """tokens, targets, positions, text_start, image_start and image_end of a document, (n,) each.

    offset, first_image: how many tokens and pictures its batch holds before it.
    """
    ids, learn = np.array(document.ids), np.array(document.learn)
    n, targets = len(ids), np.full(len(ids), IGNORE)
    targets[:-1] = np.where(learn[1:], ids[1:], IGNORE)
    start, end = visible_interval(rule, np.cumsum(ids == image_id), first_image)
    return ids, targets, np.arange(n), np.full(n, offset), start, end


def collate(
    samples: list[list[Encoded]],
    *,
    image_id: int,
    visible_images: str,
    image_size: int,
    tokens_per_image: int,
    resize: str = "crop",
    rgb: str = "white",
) -> Batch:
    """Lay the documents of all samples end to end. Nothing is padded.

    A picture is encoded once however many documents of its sample show it or ask for it. A batch
    without pictures, words or searches gets stand-ins for them: every rank must run every layer, or
    FSDP waits forever.
    """
    n_samples, samples = len(samples), samples or [[Encoded([0], [False], [], [])]]  # not learned
    images, shown, image_index, rets, columns, offset = [], [], [], [], [], 0
    for documents in samples:
        rows: dict[int, int] = {}  # id of a reference of this sample -> its row of images
        for document in documents:
            columns.append(columns_of(document, offset, len(shown), image_id, visible_images))
            for reference in (*document.images, *(reference for _, reference in document.rets)):
                if id(reference) not in rows:
                    rows[id(reference)] = len(images)
                    images.append(reference)
            shown += [rows[id(reference)] for reference in document.images]
            image_index += range(len(document.images))
            rets += [(offset + place, rows[id(reference)]) for place, reference in document.rets]
            offset += len(document.ids)
    if stands_in := not images:
        images.append(np.full((image_size, image_size, 3), 127, np.uint8))
    if not shown:
        shown, image_index = [0], [0]  # seen by nobody
    ids, targets, positions, text_start, start, end = map(
        np.concatenate, zip(*columns, strict=True))
    n_rets, rets = len(rets), rets or [(0, 0)]  # weighs nothing
    ret_token, ret_image = zip(*rets, strict=True)
    pictures = torch.stack([pixels(image, image_size, resize, rgb) for image in images])
    factors = torch.tensor([getattr(image, "factors", (1.0, 1.0, 1.0)) for image in images])
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
        image_key=torch.tensor([NO_PICTURE] if stands_in else [
            getattr(image, "key", None) or zlib.crc32(decoded.numpy().tobytes())
            for image, decoded in zip(images, pictures, strict=True)]),
        n_rets=n_rets,
        n_samples=n_samples,
        jitter=factors if bool((factors != 1).any()) else None,
    )


def prompts(documents: list[Document], tokenizer: Tokenizer, model_config, device: torch.device
            ) -> Batch:
    """Documents that a model of this config is to continue, one sample each."""
    samples = [[encode(document, tokenizer, end=False)] for document in documents]
    return collate(samples, **collate_options(tokenizer, model_config)).to(device)


def collate_options(tokenizer: Tokenizer, model_config) -> dict:
    """What `collate` has to know of a model and its tokenizer."""
    vision = model_config.vision
    return dict(image_id=tokenizer.image_id, visible_images=model_config.decoder.visible_images,
                tokens_per_image=model_config.tokens_per_image, image_size=vision.image_size,
                resize=vision.resize, rgb=vision.rgb)


def pixels(reference: object, size: int, resize: str = "crop", rgb: str = "white") -> Tensor:
    """A picture's reference -> uint8 (3, size, size); an array is one already, by its rows."""
    if isinstance(reference, Picture):
        return reference.pixels
    if isinstance(reference, np.ndarray):
        return torch.tensor(reference).permute(2, 0, 1)  # (3, h, w)
    image = reference if hasattr(reference, "mode") else open_image(reference, rgb=False)
    return preprocess(image, size, resize, rgb)


# ------------------------------------------------------------------------------------- loading


class Samples(Dataset):
    """Source, tokenizer and augmentation as a torch Dataset: sample n -> its documents.

    augment None: pictures as evaluation takes them. A sample that cannot be used has none.
    """

    def __init__(self, source, tokenizer: Tokenizer, model_config, augment: Augment | None = None):
        self.source, self.tokenizer, self.augment = source, tokenizer, augment
        self.decoder, vision = model_config.decoder, model_config.vision
        self.picture_rule = vision.image_size, vision.resize, vision.rgb

    def __getitem__(self, index: int) -> tuple[Origin, list[Encoded]]:
        origin = None
        try:
            sample = self.source.at(index)
            origin = Origin(sample.file, sample.key)
            return origin, self.prepare(sample)
        except (BadRecord, PictureError) as error:
            known = getattr(error, "key", "") or str(index)
            origin = origin or Origin(self.source.file(index), known)
            line = (str(error) if isinstance(error, PictureError)
                    else f"{origin.file} {origin.key}: {error.details}")
            return replace(origin, reason=error.reason, line=line), []

    def prepare(self, sample) -> list[Encoded]:
        rng = sample.rng if self.augment and not holds_box(sample.documents) else None
        return self.load_pictures(self.encode_all(sample.documents), rng)

    def encode_all(self, documents: list[Document]) -> list[Encoded]:
        size, resize, _ = self.picture_rule
        if resize == "crop":
            documents = boxes_as_seen(documents, size)
        has_ret = self.tokenizer.ret_id is not None  # a published vocabulary may have none
        return [self.shortened(document) for document in documents
                if has_ret or not any(isinstance(segment, Ret) for segment in document)]

    def shortened(self, document: Document) -> Encoded:
        """A document's tokens, if it is too long as many as fit: of a page the first ones, of a
        conversation whole turns."""
        encoded, limit = encode(document, self.tokenizer), self.decoder.max_seq_len
        n, page = len(encoded.ids), is_page(document)
        while encoded and len(encoded.ids) > limit:
            if page:
                encoded = truncated(encoded, limit, self.tokenizer.image_id)
            else:
                document = without_last(document)
                encoded = encode(document, self.tokenizer) if document else None
        if not encoded:
            raise BadRecord("too long", f"a document of {n} tokens, longer than max_seq_len "
                                        f"{limit}")
        n, most = len(encoded.images), self.decoder.max_images
        if most and n > most:
            raise BadRecord("too many pictures", f"a document of {n} pictures, more than "
                                                 f"max_images {most}")
        return encoded

    def load_pictures(self, documents: list[Encoded], rng) -> list[Encoded]:
        """References of pictures -> the pictures, each read once."""
        read: dict[int, object] = {}

        def picture(reference: object) -> object:
            if id(reference) not in read:
                try:
                    read[id(reference)] = load_picture(reference, *self.picture_rule,
                                                       self.augment, rng)
                except PictureError as error:
                    if isinstance(reference, bytes):  # then its sample is all that names it
                        raise BadRecord(error.reason, str(error)) from None
                    raise
            return read[id(reference)]

        return [replace(document, images=[picture(image) for image in document.images],
                        rets=[(place, picture(image)) for place, image in document.rets])
                for document in documents]


def truncated(encoded: Encoded, limit: int, image_id: int) -> Encoded | None:
    """The first `limit` tokens, without </s>; of a search, its first words and its <ret> </s>.

    None: no picture is among them, or nothing that is learned.
    """
    if not encoded.images:
        ((_, reference),) = encoded.rets
        return Encoded(encoded.ids[: limit - 2] + encoded.ids[-2:],
                       encoded.learn[: limit - 2] + encoded.learn[-2:], [],
                       [(limit - 2, reference)])
    ids, learn = encoded.ids[:limit], encoded.learn[:limit]
    shown = encoded.images[: ids.count(image_id)]
    rets = [(place, reference) for place, reference in encoded.rets if place < limit]
    return Encoded(ids, learn, shown, rets) if shown and any(learn) else None


def sample_numbers(
    first: int, n_steps: int, *, batch_size: int, grad_accum_steps: int, rank: int, world_size: int
) -> Iterator[list[int]]:
    """The sample numbers of this rank's micro-batches, `grad_accum_steps` of them a step.

    Step s takes samples [first + s * batch_size, ...); its micro-batches take equal slices in
    turn, and within one the ranks do. So the same samples make up step s on any number of ranks. A
    run that is resumed at a step of its stage has `first` = step * batch_size: there is no other
    state of the data, since the seed and --batch-size of a run cannot change.

    >>> list(sample_numbers(0, 1, batch_size=8, grad_accum_steps=2, rank=1, world_size=2))
    [[2, 3], [6, 7]]
    """
    n = batch_size // (grad_accum_steps * world_size)
    for step in range(n_steps):
        for micro in range(grad_accum_steps):
            start = first + step * batch_size + micro * n * world_size + rank * n
            yield list(range(start, start + n))


def loader(
    source, tokenizer: Tokenizer, model_config, numbers: Iterator[list[int]], workers: int,
    augment: Augment | None = None,
) -> DataLoader:
    """Micro-batches of the given sample numbers, in their order, drawn ahead by `workers`."""
    return DataLoader(
        Samples(source, tokenizer, model_config, augment),
        batch_sampler=numbers,
        collate_fn=partial(merge, **collate_options(tokenizer, model_config)),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_signals_to_parent,
    )


def ahead(batches: DataLoader) -> Iterator[Batch]:
    """The same batches, fetched two ahead by a thread, so that unpickling them overlaps with the
    step (waiting 6.9 % of the time became 1.4 %, LOG.md)."""
    if not batches.num_workers:
        yield from batches
        return
    fetched, closed = Queue(2), Event()

    def put(item: object) -> None:
        while not closed.is_set():
            with suppress(Full):
                return fetched.put(item, timeout=0.1)

    def take() -> None:
        try:
            for batch in batches:
                put(batch)
                if closed.is_set():
                    return
            put(None)
        except BaseException as error:  # re-raised in the consumer by get()
            put(error)

    def get() -> Batch | None:
        if isinstance(item := fetched.get(), BaseException):
            raise item
        return item

    thread = Thread(target=take, daemon=True)
    thread.start()
    try:
        yield from iter(get, None)
    finally:
        closed.set()
        thread.join()


def merge(samples: list[tuple[Origin, list[Encoded]]], **options) -> Batch:
    """`collate` of the samples that can be used, and where all of them come from."""
    batch = collate([documents for origin, documents in samples if not origin.reason], **options)
    return replace(batch, origins=tuple(origin for origin, _ in samples))


def leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the parent decides when the workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


if __name__ == "__main__":
    import doctor

    run_main(doctor.main)
