"""How others publish weights: whose names are which of ours, and whose config says what.

FAMILIES are tried in order; the first whose `mark` is the name of a tensor wins. Its table says
which of its tensors is which of ours, and a function reads its config; the weights then run in our
own ViT, resampler, decoder and gated blocks. What a config asks for and is not known here is
refused. To support another checkpoint, add a table, a function and a Family; weights.py does the
rest. (A tensor that has to be changed in a new way needs a branch in `rename`, too, and a word in
the list below; OpenCLIP weights without a config need a row in CLIP_TAGS.)
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from containers import read_json
from model import DecoderConfig, ModelConfig
from vision import ResamplerConfig, VisionConfig

# ------------------------------------------------------------------- their names and ours
#
# N is a layer's number, * is weight or bias. A third column says what else has to be done:
#   split        q, k and v stacked -> three matrices      transpose    [in, out] -> [out, in]
#   interleaved  rotary pairs (0, 1), (2, 3), ... -> (0, D/2), (1, D/2 + 1), ..., as kernels/rope.py
#   flatten      a gate [1] or [1, 1, C] -> (1,) or (C,)

OPENAI_CLIP = """
visual.class_embedding                          vision.class_embed
visual.positional_embedding                     vision.pos_embed
visual.conv1.weight                             vision.patch_embed.weight
visual.ln_pre.*                                 vision.pre_norm.*
visual.transformer.resblocks.N.ln_1.*           vision.blocks.N.attn_norm.*
visual.transformer.resblocks.N.attn.in_proj_*   vision.blocks.N.attn.{q,k,v}_proj.*   split
visual.transformer.resblocks.N.attn.out_proj.*  vision.blocks.N.attn.o_proj.*
visual.transformer.resblocks.N.ln_2.*           vision.blocks.N.mlp_norm.*
visual.transformer.resblocks.N.mlp.c_fc.*       vision.blocks.N.mlp.fc1.*
visual.transformer.resblocks.N.mlp.c_proj.*     vision.blocks.N.mlp.fc2.*
visual.ln_post.*                                vision.post_norm.*
visual.proj                                     vision.proj.weight                    transpose
"""

HF_CLIP = """
embeddings.class_embedding                      vision.class_embed
embeddings.position_embedding.weight            vision.pos_embed
embeddings.patch_embedding.weight               vision.patch_embed.weight
pre_layrnorm.*                                  vision.pre_norm.*
encoder.layers.N.layer_norm1.*                  vision.blocks.N.attn_norm.*
encoder.layers.N.self_attn.q_proj.*             vision.blocks.N.attn.q_proj.*
encoder.layers.N.self_attn.k_proj.*             vision.blocks.N.attn.k_proj.*
encoder.layers.N.self_attn.v_proj.*             vision.blocks.N.attn.v_proj.*
encoder.layers.N.self_attn.out_proj.*           vision.blocks.N.attn.o_proj.*
encoder.layers.N.layer_norm2.*                  vision.blocks.N.mlp_norm.*
encoder.layers.N.mlp.fc1.*                      vision.blocks.N.mlp.fc1.*
encoder.layers.N.mlp.fc2.*                      vision.blocks.N.mlp.fc2.*
post_layernorm.*                                vision.post_norm.*
visual_projection.weight                        vision.proj.weight
"""

META_LLAMA = """
tok_embeddings.weight                           embed
layers.N.attention_norm.weight                  blocks.N.attn_norm.weight
layers.N.attention.wq.weight                    blocks.N.attn.q_proj.weight           interleaved
layers.N.attention.wk.weight                    blocks.N.attn.k_proj.weight           interleaved
layers.N.attention.wv.weight                    blocks.N.attn.v_proj.weight
layers.N.attention.wo.weight                    blocks.N.attn.o_proj.weight
layers.N.ffn_norm.weight                        blocks.N.mlp_norm.weight
layers.N.feed_forward.w1.weight                 blocks.N.mlp.gate_proj.weight
layers.N.feed_forward.w3.weight                 blocks.N.mlp.up_proj.weight
layers.N.feed_forward.w2.weight                 blocks.N.mlp.down_proj.weight
norm.weight                                     norm.weight
output.weight                                   head
"""

HF_LLAMA = """
model.embed_tokens.weight                       embed
model.layers.N.input_layernorm.weight           blocks.N.attn_norm.weight
model.layers.N.self_attn.q_proj.weight          blocks.N.attn.q_proj.weight
model.layers.N.self_attn.k_proj.weight          blocks.N.attn.k_proj.weight
model.layers.N.self_attn.v_proj.weight          blocks.N.attn.v_proj.weight
model.layers.N.self_attn.o_proj.weight          blocks.N.attn.o_proj.weight
model.layers.N.post_attention_layernorm.weight  blocks.N.mlp_norm.weight
model.layers.N.mlp.gate_proj.weight             blocks.N.mlp.gate_proj.weight
model.layers.N.mlp.up_proj.weight               blocks.N.mlp.up_proj.weight
model.layers.N.mlp.down_proj.weight             blocks.N.mlp.down_proj.weight
model.norm.weight                               norm.weight
lm_head.weight                                  head
"""

IDEFICS = HF_LLAMA + """
model.embed_tokens.additional_embedding.weight              special_embed
lm_head.additional_fc.weight                                special_head
model.perceiver_resampler.latents                           resampler.latents
model.perceiver_resampler.blocks.N.0.context_layer_norm.*   resampler.blocks.N.context_norm.*
model.perceiver_resampler.blocks.N.0.latents_layer_norm.*   resampler.blocks.N.latents_norm.*
model.perceiver_resampler.blocks.N.0.q_layer_norm.*         resampler.blocks.N.q_norm.*
model.perceiver_resampler.blocks.N.0.k_layer_norm.*         resampler.blocks.N.k_norm.*
model.perceiver_resampler.blocks.N.0.q_proj.*               resampler.blocks.N.q_proj.*
model.perceiver_resampler.blocks.N.0.k_proj.*               resampler.blocks.N.k_proj.*
model.perceiver_resampler.blocks.N.0.v_proj.*               resampler.blocks.N.v_proj.*
model.perceiver_resampler.blocks.N.0.output_proj.*          resampler.blocks.N.o_proj.*
model.perceiver_resampler.blocks.N.1.ln.*                   resampler.blocks.N.mlp_norm.*
model.perceiver_resampler.blocks.N.1.fc.*                   resampler.blocks.N.mlp.fc1.*
model.perceiver_resampler.blocks.N.1.c_proj.*               resampler.blocks.N.mlp.fc2.*
model.perceiver_resampler.layer_norm.*                      resampler.norm.*
model.gated_cross_attn_layers.N.input_layernorm.*           cross_blocks.N.attn_norm.*
model.gated_cross_attn_layers.N.cross_attn.q_proj.*         cross_blocks.N.attn.q_proj.*
model.gated_cross_attn_layers.N.cross_attn.k_proj.*         cross_blocks.N.attn.k_proj.*
model.gated_cross_attn_layers.N.cross_attn.v_proj.*         cross_blocks.N.attn.v_proj.*
model.gated_cross_attn_layers.N.cross_attn.o_proj.*         cross_blocks.N.attn.o_proj.*
model.gated_cross_attn_layers.N.cross_attn.q_layer_norm.*   cross_blocks.N.attn.q_norm.*
model.gated_cross_attn_layers.N.cross_attn.k_layer_norm.*   cross_blocks.N.attn.k_norm.*
model.gated_cross_attn_layers.N.alpha_cross_attn            cross_blocks.N.attn_gate    flatten
model.gated_cross_attn_layers.N.post_attention_layernorm.*  cross_blocks.N.mlp_norm.*
model.gated_cross_attn_layers.N.mlp.gate_proj.*             cross_blocks.N.mlp.gate_proj.*
model.gated_cross_attn_layers.N.mlp.up_proj.*               cross_blocks.N.mlp.up_proj.*
model.gated_cross_attn_layers.N.mlp.down_proj.*             cross_blocks.N.mlp.down_proj.*
model.gated_cross_attn_layers.N.alpha_dense                 cross_blocks.N.mlp_gate     flatten
"""
IDEFICS += "\n".join(f"model.vision_model.{line}" for line in HF_CLIP.strip().splitlines()[:-1])

# Names that hold nothing to load: rotary tables (made in fp32 by kernels/rope.py), index buffers.
IGNORED = r".*rotary_emb\.inv_freq|rope\.freqs|.*position_ids|.*masked_bias|.*attn_mask"
# CLIP's text half, and the three integers of a TorchScript archive.
IGNORED_CLIP = (r"positional_embedding|text_projection(\.weight)?|token_embedding\.weight|"
                r"ln_final\..*|logit_scale|logit_bias|transformer\..*|text\..*|text_model\..*|"
                r"input_resolution|context_length|vocab_size")


class Published(NamedTuple):
    """What a config is read from."""

    file: Path  # of the weights, or the first of their files; configs are next to it
    tensors: dict[str, Tensor]
    names: tuple[str, ...]  # of the ids after the tokenizer's pieces
    activation: str  # what the user says of a CLIP whose files say nothing


@dataclass(frozen=True)
class Family:
    """A way of publishing weights; `mark` matches a name of a tensor that tells it from later ones.
    """

    title: str
    mark: str
    table: str
    config: Callable[[Published], VisionConfig | DecoderConfig | ModelConfig]
    parts: tuple[str, ...] | None  # first words of our names that it fills; None: all
    ignored: str = IGNORED
    may_be_tied: bool = False  # its config.json may say that the head is the embedding


def rules(table: str) -> list[tuple[str, str, str]]:
    """A table's lines -> (their name, our name, what else has to be done)."""
    return [(*line.split(), "")[:3] for line in table.splitlines() if line.strip()]


