"""Laws of the containers: all tensors or one clear line, nothing executed, nothing copied.

pytest tests/test_containers.py
"""

import io
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from containers import read_meta, read_tensors
from tests import checkpoints

TENSORS = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.ones(5).bfloat16(),
           "c": torch.arange(3)}


def write(path: Path, tensors=TENSORS) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def same(found, tensors=TENSORS) -> bool:
    return found.keys() == tensors.keys() and all(
        found[n].dtype == tensors[n].dtype and torch.equal(found[n], tensors[n]) for n in tensors)


def refused(path: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        read_tensors(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt", "x.pth"])
def test_a_files_tensors_come_out_as_they_went_in(tmp_path, name):
    assert same(read_tensors(write(tmp_path / name)))
    assert same(read_tensors(tmp_path))  # the only file of its folder


def test_a_pickle_from_before_torch_used_zip_is_read(tmp_path):
    torch.save(TENSORS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(read_tensors(tmp_path / "old.pth"))


def test_a_training_runs_checkpoint_is_unwrapped(tmp_path):
    for key in ("state_dict", "model_state_dict"):
        assert same(read_tensors(write(tmp_path / "x.pt", {"epoch": 3, key: TENSORS})))
    write(tmp_path / "x.pt", {"a": TENSORS["b"], "epoch": 3})
    refused(tmp_path / "x.pt", "x.pt: epoch is a int, not a tensor")
    write(tmp_path / "x.pt", {1: TENSORS["b"]})
    refused(tmp_path / "x.pt", "x.pt: holds tensors by int, not by name")


# --------------------------------------------------------------------------------- TorchScript


def test_a_torchscript_archive_holds_what_torch_jit_finds_in_it(tmp_path):
    path = tmp_path / "ViT.pt"
    checkpoints.write_torchscript(path, checkpoints.hf_clip())
    theirs = torch.jit.load(str(path), map_location="cpu").state_dict()
    assert same(read_tensors(path), dict(theirs))
    with pytest.raises(RuntimeError):
        torch.load(path, weights_only=True)  # what a first try would be


class Bomb:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("torchscript", [True, False])
def test_code_in_a_file_is_refused_and_never_run(tmp_path, torchscript):
    bomb = Bomb(f"touch {tmp_path}/exploded")
    path = tmp_path / "evil.pt"
    if torchscript:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("evil/data.pkl", pickle.dumps(bomb))
            archive.writestr("evil/constants.pkl", pickle.dumps(()))
    else:
        torch.save({"a": TENSORS["b"], "bomb": bomb}, path)
    refused(path, "evil.pt: .*(holds code|is no tensor)")
    assert not (tmp_path / "exploded").exists()


# ---------------------------------------------------------------------------------- damaged files


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("whole")
    checkpoints.write_torchscript(place / "script.pt", checkpoints.hf_clip())
    for name in ("x.safetensors", "x.bin"):
        write(place / name)
    return {path.name: path.read_bytes() for path in place.iterdir()}


@given(st.data())
@settings(max_examples=60, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_cut_file_is_named_and_gives_nothing(tmp_path, whole, data):
    name = data.draw(st.sampled_from(sorted(whole)))
    path = tmp_path / name
    path.write_bytes(whole[name][: data.draw(st.integers(0, len(whole[name]) - 1))])
    refused(path, name)


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt", "consolidated.00.pth"])
@pytest.mark.parametrize("content, says", [
    (b"", "damaged"), (b"<html>404 Not Found</html>", "damaged"), (b"\xff" * 99, "damaged"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9976576152\n",
     "Git LFS pointer, not the weights; run `git lfs pull`"),
])
def test_what_is_no_file_of_weights_is_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, f"{name}: .*{says}")


def test_a_folder_says_what_it_holds_too_much_or_too_little_of(tmp_path):
    refused(tmp_path, "holds no files of weights")
    write(tmp_path / "one.safetensors")
    write(tmp_path / "two.safetensors")
    refused(tmp_path, "holds several files of weights")
    refused(tmp_path / "nothing", "no such folder or file")


# ----------------------------------------------------------------------------------------- shards


def index(folder: Path, places: dict, total_size=1) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total_size}, "weight_map": places}))


def test_shards_are_read_by_their_index_whatever_their_order_or_total_size(tmp_path):
    for name, file in (("c", "z"), ("b", "a"), ("a.weight", "z2")):
        write(tmp_path / f"{file}.safetensors", {name: TENSORS[name]})
    index(tmp_path, {"a.weight": "z2.safetensors", "b": "a.safetensors", "c": "z.safetensors"})
    assert same(read_tensors(tmp_path))
    (tmp_path / "a.safetensors").unlink()
    refused(tmp_path, "a.safetensors: is missing")


