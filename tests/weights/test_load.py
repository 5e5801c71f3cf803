"""Parameters from files: on any mesh, of any type, both ways by the same table; and files that are not the model's."""

import errno
import json
import struct
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtron.config import UserError, load
from jaxtron.pipeline.layer_slots import restore
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import RunSession, make_session
from jaxtron.weights import files as weight_files
from jaxtron.weights.files import INDEX, SINGLE
from jaxtron.weights.hub import FAMILIES, hub_settings
from jaxtron.weights.load import load_parameters, partition_of
from jaxtron.weights.rows import write_part
from jaxtron.weights.table import own_shape
from tests.hugging_face import fixtures

READ = sorted(path.stem for path in fixtures.FOLDER.glob("*.npz"))
FIRST, SECOND = "model-00001-of-00002", "model-00002-of-00002"


def session_of(folder: Path, *flags: str, devices: int = 1) -> RunSession:
    """Of a directory's model, on some of the simulated devices."""
    words = ["--data.sequence_length", "16", "--train.global_batch", "16", *flags]
    config = load(Configuration, None, words, under=hub_settings(folder))
    return make_session(config, jax.devices()[:devices], trains=False)


def read(folder: Path, session: RunSession) -> dict[str, np.ndarray]:
    """The parameters by name, layers in the model's order, without padding."""
    with session.use():
        model, specs, partitions = session.config.model, session.blueprint.names, session.trainer.partitions
        params = load_parameters(folder, model, session.blueprint, partitions)
        found = {}
        for (name, spec), leaf in zip(specs.items(), jax.tree.leaves(params), strict=True):
            assert leaf.shape == spec.layout.padded and leaf.dtype == spec.dtype
            own = np.asarray(leaf)[tuple(slice(size) for size in spec.shape)]
            partition = partition_of(name, partitions)
            found[name] = own if partition is None else np.asarray(restore(partition, own))
        return found


@pytest.mark.parametrize("name", READ)
def test_written_back_every_tensor_is_what_it_was(name: str, tmp_path: Path):
    fixture = fixtures.load(name)
    session = session_of(fixtures.write(tmp_path, fixture.config, fixture.weights))
    found, table, model = read(tmp_path, session), FAMILIES[fixture.config["model_type"]].tensors, session.config.model
    written = {key: np.full_like(array, np.nan) for key, array in fixture.weights.items()}
    for key, rows in fixtures.OF_NO_TOKEN.items():
        written.get(key, np.empty(0))[:rows] = 0
    for parameter, array in found.items():
        is_stacked = partition_of(parameter, session.trainer.partitions) is not None
        for row in range(len(array)) if is_stacked else [None]:
            values = array if row is None else array[row]
            place = table.place(model, parameter, row)
            shape = own_shape(place.tensor, model, values.shape)
            assert not values[tuple(slice(size, None) for size in shape)].any()
            there = [written[key] for key in place.tensors]
            # in two parts, as a checkpoint may have it; what is padding has no room
            for starts, part in ((0, values[:3]), (3, values[3:])):
                write_part(place, there, shape, part, (starts, *[0] * (values.ndim - 1)))
    assert all(np.array_equal(written[key], array) for key, array in fixture.weights.items())


def three_layers(folder: Path) -> Path:
    """Llama's with a third layer, in two files of bfloat16."""
    fixture = fixtures.load("llama")
    more = {
        key.replace("layers.1.", "layers.2."): -array for key, array in fixture.weights.items() if "layers.1." in key
    }
    weights = {key: array.astype(ml_dtypes.bfloat16) for key, array in (fixture.weights | more).items()}
    return fixtures.write(folder, fixture.config | {"num_hidden_layers": 3}, weights, (FIRST, SECOND))


