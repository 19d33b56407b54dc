"""How a launch file ends: one clear line for a mistake of the user's, a traceback for one of ours."""

import errno
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging

from srl_jax.assets import AssetError
from srl_jax.config import ConfigError, NotARun, TrainConfig, check_overrides
from srl_jax.records import CorruptRecord
from srl_jax.sandbox.toolchain import SandboxUnavailable
from srl_jax.tokenizer import TokenizerError

EXIT_USER_ERROR = 2

# What an operating system refuses for reasons that are the user's to remove.
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_USERS_OWN = (*_DISK_FULL, errno.EROFS, errno.EACCES, errno.EPERM)
_USERS_PATHS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)


def user_errors() -> tuple[type[Exception], ...]:
    """Every exception whose message is written for the person at the terminal."""
    host = (ConfigError, NotARun, AssetError, TokenizerError, CorruptRecord, SandboxUnavailable, *_USERS_PATHS)
    if "jax" not in sys.modules:
        return host  # a data machine has no accelerator stack, so nothing below can have been raised
    from srl_jax.checkpoint import CheckpointError
    from srl_jax.control import Diverged
    from srl_jax.evaluate import NothingToEvaluate
    from srl_jax.memory import DoesNotFit
    from srl_jax.model.export import ExportError
    from srl_jax.model.families import UnsupportedModel
    from srl_jax.model.hf import BadWeights
    from srl_jax.replay import ReplayError
    from srl_jax.report import ReportError
    from srl_jax.rollout import PromptTooLong
    from srl_jax.sandbox.wire import RemoteError
    from srl_jax.sharding import BadMesh

    model = (UnsupportedModel, BadWeights, ExportError, DoesNotFit, BadMesh)
    run = (CheckpointError, Diverged, ReplayError, RemoteError, PromptTooLong)
    return (*host, *model, *run, ReportError, NothingToEvaluate)


def run(main: Callable[[], int | None], *extra_errors: type[Exception], section: type = TrainConfig) -> None:
    """Parses flags, calls `main`, exits with its code; 2 after a user error (`extra_errors`: the caller's own).

    `section` is the dataclass that the recipe in `--config` returns.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            _check_recipe(argv)
            check_overrides(argv, section=section)
            rest = flags.FLAGS(argv)
        except (ConfigError, flags.Error) as error:
            sys.exit(_fail(_config_error(error) or error))
        if len(rest) > 1:
            sys.exit(_fail(f"unexpected arguments {rest[1:]}; overrides look like --config.seed=1"))
        return rest

    def guarded(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
            # What fails in Orbax is raised by `Checkpointer`, so its own pages, tracebacks among them, add nothing.
            logging.get_absl_logger().addFilter(lambda record: "/orbax/" not in record.pathname)
        try:
            code = main()
        except Exception as error:
            if not isinstance(error, (*extra_errors, *user_errors())) and not _is_users_own(error):
                raise
            code = _fail(error)
        sys.exit(code or 0)

    app.run(guarded, flags_parser=parse)


def _fail(error: Exception | str) -> int:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        text += "; free space and run the same command again"
    print(f"error: {text}", file=sys.stderr)
    return EXIT_USER_ERROR


def _is_users_own(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in _USERS_OWN


def _check_recipe(argv: Sequence[str]) -> None:
    """A missing recipe, before `config_flags` puts a placeholder in its place that fails at the first use."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        match = re.fullmatch(r"--?config(?:=(.*))?", argument)
        if match:
            path = (match.group(1) or following).partition(":")[0]
            if not Path(path).is_file():
                raise flags.Error(f"--config={path}: no such file; recipes are the files in configs/")


def _config_error(error: BaseException | None) -> ConfigError | None:
    """The recipe's own mistake, where `config_flags` and absl have wrapped it into their errors."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error
