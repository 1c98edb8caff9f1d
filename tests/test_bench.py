"""Laws of the benchmark: it measures what it says, beside the peers that are there.

pytest tests/test_bench.py
"""

import io
import json
import re
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

import bench
import bench_data
import bench_decode
import bench_train
import weights
from presets import preset_model
from tests.parity import summary

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "results" / "README.md"


def test_a_run_prints_and_records_every_way_beside_a_peer(cli, tmp_path):
    out = tmp_path / "record.jsonl"
    code, printed, _ = cli(bench, "kernels", "--case", "captions, equal", "--seconds", "0.01",
                           "--backend", "torch", "--json", out)
    record = json.loads(out.read_text())
    assert code == 0 and record["kernels"] == "torch" and record["matmul_tflops"] > 0
    assert [row["way"] for row in record["rows"]] == ["forward", "backward", "both"]
    for row in record["rows"]:
        assert row["case"] in printed and row["error"] < 1e-5 and row["tflops"] > 0
        low, middle, high = row["seconds"]["ours"]
        assert 0 < low <= middle <= high and row["ratios"]["padded SDPA"] > 0


def test_useful_scores_are_those_inside_of_the_intervals():
    causal = bench.packed_causal("x", np.array([3, 1]), (1, 1, 4))
    assert causal.scores == 3 * 4 / 2 + 1
    assert bench.pictures("x", 2, 5, (1, 1, 4)).scores == 2 * 5 * 5
    assert bench.decoding("x", 3, 7, (1, 1, 4)).scores == 3 * 7
    blind = bench.cross("x", np.array([4, 10]), 6, 0.25, (1, 1, 4))  # 1 row and 2 see nothing
    assert blind.scores == (3 + 8) * 6 and (blind.start <= blind.end).all()


@pytest.mark.parametrize("case", bench.cases(), ids=lambda case: case.name)
def test_every_case_keeps_the_rules_of_intervals(case):
    assert (np.diff(case.start) >= 0).all() and (np.diff(case.end) >= 0).all()
    assert case.end.max() <= case.n_keys and case.q_lengths.sum() == len(case.start)
    assert case.k_lengths.sum() == case.n_keys


def test_the_page_shows_what_was_recorded():
    records = map(json.loads, (ROOT / "results" / "cpu.jsonl").read_text().splitlines())
    record = [record for record in records if record.get("bench") == "kernels"][-1]
    page = PAGE.read_text()
    assert f"at commit {record['commit']}" in " ".join(page.split())
    ratios: dict[str, list[str]] = {}
    for row in record["rows"]:
        if "padded SDPA" in row.get("ratios", {}):
            ratios.setdefault(row["case"], []).append(f"{row['ratios']['padded SDPA']:.2f}")
    for case, numbers in ratios.items():
        if len(numbers) == 3 and "of 40" not in case:
            assert f"| {case} | {' | '.join(numbers)} |" in page


def test_the_page_shows_what_was_recorded_on_a_gpu():
    records = [*map(json.loads, (ROOT / "results" / "h200.jsonl").read_text().splitlines())]
    page = PAGE.read_text()
    newest = {(row["case"], row["way"]): row for record in records
              if record.get("bench") == "kernels" for row in record["rows"] if "tflops" in row}
    for (case, way), row in newest.items():
        ratios = row["ratios"]
        numbers = (f"{row['tflops']:.0f} | {ratios['varlen_attn']:.2f} | "
                   f"{ratios['cuDNN']:.2f} |")
        before = rf"\| {case} \|" + r"[^|]*\|" * (3 * (way == "both"))
        assert way == "backward" or re.search(rf"^{before} {re.escape(numbers)}", page, re.M)
    steps = [row for record in records if record.get("bench") == "train" for row in record["rows"]]
    for row in steps[-6:]:
        assert abs(row["planned_gb"] / row["memory_gb"] - 1) < 0.03
        numbers = (f"{row['seconds'][1]:.2f} s", f"{row['samples_s']:.0f}",
                   f"{100 * row['mfu']:.1f} %", f"{row['memory_gb']:.1f} GB",
                   f"{row['planned_gb']:.1f} GB")
        assert f"| {' | '.join(numbers)} |" in page


