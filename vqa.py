"""Questions about pictures, answered with letters or in a few words.

    >>> mmmu_choice("The answer is (B).", ["a cat", "a dog"])
    'B'
    >>> vqa_accuracy("Two", ["2", "2", "two"] + 7 * ["3"])
    0.9

Letters: MMMU and ScienceQA. Free answers: VQAv2, OK-VQA, TextVQA, GQA and A-OKVQA. Ten people
answered each question of VQA, and an answer is as right as many of them agree with it. What counts
as agreement is a matter of normalisation, of which there are several: results are only comparable
under the same one. Functions and results are shaped as in scores.py.
"""

import ast
import contextlib
import random
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from scores import Id, Result, macro_f1, parse_all, percent, percent_by, result

LETTERS = "ABCDEFGHI"


def letter_named(answer: str, letters: str) -> str | None:
    """What a person takes for the letter of an option. Clean mode of MMMU and ScienceQA.

    Of several that are marked, as in "(A) is wrong, so (D)", the last one.

    >>> letter_named("d. orange", "ABCD"), letter_named("A dog", "ABCD")
    ('D', None)
    """
    marked = re.findall(r"\(([A-Z])\)|(?i:answer|option)(?: is|:)*\W*([A-Z])\b", answer)
    first = re.match(r"\W*([A-Za-z])(?:[^\w\s'-]|\W*$)", answer)
    letter = "".join(marked[-1]) if marked else first[1].upper() if first else ""
    return letter if letter and letter in letters else None


# --- MMMU (mmmu/utils/eval_utils.py) --------------------------------------------------------------

MMMU_DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine "
                           "Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics "
                            "Energy_and_Power Materials Mechanical_Engineering",
}
MMMU_DOMAIN = {subject: domain for domain, names in MMMU_DOMAINS.items()
               for subject in names.split()}


def mmmu_choice(answer: str, options: list[str], *, clean: bool = False,
                guess: random.Random | None = None) -> str | None:
    """The letter that an answer names: "(B)", else " B ", else an option's text in a long answer.

    Of several the one named last. None if there is none, or what `guess` draws: the official
    program guesses, from random.Random(42).

    >>> mmmu_choice("(A) is wrong, so (D)", ["1", "2", "3", "4"]), mmmu_choice("B)", ["1", "2"])
    ('D', None)
    """
    letters = LETTERS[: len(options)]
    if clean and (named := letter_named(answer, letters)):
        return named
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer = f" {answer} "
    ways = [(answer, {letter: f"({letter})" for letter in letters}),
            (answer, {letter: f" {letter} " for letter in letters})]
    if len(answer.split()) > 5:
        texts = [option.lower() for option in options]
        ways.append((answer.lower(), dict(zip(letters, texts, strict=True))))
    for text, names in ways:
        last = {letter: text.rfind(name) for letter, name in names.items() if name in text}
        if last:
            return max(last, key=last.get)  # of equals the first
    return guess.choice(letters) if guess else None


INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = [re.compile(pattern) for pattern in (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,000,000
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.5e3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)]


def mmmu_pieces(answer: str, *, clean: bool = False) -> list[str | float]:
    """The words and numbers of an open answer among which the right one is looked for.

    >>> mmmu_pieces("So the answer is 6.333")
    [6.33]
    """
    keeps_point = clean and re.match(r"\s*\.\d", answer)
    answer = answer.strip().strip(".").lower()
    lines = (f".{answer}" if keeps_point else answer).split("\n")
    kept = []
    for i, line in enumerate(lines):
        shortest = ""
        for indicator in INDICATORS + ("=",) * (i == len(lines) - 1):
            if indicator in line:
                rest = line.split(indicator)[-1].strip()
                if not shortest or len(rest) < len(shortest):
                    shortest = rest
        if shortest and shortest not in {*":,.!?;'"}:
            kept.append(shortest)
    kept = kept or ["\n".join(lines)]  # no part found: all of it
    kept += [number for piece in kept for pattern in NUMBERS for number in pattern.findall(piece)]
    return list(dict.fromkeys(normal for piece in kept for normal in mmmu_normal(piece)))


