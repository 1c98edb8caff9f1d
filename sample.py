"""Ask a model about a picture.

    python sample.py --image cat.jpg --prompt "What is in the picture?"
    python sample.py --image a.jpg --image b.jpg --prompt "Which picture has more cats?"
    python sample.py --image a.jpg --image b.jpg --prompt "<image> How does it differ from <image>?"
    python sample.py --model out/tiny/model --image cat.jpg        # without a prompt: a caption
    python sample.py --image cat.jpg --prompts questions.txt       # an answer a line

The answer appears word by word as it is made.
"""

import json
import math
import sys
import time
from pathlib import Path

from answering import BATCH, answer_all
from config import Parser, UserError, input_errors, pick_device, run_main
from data import prompts
from formats import asking
from generate import generate
from model import VisionLanguageModel
from tokenizer import StreamDecoder, Tokenizer
from vision import open_image
from weights import BUILT_IN, load_model


def arguments():
    parser = Parser(prog="sample.py", description="Ask a model about a picture.")
    add = parser.add_argument
    add("--image", action="append", default=[], help="a picture; several are shown in order")
    add("--prompt", help="the question; pictures stand where it says <image>, else in front "
        "(default: what is in the picture)")
    add("--prompts", metavar="FILE", help="ask each line of it (-: of what comes in), all side by "
        "side; an answer a line")
    add("--model", default="", help="model folder (default: the small one that ships here)")
    add("--device", default="cpu", choices=["auto", "cpu", "cuda", "mps"],
        help="where to compute (default: cpu)")
    add("--temperature", type=float, default=0.0, help="0: always the likeliest word")
    add("--top-k", type=int, default=0, help="draw among the k likeliest only (0: all)")
    add("--top-p", type=float, default=1.0, help="draw among the likeliest that make up this much")
    add("--seed", type=int, default=0, help="fixes the draws")
    add("--max-new-tokens", type=int, default=128, help="longest answer")
    add("--min-new-tokens", type=int, default=0, help="shortest answer")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: words of the answer become "
        "less likely to come again")
    add("--stop", action="append", default=[], metavar="TEXT", help="the answer ends before this; "
        "may be given several times")
    add("--json", action="store_true", help="print one JSON object instead of words")
    args = parser.parse_args()
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty: ask something, or leave it out for a caption")
    if not args.image and args.prompt is None and not args.prompts:
        parser.error("nothing to do: give --image FILE, --prompt TEXT or both")
    if args.prompt is not None and args.prompts:
        parser.error("--prompt and --prompts: give one of them")
    if args.temperature < 0 or not math.isfinite(args.temperature):
        parser.error(f"--temperature must be 0 or more, and finite, got {args.temperature}")
    if not 0 <= args.seed < 2**31:
        parser.error(f"--seed must be at least 0 and below {2**31}, got {args.seed}")
    if args.top_k < 0 or not 0 < args.top_p <= 1:
        parser.error("--top-k must be 0 or more, and --top-p above 0 and at most 1")
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    if not 0 <= args.min_new_tokens <= args.max_new_tokens:
        parser.error("--min-new-tokens must be at least 0, and not above --max-new-tokens")
    if not 0 < args.repetition_penalty < math.inf or not all(args.stop):
        parser.error("--repetition-penalty must be above 0 and finite, --stop not empty")
    return args


def main() -> None:
    args = arguments()
    with input_errors():
        pictures = [open_image(path, rgb=False) for path in args.image]
    device = pick_device(args.device)
    with input_errors():
        model, tokenizer = load_model(args.model or BUILT_IN, device)
    most = model.config.decoder.max_images
    if most and len(pictures) > most:
        raise UserError(f"{len(pictures)} pictures, but this model tells at most {most} apart")
    options = dict(
        max_new_tokens=args.max_new_tokens, min_new_tokens=args.min_new_tokens,
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed,
        repetition_penalty=args.repetition_penalty)
    if args.prompts:
        with input_errors():
            return answer_lines(args, pictures, model, tokenizer, options)
    # A terminal's bytes that are no UTF-8 arrive as lone surrogates, which no tokenizer takes.
    prompt = (args.prompt or "What is in the picture?").encode("utf-8", "replace").decode("utf-8")
    with input_errors():
        document = asking(pictures, prompt, tokenizer.chat, "<image>")
    batch = prompts([document], tokenizer, model.config, model.embed.device)
    began, stream, first = time.perf_counter(), StreamDecoder(tokenizer), 0.0
    words, shown, ids, logprobs = "", 0, [], []
    with input_errors():
        for step in generate(model, batch, stop=tokenizer.stop_ids,
                             forbidden=tokenizer.picture_ids, **options):
            if not ids:
                first = time.perf_counter() - began
                if not args.model:
                    sys.stderr.write("This small built-in model knows drawn scenes only; "
                                     "for photographs give --model FOLDER.\n")
            ids.append(step.token)
            logprobs.append(step.logprob)
            if step.token in tokenizer.stop_ids:
                break
            words += stream.push(step.token)
            if ended(words, args.stop) < len(words):
                break
            if not args.json:  # all that no stop text can begin in
                safe = max(len(words) - max(map(len, args.stop), default=1) + 1, shown)
                print(printable(words[shown:safe]), end="", flush=True)
                shown = safe
    words += stream.flush()
    words = words[: ended(words, args.stop)]
    if args.json:
        seconds = time.perf_counter() - began
        print(json.dumps({"prompt": prompt, "images": args.image, "answer": words, "tokens": ids,
                          "logprobs": logprobs, "seconds": seconds, "first_token_seconds": first,
                          "tokens_per_second": len(ids) / seconds}))
    else:
        print(printable(words[shown:]))


def answer_lines(args, pictures: list, model: VisionLanguageModel, tokenizer: Tokenizer,
                 options: dict) -> None:
    """Answer every line of --prompts, BATCH of them at a time."""
    asked = lines_of(args.prompts)
    answers = []
    for first in range(0, len(asked), BATCH):
        documents = [asking(pictures, line, tokenizer.chat, "<image>")
                     for line in asked[first : first + BATCH]]
        for said in answer_all(model, tokenizer, documents, **options):
            words = said.answer
            answers.append(" ".join(words[: ended(words, args.stop)].split()))
            if not args.json:
                print(printable(answers[-1]), flush=True)
    if args.json:
        print(json.dumps({"images": args.image, "answers": [
            {"prompt": line, "answer": answer}
            for line, answer in zip(asked, answers, strict=True)]}))


def lines_of(name: str) -> list[str]:
    """The lines of a file, or of standard input, that have words. ValueError if there are none."""
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise ValueError(f"--prompts {name}: cannot be read: {error.strerror}") from None
    lines = content.decode("utf-8-sig", errors="replace").split("\n")
    if not any(map(str.strip, lines)):
        raise ValueError(f"--prompts {name}: has no line with a question")
    return [line.strip() for line in lines if line.strip()]


def ended(words: str, stops: list[str]) -> int:
    """Where an answer ends: at the first of these texts, else behind its last character.

    >>> ended("a cat. User: and", ["User:", "."]), ended("a cat", ["."])
    (5, 5)
    """
    return min([words.find(stop) for stop in stops if stop in words], default=len(words))


def printable(text: str) -> str:
    """Text without control characters: an answer must not steer the terminal."""
    return "".join(c for c in text if c == "\n" or c.isprintable())


if __name__ == "__main__":
    run_main(main)
