"""Laws of a run's curves: what is drawn is what the log says, and no log is too long or broken.

pytest tests/test_plot.py
"""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import plot

STEP = {"contrastive": None, "contrastive_right": None, "grad_norm": 1.0, "lr": 1e-3,
        "samples_per_s": 50.0, "mfu": 0.4, "data_wait": 0.02}


def steps(losses, stage="pretrain", **fields) -> list[dict]:
    return [{"stage": stage, "step": i, "loss": float(loss)} | STEP | fields
            for i, loss in enumerate(losses)]


def evaluation(step, loss, stage="pretrain", **fields) -> dict:
    record = {"stage": stage, "step": step, "val_loss": loss, "val_loss_blank": loss + 0.5,
              "gap": 0.5, "gates": {"cross_blocks.1.attn_gate": 0.1}}
    return {"evaluation": record | fields, "seconds": 1.0}


def log_of(run: Path, records: list[dict], rest: str = "") -> Path:
    run.mkdir(exist_ok=True)
    (run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + rest)
    return run


def rows_of_colour(path: Path, panel: int = 0, colour=plot.COLOURS[0]) -> list[np.ndarray]:
    """For each column of a panel's plot area, the rows that have this colour."""
    left = panel % plot.COLUMNS * plot.WIDTH + plot.LEFT
    top = plot.HEADER + panel // plot.COLUMNS * plot.HEIGHT + plot.TOP
    area = np.asarray(Image.open(path))[top:top + plot.H, left:left + plot.W]
    return [np.flatnonzero(column) for column in (area == colour).all(-1).T]


def titles(run: Path) -> list[str]:
    return [panel.title for panel in plot.panels_of(plot.read_log(run / "log.jsonl"))]


def test_the_picture_is_as_large_as_its_panels_and_nothing_else_is_left_behind(tmp_path):
    run = log_of(tmp_path / "run", [*steps([3, 2, 1]), evaluation(3, 1.5)])
    path = plot.plot(run)
    assert path == run / "curves.png"
    assert {p.name for p in run.iterdir()} == {"log.jsonl", "curves.png"}
    picture = Image.open(path)
    picture.load()
    n_rows = -(-len(titles(run)) // plot.COLUMNS)
    assert picture.format == "PNG"
    assert picture.size == (1200, plot.HEADER + n_rows * plot.HEIGHT)


@pytest.mark.parametrize("n", [2, 50, 3000])
@pytest.mark.parametrize("falls", [True, False])
def test_a_curve_that_falls_is_drawn_falling_and_one_that_rises_rising(tmp_path, n, falls):
    losses = np.linspace(4, 1, n)[::1 if falls else -1]
    rows = [r.mean() for r in rows_of_colour(plot.plot(log_of(tmp_path / "run", steps(losses))))
            if len(r)]
    assert len(rows) > plot.W / 3
    assert abs(rows[-1] - rows[0]) > plot.H / 2 and (rows[-1] > rows[0]) == falls
    assert (np.diff(rows)[:-2] * (1 if falls else -1) >= -1).all()


def test_nan_infinite_and_null_are_gaps(tmp_path):
    for bad in (float("nan"), float("inf"), None):
        records = steps(np.full(100, 2.0))
        for record in records[40:60]:
            record["loss"] = bad
        rows = rows_of_colour(plot.plot(log_of(tmp_path / "run", records)))
        empty = np.array([len(r) == 0 for r in rows])
        assert empty[int(0.42 * plot.W):int(0.58 * plot.W)].all()
        assert not empty[5:int(0.38 * plot.W)].any() and not empty[int(0.62 * plot.W):-5].any()


def test_a_number_between_two_gaps_is_a_dot(tmp_path):
    records = steps([np.nan] * 10)
    records[5]["loss"] = 2.0
    assert any(map(len, rows_of_colour(plot.plot(log_of(tmp_path / "run", records)))))


@pytest.mark.parametrize("low, high", [(0, 1), (0.3, 4.1), (-0.013, 0.4), (2.345, 2.346), (0, 7e-5),
                                       (3, 1e6), (-7, -2), (5, 5), (0, 0), (0, 12_345)])
def test_ticks_are_round_few_equally_far_apart_and_cover_the_range(low, high):
    found = plot.ticks(low, high)
    assert 2 <= len(found) <= 6
    assert found[0] <= low + 1e-12 and high <= found[-1] + 1e-12
    apart = np.diff(found)
    assert np.allclose(apart, apart[0], rtol=1e-6)
    assert np.isclose(apart[0] / 10 ** np.floor(np.log10(apart[0] * 1.001)), [1, 2, 5]).any()
    assert np.allclose(found / apart[0], np.round(found / apart[0]), atol=1e-6)


def test_a_logarithmic_axis_has_powers_of_ten():
    assert plot.ticks(-0.3, 0.2, least=1).tolist() == [-1, 0, 1]


@pytest.mark.parametrize("rest", ['{"stage": "pretrain", "st', '{"evaluation": {"sta', "{"])
def test_a_line_that_is_cut_off_changes_nothing(tmp_path, rest):
    records = [*steps([3, 2, 1]), evaluation(3, 1.5)]
    whole, cut = (plot.plot(log_of(tmp_path / "run", records, end)).read_bytes()
                  for end in ("", rest))
    assert whole == cut


def test_a_run_without_a_log_or_a_step_is_one_line_that_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"^.*run/log.jsonl: no such file; name the folder .*$"):
        plot.plot(tmp_path / "run")
    for records in ([], [evaluation(0, 1.0)]):
        with pytest.raises(ValueError, match=r"^.*run/log.jsonl: holds no step yet; wait .*$"):
            plot.plot(log_of(tmp_path / "run", records))
    assert not (tmp_path / "run" / "curves.png").exists()


