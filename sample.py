"""Ask a model about a picture, or talk with it.

    python sample.py --image cat.jpg --prompt "What is in the picture?"
    python sample.py --image a.jpg --image b.jpg --prompt "Which picture has more cats?"
    python sample.py --image a.jpg --image b.jpg --prompt "<image> How does it differ from <image>?"
    python sample.py --model out/tiny/model --image cat.jpg        # without a prompt: a caption
    python sample.py --image cat.jpg --prompts questions.txt       # an answer a line
    python sample.py --image cat.jpg --heatmap heat.png            # where each word looked
    python sample.py --gallery photos/ --prompt "Show me a red cat at the top."
    python sample.py --chat --gallery photos/ --save chat.html     # a conversation

The answer appears word by word as it is made. One question is a conversation of one turn: chat.py
answers, here are the flags and the files that come of it.
"""

import installed  # noqa: F401

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import PIL.Image

import page
from answering import answer_each
from chat import (
    MARK,
    Conversation,
    ShownPicture,
    Terminal,
    Turn,
    ended,
    print_answer,
    transcript,
    words_with_maps,
)
from cli import Parser, disk_errors, input_errors, one_line, pick_device, printable, run_main
from files import atomic_write
from gallery import open_gallery
from looking import block_names, draw_boxes, seen_part, strip, word_spans
from tokenizer import Tokenizer
from vision import PictureError, open_image, to_rgb
from weights import BUILT_IN, DTYPES, load_model

FILES = ("heatmap", "draw", "save")  # that an answer may be written to
NOT_WITH = {
    "chat": ("prompt", "prompts", "json", "logprobs", "heatmap", "draw"),
    "prompts": ("prompt", "gallery", "logprobs", "heatmap", "draw", "save"),
    "json": ("logprobs",),
}


def arguments() -> argparse.Namespace:
    parser = Parser(prog="sample.py", description="Ask a model about a picture, or talk with it.")
    add = parser.add_argument
    add("--image", action="append", default=[], help="a picture; several are shown in order")
    add("--prompt", help="the question; pictures stand where it says <image>, else in front "
        "(default: what is in the picture)")
    add("--prompts", metavar="FILE", help="ask each line of it (-: of what comes in), all side by "
        "side; an answer a line")
    add("--chat", action="store_true", help="talk: questions from the keyboard, or from a file by "
        "< FILE; /help in it explains more")
    add("--few-shot", metavar="FILE", help="examples that come first: blocks of lines image: FILE, "
        "question: TEXT, answer: TEXT, with a blank line between them")
    add("--gallery", metavar="FOLDER", help="of pictures; one of them is shown where the model "
        "answers with a picture")
    add("--model", default="", help="model folder (default: the small one that ships here)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    add("--dtype", default="auto", choices=[*DTYPES], help="of the weights (default: as they are "
        "saved); int8: of the decoder's layers, half the bytes of bf16, for large models")
    add("--temperature", type=float, default=0.0, help="0: always the likeliest word")
    add("--top-k", type=int, default=0, help="draw among the k likeliest only (0: all)")
    add("--top-p", type=float, default=1.0, help="draw among the likeliest that make up this much")
    add("--seed", type=int, default=0, help="fixes the draws")
    add("--max-new-tokens", type=int, default=128, help="longest answer")
    add("--min-new-tokens", type=int, default=0, help="shortest answer")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: words of the answer become "
        "less likely to come again")
    add("--beams", type=int, default=1, help="search for a likely answer with so many beams "
        "(captions are commonly compared with 3; the answer appears when it is whole)")
    add("--stop", action="append", default=[], metavar="TEXT", help="the answer ends before this; "
        "may be given several times")
    add("--heatmap", metavar="FILE", help="a picture of where each word of the answer looked")
    add("--heatmap-blocks", metavar="LAYERS", help="of these gated blocks alone, such as 3,7, "
        "by the layers they stand before (default: all)")
    add("--draw", metavar="FILE", help="the last picture, with the boxes of the answer drawn on it")
    add("--save", metavar="FILE", help="a page of what was said, with pictures; a word pointed at "
        "shows where it looked")
    add("--logprobs", action="store_true", help="after the answer a line for each word, with its "
        "log-probability")
    add("--json", action="store_true", help="print one JSON object instead of words")
    args = parser.parse_args()
    check_what_is_asked(args, parser)
    check_numbers(args, parser)
    with input_errors():
        check_files(args)
    return args


