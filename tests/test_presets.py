"""Laws of the presets: the figures of the two model cards, and the same structure in small.

pytest tests/test_presets.py
"""

import pytest

import train
from config import TrainConfig, check_split, parse
from model import VisionLanguageModel
from optim import freeze, learning_rate
from presets import PRESETS, preset_fields, preset_model
from weights import shapes

PUBLISHED = ["--vision", "ViT-L-14.pt", "--lm", "Llama-2-7b-hf", "--data", "x.tar"]


def counts(model: VisionLanguageModel) -> tuple[int, int]:
    """Parameters in all, and those that are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


# From the shapes alone: LLaMA-2-7B has 6,738,415,616 parameters, CLIP's ViT-L/14 303,966,208 with
# its projection, a gated block 2 * 4096^2 + 2 * 4096 * 1024 + 4096 + 1.
LLAMA, VIT = 6_738_415_616, 303_966_208
GATED = 2 * 4096**2 + 2 * 4096 * 1024 + 4096 + 1
SPECIAL, NORM = 2 * 3 * 4096, 2 * 1024


def test_villa_7b_trains_seven_billion_parameters_and_freezes_its_eye():
    model = shapes(preset_model("villa-7b"))
    freeze(model, *preset_fields("villa-7b")["frozen"])
    everything, trained = counts(model)
    assert trained == LLAMA + 8 * GATED + SPECIAL + NORM == 7_074_019_336
    assert everything - trained == VIT
    assert sum(p.numel() for p in model.cross_blocks.parameters()) == 8 * GATED  # 0.34 B


def test_vila_7b_freezes_its_decoder_in_stage_1_and_trains_it_in_stage_2():
    model = shapes(preset_model("vila-7b"))
    first, second = preset_fields("vila-7b")["frozen"]
    freeze(model, first)
    trained_first = counts(model)[1]
    freeze(model, second)
    assert counts(model)[1] - trained_first == LLAMA
    freeze(model, first)
    assert model.special_embed.requires_grad and model.special_head.requires_grad
    parts = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert parts == {"resampler", "image_index_embed", "special_embed", "special_head",
                     "cross_blocks", "contrastive"}


def test_the_recipes_are_those_of_the_cards():
    villa, vila = preset_fields("villa-7b"), preset_fields("vila-7b")
    assert villa["batch_size"] == vila["batch_size"] == 2048
    assert (villa["lr"], villa["min_lr"], villa["steps"]) == ((5e-5,), (1e-6,), (1_000_000,))
    assert vila["steps"][0] == round(1_500_000_000 / 2048) and vila["epochs"][1] == 3
    assert all(low == pytest.approx(high / 10)
               for low, high in zip(vila["min_lr"], vila["lr"], strict=True))
    assert vila["lr"] == (1e-4, 2e-5) and villa["frozen"] == ("vision",)
    assert villa["warmup_steps"] + vila["warmup_steps"] == (2000,) * 3
    config = parse(["--preset", "vila-7b", "--stage", "2", *PUBLISHED])
    assert (config.beta1, config.beta2, config.adam_eps, config.grad_clip) == (0.9, 0.95, 1e-6, 1.0)
    assert learning_rate(29, 1000, 1.0, 0.1, 2000, config.warmup_share[0]) == 1.0  # 3 %
    assert parse(["--preset", "villa-7b", *PUBLISHED]).grad_accum_steps(32) == 1
    assert config.grad_accum_steps(32) == 16


@pytest.mark.parametrize("stage, lr, frozen", [(1, 1e-4, "vision+decoder"), (2, 2e-5, "vision")])
def test_a_stage_is_chosen_by_its_number(stage, lr, frozen):
    config = parse(["--preset", "vila-7b", "--stage", str(stage), *PUBLISHED])
    assert (config.lr, config.frozen) == ((lr,), (frozen,)) and len(config.stages) == 1
    assert str(config.run_folder) == f"out/vila-7b-{stage}"


@pytest.mark.parametrize("arguments, line", [
    (["--preset", "villa-7b"], "give --vision CLIP and --lm LLAMA, or --init FOLDER"),
    (["--preset", "vila-7b", *PUBLISHED], "choose --stage 1 to 2"),
    (["--preset", "villa-7b", "--stage", "2", *PUBLISHED], "villa-7b has stages 1 to 1"),
    (["--preset", "vicuna", *PUBLISHED], "vicuna"),
    (["--preset", "tiny", "--shrink", "0"], "--shrink must be at least 1"),
])
def test_a_preset_that_lacks_something_says_what(cli, arguments, line):
    code, _, err = cli(train, *arguments)
    assert code == 2 and line in err and err.count("\n") == 1


@pytest.mark.parametrize("ranks, micro, line", [
    (24, 64, "does not divide into 24 processes; use 16 or 32 processes, or --batch-size 2040 or "
             "2064"),
    (32, 48, "is 64 samples for each of 32, which --micro-batch 48 does not divide; use "
             "--micro-batch 32 or 64"),
    (4096, 1, "use 2048 processes, or --batch-size 4096"),
])
def test_a_batch_that_would_not_be_exact_is_refused_with_the_nearest_that_are(ranks, micro, line):
    with pytest.raises(ValueError, match=line):
        check_split(TrainConfig(batch_size=2048, micro_batch=micro), ranks)


@pytest.mark.parametrize("ranks, micro, accumulation", [
    (32, 64, 1), (8, 64, 4), (64, 64, 1), (1, 0, 1), (32, 4, 16)])
def test_accumulation_follows_from_micro_batch_and_ranks(ranks, micro, accumulation):
    config = TrainConfig(batch_size=2048, micro_batch=micro)
    check_split(config, ranks)
    assert config.grad_accum_steps(ranks) == accumulation


@pytest.mark.parametrize("by", [2, 3, 16, 64, 1000])
@pytest.mark.parametrize("name", PRESETS)
def test_a_shrunken_preset_keeps_its_structure(name, by):
    large, small = preset_model(name), preset_model(name, by)
    assert counts(shapes(small))[0] < counts(shapes(large))[0]
    for field in ("visible_images", "cross_attn_every", "cross_attn_mlp", "cross_attn_before"):
        assert getattr(small.decoder, field) == getattr(large.decoder, field)
    assert bool(small.resampler) == bool(large.resampler)
    assert bool(small.contrastive_dim) == bool(large.contrastive_dim)
    assert small.decoder.n_heads // small.decoder.n_kv_heads == (
        large.decoder.n_heads // large.decoder.n_kv_heads)
    fields, less = preset_fields(name), preset_fields(name, 0, by)
    assert less["frozen"] == fields["frozen"] and less["stages"] == fields["stages"]
    config, batch = TrainConfig(**less), max(fields.get("batch_size", 32) // by, 1)
    assert batch / 2 < config.batch_size <= batch
    check_split(config, 1)  # which refuses what does not divide
