"""Serve rewards: `SRL_JAX_REWARD_TOKEN=... python launch/reward_server.py --config=configs/smollm2_cpu.py`.

Scores completions for runs with the same reward and tokenizer (`--config.sandbox.server=http://127.0.0.1:8700`), so
that their machines run no foreign code. The connection is not encrypted: beyond the loopback, put TLS in front.
Exit code: 0 stopped by a signal after answering what was taken, 2 a mistake in flags, configuration or machine.
"""

import os

from absl import flags
from ml_collections import config_flags

from srl_jax import cli
from srl_jax.config import ConfigError, validate
from srl_jax.sandbox.hosting import open_host
from srl_jax.sandbox.wire import SERVER_TOKEN

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: a file in configs/ with get_config().")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; the default takes this machine's clients only.")
_PORT = flags.DEFINE_integer("port", 8700, "Port to listen on.", lower_bound=1, upper_bound=65535)
flags.mark_flag_as_required("config")


def main() -> int:
    config = _CONFIG.value
    validate(config)
    try:
        from srl_jax import bounded_http
        from srl_jax.sandbox import server
    except ModuleNotFoundError as error:
        raise ConfigError("", "server", f"{error}; pip install 'srl_jax[server]'") from error
    token = os.environ.get(SERVER_TOKEN, "")
    if len(token) < bounded_http.MIN_TOKEN_LENGTH:
        raise ConfigError("", f"${SERVER_TOKEN}", f"set it to {bounded_http.MIN_TOKEN_LENGTH} characters or more")
    with bounded_http.listen(_HOST.value, _PORT.value) as listening, open_host(config) as host:
        app = server.make_app(host.services, host.contract, token=token, runners=host.runners)
        about = f"{config.sandbox.workers} slots, {host.isolation}"
        print(f"reward server on http://{_HOST.value}:{_PORT.value}, {about}", flush=True)
        bounded_http.make_server(app).run(sockets=[listening])
    return 0


if __name__ == "__main__":
    cli.run(main)