def check_what_is_asked(args: argparse.Namespace, parser: Parser) -> None:
    given = {name for name, value in vars(args).items() if value not in (None, False)}
    for name, others in NOT_WITH.items():
        both = [other for other in others if {name, other} <= given]
        if both:
            parser.error(f"--{name} and --{both[0]}: give one of them")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty: ask something, or leave it out for a caption")
    if not (args.image or args.prompt is not None or args.prompts is not None or args.chat):
        parser.error("nothing to do: give --image FILE, --prompt TEXT or both, or --chat")
    if sys.stdin is None and (args.chat or args.prompts == "-"):
        parser.error("standard input is closed: questions come from there")
    for name in ("heatmap", "draw"):
        if getattr(args, name) is not None and not args.image and not args.gallery:
            parser.error(f"--{name} needs a picture: give --image FILE or --gallery FOLDER")
    if args.heatmap_blocks is not None:
        if args.heatmap is None and args.save is None:
            parser.error("--heatmap-blocks goes with --heatmap or --save")
        try:
            args.heatmap_blocks = [int(layer) for layer in args.heatmap_blocks.split(",")]
        except ValueError:
            parser.error(f"--heatmap-blocks {args.heatmap_blocks}: must be numbers, such as 3,7")


def check_numbers(args: argparse.Namespace, parser: Parser) -> None:
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
    if not 1 <= args.beams <= 64:
        parser.error(f"--beams must be from 1 to 64, got {args.beams}")
    drawn = args.temperature or args.top_k or args.top_p < 1 or args.seed
    if args.beams > 1 and (drawn or args.repetition_penalty != 1):
        parser.error("--beams search for the likeliest: give no --temperature, --top-k, --top-p, "
                     "--seed or --repetition-penalty with them")


def check_files(args: argparse.Namespace, examples: Sequence[tuple] = ()) -> None:
    """ValueError unless all that is to be written can be, without harm to what is read."""
    for name in ("gallery", "few_shot", "prompts"):
        if getattr(args, name) == "":
            raise ValueError(f"--{name.replace('_', '-')} is empty: give a name")
    if args.gallery is not None and not os.path.isdir(args.gallery):
        what = "is a file, no folder" if os.path.exists(args.gallery) else "no such folder"
        raise ValueError(f"--gallery {args.gallery}: {what}; give a folder of pictures")
    shown = [seen.path for _, pictures, _ in examples for seen in pictures]
    taken = {os.path.realpath(path)
             for path in (*args.image, *shown, args.few_shot, args.prompts) if path}
    folders = [os.path.join(os.path.realpath(folder), "")
               for folder in (args.gallery, args.model or BUILT_IN) if folder]
    for name in FILES:
        path = getattr(args, name)
        if path is None:
            continue
        real, folder = os.path.realpath(path), os.path.dirname(path) or "."
        if not path:
            raise ValueError(f"--{name} is empty: give a file's name")
        if os.path.isdir(path):
            raise ValueError(f"--{name} {path}: is a folder; give a file's name")
        if not os.path.isdir(folder):
            raise ValueError(f"--{name} {path}: there is no folder {folder}; make it first")
        inside = real.startswith(tuple(folders)) and os.path.exists(path)
        if real in taken or inside:
            raise ValueError(f"--{name} {path}: is read, or written, already; choose another name")
        taken.add(real)
        if name != "save" and not writable_format(path):
            raise ValueError(f"--{name} {path}: call it .png or .jpg")
    if args.chat and args.save and os.path.lexists(args.save):
        raise ValueError(f"--save {args.save}: is there already; choose another name")


