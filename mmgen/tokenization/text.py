"""Text <-> token ids, with the special tokens that documents are built from.

Two backends behind one interface: SentencePiece (what `train_text` makes) and Hugging Face's `tokenizer.json` (for
trunks that start from a language model). A special token is produced by its id alone: text that spells one out is
text. Knows nothing of documents, pictures or the trunk.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import sentencepiece
import yaml
from tokenizers import Tokenizer

from mmgen.tokenization.assets import RECIPE, check_new, new_asset, sha256, verify_asset

MODEL = "tokenizer.model"  # SentencePiece
HUB = "tokenizer.json"  # Hugging Face
BEGIN, END, NULL = "<|begin|>", "<|end|>", "<|null|>"
MAX_SIZE = 64
# SentencePiece spells a space U+2581 inside; the character itself must go round that, as bytes.
META_SPACE = "\u2581"


def _size_tokens(axis: str, max_size: int) -> list[str]:
    return [f"<|{axis}_{n}|>" for n in range(1, max_size + 1)]


class TextTokenizer(ABC):
    """What the rest of mmgen sees of a text tokenizer."""

    fingerprint: str
    """SHA-256 of the model file"""
    vocab_size: int
    """ids are 0 .. vocab_size - 1"""
    max_size: int
    """the largest picture side, in tokens, that has a size token"""
    begin: int
    end: int
    null: int
    """padding, and "no token" """
    specials: frozenset[int]
    """the ids that no text encodes to and that `decode` leaves out"""

    def _set_specials(self, vocabulary: dict[str, int]) -> None:
        self.begin, self.null = vocabulary[BEGIN], vocabulary[NULL]
        # A language model has learned its own end of a document; keep that one.
        self.end = vocabulary.get("<|endoftext|>", vocabulary[END])
        self.max_size = 0
        while f"<|height_{self.max_size + 1}|>" in vocabulary:
            self.max_size += 1
        self._heights = [vocabulary[token] for token in _size_tokens("height", self.max_size)]
        self._widths = [vocabulary[token] for token in _size_tokens("width", self.max_size)]
        self.specials = frozenset([self.begin, self.end, self.null, *self._heights, *self._widths])
        self._sizes_of = {id: n for ids in (self._heights, self._widths) for n, id in enumerate(ids, 1)}

    def height(self, n: int) -> int:
        """The token that says "the picture is n tokens high". Raises ValueError unless 1 <= n <= max_size."""
        return self._heights[self._checked(n) - 1]

    def width(self, n: int) -> int:
        """The token that says "the picture is n tokens wide". Raises ValueError unless 1 <= n <= max_size."""
        return self._widths[self._checked(n) - 1]

    def _checked(self, n: int) -> int:
        if not 1 <= n <= self.max_size:
            raise ValueError(
                f"a picture side of {n} tokens has no size token; sides are 1 to {self.max_size}"
            )
        return n

    def height_of(self, id: int) -> int | None:
        """The inverse of `height`; None where `id` is no height token."""
        return self._sizes_of.get(id) if id in self._heights else None

    def width_of(self, id: int) -> int | None:
        """The inverse of `width`; None where `id` is no width token."""
        return self._sizes_of.get(id) if id in self._widths else None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, none of them special. Raises ValueError for text that has no UTF-8 (lone surrogates)."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special ones leave nothing, bytes that are no UTF-8 become U+FFFD."""


class SentencePieceTokenizer(TextTokenizer):
    """A SentencePiece model with byte fallback: `decode(encode(text)) == text` for any text."""

    def __init__(self, path: Path) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} is no SentencePiece model: {' '.join(str(error).split())}") from None
        self.vocab_size = self._model.get_piece_size()
        vocabulary = {self._model.id_to_piece(id): id for id in range(self.vocab_size)}
        missing = [token for token in (BEGIN, END, NULL, "<0xE2>") if token not in vocabulary]
        if missing:
            raise ValueError(
                f"{path} lacks the pieces {', '.join(missing)}; make one with `mmgen tokenizer train-text`"
            )
        self._set_specials(vocabulary)
        self._meta_space = [vocabulary[f"<0x{byte:02X}>"] for byte in META_SPACE.encode()]
        self.fingerprint = sha256(path)

    def encode(self, text: str) -> list[int]:
        _check_unicode(text)
        first, *rest = text.split(META_SPACE)
        ids = list(self._model.encode(first))
        for part in rest:
            ids += [*self._meta_space, *self._model.encode(part)]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(id) for id in ids if id not in self.specials])


