"""Laws of model folders: what was saved is loaded bit for bit, or the mistake is named.

pytest tests/test_weights.py
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel

import sample
import weights
import world
from tests import checkpoints
from tokenizer import Tokenizer, train_tokenizer
from vision import ResamplerConfig
from weights import FILES, assemble, load_model, save_model

CAT = Path(weights.__file__).parent / "cat.jpg"

RESAMPLER = ResamplerConfig(n_latents=3, n_layers=1, n_heads=2, head_dim=16, hidden_dim=48)
MODELS = {
    "captions": dict(n_kv_heads=1),
    "resampler": dict(resampler=RESAMPLER, contrastive_dim=8),
    "all pictures": dict(visible_images="all", max_images=3, cross_attn_mlp=True),
}


@pytest.fixture
def folder(tmp_path, tiny_model, tokenizer):
    model = tiny_model()
    save_model(tmp_path / "model", model.config, model.state_dict(), tokenizer)
    return tmp_path / "model"


def change_config(folder, change):
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder, match):
    """load_model gives up with one line in which `match` is found."""
    with pytest.raises(ValueError, match=match) as error:
        load_model(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_what_was_saved_is_loaded_bit_for_bit(tmp_path, tiny_model, tokenizer, changes):
    model = tiny_model(**changes)
    save_model(tmp_path / "out" / "model", model.config, model.state_dict(), tokenizer)
    loaded, its_tokenizer = load_model(tmp_path / "out" / "model")
    assert loaded.config == model.config and not loaded.training
    assert its_tokenizer.model_bytes == tokenizer.model_bytes
    before, after = model.state_dict(), loaded.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())


def test_the_file_holds_our_own_names_and_nothing_else(folder, tiny_model):
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert set(load_file(folder / "model.safetensors")) == set(tiny_model().state_dict())


def test_saving_again_replaces_the_whole_model(folder, tiny_model, tmp_path):
    train_tokenizer(world.corpus(20), tmp_path / "other.model", vocab_size=320)
    other = Tokenizer(tmp_path / "other.model")
    model = tiny_model(seed=1, n_kv_heads=1, vocab_size=other.vocab_size)
    save_model(str(folder), model.config, model.state_dict(), other)
    loaded, its_tokenizer = load_model(str(folder))
    assert torch.equal(loaded.embed, model.embed) and loaded.config == model.config
    assert its_tokenizer.model_bytes == other.model_bytes


def test_weights_are_loaded_in_the_dtype_asked_for(folder, tiny_model):
    loaded, _ = load_model(folder, dtype="bf16")
    for name, parameter in tiny_model().named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.bfloat16())
    change_tensors(folder, lambda x: x.update({k: v.bfloat16() for k, v in x.items()}))
    assert load_model(folder)[0].embed.dtype == torch.bfloat16  # unless asked: as in the file
    for name in ("fp32", "float32"):
        assert load_model(folder, dtype=name)[0].embed.dtype == torch.float32


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert str(folder) in refused(folder, f"is no model folder: {name} is missing")


def test_a_missing_folder_is_named(tmp_path):
    assert str(tmp_path / "nothing") in refused(tmp_path / "nothing", "no such folder")


@pytest.mark.parametrize("damage", [
    lambda data: b"",
    lambda data: data[:7],
    lambda data: data[:60],  # within the table of names
    lambda data: data[:-1],
    lambda data: data + b"\0",
    lambda data: b"\xff" * 8 + data[8:],  # a table of 16 exabytes
    lambda data: b"<html>404 Not Found</html>",
])
def test_a_damaged_file_of_weights_is_named(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert refused(folder, "damaged or cut off").startswith(f"{path}: ")


@pytest.mark.parametrize("text", ["", "{", "dim: 32", '{"vision": }'])
def test_a_config_that_is_no_json_is_named(folder, text):
    (folder / "config.json").write_text(text)
    assert refused(folder, "not JSON").startswith(f"{folder / 'config.json'}: ")


@pytest.mark.parametrize("part, kind", [
    (None, "ModelConfig"), ("vision", "VisionConfig"), ("decoder", "DecoderConfig"),
])
def test_an_unknown_key_of_a_config_is_named(folder, part, kind):
    change_config(folder, lambda x: (x[part] if part else x).update(n_layer=3))
    refused(folder, f"{kind}.*'n_layer'")


def test_an_unknown_key_of_the_resampler_is_named(tmp_path, tiny_model, tokenizer):
    model = tiny_model(resampler=RESAMPLER)
    save_model(tmp_path, model.config, model.state_dict(), tokenizer)
    change_config(tmp_path, lambda x: x["resampler"].update(depth=3))
    refused(tmp_path, "ResamplerConfig.*'depth'")


def test_a_missing_part_and_an_impossible_value_of_a_config_are_named(folder):
    change_config(folder, lambda x: x["decoder"].update(n_kv_heads=3))
    refused(folder, "n_kv_heads 3 must divide n_heads 2")
    change_config(folder, lambda x: x.pop("decoder"))
    refused(folder, "'decoder'")


@pytest.mark.parametrize("change, says", [
    (lambda x: x["decoder"].update(dim="128"), "DecoderConfig.dim must be int, not '128'"),
    (lambda x: x["decoder"].update(dim=-128), "DecoderConfig.dim must not be negative, got -128"),
    (lambda x: x["vision"].update(n_heads=0), "VisionConfig.n_heads must be above 0"),
    (lambda x: x["decoder"].update(n_layers=True), "n_layers must be int, not True"),
    (lambda x: x["vision"].update(mean=[0.5]), "VisionConfig.mean must be a list of 3"),
    (lambda x: x["vision"].update(patch_size=0), "must be a multiple of patch_size 0"),
    (lambda x: x.update(decoder=None), "DecoderConfig must be an object, not None"),
])
def test_a_value_of_the_wrong_type_is_named_with_its_file(folder, change, says):
    change_config(folder, change)
    assert refused(folder, says).startswith(f"{folder / 'config.json'}: ")


NAMES = ["embed", "vision.patch_embed.weight", "blocks.1.attn.q_proj.weight"]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_named(folder, name):
    change_tensors(folder, lambda x: x.pop(name))
    assert str(folder / "model.safetensors") in refused(folder, f"tensor {name} is missing")


@pytest.mark.parametrize("name", ["lm_head", "blocks.2.attn.q_proj.weight"])
def test_a_tensor_that_is_left_over_is_named(folder, name):
    change_tensors(folder, lambda x: x.update({name: torch.zeros(3)}))
    assert str(folder / "model.safetensors") in refused(folder, f"tensor {name} is not part of")


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder, tiny_model, name):
    right = tuple(tiny_model().state_dict()[name].shape)
    change_tensors(folder, lambda x: x.update({name: x[name][1:].clone()}))
    message = refused(folder, f"tensor {name} has shape")
    assert str((right[0] - 1, *right[1:])) in message and str(right) in message


def test_a_config_of_another_model_does_not_load_the_tensors_that_happen_to_fit(folder):
    change_config(folder, lambda x: x["decoder"].update(n_layers=4))
    refused(folder, r"tensor blocks\.2\..* is missing")


def test_a_tokenizer_of_another_size_is_refused_with_both_sizes(folder, tokenizer):
    train_tokenizer(world.corpus(20), folder / "tokenizer.model", vocab_size=320)
    other = Tokenizer(folder / "tokenizer.model").vocab_size
    assert other != tokenizer.vocab_size
    assert str(folder) in refused(folder, f"{other} pieces.* {tokenizer.vocab_size}: they do not")


def test_a_file_that_is_no_tokenizer_is_named(folder):
    (folder / "tokenizer.model").write_bytes(b"<html>404 Not Found</html>")
    assert str(folder / "tokenizer.model") in refused(folder, "not a SentencePiece model")


# ---------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file or folder of every layout."""
    place = tmp_path_factory.mktemp("published")
    clip = checkpoints.hf_clip()
    checkpoints.write_torchscript(place / "ViT.pt", clip)
    checkpoints.write_openclip(place / "openclip", clip, quick_gelu=True)
    clip.save_pretrained(place / "clip")
    CLIPVisionModel.from_pretrained(place / "clip").save_pretrained(place / "tower")
    llama = checkpoints.hf_llama(place / "llama", shard="100KB", dtype=torch.float16)
    shutil.copytree(place / "llama", place / "llama-bin")
    checkpoints.as_bin_shards(place / "llama-bin")
    for n in (1, 2):
        checkpoints.write_meta(place / f"meta-{n}", llama, n)
    shutil.copy(place / "llama" / "tokenizer.model", place)  # one level up, as Meta has it
    checkpoints.hf_idefics(place / "idefics")
    model, tokenizer = load_model(place / "idefics")
    save_model(place / "ours", model.config, model.state_dict(), tokenizer)
    save_model(place / "shards", model.config, model.state_dict(), tokenizer, shard_bytes=10**6)
    return place


