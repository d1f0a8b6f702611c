import unicodedata

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mmgen.tokenization.text import (
    TextTokenizer,
    load_text_tokenizer,
    outline_text_tokenizer,
    train_text,
)

TEXTS = [
    f"a {colour} {thing}, {style} style"
    for colour in ("red", "green", "blue", "golden", "pale violet", "dark 1984")
    for thing in ("apple", "house", "face with tears of joy", "locomotive", "crème brûlée", "cat's paw")
    for style in ("noto", "fluent", "twemoji")
]
SPELLINGS = ("<|begin|>", "<|end|>", "<|null|>", "<|height_1|>", "<|width_64|>", "<unk>", "<s>", "<0x41>")
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text(
    "a \t\n\r\u2581\u0000<|>x1é👍\u200d\u0301"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> TextTokenizer:
    return train_text(TEXTS, 430, tmp_path_factory.mktemp("text") / "sp")


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> TextTokenizer:
    """A byte-level BPE in the way of Qwen3's: NFC, specials of its own, none of ours."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    folder = tmp_path_factory.mktemp("hub")
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_text_tokenizer(folder)


@pytest.fixture(params=["trained", "hub"])
def tokenizer(request) -> TextTokenizer:
    return request.getfixturevalue(request.param)


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT)
def test_sentencepiece_gives_any_text_back(trained, text):
    assert trained.decode(trained.encode(text)) == text


def test_a_plain_sentencepiece_call_would_lose_text(trained, tmp_path):
    """Negative control of the round trip: the character that SentencePiece spells spaces with."""
    assert trained._model.decode(trained._model.encode("a\u2581b")) == "a b"
    assert trained.decode(trained.encode("a\u2581b")) == "a\u2581b"


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT)
def test_a_hub_tokenizer_gives_the_normalised_text_back(hub, text):
    assert hub.decode(hub.encode(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_spelling_of_a_special_token_is_text(tokenizer, spelling):
    ids = tokenizer.encode(f"a {spelling} b")
    assert not set(ids) & tokenizer.specials
    assert len(ids) > 4  # not one token
    assert tokenizer.decode(ids) == f"a {spelling} b"


def test_a_language_models_own_special_token_is_text_too(hub):
    ids = hub.encode("<|im_end|><|endoftext|>")
    assert hub.end not in ids and hub.decode(ids) == "<|im_end|><|endoftext|>"


def test_without_the_setting_the_hub_library_does_inject_specials(hub):
    """Negative control: the library's default turns the spelling into the token."""
    hub._model.encode_special_tokens = False
    try:
        assert hub.begin in hub._model.encode("<|begin|>", add_special_tokens=False).ids
    finally:
        hub._model.encode_special_tokens = True
    assert hub.begin not in hub.encode("<|begin|>")


def test_specials_are_distinct_in_range_and_silent(tokenizer):
    specials = [tokenizer.begin, tokenizer.end, tokenizer.null]
    specials += [size(n) for size in (tokenizer.height, tokenizer.width) for n in range(1, 65)]
    assert len(set(specials)) == 3 + 2 * 64 and set(specials) == tokenizer.specials
    assert min(specials) >= 0 and max(specials) < tokenizer.vocab_size
    assert (
        tokenizer.decode([tokenizer.begin, *tokenizer.encode("apple"), tokenizer.height(8), tokenizer.end])
        == "apple"
    )


def test_size_tokens_invert(tokenizer):
    assert tokenizer.max_size == 64
    for n in (1, 7, 64):
        assert tokenizer.height_of(tokenizer.height(n)) == n and tokenizer.width_of(tokenizer.width(n)) == n
        assert (
            tokenizer.width_of(tokenizer.height(n)) is None
            and tokenizer.height_of(tokenizer.width(n)) is None
        )
    assert tokenizer.height_of(tokenizer.begin) is None
    for n in (0, -1, 65):
        with pytest.raises(ValueError, match=r"sides are 1 to 64"):
            tokenizer.height(n)


def test_a_language_models_end_of_text_is_the_end(hub):
    assert hub._model.id_to_token(hub.end) == "<|endoftext|>"


def test_ids_are_python_ints_in_range(tokenizer):
    ids = tokenizer.encode("a red apple 123 é")
    assert all(type(id) is int and 0 <= id < tokenizer.vocab_size for id in ids)
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_ids_that_no_text_gives_decode_to_something(trained):
    lone_byte = trained._model.piece_to_id("<0xE2>")
    assert trained.decode([lone_byte]) == "\ufffd"


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800")


def test_digits_are_tokens_of_their_own(trained):
    assert len(trained.encode("1984")) >= 4


def test_training_repeats_to_the_byte_and_reads_back(tmp_path, trained):
    again = train_text(TEXTS, 430, tmp_path / "again")
    assert again.fingerprint == trained.fingerprint and again.vocab_size == 430
    other = train_text(TEXTS[:-1], 425, tmp_path / "other")
    assert other.fingerprint != trained.fingerprint
    loaded = load_text_tokenizer(tmp_path / "again")
    assert loaded.encode("a red apple") == trained.encode("a red apple")


def test_a_damaged_model_is_refused(tmp_path):
    train_text(TEXTS, 430, tmp_path / "t")
    model = tmp_path / "t" / "tokenizer.model"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    with pytest.raises(ValueError, match=r"tokenizer\.model is damaged: its sha256 is"):
        load_text_tokenizer(tmp_path / "t")


def test_an_existing_folder_is_kept_unless_asked(tmp_path):
    train_text(TEXTS, 430, tmp_path / "t")
    with pytest.raises(ValueError, match="exists already"):
        train_text(TEXTS, 425, tmp_path / "t")
    assert train_text(TEXTS, 425, tmp_path / "t", overwrite=True).vocab_size == 425
    assert [path.name for path in tmp_path.iterdir()] == ["t"]  # nothing half-written beside
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is no tokenizer and is not overwritten"):
        train_text(TEXTS, 425, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").is_file()


@pytest.mark.parametrize(
    ("vocab_size", "message"), [(300, "leaves no room"), (50_000, "no vocabulary of 50000 from")]
)
def test_an_impossible_vocabulary_is_one_line(tmp_path, vocab_size, message):
    with pytest.raises(ValueError, match=message) as error:
        train_text(TEXTS, vocab_size, tmp_path / "t")
    assert "\n" not in str(error.value) and not (tmp_path / "t").exists()


def test_foreign_files_are_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"expected tokenizer\.model or tokenizer\.json"):
        load_text_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is no tokenizer\.json"):
        load_text_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is no SentencePiece model"):
        load_text_tokenizer(tmp_path)


def test_a_sentencepiece_model_without_our_specials_is_refused(tmp_path):
    with open(tmp_path / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=50, minloglevel=2
        )
    with pytest.raises(ValueError, match="train-text"):
        load_text_tokenizer(tmp_path)


def test_an_outline_has_the_size_of_the_tokenizer_or_of_what_is_yet_to_be_made(trained, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    with pytest.raises(ValueError, match="no text tokenizer in"):
        outline_text_tokenizer(tmp_path)
    recipe.write_text("vocab_size: 4096\n")
    outline = outline_text_tokenizer(tmp_path)
    assert outline.vocab_size == 4096 and outline.max_size == 64
    assert len({outline.begin, outline.end, outline.height(1), outline.height(64), outline.width(64)}) == 5
    assert max(outline.specials) < 4096
    with pytest.raises(ValueError, match="a tokenizer's outline, which encodes nothing"):
        outline.encode("a")
    with pytest.raises(ValueError, match=r"expected tokenizer.model or .*; make it as its recipe.yaml says"):
        load_text_tokenizer(tmp_path)
    for wrong in ("vocab_size: many\n", "[1]\n", "vocab_size: 0\n"):
        recipe.write_text(wrong)
        with pytest.raises(ValueError, match="recipe.yaml does not say vocab_size"):
            outline_text_tokenizer(tmp_path)
    train_text(["red square blue circle"] * 20, 400, tmp_path / "made")
    assert outline_text_tokenizer(tmp_path / "made").encode("red") != []
