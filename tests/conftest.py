"""What several test files share: a tokenizer of the drawn world and very small models.

Without a GPU, Triton's kernels run under its interpreter, on the CPU.
"""

import os
import signal

import pytest
import torch

os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))  # read with the kernels

# ruff: noqa: E402
import world
from cli import run_main
from kernels import set_backend
from model import DecoderConfig, ModelConfig, VisionLanguageModel
from tokenizer import Tokenizer, train_tokenizer
from vision import VisionConfig

OPEN = 0.5  # a gate at 0 would hide every picture from the words


def pytest_ignore_collect(collection_path, config):
    """-m quick does not even import the files that have no such test."""
    if config.option.markexpr == "quick" and collection_path.suffix == ".py":
        return "pytest.mark.quick" not in collection_path.read_text(encoding="utf-8") or None


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(world.corpus(200), path, vocab_size=1000)
    return Tokenizer(path)


@pytest.fixture(scope="session")
def tiny_config(tokenizer):
    """tiny_config(resampler=..., contrastive_dim=..., **fields of DecoderConfig) -> ModelConfig."""

    def make(resampler=None, contrastive_dim=0, **changes) -> ModelConfig:
        vision = VisionConfig(
            image_size=16, patch_size=8, dim=32, n_layers=2, n_heads=2, head_dim=16, hidden_dim=64,
            activation="gelu", embed_dim=24,
        )
        decoder = dict(
            vocab_size=tokenizer.vocab_size, dim=32, n_layers=2, n_heads=2, n_kv_heads=2,
            head_dim=16, hidden_dim=64, max_seq_len=128, cross_attn_every=2,
        )
        return ModelConfig(vision, DecoderConfig(**decoder | changes), resampler, contrastive_dim)

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """tiny_model(seed=0, **changes as in tiny_config) -> a new model, its gates open."""

    def make(seed=0, **changes) -> VisionLanguageModel:
        torch.manual_seed(seed)
        model = VisionLanguageModel(tiny_config(**changes)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("attn_gate", "mlp_gate")):
                    parameter.fill_(OPEN)
        return model

    return make


@pytest.fixture
def cli(capsys, monkeypatch):
    """cli(module, *arguments) -> (exit code, stdout, stderr) of a script run in this process."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def run(script, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *map(str, arguments)])
        code, handlers = 0, [signal.getsignal(number) for number in numbers]
        try:
            run_main(script.main)
        except SystemExit as end:
            code = end.code or 0
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def use():
    """use(backend, debug=False): choose the backend until the test ends."""
    yield set_backend
    set_backend(None)
