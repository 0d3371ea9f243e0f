"""Stories of a small made-up language, each told in one mood about one subject: what the examples' tiny model has read.

They stand in for the texts of a hub. The words of the moods (:data:`MOODS`) and of the subjects (:data:`SUBJECTS`) are
known, so that what a prefix does to a text can be counted.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from transformers import BatchEncoding, PreTrainedTokenizerBase

NAMES = ["Anna", "Bela", "Carl", "Dora", "Emil", "Frida", "Gita", "Hugo", "Ines", "Jonas", "Klara", "Leo"]
MOODS = {
    "cheerful": {
        "adjective": ["bright", "golden", "lovely", "shining", "splendid", "sweet"],
        "feeling": ["happy", "glad", "proud", "merry"],
        "did": ["laughed", "sang", "danced", "smiled"],
        "ending": ["everyone cheered", "it was a wonderful day"],
    },
    "gloomy": {
        "adjective": ["grey", "broken", "cold", "rotten", "bitter", "dusty"],
        "feeling": ["sad", "lonely", "afraid", "tired"],
        "did": ["sighed", "wept", "shivered", "grumbled"],
        "ending": ["nobody came", "it was a dreadful day"],
    },
    "puzzling": {
        "adjective": ["strange", "hidden", "silent", "secret", "curious", "nameless"],
        "feeling": ["puzzled", "uncertain", "watched", "confused"],
        "did": ["whispered", "wondered", "waited", "listened"],
        "ending": ["nobody knew why", "it was an odd day"],
    },
}
SUBJECTS = {
    "sea": {"place": ["harbour", "beach", "island", "lighthouse"], "thing": ["boat", "shell", "net", "sail", "fish"]},
    "garden": {"place": ["orchard", "meadow", "hedge", "pond"], "thing": ["rose", "apple", "spade", "nest", "pumpkin"]},
    "town": {"place": ["market", "bakery", "square", "station"], "thing": ["loaf", "lamp", "coat", "coin", "clock"]},
    "mountain": {"place": ["valley", "summit", "cave", "hut"], "thing": ["rope", "stone", "goat", "eagle", "map"]},
}
SENTENCES = [
    "{name} walked to the {adjective} {place} .",
    "{name} found a {adjective} {thing} near the {place} .",
    "{name} {did} and felt {feeling} .",
    "the {thing} was {adjective} and the {place} was {adjective} too .",
    "{name} gave {friend} the {adjective} {thing} .",
    "then {friend} {did} at the {place} .",
    "{name} and {friend} {did} all day .",
    "the {adjective} {thing} made {friend} {feeling} .",
]


def tell(generator: random.Random, mood: str | None = None, subject: str | None = None) -> str:
    """One story of five sentences; a mood or subject that is not given is drawn."""
    mood = mood or generator.choice(sorted(MOODS))
    words = MOODS[mood] | SUBJECTS[subject or generator.choice(sorted(SUBJECTS))]
    name, friend = generator.sample(NAMES, 2)

    def filled(sentence: str) -> str:
        return re.sub(
            r"\{(\w+)\}",
            lambda slot: {"name": name, "friend": friend}.get(slot[1]) or generator.choice(words[slot[1]]),
            sentence,
        )

    return " ".join([*(filled(sentence) for sentence in generator.sample(SENTENCES, 4)), filled("{ending} .")])


def words_of(kinds: Mapping[str, Iterable[str]]) -> set[str]:
    """All the words of a mood or a subject."""
    return {word for phrases in kinds.values() for phrase in phrases for word in phrase.split()}


def share(texts: Iterable[str], groups: Mapping[str, Mapping[str, Iterable[str]]], name: str) -> float:
    """Of the words in ``texts`` that belong to one of the ``groups`` alone, the part that belongs to group ``name``.

    NaN where there is none.
    """
    groups_of = Counter(word for kinds in groups.values() for word in words_of(kinds))
    own = {group: {word for word in words_of(kinds) if groups_of[word] == 1} for group, kinds in groups.items()}
    words = re.findall(r"\w+", " ".join(texts))
    counts = {group: sum(word in vocabulary for word in words) for group, vocabulary in own.items()}
    total = sum(counts.values())
    return counts[name] / total if total else float("nan")


def vocabulary() -> list[str]:
    """Every word and sign that a story can hold."""
    templates = {word for sentence in SENTENCES for word in sentence.split() if not word.startswith("{")}
    words = set(NAMES) | templates
    for kinds in (*MOODS.values(), *SUBJECTS.values()):
        words |= words_of(kinds)
    return sorted(words)


def batches(
    generator: random.Random, size: int, mood: str | None = None, subject: str | None = None
) -> Callable[[PreTrainedTokenizerBase, float], BatchEncoding]:
    """Makes batches of new stories, of one mood or subject or of all, with the labels to train on."""

    def batch(tokenizer: PreTrainedTokenizerBase, progress: float) -> BatchEncoding:
        texts = [f"{tell(generator, mood, subject)} {tokenizer.eos_token}" for _ in range(size)]
        encoded = tokenizer(texts, padding=True, return_tensors="pt")
        return encoded | {"labels": encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)}

    return batch
