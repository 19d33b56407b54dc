"""How a launch file begins and ends: flags that several share, one clear line for a mistake of the user's, a traceback
for one of ours.
"""

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging

from srl_jax.assets import AssetError
from srl_jax.config import ConfigError, NotARun, TrainConfig, check_overrides
from srl_jax.records import CorruptRecord
from srl_jax.sandbox.isolation import SandboxCrash
from srl_jax.sandbox.toolchain import SandboxUnavailable
from srl_jax.tokenizer import TokenizerError

EXIT_USER_ERROR = 2
EXIT_HOST_LOST = 5

# What an operating system refuses for reasons that are the user's to remove.
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_USERS_OWN = (*_DISK_FULL, errno.EROFS, errno.EACCES, errno.EPERM)
_USERS_PATHS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)


def user_errors() -> tuple[type[Exception], ...]:
    """Every exception whose message is written for the person at the terminal."""
    sandbox = (SandboxUnavailable, SandboxCrash)
    host = (ConfigError, NotARun, AssetError, TokenizerError, CorruptRecord, *sandbox, *_USERS_PATHS)
    if "jax" not in sys.modules:
        return host  # a data machine has no accelerator stack, so nothing below can have been raised
    from srl_jax.checkpoint import CheckpointError
    from srl_jax.control import Diverged
    from srl_jax.evaluate import NothingToEvaluate
    from srl_jax.hosts import HostLost, HostsError
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
    return (*host, *model, *run, ReportError, NothingToEvaluate, HostsError, HostLost)


def define_host_flags() -> None:
    """The flags of a program that several hosts can run together, each started with its own; see `join_hosts`."""
    flags.DEFINE_string("coordinator_address", None, "Several hosts: host:port of process 0, which all can reach.")
    flags.DEFINE_integer("num_processes", None, "Several hosts: how many processes, one to a host.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Several hosts: which process this is, from 0.", lower_bound=0)
    flags.DEFINE_bool("distributed", False, "Several hosts that JAX finds by itself: a TPU pod, Slurm.")
    names = ("coordinator_address", "num_processes", "process_id")

    def complete(given: Mapping[str, Any]) -> bool:
        missing = [name for name in names if given[name] is None]
        if not missing and given["process_id"] >= given["num_processes"]:
            raise flags.ValidationError("--process_id counts from 0, so it must be less than --num_processes")
        if missing and len(missing) < len(names):
            raise flags.ValidationError(f"a run on several hosts also needs {', '.join(f'--{m}' for m in missing)}")
        if not missing and not re.fullmatch(r".+:\d+", given["coordinator_address"]):
            raise flags.ValidationError("--coordinator_address must be host:port")
        if not missing and given["distributed"]:
            raise flags.ValidationError(f"give either --distributed or {', '.join(f'--{m}' for m in names)}")
        return True

    flags.register_multi_flags_validator((*names, "distributed"), complete)


def join_hosts(config: TrainConfig) -> dict[str, Any]:
    """Joins the hosts that the flags tell of, before any JAX computation; {} where they tell of none.

    Returns which share of the data is this host's: `host`, `hosts` and `share` of the data pipeline. Raises
    `HostsError`, and `ConfigError` for what several hosts cannot do.
    """
    given = flags.FLAGS
    if given.coordinator_address is None and not given.distributed:
        return {}
    from srl_jax import hosts  # the accelerator stack

    hosts.join(given.coordinator_address, given.num_processes, given.process_id)
    if hosts.count() > 1:
        hosts.check_settings(config)
    return {"host": hosts.index(), "hosts": hosts.count(), "share": hosts.share}


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
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, (*extra_errors, *user_errors())) or _is_users_own(error):
                code = _fail(error)
            elif _among_hosts():
                traceback.print_exc()
                code = 1
            else:
                raise
            if _among_hosts():
                _leave(error, code)
        sys.exit(code or 0)

    app.run(guarded, flags_parser=parse)


def _among_hosts() -> bool:
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def _leave(error: BaseException, code: int) -> NoReturn:
    """Ends this process alone. Python's way waits until all hosts end, and they may be waiting for this one."""
    from srl_jax import hosts

    hosts.ends_in_order()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_HOST_LOST if isinstance(error, hosts.HostLost) else code)


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
