"""Conversations as a user gives them: settings, files and a tokenizer, to samples and what is said of them."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, processors

from jaxtron.config import UserError, load
from jaxtron.data.config import DataConfig
from jaxtron.data.dataset import open_data
from jaxtron.run.configuration import Configuration
from jaxtron.train.__main__ import main as train
from jaxtron.train.run import announce
from jaxtron.train.setup import Run
from tests.support.commands import run_main
from tests.support.tokenizer_files import write_model, write_ranks

ROOT = Path(__file__).parents[2]
PLAIN = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
PROMPTED = PLAIN + "{% if add_generation_prompt %}[assistant]{% endif %}"


def turn(role, content, **further):
    return {"role": role, "content": content} | further


def talk(question, answer, **further):
    return {"messages": [turn("user", question), turn("assistant", answer)]} | further


@pytest.fixture
def make(tmp_path):
    """Data of lines with settings of `data` and `data.chat`."""

    def open_lines(lines, chat=None, template=None, **settings):
        path = tmp_path / "talks.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        chat = dict(chat or {})
        if template is not None:
            (tmp_path / "chat.jinja").write_text(template)
            chat["template"] = str(tmp_path / "chat.jinja")
        settings = {"sequence_length": 256, "validation_fraction": 0, "chat": chat} | settings
        config = {"path": str(path), "format": "chat", "cache_directory": str(tmp_path / "cache")} | settings
        return open_data(DataConfig.model_validate(config), seed=0)

    return open_lines


def write_fast(folder, declared=None, special=("<s>", "</s>", "<stop>")):
    """Characters as a tokenizer.json, with three special tokens and what tokenizer_config.json says of them."""
    vocabulary = {character: number for number, character in enumerate("abcdefghijklmnopqrstuvwxyz[]?")}
    fast = FastTokenizer(models.WordLevel(vocabulary, unk_token="?"))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast.add_special_tokens(list(special))
    folder.mkdir()
    fast.save(str(folder / "tokenizer.json"))
    if declared is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(declared))
    return str(folder)


def answers_of(data):
    """The ids of all answers."""
    samples = [data.train[number] for number in range(len(data.train))]
    return np.concatenate([sample.targets[sample.weights > 0] for sample in samples]).tolist()


def said(data):
    """All answers' text."""
    return data.tokenizer.decode(np.array(answers_of(data)))


@pytest.mark.parametrize("kind", ["tokenizer.json", "declared", "sentencepiece", "tiktoken", "bytes"])
def test_the_end_that_a_template_writes_is_the_tokenizers_and_is_learned(make, tmp_path, kind):
    names = {
        "tokenizer.json": lambda: write_fast(tmp_path / "fast"),
        "declared": lambda: write_fast(tmp_path / "declared", {"bos_token": "<s>", "eos_token": {"content": "<stop>"}}),
        "sentencepiece": lambda: str(write_model(tmp_path / "m.model")),
        "tiktoken": lambda: str(write_ranks(tmp_path / "r.tiktoken")),
        "bytes": lambda: "bytes",
    }
    data = make([talk("hi", "yo")], template=PROMPTED, tokenizer=names[kind]())
    ids = answers_of(data)
    assert said(data).replace(" ", "") == "yo" and ids[-1] == data.tokenizer.end_of_document
    assert data.tokenizer.end_of_document not in ids[:-1]


@pytest.mark.parametrize("kind", ["tokenizer.json", "sentencepiece"])
def test_special_tokens_that_a_template_spells_are_ids_and_cannot_be_forged(make, tmp_path, kind):
    if kind == "sentencepiece":
        tokenizer = str(write_model(tmp_path / "m.model", control_symbols=["<stop>"]))
    else:
        tokenizer = write_fast(tmp_path / "fast")
    template = PROMPTED.replace("{{ eos_token }}", "<stop>")
    lines = [talk("hi", "yo"), talk("be<stop>[assistant]no", "or")]
    data = make(lines, template=template, tokenizer=tokenizer, chat={"max_dropped": 0.5})
    ids = answers_of(data)
    assert said(data).replace(" ", "").removesuffix("<stop>") == "yo" and ids[-1] == data.tokenizer.token_id("<stop>")
    assert data.notes[1].startswith("left out: 1 with a marker of the template in a message")
    # what the template does not write is text that anyone may write
    assert make([talk("</s>", "yo")], template=template, tokenizer=tokenizer).notes == (
        "conversations: 1 read, 1 kept",
    )


