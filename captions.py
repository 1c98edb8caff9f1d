"""How good captions are: BLEU, ROUGE-L and CIDEr-D as coco-caption computes them, and CHAIR.

    >>> tokenize("A man's dog, isn't it?")
    ['a', 'man', "'s", 'dog', 'is', "n't", 'it']

Every reference and every candidate passes through `tokenize` first; the metrics then compare lists
of words. Their values are the fractions that pycocoevalcap 1.2 prints: 0..1, and CIDEr-D 0..10;
papers multiply both by 100. METEOR and SPICE need Java and are left out.

References and candidates are dicts by image: {image: [words, ...]} and {image: words}. Only images
with a candidate are scored, as the programs do it: a missing caption is no wrong caption, so say
how many there were.
"""

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

Words = list[str]
Image = Hashable

# --- Tokens: Stanford's PTB tokenizer 3.4.1 as pycocoevalcap calls it, without Java ---------------
# Captions come out the same; differences are left in what is no caption (v2.0, addresses, smileys).

SPELLINGS = str.maketrans({
    "“": '"', "”": '"', "`": " ", "‘": "'", "’": "'", "–": " -- ", "—": " -- ", "…": " ... ",
    "£": "#", "€": "$",  # as the PTB tokenizer writes them
    "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ",
})
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# PTB drops brackets only in capitals, and all is lower case by then: they stay.
DROPPED = re.compile(r"""['"?!,:;]|\.+|-+""")
HALVES = {
    "cannot": ["can", "not"], "gonna": ["gon", "na"], "gotta": ["got", "ta"],
    "wanna": ["wan", "na"], "gimme": ["gim", "me"], "lemme": ["lem", "me"],
    "'tis": ["'t", "is"], "'twas": ["'t", "was"],
}
# Words that keep their full stop; single letters do too.
ABBREVIATIONS = """
    adj adm adv al ala alex apr ariz assn asst atty aug ave bhd bldg blvd brig bros calif capt cf
    cie cmdr co col colo conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb
    fla fri ft ga gen gov govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lt ltd maj
    mar md messrs mfg mich minn mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla
    penn pfc ph plc ppte ppty pres prof pte ptes pty ptys pvt rd rep reps rev rt sen sens sep sept
    seq sfc sgt spc sq sr st ste supt sys tel tenn thu tue tues univ va vs vt wed wis wisc wm wyo
""".split()
TOKEN = re.compile(rf"""
    </?[a-z][^<>]*> | https?://\S+                  # a tag and an address stay whole
  | n't(?!\w) | '(?:s|m|re|ve|ll|d)(?!\w)           # what is split from the end of a word
  | 'n' | '(?:em|tis|twas|til|cause|\d\ds)(?!\w)    # what keeps its apostrophe
  | y'(?=\w)                                        # y'all
  | (?:[^\W\d_]\.)+(?!\w)                           # u.s. and p.m.
  | (?:{"|".join(ABBREVIATIONS)})\.(?!\w)
  | (?:no|nos|fig|figs|art|pp|op)\.(?=\s?\d)
  | \d+(?::\d+)+                                    # 10:30, and am of 10:30am is its own word
  | [-+]?\.?\d+(?:[.,/]\d+)*(?![\w-])
  | c(?:\+\+|\#)
  | (?: (?!n't(?!\w))\w                             # a word: letters that begin no n't,
      | (?<=\w)[-./@](?=\w) | (?<=\d),(?=\d)        # and inside of it marks of some kinds
      | (?<=[^\W\d])(?!'(?:s|m|re|ve|ll|d)(?!\w)|'n')'(?=[^\W\d]) )+
  | [\#@][^\W\d]\w*
  | [!?]+ | \.+ | -+ | \*+ | \#+ | [^\w\s]
""", re.VERBOSE)


def tokenize(caption: str) -> Words:
    """The words of a caption in lower case, without punctuation.

    >>> tokenize("Two (2) cats... can't; hello!!!")
    ['two', '-lrb-', '2', '-rrb-', 'cats', 'ca', "n't", 'hello', '!!!']
    """
    basic = "".join(c for c in caption if c <= "\uffff")  # the tokenizer knows no emoji
    words = []
    for token in TOKEN.findall(basic.lower().translate(SPELLINGS)):
        if not DROPPED.fullmatch(token):
            words += HALVES.get(token) or [BRACKETS.get(token, token)]
    return words


# --- BLEU, ROUGE-L, CIDEr-D -----------------------------------------------------------------------

SMALL, TINY = 1e-9, 1e-15  # what the BLEU program adds to counts and to matches
SIGMA = 6  # of CIDEr-D's penalty for a caption longer or shorter than the reference


