"""The example's text: vocabularies, the layouts of the original's data, splits, batches, and bad files."""

from pydoc_data.topics import topics

import pytest
import torch
from lm.corpus import Segments, load_corpus, read_vocabulary
from lm.vocabulary import BYTES, Vocabulary


def write(folder, **texts):
    """train.txt, valid.txt and test.txt, strings or bytes."""
    for split, text in texts.items():
        (folder / f"{split}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def text_of(corpus, split):
    return "".join(corpus.vocabulary.decode(corpus.splits[split].tolist()))


# The layouts of the original's data scripts


def test_enwik8(tmp_path):
    """As prep_enwik8.py writes it, and as the original reads it: line breaks are no tokens, frequent bytes first."""

    def prepared(data):
        return " ".join(str(byte) if byte != 10 else "\n" for byte in data)

    texts = {"train": "aaé\nb\n\nc", "valid": "bbb\nbb", "test": "c d\n"}
    write(tmp_path, **{split: prepared(text.encode()) for split, text in texts.items()})
    corpus = load_corpus(tmp_path)
    assert corpus.vocabulary.units == "bytes"
    assert corpus.vocabulary.symbols == ["b", "a", "c", "\xc3", "\xa9", " ", "d"]  # of the same count, the first first
    assert corpus.splits["train"].tolist() == [1, 1, 3, 4, 0, 2]
    for split, text in texts.items():
        assert text_of(corpus, split) == text.replace("\n", "")


def test_text8(tmp_path):
    write(tmp_path, train="_ a n _ a r c h i s t _ a", valid="_ a _", test="t h e")
    corpus = load_corpus(tmp_path)
    assert corpus.vocabulary.units == "characters"
    assert corpus.vocabulary.symbols[:3] == [" ", "a", "h"]
    assert [text_of(corpus, split) for split in corpus.splits] == [" an archist a", " a ", "the"]


WT103 = {"train": " \n = Robert = \n the <unk> of the \n", "valid": "the = the\n", "test": "\nof\n"}


def test_wikitext(tmp_path):
    """Words by frequency in training, <eos> the first of them; one ends each line, empty ones too."""
    corpus = load_corpus(write(tmp_path, **WT103))
    assert corpus.vocabulary.units == "words"
    assert corpus.vocabulary.symbols == ["<eos>", "=", "the", "Robert", "<unk>", "of"]
    assert corpus.splits["train"].tolist() == [0, 1, 3, 1, 0, 2, 4, 5, 2, 0]
    assert text_of(corpus, "valid") == "the = the \n"
    assert text_of(corpus, "test") == "\nof \n"


@pytest.mark.parametrize(("units", "train"), [("bytes", b"caf\xc3\xa9 \xff\r\n"), ("characters", "café 1 2\n")])
def test_three_plain_files(tmp_path, units, train):
    corpus = load_corpus(write(tmp_path, train=train, valid="1é f", test="ca"), units)
    wanted = train if isinstance(train, str) else train.decode(errors="replace")
    assert text_of(corpus, "train") == wanted
    assert [text_of(corpus, split) for split in ("valid", "test")] == ["1é f", "ca"]


# Any other text


@pytest.mark.parametrize("units", ["bytes", "characters", "words"])
def test_a_file_is_cut_in_order(tmp_path, units):
    (tmp_path / "text").write_text("one two three\nvier fünf\n" * 50)
    corpus = load_corpus(tmp_path / "text", units)
    sizes = [len(stream) for stream in corpus.splits.values()]
    n = sum(sizes)
    assert sizes == [n * 90 // 100, n * 95 // 100 - n * 90 // 100, n - n * 95 // 100]
    whole = torch.cat(list(corpus.splits.values())).tolist()
    text = "".join(corpus.vocabulary.decode(whole))
    wanted = "one two three \nvier fünf \n" * 50 + "\n" if units == "words" else "one two three\nvier fünf\n" * 50
    assert text == wanted


def test_a_folder_is_read_in_order_without_hidden_files(tmp_path):
    for name, text in {"b.txt": "second" * 9, "a/z.md": "first" * 9, ".git/x": "never", "a/.y": "never"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    corpus = load_corpus(tmp_path)
    assert "".join(text_of(corpus, split) for split in corpus.splits) == "first" * 9 + "\n" + "second" * 9
    assert corpus.vocabulary.symbols == BYTES


def test_a_text_of_a_few_words_has_words(tmp_path):
    """The last of them, too, tells it from one of single characters."""
    corpus = load_corpus(write(tmp_path, train="I a dog", valid="a dog", test="dog I"))
    assert corpus.vocabulary.units == "words"
    assert text_of(corpus, "train") == "I a dog \n"


def test_without_a_path_it_is_the_documentation_of_cpython():
    corpus, again = load_corpus(None), load_corpus(None)
    text = "".join(text_of(corpus, split) for split in corpus.splits)
    assert topics["for"] in text
    assert len(text) > 400_000
    assert corpus.fingerprint == again.fingerprint != load_corpus(None, "characters").fingerprint


def test_vocabulary_file(tmp_path):
    (tmp_path / "words").write_text("<eos> 900\nthe 7\n<unk>\nof\n")
    corpus = load_corpus(write(tmp_path, **WT103), vocabulary=read_vocabulary(tmp_path / "words"))
    assert text_of(corpus, "train") == "\n<unk> <unk> <unk> \nthe <unk> of the \n"
    (tmp_path / "words").write_text("<S>\nthe\n<UNK>\n")
    corpus = load_corpus(tmp_path, vocabulary=read_vocabulary(tmp_path / "words"))
    assert corpus.splits["test"].tolist() == [0, 2, 0]


def test_rare_words_become_unknown(tmp_path):
    corpus = load_corpus(write(tmp_path, train="a bb a\nc c c\n", valid="bb a\n", test="new\n"), min_count=2)
    assert corpus.vocabulary.symbols == ["<eos>", "<unk>", "c", "a"]
    assert text_of(corpus, "train") == "a <unk> a \nc c c \n"
    assert text_of(corpus, "test") == "<unk> \n"


# Prompts and output


@pytest.mark.parametrize(
    ("vocabulary", "text", "tokens", "out"),
    [
        (Vocabulary("bytes", BYTES), "é\n", [195, 169, 10], "é\n"),
        (Vocabulary("bytes", BYTES), "\udcff", [255], "�"),  # how Python hands over an argument that is no UTF-8
        (Vocabulary("bytes", BYTES), "", [10], "\n"),
        (Vocabulary("characters", ["x", "é"]), "éx", [1, 0], "éx"),
        (Vocabulary("characters", ["x", "é"]), "", [0], "x"),
        (Vocabulary("words", ["a", "<eos>", "b"]), " a  b\n\nb", [0, 2, 1, 1, 2], "a b \n\nb "),
        (Vocabulary("words", ["a", "<eos>", "b"]), "", [1], "\n"),
    ],
)
def test_prompts(vocabulary, text, tokens, out):
    assert vocabulary.encode(text).tolist() == tokens
    assert vocabulary.encode(text).dtype == torch.int64
    assert "".join(vocabulary.decode(tokens)) == out


def test_bytes_are_decoded_as_they_come():
    pieces = list(Vocabulary("bytes", BYTES).decode([97, 0xE2, 0x82, 0xAC, 0xFF, 98, 0xC3]))
    assert pieces == ["a", "", "", "€", "�", "b", "", "�"]


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"path": "none"}, FileNotFoundError, r"none: no such file or folder"),
        ({"path": "."}, FileNotFoundError, r"valid\.txt: no such file, but its siblings are there"),
        ({"path": "empty"}, ValueError, r"empty: no text for train"),
        ({"path": "short"}, ValueError, r"short: no text for valid"),
        (
            {"path": "latin", "units": "characters"},
            ValueError,
            r"latin: expected UTF-8, got byte 0xe9 .* --units bytes",
        ),
        ({"path": "latin", "units": "words"}, ValueError, r"latin: expected UTF-8, got byte 0xe9"),
        ({"path": "enwik8"}, ValueError, r"train\.txt: expected numbers of bytes, 0 to 255, got '256'"),
        ({"path": "enwik8", "units": "words"}, ValueError, r"--units: expected bytes as .*train\.txt, got words"),
        ({"path": "words"}, ValueError, r"word 'new': not among the 2 of the vocabulary; give --min-count 2"),
        (
            {"path": "words", "units": "bytes", "vocabulary": Vocabulary("words", ["<S>"])},
            ValueError,
            r"--units: expected words as the vocabulary, got bytes",
        ),
        (
            {"path": "long", "vocabulary": Vocabulary("characters", ["x"])},
            ValueError,
            r"character 'é': not among the 1 ",
        ),
    ],
)
def test_bad_texts_are_named(tmp_path, options, error, message):
    (tmp_path / "train.txt").write_text("a\n")
    (tmp_path / "empty").write_text("")
    (tmp_path / "short").write_text("xy")
    (tmp_path / "long").write_text("xé" * 50)
    (tmp_path / "latin").write_bytes(b"caf\xe9 " * 20)
    for name in ("enwik8", "words"):
        (tmp_path / name).mkdir()
    write(tmp_path / "enwik8", train="1 2 3\n" * 1000 + "256", valid="1 2", test="1 2")
    write(tmp_path / "words", train="hello\n", valid="new\n", test="hello\n")
    with pytest.raises(error, match=message):
        load_corpus(**(options | {"path": tmp_path / options["path"]}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("syllables", ["a"]), r"units: expected one of bytes, characters, words, got syllables"),
        (("characters", []), r"vocabulary: expected different characters, got none"),
        (("words", ["<eos>", "a", "a"]), r"vocabulary: expected different words, got \['a'\]"),
        (("words", ["a", "<unk>"]), r"vocabulary: expected <eos> or <S>, which ends a line, .* got none"),
    ],
)
def test_bad_vocabularies_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(*arguments)


