"""What a client gets that is not served: a status, and one line in the form that OpenAI's clients read."""

import logging
import math
from typing import Any

from starlette.responses import JSONResponse

from latentmem.errors import EngineError, LatentMemError
from latentmem.serving.asks import Refused

logger = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def refusal_of(error: BaseException) -> Refused:
    """Return how a failure is told to the client; what is no fault of theirs and no state of the engine is logged."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, EngineError):
        return Refused(503, str(error), retry_after=1.0)
    if isinstance(error, LatentMemError):
        return Refused(400, str(error))
    logger.error("a request failed", exc_info=error)
    return Refused(500, f"the server failed ({type(error).__name__}); its log tells more")


def error_of(refused: Refused) -> dict[str, Any]:
    """Return the object `error`."""
    kind = _TYPES.get(refused.status, "invalid_request_error" if refused.status < 500 else "server_error")
    return {"message": str(refused), "type": kind, "param": refused.field, "code": refused.code}


def refuse(refused: Refused) -> JSONResponse:
    """Return the response that refuses a request."""
    headers = {} if refused.retry_after is None else {"Retry-After": str(max(1, math.ceil(refused.retry_after)))}
    return JSONResponse({"error": error_of(refused)}, refused.status, headers)
