"""The recipes of the two cards in small, from published files to answers: do they learn?

    python -m tests.ladder out/ladder                # all of it; prints a table
    python -m tests.ladder out/ladder --ranks 2 --json results/cpu.jsonl

The built-in model's ViT and decoder are written as somebody else's CLIP and LLaMA (Hugging Face's
layout), without the gated blocks between them; the drawn world as tar shards and as a LLaVA JSON.
Then, with `train.py` as a user would call it:

    villa-7b                  the decoder learns with its gated block, the ViT frozen
    vila-7b, stage 1          captions and searches; ViT and decoder frozen
    vila-7b, stage 2          conversations; the decoder learns, too

Measured on scenes that no training has seen: the loss with blank pictures minus the loss; how often
a caption's <ret> is closest to its own picture, of 50; the drawn world's exam, and the same with
blank pictures.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

import world
from documents import caption_documents
from drawn import DrawnWorld, short_captions
from exam import drawn_exam, find_pictures, main_accuracy
from published import FAMILIES, original
from tests.shards import encoded, write_sample
from weights import BUILT_IN, load_model

ROOT = Path(__file__).parent.parent
SIZE = 120  # of the pictures on disk
SHRINK = 16
STEPS = {"villa": 500, "vila 1": 1000, "vila 2": 1000}
COMMON = ["--batch-size", "32", "--shrink", str(SHRINK), "--checkpoint-every", "500",
          "--workers", "0", "--eval-every", "500", "--gate-lr-scale", "20"]


# ---------------------------------------------------------------------------- what is published


def write_published(folder: Path) -> None:
    """assets/tiny's ViT and decoder as folder/clip and folder/llama."""
    model, tokenizer = load_model(BUILT_IN)
    v, c, state = model.config.vision, model.config.decoder, model.state_dict()
    for name, title, parts in (("clip", "CLIP, Hugging Face names", ("vision",)),
                               ("llama", "LLaMA, Hugging Face files",
                                ("embed", "head", "norm", "blocks"))):
        family = next(family for family in FAMILIES if family.title == title)
        (folder / name).mkdir(parents=True)
        save_file({original(ours, family, c): tensor.contiguous() for ours, tensor in state.items()
                   if ours.split(".")[0] in parts}, folder / name / "model.safetensors")
    (folder / "clip" / "config.json").write_text(json.dumps(dict(
        model_type="clip", vision_config=dict(
            hidden_size=v.dim, intermediate_size=v.hidden_dim, num_attention_heads=v.n_heads,
            num_hidden_layers=v.n_layers, image_size=v.image_size, patch_size=v.patch_size,
            hidden_act=v.activation))))
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(dict(
        image_mean=v.mean, image_std=v.std)))
    (folder / "llama" / "config.json").write_text(json.dumps(dict(
        model_type="llama", hidden_size=c.dim, intermediate_size=c.hidden_dim,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim,
        num_hidden_layers=c.n_layers, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta,
        vocab_size=c.vocab_size, max_position_embeddings=c.max_seq_len)))
    tokenizer.save(folder / "llama" / "tokenizer.model")


def write_captions(folder: Path, n_shards: int = 4, n: int = 1000) -> None:
    """Shards of scenes with a caption each, and its paraphrases beside them."""
    folder.mkdir(parents=True)
    for shard in range(n_shards):
        rewrites = []
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(n):
                seed = shard * n + i
                rng, scene = random.Random(seed), world.make_scene(seed)
                key = f"{10_000 * shard + i:09d}"
                write_sample(tar, key, encoded(world.draw(scene, SIZE), "PNG"),
                             world.caption(scene, rng).encode())
                rewrites.append({"key": key, "rewrites": [
                    world.caption(scene, rng), *short_captions(scene, rng)]})
        (folder / f"{shard:05d}.rewrites.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in rewrites))


def write_conversations(folder: Path, n: int = 4000) -> None:
    """A LLaVA JSON about scenes, three questions each."""
    (folder / "images").mkdir(parents=True)
    entries, drawn = [], DrawnWorld("instruct", SIZE, 0)
    for i in range(n):
        rng, scene = random.Random(i), world.make_scene(10**6 + i)
        world.draw(scene, SIZE).save(folder / "images" / f"{i}.png")
        turns = [part for q in drawn.questions(scene, rng, 3)
                 for part in ({"from": "human", "value": q.question},
                              {"from": "gpt", "value": q.answer})]
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        entries.append({"id": str(i), "image": f"images/{i}.png", "conversations": turns})
    (folder / "llava.json").write_text(json.dumps(entries))


# ---------------------------------------------------------------------------------- the ladder


def climb(out: Path, ranks: int) -> dict:
    """All stages; what they have learned."""
    shutil.rmtree(out, ignore_errors=True)
    write_published(out / "published")
    write_captions(out / "captions")
    write_conversations(out / "llava")
    parts = ["--vision", out / "published" / "clip", "--lm", out / "published" / "llama"]
    began = time.time()
    train(ranks, "--preset", "villa-7b", *parts, "--data", out / "captions" / "{00000..00003}.tar",
          "--steps", STEPS["villa"], "--micro-batch", 32, "--out", out / "villa", *COMMON)
    train(ranks, "--preset", "vila-7b", "--stage", 1, *parts, "--data", out / "captions",
          "--steps", STEPS["vila 1"], "--micro-batch", 16, "--out", out / "vila-1", *COMMON)
    train(ranks, "--preset", "vila-7b", "--stage", 2, "--init", out / "vila-1" / "model",
          "--data", out / "llava" / "llava.json", "--steps", STEPS["vila 2"], "--micro-batch", 16,
          "--lr", 5e-4, "--out", out / "vila-2", *COMMON)
    return {"ladder": SHRINK, "minutes": round((time.time() - began) / 60, 1), "ranks": ranks,
            "steps": STEPS, "villa gap": last_gap(out / "villa"),
            "vila gap": last_gap(out / "vila-1"), "recall": recall(out / "vila-1" / "model"),
            **exam(out / "vila-2" / "model"), "says": says(out / "vila-2" / "model")}


def train(ranks: int, *arguments) -> None:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    print("train.py", *arguments, flush=True)
    subprocess.run([*launcher, ROOT / "train.py", *map(str, arguments)], check=True)


def last_gap(run: Path) -> float:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line["evaluation"]["gap"] for line in lines if "evaluation" in line][-1]


def recall(model: Path, n: int = 300) -> float:
    """How often a whole caption of an unseen scene finds its picture, of 50."""
    scenes = [world.make_scene(seed, "test") for seed in range(n)]
    searches = [caption_documents(np.asarray(world.draw(scene, 60)),
                                  world.caption(scene, random.Random(i)))[1]
                for i, scene in enumerate(scenes)]
    return find_pictures(*load_model(model), searches).float().mean().item()


def exam(model: Path) -> dict[str, float]:
    report = drawn_exam(*load_model(model), 100, kinds=world.MAIN_KINDS, new=False)
    return {"answers": main_accuracy(report["test"]), "blank": main_accuracy(report["blank"])}


def says(model: Path) -> str:
    """What sample.py answers."""
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--model", model, "--image",
                           ROOT / "cat.jpg", "--prompt", "What is in the picture?"],
                          capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    record = climb(options.out, options.ranks)
    print(json.dumps(record, indent=2))
    if options.json:
        with open(options.json, "a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
