"""Laws of published weights: in every layout they give transformers' numbers, in our own modules.

pytest tests/test_published.py

Small random checkpoints, saved by transformers or written by hand (tests/checkpoints.py).
"""

import json
import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionModel, CLIPVisionModelWithProjection

from beams import beam_search
from data import encode, pixels, prompts
from documents import Image as Picture
from documents import Text, chat_document
from generate import generate
from kernels import rope_table
from tests import checkpoints
from tests.parity import in_dtype, our_logits
from vision import VisionConfig, preprocess
from weights import assemble, load_model, read_checkpoint, save_model

CPU = torch.device("cpu")
CLOSE = 1e-5
WORDS = "what is in the picture? a red cat sits on the mat, zwei Vögel"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One of everything: CLIP in all layouts, LLaMA with grouped heads in all, IDEFICS."""
    place = tmp_path_factory.mktemp("published")
    clip = checkpoints.hf_clip()
    checkpoints.write_torchscript(place / "ViT.pt", clip, half=False)
    checkpoints.write_openclip(place / "openclip-bin", clip, quick_gelu=True)
    checkpoints.write_openclip(place / "openclip", clip, "safetensors", quick_gelu=True)
    clip.save_pretrained(place / "clip")
    for name, kind in (("tower", CLIPVisionModel), ("projected", CLIPVisionModelWithProjection)):
        kind.from_pretrained(place / "clip").save_pretrained(place / name)
    llama = checkpoints.hf_llama(place / "llama", num_key_value_heads=2, rms_norm_eps=1e-3,
                                 rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    shutil.copytree(place / "llama", place / "llama-bin")
    checkpoints.as_bin_shards(place / "llama-bin")
    for n in (1, 2):
        checkpoints.write_meta(place / f"meta-{n}", llama, n)
        change(place / f"meta-{n}" / "params.json", rope_theta=500.0)
        shutil.copy(place / "llama" / "tokenizer.model", place / f"meta-{n}")
    idefics = checkpoints.hf_idefics(place / "idefics")
    return place, clip, llama, idefics


def change(path, remove=(), **values):
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in remove}
    path.write_text(json.dumps(config | values))


def picture_batch(*seeds) -> torch.Tensor:
    return torch.stack([torch.from_numpy(checkpoints.picture(seed)).permute(2, 0, 1)
                        for seed in seeds])


def text_batch(model, tokenizer, text=WORDS):
    return prompts([[Text(text)]], tokenizer, model.config, CPU)


# ------------------------------------------------------------------------------------------- CLIP


CLIP_FILES = ("ViT.pt", "openclip-bin", "openclip", "clip", "projected")


@pytest.mark.parametrize("name", CLIP_FILES)
def test_clip_gives_the_tokens_and_the_pooled_feature_of_transformers(files, name):
    place, clip, _, _ = files
    model, _ = assemble(place / name, place / "llama")
    images = picture_batch(1, 2, 3)
    with torch.no_grad():
        tokens, pooled = model.vision(images)
        theirs = clip.vision_model(model.vision.normalise(images))
        projected = clip.visual_projection(theirs.pooler_output)
    assert (tokens.unflatten(0, (3, -1)) - theirs.last_hidden_state[:, 1:]).abs().max() < CLOSE
    assert (pooled - projected).abs().max() < CLOSE


def test_a_tower_without_projection_pools_without_one(files):
    place, clip, _, _ = files
    tower = read_checkpoint(place / "tower").check()
    assert tower.config.vision.embed_dim is None and "vision.proj.weight" not in tower.state
    model, _ = assemble(place / "tower", place / "llama")
    images = picture_batch(4)
    with torch.no_grad():
        theirs = clip.vision_model(model.vision.normalise(images)).pooler_output
        assert (model.vision(images)[1] - theirs).abs().max() < CLOSE


def test_the_same_clip_is_the_same_in_every_layout(files, tmp_path):
    place, clip, _, _ = files
    wrapped = {f"module.{k}": v for k, v in checkpoints.openai_names(clip).items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "laion400m.pt")
    first = read_checkpoint(place / "ViT.pt").check()
    for path in (*(place / name for name in CLIP_FILES[1:]), tmp_path / "laion400m.pt"):
        other = read_checkpoint(path).check()
        assert other.state.keys() == first.state.keys()
        assert all(torch.equal(other.state[name], first.state[name]) for name in first.state)
    assert read_checkpoint(place / "clip").config.vision == first.config.vision


def test_an_archive_of_mixed_dtypes_is_given_one(files, tmp_path):
    place, clip, _, _ = files
    checkpoints.write_torchscript(tmp_path / "ViT.pt", clip, half=True)
    dtypes = {t.dtype for t in read_checkpoint(tmp_path / "ViT.pt").state.values()}
    assert dtypes == {torch.float16, torch.float32}
    model, _ = assemble(tmp_path / "ViT.pt", place / "llama")
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # the LLaMA's
    apart, _ = assemble(tmp_path / "ViT.pt", place / "llama", one_dtype=False)
    assert {p.dtype for p in apart.vision.parameters()} == {torch.float16, torch.float32}


def test_heads_need_not_be_64_wide(files, tmp_path):
    place, _, _, _ = files
    wide = checkpoints.hf_clip("gelu", hidden_size=160, num_attention_heads=2)
    checkpoints.write_openclip(tmp_path / "h14", wide)
    vision = assemble(tmp_path / "h14", place / "llama")[0].vision
    assert vision.config.head_dim == 80 and vision.config.activation == "gelu"
    images = picture_batch(5)
    with torch.no_grad():
        theirs = wide.vision_model(vision.normalise(images)).last_hidden_state[0, 1:]
        assert (vision(images)[0] - theirs).abs().max() < CLOSE


@pytest.mark.parametrize("tag, activation, mean, resize", [
    ("vit_l_14-laion400m_e32-3d133497", "gelu", 0.481, "crop"),
    ("ViT-L-14-laion2B-s32B-b82K", "gelu", 0.5, "crop"),
    ("ViT-L-14-DataComp.XL-s13B-b90K", "gelu", 0.481, "crop"),
    ("vit_l14_dfn2b_s39b", "gelu", 0.481, "crop"),
    ("DFN2B-CLIP-ViT-L-14", "quick_gelu", 0.481, "crop"),
    ("DFN2B-CLIP-ViT-L-14-39B", "gelu", 0.481, "crop"),
    ("DFN5B-CLIP-ViT-H-14", "quick_gelu", 0.481, "squash"),
    ("metaclip_fullcc", "quick_gelu", 0.481, "crop"),
])
def test_without_a_config_the_tag_says_how_it_was_trained(files, tmp_path, tag, activation, mean,
                                                         resize):
    torch.save(checkpoints.openai_names(files[1]), tmp_path / f"{tag}.bin")
    v = read_checkpoint(tmp_path / f"{tag}.bin").config.vision
    assert (v.activation, round(v.mean[0], 3), v.resize) == (activation, mean, resize)


def test_the_config_says_it_before_any_name_does(files, tmp_path):
    folder = tmp_path / "ViT-L-14-openai"
    checkpoints.write_openclip(folder, files[1], mean=[0.5] * 3, std=[0.25] * 3,
                               resize_mode="squash", interpolation="bicubic")
    vision = read_checkpoint(folder).config.vision
    assert vision.activation == "gelu" and vision.resize == "squash"
    assert vision.mean == (0.5,) * 3 and vision.std == (0.25,) * 3


def test_a_tags_pictures_hold_where_the_config_is_silent(files, tmp_path):
    squashed, half = tmp_path / "DFN5B-CLIP-ViT-H-14", tmp_path / "CLIP-ViT-L-14-laion2B-s32B-b82K"
    for folder in (squashed, half):
        checkpoints.write_openclip(folder, files[1])
    assert read_checkpoint(squashed).config.vision.resize == "squash"
    assert read_checkpoint(half).config.vision.mean == (0.5,) * 3
    checkpoints.write_openclip(squashed, files[1], resize_mode="shortest")
    assert read_checkpoint(squashed).config.vision.resize == "crop"


@pytest.mark.parametrize("preset, says", [
    (dict(resize_mode="longest"), "resize_mode 'longest'"),
    (dict(interpolation="bilinear"), "interpolation 'bilinear'"),
])
def test_pictures_that_openclip_would_prepare_otherwise_are_refused(files, tmp_path, preset, says):
    checkpoints.write_openclip(tmp_path / "clip", files[1], **preset)
    with pytest.raises(ValueError, match=says):
        read_checkpoint(tmp_path / "clip")


def test_a_tower_that_openclip_would_build_otherwise_is_refused(files, tmp_path):
    checkpoints.write_openclip(tmp_path / "clip", files[1])
    path = tmp_path / "clip" / "open_clip_config.json"
    values = json.loads(path.read_text())
    values["model_cfg"]["vision_cfg"]["pool_type"] = "avg"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="vision_cfg's 'pool_type' is not known"):
        read_checkpoint(tmp_path / "clip")


@pytest.mark.parametrize("values, says", [
    (dict(resample=2), "resample 2"), (dict(do_normalize=False), "do_normalize False"),
    (dict(do_center_crop=False, size={"shortest_edge": 224}), "pictures of any shape"),
])
def test_a_preprocessor_out_of_reach_is_refused(files, tmp_path, values, says):
    shutil.copytree(files[0] / "clip", tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=says):
        read_checkpoint(tmp_path / "clip")


def test_the_preprocessors_means_are_the_models(files, tmp_path):
    for name in ("clip", "idefics"):
        shutil.copytree(files[0] / name, tmp_path / name)
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(
            {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2] * 3, "resample": 3}))
        vision = read_checkpoint(tmp_path / name).config.vision
        assert vision.mean == (0.5, 0.4, 0.3) and vision.std == (0.2,) * 3


def test_wide_towers_have_their_own_heads_without_a_config(files, tmp_path):
    wide = checkpoints.hf_clip("gelu", hidden_size=1280, num_attention_heads=16,
                               num_hidden_layers=1, intermediate_size=64)
    torch.save(checkpoints.openai_names(wide), tmp_path / "plain.pt")
    vision = read_checkpoint(tmp_path / "plain.pt", {"vision.activation": "gelu"}).config.vision
    assert (vision.n_heads, vision.head_dim) == (16, 80)


def test_an_activation_that_nothing_tells_is_asked_for(files, tmp_path):
    torch.save(checkpoints.openai_names(files[1]), tmp_path / "ViT-L-14.bin")
    with pytest.raises(ValueError, match="--set vision.activation=gelu"):
        read_checkpoint(tmp_path / "ViT-L-14.bin")
    told = read_checkpoint(tmp_path / "ViT-L-14.bin", {"vision.activation": "gelu"})
    assert told.config.vision.activation == "gelu"


def test_fields_that_clips_config_leaves_out_are_its_defaults(files, tmp_path):
    shutil.copytree(files[0] / "clip", tmp_path / "clip")
    path = tmp_path / "clip" / "config.json"
    vision = json.loads(path.read_text())["vision_config"]
    for name in ("hidden_act", "layer_norm_eps"):
        vision.pop(name)
    change(path, vision_config=vision)
    config = read_checkpoint(tmp_path / "clip").config.vision
    assert config.activation == "quick_gelu" and config.norm_eps == 1e-5


# ------------------------------------------------------------------------------------------ LLaMA


@pytest.mark.parametrize("name", ["llama", "llama-bin", "meta-1", "meta-2"])
def test_llama_gives_the_logits_of_transformers(files, name):
    place, _, llama, _ = files
    model, tokenizer = assemble(place / "ViT.pt", place / name)
    batch = text_batch(model, tokenizer)
    with torch.no_grad():
        theirs = llama(batch.tokens[None]).logits[0]
    ours = our_logits(model, batch)[:, : theirs.shape[1]]
    assert (ours - theirs).abs().max() < CLOSE


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("n_files", [1, 2, 4])
def test_metas_files_and_hugging_faces_are_the_same_weights_bit_for_bit(tmp_path, heads, n_files):
    changes = dict(num_key_value_heads=heads) if n_files < 4 else dict(num_key_value_heads=4)
    llama = checkpoints.hf_llama(tmp_path / "hf", shard="100KB", **changes)
    checkpoints.write_meta(tmp_path / "meta", llama, n_files)
    hf, meta = (read_checkpoint(tmp_path / name).check().state for name in ("hf", "meta"))
    assert hf.keys() == meta.keys() and all(torch.equal(hf[name], meta[name]) for name in hf)


def test_metas_file_is_not_changed_by_reading_it(files):
    path = files[0] / "meta-1" / "consolidated.00.pth"
    before = path.read_bytes()
    read_checkpoint(files[0] / "meta-1")
    assert path.read_bytes() == before


def test_rotary_tables_in_the_files_are_ignored_and_named(files):
    place, _, _, _ = files
    assert read_checkpoint(place / "meta-1").ignored == ["rope.freqs"]
    assert read_checkpoint(place / "llama-bin").ignored == [
        "model.layers.0.self_attn.rotary_emb.inv_freq"]


@pytest.mark.parametrize("schema, theta", [
    (dict(rope_theta=7.0), 7.0),
    (dict(rope_theta=7.0, rope_scaling=None, torch_dtype="float16"), 7.0),
    (dict(rope_parameters={"rope_type": "default", "rope_theta": 7.0}, dtype="float16"), 7.0),
    (dict(), 1e4),
])
def test_both_schemas_of_a_config_are_read(files, tmp_path, schema, theta):
    shutil.copytree(files[0] / "llama", tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    old = ("rope_parameters", "dtype", "head_dim", "num_key_value_heads")
    change(path, remove=old, num_key_value_heads=2, **schema)
    config = read_checkpoint(tmp_path / "llama").config.decoder
    assert config.rope_theta == theta and config.head_dim == 16 and config.norm_eps == 1e-3


@pytest.mark.parametrize("values, says", [
    (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_type 'linear'"),
    (dict(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5}), "rope_type 'llama3'"),
    (dict(model_type="gemma"), "model_type 'gemma'"),
    (dict(attention_bias=True), "attention_bias false"),
    (dict(num_key_value_heads=3), "llama: n_kv_heads 3 must divide"),
    (dict(num_hidden_layers=2.5), "a value of its config cannot be"),
    (dict(hidden_size="64"), "DecoderConfig.dim must be int, not '64'"),
])
def test_a_config_out_of_reach_is_refused(files, tmp_path, values, says):
    shutil.copytree(files[0] / "llama", tmp_path / "llama")
    remove = ("rope_parameters",) if "rope_scaling" in values else ()
    change(tmp_path / "llama" / "config.json", remove, **values)
    with pytest.raises(ValueError, match=says):
        read_checkpoint(tmp_path / "llama")


def test_a_missing_last_file_of_meta_is_noticed(tmp_path):
    checkpoints.write_meta(tmp_path, checkpoints.hf_llama(tmp_path / "hf"), 4)
    for number in (2, 3):
        (tmp_path / f"consolidated.0{number}.pth").unlink()
    with pytest.raises(ValueError, match="hold 32 of 64 columns; 2 times as many files"):
        read_checkpoint(tmp_path)


def test_stretched_positions_of_metas_files_are_refused(files, tmp_path):
    shutil.copytree(files[0] / "meta-1", tmp_path / "meta")
    change(tmp_path / "meta" / "params.json", use_scaled_rope=True)
    with pytest.raises(ValueError, match="use_scaled_rope"):
        read_checkpoint(tmp_path / "meta")


def test_eps_comes_from_the_file_unless_the_user_corrects_it(files):
    place, _, _, _ = files
    assert read_checkpoint(place / "meta-2").config.decoder.norm_eps == 1e-3
    corrected = read_checkpoint(place / "meta-2", {"decoder.norm_eps": 1e-5})
    assert corrected.config.decoder.norm_eps == 1e-5
    with pytest.raises(ValueError, match="decoder.eps: no such field"):
        read_checkpoint(place / "meta-2", {"decoder.eps": 1e-5})


def test_a_sliding_window_ends_what_the_model_reads(files, tmp_path):
    shutil.copytree(files[0] / "llama", tmp_path / "mistral")
    change(tmp_path / "mistral" / "config.json", model_type="mistral", sliding_window=64,
           max_position_embeddings=256)
    assert read_checkpoint(tmp_path / "mistral").config.decoder.max_seq_len == 64


def test_a_tied_head_is_a_copy_of_the_table(tmp_path):
    checkpoints.hf_llama(tmp_path / "tied", tie_word_embeddings=True)
    state = read_checkpoint(tmp_path / "tied").check().state
    assert torch.equal(state["head"], state["embed"])
    assert state["head"].data_ptr() != state["embed"].data_ptr()


def test_an_index_is_not_believed_on_sizes_and_a_missing_shard_is_named(files, tmp_path):
    shutil.copytree(files[0] / "llama-bin", tmp_path / "llama")  # total_size 1 in its index
    read_checkpoint(tmp_path / "llama").check()
    (tmp_path / "llama" / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match="pytorch_model-00002-of-00002.bin: is missing"):
        read_checkpoint(tmp_path / "llama")


@pytest.mark.parametrize("kind", ["llama", "idefics"])
def test_64_greedy_tokens_are_those_of_transformers(files, kind):
    place, _, llama, idefics = files
    if kind == "llama":
        model, tokenizer = assemble(place / "ViT.pt", place / "llama")
        batch, theirs = text_batch(model, tokenizer), llama
        seen = {}
    else:
        model, tokenizer = load_model(place / "idefics")
        batch, seen = idefics_inputs(model, tokenizer, [picture_document([0, 1], tokenizer)])
        theirs = idefics
    forbidden = [*range(llama.config.vocab_size, 400)] if kind == "llama" else []
    n = model.config.decoder.vocab_size + model.config.decoder.n_special
    steps = generate(model, batch, max_new_tokens=64, forbidden=tuple(
        i for i in forbidden if i < n))
    ours = [step.token for step in steps]
    ids = batch.tokens[None]
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64,
                          min_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0,
                          **seen)
    assert ours == out[0, ids.shape[1]:].tolist()


@pytest.mark.parametrize("penalty", [0.0, 1.0, 1.7])
@pytest.mark.parametrize("kind", ["llama", "idefics"])
def test_what_three_beams_find_is_what_transformers_finds(files, kind, penalty):
    """Many tokens end an answer, so that answers of all lengths compete."""
    place, _, llama, idefics = files
    for seed in range(4):
        if kind == "llama":
            model, tokenizer = assemble(place / "ViT.pt", place / "llama")
            text = " ".join(["a red cat", "two birds", "on the left", "where is it"][: seed + 1])
            batch, theirs, seen = text_batch(model, tokenizer, text), llama, {}
        else:
            model, tokenizer = load_model(place / "idefics")
            batch, seen = idefics_inputs(model, tokenizer,
                                         [picture_document([seed, seed + 1], tokenizer)])
            theirs = idefics
        n = theirs.config.vocab_size
        stop = [*range(5 + seed, n, 9)]
        extra = tuple(range(n, model.config.decoder.vocab_size + model.config.decoder.n_special))
        (ours,) = beam_search(model, batch, n_beams=3, max_new_tokens=12, length_penalty=penalty,
                              stop=tuple(stop), forbidden=extra)
        ids = batch.tokens[None]
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
                              num_beams=3, length_penalty=penalty, do_sample=False,
                              eos_token_id=stop, pad_token_id=0, early_stopping=False, **seen)
        assert ours.tokens == out[0, ids.shape[1] :][: len(ours.tokens)].tolist()
        assert not out[0, ids.shape[1] + len(ours.tokens) :].any()


# ---------------------------------------------------------------------------------------- IDEFICS


def picture_document(seeds, tokenizer, before="a red cat", question=WORDS):
    return chat_document([([], before, "dog"), ([checkpoints.picture(s) for s in seeds], question,
                                                None)], tokenizer.chat)


def idefics_inputs(model, tokenizer, documents):
    """Our batch of one document, and transformers' masks by the rule: latest picture, </s> ends."""
    batch = prompts(documents, tokenizer, model.config, CPU)
    rows, current, n_images, hidden = [], -1, max(len(batch.shown), 1), False
    for token in batch.tokens.tolist():
        if token == tokenizer.image_id:
            current, hidden = current + 1, False
        row = [0] * n_images
        if current >= 0 and not hidden:
            row[current] = 1
        rows.append(row)
        hidden = hidden or token == tokenizer.eos_id
    return batch, dict(pixel_values=model.vision.normalise(batch.images)[None],
                       image_attention_mask=torch.tensor(rows)[None])


