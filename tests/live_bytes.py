"""Counts the bytes of the tensors that are alive, on any device, also of tensors without content."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on and still there, each memory once.

    Attributes:
        now: bytes that are alive.
        peak: the most that were; set it back to ``now`` to look at a part.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = set()

    def leave_out(self, tensors):
        """Does not count tensors that were there before."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def _forget(self, key, size):
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return out
