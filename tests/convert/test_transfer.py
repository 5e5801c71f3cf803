"""`python -m jaxtron.convert --from .. --to ..`: weights become runs and runs weights, bit for bit."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from jaxtron.checkpoint.storage import PIECE_BYTES
from jaxtron.config import load
from jaxtron.convert import __main__ as convert
from jaxtron.convert import to_hub
from jaxtron.convert.request import parse as parse_upcycle
from jaxtron.evaluate.request import parse as parse_evaluate
from jaxtron.evaluate.tasks_request import parse_tasks
from jaxtron.generate.request import parse as parse_generate
from jaxtron.generate.source import ModelSource, read_model
from jaxtron.models.same import differences
from jaxtron.run.configuration import Configuration
from jaxtron.serve.request import parse as parse_serve
from jaxtron.train import __main__ as training
from tests.hugging_face import fixtures
from tests.support.command_runs import run_here
from tests.support.commands import Ended, run_main
from tests.support.compiling import programs
from tests.support.evaluate_runs import SMALL, figures
from tests.support.tiny_tokenizer import write_tokenizer

NAMES = sorted(path.stem for path in fixtures.FOLDER.glob("*.npz"))
# every table is held both ways in tests/weights too; these have each kind of its rows
SHORT = {
    "llama",
    "gpt2",
    "nemotron",
    "qwen2",
    "phi3",
    "gemma3",
    "gpt_neox",
    "cohere",
    "opt",
    "qwen2_moe",
    "mamba2",
    "deepseek_v3",
}
# what files have in float32 whatever the rest is
WIDE = "e_score_correction_bias"
PARTS = ("model-00001-of-00002", "model-00002-of-00002")


def source(folder: Path, name: str = "llama", dtype: type = np.float32) -> Path:
    """A directory as it is downloaded, in two files, with a tokenizer and what its generation begins with."""
    fixture = fixtures.load(name)
    config = fixture.config | {"dtype": np.dtype(dtype).name, "eos_token_id": [0, 7]}
    weights = {key: array if key.endswith(WIDE) else array.astype(dtype) for key, array in fixture.weights.items()}
    fixtures.write(folder, config, weights, PARTS)
    write_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def moved(*words: object) -> Ended:
    ended = run_main(convert.main, words)
    assert (ended.code, ended.err) == (0, ""), ended
    return ended


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {key: array for path in folder.glob("*.safetensors") for key, array in load_file(path).items()}


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and np.array_equal(first[key], second[key]) for key in first
    )


@pytest.mark.parametrize("name", [one if one in SHORT else pytest.param(one, marks=pytest.mark.slow) for one in NAMES])
def test_every_tensor_comes_back_and_config_says_the_same(name: str, tmp_path: Path):
    hub, run, back = source(tmp_path / "hub", name, ml_dtypes.bfloat16), tmp_path / "run", tmp_path / "back"
    moved("--from", hub, "--to", run, "--data.sequence_length", 16)
    # so that tensors lie in many files
    ended = moved("--from", run, "--to", back, "--shard_size", "3KB")
    assert same(tensors(hub), tensors(back))
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert len(list(back.glob("*.safetensors"))) > 3 and index["weight_map"].keys() == tensors(hub).keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors(hub).values())
    assert "bf16" in ended.out
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (back / file).read_bytes() == (hub / file).read_bytes()
    config = json.loads((back / "config.json").read_text())
    assert config["eos_token_id"] == [0, 7] and config["torch_dtype"] == "bfloat16"
    assert config["model_type"] == fixtures.load(name).config["model_type"]
    # the run of what was written is the run of what was read
    again = tmp_path / "again"
    moved("--from", back, "--to", again, "--data.sequence_length", 16)
    first, second = (load(Configuration, folder / "config.yaml").model for folder in (run, again))
    assert not differences(first, second)
    assert not list(tmp_path.glob(".*"))


# rows of falcon are by group, those of cohere in another order, of mamba2 several parameters'
@pytest.mark.parametrize("name", ["gpt2", "falcon", "cohere", "qwen3_moe", "mamba2"])
def test_arrays_in_pieces(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # a row of a matrix in several
    monkeypatch.setattr("jaxtron.checkpoint.parts.PIECE_BYTES", 500)
    hub, run, back = source(tmp_path / "hub", name), tmp_path / "run", tmp_path / "back"
    moved("--from", hub, "--to", run, "--data.sequence_length", 16)
    moved("--from", run, "--to", back)
    assert same(tensors(hub), tensors(back)) and PIECE_BYTES > 2**20
    assert [path.name for path in back.glob("*.safetensors")] == ["model.safetensors"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights, the run that they became, and a copy of it that was trained on a mesh of eight."""
    folder = tmp_path_factory.mktemp("begun")
    hub = source(folder / "hub")
    moved("--from", hub, "--to", folder / "run", "--data.sequence_length", 16)
    shutil.copytree(folder / "run", folder / "trained")
    # of a model that no class of Hugging Face is
    shutil.copytree(folder / "run", folder / "capped")
    said = yaml.safe_load((folder / "capped" / "config.yaml").read_text())
    said["model"].setdefault("attention", {})["soft_cap"] = 30.0
    (folder / "capped" / "config.yaml").write_text(yaml.safe_dump(said))
    (folder / "text.txt").write_text("a cabbage had a bag. " * 400)
    ended = train(folder, "--train.steps", 2)
    assert ended.code == 0 and "the model is that of step 0" in ended.out, ended
    return folder


