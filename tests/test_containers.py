"""Laws of the containers: all tensors or one clear line, nothing executed, nothing copied.

pytest tests/test_containers.py
"""

import json
import os
import pickle
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
