"""The one exception that means "the user can fix this", and the sentences of common mistakes."""

import difflib
from collections.abc import Iterable, Iterator
from urllib.parse import urlsplit


class UserError(Exception):
    """A mistake in the input, the parameters or the machine.

    The message is one clear sentence or two: it names the file, row or key, and the fix. It is
    shown as it is, without a stack trace (see ``stages.core.command``).
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known name closest to ``name``, else the empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def of_the_hub(error: BaseException, what: str, *, page: str, revision: str = "") -> str | None:
    """Why ``what`` can't be reached on the Hugging Face Hub, and what to do, in one sentence.

    ``what`` is a repository, or a file of it, and ``page`` the repository's address. Libraries wrap
    what huggingface_hub and httpx raise, so the error's causes are looked at too. Nothing of their
    messages is repeated: they may hold a signed address or a header with a token. ``None``: it is
    not an error of the Hub or of the network.
    """
    import httpx
    from huggingface_hub import errors as hub

    chain, site = list(_chain(error)), site_of(page)

    def is_a(*kinds: type[BaseException], said: str = "") -> bool:
        """``said``: words of ``datasets``, which drops the causes of its own errors."""
        return any(isinstance(e, kinds) or (said and said in str(e)) for e in chain)

    answer = next((e.response for e in chain if isinstance(e, hub.HfHubHTTPError)), None)
    status = answer.status_code if answer is not None else None
    if is_a(hub.OfflineModeIsEnabled, said="OfflineModeIsEnabled"):
        return f"{what} is not here yet and HF_HUB_OFFLINE is set; unset it once to download it"
    if is_a(hub.GatedRepoError, said="is a gated dataset"):
        return (
            f"{what} is gated; accept its terms on {page} while logged in, create a token with "
            "read access (https://huggingface.co/settings/tokens), and set it in the environment "
            "as HF_TOKEN"
        )
    if is_a(hub.RevisionNotFoundError, said="doesn't exist for dataset"):
        wanted = f"revision {revision}" if revision else "such revision"
        return f"{what} has no {wanted} (any more); choose one that {page}/commits/main lists"
    if is_a(hub.RepositoryNotFoundError, said="doesn't exist on the Hub") or status in (401, 403):
        return (
            f"{what} was not found, or needs another token; check its name ({page}), or set "
            "HF_TOKEN to a token that may read it"
        )
    if status is not None:
        return (
            f"{what} can't be downloaded now ({site} answers HTTP {status}); wait a few minutes "
            "and run the same command again, or set HF_TOKEN if it is asked too often (429)"
        )
    if is_a(httpx.HTTPError, httpx.InvalidURL, ConnectionError, TimeoutError):
        return (
            f"{what} can't be downloaded, since {site} can't be reached or does not answer; check "
            "the network, the proxy and HF_ENDPOINT, or allow more seconds with "
            "HF_HUB_DOWNLOAD_TIMEOUT"
        )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def site_of(address: str) -> str:
    """Scheme and host of an address, without a user or password that it may hold."""
    parts = urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}" if parts.scheme and host else address.rpartition("@")[2]
