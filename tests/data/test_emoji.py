"""Emoji: names, splits, drawing, and the bundled shards."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from dalle_pytorch.data.emoji import Icon, assign_splits, captions, merge_families, pack_emoji, read_icons
from dalle_pytorch.data.emoji_names import RENAMED, Emoji, EmojiNames, phrase
from dalle_pytorch.data.npm import LABELS, SETS, fetch_packages
from dalle_pytorch.data.shards import ShardDataset
from dalle_pytorch.images import decode_image

BUNDLED = Path(__file__).parents[2] / "data" / "emoji"
SPLITS = ("train", "val", "test_concept", "test_compose")

RECORDS = [
    {"label": "red apple", "hexcode": "1F34E", "tags": ["apple", "fruit", "ripe"]},
    {"label": "deaf man", "hexcode": "1F9CF-200D-2642-FE0F", "tags": ["ear"]},
    {"label": "deaf woman", "hexcode": "1F9CF-200D-2640-FE0F"},
    {
        "label": "waving hand",
        "hexcode": "1F44B",
        "skins": [{"hexcode": "1F44B-1F3FF", "label": "waving hand: dark skin tone", "tone": 5}],
    },
    {"label": "dog", "hexcode": "1F415"},
    {"label": "dog face", "hexcode": "1F436"},
    {"label": "flag: Japan", "hexcode": "1F1EF-1F1F5"},
    # The labels that old names lead to, which must be there.
    *({"label": label, "hexcode": f"E{i:03X}"} for i, label in enumerate(dict.fromkeys(RENAMED.values()))),
]


@pytest.fixture
def names() -> EmojiNames:
    return EmojiNames(RECORDS)


@pytest.mark.parametrize(
    ("icon", "code", "concept"),
    [
        ("anything", "1f34e", "red apple"),
        ("man-deaf", "1f9cf-200d-2642", "deaf man"),
        ("man-deaf", None, "deaf man"),
        ("deaf-man", None, "deaf man"),
        ("waving-hand-dark", "1f44b-1f3ff", "waving hand: dark skin tone"),
        ("waving-hand-dark", None, "waving hand: dark skin tone"),
        ("waving-hand-dark-skin-tone", None, "waving hand: dark skin tone"),
        ("flag-japan", None, "flag: Japan"),
        ("flag-for-japan", None, "flag: Japan"),
        ("pistol", None, "water pistol"),
        ("redapple", None, "red apple"),
        ("wavinghandsign", None, "waving hand"),  # Unicode's name of it
    ],
)
def test_every_name_of_a_thing_leads_to_one_concept(
    names: EmojiNames, icon: str, code: str | None, concept: str
) -> None:
    found = names.look_up(icon, code)
    assert (found.concept, found.known) == (concept, True)


def test_a_set_whose_names_cannot_be_told_apart_gives_known_things_only(tmp_path: Path) -> None:
    """What emojibase does not know could be a held-out thing under another name."""
    icons = {name: {"body": ""} for name in ("redapple", "dogside", "wavinghandsign")}
    for package, files in (
        (LABELS, {"en/data.json": RECORDS}),
        (SETS["fxemoji"].package, {"icons.json": {"icons": icons, "width": 8, "height": 8}}),
    ):
        for name, content in {"package.json": {"version": package.version}, **files}.items():
            file = tmp_path / package.name / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(content))
    found = read_icons(tmp_path, ["fxemoji"])
    assert [icon.emoji.concept for icon in found] == ["red apple", "waving hand"]


def test_code_points_beat_words(names: EmojiNames) -> None:
    unknown = names.look_up("red-apple", "1faff")
    assert (unknown.concept, unknown.known) == ("red apple", False)
    assert unknown.tags == ()


def test_variants_are_one_family(names: EmojiNames) -> None:
    assert names.look_up("deaf-man", None).family == names.look_up("deaf-woman", None).family
    assert names.look_up("dog", None).family == names.look_up("dog-face", None).family
    assert names.look_up("waving-hand", None).family == names.look_up("waving-hand-dark", None).family
    assert names.look_up("red-apple", None).family == "red apple"


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("flag: Japan", "flag of Japan"),
        ("man: bald", "bald man"),
        ("woman: red hair", "woman with red hair"),
        ("family: man, woman, girl, boy", "family of man, woman, girl and boy"),
        ("couple with heart: woman, man", "woman and man with heart"),
        ("person walking: facing right", "person walking facing right"),
        ("keycap: 1", "keycap 1"),
        ("twelve o\u2019clock", "twelve o'clock"),
    ],
)
def test_labels_become_phrases(label: str, expected: str) -> None:
    assert phrase(label) == expected


def test_captions_name_the_thing_and_its_style() -> None:
    emoji = Emoji("red apple", "red apple", "red apple", ("apple", "fruit", "ripe"), (), True)
    assert captions(emoji, "fluent-flat") == [
        "red apple",
        "red apple, fluent flat emoji",
        "a red apple",
        "red apple, fruit, ripe",
        "fruit, ripe: red apple, fluent flat emoji",
    ]


def thing(name: str, style: str, family: str | None = None) -> Icon:
    return Icon(style, Emoji(name, name, family or name, (), (), True), "")


def test_a_split_depends_on_the_names_alone() -> None:
    icons = [thing(f"thing {i}", style) for i in range(500) for style in ("a", "b", "c")]
    families = {icon.emoji.concept: icon.emoji.family for icon in icons}
    splits = assign_splits(icons, families)
    assert assign_splits(icons[::-1], families) == splits
    assert assign_splits(icons[:900], families) == {key: splits[key] for key in list(splits)[:900]}
    shares = {split: count / len(splits) for split, count in Counter(splits.values()).items()}
    assert shares["test_concept"] == pytest.approx(0.05, abs=0.03)
    assert shares["test_compose"] == pytest.approx(0.05, abs=0.03)
    assert shares["val"] == pytest.approx(0.04, abs=0.03)


def test_a_thing_drawn_once_is_trained_on_or_its_concept_held_out() -> None:
    icons = [thing(f"thing {i}", "a") for i in range(300)]
    splits = assign_splits(icons, {icon.emoji.concept: icon.emoji.family for icon in icons})
    assert set(splits.values()) == {"train", "test_concept"}


def test_the_same_pixels_are_one_family() -> None:
    icons = [thing("cat", "a"), thing("cat face", "a"), thing("dog", "a"), thing("cat face", "b")]
    families = merge_families(icons, ["1", "1", "2", "3"])
    assert families["cat"] == families["cat face"] != families["dog"]


def make_packages(folder: Path) -> Path:
    """Self-made packages in the layout of the real ones."""
    shapes = {
        "red-apple": '<circle cx="5" cy="5" r="4" fill="red"/>',
        "deaf-man": '<path d="M1 9L5 1L9 9Z" fill="blue"/>',
        "deaf-woman": '<path d="M1 1H9L5 9Z" fill="url(#g)"/>'
        '<defs><linearGradient id="g"><stop stop-color="red"/><stop offset="1" stop-color="blue"/>'
        "</linearGradient></defs>",
        "dog": '<rect x="1" y="2" width="3" height="5" fill="brown" opacity=".5"/>',
        "waving-hand": '<rect width="10" height="10" fill="gold"/>',
        "waving-hand-dark-skin-tone": '<rect width="10" height="10" fill="brown"/>',
    }
    codes = {"1f34e": "red-apple", "1f44b": "waving-hand", "1f44b-1f3ff": "waving-hand-dark-skin-tone"}
    icons: dict[str, dict[str, Any]] = {name: {"body": body} for name, body in shapes.items()}
    icons["flag-japan"] = {"body": '<rect width="20" height="10" fill="red"/>', "width": 20}
    icons["old-apple"] = {"body": "", "hidden": True}
    for package in (LABELS, SETS["noto"].package):
        target = folder / package.name
        (target / "en").mkdir(parents=True)
        (target / "package.json").write_text(json.dumps({"version": package.version}))
        (target / "en" / "data.json").write_text(json.dumps(RECORDS))
        (target / "chars.json").write_text(json.dumps(codes))
        aliases = {"dog-face": {"parent": "dog", "hFlip": True}, "apple": {"parent": "red-apple"}}
        data = {"icons": icons, "aliases": aliases, "width": 10, "height": 10}
        (target / "icons.json").write_text(json.dumps(data))
    return folder


def test_packing_is_deterministic_and_draws_whole_pictures_on_white(tmp_path: Path) -> None:
    packages = make_packages(tmp_path / "packages")
    indexes = [
        pack_emoji(packages, tmp_path / name, styles=["noto"], image_size=16, workers=workers)
        for name, workers in (("a", 1), ("b", 2))
    ]
    assert indexes[0] == indexes[1]
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    data = ShardDataset(tmp_path / "a", "+".join(indexes[0]["splits"]))
    pictures = {s.meta["concept"]: decode_image(s.image, image_size=16, name=s.key) for s in data}
    assert pictures.keys() == {
        "red apple", "deaf man", "deaf woman", "dog", "dog face", "waving hand", "flag: Japan"
    }  # fmt: skip
    flag = pictures["flag: Japan"]  # 2 : 1, so letterboxed
    assert flag[:, :4].eq(1).all()
    assert flag[:, 12:].eq(1).all()
    assert flag[1:, 4:12].eq(0).all()
    assert pictures["red apple"][:, 0].eq(1).all()
    assert pictures["dog face"].flip(-1).sub(pictures["dog"]).abs().max() < 0.02
    pack_emoji(packages, tmp_path / "toned", styles=["noto"], skin_tones=True, image_size=16, workers=1)
    concepts = [meta["concept"] for meta in ShardDataset(tmp_path / "toned", "train").metas()]
    assert len(concepts) == len(set(concepts)) == 8


def test_missing_or_other_packages_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"npm pack emojibase-data@17\.0\.0"):
        pack_emoji(tmp_path, tmp_path / "out", styles=["noto"])
    packages = make_packages(tmp_path / "packages")
    (packages / SETS["noto"].package.name / "package.json").write_text('{"version": "9.9.9"}')
    with pytest.raises(ValueError, match=r"9\.9\.9, but 1\.2\.9 is needed"):
        pack_emoji(packages, tmp_path / "out", styles=["noto"])
    with pytest.raises(ValueError, match="unknown styles"):
        pack_emoji(packages, tmp_path / "out", styles=["notto"])


def test_without_npm_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="packages=FOLDER"):
        fetch_packages([LABELS], tmp_path / "cache")


@pytest.fixture(scope="module")
def bundled() -> dict[str, list[dict]]:
    return {split: ShardDataset(BUNDLED, split).metas() for split in SPLITS}


def test_the_bundled_shards_are_those_of_the_index_and_small() -> None:
    data = ShardDataset(BUNDLED, "+".join(SPLITS))
    data.verify()
    assert data.index["splits"].keys() == set(SPLITS)
    assert len(data) == sum(data.index["splits"].values()) > 4800
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) <= 10e6


def test_the_bundled_pictures_decode(bundled: dict[str, list[dict]]) -> None:
    data = ShardDataset(BUNDLED, "+".join(SPLITS))
    for i in range(0, len(data), 50):
        image = decode_image(data[i].image, image_size=64, name=data[i].key)
        assert image.shape == (3, 64, 64)
        assert image.std() > 0.01, f"{data[i].key} is blank"


def test_no_concept_leaks_into_test_concept(bundled: dict[str, list[dict]]) -> None:
    held_out = bundled["test_concept"]
    seen = [meta for split in SPLITS if split != "test_concept" for meta in bundled[split]]
    for what in ("concept", "family"):
        assert not {meta[what] for meta in held_out} & {meta[what] for meta in seen}
    assert not {m["captions"][0].lower() for m in held_out} & {m["captions"][0].lower() for m in seen}


@pytest.mark.parametrize("split", ["test_compose", "val"])
def test_held_out_pairs_have_both_parts_in_training(bundled: dict[str, list[dict]], split: str) -> None:
    pairs = {(meta["concept"], meta["style"]) for meta in bundled["train"]}
    concepts, styles = ({pair[i] for pair in pairs} for i in (0, 1))
    for meta in bundled[split]:
        assert meta["concept"] in concepts
        assert meta["style"] in styles
        assert (meta["concept"], meta["style"]) not in pairs


def test_every_picture_is_in_one_split_in_three_styles(bundled: dict[str, list[dict]]) -> None:
    everything = [meta for metas in bundled.values() for meta in metas]
    pairs = [(meta["concept"], meta["style"]) for meta in everything]
    assert len(pairs) == len(set(pairs))
    assert {style for _, style in pairs} == {"noto", "fluent", "fluent-flat"}
    styles_of = defaultdict(set)
    for concept, style in pairs:
        styles_of[concept].add(style)
    # Fluent and Noto name 1,595 things alike; a name that does not match would leave a thing with fewer styles.
    assert Counter(map(len, styles_of.values()))[3] > 1500
    shares = {split: len(metas) / len(everything) for split, metas in bundled.items()}
    assert shares["test_concept"] == pytest.approx(0.05, abs=0.01)
    assert shares["test_compose"] == pytest.approx(0.05, abs=0.01)
    assert shares["val"] == pytest.approx(0.04, abs=0.01)


def test_captions_are_clean(bundled: dict[str, list[dict]]) -> None:
    for metas in bundled.values():
        for meta in metas:
            phrase_of_style = SETS[meta["style"]].phrase
            assert 3 <= len(meta["captions"]) == len(set(meta["captions"]))
            assert any(phrase_of_style in caption for caption in meta["captions"])
            for caption in meta["captions"]:
                assert caption == " ".join(caption.split())
                assert not set("\u2019\u201c\u201d_{}<>\ufffd") & set(caption)
                assert "skin tone" not in caption
