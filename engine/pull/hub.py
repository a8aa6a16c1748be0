"""A hub, through huggingface_hub: what a repository holds, and a file's bytes from any offset.

It owns the translation of what huggingface_hub and its HTTP client raise into this package's
errors, and never retries or writes a file. Invariant: what it raises is a PullError that names the
repository and says what to do; those worth trying again are HubUnavailable and nothing else.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from engine.errors import HubNotFound, HubRefused, HubUnavailable, PullError
from engine.link.pull import RemoteFile

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
TOKEN_BYTES_MAX = 4096
RETRY_AFTER_S_MAX = 300.0
# Answers that another try may change: too early, too many, and the hub's own troubles.
PASSING = {408, 425, 429, 500, 502, 503, 504}

_COMMIT = re.compile(r"[0-9a-f]{40}")


def read_token(path: str) -> str | None:
    """The token in a file; None without one. Raises HubRefused, never showing the content."""
    if not path:
        return None
    try:
        with Path(path).open("rb") as file:
            content = file.read(TOKEN_BYTES_MAX + 1)
        token = content.decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise HubRefused(
            f"the token file {path} cannot be read by hotbayd ({why}): give a file of this host "
            "that holds one token",
            token_file=path,
        ) from None
    if len(content) > TOKEN_BYTES_MAX or not re.fullmatch(r"[!-~]+", token):
        raise HubRefused(f"the token file {path} does not hold one token", token_file=path)
    return token


class Hub:
    """One repository of one hub, as one token sees it. Safe to use from several threads."""

    def __init__(self, endpoint: str, repository: str, token: str | None) -> None:
        self.endpoint = endpoint
        self.repository = repository
        self._token = token
        self._headers = build_hf_headers(token=token, library_name="hotbay")

    def list(self, revision: str) -> tuple[str, list[RemoteFile]]:
        """The commit that `revision` (empty: the default branch) is now, and its files."""
        with self._translated(revision), _understood(self.endpoint):
            found = HfApi(self.endpoint, token=self._token).model_info(
                self.repository,
                revision=revision or None,
                files_metadata=True,
                timeout=READ_TIMEOUT_S,
            )
        if found.sha is None or not _COMMIT.fullmatch(found.sha):
            raise PullError(
                f"{self.endpoint} does not say which commit of {self.repository} it means: is it "
                "a Hugging Face hub?",
                endpoint=self.endpoint,
            )
        files = []
        for each in found.siblings or ():
            hashed = each.lfs.sha256 if each.lfs is not None else ""
            size = -1 if each.size is None else each.size
            files.append(RemoteFile(each.rfilename, size, hashed, each.blob_id or ""))
        return found.sha, files

    @contextlib.contextmanager
    def open(self, commit: str, name: str, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """A file's bytes from where they begin: `offset`, or 0 if the hub would not go on there."""
        url = hf_hub_url(self.repository, name, revision=commit, endpoint=self.endpoint)
        # Encoded bodies cannot be resumed, and weights do not compress.
        headers = {**self._headers, "accept-encoding": "identity"}
        # In pieces as they come: gathered ones would lose what came before a break.
        if offset:
            headers["range"] = f"bytes={offset}-"
        timeout = httpx2.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        with (
            self._translated(commit, name),
            get_session().stream("GET", url, headers=headers, timeout=timeout) as response,
        ):
            hf_raise_for_status(response)
            start = 0
            if response.status_code == httpx2.codes.PARTIAL_CONTENT:
                told = response.headers.get("content-range", "")
                start = offset if told.startswith(f"bytes {offset}-") else -1
            if start < 0:
                raise HubUnavailable(
                    f"{self.endpoint} answers with another part of {name} than was asked for",
                    endpoint=self.endpoint,
                )
            yield start, response.iter_bytes()

    @contextlib.contextmanager
    def _translated(self, revision: str, name: str = "") -> Iterator[None]:
        shown = revision[:12] if _COMMIT.fullmatch(revision) else revision
        what = f"{self.repository}@{shown}" if revision else self.repository
        figures = {"repository": self.repository, "endpoint": self.endpoint}
        try:
            yield
        except GatedRepoError as error:
            raise HubRefused(
                f"{what} is gated: accept its terms on {self.endpoint}/{self.repository} and give "
                "a token of that account with --token-file (or [models] token_file)",
                **figures,
            ) from error
        except RepositoryNotFoundError as error:
            raise HubNotFound(
                f"{self.endpoint} shows no repository {self.repository}: check its name; if it is "
                "private, give a token with --token-file (or [models] token_file)",
                **figures,
            ) from error
        except RevisionNotFoundError as error:
            raise HubNotFound(
                f"{self.repository} has no revision {revision!r}: name a branch, tag or commit",
                **figures,
            ) from error
        except EntryNotFoundError as error:
            raise HubNotFound(f"{what} has no file {name}", **figures) from error
        except (HfHubHTTPError, DisabledRepoError) as error:
            raise self._refusal(error, f"{name} of {what}" if name else what) from error
        except OfflineModeIsEnabled as error:
            raise HubRefused(
                f"{what} is not fetched, because HF_HUB_OFFLINE is set: unset it and restart "
                "hotbayd",
                **figures,
            ) from error
        except httpx2.InvalidURL as error:
            raise HubRefused(f"{self.endpoint} is no hub's address: {error}", **figures) from error
        except (httpx2.TransportError, httpx2.StreamError, ValueError) as error:
            raise HubUnavailable(
                f"{self.endpoint} cannot be reached or broke off for {what}: "
                f"{str(error) or type(error).__name__}",
                **figures,
            ) from error

    def _refusal(self, error: HfHubHTTPError, what: str) -> PullError:
        status = error.response.status_code
        figures = {
            "repository": self.repository, "endpoint": self.endpoint, "status": str(status),
        }  # fmt: skip
        if status in PASSING:
            unavailable = HubUnavailable(
                f"{self.endpoint} answers {status} for {what}: try again later", **figures
            )
            unavailable.retry_after_s = _retry_after_s(error.response)
            return unavailable
        if status in (401, 403):
            return HubRefused(
                f"{self.endpoint} refuses {what} ({status}): give a token that may read it with "
                "--token-file (or [models] token_file)",
                **figures,
            )
        if status == httpx2.codes.NOT_FOUND:
            return HubNotFound(f"{self.endpoint} has no {what}: check its name", **figures)
        return PullError(f"{self.endpoint} answers {status} for {what}", **figures)


@contextlib.contextmanager
def _understood(endpoint: str) -> Iterator[None]:
    """An answer that is no hub's is said to be that."""
    try:
        yield
    except (TypeError, KeyError, AttributeError) as error:
        raise PullError(
            f"{endpoint} answers as no Hugging Face hub does: check [models] hub_endpoint",
            endpoint=endpoint,
        ) from error


def _retry_after_s(response: httpx2.Response) -> float:
    """How long the hub asks to be left alone; 0 where it does not say."""
    told = response.headers.get("retry-after", "")
    return min(float(told), RETRY_AFTER_S_MAX) if told.isdecimal() else 0.0