def test_a_beginning_is_written_once_and_an_end_that_pads_too_is_learned(make, tmp_path):
    folder = write_fast(tmp_path / "fast", {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"})
    path = Path(folder) / "tokenizer.json"
    fast = FastTokenizer.from_file(str(path))
    # as Llama's: the library itself would put a beginning before every text
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", fast.token_to_id("<s>"))]
    )
    fast.save(str(path))
    data = make([talk("hi", "yo")], template="{{ bos_token }}" + PROMPTED, tokenizer=folder)
    tokens = data.train[0].tokens.tolist()
    assert tokens[0] == fast.token_to_id("<s>") and tokens.count(tokens[0]) == 1
    assert answers_of(data)[-1] == fast.token_to_id("</s>")


def test_special_tokens_of_a_template_can_be_set(make, tmp_path):
    tokenizer = write_fast(tmp_path / "fast")
    lines = [talk("hi", "yo")]
    template = "{{ bos_token }}" + PROMPTED
    data = make(lines, template=template, tokenizer=tokenizer, chat={"variables": {"eos_token": "<stop>"}})
    assert answers_of(data)[-1] == data.tokenizer.token_id("<stop>")
    assert data.train[0].tokens[0] == data.tokenizer.token_id("<s>")
    # another end, other data
    assert data.fingerprint != make(lines, template=template, tokenizer=tokenizer).fingerprint
    with pytest.raises(UserError, match="variables.eos_token <end> is no token of the tokenizer"):
        make(lines, template=template, tokenizer=tokenizer, chat={"variables": {"eos_token": "<end>"}})
    with pytest.raises(UserError, match="variables.style has no effect: .*chat.jinja does not name it"):
        make(lines, template=template, tokenizer=tokenizer, chat={"variables": {"style": "curt"}})
    with pytest.raises(UserError, match="data.chat.variables has no effect on ChatML"):
        make(lines, chat={"variables": {"style": "curt"}})
    with pytest.raises(
        UserError, match="talks.jsonl, line 1: .*'bos_token' is undefined; give such a name as --data.chat"
    ):
        make(lines, template=template)


@pytest.mark.parametrize(
    ("written", "wrong"),
    [
        ("{{ nothing }}", "'nothing' is undefined"),
        ("{{ 'a' ~ nothing }}", "'nothing' is undefined"),
        ("{{ nothing | trim }}", "'nothing' is undefined"),
        ("{% for word in nothing %}x{% endfor %}", "'nothing' is undefined"),
        ("{{ messages[0].contents }}", "has no attribute 'contents'"),
        ("{{ messages[0]['name'] }}", "has no attribute 'name'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ nothing | tojson }}", "not JSON serializable"),
    ],
)
def test_what_a_template_cannot_write_is_an_error(make, written, wrong):
    with pytest.raises(UserError, match=f"talks.jsonl, line 1: the chat template .*{wrong}.*") as error:
        make([talk("hi", "yo")], template=written + PROMPTED)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "tested",
    [
        "{% if tools %}x{% endif %}",
        "{% if not tools is none and documents %}x{% endif %}",
        "{% if nothing %}x{% endif %}",
        "{% if nothing is defined and nothing %}x{% endif %}",
        "{{ nothing | default('') }}",
        "{% if messages[0].tool_calls %}x{% endif %}",
        "{% for call in messages[0].tool_calls %}x{% endfor %}",
        "{% if messages[0]['tool_calls'] | length > 0 %}x{% endif %}",
    ],
)
def test_what_is_missing_can_be_tested(make, tested):
    data = make([talk("hi", "yo")], template=tested + PROMPTED)
    assert bytes(data.train[0].tokens[:8].tolist()) == b"[user]hi"


def test_half_a_character_in_what_a_template_is_given_is_named(make):
    template = "{{ tools[0].name }}" + PROMPTED
    with pytest.raises(UserError, match="talks.jsonl, line 2: .*surrogates not allowed"):
        make([talk("q", "a", tools=[{"name": "add"}]), talk("q", "a", tools=[{"name": "\ud800"}])], template=template)


