"""Pre-train a NEO model. Start it with torchrun, or with a launcher of neo/scripts; --help lists the flags."""

try:
    from megatron.pretrain.main import main
    from megatron.pretrain.errors import entry
except ModuleNotFoundError as error:
    if error.name not in ("megatron", "megatron.pretrain"):
        raise
    raise SystemExit("megatron.pretrain is not installed: run `pip install -e .` in this folder") from None

# Saving a checkpoint starts processes that import this file again, so nothing may run without this guard.
if __name__ == "__main__":
    entry(main)