def mmmu_normal(piece: str) -> list[str | float]:
    """A number to two decimals, words in lower case, one letter with a blank on either side.

    >>> mmmu_normal("1,234.567"), mmmu_normal("C")
    ([1234.57], [' c', 'c '])
    """
    piece = piece.strip()
    try:
        return [round(float(piece.replace(",", "")), 2)]
    except ValueError:
        piece = piece.lower()
        return [f" {piece}", f"{piece} "] if len(piece) == 1 else [piece]


def mmmu_open_right(gold: str | list[str], pieces: list[str | float]) -> bool:
    """Whether a gold text is contained in a piece of text, or a gold number equals a number."""
    wanted = [normal for text in ([gold] if isinstance(gold, str) else gold)
              for normal in mmmu_normal(str(text))]
    for piece in pieces:
        if isinstance(piece, float) and piece in wanted:
            return True
        if isinstance(piece, str) and any(isinstance(w, str) and w in piece for w in wanted):
            return True
    return False


def literal(text: str | list) -> str | list:
    """A list that is written as a string, as in the parquet files; other strings stay."""
    if isinstance(text, str) and text.startswith("["):
        with contextlib.suppress(ValueError, SyntaxError):  # an interval such as "[1,2)"
            return ast.literal_eval(text)
    return text


def score_mmmu(questions: dict[str, dict], answers: dict[str, str], *, clean: bool = False,
               guess_seed: int | None = None) -> Result:
    """Accuracy overall, by domain and by subject, weighted by questions; macro F1 of the letters.

    Rows: question_type, options, answer; the subject is read from the id. `guess_seed` 42 guesses
    as the official program does where no letter is found; without it such an answer is wrong.
    """
    guess = None if guess_seed is None else random.Random(guess_seed)

    def parse(row: dict, answer: str) -> str | list | None:
        if row["question_type"] != "multiple-choice":
            return mmmu_pieces(answer, clean=clean)
        return mmmu_choice(answer, literal(row["options"]), clean=clean, guess=guess)

    def right(row: dict, understood: str | list | None) -> bool:
        if isinstance(understood, list):
            return mmmu_open_right(literal(row["answer"]), understood)
        return understood == row["answer"]

    parsed = parse_all(questions, answers, parse)
    credit = {key: float(right(row, parsed[key])) for key, row in questions.items()}
    subject = {key: "_".join(key.split("_")[1:-1]) for key in questions}
    letters = [(row["answer"], parsed[key]) for key, row in questions.items()
               if row["question_type"] == "multiple-choice"]
    scores = {"overall": percent(credit.values()),
              **percent_by(credit, lambda key: MMMU_DOMAIN.get(subject[key], "other")),
              **percent_by(credit, lambda key: subject[key]),
              "macro F1": macro_f1([gold for gold, _ in letters], [said for _, said in letters])}
    return result(answers, parsed, credit, scores, "overall")


# --- ScienceQA (llava/eval/eval_science_qa.py, tools/evaluate_acc.py) -----------------------------

def scienceqa_choice(answer: str, n_choices: int, *, clean: bool = False,
                     guess: random.Random | None = None) -> str | None:
    """LLaVA's reading: "B", else "B. ...", else the only "The answer is B" that something follows.

    None if that is no letter of a choice, or what `guess` draws, as the original script does.

    >>> scienceqa_choice("The answer is B.", 3), scienceqa_choice("The answer is B", 3)
    ('B', None)
    """
    letters = LETTERS[:n_choices]
    if clean and (named := letter_named(answer, letters)):
        return named
    found = [answer] if re.fullmatch("[A-E]", answer) else re.findall(r"\A([A-E])\. ", answer)
    found = found or re.findall(r"The answer is ([A-Z]).", answer)
    if len(found) == 1 and found[0] in letters:
        return found[0]
    return guess.choice(letters) if guess else None