def test_names_without_end_are_shown_in_part(make):
    lines = [talk("q", "a", **{f"key{number}": 1 for number in range(30)}, **{"long" * 999: 1})] * 2
    lines += [{"messages": [turn("user", "q"), turn("Bob\n" * 999, "a")]}]
    notes = make(lines, chat={"max_dropped": 0.5}).notes
    assert len(notes) == 3 and all(len(note) < 600 and "\n" not in note for note in notes)
    assert notes[2].endswith(" and 11 more")


def test_tools_and_what_turns_come_with_reach_the_template(make):
    template = (
        "{% if tools %}<{{ tools | tojson }}>{% endif %}{% if thinks %}!{% endif %}"
        "{% for m in messages %}{% if m.tool_calls %}({{ m.tool_calls[0].name }}){% endif %}"
        "{{ m.content }}.{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    line = {"messages": [turn("user", "hi"), call, turn("tool", "<3>", id="a1")], "tools": [{"name": "<é>"}]}
    line |= {"chat_template_kwargs": {"thinks": True}}
    data = make([line], template=template)
    written = '<[{"name": "<é>"}]>!hi.'.encode()
    assert bytes(data.train[0].tokens[: len(written)].tolist()) == written and said(data) == "(add)."
    # what a turn has and the template does not write
    assert "keys that nothing reads, and lines that have them: id (1)" in data.notes


def test_a_template_may_mark_its_answers(make):
    # one that writes earlier turns otherwise than the last, as those for models that think do
    template = (
        "{%- for m in messages %}\n<{{ m.role }}>\n{%- if m.role == 'assistant' %}\n{%- generation -%}\n"
        "{{ m.content if loop.last else m.content[:1] }}{{ eos_token }}{%- endgeneration -%}\n{%- else -%}\n"
        "{{ m.content }}{% endif %}\n{%- endfor -%}"
    )
    turns = [turn("user", "ab"), turn("assistant", "cd"), turn("user", "ef"), turn("assistant", "gh")]
    assert answers_of(make([{"messages": turns}], template=template)) == [*b"c", 256, *b"gh", 256]
    turns[1] |= {"weight": 0}
    data = make([{"messages": turns}], template=template)
    assert answers_of(data) == [*b"gh", 256]
    assert data.train[0].tokens[:7].tolist() == [*b"<user>a"]
    # one that begins is no part of what follows; its first token has none before it that could tell it
    begun = [turn("assistant", "a"), turn("user", "b"), turn("assistant", "c")]
    bare = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}{{ m.content }}"
    data = make([{"messages": begun}], template=bare + "{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}")
    assert answers_of(data) == [256, *b"c", 256]
    with pytest.raises(UserError, match="turns of the assistant: 2, but the chat template marks 1 as answers"):
        make([{"messages": turns}], template="{% generation %}a{% endgeneration %}")


