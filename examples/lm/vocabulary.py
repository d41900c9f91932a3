"""Vocabularies: tokens for the bytes, characters or words of a text, and text for tokens."""

from __future__ import annotations

import codecs
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

UNITS = ("bytes", "characters", "words")
BYTES = [chr(byte) for byte in range(256)]  # a byte is written as the character of the same number
END = ("<eos>", "<S>")  # ends a line, in WikiText and in the vocabulary of One Billion Words
_UNKNOWN = ("<unk>", "<UNK>")


def as_bytes(data: bytes) -> str:
    """A string of which each character stands for a byte."""
    return data.decode("latin-1")


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
        self.end = next((symbol for symbol in END if symbol in self._index), None) if units == "words" else None
        if units == "words" and self.end is None:
            raise ValueError(f"vocabulary: expected {END[0]} or {END[1]}, which ends a line, among the words, got none")

    def __len__(self) -> int:
        return len(self.symbols)

    @classmethod
    def counted(cls, units: str, pieces: Iterable[Sequence[str]], min_count: int = 1) -> Vocabulary:
        """The symbols of pieces, frequent ones first; words seen less than min_count times become ``<unk>``."""
        counts = Counter(chain.from_iterable(pieces))
        symbols = [symbol for symbol, count in counts.most_common() if count >= min_count]
        if units == "words":
            specials = [END[0]] + [_UNKNOWN[0]] * (min_count > 1)
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
        """Tokens (T,), int64, of a prompt; if it is empty, of a line break, or else of the most frequent symbol."""
        if self.units == "words":
            lines = text.split("\n")
            symbols = [*chain.from_iterable([*line.split(), self.end] for line in lines[:-1]), *lines[-1].split()]
            return self.tokens([symbols or [self.end]]).long()
        symbols = text if self.units == "characters" else as_bytes(text.encode("utf-8", "surrogateescape"))
        return self.tokens([symbols or ("\n" if "\n" in self._index else self.symbols[0])]).long()

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