def test_text_of_a_run_is_made_as_that_of_its_weights(begun: Path, tmp_path: Path):
    expected = read_model(ModelSource(begun / "hub"))
    assert expected.defaults == {"temperature": 0.6} and expected.eos_token_ids == (0, 7) and expected.is_begun
    moved("--from", begun / "trained", "--to", tmp_path / "back")
    for run in (begun / "run", begun / "trained", tmp_path / "back"):
        found = read_model(ModelSource(run))
        assert (found.defaults, found.eos_token_ids, found.is_begun) == (expected.defaults, (0, 7), True), run
        assert found.chat is not None and Path(str(found.chat.template)).read_text() == "{{ messages }}"
    # numbers of another tokenizer's tokens are others
    other = write_tokenizer(tmp_path / "other", 39)
    found = read_model(ModelSource(begun / "run", ("--data.tokenizer", str(other))))
    assert (found.defaults, found.eos_token_ids, found.is_begun, found.chat) == ({}, (), False, None)


def train(folder: Path, *flags: object) -> Ended:
    mesh = ("--mesh.pipe", 2, "--mesh.tensor", 2, "--mesh.fsdp", 2, "--train.microbatches", 2)
    words = ("--train.global_batch", 8, "--train.precision", "fp32", "--train.sample_tokens", 0)
    places = ("--run.directory", folder / "trained", "--data.path", folder / "text.txt", "--checkpoint.every", 1)
    kept = ("--runtime.compilation_cache", programs())
    return run_here(*map(str, [folder / "trained" / "config.yaml", *mesh, *words, *places, *kept, *flags]))


def test_a_run_is_trained_evaluated_and_goes_on(begun: Path, tmp_path: Path):
    run = begun / "trained"
    first, second = (json.loads(line) for line in (run / "history.jsonl").read_text().splitlines())
    assert first["converted"]["weights"] == str(begun / "hub") and second["step"] == 0
    assert figures(tmp_path, begun / "run", "--text", begun / "text.txt")["step"] == 0
    shutil.copytree(begun, tmp_path / "copy")
    ended = train(tmp_path / "copy", "--train.steps", 3)
    assert ended.code == 0 and "checkpoint of step 2 found: continuing" in ended.out, ended
    # its own settings are fixed from the first step on
    ended = train(tmp_path / "copy", "--train.steps", 4, "--train.trainable", "head.*")
    assert ended.code == 2 and "train.trainable" in ended.err, ended


def test_a_first_training_may_choose_all_but_the_model(begun: Path, tmp_path: Path):
    shutil.copytree(begun / "run", tmp_path / "trained")
    (tmp_path / "text.txt").write_text("a cabbage had a bag. " * 400)
    ended = train(tmp_path, "--model.rotary.base", 5)
    assert ended.code == 2 and "model.rotary.base is 500.0 there and 5.0 here" in ended.err, ended
    flags = ("--train.trainable", "head.*", "--seed", 5, "--optimizer.name", "sgd", "--data.sequence_length", 24)
    ended = train(tmp_path, "--train.steps", 1, *flags)
    assert ended.code == 0, ended
    moved("--from", tmp_path / "trained", "--to", tmp_path / "back", "--dtype", "fp32")
    before, after = tensors(begun / "hub"), tensors(tmp_path / "back")
    assert {key for key in before if not np.array_equal(before[key], after[key])} == {"lm_head.weight"}


