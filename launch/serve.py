"""Serve a student as a teacher or an editor's model: `python launch/serve.py --workdir=runs/demo --port=8000`.

An OpenAI-compatible endpoint (`base_url` http://127.0.0.1:8000/v1) for `configs/teacher.yaml`, `launch/rewrite.py
--teacher`, or any client. Its answers always parse, unless the run was trained without the grammar. It writes text and
executes nothing. With $SRL_JAX_API_KEY set, that is asked for; beyond the loopback it must be, and the connection is
not encrypted.
Exit code: 0 stopped by a signal after answering what was taken, 2 a mistake in flags, run or machine.
"""

import os
from pathlib import Path

from absl import flags

from srl_jax import cli
from srl_jax.config import ConfigError, read_config

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run whose newest checkpoint is served.")
_MODEL = flags.DEFINE_string("model", None, "Directory that launch/export.py wrote, instead of a run.")
_NAME = flags.DEFINE_string("name", "student", "What clients call the model.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; the default takes this machine's clients only.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on.", lower_bound=1, upper_bound=65535)
_ROWS = flags.DEFINE_integer("rows", 8, "Conversations answered at once.", lower_bound=1, upper_bound=256)
_MAX_PROMPT_TOKENS = flags.DEFINE_integer(
    "max_prompt_tokens", 0, "The longest conversation, in tokens; 0: as in training.", lower_bound=0
)
flags.mark_flags_as_mutual_exclusive(["workdir", "model"], required=True)
_KEY = "SRL_JAX_API_KEY"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def main() -> int:
    try:
        from srl_jax import bounded_http, serving
    except ModuleNotFoundError as error:
        raise ConfigError("", "server", f"{error}; pip install 'srl_jax[server]'") from error
    token = os.environ.get(_KEY, "")
    if (token or _HOST.value not in _LOOPBACK) and len(token) < bounded_http.MIN_TOKEN_LENGTH:
        raise ConfigError("", f"${_KEY}", f"set it to {bounded_http.MIN_TOKEN_LENGTH} characters or more")
    from srl_jax.trained import open_trained

    config = read_config(Path(_WORKDIR.value)) if _WORKDIR.value else None
    path = Path(_WORKDIR.value or _MODEL.value)
    with bounded_http.listen(_HOST.value, _PORT.value) as listening, open_trained(config, path) as opened:
        config, student, lora = opened
        width = _MAX_PROMPT_TOKENS.value or config.data.max_prompt_tokens
        with serving.Batcher(student, lora, max_prompt_tokens=width, rows=_ROWS.value) as batcher:
            app = serving.make_app(batcher, name=_NAME.value, token=token)
            print(f"{_NAME.value} on http://{_HOST.value}:{_PORT.value}/v1, {width} tokens a prompt", flush=True)
            bounded_http.make_server(app, limits=serving.LIMITS).run(sockets=[listening])
    return 0


if __name__ == "__main__":
    cli.run(main)
