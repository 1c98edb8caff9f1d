"""The parity table of the README: our modules against transformers on the same random weights.

    python -m tests.parity                               # prints the table
    python -m tests.parity --json results/cpu.jsonl      # and appends it as one line

Random checkpoints in every published layout, larger than the tests' own, are read by weights.py
and run in fp32, bf16 and fp16. The yardstick of the half precisions is transformers in fp32: ours
may be off by at most 1.5 times what transformers is off itself.
"""

import argparse
import copy
import json
import subprocess
import tempfile
from pathlib import Path

import torch
import transformers
from torch import Tensor

from data import prompts
from documents import Text, chat_document
from model import Span, VisionLanguageModel
from tests import checkpoints
from weights import assemble, load_model

WORDS = "What is in the picture? A red cat sits on the mat, and 12 blue dogs run far away. " * 5
LARGE = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=4)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.no_grad()
def our_logits(model: VisionLanguageModel, batch) -> Tensor:
    end = torch.arange(1, len(batch.tokens) + 1).int()
    pictures, _ = model.encode_images(batch)
    text = Span(batch.text_start, end, batch.text_hints)
    hidden = model.decode(batch.tokens, batch.positions, text, model.image_span(batch), pictures)
    return model.logits(hidden)


def in_dtype(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A copy of a transformers model in another dtype; its rotary tables stay fp32."""
    out = copy.deepcopy(model).to(dtype)
    for (_, kept), (name, _) in zip(model.named_buffers(), out.named_buffers(), strict=True):
        owner, _, last = name.rpartition(".")
        setattr(out.get_submodule(owner), last, kept.clone())
    return out


def compare(title: str, files: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list:
    rows, exact = [], theirs["fp32"].float()
    for name, mine in ours.items():
        mine, their = mine.float(), theirs[name].float()
        rows.append({
            "model": title, "files": files, "dtype": name,
            "largest": float(exact.abs().max()),
            "difference": float((mine - their).abs().max()),
            "ours_to_fp32": float((mine - exact).abs().max()),
            "theirs_to_fp32": float((their - exact).abs().max()),
            "same_argmax": float((mine.argmax(-1) == their.argmax(-1)).float().mean())})
    return rows


@torch.no_grad()
def clip_rows(place: Path) -> list[dict]:
    rows = []
    sizes = dict(hidden_size=256, num_attention_heads=4, intermediate_size=1024,
                 num_hidden_layers=8, image_size=112)
    clip = checkpoints.hf_clip(**sizes)
    checkpoints.write_torchscript(place / "ViT.pt", clip, half=False)
    checkpoints.write_openclip(place / "openclip", clip, quick_gelu=True)
    clip.save_pretrained(place / "clip")
    checkpoints.hf_llama(place / "llama")
    pictures = torch.stack([torch.from_numpy(checkpoints.picture(i, 112, 112)).permute(2, 0, 1)
                            for i in range(4)])
    for files, path in (("OpenAI .pt", "ViT.pt"), ("OpenCLIP", "openclip"),
                        ("Hugging Face", "clip")):
        ours, theirs = {}, {}
        for name, dtype in DTYPES.items():
            vision = assemble(place / path, place / "llama")[0].vision.to(dtype)
            pixels = vision.normalise(pictures)
            ours[name] = vision(pictures)[0].unflatten(0, (4, -1))
            theirs[name] = in_dtype(clip, dtype).vision_model(pixels).last_hidden_state[:, 1:]
        rows += compare("CLIP ViT, tokens", files, ours, theirs)
    return rows


@torch.no_grad()
def llama_rows(place: Path) -> list[dict]:
    rows = []
    for title, heads in (("LLaMA", 4), ("LLaMA, grouped heads", 2)):
        folder = place / title.replace(" ", "").replace(",", "-")
        llama = checkpoints.hf_llama(folder / "hf", num_key_value_heads=heads, shard="4MB",
                                     max_position_embeddings=512, **LARGE)
        checkpoints.write_meta(folder / "meta", llama, n_shards=2)
        (folder / "tokenizer.model").write_bytes((folder / "hf" / "tokenizer.model").read_bytes())
        for files in ("hf", "meta"):
            ours, theirs = {}, {}
            model, tokenizer = assemble(place / "ViT.pt", folder / files)
            batch = prompts([[Text(WORDS)]], tokenizer, model.config, torch.device("cpu"))
            for name, dtype in DTYPES.items():
                n = llama.config.vocab_size
                ours[name] = our_logits(copy.deepcopy(model).to(dtype), batch)[:, :n]
                theirs[name] = in_dtype(llama, dtype)(batch.tokens[None]).logits[0]
            rows += compare(title, {"hf": "Hugging Face, shards", "meta": "Meta, 2 files"}[files],
                            ours, theirs)
    return rows


@torch.no_grad()
def idefics_rows(place: Path) -> list[dict]:
    folder = place / "idefics"
    theirs_fp32 = checkpoints.hf_idefics(folder, max_position_embeddings=512, **LARGE)
    model, tokenizer = load_model(folder)
    pictures = [checkpoints.picture(i) for i in range(3)]
    turns = [([], "Hello", "Hi"), (pictures[:2], WORDS[:120], "a cat"), (pictures[2:], WORDS, None)]
    batch = prompts([chat_document(turns, tokenizer.chat)], tokenizer, model.config,
                    torch.device("cpu"))
    latest = (batch.tokens == tokenizer.image_id).cumsum(0) - 1
    mask = (latest[:, None] == torch.arange(3)).long()[None]
    ours, theirs = {}, {}
    for name, dtype in DTYPES.items():
        mine = copy.deepcopy(model).to(dtype)
        ours[name] = our_logits(mine, batch)
        theirs[name] = in_dtype(theirs_fp32, dtype)(
            input_ids=batch.tokens[None], attention_mask=torch.ones_like(batch.tokens)[None],
            pixel_values=mine.vision.normalise(batch.images)[None],
            image_attention_mask=mask).logits[0]
    return compare("IDEFICS, 3 pictures", "Hugging Face", ours, theirs)


def table(rows: list[dict]) -> str:
    lines = ["| model | files | dtype | difference | ours to fp32 | transformers to fp32 | "
             "same argmax |", "| --- | --- | --- | ---: | ---: | ---: | ---: |"]
    for r in rows:
        half = r["dtype"] != "fp32"
        errors = (f"{r['ours_to_fp32']:.2g} | {r['theirs_to_fp32']:.2g}" if half else "|")
        lines.append(f"| {r['model']} | {r['files']} | {r['dtype']} | {r['difference']:.1e} | "
                     f"{errors} | {100 * r['same_argmax']:.1f} % |")
    return "\n".join(lines)


def summary(rows: list[dict]) -> list[str]:
    """The README's lines: of each model the worst of all its layouts, by dtype."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]

        def worst(dtype: str, name: str, mine=mine) -> float:
            return max(row[name] for row in mine if row["dtype"] == dtype)

        halves = [f"{worst(dtype, 'ours_to_fp32'):.2g}, {worst(dtype, 'theirs_to_fp32'):.2g}"
                  for dtype in ("bf16", "fp16")]
        least = min(row["same_argmax"] for row in mine)
        lines.append(f"| {model} | {worst('fp32', 'difference'):.1e} | {' | '.join(halves)} | "
                     f"{100 * least:.1f} % |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare with transformers.")
    parser.add_argument("--json", help="append the record to this file")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        rows = [row for make in (clip_rows, llama_rows, idefics_rows) for row in make(Path(place))]
    print(table(rows))
    if options.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                                text=True).stdout.strip()
        with open(options.json, "a", encoding="utf-8") as file:
            file.write(json.dumps({"parity": rows, "commit": commit, "torch": torch.__version__,
                                   "transformers": transformers.__version__}) + "\n")


if __name__ == "__main__":
    main()
