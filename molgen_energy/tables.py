"""Tables for pandas, which is optional."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from molgen_energy.errors import InputError


def data_frame(columns: Mapping[str, Sequence[Any] | Any]) -> Any:
    """A pandas `DataFrame` of columns of one length.

    Raises
    ------
    InputError
        pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise InputError(
            "pandas is not installed; pip install 'molgen-energy[notebook]'"
        ) from error
    return pandas.DataFrame(dict(columns))
