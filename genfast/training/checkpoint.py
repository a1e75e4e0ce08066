"""Checkpoints of training runs: safetensors files, from which nothing is unpickled."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genfast.training.families import family_of
from genfast.training.run import Run

__all__ = ["load", "load_model", "save"]

_KEY = "genfast"
_FORMAT = 1


def save(run: Run, path: Path | str) -> None:
    """Writes a run, replacing the file in one step.

    The file holds the model's ``state_dict`` under ``model.``, the optimizer's tensors (of an RBM or DBN those of the
    layer in training) under ``optimizer.`` and what standardized the data under ``data.``; its metadata hold, as JSON
    under ``genfast``, the class, its arguments, the options and the epoch.

    Args:
        run: what to write.
        path: of the file; its folder is made where it is missing.

    Raises:
        OSError: where it cannot be written.
    """
    from safetensors.torch import save_file

    tensors = {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in run.optimizer.items()}
    tensors |= {f"data.{name}": t for name, t in (("mean", run.mean), ("std", run.std)) if t is not None}
    about = {
        "format": _FORMAT,
        "options": dataclasses.asdict(run.options),
        **run.about(),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        whole = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        save_file(whole, part, metadata={_KEY: json.dumps(about)})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load(path: Path | str, device: torch.device | str = "cpu") -> Run:
    """Reads what ``save`` wrote.

    Args:
        path: of the file.
        device: where the model is to live.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if it is no safetensors file, or not one of ``save``.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
    if about is None:
        raise ValueError(f"{path} was not written by `genfast train`: its metadata have no {_KEY!r}")
    try:
        return _run(json.loads(about), tensors, device)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged, or of another version of genfast: {reason}") from None


def _run(about: dict[str, Any], tensors: dict[str, Tensor], device: torch.device | str) -> Run:
    if about["format"] != _FORMAT:
        raise ValueError(f"its format is {about['format']!r}, this version reads {_FORMAT}")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in about["options"].items()
    }
    family = family_of(values["model"])
    options = family.options(**values)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "data": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    shape, epoch = about["shape"], int(about["epoch"])
    if epoch < 0:
        raise ValueError(f"it has no epoch {epoch}")
    about = {**about, "shape": None if shape is None else tuple(map(int, shape)), "epoch": epoch}
    run = family.run.restore(options, about, parts, device)
    found = {name: tuple(tensor.shape) for name, tensor in parts["data"].items()}
    if found != ({"mean": (run.columns,), "std": (run.columns,)} if options.standardized else {}):
        raise ValueError("the means and deviations of its data are missing, or not its own")
    return run


def load_model(path: Path | str, device: torch.device | str = "cpu") -> Any:
    """The model of a checkpoint, in evaluation mode.

    Args:
        path: of a file that ``genfast train`` or ``save`` wrote.
        device: where the model is to live.

    Raises:
        FileNotFoundError, ValueError: as ``load``.

    Examples:
        >>> import tempfile, pathlib
        >>> from genfast.data import Rows
        >>> from genfast.training import RBMOptions, save, start
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save(start(RBMOptions(hidden=(4,)), Rows(torch.ones(5, 3), None)), path)
        >>> load_model(path).W.shape
        torch.Size([3, 4])
    """
    return load(path, device).trained.eval()
