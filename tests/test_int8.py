"""Laws of int8: as exact as bf16 but for the rounding of weights, and never more in memory.

pytest tests/test_int8.py
"""

import subprocess
import sys
from os.path import commonprefix
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import quantised
import sample
import weights
import world
from data import collate, collate_options, encode, prompts
from documents import asking
from drawn import SHARES, DrawnWorld
from generate import generate
from kernels import int8, int8_linear, quantise
from quantised import Int8Linear, quantise_
from vision import ResamplerConfig
from weights import BUILT_IN, load_model, save_model

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAT = ROOT / "cat.jpg"
N_SAMPLES = 24  # of each stage; LOG.md has the numbers of 250


def random(*shape, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


# ------------------------------------------------------------------------------------ the kernel


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 300), st.integers(0, 99))
def test_no_weight_is_off_by_more_than_half_a_scale(n, k, seed):
    weight = random(n, k, seed=seed) * 10 ** random(n, 1, seed=seed + 1)
    q, scale = quantise(weight)
    assert q.dtype == torch.int8 and q.abs().max() <= 127 and scale.dtype == torch.float32
    assert ((q * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()
    assert (scale <= 1.01 / 127 * weight.abs().amax(1)).all()  # no coarser than need be
    assert torch.equal(scale.bfloat16().float(), scale)  # so a change of dtype leaves it exact


def test_a_row_of_zeros_stays_zero_and_its_neighbours_what_they_are():
    weight = random(3, 64)
    weight[1] = 0
    q, scale = quantise(weight)
    x = random(2, 64, dtype=torch.bfloat16)
    assert (int8_linear(x, q, scale)[:, 1] == 0).all() and scale[1] == 0
    assert torch.equal(q[[0, 2]], quantise(weight[[0, 2]])[0])


def test_a_matrix_larger_than_what_is_quantised_at_once_is_quantised_the_same(monkeypatch):
    weight = random(50, 33)
    whole = quantise(weight)
    monkeypatch.setattr(int8, "AT_ONCE", 100)  # three rows
    assert all(map(torch.equal, whole, quantise(weight)))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@settings(max_examples=25, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 200) | st.integers(1, 12).map(
    lambda n: 16 * n), st.integers(0, 999), st.sampled_from(
    [torch.float32, torch.float16, torch.bfloat16]), st.floats(1e-3, 1e3))
def test_it_is_as_exact_as_torch_with_the_same_weights(backend, rows, n, k, seed, dtype, size):
    """Errors against float64: twice those of torch in the same dtype, and four units. Torch's are
    taken over as many outputs as make their largest one no matter of luck."""
    if backend == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        dtype = torch.float16  # the interpreter's bf16 is wrong
    x = (size * random(rows, k, seed=seed)).to(dtype)
    q, scale = quantise(random(70, k, seed=seed + 1) / k**0.5)
    exact = int8_linear(x.double(), q, scale, "reference")
    theirs = F.linear(x, (q * scale[:, None]).to(dtype))
    ours = int8_linear(x, q[:n], scale[:n], backend)
    allowed = 2 * (theirs.double() - exact).abs().max() + (
        4 * torch.finfo(dtype).eps * exact.abs().max())
    assert ours.dtype == dtype and (ours.double() - exact[:, :n]).abs().max() <= allowed


@pytest.mark.parametrize("n, k", [(6, 16), (9, 32), (70, 48)])
def test_two_short_rows_that_are_read_as_one_are_as_exact(monkeypatch, n, k):
    x, (q, scale) = random(1, k, dtype=torch.bfloat16), quantise(random(n, k, seed=1))
    exact, once = int8_linear(x.double(), q, scale, "reference"), int8_linear(x, q, scale, "torch")
    monkeypatch.setattr(int8, "LARGE", 0)
    y = int8_linear(x, q, scale, "torch")
    assert (y.double() - exact).abs().max() <= 2 * (once.double() - exact).abs().max() + (
        4 * 2**-8 * exact.abs().max())


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_an_outlier_does_not_drown_the_small_numbers_of_its_row(rows):
    """LLaMA's activations have some that are a hundred times as large as all others."""
    x, weight = random(rows, 512, dtype=torch.bfloat16), random(32, 512, seed=1)
    x[:, 7], weight[:, 7] = 100, 0
    q, scale = quantise(weight)
    exact = int8_linear(x.double(), q, scale, "reference")
    error = (int8_linear(x, q, scale, "torch").double() - exact).abs().max()
    assert error <= 4 * 2**-8 * exact.abs().max()


def test_cutting_a_row_into_halves_loses_no_more_than_its_sixteenth_bit():
    x = 3 * random(5, 300)
    high, low, step = int8.halves(x)
    back = step.double() * (256 * high.double() + low.double())
    assert ((back - x.double()).abs() <= 0.51 * step).all()
    assert (step[:, 0] <= x.abs().amax(1) / 2**14.9).all()
    assert all((part == 0).all() for part in int8.halves(torch.zeros(2, 3))[:2])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_without_end_and_no_row_at_all_are_multiplied(backend):
    q, scale = quantise(random(5, 16))
    assert int8_linear(random(0, 16), q, scale, backend).shape == (0, 5)
    x = random(int8.MAX_ROWS + 1, 16)
    torch.testing.assert_close(int8_linear(x, q, scale, backend),
                               F.linear(x, q * scale[:, None]))
    torch.testing.assert_close(int8_linear(x.t().contiguous().t(), q, scale, backend),
                               int8_linear(x, q, scale, backend))  # rows apart in memory


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_goes_through_to_what_stands_in_front(backend, dtype):
    x = random(3, 32, dtype=dtype).requires_grad_()
    q, scale = quantise(random(5, 32, seed=1))
    (gradient,) = torch.autograd.grad(int8_linear(x, q, scale, backend).sum(), x)
    torch.testing.assert_close(gradient, (q * scale[:, None]).sum(0).expand(3, 32).to(dtype),
                               rtol=0.02, atol=0.02)


def test_torch_knows_shapes_and_dtypes_of_the_kernel():
    q, scale = quantise(random(5, 32))
    for rows in (1, 3):
        torch.library.opcheck(torch.ops.nanovilla.int8_linear, (random(rows, 32), q, scale))


@pytest.mark.parametrize("change, says", [
    (dict(x=random(2, 31)), r"got \(2, 31\) and \(5, 32\) torch.int8"),
    (dict(x=random(32)), r"x must be \(T, K\)"),
    (dict(x=torch.ones(2, 32, dtype=torch.int8)), "x must be a floating-point tensor"),
    (dict(weight=random(5, 32)), "weight .N, K. int8: got.*float32"),
    (dict(scale=random(4)), r"scale must be \(5,\).*got \(4,\)"),
    (dict(scale=random(5).to("meta")), "scale is on meta, x on"),
])
def test_arguments_that_do_not_fit_are_refused_with_both_sizes(change, says):
    q, scale = quantise(random(5, 32))
    with pytest.raises(ValueError, match=says):
        int8_linear(**dict(x=random(2, 32), weight=q, scale=scale) | change)


def test_only_matrices_of_numbers_are_quantised():
    for wrong in (random(4), torch.ones(2, 3, dtype=torch.int8)):
        with pytest.raises(ValueError, match=r"weight must be \(N, K\) floating-point"):
            quantise(wrong)


# -------------------------------------------------------------------------------------- the model


def test_the_decoders_layers_become_int8_and_nothing_else_does(tiny_model):
    model = tiny_model(resampler=ResamplerConfig(n_latents=3, n_layers=1, n_heads=2, head_dim=16,
                                                 hidden_dim=48), cross_attn_mlp=True)
    names = set(model.state_dict())
    quantise_(model)
    state = model.state_dict()
    new = {name for name, tensor in state.items() if tensor.dtype == torch.int8}
    assert set(state) - names == {name.replace("weight", "scale") for name in new}
    assert {".".join(name.split(".")[2:]) for name in new} == {
        *(f"attn.{part}_proj.weight" for part in "qkvo"),
        *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down"))}
    assert not any(isinstance(layer, torch.nn.Linear) for part in quantised.PARTS
                   for layer in getattr(model, part).modules())
    assert any(isinstance(layer, torch.nn.Linear) for layer in model.resampler.modules())


def test_a_model_read_as_int8_is_the_one_that_was_quantised(tmp_path, tiny_model, tokenizer):
    model = tiny_model()
    save_model(tmp_path / "model", model.config, model.state_dict(), tokenizer)
    loaded, _ = load_model(tmp_path / "model", dtype="int8")
    whole = quantise_(model).bfloat16().state_dict()
    assert set(loaded.state_dict()) == set(whole)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, whole[name]), name
    assert not any(p.requires_grad for p in loaded.parameters())
    assert isinstance(loaded.blocks[0].attn.q_proj, Int8Linear)


def test_an_unknown_dtype_is_refused(cli):
    with pytest.raises(ValueError, match="dtype 'int4': choose one of auto, fp32, bf16, "):
        load_model(BUILT_IN, dtype="int4")
    code, _, err = cli(sample, "--image", CAT, "--dtype", "int4")
    assert code == 2 and "int4" in err and err.count("\n") == 1


def test_the_command_line_answers_in_int8(cli):
    assert cli(sample, "--image", CAT, "--dtype", "int8") == cli(sample, "--image", CAT)


def test_no_matrix_is_kept_wider_while_a_model_is_read(tmp_path, tiny_config, tokenizer):
    """In a process of its own: what it adds to its memory while it reads fp32 weights of 150 MB."""
    config = tiny_config(dim=1024, hidden_dim=4096, n_heads=16, n_kv_heads=16, head_dim=64,
                         n_layers=2)
    state = {name: torch.zeros(t.shape) for name, t in
             weights.shapes(config).state_dict().items()}
    save_model(tmp_path, config, state, tokenizer)
    code = f"""
import resource, torch
from pathlib import Path
from weights import load_model
torch.set_num_threads(1)
load_model({str(BUILT_IN)!r}, dtype="int8")
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))
before = anonymous()
model, _ = load_model({str(tmp_path)!r}, dtype="int8")
print(anonymous() - before, sum(b.numel() for b in model.buffers()) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    grown, size = map(float, done.stdout.split())
    assert size > 30 and grown < 1.3 * size + 10, done


# ------------------------------------------------------------------------------------ its answers


@pytest.fixture(scope="module")
def exact():
    return load_model(BUILT_IN)


@pytest.fixture(scope="module")
def rounded():
    return load_model(BUILT_IN, dtype="int8")[0]


def drawn_batches(model, tokenizer, n: int) -> list:
    """Documents that no training saw, n samples of each stage."""
    batches = []
    for stage in ("pretrain", "instruct"):
        source = DrawnWorld(stage, model.config.vision.image_size, seed=5, split="test")
        for first in range(0, n, 8):
            documents = [[encode(document, tokenizer) for document in source[i]]
                         for i in range(first, min(first + 8, n))]
            batches.append(collate(documents, **collate_options(tokenizer, model.config)))
    return batches


@torch.no_grad()
def loss_of(model, batches) -> float:
    """The mean over all targets."""
    total = sum(float(model(batch).token_loss) for batch in batches)
    return total / sum(len(batch.target_rows) for batch in batches)


def test_the_loss_on_unseen_documents_is_within_a_hundredth_of_that_in_fp32(exact, rounded):
    batches = drawn_batches(*exact, N_SAMPLES)
    assert loss_of(rounded, batches) == pytest.approx(loss_of(exact[0], batches), rel=0.01)


@torch.no_grad()
def error_of(exact, rounded, batches) -> float:
    """The largest difference that rounding makes to any logit."""
    return max(float((rounded.next_logits(b, b.target_rows) - exact.next_logits(b, b.target_rows)
                      ).abs().max()) for b in batches)


def greedy(model, tokenizer, documents: list) -> list[list[int]]:
    batch = prompts(documents, tokenizer, model.config, model.embed.device)
    written: list[list[int]] = [[] for _ in documents]
    for step in generate(model, batch, max_new_tokens=40, stop=tokenizer.stop_ids,
                         forbidden=tokenizer.picture_ids):
        written[step.document].append(step.token)
    return written


def questions(model, tokenizer, n: int) -> list:
    """Questions about n unseen pictures, every kind in turn."""
    documents = []
    for i in range(n):
        rng, scene = Random(i), world.make_scene(i + 7000, "test")
        kinds = [kind for kind in sorted(SHARES) if world.ask(kind, scene, rng)]
        question = world.ask(kinds[i % len(kinds)], scene, rng).question
        picture = np.asarray(world.draw(scene, model.config.vision.image_size))
        documents.append(asking([picture], question, tokenizer.chat, "<image>"))
    return documents


@torch.no_grad()
def margin(model, tokenizer, document, written: list[int]) -> float:
    """By how much the likeliest next token leads behind these."""
    whole = encode(document, tokenizer, end=False)
    whole.ids += written
    whole.learn += [False] * len(written)
    batch = collate([[whole]], **collate_options(tokenizer, model.config))
    logits = model.next_logits(batch, torch.tensor([len(batch.tokens) - 1]))[0]
    logits[list(tokenizer.picture_ids)] = float("-inf")
    first, second = logits.topk(2).values.tolist()
    return first - second


def margins_where_they_part(exact, rounded, n: int) -> list[float]:
    """Of n questions, side by side and alone: fp32's margin at the first word that differs."""
    documents = questions(*exact, n)
    right = greedy(*exact, documents)
    found = greedy(rounded, exact[1], documents)
    alone = [greedy(rounded, exact[1], [document])[0] for document in documents]
    margins = []
    for document, a, *others in zip(documents, right, found, alone, strict=True):
        for b in others:
            if a != b:
                margins.append(margin(*exact, document, commonprefix([a, b])))
    return margins


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_greedy_answers_are_those_of_fp32_but_where_two_words_are_all_but_equal(exact, dtype):
    rounded = load_model(BUILT_IN, dtype=dtype)[0]
    error = error_of(exact[0], rounded, drawn_batches(*exact, N_SAMPLES))
    margins = margins_where_they_part(exact, rounded, N_SAMPLES)
    assert len(margins) <= N_SAMPLES / 5  # a tenth of all
    assert all(margin <= 2 * error for margin in margins), (margins, error)


if __name__ == "__main__":  # the numbers in LOG.md
    fp32, int8_model = load_model(BUILT_IN), load_model(BUILT_IN, dtype="int8")[0]
    bf16 = load_model(BUILT_IN, dtype="bf16")[0]
    unseen = drawn_batches(*fp32, 250)
    print("loss: fp32", right := loss_of(fp32[0], unseen))
    for name, model in (("bf16", bf16), ("int8", int8_model)):
        off = margins_where_they_part(fp32, model, 200)
        print(f"{name}: loss {loss_of(model, unseen):.5f}, {loss_of(model, unseen) / right:.5f} of "
              f"it; largest error of a logit {error_of(fp32[0], model, unseen):.3f}; of 400 "
              f"answers {len(off)} differ, at margins {sorted(round(m, 3) for m in off)}")