def test_of_two_files_with_a_tensor_the_index_says_whose_it_is(tmp_path):
    for k, file in enumerate(("a", "b")):
        write(tmp_path / f"{file}.safetensors", {"x": torch.full((2,), float(k)),
                                                 file: torch.ones(1)})
    for k, file in enumerate(("a", "b")):
        index(tmp_path, {"x": f"{file}.safetensors", "a": "a.safetensors", "b": "b.safetensors"})
        assert read_tensors(tmp_path)["x"].tolist() == [k, k]


def test_a_tensor_that_only_the_index_knows_is_named(tmp_path):
    write(tmp_path / "x.safetensors")
    index(tmp_path, {"b": "x.safetensors", "d": "x.safetensors"})
    refused(tmp_path, "x.safetensors: tensor d is missing, which model.safetensors.index.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}',
                                  '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "."}}',
                                  "version https://git-lfs.github.com/spec/v1"])
def test_an_index_that_is_none_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "index.json: (is no index of shards|not JSON|must hold|is a Git LFS)")


@settings(max_examples=300, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60))
def test_no_bytes_at_all_make_anything_but_one_line(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    refused(tmp_path / "x.bin", "x.bin: ")


def test_metas_files_are_put_together_along_their_own_dimensions(tmp_path):
    names = {"layers.0.attention.wq.weight": 0, "layers.0.attention.wo.weight": 1,
             "layers.0.feed_forward.w2.weight": 1, "layers.0.feed_forward.w3.weight": 0,
             "tok_embeddings.weight": 1, "output.weight": 0, "norm.weight": None}
    whole = {name: torch.randn(8) if dim is None else torch.randn(8, 12)
             for name, dim in names.items()}
    for k in range(4):
        write(tmp_path / f"consolidated.{k:02d}.pth", {
            name: t if names[name] is None else t.chunk(4, names[name])[k].clone()
            for name, t in whole.items()})
    assert same(read_tensors(tmp_path), whole)
    (tmp_path / "consolidated.02.pth").unlink()
    refused(tmp_path, "consolidated.02.pth: is missing, but consolidated.03.pth is there")


def test_metas_parts_that_do_not_fit_are_named_with_their_shapes(tmp_path):
    for k, width in enumerate((3, 4)):
        write(tmp_path / f"consolidated.{k:02d}.pth", {"output.weight": torch.ones(2, width)})
    with pytest.raises(ValueError, match=r"output.weight do not fit: \(2, 3\), \(2, 4\)"):
        read_meta(tmp_path)
    write(tmp_path / "consolidated.01.pth", {"norm.weight": torch.ones(2)})
    refused(tmp_path, "consolidated.01.pth: tensor norm.weight is not in all of the 2 files")


# ----------------------------------------------------------------------------------------- mapped


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own counts")
@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_reading_takes_no_memory_of_its_own(tmp_path, name):
    write(tmp_path / name, {f"t{i}": torch.randn(2**21) for i in range(8)})  # 64 MB
    code = (
        "import re, sys; from containers import read_tensors\n"
        "own = lambda: int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "read_tensors(sys.argv[2])\n"
        "before = own(); t = read_tensors(sys.argv[1]); s = sum(x.sum() for x in t.values())\n"
        "print(own() - before)")
    small = write(tmp_path / f"small{Path(name).suffix}")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / name, small], text=True,
                          capture_output=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8000  # kB


# ---------------------------------------------------------------------- whatever stands in a file


class Odd(torch.nn.Module):
    """Tensors of every dtype that archives hold, views of one storage, and attributes of none."""

    sizes: list[int]
    nothing: torch.Tensor | None

    def __init__(self):
        super().__init__()
        base = torch.arange(24.0)
        buffers = dict(half16=base.half(), brain=base.bfloat16(), double64=base.double(),
                       int32=torch.arange(3, dtype=torch.int32), int64=torch.arange(3),
                       truth=torch.tensor([True, False]), empty=torch.empty(0, 3),
                       scalar=torch.tensor(4.6), turned=base.view(4, 6).T, part=base[5:9],
                       every_second=base[::2], shared=base)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self.sizes, self.nothing, self.word = [1, 2], None, "word"
        self.inner = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(),
                                         torch.nn.LayerNorm(3))

    def forward(self, x):
        return x


def test_torchscript_is_read_whatever_its_tensors_are_and_stands_between_them(tmp_path):
    torch.jit.save(torch.jit.script(Odd()), tmp_path / "odd.pt")
    theirs = torch.jit.load(tmp_path / "odd.pt").state_dict()
    assert len(theirs) == 16 and same(read_tensors(tmp_path / "odd.pt"), dict(theirs))


