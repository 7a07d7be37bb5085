"""Chemical symbols and atomic numbers."""

from __future__ import annotations

from functools import cache

from molgen_energy.errors import InputError

_SYMBOLS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se "
    "Br Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb "
    "Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm "
    "Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
).split()

ELEMENTS = len(_SYMBOLS)
"""How many elements there are; the largest atomic number."""
_LONGEST = 3  # characters of an atomic number
_SHOWN = 40  # characters


@cache
def _numbers() -> dict[str, int]:
    return {symbol: number for number, symbol in enumerate(_SYMBOLS, start=1)} | {"D": 1, "T": 1}


def atomic_number(symbol: str) -> int:
    """Atomic number of an element.

    Parameters
    ----------
    symbol
        Chemical symbol, in any case, or atomic number in digits; D and T are hydrogen.

    Raises
    ------
    InputError
        There is no such element.
    """
    number = 0
    if symbol.isascii() and len(symbol) <= _LONGEST:
        number = int(symbol) if symbol.isdecimal() else _numbers().get(symbol.capitalize(), 0)
    if not 1 <= number <= len(_SYMBOLS):
        raise InputError(f"'{symbol[:_SHOWN]}' is no chemical element")
    return number


def symbol(number: int) -> str:
    """Chemical symbol of an atomic number between 1 and 118."""
    return _SYMBOLS[number - 1]


def check_ascending(symbols: list[str]) -> list[str]:
    """Symbols as they are; `ValueError` unless each occurs once, by ascending atomic number."""
    numbers = [atomic_number(symbol) for symbol in symbols]
    if numbers != sorted(set(numbers)):
        raise ValueError("expected each element once, by ascending atomic number")
    return symbols
