"""What a revision on the model hub is, and what the hub's client raises, said in one line that names the source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from sdtp.errors import UserError
from sdtp.pipeline.block import Source
from sdtp.pipeline.reading import reason


@contextmanager
def asking_hub(source: Source, key: str) -> Iterator[None]:
    """Turns what the hub, its client and its cache say of `source` into a UserError; `key` is the source's config key.

    Raises:
        UserError: no such repository or revision, no hub that answers, or, offline, nothing in the cache.
    """
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import httpx

    try:
        yield
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(f"{key}: no {source.ref!r} at revision {source.revision!r} on the hub") from error
    except (httpx.HTTPError, ConnectionError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"{key}: {source.ref!r} at revision {source.revision!r} cannot be had from the hub: {reason(error)}; "
            "needed is a hub that answers, or HF_HUB_OFFLINE=1 and, all of it in the cache, a commit for a revision"
        ) from error


def dataset_commit(source: Source) -> str:
    """The commit that a data set's revision is at, which results name, since a branch moves; a commit is not asked for.

    Raises what `asking_hub` takes.
    """
    from huggingface_hub import HfApi

    if source.revision is not None and re.fullmatch("[0-9a-f]{40}", source.revision):
        return source.revision
    return str(HfApi().dataset_info(source.ref, revision=source.revision).sha)