def score_scienceqa(questions: dict[str, dict], answers: dict[str, str], *, clean: bool = False,
                    guess_seed: int | None = None) -> Result:
    """Accuracy of all and of the nine published groups, which overlap; an empty group has -1.

    Rows: those of problems.json. "IMG answered" is LLaVA's: of the answered ones with an image.
    """
    guess = None if guess_seed is None else random.Random(guess_seed)
    parsed = parse_all(questions, answers, lambda row, answer: scienceqa_choice(
        answer, len(row["choices"]), clean=clean, guess=guess))
    gold = {key: LETTERS[row["answer"]] for key, row in questions.items()}
    credit = {key: float(parsed[key] == gold[key]) for key in questions}
    groups = {
        "NAT": lambda row: row["subject"] == "natural science",
        "SOC": lambda row: row["subject"] == "social science",
        "LAN": lambda row: row["subject"] == "language science",
        "TXT": lambda row: row["hint"],
        "IMG": lambda row: row["image"],
        "NO": lambda row: not row["hint"] and not row["image"],
        "G1-6": lambda row: int(row["grade"].removeprefix("grade")) <= 6,
        "G7-12": lambda row: int(row["grade"].removeprefix("grade")) > 6,
    }
    members = {name: [key for key, row in questions.items() if belongs(row)]
               for name, belongs in groups.items()}
    members["IMG answered"] = [key for key in members["IMG"] if key in answers]
    scores = {"Avg": percent(credit.values()),
              **{name: percent(credit[key] for key in keys) if keys else -1.0
                 for name, keys in members.items()},
              "macro F1": macro_f1([*gold.values()], [*parsed.values()])}
    return result(answers, parsed, credit, scores, "Avg")


# --- VQAv2, OK-VQA, TextVQA (PythonEvaluationTools/vqaEvaluation/vqaEval.py) ----------------------

NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
DIGIT_OF = {"none": "0", **{word: str(i) for i, word in enumerate(NUMBER_WORDS)}}
# The program's table of contractions: a word without its apostrophe -> with it.
APOSTROPHES = """
    'twas ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's
    how'd how'll how's isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've
    o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll
    someone's something'd something'll that's there'd there're there's they'd they'll they're
    they've wasn't we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're
    you've
""".split()
CONTRACTIONS = {word.replace("'", ""): word for word in APOSTROPHES} | {
    key: f"{who}'d've"
    for who in "he it she somebody someone something there they we who you".split()
    for key in (f"{who}'dve", f"{who}d've")} | {
    key: f"{may}n't've"
    for may in "could had might should would".split()
    for key in (f"{may}nt've", f"{may}n'tve")} | {
    "yall'll": "y'all'll", "y'allll": "y'all'll", "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've", "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at", "somebody'd": "somebodyd"}


@lru_cache(2**16)  # most answers come many times
def vqa_normal(text: str, *, evalai: bool = False) -> str:
    """An answer without punctuation and articles, numbers in digits; or the variant of EvalAI.

    >>> vqa_normal("The two, red-hot dogs."), vqa_normal("red,white", evalai=True)
    ('2 red hot dogs', 'redwhite')
    """
    if evalai:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = vqa_one_line(text)
    digits = re.search(r"\d,\d", text)
    bare = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_blank = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if beside_blank or digits else " ")
    bare = re.sub(r"\.(?!\d)", "", bare, count=32)  # the authors pass re.UNICODE as `count`
    words = [DIGIT_OF.get(word, word) for word in bare.lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))


def vqa_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(answer: str, humans: list[dict | str], normalise: str = "official") -> float:
    """0..1: the mean over the humans of min(1, matches among the others / 3).

    normalise: "official" compares raw texts where all humans agree; "always" is OpenFlamingo's,
    "evalai" TextVQA's, for which there must be ten humans. These are published records: without
    answer_id, with one are left out all that are equal to it. Plain texts are never equal records.

    >>> vqa_accuracy("yes.", 10 * ["yes"]), vqa_accuracy("yes.", 10 * ["yes"], "always")
    (0.0, 1.0)
    """
    if normalise not in ("official", "always", "evalai"):
        raise ValueError(f"unknown normalisation {normalise!r}")
    if not humans or (normalise == "evalai" and len(humans) != 10):
        raise ValueError(f"{len(humans)} human answers instead of 10")
    texts = [vqa_one_line(human if isinstance(human, str) else human["answer"]) for human in humans]
    answer = vqa_one_line(answer)
    if normalise != "official" or len(set(texts)) > 1:
        texts = [vqa_normal(text, evalai=normalise == "evalai") for text in texts]
        answer = vqa_normal(answer, evalai=normalise == "evalai")
    records = [(text, i if isinstance(human, str) else
                (human.get("answer_id"), human.get("answer_confidence")))
               for i, (text, human) in enumerate(zip(texts, humans, strict=True))]
    copies, matches = Counter(records), texts.count(answer)
    return sum(min(1.0, (matches - copies[record] * (record[0] == answer)) / 3)
               for record in records) / len(records)


