"""Failures of the Hub, explained in one line."""

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from sapiens_accel.errors import UserError


def explain(error: BaseException, repo: str) -> str:
    """Why a request to the Hub failed, in one line, and how to fix it."""
    url, status = f"{HfApi().endpoint}/{repo}", status_of(error)
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: accept its terms at {url}, then log in with `hf auth login`"
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token for the Hub; log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if status == 401:
        return "the Hub does not know the token; log in with `hf auth login` or correct HF_TOKEN"
    if status == 403:
        return f"the token may not do this to {repo}; it needs write access to push and read access to download"
    reason = " ".join(str(getattr(error, "server_message", None) or error).split())[:200] or type(error).__name__
    if isinstance(error, OSError) and error.errno is not None:
        return reason  # a full disk, a folder without write permission
    if status:
        return f"the Hub answered {status}: {reason}"
    if _is_network_error(error):
        return f"the Hub could not be reached ({reason})"
    return f"{type(error).__name__}: {reason}"


def is_final(error: BaseException) -> bool:
    """Whether a retry would fail again."""
    status = status_of(error)
    if status is not None:
        return status < 500 and status not in (408, 409, 412, 425, 429)
    local = isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError)
    return local or isinstance(error, UserError | ValueError | LocalTokenNotFoundError | OfflineModeIsEnabled)


def _is_network_error(error: BaseException | None) -> bool:
    while error is not None:
        # The client raises errors of httpx or httpx2, which have no common base class with Python's.
        if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith("httpx"):
            return True
        error = error.__cause__
    return False


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status of an error, or of the error that caused it."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code
        error = error.__cause__
    return None


def hide_token(text: str) -> str:
    """Replace the user's token by ***: the answer of a server may repeat it."""
    token = get_token()
    return text.replace(token, "***") if token else text