# Batches


@pytest.mark.parametrize("n", [50, 51, 59])
def test_segments_index_by_index(n):
    """Segment i, position t, column b: token b * (n // B) + i * T + t, and the one behind it."""
    T, B, stream = 4, 5, torch.arange(n, dtype=torch.int32)
    segments = Segments(stream, B, T)
    length = n // B
    assert len(segments) == -(-(length - 1) // T)
    seen = []
    for i, (data, target) in enumerate(segments):
        for t in range(data.shape[0]):
            assert data[t].tolist() == [b * length + i * T + t for b in range(B)]
        torch.testing.assert_close(target, data + 1)
        assert data.dtype == target.dtype == torch.int64
        seen.append(data.shape[0])
    assert sum(seen) == length - 1  # every token but the first is predicted once
    assert set(seen[:-1]) == {T}


def test_ranks_have_their_columns():
    stream = torch.arange(48)
    whole = Segments(stream, 6, 3)
    parts = [Segments(stream, 6, 3, slice(first, first + 2)) for first in (0, 2, 4)]
    for i in range(len(whole)):
        for got, wanted in zip(zip(*(part[i] for part in parts), strict=True), whole[i], strict=True):
            torch.testing.assert_close(torch.cat(got, 1), wanted)


def test_too_short_a_stream_is_named():
    with pytest.raises(ValueError, match=r"text: expected at least 2 tokens for each of 5 streams, got 9 in all"):
        Segments(torch.arange(9), 5, 4)
