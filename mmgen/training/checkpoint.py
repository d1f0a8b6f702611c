"""The one checkpoint format: a folder per step that is whole or absent.

    RUN/checkpoints/step-00001000/
        model/*.safetensors      one folder per section (model, ema, optimizer, ...), written by
        ema/*.safetensors        torch.distributed.checkpoint, so any number of ranks can read what any
        optimizer/*.safetensors  number of ranks wrote
        state.json               format, step, whether every value was finite, and the caller's scalars
        complete                 every file with its size in bytes; written last

A checkpoint is written beside its place (`.step-00001000.partial`) and renamed when all of it is on disk. With a
process group every function that touches tensors is collective; without one they work in a single process. No pickle
is written or read. Random state is not kept: draws are keyed by counters (`mmgen.rng`).
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from mmgen.files import sync_folder, write_text
from mmgen.training.optim import Together
from mmgen.training.ranks import barrier, current_rank, distributed, gathered

FORMAT = 1
MARKER = "complete"
_STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")

Tensors = Mapping[str, Any]  # a state dict, nested or flat, with tensors as leaves


def save_checkpoint(
    folder: Path | str,
    step: int,
    tensors: Mapping[str, Tensors],
    scalars: Mapping[str, Any],
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes `<folder>/step-<step>` and returns its path; a checkpoint of the same step is replaced.

    `tensors` holds state dicts by section ("model", "ema", "optimizer", ...); `scalars` is JSON. Ranks exchange in
    `group` (of all of them; None: the one that they have). Raises OSError where the disk refuses (the folder is then
    as before), ValueError where the scalars are no JSON.
    """
    folder = Path(folder)
    target = folder / f"step-{step:08d}"
    beside = folder / f".{target.name}.partial"
    sections = {section: _flatten(state) for section, state in tensors.items()}
    # Every rank takes part in finding out whether all values are finite, before anything is written.
    state = {"format": FORMAT, "step": step, "finite": _all_finite(sections, group), "scalars": dict(scalars)}
    try:
        written_state = json.dumps(state, indent=1)
    except TypeError as error:
        raise ValueError(f"the scalars of a checkpoint must be JSON: {error}") from None
    if current_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*.partial"):  # of a run that was killed while writing
            shutil.rmtree(leftover)
        for section in sections:
            (beside / section).mkdir(parents=True)
    barrier(group)
    for section, state_dict in sections.items():
        try:
            writer = HuggingFaceStorageWriter(str(beside / section), save_distributed=True)
            _quietly(dcp_save, _storable(state_dict), storage_writer=writer, process_group=group)
        except CheckpointException as error:  # a BaseException that carries the failures of all ranks
            cause = next(iter(error.failures.values()))[0]
            if current_rank() == 0:
                shutil.rmtree(beside, ignore_errors=True)
            raise OSError(f"checkpoint {target} could not be written: {cause}") from cause
    barrier(group)
    if current_rank() == 0:
        try:
            write_text(beside / _STATE, written_state)
            sizes = {str(file.relative_to(beside)): file.stat().st_size for file in _files(beside)}
            for section in sections:
                sync_folder(beside / section)
            write_text(beside / MARKER, json.dumps({"files": sizes}, indent=1))
        except OSError:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        _move_into_place(beside, target)
    barrier(group)
    return target


def load_checkpoint(path: Path | str, tensors: Mapping[str, Tensors]) -> dict[str, Any]:
    """Copies the checkpoint at `path` into the given tensors, in place, and returns its scalars.

    Sections that `tensors` leaves out stay unread. Nothing is changed and ValueError says what differs where the
    folder is foreign or damaged, or where names, shapes or types are not exactly those that were stored.
    """
    path = Path(path)
    state = read_state(path)
    readers = {}
    for section, state_dict in tensors.items():
        stored, reader = _read_metadata(path, section)
        _compare(path / section, stored, _flatten(state_dict))
        readers[section] = reader
    for section, state_dict in tensors.items():
        _load(path / section, _flatten(state_dict), readers[section])
    return state["scalars"]


def load_model_weights(path: Path | str, which: str = "ema") -> dict[str, Tensor]:
    """Returns the section `which` ("ema" or "model") of the checkpoint at `path` as CPU tensors by name."""
    path = Path(path)
    read_state(path)
    stored, reader = _read_metadata(path, which)
    weights = {name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in stored.items()}
    _load(path / which, weights, reader)
    return weights


def stored_names(path: Path | str, section: str) -> set[str]:
    """Returns the names of a section's tensors. Raises ValueError as `load_checkpoint` does."""
    path = Path(path)
    read_state(path)
    return set(_read_metadata(path, section)[0])


def read_state(path: Path) -> dict[str, Any]:
    """Returns state.json (`step`, `finite`, `scalars`) after checking that every file is there in its full size."""
    if not (path / MARKER).is_file():
        newest = latest_checkpoint(path) or latest_checkpoint(path / "checkpoints")
        hint = f"; the newest one below it is {newest}" if newest else ""
        raise ValueError(f"{path}: not a finished mmgen checkpoint (it has no file '{MARKER}'){hint}")
    try:
        sizes = json.loads((path / MARKER).read_text())["files"]
        for name, size in sizes.items():
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found != size:
                there = "is missing" if found is None else f"has {found} bytes"
                raise ValueError(
                    f"{path / name}: {there} where {size} bytes were written; the checkpoint is damaged"
                )
        state = json.loads((path / _STATE).read_text())
        if state["format"] != FORMAT:
            raise ValueError(
                f"{path}: checkpoint format {state['format']}; this version reads format {FORMAT}"
            )
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not an mmgen checkpoint ({type(error).__name__}: {error})") from None
    return state


