"""Reads what examples are made of, a corpus or records, and says what is wrong with it."""

from __future__ import annotations

import logging

from sdtp.errors import UserError
from sdtp.pipeline.block import Source
from sdtp.pipeline.corpus import Corpus, read_corpus
from sdtp.pipeline.records import Records, read_records

logger = logging.getLogger(__name__)


def read_source(source: Source, key: str, malformed: str) -> Corpus | Records:
    """The content of a source of examples.

    Args:
        source: where it is.
        key: its key of the configuration, for messages.
        malformed: what becomes of malformed rows, see `read_records`.

    Raises:
        UserError: it is missing, malformed, empty, or not what its pinned sha256 says.
    """
    content = read_corpus(source.ref) if source.kind == "package" else read_records(source, key, malformed)
    if isinstance(content, Records) and not content.total:
        raise UserError(f"{key}.ref: {source.ref} has no rows; at least one is needed")
    if source.sha256 is None or source.sha256 == content.sha256:
        return content
    if content.sha256 is None:
        raise UserError(f"{key}.sha256: {source.sha256} cannot be checked for a hub source; pin its revision instead")
    raise UserError(f"{key}.sha256: expected {source.sha256}, found {content.sha256} for {source.ref}")


def read_and_tell(source: Source, key: str, malformed: str) -> Corpus | Records:
    """As `read_source`, with warnings of the rows that were left out or repaired."""
    content = read_source(source, key, malformed)
    if isinstance(content, Records):
        for what, tally in (("left out", content.skipped), ("repaired", content.repaired)):
            for reason, places in tally.first.items():
                count = f"{tally.counts[reason]} of {content.total} rows {what}, {reason}"
                more = "; ..." if tally.counts[reason] > len(places) else ""
                logger.warning("%s: %s: %s%s", key, count, "; ".join(places), more)
    return content