def test_the_page_shows_the_parity_and_the_loading_that_were_recorded():
    records = [*map(json.loads, (ROOT / "results" / "cpu.jsonl").read_text().splitlines())]
    page = PAGE.read_text()
    parity = [record for record in records if "parity" in record][-1]
    assert "\n".join(summary(parity["parity"])) in page
    assert f"at commit {parity['commit']}" in " ".join(page.split())
    worst = max(row["difference"] for row in parity["parity"] if row["dtype"] == "fp32")
    assert f"differ by at most {worst:.1e}," in " ".join((ROOT / "README.md").read_text().split())
    for row in [record for record in records if record.get("bench") == "load"][-1]["rows"]:
        limit = row["ways"]["read"]["seconds"]
        for found in row["ways"].values():
            assert (f"| {found['opened']:.2f} s | {found['seconds']:.2f} s | "
                    f"{found['seconds'] / limit:.2f} |") in page


def test_the_page_shows_the_speed_of_data_that_was_recorded():
    records = [*map(json.loads, (ROOT / "results" / "cpu.jsonl").read_text().splitlines())]
    page = " ".join(PAGE.read_text().split())
    record = [record for record in records if record.get("bench") == "data"][-1]
    images, index, first, waiting = record["rows"]
    assert f"at commit {record['commit']}" in page
    for way, (_, middle, _) in images["ways"].items():
        assert f"| {middle:.0f} |" in page, way
    for number in (f"{images['ratio']:.2f} times", f"{index['rate']:,.0f} samples/s",
                   f"{first['seconds']:.2f} s", f"{100 * waiting['share']:.2f} %"):
        assert number in page


def test_loading_is_measured_beside_the_bytes_and_transformers(cli, tmp_path):
    pytest.importorskip("transformers")
    out = tmp_path / "record.jsonl"
    code, printed, err = cli(bench, "load", "--shape", "tiny", "--rounds", "1", "--folder",
                             tmp_path, "--json", out)
    assert code == 0, err
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows] == ["load, Hugging Face", "load, Meta"]
    assert [*rows[0]["ways"]] == ["read", "ours", "transformers"]
    assert all(0 < way["opened"] <= way["seconds"] for row in rows for way in row["ways"].values())
    assert "every page read" in printed and [*tmp_path.iterdir()] == [out]


def test_data_is_measured_beside_webdataset_where_it_is(tmp_path, capsys):
    pattern = bench_data.write_shards(tmp_path / "shards", 2, 10, (64, 48))
    row = bench_data.images(pattern, 0.3, turns=2)
    assert {"ours", "ours, 2 workers"} <= {*row["ways"]} and row["workers"] > 0
    assert all(0 < low <= middle <= high for low, middle, high in row["ways"].values())
    assert 0 < bench_data.first_batch(pattern)["seconds"]
    assert 0 <= bench_data.waiting(pattern, rate=200, seconds=1)["share"] < 1
    assert bench_data.index(tmp_path / "flat", 100)["rate"] > 0
    assert "samples/s" in capsys.readouterr().out


def test_the_usual_way_makes_what_clip_expects():
    picture = Image.open(io.BytesIO(bench_data.photograph(0, (640, 480))))
    x = bench_data.usual(picture, Random(0))
    assert x.shape == (3, 224, 224) and abs(float(x.mean())) < 1 and 0.1 < float(x.std()) < 2