def latest_checkpoint(folder: Path | str) -> Path | None:
    """Returns the finished checkpoint of the highest step in `folder`, or None."""
    return max(_finished(Path(folder)), key=_step, default=None)


def prune(folder: Path | str, keep_last: int, milestones: int = 0) -> list[Path]:
    """Removes old checkpoints and returns what it removed.

    Kept are the last `keep_last`, those at multiples of `milestones` steps (0: none), and always the newest one whose
    values were all finite: after a divergence it is the one to go back to.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, is {keep_last}")
    newest_first = sorted(_finished(Path(folder)), key=_step, reverse=True)
    kept = set(newest_first[:keep_last])
    kept |= {path for path in newest_first if milestones and _step(path) % milestones == 0}
    kept |= set([path for path in newest_first if _is_finite(path)][:1])
    removed = [path for path in newest_first if path not in kept]
    if current_rank() == 0:
        for path in removed:
            (path / MARKER).unlink()  # first, so that a kill in the middle leaves no half that looks whole
            shutil.rmtree(path)
    return removed


def optimizer_state(model: nn.Module, optimizer: Together) -> dict[str, Tensor]:
    """Returns the optimizer's own tensors by name (`state.<parameter>.<quantity>`), not copies of them.

    So loading into them in place restores the optimizer. Its state must exist already (`optim.build_optimizer` makes
    it): torch would make a missing one with a step counter of 1. Hyperparameters are left out: they come from the
    configuration and from the step.
    """
    assert optimizer.state, "the optimizer has no state yet"
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    flat = get_optimizer_state_dict(model, optimizer.parts, options=options)
    return {
        name: value for name, value in flat.items() if isinstance(value, Tensor) and name.startswith("state.")
    }


def _finished(folder: Path) -> list[Path]:
    return [p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and (p / MARKER).is_file()]


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match
    return int(match[1])


def _is_finite(path: Path) -> bool:
    try:
        return read_state(path)["finite"]
    except ValueError:  # damaged: nothing to go back to
        return False


def _flatten(state: Tensors, prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        part = {prefix + key: value} if isinstance(value, Tensor) else _flatten(value, f"{prefix}{key}.")
        assert not flat.keys() & part.keys(), f"two tensors are called {flat.keys() & part.keys()}"
        flat |= part
    return flat


def _storable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, each with memory of its own: safetensors refuses others, such as tied weights."""
    storable: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.detach().contiguous()
        pointer = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).data_ptr()
        storable[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return storable


def _all_finite(sections: Mapping[str, Mapping[str, Tensor]], group: dist.ProcessGroup | None) -> bool:
    finite = True
    for tensor in (t for state in sections.values() for t in state.values()):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        finite = finite and (not local.is_floating_point() or bool(local.isfinite().all()))
    return all(gathered(finite, group))


def _read_metadata(path: Path, section: str) -> tuple[dict[str, TensorStorageMetadata], Any]:
    if not (path / section).is_dir():
        there = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise ValueError(f"{path}: has no section {section!r}; it has {there}")
    reader = HuggingFaceStorageReader(str(path / section))
    try:
        return dict(reader.read_metadata().state_dict_metadata), reader  # pyright: ignore[reportReturnType]
    except SafetensorError as error:
        raise ValueError(f"{path / section}: damaged safetensors file ({error})") from None


def _compare(where: Path, stored: Mapping[str, TensorStorageMetadata], wanted: Mapping[str, Tensor]) -> None:
    """Raises one line that names what differs between the stored tensors and those to fill."""
    missing = [f"{name} {list(wanted[name].shape)}" for name in wanted if name not in stored]
    unexpected = [f"{name} {list(stored[name].size)}" for name in stored if name not in wanted]
    other = []
    for name in (name for name in wanted if name in stored):
        there = (list(stored[name].size), stored[name].properties.dtype)
        here = (list(wanted[name].shape), wanted[name].dtype)
        if there != here:
            other.append(f"{name} {_described(*there)} stored, {_described(*here)} expected")
    found = {"missing": missing, "unexpected": unexpected, "different": other}
    if any(found.values()):
        parts = [f"{len(names)} {kind} ({_some(names)})" for kind, names in found.items() if names]
        raise ValueError(f"{where} does not fit this model: {'; '.join(parts)}")


def _described(shape: list[int], dtype: torch.dtype) -> str:
    return f"{shape} {str(dtype).removeprefix('torch.')}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")


def _load(where: Path, state: Mapping[str, Tensor], reader: Any) -> None:
    try:
        _quietly(dcp_load, dict(state), storage_reader=reader)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise ValueError(f"{where}: cannot be read ({cause})") from cause


def _quietly(call: Callable[..., Any], state: dict[str, Tensor], **arguments: Any) -> None:
    """Runs a DCP call on `state` without its warning that there is no process group (then it is meant)."""
    if not state:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        call(state, no_dist=not distributed(), **arguments)


def _move_into_place(beside: Path, target: Path) -> None:
    if target.exists():
        # Of an earlier run of the same step. A kill between the two renames leaves the step before as the latest.
        replaced = target.with_name(f".{target.name}.replaced.partial")
        target.rename(replaced)
        beside.rename(target)
        shutil.rmtree(replaced)
    else:
        beside.rename(target)
    sync_folder(target.parent)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
