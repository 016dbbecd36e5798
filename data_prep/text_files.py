"""Files as lines of text: encodings, gzip, and the first sheet of a workbook."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from data_prep.errors import DataError

WORKBOOK = ".xlsx"
_GZIP = b"\x1f\x8b"
_NO_TEXT = {
    b"version https://git-lfs": "this is a Git LFS pointer, not the data; fetch the data: git lfs pull",
    b"PK\x03\x04": "this is a ZIP archive or an Excel workbook, not text; unpack it, or give it the ending .xlsx",
    b"PAR1": "this is Parquet, not text; give the file the ending .parquet",
    b"<!DOCTYPE": "this is a web page, not data; download the file itself",
}
# UTF-32's mark begins as UTF-16's does.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    codecs.BOM_UTF8: None,
}
# What charset_normalizer may guess: on short texts it takes rare encodings for common ones.
_ENCODINGS = ("cp1252", "mac_roman", "cp1250", "cp1251", "cp1253", "cp932", "euc_jp", "gb18030", "big5", "euc_kr")


class EncodingError(DataError):
    """A file that is not UTF-8, and what it may be in: a guess, which is for the user to take.

    Args:
        encoding: The guess, by Python's name for it.
    """

    def __init__(self, path: Path, reason: str, line: int, encoding: str):
        name = {"mac_roman": "MACINTOSH"}.get(encoding, encoding.upper().replace("_", "-"))
        super().__init__(
            path,
            f"{reason}; take it so with --encoding {encoding} of `new`, or encoding: {encoding} in the task's file, or "
            f"convert it: iconv -f {name} -t UTF-8 {path.name} > converted{path.suffix}",
            line,
        )
        self.encoding = encoding


def ending(path: Path) -> str:
    """A file's ending in lower case; of a packed file that of its content."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def decoded_lines(path: Path, encoding: str | None = None) -> Iterator[str]:
    """The file's lines, decoded one by one so that an undecodable byte is reported with its line. A workbook's rows are
    lines of CSV.

    Args:
        path: The file, perhaps packed by gzip.
        encoding: Its encoding, if that is not UTF-8. The mark that a file begins with counts more.

    Raises:
        DataError: It is not there, no text, or in another encoding.
    """
    if ending(path) == WORKBOOK:
        yield from _sheet(path)[0]
        return
    number = 0
    with _opened(path) as file:
        begin = file.peek(32)[:32]
        for magic, reason in _NO_TEXT.items():
            if begin.startswith(magic):
                raise DataError(path, reason, 1)
        encoding = _encoding(begin, encoding)
        try:
            # Of two bytes a character, a line's end is no byte that lines can be split at.
            is_wide = encoding is not None and "\n".encode(encoding) != b"\n"
        except (LookupError, UnicodeError) as error:
            raise DataError(path, f"Python knows no encoding {encoding}; Windows' own is cp1252") from error
        try:
            for line in io.TextIOWrapper(file, encoding, newline="\n") if is_wide else file:
                number += 1
                text = line if is_wide else line.decode(encoding or ("utf-8-sig" if number == 1 else "utf-8"))
                if "\0" in text:
                    raise _with_nul(path, line, number)
                yield text
        except UnicodeError as error:
            if encoding is None:
                raise _not_utf8(path, error, number) from error
            reason = f"not {encoding} ({error}); is it another encoding, or the file cut short?"
            raise DataError(path, reason, None if is_wide else number) from error
    if not number:
        raise DataError(path, "the file is empty")


def how_read(path: Path, encoding: str | None = None) -> str:
    """What is remarkable of how a file's text is read; empty for UTF-8."""
    if ending(path) == WORKBOOK:
        sheets = _sheet(path)[1]
        return f"the first of {len(sheets)} sheets, {sheets[0]}" if len(sheets) > 1 else ""
    with _opened(path) as file:
        return _encoding(file.peek(4)[:4], encoding) or ""


