"""Readers: published sets on disk -> documents.

A reader is a function from one record, as it is stored, to a list of documents. FORMATS says which
published set has which. What cannot be used raises BadRecord with a reason that is counted;
training goes on.
"""

import base64
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

from boxes import BOX, picture_size, pixel_box, unpadded
from documents import Document, Image, Ret, Segment, Text, caption_documents, chat_document
from records import BadRecord, parse_json

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


# ------------------------------------------------------------------------- what readers work with


@dataclass
class Reading:
    """What a reader may use, besides the record."""

    rng: Random
    chat: str = "nanovilla"
    paraphrase: float = 0.0  # how often a caption may be replaced by a paraphrase
    pictures: str = ""  # the folder that the names of pictures start from
    file: str = ""  # the file that the record is in
    find: Callable[[str, object], dict | None] = lambda table, key: None  # in its side tables

    def picture(self, *names: str) -> str:
        """The path of the first of these that is there. Raises BadRecord as picture_path()."""
        return picture_path(self.pictures, *names)

    def one_of(self, caption: str, others: list[str]) -> str:
        """With probability `paraphrase`, a random choice among the caption and its paraphrases, but
        never one of a single word.

        (Fan et al. 2023, LaCLIP, arXiv:2305.20088, section 3.)
        """
        if not others or self.rng.random() >= self.paraphrase:
            return caption
        chosen = self.rng.choice([caption, *others])
        return chosen if len(chosen.split()) > 1 else caption


def picture_path(folder: str, *names: str) -> str:
    """The path of the first of these pictures that is there, below the folder.

    Raises BadRecord, also for a name or a link that leads out of that folder.
    """
    root = os.path.realpath(folder)
    for name in names:
        if not isinstance(name, str):
            raise BadRecord("not as its format", f"{name!r} instead of a picture's name")
        path = os.path.realpath(os.path.join(root, name))
        if not path.startswith(os.path.join(root, "")):
            raise BadRecord("path outside", f"{name} is not below {folder}")
        if os.path.isfile(path):
            return path
    raise BadRecord("missing picture", f"{names[0]} is not in {folder}")


def nonempty_line(text: object) -> str:
    """A caption or answer on one line. BadRecord if there is nothing in it, or it is no text."""
    line = " ".join(text.split()) if isinstance(text, str) else ""
    if not line:
        raise BadRecord("no words", "an empty caption, question or answer")
    return line


MAX_BAD_CHARACTERS = 3  # undecodable ones that a caption or an entry may have


def caption_text(content: bytes) -> str:
    """The text of a caption's file. A few bytes that are not UTF-8 are forgiven, more are not."""
    text = content.decode("utf-8-sig", errors="replace")
    if text.count("\ufffd") > MAX_BAD_CHARACTERS:
        raise BadRecord("not UTF-8", "the caption's bytes")
    return nonempty_line(text)


def as_lines(text: object) -> str:
    """Words of a conversation: newlines stay, other characters that end a line become blanks."""
    if not isinstance(text, str):
        raise BadRecord("not as its format", f"{type(text).__name__} instead of text")
    return re.sub("[\r\v\f\x1c-\x1e\x85\u2028\u2029]", " ", text.replace("\r\n", "\n")).strip()


# -------------------------------------------------------------------------------- caption pairs


MIN_ORIGINAL = 32  # pixels; a smaller picture of the web is a spacer or a dot


def read_pair(sample: dict, reading: Reading) -> list[Document]:
    """A sample of a tar shard: jpg (or png ...) + txt, and json if there is one.

    LAION-COCO's words are those of its captioner, in the json; its txt holds the page's.
    """
    picture = next((sample[s[1:]] for s in IMAGE_SUFFIXES if s[1:] in sample), None)
    if picture is None:
        raise BadRecord("no picture in the sample", " ".join(sample))
    about = parse_entry(sample.get("json", b"{}"))
    sides = [about.get(f"original_{side}") for side in ("width", "height")]
    if any(isinstance(side, int | float) and side < MIN_ORIGINAL for side in sides):
        raise BadRecord("tiny original", f"{sides[0]} x {sides[1]} pixels")
    if isinstance(about.get("top_caption"), str):
        caption = nonempty_line(about["top_caption"])
        others = about.get("all_captions")
    else:
        words = sample.get("txt")
        caption = nonempty_line(about.get("caption")) if words is None else caption_text(words)
        others = (reading.find("rewrites", sample["__key__"]) or {}).get("rewrites")
    others = [" ".join(line.split()) for line in others or [] if isinstance(line, str)]
    caption = reading.one_of(caption, [line for line in others if line not in ("", caption)])
    return caption_documents(picture, caption)