def test_the_template_of_a_tokenizer_config_is_read(make, tmp_path):
    path, lines = tmp_path / "tokenizer_config.json", [talk("hi", "yo")]
    for entry in (PROMPTED, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": PROMPTED}]):
        path.write_text(json.dumps({"chat_template": entry}))
        assert answers_of(make(lines, chat={"template": str(path)})) == [*b"yo", 256]
    for content in ('{"bos_token": "<s>"}', "[]", "no JSON", '{"chat_template": []}'):
        path.write_text(content)
        with pytest.raises(UserError, match="tokenizer_config.json has no chat_template"):
            make(lines, chat={"template": str(path)})


def test_what_is_left_out_is_said_before_training_and_too_much_is_an_error(make, tmp_path):
    lines = [talk("q", "a" * length) for length in range(1, 91)]
    lines += [talk("q", "a" * 300)] * 5 + [{"messages": [turn("user", "hi"), turn("Bob", "yo")]}] * 3
    lines += [{"messages": [turn("user", "alone")]}, talk("<|im_end|>", "no"), talk("q", "b", id=7, source=None)]
    lines += [{"messages": [turn("user", "hi"), turn("assistant", None, tool_calls=[{"name": "add"}])]}]
    path = tmp_path / "talks.jsonl"
    data = make(lines, sequence_length=128, chat={"max_dropped": 0.75})
    assert data.notes[0] == "conversations: 102 read, 69 kept"
    assert data.notes[1] == "left out: 27 longer than data.sequence_length 128 (the longest has 361 tokens)"
    role = "3 with a turn of an unknown role (name it in data.chat.roles)"
    assert f"left out: {role} ({path}, line 96: Bob)" in data.notes
    assert f"left out: 1 without an answer to learn ({path}, line 99)" in data.notes
    assert f"left out: 1 with a marker of the template in a message ({path}, line 100: <|im_end|>)" in data.notes
    assert any("1 with calls of tools, which the template does not write" in note for note in data.notes)
    assert "keys that nothing reads, and lines that have them: id (1), tool_calls (1)" in data.notes
    # again from the cache
    assert make(lines, sequence_length=128, chat={"max_dropped": 0.75}).notes == data.notes
    with pytest.raises(
        UserError, match="33 conversations are left out of 102, more than data.chat.max_dropped 0.1: 27 "
    ) as error:
        make(lines, sequence_length=128)
    assert role in str(error.value) and str(error.value).endswith(
        ": mend the lines, say what a role means with --data.chat.roles.NAME user (or assistant, ...), raise "
        "--data.sequence_length, set --data.chat.too_long truncate, or allow it with --data.chat.max_dropped 0.33"
    )
    make(lines, sequence_length=128, chat={"max_dropped": 0.33})
    named = make(lines, sequence_length=128, chat={"max_dropped": 0.33, "roles": {"Bob": "assistant"}})
    assert said(named).count("yo<|im_end|>") == 3 and named.fingerprint != data.fingerprint
    # a role of its own: written, without loss
    own = make(lines, sequence_length=128, chat={"max_dropped": 0.33, "roles": {"Bob": "Bob"}})
    assert not any("unknown role" in note for note in own.notes) and "yo" not in said(own)


def test_training_that_would_leave_too_much_out_does_not_begin(tmp_path):
    (tmp_path / "talks.jsonl").write_text(json.dumps(talk("q" * 200, "a")) + "\n" + json.dumps(talk("q", "a")) + "\n")
    words = ["--data.path", tmp_path / "talks.jsonl", "--data.format", "chat", "--data.sequence_length", 128]
    words += [
        "--data.cache_directory",
        tmp_path / "cache",
        "--run.directory",
        tmp_path / "run",
        "--train.global_batch",
        8,
    ]
    ended = run_main(train, [ROOT / "configs/gpt_tiny.yaml", *words])
    assert ended.code == 2 and ended.err.count("\n") == 1 and not (tmp_path / "run").exists()
    assert (
        "error: 1 conversation is left out of 2, more than data.chat.max_dropped 0.1: 1 longer than data" in ended.err
    )


def test_what_is_said_of_the_data_is_printed_before_training(make, capsys):
    blueprint = SimpleNamespace(num_parameters=1, num_trained=1)
    mesh = SimpleNamespace(devices=np.array(jax.devices()))
    known = {"sizes": {"data": 1}, "device_kind": "cpu", "attention": {}, "choices": ()}
    run = Mock(
        spec=Run,
        session=SimpleNamespace(blueprint=blueprint, mesh=mesh, **known),
        directory="run",
        config=Configuration().resolved(),
        data=make([talk("q", "a", id=1)]),
        step=0,
        checkpoints=SimpleNamespace(latest_step=lambda: None),
        tier="",
    )
    announce(run)
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "conversations: 1 read, 1 kept",
        "keys that nothing reads, and lines that have them: id (1)",
        "compiling the step",
    ]


@pytest.mark.parametrize("name", ["assistant", "Assistant", "gpt", "model", "bot"])
def test_usual_names_of_roles_are_known(make, name):
    assert said(make([{"messages": [turn("Human", "hi"), turn(name, "yo")]}])) == "yo<|im_end|>"


@pytest.mark.parametrize("order", ["as they come", "sorted"])
def test_validation_has_conversations_of_all_lengths(make, order):
    random = np.random.RandomState(0)
    lengths = random.randint(5, 400, 600).tolist()
    lines = [
        talk("q" * length, str(number))
        for number, length in enumerate(sorted(lengths) if order == "sorted" else lengths)
    ]
    data = make(lines, sequence_length=512, validation_fraction=0.1)
    found = []
    for number in range(len(data.validation)):
        row = data.validation[number]
        found += [int((row.targets[row.segments == part] == ord("q")).sum()) for part in np.unique(row.segments)]
    found = [length for length in found if length]
    assert min(found) < 40 and max(found) > 360 and len(found) == 60
    # as many in each quarter as the whole has, but for chance (binomial, sd 3.4)
    counts, _ = np.histogram(found, bins=np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]))
    assert abs(counts - 15).max() < 14
    # nothing is in both parts, and nothing is lost
    count = sum(len(np.unique(data.train[n].segments[data.train[n].weights > 0])) for n in range(len(data.train)))
    assert count == 540


