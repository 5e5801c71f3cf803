"""Optional trackers; their packages are stood in for, since neither is part of the installation."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from jaxtron.config import UserError
from jaxtron.run.run_config import RunConfig
from jaxtron.train.trackers import make_trackers


def install(monkeypatch, name, **contents):
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_missing_package_is_one_line_with_the_command(monkeypatch, tmp_path, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as caught:
        make_trackers(RunConfig(trackers=(name,)), tmp_path, {})
    assert f"pip install 'jaxtron[{name}]'" in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_begins_where_one_package_is_missing(monkeypatch, tmp_path):
    begun = []
    install(monkeypatch, "tensorboardX", SummaryWriter=lambda *args, **settings: begun.append(args))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError):
        make_trackers(RunConfig(trackers=("tensorboard", "wandb")), tmp_path, {})
    assert begun == []


@pytest.mark.parametrize(("resume_step", "purge_step"), [(0, None), (40, 41)])
def test_tensorboard_gets_scalars(monkeypatch, tmp_path, resume_step, purge_step):
    calls = []

    def open_writer(directory, purge_step):
        calls.append((directory, purge_step))
        return SimpleNamespace(
            add_scalar=lambda name, value, global_step: calls.append((name, value, global_step)),
            close=lambda: calls.append("close"),
        )

    install(monkeypatch, "tensorboardX", SummaryWriter=open_writer)
    (tracker,) = make_trackers(RunConfig(trackers=("tensorboard",)), tmp_path, {}, resume_step=resume_step)
    tracker.log(50, {"loss": 2.5, "learning_rate": 0.1, "gradient_norm": float("inf")})
    tracker.close()
    assert calls == [
        (str(tmp_path / "tensorboard"), purge_step),
        ("loss", 2.5, 50),
        ("learning_rate", 0.1, 50),
        "close",
    ]


def test_wandb_run_is_continued_under_its_id(monkeypatch, tmp_path):
    begun, logged = [], []

    def init(**settings):
        begun.append(settings)
        return SimpleNamespace(log=lambda metrics, step: logged.append((step, metrics)), finish=lambda: None)

    install(monkeypatch, "wandb", init=init)
    config = RunConfig(trackers=("wandb",), wandb_project="mine")
    for resume_step in (0, 40):
        (tracker,) = make_trackers(config, tmp_path, {"seed": 1}, resume_step=resume_step)
        tracker.log(50, {"loss": float("nan"), "learning_rate": 0.1})
        tracker.close()
    assert logged == [(50, {"learning_rate": 0.1})] * 2
    assert begun[0] == begun[1]
    assert begun[0]["project"] == "mine" and begun[0]["config"] == {"seed": 1} and begun[0]["resume"] == "allow"
