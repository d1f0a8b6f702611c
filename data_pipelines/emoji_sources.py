"""The six emoji sets and their names: reads the npm packages, joins pictures with names, draws them.

Decides nothing about splits, captions or shards.
"""

import io
import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import resvg_py
from PIL import Image, ImageOps

NAMES = ("emojibase-data", "17.0.0")


@dataclass(frozen=True)
class EmojiSet:
    """One style: its package, who made it, and under what licence."""

    style: str
    package: str
    version: str
    licence: str
    authors: str
    url: str


_NOTO = ("Google Inc.", "github.com/googlefonts/noto-emoji")
_FLUENT = ("Microsoft Corporation", "github.com/microsoft/fluentui-emoji")
_TWEMOJI = ("Twitter, Inc. and other contributors", "github.com/jdecked/twemoji")
_EMOJIONE = ("EmojiOne (version 2.3.0)", "github.com/EmojiTwo/emojitwo")
SETS = (
    EmojiSet("noto", "@iconify-json/noto", "1.2.9", "Apache-2.0", *_NOTO),
    EmojiSet("noto-v1", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0", *_NOTO),
    EmojiSet("twemoji", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", *_TWEMOJI),
    EmojiSet("fluent-flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", *_FLUENT),
    EmojiSet("fluent-3d", "@lobehub/fluent-emoji-3d", "1.1.0", "MIT", *_FLUENT),
    EmojiSet("emojione", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0", *_EMOJIONE),
)
STYLES = tuple(emoji_set.style for emoji_set in SETS)


@dataclass(frozen=True)
class Name:
    """One emoji of Unicode, whatever its style. `concept` is the slug of the emoji without skin tones."""

    name: str
    concept: str
    tone: int | list[int] | None  # None: has no skin; 0: the yellow one; a list: several people
    tags: tuple[str, ...]
    group: str
    subgroup: str
    version: float  # of Emoji, in which it came
    hexcode: str


def slug(name: str) -> str:
    """The form of a name that Iconify uses as key: "Red Apple" -> "red-apple"."""
    name = name.replace("#", "hash").replace("*", "asterisk")
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower().replace("'", "")
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def _bare_hexcode(hexcode: str) -> str:
    """Hexcode without the variation selector, which sets write or leave out as they like."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def read_names(modules: Path) -> list[Name]:
    """All names of emojibase in its order, an emoji before its skin tones."""
    folder = modules / NAMES[0]
    meta = json.loads((folder / "meta" / "groups.json").read_text(encoding="utf-8"))
    names = []
    for entry in json.loads((folder / "en" / "data.json").read_text(encoding="utf-8")):
        # Regional indicators, the letters that flags are spelt with, have no group of their own.
        group, subgroup = str(entry.get("group", 8)), str(entry.get("subgroup", 95))
        for variant in [entry, *entry.get("skins", [])]:
            tone = variant.get("tone", 0 if "skins" in entry else None)
            names.append(
                Name(
                    name=variant["label"],
                    concept=slug(entry["label"]),
                    tone=tone,
                    tags=tuple(entry.get("tags", ())),
                    group=meta["groups"][group],
                    subgroup=meta["subgroups"][subgroup],
                    version=variant["version"],
                    hexcode=_bare_hexcode(variant["hexcode"]),
                )
            )
    return names


@dataclass(frozen=True)
class Drawing:
    """One picture of a set before it is drawn; `data` is SVG markup or an encoded bitmap."""

    name: Name
    style: str
    data: str | bytes
    mirrored: bool = False

    def draw(self, size: int) -> Image.Image:
        """An RGBA picture of size x size. Raises ValueError or OSError for markup that cannot be drawn."""
        if isinstance(self.data, str):
            rendered = resvg_py.svg_to_bytes(
                svg_string=self.data, width=size, height=size, skip_system_fonts=True
            )
            with Image.open(io.BytesIO(bytes(rendered))) as opened:
                picture = opened.convert("RGBA")
        else:
            with Image.open(io.BytesIO(self.data)) as opened:
                picture = opened.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
        return ImageOps.mirror(picture) if self.mirrored else picture


def read_set(emoji_set: EmojiSet, modules: Path, names: list[Name]) -> tuple[list[Drawing], int]:
    """The drawings of a set that have a name, one per name in the order of `names`; and how many keys had none."""
    folder = modules / emoji_set.package
    if emoji_set.package.startswith("@iconify-json/"):
        return _read_iconify(emoji_set.style, folder, names)
    return _read_bitmaps(emoji_set.style, folder / "assets", names)


def _read_bitmaps(style: str, folder: Path, names: list[Name]) -> tuple[list[Drawing], int]:
    by_hexcode = {_bare_hexcode(path.stem): path for path in sorted(folder.glob("*.webp"))}
    drawings = [
        Drawing(name, style, by_hexcode[name.hexcode].read_bytes())
        for name in names
        if name.hexcode in by_hexcode
    ]
    return drawings, len(by_hexcode) - len(drawings)


def _read_iconify(style: str, folder: Path, names: list[Name]) -> tuple[list[Drawing], int]:
    """`chars.json` says which key has a hexcode; where it does not, a key is the slug of the Unicode name."""
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    chars = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
    entries = {**icons["icons"], **icons.get("aliases", {})}
    key_of_hexcode = {_bare_hexcode(hexcode): key for hexcode, key in chars.items()}
    drawings, used = [], set()
    for name in names:
        key = key_of_hexcode.get(name.hexcode, "")
        if key not in entries:
            key = slug(name.name)
        if key not in entries:
            continue
        used.add(key)
        drawings.append(Drawing(name, style, _svg(icons, key), bool(entries[key].get("hFlip"))))
    parents = {entries[key].get("parent") for key in used}
    return drawings, sum(key not in used and key not in parents for key in icons["icons"])


def _svg(icons: dict, key: str) -> str:
    """The markup of an icon, with the size and viewBox without which nothing is drawn at the right scale.

    The viewBox is a square around the icon: a few are lower or higher than the others of their set.
    """
    alias = icons.get("aliases", {}).get(key, {})
    icon = icons["icons"][alias["parent"]] if alias else icons["icons"][key]
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    side = max(width, height)
    left, top = icon.get("left", 0) - (side - width) / 2, icon.get("top", 0) - (side - height) / 2
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{side}" height="{side}" viewBox="{left:g} {top:g} {side:g} {side:g}">{icon["body"]}</svg>'
    )
