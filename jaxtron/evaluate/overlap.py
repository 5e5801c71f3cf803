"""ROUGE and BLEU of answers, by the packages that the field has for them; the one file that needs the extra `pairs`."""

from collections.abc import Sequence

from jaxtron.config import UserError

try:
    from rouge_score.rouge_scorer import RougeScorer
except ImportError:
    RougeScorer = None
try:
    from sacrebleu.metrics.bleu import BLEU
except ImportError:
    BLEU = None

KINDS = ("rouge1", "rouge2", "rougeL")
PACKAGES = {"rouge": (RougeScorer, "rouge-score"), "bleu": (BLEU, "sacrebleu")}


def check_package(score: str) -> None:
    """A `UserError` unless the package of a score is there: rouge or bleu."""
    found, package = PACKAGES[score]
    if found is None:
        raise UserError(f'--{score} needs {package}: pip install "jaxtron[pairs]"')


def rouge(answers: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """F-measures of single words, of pairs of them and of the longest common subsequence, 0 to 1, in the mean.

    As rouge-score has them without its stemmer: words are letters and digits, in lower case (Lin 2004).
    """
    assert RougeScorer is not None
    scorer = RougeScorer(list(KINDS))
    found = [scorer.score(target, answer) for answer, target in zip(answers, wanted, strict=True)]
    return {kind: sum(one[kind].fmeasure for one in found) / len(found) for kind in KINDS}


def bleu(answers: Sequence[str], wanted: Sequence[str]) -> tuple[float, str]:
    """BLEU of all answers together, 0 to 100, and sacrebleu's word for how it was computed (1804.08771)."""
    assert BLEU is not None
    scorer = BLEU()
    found = scorer.corpus_score(list(answers), [list(wanted)])
    return float(found.score), str(scorer.get_signature())