TINY_IDEFICS = bench_train.SIZES | dict(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
    num_attention_heads=2,
    vision_config=dict(embed_dim=32, image_size=28, patch_size=14, num_hidden_layers=2,
                       num_attention_heads=2, intermediate_size=48),
    perceiver_config=bench_train.SIZES["perceiver_config"] | dict(resampler_n_latents=4))


def test_a_training_step_is_measured_beside_transformers_whose_losses_agree(capsys):
    pytest.importorskip("transformers")
    rows = bench_train.train(0.01, "", TINY_IDEFICS, n_captions=3)
    printed = capsys.readouterr().out
    ways = ["ours", "transformers, sdpa", "transformers, eager"]
    for row, case in zip(rows, bench_train.CASES, strict=True):
        assert row["case"] in printed and [*row["losses"]] == [*row["seconds"]] == ways
        assert row["peer"] in ways[1:] and row["ratio"] > 0
        assert all(0 < low <= middle <= high for low, middle, high in row["seconds"].values())
        assert 0 < row["trained"] < row["parameters"]
        mine = row["losses"]["ours"]
        assert len(mine) == bench_train.CHECKED_STEPS and mine[-1] < mine[0]
        exact = 1e-5 if case.dtype == torch.float32 else case.tolerance
        for losses in row["losses"].values():
            assert losses == pytest.approx(mine, rel=exact)
    assert rows[0]["padded_tokens"] > rows[0]["tokens"]
    assert rows[2]["padded_tokens"] == rows[2]["tokens"] == 3 * (32 + 5)