@pytest.mark.parametrize(
    "flags",
    [
        # an empty slot on the second stage; heads, vocabulary and the stream's width split
        "--mesh.pipe 2 --mesh.tensor 2 --mesh.fsdp 2 --pipeline.stage_layers 2,1",
        # parts of unequal size have padding
        "--mesh.data 7 --train.global_batch 14",
        "--mesh.pipe 3 --mesh.data 2 --sharding.zero parameters",
    ],
)
def test_parameters_are_the_same_on_every_mesh(flags: str, tmp_path: Path):
    folder = three_layers(tmp_path)
    words = flags.replace("2,1", "2 1").split()
    sizes = [int(words[place + 1]) for place, word in enumerate(words) if word.startswith("--mesh")]
    one = read(folder, session_of(folder))
    many = read(folder, session_of(folder, *words, devices=int(np.prod(sizes))))
    assert one.keys() == many.keys()
    assert all(np.array_equal(one[name], many[name]) for name in one)
    assert one["stack.periods.layers.0.norm.scale"].shape == (3, 32)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_masters_are_float32_whatever_the_file_has(dtype: type, tmp_path: Path):
    fixture = fixtures.load("qwen3")
    whole = fixtures.write(tmp_path / "whole", fixture.config, fixture.weights)
    other = fixtures.write(tmp_path / "other", fixture.config, {k: v.astype(dtype) for k, v in fixture.weights.items()})
    expected, found = (read(folder, session_of(folder)) for folder in (whole, other))
    # small multiples of a sixty-fourth, which all these types have
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_names_of_old_files(tmp_path: Path):
    fixture = fixtures.load("gpt2")
    expected = read(tmp_path / "new", session_of(fixtures.write(tmp_path / "new", fixture.config, fixture.weights)))
    old = {key.removeprefix("transformer."): array for key, array in fixture.weights.items()}
    old |= {f"h.{layer}.attn.bias": np.ones((1, 1, 20, 20), np.float32) for layer in range(2)}
    # a tied head that says the same
    old["lm_head.weight"] = old["wte.weight"]
    session = session_of(fixtures.write(tmp_path / "old", fixture.config, old))
    found = read(tmp_path / "old", session)
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    # or that alone is there
    del old["wte.weight"]
    found = read(fixtures.write(tmp_path / "head", fixture.config, old), session)
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def in_memory(name: str, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors by the names of transformers 5 in memory, where all experts of a layer are in one."""
    names = {"block_sparse_moe": "mlp"} | ({"backbone.": "model."} if name == "nemotron_h_moe" else {})
    for old, new in names.items():
        weights = {key.replace(old, new): array for key, array in weights.items()}
    is_gated = name != "nemotron_h_moe"
    words = ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")[not is_gated :]
    for own in {key.partition(".experts.")[0] for key in weights if ".experts." in key}:
        count = sum(key.startswith(f"{own}.experts.") for key in weights) // len(words)
        *ups, down = (
            np.stack([weights.pop(f"{own}.experts.{number}.{word}.weight") for number in range(count)])
            for word in words
        )
        weights[f"{own}.experts.{'gate_up_proj' if is_gated else 'up_proj'}"] = np.concatenate(ups, 1)
        weights[f"{own}.experts.down_proj"] = down
    return weights


# one of each layout
@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "qwen2_moe",
        "nemotron_h_moe",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("deepseek_v3", "jamba")),
    ],
)
def test_experts_of_a_layer_in_one_tensor(name: str, tmp_path: Path):
    fixture = fixtures.load(name)
    expected = read(tmp_path / "each", session_of(fixtures.write(tmp_path / "each", fixture.config, fixture.weights)))
    weights = in_memory(name, fixture.weights)
    found = read(tmp_path / "one", session_of(fixtures.write(tmp_path / "one", fixture.config, weights)))
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path):
    fixture = fixtures.load("deepseek_v3")
    session = session_of(fixtures.write(tmp_path / "own", fixture.config, fixture.weights))
    expected = read(tmp_path / "own", session)
    # as those of the released model, which has one after its last layer
    further = {
        key.replace("layers.2.", "layers.3."): array for key, array in fixture.weights.items() if "layers.2." in key
    }
    weights = fixture.weights | further | {"model.layers.3.eh_proj.weight": np.ones((32, 64), np.float32)}
    found = read(fixtures.write(tmp_path / "more", fixture.config, weights), session)
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    # a layer like all others is one too many
    fixtures.write(tmp_path / "wrong", fixture.config, fixture.weights | further)
    with pytest.raises(UserError, match=r"has no place for model.layers.3."):
        read(tmp_path / "wrong", session)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """What changes the index."""

    def run(folder: Path) -> None:
        whole = json.loads((folder / INDEX).read_text())
        change(whole["weight_map"])
        (folder / INDEX).write_text(json.dumps(whole))

    return run


def tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """What changes the tensors, all in one file."""

    def run(folder: Path) -> None:
        arrays = load_file(folder / f"{FIRST}.safetensors") | load_file(folder / f"{SECOND}.safetensors")
        for path in folder.glob("model*"):
            path.unlink()
        change(arrays)
        save_file(arrays, folder / SINGLE)

    return run


def second(content: bytes) -> Callable[[Path], object]:
    """Another content of the second file."""
    return lambda folder: (folder / f"{SECOND}.safetensors").write_bytes(content)


def only(name: str) -> Callable[[Path], None]:
    """A file of this name in the place of all."""

    def run(folder: Path) -> None:
        for path in folder.glob("model*"):
            path.unlink()
        (folder / name).write_bytes(b"\x80\x02}q\x00.")

    return run


def cut(folder: Path) -> None:
    path = folder / f"{SECOND}.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def link_to_nowhere(folder: Path) -> None:
    """As the hub's cache has it once its blobs are removed."""
    tensors(lambda arrays: None)(folder)
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to(Path("..") / "blobs" / "abc")


def quantized(folder: Path) -> None:
    """A tensor of 8-bit numbers, which NumPy does not know."""
    tensors(lambda arrays: arrays.update({HEAD: arrays[HEAD].astype(np.uint8)}))(folder)
    path = folder / SINGLE
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    head = content[8 : 8 + size].replace(b'"U8"', b'"F8_E4M3"')
    path.write_bytes(struct.pack("<Q", len(head)) + head + content[8 + size :])


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "up": (index(lambda files: files.update({HEAD: "../other.safetensors"})), "no name of a .safetensors file in"),
    "root": (index(lambda files: files.update({HEAD: "/other.safetensors"})), "no name of a .safetensors file in"),
    "windows": (index(lambda files: files.update({HEAD: "..\\other.safetensors"})), "no name of a .safetensors file"),
    "pickle": (index(lambda files: files.update({HEAD: "pytorch_model.bin"})), "no name of a .safetensors file in"),
    "number": (index(lambda files: files.update({HEAD: 3})), "'lm_head.weight' is in 3: that is no name"),
    "nothing": (index(dict.clear), "is not JSON with a weight_map of tensors"),
    "elsewhere": (
        index(lambda files: files.update({HEAD: f"{SECOND}.safetensors"} | {EMBEDDING: f"{FIRST}.safetensors"})),
        "where it is not",
    ),
    "unnamed": (index(lambda files: files.pop(HEAD)), "has 1 tensor that model.safetensors.index.json does not name"),
    "no list": (lambda folder: (folder / INDEX).write_text("[]"), "is not JSON with a weight_map of tensors"),
    "no index": (lambda folder: (folder / INDEX).unlink(), f"only {FIRST}.safetensors without an index"),
    "no file": (lambda folder: (folder / f"{SECOND}.safetensors").unlink(), f"lacks {SECOND}.safetensors, which"),
    "both": (lambda folder: (folder / SINGLE).write_bytes(b""), "has both model.safetensors and"),
    "cut": (cut, "is no whole file of safetensors: "),
    "empty": (second(b""), "is no whole file of safetensors: "),
    "long": (second(struct.pack("<Q", 2**62) + b"{}"), "is no whole file of safetensors: "),
    "broken link": (link_to_nowhere, "model.safetensors is a link to a file that is not there; bring it back"),
    "page": (second(b"<html>not found</html>"), "is no whole file of safetensors: "),
    "pointer": (second(b"version https://git-lfs.github.com/spec/v1\n"), "is a pointer of Git LFS"),
    "only a pickle": (only("pytorch_model.bin"), "has pytorch_model.bin and no safetensors: that is a pickle"),
    "only parts of one": (only("pytorch_model-00001-of-00002.bin"), "and no safetensors: that is a pickle"),
    "no weights": (only("tokenizer.model"), "has neither model.safetensors nor model.safetensors.index.json; give"),
    "missing": (tensors(lambda arrays: arrays.pop(EMBEDDING)), f"needs {EMBEDDING}, not in its files"),
    "left over": (tensors(lambda arrays: arrays.update(extra=np.zeros(3))), "has no place for extra"),
    "a layer less": (
        tensors(lambda arrays: [arrays.pop(key) for key in list(arrays) if "layers.1." in key]),
        "and 6 more, not in its files",
    ),
    "shape": (tensors(lambda arrays: arrays.update({HEAD: arrays[HEAD][:-1]})), "of shape [39, 32], and config.json"),
    "flat": (tensors(lambda arrays: arrays.update({HEAD: arrays[HEAD].reshape(-1)})), "of shape [1280], and"),
    "whole numbers": (tensors(lambda arrays: arrays.update({HEAD: arrays[HEAD].astype(np.int8)})), "in I8: only F64"),
    "quantized": (quantized, f"has {HEAD} in F8_E4M3: only F64, F32, F16, BF16 are read"),
    "not finite": (
        tensors(lambda arrays: arrays.update({HEAD: np.full((40, 32), np.nan, np.float32)})),
        "has numbers in lm_head.weight that are not finite",
    ),
    "too large": (tensors(lambda arrays: arrays.update({HEAD: np.full((40, 32), 1e300)})), "that are not finite"),
}


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> RunSession:
    """Of Llama's fixture."""
    fixture = fixtures.load("llama")
    return session_of(fixtures.write(tmp_path_factory.mktemp("llama"), fixture.config, {"": np.zeros(1)}))


