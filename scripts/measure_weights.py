"""Measure the pretrained weights, and write cards, pictures and tables.

    python scripts/measure_weights.py --sample   # only draw the samples: on a GPU, without RDKit
    python scripts/measure_weights.py            # draw what is missing, evaluate, write
    python scripts/measure_weights.py --write    # only texts and pictures, from what is measured

For each of `assets/weights/`: samples of seed 0 (10,000 of QM9's, 400 of the larger molecules of
`ccd`), evaluated by every metric (`report.json`), of weights with a tuned sampler also some drawn
with it, and for the default quality by sampler and steps (`steps.csv`). From these files come the
cards, the pictures, and the tables of the README and of `docs/results/`. Samples stay in --work;
those that exist, or that have a row in `steps.csv`, are not drawn again. `--write` needs none.
--only takes weights by the beginning of their names.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.descriptors import DESCRIPTORS
from molgen_energy.chemistry.valence import stable_atoms
from molgen_energy.cli.console import exit_on_error, say
from molgen_energy.cli.sample import SamplingBar
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.shards import shards_folder
from molgen_energy.metrics.statistics import Rate
from molgen_energy.output import atomic_replace
from molgen_energy.systems.molecules.config import MoleculeConfig
from molgen_energy.systems.molecules.generate import MoleculeGenerator, samples_in_bfloat16
from molgen_energy.systems.molecules.sampling import sample_to_file
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.devices import choose_device
from molgen_energy.training.initial import describe_initial_weights
from molgen_energy.training.pretrained import DEFAULT, SUMS, PretrainedWeights, pretrained_weights

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
FEW = 2_000
COLUMNS, ROWS = 6, 2  # of a picture of molecules
STEPS = {
    ("ancestral", "quadratic"): (20, 50, 100),
    ("ancestral", "log"): (10, 20, 50, 100, 200),
    ("dpm++", "quadratic"): (50,),
    ("dpm++", "log"): (10, 20, 50),
    ("ddim", "log"): (20, 50),
}  # by sampler and spacing of its levels
REFERENCE = ("ancestral", "quadratic", 100)
"""Sampler, spacing and steps of the evaluated samples, of weights with a tuned sampler."""
STABILITY = ("molecule_stability", "atom_stability")
MEASURED = ("molecule_stability", "atom_stability", "validity", "fcd")  # by steps

# Kaba et al., NeurIPS 2025, table of QM9, GDM-aug.
PAPER = {
    "mse": {
        "molecule_stability": 83.7, "atom_stability": 98.3, "validity": 93.6, "uniqueness": 100,
    },
    "energy": {
        "molecule_stability": 89.8, "atom_stability": 99.3, "validity": 97.7, "uniqueness": 99.99,
    },
}  # fmt: skip
RATES = {
    "molecule_stability": "molecule stability, %",
    "atom_stability": "atom stability, %",
    "validity": "validity, %",
    "uniqueness": "unique, %",
    "novelty": "novel, %",
    "connected": "connected, %",
}


@dataclass(frozen=True, eq=False)
class Family:
    """What differs between weights of different data."""

    data: str
    """The data in a sentence."""
    samples: int
    """How many are drawn and evaluated."""
    bins: tuple[tuple[int, int], ...]
    """Numbers of atoms that stability is given for."""
    tables: dict[str, tuple[str, ...]]
    """Pages with a table of the weights, and the rates that it has."""
    training: str
    """The training molecules, in the card."""
    limits: str
    """What the weights do not know, in the card."""
    curves: str | None = None
    """Picture of the validation losses, where there are enough of them."""
    paper: dict[str, dict[str, float]] = field(default_factory=dict)
    """Published rates by loss."""
    measures: dict[str, str] = field(default_factory=dict)
    """Further rows of the card: labels by the key of the metric."""
    valences: tuple[str, ...] = ()
    """Further tables of valences that stability is measured with."""


FAMILIES = {
    "qm9": Family(
        data="QM9",
        samples=10_000,
        bins=((3, 14), (15, 16), (17, 18), (19, 20), (21, 29)),
        tables={
            "README.md": ("molecule_stability", "atom_stability", "validity"),
            "docs/results/index.md": tuple(RATES),
        },
        training="training molecules of EDM's split; no other molecule was seen",
        limits="H, C, N, O and F, 3 to 29 atoms, neutral closed-shell minima of B3LYP as in QM9: "
        "no ions, no larger molecules; other numbers of atoms are extrapolated.",
        curves="weights.png",
        paper=PAPER,
    ),
    "ccd": Family(
        data="CCD",
        samples=400,
        bins=((5, 25), (26, 40), (41, 55), (56, 75), (76, 181)),
        tables={"docs/results/drug_like.md": tuple(RATES)},
        training="training molecules, split by scaffold",
        limits="H, C, N, O, F, P, S, Cl, Br and I, 5 to 181 atoms, as ligands of the Protein Data "
        "Bank in the geometry of a program, not of a minimum. Formal charges are not sampled: "
        "an ion of the data appears as a molecule of odd valence.",
        measures={
            f"{prefix}_{key}": f"{DESCRIPTORS[key].label}, {what}"
            for key in ("ring_systems", "rotatable_bonds", "qed", "sa_score", "logp")
            for prefix, what in (("mean", "mean"), ("wasserstein", "Wasserstein"))
        },
        valences=("geom",),
    ),
}
"""By the beginning of the names of weights."""
MORE_RATES = {
    "complete": "valid and of one fragment, %",
    "valid_unique": "valid × unique, %",
    "valid_unique_novel": "valid × unique × novel, %",
    "hydrogens_assumed": "valid only by added hydrogens, %",
    "good": "passes all checks, %",
    "posebusters": "PoseBusters, %",
}
MEASURES = {
    "fcd": "FCD",
    "mmd_bond_length": "bond lengths, MMD",
    "mmd_angle": "angles, MMD",
    "mmd_dihedral": "dihedrals, MMD",
    "wasserstein_bond_length": "bond lengths, Wasserstein, Å",
    "wasserstein_angle": "angles, Wasserstein, °",
    "wasserstein_dihedral": "dihedrals, Wasserstein, °",
    "sizes": "sizes, Wasserstein, atoms",
    "elements": "elements, total variation",
    "strain_energy": "MMFF94 strain, kcal/mol",
    "strain_rmsd": "MMFF94 relaxation RMSD, Å",
    "xtb_energy": "GFN2-xTB strain, kcal/mol",
    "xtb_rmsd": "GFN2-xTB relaxation RMSD, Å",
}
RELAXED = "relaxed_of_first"
"""Key of a report whose rows of strain were measured on fewer samples than the others."""
BEGIN, END = (
    f"<!-- {word} of what scripts/measure_weights.py writes -->" for word in ("begin", "end")
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", action="store_true", help="only draw")
    parser.add_argument("--write", action="store_true", help="only write, from what is measured")
    parser.add_argument("--work", type=Path, default=Path("weights"), help="folder of samples")
    parser.add_argument("--only", default="", help="only weights whose names begin with this")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    with exit_on_error():
        weights = {
            name: one
            for name, one in pretrained_weights().items()
            if name.startswith(arguments.only)
        }
        if not arguments.write:
            arguments.work.mkdir(parents=True, exist_ok=True)
            files = drawn(weights, arguments.work, choose_device(arguments.device))
        if arguments.sample:
            return
        if not arguments.write:
            for one in weights.values():
                evaluate_samples(one, files[one.name][0])
                if files[one.name][1:]:
                    evaluate_steps(one, files[one.name][1:])
            if DEFAULT in weights:
                draw_samples(files[DEFAULT][-1 if is_tuned(weights[DEFAULT]) else 0])
        for one in weights.values():
            write_text(one.path / "card.md", card(one))
        for family, members in families(weights).items():
            if family.curves is not None:
                draw_curves(family.curves, members)
            for page, columns in family.tables.items():
                path = ROOT / page
                text = with_table(path.read_text("utf-8"), table(family, members, columns))
                write_text(path, text)


def family_of(weights: PretrainedWeights) -> Family:
    return FAMILIES[weights.name.partition("_")[0]]


def families(
    weights: dict[str, PretrainedWeights],
) -> dict[Family, dict[str, PretrainedWeights]]:
    """The weights by their data."""
    found: dict[Family, dict[str, PretrainedWeights]] = {}
    for name, one in weights.items():
        found.setdefault(family_of(one), {})[name] = one
    return found


# Measuring


def digest(weights: PretrainedWeights) -> str:
    """SHA-256 of the weights themselves."""
    lines = (weights.path / SUMS).read_text(encoding="ascii").splitlines()
    (line,) = [line for line in lines if line.endswith("  ema.safetensors")]
    return line.split()[0]


def drawn(
    weights: dict[str, PretrainedWeights], work: Path, device: torch.device
) -> dict[str, list[Path]]:
    """Files of samples: those of the report, others for `steps.csv`, those of a tuned sampler."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    files = {}
    for one in weights.values():
        stored = (None, None, None)
        wanted: list[tuple[str | None, str | None, int | None, int]] = [
            (*(REFERENCE if is_tuned(one) else stored), family_of(one).samples)
        ]
        if one.name == DEFAULT:
            wanted += [(*kind, steps, FEW) for kind, every in STEPS.items() for steps in every]
        if is_tuned(one):
            wanted.append((*stored, FEW))
        files[one.name] = [draw_file(one, work, device, *kind) for kind in wanted]
    return files


