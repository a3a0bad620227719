"""Checkpoints that rebuild themselves: read without running anything they hold."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import FailFast, Field
from torch import Tensor

from mnist_cnn.config.architecture import Architecture
from mnist_cnn.config.data_settings import DataName, Fraction
from mnist_cnn.config.schema import ONE_LINE, Strict, UserError, validated
from mnist_cnn.models.convnet import ConvNet
from mnist_cnn.runs.files import write_whole

FORMAT = 5  # 2 brought the temperature, 3 convolutions without bias, 4 and 5 the parts that Block names, 4 also std
RENAMED = {f"{part}standard_deviation": f"{part}std" for part in ("network.", "")}  # in formats 1 to 3
MANY = 1000  # numbers of a tensor; in smaller ones float16 costs most and saves nothing
MAXIMUM_CHECKED = 2**28  # bytes of a checkpoint whose checksums are compared; more would take seconds
MAXIMUM_DESCRIPTION = 16 * 2**20  # bytes of what is not weights


class TrainedOn(Strict):
    """Which data a checkpoint saw, so that its validation digits can be found again."""

    name: DataName
    validation: Fraction
    validation_from: Literal["last", "random"]
    normalization: Literal["unit", "standard"]
    seed: int
    test: float | None = None  # the fraction of a folder


class Description(Strict):
    """What a checkpoint says of itself, beside the weights: numbers, strings, lists and dicts."""

    format: int
    architecture: Architecture
    classes: list[Annotated[str, Field(pattern=ONE_LINE)]] = Field(min_length=2, max_length=1000)
    data: TrainedOn
    versions: dict[str, str] = Field(max_length=100)
    history: Annotated[list[Annotated[dict[str, float], Field(max_length=50)]], FailFast()] = Field(
        default_factory=list, max_length=100_000
    )
    temperature: float = Field(default=1.0, ge=0.01, le=100)  # the logits are divided by it (Guo et al., 2017)
    unsure_below: float = Field(default=0.0, ge=0, le=1)  # a lower probability is no answer; 0: not tested
    figures: dict[str, float] = Field(default_factory=dict, max_length=100)  # of the packaged checkpoint


PRETRAINED = Path(__file__).parents[1] / "pretrained" / "digits.ckpt"  # made by scripts/pretrain


def find_checkpoint(path: str | Path) -> Path:
    """A `.ckpt` file as it is, the best checkpoint of a run's folder or of `latest`, or the packaged `pretrained`."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise UserError(f"checkpoint={path} is an address: nothing is fetched; download the file and give its path")
    path = {"latest": latest_run, "pretrained": lambda: PRETRAINED}.get(str(path), lambda: Path(path))()
    if path.is_dir():
        best = path / "checkpoints" / "best.ckpt"
        if not best.is_file():
            raise UserError(f"{path} has no checkpoints/best.ckpt: give a run's folder or a .ckpt file")
        return best
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: give a .ckpt file or a run's folder")
    if path.suffix in (".h5", ".hdf5", ".keras"):
        raise UserError(f"{path} is Keras's: mnist-import keras={path} output=model.ckpt makes a checkpoint of it")
    return path


def latest_run() -> Path:
    """The folder of the run below outputs/ that has finished last: `checkpoint=latest`."""
    finished = [file for part in ("train/*", "multirun/*/*") for file in Path("outputs").glob(f"{part}/metrics.json")]
    if not finished:
        raise UserError("checkpoint=latest: there is no finished run below outputs/ here; name a run's folder")
    return max(finished, key=lambda file: file.stat().st_mtime).parent


def read_checkpoint(path: str | Path) -> tuple[dict[str, Any], Description]:
    """The checkpoint's content and its own description, validated; nothing in the file is executed.

    Raises:
        UserError: the file is missing, is cut short, is no checkpoint, or comes from another program.
    """
    path = find_checkpoint(path)
    content = load_plain(path, "checkpoint of this package")
    if not isinstance(content, dict) or not isinstance(content.get("mnist_cnn"), dict) or "state_dict" not in content:
        raise UserError(
            f"{path} comes from another program: it has no description of an mnist_cnn network; "
            "mnist-import torch=FILE.pt takes the weights of a plain PyTorch network"
        )
    return content, read_description(path, content["mnist_cnn"])


def load_plain(path: Path, what: str) -> Any:
    """What torch.save wrote, if it is tensors, numbers, strings, lists and dicts; nothing in the file is executed.

    Raises:
        UserError: the file is no whole one of the kind that `what` names.
    """
    try:
        _refuse_bombs(path)
        # Mapped, a storage cannot be longer than the file, whatever the file says of it.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # torch.load has no one error for a bad file
        first = str(error).strip().splitlines()
        reason = first[0].split(".")[0] if first else type(error).__name__
        raise UserError(f"{path} is not a whole {what} and was not loaded ({reason})") from None