class HubTokenizer(TextTokenizer):
    """A Hugging Face `tokenizer.json`, with the special tokens that it lacks added behind its vocabulary.

    Its own normalisation stays (Qwen3's is NFC), so `decode(encode(text))` is the normalised text.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._model = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path} is no tokenizer.json: {' '.join(str(error).split())}") from None
        known = self._model.get_vocab()
        self._model.no_padding()
        self._model.no_truncation()
        if "<|height_1|>" not in known:
            self._model.add_special_tokens(
                [*_size_tokens("height", MAX_SIZE), *_size_tokens("width", MAX_SIZE)]
            )
        self._model.add_special_tokens([BEGIN, END, NULL])
        # From here on the spelling of a special token, in a text, is text.
        self._model.encode_special_tokens = True
        vocabulary = self._model.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self._set_specials(vocabulary)
        self.fingerprint = sha256(path)

    def encode(self, text: str) -> list[int]:
        _check_unicode(text)
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(id) for id in ids], skip_special_tokens=True)


class TokenizerOutline(TextTokenizer):
    """The number of ids of a tokenizer that is yet to be made; no text passes it. Its special ids are made up."""

    def __init__(self, vocab_size: int, max_size: int = MAX_SIZE) -> None:
        self.vocab_size = vocab_size
        sizes = (*_size_tokens("height", max_size), *_size_tokens("width", max_size))
        self._set_specials({token: id for id, token in enumerate((BEGIN, END, NULL, *sizes))})

    def encode(self, text: str) -> list[int]:
        raise ValueError("this is a tokenizer's outline, which encodes nothing")

    def decode(self, ids: Sequence[int]) -> str:
        raise ValueError("this is a tokenizer's outline, which decodes nothing")


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text with a lone surrogate at character {error.start} cannot be encoded") from None


def load_text_tokenizer(folder: Path | str) -> TextTokenizer:
    """The tokenizer in `folder`: `tokenizer.model` (SentencePiece) or `tokenizer.json` (Hugging Face).

    Raises ValueError where neither is there, or a file differs from its checksum.
    """
    folder = Path(folder)
    verify_asset(folder)
    if (folder / MODEL).is_file():
        return SentencePieceTokenizer(folder / MODEL)
    if (folder / HUB).is_file():
        return HubTokenizer(folder / HUB)
    making = f"; make it as its {RECIPE} says" if (folder / RECIPE).is_file() else ""
    raise ValueError(f"no text tokenizer in {folder}: expected {MODEL} or {HUB}{making}")


def outline_text_tokenizer(folder: Path | str) -> TextTokenizer:
    """The tokenizer in `folder`; where it is yet to be made, the `vocab_size` that the folder's recipe.yaml names.

    Raises ValueError where neither is there.
    """
    recipe = Path(folder) / RECIPE
    if any((Path(folder) / name).is_file() for name in (MODEL, HUB)) or not recipe.is_file():
        return load_text_tokenizer(folder)
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{recipe} cannot be read: {' '.join(str(error).split())}") from None
    size = content.get("vocab_size") if isinstance(content, dict) else None
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"{recipe} does not say vocab_size, the number of ids")
    return TokenizerOutline(size)


def train_text(
    texts: Iterable[str],
    vocab_size: int,
    folder: Path | str,
    max_size: int = MAX_SIZE,
    overwrite: bool = False,
    provenance: Mapping[str, str] | None = None,
) -> TextTokenizer:
    """Trains a SentencePiece unigram model on `texts`, writes it to `folder` and returns it.

    `vocab_size` counts everything: 256 bytes, 2 * max_size size tokens, begin, end, null and unknown. The same texts
    in the same order give the same file. `provenance` goes into recipe.yaml. Raises ValueError for a folder that
    exists, and for a vocabulary that is too small for its fixed part or larger than the texts support.
    """
    check_new(folder, overwrite)
    fixed = 256 + 2 * max_size + 4
    if vocab_size <= fixed:
        raise ValueError(
            f"a vocabulary of {vocab_size} leaves no room beside its {fixed} bytes and special tokens"
        )
    counts = {"texts": 0, "bytes": 0}

    def lines() -> Iterable[str]:
        for text in texts:
            counts["texts"] += 1
            counts["bytes"] += len(text.encode())
            yield from text.splitlines()

    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines()),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            byte_fallback=True,
            split_digits=True,
            # Lossless: nothing is normalised, stripped or put in front.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            control_symbols=[*_size_tokens("height", max_size), *_size_tokens("width", max_size)],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            bos_piece=BEGIN,
            eos_piece=END,
            pad_piece=NULL,
            num_threads=1,  # several threads sum in an order of their own
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rpartition("] ")[2]  # behind the C++ line that failed
        raise ValueError(f"no vocabulary of {vocab_size} from {counts['texts']} texts: {reason}") from None
    recipe = {
        **(provenance or {}),
        "kind": "sentencepiece unigram, byte fallback, lossless",
        "vocab_size": vocab_size,
        "max_size": max_size,
        "trained_on": counts,
    }
    with new_asset(folder, recipe, overwrite) as beside:
        (beside / MODEL).write_bytes(model.getvalue())
    return load_text_tokenizer(folder)
