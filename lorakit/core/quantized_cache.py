"""Quantized bases kept on disk: the next run over the same base, quantized in the same way, makes its layers of what is
there instead of reading 16-bit weights and rounding them again.

One safetensors file a decoder layer, with the tensors of each of its quantized layers. Embeddings, norms, biases and
matrices that stay in 16 bits are the base's own, and not kept twice. A whole artifact is never replaced, so that it can
be read without its lock; one that is damaged is made anew.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from lorakit.core import artifacts, disk
from lorakit.core.calibration import Calibration
from lorakit.core.environment import cache_folder
from lorakit.core.errors import ArtifactDamaged, Busy, DiskFailed, InputRefused, disk_failed
from lorakit.core.events import Notice, Report
from lorakit.core.quantization import Quantizing, from_stored, linear_layers, stored, stored_as
from lorakit.core.weights import TensorPlace, read_header

if TYPE_CHECKING:
    from lorakit.core.config import StepConfig

_KIND = "quantized base"
_FORMAT = 1
"""To be raised with every change of what is kept, and of which codes quantization or calibration give."""
_LAYER = re.compile(r"(.*?\.\d+)\..*")


@dataclass
class QuantizedCache:
    """Where a base's quantized layers are found and kept. `base` is the base's fingerprint; `gather` tells a value to
    all processes of a run, which take the same way: the kernels of other devices may round otherwise."""

    config: "StepConfig"
    base: str
    gather: Callable[[Any], list[Any]]
    report: Report
    was_found: bool = False

    def find(
        self, model: PreTrainedModel, how: Quantizing, device: torch.device, calibration: Calibration | None
    ) -> "Kept | None":
        """What is kept of a base that was quantized just so, whole; and into `calibration`, what came out. None where
        there is nothing, or nothing that can be read, which is said."""
        folder, kept = self._folder(how, device, calibration), None
        try:
            kept = _opened(folder, model, how, calibrated=calibration is not None)
        except InputRefused:
            pass
        except (ArtifactDamaged, DiskFailed) as error:
            self.report(Notice(f"the cached base in {how.kind} is passed over, and made anew: {error.message}"))
            with contextlib.suppress(Busy, InputRefused, DiskFailed), artifacts.lock(folder):
                try:
                    _opened(folder, model, how, calibrated=calibration is not None)  # another process was faster
                except ArtifactDamaged:
                    artifacts.remove(folder)
        self.was_found = all(self.gather(kept is not None))
        if kept is None or not self.was_found:
            return None
        if calibration is not None:
            calibration.exact_loss, calibration.quantized_loss = kept.losses
            calibration.errors, calibration.kept = kept.errors, kept.exact
            calibration.unmeasured, calibration.recoded = kept.unmeasured, kept.recoded
        return kept

    def keep(
        self, model: PreTrainedModel, how: Quantizing, device: torch.device, calibration: Calibration | None
    ) -> None:
        """Keep a base's quantized layers, unless another process does. Where the disk can't, that is said."""
        folder, facts = self._folder(how, device, calibration), _facts(calibration)
        if facts is None:
            return
        layers = {name: tensors for name, module in model.named_modules() if (tensors := stored(module))}
        needed_bytes = sum(tensor.nbytes for tensors in layers.values() for tensor in tensors.values())
        parents = {"base": self.base, **({"calibration tokens": calibration.batch} if calibration is not None else {})}
        try:
            with artifacts.lock(folder):
                if _is_whole(folder):
                    return
                disk.require_free_bytes(folder, needed_bytes)
                files = _files(layers)
                artifacts.commit(folder, _KIND, files, config=self.config, parents=parents, facts=facts)
        except Busy:
            return
        except DiskFailed as error:
            self.report(Notice(f"the base in {how.kind} isn't kept in the cache: {error.message}"))
        else:
            self.report(Notice(f"the base in {how.kind} is kept in {folder} ({needed_bytes / 2**20:,.0f} MiB)"))

    def _folder(self, how: Quantizing, device: torch.device, calibration: Calibration | None) -> Path:
        nested = how.double_quantization and how.kind in ("nf4", "fp4")
        quantizing = [how.kind, str(how.dtype), how.by_rows, nested, device.type]
        tokens = [calibration.batch, calibration.compensates] if calibration is not None else None
        key = artifacts.fingerprint([artifacts.FORMAT, _FORMAT, self.base, quantizing, tokens])
        return cache_folder() / "quantized" / key[:16]


@dataclass(frozen=True)
class Kept:
    """The quantized layers of a base on disk, checked to be those of the model. `exact` names the matrices that stay in
    16 bits."""

    folder: Path
    places: dict[str, TensorPlace]
    losses: tuple[float, float]
    """Of the exact base and the quantized one."""
    errors: dict[str, float]
    exact: list[str]
    unmeasured: list[str]
    recoded: int

    def put_into(self, model: PreTrainedModel, where: str, how: Quantizing, device: torch.device) -> None:
        """As `quantize_layers` does it, without touching the weights of linear layers. Raises DiskFailed."""
        for name, linear in linear_layers(model, model.get_submodule(where)).items():
            whole = ".".join(part for part in (where, name) if part)
            if whole in self.exact:
                continue
            tensors = {}
            for part in stored_as(linear, how):
                path = self.folder / self.places[f"{whole}.{part}"].shard
                try:
                    with safe_open(path, "pt") as file:
                        # in memory of its own: the file may be removed, and its tensors begin anywhere
                        tensors[part] = file.get_tensor(f"{whole}.{part}").to(device, copy=True)
                except OSError as error:
                    raise disk_failed(error, path) from error
            model.set_submodule(whole, from_stored(linear, how, tensors, device))


def _opened(folder: Path, model: PreTrainedModel, how: Quantizing, *, calibrated: bool) -> Kept:
    """Raises InputRefused where there is none, ArtifactDamaged, DiskFailed."""
    artifact = artifacts.open_artifact(folder, _KIND)
    places: dict[str, TensorPlace] = {}
    for file in artifact.manifest["files"]:
        if file.endswith(".safetensors"):
            places |= read_header(folder / file)
    layers = linear_layers(model, model)
    try:
        facts = artifact.facts
        losses, errors, exact = (nan := float("nan"), nan), {}, []
        unmeasured, recoded = [], 0
        if calibrated:
            losses = float(facts["exact_loss"]), float(facts["quantized_loss"])
            errors = {name: float(facts["errors"][name]) for name in facts["errors"] if name in layers}
            exact, unmeasured = ([name for name in facts[kind] if name in layers] for kind in ("kept", "unmeasured"))
            recoded = int(facts["recoded"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, f"facts that aren't those of calibration ({error})", "those") from None
    wanted = {
        f"{name}.{part}": each
        for name, layer in layers.items()
        if name not in exact
        for part, each in stored_as(layer, how).items()
    }
    if (found := {name: (place.dtype, place.shape) for name, place in places.items()}) != wanted:
        other = next(name for name in (*wanted, *found) if found.get(name) != wanted.get(name))
        raise _damaged(folder, f"{other} {found.get(other)}", str(wanted.get(other)))
    return Kept(folder, places, losses, errors, exact, unmeasured, recoded)


def _damaged(folder: Path, found: str, needed: str) -> ArtifactDamaged:
    return ArtifactDamaged(f"{folder}: found {found}, need {needed}", f"remove {folder}")


def _is_whole(folder: Path) -> bool:
    """Whether another process has made it by now."""
    try:
        artifacts.open_artifact(folder, _KIND)
    except (InputRefused, ArtifactDamaged):
        return False
    return True


def _facts(calibration: Calibration | None) -> dict[str, Any] | None:
    """What came out; None where that is no number, and the run won't come far, and where more memory would have made
    another base."""
    if calibration is None:
        return {}
    if calibration.out_of_memory:
        return None
    losses = {"exact_loss": calibration.exact_loss, "quantized_loss": calibration.quantized_loss}
    if not all(math.isfinite(number) for number in (*losses.values(), *calibration.errors.values())):
        return None
    found = {"errors": calibration.errors, "kept": calibration.kept, "unmeasured": calibration.unmeasured}
    return {**losses, **found, "recoded": calibration.recoded}


def _files(layers: dict[str, dict[str, torch.Tensor]]) -> Iterator[tuple[str, bytes]]:
    """A file a decoder layer, and one for all that is in none; made one after the other."""
    together: dict[str, list[str]] = {}
    for name in layers:
        inside = _LAYER.fullmatch(name)
        together.setdefault(inside[1] if inside else "others", []).append(name)
    for file, names in together.items():
        tensors = {
            f"{name}.{part}": tensor.detach().to("cpu", copy=True).contiguous()
            for name in names
            for part, tensor in layers[name].items()
        }
        yield f"{file}.safetensors", safetensors.torch.save(tensors)