CLIP_N, IDEFICS_N = 430_784, 601_188


@pytest.mark.parametrize("name, title, n, dtype", [
    ("ViT.pt", "CLIP, OpenAI's or OpenCLIP's names", CLIP_N, "float16"),
    ("openclip", "CLIP, OpenAI's or OpenCLIP's names", CLIP_N, "float32 100 %"),
    ("clip", "CLIP, Hugging Face names", CLIP_N, "float32 100 %"),
    ("tower", "CLIP, Hugging Face names", CLIP_N - 48 * 128, "float32 100 %"),
    ("llama", "LLaMA, Hugging Face files", None, "float16 100 %"),
    ("llama-bin", "LLaMA, Hugging Face files", None, "float16 100 %"),
    ("meta-1", "LLaMA, Meta's files", None, "float16 100 %"),
    ("meta-2", "LLaMA, Meta's files", None, "float16 100 %"),
    ("idefics", "IDEFICS", IDEFICS_N, "float32 100 %"),
    ("ours", "nanovilla", IDEFICS_N, "float32 100 %"),
    ("shards", "nanovilla", IDEFICS_N, "float32 100 %"),
])
def test_inspect_says_what_stands_in_every_layout(published, cli, name, title, n, dtype):
    code, out, err = cli(weights, "inspect", published / name)
    assert (code, err) == (0, "") and f"{name}: {title}\n" in out and dtype in out
    checkpoint = weights.read_checkpoint(published / name)
    total = sum(t.numel() for t in checkpoint.state.values())
    assert f"parameters  {total:,} (" in out and (n is None or total == n)
    assert "unknown     0" in out and f"ignored     {len(checkpoint.ignored)}" in out
    for part in ("vision", "decoder", "resampler"):
        has = {"vision": checkpoint.has("vision"), "decoder": checkpoint.has("blocks"),
               "resampler": checkpoint.parts is None}[part]
        assert (f"\n{part}  " in out) == has
    assert all(len(line) <= 120 for line in out.splitlines())