def score_vqa(questions: dict[Id, dict], answers: dict[Id, str], *, normalise: str = "official",
              stems: dict[str, str] | None = None) -> Result:
    """VQA accuracy overall, by answer_type and by question_type where rows have them.

    Rows: those of the annotation file, with answers. `stems`: what an answer is replaced by before
    it is compared, for OK-VQA (stem_table).
    """
    stems = stems or {}
    parsed = parse_all(questions, answers, lambda row, text: stems.get(text.lower(), text))
    credit = {key: 0.0 if parsed[key] is None
              else vqa_accuracy(parsed[key], row["answers"], normalise)
              for key, row in questions.items()}
    scores = {"overall": percent(credit.values())}
    for kind in ("answer_type", "question_type"):
        known = {key: value for key, value in credit.items() if kind in questions[key]}
        by_kind = percent_by(known, lambda key, kind=kind: questions[key][kind])
        scores |= {f"{kind} {name}": value for name, value in by_kind.items()}
    return result(answers, parsed, credit, scores, "overall")


def stem_table(rows: Iterable[dict]) -> dict[str, str]:
    """OK-VQA's own stemming, read off its annotations: each raw_answer -> its usual `answer`.

    OpenFlamingo stems with WordNet. A word that no human wrote has no stem here, but then it would
    be right only where its stem was written.
    """
    seen: dict[str, Counter] = {}
    for row in rows:
        for human in row["answers"]:
            seen.setdefault(human["raw_answer"].lower(), Counter())[human["answer"]] += 1
    return {raw: stems.most_common(1)[0][0] for raw, stems in seen.items()}


# --- GQA (eval.py after llava/scripts/convert_gqa_for_eval.py), A-OKVQA (eval_predictions.py) -----

def score_gqa(questions: dict[Id, dict], answers: dict[Id, str], *, clean: bool = False) -> Result:
    """Exact match after lower case and without a final full stop, also by structural type.

    Only rows with isBalanced count. Clean mode ignores case and all punctuation, as lmms-eval does.
    """
    def read(text: str) -> str:
        return (re.sub(r"[!-/:-@\[-`{-~]", "", text.lower()).strip() if clean
                else text.removesuffix(".").lower())

    parsed = parse_all(questions, answers, lambda row, text: read(text),
                       counts=lambda row: row.get("isBalanced", True))
    credit = {key: float(text == (read(questions[key]["answer"]) if clean
                                  else questions[key]["answer"])) for key, text in parsed.items()}
    kind = {key: questions[key]["types"]["structural"] for key in credit}
    scores = {"accuracy": percent(credit.values()),
              **percent_by(credit, lambda key: "open" if kind[key] == "query" else "binary"),
              **percent_by(credit, lambda key: f"structural {kind[key]}")}
    return result(answers, parsed, credit, scores, "accuracy")


def score_aokvqa(questions: dict[Id, dict], answers: dict[Id, str], *, direct: bool) -> Result:
    """Multiple choice: the exact text of the right choice. Direct: min(1, matches of ten / 3).

    Neither normalises anything. Direct leaves out rows with difficult_direct_answer.
    """
    parsed = parse_all(
        questions, answers, lambda row, text: text if direct or text in row["choices"] else None,
        counts=lambda row: not (direct and row["difficult_direct_answer"]))
    credit = {key: min(1.0, questions[key]["direct_answers"].count(text) / 3) if direct
              else float(text == questions[key]["choices"][questions[key]["correct_choice_idx"]])
              for key, text in parsed.items()}
    main = "direct answer" if direct else "multiple choice"
    return result(answers, parsed, credit, {main: percent(credit.values())}, main)
