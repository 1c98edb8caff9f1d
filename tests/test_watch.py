"""Laws of what a run shows: answers are the model's own, TensorBoard and the log say the same.

pytest tests/test_watch.py
"""

import json
import resource

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from cli import UserError
from data import prompts
from documents import Image, Ret, Text, caption_documents, chat_document
from generate import generate
from tests.launch import FEW
from tests.test_train import QUICK, log
from watch import LONGEST_ANSWER, Log, answers, numbers, plain, prompt_and_answer


def test_answers_are_what_generation_with_a_cache_says(tiny_model, tokenizer):
    model = tiny_model()
    pictures = [np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8) for i in range(2)]
    documents = [caption_documents(pictures[0], "a red cat.")[0],
                 chat_document([([pictures[1]], "Where is it?", "at the top")])]
    found = answers(model, tokenizer, documents, torch.device("cpu"))
    assert [one["wanted"] for one in found] == ["a red cat.", "at the top"]
    prompt = prompts([prompt_and_answer(d)[0] for d in documents], tokenizer, model.config, "cpu")
    ids = [[], []]
    for step in generate(model, prompt, max_new_tokens=LONGEST_ANSWER, stop=tokenizer.stop_ids,
                         forbidden=tokenizer.picture_ids):
        if step.token not in tokenizer.stop_ids:
            ids[step.document].append(step.token)
    assert [one["answer"] for one in found] == [tokenizer.decode(i).strip() for i in ids]


def test_a_prompt_ends_where_learning_begins():
    picture, cat = object(), Text("a cat", learn=True)
    assert prompt_and_answer([Image(picture), Text("what?"), cat, Text("and?"), cat]) == (
        [Image(picture), Text("what?")], "a cat")
    assert prompt_and_answer([cat]) == ([], "a cat")
    assert prompt_and_answer([Text("show it"), Ret(picture, True)])[1] == "<ret>"


def test_numbers_of_a_record_are_all_named():
    record = {"loss": 1.5, "gates": {"a": 1}, "stage": "x", "answers": [{"n": 3}]}
    assert list(numbers(record)) == [("loss", 1.5), ("gates/a", 1.0)]


def test_a_number_that_is_not_finite_is_null_in_the_log():
    nan, inf = float("nan"), float("inf")
    assert plain({"a": nan, "b": {"c": inf, "d": 1.5}, "e": "NaN", "f": 3, "g": [True]}) == {
        "a": None, "b": {"c": None, "d": 1.5}, "e": "NaN", "f": 3, "g": [True]}


def test_a_full_disk_under_tensorboard_is_one_line(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/null")
    log = Log(tmp_path, is_first=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))  # of a file, in bytes
    try:
        with pytest.raises(UserError, match=f"{tmp_path}/tensorboard: could not be written .File "
                                            f"too large.; .* --resume {tmp_path}"):
            for step in range(100):
                log.write({"stage": "x", "loss": 1.0}, step)
            log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_tensorboard_has_what_the_log_has_also_after_going_back(tmp_path):
    first = Log(tmp_path, is_first=True)
    sizes = []
    for step in range(4):
        first.write({"stage": "pretrain", "step": step, "loss": 9.0 - step}, step)
        sizes.append(first.size)
    first.close()
    again = Log(tmp_path, is_first=True)
    again.forget(sizes[1], 2)
    again.write({"stage": "pretrain", "step": 2, "loss": 1.0}, 2)
    again.close()
    logged = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").open()]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("pretrain/loss")
    assert logged == [event.value for event in events] == [9.0, 8.0, 1.0]


def test_other_ranks_write_and_say_nothing(tmp_path, capsys):
    silent = Log(tmp_path, is_first=False)
    silent.say("something")
    silent.write({"stage": "x", "loss": 1.0}, 0)
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == [] and silent.size == 0


def test_a_run_shows_answers_memory_and_what_was_left_out_and_draws_its_curves(
    tmp_path, cli, monkeypatch
):
    monkeypatch.setattr(train, "VAL_SAMPLES", FEW)
    out = tmp_path / "run"
    code, printed, _ = cli(train, *QUICK, "--stages", "pretrain", "--max-steps", 2, "--out", out)
    assert code == 0 and "-> '" in printed and f"curves: {out / 'curves.png'}" in printed
    step, evaluation = log(out)[0], log(out)[2]["evaluation"]
    assert step["memory_gb"] > 0.1 and step["hfu"] == step["mfu"] > 0
    assert set(evaluation["answers"][0]) == {"prompt", "wanted", "answer"}
    assert evaluation["left_out"] == {} and evaluation["skipped_steps"] == 0
    (out / "curves.png").unlink()
    assert cli(train, "--plot", out)[0] == 0 and (out / "curves.png").is_file()
    code, _, err = cli(train, "--plot", tmp_path / "nowhere")
    assert code == 2 and err.count("\n") == 1