def test_the_root_of_an_archive_may_have_any_name(tmp_path):
    for name in ("ViT-L-14.pt", "archive"):
        path = tmp_path / name / "x.pt"
        path.parent.mkdir()
        torch.jit.save(torch.jit.script(Odd()), path.with_name("renamed.pt"))
        path.with_name("renamed.pt").rename(path)
        assert "scalar" in read_tensors(path)


CALLS = {"os:system": "touch {}", "posix:system": "touch {}", "subprocess:getoutput": "touch {}",
         "builtins:eval": "open('{}', 'w')", "builtins:exec": "open('{}', 'w')",
         "__builtin__:eval": "open('{}', 'w')", "io:open": "{}", "torch:load": "{}"}


@pytest.mark.parametrize("kind", ["torchscript", "zip", "legacy", "bare pickle"])
@pytest.mark.parametrize("call", CALLS)
def test_no_function_that_a_pickle_names_is_called(tmp_path, kind, call):
    module, name = call.split(":")
    argument = CALLS[call].format(tmp_path / "exploded")
    bomb = b"\x80\x04" + b"".join(
        b"\x8c" + bytes([len(word)]) + word for word in (module.encode(), name.encode())
    ) + b"\x93X" + len(argument).to_bytes(4, "little") + argument.encode() + b"\x85R."
    path = tmp_path / "evil.pt"
    if kind in ("torchscript", "zip"):
        with zipfile.ZipFile(path, "w") as archive:
            for file, content in (("data.pkl", bomb), ("version", b"3\n"), ("byteorder", b"little"),
                                  ("constants.pkl", pickle.dumps(())))[: 4 - (kind == "zip")]:
                archive.writestr(f"evil/{file}", content)
    elif kind == "legacy":
        whole = io.BytesIO()
        torch.save({}, whole, _use_new_zipfile_serialization=False)
        path.write_bytes(whole.getvalue().replace(pickle.dumps({}, 2), bomb))
        assert bomb in path.read_bytes()
    else:
        path.write_bytes(bomb)
    refused(path, "evil.pt: ")
    assert not (tmp_path / "exploded").exists()


