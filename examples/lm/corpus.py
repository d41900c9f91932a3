"""Text as tokens: vocabularies of bytes, characters or words, the layouts of the original's data, and batches."""

from __future__ import annotations

import codecs
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

UNITS = ("bytes", "characters", "words")
SPLITS = ("train", "valid", "test")
BYTES = [chr(byte) for byte in range(256)]  # a byte is written as the character of the same number
_END, _UNKNOWN = ("<eos>", "<S>"), ("<unk>", "<UNK>")  # as WikiText and as the One Billion Word vocabulary has it


class Vocabulary:
    """The symbols that are tokens: token i is symbols[i].

    Args:
        units: "bytes", "characters" or "words".
        symbols: All different; of words, one ends a line: ``<eos>`` or ``<S>``.

    Raises:
        ValueError: units is unknown, symbols repeat, are none, or none of them ends a line.
    """

    def __init__(self, units: str, symbols: Sequence[str]) -> None:
        if units not in UNITS:
            raise ValueError(f"units: expected one of {', '.join(UNITS)}, got {units}")
        self.units, self.symbols = units, list(symbols)
        self._index = _Index(self)
        if not symbols or len(self._index) < len(symbols):
            repeated = [symbol for symbol, count in Counter(symbols).most_common(1) if count > 1]
            raise ValueError(f"vocabulary: expected different {units}, got {repeated or 'none'}")
        self.end = next((symbol for symbol in _END if symbol in self._index), None) if units == "words" else None
        if units == "words" and self.end is None:
            raise ValueError(f"vocabulary: expected {_END[0]} or {_END[1]}, which ends a line, among the words, got none")

    def __len__(self) -> int:
        return len(self.symbols)

    @classmethod
    def from_file(cls, path: Path) -> Vocabulary:
        """Words, the first of each line."""
        return cls("words", [line.split()[0] for line in read_text(path).splitlines() if line.strip()])

    @classmethod
    def counted(cls, units: str, pieces: Iterable[Sequence[str]], min_count: int = 1) -> Vocabulary:
        """The symbols of pieces, frequent ones first; words seen less than min_count times become ``<unk>``."""
        counts = Counter(chain.from_iterable(pieces))
        symbols = [symbol for symbol, count in counts.most_common() if count >= min_count]
        if units == "words":
            specials = [_END[0]] + [_UNKNOWN[0]] * (min_count > 1)
            symbols = specials + [symbol for symbol in symbols if symbol not in specials]
        return cls(units, symbols)

    def tokens(self, pieces: Iterable[Sequence[str]]) -> Tensor:
        """The tokens of all pieces, one stream, uint8 for plain bytes and else int32.

        Raises:
            ValueError: A symbol is not in the vocabulary, and there is no ``<unk>``.
        """
        if self.symbols == BYTES:
            stream = bytearray("".join(pieces).encode("latin-1"))
            return torch.frombuffer(stream, dtype=torch.uint8) if stream else torch.empty(0, dtype=torch.uint8)
        stream = array("i")
        for piece in pieces:
            stream.extend(map(self._index.__getitem__, piece))
        return torch.frombuffer(stream, dtype=torch.int32) if stream else torch.empty(0, dtype=torch.int32)

    def encode(self, text: str) -> Tensor:
        """Tokens (T,), int64, of a prompt; of the symbol that starts a line if it is empty."""
        if self.units == "words":
            lines = text.split("\n")
            symbols = [*chain.from_iterable([*line.split(), self.end] for line in lines[:-1]), *lines[-1].split()]
        else:
            symbols = list(text if self.units == "characters" else _as_bytes(text.encode("utf-8", "surrogateescape")))
        starts = self.end if self.units == "words" else "\n" if "\n" in self._index else self.symbols[0]
        return self.tokens([symbols or [starts]]).long()

    def decode(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text, a piece for each token as it comes; bytes that are no UTF-8 come as U+FFFD."""
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            symbol = self.symbols[token]
            if self.units == "bytes":
                yield utf8.decode(symbol.encode("latin-1"))
            elif self.units == "characters":
                yield symbol
            else:
                yield "\n" if symbol == self.end else symbol + " "
        yield utf8.decode(b"", final=True)

    def state(self) -> dict:
        """What `Vocabulary` needs to be made again."""
        return {"units": self.units, "symbols": self.symbols}


class _Index(dict):
    """Symbol to token."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__((symbol, token) for token, symbol in enumerate(vocabulary.symbols))
        self._kind = vocabulary.units.removesuffix("s")
        self._unknown = next((self[x] for x in _UNKNOWN if x in self), None) if vocabulary.units == "words" else None

    def __missing__(self, symbol: str) -> int:
        if self._unknown is None:
            shown = ord(symbol) if self._kind == "byte" else repr(symbol)
            advice = "; give --min-count 2 or a --vocabulary with <unk>" if self._kind == "word" else ""
            raise ValueError(f"{self._kind} {shown}: not among the {len(self)} of the vocabulary{advice}")
        return self._unknown


@dataclass(frozen=True)
class Corpus:
    """A text as streams of tokens, by split."""

    vocabulary: Vocabulary
    splits: dict[str, Tensor]

    def fingerprint(self) -> int:
        """A number that another text hardly has."""
        value = 0
        for split in SPLITS:
            value = zlib.crc32(self.splits[split].numpy().tobytes(), value)
        return value


def load_corpus(
    path: Path | None, units: str | None = None, vocabulary: Vocabulary | None = None, min_count: int = 1
) -> Corpus:
    """Reads a text and cuts it into training, validation and test.

    Args:
        path: A folder with train.txt, valid.txt and test.txt as the original's data scripts write them: enwik8 (numbers
            of bytes; line breaks are left out, as there), text8 (characters with spaces between them, _ for a
            space) or words; any other file, or folder of files, in order: 90 % training, 5 % validation, 5 % test.
            None: the documentation text that ships with CPython (pydoc_data.topics).
        units: None: what the layout says, bytes where it says nothing.
        vocabulary: None: all bytes; all characters of the text; the words of the training text.
        min_count: Words of the training text seen less often become ``<unk>``.

    Raises:
        OSError: path or a part of it is missing or can't be read.
        ValueError: It isn't what units or vocabulary want; characters or words are not UTF-8; a split is empty.
    """
    if vocabulary is not None and units not in (None, vocabulary.units):
        raise ValueError(f"--units: expected {vocabulary.units} as the vocabulary, got {units}")
    text = _read(path, units or (vocabulary and vocabulary.units), vocabulary.end if vocabulary else _END[0])
    if vocabulary is None:
        if text.units == "words":
            vocabulary = Vocabulary.counted("words", text.splits["train"](), min_count)
        elif text.units == "bytes" and not text.prepared:
            vocabulary = Vocabulary("bytes", BYTES)
        else:
            vocabulary = Vocabulary.counted(text.units, chain.from_iterable(text.splits[x]() for x in SPLITS))
    corpus = Corpus(vocabulary, {split: vocabulary.tokens(text.splits[split]()) for split in SPLITS})
    for split, stream in corpus.splits.items():
        if not len(stream):
            raise ValueError(f"{path}: no text for {split}")
    return corpus


@dataclass(frozen=True)
class _Text:
    """Symbols by split, in pieces, as often as asked for; prepared: not the text itself but its symbols in a file."""

    units: str
    prepared: bool
    splits: dict[str, Callable[[], Iterable[Sequence[str]]]]


def _read(path: Path | None, units: str | None, end: str) -> _Text:
    if path is not None and not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    files = {split: path / f"{split}.txt" for split in SPLITS} if path is not None and path.is_dir() else {}
    missing = [file for file in files.values() if not file.is_file()]
    if files and len(missing) < len(files):
        if missing:
            raise FileNotFoundError(f"{missing[0]}: no such file, but its siblings are there")
        layout = _layout(files["train"])
        if layout == "words" and units in ("bytes", "characters"):
            return _Text(units, False, {split: partial(_whole, [file], units, end) for split, file in files.items()})
        if units not in (None, layout):
            raise ValueError(f"--units: expected {layout} as {files['train']}, got {units}")
        read = {"bytes": _read_numbers, "characters": _read_spaced, "words": partial(_read_words, end=end)}[layout]
        return _Text(layout, True, {split: partial(read, file) for split, file in files.items()})
    units = units or "bytes"
    if path is None or path.is_file():
        sources = [path]
    else:
        sources = [x for x in sorted(path.rglob("*")) if x.is_file() and not _hidden(x.relative_to(path))]
    (symbols,) = _whole(sources, units, end)
    cuts = [len(symbols) * percent // 100 for percent in (0, 90, 95, 100)]
    parts = [symbols[start:stop] for start, stop in pairwise(cuts)]
    return _Text(units, False, {split: partial(list, [part]) for split, part in zip(SPLITS, parts, strict=True)})


def _layout(file: Path) -> str:
    """The units of a file that the original's data scripts wrote, judged by how it starts."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        start = lines.read(1 << 12).split()
    start = start[:-1] or start  # the last one may be cut
    if all(symbol in _NUMBERS for symbol in start):
        return "bytes"
    return "characters" if all(len(symbol) == 1 for symbol in start) else "words"


_NUMBERS = {str(byte): symbol for byte, symbol in enumerate(BYTES)}


def _read_numbers(file: Path) -> Iterator[list[str]]:
    for line in _lines(file):
        try:
            yield [_NUMBERS[number] for number in line.split()]
        except KeyError as error:
            raise ValueError(f"{file}: expected numbers of bytes, 0 to 255, got {error}") from None


def _read_spaced(file: Path) -> Iterator[list[str]]:
    for line in _lines(file):
        yield [" " if symbol == "_" else symbol for symbol in line.split()]


def _read_words(file: Path, end: str) -> Iterator[list[str]]:
    for line in _lines(file):
        yield [*line.split(), end]


def _whole(sources: list[Path | None], units: str, end: str) -> list[Sequence[str]]:
    """The files one after the other, as one piece; None: the text that ships with CPython."""
    if units == "bytes":
        return [_as_bytes(b"\n".join(read_topics().encode() if x is None else x.read_bytes() for x in sources))]
    text = "\n".join(read_topics() if x is None else read_text(x) for x in sources)
    if units == "characters":
        return [text]
    return [list(chain.from_iterable([*line.split(), end] for line in text.split("\n")))]


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8") as lines:
            yield from lines
    except UnicodeDecodeError as error:
        wrong = f"byte {error.object[error.start]:#x} ({error.reason})"
        raise ValueError(f"{file}: expected UTF-8, got {wrong}; --units bytes takes any file") from None


def read_text(file: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: It is not UTF-8.
    """
    return "".join(_lines(file))


def read_topics() -> str:
    """The documentation that CPython's help() shows, about 0.5 MB, the same for every CPython of one version."""
    return "\n".join(topics[name] for name in sorted(topics))


def _as_bytes(data: bytes) -> str:
    return data.decode("latin-1")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


class Segments:
    """A stream cut into parallel ones, and those into segments: the batches of the original's LMOrderedIterator.

    Args:
        stream: Tokens (N,).
        batch: Number of parallel streams, each N // batch tokens long, the first of them the start of the text.
        tgt_len: Tokens T of a segment; the last one may be shorter.
        columns: Which of the parallel streams to give.

    Raises:
        ValueError: The stream is too short for a single prediction in each.
    """

    def __init__(self, stream: Tensor, batch: int, tgt_len: int, columns: slice = slice(None)) -> None:
        length = len(stream) // batch
        if length < 2:
            raise ValueError(f"text: expected at least 2 tokens for each of {batch} streams, got {len(stream)} in all")
        self.rows, self.tgt_len = stream[: length * batch].view(batch, length)[columns], tgt_len

    def __len__(self) -> int:
        return -(-(self.rows.shape[1] - 1) // self.tgt_len)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Tokens of segment i and those that follow them, (T, B) each, int64."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        window = self.rows[:, i * self.tgt_len : (i + 1) * self.tgt_len + 1].t().long()
        return window[:-1], window[1:]
