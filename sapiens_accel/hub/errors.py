"""Why the Hub did not do what it was asked to, in words."""

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from sapiens_accel.errors import UserError


def why(error: BaseException, repo: str) -> str:
    """Why the Hub did not do what it was asked to, in one line."""
    url, status = f"{HfApi().endpoint}/{repo}", status_of(error)
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: accept its terms at {url}, then log in with `hf auth login`"
    if isinstance(error, LocalTokenNotFoundError):
        return "no token of the Hub is here; log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if status == 401:
        return "the Hub does not know the token; log in with `hf auth login` or correct HF_TOKEN"
    if status == 403:
        return f"the token may not do this to {repo}; it needs write access to push and read access to download"
    said = " ".join(str(getattr(error, "server_message", None) or error).split())[:200] or type(error).__name__
    if isinstance(error, OSError) and error.errno is not None:
        return said  # a full disk, a folder that may not be written
    if status:
        return f"the Hub answered {status}: {said}"
    return f"the Hub could not be reached ({said})" if _is_of_network(error) else f"{type(error).__name__}: {said}"


def is_final(error: BaseException) -> bool:
    """Whether to try again is of no use."""
    status = status_of(error)
    if status is not None:
        return status < 500 and status not in (408, 409, 412, 425, 429)
    local = isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError)
    return local or isinstance(error, UserError | ValueError | LocalTokenNotFoundError | OfflineModeIsEnabled)


def _is_of_network(error: BaseException | None) -> bool:
    while error is not None:
        # The client's errors are of httpx, of whichever version; they share no base with Python's.
        if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith("httpx"):
            return True
        error = error.__cause__
    return False


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, also one that the client wrapped into another."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code
        error = error.__cause__
    return None


def without_token(text: str) -> str:
    """A text that may be shown: a server's answer may repeat what it was sent."""
    token = get_token()
    return text.replace(token, "***") if token else text
