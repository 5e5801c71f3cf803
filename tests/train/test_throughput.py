"""Tokens a second, by a clock the test turns."""

import jax.numpy as jnp
import pytest

from jaxtron.train.throughput import Throughput


class Clock:
    """A clock that moves when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def take_steps(throughput, clock, number, seconds):
    for _ in range(number):
        clock.now += seconds
        throughput.finish_step(768, jnp.zeros(()))


def test_first_step_is_left_out():
    clock = Clock()
    throughput = Throughput(clock)
    take_steps(throughput, clock, 1, 30.0)
    take_steps(throughput, clock, 9, 0.5)
    rate = throughput.measure()
    assert (rate.steps, rate.step_seconds) == (9, pytest.approx(0.5))
    assert rate.tokens_per_second == pytest.approx(768 / 0.5)


def test_window_of_the_first_step_alone_includes_compilation():
    clock = Clock()
    throughput = Throughput(clock)
    take_steps(throughput, clock, 1, 30.0)
    assert throughput.measure().step_seconds == pytest.approx(30)
    take_steps(throughput, clock, 1, 0.5)
    assert throughput.measure().step_seconds == pytest.approx(0.5)


def test_excluded_time_does_not_count():
    clock = Clock()
    throughput = Throughput(clock)
    take_steps(throughput, clock, 1, 30.0)
    take_steps(throughput, clock, 2, 0.5)
    with throughput.excluded(jnp.zeros(())):
        clock.now += 1000
    take_steps(throughput, clock, 2, 0.5)
    with pytest.raises(KeyError), throughput.excluded(jnp.zeros(())):
        clock.now += 1000
        raise KeyError
    assert throughput.measure().step_seconds == pytest.approx(0.5)


def test_windows_are_apart():
    clock = Clock()
    throughput = Throughput(clock)
    take_steps(throughput, clock, 1, 30.0)
    rates = []
    for seconds in (1.0, 0.25):
        take_steps(throughput, clock, 4, seconds)
        rates.append(throughput.measure().step_seconds)
    assert rates == [pytest.approx(1.0), pytest.approx(0.25)]


def test_results_are_waited_for_before_the_clock_is_read(monkeypatch):
    clock, events = Clock(), []
    monkeypatch.setattr("jax.block_until_ready", lambda outputs: events.append(outputs))
    throughput = Throughput(clock)
    throughput.finish_step(768, "first")
    throughput.finish_step(768, "second")
    with throughput.excluded("third"):
        pass
    assert events == ["first", "third"]
