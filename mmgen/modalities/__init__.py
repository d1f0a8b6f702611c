"""One file per modality, and the registry that finds it by its kind. To add one: write the file, name it in a config.

A kind is a name below or an import path `package.module:Class`, so that a modality may live outside this package.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from mmgen.config import from_mapping
from mmgen.modalities.base import MissingPart, Modality, Place
from mmgen.modalities.image import Image, bands
from mmgen.modalities.text import Text
from mmgen.tokenization.text import TextTokenizer

KINDS: dict[str, type[Modality]] = {"text": Text, "image": Image}


def build_modalities(
    configs: Mapping[str, Mapping[str, Any]], tokenizer: TextTokenizer, outline: bool = False
) -> dict[str, Modality]:
    """The modalities of a run, text first, then in the config's order. Raises ValueError for an unknown kind or key.

    `outline`: only their sizes are asked (see `Modality.outline`).
    """
    if "text" not in configs:
        raise ValueError(
            f"modalities {sorted(configs)} lack text, which begins every document: add `text: {{}}`"
        )
    names = ["text", *(name for name in configs if name != "text")]
    return {name: _build(name, dict(configs[name]), tokenizer, outline) for name in names}


def _build(name: str, config: dict[str, Any], tokenizer: TextTokenizer, outline: bool) -> Modality:
    kind = config.pop("kind", name)
    cls = KINDS.get(kind) or _import(kind, name)
    try:
        make = cls.outline if outline else cls
        return make(name, from_mapping(config, cls.Config), tokenizer)
    except ValueError as error:
        raise ValueError(f"modalities.{name}: {error}") from None


def _import(kind: str, name: str) -> type[Modality]:
    module, _, attribute = kind.partition(":")
    if not attribute:
        raise ValueError(
            f"modalities.{name}: kind {kind!r} is none of {sorted(KINDS)} and no import path package.module:Class"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"modalities.{name}: kind {kind!r} cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Modality)):
        raise ValueError(f"modalities.{name}: kind {kind!r} is not a subclass of mmgen.modalities.Modality")
    return found


__all__ = ["KINDS", "Image", "MissingPart", "Modality", "Place", "Text", "bands", "build_modalities"]
