"""Eight simulated CPU devices for every test, and annotated shapes checked wherever tests call."""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAXTRON_TEST_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"])


def pytest_addoption(parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/ anew from today's code")
