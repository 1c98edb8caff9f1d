"""The drawn world's documents: captions, searches, conversations about scenes from a seed.

world.py draws the scenes and knows what is true of them; here is decided what is told and asked in
training, and how often. An endless source with sources.Stream's interface: `at(n)`. Read after
world.py.
"""

import random

import numpy as np

import world
from documents import Document, Ret, caption_documents, chat_document
from sources import Sample

# How often each kind of question is asked. A box is thirty tokens long and its last digits cannot
# be known: asked too often, it would drown the one-word answers in the loss.
SHARES = {"what": 4, "colour": 4, "yes/no": 6, "how many": 5, "where": 5, "box": 2, "find": 1.5,
          "caption": 0.5}


class DrawnWorld:
    """Endless samples of the drawn world; sample i is scene i of the seed, drawn when asked for.

    stage "pretrain": short captions of a picture's things, now and then a whole caption, the
    search for it, a phrase grounded with a box. stage "instruct": conversations of one to eight
    turns about one picture, or about two to compare, or about one that was asked for; and two
    requests for it, each whole or vague.
    """

    def __init__(self, stage: str, size: int, seed: int, split: str = "train",
                 chat: str = "nanovilla", has_ret: bool = True):
        self.make = {"pretrain": self.pretrain, "instruct": self.instruct}[stage]
        self.size, self.split, self.chat, self.has_ret = size, split, chat, has_ret
        self.seed = seed * 2**40 + (0 if stage == "pretrain" else 2**39)

    def __getitem__(self, index: int) -> list[Document]:
        seed = self.seed + index
        return self.make(seed, random.Random(seed))

    def at(self, index: int) -> Sample:
        return Sample(self.file(index), f"scene {self.seed + index}", self[index])

    def __len__(self) -> int:
        return 2**39  # scenes before another stage's, or seed's, begin

    def file(self, index: int) -> str:
        return "drawn world"

    def picture(self, scene: world.Scene) -> np.ndarray:
        return np.asarray(world.draw(scene, self.size))

    def pretrain(self, seed: int, rng: random.Random) -> list[Document]:
        scene = world.make_scene(seed, self.split)
        picture = self.picture(scene)
        said = [caption_documents(picture, words)[0] for words in short_captions(scene, rng)]
        caption, search = caption_documents(picture, world.caption(scene, rng))
        phrase, _ = caption_documents(picture, world.grounded_phrase(scene, rng))
        rare = [(caption, 0.2), (search, 0.5), (phrase, 0.25)]
        return said + [document for document, share in rare if rng.random() < share]

    def questions(self, scene: world.Scene, rng: random.Random, n: int) -> list[world.Question]:
        """n questions of kinds drawn by SHARES."""
        asked: list[world.Question] = []
        while len(asked) < n:
            kinds = rng.choices(tuple(SHARES), tuple(SHARES.values()), k=n - len(asked))
            asked += filter(None, (world.ask(kind, scene, rng) for kind in kinds))
        return asked

    def instruct(self, seed: int, rng: random.Random) -> list[Document]:
        scene = world.make_scene(seed, self.split)
        picture, kind = self.picture(scene), rng.random()
        if kind < 0.25:  # two pictures, interleaved
            near = rng.random() < 0.7
            other = world.edited(scene, rng) if near else world.make_scene(seed + 2**60, self.split)
            pictures = [picture, self.picture(other)]
            asked = [world.compare(scene, other, rng) for _ in range(6)]
        else:
            pictures, asked = [picture], self.questions(scene, rng, 8)
        turns = [([], q.question, q.answer) for q in asked]
        requests = [([], rng.choice((world.request, world.vague_request))(scene, rng), Ret(picture))
                    for _ in range(2 * self.has_ret)]
        searches = [chat_document([request], self.chat) for request in requests]
        if 0.25 <= kind < 0.45 and self.has_ret:  # a picture is the answer, then talked about
            return [chat_document([requests[0], *turns], self.chat), searches[1]]
        return conversations(pictures, turns, rng, self.chat) + searches


def short_captions(scene: world.Scene, rng: random.Random) -> list[str]:
    """One fact each: every thing twice, the second time from its kind, and one count.

    What a caption names first is what the model has to look *for* to say the rest. "A red cat at
    the top" can be learned by looking for red alone; after it, half of all questions stay guesses.
    Short documents matter as much: in a long one, the word to look for is one among many (LOG.md).
    """
    captions = []
    for t in scene.things:
        at = world.at(t.place)
        said = rng.choice((t.name, t.name, f"{t.size} {t.kind}"))
        from_place = f"{at} {world.a(said)}."
        from_colour = f"the {t.colour} thing is {rng.choice((f'{world.a(t.kind)} {at}', at))}."
        captions.append(rng.choice((from_place, from_colour)))
        rest = rng.choice((f"{t.colour}, {at}", f"{at}, {t.colour}") * 3 + (f"{t.size}, {at}",) * 2)
        captions.append(f"the {t.kind} is {rest}.")
    return [*captions, count_caption(scene, rng)]


def count_caption(scene: world.Scene, rng: random.Random) -> str:
    """"cats: 2.", "red things: 1." or "red cats: 0.", most often of what is there."""
    t = rng.choice(scene.things)
    kind = t.kind if rng.random() < 0.65 else rng.choice(tuple(world.KINDS))
    colour = t.colour if rng.random() < 0.65 else rng.choice(tuple(world.COLOURS))
    form = rng.choice(("kind", "kind", "colour", "name"))
    if form == "name" and (colour, kind) in world.NEW_COMBINATIONS:  # not even denied in training
        form = "kind"
    words = {"kind": world.plural(kind), "colour": f"{colour} things",
             "name": f"{colour} {world.plural(kind)}"}
    value = {"kind": kind, "colour": colour, "name": f"{colour} {kind}"}[form]
    return f"{words[form]}: {sum(getattr(thing, form) == value for thing in scene.things)}."


def conversations(pictures: list, turns: list[tuple], rng: random.Random, chat: str
                  ) -> list[Document]:
    """Turns about the same pictures -> conversations of one, two, three or all turns."""
    documents = []
    while turns:
        n = rng.choice((1, 1, 1, 2, 3, len(turns)))
        (_, question, answer), *more = turns[:n]
        documents.append(chat_document([(pictures, question, answer), *more], chat))
        turns = turns[n:]
    return documents
