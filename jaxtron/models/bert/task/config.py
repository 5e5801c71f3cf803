"""Settings of a BERT that is trained on a task of texts."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from jaxtron.config import NoEffect, UserError
from jaxtron.models.bert.config import BertConfig
from jaxtron.models.encoder.settings import EncoderSettings

Task = Literal["classify", "choose"]


class BertTaskConfig(BertConfig):
    """A BERT whose pooled output tells classes of texts apart, or chooses among answers.

    Examples are rows of files that `data.path`, or `data.train` and `data.validation`, name: TSV with a header, or
    JSON lines.
    """

    CONTENT: ClassVar[str] = f"{EncoderSettings.CONTENT} columns"

    task: Task = "classify"
    """classify: a class of one text or of a pair (MNLI, QQP, SST-2); choose: one of several answers to a question about
    a text (RACE)."""
    columns: tuple[str, ...] = ()
    """Columns, or keys, of an example: of classify a text, perhaps a second one, and the class (none: sentence1,
    sentence2, label); of choose the text, the question, the answers and the right one's letter or number (none:
    article, question, options, answer)."""
    labels: tuple[str, ...] = ("0", "1")
    """classify: the classes as files spell them; F1 is told of the second where there are two."""
    choices: int = Field(default=4, ge=2)
    """choose: answers of a question."""

    @model_validator(mode="after")
    def _check_task(self) -> "BertTaskConfig":
        name = {"model.task": self.task}
        for setting, task in (("labels", "classify"), ("choices", "choose")):
            value = getattr(self, setting)
            if self.task != task and value != type(self).model_fields[setting].default:
                raise NoEffect(f"model.{setting}", value, name, "leave it out")
        if len(self.labels) < 2 or len({*self.labels}) < len(self.labels):
            raise UserError(f"model.labels {' '.join(self.labels)} must be two classes or more, each once")
        wanted = (2, 3) if self.task == "classify" else (4,)
        if self.columns and (len(self.columns) not in wanted or len({*self.columns}) < len(self.columns)):
            counts = " or ".join(map(str, wanted))
            raise UserError(
                f"model.columns {' '.join(self.columns)} must be {counts} different names for model.task {self.task}: "
                f"{'one text or two, and the class' if self.task == 'classify' else ' '.join(self.names)}"
            )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Columns of an example."""
        return self.columns or (("sentence1", "sentence2", "label") if self.task == "classify" else RACE)

    @property
    def texts(self) -> int:
        """Texts of an example that go through the layers, each by itself."""
        return self.choices if self.task == "choose" else 1

    @property
    def outputs(self) -> int:
        """Numbers that the head makes of each text."""
        return 1 if self.task == "choose" else len(self.labels)


RACE = ("article", "question", "options", "answer")