def test_losses_that_do_not_agree_are_not_timed(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    bench_train.write_idefics(tmp_path, TINY_IDEFICS)
    right = bench_train.padded

    def wrong(*args):
        inputs = right(*args)
        return inputs | dict(image_attention_mask=0 * inputs["image_attention_mask"])

    monkeypatch.setattr(bench_train, "padded", wrong)
    with pytest.raises(RuntimeError, match="nothing to compare"):
        bench_train.compare(bench_train.CASES[0], tmp_path, 0.01, 3)


def test_without_transformers_train_says_so_in_one_line(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = cli(bench, "train")
    assert code == 2 and "pip install transformers" in err and err.count("\n") == 1


def test_a_presets_step_is_measured_beside_its_plan(cli, tmp_path):
    out = tmp_path / "record.jsonl"
    for stage in ("1", "2"):
        code, printed, err = cli(
            bench, "train", "--preset", "vila-7b", "--stage", stage, "--shrink", "256",
            "--recompute", "full", "--seconds", "0.01", "--json", out)
        assert code == 0, err
        row = json.loads(out.read_text().splitlines()[-1])["rows"][0]
        assert row["mfu"] > 0 and row["memory_gb"] > 0 and row["planned_gb"] > 0
        assert row["tokens"] == row["samples"] * {"1": 80, "2": 300}[stage]
        assert "samples/s" in printed


@pytest.fixture
def few_words(monkeypatch):
    for name, n in (("N_PROMPT", 12), ("N_NEW", 5), ("MIN_TURNS", 1)):
        monkeypatch.setattr(bench_decode, name, n)
    monkeypatch.setattr(bench, "ceilings", lambda: {"copy_gb_s": 10.0})


def test_writing_is_measured_beside_transformers_and_the_speed_of_a_copy(
        cli, tmp_path, few_words):
    pytest.importorskip("transformers")
    out = tmp_path / "record.jsonl"
    code, printed, err = cli(bench, "decode", "--preset", "villa-1b", "--shrink", "64", "--seconds",
                             "0.01", "--json", out)
    assert code == 0, err
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows if "built-in" not in row["case"]] == [
        f"decode, villa-1b shrunk by 64, {what}, {n} at once"
        for n in ((1, 16) if torch.cuda.is_available() else (1,)) for what in ("text", "a picture")]
    for row in rows:
        assert row["case"] in printed and "int8" in row["tokens_s"] and row["int8_ratio"] > 0
        assert all(0 < low <= middle <= high for low, middle, high in row["seconds"].values())
        assert row["bytes"]["int8"] < max(row["bytes"].values())
        assert ("transformers" in row["tokens_s"]) == ("text" in row["case"]) == ("ratio" in row)
    assert rows[0]["bytes"]["bf16"] < rows[1]["bytes"]["bf16"]  # a picture's blocks and its keys


@pytest.mark.parametrize("n", [1, 3])
def test_the_peer_is_given_the_same_weights_and_the_same_prompts(n, few_words):
    pytest.importorskip("transformers")
    config = preset_model("villa-1b", 64)
    state = bench_decode.random_state(config, torch.device("cpu"))
    theirs = bench_decode.llama(config, state, torch.device("cpu"))
    batch = bench_decode.random_prompts(config, n, picture=False)
    ours = weights.filled(config, state).eval()
    last = (batch.positions == bench_decode.N_PROMPT - 1).nonzero()[:, 0]
    with torch.no_grad():
        right = theirs(batch.tokens.view(n, -1)).logits[:, -1].float()
        found = ours.next_logits(batch, last)[:, : config.decoder.vocab_size]
    torch.testing.assert_close(found, right, rtol=0.05, atol=0.03 * float(right.abs().max()))
    for way in (bench_decode.ours(ours, batch), bench_decode.peer(theirs, batch)):
        taken = way()
        assert taken == sorted(taken) and len(taken) in (2, bench_decode.N_NEW)


def test_a_case_or_a_preset_that_is_not_known_is_refused_by_decode(cli, few_words):
    for flags, says in ((("--case", "poem"), "choose a part of"), (("--preset", "gpt"), "gpt"),
                        (("--shrink", "0"), "at least 1"), (("--shrink", "3"), "power of 2")):
        code, _, err = cli(bench, "decode", "--seconds", "0.01", *flags)
        assert code == 2 and says in err and err.count("\n") == 1


def test_the_page_shows_the_recorded_training_steps_and_the_recorded_climb():
    records = [*map(json.loads, (ROOT / "results" / "cpu.jsonl").read_text().splitlines())]
    page = PAGE.read_text()
    steps = [r for r in records if r.get("bench") == "train"][-1]
    assert f"train --seconds 15` at commit {steps['commit']}" in " ".join(page.split())
    for row in steps["rows"]:
        ours, theirs = row["samples_s"]["ours"], row["samples_s"][row["peer"]]
        assert (f"| {row['case'].removeprefix('train, ')} | {ours:.1f} samples/s | {theirs:.1f} "
                f"samples/s | {row['ratio']:.2f} |") in page
    climb, page = [r for r in records if "ladder" in r][-1], (ROOT / "README.md").read_text()
    for number in (f"{climb['villa gap']:.2f} above", f"{climb['vila gap']:.2f} above",
                   f"50: {100 * climb['recall']:.1f} %",
                   f"{100 * climb['answers']:.1f} % of answers",
                   f"{100 * climb['blank']:.1f} % with blank", f"in {climb['minutes']} minutes"):
        assert number in page, number


def test_the_page_shows_the_recorded_writing():
    records = [*map(json.loads, (ROOT / "results" / "cpu.jsonl").read_text().splitlines())]
    record = [r for r in records if r.get("bench") == "decode"][-1]
    page = PAGE.read_text()
    assert f"decode --seconds 12` at commit {record['commit']}" in " ".join(page.split())
    for row in record["rows"]:
        tokens_s = row["tokens_s"]
        first = next(iter(tokens_s))
        shown = [row["case"].removeprefix("decode, "), f"{tokens_s[first]:.1f}",
                 f"{100 * row['share'][first]:.0f} %", f"{tokens_s['int8']:.1f}"]
        if "peer" in row:
            shown += [f"{tokens_s[row['peer']]:.1f}", f"{row['ratio']:.2f}"]
        assert "| " + " | ".join(shown) in page
