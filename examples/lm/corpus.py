"""Text as streams of tokens: any file or folder, the layouts of the original's data scripts, and segments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, pairwise
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from .vocabulary import BYTES, END, Vocabulary, as_bytes

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Corpus:
    """A text as streams of tokens, by split; source is the path that it came from."""

    source: str | None
    vocabulary: Vocabulary
    splits: dict[str, Tensor]

    @cached_property
    def fingerprint(self) -> int:
        """A number that another text hardly has."""
        value = 0
        for stream in self.splits.values():
            for chunk in stream.split(1 << 20):
                weighted = chunk.long() * torch.arange(1, len(chunk) + 1)
                value = (31 * value + int(weighted.sum()) + len(stream)) % 2**61
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
    text = _read(path, units or (vocabulary and vocabulary.units), vocabulary.end if vocabulary else END[0])
    if min_count > 1 and (text.units != "words" or vocabulary is not None):
        raise ValueError(f"--min-count: expected words without --vocabulary, got {text.units} and {min_count}")
    if vocabulary is None:
        if text.units == "words":
            vocabulary = Vocabulary.counted("words", text.splits["train"](), min_count)
        elif text.units == "bytes" and not text.prepared:
            vocabulary = Vocabulary("bytes", BYTES)
        else:
            vocabulary = Vocabulary.counted(text.units, chain.from_iterable(text.splits[x]() for x in SPLITS))
    corpus = Corpus(
        path and str(path.resolve()), vocabulary, {split: vocabulary.tokens(text.splits[split]()) for split in SPLITS}
    )
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
        start = lines.read(1 << 12).split()  # if the last one is cut, it is still a number or a character
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
        return [as_bytes(b"\n".join(read_topics().encode() if x is None else x.read_bytes() for x in sources))]
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


def read_vocabulary(file: Path) -> Vocabulary:
    """Words, the first of each line.

    Raises:
        OSError: The file can't be read.
        ValueError: It is not UTF-8, or no vocabulary.
    """
    return Vocabulary("words", [line.split()[0] for line in _lines(file) if line.strip()])


def read_text(file: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: It is not UTF-8.
    """
    return "".join(_lines(file))


def read_topics() -> str:
    """The documentation that CPython's help() shows, about 0.5 MB, the same for every CPython of one version."""
    return "\n".join(topics[name] for name in sorted(topics))


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
