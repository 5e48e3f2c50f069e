"""Fixtures of the training tests."""

import pytest


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the loss curve: drawing takes longer than a toy run."""
    monkeypatch.setattr("bitnet.train.pretrain.plot_run", lambda rows, target, title: [])
