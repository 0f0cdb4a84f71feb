"""What botocore raises, as errors that say what to do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from pipeline.core.errors import AccessError, NotFoundError, PipelineError, TransientError

CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)"

# Amazon S3 API Reference, "Error responses".
_KNOWN: tuple[tuple[set[str], type[PipelineError], str], ...] = (
    (
        {"RequestTimeTooSkewed"},
        AccessError,
        "this machine's clock is wrong: set it, for example with NTP",
    ),
    (
        {"ExpiredToken", "TokenRefreshRequired", "InvalidToken", "RequestExpired"},
        AccessError,
        "the credentials have expired: log in again",
    ),
    (
        {"InvalidAccessKeyId", "SignatureDoesNotMatch", "NotSignedUp"},
        AccessError,
        f"check {CREDENTIALS}",
    ),
    (
        {
            "PermanentRedirect",
            "AuthorizationHeaderMalformed",
            "IllegalLocationConstraintException",
        },
        PipelineError,
        "set AWS_REGION to the region of the bucket",
    ),
)
_BUSY = {
    "SlowDown",
    "ServiceUnavailable",
    "InternalError",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "OperationAborted",
    "BadDigest",  # the bytes were damaged on their way
    "IncompleteBody",
    "XAmzContentSHA256Mismatch",
}
_MISSING = {"NoSuchKey", "NoSuchVersion", "NoSuchUpload", "404"}


def code_of(error: Exception) -> str:
    """The code of a botocore `ClientError`, such as `NoSuchKey`."""
    response: Any = getattr(error, "response", {})
    return str(response.get("Error", {}).get("Code", ""))


def status_of(error: Exception) -> int:
    """Its HTTP status; 0 if it has none."""
    response: Any = getattr(error, "response", {})
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def missing(error: Exception) -> bool:
    """Whether the object, not the bucket, is not there; a HEAD tells its status only."""
    return code_of(error) in _MISSING or (status_of(error) == 404 and not code_of(error))


def taken(error: Exception) -> bool:
    """Whether a condition (`If-Match`, `If-None-Match`) did not hold."""
    return status_of(error) == 412 or code_of(error) == "PreconditionFailed"


def raced(error: Exception) -> bool:
    """Whether another writer was at the same key in the same moment; do it again."""
    return status_of(error) == 409 and code_of(error) in {"", "409", "ConditionalRequestConflict"}


@contextlib.contextmanager
def s3_errors(doing: str, bucket: str) -> Iterator[None]:
    """Turn an exception of botocore into one of ours; `doing` says what, for the message.

    Raises:
        AccessError: No credentials, wrong ones, or not enough of them.
        NotFoundError: No such bucket or object.
        TransientError: The server is busy or cannot be reached; botocore tried several times.
        PipelineError: Anything else that a server says.
    """
    from botocore import exceptions as botocore
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    fault = f"cannot {doing}"
    try:
        yield
    except botocore.ClientError as error:
        raise _explained(error, fault, bucket) from error
    except (
        botocore.NoCredentialsError,
        botocore.PartialCredentialsError,
        botocore.CredentialRetrievalError,
        botocore.TokenRetrievalError,
        botocore.MetadataRetrievalError,
        botocore.SSOError,
        botocore.ProfileNotFound,
        botocore.ConfigNotFound,
        botocore.ConfigParseError,
    ) as error:
        raise AccessError(
            f"{fault}: there are no credentials ({_short(error)}); log in, or set {CREDENTIALS}"
        ) from error
    except botocore.SSLError as error:
        raise PipelineError(
            f"{fault}: the server's certificate is not trusted ({_short(error)}); name the file of "
            "your authority in AWS_CA_BUNDLE"
        ) from error
    except (
        botocore.ConnectionError,
        botocore.HTTPClientError,
        botocore.IncompleteReadError,
        HTTPError,
        ConnectionError,
        TimeoutError,
    ) as error:
        raise TransientError(
            f"{fault}: {_short(error)}; check the endpoint and the network, and try again"
        ) from error
    except ResponseParserError as error:
        raise PipelineError(
            f"{fault}: what answers is no S3 server; check the endpoint, and whether the network "
            "wants you to log in"
        ) from error
    except botocore.BotoCoreError as error:
        raise PipelineError(
            f"{fault}: {_short(error)}; check the URL, the region and the endpoint"
        ) from error


def _explained(error: Exception, fault: str, bucket: str) -> PipelineError:
    code, status = code_of(error), status_of(error)
    message = f"{fault}: {_short(error)}"
    if code == "NoSuchBucket":
        return NotFoundError(f"{fault}: there is no bucket {bucket}; check the URL and endpoint")
    for codes, kind, advice in _KNOWN:
        if code in codes:
            return kind(f"{message}; {advice}")
    if status in {401, 403}:
        return AccessError(
            f"{message}; ask for permission on bucket {bucket}, or use other credentials: "
            f"{CREDENTIALS}"
        )
    if code in _BUSY or status == 429 or status >= 500:
        return TransientError(f"{message}; try again later")
    if status == 404 or missing(error):
        return NotFoundError(f"{message}; check the reference")
    if taken(error) or raced(error):
        return TransientError(f"{message}; another writer was there: run the same command again")
    return PipelineError(f"{message}; check that the endpoint speaks S3")


def _short(error: BaseException) -> str:
    """The reply of the server, fit for one line of a terminal."""
    return re.sub(r"[^\x20-\x7e]+", " ", str(error) or type(error).__name__)[:300]