def read_description(path: str | Path, content: Any) -> Description:
    """What a file says of its network, validated."""
    content = content if isinstance(content, dict) else {}
    found = content.get("format")
    if type(found) is not int or not 1 <= found <= FORMAT:
        newer = type(found) is int and found > FORMAT
        by = content.get("versions") if isinstance(content.get("versions"), dict) else {}
        least = f">={by['mnist-cnn']}" if re.fullmatch(r"\d[\w.]{0,20}", str(by.get("mnist-cnn"))) else ""
        remedy = f"install a newer one: pip install 'mnist-cnn{least}'" if newer else "it is no such file"
        raise UserError(f"{path} has format {found!r:.40}; this version reads formats 1 to {FORMAT}: {remedy}")
    try:
        return validated(Description, content)
    except (UserError, RecursionError) as error:
        raise UserError(f"{path} describes no network that can be built: {error!s:.300}") from None


def _refuse_bombs(path: Path) -> None:
    """What torch writes is a zip with everything stored as it is; a file that would swell is none of ours."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise UserError("it is compressed, as torch never writes it")
    if len(records) > 10_000 or sum(record.file_size for record in records) > path.stat().st_size:
        raise UserError("its records are larger than the file")
    if any(r.file_size > MAXIMUM_DESCRIPTION for r in records if not re.search(r"/data/\d+$", r.filename)):
        raise UserError("its description is too large")
    if path.stat().st_size <= MAXIMUM_CHECKED:
        with zipfile.ZipFile(path) as archive:
            if harmed := archive.testzip():
                raise UserError(f"the checksum of its {harmed} differs")


def rebuild(path: str | Path) -> tuple[ConvNet, Description]:
    """The network that a checkpoint describes, with its weights and normalisation figures, on the CPU."""
    content, description = read_checkpoint(path)
    return network_of(path, description, content["state_dict"]), description


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint; it appears under its name when it is whole and on the disk.

    Raises:
        OSError: there is no room, or no such folder; what was there before stays.
    """
    buffer = io.BytesIO()  # torch's own writer to a file has no clear error for a full disk
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())


def save_weights(path: Path, description: Description, network: ConvNet, half: bool = False) -> None:
    """Write a checkpoint of a network's weights, the large tensors in float16 if `half`, and its description."""
    about = {**description.model_dump(), "format": FORMAT}
    state = {f"network.{name}": value.clone() for name, value in network.state_dict().items()}
    if half:
        state = {name: value.half() if value.numel() >= MANY else value for name, value in state.items()}
    save(path, {"state_dict": state, "mnist_cnn": about})


_trusted: set[str] = set()


def trust(modules: Iterable[str]) -> None:
    """Name Python modules of the user's own that layers may come from; for a checkpoint alone none is imported."""
    _trusted.update(modules)


def network_of(path: str | Path, description: Description, state: Any) -> ConvNet:
    """The network of a description with a file's weights, each checked before memory is taken for it.

    Raises:
        UserError: the weights are not those of the network.
    """
    if strange := sorted(description.architecture.own_modules() - _trusted):
        raise UserError(
            f"{path} has layers of a module of your own, and nothing that a checkpoint names is imported by itself: "
            f"name it again, by modules=[{','.join(strange)}]"
        )
    with torch.device("meta"):  # shapes only
        network = ConvNet(description.architecture, len(description.classes))
    expected = network.state_dict()
    try:
        weights = {RENAMED.get(name, name).removeprefix("network."): value for name, value in state.items()}
        if missing := sorted(expected.keys() ^ weights.keys()):
            raise ValueError(f"{missing[0]!s:.100} is missing or too many")
        for name, like in expected.items():
            _check_weight(name, weights[name], like)
        require_numbers(weights)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: its weights do not fit the network that it describes ({error})") from None
    whole = {name: value.to(expected[name].dtype, copy=True) for name, value in weights.items()}
    network.load_state_dict(whole, assign=True)
    return network.to(memory_format=torch.channels_last)


def require_numbers(weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a weight is NaN or infinite, or pixels would be divided by 0."""
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} is not finite")
    if not weights["std"] > 0:
        raise ValueError("std is not greater than 0")


def _check_weight(name: str, value: Any, like: Tensor) -> None:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        raise ValueError(f"{name} is no plain tensor")
    half = value.dtype == torch.float16 and like.dtype == torch.float32
    if value.shape != like.shape or (value.dtype != like.dtype and not half):
        raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}, expected {like.dtype} {tuple(like.shape)}")
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise ValueError(f"{name} has less data than its shape says")