def difference(model, theirs, batch, seen) -> float:
    with torch.no_grad():
        expected = theirs(batch.tokens[None], attention_mask=torch.ones_like(batch.tokens)[None],
                          **seen).logits[0]
    ours = our_logits(model, batch)
    assert ours.shape == expected.shape  # over the additional vocabulary, too
    return float((ours - expected).abs().max())


@pytest.mark.parametrize("seeds", [[0], [0, 1], [0, 1, 2], []], ids=lambda s: f"{len(s)} pictures")
def test_idefics_gives_the_logits_of_transformers(files, seeds):
    place, _, _, idefics = files
    model, tokenizer = load_model(place / "idefics")
    batch, seen = idefics_inputs(model, tokenizer, [picture_document(seeds, tokenizer)])
    assert difference(model, idefics, batch, seen) < CLOSE


@pytest.mark.parametrize("changes", [
    dict(alpha_type="vector"), dict(use_resampler=False), dict(qk_layer_norms=False),
    dict(cross_layer_interval=2), dict(perceiver_config=dict(
        resampler_n_latents=5, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=8,
        qk_layer_norms_perceiver=False)),
], ids=["vector gates", "no resampler", "no norms", "every 2", "no norms in the resampler"])
def test_every_choice_of_idefics_is_ours_too(tmp_path, changes):
    theirs = checkpoints.hf_idefics(tmp_path / "idefics", **changes)
    model, tokenizer = load_model(tmp_path / "idefics")
    batch, seen = idefics_inputs(model, tokenizer, [picture_document([3, 4], tokenizer)])
    assert difference(model, theirs, batch, seen) < CLOSE


