"""Made-up villages: what everybody there does, and texts that say so, in another order each time.

As villages differ, a text about one can only be gone on with by looking back in it: who has read ``Anna paints .``
knows what ``Anna`` is followed by later. That is what the tiny model of ``cartridge.py`` is pretrained on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from transformers import BatchEncoding, PreTrainedTokenizerBase

NAMES = """
    Ada Aldo Alma Anna Arno Beata Bela Bruno Carl Clara Cyril Dana Dino Dora Edda Elmo Emil Enno Erna Fanny Felix Fine
    Frida Gero Gita Gustav Hanna Hedda Hugo Ida Ines Ivo Jana Jonas Juno Karin Klaus Lea Leo Lotte Ludo Maja Malte Mira
    Moritz Nele Nils Olga Oskar Otto Paula Pia Quirin Rita Rolf Selma Sven Tilda Tom Ulla Veit Vera Wanda Yara
""".split()  # noqa: SIM905 (a list of words is read more easily so)
DEEDS = """
    acts bakes builds carves climbs cooks counts cycles dances digs dives draws drives drums farms fences fishes flies
    gambles gardens hikes hunts juggles jumps knits lectures mows paints plays poses preaches prints reads rides rows
    runs sails sews sings skates sketches skis sleeps swims teaches travels weaves writes
""".split()  # noqa: SIM905
SENTENCE_TOKENS = 3
SMALL = 0.3  # the part of the pretraining with small villages


def settle(generator: random.Random, people: int, names: int = len(NAMES)) -> dict[str, str]:
    """A village of so many people, named by the first ``names`` names, and what each of them does."""
    deeds = DEEDS[: names * len(DEEDS) // len(NAMES)]
    return {name: generator.choice(deeds) for name in generator.sample(NAMES[:names], people)}


def describe(generator: random.Random, village: Mapping[str, str], mentions: int) -> str:
    """A text that mentions everybody so many times, in no order."""
    people = list(village) * mentions
    generator.shuffle(people)
    return " ".join(f"{name} {village[name]} ." for name in people)


def vocabulary() -> list[str]:
    """Every word and sign that such a text can hold."""
    return sorted({*NAMES, *DEEDS, "."})


def batches(generator: random.Random, tokens: int = 2000) -> Callable[[PreTrainedTokenizerBase, float], BatchEncoding]:
    """Makes batches of texts, each about a village of its own, for pretraining.

    To begin with the villages are small, and only what can be looked up is a label: the deeds of those who were
    mentioned before. Then the villages grow, and all words are labels but the deeds that cannot be known.
    """

    def batch(tokenizer: PreTrainedTokenizerBase, progress: float) -> BatchEncoding:
        growth = min(1.0, max(0.0, 3 * (progress - SMALL)))
        people, names = 8 + round(40 * growth), 16 + round(48 * growth)
        mentions = 5 - round(2 * growth)
        rows = max(1, tokens // (SENTENCE_TOKENS * people * mentions))
        texts = [describe(generator, settle(generator, people, names), mentions) for _ in range(rows)]
        encoded = tokenizer(texts, return_tensors="pt")
        labels = encoded["input_ids"].clone()
        for row in labels:
            seen = set()
            for place in range(1, len(row), SENTENCE_TOKENS):  # after <s>
                name, deed = int(row[place]), int(row[place + 1])
                if progress < SMALL:
                    row[place : place + SENTENCE_TOKENS] = -100
                row[place + 1] = deed if name in seen else -100
                seen.add(name)
        return encoded | {"labels": labels}

    return batch