def writable_format(path: str) -> str:
    """Pillow's name of the format that a file's name ends in; "" if there is none."""
    return {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(
        Path(path).suffix.lower(), "")


def main() -> None:
    args = arguments()
    with input_errors():
        examples = read_examples(args.few_shot) if args.few_shot is not None else []
        check_files(args, examples)  # again: they have pictures
        pictures = [ShownPicture(path, open_image(path, rgb=False)) for path in args.image]
        asked = lines_of(args.prompts) if args.prompts is not None else {}
    device = pick_device(args.device)
    with input_errors():
        model, tokenizer = load_model(args.model or BUILT_IN, device, args.dtype)
        block_names(model, args.heatmap_blocks)
        gallery = open_gallery(args.gallery, model) if args.gallery is not None else None
    if gallery and gallery.skipped:
        remark(f"{len(gallery.skipped)} of the gallery's files are left out: "
                 f"{gallery.skipped[0]}")
    conversation = Conversation(
        model, tokenizer, gallery, args.stop, remark, max_new_tokens=args.max_new_tokens,
        min_new_tokens=args.min_new_tokens, n_beams=args.beams, **drawing(args))
    for example in examples:
        conversation.tell(*example)
    if args.chat:
        hint(args)
        return Terminal(conversation, pictures, args.save, args.heatmap_blocks).run()
    with input_errors():
        if asked:
            answer_lines(args, pictures, asked, conversation)
        else:
            answer_one(args, pictures, conversation)


def drawing(args: argparse.Namespace) -> dict:
    """How words are drawn: options of generate()."""
    return dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed,
                repetition_penalty=args.repetition_penalty)


def hint(args: argparse.Namespace) -> None:
    if not args.model:
        remark("This small built-in model knows drawn scenes only; for photographs give --model "
                 "FOLDER.")


def remark(line: str) -> None:
    """A line for the user that is no part of an answer."""
    sys.stderr.write(one_line(line) + "\n")


# ------------------------------------------------------------------------------------ examples


