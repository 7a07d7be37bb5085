"""What a CUDA graph does, on the CPU: a recorder for `molgen_energy.training.graphs`.

Recording computes nothing that lasts: it lists the operations on tensors, and restores the memory
that they changed. Repeating calls the same operations on the same memory, without the function.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITS = ("_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero", "masked_select")


class Waits(AssertionError):
    """An operation for which a GPU would stop: its result is needed by Python, or comes from it."""


class _Listing(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.made, self.before = [], set(), {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        name = function._schema.name.removeprefix("aten::")
        if name in _WAITS:
            raise Waits(name)
        for schema, value in zip(function._schema.arguments, arguments, strict=False):
            self._keep(schema, value)
        for schema in function._schema.arguments:
            if schema.name in options:
                self._keep(schema, options[schema.name])
        results = function(*arguments, **options)
        inside = {storage(x) for x in tensors_in((arguments, options))}
        made = [x for x in tensors_in(results) if storage(x) not in inside]
        self.made.update(map(storage, made))
        self.calls.append((function, arguments, options, results))
        return results

    def _keep(self, schema, value):
        """Remember memory from outside that the call changes."""
        if schema.alias_info is None or not schema.alias_info.is_write:
            return
        for tensor in tensors_in(value):
            at = storage(tensor)
            if at not in self.made and at not in self.before:
                whole = tensor.untyped_storage()
                self.before[at] = whole, whole.clone()


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storage(tensor):
    return tensor.untyped_storage().data_ptr() or id(tensor)


class ListRecorder:
    """`recorded` functions, each repeated by calling what it called."""

    def __init__(self):
        self.recorded = 0

    def run(self, function):
        return function()

    def record(self, function):
        self.recorded += 1
        with _Listing() as listing:
            results = function()
        for whole, before in listing.before.values():
            whole.copy_(before)
        calls = listing.calls

        @torch.no_grad()
        def replay():
            for call, arguments, options, earlier in calls:
                again = call(*arguments, **options)
                pairs = zip(tensors_in(earlier), tensors_in(again), strict=True)
                for old, new in pairs:
                    if storage(old) != storage(new):
                        old.copy_(new)

        return replay, results
