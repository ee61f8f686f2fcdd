"""What a store holds, from its pointers."""

from __future__ import annotations

from headtail.config import TrackingConfig
from headtail.examples import world
from headtail.status import status, status_table


def test_latest_station_and_no_release_yet(root: str) -> None:
    receipt = world.run(world.Config(root=root, tracking=TrackingConfig(enabled=False), events=100, gold=5))
    found = status(root)
    assert found["release"] is None
    assert found["stations"]["world"]["path"] == receipt.path
    assert "no release yet" in str(status_table(found).title)