def read_examples(path: str) -> list[tuple[str, list[ShownPicture], str]]:
    """A file of (question, pictures, answer) that a conversation may begin with.

    Blocks between blank lines, their pictures' paths as seen from the file:

        image: a.jpg
        question: What is it?
        answer: a red cat

    A block may have any number of pictures; <image> in the question says where they stand.
    ValueError names the line that is wrong.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    examples, block = [], {}
    for number, line in enumerate([*lines, ""], 1):
        name, colon, value = (part.strip() for part in line.partition(":"))
        if not line and block:
            examples.append(example(block, f"{path}: line {number - 1}"))
            block = {}
        elif line and (name not in ("image", "question", "answer") or not colon or not value):
            raise ValueError(f"{path}: line {number}: must be image:, question: or answer: and "
                             f"something after it")
        elif name == "image":
            picture = os.path.join(os.path.dirname(path), value)
            try:
                seen = ShownPicture(picture, open_image(picture, rgb=False))
            except PictureError as error:
                raise ValueError(f"{path}: line {number}: {error}") from None
            block.setdefault(name, []).append(seen)
        elif name in block:
            raise ValueError(f"{path}: line {number}: a second {name}; a blank line stands between "
                             f"examples")
        elif line:
            block[name] = value
    if not examples:
        raise ValueError(f"{path}: has no examples; see sample.py --help")
    return examples


def example(block: dict, where: str) -> tuple[str, list[ShownPicture], str]:
    for name in ("question", "answer"):
        if name not in block:
            raise ValueError(f"{where}: the example that ends here has no {name}:")
    question, pictures = block["question"], block.get("image", [])
    if (n := question.count(MARK)) not in (0, len(pictures)):
        raise ValueError(f"{where}: the example that ends here has {n} {MARK} marks, but "
                         f"{len(pictures)} pictures")
    return question, pictures, block["answer"]


# ------------------------------------------------------------------------------- one question


def answer_one(args: argparse.Namespace, pictures: list[ShownPicture],
               conversation: Conversation) -> None:
    pieces = conversation.ask(args.prompt or "What is in the picture?", pictures)
    hint(args)
    if args.json:
        for _ in pieces:
            pass
    else:
        print_answer(pieces)
    turn = conversation.turns[-1]
    if args.json:
        print(json.dumps(as_json(turn)))
    if args.logprobs:
        for stretch in turn.stretches:
            left = len(stretch.text)  # of what a stop text left
            for word, places in word_spans(conversation.tokenizer, stretch.ids):
                total = sum(stretch.logprobs[place] for place in places)
                if left > 0:
                    print(f"{total:9.4f}  {one_line(word).strip()}")
                left -= len(word)
    write_files(args, conversation, turn)


def as_json(turn: Turn) -> dict:
    tokens = [token for stretch in turn.stretches for token in stretch.ids]
    return {
        "prompt": turn.question,
        "images": [seen.path for seen in turn.pictures],
        "answer": turn.words,
        "pictures": [{"path": seen.path, "score": seen.score} for seen in turn.found],
        "tokens": tokens,
        "logprobs": [logprob for stretch in turn.stretches for logprob in stretch.logprobs],
        "seconds": turn.seconds,
        "first_token_seconds": turn.first_seconds,
        "tokens_per_second": len(tokens) / turn.seconds,
    }


def write_files(args: argparse.Namespace, conversation: Conversation, turn: Turn) -> None:
    """--save, --draw and --heatmap of an answer; of one without anything to draw only a line."""
    vision, seen = conversation.model.config.vision, turn.pictures + turn.found
    if args.save:
        page.write(args.save, transcript(conversation, args.heatmap_blocks))
    if args.draw:
        n_boxes = 0
        if seen:
            picture = to_rgb(seen[-1].picture)
            drawn, n_boxes = draw_boxes(picture, turn.words, seen_part(picture.size, vision))
        if n_boxes:
            save_picture(drawn, args.draw)
        else:
            remark(f"{args.draw}: not written, the answer names no box in a picture")
    if args.heatmap:
        words = [word for stretch in turn.stretches
                 for word in words_with_maps(conversation, stretch, args.heatmap_blocks)]
        n_maps = max((len(word.maps) for word in words), default=0)
        for word in words:  # one in front of a picture has not looked at it
            word.maps += [0 * map for map in word.maps[:1]] * (n_maps - len(word.maps))
        if n_maps:
            save_picture(strip([one.picture for one in seen], words, vision), args.heatmap)
        else:
            remark(f"{args.heatmap}: not written, the answer has no word that saw a picture")


def save_picture(picture: PIL.Image.Image, path: str) -> None:
    """Whole or not at all."""
    with disk_errors(Path(path)), atomic_write(path) as part:
        picture.save(part, writable_format(path))


# ------------------------------------------------------------------------------- many questions


def answer_lines(args: argparse.Namespace, pictures: list[ShownPicture], asked: dict[int, str],
                 conversation: Conversation) -> None:
    """Answer every line of --prompts, many side by side; shown in their order."""
    answers: dict[int, dict] = {}
    documents, n_shown, began = [], 0, time.perf_counter()
    for number, line in asked.items():
        try:
            documents.append(conversation.prompt(line, pictures))
        except ValueError as error:
            raise ValueError(f"--prompts {args.prompts}: line {number}: {error}") from None
    hint(args)
    for number, said in answer_each(
            conversation.model, conversation.tokenizer, documents, n_beams=args.beams,
            max_new_tokens=args.max_new_tokens, min_new_tokens=args.min_new_tokens,
            **({} if args.beams > 1 else drawing(args))):
        n = n_until_stop(conversation.tokenizer, said.tokens, args.stop)
        words = said.answer[: ended(said.answer, args.stop)]
        if n == len(said.tokens) < args.max_new_tokens and (
                said.tokens[-1] not in conversation.tokenizer.stop_ids):
            remark(f"line {[*asked][number]}: the answer ends where the model reads no more")
        answers[number] = {"answer": " ".join(words.split()), "tokens": said.tokens[:n],
                           "logprobs": said.logprobs[:n]}
        while n_shown in answers:
            if not args.json:
                print(printable(answers[n_shown]["answer"]), flush=True)
            n_shown += 1
    seconds = time.perf_counter() - began
    if args.json:
        n_tokens = sum(len(answer["tokens"]) for answer in answers.values())
        print(json.dumps({"images": args.image, "seconds": seconds,
                          "tokens_per_second": n_tokens / seconds, "answers": [
            {"prompt": line} | answers[i] for i, line in enumerate(asked.values())]}))


def n_until_stop(tokenizer: Tokenizer, tokens: Sequence[int], stops: list[str]) -> int:
    """How many tokens there are up to the one that completes a stop text; all, if none does."""
    for n in range(1, len(tokens)) if stops else ():
        words = tokenizer.decode([t for t in tokens[:n] if t not in tokenizer.stop_ids])
        if ended(words, stops) < len(words):
            return n
    return len(tokens)


def lines_of(name: str) -> dict[int, str]:
    """The lines of a file, or of standard input, that have words, by their numbers. ValueError if
    there are none."""
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise ValueError(f"--prompts {name}: cannot be read: {error.strerror}") from None
    lines = content.decode("utf-8-sig", errors="replace").split("\n")
    if not any(map(str.strip, lines)):
        raise ValueError(f"--prompts {name}: has no line with a question")
    return {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}


if __name__ == "__main__":
    run_main(main)
