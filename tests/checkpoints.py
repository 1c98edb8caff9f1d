"""Small random checkpoints in every published layout, for tests and for the parity table.

What transformers knows it builds and saves itself; OpenAI's, OpenCLIP's and Meta's files are
written by hand from the same weights, as the authors' own programs name and arrange them. All
norms and gates are away from their start, so that a mix-up would show.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    LlamaConfig,
    LlamaForCausalLM,
)

from tokenizer import train_tokenizer

WORDS = ["a red cat sits on the mat.", "what is in the picture?", "the blue dog runs far away",
         "User: where is it? Assistant: there", "zwei Vögel, drei Bäume", "1234567890"]
CLIP_VISION = dict(hidden_size=128, intermediate_size=192, num_hidden_layers=3,
                   num_attention_heads=2, image_size=28, patch_size=14)
LLAMA = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=4, rms_norm_eps=1e-5, max_position_embeddings=256,
             tie_word_embeddings=False)


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter from its start, in place; linear maps keep the scale of their input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2 and parameter.shape[1] > 1:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter += 0.3 * noise
    return model.eval()


def write_tokenizer(folder: Path, vocab_size: int = 330) -> int:
    """A small SentencePiece model; returns its number of pieces."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(WORDS * 4, folder / "tokenizer.model", vocab_size)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return pieces.vocab_size()


# ------------------------------------------------------------------------------------------ CLIP


def hf_clip(act: str = "quick_gelu", seed: int = 0, **vision) -> CLIPModel:
    torch.manual_seed(seed)
    config = CLIPConfig(
        text_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, vocab_size=50, projection_dim=48),
        vision_config=CLIP_VISION | dict(hidden_act=act, projection_dim=48) | vision,
        projection_dim=48)
    return shake(CLIPModel(config), seed)


def openai_names(model: CLIPModel) -> dict[str, Tensor]:
    """The vision tower's tensors, and a few of the text's, as OpenAI's CLIP names them."""
    theirs = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    v = "vision_model."
    out = {
        "visual.class_embedding": theirs[v + "embeddings.class_embedding"],
        "visual.positional_embedding": theirs[v + "embeddings.position_embedding.weight"],
        "visual.conv1.weight": theirs[v + "embeddings.patch_embedding.weight"],
        "visual.proj": theirs["visual_projection.weight"].T.contiguous(),
        "positional_embedding": torch.zeros(5, 32), "text_projection": torch.zeros(32, 48),
        "logit_scale": torch.tensor(4.6), "token_embedding.weight": torch.zeros(50, 32),
        "ln_final.weight": torch.ones(32), "ln_final.bias": torch.zeros(32),
        "transformer.resblocks.0.ln_1.weight": torch.ones(32),
    }
    for end in ("weight", "bias"):
        out[f"visual.ln_pre.{end}"] = theirs[f"{v}pre_layrnorm.{end}"]
        out[f"visual.ln_post.{end}"] = theirs[f"{v}post_layernorm.{end}"]
        for i in range(model.config.vision_config.num_hidden_layers):
            a, b = f"{v}encoder.layers.{i}.", f"visual.transformer.resblocks.{i}."
            out[f"{b}attn.in_proj_{end}"] = torch.cat(
                [theirs[f"{a}self_attn.{x}_proj.{end}"] for x in "qkv"])
            for ours, name in (("self_attn.out_proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"),
                               ("mlp.fc2", "mlp.c_proj"), ("layer_norm1", "ln_1"),
                               ("layer_norm2", "ln_2")):
                out[f"{b}{name}.{end}"] = theirs[f"{a}{ours}.{end}"]
    return out


