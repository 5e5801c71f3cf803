"""What a pickle says is never run: no import, no look-up, no call, whatever it is made of."""

import functools
import io
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtron.config import UserError
from jaxtron.weights.megatron import pickles
from jaxtron.weights.megatron.directory import METADATA
from jaxtron.weights.megatron.files import open_checkpoint
from jaxtron.weights.megatron.pickles import Global, PickledRecord, PickleReader, TensorRecord
from jaxtron.weights.megatron.torch_file import open_torch_file
from tests.megatron.writer import Call, Name, Reference, named, pickled, torch_old, torch_zip
from tests.weights.megatron.models import ARGS, saved_by_ranks, saved_distributed, whole_tensors


class Reduced:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.made = (function, arguments)

    def __reduce__(self):
        return self.made


def attacks(canary: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that write a file where they are loaded, and the name that each begins with."""
    touch = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w').close()"
    module = "posix" if os.name == "posix" else "nt"
    values = {
        "os.system": (Reduced(os.system, touch), f"{module}.system"),
        "eval": (Reduced(eval, code), "eval"),
        "exec": (Reduced(exec, code), "exec"),
        "subprocess": (Reduced(subprocess.call, touch, 0, None, None, None, None, None, True), ".call"),
        "partial": (Reduced(functools.partial(os.system, touch)), "functools.partial"),
        "partial of partial": (
            Reduced(functools.partial(functools.partial(os.system), touch)),
            "functools.partial",
        ),
        "getattr": (Reduced(getattr, "", "join"), "getattr"),
        "open": (Reduced(io.open, str(canary), "w"), "open"),
        "in a list": ([1, {"a": (Reduced(os.system, touch),)}], f"{module}.system"),
        "of numpy": (Reduced(np.load, str(canary)), "numpy"),
    }
    return {name: (pickle.dumps(value, 2), said) for name, (value, said) in values.items()}


WRITTEN: dict[str, tuple[bytes, str]] = {
    # of torch's own, which load further pickles or code
    "torch.load": (pickled(Call(Name("torch", "load"), ("x.pt",))), "torch.load"),
    "torch.hub": (pickled(Call(Name("torch.hub", "load"), ("a/b", "c"))), "torch.hub.load"),
    "torch.jit": (pickled(Call(Name("torch.jit", "load"), ("x",)), 4), "torch.jit.load"),
    "storage loads": (
        pickled(Call(Name("torch.storage", "_load_from_bytes"), (b"x",))),
        "torch.storage._load_from_bytes",
    ),
    "packages": (pickled(Call(Name("torch.package", "PackageImporter"), ("x",))), "torch.package.PackageImporter"),
    # by a path within what is known
    "attributes": (pickled(Name("argparse", "Namespace.__init__"), 4), "argparse.Namespace.__init__"),
    "near a name": (pickled(Name("argparse", "_sys.modules"), 4), "argparse._sys.modules"),
    "near a package": (pickled(Name("megatron", "os.system"), 4), "megatron.os.system"),
    "copyreg": (b"\x80\x02ccopyreg\n_reconstructor\n(cos\nsystem\ntR.", "copyreg._reconstructor"),
    "old form of instances": (b"(S'id'\nios\nsystem\n.", "is no whole pickle: byte"),
    "old form of objects": (b"(cos\nsystem\nS'id'\no.", "os.system"),
    "extensions": (b"\x80\x02\x82\x01.", "is no whole pickle: byte 2 is no operation"),
    "names of no text": (b"\x80\x04K\x01K\x02\x93.", "a name is no text"),
}


NAMES = list(attacks(Path("canary")))


@pytest.mark.parametrize("form", ["pickle", "zip", "old", "metadata", "rank", "common"])
@pytest.mark.parametrize("name", NAMES)
def test_pickles_that_run_code_are_refused_and_run_nothing(name: str, form: str, tmp_path: Path):
    canary = tmp_path / "canary"
    data, said = attacks(canary)[name]
    # they do where they are loaded as usual
    if form == "pickle" and name in ("os.system", "eval", "partial", "in a list"):
        pickle.loads(data)
        assert canary.exists()
        canary.unlink()
    modules = set(sys.modules)
    with pytest.raises(UserError) as error:
        open_in(form, data, tmp_path)
    assert said in str(error.value) and "nothing of it was run" in str(error.value) and "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value) and not canary.exists()
    # of names in archives
    assert {name for name in set(sys.modules) - modules if not name.startswith("encodings.")} == set()


def open_in(form: str, data: bytes, folder: Path) -> None:
    """Reads a pickle where a checkpoint has one."""
    path = folder / "file.pt"
    if form == "pickle":
        PickleReader(data, str(path)).load()
    elif form == "zip":
        path.write_bytes(_zip_of(data))
        open_torch_file(path)
    elif form == "old":
        whole = torch_old(1)
        path.write_bytes(whole.replace(pickled(1), data, 1))
        open_torch_file(path)
    elif form == "rank":
        checkpoint = saved_by_ranks(folder / "run", ARGS, whole_tensors(ARGS), tensor=2)
        (checkpoint / "iter_0000007" / "mp_rank_01" / "model_optim_rng.pt").write_bytes(_zip_of(data))
        open_checkpoint(checkpoint)
    else:
        checkpoint = saved_distributed(folder / "run", ARGS, whole_tensors(ARGS), common=form == "common")
        name = METADATA if form == "metadata" else "common.pt"
        (checkpoint / name).write_bytes(data if form == "metadata" else _zip_of(data))
        open_checkpoint(checkpoint)


def _zip_of(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return out.getvalue()


@pytest.mark.parametrize("name", WRITTEN)
def test_names_that_are_not_on_the_list(name: str):
    data, said = WRITTEN[name]
    with pytest.raises(UserError) as error:
        PickleReader(data, "file.pt").load()
    assert said in str(error.value) and "\n" not in str(error.value)


def test_attributes_are_set_of_records_alone():
    # a class of Megatron-LM is a name: what it is given stays with this one
    value = PickleReader(pickled(named("megatron.core.enums", "Model", __class__="x", __init__=1)), "file").load()
    assert type(value) is PickledRecord and value.attributes == {"__class__": "x", "__init__": 1}
    assert type(PickledRecord("", ())).__init__ is PickledRecord.__init__
    for target in (Name("argparse", "Namespace"), "text", 1, (1,)):
        data = b"\x80\x02" + pickled(target)[2:-1] + pickled({"a": 1})[2:-1] + b"b."
        with pytest.raises(UserError, match="attributes are set of"):
            PickleReader(data, "file").load()
    # calls of what is no name
    for function in ("text", 1, named("argparse", "Namespace", a=1)):
        data = b"\x80\x02" + pickled(function)[2:-1] + b")R."
        with pytest.raises(UserError, match="what it calls is no function"):
            PickleReader(data, "file").load()


def test_nothing_here_imports_what_loads_pickles():
    folder = Path(pickles.__file__).parent
    for path in folder.glob("*.py"):
        text = path.read_text()
        for word in (
            "import pickle",
            "from pickle",
            "import torch",
            "__import__",
            "importlib",
            "eval(",
            "exec(",
            "marshal",
        ):
            assert word not in text, (path, word)


@pytest.mark.parametrize("protocol", range(1, 6))
def test_plain_values_are_those_of_pickle(protocol: int):
    shared: list[Any] = [1, "é\ud800"]
    value = {
        "none": None,
        "flags": [True, False],
        "numbers": [0, 1, -1, 255, 256, 65535, 65536, -(2**31), 2**31, 2**63, -(2**63), 10**30, 0.5, float("inf")],
        "texts": ["", "a" * 300, "x" * 70000, shared, shared],
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "sets": {1, 2} if protocol >= 4 else None,
        "frozen": frozenset({"a"}) if protocol >= 4 else None,
        "bytes": b"x" * 300 if protocol >= 3 else None,
        ("key", 1): {},
        **{str(number): number for number in range(300)},
    }
    data = pickle.dumps(value, protocol)
    assert PickleReader(data, "file").load() == value
    assert PickleReader(pickletools.optimize(data), "file").load() == value


def test_what_is_no_list_of_a_memo():
    # a place so large that a list of that length would fill memory
    data = b"\x80\x02K\x01r\xff\xff\xff\xff0j\xff\xff\xff\xff."
    assert PickleReader(data, "file").load() == 1
    with pytest.raises(UserError, match="refers to value 7, which is not there"):
        PickleReader(b"\x80\x02h\x07.", "file").load()
    # keys that take forever to compare: tuples of tuples, each twice the one before
    nested = b"\x80\x02)" + b"q\x00h\x00\x86" * 64
    with pytest.raises(UserError, match="a key is tuple"):
        PickleReader(nested + b"q\x01}h\x01K\x01s.", "file").load()
    # lengths beyond the end
    for data in (
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x02X\xff\xff\xff\xff",
    ):
        with pytest.raises(UserError, match="it ends early"):
            PickleReader(data, "file").load()


def test_tensors_are_records_of_where_numbers_are():
    reference = Reference(("storage", Name("torch", "HalfStorage"), "3", "cuda:1", 12))
    made = Call(Name("torch._utils", "_rebuild_tensor_v2"), (reference, 2, (2, 3), (3, 1), False, None))
    found = PickleReader(pickled(made), "file").load()
    assert type(found) is TensorRecord and (found.offset, found.shape, found.stride) == (2, (2, 3), (3, 1))
    assert (found.numbers.key, found.numbers.dtype, found.numbers.count) == ("3", "F16", 12)
    assert PickleReader(pickled(Name("torch", "float32")), "file").load() == Global("torch.float32")
    for wrong in (
        (reference, -1, (2,), (1,)),
        (reference, 0, (2, 3), (1,)),
        (1, 0, (2,), (1,)),
        (reference, 0, ("a",), (1,)),
    ):
        with pytest.raises(UserError, match="is no whole pickle"):
            PickleReader(pickled(Call(Name("torch._utils", "_rebuild_tensor_v2"), wrong)), "file").load()


def test_archives_that_are_compressed_are_not_opened(tmp_path: Path):
    path, out = tmp_path / "bomb.pt", io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 10**6 + b"N.")
    path.write_bytes(out.getvalue())
    with pytest.raises(UserError, match="data.pkl is compressed"):
        open_torch_file(path)
    path.write_bytes(torch_zip({"a": 1}).replace(b"little", b"bigbig"))
    with pytest.raises(UserError, match="Bad CRC-32|order of bytes of other machines"):
        open_torch_file(path)
