"""A project with healthy runs of another tool, made once and copied for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.doctor.runs import edit_json, write_project


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a base, an adapter with its merged model, and a whole model. Read only."""
    folder = tmp_path_factory.mktemp("doctor") / "project"
    write_project(folder)
    return folder


@pytest.fixture
def project(healthy: Path, tmp_path: Path) -> Path:
    """A copy of it whose adapter stands on the copied base."""
    folder = tmp_path / "project"
    shutil.copytree(healthy, folder)
    edit_json(folder / "lora/adapter_config.json", base_model_name_or_path=str(folder / "base"))
    return folder
