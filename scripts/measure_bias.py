"""What the energy does to a trained network, by noise level s = σ/α in Å.

    python scripts/measure_bias.py calibration mse=qm9_mse energy=qm9_energy --data qm9.h5
    python scripts/measure_bias.py switch mse=qm9_mse energy=qm9_energy -n 512 --steps 30

`calibration`: the networks predict the same noisy validation molecules. *projection* is the mean
over pairs of ⟨y_i − y_j, û_ij⟩, û_ij the predicted direction, over the mean predicted distance: 1
where the prediction is the posterior mean. The other columns are predicted distances relative to
those of the first network, for pairs by the distance that it predicts.

`switch`: molecules drawn with one network above a level and the other below it, from the same
noise, and their metrics. `A>B` is A above, B below.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import molgen_energy
from molgen_energy.cli.console import exit_on_error, say
from molgen_energy.data.batches import DeviceMolecules
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import Molecules, batch_by_size
from molgen_energy.diffusion.noise import RandomNumbers
from molgen_energy.diffusion.process import CosineDiffusion, Process, levels_of
from molgen_energy.diffusion.spacing import noise_levels
from molgen_energy.diffusion.state import Layout, State, pairs_inside
from molgen_energy.models.base import Denoiser
from molgen_energy.output import atomic_replace
from molgen_energy.resources import bundled_sample
from molgen_energy.systems.molecules.generate import MoleculeGenerator
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.devices import choose_device
from molgen_energy.training.pretrained import resolve_checkpoint

LEVELS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.5, 5.0)
BINS = ((0.8, 1.3), (1.3, 1.9), (2.6, 3.6), (5.0, np.inf))  # Å
PAIRS = 20_000  # in a batch
METRICS = {
    "molecule_stability": 100,
    "validity": 100,
    "fcd": 1,
    "mmd_bond_length": 1,
    "wasserstein_dihedral": 1,
    "strain_energy": 1,
}  # with the factor that they are shown with


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("calibration", "switch"))
    parser.add_argument("checkpoints", nargs="+", metavar="LABEL=CHECKPOINT")
    parser.add_argument("--data", type=Path, help="of calibration; default: the bundled sample")
    parser.add_argument("-n", type=int, default=512, help="molecules")
    parser.add_argument("--steps", type=int, default=50, help="of sampling, quadratic spacing")
    parser.add_argument("--at", default="0.5", help="levels of the switch in Å, with commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("switched"), help="folder of samples")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    with exit_on_error():
        generators = {}
        for text in options.checkpoints:
            label, _, name = text.rpartition("=")
            checkpoint = load_checkpoint(resolve_checkpoint(Path(name)))
            generators[label or name] = MoleculeGenerator(
                checkpoint, choose_device(options.device), options.seed, sampler="ancestral",
                steps=options.steps, spacing="quadratic",
            )  # fmt: skip
        rows = calibration(generators, options) if options.what == "calibration" else []
        if options.what == "switch":
            rows = switched(generators, options)
        if options.csv:
            with options.csv.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


# ---- predictions of noisy molecules --------------------------------------------------------------


def calibration(
    generators: dict[str, MoleculeGenerator], options: argparse.Namespace
) -> list[dict[str, str]]:
    """Projection and relative distances of each network at each noise level."""
    with MoleculeFile(options.data or bundled_sample()) as file:
        which = file.split_indices("valid")
        which = np.random.default_rng(options.seed).permutation(which)[: options.n]
        molecules = file.read(np.sort(which))
    rows = []
    for level in LEVELS:
        pairs = {label: [] for label in generators}
        for chunk in batch_by_size(molecules.sizes, PAIRS):
            for label, generator in generators.items():
                pairs[label].append(predicted_pairs(generator, molecules, chunk, level))
        columns = {label: torch.cat(parts, dim=1) for label, parts in pairs.items()}
        reference = next(iter(columns.values()))[0]
        for label, (lengths, projections) in columns.items():
            row = {"s": f"{level:g}", "network": label}
            row["projection"] = f"{float(projections.mean() / lengths.mean()):.3f}"
            for low, high in ((0.0, np.inf), *BINS):
                inside = (reference >= low) & (reference < high)
                ratio = float(lengths[inside].mean() / reference[inside].mean())
                name = "all" if low == 0 else f"{low:g}-{high:g}"
                row[name] = f"{ratio:.3f}" if inside.sum() >= 1000 else ""
            rows.append(row)
            print(*row.values(), sep="\t", flush=True)
    return rows


@torch.no_grad()
def predicted_pairs(
    generator: MoleculeGenerator, molecules: Molecules, chunk: np.ndarray, level: float
) -> Tensor:
    """|Δ̂| and ⟨Δ, û⟩ of the pairs i < j of noisy molecules, (2, P)."""
    process, layout = generator.sampler.process, generator.layout
    scale = layout.fields["positions"].scale
    batch = DeviceMolecules(molecules, generator.device, False).batch(chunk)
    values = {name: field.encode(batch.data) for name, field in layout.fields.items()}
    clean = State.from_fields(layout, batch.mask, values)
    nearest = nearest_level(process, layout, level)
    levels = levels_of(len(chunk), nearest, generator.device)
    # The noise belongs to a molecule, so all networks see the same.
    random = RandomNumbers(generator.seed, torch.from_numpy(chunk).to(generator.device))
    noisy = process.add_noise(clean, random.noise(layout, batch.mask, 0), levels)
    predicted = scale * process.predict(generator.model, noisy, levels).clean["positions"]
    true = scale * clean["positions"]
    inside = pairs_inside(batch.mask).triu(1)
    between = (predicted[:, :, None] - predicted[:, None])[inside]
    lengths = between.norm(dim=-1)
    data = (true[:, :, None] - true[:, None])[inside]
    return torch.stack([lengths, (between * data).sum(-1) / lengths.clamp(min=1e-6)]).cpu()


def nearest_level(process: Process, layout: Layout, noise: float) -> float:
    """The level whose noise is nearest to a value in Å."""
    if isinstance(process, CosineDiffusion):
        ratio = noise / layout.fields["positions"].scale
        return float(process.schedule.time(torch.tensor(-2 * np.log(ratio))))
    noises = noise_levels(process, layout, torch.arange(process.steps + 1))
    return int((noises.log() - np.log(noise)).abs().argmin())


# ---- sampling with two networks ------------------------------------------------------------------


class SwitchedNetwork(nn.Module):
    """One network from a noise level on, another below it; both take the same inputs."""

    def __init__(self, above: Denoiser, below: Denoiser, process: Process, first: float) -> None:
        super().__init__()
        self.above, self.below = above, below
        self.self_conditioned, self.noise_input = above.self_conditioned, above.noise_input
        level = levels_of(1, first, torch.device("cpu"))
        of_level = process.log_snr if self.noise_input == "log_snr" else process.time
        self.limit = float(of_level(level))

    def forward(
        self,
        state: State,
        time: Tensor,
        mask: Tensor,
        condition: Tensor | None,
        previous: State | None,
    ) -> State:
        """Prediction of the network of the level."""
        place = float(time[0])
        # Time grows with the noise, and the signal-to-noise ratio falls.
        high = place <= self.limit if self.noise_input == "log_snr" else place >= self.limit
        result: State = (self.above if high else self.below)(state, time, mask, condition, previous)
        return result


def switched(
    generators: dict[str, MoleculeGenerator], options: argparse.Namespace
) -> list[dict[str, str]]:
    """Metrics of molecules of each network, and of each pair of networks."""
    options.work.mkdir(parents=True, exist_ok=True)
    generator = next(iter(generators.values()))
    networks = {label: one.model for label, one in generators.items()}
    process, layout = generator.sampler.process, generator.layout
    models = dict(networks)
    for at in map(float, options.at.split(",")):
        first = nearest_level(process, layout, at)
        if not process.continuous and noise_levels(process, layout, torch.tensor(first)) < at:
            first += 1
        for above in networks:
            for below in networks:
                if above != below:
                    models[f"{above}>{below} {at:g}"] = SwitchedNetwork(
                        networks[above], networks[below], process, first
                    )
    rows = []
    for label, model in models.items():
        name = label.replace(">", "_").replace(" ", "_")
        path = options.work / f"{name}-{options.n}-{options.steps}-{options.seed}.h5"
        if not path.exists():
            generator.model = model
            draw(generator, options.n, path)
        report = molgen_energy.evaluate([path], metrics="rates,geometry,strain,fcd")
        metrics = report.to_dict()["files"][0]["metrics"]
        row = {"networks": label}
        for metric, factor in METRICS.items():
            value, interval = metrics[metric]["value"], metrics[metric]["interval"]
            row[metric] = f"{factor * value:.4g}"
            if interval:
                row[metric] += " [{:.4g}, {:.4g}]".format(*(factor * x for x in interval))
        rows.append(row)
        print(*row.values(), sep="\t", flush=True)
    return rows


def draw(generator: MoleculeGenerator, count: int, path: Path) -> None:
    """Molecules 0 … count−1 of the generator's seed, in a file."""
    numbers = torch.arange(count)
    chunks = list(batch_by_size(generator.sizes(numbers).numpy(), PAIRS))
    parts = []
    for place, chunk in enumerate(chunks):
        parts.append(generator.draw(numbers[torch.from_numpy(chunk)]))
        say(f"{path.name}: {place + 1} of {len(chunks)} batches")
    order = np.argsort(np.concatenate(chunks))
    with (
        atomic_replace(path) as output,
        MoleculeWriter(output.temporary, source=path.stem, provenance={}) as writer,
    ):
        writer.append(Molecules.concatenate(parts).select(order))


if __name__ == "__main__":
    main()
