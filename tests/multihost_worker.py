"""One of the processes of multihost_test.py: samples and updates on a mesh over all processes, reports what came out.

Between several it also tries every way in which hosts meet (srl_jax/hosts.py).

Arguments: coordinator address, number of processes, this one's number, output file. One process: the same work alone.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from srl_jax import hosts, sharding
from srl_jax.rollout import make_batch
from srl_jax.sampling import sample
from srl_jax.student import load_student, pad_prompts
from srl_jax.train_step import StepSettings, TrainState, train_step
from tests.fakes import perturbed, tiny_config

_P, _G = 4, 2


def main(coordinator: str, processes: int, number: int, out: Path) -> None:
    if processes > 1:
        hosts.join(coordinator, processes, number)
    # Two hosts of two devices: `data` crosses between hosts, `fsdp` stays within one.
    mesh = sharding.make_mesh(data=processes, fsdp=jax.local_device_count())
    config = tiny_config()
    config.sampling.max_new_tokens = 64
    student = load_student(config, mesh)
    gather = lambda tree: jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))

    prompts = [[5 + i, 7, 11 * i, 13][: 2 + i % 3] for i in range(_P)]
    tokens, lengths = pad_prompts(prompts, 8, student.tokenizer.pad_id)
    put = lambda x: jax.device_put(x, sharding.batch_sharding(mesh))
    lora = student.place_lora(jax.tree.map(np.asarray, perturbed(gather(student.fresh_lora(0)))))
    drawn = gather(
        sample(
            student.decoder, {"params": student.params, "lora": lora}, student.automaton, put(tokens), put(lengths),
            jax.random.key(3), group_size=_G, settings=student.sampling, pad_id=student.tokenizer.pad_id,
        )
    )  # fmt: skip
    arrays = {"prompt_tokens": tokens, "prompt_lengths": lengths}
    arrays |= {"tokens": drawn.tokens, "mask": drawn.mask, "logprobs": drawn.logprobs}
    advantages = np.random.default_rng(0).standard_normal((_P, _G)).astype(np.float32)
    optimizer = optax.sgd(1.0)  # the step is the gradient
    before = gather(lora)
    put_alike = lambda x: jax.device_put(np.asarray(x), sharding.replicated(mesh))
    state = TrainState(
        put_alike(np.int32(0)), lora, optimizer.init(lora), put_alike(jax.random.key_data(jax.random.key(0)))
    )
    new, metrics = train_step(
        state, student.params, student.automaton, make_batch(student, arrays, advantages),
        decoder=student.decoder, optimizer=optimizer, settings=StepSettings(micro_batch=_P),
    )  # fmt: skip
    gradients = jax.tree.map(np.subtract, before, gather(new.lora))
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
    np.savez(out.with_suffix(".npz"), tokens=drawn.tokens, **flat)
    values = {name: float(value) for name, value in metrics.items()}
    met = meet(out.parent, number) if processes > 1 else {}
    out.write_text(json.dumps({"metrics": values, "devices": jax.device_count(), "hash": student.base_hash, **met}))


def meet(folder: Path, number: int) -> dict:
    """What `share`, `spread`, `from_first`, `greatest` and the checks gave this process."""
    pieces = [b"a" * (3000 * number), b"", bytes([number])] if number else [b"one"]
    hosts._SEEN_WITHIN_S = 0.2
    return {
        "shared": [[[len(piece), piece[-1:].hex()] for piece in some] for some in hosts.share(pieces)],
        "spread": [
            piece.decode() for piece in hosts.spread("abcde", lambda mine: [f"{c}{number}".encode() for c in mine])
        ],
        "none": hosts.spread([], list),
        "first": hosts.from_first(lambda: {"number": number, "half": 0.5}),
        "greatest": hosts.greatest(7 * number),
        "same": refusal(lambda: hosts.check(tiny_config(), folder, {"the data": "x"})),
        "differs": refusal(lambda: hosts.check(tiny_config(), folder, {"the data": f"set {number}"})),
        "apart": refusal(lambda: hosts.check(tiny_config(), folder / f"own{number}", {})),
        "left": sorted(path.name for path in folder.glob(".seen*")),
    }


def refusal(work: Callable[[], None]) -> str | None:
    try:
        return work()
    except hosts.HostsError as error:
        return str(error)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
