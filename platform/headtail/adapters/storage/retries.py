"""When a call to S3 is repeated, and the error when it is not.

In: how a call ended (HTTP status, S3's code, an exception) and for how long it was tried. Out: seconds to wait, or a
StorageError with the cure. Nothing here writes: the caller knows whether a repetition is safe.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from headtail.core.errors import StorageError

PATIENCE_S = 60.0  # how long one call is made again, counted from its first attempt
STRANGER_PATIENCE_S = 10.0  # the same, at an endpoint that never answered this process: more likely a wrong address
FIRST_DELAY_S, LONGEST_DELAY_S = 0.1, 5.0
TIMEOUT_S = 30.0  # until a connection stands, and of silence on one
ATTEMPTS = 8  # of Arrow's own reader, which counts instead of measuring time

_LATER = (408, 409, 429, 500, 502, 503, 504)  # 501 and 505 stay as they are
_LATER_CODES = ("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "IncompleteBody")

_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), AWS_PROFILE, or give the machine a role"
PERMISSIONS = (
    "allow s3:GetObject, s3:PutObject, s3:DeleteObject and s3:AbortMultipartUpload below the root and s3:ListBucket on the bucket "
    "(without the last, S3 says 403 for an object that is not there); a session may also have expired"
)
_REGION = "set AWS_DEFAULT_REGION to the bucket's region"
_CHECKSUMS = (
    "if this store does not take boto3's newer checksums: set AWS_REQUEST_CHECKSUM_CALCULATION=when_required and "
    "AWS_RESPONSE_CHECKSUM_VALIDATION=when_required; if it asks for them: when_supported"
)
_ENDPOINT = "check AWS_ENDPOINT_URL, its port and the network; then run again: what is finished is kept"
_FIXES = {
    code: fix
    for fix, codes in {
        "create the bucket, or correct its name in --root": "NoSuchBucket",
        PERMISSIONS: "AccessDenied AllAccessDisabled Forbidden 403",
        _CREDENTIALS: "InvalidAccessKeyId SignatureDoesNotMatch ExpiredToken InvalidToken TokenRefreshRequired 401",
        _REGION: "PermanentRedirect AuthorizationHeaderMalformed IllegalLocationConstraintException 301",
        _CHECKSUMS: "NotImplemented InvalidArgument InvalidRequest XAmzContentSHA256Mismatch MissingContentLength 501",
        f"{_REGION}; renew an expired session; {_CHECKSUMS}": "400 BadRequest",  # an answer to HEAD has no words
        "set this machine's clock": "RequestTimeTooSkewed",
    }.items()
    for code in codes.split()
}


class Patience:
    """How long one thing has been tried, and how long to wait before it is tried again."""

    def __init__(self) -> None:
        self.began, self.tries = time.monotonic(), 0

    def delay(self, limit: float) -> float | None:
        """Seconds to wait, doubled each time and scattered; None when `limit` seconds have passed."""
        if time.monotonic() - self.began >= limit:
            return None
        longest = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0**self.tries)
        self.tries += 1
        return longest * random.uniform(0.5, 1.0)

    def wait(self, error: BaseException) -> None:
        """Wait before the next try; raises `error` when there is to be none."""
        delay = self.delay(PATIENCE_S)
        if delay is None:
            raise error
        time.sleep(delay)


def transient(code: int, name: str, error: BaseException | None) -> bool:
    """Whether a call that ended so may end otherwise when it is made again. `code`: HTTP status; `name`: S3's word."""
    from botocore.exceptions import ConnectionError as NoConnection
    from botocore.exceptions import HTTPClientError, SSLError

    if error is not None:
        return isinstance(error, NoConnection | HTTPClientError) and not isinstance(error, SSLError)
    return code in _LATER or name in _LATER_CODES


def retry_handler() -> Callable[..., float | None]:
    """What boto asks after each attempt (its event `needs-retry`): seconds to wait before the next, None for no other.

    A conditional put that met 409 is not repeated here: its caller looks first.
    """
    answered = False

    def needs_retry(
        response: Any = None, caught_exception: BaseException | None = None, request_dict: Any = None, **_: Any
    ) -> float | None:
        nonlocal answered
        code, name = 0, ""
        if response is not None:
            answered = True
            code, name = response[0].status_code, response[1].get("Error", {}).get("Code", "")
        patience = request_dict["context"].setdefault("headtail", Patience())
        conditional = "If-None-Match" in request_dict["headers"]
        if (code == 409 and conditional) or not transient(code, name, caught_exception):
            return None
        delay: float | None = patience.delay(PATIENCE_S if answered else STRANGER_PATIENCE_S)
        return delay

    return needs_retry


def broken_read_errors() -> tuple[type[Exception], ...]:
    """What is raised when an answer ends before its end."""
    from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

    return IncompleteReadError, ReadTimeoutError, ResponseStreamingError


def http_status(error: Any) -> int:
    """The HTTP status of boto's ClientError."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def refusal(action: str, where: str, error: BaseException) -> StorageError:
    """A call's last error for people, with the cure."""
    from botocore import exceptions as boto

    if isinstance(error, boto.ClientError):
        code = error.response.get("Error", {}).get("Code", "")
        if code in ("404", "NoSuchKey"):
            return StorageError("not in the store", where=where)
        fix = _FIXES.get(code, _ENDPOINT if http_status(error) in _LATER else "check bucket, credentials and permissions")
        return StorageError(f"cannot {action}: {error}", where=where, fix=fix)
    keys = (
        boto.NoCredentialsError,
        boto.PartialCredentialsError,
        boto.CredentialRetrievalError,
        boto.ProfileNotFound,
        boto.TokenRetrievalError,
    )
    if isinstance(error, keys):
        fix = _CREDENTIALS
    elif isinstance(error, boto.NoRegionError):
        fix = _REGION
    elif isinstance(error, boto.ParamValidationError):
        fix = "check --root: s3://bucket/prefix, the bucket's name in lower-case letters, digits, dots and hyphens"
    else:
        fix = _ENDPOINT
    return StorageError(f"cannot {action}: {error}", where=where, fix=fix)
