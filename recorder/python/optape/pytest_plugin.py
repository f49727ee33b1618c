"""A fixture that records a test. Switch it on with `pytest_plugins = ["optape.pytest_plugin"]` in conftest.py, or `pytest -p optape.pytest_plugin`.

::

    def test_spikes(optape_recording):
        net(images)
        summary = optape_recording.stop()
        assert summary.op_calls > 0

The file is `optape_recording.path`, below the test's `tmp_path`; what is not stopped is when the test ends. Without the fixture a test can
say `with optape.record(tmp_path / "test.optape"):` itself.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from . import Recording, record


@pytest.fixture
def optape_recording(tmp_path: Path) -> Iterator[Recording]:
    """Records the test into `tmp_path / "test.optape"`."""
    with record(tmp_path / "test.optape") as recording:
        yield recording