def is_tuned(weights: PretrainedWeights) -> bool:
    """Whether the weights hold levels, not as students do."""
    state = state_of(weights)
    return "levels" in state["sampling"] and "teacher" not in state


def draw_file(
    weights: PretrainedWeights,
    work: Path,
    device: torch.device,
    sampler: str | None,
    spacing: str | None,
    steps: int | None,
    count: int,
) -> Path:
    """Samples of seed 0, unless they are there or in `steps.csv`, with how they were drawn."""
    checkpoint = load_checkpoint(weights.path)
    low_precision = samples_in_bfloat16(checkpoint, device)
    generator = MoleculeGenerator(
        checkpoint,
        device,
        low_precision=low_precision,
        sampler=sampler,
        steps=steps,
        spacing=spacing,
    )
    levels = generator.sampler.levels
    method = {
        "sampler": generator.sampler_name,
        "spacing": generator.sampler.spacing if levels is None else "chosen",
        "steps": generator.sampler.steps,
    }
    kind = "-".join(map(str, [*method.values(), count]))
    path = work / f"{weights.name}-{digest(weights)[:8]}-{kind}.h5"
    if path.exists() or path.stem in measured_steps(weights):
        return path
    most = family_of(weights).samples
    longer = path.with_name(path.name.replace(f"-{count}.h5", f"-{most}.h5"))
    if longer.exists():  # the first molecules of a seed are the same however many are drawn
        take_first(longer, count, path)
        return path
    began = time.perf_counter()
    hint = "continue with the same command"
    with SamplingBar(count, "molecules", hint, f"{weights.name} {kind}") as bar:
        resume = shards_folder(path).exists()
        outcome = sample_to_file(generator, count, path, bar, resume=resume)
    if outcome.interrupted:
        sys.exit(1)
    seconds = time.perf_counter() - began
    on = "CPU, bfloat16 for pairs of atoms" if low_precision else "CPU, float32"
    if device.type == "cuda":
        on = f"{torch.cuda.get_device_name(device)}, TF32"
    note = {
        **method,
        "evaluations": generator.sampler.evaluations,
        "seed": generator.seed,
        "device": on,
        "molecules_per_second": round(outcome.drawn / seconds, 1),
    }
    write_text(path.with_suffix(".json"), json.dumps(note) + "\n")
    say(f"{path.name}: {seconds:.0f} s")
    return path


