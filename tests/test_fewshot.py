"""Laws of prompts with examples: they are OpenFlamingo's to the letter.

pytest tests/test_fewshot.py
"""

from dataclasses import replace

import pytest

from benchmarks import BENCHMARKS, Question
from eval import prompt_text
from fewshot import Examples, cut_answer, cut_caption, with_examples
from tests.folders import make
from weights import BUILT_IN, load_model


def test_a_prompt_with_examples_is_openflamingos_to_the_letter():
    def asked(question, answer=""):
        return Question("1", "", (b"x",), {}, bare=(question, answer))

    examples = [asked("What color?", "red"), asked("How many?", "2")]
    document = with_examples(asked("Is it day?"), examples, show=False)
    assert prompt_text(document) == (
        "Question:What color? Short answer:red<|endofchunk|>\nQuestion:How many? Short answer:2"
        "<|endofchunk|>\n<image>Question:Is it day? Short answer:")
    caption = with_examples(asked("", "a cat"), [asked("", "a dog")], show=True)
    assert prompt_text(caption) == "<image>Output:a dog<|endofchunk|>\n<image>Output:"


def test_the_most_similar_pictures_come_last(tmp_path):
    make("coco", tmp_path)
    model, _ = load_model(BUILT_IN)
    pool = [*BENCHMARKS["coco"].read(tmp_path, "train")]
    examples = Examples(pool, 3, model)
    for question in pool:  # another one about the same picture
        assert examples(replace(question, id="x"))[-1] == question
        assert question not in examples(question)


@pytest.mark.parametrize("text, answer", [
    ("red, white and blue", "red"),
    ("1,000 people", "1,000 people"),
    ("Short", ""), ("Short answer: red", ""),
    (" red Question:What?", "red"),
    ("two dogs Answer: 2", "two dogs"),
    ("aQuestion", "a"),
    ("short answer", "short answer"),
])
def test_a_few_shot_answer_ends_where_the_next_question_begins(text, answer):
    assert cut_answer(text) == answer


def test_a_generated_caption_ends_where_the_next_begins():
    assert cut_caption(' a "red" cat\nOutput: a dog Output:') == "a red cat"