def test_any_step_of_a_trained_run(begun: Path, tmp_path: Path):
    run = begun / "trained"
    found = {}
    for step in (1, 2):
        moved("--from", run, "--to", tmp_path / str(step), "--step", step)
        found[step] = tensors(tmp_path / str(step))
    before = tensors(begun / "hub")
    assert before.keys() == found[1].keys() == found[2].keys()
    assert all((found[1][key] != found[2][key]).any() and (before[key] != found[1][key]).any() for key in before)
    moved("--from", run, "--to", tmp_path / "half", "--dtype", "bf16")
    halved = {key: array.astype(ml_dtypes.bfloat16) for key, array in found[2].items()}
    assert same(halved, tensors(tmp_path / "half"))
    # what a run of the export computes
    text = tmp_path / "text.txt"
    text.write_text("a bad cab. " * 30)
    moved("--from", tmp_path / "2", "--to", tmp_path / "again", "--data.sequence_length", 16)
    fp32 = ("--text", text, "--train.precision", "fp32")
    expected, nll = (figures(tmp_path, one, *fp32)["nll"] for one in (run, tmp_path / "again"))
    assert nll == pytest.approx(expected, rel=1e-6)


def refused(*words: object) -> str:
    ended = run_main(convert.main, words)
    assert ended.code == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended
    return ended.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--from", "run", "--to", "hub"), "hub is there already; give a new directory"),
        (("--from", "run", "--to", "text.txt/new"), "no folder that can be written"),
        (("--from", "run", "--to", "new", "--format", "run"), "is a run already"),
        (("--from", "hub", "--to", "new", "--format", "hf"), "is Hugging Face weights already"),
        (("--from", "hub", "--to", "new", "--step", 3), "--step is of an export"),
        (("--from", "hub", "--to", "new", "--shard_size", "1GB"), "--shard_size is of an export"),
        (("--from", "hub", "--to", "new", "--model.dropout", "0.1"), "--model.dropout is not for this command"),
        (("--from", "hub", "--to", "new", "--run.directory", "other"), "give --to"),
        (("--from", "run", "--to", "new", "--seed", 3), "--seed is a setting of training"),
        (("--from", "run", "--to", "new", "--step", 7), "no finished checkpoint of step 7 in"),
        (("--from", "run", "--to", "new", "--shard_size", "5 apples"), "must be a size such as 5GB or 500MB"),
        (("--from", "run", "--to", "new", "--family", "gpt2"), "GPT2LMHeadModel of Hugging Face cannot say model."),
        (
            ("--from", "capped", "--to", "new"),
            "cannot say model.attention.soft_cap 30.0 (only none), and no other class that is known here says all of "
            "it; a run that is trained with --model.attention.soft_cap none is written",
        ),
        (("--from", "text.txt", "--to", "new"), "no directory"),
        (("--from", ".", "--to", "new"), "has neither config.yaml nor config.json"),
        (("--from", "nobody/nothing", "--to", "new"), "nor a repository in Hugging Face's cache"),
        (("--from", "run"), "--to"),
        (("run", "--to", "new"), "unknown subcommand 'run'"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for(
    words: tuple, said: str, begun: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(begun)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    before = sorted(begun.iterdir())
    assert said in refused(*words)
    assert sorted(begun.iterdir()) == before


def test_a_run_that_began_with_nothing(tmp_path: Path):
    (tmp_path / "text.txt").write_text("a cabbage had a bag. " * 400)
    places = {"run.directory": "run", "data.path": "text.txt", "data.cache_directory": "tokens"}
    flags = [word for name, place in places.items() for word in (f"--{name}", str(tmp_path / place))]
    tokenizer = write_tokenizer(tmp_path / "mine", 32)
    words = [*SMALL, *flags, "--data.tokenizer", str(tokenizer), "--train.steps", "1", "--model.vocab_multiple", "24"]
    assert run_main(training.main, words).code == 0
    moved("--from", tmp_path / "run", "--to", tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["eos_token_id"] == 0 and config["n_positions"] == 32
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    # 48 rows are 32 tokens' and padding
    assert tensors(tmp_path / "new")["transformer.wte.weight"].shape == (32, 32)
    assert "max_position_embeddings" not in config


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_numbers_that_do_not_fit_or_are_none(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fixture = fixtures.load("llama")
    fixture.weights["lm_head.weight"][3, 2] = 1e5
    hub = fixtures.write(tmp_path / "hub", fixture.config, fixture.weights)
    write_tokenizer(hub)
    moved("--from", hub, "--to", tmp_path / "run", "--data.sequence_length", 16)
    words = ("--from", tmp_path / "run", "--to", tmp_path / "new", "--dtype", dtype)
    if dtype == "fp16":
        assert "head.table has numbers up to 1e+05, too large for fp16" in refused(*words)
    else:
        check = to_hub._check_numbers
        monkeypatch.setattr(to_hub, "_check_numbers", lambda name, part, *rest: check(name, part * np.nan, *rest))
        assert "has numbers that are not finite" in refused(*words)
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


def test_a_checkpoint_that_is_damaged_or_replaced(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = tmp_path / "run"
    shutil.copytree(begun / "trained", run)
    newest = run / "checkpoints" / "step_00000002"
    opened = to_hub.open_parts

    def replaced(path: Path):
        if path == newest:
            shutil.rmtree(path)
        return opened(path)

    monkeypatch.setattr(to_hub, "open_parts", replaced)
    ended = moved("--from", run, "--to", tmp_path / "new")
    assert "of step 1 of" in ended.out
    first = next((run / "checkpoints" / "step_00000001" / "d").iterdir())
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    said = refused("--from", run, "--to", tmp_path / "other")
    assert "step_00000001 cannot be used: " in said and "checksum" in said
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("what", ["missing", "cut", "shape", "heads"])
def test_files_that_are_not_whole_become_no_run(what: str, tmp_path: Path):
    hub = source(tmp_path / "hub")
    if what == "cut":
        path = hub / f"{PARTS[1]}.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
    else:
        config = json.loads((hub / "config.json").read_text())
        changes = {
            "missing": {"num_hidden_layers": 3},
            "shape": {"intermediate_size": 48},
            "heads": {"num_key_value_heads": 3},
        }[what]
        (hub / "config.json").write_text(json.dumps(config | changes))
    said = refused("--from", hub, "--to", tmp_path / "run", "--data.sequence_length", 16)
    expected = {
        "missing": "needs model.layers.2.",
        "cut": "is no whole file",
        "shape": "and config.json beside it makes",
        "heads": f"{hub}: model.num_heads 4 is not a multiple of model.num_kv_heads 3",
    }
    assert expected[what] in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub"]


def test_a_repository_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "models--some--model-1.5"
    source(folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abd").mkdir()
    moved("--from", "some/model-1.5", "--to", tmp_path / "run", "--data.sequence_length", 16)
    entry = json.loads((tmp_path / "run" / "history.jsonl").read_text())
    assert entry["converted"] == {"weights": str(folder / "snapshots" / "abc"), "given": "some/model-1.5"}
    copy = folder / "snapshots" / "abc"
    assert parse_generate(["some/model-1.5", "--prompt", "a"]).source.directory == copy
    served = parse_serve(["some/model-1.5"])
    assert (served.source.directory, served.name) == (copy, "some/model-1.5")
    assert parse_serve([str(copy)]).name == "abc"
    assert parse_tasks(["some/model-1.5", "--tasks", "x"]).source.directory == copy
    assert parse_evaluate(["some/model-1.5", "--text", "x"]).run == copy
    assert parse_upcycle(["some/model-1.5", "--output", "x"]).dense == copy
    # nobody but `convert` asks the network
    assert parse_evaluate(["some/other", "--text", "x"]).run == Path("some/other")
    words = ["--checkpoint.initialize_from", "some/model-1.5", "--data.sequence_length", 16, "--print_config"]
    ended = run_main(training.main, words)
    assert ended.code == 0 and "hidden_size: 32\n" in ended.out, ended
