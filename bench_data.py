"""How fast data arrives: bench.py data.

    one process     images/s of one core: tar shards of 640 x 480 JPEGs to batches of 224 px, with
                    random crops, and webdataset + Pillow + the usual transform
    workers         the same from two worker processes
    index           samples/s while shards are indexed
    first batch     seconds until a set of 330 indexed shards gives one
    waiting         of a consumer that takes batches at 70 % of the loader's rate

webdataset is in no requirements file: where it is not installed, ours is measured without a peer.
The pictures are drawn: smooth shapes and grain, about as many bytes as a photograph has.
"""

import io
import json
import math
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from operator import attrgetter
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from augment import ASPECT, Augment
from data import ahead, loader
from model import DecoderConfig, ModelConfig
from records import write_index
from sources import DataSets
from vision import CLIP_MEAN, CLIP_STD, VisionConfig
from weights import BUILT_IN, read_config, read_tokenizer

BATCH = 64
SMALLEST_CROP = 0.9
WORDS = "a red cat sits on the left and two blue birds are at the top of the picture".split()


def data(seconds: float, waiting_seconds: float = 60.0) -> list[dict]:
    """Measure all of it; `seconds` for each way of each case."""
    torch.set_num_threads(1)  # what is measured is a core
    with tempfile.TemporaryDirectory() as folder:
        photos = write_shards(Path(folder) / "photos", 4, 500, (640, 480))
        many = write_shards(Path(folder) / "many", 330, 20, (64, 48))
        rows = [images(photos, seconds), index(Path(folder) / "flat"), first_batch(many)]
        return [*rows, waiting(photos, rows[0]["ways"]["ours, 2 workers"][1], waiting_seconds)]


# -------------------------------------------------------------------------------- what is read


