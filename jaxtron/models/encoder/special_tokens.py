"""Which ids the special tokens of an encoder have: a tokenizer's own, or the last of the model's vocabulary."""

from jaxtron.config import UserError
from jaxtron.data.masked.bert import BertVocabulary
from jaxtron.data.masked.words import continuations
from jaxtron.data.tokenizers import HasPieces, Tokenizer

NAMES = ("[CLS]", "[SEP]", "[MASK]", "[PAD]")


def special_tokens(vocab_size: int, tokenizer: Tokenizer | None, *, whole_words: bool) -> BertVocabulary:
    """The special tokens that the tokenizer has by name; one that has none gets the last of `vocab_size` ids.

    Without a tokenizer the model's vocabulary is all that is known. With `whole_words` also which pieces continue a
    word. `UserError` where some are there and others not, or where no ids are left.
    """
    found = [None if tokenizer is None else tokenizer.token_id(name) for name in NAMES]
    missing = [name for name, number in zip(NAMES, found, strict=True) if number is None]
    first = vocab_size - len(NAMES)
    text = first if tokenizer is None else tokenizer.vocab_size
    if len(missing) == len(NAMES):
        if text > first:
            raise UserError(
                f"the tokenizer's {text} tokens leave no ids of model.vocab_size {vocab_size} for "
                f"{', '.join(NAMES)}, which it has not; set --model.vocab_size {text + len(NAMES)}"
            )
        found = list(range(first, vocab_size))
    elif missing:
        raise UserError(
            f"the tokenizer has no token {missing[0]}, which encoders need; give one that has {', '.join(NAMES)}"
        )
    classify, separate, mask, pad = (number for number in found if number is not None)
    continues = None
    if whole_words and isinstance(tokenizer, HasPieces):
        special = {tokenizer.token_id(name) for name in tokenizer.special_texts}
        try:
            continues = continuations(tokenizer.pieces, special={number for number in special if number is not None})
        except UserError as error:
            raise UserError(f"{error}: --model.masking.whole_words false") from None
    return BertVocabulary(classify=classify, separate=separate, mask=mask, pad=pad, size=text, continues=continues)