def test_inspect_lists_what_it_ignores_and_what_nobody_knows(published, cli, tmp_path):
    tensors = checkpoints.openai_names(checkpoints.hf_clip()) | {"visual.extra": torch.ones(2)}
    torch.save(tensors, tmp_path / "metaclip.pt")
    _, out, _ = cli(weights, "inspect", tmp_path / "metaclip.pt")
    assert "unknown     1\n  visual.extra" in out and "  logit_scale\n" in out
    with pytest.raises(ValueError, match="metaclip.pt: tensor visual.extra is not part of CLIP"):
        weights.read_checkpoint(tmp_path / "metaclip.pt").check()


@pytest.mark.parametrize("sources", [
    ("ViT.pt", "llama"), ("llama-bin", "openclip"), ("clip", "meta-1"), ("meta-2", "tower"),
    ("idefics",), ("shards",),
], ids=" ".join)
def test_whatever_is_converted_can_be_asked(published, cli, tmp_path, sources):
    folder = tmp_path / "new"
    code, out, err = cli(weights, "convert", *(published / s for s in sources), folder)
    assert code == 0 and "parameters" in out, err
    code, out, err = cli(sample, "--model", folder, "--image", CAT, "--prompt", "hello",
                         "--max-new-tokens", 4, "--json")
    answer = json.loads(out)
    assert code == 0 and 1 <= len(answer["tokens"]) <= 4, err
    if len(sources) == 2:
        model, _ = load_model(folder)
        assert all(not g.any() for n, g in model.named_parameters() if n.endswith("_gate"))


def test_a_published_whole_model_is_asked_as_it_lies(published, cli):
    code, out, _ = cli(sample, "--model", published / "idefics", "--image", CAT, "--image", CAT,
                       "--prompt", "what is it?", "--max-new-tokens", 4)
    assert code == 0 and out


