"""A conversation's ids are those of the whole text; where a token would lie over an answer's border, it is cut."""

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from jaxtron.data.chat.template import ChatMl, Conversation, Message, Piece
from jaxtron.data.chat.tokens import encode_conversations, tokens_to_insert
from jaxtron.data.tokenizers import ByteTokenizer, CharacterTokenizer, HuggingFaceTokenizer, load_tokenizer
from tests.support.tokenizer_files import write_model, write_ranks

WORDS = "to be or not to be that is the question whether tis nobler in the mind to suffer".split()
SAMPLE = [f"{' '.join(WORDS)}\n\nuser: {' '.join(WORDS[::-1])}\nassistant: be 12"] * 3
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]


def byte_level(add_prefix_space):
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(SAMPLE, trainers.BpeTrainer(vocab_size=400, **options))
    return tokenizer


def metaspace(scheme):
    """Llama 2's kind; with a normalizer, as transformers writes the older of its files."""
    tokenizer = FastTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    symbols = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        [line.replace("\n", " ") for line in SAMPLE],
        trainers.BpeTrainer(vocab_size=420, special_tokens=symbols, show_progress=False, max_token_length=12),
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


FAST = {
    "byte-level": lambda: byte_level(False),
    "byte-level, prefix space": lambda: byte_level(True),
    "metaspace, first": lambda: metaspace("first"),
    "metaspace, always": lambda: metaspace("always"),
    "metaspace, never": lambda: metaspace("never"),
    "prepending normalizer": lambda: metaspace("normalizer"),
}
COLLAPSING = "sentencepiece, white space collapsed"
KINDS = [
    *FAST,
    "sentencepiece",
    "sentencepiece, unigram",
    COLLAPSING,
    "tiktoken",
    "tiktoken, gpt2",
    "bytes",
    "characters",
]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("tokenizers"), {}

    def make_one(kind):
        if kind in FAST:
            path = folder / f"{kind}.json"
            FAST[kind]().save(str(path))
            return HuggingFaceTokenizer(path)
        if kind.startswith("sentencepiece"):
            options = {"model_type": "unigram", "hard_vocab_limit": False} if "unigram" in kind else {}
            # as Llama's: no character is changed, and line feeds are bytes
            if kind != COLLAPSING:
                options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
            return load_tokenizer(str(write_model(folder / f"{kind}.model", **options)))
        if kind.startswith("tiktoken"):
            merges = (b"to", b" be", b"be", b"th", b" th", b" the", b"\n\n", b"  ", b"as", b"ss", b"er", b":\n")
            path = write_ranks(folder / f"{kind}.tiktoken", merges=merges)
            return load_tokenizer(f"{path}:gpt2" if "gpt2" in kind else str(path))
        return ByteTokenizer() if kind == "bytes" else CharacterTokenizer(" \n:.,<>[]|/_()0123456789" + alphabet())

    def alphabet():
        return "".join(map(chr, range(97, 123))) + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

    return lambda kind: made[kind] if kind in made else made.setdefault(kind, make_one(kind))


def encode(pieces, tokenizer, **settings):
    return encode_conversations([pieces], tokenizer=tokenizer, **settings)[0]


def runs_of(sequence):
    """Ids of prompt, answer, prompt, answer ..."""
    borders = np.flatnonzero(np.diff(sequence.is_answer.astype(int))) + 1
    return [part.tolist() for part in np.split(sequence.ids, borders)]


def prompt_before(pieces, number):
    return "".join(piece.text for piece in pieces[:number])


def is_clean(pieces, tokenizer):
    """Whether the ids of the whole begin with those of every prompt, and with those up to the end of every answer."""
    whole = tokenizer.encode(prompt_before(pieces, len(pieces))).tolist()
    parts = [tokenizer.encode(prompt_before(pieces, number)).tolist() for number in range(len(pieces))]
    return all(whole[: len(part)] == part for part in parts)


