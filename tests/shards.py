"""Shards as img2dataset writes them, with samples as broken as those of the web.

The layout's rules are those of https://github.com/rom1504/img2dataset, version 1.47: keys with
gaps and out of order, .jpg .json .txt of each sample side by side, mode 0444, bigdata/bigdata, and
a _stats.json beside the shard once it is whole.
"""

import hashlib
import io
import json
import random
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

SIZE = (80, 60)


def photo(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that says that it has 400 million pixels."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def wordy_png() -> bytes:
    about = PngImagePlugin.PngInfo()
    about.add_text("comment", "x" * 2_000_000, zip=True)
    return encoded(photo(0), "PNG", pnginfo=about)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(0), exif=exif)


def with_hole(mode: str) -> Image.Image:
    image = photo(0).convert("RGBA")
    image.putalpha(Image.new("L", SIZE, 90))
    return image.convert(mode) if mode != "P" else image.quantize(16)


# What is wrong with a sample: (jpg, caption, of its json, reason to leave it out or "": mended)
WHOLE = encoded(photo(0))
SPOILED = {
    "cut in the middle": (WHOLE[: len(WHOLE) // 2], b"a cat", {}, "damaged picture"),
    "cut in the header": (WHOLE[:40], b"a cat", {}, "damaged picture"),
    "a page": (b"<!DOCTYPE html><html></html>", b"a cat", {}, "not a picture"),
    "empty file": (b"", b"a cat", {}, "not a picture"),
    "a dot": (encoded(photo(0, (256, 256))), b"a cat", {"original_width": 1, "original_height": 1},
              "tiny original"),
    "a small dot": (encoded(photo(0, (4, 300))), b"a cat", {}, "tiny picture"),
    "a bomb": (bomb(), b"a cat", {}, "too many pixels"),
    "a novel in a PNG": (wordy_png(), b"a cat", {}, "damaged picture"),
    "no caption": (WHOLE, b"", {}, "no words"),
    "blanks": (WHOLE, b" \n\t ", {}, "no words"),
    "latin-1": (WHOLE, "éééé café".encode("latin-1"), {}, "not UTF-8"),
}
MENDED = {
    "a PNG": (encoded(photo(0), "PNG"), b"a cat", {}, ""),
    "a GIF": (encoded(photo(0), "GIF"), b"a cat", {}, ""),
    "a WebP": (encoded(photo(0), "WEBP"), b"a cat", {}, ""),
    "CMYK": (encoded(photo(0).convert("CMYK")), b"a cat", {}, ""),
    "grey": (encoded(photo(0).convert("L")), b"a cat", {}, ""),
    "black and white": (encoded(photo(0).convert("1"), "PNG"), b"a cat", {}, ""),
    "16 bits": (encoded(Image.fromarray(np.full((60, 80), 30_000, np.uint16)), "PNG"), b"a cat",
                {}, ""),
    "RGBA": (encoded(with_hole("RGBA"), "PNG"), b"a cat", {}, ""),
    "LA": (encoded(with_hole("LA"), "PNG"), b"a cat", {}, ""),
    "palette with a hole": (encoded(with_hole("P"), "PNG"), b"a cat", {}, ""),
    "animated": (encoded(photo(0), "GIF", save_all=True, append_images=[photo(1)]), b"a cat", {},
                 ""),
    "turned": (turned(), b"a cat", {}, ""),
    "sizes unknown": (WHOLE, b"a cat", {"original_width": None, "width": None}, ""),
    "a wrong byte or two": (WHOLE, "a café".encode("latin-1"), {}, ""),
}


def member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = len(content), 0o444, "bigdata", "bigdata"
    tar.addfile(info, io.BytesIO(content))


def write_sample(tar: tarfile.TarFile, key: str, jpg: bytes, txt: bytes | None,
                 about: dict | None = None) -> None:
    record = {"caption": (txt or b"").decode(errors="replace"), "url": f"https://x.org/{key}",
              "key": key, "status": "success", "error_message": None, "width": SIZE[0],
              "height": SIZE[1], "original_width": 400, "original_height": 300, "exif": "{}",
              "sha256": hashlib.sha256(jpg).hexdigest()}
    member(tar, f"{key}.jpg", jpg)
    member(tar, f"{key}.json", json.dumps(record | (about or {}), indent=4).encode())
    if txt is not None:
        member(tar, f"{key}.txt", txt)


def write_shard(folder: Path, shard: int, n: int, broken: float = 0.0, finished: bool = True,
                about: dict | None = None) -> list[str]:
    """A shard of n samples, a share of them spoiled; returns its keys as they stand in the tar."""
    folder.mkdir(exist_ok=True, parents=True)
    rng = random.Random(shard)
    rows = rng.sample(range(2 * n), n)  # the others could not be downloaded
    keys = [f"{10_000 * shard + row:09d}" for row in rows]
    spoiled = [*SPOILED.values()]
    with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, key in enumerate(keys):
            if i < broken * n:
                jpg, txt, more, _ = spoiled[i % len(spoiled)]
            else:
                jpg, txt, more = encoded(photo(int(key))), f"a photo of {key}".encode(), {}
            write_sample(tar, key, jpg, txt, (about or {}) | more)
    if finished:
        stats = {"count": 2 * n, "successes": n, "failed_to_download": n, "failed_to_resize": 0,
                 "duration": 1.0, "start_time": 0.0, "end_time": 1.0,
                 "status_dict": {"success": n, "HTTP Error 404: Not Found": n}}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats, indent=4))
    return keys