def parse_entry(content: bytes) -> dict:
    """A JSON object; BadRecord if it is none. A few bytes that are not UTF-8 are forgiven here,
    too."""
    try:
        entry = parse_json(content)
    except ValueError:
        raise BadRecord("not JSON", "") from None
    if not content.isascii():
        seen = content.decode(errors="replace").count("\ufffd")
        if seen - content.count("\ufffd".encode()) > MAX_BAD_CHARACTERS:
            raise BadRecord("not UTF-8", "the entry's bytes")
    if not isinstance(entry, dict):
        raise BadRecord("not as its format", f"{type(entry).__name__} instead of an object")
    return entry


def find_pairs(folder: str | Path) -> list[tuple[Path, str]]:
    """All (picture, caption) pairs of a folder of `name.jpg` + `name.txt`, sorted by name.

    Raises ValueError when the folder is missing or has no pair, when a picture has no caption, or
    a caption is empty or no UTF-8: a folder somebody put together by hand is worth mending.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "no such folder, but a file" if folder.exists() else "no such folder"
        raise ValueError(f"{folder}: {what}; give a folder of name.jpg + name.txt pairs")
    pairs = []
    for picture in sorted(folder.iterdir()):
        if picture.suffix.lower() not in IMAGE_SUFFIXES or picture.name.startswith("."):
            continue  # macOS leaves a hidden ._name.jpg next to each picture
        text = picture.with_suffix(".txt")
        if not text.is_file():
            raise ValueError(f"{picture}: has no caption; write it into {text.name} beside it")
        try:
            caption = " ".join(text.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError:
            raise ValueError(f"{text}: is not UTF-8 text; save it as UTF-8") from None
        if not caption:
            raise ValueError(f"{text}: is empty; write the caption of {picture.name} into it")
        pairs.append((picture, caption))
    if not pairs:
        raise ValueError(f"{folder}: no pictures; it should hold name.jpg + name.txt pairs")
    return pairs


# -------------------------------------------------------------------------------- conversations


def read_llava(entry: dict, reading: Reading) -> list[Document]:
    """LLaVA-Instruct, its mixtures, ShareGPT4V, blip_laion_cc_sbu: turns about one picture or none.

    Wherever <image> is in the first turn, the picture comes first. Boxes are given in a frame
    padded to a square; they come out as fractions of the picture itself.
    """
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRecord("not as its format", "no list of conversations")
    said = [(turn.get("from"), as_lines(turn.get("value"))) for turn in turns]
    if said and said[0][0] == "gpt":
        said = said[1:]
    questions, answers = said[0::2], said[1::2]
    if {who for who, _ in questions} != {"human"} or {who for who, _ in answers} != {"gpt"}:
        raise BadRecord("turns do not alternate", " ".join(str(who) for who, _ in said))
    if not entry.get("image") and any("<image>" in text for _, text in said):
        raise BadRecord("no picture for its <image>", "")
    pictures = [reading.picture(entry["image"])] if entry.get("image") else []
    if pictures and any(BOX.search(text) for _, text in said):
        said_of = partial(BOX.sub, partial(unpadded, size=picture_size(pictures[0])))
    else:
        said_of = str
    document = []
    for pair in zip(questions[: len(answers)], answers, strict=True):
        question, answer = (said_of(text.replace("<image>", "").strip()) for _, text in pair)
        if not answer:
            raise BadRecord("no words", "an empty answer")
        document.append((pictures if not document else [], question, answer))
    return [chat_document(document, reading.chat)]


def read_blip(entry: dict, reading: Reading) -> list[Document]:
    """blip_laion_cc_sbu_558k: LLaVA's layout, of which only the caption counts."""
    turns = entry.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2 or not isinstance(turns[1], dict):
        raise BadRecord("not as its format", "no list of conversations")
    caption = nonempty_line(turns[1].get("value"))
    return caption_documents(reading.picture(entry.get("image")), caption)


ONE_WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
FIND = "Please provide the bounding box coordinate of the region this sentence describes: {}."
DESCRIBE = "Please provide a short description for this region: {}."


def ask(reading: Reading, picture: str, question: object, answer: object, suffix: str = ONE_WORD
        ) -> list[Document]:
    """One question about one picture. BadRecord if it or its answer has no words."""
    question, answer = nonempty_line(question), nonempty_line(answer)
    return [chat_document([([picture], f"{question}\n{suffix}", answer)], reading.chat)]