def test_packed_documents_of_idefics_are_those_of_each_alone(files):
    model, tokenizer = load_model(files[0] / "idefics")
    documents = [picture_document(seeds, tokenizer) for seeds in ([0], [], [1, 2])]
    packed = our_logits(model, prompts(documents, tokenizer, model.config, CPU))
    alone = [our_logits(model, prompts([d], tokenizer, model.config, CPU)) for d in documents]
    assert (packed - torch.cat(alone)).abs().max() < CLOSE


def test_idefics_reads_a_text_without_pictures_as_llama_only_with_closed_gates(files):
    model, tokenizer = load_model(files[0] / "idefics")
    batch = text_batch(model, tokenizer)
    read = our_logits(model, batch)
    blocks, model.cross_blocks = model.cross_blocks, torch.nn.ModuleDict()
    plain = our_logits(model, batch)
    model.cross_blocks = blocks
    assert (read - plain).abs().max() > 1e-3  # the feed-forward is on
    for block in blocks.values():
        block.mlp_gate.data.zero_()
        block.attn_gate.data.zero_()
    assert torch.equal(our_logits(model, batch), plain)


def test_the_first_revisions_of_its_config_are_read(files, tmp_path):
    shutil.copytree(files[0] / "idefics", tmp_path / "flat")
    path = tmp_path / "flat" / "config.json"
    values = json.loads(path.read_text())
    vision, latents = values["vision_config"], values["perceiver_config"]
    flat = {f"vision_{name}": vision[name] for name in (
        "embed_dim", "image_size", "patch_size", "num_hidden_layers", "num_attention_heads",
        "intermediate_size")}
    change(path, remove=("vision_config", "perceiver_config"), **flat, **{
        k: v for k, v in latents.items() if k.startswith(("resampler", "qk_"))})
    config = read_checkpoint(tmp_path / "flat").check().config
    assert config == read_checkpoint(files[0] / "idefics").config
    assert config.vision.activation == "gelu"  # which those revisions did not say


