"""Small SQLite stores with people in them, and a way to run a command on one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import app
from engines.base import Template
from store.records import Enrolment
from store.sqlite import SqliteStore


def a_template(seed: int, dimension: int = 64) -> Template:
    vector = np.random.default_rng(seed).normal(size=dimension)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def a_store(folder: Path, *seeds: int) -> SqliteStore:
    store = SqliteStore(folder / "faces.sqlite3")
    store.prepare()
    if seeds:
        store.append(1, [Enrolment(f"person-{seed}", a_template(seed), "m", 1000.0 + seed) for seed in seeds])
    return store


def commanded(folder: Path, capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    assert app.main([*words, "--data-dir", str(folder)]) == status
    return capsys.readouterr().out