def options(choices: Iterable[str], mark: str = "{}. ") -> str:
    """Choices by letter, one a line.

    >>> options(["a cat", "a dog"])
    'A. a cat\\nB. a dog'
    """
    return "\n".join(mark.format(chr(65 + i)) + choice for i, choice in enumerate(choices))


def most_common(answers: object) -> str:
    """The answer that most people gave, the first of several; they are texts or {"answer": ...}."""
    texts = [a.get("raw_answer", a.get("answer")) if isinstance(a, dict) else a
             for a in answers or []]
    texts = [text for text in texts if isinstance(text, str)]
    return Counter(texts).most_common(1)[0][0] if texts else ""


def read_vqa(entry: dict, reading: Reading) -> list[Document]:
    """VQAv2 (Goyal et al. 2017, arXiv:1612.00837) and OK-VQA (Marino et al. 2019,
    arXiv:1906.00067): the answers are in the annotations next to the questions."""
    noted = reading.find("annotations", entry.get("question_id"))
    if noted is None:
        raise BadRecord("no answer for the question", f"question {entry.get('question_id')}")
    answer = noted.get("multiple_choice_answer") or most_common(noted.get("answers"))
    return ask(reading, reading.picture(*vqa_picture(entry, reading.file)), entry.get("question"),
               answer)


def read_aokvqa(entry: dict, reading: Reading) -> list[Document]:
    """A-OKVQA (Schwenk et al. 2022, arXiv:2206.01718): the choices, by letter."""
    choices, right = entry.get("choices"), entry.get("correct_choice_idx")
    if not isinstance(choices, list) or right not in range(len(choices)):
        raise BadRecord("no answer for the question", f"question {entry.get('question_id')}")
    listed = options(map(nonempty_line, choices))
    return ask(reading, reading.picture(*coco_2017(entry, "")), entry.get("question"),
               chr(65 + right), f"{listed}\n{LETTER}")


def read_gqa(entry: dict, reading: Reading) -> list[Document]:
    """GQA (Hudson and Manning 2019, arXiv:1902.09506)."""
    return ask(reading, reading.picture(*gqa_picture(entry, "")), entry.get("question"),
               entry.get("answer"))


def read_textvqa(entry: dict, reading: Reading) -> list[Document]:
    """TextVQA (Singh et al. 2019, arXiv:1904.08920)."""
    return ask(reading, reading.picture(*textvqa_picture(entry, "")), entry.get("question"),
               most_common(entry.get("answers")))


def read_clevr(entry: dict, reading: Reading) -> list[Document]:
    """CLEVR (Johnson et al. 2017, arXiv:1612.06890)."""
    return ask(reading, reading.picture(*clevr_picture(entry, "")), entry.get("question"),
               entry.get("answer"))


# ------------------------------------------------------------------------------------ grounding


MAX_REGIONS = 8  # questions about one picture of Visual Genome


def read_refcoco(entry: dict, reading: Reading) -> list[Document]:
    """A reference of RefCOCO, + or g: find what a phrase means, or say what a box holds.

    refs.json holds the list of references (converted once from the published pickle by somebody
    who trusts it); instances.json next to it the boxes and the names of the pictures.
    """
    noted = reading.find("annotations", entry.get("ann_id")) or {}
    shown = reading.find("images", entry.get("image_id")) or {}
    path, box = reading.picture(shown.get("file_name")), ""
    if noted.get("bbox"):
        box = pixel_box(*noted["bbox"], picture_size(path))
    if not box:
        raise BadRecord("no box for the phrase", f"annotation {entry.get('ann_id')}")
    phrases = [(nonempty_line(sentence["sent"]), box) for sentence in entry["sentences"]]
    return [chat_document(grounding_turns([path], phrases, reading.rng), reading.chat)]


def read_regions(entry: dict, reading: Reading) -> list[Document]:
    """Regions of a picture of Visual Genome, a few of them drawn anew each epoch."""
    path = reading.picture(*genome_picture(entry, ""))
    size, regions = picture_size(path), []
    for r in entry.get("regions") or []:
        sides = [r.get(name) for name in ("x", "y", "width", "height")]
        if all(isinstance(side, int | float) for side in sides):
            box = pixel_box(*sides, size)
            if box and str(r.get("phrase") or "").strip():
                regions.append((nonempty_line(r["phrase"]), box))
    if not regions:
        raise BadRecord("no box for the phrase", f"picture {entry.get('id')}")
    chosen = reading.rng.sample(regions, min(MAX_REGIONS, len(regions)))
    return [chat_document(grounding_turns([path], chosen, reading.rng), reading.chat)]