def ngrams(words: Words, n: int) -> Counter:
    """How often each run of n words occurs."""
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu(references: dict[Image, list[Words]], candidates: dict[Image, Words]) -> list[float]:
    """[BLEU-1, BLEU-2, BLEU-3, BLEU-4] of a whole corpus (Papineni et al. 2002).

    An image's reference length is that of the reference closest in length, of two the shorter one.
    """
    matches, counts, length, reference_length = [0] * 4, [0] * 4, 0, 0
    for image, words in candidates.items():
        length += len(words)
        reference_length += min((abs(len(r) - len(words)), len(r)) for r in references[image])[1]
        for n in range(1, 5):
            most = Counter()  # of each n-gram, in any one reference
            for reference in references[image]:
                most |= ngrams(reference, n)
            matches[n - 1] += (ngrams(words, n) & most).total()
            counts[n - 1] += max(len(words) - n + 1, 0)
    ratio = (length + TINY) / (reference_length + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    precisions = [(m + TINY) / (c + SMALL) for m, c in zip(matches, counts, strict=True)]
    return [math.prod(precisions[:n]) ** (1 / n) * brevity for n in range(1, 5)]


def common_length(a: Words, b: Words) -> int:
    """The length of the longest common subsequence.

    >>> common_length("a cat on a mat".split(), "the cat sat on the mat".split())
    3
    """
    row = [0] * (len(b) + 1)
    for word in a:
        corner = 0  # of the row above, one place to the left
        for j, other in enumerate(b, 1):
            corner, row[j] = row[j], corner + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(references: dict[Image, list[Words]], candidates: dict[Image, Words]
            ) -> dict[Image, float]:
    """ROUGE-L of each image, with beta 1.2 (Lin 2004); the corpus value is their mean.

    Precision and recall may come from two different references. Nothing counts as one empty word.
    """
    scores = {}
    for image, words in candidates.items():
        words, precision, recall = words or [""], 0.0, 0.0
        for reference in references[image]:
            common = common_length(words, reference or [""])
            precision = max(precision, common / len(words))
            recall = max(recall, common / max(len(reference), 1))
        both = precision and recall
        scores[image] = both and 2.44 * precision * recall / (recall + 1.44 * precision)
    return scores


def cider_d(references: dict[Image, list[Words]], candidates: dict[Image, Words]
            ) -> dict[Image, float]:
    """CIDEr-D of each image, 0..10 (Vedantam et al. 2015); the corpus value is their mean.

    An n-gram weighs its count times ln(N / images with it in a reference), N and these from the
    references of the images that are scored: a part of a set is not comparable with the whole, and
    one image alone scores 0. A score is 10 times the mean over references and orders n = 1..4 of
    the cosine between weights, in which no n-gram counts more often than the reference has it.
    """
    scores = dict.fromkeys(candidates, 0.0)
    for n in range(1, 5):
        counts = {image: [ngrams(r, n) for r in references[image]] for image in candidates}
        images_with = Counter()
        for each in counts.values():
            images_with.update(set().union(*each))
        log_n = math.log(len(counts) or 1)
        idf = {gram: log_n - math.log(count) for gram, count in images_with.items()}
        for image, words in candidates.items():
            mine = {gram: count * idf.get(gram, log_n) for gram, count in ngrams(words, n).items()}
            norm = math.hypot(*mine.values())
            for reference, theirs in zip(references[image], counts[image], strict=True):
                common = 0.0
                for gram in mine.keys() & theirs.keys():
                    weight = theirs[gram] * idf[gram]
                    common += min(mine[gram], weight) * weight
                if common:
                    common /= norm * math.hypot(*[idf[g] * c for g, c in theirs.items()])
                penalty = math.exp(-((len(words) - len(reference)) ** 2) / (2 * SIGMA**2))
                scores[image] += 10 * common * penalty / (4 * len(references[image]))
    return scores


def caption_scores(references: dict[Image, list[str]], captions: dict[Image, str]
                   ) -> tuple[dict[str, float], dict[Image, float]]:
    """Every metric of captions as they were written, {image: text} against {image: [text, ...]};
    and CIDEr-D of each image.

    The images must be among those with references, ValueError otherwise, as in coco-caption.
    """
    unknown = [image for image in captions if not references.get(image)]
    if unknown:
        raise ValueError(f"no reference captions for {len(unknown)} images, first {unknown[0]!r}")
    if not captions:
        raise ValueError("no captions")
    words = {image: tokenize(caption) for image, caption in captions.items()}
    known = {image: [tokenize(r) for r in references[image]] for image in captions}
    scores = {f"BLEU-{n}": value for n, value in enumerate(bleu(known, words), 1)}
    for name, metric in (("ROUGE-L", rouge_l), ("CIDEr-D", cider_d)):
        values = metric(known, words)
        scores[name] = sum(values.values()) / len(values)
    return scores, values


# --- CHAIR: objects in captions that are not in the picture (Rohrbach et al. 2018) ----------------

PAIRS = {pair: pair for pair in (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal",
    "stop light", "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball",
    "baseball bat", "baseball glove", "tennis racket", "wine glass", "hot dog", "cell phone",
    "mobile phone", "teddy bear", "hair drier", "potted plant", "laptop computer", "home plate",
    "train track",
)} | {f"{age} {animal}": animal for age in ("baby", "adult") for animal in (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal",
    "cub",
)} | {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass",
      "passenger jet": "jet", "passenger train": "train"}
IRREGULAR = {"people": "person", "children": "child", "geese": "goose", "mice": "mouse",
             "oxen": "ox", "skis": "ski"}
# The program's rule for the singular eats a final s: these words it no longer finds as objects.
SPOILT = {"glass": "glas", "tennis": "tenni"} | dict.fromkeys(
    "bus minibus airbus ties canoes magpies thieves collies doggies".split(), "")
PLURALS = [(re.compile(ending), instead) for ending, instead in (
    ("s$", ""), ("(?<=[hosxz])es$", ""), ("ies$", "y"), ("ves$", "f"), ("ves$", "fe"))]
# As NLTK parts words: 's and a full stop at the end are on their own, hyphens stay inside.
CHAIR_WORD = re.compile(r"""'\w+|(?:[^\s;@#$%&?!()\[\]{}<>",:'.]|\.(?=\w))+|\S""")


@dataclass(frozen=True)
class Vocabulary:
    """The words for objects, and the object that each one means."""

    object_of: dict[str, str]  # {"puppy": "dog", ...}
    words: set[str]  # all of these, and those of the pairs, one by one
    clean: bool


def read_synonyms(text: str, *, clean: bool = False) -> Vocabulary:
    """The text of CHAIR's synonyms.txt: an object a line, its name first, ", " between words.

    The official program keeps stray blanks and capitals, with which it never finds a word.

    >>> read_synonyms("dog, puppy, pup\\ncat, kitten", clean=True).object_of["pup"]
    'dog'
    """
    object_of = {}
    for line in text.splitlines():
        words = line.strip().split(", ")
        if clean:
            words = [word.strip().lower() for word in words]
        object_of |= {word: words[0] for word in words if word}
    words = {word for entry in [*object_of, *PAIRS] for word in entry.split()}
    return Vocabulary(object_of, words, clean)


def singular(word: str, vocabulary: Vocabulary) -> str:
    """A noun as the program looks it up; in clean mode "bus" stays a bus."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word in SPOILT and not vocabulary.clean:
        return SPOILT[word]
    if word in vocabulary.words:
        return word
    if word.endswith("men") and word[:-3] + "man" in vocabulary.words:
        return word[:-3] + "man"
    stems = [ending.sub(instead, word) for ending, instead in PLURALS]
    return next((stem for stem in stems if stem in vocabulary.words), word)


def mentions(caption: str, vocabulary: Vocabulary) -> list[str]:
    """The objects that a caption mentions, in order, each as often as it is mentioned.

    >>> mentions("Two pups and a hot dog.", read_synonyms("dog, pup\\nhot dog"))
    ['dog', 'hot dog']
    """
    words = [singular(word, vocabulary) for word in CHAIR_WORD.findall(caption.lower())]
    joined, i = [], 0
    while i < len(words):
        pair = PAIRS.get(" ".join(words[i : i + 2]))
        joined.append(pair or words[i])
        i += 2 if pair else 1
    if "toilet" in joined:
        joined = [word for word in joined if word != "seat"]
    return [vocabulary.object_of[word] for word in joined if word in vocabulary.object_of]


def objects_shown(categories: Iterable[str], references: Iterable[str], vocabulary: Vocabulary
                  ) -> set[str]:
    """The objects of a picture: its annotated categories and what its captions mention."""
    return ({vocabulary.object_of.get(category, category) for category in categories}
            | {name for caption in references for name in mentions(caption, vocabulary)})


def chair(captions: dict[Image, str], objects: dict[Image, set[str]], vocabulary: Vocabulary
          ) -> tuple[dict[str, float], dict[Image, int]]:
    """CHAIRs, CHAIRi and recall, 0..1, and how many mentions and objects these are shares of; and
    how many wrong mentions each caption has.

    CHAIRs: captions that mention an object that is not there; CHAIRi: such mentions among all;
    recall: objects that are mentioned among those that are there. A share of nothing, which stops
    the official program, is 0. Raises ValueError for a caption of a picture without objects given.
    """
    unknown = [image for image in captions if image not in objects]
    if unknown:
        raise ValueError(f"no objects known of {len(unknown)} images, first {unknown[0]!r}")
    n_mentions = n_objects = n_found = 0
    wrong: dict[Image, int] = {}
    for image, caption in captions.items():
        mentioned = mentions(caption, vocabulary)
        wrong[image] = sum(name not in objects[image] for name in mentioned)
        n_mentions += len(mentioned)
        n_objects += len(objects[image])
        n_found += len(objects[image] & set(mentioned))
    return {"CHAIRs": sum(map(bool, wrong.values())) / max(len(captions), 1),
            "CHAIRi": sum(wrong.values()) / max(n_mentions, 1),
            "recall": n_found / max(n_objects, 1),
            "mentions": n_mentions, "objects": n_objects}, wrong