def test_an_interval_that_does_not_divide_the_layers_is_refused(files, tmp_path):
    shutil.copytree(files[0] / "idefics", tmp_path / "idefics")
    change(tmp_path / "idefics" / "config.json", cross_layer_interval=3)
    with pytest.raises(ValueError, match="cross_layer_interval 3 must divide num_hidden_layers 8"):
        read_checkpoint(tmp_path / "idefics")


def test_its_base_model_answers_a_line_and_never_says_a_picture(tmp_path):
    checkpoints.hf_idefics(tmp_path / "base", instruct=False)
    model, tokenizer = load_model(tmp_path / "base")
    assert tokenizer.chat == "idefics" and tokenizer.end_id is None
    assert tokenizer.stop_ids == (tokenizer.newline_id, tokenizer.eos_id)
    batch = prompts([picture_document([0], tokenizer)], tokenizer, model.config, CPU)
    steps = generate(model, batch, max_new_tokens=20, forbidden=tokenizer.picture_ids)
    assert not {step.token for step in steps} & {tokenizer.vocab_size, tokenizer.image_id}


# ---------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["clip", "llama", "idefics"])
def test_in_half_precision_we_are_as_close_to_fp32_as_transformers(files, kind, dtype):
    place, clip, llama, idefics = files
    model, tokenizer = (load_model(place / "idefics") if kind == "idefics" else
                        assemble(place / "ViT.pt", place / "llama"))
    half = deepcopy(model).to(dtype)
    with torch.no_grad():
        if kind == "clip":
            images = picture_batch(*range(16))
            ours = half.vision(images)[0].unflatten(0, (16, -1))
            exact, theirs = (m.vision_model(v.normalise(images)).last_hidden_state[:, 1:] for m, v
                             in ((clip, model.vision), (in_dtype(clip, dtype), half.vision)))
        else:
            long = WORDS * 4
            batch, seen = ((text_batch(model, tokenizer, long), {}) if kind == "llama" else
                           idefics_inputs(model, tokenizer, [picture_document(
                               [0, 1], tokenizer, question=long)]))
            ours = our_logits(half, batch)
            reference = llama if kind == "llama" else idefics
            exact = reference(batch.tokens[None], **seen).logits[0]
            seen = {k: v.to(dtype) if v.is_floating_point() else v for k, v in seen.items()}
            theirs = in_dtype(reference, dtype)(batch.tokens[None], **seen).logits[0]
            ours = ours[:, : exact.shape[1]]
    our_error, their_error = ((x.float() - exact).abs() for x in (ours, theirs))
    assert our_error.mean() <= 1.5 * their_error.mean()
    assert our_error.max() <= 1.5 * their_error.max()