def grounding_turns(pictures: list, phrases: list[tuple[str, str]], rng: Random) -> list[tuple]:
    """(phrase, box) pairs -> turns that ask for the box or, by a draw, for the phrase."""
    turns = []
    for phrase, box in phrases:
        forward = rng.random() < 0.5
        question, answer = ((FIND.format(phrase.rstrip(".")), box) if forward
                            else (DESCRIBE.format(box), phrase))
        turns.append((pictures if not turns else [], question, answer))
    return turns


# ------------------------------------------------------------------------- interleaved documents


MIN_SIMILARITY = 0.24  # of a picture and its sentence, by CLIP ViT-L/14 (OpenFlamingo's recipe)
MIN_BYTES = 11_000  # of a picture's file; smaller ones are icons (the same)
MAX_PICTURES = 6


def read_mmc4(entry: dict, reading: Reading) -> list[Document]:
    """MMC4: each picture comes before the sentence that it was matched with.

    (Zhu et al. 2023, arXiv:2304.06939.) A picture comes as base64 or is in the folder; those
    that are missing, tiny or unlike their sentence are left out.
    """
    sentences = entry.get("text_list")
    if not isinstance(sentences, list) or not isinstance(entry.get("image_info"), list):
        raise BadRecord("not as its format", "no text_list or image_info")
    before: dict[int, list] = {}
    fitting = [info for info in entry["image_info"] if isinstance(info, dict)
               and (info.get("matched_sim") or 0) >= MIN_SIMILARITY
               and info.get("matched_text_index") in range(len(sentences))]
    for info in sorted(fitting, key=lambda info: -info["matched_sim"]):
        picture = mmc4_picture(info, reading)
        if picture is not None and sum(map(len, before.values())) < MAX_PICTURES:
            before.setdefault(info["matched_text_index"], []).append(picture)
    segments: Document = []
    for number, sentence in enumerate(sentences):
        segments += [Image(picture) for picture in before.get(number, [])]
        segments.append(Text(as_lines(sentence)))
    return [interleaved(segments)]


def mmc4_picture(info: dict, reading: Reading) -> bytes | str | None:
    """The bytes or the path of a picture; None: missing, or tiny."""
    try:
        if "image_base64" in info:
            content = base64.b64decode(info["image_base64"] or "")
            return content if len(content) >= MIN_BYTES else None
        path = reading.picture(str(info.get("image_name")))
        return path if os.path.getsize(path) >= MIN_BYTES else None
    except (BadRecord, OSError, ValueError, TypeError):
        return None


def read_obelics(entry: dict, reading: Reading) -> list[Document]:
    """OBELICS: texts and images of one length, one of them at each place, in reading order.

    (Laurençon et al. 2023, arXiv:2306.16527.) Its images are addresses on the web; here each is
    a file's name below the folder of pictures, or is left out.
    """
    texts, pictures = entry.get("texts"), entry.get("images")
    if not isinstance(texts, list) or not isinstance(pictures, list) or len(texts) != len(pictures):
        raise BadRecord("not as its format", "texts and images of different lengths")
    segments: Document = []
    for text, name in zip(texts, pictures, strict=True):
        if isinstance(text, str):
            segments.append(Text(as_lines(text)))
        elif isinstance(name, str):
            try:
                segments.append(Image(reading.picture(name)))
            except BadRecord:
                continue
    return [interleaved(segments)]


def interleaved(segments: Document) -> Document:
    """Segments -> a document: texts joined, learned from the first picture on."""
    document: Document = []
    for segment in segments:
        if isinstance(segment, Image):
            document.append(segment)
        elif segment.string and document and isinstance(document[-1], Text):
            document[-1] = replace(document[-1], string=f"{document[-1].string} {segment.string}")
        elif segment.string:
            document.append(replace(segment, learn=bool(document)))
    if not any(isinstance(segment, Text) and segment.learn for segment in document):
        raise BadRecord("no picture with words after it", "")
    return document


# --------------------------------------------------------------------------------- your own data