def matched(template: str, name: str) -> tuple[str, str] | None:
    """What a name has in place of a table's N and *; None: it is another name."""
    pattern = re.escape(template).replace("N", r"(?P<N>\d+)").replace(
        r"\*", r"(?P<end>weight|bias)").replace(re.escape("{q,k,v}"), "[qkv]")
    found = re.fullmatch(pattern, name)
    return found and tuple(found.groupdict().get(group, "") for group in ("N", "end"))


def rename(tensors: dict[str, Tensor], family: Family, decoder: DecoderConfig
           ) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Their tensors by our names, and the names that are ignored and that nobody knows."""
    lines, state, ignored, unknown = rules(family.table), {}, [], []
    for name, tensor in tensors.items():
        found = ((*m, ours, action) for theirs, ours, action in lines
                 if (m := matched(theirs, name)))
        number, end, ours, action = next(found, (None,) * 4)
        if ours is None:
            (ignored if re.fullmatch(family.ignored, name) else unknown).append(name)
            continue
        if ours.startswith("cross_blocks"):  # theirs are counted, ours bear their layer's number
            number = str(int(number) * decoder.cross_attn_every)
        ours = ours.replace(".N.", f".{number}.").replace("*", end)
        if action == "split" and not (tensor.ndim and tensor.shape[0] % 3 == 0):
            raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}: q, k and v are three "
                             f"equal parts of it")
        if action == "split":
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[ours.replace("{q,k,v}", letter)] = part
        elif action == "interleaved":
            state[ours] = half_split(tensor, decoder.head_dim)
        elif action == "transpose":
            state[ours] = tensor.T.contiguous()
        else:
            state[ours] = tensor.flatten() if action == "flatten" else tensor
    return state, ignored, unknown


def original(name: str, family: Family, decoder: DecoderConfig) -> str:
    """The name that a family has for one of ours."""
    for theirs, ours, _ in rules(family.table):
        if found := matched(ours, name):
            number, end = found
            if ours.startswith("cross_blocks"):
                number = str(int(number) // decoder.cross_attn_every)
            return theirs.replace("N", number).replace("*", end)
    return name


def half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder q's or k's rows (H * D, C) from pairs (0, 1), (2, 3), ... to (0, D/2), ...

    In place, so that a mapped file is not held beside its copy; the file does not change.
    """
    if weight.ndim == 2 and weight.shape[0] % head_dim == 0:  # else the check of shapes says more
        rows = weight.view(-1, head_dim // 2, 2, weight.shape[1])  # (H, D/2, 2, C)
        weight.copy_(rows.transpose(1, 2).reshape(weight.shape))
    return weight


# -------------------------------------------------------------------------------- their configs


# Weights of OpenCLIP that come without a config: what their names in its list mean.
CLIP_TAGS = {
    "laion400m": dict(activation="gelu"),
    "laion2b_s32b_b82k": dict(activation="gelu", mean=(0.5,) * 3, std=(0.5,) * 3),
    "laion2b_s32b_b79k": dict(activation="gelu"),
    "datacomp_xl": dict(activation="gelu"),
    "commonpool_xl": dict(activation="gelu"),
    "dfn2b_s39b": dict(activation="gelu"),
    "l_14_39b": dict(activation="gelu"),  # DFN2B-CLIP-ViT-L-14-39B
    "dfn2b": dict(activation="quick_gelu"),
    "dfn5b": dict(activation="quick_gelu", resize="squash"),
    "metaclip": dict(activation="quick_gelu"),
    "openai": dict(activation="quick_gelu"),
}
OPENCLIP_KNOWN = ("image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio",
                  "patch_dropout", "output_tokens")  # the last two do nothing here
CLIP_HEADS = {1280: 80, 1408: 88, 1664: 104}  # widths (ViT-H, -g, -bigG) whose heads are not 64


def openai_config(published: Published) -> VisionConfig:
    """An OpenAI archive's architecture from its shapes, OpenCLIP's from its config or its tag."""
    file, tensors = published.file, published.tensors
    patches = tensors["visual.conv1.weight"]
    width, patch = patches.shape[0], patches.shape[-1]
    side = round((len(tensors["visual.positional_embedding"]) - 1) ** 0.5)
    layers = sum(name.endswith("attn.in_proj_weight") and name.startswith("visual.")
                 for name in tensors)
    hidden = tensors["visual.transformer.resblocks.0.mlp.c_fc.bias"].shape[0]
    values = dict(dim=width, patch_size=patch, image_size=side * patch, n_layers=layers,
                  hidden_dim=hidden, rgb="late", embed_dim=tensors["visual.proj"].shape[1])
    head = CLIP_HEADS.get(width, 64)
    path = file.parent / "open_clip_config.json"
    file = file.resolve()
    words = re.sub(r"[-.]", "_", f"{file.parent.name} {file.name}".lower())
    tag = next((tag for tag in CLIP_TAGS if tag in words), None)
    values |= CLIP_TAGS.get(tag, {})
    if path.is_file():
        model, pictures = (read_json(path).get(k, {}) for k in ("model_cfg", "preprocess_cfg"))
        tower = model.get("vision_cfg", {})
        if odd := [k for k, v in tower.items() if k not in OPENCLIP_KNOWN and v not in (None, {})]:
            raise ValueError(f"{path}: vision_cfg's {odd[0]!r} is not known here")
        head = tower.get("head_width", 64)
        resize = {"shortest": "crop", "squash": "squash"}
        if pictures.get("resize_mode", "shortest") not in resize:
            raise ValueError(f"{path}: resize_mode {pictures['resize_mode']!r} is not known, only "
                             f"shortest, squash")
        if pictures.get("interpolation", "bicubic") != "bicubic":
            raise ValueError(f"{path}: interpolation {pictures['interpolation']!r} is not known, "
                             f"only bicubic")
        values["activation"] = "quick_gelu" if model.get("quick_gelu") else "gelu"
        if "resize_mode" in pictures:  # else the tag's, as with the means
            values["resize"] = resize[pictures["resize_mode"]]
        values |= {key: tuple(pictures[key]) for key in ("mean", "std") if key in pictures}
    elif "input_resolution" in tensors:  # OpenAI's own archive
        values["activation"] = "quick_gelu"
    elif published.activation:
        values["activation"] = published.activation
    elif not tag:
        raise ValueError(f"{file}: nothing says which activation it was trained with; put its "
                         f"open_clip_config.json beside it, or say it to `python weights.py "
                         f"convert` by --set vision.activation=gelu or quick_gelu")
    return VisionConfig(**values, head_dim=head, n_heads=width // head)


def hf_clip_config(published: Published) -> VisionConfig:
    """transformers' CLIPConfig or CLIPVisionConfig; fields left out hold its defaults."""
    folder = published.file.parent
    values = read_json(folder / "config.json")
    values = values.get("vision_config", values)
    heads, width = values.get("num_attention_heads", 12), values.get("hidden_size", 768)
    projection = published.tensors.get("visual_projection.weight")
    config = dict(
        dim=width, hidden_dim=values.get("intermediate_size", 3072), n_heads=heads,
        n_layers=values.get("num_hidden_layers", 12), head_dim=width // heads,
        image_size=values.get("image_size", 224), patch_size=values.get("patch_size", 32),
        activation=values.get("hidden_act", "quick_gelu"), rgb="late",
        norm_eps=values.get("layer_norm_eps", 1e-5),
        embed_dim=None if projection is None else projection.shape[0])
    return VisionConfig(**config | picture_rules(folder / "preprocessor_config.json"))


def picture_rules(path: Path) -> dict:
    """Means and resizing of a preprocessor_config.json, if it is there; refused if out of reach."""
    if not path.is_file():
        return {}
    values = read_json(path)
    for key, known in (("resample", 3), ("do_normalize", True), ("do_rescale", True)):
        if values.get(key, known) not in (known, None):
            raise ValueError(f"{path}: {key} {values[key]!r} is not known here, only {known}")
    rules = {ours: tuple(values[theirs]) for ours, theirs in
             (("mean", "image_mean"), ("std", "image_std")) if theirs in values}
    if values.get("do_center_crop") is False:
        if isinstance(values.get("size"), dict) and "shortest_edge" in values["size"]:
            raise ValueError(f"{path}: pictures of any shape are not known here; do_center_crop "
                             f"must be true, or size a height and a width")
        rules["resize"] = "squash"
    return rules


def llama_shape(dim: int, n_layers: int, n_heads: int, n_kv_heads: int | None,
                head_dim: int | None) -> dict:
    """What both kinds of config have in common; a gated block every 4 layers where 4 divides."""
    every = next(n for n in (4, 3, 2, 1) if n_layers % n == 0)
    return dict(dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads or n_heads,
                head_dim=head_dim or dim // n_heads, cross_attn_every=every)


def meta_config(published: Published) -> DecoderConfig:
    """Meta's params.json; a vocab_size of -1 means the table's. LLaMA-1 (eps 1e-6) reads 2048."""
    path, table = published.file.parent / "params.json", published.tensors["tok_embeddings.weight"]
    values = read_json(path)
    if values.get("use_scaled_rope"):
        raise ValueError(f"{path}: use_scaled_rope (Llama 3.1 and later) is not known here")
    try:
        dim, eps = values["dim"], values["norm_eps"]
        shape = llama_shape(dim, values["n_layers"], values["n_heads"], values.get("n_kv_heads"),
                            values.get("head_dim"))
        hidden = values.get("hidden_dim")
        if hidden is None:
            unit = values["multiple_of"]
            wide = int(int(8 * dim / 3) * values.get("ffn_dim_multiplier", 1))
            hidden = (wide + unit - 1) // unit * unit
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]!r} is missing") from None
    width = table.shape[-1]
    if width != dim and dim % width == 0:
        raise ValueError(f"{path.parent}: the consolidated files hold {width} of {dim} columns; "
                         f"{dim // width} times as many files belong to this model")
    rows, longest = values.get("vocab_size", -1), 2048 if eps < 1e-5 else 4096
    return DecoderConfig(**shape | dict(
        hidden_dim=hidden, norm_eps=eps, rope_theta=float(values.get("rope_theta", 1e4)),
        max_seq_len=min(values.get("sliding_window") or longest, longest),
        vocab_size=len(table) if rows < 0 else rows))


def hf_llama_config(published: Published) -> DecoderConfig:
    """transformers' LlamaConfig or MistralConfig, as versions 4 and 5 write them.

    Within a sliding window attention is plain causal attention, so max_seq_len ends there.
    """
    path = published.file.parent / "config.json"
    values = read_json(path)
    kind = values.get("model_type", "llama")
    if kind not in ("llama", "mistral"):
        raise ValueError(f"{path}: model_type {kind!r} is not known here, only llama, mistral")
    return DecoderConfig(**hf_decoder(path, values))


def hf_decoder(path: Path, values: dict) -> dict:
    """The fields of DecoderConfig that LLaMA's and IDEFICS' configs share."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{path}: rope_type {kind!r} is not known here, only 'default'; choose a "
                         f"model without stretched positions")
    if values.get("hidden_act", "silu") != "silu" or values.get("attention_bias"):
        raise ValueError(f"{path}: hidden_act must be silu and attention_bias false")
    try:
        shape = llama_shape(values["hidden_size"], values["num_hidden_layers"],
                            values["num_attention_heads"], values.get("num_key_value_heads"),
                            values.get("head_dim"))
        hidden, rows = values["intermediate_size"], values["vocab_size"]
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]!r} is missing") from None
    longest = values.get("max_position_embeddings", 2048)
    return shape | dict(
        hidden_dim=hidden, vocab_size=rows, norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", values.get("rope_theta", 1e4))),
        max_seq_len=min(longest, values.get("sliding_window") or longest))


def idefics_config(published: Published) -> ModelConfig:
    """IDEFICS' config: nested as published, or flat as its first revisions.

    What differs from our own presets: a gated block stands before the first of every
    `cross_layer_interval` layers, not the last; its feed-forward runs for every word (mlp_always),
    so text alone is not plain LLaMA; its queries and keys may have an RMSNorm, its gates one value
    for each channel. The class token is kept among a picture's tokens, which have no LayerNorm
    (image_norm) after the ViT; pictures are squashed to a square; the resampler has ReLU, no biases
    and may have norms on q and k; <fake_token_around_image> stands around pictures. The trained
    tower is exact GELU, also where an early config does not say so.
    """
    folder, names = published.file.parent, published.names
    path = folder / "config.json"
    v = read_json(path)
    seen, latents = v.get("vision_config") or {}, v.get("perceiver_config") or {}

    def vision(name: str, default):
        return seen.get(name, v.get(f"vision_{name}", default))

    def perceiver(name: str, default):
        return latents.get(name, v.get(name, default))

    dim, heads = vision("embed_dim", 768), vision("num_attention_heads", 16)
    every, n_layers = v.get("cross_layer_interval", 1), v.get("num_hidden_layers", 32)
    if n_layers % every:
        raise ValueError(f"{path}: cross_layer_interval {every} must divide num_hidden_layers "
                         f"{n_layers}")
    decoder = hf_decoder(path, v) | dict(
        n_special=v.get("additional_vocab_size", 0), cross_attn_every=every,
        cross_attn_before="first", cross_attn_norm=bool(v.get("qk_layer_norms")),
        cross_attn_mlp=True, mlp_always=True, wide_gates=v.get("alpha_type", "float") == "vector")
    tower = VisionConfig(
        dim=dim, n_heads=heads, head_dim=dim // heads, n_layers=vision("num_hidden_layers", 32),
        image_size=vision("image_size", 224), patch_size=vision("patch_size", 14),
        hidden_dim=vision("intermediate_size", 5120), norm_eps=vision("layer_norm_eps", 1e-5),
        activation=vision("hidden_act", "gelu"), embed_dim=None, keep_class=True,
        **picture_rules(folder / "preprocessor_config.json") | {"resize": "squash"})
    resampler = ResamplerConfig(
        n_latents=perceiver("resampler_n_latents", 64), n_layers=perceiver("resampler_depth", 6),
        n_heads=perceiver("resampler_n_heads", 16), head_dim=perceiver("resampler_head_dim", 96),
        hidden_dim=4 * dim, qk_norm=bool(perceiver("qk_layer_norms_perceiver", False)),
        activation="relu", mlp_bias=False)
    return ModelConfig(
        tower, DecoderConfig(**decoder), resampler if v.get("use_resampler") else None,
        image_norm=False, special_tokens=names,
        chat="idefics-instruct" if "<end_of_utterance>" in names else "idefics",
        blank_behind_special=blank_behind_special(folder))


def blank_behind_special(folder: Path) -> bool:
    """Which rule of tokenizer.py the files ask for: tokenizer.json's, else tokenizer_config's.

    Fast tokenizers made until early 2024 prepend a blank to every stretch between special tokens;
    later ones, and slow ones with legacy=false, to the first stretch alone. Without either file it
    is SentencePiece's own way for every stretch.
    """
    if (folder / "tokenizer.json").is_file():
        values = read_json(folder / "tokenizer.json")
        steps = values.get("normalizer") or {}
        steps = steps.get("normalizers", [steps])
        before = values.get("pre_tokenizer") or {}
        if any(step.get("type") == "Prepend" for step in steps):
            return True
        scheme = [part.get("prepend_scheme") for part in before.get("pretokenizers", [before])]
        if "never" in scheme:
            raise ValueError(f"{folder / 'tokenizer.json'}: prepend_scheme 'never' is not known "
                             f"here, only first and always")
        return "first" not in scheme
    if (folder / "tokenizer_config.json").is_file():
        return read_json(folder / "tokenizer_config.json").get("legacy", True) is not False
    return True


def names_behind(folder: Path, n_pieces: int, n_rows: int) -> list[str]:
    """The names of ids n_pieces..n_rows-1, from the files that Hugging Face tokenizers leave."""
    def read(file: str) -> dict:
        return read_json(folder / file) if (folder / file).is_file() else {}

    found = [(number, name) for name, number in read("added_tokens.json").items()]
    found += [(int(number), token["content"]) for number, token in
              read("tokenizer_config.json").get("added_tokens_decoder", {}).items()]
    found += [(token["id"], token["content"]) for token in
              read("tokenizer.json").get("added_tokens", [])]
    names = dict(found)
    return [names.get(number, f"<extra_{number}>") for number in range(n_pieces, n_rows)]


def plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what training wraps around a model, and HF CLIP's without the tower's own prefix."""
    out = {}
    for name, tensor in tensors.items():
        for wrapper in ("module.", "_orig_mod."):
            name = name.removeprefix(wrapper)
        out[name.replace("._checkpoint_wrapped_module", "")] = tensor
    mark = next((name for name in out if name.endswith("embeddings.class_embedding")), "")
    prefix = mark.removesuffix("embeddings.class_embedding")
    if prefix == "vision_model.":
        out = {name.removeprefix(prefix): tensor for name, tensor in out.items()}
    return out


# --------------------------------------------------------------------------------- all families


CLIP_PARTS, LLAMA_PARTS = ("vision",), ("embed", "blocks", "norm", "head")
FAMILIES = (
    Family("IDEFICS", r"model\.gated_cross_attn_layers\.0\.alpha_dense", IDEFICS, idefics_config,
           None),
    Family("LLaMA, Meta's files", r"tok_embeddings\.weight", META_LLAMA, meta_config, LLAMA_PARTS),
    Family("LLaMA, Hugging Face files", r"model\.embed_tokens\.weight", HF_LLAMA, hf_llama_config,
           LLAMA_PARTS, may_be_tied=True),
    Family("CLIP, OpenAI's or OpenCLIP's names", r"visual\.conv1\.weight", OPENAI_CLIP,
           openai_config, CLIP_PARTS, f"{IGNORED}|{IGNORED_CLIP}"),
    Family("CLIP, Hugging Face names", r"(.*\.)?embeddings\.class_embedding", HF_CLIP,
           hf_clip_config, CLIP_PARTS, f"{IGNORED}|{IGNORED_CLIP}"),
)


def find_family(file: Path, tensors: dict[str, Tensor]) -> Family:
    """The family of these tensors; ValueError, which names `file`, if it is not known here."""
    for family in FAMILIES:
        if any(re.fullmatch(family.mark, name) for name in tensors):
            return family
    known = "; ".join(family.title for family in FAMILIES)
    raise ValueError(f"{file}: none of the checkpoints known here ({known}): it has a tensor "
                     f"{min(tensors, default='of no name')}")


def published_config(family: Family, file: Path, tensors: dict[str, Tensor],
                     n_pieces: int | None, activation: str) -> ModelConfig:
    """A family's config as ours; parts that it does not have hold the defaults.

    n_pieces: of the tokenizer next to it, if there is one; activation: see Published.
    Raises ValueError naming the file and what in it is out of reach.
    """
    try:
        n_rows = sum(len(tensors[theirs]) for theirs, ours, _ in rules(family.table)
                     if ours in ("embed", "special_embed"))
        names = tuple(names_behind(file.parent, n_pieces, n_rows) if n_rows and n_pieces else ())
        config = family.config(Published(file, tensors, names, activation))
        if isinstance(config, VisionConfig):
            return ModelConfig(config, DecoderConfig())
        if isinstance(config, DecoderConfig):
            ours = ModelConfig(VisionConfig(), config)
            return replace(ours, special_tokens=names + ours.special_tokens,
                           blank_behind_special=blank_behind_special(file.parent))
        return config
    except KeyError as error:
        raise ValueError(f"{file}: {error.args[0]} is missing") from None
    except ValueError as error:
        at = "" if str(error).startswith(str(file.parent)) else f"{file.parent}: "
        raise ValueError(f"{at}{error}") from None
    except (TypeError, AttributeError, ArithmeticError, IndexError, StopIteration) as error:
        raise ValueError(f"{file.parent}: a value of its config cannot be: {error}") from None
