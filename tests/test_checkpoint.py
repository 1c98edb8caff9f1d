"""Laws of checkpoints: what is saved is the step's own, whole or not there, and noticed if damaged.

pytest tests/test_checkpoint.py
"""

import json
import resource
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint import (
    Saver,
    bad_file,
    latest_checkpoint,
    load_checkpoint,
    mark_best,
    newest_good,
    read_best,
    read_state,
)


def start(size: int = 2) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer, one step old."""
    torch.manual_seed(0)
    model = torch.nn.Linear(size, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    return model, optimizer


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(3, model.in_features)).pow(2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def saved(run: Path, *steps: int, keep: int = 9) -> list[Path]:
    model, optimizer = start()
    saver = Saver(run, keep)
    for number in steps:
        saver.save(number, model, optimizer, {"stage": 0})
    saver.finish()
    return [run / "checkpoints" / f"step_{number:08d}" for number in steps]


def test_the_best_checkpoint_of_a_stage_is_named_and_kept(tmp_path):
    model, optimizer = start()
    saver = Saver(tmp_path, keep=1)
    for step, (stage, val_loss, best) in enumerate((
            (0, 3.0, 0), (0, 2.0, 1), (0, 2.5, 1), (0, None, 1), (0, 2.1, 1), (1, 9.0, 5),
            (1, 9.5, 5), (1, 9.5, 5))):
        saver.save(step, model, optimizer, {"stage": stage}, val_loss)
        saver.finish()
        assert read_best(tmp_path)["checkpoint"] == f"step_{best:08d}"
        kept = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
        assert f"step_{best:08d}" in kept and f"step_{step:08d}" in kept
    assert kept == ["step_00000005", "step_00000007"]


def test_a_checkpoint_is_of_its_step_though_training_goes_on_while_it_is_written(
    tmp_path, monkeypatch
):
    writing = checkpoint.checksum
    model, optimizer = start(300)
    before = [p.clone() for p in model.parameters()]
    saver = Saver(tmp_path, keep=1)
    monkeypatch.setattr(checkpoint, "checksum", lambda path: (step(model, optimizer),
                                                              writing(path))[1])
    saver.save(1, model, optimizer, {})
    step(model, optimizer)  # at once, and once more before it is whole
    saver.finish()
    other = start(300)
    load_checkpoint(latest_checkpoint(tmp_path), *other)
    assert all(map(torch.equal, before, other[0].parameters()))
    assert not any(map(torch.equal, before, model.parameters()))


def test_what_is_left_out_is_not_written_and_stays_as_it_is(tmp_path):
    model, optimizer = start(64)
    model.bias.requires_grad_(False)
    saver = Saver(tmp_path, 1, leave_out={"bias"})
    optimizer = torch.optim.AdamW([model.weight])
    step(model, optimizer)
    saver.save(1, model, optimizer, {})
    saver.finish()
    other, again = start(64)
    other.bias.requires_grad_(False)
    torch.nn.init.constant_(other.bias, 5.0)
    load_checkpoint(latest_checkpoint(tmp_path), other, torch.optim.AdamW([other.weight]),
                    {"bias"})
    assert torch.equal(other.weight, model.weight) and bool((other.bias == 5).all())
    with pytest.raises(ValueError, match="damaged"):  # a part that is asked for, but is not there
        load_checkpoint(latest_checkpoint(tmp_path), other, torch.optim.AdamW([other.weight]))


@pytest.mark.parametrize("what", ["flip", "cut", "lose"])
def test_a_changed_file_is_noticed_and_the_checkpoint_before_it_is_taken(tmp_path, what):
    first, second = saved(tmp_path, 1, 2)
    assert newest_good(tmp_path) == (second, []) and bad_file(second) == ""
    for path in (p for p in second.iterdir() if p.name != "state.json"):
        content = path.read_bytes()
        damaged = {"flip": content[:9] + bytes([content[9] ^ 1]) + content[10:],
                   "cut": content[:-1]}
        path.unlink()
        if what in damaged:
            path.write_bytes(damaged[what])
        good, notes = newest_good(tmp_path)
        assert good == first and len(notes) == 1 and f"{second}: damaged ({path.name})" in notes[0]
        path.write_bytes(content)
    assert newest_good(tmp_path) == (second, [])


def test_a_full_disk_leaves_the_checkpoint_before_as_it_was(tmp_path):
    model, optimizer = start(300)
    saver = Saver(tmp_path, keep=1)
    saver.save(1, model, optimizer, {})
    saver.finish()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # of a file, in bytes
    try:
        saver.save(2, model, optimizer, {})
        with pytest.raises(ValueError, match="step_00000002: could not be written .*File too large"
                                             ".*from step_00000001"):
            saver.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert newest_good(tmp_path)[1] == []
    saver.save(2, model, optimizer, {})  # when there is room again
    saver.finish()
    assert latest_checkpoint(tmp_path).name == "step_00000002"


def test_old_checkpoints_go_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    model, optimizer = start()
    saver = Saver(tmp_path, keep=1)

    def full(*arguments, **options):
        raise OSError("no space")

    monkeypatch.setattr(checkpoint, "atomic_write", full)
    saver.save(2, model, optimizer, {"stage": 0})
    with pytest.raises(ValueError, match="could not be written"):
        saver.finish()
    assert newest_good(tmp_path)[0].name == "step_00000001"


def test_a_damaged_state_is_noticed_and_the_checkpoint_before_it_is_taken(tmp_path):
    first, second = saved(tmp_path, 1, 2)
    state = json.loads((second / "state.json").read_text())
    for changed in (state | {"stage": 1}, {k: v for k, v in state.items() if k != "stage"}, [], {}):
        (second / "state.json").write_text(json.dumps(changed))
        assert newest_good(tmp_path) == (first, [f"{second}: damaged (state.json)"])
    (second / "state.json").write_text(json.dumps(state))
    assert newest_good(tmp_path) == (second, []) and read_state(second)["stage"] == 0


def test_a_damaged_checkpoint_is_not_kept_in_place_of_a_good_one(tmp_path):
    first, _, damaged = saved(tmp_path, 10, 17, 20)
    for folder in (tmp_path / "checkpoints").iterdir():
        if folder != first:
            next(folder.glob("*.distcp")).write_bytes(b"")
    mark_best(tmp_path, damaged, 0, 1.0)
    assert newest_good(tmp_path)[0] == first
    saver = Saver(tmp_path, keep=1)
    saver.forget_after(first)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == [first.name]
    assert read_best(tmp_path) == {}  # which named one that is gone
    model, optimizer = start()
    saver.save(15, model, optimizer, {"stage": 0})
    saver.finish()
    assert newest_good(tmp_path) == (tmp_path / "checkpoints" / "step_00000015", [])


def test_a_checkpoint_with_its_marker_stays_though_the_tidying_up_fails(
    tmp_path, monkeypatch, capsys
):
    saved(tmp_path, 1)
    model, optimizer = start()
    saver = Saver(tmp_path, keep=1)
    monkeypatch.setattr(checkpoint, "remove", lambda _: (_ for _ in ()).throw(OSError("not empty")))
    saver.save(2, model, optimizer, {"stage": 0})
    saver.finish()
    assert newest_good(tmp_path)[0].name == "step_00000002"
    err = capsys.readouterr().err
    assert "older checkpoints are as they were (not empty)" in err and err.count("\n") == 1
