"""What goes wrong between here and the Hugging Face Hub, as one sentence with the fix.

Nothing of the original message is repeated: it may hold a signed address, or a header with a token.
Errors are told by the names of their classes, along the chain of causes: libraries wrap what
huggingface_hub and httpx raise, and neither is imported before it was needed.
"""

from collections.abc import Iterator
from urllib.parse import urlsplit


def explain(error: BaseException, what: str, *, page: str, revision: str = "") -> str | None:
    """Why ``what`` (a repository, or a file of it) can't be had, and what to do.

    ``page`` is the repository's address. ``None``: the error is not one of the Hub's or of the way
    there.
    """
    chain = list(_chain(error))
    kinds = {kind.__name__ for each in chain for kind in type(each).__mro__}
    said = " ".join(str(each) for each in chain)
    site = site_of(page)
    status = next((s for each in chain if (s := _status(each)) is not None), None)
    if "OfflineModeIsEnabled" in kinds or "OfflineModeIsEnabled" in said:
        return f"{what} is not here yet and HF_HUB_OFFLINE is set; unset it once to download it"
    if "GatedRepoError" in kinds or "is a gated dataset" in said:
        return (
            f"{what} is gated; accept its terms on {page} while logged in, create a token with "
            "read access (https://huggingface.co/settings/tokens), and set it in the environment "
            "as HF_TOKEN"
        )
    if "DisabledRepoError" in kinds:
        return f"{what} has been disabled by the Hub; choose another source (see {page})"
    if "RevisionNotFoundError" in kinds or "Revision '" in said:
        named = f"revision {revision}" if revision else "such revision"
        return f"{what} has no {named} (any more); choose one that {page}/commits/main lists"
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return (
            f"{what} was not found, or needs a token; check its name ({page}), or set HF_TOKEN to "
            "a token that may read it"
        )
    if "RemoteEntryNotFoundError" in kinds:
        return f"{what}: {page} lists a file that can't be downloaded; choose another revision"
    if status in (401, 403):
        return (
            f"{site} refuses the token for {what} (HTTP {status}); set HF_TOKEN to a valid token "
            f"that may read {page}, or unset it if the repository is public"
        )
    if status == 429:
        return too_often(site, next((w for each in chain if (w := _retry_after(each))), ""))
    if status is not None:
        return f"{what} can't be downloaded now ({site} answers HTTP {status}); try again later"
    if "HFValidationError" in kinds:
        return f"{what} is not a repository's name; write owner/name"
    if "UnicodeEncodeError" in kinds:
        return "HF_TOKEN holds characters that no token has; set it again"
    if kinds & {"TimeoutException", "TimeoutError"}:
        return (
            f"{site} did not answer in time for {what}; check the network, or allow more seconds "
            "with HF_HUB_DOWNLOAD_TIMEOUT"
        )
    if kinds & {"UnsupportedProtocol", "InvalidURL"}:
        return f"HF_ENDPOINT is not an address; write it as https://host, not {site}"
    if kinds & {"RequestError", "HTTPError", "ConnectionError"}:
        return (
            f"{what} can't be downloaded, since {site} can't be reached or does not answer; check "
            "the network, the proxy and HF_ENDPOINT"
        )
    return None


def too_often(site: str, seconds: str) -> str:
    """What to do about HTTP 429; ``seconds`` is the server's word on when, if it has one."""
    wait = f"wait {seconds} seconds" if seconds.isdigit() else "wait a few minutes"
    return (
        f"{site} says that this address has asked too often (HTTP 429); {wait} and run the same "
        "command again, or set HF_TOKEN"
    )


def _retry_after(error: BaseException) -> str:
    headers = error.response.headers if _status(error) else {}  # type: ignore[attr-defined]
    return str(headers.get("Retry-After", ""))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status of huggingface_hub's error, or None."""
    if not any(kind.__name__ == "HfHubHTTPError" for kind in type(error).__mro__):
        return None
    return int(error.response.status_code)  # type: ignore[attr-defined]


def site_of(address: str) -> str:
    """Scheme and host of an address, without a user or password that it may hold."""
    parts = urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}" if parts.scheme and host else address.rpartition("@")[2]