def read_own(entry: dict, reading: Reading) -> list[Document]:
    """A line of your own documents.jsonl, in one of two forms; pictures are names of files.

        {"document": [{"text": "First"}, {"image": "a.jpg"}, {"text": "a cat", "learn": true}]}
        {"chat": [{"images": ["a.jpg"], "user": "Where is it?", "assistant": "at the top"},
                  {"user": "Show me another.", "assistant": {"image": "b.jpg"}}]}

    Text is learned where it says so; in a chat, the assistant's words are. {"ret": "b.jpg"} in a
    document retrieves a picture. "id" names the sample. Any other word is refused.
    """
    unknown = set(entry) - {"id", "document", "chat"}
    if unknown or ("document" in entry) == ("chat" in entry):
        raise BadRecord("not as its format", f"{' '.join(sorted(unknown)) or 'both or none'}: a "
                        f"line has \"document\" or \"chat\", and \"id\"")
    parts = entry.get("document", entry.get("chat"))
    if not isinstance(parts, list) or not parts or not all(isinstance(p, dict) for p in parts):
        raise BadRecord("not as its format", "a document, or a chat, is a list of objects")
    if "chat" in entry:
        return [chat_document([own_turn(part, reading) for part in parts], reading.chat)]
    return [[own_segment(part, reading) for part in parts]]


def own_turn(part: dict, reading: Reading) -> tuple[list, str, str | Ret]:
    allow(part, {"user", "assistant"}, {"images"})
    answer = part["assistant"]
    if isinstance(answer, dict):
        allow(answer, {"image"})
        answer = Ret(reading.picture(answer["image"]))
    elif not (answer := as_lines(answer)):
        raise BadRecord("no words", "an empty answer")
    if not isinstance(images := part.get("images", []), list):
        raise BadRecord("not as its format", "\"images\" is no list of pictures' names")
    return [reading.picture(name) for name in images], as_lines(part["user"]), answer


def own_segment(part: dict, reading: Reading) -> Segment:
    if "text" in part:
        allow(part, {"text"}, {"learn"})
        return Text(as_lines(part["text"]), learned(part))
    if "image" in part:
        allow(part, {"image"})
        return Image(reading.picture(part["image"]))
    allow(part, {"ret"}, {"learn"})
    return Ret(reading.picture(part["ret"]), learned(part))


def learned(part: dict) -> bool:
    learn = part.get("learn", False)
    if not isinstance(learn, bool):
        raise BadRecord("not as its format", f"\"learn\" is {learn!r}, not true or false")
    return learn


def allow(part: dict, needed: set[str], also: set[str] = frozenset()) -> None:
    """BadRecord unless an object has all these keys, and no others but `also`."""
    if not needed <= set(part) <= needed | also:
        raise BadRecord("not as its format", f"{{{', '.join(part)}}} where "
                        f"{{{', '.join(sorted(needed | also))}}} is meant")


# ------------------------------------------------------------------ whose reader, which pictures


def llava_picture(entry: dict, file: str) -> list[str]:
    name = entry.get("image")
    return [name] if name and isinstance(name, str) else []


def vqa_picture(entry: dict, file: str) -> list[str]:
    splits = re.findall(r"(?:train|val|test)20\d\d", file) or ["train2014"]
    names = [(split, f"COCO_{split}_{int(entry['image_id']):012d}.jpg") for split in splits]
    return [where + name for split, name in names for where in ("", f"{split}/")]


def coco_2017(entry: dict, file: str) -> list[str]:
    name = f"{int(entry['image_id']):012d}.jpg"
    return [name, f"train2017/{name}", f"val2017/{name}", f"test2017/{name}"]


def gqa_picture(entry: dict, file: str) -> list[str]:
    return [f"{entry['imageId']}.jpg", f"images/{entry['imageId']}.jpg"]


def textvqa_picture(entry: dict, file: str) -> list[str]:
    return [f"{entry['image_id']}.jpg", f"train_images/{entry['image_id']}.jpg"]


def clevr_picture(entry: dict, file: str) -> list[str]:
    return [entry["image_filename"], f"{entry.get('split')}/{entry['image_filename']}"]


def genome_picture(entry: dict, file: str) -> list[str]:
    name = f"{entry.get('id', entry.get('image_id'))}.jpg"
    return [name, f"VG_100K/{name}", f"VG_100K_2/{name}"]


def no_tables(path: str) -> dict[str, tuple[str, str]]:
    return {}


def vqa_tables(path: str) -> dict[str, tuple[str, str]]:
    folder, name = os.path.split(path)
    name = name.replace("OpenEnded_", "").replace("_questions", "_annotations")
    return {"annotations": (os.path.join(folder, name), "annotations")}