def chatml(*turns):
    return [p for p in ChatMl().render(Conversation([Message(role, text) for role, text in turns])) if p.text][:-1]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_chatml_are_those_of_the_whole(make, kind):
    tokenizer = make(kind)
    pieces = chatml(
        ("user", "to be or"), ("assistant", "The mind"), ("user", " be"), ("assistant", "not to be"), ("user", "")
    )
    assert is_clean(pieces, tokenizer)
    sequence = encode(pieces, tokenizer)
    assert sequence.ids.tolist() == tokenizer.encode(prompt_before(pieces, len(pieces))).tolist()
    # and the border is where the ids of the prompt end
    ends = [len(tokenizer.encode(prompt_before(pieces, number))) for number in range(1, 5)]
    assert np.flatnonzero(np.diff(sequence.is_answer.astype(int))).tolist() == [end - 1 for end in ends[:-1]]
    assert len(sequence.ids) == ends[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_random_conversations_by_templates_with_and_without_clean_borders(make, kind):
    tokenizer, random = make(kind), np.random.RandomState(KINDS.index(kind))
    num_clean = 0
    for _ in range(60):
        # beginnings and ends that merge with what is beside them, and some that do not
        before, after = (
            random.choice([":", ": ", ":\n", ":\n\n", "\n\n", "[i]", " "]),
            random.choice(["", "\n", "</s>", " "]),
        )
        pieces = []
        for _ in range(random.randint(1, 4)):
            question, answer = (" ".join(random.choice(WORDS, random.choice([2, 5, 40]))) for _ in range(2))
            answer = random.choice(["", " ", "\n", "\n\n"]) + answer
            pieces += [Piece(f"user: {question}\nassistant{before}", False), Piece(answer + after, True)]
        sequence = encode(pieces, tokenizer)
        # what inference encodes is what stands before the first answer
        prompt = tokenizer.encode(pieces[0].text)
        assert sequence.ids[: len(prompt)].tolist() == prompt.tolist()
        assert not sequence.is_answer[: len(prompt)].any() and sequence.is_answer[len(prompt)]
        if is_clean(pieces, tokenizer):
            num_clean += 1
            assert sequence.ids.tolist() == tokenizer.encode(prompt_before(pieces, len(pieces))).tolist()
        # cut or not, it says the same, and answers say theirs
        assert tokenizer.decode(sequence.ids) == tokenizer.decode(tokenizer.encode(prompt_before(pieces, len(pieces))))
        assert len(runs_of(sequence)) == len(pieces)
    assert num_clean


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_has_no_space_that_nobody_wrote(make, kind):
    tokenizer = make(kind)
    # a space at the end of a text is no token where white space collapses: there it comes with the answer
    for before in ("[i]", "not:" if kind == COLLAPSING else "not: "):
        sequence = encode([Piece(before, False), Piece("be", True)], tokenizer)
        answer = sequence.ids[sequence.is_answer]
        # behind another text, where the space before a text is none of its own
        shown = tokenizer.decode(np.concatenate([tokenizer.encode("x"), answer]))
        assert shown.lstrip(" ") == "xbe"


def test_a_token_over_the_border_is_cut_there(make):
    gpt2 = make("tiktoken, gpt2")
    # " be" is one token, and so is " "; a model that is prompted with the space can but answer "be"
    sequence = encode([Piece("not: ", False), Piece("be or", True)], gpt2)
    assert [gpt2.decode(sequence.ids[sequence.is_answer == part]) for part in (0, 1)] == ["not: ", "be or"]
    # GPT-2 splits "\n\n" before a word, but not at the end, where inference has it
    sequence = encode([Piece("not\n\n", False), Piece("be", True)], gpt2)
    assert sequence.ids.tolist() != gpt2.encode("not\n\nbe").tolist()
    assert sequence.ids.tolist() == [*gpt2.encode("not\n\n"), *gpt2.encode("be")]
    # the end of an answer likewise: ".\n" would be one token of it and of what follows
    merged = make("tiktoken")
    sequence = encode([Piece("a", False), Piece("to:", True), Piece("\nto", False), Piece("be", True)], merged)
    assert [merged.decode(sequence.ids[sequence.is_answer == part]) for part in (0, 1)] == ["a\nto", "to:be"]


def test_special_tokens_that_a_library_takes_for_text_are_ids(make):
    for kind, end in (("sentencepiece", "</s>"), ("tiktoken", "<|endoftext|>"), ("bytes", "<|endoftext|>")):
        tokenizer = make(kind)
        tokens = tokens_to_insert([end, "<nothing>"], tokenizer)
        assert tokens == {end: tokenizer.end_of_document} and tokenizer.encode(end).size > 1
        pieces = [Piece("user: to", False), Piece(f"be{end}", True), Piece("user: or", False), Piece(f"not{end}", True)]
        sequence = encode(pieces, tokenizer, tokens=tokens)
        assert [run[-1] for run in runs_of(sequence)[1::2]] == [tokenizer.end_of_document] * 2
        assert tokenizer.decode(sequence.ids).replace(" ", "") == "user:tobeuser:ornot"
    # where the library knows it, the whole text stays whole
    assert tokens_to_insert(["</s>", "<|im_end|>"], make("metaspace, first")) == {}


def test_nothing_is_learned_from_a_conversation_without_answers():
    assert len(encode([Piece("a", False)], ByteTokenizer()).ids) == 0 == len(encode([], ByteTokenizer()).ids)
    assert (
        encode([Piece("", False), Piece("a", True), Piece("", True), Piece("b", True)], ByteTokenizer()).ids.size == 2
    )
