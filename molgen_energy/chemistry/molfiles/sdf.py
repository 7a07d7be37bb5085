"""Records of SDF files: mol blocks (V2000 and V3000) and data fields."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rdkit import Chem, rdBase

from molgen_energy.chemistry.convert import molecule_from_rdkit
from molgen_energy.chemistry.molfiles.lines import Lines, Record
from molgen_energy.chemistry.rdkit import build
from molgen_energy.data.molecules import Molecule

_HEADER = re.compile(r">.*<([^>]+)>")
_END = "M  END\n"


def read_records(lines: Lines) -> Iterator[Record]:
    """Each record up to its `$$$$`."""
    while True:
        start = lines.number + 1
        record: list[str] = []
        while (line := lines.next()) is not None and not line.startswith("$$$$"):
            record.append(line)
        if any(text.strip() for text in record):
            yield Record(start, _parse_mol_block("".join(record)), _data_fields(record))
        elif line is not None:
            yield Record(start, "an empty record", {})
        if line is None:
            return


def _data_fields(record: list[str]) -> dict[str, str]:
    """The data fields of a record, `> <name>` and the lines up to an empty one."""
    fields: dict[str, str] = {}
    name = None
    first = record.index(_END) + 1 if _END in record else 0
    for line in record[first:]:
        header = _HEADER.match(line) if line[0] == ">" else None
        if header:
            name = header[1]
            fields[name] = ""
        elif line.isspace():
            name = None
        elif name is not None:
            fields[name] += line
    return {name: value.rstrip("\n") for name, value in fields.items()}


def _parse_mol_block(block: str) -> Molecule | str:
    with rdBase.BlockLogs():
        try:
            parsed = Chem.MolFromMolBlock(block, sanitize=False, removeHs=False)
        except RuntimeError as error:
            return f"no readable mol block ({str(error).splitlines()[0]})"
    if parsed is None:
        return "no readable mol block (cut off, or counts that do not fit)"
    try:
        return molecule_from_rdkit(parsed)
    except ValueError as error:
        return str(error)


def format_record(molecule: Molecule, name: str, fields: dict[str, str]) -> str:
    """A record of a molecule, with the bonds and charges that it has as they are."""
    with rdBase.BlockLogs():
        built = build(molecule, positions=True)
        built.UpdatePropertyCache(strict=False)
        built.SetProp("_Name", name)
        block = Chem.MolToMolBlock(built, kekulize=False)
    # An empty line would end a field.
    data = "".join(
        f">  <{_key(key)}>\n{value.strip()}\n\n" for key, value in fields.items() if value
    )
    return f"{block}{data}$$$$\n"


def _key(name: str) -> str:
    return re.sub(r"[<>\s]+", "_", name)
