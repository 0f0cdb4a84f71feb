from tests.registry.team import team

__all__ = ["team"]
