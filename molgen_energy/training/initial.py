"""The weights that a run starts from: `training.initial_weights`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from molgen_energy.config import Config
from molgen_energy.errors import InputError
from molgen_energy.paths import expand_home
from molgen_energy.training.checkpoint import Checkpoint, load_checkpoint, load_weights
from molgen_energy.training.pretrained import file_digest, resolve_checkpoint
from molgen_energy.training.task import Task

_OF_TRAINING = {"dropout"}
"""Keys of models that do not change the function that weights stand for."""


def initialise(task: Task) -> None:
    """Give the model the weights of `training.initial_weights`, if it names any.

    The model gets EMA weights. `task.state["initial_weights"]` says afterwards what was taken; with
    that, nothing is done again.

    Raises
    ------
    InputError
        There are no such weights, or they are of another system, another network, or have another
        meaning.
    """
    given = task.config.training.initial_weights
    if given is None or "initial_weights" in task.state:
        return
    name = expand_home(given)
    checkpoint = load_checkpoint(resolve_checkpoint(name, "--from"), weights=["ema"])
    check_same_function(checkpoint, task.config, f"--from {name}")
    fitted = task.fit_weights(checkpoint)
    load_weights(task.model, fitted.tensors, checkpoint.path)
    keep_sampling(task, checkpoint)
    values = sum(tensor.numel() for tensor in task.model.state_dict().values())
    task.state["initial_weights"] = {
        **provenance(checkpoint),
        "values": values - fitted.drawn,
        "drawn": fitted.drawn,
        "new": list(fitted.new),
        "left_out": list(fitted.left_out),
    }


def keep_sampling(task: Task, checkpoint: Checkpoint) -> None:
    """Draw samples of a fine-tuned network as those of a checkpoint, which has the same process."""
    fine_tuning = getattr(task.config, "fine_tuning", None)
    if fine_tuning is not None and fine_tuning.relative_lr and "sampling" in checkpoint.state:
        task.state["sampling"] = checkpoint.state["sampling"]


def check_same_function(checkpoint: Checkpoint, config: Config, option: str) -> None:
    """Raise `InputError` if a configuration gives the checkpoint's weights another meaning.

    `option` stands at the start of the message.
    """
    differences = _different_values(checkpoint.config_as(type(config)), config)
    if differences:
        raise InputError(f"{option} was trained with {', '.join(differences)}; set the same values")


def provenance(checkpoint: Checkpoint) -> dict[str, str]:
    """Run and step of EMA weights, `origin`, and the SHA-256 of their file, `sha256`."""
    stored = (checkpoint.state.get("sha256") or {}).get("ema")
    digest = stored or file_digest(checkpoint.path / "ema.safetensors")
    return {"origin": checkpoint.origin, "sha256": digest}


def describe_initial_weights(state: Mapping[str, Any]) -> str:
    """What a run took, in one line, from `state["initial_weights"]`; empty if it took nothing."""
    taken = state.get("initial_weights")
    if taken is None:
        return ""
    parts = [f"{taken['origin']}: {taken['values']:,} values"]
    if taken["drawn"]:
        parts.append(f"{taken['drawn']:,} random ones for {_grouped(taken['new'])}")
    if taken["left_out"]:
        parts.append(f"without {_grouped(taken['left_out'])}")
    return ", ".join(parts)


def _grouped(channels: Sequence[str]) -> str:
    """Names of channels: `elements P, S` for `elements P` and `elements S`."""
    groups: dict[str, list[str]] = {}
    for channel in channels:
        field, _, rest = channel.partition(" ")
        groups.setdefault(field, []).append(rest)
    return " and ".join(f"{field} {', '.join(rest)}".rstrip() for field, rest in groups.items())


def _different_values(theirs: Config, ours: Config) -> list[str]:
    """The values, as `key=value`, that give weights a meaning and that ours do not have.

    Of sections of another name, only the name counts.
    """
    theirs_by_key, ours_by_key = theirs.model_dump(mode="json"), ours.model_dump(mode="json")
    differences = []
    for section in ("model", "process", "scales"):
        there, here = theirs_by_key.get(section, {}), ours_by_key.get(section, {})
        keys = there if there.get("name") == here.get("name") else ["name"]
        differences += [
            f"{section}.{key}={_shown(there[key])} (here {_shown(here.get(key))})"
            for key in keys
            if key not in _OF_TRAINING and there[key] != here.get(key)
        ]
    return differences


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