def cell(path: Path | str, number: int, name: str, value: Any) -> str:
    """A cell as text: `true`, `1` for 1.0, and nothing for a missing value."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        # A column of whole numbers with a gap is one of floats.
        return str(int(value))
    if isinstance(value, list | dict | bytes):
        raise DataError(path, f"{name} holds a {type(value).__name__}, and a text or a label is needed", number)
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(path, f"{name} holds half a character (a lone surrogate); take it out", number) from error
    return text


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked where they are packed, whatever its name."""
    try:
        with path.open("rb") as file:  # noqa: SIM117
            with gzip.open(file) if file.peek(2)[:2] == _GZIP else nullcontext(file) as content:
                yield content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(path, f"not gzip to its end ({error}); is the file cut short?") from error
    except OSError as error:
        raise DataError(
            path, "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)
        ) from error


def _encoding(begin: bytes, given: str | None) -> str | None:
    """A file's encoding by its mark, else the given one; None for UTF-8."""
    return next((name for mark, name in _MARKS.items() if begin.startswith(mark)), given)


def _not_utf8(path: Path, error: UnicodeDecodeError, number: int) -> DataError:
    what = f"not UTF-8 ({error.reason}, byte {error.start + 1})"
    if error.reason == "unexpected end of data":
        return DataError(path, f"{what}; is the file cut short?", number)
    foreign, is_mixed = [], False
    with _opened(path) as file:
        for line in file:
            try:
                is_mixed |= not line.isascii() and bool(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                foreign.append(line)
    # Imported here: few files need it.
    from charset_normalizer import from_bytes

    guesses = from_bytes(b"".join(foreign)[:100_000], cp_isolation=list(_ENCODINGS))
    best = guesses.best()
    if best is None:
        return DataError(path, f"{what}; save the file as UTF-8", number)
    alike = [one for one in guesses if (one.chaos, one.coherence) == (best.chaos, best.coherence)]
    is_western = any("cp1252" in one.could_be_from_charset for one in alike)
    encoding = "cp1252" if is_western else best.encoding
    shown = error.object.decode(encoding, errors="replace").strip()
    start = max(0, error.start - 20)
    looks = f"it looks like {encoding}{' (Latin-1)' if is_western else ''}: {shown[start : start + 40]!r}"
    if is_mixed:
        return DataError(path, f"{what}; {looks}, but other lines are UTF-8; write this line in UTF-8 too", number)
    return EncodingError(path, f"{what}; {looks}", number, encoding)


def _with_nul(path: Path, line: bytes | str, number: int) -> DataError:
    for parity, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if isinstance(line, bytes) and line[parity::2].count(0) > len(line) / 4:
            return EncodingError(path, f"not UTF-8, it looks like {encoding}", number, encoding)
    return DataError(path, "a NUL character; the file is damaged, or is no text", number)


def _sheet(path: Path) -> tuple[list[str], list[str]]:
    """The rows of a workbook's first sheet as lines of CSV, and the names of all sheets."""
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(path, "no such file") from error
    return _read_sheet(path, state.st_mtime_ns, state.st_size)


# A file is read several times, and unpacking a workbook takes seconds.
@lru_cache(maxsize=3)
def _read_sheet(path: Path, *_: int) -> tuple[list[str], list[str]]:
    import pandas as pd

    try:
        with pd.ExcelFile(path, engine="openpyxl") as book:
            sheets = [str(name) for name in book.sheet_names]
            rows = book.parse(0, header=None, dtype=object, keep_default_na=False).itertuples(index=False)
    except ImportError as error:
        raise DataError(path, "a workbook is read by openpyxl: pip install openpyxl; or save it as CSV") from error
    except Exception as error:
        # The library raises a dozen unrelated types for a file that is none.
        reason = " ".join(str(error).split())
        raise DataError(path, f"not a workbook ({type(error).__name__}: {reason}); save it as CSV") from error
    lines = []
    for number, row in enumerate(rows, start=1):
        line = io.StringIO()
        values = [cell(path, number, "a cell", value) for value in row]
        csv.writer(line, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(values)
        lines.append(line.getvalue())
    if not lines:
        raise DataError(path, "the file is empty")
    return lines, sheets
