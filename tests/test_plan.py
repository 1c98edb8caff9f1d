"""Laws of the plan: its formulas are those of the model, and its memory is what FSDP needs.

pytest tests/test_plan.py
pytest tests/test_plan.py -m slow    torch's memory tracker, at the real size (minutes)
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from config import GPU_NAMES, parse
from data import collate, collate_options
from optim import freeze
from plan import GPUS, Work, check_memory, flops, free_memory, plan, traffic
from presets import preset_model
from tests.test_parallel import eight_samples
from vision import ResamplerConfig
from weights import shapes

ROOT = Path(__file__).parent.parent
RESAMPLER = ResamplerConfig(n_latents=3, n_layers=2, n_heads=2, head_dim=16, hidden_dim=40)


def planned(*arguments: str) -> str:
    return plan(parse(["--plan", *arguments]))


@pytest.mark.parametrize("resampler", [None, RESAMPLER])
@pytest.mark.parametrize("frozen", ["none", "vision", "vision+decoder", "vision+decoder+special"])
def test_flops_of_matrices_are_those_that_torch_counts(tiny_model, tokenizer, resampler, frozen):
    model = tiny_model(resampler=resampler, cross_attn_mlp=True, n_layers=4)
    freeze(model, frozen)
    batch = collate(eight_samples(tokenizer), **collate_options(tokenizer, model.config))
    counter = FlopCounterMode(display=False)
    with counter:
        model(batch).token_loss.backward()
    theirs = sum(n for op, n in counter.get_flop_counts()["Global"].items()
                 if "mm" in str(op) and "bmm" not in str(op))
    no_scores = Work(len(batch.images), len(batch.tokens), len(batch.target_rows))
    ours = flops(model, no_scores, frozen)
    c = model.config
    scores = 4 * no_scores.images * (c.vision.n_patches + 1) ** 2 * 32 * c.vision.n_layers
    ours["vision"] -= scores * (1 if "vision" in frozen else 3)
    if resampler:
        ours["resampler"] -= 3 * no_scores.images * 2 * 4 * 3 * (4 + 3) * 32
    if frozen == "vision+decoder":  # for its last rows, torch makes the whole table's gradient
        ours["head"] *= 3 / 2
    assert sum(ours.values()) == pytest.approx(theirs, rel=0.03)


def test_recomputing_costs_hardware_and_is_no_use():
    model = shapes(preset_model("villa-7b", 64))
    freeze(model, "vision")
    work = Work(8, 300, 200, 9000, 3000)
    useful, hardware = (flops(model, work, "vision", again) for again in ("none", "full"))
    assert hardware["decoder"] == pytest.approx(useful["decoder"] * 4 / 3)
    assert hardware["vision"] == useful["vision"]


def test_the_plan_of_villa_7b_has_the_figures_of_the_card():
    text = planned("--preset", "villa-7b", "--world-size", "32", "--gpu", "a100-80gb")
    assert "| all | 7,378.0 M | 7,074.0 M |" in text and "335.6 M" in text
    assert "32 x 64 samples x 1 micro-batches" in text and "1.92 T" in text
    assert "2,048 M samples" in text and "It fits" in text
    full, hsdp = (re.search(rf"\| {name}.*?\| ([\d.]+) \|.*?\| ([\d.]+) \|", text).groups()
                  for name in ("full sharding", "HSDP"))
    assert full[0] == "54.8" and float(hsdp[0]) < float(full[0])
    assert "chosen: 4 group(s), --shard trained" in text


def test_the_plan_of_vila_7b_has_both_stages_and_says_what_makes_it_fit():
    text = planned("--preset", "vila-7b")
    assert text.count("32 x 4 samples x 16 micro-batches") == 2
    assert "1,500 M samples" in text and "--shard trained" in text
    assert "It does not fit: 76 GB are there.\nWith --micro-batch" in text
    small = planned("--preset", "vila-7b", "--world-size", "1", "--gpu", "a100-40gb")
    assert "No switch makes it fit; it needs more GPUs, or larger ones." in small


def test_a_run_that_this_machine_has_no_memory_for_is_refused_before_it_takes_any(
    cli, monkeypatch
):
    c = parse(["--preset", "villa-7b", "--init", "none", "--device", "cpu"])
    freeze(model := shapes(preset_model("villa-7b", 1)), c.never_trained)
    monkeypatch.setattr("plan.free_memory", lambda device: 100e9)
    with pytest.raises(ValueError, match="at least 127.9 GB of cpu memory, 100.0 GB are free"):
        check_memory(c, model)
    monkeypatch.setattr("plan.free_memory", lambda device: 200e9)
    check_memory(c, model)
    assert 1e8 < free_memory(torch.device("cpu"))


def test_groups_that_hold_a_whole_model_keep_gathering_inside_of_a_node():
    config = parse(["--preset", "vila-7b", "--stage", "2", "--plan"])
    model = shapes(preset_model("vila-7b"))
    freeze(model, config.frozen[0])
    full, hsdp = (traffic(config, model, 32, n_groups, 16) for n_groups in (1, 4))
    assert hsdp[1] < full[1] / 10 and hsdp[0] < full[0]
    assert traffic(config, model, 8, 1, 16)[1] == 0  # one node


def test_every_gpu_that_can_be_named_has_its_data_sheet():
    assert tuple(GPUS) == GPU_NAMES


def test_a_plan_begins_no_run_and_needs_no_files(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = cli(train, "--preset", "vila-7b", "--stage", 1, "--plan", "--world-size", 8)
    assert code == 0 and "8 x a100-80gb" in out and list(tmp_path.iterdir()) == []
    code, _, err = cli(train, "--preset", "villa-7b", "--plan", "--world-size", 24)
    assert code == 2 and "16 or 32 processes" in err


# What the tracker cannot do is left out: micro-batches, recomputing, weights whole on each rank.
TRACKED = [(preset, stage, 32, tokens, batch)
           for preset, stage, batch, lengths in (("villa-7b", 1, 2048, (40, 128)),
                                                 ("vila-7b", 1, 512, (40, 128)),
                                                 ("vila-7b", 2, 128, (300, 2048)))
           for tokens in lengths]


@pytest.mark.slow
@pytest.mark.parametrize("preset, stage, ranks, tokens, batch", TRACKED)
def test_memory_is_within_ten_percent_of_torchs_tracker(preset, stage, ranks, tokens, batch):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.tracked", "--preset", preset, "--stage", str(stage),
         "--world-size", str(ranks), "--mean-tokens", str(tokens), "--batch-size", str(batch),
         "--micro-batch", str(batch // ranks), "--shard", "all"],
        cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs, ours = json.loads(done.stdout.splitlines()[-1])
    print(f"{preset}, stage {stage}: tracker {theirs / 1e9:.1f} GB, plan {ours / 1e9:.1f} GB")
    assert ours == pytest.approx(theirs, rel=0.1)