def refcoco_tables(path: str) -> dict[str, tuple[str, str]]:
    boxes = os.path.join(os.path.dirname(path), "instances.json")
    return {table: (boxes, table) for table in ("annotations", "images")}


def refcoco_part(entry: dict, file: str) -> bool:
    """refs.json holds all splits, of which train is read; refs_val.json has its own in its name."""
    files = " ".join(map(os.path.basename, file.split("::")))
    named = re.findall(r"train|val|test[AB]?", files)
    return entry.get("split", "train") in (named or ["train"])


@dataclass(frozen=True)
class Format:
    """How a published set is read."""

    read: Callable[[dict, Reading], list[Document]]
    list_key: str = ""  # the key whose value is the list; "": the file is the list
    pictures: Callable[[dict, str], list[str]] | None = None  # names that an entry's may have
    part: Callable[[dict, str], bool] | None = None  # of several splits, whether it is the one
    side_tables: Callable[[str], dict[str, tuple[str, str]]] = no_tables  # (file, list_key) by name


FORMATS = {
    "shards": Format(read_pair),
    "llava": Format(read_llava, pictures=llava_picture),
    "sharegpt4v": Format(read_llava, pictures=llava_picture),
    "blip": Format(read_blip, pictures=llava_picture),
    "mmc4": Format(read_mmc4),
    "obelics": Format(read_obelics),
    "refcoco": Format(read_refcoco, part=refcoco_part, side_tables=refcoco_tables),
    "vg": Format(read_regions, pictures=genome_picture),
    "vqav2": Format(read_vqa, "questions", vqa_picture, side_tables=vqa_tables),
    "okvqa": Format(read_vqa, "questions", vqa_picture, side_tables=vqa_tables),
    "aokvqa": Format(read_aokvqa, pictures=coco_2017),
    "gqa": Format(read_gqa, pictures=gqa_picture),
    "textvqa": Format(read_textvqa, "data", textvqa_picture),
    "clevr": Format(read_clevr, "questions", clevr_picture),
    "own": Format(read_own),
}

# How to tell the format when no NAME= is given: by the file's name, else by its first line.
BY_NAME = {
    r"\.tar$": "shards", r"\.parquet$": "obelics", r"^blip_.*\.json$": "blip",
    r"^docs_shard_.*\.jsonl$": "mmc4", r"^refs.*\.json$": "refcoco",
    r"^region_descriptions.*\.json$": "vg",
    r"^v2_OpenEnded_.*\.json$": "vqav2", r"^OpenEnded_mscoco_.*\.json$": "okvqa",
    r"^aokvqa_.*\.json$": "aokvqa", r"_(balanced|all)_questions.*\.json$": "gqa",
    r"^TextVQA_.*\.json$": "textvqa", r"^CLEVR_.*\.json$": "clevr", r"\.json$": "llava",
}
BY_FIELD = {"text_list": "mmc4", "texts": "obelics", "conversations": "llava", "document": "own",
            "chat": "own"}


def format_of(path: str) -> str:
    """A file -> its name in FORMATS. ValueError if nothing says what it is."""
    for pattern, name in BY_NAME.items():
        if re.search(pattern, os.path.basename(path)):
            return name
    if not path.endswith(".jsonl"):
        raise ValueError(f"{path}: is neither .tar, .json, .jsonl, .parquet nor a folder of "
                         f"name.jpg + name.txt; unpack it if it is packed")
    with open(path, "rb") as file:
        try:
            entry = parse_json(next(filter(bytes.strip, file), b""))
        except ValueError:
            entry = None
    for field_name, name in BY_FIELD.items():
        if isinstance(entry, dict) and field_name in entry:
            return name
    raise ValueError(f"{path}: its name and first line do not say what it is; put one of "
                     f"{', '.join(FORMATS)} and = in front")


def there(entry: object, name: str, root: str, file: str) -> bool:
    """Whether this entry belongs to the split and its picture exists, or it has none.

    Asked while indexing. `file`: the path of its file, or of several with :: between them.
    """
    kind = FORMATS[name]
    try:
        if kind.part and not kind.part(entry, file):
            return False
        names = kind.pictures(entry, file) if kind.pictures else []
    except (KeyError, TypeError, ValueError, AttributeError):
        return True  # which is found, and counted, when it is to be read
    return not names or any(os.path.isfile(os.path.join(root, name)) for name in names)
