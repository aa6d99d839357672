"""One name for one emoji: from a set's own icon name or code points to the Unicode (CLDR) label.

The icon sets disagree ("dark" and "dark skin tone", "man-deaf" and "deaf man"). If the same thing had two names, it
could be trained on under one and tested under the other, so every icon is looked up in emojibase: by its code points
where the set gives them, else by the words of its name in any order.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from string import ascii_uppercase
from typing import Any, NamedTuple

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
_TONE_CODES = {f"1f3f{digit}": TONES[i] for i, digit in enumerate("bcdef")}
_TONE_IN_NAME = re.compile(r"-(medium-light|medium-dark|light|medium|dark)(-skin-tone)?$")

# Words that say nothing about which thing is meant; they differ from set to set.
_FILLER = {"a", "an", "and", "at", "in", "of", "on", "the", "with"}
_SAME_WORD = {"women": "woman", "men": "man", "people": "person", "male": "man", "female": "woman"}

_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
# Names of emojione (2016), which gives no code points, whose words match no present label, and the label they became.
RENAMED = {
    "a-button": "A button (blood type)",
    "ab-button": "AB button (blood type)",
    "b-button": "B button (blood type)",
    "o-button": "O button (blood type)",
    "asterisk": "keycap: *",
    "ballot-box-with-check": "check box with check",
    "bear-face": "bear",
    "blond-haired-person": "person: blond hair",
    "bride-with-veil": "person with veil",
    "cat-face-with-tears-of-joy": "cat with tears of joy",
    "cat-face-with-wry-smile": "cat with wry smile",
    "crying-cat-face": "crying cat",
    "direct-hit": "bullseye",
    "dizzy-face": "face with crossed-out eyes",
    "exclamation-mark": "red exclamation mark",
    "flag-chequered-flag": "chequered flag",
    "flag-cocos-islands": "flag: Cocos (Keeling) Islands",
    "flag-macau-sar-china": "flag: Macao SAR China",
    "flag-macedonia": "flag: North Macedonia",
    "flag-myanmar": "flag: Myanmar (Burma)",
    "flag-swaziland": "flag: Eswatini",
    "flag-turkey": "flag: Türkiye",
    "flag-black-flag": "black flag",
    "flag-crossed-flags": "crossed flags",
    "flag-rainbow-flag": "rainbow flag",
    "flag-triangular-flag": "triangular flag",
    "flag-white-flag": "white flag",
    "frog-face": "frog",
    "grinning-cat-face": "grinning cat",
    "grinning-cat-face-with-smiling-eyes": "grinning cat with smiling eyes",
    "hamster-face": "hamster",
    "heavy-check-mark": "check mark",
    "heavy-division-sign": "divide",
    "heavy-heart-exclamation": "heart exclamation",
    "heavy-large-circle": "hollow red circle",
    "heavy-minus-sign": "minus",
    "heavy-multiplication-x": "multiply",
    "heavy-plus-sign": "plus",
    "hugging-face": "smiling face with open hands",
    "keycap-pound": "keycap: #",
    "kissing-cat-face": "kissing cat",
    "laptop-computer": "laptop",
    "lion-face": "lion",
    "man-in-suit-levitating": "person in suit levitating",
    "man-with-chinese-cap": "person with skullcap",
    "panda-face": "panda",
    "pistol": "water pistol",
    "pouting-cat-face": "pouting cat",
    "pouting-face": "enraged face",
    "question-mark": "red question mark",
    "robot-face": "robot",
    "smiling-cat-face-with-heart-eyes": "smiling cat with heart-eyes",
    "two-men-holding-hands": "men holding hands",
    "two-women-holding-hands": "women holding hands",
    "unicorn-face": "unicorn",
    "up-text-button": "UP! button",
    "weary-cat-face": "weary cat",
    "white-heavy-check-mark": "check mark button",
    **{f"digit-{word}": f"keycap: {i}" for i, word in enumerate(_DIGITS)},
    **{f"letter-{letter.lower()}": f"regional indicator {letter}" for letter in ascii_uppercase},
}

_GENDER = re.compile(r"\b(man|woman|men|women|person|people|and)\b(?!\u2019)")  # not "man's shoe"
# Labels that belong to one family though their words do not show it.
_FAMILIES = {
    "Mrs. Claus": "Claus",
    "Mx Claus": "Claus",
    "Santa Claus": "Claus",
    "prince": "with crown",
    "princess": "with crown",
    "boy": "child",
    "girl": "child",
    "older person": "old",
    "mermaid": "merperson",
    "merman": "merperson",
}


class Emoji(NamedTuple):
    """One thing that emoji sets draw.

    Attributes:
        concept: the CLDR label, or the words of the icon's name where Unicode has no such emoji; with its skin tone.
        name: the same as a phrase to put into captions.
        family: what the splits keep together: the concept without gender, direction and skin tone.
        tags: emojibase's key words.
        tones: its skin tones, none for the default one.
        known: whether emojibase has it.
    """

    concept: str
    name: str
    family: str
    tags: tuple[str, ...]
    tones: tuple[str, ...]
    known: bool


class EmojiNames:
    """Looks icons up in emojibase.

    Args:
        records: the parsed ``en/data.json`` of emojibase-data.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        records = list(records)
        self._labels = {record["label"] for record in records}
        self._by_code: dict[str, tuple[Mapping[str, Any], tuple[str, ...]]] = {}
        self._by_slug: dict[str, Mapping[str, Any]] = {}
        self._by_words: dict[tuple[str, ...], Mapping[str, Any]] = {}
        for record in records:
            self._by_code[_code(record["hexcode"])] = record, ()
            for skin in record.get("skins", ()):
                tones = skin["tone"] if isinstance(skin["tone"], list) else [skin["tone"]]
                names = tuple(TONES[tone - 1] for tone in tones)
                self._by_code[_code(skin["hexcode"])] = record, names
            self._by_slug[slug(record["label"])] = record
            self._by_words.setdefault(_words(slug(record["label"])), record)
        for old, label in RENAMED.items():
            self._by_slug[old] = self._by_slug[slug(label)]
        # Firefox OS writes labels, and the names of single characters in Unicode, as one word.
        self._by_letters = {_letters(record["label"]): record for record in reversed(records)}
        for record in records:
            code = _code(record["hexcode"])
            if "-" not in code:
                self._by_letters.setdefault(_letters(unicodedata.name(chr(int(code, 16)), "")), record)

    def look_up(self, icon: str, code: str | None) -> Emoji:
        """Find what an icon shows.

        Args:
            icon: the name the set gives it, in kebab case.
            code: its code points as lower-case hexadecimal joined by "-", or None where the set does not say.

        Returns:
            The thing; `known` is False, and the icon's own words are the concept, where emojibase has no such emoji.
        """
        icon = icon.replace("flag-for-", "flag-", 1)  # emojione
        if code is not None and (found := self._by_code.get(_code(code))):
            return self._emoji(*found)
        base, tones = self._split_tone(icon, code)
        # Code points beat words: a set that gives code points and is not found shows something else.
        record = None if code is not None else self._by_name(base)
        if record is not None:
            return self._emoji(record, tones)
        return _with_tones(
            Emoji(base.replace("-", " "), base.replace("-", " "), "", (), (), False),
            self._family(base.replace("-", " ")),
            tones,
        )

    def _by_name(self, icon: str) -> Mapping[str, Any] | None:
        return self._by_slug.get(icon) or self._by_words.get(_words(icon)) or self._by_letters.get(icon)

    def _split_tone(self, icon: str, code: str | None) -> tuple[str, tuple[str, ...]]:
        """Split a skin tone off an icon's name; "dark" alone is one only where the rest has tones."""
        found = _TONE_IN_NAME.search(icon)
        if found is None:
            return icon, ()
        base = icon[: found.start()]
        if code is not None:
            toned = any(part in _TONE_CODES for part in code.split("-"))
        else:
            toned = bool(found[2]) or "skins" in (self._by_name(base) or {})
        return (base, (found[1],)) if toned else (icon, ())

    def _emoji(self, record: Mapping[str, Any], tones: tuple[str, ...]) -> Emoji:
        label = record["label"]
        emoji = Emoji(label, phrase(label), "", tuple(record.get("tags", ())), (), True)
        return _with_tones(emoji, self._family(label), tones)

    def _family(self, label: str) -> str:
        """Reduce a label to what it shares with its variants of gender and direction."""
        if label in _FAMILIES:
            return _FAMILIES[label]
        if label.endswith(" face") and label.removesuffix(" face") in self._labels:
            return label.removesuffix(" face")  # "dog face" and "dog"
        head = label.split(":")[0]
        if head in ("family", "kiss", "couple with heart"):
            return head
        text = label.removesuffix(": facing right")
        return " ".join(_GENDER.sub(" ", text).replace(":", " ").split()) or "person"