def test_dtype_and_corrections_are_in_the_new_folder(published, cli, tmp_path):
    cli(weights, "convert", published / "ViT.pt", published / "llama", tmp_path / "newer",
        "--dtype", "bfloat16", "--set", "decoder.norm_eps=0.001", "--set",
        "vision.activation=gelu")
    model, _ = load_model(tmp_path / "newer")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.decoder.norm_eps == 0.001 and model.config.vision.activation == "gelu"


BAD = [
    (["ViT.pt"], "half a model"),
    (["ViT.pt", "clip"], "where a LLaMA is needed"),
    (["llama", "llama"], "where a CLIP is needed"),
    (["idefics", "llama"], "where a CLIP is needed"),
    (["nothing", "llama"], "no such folder or file"),
    (["ViT.pt", "llama", "clip"], "3 sources"),
    (["ViT.pt", "llama", "--set", "decoder.norm=1"], "decoder.norm: no such field"),
    (["ViT.pt", "llama", "--set", "norm_eps=1"], "--set norm_eps=1: write PART.FIELD=VALUE"),
    (["ViT.pt", "llama", "--set", "decoder.dim=wide"], "DecoderConfig.dim must be int"),
    (["ViT.pt", "llama", "--set", "decoder.norm_eps=NaN"], "norm_eps must be a finite number"),
    (["ViT.pt", "llama", "--set", "decoder.rope_theta=Infinity"], "must be a finite number"),
    (["ViT.pt", "llama", "--set", "decoder.dim=65"],
     "tensor model.layers.0.self_attn.k_proj.weight (our blocks.0.attn.k_proj.weight) has shape "
     "(64, 64), the model's is (64, 65)"),
    (["ViT.pt", "llama", "--set", "decoder.n_layers=5", "--set", "decoder.cross_attn_every=5"],
     "tensor model.layers.4.self_attn.k_proj.weight (our blocks.4.attn.k_proj.weight) is missing"),
    (["ViT.pt", "llama", "--set", "decoder.n_layers=3", "--set", "decoder.cross_attn_every=3"],
     "tensor model.layers.3.self_attn.k_proj.weight (our blocks.3.attn.k_proj.weight) is not part"),
]


@pytest.mark.parametrize("arguments, says", BAD, ids=[" ".join(a) for a, _ in BAD])
def test_what_cannot_be_converted_is_one_line_and_writes_nothing(published, cli, tmp_path,
                                                                 arguments, says):
    n = next((i for i, a in enumerate(arguments) if a.startswith("--")), len(arguments))
    sources = [published / name for name in arguments[:n]]
    code, out, err = cli(weights, "convert", *sources, tmp_path / "new", *arguments[n:])
    assert (code, out) == (2, "") and err.count("\n") == 1 and says in err
    assert not (tmp_path / "new").exists()


def test_inspect_tells_what_is_missing_or_misshapen(published, cli, tmp_path):
    shutil.copytree(published / "llama", tmp_path / "llama")
    values = json.loads((tmp_path / "llama" / "config.json").read_text())
    (tmp_path / "llama" / "config.json").write_text(json.dumps(
        values | {"num_hidden_layers": 5, "intermediate_size": 161}))
    code, out, _ = cli(weights, "inspect", tmp_path / "llama")
    assert code == 0 and "missing     9\n" in out and "misshapen   12\n" in out


def test_only_floating_point_weights_are_taken(published, tmp_path):
    tensors = checkpoints.openai_names(checkpoints.hf_clip())
    tensors["visual.proj"] = tensors["visual.proj"].char()
    torch.save(tensors, tmp_path / "openai.pt")
    with pytest.raises(ValueError, match="visual.proj .* is torch.int8; only plain floating"):
        weights.read_checkpoint(tmp_path / "openai.pt").check()


def test_idefics_without_names_for_its_special_tokens_is_refused(published, tmp_path):
    shutil.copytree(published / "idefics", tmp_path / "idefics")
    (tmp_path / "idefics" / "added_tokens.json").unlink()
    with pytest.raises(ValueError, match="do not belong|added_tokens.json"):
        load_model(tmp_path / "idefics")


def test_a_folder_that_cannot_be_written_is_one_line(published, cli):
    code, _, err = cli(weights, "convert", published / "idefics", "/proc/nowhere/x")
    assert code == 2 and "cannot be written" in err and err.count("\n") == 1


