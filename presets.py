"""The named models and how each is trained: what the two model cards say, and what they leave open.

    tiny        a drawn world on two CPU cores; trained from nothing
    villa-1b    ViLLA-7B's recipe with TinyLlama-1.1B, for one GPU
    villa-7b    ViLLA-7B: CLIP ViT-L/14, LLaMA-2-7B, 8 gated blocks of attention alone; captions
    vila-7b     VILA-7B: OpenCLIP ViT-L/14, a Perceiver resampler, LLaMA-2-7B frozen in stage 1
                (captions, contrastive), trained in stage 2 (instructions)

A preset is a ModelConfig and the fields of config.TrainConfig that differ from its defaults. Fields
that are marked "ours" are choices of our own, since neither card says anything.
"""

import math
from dataclasses import replace

from model import DecoderConfig, ModelConfig
from vision import ResamplerConfig, VisionConfig

TINY = ModelConfig(
    # Nine patches, one for each place of the drawn world: from 64, kinds are learned more slowly. A
    # class token learned which places are taken and no more; the patches know the rest (LOG.md).
    vision=VisionConfig(image_size=60, patch_size=20, dim=128, n_layers=3, n_heads=4, head_dim=32,
                        hidden_dim=512, activation="gelu", embed_dim=128, pool="mean"),
    decoder=DecoderConfig(vocab_size=1000, dim=128, n_layers=4, n_heads=8, n_kv_heads=8,
                          head_dim=16, hidden_dim=384, max_seq_len=1024, cross_attn_every=2,
                          visible_images="all", max_images=8),
    contrastive_dim=128,
)
VILLA_7B = ModelConfig(VisionConfig(), DecoderConfig())
VILLA_1B = ModelConfig(
    VisionConfig(),
    DecoderConfig(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, head_dim=64, hidden_dim=5632,
                  max_seq_len=2048, cross_attn_every=2),
)
VILA_7B = ModelConfig(
    VisionConfig(activation="gelu", mean=(0.5,) * 3, std=(0.5,) * 3),  # laion2b_s32b_b82k
    DecoderConfig(cross_attn_mlp=True, visible_images="all", max_images=32),  # 32: ours
    resampler=ResamplerConfig(),
    contrastive_dim=768,  # ours, CLIP's
)

GPUS = 32  # of both cards
VILLA = dict(
    stages=("pretrain",), steps=(1_000_000,), epochs=(0.0,), lr=(5e-5,), min_lr=(1e-6,),
    warmup_steps=(2000,), warmup_share=(0.2,), frozen=("vision",),
    batch_size=2048, micro_batch=64, adam_eps=1e-6,
    weight_decay=0.1, gate_lr_scale=10.0,  # ours
)
PRESETS: dict[str, dict] = {
    # tiny's gates start open, for there is no trained language model to protect, and a gate at 0
    # learns nothing until it has moved.
    "tiny": dict(
        model=TINY, stages=("pretrain", "instruct"), steps=(2350, 600), epochs=(0.0, 0.0),
        lr=(1e-3, 1e-3), min_lr=(1e-4, 1e-4), warmup_steps=(50, 50), warmup_share=(0.2, 0.2),
        frozen=("none", "vision"), gate_start=0.7, gate_lr_scale=20.0),
    "villa-1b": dict(model=VILLA_1B, **VILLA | dict(
        steps=(100_000,), lr=(1e-4,), batch_size=256, micro_batch=32)),  # ours
    "villa-7b": dict(model=VILLA_7B, world_size=GPUS, **VILLA),
    "vila-7b": dict(
        model=VILA_7B, stages=("pretrain", "instruct"),
        steps=(732_422, 975),  # 1.5 B samples; three epochs of LLaVA's 665 K, if no --data says
        epochs=(0.0, 3.0), lr=(1e-4, 2e-5), min_lr=(1e-5, 2e-6), warmup_steps=(2000, 2000),
        warmup_share=(0.2, 0.03), frozen=("vision+decoder", "vision"),
        batch_size=2048, micro_batch=4, world_size=GPUS,  # 16 accumulation steps
        random_crop=0.9, jitter=0.2,  # the card's augmentation; how much is ours
        adam_eps=1e-6, weight_decay=0.1, contrastive_weight=0.1, gate_lr_scale=10.0,  # ours
    ),
}
PER_STAGE = ("stages", "steps", "epochs", "lr", "min_lr", "warmup_steps", "warmup_share", "frozen")


