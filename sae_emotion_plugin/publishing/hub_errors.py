"""What goes wrong with the Hugging Face Hub, as one line that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from sae_emotion_plugin.messages import first_line

_BY_STATUS = {
    400: "the Hub refused it: {detail}",
    401: "not logged in, or the token is not valid: `hf auth login`, or set HF_TOKEN",
    403: "the token may not do that: it needs write permission for this repository ({detail})",
    404: "no such repository or revision, or the token may not see it",
    409: "the repository changed or came to be meanwhile: run the same command again",
    412: "the repository changed meanwhile: run the same command again",
    413: "the Hub finds it too large ({detail})",
    429: "too many requests: wait some minutes and run the same command again",
}
_NETWORK_MODULES = ("httpx", "httpcore", "requests", "urllib3")


@contextmanager
def hub_errors(doing: str, after: str = "") -> Iterator[None]:
    """Turns what `huggingface_hub` raises inside into ValueError: `doing`, why it failed, and `after`."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise ValueError(f"{doing} failed: {reason}{after}") from error
    except Exception as error:
        # Which classes stand for a lost connection depends on the HTTP library of the installed version.
        if not _is_network(error):
            raise
        raise ValueError(f"{doing} failed: {_lost(error)}{after}") from error


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an error or what caused it; None when there was no answer."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return None


def _reason(error: BaseException) -> str | None:
    status = status_of(error)
    if status is not None and status >= 400:
        detail = first_line(error.__cause__ if isinstance(error.__cause__, OSError) else error)[:160]
        if status >= 500:
            return f"the Hub answered {status}: run the same command again later"
        return f"{_BY_STATUS.get(status, 'the Hub answered {detail}').format(detail=detail)} [{status}]"
    current: BaseException | None = error
    while current is not None:
        if _is_network(current):
            return _lost(current)
        current = current.__cause__ or current.__context__
    if type(error).__module__.startswith("huggingface_hub"):
        return first_line(error)[:200]
    if isinstance(error, ValueError) and type(error).__name__ == "JSONDecodeError":
        return "the Hub's answer is not JSON: run the same command again later"
    return None


def _is_network(error: BaseException) -> bool:
    return type(error).__module__.startswith(_NETWORK_MODULES) or isinstance(error, ConnectionError | TimeoutError)


def _lost(error: BaseException) -> str:
    return f"the connection was lost ({first_line(error)[:120]}): run the same command again"
