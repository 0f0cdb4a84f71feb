from __future__ import annotations

from tests.services.dockerd import dockerd

__all__ = ["dockerd"]  # a fixture