KINDS = ("x.safetensors", "x.bin", "legacy.pth", "consolidated.00.pth", "script.pt")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    place = tmp_path_factory.mktemp("files")
    write(place / "x.safetensors")
    write(place / "x.bin")
    write(place / "consolidated.00.pth")
    torch.save(TENSORS, place / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.jit.save(torch.jit.script(Odd()), place / "script.pt")
    return {path.name: path.read_bytes() for path in place.iterdir()}


@pytest.mark.parametrize("name", KINDS)
def test_wherever_a_file_is_cut_it_is_named_and_gives_nothing(tmp_path, files, name):
    whole = files[name]
    for n in range(0, len(whole), max(1, len(whole) // 300)):
        (tmp_path / name).write_bytes(whole[:n])
        refused(tmp_path / name, f"{name}: ")


@pytest.mark.parametrize("name", KINDS)
def test_wrong_bits_are_one_line_or_tensors_and_nothing_else(tmp_path, files, name):
    luck = random.Random(name)
    for _ in range(250):
        content = bytearray(files[name])
        ends = (0, min(len(content), 1200)), (max(0, len(content) - 3000), len(content))
        for _ in range(luck.choice((1, 1, 2, 8))):
            place = luck.randrange(*luck.choice(ends))
            content[place] ^= 1 << luck.randrange(8) if luck.random() < 0.7 else content[place]
        (tmp_path / name).write_bytes(content)
        try:
            tensors = read_tensors(tmp_path / name)
        except ValueError as error:
            assert f"{name}: " in str(error) and "\n" not in str(error)
        else:
            assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


@pytest.mark.parametrize("value, says", [
    ([torch.ones(2)], "holds a list"), (torch.ones(2), "holds a Tensor"),
    (None, "holds a NoneType"), ("words", "holds a str"),
    ({"a": [torch.ones(2)]}, "a is a list, not a tensor"),
    ({"a": {"b": torch.ones(2)}}, "a is a dict"), ({"a": None}, "a is a NoneType"),
    ({"state_dict": 3}, "state_dict is a int"), ({"state_dict": [1]}, "state_dict is a list"),
    ({"state_dict": {"a": 1.5}}, "a is a float"),
])
@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_not_a_tensor_by_its_name_is_named(tmp_path, value, says, zipped):
    torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "x.pt", f"x.pt: {says}")


@pytest.mark.parametrize("junk", [b"", b"<html>404 Not Found</html>", "cut", "pointer", None])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_the_shard_that_is_damaged_is_the_one_that_is_named(tmp_path, suffix, junk):
    for k, name in enumerate(TENSORS):
        write(tmp_path / f"m-{k}.{suffix}", {name: TENSORS[name]})
    places = {name: f"m-{k}.{suffix}" for k, name in enumerate(TENSORS)}
    stem = "pytorch_model" if suffix == "bin" else "model"
    (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": places}))
    assert same(read_tensors(tmp_path))
    bad = tmp_path / f"m-1.{suffix}"
    content = {"cut": bad.read_bytes()[:-5], "pointer": b"version https://git-lfs.github.com/spec"}
    if junk is None:
        bad.unlink()
    else:
        bad.write_bytes(content.get(junk, junk))
    refused(tmp_path, f"m-1.{suffix}: " + ("is a Git LFS pointer" if junk == "pointer" else
                                            "is missing" if junk is None else ""))


@pytest.mark.parametrize("junk", [b"\xff\xfe", b"null", b'{"weight_map": {"a": null}}',
                                  b'{"weight_map": {"a": ["x.bin"]}}', b'{"weight_map": ["x.bin"]}',
                                  b'{"metadata": {"total_size": 3}}', b"[" * 9])
def test_an_index_of_anything_but_files_is_named(tmp_path, junk):
    (tmp_path / "model.safetensors.index.json").write_bytes(junk)
    refused(tmp_path, "model.safetensors.index.json: ")


def test_of_two_shards_with_the_same_name_the_index_chooses(tmp_path):
    write(tmp_path / "a.safetensors", {"x": torch.ones(2), "y": torch.ones(2)})
    write(tmp_path / "b.safetensors", {"x": torch.zeros(2), "z": torch.zeros(2)})
    index(tmp_path, {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"})
    assert torch.equal(read_tensors(tmp_path)["x"], torch.ones(2))


@pytest.mark.parametrize("name", ["consolidated.safetensors", "consolidated.pth"])
def test_a_consolidated_file_without_a_number_is_a_file_like_others(tmp_path, name):
    assert same(read_tensors(write(tmp_path / name)))  # Mistral's; LLaMA-3.2's


def test_metas_missing_first_file_and_a_damaged_second_one_are_named(tmp_path):
    for k in range(2):
        write(tmp_path / f"consolidated.{k:02d}.pth", {"output.weight": torch.ones(2, 3)})
    (tmp_path / "consolidated.01.pth").write_bytes(b"<html>404 Not Found</html>")
    refused(tmp_path, "consolidated.01.pth: ")
    (tmp_path / "consolidated.00.pth").unlink()
    refused(tmp_path / "consolidated.01.pth", "consolidated.00.pth: is missing")


def test_metas_merge_keeps_dtypes_and_takes_what_is_whole_from_the_first(tmp_path):
    for k in range(12):  # 10 and 11 come behind 9
        write(tmp_path / f"consolidated.{k:02d}.pth", {
            "layers.0.attention.wq.weight": torch.full((1, 2), k).bfloat16(),
            "tok_embeddings.weight": torch.full((2, 1), float(k)).half(),
            "norm.weight": torch.full((3,), float(k)), "rope.freqs": torch.ones(2)})
    whole = read_tensors(tmp_path)
    assert whole["layers.0.attention.wq.weight"][:, 0].tolist() == list(range(12))
    assert whole["tok_embeddings.weight"][1].tolist() == list(range(12))
    assert whole["norm.weight"].tolist() == [0, 0, 0]
    assert [t.dtype for t in whole.values()] == [torch.bfloat16, torch.float16, torch.float32,
                                                 torch.float32]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own counts")
def test_shards_and_metas_single_file_are_mapped_too(tmp_path):
    big = {f"t{i}": torch.randn(2**21) for i in range(8)}  # 64 MB in each folder
    for folder in ("hf", "meta"):
        (tmp_path / folder).mkdir()
    for k in range(2):
        write(tmp_path / "hf" / f"m-{k}.safetensors", dict(list(big.items())[k::2]))
    index(tmp_path / "hf", {name: f"m-{i % 2}.safetensors" for i, name in enumerate(big)})
    write(tmp_path / "meta" / "consolidated.00.pth", big)
    code = (
        "import re, sys; from containers import read_tensors\n"
        "own = lambda: int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "read_tensors(sys.argv[1])\n"
        "for folder in sys.argv[2:]:\n"
        "    before = own(); t = read_tensors(folder); s = [x.sum() for x in t.values()]\n"
        "    print(own() - before)\n")
    small = [write(tmp_path / "small.bin")]
    done = subprocess.run([sys.executable, "-c", code, *small, tmp_path / "hf", tmp_path / "meta"],
                          text=True, capture_output=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert max(map(int, done.stdout.split())) < 8000  # kB