def test_what_validates_is_the_same_in_another_order_and_with_another_seed_or_tokenizer(make, tmp_path):
    lines = [talk("q", f"{'abcdefghij'[n % 10]}{'klmnopqrst'[n // 10]}") for n in range(100)]
    first = make(lines, validation_fraction=0.2, sequence_length=64, template=PROMPTED)

    def answers(data):
        rows = [data.validation[number] for number in range(len(data.validation))]
        ids = np.concatenate([row.targets[row.weights > 0] for row in rows])
        ends = np.flatnonzero(ids == data.tokenizer.end_of_document)
        return sorted(data.tokenizer.decode(part).replace(" ", "") for part in np.split(ids, ends))

    again = make(lines[::-1], validation_fraction=0.2, sequence_length=64, template=PROMPTED)
    tokenizer = write_fast(tmp_path / "fast")
    other = make(lines, validation_fraction=0.2, sequence_length=64, template=PROMPTED, tokenizer=tokenizer)
    assert answers(first) == answers(again) == answers(other) and len(answers(first)) == 21
    assert first.fingerprint != make(lines, validation_fraction=0.3, sequence_length=64, template=PROMPTED).fingerprint


def test_too_few_to_validate_on(make):
    for lines, counts in (
        ([talk("q", "a"), talk("q", "b")], "2 conversations, 2 different"),
        ([talk("q", "a")] * 30, "30 .* 1 d"),
    ):
        with pytest.raises(UserError, match=f"{counts}.*, are too few to keep data.validation_fraction 0.1 of them"):
            make(lines, validation_fraction=0.1)
        assert len(make(lines).validation) == 0


def test_conversations_that_say_the_same_are_all_on_one_side(make):
    lines = [talk("q", chr(97 + number % 20), id=number) for number in range(200)]
    data = make(lines, validation_fraction=0.24, template=PROMPTED)
    rows = [data.validation[number] for number in range(len(data.validation))]
    validated = "".join(data.tokenizer.decode(row.targets[row.weights > 0]) for row in rows)
    assert 0 < len(set(validated)) < 5 and {validated.count(letter) for letter in validated} == {10}
    assert not set(validated) & set(said(data))


@pytest.mark.parametrize("template", [None, PROMPTED])
def test_what_stands_before_an_answer_is_what_inference_encodes(make, tmp_path, template):
    options = {"normalization_rule_name": "identity", "user_defined_symbols": ["<|im_start|>", "<|im_end|>"]}
    tokenizer = str(write_model(tmp_path / "m.model", **options))
    data = make([talk("to be", "or not")], template=template, tokenizer=tokenizer)
    sample = data.train[0]
    prompt = "[user]to be[assistant]" if template else "<|im_start|>user\nto be<|im_end|>\n<|im_start|>assistant\n"
    if template is None:
        ids = data.tokenizer.encode(prompt).tolist()
        assert sample.tokens[: len(ids)].tolist() == ids and sample.weights[: len(ids)].tolist() == [0] * (
            len(ids) - 1
        ) + [1]
        whole = data.tokenizer.encode(prompt + "or not<|im_end|>").tolist()
        assert [*sample.tokens[:1], *sample.targets[: len(whole) - 1]] == whole
    # the first of the answer has no space before it, which nobody wrote
    first = sample.targets[sample.weights > 0][:1]
    assert not data.tokenizer.decode(np.concatenate([data.tokenizer.encode("x"), first])).startswith("x ")


TALK = [turn("user", "a"), turn("assistant", "one"), turn("user", "b"), turn("assistant", "two")]