def test_panels_without_data_are_left_out(tmp_path):
    bare = titles(log_of(tmp_path / "run", steps([3, 2])))
    assert bare == ["token loss", "gradient norm", "learning rate", "samples/s", "data wait, %",
                    "MFU, %"]
    full = titles(log_of(tmp_path / "run", [*steps([3, 2], contrastive=1.0, contrastive_right=0.5,
                                                     memory_gb=3.0),
                                            evaluation(2, 2.0, accuracy=0.5)]))
    assert set(full) - set(bare) == {
        "gap: validation loss, blank - real pictures", "accuracy, %", "contrastive loss",
        "contrastive accuracy, %", "gates", "memory, GB"}


def test_steps_count_through_all_stages(tmp_path):
    run = log_of(tmp_path / "run", [*steps([3, 2, 1]), evaluation(3, 1.5),
                                    *steps([5, 4], "instruct"), evaluation(2, 1.2, "instruct")])
    log = plot.read_log(run / "log.jsonl")
    assert (log.stages, log.n_steps) == ([(0, "pretrain"), (3, "instruct")], 5)
    assert log.curves["loss"][0].tolist() == [0, 1, 2, 3, 4]
    assert log.curves["val_loss"][0].tolist() == [3, 5]
    again = plot.read_log(log_of(run, [*steps([3, 2]), *steps([1])]) / "log.jsonl")
    assert again.stages == [(0, "pretrain"), (2, "pretrain")]


def test_every_gate_is_a_line_even_if_there_are_many(tmp_path):
    gates = {f"cross_blocks.{i}.{kind}_gate": 0.1 * i for i in range(9) for kind in ("attn", "mlp")}
    run = log_of(tmp_path / "run", [*steps([3, 2]), evaluation(2, 2.0, gates=gates)])
    (panel,) = (p for p in plot.panels_of(plot.read_log(run / "log.jsonl")) if p.title == "gates")
    assert list(panel.names) == list(gates) and panel.names["cross_blocks.3.mlp_gate"] == "3 mlp"
    plot.plot(run)


def test_bins_keep_means_and_extremes_and_are_at_most_one_a_pixel():
    y = np.random.default_rng(0).normal(size=10_000)
    x, low, mean, high = plot.binned(np.arange(10_000.0), y)
    assert len(x) == plot.W and (low <= mean).all() and (mean <= high).all()
    assert (low.min(), high.max()) == (y.min(), y.max())
    assert mean[0] == pytest.approx(y[:int(x[1])].mean())
    few = plot.binned(np.arange(5.0), y[:5])
    assert all(np.array_equal(values, y[:5]) for values in few[1:])


def test_a_running_mean_is_the_mean_of_its_finite_neighbours():
    y = np.array([1.0, 2.0, 6.0, np.nan, 4.0])
    assert np.array_equal(plot.running_mean(y, 3), [1.5, 3, 4, np.nan, 4], equal_nan=True)
    assert np.array_equal(plot.running_mean(y, 1), y, equal_nan=True)


def test_a_long_log_takes_seconds_and_loses_no_evaluation(tmp_path):
    n = 200_000
    line = json.dumps(steps([2.0], n_tokens=123456, ms=1283.8932780017785)[0])
    before, after = line.split('"step": 0')
    evaluations = [json.dumps(evaluation(i, 2.0)) for i in range(10_000, n + 1, 10_000)]
    lines = [f'{before}"step": {i}{after}' for i in range(n)]
    for i, text in enumerate(evaluations, 1):
        lines[i * 10_000 - 1] += "\n" + text
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    began = time.perf_counter()
    plot.plot(tmp_path)
    assert time.perf_counter() - began < 10  # seconds, on a busy machine
    log = plot.read_log(tmp_path / "log.jsonl")
    assert log.n_steps == n and len(log.curves["val_loss"][0]) == len(evaluations)
    assert len(log.curves["loss"][0]) < n
