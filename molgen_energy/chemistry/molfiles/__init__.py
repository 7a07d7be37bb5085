"""Files of molecules (SDF, multi-XYZ), read and written one record at a time.

Reading keeps one record in memory, accepts gzip, and names the file, the record and the line of
what it cannot read. Writing keeps everything that a molecule has.
"""

from molgen_energy.chemistry.fields import FieldSelection
from molgen_energy.chemistry.molfiles.reader import BadRecord, MoleculeReader
from molgen_energy.chemistry.molfiles.writer import MoleculeTextWriter, count_records

__all__ = ["BadRecord", "FieldSelection", "MoleculeReader", "MoleculeTextWriter", "count_records"]
