"""How a launch file ends: one clear line for a mistake of the user's, a traceback for one of ours."""

import sys
from collections.abc import Callable

from absl import app, flags, logging

from srl_jax.assets import AssetError
from srl_jax.config import ConfigError, check_overrides
from srl_jax.records import CorruptRecord
from srl_jax.sandbox.toolchain import SandboxUnavailable
from srl_jax.tokenizer import TokenizerError

EXIT_USER_ERROR = 2


def user_errors() -> tuple[type[Exception], ...]:
    """Every exception whose message is written for the person at the terminal."""
    # Imported late: these pull in JAX, which `--help` and a mistyped flag should not wait for.
    from srl_jax.checkpoint import CheckpointError
    from srl_jax.memory import DoesNotFit
    from srl_jax.model.export import ExportError
    from srl_jax.model.families import UnsupportedModel
    from srl_jax.model.hf import BadWeights
    from srl_jax.report import ReportError
    from srl_jax.rollout import PromptTooLong
    from srl_jax.sharding import BadMesh

    host = (ConfigError, AssetError, TokenizerError, CorruptRecord, SandboxUnavailable, FileNotFoundError)
    model = (UnsupportedModel, BadWeights, ExportError, DoesNotFit, BadMesh)
    return (*host, *model, CheckpointError, ReportError, PromptTooLong)


def run(main: Callable[[], int | None], *extra_errors: type[Exception]) -> None:
    """Parses flags, calls `main`, exits with its code; 2 after a user error (`extra_errors`: the caller's own)."""

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments {argv[1:]}; overrides look like --config.grpo.kl_coef=0.1")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax alone logs a page at INFO
        try:
            code = main()
        except Exception as error:
            if not isinstance(error, (*extra_errors, *user_errors())):
                raise
            print(f"error: {error}", file=sys.stderr)
            code = EXIT_USER_ERROR
        sys.exit(code or 0)

    try:
        check_overrides(sys.argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    app.run(guarded)