def phrase(label: str) -> str:
    """Turn a CLDR label into words one would write: "flag: Japan" into "flag of Japan"."""
    text = label.replace("\u2019", "'").replace("\u201c", "").replace("\u201d", "")  # curly quotes
    if text.startswith("regional indicator "):
        return text.replace("regional indicator", "letter")  # drawn as a letter in a box
    head, colon, rest = text.partition(": ")
    if not colon:
        return text
    if rest == "facing right" or head == "keycap":
        return f"{head} {rest}"
    if rest == "bald":
        return f"bald {head}"
    if head == "couple with heart":
        return f"{_listed(rest)} with heart"
    if head in ("flag", "family", "kiss"):
        return f"{head} of {_listed(rest)}"
    return f"{head} with {rest}"


def slug(text: str) -> str:
    """Turn a label into kebab case of plain ASCII letters and digits."""
    text = text.replace("&", " and ").replace("\u2019", "").replace("'", "").replace(".", "")
    text = text.replace("#", " hash ").replace("*", " asterisk ")
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return "-".join(re.findall(r"[a-z0-9]+", plain))


def _letters(text: str) -> str:
    return slug(text).replace("-", "")


def _listed(text: str) -> str:
    return " and ".join(text.rsplit(", ", 1))


def _words(icon: str) -> tuple[str, ...]:
    words = (_SAME_WORD.get(word, word) for word in icon.split("-"))
    return tuple(sorted(word for word in words if word not in _FILLER))


def _code(code: str) -> str:
    """Lower-case code points without the variation selector, which sets add or leave out at will."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _with_tones(emoji: Emoji, family: str, tones: tuple[str, ...]) -> Emoji:
    emoji = emoji._replace(family=family, tones=tones)
    if not tones:
        return emoji
    words = " and ".join(dict.fromkeys(tones)) + " skin tone"
    return emoji._replace(concept=f"{emoji.concept}: {words}", name=f"{emoji.name} with {words}")