class Bag(nn.Module):
    """Parameters under dotted names, as nested modules: what TorchScript can save."""

    def __init__(self, tensors: dict[str, Tensor], buffers: dict[str, Tensor]):
        super().__init__()
        for name, tensor in (*tensors.items(), *buffers.items()):
            *path, last = name.split(".")
            place = self
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            if name in tensors:
                place.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
            else:
                place.register_buffer(last, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return x


def write_torchscript(path: Path, model: CLIPModel, half: bool = True) -> None:
    """An archive like ViT-L-14.pt: matrices in fp16, norms and tables in fp32, three integers."""
    tensors = openai_names(model)
    if half:
        tensors = {name: t.half() if t.ndim > 1 and "embedding" not in name else t
                   for name, t in tensors.items()}
    integers = {name: torch.tensor(n) for name, n in
                (("input_resolution", 28), ("context_length", 5), ("vocab_size", 50))}
    torch.jit.save(torch.jit.script(Bag(tensors, integers)), str(path))


def write_openclip(folder: Path, model: CLIPModel, suffix: str = "bin", quick_gelu: bool = False,
                   **pictures) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.clone() for name, t in openai_names(model).items()}
    if suffix == "bin":
        torch.save(tensors, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(tensors, folder / "open_clip_model.safetensors")
    c = model.config.vision_config
    vision = dict(image_size=c.image_size, layers=c.num_hidden_layers, width=c.hidden_size,
                  patch_size=c.patch_size)
    if c.hidden_size // c.num_attention_heads != 64:
        vision["head_width"] = c.hidden_size // c.num_attention_heads
    config = {"model_cfg": {"embed_dim": 48, "vision_cfg": vision, "text_cfg": {}},
              "preprocess_cfg": pictures}
    if quick_gelu:
        config["model_cfg"]["quick_gelu"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(config))


# ----------------------------------------------------------------------------------------- LLaMA


def hf_llama(folder: Path, *, shard: str = "5GB", safetensors: bool = True, seed: int = 0,
             dtype: torch.dtype = torch.float32, **changes) -> LlamaForCausalLM:
    """A LLaMA with its tokenizer, saved into `folder` by transformers (or as .bin shards)."""
    n = write_tokenizer(folder)
    torch.manual_seed(seed)
    model = shake(LlamaForCausalLM(LlamaConfig(**LLAMA | dict(vocab_size=n) | changes)), seed)
    model.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    if not safetensors:
        as_bin_shards(folder)
    return model


def as_bin_shards(folder: Path, n: int = 2) -> None:
    """Replace a folder's safetensors by n .bin shards, with a rotary table as older ones had."""
    from safetensors.torch import load_file

    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {name: t.clone() for name, t in load_file(file).items()}
        file.unlink()
    for index in folder.glob("*.index.json"):
        index.unlink()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(8)
    names, places = sorted(tensors), {}
    for k in range(n):
        file = f"pytorch_model-{k + 1:05d}-of-{n:05d}.bin"
        torch.save({name: tensors[name] for name in names[k::n]}, folder / file)
        places |= {name: file for name in names[k::n]}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(
        {"metadata": {"total_size": 1}, "weight_map": places}))


def write_meta(folder: Path, model: LlamaForCausalLM, n_shards: int = 1) -> None:
    """The same weights as Meta publishes them: its names, interleaved rotary pairs, slices."""
    folder.mkdir(parents=True, exist_ok=True)
    c, d = model.config, model.config.hidden_size // model.config.num_attention_heads
    names = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
             "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
             "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
             "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "ffn_norm", "lm_head": "output",
             "embed_tokens": "tok_embeddings"}
    cut = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1,
           "tok_embeddings": 1}
    shards: list[dict] = [{"rope.freqs": torch.rand(d // 2)} for _ in range(n_shards)]
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach()
        if "q_proj" in name or "k_proj" in name:  # rows (0, D/2), (1, D/2 + 1) -> side by side
            tensor = tensor.view(-1, 2, d // 2, tensor.shape[1]).transpose(1, 2).reshape(
                tensor.shape)
        name = name.removeprefix("model.")
        for theirs, metas in names.items():
            name = name.replace(theirs, metas)
        dim = cut.get(name.split(".")[-2])
        for k, shard in enumerate(shards):
            shard[name] = (tensor if dim is None else tensor.chunk(n_shards, dim)[k]).clone()
    for k, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{k:02d}.pth")
    params = {"dim": c.hidden_size, "n_layers": c.num_hidden_layers,
              "n_heads": c.num_attention_heads, "multiple_of": 16, "norm_eps": c.rms_norm_eps,
              "vocab_size": -1, "ffn_dim_multiplier": c.intermediate_size / (8 * c.hidden_size / 3)}
    if c.num_key_value_heads != c.num_attention_heads:
        params["n_kv_heads"] = c.num_key_value_heads
    (folder / "params.json").write_text(json.dumps(params))


# --------------------------------------------------------------------------------------- IDEFICS

FAKE, IMAGE, END = "<fake_token_around_image>", "<image>", "<end_of_utterance>"


def hf_idefics(folder: Path, *, instruct: bool = True, seed: int = 0,
               dtype: torch.dtype = torch.float32, **changes) -> IdeficsForVisionText2Text:
    """An IDEFICS of every real choice (norms, ReLU, head_dim of its own), in small, saved."""
    n = write_tokenizer(folder)
    added = [FAKE, IMAGE, *([END] if instruct else [])]
    config = IdeficsConfig(**dict(
        vocab_size=n, additional_vocab_size=len(added), hidden_size=64, intermediate_size=160,
        num_hidden_layers=8, num_attention_heads=4, cross_layer_interval=4, qk_layer_norms=True,
        use_resampler=True, alpha_type="float", max_position_embeddings=256,
        vision_config=dict(embed_dim=40, image_size=28, patch_size=14, num_hidden_layers=2,
                           num_attention_heads=2, intermediate_size=80, hidden_act="gelu"),
        perceiver_config=dict(use_resampler=True, resampler_n_latents=6, resampler_depth=2,
                              resampler_n_heads=4, resampler_head_dim=12,
                              qk_layer_norms_perceiver=True)) | changes)
    torch.manual_seed(seed)
    model = shake(IdeficsForVisionText2Text(config), seed).to(dtype)
    model.save_pretrained(folder)
    (folder / "added_tokens.json").write_text(json.dumps(
        {name: n + i for i, name in enumerate(added)}))
    return model


def picture(seed: int, height: int = 28, width: int = 28) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