@pytest.mark.parametrize("what", DAMAGED)
def test_files_that_are_not_the_models(what: str, one_device: RunSession, tmp_path: Path):
    damage, said = DAMAGED[what]
    fixture = fixtures.load("llama")
    # another file holds each second tensor
    damage(fixtures.write(tmp_path, fixture.config, fixture.weights, (FIRST, SECOND)))
    with pytest.raises(UserError) as error:
        read(tmp_path, one_device)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_may_not_be_read_is_not_called_missing(
    one_device: RunSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fixture = fixtures.load("llama")
    fixtures.write(tmp_path, fixture.config, fixture.weights)

    def denied(path: Path, framework: str) -> None:
        monkeypatch.setattr(Path, "open", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
        # so says the library
        raise FileNotFoundError(f"No such file or directory: {path}")

    monkeypatch.setattr(weight_files, "safe_open", denied)
    with pytest.raises(UserError, match="cannot read .*model.safetensors: Permission denied"):
        read(tmp_path, one_device)


def test_a_tied_head_that_says_something_else(tmp_path: Path):
    fixture = fixtures.load("qwen3")
    weights = fixture.weights | {HEAD: fixture.weights[EMBEDDING] + 1}
    folder = fixtures.write(tmp_path, fixture.config, weights)
    with pytest.raises(
        UserError, match=f"has a {HEAD} that is not {EMBEDDING}, and its config.json has tie_word_embedd"
    ):
        read(folder, session_of(folder))


def test_files_may_be_links_as_in_the_hubs_cache(one_device: RunSession, tmp_path: Path):
    fixture = fixtures.load("llama")
    folder = fixtures.write(tmp_path / "snapshot", fixture.config, fixture.weights, (FIRST, SECOND))
    for path in folder.glob("*.safetensors"):
        path.rename(tmp_path / path.stem)
        path.symlink_to(Path("..") / path.stem)
    assert read(folder, one_device)["head.table"].any()


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """A file with a byte that is another, some that are gone, or more, in what describes the tensors."""
    described = 8 + int.from_bytes(content[:8], "little") if content[8:9] == b"{" else len(content)
    place, size = int(random.integers(described)), int(random.integers(1, 20))
    more = [b"9", b"-", b"{", b"}", b"null", b'"', b",", b"1e999", bytes([random.integers(256)])]
    kind = random.integers(4)
    middle = b"" if kind == 0 else more[random.integers(len(more))]
    return content[:place] + middle + (b"" if kind == 3 else content[place + (size if kind == 0 else kind - 1) :])


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_damage_is_told_in_a_line_or_changes_nothing(count: int, tmp_path: Path):
    fixture = fixtures.load("qwen3")
    folder = fixtures.write(tmp_path, fixture.config, fixture.weights, (FIRST, SECOND))
    files = sorted(folder.iterdir())
    session, random, refused = session_of(folder), np.random.default_rng(count), 0
    expected = read(folder, session)
    seen: set[bytes] = {path.read_bytes() for path in files}
    while len(seen) < count + len(files):
        path = files[len(seen) % len(files)]
        content = path.read_bytes()
        if (changed := damaged(content, random)) in seen:
            continue
        seen.add(changed)
        path.write_bytes(changed)
        try:
            found = read(folder, session if path.name != "config.json" else session_of(folder))
            # such as a token's number, or spaces in a head
            assert all(np.array_equal(expected[name], found[name]) for name in expected), path
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(tmp_path) in str(error), error
        path.write_bytes(content)
    assert refused > 0.75 * count
