"""(prompt, response) records from the rows of a source: what can be used, and what was left out and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from sdtp.errors import UserError
from sdtp.pipeline.block import Source
from sdtp.pipeline.rows import INSTRUCTION_FIELDS, PAIR_FIELDS, Row, read_rows

# Why a row can be left out.
SKIPPED = ("not_utf8", "duplicate_id", "empty_prompt", "empty_response", "duplicate")
# What a row is read without, whatever `data.malformed` says: nobody wrote it, programs that saved the file did.
REPAIRED = ("byte_order_mark", "crlf")
_BYTE_ORDER_MARK = "\ufeff"
# How many places of a kind are named.
_NAMED = 5


@dataclass(frozen=True)
class Record:
    """One usable row; `where` names its file and line, for messages and for the dataset's `source` column."""

    id: str
    prompt: str
    response: str
    where: str


@dataclass
class Tally:
    """How often each of several things was found, and where first.

    Attributes:
        counts: by reason, how many rows.
        first: by reason, the first few of them, as "<file>, line <number>: <what is wrong>".
    """

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Count one row."""
        self.counts[reason] += 1
        places = self.first.setdefault(reason, [])
        if len(places) < _NAMED:
            places.append(place)


@dataclass(frozen=True)
class Records:
    """All usable rows of a source in its order, with what was left out and what identifies the source's content.

    `total` counts all rows: the usable ones and those in `skipped`. `repaired` are usable, or skipped for something
    else.
    """

    records: tuple[Record, ...]
    total: int
    skipped: Tally
    repaired: Tally
    revision: str | None
    sha256: str | None


def read_records(source: Source, key: str, malformed: str) -> Records:
    """Reads and checks every row of a `jsonl`, `local` or `hub` source.

    Rows have the fields instruction, context, response (the prompt is then the context, a blank line and the
    instruction; a blank context is left out), or prompt, response; and optionally an `id`, unique in the source. A byte
    order mark before a line or a text, and CRLF for a line's end, are read as if they were not there.

    What no training can use is left out or is an error, as `malformed` says: a row that is `not_utf8` (a wrong byte, or
    half of a surrogate pair written as an escape), a `duplicate_id` (the first row keeps it), an `empty_prompt` or
    `empty_response`, a `duplicate` (same prompt and response as an earlier row, which would otherwise stand in two
    splits).

    What says that the file is not what it is taken for is always an error, for then rows would be missing or misread
    unseen: a line that is not a whole JSON object, a missing or null field, a field that is not text, an id that is
    neither text nor a number.

    Args:
        source: where the rows are.
        key: the config key of `source`, for messages.
        malformed: `skip` or `fail`.

    Raises:
        UserError: no such source; what is always an error; with `fail` the first row that `skip` would leave out. Each
            with file and line.
    """
    content = read_rows(source, key)
    records: list[Record] = []
    skipped, repaired = Tally(), Tally()
    seen = _Seen()
    total = 0
    for total, row in enumerate(content.rows, 1):
        try:
            record = _record(row, total, repaired)
            seen.check(record)
        except _MalformedRowError as fault:
            place = f"{row.where}: {fault}"
            if malformed == "fail":
                raise UserError(f"{place}; data.malformed skip leaves such rows out") from None
            skipped.add(fault.reason, place)
        else:
            records.append(record)
    return Records(tuple(records), total, skipped, repaired, content.revision, content.sha256)


class _MalformedRowError(Exception):
    """A row that is none to learn from; the message says why, `reason` is one of `SKIPPED`."""

    def __init__(self, reason: str, explanation: str) -> None:
        super().__init__(explanation)
        self.reason = reason


class _Seen:
    """What rows before had: an id or a text used again is malformed."""

    def __init__(self) -> None:
        self._ids: dict[str, str] = {}
        self._texts: dict[tuple[str, str], str] = {}

    def check(self, record: Record) -> None:
        """Raises _MalformedRowError for a repetition, or nothing in prompt or response: its id counts all the same."""
        first = self._ids.setdefault(record.id, record.where)
        if first != record.where:
            raise _MalformedRowError("duplicate_id", f"id {record.id!r} is used at {first} already; ids must be unique")
        if not record.prompt:
            raise _MalformedRowError("empty_prompt", "the prompt is empty")
        if not record.response:
            raise _MalformedRowError("empty_response", "the response is empty")
        first = self._texts.setdefault((record.prompt, record.response), record.where)
        if first != record.where:
            raise _MalformedRowError("duplicate", f"prompt and response are those of {first}")


def _record(row: Row, number: int, repaired: Tally) -> Record:
    if row.not_utf8:
        raise _MalformedRowError("not_utf8", row.not_utf8)
    identifier = _identifier(row, number)
    fields = INSTRUCTION_FIELDS if "instruction" in row.fields else PAIR_FIELDS
    texts = [_text(row, name, fields) for name in fields]
    if row.marked or any(text.startswith(_BYTE_ORDER_MARK) for text in texts):
        repaired.add("byte_order_mark", row.where)
    if row.crlf or any("\r\n" in text for text in texts):
        repaired.add("crlf", row.where)
    *prompt, response = map(_clean, texts)
    if fields == INSTRUCTION_FIELDS:
        instruction, context = prompt
        # The question stands last, as in the retrieval task: a causal model reads the context without knowing it.
        prompt = [context, instruction] if context and instruction else [instruction]
    return Record(identifier, "\n\n".join(prompt), response, row.where)


def _identifier(row: Row, number: int) -> str:
    if "id" not in row.fields:
        return f"{number:06d}"
    value = row.fields["id"]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UserError(f"{row.where}: field 'id' is {value!r}; a text or a whole number is needed")
    _check_encodes(str(value), "id")
    return str(value)


def _text(row: Row, name: str, fields: tuple[str, ...]) -> str:
    if name not in row.fields:
        raise UserError(f"{row.where}: field {name!r} is missing; a row needs {', '.join(fields)}")
    value = row.fields[name]
    if not isinstance(value, str):
        raise UserError(f"{row.where}: field {name!r} is {value!r}; text is needed (it may be blank)")
    _check_encodes(value, name)
    return value


def _check_encodes(value: str, name: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write what no text can hold
        where = f"character {error.start + 1} of field {name!r}"
        raise _MalformedRowError("not_utf8", f"{where} is half of a surrogate pair") from None


def _clean(text: str) -> str:
    return text.replace("\r\n", "\n").strip().removeprefix(_BYTE_ORDER_MARK).strip()
