"""`python -m jaxtron.generate`: texts of a run and of Hugging Face weights, talks, and one line for bad input."""

import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, processors

from jaxtron.config import UserError, load
from jaxtron.data.config import ChatConfig
from jaxtron.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from jaxtron.generate import __main__ as generate
from jaxtron.generate import write as writing
from jaxtron.generate.batch import Batch, GrowingSequence
from jaxtron.generate.chat import ChatPrompts
from jaxtron.generate.opening import of_any_length
from jaxtron.generate.request import parse
from jaxtron.generate.settings import SamplingSettings
from jaxtron.generate.source import read_model
from jaxtron.run.configuration import Configuration
from tests.hugging_face import fixtures
from tests.support.commands import Ended, run_main
from tests.support.evaluate_runs import TrainedRun, train
from tests.support.fake_engine import END, FakeEngine, fake_model
from tests.support.word_models import write_llama


def run(*arguments: object) -> Ended:
    return run_main(generate.main, arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A small run with characters."""
    return train(tmp_path_factory.mktemp("trained"), "the cat sat on a mat and then ran off to see it\n" * 250)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of weights, with a word for each token, of which the first stands before every text."""
    return write_llama(tmp_path_factory.mktemp("llama"))


def test_what_a_directory_of_weights_says_is_what_transformers_computed(llama: Path, tmp_path: Path):
    fixture = fixtures.load("llama")
    prompts = [" ".join(f"w{token}" for token in row) for row in fixture.tokens.tolist()]
    words = ["--prompt", *prompts, "--max_new_tokens", 1, "--temperature", 0, "--logprobs", 5]
    ended = run(llama, *words, "--train.precision", "fp32", "--json", tmp_path / "out.json")
    assert ended.code == 0, ended
    texts = json.loads((tmp_path / "out.json").read_text())["texts"]
    logprobs = np.asarray(jax.nn.log_softmax(fixture.logits[:, -1].astype(np.float32)))
    for row, text in enumerate(texts):
        assert text["prompt_tokens"] == fixture.tokens[row].tolist() and text["finish_reason"] == "length"
        assert text["tokens"] == [int(logprobs[row].argmax())] and text["text"].strip() == f"w{text['tokens'][0]}"
        tokens, values = zip(*text["top_logprobs"][0], strict=True)
        assert list(tokens) == np.argsort(-logprobs[row])[:5].tolist()
        np.testing.assert_allclose(values, np.sort(logprobs[row])[::-1][:5], atol=1e-4)
        np.testing.assert_allclose(text["logprobs"][0], logprobs[row].max(), atol=1e-4)


def test_texts_of_a_run(trained: TrainedRun, tmp_path: Path):
    flags = ("--max_new_tokens", 12, "--seed", 3, "--temperature", 0.7, "--top_k", 5, "--json", tmp_path / "out.json")
    ended = run(trained.directory, "--prompt", "the cat", "on a ma", "--samples", 2, *flags)
    assert ended.code == 0, ended
    texts = json.loads((tmp_path / "out.json").read_text())["texts"]
    assert [text["seed"] for text in texts] == [3, 4, 3, 4] and all(len(text["text"]) == 12 for text in texts)
    assert texts[0]["text"] != texts[1]["text"]
    for number, text in enumerate(texts):
        assert f"--- {number + 1} of 4\n{text['prompt']}{text['text']}\n" in ended.out
    # alone and on another mesh it is the same
    alone = run(trained.directory, "--prompt", "on a ma", *flags, "--mesh.tensor", 2)
    assert alone.code == 0 and alone.out == f"on a ma{texts[2]['text']}\n", alone


def test_sequences_of_a_training_need_not_split_over_tensor():
    for length, tensor, here in ((31, 2, 30), (3, 4, 4), (32, 4, 32)):
        config = load(Configuration, None, ["--data.sequence_length", str(length), "--mesh.tensor", str(tensor)])
        assert of_any_length(config, 2 * tensor).data.sequence_length == here


def test_prompts_of_a_file_with_settings_of_their_own(trained: TrainedRun, tmp_path: Path):
    lines = [{"prompt": "the cat", "max_new_tokens": 2}, {"prompt": "a", "stop": [" "], "temperature": 0}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    ended = run(trained.directory, "--prompts", tmp_path / "p.jsonl", "--max_new_tokens", 20, "--json", tmp_path / "o")
    assert ended.code == 0, ended
    first, second = json.loads((tmp_path / "o").read_text())["texts"]
    assert len(first["tokens"]) == 2 and " " not in second["text"]


def test_a_models_own_defaults_are_told(llama: Path, tmp_path: Path):
    copied = tmp_path / "llama"
    copied.mkdir()
    for file in llama.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    (copied / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_p": 0.9, "eos_token_id": [5, 7], "top_k": 0}'
    )
    model = read_model(parse([str(copied), "--prompt", "x"]).source)
    assert model.told_defaults() == "defaults of the model's generation_config.json: temperature 0.6, top_p 0.9"
    assert model.eos_token_ids == (5, 7) and model.settings(top_p=0.5).top_p == 0.5
    (copied / "generation_config.json").write_text('{"eos_token_id": [-1, 5, true]}')
    assert read_model(parse([str(copied), "--prompt", "x"]).source).eos_token_ids == (5,)
    (copied / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    assert read_model(parse([str(copied), "--prompt", "x"]).source).defaults == {"temperature": 0.0}
    for text, message in (("{", "cannot read"), ("[]", "object"), ('{"temperature": "hot"}', "temperature 'hot'")):
        (copied / "generation_config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_model(parse([str(copied), "--prompt", "x"]).source)


def test_a_beginning_that_the_tokenizer_puts_before_a_text(tmp_path: Path):
    tokenizer = FastTokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "without.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save(str(tmp_path / "with.json"))
    assert HuggingFaceTokenizer(tmp_path / "without.json").prefix == ()
    found = HuggingFaceTokenizer(tmp_path / "with.json")
    assert found.prefix == (0,) and found.encode("a").tolist() == [2]


BAD = [
    ("{run}", "no prompt"),
    ("--prompt a", "no directory"),
    ("nowhere --prompt a", "no directory nowhere"),
    ("{run} --prompt a --temperature -1", "--temperature -1 must be from 0"),
    ("{run} --prompt a --top_p 2", "--top_p 2 must be from 0 to 1"),
    ("{run} --prompt a --temperature nan", "must be a number"),
    ("{run} --prompt a --top_k -1", "whole number"),
    ("{run} --prompt a --logit_bias x", "must be ID=NUMBER"),
    ("{run} --prompt a --logit_bias 3=1 3=2", "token 3 twice"),
    ("{run} --prompt a --logit_bias 99=1", "token 99"),
    ("{run} --prompt a --logprobs 2", "--json"),
    ("{run} --prompt a --system x", "--chat"),
    ("{run} --chat --json o.json", "--json has no effect"),
    ("{run} --prompt a --chat", "no chat template"),
    ("{run} --prompt a --model.hidden_size 3", "the model's own"),
    ("{run} --prompt a --min_new_tokens 5 --max_new_tokens 2", "more than max_new_tokens"),
    ("{run} --prompt a --room 1", "room"),
    ("{run} --prompt Ж", "U+0416"),
    ("{run} --prompt a\udcff", "--prompt has half a character"),
    ("{run} --prompt a --chat --system \udcff", "--system has half a character"),
    ("{run} --prompts nowhere.jsonl", "cannot read --prompts"),
    ("{run} --prompt a --rows 0", "above 0"),
    ("{run} --prompt a --step 9", "9"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line for line, _ in BAD])
def test_bad_lines(trained: TrainedRun, line: str, message: str):
    ended = run(*line.format(run=trained.directory).split())
    assert ended.code == 2 and message in ended.err and ended.err.count("\n") == 1, ended


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x", "an object"),
        ("{}", "an object"),
        ('{"prompt": 5}', "a text"),
        ('{"prompt": "a \\ud800"}', "line 1 has half a character"),
        ('{"prompt": "a", "messages": []}', "an object"),
        ('{"prompt": "a", "temprature": 1}', "'temprature'"),
        ('{"prompt": "a", "top_p": "x"}', "top_p 'x'"),
        ('{"messages": [1]}', "list of objects"),
        ("", "no prompts"),
    ],
)
def test_bad_lines_of_a_file(trained: TrainedRun, line: str, message: str, tmp_path: Path):
    (tmp_path / "p.jsonl").write_text(line + "\n")
    ended = run(trained.directory, "--prompts", tmp_path / "p.jsonl")
    assert ended.code == 2 and message in ended.err and "p.jsonl" in ended.err, ended


def test_lines_of_a_file_end_where_json_does(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b\x85"}\r\n\r\n{"prompt": "c"}'.encode())
    request = parse([str(tmp_path), "--prompts", str(path)])
    assert [wanted.shown for wanted in writing.read_wanted(request)] == ["a\u2028b\x85", "c"]


def test_more_sequences_than_rows_wait_their_turn():
    engine = FakeEngine(rows=2)
    model, batch, found = fake_model(engine), Batch(engine), {}
    wanted = []
    for number, letter in enumerate(b"aklwxm"):
        settings = SamplingSettings(seed=0, max_new_tokens=3 + number % 2, eos_token_ids=(END,))
        prompt = np.array([letter], np.int32)
        found[number] = []
        wanted.append(GrowingSequence(prompt, settings, model.stream(prompt, settings), found[number].append))
        batch.add(wanted[-1])
    batch.step()
    batch.drop(wanted[1])
    batch.drop(wanted[3])
    while batch.is_busy:
        batch.step()
    texts = ["".join(grown.text for grown in found[number]) for number in found]
    assert texts == ["bcd", "l", "mno", "", "yz", "nopq"] and engine.most_at_once == 2 and not engine.there


def test_a_talk_at_the_terminal(monkeypatch, capsys):
    engine = FakeEngine(room=200)
    request = parse([str(Path(__file__).parent), "--chat", "--system", "be brief", "--max_new_tokens", "3"])
    assert request.is_conversation
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n<|im_end|>\nmore\n"))
    writing.talk(fake_model(engine), request)
    told = capsys.readouterr()
    assert told.out == "> abc\n> > > abc\n> \n" and "would forge a turn" in told.err
    assert engine.num_steps == 6
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    writing.talk(fake_model(engine), request)
    assert "no UTF-8" in capsys.readouterr().err and engine.num_steps == 6


def test_an_answer_cannot_steer_the_terminal(monkeypatch, capsys):
    for is_terminal, shown in ((False, "a\x1b[2J\tb\u200d\x9b\n"), (True, "a\ufffd[2J\tb\u200d\ufffd\n")):
        monkeypatch.setattr("sys.stdout.isatty", lambda is_terminal=is_terminal: is_terminal)
        writing._print_part("a\x1b[2J\tb\u200d\x9b\n")
        assert capsys.readouterr().out == shown


def test_conversations_as_prompts(tmp_path: Path):
    chat = ChatPrompts(ChatConfig(), ByteTokenizer())
    ids = chat.encode([{"role": "user", "content": "hi"}])
    assert bytes(ids.tolist()) == b"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    # bytes have no token for it, so a text ends the turn
    assert chat.ending(SamplingSettings(stop=("x",))).stop == ("x", "<|im_end|>")
    with pytest.raises(UserError, match="no chat template"):
        ChatPrompts(None, ByteTokenizer())
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[A]{% endif %}"
        "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    )
    chat = ChatPrompts(ChatConfig(template=str(tmp_path / "t.jinja")), ByteTokenizer())
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]
    assert bytes(chat.encode(turns).tolist()) == b"[user]q[assistant]a[user]r[A]"
    for messages, message in (
        ([], "empty"),
        ([{"role": "tool", "content": "x"}], "no tools"),
        ([{"role": "user"}], r"messages\[0\].content"),
        ([{"role": "user", "content": "\ud800"}], r"messages\[0\].content has half a character"),
        ([{"role": "user", "content": "x", "name": "y"}], "does not read it"),
    ):
        with pytest.raises(UserError, match=message):
            chat.encode(messages)
    assert "add_generation_prompt" in chat.source