def take_first(samples: Path, count: int, target: Path) -> None:
    """The first of a file's molecules, as a file of their own with the same note."""
    with MoleculeFile(samples) as file:
        molecules, source, origin = file.slice(0, count), file.source, file.provenance
    with MoleculeWriter(target, source=source, provenance=origin) as writer:
        writer.append(molecules)
    write_text(target.with_suffix(".json"), samples.with_suffix(".json").read_text("utf-8"))


def evaluate_samples(weights: PretrainedWeights, samples: Path) -> None:
    """Evaluate the samples and write `report.json`, unless it is of the same samples."""
    target = weights.path / "report.json"
    known = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    if known.get("samples") == samples.stem:
        return
    family = family_of(weights)
    found = {"samples": samples.stem, "drawn": note_of(samples), **faults(samples, family.bins)}
    found |= evaluated(samples, "all")
    for valence in family.valences:
        other = evaluated(samples, "rates", "--valence", valence)
        found[f"valence_{valence}"] = {
            key: {name: part["metrics"][name] for name in STABILITY}
            for key, part in (("samples", other["files"][0]), ("data", other["reference"]))
        }
    write_text(target, json.dumps(found, indent=1) + "\n")


def measured_steps(weights: PretrainedWeights) -> dict[str, dict[str, Any]]:
    """What is known of the quality by sampler and steps, by names of files of samples."""
    path = weights.path / "steps.csv"
    return {row["samples"]: row for row in read(path)} if path.exists() else {}


