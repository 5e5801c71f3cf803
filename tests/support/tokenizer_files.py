"""SentencePiece models and tiktoken ranks, made small."""

import base64
import io

import sentencepiece

SAMPLE = "to be or not to be that is the question whether tis nobler in the mind to suffer " * 3


def write_model(path, **options):
    """A small SentencePiece BPE with bytes for what it has not seen."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([SAMPLE] * 5),
        model_writer=written,
        **{"vocab_size": 320, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2} | options,
    )
    path.write_bytes(written.getvalue())
    return path


def write_ranks(path, merges=(b"to", b" be", b"be", b"th", b" th", b" the")):
    """All single bytes and some merges."""
    tokens = [bytes([byte]) for byte in range(256)] + list(dict.fromkeys([b" b", b" t", *merges]))
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path
