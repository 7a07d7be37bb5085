"""Train, sample and evaluate generative models of 3D molecules with energy losses.

>>> import molgen_energy
>>> molecules = molgen_energy.sample(10)  # RDKit molecules, with pretrained weights
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molgen_energy.api.checkpoint import load_checkpoint
    from molgen_energy.api.evaluate import evaluate
    from molgen_energy.api.preprocess import preprocess
    from molgen_energy.api.sample import sample
    from molgen_energy.api.train import train

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "load_checkpoint", "preprocess", "sample", "train"]


def __getattr__(name: str) -> Any:
    """Import a function when it is first used: PyTorch and RDKit take a second."""
    if name == "evaluate":
        from molgen_energy.api.evaluate import evaluate

        return evaluate
    if name == "load_checkpoint":
        from molgen_energy.api.checkpoint import load_checkpoint

        return load_checkpoint
    if name == "preprocess":
        from molgen_energy.api.preprocess import preprocess

        return preprocess
    if name == "sample":
        from molgen_energy.api.sample import sample

        return sample
    if name == "train":
        from molgen_energy.api.train import train

        return train
    raise AttributeError(f"module 'molgen_energy' has no attribute '{name}'")