def test_a_folder_that_is_there_is_not_written_into(published, cli, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    code, _, err = cli(weights, "convert", published / "idefics", tmp_path)
    assert code == 2 and "is there already" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_half_a_model_cannot_be_asked(published, cli):
    code, _, err = cli(sample, "--model", published / "llama", "--prompt", "hello")
    assert code == 2 and "python weights.py convert CLIP LLAMA NEW_FOLDER" in err


def test_a_published_folder_without_or_with_another_tokenizer_is_refused(published, tmp_path):
    shutil.copytree(published / "llama", tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="llama: tokenizer.model is missing"):
        assemble(published / "ViT.pt", tmp_path / "llama")
    shutil.copy(Path(weights.BUILT_IN) / "tokenizer.model", tmp_path / "llama")
    with pytest.raises(ValueError, match="501 pieces, the weights have 330: they do not belong"):
        assemble(published / "ViT.pt", tmp_path / "llama")


def test_a_table_far_larger_than_the_tokenizer_is_refused(published, tmp_path):
    checkpoints.hf_llama(tmp_path / "filled", vocab_size=384)  # up to a multiple of 64
    model, tokenizer = assemble(published / "ViT.pt", tmp_path / "filled")
    assert tokenizer.image_id == model.config.decoder.vocab_size == 384
    assert {330, 383, 384} < set(tokenizer.picture_ids)  # never written
    for n in (331, 383, 330 + 128, 512):
        checkpoints.hf_llama(tmp_path / str(n), vocab_size=n)
        with pytest.raises(ValueError, match=f"330 pieces, the weights have {n}: they do not"):
            assemble(published / "ViT.pt", tmp_path / str(n))


# ------------------------------------------------------------------- published files, word by word


def of_parts(out: str) -> dict[str, int]:
    """The parameters by part of what `inspect` prints."""
    lines = out.splitlines()
    rows = (line.split() for line in lines[2:] if line.startswith("  ") and line[-1].isdigit())
    return {name: int(n.replace(",", "")) for name, n in (r for r in rows if len(r) == 2)
            if name.isidentifier()}


WHOLE = {"vision", "resampler", "decoder", "cross_blocks", "special_embed", "special_head"}


@pytest.mark.parametrize("name, parts", [
    ("ViT.pt", {"vision"}), ("openclip", {"vision"}), ("clip", {"vision"}), ("tower", {"vision"}),
    ("llama", {"decoder"}), ("llama-bin", {"decoder"}), ("meta-1", {"decoder"}),
    ("meta-2", {"decoder"}), ("idefics", WHOLE), ("ours", WHOLE), ("shards", WHOLE),
])
def test_parts_of_an_inspection_add_up_to_its_parameters(published, cli, name, parts):
    out = cli(weights, "inspect", published / name)[1]
    counts = of_parts(out)
    assert set(counts) == parts and all(n > 0 for n in counts.values())
    assert f"parameters  {sum(counts.values()):,} (" in out


def test_the_same_weights_are_as_many_in_every_layout(published, cli):
    def counted(name: str) -> dict[str, int]:
        return of_parts(cli(weights, "inspect", published / name)[1])

    assert counted("ViT.pt") == counted("openclip") == counted("clip")
    assert counted("llama") == counted("llama-bin") == counted("meta-1") == counted("meta-2")
    assert counted("idefics") == counted("ours") == counted("shards")


@pytest.mark.parametrize("name, ignored", [
    ("ViT.pt", ["context_length", "input_resolution", "vocab_size", "logit_scale",
                "positional_embedding", "transformer.resblocks.N.ln_1.weight"]),
    ("clip", ["logit_scale", "text_projection.weight"]),
    ("llama-bin", ["model.layers.N.self_attn.rotary_emb.inv_freq"]), ("meta-2", ["rope.freqs"]),
])
def test_what_is_ignored_is_listed_by_name_and_no_weight_of_ours_is(published, cli, name, ignored):
    out = cli(weights, "inspect", published / name)[1]
    listed = out[out.index("\nignored ") : out.index("\nunknown ")].splitlines()[2:]
    assert set(ignored) <= {line.split()[0] for line in listed}
    assert not any(line.strip().startswith(("visual.", "vision_model.")) for line in listed)


@pytest.mark.parametrize("name, share", [("ViT.pt", "float16"), ("openclip", "float32 100 %")])
def test_the_share_of_each_dtype_is_said(published, cli, name, share):
    line = cli(weights, "inspect", published / name)[1].splitlines()[1]
    shares = [float(part.split()[1]) for part in line[line.index("(") + 1 : -1].split(", ")]
    assert share in line and sum(shares) == pytest.approx(100, abs=0.1)


LLAMAS = ("llama", "llama-bin", "meta-1", "meta-2")


@pytest.mark.parametrize("clip", ["ViT.pt", "openclip", "clip", "tower"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_parts_in_either_order_and_any_dtype_make_the_same_folder(published, cli, tmp_path, clip,
                                                                  dtype):
    llama = LLAMAS[["ViT.pt", "openclip", "clip", "tower"].index(clip)]
    sources, changes = [published / clip, published / llama], ["--set", "decoder.norm_eps=0.01"]
    for name, given in (("one", sources), ("other", sources[::-1])):
        code, out, err = cli(weights, "convert", *given, tmp_path / name, "--dtype", dtype,
                             *changes)
        assert (code, err) == (0, "") and out.endswith(f" parameters, {dtype}\n")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys() and {t.dtype for t in one.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    for name in ("config.json", "tokenizer.model"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert json.loads((tmp_path / "one" / "config.json").read_text())["decoder"]["norm_eps"] == 0.01
    whole = weights.read_checkpoint(published / llama).state
    assert all(torch.equal(one[name], t.to(one[name].dtype)) for name, t in whole.items())


def test_a_converted_whole_model_is_the_same_model(published, cli, tmp_path):
    for name in ("idefics", "ours", "shards"):
        code, out, _ = cli(weights, "convert", published / name, tmp_path / name)
        assert code == 0 and out == f"{tmp_path / name}: {IDEFICS_N:,} parameters, float32\n"
        before, after = (load_model(place / name) for place in (published, tmp_path))
        assert before[0].config == after[0].config
        for tensor, again in zip(before[0].state_dict().values(), after[0].state_dict().values(),
                                 strict=True):
            assert torch.equal(tensor, again)


def test_the_folder_and_what_it_was_made_from_give_the_same_answer(published, cli, tmp_path):
    cli(weights, "convert", published / "idefics", tmp_path / "new")
    question = ["--image", CAT, "--prompt", "hi", "--max-new-tokens", 4, "--json"]
    answers = [json.loads(cli(sample, "--model", folder, *question)[1])
               for folder in (published / "idefics", tmp_path / "new")]
    assert answers[0]["tokens"] == answers[1]["tokens"] != [] and answers[0]["prompt"] == "hi"
    assert answers[0]["answer"] == answers[1]["answer"]


def test_a_consolidated_safetensors_as_mistral_has_it_is_metas_file_and_stays_as_it_is(
    published, tmp_path
):
    shutil.copy(published / "meta-1" / "params.json", tmp_path)
    file = tmp_path / "consolidated.safetensors"
    save_file(weights.read_tensors(published / "meta-1"), file)
    before = file.read_bytes()
    found, wanted = map(weights.read_checkpoint, (tmp_path, published / "meta-1"))
    assert found.title == wanted.title and found.config.decoder == wanted.config.decoder
    assert found.state.keys() == wanted.state.keys() and file.read_bytes() == before
    assert all(torch.equal(tensor, wanted.state[name]) for name, tensor in found.state.items())


def change(source: Path, folder: Path, what: str) -> Path:
    """A copy of a LLaMA's folder with one thing wrong."""
    shutil.copytree(source, folder)
    file = folder / ("params.json" if (folder / "params.json").is_file() else "config.json")
    values, tokenizer = json.loads(file.read_text()), folder / "tokenizer.model"
    tensors = {name: t.clone() for part in folder.glob("*.safetensors")
               for name, t in load_file(part).items()}
    if what in CONFIGS:
        file.write_text(json.dumps(values | CONFIGS[what]))
    elif what == "no tokenizer":
        tokenizer.unlink()
    elif what == "other tokenizer":
        shutil.copy(weights.BUILT_IN / "tokenizer.model", tokenizer)
    elif what == "no config":
        file.unlink()
    else:
        {"unknown key": lambda: tensors.update({"model.layers.0.self_attn.q_norm": torch.ones(2)}),
         "missing key": lambda: tensors.pop("model.norm.weight"),
         "wrong shape": lambda: tensors.update({"model.norm.weight": torch.ones(63)}),
         "integers": lambda: tensors.update({"model.norm.weight": torch.ones(64).int()}),
         }[what]()
        for old in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
            old.unlink()
        save_file(tensors, folder / "model.safetensors")
    return folder


CONFIGS = {
    "gemma": dict(model_type="gemma"),
    "llama3": dict(rope_parameters={"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}),
    "llama3 of old": dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}),
    "scaled": dict(use_scaled_rope=True),
    "half a layer": dict(num_hidden_layers=2.5), "no layer": dict(num_hidden_layers=0),
    "no heads": dict(num_attention_heads=0), "three heads": dict(num_attention_heads=3),
    "words": dict(rope_parameters={"rope_theta": "far"}), "null": dict(hidden_size=None),
}
WRONG = [
    ("gemma", "llama", "config.json: model_type 'gemma'"),
    ("llama3", "llama", "config.json: rope_type 'llama3'"),
    ("llama3 of old", "llama", "config.json: rope_type 'linear'"),
    ("scaled", "meta-1", "params.json: use_scaled_rope"),
    ("half a layer", "llama", "changed: "), ("no layer", "llama", "changed: "),
    ("no heads", "llama", "changed: "), ("three heads", "llama", "changed: "),
    ("words", "llama", "changed: "), ("null", "llama", "changed: "),
    ("no tokenizer", "llama", "changed: tokenizer.model is missing"),
    ("other tokenizer", "llama", "501 pieces, the weights have 330: they do not belong together"),
    ("no config", "llama", "config.json: is missing"),
    ("no config", "meta-2", "params.json: is missing"),
    ("unknown key", "llama", "tensor model.layers.0.self_attn.q_norm is not part of LLaMA"),
    ("missing key", "llama", "tensor model.norm.weight (our norm.weight) is missing"),
    ("wrong shape", "llama",
     "tensor model.norm.weight (our norm.weight) has shape (63,), the model's is (64,)"),
    ("integers", "llama", "tensor model.norm.weight (our norm.weight) is torch.int32"),
]


@pytest.mark.parametrize("what, source, says", WRONG, ids=[f"{w} {s}" for w, s, _ in WRONG])
def test_a_llama_that_is_not_as_it_should_be_is_one_line_and_writes_nothing(
    published, cli, tmp_path, what, source, says
):
    llama = change(published / source, tmp_path / "in" / "changed", what)
    code, out, err = cli(weights, "convert", published / "ViT.pt", llama, tmp_path / "new")
    assert (code, out, err.count("\n")) == (2, "", 1) and says in err
    assert err.startswith("weights.py: ") and "Traceback" not in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", [
    "decoder.norm_eps=", "decoder.norm_eps=small", "decoder.n_heads=0", "decoder.n_heads=2.5",
    "decoder.=1", "decoder.norm.eps=1", "vision.activation=swish", "vision.mean=[1,2]",
    "vision.dim=null", "decoder.n_layers=-4", "decoder.cross_attn_every=3", "vision=3", "=", "",
    "chat.x=1", "decoder.norm_eps=NaN", "decoder.rope_theta=Infinity",
])
def test_a_correction_that_cannot_be_is_one_line_and_writes_nothing(published, cli, tmp_path, text):
    code, out, err = cli(weights, "convert", published / "ViT.pt", published / "llama",
                         tmp_path / "new", "--set", text)
    assert (code, out, err.count("\n")) == (2, "", 1) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("place", ["file", "file/new", "full", "/proc/nowhere/new"])
def test_a_place_that_cannot_be_written_is_one_line_and_stays(published, cli, tmp_path, place):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("precious")
    code, out, err = cli(weights, "convert", published / "ViT.pt", published / "llama",
                         tmp_path / place)
    assert (code, out, err.count("\n")) == (2, "", 1) and place in err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["config.json", "file", "full"]
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("name, says", [
    ("ViT.pt", "is a file, no folder"), ("meta-1", "config.json is missing"),
    ("clip", "half a model"), ("llama-bin", "half a model"), ("nothing", "no such folder"),
])
def test_what_is_no_whole_model_is_not_asked(published, cli, name, says):
    code, out, err = cli(sample, "--model", published / name, "--prompt", "hi")
    assert (code, out, err.count("\n")) == (2, "", 1) and says in err
