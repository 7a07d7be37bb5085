"""What a file of QM9 holds besides atoms: the names and units of its properties.

Ramakrishnan, Dral, Rupp, von Lilienfeld, Scientific Data 1, 140022 (2014), table 3.
"""

from __future__ import annotations

import json

from molgen_energy.chemistry.fields import UNITS

# Name here, unit, column in qm9pack. The order is that of the second line of a dsgdb9nsd file.
PROPERTIES = (
    ("A", "GHz", "RotA_GHz"),
    ("B", "GHz", "RotB_GHz"),
    ("C", "GHz", "RotC_GHz"),
    ("mu", "debye", "Dipole_debye"),
    ("alpha", "bohr^3", "Polarizability_bohr3"),
    ("homo", "hartree", "HOMO_au"),
    ("lumo", "hartree", "LUMO_au"),
    ("gap", "hartree", "HOMO_LUMO_gap_au"),
    ("r2", "bohr^2", "R2_bohr2"),
    ("zpve", "hartree", "ZPVE_au"),
    ("U0", "hartree", "InternalEnergy_0K_au"),
    ("U", "hartree", "InternalEnergy_298K_au"),
    ("H", "hartree", "Enthalphy_298K_au"),
    ("G", "hartree", "GibbsFreeEnergy_298K_au"),
    ("Cv", "cal/(mol K)", "Heatcapacity_Cv_cal_mol_K"),
)
INDEX, INDEX_UNIT = "index", "number in QM9, from 1"

_TAG = "gdb"
_UNITS = json.dumps({name: unit for name, unit, _ in PROPERTIES} | {INDEX: INDEX_UNIT})


def fields_of_comment(comment: str) -> dict[str, str]:
    """The fields of the second line of a dsgdb9nsd file, `gdb 1 157.7 …`; none of other lines."""
    if _TAG not in comment:
        return {}
    tag, *values = comment.split(None, 2 + len(PROPERTIES))
    if tag != _TAG or len(values) != 1 + len(PROPERTIES):
        return {}
    names = [INDEX, *(name for name, _, _ in PROPERTIES)]
    return {**dict(zip(names, values, strict=True)), UNITS: _UNITS}
