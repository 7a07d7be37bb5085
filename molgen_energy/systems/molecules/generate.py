"""Draw molecules with the denoiser of a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from molgen_energy.chemistry.charges import (
    HIGHEST_SUM,
    MOST_AROMATIC,
    NONE_FITS,
    nearest_charges,
)
from molgen_energy.data.molecules import (
    AROMATIC,
    Bonds,
    Molecules,
    Property,
    offsets_from_sizes,
)
from molgen_energy.diffusion.given import GivenFields
from molgen_energy.diffusion.guidance import (
    ClassifierFreeGuidance,
    FunctionGuidance,
    GuidanceFunction,
    SamplingHook,
    chained,
)
from molgen_energy.diffusion.inpainting import FixedValues
from molgen_energy.diffusion.noise import RandomNumbers, Stream
from molgen_energy.diffusion.process import Process
from molgen_energy.diffusion.samplers import DEFAULT_SAMPLERS, build_sampler
from molgen_energy.diffusion.state import Layout
from molgen_energy.diffusion.temperature import Temperature
from molgen_energy.errors import InputError
from molgen_energy.formats.limits import check_memory
from molgen_energy.models import MODELS
from molgen_energy.models.precision import is_bfloat16_faster
from molgen_energy.systems.molecules.condition import (
    PropertyCondition,
    PropertyConditionConfig,
    Where,
)
from molgen_energy.systems.molecules.config import MoleculeConfig
from molgen_energy.systems.molecules.control.base import Batch, Control, Network
from molgen_energy.systems.molecules.control.inputs import everywhere
from molgen_energy.systems.molecules.fields import MoleculeStatistics, build_layout
from molgen_energy.systems.molecules.recorded import RecordedDenoiser
from molgen_energy.systems.molecules.sizes import SizeDistribution
from molgen_energy.systems.molecules.state import MoleculeState, SamplingState
from molgen_energy.systems.molecules.task import build_model
from molgen_energy.training.checkpoint import Checkpoint
from molgen_energy.training.devices import lower_precision
from molgen_energy.training.graphs import CUDARecorder, Recorder

_MOST_GUIDANCE = 1000  # beyond some tens, molecules diverge
_BYTES_OF_PAIR = 32  # of a pair of atoms, at least: positions, distance, features

_NARROWEST = 192  # width below which bfloat16 gains little: at 96, 1.0 to 1.2 on a Zen 4

CHARGE_COUNTS = ("charges_changed", "charges_without_fit")
"""Properties of molecules with consistent charges: atoms whose charge was changed, and atoms whose
bonds no charge fits."""


def samples_in_bfloat16(checkpoint: Checkpoint, device: torch.device) -> bool:
    """Whether `sample` runs the work on pairs in bfloat16 by default.

    It does on a CPU where that is faster, with a network that was trained in bfloat16.
    """
    config = checkpoint.config_as(MoleculeConfig)
    trained_so = config.training.low_precision is True
    wide = getattr(config.model, "width", 0) >= _NARROWEST
    return (
        device.type == "cpu" and trained_so and wide and is_bfloat16_faster(device, training=False)
    )


class MoleculeGenerator:
    """Draws molecules with a checkpoint; needs no data set.

    Molecule i of a seed is the same in every batch, to floating-point tolerance.

    Parameters
    ----------
    checkpoint
        Of a run on molecules; its EMA weights are used.
    device
        Device of the network.
    seed
        With the number of a molecule, it determines the molecule's size and noise.
    sizes
        Fewest and most atoms of a molecule, with all sizes in the range equally frequent. None
        draws sizes from the histogram of the training molecules.
    low_precision
        Run the work on pairs in bfloat16.
    sampler
        One of `SAMPLERS`; None is that of the checkpoint (`SamplingState`), with its noise and
        temperature, else the default of the process.
    steps
        Steps of the sampler, at most those of the training unless that has continuous time. None
        takes the levels or the number of the checkpoint, else the number of the process.
    eta
        Noise of the sampler `ddim`, 0 to 1; None for other samplers.
    spacing
        Spacing of the levels that the sampler visits, one of `SPACINGS`. None is that of the
        checkpoint, else the default of the process.
    where
        Ranges of properties on which the model was conditioned, by name; properties without an
        entry are unconditional. None draws all from the training molecules.
    guidance
        Scale of classifier-free guidance, see `ClassifierFreeGuidance`; 1 has none. Or a function
        of the positions, see `FunctionGuidance`.
    hook
        Makes the guidance of a batch. It is called in several threads.
    temperature
        Options of a `Temperature`, those that are not None; others are as the checkpoint has them.
    consistent_charges
        Replace each formal charge that does not fit the generated bonds of its atom, see
        `ConsistentCharges`.
    ancestral_positions
        With the sampler `dpm++`: positions take ancestral steps.
    self_condition_passes
        Evaluations of a self-conditioned network for each prediction.
    levels
        Noise levels to visit, in place of steps and spacing; see `chosen_levels`.
    cuda_graphs
        Record the evaluations of a batch on a GPU; no effect elsewhere.
    control
        What is asked of the molecules: fixed parts, their sizes, and what they begin with.
    resample
        How often each step is taken, see `Sampler`.
    strength
        Share of the time at which sampling begins, with the molecules that `control` gives.

    Raises
    ------
    InputError
        The checkpoint is damaged or of another model, a size is below 1, the model has no such
        condition or is not self-conditioned, the sampler does not support its process or an
        option, or charges cannot be made consistent.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        seed: int = 0,
        sizes: tuple[int, int] | None = None,
        low_precision: bool = False,
        sampler: str | None = None,
        steps: int | None = None,
        eta: float | None = None,
        spacing: str | None = None,
        where: Where | None = None,
        guidance: float | GuidanceFunction = 1.0,
        hook: Callable[[Batch], SamplingHook | None] = lambda batch: None,
        temperature: Mapping[str, Any] | None = None,
        consistent_charges: bool = False,
        ancestral_positions: bool = False,
        self_condition_passes: int = 1,
        levels: Sequence[float] | None = None,
        cuda_graphs: bool = False,
        control: Control | None = None,
        resample: int = 1,
        strength: float = 1.0,
    ) -> None:
        self.config = checkpoint.config_as(MoleculeConfig)
        state = checkpoint.state_as(MoleculeState)
        if sizes is not None and not 1 <= sizes[0] <= sizes[1]:
            raise InputError(f"sizes {sizes[0]}-{sizes[1]}: expected 1 or more atoms, ascending")
        trained_sizes = SizeDistribution(state.size_histogram)
        self._sizes = trained_sizes if sizes is None else SizeDistribution.uniform(*sizes)
        statistics = MoleculeStatistics.of_state(state)
        self.layout = build_layout(self.config.model.fields, self.config.scales, statistics)
        self.control = Control() if control is None else control
        self._given = tuple(self.config.objective.given_fields)
        equivariant = MODELS[self.config.model.name].equivariant
        network = Network(
            self.layout, statistics, trained_sizes, sizes, checkpoint.name, self._given, equivariant
        )
        self.control.bind(network)
        if self._given and not self.control.gives:
            raise InputError(
                f"{checkpoint.name} draws positions of given molecules; name them with --smiles or "
                "--like"
            )
        most = self._sizes.largest if self.control.largest is None else self.control.largest
        what = f"a molecule of {most:,} atoms"
        remedy = "choose smaller ones"
        if not self.control.gives and not self.control.options.get("formula"):
            remedy = f"{remedy} with --n-atoms"
        check_memory(_BYTES_OF_PAIR * most**2, what, remedy)
        self.charges = None
        if consistent_charges:
            self.charges = ConsistentCharges(self.layout, statistics, checkpoint, device)
        self.where, self._condition = where, None
        if state.condition is not None:
            self._condition = PropertyCondition.from_dict(state.condition.model_dump())
        self.warnings = self.control.warnings
        self.wanted = ""
        if where is not None:
            if self._condition is None:
                raise InputError(
                    f"{checkpoint.name} was trained without properties; leave out --where, or name "
                    "a network of `train --condition NAMES` with --checkpoint"
                )
            self.warnings += self._condition.check(where)
            self.wanted = self._condition.text(where)
        if low_precision:
            lower_precision(device)
        config = self.config.replaced({"training.low_precision": low_precision})
        channels = 0 if self._condition is None else self._condition.channels
        self.model = build_model(config, self.layout, channels)
        checkpoint.load_weights(self.model, "ema")
        self.model.to(device).eval()
        self.checkpoint, self.device, self.seed, self.hook = checkpoint, device, seed, hook
        self.guidance, self._denoiser = guidance, self._guided(guidance)
        self._guide = FunctionGuidance(guidance) if callable(guidance) else None
        self.trained_on = "" if state.data is None else state.data.source
        self.n_atoms, self.low_precision = sizes, low_precision
        self.cuda_graphs = cuda_graphs
        self._recorder: Recorder | None = None
        if cuda_graphs and device.type == "cuda":
            self._recorder = CUDARecorder(device, "--cuda-graphs")
        process = config.process.build()
        stored = state.sampling or SamplingState()
        noise = {name: value for name, value in (temperature or {}).items() if value is not None}
        if sampler is None:
            # What belongs to the stored sampler, which others may not have.
            sampler = stored.sampler
            eta = stored.eta if eta is None else eta
            ancestral_positions = ancestral_positions or bool(stored.ancestral_positions)
            noise = _noise_of(stored) | noise
        if levels is None and steps is None and spacing is None:
            levels = stored.levels
        if levels is None:
            steps = stored.steps if steps is None else steps
            spacing = stored.spacing if spacing is None else spacing
        self.sampler_name = DEFAULT_SAMPLERS[process.name] if sampler is None else sampler
        try:
            self.sampler = build_sampler(
                process,
                self.sampler_name,
                steps,
                eta,
                spacing,
                Temperature.from_options(Temperature().options | noise),
                ancestral_positions,
                self_condition_passes,
                levels,
                resample,
                strength,
            )
        except InputError:
            _check_stored(stored, process, checkpoint)
            raise
        self.sampler.check_model(self.model)

    @property
    def units(self) -> dict[str, str]:
        """Units of the properties of drawn molecules, by name."""
        units = self.control.units
        if self._condition is not None:
            names = (f"condition_{name}" for name in self._condition.names)
            units |= zip(names, self._condition.units, strict=True)
        return units if self.charges is None else units | dict.fromkeys(CHARGE_COUNTS, "atoms")

    def _guided(self, guidance: float | GuidanceFunction) -> nn.Module:
        """The denoiser, guided by its own prediction without properties if the scale is not 1."""
        if callable(guidance) or guidance == 1:
            return self.model
        if not 0 <= guidance <= _MOST_GUIDANCE:
            raise InputError(
                f"--guidance {guidance:g}: expected a number from 0 to {_MOST_GUIDANCE:,}"
            )
        section, name = self.config.condition, self.checkpoint.name
        if self._condition is None or not isinstance(section, PropertyConditionConfig):
            raise InputError(
                f"--guidance {guidance:g}: {name} was trained without properties; leave it out"
            )
        if not section.knows_none:
            raise InputError(
                f"--guidance {guidance:g}: {name} was never trained without its properties; leave "
                "it out, or train with --set condition.dropout=0.1"
            )
        return ClassifierFreeGuidance(self.model, guidance)

    def fingerprint(self) -> str:
        """Hash of all that molecules depend on in the checkpoint, 32 hexadecimal digits."""
        state = self.checkpoint.state
        digest = hashlib.sha256(self.config.to_yaml().encode())
        digest.update(repr((state["elements"], list(state["size_histogram"].items()))).encode())
        digest.update(repr((state.get("statistics"), state.get("condition"))).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def sizes(self, numbers: Tensor) -> Tensor:
        """Atoms of the molecules with the given numbers, (B,)."""
        random = RandomNumbers(self.seed, numbers)
        uniform = random.uniform(Stream.SIZE)
        sizes = self.control.sizes(numbers, uniform)
        if sizes is None and self.where is not None and self.n_atoms is None:
            assert self._condition is not None
            sizes = self._condition.sizes_for(self.where, random)
        return self._sizes.draw(uniform) if sizes is None else sizes

    @torch.no_grad()
    def draw(self, numbers: Tensor, advance: Callable[[], None] = lambda: None) -> Molecules:
        """The molecules with the given numbers (B,), in their order.

        Formal charges and bonds are those that the model generates, if it does. The values of a
        condition become properties `condition_<name>`, and the numbers of atoms that
        `ConsistentCharges` changed or could not change those of `CHARGE_COUNTS`. `advance` is
        called after each evaluation of the network. If the network diverged, positions are not
        finite.
        """
        sizes = self.sizes(numbers).to(self.device)
        largest = int(sizes.max())
        mask = torch.arange(largest, device=self.device)[None] < sizes[:, None]
        random = RandomNumbers(self.seed, numbers.to(self.device))
        properties: dict[str, Property] = {}
        condition = None
        if self._condition is not None:
            values = self._condition.values_for(self.where, random, sizes)
            condition = self._condition.encode(values).to(self.device)
            for name, unit, column in zip(
                self._condition.names, self._condition.units, values.T.numpy(), strict=True
            ):
                properties[f"condition_{name}"] = Property(np.ascontiguousarray(column), unit)
        model = self._denoiser
        if self._recorder is not None:  # for this batch, whose shape few others have
            model = RecordedDenoiser(model, self._recorder)
        batch = Batch(numbers, mask, self.layout)
        hooks = [self._guide, self.hook(batch), self.control.hook(batch)]  # what is fixed, decides
        if self._given:
            given = self.control.given(batch)
            assert given is not None
            model = GivenFields(model, self._given, given)
            hooks.append(FixedValues.of_fields(given, everywhere(batch, self._given)))
        state = self.sampler.sample(
            model,
            random,
            self.layout,
            mask,
            condition,
            chained([hook for hook in hooks if hook is not None]),
            advance,
            self.control.start(batch) if self.sampler.strength < 1 else None,
        )
        decoded = state.decode()
        if self.charges is not None:
            decoded, counts = self.charges.apply(decoded, mask)
            for name, count in zip(CHARGE_COUNTS, counts.cpu().double().numpy(), strict=True):
                properties[name] = Property(count, "atoms")
        return self.control.finish(_molecules(decoded, mask, properties), numbers)


def _noise_of(stored: SamplingState) -> dict[str, float]:
    """The options of a temperature that a checkpoint stores."""
    options = {"temperature": stored.temperature, "final_noise": stored.final_noise}
    return {name: value for name, value in options.items() if value is not None}


def _check_stored(stored: SamplingState, process: Process, checkpoint: Checkpoint) -> None:
    """Raise `InputError`, which names the file, if what a checkpoint stores is no sampler."""
    by_levels = stored.levels is not None
    try:
        build_sampler(
            process,
            stored.sampler,
            None if by_levels else stored.steps,
            stored.eta,
            None if by_levels else stored.spacing,
            Temperature.from_options(Temperature().options | _noise_of(stored)),
            bool(stored.ancestral_positions),
            levels=stored.levels,
        )
    except InputError as error:
        path = checkpoint.path / "state.yaml"
        raise InputError(f"{path}: key 'sampling': {error}; or remove the key") from None


class ConsistentCharges:
    """Formal charges that fit generated bonds, without radicals and implicit hydrogens.

    An atom whose charge fits its bonds stays. Another one gets the nearest charge with which atoms
    of its element have such bonds in the training or validation molecules (`nearest_charges`).
    Where there is none, the atom stays as it was generated.

    Parameters
    ----------
    layout, statistics
        Fields of the model, and what is known of the data.
    checkpoint
        That holds them.
    device
        Of the molecules.

    Raises
    ------
    InputError
        The model generates no charges or bonds, or the checkpoint does not know which charges fit.
    """

    def __init__(
        self,
        layout: Layout,
        statistics: MoleculeStatistics,
        checkpoint: Checkpoint,
        device: torch.device,
    ) -> None:
        if missing := [name for name in ("formal_charges", "bonds") if name not in layout.fields]:
            raise InputError(
                f"--consistent-charges: the model of {checkpoint.path} generates no "
                f"{' and no '.join(missing).replace('_', ' ')}; leave it out"
            )
        if not statistics.atoms:
            raise InputError(
                f"--consistent-charges: {checkpoint.path} does not hold which charges fit which "
                "bonds, since an earlier version wrote it; leave it out, or continue the training "
                "for a step with `train --resume`"
            )
        self._lowest, highest = statistics.charges
        table = nearest_charges(statistics.atoms, self._lowest, highest)
        self._nearest = torch.from_numpy(table).to(device)

    def apply(self, data: Mapping[str, Tensor], mask: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Decoded data with consistent charges, and how many atoms changed and fit none, (2, B)."""
        orders = data["bond_orders"] * (mask[:, :, None] & mask[:, None, :])
        is_aromatic = orders == AROMATIC
        aromatic = is_aromatic.sum(dim=2)
        others = orders.masked_fill(is_aromatic, 0).sum(dim=2)
        charges = data["formal_charges"]
        nearest = self._nearest[
            data["atomic_numbers"].long(),
            charges.long() - self._lowest,
            aromatic.clamp(max=MOST_AROMATIC),
            others.clamp(max=HIGHEST_SUM),
        ]
        none = nearest == NONE_FITS
        none |= (aromatic > MOST_AROMATIC) | (others > HIGHEST_SUM)
        none &= mask
        changed = (nearest != charges) & ~none & mask
        counts = torch.stack([changed.sum(dim=1), none.sum(dim=1)])
        return {**data, "formal_charges": torch.where(changed, nearest, charges)}, counts


def _molecules(
    data: Mapping[str, Tensor], mask: Tensor, properties: Mapping[str, Property]
) -> Molecules:
    """Ragged molecules of decoded fields, without padding."""
    charges = data.get("formal_charges")
    orders = data.get("bond_orders")
    return Molecules(
        data["positions"][mask].cpu().numpy().astype(np.float32),
        data["atomic_numbers"][mask].cpu().numpy(),
        offsets_from_sizes(mask.sum(dim=1).cpu().numpy()),
        formal_charges=None if charges is None else charges[mask].cpu().numpy(),
        bonds=None if orders is None else bonds_of(orders, mask),
        properties=properties,
    )


def bonds_of(orders: Tensor, mask: Tensor) -> Bonds:
    """Ragged bonds of symmetric bond orders (B, N, N), 0 without a bond, between real atoms."""
    inside = torch.triu(mask[:, :, None] & mask[:, None, :], diagonal=1)
    molecule, i, j = torch.nonzero((orders > 0) & inside, as_tuple=True)
    index: NDArray[np.int64] = torch.stack([i, j], dim=1).cpu().numpy()
    counts = torch.bincount(molecule, minlength=len(mask)).cpu().numpy()
    return Bonds(
        index.astype(np.uint32), orders[molecule, i, j].cpu().numpy(), offsets_from_sizes(counts)
    )
