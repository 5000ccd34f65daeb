"""Reads the tensors of a safetensors checkpoint: one file, or shards with an index."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sagellm.runtime.execution_graph.tensors import WeightSource

FILE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
# Tensors that older checkpoints carry although they follow from the configuration.
_DERIVED_ENDINGS = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


def has_checkpoint(folder: Path) -> bool:
    """Whether there are safetensors in the folder."""
    return (folder / INDEX_NAME).is_file() or any(folder.glob("*.safetensors"))


class Checkpoint:
    """The tensors of a folder, by name. Files are opened on first use and mapped, not read.

    Raises ``ValueError``, one sentence that names the file, where the folder has no weights or a file is
    damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, Any] = {}
        self._path_by_name = self._read_index()

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return tuple(self._path_by_name)

    def close(self) -> None:
        """Let go of the mapped files."""
        self._files.clear()

    def check(self, sources: dict[str, WeightSource]) -> None:
        """See that the checkpoint is of the model that is made from ``sources``, before anything is read.

        Raises ``ValueError`` where a tensor is missing, has another shape or is not of floating-point
        numbers, or where there are tensors that the model has no place for.
        """
        missing = [name for name in sources if name not in self._path_by_name]
        if missing:
            raise ValueError(
                f"{self.folder}: tensor {missing[0]} is missing"
                + (f", and {len(missing) - 1} more" if missing[1:] else "")
                + "; the checkpoint must have every tensor of the model that config.json describes"
            )
        for name, source in sources.items():
            self._check_tensor(name, source.shape)
        foreign = [name for name in self._path_by_name if name not in sources and not self._may_be_left(name)]
        if foreign:
            raise ValueError(
                f"{self.folder}: the model that config.json describes has no place for tensor {foreign[0]}"
                + (f" and {len(foreign) - 1} more" if foreign[1:] else "")
                + "; the checkpoint must be of that architecture, and not quantised"
            )

    def fill(self, target: torch.Tensor, source: WeightSource, dim: int, first: int, end: int) -> None:
        """Copy the range ``first : end`` of dimension ``dim`` of a checkpoint's tensor into ``target``."""
        path = self._path_by_name[source.name]
        cut = tuple([slice(None)] * dim + [slice(first, end)])
        try:
            target.copy_(self._open(path).get_slice(source.name)[cut])
        except SafetensorError as error:
            raise ValueError(f"{path}: tensor {source.name} cannot be read ({error}); fetch the file again") from error

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        path = self._path_by_name[name]
        file = self._open(path)
        try:
            found = file.get_slice(name)
        except SafetensorError as error:
            raise ValueError(
                f"{path}: tensor {name} is not in the file, although {INDEX_NAME} says so; fetch the model again"
            ) from error
        if tuple(found.get_shape()) != shape:
            raise ValueError(
                f"{path}: tensor {name} has shape {found.get_shape()}, must be {list(shape)} as config.json says"
            )
        if found.get_dtype() not in _FLOAT_TYPES:
            raise ValueError(
                f"{path}: tensor {name} is of type {found.get_dtype()}, must be one of {', '.join(_FLOAT_TYPES)}"
            )

    @staticmethod
    def _may_be_left(name: str) -> bool:
        """Tied models may carry their output projection all the same."""
        return name.endswith(_DERIVED_ENDINGS) or name == "lm_head.weight"

    def _open(self, path: Path) -> Any:
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = _open_file(path)
        return file

    def _read_index(self) -> dict[str, Path]:
        index = self.folder / INDEX_NAME
        if index.is_file():
            return _names_of_index(index)
        # Some repositories keep the same weights twice, under the names of two projects.
        whole = self.folder / FILE_NAME
        files = [whole] if whole.is_file() else sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"{self.folder}: there are no weights; the folder must hold {FILE_NAME} or {INDEX_NAME} with its "
                "files, or ask for random weights with the load format dummy"
            )
        return {name: path for path in files for name in self._open(path).keys()}  # noqa: SIM118 - it is no dict


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: the file is missing, although {INDEX_NAME} names it; fetch the model again"
        ) from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); fetch it again") from error


def _names_of_index(index: Path) -> dict[str, Path]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: index.parent / file for name, file in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index}: must be JSON with a weight_map from names of tensors to files ({error!r})"
        ) from error
