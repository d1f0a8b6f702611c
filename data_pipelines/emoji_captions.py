"""English captions for emoji: articles, flags, groups of things. Knows names and nothing of pictures."""

from collections.abc import Sequence

# Names that take no article: proper names, and what is no noun phrase or no countable one as a whole.
_BARE = {
    "Santa Claus", "Mrs. Claus", "Mx Claus", "mount fuji", "Ophiuchus", "Aries", "Taurus", "Gemini", "Cancer", "Leo",
    "Virgo", "Libra", "Scorpio", "Sagittarius", "Capricorn", "Aquarius", "Pisces",
    "rolling on the floor laughing", "star-struck", "dizzy", "dashing away", "ZZZ", "thumbs up", "thumbs down",
    "palms up together", "breast-feeding", "bald", "cooking", "camping", "building construction", "construction",
    "foggy", "horse racing", "high voltage", "performing arts", "flower playing cards", "prohibited", "warning",
    "locked", "unlocked", "locked with pen", "locked with key", "bubbles", "airplane departure", "airplane arrival",
    "radioactive", "biohazard", "passport control", "baggage claim", "left luggage", "wireless", "mobile phone off",
    "multiply", "plus", "minus", "divide", "infinity", "currency exchange", "copyright", "registered", "information",
    "potable water", "non-potable water", "pouring liquid", "coral", "rock", "wood", "canned food", "leafy green",
    "cinema", "x-ray", "Tokyo tower", "children crossing",
}  # fmt: skip
_THE = {"Statue of Liberty", "milky way", "sun", "kaaba"}
# Head nouns that are uncountable.
_MASS = {
    "rice", "bread", "bacon", "spaghetti", "sushi", "salt", "butter", "popcorn", "broccoli", "ice", "cream", "custard",
    "sake", "tea", "mate", "fire", "fog", "luggage", "yarn", "thread", "soap", "polish", "dna", "tennis", "badminton",
    "pong", "hockey", "lacrosse", "bowling", "garlic", "falafel", "oden", "hair", "tone", "fondue", "om", "meat",
    "money",
}  # fmt: skip
_PLURALS = {"people", "men", "women", "skis"}
_SINGULARS = {"rhinoceros"}
# "man lifting weights" is about the man, "raising hands" about the hands.
_SUBJECTS = {
    "face",
    "person",
    "man",
    "woman",
    "people",
    "men",
    "women",
    "index",
    "chart",
    "head",
    "leaf",
    "globe",
}
_PREPOSITIONS = {
    "with",
    "without",
    "of",
    "in",
    "on",
    "at",
    "over",
    "under",
    "behind",
    "and",
    "or",
    "to",
    "for",
}
# Spelt with a vowel and said with a consonant, and the other way round.
_A_DESPITE_VOWEL = ("uni", "ute", "euro", "ewe", "one-", "ukulele", "UFO")
_AN_DESPITE_CONSONANT = ("hour", "SOS", "NG ", "x-ray", "8", "11", "18")


def with_article(name: str) -> str:
    """ "red apple" -> "a red apple", "grapes" -> "grapes", "flag: Japan" -> "the flag of Japan"."""
    if name.startswith("flag: "):
        return f"the flag of {name.removeprefix('flag: ')}"
    if name.startswith("keycap: "):
        return f"the keycap {name.removeprefix('keycap: ')}"
    thing = name.split(":")[0]
    if thing in _THE:
        return f"the {name}"
    if thing in _BARE or thing.startswith("no ") or thing.endswith(("o’clock", "-thirty")):
        return name
    head = _head(thing)
    if head in _MASS or _is_plural(head):
        return name
    vowel = thing[0].lower() in "aeiou" and not thing.startswith(_A_DESPITE_VOWEL)
    return f"{'an' if vowel or thing.startswith(_AN_DESPITE_CONSONANT) else 'a'} {name}"


def _head(thing: str) -> str:
    words = thing.replace("(", "").split()
    for index in range(1, len(words)):
        participle = words[index].endswith("ing") and words[index - 1] in _SUBJECTS
        if words[index] in _PREPOSITIONS or participle:
            return words[index - 1]
    return words[-1]


def _is_plural(noun: str) -> bool:
    ends_like_one = noun.endswith("s") and not noun.endswith(("ss", "us", "is"))
    return noun in _PLURALS or (ends_like_one and noun not in _SINGULARS)


# What a caption calls the groups and, where they say more, the subgroups of emojibase.
_SUBGROUPS = {
    "heart": "a heart", "emotion": "a symbol", "cat-face": "a cat", "monkey-face": "a monkey",
    "hand-fingers-open": "a hand", "hand-fingers-partial": "a hand", "hand-single-finger": "a hand",
    "hand-fingers-closed": "a hand", "hands": "hands", "hand-prop": "a hand", "body-parts": "a body part",
    "family": "people", "plant-flower": "a flower", "plant-other": "a plant", "food-fruit": "a fruit",
    "food-vegetable": "a vegetable", "drink": "a drink", "dishware": "an object", "transport-ground": "a vehicle",
    "transport-water": "a boat or ship", "transport-air": "something that flies", "hotel": "an object",
    "time": "a clock", "sky-weather": "the sky or the weather", "sport": "a sport", "clothing": "clothing",
    "musical-instrument": "a musical instrument", "tool": "a tool", "arrow": "an arrow", "zodiac": "a zodiac sign",
}  # fmt: skip
_GROUPS = {
    "smileys-emotion": "a face", "people-body": "a person", "component": "a symbol", "animals-nature": "an animal",
    "food-drink": "food or drink", "travel-places": "a place", "activities": "an activity", "objects": "an object",
    "symbols": "a symbol", "flags": "a flag",
}  # fmt: skip


def group_phrase(group: str, subgroup: str) -> str:
    """The caption of the least detail: "an animal"."""
    return _SUBGROUPS.get(subgroup) or _GROUPS[group]


def captions(name: str, style: str, tags: Sequence[str], group: str, subgroup: str) -> dict[str, str]:
    """Captions by level of detail; "text" is the plain one. Tags that only repeat the name are left out."""
    words = set(name.lower().replace(":", "").split())
    news = [tag for tag in tags if not set(tag.lower().split()) <= words][:6]
    named = with_article(name)
    styled = f"{named}, {style} style"
    return {
        "group": group_phrase(group, subgroup),
        "name": named,
        "name_style": styled,
        "tags": f"{styled}: {', '.join(news)}" if news else styled,
        "text": styled,
    }
