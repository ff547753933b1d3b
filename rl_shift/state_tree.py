"""Nested state <-> JSON values and named tensors, without pickle.

Dicts, lists, tuples, tensors, NumPy arrays and plain values pass, exactly; anything else is refused
with the key at which it stands. Besides themselves JSON values hold mappings with one special key:
{"$tensor": name}, {"$array": name, "dtype", "shape"}, {"$scalar": ...}, {"$tuple": [...]},
{"$float": "nan"} and {"$dict": [[key, value], ...]} for keys that JSON would not keep.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_shift.errors import UserError

WEIGHTS, TENSORS = "weights.safetensors", "train_state.safetensors"
WEIGHTS_PREFIX = "agent/module/"  # tensors below it go to the file of weights


class Encoder:
    """Turns a nested state into JSON values and collects its tensors per file."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Tensor]] = {WEIGHTS: {}, TENSORS: {}}

    def encode(self, value: Any, path: str = "") -> Any:
        """JSON form of `value`; a mapping with one key starting with "$" stands for the rest."""
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            # Python's float text is exact; JSON has no word for the other three values
            return value if math.isfinite(value) else {"$float": str(value)}
        if isinstance(value, Tensor):
            return {"$tensor": self._store(path, self._plain(value, path))}
        if isinstance(value, np.ndarray | np.generic):
            return self._array(value, path)
        if kind is list:
            return [self.encode(item, f"{path}/{i}") for i, item in enumerate(value)]
        if kind in (tuple, torch.Size):
            return {"$tuple": [self.encode(item, f"{path}/{i}") for i, item in enumerate(value)]}
        if kind in (dict, OrderedDict):
            return self._mapping(value, path)
        raise foreign(path, kind.__module__ + "." + kind.__qualname__)

    def _mapping(self, value: Mapping[Any, Any], path: str) -> Any:
        for key in value:
            if type(key) not in (str, int):
                raise foreign(path, f"a key of type {type(key).__name__}")
        items = [
            (key, self.encode(item, f"{path}/{key}".lstrip("/"))) for key, item in value.items()
        ]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        return {"$dict": [list(item) for item in items]}

    def _array(self, value: np.ndarray[Any, Any] | np.generic, path: str) -> Any:
        if value.dtype.kind not in "biufc":
            raise foreign(path, f"a NumPy array of type {value.dtype}")
        # raw bytes: NumPy has types (and byte orders) that torch lacks
        raw = torch.from_numpy(np.array(value, order="C").reshape(-1).view(np.uint8))
        word = "$array" if isinstance(value, np.ndarray) else "$scalar"
        return {word: self._store(path, raw), "dtype": value.dtype.str, "shape": list(value.shape)}

    @staticmethod
    def _plain(value: Tensor, path: str) -> Tensor:
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise foreign(path, f"a tensor of layout {value.layout} on {value.device}")
        return value.detach().cpu().contiguous()

    def _store(self, path: str, value: Tensor) -> str:
        """File a tensor under a unique name and return it; the file is told by the prefix."""
        file, name = TENSORS, path
        if path.startswith(WEIGHTS_PREFIX):
            file, name = WEIGHTS, path.removeprefix(WEIGHTS_PREFIX)
        tensors = self.files[file]
        while name in tensors or name in ("", "__metadata__"):
            name += "'"  # {"a/b": t} and {"a": {"b": t}} have equal paths
        tensors[name] = value
        return f"{file}:{name}"

    def unshared(self, file: str) -> dict[str, Tensor]:
        """The tensors of one file, each with memory of its own, as safetensors demands."""
        seen: set[int] = set()
        for name, tensor in self.files[file].items():
            address = tensor.untyped_storage().data_ptr()
            if address in seen:
                self.files[file][name] = tensor.clone()
            seen.add(address)
        return self.files[file]


def decode(node: Any, tensors: Mapping[str, Tensor], path: str = "") -> Any:
    """The value that `Encoder.encode` saw; `tensors` by the names it gave."""
    if isinstance(node, list):
        return [decode(item, tensors, f"{path}/{i}") for i, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    word = next((key for key in node if key.startswith("$")), None)
    if word is None:
        return {
            key: decode(item, tensors, f"{path}/{key}".lstrip("/")) for key, item in node.items()
        }
    content = node[word]
    if word == "$float":
        return float(content)
    if word == "$tuple":
        return tuple(decode(content, tensors, path))
    if word == "$dict":
        return {key: decode(item, tensors, f"{path}/{key}".lstrip("/")) for key, item in content}
    if word == "$tensor":
        return tensors[content]
    if word in ("$array", "$scalar"):
        flat = np.frombuffer(tensors[content].numpy().tobytes(), dtype=np.dtype(node["dtype"]))
        array = flat.reshape(node["shape"]).copy()
        return array if word == "$array" else array[()]
    raise foreign(path, f"{word!r}")


def foreign(path: str, what: str) -> UserError:
    """The refusal of an object that has no place in a checkpoint."""
    return UserError(
        f"the state holds {what} at {path or 'its top'!r}: checkpoints hold only tensors, NumPy "
        "arrays, numbers, strings, None, lists, tuples and dicts; convert it in state()"
    )