def preset_fields(name: str, stage: int = 0, shrink: int = 1) -> dict:
    """A preset's fields of TrainConfig, of one stage (from 1) or of all (0), shrunk."""
    fields = {key: value for key, value in PRESETS[name].items() if key != "model"}
    if stage:
        fields |= {key: fields[key][stage - 1 : stage] for key in PER_STAGE if key in fields}
    return shrunk_recipe(fields, shrink) if shrink > 1 else fields


def preset_model(name: str, shrink: int = 1) -> ModelConfig:
    """A preset's model, shrunk."""
    return shrunk(PRESETS[name]["model"], shrink) if shrink > 1 else PRESETS[name]["model"]


# ------------------------------------------------------------------------------- scaled down


def shrunk(c: ModelConfig, by: int) -> ModelConfig:
    """The same structure scaled down: widths divided by `by`, depths and sides by 4 at most.

    A gated block still stands before every this many layers, and heads are not narrower than 16.
    """
    v, d, r, less = c.vision, c.decoder, c.resampler, min(by, 4)
    groups = d.n_heads // d.n_kv_heads
    n_heads, head_dim = narrower_heads(d.n_heads, d.head_dim, by)
    n_heads = -(-n_heads // groups) * groups
    decoder = replace(
        d, dim=narrower(d.dim, by), n_layers=fewer(d.n_layers, less * d.cross_attn_every)
        * d.cross_attn_every, n_heads=n_heads, n_kv_heads=n_heads // groups, head_dim=head_dim,
        hidden_dim=narrower(d.hidden_dim, by))
    n_heads, head_dim = narrower_heads(v.n_heads, v.head_dim, by)
    vision = replace(
        v, image_size=fewer(v.image_size // v.patch_size, less) * v.patch_size,
        dim=narrower(v.dim, by), n_layers=fewer(v.n_layers, less), n_heads=n_heads,
        head_dim=head_dim, hidden_dim=narrower(v.hidden_dim, by),
        embed_dim=v.embed_dim and narrower(v.embed_dim, by))
    if r:
        n_heads, head_dim = narrower_heads(r.n_heads, r.head_dim, by)
        r = replace(r, n_latents=fewer(r.n_latents, less), n_layers=fewer(r.n_layers, less),
                    n_heads=n_heads, head_dim=head_dim, hidden_dim=narrower(r.hidden_dim, by))
    return replace(c, vision=vision, decoder=decoder, resampler=r,
                   contrastive_dim=c.contrastive_dim and narrower(c.contrastive_dim, by))


def shrunk_recipe(fields: dict, by: int) -> dict:
    """Batch, steps and warm-up divided by `by`; rates times its root, as small models want them.

    A micro-batch stands for those of all GPUs, so that accumulation stays what it is. Batch and
    micro-batch are powers of two: they divide each other.
    """
    batch = power_of_2(fewer(fields.get("batch_size", 32), by))
    micro = power_of_2(fewer(GPUS * fields["micro_batch"], by)) if "micro_batch" in fields else 0
    small = dict(batch_size=batch, micro_batch=min(micro, batch), world_size=1)
    for name in ("steps", "warmup_steps"):
        if name in fields:
            small[name] = tuple(fewer(value, by) for value in fields[name])
    for name in ("lr", "min_lr"):
        if name in fields:
            small[name] = tuple(value * math.sqrt(by) for value in fields[name])
    return fields | small


def fewer(n: int, by: int) -> int:
    return max(n // by, 1)


def power_of_2(n: int) -> int:
    """The largest one up to n."""
    return 1 << (n.bit_length() - 1)


def narrower(width: int, by: int) -> int:
    """A width that is still a multiple of 16."""
    return max(width // by // 16, 2) * 16


def narrower_heads(n: int, head_dim: int, by: int) -> tuple[int, int]:
    """How many heads of what width."""
    narrow = min(head_dim, max(head_dim // by, 16))
    return narrower(n * head_dim, by) // narrow, narrow
