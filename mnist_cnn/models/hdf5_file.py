"""The numbers and the JSON in an HDF5 file of Keras.

HDF5 is read by a C library that a damaged file can hang, so a process with limits does it: this file, as a script.
"""

from __future__ import annotations

import io
import re
import resource
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SECONDS, MEMORY = 5, 2**31  # of the processor, and bytes, that reading may take
MAXIMUM_NUMBERS = 2**27


class KerasWeights(NamedTuple):
    """What a file holds: the model's JSON, empty where it is elsewhere, and each place's arrays in Keras's order."""

    config: str
    arrays: dict[str, list[NDArray[np.float32]]]


def read_hdf5(content: bytes) -> KerasWeights:
    """Read a whole HDF5 file.

    Raises:
        ValueError: it is damaged, has links, which may lead to other files, or more numbers than any network.
    """
    script = subprocess.run([sys.executable, "-P", __file__], input=content, capture_output=True)
    if script.returncode < 0:
        raise ValueError("HDF5 crashes on it, or takes too long")
    if script.returncode:
        raise ValueError(script.stderr.decode(errors="replace").strip().rpartition("\n")[2])
    with np.load(io.BytesIO(script.stdout)) as archive:
        whole = dict(archive)
    arrays: dict[str, list[NDArray[np.float32]]] = {}
    config = whole.pop("config").tobytes().decode()
    for name, array in whole.items():
        arrays.setdefault(name.rpartition("/")[0], []).append(array)
    return KerasWeights(config, arrays)


def text(word: Any) -> str:
    return word.decode() if isinstance(word, bytes) else str(word)


def read_stdin() -> None:
    """Write what an HDF5 file from standard input holds to standard output, as an .npz."""
    import h5py

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    found: dict[str, Any] = {}
    with h5py.File(io.BytesIO(sys.stdin.buffer.read()), "r") as file:
        if link := file.visititems_links(lambda name, link: None if isinstance(link, h5py.HardLink) else name):
            raise ValueError(f"{link:.100} is a link, which is not followed")
        file.visititems(found.__setitem__)
        places: dict[str, list[Any]] = {}
        for name, item in found.items():
            if name.startswith("optimizer") or "seed_generator" in name:  # of dropout
                continue
            if isinstance(item, h5py.Group) and "weight_names" in item.attrs:  # .h5
                places[name.removeprefix("model_weights/")] = [item[text(each)] for each in item.attrs["weight_names"]]
            elif "model_config" not in file.attrs and re.search(r"(^|[/\\])vars$", name):  # .keras
                # On Windows, Keras wrote backslashes before 3.0.
                place = re.sub(r"[/\\]?vars$", "", name).replace("\\", "/")
                places[place] = [item[str(number)] for number in range(len(item))]
        every = [dataset for datasets in places.values() for dataset in datasets]
        # Of another kind an item may take gigabytes.
        if strange := [each.name for each in every if each.dtype.kind != "f" or each.is_virtual or each.external]:
            raise ValueError(f"{strange[0]:.100} holds no floating-point numbers of this file")
        if sum(dataset.size for dataset in every) > MAXIMUM_NUMBERS:
            raise ValueError("it has more numbers than any network of this package")
        config = text(file.attrs.get("model_config", ""))
        arrays: dict[str, Any] = {
            f"{place}/{number}": np.asarray(dataset[()], np.float32)
            for place, datasets in places.items()
            for number, dataset in enumerate(datasets)
        }
    np.savez(sys.stdout.buffer, config=np.frombuffer(config.encode(), np.uint8), **arrays)


if __name__ == "__main__":
    try:
        read_stdin()
    except Exception as error:  # h5py has no one error for a damaged file
        sys.exit(f"{' '.join(str(error).split()):.300}")
