"""The stored form of a trajectory: compressed canonical JSON, checked to read back as the same trajectory."""

import zlib

from latentmem.errors import DataError
from latentmem.trajectory import Trajectory

MAX_BYTES = 1 << 30
"""Of one trajectory's JSON; a few kilobytes may claim to be more."""


def canonical(trajectory: Trajectory) -> bytes:
    """Its JSON in UTF-8, which reads back as the same; what could not is refused here.

    Raises:
        DataError: there is a lone surrogate, or the task's data hold nan or infinity or are nested too deeply.
    """
    where = f"trajectory {trajectory.id}"
    try:
        json = trajectory.to_json().encode("utf-8")
    except UnicodeEncodeError as error:
        around = ascii(error.object[max(0, error.start - 30) : error.end])
        raise DataError(f"{where}: ends in a lone surrogate here: {around}; replace it by valid Unicode") from None
    except ValueError as error:
        raise DataError(f"{where}: cannot be written as JSON ({error}); mend its data") from None
    if Trajectory.from_json(json, where).to_json().encode("utf-8") != json:
        raise DataError(f"{where}: would not be the same when read back; mend its data")
    return json


def encode(trajectory: Trajectory) -> bytes:
    """The stored form: compressed canonical JSON.

    Raises:
        DataError: as `canonical`.
    """
    return zlib.compress(canonical(trajectory))


def decompress(compressed: bytes, where: str) -> bytes:
    """Return the canonical JSON of a stored form.

    Raises:
        DataError: the stored form is damaged.
    """
    unpacking = zlib.decompressobj()
    try:
        json = unpacking.decompress(compressed, MAX_BYTES)
    except (zlib.error, TypeError) as error:
        raise DataError(f"{where}: damaged ({error}); restore the bank from an export") from None
    if not unpacking.eof or unpacking.unused_data:
        raise DataError(f"{where}: damaged (cut off, or over {MAX_BYTES:,} bytes); restore the bank from an export")
    return json


def decode(compressed: bytes, where: str) -> Trajectory:
    """Return the trajectory of a stored form.

    Raises:
        DataError: the stored form is damaged, or was written by a newer version.
    """
    return Trajectory.from_json(decompress(compressed, where), where)
