"""Suspicious molecules: what is probably a fault of a file, found in many molecules at once.

Distances are compared with sums of covalent radii: B. Cordero et al., Dalton Transactions 2832
(2008). A real bond is about as long as the sum; Å are then certain, whatever the elements.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.molecules import AROMATIC, Molecules
from molgen_energy.elements import atomic_number, symbol

KINDS: Mapping[str, str] = {
    "one_place": "have all atoms in one place",
    "coincident": "have two atoms in one place",
    "overlapping": "have atoms closer than half a bond length",
    "scale": "have nearest atoms at {scale} times the length of bonds{unit}",
    "drawing": "lie flat in z = 0, as 2D drawings do",
    "no_hydrogens": "have no hydrogens, which their carbons need",
    "few_hydrogens": "have too few hydrogens for their bonds",
    "fragments": "hold several fragments, such as salts",
    "far": "have coordinates beyond 10,000 Å, which float32 rounds by 0.001 Å",
    "duplicates": "repeat the elements and positions of an earlier one",
}
"""What each kind of anomaly is, as the end of a sentence on several molecules."""

TYPES = "types"
"""The anomaly of a whole set of molecules: numbers of atom types stand for elements."""

COINCIDENT = 0.02
"""Of the sum of covalent radii, 0.01 to 0.05 Å. Nuclei closer than this are one atom given twice;
coordinates in nm (0.1) or fractions of a cell (about 0.03) stay above it and have a kind of their
own, `scale`."""
OVERLAP = 0.5
"""Real molecules stay above 0.75: C≡O, N≡N and C≡N are the shortest bonds, H2 has 1.2."""
BOND = 1.3
"""Of bonded atoms, at most: above every bond between main-group elements, below 1,3-distances."""
LONGEST, SHORTEST = 1.4, 0.6
"""The nearest neighbours of most atoms are between these where coordinates are in Å."""
FAR = 1e4

_SCALES = {1.8897: "bohr", 0.5292: "Å divided by 1.89", 0.1: "nm", 100.0: "pm"}
_TOLERANCE = 1.18  # the median over atoms of real molecules differs by up to this from 1
_OPEN_END = 0.82  # triple bonds are shorter (CO, CN, isonitriles), double bonds longer
_BENT = -0.7071  # cosine of 135°; a carbon with two bonds and all its hydrogens is linear
_TETRAHEDRAL = ("B", "C", "N", "Si", "P", "Ge")
_DRAWN_HYDROGEN = (1.25, 1.6)  # 1.5 Å from C, N or O, over the sum of radii
_SMALLEST_DRAWING = 4  # atoms
_EQUAL = 1.02  # the longest bond of a drawing over the shortest
_SINGULAR = {"have": "has", "hold": "holds", "lie": "lies", "repeat": "repeats"}
_SAID_BY_TYPES = ("scale", "overlapping", "fragments", "no_hydrogens", "few_hydrogens")
_PAIRS_AT_ONCE = 300_000
_LARGE = 1000  # atoms; beyond, only near pairs are looked at
_NAMED = 3  # records of each kind

# Picometres, H to Cm.
_COVALENT_RADII = (
    "31 28 128 96 84 76 71 66 57 58 166 141 121 111 107 105 102 106 203 176 170 160 153 139 139 "
    "132 126 124 132 122 122 120 119 120 120 116 220 195 190 175 164 154 147 146 142 139 145 144 "
    "142 139 139 138 139 140 244 215 207 204 203 201 199 198 198 196 194 192 192 189 190 187 187 "
    "175 170 162 151 144 141 136 136 132 145 146 148 140 150 150 260 221 215 206 200 196 190 187 "
    "180 169"
)


@cache
def covalent_radii() -> NDArray[np.float32]:
    """(119,) in Å by atomic number; elements after Cm have its radius."""
    radii = np.full(119, 1.69, np.float32)
    known = np.array(_COVALENT_RADII.split(), np.float32) / 100
    radii[1 : len(known) + 1] = known
    return radii


class Neighbours:
    """Which atoms are near each other.

    Attributes
    ----------
    closest
        (ΣN,): the smallest distance of each atom from another of its molecule, over the sum of
        their covalent radii; infinite for an atom alone.
    edges
        (E, 2): bonded atoms by their number among all atoms. Given bonds where a molecule has any,
        else pairs below `BOND`.
    given
        (M,): whether the molecule's bonds are given.
    """

    def __init__(self, molecules: Molecules) -> None:
        self.closest = np.full(len(molecules.atomic_numbers), np.inf, np.float32)
        near = self._measure(molecules)
        self.given = np.zeros(len(molecules), bool)
        self.edges = near
        if molecules.bonds is not None:
            self.given = np.diff(molecules.bonds.offsets) > 0
            near = near[~self.given[molecules.molecule_index[near[:, 0]]]]
            self.edges = np.concatenate([molecules.atoms_of_bonds(), near])

    @np.errstate(over="ignore", invalid="ignore")  # coordinates beyond float32's squares, or NaN
    def _measure(self, molecules: Molecules) -> NDArray[np.int64]:
        """Fill `closest`; the pairs below `BOND`."""
        positions, offsets = molecules.positions, molecules.offsets
        radii = covalent_radii()[molecules.atomic_numbers]
        found = [np.zeros((0, 2), np.int64)]
        for which, size in _equal_sizes(molecules.sizes):
            if size < 2:
                continue
            if size > _LARGE:
                found.extend(self._measure_large(molecules, int(k)) for k in which)
                continue
            atoms = offsets[which][:, None] + np.arange(size)
            ratio = np.zeros((len(which), size, size), np.float32)
            for axis in range(3):
                x = positions[:, axis][atoms]
                difference = x[:, :, None] - x[:, None]
                ratio += np.square(difference, out=difference)
            r = radii[atoms]
            ratio /= np.square(r[:, :, None] + r[:, None])
            ratio.reshape(len(which), -1)[:, :: size + 1] = np.inf
            self.closest[atoms] = np.sqrt(ratio.min(axis=1))
            molecule, i, j = np.unravel_index(np.flatnonzero(ratio < BOND**2), ratio.shape)
            once = i < j
            first = offsets[which][molecule[once]]
            found.append(np.stack([first + i[once], first + j[once]], axis=1))
        return np.concatenate(found)

    def _measure_large(self, molecules: Molecules, number: int) -> NDArray[np.int64]:
        """As `_measure`, for one molecule, without all of its pairs."""
        from scipy.spatial import cKDTree

        start, stop = molecules.offsets[number], molecules.offsets[number + 1]
        positions = molecules.positions[start:stop].astype(np.float64)
        if not np.isfinite(positions).all():
            return np.zeros((0, 2), np.int64)
        if not np.ptp(positions, axis=0).any():  # takes half a minute in a tree
            self.closest[start:stop] = 0
            return np.zeros((0, 2), np.int64)
        radii = covalent_radii()[molecules.atomic_numbers[start:stop]]
        tree = cKDTree(positions)
        distance, other = tree.query(positions, k=min(9, len(positions)))
        # The first is the atom itself, or another in its place.
        itself = other == np.arange(len(positions))[:, None]
        ratio = np.where(itself, np.inf, distance / (radii[:, None] + radii[other]))
        self.closest[start:stop] = ratio.min(axis=1)
        if np.median(self.closest[start:stop]) < SHORTEST:  # nearly all pairs may be near
            return np.zeros((0, 2), np.int64)
        reach = 2 * BOND * float(radii.max())
        pairs: NDArray[np.int64] = tree.query_pairs(reach, output_type="ndarray").astype(np.int64)
        i, j = pairs.T
        length = np.linalg.norm(positions[i] - positions[j], axis=1)
        near: NDArray[np.int64] = start + pairs[length < BOND * (radii[i] + radii[j])]
        return near


def _equal_sizes(sizes: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Every molecule once, in groups of one size and of bounded numbers of pairs."""
    order = np.argsort(sizes, kind="stable")
    for size, count in zip(*np.unique(sizes, return_counts=True), strict=True):
        which, order = order[:count], order[count:]
        step = max(1, _PAIRS_AT_ONCE // int(max(1, size)) ** 2)
        for start in range(0, int(count), step):
            yield which[start : start + step], int(size)


class Anomalies(NamedTuple):
    """What is suspicious in some molecules."""

    kinds: dict[str, NDArray[np.bool_]]
    """Which molecules have each of `KINDS` but `duplicates`, (M,) each."""
    scale: NDArray[np.float64]
    """Distances between nearest atoms over lengths of bonds, the median over the atoms, (M,); NaN
    where the molecule is not of the kind `scale`."""

    def select(self, which: NDArray[Any]) -> Anomalies:
        """Those of some molecules, by number or mask."""
        return Anomalies({k: found[which] for k, found in self.kinds.items()}, self.scale[which])


def find_anomalies(molecules: Molecules) -> Anomalies:
    """Find what is suspicious in each molecule.

    Parameters
    ----------
    molecules
        With the bonds and formal charges that were given, if any. Bonds perceived from distances
        would hide what is sought: leave them out.
    """
    return _Finder(molecules).found()


class _Finder:
    """Finds the anomalies of some molecules; what the kinds share is measured once."""

    def __init__(self, molecules: Molecules) -> None:
        self._molecules = molecules
        self._molecule = molecules.molecule_index
        self._near = Neighbours(molecules)

    def found(self) -> Anomalies:
        """All kinds; a molecule has no kind that only follows from another."""
        molecules, sizes, closest = self._molecules, self._molecules.sizes, self._near.closest
        beyond = np.abs(molecules.positions) > FAR
        one_place = self._in_one_place()
        flat = self._flat() & ~one_place
        needs = self._any(self._open_atoms()) & ~one_place
        bare = ~self._any(molecules.atomic_numbers == 1)
        drawing = flat & ((needs & bare) | self._cannot_be_flat(flat))
        most = np.maximum(self._count(closest > LONGEST), self._count(closest < SHORTEST))
        scaled = (sizes > 1) & (most > sizes / 2) & ~one_place & ~drawing
        regular = ~one_place & ~drawing & ~scaled
        coincident = self._any(closest < COINCIDENT) & ~one_place
        return Anomalies(
            {
                "one_place": one_place,
                "coincident": coincident,
                "overlapping": self._any(closest < OVERLAP) & regular & ~coincident,
                "scale": scaled,
                "drawing": drawing,
                "no_hydrogens": needs & bare & ~scaled,
                "few_hydrogens": needs & ~bare & ~scaled,
                "fragments": (regular | self._near.given)
                & (fragments(molecules, self._near.edges)[1] > 1),
                "far": self._any(beyond[:, 0] | beyond[:, 1] | beyond[:, 2]),
            },
            self._median(scaled),
        )

    def _count(self, atoms: NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many of the given atoms (ΣN,) each molecule has, (M,)."""
        return np.bincount(self._molecule[atoms], minlength=len(self._molecules))

    def _any(self, atoms: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which molecules have one of the given atoms (ΣN,), (M,)."""
        return self._count(atoms) > 0

    def _in_one_place(self) -> NDArray[np.bool_]:
        """Molecules of several atoms that all have the coordinates of the first."""
        molecules = self._molecules
        together = (molecules.sizes > 1) & ~self._any(self._near.closest != 0)
        for k in np.flatnonzero(together).tolist():  # each atom is in the place of some other
            together[k] = not np.ptp(molecules[k].positions, axis=0).any()
        return together

    def _flat(self) -> NDArray[np.bool_]:
        """Molecules with z = 0 throughout, of at least four atoms."""
        big = self._molecules.sizes >= _SMALLEST_DRAWING
        return big & ~self._any(self._molecules.positions[:, 2] != 0)

    def _cannot_be_flat(self, flat: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of the flat molecules no plane can hold, or have the bonds of a drawing.

        They have an atom of four bonds that is not flat, such as carbon, bonds of hydrogen and of
        others of one length, or hydrogens about 1.5 Å away. A planar molecule, such as benzene, has
        none of this.
        """
        numbers, closest = self._molecules.atomic_numbers, self._near.closest
        apart = (numbers == 1) & (closest > _DRAWN_HYDROGEN[0]) & (closest < _DRAWN_HYDROGEN[1])
        drawn = flat & self._any(apart)
        edges = self._near.edges
        edges = edges[flat[self._molecule[edges[:, 0]]]]
        if not len(edges):
            return drawn
        degree = np.bincount(edges.ravel(), minlength=len(numbers))
        tetrahedral = np.isin(numbers, [atomic_number(name) for name in _TETRAHEDRAL])
        crowded = self._any((degree >= 4) & tetrahedral)
        i, j = edges.T
        length = np.linalg.norm(self._molecules.positions[i] - self._molecules.positions[j], axis=1)
        elements = np.sort(numbers[edges].astype(np.int64), axis=1) @ [128, 1]
        shortest, longest = self._range(length, edges)
        first, last = self._range(elements, edges)
        hydrogen = first < 256  # the lowest code is that of a bond of hydrogen
        return drawn | crowded | (hydrogen & (first < last) & (longest < _EQUAL * shortest))

    def _range(
        self, values: NDArray[Any], edges: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Smallest and largest value over the bonds of each molecule, (M,) each."""
        smallest = np.full(len(self._molecules), np.inf)
        largest = np.full(len(self._molecules), -np.inf)
        np.minimum.at(smallest, self._molecule[edges[:, 0]], values)
        np.maximum.at(largest, self._molecule[edges[:, 0]], values)
        return smallest, largest

    def _open_atoms(self) -> NDArray[np.bool_]:
        """Atoms that lack hydrogens, (ΣN,): by valence where bonds are given, else by geometry."""
        given = self._near.given[self._molecule]
        by_valence = _open_valences(self._molecules) & given if given.any() else given
        return by_valence | (self._open_carbons() & ~given)

    def _open_carbons(self) -> NDArray[np.bool_]:
        """Carbons with one neighbour, not by a triple bond, or two that are not in line, (ΣN,).

        Those with three neighbours may be planar and complete, and no file lacks their hydrogens
        alone.
        """
        molecules, edges = self._molecules, self._near.edges
        carbon = molecules.atomic_numbers == 6
        degree = np.bincount(edges.ravel(), minlength=len(carbon))
        alone = carbon & (molecules.sizes == 1)[self._molecule]
        end = carbon & (degree == 1) & (self._near.closest > _OPEN_END)
        two = carbon & (degree == 2)
        both = np.concatenate([edges, edges[:, ::-1]])
        start, stop = both[two[both[:, 0]]].T
        direction = molecules.positions[stop] - molecules.positions[start]
        with np.errstate(invalid="ignore", divide="ignore"):
            direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        row = np.cumsum(two) - 1
        squared = np.zeros(int(two.sum()))
        for axis in range(3):
            squared += np.bincount(row[start], direction[:, axis], len(squared)) ** 2
        bent = np.zeros(len(carbon), bool)
        bent[two] = squared > 2 + 2 * _BENT  # |u + v|² = 2 + 2 cos
        found: NDArray[np.bool_] = alone | end | bent
        return found

    def _median(self, which: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Of `closest` over the atoms of some molecules, (M,); NaN in the others."""
        median = np.full(len(which), np.nan)
        atoms = np.flatnonzero(which[self._molecule])
        closest = self._near.closest[atoms]
        ascending = closest[np.lexsort((closest, self._molecule[atoms]))]
        sizes = self._molecules.sizes[which]
        median[which] = ascending[np.cumsum(sizes) - 1 - sizes // 2]
        return median


def _open_valences(molecules: Molecules) -> NDArray[np.bool_]:
    """C, N and O whose bonds sum to one less than their formal charge asks for, (ΣN,).

    Without formal charges, which N and O may have, C alone.
    """
    assert molecules.bonds is not None
    numbers = molecules.atomic_numbers
    order = molecules.bonds.order.astype(np.float64)
    order[order == AROMATIC] = 1.5
    sums = np.zeros(len(numbers))
    for atoms in molecules.atoms_of_bonds().T:
        sums += np.bincount(atoms, order, len(numbers))
    lacking: NDArray[np.bool_] = (numbers == 6) & (sums < 3.25)
    if molecules.formal_charges is None:
        return lacking
    charge = molecules.formal_charges.astype(np.int64)
    lacking = (numbers == 6) & (sums < 3.25 - np.abs(charge))
    lacking |= (numbers == 7) & (sums < 2.25 + charge)
    lacking |= (numbers == 8) & (sums < 1.25 + charge)
    return lacking


def fragments(
    molecules: Molecules, edges: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Connected fragments.

    Parameters
    ----------
    edges
        Bonded atoms by their number among all atoms, (E, 2). By default given bonds, or near atoms
        where a molecule has none (`Neighbours`).

    Returns
    -------
    The number of the fragment of each atom among all molecules, (ΣN,), and how many fragments each
    molecule has, (M,).
    """
    i, j = (Neighbours(molecules).edges if edges is None else edges).T
    # Every fragment gets the number of its first atom: roots of trees are joined along bonds, and
    # trees are flattened, until no bond joins two trees.
    label = np.arange(len(molecules.atomic_numbers))
    while len(i):
        low, high = np.minimum(label[i], label[j]), np.maximum(label[i], label[j])
        np.minimum.at(label, high, low)
        while not np.array_equal(label, flatter := label[label]):
            label = flatter
        apart = label[i] != label[j]
        i, j = i[apart], j[apart]
    roots = label == np.arange(len(label))
    count = np.bincount(molecules.molecule_index[roots], minlength=len(molecules))
    return (np.cumsum(roots) - 1)[label], count


def largest_fragments(molecules: Molecules) -> tuple[Molecules, NDArray[np.bool_]]:
    """The largest fragment of each molecule, and which molecules had several, (M,).

    The largest has most atoms; of those, the heaviest elements, by the sum of atomic numbers; of
    those, the one that comes first. Atoms keep their formal charges and molecules their properties;
    the SMILES of a molecule that changes is empty, since it names all fragments.
    """
    label, count = fragments(molecules)
    several = count > 1
    if not several.any():
        return molecules, several
    size = np.bincount(label)
    weight = np.bincount(label, molecules.atomic_numbers.astype(np.float64))
    first = np.full(len(size), len(label))
    np.minimum.at(first, label, np.arange(len(label)))
    molecule = molecules.molecule_index[first]
    order = np.lexsort((first, -weight, -size, molecule))
    kept = np.zeros(len(size), bool)
    # A molecule's best fragment is the first of its rows in this order.
    kept[order[np.unique(molecule[order], return_index=True)[1]]] = True
    smiles = molecules.smiles
    if smiles is not None:
        smiles = np.where(several, "", smiles).astype(object)
    return replace(molecules.keep_atoms(kept[label]), smiles=smiles), several


def fingerprints(molecules: Molecules) -> NDArray[np.uint64]:
    """A number for each molecule, equal for the same elements and positions to the last bit, (M,).

    Of 64 bits: ten million different molecules have two equal ones with a chance of 3e-6.
    """
    offsets = molecules.offsets
    place = np.arange(len(molecules.atomic_numbers)) - np.repeat(offsets[:-1], molecules.sizes)
    positions = np.ascontiguousarray(molecules.positions, np.float32) + np.float32(0)  # no -0
    bits = positions.view(np.uint32)
    mixed = np.zeros(len(place), np.uint64)
    for column, values in enumerate((*bits.T, molecules.atomic_numbers)):
        words = values.astype(np.uint64) ^ ((4 * place + column).astype(np.uint64) << np.uint64(32))
        # The finaliser of SplitMix64: G. L. Steele, D. Lea, C. H. Flood, OOPSLA 2014.
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            words ^= words >> np.uint64(shift)
            words *= np.uint64(factor)
        mixed += words ^ (words >> np.uint64(31))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed)])
    result: NDArray[np.uint64] = sums[offsets[1:]] - sums[offsets[:-1]]
    return result


class Repetitions:
    """Finds molecules that have been there before, in 8 bytes a molecule."""

    def __init__(self) -> None:
        self._sorted: list[NDArray[np.uint64]] = []  # each more than twice as long as the next

    def add(self, molecules: Molecules) -> NDArray[np.bool_]:
        """Which molecules repeat an earlier one, here or of another call, (M,)."""
        found = fingerprints(molecules)
        values, first, member = np.unique(found, return_index=True, return_inverse=True)
        again: NDArray[np.bool_] = first[member.reshape(-1)] != np.arange(len(found))
        for known in self._sorted:
            place = np.minimum(np.searchsorted(known, found), len(known) - 1)
            again |= known[place] == found
        while self._sorted and len(self._sorted[-1]) <= 2 * len(values):
            values = np.union1d(values, self._sorted.pop())
        if len(values):
            self._sorted.append(values)
        return again


class AnomalyCounts:
    """Count the anomalies of many molecules, chunk by chunk, and name the first.

    Memory grows by 8 bytes a molecule, for `duplicates`.
    """

    def __init__(self) -> None:
        self.counts = dict.fromkeys(KINDS, 0)
        self._first: dict[str, list[str]] = {kind: [] for kind in KINDS}
        self._scales: list[NDArray[np.float64]] = []
        self._seen = Repetitions()
        self._elements = np.zeros(256, bool)
        self._total = 0

    def add(
        self,
        molecules: Molecules,
        records: NDArray[np.int64] | NDArray[np.str_],
        file: str = "",
        found: Anomalies | None = None,
    ) -> None:
        """Count some molecules.

        Parameters
        ----------
        molecules
            As for `find_anomalies`.
        records
            Their numbers in the file, from 1, or their names, (M,).
        file
            Its name, where there are several.
        found
            Their anomalies, if they are known.
        """
        if found is None:
            found = find_anomalies(molecules)
        kinds = found.kinds | {"duplicates": self._seen.add(molecules)}
        for kind, which in kinds.items():
            number = int(which.sum())
            self.counts[kind] += number
            missing = _NAMED - len(self._first[kind])
            if number and missing > 0:
                where = f"{file}: " if file else ""
                self._first[kind] += [f"{where}{k}" for k in records[which][:missing].tolist()]
        self._scales.append(found.scale[found.kinds["scale"]])
        self._elements[molecules.atomic_numbers] = True
        self._total += len(molecules)

    def types(self) -> list[str]:
        """The elements, where they look like LAMMPS's atom types 1, 2, … instead; else none.

        Types are numbered from 1 without gaps, so that the second is He, of which molecules have
        none.
        """
        present = np.flatnonzero(self._elements)
        if len(present) > 1 and present[-1] == len(present) and present[0] == 1:
            return [symbol(z) for z in present.tolist()]
        return []

    def notes(
        self, remedies: Mapping[str, str] | None = None, kinds: Collection[str] = (*KINDS, TYPES)
    ) -> list[str]:
        """One line for each kind that occurs: how many of all molecules, the first records, remedy.

        Parameters
        ----------
        remedies
            What to do about a kind, for instance the option that leaves out such records.
        kinds
            Those to speak of.
        """
        remedies = remedies or {}
        lines = []
        if TYPES in kinds and (elements := self.types()):
            line = (
                f"the elements {', '.join(elements)} are the numbers 1 to {len(elements)}, which "
                "looks like atom types of LAMMPS"
            )
            lines.append(f"{line}; {remedies[TYPES]}" if TYPES in remedies else line)
            kinds = [kind for kind in kinds if kind not in _SAID_BY_TYPES]
        for kind, text in KINDS.items():
            count = self.counts[kind]
            if not count or kind not in kinds:
                continue
            if kind == "scale":
                text = text.format(**self._scale())
            verb, _, rest = text.partition(" ")
            verb = _SINGULAR[verb] if count == 1 else verb
            noun = "molecule" if self._total == 1 else "molecules"
            more = ", …" if count > _NAMED else ""
            first = f"record{'s' if count > 1 else ''} {', '.join(self._first[kind])}{more}"
            line = f"{count:,} of {self._total:,} {noun} {verb} {rest} ({first})"
            lines.append(f"{line}; {remedies[kind]}" if kind in remedies else line)
        return lines

    def _scale(self) -> dict[str, str]:
        """The median length of bonds over that of real ones, and the unit that it suggests."""
        scale = float(np.median(np.concatenate(self._scales)))
        units = (
            f": coordinates in {unit}, not Å?"
            for factor, unit in _SCALES.items()
            if 1 / _TOLERANCE < scale / factor < _TOLERANCE
        )
        text = np.format_float_positional(scale, 2, fractional=False, trim="-")
        return {"scale": text, "unit": next(units, "")}
