"""Settings of a BERT that is trained on a task of texts."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from jaxtron.config import NoEffect, UserError
from jaxtron.models.bert.config import BertConfig
from jaxtron.models.encoder.settings import EncoderSettings

Task = Literal["classify", "choose", "answer"]


class BertTaskConfig(BertConfig):
    """A BERT whose pooled output tells classes of texts apart or chooses among answers, or that finds them in a text.

    Examples are rows of files that `data.path`, or `data.train` and `data.validation`, name: TSV with a header, or
    JSON lines.
    """

    CONTENT: ClassVar[str] = f"{EncoderSettings.CONTENT} columns"

    task: Task = "classify"
    """classify: a class of one text or of a pair (MNLI, QQP, SST-2); choose: one of several answers to a question about
    a text (RACE); answer: where in a text the answer to a question stands, if it is there (SQuAD)."""
    columns: tuple[str, ...] = ()
    """Columns, or keys, of an example: of classify a text, perhaps a second one, and the class (none: sentence1,
    sentence2, label); of choose the text, the question, the answers and the right one's letter or number (none:
    article, question, options, answer); of answer the question, the text, and answers with their places (none:
    question, context, answers)."""
    labels: tuple[str, ...] = ("0", "1")
    """classify: the classes as files spell them; F1 is told of the second where there are two."""
    choices: int = Field(default=4, ge=2)
    """choose: answers of a question."""
    window_step: int = Field(default=128, ge=1)
    """answer: tokens from the beginning of one window to that of the next, of a text too long for one."""
    question_tokens: int = Field(default=64, ge=1)
    """answer: of a longer question the end is cut off."""
    answer_tokens: int = Field(default=30, ge=1)
    """answer: the longest that is taken for one."""

    @model_validator(mode="after")
    def _check_task(self) -> "BertTaskConfig":
        name = {"model.task": self.task}
        for setting, task in OF_TASK.items():
            value = getattr(self, setting)
            if self.task != task and value != type(self).model_fields[setting].default:
                raise NoEffect(f"model.{setting}", value, name, "leave it out")
        if len(self.labels) < 2 or len({*self.labels}) < len(self.labels):
            raise UserError(f"model.labels {' '.join(self.labels)} must be two classes or more, each once")
        wanted = (2, 3) if self.task == "classify" else (len(COLUMNS[self.task]),)
        if self.columns and (len(self.columns) not in wanted or len({*self.columns}) < len(self.columns)):
            counts = " or ".join(map(str, wanted))
            raise UserError(
                f"model.columns {' '.join(self.columns)} must be {counts} different names for model.task {self.task}: "
                f"{'one text or two, and the class' if self.task == 'classify' else ' '.join(COLUMNS[self.task])}"
            )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Columns of an example."""
        return self.columns or COLUMNS[self.task]

    @property
    def texts(self) -> int:
        """Texts of an example that go through the layers, each by itself."""
        return self.choices if self.task == "choose" else 1

    @property
    def outputs(self) -> int:
        """Numbers that the head makes of each text, or of answer of each token: it begins here, it ends here."""
        return {"classify": len(self.labels), "choose": 1, "answer": 2}[self.task]


COLUMNS: dict[Task, tuple[str, ...]] = {
    "classify": ("sentence1", "sentence2", "label"),
    "choose": ("article", "question", "options", "answer"),
    "answer": ("question", "context", "answers"),
}
"""Of the tasks' usual sets: GLUE's, RACE's, SQuAD's."""
OF_TASK: dict[str, Task] = {
    "labels": "classify",
    "choices": "choose",
    "window_step": "answer",
    "question_tokens": "answer",
    "answer_tokens": "answer",
}
"""Settings that one task has."""
