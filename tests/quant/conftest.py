from tests.formats.decoder.conftest import fp8_checkpoint, plain_dir

__all__ = ["fp8_checkpoint", "plain_dir"]