def test_rotary_tables_stay_fp32_in_a_half_model():
    cos, sin = rope_table(torch.arange(5000, dtype=torch.int32), 128, 1e4)
    assert cos.dtype == sin.dtype == torch.float32
    exact = torch.arange(5000).double()[:, None] * 1e4 ** -(torch.arange(0, 128, 2).double() / 128)
    assert (cos - exact.cos()).abs().max() < 1e-3


# ----------------------------------------------------------------------------------- preprocessing


def by_hand(image: Image.Image, config: VisionConfig) -> np.ndarray:
    """The published rules in Pillow's words."""
    n, (width, height) = config.image_size, image.size
    if config.rgb == "white" and image.mode != "RGB":
        white = Image.new("RGBA", image.size, (255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if config.resize == "squash":
        image = image.resize((n, n), Image.Resampling.BICUBIC)
    else:
        scale = min(width, height)
        image = image.resize((int(n * width / scale), int(n * height / scale)),
                             Image.Resampling.BICUBIC)
        left, top = (int(round((side - n) / 2.0)) for side in image.size)
        image = image.crop((left, top, left + n, top + n))
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
@pytest.mark.parametrize("size", [(31, 28), (28, 31), (59, 40), (28, 28), (13, 77), (91, 30)])
def test_pictures_are_prepared_as_the_weights_family_does(files, mode, size):
    rgba = np.random.default_rng(0).integers(0, 256, (*size[::-1], 4), dtype=np.uint8)
    image = Image.fromarray(rgba).convert(mode)
    for name in ("ViT.pt", "idefics"):
        config = read_checkpoint(files[0] / name).config.vision
        ours = preprocess(image, config.image_size, config.resize, config.rgb)
        assert np.array_equal(ours.permute(1, 2, 0).numpy(), by_hand(image, config))


def test_the_rule_reaches_the_pictures_of_a_batch(files, tmp_path):
    model, tokenizer = load_model(files[0] / "idefics")
    rgba = np.random.default_rng(1).integers(0, 256, (50, 33, 4), dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    batch = prompts([[Picture(str(tmp_path / "clear.png"))]], tokenizer, model.config, CPU)
    expected = by_hand(Image.fromarray(rgba), model.config.vision)
    assert np.array_equal(batch.images[0].permute(1, 2, 0).numpy(), expected)
    assert torch.equal(batch.images[0], pixels(str(tmp_path / "clear.png"), 28, "squash"))


# ------------------------------------------------------------------------------- put together


def test_new_parts_change_nothing_until_they_are_trained(files):
    place, _, llama, _ = files
    model, tokenizer = assemble(place / "clip", place / "llama")
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("_gate"))
    spread = (model.special_head - model.head.mean(0)).abs().max()
    assert 0 < spread < 0.2 * model.head.std()
    document = [Picture(checkpoints.picture(0)), Text(WORDS)]
    batch = prompts([document], tokenizer, model.config, CPU)
    text = text_batch(model, tokenizer)
    with torch.no_grad():
        theirs = llama(text.tokens[None]).logits[0]
    ours = our_logits(model, batch)  # <s> <image> words: from the second word on not the same
    assert ours.shape[0] == len(encode(document, tokenizer, end=False).ids)
    assert (our_logits(model, text)[:, : theirs.shape[1]] - theirs).abs().max() < CLOSE


def test_saved_in_shards_or_whole_a_published_model_is_the_same(files, tmp_path):
    model, tokenizer = load_model(files[0] / "idefics")
    batch = prompts([picture_document([0], tokenizer)], tokenizer, model.config, CPU)
    before = our_logits(model, batch)
    save_model(tmp_path / "whole", model.config, model.state_dict(), tokenizer)
    save_model(tmp_path / "parts", model.config, model.state_dict(), tokenizer, shard_bytes=10**6)
    assert len([*(tmp_path / "parts").glob("model-*.safetensors")]) > 2
    for folder in ("whole", "parts"):
        again, its = load_model(tmp_path / folder)
        assert torch.equal(our_logits(again, batch), before) and its.chat == tokenizer.chat
        assert its.special_tokens == tokenizer.special_tokens and again.config == model.config


def test_a_model_can_be_saved_over_the_files_that_it_is_mapped_from(files, tmp_path):
    shutil.copytree(files[0] / "idefics", tmp_path / "model")
    model, tokenizer = load_model(tmp_path / "model")
    before = model.embed.clone()
    for _ in range(2):
        save_model(tmp_path / "model", model.config, model.state_dict(), tokenizer)
        model, tokenizer = load_model(tmp_path / "model")
    assert torch.equal(model.embed, before)