def write_shards(folder: Path, n_shards: int, n_samples: int, size: tuple[int, int]) -> str:
    """Shards in img2dataset's layout -> their pattern; a few dozen pictures come again."""
    folder.mkdir()
    pictures = [photograph(seed, size) for seed in range(48)]
    rng = Random(0)
    for shard in range(n_shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(n_samples):
                key = f"{shard * 10_000 + i:09d}"
                words = " ".join(rng.sample(WORDS, 10))
                for name, content in ((f"{key}.jpg", rng.choice(pictures)),
                                      (f"{key}.json", json.dumps({"key": key}).encode()),
                                      (f"{key}.txt", words.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return f"{folder}/{{00000..{n_shards - 1:05d}}}.tar"


def photograph(seed: int, size: tuple[int, int]) -> bytes:
    """A JPEG of about a photograph's spectrum: noise of all sizes, the finer the fainter."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((size[1], size[0], 3))
    for octave in range(1, 9):
        shape = (min(3 * 2**octave, size[1]), min(4 * 2**octave, size[0]), 3)
        noise = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
        pixels += np.asarray(noise.resize(size, Image.Resampling.BICUBIC), float) / 1.8**octave
    pixels = 255 * (pixels - pixels.min()) / np.ptp(pixels)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


# ------------------------------------------------------------------------------------ the ways


def ours(pattern: str, workers: int) -> Iterator[Tensor]:
    """Batches of a run's loader, for ever: their pictures."""
    tokenizer = read_tokenizer(BUILT_IN / "tokenizer.model", read_config(BUILT_IN / "config.json"))
    config = ModelConfig(VisionConfig(), DecoderConfig(vocab_size=tokenizer.vocab_size))
    stream = DataSets((pattern,)).stream("train", 0, tokenizer.chat, 0.0)
    numbers = (list(range(BATCH * i, BATCH * (i + 1))) for i in count())
    batches = loader(stream, tokenizer, config, numbers, workers, Augment(SMALLEST_CROP))
    return map(attrgetter("images"), ahead(batches))


def webdataset_and_pillow(pattern: str) -> Iterator[list[Tensor]] | None:
    """The usual: decode all of it, crop, resize bicubically, normalise in fp32. None: no peer."""
    try:
        import webdataset
    except ImportError:
        return None

    def batches() -> Iterator[list[Tensor]]:
        samples = webdataset.WebDataset(pattern, shardshuffle=False).repeat().decode("pil")
        rng = Random(0)
        pairs = samples.to_tuple("jpg", "txt").map_tuple(lambda image: usual(image, rng), str)
        for pictures, _ in pairs.batched(BATCH):
            yield pictures

    return batches()


def usual(image: Image.Image, rng: Random) -> Tensor:
    """A random resized crop and normalisation, as torchvision's transforms do them with Pillow."""
    image = image.convert("RGB")
    area = rng.uniform(SMALLEST_CROP, 1) * image.width * image.height
    aspect = math.exp(rng.uniform(-math.log(ASPECT), math.log(ASPECT)))
    w, h = min(math.sqrt(area * aspect), image.width), min(math.sqrt(area / aspect), image.height)
    x, y = rng.uniform(0, image.width - w), rng.uniform(0, image.height - h)
    crop = image.crop((int(x), int(y), int(x + w), int(y + h)))
    pixels = np.asarray(crop.resize((224, 224), Image.Resampling.BICUBIC))
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous().float() / 255
    return (x - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def rates(batches: Iterator, seconds: float) -> float:
    """Pictures a second, over whole batches."""
    began, n = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        n += len(next(batches))
    return n / (time.perf_counter() - began)


def images(pattern: str, seconds: float, turns: int = 5) -> dict:
    """Pictures a second of each way, in turns; medians, and the share of ours to the peer's."""
    found: dict[str, list[float]] = {}
    peer = webdataset_and_pillow(pattern)
    contestants: dict[str, Callable] = {"ours": lambda: ours(pattern, 0)}
    if peer:
        contestants["webdataset + Pillow"] = lambda: peer
    running = {name: make() for name, make in contestants.items()}
    for batches in running.values():
        next(batches)
    for _ in range(turns):
        for name, batches in running.items():
            found.setdefault(name, []).append(rates(batches, seconds / turns))
    helped = ours(pattern, 2)
    for _ in range(16):
        next(helped)  # what was made ahead
    found["ours, 2 workers"] = [rates(helped, seconds / turns) for _ in range(turns)]
    ways = {name: [min(values), statistics.median(values), max(values)]
            for name, values in found.items()}
    row = {"case": "images/s, 640 x 480 to 224", "ways": ways,
           "workers": ways["ours, 2 workers"][1] / ways["ours"][1]}
    if peer:
        ratios = [a / b for a, b in zip(found["ours"], found["webdataset + Pillow"], strict=True)]
        row["ratio"] = statistics.median(ratios)
    for name, (low, middle, high) in ways.items():
        print(f"{row['case']}: {name:20} {middle:7.0f} ({low:.0f} to {high:.0f})", flush=True)
    print(f"two workers are {row['workers']:.2f} times one process"
          + (f", one process is {row['ratio']:.2f} times webdataset" if peer else ""), flush=True)
    return row


def index(folder: Path, n_samples: int = 10_000) -> dict:
    """Samples a second while one process indexes a shard."""
    write_shards(folder, 1, n_samples, (64, 48))
    began = time.perf_counter()
    write_index(str(folder / "00000.tar"), "", None, 0)
    rate = n_samples / (time.perf_counter() - began)
    print(f"index: {rate:,.0f} samples/s", flush=True)
    return {"case": "index, samples/s", "rate": rate}


def first_batch(pattern: str) -> dict:
    """Seconds from opening 330 indexed shards to the first batch of a worker."""
    DataSets((pattern,))  # indexes them
    began = time.perf_counter()
    next(ours(pattern, 1))
    seconds = time.perf_counter() - began
    print(f"first batch of 330 indexed shards: {seconds:.2f} s", flush=True)
    return {"case": "first batch, 330 shards", "seconds": seconds}


def waiting(pattern: str, rate: float, seconds: float) -> dict:
    """A consumer at 70 % of the loader's rate: which share of its time it waits."""
    batches, waited = ours(pattern, 2), 0.0
    next(batches)
    began = time.perf_counter()
    n_steps = int(seconds * 0.7 * rate / BATCH)
    for _ in range(n_steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        time.sleep(len(batch) / (0.7 * rate))
        del batch  # whose memory is the consumer's to free
    share = waited / (time.perf_counter() - began)
    print(f"waiting at 70 % of the rate, {seconds:.0f} s: {100 * share:.2f} %", flush=True)
    return {"case": "waiting at 70 %", "seconds": seconds, "share": share}