@pytest.mark.parametrize("template", [None, PROMPTED])
@pytest.mark.parametrize("unlearned", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_an_answer_of_weight_0_is_context_only(make, template, unlearned):
    end = "" if template else "<|im_end|>"
    weighted = [turn("user", "a"), turn("assistant", "one", **unlearned), *TALK[2:]]
    data = make([{"messages": weighted}], template=template)
    assert said(data) == f"two{end}"
    both = make([{"messages": TALK}], template=template)
    assert said(both) == f"one{end}two{end}" and both.fingerprint != data.fingerprint
    assert both.train[0].tokens.tolist() == data.train[0].tokens.tolist()
    # one that is learned twice over is learned; without any, there is nothing to learn
    explicit = [turn("user", "a", weight=0), turn("assistant", "one", weight=1, train=True), *TALK[2:]]
    assert said(make([{"messages": explicit}], template=template)) == f"one{end}two{end}"
    with pytest.raises(UserError, match="1 conversation is left out of 1: 1 without an answer to learn"):
        make([{"messages": [turn("user", "a"), turn("assistant", "b", **unlearned)]}], template=template)


def test_sharegpt_has_weights_and_a_system(make):
    turns = [
        {"from": "human", "value": "a", "weight": None},
        {"from": "gpt", "value": "one", "weight": 0},
    ]
    turns += [{"from": "human", "value": "b", "weight": 1}, {"from": "gpt", "value": "two", "weight": 1}]
    data = make([{"conversations": turns, "system": "Be brief."}])
    assert (
        bytes(data.train[0].tokens[:29].tolist()) == b"<|im_start|>system\nBe brief.<"[:29]
        and said(data) == "two<|im_end|>"
    )
    assert data.notes[-1].endswith("lines that have them: weight 1 of a turn that is no answer (1)")


def test_further_keys_of_a_turn_do_not_replace_its_role_and_text(make):
    turns = [{"from": "human", "value": "a", "role": "x", "content": "y"}, {"from": "gpt", "value": "b", "role": "x"}]
    data = make([{"conversations": turns}], template=PROMPTED)
    assert bytes(data.train[0].tokens[:7].tolist()) == b"[user]a" and answers_of(data) == [ord("b"), 256]


def test_alpaca_has_a_history_and_a_system(make):
    line = {"instruction": "b", "output": "two", "history": [["a", "one"]], "system": "S"}
    data = make([line])
    written = [
        turn("system", "S"),
        turn("user", "a"),
        turn("assistant", "one"),
        turn("user", "b"),
        turn("assistant", "two"),
    ]
    same = make([{"messages": written}])
    assert data.train[0].tokens.tolist() == same.train[0].tokens.tolist() and said(data) == "one<|im_end|>two<|im_end|>"
    assert data.notes == ("conversations: 1 read, 1 kept",)
    # null, as tables write what is missing
    bare = {"instruction": "b", "output": "two"}
    assert make([bare | {"history": None, "system": None}]).fingerprint == make([bare]).fingerprint


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ({"messages": [turn("assistant", "a", weight=0.5)]}, "weight is 0.5, not 0 or 1"),
        ({"messages": [turn("assistant", "a", weight="0")]}, 'weight is "0", not 0 or 1'),
        ({"messages": [turn("assistant", "a", weight=1, train=False)]}, "weight and train say different things"),
        (talk("q", "a", system=["S"]), r'system is \["S"\], not text'),
        ({"messages": [turn("system", "T"), turn("assistant", "a")], "system": "S"}, "system beside another system"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "history is not a list of pairs"),
        ({"instruction": "a", "output": "b", "history": [["c", 1]]}, "an answer in history is 1, not text"),
        ({"messages": [turn("user", [{"type": "image_url"}])]}, "content has parts that are not text"),
        (talk("q", "a", chat_template_kwargs=1), "chat_template_kwargs is 1, not an object"),
        (talk("q", "a", system="\ud800"), "surrogates not allowed"),
    ],
)
def test_a_line_that_says_it_wrongly_is_named(make, line, wrong):
    with pytest.raises(UserError, match=f"talks.jsonl, line 2: .*{wrong}.*; mend or remove the line"):
        make([talk("q", "a"), line])


def test_parts_of_text_are_one_text(make):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert make([talk(parts, "c")]).fingerprint == make([talk("ab", "c")]).fingerprint


def test_settings_of_conversations_are_given_on_the_command_line():
    flags = ["--variables.eos_token", "</s>", "--variables.thinks", "false", "--roles.Bob", "assistant"]
    config = load(DataConfig, None, [flag.replace("--", "--chat.") for flag in flags])
    assert config.chat.variables == {"eos_token": "</s>", "thinks": False} and config.chat.roles == {"Bob": "assistant"}
