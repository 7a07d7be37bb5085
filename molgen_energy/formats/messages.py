"""Files of msgpack maps, one after another, of which one entry is in memory at a time.

msgpack holds numbers, texts, lists and maps, and no code. Its lists and maps declare their length;
limits refuse those that no molecule has before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from molgen_energy.errors import InputError
from molgen_energy.formats.declaration import shown
from molgen_energy.formats.parts import check_part

_MOST_BYTES = 64 << 20  # of one entry
_MOST_ITEMS = 1_000_000  # of one list
_MOST_KEYS = 100_000  # of a map
_MOST_TEXT = 1 << 20  # bytes
_BLOCK = 1 << 20  # bytes


def iterate_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Key and value of each entry of all maps of a file.

    Raises
    ------
    InputError
        The package msgpack is missing; or the file cannot be read, is cut off or damaged, or an
        entry is beyond the limits.
    """
    try:
        import msgpack
    except ImportError as error:
        raise InputError(
            "msgpack is not installed: run `pip install 'molgen-energy[geom]'`"
        ) from error

    check_part(path)
    try:
        with path.open("rb") as file:
            unpacker = msgpack.Unpacker(
                file,
                read_size=_BLOCK,
                max_buffer_size=_MOST_BYTES,
                max_str_len=_MOST_TEXT,
                max_bin_len=0,
                max_ext_len=0,
                max_array_len=_MOST_ITEMS,
                max_map_len=_MOST_KEYS,
            )
            while True:
                try:
                    count = unpacker.read_map_header()
                except msgpack.OutOfData:
                    if unpacker.tell() != path.stat().st_size:
                        raise ValueError("it is cut off") from None
                    return
                for _ in range(count):
                    key = unpacker.unpack()
                    if not isinstance(key, str):
                        raise ValueError("a key is no text")
                    yield key, unpacker.unpack()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except msgpack.OutOfData:
        raise InputError(f"{path} is cut off; fetch it again") from None
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        why = shown(error) or type(error).__name__
        raise InputError(
            f"{path} is no file of msgpack maps, or damaged ({why}); fetch it again"
        ) from None