def evaluate_steps(weights: PretrainedWeights, files: list[Path]) -> None:
    """Quality by sampler and number of steps."""
    rows = measured_steps(weights)
    found = []
    for samples in files:
        row = rows.get(samples.stem) or {
            "samples": samples.stem,
            **note_of(samples),
            "molecules": FEW,
        }
        if samples.stem not in rows:
            metrics = evaluated(samples, "rates,fcd")["files"][0]["metrics"]
            for name in MEASURED:
                value, interval = metrics[name]["value"], metrics[name]["interval"] or ("", "")
                row |= {name: value, f"{name}_low": interval[0], f"{name}_high": interval[1]}
        found.append({key: rounded(value) for key, value in row.items()})
    with (
        atomic_replace(weights.path / "steps.csv") as output,
        output.temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)


def rounded(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def note_of(samples: Path) -> dict[str, Any]:
    """How samples were drawn."""
    found: dict[str, Any] = json.loads(samples.with_suffix(".json").read_text(encoding="utf-8"))
    return found


def evaluated(samples: Path, metrics: str, *options: str) -> dict[str, Any]:
    """The JSON of `molgen-energy evaluate`.

    Of HDF5, which is smaller; the numbers are those of an SDF, whose coordinates are rounded at
    1e-4 Å.
    """
    asked = ["--metrics", metrics, *options, "--json", "-"]
    command = ["-m", "molgen_energy", "evaluate", str(samples), *asked]
    say(f"python {' '.join(command)}")
    done = subprocess.run([sys.executable, *command], check=True, text=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def faults(samples: Path, bins: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """Stable molecules among all, by numbers of atoms, and all by numbers of unstable atoms."""
    with MoleculeFile(samples) as file:
        molecules = file.load()
    owner = np.repeat(np.arange(len(molecules)), molecules.sizes)
    unstable = np.bincount(owner, ~stable_atoms(perceive(molecules)), minlength=len(molecules))
    by_size = []
    for low, high in bins:
        inside = (molecules.sizes >= low) & (molecules.sizes <= high)
        count = int((inside & (unstable == 0)).sum())
        by_size.append({"from": low, "to": high, "molecules": int(inside.sum()), "stable": count})
    counts = np.bincount(np.minimum(unstable, 3).astype(int), minlength=4)
    return {"by_size": by_size, "by_unstable_atoms": counts.tolist()}


# Pictures


def draw_samples(samples: Path) -> None:
    """The first molecules of seed 0, none left out."""
    from draw_molecules import draw, first  # RDKit is not needed to sample

    picture = draw(first(samples, COLUMNS * ROWS), COLUMNS)
    with atomic_replace(IMAGES / "molecules.png") as output:
        picture.savefig(output.temporary, format="png", metadata={"Software": None})


def draw_curves(name: str, weights: dict[str, PretrainedWeights]) -> None:
    """Validation loss by molecules seen, and stability by steps of the sampler where measured."""
    by_steps = DEFAULT in weights
    validated = [one for one in weights.values() if "teacher" not in state_of(one)]
    panels = len(validated) + by_steps
    width = 3.6 * panels + (1.2 if by_steps else 0)
    figure = Figure(figsize=(width, 2.9), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for one, panel, colour in zip(validated, axes, ("#2563c9", "#d9651b") * 9, strict=False):
        rows = read(one.path / "training.csv")
        each = seen(one) / state_of(one)["progress"]["step"]
        molecules = [each * int(row["step"]) / 1e6 for row in rows]
        panel.plot(molecules, [float(row["valid_loss"]) for row in rows], color=colour, lw=1.6)
        panel.set(title=f"{one.name}: validation loss", xlabel="million molecules", ylim=0)
    if by_steps:
        draw_steps(axes[-1])
    for panel in axes:
        panel.title.set_fontsize(9)
        panel.tick_params(labelsize=8, which="both")
        panel.spines[["top", "right"]].set_visible(False)
    with atomic_replace(IMAGES / name) as output:
        figure.savefig(output.temporary, format="png", metadata={"Software": None})


def draw_steps(stable: Any) -> None:
    """Stability of the default weights by calls of the network."""
    rows = read(pretrained_weights()[DEFAULT].path / "steps.csv")
    for kind in dict.fromkeys((row["sampler"], row["spacing"]) for row in rows):
        mine = [row for row in rows if (row["sampler"], row["spacing"]) == kind]
        calls = [int(row["evaluations"]) for row in mine]
        values, lows, highs = (
            [100 * float(row[f"molecule_stability{end}"]) for row in mine]
            for end in ("", "_low", "_high")
        )
        stable.fill_between(calls, lows, highs, alpha=0.15)
        stable.plot(calls, values, "o-", ms=3, lw=1.4, label=", ".join(kind))
    stable.set(title=f"{DEFAULT}: stable molecules, %", xlabel="calls of the network")
    stable.set(xscale="log", ylim=0)
    shown = sorted({steps for every in STEPS.values() for steps in every})
    stable.set_xticks(shown, labels=map(str, shown), minor=False)
    stable.xaxis.set_minor_locator(NullLocator())
    stable.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


# Text


def card(weights: PretrainedWeights) -> str:
    """The model card, Markdown with a head in YAML."""
    config, found = config_of(weights), report(weights)
    file, data, drawn = found["files"][0], found["reference"], found["drawn"]
    training, epochs = state_of(weights)["training"], passes(weights)
    rates = figures(file, "molecule_stability", 100)
    model, loss, family = config["model"], config["loss"], family_of(weights)
    network = f"{model['name']} {model['layers']}×{model['width']}"
    kind, levels, teacher = network, f"of {drawn['spacing']} spacing", teacher_of(weights)
    default = "see below for the default" if is_tuned(weights) else "the default of these weights"
    if student := student_in_words(weights):
        kind, levels = f"{student}; {network}", "at the levels of the student"
    lines = [
        "---",
        f'summary: "{kind} with the {loss["name"]} loss, {epochs:.1f} passes over '
        f'{family.data}; {rates} % of {file["molecules"]:,} molecules stable"',
        "license: mit",
        "---",
        "",
        f"# {weights.name}",
        "",
        "```bash",
        f"molgen-energy sample -n 1000 --checkpoint {weights.name}",
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| model | {network}, {parameters(weights):,} parameters: GDM that takes distances and "
        "directions of pairs as features; not equivariant, every training molecule randomly "
        "rotated |",
        f"| diffusion | {config['process']['steps']:,} steps, {config['process']['prediction']} "
        f"prediction, times u^{config['objective']['time_power']:g}, stratified over each batch |",
        f"| loss on positions | {loss_in_words(config)} |",
        f"| data | {state_of(weights)['data']['source']}: {trained_on(weights):,} "
        f"{family.training} |",
        *started_from(weights),
        *taught_by(weights),
        f"| length | {config['training']['steps']:,} steps of {batch_in_words(config)}: "
        f"{seen(weights) / 1e6:.2f} million molecules, {epochs:.1f} passes |",
        f"| optimiser | {optimiser_in_words(config)}, {config['training']['warmup_steps']:,} steps "
        "of warm-up, cosine decay; weights are their mean (EMA "
        f"{config['training']['ema_decay']:g}) |",
        f"| seed | {config['training']['seed']} |",
        f"| hardware | {training['hardware']}; {duration(training)} |",
        f"| command | `{training['command']}` |",
        f"| stored as | {stored(weights)} |",
        "",
        "`config.yaml` has all hyperparameters, `training.csv` the "
        f"{'losses' if student else 'validation loss'} during training. There was one run of "
        "one seed. These are its last weights, and no choice used test molecules.",
        "",
        f"## Evaluation on {file['molecules']:,} samples",
        "",
        f"Seed {drawn['seed']}, {drawn['sampler']} sampler, {drawn['steps']} steps {levels} "
        f"({default}), drawn on {drawn['device']}; "
        "bonds perceived from distances. The 95 % intervals are those of the sampling; they do not "
        "include what another seed of the training would change. The column of the data is for "
        f"{family.data}'s test molecules, with distances from them to training molecules.",
        "",
    ]
    columns = {"samples": file, "data": data}
    if teacher is not None:
        calls = report(teacher)["drawn"]["evaluations"]
        columns = {"samples": file, f"teacher, {calls}": report(teacher)["files"][0], "data": data}
        lines += [f"`{teacher.name}`, the teacher, draws in {calls} evaluations.", ""]
    lines += [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for valence in family.valences:
        other = found[f"valence_{valence}"]
        for key in STABILITY:
            both = [figures({"metrics": other[part]}, key, 100) for part in ("samples", "data")]
            both[1:1] = [""] * (len(columns) - 2)
            name = RATES[key].replace(", %", f" (`--valence {valence}`), %")
            lines.append(f"| {name} | {' | '.join(both)} |")
    for key, label in (RATES | MORE_RATES).items():
        cells = [figures(column, key, 100) for column in columns.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    for key, label in (MEASURES | family.measures).items():
        cells = [figures(column, key) for column in columns.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    if RELAXED in found:
        lines += [
            "",
            f"Strain and its RMSD are of complete molecules among the first {found[RELAXED]:,} of "
            "these samples.",
        ]
    lines += ["", *few_steps(weights), "## Known weaknesses", "", *weaknesses(weights), ""]
    return "\n".join(lines)


def few_steps(weights: PretrainedWeights) -> list[str]:
    """Quality by sampler and steps, if it was measured."""
    path = weights.path / "steps.csv"
    if not path.exists():
        return []
    rows = read(path)
    tuned = ""
    if is_tuned(weights):
        tuned = "`chosen` are the levels in `state.yaml`, the default of these weights. "
    lines = [
        "## Fewer and more steps",
        "",
        f"{int(rows[0]['molecules']):,} molecules each, seed {rows[0]['seed']}. FCD of so few is "
        "biased upwards; use it only to compare rows. Spacing is that of the sampler's levels, "
        f"`--spacing`; {tuned}Drawn on {' and '.join(sorted({row['device'] for row in rows}))}.",
        "",
        "| sampler | spacing | steps | evaluations | molecule stability, % | atom stability, % "
        "| validity, % | FCD |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [of_row(row, name, 100) for name in list(RATES)[:3]] + [of_row(row, "fcd")]
        name = f"`{row['sampler']}` | {row['spacing']} | {row['steps']} | {row['evaluations']}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def weaknesses(weights: PretrainedWeights) -> list[str]:
    """What is wrong with the samples, from their report."""
    found = report(weights)
    file, data = found["files"][0], found["reference"]
    total = sum(fault["count"] for fault in file["unstable_atoms"])
    worst = ", ".join(
        f"{fault['element']} with {fault['valence']} ({100 * fault['count'] / total:.0f} %)"
        for fault in file["unstable_atoms"][:5]
    )
    sizes = "; ".join(
        f"{one['from']} to {one['to']} atoms {share(one['stable'], one['molecules'])} %"
        for one in found["by_size"]
    )
    _, one, two, more = found["by_unstable_atoms"]
    wrong = max(1, one + two + more)
    energy = config_of(weights)["loss"]["name"] == "energy"
    mirror = (
        " The energy loss does not distinguish a molecule from its mirror image." if energy else ""
    )
    return [
        f"- Stable molecules by size: {sizes}.",
        f"- Of molecules that are not stable {100 * one / wrong:.0f} % have one unstable atom, "
        f"{100 * two / wrong:.0f} % two.",
        f"- Unstable atoms, by sum of bond orders: {worst}.",
        f"- {figures(file, 'hydrogens_assumed', 100)} % are valid only because missing hydrogens "
        f"may be added (data: {figures(data, 'hydrogens_assumed', 100)} %).",
        "- The network is not equivariant: the likelihood of a molecule depends slightly on its "
        f"orientation. Stereoisomers cannot be selected.{mirror}",
        f"- {family_of(weights).limits}",
        "- The model has no condition: it cannot sample for a property.",
    ]


def table(family: Family, weights: dict[str, PretrainedWeights], columns: tuple[str, ...]) -> str:
    """The table of a page: samples of the pretrained weights, the paper's, and the data."""
    lines = [
        f"| | trained | {' | '.join(RATES[key] for key in columns)} | FCD |",
        "|---|---|" + "---|" * (len(columns) + 1),
    ]
    for one in sorted(weights.values(), key=lambda one: one.name, reverse=True):
        file, training = report(one)["files"][0], state_of(one)["training"]
        cells = [figures(file, key, 100) for key in columns] + [figures(file, "fcd")]
        count = f"{passes(one):.0f}" if passes(one) >= 10 else f"{passes(one):.1f}"
        length = f"{count} epochs, {duration(training)} on {training['hardware']}"
        if student := student_in_words(one):
            length = f"{student}; {length}"
        lines.append(f"| `{one.name}` | {length} | {' | '.join(cells)} |")
    for loss, values in family.paper.items():
        cells = [f"{values[key]:g}" if key in values else "" for key in columns]
        lines.append(f"| paper, {loss} | 3000 epochs, GPU | {' | '.join(cells)} | |")
    data = report(next(iter(weights.values())))["reference"]
    cells = [figures(data, key, 100) for key in columns] + [figures(data, "fcd")]
    lines.append(f"| {family.data} itself (test) | | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(page: str, text: str) -> str:
    """A page with the table between its two marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def figures(evaluation: dict[str, Any], key: str, scale: float = 1) -> str:
    """A value and its interval."""
    figure = evaluation["metrics"].get(key)
    if figure is None or figure["value"] is None:
        return "n/a"
    return spelled(figure["value"], figure["interval"], scale)


def of_row(row: dict[str, str], key: str, scale: float = 1) -> str:
    """The same of a row of a CSV."""
    if not row[key]:
        return "n/a"
    interval = [float(row[f"{key}{end}"]) for end in ("_low", "_high") if row[f"{key}{end}"]]
    return spelled(float(row[key]), interval, scale)


def spelled(value: float, interval: list[float] | None, scale: float) -> str:
    form = "{:.1f}" if scale == 100 else "{:.3g}"
    text = form.format(scale * value)
    bounds = ", ".join(form.format(scale * bound) for bound in interval or ())
    return f"{text} [{bounds}]" if bounds else text


def share(count: int, total: int) -> str:
    rate = Rate(count, total)
    return "n/a" if rate.value is None else spelled(rate.value, list(rate.interval or ()), 100)


def loss_in_words(config: dict[str, Any]) -> str:
    loss, weight = config["loss"], f"w = {config['objective']['position_weight']:g}"
    if loss["name"] != "energy":
        return f"{loss['name']}, {weight}"
    springs = loss["springs"]
    return (
        f"energy, {springs['family']} springs (c = {springs['scale']:.4g}) on "
        f"{loss['edges']['kind']} edges, {weight}"
    )


def batch_in_words(config: dict[str, Any]) -> str:
    training = config["training"]
    if training["batch_size"] is not None:
        return str(training["batch_size"])
    return f"{training['pairs_per_batch']:,} pairs of atoms"


def stored(weights: PretrainedWeights) -> str:
    bits = {torch_dtype(t) for t in load_checkpoint(weights.path).read_tensors("ema").values()}
    size = (weights.path / "ema.safetensors").stat().st_size
    return f"{', '.join(sorted(bits))}, {size / 1e6:.1f} MB, SHA-256 `{digest(weights)}`"


def torch_dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def duration(training: dict[str, Any]) -> str:
    minutes = training["minutes"]
    return f"{minutes:.1f} minutes" if minutes < 100 else f"{minutes / 60:.1f} hours"


def parameters(weights: PretrainedWeights) -> int:
    return sum(t.numel() for t in load_checkpoint(weights.path).read_tensors("ema").values())


def config_of(weights: PretrainedWeights) -> dict[str, Any]:
    """The configuration with today's keys, by section."""
    config = load_checkpoint(weights.path).config_as(MoleculeConfig)
    found: dict[str, Any] = yaml.safe_load(config.to_yaml())
    return found


def state_of(weights: PretrainedWeights) -> dict[str, Any]:
    return loaded(weights.path / "state.yaml")


def loaded(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def report(weights: PretrainedWeights) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((weights.path / "report.json").read_text(encoding="utf-8"))
    return found


def started_from(weights: PretrainedWeights) -> list[str]:
    """The row of the initial weights, if the run did not start from random ones."""
    taken = state_of(weights).get("initial_weights")
    if taken is None:
        return []
    text = describe_initial_weights({"initial_weights": taken})
    return [f"| initial weights | {text}; SHA-256 `{taken['sha256']}` |"]


def taught_by(weights: PretrainedWeights) -> list[str]:
    """The row of the teacher of a student."""
    taught = state_of(weights).get("teacher")
    if taught is None:
        return []
    return [f"| teacher | {taught['origin']}; SHA-256 `{taught['sha256']}` |"]


def teacher_of(weights: PretrainedWeights) -> PretrainedWeights | None:
    """The teacher of a student, if its weights and their report ship with the package."""
    taught = state_of(weights).get("teacher") or {}
    found = pretrained_weights().get(str(taught.get("origin")).partition(",")[0])
    return found if found is not None and (found.path / "report.json").exists() else None


def student_in_words(weights: PretrainedWeights) -> str:
    """`student of X, K evaluations`; empty of other weights."""
    state = state_of(weights)
    if "teacher" not in state:
        return ""
    name = str(state["teacher"]["origin"]).partition(",")[0]
    return f"student of {name}, {len(state['sampling']['levels'])} evaluations"


def optimiser_in_words(config: dict[str, Any]) -> str:
    training = config["training"]
    if training["optimizer"] == "adamw":
        return f"AdamW ({training['lr']:g})"
    return f"Muon (matrices, {training['muon_lr']:g}) and AdamW ({training['lr']:g})"


def trained_on(weights: PretrainedWeights) -> int:
    return int(state_of(weights)["data"]["training_samples"])


def seen(weights: PretrainedWeights) -> int:
    state = state_of(weights)
    if "molecules" in state["training"]:
        return int(state["training"]["molecules"])
    return int(state["progress"]["step"] * config_of(weights)["training"]["batch_size"])


def passes(weights: PretrainedWeights) -> float:
    return seen(weights) / trained_on(weights)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_text(path: Path, text: str) -> None:
    # Prose is not wrapped; only spaces at the ends of lines are removed.
    with atomic_replace(path) as output:
        output.temporary.write_text(re.sub(r" +\n", "\n", text), encoding="utf-8")


if __name__ == "__main__":
    main()
